"""CLIP's byte-pair tokenizer on the standard library alone, from the vocabulary files that others ship.

Two layouts of the vocabulary are read: a folder with vocab.json and merges.txt (the `tokenizer` folder of every
Stable Diffusion in diffusers' layout, and of ComfyUI) and OpenCLIP's bpe_simple_vocab_16e6.txt.gz.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConceptSteerError

STARTS, ENDS = ("<|startoftext|>", "<start_of_text>"), ("<|endoftext|>", "<end_of_text>")
PACKAGED = ("open_clip", "clip")  # packages that carry OpenCLIP's vocabulary file
FILE = "bpe_simple_vocab_16e6.txt.gz"
CLIP_SIZE = 49408
MAX_BYTES = 32 * 2**20
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
RUN = re.compile("L+|N|O+")


@lru_cache(maxsize=1)
def byte_letters() -> tuple[str, ...]:
    """The letter that stands for each byte in the vocabulary: printable ones for themselves, the rest from U+0100."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256))
    return tuple(chr(byte) if byte in shown else chr(256 + next(hidden)) for byte in range(256))


def words_of(text: str) -> list[str]:
    """Text in CLIP's pieces: runs of letters, single digits, runs of signs, English contractions; lower case."""
    clean = html.unescape(html.unescape(unicodedata.normalize("NFC", text.translate(QUOTES))))
    clean = " ".join(clean.split()).lower()
    kinds = "".join(_kind(letter) for letter in clean)
    words, at = [], 0
    while at < len(clean):
        found = CONTRACTION.match(clean, at) or RUN.match(kinds, at)
        if found is None:  # white space
            at += 1
            continue
        words.append(clean[at : found.end()])
        at = found.end()
    return words


def _kind(letter: str) -> str:
    if letter.isspace():
        return " "
    return {"L": "L", "N": "N"}.get(unicodedata.category(letter)[0], "O")


class ClipTokenizer:
    """Prompts to token ids. vocabulary: token -> id; merges: pairs "a b" from the most to the least frequent.

    Errors: ConceptSteerError for a vocabulary without CLIP's start, end and byte tokens.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[str]) -> None:
        self.vocabulary = dict(vocabulary)
        self.merges = tuple(merges)
        self.start = self._special(STARTS)
        self.end = self._special(ENDS)
        missing = [f"{letter}{end}" for letter in byte_letters() for end in ("", "</w>")]
        if not all(token in self.vocabulary for token in missing):
            raise ConceptSteerError("This vocabulary lacks tokens for single bytes: it is not one of CLIP's kind.")
        self._rank = {tuple(pair.split(" ")): i for i, pair in enumerate(self.merges)}
        self._known: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def _special(self, names: Sequence[str]) -> int:
        for name in names:
            if name in self.vocabulary:
                return self.vocabulary[name]
        raise ConceptSteerError(f"This vocabulary has no token {names[0]}: it is not one of CLIP's kind.")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end."""
        return [token for word in words_of(text) for token in self._word(word)]

    def __call__(self, prompts: Sequence[str], length: int = 77) -> Tensor:
        """Ids (B, length) int64, as OpenCLIP pads them (zeros after the end token) and cuts what is too long."""
        rows = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = [self.start, *self.encode(prompt)[: length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _word(self, word: str) -> tuple[int, ...]:
        if word not in self._known:
            letters = byte_letters()
            parts = [letters[byte] for byte in word.encode("utf-8")]
            parts[-1] += "</w>"
            self._known[word] = tuple(self.vocabulary[part] for part in self._merged(parts))
        return self._known[word]

    def _merged(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return parts


def read_tokenizer(path: Path) -> ClipTokenizer:
    """A vocabulary from a folder (vocab.json, merges.txt) or OpenCLIP's .txt.gz. Errors: ConceptSteerError."""
    try:
        if path.is_dir():
            vocabulary = json.loads(_text(path / "vocab.json"))
            merges = [line for line in _text(path / "merges.txt").split("\n") if line and not line.startswith("#")]
            return ClipTokenizer({str(token): int(number) for token, number in vocabulary.items()}, merges)
        with gzip.open(path) as file:
            lines = file.read(MAX_BYTES).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ConceptSteerError(
            f"{path} cannot be read as CLIP's vocabulary ({error}). Expected a folder with vocab.json and merges.txt, "
            f"or {FILE}."
        ) from error
    letters = sorted(byte_letters())
    merges = lines[1 : CLIP_SIZE - 2 * len(letters) - 2 + 1]  # the file has more than CLIP uses
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return ClipTokenizer({token: i for i, token in enumerate([*tokens, STARTS[0], ENDS[0]])}, merges)


def find_tokenizer() -> ClipTokenizer:
    """CLIP's vocabulary from an installed package that carries it, none of which is imported.

    Errors: ConceptSteerError, which says what to install or to name.
    """
    for package in PACKAGED:
        found = find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            if (Path(folder) / FILE).is_file():
                return read_tokenizer(Path(folder) / FILE)
    raise ConceptSteerError(
        "CLIP's vocabulary is not on this machine: run pip install open_clip_torch, or name a folder with vocab.json "
        "and merges.txt with --tokenizer: the folder `tokenizer` of any Stable Diffusion or SDXL in diffusers' layout, "
        "or ComfyUI's comfy/sd1_tokenizer."
    )


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_BYTES // 2**20} MiB")
    return path.read_text(encoding="utf-8")
