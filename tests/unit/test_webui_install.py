"""What the web UIs run and read before they load the extension."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_installer_says_and_installs_nothing_where_all_is_there():
    done = subprocess.run([sys.executable, str(ROOT / "install.py")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    source = (ROOT / "install.py").read_text(encoding="utf-8")
    assert not {"pip", "subprocess", "urllib", "requests", "launch"} & set(source.replace(".", " ").split())


def test_the_installer_names_what_is_missing_and_still_ends_well():
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", _run("install.py")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "has no" in done.stdout


def _run(file: str) -> str:
    return f"import runpy; runpy.run_path({str(ROOT / file)!r}, run_name='__main__')"


def test_the_extension_has_a_name_without_spaces():
    about = configparser.ConfigParser()
    about.read(ROOT / "metadata.ini")
    assert about["Extension"]["Name"] == "concept-steer"


@pytest.mark.parametrize(("given", "wanted"), [([], None), (["--concept-steer-safety", "strict"], "strict")])
def test_the_lock_is_a_flag_of_the_web_uis_command_line(given, wanted):
    spec = importlib.util.spec_from_file_location("concept_steer_preload", ROOT / "preload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = argparse.ArgumentParser()
    module.preload(parser)
    assert parser.parse_args(given).concept_steer_safety == wanted
