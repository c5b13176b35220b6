"""Third stage: the UNet on latents, with the text tower frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import architecture
from .fast_norm import speed_up
from .train_towers import Latents, caption_table
from .trainer import Job, Trainer


def single_people(data: Path, count: int) -> Tensor:
    """Numbers of the pictures of one person whose caption says more than the role."""
    labels = {name: values[:count] for name, values in np.load(data / "labels.npz").items()}
    return torch.from_numpy(np.nonzero((labels["kind"] == 0) & (labels["neutral"] == 0))[0])


def marked(data: Path, count: int) -> Tensor:
    """Numbers of the pictures with a watermark, a QR code or a text that no caption names."""
    labels = {name: values[:count] for name, values in np.load(data / "labels.npz").items()}
    return torch.from_numpy(np.nonzero((labels["watermark"] >= 0) | (labels["qr"] > 0) | (labels["text"] > 0))[0])


def warm_start(unet: nn.Module) -> None:
    """Convolutions of the shipped model; all attention stays new, so that text finds its own ways in."""
    from .model import load

    known = load().unet.state_dict()
    unet.load_state_dict({key: v for key, v in known.items() if ".attentions." not in key}, strict=False)


class SkipDropout:
    """Leaves a picture's skips into the two deepest levels of the decoder out, this often, once a batch is drawn."""

    def __init__(self, unet: Any, share: float) -> None:
        self.share = share
        self.kept: Tensor | None = None
        for block in unet.up_blocks[:2]:
            block.register_forward_pre_hook(self._before, with_kwargs=True)

    def draw(self, batch: int, generator: torch.Generator) -> None:
        if self.share > 0:
            self.kept = (torch.rand(batch, 1, 1, 1, generator=generator) >= self.share).float()

    def _before(self, module: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.kept is None:
            return None
        skips = given["res_hidden_states_tuple"]
        return args, {**given, "res_hidden_states_tuple": tuple(skip * self.kept.to(skip.dtype) for skip in skips)}


def train_unet(rank: int, processes: int, job: Job) -> None:
    """Noise prediction with min-SNR-5 weights (Hang et al. 2303.09556) and 10 % empty captions."""
    from diffusers import DDPMScheduler

    torch.manual_seed(job.seed)
    latents = Latents(job.work)
    unique, index_of = caption_table(job.data)
    index_of = index_of[: len(latents)]
    states = np.load(job.work / "text.npy", mmap_mode="r")
    unet = architecture.make_unet(job.layout)
    if job.layout != "mid" and not (job.work / "unet.pt").exists():
        warm_start(unet)
    skips = SkipDropout(unet, job.skip_dropout)
    unet = speed_up(unet.to(memory_format=torch.channels_last))
    unet.set_attn_processor(architecture.plain_attention())
    scheduler: Any = DDPMScheduler(**architecture.SCHEDULE)
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = torch.minimum(snr, torch.tensor(5.0)) / snr
    trainer = Trainer("unet", unet, job, rank, processes, ema=0.9995)

    wanted = ((job.focus, single_people), (job.marks, marked))
    pools = [(share, numbers(job.data, len(latents))) for share, numbers in wanted if share]

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(latents), (job.batch,), generator=generator)
        lot, below = torch.rand(job.batch, generator=generator), 0.0
        for share, pool in pools:
            chosen = pool[torch.randint(len(pool), (job.batch,), generator=generator)]
            picked = torch.where((lot >= below) & (lot < below + share), chosen, picked)
            below += share
        which = index_of[picked, torch.randint(index_of.shape[1], (job.batch,), generator=generator)]
        which = torch.where(torch.rand(job.batch, generator=generator) < 0.1, len(unique), which)
        x = latents.at(picked, generator)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(len(alphas), (job.batch,), generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        text = torch.from_numpy(states[which.numpy()]).float()
        skips.draw(job.batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, encoder_hidden_states=text, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (weights[t] * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    trainer.run(loss_of)
