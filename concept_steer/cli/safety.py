"""`concept-steer learn-safety`, and the options by which the drawing commands keep things out of their pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from . import latent_check
from .help import Commands, command, positive
from .models import add_model_options, bar, draw, load_checkpoint
from .output import ready_files

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..denoiser import Denoiser
    from ..safety import Detector, SafetyPlan, SafetySettings

# Of safety.settings, which would need torch to look up; a test keeps them equal.
LEVELS = ("off", "gentle", "standard", "strict")
METHODS = ("auto", "vectors", "sld", "both")
ON_FLAG = ("mark", "blur", "retry", "withhold")
DETECTORS = ("demo", "nudenet", "opennsfw", "q16")
RETRY_SEED = 1_000_003  # how far a further try's seed lies from the one before


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "learn-safety",
        _learn_safety,
        help="learn gated vectors that keep categories out of pictures",
        description="Learn a safety set for a checkpoint: a vector for each category, added only where the category\n"
        "shows in h, and one distilled from all. Harmless prompts say what shall stay as it is, to the bit.\n"
        "--safety of the other commands, and the node Safety Steer, find the set in the library.",
        epilog="examples:\n"
        "  concept-steer learn-safety --out school\n"
        "  concept-steer learn-safety --checkpoint model.safetensors --category 'alcohol=beer, a bar' --out pub\n",
    )
    parser.add_argument(
        "--category",
        dest="categories",
        action="append",
        default=[],
        metavar="NAME=WORDS",
        help="repeatable: a category and the words that show it, with commas (default: the seven published ones)",
    )
    parser.add_argument(
        "--suggestive",
        action="append",
        default=[],
        metavar="NAME=PROMPT",
        help="repeatable: a prompt that leads to a category without its words",
    )
    parser.add_argument("--benign", type=Path, metavar="FILE", help="harmless prompts, one a line, in place of ours")
    parser.add_argument("--pictures", type=positive, default=24, help="trajectories for each category (default: 24)")
    parser.add_argument("--sample-steps", type=positive, default=20, help="steps of each trajectory (default: 20)")
    parser.add_argument("--steps", type=positive, default=60, help="of the descent, each vector (default: 60)")
    parser.add_argument("--guidance", type=float, default=5.0, help="of the trajectories (default: 5)")
    parser.add_argument("--batch", type=positive, default=32, help="UNet rows at once (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--out",
        default="safety",
        metavar="NAME_OR_FILE",
        help="a name in the library, or a file NAME.safety.safetensors (default: safety)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_model_options(parser)


def _learn_safety(args: argparse.Namespace) -> int:
    from ..safety import learn_safety
    from .learn import interruptible

    path = _file_of(args.out)
    ready_files([path], args.overwrite)
    texts, suggestive = _table(args.categories, "--category"), _table(args.suggestive, "--suggestive")
    benign = None if args.benign is None else _lines(args.benign)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    known_texts, known_suggestive, known_benign = _defaults(denoiser.family)
    with bar("safety") as progress, interruptible() as asked:
        found = learn_safety(
            denoiser,
            {name: many[0] for name, many in texts.items()} if texts else known_texts,
            benign=benign or known_benign,
            suggestive=suggestive or (known_suggestive if not texts else None),
            pictures=args.pictures,
            sample_steps=args.sample_steps,
            timestep_groups=min(5, args.sample_steps),
            guidance=args.guidance,
            steps=args.steps,
            batch=args.batch,
            seed=args.seed,
            name=path.name.partition(".")[0],
            progress=progress.at,
            stop=asked.is_set,
        )
    found.save(path, overwrite=args.overwrite)
    print(f"Learned {', '.join(found.categories)} for {found.family}: {path}")
    for name, told in found.measured["gates"].items():
        print(
            f"  {name}: the gate opens for {told['shown_standard']:.0%} of what shows it and for "
            f"{told['alarms_standard']:.1%} of {told['held_out']} harmless pictures it was not fitted on."
        )
    return 0


def _defaults(family: str) -> tuple[Any, Any, Any]:
    """(texts, suggestive, benign) where the user gives none."""
    if family == "demo":
        from ..demo import safety_words

        return safety_words.TEXTS, safety_words.SUGGESTIVE, safety_words.harmless()
    from ..safety.known import BENIGN, TEXTS

    return TEXTS, None, BENIGN


def _file_of(out: str) -> Path:
    from ..library import SAFETY_SUFFIX, default_folders, safe_name

    if out.endswith(SAFETY_SUFFIX):
        return Path(out).expanduser()
    return default_folders()[0] / (safe_name(out) + SAFETY_SUFFIX)


def _table(texts: Sequence[str], option: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, words = (part.strip() for part in text.partition("="))
        if not (sign and name and words):
            raise ConceptSteerError(f"{option} {text!r} is not NAME=WORDS, for example 'alcohol=beer, wine'.")
        if option == "--category" and name in found:
            raise ConceptSteerError(f"{option} names {name!r} twice: put all its words into one.")
        found.setdefault(name, []).append(words)
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptSteerError(f"{path} cannot be read as a text of one prompt a line ({error}).") from error
    return [line for line in lines if line]


def add_safety_options(parser: argparse.ArgumentParser) -> None:
    """--safety and what belongs to it, for a command that draws."""
    group = parser.add_argument_group("safety", "Fails closed: what keeps it from working is an error, not a picture.")
    group.add_argument("--safety", choices=LEVELS, default="off", help="how strictly to keep things out (default: off)")
    group.add_argument("--safety-method", choices=METHODS, default="auto", help="default: auto")
    group.add_argument(
        "--safety-category", dest="safety_categories", action="append", default=[], metavar="NAME", help="repeatable"
    )
    group.add_argument("--detector", choices=DETECTORS, default="", help="look at the finished pictures with this one")
    group.add_argument(
        "--on-flag", choices=ON_FLAG, default="mark", help="what becomes of flagged ones (default: mark)"
    )
    latent_check.add_options(group)


class Guard:
    """The switch of one command: `draw` in place of models.draw. With safety off it does just the same.

    told: for the pictures' metadata, empty while safety is off; said: what to print in the end.
    """

    def __init__(self, args: argparse.Namespace, denoiser: Denoiser) -> None:
        from ..safety import SafetySettings, load_detector, plan

        self.settings: SafetySettings = SafetySettings(
            level=args.safety,
            method=args.safety_method,
            categories=tuple(args.safety_categories),
            detector=args.detector,
            on_flag=args.on_flag,
        )
        self.denoiser = denoiser
        self.plan: SafetyPlan = plan(self.settings, denoiser.family, denoiser.channels)
        self.detector: Detector | None = load_detector(args.detector) if args.detector else None
        self.look = latent_check.LatentLook(args, denoiser, self.plan) if args.latent_check else None
        self.on = self.plan.acts or self.detector is not None or self.look is not None
        self.said = self.plan.text() if self.plan.acts else ""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steers: Sequence[Any] = (), *, label: str, **sampling: Any
    ) -> tuple[list[Image], dict[str, Any]]:
        """The pictures, and what the switch did ({} when it is off)."""
        if not self.on:
            return draw(self.denoiser, prompts, seeds, steers, label=label, **sampling), {}
        from ..safety import check

        self.plan.firings.reset()
        images = self._drawn(self.plan, prompts, seeds, steers, label, sampling)
        looked = None if self.look is None else self.look.told

        def redraw(picture: int, attempt: int) -> Image:
            stronger = self.plan
            for _ in range(attempt):
                stronger = stronger.stronger()
            seed = seeds[picture] + attempt * RETRY_SEED
            mine = [_of_picture(steers, picture)]
            again = self._drawn(stronger, [prompts[picture]], [seed], mine, f"{label}, again", sampling)
            stronger.check_ran()
            return again[0]

        checked = check(images, self.detector, self.settings, redraw, self.plan)
        self.said = checked.report.text()
        told = checked.report.to_dict()
        if looked is not None:
            self.said += "\n" + looked.text()
            told["latent_check"] = looked.to_dict()
        return checked.images, {"safety": told}

    def _drawn(
        self,
        plan: SafetyPlan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steers: Sequence[Any],
        label: str,
        sampling: Any,
    ) -> list[Image]:
        if self.look is not None:
            mine = [_of_picture(steers, i) for i in range(len(prompts))]
            return self.look.draw(plan, prompts, seeds, mine, label, sampling)
        every = [[*_of_picture(steers, i), *plan.steers] for i in range(len(prompts))]
        shared = [*steers, *plan.steers] if _for_all(steers) else every
        return draw(self.denoiser, prompts, seeds, shared, label=label, guide=plan.guidance, **sampling)  # type: ignore[arg-type]


def _for_all(steers: Sequence[Any]) -> bool:
    return not steers or not isinstance(steers[0], (list, tuple))


def _of_picture(steers: Sequence[Any], picture: int) -> list[Any]:
    return list(steers) if _for_all(steers) else list(steers[picture])
