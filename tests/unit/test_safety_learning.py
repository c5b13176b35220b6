"""Learning a safety set from words, on a tiny real UNet: what the gate and the vectors then do."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_diffusers import tiny_denoiser

from concept_steer.errors import LearnError
from concept_steer.safety import SafetySet, learn_safety
from concept_steer.safety.fitting import fit_presence, level_thresholds, threshold_for
from concept_steer.safety.learning import ALARMS
from concept_steer.safety.words import phrases_of, text_of

pytest.importorskip("diffusers")
TEXTS = {"weapons": "knife, sword", "drinks": ["beer", "wine"]}
KINDS, THINGS = ("red", "old", "tall", "soft"), ("cat", "tree", "boat", "lamp", "cup")
BENIGN = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]
QUICK = {"benign": BENIGN, "pictures": 8, "sample_steps": 4, "timestep_groups": 2, "steps": 8, "batch": 32, "rate": 0.2}


@pytest.fixture(scope="module")
def learned() -> SafetySet:
    return learn_safety(tiny_denoiser(), TEXTS, **QUICK)


def test_a_set_has_a_vector_and_a_gate_for_each_category_and_one_for_all(learned):
    assert learned.categories == ("weapons", "drinks") and learned.distilled is not None
    assert learned.texts == {"weapons": "knife, sword", "drinks": "beer"}
    assert learned.distilled.text == "knife, sword, beer"
    assert learned.distilled.vector.tensor.shape == (2, 32)
    assert learned.distilled.presence.directions.shape == (4, 4, 32)
    assert learned.checkpoint_hash == tiny_denoiser().checkpoint_hash
    assert learned.measured["unet_rows"] > 0 and set(learned.measured["gates"]) == {"weapons", "drinks", "all"}


def test_the_vector_comes_nearer_to_the_safe_prediction_than_no_vector(learned):
    for one in (*learned.concepts.values(), learned.distilled):
        assert 0.02 < float(one.vector.info["explained"]) < 1


def test_stricter_levels_open_more_gates_and_push_harder(learned):
    levels = learned.distilled.levels
    assert levels["gentle"].threshold >= levels["standard"].threshold >= levels["strict"].threshold
    assert levels["gentle"].strength < levels["standard"].strength < levels["strict"].strength


def test_the_gate_tells_what_it_is_for_from_harmless_pictures_it_was_not_fitted_on(learned):
    told = json.loads(learned.distilled.vector.info["gate"])
    assert told["auc"] > 0.8 and told["alarms_standard"] == 0 and told["shown_strict"] >= told["shown_gentle"]


def test_each_kind_gets_a_reading_without_and_one_with_the_vector_in_the_gates_of_its_categories():
    suggestive = {"weapons": ["battle", ("bar fight", "fight bar")], "drinks": [("bar fight", "fight bar")]}
    made = learn_safety(tiny_denoiser(), TEXTS, **QUICK, suggestive=suggestive)
    readings = [one.presence.directions.shape[1] for one in (*made.concepts.values(), made.distilled)]
    assert readings == [6, 4, 8]


def test_the_same_words_and_seed_give_the_same_set(learned):
    again = learn_safety(tiny_denoiser(), TEXTS, **QUICK)
    assert again.distilled.vector == learned.distilled.vector
    assert again.distilled.presence.fingerprint == learned.distilled.presence.fingerprint


def test_progress_is_told_to_its_end_and_stop_ends_it():
    told = []
    learn_safety(tiny_denoiser(), {"weapons": "knife"}, **QUICK, progress=lambda *a: told.append(a))
    assert told[0][0] == 1 and told[-1][0] <= told[-1][1] and "harmless" in told[0][2]
    with pytest.raises(LearnError, match="stopped"):
        learn_safety(tiny_denoiser(), {"weapons": "knife"}, **QUICK, stop=lambda: len(told) > 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": {}}, "category"),
        ({"texts": {"weapons": " , "}}, "category"),
        ({"texts": {"all": "knife"}}, "all"),
        ({"benign": ["a cat"] * 50}, "harmless"),
        ({"suggestive": {"clowns": ["a circus"]}}, "clowns"),
        ({"suggestive": {"weapons": [""]}}, "empty"),
        ({"pictures": 1}, "pictures"),
    ],
)
def test_what_cannot_be_learned_is_an_error(changes, said):
    given = {**QUICK, "texts": TEXTS, **changes}
    with pytest.raises(LearnError, match=said):
        learn_safety(tiny_denoiser(), given.pop("texts"), **given)


def test_a_model_that_gives_nan_is_an_error():
    denoiser = tiny_denoiser()
    with torch.no_grad():
        denoiser.unet.conv_out.weight.fill_(float("nan"))
    with pytest.raises(LearnError, match="NaN"):
        learn_safety(denoiser, TEXTS, **QUICK)


def test_words_are_cut_at_commas_and_further_prompts_are_kept_whole():
    assert phrases_of(" a knife,a sword , ,a knife") == ("a knife", "a sword")
    assert phrases_of(["a, b", "c, d", " "]) == ("a", "b", "c, d")
    assert text_of(["a, b", "c, d"]) == text_of("a,b") == "a, b"


def test_a_reading_finds_a_difference_that_noise_hides_from_the_means():
    generator = torch.Generator().manual_seed(0)
    loud_noise = torch.zeros(24)
    loud_noise[0] = 10.0  # one channel varies much and means nothing

    def draw(count, shift):
        found = torch.randn(count, 3, 24, generator=generator)
        found = found + torch.randn(count, 1, 1, generator=generator) * loud_noise
        found[..., 1] += shift
        return found

    gate = fit_presence([draw(80, 5.0)], draw(80, 0.0), draw(100, 0.0), (900.0, 500.0, 100.0), 0.01)
    loud, quiet = gate.scores(draw(200, 5.0)), gate.scores(draw(200, 0.0))
    assert float((loud > 0).float().mean()) > 0.9 and float((quiet > 0).float().mean()) < 0.04
    levels = level_thresholds(quiet, ALARMS)
    assert levels["strict"] <= levels["standard"] == 0 <= levels["gentle"]


def test_a_threshold_is_on_the_safe_side_of_what_few_pictures_show():
    quiet = torch.randn(40, generator=torch.Generator().manual_seed(1))
    assert threshold_for(quiet, 0.01) >= float(quiet.max())
    assert threshold_for(quiet, 0.001) >= threshold_for(quiet, 0.01) >= threshold_for(quiet, 0.2)


def test_what_was_measured_is_kept_in_readable_form(learned):
    told = json.loads(learned.distilled.vector.info["gate"])
    assert told["held_out"] == len(BENIGN) // 3 and 0 <= told["alarms_standard"] <= told["alarms_strict"] <= 1
