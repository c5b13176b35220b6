"""Ways to get a concept vector, one file each."""

from .difference import learn_difference
from .result import LearnResult
from .score import learn_score

__all__ = ["LearnResult", "learn_difference", "learn_score"]
