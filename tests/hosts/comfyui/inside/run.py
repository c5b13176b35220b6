"""Runs the checks of this folder inside ComfyUI's own process, without a server; one JSON line a check.

Called by ../test_inside.py with ComfyUI's Python: run.py COMFYUI BASE RESULTS CHECK... , a check being file:function.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def _start(comfyui: str, base: str) -> None:
    """As main.py begins: arguments first, then ComfyUI's folder before all others on the path."""
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    sys.path.insert(0, comfyui)
    # custom_nodes holds nothing but our pack, so ComfyUI's own `nodes` stays the one that is found by that name
    sys.path.append(str(Path(base) / "custom_nodes"))
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)


def _run(name: str) -> dict[str, Any]:
    import torch

    began = time.perf_counter()
    file, function = name.split(":")
    try:
        module = importlib.import_module(file)
        with torch.inference_mode():  # as the server runs every graph
            measured = getattr(module, function)()
        return {"check": name, "error": "", "measured": measured or "", "seconds": time.perf_counter() - began}
    except BaseException:
        text = traceback.format_exc()
        return {"check": name, "error": text, "measured": "", "seconds": time.perf_counter() - began}


def main() -> None:
    comfyui, base, results, *checks = sys.argv[1:]
    _start(comfyui, base)
    with open(results, "w", encoding="utf-8") as out:
        for check in checks:
            out.write(json.dumps(_run(check)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
