"""Reading prompts into h, and what is made of it: defaults, associations, maps, clusters, lists of words."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_diffusers import LAYOUTS, bag_of_words, schedule, text, tiny_denoiser, tiny_unet

from concept_steer import ConceptVector
from concept_steer.analysis import maps, reading
from concept_steer.analysis.associations import associations, descriptors
from concept_steer.analysis.audit import AuditSettings, audit, percent
from concept_steer.analysis.audit_files import fresh_folder
from concept_steer.analysis.defaults import compare, default_of, defaults, place_on_scale
from concept_steer.analysis.maps import cluster_labels, clusters, principal_map, silhouette
from concept_steer.analysis.reading import Reader, ReadSettings
from concept_steer.analysis.word_list import WordList, parsed, read_words, shipped, typed_words
from concept_steer.denoiser import Conditioning
from concept_steer.errors import ConceptSteerError, SettingError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.sampling import noise
from concept_steer.statistics import adjusted_rand
from concept_steer.steering import Steer

pytest.importorskip("diffusers")
FEW = ReadSettings(seeds=3)
FAMILY = "custom:24x32"
PROMPTS = ["a cook", "a pilot", "a red cook", "an old pilot", "a house"]


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


def words(**changes) -> WordList:
    given = {"roles": ["cook", "pilot"], "attributes": {"gender": {"woman": "a woman {}", "man": "a man {}"}}}
    return parsed({**given, **changes}, "the test")


# --- reading


def test_a_reading_is_the_mean_of_h_over_positions_from_each_seeds_noise(denoiser):
    h = Reader(denoiser, FEW).read(["a cook"])["a cook"]
    x = torch.stack([noise(seed, denoiser.latent_shape) for seed in range(3)])
    with torch.no_grad():
        expected = denoiser.to_h(x, 999.0, denoiser.encode_text(["a cook"]).expand(3)).h.mean((2, 3))
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)


def test_at_pure_noise_only_the_encoder_half_is_used_one_row_a_prompt_and_seed(denoiser):
    before = denoiser.cost.snapshot()
    Reader(denoiser, FEW).read([*PROMPTS, *PROMPTS])
    spent = denoiser.cost.since(before)
    assert (spent.encoder_rows, spent.decoder_rows) == (3 * len(PROMPTS), 0)


@pytest.mark.parametrize("space", ["mean", "map", "prediction"])
@pytest.mark.parametrize("path", ["shared", "one step"])
def test_every_space_and_path_gives_a_row_a_seed(denoiser, space, path):
    wide = {"mean": 32, "map": 32 * 4, "prediction": 4 * 64}[space]
    reader = Reader(denoiser, ReadSettings(seeds=2, moments=(0.2, 0.5), space=space, path=path, steps=2))
    assert reader.read(["a cook"])["a cook"].shape == (2, 2 * wide)


def test_the_batch_changes_nothing(denoiser):
    one, many = (Reader(denoiser, FEW, batch=batch).read(PROMPTS) for batch in (2, 64))
    for prompt in PROMPTS:
        torch.testing.assert_close(one[prompt], many[prompt], rtol=1e-4, atol=1e-5)


def test_what_was_read_is_not_read_again(denoiser, tmp_path):
    first = Reader(denoiser, FEW, cache=tmp_path).read(PROMPTS[:3])
    before = denoiser.cost.snapshot()
    again = Reader(denoiser, FEW, cache=tmp_path).read(PROMPTS[:3])
    assert denoiser.cost.since(before).encoder_rows == 0
    assert all(torch.equal(first[prompt], again[prompt]) for prompt in first)


@pytest.mark.parametrize(
    "changed", [{"seeds": 4}, {"moments": (0.5,)}, {"space": "map"}, {"first_seed": 1}, {"path": "one step"}]
)
def test_other_settings_have_readings_of_their_own(denoiser, changed):
    assert Reader(denoiser, FEW).key != Reader(denoiser, ReadSettings(**{"seeds": 3, **changed})).key


def test_another_model_has_readings_of_its_own(denoiser):
    assert Reader(denoiser, FEW).key != Reader(tiny_denoiser("mid only", seed=1), FEW).key


def test_a_damaged_reading_is_read_anew(denoiser, tmp_path):
    reader = Reader(denoiser, FEW, cache=tmp_path)
    first = reader.read(["a cook"])["a cook"]
    (path,) = tmp_path.rglob("*.npy")
    for damaged in (b"", path.read_bytes()[:200], b"no numbers"):
        path.write_bytes(damaged)
        torch.testing.assert_close(reader.read(["a cook"])["a cook"], first, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_goes_on_where_it_was(denoiser, tmp_path):
    asked = iter([False, False, True])
    reader = Reader(denoiser, FEW, cache=tmp_path, batch=3, stop=lambda: next(asked))
    with pytest.raises(KeyboardInterrupt):
        reader.read(PROMPTS)
    before = denoiser.cost.snapshot()
    Reader(denoiser, FEW, cache=tmp_path, batch=3).read(PROMPTS)
    assert denoiser.cost.since(before).encoder_rows == 3 * (len(PROMPTS) - 2)


def test_shares_of_several_processes_give_the_very_numbers_of_one(denoiser, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "TEXTS", 2)  # else the few prompts are all one process's
    alone = Reader(denoiser, FEW, batch=6).read(PROMPTS)
    together = Reader(denoiser, FEW, cache=tmp_path, batch=6)
    shares = [list(together.stream(PROMPTS, rank=rank, processes=2)) for rank in range(2)]
    assert all(shares)
    before = denoiser.cost.snapshot()
    found = together.read(PROMPTS)
    assert denoiser.cost.since(before).encoder_rows == 0
    assert all(torch.equal(found[prompt], alone[prompt]) for prompt in PROMPTS)


def test_steers_act_on_their_own_seeds(denoiser):
    vector = ConceptVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), FAMILY)
    steered = Reader(denoiser, FEW, steers=[[Steer(vector, 2.0)], [], [Steer(vector, -1.0)]])
    change = steered.read(["a cook"])["a cook"] - Reader(denoiser, FEW).read(["a cook"])["a cook"]
    for row, strength in zip(change, (2.0, 0.0, -1.0), strict=True):
        torch.testing.assert_close(row, strength * vector.tensor, rtol=1e-3, atol=1e-4)
    assert steered.key != Reader(denoiser, FEW).key


@pytest.mark.parametrize("prompts, said", [([], "no prompts"), (["a", " "], "empty"), (["x" * 10_000], "10,000")])
def test_prompts_that_cannot_be_are_refused(denoiser, prompts, said):
    with pytest.raises(SettingError, match=said):
        Reader(denoiser, FEW).read(prompts)


@pytest.mark.parametrize(
    "changed", [{"seeds": 0}, {"moments": ()}, {"moments": (0.5, 0.2)}, {"moments": (1.0,)}, {"space": "text"}]
)
def test_settings_that_cannot_be_are_refused(changed):
    with pytest.raises(SettingError):
        ReadSettings(**changed)


def test_a_model_that_gives_nan_is_refused():
    broken = tiny_denoiser("mid only")
    broken.unet.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(ConceptSteerError, match="NaN"):
        Reader(broken, FEW).read(["a cook"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout):
    def pooled(prompts):
        return Conditioning(bag_of_words(prompts).embeds, text(len(prompts), "sdxl").pooled)

    parts = Components(tiny_unet(layout), schedule("v_prediction"), pooled if layout == "sdxl" else bag_of_words)
    assert Reader(DiffusersDenoiser(parts), FEW).read(["a", "b"])["a"].shape == (3, 32)


# --- defaults


def test_the_values_themselves_stand_at_their_marks_and_a_mixture_at_its_mean():
    generator = torch.Generator().manual_seed(0)
    start, way = torch.randn(2, 1, 1, 40, generator=generator, dtype=torch.float64)
    values = start + torch.linspace(0, 1, 5, dtype=torch.float64)[None, :, None] * way
    for k, mark in enumerate([-1.0, -0.5, 0.0, 0.5, 1.0]):
        assert float(place_on_scale(values[:, k], values)) == pytest.approx(mark)
    mixed = 0.3 * values[:, 0] + 0.7 * values[:, 3]
    assert float(place_on_scale(mixed, values)) == pytest.approx(0.3 * -1 + 0.7 * 0.5)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_default_is_the_share_of_the_values_it_is_made_of(share):
    generator = torch.Generator().manual_seed(1)
    woman, man = torch.randn(2, 8, 30, generator=generator)
    found = default_of(share * woman + (1 - share) * man, {"woman": woman, "man": man}, "cook", "gender")
    assert found.lean[0] == pytest.approx(1 - 2 * share, abs=1e-3)
    assert found.clear == (share != 0.5)
    if share != 0.5:
        assert found.towards == ("woman" if share > 0.5 else "man")
        assert found.share[0] == pytest.approx(max(share, 1 - share), abs=1e-3)
        assert f"{max(share, 1 - share):.0%}" in found.text()


def test_more_than_two_values_are_a_scale_and_get_no_shares():
    generator = torch.Generator().manual_seed(1)
    light, dark = torch.randn(2, 8, 30, generator=generator)
    tones = {"light": light, "medium": (light + dark) / 2, "dark": dark}
    found = default_of(0.2 * light + 0.8 * dark, tones, "farmer", "tone")
    assert found.lean[0] == pytest.approx(0.6, abs=1e-3) and found.towards == "dark"
    assert "towards dark" in found.text() and "share" not in found.as_dict()


def test_a_noisy_even_default_is_not_called_clear():
    generator = torch.Generator().manual_seed(2)
    woman, man = torch.randn(2, 1, 30, generator=generator).expand(2, 8, 30)
    noises = torch.randn(8, 30, generator=generator)
    own = 0.45 * woman + 0.55 * man + noises - noises.mean(0)
    found = default_of(own, {"woman": woman, "man": man}, "cook", "gender")
    assert found.lean[1] < 0 < found.lean[2] and not found.clear
    assert "not told" in found.text()


def test_the_defaults_of_a_model_follow_its_words(denoiser):
    """The tiny model's prompts are bags of words, so a role named after a value leans to it."""
    listed = words(roles=["woman cook", "man cook", "cook"])
    found = {one.role: one for one in defaults(Reader(denoiser, ReadSettings(seeds=6)), listed)}
    assert found["woman cook"].lean[0] < found["cook"].lean[0] < found["man cook"].lean[0]
    json.dumps([one.as_dict() for one in found.values()])


def test_a_vector_that_adds_a_value_is_seen_as_a_change(denoiser):
    reader = Reader(denoiser, ReadSettings(seeds=6))
    h = reader.read(["a woman cook", "a man cook"])
    vector = ConceptVector((h["a woman cook"] - h["a man cook"]).mean(0), FAMILY)
    steered = Reader(denoiser, reader.settings, steers=[[Steer(vector)]] * 6)
    before = defaults(reader, words(), ["cook"])
    after = defaults(reader, words(), ["cook"], steered={"gender": steered})
    (change,) = compare(before, after)
    assert change.lean[0] == pytest.approx(-2, abs=0.05) and change.clear
    with pytest.raises(SettingError, match="in common"):
        compare(before, defaults(reader, words(), ["pilot"]))


def test_seeds_that_are_steered_alike_are_exchanged_only_among_themselves(denoiser):
    vectors = [ConceptVector(sign * torch.ones(32), FAMILY) for sign in (1, -1)]
    steers = [[Steer(vectors[i % 2], 1.0)] for i in range(4)]
    assert Reader(denoiser, ReadSettings(seeds=4), steers=steers).period == 2
    assert Reader(denoiser, ReadSettings(seeds=4), steers=[steers[0]] * 4).period == 1
    assert Reader(denoiser, ReadSettings(seeds=4), steers=[*steers[:3], []]).period == 4
    assert Reader(denoiser, ReadSettings(seeds=4)).period == 1
    woman, man = torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(0)).expand(2, 4, 30)
    half = torch.cat([woman[:1], man[:1]] * 2)
    apart = default_of(half, {"woman": woman, "man": man}, "cook", "gender", strata=2)
    mixed = default_of(half, {"woman": woman, "man": man}, "cook", "gender")
    assert apart.lean == pytest.approx((0, 0, 0), abs=1e-5) and mixed.lean[2] > 0.4


def test_an_attribute_that_is_not_there_is_refused(denoiser):
    with pytest.raises(SettingError, match="no attribute"):
        defaults(Reader(denoiser, FEW), words(), attributes=["age"])


# --- associations, maps, clusters


def test_a_word_is_nearest_to_what_holds_it():
    generator = torch.Generator().manual_seed(3)
    neutral, red, old, far = torch.randn(4, 6, 50, generator=generator)
    table = {"red": neutral + red, "old": neutral + old, "far": neutral + far}
    rows = {"red cook": neutral + red + 0.1 * old, "old cook": neutral + old, "far cook": neutral + far}
    found = associations(rows, table, neutral)
    assert [found.columns[i] for i in found.values.argmax(1).tolist()] == ["red", "old", "far"]
    assert bool(((found.low <= found.values) & (found.values <= found.high)).all())
    assert {(row.split()[0], column) for row, column, _ in found.strongest(3)} == {(w, w) for w in table}
    assert descriptors(rows["old cook"], table, neutral)[0][0] == "old"
    json.dumps(found.as_dict())
    with pytest.raises(SettingError):
        associations({}, table, neutral)


def test_a_map_keeps_what_lies_apart_apart():
    points = torch.zeros(6, 10)
    points[:3, 0], points[3:, 0] = 5, -5
    points += 0.1 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    places, share = principal_map(points)
    assert places.shape == (6, 2) and share[0] > 0.95
    assert len({bool(x > 0) for x in places[:3, 0]}) == 1 and bool(places[0, 0] * places[5, 0] < 0)
    torch.testing.assert_close(places, principal_map(points)[0])
    with pytest.raises(SettingError):
        principal_map(points[:2])


def test_a_umap_without_its_library_says_what_to_install_before_any_work(denoiser, monkeypatch):
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    before = denoiser.cost.snapshot()
    with pytest.raises(ConceptSteerError, match=r"pip install 'concept-steer\[umap\]'"):
        audit(denoiser, words(), settings=AuditSettings(map_method="umap"))
    assert denoiser.cost.since(before).unet_rows == 0
    with pytest.raises(ConceptSteerError, match="pca and umap"):
        maps.check_method("tsne")


def test_a_umap_has_a_place_for_every_prompt_and_keeps_what_lies_apart_apart():
    pytest.importorskip("umap")
    points = torch.eye(2, 8).repeat_interleave(12, 0) + 0.05 * torch.randn(24, 8, generator=torch.Generator())
    places = maps.umap_map(points, neighbours=5)
    assert places.shape == (24, 2) and torch.equal(places, maps.umap_map(points, neighbours=5))
    own, other = places[:12], places[12:]
    assert (own.mean(0) - other.mean(0)).norm() > max(part.std(0).norm() for part in (own, other))


def test_clusters_are_found_counted_and_named():
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(3, 40, generator=generator)
    points = centres.repeat_interleave(5, 0) + 0.2 * torch.randn(15, 40, generator=generator)
    truth = [i // 5 for i in range(15)]
    labels = cluster_labels(points)
    assert adjusted_rand(labels.tolist(), truth) == 1.0
    assert silhouette(torch.nn.functional.normalize(points.double(), dim=1), labels) > 0.5
    table = {f"word {i}": centres[i] for i in range(3)}
    found = clusters([f"{i // 5}" for i in range(15)], points, table)
    assert all({f"word {member}" for member in one.members} == {one.names[0][0]} for one in found)
    with pytest.raises(SettingError):
        cluster_labels(points, 16)


def test_the_adjusted_rand_index_is_one_for_the_same_parts_and_about_nothing_by_chance():
    assert adjusted_rand([0, 0, 1, 1], "bbaa") == 1.0
    assert adjusted_rand([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(5, (2, 500), generator=generator).tolist()
    assert abs(adjusted_rand(one, other)) < 0.03


# --- lists of words


def test_the_shipped_list_names_every_value_of_every_role():
    listed = shipped()
    assert len(listed.roles) == 40 and listed.prompt("auditor") == "an auditor"
    assert listed.named("CEO", "gender", "woman") == ("a woman CEO", "a female CEO")
    assert parsed(listed.as_dict(), "again") == listed
    assert len(listed.prompts()) == len(set(listed.prompts()))


def test_a_value_that_is_a_noun_stands_in_the_place_of_person():
    assert words().named("person with a veil", "gender", "woman") == ("a woman with a veil",)
    assert words().named("sad person", "gender", "man") == ("a sad man",)


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "no list of words"),
        ({"roles": []}, "empty"),
        ({"roles": "cook"}, "list of texts"),
        ({"roles": ["cook"]}, "no attributes"),
        ({"roles": ["cook"], "attributes": {"gender": {"woman": "a woman {}"}}}, "two or more"),
        ({"roles": ["cook"], "attributes": {"gender": {"woman": "a woman", "man": "a man {}"}}}, "names nothing"),
        ({"roles": ["cook"], "attribute": {}}, "'attribute'"),
        ({"roles": ["cook"], "attributes": {"g": {"a": "a b {}", "c": "a d {}"}}, "context": "a"}, "context"),
    ],
)
def test_a_list_that_cannot_be_is_explained(given, said):
    with pytest.raises(SettingError, match=said):
        parsed(given, "words.yaml")


@pytest.mark.parametrize(
    "text",
    [
        '{"roles": ["cook"], "attributes": {"g": {"a": "a {} a", "b": "a {} b"}}}',
        "roles: [cook]\nattributes:\n  g:\n    a: a {} a\n    b: a {} b\n",
    ],
    ids=["JSON", "YAML"],
)
def test_a_list_may_be_typed(text):
    pytest.importorskip("yaml")
    listed = typed_words(text)
    assert listed.roles == ("cook",) and listed.named("cook", "g", "b") == ("a cook b",)


@pytest.mark.parametrize(
    ("text", "said"),
    [("roles: [", "cannot be understood"), ('{"roles": [], "roles": []}', "given twice"), ("x", "no list")],
)
def test_a_typed_list_that_cannot_be_is_explained(text, said):
    pytest.importorskip("yaml")
    with pytest.raises(ConceptSteerError, match=said) as error:
        typed_words(text)
    assert str(error.value).startswith("The list of words")


def test_an_audits_progress_goes_on_and_never_reaches_the_end_before_it():
    told = [("defaults", 0, 9), ("defaults", 9, 9), ("associations", 1, 2), ("pictures", 3, 4), ("learning g", 1, 1)]
    told.append(("reading again", 46, 46))
    found = [percent(*one) for one in told]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 99


def test_every_audit_has_a_folder_of_its_own(tmp_path):
    found = [fresh_folder(tmp_path / "audits").name for _ in range(3)]
    assert found == ["001", "002", "003"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConceptSteerError, match="cannot be made"):
        fresh_folder(tmp_path / "file")


def test_a_list_is_read_from_a_file(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(shipped().as_dict()))
    assert read_words(path) == shipped()
    with pytest.raises(ConceptSteerError, match=r"words\.txt"):
        read_words(tmp_path / "words.txt")
