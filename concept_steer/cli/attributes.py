"""Attributes for `concept-steer fair`: asked for by --learn, found in files, or learned on the spot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConceptSteerError
from .models import bar

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..fairness import Attribute

Definitions = dict[str, dict[str, tuple[str, ...]]]  # attribute -> label -> templates


def definitions_of(args: argparse.Namespace) -> Definitions:
    """What --learn asks for: attribute -> label -> templates."""
    from ..fairness.known import DEFINITIONS

    result: Definitions = {}
    for name, *values in args.learn:
        if not values:
            if name not in DEFINITIONS:
                args.parser.error(f"--learn {name} needs values, such as 'young=a young {{}}' 'old=an old {{}}'")
            result[name] = DEFINITIONS[name]
            continue
        pieces = [value.partition("=") for value in values]
        if not all(label.strip() and sign and rest.strip() for label, sign, rest in pieces):
            args.parser.error(f"--learn {name}: each value is LABEL=TEMPLATE, such as 'old=an old {{}}'")
        result[name] = {label.strip(): tuple(t.strip() for t in rest.split("|")) for label, _, rest in pieces}
    return result


def attribute_of(denoiser: Denoiser, wish: str, definitions: Definitions, args: argparse.Namespace) -> Attribute:
    """From --learn, else from a file, --out or the library, else (on the embedded model) learned as it is known."""
    from ..fairness import Attribute
    from ..fairness.attributes import SUFFIX
    from ..fairness.known import DEFINITIONS
    from ..library import Library, default_folders, safe_name

    if wish in definitions:
        return _learned(denoiser, wish, definitions[wish], args)
    if wish.endswith(SUFFIX):
        return Attribute.load(Path(wish).expanduser())
    folders = [args.out, *Library(default_folders()).folders]
    for folder in folders:
        file = folder / (safe_name(wish) + SUFFIX)
        if file.is_file():
            return Attribute.load(file)
    if wish in DEFINITIONS and denoiser.family == "demo":
        return _learned(denoiser, wish, DEFINITIONS[wish], args)
    raise ConceptSteerError(
        f"There is no attribute {wish!r}: no {wish}{SUFFIX} in {', '.join(str(folder) for folder in folders)}. Learn "
        f"it on this model with --learn {wish}{'' if wish in DEFINITIONS else ' LABEL=TEMPLATE ...'}."
    )


def _learned(
    denoiser: Denoiser, name: str, templates: dict[str, tuple[str, ...]], args: argparse.Namespace
) -> Attribute:
    from ..fairness import learn_attribute
    from ..fairness.attributes import SUFFIX
    from ..fairness.known import ROLES
    from ..library import safe_name

    file = args.out / (safe_name(name) + SUFFIX)
    with bar(f"learning {name}") as progress:
        found = learn_attribute(
            denoiser,
            name,
            templates,
            args.roles or ROLES,
            method=args.method,
            seed=args.seed,
            watch=lambda what, done, total: progress.at(done, total, what),
        )
    found.save(file, overwrite=True)
    gate = found.gate.measured if found.gate else {}
    print(f"Learned {name} ({', '.join(found.labels)}), saved as {file}.")
    print(f"  Its gate on roles it never saw: AUC {gate['auc']:.3f}, accuracy {gate['accuracy']:.1%}.")
    return found
