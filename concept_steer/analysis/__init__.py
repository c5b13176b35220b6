"""What a model's h-space holds, looked at without training: names for directions, and strips that show them."""

from .naming import WORDS, fill, nearest, prompt_directions
from .strips import Strips, contact_sheet

__all__ = ["WORDS", "Strips", "contact_sheet", "fill", "nearest", "prompt_directions"]
