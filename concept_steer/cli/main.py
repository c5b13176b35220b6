"""`concept-steer`: the parser, and what errors look like from the outside.

Exit codes: 0 done, 1 an error explained in one message, 2 a mistake in the command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import ConceptSteerError
from . import (
    analyse,
    apply,
    audit,
    demo,
    discover,
    erase,
    evaluate,
    fair,
    latent_clip,
    learn,
    optimise,
    safety,
    vectors,
)
from .help import Parser

EPILOG = """start here:
  concept-steer demo                                   the main job on the embedded model, in about two minutes
  concept-steer learn --pair "a doctor" "a woman doctor" --out woman
  concept-steer apply --prompt "a pilot" --vector woman:0.8
"""

# The libraries' own notes and loading bars, unless the user asked for them; read when they are imported.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def parser() -> Parser:
    root = Parser(
        prog="concept-steer",
        description="Learn concept vectors in the h-space of a diffusion model, look at them and apply them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"concept-steer {__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error too")
    # accepted after the command as well; without a default of its own, so that it does not undo the one before
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks too")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (demo.add_demo, learn.add, apply.add, vectors.add_show, vectors.add_list, vectors.add_import):
        add(commands, common)
    demo.add_export(commands, common)
    fair.add(commands, common)
    safety.add(commands, common)
    evaluate.add(commands, common)
    discover.add(commands, common)
    analyse.add(commands, common)
    audit.add(commands, common)
    latent_clip.add(commands, common)
    optimise.add(commands, common)
    erase.add(commands, common)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Mistakes in the command line leave through SystemExit(2), as argparse does."""
    args = parser().parse_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except (ConceptSteerError, ModuleNotFoundError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"concept-steer: {_message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if args.debug:
            traceback.print_exc()
        print("concept-steer: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has left: not worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _message(error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    missing = (error.name or str(error)).partition(".")[0]
    return f"This needs {missing}, which is not installed. Run: pip install 'concept-steer[demo]'"
