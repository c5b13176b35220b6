"""A LoRA just learned, on a MODEL of ComfyUI: as the stock loader would put its file there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..geom_erasing.lora import kohya


def with_lora(model: Any, state: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """A clone of the MODEL with peft's weights on it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, kohya(state), strength, 0.0)[0]
