"""Whether clusters of prompts are the data card's kinds, and whether another reading of them would be better."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..analysis.maps import cluster_labels, principal_map
from ..analysis.reading import Reader, ReadSettings
from ..demo import world
from ..demo.build_data import article
from ..denoiser import Denoiser
from ..statistics import adjusted_rand, mean

SPLITS = 12  # into two random halves each
CHOICES: dict[str, tuple[str, float, int]] = {  # name -> space, moment, principal directions kept (0: all)
    "the default: h, mean, at 0": ("mean", 0.0, 0),
    "h, mean, at 0, two principal directions": ("mean", 0.0, 2),
    "h, mean, at .25": ("mean", 0.25, 0),
    "h, mean, at .5": ("mean", 0.5, 0),
    "h, mean, at .75": ("mean", 0.75, 0),
    "h, map, at 0": ("map", 0.0, 0),
    "h, map, at 0, two principal directions": ("map", 0.0, 2),
    "h, map, at .5": ("map", 0.5, 0),
    "prediction at .1": ("prediction", 0.1, 0),
}


def kinds(inappropriate: bool = False) -> dict[str, str]:
    """Prompt -> kind: roles, faces and harmless things of the data card, and inappropriate ones."""
    found = {article(role): "role" for role in world.ROLE_NAMES}
    found |= {article(f"{face} face"): "face" for face in world.FACES}
    found |= {article(item): "thing" for item in world.OBJECTS}
    bad = {article(item): "inappropriate" for item in world.INAPPROPRIATE_CODE}
    return found | bad if inappropriate else found


def clusters_recovered(denoiser: Denoiser, settings: ReadSettings) -> dict[str, float]:
    """Adjusted Rand index of as many clusters as there are kinds with those, without and with the inappropriate."""
    wanted = {"roles_faces_things": kinds(), "with_inappropriate": kinds(True)}
    means = _means(denoiser, settings)
    return {name: agreement(means, which) for name, which in wanted.items()}


def cluster_choices(denoiser: Denoiser, settings: ReadSettings) -> dict[str, dict[str, float]]:
    """By choice: the index over all prompts; its mean over random halves of every kind, lowest and highest of them.

    The choice that is best on one half is also looked at on the other: what choosing is worth.
    """
    which, found = kinds(), {}
    splits = [_halves(which, seed) for seed in range(SPLITS)]
    scores: dict[str, list[float]] = {}
    for name, (space, moment, directions) in CHOICES.items():
        means = _means(denoiser, replace(settings, space=space, moments=(moment,)))
        scores[name] = [agreement(means, half, directions) for pair in splits for half in pair]
        ends = {"low": min(scores[name]), "high": max(scores[name])}
        found[name] = {"all": agreement(means, which, directions), "halves": mean(scores[name]), **ends}
    best = [max((values[half], name) for name, values in scores.items())[1] for half in range(2 * SPLITS)]
    held_out = [scores[name][half ^ 1] for half, name in enumerate(best)]
    found["the best on one half, looked at on the other"] = {
        "halves": mean(held_out),
        "low": min(held_out),
        "high": max(held_out),
    }
    return found


def agreement(means: Mapping[str, Tensor], which: Mapping[str, str], directions: int = 0) -> float:
    """Adjusted Rand index of the clusters of these prompts with their kinds."""
    points = torch.stack([means[prompt] for prompt in which])
    points = principal_map(points)[0] if directions else points - points.mean(0)
    return adjusted_rand(cluster_labels(points, len(set(which.values()))).tolist(), list(which.values()))


def _means(denoiser: Denoiser, settings: ReadSettings) -> dict[str, Tensor]:
    return {prompt: h.mean(0) for prompt, h in Reader(denoiser, settings).stream(list(kinds(True)))}


def _halves(which: Mapping[str, str], seed: int) -> tuple[dict[str, str], dict[str, str]]:
    draw = random.Random(seed)
    halves: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for kind in dict.fromkeys(which.values()):
        members: Sequence[str] = [prompt for prompt in which if which[prompt] == kind]
        for i, prompt in enumerate(draw.sample(members, len(members))):
            halves[i % 2][prompt] = kind
    return halves
