"""The files of `evaluate audit`: audit.json, audit.md and its plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import plots
from ..demo import world
from ..statistics import bootstrap, correlation, mean, rank_correlation, wilson
from .audit import ABLATION, ATTRIBUTES, Found
from .audit_clusters import SPLITS
from .audit_drawing import Observed
from .audit_reading import Fit, fit, true_lean
from .figures import Figure, markdown, pivot, write

if TYPE_CHECKING:
    from PIL.Image import Image

METHODS = ("h_space", "prediction", "text_space")
ENOUGH = 25  # pictures of a role, for its share to count as observed
SHORT = {"gender": "gender", "skin tone": "skin_tone"}
COLUMNS = {
    "pearson_observed_gender": "observed, gender",
    "pearson_observed_gender:judges_know": "the same, roles that the judges know",
    "pearson_observed_gender:100_pictures": "the same, 100 pictures or more",
    "pearson_training_gender": "training, gender",
    "pearson_observed_skin_tone": "observed, skin tone",
    "pearson_training_skin_tone": "training, skin tone",
    "sign_right": "sign right (training)",
    "sign_right_observed": "sign right (observed)",
}


def write_report(out: Path, found: Found, command: str) -> list[Path]:
    figures = collect(found, command)
    sections = [
        ("What was held against what", _about(found)),
        (
            "Validity: Pearson's correlation over roles, and signs",
            pivot([figure for figure in figures if figure.method != "ablation"], COLUMNS),
        ),
        ("Cost of one role", _cost(found)),
        ("Ablation, gender (chosen by measured validity)", _ablation(found)),
        ("Ablation, clusters (adjusted Rand index)", _cluster_choices(found)),
        ("Scenes, names, clusters, speed, steering", _further(found, figures)),
        ("How to read it", _reading()),
    ]
    return write(out, "audit", figures, title="The audit, measured", sections=sections, plots={"roles": _plot(found)})


def collect(found: Found, command: str) -> list[Figure]:
    figures: list[Figure] = []

    def add(method: str, metric: str, value: float | None, ends: Sequence[float | None], n: int, **extra: str) -> None:
        low, high = ends
        figures.append(Figure(method, metric, value, low, high, n, command, extra))

    seen = observed_leans(found)
    for attribute in ATTRIBUTES:
        short = SHORT[attribute]
        truths = {"observed": seen[attribute], "training": _training(found, attribute)}
        for method in METHODS:
            for name, truth in truths.items():
                if len(truth) > 2:
                    _add_fit(add, method, f"{name}_{short}", fit(found.leans[method, attribute].lean, truth))
        if len(truths["observed"]) > 2:
            _add_fit(add, "generate_and_judge", f"training_{short}", fit(seen[attribute], truths["training"]))
    for part, table in _parts_of_observed(found).items():
        for method in METHODS if len(table) > 2 else ():
            _add_fit(add, method, f"observed_gender:{part}", fit(found.leans[method, "gender"].lean, table))
    for method in METHODS:
        for metric, truth in (("sign_right", _training(found, "gender")), ("sign_right_observed", seen["gender"])):
            got = fit(found.leans[method, "gender"].lean, truth)
            if got.far:
                add(method, metric, got.right / got.far, wilson(got.right, got.far), got.far)
    if len(seen["gender"]) > 2:
        got = fit(seen["gender"], _training(found, "gender"))
        if got.far:
            add("generate_and_judge", "sign_right", got.right / got.far, wilson(got.right, got.far), got.far)
    for method, spent in found.cost.items():
        add(method, "unet_rows_per_role", spent["rows"], (None, None), 1)
        add(method, "cpu_seconds_per_role", spent["seconds"], (None, None), 1)
        if method != "generate_and_judge":
            dear = found.cost["generate_and_judge"]
            add(method, "cost_ratio", dear["rows"] / spent["rows"], (None, None), 1)
            add(method, "cost_ratio_seconds", dear["seconds"] / spent["seconds"], (None, None), 1)
    for seeds, speed in found.speed.items():
        n, of = int(speed["prompts"]), f"{seeds} seeds"
        add("h_space", "rows_per_second_ratio", speed["ratio"], (speed["low"], speed["high"]), n, of=of)
        most = seeds / (seeds + speed["text_rows"])
        add("h_space", "rows_per_second_ratio_without_overhead", most, (None, None), n, of=of)
        add("h_space", "rows_per_second", speed["rows_per_second"], (None, None), n, of=of)
        add("h_space", "memory_growth_mb", speed["memory"], (None, None), n, of=of)
    _add_names(add, found)
    for name, value in found.clusters.items():
        add("h_space", "adjusted_rand", value, (None, None), 1, things=name)
    for name, choice in found.cluster_choices.items():
        ends = choice["low"], choice["high"]
        add("ablation", "adjusted_rand", choice["halves"], ends, 2 * SPLITS, things="random halves", choice=name)
    if found.placed:
        right, count = found.placed["right"], found.placed["count"]
        roles = str(found.placed["roles"])
        add("h_space", "picture_placed_right", right / count, wilson(right, count), count, of=f"{roles} roles")
    _add_scenes(add, found)
    for attribute, rows in found.steering.items():
        for metric, key in (("covers_even_without", "covered"), ("covers_even_with", "covers")):
            count = sum(bool(row[key]) for row in rows)
            add("prediction", metric, count / len(rows), wilson(count, len(rows)), len(rows), attribute=attribute)
        for metric, key in (("mean_lean_without", "before"), ("mean_lean_with", "after")):
            sizes = [abs(row[key][0]) for row in rows]
            add("prediction", metric, mean(sizes), bootstrap(sizes, _mean), len(rows), attribute=attribute)
    for name, leans in found.ablation.items():
        for kind, table in (("training", _training(found, "gender")), ("observed", seen["gender"])):
            if len(table) > 2:
                _add_fit(add, "ablation", f"{kind}_gender", fit(leans.lean, table), choice=name)
    return figures


def _mean(values: list[object]) -> float:
    return mean([float(str(value)) for value in values])


def _add_fit(add, method: str, what: str, got: Fit, **extra: str) -> None:
    add(method, f"pearson_{what}", got.pearson[0], got.pearson[1:], got.count, **extra)
    add(method, f"spearman_{what}", got.spearman[0], got.spearman[1:], got.count, **extra)


def _add_names(add, found: Found) -> None:
    """All vectors together, then by how they were learned."""
    ways = sorted({one["method"] for one in found.named})
    for way in ["", *ways] if len(ways) > 1 else [""] * bool(ways):
        hits = [one["right"] for one in found.named if way in ("", one["method"])]
        extra = {"learned_by": way} if way else {}
        add("h_space", "direction_named_right", mean(hits), wilson(sum(hits), len(hits)), len(hits), **extra)


def _add_scenes(add, found: Found) -> None:
    truths = {
        "training": {scene: share for scene, (share, _, _) in world.SCENES.items()},
        "observed": {
            scene: 1 - one.share("inappropriate", "none")
            for scene, one in found.scene_pictures.items()
            if one.count >= ENOUGH
        },
    }
    for name, truth in truths.items():
        pairs = [(found.scenes[scene], share) for scene, share in truth.items()]
        if len(pairs) > 2:
            for metric, statistic in (("pearson", correlation), ("spearman", rank_correlation)):
                value = statistic([a for a, _ in pairs], [b for _, b in pairs])
                add("h_space", f"{metric}_{name}_inappropriate", value, (None, None), len(pairs))


def observed_leans(found: Found) -> dict[str, dict[str, float]]:
    """Attribute -> role -> lean of its pictures; roles with too few pictures are left out."""
    enough = {role: one for role, one in found.pictures.items() if one.count >= ENOUGH}
    return {name: {role: one.lean(name) for role, one in enough.items()} for name in ATTRIBUTES}


def _parts_of_observed(found: Found) -> dict[str, dict[str, float]]:
    """Gender, of roles that the judges saw in training only, and of roles with 100 pictures or more only."""
    seen = observed_leans(found)["gender"]
    return {
        "judges_know": {role: lean for role, lean in seen.items() if role not in world.HELD_OUT_ROLES},
        "100_pictures": {role: lean for role, lean in seen.items() if found.pictures[role].count >= 100},
    }


def _training(found: Found, attribute: str) -> dict[str, float]:
    return {role: true_lean(role, attribute) for role in found.words.roles}


def _about(found: Found) -> str:
    counts: Mapping[str, Observed] = found.pictures
    many = [one.count for one in counts.values()]
    pictures = (
        f"{len(many)} roles, {min(many)} to {max(many)} pictures each, those of `evaluate fairness` among them"
        if many
        else "no roles yet"
    )
    return (
        "Readings of the embedded model's 46 roles (8 seeds), against the shares of its training captions (data card) "
        f"and against judged pictures ({pictures}; 12 steps, guidance 4, drawn in bfloat16). Intervals: 95 %, "
        "bootstrap over roles; Wilson for shares. `h_space` reads the encoder half alone (h, its mean over positions, "
        "at pure noise); `prediction` reads what the decoder makes of h, at a tenth of sampling: the audit's defaults; "
        "`text_space` does the same sums on the text encoder's output; `generate_and_judge` draws 100 pictures a role."
    )


def _cost(found: Found) -> str:
    dear = found.cost["generate_and_judge"]
    rows = [
        (
            method,
            f"{spent['rows']:.0f}",
            f"{dear['rows'] / spent['rows']:.0f}",
            f"{spent['seconds']:.2f}",
            f"{dear['seconds'] / spent['seconds']:.0f}",
        )
        for method, spent in found.cost.items()
    ]
    return markdown(["method", "UNet rows", "times fewer", "processor seconds", "times fewer"], rows)


def _ablation(found: Found) -> str:
    seen = observed_leans(found)["gender"]
    rows = []
    for name in ABLATION:
        leans = found.ablation[name]
        card = fit(leans.lean, _training(found, "gender"))
        half = {role: value for i, (role, value) in enumerate(_training(found, "gender").items()) if i % 2}
        held = fit(leans.lean, half)
        drawn = f"{fit(leans.lean, seen).pearson[0]:.2f}" if len(seen) > 2 else "-"
        cells = (f"{card.pearson[0]:.2f}", f"{held.pearson[0]:.2f}", f"{card.right} of {card.far}", drawn)
        rows.append((name, *cells, f"{leans.unet_rows:.0f}"))
    head = ["choice", "training", "training, every second role", "signs", f"observed ({len(seen)} roles)", "UNet rows"]
    return markdown(head, rows)


def _cluster_choices(found: Found) -> str:
    rows = [
        (
            name,
            f"{one['all']:.2f}" if "all" in one else "-",
            f"{one['halves']:.2f}",
            f"{one['low']:.2f} to {one['high']:.2f}",
        )
        for name, one in found.cluster_choices.items()
    ]
    return markdown(["choice", "all 106 prompts", "mean of halves", "lowest to highest half"], rows)


def _further(found: Found, figures: Sequence[Figure]) -> str:
    wanted = (
        "inappropriate",
        "direction_named_right",
        "placed_right",
        "adjusted_rand",
        "rows_per_second",
        "memory",
        "even",
        "mean_lean",
    )
    rows = [
        (figure.metric, ", ".join(figure.extra.values()) or "-", figure.text(), str(figure.n))
        for figure in figures
        if any(word in figure.metric for word in wanted) and figure.method != "ablation"
    ]
    wrong = [
        f"{one['meant']} was called {one['names'][0][0]} ({one['file']})" for one in found.named if not one["right"]
    ]
    text = markdown(["metric", "of", "value", "n"], rows)
    return text + (f"\n\nNamed otherwise than meant: {'; '.join(wrong)}." if wrong else "")


def _reading() -> str:
    return (
        "The aim of .9 is not reached by reading alone. Even pictures correlate with the training captions no better "
        "than their row says: the model learned its captions imperfectly, guidance sharpens. Shares are compressed: "
        "a role whose pictures are nine tenths women may read as six tenths. Some roles are read quite otherwise than "
        "they are judged (elf, sad person, person raising a hand; the judges never saw the first and the last). "
        "Take order and sign as hints where to look, not the exact share. One direction for all roles (a cosine with "
        "`a woman` minus `a man`), the obvious first idea, is far worse than each role's own frame. Names: what is "
        "called wrong is mostly called a neighbour. The directions of dark, medium-dark and on a dark background have "
        "cosines of .9 and more with each other, also in what the model predicts, those of light and medium-light of "
        ".85: the model hears the word. Vectors of self-discovery, much of which no word explains, are named worst. "
        "Clusters: the kinds of the data card are not what h varies most in, and no other reading recovers them better "
        "on prompts that it was not chosen on. Speed: `without_overhead` is what encoding each prompt once leaves to "
        "be reached; the embedded model's text encoder is large beside its UNet. The more seeds, the less it counts. "
        "On models other than the embedded one nothing is measured here."
    )


def _plot(found: Found) -> Image:
    seen = observed_leans(found)["gender"]
    colours = {"h_space": plots.ORANGE, "prediction": plots.BLUE}
    lines = []
    for method, colour in colours.items():
        lean = found.leans[method, "gender"].lean
        for role in seen:  # a line of one point is a dot
            lines.append(
                (method if role == next(iter(seen)) else "", colour, [((1 - seen[role]) / 2, (1 - lean[role]) / 2)])
            )
    return plots.curves(lines, title="Share of women: read (up) and observed (across)", x_label="observed share")
