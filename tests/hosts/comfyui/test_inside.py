"""Steering, learning and the row table on ComfyUI's own classes: each check of inside/ is one test here.

All checks run in one process of the host's Python; this file only lists them (without importing) and shows the results.
"""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

from . import host as hosts

FOLDER = Path(__file__).parent / "inside"
LIMIT = 3600  # seconds for all checks
SLOW = ("check_families:", "check_learning:a_")  # large models, and compilation
SKIPPED = "skipped: "  # what a check says that needs a package which is not there
TOLERANCE = 2e-5  # between two hosts' float32 predictions, which are up to 4.4; measured 2.2e-6


def checks() -> list[str]:
    """file:function of every check, in the order of the files."""
    found = []
    for path in sorted(FOLDER.glob("check_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.append(f"{path.stem}:{node.name}")
    return found


@pytest.fixture(scope="module")
def inside_base(host: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hosts.make_base(tmp_path_factory.mktemp("inside"), hosts.PACKAGE)


@pytest.fixture(scope="module")
def results(host: hosts.Host, inside_base: Path, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The results of the checks that this session's tests ask for."""
    wanted = [item.callspec.params["check"] for item in request.session.items if _is_check(item)]
    if any("parity" in item.fixturenames for item in request.session.items):
        wanted.append("check_learning:the_numbers_for_the_other_host_are_written")
    file, log = inside_base / "results.jsonl", inside_base / "inside.log"
    words = [host.python, FOLDER / "run.py", host.path, inside_base, file, *dict.fromkeys(wanted)]
    with log.open("wb") as out:
        ended = subprocess.run(
            [str(word) for word in words],
            cwd=inside_base,
            env=host.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
        )
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = {one["check"]: one for one in map(json.loads, lines)}
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    lost = f"never came to its end: the process ended with {ended.returncode}\n{tail}"
    return {check: found.get(check, {"error": lost, "measured": "", "seconds": 0}) for check in wanted}


def _is_check(item: pytest.Item) -> bool:
    return getattr(item, "callspec", None) is not None and "check" in item.callspec.params  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=pytest.mark.slow if c.startswith(SLOW) else ()) for c in checks()]
)
def test_inside(check, results, record_property):
    result = results[check]
    record_property("measured", result["measured"])
    print(f"{result['seconds']:.1f} s. {result['measured']}")
    assert not result["error"], result["error"]
    if result["measured"].startswith(SKIPPED):
        pytest.skip(result["measured"])


def test_every_check_has_a_name_of_its_own():
    found = checks()
    assert len(found) == len(set(found)) > 80


# --- the same weights in two hosts


@pytest.fixture(scope="module")
def parity(results, inside_base) -> dict[str, Any]:
    file = inside_base / "output" / "parity.safetensors"
    check = "check_learning:the_numbers_for_the_other_host_are_written"
    assert file.is_file(), results[check]["error"]
    return load_file(file)


@pytest.fixture(scope="module")
def diffusers_host() -> Any:
    pytest.importorskip("diffusers", reason="parity needs the demo extra (diffusers, transformers)")
    from concept_steer.demo import model
    from concept_steer.hosts.diffusers import DiffusersDenoiser

    return DiffusersDenoiser(model.pipeline())


def test_both_hosts_encode_prompts_alike(parity, diffusers_host):
    found = diffusers_host.encode_text(["a doctor", ""]).embeds
    for row, is_cond in enumerate(parity["plain.0.is_cond"].tolist()):
        worst = (parity["plain.0.context"][row] - found[0 if is_cond else 1]).abs().max()
        print(f"max difference {worst:.2g}")
        assert worst < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "steered"])
def test_both_hosts_predict_the_same_noise(kind, parity, diffusers_host, record_property):
    """The same vector, latent, prompt and sigma; ComfyUI's numbers are those of a KSampler run."""
    steers = [Steer(ConceptVector(parity["vector"], "demo"))] if kind == "steered" else []
    worst, size = 0.0, 0.0
    for number in range(5):
        key = f"{kind}.{number}"
        flags = parity[f"{key}.is_cond"].tolist()
        cond = diffusers_host.encode_text(["a doctor" if flag else "" for flag in flags])
        found = diffusers_host.predict(parity[f"{key}.x"], float(parity[f"{key}.t"]), cond, steers, flags).float()
        worst = max(worst, float((found - parity[f"{key}.prediction"]).abs().max()))
        size = max(size, float(found.abs().max()))
    record_property("measured", f"{worst:.3g}")
    print(f"max difference {worst:.3g} of predictions up to {size:.3g}")
    assert worst < TOLERANCE
