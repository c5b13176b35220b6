"""Every command on a tiny real diffusers folder, and what goes wrong with its exit code: 1 explained, 2 usage, 130."""

from __future__ import annotations

import json
import pickle
import signal
from typing import get_args

import pytest
import torch
from PIL import Image
from tiny_diffusers import tiny_sd

from concept_steer import ConceptVector, __version__, learn
from concept_steer.cli import apply, main
from concept_steer.cli.models import VectorSpec, load_checkpoint, vector_spec
from concept_steer.cli.output import SETTINGS_KEY
from concept_steer.errors import ConceptSteerError
from concept_steer.pictures import picture_files, read_pictures
from concept_steer.steering import Operator, Rows

pytest.importorskip("diffusers")
FAMILY = "custom:24x32"
PAIR = ("--pair", "a doctor", "a woman doctor")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A StableDiffusionPipeline folder whose pictures are 16 x 16."""
    folder = tmp_path_factory.mktemp("model")
    tiny_sd(folder / "parts").save_pretrained(folder / "sd")
    return str(folder / "sd")


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """An empty library and an empty working folder, and no other."""
    monkeypatch.setenv("CONCEPT_STEER_VECTORS", str(tmp_path / "library"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "library"


@pytest.fixture
def cats(tmp_path):
    """A folder of four pictures of different kinds and sizes, beside what is no picture."""
    folder = tmp_path / "cats"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for i, name in enumerate(("a.png", "b.jpg", "c.webp", "d.JPEG")):
        Image.effect_noise((20 + 4 * i, 30), 40 + 10 * i).convert("RGB").save(folder / name)
    return folder


@pytest.fixture
def woman(library) -> ConceptVector:
    tensor = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vector = ConceptVector(tensor, FAMILY, title="woman", info={"method": "made up", "effect": '{"share_after": 0.9}'})
    vector.save(library / "woman.safetensors")
    return vector


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def refused(capsys, *args: object) -> str:
    """The one message of a command that ends with exit code 1."""
    assert run(*args) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("concept-steer: ") and "Traceback" not in message
    return message


def misused(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as left:
        run(*args)
    assert left.value.code == 2
    return capsys.readouterr().err


# --- the commands


def test_learn_saves_a_vector_with_a_picture_beside_it(checkpoint, library, capsys):
    small = ("--steps", 4, "--trajectories", 4, "--batch", 8, "--no-spatial")
    assert (
        run("learn", "--checkpoint", checkpoint, *PAIR, *small, "--name", "Woman", "--out", "woman", "--seed", 3) == 0
    )
    vector = ConceptVector.load(library / "woman.safetensors")
    assert (vector.title, vector.family, vector.tensor.shape) == ("Woman", FAMILY, (32,))
    assert (vector.info["method"], vector.info["seed"]) == ("score", "3")
    assert Image.open(library / "woman.png").text[SETTINGS_KEY]
    said = capsys.readouterr().out
    assert "learned by score" in said and vector.fingerprint[:10] in said and "woman.png" in said


def test_learn_by_difference_makes_a_map_in_a_file_of_any_folder(checkpoint, tmp_path):
    out = tmp_path / "new" / "smile.safetensors"
    prompts = ("--neutral", "a face", "--positive", "a smiling face")
    args = ("learn", "--checkpoint", checkpoint, *prompts, "--method", "difference", "--spatial", "--out", out)
    assert run(*args, "--no-preview") == 0
    assert ConceptVector.load(out).tensor.shape == (32, 2, 2)
    assert [p.name for p in out.parent.iterdir()] == ["smile.safetensors"]
    assert run(*args, "--overwrite") == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["smile.png", "smile.safetensors"]


def test_learn_takes_a_folder_of_pictures(checkpoint, library, cats, capsys):
    args = ("learn", "--checkpoint", checkpoint, "--pictures", cats, "--prompt", "a cat", "--steps", 2, "--batch", 8)
    assert run(*args, "--out", "my cat", "--name", "My cat") == 0
    vector = ConceptVector.load(library / "my cat.safetensors")
    assert (vector.title, vector.tensor.shape) == ("My cat", (32,))
    assert [vector.info[key] for key in ("method", "prompt", "pictures", "steps")] == ["pictures", "a cat", "4", "2"]
    settings = json.loads(Image.open(library / "my cat.png").text[SETTINGS_KEY])
    assert settings["prompts"] == ["a cat"] * 4
    assert "learned by pictures" in capsys.readouterr().out
    others = cats.parent / "others"
    others.mkdir()
    for i in range(2):
        Image.effect_noise((16, 16), 90).convert("RGB").save(others / f"{i}.png")
    assert run(*args, "--without", others, "--method", "pictures", "--no-preview") == 0
    contrast = ConceptVector.load(library / "a cat.safetensors")
    assert contrast.info["pictures_without"] == "2"


def test_ctrl_c_while_learning_saves_the_best_vector_so_far(checkpoint, library, monkeypatch, capsys):
    real = learn.learn_score

    def interrupted_at_its_second_step(*args, progress, **options):
        def at(step, *rest):
            progress(step, *rest)
            if step == 2:
                signal.raise_signal(signal.SIGINT)

        return real(*args, progress=at, patience=99, **options)

    monkeypatch.setattr(learn, "learn_score", interrupted_at_its_second_step)
    before = signal.getsignal(signal.SIGINT)
    assert run("learn", "--checkpoint", checkpoint, *PAIR, "--steps", 500, "--trajectories", 4, "--out", "woman") == 130
    assert ConceptVector.load(library / "woman.safetensors").info["steps"] == "2"
    assert not (library / "woman.png").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_leaves_nothing(checkpoint, library, monkeypatch, capsys):
    real = learn.learn_score

    def interrupted_while_caching(*args, caching, **options):
        def at(done, total):
            caching(done, total)
            if done == 1:
                signal.raise_signal(signal.SIGINT)

        return real(*args, caching=at, **options)

    monkeypatch.setattr(learn, "learn_score", interrupted_while_caching)
    assert run("learn", "--checkpoint", checkpoint, *PAIR, "--out", "woman") == 130
    assert list(library.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


def test_apply_writes_pictures_that_carry_their_settings_and_a_sheet(checkpoint, woman, tmp_path):
    args = ("apply", "--checkpoint", checkpoint, "--prompt", "a pilot, café", "--steps", 2, "--count", 2, "--seed", 5)
    assert run(*args, "--vector", "woman:2:0:0.6", "--guidance", 3, "--out", tmp_path / "out") == 0
    names = ["0001-5-with", "0001-5-without", "0001-6-with", "0001-6-without", "0001-sheet"]
    assert sorted(p.stem for p in (tmp_path / "out").iterdir()) == names
    plain, steered = (Image.open(tmp_path / "out" / f"0001-5-{kind}.png") for kind in ("without", "with"))
    assert plain.tobytes() != steered.tobytes()
    settings = json.loads(steered.text[SETTINGS_KEY])
    used = settings.pop("vectors")
    assert (settings["prompt"], settings["seed"], settings["guidance"], settings["steps"]) == (
        "a pilot, café",
        5,
        3.0,
        2,
    )
    assert len(settings["checkpoint_hash"]) == 64
    assert used == [
        {
            "name": "woman",
            "title": "woman",
            "fingerprint": woman.fingerprint,
            "strength": 2.0,
            "start": 0.0,
            "end": 0.6,
            "rows": "cond",
            "operator": "add",
        }
    ]
    assert json.loads(plain.text[SETTINGS_KEY]) == {**settings, "vectors": []}


def test_apply_at_strength_0_changes_nothing_and_a_second_run_overwrites_nothing(checkpoint, woman, tmp_path):
    args = ("apply", "--checkpoint", checkpoint, "--prompt", "a", "--steps", 2, "--count", 1, "--out", tmp_path / "o")
    assert run(*args, "--vector", f"{woman.fingerprint[:12]}:0") == 0
    plain, steered = (Image.open(tmp_path / "o" / f"0001-0-{kind}.png") for kind in ("without", "with"))
    assert plain.tobytes() == steered.tobytes()
    file = tmp_path / "library" / "woman.safetensors"
    assert run(*args, "--vector", file, "--vector", "woman:-1", "--rows", "both", "--operator", "gated") == 0
    assert (tmp_path / "o" / "0002-sheet.png").exists() and (tmp_path / "o" / "0001-sheet.png").exists()


def test_show_tells_all_in_words_or_as_json(woman, capsys):
    assert run("show", "woman") == 0
    said = capsys.readouterr().out
    for part in ("woman", "made up", "share_after: 0.9", "(32,)", woman.fingerprint, f"{woman.norm:.4g}", FAMILY):
        assert part in said
    assert run("show", "library/woman.safetensors", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["fingerprint"], about["norm"], about["shape"]) == (woman.fingerprint, woman.norm, [32])
    assert about["info"]["method"] == "made up"


def test_show_explains_maps_and_timesteps(tmp_path, capsys):
    ConceptVector(torch.ones(2, 32, 4, 3), FAMILY, timesteps=(900, 100)).save(tmp_path / "v.safetensors")
    assert run("show", "v.safetensors") == 0
    said = capsys.readouterr().out
    assert "4 x 3" in said and "900, 100" in said


def test_list_shows_the_vectors_the_folders_and_what_is_broken(woman, library, capsys):
    (library / "people").mkdir()
    woman.with_title("").save(library / "people" / "copy.safetensors")
    (library / "bad.safetensors").write_bytes(b"nothing")
    assert run("list") == 0
    said = capsys.readouterr().out
    assert f"woman        woman  {FAMILY}  made up  {woman.fingerprint[:10]}\n" in said
    assert "people/copy" in said and str(library) in said and "bad.safetensors is damaged" in said
    assert run("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["vectors"]] == ["bad", "people/copy", "woman"]
    assert found["folders"][0] == str(library)


def test_list_of_an_empty_library_says_where_vectors_go(library, capsys):
    assert run("list") == 0
    assert f"{library} (new ones are saved here, not there yet)" in capsys.readouterr().out


def test_import_turns_a_table_into_files(library, tmp_path, capsys):
    torch.save({"weight": torch.randn(32 * 4, 2)}, tmp_path / "table.pt")
    (tmp_path / "names.json").write_text('{"woman": 1, "man": 0}')
    args = ("import", "table.pt", "--names", "names.json", "--height", 2, "--width", 2, "--family", FAMILY)
    assert run(*args, "--prefix", "their ") == 0
    assert sorted(p.name for p in library.iterdir()) == ["their man.safetensors", "their woman.safetensors"]
    assert run(*args, "--out", tmp_path / "else") == 0
    assert (tmp_path / "else" / "man.safetensors").is_file()
    assert "has a vector 'woman' already" in refused(capsys, *args, "--out", tmp_path / "else")


def test_version_and_help(capsys):
    for option, part in (("--version", __version__), ("--help", "export-demo")):
        with pytest.raises(SystemExit) as left:
            run(option)
        assert left.value.code == 0 and part in capsys.readouterr().out


# --- what goes wrong


@pytest.mark.parametrize("option", ["--pictures", "--without"])
def test_a_folder_without_pictures_and_a_broken_picture_are_named(option, checkpoint, cats, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    args = ["learn", "--checkpoint", checkpoint, "--pictures", cats, "--prompt", "a cat", "--out", "v"]
    unloaded = ["learn", "--checkpoint", "nowhere", *args[3:]]  # found before the model is loaded
    assert "empty holds no pictures" in refused(capsys, *unloaded, option, tmp_path / "empty")
    assert "missing is not a folder that can be read" in refused(capsys, *unloaded, option, tmp_path / "missing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cat.png").write_bytes((cats / "a.png").read_bytes()[:200])
    assert "cat.png cannot be read as a picture" in refused(capsys, *args, option, broken)


def test_a_single_picture_is_too_few(checkpoint, cats, capsys):
    for name in ("b.jpg", "c.webp", "d.JPEG"):
        (cats / name).unlink()
    message = refused(
        capsys, "learn", "--checkpoint", checkpoint, "--pictures", cats, "--prompt", "a cat", "--out", "v"
    )
    assert "too few pictures: 1" in message


def test_an_unknown_vector_is_named_with_close_ones_and_the_folders(checkpoint, woman, library, capsys):
    message = refused(capsys, "apply", "--checkpoint", checkpoint, "--prompt", "a", "--vector", "wamon")
    assert "wamon" in message and "Did you mean woman?" in message and str(library) in message


def test_a_vector_of_another_family_is_refused_before_anything_is_drawn(checkpoint, library, capsys):
    ConceptVector(torch.ones(1280), "sdxl", title="smile").save(library / "smile.safetensors")
    message = refused(capsys, "apply", "--checkpoint", checkpoint, "--prompt", "a", "--vector", "smile")
    assert "SDXL" in message and FAMILY in message and "'smile'" in message


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_a_pickle_is_refused_whatever_its_name(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(pickle.dumps({"vector": 1}))
    message = refused(capsys, "show", name)
    assert name in message and "never opened" in message and "concept-steer import" in message


@pytest.mark.parametrize("name", ["../woman", "/etc/passwd", "people/../../woman", "..\\woman"])
def test_a_path_is_not_a_name(name, woman, capsys):
    assert "it is a path" in refused(capsys, "show", name)


def test_a_path_is_not_a_name_to_save_under(capsys):
    assert "it is a path" in refused(capsys, "learn", *PAIR, "--out", "../woman")


def test_a_missing_file_is_named(capsys):
    assert "no/such.safetensors does not exist" in refused(capsys, "show", "no/such.safetensors")


def test_a_missing_checkpoint_is_named(woman, capsys):
    message = refused(capsys, "apply", "--checkpoint", "nowhere", "--prompt", "a", "--vector", "woman")
    assert "nowhere does not exist" in message


@pytest.mark.parametrize(
    "command",
    [
        ("apply", "--prompt", "a", "--vector", "woman", "--out"),
        ("learn", *PAIR, "--out"),
        ("demo", "--out"),
        ("export-demo",),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_the_work_begins(command, woman, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "folder"
    out = inside / "v.safetensors" if command[0] == "learn" else inside
    assert f"{inside} is not a folder that can be written to" in refused(capsys, *command, out)


def test_learn_refuses_to_replace_a_vector_before_the_work_begins(woman, capsys):
    message = refused(capsys, "learn", *PAIR, "--out", "woman")
    assert "woman.safetensors exists already" in message and "--overwrite" in message


def test_export_refuses_a_folder_with_something_in_it(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty" in refused(capsys, "export-demo", tmp_path)


def test_equal_prompts_teach_nothing(checkpoint, capsys):
    message = refused(capsys, "learn", "--checkpoint", checkpoint, "--pair", "a face", "a face", "--out", "v")
    assert "nothing to learn" in message


def test_a_window_that_never_acts_is_refused(woman, capsys):
    message = refused(capsys, "apply", "--prompt", "a", "--vector", "woman:1:0.8:0.2")
    assert "would never act" in message


def test_an_unknown_device_is_refused(checkpoint, woman, capsys):
    message = refused(
        capsys, "apply", "--checkpoint", checkpoint, "--prompt", "a", "--vector", "woman", "--device", "abacus"
    )
    assert "abacus" in message and "--device cpu" in message


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path, capsys):
    (tmp_path / "names.json").write_text('{"woman": 0}')
    args = ("import", "t.pt", "--names", "names.json", "--height", 8, "--width", 8, "--family", "sd9")
    assert "sdxl" in refused(capsys, *args)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("paint",),
        ("show", "woman", "--colour"),
        ("apply", "--prompt", "a"),
        ("apply", "--prompt", "a", "--vector", "woman:much"),
        ("apply", "--prompt", "a", "--vector", "woman:1:0:1:2"),
        ("apply", "--prompt", "a", "--vector", "woman", "--rows", "all"),
        ("apply", "--prompt", "a", "--vector", "woman", "--count", "0"),
        ("learn",),
        ("learn", "--neutral", "a face"),
        ("learn", *PAIR, "--neutral", "a face", "--positive", "a smile"),
        ("learn", *PAIR, "--method", "magic"),
        ("learn", *PAIR, "--method", "difference", "--steps", "5"),
        ("learn", "--pictures", "cats"),
        ("learn", "--method", "pictures", "--prompt", "a cat"),
        ("learn", "--pictures", "cats", "--prompt", "a cat", *PAIR),
        ("learn", "--pictures", "cats", "--prompt", "a cat", "--method", "score"),
        ("learn", "--pictures", "cats", "--prompt", "a cat", "--trajectories", "8"),
        ("learn", *PAIR, "--without", "cats"),
        ("learn", *PAIR, "--prompt", "a cat"),
        ("import", "t.pt", "--names", "n.json", "--height", "8", "--width", "eight", "--family", "sd1"),
        ("demo", "--count", "many"),
    ],
)
def test_a_mistake_in_the_command_line_shows_the_usage(args, capsys):
    assert "usage: concept-steer" in misused(capsys, *args)


def test_debug_shows_the_traceback_before_or_after_the_command(capsys):
    for args in (("--debug", "show", "nothing"), ("show", "nothing", "--debug")):
        assert run(*args) == 1
        assert "Traceback" in capsys.readouterr().err


def test_a_library_that_is_not_installed_is_named_with_the_way_out(monkeypatch, capsys):
    def missing(*args):
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers.utils")

    monkeypatch.setattr("concept_steer.library.Library.entries", missing)
    message = refused(capsys, "list")
    assert "diffusers," in message and "pip install 'concept-steer[demo]'" in message


def test_an_interrupt_outside_of_learning_is_130(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("concept_steer.library.Library.entries", interrupt)
    assert run("list") == 130
    assert capsys.readouterr().err == "concept-steer: interrupted.\n"


# --- details


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("woman", VectorSpec("woman")),
        ("woman:0.8", VectorSpec("woman", 0.8)),
        ("woman:-1:.25", VectorSpec("woman", -1.0, 0.25)),
        ("woman:1:0.1:0.6", VectorSpec("woman", 1.0, 0.1, 0.6)),
        ("woman::0.2", VectorSpec("woman", 1.0, 0.2)),
        ("people/woman:1e-1", VectorSpec("people/woman", 0.1)),
        ("C:\\vectors\\woman.safetensors:2", VectorSpec("C:\\vectors\\woman.safetensors", 2.0)),
        ("v1.5.safetensors:0.5", VectorSpec("v1.5.safetensors", 0.5)),
    ],
)
def test_vector_options_are_read(text, spec):
    assert vector_spec(text) == spec


def test_the_choices_are_those_of_the_core():
    assert (get_args(Rows), get_args(Operator)) == (apply.ROWS, apply.OPERATORS)


def test_pictures_are_cropped_to_their_middle_turned_upright_and_laid_on_white(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    wide.save(tmp_path / "1 wide.png")
    turned = Image.new("RGB", (20, 20), "black")
    turned.paste("white", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "2 turned.webp", exif=exif, lossless=True)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "3 clear.PNG")
    pixels = read_pictures(picture_files(tmp_path), (10, 10))
    assert pixels.shape == (3, 3, 10, 10) and (pixels.min(), pixels.max()) == (-1, 1)
    assert (pixels[0, 2] > 0.7).all() and (pixels[0, 0] < -0.7).all()
    assert (pixels[1, :, 0] == -1).all() and (pixels[1, :, 9] == 1).all()
    assert (pixels[2] == 1).all()


def test_a_bad_device_is_found_before_the_model_is_read():
    with pytest.raises(ConceptSteerError, match="abacus"):
        load_checkpoint("nowhere", "abacus", "float32")
