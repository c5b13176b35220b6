"""What an audit of the embedded model uses in place of the usual: its own list of words and its judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..analysis.word_list import WordList, parsed, shipped
from .judges import CLASSES, Judges
from .words import audit_words


def usual_words(family: str) -> WordList:
    """The embedded model's own list for it, the shipped one for every other family."""
    return parsed(audit_words(), "the embedded model's list") if family == "demo" else shipped()


class DemoJudge:
    """The classifiers that come with the embedded model; they know its world only."""

    name = "the embedded model's judges"
    HEADS: Mapping[str, str] = {"gender": "gender", "skin tone": "tone"}

    def __init__(self) -> None:
        self._judges = Judges()

    def values(self, attribute: str, values: Sequence[str], pixels: Tensor) -> list[str] | None:
        """None for an attribute they were not trained on, or whose values are called otherwise."""
        head = self.HEADS.get(attribute)
        if head is None or set(values) != set(CLASSES[head]):
            return None
        return self._judges(pixels).labels(head)
