"""The nodes' schemas without ComfyUI: stand-ins take its modules' places, the node files define, JSON comes out.

Run as a program, so that the stand-ins never meet a real ComfyUI: `python tests/contract/node_schemas.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
SOCKETS = ("MODEL", "CLIP", "VAE", "IMAGE", "MASK", "LATENT", "CONDITIONING", "GUIDER", "NOISE")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def read_schemas() -> dict[str, dict[str, Any]]:
    """node id -> display_name, description, category, inputs and outputs in order, as dicts; in a fresh process."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise AssertionError(f"The node files cannot be read:\n{done.stderr}")
    return json.loads(done.stdout)


def in_order(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As ComfyUI shows them: the required inputs, then the optional ones."""
    return sorted(inputs, key=lambda one: bool(one.get("optional")))


class Item:
    """An input or output: its type, id and everything it was given."""

    def __init__(self, io_type: str, names: tuple[str, ...], given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.told = {"type": io_type, **dict(zip(names, given, strict=False)), **named}


def kind(io_type: str) -> Any:
    """What io.Int, io.Custom("X") and the like are: a class with Input and Output."""

    def make(names: tuple[str, ...]) -> Any:
        return lambda *given, **named: Item(io_type, names, given, named)

    return SimpleNamespace(Input=make(("id", "display_name")), Output=make(("id", "display_name")))


@dataclass
class Schema:
    node_id: str
    display_name: str = ""
    category: str = ""
    description: str = ""
    inputs: list[Item] = field(default_factory=list)
    outputs: list[Item] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False
    not_idempotent: bool = False

    def told(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key not in ("inputs", "outputs", "hidden")}
        return {**plain, "inputs": [i.told for i in self.inputs], "outputs": [o.told for o in self.outputs]}


class _Module(ModuleType):
    """A module of ComfyUI's in which every name that was not set is some empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in(name: str, **content: Any) -> None:
    module = sys.modules[name] = _Module(name)
    vars(module).update(content)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def main() -> None:
    types = {name.capitalize(): kind(name) for name in (*SOCKETS, *WIDGETS)}
    io = SimpleNamespace(
        **types,
        Custom=kind,
        Schema=Schema,
        ComfyNode=type("ComfyNode", (), {}),
        NodeOutput=type("NodeOutput", (), {}),
        Hidden=SimpleNamespace(unique_id="unique_id", prompt="prompt", extra_pnginfo="extra_pnginfo"),
    )
    sampler = SimpleNamespace(SAMPLERS=["euler", "dpmpp_2m"], SCHEDULERS=["normal", "karras"])
    stand_in("comfy_api")
    stand_in("comfy_api.latest", io=io, ui=_Module("ui"), ComfyExtension=type("ComfyExtension", (), {}))
    stand_in("comfy")
    for name in ("model_management", "utils", "sample", "patcher_extension"):
        stand_in(f"comfy.{name}")
    stand_in("comfy.samplers", KSampler=sampler)
    with tempfile.TemporaryDirectory() as folder:
        folders = {"get_folder_paths": lambda _: [folder], "folder_names_and_paths": {}, "models_dir": folder}
        stand_in("folder_paths", **folders)
        pack = sys.modules["the_pack"] = ModuleType("the_pack")
        pack.__path__ = [str(ROOT)]  # `nodes` imports `..concept_steer`
        extension = asyncio.run(importlib.import_module("the_pack.nodes").comfy_entrypoint())
        classes = asyncio.run(extension.get_node_list())
        told = {schema.node_id: schema.told() for schema in (cls.define_schema() for cls in classes)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
