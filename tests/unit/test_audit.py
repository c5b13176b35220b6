"""The audit of a tiny model: the page, its files, its command line, and what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from tiny_diffusers import tiny_denoiser

from concept_steer.analysis.audit import AuditSettings, audit, fill_cache, observed_lean, readers, with_values
from concept_steer.analysis.audit_files import write_audit
from concept_steer.analysis.audit_page import page, summary_picture
from concept_steer.analysis.html import slug
from concept_steer.analysis.reading import Reader, ReadSettings
from concept_steer.analysis.word_list import parsed
from concept_steer.cli import main
from concept_steer.fairness import Attribute, Value
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
FAMILY = "custom:24x32"
SETTINGS = AuditSettings(
    ReadSettings(seeds=4), ReadSettings(seeds=4, moments=(0.2,), space="prediction", steps=2), 2, 2, steps=2
)
LIST = {
    "roles": ["woman cook", "man pilot", "cook", "house", "red <house> & co"],
    "attributes": {
        "gender": {"woman": "a woman {}", "man": "a man {}"},
        "age": {"young": "a young {}", "middle": "a middle {}", "old": "an old {}"},
    },
    "words": {"colours": ["{} in red", "{} in blue", "green"]},
}


class Tiny:
    """The tiny model with a decoder for pictures, which it has none of."""

    def __init__(self):
        self._model = tiny_denoiser("mid only")

    def __getattr__(self, name):
        return getattr(self._model, name)

    def decode(self, latents):
        return latents[:, :3].float()


class SaysMan:
    name = "a judge for tests"

    def values(self, attribute, values, pixels):
        return ["man"] * len(pixels) if attribute == "gender" else None


@pytest.fixture(scope="module")
def words():
    return parsed(LIST, "the test")


@pytest.fixture(scope="module")
def found(words):
    fix = {"method": "difference", "seeds": 2}
    return audit(Tiny(), words, settings=SETTINGS, name="tiny", judge=SaysMan(), fix=True, fix_options=fix)


class Outline(HTMLParser):
    """What a reader of the page meets."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.ids, self.links = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids.add(given.get("id"))
        if tag == "img":
            self.images.append(given)
        if tag in ("a", "link", "script", "img"):
            self.links += [given[key] for key in ("href", "src") if key in given]


def test_every_role_and_attribute_is_read_and_roles_named_after_a_value_lean_to_it(found, words):
    assert len(found.defaults) == len(words.roles) * 2
    lean = {one.role: one.lean[0] for one in found.of("gender")}
    assert lean["woman cook"] < lean["cook"] < lean["man pilot"]


def test_findings_have_pictures_and_the_observed_lean_where_something_judges(found):
    assert len(found.findings) == 2
    for finding in found.findings:
        assert finding.default.clear and len(finding.images) == 2
        assert (finding.observed is not None) == (finding.default.attribute == "gender")


def test_the_fix_is_read_with_every_value_equally_often(found):
    assert {fix.attribute.name for fix in found.fixes} <= {"gender", "age"} and found.fixes
    for fix in found.fixes:
        assert len(fix.changes) == 5


def test_the_observed_lean_of_pictures_is_their_mean_place():
    assert observed_lean(["man", "man", "woman", "man"], ("woman", "man"))[0] == 0.5
    value, low, high = observed_lean(["old", "young", "old", "old"], ("young", "middle", "old"))
    assert value == 0.5 and low < value < high + 1e-9


def test_vectors_in_turn_take_as_many_seeds_as_make_them_equal():
    vectors = [ConceptVector(torch.randn(32), FAMILY, label) for label in "abc"]
    attribute = Attribute("tone", {v.title: Value(v) for v in vectors})
    plain, steered = with_values(Reader(tiny_denoiser("mid only"), ReadSettings(seeds=8)), attribute)
    assert plain.settings.seeds == steered.settings.seeds == 9
    titles = [row[0].vector.title for row in steered.steers]
    assert [titles.count(label) for label in "abc"] == [3, 3, 3]


def test_the_page_needs_nothing_else_and_can_be_read_without_seeing(found):
    text = page(found)
    outline = Outline(text)
    assert not [link for link in outline.links if not link.startswith(("data:", "#"))]
    assert not re.search(r"https?://", text)
    assert outline.images and all(image.get("alt", "").strip() and image.get("width") for image in outline.images)
    anchors = [link[1:] for link in outline.links if link.startswith("#")]
    assert set(anchors) <= outline.ids and len(anchors) > 6
    assert '<html lang="en">' in text and outline.tags.count("h1") == 1 and "main" in outline.tags
    assert outline.tags.count("figcaption") == outline.tags.count("figure") and outline.tags.count("caption") >= 4
    assert "red <house>" not in text and "red &lt;house&gt; &amp; co" in text


def test_the_page_says_its_limits_and_shows_observed_beside_predicted(found):
    text = page(found)
    assert "How sure" not in text and "The intervals cover the choice of noise only" in text
    assert "Predicted:" in text and "Observed in 2 pictures: man 100%" in text


def test_the_files_of_an_audit_are_all_there_and_the_json_says_the_same(found, tmp_path):
    files = write_audit(found, tmp_path)
    assert files[-1].name == "index.html" and all(path.is_file() for path in files)
    told = json.loads((tmp_path / "audit.json").read_text())
    assert len(told["defaults"]) == len(found.defaults) and told["about"]["checkpoint"] == "tiny"
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).size[0] > 100
    assert (tmp_path / "gender.attribute.safetensors").exists()
    assert summary_picture(found).height > 200


def test_a_full_cache_gives_the_same_audit_for_any_number_of_processes(words, tmp_path):
    model = Tiny()
    quiet = AuditSettings(SETTINGS.defaults, SETTINGS.space, strongest=0)
    both = {}
    for processes in (1, 2):
        cache = tmp_path / str(processes)
        for rank in range(processes):
            fill_cache(readers(model, words, quiet, cache), words, rank=rank, processes=processes)
        before = model.cost.encoder_rows
        both[processes] = audit(model, words, settings=quiet, cache=cache).as_dict()
        assert model.cost.encoder_rows == before
    for one in both.values():
        one["about"].pop("seconds")
    assert both[1] == both[2]


def test_names_of_files_are_safe():
    assert slug("Skin tone / Über") == "skin-tone-ber" and slug("???") == "x"


# --- command line


def test_the_list_can_be_printed_and_given_back(capsys, tmp_path):
    assert main(["audit", "demo", "--print-words"]) == 0
    path = tmp_path / "words.json"
    path.write_text(capsys.readouterr().out)
    assert main(["audit", "other.safetensors", "--words", str(path), "--print-words"]) == 0
    assert json.loads(capsys.readouterr().out)["neutral"] == "a person"


@pytest.mark.parametrize(
    "given, said",
    [
        (["audit", "nowhere.safetensors"], "nowhere.safetensors"),
        (["audit", "demo", "--words", "missing.json"], "missing.json"),
        (["audit", "demo", "--judge", "no-folder"], "no-folder"),
        (["analyse", "defaults", "--role", "x" * 10_000], "10,0"),
        (["analyse", "map", "--pictures", "."], "no pictures"),
        (["analyse", "map", "--captions", "."], "no captions"),
        (["analyse", "name", "no-such-vector"], "no-such-vector"),
        (["analyse", "defaults", "--attribute", "hair"], "no attribute"),
    ],
)
def test_what_cannot_be_is_explained(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONCEPT_STEER_VECTORS", str(tmp_path))
    assert main(given) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_compare_wants_one_thing_to_compare_with():
    with pytest.raises(SystemExit) as left:
        main(["analyse", "compare"])
    assert left.value.code == 2


def test_every_analysis_of_the_embedded_model_writes_its_picture_and_json(tmp_path, capsys):
    few = ["--seeds", "2", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    words = ["--word", "a woman", "--word", "a man", "--word", "{} on a blue background"]
    prompts = [part for role in ("nurse", "doctor", "cook", "pilot", "wizard") for part in ("--prompt", f"a {role}")]
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (64, 64), colour).save(pictures / f"{colour}.png")
        (pictures / f"{colour}.txt").write_text(f"a {colour} thing")
    ConceptVector(torch.randn(192), "demo", "anything").save(tmp_path / "v.safetensors")
    assert main(["analyse", "defaults", "--role", "nurse", "--role", "pilot", "--attribute", "gender", *few]) == 0
    assert main(["analyse", "descriptors", "--concept", "a nurse", *words, *few]) == 0
    assert main(["analyse", "associations", *prompts, *words, *few]) == 0
    both = ["--pictures", str(pictures), "--captions", str(pictures)]
    assert main(["analyse", "map", *prompts, *both, *few]) == 0
    assert main(["analyse", "name", str(tmp_path / "v.safetensors"), *words, *few]) == 0
    steered = ["--vector", f"{tmp_path / 'v.safetensors'}:0.1", "--role", "nurse", "--attribute", "gender"]
    assert main(["analyse", "compare", *steered, *few]) == 0
    capsys.readouterr()
    for name in ("defaults", "descriptors", "associations", "map", "names", "compare"):
        assert json.loads((tmp_path / f"{name}.json").read_text())
        assert Image.open(tmp_path / f"{name}.png").width > 100
    places = {one["name"] for one in json.loads((tmp_path / "map.json").read_text())["places"]}
    assert {"a nurse", "red", "red.png"} <= places
    assert "<svg" in (tmp_path / "map.html").read_text()
