"""Whose rows a UNet call of the web UIs holds: the prompt's or the negative prompt's, and of which picture.

AUTOMATIC1111 runs the rows of one evaluation in a fixed order, prompts first, in calls of whatever size; nothing in a
call says which rows it holds, so they are counted. Forge names each chunk of a call, the negative prompt's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import ConceptSteerError


class Row(NamedTuple):
    """cond: the prompt's. picture: number within the batch."""

    cond: bool
    picture: int


def rows_in_order(parts: Sequence[int], total: int) -> list[Row]:
    """The rows of one evaluation as AUTOMATIC1111 orders them. parts: prompts joined by AND, for each picture.

    First all prompts of picture 0, then those of picture 1, ...; then the negative prompts of all pictures, once or
    (InstructPix2Pix models have a third kind of row) twice. Errors: ConceptSteerError for another total.
    """
    pictures = len(parts)
    conds, rest = sum(parts), total - sum(parts)
    if pictures == 0 or rest < 0 or rest % pictures:
        raise ConceptSteerError(
            f"The batch has {total} rows for {pictures} pictures with {conds} prompts: its layout is not understood, "
            "so nothing can be steered. Another extension may change the batch; switch it off to find which."
        )
    rows = [Row(True, picture) for picture, many in enumerate(parts) for _ in range(many)]
    return rows + [Row(False, i % pictures) for i in range(rest)]


def rows_of_chunks(cond_or_uncond: Sequence[int], total: int) -> list[Row]:
    """The rows of one call in Forge and reForge: one chunk of all pictures per entry, 0 for a prompt, 1 for a negative.

    Errors: ConceptSteerError when the rows cannot be shared out evenly.
    """
    chunks = len(cond_or_uncond)
    if chunks == 0 or total % chunks:
        raise ConceptSteerError(
            f"The batch has {total} rows for {chunks} prompts: its layout is not understood, so nothing can be "
            "steered. Another extension may change the batch; switch it off to find which."
        )
    each = total // chunks
    return [Row(kind == 0, picture) for kind in cond_or_uncond for picture in range(each)]


class Count:
    """The rows of one evaluation, handed out call by call.

    negative: the negative prompts' embeddings (pictures, L, D), by which further calls of other extensions (perturbed
    attention, ...) are told apart. Their rows are prompts unless their embedding is a negative prompt's.
    """

    def __init__(self, parts: Sequence[int], total: int, negative: Tensor | None = None) -> None:
        self.rows = rows_in_order(parts, total)
        self.parts, self.negative = tuple(parts), negative
        self.taken = 0

    def take(self, count: int, context: Tensor | None = None) -> list[Row]:
        """The next `count` rows. context: their embeddings (count, L, D), if known.

        Errors: ConceptSteerError for a further call whose rows belong to no picture.
        """
        rows = self.rows[self.taken : self.taken + count]
        same = self._negative(rows, context)
        # after a step without negative prompts the next call may claim their rows, with other embeddings
        if len(rows) < count or any(not row.cond and known is False for row, known in zip(rows, same, strict=True)):
            return self._further(count, context)
        self.taken += count
        return rows

    def _further(self, count: int, context: Tensor | None) -> list[Row]:
        pictures, prompts = len(self.parts), [row for row in self.rows if row.cond]
        if count == len(prompts):
            rows = prompts
        elif count % pictures == 0:
            rows = [Row(True, i % pictures) for i in range(count)]
        else:
            raise ConceptSteerError(
                f"Another extension ran the model with {count} more rows, which do not fit the {pictures} pictures of "
                "the batch: whose they are is not known, so nothing can be steered. Switch that extension off."
            )
        same = self._negative(rows, context)
        return [Row(not known, row.picture) for row, known in zip(rows, same, strict=True)]

    def _negative(self, rows: Sequence[Row], context: Tensor | None) -> list[bool | None]:
        """For each row whether its embedding is its picture's negative prompt's; None where that cannot be said."""
        negative = self.negative
        if context is None or negative is None or context.shape[1:] != negative.shape[1:]:
            return [None] * len(rows)
        if len(rows) != context.shape[0] or not rows:
            return [None] * len(rows)
        of_rows = negative[[row.picture % negative.shape[0] for row in rows]].to(context)
        return (of_rows == context).flatten(1).all(1).tolist()
