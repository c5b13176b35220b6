"""The pack as a whole: its folders of vectors, its node classes, and what a wrong input says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import folder_paths
import torch
from bench import demo, output_folder, raises, vector
from comfy_api.latest import io
from concept_steer_pack import comfy_entrypoint
from concept_steer_pack.concept_steer.errors import ConceptSteerError
from concept_steer_pack.concept_steer.learn.request import pairs_of
from concept_steer_pack.nodes import common
from concept_steer_pack.nodes.strip import strengths_of
from concept_steer_pack.nodes.vectors import ConceptMix


def every_node_of_the_pack_has_a_class() -> str:
    extension = asyncio.run(comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    ids = [node.define_schema().node_id for node in found]
    assert len(ids) == len(set(ids)) and all(name.startswith("ConceptSteer") for name in ids), ids
    assert all(issubclass(node, io.ComfyNode) for node in found)
    return f"{len(ids)} nodes"


def the_folder_is_made_and_extra_model_paths_are_kept() -> None:
    """As `concept_vectors: ...` in extra_model_paths.yaml does, before packs are loaded."""
    extra = output_folder() / "elsewhere"
    vector(8).save(extra / "from elsewhere.safetensors")
    (extra / "notes.txt").write_text("not a vector")
    common.register_folder()
    own = Path(folder_paths.models_dir) / "concept_vectors"
    assert own.is_dir()
    folder_paths.add_model_folder_path("concept_vectors", str(extra))
    common.register_folder()
    paths = folder_paths.get_folder_paths("concept_vectors")
    assert {str(own), str(extra)} <= set(paths) and len(paths) == len(set(paths)), paths
    assert folder_paths.get_filename_list("concept_vectors") == ["from elsewhere.safetensors"]
    assert any(choice.startswith("from elsewhere [") for choice in common.choices())
    assert common.chosen("from elsewhere")[0] == vector(8)


def a_file_is_found_again_by_its_digits_after_a_rename() -> None:
    folder = Path(common.library().folders[0])
    path = folder / "before.safetensors"
    vector(9).save(path)
    choice = next(choice for choice in common.choices() if choice.startswith("before ["))
    path.rename(folder / "after.safetensors")
    found, where = common.chosen(choice)
    assert found == vector(9) and where.name == "after.safetensors"


def a_socket_with_something_else_says_what_it_brought() -> None:
    raises(ConceptSteerError, lambda: common.vectors_of([vector(), 3]), "int", "Load Concept Vector")


def uneven_lists_of_prompts_are_refused() -> None:
    raises(ConceptSteerError, lambda: pairs_of("a\nb", "a\nb\nc"), "2 neutral", "3 with the concept")
    raises(ConceptSteerError, lambda: pairs_of("", "a"), "neutral")
    assert pairs_of("a\n\nb", "c") == [("a", "c"), ("b", "c")]


def strengths_of_a_strip_are_numbers() -> None:
    assert strengths_of("-1, 0 0.5") == [-1.0, 0.0, 0.5]
    for wrong in ("", "a", "11", "nan", "inf"):
        raises(ConceptSteerError, lambda text=wrong: strengths_of(text), "-10 to 10")


def mixes_are_the_algebra_of_vectors() -> None:
    a, b = vector(1), vector(2)
    weights = {"weight_1": 2.0, "weight_2": 0.5}
    mixed: dict[str, Any] = {
        mode: ConceptMix.execute(vector_1=a, mode=mode, vector_2=b, **weights)[0] for mode in ConceptMix.MODES
    }
    assert torch.allclose(mixed[ConceptMix.MODES[0]].tensor, 2 * a.tensor + 0.5 * b.tensor)
    assert torch.allclose(mixed[ConceptMix.MODES[1]].tensor, 2 * a.tensor - 0.5 * b.tensor)
    assert abs(float(mixed[ConceptMix.MODES[2]].tensor @ b.tensor)) < 1e-3


def the_demo_model_refuses_a_lora_of_another_model() -> None:
    raises(ConceptSteerError, lambda: demo()[0].clone().add_patches({}), "LoRA", "another model")
