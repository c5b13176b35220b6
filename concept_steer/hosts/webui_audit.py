"""The tab's section "Audit this checkpoint": the audit as one piece of work in the web UI's queue.

It has the web UI's progress bar and Interrupt, and the page it writes lies in the web UI's folder of outputs. What was
read is kept in the web UI's cache, so that an interrupted audit goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..analysis.audit import Audit, AuditSettings, audit, percent
from ..analysis.audit_files import fresh_folder, write_audit
from ..analysis.audit_page import summary_picture
from ..analysis.word_list import typed_words
from ..demo.auditing import DemoJudge, usual_words
from ..errors import ConceptSteerError
from .webui_denoiser import family_of, host, learning
from .webui_learning import StateWatch

FOLDER = "concept-steer-audit"  # in the outputs, and in the cache
USUAL = AuditSettings()
EXTENTS = {  # as the page calls them
    "quick: half the noises, no pictures": replace(
        USUAL, defaults=replace(USUAL.defaults, seeds=4), space=replace(USUAL.space, seeds=4), samples=0
    ),
    "full: with sample pictures of the strongest findings": USUAL,
}


class Interrupted(ConceptSteerError):
    """Somebody pressed Interrupt."""


@dataclass(frozen=True)
class Audited:
    """files: the page first, then its JSON and charts. picture: each attribute's chart."""

    files: tuple[Path, ...]
    picture: Image.Image
    found: Audit


def audit_loaded(words: str, settings: AuditSettings) -> Audited:
    """Audit the model that the web UI has loaded, and write the page. Hold the queue's lock.

    words: a list as YAML or JSON; empty: the usual one. Errors: ConceptSteerError, before any work where the list is
    wrong; Interrupted, when nothing is written.
    """
    shared = host("shared")
    given = typed_words(words) if words.strip() else None
    watch = StateWatch(None, shared.state)

    def told(what: str, done: int, total: int) -> None:
        watch.at(percent(what, done, total), words=f"{what} {done} / {total}")

    with learning() as denoiser:
        try:
            found = audit(
                denoiser,
                given or usual_words(denoiser.family),
                settings=settings,
                name=_name(shared.sd_model),
                cache=Path(host("cache").cache_dir) / FOLDER,
                judge=DemoJudge() if denoiser.family == "demo" else None,
                progress=told,
                stop=watch.stop,
            )
        except KeyboardInterrupt:
            raise Interrupted(
                "Interrupted, so there is no page. What was read is kept: the next audit goes on from there."
            ) from None
    *others, page = write_audit(found, fresh_folder(Path(host("paths_internal").default_output_dir) / FOLDER))
    return Audited((page, *others), summary_picture(found), found)


def usual_text() -> str:
    """The list that is used when none is given, as JSON to edit. Errors: ConceptSteerError without a model."""
    family, _ = family_of(host("shared").sd_model)
    return json.dumps(usual_words(family).as_dict(), indent=1, ensure_ascii=False)


def _name(sd_model: Any) -> str:
    """Of the checkpoint, as the web UI calls it."""
    info = getattr(sd_model, "sd_checkpoint_info", None)
    return str(getattr(info, "name_for_extra", "") or "the loaded checkpoint")
