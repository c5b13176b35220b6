"""A scan of a folder says what is where, leaves the folder as it was, and its file is read strictly."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from concept_steer.cli.main import main
from concept_steer.errors import LearnError, SafetyError
from concept_steer.geom_erasing import dataset, detectors
from concept_steer.geom_erasing.dataset import detect, read_found, scan
from concept_steer.geom_erasing.dataset_report import covered_share
from concept_steer.geom_erasing.found_file import read_scan
from concept_steer.safety.detectors import Verdict

RED, PAPER = (255, 0, 0), (200, 220, 230)


class Red:
    """Finds red: the box around all of it. A detector whose verdicts are known."""

    name, threshold = "red", 0.5

    def __init__(self, concept: str | None = "red spot") -> None:
        self.looked = 0
        if concept is not None:
            self.concept = concept

    def scores(self, images):
        self.looked += len(images)
        return [self._verdict(np.asarray(image.convert("RGB")).astype(int)) for image in images]

    @staticmethod
    def _verdict(array: np.ndarray) -> Verdict:
        rows, columns = np.nonzero((array[..., 0] > 200) & (array[..., 1:] < 90).all(2))
        if not len(rows):
            return Verdict(False, 0.0, {"label": 0.0})
        left, top = int(columns.min()), int(rows.min())
        box = (left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top)
        return Verdict(True, 0.9, {"label": 0.9}, [("label", box)])


def picture(box: tuple[int, int, int, int] | None = None, size: tuple[int, int] = (80, 40)) -> Image.Image:
    """box: left, top, right, bottom of the red, in pixels."""
    image = Image.new("RGB", size, PAPER)
    if box is not None:
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=RED)
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    (made / "more").mkdir(parents=True)
    picture((20, 10, 60, 30)).save(made / "a.png")
    (made / "a.txt").write_text("a boat\non a lake\n", encoding="utf-8")
    picture().save(made / "b.webp", lossless=True)
    picture((0, 0, 20, 20)).save(made / "more" / "c.bmp")
    picture().save(made / "d.png")
    rows = [{"file_name": "b.webp", "text": "a house"}, {"file_name": "more/c.bmp", "caption": "a tree"}]
    (made / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (made / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    (made / "empty.jpg").write_bytes(b"")
    (made / "notes.md").write_text("not a picture")
    picture((0, 0, 9, 9)).save(made / ".hidden.png")
    return made


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --- scan


def test_a_scan_says_what_is_where_and_leaves_the_folder_as_it_was(folder, tmp_path):
    before = state(folder)
    result = scan(folder, [Red()], tmp_path / "out", caption="a picture")
    assert state(folder) == before
    by_name = {one.file.relative_to(folder).as_posix(): one for one in read_found(tmp_path / "out" / "found.jsonl")}
    assert list(by_name) == ["a.png", "b.webp", "d.png", "more/c.bmp"]
    assert by_name["a.png"].boxes == {"red spot": [(0.25, 0.25, 0.75, 0.75)]}
    assert by_name["more/c.bmp"].boxes == {"red spot": [(0.0, 0.0, 0.25, 0.5)]}
    assert by_name["b.webp"].boxes == {} and by_name["b.webp"].scores == {"red spot": 0.0}
    assert by_name["a.png"].sha256 == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    assert by_name["a.png"].size == (80, 40)
    assert [one.caption for one in by_name.values()] == ["a boat on a lake", "a house", "a picture", "a tree"]
    assert list(result.found) == list(by_name.values())
    assert [name for name, _ in result.skipped] == ["broken.png", "empty.jpg"]


def test_the_report_counts_what_was_found_and_what_was_not_read(folder, tmp_path):
    scan(folder, [Red()], tmp_path / "out")
    text = (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
    assert "red spot: in 2 of 4 pictures (50.0%), 2 boxes" in text
    assert "18.8% of the area on average (12.5% to 25.0%)" in text  # of 25 % and 12.5 %
    assert "Clean: 2 of 4" in text and "Without a caption: 1" in text
    assert "cannot be read: 2" in text and "broken.png: " in text and "red (threshold 0.5)" in text


def test_the_sheet_shows_the_boxes(folder, tmp_path):
    scan(folder, [Red()], tmp_path / "out")
    with Image.open(tmp_path / "out" / "sheet.jpg") as sheet:
        array = np.asarray(sheet.convert("RGB")).astype(int)
    assert sheet.width > 400 and sheet.height > 300
    near = np.abs(array - np.array((226, 40, 60))).sum(2) < 40  # a box's own colour, which no picture has
    assert near.sum() > 100


def test_boxes_that_overlap_are_counted_once():
    assert covered_share([(0.0, 0.0, 0.5, 1.0)]) == 0.5
    assert covered_share([(0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)]) == pytest.approx(0.75)


def test_a_second_scan_looks_only_at_what_changed(folder, tmp_path):
    first = scan(folder, [Red()], tmp_path / "out").found
    again = Red()
    assert scan(folder, [again], tmp_path / "out").found == first and again.looked == 0
    picture((40, 20, 80, 40)).save(folder / "b.webp", lossless=True)
    (folder / "a.txt").write_text("a ship", encoding="utf-8")
    changed = {one.file.name: one for one in scan(folder, [again], tmp_path / "out").found}
    assert again.looked == 1 and changed["b.webp"].boxes == {"red spot": [(0.5, 0.5, 1.0, 1.0)]}
    assert changed["a.png"].caption == "a ship"
    other = Red()
    other.threshold = 0.7
    scan(folder, [other], tmp_path / "out")
    assert other.looked == 4


def test_a_scan_that_is_stopped_keeps_what_it_saw_and_goes_on_from_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "AT_ONCE", 1)
    asked = iter([False, False, True])
    result = scan(folder, [Red()], tmp_path / "out", stop=lambda: next(asked))
    assert not result.complete and len(result.found) == 2
    assert "stopped" in (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
    assert not read_scan(tmp_path / "out" / "found.jsonl")[0].complete
    rest = Red()
    assert scan(folder, [rest], tmp_path / "out").complete and rest.looked == 2


def test_captions_get_location_tokens_beside_the_results(folder, tmp_path):
    grid = pytest.importorskip("concept_steer.geom_erasing.grid", reason="the grid of location tokens is not there yet")
    scan(folder, [Red()], tmp_path / "out", bins=2)
    found = {one.file.name: one for one in read_found(tmp_path / "out" / "found.jsonl")}
    written = (tmp_path / "out" / "captions" / "more" / "c.txt").read_text(encoding="utf-8").strip()
    assert written == found["c.bmp"].located == grid.located_caption("a tree", "red spot", [(0.0, 0.0, 0.25, 0.5)], 2)
    assert written.startswith("a tree red spot ") and found["c.bmp"].caption == "a tree"
    assert found["b.webp"].located == "a house"


# --- what stops a scan


def test_a_folder_without_readable_pictures_is_an_error_that_names_it(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LearnError, match="empty holds no pictures"):
        scan(empty, [Red()], tmp_path / "out")
    (empty / "one.png").write_bytes(b"no")
    with pytest.raises(LearnError, match=r"None of the 1 pictures .*one\.png"):
        scan(empty, [Red()], tmp_path / "out")
    with pytest.raises(LearnError, match="is not a folder"):
        scan(tmp_path / "none", [Red()], tmp_path / "out")


def test_nothing_found_is_an_error_with_a_report(tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    picture().save(clean / "one.png")
    with pytest.raises(LearnError, match=r"Nothing was found in 1 pictures .*looked for: red spot.*threshold"):
        scan(clean, [Red()], tmp_path / "out")
    assert "Clean: 1 of 1" in (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")


def test_a_detector_that_fails_is_never_taken_for_a_clean_picture(folder, tmp_path):
    class Failing(Red):
        def scores(self, images):
            raise RuntimeError("out of ink")

    with pytest.raises(SafetyError, match=r"'red' failed .*out of ink.*the scan stops"):
        scan(folder, [Failing()], tmp_path / "out")
    assert not (tmp_path / "out" / "found.jsonl").exists()


def test_the_pictures_own_folder_is_no_place_for_results(folder, tmp_path):
    with pytest.raises(LearnError, match="another folder"):
        scan(folder, [Red()], folder)
    scan(folder, [Red()], folder / "out")
    again = scan(folder, [Red()], folder / "out")
    assert not any("out" in one.file.parts[-2:-1] for one in again.found)


def test_a_caption_file_that_is_no_text_is_named(folder, tmp_path):
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert "a.png" in [name for name, _ in scan(folder, [Red()], tmp_path / "out").skipped]
    (folder / "metadata.jsonl").write_text('{"file_name": 3}', encoding="utf-8")
    with pytest.raises(LearnError, match=r"metadata\.jsonl, line 1"):
        scan(folder, [Red()], tmp_path / "out")


# --- in memory


def test_pictures_in_memory_are_looked_at_without_a_folder():
    found = detect([picture((20, 10, 60, 30)), picture()], ["one", ""], [Red(), Red(concept=None)])
    assert found[0].boxes == {"red spot": [(0.25, 0.25, 0.75, 0.75)], "label": [(0.25, 0.25, 0.75, 0.75)]}
    assert found[1].boxes == {} and [one.caption for one in found] == ["one", ""]
    with pytest.raises(LearnError, match="2 pictures came with 1 captions"):
        detect([picture(), picture()], ["one"], [Red()])
    with pytest.raises(LearnError, match="No detector"):
        detect([picture()], [""], [])


def test_boxes_that_leave_the_picture_are_cut_at_its_edge():
    class Beyond(Red):
        def scores(self, images):
            return [Verdict(True, 1.0, {}, [("x", (-5, -5, 20, 20)), ("x", (70, 35, 99, 99)), ("x", (90, 90, 5, 5))])]

    boxes = detect([picture()], [""], [Beyond()])[0].boxes["red spot"]
    assert boxes[0] == (0.0, 0.0, 15 / 80, 15 / 40) and boxes[1] == (70 / 80, 35 / 40, 1.0, 1.0)
    assert all(0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in boxes)


# --- the file


@pytest.fixture
def lines(folder, tmp_path) -> list[dict]:
    scan(folder, [Red()], tmp_path / "out")
    return [json.loads(line) for line in (tmp_path / "out" / "found.jsonl").read_text(encoding="utf-8").splitlines()]


def read_changed(lines: list[dict], tmp_path: Path, **changes):
    path = tmp_path / "changed.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in [lines[0], {**lines[1], **changes}]), encoding="utf-8")
    return read_found(path)


@pytest.mark.parametrize(
    "name", ["../a.png", "more/../../a.png", "/etc/passwd", "C:\\a.png", "C:a.png", "..\\a.png", "", "a\0.png", 3, None]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name, lines, tmp_path):
    with pytest.raises(LearnError, match="line 2"):
        read_changed(lines, tmp_path, file=name)


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 1], [0, 0, 0, 1], [0.5, 0, 0.2, 1], [-0.1, 0, 1, 1], [0, 0, 1.1, 1], [0, 0, math.nan, 1],
        [0, 0, math.inf, 1], [0, 0, True, 1], ["0", 0, 1, 1], "0011", None,
    ],
)  # fmt: skip
def test_a_box_that_is_none_is_refused(box, lines, tmp_path):
    with pytest.raises(LearnError, match="line 2"):
        read_changed(lines, tmp_path, boxes={"red spot": [box]})


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": []}, {"boxes": {"x": [[0, 0, 1, 1]] * 1001}}, {"boxes": {"x" * 65: []}}, {"boxes": {"a\n": []}},
        {"scores": {"x": 2}}, {"scores": None}, {"caption": 4}, {"caption": "x" * 70000}, {"sha256": "ab"},
        {"size": [0, 4]}, {"size": [1.5, 4]}, {"size": None}, {"located": 3},
        {"boxes": {str(i): [] for i in range(40)}},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_a_line_that_is_not_a_scans_is_refused(changes, lines, tmp_path):
    with pytest.raises(LearnError, match="line 2"):
        read_changed(lines, tmp_path, **changes)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"concept_steer_found": 2}', "[" * 100000, '{"a": NaN}'])
def test_a_file_that_is_not_a_scans_is_refused(text, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LearnError, match=r"other\.jsonl"):
        read_found(path)


def test_a_missing_file_a_line_too_long_and_a_picture_named_twice_are_refused(lines, tmp_path):
    with pytest.raises(LearnError, match="cannot be read"):
        read_found(tmp_path / "none.jsonl")
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(lines[0]) + "\n" + " " * 1000 + "1" * 2**20, encoding="utf-8")
    with pytest.raises(LearnError, match="line 2 is longer"):
        read_found(path)
    path.write_text("\n".join(json.dumps(one) for one in (lines[0], lines[1], lines[1])), encoding="utf-8")
    with pytest.raises(LearnError, match="twice"):
        read_found(path)


def test_a_folder_that_moved_is_named_when_reading(lines, tmp_path):
    found = read_found(tmp_path / "out" / "found.jsonl", tmp_path / "moved")
    assert found[0].file == tmp_path / "moved" / "a.png"


# --- the command line


def test_the_command_scans_and_prints_the_report(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(detectors.KNOWN, "qr", lambda threshold=0.5: Red())
    assert main(["erase", "scan", str(folder), "--detector", "qr=0.5", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "red spot: in 2 of 4 pictures" in said and "found.jsonl" in said


def test_the_command_explains_its_errors(folder, tmp_path, capsys):
    assert main(["erase", "scan", str(folder), "--detector", "nothing", "--out", str(tmp_path / "out")]) == 1
    assert "There is no detector 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["erase", "scan", str(folder), "--out", str(tmp_path / "out")])
