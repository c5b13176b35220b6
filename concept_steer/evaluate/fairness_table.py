"""From verdicts to figures: deviation ratios, faithfulness and distances, each with its interval. Pure functions.

Metric names: `delta_gender`, `delta_skin_tone`, `role_faithfulness`, ... are measured on the plain prompts of all roles
with quota assignment. What differs is said after a colon: `:tone` or `:both` (the attribute that was steered, where
that is not the name's own), `:successful` (the template), `:seen` and `:unseen` (roles that vectors were learned on,
and the others). `_random` in a name means independent random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch

from ..demo import judges, world
from ..fairness import chance_deviation
from ..statistics import bootstrap, deviation_ratio, frechet, mean, wilson
from .fairness_methods import STEERED, VALUES
from .figures import Figure

Series = Mapping[str, np.ndarray]  # of one role, see fairness_drawing.load_series
Roles = Mapping[str, Series]  # by role
DELTA = {"gender": "delta_gender", "tone": "delta_skin_tone", "both": "delta_joint"}
ROLE_CLASSES = judges.CLASSES["role"]


def named(base: str, attribute: str, template: str = "plain", roles: str = "") -> str:
    """The metric's full name; the attribute is left out where the base implies it or it is gender, the main case."""
    own = {"delta_gender": "gender", "delta_skin_tone": "tone", "delta_joint": "both"}.get(
        base.removesuffix("_random"), "gender"
    )
    parts = [
        attribute if attribute and attribute != own else "",
        template if template != "plain" else "",
        roles,
    ]
    return ":".join(part for part in (base, *parts) if part)


def delta(series: Series, attributes: Sequence[str]) -> float:
    """The deviation ratio of one role's pictures from equal shares, over the joint classes of the attributes."""
    classes = list(product(*(range(len(VALUES[name])) for name in attributes)))
    counts = dict.fromkeys(map(str, classes), 0)
    for found in zip(*(series[name].tolist() for name in attributes), strict=True):
        counts[str(found)] += 1
    return deviation_ratio(counts)


def share_as_prompted(roles: Roles) -> tuple[int, int]:
    """(pictures in which the judge sees the role that was asked for, pictures)."""
    hits = sum(int((series["role"] == ROLE_CLASSES.index(role)).sum()) for role, series in roles.items())
    return hits, sum(len(series["role"]) for series in roles.values())


def share_as_assigned(roles: Roles, attributes: Sequence[str]) -> tuple[int, int]:
    """(pictures whose judged values are all as assigned, pictures)."""
    hits = 0
    for series in roles.values():
        same = [series[name] == series[f"wanted_{name}"] for name in attributes]
        hits += int(np.logical_and.reduce(same).sum())
    return hits, sum(len(series["role"]) for series in roles.values())


def figures_of(
    method: str, attribute: str, template: str, roles: Roles, seen: Sequence[str], command: str, mode: str = "quota"
) -> list[Figure]:
    """All figures of one method, attribute and template. Intervals: over roles (bootstrap), over pictures (Wilson)."""
    figures = []
    count = sum(len(series["role"]) for series in roles.values())

    def over_roles(base: str, value_of: Callable[[Series], float], some: Roles = roles, which: str = "") -> None:
        values = [value_of(series) for series in some.values()]
        low, high = bootstrap(values, lambda picked: mean(picked))  # type: ignore[arg-type]
        n = sum(len(series["role"]) for series in some.values())
        name = named(base, attribute, template, which)
        figures.append(Figure(method, name, mean(values), low, high, n, command))

    groups = {"": list(roles), "seen": [r for r in roles if r in seen], "unseen": [r for r in roles if r not in seen]}
    several = attribute in ("", "both")  # unsteered pictures are held against every attribute's shares
    for name in STEERED if several else (attribute,):
        base = DELTA[name] + ("_random" if mode == "random" else "")
        for which, members in groups.items():
            if members:
                over_roles(base, partial(delta, attributes=STEERED[name]), {r: roles[r] for r in members}, which)
    if mode == "random":
        return figures
    hits, total = share_as_prompted(roles)
    figures.append(
        Figure(
            method, named("role_faithfulness", attribute, template), hits / total, *wilson(hits, total), total, command
        )
    )
    if attribute:
        hits, total = share_as_assigned(roles, STEERED[attribute])
        name = named("as_assigned", attribute, template)
        figures.append(Figure(method, name, hits / total, *wilson(hits, total), total, command))
        over_roles("picture_distance", lambda s: float(s["pixel_distance"].mean()))
        over_roles("feature_distance", lambda s: float(s["feature_distance"].mean()))
    if template == "plain":
        rows = mean([float(series["rows"].mean()) for series in roles.values()])
        figures.append(Figure(method, named("unet_rows_per_picture", attribute), rows, None, None, count, command))
    return figures


def frechet_figure(method: str, attribute: str, plain: np.ndarray, other: np.ndarray, command: str) -> Figure:
    """The Fréchet distance of one half of the unsteered pictures to the other half of a method's.

    plain, other: (n, d), the same seeds in the same order; for method "none" they are one set, so that its figure is
    what two halves of the same pictures differ by: the zero of this scale.
    """
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    half = len(plain) // 2
    one = torch.from_numpy(plain[order[:half].numpy()].astype(np.float32))
    two = torch.from_numpy(other[order[half : 2 * half].numpy()].astype(np.float32))
    return Figure(method, named("frechet", attribute), frechet(one, two), None, None, half, command)


def chance_figures(pictures: int, attributes: Sequence[str], command: str) -> list[Figure]:
    """What a perfect sampler shows with independent random draws of so many pictures per role."""
    figures = []
    for name in attributes:
        cells = list(product(*(VALUES[part] for part in STEERED[name])))
        value = chance_deviation({str(cell): 1 / len(cells) for cell in cells}, pictures)
        figures.append(Figure("perfect sampler", f"{DELTA[name]}_random", value, None, None, pictures, command))
    return figures


def share_of(series: Series, attribute: str) -> float:
    """For the plot: the share of women, or of the two darkest skin tones."""
    wanted = {"gender": [world.GENDERS.index("woman")], "tone": [3, 4]}[attribute]
    return float(np.isin(series[attribute], wanted).mean())
