"""Rewards on latents for noise optimisation: fit a text, and avoid what "an image of X" says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .model import LatentClip, LatentClipModel
from .noise import Reward
from .scoring import _texts

SHOWS, LACKS = "an image of {}", "an image of no {}"  # Becker et al. 2503.08455 sec. 4.3


def text_reward(
    clip: LatentClip, prompts: Sequence[str], *, against: Sequence[str] = (), weight: float = 1.0, name: str = "text"
) -> Reward:
    """The cosine of each picture with its own text (one per picture), as ReNO rewards a CLIP.

    against: texts that no picture should fit; then the logarithm of the probability of its own text among all of them.
    """
    wanted = clip.encode_text(_texts(prompts))
    others = clip.encode_text(_texts(against)) if against else None

    def of(latents: Tensor, targets: Tensor) -> Tensor:
        seen = clip.encode_latents(latents)
        own = (seen * targets.to(seen.device)).sum(1)
        if others is None:
            return own
        rest = seen @ others.to(seen.device).T
        return (clip.scale * torch.cat([own[:, None], rest], dim=1)).log_softmax(1)[:, 0]

    return Reward(name, of, weight, targets=wanted)


def own_copy(clip: LatentClipModel, device: torch.device | str = "cpu") -> LatentClipModel:
    """The same towers on `device`, which gradients pass also when the first were made inside torch.inference_mode."""
    with torch.inference_mode(False), torch.no_grad():
        made = LatentClipModel(clip.config, clip.space, clip.tokenizer)
        made.load_state_dict({name: value.clone() for name, value in clip.state_dict().items()})
        return made.to(device, clip.visual.conv1.weight.dtype).eval().requires_grad_(False)


def absence_reward(clip: LatentClip, names: Sequence[str], *, weight: float = 1.0, name: str = "absence") -> Reward:
    """The mean over the named things of the logarithm of p("an image of no X"), held against "an image of X".

    Published for the safety of noise optimisation (Becker et al. 2503.08455 sec. 4.3), one X per I2P category.
    """
    given = _texts(names)
    shows = clip.encode_text([SHOWS.format(one) for one in given])
    lacks = clip.encode_text([LACKS.format(one) for one in given])

    def of(latents: Tensor) -> Tensor:
        seen = clip.encode_latents(latents)
        margin = clip.scale * (seen @ (lacks - shows).to(seen.device).T)
        return torch.nn.functional.logsigmoid(margin).mean(1)

    return Reward(name, of, weight)
