"""Forge's denoiser without Forge: a tiny UNet of its layout and manners, and stand-ins for the host's modules."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from concept_steer.errors import LearnError
from concept_steer.hosts import webui_denoiser, webui_forge
from concept_steer.hosts.webui_forge import ForgeDenoiser, copied_norms
from concept_steer.learn import learn_score

WIDTH, TEXT = 8, 12


def timestep_embedding(timesteps, dim, max_period=10000, repeat_only=False):
    angles = timesteps[:, None] * torch.exp(-math.log(max_period) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """A convolution and a transformer's residual, which is added in place as Forge adds it."""

    def __init__(self, inside, outside, down=False, up=False):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, stride=2 if down else 1)
        self.emb, self.attn2 = nn.Linear(4 * WIDTH, outside), nn.Module()
        self.attn2.to_k = nn.Linear(TEXT, outside)
        self.norm, self.ff = nn.LayerNorm(outside), nn.Linear(outside, outside)
        self.up, self.use_checkpoint = up, False

    def forward(self, x, emb, context, transformer_options, output_shape=None):
        h = self.conv(x) + (self.emb(emb) + self.attn2.to_k(context.mean(1)))[:, :, None, None]
        rows = h.flatten(2).transpose(1, 2).contiguous()
        rows += self.ff(self.norm(rows))
        h = F.silu(rows.transpose(1, 2).reshape(h.shape))
        if self.up:
            h = F.interpolate(h, size=output_shape[2:], mode="nearest")
        return h


class IntegratedUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels, self.model_channels, self.channel_mult = 4, 4, WIDTH, (1, 2)
        self.num_classes = None
        self.time_embed = nn.Linear(WIDTH, 4 * WIDTH)
        wide = 2 * WIDTH
        self.input_blocks = nn.ModuleList([Block(4, WIDTH), Block(WIDTH, wide, down=True)])
        self.middle_block = Block(wide, wide)
        self.output_blocks = nn.ModuleList([Block(2 * wide, wide, up=True), Block(wide + WIDTH, WIDTH)])
        self.out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, x, timesteps=None, context=None, y=None, transformer_options=None):
        emb = self.time_embed(timestep_embedding(timesteps, WIDTH))
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context, transformer_options)
            skips.append(h)
        h = self.middle_block(h, emb, context, transformer_options)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, transformer_options, skips[-1].shape if skips else None)
        return self.out(h)


class Mean:
    """A VAE's distribution: `sample` would differ from call to call."""

    def __init__(self, moments):
        self.moments = moments

    def mode(self):
        return self.moments.chunk(2, dim=1)[0]


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 8, stride=8), nn.ConvTranspose2d(4, 3, 8, stride=8)

    def encode(self, pixels, regulation):
        return regulation(Mean(self.encoder(pixels)))

    def process_in(self, latents):
        return latents * 0.5


class Engine:
    """sd_model: Forge makes everything inside torch.inference_mode."""

    @torch.inference_mode()
    def __init__(self, prediction_type="epsilon", storage=torch.float32):
        torch.manual_seed(0)
        predictor = SimpleNamespace(prediction_type=prediction_type, alphas_cumprod=torch.linspace(0.999, 0.005, 1000))
        inner = SimpleNamespace(
            diffusion_model=IntegratedUNet(),
            predictor=predictor,
            computation_dtype=torch.float32,
            storage_dtype=storage,
        )
        vae = SimpleNamespace(patcher="vae", first_stage_model=Vae(), device="cpu", vae_dtype=torch.float32)
        unet = SimpleNamespace(model=inner, load_device="cpu")
        self.forge_objects = SimpleNamespace(unet=unet, vae=vae)
        self.words, self.skipped = nn.Embedding(256, TEXT), None

    def set_clip_skip(self, layers):
        self.skipped = layers

    @torch.inference_mode()
    def get_learned_conditioning(self, texts):
        return torch.stack([self.words(torch.tensor([ord(c) % 256 for c in text.ljust(16)[:16]])) for text in texts])

    @torch.inference_mode()
    def decode_first_stage(self, latents):
        return self.forge_objects.vae.first_stage_model.decoder(latents * 2)


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The web UI's modules; what its memory manager was asked to load."""
    asked = []
    modules = {
        "devices": SimpleNamespace(autocast=contextlib.nullcontext),
        "shared": SimpleNamespace(opts=SimpleNamespace(CLIP_stop_at_last_layers=2)),
        "prompt_parser": SimpleNamespace(SdConditioning=lambda texts, width, height: texts),
    }
    for module in (webui_denoiser, webui_forge):
        monkeypatch.setattr(module, "host", modules.__getitem__)
    monkeypatch.setattr(webui_forge, "_memory", lambda: SimpleNamespace(load_models_gpu=asked.append))
    return asked


def test_the_halves_are_forges_own_forward_and_clip_skip_is_the_settings():
    engine = Engine()
    denoiser = ForgeDenoiser(engine)
    x, cond = torch.randn(3, 4, 9, 9), denoiser.encode_text(["a", "bb", "ccc"])
    with torch.no_grad():
        halves = denoiser.from_h(denoiser.to_h(x, torch.tensor([0.0, 500.0, 999.0]), cond))
        whole = denoiser.predict(x, torch.tensor([0.0, 500.0, 999.0]), cond)
    assert torch.equal(halves, whole)
    assert engine.skipped == 2 and not cond.embeds.is_inference()
    assert (denoiser.family, denoiser.channels, denoiser.schedule.prediction_type) == (
        f"custom:{TEXT}x16",
        16,
        "epsilon",
    )


def test_learning_passes_gradients_through_weights_of_inference_mode_and_sums_in_place(loaded):
    denoiser = ForgeDenoiser(Engine(), size=64)
    result = learn_score(
        denoiser, [("a doctor", "a woman doctor")], steps=4, trajectories=4, sample_steps=2, map_below=0
    )
    assert result.vector.tensor.shape == (16,) and float(result.vector.tensor.abs().max()) > 0
    assert loaded[-1] == [denoiser.patcher]
    assert not any(norm._forward_pre_hooks for norm in denoiser.unet.modules() if isinstance(norm, nn.LayerNorm))


def test_a_sum_in_place_keeps_no_gradient_from_being_taken():
    block, x = Block(4, 4).eval(), torch.randn(1, 4, 8, 8)
    for norms in (contextlib.nullcontext(), copied_norms(block)):
        shift = torch.zeros(1, 4, 1, 1, requires_grad=True)
        with norms:
            loss = block(x + shift, torch.zeros(1, 4 * WIDTH), torch.zeros(1, 2, TEXT), {}).square().sum()
        if isinstance(norms, contextlib.nullcontext):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert float(shift.grad.abs().max()) > 0


def test_pictures_are_read_as_the_mean_and_can_take_part_in_gradients():
    engine = Engine()
    denoiser = ForgeDenoiser(engine)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = denoiser.encode_pictures(pixels)
    with torch.no_grad():
        mean = engine.forge_objects.vae.first_stage_model.encoder(pixels)[:, :4]
    assert torch.allclose(latents, mean * 0.5) and not latents.is_inference()
    drawn = denoiser.decode(latents)
    assert drawn.shape == pixels.shape and not drawn.is_inference()


def test_what_cannot_be_learned_on_is_refused_with_the_way_out():
    with pytest.raises(LearnError, match="Diffusion in Low Bits"):
        ForgeDenoiser(Engine(storage="nf4"))
    with pytest.raises(LearnError, match="choose an SD"):
        _ = ForgeDenoiser(Engine("const")).schedule
