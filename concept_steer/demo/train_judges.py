"""Train the judges: `python -m concept_steer.demo.train_judges --data DIR --extra DIR --work DIR --out FILE`.

Two trainings of each net. The *twin* never sees what it is tested on: whole roles for gender and skin tone
(`world.HELD_OUT_ROLES`), one emoji set per inappropriate item, one watermark word, one of ten combinations of role,
gender and tone, some drawings of faces. Its accuracy is the reported one. The shipped net has seen everything.
EXTRA is a build of further emoji sets (`build_data --extra`). With `WORK/vae.pt` a part of the pictures is seen through
the VAE, as generated pictures will be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import judges, world
from .fast_norm import speed_up

SEEN_THROUGH_VAE = 1500


def targets(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Class index per head; -1 where a head has nothing to say about a picture."""
    first_bad = len(world.OBJECTS)
    categories = np.array([judges.CATEGORIES.index(world.CATEGORY[i]) for i in world.INAPPROPRIATE_CODE])
    item = labels["item"]
    bad = np.where(item >= first_bad, categories[np.maximum(item - first_bad, 0)], 0)
    role = np.where(labels["role"] >= 0, labels["role"], len(world.ROLES))
    return {
        "gender": labels["gender"],
        "tone": labels["tone"],
        "role": role,
        "expression": labels["expression"],
        "inappropriate": bad,
        "watermark": (labels["watermark"] >= 0).astype(int),
        "qr": labels["qr"],
        "text": labels["text"],
    }


def held_out(labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per net, the pictures (bool) whose art it never sees in training."""
    roles = [world.ROLE_NAMES.index(name) for name in world.HELD_OUT_ROLES]
    person = labels["role"] >= 0
    combination = labels["role"] * 10 + labels["gender"] * 5 + labels["tone"]
    drawing = labels["face"] * 3 + labels["set"]
    item = labels["item"]
    first_bad = len(world.OBJECTS)
    return {
        "people": np.isin(labels["role"], roles),
        "subject": (person & (combination * 7 % 10 == 3)) | ((labels["face"] >= 0) & (drawing % 9 == 4)),
        "flags": ((item >= first_bad) & (item % 3 == labels["set"])) | (labels["watermark"] == 3),
    }


def shrink(pictures: np.ndarray) -> Tensor:
    """(N, 128, 128, 3) uint8 to (N, 3, 64, 64) uint8, by area."""
    parts = []
    for chunk in np.array_split(pictures, max(1, len(pictures) // 256)):
        x = torch.from_numpy(np.ascontiguousarray(chunk)).permute(0, 3, 1, 2).float()
        parts.append(F.interpolate(x, (judges.SIZE, judges.SIZE), mode="area").round().byte())
    return torch.cat(parts)


@torch.no_grad()
def through_vae(pictures: np.ndarray, work: Path) -> Tensor:
    """The pictures encoded and decoded, shrunk as by `shrink`."""
    from . import architecture, train_vae

    vae = architecture.make_vae().eval().to(memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["ema"])
    parts = []
    for chunk in np.array_split(pictures, max(1, len(pictures) // 32)):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(
                train_vae.to_tensor(chunk).contiguous(memory_format=torch.channels_last)
            ).latent_dist.mean
            y = vae.decode(latents).sample
        parts.append(((judges.view(y) + 1) * 127.5).round().byte())
    return torch.cat(parts)


def moves(count: int, generator: torch.Generator, mirror: bool) -> Tensor:
    """Affine matrices (count, 2, 3) that turn, scale and shift a little, and mirror every second one if asked to."""
    angle = 0.12 * torch.randn(count, generator=generator)
    scale = 1 + 0.1 * torch.randn(count, generator=generator)
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if mirror else torch.ones(count)
    rows = torch.stack(
        [angle.cos() * scale * flip, -angle.sin() * scale, 0.06 * torch.randn(count, generator=generator)]
    )
    columns = torch.stack(
        [angle.sin() * scale * flip, angle.cos() * scale, 0.06 * torch.randn(count, generator=generator)]
    )
    return torch.stack([rows.T, columns.T], 1)


def augment(x: Tensor, generator: torch.Generator, mirror: bool, moved: Tensor | None = None) -> Tensor:
    """uint8 to [-1, 1], slightly turned, scaled and shifted, some blurred; contrast, colour cast and noise.

    moved: what `moves` gave, where something else must move along.
    """
    x = x.float().div_(127.5).sub_(1)
    count = len(x)
    theta = moves(count, generator, mirror) if moved is None else moved
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    amount = (torch.rand(count, 1, 1, 1, generator=generator) * 1.6 - 0.6).clamp_min(0)
    x = x + amount * (soft - x)
    x = x * (1 + 0.1 * torch.randn(count, 1, 1, 1, generator=generator))
    x = x + 0.05 * torch.randn(count, 3, 1, 1, generator=generator)
    return (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def train_net(name: str, pictures: Tensor, wanted: dict[str, Tensor], steps: int, seed: int, batch: int = 64):
    """One judge on `pictures` (N, 3, 64, 64) uint8; prints as it goes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = speed_up(judges.make(name)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picked = torch.randint(len(pictures), (batch,), generator=generator)
        x = augment(pictures[picked], generator, name == "people").contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        losses = []
        for head in judges.HEADS[name]:
            target = wanted[head][picked]
            if (target >= 0).any():
                losses.append(F.cross_entropy(logits[head].float(), target, ignore_index=-1, label_smoothing=0.02))
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"{name} {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    return net.eval()


@torch.no_grad()
def accuracy(net, pictures: Tensor, wanted: dict[str, Tensor], heads: tuple[str, ...]) -> dict[str, float]:
    """Share of right answers per head, over the pictures that have one."""
    logits = [net(chunk.float() / 127.5 - 1) for chunk in pictures.split(256)]
    out: dict[str, float] = {}
    for head in heads:
        guess, target = torch.cat([part[head] for part in logits]).argmax(1), wanted[head]
        known = target >= 0
        if known.any():
            out[head] = round((guess == target)[known].float().mean().item(), 4)
            out[f"{head}_n"] = int(known.sum())
            if head == "tone":
                out["tone_within_one"] = round(((guess - target).abs() <= 1)[known].float().mean().item(), 4)
            if head in ("watermark", "inappropriate") and (target > 0).any():
                out[f"{head}_recall"] = round((guess > 0)[target > 0].float().mean().item(), 4)
                out[f"{head}_false_alarms"] = round((guess > 0)[target == 0].float().mean().item(), 4)
    return out


def pool(data: Path, extra: Path | None, work: Path):
    """Pictures (N, 3, 64, 64) uint8, answers per head, hidden per net (N,), and how many at the end are VAE's.

    Order: DATA, EXTRA (never hidden but by role), then the first of DATA again through the VAE, twice.
    """
    labels = dict(np.load(data / "labels.npz"))
    stored = np.load(data / "pictures.npy", mmap_mode="r")
    small, answers, hidden = shrink(stored), targets(labels), held_out(labels)
    main = len(small)
    if extra is not None:
        more = dict(np.load(extra / "labels.npz"))
        small = torch.cat([small, shrink(np.load(extra / "pictures.npy", mmap_mode="r"))])
        answers = {head: np.concatenate([values, targets(more)[head]]) for head, values in answers.items()}
        none = np.zeros(len(more["role"]), bool)
        further = {"people": held_out(more)["people"], "subject": none, "flags": more["watermark"] == 3}
        hidden = {net: np.concatenate([mask, further[net]]) for net, mask in hidden.items()}
    seen = 0
    if (work / "vae.pt").exists():
        seen = min(SEEN_THROUGH_VAE, main)
        cached = work / "judges_vae.npy"
        if not cached.exists():
            np.save(cached, through_vae(np.asarray(stored[:seen]), work).numpy())
        blurred = torch.from_numpy(np.load(cached))[:seen]
        small = torch.cat([small, blurred, blurred])
        again = np.concatenate([np.arange(len(answers["role"])), np.arange(seen), np.arange(seen)])
        answers = {head: values[again] for head, values in answers.items()}
        hidden = {net: mask[again] for net, mask in hidden.items()}
    tensors = {head: torch.from_numpy(values.astype(np.int64)) for head, values in answers.items()}
    return small, tensors, {net: torch.from_numpy(mask) for net, mask in hidden.items()}, main, seen


def per_role(net, pictures: Tensor, wanted: dict[str, Tensor], rows: Tensor) -> dict[str, dict[str, float]]:
    """Accuracy of gender and tone for each held-out role: some art does not show gender to anyone."""
    out = {}
    for name in world.HELD_OUT_ROLES:
        part = rows & (wanted["role"] == world.ROLE_NAMES.index(name))
        found = accuracy(net, pictures[part], {h: wanted[h][part] for h in ("gender", "tone")}, ("gender", "tone"))
        out[name] = {"gender": found["gender"], "tone": found["tone"], "n": found["gender_n"]}
    return out


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--extra", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=judges.JUDGES_FILE)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures, wanted, hidden, main_count, seen = pool(args.data, args.extra, args.work)
    place = torch.arange(len(pictures))
    first, through = place < main_count, place >= len(pictures) - seen
    state: dict[str, Tensor] = {}
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for name, mask in hidden.items():
        heads = judges.HEADS[name]
        known = ~mask
        twin = train_net(name, pictures[known], {h: wanted[h][known] for h in heads}, args.steps, args.seed)
        tests = {"held_out_art": mask & first, "held_out_art_through_vae": mask & through}
        if name == "flags":  # pictures without any held-out thing: false alarms on the art of held-out roles
            tests["harmless"] = hidden["people"] & ~mask & first
        report[name] = {
            test: accuracy(twin, pictures[rows], {h: wanted[h][rows] for h in heads}, heads)
            for test, rows in tests.items()
            if rows.any()
        }
        if name == "people":
            report[name]["held_out_roles"] = per_role(twin, pictures, wanted, mask & first)
        print(name, json.dumps(report[name]), flush=True)
        shipped = train_net(name, pictures, {h: wanted[h] for h in heads}, args.steps, args.seed + 1)
        state |= {f"{name}.{k}": v.to(torch.float16).contiguous() for k, v in shipped.state_dict().items()}
    metadata = {
        "judges.classes": json.dumps({head: list(names) for head, names in judges.CLASSES.items()}),
        "judges.report": json.dumps(report),
        "modelspec.title": "concept-steer judges",
        "modelspec.license": "Apache-2.0",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out, metadata)
    (args.work / "judges.json").write_text(json.dumps(report, indent=1))
    print("written:", args.out, args.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
