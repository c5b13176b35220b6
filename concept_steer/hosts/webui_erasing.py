"""Learning to erase in the web UI: one piece of work in its queue, with its progress bar, live preview and Interrupt.

What is learned lands where the web UI looks for it: the embedding in its folder of embeddings, the LoRA in that of its
LoRAs. The tab and the API both come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import LearnError, SettingError
from ..geom_erasing import lora
from ..geom_erasing.found_file import MAX_CAPTION
from ..geom_erasing.reading import read_examples
from ..geom_erasing.request import EMBEDDINGS, LORAS, Erasing, ErasingRequest
from ..pictures import UNREADABLE, as_seen
from .webui_denoiser import host, learning, plain
from .webui_learning import StateWatch
from .webui_text import engines_of

CAPTION = ".txt"  # of a picture, in a file of its name


@dataclass(frozen=True)
class Erased:
    """name: of the embedding and of the LoRA. pictures: before and after, and where the thing was found."""

    name: str
    lines: list[str]
    interrupted: bool
    pictures: list[Image.Image]

    def words(self) -> str:
        early = ["Interrupted: this is what was learned so far."] if self.interrupted else []
        return "\n".join([*early, *self.lines])


def erase(request: ErasingRequest, files: Sequence[Path], *, overwrite: bool = False) -> Erased:
    """Learn on the model that the web UI has loaded, and save. Hold the queue's lock.

    files: pictures, and .txt files of their names with their captions, which come before the request's. Errors:
    ConceptSteerError, before any work where names, captions, the detector or the pictures are wrong.
    """
    watch = StateWatch(None, host("shared").state)
    work = Erasing(request, watch, folders(), overwrite)
    chosen, captions = told(files, request)
    plain(captions)

    def asked() -> None:
        if watch.stop():
            raise LearnError("Interrupted before anything was learned.")

    work.look(lambda number: _picture(chosen[number]), captions, asked, chosen)
    with learning(request.size or None) as denoiser:
        size = (denoiser.latent_shape[1] * 8, denoiser.latent_shape[2] * 8)
        examples = read_examples(denoiser, work.found, work.own, size)
        result = work.learn(denoiser, examples)
        lines = work.keep()
        if LORAS in work.paths:
            lines.append(f"In the prompt: <lora:{work.name}:1>.")
        if EMBEDDINGS in work.paths:
            noticed(denoiser.sd_model)
        with lora.adapted(denoiser, request.rank, 0, result.lora) if result.lora else nullcontext():
            sheet = work.preview.sheet(result.tokens, "before and after", denoiser)
    return Erased(work.name, lines, watch.interrupted, [sheet, work.where()])


def noticed(sd_model: Any) -> None:
    """Forge reads its embeddings when it loads a checkpoint; AUTOMATIC1111 sees by itself what is new."""
    for engine in engines_of(sd_model).values():
        if hasattr(engine, "embeddings"):
            engine.embeddings.load_textual_inversion_embeddings()


def told(files: Sequence[Path], request: ErasingRequest) -> tuple[list[Path], list[str]]:
    """The pictures among the files and the caption of each. Errors: SettingError."""
    texts = {file.stem: file for file in files if file.suffix.lower() == CAPTION}
    chosen = [file for file in files if file.suffix.lower() != CAPTION]
    if not chosen:
        raise SettingError("There are no pictures to learn from: give at least 4 that show the thing, better 50.")
    if not texts:
        return chosen, request.captions_of(len(chosen))
    if strange := sorted(set(texts) - {file.stem for file in chosen}):
        raise SettingError(f"{strange[0]}{CAPTION} is the caption of no picture: there is no picture of that name.")
    if len({file.stem for file in chosen}) < len(chosen):
        raise SettingError("Two pictures have the same name, so their captions cannot be told apart: rename one.")
    others = iter(request.captions_of(len(chosen) - len(texts)) if len(texts) < len(chosen) else [])
    return chosen, [_text(texts[file.stem]) if file.stem in texts else next(others) for file in chosen]


def folders() -> dict[str, Path]:
    """Where the web UI looks for embeddings and for LoRAs."""
    options = host("shared").cmd_opts
    return {EMBEDDINGS: Path(options.embeddings_dir), LORAS: Path(options.lora_dir)}


def erase_queued(request: ErasingRequest, files: Sequence[Path], **options: Any) -> Erased:
    """`erase` as the web UI's API does its work: after what is in the queue, with its progress and Interrupt."""
    state = host("shared").state
    with host("call_queue").queue_lock:
        state.begin(job="concept_steer_erase")
        try:
            return erase(request, files, **options)
        finally:
            state.end()


def _picture(file: Path) -> Image.Image:
    try:
        return as_seen(file)
    except UNREADABLE as error:
        raise SettingError(f"{file} cannot be read as a picture ({error}): take it out.") from error


def _text(file: Path) -> str:
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise SettingError(f"{file} is not a text in UTF-8 ({error}).") from error
    if len(text) > MAX_CAPTION:
        raise SettingError(f"{file} is longer than the {MAX_CAPTION} characters of a caption.")
    return text
