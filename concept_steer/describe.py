"""A vector in words: what the command line, ComfyUI and the web UI tell about one."""

from __future__ import annotations

import json
from pathlib import Path

from .family import family
from .vector import ConceptVector

# In the order in which they are shown, before all other info; safetensors keeps no order.
LABELS = {
    "description": "about",
    "usage_hint": "how to use it",
    "tags": "tags",
    "author": "author",
    "license": "licence",
    "date": "date",
    "method": "learned by",
    "steps": "steps",
    "seed": "seed",
    "prompt_neutral": "neutral prompts",
    "prompt_positive": "positive prompts",
    "picture_set_hash": "picture set",
    "checkpoint_hash": "checkpoint",
    "calibration": "RMS of h when learned",
    "effect": "measured effect",
}


def lines(vector: ConceptVector, path: Path | None = None) -> list[tuple[str, str]]:
    """(label, value) in the order of reading; a value may have several lines."""
    found = [("title", vector.title or "none")]
    if path is not None:
        found.append(("file", str(path)))
    found += [
        ("made for", f"{family(vector.family).title} ({vector.family})"),
        ("acts at", "the UNet's mid block (h-space)" if vector.site == "mid" else vector.site),
        ("shape", f"{tuple(vector.tensor.shape)}: {shape_in_words(vector)}"),
        ("norm", f"{vector.norm:.4g}"),
        ("fingerprint", vector.fingerprint),
    ]
    keys = [key for key in LABELS if key in vector.info] + sorted(set(vector.info) - set(LABELS))
    return found + [(LABELS.get(key, key.replace("_", " ")), _in_lines(vector.info[key])) for key in keys]


def shape_in_words(vector: ConceptVector) -> str:
    each = "one value per channel, fits any picture size"
    if vector.spatial:
        height, width = vector.tensor.shape[-2:]
        each = f"a {height} x {width} map per channel, resized to the picture"
    if vector.per_timestep:
        each += f"; for each of the timesteps {', '.join(f'{t:g}' for t in vector.timesteps)}"
    return each


def _in_lines(value: str) -> str:
    """JSON objects as one `key: value` a line, other texts as they are."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if not isinstance(found, dict):
        return value
    return "\n".join(f"{key}: {json.dumps(item) if isinstance(item, dict) else item}" for key, item in found.items())
