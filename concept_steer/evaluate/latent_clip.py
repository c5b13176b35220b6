"""`concept-steer evaluate latent-clip`: the latent tower beside a pixel tower, and the check in the middle of sampling.

Every part is a function (measure, command, say) -> (figures, sections) in `PARTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo import latent_guard, tower_pair
from ..demo.judges import Judges
from ..denoiser import Denoiser
from .figures import Figure, Section, write
from .latent_clip_guard import GuardMeasure, guard_figures
from .latent_clip_reno import reno_figures, reno_section
from .latent_clip_reno_bench import Bench
from .latent_clip_towers import tower_figures
from .safety_drawing import Say


@dataclass(frozen=True)
class Measure:
    """pair, data: of the towers (see latent_clip_towers). every: of each prompt set of the check, one in so many."""

    out: Path
    denoiser: Denoiser
    pair: Path | None = None
    data: Path | None = None
    every: tuple[int, int] = (2, 3)
    at: float = 0.5


Part = Callable[[Measure, str, Say], tuple[list[Figure], list[Section]]]


def _towers(measure: Measure, command: str, say: Say) -> tuple[list[Figure], list[Section]]:
    say("towers")
    return tower_figures(measure.denoiser, Judges(), command, pair=measure.pair, data=measure.data)


def _guard(measure: Measure, command: str, say: Say) -> tuple[list[Figure], list[Section]]:
    made = GuardMeasure(
        measure.out, measure.denoiser, latent_guard.load_guard(), Judges(), measure.every, at=measure.at
    )
    return guard_figures(made, command, say)


def _reno(measure: Measure, command: str, say: Say) -> tuple[list[Figure], list[Section]]:
    pixel = tower_pair.read(measure.pair)[0]["pixel"] if measure.pair else None
    figures = reno_figures(measure.out / "reno-parts", Bench(pixel=pixel), command=command, say=say)
    return figures, [reno_section(figures)]


PARTS: tuple[Part, ...] = (_towers, _guard, _reno)  # further parts of this table are appended here


def run(measure: Measure, command: str, say: Say = print) -> list[Path]:
    """Measure all parts and write latent_clip.json and latent_clip.md into `out`; the paths."""
    figures: list[Figure] = []
    about = (
        f"model: demo ({measure.denoiser.checkpoint_hash[:10]}), {str(measure.denoiser.dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} thread; 12 DDIM steps; intervals are 95 %.\n\nMeasured again by `{command}`."
    )
    sections: list[Section] = [("How it was measured", about)]
    for part in PARTS:
        more, told = part(measure, command, say)
        figures += more
        sections += told
    return write(measure.out, "latent_clip", figures, title="Latent-CLIP, measured", sections=sections)
