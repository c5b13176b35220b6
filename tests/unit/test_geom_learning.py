"""Learning to erase: what it changes, what it leaves alone, how it ends, and the files that others read."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_steer.errors import LearnError, SettingError
from concept_steer.geom_erasing import ErasingSettings, Examples, learn_erasing, lora
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from tests.unit.tiny_diffusers import tiny_sd

SHORT = ErasingSettings(bins=1, steps=6, batch=4)
BOX = [(0.0, 0.0, 0.5, 1.0)]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return DiffusersDenoiser(tiny_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Twelve pictures; the left half of eight of them is bright."""
    latents = 0.3 * torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[:8, :, :, :4] += 2.0
    return Examples(latents, [f"a cat {i}" for i in range(12)], [BOX] * 8 + [[]] * 4)


def weights(denoiser) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in denoiser.unet.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tokens_are_learned_that_tell_where_the_thing_is_and_the_model_stays_as_it_is(tmp_path, examples):
    pipe = tiny_sd(tmp_path / "pipe")
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_out" in name:  # random weights hardly listen to their text
            parameter.data.mul_(30)
    listening = DiffusersDenoiser(pipe)
    before = weights(listening)
    result = learn_erasing(
        listening, examples, "bar", settings=ErasingSettings(bins=1, steps=80, batch=8, rate=0.3, drop=0.0)
    )
    assert same(before, weights(listening))
    assert result.tokens is not None and result.lora is None
    assert result.tokens.name == "no-bar" and len(result.losses) == 80
    assert result.told < result.untold and result.gain > 0.01
    assert "negative prompt" in result.summary() and "next to nothing" not in result.summary()


def test_tokens_that_do_nothing_are_called_that(sd, examples):
    result = learn_erasing(sd, examples, "bar", settings=SHORT)
    assert abs(result.gain) < 0.01 or result.gain < 0
    assert "next to nothing" in result.summary()


def test_too_few_pictures_to_keep_some_aside_are_said_and_not_a_number(sd, examples):
    few = Examples(examples.latents, examples.captions, [BOX] * 4 + [[]] * 8)
    words = learn_erasing(sd, few, "bar", settings=SHORT).summary()
    assert "was not measured" in words and "nan" not in words


def test_a_lora_leaves_the_model_as_it_was_and_acts_while_it_is_worn(sd, examples):
    before = weights(sd)
    settings = ErasingSettings(bins=1, steps=10, batch=4, rank=2, lora_rate=1e-2)
    result = learn_erasing(sd, examples, "bar", settings=settings)
    assert result.lora and same(before, weights(sd))
    x, cond = torch.randn(1, 4, 8, 8), sd.encode_text(["a cat"])
    with torch.no_grad():
        plain = sd.predict(x, 500.0, cond)
        with lora.adapted(sd, 2, 0, result.lora):
            worn = sd.predict(x, 500.0, cond)
        assert not torch.allclose(plain, worn, atol=1e-4)
        assert torch.equal(sd.predict(x, 500.0, cond), plain)


def test_a_new_lora_changes_nothing(sd):
    x, cond = torch.randn(1, 4, 8, 8), sd.encode_text(["a cat"])
    with torch.no_grad(), lora.adapted(sd, 4):
        worn = sd.predict(x, 300.0, cond)
    with torch.no_grad():
        assert torch.allclose(worn, sd.predict(x, 300.0, cond), atol=1e-6)


def test_a_lora_is_learned_in_full_precision_on_a_model_in_half(tmp_path, examples):
    half = DiffusersDenoiser(tiny_sd(tmp_path / "pipe").to(torch.bfloat16))
    result = learn_erasing(half, examples, "bar", settings=ErasingSettings(bins=1, steps=2, batch=2, rank=2))
    assert {value.dtype for value in result.lora.values()} == {torch.float32}


def test_diffusers_reads_the_loras_file_and_predicts_the_same(tmp_path, examples):
    pipe = tiny_sd(tmp_path / "pipe", layers_per_block=2)  # as Stable Diffusion has it
    own = DiffusersDenoiser(pipe)
    settings = ErasingSettings(bins=1, steps=10, batch=4, rank=2, lora_rate=1e-2, way="masked")
    result = learn_erasing(own, examples, "bar", settings=settings)
    path = lora.save(result.lora, tmp_path / "own-lora.safetensors", {"concept": "bar"})
    again = lora.load(path, own)
    assert same({k: v.float() for k, v in result.lora.items()}, again)
    x, cond = torch.randn(1, 4, 8, 8), own.encode_text(["a cat"])
    with torch.no_grad():
        plain = own.predict(x, 500.0, cond)
        with lora.adapted(own, 2, 0, again):
            mine = own.predict(x, 500.0, cond)
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
        theirs = own.predict(x, 500.0, cond)
    assert torch.allclose(mine, theirs, atol=1e-4) and not torch.allclose(mine, plain, atol=1e-4)


def test_a_lora_is_called_by_ldms_names_where_hosts_cannot_count_with_diffusers_and_read_by_both(sd, tmp_path):
    """AUTOMATIC1111 takes two residual blocks a level for granted; this UNet has one, as the embedded model."""
    with lora.adapted(sd, 2):
        state = {name: torch.randn_like(value) for name, value in lora.state_of(sd).items()}
    path = lora.save(state, tmp_path / "own.safetensors", {})
    stored = load_file(path)
    assert "lora_unet_input_blocks_3_0_in_layers_2.lora_down.weight" in stored  # 2 is what halves the picture
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight" in stored
    assert same(lora.load(path, sd), state)
    older = {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".lora_")
        older[f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
    save_file(older, tmp_path / "older.safetensors")
    assert same(lora.load(tmp_path / "older.safetensors", sd), state)


def test_a_lora_of_another_model_is_refused(sd, tmp_path):
    state = {"elsewhere.lora_A.weight": torch.zeros(2, 4), "elsewhere.lora_B.weight": torch.zeros(4, 2)}
    path = lora.save(state, tmp_path / "other.safetensors", {})
    with pytest.raises(LearnError, match="another model"):
        lora.load(path, sd)
    with pytest.raises(LearnError, match="cannot be read"):
        lora.load(tmp_path / "missing.safetensors", sd)


def test_the_same_seed_learns_the_same_to_the_bit(sd, examples):
    one, two = (learn_erasing(sd, examples, "bar", settings=SHORT) for _ in range(2))
    assert one.losses == two.losses
    assert torch.equal(one.tokens.places["clip_l"], two.tokens.places["clip_l"])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(sd, examples, tmp_path, rank):
    settings = ErasingSettings(bins=1, steps=6, batch=4, rank=rank)
    whole = learn_erasing(sd, examples, "bar", settings=settings)
    path, asked = tmp_path / "run.checkpoint", []
    part = learn_erasing(
        sd, examples, "bar", settings=settings, checkpoint=path, stop=lambda: asked.append(1) or len(asked) > 3
    )
    assert len(part.losses) == 3 and "by request" in part.stopped and path.exists()
    rest = learn_erasing(sd, examples, "bar", settings=settings, checkpoint=path)
    assert rest.losses == whole.losses and not path.exists()
    assert torch.equal(rest.tokens.places["clip_l"], whole.tokens.places["clip_l"])
    assert rank == 0 or same(rest.lora, whole.lora)


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(sd, examples, tmp_path):
    path, asked = tmp_path / "run.checkpoint", []
    learn_erasing(sd, examples, "bar", settings=SHORT, checkpoint=path, stop=lambda: asked.append(1) or len(asked) > 2)
    with pytest.raises(LearnError, match="other settings"):
        learn_erasing(sd, examples, "thing", settings=SHORT, checkpoint=path)


def test_progress_tells_every_step_and_gives_the_tokens_so_far(sd, examples):
    seen = []
    learn_erasing(sd, examples, "bar", settings=SHORT, progress=lambda *told: seen.append((told[0], told[3]())))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert not torch.equal(seen[0][1].places["clip_l"], seen[-1][1].places["clip_l"])


def test_learning_works_inside_inference_mode(sd, examples):
    with torch.inference_mode():
        assert len(learn_erasing(sd, examples, "bar", settings=SHORT).losses) == 6


def test_masked_and_plain_training_know_no_tokens(sd, examples):
    for way in ("masked", "plain"):
        result = learn_erasing(sd, examples, "bar", settings=ErasingSettings(steps=2, batch=2, rank=2, way=way))
        assert result.tokens is None and result.lora and math.isnan(result.told)
        assert "LoRA" in result.summary()


def test_covered_cells_do_not_count_when_masked_and_count_alike_when_plain(examples):
    cells = examples.cells([0, 11])
    masked = ErasingSettings(rank=1, way="masked").weights(cells)
    assert not masked[0][:, :4].any() and bool((masked[0][:, 4:] == 1).all()) and bool((masked[1] == 1).all())
    assert bool((ErasingSettings(rank=1, way="plain").weights(cells) == 1).all())


def test_only_told_captions_name_the_thing():
    told, without = ErasingSettings(bins=1), ErasingSettings(bins=1, geometry=False)
    assert told.caption("a cat", "bar", BOX) == "a cat bar <bar-0>"
    assert without.caption("a cat", "bar", BOX) == "a cat bar"
    assert told.caption("a cat", "bar", []) == "a cat"
    assert ErasingSettings(rank=1, way="masked").caption("a cat", "bar", BOX) == "a cat"


def test_every_timestep_counts_the_same_unless_the_published_loss_is_asked_for(sd, examples):
    from contextlib import nullcontext

    from concept_steer.geom_erasing.descent import Tokens, Training

    for even in (True, False):
        s = ErasingSettings(bins=1, batch=4, even=even)
        run = Training(sd, Tokens(sd.text_reader(), "bar", "no-bar", s), examples, s, range(8), [], nullcontext)
        with torch.no_grad():
            usual = run.usual
        assert usual.shape == (1000,) and bool((usual > 0).all())
        assert bool((usual == 1).all()) is not even


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"rate": 0.0}, {"rank": 1000}, {"drop": 1.0}, {"alpha": 0.0}, {"bins": 20},
                {"way": "masked"}, {"way": "else", "rank": 1}],
)  # fmt: skip
def test_settings_out_of_their_range_are_refused(changes):
    with pytest.raises(SettingError):
        ErasingSettings(**changes)


def test_what_cannot_be_learned_from_is_said(sd, examples):
    clean = Examples(examples.latents, examples.captions, [BOX] * 3 + [[]] * 9)
    with pytest.raises(LearnError, match="in 3 of 12 pictures"):
        learn_erasing(sd, clean, "bar", settings=SHORT)
    with pytest.raises(LearnError, match="has no name"):
        learn_erasing(sd, examples, " ", settings=SHORT)
    with pytest.raises(LearnError, match="each"):
        Examples(examples.latents, ["a"], [])
    with pytest.raises(LearnError, match="finite"):
        Examples(torch.full((1, 4, 8, 8), math.nan), ["a"], [[]])
    with pytest.raises(LearnError, match="before its first step"):
        learn_erasing(sd, examples, "bar", settings=SHORT, stop=lambda: True)
    no_text = Components(sd.unet, sd.schedule, sd.encode_text)
    with pytest.raises(Exception, match="text encoders"):
        learn_erasing(DiffusersDenoiser(no_text), examples, "bar", settings=SHORT)


def test_a_model_that_gives_nan_is_an_error_and_not_an_embedding(tmp_path, examples):
    pipe = tiny_sd(tmp_path / "pipe")
    broken = copy.deepcopy(pipe.unet)
    broken.conv_out.bias.data.fill_(math.nan)
    pipe.unet = broken
    with pytest.raises(LearnError, match="NaN"):
        learn_erasing(DiffusersDenoiser(pipe), examples, "bar", settings=SHORT)
