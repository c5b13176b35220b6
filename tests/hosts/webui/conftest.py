"""The tests of this folder run the real AUTOMATIC1111; without one they are skipped and say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from concept_steer.vector import ConceptVector

from . import host as hosts
from .client import Client

LENGTH = 6.0
RUNNING = pytest.StashKey[hosts.Server | None]()


@pytest.fixture(scope="session")
def host() -> hosts.Host:
    found = hosts.find()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def base(host: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the session's server."""
    return hosts.make_base(tmp_path_factory.mktemp("webui"))


@pytest.fixture(scope="session")
def server(host: hosts.Host, base: Path, pytestconfig: pytest.Config) -> Iterator[hosts.Server]:
    running = hosts.Server(host, base)
    try:
        running.wait_until_ready()
        pytestconfig.stash[RUNNING] = running
        yield running
    finally:
        pytestconfig.stash[RUNNING] = None
        running.stop()


@pytest.fixture(scope="module", autouse=True)
def options_are_kept(pytestconfig: pytest.Config) -> Iterator[None]:
    """No file leaves the session's server with other options than it started with, whatever it skipped."""
    yield
    running = pytestconfig.stash.get(RUNNING, None)
    if running is not None:
        now = running.options()
        # no hash of the checkpoint is "" before the web UI has loaded one and None afterwards
        before, after = (
            {key: "" if value is None else value for key, value in some.items()}
            for some in (running.first_options, now)
        )
        changed = {key: (value, after.get(key, "")) for key, value in before.items() if after.get(key, "") != value}
        assert not changed, f"options that stayed changed, as (before, now): {changed}"


@pytest.fixture
def client(server: hosts.Server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="session")
def vectors(base: Path) -> Path:
    """The web UI's folder of concept vectors."""
    folder = base / "models" / "concept-vectors"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def known(vectors: Path) -> Path:
    return save_known(vectors)


def save_known(vectors: Path) -> Path:
    """Three vectors: two directions of the demo model's size, and one of another family."""
    generator = torch.Generator().manual_seed(1)
    for name in ("one", "two"):
        tensor = torch.randn(192, generator=generator)
        vector = ConceptVector(tensor / tensor.norm() * LENGTH, "demo", name)
        vector.save(vectors / f"{name}.safetensors", overwrite=True)
    ConceptVector(torch.ones(1280), "sd1", "foreign").save(vectors / "foreign.safetensors", overwrite=True)
    return vectors


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """With a failure comes the end of the server's log."""
    outcome = yield
    report = outcome.get_result()
    running = getattr(item, "funcargs", {}).get("server")  # each test's own: there is more than one web UI
    if report.failed and running is not None:
        report.sections.append(("the web UI's log", running.log()[-6000:]))
