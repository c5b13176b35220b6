"""`evaluate audit`: what the audit foretells, held against the data card and against judged pictures.

Everything expensive is kept in OUT/audit-parts, so that a stopped run goes on; pictures may be drawn later and by
another process: what is there counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..analysis.audit import AuditSettings
from ..analysis.reading import ReadSettings
from ..analysis.word_list import WordList
from ..demo import model, world
from ..demo.auditing import usual_words
from ..demo.job import Studio
from ..demo.words import NEUTRAL
from ..fairness import Attribute
from . import audit_checks as checks
from .audit_clusters import cluster_choices, clusters_recovered
from .audit_drawing import DRAWING, DTYPE, Observed, draw_blocks, drawing_studio, from_fairness, observed, role_prompts
from .audit_reading import Leans, h_leans, text_leans
from .parts import Parts

ATTRIBUTES = ("gender", "skin tone")
SEEDS = 8
H, PREDICTION = ReadSettings(seeds=SEEDS, neutral=NEUTRAL), replace(AuditSettings().defaults, neutral=NEUTRAL)
ABLATION: dict[str, tuple[ReadSettings, str]] = {  # name -> settings, similarity; gender only
    "the default: prediction at .1, 8 seeds": (PREDICTION, "mixture"),
    "prediction at 0": (replace(PREDICTION, moments=(0.0,)), "mixture"),
    "prediction at .3": (replace(PREDICTION, moments=(0.3,)), "mixture"),
    "prediction at .1, 2 seeds": (replace(PREDICTION, seeds=2), "mixture"),
    "prediction at .1, another neutral prompt": (replace(PREDICTION, neutral="a student"), "mixture"),
    "prediction at .1, one direction (cosine)": (PREDICTION, "cosine"),
    "h, mean, at 0": (H, "mixture"),
    "h, mean, at 0, 2 seeds": (replace(H, seeds=2), "mixture"),
    "h, mean, at .3": (replace(H, moments=(0.3,)), "mixture"),
    "h, map, at 0": (replace(H, space="map"), "mixture"),
    "h, map, at .3": (replace(H, space="map", moments=(0.3,)), "mixture"),
    "h, mean, at 0, one direction (cosine)": (H, "cosine"),
    "h, mean, at .3, one-step estimate": (replace(H, moments=(0.3,), path="one step"), "mixture"),
}
Say = Callable[[str], None]


@dataclass
class Found:
    """All that the report is made of. leans: (method, attribute) -> reading; truth by attribute and role."""

    words: WordList
    leans: dict[tuple[str, str], Leans] = field(default_factory=dict)
    ablation: dict[str, Leans] = field(default_factory=dict)
    pictures: dict[str, Observed] = field(default_factory=dict)
    scenes: dict[str, float] = field(default_factory=dict)
    scene_pictures: dict[str, Observed] = field(default_factory=dict)
    named: list[dict[str, Any]] = field(default_factory=list)
    clusters: dict[str, float] = field(default_factory=dict)
    cluster_choices: dict[str, dict[str, float]] = field(default_factory=dict)
    placed: dict[str, Any] = field(default_factory=dict)
    speed: dict[int, dict[str, Any]] = field(default_factory=dict)  # by seeds
    steering: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cost: dict[str, Mapping[str, float]] = field(default_factory=dict)


def run(
    out: Path,
    *,
    pictures: int = 100,
    drawn: Path | None = None,
    vectors: Sequence[Path] = (),
    attributes: Mapping[str, Path] | None = None,
    prompts: int = 5000,
    draw_only: bool = False,
    command: str,
    say: Say = print,
) -> list[Path]:
    """pictures: for each role and scene, 0 draws none and takes what is there. drawn: a folder of `evaluate fairness`,
    whose unsteered pictures count too. vectors: files to name; attributes: attribute -> its learned file."""
    folder = out / "audit-parts"
    drawing = Parts(
        folder, {"checkpoint": "demo", "steps": DRAWING.steps, "guidance": DRAWING.guidance, "dtype": DTYPE}
    )
    asked = [*role_prompts().values(), *world.SCENES]
    if pictures:
        draw_blocks(drawing_studio(), drawing, asked, pictures, say)
    if draw_only:
        return []
    studio = Studio()
    found = Found(usual_words("demo"))
    parts = Parts(folder, {"checkpoint": studio.denoiser.checkpoint_hash, "seeds": SEEDS})
    checkpoint = model.file_hash(model.MODEL_FILE) if drawn else ""
    for role, prompt in role_prompts().items():
        one = (from_fairness(drawn, role, checkpoint) if drawn else None) or observed(drawing, prompt)
        if one is not None:
            found.pictures[role] = one
    found.scene_pictures = {s: one for s in world.SCENES if (one := observed(drawing, s)) is not None}
    _readings(studio, found, parts, say)
    _checks(studio, found, parts, vectors, attributes or {}, prompts, folder, say)
    if drawn:
        found.placed = parts.get("placed", lambda: checks.pictures_placed(studio.denoiser, drawn))
    _ablation(studio, found, parts, say)
    from .audit_report import write_report

    return write_report(out, found, command)


def _readings(studio: Studio, found: Found, parts: Parts, say: Say) -> None:
    for attribute in ATTRIBUTES:
        for method, settings in (("h_space", H), ("prediction", PREDICTION)):
            say(f"reading {attribute}: {method}")
            found.leans[method, attribute] = _kept(
                parts,
                f"leans-{method}-{attribute}",
                lambda a=attribute, s=settings: h_leans(studio.denoiser, found.words, a, s),  # type: ignore[misc]
                settings,
            )
        found.leans["text_space", attribute] = _kept(
            parts,
            f"leans-text-{attribute}",
            lambda a=attribute: text_leans(studio.denoiser, found.words, a),  # type: ignore[misc]
        )


def _ablation(studio: Studio, found: Found, parts: Parts, say: Say) -> None:
    for name, (settings, similarity) in ABLATION.items():
        say(f"ablation: {name}")
        found.ablation[name] = _kept(
            parts,
            f"ablation-{name}",
            lambda s=settings, k=similarity: h_leans(studio.denoiser, found.words, "gender", s, k),  # type: ignore[misc]
            settings,
        )


def _kept(parts: Parts, name: str, make: Callable[[], Leans], settings: ReadSettings | None = None) -> Leans:
    own = {"reading": asdict(settings)} if settings else {}
    return Leans(**parts.get(name, lambda: make().as_dict(), **own))


def _checks(
    studio: Studio,
    found: Found,
    parts: Parts,
    vectors: Sequence[Path],
    attributes: Mapping[str, Path],
    prompts: int,
    folder: Path,
    say: Say,
) -> None:
    model = studio.denoiser
    say("scenes, names, clusters")
    found.scenes = parts.get("scenes", lambda: checks.scene_leans(model, H))
    files = sorted(str(file) for file in vectors)
    found.named = parts.get("names", lambda: {"all": checks.named_right(model, vectors, H)}, files=files)["all"]
    found.clusters = parts.get("clusters", lambda: clusters_recovered(model, H))
    found.cluster_choices = parts.get("cluster-choices", lambda: cluster_choices(model, H))
    for name, file in attributes.items():
        say(f"steering: {name}")
        found.steering[name] = parts.get(
            f"steering-{name}",
            lambda n=name, f=file: {"all": checks.steering_changes(model, found.words, Attribute.load(f), n)},  # type: ignore[misc]
            file=str(file),
        )["all"]
    say("cost")
    for method, settings in (("h_space", H), ("prediction", PREDICTION)):
        found.cost[method] = parts.get(
            f"cost-{method}",
            lambda s=settings: dict(checks.cost_of(model, found.words, "gender", s)),  # type: ignore[misc]
        )
    found.cost["generate_and_judge"] = parts.get("cost-drawing", lambda: _drawing_cost())
    if prompts:
        say(f"{prompts} prompts in one run")
        for seeds, count in ((4, prompts), (8, max(40, prompts // 10)), (16, max(40, prompts // 10))):
            found.speed[seeds] = parts.get(
                f"reading-speed-{seeds}",
                lambda s=seeds, n=count: checks.throughput(model, folder / f"readings-{s}", n, s),  # type: ignore[misc]
                prompts=count,
            )


def _drawing_cost(pictures: int = 8) -> dict[str, float]:
    """Rows and processor seconds of drawing and judging one role's 100 pictures, from some of them."""
    import time

    from .studio import verdicts

    studio = drawing_studio()
    cost, began = studio.denoiser.cost.snapshot(), time.process_time()
    verdicts(studio, ["a doctor"], range(pictures), DRAWING)
    factor = 100 / pictures
    return {
        "rows": studio.denoiser.cost.since(cost).unet_rows * factor,
        "seconds": (time.process_time() - began) * factor,
    }
