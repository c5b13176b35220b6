"""Does a concept show in h? The gate of a safety steer: pictures in which it does not keep their bits.

The presence of a concept is a few linear readings of h (a category's own words, each way to it without words), for each
time of sampling: at noise h holds what the prompt means, later what the picture has become. Acting only where a concept
is present: CASteer 2503.09630. The readings per timestep and their limits for a rate of false alarms are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import SafetyError, SettingError

MOST_KEPT = 256  # timesteps
At = tuple[Tensor, Tensor]  # of one timestep: directions (C, K), and the sums <direction, h> that open the gate (K,)


class Firings:
    """How often gates opened in one run. Handed to a gate with `Presence.counted`; nothing else ever writes to it.

    A run is a batch as long as the timestep falls; when it rises again, another one has begun, and also after `begin`.
    Several gates may share one: a picture fired at a step when any of them did.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[float, Tensor, Sequence[int | None]]] = []
        self._begins = True
        self._runs: list[dict[float, dict[int, bool]]] = []

    def __copy__(self) -> Firings:
        return self

    def __deepcopy__(self, memo: Any) -> Firings:
        return self  # ComfyUI deep-copies what hangs on a model; all copies of one run count together

    def saw(self, timestep: float, opened: Tensor, pictures: Sequence[int | None] | None = None) -> None:
        """opened: (rows,) bool, kept where it is until it is asked for, so that no accelerator has to wait.

        pictures: of each row its picture's number in the batch, None for a row that does not count.
        """
        self._notes.append((float(timestep), opened.detach(), pictures or range(opened.numel())))

    def reset(self) -> None:
        """Before a run that shall be counted by itself."""
        self._notes.clear()
        self._runs.clear()

    def begin(self) -> None:
        """What is told from here on is of another batch, at whatever timestep it begins."""
        self._sorted()
        self._begins = True

    def _sorted(self) -> list[dict[float, dict[int, bool]]]:
        for timestep, opened, pictures in self._notes:
            values = opened.reshape(-1).tolist()
            told = [(i, bool(value)) for i, value in zip(pictures, values, strict=True) if i is not None]
            if not told:
                continue
            if self._begins or not self._runs or timestep > min(self._runs[-1]):
                self._runs.append({})
                self._begins = False
            step = self._runs[-1].setdefault(timestep, {})
            for picture, value in told:
                step[picture] = step.get(picture, False) or value
        self._notes.clear()
        return self._runs

    def by_picture(self) -> list[int]:
        """For each picture, in the order of sampling, at how many of its steps a gate was open."""
        return [
            sum(step.get(picture, False) for step in run.values())
            for run in self._sorted()
            for picture in range(_pictures(run))
        ]

    @property
    def told(self) -> bool:
        """Whether gates have been asked since anybody last looked."""
        return bool(self._notes)

    def so_far(self, pictures: int) -> list[bool]:
        """For each picture of the batch that is sampled now, whether a gate has been open at any of its steps."""
        runs = self._sorted()
        now = [] if self._begins or not runs else runs[-1].values()
        return [any(step.get(i, False) for step in now) for i in range(pictures)]

    @property
    def pictures(self) -> int:
        return len(self.by_picture())

    @property
    def fired_pictures(self) -> int:
        return sum(steps > 0 for steps in self.by_picture())

    @property
    def steps(self) -> int:
        """Picture-steps looked at."""
        return sum(_pictures(run) * len(run) for run in self._sorted())

    @property
    def fired_steps(self) -> int:
        return sum(self.by_picture())

    def to_dict(self) -> dict[str, int]:
        return {
            "pictures": self.pictures,
            "fired_pictures": self.fired_pictures,
            "steps": self.steps,
            "fired_steps": self.fired_steps,
        }

    def text(self) -> str:
        if not self.pictures:
            return "the gate has not been asked yet"
        return (
            f"the gate opened in {self.fired_pictures} of {self.pictures} pictures "
            f"({self.fired_steps} of {self.steps} picture-steps)"
        )


def _pictures(run: dict[float, dict[int, bool]]) -> int:
    return 1 + max(picture for step in run.values() for picture in step)


@dataclass(frozen=True, eq=False)
class Presence:
    """K linear readings of h for each of T times; the concept is present where any of them is above the threshold.

    score of a picture at time t: max over k of (<w_tk, mean of h over positions> - l_tk) / s_tk, with directions w
    (T, K, C), limits l (T, K) and scales s (T, K): 0 is the limit that the gate was learned with, 1 a standard
    deviation of harmless pictures above it. The times fall; between them all three are linear.
    Errors: SafetyError for shapes or numbers that cannot be.
    """

    directions: Tensor
    limits: Tensor
    scales: Tensor
    timesteps: tuple[float, ...]
    threshold: float
    firings: Firings | None = field(default=None, compare=False)
    label: str = ""

    def __post_init__(self) -> None:
        with torch.inference_mode(False):
            for name in ("directions", "limits", "scales"):
                tensor = getattr(self, name).detach().clone().to("cpu", torch.float32).contiguous()
                object.__setattr__(self, name, tensor)
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        object.__setattr__(self, "_kept", {})
        count = len(self.timesteps)
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        shape = tuple(self.directions.shape)
        shapes = len(shape) == 3 and shape[0] == count and self.limits.shape == self.scales.shape == shape[:2]
        if not count or not falling or not shapes:
            found = [tuple(t.shape) for t in (self.directions, self.limits, self.scales)]
            raise SafetyError(
                f"The gate has {count} times and tensors of {found}; expected falling times, (T, K, C), (T, K) and "
                "(T, K)."
            )
        finite = all(bool(torch.isfinite(t).all()) for t in (self.directions, self.limits, self.scales))
        if not finite or not bool((self.scales > 0).all()) or not math.isfinite(self.threshold):
            raise SafetyError(
                f"The gate {self.label!r} holds numbers that cannot be (NaN, infinity, or a spread of 0): learn the "
                "safety vectors again, or get their file again."
            )

    def __deepcopy__(self, memo: Any) -> Presence:
        return self  # immutable; ComfyUI deep-copies everything that hangs on a model

    @property
    def channels(self) -> int:
        return self.directions.shape[2]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the gate does; who counts it does not matter."""
        tensors = b"".join(t.numpy().tobytes() for t in (self.directions, self.limits, self.scales))
        about = json.dumps([list(self.directions.shape), list(self.timesteps), self.threshold])
        return hashlib.sha256(about.encode() + tensors).hexdigest()

    def at(self, timestep: float, device: torch.device | str = "cpu") -> At:
        """What one timestep needs, fp32 on a device; kept. Between two times linear, beyond them the nearest."""
        if math.isnan(timestep):
            raise SafetyError("The timestep is not known, so the safety gate cannot tell what h should look like.")
        key = (float(timestep), torch.device(device))
        kept: dict[Any, At] = self.__dict__["_kept"]
        if key not in kept:
            if len(kept) >= MOST_KEPT:
                kept.clear()
            direction, limit, scale = self._between(timestep)
            with torch.inference_mode(False):
                kept[key] = direction.T.contiguous().to(device), (limit + self.threshold * scale).to(device)
        return kept[key]

    def _between(self, timestep: float) -> tuple[Tensor, Tensor, Tensor]:
        """Directions (K, C), limits (K,) and scales (K,) at a timestep."""
        times = self.timesteps
        after = next((i for i, t in enumerate(times) if t <= timestep), len(times) - 1)  # they fall
        before = max(0, after - 1)
        gap = times[before] - times[after]
        share = 0.0 if gap <= 0 else min(1.0, max(0.0, (times[before] - timestep) / gap))
        parts = (self.directions, self.limits, self.scales)
        with torch.inference_mode(False):
            direction, limit, scale = (part[before] * (1 - share) + part[after] * share for part in parts)
        return direction, limit, scale

    @staticmethod
    def opened(h: Tensor, at: At) -> Tensor:
        """(B, 1, 1, 1) bool for h (B, C, H, W). Tensors only. NaN opens it: what cannot be judged is not harmless."""
        directions, limits = at
        return ~(h.float().mean((2, 3)) @ directions <= limits).all(1).view(-1, 1, 1, 1)

    def score(self, h: Tensor, timestep: float) -> Tensor:
        """(B,) for h (B, C, H, W): above the threshold the gate is open."""
        directions, limits, scales = self._between(timestep)
        return ((h.detach().float().cpu().mean((2, 3)) @ directions.T - limits) / scales).amax(1)

    def scores(self, pooled: Tensor) -> Tensor:
        """(n,): the highest score of each picture over its steps. pooled: (n, T, C), means of h at the gate's times."""
        return self.score_by_step(pooled).amax(1)

    def score_by_step(self, pooled: Tensor) -> Tensor:
        """(n, T): as `scores`, of each step."""
        read = torch.einsum("ntc,tkc->ntk", pooled.float(), self.directions)
        return ((read - self.limits) / self.scales).amax(2)

    def saw(self, timestep: float, opened: Tensor, pictures: Sequence[int | None] | None = None) -> None:
        """Count, where a `Firings` was handed in."""
        if self.firings is not None:
            self.firings.saw(timestep, opened, pictures)

    def counted(self, firings: Firings | None) -> Presence:
        """The same gate, which tells `firings`."""
        return replace(self, firings=firings)

    def with_threshold(self, threshold: float) -> Presence:
        if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise SettingError(f"The gate's threshold is {threshold!r}; it must be a finite number.")
        return replace(self, threshold=float(threshold))
