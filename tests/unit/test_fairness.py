"""Fair sampling: who gets what, the gate, phrases, the file, and the report."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_diffusers import tiny_denoiser

from concept_steer.errors import ConceptSteerError, FamilyMismatch, LearnError, SettingError, VectorFileError
from concept_steer.fairness import (
    Action,
    Attribute,
    Target,
    Value,
    assign,
    chance_deviation,
    check_phrases,
    describe,
    find_phrases,
    interpolation_curve,
    learn_attribute,
    load_phrases,
    plan,
    report,
    steers,
    target_of,
    without_phrases,
)
from concept_steer.fairness.assignment import block_length, largest_remainder
from concept_steer.fairness.gate import Gate
from concept_steer.fairness.templates import fill, is_tail, named, occurs, phrase_of
from concept_steer.sampling import sample
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
FAMILY = "custom:24x32"
GENDER = {"woman": ("a woman {}", "a female {}"), "man": ("a man {}", "a male {}")}
ROLES = ("pilot", "cook", "judge", "singer", "guard", "elf")


def vector(seed: int, title: str) -> ConceptVector:
    tensor = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(tensor, FAMILY, title=title, info={"method": "made up"})


def attribute(name: str = "gender", labels=("woman", "man"), gate: Gate | None = None) -> Attribute:
    return Attribute(
        name, {label: Value(vector(i, label), (f"a {label} {{}}",)) for i, label in enumerate(labels)}, gate
    )


TONE = attribute("tone", ("light", "medium", "dark"))


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


@pytest.fixture(scope="module")
def learned(denoiser) -> Attribute:
    return learn_attribute(
        denoiser, "gender", GENDER, ROLES, method="difference", contexts=("a {}", "a photo of a {}"), seeds=2
    )


# --- who gets what


@pytest.mark.parametrize("mode", ["quota", "random"])
@pytest.mark.parametrize("split", [1, 3, 7])
def test_a_run_is_the_same_however_it_is_cut(mode, split):
    targets = [Target(attribute(), {"woman": 0.3, "man": 0.7}), Target(TONE)]
    whole = assign(targets, 40, seed=5, mode=mode)
    cut = [
        one
        for first in range(0, 40, split)
        for one in assign(targets, min(split, 40 - first), seed=5, mode=mode, first=first)
    ]
    assert cut == whole
    assert assign(targets, 40, seed=6, mode=mode) != whole


@pytest.mark.parametrize("seed", range(12))
def test_every_prefix_of_a_quota_run_is_within_one_picture_of_its_shares(seed):
    chance = torch.Generator().manual_seed(seed)
    labels = tuple("abcdefg"[: 2 + seed % 6])
    parts = torch.randint(1, 9, (len(labels),), generator=chance).tolist()
    shares = {label: part / sum(parts) for label, part in zip(labels, parts, strict=True)}
    run = [one["x"] for one in assign([Target(attribute("x", labels), shares)], 90, seed=seed)]
    for count in range(1, 91):
        seen = Counter(run[:count])
        assert max(abs(seen[label] - share * count) for label, share in shares.items()) < 1


def test_several_attributes_are_balanced_together_and_each_on_its_own():
    targets = [Target(attribute()), Target(TONE)]
    run = assign(targets, 60, seed=3)
    cells = Counter((one["gender"], one["tone"]) for one in run)
    assert set(cells.values()) == {10}
    for count in range(1, 61):
        for target in targets:
            seen = Counter(one[target.attribute.name] for one in run[:count])
            assert max(abs(seen[v] - s * count) for v, s in target.wanted.items()) < 1


def test_a_complete_block_is_the_largest_remainder_apportionment():
    shares = {"woman": 0.613, "man": 0.387}
    length = block_length((tuple(shares.values()),))
    seen = Counter(one["gender"] for one in assign([Target(attribute(), shares)], length, seed=1))
    assert [seen["woman"], seen["man"]] == largest_remainder(list(shares.values()), length)
    assert largest_remainder([0.5, 0.3, 0.2], 7) == [4, 2, 1]


def test_the_order_of_a_quota_run_looks_random():
    run = [one["gender"] for one in assign([Target(attribute())], 200, seed=0)]
    firsts = Counter(run[::2])
    assert 35 < firsts["woman"] < 65  # who comes first in a pair is a toss of a coin


def test_random_draws_have_the_shares_only_on_average():
    target = Target(attribute(), {"woman": 0.3, "man": 0.7})
    counts = [
        Counter(one["gender"] for one in assign([target], 100, seed=seed, mode="random"))["woman"] for seed in range(30)
    ]
    assert 27 < sum(counts) / 30 < 33 and len(set(counts)) > 5


def test_targets_are_read_and_wrong_ones_refused():
    assert dict(target_of(attribute(), "woman=0.75, man=.25").wanted) == {"woman": 0.75, "man": 0.25}
    assert dict(target_of(TONE).wanted) == pytest.approx(dict.fromkeys(TONE.labels, 1 / 3))
    for text, word in (
        ("woman=0.5", "sum to 0.5"),
        ("child=1", "no value"),
        ("woman:1", "woman=0.5,man=0.5"),
        ("woman=x,man=1", "not understood"),
    ):
        with pytest.raises(SettingError, match=word):
            target_of(attribute(), text)
    with pytest.raises(SettingError, match="once"):
        assign([Target(attribute()), Target(attribute())], 2)
    with pytest.raises(SettingError, match="mode"):
        assign([Target(attribute())], 2, mode="fair")  # type: ignore[arg-type]


def test_each_picture_gets_the_vectors_of_its_values():
    both = [attribute(), TONE]
    run = assign([Target(one) for one in both], 6, seed=0)
    for one, mine in zip(run, steers(run, both, strength=0.5), strict=True):
        assert [steer.vector.title for steer in mine] == [one["gender"], one["tone"]]
        assert {steer.strength for steer in mine} == {0.5}
    assert steers(run, []) == [[]] * 6


# --- words


def test_templates_are_filled_and_their_phrases_found():
    assert fill("a {}", "elf") == "an elf" and fill("a photo of a {}", "pilot") == "a photo of a pilot"
    assert phrase_of("a {} with dark skin") == "with dark skin" and is_tail("a {} with dark skin")
    assert phrase_of("a woman {}") == "woman" and not is_tail("a woman {}")
    assert named("a {} with dark skin", "a photo of a {}", "elf") == "a photo of an elf with dark skin"
    assert named("an old {}", "a {}", "cook") == "an old cook"
    assert (
        occurs("woman", "A  WOMAN, smiling")
        and not occurs("woman", "a policewoman")
        and not occurs("man", "a man-made lake")
    )


def test_phrases_are_found_at_word_borders_and_the_longest_wins():
    table = {
        "male or female": Action("fair", "gender"),
        "either male or female": Action("fair", "gender"),
        "no violence": Action("safe", "calm"),
    }
    prompt = "A doctor, Either Male or female, no  violence"
    found = find_phrases(prompt, table)
    assert [one.phrase for one in found] == ["Either Male or female", "no  violence"]
    assert [prompt[one.start : one.end] for one in found] == [one.phrase for one in found]
    assert without_phrases(prompt, found) == "A doctor"
    assert find_phrases("no violences, female or male", table) == []


def test_a_phrase_whose_vector_is_missing_is_an_error_that_names_it():
    found = find_phrases("a fight, no violence", load_phrases())
    with pytest.raises(ConceptSteerError, match=r"'no violence'.*there is none"):
        check_phrases(found, ["gender"], [])
    check_phrases(found, [], ["no violence"])


def test_the_shipped_phrases_are_right_and_wrong_tables_are_refused(tmp_path):
    shipped = load_phrases()
    assert {"either male or female", "of mixed ethnicity", "no violence", "no nudity"} <= set(shipped)
    for text, word in (
        ("[]", "object"),
        ("{", "not JSON"),
        ('{"no war": "calm"}', "no war"),
        ('{"no war": {"kind": "x"}}', "expected"),
    ):
        file = tmp_path / "phrases.json"
        file.write_text(text)
        with pytest.raises(SettingError, match=word):
            load_phrases(file)
    with pytest.raises(SettingError, match="check its name"):
        load_phrases(tmp_path / "none.json")


def test_the_phrase_table_is_part_of_the_package():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"concept_steer.fairness" = ["phrases.json"]' in text


# --- the gate and the file


def test_a_prompt_that_says_a_values_own_words_is_named_for_nothing(learned, denoiser):
    for prompt, label in (
        ("a woman pilot", "woman"),
        ("A Photo of a MALE singer", "man"),
        ("a female nobody", "woman"),
    ):
        decision = learned.decides(denoiser, prompt)
        assert (decision.named, decision.label, decision.score, decision.rows) == (True, label, 1.0, 0)
        assert label in decision.text()


def test_a_prompt_that_names_nothing_is_not_named_and_its_cost_is_told(learned, denoiser):
    before = denoiser.cost.encoder_rows
    decision = learned.decides(denoiser, "a wizard")
    assert not decision.named and decision.score <= decision.threshold
    assert 0 < decision.rows == denoiser.cost.encoder_rows - before <= 12


def test_the_gate_tells_how_it_did_on_roles_it_never_saw(learned):
    measured = learned.gate.measured
    assert measured["auc"] == 1 and measured["accuracy"] == 1 and measured["false_alarms"] == 0
    assert measured["neutral_prompts"] == 2 * 2 and measured["named_prompts"] == 4 * 2 * 2
    assert 0 <= measured["auc_unseen_words"] <= 1 and measured["unseen_word_prompts"] == 4 * 2 * 2


def test_a_word_that_the_model_takes_for_a_values_own_is_named():
    """A text encoder in which "lady" is nearly "woman": the gate was never told the word."""
    from tiny_diffusers import bag_of_words, schedule, tiny_unet

    from concept_steer.hosts.diffusers import Components, DiffusersDenoiser

    model = DiffusersDenoiser(
        Components(
            tiny_unet("mid only"),
            schedule(),
            lambda prompts: bag_of_words([p.replace("lady", "woman") for p in prompts]),
        )
    )
    once = {"woman": "a woman {}", "man": "a man {}"}
    found = learn_attribute(model, "gender", once, ROLES, method="difference", contexts=("a {}",), seeds=1)
    decision = found.decides(model, "a lady pilot")
    assert decision.named and (decision.label, decision.words) == ("woman", "lady") and decision.rows > 0


def test_a_file_gives_back_what_was_saved(learned, denoiser, tmp_path):
    path = learned.save(tmp_path / "gender.attribute.safetensors")
    again = Attribute.load(path)
    assert again.fingerprint == learned.fingerprint and again.labels == learned.labels
    assert dict(again.info) == dict(learned.info) and dict(again.gate.measured) == dict(learned.gate.measured)
    for label, value in learned.values.items():
        assert again.values[label].vector == value.vector and again.values[label].phrases == value.phrases
        assert dict(again.values[label].vector.info) == dict(value.vector.info)
    assert again.decides(denoiser, "a wizard") == learned.decides(denoiser, "a wizard")
    with pytest.raises(VectorFileError, match="exists already"):
        learned.save(path)
    assert Attribute.load(TONE.save(tmp_path / "tone.attribute.safetensors")).gate is None


def test_a_wrong_file_is_refused_by_name(learned, tmp_path):
    with pytest.raises(VectorFileError, match="must end in"):
        learned.save(tmp_path / "gender.safetensors")
    plain = vector(0, "woman").save(tmp_path / "x.attribute.safetensors")
    with pytest.raises(VectorFileError, match="not an attribute"):
        Attribute.load(plain)
    good = learned.save(tmp_path / "gender.attribute.safetensors").read_bytes()
    for spoiled in (
        good[: len(good) // 2],
        good.replace(b"value.1", b"value.9"),
        good.replace(b'gate\\"', b'gatf\\"'),
        b"PK" + good,
    ):
        file = tmp_path / "bad.attribute.safetensors"
        file.write_bytes(spoiled)
        with pytest.raises(VectorFileError, match=r"bad\.attribute"):
            Attribute.load(file)


def test_the_library_lists_vectors_and_no_attributes(learned, tmp_path):
    from concept_steer.library import Library

    learned.save(tmp_path / "gender.attribute.safetensors")
    vector(0, "woman").save(tmp_path / "woman.safetensors")
    assert [entry.name for entry in Library([tmp_path]).entries()] == ["woman"]


def test_an_attribute_needs_two_values_of_one_family_and_a_learnable_one_three_roles(denoiser):
    with pytest.raises(ConceptSteerError, match="two or more"):
        Attribute("gender", {"woman": Value(vector(0, "woman"))})
    other = ConceptVector(torch.ones(1280), "sd1")
    with pytest.raises(ConceptSteerError, match="different model families"):
        Attribute("gender", {"woman": Value(vector(0, "woman")), "man": Value(other)})
    with pytest.raises(LearnError, match="three or more roles"):
        learn_attribute(denoiser, "gender", GENDER, ("pilot", "cook"))
    with pytest.raises(SettingError, match="names nothing"):
        learn_attribute(denoiser, "gender", {"woman": "a woman", "man": "a man {}"}, ROLES)


# --- a run


def test_a_named_prompt_gets_no_steers_and_the_very_same_picture(learned, denoiser):
    made = plan(denoiser, "a woman pilot", [Target(learned)], 3, always=["gender"], seed=1)
    assert not made.acts and made.given(0) == {}
    prompts, seeds = ["a woman pilot"] * 3, [1, 2, 3]
    plain = sample(denoiser, prompts, seeds=seeds, steps=2)
    assert torch.equal(sample(denoiser, prompts, seeds=seeds, steps=2, steers=made.steers), plain)
    open_one = plan(denoiser, "a pilot", [Target(learned)], 3, always=["gender"], seed=1)
    assert not torch.equal(sample(denoiser, prompts, seeds=seeds, steps=2, steers=open_one.steers), plain)


def test_pictures_do_not_depend_on_the_batch(learned, denoiser):
    made = plan(denoiser, "a pilot", [Target(learned)], 5, always=["gender"])
    run = {"seeds": range(5), "steps": 2, "steers": made.steers}
    whole, parts = (sample(denoiser, ["a pilot"] * 5, batch=batch, **run) for batch in (5, 2))
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-3)


def test_a_phrase_switches_an_attribute_on_and_is_not_taken_for_a_value(learned, denoiser):
    table = load_phrases()
    prompt = "a wizard, either male or female"
    made = plan(denoiser, prompt, [Target(learned)], 4, always=[], table=table, strip=True)
    assert made.acts and made.drawn == "a wizard" and [one.phrase for one in made.found] == ["either male or female"]
    assert plan(denoiser, prompt, [Target(learned)], 4, always=[], table=table).drawn == prompt
    assert not plan(denoiser, "a wizard", [Target(learned)], 4, always=[], table=table).acts
    with pytest.raises(ConceptSteerError, match="needs the attribute 'gender'"):
        plan(denoiser, prompt, [], 4, always=[], table=table)


def test_a_safe_phrase_adds_its_vector_to_every_picture(learned, denoiser):
    calm = vector(7, "calm")
    made = plan(
        denoiser,
        "a wizard, no violence",
        [Target(learned)],
        2,
        always=["gender"],
        table=load_phrases(),
        vectors={"no violence": calm},
    )
    assert all([steer.vector for steer in own][1:] == [calm] for own in made.steers)


def test_an_attribute_of_another_family_is_refused(denoiser):
    wide = {label: Value(ConceptVector(torch.ones(1280), "sd1")) for label in ("woman", "man")}
    with pytest.raises(FamilyMismatch, match="learned on 'sd1'"):
        plan(denoiser, "a pilot", [Target(Attribute("gender", wide))], 2, always=["gender"])


# --- the report


def test_chance_alone_gives_the_deviation_of_the_formula():
    assert chance_deviation({"a": 0.5, "b": 0.5}, 30) == pytest.approx(math.sqrt(2 / (math.pi * 30)), abs=0.01)
    assert chance_deviation({"a": 1.0}, 10) == 0


def test_the_report_has_targets_assigned_and_observed_with_intervals():
    targets = [Target(attribute())]
    run = assign(targets, 8, seed=0)
    seen = {"gender": ["woman"] * 5 + ["man"] * 3}
    told = json.loads(json.dumps(report("a pilot", targets, run, mode="quota", seed=0, observed=seen)))
    about = told["attributes"]["gender"]
    assert about["assigned"] == {"woman": 4, "man": 4} and about["observed"]["counts"] == {"woman": 5, "man": 3}
    assert about["observed"]["delta"] == pytest.approx(0.25)
    low, high = about["observed"]["intervals"]["woman"]
    assert low < 5 / 8 < high
    text = describe(told)
    assert "N = 8, quota" in text and "by chance" in text and "woman 4 (50%)" in text
    with pytest.raises(ConceptSteerError, match="saw 1 pictures"):
        report("a pilot", targets, run, mode="quota", seed=0, observed={"gender": ["woman"]})


def test_an_interpolation_that_rises_has_rank_correlation_one():
    curve = interpolation_curve(
        lambda s: torch.full((4,), s[0].strength), lambda p: torch.sigmoid(p), vector(0, "woman")
    )
    assert curve["rank_correlation"] == pytest.approx(1) and len(curve["probabilities"]) == 6
