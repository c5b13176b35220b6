from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from concept_steer.errors import LibraryError, VectorFileError
from concept_steer.library import Library, default_folders, safe_name
from concept_steer.vector import ConceptVector

FAMILY = "custom:8x16"


def make(seed: int = 0) -> ConceptVector:
    return ConceptVector(torch.randn(16, generator=torch.Generator().manual_seed(seed)), FAMILY, title=f"v{seed}")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library([tmp_path / "own", tmp_path / "shipped"])
    library.save(make(0), "woman")
    make(1).save(tmp_path / "own" / "people" / "old man.safetensors")
    make(2).save(tmp_path / "shipped" / "smile.safetensors")
    return library


def symlink(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system makes no symbolic links")


def test_the_list_has_all_folders_and_sub_folders_by_name(library):
    assert [e.name for e in library.entries()] == ["people/old man", "smile", "woman"]


def test_only_vectors_are_listed(library):
    own = library.folders[0]
    (own / "woman.png").write_bytes(b"x")
    (own / "model.ckpt").write_bytes(b"x")
    (own / ".hidden.safetensors").write_bytes(b"x")
    (own / "folder.safetensors").mkdir()
    assert len(library.entries()) == 3


def test_of_equal_names_the_first_folder_wins(library):
    make(5).save(library.folders[1] / "woman.safetensors")
    assert library.load("woman") == make(0)


def test_missing_folders_are_simply_empty(tmp_path):
    assert Library([tmp_path / "nowhere"]).entries() == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("x")
    library = Library([tmp_path / "taken"])
    with pytest.raises(LibraryError, match=r"taken is a file.*needs a folder"):
        library.entries()
    with pytest.raises(VectorFileError, match=r"cannot be written.*taken"):
        library.save(make(), "woman")


def test_a_library_without_folders_is_an_error():
    with pytest.raises(LibraryError, match="at least one folder"):
        Library([])


@pytest.mark.parametrize(
    ("name", "seed"), [("woman", 0), ("people/old man", 1), ("smile", 2), ("smile.safetensors", 2)]
)
def test_a_vector_is_found_by_its_name(library, name, seed):
    assert library.load(name) == make(seed)


@pytest.mark.parametrize("digits", [10, 16, 64])
def test_a_vector_is_found_by_its_hash_after_a_rename(library, digits):
    path = library.find("woman").path
    path.rename(path.with_name("anything.safetensors"))
    assert library.find(make(0).fingerprint[:digits]).name == "anything"
    assert library.find(make(0).fingerprint[:digits].upper()).name == "anything"


def test_a_hash_of_less_than_ten_digits_is_not_enough(library):
    with pytest.raises(LibraryError, match="no concept vector"):
        library.find(make(0).fingerprint[:9])


def test_copies_of_one_vector_do_not_make_its_hash_ambiguous(library):
    library.save(make(0), "zebra")
    assert library.find(make(0).fingerprint).name == "woman"


def test_a_damaged_file_spoils_neither_the_list_nor_the_search_by_hash(library):
    (library.folders[0] / "broken.safetensors").write_bytes(b"oops")
    assert {e.name: e.hash for e in library.entries()}["broken"] == ""
    assert library.find(make(2).fingerprint).name == "smile"
    with pytest.raises(VectorFileError, match=r"broken.safetensors is damaged"):
        library.load("broken")


@pytest.mark.parametrize(("name", "close"), [("womn", "woman"), ("Woman", "woman"), ("old man", "people/old man")])
def test_an_unknown_name_gets_close_names_and_the_folders_searched(library, name, close):
    with pytest.raises(LibraryError) as caught:
        library.find(name)
    for word in (repr(name), f"Did you mean {close}", *map(str, library.folders)):
        assert word in str(caught.value)


BAD_NAMES = [
    "",
    " ",
    ".",
    "..",
    "../woman",
    "people/../../woman",
    "/etc/passwd",
    "//server/share",
    "people//old man",
    "people/",
    "./woman",
    "~",
    "~root",
    "..\\woman",
    "people\\woman",
    "C:woman",
    "C:/woman",
    "c:\\woman",
    ".hidden",
    "people/.hidden",
    "wo\0man",
    "wo\nman",
    "wo\x7fman",
    "wo\u202eman",
    "con",
    "NUL",
    "Lpt1.old",
    "woman:0.8",
    "<woman>",
    "wom?n",
    "w*",
    "a|b",
    'a"b',
    "woman ",
    " woman",
    "woman.",
    "x" * 121,
    "☂" * 100,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_with_a_path_or_anything_unsafe_in_it_is_an_error_everywhere(library, name):
    outside = library.folders[0].parent / "woman.safetensors"
    make(7).save(outside)
    before = sorted(outside.parent.rglob("*"))
    for operation in (library.find, library.load, safe_name, lambda n: library.save(make(), n)):
        with pytest.raises(LibraryError, match="cannot name a concept vector"):
            operation(name)
    assert sorted(outside.parent.rglob("*")) == before


def test_a_path_in_a_name_is_called_a_path():
    for name in ("../woman", "/etc/passwd", "C:woman", "a\\b", "people/woman"):
        with pytest.raises(LibraryError, match="it is a path"):
            safe_name(name)


@pytest.mark.parametrize("name", ["woman", "a woman (v2)", "frau_schön", "女人", "woman.v2", "console", "x" * 120, "0"])
def test_a_plain_name_is_safe_saved_and_found_again(library, name):
    assert safe_name(name) == name
    library.save(make(3), name, overwrite=True)
    assert library.load(name) == make(3)


def test_saving_makes_the_first_folder_and_returns_the_path(tmp_path):
    path = Library([tmp_path / "a" / "b"]).save(make(), "woman")
    assert path == tmp_path / "a" / "b" / "woman.safetensors" and path.is_file()


def test_saving_over_a_vector_needs_permission(library):
    with pytest.raises(VectorFileError, match="exists already"):
        library.save(make(4), "woman")
    assert library.load("woman") == make(0)
    library.save(make(4), "woman", overwrite=True)
    assert library.load("woman") == make(4)


def test_the_preview_lies_beside_the_vector_and_is_overwritten_with_it(library):
    path = library.save(make(3), "new", preview=Image.new("RGB", (4, 4), "red"))
    assert Image.open(path.with_suffix(".png")).getpixel((0, 0)) == (255, 0, 0)
    library.save(make(3), "new", overwrite=True, preview=Image.new("RGB", (4, 4), "blue"))
    assert Image.open(path.with_suffix(".png")).getpixel((0, 0)) == (0, 0, 255)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "new.png",
        "new.safetensors",
        "people",
        "woman.safetensors",
    ]


def test_a_picture_of_the_same_name_is_not_overwritten_unasked(library):
    picture = library.folders[0] / "new.png"
    picture.write_bytes(b"mine")
    with pytest.raises(LibraryError, match=r"new.png exists already"):
        library.save(make(3), "new", preview=Image.new("RGB", (4, 4)))
    assert picture.read_bytes() == b"mine" and not (library.folders[0] / "new.safetensors").exists()


def test_links_that_leave_the_folder_are_skipped(library, tmp_path):
    outside = make(6).save(tmp_path / "outside" / "secret.safetensors")
    symlink(library.folders[0] / "file.safetensors", outside)
    symlink(library.folders[0] / "folder", outside.parent)
    assert len(library.entries()) == 3
    for name in ("file", "folder/secret", make(6).fingerprint):
        with pytest.raises(LibraryError, match="no concept vector"):
            library.find(name)


def test_links_inside_the_folder_and_a_folder_that_is_a_link_itself_work(library, tmp_path):
    symlink(library.folders[0] / "same.safetensors", library.folders[0] / "woman.safetensors")
    symlink(tmp_path / "linked", library.folders[0])
    assert [e.name for e in Library([tmp_path / "linked"]).entries()] == ["people/old man", "same", "woman"]


def test_a_dangling_link_is_no_entry(library):
    symlink(library.folders[0] / "gone.safetensors", library.folders[0] / "nowhere.safetensors")
    assert len(library.entries()) == 3


def test_the_folders_of_the_environment_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCEPT_STEER_VECTORS", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    home = tmp_path / ".concept-steer" / "vectors"
    assert default_folders()[:3] == (tmp_path / "a", tmp_path / "b", home)
    monkeypatch.delenv("CONCEPT_STEER_VECTORS")
    assert Library.default_folders()[0] == home
