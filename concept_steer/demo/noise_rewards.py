"""The embedded judges as rewards for noise optimisation; they look at pixels, so each one decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SettingError
from ..latent_clip.noise import Reward
from .judges import CLASSES, HEADS, Judges, view


def judge_reward(
    judges: Judges, head: str, values: Sequence[str], *, weight: float = 1.0, name: str | None = None
) -> Reward:
    """The logarithm of the probability that the judge for `head` gives the class wanted of each picture.

    values: one class of judges.CLASSES[head] per picture. Errors: SettingError for another head or class.
    """
    if head not in CLASSES:
        raise SettingError(f"There is no judge for {head!r}; there are {', '.join(CLASSES)}.")
    unknown = sorted({value for value in values if value not in CLASSES[head]})
    if unknown:
        raise SettingError(f"The judge for {head} does not know {', '.join(unknown)}; it knows {CLASSES[head]}.")
    net = judges.nets[next(net for net, heads in HEADS.items() if head in heads)]
    wanted = torch.tensor([CLASSES[head].index(value) for value in values])

    def of(pixels: Tensor, targets: Tensor) -> Tensor:
        return net(view(pixels))[head].log_softmax(1).gather(1, targets[:, None])[:, 0]

    return Reward(name or head, of, weight, pixels=True, targets=wanted)
