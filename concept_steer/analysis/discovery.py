"""Find directions and name them: the whole of "discover" as the command line and ComfyUI offer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..denoiser import Denoiser
from ..errors import LearnError
from ..learn.found import FoundDirection, named
from ..learn.unsupervised import jacobian_directions, principal_directions
from .naming import WORDS, fill, nearest, prompt_directions

METHODS = ("pca", "jacobian")
NAMES = 3  # per direction
Advance = Callable[[int, int], None]


def discover(
    denoiser: Denoiser,
    prompts: Sequence[str],
    *,
    method: str = "pca",
    words: Sequence[str] = (),
    neutral: str = "",
    reading: Advance | None = None,
    naming: Advance | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> list[FoundDirection]:
    """Named directions, by `principal_directions` (pca) or `jacobian_directions`, which take the options.

    words: see `naming.fill`; none: the built-in ones, or for the embedded model those of its own world if the caller
    gives them. neutral: what the words are compared with, by default the first prompt. When stop() becomes True while
    names are read, the directions come back without names. reading and naming are told (done, total).
    """
    if method not in METHODS:
        raise LearnError(f"There is no method {method!r} to find directions; known are {', '.join(METHODS)}.")
    asked = [prompt.strip() for prompt in prompts if prompt.strip()]
    find = principal_directions if method == "pca" else jacobian_directions
    found = find(denoiser, asked, progress=reading, stop=stop, **options)
    given = fill(words or WORDS, neutral or asked[0])
    if stop is not None and stop():
        return found
    try:
        table = prompt_directions(
            denoiser,
            given,
            neutral or asked[0],
            seed=options.get("seed", 0),
            guidance=options.get("guidance", 5.0),
            batch=options.get("batch", 16),
            progress=naming,
            stop=stop,
        )
    except LearnError:
        if stop is not None and stop():
            return found
        raise
    return [named(one, nearest(one.vector, table, NAMES)) for one in found]
