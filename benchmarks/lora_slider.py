"""Concept Sliders (Gandikota et al. 2311.12092) as a baseline: a LoRA learned by the published loss. Needs peft.

The LoRA's prediction under the neutral prompt is drawn to
eps(x_t, neutral) + eta (eps(x_t, rich) - eps(x_t, opposite)), all three from the frozen model, at x_t that the LoRA
itself reached under the neutral prompt. At use it is on at every step, with strength 1. Used by
`concept-steer evaluate learning`, from a checkout of the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from concept_steer.denoiser import Conditioning
from concept_steer.errors import ConceptSteerError
from concept_steer.geom_erasing import lora
from concept_steer.hosts.diffusers import DiffusersDenoiser
from concept_steer.learn.result import encode, rows
from concept_steer.sampling import ddim_step, noise, timesteps

# every attention and every convolution of the residual blocks ("c3lier" of the authors' code, and attention)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj", "proj_in", "proj_out")
State = dict[str, Tensor]
Progress = Callable[[int, int, float, Callable[[], State]], None]


def adapted(
    denoiser: DiffusersDenoiser, rank: int, seed: int, state: State | None = None
) -> AbstractContextManager[None]:
    """Inside, the UNet carries a LoRA: `state`, or a new one that changes nothing yet; outside it is as it was."""
    return lora.adapted(denoiser, rank, seed, state, TARGETS)


def learn_slider(
    denoiser: DiffusersDenoiser,
    triples: Sequence[tuple[str, str, str]],
    *,
    steps: int = 1000,
    batch: int = 1,
    rate: float = 2e-4,
    eta: float = 4.0,
    rank: int = 4,
    picture_steps: int = 50,
    guidance: float = 3.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> State:
    """The LoRA's weights, learned from (neutral, rich, opposite) prompts; the defaults are the published ones.

    Each step draws `batch` pictures of one triple each to a random step of `picture_steps`, with the LoRA on, and
    compares there. Cost a row of the batch: 2 forward rows a step drawn, 4 to compare, and one backward through the
    whole UNet, counted in denoiser.cost as two of the decoder half. progress(step, steps, loss, weights):
    weights() gives a copy of the LoRA so far.
    Errors: ConceptSteerError without peft, or when the loss is not finite.
    """
    encoded = encode(denoiser, ["", *(prompt for triple in triples for prompt in triple)])
    times = timesteps(denoiser.schedule, picture_steps)
    generator = torch.Generator().manual_seed(seed)
    with adapted(denoiser, rank, seed):
        weights = [parameter for parameter in denoiser.unet.parameters() if parameter.requires_grad]
        adam = torch.optim.AdamW(weights, lr=rate)
        for step in range(steps):
            mine = [triples[(step * batch + row) % len(triples)] for row in range(batch)]
            neutral, rich, opposite = (rows(encoded, [triple[i] for triple in mine]) for i in range(3))
            upto = int(torch.randint(1, max(2, picture_steps), (1,), generator=generator))
            seeds = torch.randint(2**31, (batch,), generator=generator).tolist()
            x = torch.stack([noise(s, denoiser.latent_shape) for s in seeds]).to(denoiser.device)
            both = Conditioning.cat([encoded[""].expand(batch), neutral])
            t = times[min(upto, len(times) - 1)]
            with torch.no_grad():
                for at, following in zip(times[:upto], [*times[1:upto], t], strict=True):
                    free, text = denoiser.predict(torch.cat([x, x]), at, both).float().chunk(2)
                    x = ddim_step(denoiser.schedule, x, free + guidance * (text - free), at, following)
                denoiser.unet.disable_adapters()
                three = denoiser.predict(torch.cat([x] * 3), t, Conditioning.cat([neutral, rich, opposite])).float()
                denoiser.unet.enable_adapters()
                plain, high, low = three.chunk(3)
                target = plain + eta * (high - low)
            loss = (denoiser.predict(x, t, neutral).float() - target).square().mean()
            if not bool(torch.isfinite(loss)):
                raise ConceptSteerError(f"The slider's loss is not finite at step {step + 1}: use a lower rate.")
            adam.zero_grad()
            loss.backward()
            adam.step()
            denoiser.cost.backward_rows += 2 * batch
            if progress is not None:
                progress(step + 1, steps, float(loss.detach()), lambda: lora.state_of(denoiser))
        return lora.state_of(denoiser)
