"""Running out of memory while learning, told in words with the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ..errors import LearnError

ADVICE = (
    "take fewer rows at once (batch), half precision (float16) or smaller pictures, or close what else uses the device"
)
# CUDA, ROCm and MPS say the first; the CPU's allocator one of the others
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")

Given = ParamSpec("Given")
Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch (on any device) or Python raises when there is no memory left."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def with_memory_advice(learn: Callable[Given, Result]) -> Callable[Given, Result]:
    """`learn`, but memory that runs out is a LearnError that says what to do."""

    @functools.wraps(learn)
    def advised(*args: Given.args, **options: Given.kwargs) -> Result:
        try:
            return learn(*args, **options)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise LearnError(
                f"There is not enough memory to learn on this device ({said}). To learn, {ADVICE}."
            ) from error

    return advised
