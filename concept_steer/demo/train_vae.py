"""First stage: the VAE on pictures, and the latents of all pictures for the stages after it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import architecture
from .fast_norm import speed_up
from .trainer import Job, Trainer, join


def load_pictures(data: Path) -> np.ndarray:
    return np.load(data / "pictures.npy", mmap_mode="r")


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in [-1, 1], channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(rank: int, processes: int, job: Job) -> None:
    """Squared error, then L1 and L1 of the picture's edges, and a very weak KL: sharpness comes from the VAE first."""
    torch.manual_seed(job.seed)
    pictures = load_pictures(job.data)
    vae = speed_up(architecture.make_vae().to(memory_format=torch.channels_last))
    if job.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trainer = Trainer("vae", vae, job, rank, processes, ema=0.998)
    if job.freeze_encoder:  # the averaged encoder is the one that made the latents
        vae.load_state_dict(trainer.ema)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(pictures), (job.batch,), generator=generator).numpy()
        x = to_tensor(pictures[np.sort(index)])
        if trainer.step < job.steps - job.whole:  # crops first: four times the steps in the same time
            top, left = torch.randint(x.shape[-1] // 2 + 1, (2,), generator=generator).tolist()
            x = x[..., top : top + x.shape[-2] // 2, left : left + x.shape[-1] // 2]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample
        y = y.float()
        error = y - x
        edge = sum(part.abs().mean() for part in edges(error))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        # L1 and edges settle for blur when nothing is known yet: squared error leads, they sharpen later
        late = min(1.0, 2 * trainer.step / job.steps)
        loss = 4 * error.square().mean() + late * (error.abs().mean() + edge) + 1e-5 * kl
        psnr = -10 * math.log10(error.detach().square().mean().item() / 4)
        return loss, {"loss": loss.item(), "psnr": psnr, "kl": kl.item()}

    trainer.run(loss_of)


@torch.no_grad()
def encode_all(rank: int, processes: int, job: Job) -> None:
    """Posterior means and standard deviations of all pictures, scaled by 1/std: `latents.npy` (N, 8, 16, 16) fp16."""
    vae = architecture.make_vae()
    vae.load_state_dict(torch.load(job.work / "vae.pt", weights_only=True)["ema"])
    vae = vae.eval().to(memory_format=torch.channels_last)
    pictures = load_pictures(job.data)[: job.count]
    out = job.work / f"latents.{rank}.npy"
    mine = np.array_split(np.arange(len(pictures)), processes)[rank]
    parts = []
    for chunk in np.array_split(mine, max(1, len(mine) // 32)):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(to_tensor(pictures[chunk]).contiguous(memory_format=torch.channels_last)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], 1).to(torch.float16).numpy())
    np.save(out, np.concatenate(parts))


def join_latents(data: Path, work: Path, processes: int) -> None:
    """One file of all latents; their scale and their colours in `scale.json`."""
    join(work, "latents", processes)
    latents = np.load(work / "latents.npy", mmap_mode="r")
    scale = 1 / float(latents[:, :4].astype(np.float32).std())
    about = {"scaling_factor": scale, "latent_rgb": latent_colours(data, work, scale)}
    (work / "scale.json").write_text(json.dumps(about))


def latent_colours(data: Path, work: Path, scale: float, count: int = 1500) -> list[list[float]]:
    """A linear fit from scaled latents to colours, (4 channels and a constant) x RGB in -1..1, for live previews."""
    latents = np.load(work / "latents.npy", mmap_mode="r")[:count, :4].astype(np.float32) * scale
    pictures = load_pictures(data)[: len(latents)].astype(np.float32) / 127.5 - 1
    cells = latents.shape[-1]
    small = pictures.reshape(len(pictures), cells, pictures.shape[1] // cells, cells, -1, 3).mean((2, 4))
    inputs = latents.transpose(0, 2, 3, 1).reshape(-1, 4)
    fit = np.linalg.lstsq(np.c_[inputs, np.ones(len(inputs))], small.reshape(-1, 3), rcond=None)[0]
    return [[round(float(value), 4) for value in row] for row in fit]
