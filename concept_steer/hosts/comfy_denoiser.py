"""A ComfyUI MODEL (with CLIP and VAE) as a Denoiser: learning and analysis on ComfyUI's own UNet and memory manager.

The UNet is taken with its weights as they are loaded (LoRAs included), without other packs' attention patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding
from torch import Tensor

from ..denoiser import Conditioning, NoiseSchedule
from ..errors import ConceptSteerError, LearnError
from .comfy import family_of
from .comfy_text import ComfyText
from .ldm_unet import LdmDenoiser, RunBlock


def run_block(emb: Tensor, context: Tensor) -> RunBlock:
    """How ComfyUI calls one block of its UNet; all blocks of one evaluation share their options."""
    options: dict[str, Any] = {"transformer_index": 0}

    def run(block: Any, h: Tensor, place: tuple[str, int], shape: Any) -> Tensor:
        options["block"] = place
        return forward_timestep_embed(block, h, emb, context, options, shape)

    return run


class ComfyDenoiser(LdmDenoiser):
    """A Denoiser on a MODEL; clip is needed for prompts, vae for pictures. size: of a picture's side in pixels.

    Calls do not switch gradients off. ComfyUI makes weights inside torch.inference_mode: see LdmDenoiser.
    """

    def __init__(self, model: Any, clip: Any = None, vae: Any = None, size: int | None = None) -> None:
        family, channels = family_of(model)
        super().__init__(model.model.diffusion_model, family, channels, size)
        self.model, self.clip, self.vae = model, clip, vae
        self._reader: ComfyText | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.load_device)

    @property
    def dtype(self) -> torch.dtype:
        if self.copied:
            return torch.float32
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

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        clip = _have(self.clip, "CLIP", "read prompts")
        parts = []
        for prompt in prompts:
            parts.append(
                self._placed(Conditioning(*clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)))
            )
        return Conditioning.cat(parts)

    def text_reader(self) -> ComfyText:
        """The text encoders, for prompts with vectors of one's own and for gradients; one reader for all calls."""
        if self._reader is None:
            self._reader = ComfyText(_have(self.clip, "CLIP", "read prompts"), self._placed)
        return self._reader

    def _placed(self, cond: Conditioning) -> Conditioning:
        """What the CLIP read, where the UNet wants it."""
        pooled = None
        if cond.pooled is not None and self.unet.num_classes is not None:
            pooled = cond.pooled.to(self.device)
        return Conditioning(cond.embeds.to(self.device, self.dtype), pooled)

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

    def _ready(self) -> None:
        if self.copied:
            return
        comfy.model_management.load_models_gpu([self.model])

    def _time_embedding(self, times: Tensor) -> Tensor:
        return timestep_embedding(times, self.unet.model_channels, repeat_only=False)

    def _run_block(self, emb: Tensor, context: Tensor) -> RunBlock:
        return run_block(emb, context)

    def _whole(self, x: Tensor, times: Tensor, context: Tensor, label: Tensor | None) -> Tensor:
        return self.unet(x, times, context=context, y=label, transformer_options={})

    def _label(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Pooled prompt and the picture's size."""
        if cond.pooled is None:
            raise ConceptSteerError("This UNet needs the pooled prompt too: use the CLIP of the same checkpoint.")
        size = {"width": x.shape[-1] * 8, "height": x.shape[-2] * 8}
        label = self.model.model.encode_adm(pooled_output=cond.pooled, device=x.device, **size)
        return label.to(x.device, x.dtype)


def _have(part: Any, name: str, what: str) -> Any:
    if part is None:
        raise ConceptSteerError(f"Connect a {name}: it is needed to {what}.")
    return part
