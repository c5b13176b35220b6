"""Learning on the embedded model inside ComfyUI, and what other parts of ComfyUI do beside steering."""

from __future__ import annotations

from typing import Any

import torch
from bench import CELLS, conditioning, demo, different, output_folder, recorded, same, sample, vector
from comfy_api.torch_helpers import set_torch_compile_wrapper
from concept_steer_pack.concept_steer.hosts.comfy import steer_model
from concept_steer_pack.concept_steer.hosts.comfy_denoiser import ComfyDenoiser
from concept_steer_pack.concept_steer.learn import learn_difference, learn_pictures, learn_score
from concept_steer_pack.concept_steer.schedule import Schedule
from concept_steer_pack.concept_steer.steering import Steer
from safetensors.torch import save_file

PAIRS = [("a doctor", "a woman doctor")]


def _denoiser() -> ComfyDenoiser:
    return ComfyDenoiser(*demo())


def the_two_halves_are_the_whole() -> None:
    denoiser = _denoiser()
    cond = denoiser.encode_text(["a doctor", "a nurse", ""])
    for t in (0.0, 500.0, 999.0):
        for size in ((16, 16), (15, 17)):
            x = torch.randn(3, 4, *size)
            same(denoiser.predict(x, t, cond), denoiser.from_h(denoiser.to_h(x, t, cond)).float())


def the_denoiser_steers_as_the_sampler_does() -> str:
    """Its prediction with a vector is the one recorded while KSampler ran."""
    model, v = demo()[0], vector()
    with recorded(steer_model(model, [Steer(v)]), ("a doctor", "")) as (one, calls):
        sample(one, steps=3)
    denoiser, worst = _denoiser(), 0.0
    sampling = model.get_model_object("model_sampling")
    for record in calls:
        sigma = torch.tensor(record.sigma)
        x = record.x / (1 + sigma**2) ** 0.5
        cond = denoiser.encode_text(record.prompts)
        flags = [prompt == "a doctor" for prompt in record.prompts]
        found = denoiser.predict(x, float(sampling.timestep(sigma)), cond, [Steer(v)], flags)
        worst = max(worst, float((found - record.prediction).abs().max()))
    assert worst < 1e-4, worst
    return f"max difference {worst:.2g}"


def difference_of_means_learns() -> str:
    result = learn_difference(_denoiser(), PAIRS, seeds=4)
    assert result.vector.family == "demo" and (result.separation or 0) > 0.9
    return different(sample(steer_model(demo()[0], [Steer(result.vector)])), sample(demo()[0]))


def learning_gives_the_same_vector_for_the_same_seed() -> None:
    first, second = (learn_difference(_denoiser(), PAIRS, seeds=2, seed=5).vector for _ in range(2))
    assert first == second


def the_models_own_predictions_teach_it() -> str:
    result = learn_score(_denoiser(), PAIRS, steps=6, trajectories=8, batch=8)
    assert len(result.losses) == 6 and (result.explained or 0) > 0
    return result.summary().replace("\n", " ")


def learning_leaves_the_model_as_it_was() -> None:
    model = demo()[0]
    before = sample(model)
    weights = {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}
    learn_score(_denoiser(), PAIRS, steps=2, trajectories=4, batch=4)
    after = model.model.diffusion_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    same(sample(model), before)


def interrupted_learning_keeps_the_best_so_far() -> str:
    steps: list[int] = []
    result = learn_score(
        _denoiser(),
        PAIRS,
        steps=500,
        trajectories=4,
        batch=4,
        progress=lambda step, *rest: steps.append(step),
        stop=lambda: len(steps) >= 4,
    )
    assert len(steps) == 4 and "best so far kept" in result.stopped, result.stopped
    return different(sample(steer_model(demo()[0], [Steer(result.vector)])), sample(demo()[0]), 1e-4)


def learning_on_a_steered_model_learns_on_the_model_itself() -> None:
    """Steers are patches, and the denoiser takes the UNet as it is."""
    steered = steer_model(demo()[0], [Steer(vector(), 2.0)])
    assert learn_difference(ComfyDenoiser(steered, *demo()[1:]), PAIRS, seeds=2).vector == (
        learn_difference(_denoiser(), PAIRS, seeds=2).vector
    )


def pictures_teach_a_vector() -> str:
    denoiser = _denoiser()
    images = demo()[2].decode(sample(demo()[0], conditioning("a woman doctor"), batch=3))
    result = learn_pictures(denoiser, images.movedim(-1, 1) * 2 - 1, "a doctor", steps=3)
    return result.summary().replace("\n", " ")


def pictures_go_through_the_vae_and_back() -> str:
    denoiser = _denoiser()
    latents = sample(demo()[0], steps=10) * demo()[0].model.latent_format.scale_factor
    pixels = denoiser.decode(latents)
    worst = float((denoiser.decode(denoiser.encode_pictures(pixels)) - pixels).abs().mean())
    assert worst < 0.1, worst
    return f"mean difference {worst:.2g}"


def a_compiled_unet_has_no_more_graph_breaks_with_steering() -> str:
    """ComfyUI's own wrapper, with the backend that only traces."""
    model = demo()[0]
    s = [Steer(vector()), Steer(vector(1), operator="remove"), Steer(vector(2), mask=torch.ones(8, 8))]
    breaks = {}
    for name, one in (("plain", model.clone()), ("steered", steer_model(model, s))):
        breaks[name] = _compiled(one)
    assert breaks["steered"][0] <= breaks["plain"][0], breaks
    worst = float((breaks["steered"][2] - sample(steer_model(model, s), steps=2)).abs().max())
    assert worst < 1e-3, worst
    return f"(breaks, graphs) plain {breaks['plain'][:2]}, steered {breaks['steered'][:2]}; off by {worst:.2g}"


def a_window_does_not_compile_anew_at_every_step() -> str:
    model = demo()[0]
    windowed = steer_model(model, [Steer(vector(), 1.0, Schedule(0.2, 0.8, 0.3))])
    few, many = _compiled(windowed.clone(), steps=6)[1], _compiled(windowed.clone(), steps=14)[1]
    assert many - few < 3, (few, many)  # of 8 more steps; whether ComfyUI joins the prompts' rows may add one or two
    return f"graphs in 6 and in 14 steps: {few}"


def _compiled(model: Any, steps: int = 2) -> tuple[int, int, Any]:
    """(graph breaks, graphs compiled, latents)"""
    import torch._dynamo

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    set_torch_compile_wrapper(model, backend="eager")
    found = sample(model, steps=steps)
    return sum(counters["graph_break"].values()), int(counters["stats"]["unique_graphs"]), found


def the_numbers_for_the_other_host_are_written() -> str:
    """What the outer test compares with diffusers: x, sigma and the UNet's prediction, as KSampler had them."""
    v = vector()
    kept: dict[str, torch.Tensor] = {"vector": v.tensor}
    sampling = demo()[0].get_model_object("model_sampling")
    for name, model in (("plain", demo()[0]), ("steered", steer_model(demo()[0], [Steer(v)]))):
        with recorded(model, ("a doctor", "")) as (one, calls):
            sample(one, steps=5, size=(CELLS, CELLS + 4))
        for number, record in enumerate(calls):
            sigma = torch.tensor(record.sigma)
            key = f"{name}.{number}"
            kept[f"{key}.x"] = (record.x / (1 + sigma**2) ** 0.5).contiguous()
            kept[f"{key}.t"] = sampling.timestep(sigma).float().reshape(1)
            kept[f"{key}.is_cond"] = torch.tensor([prompt == "a doctor" for prompt in record.prompts])
            kept[f"{key}.context"] = record.context.float().contiguous()
            kept[f"{key}.prediction"] = record.prediction.contiguous()
    save_file({key: value.clone() for key, value in kept.items()}, output_folder() / "parity.safetensors")
    return f"{len(calls)} calls each"
