"""The tests of this folder run the real ComfyUI; without one they are skipped and say so."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import host as hosts
from .client import Client


@pytest.fixture(scope="session")
def host() -> hosts.Host:
    found = hosts.find()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def peft(host: hosts.Host) -> None:
    """What trains a LoRA must be installed beside ComfyUI."""
    if subprocess.run([str(host.python), "-c", "import peft"], capture_output=True, timeout=300).returncode:
        pytest.skip(f"training a LoRA needs peft and accelerate: {host.python} -m pip install peft accelerate")


@pytest.fixture(scope="session")
def base(host: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of the session's server."""
    folder = hosts.make_base(tmp_path_factory.mktemp("comfyui"))
    hosts.compile_pack(host, folder)
    return folder


@pytest.fixture(scope="session")
def server(host: hosts.Host, base: Path, pytestconfig: pytest.Config) -> Iterator[hosts.Server]:
    running = hosts.Server(host, base)
    pytestconfig.stash[RUNNING] = running
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(server: hosts.Server) -> Client:
    """A client whose server has nothing cached and nothing running."""
    found = Client(server.port)
    found.forget()
    return found


@pytest.fixture(scope="session")
def vectors(base: Path) -> Path:
    """The server's folder of concept vectors."""
    return base / "models" / "concept_vectors"


RUNNING = pytest.StashKey[hosts.Server]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """With a failure comes the end of the server's log."""
    outcome = yield
    report = outcome.get_result()
    running = item.config.stash.get(RUNNING, None)
    if report.failed and running is not None and {"server", "client"} & set(getattr(item, "fixturenames", ())):
        report.sections.append(("ComfyUI's log", running.log()[-6000:]))
