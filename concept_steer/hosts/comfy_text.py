"""A CLIP of ComfyUI, reading prompts in which some words are token vectors of one's own, with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Conditioning
from ..errors import LearnError
from .token_text import Piece, Vocabulary, pieces

# ComfyUI's names of text encoders, as its tokenizers give them -> ours, which are those of embedding files
ENCODERS = {("l",): ("clip_l",), ("h",): ("clip_l",), ("demo",): ("clip_l",), ("g", "l"): ("clip_g", "clip_l")}

VECTOR = "*"


class ComfyText:
    """Of SD 1.x, SD 2.x, SDXL or the embedded model.

    ComfyUI makes weights inside torch.inference_mode, which no gradient passes, and adds in place. So the first prompt
    that is read takes a copy of the text encoders, which lives as long as this reader. Prompts are read literally:
    brackets are no weights. placed: brings what was read to where it is used. Errors: LearnError for another CLIP.
    """

    def __init__(self, clip: Any, placed: Callable[[Conditioning], Conditioning] = lambda cond: cond) -> None:
        names = tuple(sorted(clip.tokenize("")))
        if names not in ENCODERS:
            raise LearnError(
                f"This CLIP has the text encoders {', '.join(names)}: tokens can be learned for SD 1.x, SD 2.x and "
                "SDXL. Use the CLIP of such a checkpoint."
            )
        self._clip, self._placed = clip, placed
        self._names = dict(sorted(zip(ENCODERS[names], names, strict=True), reverse=True))  # clip_l first, as SDXL

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(self._names)

    def vectors_of(self, text: str) -> dict[str, Tensor]:
        """The token vectors of a text as the model has them, (n, width) fp32 by encoder; no start, no end."""
        found = {}
        for key in self._names:
            table = _part(self._clip.cond_stage_model, self._names[key]).transformer.get_input_embeddings().weight
            ids = torch.tensor(self._ids(key, text), dtype=torch.long)
            found[key] = table.detach()[ids.to(table.device)].float().cpu()
        return found

    def encode(self, prompts: Sequence[str], vocabulary: Vocabulary) -> Conditioning:
        """As CLIPTextEncode reads prompts; gradients pass to the vocabulary's vectors."""
        parts, pooled = [], None
        for key, name in self._names.items():
            room = int(self._tokenizer(key).max_length) - 2
            rows = [pieces(prompt, vocabulary, key, partial(self._ids, key), room) for prompt in prompts]
            embeds, pooled = _part(self._copy, name).encode([self._framed(key, row) for row in rows])[:2]
            parts.append(embeds)
        return self._placed(Conditioning(torch.cat(parts, -1), pooled))

    @cached_property
    def _copy(self) -> Any:
        clip = self._clip
        clip.load_model()  # with the LoRAs that are on it
        with torch.inference_mode(False), torch.no_grad():
            made = copy.deepcopy(clip.cond_stage_model).requires_grad_(False)
        made.reset_clip_options()
        if clip.layer_idx is not None:
            made.set_clip_options({"layer": clip.layer_idx})
        for module in made.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(_own_input)
        return made

    def _ids(self, key: str, text: str) -> list[int]:
        return list(self._tokenizer(key).tokenizer(text)["input_ids"])[1:-1]  # without start and end

    def _framed(self, key: str, row: Sequence[Piece]) -> list[Piece]:
        """A whole prompt as ComfyUI takes it: numbers, and tensors for vectors."""
        tokens = self._tokenizer(key)
        framed = [tokens.start_token, *row, tokens.end_token]
        return framed + [tokens.pad_token] * (tokens.max_length - len(framed))

    def _tokenizer(self, key: str) -> Any:
        return _part(self._clip.tokenizer, self._names[key])


def _part(of: Any, name: str) -> Any:
    """The text encoder or the tokenizer of this name."""
    return getattr(of, f"clip_{name}")


def _own_input(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """ComfyUI's encoder goes on adding to this tensor in place, and the norm's gradient needs it as it was."""
    return (given[0].clone(), *given[1:])


def tokens_of(clip: Any, prompt: str) -> list[list[str]]:
    """The tokens of a prompt as CLIPTextEncode takes them, in chunks of up to 75; a vector of an embedding is VECTOR.

    Start, end and padding are left out, and emphasis counts as it does there.
    """
    rows = clip.tokenize(prompt, return_word_ids=True)
    name = "l" if "l" in rows else next(iter(rows))
    words = _part(clip.tokenizer, name).inv_vocab
    return [
        [VECTOR if isinstance(token, Tensor) else words[token].removesuffix("</w>") for token, _, word in row if word]
        for row in rows[name]
    ]
