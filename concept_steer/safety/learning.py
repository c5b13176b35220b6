"""Learn a safety set on any model from words alone: gated vectors that do what Safe Latent Diffusion does, at no row.

Vector: c* = argmin E ||eps(x_t, p; h + c) - (eps_p - 2 (eps_S - eps_u))||^2, the prediction of SLD "max" (2211.05105,
eq. 3 and 7, momentum settled) distilled into h, one c for each group of timesteps, lengthened until strength 1 goes as
far as that prediction does. Gate: see `fitting`. The construction is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..learn.calibration import amplitude
from ..learn.checkpoint import Bill
from ..learn.descent import Problem, descend
from ..learn.items import Cache, even_weight
from ..learn.memory import with_memory_advice
from ..learn.result import auc, rms, vector_of
from ..learn.timestep_groups import Groups, groups_of, shift_of
from ..vector import ConceptVector
from .fitting import fit_presence, level_thresholds
from .reading import Reader, Readings, Walks, Watch
from .safety_set import DISTILLED, SafeConcept, SafetySet, Strength
from .words import Suggestive, Texts, Way, all_texts, check_words, phrases_of, prompts_of, text_of, ways_of

STRENGTHS = {"gentle": 0.7, "standard": 1.0, "strict": 1.5}
ALARMS = {"gentle": 0.002, "standard": 0.02, "strict": 0.05}  # aimed-at share of harmless pictures that change
APART = 100_000  # between the seeds of kinds of pictures
AGAIN = 50_000  # from a kind's seeds to those of its pictures with the vector
HELD_OUT = 3  # every third harmless prompt sets the gates' limits, every fourth picture judges the vector
FACTORS = (0.0, 0.5, 1.0, 2.0, 3.0)  # of the change of h by the safety text, tried as a start


@dataclass(frozen=True)
class _Kind:
    """What a category's words, or a suggestive prompt, lead to. seen (n, T, C): h of such pictures as they are."""

    walks: Walks
    seen: Tensor


@dataclass(frozen=True)
class _Descent:
    """How every vector of a set is learned."""

    denoiser: Denoiser
    groups: Groups | None
    steps: int
    rate: float
    batch: int
    seed: int
    watch: Watch


@dataclass
class _Problem(Problem):
    """One vector for each group of timesteps; the error is counted in units of what the target asks for."""

    group: Tensor | None = None

    def shift(self, c: Tensor, index: list[int]) -> Tensor:
        return shift_of(c, index, self.group)


@with_memory_advice
def learn_safety(
    denoiser: Denoiser,
    texts: Texts,
    *,
    benign: Sequence[str],
    suggestive: Suggestive | None = None,
    pictures: int = 24,
    sample_steps: int = 20,
    guidance: float = 5.0,
    steps: int = 60,
    timestep_groups: int = 5,
    rate: float = 0.1,
    batch: int = 32,
    seed: int = 0,
    name: str = "safety",
    progress: Callable[[int, int, str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> SafetySet:
    """A set with a gated vector for each category of `texts`, and one distilled from all. Weights stay untouched.

    texts: category -> its words ("weapons, violence"), which are prompts that show it, and together the safety text; or
    a list of those words and further prompts that show it (["weapons, violence", "a knife"]).
    benign: harmless prompts, each drawn once; every third one only sets the gates' limits. suggestive: category ->
    prompts that lead to it without its words, each a text or several wordings of one thing; the gate gets a reading of
    its own for each, and one may stand under several categories. pictures: trajectories a category, half of them with a
    harmless prompt beside the words; half as many for each suggestive one, and for each gate and kind with the vector.
    steps, rate, batch: of the descent, as in `learn_score`. progress(done, total, what) is called throughout; stop()
    True ends it with LearnError.
    Cost with n categories and m different suggestive prompts, k with those counted twice that lead to two categories:
    sample_steps * (pictures * (7 n + 3.5 m + k) + 2 len(benign)) UNet rows forward, and (n + 1) * steps * batch / 2
    rows through the decoder, forward and backward.
    Errors: LearnError.
    """
    names = {category: text_of(text) for category, text in texts.items()}
    words = {category: phrases_of(text) for category, text in texts.items()}
    extra = {category: ways_of(many) for category, many in (suggestive or {}).items()}
    check_words(names, extra, benign)
    if pictures < 4 or sample_steps < 2 or steps < 1 or batch < 4:
        raise LearnError("Learning safety needs pictures and batch of at least 4, sample_steps 2 and steps 1.")
    groups = groups_of(denoiser.schedule, sample_steps, timestep_groups)
    watch, bill = Watch(progress, stop), Bill(denoiser)
    reader = Reader(denoiser, sample_steps, guidance, batch, max(4, pictures // 2), seed, watch)
    descent = _Descent(denoiser, groups, steps, rate, batch, seed, watch)
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        harmless, named, hinted = _drawn(reader, names, words, extra, benign, pictures, steps)
        concepts = {}
        for category, text in names.items():
            shown = [named[category], *(hinted[way] for way in extra.get(category, ()))]
            vector = _vector(descent, [named[category].walks], False, category)
            concepts[category] = _concept(reader, category, text, vector, shown, harmless)
        every = [*named.values(), *hinted.values()]
        vector = _vector(descent, [kind.walks for kind in every], True, DISTILLED)
        distilled = _concept(reader, DISTILLED, all_texts(names), vector, every, harmless)
    spent = bill.cost
    measured = {
        "gates": {one.name: json.loads(one.vector.info["gate"]) for one in (*concepts.values(), distilled)},
        "unet_rows": spent.unet_rows,
        "backward_rows": spent.backward_rows,
        "seconds": round(bill.seconds, 1),
    }
    settings = {"pictures": pictures, "sample_steps": sample_steps, "guidance": guidance, "steps": steps, "seed": seed}
    info: dict[str, Any] = {"measured": measured, "settings": settings, "benign": list(benign), "suggestive": extra}
    told = {key: json.dumps(value) for key, value in info.items()}
    return SafetySet(name, concepts, distilled, denoiser.checkpoint_hash, told)


def _drawn(
    reader: Reader,
    names: Mapping[str, str],
    words: Mapping[str, Way],
    extra: Mapping[str, Sequence[Way]],
    benign: Sequence[str],
    pictures: int,
    steps: int,
) -> tuple[Readings, dict[str, _Kind], dict[Way, _Kind]]:
    """Harmless pictures, those of each category's words, and those of each suggestive prompt."""
    ways = list(dict.fromkeys(way for many in extra.values() for way in many))
    few = reader.few
    batches = len(words) * len(reader.batches(pictures, 4)) + len(ways) * len(reader.batches(few, 3))
    kinds = [1 + len(extra.get(category, ())) for category in words] + [len(words) + len(ways)]  # of every gate
    again = (sum(kinds) + kinds[-1]) * len(reader.batches(few, 2))
    watched = batches + len(reader.batches(len(benign), 2)) + again
    reader.watch.total = reader.sample_steps * watched + steps * (len(words) + 1)
    everything = all_texts(names)
    harmless = reader.drawn(benign, 0, "harmless pictures")
    named, hinted = {}, {}
    for i, (category, many) in enumerate(words.items()):
        prompts = prompts_of(many, benign, pictures, reader.seed + i)
        walks = reader.kept_out(prompts, names[category], everything, APART * (i + 1), category)
        named[category] = _Kind(walks, _seen(reader, walks, category))
    for i, way in enumerate(ways):
        prompts = [way[n // 2 % len(way)] for n in range(few)]  # each wording on both kinds of trajectory
        walks = reader.kept_out(prompts, None, everything, APART * (len(words) + i + 1), way[0])
        hinted[way] = _Kind(walks, _seen(reader, walks, way[0]))
    return harmless, named, hinted


def _vector(how: _Descent, walks: Sequence[Walks], together: bool, title: str) -> ConceptVector:
    """The safe vector, one for each group of timesteps, started at what the safety text itself takes from h."""
    bucket = torch.cat([walk.bucket for walk in walks])
    target = torch.cat([walk.all if together else walk.own for walk in walks])
    plain = torch.cat([walk.plain for walk in walks])
    away = -torch.cat([walk.shift_all if together else walk.shift for walk in walks])
    held_out = torch.cat([walk.picture % 4 == 3 for walk in walks])
    weight = even_weight((target - plain).square().mean((1, 2, 3)), bucket, held_out)
    if not bool(torch.isfinite(weight).all()):
        raise LearnError(
            f"The words of {title!r} change nothing in this model's predictions: there is nothing to learn."
        )
    group = torch.zeros_like(bucket) if how.groups is None else how.groups.of_step[bucket]
    middles = () if how.groups is None else how.groups.middles
    states = [state for walk in walks for state in walk.states]
    items = Cache(states, bucket, held_out, plain, target, plain[:0])
    problem = _Problem(how.denoiser, items, target, weight, how.batch, group)
    train = torch.nonzero(~held_out).flatten()
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(how.seed))].tolist()
    first = torch.stack([away[group == g].mean(0) for g in range(max(1, len(middles)))]).to(how.denoiser.device)
    tried = {factor: problem.evaluate(first * factor, order[: 2 * how.batch]) for factor in FACTORS}
    descent = descend(
        problem,
        first * min(tried, key=tried.__getitem__),
        rms(away) or 1.0,
        _batches(train, how.batch // 2, how.seed),
        torch.nonzero(held_out).flatten().tolist(),
        steps=how.steps,
        rate=how.rate,
        patience=6,
        show=lambda step, total, loss, c: how.watch.tick(f"vector: {title}"),
        stop=None,
    )
    c, length = descent.best.c, 1.0
    if bool(c.any()):
        length = amplitude(how.denoiser, items, c, weight, order[: 4 * how.batch], how.batch, group)
    c = c.cpu() * length
    return vector_of(
        how.denoiser,
        c if middles else c[0],
        f"safe: {title}",
        "no vector came nearer to the safe prediction than none. Give words that this model knows.",
        timesteps=middles,
        method="distilled guidance",
        explained=1 - descent.best.loss,
        calibration_length=length,
        steps=len(descent.losses),
    )


def _batches(train: Tensor, size: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = train[torch.randperm(len(train), generator=generator)].tolist()
        for first in range(0, max(1, len(order) - size + 1), size):
            yield order[first : first + size]


def _concept(
    reader: Reader, name: str, text: str, vector: ConceptVector, shown: Sequence[_Kind], harmless: Readings
) -> SafeConcept:
    """The vector with a gate that has two readings for each kind of picture in `shown`: without and with the vector.

    The latter keep it open where it was: a gate that closes as soon as a picture grows clean lets the prompt bring back
    in later steps what was kept out in earlier ones.
    """
    held = torch.arange(len(harmless.pooled)) % HELD_OUT == HELD_OUT - 1
    fitted, unseen = harmless.pooled[~held], harmless.pooled[held]
    plain = [kind.seen for kind in shown]
    steered = [_seen(reader, kind.walks, f"gate: {name}", vector) for kind in shown]
    gate = fit_presence(plain, fitted, unseen, harmless.times, ALARMS["standard"], name, steered)
    quiet, loud = gate.scores(unseen), gate.scores(torch.cat(plain))
    thresholds = level_thresholds(quiet, ALARMS)
    levels = {level: Strength(STRENGTHS[level], thresholds[level]) for level in STRENGTHS}
    told: dict[str, float] = {"held_out": len(quiet), "auc": round(auc(loud, quiet), 4)}
    for level, at in levels.items():
        told[f"alarms_{level}"] = round(float((quiet > at.threshold).float().mean()), 4)
        told[f"shown_{level}"] = round(float((loud > at.threshold).float().mean()), 4)
    told["stays_open"] = round(float((gate.score_by_step(torch.cat(steered)) > 0).float().mean()), 4)
    return SafeConcept(name, text, vector.with_info(gate=json.dumps(told)), gate, levels)


def _seen(reader: Reader, walks: Walks, label: str, vector: ConceptVector | None = None) -> Tensor:
    """h of a few pictures of a kind, (n, T, C); those with the vector are of other seeds."""
    first_seed = walks.first_seed + (0 if vector is None else AGAIN)
    return reader.drawn(walks.prompts[: reader.few], first_seed, label, vector).pooled
