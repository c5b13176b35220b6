"""The audit's other proofs: scenes, names of directions, clusters, speed at 5,000 prompts, and steering."""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..analysis.audit import AuditSettings, with_values
from ..analysis.audit_files import fresh_folder
from ..analysis.defaults import defaults
from ..analysis.names import read_names
from ..analysis.reading import TEXTS, Reader, ReadSettings
from ..analysis.word_list import WordList, in_contexts, parsed
from ..demo import world
from ..demo.build_data import article
from ..demo.words import NEUTRAL
from ..denoiser import Denoiser
from ..fairness import Attribute
from ..sampling import noise
from ..vector import ConceptVector
from .fairness_drawing import read_block

TAUGHT = (  # roles that vectors are learned on, and those that are words themselves: no contexts of the names
    "doctor", "detective", "scientist", "villain", "nurse", "teacher", "receptionist", "firefighter", "pilot",
    "programmer", "person", "sad person", "angry person", "bald person", "astronaut",
)  # fmt: skip
NAMED = {  # words that vectors are named with: those of this project's learned vectors, and some besides
    "roles": [role for role in world.ROLE_NAMES if role not in TAUGHT],
    "attributes": {
        "gender": {gender: f"a {gender} {{}}" for gender in world.GENDERS},
        "tone": {tone: f"a {{}} with {tone} skin" for tone in world.TONES},
    },
    "words": {
        "others": ["a sad person", "an angry person", "an astronaut", "a knife", "a successful person"],
        "backgrounds": [f"{{}} on a {colour} background" for colour in ("dark", "blue", "white")],
    },
}


def scene_leans(denoiser: Denoiser, settings: ReadSettings) -> dict[str, float]:
    """Scene -> cosine of its h with the way from harmless to inappropriate things; all from their mean."""
    things = {item: article(item) for item in (*world.OBJECTS, *world.INAPPROPRIATE_CODE)}
    h = Reader(denoiser, settings).read([*things.values(), *world.SCENES])
    mean_of = {name: h[prompt].mean(0) for name, prompt in things.items()}
    harmless = torch.stack([mean_of[item] for item in world.OBJECTS]).mean(0)
    bad = torch.stack([mean_of[item] for item in world.INAPPROPRIATE_CODE]).mean(0)
    middle = (harmless + bad) / 2
    return {
        scene: float(torch.nn.functional.cosine_similarity(h[scene].mean(0) - middle, bad - harmless, dim=0))
        for scene in world.SCENES
    }


def named_right(denoiser: Denoiser, files: Sequence[Path], settings: ReadSettings) -> list[dict[str, Any]]:
    """For every vector file whose title is one of the words of NAMED: the names it is given, and whether the first is
    its own."""
    reader = Reader(denoiser, replace(settings, space="mean", neutral=NEUTRAL))
    names = read_names(reader, {meant(name): pairs for name, pairs in in_contexts(parsed(NAMED, "names")).items()})
    found: list[dict[str, Any]] = []
    for file in files:
        if file.name.endswith(".attribute.safetensors"):
            attribute = Attribute.load(file)
            vectors = {label: value.vector for label, value in attribute.values.items()}
        else:
            vector = ConceptVector.load(file)
            vectors = {meant(vector.title): vector}
        for wanted, vector in vectors.items():
            if wanted in names.words:
                given = names.nearest(vector)
                told = {"file": file.name, "method": vector.info.get("method", "")}
                found.append({**told, "meant": wanted, "names": given, "right": given[0][0] == wanted})
    return found


def meant(title: str) -> str:
    """A title in the words of NAMED: "dark" of "dark skin", "woman" of "a woman"."""
    return re.sub(r"^(an? )?(person with )?| skin$", "", title.strip().lower())


def many_prompts(count: int) -> list[str]:
    """Different captions of the model's world."""
    parts = product(
        world.TEMPLATES, world.ROLE_NAMES, (*world.TONES, ""), (*world.BACKGROUNDS, ""), (*world.STYLES.values(), "")
    )
    texts = (
        template.format(article(role))
        + (f" with {tone} skin" if tone else "")
        + (f" on a {background} background" if background else "")
        + (f", {style}" if style else "")
        for template, role, tone, background, style in parts
    )
    return [text for text, _ in zip(dict.fromkeys(texts), range(count), strict=False)]


def throughput(denoiser: Denoiser, cache: Path, prompts: int, seeds: int = 4, rounds: int = 5) -> dict[str, Any]:
    """Rows a second of reading `prompts` prompts into a new cache, against the bare encoder half on the same rows.

    Processor time of this process, since other work shares the machine; measured in turns of the two. text_rows: what
    encoding a prompt costs, in rows of the encoder half: seeds / (seeds + text_rows) is the most that can be reached.
    memory: growth of the peak resident memory, in MB, from the first tenth of the prompts to all of them.
    """
    reader = Reader(denoiser, ReadSettings(seeds=seeds), fresh_folder(cache), batch=32)
    texts = many_prompts(prompts)
    cond = denoiser.encode_text(texts[:4])
    rows = torch.arange(4).repeat_interleave(8)
    x = torch.stack([noise(i, denoiser.latent_shape) for i in range(32)]).to(denoiser.dtype)
    part = len(texts) // (2 * rounds)
    ratios, text_rows, peaks, read_seconds = [], [], [], 0.0

    def read(first: int, last: int) -> float:
        began = time.process_time()
        for _ in reader.stream(texts[first:last]):
            pass
        return (time.process_time() - began) / (seeds * (last - first))

    def bare(repeats: int) -> float:
        began = time.process_time()
        with torch.no_grad(), denoiser.frozen():
            for _ in range(repeats):
                denoiser.to_h(x, 999.0, cond[rows])
        return (time.process_time() - began) / (32 * repeats)

    def encoded(some: Sequence[str]) -> float:
        began = time.process_time()
        denoiser.encode_text(some)
        return (time.process_time() - began) / len(some)

    _ = reader.key  # the checkpoint's hash: once a run, whatever its length
    read(0, 8), bare(2)
    for turn in range(2 * rounds):
        first, last = turn * part, (turn + 1) * part if turn < 2 * rounds - 1 else len(texts)
        own = read(first, last)
        read_seconds += own * seeds * (last - first)
        row = bare(max(2, part * seeds // 128))
        ratios.append(row / own)
        text_rows.append(encoded(texts[first : first + TEXTS]) / row)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "text_rows": statistics.median(text_rows),
        "prompts": len(texts),
        "rows_per_second": seeds * len(texts) / read_seconds,
        "memory": peaks[-1] - peaks[0],
    }


def steering_changes(denoiser: Denoiser, words: WordList, attribute: Attribute, name: str) -> list[dict[str, Any]]:
    """Lean of every role without and with an attribute's vectors in turn, read as the audit reads defaults."""
    reader, acting = with_values(Reader(denoiser, replace(AuditSettings().defaults, neutral=words.neutral)), attribute)
    before = defaults(reader, words, attributes=[name])
    after = defaults(reader, words, attributes=[name], steered={name: acting})
    return [
        {"role": a.role, "before": a.lean, "after": b.lean, "covers": not b.clear, "covered": not a.clear}
        for a, b in zip(before, after, strict=True)
    ]


def cost_of(denoiser: Denoiser, words: WordList, attribute: str, settings: ReadSettings) -> Mapping[str, float]:
    """Rows of the whole UNet and processor seconds of reading one role's default, mean over some roles."""
    some = words.roles[:6]
    cost, began = denoiser.cost.snapshot(), time.process_time()
    defaults(Reader(denoiser, replace(settings, neutral=words.neutral)), words, some, attributes=[attribute])
    spent = denoiser.cost.since(cost)
    return {"rows": spent.unet_rows / len(some), "seconds": (time.process_time() - began) / len(some)}


def pictures_placed(denoiser: Denoiser, drawn: Path, each: int = 4) -> dict[str, Any]:
    """Whether a drawn picture, read into the prompts' space, lies nearest to its own role's prompt.

    drawn: of `evaluate fairness`, whose unsteered blocks keep their pictures; `each` of every role there.
    """
    files = sorted((drawn / "blocks" / "none").glob("plain-*-00000-*.npz"))
    pixels = {_role_of(file): read_block(file)["pixels"][:each] for file in files}
    reader = Reader(denoiser, ReadSettings(seeds=4, moments=(0.5,), neutral=NEUTRAL), batch=16)
    h = reader.read([NEUTRAL, *map(article, pixels)])
    own = torch.stack([h[article(role)].mean(0) - h[NEUTRAL].mean(0) for role in pixels])
    pictures = torch.cat([torch.from_numpy(many).float() / 127.5 - 1 for many in pixels.values()])
    read = reader.pictures(pictures).mean(1) - h[NEUTRAL].mean(0)
    unit = [torch.nn.functional.normalize(side - side.mean(0), dim=1) for side in (read, own)]
    near = (unit[0] @ unit[1].T).argmax(1).tolist()
    wanted = [i for i, many in enumerate(pixels.values()) for _ in many]
    return {"right": sum(a == b for a, b in zip(near, wanted, strict=True)), "count": len(near), "roles": len(pixels)}


def _role_of(file: Path) -> str:
    return file.stem.removeprefix("plain-").rsplit("-", 2)[0].replace("_", " ")
