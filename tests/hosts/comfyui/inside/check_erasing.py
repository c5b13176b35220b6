"""Erasing on ComfyUI's own classes: its text encoders with gradients, embeddings as files, LoRAs of its UNet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import check_families
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from bench import call, demo, different, raises, same, sample
from comfy.text_encoders import sd2_clip
from concept_steer_pack.concept_steer.denoiser import Conditioning
from concept_steer_pack.concept_steer.errors import LearnError
from concept_steer_pack.concept_steer.geom_erasing import lora
from concept_steer_pack.concept_steer.geom_erasing.embedding import LocationTokens
from concept_steer_pack.concept_steer.geom_erasing.learning import learn_erasing
from concept_steer_pack.concept_steer.geom_erasing.settings import ErasingSettings, Examples
from concept_steer_pack.concept_steer.geom_erasing.using import knowing
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.hosts.comfy_lora import with_lora
from concept_steer_pack.concept_steer.hosts.comfy_text import ComfyText

import nodes as comfy_nodes

PROMPTS = ["a doctor", "", "a pilot, watermark, sample " * 12]
BOX = (0.1, 0.4, 0.9, 0.6)
NEEDS_PEFT = "skipped: peft is not installed beside ComfyUI"


def _denoiser() -> ComfyDenoiser:
    return ComfyDenoiser(*demo())


def _tokens(reader: ComfyText, name: str, bins: int = 2) -> LocationTokens:
    """Random ones for this reader's encoders."""
    words = reader.vectors_of("watermark")
    generator = torch.Generator().manual_seed(3)
    places = {key: torch.randn(bins**2, rows.shape[1], generator=generator) * 0.05 for key, rows in words.items()}
    return LocationTokens(name, "watermark", bins, words, places)


def _saved(tokens: LocationTokens) -> Path:
    folder = Path(folder_paths.get_folder_paths("embeddings")[0])
    return tokens.save(folder / f"{tokens.name}.safetensors", overwrite=True)


def _examples(count: int = 8) -> Examples:
    latents = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return Examples(latents, ["a doctor"] * count, [[BOX] if i % 2 == 0 else [] for i in range(count)])


def _learned(steps: int = 3, **more: Any) -> Any:
    settings = ErasingSettings(steps=steps, batch=2, **more)
    return learn_erasing(_denoiser(), _examples(), "watermark", settings=settings)


# --- text


def prompts_are_read_as_the_stock_node_reads_them() -> str:
    reader, clip = ComfyText(demo()[1]), demo()[1]
    worst = 0.0
    for prompt in PROMPTS:
        tokens = clip.tokenize(prompt)
        wanted = clip.encode_from_tokens({key: rows[:1] for key, rows in tokens.items()})  # the first 75 tokens
        worst = max(worst, float((reader.encode([prompt], {}).embeds - wanted).abs().max()))
    together = reader.encode(PROMPTS, {}).embeds
    worst = max(worst, float((together[:1] - clip.encode_from_tokens(clip.tokenize(PROMPTS[0]))).abs().max()))
    assert worst < 1e-5, worst
    return f"max difference {worst:.2g}"


def the_embedding_file_means_in_the_stock_node_what_was_learned() -> str:
    reader, clip = ComfyText(demo()[1]), demo()[1]
    tokens = _tokens(reader, "no-mark-check")
    _saved(tokens)
    wanted = clip.encode_from_tokens(clip.tokenize("a doctor, embedding:no-mark-check"))
    found = reader.encode(["a doctor, no-mark-check"], tokens.vocabulary()).embeds
    worst = float((found - wanted).abs().max())
    assert worst < 1e-5, worst
    moved = different(found, clip.encode_from_tokens(clip.tokenize("a doctor,")))
    return f"off by {worst:.2g}; against the prompt without it: {moved}"


def gradients_pass_to_the_vectors_and_the_clip_stays_as_it_was() -> str:
    clip = demo()[1]
    before = {name: value.clone() for name, value in clip.cond_stage_model.state_dict().items()}
    reader = ComfyText(clip)
    with torch.inference_mode(False), torch.enable_grad():
        width = reader.vectors_of("a")["clip_l"].shape[1]
        rows = torch.randn(1, width, generator=torch.Generator().manual_seed(1)) * 0.05
        rows.requires_grad_(True)

        def loss() -> Any:
            return reader.encode(["a <here>"], {"<here>": {"clip_l": rows}}).embeds.square().sum()

        (slope,) = torch.autograd.grad(loss(), [rows])
        step = 1e-3 * slope / slope.norm()
        with torch.no_grad():
            rows += step
            up = loss()
            rows -= 2 * step
            down = loss()
        measured = float((up - down) / 2e-3)
    assert abs(measured / float(slope.norm()) - 1) < 0.05, (measured, float(slope.norm()))
    after = clip.cond_stage_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return f"slope {float(slope.norm()):.4g}, measured {measured:.4g}"


class _Target:
    """ComfyUI's way to name the classes of a text encoder."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS = {
    "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, ("clip_l", "clip_g")),
    "sd2": (sd2_clip.SD2ClipModel, sd2_clip.SD2Tokenizer, ("clip_l",)),
}


@contextmanager
def _clip(kind: str) -> Iterator[Any]:
    """ComfyUI's own text encoders of a family, small and with random weights."""
    model, tokenizer, _ = KINDS[kind]
    options = {f"clip_{name}_model_config": SMALL for name in "lgh"}
    folders = folder_paths.get_folder_paths("embeddings")
    made = comfy.sd.CLIP(_Target(model, tokenizer), embedding_directory=folders, model_options=options)
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.cond_stage_model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.1, generator=generator)
        elif weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    yield made


def _reads(kind: str) -> str:
    with _clip(kind) as clip:
        reader = ComfyText(clip)
        assert reader.encoders == KINDS[kind][2], reader.encoders
        tokens = _tokens(reader, f"no-mark-{kind}")
        _saved(tokens)
        wanted, pooled = clip.encode_from_tokens(clip.tokenize(f"a doctor, embedding:{tokens.name}"), True)
        found = reader.encode([f"a doctor, {tokens.name}"], tokens.vocabulary())
        worst = max(float((found.embeds - wanted).abs().max()), float((found.pooled - pooled).abs().max()))
        assert worst < 1e-5, worst
        plain = clip.encode_from_tokens(clip.tokenize("a doctor,"))
        return f"max difference {worst:.2g}; {different(wanted, plain)}"


def both_text_encoders_of_sdxl_read_an_embedding_alike() -> str:
    return _reads("sdxl")


def the_text_encoder_of_sd2_reads_an_embedding_alike() -> str:
    return _reads("sd2")


def the_layer_that_clip_skip_chose_is_the_one_that_is_read() -> str:
    clip = demo()[1].clone()
    clip.clip_layer(-2)
    wanted = clip.encode_from_tokens(clip.tokenize("a doctor"))
    same(ComfyText(clip).encode(["a doctor"], {}).embeds, wanted)
    return different(wanted, demo()[1].encode_from_tokens(demo()[1].tokenize("a doctor")))


def a_clip_of_another_kind_is_refused_by_its_encoders() -> str:
    class Other:
        def tokenize(self, text: str) -> dict[str, list[Any]]:
            return {"l": [], "t5xxl": []}

    return raises(LearnError, lambda: ComfyText(Other()), "t5xxl", "SDXL")


# --- learning


def tokens_are_learned_and_the_models_stay_as_they_were() -> str:
    model, clip = demo()[:2]
    before = sample(model)
    weights = {name: value.clone() for name, value in clip.cond_stage_model.state_dict().items()}
    result = _learned()
    assert result.tokens is not None and result.lora is None and len(result.losses) == 3
    after = clip.cond_stage_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    same(sample(model), before)
    known = knowing(_denoiser(), [result.tokens])
    with torch.inference_mode(False):
        moved = different(known.encode_text([result.tokens.name]).embeds, known.encode_text([""]).embeds)
    return f"{result.summary().splitlines()[0]} {moved}"


def _without_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return True
    return False


def a_lora_without_peft_says_what_to_install() -> str:
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "peft"}
    sys.modules["peft"] = None  # type: ignore[assignment]
    try:
        return raises(LearnError, lambda: _learned(rank=2), "needs peft", "pip install peft")
    finally:
        del sys.modules["peft"]
        sys.modules.update(hidden)


def a_lora_is_learned_and_the_stock_loader_puts_the_same_on_the_model() -> str:
    """What the trained copy predicts is what the host predicts with the file that was saved."""
    if _without_peft():
        return NEEDS_PEFT
    model = demo()[0]
    before = sample(model)
    result = _learned(rank=4, way="masked", lora_rate=0.02)
    assert result.tokens is None and result.lora
    same(sample(model), before)
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    lora.save(result.lora, folder / "no-mark-check.safetensors", {"concept": "watermark"}, overwrite=True)
    loaded = call(
        comfy_nodes.LoraLoaderModelOnly, model=model, lora_name="no-mark-check.safetensors", strength_model=1.0
    )
    moved = different(sample(loaded), before)
    same(sample(with_lora(model, result.lora)), sample(loaded))
    same(sample(model), before)
    denoiser, x = _denoiser(), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    cond = denoiser.encode_text(["a doctor", ""])
    plain = denoiser.predict(x, 500.0, cond)
    own = lora.load(folder / "no-mark-check.safetensors", denoiser)
    with torch.inference_mode(False), torch.no_grad(), lora.adapted(denoiser, 4, state=own):
        trained = denoiser.predict(x.clone(), 500.0, cond.plain())
    host = ComfyDenoiser(loaded, *demo()[1:]).predict(x, 500.0, cond)
    worst = float((trained - host).abs().max())
    assert worst < 1e-3 < float((host - plain).abs().max()), worst
    return f"{len(result.lora) // 2} layers, {moved}; the copy and the host differ by {worst:.2g}"


def every_layer_of_the_lora_has_diffusers_name() -> str:
    if _without_peft():
        return NEEDS_PEFT
    denoiser = _denoiser()
    names = denoiser.diffusers_names()
    assert len(set(names.values())) == len(names)
    _comfyui_calls_them_the_same(denoiser)
    with torch.inference_mode(False), torch.no_grad(), lora.adapted(denoiser, 2):
        found = {key.rpartition(".lora_")[0] for key in lora.state_of(denoiser)}
    wanted = {name for name in names.values() if name.endswith(lora.TARGETS)}
    assert found == wanted and any("conv1" in name for name in found) and any("attn2.to_k" in name for name in found)
    return f"{len(found)} layers"


def _comfyui_calls_them_the_same(denoiser: ComfyDenoiser) -> None:
    table = comfy.utils.unet_to_diffusers(denoiser.model.model.model_config.unet_config)
    weights = {name.removesuffix(".weight") for name in denoiser.unet.state_dict() if name.endswith(".weight")}
    theirs = {own.removesuffix(".weight"): name.removesuffix(".weight") for name, own in table.items()}
    theirs = {own: name for own, name in theirs.items() if own in weights and "label_emb" not in own}
    ours = {own: name for own, name in denoiser.diffusers_names().items() if own in weights}
    assert ours == theirs, set(ours.items()) ^ set(theirs.items())


def tokens_and_a_lora_are_learned_together() -> str:
    if _without_peft():
        return NEEDS_PEFT
    result = _learned(rank=2, lora_rate=0.02)
    assert result.tokens is not None and result.lora
    assert all(float(value.abs().max()) > 0 for name, value in result.lora.items() if "lora_B" in name)
    return result.summary().splitlines()[0]


ATTENTION: dict[str, Any] = {
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
}
UNETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "convolutions around attention, as SD 1.x": (
        comfy.supported_models.SD15,
        {"model_channels": 32, "context_dim": 64},
    ),
    "linear layers around attention, as SDXL": (
        comfy.supported_models.SDXL,
        {
            "model_channels": 64,
            "context_dim": 64,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        },
    ),
}


def the_layers_of_sd_and_sdxl_are_trained_and_loaded_alike() -> str:
    """Every weight of the LoRA gets a gradient, and the host with the LoRA predicts what the trained copy does."""
    if _without_peft():
        return NEEDS_PEFT
    told = []
    for name, (make, settings) in UNETS.items():
        model = check_families._patcher(make({**check_families.SMALL, **ATTENTION, **settings}), {})
        denoiser, clip = ComfyDenoiser(model, size=64), check_families.FakeClip(64)
        _comfyui_calls_them_the_same(denoiser)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        embeds, pooled = clip.encode_from_tokens("good", return_pooled=True)
        with torch.inference_mode(False), torch.no_grad():
            cond = Conditioning(embeds.clone(), pooled.clone() if denoiser.unet.num_classes else None)
            cond = Conditioning.cat([cond, cond])
            with lora.adapted(denoiser, 2):
                state = {key: torch.randn_like(value) * 0.2 for key, value in lora.state_of(denoiser).items()}
            with lora.adapted(denoiser, 2, state=state):
                trained = denoiser.predict(x.clone(), 500.0, cond)
                weights = [weight for weight in denoiser.unet.parameters() if weight.requires_grad]
                with torch.enable_grad():
                    loss = denoiser.predict(x.clone(), 500.0, cond).square().mean()
                slopes = torch.autograd.grad(loss, weights)
        assert len(weights) == len(state) and all(bool(slope.abs().max() > 0) for slope in slopes)
        plain = denoiser.predict(x, 500.0, cond)
        host = ComfyDenoiser(with_lora(model, state), size=64).predict(x, 500.0, cond)
        worst = float((trained - host).abs().max())
        assert worst < 1e-3 < float((host - plain).abs().max()), (name, worst)
        assert any(key.startswith("down_blocks.0.attentions.0.proj_in") for key in state)
        told.append(f"{name}: {len(state) // 2} layers, off by {worst:.2g}")
    return "; ".join(told)
