"""Prompts in which some words stand for token vectors of one's own, cut into pieces that any text encoder can read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..errors import LearnError

Vocabulary = Mapping[str, Mapping[str, Tensor]]  # word -> text encoder -> (n, width)
Piece = int | Tensor  # a token's number, or one vector (width,)


def pieces(
    prompt: str, vocabulary: Vocabulary, encoder: str, tokens: Callable[[str], Sequence[int]], room: int
) -> list[Piece]:
    """The prompt's tokens in order, without start and end; at most `room` of them.

    tokens: of a text. Where there are too many, text is left out, the earliest piece's end first, and no vector.
    Errors: LearnError when the vectors alone do not fit, or a word has none for this encoder.
    """
    found: list[list[Piece]] = []
    own: list[bool] = []
    for part in _split(prompt, vocabulary):
        mine = part in vocabulary
        if mine and encoder not in vocabulary[part]:
            raise LearnError(
                f"The embedding {part!r} was made for {', '.join(vocabulary[part])}, and this model also reads "
                f"{encoder}: use one that was learned on this kind of model."
            )
        found.append(list(vocabulary[part][encoder].unbind(0)) if mine else list(tokens(part)))
        own.append(mine)
    over = sum(map(len, found)) - room
    for place, mine in enumerate(own):
        if over > 0 and not mine:
            kept = max(0, len(found[place]) - over)
            over -= len(found[place]) - kept
            found[place] = found[place][:kept]
    if over > 0:
        raise LearnError(
            f"The embeddings of this prompt have {room + over} vectors, but a prompt has room for {room}: use fewer of "
            "them, or learn them with fewer bins."
        )
    return [one for part in found for one in part]


def _split(prompt: str, vocabulary: Vocabulary) -> list[str]:
    if not vocabulary:
        return [prompt] if prompt.strip() else []
    words = "|".join(re.escape(word) for word in sorted(vocabulary, key=len, reverse=True))
    parts = re.split(rf"(?<![\w-])({words})(?![\w-])", prompt)
    return [part for part in parts if part.strip()]
