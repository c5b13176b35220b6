"""Concept Steer (Prompt): the vector belongs to one CONDITIONING, and only its rows get it. And masks, in areas too."""

from __future__ import annotations

from typing import Any

import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import torch
from bench import CELLS, call, column, conditioning, demo, different, free_memory_of, recorded, rows_got, same, sample
from bench import vector as made
from concept_steer_pack.concept_steer.hosts.comfy import steer_model
from concept_steer_pack.concept_steer.hosts.comfy_conditioning import steer_conditioning
from concept_steer_pack.concept_steer.schedule import Schedule
from concept_steer_pack.concept_steer.steering import Steer

import nodes as comfy_nodes

GOOD, BAD, OTHER = "a doctor", "blurry", "a pilot"
ALL = (GOOD, BAD, OTHER)
V, W = made(0), made(1)
C, D = column(V), column(W)
LEFT = torch.cat([torch.ones(16, 8), torch.zeros(16, 8)], dim=1)  # white: the left half


def _prompt(text: str = GOOD, vector: Any = V, strength: float = 1.0, **more: Any) -> Any:
    return steer_conditioning(conditioning(text), [Steer(vector, strength, **more)])


def _area(cond: Any, x: int, width: int = 64, y: int = 0, height: int = 128) -> Any:
    return call(comfy_nodes.ConditioningSetArea, conditioning=cond, width=width, height=height, x=x, y=y, strength=1.0)


def _sampled(positive: Any, added: Any, negative: Any = None, model: Any = None, **more: Any) -> tuple[str, Any]:
    with recorded(demo()[0] if model is None else model, ALL) as (one, calls):
        sample(one, positive, conditioning(BAD) if negative is None else negative, **more)
    return rows_got(calls, added), calls


def one_prompt_is_the_same_as_steering_the_model() -> str:
    whole = sample(steer_model(demo()[0], [Steer(V)]))
    same(sample(demo()[0], _prompt()), whole)
    same(sample(steer_model(demo()[0], [Steer(V, operator="remove")])), sample(demo()[0], _prompt(operator="remove")))
    return different(whole, sample(demo()[0]))


def only_its_own_rows_get_it() -> str:
    return _sampled(_prompt() + conditioning(OTHER), {GOOD: C, OTHER: None, BAD: None})[0]


def each_prompt_gets_its_own_vector() -> str:
    return _sampled(_prompt() + _prompt(OTHER, W), {GOOD: C, OTHER: D, BAD: None})[0]


def two_vectors_on_one_prompt_add_up() -> None:
    both = steer_conditioning(_prompt(), [Steer(W)])
    same(sample(demo()[0], both), sample(steer_model(demo()[0], [Steer(V), Steer(W)])))
    turned = steer_conditioning(_prompt(vector=W), [Steer(V)])
    same(sample(demo()[0], turned), sample(demo()[0], both))


def a_negative_prompt_may_have_one() -> str:
    return _sampled(conditioning(GOOD), {GOOD: None, BAD: C}, negative=_prompt(BAD))[0]


def the_model_and_a_prompt_may_both_have_one() -> str:
    """The prompt's rows get both; the other prompt gets the model's."""
    model = steer_model(demo()[0], [Steer(W)])
    with recorded(model, ALL) as (one, calls):
        sample(one, _prompt() + conditioning(OTHER), conditioning(BAD))
    for record in calls:
        for row, name in enumerate(record.prompts):
            want = {GOOD: C + D, OTHER: D, BAD: torch.zeros(())}[name]
            off = (record.after[row] - record.before[row] - want).abs().max()
            assert off < 1e-5, (name, float(off))
    same(sample(model, _prompt()), sample(steer_model(model, [Steer(V)])))
    return f"{len(calls)} calls"


def prompts_share_one_batch_again() -> str:
    """A hook on a conditioning would cost a model call of its own; ours is gone before sampling starts."""
    _, calls = _sampled(_prompt() + conditioning(OTHER), {GOOD: C, OTHER: None, BAD: None}, steps=4)
    assert len(calls) == 4 and all(len(one.chunks) == 3 for one in calls), [one.chunks for one in calls]
    _, plain = _sampled(conditioning(GOOD), {GOOD: None, BAD: None}, steps=4)
    _, one = _sampled(_prompt(), {GOOD: C, BAD: None}, steps=4)
    assert len(one) == len(plain) == 4
    return f"{len(calls)} calls for 4 steps of 3 prompts"


def its_area_may_be_set_after_and_before() -> str:
    before = _area(_prompt(), 0) + _area(conditioning(OTHER), 64)
    after = steer_conditioning(_area(conditioning(GOOD), 0), [Steer(V)]) + _area(conditioning(OTHER), 64)
    same(sample(demo()[0], before), sample(demo()[0], after))
    return different(sample(demo()[0], before), sample(demo()[0]))


def with_areas_only_its_own_region_gets_it() -> str:
    """ComfyUI copies an area's prompt, our vector included, to make the negative prompt's part of that area."""
    positive = _area(_prompt(), 0) + _area(conditioning(OTHER), 64)
    return _sampled(positive, {GOOD: C, OTHER: None, BAD: None})[0]


def with_areas_and_little_memory_too() -> str:
    positive = _area(_prompt(), 0) + _area(conditioning(OTHER), 64)
    with free_memory_of(0):
        return _sampled(positive, {GOOD: C, OTHER: None, BAD: None})[0]


def a_negative_prompt_with_an_area_keeps_it_to_itself() -> str:
    negative = _area(_prompt(BAD), 32)
    return _sampled(conditioning(GOOD), {GOOD: None, BAD: C}, negative=negative)[0]


def in_other_guiders_too() -> str:
    """DualCFG and PerpNeg, with an area that is copied to all lists."""
    model, positive = demo()[0], _area(_prompt(), 0)
    dual = lambda one: custom.DualCFGGuider().get_guider(  # noqa: E731
        one, positive, conditioning(OTHER), conditioning(BAD), 4.0, 3.0, "regular"
    )[0]
    perp = lambda one: call(  # noqa: E731
        perpneg.PerpNegGuider,
        model=one,
        positive=positive,
        negative=conditioning(OTHER),
        empty_conditioning=conditioning(BAD),
        cfg=4.0,
        neg_scale=1.0,
    )
    measured = []
    for guider in (dual, perp):
        with recorded(model, ALL) as (one, calls):
            sigmas = custom.BasicScheduler().get_sigmas(model, "normal", 4, 1.0)[0]
            sampler = custom.KSamplerSelect().get_sampler("euler")[0]
            noise = custom.RandomNoise().get_noise(1)[0]
            latent = {"samples": torch.zeros(2, 4, CELLS, CELLS)}
            custom.SamplerCustomAdvanced().sample(noise, guider(one), sampler, sigmas, latent)
        measured.append(rows_got(calls, {GOOD: C, OTHER: None, BAD: None}))
    return "; ".join(measured)


def its_window_and_a_time_range() -> str:
    whole = sample(demo()[0], _prompt(), steps=6)
    early = sample(demo()[0], _prompt(schedule=Schedule(0.0, 0.5)), steps=6)
    same(sample(demo()[0], _prompt(schedule=Schedule(0.45, 0.46)), steps=6), sample(demo()[0], steps=6))
    ranged = comfy_nodes.ConditioningSetTimestepRange()
    parts = ranged.set_range(_prompt(), 0.0, 0.5)[0] + ranged.set_range(conditioning(OTHER), 0.5, 1.0)[0]
    different(early, whole)
    return _sampled(parts, {GOOD: C, OTHER: None, BAD: None}, steps=6)[0]


def the_next_picture_without_it_is_unsteered() -> None:
    before = sample(demo()[0])
    sample(demo()[0], _prompt())
    same(sample(demo()[0]), before)


# --- masks


def _mask_added(model: Any, positive: Any, latent_mask: torch.Tensor) -> str:
    """What was added to the prompt's rows is c times the mask (H, W of the latent), shrunk to h."""
    with recorded(model, ALL) as (one, calls):
        sample(one, positive, conditioning(BAD))
    for record in calls:
        size = record.after.shape[-2:]
        shrunk = torch.nn.functional.interpolate(latent_mask[None, None], tuple(size), mode="area")[0]
        for row, name in enumerate(record.prompts):
            added = record.after[row] - record.before[row]
            want = C * shrunk if name == GOOD else torch.zeros_like(added)
            # next to an edge the two ways to shrink may differ; where all around is black or white they may not
            around = [torch.nn.functional.max_pool2d(sign * shrunk, 3, 1, 1) * sign for sign in (1, -1)]
            sure = around[0] == around[1]
            assert bool((sure & (shrunk == 0)).any()) and bool((sure & (shrunk == 1)).any())
            off = ((added - want).abs() * sure).max()
            assert off < 1e-5, (name, float(off))
    return f"{len(calls)} calls"


def a_mask_on_the_model() -> str:
    model = steer_model(demo()[0], [Steer(V, mask=torch.nn.functional.interpolate(LEFT[None, None], (512, 512))[0, 0])])
    return _mask_added(model, conditioning(GOOD), LEFT)


def a_mask_on_a_prompt() -> str:
    return _mask_added(demo()[0], _prompt(mask=LEFT), LEFT)


def an_area_sees_its_own_part_of_the_mask() -> str:
    """All white in the left half, all black in the right one."""
    model = steer_model(demo()[0], [Steer(V, mask=LEFT)])
    left = _sampled(_area(conditioning(GOOD), 0), {GOOD: C, BAD: None}, model=model)[0]
    right = _sampled(_area(conditioning(GOOD), 64), {GOOD: C * 0, BAD: None}, model=model)[0]
    return f"{left}; {right}"


def a_black_mask_changes_nothing() -> None:
    plain = sample(demo()[0])
    off = (sample(steer_model(demo()[0], [Steer(V, mask=torch.zeros(8, 8))])) - plain).abs().max()
    assert off == 0, float(off)


def a_white_mask_is_no_mask() -> None:
    masked = sample(steer_model(demo()[0], [Steer(V, mask=torch.ones(64, 64))]))
    assert (masked - sample(steer_model(demo()[0], [Steer(V)]))).abs().max() < 1e-5
