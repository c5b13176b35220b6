"""The ComfyUI pack without ComfyUI: every node is explained and labelled, every example workflow fits its nodes."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from node_schemas import WIDGETS, in_order, read_schemas
from PIL import Image

ROOT = Path(__file__).parents[2]
NODE_FILES = sorted((ROOT / "nodes").glob("*.py"))
PAGES = ROOT / "web" / "docs"
LOCALES = sorted((ROOT / "locales").glob("*/nodeDefs.json"))
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
ALLOWED = {"torch", "numpy", "PIL", "folder_paths"}
SPECIAL = set("@{}|")  # the translator of ComfyUI's page gives these a meaning
NOTES = ("MarkdownNote", "Note")
# Stock nodes that the examples may use: sockets in order, number of widget values, outputs.
STOCK: dict[str, tuple[dict[str, str], int, list[str]]] = {
    "CLIPTextEncode": ({"clip": "CLIP"}, 1, ["CONDITIONING"]),
    "ConditioningCombine": (
        {"conditioning_1": "CONDITIONING", "conditioning_2": "CONDITIONING"},
        0,
        ["CONDITIONING"],
    ),
    "ConditioningSetArea": ({"conditioning": "CONDITIONING"}, 5, ["CONDITIONING"]),
    "EmptyLatentImage": ({}, 3, ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        7,
        ["LATENT"],
    ),
    "MarkdownNote": ({}, 1, []),
    "MaskComposite": ({"destination": "MASK", "source": "MASK"}, 3, ["MASK"]),
    "Note": ({}, 1, []),
    "PreviewImage": ({"images": "IMAGE"}, 0, []),
    "SaveImage": ({"images": "IMAGE"}, 1, []),
    "SolidMask": ({}, 3, ["MASK"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, 0, ["IMAGE"]),
}


def ids() -> list[str]:
    """The node ids as they stand in the node files."""
    calls = [
        node
        for path in NODE_FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "schema"
    ]
    return [str(ast.literal_eval(word.value)) for call in calls for word in call.keywords if word.arg == "node_id"]


IDS = ids()


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    return read_schemas()


@pytest.fixture(scope="module")
def locale() -> dict[str, Any]:
    return json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


# --- nodes


def test_every_node_of_the_files_is_offered_once(schemas):
    assert IDS and len(IDS) == len(set(IDS))
    assert set(schemas) == set(IDS)


@pytest.mark.parametrize("node", IDS)
def test_a_node_id_cannot_clash_with_another_packs(node):
    assert re.fullmatch(r"ConceptSteer[A-Za-z]*", node)


@pytest.mark.parametrize("node", IDS)
def test_a_node_has_a_name_a_description_a_category_and_search_words(schemas, node):
    schema = schemas[node]
    assert schema["display_name"] and schema["display_name"] != node
    assert schema["description"].endswith(".")
    assert schema["category"].split("/")[0] == "Concept Steer"
    assert schema["search_aliases"]


@pytest.mark.parametrize("node", IDS)
def test_every_input_and_output_has_a_tooltip(schemas, node):
    told = schemas[node]["inputs"] + schemas[node]["outputs"]
    assert [one.get("id", one.get("display_name")) for one in told if not one.get("tooltip", "").strip()] == []


@pytest.mark.parametrize("node", IDS)
def test_a_choice_starts_with_one_of_its_options(schemas, node):
    for one in schemas[node]["inputs"]:
        if one["type"] == "COMBO":
            assert one.get("default", one["options"][0]) in one["options"]


def test_no_input_is_changed_behind_the_users_back(schemas):
    """ComfyUI's page draws a new number after each run for widgets of these names."""
    named = {one["id"] for schema in schemas.values() for one in schema["inputs"]}
    assert not named & {"seed", "noise_seed"}


# --- help pages


def test_every_help_page_belongs_to_a_node():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(IDS)


@pytest.mark.parametrize("node", IDS)
def test_a_help_page_names_every_input_and_output_in_its_tables(locale, node):
    page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| **"))
    named = re.findall(r"\*\*(.+?)\*\*", rows)
    wanted = [one["name"] for part in ("inputs", "outputs") for one in locale[node][part].values()]
    assert sorted(named) == sorted(wanted)


@pytest.mark.parametrize("node", IDS)
def test_a_help_page_is_one_screen_or_two(node):
    page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    assert 15 <= len(page.splitlines()) <= 40
    assert page.isprintable() or set("".join(page.split())) <= set(filter(str.isprintable, page))


# --- locales


def test_there_is_an_english_locale():
    assert "en" in [path.parent.name for path in LOCALES]


@pytest.mark.parametrize("path", LOCALES, ids=lambda path: path.parent.name)
def test_a_locale_covers_every_node_input_and_output(schemas, path):
    told = json.loads(path.read_text(encoding="utf-8"))
    assert list(told) == list(schemas)
    for node, schema in schemas.items():
        assert list(told[node]["inputs"]) == [one["id"] for one in schema["inputs"]], node
        assert list(told[node]["outputs"]) == [str(i) for i in range(len(schema["outputs"]))], node


@pytest.mark.parametrize("node", IDS)
def test_the_english_locale_says_what_the_schema_says(schemas, locale, node):
    schema, told = schemas[node], locale[node]
    assert (told["display_name"], told["description"]) == (schema["display_name"], schema["description"])
    assert [one["tooltip"] for one in told["inputs"].values()] == [one["tooltip"] for one in schema["inputs"]]
    outputs = [(one["display_name"], one["tooltip"]) for one in schema["outputs"]]
    assert [(one["name"], one["tooltip"]) for one in told["outputs"].values()] == outputs


@pytest.mark.parametrize("path", sorted((ROOT / "locales").glob("*/*.json")), ids=lambda path: path.name)
def test_a_locale_holds_texts_that_can_be_shown(path):
    def texts(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else [text for part in value.values() for text in texts(part)]

    found = texts(json.loads(path.read_text(encoding="utf-8")))
    assert found and all(text.strip() for text in found)
    assert [text for text in found if SPECIAL & set(text)] == []


@pytest.mark.parametrize("node", IDS)
def test_a_label_has_no_underscore(locale, node):
    assert not [one["name"] for one in locale[node]["inputs"].values() if "_" in one["name"]]


# --- example workflows


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sockets_of(kind: str, schemas: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Names and types of a node's sockets, in order."""
    if kind in STOCK:
        return STOCK[kind][0]
    inputs = in_order(schemas[kind]["inputs"])
    return {one["id"]: one["type"] for one in inputs if not is_widget(one)}


def is_widget(one: dict[str, Any]) -> bool:
    return one["type"] in WIDGETS and not one.get("force_input")


def widgets_of(kind: str, schemas: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in in_order(schemas[kind]["inputs"]) if is_widget(one)]


def outputs_of(kind: str, schemas: dict[str, dict[str, Any]]) -> list[str]:
    return STOCK[kind][2] if kind in STOCK else [one["type"] for one in schemas[kind]["outputs"]]


def test_there_are_workflows_for_each_way_to_work():
    assert sorted((path.stem for path in WORKFLOWS), key=lambda name: int(name.partition("_")[0])) == [
        "1_steer",
        "2_learn_and_steer",
        "3_stack_and_mix",
        "4_strip",
        "5_learn_from_pictures",
        "6_regional",
        "7_fair_sampling",
        "8_safety",
        "9_audit",
        "10_pick_best",
        "11_optimise_noise",
        "12_latent_guard",
        "13_erase",
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_picture_of_its_result(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and 256 <= picture.width <= 1024
    assert path.with_suffix(".jpg").stat().st_size < 200_000


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_uses_stock_nodes_and_ours_only(schemas, path):
    workflow = load(path)
    assert workflow["version"] == 0.4
    kinds = {node["type"] for node in workflow["nodes"]}
    assert kinds <= set(STOCK) | set(schemas)
    assert kinds & set(NOTES) and kinds & set(schemas)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_on_what_is_shipped(path):
    kinds = {node["type"] for node in load(path)["nodes"]}
    assert kinds & {"ConceptSteerLoadDemo", "ConceptSteerLoadDemoStudent"}
    assert not kinds & {"ConceptSteerLoadVector", "LoadImage", "CheckpointLoaderSimple"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_link_joins_an_output_and_an_input_of_one_type(schemas, path):
    workflow = load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    numbers = [link[0] for link in workflow["links"]]
    assert len(numbers) == len(set(numbers)) and max(numbers) <= workflow["last_link_id"]
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) <= workflow["last_node_id"]
    for number, source, out, target, into, kind in workflow["links"]:
        origin, end = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert number in origin["links"] and end["link"] == number
        assert origin["type"] == end["type"] == kind
    ends = [socket["link"] for node in nodes.values() for socket in node["inputs"] if socket["link"] is not None]
    starts = [number for node in nodes.values() for out in node["outputs"] for number in out["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(numbers)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_of_a_workflow_has_the_sockets_of_its_kind(schemas, path):
    for node in load(path)["nodes"]:
        sockets = sockets_of(node["type"], schemas)
        inputs = [one for one in node["inputs"] if "widget" not in one]  # the others are widgets with a link
        assert {one["name"]: one["type"] for one in inputs} == sockets, node["type"]
        assert [one["name"] for one in inputs] == list(sockets), node["type"]
        assert [one["type"] for one in node["outputs"]] == outputs_of(node["type"], schemas), node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_needed_socket_of_a_workflow_is_connected(schemas, path):
    for node in load(path)["nodes"]:
        optional = {one["id"] for one in schemas.get(node["type"], {}).get("inputs", []) if one.get("optional")}
        open_ones = {one["name"] for one in node["inputs"] if one["link"] is None}
        assert open_ones <= optional, node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_widget_values_of_a_workflow_fit_the_nodes_widgets(schemas, path):
    for node in load(path)["nodes"]:
        kind, values = node["type"], node.get("widgets_values", [])
        if kind in STOCK:
            assert len(values) == STOCK[kind][1], kind
            continue
        widgets = widgets_of(kind, schemas)
        assert len(values) == len(widgets), kind
        for widget, value in zip(widgets, values, strict=True):
            problem = f"{kind}.{widget['id']} is {value!r}"
            if widget["type"] == "COMBO":
                assert value in widget["options"], problem
            elif widget["type"] in ("INT", "FLOAT"):
                assert isinstance(value, (int, float)) and not isinstance(value, bool), problem
                assert widget["min"] <= value <= widget["max"], problem
            else:
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[widget["type"]]), problem


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_gives_the_same_pictures_every_time(path):
    samplers = [node["widgets_values"] for node in load(path)["nodes"] if node["type"] == "KSampler"]
    assert all(values[1] == "fixed" for values in samplers)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_overlaps_and_every_node_lies_in_a_titled_group(path):
    workflow = load(path)
    title_bar = 30
    boxes = []
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((node, (x, y - title_bar, x + width, y + height)))
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[:i]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{one['type']} {one['id']} lies on {other['type']} {other['id']}"
    areas = []
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        assert group["title"].strip()
        areas.append((x, y, x + width, y + height))
    for i, a in enumerate(areas):
        for b in areas[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for node, (left, top, right, bottom) in boxes:
        held = [a for a in areas if a[0] <= left and a[1] <= top and right <= a[2] and bottom <= a[3]]
        assert held or node["type"] in NOTES, f"{node['type']} {node['id']} lies in no group"


# --- imports


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import of a file; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, name.name, []) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [name.name for name in node.names]))
    return found


@pytest.mark.parametrize("path", NODE_FILES, ids=lambda path: path.name)
def test_a_node_file_imports_only_comfyui_the_usual_libraries_and_the_core(path):
    siblings = {other.stem for other in NODE_FILES}
    for level, module, names in imports(path):
        top = module.split(".")[0]
        if level == 0:
            known = top in ALLOWED or top in sys.stdlib_module_names or re.fullmatch(r"comfy(_\w+)?", top)
            assert known, f"{path.name} imports {module}"
        elif level == 1:
            assert {top} <= siblings if top else set(names) <= siblings
        else:
            assert level == 2 and top == "concept_steer", f"{path.name} leaves the pack: {module}"


def test_nobody_imports_the_node_files_by_their_bare_name():
    """`nodes` is also a module of ComfyUI's own; only what tests run inside ComfyUI may mean that one."""
    skipped = ("nodes/", ".venv/", "build/", "dist/", "tests/hosts/comfyui/inside/")
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).as_posix().startswith(skipped):
            continue
        wrong += [str(path) for level, module, _ in imports(path) if level == 0 and module.split(".")[0] == "nodes"]
    assert wrong == []


def test_the_door_opens_for_comfyui_only():
    """A test runner that walks by, or another program, imports nothing of the pack through it."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    outside = [name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names]
    assert set(outside) <= sys.stdlib_module_names
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = {target.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets}
    assert "WEB_DIRECTORY" in names and "NODE_CLASS_MAPPINGS" not in names
