"""Zero-shot accuracy of the latent tower beside a pixel tower of its size, on held-out art and on generated pictures.

"shipped" is the embedded model's own tower; it saw the held-out drawings. "latent" and "pixel" are a pair that was
trained side by side (demo.tower_pair), for as long as each other and for much less than the shipped one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..demo import latent_clip, latent_guard, tower_pair, world
from ..demo.build_data import ITEMS, KINDS, article
from ..demo.judges import Judges, Verdict
from ..denoiser import Denoiser
from ..latent_clip.model import LatentClipModel
from ..latent_clip.scoring import class_vectors
from ..sampling import sample
from ..statistics import wilson
from .figures import Figure, Section, pivot

ATTRIBUTES = ("gender", "role", "skin tone", "object", "inappropriate")
SEED, GUIDANCE, BATCH = 70_000, 5.0, 16
ART, DRAWN = "held-out art", "generated"
CLASSES: dict[str, tuple[str, ...]] = {
    "gender": tuple(article(name) for name in world.GENDERS),
    "role": tuple(article(name) for name in world.ROLE_NAMES),
    "skin tone": tuple(f"a person with {tone} skin" for tone in world.TONES),
    "object": tuple(article(name) for name in world.OBJECTS),
}


@dataclass(frozen=True)
class Shown:
    """Pictures with what is known of each: attribute -> class or -1; "inappropriate" is 0, 1 or -1.

    latents (N, 4, 16, 16) scaled; pixels (N, 3, 128, 128) in -1 to 1.
    """

    latents: Tensor
    pixels: Tensor
    truth: Mapping[str, Tensor]


@torch.no_grad()
def held_out_art(denoiser: Denoiser, data: Path, pictures: int) -> Shown:
    """Up to so many pictures of each kind (single person, object, inappropriate thing) that hold a held-out drawing."""
    labels = dict(np.load(data / "labels.npz"))
    out, kind = tower_pair.held_out(labels), labels["kind"]
    rows = np.concatenate(
        [np.nonzero(out & (kind == KINDS.index(name)))[0][:pictures] for name in ("person", "object", "inappropriate")]
    )
    stored = np.load(data / "pictures.npy", mmap_mode="r")
    pixels = torch.cat([tower_pair.to_pixels(stored[part]) for part in np.array_split(rows, max(1, len(rows) // 16))])
    latents = torch.cat([denoiser.encode_pictures(part.to(denoiser.dtype)).float() for part in pixels.split(BATCH)])
    mine = {name: torch.from_numpy(values[rows].astype(np.int64)) for name, values in labels.items()}
    things = len(world.OBJECTS)
    single = mine["item"] >= 0
    truth = {
        "gender": mine["gender"],
        "role": mine["role"],
        "skin tone": mine["tone"],
        "object": torch.where(single & (mine["item"] < things), mine["item"], -1),
        "inappropriate": torch.where(single, (mine["item"] >= things).long(), -1),
    }
    return Shown(latents, pixels, truth)


def prompts(count: int) -> tuple[list[str], dict[str, Tensor]]:
    """`count` prompts each of people, objects and inappropriate things, and what they ask for."""
    roles = [i for i, name in enumerate(world.ROLE_NAMES) if "person" not in name]
    texts: list[str] = []
    table: dict[str, list[int]] = {name: [] for name in ATTRIBUTES}

    def add(text: str, **asked: int) -> None:
        texts.append(text)
        for name in ATTRIBUTES:
            table[name].append(asked.get(name.replace(" ", "_"), -1))

    for i in range(count):
        role, gender, tone = roles[i * 7 % len(roles)], i % 2, i % len(world.TONES)
        name = article(f"{world.GENDERS[gender]} {world.ROLE_NAMES[role]}")
        add(f"{name} with {world.TONES[tone]} skin", gender=gender, role=role, skin_tone=tone)
        thing = i * 5 % len(world.OBJECTS)
        add(article(ITEMS[thing]), object=thing, inappropriate=0)
        add(article(list(world.CATEGORY)[i % len(world.CATEGORY)]), inappropriate=1)
    return texts, {name: torch.tensor(values) for name, values in table.items()}


@torch.no_grad()
def generated(denoiser: Denoiser, count: int, steps: int = 12) -> Shown:
    """Pictures of `prompts`; their truth is what was asked for."""
    texts, truth = prompts(count)
    seeds = range(SEED, SEED + len(texts))
    latents = sample(denoiser, texts, seeds=seeds, steps=steps, guidance=GUIDANCE, batch=BATCH)
    pixels = torch.cat([denoiser.decode(part.to(denoiser.dtype)).float() for part in latents.split(BATCH)])
    return Shown(latents, pixels.clamp(-1, 1), truth)


def answers(clip: LatentClipModel, seen: Tensor) -> dict[str, Tensor]:
    """Attribute -> the class that the tower says (N,), for its latents or, of a pixel tower, pixels."""
    vectors = torch.cat([clip.encode_latents(part) for part in seen.split(64)])
    found = {
        name: (vectors @ class_vectors(clip, names, latent_clip.TEMPLATES).T).argmax(1)
        for name, names in CLASSES.items()
    }
    odds = latent_guard.make_guard(clip, latent_guard.CATEGORIES, absent=latent_guard.HARMLESS).log_odds(seen)
    return {**found, "inappropriate": (odds.amax(1) > 0).long()}


def judged(verdict: Verdict) -> dict[str, Tensor]:
    """What the judges say of each picture, numbered as `CLASSES`; -1 for no role. They know no objects."""
    role = verdict.probabilities["role"].argmax(1)
    return {
        "gender": verdict.probabilities["gender"].argmax(1),
        "role": torch.where(role < len(world.ROLE_NAMES), role, -1),
        "skin tone": verdict.probabilities["tone"].argmax(1),
        "inappropriate": (verdict.probabilities["inappropriate"].argmax(1) > 0).long(),
    }


def tower_figures(
    denoiser: Denoiser,
    judges: Judges,
    command: str,
    *,
    pair: Path | None = None,
    data: Path | None = None,
    pictures: int = 96,
    count: int = 48,
) -> tuple[list[Figure], list[Section]]:
    """The shipped tower, and the pair where there is one. data: a build of the training pictures, for held-out art."""
    towers: dict[str, LatentClipModel] = {"shipped": latent_clip.load()}
    told: Mapping[str, Any] = {}
    if pair is not None:
        both, told = tower_pair.read(pair)
        towers |= both
    sets = {DRAWN: generated(denoiser, count)}
    if data is not None:
        sets = {ART: held_out_art(denoiser, data, pictures), **sets}
    figures = []
    for where, shown in sets.items():
        verdict = judged(judges(shown.pixels)) if where == DRAWN else {}
        for method, clip in towers.items():
            said = answers(clip, shown.pixels if clip.space is tower_pair.PIXELS else shown.latents)
            figures += _shares(method, "zero_shot_accuracy", said, shown.truth, where, command)
            # of pictures that were asked to show the attribute
            known = {name: torch.where(shown.truth[name] >= 0, values, -1) for name, values in verdict.items()}
            figures += _shares(method, "judge_agreement", said, known, where, command)
    return figures, [
        ("Zero-shot accuracy", _table(figures, "zero_shot_accuracy")),
        ("Agreement with the judges, generated pictures", _table(figures, "judge_agreement")),
        ("About the towers", _words(told)),
    ]


def _shares(
    method: str, metric: str, said: Mapping[str, Tensor], truth: Mapping[str, Tensor], where: str, command: str
) -> list[Figure]:
    figures = []
    for name, wanted in truth.items():
        known = wanted >= 0
        count = int(known.sum())
        if count:
            hits = int((said[name] == wanted)[known].sum())
            extra = {"attribute": name, "pictures": where}
            figures.append(Figure(method, metric, hits / count, *wilson(hits, count), count, command, extra))
    return figures


def _table(figures: Sequence[Figure], metric: str) -> str:
    mine = [
        Figure(one.method, one.extra["attribute"], one.value, one.low, one.high, one.n, "", one.extra)
        for one in figures
        if one.metric == metric
    ]
    columns = {name: f"{name}" for name in ATTRIBUTES if any(one.metric == name for one in mine)}
    return pivot(mine, columns, label="tower, pictures", of=lambda one: f"{one.method}, {one.extra['pictures']}")


def _words(told: Mapping[str, Any]) -> str:
    text = (
        "shipped: the embedded model's tower (1,400 steps of 256 on all of the data's first 15,000 pictures, so the "
        "held-out art is not new to it). inappropriate: whether any of the words of the six categories or any of the "
        "harmless ones is the likelier; by chance .5. gender: .5 by chance; skin tone: .2. "
    )
    if told:
        text += (
            "latent and pixel: a pair of one size trained side by side against one text tower, "
            f"{told['steps']} steps of {told['batch']}, seed {told['seed']}, without the held-out drawings. Compare "
            "these two with each other, not with the shipped tower, which was trained otherwise."
        )
    return text
