"""Training is seeded, resumable and says what went wrong; a few steps on made-up pictures show it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from concept_steer.demo import architecture, distributed, fast_norm, judges, tokenizer, train_judges, trainer, world
from concept_steer.demo.train_towers import train_towers
from concept_steer.demo.train_unet import train_unet
from concept_steer.demo.train_vae import train_vae


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Made-up data: 12 random pictures with captions, a tokenizer, latents and text states as the stages leave them."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    np.save(folder / "pictures.npy", rng.integers(0, 255, (12, 128, 128, 3), dtype=np.uint8))
    captions = [["a doctor", f"a picture of a doctor on a blue background {i}"] for i in range(12)]
    (folder / "captions.json").write_text(json.dumps(captions))
    vocabulary, merges = tokenizer.train([text for texts in captions for text in texts], 600)
    tokenizer.write(folder / "tokenizer", vocabulary, merges)
    np.save(folder / "latents.npy", rng.normal(size=(12, 8, 16, 16)).astype(np.float16) ** 2)
    (folder / "scale.json").write_text('{"scaling_factor": 0.5}')
    np.save(folder / "text.npy", rng.normal(size=(14, 77, 128)).astype(np.float16))
    return folder


def test_the_fast_group_norm_equals_torchs_forward_and_backward():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(8, 32)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    a = (torch.randn(3, 32, 9, 7) * 2 + 0.5).requires_grad_()
    b = a.detach().clone().requires_grad_()
    grad = torch.randn(3, 32, 9, 7)
    norm(a).backward(grad)
    expected = [a.grad, norm.weight.grad.clone(), norm.bias.grad.clone()]
    norm.zero_grad()
    module = fast_norm.speed_up(torch.nn.Sequential(norm))
    module(b).backward(grad)
    for want, got in zip(expected, [b.grad, norm.weight.grad, norm.bias.grad], strict=True):
        assert torch.allclose(want, got, atol=2e-5, rtol=1e-4)


def test_any_text_encodes_and_the_tokenizer_survives_its_files(work: Path):
    tokens = tokenizer.load(work / "tokenizer")
    ids = tokens("Zürich 漢字 ☕, 2024!")["input_ids"]
    assert ids[0] == tokens.bos_token_id and ids[-1] == tokens.eos_token_id
    assert tokens.unk_token_id not in ids[1:-1]


@pytest.mark.parametrize(
    ("stage", "more"), [("towers", {}), ("unet", {}), ("unet", {"layout": "sd", "skip_dropout": 0.5})]
)
def test_a_resumed_training_equals_one_that_was_never_stopped(stage: str, more: dict, work: Path, tmp_path: Path):
    worker = {"towers": train_towers, "unet": train_unet}[stage]
    for name in ("latents.npy", "scale.json", "text.npy"):
        (tmp_path / name).symlink_to(work / name)
    (tmp_path / "tokenizer").symlink_to(work / "tokenizer")
    job = trainer.Job(work, tmp_path, steps=4, batch=2, rate=1e-3, save_every=2, **more)
    torch.set_num_threads(1)
    worker(0, 1, job)
    whole = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
    (tmp_path / f"{stage}.pt").unlink()

    class Interrupted(Exception):
        pass

    original = trainer.average_gradients
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2 and another step
            raise Interrupted
        original(*args)

    trainer.average_gradients = interrupt
    try:
        with pytest.raises(Interrupted):
            worker(0, 1, job)
    finally:
        trainer.average_gradients = original
    worker(0, 1, job)
    resumed = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
    assert resumed["step"] == whole["step"] == 4
    for key, value in whole["ema"].items():
        assert torch.equal(value, resumed["ema"][key]), key


def test_the_decoder_can_be_trained_further_without_changing_any_latent(work: Path, tmp_path: Path):
    job = trainer.Job(work, tmp_path, steps=1, batch=1, rate=1e-3)
    train_vae(0, 1, job)
    before = torch.load(tmp_path / "vae.pt", weights_only=True)["ema"]
    train_vae(0, 1, replace(job, steps=2, freeze_encoder=True))
    after = torch.load(tmp_path / "vae.pt", weights_only=True)["ema"]
    encoder = [key for key in before if key.startswith(("encoder.", "quant_conv"))]
    assert encoder and all(torch.equal(before[key], after[key]) for key in encoder)
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("decoder."))


def test_a_loss_that_is_not_a_number_stops_training_and_names_the_last_checkpoint(tmp_path: Path):
    layer = torch.nn.Linear(1, 1)
    toy = trainer.Trainer("toy", layer, trainer.Job(tmp_path, tmp_path, 3, 1, 1e-3), 0, 1, ema=0.9)
    with pytest.raises(RuntimeError, match=r"toy: loss nan at step 0; last good: .*toy\.pt"):
        toy.run(lambda generator: (layer(torch.tensor([[float("nan")]])).sum(), {}))


def _gradient(rank: int, processes: int, folder: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), float(rank + 1))
    distributed.average_gradients([parameter], processes)
    torch.save(parameter.grad, Path(folder) / f"{rank}.pt")


def test_two_processes_average_their_gradients(tmp_path: Path):
    distributed.launch(_gradient, 2, str(tmp_path))
    assert all(torch.load(tmp_path / f"{rank}.pt").tolist() == [1.5, 1.5] for rank in (0, 1))


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    rates = [trainer.rate_at(step, 1000) for step in range(1000)]
    assert rates[0] < rates[100] < rates[199] and rates[300] == rates[599] == 1.0 and 0 < rates[999] < 0.01


def test_the_unet_lets_text_in_through_its_mid_block_only():
    unet = architecture.make_unet()
    crossing = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    assert crossing and all(name.startswith("mid_block.") for name in crossing)


def test_the_twin_lets_text_in_at_two_levels_too_and_starts_from_the_shipped_convolutions():
    from concept_steer.demo import model, train_unet

    unet = architecture.make_unet("sd")
    crossing = {name.split(".")[0] + name.split(".")[1] for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert crossing >= {"down_blocks1", "down_blocks2", "up_blocks0", "up_blocks1"} and "down_blocks0" not in crossing
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    train_unet.warm_start(unet)
    shipped = model.load().unet.state_dict()
    for key, value in unet.state_dict().items():
        assert torch.equal(value, before[key] if ".attentions." in key else shipped[key]), key


def test_skip_dropout_leaves_whole_pictures_skips_out_of_the_two_deepest_levels():
    from concept_steer.demo.train_unet import SkipDropout

    torch.manual_seed(0)
    unet = architecture.make_unet("sd").eval()
    dropout = SkipDropout(unet, 0.5)
    inputs = torch.randn(8, 4, 16, 16), torch.tensor([500] * 8), torch.randn(8, 77, 128)
    with torch.no_grad():
        before = unet(*inputs).sample
        dropout.draw(8, torch.Generator().manual_seed(0))
        after = unet(*inputs).sample
    same = (before == after).flatten(1).all(1)
    assert dropout.kept is not None and torch.equal(same, dropout.kept.flatten().bool()) and 0 < same.sum() < 8


def test_judges_never_train_on_what_they_are_tested_on():
    names = ("role", "gender", "tone", "expression", "face", "item", "set", "watermark")
    labels = {name: np.full(6, -1) for name in names}
    labels["role"][:2] = world.ROLE_NAMES.index("pilot"), world.ROLE_NAMES.index("doctor")
    labels["item"][2] = len(world.OBJECTS)
    labels["set"][2] = len(world.OBJECTS) % 3
    labels["watermark"][3] = 3
    hidden = train_judges.held_out(labels)
    assert hidden["people"].tolist() == [True, False, False, False, False, False]
    assert hidden["flags"][2] and hidden["flags"][3] and not hidden["flags"][4]


def test_a_verdict_counts_shares_and_agreement():
    one_hot = torch.eye(2)
    verdict = judges.Verdict({"gender": one_hot[[0, 0, 1, 1]]})
    other = judges.Verdict({"gender": one_hot[[0, 1, 1, 1]]})
    assert verdict.share("gender", "woman") == 0.5 and verdict.agreement(other, "gender") == 0.75
