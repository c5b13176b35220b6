"""Where one value per channel explains too little, `learn_score` learns a map by itself, and loses nothing doing so."""

from __future__ import annotations

import pytest
import torch
from test_learn import PAIRS, SMALL
from test_resume import Killed, killed_at
from tiny_diffusers import tiny_denoiser

from concept_steer.learn import learn_score
from concept_steer.learn.request import LearnRequest

pytest.importorskip("diffusers")
STEPS = 30
BATCH = 8
ALWAYS = {  # what a tiny random net explains is always below
    "steps": STEPS,
    "batch": BATCH,
    "trajectories": 24,
    "sample_steps": 2,
    "patience": 99,
    "start": "zero",
    "map_below": 1.0,
}


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser("mid only")


@pytest.fixture(scope="module")
def flat(denoiser):
    return learn_score(denoiser, PAIRS, **{**ALWAYS, "map_below": 0.0})


@pytest.fixture(scope="module")
def mapped(denoiser):
    return learn_score(denoiser, PAIRS, **ALWAYS)


def test_the_map_is_the_one_that_spatial_learns_and_explains_more(denoiser, flat, mapped):
    asked = learn_score(denoiser, PAIRS, **ALWAYS, spatial=True)
    assert torch.equal(mapped.vector.tensor, asked.vector.tensor)
    assert mapped.without_map == flat.explained < mapped.explained
    assert asked.without_map is None
    assert mapped.report()["without_map"] == mapped.without_map
    assert f"one value per channel reproduces only {flat.explained:.0%}" in mapped.summary()
    assert "as a map" in mapped.stopped


def test_its_trajectories_are_not_drawn_again(flat, mapped):
    assert mapped.backward_rows == 2 * flat.backward_rows
    assert mapped.unet_rows < 1.7 * flat.unet_rows  # the checks are paid for twice, the trajectories once


def test_a_map_that_explains_no_more_is_not_kept(denoiser):
    """So few trajectories are learned by heart sooner by a map."""
    few = {**SMALL, "patience": 99}
    alone, tried = (learn_score(denoiser, PAIRS, **{**few, "map_below": below}) for below in (0.0, 1.0))
    assert torch.equal(tried.vector.tensor, alone.vector.tensor)
    assert tried.without_map is None
    assert "a map was tried too" in tried.stopped and "explains no more" in tried.stopped
    assert "may reach more" not in tried.summary()


@pytest.mark.parametrize("below", [0.0, 0.1])
def test_a_vector_that_explains_enough_stays_one_value_per_channel(denoiser, flat, below):
    assert flat.explained > 0.1
    result = learn_score(denoiser, PAIRS, **{**ALWAYS, "map_below": below})
    assert torch.equal(result.vector.tensor, flat.vector.tensor)
    assert result.without_map is None
    assert result.backward_rows == flat.backward_rows


def test_progress_goes_on_counting(denoiser, mapped):
    seen = []
    learn_score(denoiser, PAIRS, **ALWAYS, progress=lambda *told: seen.append((*told[:2], told[3].tensor.ndim)))
    assert seen[: STEPS + 1] == [*((i + 1, STEPS, 1) for i in range(STEPS)), (STEPS + 1, 2 * STEPS, 3)]
    assert seen[-1] == (2 * STEPS, 2 * STEPS, 3)


@pytest.mark.parametrize("patience", [1, 99])
@pytest.mark.parametrize("killed", [7, STEPS + 1, STEPS + 7])
def test_a_run_killed_before_or_in_the_map_goes_on_to_the_same_vector(denoiser, tmp_path, killed, patience):
    settings = {**ALWAYS, "patience": patience, "rate": 0.5}
    whole = learn_score(denoiser, PAIRS, **settings)
    file = tmp_path / "v.checkpoint"
    with pytest.raises(Killed):
        learn_score(denoiser, PAIRS, **settings, checkpoint=file, progress=killed_at(min(killed, _told(whole))))
    resumed = learn_score(denoiser, PAIRS, **settings, checkpoint=file)
    assert torch.equal(resumed.vector.tensor, whole.vector.tensor)
    assert (resumed.held_out, resumed.without_map) == (whole.held_out, whole.without_map)
    assert resumed.stopped == whole.stopped
    assert list(tmp_path.iterdir()) == []


def _told(whole) -> int:
    """A step that the run comes to, though patience may end it early."""
    return max(2, whole.backward_rows // BATCH - 1)


@pytest.mark.parametrize("asked_at", [STEPS - 1, STEPS, STEPS + 3])
def test_interrupt_keeps_what_is_there(denoiser, flat, mapped, asked_at):
    seen = []
    result = learn_score(
        denoiser, PAIRS, **ALWAYS, progress=lambda *told: seen.append(told), stop=lambda: len(seen) >= asked_at
    )
    assert len(seen) == asked_at
    if asked_at == STEPS:
        assert torch.equal(result.vector.tensor, flat.vector.tensor)
    assert result.explained <= (mapped if asked_at > STEPS else flat).explained


def test_a_run_interrupted_before_the_map_goes_on_with_it(denoiser, flat, mapped, tmp_path):
    seen, file = [], tmp_path / "v.checkpoint"
    stopped = learn_score(
        denoiser,
        PAIRS,
        **ALWAYS,
        checkpoint=file,
        progress=lambda *told: seen.append(told),
        stop=lambda: len(seen) >= STEPS,
    )
    assert torch.equal(stopped.vector.tensor, flat.vector.tensor)
    assert "before a map was tried" in stopped.stopped and file.exists()
    assert torch.equal(learn_score(denoiser, PAIRS, **ALWAYS, checkpoint=file).vector.tensor, mapped.vector.tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_memory_is_too_small_for_costs_nothing_but_itself(denoiser, flat, monkeypatch):
    from concept_steer.learn import score

    real = score.descend

    def descend(problem, first, *rest, **options):
        if first.ndim == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(problem, first, *rest, **options)

    monkeypatch.setattr(score, "descend", descend)
    result = learn_score(denoiser, PAIRS, **ALWAYS)
    assert torch.equal(result.vector.tensor, flat.vector.tensor)
    assert "a map was tried too, and given up" in result.summary()


def test_every_face_learns_so_without_being_asked(denoiser, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "concept_steer.learn.request.learn_score", lambda *args, **options: given.update(options) or "learned"
    )
    LearnRequest(neutral="a face", positive="a smiling face").run(denoiser, caching=None, progress=None, stop=None)
    assert given["spatial"] is False and "map_below" not in given
