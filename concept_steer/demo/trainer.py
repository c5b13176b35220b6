"""What the stages of training share: settings, optimiser, average of the weights, checkpoints and the loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .distributed import average_gradients


@dataclass(frozen=True)
class Job:
    """What one stage needs to know; `steps` and `batch` (per process) set how long it trains."""

    data: Path
    work: Path
    steps: int
    batch: int
    rate: float
    seed: int = 0
    save_every: int = 250
    whole: int = 0  # VAE: last steps on whole pictures instead of crops
    freeze_encoder: bool = False  # VAE: a second stage for the decoder alone leaves the latents as they are
    focus: float = 0.0  # UNet: this share of a batch are single people whose caption says more than the role
    marks: float = 0.0  # UNet: this share of a batch carry a mark that no caption names (watermark, QR code, text)
    layout: str = "mid"  # UNet: see architecture.LAYOUTS
    skip_dropout: float = 0.0  # UNet: how often a picture's skips into the two deepest levels are left out
    count: int | None = None  # use only the first pictures
    warmup: int = 200  # steps until the full rate


def rate_at(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last 40 %."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.4 * steps)))


class Trainer:
    """Optimiser, EMA, checkpoints and the loop that all stages share."""

    def __init__(self, name: str, modules: nn.Module, job: Job, rank: int, processes: int, ema: float) -> None:
        self.name, self.modules, self.job = name, modules, job
        self.rank, self.processes, self.decay = rank, processes, ema
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, job.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.ema = {k: v.detach().clone() for k, v in modules.state_dict().items()}
        self.step = 0
        self.path = job.work / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            modules.load_state_dict(state["model"])
            kept = state.get("optimizer")  # the shipped file has none
            if kept and len(kept["param_groups"][0]["params"]) == len(self.parameters):
                self.optimizer.load_state_dict(kept)  # else: another set of parameters is trained now
            self.ema, self.step = state["ema"], state["step"]

    def save(self) -> None:
        if self.rank == 0:
            part = self.path.with_suffix(".part")
            torch.save(
                {
                    "model": self.modules.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "ema": self.ema,
                    "step": self.step,
                },
                part,
            )
            part.replace(self.path)

    def run(self, loss_of: Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]) -> None:
        job, seen, start = self.job, self.step, time.time()
        while self.step < job.steps:
            generator = torch.Generator().manual_seed(hash((job.seed, self.rank, self.step)) & 0x7FFFFFFF)
            for group in self.optimizer.param_groups:
                group["lr"] = job.rate * rate_at(self.step, job.steps, job.warmup)
            loss, figures = loss_of(generator)
            if not torch.isfinite(loss):
                raise RuntimeError(f"{self.name}: loss {loss.item()} at step {self.step}; last good: {self.path}")
            loss.backward()
            average_gradients(self.parameters, self.processes)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.rank == 0:
                decay = min(self.decay, (1 + self.step) / (10 + self.step))
                for key, value in self.modules.state_dict().items():
                    if value.is_floating_point():
                        self.ema[key].lerp_(value, 1 - decay)
                if self.step % 50 == 0:
                    speed = (self.step - seen) * job.batch * self.processes / (time.time() - start)
                    left = (job.steps - self.step) * job.batch * self.processes / speed / 60
                    text = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
                    print(f"{self.name} {self.step}/{job.steps} {text} {speed:.0f}/s {left:.0f} min left", flush=True)
            if self.step % job.save_every == 0:
                self.save()
        self.save()


def join(work: Path, name: str, processes: int) -> None:
    np.save(work / f"{name}.npy", np.concatenate([np.load(work / f"{name}.{rank}.npy") for rank in range(processes)]))
    for rank in range(processes):
        (work / f"{name}.{rank}.npy").unlink()
