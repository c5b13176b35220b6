"""`concept-steer fair`: pictures of one prompt with wanted shares of gender, skin tone or what else was learned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ConceptSteerError, LibraryError
from .attributes import Definitions, attribute_of, definitions_of
from .help import Commands, command, positive
from .models import add_model_options, load_checkpoint, load_vector
from .output import ready_folder, write_picture
from .safety import Guard, add_safety_options

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..denoiser import Denoiser
    from ..fairness import Attribute, Plan, Target
    from ..vector import ConceptVector

MODES, METHODS = ("quota", "random"), ("score", "difference")  # of fairness, which would need torch to look up
COLUMNS = 8


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = command(
        commands,
        common,
        "fair",
        _fair,
        help="draw pictures with wanted shares of gender, skin tone, ...",
        description="Draw pictures of one prompt with wanted shares of an attribute. A prompt that names the\n"
        "attribute ('a woman doctor') is left alone. Phrases such as 'either male or female' switch attributes on.\n"
        "Writes the PNGs, which carry their settings, a sheet, report.txt and report.json.",
        epilog="examples:\n"
        "  concept-steer fair --prompt 'a mechanic' --attribute gender --count 16\n"
        "  concept-steer fair --prompt 'a cook' --attribute gender --attribute tone --target gender:woman=0.7,man=0.3\n"
        "  concept-steer fair --prompt 'a chef' --learn age 'young=a young {}' 'old=an old {}|an elderly {}'\n",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--attribute",
        dest="attributes",
        action="append",
        default=[],
        metavar="NAME_OR_FILE",
        help="repeatable: gender, tone, or a file NAME.attribute.safetensors; looked for in --out and the library",
    )
    parser.add_argument(
        "--learn",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "LABEL=TEMPLATE"),
        help="learn an attribute into --out, from templates with {} for the role, several with | between; gender and "
        "tone need none. On the embedded model these two are learned without being asked",
    )
    parser.add_argument("--role", dest="roles", action="append", metavar="ROLE", help="repeatable: roles to learn on")
    parser.add_argument("--method", choices=METHODS, default="score", help="of learning (default: score)")
    parser.add_argument(
        "--target",
        dest="targets",
        action="append",
        default=[],
        metavar="NAME:LABEL=SHARE,...",
        help="repeatable: shares that sum to 1 (default: equal ones)",
    )
    parser.add_argument("--count", type=positive, default=16, help="pictures (default: 16)")
    parser.add_argument("--first", type=int, default=0, help="number of the first picture of the run (default: 0)")
    parser.add_argument("--mode", choices=MODES, default="quota", help="quota: exact shares; random: independent draws")
    parser.add_argument("--strength", type=float, default=1.0, help="of all vectors (default: 1)")
    parser.add_argument(
        "--phrases", type=Path, metavar="FILE", help="a phrase table (JSON) in place of the shipped one"
    )
    parser.add_argument("--no-phrases", action="store_true", help="do not look for phrases")
    parser.add_argument(
        "--strip-phrases", action="store_true", help="take found phrases out of the prompt that is drawn"
    )
    parser.add_argument("--compare", action="store_true", help="draw the same pictures without balancing, too")
    parser.add_argument("--negative", default="", help="the negative prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the run; picture i is drawn from SEED + i (default: 0)")
    parser.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance (default: 5)")
    parser.add_argument("--batch", type=positive, default=8, help="pictures at once (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("concept-steer-fair"), metavar="DIR", help="default: ./concept-steer-fair"
    )
    add_safety_options(parser)
    add_model_options(parser)


def _fair(args: argparse.Namespace) -> int:
    from ..fairness import describe

    out = ready_folder(args.out)
    definitions = definitions_of(args)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    plan, targets = _plan(denoiser, definitions, args)
    for one in plan.found:
        print(f"Found in the prompt: {one.text()}.")
    for name, decision in plan.decisions.items():
        print(f"{name}: {decision.text()}.")
    seeds = [args.seed + args.first + i for i in range(args.count)]
    sampling = {"steps": args.steps, "guidance": args.guidance, "negative": args.negative, "batch": args.batch}
    guard = Guard(args, denoiser)
    images, safety = guard.draw([plan.drawn] * args.count, seeds, plan.steers, label="fair", **sampling)
    observed = _judged(denoiser, images, targets)
    told = {**plan.report(observed), **safety}
    text = describe(told) + (f"\n{guard.said}" if guard.on else "")
    if args.compare:
        before, _ = guard.draw([plan.drawn] * args.count, seeds, label="without", **sampling)
        other = plan.report(_judged(denoiser, before, targets))
        told["without"] = {name: about.get("observed") for name, about in other["attributes"].items()}
        text += _in_words(told["without"])
        for i, image in enumerate(before):
            write_picture(image, out / f"{args.first + i:04d}-without.png", {"prompt": plan.drawn, "seed": seeds[i]})
    settings = {
        "version": __version__,
        "checkpoint": args.checkpoint,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "prompt": plan.drawn,
        "sampler": "DDIM",
        **sampling,
        "strength": args.strength,
        "attributes": {target.attribute.name: target.attribute.fingerprint for target in plan.balanced},
        "mode": args.mode,
        "run_seed": args.seed,
        "phrases": [one.text() for one in plan.found],
        **safety,
    }
    for i, image in enumerate(images):
        about = {**settings, "seed": seeds[i], "number": args.first + i, "assigned": plan.given(i)}
        write_picture(image, out / f"{args.first + i:04d}.png", about)
    sheet = write_picture(_sheet(plan, images, observed), out / "sheet.png", settings)
    _write(out / "report.json", json.dumps(told, indent=1))
    _write(out / "report.txt", text + "\n")
    print(text)
    print(f"{len(images)} pictures are in {out}; all on one sheet: {sheet}")
    return 0


def _plan(denoiser: Denoiser, definitions: Definitions, args: argparse.Namespace) -> tuple[Plan, list[Target]]:
    """Attributes that options or phrases ask for, loaded or learned, and the run."""
    from ..fairness import find_phrases, load_phrases, plan, target_of

    table = {} if args.no_phrases else load_phrases(args.phrases) if args.phrases else load_phrases()
    actions = [one.action for one in find_phrases(args.prompt, table)]
    attributes: dict[str, Attribute] = {}
    for wish in [*definitions, *args.attributes, *(action.name for action in actions if action.kind == "fair")]:
        if wish not in attributes:
            found = attribute_of(denoiser, wish, definitions, args)
            attributes[found.name] = found
    vectors = {action.name: safe for action in actions if (safe := _safe_vector(action)) is not None}
    wanted = _targets(args.targets, list(attributes))
    targets = [target_of(attribute, wanted.get(name, "")) for name, attribute in attributes.items()]
    if not targets and not vectors:
        args.parser.error("name what to balance with --attribute, --learn, or a phrase in the prompt")
    made = plan(
        denoiser,
        args.prompt,
        targets,
        args.count,
        always=list(attributes),
        seed=args.seed,
        mode=args.mode,
        first=args.first,
        strength=args.strength,
        table=table,
        vectors=vectors,
        strip=args.strip_phrases,
    )
    return made, targets


def _safe_vector(action: Any) -> ConceptVector | None:
    """The library's vector of that name; None where it is not there, which `plan` then says with the phrase."""
    if action.kind != "safe":
        return None
    try:
        return load_vector(action.name)[0]
    except LibraryError:
        return None


def _targets(texts: list[str], names: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, sign, shares = text.partition(":")
        if not sign or name not in names:
            raise ConceptSteerError(
                f"--target {text!r} does not begin with an attribute of this run ({', '.join(names) or 'none'}) and a "
                "colon: write it like gender:woman=0.5,man=0.5."
            )
        found[name] = shares
    return found


def _judged(denoiser: Denoiser, images: list[Image], targets: list[Target]) -> dict[str, list[str]] | None:
    """What the embedded model's judges see, for the attributes they know; None for another model's pictures."""
    if denoiser.family != "demo":
        return None
    import numpy as np
    import torch

    from ..demo import judges

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    verdict = judges.Judges()(pixels)
    known = [t.attribute for t in targets if set(t.attribute.labels) == set(judges.CLASSES.get(t.attribute.name, ()))]
    return {attribute.name: verdict.labels(attribute.name) for attribute in known}


def _sheet(plan: Plan, images: list[Image], observed: dict[str, list[str]] | None) -> Image:
    from ..pictures import grid

    captions = []
    for i in range(len(images)):
        given = ", ".join(plan.given(i).values()) or "left alone"
        seen = ", ".join(labels[i] for labels in (observed or {}).values())
        captions.append(f"{given} (seen: {seen})" if seen else given)
    rows = range(0, len(images), COLUMNS)
    return grid(
        [images[i : i + COLUMNS] for i in rows],
        captions=[captions[i : i + COLUMNS] for i in rows],
        title=f"{plan.drawn}: what each picture was assigned",
        cell=max(128, min(256, images[0].width)),
    )


def _in_words(without: dict[str, Any]) -> str:
    return "".join(
        f"\nWithout balancing, {name}: {', '.join(f'{v} {s:.0%}' for v, s in seen['shares'].items())}; deviation ratio "
        f"{seen['delta']:.3f}."
        for name, seen in without.items()
        if seen
    )


def _write(path: Path, text: str) -> None:
    from ..vector_file import write_atomic

    write_atomic(path, text.encode(), overwrite=True)
