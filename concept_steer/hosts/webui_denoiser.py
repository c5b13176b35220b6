"""The web UI's model as a Denoiser: learning on the UNet that is loaded there. Here AUTOMATIC1111's; see webui_forge.

Prompts are read as the web UI reads them (emphasis, embeddings, clip skip). The UNet (ldm: SD 1.x, 2.x; sgm: SDXL) runs
with its weights as loaded and the web UI's own attention; `learning` switches off the last picture's extra networks.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning, NoiseSchedule
from ..errors import ConceptSteerError, LearnError
from .ldm_unet import LdmDenoiser, RunBlock, text_width, unet_family
from .webui_text import WebuiText

TAG = re.compile(r"<\w+:[^>]*>")  # an extra network's


def family_of(sd_model: Any) -> tuple[str, int]:
    """(family key, channels of h) of the web UI's model; ConceptSteerError when it has no mid block to steer."""
    inner = _inner(sd_model)
    width = text_width(inner.diffusion_model) if isinstance(inner.diffusion_model, torch.nn.Module) else 0
    return unet_family(inner.diffusion_model, width, type(inner).__name__)


def denoiser_of(sd_model: Any, size: int | None = None) -> WebuiDenoiser:
    """A Denoiser on the web UI's model, whichever web UI it is. Errors: ConceptSteerError, see WebuiDenoiser."""
    if importlib.util.find_spec("modules_forge") is None:
        return WebuiDenoiser(sd_model, size)
    if importlib.util.find_spec("backend") is None:
        raise LearnError(
            "Learning on the web UI's own model is not there yet for reForge: learn in AUTOMATIC1111, Forge or "
            "ComfyUI, or with the command `concept-steer learn`. The vectors work here all the same."
        )
    from .webui_forge import ForgeDenoiser

    return ForgeDenoiser(sd_model, size)


def _inner(sd_model: Any) -> Any:
    """The module that holds the UNet as `diffusion_model`. Errors: ConceptSteerError."""
    objects = getattr(sd_model, "forge_objects", None)
    found = getattr(sd_model, "model", None) if objects is None else objects.unet.model
    if getattr(found, "diffusion_model", None) is None:
        raise ConceptSteerError(
            f"The web UI's model is a {type(sd_model).__name__} without a diffusion UNet (none loaded yet, or SD3?): "
            "choose an SD 1.x, SD 2.x or SDXL checkpoint first."
        )
    return found


class WebuiDenoiser(LdmDenoiser):
    """A Denoiser on `shared.sd_model`. size: of a picture's side in pixels. Use it inside `learning()`.

    Errors: ConceptSteerError for models and settings on which the halves of the UNet cannot be run, with the way out.
    """

    def __init__(self, sd_model: Any, size: int | None = None) -> None:
        family, channels = family_of(sd_model)
        super().__init__(_inner(sd_model).diffusion_model, family, channels, size)
        self.sd_model = sd_model
        self._reader: WebuiText | None = None
        self._check_host()

    @property
    def device(self) -> torch.device:
        return torch.device(host("devices").device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.copied else host("devices").dtype_unet

    @cached_property
    def schedule(self) -> NoiseSchedule:
        # the other attribute is changed for the time of a picture (zero terminal SNR, half precision)
        found = getattr(self.sd_model, "alphas_cumprod_original", None)
        alphas = self.sd_model.alphas_cumprod if found is None else found
        kinds = {"eps": "epsilon", "v": "v_prediction"}
        if self.sd_model.parameterization not in kinds or alphas.shape != (1000,):
            raise LearnError(
                f"This model predicts {self.sd_model.parameterization!r} on {alphas.numel()} steps; learning needs "
                "epsilon or v prediction on SD's 1,000 steps: choose an SD 1.x, SD 2.x or SDXL checkpoint."
            )
        return NoiseSchedule(alphas, kinds[self.sd_model.parameterization])

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """All prompts are padded to the longest one's multiple of 75 tokens, as the web UI does in a batch."""
        return self._read(plain(prompts))

    def text_reader(self) -> WebuiText:
        """The text encoders, for prompts with vectors of one's own and for gradients; one reader for all calls."""
        if getattr(host("shared").opts, "use_old_emphasis_implementation", False):
            raise LearnError("The old emphasis implementation (Settings > Compatibility) cannot learn: switch it off.")
        if self._reader is None:
            self._reader = WebuiText(self.sd_model, self._read)
        return self._reader

    def _read(self, prompts: Sequence[str]) -> Conditioning:
        _, height, width = self.latent_shape
        texts = host("prompt_parser").SdConditioning(list(prompts), width=width * 8, height=height * 8)
        with host("devices").autocast():
            found = self._conditioning(texts)
        embeds, pooled = (found["crossattn"], found["vector"]) if isinstance(found, dict) else (found, None)
        pooled = None if pooled is None else pooled.to(self.device)
        return Conditioning(embeds.to(self.device, self.dtype), pooled)

    def _conditioning(self, texts: Any) -> Any:
        """The web UI's own, which gradients pass."""
        return self.sd_model.get_learned_conditioning(texts)

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """The mean of the VAE's distribution: the web UI's own call draws from it, which no seed repeats."""
        devices, vae = host("devices"), self.sd_model.first_stage_model
        self._bring(vae)
        with devices.without_autocast():
            moments = vae.quant_conv(vae.encoder(pixels.to(self.device, devices.dtype_vae)))
        return finite(moments.chunk(2, dim=1)[0].float() * self.sd_model.scale_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        devices = host("devices")
        with devices.without_autocast():
            pixels = self.sd_model.decode_first_stage(latents.to(self.device, devices.dtype_vae))
        return finite(pixels.float())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with super().frozen(), no_checkpointing(self.unet):
            yield

    def _check_host(self) -> None:
        """ConceptSteerError when the web UI's settings keep the UNet's halves from being run."""
        if host("sd_unet").current_unet is not None:
            raise LearnError(
                "An accelerated UNet (Settings > SD Unet) stands in for the model's own, and cannot be learned on: "
                "set SD Unet to None, and back afterwards."
            )
        if host("shared").cmd_opts.lowvram:
            raise LearnError(
                "With --lowvram the UNet goes to the device piece by piece, which learning cannot follow: start the "
                "web UI with --medvram instead, or learn with smaller pictures on the CPU by `concept-steer learn`."
            )

    def _ready(self) -> None:
        if not self.copied:
            self._bring(self.sd_model.model)

    def _bring(self, module: Any) -> None:
        """--medvram keeps one part of the model on the device: let it be this one."""
        lowvram = host("lowvram")
        if lowvram.is_enabled(self.sd_model) and lowvram.module_in_gpu is not module:
            lowvram.send_everything_to_cpu()
            module.to(host("devices").device)
            lowvram.module_in_gpu = module

    def _time_embedding(self, times: Tensor) -> Tensor:
        # the class of the UNet's own forward: subclasses may live elsewhere
        layout = next(kind for kind in type(self.unet).__mro__ if kind.__name__ == "UNetModel")
        module = importlib.import_module(layout.__module__)
        return module.timestep_embedding(times, self.unet.model_channels, repeat_only=False)

    def _run_block(self, emb: Tensor, context: Tensor) -> RunBlock:
        return lambda block, h, place, shape: block(h, emb, context)

    def _running(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.copied else host("devices").autocast()

    def _label(self, x: Tensor, cond: Conditioning) -> Tensor:
        """SDXL's vector (pooled prompt and sizes) as the web UI's conditioner made it."""
        if cond.pooled is None:
            raise ConceptSteerError("This UNet needs the pooled prompt too: encode it with the same checkpoint.")
        return cond.pooled.to(x.device, x.dtype)

    def _whole(self, x: Tensor, times: Tensor, context: Tensor, label: Tensor | None) -> Tensor:
        return self.unet(x, times, context=context, y=label)


@contextmanager
def no_checkpointing(unet: torch.nn.Module) -> Iterator[None]:
    """Inside, no block drops its activations: ldm's way to compute them again cannot live with frozen weights."""
    switches = ("use_checkpoint", "checkpoint")  # of residual and of transformer blocks
    on = [(part, name) for part in unet.modules() for name in switches if getattr(part, name, None) is True]
    try:
        for part, name in on:
            setattr(part, name, False)
        yield
    finally:
        for part, name in on:
            setattr(part, name, True)


@contextmanager
def learning(size: int | None = None) -> Iterator[WebuiDenoiser]:
    """A Denoiser on the checkpoint that is chosen in the web UI, without extra networks. Hold the queue's lock.

    Errors: ConceptSteerError, see WebuiDenoiser.
    """
    shared, sd_models = host("shared"), host("sd_models")
    if hasattr(sd_models, "forge_model_reload"):
        sd_models.forge_model_reload()  # Forge loads the checkpoint when it is first needed
        shared.sd_model.forge_objects = shared.sd_model.forge_objects_original.shallow_copy()
    else:
        sd_models.reload_model_weights()  # a refiner or an override may have been left behind; else nothing to do
    bare = host("processing").StableDiffusionProcessingTxt2Img()
    host("extra_networks").activate(bare, {})  # LoRAs stay in the weights until the next picture says otherwise
    yield denoiser_of(shared.sd_model, size)


def plain(prompts: Sequence[str]) -> Sequence[str]:
    """The prompts themselves. Errors: LearnError when one calls an extra network."""
    for prompt in prompts:
        if tag := TAG.search(prompt):
            raise LearnError(f"Prompts to learn from are plain text: take out {tag[0]}.")
    return prompts


def finite(tensor: Tensor) -> Tensor:
    """What a VAE made. Errors: LearnError."""
    if not bool(torch.isfinite(tensor).all()):
        raise LearnError("The VAE gives values that are not finite (half precision?): use --no-half-vae.")
    return tensor


def host(name: str) -> Any:
    """A module of the web UI, when it is used: this file can be read without one."""
    return importlib.import_module(f"modules.{name}")
