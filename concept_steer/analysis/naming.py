"""Names for directions: prompts themselves are directions of h-space (after Zeng, Chen and Wong, 2410.21314).

v[p] = mean over seeds and timesteps of h(x_t, p) - h(x_t, neutral), both from the same x_t; a direction's names are
the prompts of largest cosine. The paper does not publish its pooling and timesteps: this construction is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import LearnError
from ..learn.readings import readings
from ..learn.result import encode, rows
from ..vector import ConceptVector

# Ordinary words about pictures; {} is the neutral prompt. People, moods, looks, places, light, styles.
WORDS = (
    "{}, a woman", "{}, a man", "{}, a child", "{}, a young person", "{}, an old person", "{}, a crowd",
    "{} with light skin", "{} with dark skin", "{} with long hair", "{} with short hair", "{} with a beard",
    "{} with glasses", "{} with a hat", "{}, smiling", "{}, laughing", "{}, sad", "{}, angry", "{}, surprised",
    "{}, close-up", "{}, seen from afar", "{}, seen from the side", "{}, large", "{}, small", "{}, rich", "{}, poor",
    "{}, old", "{}, new", "{}, in a room", "{}, in a city", "{} in the forest", "{} at the sea", "{} in the mountains",
    "{} in the desert", "{} in snow", "{}, in spring", "{}, in autumn", "{}, at night", "{}, at sunset", "{} in rain",
    "{} in fog", "{}, bright", "{}, dark", "{}, colourful", "{}, black and white", "{}, red", "{}, green", "{}, blue",
    "{}, yellow", "{}, a photograph", "{}, an oil painting", "{}, a drawing", "{}, a cartoon", "{}, a sculpture",
    "{}, blurred", "{}, detailed", "{}, on a white background",
)  # fmt: skip
MOMENTS = (0.0, 0.25, 0.5)


def fill(words: Sequence[str], neutral: str) -> dict[str, str]:
    """Name -> prompt for words such as "a woman" or "{} at night": {} becomes the neutral prompt, the rest the name."""
    named: dict[str, str] = {}
    for word in dict.fromkeys(word.strip() for word in words):
        name = " ".join(word.replace("{}", " ").strip(" ,").split())
        for start in ("an ", "a ", "with a ", "with ", "on a ", "in the ", "in a ", "in ", "at the ", "at "):
            if name.startswith(start) and len(name) > len(start):
                name = name.removeprefix(start)
                break
        prompt = word.replace("{}", neutral)
        if name and prompt != neutral:
            named[name] = prompt
    return named


def prompt_directions(
    denoiser: Denoiser,
    prompts: Mapping[str, str] | Sequence[str],
    neutral: str,
    *,
    seeds: int = 4,
    timesteps: Sequence[float] = MOMENTS,
    steps: int = 8,
    guidance: float = 5.0,
    seed: int = 0,
    batch: int = 16,
    spatial: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, ConceptVector]:
    """Name -> vector (C,), or (C, H, W) with spatial, for every prompt (its own name, unless a mapping gives others).

    timesteps: shares of sampling at which h is read, on the neutral prompt's trajectories of `seeds` seeds. Those are
    drawn once (whole UNet rows); each prompt then costs one row of the encoder half a seed and timestep, and with
    timesteps (0,) nothing but the encoder half is used. progress(done, total) counts prompts times reading batches.
    Errors: LearnError for no prompt, one equal to the neutral one, NaN, or stop() True.
    """
    given = dict(prompts) if isinstance(prompts, Mapping) else {prompt: prompt for prompt in prompts}
    if not given or seeds < 1 or neutral in given.values():
        raise LearnError(
            f"Directions need at least one seed and one prompt, all different from the neutral {neutral!r}."
        )
    sums: dict[str, Tensor] = {}
    done, total = 0, len(given) * len(timesteps) * ((seeds + batch - 1) // batch)
    with torch.inference_mode(False), torch.no_grad(), denoiser.frozen():
        encoded = encode(denoiser, list(given.values()))
        for read in readings(
            denoiser,
            [neutral] * seeds,
            [seed + i for i in range(seeds)],
            timesteps,
            steps=steps,
            guidance=guidance,
            batch=batch,
        ):
            size = len(read.x)
            low = _read(read.state.h, spatial)
            together = max(1, batch // size)
            names = list(given)
            for first in range(0, len(names), together):
                if stop is not None and stop():
                    raise LearnError("Reading the prompts was stopped, so there are no names.")
                part = names[first : first + together]
                cond = rows(encoded, [given[name] for name in part for _ in range(size)])
                x = read.x.to(denoiser.dtype).repeat(len(part), 1, 1, 1)
                high = _read(denoiser.to_h(x, read.t, cond).h, spatial)
                for name, h in zip(part, high.split(size), strict=True):
                    sums[name] = sums.get(name, torch.zeros(())) + (h - low).sum(0).cpu()
                done += len(part)
                if progress is not None:
                    progress(done, total)
    count = seeds * len(timesteps)
    if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
        raise LearnError("h holds values that are not finite: the model gives NaN. Try dtype float32.")
    return {
        name: ConceptVector(
            value / count,
            denoiser.family,
            name,
            info={"method": "prompt", "prompt_neutral": neutral, "prompt_positive": given[name], "seeds": str(seeds)},
        )
        for name, value in sums.items()
    }


def _read(h: Tensor, spatial: bool) -> Tensor:
    return h.float() if spatial else h.float().mean((2, 3))


def nearest(
    direction: ConceptVector,
    table: Mapping[str, ConceptVector],
    count: int = 3,
    *,
    centred: bool = True,
) -> list[tuple[str, float]]:
    """The `count` names of largest cosine in size, largest first; a negative one says that the opposite is meant.

    Maps and per-timestep vectors are averaged to (C,) first. centred: the mean of the table is taken away, which all
    prompts share (whatever differs from the neutral prompt), so that names are told apart.
    """
    if not table:
        return []
    rows_of = torch.stack([pooled(vector) for vector in table.values()])
    if centred and len(table) > 2:
        rows_of = rows_of - rows_of.mean(0)
    own = pooled(direction)
    sizes = (rows_of.norm(dim=1) * own.norm()).clamp_min(1e-30)
    found = zip(table, ((rows_of @ own) / sizes).clamp(-1, 1).tolist(), strict=True)
    return sorted(found, key=lambda pair: -abs(pair[1]))[:count]


def pooled(vector: ConceptVector) -> Tensor:
    """(C,), fp64: the mean over positions and timesteps."""
    tensor = vector.tensor.double()
    tensor = tensor.mean(0) if vector.per_timestep else tensor
    return tensor.mean((1, 2)) if vector.spatial else tensor
