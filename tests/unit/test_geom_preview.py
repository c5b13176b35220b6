"""What a face needs of erasing: a list of its embeddings, a check that one fits, and pictures to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from concept_steer.errors import LearnError
from concept_steer.geom_erasing import lora
from concept_steer.geom_erasing.dataset import Scan
from concept_steer.geom_erasing.dataset_report import sheet
from concept_steer.geom_erasing.embedding import MAX_HEADER, LocationTokens, kept_in
from concept_steer.geom_erasing.found_file import Found
from concept_steer.geom_erasing.preview import ErasingPreview
from concept_steer.geom_erasing.using import check_fit
from concept_steer.hosts.diffusers import DiffusersDenoiser
from tests.unit.tiny_diffusers import TEXT_WIDTH, tiny_sd


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return DiffusersDenoiser(tiny_sd(tmp_path_factory.mktemp("sd")))


def tokens(name: str = "no-bar", width: int = TEXT_WIDTH, keys: tuple[str, ...] = ("clip_l",)) -> LocationTokens:
    generator = torch.Generator().manual_seed(4)
    words = {key: torch.randn(1, width, generator=generator) for key in keys}
    places = {key: torch.randn(4, width, generator=generator) for key in keys}
    return LocationTokens(name, "bar", 2, words, places)


def test_only_embeddings_of_erasing_are_listed_by_the_name_a_prompt_calls(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    tokens().save(first / "no-bar.safetensors")
    tokens().save(second / "sub" / "renamed.safetensors")
    tokens().save(second / "no-bar.safetensors")
    save_file({"emb": torch.zeros(2, 8)}, second / "other.safetensors")
    (second / "broken.safetensors").write_bytes(b"\xff" * 40)
    (second / "short.safetensors").write_bytes(b"\x01")
    (second / "long.safetensors").write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    (second / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (second / "folder.safetensors").mkdir()
    found = kept_in([first, second, tmp_path / "missing"])
    assert found == {"no-bar": first / "no-bar.safetensors", "sub/renamed": second / "sub" / "renamed.safetensors"}


def test_an_embedding_of_another_model_does_not_fit(sd):
    reader = sd.text_reader()
    check_fit(tokens(), reader)
    with pytest.raises(LearnError, match=f"tokens of 8 numbers, this model has {TEXT_WIDTH}"):
        check_fit(tokens(width=8), reader)
    with pytest.raises(LearnError, match="another kind of model"):
        check_fit(tokens(keys=("clip_l", "clip_g")), reader)


def test_a_sheet_is_drawn_of_pictures_in_memory():
    files = [Path("picture 1"), Path("picture 2")]
    found = [
        Found(files[0], "", {"bar": [(0.25, 0.25, 0.75, 0.75)]}, "", (64, 64), {"bar": 0.9}),
        Found(files[1], "", {}, "", (64, 64), {"bar": 0.1}),
    ]
    grey = {file: Image.new("RGB", (64, 64), (120, 120, 120)) for file in files}
    made = np.asarray(sheet(Scan(found, (), 0, ["bar"], True, Path()), Path(), grey)).astype(int)
    assert (np.abs(made - 120).max(2) < 3).sum() > 2 * 100 * 100, "both pictures are in it"
    red = (made[..., 0] > 200) & (made[..., 1] < 80)
    assert red.sum() > 200, "and one has a box"
    assert all(np.asarray(image).std() == 0 for image in grey.values()), "the pictures themselves stay clean"


def test_a_preview_shows_the_tokens_as_negative_prompt_and_the_lora_of_the_same_denoiser(sd):
    class Drawing:
        """Latents as pictures: the tiny models have no VAE that is worth looking at."""

        def __getattr__(self, name):
            return getattr(sd, name)

        def decode(self, latents):
            return latents[:, :3].clamp(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)

    preview = ErasingPreview(Drawing(), ["a cat", ""], [1, 2], steps=2)
    preview.begin()
    before = [np.asarray(image) for image in preview.before]
    same, erased = (np.asarray(preview.sheet(one)) for one in (None, tokens()))
    assert same.shape != erased.shape or not np.array_equal(same, erased)
    state = {}
    with lora.adapted(sd, 2):
        state = {name: torch.ones_like(value) * 0.05 for name, value in lora.state_of(sd).items()}
    with lora.adapted(sd, 2, state=state):
        worn = np.asarray(preview.sheet(None))
    assert not np.array_equal(worn, same)
    assert all(np.array_equal(one, np.asarray(image)) for one, image in zip(before, preview.before, strict=True))
