"""A real AUTOMATIC1111 for the tests: where it is, a throw-away data folder with this extension in it, its server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import demo_files

ROOT = Path(__file__).parents[3]
EXTENSION = "concept-steer"  # as git clone names it
PARTS = (
    "concept_steer",
    "scripts",
    "javascript",
    "localizations",
    "vectors",
    "install.py",
    "preload.py",
    "metadata.ini",
    "style.css",
)
START_LIMIT = 600  # seconds
FLAGS = (
    "--skip-prepare-environment",
    "--skip-install",
    "--skip-torch-cuda-test",
    "--skip-version-check",
    "--skip-python-version-check",
    "--use-cpu",
    "all",
    "--no-half",
    "--precision",
    "full",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--no-hashing",
    "--server-name",
    "127.0.0.1",
    "--api",
)
CONFIG = {
    "live_previews_enable": False,
    "samples_save": False,
    "grid_save": False,
    "batch_cond_uncond": True,
    "concept_steer_safety_on": False,  # of what the page opens with; each test says what it wants
}


@dataclass(frozen=True)
class Host:
    """A web UI's folder and the Python that runs it."""

    path: Path
    python: Path

    def environment(self) -> dict[str, str]:
        """Offline, one thread (tiny models are faster so, and repeatable)."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "COMMANDLINE_ARGS"))}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        return {**env, **offline, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, script: Path, *args: str) -> str:
        """What a script prints that runs in the web UI's Python."""
        done = subprocess.run(
            [str(self.python), str(script), *args], env=self.environment(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


def find(
    name: str = "WEBUI", usual: str = "~/stable-diffusion-webui", known: str = "modules/sd_samplers_cfg_denoiser.py"
) -> Host | str:
    """The host of NAME_PATH and NAME_PYTHON, else the usual one; or why there is none. known: a file it has."""
    path = Path(os.environ.get(f"{name}_PATH") or usual).expanduser()
    if not (path / known).is_file():
        return f"no such web UI: {path} has no {known} (set {name}_PATH to its folder)"
    named = os.environ.get(f"{name}_PYTHON")
    places = [Path(named).expanduser()] if named else [path / p for p in ("venv/bin/python", "venv/Scripts/python.exe")]
    for python in places:
        if python.is_file():
            return Host(path, python)
    return f"no Python for {path}: {places[0]} is missing (set {name}_PYTHON to the one that runs it)"


def make_base(folder: Path) -> Path:
    """A folder for --data-dir with the embedded model, this extension and nothing of the user's."""
    install(folder)
    trouble = folder / "extensions" / "trouble" / "scripts"
    trouble.mkdir(parents=True)
    shutil.copy2(Path(__file__).parent / "inside" / "trouble.py", trouble / "trouble.py")
    demo_files.write(folder / "models" / "Stable-diffusion")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def install(folder: Path) -> None:
    """Copy this extension into a data folder."""
    extension = folder / "extensions" / EXTENSION
    extension.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, extension / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy2(source, extension / part)


class Server:
    """The web UI's own server, with its user interface and its API, on a free port of the loopback."""

    flags = FLAGS

    def __init__(self, host: Host, base: Path, *flags: str) -> None:
        self.base, self.log_file = base, base / "server.log"
        self.first_options: dict[str, Any] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        checkpoint = base / "models" / "Stable-diffusion" / f"{demo_files.NAME}.safetensors"
        words = [*self.flags, "--port", str(self.port), "--data-dir", str(base), "--ckpt", str(checkpoint), *flags]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [str(host.python), str(host.path / "launch.py"), *words],
                cwd=host.path,
                env=host.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self, starts: int = 1) -> None:
        """The log says so: a request before the API is there would keep the web UI from adding it.

        starts: how often it has started by then; "Reload UI" starts it again.
        """
        for _ in range(START_LIMIT * 2):
            if self.process.poll() is not None:
                raise RuntimeError(f"the web UI ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            if self.log().count("Startup time") >= starts:
                self.first_options = self.first_options or self.options()
                return
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the web UI was not ready after {START_LIMIT} s:\n{self.log()[-4000:]}")

    def options(self) -> dict[str, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + "/sdapi/v1/options", timeout=60) as answer:
            return json.load(answer)

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
