from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from tiny_diffusers import LAYOUTS, text, tiny_sd, tiny_sdxl, tiny_unet

from concept_steer.errors import ConceptSteerError, FamilyMismatch
from concept_steer.hosts.diffusers import steer
from concept_steer.schedule import Schedule
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

diffusers = pytest.importorskip("diffusers")
FAMILY = "custom:24x32"


def vector(seed=0, shape=(32,), scale=3.0, family=FAMILY) -> ConceptVector:
    return ConceptVector(scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), family)


def latents(rows, size=8, seed=5):
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed))


def added(rows, layout):
    if layout != "sdxl":
        return None
    return {"text_embeds": text(rows, layout).pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * rows)}


def forward_by_hand(unet, x, t, cond, change, conditions=None):
    """The forward pass written out, with h <- change(h) behind the mid block. No hook, none of the package's code."""
    emb = unet.time_embedding(unet.time_proj(torch.tensor([t]).expand(len(x))).to(x.dtype))
    if conditions is not None:
        ids = unet.add_time_proj(conditions["time_ids"].flatten()).reshape(len(x), -1)
        emb = emb + unet.add_embedding(torch.cat([conditions["text_embeds"], ids], dim=-1))

    def call(block, *args, **kw):
        if getattr(block, "has_cross_attention", False):
            kw["encoder_hidden_states"] = cond
        return block(*args, **kw)

    h = unet.conv_in(x)
    skips = [h]
    for block in unet.down_blocks:
        h, outputs = call(block, hidden_states=h, temb=emb)
        skips.extend(outputs)
    h = change(call(unet.mid_block, h, emb))
    for block in unet.up_blocks:
        mine = [skips.pop() for _ in block.resnets]
        h = call(block, hidden_states=h, temb=emb, res_hidden_states_tuple=tuple(reversed(mine)))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def picture(pipe, prompt="a cat", **kw):
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", **kw}
    count = 1 if isinstance(prompt, str) else len(prompt)
    return torch.as_tensor(
        pipe(prompt, generator=torch.Generator().manual_seed(3), latents=latents(count), **options).images
    )


def calls(pipe, **kw):
    """(batch, prediction) of every UNet call of one picture."""
    seen = []
    hook = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    try:
        picture(pipe, **kw)
    finally:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32,), (32, 2, 2)])
@torch.no_grad()
def test_steering_equals_the_formula_written_by_hand(layout, shape):
    unet, c, strength = tiny_unet(layout), vector(1, shape), 0.8
    x, cond, conditions = latents(4), text(4, layout).embeds, added(4, layout)

    def change(h):
        h = h.clone()
        h[2:] = h[2:] + strength * (c.tensor if c.tensor.ndim == 3 else c.tensor[:, None, None])
        return h

    expected = forward_by_hand(unet, x, 500, cond, change, conditions)
    plain = unet(x, 500, encoder_hidden_states=cond, added_cond_kwargs=conditions).sample
    with steer(unet, Steer(c, strength), layout=("uncond", "cond")):
        out = unet(x, 500, encoder_hidden_states=cond, added_cond_kwargs=conditions).sample
    assert (out - expected).abs().max().item() == 0.0
    assert torch.equal(out[:2], plain[:2])
    assert (out[2:] - plain[2:]).abs().max().item() > 1e-3
    assert torch.equal(unet(x, 500, encoder_hidden_states=cond, added_cond_kwargs=conditions).sample, plain)


@torch.no_grad()
def test_steering_equals_the_formula_on_a_unet_of_sd15s_size():
    from diffusers import UNet2DConditionModel

    unet = sd15_sized_unet(UNet2DConditionModel)
    c = vector(2, (1280, 2, 1), scale=1.0, family="sd1")
    x = latents(1, 16)[..., :8].repeat(2, 1, 1, 1)
    cond = torch.randn(1, 7, 768, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)

    def change(h):
        assert h.shape == (2, 1280, 2, 1)
        return torch.stack([h[0], h[1] + 1.5 * c.tensor])

    expected = forward_by_hand(unet, x, 500, cond, change)
    with steer(unet, [Steer(c, 1.5)], layout=("uncond", "cond")):
        out = unet(x, 500, encoder_hidden_states=cond).sample
    assert torch.isfinite(out).all()
    assert (out - expected).abs().max().item() == 0.0
    assert (out[1] - out[0]).abs().max().item() > 1e-4  # the two rows differ by the vector alone


def sd15_sized_unet(model):
    """SD1.5's layout (860 M parameters); all weights look into one block of noise, which spares 3.3 GB and the time."""
    with torch.device("meta"):
        unet = model(cross_attention_dim=768, sample_size=64).eval()
    assert sum(p.numel() for p in unet.parameters()) > 850_000_000
    noise = 0.02 * torch.randn(max(p.numel() for p in unet.parameters()), generator=torch.Generator().manual_seed(0))
    for module in unet.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            data = noise[: weight.numel()].view(weight.shape) if weight.ndim > 1 else torch.zeros(weight.shape)
            if weight.ndim == 1 and name == "weight":  # of a normalisation
                data += 1
            setattr(module, name, torch.nn.Parameter(data, requires_grad=False))
    return unet


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog", "a pig"]])
def test_a_pipelines_unconditional_rows_keep_every_bit_in_the_first_step(sd, guidance, prompt):
    plain = calls(sd, prompt=prompt, guidance_scale=guidance)
    with steer(sd, Steer(vector())):
        steered = calls(sd, prompt=prompt, guidance_scale=guidance)
    pictures = 1 if isinstance(prompt, str) else 3
    assert len(plain[0]) == pictures * (2 if guidance > 1 else 1)
    free = len(plain[0]) - pictures
    assert torch.equal(plain[0][:free], steered[0][:free])
    for row in range(free, len(plain[0])):
        assert not torch.equal(plain[0][row], steered[0][row])


def test_rows_of_a_bare_unet_follow_the_given_layout():
    unet, x, cond = tiny_unet("sd"), latents(6), text(6).embeds
    with torch.no_grad():
        plain = unet(x, 5, encoder_hidden_states=cond).sample
        for layout in (("cond",), ("uncond", "cond"), ("cond", "uncond"), ("cond", "uncond", "uncond")):
            with steer(unet, Steer(vector()), layout=layout):
                out = unet(x, 5, encoder_hidden_states=cond).sample
            each = 6 // len(layout)
            for row in range(6):
                assert torch.equal(out[row], plain[row]) == (layout[row // each] == "uncond")
        with steer(unet, Steer(vector())):  # a bare UNet's rows are the prompt's
            assert not torch.equal(unet(x, 5, encoder_hidden_states=cond).sample, plain)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "HeunDiscreteScheduler",
    ],
)
def test_every_scheduler_is_steered_and_the_next_picture_is_not(sd, name):
    before = sd.scheduler
    sd.scheduler = getattr(diffusers, name).from_config(before.config)
    try:
        plain = picture(sd)
        with steer(sd, Steer(vector())):
            steered = picture(sd)
        with steer(sd, Steer(vector(), schedule=Schedule(0.0, 1e-9))):
            first_step_only = picture(sd)
        assert not torch.equal(plain, steered)
        assert not torch.equal(first_step_only, steered)
        assert torch.equal(picture(sd), plain)
    finally:
        sd.scheduler = before


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_strength_zero_leaves_the_picture_bit_for_bit(kind, request):
    pipe = request.getfixturevalue(kind)
    plain = picture(pipe)
    with steer(pipe, Steer(vector(), 0.0)):
        assert torch.equal(picture(pipe), plain)
    with steer(pipe, []):
        assert torch.equal(picture(pipe), plain)


def test_sdxl_pipelines_are_steered_on_the_text_rows(sdxl):
    plain = calls(sdxl)
    with steer(sdxl, Steer(vector())):
        steered = calls(sdxl)
    assert torch.equal(plain[0][:1], steered[0][:1])
    assert not torch.equal(plain[0][1:], steered[0][1:])


def hooks_of(unet):
    return [len(d) for m in (unet, unet.mid_block) for d in (m._forward_hooks, m._forward_pre_hooks)]


def test_nothing_is_left_after_the_block_or_an_exception(sd):
    plain = picture(sd)
    for way in ("inside the block", "inside the UNet"):
        with pytest.raises(RuntimeError, match="stop"), steer(sd, Steer(vector())):
            picture(sd)
            if way == "inside the block":
                raise RuntimeError("stop")
            failing = sd.unet.up_blocks[0].register_forward_pre_hook(lambda module, args: fail())
            try:
                picture(sd)
            finally:
                failing.remove()
        assert hooks_of(sd.unet) == [0, 0, 0, 0]
        assert torch.equal(picture(sd), plain)


def fail():
    raise RuntimeError("stop")


def test_a_picture_after_an_interrupted_one_is_steered_as_before(sd):
    with steer(sd, Steer(vector())):
        steered = picture(sd)
        failing = sd.unet.down_blocks[0].register_forward_pre_hook(lambda module, args: fail())
        with pytest.raises(RuntimeError, match="stop"):
            picture(sd)
        failing.remove()
        assert torch.equal(picture(sd), steered)


def test_removing_twice_does_no_harm(sd):
    plain = picture(sd)
    handle = steer(sd, Steer(vector()))
    assert not torch.equal(picture(sd), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(picture(sd), plain)


def test_two_handles_stack_and_commute(sd):
    a, b = Steer(vector(1)), Steer(vector(2), 0.5)
    plain = picture(sd, output_type="latent")
    with steer(sd, a), steer(sd, b):
        first = picture(sd, output_type="latent")
    with steer(sd, b), steer(sd, a):
        second = picture(sd, output_type="latent")
    with steer(sd, [a, b]):
        together = picture(sd, output_type="latent")
    with steer(sd, [b, a]):
        assert torch.equal(picture(sd, output_type="latent"), together)
    with steer(sd, a):
        only = picture(sd, output_type="latent")
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first, together, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(first, only, atol=1e-2)
    assert not torch.allclose(only, plain, atol=1e-2)


def test_removing_one_of_two_handles_keeps_the_other(sd):
    with steer(sd, Steer(vector(1))):
        alone = picture(sd)
        with steer(sd, Steer(vector(2))):
            assert not torch.equal(picture(sd), alone)
        assert torch.equal(picture(sd), alone)


def test_the_wrong_family_is_refused_at_once_naming_both(sd):
    wrong = ConceptVector(torch.ones(1280), "sdxl", title="woman")
    with pytest.raises(FamilyMismatch, match=r"woman.*SDXL.*custom:24x32"):
        steer(sd, Steer(wrong))
    assert hooks_of(sd.unet) == [0, 0, 0, 0]


def test_a_batch_that_does_not_fit_the_layout_is_an_error():
    unet = tiny_unet("sd")
    with (
        pytest.raises(ConceptSteerError, match="3 rows"),
        steer(unet, Steer(vector()), layout=("uncond", "cond")),
        torch.no_grad(),
    ):
        unet(latents(3), 5, encoder_hidden_states=text(3).embeds)
    for bad in ((), ("positive",)):
        with pytest.raises(ConceptSteerError, match="A layout lists"):
            steer(unet, Steer(vector()), layout=bad)


def test_a_unet_without_mid_block_or_an_unknown_pipeline_is_refused():
    unet = tiny_unet("sd")

    class Other:
        pass

    class ImageGuided:
        do_classifier_free_guidance = True
        image_guidance_scale = 1.5
        known: ClassVar[list[int]] = []

    for kind in (Other, ImageGuided):
        pipe = kind()
        pipe.unet = unet
        with pytest.raises(ConceptSteerError, match=f"{kind.__name__}'s batch is not known"):
            steer(pipe, Steer(vector()))
    unet.mid_block = None
    with pytest.raises(ConceptSteerError, match="no mid block"):
        steer(unet, Steer(vector()))


@torch.no_grad()
def test_the_mid_block_outside_a_forward_pass_is_an_error_not_a_guess():
    unet = tiny_unet("mid only")
    with steer(unet, Steer(vector())):
        unet(latents(1), 5, encoder_hidden_states=text(1).embeds)
        with pytest.raises(ConceptSteerError, match="outside the UNet's own forward"):
            unet.mid_block(torch.zeros(1, 32, 2, 2), torch.zeros(1, 64), encoder_hidden_states=text(1).embeds)


@torch.no_grad()
def test_keyword_calls_and_per_row_timesteps_are_understood():
    unet, c = tiny_unet("sd"), Steer(vector(), schedule=Schedule(0.0, 0.5))
    x, cond, t = latents(2), text(2).embeds, torch.tensor([900, 100])
    plain = unet(x, t, encoder_hidden_states=cond).sample
    with steer(unet, c):
        out = unet(sample=x, timestep=t, encoder_hidden_states=cond).sample
    assert not torch.equal(out[0], plain[0])
    assert torch.equal(out[1], plain[1])


@torch.no_grad()
def test_a_residual_of_a_controlnet_is_added_after_the_steer():
    unet, c = tiny_unet("sd"), vector()
    x, cond = latents(1), text(1).embeds
    residual = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(9))
    down = [
        torch.zeros(s)
        for s in ((1, 16, 8, 8), (1, 16, 8, 8), (1, 16, 4, 4), (1, 32, 4, 4), (1, 32, 2, 2), (1, 32, 2, 2))
    ]
    expected = forward_by_hand(unet, x, 500, cond, lambda h: h + c.tensor.view(1, -1, 1, 1) + residual)
    with steer(unet, Steer(c)):
        out = unet(
            x,
            500,
            encoder_hidden_states=cond,
            down_block_additional_residuals=down,
            mid_block_additional_residual=residual,
        ).sample
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
