"""The audit of a checkpoint: what it takes for granted, by role and attribute, before anyone draws a picture with it.

Defaults, associations, a map and clusters are read from h; for the strongest findings pictures are drawn and, where
something can judge them, the observed share stands beside the predicted one. With `fix`, vectors that counter the
findings are learned, and everything is read again with them on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..fairness import Attribute
from ..fairness.learning import learn_attribute
from ..pictures import to_images
from ..sampling import sample
from ..statistics import bootstrap, mean, wilson
from ..steering import Steer
from .associations import Associations, associations
from .audit_result import Audit, AuditSettings, Finding, Fix, Judge
from .defaults import Default, Estimate, compare, defaults
from .maps import Cluster, check_method, clusters, principal_map, umap_map
from .reading import Reader
from .word_list import WordList, name_of

FIX_ROLES = 8  # that the vectors are learned on; the gate is judged on a third of them
FEWEST_MAPPED = 4  # roles that make a map and clusters worth looking at
PICTURE_SEED = 70_000
Progress = Callable[[str, int, int], None]  # what is being done, done, total
STAGES = {  # first word of what is being done -> percent of the whole at its beginning and end
    "defaults": (0, 45),
    "associations": (45, 60),
    "pictures": (60, 80),
    "learning": (80, 92),
    "reading": (92, 99),
}


def percent(what: str, done: int, total: int) -> float:
    """Of the whole audit, from what its progress tells."""
    low, high = STAGES.get(what.split()[0], (0, 99))
    return low + (high - low) * done / max(1, total)


def readers(
    denoiser: Denoiser,
    words: WordList,
    settings: AuditSettings,
    cache: Path | None = None,
    batch: int = 32,
    stop: Callable[[], bool] | None = None,
) -> tuple[Reader, Reader]:
    """For defaults, and for associations, map and clusters."""
    both = (settings.defaults, settings.space)
    first, second = (Reader(denoiser, replace(one, neutral=words.neutral), cache, batch, stop=stop) for one in both)
    return first, second


def fill_cache(
    both: Sequence[Reader], words: WordList, *, rank: int = 0, processes: int = 1, progress: Progress | None = None
) -> None:
    """Read this process's share of all prompts into the cache; with it full, `audit` gives the same for any number."""
    for reader in both:
        prompts = words.prompts() if reader is both[0] else _space_prompts(words)
        told = (lambda done, total: progress("reading", done, total)) if progress else None
        for _ in reader.stream(prompts, told, rank=rank, processes=processes):
            pass


def audit(
    denoiser: Denoiser,
    words: WordList,
    *,
    settings: AuditSettings | None = None,
    name: str = "",
    cache: Path | None = None,
    batch: int = 32,
    judge: Judge | None = None,
    fix: bool = False,
    already: tuple[float, float] = (0.0, 0.0),
    fix_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Audit:
    """already: UNet rows and seconds that filling the cache took.

    fix_options go to `learn_attribute`. progress(what, done, total); stop() True ends with KeyboardInterrupt.

    Errors: SettingError (words), ConceptSteerError (model, cache).
    """
    settings = settings or AuditSettings()
    check_method(settings.map_method)
    told = progress or (lambda what, done, total: None)
    cost, began = denoiser.cost.snapshot(), time.perf_counter()
    reader, space = readers(denoiser, words, settings, cache, batch, stop)
    found = defaults(reader, words, progress=lambda done, total: told("defaults", done, total))
    table, places, groups, grouped = _space(space, words, settings.map_method, told)
    spent = denoiser.cost.since(cost)
    about = {
        "checkpoint": name or denoiser.family,
        "family": denoiser.family,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "prompts": len(words.prompts()),
        "unet_rows": already[0] + spent.unet_rows,
        "seconds": round(already[1] + time.perf_counter() - began, 1),
        "judge": judge.name if judge else "",
    }
    findings = _findings(denoiser, words, found, settings, judge, told, stop)
    fixes = _fixes(reader, words, found, dict(fix_options or {}), told) if fix else ()
    return Audit(words, settings, about, tuple(found), table, words.roles, places, groups, grouped, findings, fixes)


def _space(
    reader: Reader, words: WordList, method: str, told: Progress
) -> tuple[Associations | None, Tensor, tuple[int, ...], tuple[Cluster, ...]]:
    """Associations of roles with words; each role's place (N, 2) on the map and its cluster's number; the clusters."""
    roles = {role: words.prompt(role) for role in words.roles}
    others = words.word_prompts()
    h = reader.read(_space_prompts(words), lambda done, total: told("associations", done, total))
    neutral = h[words.neutral]
    rows = {role: h[prompt] for role, prompt in roles.items()}
    columns = {name_of(word): h[prompt] for word, prompt in others.items() if prompt != words.neutral}
    table = associations(rows, columns, neutral) if columns else None
    points = torch.stack([(value - neutral).mean(0) for value in rows.values()])
    if len(points) < FEWEST_MAPPED:
        return table, torch.zeros(len(points), 2), (0,) * len(points), ()
    directions = {name: (value - neutral).mean(0) for name, value in columns.items()}
    grouped = clusters(list(rows), points, directions)
    number = {member: i for i, cluster in enumerate(grouped) for member in cluster.members}
    places = umap_map(points) if method == "umap" else principal_map(points)[0]
    return table, places, tuple(number[role] for role in rows), tuple(grouped)


def _space_prompts(words: WordList) -> list[str]:
    return list(dict.fromkeys([words.neutral, *map(words.prompt, words.roles), *words.word_prompts().values()]))


def _findings(
    denoiser: Denoiser,
    words: WordList,
    found: Sequence[Default],
    settings: AuditSettings,
    judge: Judge | None,
    told: Progress,
    stop: Callable[[], bool] | None,
) -> tuple[Finding, ...]:
    """The strongest clear defaults of each attribute in turn, with pictures."""
    queues = [
        sorted((one for one in found if one.attribute == name and one.clear), key=lambda one: -abs(one.lean[0]))
        for name in words.attributes
    ]
    longest = max(map(len, queues), default=0)
    chosen = [queue[i] for i in range(longest) for queue in queues if i < len(queue)][: settings.strongest]
    results = []
    for number, one in enumerate(chosen):
        told("pictures", number, len(chosen))
        if stop is not None and stop():
            raise KeyboardInterrupt
        prompt = words.prompt(one.role)
        if settings.samples < 1:
            results.append(Finding(one, prompt))
            continue
        pixels = _draw(denoiser, prompt, settings)
        labels = judge.values(one.attribute, one.values, pixels) if judge else None
        observed = observed_lean(labels, one.values) if labels else None
        results.append(Finding(one, prompt, tuple(to_images(pixels)), observed, len(labels or ())))
    return tuple(results)


def observed_lean(labels: Sequence[str], values: Sequence[str]) -> Estimate:
    """Mean place of judged pictures on the scale from -1 to 1, and its 95 % interval (Wilson's for two values)."""
    if len(values) == 2:
        hits = sum(label == values[-1] for label in labels)
        low, high = wilson(hits, len(labels))
        return 2 * hits / len(labels) - 1, 2 * low - 1, 2 * high - 1
    places = [2 * list(values).index(label) / (len(values) - 1) - 1 for label in labels]
    low, high = bootstrap(places, lambda drawn: mean([float(str(one)) for one in drawn]))
    return mean(places), low, high


def _draw(denoiser: Denoiser, prompt: str, settings: AuditSettings) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        latents = sample(
            denoiser,
            [prompt] * settings.samples,
            seeds=[PICTURE_SEED + i for i in range(settings.samples)],
            steps=settings.steps,
            guidance=settings.guidance,
            batch=4,
        )
        return torch.cat([denoiser.decode(part).float().cpu() for part in latents.split(4)])


def _fixes(
    reader: Reader, words: WordList, found: Sequence[Default], options: dict[str, Any], told: Progress
) -> tuple[Fix, ...]:
    """For every attribute with a clear default: vectors learned on some of the roles, and all read again with them.

    Seed by seed each value in turn, as fair sampling gives them to a batch.
    """
    every = max(1, len(words.roles) // FIX_ROLES)
    taught = list(words.roles[::every][:FIX_ROLES])
    fixes = []
    for name in words.attributes:
        before = [one for one in found if one.attribute == name]
        if not any(one.clear for one in before) or len(taught) < 3:
            continue
        learned = learn_attribute(
            reader.denoiser,
            name,
            words.attributes[name],
            taught,
            neutral=words.context,
            watch=lambda what, done, total: told(f"learning {what}", done, total),
            **options,
        )
        plain, steered = with_values(reader, learned)
        after = defaults(
            plain,
            words,
            attributes=[name],
            steered={name: steered},
            progress=lambda done, total: told("reading again", done, total),
        )
        fixes.append(Fix(learned, tuple(compare(before, after))))
    return tuple(fixes)


def with_values(reader: Reader, attribute: Attribute) -> tuple[Reader, Reader]:
    """The reader and one in which each seed has a value's vector, all values equally often: both of as many seeds as
    that takes."""
    values = list(attribute.values.values())
    seeds = math.ceil(reader.settings.seeds / len(values)) * len(values)
    steers = [[Steer(values[i % len(values)].vector, values[i % len(values)].strength)] for i in range(seeds)]
    plain = replace(reader, settings=replace(reader.settings, seeds=seeds), _inputs=[])
    return plain, replace(plain, steers=steers, _inputs=[])
