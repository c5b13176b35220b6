"""A pipeline's text encoders, reading prompts in which some words are token vectors of one's own, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning
from ..errors import LearnError
from .token_text import Piece, Vocabulary, pieces

KEYS = ("clip_l", "clip_g")


class DiffusersText:
    """Of a StableDiffusionPipeline (one text encoder) or a StableDiffusionXLPipeline (two)."""

    def __init__(self, pipe: Any) -> None:
        pairs = [(pipe.tokenizer, pipe.text_encoder)]
        if getattr(pipe, "text_encoder_2", None) is not None:
            pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
        if any(tokenizer is None or encoder is None for tokenizer, encoder in pairs):
            raise LearnError("This model was loaded without one of its text encoders: load all of it to learn tokens.")
        self._parts = dict(zip(KEYS, pairs, strict=False))
        self._device = pipe.unet.conv_in.weight.device

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def vectors_of(self, text: str) -> dict[str, Tensor]:
        """The token vectors of a text as the model has them, (n, width) fp32 by encoder; no start, no end."""
        found = {}
        for key, (tokenizer, encoder) in self._parts.items():
            ids = torch.tensor(_ids(tokenizer, text), dtype=torch.long)
            table = encoder.get_input_embeddings().weight
            found[key] = table[ids.to(table.device)].detach().float().cpu()
        return found

    def encode(self, prompts: Sequence[str], vocabulary: Vocabulary) -> Conditioning:
        """As the pipeline reads prompts; gradients pass to the vocabulary's vectors."""
        parts, pooled = [], None
        for key, (tokenizer, encoder) in self._parts.items():
            room = tokenizer.model_max_length - 2
            rows = [pieces(prompt, vocabulary, key, partial(_ids, tokenizer), room) for prompt in prompts]
            ids = torch.tensor([_framed(tokenizer, row) for row in rows], device=encoder.device)
            with _replaced(encoder, rows):
                if len(self._parts) == 1:
                    parts.append(encoder(ids)[0])
                else:
                    out = encoder(ids, output_hidden_states=True)
                    parts.append(out.hidden_states[-2])
                    pooled = out[0]
        return Conditioning(torch.cat(parts, -1).to(self._device), None if pooled is None else pooled.to(self._device))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _framed(tokenizer: Any, row: Sequence[Piece]) -> list[int]:
    """Numbers of a whole prompt; a vector's place holds 0, which is nobody's end."""
    inner = [0 if isinstance(one, Tensor) else one for one in row]
    framed = [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(framed))


@contextmanager
def _replaced(encoder: Any, rows: Sequence[Sequence[Piece]]) -> Iterator[None]:
    """Inside, the encoder's table of tokens gives the rows' own vectors at their places."""
    places = [(i, j + 1, one) for i, row in enumerate(rows) for j, one in enumerate(row) if isinstance(one, Tensor)]
    if not places:
        yield
        return

    def put(module: Any, inputs: Any, output: Tensor) -> Tensor:
        vectors = torch.stack([one for _, _, one in places]).to(output)
        at = tuple(torch.tensor([place[axis] for place in places], device=output.device) for axis in (0, 1))
        return output.index_put(at, vectors)

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
