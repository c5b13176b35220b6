"""ComfyUI's progress messages as they come, over a WebSocket with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Listener:
    """Collects the JSON messages for one client id until `close()`; counts the pictures sent between them."""

    def __init__(self, port: int, client_id: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.pictures = 0
        self._changed = threading.Condition()
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET /ws?clientId={client_id} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        ]
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        if b" 101 " not in status:
            raise RuntimeError(f"no WebSocket: {status!r}")
        while self._stream.readline().strip():
            pass
        self._socket.settimeout(None)
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self, wanted: Callable[[dict[str, Any]], bool], timeout: float) -> dict[str, Any]:
        """The first message, old or new, that is wanted. Errors: TimeoutError."""

        def found() -> dict[str, Any] | None:
            return next((message for message in self.messages if wanted(message)), None)

        with self._changed:
            if not self._changed.wait_for(lambda: found() is not None, timeout):
                kinds = [message.get("type") for message in self.messages[-20:]]
                raise TimeoutError(f"no such message in {timeout} s; the last ones: {kinds}")
            return found() or {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            while True:
                kind, data = self._frame()
                if kind == CLOSE:
                    return
                if kind == PING:
                    self._send(PONG, data)
                with self._changed:
                    if kind == TEXT:
                        self.messages.append(json.loads(data))
                    elif kind == BINARY:
                        self.pictures += 1
                    self._changed.notify_all()
        except (OSError, ValueError, struct.error):
            return

    def _frame(self) -> tuple[int, bytes]:
        """One whole message: its kind and data."""
        kind, data, last = 0, b"", False
        while not last:
            first, second = self._bytes(2)
            last, size = bool(first & 0x80), second & 0x7F
            if size == 126:
                (size,) = struct.unpack(">H", self._bytes(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._bytes(8))
            kind = first & 0x0F or kind
            data += self._bytes(size)
        return kind, data

    def _bytes(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise OSError("closed")
        return data

    def _send(self, kind: int, data: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self._socket.sendall(bytes([0x80 | kind, 0x80 | len(data)]) + mask + masked)
