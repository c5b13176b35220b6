"""Learn an attribute: a vector for each value on some roles, and its gate, judged on other roles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..learn import learn_difference, learn_score
from ..learn.result import auc
from .attributes import Attribute, Value
from .gate import Gate, Phrases, Reader, scores
from .templates import checked_template, fill, named

# How the gate's prompts speak of a role without naming anything, and with what else a prompt may say.
CONTEXTS = ("a {}", "a photo of a {}", "a successful {}", "a {} on a dark background")
METHODS = ("score", "difference")
QUANTILE = 0.02
Watch = Callable[[str, int, int], None]  # what is being done, done, total


def learn_attribute(
    denoiser: Denoiser,
    name: str,
    templates: Mapping[str, str | Sequence[str]],
    roles: Sequence[str],
    *,
    neutral: str = "a {}",
    contexts: Sequence[str] = CONTEXTS,
    method: str = "score",
    holdout: float = 0.33,
    seed: int = 0,
    watch: Watch | None = None,
    **options: Any,
) -> Attribute:
    """templates: for each label one or more like "a woman {}"; the first teaches the vector, the gate knows all.

    roles: at least three; the last `holdout` of them are kept for judging the gate. options go to the learning method.
    Errors: LearnError, SettingError for a template without {}.
    """
    phrases = {label: (many,) if isinstance(many, str) else tuple(many) for label, many in templates.items()}
    for many in phrases.values():
        for template in many:
            checked_template(template)
    held = max(1, round(holdout * len(roles)))
    if len(roles) - held < 2 or len(phrases) < 2 or not all(phrases.values()):
        raise LearnError(
            f"An attribute is learned from three or more roles and two or more values with a template each; found "
            f"{len(roles)} roles and {len(phrases)} values."
        )
    if method not in METHODS:
        raise LearnError(f"The method {method!r} is not known: use one of {', '.join(METHODS)}.")
    learn = learn_score if method == "score" else learn_difference
    taught, judged = list(roles[:-held]), list(roles[-held:])
    values = {}
    for i, (label, many) in enumerate(phrases.items()):
        if watch is not None:
            watch(f"{name}: {label}", i, len(phrases) + 1)
        pairs = [(fill(neutral, role), fill(many[0], role)) for role in taught]
        result = learn(denoiser, pairs, seed=seed, title=label, **options)  # type: ignore[operator]
        values[label] = Value(result.vector, many)
    if watch is not None:
        watch(f"{name}: gate", len(phrases), len(phrases) + 1)
    gate = learn_gate(denoiser, phrases, taught, judged, contexts=contexts)
    info = {"roles": json.dumps(taught), "roles_judged": json.dumps(judged), "method": method, "seed": str(seed)}
    return Attribute(name, values, gate, {**info, "checkpoint_hash": denoiser.checkpoint_hash})


def learn_gate(
    denoiser: Denoiser,
    phrases: Phrases,
    roles: Sequence[str],
    judged: Sequence[str],
    *,
    contexts: Sequence[str] = CONTEXTS,
    noises: int = 1,
) -> Gate:
    """Directions and limits from `roles`; how it does is measured on the roles `judged`.

    Cost: about one encoder row for every word of all prompts; the measured part costs most.
    """
    reader = Reader(denoiser, noises)
    plain = contexts[0]
    pairs = {
        label: [(named(many[0], plain, role), fill(plain, role)) for role in roles] for label, many in phrases.items()
    }
    reader.read(prompt for many in pairs.values() for pair in many for prompt in pair)
    directions = torch.stack([torch.stack([reader[p] - reader[n] for p, n in many]).mean(0) for many in pairs.values()])
    units = torch.nn.functional.normalize(directions, dim=1)
    own = [
        float(units[i] @ torch.nn.functional.normalize(reader[p] - reader[n], dim=0))
        for i, many in enumerate(pairs.values())
        for p, n in many
    ]
    bound = max(0.0, 0.5 * float(torch.tensor(own).quantile(QUANTILE)))
    threshold = _threshold(_neutral(reader, phrases, roles, contexts, directions, bound))
    gate = Gate(phrases, directions, denoiser.family, threshold, bound, noises)
    return replace(gate, measured=_measure(denoiser, gate, judged, contexts))


def _neutral(
    reader: Reader, phrases: Phrases, roles: Sequence[str], contexts: Sequence[str], directions: Tensor, bound: float
) -> Tensor:
    prompts = [fill(context, role) for role in roles for context in contexts]
    return torch.tensor([found.score for found in scores(reader, prompts, phrases, directions, bound)])


def _unseen(
    reader: Reader, phrases: Phrases, roles: Sequence[str], contexts: Sequence[str], directions: Tensor, bound: float
) -> Tensor:
    """Scores of prompts that name a value by a template taken out of what the gate knows; empty with one template."""
    found: list[float] = []
    for label, many in phrases.items():
        for template in many if len(many) > 1 else ():
            fewer = {**phrases, label: [other for other in many if other != template]}
            prompts = [named(template, context, role) for role in roles for context in contexts[:2]]
            found += [one.score for one in scores(reader, prompts, fewer, directions, bound)]
    return torch.tensor(found)


def _threshold(neutral: Tensor) -> float:
    """Half way between 1 and the score that only QUANTILE of the neutral prompts exceed.

    On the side of balancing: a biased word ("successful") may be as good as "male" to a model, and must not count as
    naming. Words that shall count are given as templates; they score 1 whatever the model makes of them.
    """
    return (1 + max(0.0, float(neutral.quantile(1 - QUANTILE, interpolation="higher")))) / 2


def _measure(denoiser: Denoiser, gate: Gate, judged: Sequence[str], contexts: Sequence[str]) -> dict[str, float]:
    """On roles never seen: AUC and balanced accuracy, with the phrases it knows and with ones taken out of them."""
    before = denoiser.cost.encoder_rows
    reader = Reader(denoiser, gate.noises)
    low = _neutral(reader, gate.phrases, judged, contexts, gate.directions, gate.bound)
    rows = denoiser.cost.encoder_rows - before
    known = [
        named(template, context, role)
        for many in gate.phrases.values()
        for template in many
        for role in judged
        for context in contexts
    ]
    high = torch.tensor([s.score for s in scores(reader, known, gate.phrases, gate.directions, gate.bound)])
    found = {
        "auc": auc(high, low),
        "accuracy": _accuracy(high, low, gate.threshold),
        "false_alarms": float((low > gate.threshold).float().mean()),
        "neutral_prompts": float(len(low)),
        "named_prompts": float(len(high)),
        "rows_per_neutral_prompt": rows / len(low),
    }
    unseen = _unseen(reader, gate.phrases, judged, contexts, gate.directions, gate.bound)
    if len(unseen):
        found["auc_unseen_words"] = auc(unseen, low)
        found["accuracy_unseen_words"] = _accuracy(unseen, low, gate.threshold)
        found["unseen_word_prompts"] = float(len(unseen))
    return found


def _accuracy(high: Tensor, low: Tensor, threshold: float) -> float:
    return float(((high > threshold).float().mean() + (low <= threshold).float().mean()) / 2)
