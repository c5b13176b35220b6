"""A saved workflow as the prompt that the browser would send: widgets by name, links by node and slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
ALWAYS, MUTED, BYPASSED = 0, 2, 4


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The API prompt of a workflow (format 0.4); `object_info` is the answer of GET /object_info.

    Notes and muted nodes are left out, together with the links that come from them; a bypassed node hands on what it
    gets. Errors: ValueError for an unknown node, or when the number of widget values is not the node's.
    """
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    origins = {link[0]: (link[1], link[2], link[5]) for link in workflow["links"]}
    prompt: dict[str, Any] = {}
    for number, node in nodes.items():
        if node.get("mode", ALWAYS) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"This ComfyUI does not know the node {node['type']}.")
        inputs = _widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs", []):
            source = _source(socket.get("link"), nodes, origins)
            if source is not None:
                inputs[socket["name"]] = [str(source[0]), source[1]]
        prompt[str(number)] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def widgets(info: Mapping[str, Any]) -> Iterator[str | None]:
    """Names of the widgets in the order of `widgets_values`; None for one that the browser adds and keeps."""
    for group in ("required", "optional"):
        given = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, given):
            kind, *more = given[name]
            options = more[0] if more else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            yield name
            seed = kind == "INT" and name in ("seed", "noise_seed")
            if options.get("control_after_generate", seed) or options.get("image_upload"):
                yield None


def _widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):
        return dict(values)
    names = list(widgets(info))
    if len(values) != len(names):
        raise ValueError(f"{node['type']} {node['id']} has {len(values)} widget values for {len(names)} widgets.")
    # a list would be read as a link, so ComfyUI wraps it
    wrapped = ({"__value__": value} if isinstance(value, list) else value for value in values)
    return {name: value for name, value in zip(names, wrapped, strict=True) if name is not None}


def _source(
    link: int | None, nodes: Mapping[int, Mapping[str, Any]], origins: Mapping[int, tuple[int, int, str]]
) -> tuple[int, int] | None:
    """(node, slot) that a link comes from, through bypassed nodes; None when nothing is there."""
    while link is not None:
        number, slot, kind = origins[link]
        node = nodes.get(number)
        if node is None or node.get("mode", ALWAYS) == MUTED:
            return None
        if node.get("mode", ALWAYS) != BYPASSED:
            return number, slot
        same = [socket for socket in node.get("inputs", []) if socket["type"] == kind]
        link = same[0].get("link") if same else None
    return None
