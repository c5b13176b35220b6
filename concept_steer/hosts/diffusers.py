"""Stable Diffusion and SDXL of the diffusers library as a Denoiser. Only `load_denoiser` imports diffusers itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning, Cost, HState, NoiseSchedule, Steers, Time, frozen, steer_rows, steers_of_rows
from ..errors import ConceptSteerError
from ..steering import check_steers
from .diffusers_hooks import Handle, steer
from .diffusers_load import load_pipeline
from .diffusers_text import DiffusersText
from .diffusers_unet import check_supported, family_of, time_ids, unet_from_h, unet_to_h

__all__ = ["Components", "DiffusersDenoiser", "Handle", "load_denoiser", "steer"]


@dataclass(frozen=True)
class Components:
    """A model put together by hand: a UNet2DConditionModel and functions for the rest.

    encode_text: prompts -> Conditioning. encode_pictures: pixels (B, 3, H, W) in [-1, 1] -> scaled latents. decode: the
    way back. latent_shape: default (C, H, W); None takes it from the UNet's config. vae_factor: pixels per latent.
    """

    unet: Any
    schedule: NoiseSchedule
    encode_text: Callable[[Sequence[str]], Conditioning]
    encode_pictures: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    latent_shape: tuple[int, int, int] | None = None
    vae_factor: int = 8


class DiffusersDenoiser:
    """A Denoiser on a StableDiffusionPipeline, a StableDiffusionXLPipeline or `Components`. The pipe is not changed.

    Calls do not switch gradients off: learning needs them through `from_h`. Use torch.no_grad() around the rest.
    """

    def __init__(self, pipe_or_components: Any) -> None:
        parts = pipe_or_components
        self._pipe: Any = None
        if not isinstance(parts, Components):
            parts, self._pipe = _from_pipeline(pipe_or_components), pipe_or_components
        self.unet = parts.unet
        self.cost = Cost()
        self._parts = parts
        self._family, self._channels = family_of(parts.unet)
        check_supported(parts.unet)

    @property
    def family(self) -> str:
        return self._family

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def schedule(self) -> NoiseSchedule:
        return self._parts.schedule

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        if self._parts.latent_shape is not None:
            return self._parts.latent_shape
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (int(self.unet.config.in_channels), int(height), int(width))

    @cached_property
    def checkpoint_hash(self) -> str:
        """sha256 over names, shapes and bytes of the UNet's weights, 64 hex digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.unet.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self._parts.encode_text(list(prompts))

    def text_reader(self) -> DiffusersText:
        """Its text encoders, for prompts with token vectors of one's own. Errors: ConceptSteerError for Components."""
        if self._pipe is None:
            raise ConceptSteerError("This model was put together without its text encoders: give a whole pipeline.")
        return DiffusersText(self._pipe)

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        return _have(self._parts.encode_pictures, "encode pictures")(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """As `decode`; gradients pass to the latents, for rewards on pixels."""
        return _have(self._parts.decode, "decode latents")(latents)

    def frozen(self) -> AbstractContextManager[None]:
        return frozen(self.unet)

    def to_h(self, x: Tensor, t: Time, cond: Conditioning) -> HState:
        """x (B, C, H, W) in the UNet's dtype -> h and what the decoder needs."""
        self.cost.encoder_rows += x.shape[0]
        h, skips, emb = unet_to_h(self.unet, x, self._time(t), cond.embeds, self._added(x, cond))
        return HState(h, skips, emb, cond)

    def from_h(self, state: HState) -> Tensor:
        self.cost.decoder_rows += len(state)
        return unet_from_h(self.unet, state.h, state.skips, state.emb, state.cond.embeds)

    def predict(
        self, x: Tensor, t: Time, cond: Conditioning, steers: Steers = (), is_cond: Sequence[bool] | None = None
    ) -> Tensor:
        """The UNet's prediction (B, C, H, W); without steers its own untouched forward."""
        if not steers:
            self.cost.encoder_rows += x.shape[0]
            self.cost.decoder_rows += x.shape[0]
            added = self._added(x, cond)
            return self.unet(x, self._time(t), encoder_hidden_states=cond.embeds, added_cond_kwargs=added).sample
        different = {id(s): s for row in set(steers_of_rows(steers, x.shape[0])) for s in row}
        check_steers(tuple(different.values()), self.family, self.channels)
        state = self.to_h(x, t, cond)
        return self.from_h(state.with_h(steer_rows(state.h, steers, t, is_cond)))

    def _time(self, t: Time) -> Time:
        return t.to(self.device) if isinstance(t, Tensor) else t

    def _added(self, x: Tensor, cond: Conditioning) -> dict[str, Tensor] | None:
        if self.unet.config.addition_embed_type != "text_time":
            return None
        if cond.pooled is None:
            raise ConceptSteerError("An SDXL UNet needs the pooled prompt too: Conditioning.pooled is None.")
        ids = cond.extra.get("time_ids")
        if ids is None:
            ids = time_ids(self.unet, x, self._parts.vae_factor, cond.pooled.shape[-1])
        return {"text_embeds": cond.pooled, "time_ids": ids}


def _have(function: Callable[[Tensor], Tensor] | None, what: str) -> Callable[[Tensor], Tensor]:
    if function is None:
        raise ConceptSteerError(f"This model was put together without a way to {what}: give Components that function.")
    return function


def _from_pipeline(pipe: Any) -> Components:
    """The parts of a pipeline; text and pictures go through the pipeline's own encoders."""
    missing = [name for name in ("unet", "vae", "scheduler", "encode_prompt") if getattr(pipe, name, None) is None]
    if missing:
        raise ConceptSteerError(
            f"Expected a StableDiffusionPipeline, a StableDiffusionXLPipeline or Components; {type(pipe).__name__} has "
            f"no {', '.join(missing)}."
        )
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ConceptSteerError(
            f"The scheduler {type(pipe.scheduler).__name__} has no alphas_cumprod (a flow model?). Use a model of the "
            "SD1, SD2 or SDXL family with one of their schedulers, e.g. DDIMScheduler."
        )
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    def encode_text(prompts: Sequence[str]) -> Conditioning:
        device = pipe.unet.conv_in.weight.device
        encoded = pipe.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(encoded[0], encoded[2] if len(encoded) == 4 else None)

    def encode_pictures(pixels: Tensor) -> Tensor:
        with _steady_vae(pipe.vae) as dtype:
            latents = pipe.vae.encode(pixels.to(pipe.vae.device, dtype)).latent_dist.mean
        return (latents - _shift(pipe.vae)) * pipe.vae.config.scaling_factor

    def decode(latents: Tensor) -> Tensor:
        latents = latents / pipe.vae.config.scaling_factor + _shift(pipe.vae)
        with _steady_vae(pipe.vae) as dtype:
            return pipe.vae.decode(latents.to(pipe.vae.device, dtype)).sample

    schedule = NoiseSchedule(alphas, pipe.scheduler.config.get("prediction_type", "epsilon"))
    return Components(pipe.unet, schedule, encode_text, encode_pictures, decode, vae_factor=factor)


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


class _steady_vae:
    """SDXL's VAE overflows in fp16 (config.force_upcast): inside, such a VAE runs in fp32."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.dtype: torch.dtype = vae.dtype
        self.upcast = self.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))

    def __enter__(self) -> torch.dtype:
        if self.upcast:
            self.vae.to(dtype=torch.float32)
        return torch.float32 if self.upcast else self.dtype

    def __exit__(self, *error: object) -> None:
        if self.upcast:
            self.vae.to(dtype=self.dtype)


def load_denoiser(path: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusersDenoiser:
    """A Denoiser from a diffusers folder or a single .safetensors checkpoint, from disk only (no network, no pickles).

    Errors (ConceptSteerError): diffusers not installed, nothing or something else at `path`, configs not at hand.
    """
    return DiffusersDenoiser(load_pipeline(path, device, dtype))
