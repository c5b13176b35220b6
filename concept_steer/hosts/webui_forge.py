"""Forge's model as a Denoiser: its own UNet class, memory manager, text engines and VAE."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Conditioning, NoiseSchedule
from ..errors import LearnError
from .ldm_unet import RunBlock
from .webui_denoiser import WebuiDenoiser, finite, host
from .webui_text import whole_gradient

WHOLE = (torch.float32, torch.float16, torch.bfloat16)  # weights that are not quantised


class ForgeDenoiser(WebuiDenoiser):
    """A Denoiser on Forge's `shared.sd_model`; see WebuiDenoiser.

    Forge makes weights, prompts and pictures inside torch.inference_mode: what may take part in a gradient is copied.
    """

    @property
    def patcher(self) -> Any:
        return self.sd_model.forge_objects.unet

    @property
    def device(self) -> torch.device:
        return torch.device(self.patcher.load_device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.copied else self.patcher.model.computation_dtype

    @cached_property
    def schedule(self) -> NoiseSchedule:
        predictor = self.patcher.model.predictor
        alphas, kind = getattr(predictor, "alphas_cumprod", None), predictor.prediction_type
        if alphas is None or alphas.shape != (1000,) or kind not in ("epsilon", "v_prediction"):
            raise LearnError(
                f"This model predicts {kind!r} by {type(predictor).__name__}; learning needs epsilon or v prediction "
                "on SD's 1,000 steps: choose an SD 1.x, SD 2.x or SDXL checkpoint."
            )
        return NoiseSchedule(alphas.clone(), kind)

    def _read(self, prompts: Sequence[str]) -> Conditioning:
        self.sd_model.set_clip_skip(int(host("shared").opts.CLIP_stop_at_last_layers))
        found = super()._read(prompts)
        return Conditioning(found.embeds.clone(), None if found.pooled is None else found.pooled.clone())

    def _conditioning(self, texts: Any) -> Any:
        read = self.sd_model.get_learned_conditioning
        return whole_gradient(read)(texts) if torch.is_grad_enabled() else read(texts)

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """The mean of the VAE's distribution: Forge's own call draws from it, which no seed repeats."""
        vae = self.sd_model.forge_objects.vae
        _memory().load_models_gpu([vae.patcher])
        model = vae.first_stage_model
        latents = model.encode(pixels.to(vae.device, vae.vae_dtype), lambda distribution: distribution.mode())
        return finite(model.process_in(latents.float()).to(self.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return finite(self.sd_model.decode_first_stage(latents.float()).float().clone())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with super().frozen(), copied_norms(self.unet):
            yield

    @contextmanager
    def trainable(self) -> Iterator[Any]:
        with super().trainable() as unet:
            use_torch_linear(unet)
            with copied_norms(unet):
                yield unet

    def _check_host(self) -> None:
        stored = self.patcher.model.storage_dtype
        if stored not in WHOLE:
            raise LearnError(
                f"The UNet's weights are kept in low bits ({stored}), and cannot be learned on: choose Automatic as "
                "Diffusion in Low Bits at the top of the page, and set it back afterwards."
            )

    def _ready(self) -> None:
        if not self.copied:
            _memory().load_models_gpu([self.patcher])

    def _time_embedding(self, times: Tensor) -> Tensor:
        module = importlib.import_module(type(self.unet).__module__)
        return module.timestep_embedding(times, self.unet.model_channels, repeat_only=False)

    def _run_block(self, emb: Tensor, context: Tensor) -> RunBlock:
        options: dict[str, Any] = {"transformer_index": 0}

        def run(block: Any, h: Tensor, place: tuple[str, int], shape: Any) -> Tensor:
            options["block"] = place
            return block(h, emb, context, options, shape)

        return run

    def _running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _whole(self, x: Tensor, times: Tensor, context: Tensor, label: Tensor | None) -> Tensor:
        return self.unet(x, times, context=context, y=label, transformer_options={})


@contextmanager
def copied_norms(unet: nn.Module) -> Iterator[None]:
    """Inside, each layer norm reads a copy: Forge adds to its input in place, and a gradient needs it as it was."""
    norms = [part for part in unet.modules() if isinstance(part, nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda module, args: tuple(arg.clone() for arg in args)) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def use_torch_linear(unet: nn.Module) -> None:
    """Forge's linear layers, which are no nn.Linear and so known to no library, become such, with the same weights."""
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Linear" and not isinstance(child, nn.Linear):
                own: Any = child
                made = nn.Linear(own.weight.shape[1], own.weight.shape[0], own.bias is not None, device="meta")
                made.weight, made.bias = own.weight, own.bias
                setattr(parent, name, made)


def _memory() -> Any:
    return importlib.import_module("backend.memory_management")
