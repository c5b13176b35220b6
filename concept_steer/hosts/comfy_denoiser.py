"""A ComfyUI MODEL (with CLIP and VAE) as a Denoiser: learning and analysis on ComfyUI's own UNet and memory manager.

The UNet is taken with its weights as they are loaded (LoRAs included), without other packs' attention patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding
from torch import Tensor, nn

from ..denoiser import Conditioning, Cost, HState, NoiseSchedule, Steers, Time, frozen, steer_rows, steers_of_rows
from ..errors import ConceptSteerError, LearnError
from ..steering import check_steers
from .comfy import family_of

SIZES = {"sd1": 64, "sd2": 64, "sdxl": 128, "sdxl-refiner": 128, "demo": 16}  # cells of the latent a side


class DecoderHalf(nn.Module):
    """What follows the mid block, as a module of its own: shares the UNet's blocks."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.output_blocks, self.out = unet.output_blocks, unet.out

    def forward(self, h: Tensor, skips: tuple[Tensor, ...], emb: Tensor, context: Tensor) -> Tensor:
        """h and skips of the encoder half -> prediction (B, C, H, W); as UNetModel's own forward."""
        options: dict[str, Any] = {"transformer_index": 0}
        dtype, left = h.dtype, list(skips)
        for number, block in enumerate(self.output_blocks):
            options["block"] = ("output", number)
            h = torch.cat([h, left.pop()], dim=1)
            shape = left[-1].shape if left else None
            h = forward_timestep_embed(block, h, emb, context, options, shape)
        return self.out(h.type(dtype))


class ComfyDenoiser:
    """A Denoiser on a MODEL; clip is needed for prompts, vae for pictures. size: of a picture's side in pixels.

    Calls do not switch gradients off. Weights that ComfyUI made inside torch.inference_mode cannot take part in a
    gradient, so inside `frozen()` the decoder half is copied once when a gradient is wanted, and freed at its end.
    """

    def __init__(self, model: Any, clip: Any = None, vae: Any = None, size: int | None = None) -> None:
        self._family, self._channels = family_of(model)
        self.model, self.clip, self.vae = model, clip, vae
        self.unet = model.model.diffusion_model
        if self.unet.in_channels != 4 or self.unet.out_channels != 4:
            raise ConceptSteerError(
                f"This UNet has {self.unet.in_channels} input and {self.unet.out_channels} output channels (an "
                "inpainting or editing model?): not supported for learning. Use a plain text-to-image model; steering "
                "its pictures with Concept Steer works all the same."
            )
        cells = SIZES.get(self._family, 64) if size is None else size // 8
        self._latent_shape = (4, cells, cells)
        self._copies: dict[str, Tensor] | None = None
        self.cost = Cost()

    @property
    def family(self) -> str:
        return self._family

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._latent_shape

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.load_device)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.manual_cast_dtype or self.model.model.get_dtype()

    @cached_property
    def schedule(self) -> NoiseSchedule:
        kinds, sampling = comfy.model_sampling, self.model.get_model_object("model_sampling")
        v = isinstance(sampling, kinds.V_PREDICTION) and not isinstance(sampling, kinds.EDM)
        epsilon = isinstance(sampling, kinds.EPS) and not isinstance(sampling, (kinds.V_PREDICTION, kinds.X0))
        discrete = isinstance(sampling, kinds.ModelSamplingDiscrete) and sampling.sigmas.shape[0] == 1000
        if not (v or epsilon) or not discrete or isinstance(sampling, kinds.ModelSamplingDiscreteEDM):
            found = ", ".join(kind.__name__ for kind in type(sampling).__mro__[1:3])
            raise LearnError(
                f"This model samples by {found}; learning needs epsilon or v prediction on SD's 1,000 steps. Connect "
                "the model before its ModelSampling node."
            )
        return NoiseSchedule(1 / (1 + sampling.sigmas.double().cpu() ** 2), "v_prediction" if v else "epsilon")

    @cached_property
    def checkpoint_hash(self) -> str:
        """sha256 over names, shapes and bytes of the UNet's weights as they are in memory, 64 hex digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.unet.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        clip = _have(self.clip, "CLIP", "read prompts")
        parts = []
        for prompt in prompts:
            embeds, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
            pooled = pooled.to(self.device) if self.unet.num_classes is not None else None
            parts.append(Conditioning(embeds.to(self.device, self.dtype), pooled))
        return Conditioning.cat(parts)

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        vae = _have(self.vae, "VAE", "read pictures")
        latents = vae.encode((pixels.float().movedim(1, -1) + 1) / 2)
        return self.model.model.process_latent_in(latents).float().to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = _have(self.vae, "VAE", "draw pictures")
        pixels = vae.decode(self.model.model.process_latent_out(latents.float()))
        return pixels.movedim(-1, 1) * 2 - 1

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with frozen(self.unet):
            try:
                yield
            finally:
                self._copies = None

    def to_h(self, x: Tensor, t: Time, cond: Conditioning) -> HState:
        """x (B, 4, H, W), t in training timesteps -> h and what the decoder needs; UNetModel's forward up to there."""
        self._ready()
        self.cost.encoder_rows += x.shape[0]
        unet, x, context = self.unet, x.to(self.dtype), cond.embeds.to(self.dtype)
        times = timestep_embedding(self._times(t, x), unet.model_channels, repeat_only=False)
        emb = unet.time_embed(times.to(x.dtype))
        if unet.num_classes is not None:
            emb = emb + unet.label_emb(self._label(x, cond))
        options: dict[str, Any] = {"transformer_index": 0}
        h, skips = x, []
        for number, block in enumerate(unet.input_blocks):
            options["block"] = ("input", number)
            h = forward_timestep_embed(block, h, emb, context, options)
            skips.append(h)
        options["block"] = ("middle", 0)
        h = forward_timestep_embed(unet.middle_block, h, emb, context, options)
        return HState(h, tuple(skips), emb, cond)

    def from_h(self, state: HState) -> Tensor:
        self._ready()
        self.cost.decoder_rows += len(state)
        decoder = DecoderHalf(self.unet)
        args = (state.h, state.skips, state.emb, state.cond.embeds.to(state.h.dtype))
        if not (torch.is_grad_enabled() and any(tensor.is_inference() for tensor in decoder.parameters())):
            return decoder(*args)
        if self._copies is None:
            weights = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
            self._copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return torch.func.functional_call(decoder, self._copies, args)

    def predict(
        self, x: Tensor, t: Time, cond: Conditioning, steers: Steers = (), is_cond: Sequence[bool] | None = None
    ) -> Tensor:
        """The UNet's prediction (B, 4, H, W), fp32; without steers its own untouched forward."""
        if steers:
            different = {id(s): s for row in set(steers_of_rows(steers, x.shape[0])) for s in row}
            check_steers(tuple(different.values()), self.family, self.channels)
            state = self.to_h(x, t, cond)
            return self.from_h(state.with_h(steer_rows(state.h, steers, t, is_cond))).float()
        self._ready()
        self.cost.encoder_rows += x.shape[0]
        self.cost.decoder_rows += x.shape[0]
        x = x.to(self.dtype)
        y = self._label(x, cond) if self.unet.num_classes is not None else None
        return self.unet(x, self._times(t, x), context=cond.embeds.to(self.dtype), y=y, transformer_options={}).float()

    def _ready(self) -> None:
        """The UNet on its device: reading text or pictures may have pushed it out."""
        comfy.model_management.load_models_gpu([self.model])

    def _times(self, t: Time, x: Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float32, device=x.device).reshape(-1).expand(x.shape[0])

    def _label(self, x: Tensor, cond: Conditioning) -> Tensor:
        """SDXL's added condition: pooled prompt and the picture's size."""
        if cond.pooled is None:
            raise ConceptSteerError("This UNet needs the pooled prompt too: use the CLIP of the same checkpoint.")
        size = {"width": x.shape[-1] * 8, "height": x.shape[-2] * 8}
        label = self.model.model.encode_adm(pooled_output=cond.pooled, device=x.device, **size)
        return label.to(x.device, x.dtype)


def _have(part: Any, name: str, what: str) -> Any:
    if part is None:
        raise ConceptSteerError(f"Connect a {name}: it is needed to {what}.")
    return part
