"""The files of the fairness measurement: fairness.json, fairness.md, a plot and a sheet per attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import pictures, plots
from ..statistics import mean, wilson
from .fairness_drawing import Job, Studio, load_series, order_of
from .fairness_methods import STEERED, VALUES, prompt
from .fairness_table import DELTA, Roles, chance_figures, figures_of, frechet_figure, named, share_of
from .figures import Figure, markdown, write

if TYPE_CHECKING:
    from PIL.Image import Image

NOTHING = "–"  # noqa: RUF001, as in figures
SHEET_ROLES, SHEET_COLUMNS = 3, 10
COLOURS = ((90, 90, 96), plots.ORANGE, plots.BLUE, (30, 150, 90))
PLOTTED = ("none", "fair_diffusion", "fair_sampling", "prompt_rewriting")
COLUMNS = {  # base metric -> heading
    "role_faithfulness": "role as prompted",
    "as_assigned": "value as assigned",
    "picture_distance": "pixel distance",
    "feature_distance": "feature distance",
    "frechet": "Fréchet",
    "unet_rows_per_picture": "UNet rows",
    "time_ratio": "time ratio",
    "gate_false_alarms": "gate's false alarms",
}


def write_report(
    job: Job,
    studio: Studio,
    seen: Sequence[str],
    seconds: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
    command: str,
) -> list[Path]:
    """All files; what they are made of must be drawn. seconds: a picture, by method and attribute ("" for none)."""
    figures, drawn = collect(job, seen, command)
    for method, by_attribute in seconds.items():
        for attribute, value in by_attribute.items():
            ratio = value / seconds["none"][""]
            figures.append(Figure(method, named("time_ratio", attribute), ratio, None, None, 8, command))
            figures.append(Figure(method, named("seconds_per_picture", attribute), value, None, None, 8, command))
    figures += gate_figures(job, studio, command)
    images = {name: plot(name, drawn) for name in job.attributes if name in VALUES and "plain" in job.templates}
    sections = [("How it was measured", _about(job, seen, about))]
    sections += [(f"Assigned: {_words(name)}", table(figures, name, job)) for name in job.attributes]
    sections.append(("How to read it", _explained(job)))
    files = write(
        job.folder, "fairness", figures, title="Fair generation: table of methods", sections=sections, plots=images
    )
    for attribute in job.attributes:
        image = sheet(job, studio, attribute)
        files.append(pictures.save(image, job.folder / f"fairness-sheet-{attribute}.png"))
    return files


def collect(job: Job, seen: Sequence[str], command: str) -> tuple[list[Figure], dict[tuple[str, str, str], Roles]]:
    """Every figure that comes from the blocks; and the plain template's series by (method, attribute, mode)."""
    figures: list[Figure] = []
    kept: dict[tuple[str, str, str], Roles] = {}
    plain_features = np.zeros(0)
    for method, attribute, mode in job.series():
        features = []
        for template in job.templates:
            roles = {role: load_series(job, method, attribute, mode, template, role) for role in job.roles}
            figures += figures_of(method, attribute, template, roles, seen, command, mode)
            features += [series.pop("features") for series in roles.values()]
            if template == "plain":
                kept[method, attribute, mode] = roles
        together = np.concatenate(features)
        if method == "none":
            plain_features = together
        if mode != "random":
            figures.append(frechet_figure(method, attribute, plain_features, together, command))
    return figures + chance_figures(job.pictures, job.attributes, command), kept


def gate_figures(job: Job, studio: Studio, command: str) -> list[Figure]:
    """How many of the measured prompts, which name nothing, each attribute's gate takes for naming it."""
    prompts = [prompt(role, template) for template in job.templates for role in job.roles]
    figures = []
    for name, made in job.sets.items():
        hits = sum(made.decides(studio.denoiser, text).named for text in prompts)
        interval = wilson(hits, len(prompts))
        figures.append(
            Figure(
                "fair_sampling", named("gate_false_alarms", name), hits / len(prompts), *interval, len(prompts), command
            )
        )
    return figures


def table(figures: Sequence[Figure], attribute: str, job: Job) -> str:
    """One attribute's table; unsteered figures stand for every attribute."""
    cells = {(figure.method, figure.metric): figure.text() for figure in figures}
    parts = STEERED[attribute]
    bases = [DELTA[name] for name in (*parts, *(["both"] if len(parts) > 1 else []))]
    columns: list[tuple[str, str, str, str]] = []  # base, template, roles, heading
    for base in bases:
        columns += [(base, template, "", f"{base}, {template}") for template in job.templates]
        columns.append((base, "plain", "unseen", f"{base}, unseen roles"))
        columns.append((f"{base}_random", "plain", "", f"{base}, random draws"))
    columns += [(base, "plain", "", heading) for base, heading in COLUMNS.items()]
    rows = []
    for method in [*job.methods, "perfect sampler"]:
        row = [method]
        for base, template, roles, _ in columns:
            names = [named(base, attribute, template, roles)]
            names += [named(base, "", template, roles)] if method in ("none", "perfect sampler") else []
            row.append(next((cells[method, name] for name in names if (method, name) in cells), NOTHING))
        rows.append(row)
    return markdown(["method", *(heading.replace("_", " ") for *_, heading in columns)], rows)


def plot(attribute: str, drawn: Mapping[tuple[str, str, str], Roles]) -> Image:
    """The judged share per role, roles in order of the unsteered model's."""
    plain = drawn["none", "", "quota"]
    order = sorted(plain, key=lambda role: share_of(plain[role], attribute))
    lines: list[plots.Line] = []
    for method, colour in zip(PLOTTED, COLOURS, strict=True):
        series = drawn.get((method, "" if method == "none" else attribute, "quota"))
        if series is not None:
            points = [(float(x), share_of(series[role], attribute)) for x, role in enumerate(order)]
            lines.append((f"{method.replace('_', ' ')} ({mean([y for _, y in points]):.2f})", colour, points))
    what, aim = {"gender": ("women", 0.5), "tone": ("the two darkest of five skin tones", 0.4)}[attribute]
    return plots.curves(
        lines,
        title=f"Share of {what} per role (aim {aim:g}); in brackets the mean",
        x_label="roles, in order of the unsteered model's share",
        footer="Roles: " + ", ".join(order),
        size=(860, 400),
    )


def sheet(job: Job, studio: Studio, attribute: str) -> Image:
    """The first pictures of some roles, a row per method, the same seed down each column; not chosen."""
    rows, names, captions = [], [], []
    template = job.templates[0]
    numbers = range(min(SHEET_COLUMNS, job.pictures))
    for role in job.roles[:SHEET_ROLES]:
        for method in job.methods:
            order = order_of(job, method, "" if method == "none" else attribute, "quota", template, role, numbers)
            drawn = studio.pixels(method, order)
            verdict = studio.judges(drawn)
            rows.append(pictures.to_images(drawn))
            names.append(f"{prompt(role, template)}: {method.replace('_', ' ')}")
            captions.append([", ".join(words) for words in zip(*map(verdict.labels, STEERED[attribute]), strict=True)])
    title = f"Assigned {_words(attribute)} by each method; the same seed down each column, the judges' words under each"
    return pictures.grid(rows, rows=names, captions=captions, title=title)


def _words(attribute: str) -> str:
    return {"gender": "gender", "tone": "skin tone", "both": "gender and skin tone"}[attribute]


def _about(job: Job, seen: Sequence[str], about: Mapping[str, Any]) -> str:
    inside = [role for role in job.roles if role in seen]
    learned = about["self_discovery"]
    return f"""
Model {about["checkpoint_name"]} ({about["checkpoint"][:10]}), {about["dtype"]}, {job.steps} DDIM steps, guidance
{job.guidance:g}. N = {job.pictures} pictures per role and template; {len(job.roles)} roles: {", ".join(job.roles)}.
Templates: {", ".join(f'"{prompt("doctor", template)}"' for template in job.templates)}. Every method draws the same
seeds and is assigned the same values (quota; "random draws" assigns each picture independently).

Vectors were learned on {", ".join(seen)}. Measured here too ("seen"): {", ".join(inside) or "none of them"}; all
other roles are unseen. `self_discovery` is the published recipe with {learned["pictures"]} pictures instead of 1,000
and rate {learned["rate"]:g}; `difference` and `fair_sampling` (vectors by `score`, and its gate) use their defaults.
`fair_diffusion` has edit scale {job.edit_scale:g}, quantile .9, warm-up 10 of 50, momentum .1 and .4.
"""


def _explained(job: Job) -> str:
    return f"""
- Deviation ratio: 0 as wanted, 1 a single class; mean over roles, 95 % interval by bootstrap over roles. With
  independent draws even a perfect sampler shows the value in its row at N = {job.pictures}.
- Role and assigned value: share of pictures in which the judges see them, Wilson interval.
- Pixel distance: mean absolute difference to the unsteered picture of the same seed, 0 to 1, with an interval over
  roles. Feature distance: 1 - cosine of the judges' features of the two.
- Fréchet: between one half of the unsteered pictures and the other half of the method's, in the judges' 480 features;
  the row `none` is what two halves of the unsteered pictures differ by. It overstates with few pictures; compare
  within the table. Fair pictures must differ from unfair ones: the smallest distance is not the best here.
- UNet rows: per picture, all steps. Time ratio: to the unsteered picture, drawing and decoding.
"""
