"""Second stage: text and picture tower contrastively on latents, as CLIP, and the text states of all captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import architecture, tokenizer
from .distributed import gather
from .trainer import Job, Trainer


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
