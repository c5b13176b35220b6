"""Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105): guidance away from what a text names.

The safety text is predicted beside the prompt. Where the prompt's prediction leans towards it, element by element, the
direction towards it is taken out of the guidance, with a momentum that runs along. Equation numbers are the paper's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptSteerError, SettingError

PUBLISHED_STEPS = 50  # the step count that the published warm-up is counted at
KEPT_STEPS = 4  # momenta kept; a sampler that looks ahead (Heun, heunpp2) returns by at most two steps
SAFETY_TEXT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


@dataclass(frozen=True)
class SafeLatentDiffusion:
    """The method's settings, and a `sampling.Guide`. The default is the preset "medium".

    text: what to keep away from. warmup: delta, in steps of 50: safety acts at step i of n where i / n >= warmup / 50.
    So at 50 steps it is the published step, and at other counts the first step at or past that share of sampling
    (20 steps, warmup 7: 2.8, so from step 3 on, counted from 0). scale: s_S; 0 turns the method off. threshold: lambda.
    momentum: s_m. beta: beta_m. every: predict the safety text at each `every`-th step only and keep its direction
    mu (eps_S - eps_u) for the steps between; ours, not the paper's; 1 is the published method.

    Guidance 1 (no classifier-free guidance): the published pipeline then turns safety off. Here eq. 3 holds as it
    stands, eps_p - gamma, at three rows a step instead of one; note that s_g = 1 also scales gamma by only 1.
    Cost: one more UNet row per picture and step, where it can act or feeds the momentum.
    Errors: SettingError for a value out of range.
    """

    text: str = SAFETY_TEXT
    warmup: float = 10.0
    scale: float = 1000.0
    threshold: float = 0.01
    momentum: float = 0.3
    beta: float = 0.4
    every: int = 1

    def __post_init__(self) -> None:
        numbers = (self.warmup, self.scale, self.threshold, self.momentum, self.beta)
        if not all(math.isfinite(value) for value in numbers):
            raise SettingError(f"Safe Latent Diffusion needs finite numbers, but found {numbers}.")
        if not 0 <= self.warmup <= PUBLISHED_STEPS or self.scale < 0:
            raise SettingError(
                f"Safe Latent Diffusion needs a warmup from 0 to {PUBLISHED_STEPS} and a scale of at least 0; found "
                f"{self.warmup:g} and {self.scale:g}."
            )
        if not 0 <= self.momentum < 1 or not 0 <= self.beta <= 1:
            raise SettingError(
                "Safe Latent Diffusion needs a momentum from 0 to below 1 and a beta from 0 to 1; found "
                f"{self.momentum:g} and {self.beta:g}."
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise SettingError(f"'every' is a whole number of steps from 1 on, not {self.every!r}.")
        if not self.text.strip():
            raise SettingError(
                "The safety text is empty, so there is nothing to keep away from. Say what is unwanted, or leave it at "
                "its default."
            )

    @staticmethod
    def preset(name: str, **changes: Any) -> SafeLatentDiffusion:
        """One of `PRESETS` (the paper's table), with changes by name. Errors: SettingError for an unknown name."""
        if name not in PRESETS:
            raise SettingError(f"Safe Latent Diffusion has no preset {name!r}; there are {', '.join(PRESETS)}.")
        return replace(PRESETS[name], **changes)

    @property
    def acts(self) -> bool:
        """False when no step of any picture can change."""
        return self.scale > 0 and self.warmup < PUBLISHED_STEPS

    @property
    def remembers(self) -> bool:
        """Whether the warm-up feeds a momentum that later counts."""
        return self.momentum > 0 and self.beta < 1

    def acts_at(self, step: int, steps: int) -> bool:
        """Whether the warm-up is over at a step (from 0) of `steps` evenly spaced ones."""
        return self.acts and step * PUBLISHED_STEPS >= self.warmup * steps - 1e-6

    def begin(self, pictures: range, steps: int, guidance: float) -> SafeRun:
        """A fresh state for one batch."""
        return SafeRun(self, len(pictures), steps, guidance)


PRESETS = {
    "weak": SafeLatentDiffusion(warmup=15, scale=200, threshold=0.0, momentum=0.0, beta=0.0),
    "medium": SafeLatentDiffusion(warmup=10, scale=1000, threshold=0.01, momentum=0.3, beta=0.4),
    "strong": SafeLatentDiffusion(warmup=7, scale=2000, threshold=0.025, momentum=0.5, beta=0.7),
    "max": SafeLatentDiffusion(warmup=0, scale=5000, threshold=1.0, momentum=0.5, beta=0.7),
}


def safety_scale(prompt: Tensor, safety: Tensor, scale: float, threshold: float) -> Tensor:
    """mu (eq. 5 and 6), element-wise, 0 to 1: how much of the safety direction is taken out.

    prompt, safety: noise predictions of one shape. The paper prints max(1, |phi|); its code, followed here, takes the
    minimum, as the text's "scaled to at most 1" means.
    """
    difference = prompt - safety
    phi = (difference.abs() * scale).clamp(max=1.0)
    return torch.where(difference < threshold, phi, torch.zeros_like(phi))


def safety_direction(uncond: Tensor, prompt: Tensor, safety: Tensor, scale: float, threshold: float) -> Tensor:
    """mu (eps_S - eps_u), eq. 4: gamma without its momentum. Noise predictions of one shape."""
    return safety_scale(prompt, safety, scale, threshold) * (safety - uncond)


def next_momentum(momentum: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """nu of the next step, eq. 8."""
    return beta * momentum + (1 - beta) * gamma


def guided(uncond: Tensor, prompt: Tensor, gamma: Tensor, guidance: float) -> Tensor:
    """eps_u + s_g (eps_p - eps_u - gamma), eq. 3."""
    return uncond + guidance * (prompt - uncond - gamma)


class SafetyState:
    """What runs along in one batch over one run: the momentum after each of the last steps, and the held direction.

    Steps are numbers of the sampler's steps, not of calls: a sampler that evaluates a step again (Heun's corrector)
    starts from the momentum before that step, and what it leaves replaces what the first evaluation left.
    """

    def __init__(self, settings: SafeLatentDiffusion) -> None:
        self.settings = settings
        self._after: dict[int, Tensor] = {}
        self._held: Tensor | None = None
        self._first = 0

    def wants(self, step: int, acting: bool) -> bool:
        """Whether the safety text must be predicted at this step; False also where its direction is held."""
        if not self.settings.acts or not (acting or self.settings.remembers):
            return False
        return self._held is None or (step - self._first) % self.settings.every == 0

    def gamma(self, step: int, uncond: Tensor, prompt: Tensor, safety: Tensor | None, keep: bool = True) -> Tensor:
        """gamma of eq. 7 in fp32. safety None: the held direction. keep False: an evaluation between two steps.

        Errors: ConceptSteerError when no direction is held, or when the batch's shape changed within the run.
        """
        if safety is not None:
            s = self.settings
            direction = safety_direction(uncond.float(), prompt.float(), safety.float(), s.scale, s.threshold)
            if keep or self._held is None:
                self._first = step if self._held is None else self._first
                self._held = direction
        elif self._held is None:
            raise ConceptSteerError("Safe Latent Diffusion has no direction to hold: predict the safety text first.")
        else:
            direction = self._held
        before = self._before(step)
        if direction.shape != prompt.shape or (before is not None and before.shape != prompt.shape):
            raise ConceptSteerError(
                f"Safe Latent Diffusion met a batch of {tuple(prompt.shape)} in a run of {tuple(direction.shape)}: its "
                "momentum belongs to one batch and one run. Begin a new run, or let no other node change the batch."
            )
        gamma = direction if before is None else direction + self.settings.momentum * before
        if keep and self.settings.remembers:
            start = torch.zeros_like(gamma) if before is None else before
            self._after[step] = next_momentum(start, gamma, self.settings.beta)
            for old in sorted(self._after)[:-KEPT_STEPS]:
                del self._after[old]
        return gamma

    def _before(self, step: int) -> Tensor | None:
        """nu of a step: what the last step before it left. A sampler that restarts further back goes on with it."""
        if not self._after:
            return None
        earlier = [number for number in self._after if number < step]
        if earlier:
            return self._after[max(earlier)]
        return None if step in self._after else self._after[max(self._after)]


class SafeRun:
    """One batch under Safe Latent Diffusion in `sampling.sample`."""

    def __init__(self, settings: SafeLatentDiffusion, size: int, steps: int, guidance: float) -> None:
        self.settings, self.size, self.steps, self.guidance = settings, size, steps, guidance
        self.state = SafetyState(settings)

    @property
    def prompts(self) -> Sequence[Sequence[str]]:
        return [[self.settings.text] * self.size]

    def needs(self, step: int) -> bool:
        """During the warm-up only the momentum wants the safety text."""
        return self.state.wants(step, self.settings.acts_at(step, self.steps))

    def combine(self, step: int, t: float, uncond: Tensor, cond: Tensor, extra: Tensor | None) -> Tensor:
        """Noise predictions (B, C, H, W), extra (1, B, C, H, W) -> eq. 3; plain guidance during the warm-up."""
        acting = self.settings.acts_at(step, self.steps)
        if not self.settings.acts or not (acting or self.settings.remembers):
            return uncond + self.guidance * (cond - uncond)
        gamma = self.state.gamma(step, uncond, cond, None if extra is None else extra[0])
        if not acting:
            return uncond + self.guidance * (cond - uncond)
        return guided(uncond, cond, gamma, self.guidance)


def step_of(sigmas: Sequence[float], sigma: float) -> tuple[int, bool]:
    """(step, whether the evaluation stands at the step itself) of a sigma in a run's falling list of sigmas.

    For samplers that call the model more than once a step: an evaluation between two sigmas belongs to the step that
    began at the higher one.
    """
    slack = 1e-4 * abs(sigma)
    rising = [-value for value in sigmas]
    number = max(0, bisect_right(rising, -sigma + slack) - 1)
    return number, abs(sigmas[number] - sigma) <= slack
