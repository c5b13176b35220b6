"""The safety switch through a real ComfyUI server: three rows of the safety table, on prompts of the demo sets.

`COMFYUI_PATH=~/ComfyUI python benchmarks/comfyui_safety.py [--prompts 50] [--steps 12] [--out docs/results]`
Each prompt is drawn with its own seed and guidance by KSampler (euler, fp32): without the switch, with Safe Latent
Diffusion at the level standard (its preset "strong", told the same words as in the table), and with Safety Steer as it
comes. The three take turns, a few prompts each, so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from concept_steer.demo.judges import Judges  # noqa: E402
from concept_steer.evaluate.figures import Figure, pivot, write  # noqa: E402
from concept_steer.evaluate.i2p_prompts import BENIGN, SUGGESTIVE, PromptRow, read_prompts  # noqa: E402
from concept_steer.evaluate.safety_drawing import JudgesEye  # noqa: E402
from concept_steer.evaluate.safety_methods import WORLD_TEXT  # noqa: E402
from concept_steer.statistics import bootstrap, wilson  # noqa: E402
from tests.hosts.comfyui import host as hosts  # noqa: E402
from tests.hosts.comfyui.client import Client  # noqa: E402
from tests.hosts.comfyui.graphs import Graph  # noqa: E402

SETS = {"suggestive": SUGGESTIVE, "benign": BENIGN}
SHIPPED_SET = f"custom_nodes/{hosts.CLONED}/concept_steer/demo/weights/demo.safety.safetensors"
TURN = 5  # prompts; the first graph of each turn is not timed, since ComfyUI then runs the loading nodes again
NONE = "none"
SLD = {"method": "Safe Latent Diffusion", "categories": "inappropriate", "texts": f"inappropriate: {WORLD_TEXT}"}
SWITCH = {"method": "automatic", "categories": "", "texts": ""}
METHODS: dict[str, dict[str, str] | None] = {NONE: None, "sld_strong": SLD, "switch_default": SWITCH}
COLUMNS = {
    "inappropriate_rate": "inappropriate",
    "benign_inappropriate_rate": "harmless: inappropriate",
    "benign_identical": "harmless: identical",
    "time_ratio": "time ratio, harmless",
    "time_ratio:suggestive": "time ratio, suggestive",
    "seconds_per_picture": "seconds a picture",
}


class Drawn:
    """What one method gave for one set of prompts: pictures (H, W, 3), uint8, and seconds of each graph, if timed."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []
        self.seconds: list[float | None] = []

    def flags(self, eye: JudgesEye) -> list[bool]:
        pixels = torch.from_numpy(np.stack(self.pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return [bool(flag) for flag in eye(pixels)["flagged"]]


def spread(rows: Sequence[PromptRow], count: int) -> list[PromptRow]:
    """`count` prompts, evenly spread over the file."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def graph_of(row: PromptRow, switch: dict[str, str] | None, steps: int) -> tuple[Graph, Any]:
    """(graph, the node that shows the picture)"""
    g = Graph()
    demo = g.demo()
    model = demo if switch is None else g("ConceptSteerSafety", model=demo[0], clip=demo[1], level="standard", **switch)
    shown = g.picture(demo, model, prompt=row.prompt, steps=steps, batch=1, seed=row.seed)
    g[g.sampler.id]["inputs"]["cfg"] = row.guidance
    return g, shown


def clock_of(process: int) -> tuple[Callable[[], float], str]:
    """(seconds that a process has worked, what they are): where the system tells, other work hardly shows in them."""
    stat = Path(f"/proc/{process}/stat")
    if not stat.is_file():
        return time.perf_counter, "wall seconds"
    ticks = os.sysconf("SC_CLK_TCK")

    def worked() -> float:
        return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / ticks

    return worked, "the server's processor seconds"


def draw(client: Client, rows: Sequence[PromptRow], steps: int, clock: Callable[[], float]) -> dict[str, Drawn]:
    """All methods in turns; another one begins each time."""
    found = {name: Drawn() for name in METHODS}
    names = list(METHODS)
    for turn, first in enumerate(range(0, len(rows), TURN)):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            for number, row in enumerate(rows[first : first + TURN]):
                g, shown = graph_of(row, METHODS[name], steps)
                began = clock()
                run = client.queue(g)
                found[name].seconds.append(clock() - began if number else None)
                found[name].pictures.append(client.pictures(run, shown)[0])
        print(f"{min(first + TURN, len(rows))} of {len(rows)} prompts", flush=True)
    return found


def share(method: str, metric: str, hits: Sequence[bool], command: str) -> Figure:
    return Figure(method, metric, sum(hits) / len(hits), *wilson(sum(hits), len(hits)), len(hits), command)


def ratio(method: str, metric: str, one: Drawn, plain: Drawn, command: str) -> Figure:
    """Median over prompts of its seconds over the reference's."""
    pairs = zip(one.seconds, plain.seconds, strict=True)
    ratios = [mine / theirs for mine, theirs in pairs if mine and theirs]
    low, high = bootstrap(ratios, lambda some: statistics.median(map(float, some)))  # type: ignore[arg-type]
    return Figure(method, metric, statistics.median(ratios), low, high, len(ratios), command)


def figures_of(suggestive: dict[str, Drawn], benign: dict[str, Drawn], command: str) -> list[Figure]:
    eye, found = JudgesEye(Judges()), []
    for name in METHODS:
        found.append(share(name, "inappropriate_rate", suggestive[name].flags(eye), command))
        found.append(share(name, "benign_inappropriate_rate", benign[name].flags(eye), command))
        seconds = [value for value in benign[name].seconds if value]
        median = statistics.median(seconds)
        found.append(Figure(name, "seconds_per_picture", median, None, None, len(seconds), command))
        if name != NONE:
            pairs = zip(benign[name].pictures, benign[NONE].pictures, strict=True)
            found.append(share(name, "benign_identical", [np.array_equal(a, b) for a, b in pairs], command))
            found.append(ratio(name, "time_ratio", benign[name], benign[NONE], command))
            found.append(ratio(name, "time_ratio:suggestive", suggestive[name], suggestive[NONE], command))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50, help="of each set, evenly spread (default: 50)")
    parser.add_argument("--steps", type=int, default=12, help="of the sampler (default: 12, as in the table)")
    parser.add_argument("--out", type=Path, help="folder for safety-comfyui.json and .md")
    asked = parser.parse_args()
    host = hosts.find()
    if isinstance(host, str):
        raise SystemExit(host)
    command = f"python benchmarks/comfyui_safety.py --prompts {asked.prompts} --steps {asked.steps}"
    with tempfile.TemporaryDirectory() as folder:
        server = hosts.Server(host, hosts.make_base(Path(folder) / "base"))
        try:
            server.wait_until_ready()
            client = Client(server.port)
            version = client.json("/system_stats")["system"]["comfyui_version"]
            digest = hashlib.sha256((server.base / SHIPPED_SET).read_bytes()).hexdigest()[:12]
            clock, kind = clock_of(server.process.pid)
            rows = {name: spread(read_prompts(file), asked.prompts) for name, file in SETS.items()}
            draw(client, rows["benign"][:1], 2, clock)  # the model is loaded now, not in the first prompt's time
            found = {name: draw(client, some, asked.steps, clock) for name, some in rows.items()}
        finally:
            server.stop()
    figures = figures_of(found["suggestive"], found["benign"], command)
    print(pivot(figures, COLUMNS))
    if asked.out is not None:
        about = [
            f"ComfyUI {version} through its server, on a CPU: {len(rows['suggestive'])} suggestive and "
            f"{len(rows['benign'])} harmless prompts, each once with its own seed and guidance, {asked.steps} steps of "
            "euler in fp32, one picture a graph. Shares with Wilson's 95 % intervals.",
            f"Time: {kind} of a whole graph (encoding, sampling, decoding, preview), the methods in turns; median over "
            "prompts of the ratio to the same prompt without the switch, its 95 % interval by bootstrap.",
            "`identical`: every bit of the picture's 8-bit pixels.",
            f"`sld_strong`: Safety Steer, level standard, method Safe Latent Diffusion, told “{WORLD_TEXT}”. "
            f"`switch_default`: Safety Steer as it comes, with the set that ships with the demo model "
            f"(sha256 {digest}).",
            f"Again: `{command} --out docs/results`.",
        ]
        sections = [("The table", pivot(figures, COLUMNS)), ("How it was measured", "\n\n".join(about))]
        title = "Safety in the real ComfyUI"
        for path in write(asked.out, "safety-comfyui", figures, title=title, sections=sections):
            print(path)


if __name__ == "__main__":
    main()
