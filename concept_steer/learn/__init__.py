"""Ways to get a concept vector, one file each."""

from .difference import learn_difference
from .found import FoundDirection
from .pictures import learn_pictures
from .result import LearnResult
from .score import learn_score
from .self_discovery import learn_self_discovery
from .unsupervised import jacobian_directions, principal_directions

__all__ = [
    "FoundDirection",
    "LearnResult",
    "jacobian_directions",
    "learn_difference",
    "learn_pictures",
    "learn_score",
    "learn_self_discovery",
    "principal_directions",
]
