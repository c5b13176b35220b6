"""A safety set made by hand, for tests of what uses one."""

from __future__ import annotations

import torch

from concept_steer.safety import Presence, SafeConcept, SafetySet
from concept_steer.safety.safety_set import Strength
from concept_steer.vector import ConceptVector

FAMILY, C = "custom:24x32", 32  # of tiny_diffusers
TIMES = (900.0, 500.0, 100.0)


def presence(threshold: float = 0.0, channel: int = 0, channels: int = C, **changes) -> Presence:
    """Open where the mean of one channel is above the threshold."""
    directions = torch.zeros(len(TIMES), 1, channels)
    directions[:, :, channel] = 1
    parts = {"directions": directions, "limits": torch.zeros(len(TIMES), 1), "scales": torch.ones(len(TIMES), 1)}
    return Presence(**{**parts, **changes}, timesteps=TIMES, threshold=threshold)


def concept(name: str = "weapons", family: str = FAMILY, channels: int = C, threshold: float = 0.0, seed: int = 0):
    tensor = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    levels = {"gentle": Strength(0.5, threshold + 1), "standard": Strength(1.0, threshold)}
    levels["strict"] = Strength(2.0, threshold - 1)
    gate = presence(threshold, channels=channels)
    return SafeConcept(name, f"{name}, a {name} thing", ConceptVector(tensor, family, f"safe: {name}"), gate, levels)


def safety_set(family: str = FAMILY, channels: int = C, threshold: float = 0.0, distilled: bool = True) -> SafetySet:
    names = ("weapons", "alcohol")
    concepts = {name: concept(name, family, channels, threshold, seed=i) for i, name in enumerate(names)}
    one = concept("all", family, channels, threshold, seed=9) if distilled else None
    return SafetySet("test", concepts, one, "0" * 64, {"measured": "{}", "seed": "0"})
