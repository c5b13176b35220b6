"""How well readings foretell what is drawn: leans of every role in one space, held against a truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..analysis.defaults import default_of
from ..analysis.reading import Reader, ReadSettings
from ..analysis.word_list import WordList
from ..demo import world
from ..denoiser import Denoiser
from ..statistics import bootstrap, correlation, rank_correlation

FAR = 0.1  # a true share this far from one half has a sign that can be right


@dataclass(frozen=True)
class Leans:
    """Lean of every role (see `defaults`), what it cost, and the interval's ends."""

    lean: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]
    unet_rows: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}


def h_leans(
    denoiser: Denoiser, words: WordList, attribute: str, settings: ReadSettings, similarity: str = "mixture"
) -> Leans:
    """By reading prompts as `settings` say. similarity: "mixture" as `defaults` does; "cosine": of h(role) - h(neutral)
    with h(last value) - h(first value) of the neutral prompt, one direction for all roles."""
    cost, began = denoiser.cost.snapshot(), time.perf_counter()
    reader = Reader(denoiser, settings, batch=32)
    found = _leans(lambda prompts: reader.read(prompts), words, attribute, similarity)
    return Leans(*found, denoiser.cost.since(cost).unet_rows, time.perf_counter() - began)


def text_leans(denoiser: Denoiser, words: WordList, attribute: str, similarity: str = "mixture") -> Leans:
    """The same in the text encoder's space: the pooled prompt where the model has one, else the mean of its tokens."""
    began = time.perf_counter()

    def read(prompts: Sequence[str]) -> dict[str, Tensor]:
        cond = denoiser.encode_text(list(dict.fromkeys(prompts)))
        pooled = cond.embeds.float().mean(1) if cond.pooled is None else cond.pooled.float()
        return {prompt: row[None].cpu() for prompt, row in zip(dict.fromkeys(prompts), pooled, strict=True)}

    return Leans(*_leans(read, words, attribute, similarity), 0.0, time.perf_counter() - began)


def _leans(
    read: Callable[[Sequence[str]], Mapping[str, Tensor]], words: WordList, attribute: str, similarity: str
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    values = list(words.attributes[attribute])
    axis, neutral = None, None
    if similarity == "cosine":
        role = words.neutral.removeprefix("a ").removeprefix("an ")
        ends = [words.named(role, attribute, value)[0] for value in (values[0], values[-1])]
        h = {prompt: value.mean(0) for prompt, value in read([words.neutral, *ends]).items()}
        axis, neutral = h[ends[1]] - h[ends[0]], h[words.neutral]
    found: tuple[dict[str, float], dict[str, float], dict[str, float]] = ({}, {}, {})
    for role in words.roles:
        prompt = words.prompt(role)
        if axis is not None and neutral is not None:
            own = read([prompt])[prompt].mean(0) - neutral
            value = float(torch.nn.functional.cosine_similarity(own, axis, dim=0))
            ends3 = (value, value, value)
        else:
            prompts = {value: words.named(role, attribute, value) for value in values}
            h = dict(read([prompt, *(p for many in prompts.values() for p in many)]))
            named = {value: torch.stack([h[p] for p in many]).mean(0) for value, many in prompts.items()}
            ends3 = default_of(h[prompt], named, role, attribute).lean
        for table, number in zip(found, ends3, strict=True):
            table[role] = number
    return found


def true_lean(role: str, attribute: str) -> float:
    """By the data card: of gender -1 all women, 1 all men; of skin tone -1 all light, 1 all dark."""
    if attribute == "gender":
        return 2 * world.ROLE[role].men - 1
    weights = world.TONE_SKEW[world.ROLE[role].skew]
    return sum(weight * (2 * i / (len(weights) - 1) - 1) for i, weight in enumerate(weights))


@dataclass(frozen=True)
class Fit:
    """Pearson, Spearman with 95 % intervals over roles; signs right of those whose truth is far from even."""

    pearson: tuple[float, float, float]
    spearman: tuple[float, float, float]
    right: int
    far: int
    count: int


def fit(lean: Mapping[str, float], truth: Mapping[str, float]) -> Fit:
    pairs = [(lean[role], truth[role]) for role in truth if role in lean]

    def of(statistic: Callable[[Sequence[float], Sequence[float]], float]) -> tuple[float, float, float]:
        def value(drawn: list[Any]) -> float:
            found = statistic([a for a, _ in drawn], [b for _, b in drawn])
            return 0.0 if found != found else found

        return value(list(pairs)), *bootstrap(pairs, value, draws=500)

    far = [(a, b) for a, b in pairs if abs(b) > 2 * FAR]
    return Fit(of(correlation), of(rank_correlation), sum(a * b > 0 for a, b in far), len(far), len(pairs))
