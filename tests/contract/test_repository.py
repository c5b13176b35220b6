"""What the repository promises: commands that exist, packaged data, one version, short files, one-way imports."""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import concept_steer
from concept_steer.cli.main import parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "concept_steer"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DATA_TABLES = ("demo/world.py",)  # tables may be long
LONGEST = 300
FACES = ("hosts", "demo", "evaluate", "cli", "__main__")
MAY_IMPORT = {
    "hosts": {"hosts"},
    "demo": {"hosts", "demo"},
    "evaluate": {"hosts", "demo", "evaluate"},
    "cli": {"hosts", "demo", "evaluate", "cli"},
    "__main__": {"cli"},
}
MAY_ALSO = {  # the embedded model in ComfyUI, its own words and judges in the web UI; nothing in demo/ imports them
    "hosts/comfy_demo.py": {"demo"},
    "hosts/webui_audit.py": {"demo"},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Each command of the README's bash blocks, `a && b` taken apart."""
    return [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


# --- README and CI


def test_the_readme_has_one_line_for_the_demo_and_one_for_the_tests():
    ends = [line.split("&&")[-1].strip() for block in blocks("bash") for line in block.splitlines() if "&&" in line]
    assert ends == [".venv/bin/concept-steer demo", ".venv/bin/python -m pytest"]


@pytest.mark.parametrize("command", [c for c in commands() if "concept-steer " in c])
def test_the_readmes_commands_are_understood(command):
    words = shlex.split(command)
    program = PROJECT["project"]["scripts"][Path(words[0]).name]
    assert program == "concept_steer.cli:main"
    assert callable(parser().parse_args(words[1:]).run)


def test_the_readme_shows_every_command():
    shown = {shlex.split(c)[1] for c in commands() if "concept-steer " in c}
    assert shown == {
        "demo", "learn", "learn-safety", "discover", "apply", "fair", "audit", "analyse",
        "show", "list", "import", "export-demo", "evaluate", "latent-clip", "erase",
    }  # fmt: skip


@pytest.mark.parametrize("code", blocks("python"))
def test_the_readmes_python_names_things_that_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], []), "README.md", "exec"), {})


def test_ci_runs_the_readmes_test_command():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    line = next(line for block in blocks("bash") for line in block.splitlines() if line.endswith("pytest"))
    parts = [part.strip() for part in line.split("&&")]
    assert [part for part in lines if part in parts] == parts
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- the package


def test_one_version_everywhere():
    changes = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes is not None
    assert PROJECT["project"]["version"] == concept_steer.__version__ == changes[1]


def test_data_beside_the_code_is_packaged():
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        file for package, patterns in declared.items() for p in patterns for file in _folder(package).glob(p)
    } | set(sources())
    left_out = [
        inside(p) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p not in packaged
    ]
    assert "weights/*.safetensors" in declared["concept_steer.demo"]
    assert left_out == []


def _folder(package: str) -> Path:
    return ROOT.joinpath(*package.split("."))


def test_every_folder_with_code_is_a_package():
    assert [inside(p) for p in sources() if not (p.parent / "__init__.py").is_file()] == []


def test_the_core_needs_no_more_than_it_says():
    names = {re.split(r"[<>=\[ ]", d)[0].lower() for d in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "pillow", "tqdm"}


# --- the house


@pytest.mark.parametrize("path", sources(), ids=inside)
def test_a_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST or inside(path) in DATA_TABLES, f"{inside(path)} has {lines} lines: split it"


@pytest.mark.parametrize("path", sources(), ids=inside)
def test_imports_point_one_way(path):
    mine = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = MAY_IMPORT.get(mine, set()) | MAY_ALSO.get(inside(path), set())
    wrong = {name for name in _imported(path) if name.split(".")[0] in FACES and name.split(".")[0] not in allowed}
    assert wrong == set()


def _imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, named from the package's root: "hosts.diffusers"."""
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("concept_steer.") for a in node.names if a.name.startswith("concept_steer.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == "concept_steer":
                base = (node.module or "").split(".")[1:]
            else:
                continue
            root = ".".join(part for part in base if part)
            found |= {root} if root else {a.name for a in node.names}
    return found
