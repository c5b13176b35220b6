"""What all of `concept-steer analyse` share: the model and its reader, prompts and words, and where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from .audit import words_for
from .models import bar, load_checkpoint, picture_size
from .output import ready_folder, write_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..analysis.reading import Reader
    from ..analysis.word_list import WordList
    from ..denoiser import Denoiser


def begin(args: argparse.Namespace) -> tuple[Denoiser, WordList]:
    from dataclasses import replace

    from .audit import read_given

    if args.out:
        ready_folder(args.out)
    given = read_given(args.words)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    words = given or words_for(None, denoiser.family)
    return denoiser, replace(words, neutral=args.neutral or words.neutral)


def reader_of(denoiser: Denoiser, words: WordList, args: argparse.Namespace, *, predicted: bool = False) -> Reader:
    """predicted: the settings that defaults are read with best, where the command line says nothing else."""
    from dataclasses import replace

    from ..analysis.audit import AuditSettings
    from ..analysis.reading import Reader

    usual = AuditSettings().defaults if predicted else AuditSettings().space
    given: dict[str, Any] = {"seeds": args.seeds, "neutral": words.neutral}
    if args.moment is not None:
        given["moments"] = (args.moment,)
    if args.space:
        given["space"] = args.space
    cache = None if args.cache is None else ready_folder(args.cache)
    return Reader(denoiser, replace(usual, **given), cache, args.batch)


def read(reader: Reader, prompts: Sequence[str]) -> dict[str, Tensor]:
    with bar("reading") as progress:
        return reader.read(prompts, progress.at)


def prompts_of(args: argparse.Namespace, words: WordList) -> dict[str, str]:
    """Name -> prompt: those of the command line, or the list's roles."""
    from .discover import _words as lines_of_file

    given = [*args.prompts, *(lines_of_file(args.file) if args.file else [])]
    return {prompt: prompt for prompt in given} or {role: words.prompt(role) for role in words.roles}


def words_of(args: argparse.Namespace, words: WordList) -> dict[str, str]:
    """Name -> prompt: those of the command line, or the list's further words and the values of its attributes."""
    from ..analysis.word_list import name_of

    given = getattr(args, "given", [])
    return {name_of(word): word.replace("{}", words.neutral) for word in given} or words.directions()


def captions_of(folder: Path) -> dict[str, str]:
    """File name -> caption of a folder's .txt files. Errors: ConceptSteerError."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt")
        found = {path.stem: path.read_text(encoding="utf-8").strip() for path in files}
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptSteerError(f"{folder} cannot be read as a folder of captions ({error}).") from None
    found = {name: text for name, text in found.items() if text}
    if not found:
        raise ConceptSteerError(f"{folder} holds no captions: put .txt files there, one for each picture.")
    return found


def read_folder(reader: Reader, denoiser: Denoiser, files: Sequence[Path]) -> Mapping[str, Tensor]:
    from ..pictures import read_pictures

    with bar("pictures") as progress:
        h = reader.pictures(read_pictures(files, picture_size(denoiser)), progress.at)
    return {path.name: value for path, value in zip(files, h, strict=True)}


def finish(args: argparse.Namespace, name: str, lines: Sequence[str], told: Any, image: Image) -> int:
    print("\n".join(lines))
    if args.out:
        from ..vector_file import write_atomic

        out = ready_folder(args.out)
        data = json.dumps(told, indent=1, ensure_ascii=False).encode()
        write_atomic(out / f"{name}.json", data, overwrite=True)
        print(f"Written: {out / name}.json, {write_picture(image, out / f'{name}.png', {'analysis': name})}")
    return 0
