"""Learning in AUTOMATIC1111: one piece of work in its queue, with its progress bar, live preview and Interrupt button.

The tab and the API both come here. Nothing is lost: the vector is saved before the last pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import LibraryError
from ..learn.preview import Preview, learning_curve
from ..learn.request import LearnRequest, lines_of
from ..learn.result import LearnResult
from ..learn.watch import Watch
from ..library import Library, safe_name
from ..pictures import read_pictures
from ..vector_file import SUFFIX
from .webui_denoiser import learning

PREVIEW_SEEDS = 1000  # added to the seed of learning: other pictures than it learned from


@dataclass(frozen=True)
class Learned:
    """What learning made: the vector is in the library as `name`. pictures: before and after, and the curve."""

    name: str
    path: Path
    result: LearnResult
    interrupted: bool
    pictures: list[Image.Image]

    def words(self) -> str:
        early = "Interrupted: this is the best vector so far.\n" if self.interrupted else ""
        return f"{early}{self.result.summary()}\nSaved as {self.name}: use it as <concept:{self.name}:1> in a prompt."


class StateWatch(Watch):
    """Shows progress in the web UI's `shared.state`."""

    def __init__(self, preview: Preview | None, state: Any) -> None:
        super().__init__(preview)
        self.state = state
        state.job_count, state.job_no, state.sampling_steps = 1, 0, 100

    def asked(self) -> bool:
        return bool(self.state.interrupted or self.state.stopping_generation)

    def at(self, percent: float, image: Image.Image | None = None, words: str = "") -> None:
        self.state.sampling_step = min(99, int(percent))  # at 100 the page would take the work for done
        self.state.textinfo = words or None
        if image is not None:
            self.state.assign_current_image(image)


def learn(
    request: LearnRequest,
    name: str = "",
    *,
    overwrite: bool = False,
    pictures: Sequence[Path] = (),
    without: Sequence[Path] = (),
    into: Library,
) -> Learned:
    """Learn on the model that the web UI has loaded, and save into the library. Hold the queue's lock.

    name: in the library; empty: the title, else what was asked for. Errors: ConceptSteerError, before any work where
    names, prompts or pictures are wrong.
    """
    from modules import shared

    prompts = request.preview_prompts()
    name = free_name(request, name, into, overwrite)
    request = replace(request, title=request.title.strip() or name)
    with learning(request.size or None) as denoiser:
        size = (denoiser.latent_shape[1] * 8, denoiser.latent_shape[2] * 8)
        pixels, reference = (read_pictures(list(files), size) if files else None for files in (pictures, without))
        seeds = [request.seed + PREVIEW_SEEDS + i for i in range(len(prompts))]
        preview = Preview(denoiser, prompts, seeds)
        watch = StateWatch(preview, shared.state)
        result = request.run(denoiser, pixels, reference, caching=watch.caching, progress=watch.step, stop=watch.stop)
        path = into.save(result.vector, name, overwrite=overwrite)
        sheet = preview.sheet(result.vector, "before and after")
    into.save(result.vector, name, overwrite=True, preview=sheet)
    return Learned(name, path, result, watch.interrupted, [sheet, learning_curve(result)])


def free_name(request: LearnRequest, name: str, into: Library, overwrite: bool) -> str:
    """The name to save under. Errors: LibraryError when it may not be one, or is taken."""
    wanted = [name, request.title, *lines_of(request.positive), request.prompt]
    chosen = safe_name(next((text.strip() for text in wanted if text.strip()), ""))
    if (into.folders[0] / (chosen + SUFFIX)).exists() and not overwrite:
        raise LibraryError(
            f"The library has a vector {chosen!r} already: choose another name, or allow it to be overwritten."
        )
    return chosen


def learn_queued(request: LearnRequest, **options: Any) -> Learned:
    """`learn` as the web UI's API does its work: after what is in the queue, with its progress and Interrupt."""
    from modules import shared
    from modules.call_queue import queue_lock

    with queue_lock:
        shared.state.begin(job="concept_steer_learn")
        try:
            return learn(request, **options)
        finally:
            shared.state.end()
