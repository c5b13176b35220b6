"""Concept Steer: learn, keep and apply concept vectors in the h-space of latent diffusion models.

The names below are loaded at their first use, so that `import concept_steer` (and `concept-steer --help`) is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ConceptSteerError",
    "ConceptVector",
    "LearnResult",
    "Library",
    "Schedule",
    "Steer",
    "__version__",
    "import_table",
    "learn_difference",
    "learn_pictures",
    "learn_score",
    "learn_self_discovery",
    "sample",
]

if TYPE_CHECKING:
    from .errors import ConceptSteerError
    from .importer import import_table
    from .learn import LearnResult, learn_difference, learn_pictures, learn_score, learn_self_discovery
    from .library import Library
    from .sampling import sample
    from .schedule import Schedule
    from .steering import Steer
    from .vector import ConceptVector

_HOME = {
    "ConceptSteerError": "errors",
    "ConceptVector": "vector",
    "LearnResult": "learn",
    "Library": "library",
    "Schedule": "schedule",
    "Steer": "steering",
    "import_table": "importer",
    "learn_difference": "learn",
    "learn_pictures": "learn",
    "learn_score": "learn",
    "learn_self_discovery": "learn",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
