"""What learning to erase is given: the pictures with what was found in them, and its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import LearnError, SettingError
from .grid import ALPHA, BINS, Boxes, area_weights, covered, covered_cells, located_caption

Way = Literal["told", "masked", "plain"]


@dataclass(frozen=True)
class Examples:
    """latents: (N, C, H, W) scaled latents, fp32; of each picture its caption and the boxes of the thing (or none)."""

    latents: Tensor
    captions: Sequence[str]
    boxes: Sequence[Boxes]

    def __post_init__(self) -> None:
        count = len(self.latents)
        if self.latents.ndim != 4 or not bool(torch.isfinite(self.latents).all()):
            raise LearnError("The latents of the pictures must be finite, (N, C, H, W).")
        if len(self.captions) != count or len(self.boxes) != count:
            raise LearnError(
                f"{count} pictures came with {len(self.captions)} captions and {len(self.boxes)} lists of boxes: each "
                "needs one."
            )

    @property
    def spoiled(self) -> list[int]:
        """Numbers of the pictures with the thing."""
        return [i for i, boxes in enumerate(self.boxes) if boxes]

    def cells(self, index: Sequence[int]) -> Tensor:
        """(B, H, W) bool: what the thing covers in some of the pictures."""
        height, width = self.latents.shape[-2:]
        return torch.stack([covered_cells(self.boxes[i], height, width) for i in index])


@dataclass(frozen=True)
class ErasingSettings:
    """bins: places a side. alpha: weight of what is not covered (1: the plain loss). Neither is published.

    rate: of the tokens, in units of the size of a token's values, for Adam. rank: of the LoRA; 0 trains the tokens
    alone. drop: how often a picture's caption is left out, so that guidance keeps working (the thing is named all the
    same). even: every timestep counts the same, its error at the start being 1; the published plain loss, False, hardly
    looks at the first steps of sampling, in which it is decided what goes where. geometry: False leaves the location
    tokens out, for the ablation. way: "told" is the published one. The others train a LoRA and no tokens: "masked",
    ours, gives the covered cells no weight, so that the pictures are learned without the thing; "plain" knows nothing
    of it, as fine-tuning does without any of this, and is there to compare with. Errors: SettingError.
    """

    bins: int = BINS
    alpha: float = ALPHA
    steps: int = 400
    batch: int = 16
    rate: float = 0.1
    rank: int = 0
    lora_rate: float = 1e-3
    drop: float = 0.1
    even: bool = True
    geometry: bool = True
    way: Way = "told"
    seed: int = 0

    def __post_init__(self) -> None:
        fine = (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("rate", 0 < self.rate < math.inf, "above 0"),
            ("rank", 0 <= self.rank <= 256, "from 0 to 256"),
            ("lora_rate", 0 < self.lora_rate < math.inf, "above 0"),
            ("drop", 0 <= self.drop < 1, "from 0 to below 1"),
        )
        for name, right, expected in fine:
            if not right:
                raise SettingError(f"The setting {name} of erasing is {getattr(self, name)}; expected {expected}.")
        area_weights(torch.zeros(1, 1, dtype=torch.bool), self.alpha)
        covered((), self.bins)
        if self.way not in get_args(Way):
            raise SettingError(f"There is no way {self.way!r} to erase; there are {', '.join(get_args(Way))}.")
        if self.way != "told" and not self.rank:
            raise SettingError(f"The way {self.way!r} trains a LoRA and no tokens: give it a rank, for example 16.")

    def caption(self, caption: str, concept: str, boxes: Boxes) -> str:
        """What a picture is told by: y', or its own caption where it is clean."""
        if self.way != "told" or not boxes:
            return caption
        if not self.geometry:
            return f"{caption} {concept}".strip()
        return located_caption(caption, concept, boxes, self.bins)

    def weights(self, cells: Tensor) -> Tensor:
        """Of the loss, fp32, (B, H, W). cells: what is covered."""
        if self.way == "told":
            return area_weights(cells, self.alpha)
        return (~cells if self.way == "masked" else torch.ones_like(cells)).float()
