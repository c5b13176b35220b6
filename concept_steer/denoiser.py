"""What learning, sampling and analysis need of any model: one protocol, implemented once per host in `hosts/`.

The point is the split of the UNet at its mid block: `to_h` (encoder and mid block) can be computed once and kept,
`from_h` (decoder) is all that a gradient with respect to a concept vector has to pass through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .errors import ConceptSteerError
from .steering import Steer, apply, places

Rows = slice | Tensor
Time = float | Tensor  # one training timestep for all rows, or (B,)
Steers = Sequence[Steer] | Sequence[Sequence[Steer]]  # for all rows, or one list per row


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: embeds (B, L, D), pooled (B, P) or None, extra: further tensors (B, ...) by name."""

    embeds: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: Rows) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled[rows]
        return Conditioning(self.embeds[rows], pooled, {key: value[rows] for key, value in self.extra.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of all parts in order; ConceptSteerError when they do not fit (prompt lengths, pooled or not)."""
        first = parts[0]
        for part in parts:
            same = part.embeds.shape[1:] == first.embeds.shape[1:] and part.extra.keys() == first.extra.keys()
            if not same or (part.pooled is None) != (first.pooled is None):
                raise ConceptSteerError(
                    f"Encoded prompts of different kinds cannot share a batch: {tuple(first.embeds.shape[1:])} and "
                    f"{tuple(part.embeds.shape[1:])}. Encode all prompts with the same model, to the same length."
                )
        pooled = None if first.pooled is None else torch.cat([cast(Tensor, part.pooled) for part in parts])
        extra = {key: torch.cat([part.extra[key] for part in parts]) for key in first.extra}
        return Conditioning(torch.cat([part.embeds for part in parts]), pooled, extra)

    def expand(self, count: int) -> Conditioning:
        """A single encoded prompt as `count` equal rows (no copy)."""
        if len(self) != 1:
            raise ValueError(f"expand() repeats a single prompt; this conditioning has {len(self)} rows.")
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        extra = {key: value.expand(count, *value.shape[1:]) for key, value in self.extra.items()}
        return Conditioning(self.embeds.expand(count, -1, -1), pooled, extra)

    def plain(self) -> Conditioning:
        """The same values with no history: usable by autograd also when made inside torch.inference_mode."""
        return _map_conditioning(self, _plain)


@dataclass(frozen=True)
class HState:
    """All that the decoder half needs: h (B, C, H, W), skips (B, ...) each, time embedding (B, E), prompts."""

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    cond: Conditioning

    def __len__(self) -> int:
        return self.h.shape[0]

    def __getitem__(self, rows: Rows) -> HState:
        return HState(self.h[rows], tuple(skip[rows] for skip in self.skips), self.emb[rows], self.cond[rows])

    def with_h(self, h: Tensor) -> HState:
        return replace(self, h=h)

    def detach(self) -> HState:
        return self._map(torch.Tensor.detach)

    def to(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> HState:
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    @staticmethod
    def cat(parts: Sequence[HState]) -> HState:
        """Rows of all parts in order."""
        skips = tuple(torch.cat(column) for column in zip(*(part.skips for part in parts), strict=True))
        cond = Conditioning.cat([part.cond for part in parts])
        return HState(torch.cat([part.h for part in parts]), skips, torch.cat([part.emb for part in parts]), cond)

    def _map(self, change: Any) -> HState:
        skips = tuple(change(skip) for skip in self.skips)
        return HState(change(self.h), skips, change(self.emb), _map_conditioning(self.cond, change))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _map_conditioning(cond: Conditioning, change: Any) -> Conditioning:
    pooled = None if cond.pooled is None else change(cond.pooled)
    return Conditioning(change(cond.embeds), pooled, {key: change(value) for key, value in cond.extra.items()})


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Variance-preserving noise: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a = alphas_cumprod (T,), t in 0..T-1."""

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConceptSteerError(
                f"The model predicts {self.prediction_type!r}; epsilon and v_prediction are supported."
            )
        object.__setattr__(self, "alphas_cumprod", self.alphas_cumprod.detach().to("cpu", torch.float64))

    @property
    def train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def signal(self, t: Time | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(a_t), sqrt(1 - a_t)), fp32, shaped to multiply `like`; t None is the finished picture (1, 0)."""
        if t is None:
            a = torch.ones(1, dtype=torch.float64)
        else:
            index = torch.as_tensor(t, dtype=torch.float64, device="cpu").round().long().reshape(-1)
            a = self.alphas_cumprod[index.clamp(0, self.train_timesteps - 1)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return tuple(v.sqrt().to(like.device, torch.float32).view(shape) for v in (a, 1 - a))  # type: ignore[return-value]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time | None) -> Tensor:
        alpha, sigma = self.signal(t, x0)
        return alpha * x0 + sigma * noise

    def prediction_of(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """What the model should predict at x_t = add_noise(x0, noise, t)."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self.signal(t, x0)
        return alpha * noise - sigma * x0

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """The clean latents that the model's prediction stands for, fp32."""
        alpha, sigma = self.signal(t, x_t)
        if self.prediction_type == "v_prediction":
            return alpha * x_t.float() - sigma * prediction.float()
        return (x_t.float() - sigma * prediction.float()) / alpha

    def to_epsilon(self, x_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """The noise that the model's prediction stands for, fp32."""
        if self.prediction_type == "epsilon":
            return prediction.float()
        alpha, sigma = self.signal(t, x_t)
        return alpha * prediction.float() + sigma * x_t.float()


@dataclass
class Cost:
    """How many rows went through each half of the UNet, and how many backward through the decoder."""

    encoder_rows: int = 0
    decoder_rows: int = 0
    backward_rows: int = 0

    @property
    def unet_rows(self) -> float:
        """Forward cost in rows of the whole UNet."""
        return (self.encoder_rows + self.decoder_rows) / 2

    def snapshot(self) -> Cost:
        return replace(self)

    def since(self, earlier: Cost) -> Cost:
        return Cost(
            self.encoder_rows - earlier.encoder_rows,
            self.decoder_rows - earlier.decoder_rows,
            self.backward_rows - earlier.backward_rows,
        )


class Denoiser(Protocol):
    """A latent diffusion model with a mid block. x (B, C, H, W) latents, t one timestep or (B,), cond B rows."""

    cost: Cost

    @property
    def family(self) -> str: ...
    @property
    def channels(self) -> int:
        """Channels of h."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def checkpoint_hash(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def encode_text(self, prompts: Sequence[str]) -> Conditioning: ...
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels (B, 3, H, W) in [-1, 1]."""
        ...

    def to_h(self, x: Tensor, t: Time, cond: Conditioning) -> HState: ...
    def from_h(self, state: HState) -> Tensor: ...
    def predict(
        self, x: Tensor, t: Time, cond: Conditioning, steers: Steers = (), is_cond: Sequence[bool] | None = None
    ) -> Tensor:
        """from_h(to_h(...)) with the steers applied in between; exactly the UNet's own forward without steers."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, no parameter wants a gradient and every module is in eval mode; restored afterwards."""
        ...


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """Inside, no parameter of `module` wants a gradient and dropout is off; the former state comes back."""
    # weights made inside torch.inference_mode have no gradient anyway, and refuse to be changed
    wanted = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
    training = [m for m in module.modules() if m.training]
    try:
        for p in wanted:
            p.requires_grad_(False)
        for m in training:
            m.training = False
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for m in training:
            m.training = True


def steers_of_rows(steers: Steers, rows: int) -> list[tuple[Steer, ...]]:
    """One tuple of steers per row, from one list for all rows or one list per row."""
    if not steers:
        return [()] * rows
    if isinstance(steers[0], Steer):
        return [tuple(cast("Sequence[Steer]", steers))] * rows
    if len(steers) != rows:
        raise ConceptSteerError(f"Steers for {len(steers)} rows were given, but the batch has {rows} rows.")
    return [tuple(row) for row in cast("Sequence[Sequence[Steer]]", steers)]


def times_of_rows(t: Time, rows: int) -> list[float]:
    """The training timestep of each row."""
    times = [float(v) for v in torch.as_tensor(t, dtype=torch.float64).reshape(-1).tolist()]
    if len(times) not in (1, rows):
        raise ConceptSteerError(f"{len(times)} timesteps were given, but the batch has {rows} rows.")
    return times * rows if len(times) == 1 else times


def steer_rows(
    h: Tensor, steers: Steers, t: Time, is_cond: Sequence[bool] | None = None, pictures: Sequence[int] | None = None
) -> Tensor:
    """`steering.apply` for rows that may differ in steers and timestep; `h` itself when nothing acts.

    h: (B, C, H, W). is_cond None: every row is a text row. pictures: as in `apply`.
    """
    rows = h.shape[0]
    conds = [True] * rows if is_cond is None else [bool(c) for c in is_cond]
    numbers = places(conds) if pictures is None else pictures
    groups: dict[tuple[float, tuple[int, ...]], list[int]] = {}
    of_rows = steers_of_rows(steers, rows)
    for row, (time, mine) in enumerate(zip(times_of_rows(t, rows), of_rows, strict=True)):
        groups.setdefault((time, tuple(id(steer) for steer in mine)), []).append(row)
    out = h
    for (time, _), members in groups.items():
        mine = of_rows[members[0]]
        if not mine:
            continue
        if len(members) == rows:
            return apply(h, mine, time, conds, numbers)
        index = torch.tensor(members, device=h.device)
        part = h[index]
        steered = apply(part, mine, time, [conds[row] for row in members], [numbers[row] for row in members])
        if steered is not part:
            out = out.index_copy(0, index, steered)
    return out
