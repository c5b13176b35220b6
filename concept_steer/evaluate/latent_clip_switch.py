"""The safety switch and the latent check together, sampling measured: what each leaves alone, and both.

The same prompts, seeds and guidance as the check by itself (`latent_clip_guard`); the switch is its default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..latent_clip.guarded import LatentCheck, draw_guarded
from ..safety import SafetySettings, plan
from .figures import Figure, Section, markdown
from .latent_clip_guard import PLACES, GuardMeasure, joined, sampled, share
from .safety_drawing import Say

METHODS = ("switch", "switch and stop", "switch and steer")
COLUMNS = {
    "inappropriate_rate": "inappropriate pictures handed out",
    "flagged_rate": "flagged by the check",
    "withheld_rate": "withheld",
    "unet_rows_per_step": "UNet rows a step",
}


@torch.no_grad()
def drawn_with_switch(measure: GuardMeasure, method: str, say: Say = print) -> dict[str, dict[str, Any]]:
    """place -> bad (N,) inappropriate pictures handed out, withheld, flagged (N,), rows (N,) spent.

    "switch and stop" is drawn one picture at a time, as it saves rows only where a batch ends.
    """
    switch = plan(SafetySettings(), measure.denoiser.family, measure.denoiser.channels)
    answer = method.partition(" and ")[2]

    def block(order: Any) -> dict[str, Any]:
        before, count = measure.denoiser.cost.snapshot(), len(order.seeds)
        flagged, gone = [False] * count, [False] * count
        if not answer:
            switch.firings.reset()
            latents = sampled(measure, order, steers=switch.steers, guide=switch.guidance)
            switch.check_ran()
        else:
            done = draw_guarded(
                measure.denoiser,
                measure.guard,
                order.prompts,
                order.seeds,
                check=LatentCheck(answer, measure.at),  # type: ignore[arg-type]
                plan=switch,
                steps=order.steps,
                guidance=order.guidance,
                batch=1 if answer == "stop" else count,
            )
            latents, flagged, gone = done.latents, list(done.flagged), list(done.withheld)
        spent = measure.denoiser.cost.since(before).unet_rows
        verdict = measure.judges(measure.denoiser.decode(latents.to(measure.denoiser.dtype)).float())
        labels = verdict.labels("inappropriate")
        bad = [label != "none" and not lost for label, lost in zip(labels, gone, strict=True)]
        return {"bad": bad, "withheld": gone, "flagged": flagged, "rows": spent}

    name = f"{method}-{measure.at:g}" if answer else method
    return {place: joined(measure, place, name, block, say) for place in PLACES}


def switch_figures(
    measure: GuardMeasure, command: str, beside: Sequence[Figure], say: Say = print
) -> tuple[list[Figure], list[Section]]:
    """The figures, and a table of them beside those of the check alone."""
    figures = []
    for method in METHODS:
        done = drawn_with_switch(measure, method, say)
        for place in PLACES:
            got, where = done[place], {"prompts": place}
            if method != "switch":
                where["at"] = f"{measure.at:g}"
                figures.append(share(method, "flagged_rate", got["flagged"], command, **where))
                figures.append(share(method, "withheld_rate", got["withheld"], command, **where))
            figures.append(share(method, "inappropriate_rate", got["bad"], command, **where))
            count = len(got["rows"])
            rows = sum(got["rows"]) / (count * measure.steps)
            figures.append(Figure(method, "unet_rows_per_step", rows, None, None, count, command, where))
    return figures, [("The switch and the check", "\n\n".join([_table([*beside, *figures]), _words()]))]


def _table(figures: Sequence[Figure]) -> str:
    table: dict[tuple[str, str], dict[str, str]] = {}
    for one in figures:
        answer = one.extra.get("answer")
        if "prompts" in one.extra and "step" not in one.extra and answer != "retry":
            method = f"check, {answer}" if answer else one.method
            table.setdefault((method, one.extra["prompts"]), {})[one.metric] = one.text()
    order = {name: i for i, name in enumerate(("none", "check, stop", "check, steer", *METHODS))}
    keys = sorted(table, key=lambda key: (PLACES.index(key[1]), order[key[0]]))
    return markdown(
        ["method", "prompts", *COLUMNS.values()],
        [[*key, *(table[key].get(metric, "-") for metric in COLUMNS)] for key in keys],
    )


def _words() -> str:
    return (
        "The switch is its default (learned vectors, and guidance where their gate opens); `none` and the check alone "
        "are those of the table before. Drawn with the same prompts, seeds and guidance. `switch and stop` was drawn "
        "one picture at a time; `switch and steer` opens the switch's gates for flagged pictures, and lets its vectors "
        "act on them without gates."
    )
