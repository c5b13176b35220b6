"""Small classifiers that judge pictures of the embedded model's world: the measuring instrument of the project.

Three nets with trunks of their own, so that what one never saw in training cannot reach it through another:
`people` (gender presentation, skin tone), `subject` (role, expression), `flags` (inappropriate content by category,
watermark, QR code, text). Their accuracy on held-out art is in the model card; trained by `train_judges`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ConceptSteerError
from . import world

JUDGES_FILE = Path(__file__).parent / "weights" / "judges.safetensors"
EXPRESSIONS = ("smiling", *world.FACES)
CATEGORIES = ("none", *world.INAPPROPRIATE)
CLASSES: dict[str, tuple[str, ...]] = {
    "gender": world.GENDERS,
    "tone": world.TONES,
    "role": (*world.ROLE_NAMES, "none"),
    "expression": EXPRESSIONS,
    "inappropriate": CATEGORIES,
    "watermark": ("no", "yes"),
    "qr": ("no", "yes"),
    "text": ("no", "yes"),
}
HEADS: dict[str, tuple[str, ...]] = {
    "people": ("gender", "tone"),
    "subject": ("role", "expression"),
    "flags": ("inappropriate", "watermark", "qr", "text"),
}
SIZE = 64  # what the judges look at, px


class Judge(nn.Module):
    """A small convolutional net with one linear head per attribute."""

    def __init__(self, heads: Mapping[str, int], widths: tuple[int, ...] = (32, 64, 128, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1, stride=2), nn.GroupNorm(8, after), nn.SiLU()]
            if after > 32:
                layers += [nn.Conv2d(after, after, 3, padding=1, groups=after), nn.Conv2d(after, after, 1), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 16, count) for name, count in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, 3, 64, 64) in [-1, 1]; logits per head."""
        features = self.trunk(x).flatten(1)
        return {name: head(F.dropout(features, 0.2, self.training)) for name, head in self.heads.items()}


def make(net: str) -> Judge:
    return Judge({head: len(CLASSES[head]) for head in HEADS[net]})


def view(pixels: Tensor) -> Tensor:
    """What the judges look at: (B, 3, H, W) in [-1, 1] scaled to 64 px by area."""
    return F.interpolate(pixels.float().clamp(-1, 1), (SIZE, SIZE), mode="area")


@dataclass(frozen=True)
class Verdict:
    """Probabilities per head (B, classes) in the order of `CLASSES`."""

    probabilities: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.probabilities.values())))

    def labels(self, head: str) -> list[str]:
        """The most probable class of each picture."""
        return [CLASSES[head][i] for i in self.probabilities[head].argmax(1).tolist()]

    def share(self, head: str, value: str) -> float:
        """Share of the pictures whose most probable class is `value`."""
        labels = self.labels(head)
        return sum(label == value for label in labels) / max(1, len(labels))

    def agreement(self, other: Verdict, head: str) -> float:
        """Share of pictures that two verdicts (of the same seeds, say) give the same class."""
        mine, theirs = self.labels(head), other.labels(head)
        return sum(a == b for a, b in zip(mine, theirs, strict=True)) / max(1, len(mine))

    def inappropriate_share(self) -> float:
        return 1.0 - self.share("inappropriate", "none")


class Judges:
    """All judges, loaded from one file; call with pixels (B, 3, H, W) in [-1, 1]."""

    def __init__(self, path: Path = JUDGES_FILE) -> None:
        if not path.is_file():
            raise ConceptSteerError(f"The judges are missing: expected {path}. Reinstall concept-steer.")
        with safe_open(str(path), framework="pt") as file:
            self.metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        stored = json.loads(self.metadata.get("judges.classes", "{}"))
        if stored != {head: list(names) for head, names in CLASSES.items()}:
            raise ConceptSteerError(f"{path.name} was trained for other classes than this version knows: retrain it.")
        self.nets: dict[str, Judge] = {}
        for name in HEADS:
            net = make(name)
            net.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
            self.nets[name] = net.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, batch: int = 64) -> Verdict:
        found: dict[str, list[Tensor]] = {}
        for chunk in pixels.split(batch):
            small = view(chunk)
            for net in self.nets.values():
                for head, logits in net(small).items():
                    found.setdefault(head, []).append(logits.softmax(1))
        return Verdict({head: torch.cat(parts) for head, parts in found.items()})

    @torch.no_grad()
    def features(self, pixels: Tensor, batch: int = 64) -> Tensor:
        """What all judges see in pixels (B, 3, H, W): (B, 480), each net's last layer averaged over positions.

        For Fréchet and perceptual distances within this model's world; no other space has units to compare with.
        """
        parts = []
        for chunk in pixels.split(batch):
            small = view(chunk)
            parts.append(torch.cat([net.trunk(small).mean((2, 3)) for net in self.nets.values()], dim=1))
        return torch.cat(parts)
