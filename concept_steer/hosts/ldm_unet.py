"""What the hosts with Stable Diffusion's original UNet layout share: UNetModel's forward in two halves, as a Denoiser.

That layout (input_blocks, middle_block, output_blocks, out) is ldm's and sgm's (AUTOMATIC1111) and ComfyUI's. The hosts
differ in how a block is called, in where prompts and pictures are read, and in how the weights get onto the device.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Conditioning, Cost, HState, Steers, Time, frozen, steer_rows, steers_of_rows
from ..errors import ConceptSteerError, LearnError
from ..family import detect
from ..steering import check_steers
from .ldm_names import diffusers_names

SIZES = {"sd1": 64, "sd2": 64, "sdxl": 128, "sdxl-refiner": 128, "demo": 16}  # cells of the latent a side
# block(h), its place ("input", 3) and the shape it has to come out with, if known
RunBlock = Callable[[Any, Tensor, tuple[str, int], "torch.Size | None"], Tensor]


def unet_family(unet: Any, text_width: int, kind: str) -> tuple[str, int]:
    """(family key, channels of h) of a UNetModel. kind: what the host calls the model, for the errors.

    Errors: ConceptSteerError for what is no UNet of this layout, or has no mid block.
    """
    if not all(hasattr(unet, name) for name in ("input_blocks", "output_blocks", "channel_mult")):
        raise ConceptSteerError(
            f"This model is a {type(unet).__name__} ({kind}), which has no UNet mid block: "
            "concept vectors need a UNet. Load an SD 1.x, SD 2.x or SDXL checkpoint, or the demo model."
        )
    if unet.middle_block is None:
        raise ConceptSteerError(
            "This UNet has no mid block (some distilled models drop it), so there is no h-space to steer. "
            "Use a model with a mid block, e.g. the one it was distilled from."
        )
    channels = unet.model_channels * unet.channel_mult[-1]
    return detect(cross_attention_dim=text_width, channels=channels, model_channels=unet.model_channels), channels


def text_width(unet: Any) -> int:
    """The width of the prompt embeddings that this UNetModel's cross attention reads; 0 when it has none."""
    found = (part.in_features for name, part in unet.named_modules() if name.endswith("attn2.to_k"))
    return int(next(found, 0))


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all weights as they are in memory, 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_half(unet: Any, x: Tensor, run: RunBlock) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input blocks and mid block: x (B, 4, H, W) -> (h, skips)."""
    h, skips = x, []
    for number, block in enumerate(unet.input_blocks):
        h = run(block, h, ("input", number), None)
        skips.append(h)
    return run(unet.middle_block, h, ("middle", 0), None), tuple(skips)


def decoder_half(output_blocks: Any, out: Any, h: Tensor, skips: tuple[Tensor, ...], run: RunBlock) -> Tensor:
    """What follows the mid block: h and skips of the encoder half -> prediction (B, 4, H, W)."""
    dtype, left = h.dtype, list(skips)
    for number, block in enumerate(output_blocks):
        skip = left.pop()
        if h.shape[-2:] != skip.shape[-2:]:  # an odd size upstream: doubling does not give it back
            h = F.interpolate(h, skip.shape[-2:], mode="nearest")
        h = run(block, torch.cat([h, skip], dim=1), ("output", number), left[-1].shape if left else None)
    return out(h.type(dtype))


class EncoderHalf(nn.Module):
    """Input blocks and mid block, as a module of its own: shares the UNet's blocks."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.input_blocks, self.middle_block = unet.input_blocks, unet.middle_block

    def forward(self, x: Tensor, run: RunBlock) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, 4, H, W) -> (h, skips)."""
        return encoder_half(self, x, run)


class DecoderHalf(nn.Module):
    """What follows the mid block, as a module of its own: shares the UNet's blocks."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.output_blocks, self.out = unet.output_blocks, unet.out

    def forward(self, h: Tensor, skips: tuple[Tensor, ...], run: RunBlock) -> Tensor:
        """h and skips of the encoder half -> prediction (B, 4, H, W); as UNetModel's own forward."""
        return decoder_half(self.output_blocks, self.out, h, skips, run)


class LdmDenoiser(ABC):
    """A Denoiser on a UNetModel. size: of a picture's side in pixels, None for the family's own.

    Calls do not switch gradients off: learning needs them through `from_h`. Use torch.no_grad() around the rest.
    Weights that the host made inside torch.inference_mode cannot take part in a gradient, so inside `frozen()` the
    decoder half is copied once when a gradient is wanted, and freed at its end; the encoder half too when it is wanted
    of the latents or of the prompts.
    A host adds: device, dtype, schedule, encode_text, encode_pictures, decode and the methods marked abstract here.
    """

    def __init__(self, unet: Any, family: str, channels: int, size: int | None) -> None:
        self.unet, self._family, self._channels = unet, family, channels
        if unet.in_channels != 4 or unet.out_channels != 4:
            raise ConceptSteerError(
                f"This UNet has {unet.in_channels} input and {unet.out_channels} output channels (an inpainting or "
                "editing model?): not supported for learning. Use a plain text-to-image model; steering its pictures "
                "with Concept Steer works all the same."
            )
        if size is not None and (size < 8 or size % 8):
            raise ConceptSteerError(f"Pictures cannot be {size} pixels wide: take a multiple of 8.")
        cells = SIZES.get(family, 64) if size is None else size // 8
        self._latent_shape = (4, cells, cells)
        self._copies: dict[type[nn.Module], dict[str, Tensor]] = {}
        self.copied = False  # whether `unet` is now a copy of its own: see `trainable`
        self.cost = Cost()

    @property
    @abstractmethod
    def device(self) -> torch.device: ...
    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...
    @abstractmethod
    def _ready(self) -> None:
        """The UNet on its device: reading text or pictures may have pushed it out."""

    @abstractmethod
    def _time_embedding(self, times: Tensor) -> Tensor:
        """The sinusoids of training timesteps (B,): (B, model_channels), by the host's own function."""

    @abstractmethod
    def _run_block(self, emb: Tensor, context: Tensor) -> RunBlock: ...
    @abstractmethod
    def _label(self, x: Tensor, cond: Conditioning) -> Tensor:
        """SDXL's added condition (B, P)."""

    @abstractmethod
    def _whole(self, x: Tensor, times: Tensor, context: Tensor, label: Tensor | None) -> Tensor:
        """The UNet's own untouched forward."""

    def _running(self) -> AbstractContextManager[Any]:
        """What the host evaluates its UNet in, such as autocast."""
        return nullcontext()

    @property
    def family(self) -> str:
        return self._family

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._latent_shape

    @cached_property
    def checkpoint_hash(self) -> str:
        """See `weights_hash`; of the UNet."""
        return weights_hash(self.unet)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with frozen(self.unet):
            try:
                yield
            finally:
                self._copies = {}

    @contextmanager
    def trainable(self) -> Iterator[Any]:
        """Inside, `unet` is a copy in fp32 on the device, which may be changed and which gradients pass; then it goes.

        Errors: LearnError for weights that are no plain numbers.
        """
        self.checkpoint_hash  # noqa: B018 - cached now: it is that of the model's own weights
        self._ready()
        own = self.unet
        with torch.inference_mode(False), torch.no_grad():
            made = copy.deepcopy(own)
            if not all(weight.is_floating_point() for weight in made.parameters()):
                raise LearnError("The weights of this model are quantised: train a LoRA on it in fp16, bf16 or fp32.")
            self.unet, self.copied = made.float().to(self.device).requires_grad_(False), True
        try:
            yield made
        finally:
            self.unet, self.copied = own, False

    def diffusers_names(self) -> dict[str, str]:
        """What diffusers, and with it the files of LoRAs, call the UNet's modules: own name -> its name there."""
        return diffusers_names(self.unet)

    def to_h(self, x: Tensor, t: Time, cond: Conditioning) -> HState:
        """x (B, 4, H, W), t in training timesteps -> h and what the decoder needs; UNetModel's forward up to there."""
        self._ready()
        self.cost.encoder_rows += x.shape[0]
        x = x.to(self.dtype)
        with self._running():
            with torch.no_grad():  # no gradient is ever wanted of the time, and the weights may not allow one
                emb = self.unet.time_embed(self._time_embedding(_times(t, x)).to(x.dtype))
                if self.unet.num_classes is not None:
                    emb = emb + self.unet.label_emb(self._label(x, cond))
            run = self._run_block(emb, cond.embeds.to(self.dtype))
            wanted = x.requires_grad or cond.embeds.requires_grad
            h, skips = self._through(EncoderHalf(self.unet), (x, run), wanted)
        return HState(h, skips, emb, cond)

    def from_h(self, state: HState) -> Tensor:
        self._ready()
        self.cost.decoder_rows += len(state)
        with self._running():
            run = self._run_block(state.emb, state.cond.embeds.to(state.h.dtype))
            return self._through(DecoderHalf(self.unet), (state.h, state.skips, run), True)

    def _through(self, half: nn.Module, given: tuple[Any, ...], wanted: bool) -> Any:
        """half(*given); with copies of its weights where a gradient is wanted and could not pass otherwise."""
        inference = any(tensor.is_inference() for tensor in half.parameters())
        if not (wanted and torch.is_grad_enabled() and inference):
            return half(*given)
        if type(half) not in self._copies:
            weights = {**dict(half.named_parameters()), **dict(half.named_buffers())}
            self._copies[type(half)] = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return torch.func.functional_call(half, self._copies[type(half)], given)

    def predict(
        self, x: Tensor, t: Time, cond: Conditioning, steers: Steers = (), is_cond: Sequence[bool] | None = None
    ) -> Tensor:
        """The UNet's prediction (B, 4, H, W), fp32; without steers its own untouched forward."""
        if steers:
            different = {id(s): s for row in set(steers_of_rows(steers, x.shape[0])) for s in row}
            check_steers(tuple(different.values()), self.family, self.channels)
            state = self.to_h(x, t, cond)
            return self.from_h(state.with_h(steer_rows(state.h, steers, t, is_cond))).float()
        if torch.is_grad_enabled() and (x.requires_grad or cond.embeds.requires_grad):
            # the untouched forward would want the host's own weights
            return self.from_h(self.to_h(x, t, cond)).float()
        self._ready()
        self.cost.encoder_rows += x.shape[0]
        self.cost.decoder_rows += x.shape[0]
        x = x.to(self.dtype)
        label = self._label(x, cond) if self.unet.num_classes is not None else None
        with self._running():
            return self._whole(x, _times(t, x), cond.embeds.to(self.dtype), label).float()


def _times(t: Time, x: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float32, device=x.device).reshape(-1).expand(x.shape[0])
