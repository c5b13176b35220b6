"""The embedded model's one-step student: how it is trained and kept, what it draws, and its noise optimised."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")

from PIL import Image

from concept_steer.cli import main
from concept_steer.cli.output import SETTINGS_KEY
from concept_steer.demo import latent_clip as embedded
from concept_steer.demo import model, noise_rewards, student, train_student
from concept_steer.demo.judges import Judges
from concept_steer.demo.trainer import Job
from concept_steer.errors import ConceptSteerError, SettingError
from concept_steer.hosts.diffusers import DiffusersDenoiser
from concept_steer.latent_clip import Descent, absence_reward, optimise_noise, score, text_reward
from concept_steer.sampling import sample

ROLES = ("firefighter", "wizard", "cook", "astronaut", "guard", "doctor")
PROMPTS = [f"a {gender} {role}" for role in ROLES for gender in ("woman", "man")]
SEEDS = list(range(900, 900 + len(PROMPTS)))
shipped = pytest.mark.skipif(not student.STUDENT_FILE.is_file(), reason="the student's weights are not there yet")


@pytest.fixture(scope="module")
def one_step():
    return student.denoiser()


@pytest.fixture(scope="module")
def clip():
    return embedded.load()


def judged(denoiser, steps: int, guidance: float = 1.0) -> int:
    """How many pictures show the role and the gender of their prompt."""
    latents = sample(denoiser, PROMPTS, seeds=SEEDS, steps=steps, guidance=guidance)
    verdict = Judges()(torch.cat([denoiser.decode(part) for part in latents.split(4)]))
    seen = [f"a {g} {r}" for g, r in zip(verdict.labels("gender"), verdict.labels("role"), strict=True)]
    return sum(a == b for a, b in zip(seen, PROMPTS, strict=True))


# --- training


@pytest.fixture
def small(monkeypatch):
    """A training of seconds: two pictures a round, two steps of the teacher."""
    monkeypatch.setattr(train_student, "ROUND", 2)
    monkeypatch.setattr(train_student, "TEACHER_STEPS", 2)
    monkeypatch.setattr(train_student, "UPDATES", 2)


def job(work, steps: int) -> Job:
    return Job(work, work, steps, 2, 1e-4, save_every=1, warmup=1)


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path / "student.pt", weights_only=True)["model"]


def test_training_is_seeded_and_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch):
    monkeypatch.setattr("concept_steer.demo.trainer.rate_at", lambda *given: 1.0)
    for name in ("whole", "parted"):
        (tmp_path / name).mkdir()
    train_student.train_student(job(tmp_path / "whole", 3))
    for steps in (1, 3):
        train_student.train_student(job(tmp_path / "parted", steps))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parted")
    start = model.load().unet.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(not torch.equal(one[key], start[key]) for key in one)
    assert len(list((tmp_path / "whole" / "runs").iterdir())) == 2


def test_what_is_kept_of_a_training_is_loaded_again(small, tmp_path):
    train_student.train_student(job(tmp_path, 1))
    made = student.load(student.pack(tmp_path / "student.pt", tmp_path / "out.safetensors"))
    stored = torch.load(tmp_path / "student.pt", weights_only=True)["ema"]
    for key, value in made.unet.state_dict().items():
        assert torch.equal(value, stored[key].half().float())


def test_captions_are_of_the_small_world_and_the_same_for_a_seed():
    one, other, third = (train_student.Captions(seed) for seed in (1, 1, 2))
    said = [one.caption() for _ in range(200)]
    assert said == [other.caption() for _ in range(200)] != [third.caption() for _ in range(200)]
    assert len(set(said)) > 150 and any("skin" in text for text in said)
    assert any(role in text for role in ROLES for text in said)


# --- the file


@shipped
def test_the_shipped_student_is_small_and_of_this_embedded_model():
    assert student.STUDENT_FILE.stat().st_size <= 20 * 2**20
    assert student.load().unet.config == model.load().unet.config


@shipped
def test_another_file_or_another_teacher_is_an_error_that_says_so(tmp_path, monkeypatch):
    with pytest.raises(ConceptSteerError, match="missing"):
        student.load(tmp_path / "none.safetensors")
    with pytest.raises(ConceptSteerError, match="not the student"):
        student.load(model.MODEL_FILE)
    monkeypatch.setattr(model, "file_hash", lambda: "other")
    with pytest.raises(ConceptSteerError, match="another embedded model"):
        student.load()


# --- what it draws


@shipped
def test_in_one_step_it_shows_what_the_prompt_says_more_often_than_its_teacher_does(one_step):
    teacher = DiffusersDenoiser(model.pipeline())
    mine, whole = judged(one_step, 1), judged(teacher, 1)
    assert mine >= 7 and mine > whole  # 8 and 6 of 12 when it was trained; two steps: 11


@shipped
def test_optimised_noise_raises_the_reward_and_stays_gaussian(one_step, clip):
    prompts, seeds = PROMPTS[:4], SEEDS[:4]
    settings = Descent(iterations=12, rate=Descent.rate_for(one_step.latent_shape))
    found = optimise_noise(one_step, prompts, [text_reward(clip, prompts)], seeds=seeds, settings=settings)
    assert (found.values >= found.before).all() and found.values.mean() > found.before.mean() + 0.005
    own = score(clip, found.latents, prompts).cosines.diagonal()
    torch.testing.assert_close(own, found.values, atol=1e-3, rtol=0)
    spread = found.spread()
    assert (spread["std"] - 1).abs().max() < 0.1 and spread["mean"].abs().max() < 0.1


@shipped
def test_a_judge_as_reward_finds_its_class_more_probable(one_step):
    prompts = ["a doctor", "a nurse"]
    reward = noise_rewards.judge_reward(Judges(), "gender", ["woman", "man"])
    settings = Descent(iterations=4, rate=1.25)
    found = optimise_noise(one_step, prompts, [reward], seeds=[1, 2], settings=settings)
    assert (found.values > found.before).all()


def test_a_judge_that_is_not_there_is_an_error_with_those_that_are():
    with pytest.raises(SettingError, match="gender, tone"):
        noise_rewards.judge_reward(Judges(), "mood", ["good"])
    with pytest.raises(SettingError, match="does not know robot"):
        noise_rewards.judge_reward(Judges(), "gender", ["robot"])


# --- rewards on latents


def test_rewards_on_latents_are_what_scoring_says(clip):
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["a doctor", "a nurse", "a cat"]
    reward = text_reward(clip, texts)
    torch.testing.assert_close(reward.of(latents, reward.targets), score(clip, latents, texts).cosines.diagonal())
    held = text_reward(clip, texts, against=["a dog"])
    for i, text in enumerate(texts):
        chance = score(clip, latents[i : i + 1], [text, "a dog"]).probabilities[0, 0].log()
        torch.testing.assert_close(held.of(latents, held.targets)[i], chance)
    found = absence_reward(clip, ["alcohol"]).of(latents)
    wanted = score(clip, latents, ["an image of no alcohol", "an image of alcohol"]).probabilities[:, 0].log()
    torch.testing.assert_close(found, wanted)


# --- the command


@shipped
def test_the_command_writes_pictures_before_and_after_with_their_settings(tmp_path, capsys):
    words = ["optimise", "--prompt", "a woman pilot", "--count", "2", "--seed", "7", "--iterations", "3"]
    words += ["--absent", "alcohol", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "7-before.png", "7-after.png", "7-after.safetensors", "8-before.png", "8-after.png", "8-after.safetensors",
        "sheet.png", "report.json",
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["seed"] for row in report["pictures"]] == [7, 8]
    assert all(row["after"] >= row["before"] for row in report["pictures"])
    settings = json.loads(Image.open(tmp_path / "out" / "7-after.png").text[SETTINGS_KEY])
    assert settings["optimised"] and settings["absent"] == ["alcohol"] and settings["descent"]["rate"] == 1.25
    assert main(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_the_command_refuses_to_run_without_a_reward(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["optimise", "--prompt", "a cat", "--text-weight", "0", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "--absent" in capsys.readouterr().err
