"""How the noise moves in noise optimisation: one step of descent, each picture by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import SettingError

PUBLISHED_SIZE = 4 * 64 * 64


@dataclass(frozen=True)
class Descent:
    """Gradient descent with Nesterov's momentum on -reward + regularisation (|z|^2 / 2 - (d - 1) log |z|).

    The last term is the negative log density of a Gaussian noise's length |z| in d dimensions, and keeps it there. The
    defaults are the published ones, for noise of 4 x 64 x 64 values; a length grows with the root of their number, so
    that a rate of 5 sqrt(d / 16384) goes as far on noise of another size. iterations: pictures drawn, of which the
    first is that of the starting noise. clip: the longest gradient. Errors: SettingError.
    """

    iterations: int = 50
    rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    regularisation: float = 0.01

    def __post_init__(self) -> None:
        fine = (
            ("iterations", self.iterations >= 1, "a whole number from 1 upwards"),
            ("rate", 0 < self.rate < math.inf, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("clip", self.clip > 0, "above 0"),
            ("regularisation", 0 <= self.regularisation < math.inf, "0 or more"),
        )
        for name, right, expected in fine:
            if not right:
                raise SettingError(f"The {name} of noise optimisation is {getattr(self, name)}; expected {expected}.")

    @staticmethod
    def rate_for(shape: Sequence[int]) -> float:
        """The published rate, scaled to noise of the shape (C, H, W)."""
        return 5.0 * math.sqrt(math.prod(shape) / PUBLISHED_SIZE)

    def step(self, z: Tensor, velocity: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(z, velocity) after a step; each row by itself. gradient: of the reward, (B, ...), to go up."""
        flat = z.flatten(1)
        length = flat.norm(dim=1, keepdim=True)
        towards = self.regularisation * (flat - (flat.shape[1] - 1) * flat / length.square())
        down = towards - gradient.flatten(1)
        down = (down * (self.clip / down.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)).view_as(z)
        velocity = self.momentum * velocity + down
        return z - self.rate * (down + self.momentum * velocity), velocity
