"""The gate: does a prompt name the attribute already? Then it is left alone (the idea of EquiSteer, 2607.01147).

Whether "a nurse" leans to women says nothing of it: a model's bias and a prompt's words look alike in h. So the gate
asks h another question: can a word of the prompt be exchanged for one that names a value without h noticing?
  score = max over words s and values v of 1 - |h(p) - h(p[s -> v])| / |h(p without s) - h(p[s -> v])|
Exchanging "woman" for "woman" scores exactly 1 and costs nothing; "female" for "woman" scores high because the model
takes them alike; "nurse" for "woman" scores low because the role goes with it. The construction is ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..family import check
from ..sampling import noise
from .templates import cut, is_tail, occurs, phrase_of, spans, tidy

SEED = 9_000_000  # of the fixed noises that h is read at
BATCH = 32
Phrases = Mapping[str, Sequence[str]]  # templates by label


@dataclass(frozen=True)
class GateDecision:
    """named: the prompt names a value, which is `label`, by the words `words`. score above threshold means named."""

    named: bool
    score: float
    threshold: float
    label: str = ""
    words: str = ""
    rows: int = 0  # encoder rows that the decision cost

    @staticmethod
    def without_gate() -> GateDecision:
        return GateDecision(False, 0.0, float("inf"))

    def text(self) -> str:
        if self.threshold == float("inf"):
            return "there is no gate, so no prompt is left alone"
        if self.named:
            return f"the prompt names {self.label} ({self.words!r}): left alone"
        return f"the prompt names no value (score {self.score:.2f}, threshold {self.threshold:.2f})"


@dataclass(frozen=True, eq=False)
class Gate:
    """What a decision needs: the values' templates, the direction of each in h (values, C), and two limits.

    bound: a word is only tried when taking it away moves h at least that much (cosine) along a value's direction.
    measured: how it did on roles that learning never saw.
    """

    phrases: Phrases
    directions: Tensor
    family: str
    threshold: float
    bound: float = 0.0
    noises: int = 1
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.directions).all()) or not 0 <= self.threshold <= 1 or self.noises < 1:
            raise ConceptSteerError("its gate holds numbers that cannot be: learn the attribute again.")

    def decides(self, denoiser: Denoiser, prompt: str) -> GateDecision:
        """Cost: none when a value's own phrase stands in the prompt, else about one encoder row a word and a noise."""
        check(self.family, self.directions.shape[1], denoiser.family, denoiser.channels, source="The gate")
        before = denoiser.cost.encoder_rows
        reader = Reader(denoiser, self.noises)
        found = scores(reader, [prompt], self.phrases, self.directions, self.bound)[0]
        rows = denoiser.cost.encoder_rows - before
        return GateDecision(found.score > self.threshold, found.score, self.threshold, found.label, found.words, rows)

    @property
    def fingerprint(self) -> str:
        told = {key: value for key, value in self.told().items() if key != "measured"}
        return hashlib.sha256(json.dumps(told).encode() + self.directions.numpy().tobytes()).hexdigest()

    def told(self) -> dict[str, Any]:
        """All but the directions, ready for JSON."""
        return {
            "phrases": {label: list(templates) for label, templates in self.phrases.items()},
            "threshold": self.threshold,
            "bound": self.bound,
            "noises": self.noises,
            "measured": dict(self.measured),
        }

    @classmethod
    def parsed(cls, told: Mapping[str, Any], directions: Tensor, family: str) -> Gate:
        phrases = {str(label): tuple(map(str, templates)) for label, templates in told["phrases"].items()}
        measured = {str(key): float(value) for key, value in told["measured"].items()}
        limits = float(told["threshold"]), float(told["bound"]), int(told["noises"])
        return cls(phrases, directions, family, *limits, measured)


class Reader:
    """Mean h (C,) of prompts at the first step, from fixed noises; every different prompt is read once."""

    def __init__(self, denoiser: Denoiser, noises: int = 1) -> None:
        self.denoiser, self.noises = denoiser, noises
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, prompt: str) -> Tensor:
        return self._kept[prompt]

    def read(self, prompts: Iterable[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        model, many = self.denoiser, self.noises
        t = float(model.schedule.train_timesteps - 1)
        start = torch.stack([noise(SEED + i, model.latent_shape) for i in range(many)]).to(model.device, model.dtype)
        size = max(1, BATCH // many)
        with torch.inference_mode(False), torch.no_grad(), model.frozen():
            for first in range(0, len(new), size):
                part = new[first : first + size]
                cond = model.encode_text(part)
                rows = cond[torch.arange(len(part), device=cond.embeds.device).repeat_interleave(many)]
                h = model.to_h(start.repeat(len(part), 1, 1, 1), t, rows).h.float().mean((2, 3)).cpu()
                means = h.view(len(part), many, -1).mean(1)
                if not bool(torch.isfinite(means).all()):
                    raise ConceptSteerError("The model gives NaN at its first step, so no prompt can be judged.")
                self._kept.update(zip(part, means, strict=True))


@dataclass(frozen=True)
class Score:
    score: float
    label: str = ""
    words: str = ""


def scores(reader: Reader, prompts: Sequence[str], phrases: Phrases, directions: Tensor, bound: float) -> list[Score]:
    """The score of each prompt, read together. directions (values, C), in the order of `phrases`."""
    texts = [tidy(prompt) for prompt in prompts]
    literal = {text: _literal(text, phrases) for text in texts}
    lengths = sorted({len(phrase_of(t).split()) for many in phrases.values() for t in many})
    lengths = list(range(1, max(lengths) + 1))
    open_texts = [text for text in dict.fromkeys(texts) if literal[text] is None]
    places = {text: [p for p in spans(text, lengths) if cut(text, *p)] for text in open_texts}
    reader.read([*open_texts, *(cut(text, *p) for text in open_texts for p in places[text])])
    tried = {text: _candidates(reader, text, places[text], phrases, directions, bound) for text in open_texts}
    reader.read(changed for found in tried.values() for _, _, changed in found)
    result = {text: _best(reader, text, tried[text]) for text in open_texts}
    return [literal[text] or result[text] for text in texts]


def _literal(text: str, phrases: Phrases) -> Score | None:
    """A value's own phrase in the prompt: exchanged for itself nothing changes, so the score is 1 by definition."""
    found = [
        (len(match[0]), label, match[0])
        for label, templates in phrases.items()
        for template in templates
        if (match := occurs(phrase_of(template), text))
    ]
    return Score(1.0, *max(found)[1:]) if found else None


Candidate = tuple[tuple[int, int], str, str]  # place, label, the prompt with the phrase there


def _candidates(
    reader: Reader, text: str, places: list[tuple[int, int]], phrases: Phrases, directions: Tensor, bound: float
) -> list[Candidate]:
    """Places whose words move h along a value's direction, each with that value's phrases."""
    units, labels = torch.nn.functional.normalize(directions, dim=1), list(phrases)
    found: list[Candidate] = []
    for place in places:
        moved = reader[text] - reader[cut(text, *place)]
        cosines = units @ torch.nn.functional.normalize(moved, dim=0)
        best = int(cosines.argmax())
        if float(cosines[best]) >= bound:
            changed = (exchanged(text, place, template) for template in phrases[labels[best]])
            found += [(place, labels[best], one) for one in changed]
    return found


def exchanged(text: str, place: tuple[int, int], template: str) -> str:
    """The prompt with the template's phrase in that place, or at its end when the phrase follows the role."""
    phrase = phrase_of(template)
    if is_tail(template):
        return tidy(f"{cut(text, *place)} {phrase}")
    return tidy(f"{text[: place[0]]} {phrase} {text[place[1] :]}")


def _best(reader: Reader, text: str, tried: list[Candidate]) -> Score:
    best = Score(0.0)
    for place, label, changed in tried:
        off = float((reader[text] - reader[changed]).norm())
        whole = float((reader[cut(text, *place)] - reader[changed]).norm())
        score = 1 - off / whole if whole > 0 else 0.0
        if score > best.score:
            best = Score(score, label, text[slice(*place)])
    return best
