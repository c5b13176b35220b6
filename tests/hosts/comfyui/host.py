"""A real ComfyUI for the tests: where it is, a throw-away base folder with this pack in it, and its server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
CLONED = "concept-steer"  # the pack's folder in custom_nodes, as git clone names it
PACKAGE = "concept_steer_pack"  # the same where the checks of inside/ import it by its name
PARTS = (
    "__init__.py",
    "nodes",
    "concept_steer",
    "web",
    "locales",
    "vectors",
    "example_workflows",
    "pyproject.toml",
    "requirements.txt",
)
START_LIMIT = 300  # seconds


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder and the Python that runs it."""

    path: Path
    python: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Offline, one thread (tiny models are faster so, and repeatable), no byte code left in the host's folder."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return {
            **env,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **more,
        }


def find() -> Host | str:
    """The host of COMFYUI_PATH and COMFYUI_PYTHON, else the one in ~/ComfyUI; or why there is none."""
    path = Path(os.environ.get("COMFYUI_PATH") or "~/ComfyUI").expanduser()
    if not (path / "main.py").is_file():
        return f"no ComfyUI: {path} has no main.py (set COMFYUI_PATH to a ComfyUI folder)"
    named = os.environ.get("COMFYUI_PYTHON")
    places = [Path(named).expanduser()] if named else [path / p for p in ("venv/bin/python", "venv/Scripts/python.exe")]
    for python in places:
        if python.is_file():
            return Host(path, python)
    return f"no Python for {path}: {places[0]} is missing (set COMFYUI_PYTHON to the one that runs it)"


def make_base(folder: Path, name: str = CLONED) -> Path:
    """A base directory for `--base-directory`: empty but for a copy of this pack. The user's own folders stay out."""
    pack = folder / "custom_nodes" / name
    for name in ("models", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pack.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, pack / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy2(source, pack / part)
    return folder


def compile_pack(host: Host, base: Path) -> None:
    """As on every start but the first."""
    command = [str(host.python), "-m", "compileall", "-q", str(base / "custom_nodes")]
    env = {k: v for k, v in host.environment().items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, env=env, check=True, timeout=START_LIMIT, stdout=subprocess.DEVNULL)


class Server:
    """ComfyUI's own server on a base directory, on a free port of the loopback."""

    def __init__(self, host: Host, base: Path) -> None:
        self.base = base
        self.log_file = base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        words = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes"]
        words += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [str(host.python), str(host.path / "main.py"), *words],
                cwd=base,
                env=host.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(START_LIMIT * 5):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode} at its start:\n{self.log()[-4000:]}")
            try:
                with opener.open(self.url + "/system_stats", timeout=10):
                    return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI was not ready after {START_LIMIT} s:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(15)
