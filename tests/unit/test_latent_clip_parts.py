"""One part of the latent CLIP's table measured again: the others stay, figures and tables, to the letter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from concept_steer.errors import ConceptSteerError
from concept_steer.evaluate import latent_clip as evaluated
from concept_steer.evaluate.figures import Figure, read, read_sections, write


def figure(method: str, value: float, **extra: str) -> Figure:
    return Figure(method, "inappropriate_rate", value, None, None, 4, "a command", extra)


@pytest.fixture
def measure(tmp_path) -> SimpleNamespace:
    """A folder with a table of all parts; the model is only named."""
    figures = [figure("a", 1.0, attribute="role"), figure("b", 2.0, prompts="harmless"), figure("c", 3.0, part="noise")]
    sections = [("How", "this ## is no heading"), ("Towers", "one"), ("Answers", "| two |"), ("Noise", "three")]
    write(tmp_path, "latent_clip", figures, title="Latent-CLIP, measured", sections=sections)
    named = SimpleNamespace(checkpoint_hash="0123456789ab", dtype="torch.float32")
    return SimpleNamespace(out=tmp_path, denoiser=named)


def test_only_the_named_part_is_measured_and_the_rest_stays(measure, monkeypatch):
    new = [("Answers", "| four |"), ("Both together", "five")]
    monkeypatch.setattr(
        evaluated, "PARTS", {**evaluated.PARTS, "guard": lambda *_: ([figure("b", 9.0, prompts="harmless")], new)}
    )
    before = read(measure.out / "latent_clip.json")
    evaluated.run(measure, "a command", parts=["guard"])
    after = read(measure.out / "latent_clip.json")
    assert [after[0], after[2]] == [before[0], before[2]] and after[1].value == 9.0
    assert read_sections(measure.out / "latent_clip.md") == [
        ("How", "this ## is no heading"),
        ("Towers", "one"),
        *new,
        ("Noise", "three"),
    ]


def test_without_a_table_all_parts_are_asked_for(measure):
    (measure.out / "latent_clip.json").unlink()
    with pytest.raises(ConceptSteerError, match="measure all of them"):
        evaluated.run(measure, "a command", parts=["guard"])
