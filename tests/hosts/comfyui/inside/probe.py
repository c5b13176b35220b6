"""How long the import of the pack takes after ComfyUI's own, and what it brings in: probe.py COMFYUI BASE."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    comfyui, base = sys.argv[1:]
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    sys.path.insert(0, comfyui)
    sys.path.append(str(Path(base) / "custom_nodes"))
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401, I001  before nodes, which puts another `utils` in front of it
    import nodes
    import server

    assert nodes.NODE_CLASS_MAPPINGS and server.PromptServer
    from comfy_api.latest import io

    assert io.ComfyNode
    before = {name.split(".")[0] for name in sys.modules}
    began = time.perf_counter()
    import concept_steer_pack

    seconds = time.perf_counter() - began
    assert concept_steer_pack.comfy_entrypoint
    after = {name.split(".")[0] for name in sys.modules}
    new = sorted(after - before - set(sys.stdlib_module_names) - {"concept_steer_pack"})
    print(json.dumps({"seconds": seconds, "new": new}))


if __name__ == "__main__":
    main()
