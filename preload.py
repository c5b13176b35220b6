"""Command-line flags for AUTOMATIC1111 and Forge, which run this file before they read their arguments."""

from __future__ import annotations

import argparse


def preload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--concept-steer-safety",
        choices=("gentle", "standard", "strict"),
        default=None,
        help="Concept Steer: the safety switch is always on, at this level or a stricter one; neither the page nor the "
        "API nor the settings can switch it off",
    )
