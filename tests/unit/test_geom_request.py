"""What a person asks for in a host, to erase something: checked before any work, the same for every host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from concept_steer.errors import LearnError, SettingError
from concept_steer.geom_erasing.request import BOTH, EMBEDDINGS, LORAS, MASKED, TOKENS, Erasing, ErasingRequest
from concept_steer.hosts.webui_erasing import told
from concept_steer.learn.watch import Watch


class Silent(Watch):
    def __init__(self) -> None:
        super().__init__(None)
        self.percents: list[float] = []

    def asked(self) -> bool:
        return False

    def at(self, percent, image=None, words="") -> None:
        self.percents.append(percent)


def work(folder: Path | None = None, overwrite: bool = False, **fields) -> Erasing:
    request = ErasingRequest(**{"detector": "demo-watermark", **fields})
    folders = None if folder is None else {EMBEDDINGS: folder / EMBEDDINGS, LORAS: folder / LORAS}
    return Erasing(request, Silent(), folders, overwrite)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"detector": "model:/etc/passwd"}, "There is no detector 'model:/etc/passwd'"),
        ({"way": "magic"}, "There is no way 'magic'"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"bins": 9}, "between 1 and 8"),
        ({"steps": True}, "steps is True; it must be of the type int"),
        ({"captions": ["a cat"]}, "of the type str"),
        ({"size": 100_000}, "size is 100000"),
    ],
)
def test_what_is_out_of_range_is_named_with_what_may_be_there(fields, words):
    with pytest.raises(SettingError, match=words):
        ErasingRequest.of(fields)


def test_an_unknown_field_is_an_error_that_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"Unknown: colour\. Known are batch, bins"):
        ErasingRequest.of({"colour": 1})


def test_a_way_says_what_is_trained():
    assert ErasingRequest(way=TOKENS).settings.rank == 0
    assert (ErasingRequest(way=BOTH, rank=8).settings.rank, ErasingRequest(way=BOTH).settings.way) == (8, "told")
    assert ErasingRequest(way=MASKED).settings.way == "masked"


def test_the_name_comes_from_the_thing_and_may_be_no_path(tmp_path):
    assert work(tmp_path).name == "no-watermark" and work(concept="QR Code").name == "no-qr-code"
    with pytest.raises(LearnError, match="cannot be the name"):
        work(name="../outside")


@pytest.mark.parametrize(("way", "kinds"), [(TOKENS, {EMBEDDINGS}), (BOTH, {EMBEDDINGS, LORAS}), (MASKED, {LORAS})])
def test_a_taken_name_is_said_before_any_work_and_without_the_machines_folders(tmp_path, way, kinds):
    assert work(tmp_path, way=way).paths.keys() == kinds
    for kind in kinds:
        taken = tmp_path / kind / "no-watermark.safetensors"
        taken.parent.mkdir()
        taken.touch()
    with pytest.raises(SettingError, match=r"/no-watermark\.safetensors is there already") as error:
        work(tmp_path, way=way)
    assert str(tmp_path) not in str(error.value)
    assert work(tmp_path, overwrite=True, way=way).paths.keys() == kinds and not work(way=way).paths


def test_a_lora_without_peft_is_refused_before_any_work_and_tokens_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for way in (BOTH, MASKED):
        with pytest.raises(LearnError, match="needs peft: pip install"):
            work(way=way)
    assert work(way=TOKENS).name == "no-watermark"


def test_pictures_are_opened_one_by_one_and_only_thumbnails_stay():
    own, opened = work(), []

    def picture(number: int) -> Image.Image:
        opened.append(number)
        return Image.effect_noise((800, 600), 50).convert("RGB")

    found = own.look(picture, ["a cat"] * 10, lambda: None)
    assert opened == list(range(10)) and len(found) == 10 and found[0].size == (800, 600)
    assert all(max(small.size) <= 320 for small in own.small)
    assert own.where().width > 300 and own.watch.percents[-1] == 10
    assert "of 10 pictures" in own.seen()


def test_a_host_can_end_the_looking():
    def asked() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        work().look(lambda number: Image.new("RGB", (64, 64)), ["", ""], asked)


def test_captions_come_from_files_of_the_pictures_names_then_from_the_field(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.txt", "b.png", "c.jpg")]
    files[1].write_text("a cat\non a mat", encoding="utf-8")
    pictures, captions = told(files, ErasingRequest(captions="a dog\na bird"))
    assert [file.name for file in pictures] == ["a.png", "b.png", "c.jpg"]
    assert captions == ["a dog", "a cat on a mat", "a bird"]
    assert told(files, ErasingRequest())[1] == ["", "a cat on a mat", ""]


@pytest.mark.parametrize(
    ("names", "captions", "words"),
    [
        ([], "", "no pictures"),
        (["a.txt"], "", "no pictures"),
        (["a.png", "b.txt"], "", "b.txt is the caption of no picture"),
        (["a.png", "a.jpg", "a.txt"], "", "same name"),
        (["a.png", "b.png"], "one\ntwo\nthree", "2 pictures came with 3 captions"),
    ],
)
def test_files_that_do_not_fit_together_are_said(tmp_path, names, captions, words):
    for name in names:
        (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(SettingError, match=words):
        told([tmp_path / name for name in names], ErasingRequest(captions=captions))


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"x" * 100_000])
def test_a_caption_that_is_no_text_or_a_book_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SettingError, match=r"a\.txt is"):
        told([tmp_path / "a.png", tmp_path / "a.txt"], ErasingRequest())
