"""What nodes with long work share: a progress bar with live preview that knows ComfyUI's Interrupt button."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
from PIL import Image

from ..concept_steer.learn.preview import Preview
from ..concept_steer.vector import ConceptVector

CACHING = 40  # percent of the progress bar that drawing trajectories takes
PREVIEWS = 4  # live previews while learning


class Watch:
    """Progress bar with live preview, and ComfyUI's Interrupt button: it ends learning, the best so far is kept."""

    def __init__(self, node_id: Any, preview: Preview | None) -> None:
        self.bar = comfy.utils.ProgressBar(100, node_id=node_id)
        self.preview = preview
        self.interrupted = False

    def stop(self) -> bool:
        self.interrupted = self.interrupted or comfy.model_management.processing_interrupted()
        return self.interrupted

    def caching(self, done: int, total: int) -> None:
        self.at(CACHING * done / total)

    def step(self, step: int, steps: int, loss: float, vector: ConceptVector) -> None:
        image = None
        if self.preview is not None and step % max(1, steps // PREVIEWS) == 0 and not self.stop():
            image = self.preview.sheet(vector, f"step {step} of {steps}, loss {loss:.3f}")
        self.at(CACHING + (100 - CACHING) * step / steps, image)

    def last(self, image: Image.Image) -> None:
        """The page goes on showing a node's last live picture in front of its outputs: let it be the right one."""
        self.at(100, image, 1024)

    def at(self, percent: float, image: Image.Image | None = None, side: int = 768) -> None:
        if self.stop():
            return
        try:
            self.bar.update_absolute(int(percent), 100, None if image is None else ("JPEG", image, side))
        except comfy.model_management.InterruptProcessingException:
            self.interrupted = True  # the bar asks too; it must not throw away what has been learned

    def finish(self) -> None:
        """Let the rest of the graph stop, as the button asked; the vector stays on this node for the next run."""
        if self.interrupted:
            comfy.model_management.interrupt_current_processing(True)
