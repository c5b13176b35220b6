"""Names of vectors: near words are told apart by what is steady over contexts."""

from __future__ import annotations

import pytest
import torch
from tiny_diffusers import tiny_denoiser

from concept_steer import ConceptVector
from concept_steer.analysis.names import Names, read_names
from concept_steer.analysis.reading import Reader, ReadSettings
from concept_steer.analysis.word_list import CONTEXTS, in_contexts, parsed, shipped
from concept_steer.errors import SettingError

pytest.importorskip("diffusers")
CHANNELS = 192  # of the embedded model


def vector(tensor: torch.Tensor) -> ConceptVector:
    return ConceptVector(tensor.float(), "demo", "asked")


def two_near_words(contexts: int = 40) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Changes of two words that share the first channel, where contexts differ much, and differ in the second, where
    they hardly do; and the words' true directions."""
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.eye(CHANNELS)[0] * 10, torch.eye(CHANNELS)[1] * 0.5
    spread = torch.full((CHANNELS,), 0.01)
    spread[0] = 3.0
    changes = {
        name: shared + sign * own + torch.randn(contexts, CHANNELS, generator=generator) * spread
        for name, sign in (("dusk", 1), ("dark", -1))
    }
    return changes, shared + own, shared - own


def test_near_words_are_told_apart_by_what_is_steady_over_contexts():
    changes, dusk, dark = two_near_words()
    other = torch.eye(CHANNELS)[0] * 4  # the shared part may well be of another size
    names = Names.of(changes)
    assert names.nearest(vector(dusk - other), 1)[0][0] == "dusk"
    assert names.nearest(vector(dark + other), 1)[0][0] == "dark"
    (first, high), (_, low) = names.nearest(vector(dusk), 2)
    assert first == "dusk" and high > low + 0.2  # the plain cosines are .99 both


def test_a_vector_that_words_hardly_explain_is_held_to_the_plain_cosine():
    changes, dusk, _ = two_near_words()
    stray = torch.eye(CHANNELS)[5] * 200
    (_, high), (_, low) = Names.of(changes).nearest(vector(dusk + stray), 2)
    cosines = [torch.nn.functional.cosine_similarity(rows.mean(0), dusk + stray, dim=0) for rows in changes.values()]
    assert high - low < 0.02 and high == pytest.approx(float(max(cosines)), abs=0.01)


def test_words_in_a_single_context_are_compared_by_the_plain_cosine():
    rows = torch.randn(3, 1, CHANNELS, generator=torch.Generator().manual_seed(1))
    names = Names.of(dict(zip("abc", rows, strict=True)))
    own = rows[1, 0] + 0.3 * rows[0, 0]
    found = dict(names.nearest(vector(own), 3))
    for name, row in zip("abc", rows, strict=True):
        assert found[name] == pytest.approx(float(torch.nn.functional.cosine_similarity(row[0], own, dim=0)), abs=1e-5)


def test_the_opposite_of_a_word_comes_last():
    changes, _, dark = two_near_words()
    names = Names.of({**changes, "bright": -changes["dark"]})
    found = names.nearest(vector(dark), 3)
    assert found[0][0] == "dark" and found[-1] == ("bright", pytest.approx(-found[0][1], abs=0.1))


def test_the_size_of_a_vector_changes_no_name():
    changes, dusk, _ = two_near_words()
    names = Names.of(changes)
    small, large = names.nearest(vector(dusk * 0.1), 2), names.nearest(vector(dusk * 30), 2)
    assert [name for name, _ in small] == [name for name, _ in large]
    assert [value for _, value in small] == pytest.approx([value for _, value in large], abs=1e-4)


def test_maps_are_averaged_first():
    changes, dusk, _ = two_near_words()
    names = Names.of(changes)
    spread = dusk[:, None, None].expand(-1, 2, 2)
    assert names.nearest(vector(spread), 1)[0][1] == pytest.approx(names.nearest(vector(dusk), 1)[0][1], abs=1e-6)


def test_no_words_at_all_are_refused():
    with pytest.raises(SettingError, match="no words"):
        Names.of({})


def test_a_words_own_change_is_named_by_it_in_a_real_unet():
    listed = parsed(
        {
            "roles": ["cook", "nurse", "house"],
            "attributes": {"g": {"woman": "a woman {}", "man": "a man {}"}},
            "words": {"colours": ["{} in red", "{} in blue"]},
        },
        "the test",
    )
    contexts = in_contexts(listed)
    assert {name: len(pairs) for name, pairs in contexts.items()} == dict.fromkeys(
        ("woman", "man", "in red", "in blue"), 4
    )
    reader = Reader(tiny_denoiser("mid only"), ReadSettings(seeds=2))
    names = read_names(reader, contexts)
    for name in contexts:
        one = ConceptVector(names.words[name].float(), reader.denoiser.family, "asked")
        assert names.nearest(one, 1)[0] == (name, pytest.approx(1.0, abs=1e-3))


def test_names_are_read_in_one_space_only():
    reader = Reader(tiny_denoiser("mid only"), ReadSettings(seeds=1, space="map"))
    with pytest.raises(SettingError, match="mean"):
        read_names(reader, {"x": [("a red house", "a house")]})


def test_a_word_is_read_in_many_roles_but_never_more_than_there_are():
    pairs = in_contexts(shipped())
    assert {len(many) for many in pairs.values()} == {CONTEXTS}
    few = parsed({"roles": ["cook"], "attributes": {"g": {"a": "a {} a", "b": "a {} b"}}}, "the test")
    assert {len(many) for many in in_contexts(few).values()} == {2}
