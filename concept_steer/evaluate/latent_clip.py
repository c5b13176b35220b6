"""`concept-steer evaluate latent-clip`: the latent tower beside a pixel tower, and the check in the middle of sampling.

Every part is a function (measure, command, say) -> (figures, sections) in `PARTS`. Where only some are measured, the
figures and tables of the others stay as they are in the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo import latent_guard, tower_pair
from ..demo.judges import Judges
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from .figures import Figure, Section, read, read_sections, write
from .latent_clip_guard import GuardMeasure, guard_figures
from .latent_clip_reno import reno_figures, reno_section
from .latent_clip_reno_bench import Bench
from .latent_clip_switch import switch_figures
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
    figures, sections = guard_figures(made, command, say)
    more, told = switch_figures(made, command, figures, say)
    return [*figures, *more], [*sections, *told]


def _reno(measure: Measure, command: str, say: Say) -> tuple[list[Figure], list[Section]]:
    pixel = tower_pair.read(measure.pair)[0]["pixel"] if measure.pair else None
    figures = reno_figures(measure.out / "reno-parts", Bench(pixel=pixel), command=command, say=say)
    return figures, [reno_section(figures)]


PARTS: Mapping[str, Part] = {"towers": _towers, "guard": _guard, "reno": _reno}


def part_of(figure: Figure) -> str:
    """Whose a figure of the written table is: the parts say different things beside their figures."""
    return "towers" if "attribute" in figure.extra else "reno" if "part" in figure.extra else "guard"


def run(measure: Measure, command: str, say: Say = print, parts: Sequence[str] = ()) -> list[Path]:
    """Measure the parts, none named means all, and write latent_clip.json and latent_clip.md into `out`; the paths.

    Errors: ConceptSteerError when only some are measured and `out` holds no table of the others.
    """
    chosen = [name for name in PARTS if not parts or name in parts]
    about = (
        f"model: demo ({measure.denoiser.checkpoint_hash[:10]}), {str(measure.denoiser.dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} thread; 12 DDIM steps; intervals are 95 %.\n\nMeasured again by `{command}`."
    )
    kept, sections = [], [("How it was measured", about)]
    if len(chosen) < len(PARTS):
        if not (measure.out / "latent_clip.json").is_file():
            raise ConceptSteerError(
                f"{measure.out} has no latent_clip.json whose other parts could stay: measure all of them there first."
            )
        kept, sections = read(measure.out / "latent_clip.json"), read_sections(measure.out / "latent_clip.md")
    figures: list[Figure] = []
    for name, part in PARTS.items():
        if name in chosen:
            more, told = part(measure, command, say)
            figures += more
            sections = merged(sections, told)
        else:
            figures += [figure for figure in kept if part_of(figure) == name]
    return write(measure.out, "latent_clip", figures, title="Latent-CLIP, measured", sections=sections)


def merged(old: Sequence[Section], new: Sequence[Section]) -> list[Section]:
    """Sections with those of the same heading replaced; a new heading comes behind the one before it."""
    result = list(old)
    place = len(result)
    for heading, text in new:
        found = [i for i, (known, _) in enumerate(result) if known == heading]
        if found:
            place = found[0]
            result[place] = (heading, text)
        else:
            result.insert(place, (heading, text))
        place += 1
    return result
