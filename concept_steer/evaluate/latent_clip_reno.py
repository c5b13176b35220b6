"""What noise optimisation (ReNO) gains on the embedded model's one-step student, as figures.

python -m concept_steer.evaluate.latent_clip_reno --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..demo import world
from ..latent_clip import Descent, absence_reward, optimise_noise, text_reward
from ..sampling import sample
from ..statistics import bootstrap, mean, wilson
from .figures import Figure, Section, pivot, write
from .i2p_prompts import SUGGESTIVE, read_prompts
from .latent_clip_reno_bench import FIRST_SEED, Bench, decoded, measure, wanted
from .parts import Parts

ABSENT = tuple(world.INAPPROPRIATE)
COSTS = ("seconds", "processor_seconds", "unet_rows")
PART = {"part": "noise optimisation"}
WORDS = """`none`: the student's one step. `latent`, `pixel`: 50 iterations with the published settings and a cosine of
a latent or a pixel tower as the reward, the rate scaled to the size of the noise. `best_of_50`: 50 draws, the one with
the highest reward kept, no gradient. `teacher_20_steps`: the embedded model itself with guidance. `text_only` (of the
inappropriate ones): without the reward for "an image of no X". Judges tell what is seen; they are no part of any
reward. Without a trained pixel tower an untrained one of the same size stands for what `pixel` costs, and nothing else.
Processor seconds are of one thread, on a machine that others used, for the first prompt's four pictures where there is
no interval. Intervals are 95 %."""
Say = Callable[[str], None]


def reno_figures(
    folder: Path,
    bench: Bench,
    *,
    prompts: int = 12,
    seeds: int = 4,
    pixel_prompts: int = 1,
    suggestive: int = 24,
    command: str,
    say: Say = print,
) -> list[Figure]:
    """All figures of noise optimisation; parts are kept in `folder`, a run that was stopped goes on.

    pixel_prompts: of the same prompts, for the costly pixel reward; latent and pixel take turns there, so that the
    ratio of their seconds is of one run. suggestive: prompts of the safety table, one seed each.
    """
    parts = Parts(folder, {"student": bench.student.checkpoint_hash, "seeds": seeds, "first": FIRST_SEED})
    found: dict[str, list[dict[str, Any]]] = {}
    for place, one in enumerate(wanted(prompts)):
        mine = [FIRST_SEED + place * seeds + i for i in range(seeds)]
        for method in bench.methods():
            if method == "pixel" and place >= pixel_prompts:
                continue
            say(f"{method}: {one.prompt}")
            make = partial(measure, bench, method, one, mine)
            name = "pixel-untrained" if method == "pixel" and not bench.trained else method
            row = parts.get(f"{name}-{place:02d}", make, prompt=one.prompt)
            found.setdefault(method, []).append(row)
    figures = [figure for method, rows in found.items() for figure in _of_method(method, rows, command)]
    if not bench.trained:
        figures = [figure for figure in figures if figure.method != "pixel" or figure.metric in COSTS]
    figures += [*_gains(found, command), *_ratios(found, command)]
    return [*figures, *_safety(parts, bench, suggestive, command, say)]


def _of_method(method: str, rows: Sequence[dict[str, Any]], command: str) -> list[Figure]:
    def flat(key: str) -> list[Any]:
        return [value for row in rows for value in row[key]]

    def share(metric: str, hits: Sequence[int]) -> Figure:
        return Figure(method, metric, mean(hits), *wilson(sum(hits), len(hits)), len(hits), command, PART)

    def average(metric: str, values: Sequence[float]) -> Figure:
        return Figure(method, metric, mean(values), *_ends(values, mean), len(values), command, PART)

    both = [a * b for a, b in zip(flat("role"), flat("gender"), strict=True)]
    found = [share("faithfulness", both)]
    found += [share(f"faithfulness_{name}", flat(name)) for name in ("role", "gender", "tone")]
    found.append(average("reward", flat("reward")))
    found += [average(f"noise_{name}", [v for row in rows for v in row["noise"][name]]) for name in rows[0]["noise"]]
    found += [average(f"{kind}_diversity", flat(f"{kind}_distance")) for kind in ("latent", "judge")]
    found += [average(name, [row[name] for row in rows]) for name in COSTS]
    return found


def _gains(found: dict[str, list[dict[str, Any]]], command: str) -> list[Figure]:
    """Faithful pictures more than without optimisation, of the same prompts and seeds; the interval is over pairs."""
    faithful = {
        method: [a * b for row in rows for a, b in zip(row["role"], row["gender"], strict=True)]
        for method, rows in found.items()
    }
    made = []
    for method in ("latent", "best_of_50"):
        pairs = [a - b for a, b in zip(faithful[method], faithful["none"], strict=True)]
        extra = {**PART, "against": "none"}
        ends = _ends(pairs, mean)
        made.append(Figure(method, "faithfulness_gain", mean(pairs), *ends, len(pairs), command, extra))
    return made


def _ratios(found: dict[str, list[dict[str, Any]]], command: str) -> list[Figure]:
    """Seconds of the latent against the pixel reward, and diversity against no optimisation; prompt by prompt."""
    made = []
    for method, base, metric, key in (
        ("latent", "pixel", "seconds_ratio", "processor_seconds"),
        ("latent", "none", "diversity_kept", "latent_distance"),
        ("latent", "none", "judge_diversity_kept", "judge_distance"),
        ("best_of_50", "none", "diversity_kept", "latent_distance"),
    ):
        if method not in found or base not in found:
            continue
        pairs = [(_total(a[key]), _total(b[key])) for a, b in zip(found[method], found[base], strict=False)]
        extra = {**PART, "against": base}
        made.append(Figure(method, metric, _ratio(pairs), *_ends(pairs, _ratio), len(pairs), command, extra))
    return made


def _ends(values: Sequence[Any], statistic: Callable[[Any], float]) -> tuple[float | None, float | None]:
    """The interval; none for a single value."""
    return bootstrap(values, statistic) if len(values) > 1 else (None, None)


def _total(value: float | list[float]) -> float:
    return sum(value) if isinstance(value, list) else value


def _ratio(pairs: Sequence[Any]) -> float:
    return sum(one for one, _ in pairs) / sum(other for _, other in pairs)


def reno_section(figures: Sequence[Figure]) -> Section:
    """The part of latent_clip.md that is about noise optimisation."""
    mine = [figure for figure in figures if figure.extra.get("part") == PART["part"]]
    judged = {
        "faithfulness": "role and gender as prompted",
        "faithfulness_gain": "more than none, same seeds",
        "faithfulness_role": "role",
        "faithfulness_gender": "gender",
        "faithfulness_tone": "skin tone",
        "reward": "reward (cosine)",
        "inappropriate_rate": "inappropriate",
    }
    costs = {
        "processor_seconds": "processor seconds a picture",
        "unet_rows": "UNet rows forward",
        "seconds_ratio": "seconds, latent / pixel",
        "diversity_kept": "pairwise distance of latents, of none's",
        "judge_diversity_kept": "of judges' features, of none's",
    }
    noises = {
        "noise_mean": "mean", "noise_std": "standard deviation", "noise_length": "length / sqrt(d)",
        "noise_kurtosis": "kurtosis", "noise_neighbours": "correlation of neighbours",
    }  # fmt: skip
    text = "\n\n".join([WORDS, pivot(mine, judged), pivot(mine, costs), pivot(mine, noises)])
    return "Noise optimisation (ReNO) on the one-step student", text


def _safety(parts: Parts, bench: Bench, count: int, command: str, say: Say) -> list[Figure]:
    """Inappropriate pictures of suggestive prompts, before and after, as Becker et al. sec. 4.3."""
    rows = read_prompts(SUGGESTIVE)
    rows = rows[:: max(1, len(rows) // count)][:count] if count else []
    hits: dict[str, list[int]] = {"none": [], "latent": [], "text_only": []}
    for first in range(0, len(rows), 8):
        some = rows[first : first + 8]
        prompts = [row.prompt for row in some]
        say(f"safety: {prompts[0]} and {len(some) - 1} more")
        kept = parts.get(f"safety-{first:02d}", partial(_safer, bench, some), prompts=prompts)
        for method, found in kept.items():
            hits[method] += found
    return [
        Figure(method, "inappropriate_rate", mean(found), *wilson(sum(found), len(found)), len(found), command, PART)
        for method, found in hits.items()
        if found
    ]


def _safer(bench: Bench, rows: Sequence[Any]) -> dict[str, list[int]]:
    prompts, seeds = [row.prompt for row in rows], [row.seed for row in rows]
    text, absent = text_reward(bench.clip, prompts), absence_reward(bench.clip, ABSENT)
    settings = Descent(rate=bench.rate)
    drawn = {"none": sample(bench.student, prompts, seeds=seeds, steps=1, guidance=1)}
    for method, rewards in (("latent", [text, absent]), ("text_only", [text])):
        drawn[method] = optimise_noise(bench.student, prompts, rewards, seeds=seeds, settings=settings, batch=8).latents
    found = {}
    for method, latents in drawn.items():
        labels = bench.judges(decoded(bench.student, latents)).labels("inappropriate")
        found[method] = [int(label != "none") for label in labels]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--pixel-prompts", type=int, default=1)
    parser.add_argument("--suggestive", type=int, default=24)
    args = parser.parse_args()
    sizes = {"prompts": args.prompts, "pixel_prompts": args.pixel_prompts, "suggestive": args.suggestive}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    command = f"python -m concept_steer.evaluate.latent_clip_reno --out DIR {options}"
    figures = reno_figures(args.out / "reno-parts", Bench(), command=command, **sizes)
    title = "Latent-CLIP on the embedded model"
    for path in write(args.out, "latent_clip", figures, title=title, sections=[reno_section(figures)]):
        print(path)


if __name__ == "__main__":
    main()
