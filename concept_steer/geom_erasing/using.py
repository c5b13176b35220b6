"""A model that knows learned embeddings by their words, without a change to it or to its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..denoiser import Conditioning, Denoiser
from ..errors import LearnError
from .descent import TextReader
from .embedding import LocationTokens


def check_fit(embedding: LocationTokens, reader: TextReader) -> None:
    """Errors: LearnError when the embedding is not for this reader's model."""
    if set(embedding.words) != set(reader.encoders):
        raise LearnError(
            f"The embedding {embedding.name!r} was learned on another kind of model: it cannot be read here."
        )
    for key, rows in embedding.words.items():
        width = reader.vectors_of("a")[key].shape[-1]
        if rows.shape[-1] != width:
            raise LearnError(
                f"The embedding {embedding.name!r} has tokens of {rows.shape[-1]} numbers, this model has {width}: "
                "use one that was learned on this family of models."
            )


class KnowingDenoiser:
    """A Denoiser like `denoiser`, in whose prompts the embeddings' names stand for their vectors."""

    def __init__(self, denoiser: Any, embeddings: Sequence[LocationTokens]) -> None:
        names = [one.name for one in embeddings]
        if len(set(names)) < len(names):
            raise LearnError(f"Two embeddings have the same name ({', '.join(sorted(names))}): rename one.")
        self._denoiser, self._reader = denoiser, denoiser.text_reader()
        for one in embeddings:
            check_fit(one, self._reader)
        self._vocabulary = {word: rows for one in embeddings for word, rows in one.vocabulary().items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self._reader.encode(list(prompts), self._vocabulary)


def knowing(denoiser: Denoiser, embeddings: Sequence[LocationTokens]) -> Denoiser:
    """`denoiser` with the embeddings' words. Errors: LearnError for embeddings of another model family."""
    return KnowingDenoiser(denoiser, embeddings) if embeddings else denoiser  # type: ignore[return-value]
