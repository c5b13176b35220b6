from __future__ import annotations

import pytest
import torch
from tiny_diffusers import tiny_denoiser

from concept_steer.denoiser import Cost

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from concept_steer.evaluate.methods import slider_module

TRIPLES = [("a pilot", "a woman pilot", "a man pilot")]
QUICK = {"steps": 12, "batch": 2, "picture_steps": 3, "rate": 5e-3}


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("sd")


def predictions(denoiser, prompt="a pilot"):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return denoiser.predict(x, 500, denoiser.encode_text([prompt]).expand(2))


@pytest.fixture(scope="module")
def learned(denoiser):
    before, losses = predictions(denoiser), []
    cost = denoiser.cost.snapshot()
    weights = slider_module().learn_slider(
        denoiser, TRIPLES, **QUICK, progress=lambda step, steps, loss, weights: losses.append(loss)
    )
    return before, weights, losses, denoiser.cost.since(cost)


def test_after_learning_the_model_is_as_it_was(denoiser, learned):
    assert torch.equal(predictions(denoiser), learned[0])
    assert not any("lora" in name for name, _ in denoiser.unet.named_parameters())


def test_a_new_lora_changes_nothing_and_a_learned_one_is_there_only_inside(denoiser, learned):
    before, weights, _, _ = learned
    adapted = slider_module().adapted
    with adapted(denoiser, 4, 0):
        assert torch.equal(predictions(denoiser), before)
    with adapted(denoiser, 4, 0, weights):
        inside = predictions(denoiser)
    assert not torch.equal(inside, before)
    assert torch.equal(predictions(denoiser), before)
    with adapted(denoiser, 4, 9, weights):
        assert torch.equal(predictions(denoiser), inside)


def test_it_moves_the_prediction_the_way_the_rich_prompt_does(denoiser, learned):
    before, weights, _, _ = learned
    with slider_module().adapted(denoiser, 4, 0, weights):
        change = predictions(denoiser) - before
    wanted = predictions(denoiser, "a woman pilot") - predictions(denoiser, "a man pilot")
    assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.2


def test_the_same_seed_gives_the_same_lora(denoiser, learned):
    again = slider_module().learn_slider(denoiser, TRIPLES, **QUICK)
    assert all(torch.equal(learned[1][name], again[name]) for name in again)


def test_every_row_is_counted_and_a_whole_backward_counts_as_two_halves(denoiser):
    cost = denoiser.cost.snapshot()
    slider_module().learn_slider(denoiser, TRIPLES, steps=3, batch=2, picture_steps=1, rate=1e-3)
    rows = 3 * 2 * (2 * 1 + 4)  # with one step a picture, each goes one step of two rows, and is compared with four
    assert denoiser.cost.since(cost) == Cost(rows, rows, 3 * 2 * 2)
