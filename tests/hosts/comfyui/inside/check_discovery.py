"""Directions found on the embedded model inside ComfyUI: its attention has to be differentiable twice."""

from __future__ import annotations

from bench import demo
from concept_steer_pack.concept_steer.analysis.discovery import discover
from concept_steer_pack.concept_steer.demo.words import NEUTRAL, naming_words
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.learn.unsupervised import principal_directions
from concept_steer_pack.nodes.discover import JACOBIAN, DiscoverDirections, PickDirection


def jacobian_directions_are_found_and_named() -> str:
    """The same figures as through diffusers: singular values .175 and .136, the first direction is gender."""
    denoiser = ComfyDenoiser(*demo())
    options = {"count": 2, "seeds": 4, "guidance": 4.0}
    words = naming_words()
    found = discover(denoiser, ["a person"], method="jacobian", words=words, neutral=NEUTRAL, **options)
    assert all(one.converged for one in found)
    assert abs(found[0].value - 0.175) < 0.002 and abs(found[1].value - 0.136) < 0.002, [one.value for one in found]
    assert found[0].names[0][0] in ("man", "woman"), found[0].names
    assert not denoiser._copies  # the copied decoder is given back
    return "; ".join(one.summary() for one in found)


def principal_directions_are_found() -> str:
    found = principal_directions(ComfyDenoiser(*demo()), ["a person"], count=2, seeds=8, steps=4, timesteps=(0, 0.5))
    assert found[0].value > found[1].value > 0
    return f"shares {found[0].value:.3f}, {found[1].value:.3f}"


def the_nodes_find_and_pick_directions() -> None:
    DiscoverDirections.hidden = type("Hidden", (), {"unique_id": "1", "prompt": None, "extra_pnginfo": None})()
    given = {"prompts": "a person", "method": JACOBIAN, "count": 2, "seeds": 1, "vector_seed": 0, "size": 0, "rows": 1}
    directions, strips, sheet, report = DiscoverDirections.execute(*demo(), **given, cfg=4.0).result
    assert strips.shape[0] == 2 and sheet.shape[0] == 1 and len(report.splitlines()) == 2
    vector, strip, name = PickDirection.execute(directions, 2).result
    assert (vector.name, vector.family) == (name, "demo") and (strip == strips[1]).all()
