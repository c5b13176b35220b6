from __future__ import annotations

import json
import math
import os
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from concept_steer import vector_file
from concept_steer.errors import VectorFileError
from concept_steer.vector import ConceptVector

FAMILY = "custom:8x16"
C = 16
META = {"hspace.format_version": "1", "hspace.family": FAMILY, "hspace.channels": str(C)}


def make(*shape: int, **kw) -> ConceptVector:
    return ConceptVector(torch.randn(*(shape or (C,)), generator=torch.Generator().manual_seed(0)), FAMILY, **kw)


def write(path: Path, tensor: torch.Tensor | None = None, meta: dict | None = None, **tensors: torch.Tensor) -> Path:
    tensor = torch.ones(C) if tensor is None else tensor
    path.write_bytes(safetensors.torch.save({"vector": tensor, **tensors}, META if meta is None else meta))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "woman.safetensors"


@pytest.mark.parametrize(
    "vector",
    [make(C), make(C, 3, 5), make(2, C, timesteps=(0.1 + 0.2, 999)), make(2, C, 3, 5, timesteps=(500, 1 / 3))],
    ids=["C", "CHW", "TC", "TCHW"],
)
def test_a_round_trip_keeps_the_tensor_and_every_field(path, vector):
    info = {
        "description": "two\nlines, ünïcode ☂",
        "author": "",
        "date": "2025-01-01",
        "license": "CC0-1.0",
        "usage_hint": "0.5 to 1",
        "tags": "person,woman",
        "prompt_positive": "a woman",
        "effect": '{"share": 0.9}',
        "calibration": "0.123456789012345",
        "something_new": "kept",
    }
    vector = vector.with_title("a wömán").with_info(**info)
    again = ConceptVector.load(vector.save(path))
    assert torch.equal(again.tensor, vector.tensor) and again.tensor.dtype == torch.float32
    assert (again.family, again.title, again.site, again.timesteps) == (FAMILY, "a wömán", "mid", vector.timesteps)
    assert dict(again.info) == info and again == vector and again.fingerprint == vector.fingerprint


def test_tiny_and_huge_values_survive_the_round_trip(path):
    tensor = torch.zeros(C)
    tensor[:4] = torch.tensor([1e-45, 3.4e38, -1e-40, math.pi])
    assert torch.equal(ConceptVector.load(ConceptVector(tensor, FAMILY).save(path)).tensor, tensor)


def test_the_file_says_in_standard_keys_what_it_is(path):
    ConceptVector(torch.ones(1280), "sdxl", title="woman", info={"author": "me", "seed": "3"}).save(path)
    with safetensors.safe_open(path, "pt") as file:
        meta = file.metadata()
        assert list(file.keys()) == ["vector"]
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/concept-vector",
        "modelspec.title": "woman",
        "modelspec.author": "me",
        "ss_base_model_version": "sdxl_base_v1-0",
        "hspace.format_version": "1",
        "hspace.site": "mid",
        "hspace.family": "sdxl",
        "hspace.channels": "1280",
        "hspace.timesteps": "[]",
        "hspace.seed": "3",
    }
    assert expected.items() <= meta.items()
    assert len(meta["sshs_model_hash"]) == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_fp32(path, dtype):
    tensor = torch.randn(C).to(dtype)
    loaded = ConceptVector.load(write(path, tensor)).tensor
    assert loaded.dtype == torch.float32 and torch.equal(loaded, tensor.float())


def test_only_descriptive_metadata_may_be_missing(path):
    vector = ConceptVector.load(write(path))
    assert (vector.title, vector.site, vector.timesteps, dict(vector.info)) == ("", "mid", (), {})


def test_foreign_metadata_is_no_obstacle(path):
    vector = ConceptVector.load(
        write(path, meta={**META, "format": "pt", "modelspec.thumbnail": "x", "hspace.mood": "y"})
    )
    assert dict(vector.info) == {"mood": "y"}


def test_saving_leaves_no_other_file_behind(path):
    make().save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_over_a_file_needs_permission_and_leaves_it_whole(path):
    make().save(path)
    before = path.read_bytes()
    with pytest.raises(VectorFileError, match=r"woman.safetensors exists already"):
        (make() * 2).save(path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    (make() * 2).save(path, overwrite=True)
    assert ConceptVector.load(path) == make() * 2


def test_a_failure_while_writing_keeps_the_old_file_and_no_rest(path, monkeypatch):
    make().save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(VectorFileError, match=r"cannot be written \(No space left on device\)"):
        (make() * 2).save(path, overwrite=True)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
def test_a_saved_file_has_the_ordinary_rights_of_a_new_file(path):
    make().save(path)
    ordinary = path.with_name("ordinary")
    ordinary.write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_missing_folders_are_made(tmp_path):
    path = make().save(tmp_path / "a" / "b" / "woman.safetensors")
    assert ConceptVector.load(path) == make()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file in the place of the folder")
    with pytest.raises(VectorFileError, match=r"woman.safetensors cannot be written.*taken.*folder"):
        make().save(tmp_path / "taken" / "woman.safetensors")


def test_a_name_that_the_system_refuses_is_an_error_in_words(tmp_path):
    for name in ("x" * 300, "nul\0byte"):
        with pytest.raises(VectorFileError, match="cannot be written"):
            make().save(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["woman", "woman.pt", "woman.v2"])
def test_no_other_format_is_written(tmp_path, name):
    with pytest.raises(VectorFileError, match=r"must end in .safetensors"):
        make().save(tmp_path / name)


def test_a_vector_too_large_to_be_read_again_is_not_saved(path, monkeypatch):
    monkeypatch.setattr(vector_file, "MAX_BYTES", 64)
    with pytest.raises(VectorFileError, match="MiB"):
        make().save(path)
    assert not path.exists()


def test_a_missing_file_is_named(path):
    with pytest.raises(VectorFileError, match=r"woman.safetensors does not exist"):
        ConceptVector.load(path)


def test_a_folder_is_no_vector(tmp_path):
    with pytest.raises(VectorFileError, match="is a folder"):
        ConceptVector.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_a_pipe_is_refused_instead_of_waited_for(path):
    os.mkfifo(path)
    with pytest.raises(VectorFileError, match="not an ordinary file"):
        ConceptVector.load(path)


def test_a_path_that_cannot_be_read_is_an_error_in_words(tmp_path):
    with pytest.raises(VectorFileError, match="cannot be read"):
        ConceptVector.load(tmp_path / "nul\0byte.safetensors")


def test_an_oversized_file_is_refused_without_being_read(path):
    with open(path, "wb") as file:
        file.truncate(vector_file.MAX_BYTES + 1)
    with pytest.raises(VectorFileError, match=r"64 MiB.*checkpoint"):
        ConceptVector.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_never_opened_and_the_importer_is_named(path, protocol, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    with pytest.raises(VectorFileError, match=r"pickle.*never opened.*concept-steer import"):
        ConceptVector.load(path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_checkpoint_counts_as_a_pickle(path, zipped):
    torch.save({"vector": torch.ones(C)}, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    with pytest.raises(VectorFileError, match="never opened"):
        ConceptVector.load(path)


def test_a_good_file_whose_header_length_looks_like_a_pickle_is_read(path):
    wanted = {0x80, 0x50}  # the first byte of a pickle, and of a zip file
    for pad in range(0, 2000, 8):
        vector = make().with_info(description="x" * pad)
        vector.save(path, overwrite=True)
        wanted -= {path.read_bytes()[0]}
        assert ConceptVector.load(path) == vector
    assert not wanted


def test_a_file_cut_off_anywhere_is_refused_by_name(path):
    make(C, 2, 2).save(path)
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 50, len(data) - 300, len(data) - 4, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(VectorFileError, match=r"woman.safetensors is damaged"):
            ConceptVector.load(path)


def test_random_damage_to_the_header_is_always_a_vector_file_error_or_harmless(path):
    make().save(path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        where, value = (
            int(torch.randint(end, (1,), generator=generator)),
            int(torch.randint(256, (1,), generator=generator)),
        )
        path.write_bytes(data[:where] + bytes([value]) + data[where + 1 :])
        try:
            ConceptVector.load(path)
        except VectorFileError as error:
            assert "woman.safetensors" in str(error)


def raw(path: Path, header: object, body: bytes = b"\0" * 4 * C) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


ENTRY = {"dtype": "F32", "shape": [C], "data_offsets": [0, 4 * C]}


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"{" + b"\xff" * 8 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        {"__metadata__": META, "vector": 3},
        {"__metadata__": META, "vector": {"dtype": "F32", "shape": "16"}},
        {"__metadata__": META, "vector": {**ENTRY, "data_offsets": [0, 9999]}},
        {"__metadata__": META, "vector": {**ENTRY, "data_offsets": [8, 4 * C]}},
        {"__metadata__": META, "vector": {**ENTRY, "shape": [-1]}},
        {"__metadata__": {**META, "hspace.seed": 3}, "vector": ENTRY},
    ],
    ids=range(9),
)
def test_a_header_that_makes_no_sense_is_called_damaged(path, header):
    with pytest.raises(VectorFileError, match="damaged"):
        ConceptVector.load(raw(path, header))


@pytest.mark.parametrize(
    ("tensors", "meta", "words"),
    [
        ({"lora_unet_mid_block.lora_down.weight": torch.ones(2, 2)}, {}, "a LoRA"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, {}, "a checkpoint"),
        ({"down_blocks.0.weight": torch.ones(2)}, {}, "a UNet"),
        ({"decoder.conv_in.weight": torch.ones(2)}, {}, "a VAE"),
        ({"emb_params": torch.ones(2, 2)}, {}, "a textual inversion"),
        ({"vector": torch.ones(C)}, {}, "a bare tensor without metadata"),
        ({"vector": torch.ones(C)}, {"format": "pt"}, "a bare tensor without metadata"),
        ({"other": torch.ones(C)}, META, r"something else \(tensors other\)"),
    ],
)
def test_other_safetensors_are_called_by_what_they_look_like(path, tensors, meta, words):
    path.write_bytes(safetensors.torch.save(tensors, meta))
    with pytest.raises(VectorFileError, match=rf"not a concept vector: it looks like {words}.*hspace.format_version"):
        ConceptVector.load(path)


@pytest.mark.parametrize("key", sorted(META))
def test_missing_metadata_is_named(path, key):
    with pytest.raises(VectorFileError, match=f"lacks the metadata {key}"):
        ConceptVector.load(write(path, meta={k: v for k, v in META.items() if k != key}))


def test_a_newer_format_asks_for_an_update(path):
    with pytest.raises(VectorFileError, match=r"format version 2.*reads up to 1.*Update"):
        ConceptVector.load(write(path, meta={**META, "hspace.format_version": "2"}))


@pytest.mark.parametrize("version", ["", "one", "-1", "1.0", "²", "9" * 5000])
def test_a_format_version_that_is_no_number_is_refused(path, version):
    with pytest.raises(VectorFileError, match="format version"):
        ConceptVector.load(write(path, meta={**META, "hspace.format_version": version}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool])
def test_the_wrong_number_type_is_named(path, dtype):
    with pytest.raises(VectorFileError, match=r"numbers of type (F64|I32|I8|BOOL).*F32, F16, BF16"):
        ConceptVector.load(write(path, torch.ones(C).to(dtype)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_file_with_values_that_are_not_finite_is_refused_by_name(path, bad):
    tensor = torch.ones(C)
    tensor[5] = bad
    with pytest.raises(VectorFileError, match=r"woman.safetensors.*not finite"):
        ConceptVector.load(write(path, tensor))


@pytest.mark.parametrize("shape", [(), (1, C, 2, 2, 2)])
def test_the_wrong_number_of_dimensions_is_named(path, shape):
    with pytest.raises(VectorFileError, match=rf"{len(shape)} dimensions.*\(C, H, W\)"):
        ConceptVector.load(write(path, torch.ones(shape)))


def test_channels_other_than_the_file_says_are_refused(path):
    with pytest.raises(VectorFileError, match=r"says it has 16 channels, but.*has 8"):
        ConceptVector.load(write(path, torch.ones(8)))


def test_channels_other_than_the_familys_are_refused(path):
    with pytest.raises(VectorFileError, match=r"woman.safetensors.*Stable Diffusion 1.x.*1280 channels.*16"):
        ConceptVector.load(write(path, meta={**META, "hspace.family": "sd1"}))


def test_a_family_of_the_future_is_named_with_the_known_ones(path):
    with pytest.raises(VectorFileError, match=r"woman.safetensors.*'sd99' is not known.*sd1"):
        ConceptVector.load(write(path, meta={**META, "hspace.family": "sd99"}))


@pytest.mark.parametrize("steps", ["oops", "3", '["a"]', "[[1]]", "[" * 100_000])
def test_timesteps_that_are_no_list_of_numbers_are_refused(path, steps):
    with pytest.raises(VectorFileError, match="timesteps"):
        ConceptVector.load(write(path, torch.ones(1, C), {**META, "hspace.timesteps": steps}))


def test_timesteps_that_do_not_fit_the_tensor_are_refused(path):
    with pytest.raises(VectorFileError, match="2 different timesteps"):
        ConceptVector.load(write(path, torch.ones(2, C), {**META, "hspace.timesteps": "[5]"}))


def test_more_than_one_tensor_is_refused(path):
    with pytest.raises(VectorFileError, match=r"more tensors.*another.*one concept a file"):
        ConceptVector.load(write(path, another=torch.ones(C)))
