"""`concept-steer learn`: the published recipe, resuming, other concepts kept out, groups of timesteps."""

from __future__ import annotations

import pytest
from test_cli import PAIR, cats, checkpoint, library, misused, refused, run, woman  # noqa: F401 (fixtures too)

from concept_steer import learn
from concept_steer.vector import ConceptVector

TINY = ("--pictures-count", 2, "--picture-steps", 1, "--epochs", 2, "--no-preview")
SHORT = ("--steps", 20, "--trajectories", 4, "--no-preview", "--out", "v")


def test_the_published_recipe_from_prompts_and_from_pictures(checkpoint, library, cats, capsys):  # noqa: F811
    common = ("learn", "--checkpoint", checkpoint, "--method", "self-discovery")
    assert run(*common, *PAIR, *TINY, "--out", "woman", "--guidance", 2, "--negative", "a hat") == 0
    found = ConceptVector.load(library / "woman.safetensors")
    assert (found.tensor.shape, found.info["steps"], found.info["negative"]) == ((32, 2, 2), "2", "a hat")
    assert "learned by self_discovery" in capsys.readouterr().out
    flat = ("--no-spatial", "--epochs", 1, "--batch", 2, "--no-preview", "--name", "my cat")
    assert run(*common, "--pictures", cats, "--prompt", "a cat", *flat) == 0
    found = ConceptVector.load(library / "my cat.safetensors")
    assert (found.title, found.tensor.shape, found.info["pictures"], found.info["steps"]) == ("my cat", (32,), "4", "2")
    assert sorted(path.name for path in library.iterdir()) == ["my cat.safetensors", "woman.safetensors"]


def test_a_killed_run_is_mentioned_and_goes_on_with_resume(checkpoint, library, monkeypatch, capsys):  # noqa: F811
    args = ("learn", "--checkpoint", checkpoint, *PAIR, *SHORT)
    assert run(*args[:-1], "whole") == 0
    real = learn.learn_score

    def killed(*given, progress, **options):
        def at(step, *rest):
            if step == 7:
                raise ZeroDivisionError

        return real(*given, progress=at, **options)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(learn, "learn_score", killed)
        run(*args)
    left = library / "v.checkpoint"
    assert left.exists() and not (library / "v.safetensors").exists()
    message = refused(capsys, *args)
    assert "v.checkpoint is there" in message and "--resume" in message and "--overwrite" in message
    assert "other settings" in refused(capsys, *args, "--resume", "--seed", 3)
    assert run(*args, "--resume") == 0
    whole, resumed = (ConceptVector.load(library / f"{name}.safetensors") for name in ("whole", "v"))
    assert resumed == whole and not left.exists()
    left.write_bytes(b"old")
    assert run(*args, "--overwrite") == 0  # begins anew
    assert not left.exists()


def test_other_concepts_are_kept_out_and_timesteps_grouped(checkpoint, library, woman, tmp_path):  # noqa: F811
    file = tmp_path / "library" / "woman.safetensors"
    args = ("learn", "--checkpoint", checkpoint, *PAIR, "--no-preview")
    assert run(*args, "--method", "difference", "--orthogonal-to", "woman", "--out", "a") == 0
    assert abs(ConceptVector.load(library / "a.safetensors").cosine(woman)) < 1e-6
    both = ("--orthogonal-to", file, "--orthogonal-to", "a", "--timestep-groups", 2)
    assert run(*args, *both, "--steps", 2, "--trajectories", 4, "--out", "b") == 0
    found = ConceptVector.load(library / "b.safetensors")
    assert found.tensor.shape == (2, 32) and len(found.timesteps) == 2
    assert abs(ConceptVector(found.tensor[0], found.family).cosine(woman)) < 1e-5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--method", "difference", *PAIR, "--resume"), "--resume belongs to --method score or pictures"),
        (("--method", "difference", *PAIR, "--timestep-groups", 2), "--timestep-groups belongs to --method score"),
        ((*PAIR, "--epochs", 2), "--epochs belongs to --method self-discovery, not to score"),
        (("--method", "self-discovery", *PAIR, "--steps", 9), "--steps belongs to"),
        (("--method", "self-discovery", "--pictures", "f"), "needs --pictures FOLDER and --prompt TEXT"),
        (
            ("--method", "self-discovery", "--pictures", "f", "--prompt", "a", "--guidance", 2),
            "pictures that are drawn",
        ),
        (("--method", "self-discovery", "--pictures", "f", "--prompt", "a", "--without", "g"), "--without belongs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(args, said, capsys):
    assert said in misused(capsys, "learn", *args, "--out", "v")


def test_an_unknown_vector_to_be_orthogonal_to_is_named_before_the_model_is_loaded(woman, capsys):  # noqa: F811
    message = refused(capsys, "learn", "--checkpoint", "nowhere", *PAIR, "--orthogonal-to", "wamon", "--out", "v")
    assert "wamon" in message and "Did you mean woman?" in message
