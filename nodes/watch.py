"""What nodes with long work share: a progress bar with live preview that knows ComfyUI's Interrupt button."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
from PIL import Image

from ..concept_steer.learn import watch
from ..concept_steer.learn.preview import Preview


class Watch(watch.Watch):
    """Progress bar with live preview, and ComfyUI's Interrupt button: it ends learning, the best so far is kept."""

    def __init__(self, node_id: Any, preview: Preview | None) -> None:
        super().__init__(preview)
        self.bar = comfy.utils.ProgressBar(100, node_id=node_id)

    def asked(self) -> bool:
        return comfy.model_management.processing_interrupted()

    def last(self, image: Image.Image) -> None:
        """The page goes on showing a node's last live picture in front of its outputs: let it be the right one."""
        self.at(100, image, side=1024)

    def at(self, percent: float, image: Image.Image | None = None, words: str = "", side: int = 768) -> None:
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
