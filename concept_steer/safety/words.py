"""The words that a safety set is learned from: a category's texts, suggestive prompts, and prompts made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import LearnError
from .safety_set import DISTILLED

Texts = Mapping[str, str | Sequence[str]]
Suggestive = Mapping[str, Sequence[str | Sequence[str]]]
Way = tuple[str, ...]  # wordings of one suggestive thing
FEWEST_BENIGN = 12


def text_of(text: str | Sequence[str]) -> str:
    """What a category is called in the safety text: the text itself, or the first of a list."""
    return ", ".join(_parts(text if isinstance(text, str) else next(iter(text), "")))


def phrases_of(text: str | Sequence[str]) -> tuple[str, ...]:
    """Prompts that show a category: its text cut at the commas, then the rest of a list as it is."""
    more = () if isinstance(text, str) else [part.strip() for part in list(text)[1:]]
    return tuple(dict.fromkeys((*_parts(text_of(text)), *filter(None, more))))


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def check_words(names: Mapping[str, str], extra: Mapping[str, Sequence[Way]], benign: Sequence[str]) -> None:
    """Errors: LearnError for what nothing can be learned from."""
    if not names or not all(names.values()) or not all(name.strip() for name in names):
        raise LearnError("Learning safety needs at least one category, each with words such as 'knives, weapons'.")
    if DISTILLED in names:
        raise LearnError(f"A category may not be named {DISTILLED!r}: that is all of them together.")
    if unknown := [name for name in extra if name not in names]:
        raise LearnError(f"Suggestive prompts were given for {', '.join(unknown)}, which is not among the categories.")
    if not all(way and all(text.strip() for text in way) for many in extra.values() for way in many):
        raise LearnError("A suggestive prompt is empty: give a text, or several wordings of one thing.")
    if len(set(benign)) < FEWEST_BENIGN:
        raise LearnError(
            f"Learning safety needs at least {FEWEST_BENIGN} different harmless prompts, not {len(set(benign))}: "
            "without them nothing says what shall stay as it is. A few hundred of the kind you draw are better."
        )


def ways_of(many: Sequence[str | Sequence[str]]) -> tuple[Way, ...]:
    """Each with its wordings: a text is one."""
    return tuple((way,) if isinstance(way, str) else tuple(way) for way in many)


def all_texts(names: Mapping[str, str]) -> str:
    """The safety text of all categories; it should fit a text encoder (77 tokens of CLIP)."""
    return ", ".join(_parts(", ".join(names.values())))


def prompts_of(phrases: Sequence[str], benign: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts: words by themselves, and words beside a harmless prompt, two of each in turn."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(benign), generator=generator).tolist()
    pick = torch.randperm(len(phrases), generator=generator).tolist()
    found = []
    for i in range(count):
        # in pairs, so that each way falls on both kinds of trajectory (see Reader.kept_out)
        phrase = phrases[pick[(i // 4 * 2 + i % 2) % len(phrases)]]
        found.append(phrase if i % 4 < 2 else f"{benign[order[i % len(order)]]} and {phrase}")
    return found
