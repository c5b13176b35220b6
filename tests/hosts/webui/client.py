"""A small client of the web UI's API: draw, get the pictures' bytes and their infotext, or the error."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

LIMIT = 600.0
USUAL = {
    "prompt": "a doctor",
    "steps": 3,
    "width": 128,
    "height": 128,
    "cfg_scale": 3,
    "seed": 7,
    "sampler_name": "Euler",
    "batch_size": 1,
}


class Refused(Exception):
    """The server answered with an error; the text is its message."""


@dataclass(frozen=True)
class Drawn:
    """pictures: a digest of each one's pixels. sent: as they came, base64. info: infotexts, one for each picture."""

    pictures: list[str]
    info: dict[str, Any]
    sent: list[str]

    @property
    def infotexts(self) -> list[str]:
        return self.info["infotexts"]


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=LIMIT) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode("utf-8", "replace")) from None

    def comments(self) -> str:
        """What stood under the last pictures; the web UI's API leaves it out."""
        return str(self.call("/trouble/comments"))

    @contextmanager
    def options(self, **changed: Any) -> Iterator[None]:
        """The web UI's own options for a while; they stay when they are set in a request."""
        before = self.call("/sdapi/v1/options")
        try:
            self.call("/sdapi/v1/options", changed)
            yield
        finally:
            self.call("/sdapi/v1/options", {key: before[key] for key in changed})

    def draw(self, settings: Any = None, path: str = "txt2img", trouble: str = "", **over: Any) -> Drawn:
        """settings: the extension's, a dict or a list of controls; None leaves it out of the request.

        trouble: what the other extension does, see inside/trouble.py.
        """
        body = {**USUAL, **over}
        if trouble:
            body["alwayson_scripts"] = {"Trouble": {"args": [trouble]}}
        if settings is not None:
            args = settings if isinstance(settings, list) else [settings]
            body["alwayson_scripts"] = {**body.get("alwayson_scripts", {}), "Concept Steer": {"args": args}}
        answer = self.call(f"/sdapi/v1/{path}", body)
        # PNG text differs with the settings: compare pixels
        return Drawn([pixels(picture) for picture in answer["images"]], json.loads(answer["info"]), answer["images"])


def pixels(picture: str) -> str:
    """A digest of a base64 picture's pixels."""
    return hashlib.sha256(as_picture(picture).tobytes()).hexdigest()[:16]


def as_picture(sent: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(sent.split(",", 1)[-1]))).convert("RGB")
