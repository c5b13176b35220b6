"""A latent and a pixel tower of one size, trained side by side, to tell what reading latents costs or gains.

Both read the same pictures in the same order against one text tower, which starts from the shipped weights and learns
from both, so that neither has the better texts; both picture towers start from noise. One in ten drawings of people and
one in five of things are held out: no picture with them is trained on. What they learn is not shipped.

    python -m concept_steer.demo.train --data DATA --work WORK --from-shipped --stage latents
    python -m concept_steer.demo.tower_pair --data DATA --work WORK --out pair.safetensors
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import ConceptSteerError
from ..latent_clip.model import LatentClipModel, PictureTower
from ..latent_clip.spaces import LatentSpace
from ..latent_clip.tokenizer import ClipTokenizer
from ..vector_file import write_atomic
from . import latent_clip
from .train_towers import Latents, caption_table
from .trainer import Job, Trainer

KINDS = ("latent", "pixel")
PIXELS = LatentSpace("demo-pixels", "pictures of 128 pixels in -1 to 1", 3, 1.0, ())
PEOPLE_OUT, THINGS_OUT = 10, 5  # one drawing in so many is held out


def held_out(labels: dict[str, np.ndarray]) -> np.ndarray:
    """(N,) bool: pictures that hold a drawing which training never sees.

    A drawing is a person's role, gender and tone in one emoji set, a face's code in a set, or a thing in a set.
    """
    person = (labels["role"] * 10 + labels["gender"] * 5 + labels["tone"]) * 3 + labels["set"]
    face, item = labels["face"] * 3 + labels["set"], labels["item"] * 3 + labels["set"]
    out = (labels["role"] >= 0) & (person * 7 % PEOPLE_OUT == 3)
    out |= (labels["face"] >= 0) & (face % PEOPLE_OUT == 3)
    return out | ((labels["item"] >= 0) & (item % THINGS_OUT == 2))


def pixel_config():
    """As many patches, layers and dimensions as the latent tower has: patches of 16 pixels for 2 cells."""
    return replace(latent_clip.config(), channels=3, patch=16, size=128)


class Pair(nn.Module):
    """The text tower, both picture towers and a scale of cosines for each."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = latent_clip.load().requires_grad_(True)
        self.clip.visual = nn.Identity()  # type: ignore[assignment]
        self.clip.logit_scale = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.latent, self.pixel = PictureTower(latent_clip.config()), PictureTower(pixel_config())
        self.scales = nn.ParameterDict({kind: nn.Parameter(torch.tensor(2.66)) for kind in KINDS})

    def loss(self, ids: Tensor, which: Tensor, shown: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """InfoNCE (van den Oord et al. 1807.03748), as CLIP, the mean of both towers. ids: (B, L); which: (B,)."""
        words = F.normalize(self.clip.text_features(ids).float(), dim=-1)
        own = torch.arange(len(which))
        # pictures with the very same caption are no counter-examples of each other
        same = (which[:, None] == which[None]) & (own[None] != own[:, None])
        losses, told = [], {}
        for kind in KINDS:
            seen = F.normalize(getattr(self, kind)(shown[kind]).float(), dim=-1)
            logits = (self.scales[kind].exp().clamp(max=100) * words @ seen.T).masked_fill(same, -1e4)
            losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
            told[kind] = losses[-1].item()
            told[f"{kind}_top1"] = (logits.argmax(1) == own).float().mean().item()
        return torch.stack(losses).mean(), told


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, 128, 128, 3) uint8 -> (B, 3, 128, 128) in -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(job: Job) -> Pair:
    """Resumable from WORK/pair.pt. Every second batch holds groups of 16 of one role, so that gender and tone count."""
    torch.manual_seed(job.seed)
    latents, pictures = Latents(job.work), np.load(job.data / "pictures.npy", mmap_mode="r")
    unique, index_of = caption_table(job.data)
    labels = {name: values[: len(latents)] for name, values in np.load(job.data / "labels.npz").items()}
    free = torch.from_numpy(np.nonzero(~held_out(labels))[0])
    role = torch.from_numpy(labels["role"].astype(np.int64))[free]
    families = [free[role == k] for k in range(int(role.max()) + 1)]
    families = [family for family in families if len(family) >= 16]
    pair = Pair()
    ids = pair.clip.tokenizer(unique, 32)
    trainer = Trainer("pair", pair, job, 0, 1, ema=0.99)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = free[torch.randint(len(free), (job.batch,), generator=generator)]
        if trainer.step % 2:
            chosen = torch.randint(len(families), (job.batch // 16,), generator=generator).tolist()
            groups = [families[k][torch.randint(len(families[k]), (16,), generator=generator)] for k in chosen]
            picked = torch.cat([*groups, picked[: job.batch % 16]])
        which = index_of[picked, torch.randint(index_of.shape[1], (job.batch,), generator=generator)]
        rows = ids[which]
        longest = int(rows.argmax(1).max()) + 1  # the text tower is causal: what follows the end token does not count
        shown = {"latent": latents.at(picked, generator), "pixel": to_pixels(pictures[picked.numpy()])}
        with torch.autocast("cpu", torch.bfloat16):
            return pair.loss(rows[:, :longest], which, shown)

    trainer.run(loss_of)
    pair.load_state_dict(trainer.ema)
    return pair.eval().requires_grad_(False)


def write(pair: Pair, path: Path, told: dict[str, float]) -> Path:
    """Both as fp16 in one safetensors file, with what was trained."""
    state = {key: value.half().contiguous() for key, value in pair.state_dict().items()}
    return write_atomic(path, save(state, {"tower_pair": json.dumps(told)}), overwrite=True)


def read(path: Path) -> tuple[dict[str, LatentClipModel], dict[str, float]]:
    """Each kind as a latent CLIP (the pixel tower's "latents" are pictures, see PIXELS), and what was trained."""
    try:
        with safe_open(str(path), framework="pt") as file:
            told = json.loads((file.metadata() or {})["tower_pair"])
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConceptSteerError(f"{path} is no pair of towers ({error!r}): train one with demo.tower_pair.") from error
    pair = Pair()
    pair.load_state_dict(state)
    shipped = latent_clip.load()
    tokens: ClipTokenizer = shipped.tokenizer
    sizes = {"latent": (latent_clip.config(), shipped.space), "pixel": (pixel_config(), PIXELS)}
    found = {}
    for kind, (config, space) in sizes.items():
        clip = LatentClipModel(replace(config, vocabulary=len(tokens)), space, tokens)
        clip.load_state_dict({**clip.state_dict(), **pair.clip.state_dict()})
        clip.visual = getattr(pair, kind)
        clip.logit_scale = pair.scales[kind]
        found[kind] = clip.eval().requires_grad_(False)
    return found, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="with latents.npy and scale.json of the latents stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    job = Job(args.data, args.work, args.steps, args.batch, args.rate, args.seed, save_every=100)
    pair = train(job)
    told = {"steps": args.steps, "batch": args.batch, "rate": args.rate, "seed": args.seed}
    print("written:", write(pair, args.out, told))


if __name__ == "__main__":
    main()
