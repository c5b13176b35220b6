"""What learning hands back, and the small pieces that all ways of learning share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser
from ..errors import LearnError
from ..vector import ConceptVector

Pairs = Sequence[tuple[str, str]]  # (neutral, positive) prompts
FULL = 0.8  # explained: below, a vector without places leaves much of the prompt's effect out


@dataclass
class LearnResult:
    """A learned vector and how it went.

    losses: per step (none for difference); held_out: the held-out loss at each check, the first at the start.
    separation: how often <h, v> is larger under the positive prompt than under the neutral one on held-out seeds
    (area under the ROC curve: .5 is chance, 1 perfect). explained: 1 - held-out loss, the share of the positive
    prompt's own effect on the prediction that the vector reproduces. For `learn_pictures` they compare pictures with
    reference pictures and with the noise: see there. unet_rows: forward cost in rows of the whole UNet.
    without_map: what one value per channel explained, where a map was kept because it explains more.
    """

    vector: ConceptVector
    method: str
    losses: list[float]
    separation: float | None
    explained: float | None
    unet_rows: float
    backward_rows: int
    seconds: float
    stopped: str
    held_out: list[float] = field(default_factory=list)
    without_map: float | None = None

    def summary(self) -> str:
        """Two or three lines in plain words."""
        lines = [f"{self.vector.title or 'vector'}: learned by {self.method}, {self.stopped}."]
        if self.explained is not None and self.method == "pictures":
            lines.append(f"It takes {self.explained:.1%} off the prediction's error on unseen pictures.")
        elif self.explained is not None:
            lines.append(f"It reproduces {self.explained:.0%} of the prompt's own effect on unseen seeds.")
            if self.without_map is not None:
                lines.append(f"It is a map (C, H, W): one value per channel reproduces only {self.without_map:.0%}.")
            elif self.explained < FULL and self.vector.tensor.ndim == 1 and self.method != "score":  # which tries one
                lines.append("A map (C, H, W) may reach more: what it shows may sit at a place, as a smile does.")
        if self.separation is not None:
            two = "pictures with and without it" if self.method == "pictures" else "the two prompts"
            lines.append(f"It tells {two} apart in {self.separation:.0%} of cases (50% is chance).")
        cost = f"{self.unet_rows:.0f} UNet rows forward, {self.backward_rows} backward through the decoder half"
        lines.append(f"Cost: {self.seconds:.1f} s, {cost}.")
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """All but the tensor, ready for JSON."""
        return {
            "title": self.vector.title,
            "family": self.vector.family,
            "fingerprint": self.vector.fingerprint,
            "norm": self.vector.norm,
            "shape": list(self.vector.tensor.shape),
            "method": self.method,
            "losses": self.losses,
            "held_out": self.held_out,
            "separation": self.separation,
            "explained": self.explained,
            "unet_rows": self.unet_rows,
            "backward_rows": self.backward_rows,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "without_map": self.without_map,
        }


def checked_pairs(pairs: Pairs, equal: bool = False) -> list[tuple[str, str]]:
    """The pairs as a list; LearnError when there is none, or (unless `equal`) one whose prompts are equal."""
    result = [(str(neutral), str(positive)) for neutral, positive in pairs]
    if not result:
        raise LearnError("Learning needs at least one pair of prompts, e.g. ('a person', 'a woman').")
    for neutral, positive in result:
        if neutral == positive and not equal:
            raise LearnError(
                f"Both prompts of a pair are {neutral!r}: there is nothing to learn between them. "
                "Give a neutral prompt and one that asks for the concept."
            )
    return result


def encode(denoiser: Denoiser, prompts: Sequence[str]) -> dict[str, Conditioning]:
    """Each different prompt as one row that autograd may keep, even when the caller is in torch.inference_mode."""
    different = list(dict.fromkeys(prompts))
    with torch.no_grad():
        cond = denoiser.encode_text(different).plain()
    return {prompt: cond[i : i + 1] for i, prompt in enumerate(different)}


def rows(encoded: dict[str, Conditioning], prompts: Sequence[str]) -> Conditioning:
    return Conditioning.cat([encoded[prompt] for prompt in prompts])


def projection(h: Tensor, direction: Tensor) -> Tensor:
    """<h, v> averaged over positions, fp32 (B,). h (B, C, H, W); direction (C,) or (C, H, W)."""
    v = direction.view(-1, 1, 1) if direction.ndim == 1 else direction
    return (h.float() * v.to(h.device)).sum(1).mean((1, 2))


def auc(positive: Tensor, neutral: Tensor) -> float:
    """How often a value of `positive` lies above one of `neutral` (ties count half): the area under the ROC curve."""
    difference = positive[:, None] - neutral[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def separation_of(groups: Sequence[tuple[Tensor, Tensor]], direction: Tensor) -> float | None:
    """Mean of the AUC of <h, direction> over groups (h with the concept, h without); None for a zero direction."""
    if not bool(direction.any()):
        return None
    found = [auc(projection(high, direction), projection(low, direction)) for high, low in groups]
    return sum(found) / len(found)


def rms(h: Tensor) -> float:
    return float(h.float().square().mean().sqrt())


def vector_of(
    denoiser: Denoiser, tensor: Tensor, title: str, missed: str, *, timesteps: tuple[float, ...] = (), **info: Any
) -> ConceptVector:
    """The vector with its metadata; LearnError when a value is not finite or nothing was learned (zero).

    timesteps: of a tensor that differs per timestep.
    missed: what it then did not do, e.g. "no vector tried came nearer to 'a woman' than no vector at all", and what
    to try.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise LearnError("The vector holds values that are not finite: the model gives NaN. Try dtype float32.")
    if not bool(tensor.any()):
        raise LearnError(f"Nothing was learned: {missed}")
    texts = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in info.items()}
    texts["checkpoint_hash"] = denoiser.checkpoint_hash
    return ConceptVector(tensor, denoiser.family, title=title, timesteps=timesteps, info=texts)


def finished_vector(
    denoiser: Denoiser, tensor: Tensor, pairs: list[tuple[str, str]], title: str, **info: Any
) -> ConceptVector:
    """`vector_of` for what was learned from pairs of prompts."""
    return vector_of(
        denoiser,
        tensor,
        title or pairs[0][1],
        f"no vector tried came nearer to {pairs[0][1]!r} than no vector at all. Check that the two prompts change this "
        "model's pictures, or give more steps and trajectories.",
        **info,
        prompt_neutral=" | ".join(dict.fromkeys(neutral for neutral, _ in pairs)),
        prompt_positive=" | ".join(dict.fromkeys(positive for _, positive in pairs)),
    )
