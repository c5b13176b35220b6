"""The core brings in torch, numpy, safetensors and Pillow, and nothing else; `--help` does not even bring in torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "concept_steer"
FOREIGN = ("diffusers", "transformers", "tokenizers", "accelerate", "rich", "tqdm", "comfy", "modules", "gradio")
HEAVY = ("torch", "numpy", "safetensors", "PIL", *FOREIGN)
COMMANDS = (
    "demo", "learn", "discover", "apply", "fair", "show", "list", "import", "export-demo", "evaluate",
    "learn-safety",
)  # fmt: skip


# imported by nodes that run, or by the web UI's script; they subclass and call the hosts' classes
HOST_ONLY = (
    "comfy_demo", "comfy_denoiser", "comfy_guidance",
    "webui_api", "webui_cards", "webui_page", "webui_script", "webui_tab", "webui_tab_erasing", "webui_xyz",
)  # fmt: skip


def core_modules() -> list[str]:
    """All modules but demo/, the command line and HOST_ONLY. The rest of hosts/ imports its host only when used."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[1] not in ("demo", "cli", "__main__") and parts[-1] not in HOST_ONLY:
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


# Each module is imported anew, as if it were the first; what the allowed libraries bring is there from the start.
SCRIPT = """
import importlib, json, sys
import numpy, PIL.Image, PIL.ImageDraw, PIL.ImageFont, safetensors.torch, torch

def tops():
    return {name.partition(".")[0] for name in sys.modules}

allowed = tops() | set(sys.stdlib_module_names) | {"concept_steer"}
brought = {}
for module in json.loads(sys.argv[1]):
    for name in [n for n in sys.modules if n.partition(".")[0] == "concept_steer"]:
        del sys.modules[name]
    importlib.import_module(module)
    brought[module] = sorted(tops() - allowed)
print(json.dumps({"brought": brought, "allowed": sorted(allowed)}))
"""


def python(script: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *args], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads(python(SCRIPT, json.dumps(core_modules())))


@pytest.mark.parametrize("module", core_modules())
def test_a_core_module_brings_in_no_other_library(found, module):
    assert found["brought"][module] == []


def test_the_allowed_libraries_bring_in_no_host(found):
    assert not (set(FOREIGN) - {"tqdm"}) & set(found["allowed"])


def test_there_is_a_core():
    assert {"concept_steer", "concept_steer.steering", "concept_steer.learn.score"} <= set(core_modules())


def test_help_and_the_bare_package_are_there_without_torch():
    script = """
import contextlib, io, json, sys
import concept_steer
from concept_steer.cli import main
for args in [["--help"], ["--version"], *([command, "--help"] for command in json.loads(sys.argv[1]))]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(args)
    assert said.getvalue(), args
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""
    assert json.loads(python(script, json.dumps(COMMANDS), json.dumps(HEAVY))) == []


def test_every_public_name_can_be_had():
    script = """
import concept_steer
for name in concept_steer.__all__:
    assert getattr(concept_steer, name) is not None and name in dir(concept_steer), name
try:
    concept_steer.nothing
except AttributeError:
    print("ok")
"""
    assert python(script) == "ok\n"


def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "concept_steer", "--version"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "concept-steer 0.1.0\n")
