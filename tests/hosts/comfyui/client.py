"""A small client of ComfyUI's server: queue a graph, read its outputs, its pictures, or its error."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .listener import Listener

LIMIT = 600.0  # seconds for one graph


class Refused(Exception):
    """The server refused a graph before running it; the text names every node's complaint."""


@dataclass(frozen=True)
class Run:
    """One finished graph."""

    status: str  # "success", "error", "interrupted"
    outputs: dict[str, Any]
    messages: list[tuple[str, dict[str, Any]]]
    seconds: float

    @property
    def error(self) -> str:
        return next((data["exception_message"] for kind, data in self.messages if kind == "execution_error"), "")

    @property
    def cached(self) -> set[str]:
        """Ids of the nodes that did not run because the server still had their outputs."""
        return {node for kind, data in self.messages if kind == "execution_cached" for node in data["nodes"]}


class Client:
    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.id = uuid.uuid4().hex
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> bytes:
        with self._opener.open(self.url + path, timeout=120) as answer:
            return answer.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, body: Any) -> bytes:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with self._opener.open(urllib.request.Request(self.url + path, data, headers), timeout=120) as answer:
            return answer.read()

    def object_info(self) -> dict[str, Any]:
        return self.json("/object_info")

    def start(self, graph: dict[str, Any]) -> str:
        """Queue a graph; its prompt id. Errors: Refused."""
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": self.id})
        except urllib.error.HTTPError as error:
            raise Refused(_complaints(json.loads(error.read()))) from None
        found = json.loads(answer)
        if found.get("node_errors"):
            raise Refused(_complaints(found))
        return found["prompt_id"]

    def wait(self, prompt: str, limit: float = LIMIT) -> Run:
        began = time.monotonic()
        while time.monotonic() - began < limit:
            entry = self.json(f"/history/{prompt}").get(prompt)
            if entry:
                messages = [(kind, data) for kind, data in entry["status"]["messages"]]
                kinds = {kind for kind, _ in messages}
                status = "interrupted" if "execution_interrupted" in kinds else entry["status"]["status_str"]
                return Run(status, entry["outputs"], messages, time.monotonic() - began)
            time.sleep(0.05)
        self.interrupt()
        raise TimeoutError(f"the graph did not end in {limit} s; it was interrupted")

    def run(self, graph: dict[str, Any]) -> Run:
        return self.wait(self.start(graph))

    def queue(self, graph: dict[str, Any]) -> Run:
        """Run a graph that must succeed."""
        run = self.run(graph)
        assert run.status == "success", f"{run.status}: {run.error}"
        return run

    def error(self, graph: dict[str, Any]) -> str:
        """The text of the error that a graph must end with, before or while it runs."""
        try:
            run = self.run(graph)
        except Refused as refused:
            return str(refused)
        assert run.status == "error", f"an error was expected, but the graph ended with {run.status}"
        return run.error

    def pictures(self, run: Run, node: Any) -> np.ndarray:
        """(B, H, W, 3), uint8: what a Preview Image or Save Image node shows."""
        shown = []
        for image in run.outputs[getattr(node, "id", node)]["images"]:
            raw = self.get("/view?" + urllib.parse.urlencode(image))
            shown.append(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
        return np.stack(shown)

    def text(self, run: Run, node: Any) -> str:
        """What a Preview Any node shows."""
        return run.outputs[getattr(node, "id", node)]["text"][0]

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def forget(self, wait: float = 0.5) -> None:
        """Drop all cached outputs, so that the next graph runs from its first node on.

        The server does it when its worker next wakes up and says nothing of it; a worker that is busy just then
        sleeps through the call, for up to ten seconds: wait longer where all hangs on it, and it is called again.
        """
        for _ in range(1 + int(wait)):
            self.post("/free", {"free_memory": True})
            time.sleep(min(wait, 1.0))

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        listener = Listener(self.port, self.id)
        try:
            yield listener
        finally:
            listener.close()

    def interrupt_at(self, graph: dict[str, Any], node: Any, value: int) -> Run:
        """Run a graph and press Interrupt as soon as a node's progress bar has reached a value."""
        with self.listening() as listener:
            prompt = self.start(graph)

            def reached(message: dict[str, Any]) -> bool:
                data = message.get("data", {})
                return (
                    message.get("type") == "progress"
                    and data.get("prompt_id") == prompt
                    and data.get("node") == node.id
                    and data["value"] >= value
                )

            listener.wait(reached, LIMIT)
            self.interrupt()
            return self.wait(prompt)


def _complaints(answer: dict[str, Any]) -> str:
    found = [
        f"{error['message']}: {error['details']}"
        for node in answer.get("node_errors", {}).values()
        for error in node["errors"]
    ]
    return "\n".join(found) or str(answer.get("error"))
