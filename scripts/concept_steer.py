"""Concept Steer's door for AUTOMATIC1111, Forge and reForge: this folder in `extensions/` is an extension."""

from concept_steer.hosts.webui_script import ConceptSteerScript, register

register()

__all__ = ["ConceptSteerScript"]
