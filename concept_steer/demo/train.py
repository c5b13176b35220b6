"""Train the embedded model: `python -m concept_steer.demo.train --data DIR --work DIR [--stage STAGE]`.

Stages, each seeded and resumable from `WORK/<stage>.pt`: the VAE on pictures; the text and picture towers
contrastively on its latents (as CLIP, but small, and on latents); the UNet on latents with the text tower frozen.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import architecture, tokenizer
from .distributed import average_gradients, gather, launch
from .fast_norm import speed_up


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
    start: Path | None = None
    count: int | None = None  # use only the first pictures


def rate_at(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last 40 %."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.4 * steps)))


def load_pictures(data: Path) -> np.ndarray:
    return np.load(data / "pictures.npy", mmap_mode="r")


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in [-1, 1], channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


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
            if len(state["optimizer"]["param_groups"][0]["params"]) == len(self.parameters):
                self.optimizer.load_state_dict(state["optimizer"])  # else: another set of parameters is trained now
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
                group["lr"] = job.rate * rate_at(self.step, job.steps)
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


def join_latents(work: Path, processes: int) -> None:
    join(work, "latents", processes)
    latents = np.load(work / "latents.npy", mmap_mode="r")
    scale = 1 / float(latents[:, :4].astype(np.float32).std())
    (work / "scale.json").write_text(json.dumps({"scaling_factor": scale}))


class Latents:
    """Scaled latents with the posterior's noise: `at(index, generator)` gives (B, 4, 16, 16) fp32."""

    def __init__(self, work: Path) -> None:
        self.stored = torch.from_numpy(np.load(work / "latents.npy"))
        self.scale = json.loads((work / "scale.json").read_text())["scaling_factor"]

    def __len__(self) -> int:
        return len(self.stored)

    def at(self, index: Tensor, generator: torch.Generator) -> Tensor:
        mean, std = self.stored[index].float().chunk(2, 1)
        return (mean + std * torch.randn(mean.shape, generator=generator)) * self.scale


def load_captions(data: Path) -> list[list[str]]:
    return json.loads((data / "captions.json").read_text())


def caption_table(data: Path) -> tuple[list[str], Tensor]:
    """The different captions, sorted, and the two numbers of each picture's (N, 2) int64."""
    captions = load_captions(data)
    unique = sorted({text for texts in captions for text in texts})
    number = {text: i for i, text in enumerate(unique)}
    return unique, torch.tensor([[number[text] for text in texts] for texts in captions])


def token_rows(work: Path, texts: list[str], length: int) -> Tensor:
    """Token ids (N, length) int64, padded with the end token as CLIP does."""
    tokens = tokenizer.load(work / "tokenizer")
    return tokens(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]


def like_each_other(data: Path, count: int) -> list[Tensor]:
    """Picture numbers by role: hard batches for the towers. Empty without labels."""
    if not (data / "labels.npz").exists():
        return []
    role = np.load(data / "labels.npz")["role"][:count]
    return [torch.from_numpy(np.nonzero(role == k)[0]) for k in range(role.max() + 1) if (role == k).sum() >= 16]


def train_towers(rank: int, processes: int, job: Job) -> None:
    """InfoNCE between captions and latents (as CLIP). The text tower is causal, so short rows train it fully."""
    torch.manual_seed(job.seed)
    latents = Latents(job.work)
    unique, index_of = caption_table(job.data)
    index_of = index_of[: len(latents)]
    tokens = token_rows(job.work, unique, 32)
    towers = architecture.make_towers(job.work / "tokenizer")
    trainer = Trainer("towers", towers, job, rank, processes, ema=0.995)

    families = like_each_other(job.data, len(latents))

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(latents), (job.batch,), generator=generator)
        if families and trainer.step % 4:  # groups of 16 of one role: gender and skin tone must tell them apart
            chosen = torch.randint(len(families), (job.batch // 16,), generator=generator).tolist()
            groups = [families[k][torch.randint(len(families[k]), (16,), generator=generator)] for k in chosen]
            picked = torch.cat([*groups, picked[: job.batch % 16]])
        which = index_of[picked, torch.randint(index_of.shape[1], (job.batch,), generator=generator)]
        x = latents.at(picked, generator)
        with torch.autocast("cpu", torch.bfloat16):
            text = towers.text(input_ids=tokens[which]).text_embeds
            picture = towers.picture(pixel_values=x).image_embeds
        text, picture = (F.normalize(v.float(), dim=-1) for v in (text, picture))
        all_text, all_picture = gather(text, rank, processes), gather(picture, rank, processes)
        all_which = gather(which.float(), rank, processes).long()
        scale = towers.log_scale.exp().clamp(max=100)
        mine = torch.arange(job.batch) + rank * job.batch
        # pictures with the very same caption are no counter-examples of each other
        same = (which[:, None] == all_which[None]) & (torch.arange(len(all_which))[None] != mine[:, None])
        logits_t = (scale * text @ all_picture.T).masked_fill(same, -1e4)
        logits_p = (scale * picture @ all_text.T).masked_fill(same, -1e4)
        loss = (F.cross_entropy(logits_t, mine) + F.cross_entropy(logits_p, mine)) / 2
        hits = (logits_t.argmax(1) == mine).float().mean().item()
        return loss, {"loss": loss.item(), "top1": hits, "scale": scale.item()}

    trainer.run(loss_of)


@torch.no_grad()
def embed_captions(rank: int, processes: int, job: Job) -> None:
    """The frozen text tower's states of all captions: `text.npy` (captions + 1, 77, width) fp16; the last is empty."""
    unique = [*caption_table(job.data)[0], ""]
    towers = architecture.make_towers(job.work / "tokenizer").eval()
    towers.load_state_dict(torch.load(job.work / "towers.pt", weights_only=True)["ema"])
    tokens = token_rows(job.work, unique, architecture.TEXT_LENGTH)
    mine = np.array_split(np.arange(len(unique)), processes)[rank]
    parts = [towers.text(input_ids=tokens[chunk]).last_hidden_state.half() for chunk in np.array_split(mine, 100)]
    np.save(job.work / f"text.{rank}.npy", torch.cat(parts).numpy())


def join(work: Path, name: str, processes: int) -> None:
    np.save(work / f"{name}.npy", np.concatenate([np.load(work / f"{name}.{rank}.npy") for rank in range(processes)]))
    for rank in range(processes):
        (work / f"{name}.{rank}.npy").unlink()


def train_unet(rank: int, processes: int, job: Job) -> None:
    """Noise prediction with min-SNR-5 weights (Hang et al. 2303.09556) and 10 % empty captions."""
    from diffusers import DDPMScheduler

    torch.manual_seed(job.seed)
    latents = Latents(job.work)
    unique, index_of = caption_table(job.data)
    index_of = index_of[: len(latents)]
    states = np.load(job.work / "text.npy", mmap_mode="r")
    unet = architecture.make_unet()
    if job.start is not None:
        unet.load_state_dict(torch.load(job.start, weights_only=True)["ema"])
    unet = speed_up(unet.to(memory_format=torch.channels_last))
    unet.set_attn_processor(architecture.plain_attention())
    alphas = DDPMScheduler(**architecture.SCHEDULE).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = torch.minimum(snr, torch.tensor(5.0)) / snr
    trainer = Trainer("unet", unet, job, rank, processes, ema=0.9995)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(latents), (job.batch,), generator=generator)
        which = index_of[picked, torch.randint(index_of.shape[1], (job.batch,), generator=generator)]
        which = torch.where(torch.rand(job.batch, generator=generator) < 0.1, len(unique), which)
        x = latents.at(picked, generator)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(len(alphas), (job.batch,), generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        text = torch.from_numpy(states[which.numpy()]).float()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, encoder_hidden_states=text, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (weights[t] * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    trainer.run(loss_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["vae", "latents", "towers", "text", "unet", "all"], default="all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--whole", type=int, default=200, help="VAE: last steps on whole pictures, not crops")
    parser.add_argument("--freeze-encoder", action="store_true", help="VAE: train the decoder only")
    parser.add_argument("--count", type=int, help="use only the first COUNT pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def job(steps: int, batch: int, rate: float, **more: Any) -> Job:
        chosen = args.steps or steps, args.batch or batch, args.rate or rate
        return Job(args.data, args.work, *chosen, args.seed, **more)

    if args.stage in ("vae", "all"):
        launch(train_vae, args.processes, job(4000, 4, 1e-3, whole=args.whole, freeze_encoder=args.freeze_encoder))
    if args.stage in ("latents", "all"):
        launch(encode_all, args.processes, job(1, 1, 1.0, count=args.count))
        join_latents(args.work, args.processes)
    if args.stage in ("towers", "all"):
        captions = [text for texts in load_captions(args.data) for text in texts]
        tokenizer.write(args.work / "tokenizer", *tokenizer.train(captions))
        launch(train_towers, args.processes, job(1200, 128, 1e-3))
    if args.stage in ("text", "all"):
        launch(embed_captions, args.processes, job(1, 1, 1.0))
        join(args.work, "text", args.processes)
    if args.stage in ("unet", "all"):
        launch(train_unet, args.processes, job(6000, 32, 1e-3))


if __name__ == "__main__":
    main()
