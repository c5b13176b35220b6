"""When a vector acts: a window in percent of sampling, with linear ramps.

Percent is defined by the model's own timestep, so that it means the same in every host, sampler and step count:
0 is pure noise, 1 the finished picture (the same meaning as ComfyUI's `percent_to_sigma`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import SettingError


@dataclass(frozen=True)
class Schedule:
    """Acts where start <= percent < end (an `end` of 1 includes 1). fade: length of the ramp at both ends.

    Half open, as in ComfyUI (s_end < sigma <= s_start), so that two windows side by side never act in the same step.
    Errors: SettingError (a ValueError) for values outside 0..1, an empty window, or a fade above half of the window.
    """

    start: float = 0.0
    end: float = 1.0
    fade: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end), ("fade", self.fade)):
            if not (isinstance(value, (int, float)) and 0.0 <= value <= 1.0):
                raise SettingError(
                    f"The schedule's {name} is {value!r}; it must be a number from 0 (noise) to 1 (finished)."
                )
        if self.start >= self.end:
            raise SettingError(
                f"The schedule starts at {self.start} and ends at {self.end}, so it would never act: "
                "let it end after it starts."
            )
        longest = (self.end - self.start) / 2
        if self.fade > longest + 1e-9:  # the slack is for sums such as 0.1 + 0.2
            raise SettingError(
                f"The schedule's fade of {self.fade} does not fit twice between {self.start} and {self.end}: "
                f"at most {longest:g} is possible."
            )

    def weight(self, percent: float) -> float:
        """The ramp (0..1) at `percent` of sampling (0..1): exactly 0.0 outside, exactly 1.0 inside without fade."""
        if math.isnan(percent):
            raise SettingError("The percent of sampling is not a number, so the schedule cannot tell whether to act.")
        if percent < self.start or percent > self.end or (percent == self.end and self.end < 1.0):
            return 0.0
        if self.fade == 0:
            return 1.0
        return max(0.0, min(1.0, (percent - self.start) / self.fade, (self.end - percent) / self.fade))


def percent_of_timestep(t: float, train_timesteps: int = 1000) -> float:
    """Percent of sampling (0..1) at training timestep `t` (train_timesteps - 1: pure noise, 0: the picture)."""
    if train_timesteps < 2:
        raise SettingError(f"A model needs at least 2 training timesteps, not {train_timesteps}.")
    percent = 1.0 - float(t) / (train_timesteps - 1)
    return percent if math.isnan(percent) else min(1.0, max(0.0, percent))
