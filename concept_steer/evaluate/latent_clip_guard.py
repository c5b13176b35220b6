"""The latent check, measured: what it finds at which step, what each answer leaves, and what it costs or saves.

The same prompts, seeds and guidance as the table of the safety switch. The truth is the judges' verdict on the finished
picture, drawn without the check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import latent_guard
from ..demo.judges import Judges
from ..demo.safety_words import benign
from ..denoiser import Denoiser
from ..errors import ConceptSteerError
from ..latent_clip.guard import FINISHED, LatentGuard
from ..latent_clip.guarded import Estimates, LatentCheck, draw_guarded
from ..sampling import sample, timesteps
from ..statistics import bootstrap, mean, wilson
from .figures import Figure, Section, markdown
from .i2p_prompts import BENIGN, SUGGESTIVE, PromptRow, digest, read_prompts
from .parts import Parts
from .safety_drawing import Job, Say, digests

PLACES = ("suggestive", "harmless")
ANSWERS = ("stop", "steer", "retry")


@dataclass(frozen=True)
class GuardMeasure:
    """every: of each prompt set, one prompt in so many. batch 1 for "stop", which saves only where a batch ends."""

    out: Path
    denoiser: Denoiser
    guard: LatentGuard
    judges: Judges
    every: tuple[int, int] = (2, 3)
    steps: int = 12
    batch: int = 16
    at: float = 0.5

    @property
    def rows(self) -> dict[str, tuple[PromptRow, ...]]:
        files = zip(PLACES, (SUGGESTIVE, BENIGN), self.every, strict=True)
        return {place: tuple(read_prompts(path)[::every]) for place, path, every in files}

    @property
    def parts(self) -> Parts:
        assert self.guard.limits is not None
        told = {
            "checkpoint": self.denoiser.checkpoint_hash,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "steps": self.steps,
            "batch": self.batch,
            "prompts": [digest(rows) for rows in self.rows.values()],
            "limits": [round(v, 4) for v in self.guard.limits.limits[:, 0].tolist()],
            "threads": torch.get_num_threads(),
        }
        return Parts(self.out / "latent-guard", told)

    def blocks(self, place: str) -> list[Any]:
        """(order, numbers of its prompts) of each batch; one guidance scale each."""
        job = Job(self.out, self.rows[place], 1, self.steps, self.batch)
        return [(job.order(i), [p.place for p in job.blocks[i][1]]) for i in range(len(job.blocks))]


@torch.no_grad()
def found_by_step(measure: GuardMeasure, say: Say = print) -> dict[str, dict[str, Any]]:
    """place -> values (N, T + 1; the last of finished latents), published (the same), truth (N,), digest (N,)."""
    times = [*timesteps(measure.denoiser.schedule, measure.steps), FINISHED]
    published = latent_guard.published(measure.guard.clip)  # type: ignore[arg-type]

    def block(order: Any) -> dict[str, Any]:
        seen = Estimates()
        latents = sampled(measure, order, watch=seen)
        every = {**seen.by_time(), FINISHED: latents}
        verdict = measure.judges(measure.denoiser.decode(latents.to(measure.denoiser.dtype)).float())
        return {
            "values": _worst(measure.guard, every, times).tolist(),
            "published": torch.stack([published.log_odds(every[t]).amax(1) for t in times], 1).tolist(),
            "truth": [label != "none" for label in verdict.labels("inappropriate")],
            "digest": [row.tobytes().hex() for row in digests(latents)],
        }

    return {place: joined(measure, place, "curve", block, say) for place in PLACES}


def _worst(guard: LatentGuard, every: Mapping[float, Tensor], times: Sequence[float]) -> Tensor:
    return torch.stack([guard.values(every[t], t).amax(1) for t in times], dim=1)


def sampled(measure: GuardMeasure, order: Any, **more: Any) -> Tensor:
    settings = {"seeds": order.seeds, "steps": order.steps, "guidance": order.guidance, "batch": len(order.seeds)}
    return sample(measure.denoiser, order.prompts, **settings, **more)


def joined(measure: GuardMeasure, place: str, what: str, make: Any, say: Say) -> dict[str, Any]:
    """The results of all batches, in the order of the prompts."""
    table: dict[str, dict[int, Any]] = {}
    blocks = measure.blocks(place)
    for number, (order, places) in enumerate(blocks):
        result = measure.parts.get(f"{what}-{place}-{number:03d}", partial(make, order))
        for name, values in result.items():
            if isinstance(values, list):
                table.setdefault(name, {}).update(zip(places, values, strict=True))
            else:  # of the batch as a whole: shared out, so that the sum stays
                table.setdefault(name, {}).update(dict.fromkeys(places, values / len(places)))
        say(f"{what}, {place}: {number + 1} of {len(blocks)}")
    return {name: [values[i] for i in sorted(values)] for name, values in table.items()}


@torch.no_grad()
def answered(measure: GuardMeasure, answer: str, say: Say = print) -> dict[str, dict[str, Any]]:
    """place -> bad (N,) inappropriate pictures handed out, withheld, flagged, tries, digest (N,), rows (N,) spent."""
    from ..safety import SafetySettings, plan

    check = LatentCheck(answer, measure.at)  # type: ignore[arg-type]
    harder = plan(SafetySettings(), measure.denoiser.family, measure.denoiser.channels)

    def block(order: Any) -> dict[str, Any]:
        before = measure.denoiser.cost.snapshot()
        done = draw_guarded(
            measure.denoiser,
            measure.guard,
            order.prompts,
            order.seeds,
            check=check,
            harder=harder,
            steps=order.steps,
            guidance=order.guidance,
            batch=1 if answer == "stop" else len(order.seeds),
        )
        spent = measure.denoiser.cost.since(before).unet_rows
        verdict = measure.judges(measure.denoiser.decode(done.latents.to(measure.denoiser.dtype)).float())
        labels = verdict.labels("inappropriate")
        return {
            "bad": [label != "none" and not gone for label, gone in zip(labels, done.withheld, strict=True)],
            "withheld": list(done.withheld),
            "flagged": list(done.flagged),
            "tries": list(done.tries),
            "digest": [row.tobytes().hex() for row in digests(done.latents)],
            "rows": spent,
        }

    return {place: joined(measure, place, f"{answer}-{measure.at:g}", block, say) for place in PLACES}


def area(values: Sequence[float], truth: Sequence[bool]) -> float:
    """Area under the curve of true against false positives; NaN where one kind is missing."""
    bad = torch.tensor([v for v, t in zip(values, truth, strict=True) if t])
    fine = torch.tensor([v for v, t in zip(values, truth, strict=True) if not t])
    if not len(bad) or not len(fine):
        return float("nan")
    above = (bad[:, None] > fine[None]).double() + (bad[:, None] == fine[None]).double() / 2
    return float(above.mean())


def guard_figures(measure: GuardMeasure, command: str, say: Say = print) -> tuple[list[Figure], list[Section]]:
    """The figures and the tables of them. Errors: ConceptSteerError for a folder of other settings."""
    if set(measure.rows["harmless"]) & set(benign()):
        raise ConceptSteerError("Prompts of the calibration are among the measured ones.")
    seen = found_by_step(measure, say)
    figures = _by_step(measure, seen, command)
    curve = _curve_table(figures)
    for answer in ANSWERS:
        figures += _of_answer(measure, answer, seen, answered(measure, answer, say), command)
    figures += _without(measure, seen, command)
    return figures, [("The check by step", curve), ("Answers", _answer_table(figures)), ("How it reads", _words())]


def _by_step(measure: GuardMeasure, seen: Mapping[str, Mapping[str, Any]], command: str) -> list[Figure]:
    truth = [t for place in PLACES for t in seen[place]["truth"]]
    figures = []
    for step in range(measure.steps + 1):
        where = {"step": str(step) if step < measure.steps else "finished", "of": str(measure.steps)}
        for method, name in (("latent", "values"), ("published texts", "published")):
            values = [row[step] for place in PLACES for row in seen[place][name]]
            pairs: list[object] = list(zip(values, truth, strict=True))
            ends = bootstrap(pairs, lambda rows: area(*zip(*rows, strict=True)), draws=300)  # type: ignore[misc, arg-type]
            figures.append(Figure(method, "area_under_curve", area(values, truth), *ends, len(pairs), command, where))
            if method == "latent":
                figures += _rates(values, truth, command, where)
                gone = mean([float(v >= 0) for v in values])
                left = max(0, measure.steps - 1 - step) / measure.steps
                figures.append(
                    Figure(method, "compute_saved_alone", gone * left, None, None, len(values), command, where)
                )
    return figures


def _rates(values: Sequence[float], truth: Sequence[bool], command: str, where: Mapping[str, str]) -> list[Figure]:
    found = []
    for metric, kind in (("true_positive_rate", True), ("false_positive_rate", False)):
        mine = [v >= 0 for v, t in zip(values, truth, strict=True) if t is kind]
        ends = wilson(sum(mine), len(mine))
        found.append(Figure("latent", metric, mean([float(m) for m in mine]), *ends, len(mine), command, where))
    return found


def share(method: str, metric: str, hits: Sequence[bool], command: str, **extra: str) -> Figure:
    return Figure(
        method, metric, mean([float(h) for h in hits]), *wilson(sum(hits), len(hits)), len(hits), command, extra
    )


def _of_answer(
    measure: GuardMeasure, answer: str, seen: Mapping[str, Any], done: Mapping[str, Any], command: str
) -> list[Figure]:
    figures = []
    for place in PLACES:
        got, where = done[place], {"answer": answer, "at": f"{measure.at:g}", "prompts": place}
        figures.append(share("latent", "inappropriate_rate", got["bad"], command, **where))
        figures.append(share("latent", "withheld_rate", got["withheld"], command, **where))
        count = len(got["rows"])
        rows = sum(got["rows"]) / (count * measure.steps)
        figures.append(Figure("latent", "unet_rows_per_step", rows, None, None, count, command, where))
        figures.append(Figure("latent", "compute_ratio", rows / 2, None, None, count, command, where))
        pairs = zip(got["digest"], seen[place]["digest"], got["flagged"], strict=True)
        if answer != "stop":  # which is drawn one by one: in float32 the last bits depend on the size of a batch
            same = [one == other for one, other, flag in pairs if not flag]
            figures.append(share("latent", "unflagged_identical", same, command, **where))
        figures.append(share("latent", "flagged_rate", got["flagged"], command, **where))
    return figures


def _without(measure: GuardMeasure, seen: Mapping[str, Any], command: str) -> list[Figure]:
    found = []
    for place in PLACES:
        found.append(share("none", "inappropriate_rate", seen[place]["truth"], command, prompts=place))
        count = len(seen[place]["truth"])
        found.append(Figure("none", "unet_rows_per_step", 2.0, None, None, count, command, {"prompts": place}))
    return found


def _curve_table(figures: Sequence[Figure]) -> str:
    table: dict[str, dict[tuple[str, str], str]] = {}
    for one in figures:
        if "step" in one.extra:
            table.setdefault(one.extra["step"], {})[one.method, one.metric] = one.text()
    columns = {
        ("latent", "true_positive_rate"): "found",
        ("latent", "false_positive_rate"): "false alarms",
        ("latent", "area_under_curve"): "area under the curve",
        ("published texts", "area_under_curve"): "the same, published pair of texts",
        ("latent", "compute_saved_alone"): "rows saved by stopping there",
    }
    return markdown(
        ["step", *columns.values()],
        [[step, *(cells.get(key, "-") for key in columns)] for step, cells in table.items()],
    )


def _answer_table(figures: Sequence[Figure]) -> str:
    table: dict[tuple[str, str], dict[str, str]] = {}
    for one in figures:
        if "prompts" in one.extra and "step" not in one.extra:
            table.setdefault((one.extra.get("answer", "none"), one.extra["prompts"]), {})[one.metric] = one.text()
    columns = {
        "inappropriate_rate": "inappropriate pictures handed out",
        "flagged_rate": "flagged",
        "withheld_rate": "withheld",
        "unflagged_identical": "unflagged ones identical",
        "unet_rows_per_step": "UNet rows a step",
    }
    return markdown(
        ["answer", "prompts", *columns.values()],
        [[*key, *(cells.get(metric, "-") for metric in columns)] for key, cells in table.items()],
    )


def _words() -> str:
    return (
        "found: the share of pictures that the judges call inappropriate when they are finished and that the check "
        "flags at that step (from 0); false alarms: of the others. Both prompt sets together. The limits are from "
        'other harmless prompts, at 2 % of them. The published pair is "an image of X" against "an image of no X"; '
        'the embedded text tower never read "no" in a caption. `stop` was drawn one picture at a time, where its rows '
        "are saved; `steer` lets the safety switch's default act on flagged pictures from that step on; `retry` draws "
        "up to 3 times more. The check reads with the shipped tower. "
        "Handed out: withheld pictures do not count as inappropriate, but stand beside it. The "
        "safety switch's own figures, from the first step on and on all prompts, are in safety.md."
    )
