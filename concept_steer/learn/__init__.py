"""Ways to get a concept vector, one file each."""

from .difference import learn_difference
from .pictures import learn_pictures
from .result import LearnResult
from .score import learn_score

__all__ = ["LearnResult", "learn_difference", "learn_pictures", "learn_score"]
