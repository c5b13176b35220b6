"""One request for every face that learns; what comes over a web API is checked field by field."""

from __future__ import annotations

import argparse
import base64
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from concept_steer.errors import LearnError, LibraryError, SettingError
from concept_steer.hosts.webui_learning import StateWatch, free_name
from concept_steer.hosts.webui_learning_api import asked
from concept_steer.hosts.webui_settings import enforced
from concept_steer.learn import request as requests
from concept_steer.learn.request import LearnRequest, pairs_of
from concept_steer.library import Library
from concept_steer.safety.settings import LEVELS, SafetySettings
from concept_steer.vector import ConceptVector

ROOT = Path(__file__).parents[2]
WOMAN = {"neutral": "a doctor", "positive": "a woman doctor"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"metod": "score"}, "metod"),
        ({"method": "magic"}, "magic"),
        ({"steps": "50"}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 5001}, "5000"),
        ({"examples": 1}, "examples"),
        ({"seed": -1}, "seed"),
        ({"size": 4096}, "size"),
        ({"neutral": ["a"]}, "neutral"),
        ({"spatial": 1}, "spatial"),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it(fields, word):
    with pytest.raises(SettingError, match=word):
        LearnRequest.of({**WOMAN, **fields})


def test_lines_are_paired_and_one_line_goes_with_all():
    assert pairs_of("a\n\nb", "c") == [("a", "c"), ("b", "c")]
    with pytest.raises(LearnError, match="2 neutral prompts and 3"):
        pairs_of("a\nb", "a\nb\nc")
    with pytest.raises(LearnError, match="Give both"):
        pairs_of(" \n", "a")


@pytest.mark.parametrize(
    ("request_", "function", "expected"),
    [
        (LearnRequest(**WOMAN, examples=8), "learn_score", {"steps": 50, "trajectories": 8}),
        (LearnRequest("difference", **WOMAN, seed=3), "learn_difference", {"seed": 3}),
        (
            LearnRequest("self-discovery", **WOMAN, steps=100, examples=80),
            "learn_self_discovery",
            {"pictures": 80, "epochs": 10, "batch": 8},
        ),
        (LearnRequest("pictures", prompt="a cat", spatial=True), "learn_pictures", {"steps": 100, "spatial": True}),
    ],
)
def test_each_method_gets_its_own_settings_and_no_others(monkeypatch, request_, function, expected):
    called = []
    for name in ("learn_score", "learn_difference", "learn_self_discovery", "learn_pictures"):
        monkeypatch.setattr(requests, name, lambda *a, _n=name, **k: called.append((_n, k)))
    request_.run(None, torch.zeros(1), caching=None, progress=None, stop=None)  # type: ignore[arg-type]
    ((name, options),) = called
    assert name == function and expected.items() <= options.items()


def test_pictures_are_needed_for_learning_from_pictures():
    with pytest.raises(LearnError, match="no pictures"):
        LearnRequest("pictures", prompt="a cat").run(None, caching=None, progress=None, stop=None)  # type: ignore[arg-type]


def test_the_api_takes_pictures_only_as_base64_and_never_a_path(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    picture = base64.b64encode((tmp_path / "own.png").read_bytes()).decode()
    body = {"method": "pictures", "prompt": "a cat", "pictures": [picture, f"data:image/png;base64,{picture}"]}
    request, options = asked({**body, "name": "cat"}, tmp_path)
    assert request.method == "pictures" and (options["name"], options["overwrite"]) == ("cat", False)
    assert [file.read_bytes() for file in options["pictures"]] == [(tmp_path / "own.png").read_bytes()] * 2
    for bad in ({"pictures": [str(tmp_path / "own.png")]}, {"pictures": picture}, {"name": 3}, {"overwrite": "yes"}):
        with pytest.raises(SettingError):
            asked({**body, **bad}, tmp_path)


def test_a_vector_is_named_before_any_work_and_a_taken_name_is_refused(tmp_path):
    library = Library([tmp_path])
    assert free_name(LearnRequest(**WOMAN), "", library, False) == "a woman doctor"
    assert free_name(LearnRequest(**WOMAN, title="women"), "", library, False) == "women"
    library.save(ConceptVector(torch.ones(192), "demo", "w"), "w")
    with pytest.raises(LibraryError, match="already"):
        free_name(LearnRequest(**WOMAN), "w", library, False)
    assert free_name(LearnRequest(**WOMAN), "w", library, True) == "w"
    for path in ("../w", "/tmp/w", "a/b"):
        with pytest.raises(LibraryError, match="path"):
            free_name(LearnRequest(**WOMAN), path, library, False)


def test_the_web_uis_state_shows_progress_and_its_button_ends_learning():
    shown = []
    state = SimpleNamespace(interrupted=False, stopping_generation=False, assign_current_image=shown.append)
    vector = ConceptVector(torch.ones(192), "demo", "w")
    watch = StateWatch(SimpleNamespace(sheet=lambda vector, words: words), state)  # type: ignore[arg-type]
    watch.caching(1, 2)
    assert (state.sampling_step, state.sampling_steps, state.job_count) == (20, 100, 1)
    for step in range(1, 5):
        watch.step(step, 4, 0.5, vector)
    assert state.sampling_step == 99 and "step 4 of 4" in state.textinfo and len(shown) == 4
    assert not watch.stop()
    state.interrupted = True
    assert watch.stop() and watch.interrupted
    state.interrupted = False
    assert watch.stop()  # once asked, it stays so


def test_the_lock_outranks_what_page_and_api_ask_for():
    for asked_for in (None, *(SafetySettings(level=level) for level in LEVELS)):  # type: ignore[arg-type]
        found = enforced(asked_for, "standard")
        assert LEVELS.index(found.level) >= LEVELS.index("standard")
    weak = SafetySettings(level="gentle", categories=("violence",), texts={"violence": "flowers"}, method="sld")
    found = enforced(weak, "strict")
    assert (found.level, found.categories, dict(found.texts), found.method) == ("strict", (), {}, "auto")
    assert enforced(weak, None) is weak and enforced(None, None).level == "off"


def test_the_flag_of_the_lock_takes_the_levels_there_are():
    parser = argparse.ArgumentParser()
    runpy.run_path(str(ROOT / "preload.py"))["preload"](parser)
    assert parser.parse_args([]).concept_steer_safety is None
    for level in LEVELS[1:]:
        assert parser.parse_args(["--concept-steer-safety", level]).concept_steer_safety == level
    with pytest.raises(SystemExit):
        parser.parse_args(["--concept-steer-safety", "off"])
