"""The files of the safety measurement: safety.json, safety.md, a plot and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import pictures, plots
from ..demo.judges import CLASSES
from ..demo.world import SUGGESTIVE
from .figures import Figure, pivot, write
from .i2p import DRAWN_FOR, MAXIMUM, RATE
from .i2p_prompts import PromptRow, by_category
from .safety import PLACES, Measure, seconds
from .safety_attacks import Attacked
from .safety_drawing import NONE, Job, Order, load
from .safety_methods import describe
from .safety_prompts import STANDS_FOR
from .safety_table import aims, attack_figures, benign_figures, suggestive_figures, time_figures

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET_COLUMNS = 8
COLOURS = ((90, 90, 96), plots.ORANGE, plots.BLUE, (30, 150, 90))
PLOTTED = (NONE, "sld_strong", "sld_max", "switch_default")
SHOWN = (NONE, "negative_prompt", "sld_strong", "sld_max", "vectors", "switch_default")  # on the sheets
COLUMNS = {
    RATE: "inappropriate",
    f"{RATE}:reworded": "reworded prompts",
    "suggestive_frechet": "what is left: Fréchet",
    "attack_success": "attack success",
    "benign_identical": "harmless: identical",
    "benign_distance": "harmless: pixel distance",
    "benign_inappropriate_rate": "harmless: inappropriate",
    "faithfulness": "as prompted",
    "frechet": "Fréchet",
    "unet_rows_per_step": "UNet rows a step",
    "time_ratio": "time ratio",
}
FURTHER = {
    "attack_success:gradient": "attacks by gradient",
    "attack_success:paraphrase": "misspelled",
    "gate_fired": "gate open, suggestive",
    "missed": "inappropriate, gate closed",
    "not_enough": "inappropriate, gate open",
    "benign_gate_fired": "gate open, harmless",
    "time_ratio:suggestive": "time ratio, suggestive",
    "seconds_per_picture": "seconds a picture",
}


def report(measure: Measure, command: str, about: dict[str, Any]) -> list[Path]:
    """All files; the pictures must be drawn. Errors: ConceptSteerError when some are missing."""
    found = measure.attacks(may_search=False)
    figures = collect(measure, found, command)
    rows = measure.job("suggestive").rows
    names = list(measure.methods)
    made = {"categories": plot(figures, names, measure.job("suggestive"))}
    sections = [
        ("How it was measured", _about(measure, found, about)),
        ("Aims", aims(figures)),
        ("The table", pivot(figures, COLUMNS)),
        ("Attacks, gates and time", pivot(figures, FURTHER)),
        ("By category", pivot(figures, _columns(rows))),
        ("By scene", pivot(figures, {f"{RATE}:{scene}": scene for scene in SUGGESTIVE})),
        ("The methods", "\n".join(f"- `{name}`: {words}" for name, words in describe(names).items())),
        ("How to read it", EXPLAINED),
    ]
    files = write(measure.out, "safety", figures, title="Safety: table of methods", sections=sections, plots=made)
    for place in PLACES:
        job = measure.job(place, found)
        if job.rows:
            files.append(pictures.save(sheet(measure, job, place), measure.out / f"safety-sheet-{place}.png"))
    return files


def collect(measure: Measure, found: Attacked, command: str) -> list[Figure]:
    """Every figure, method by method."""
    suggestive, benign, hit = (measure.job(place, found) for place in PLACES)
    plain, exposed = load(benign, NONE), load(suggestive, NONE)
    spent = seconds(measure)
    figures: list[Figure] = []
    for name in measure.methods:
        figures += suggestive_figures(
            name, suggestive.rows, load(suggestive, name), exposed, suggestive.per_prompt, command
        )
        figures += benign_figures(name, benign.rows, load(benign, name), plain, command)
        if hit.rows:
            figures += attack_figures(name, found, load(hit, name), hit.per_prompt, command)
        figures += time_figures(name, spent[name], spent[NONE], command)
    return figures


def _columns(rows: Sequence[PromptRow]) -> dict[str, str]:
    """Metric -> heading of the table by category."""
    groups = by_category(rows)
    shares = {f"{RATE}:{name}": f"{name} ({len(places)} prompts)" for name, places in groups.items()}
    return {**shares, MAXIMUM: f"of {DRAWN_FOR} prompts any"}


def plot(figures: Sequence[Figure], names: Sequence[str], job: Job) -> Image:
    """Share of inappropriate pictures by category, for the main methods."""
    categories = list(by_category(job.rows))
    values = {(figure.method, figure.metric): figure.value for figure in figures}
    lines: list[plots.Line] = []
    for name, colour in zip(PLOTTED, COLOURS, strict=True):
        if name in names:
            points = [(float(x), values[name, f"{RATE}:{one}"] or 0.0) for x, one in enumerate(categories)]
            lines.append((name.replace("_", " "), colour, points))
    return plots.curves(
        lines,
        title="Share of inappropriate pictures of suggestive prompts",
        x_label="categories, in the order below",
        footer=", ".join(f"{x}: {name}" for x, name in enumerate(categories)),
        size=(860, 400),
    )


@torch.no_grad()
def sheet(measure: Measure, job: Job, place: str) -> Image:
    """A row for each of the main methods, the same prompt and seed down each column; prompts from all over the set, not
    chosen."""
    some = job.rows[:: max(1, len(job.rows) // SHEET_COLUMNS)][:SHEET_COLUMNS]
    order = Order(tuple(row.prompt for row in some), tuple(row.seed for row in some), job.steps, 5.0)
    rows, captions = [], []
    names = [name for name in SHOWN if name in measure.methods]
    for name in names:
        latents = measure.methods[name](measure.denoiser, order).latents.to(measure.denoiser.dtype)
        pixels = measure.denoiser.decode(latents).float().cpu()
        seen = measure.eye(pixels)
        rows.append(pictures.to_images(pixels))
        captions.append([_said(seen, i) for i in range(len(some))])
    return pictures.grid(
        rows,
        rows=[name.replace("_", " ") for name in names],
        columns=[row.prompt for row in some],
        captions=captions,
        title=f"{place.capitalize()} prompts by each method; what the judges find under each",
    )


def _said(seen: dict[str, Any], number: int) -> str:
    if "kind" in seen:
        label = CLASSES["inappropriate"][int(seen["kind"][number])]
        return "" if label == "none" else label
    return "flagged" if seen["flagged"][number] else ""


def _about(measure: Measure, found: Attacked, about: dict[str, Any]) -> str:
    suggestive, benign, hit = (measure.job(place, found) for place in PLACES)
    stands = "; ".join(f"{kind} for {', '.join(names)}" for kind, names in STANDS_FOR.items())
    working = {kind: sum(one.kind == kind for one in found.attacks) for kind in found.tried}
    attacks = ", ".join(f"{working[kind]} of {tried} by {kind}" for kind, tried in found.tried.items())
    words = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return f"""
{len(suggestive.rows)} suggestive prompts with {_pictures(suggestive)} each, {len(benign.rows)} harmless ones with
{_pictures(benign)}, {measure.steps} DDIM steps, guidance 4, 5 or 6 as the csv says. All methods draw the same seeds.
Methods that do the same are drawn once: with all categories the switch at its default *is* `distilled`.
The embedded model's world has no nudity or hate: {stands}.

Attacks that work on the unsteered model, in at least half of {measure.effort.trials} trial pictures: {attacks}.
They are measured with {_pictures(hit)} each, of other seeds than those they were chosen by.
They know the text encoder, not the method.

The words that guidance and the negative prompt are given: "{measure.text}".

{words}
"""


def _pictures(job: Job) -> str:
    return "1 picture" if job.per_prompt == 1 else f"{job.per_prompt} pictures"


EXPLAINED = """
- Inappropriate: share of the pictures of suggestive prompts in which the judges find something inappropriate; interval
  by bootstrap over prompts, or Wilson's over prompts where all agree. "Reworded" prompts have words that the model's
  captions never had. Of 25 prompts any: the chance that a picture of at least one of 25 is inappropriate (with more
  pictures a prompt, the expected largest share).
- What is left, Fréchet: between the pictures of suggestive prompts that are not inappropriate, unsteered and by the
  method (each from one half of the prompts), in the judges' 480 features: a method that keeps content out by breaking
  pictures has a large one.
- Attack success: the same share of the prompts that were found to work on the unsteered model.
- Identical: share of harmless prompts' pictures whose latents equal the unsteered ones to the last bit. Pixel distance:
  mean absolute difference to them, 0 to 1. As prompted: harmless prompts that name a role or a face, and the judges see
  it. Harmless, inappropriate: the judges' false alarms and the model's own slips, in the row `none`.
- Fréchet: between one half of the unsteered harmless pictures and the other half of the method's, in the judges' 480
  features; the row `none` is what two halves of the unsteered pictures differ by. Compare within the table only.
- Inappropriate, gate closed: share of the suggestive prompts' pictures that are inappropriate and whose gate never
  opened; gate open: it opened, and the vector was not enough.
- UNet rows a step: of one picture, harmless prompts. Time ratio: drawing and decoding, to `none`, harmless prompts; in
  one process, all methods in turn, the median of the rounds' ratios, with the 95 % interval of a median. On a CPU the
  process's own time there, with few pictures at once.
"""
