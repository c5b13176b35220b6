"""CLIP as the judge of an audit's pictures, on a small random one in transformers' layout."""

from __future__ import annotations

import sys

import pytest
import torch

from concept_steer.analysis.word_list import WordList
from concept_steer.errors import ConceptSteerError
from concept_steer.hosts.clip_judge import ClipJudge

transformers = pytest.importorskip("transformers")
VALUES = ("woman", "man")
WORDS = WordList(("doctor",), {"gender": {value: (f"a {value} {{}}",) for value in VALUES}}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from concept_steer.demo import model

    place = tmp_path_factory.mktemp("clip")
    model.write_tokenizer(model.read()[1], place)
    tokens = transformers.CLIPTokenizer.from_pretrained(str(place))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    text = transformers.CLIPTextConfig(**small, **ends, vocab_size=len(tokens), projection_dim=8)
    vision = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=8)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(place)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(place)
    return place


def test_every_picture_gets_the_value_whose_prompt_lies_nearest_by_clips_own_features(folder):
    judge = ClipJudge(folder, WORDS)
    pixels = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = judge.values("gender", VALUES, pixels)
    assert len(found) == 6 and set(found) <= set(VALUES)
    assert judge.values("gender", VALUES[::-1], pixels) == found  # the order of the values decides nothing
    assert judge.values("gender", VALUES, pixels[3:]) == found[3:]


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConceptSteerError, match="not a CLIP model"):
        ClipJudge(tmp_path, WORDS)


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConceptSteerError, match="pip install transformers"):
        ClipJudge(folder, WORDS)
