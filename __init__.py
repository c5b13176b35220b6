"""Concept Steer's door for ComfyUI: this folder in `custom_nodes/` is a node pack."""

import sys

if __package__ and "folder_paths" in sys.modules:  # ComfyUI is at the door, not a test runner that walks by
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
