"""What a face shows while learning: percent done and a live before/after picture; and its Interrupt button."""

from __future__ import annotations

from abc import ABC, abstractmethod

from PIL import Image

from ..vector import ConceptVector
from .preview import Preview

CACHING = 40  # percent of the progress bar that drawing trajectories takes
PREVIEWS = 4  # live previews while learning


class Watch(ABC):
    """Gives `caching`, `step` and `stop` to a way of learning; a host says how to show and how to be interrupted."""

    def __init__(self, preview: Preview | None) -> None:
        self.preview = preview
        self.interrupted = False

    @abstractmethod
    def asked(self) -> bool:
        """Whether the host's Interrupt button has been pressed since learning began."""

    @abstractmethod
    def at(self, percent: float, image: Image.Image | None = None, words: str = "") -> None:
        """Show how far learning is, and a picture if there is a new one."""

    def stop(self) -> bool:
        self.interrupted = self.interrupted or self.asked()
        return self.interrupted

    def caching(self, done: int, total: int) -> None:
        self.at(CACHING * done / total, words=f"preparing {done} of {total}")

    def step(self, step: int, steps: int, loss: float, vector: ConceptVector) -> None:
        words, image = f"step {step} of {steps}, loss {loss:.3f}", None
        if self.preview is not None and step % max(1, steps // PREVIEWS) == 0 and not self.stop():
            image = self.preview.sheet(vector, words)
        self.at(CACHING + (100 - CACHING) * step / steps, image, words)
