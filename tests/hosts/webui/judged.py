"""Pictures of the web UI, and what the embedded model's judges see in them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from concept_steer.demo.judges import Judges

from .client import USUAL, Client


def pictures(client: Client, path: str = "txt2img", **over: Any) -> list[Image.Image]:
    """What the web UI draws."""
    answer = client.call(f"/sdapi/v1/{path}", {**USUAL, **over})
    return [Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB") for one in answer["images"]]


def women(client: Client, count: int = 16, **over: Any) -> float:
    """The judged share of women among `count` pictures of one batch, 0..1."""
    # a batch of several comes with a sheet of all first
    drawn = pictures(client, batch_size=count, steps=10, **over)[-count:]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in drawn])).movedim(-1, 1) / 127.5 - 1
    return Judges()(pixels).share("gender", "woman")
