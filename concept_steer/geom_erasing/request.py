"""What is to be erased, as a person asks for it in a host: one set of fields, and what is done and told, for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..denoiser import Denoiser
from ..errors import SettingError
from ..learn.request import MOST_PIXELS, check_types, in_range, lines_of, request_of
from ..learn.watch import PREVIEWS, Watch
from ..library import safe_name
from ..safety.detectors import Detector
from . import lora
from .dataset import Scan, detect
from .dataset_report import covered_share, sheet
from .detectors import KNOWN, detector_of
from .embedding import LocationTokens, check_name
from .found_file import Found
from .learning import ErasingResult, learn_erasing
from .preview import ErasingPreview
from .settings import ErasingSettings, Examples

TOKENS, BOTH, MASKED = "tokens", "tokens and LoRA", "masked LoRA"
WAYS = {  # key: in words
    TOKENS: "tokens (model removal)",
    BOTH: "tokens + LoRA (data removal)",
    MASKED: "masked LoRA (no words needed)",
}
AT_ONCE = 8  # pictures a detector is given
LOOKING = 10  # percent of the bar that looking for the thing takes
SHOWN = 4  # pictures of the preview
SMALL = 320  # px: a thumbnail's longest side
PREVIEW_SEEDS = 1000  # added to the seed of learning
MOST_STEPS, MOST_BATCH = 20_000, 64
EMBEDDINGS, LORAS = "embeddings", "loras"


@dataclass(frozen=True)
class ErasingRequest:
    """detector: one of KNOWN. captions: of the pictures, one a line, or one for all.

    concept: the thing's name, empty for the detector's. way: one of WAYS. rank: of the LoRA, where there is one.
    name: of the files and in prompts, empty for no- and the thing's name. size: of the side to which picture files are
    cut, in pixels, 0 for the model's own. Errors: SettingError when out of range.
    """

    detector: str = "watermark"
    threshold: float = 0.5
    concept: str = ""
    captions: str = ""
    way: str = TOKENS
    bins: int = 4
    steps: int = 400
    batch: int = 4
    rank: int = 16
    seed: int = 0
    name: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if self.detector not in KNOWN:
            raise SettingError(f"There is no detector {self.detector!r}: choose one of {', '.join(KNOWN)}.")
        if self.way not in WAYS:
            raise SettingError(f"There is no way {self.way!r} to erase: choose one of {', '.join(WAYS)}.")
        for name, low, high in (
            ("threshold", 0.05, 1), ("bins", 1, 8), ("steps", 1, MOST_STEPS), ("batch", 1, MOST_BATCH),
            ("rank", 1, 256), ("seed", 0, 2**31 - 1), ("size", 0, MOST_PIXELS),
        ):  # fmt: skip
            in_range(name, getattr(self, name), low, high)

    @staticmethod
    def of(fields: Mapping[str, Any]) -> ErasingRequest:
        """From what came over a web API. Errors: SettingError, which names what is unknown or of the wrong type."""
        return request_of(ErasingRequest, fields)

    @property
    def settings(self) -> ErasingSettings:
        return ErasingSettings(
            bins=self.bins,
            steps=self.steps,
            batch=self.batch,
            rank=0 if self.way == TOKENS else self.rank,
            way="masked" if self.way == MASKED else "told",
            seed=self.seed,
        )

    def captions_of(self, count: int) -> list[str]:
        """Errors: SettingError when there are neither none, nor one, nor one for each picture."""
        lines = lines_of(self.captions) or [""]
        if len(lines) not in (1, count):
            raise SettingError(
                f"{count} pictures came with {len(lines)} captions: write one line for all of them, or one for each."
            )
        return lines * count if len(lines) == 1 else lines


class Erasing:
    """One piece of work: look, learn, show, keep. folders: where EMBEDDINGS and LORAS are kept, None to keep nothing.

    Errors: LearnError, SafetyError, SettingError: for a detector or peft that is not installed, and for a name that may
    not be one or is taken, which is better known before minutes of learning.
    """

    def __init__(
        self, request: ErasingRequest, watch: Watch, folders: Mapping[str, Path] | None, overwrite: bool = False
    ) -> None:
        self.request, self.watch, self.overwrite = request, watch, overwrite
        if request.way != TOKENS:
            lora.check_installed()
        self.judge: Detector = detector_of(request.detector, request.threshold)
        self.own = str(getattr(self.judge, "concept", request.detector))  # the detector's word
        self.concept = request.concept.strip() or self.own
        self.name = safe_name(check_name(request.name.strip() or "no-" + "-".join(self.concept.lower().split())))
        self.paths = {} if folders is None else self._free(folders)
        self.found: list[Found] = []
        self.small: list[Image.Image] = []

    def _free(self, folders: Mapping[str, Path]) -> dict[str, Path]:
        kinds = {TOKENS: (EMBEDDINGS,), BOTH: (EMBEDDINGS, LORAS), MASKED: (LORAS,)}[self.request.way]
        found = {kind: folders[kind] / f"{self.name}.safetensors" for kind in kinds}
        taken = [path for path in found.values() if path.exists()]
        if taken and not self.overwrite:
            raise SettingError(
                f"{taken[0].parent.name}/{taken[0].name} is there already: choose another name, or allow it to be "
                "overwritten."
            )
        return found

    def look(
        self,
        picture: Callable[[int], Image.Image],
        captions: Sequence[str],
        asked: Callable[[], None],
        files: Sequence[Path] | None = None,
    ) -> list[Found]:
        """What is in the pictures. picture: one by its number; only thumbnails of them are kept.

        asked: before each few, where a host may end the work by an exception.
        """
        count = len(captions)
        names = files or [Path(f"picture {number + 1}") for number in range(count)]
        for first in range(0, count, AT_ONCE):
            asked()
            part = slice(first, min(count, first + AT_ONCE))
            some = [picture(number) for number in range(count)[part]]
            self.found += detect(some, captions[part], [self.judge], names[part])
            for one in some:
                self.small.append(one.copy())
                self.small[-1].thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
            self.watch.at(LOOKING * len(self.found) / count, words=f"looked at {len(self.found)} of {count}")
        return self.found

    @property
    def boxes(self) -> list[Any]:
        """Of each picture, as it was looked at."""
        return [one.boxes.get(self.own, []) for one in self.found]

    def learn(self, denoiser: Denoiser, examples: Examples) -> ErasingResult:
        """Errors: LearnError; when it was interrupted before the first step too, as watch.interrupted says."""
        settings, watch = self.request.settings, self.watch
        prompts = list(dict.fromkeys([*(examples.captions[i] for i in examples.spoiled), *examples.captions]))
        seeds = [settings.seed + PREVIEW_SEEDS + i for i in range(SHOWN)]
        self.preview = ErasingPreview(denoiser, [prompts[i % len(prompts)] for i in range(SHOWN)], seeds)

        def progress(step: int, steps: int, loss: float, tokens: Callable[[], LocationTokens]) -> None:
            words, image = f"step {step} of {steps}, loss {loss:.3f}", None
            if step % max(1, steps // PREVIEWS) == 0 and not watch.stop():
                image = self.preview.sheet(tokens() if settings.way == "told" else None, words)
            watch.at(LOOKING + (100 - LOOKING) * step / steps, image, words)

        self.preview.begin()
        self.result = learn_erasing(
            denoiser, examples, self.concept, name=self.name, settings=settings, progress=progress, stop=watch.stop
        )
        return self.result

    def keep(self) -> list[str]:
        """Write the files; what was found, learned and kept, in words. Errors: VectorFileError."""
        result = self.result
        if EMBEDDINGS in self.paths and result.tokens is not None:
            result.tokens.save(self.paths[EMBEDDINGS], self.overwrite)
        if LORAS in self.paths and result.lora is not None:
            way = "told" if result.tokens is not None else "masked"
            about = {"concept": self.concept, "steps": str(len(result.losses)), "way": way}
            lora.save(result.lora, self.paths[LORAS], about, self.overwrite)
        saved = ", ".join(f"{kind}/{path.name}" for kind, path in self.paths.items())
        return [self.seen(), *result.summary().splitlines(), f"Saved: {saved}." if saved else "Not kept: save is off."]

    def seen(self) -> str:
        mine = [covered_share(one) for one in self.boxes if one]
        count = len(self.found)
        told = f"{self.concept!r} was found in {len(mine)} of {count} pictures ({len(mine) / count:.0%})"
        return told + (f"; where it is, it covers {sum(mine) / len(mine):.0%} of the picture." if mine else ".")

    def where(self) -> Image.Image:
        """The pictures with what was found in boxes."""
        names = [Path(f"{number}. {one.file.name}") for number, one in enumerate(self.found, 1)]
        found = [dataclasses.replace(one, file=name) for one, name in zip(self.found, names, strict=True)]
        return sheet(Scan(found, (), 0, [self.own], True, Path()), Path(), dict(zip(names, self.small, strict=True)))
