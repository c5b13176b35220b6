from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from concept_steer.errors import ConceptSteerError
from concept_steer.importer import import_table
from concept_steer.library import Library
from concept_steer.vector import ConceptVector

FAMILY = "custom:8x16"
C, H, W, N = 16, 2, 3, 4
SIZE = C * H * W
NAMES = {"female": 0, "male": 1, "old man": 3}
TABLE = torch.randn(SIZE, N, generator=torch.Generator().manual_seed(0))


def run(path: Path, out: Path | Library, names=NAMES, **kw) -> list[ConceptVector]:
    return import_table(path, names, **{"height": H, "width": W, "family": FAMILY, "out": out, **kw})


def save(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def check(vectors: list[ConceptVector], out: Path, prefix: str = "") -> None:
    assert [v.title for v in vectors] == [prefix + name for name in NAMES]
    for vector, (name, column) in zip(vectors, NAMES.items(), strict=True):
        assert torch.equal(vector.tensor, TABLE[:, column].reshape(C, H, W))
        assert vector.family == FAMILY and vector.info["method"] == "imported"
        again = Library([out]).load(prefix + name)
        assert again == vector and again.title == vector.title
    assert len(list(out.iterdir())) == len(NAMES)


@pytest.mark.parametrize("name", ["table.pt", "table.pth", "table.safetensors"])
@pytest.mark.parametrize("key", ["fc1.weight", "weight", "module.fc1.weight"])
def test_a_published_table_becomes_one_file_per_name(tmp_path, name, key):
    path = save(tmp_path / name, {key: TABLE})
    check(run(path, tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        TABLE,
        TABLE.T.contiguous(),
        {"w": TABLE.T},
        {"state_dict": {"fc1.weight": TABLE}},
        {"fc1.weight": TABLE, "step": 3},
    ],
    ids=range(5),
)
def test_other_ways_to_lay_out_a_table_are_understood(tmp_path, content):
    check(run(save(tmp_path / "table.pt", content), tmp_path / "out"), tmp_path / "out")


def test_the_state_dict_of_a_linear_layer_gives_what_the_layer_gives_for_one_hot_inputs(tmp_path):
    layer = torch.nn.Linear(N, SIZE, bias=False)
    vectors = run(save(tmp_path / "unet.pth", torch.nn.Sequential(layer).state_dict()), tmp_path / "out")
    wanted = layer(torch.eye(N)).view(N, C, H, W)
    assert all(torch.equal(v.tensor, wanted[c]) for v, c in zip(vectors, NAMES.values(), strict=True))


def test_half_precision_tables_become_fp32(tmp_path):
    vectors = run(save(tmp_path / "table.pt", TABLE.half()), tmp_path / "out")
    assert torch.equal(vectors[0].tensor.flatten(), TABLE[:, 0].half().float())


def test_names_may_come_from_a_json_file_and_files_get_the_prefix(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    path = save(tmp_path / "table.pt", TABLE)
    check(run(path, tmp_path / "out", tmp_path / "names.json", prefix="sd-"), tmp_path / "out", "sd-")


def test_vectors_may_go_into_a_library(tmp_path):
    library = Library([tmp_path / "out"])
    run(save(tmp_path / "table.pt", TABLE), library)
    assert [e.name for e in library.entries()] == ["female", "male", "old man"]


def refuse(tmp_path: Path, path: Path, *words: str, **kw) -> None:
    """The import is refused with these words, and nothing is written."""
    with pytest.raises(ConceptSteerError) as caught:
        run(path, tmp_path / "out", **kw)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "table.pt"
    torch.save({"weight": TABLE, "bomb": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    refuse(tmp_path, path, "table.pt", "code", "not loaded")
    assert not (tmp_path / "exploded").exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path):
    refuse(tmp_path, save(tmp_path / "table.pt", torch.nn.Linear(N, SIZE)), "table.pt", "state dict")


@pytest.mark.parametrize("name", ["table.pt", "table.safetensors"])
@pytest.mark.parametrize("length", [0, 1, 100, -1, -200])
def test_a_truncated_table_is_refused_by_name(tmp_path, name, length):
    path = save(tmp_path / name, {"weight": TABLE})
    path.write_bytes(path.read_bytes()[:length])
    refuse(tmp_path, path, name, "damaged")


@pytest.mark.parametrize("name", ["table.pt", "table.pth", "table.safetensors"])
def test_rubbish_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"rubbish " * 100)
    refuse(tmp_path, tmp_path / name, name, "damaged")


def test_a_missing_table_is_named(tmp_path):
    refuse(tmp_path, tmp_path / "table.pt", "table.pt", "not a file")


def test_an_unknown_suffix_is_named(tmp_path):
    (tmp_path / "table.bin").write_bytes(b"x")
    refuse(tmp_path, tmp_path / "table.bin", "'.bin'", ".safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {},
        [TABLE],
        {"weight": TABLE[:-1]},
        {"weight": TABLE.int()},
        {"weight": TABLE[:, 0]},
        {"a": TABLE, "b": TABLE},
        torch.zeros(SIZE, 0),
    ],
    ids=range(7),
)
def test_a_file_without_exactly_one_table_of_the_right_size_is_refused(tmp_path, content):
    refuse(tmp_path, save(tmp_path / "table.pt", content), "table.pt", f"{SIZE} (16 x 2 x 3)", "height and width")


def test_the_wrong_map_or_family_is_refused_with_the_sizes(tmp_path):
    path = save(tmp_path / "table.pt", {"fc1.weight": TABLE})
    refuse(tmp_path, path, "table.pt", "fc1.weight (96, 4)", height=8, width=8)
    refuse(tmp_path, path, "table.pt", "Check the family", family="sd1")
    refuse(tmp_path, path, "not known", family="sd99")
    refuse(tmp_path, path, "table.pt", "8 x 8", height=0)


def test_a_bias_is_not_silently_dropped(tmp_path):
    path = save(tmp_path / "table.pt", {"fc1.weight": TABLE, "fc1.bias": torch.ones(SIZE)})
    refuse(tmp_path, path, "table.pt", "bias")
    run(save(path, {"fc1.weight": TABLE, "fc1.bias": torch.zeros(SIZE)}), tmp_path / "out")


def test_values_that_are_not_finite_name_the_file_and_the_column(tmp_path):
    table = TABLE.clone()
    table[5, 3] = math.nan
    refuse(tmp_path, save(tmp_path / "table.pt", table), "table.pt", "column 3", "old man", "not finite")


@pytest.mark.parametrize("column", [-1, N])
def test_a_column_that_is_not_there_is_named(tmp_path, column):
    path = save(tmp_path / "table.pt", TABLE)
    refuse(tmp_path, path, "table.pt", "4 columns", "'x'", names={"female": 0, "x": column})


@pytest.mark.parametrize("names", [{}, {"a": "0"}, {"a": True}, {"a": 0.5}, {3: 0}])
def test_names_that_are_no_column_numbers_are_refused(tmp_path, names):
    refuse(tmp_path, save(tmp_path / "table.pt", TABLE), "column number", names=names)


@pytest.mark.parametrize("text", [None, "", "{oops", "\xff", "[1]"])
def test_a_names_file_that_cannot_be_read_is_named(tmp_path, text):
    names = tmp_path / "names.json"
    if text is not None:
        names.write_bytes(text.encode("latin-1"))
    refuse(tmp_path, save(tmp_path / "table.pt", TABLE), "names.json", names=names)


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "/abs"])
def test_a_name_with_a_path_in_it_is_refused(tmp_path, name):
    path = save(tmp_path / "table.pt", TABLE)
    refuse(tmp_path, path, "table.pt", "cannot name a concept vector", names={"female": 0, name: 1})


def test_an_existing_vector_is_kept_and_nothing_else_is_written(tmp_path):
    path = save(tmp_path / "table.pt", TABLE)
    run(path, tmp_path / "out", {"old man": 0})
    with pytest.raises(ConceptSteerError, match=r"table.pt.*'old man' already.*prefix"):
        run(path, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old man.safetensors"]
    assert torch.equal(Library([tmp_path / "out"]).load("old man").tensor.flatten(), TABLE[:, 0])


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file in the place of the folder")
    with pytest.raises(ConceptSteerError, match=r"cannot be written.*taken"):
        run(save(tmp_path / "table.pt", TABLE), tmp_path / "taken")
