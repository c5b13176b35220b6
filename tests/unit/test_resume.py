"""A run that was killed goes on to the very same vector; memory that runs out is told in words."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_learn import PAIRS
from test_learn import SMALL as SCORE
from test_learn_pictures import OTHERS, PICTURES, model
from test_learn_pictures import SMALL as FEW
from tiny_diffusers import tiny_denoiser

from concept_steer.errors import LearnError
from concept_steer.learn import learn_difference, learn_pictures, learn_score, learn_self_discovery
from concept_steer.learn.memory import out_of_memory

pytest.importorskip("diffusers")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def denoiser():
    return model()


def ways(denoiser):
    return {
        "score": partial(learn_score, denoiser, PAIRS, **{**SCORE, "steps": 20}, patience=99),
        "score in groups": partial(learn_score, denoiser, PAIRS, **SCORE, patience=99, timestep_groups=2, spatial=True),
        "pictures": partial(learn_pictures, denoiser, PICTURES, "a cat", **FEW),
        "contrast": partial(learn_pictures, denoiser, PICTURES, "a cat", without=OTHERS, **FEW),
        "self-discovery": partial(
            learn_self_discovery, denoiser, PAIRS, pictures=8, picture_steps=2, epochs=15, batch=4, rate=0.01
        ),
    }


WAYS = ["score", "score in groups", "pictures", "contrast", "self-discovery"]


def killed_at(step: int):
    def progress(done, *rest):
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_to_the_same_vector(way, denoiser, tmp_path):
    learn, file = ways(denoiser)[way], tmp_path / "v.checkpoint"
    whole = learn()
    middle = {"score": 11, "self-discovery": 28}.get(way, 7)
    with pytest.raises(Killed):
        learn(checkpoint=file, progress=killed_at(middle))
    assert file.exists()
    seen = []
    resumed = learn(checkpoint=file, progress=lambda step, *rest: seen.append(step))
    assert 1 < seen[0] <= middle  # not from the beginning
    assert torch.equal(resumed.vector.tensor, whole.vector.tensor)
    assert (resumed.losses, resumed.held_out) == (whole.losses, whole.held_out)
    assert (resumed.explained, resumed.separation) == (whole.explained, whole.separation)
    assert resumed.vector.info == whole.vector.info
    assert resumed.unet_rows > whole.unet_rows  # what was done twice is counted twice
    assert list(tmp_path.iterdir()) == []  # finished: gone


def test_a_checkpoint_changes_nothing_of_the_result(denoiser, tmp_path):
    learn = ways(denoiser)["score"]
    assert torch.equal(learn().vector.tensor, learn(checkpoint=tmp_path / "c").vector.tensor)


def test_a_run_killed_while_drawing_keeps_its_pictures(denoiser, tmp_path):
    learn, file = ways(denoiser)["self-discovery"], tmp_path / "v.checkpoint"
    whole = learn()

    def kill(done, total):
        if done == 3:  # two steps a batch, so in the second of two batches
            raise Killed

    with pytest.raises(Killed):
        learn(checkpoint=file, caching=kill)
    assert [path.name for path in tmp_path.iterdir()] == ["v.checkpoint.latents"]
    drawn = []
    resumed = learn(checkpoint=file, caching=lambda done, total: drawn.append(done))
    assert drawn == [3, 4]
    assert torch.equal(resumed.vector.tensor, whole.vector.tensor)


def test_a_run_that_was_stopped_goes_on_from_that_very_step(denoiser, tmp_path):
    learn, file, seen = ways(denoiser)["score"], tmp_path / "v.checkpoint", []
    stopped = learn(checkpoint=file, progress=lambda *a: seen.append(a), stop=lambda: len(seen) == 7)
    assert stopped.stopped.startswith("stopped by request after 7 of 20")
    assert file.exists()
    steps = []
    resumed = learn(checkpoint=file, progress=lambda step, *rest: steps.append(step))
    assert steps[0] == 8
    assert torch.equal(resumed.vector.tensor, learn().vector.tensor)


def test_a_checkpoint_of_other_settings_is_refused_and_says_which(denoiser, tmp_path):
    file = tmp_path / "v.checkpoint"
    learn = ways(denoiser)["score"]
    with pytest.raises(Killed):
        learn(checkpoint=file, progress=killed_at(5))
    before = file.read_bytes()
    with pytest.raises(LearnError, match=r"rate 0\.1 there and 0\.2 now.*delete the file"):
        learn(checkpoint=file, rate=0.2)
    with pytest.raises(LearnError, match='method "score" there and "self_discovery" now'):
        ways(denoiser)["self-discovery"](checkpoint=file)
    other = tiny_denoiser("mid only", seed=9)
    with pytest.raises(LearnError, match="checkpoint hash"):
        ways(other)["score"](checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"nonsense" * 9, b"\x80\x04pickle", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_checkpoint_is_named(denoiser, tmp_path, data):
    file = tmp_path / "v.checkpoint"
    file.write_bytes(data)
    with pytest.raises(LearnError, match=r"v\.checkpoint is damaged.*delete it"):
        ways(denoiser)["score"](checkpoint=file)


def no_memory(*args):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("way", ["score", "pictures", "self-discovery"])
def test_memory_that_runs_out_while_learning_keeps_the_best_so_far(way):
    own, hooks = model(), []

    def fill(step, *rest):
        if step == 6:

            def refuse(module, args):
                if torch.is_grad_enabled():
                    no_memory()

            hooks.append(own.unet.up_blocks[0].register_forward_pre_hook(refuse))

    result = ways(own)[way](progress=fill)
    assert len(result.losses) == 6
    assert result.stopped.startswith("stopped at step 7 of ") and "because memory ran out" in result.stopped
    assert "fewer rows" in result.stopped and bool(result.vector.tensor.any())


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_runs_out_before_that_is_an_error_with_advice(way):
    own = model()
    own.unet.mid_block.register_forward_pre_hook(no_memory)
    with pytest.raises(LearnError, match=r"not enough memory.*20\.00 GiB.*batch.*float16.*smaller pictures"):
        ways(own)[way]()
    with pytest.raises(LearnError, match="not enough memory"):
        learn_difference(own, PAIRS, seeds=2)


def test_other_errors_are_not_taken_for_lack_of_memory():
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
    own = model()

    def other(*args):
        raise RuntimeError("something else")

    own.unet.mid_block.register_forward_pre_hook(other)
    with pytest.raises(RuntimeError, match="something else"):
        ways(own)["score"]()
