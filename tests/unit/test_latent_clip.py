"""What a latent CLIP is used for: scores, zero-shot classes, ranked seeds and search, on the embedded model's own."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from concept_steer.cli import main
from concept_steer.demo import latent_clip as embedded
from concept_steer.demo import model as demo_model
from concept_steer.errors import ConceptSteerError, FamilyMismatch, SettingError
from concept_steer.latent_clip import (
    PUBLISHED,
    SIMPLE,
    classify,
    index,
    order_latents,
    rank,
    read_latents,
    save_latents,
    score,
    score_noisy,
    search,
    space,
)
from concept_steer.latent_clip.search import Stated

DEMO = space("demo")
PROMPTS = ["a woman doctor", "a man firefighter"]


@pytest.fixture(scope="module")
def clip():
    return embedded.load()


@pytest.fixture(scope="module")
def denoiser():
    pytest.importorskip("diffusers")
    from concept_steer.hosts.diffusers import DiffusersDenoiser

    return DiffusersDenoiser(demo_model.pipeline())


@pytest.fixture(scope="module")
def drawn(denoiser):
    """Two pictures of each prompt and, of the first, noisy latents with their prediction: (latents, (x, eps, t))."""
    from concept_steer.sampling import sample, timesteps

    noisy = {}
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    settings = {"seeds": [11, 12, 13, 14], "steps": 8, "guidance": 4.0}
    latents = sample(denoiser, prompts, keep=lambda step, t, x: noisy.update({step: (x, t)}), **settings)
    x, t = noisy[5]
    assert t == timesteps(denoiser.schedule, 8)[5]
    with torch.no_grad():
        prediction = denoiser.predict(x, t, denoiser.encode_text(prompts))
    return latents, (x, prediction, t)


def noise(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


# --- the embedded model's own towers


def test_the_towers_give_what_transformers_own_give(clip, tmp_path):
    pytest.importorskip("transformers")
    from concept_steer.demo import architecture, convert

    state, about = demo_model.read()
    parts = convert.from_ldm(state, (), ())
    files = demo_model.write_tokenizer(about, tmp_path)
    towers = {"text": architecture.make_text_tower(files), "picture": architecture.make_picture_tower()}
    for name, tower in towers.items():
        tower.load_state_dict(parts[name], strict=False)  # old versions keep their positions in a buffer
        tower.float().eval()
    from concept_steer.demo import tokenizer

    ids = tokenizer.load(files)(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = torch.nn.functional.normalize(towers["text"](input_ids=ids).text_embeds, dim=-1)
        picture = torch.nn.functional.normalize(towers["picture"](pixel_values=noise()).image_embeds, dim=-1)
    assert torch.allclose(clip.encode_text(PROMPTS), text, atol=1e-5)
    assert torch.allclose(clip.encode_latents(noise()), picture, atol=1e-5)


def test_the_listed_scaling_is_that_of_the_models_file(clip):
    assert clip.space.scaling == pytest.approx(DEMO.scaling, rel=1e-4)
    assert clip.scale == pytest.approx(float(demo_model.read()[1]["demo.logit_scale"]), rel=1e-4)


# --- scores and classes


def test_a_generated_picture_fits_its_own_prompt_best(clip, drawn):
    scores = score(clip, drawn[0], PROMPTS)
    assert scores.best() == [prompt for prompt in PROMPTS for _ in range(2)]
    assert torch.allclose(scores.probabilities.sum(1), torch.ones(4))


def test_it_does_so_before_sampling_is_over(clip, denoiser, drawn):
    x, prediction, t = drawn[1]
    middle = score_noisy(clip, denoiser.schedule, x, prediction, t, PROMPTS)
    assert middle.best() == score(clip, drawn[0], PROMPTS).best()
    estimate = denoiser.schedule.to_x0(x, prediction, t)
    assert torch.equal(middle.cosines, score(clip, estimate, PROMPTS).cosines)


def test_batches_do_not_change_a_score(clip):
    whole, parts = (score(clip, noise(5), PROMPTS, batch=size).cosines for size in (64, 2))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_zero_shot_tells_the_roles_apart_with_templates(clip, drawn):
    found = classify(clip, drawn[0], ["a firefighter", "a doctor"], embedded.TEMPLATES)
    assert found.best() == ["a doctor", "a doctor", "a firefighter", "a firefighter"]


def test_a_class_is_the_mean_of_its_templates_and_their_order_is_nothing(clip):
    one = classify(clip, noise(), ["doctor", "pilot"], SIMPLE)
    other = classify(clip, noise(), ["doctor", "pilot"], SIMPLE[::-1])
    assert torch.allclose(one.cosines, other.cosines, atol=1e-6)
    mean = clip.encode_text([template.format("doctor") for template in SIMPLE]).mean(0)
    expected = clip.encode_latents(noise()) @ torch.nn.functional.normalize(mean, dim=0)
    assert torch.allclose(one.cosines[:, 0], expected, atol=1e-5)


def test_there_are_eighty_published_templates_and_each_names_the_class_once():
    assert len(set(PUBLISHED)) == 80 and set(SIMPLE) <= set(PUBLISHED)
    assert all(template.count("{}") == 1 for template in PUBLISHED)


@pytest.mark.parametrize("texts", [[], [""], "a doctor"])
def test_texts_are_a_list_of_something(clip, texts):
    with pytest.raises(ConceptSteerError, match="at least one text"):
        score(clip, noise(), texts)


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_its_place_is_refused(clip, template):
    with pytest.raises(ConceptSteerError, match="must hold"):
        classify(clip, noise(), ["doctor"], [template])


# --- ranking


def test_ranking_orders_seeds_by_their_score_and_decodes_nothing(clip, denoiser, monkeypatch):
    monkeypatch.setattr(type(denoiser), "decode", lambda *given: pytest.fail("decoded"))
    found = rank(denoiser, clip, "a pilot", [3, 4, 5], steps=2, guidance=1.0)
    assert sorted(found.seeds) == [3, 4, 5] and list(found.values) == sorted(found.values, reverse=True)
    again = score(clip, found.latents, ["a pilot"]).cosines[:, 0]
    assert again.tolist() == pytest.approx(list(found.values), abs=1e-6)
    alone = rank(denoiser, clip, "a pilot", [found.seeds[0]], steps=2, guidance=1.0)
    assert torch.allclose(alone.latents[0], found.latents[0], atol=1e-3)


def test_texts_to_avoid_turn_the_order(clip, drawn):
    named = range(4)
    plain = order_latents(clip, drawn[0], named, PROMPTS[0])
    turned = order_latents(clip, drawn[0], named, PROMPTS[1], PROMPTS[:1])
    assert set(plain.seeds[:2]) == {0, 1} and set(turned.seeds[:2]) == {2, 3}
    assert max(turned.values) <= 0  # logarithms of probabilities


def test_the_best_are_the_first_of_a_ranking_and_no_more_than_there_are(clip):
    found = order_latents(clip, noise(3), [7, 5, 6], "a pilot")
    assert found.best(2).seeds == found.seeds[:2] and torch.equal(found.best(2).latents, found.latents[:2])
    with pytest.raises(SettingError, match="best 4 of 3"):
        found.best(4)
    with pytest.raises(ConceptSteerError, match="3 latents but 2 seeds"):
        order_latents(clip, noise(3), [7, 5], "a pilot")


def test_a_model_of_another_latent_space_is_refused_before_it_draws(clip):
    class Other:
        family = "sdxl"

    with pytest.raises(FamilyMismatch, match=r"VAE of SDXL .*embedded demo model"):
        rank(Other(), clip, "a pilot", [1])


# --- files and search


def test_latents_come_back_from_a_file_as_they_were(tmp_path):
    for given in (noise(2), noise(1)[0]):
        save_latents(given, tmp_path / "one.safetensors", DEMO, overwrite=True)
        back = read_latents(tmp_path / "one.safetensors", DEMO)
        assert torch.equal(back, given if given.ndim == 4 else given[None])


def test_a_file_of_another_space_is_refused_naming_both(tmp_path):
    save_latents(noise(), tmp_path / "one.safetensors", space("sdxl"))
    with pytest.raises(FamilyMismatch, match=r"one\.safetensors has latents of the VAE of SDXL .*embedded demo"):
        read_latents(tmp_path / "one.safetensors", DEMO)


def test_a_file_that_does_not_say_whose_it_is_needs_to_be_told(tmp_path):
    path = tmp_path / "one.npy"
    np.save(path, noise().numpy())
    with pytest.raises(ConceptSteerError, match="--space"):
        read_latents(path, DEMO)
    with pytest.raises(ConceptSteerError, match="--scaled"):
        read_latents(path, DEMO, Stated("demo"))
    with pytest.raises(ConceptSteerError, match="look scaled"):
        read_latents(path, DEMO, Stated("demo", False))
    assert torch.equal(read_latents(path, DEMO, Stated("demo", True)), noise())


def test_comfyuis_latents_are_unscaled(tmp_path):
    path = tmp_path / "ComfyUI_00001_.latent"
    tensors = {"latent_tensor": noise() / DEMO.scaling, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(tensors, path)
    assert torch.allclose(read_latents(path, DEMO, Stated("demo")), noise(), atol=1e-5)
    safetensors.torch.save_file({"latent_tensor": tensors["latent_tensor"]}, path)
    with pytest.raises(ConceptSteerError, match="old ComfyUI"):
        read_latents(path, DEMO, Stated("demo"))


@pytest.mark.parametrize("name", ["note.txt", "bad.png"])
def test_what_is_neither_latent_nor_picture_is_an_error_that_names_the_file(clip, name, tmp_path):
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ConceptSteerError, match=name.replace(".", r"\.")):
        index(clip, [tmp_path / name], encode=lambda pixels: pixels)


@pytest.mark.parametrize("name", ["bad.npy", "bad.safetensors", "object.npy", "other.safetensors", "gone.npy"])
def test_what_is_no_latent_is_an_error_that_names_the_file(name, tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConceptSteerError, match=name.replace(".", r"\.")):
        read_latents(tmp_path / name, DEMO, Stated("demo", True))


def test_search_finds_the_pictures_of_a_text_in_latents_and_in_pictures(clip, denoiser, drawn, tmp_path):
    from concept_steer.pictures import save, to_images

    latents = drawn[0]
    save_latents(latents[:2], tmp_path / "doctors.safetensors", DEMO)
    with torch.no_grad():
        save(to_images(denoiser.decode(latents[2:3]))[0], tmp_path / "fire.png")
    files = [tmp_path / "doctors.safetensors", tmp_path / "fire.png"]
    found = index(clip, files, encode=denoiser.encode_pictures, size=(128, 128))
    assert found.places == (0, 1, 0)
    assert search(clip, found, "a firefighter")[0].file.name == "fire.png"
    hits = search(clip, found, "a doctor", against=["a firefighter"], count=2)
    assert {(hit.file.name, hit.place) for hit in hits} == {("doctors.safetensors", 0), ("doctors.safetensors", 1)}
    with pytest.raises(ConceptSteerError, match=r"fire\.png is a picture"):
        index(clip, files)


# --- the command line


def run(capsys, *words: str) -> str:
    assert main(["latent-clip", *words]) == 0
    return capsys.readouterr().out


def test_the_commands_score_classify_and_search_a_folder(drawn, tmp_path, capsys):
    folder, result = tmp_path / "latents", tmp_path / "result.json"
    for name, one in zip("abcd", drawn[0], strict=True):
        save_latents(one, folder / f"{name}.safetensors", DEMO)
    texts = [word for prompt in PROMPTS for word in ("--text", prompt)]
    assert run(capsys, "score", str(folder), *texts, "--json", str(result)).count("\n") == 4
    rows = json.loads(result.read_text())
    assert [max(row["cosines"], key=row["cosines"].get) for row in rows] == [p for p in PROMPTS for _ in range(2)]
    classes = ("--class", "a doctor", "--class", "a firefighter")
    lines = run(capsys, "classify", str(folder), *classes, "--template", "an image of {}").splitlines()
    assert ["a doctor" in line for line in lines] == [True, True, False, False]
    hits = run(capsys, "search", str(folder), "--text", "a firefighter", "--count", "2").split()
    assert {hit[-13:] for hit in hits[1::2]} == {"c.safetensors", "d.safetensors"}


def test_the_rank_command_keeps_the_best_as_pictures_and_latents(clip, tmp_path, capsys):
    pytest.importorskip("diffusers")
    settings = ("--seeds", "3", "--pick", "1", "--steps", "2", "--guidance", "1", "--device", "cpu")
    out = run(capsys, "rank", "--prompt", "a pilot", *settings, "--out", str(tmp_path / "best"))
    value, _, seed = out.splitlines()[0].split()
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["01.png", "01.safetensors"]
    kept = read_latents(tmp_path / "best" / "01.safetensors", clip.space)
    assert float(score(clip, kept, ["a pilot"]).cosines) == pytest.approx(float(value), abs=2e-3)
    with Image.open(tmp_path / "best" / "01.png") as picture:
        assert json.loads(picture.text["concept_steer"])["seed"] == int(seed)
    assert main(["latent-clip", "rank", "--prompt", "a pilot", *settings, "--out", str(tmp_path / "best")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_errors_of_the_commands_are_one_message(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "one.npy", noise().numpy())
    assert main(["latent-clip", "score", str(tmp_path / "one.npy"), "--text", "a"]) == 1
    assert "--space" in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", [])
    torch.save({}, tmp_path / "epoch_34.pt")
    convert = ["latent-clip", "convert", str(tmp_path / "epoch_34.pt"), "--out", str(tmp_path / "clip.safetensors")]
    assert main(convert) == 1
    assert "--tokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["latent-clip", "rank", "--prompt", "a pilot", "--seeds", "2", "--pick", "3", "--out", str(tmp_path)])


# --- with the judges of the embedded model


@pytest.mark.slow
def test_the_right_one_of_eight_prompts_comes_first_and_the_best_of_a_mixed_batch_are_what_was_asked(clip, denoiser):
    from concept_steer.demo.judges import Judges
    from concept_steer.sampling import sample

    roles = ("pilot", "judge", "wizard", "cook", "astronaut", "doctor", "singer", "farmer")
    prompts = [f"an {role}" if role == "astronaut" else f"a {role}" for role in roles]
    every = [prompt for prompt in prompts for _ in range(8)]
    latents = sample(denoiser, every, seeds=list(range(100, 108)) * 8, steps=4, guidance=1.0)
    right = sum(best == prompt for best, prompt in zip(score(clip, latents, prompts).best(), every, strict=True))
    judged = Judges()(torch.cat([denoiser.decode(part) for part in latents.split(16)])).labels("role")
    picked = []
    for role, prompt in zip(roles, prompts, strict=True):
        best = order_latents(clip, latents, range(64), prompt).best(4)
        picked += [judged[place] == role for place in best.seeds]
    print(f"first: {right} of 64; picked: {sum(picked)} of {len(picked)}, {1 / 8:.0%} by chance")
    assert right >= 56
    assert sum(picked) >= 28
