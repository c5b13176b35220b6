"""The web UI's text encoders, reading prompts in which some words are token vectors of one's own, with gradients."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Conditioning
from ..errors import LearnError
from .token_text import Piece, Vocabulary, pieces

SDXL = ("clip_l", "clip_g")
NOT_ITS_OWN = object()


class WebuiText:
    """Of SD 1.x, SD 2.x, SDXL or the embedded model, in AUTOMATIC1111 and Forge: see `engines_of`.

    Prompts are read by the web UI's own engines, as a batch of its own is; only how a line is cut into tokens is ours,
    and vectors take the place that those of an embedding's file would take. So brackets are no weights, and a prompt
    ends after 75 tokens. read: the web UI's conditioning of a list of prompts. Errors: LearnError for another model.
    """

    def __init__(self, sd_model: Any, read: Callable[[Any], Conditioning]) -> None:
        self._engines, self._read = engines_of(sd_model), read

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def vectors_of(self, text: str) -> dict[str, Tensor]:
        """The token vectors of a text as the model has them, (n, width) fp32 by encoder; no start, no end."""
        found = {}
        for key, engine in self._engines.items():
            table = _table(engine)
            ids = torch.tensor(engine.tokenize([text])[0], dtype=torch.long, device=table.device)
            found[key] = table.detach()[ids].float().cpu().clone()
        return found

    def encode(self, prompts: Sequence[str], vocabulary: Vocabulary) -> Conditioning:
        """As the web UI reads plain prompts; gradients pass to the vocabulary's vectors."""
        with ExitStack() as inside:
            for key, engine in self._engines.items():
                inside.enter_context(_replaced(engine, "tokenize_line", partial(self._line, key, engine, vocabulary)))
                if hasattr(engine, "is_trainable"):  # sgm switches gradients off for what is not
                    inside.enter_context(_replaced(engine, "is_trainable", True))
                if (own := self._copies.get(key)) is not None:
                    inside.enter_context(_replaced(engine, "text_encoder", own))
            return self._read(list(prompts))

    def _line(self, key: str, engine: Any, vocabulary: Vocabulary, line: str) -> tuple[list[Any], int]:
        """One chunk for a prompt, as the engine's own method gives a list of them."""
        found = pieces(line, vocabulary, key, lambda text: engine.tokenize([text])[0], engine.chunk_length)
        return [_chunk(engine, key, found)], len(found)

    @cached_property
    def _copies(self) -> dict[str, nn.Module]:
        """Text encoders that were made inside torch.inference_mode, which no gradient passes, as copies."""
        made = {}
        for key, engine in self._engines.items():
            own = getattr(engine, "text_encoder", None)
            if own is not None and any(weight.is_inference() for weight in own.parameters()):
                kept = {id(engine.embeddings): engine.embeddings}  # it hands the vectors over
                with torch.inference_mode(False), torch.no_grad():
                    made[key] = copy.deepcopy(own, kept).requires_grad_(False)
        return made


def engines_of(sd_model: Any) -> dict[str, Any]:
    """What cuts and reads prompts, by the names that files of embeddings use. Errors: LearnError."""
    if hasattr(sd_model, "forge_objects"):
        names = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")
        parts = [getattr(sd_model, name, None) for name in names]
    else:
        one = [getattr(sd_model, "cond_stage_model", None)]
        parts = list(getattr(getattr(sd_model, "conditioner", None), "embedders", one))
    found = dict(zip(SDXL, (part for part in parts if hasattr(part, "tokenize_line")), strict=False))
    if not found or any(not hasattr(engine, "tokenize") for engine in found.values()):
        raise LearnError(
            f"The text encoder of this model ({type(sd_model).__name__}) cannot learn tokens here: choose an SD 1.x, "
            "SD 2.x or SDXL checkpoint."
        )
    return found


def whole_gradient(method: Any) -> Any:
    """A bound method without the torch.inference_mode around it, which Forge puts there."""
    return partial(inspect.unwrap(method.__func__), method.__self__)


def _chunk(engine: Any, key: str, found: Sequence[Piece]) -> Any:
    """The engine's PromptChunk of a whole prompt: numbers, and a place with a vector for each Tensor."""
    kinds: Any = importlib.import_module(type(engine).empty_chunk.__module__)
    chunk = kinds.PromptChunk()
    ids = [0 if isinstance(piece, Tensor) else piece for piece in found]
    chunk.tokens = [engine.id_start, *ids, *[engine.id_end] * (engine.chunk_length + 1 - len(ids))]
    chunk.multipliers = [1.0] * len(chunk.tokens)
    for place, piece in enumerate(found):
        if isinstance(piece, Tensor):
            vec = SimpleNamespace(vec={key: piece[None]}, vectors=1, name=key, shorthash=None)
            chunk.fixes.append(kinds.PromptChunkFix(place, vec))
    return chunk


def _table(engine: Any) -> Tensor:
    """The token vectors of the engine's text encoder, (vocabulary, width)."""
    owner = getattr(engine, "wrapped", None) or engine.text_encoder
    for module in owner.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings > engine.chunk_length + 2:
            return module.weight
    raise LearnError(f"The text encoder {type(owner).__name__} has no table of token vectors.")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an object has another attribute than its class or itself gives."""
    before = owner.__dict__.get(name, NOT_ITS_OWN)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is NOT_ITS_OWN:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
