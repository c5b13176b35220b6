"""The switch as it comes: vectors, and guidance for those pictures only whose gate has opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench import call, conditioning, demo, different, free_memory_of, same, sample
from check_safe_latent_diffusion import BAD, GOOD, OTHER, _advanced, _drawn, _host, _noise
from check_safety import OPEN, SHUT, TOLERANCE, _by_hand, _guarded, _set
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.hosts.comfy_guidance import safe_model
from concept_steer_pack.concept_steer.hosts.comfy_safety import guard_of, safe
from concept_steer_pack.concept_steer.safety import SafetySettings, plan
from concept_steer_pack.concept_steer.safety.safety_set import SHIPPED
from concept_steer_pack.concept_steer.sampling import sample as core_sample

import nodes as comfy_nodes


class _Rows:
    """Counts the rows that a MODEL's UNet gets."""

    def __init__(self, model: Any) -> None:
        self.model, self.count = model, 0

    def __enter__(self) -> _Rows:
        unet = self.model.model.diffusion_model
        self.hook = unet.register_forward_pre_hook(lambda module, args: self.add(args[0]))
        return self

    def add(self, x: torch.Tensor) -> None:
        self.count += x.shape[0]

    def __exit__(self, *error: Any) -> None:
        self.hook.remove()


def the_default_switch_gives_the_cores_latents_and_costs_rows_only_where_it_acts() -> str:
    """The shipped set, on prompts that it acts on and one that it spares, on the core's noise and noise levels."""
    said = []
    for text, acts in (("a knife", True), ("a cat", False)):
        made = plan(SafetySettings(), "demo", 192)
        assert made.gated
        given: dict[str, Any] = {"seeds": [0, 0], "steps": 10, "guidance": 5.0, "start_latents": _noise()}
        how = {"steers": made.steers, "guide": made.guidance, "negative": BAD}
        core = core_sample(ComfyDenoiser(*demo()), [text, text], **how, **given)
        model, _ = safe(*demo()[:2], SafetySettings(), folders=[SHIPPED])
        with _Rows(model) as rows:
            host = _host("euler", None, 10, 5.0, model, text=text)
        away, gate = float((core - host).abs().mean()), dict(guard_of(model).runs[-1].gate)
        assert away < TOLERANCE / 10, away  # roundings may turn one of the method's comparisons around
        assert gate == made.firings.to_dict() and bool(gate["fired_pictures"]) == acts, (gate, made.firings.to_dict())
        assert rows.count == 10 * 2 * (3 if acts else 2), rows.count
        said.append(f"{text}: mean difference {away:.2g}, {rows.count} rows")
    return "; ".join(said)


def of_a_batch_only_the_pictures_that_opened_their_gate_are_guided() -> str:
    """The other keeps the bits that it has without safety, at any memory."""
    model = demo()[0]
    for memory in (None, 0):
        plain = _drawn(model) if memory is None else _with(memory, lambda: _drawn(model))
        low, high = -50.0, 50.0
        for _ in range(40):
            limit = (low + high) / 2
            mixed = _guarded(method="both", threshold=limit)
            found = _drawn(mixed) if memory is None else _with(memory, lambda mixed=mixed: _drawn(mixed))
            fired = guard_of(mixed).runs[-1].gate["fired_pictures"]
            if fired == 1:
                break
            low, high = (limit, high) if fired == 2 else (low, limit)
        kept = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
        assert sorted(kept) == [False, True], kept
    return f"threshold {limit:.3g}, picture {kept.index(True)} kept"


def _with(memory: int, draw: Callable[[], Any]) -> Any:
    with free_memory_of(memory):
        return draw()


def an_open_gate_is_safe_latent_diffusion_and_a_shut_one_is_nothing() -> str:
    opened, shut = _guarded(method="both"), _guarded(method="both", threshold=SHUT)
    made = safe(demo()[0], demo()[1], SafetySettings(method="both"), [_set(OPEN)])[1]
    by_hand = safe_model(_by_hand(), demo()[1], made.guide)
    said = []
    for settings in ({}, {"cfg": 1.0}, {"sampler": "heun"}, {"steps": 1}, {"size": (12, 20), "batch": 3}):
        # its rows have a call of their own, so other roundings, which may turn one of the method's comparisons around
        away = float((_drawn(opened, **settings) - _drawn(by_hand, **settings)).abs().mean())
        assert away < TOLERANCE / 10, (settings, away)
        same(_drawn(shut, **settings), _drawn(demo()[0], **settings))
        said.append(f"{away:.2g}")
    return f"{different(_drawn(opened), _drawn(demo()[0]))}; to guidance by hand {', '.join(said)}"


def other_nodes_get_through() -> None:
    """Guidance nodes with passes of their own, three conditionings, regions, ranges of steps."""
    add: list[Callable[[Any], Any]] = [
        lambda m: call(RescaleCFG, model=m, multiplier=0.7),
        lambda m: call(PerturbedAttentionGuidance, model=m, scale=2.0),
    ]
    for node in add:
        _drawn(node(_guarded(method="both")))
        _drawn(_guarded(node(demo()[0]), method="both"))
    for style in ("regular", "nested"):
        three = conditioning(GOOD), conditioning(OTHER), conditioning(BAD)
        _advanced(DualCFGGuider().get_guider(_guarded(method="both"), *three, 4.0, 3.0, style)[0])
    early, late = (
        comfy_nodes.NODE_CLASS_MAPPINGS["ConditioningSetTimestepRange"]().set_range(conditioning(text), *window)[0]
        for text, window in ((GOOD, (0.0, 0.5)), (OTHER, (0.5, 1.0)))
    )
    _drawn(_guarded(method="both"), positive=[*early, *late])
    left = comfy_nodes.ConditioningSetArea().append(conditioning(GOOD), 64, 128, 0, 0, 1.0)[0]
    regions = [*left, *conditioning(OTHER)]
    shut = sample(_guarded(method="both", threshold=SHUT), regions, conditioning(BAD))
    same(shut, sample(demo()[0], regions, conditioning(BAD)))
    different(_drawn(_guarded(method="both"), positive=regions), shut)
