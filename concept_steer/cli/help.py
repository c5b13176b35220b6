"""Help texts: in colour on a terminal when `rich` is installed, plain otherwise; and what all parsers share."""

from __future__ import annotations

import argparse
import sys
from typing import IO, Any

Commands = Any  # argparse's own type for sub parsers is private
OPTION, HEADING, PLACEHOLDER = r"(?<![\w-])--?[a-z][\w-]*", r"(?m)^[\w ]+:", r"\b[A-Z][A-Z_]{2,}\b"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints its help through rich where it can."""

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        out = sys.stdout if file is None else file
        if sys.version_info >= (3, 14) or not out.isatty():  # from 3.14 on argparse has colours of its own
            return super().print_help(out)
        try:
            from rich.console import Console
            from rich.text import Text
        except ImportError:
            return super().print_help(out)
        text = Text(self.format_help())
        text.highlight_regex(HEADING, "bold")
        text.highlight_regex(OPTION, "cyan")
        text.highlight_regex(PLACEHOLDER, "green")
        Console(file=out).print(text, end="", soft_wrap=True)


def command(commands: Commands, common: argparse.ArgumentParser, name: str, run: Any, **texts: Any) -> Parser:
    """A sub parser whose parsed arguments carry `run`, the function that does the work."""
    made: Parser = commands.add_parser(
        name, parents=[common], formatter_class=argparse.RawDescriptionHelpFormatter, **texts
    )
    made.set_defaults(run=run, parser=made)
    return made


def positive(text: str) -> int:
    """A whole number from 1 upwards, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 upwards")
    return number


positive.__name__ = "whole number"  # argparse puts it into "invalid ... value"
