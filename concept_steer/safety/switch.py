"""One switch: from settings and a model to what is done at every step. It fails closed.

Levels: with vectors, the strength and the gate's threshold that the set was learned with; with Safe Latent Diffusion,
its presets. Where both act, the gated vectors keep the picture's h clean, and guidance draws something else in place of
what they take away: below "strict" for those pictures only whose gate has opened, at "strict" for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import SafetyError, VectorFileError
from ..family import family as family_of
from ..guidance.safe_latent_diffusion import SAFETY_TEXT, SafeLatentDiffusion
from ..steering import Steer
from .gate import Firings
from .gated_guidance import GatedGuidance
from .known import TEXTS
from .report import SafetyReport
from .safety_set import SafetySet, find_safety_set
from .settings import SafetySettings

PRESETS = {"gentle": "medium", "standard": "strong", "strict": "max"}  # of Safe Latent Diffusion, for every picture
GATED_PRESETS = {"gentle": "strong", "standard": "max"}  # where it guides only pictures whose gate has opened
NEXT = {"medium": "strong", "strong": "max", "max": "max"}
BEGINNING = "an image showing "  # as the published text begins
GROWTH = 1.5  # of the vectors' strength at every further try


@dataclass(frozen=True)
class SafetyPlan:
    """What is in force for one model. steers: for the prompt's rows, each with its gate. guide: guidance's settings.

    method: "off", "vectors", "sld" or "both". gated: whether guidance is for those pictures only whose gate has opened.
    firings: counts what the gates of `steers` open; `reset` it before a run. attempt: how often it has been made
    stronger.
    """

    settings: SafetySettings
    method: str = "off"
    steers: tuple[Steer, ...] = ()
    guide: SafeLatentDiffusion | None = None
    gated: bool = False
    set: SafetySet | None = None
    categories: tuple[str, ...] = ()
    firings: Firings = field(default_factory=Firings, compare=False)
    attempt: int = 0

    @property
    def acts(self) -> bool:
        return bool(self.steers) or self.guide is not None

    @property
    def guidance(self) -> SafeLatentDiffusion | GatedGuidance | None:
        """For `sampling.sample`."""
        if self.guide is None or not self.gated:
            return self.guide
        return GatedGuidance(self.guide, self.firings)

    def stronger(self) -> SafetyPlan:
        """For a further try: vectors half as strong again, the next preset of guidance, and firings of its own."""
        attempt, firings = self.attempt + 1, Firings()
        steers: tuple[Steer, ...] = ()
        if self.set is not None and self.steers:
            chosen = self.settings.categories
            steers = tuple(self.set.steers(self.settings.level, chosen, firings, GROWTH**attempt))
        guide = self.guide
        if guide is not None:
            preset = (GATED_PRESETS if self.gated else PRESETS)[self.settings.level]
            for _ in range(attempt):
                preset = NEXT[preset]
            guide = SafeLatentDiffusion.preset(preset, text=guide.text)
        return replace(self, steers=steers, guide=guide, firings=firings, attempt=attempt)

    def check_ran(self) -> None:
        """After a run. Errors: SafetyError when the gates were never asked, so that nothing can have been kept out."""
        if self.steers and not self.firings.pictures:
            raise SafetyError(
                "The safety vectors were switched on, but the model was run without them: another node or tool "
                "bypasses the steering. Use the model that the safety switch hands out, or method 'sld'."
            )

    def report(self) -> SafetyReport:
        """Without a word on finished pictures; `check` says that."""
        counted = self.firings.to_dict() if self.steers else {}
        return SafetyReport(self.settings.level, self.method, self.categories, counted)

    def text(self) -> str:
        """What will happen, in a few lines."""
        if self.method == "off":
            return "Safety is off."
        lines = [f"Safety {self.settings.level}: {', '.join(self.categories) or 'all categories'}."]
        if self.set is not None and self.steers:
            gates = ", ".join(
                f"{getattr(s.gate, 'label', '')} (strength {s.strength:g}, threshold {_threshold(s):.2f})"
                for s in self.steers
            )
            lines.append(f"Learned vectors of the set {self.set.name!r}, only where a concept shows: {gates}.")
            if self.settings.texts and self.guide is None:
                lines.append("The texts given are not read: vectors keep the meaning they were learned with.")
        if self.method == "vectors" and self.settings.method == "auto":
            lines.append("There is no place for guidance here: where the vectors act, pictures lose form.")
        if self.guide is not None:
            whom = "of those pictures only" if self.gated else "a picture and step"
            lines.append(f"Safe Latent Diffusion away from: {self.guide.text} (one more UNet row {whom}).")
        return "\n".join(lines)


def _threshold(steer: Steer) -> float:
    return float(getattr(steer.gate, "threshold", 0.0))


def plan(
    settings: SafetySettings,
    family: str,
    channels: int,
    *,
    sets: Sequence[SafetySet] = (),
    folders: Sequence[Path | str] | None = None,
    can_guide: bool = True,
) -> SafetyPlan:
    """What the settings mean for a model of this family and mid-block width.

    sets: named by the user; else one is looked for in `folders` (default: the library, and what ships with the demo
    model). can_guide: whether the host can predict a safety text beside the prompt.
    "auto": where there is a set both, or vectors alone if the host cannot guide; else guidance.
    Errors: SafetyError when nothing of what was asked for is possible, for unknown categories or a damaged set;
    FamilyMismatch for sets of other models.
    """
    if not settings.on:
        return SafetyPlan(settings)
    found = _set_for(family, channels, sets, folders)  # guidance too is told what the set's categories mean
    method = _method(settings, family, found, can_guide)
    categories = settings.categories or (found.categories if found else ())
    firings = Firings()
    steers: tuple[Steer, ...] = ()
    if method != "sld" and found is not None:
        steers = tuple(found.steers(settings.level, settings.categories, firings))
    guide, gated = None, method == "both" and settings.level in GATED_PRESETS
    if method != "vectors":
        text = safety_text(settings, found)
        guide = SafeLatentDiffusion.preset((GATED_PRESETS if gated else PRESETS)[settings.level], text=text)
    return SafetyPlan(settings, method, steers, guide, gated, found, categories, firings)


def _set_for(
    family: str, channels: int, sets: Sequence[SafetySet], folders: Sequence[Path | str] | None
) -> SafetySet | None:
    for one in sets:
        if one.family == family:
            one.check(family, channels)
            return one
    if sets:
        sets[0].check(family, channels)  # raises: it is of another family
    try:
        found = find_safety_set(family, folders)
    except VectorFileError as error:
        raise SafetyError(f"A safety set cannot be used, so nothing is drawn. {error}") from error
    if found is not None:
        found.check(family, channels)
    return found


def _method(settings: SafetySettings, family: str, found: SafetySet | None, can_guide: bool) -> str:
    wanted = settings.method
    if wanted == "auto":
        wanted = "sld" if found is None else "both" if can_guide else "vectors"
    if wanted in ("vectors", "both") and found is None:
        raise SafetyError(
            f"Safety is on, but there are no safety vectors for {family_of(family).title} ({family}), so nothing is "
            "drawn. Learn them (`concept-steer learn-safety`, or the node Learn Safety Vectors), or choose the method "
            "'sld'."
        )
    if wanted in ("sld", "both") and not can_guide:
        raise SafetyError(
            f"Safety is on, but Safe Latent Diffusion is not possible here, and "
            f"{'it was asked for' if settings.method != 'auto' else f'there are no safety vectors for {family!r}'}, so "
            "nothing is drawn. Learn safety vectors for this model, or use a sampler with guidance."
        )
    return wanted


def safety_text(settings: SafetySettings, found: SafetySet | None = None) -> str:
    """What Safe Latent Diffusion keeps away from: the user's words, else the set's, else the published ones.

    Errors: SafetyError for a category that nobody says the meaning of.
    """
    words: Mapping[str, str] = {**(TEXTS if found is None else found.texts), **settings.texts}
    if unknown := [name for name in settings.categories if name not in words]:
        raise SafetyError(
            f"Safety is on, but nothing says what {', '.join(map(repr, unknown))} means; known are {', '.join(words)}. "
            "Give a text for it, or leave the categories empty for all of them."
        )
    if not settings.categories and not settings.texts and found is None:
        return SAFETY_TEXT
    names = settings.categories or tuple(words)
    parts = [part.strip() for name in names for part in words[name].split(",")]
    return BEGINNING + ", ".join(dict.fromkeys(part for part in parts if part))
