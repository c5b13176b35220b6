"""Geom-Erasing (2310.05873): remove what a model paints unasked, and keep it out when fine-tuning."""

from .embedding import LocationTokens
from .grid import area_weights, covered, covered_cells, located_caption
from .learning import ErasingResult, learn_erasing
from .settings import ErasingSettings, Examples
from .using import knowing

__all__ = [
    "ErasingResult",
    "ErasingSettings",
    "Examples",
    "LocationTokens",
    "area_weights",
    "covered",
    "covered_cells",
    "knowing",
    "learn_erasing",
    "located_caption",
]
