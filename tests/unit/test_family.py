from __future__ import annotations

import pytest

from concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer.family import FAMILIES, check, detect, family


@pytest.mark.parametrize("key", sorted(FAMILIES))
def test_every_known_family_is_detected_from_its_own_numbers(key):
    f = family(key)
    assert detect(cross_attention_dim=f.text_width, channels=f.channels, model_channels=f.model_channels) == key
    assert detect(cross_attention_dim=f.text_width, channels=f.channels) == key


def test_families_with_the_same_channels_are_told_apart_by_the_text_width():
    assert family("sd1").channels == family("sd2").channels == family("sdxl").channels == 1280
    assert len({detect(cross_attention_dim=w, channels=1280) for w in (768, 1024, 2048)}) == 3


def test_an_unlisted_model_becomes_a_custom_family_that_names_its_numbers():
    key = detect(cross_attention_dim=32, channels=64)
    assert key == "custom:32x64"
    assert (family(key).channels, family(key).text_width) == (64, 32)
    assert "unlisted" in family(key).title


def test_the_right_channels_with_another_model_width_are_not_taken_for_sd1():
    assert detect(cross_attention_dim=768, channels=1280, model_channels=64) == "custom:768x1280"


@pytest.mark.parametrize("key", ["sd9", "", "custom:", "custom:0x64", "custom:32x64x1", "custom:²x64"])
def test_an_unknown_family_lists_the_known_ones(key):
    with pytest.raises(ConceptSteerError, match=r"not known.*sd1.*sdxl.*demo"):
        family(key)


def test_the_same_family_passes_the_check():
    check("sd1", 1280, "sd1", 1280, source="woman.safetensors")
    check("custom:32x64", 64, "custom:32x64", 64, source="woman.safetensors")


def test_the_wrong_family_raises_naming_the_file_both_families_and_the_way_out():
    with pytest.raises(FamilyMismatch) as caught:
        check("sd1", 1280, "sdxl", 1280, source="woman.safetensors")
    for word in ("woman.safetensors", "Stable Diffusion 1.x", "SDXL", "learned on"):
        assert word in str(caught.value)


def test_two_different_custom_families_never_mix():
    with pytest.raises(FamilyMismatch, match=r"text width 32.*text width 48"):
        check("custom:32x64", 64, "custom:48x64", 64, source="woman")


def test_other_channels_in_the_same_family_raise_with_both_numbers():
    with pytest.raises(FamilyMismatch, match=r"1280 channels.*640"):
        check("sd1", 1280, "sd1", 640, source="woman")
