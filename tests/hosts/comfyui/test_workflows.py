"""Every example workflow runs as it is shipped."""

from __future__ import annotations

import json

import pytest

from . import host as hosts
from .workflows import to_prompt

TRAINS = ("13_erase",)  # a LoRA
WORKFLOWS = sorted((hosts.ROOT / "example_workflows").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_runs_as_shipped(client, path, record_property, request):
    if path.stem in TRAINS:
        request.getfixturevalue("peft")
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, client.object_info())
    run = client.queue(prompt)
    record_property("seconds", round(run.seconds, 1))
    shown = [image for outputs in run.outputs.values() for image in outputs.get("images", [])]
    assert shown, "no picture was shown"
    for node, outputs in run.outputs.items():
        if outputs.get("images"):
            pictures = [client.pictures(run, node)] if _one_size(client, run, node) else []
            assert all(picture.std() > 5 for picture in pictures), f"node {node} shows an empty picture"
    print(f"{path.name}: {run.seconds:.1f} s, {len(shown)} pictures")


def _one_size(client, run, node) -> bool:
    try:
        client.pictures(run, node)
    except ValueError:  # pictures of different sizes on one node
        return False
    return True


def test_there_are_workflows_for_all_that_is_promised():
    names = " ".join(path.stem for path in WORKFLOWS)
    promised = "steer learn mix strip picture regional fair safety audit pick noise guard erase"
    for word in promised.split():
        assert word in names
