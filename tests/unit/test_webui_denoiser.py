"""AUTOMATIC1111's denoiser without the web UI: a tiny UNet of ldm's layout, and stand-ins for the host's modules."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from concept_steer.denoiser import Conditioning, NoiseSchedule
from concept_steer.errors import ConceptSteerError, FamilyMismatch, LearnError
from concept_steer.hosts import webui_denoiser
from concept_steer.hosts.webui_denoiser import WebuiDenoiser, denoiser_of, family_of, no_checkpointing
from concept_steer.learn import learn_difference, learn_score
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

WIDTH, TEXT = 8, 12


def timestep_embedding(timesteps, dim, max_period=10000, repeat_only=False):
    angles = timesteps[:, None] * torch.exp(-math.log(max_period) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """A residual block with cross attention to the prompt's mean; `down` and `up` change the size."""

    def __init__(self, inside, outside, down=False, up=False):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, stride=2 if down else 1)
        self.emb, self.attn2 = nn.Linear(4 * WIDTH, outside), nn.Module()
        self.attn2.to_k = nn.Linear(TEXT, outside)
        self.up, self.use_checkpoint = up, True

    def forward(self, x, emb, context):
        h = self.conv(x) + (self.emb(emb) + self.attn2.to_k(context.mean(1)))[:, :, None, None]
        h = F.silu(h)
        return F.interpolate(h, scale_factor=2.0) if self.up else h


class UNetModel(nn.Module):
    """ldm's layout and forward, on two levels."""

    def __init__(self, in_channels=4, num_classes=None):
        super().__init__()
        self.in_channels, self.out_channels, self.model_channels, self.channel_mult = in_channels, 4, WIDTH, (1, 2)
        self.num_classes = num_classes
        self.time_embed = nn.Linear(WIDTH, 4 * WIDTH)
        if num_classes is not None:
            self.label_emb = nn.Linear(5, 4 * WIDTH)
        wide = 2 * WIDTH
        self.input_blocks = nn.ModuleList([Block(in_channels, WIDTH), Block(WIDTH, wide, down=True)])
        self.middle_block = Block(wide, wide)
        self.output_blocks = nn.ModuleList([Block(2 * wide, wide, up=True), Block(wide + WIDTH, WIDTH)])
        self.out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, x, timesteps=None, context=None, y=None):
        emb = self.time_embed(timestep_embedding(timesteps, WIDTH))
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:  # the web UI's own torch.cat does so
                h = F.interpolate(h, skip.shape[-2:], mode="nearest")
            h = block(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h)


class Model(nn.Module):
    """sd_model, as far as learning meets it."""

    def __init__(self, parameterization="eps", **unet):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = UNetModel(**unet)
        self.first_stage_model = nn.Module()
        self.first_stage_model.encoder = nn.Conv2d(3, 8, 8, stride=8)
        self.first_stage_model.quant_conv = nn.Conv2d(8, 8, 1)
        self.decoder = nn.ConvTranspose2d(4, 3, 8, stride=8)
        self.scale_factor, self.parameterization = 0.5, parameterization
        self.alphas_cumprod_original = torch.linspace(0.999, 0.005, 1000)
        self.alphas_cumprod = torch.zeros(1000)  # as a picture with zero terminal SNR leaves it
        self.words = nn.Embedding(256, TEXT)

    def get_learned_conditioning(self, texts):
        rows = [self.words(torch.tensor([ord(c) % 256 for c in text.ljust(16)[:16]])) for text in texts]
        embeds = torch.stack(rows)
        if self.model.diffusion_model.num_classes is None:
            return embeds
        return {"crossattn": embeds, "vector": embeds[:, 0, :5]}

    def decode_first_stage(self, latents):
        return self.decoder(latents / self.scale_factor)


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """The web UI's modules; its lowvram is off, and counts nothing."""
    plain = contextlib.nullcontext
    modules = {
        "devices": SimpleNamespace(
            device="cpu", dtype_unet=torch.float32, dtype_vae=torch.float32, autocast=plain, without_autocast=plain
        ),
        "lowvram": SimpleNamespace(is_enabled=lambda model: False),
        "sd_unet": SimpleNamespace(current_unet=None),
        "shared": SimpleNamespace(cmd_opts=SimpleNamespace(lowvram=False)),
        "prompt_parser": SimpleNamespace(SdConditioning=lambda texts, width, height: texts),
    }
    monkeypatch.setattr(webui_denoiser, "host", modules.__getitem__)
    return modules


def model(seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options)


def inputs(rows=3, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, size, size, generator=generator)


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("size", [8, 7])
def test_the_two_halves_are_the_unets_own_forward_bit_for_bit(classes, size):
    denoiser = WebuiDenoiser(model(num_classes=classes))
    x, cond = inputs(size=size), denoiser.encode_text(["a", "bb", "ccc"])
    with torch.no_grad():
        halves = denoiser.from_h(denoiser.to_h(x, torch.tensor([0.0, 500.0, 999.0]), cond))
        whole = denoiser.predict(x, torch.tensor([0.0, 500.0, 999.0]), cond)
    assert torch.equal(halves, whole)
    assert (denoiser.cost.encoder_rows, denoiser.cost.decoder_rows) == (6, 6)


def test_h_is_the_mid_blocks_output_and_a_steer_is_added_there():
    sd_model = model()
    denoiser = WebuiDenoiser(sd_model)
    x, cond = inputs(), denoiser.encode_text(["a"] * 3)
    seen = []
    sd_model.model.diffusion_model.middle_block.register_forward_hook(lambda m, args, out: seen.append(out))
    vector = ConceptVector(torch.ones(2 * WIDTH), denoiser.family, "v")
    with torch.no_grad():
        state = denoiser.to_h(x, 500.0, cond)
        steered = denoiser.predict(x, 500.0, cond, [Steer(vector, 2.0)])
        by_hand = denoiser.from_h(state.with_h(state.h + 2.0))
    assert torch.equal(state.h, seen[0])
    assert torch.allclose(steered, by_hand, atol=1e-6)
    with pytest.raises(FamilyMismatch):
        denoiser.predict(x, 500.0, cond, [Steer(ConceptVector(torch.ones(1280), "sd1", "other"))])


def test_the_family_and_the_schedule_come_from_the_model():
    denoiser = WebuiDenoiser(model(parameterization="v"), size=128)
    assert (denoiser.family, denoiser.channels, denoiser.latent_shape) == (f"custom:{TEXT}x16", 16, (4, 16, 16))
    assert isinstance(denoiser.schedule, NoiseSchedule) and denoiser.schedule.prediction_type == "v_prediction"
    assert float(denoiser.schedule.alphas_cumprod[0]) == pytest.approx(0.999)


def test_pictures_are_read_as_the_mean_and_drawn_back_by_the_models_own_vae():
    sd_model = model()
    denoiser = WebuiDenoiser(sd_model)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    once, again = denoiser.encode_pictures(pixels), denoiser.encode_pictures(pixels)
    vae = sd_model.first_stage_model
    with torch.no_grad():
        mean = vae.quant_conv(vae.encoder(pixels))[:, :4]
    assert torch.equal(once, again) and torch.allclose(once, mean * 0.5)
    assert denoiser.decode(once).shape == pixels.shape
    vae.quant_conv.weight.data.fill_(math.nan)
    with pytest.raises(LearnError, match="no-half-vae"):
        denoiser.encode_pictures(pixels)


def test_checkpointing_is_off_inside_frozen_and_on_again_after_an_error():
    sd_model = model()
    unet, denoiser = sd_model.model.diffusion_model, WebuiDenoiser(sd_model)
    with pytest.raises(RuntimeError), denoiser.frozen():
        assert not any(part.use_checkpoint for part in unet.modules() if isinstance(part, Block))
        assert not any(p.requires_grad for p in unet.parameters())
        raise RuntimeError
    assert all(part.use_checkpoint for part in unet.modules() if isinstance(part, Block))
    assert all(p.requires_grad for p in unet.parameters())
    with no_checkpointing(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("method", ["difference", "score"])
def test_learning_runs_on_it_and_leaves_the_weights_as_they_were(method):
    sd_model = model()
    before = {name: tensor.clone() for name, tensor in sd_model.state_dict().items()}
    denoiser = WebuiDenoiser(sd_model, size=64)
    pairs = [("a doctor", "a woman doctor")]
    if method == "difference":
        result = learn_difference(denoiser, pairs, seeds=2)
    else:
        result = learn_score(denoiser, pairs, steps=4, trajectories=4, sample_steps=2, map_below=0)
    assert result.vector.tensor.shape == (16,) and result.vector.family == denoiser.family
    assert len(result.vector.info["checkpoint_hash"]) == 64
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd_model.state_dict().items())


def test_what_cannot_be_learned_on_is_refused_with_the_way_out(host, monkeypatch):
    with pytest.raises(ConceptSteerError, match="inpainting"):
        WebuiDenoiser(model(in_channels=9))
    with pytest.raises(ConceptSteerError, match="choose an SD"):
        family_of(SimpleNamespace(model=None))
    with pytest.raises(LearnError, match="<lora:x:1>"):
        WebuiDenoiser(model()).encode_text(["a doctor <lora:x:1>"])
    with pytest.raises(LearnError, match="1,000 steps"):
        _ = WebuiDenoiser(model(parameterization="x0")).schedule
    with pytest.raises(ConceptSteerError, match="multiple of 8"):
        WebuiDenoiser(model(), size=100)
    host["sd_unet"].current_unet = object()
    with pytest.raises(LearnError, match="SD Unet"):
        WebuiDenoiser(model())
    host["sd_unet"].current_unet = None
    host["shared"].cmd_opts.lowvram = True
    with pytest.raises(LearnError, match="--medvram"):
        WebuiDenoiser(model())
    host["shared"].cmd_opts.lowvram = False
    assert type(denoiser_of(model())) is WebuiDenoiser
    monkeypatch.setattr(webui_denoiser.importlib.util, "find_spec", lambda name: {"modules_forge": object()}.get(name))
    with pytest.raises(LearnError, match="not there yet for reForge"):
        denoiser_of(model())


def test_medvram_brings_the_unet_back_to_the_device(host):
    moved = []
    host["lowvram"] = SimpleNamespace(
        is_enabled=lambda m: True, module_in_gpu=None, send_everything_to_cpu=lambda: moved.append("out")
    )
    sd_model = model()
    denoiser = WebuiDenoiser(sd_model)
    cond = Conditioning(torch.zeros(1, 4, TEXT))
    with torch.no_grad():
        denoiser.predict(inputs(1), 1.0, cond)
        denoiser.predict(inputs(1), 1.0, cond)
    assert moved == ["out"] and host["lowvram"].module_in_gpu is sd_model.model
