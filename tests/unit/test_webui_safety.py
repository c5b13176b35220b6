"""The safety switch in the web UIs: guidance by a further prediction, and every way in which it fails closed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_webui_job import CHANNELS, FAMILY, Host, Unet, load, values

from concept_steer.errors import FamilyMismatch, SafetyError, SettingError
from concept_steer.guidance.safe_latent_diffusion import SafeLatentDiffusion, SafeRun
from concept_steer.hosts.webui_guidance import Guidance, Steps
from concept_steer.hosts.webui_hook import TorchHook
from concept_steer.hosts.webui_job import Job, begin
from concept_steer.hosts.webui_rows import Fair, Row
from concept_steer.hosts.webui_safety import Guard, plan_for
from concept_steer.hosts.webui_schema import Settings
from concept_steer.safety import Presence, SafeConcept, SafetySet, SafetySettings
from concept_steer.safety.safety_set import Strength
from concept_steer.vector import ConceptVector

SIZE, GUIDANCE = (4, 2, 2), 5.0
TEXTS = {name: torch.full((1, 3, 2), value) for name, value in (("a", 0.5), ("b", -0.8), ("no", 0.1), ("bad", 0.9))}


def eps(x, text):
    """A model: noise that depends on the picture and, smoothly, on the text."""
    return torch.sin(2 * x + 3 * text.mean((1, 2)).view(-1, 1, 1, 1))


class Denoises:
    """k-diffusion's wrapper of a model."""

    def __init__(self):
        self.calls = []

    def sigma_to_t(self, sigma):
        return sigma * 100

    def __call__(self, x, sigma, cond):
        self.calls.append(x.shape[0])
        return x - sigma.view(-1, 1, 1, 1) * eps(x, cond["c_crossattn"][0])


class Predicts:
    """DDIM's."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, timesteps, cond):
        self.calls.append(x.shape[0])
        return eps(x, cond["c_crossattn"][0])


def evaluate(model, guidance, step, sigma, x, prompts=(("a",), ("b",)), weights=None, skip=False):
    """One evaluation as AUTOMATIC1111 makes it; the noise that guidance ends in, (B, ...), and the predicted rows."""
    rows = [i for i, many in enumerate(prompts) for _ in many]
    weights = weights or [[1.0] * len(many) for many in prompts]
    parts = [[SimpleNamespace(weight=w) for w in many] for many in weights]
    sampler = SimpleNamespace(sampler_extra_args={"cond": SimpleNamespace(batch=parts)})
    denoiser = guidance.denoiser = getattr(guidance, "denoiser", None) or SimpleNamespace(sampler=sampler)
    denoiser.step = step
    asked = SimpleNamespace(
        x=torch.cat([x[rows], x]),
        sigma=torch.full((len(rows) + len(x),), sigma),
        image_cond=torch.zeros(len(rows) + len(x), 1, 1, 1),
        text_cond=torch.cat([TEXTS[name] for many in prompts for name in many]),
        text_uncond=TEXTS["no"].repeat(len(x), 1, 1),
        denoiser=denoiser,
    )
    count = len(rows)
    if skip:
        out = model(asked.x[:count], asked.sigma[:count], {"c_crossattn": [asked.text_cond]})
        out = torch.cat([out, out[[rows.index(i) for i in range(len(x))]]])
    else:
        out = model(asked.x, asked.sigma, {"c_crossattn": [torch.cat([asked.text_cond, asked.text_uncond])]})
    guidance.after(asked, SimpleNamespace(x=out, inner_model=model))
    uncond, scale = out[count:], 1.0 if skip else GUIDANCE
    joined = uncond.clone()
    for row, (picture, weight) in enumerate(zip(rows, [w for many in weights for w in many], strict=True)):
        joined[picture] += (out[row] - uncond[picture]) * weight * scale
    return ((x - joined) / sigma if hasattr(model, "sigma_to_t") else joined), out


def begun(preset="max", opened=None, **changes):
    settings = SafeLatentDiffusion.preset(preset, text="bad", **changes)
    return Guidance(settings, lambda text, asked: TEXTS[text], lambda: "crossattn", opened)


def pictures(seed=0):
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(seed))


SIGMAS = [9.0, 6.0, 3.0, 1.0, 0.5]


@pytest.mark.parametrize("kind", [Denoises, Predicts])
@pytest.mark.parametrize("preset", ["max", "strong", "weak"])
def test_guidance_is_the_published_equation_step_by_step(kind, preset):
    model, guidance = kind(), begun(preset, warmup=0)
    run = SafeRun(guidance.settings, 2, len(SIGMAS), GUIDANCE)
    changed = 0.0
    for step, sigma in enumerate(SIGMAS):
        x = pictures(step)
        found, _ = evaluate(model, guidance, step, sigma, x)
        by_text = {name: eps(x, text.repeat(2, 1, 1)) for name, text in TEXTS.items()}
        prompt = torch.stack([by_text["a"][0], by_text["b"][1]])
        want = run.combine(step, 0.0, by_text["no"], prompt, by_text["bad"][None])
        torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-5)
        changed += float((want - (by_text["no"] + GUIDANCE * (prompt - by_text["no"]))).abs().max())
    assert changed > 0.1
    assert guidance.applied == len(SIGMAS)


def test_guidance_costs_one_more_row_a_picture_and_step():
    model = Denoises()
    evaluate(model, begun(), 0, 5.0, pictures())
    assert model.calls == [4, 2]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("prompts", [(("a",), ("b",)), (("a", "b"), ("b",))])
def test_guidance_behind_a_gate_acts_on_the_pictures_that_opened_it_and_costs_only_theirs(prompts, skip):
    """The others' predictions keep their bits, also of their own prompts joined by AND."""
    for acts in ([True, False], [False, True], [False, False], [True, True]):
        model, x = Denoises(), pictures()
        _, plain = evaluate(Denoises(), begun(scale=0), 0, 5.0, x, prompts, skip=skip)
        _, whole = evaluate(Denoises(), begun(), 0, 5.0, x, prompts, skip=skip)
        _, out = evaluate(model, begun(opened=lambda count, acts=acts: acts), 0, 5.0, x, prompts, skip=skip)
        rows = [i for i, many in enumerate(prompts) for _ in many]
        for row, picture in enumerate(rows):
            expected = whole if acts[picture] else plain
            torch.testing.assert_close(out[row], expected[row])
            assert torch.equal(out[row], plain[row]) != acts[picture]
        assert torch.equal(out[len(rows) :], plain[len(rows) :])
        assert sum(model.calls[1:]) == sum(acts) * (2 if skip else 1)


def test_during_the_warm_up_predictions_keep_their_bits_and_the_momentum_runs_along():
    model, guidance = Denoises(), begun("strong", warmup=25)  # until half of sampling: timestep 499.5, sigma 4.995
    plain = begun("strong", scale=0)
    x = pictures()
    for step, sigma in enumerate(SIGMAS[:2]):
        (_, out), (_, same) = (evaluate(model, g, step, sigma, x) for g in (guidance, plain))
        assert torch.equal(out, same)
    late, _ = evaluate(model, guidance, 2, SIGMAS[2], x)
    fresh = begun("strong", warmup=25)
    first, _ = evaluate(model, fresh, 0, SIGMAS[2], x)
    assert float((late - first).abs().max()) > 1e-4


def test_turned_off_it_predicts_nothing_more():
    model = Denoises()
    evaluate(model, begun(scale=0), 0, 5.0, pictures())
    assert model.calls == [4]


def test_every_prompt_joined_by_and_is_guided_and_one_with_a_negative_weight_is_not():
    model, x = Denoises(), pictures()
    prompts, weights = (("a", "b"), ("b", "a")), ([0.7, 0.5], [1.0, -0.4])
    _, out = evaluate(model, begun(), 0, 5.0, x, prompts, weights)
    _, plain = evaluate(model, begun(scale=0), 0, 5.0, x, prompts, weights)
    same = [torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
    assert same == [False, False, False, True, True, True]
    alone = [evaluate(model, begun(), 0, 5.0, x, one)[1] for one in ((("a",), ("b",)), (("b",), ("a",)))]
    torch.testing.assert_close(out[[0, 2]], alone[0][:2])
    torch.testing.assert_close(out[1], alone[1][0])


def test_where_the_negative_prompt_is_skipped_it_is_predicted_for_the_guidance_alone():
    model, x = Denoises(), pictures()
    found, out = evaluate(model, begun(), 0, 5.0, x, skip=True)
    assert model.calls == [2, 2, 2]
    _, whole = evaluate(model, begun(), 0, 5.0, x)
    torch.testing.assert_close(out[:2], whole[:2])  # eps_p - gamma
    torch.testing.assert_close(found, (x - whole[:2]) / 5.0)


def test_a_new_pass_begins_without_the_momentum_of_the_last():
    model, guidance, x = Denoises(), begun(), pictures()
    first, _ = evaluate(model, guidance, 0, 5.0, x)
    second, _ = evaluate(model, guidance, 1, 2.0, x)
    again, _ = evaluate(model, guidance, 0, 5.0, x)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_corrector_stands_at_the_step_it_comes_back_to():
    steps = Steps()
    assert [steps.number(level) for level in (9.0, 6.0, 6.0, 3.0, 3.0001, 1.0)] == [0, 1, 1, 2, 2, 3]


def test_a_batch_with_a_third_kind_of_row_is_an_error():
    guidance = begun()
    asked = SimpleNamespace(
        x=torch.zeros(3, *SIZE), sigma=torch.ones(3), text_cond=TEXTS["a"], text_uncond=TEXTS["no"],
        denoiser=SimpleNamespace(sampler=None, step=0),
    )  # fmt: skip
    with pytest.raises(SafetyError, match="InstructPix2Pix"):
        guidance.after(asked, SimpleNamespace(x=torch.zeros(3, *SIZE), inner_model=Denoises()))


# --- vectors, and failing closed


def safety_set(limit=-1.0, family=FAMILY):
    """A set whose gate opens where the mean of h's first channel is above `limit`; its vector adds 2."""
    directions = torch.zeros(2, 1, CHANNELS)
    directions[:, 0, 0] = 1.0
    gate = Presence(directions, torch.full((2, 1), limit), torch.ones(2, 1), (900.0, 100.0), 0.0)
    levels = {name: Strength(strength, 0.0) for name, strength in (("gentle", 0.5), ("standard", 1.0), ("strict", 2.0))}
    vector = ConceptVector(torch.full((CHANNELS,), 2.0), family, "safe")
    return SafetySet("test", {"violence": SafeConcept("violence", "violence", vector, gate, levels)})


def safe(host, folder, *rows, level="standard", method="auto", can_guide=True, family=FAMILY, **more):
    settings = Settings(bool(rows), rows, safety=SafetySettings(level=level, method=method))
    guidance = None
    if can_guide:
        guidance = lambda chosen, opened: Guidance(chosen, lambda text, asked: None, lambda: "crossattn", opened)  # noqa: E731
    guard = Guard(
        settings.safety, lambda *model: plan_for(settings.safety, *model, [folder], guidance is not None), guidance
    )
    return begin(host, settings, TorchHook(lambda: host.unet), load, guard=guard, **more)


@pytest.fixture
def folder(tmp_path):
    safety_set().save(tmp_path / "test.safety.safetensors")
    return tmp_path


@pytest.mark.parametrize(("level", "added"), [("gentle", 1), ("standard", 2), ("strict", 4)])
def test_safety_adds_its_vectors_to_the_prompts_rows_at_every_level(folder, level, added):
    host = Host()
    safe(host, folder, level=level, method="vectors")
    assert values(host.sample()) == [added, added, 0, 0]
    assert host.hooks == 0


def test_a_gate_that_stays_shut_changes_no_bit(tmp_path):
    safety_set(limit=5.0).save(tmp_path / "test.safety.safetensors")
    host = Host()
    job = safe(host, tmp_path, method="vectors")
    assert values(host.sample()) == [0] * 4
    assert job.guard.done and "opened in 0 of 2 pictures (0 of 6" in job.guard.report()


def test_safety_and_rows_add_up_and_the_hires_factor_is_the_rows_only(folder):
    host = Host()
    host.inside = lambda step: setattr(host, "is_hr_pass", step > 0)
    job = safe(host, folder, Row("v1"), method="vectors")
    job.settings = Settings(True, (Row("v1"),), 0.0, None, job.settings.safety)
    host.sample()
    assert [values(seen)[0] for seen in host.seen] == [3, 2, 2]


def test_rows_that_are_switched_off_stay_off_beside_safety_and_in_the_hires_pass(folder):
    for settings in (Settings(False, (Row("v1"),)), Settings(False, (Row("v1"),), fair=Fair("nobody"))):
        host = Host()
        begin(host, settings, TorchHook(lambda host=host: host.unet), load, balance=lambda job: 1 / 0)
        assert values(host.sample()) == [0] * 4


def test_what_safety_did_is_told(folder):
    host = Host()
    job = safe(host, folder, method="vectors")
    host.sample()
    assert "Safety standard by learned vectors: violence." in job.guard.report()
    assert "opened in 2 of 2 pictures (6 of 6 picture-steps)" in job.guard.report()


def refused(host, match, error=SafetyError):
    with pytest.raises(error, match=match):
        host.sample()
    assert host.hooks == 0


def test_without_vectors_for_the_model_and_without_guidance_there_is_no_picture(tmp_path):
    host = Host()
    safe(host, tmp_path, can_guide=False)
    refused(host, "no safety vectors")
    assert host.seen == []
    safe(host, tmp_path, method="vectors")
    refused(host, "no safety vectors")


def test_strict_where_the_web_ui_has_no_place_for_guidance_is_refused(folder):
    host = Host()
    safe(host, folder, level="strict", can_guide=False)
    refused(host, "no place for")
    safe(host, folder, level="strict", method="vectors", can_guide=False)
    assert values(host.sample()) == [4, 4, 0, 0]


def test_a_damaged_set_is_refused(folder):
    path = folder / "test.safety.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    host = Host()
    safe(host, folder)
    refused(host, "cannot be used")


def test_a_set_of_another_width_is_refused(tmp_path):
    safety_set().save(tmp_path / "test.safety.safetensors")
    with pytest.raises(FamilyMismatch):
        plan_for(SafetySettings(), FAMILY, CHANNELS + 1, [tmp_path], True)


def test_an_unknown_category_is_refused(folder):
    settings = SafetySettings(categories=("weather",))
    with pytest.raises(SafetyError, match="weather"):
        plan_for(settings, FAMILY, CHANNELS, [folder], True)


def test_a_unet_that_goes_around_the_mid_block_gives_no_picture(folder):
    host = Host()
    host.unet.forward = lambda x, timesteps, context: x
    safe(host, folder, method="vectors")
    refused(host, "without its mid block's output being reached")


def test_a_cache_that_leaves_the_mid_block_out_now_and_then_gives_no_picture(folder):
    host = Host()
    whole = host.unet.forward
    host.inside = lambda step: setattr(host.unet, "forward", whole if step != 1 else lambda x, timesteps, context: x)
    safe(host, folder, method="vectors")
    refused(host, "without its mid block's output being reached")
    assert len(host.seen) == 2  # told at the next evaluation


def test_values_that_are_no_numbers_give_no_picture(folder):
    host = Host()
    host.unet.forward = lambda x, timesteps, context: host.unet.middle_block(x) * float("nan")
    safe(host, folder, method="vectors")
    refused(host, "no numbers")


def test_a_sampler_that_tells_of_no_evaluation_gives_no_picture_unless_it_was_interrupted(folder):
    host = Host(steps=1)
    host.sample = lambda: torch.zeros(2, 4)
    safe(host, folder, method="vectors")
    refused(host, "never told")
    safe(host, folder, stopped=lambda: True, method="vectors")
    assert host.sample().shape == (2, 4)


def test_guidance_that_the_host_does_not_ask_gives_no_picture(tmp_path):
    host = Host()  # it calls on_cfg_denoiser, but never on_cfg_denoised
    safe(host, tmp_path, method="sld")
    refused(host, "without asking Safe Latent Diffusion")


def test_a_batch_that_is_not_understood_gives_no_picture(folder):
    host = Host()
    host.rows = 5
    safe(host, folder, method="vectors")
    refused(host, "5 rows for 2 pictures", Exception)


def test_a_model_that_takes_over_has_a_plan_of_its_own_or_ends_the_run(folder):
    host = Host()
    wide = Unet(CHANNELS)
    wide.input_blocks[0].attn2.to_k = torch.nn.Linear(99, 4)  # another family
    host.inside = lambda step: setattr(host, "unet", wide) if step else None
    safe(host, folder, method="vectors")
    refused(host, "no safety vectors")


def test_an_extension_that_samples_by_itself_ends_in_an_error_and_leaves_no_hook(folder):
    host = Host()
    own = type(host).sample
    safe(host, folder)
    host.__dict__.pop("sample")
    with pytest.raises(Exception, match="another extension samples"):
        own(host)
    assert host.hooks == 0


def test_the_steering_that_runs_beside_safety_is_gone_with_the_job(folder):
    host = Host()
    before = dict(host.__dict__)
    safe(host, folder, Row("v1"))
    Job.drop(host)
    assert host.__dict__ == before


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("strict", "safety:strict"),
        ({"level": "gentle", "method": "sld"}, "safety:gentle:method=sld"),
        ({"level": "standard", "categories": ["violence", "a:b"]}, "safety:standard:categories=violence,a%3Ab"),
    ],
)
def test_safety_is_read_back_from_its_text_and_shown_in_the_controls(given, text):
    settings = Settings.from_dict({"enabled": False, "safety": given})
    assert settings.text() == text and settings.acts and not settings.steers
    assert Settings.parsed(text) == settings
    assert Settings.from_controls(list(settings.to_controls().values())) == settings
    assert Settings.from_args([settings.to_dict()]) == settings


def test_what_nobody_says_of_safety_is_as_the_page_opens():
    usual = SafetySettings(level="gentle")
    assert Settings.from_args([{"rows": []}], usual).safety == usual
    assert Settings.from_args([True], usual).safety == usual
    assert not Settings.from_args([{"safety": "off"}], usual).safety.on
    controls = list(Settings().to_controls().values())
    assert not Settings.from_args(controls, usual).safety.on


def test_detectors_are_not_asked_for_in_vain():
    with pytest.raises(SettingError, match="not looked at here"):
        Settings.from_dict({"safety": {"level": "strict", "detector": "nudenet"}})
