"""Who looks at an audit's pictures on models without judges of their own: a CLIP model from a folder of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.word_list import WordList
from ..errors import ConceptSteerError
from ..pictures import to_images


class ClipJudge:
    """Zero-shot CLIP: the value whose prompt (the list's neutral one with that value) has the largest cosine.

    folder: a CLIPModel with its processor in transformers' layout. Nothing is downloaded. CLIP has biases of its own.
    """

    def __init__(self, folder: Path | str, words: WordList) -> None:
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise ConceptSteerError(
                f"A CLIP judge needs transformers, which cannot be imported ({error}): pip install transformers, or "
                "leave --judge out."
            ) from error
        try:
            loader: Any = CLIPModel
            self._model = loader.from_pretrained(str(folder), local_files_only=True).eval()
            self._pictures = CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
            self._words = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ConceptSteerError(
                f"{folder} is not a CLIP model in the layout of transformers ({reason}): name its folder, or leave "
                "--judge out."
            ) from None
        self.name = f"CLIP ({Path(folder).name})"
        self._list = words

    @torch.no_grad()
    def values(self, attribute: str, values: Sequence[str], pixels: Tensor) -> list[str]:
        role = self._list.neutral.removeprefix("a ").removeprefix("an ")
        texts = [f"a photo of {self._list.named(role, attribute, value)[0]}" for value in values]
        tokens = self._words(texts, padding=True, return_tensors="pt")
        images = self._pictures(images=to_images(pixels), return_tensors="pt")
        found = self._model(**tokens, pixel_values=images["pixel_values"])
        return [values[i] for i in found.logits_per_image.argmax(1).tolist()]
