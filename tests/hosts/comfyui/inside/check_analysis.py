"""The analyses on the embedded model inside ComfyUI: the same figures as through diffusers, and every node."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from bench import demo
from concept_steer_pack.concept_steer.analysis.defaults import defaults
from concept_steer_pack.concept_steer.analysis.reading import Reader, ReadSettings
from concept_steer_pack.concept_steer.demo.auditing import usual_words
from concept_steer_pack.concept_steer.errors import ConceptSteerError
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.vector import ConceptVector
from concept_steer_pack.nodes import analyse, analyse_defaults
from concept_steer_pack.nodes.audit import AuditCheckpoint

LOOK = {"seeds": 2}
GENDER = "gender: woman = a woman {}; man = a man {}"
LEANS = {"mechanic": 0.63, "nurse": 0.07}  # through diffusers: mean of h at pure noise, seeds 0 to 7


def _hidden(node) -> None:
    node.hidden = type("Hidden", (), {"unique_id": "1", "prompt": None, "extra_pnginfo": None})()


def defaults_are_the_same_as_through_diffusers() -> str:
    reader = Reader(ComfyDenoiser(*demo()), ReadSettings(seeds=8))
    found = defaults(reader, usual_words("demo"), list(LEANS), attributes=["gender"])
    lean = {one.role: one.lean[0] for one in found}
    assert all(abs(lean[role] - LEANS[role]) < 0.02 for role in LEANS), lean
    return str(lean)


def every_analysis_node_draws_and_tells() -> None:
    for node in (*analyse.NODES, *analyse_defaults.NODES):
        _hidden(node)
    model, clip, _ = demo()
    some = "a nurse\na doctor\na cook\na pilot"
    words = "a woman\na man\n{} on a blue background"
    results = [
        analyse_defaults.Defaults.execute(model, clip, "nurse\npilot", GENDER, **LOOK).result,
        analyse.Descriptors.execute(model, clip, "a nurse", words, **LOOK).result,
        analyse.AssociationMap.execute(model, clip, some, words, **LOOK).result,
        analyse.ConceptMap.execute(model, clip, some, words, 2, **LOOK).result,
    ]
    import torch

    vector = ConceptVector(torch.randn(192), "demo", "anything")
    results.append(analyse.NameVector.execute(model, clip, vector, words, **LOOK).result)
    results.append(
        analyse_defaults.CompareDefaults.execute(model, clip, "nurse", GENDER, 2, vector=vector, strength=0.1).result
    )
    for picture, report in results:
        assert picture.ndim == 4 and picture.shape[-1] == 3 and report.strip()
    try:
        analyse_defaults.CompareDefaults.execute(model, clip, "nurse", GENDER, 2)
    except ConceptSteerError as error:
        assert "either" in str(error)
    else:
        raise AssertionError("comparing with nothing was accepted")


def the_audit_node_writes_its_page() -> str:
    _hidden(AuditCheckpoint)
    given = {"name": "demo", "roles": "nurse\npilot\ncook\nwizard", "attributes": GENDER, "seeds": 2, "findings": 1}
    model, clip, vae = demo()
    result = AuditCheckpoint.execute(
        model, clip, vae, **given, samples=2, fix=False, size=0, words="a party\na car"
    ).result
    summary, report, page = result
    assert summary.shape[0] == 1 and "gender" in report
    text = Path(page).read_text(encoding="utf-8")
    assert "Observed in 2 pictures" in text and Path(folder_paths.get_output_directory()) in Path(page).parents
    return report
