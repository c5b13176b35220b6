"""The Fair group of the web UIs: an attribute's values shared out over the pictures of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import LibraryError
from ..fairness import Attribute, describe, plan, target_of
from ..library import ATTRIBUTE_SUFFIX
from ..steering import Steer
from .webui import library
from .webui_job import Job
from .webui_rows import without_tags


def attributes() -> dict[str, Path]:
    """The attributes that Fair can balance, by name; of equal names the first folder's."""
    found: dict[str, Path] = {}
    for folder in library().folders:
        for path in sorted(folder.glob(f"*{ATTRIBUTE_SUFFIX}")) if folder.is_dir() else ():
            found.setdefault(path.name.removesuffix(ATTRIBUTE_SUFFIX), path)
    return found


def attribute(name: str) -> Attribute:
    """Errors: LibraryError, VectorFileError."""
    found = attributes()
    if name not in found:
        folders = ", ".join(map(str, library().folders))
        raise LibraryError(
            f"There is no attribute {name!r} (there are: {', '.join(found) or 'none'}) in {folders}. Make one with "
            "`concept-steer fair --learn`."
        )
    return Attribute.load(found[name])


def balance(job: Job) -> list[Sequence[Steer]]:
    """The steers of all pictures of a run that is to be fair; told in the infotext and under the pictures."""
    from modules import shared

    from .webui_denoiser import denoiser_of

    p, fair = job.p, job.settings.fair
    assert fair is not None
    chosen = attribute(fair.attribute)
    seed = int(p.all_seeds[0]) if fair.seed < 0 else fair.seed
    texts = [without_tags(text) for text in p.all_prompts]
    denoiser = denoiser_of(shared.sd_model)
    plans = {
        text: plan(
            denoiser,
            text,
            [target_of(chosen, fair.targets)],
            len(texts),
            always=[chosen.name],
            seed=seed,
            mode=fair.mode,  # type: ignore[arg-type]
            first=fair.first,
            strength=fair.strength,
        )
        for text in dict.fromkeys(texts)
    }
    for made in plans.values():
        p.comment(describe(made.report()))
    told = [job.settings.of_picture(seed, fair.first + number).text() for number in range(len(texts))]
    job.note(of_each(told))
    return [plans[text].steers[number] for number, text in enumerate(texts)]


def of_each(told: Sequence[str]) -> Callable[..., str]:
    """An infotext that differs from picture to picture of a run; the web UI counts pictures batch by batch."""

    def text(p: Any, index: int, all_prompts: Any = None, use_main_prompt: bool = False, **_: Any) -> str:
        whole = use_main_prompt or all_prompts is p.all_prompts
        return told[index if whole else int(p.iteration) * int(p.batch_size) + index]

    return text
