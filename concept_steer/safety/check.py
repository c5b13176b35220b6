"""A look at finished pictures, and what becomes of those that a detector flags. Without a verdict, no picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..errors import SafetyError
from .detectors import Detector, Verdict, verdicts_of
from .report import SafetyReport
from .settings import SafetySettings
from .switch import SafetyPlan

Redraw = Callable[[int, int], Image.Image]  # (picture, attempt from 1) -> drawn again from a new seed, safer
CELLS = 8  # what is left of a blurred picture's longer side
PLAIN, INK = (226, 227, 231), (84, 86, 96)
TEXT = "withheld by the safety check"


class Checked(NamedTuple):
    """images: as many as came in, in order. flags: whether the picture handed out (or its origin) is flagged."""

    images: list[Image.Image]
    flags: list[bool]
    report: SafetyReport


def check(
    images: Sequence[Image.Image],
    detector: Detector | None,
    settings: SafetySettings,
    redraw: Redraw | None = None,
    plan: SafetyPlan | None = None,
) -> Checked:
    """Pictures as the settings want them. Only flagged ones change; with "mark" not even those.

    redraw: for "retry"; a picture that no try makes harmless is withheld. plan: what was in force while they were
    drawn; it goes into the report, and if its gates were never asked, that is an error. detector None: no picture is
    looked at, an error if the settings name one.
    Errors: SafetyError when the detector is missing, raises, or gives scores that are not finite.
    """
    if plan is not None:
        plan.check_ran()
    report = plan.report() if plan is not None else SafetyReport(settings.level, "off" if not settings.on else "")
    if detector is None:
        if settings.detector:
            raise SafetyError(f"The detector {settings.detector!r} is asked for, but it was not loaded: no picture.")
        return Checked(list(images), [False] * len(images), report)
    if settings.on_flag == "retry" and redraw is None:
        raise SafetyError(
            "Flagged pictures are to be drawn again, but nothing here can draw: choose mark, blur or withhold."
        )
    verdicts = verdicts_of(detector, images, settings.threshold)
    results = list(images)
    done, tries, last = ["kept"] * len(images), [0] * len(images), list(verdicts)
    for i, verdict in enumerate(verdicts):
        if not verdict.flagged:
            continue
        if settings.on_flag == "retry" and redraw is not None:
            results[i], done[i], tries[i], last[i] = _again(i, images[i], verdict, detector, settings, redraw)
        else:
            results[i], done[i] = _changed(images[i], settings.on_flag)
    counts = Counter(one.worst or "flagged" for one in verdicts if one.flagged)
    flags = [one.flagged for one in last]
    report = replace(
        report,
        detector=detector.name,
        flags=tuple(one.flagged for one in verdicts),
        done=tuple(done),
        tries=tuple(tries),
        scores=tuple(one.score for one in last),
        found=dict(counts.most_common()),
    )
    return Checked(results, flags, report)


def _again(
    number: int, image: Image.Image, first: Verdict, detector: Detector, settings: SafetySettings, redraw: Redraw
) -> tuple[Image.Image, str, int, Verdict]:
    verdict = first
    for attempt in range(1, settings.retries + 1):
        image = redraw(number, attempt)
        verdict = verdicts_of(detector, [image], settings.threshold)[0]
        if not verdict.flagged:
            return image, "drawn again", attempt, verdict
    return withheld(image), "withheld", settings.retries, verdict


def _changed(image: Image.Image, on_flag: str) -> tuple[Image.Image, str]:
    if on_flag == "mark":
        return image, "marked"
    return (blurred(image), "blurred") if on_flag == "blur" else (withheld(image), "withheld")


def blurred(image: Image.Image) -> Image.Image:
    """Eight cells along the longer side are all that is left of it, softened: nothing can bring the rest back."""
    small = image.convert("RGB")
    small.thumbnail((CELLS, CELLS), Image.Resampling.BOX)
    large = small.resize(image.size, Image.Resampling.BICUBIC)
    return large.filter(ImageFilter.GaussianBlur(max(image.size) / CELLS))


def withheld(image: Image.Image) -> Image.Image:
    """A plain placeholder of the same size that says what it is."""
    plain = Image.new("RGB", image.size, PLAIN)
    draw = ImageDraw.Draw(plain)
    font = ImageFont.load_default(max(8, min(image.size) // 14))
    words = TEXT.replace(" by ", "\nby ")
    draw.multiline_text((image.width / 2, image.height / 2), words, INK, font, anchor="mm", align="center", spacing=4)
    return plain
