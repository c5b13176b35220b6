"""A run of the web UI: what is hooked when, undone always, and how errors end it. A few lines play the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from concept_steer.errors import ConceptSteerError, FamilyMismatch, LibraryError
from concept_steer.hosts.webui_hook import ForgeHook, TorchHook
from concept_steer.hosts.webui_job import BYPASSED, Job, begin
from concept_steer.hosts.webui_rows import Fair, Row
from concept_steer.hosts.webui_schema import Settings
from concept_steer.steering import Steer
from concept_steer.vector import ConceptVector

CHANNELS, WIDTH = 8, 6
FAMILY = f"custom:{WIDTH}x{CHANNELS}"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn2 = nn.Module()
        self.attn2.to_k = nn.Linear(WIDTH, 4)


class Unet(nn.Module):
    """The layout that counts: the mid block is a Sequential whose last layer's output is h; h comes out as it is."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.model_channels, self.channel_mult = channels, (1,)
        self.input_blocks = nn.ModuleList([Attention()])
        self.output_blocks = nn.ModuleList()
        self.middle_block = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x, timesteps, context):
        return self.middle_block(x)


class Host:
    """p and the sampling loop of AUTOMATIC1111, as far as a job meets them."""

    def __init__(self, unet=None, batch=2, steps=3, **about):
        self.unet, self.steps = unet or Unet(), steps
        self.seen, self.comments = [], []
        self.batch_size, self.iteration, self.is_hr_pass = batch, 0, False
        self.extra_generation_params = {}
        self.rows = 2 * batch
        self.calls = about.get("calls") or [2 * batch]
        self.inside = about.get("inside", lambda step: None)
        self.after_call = about.get("after_call", lambda step: None)

    def comment(self, text):
        self.comments.append(text)

    def sample(self):
        total = self.rows
        for step in range(self.steps):
            self.inside(step)
            context = torch.cat([torch.ones(self.batch_size, 3, WIDTH), torch.zeros(self.batch_size, 3, WIDTH)])
            x = torch.zeros(total, CHANNELS, 2, 2)
            denoiser = SimpleNamespace(p=self, sampler=None)
            params = SimpleNamespace(
                x=x, text_cond=context[: self.batch_size], text_uncond=context[self.batch_size :], denoiser=denoiser
            )
            job = Job.of(self)
            if job is not None:
                job.careful(lambda job=job, params=params: job.before_evaluation(params))
            rows, parts = 0, []
            for size in self.calls:
                t = torch.full((size,), 900.0 - 300 * step)
                parts.append(self.unet(x[rows : rows + size], t, context=context[rows : rows + size]))
                rows += size
            self.seen.append(torch.cat(parts))
            self.after_call(step)
        return self.seen[-1]

    @property
    def hooks(self):
        return len(self.unet._forward_pre_hooks) + len(self.unet.middle_block[-1]._forward_hooks)


def vector(value=1.0, family=FAMILY):
    return ConceptVector(torch.full((CHANNELS,), value), family, f"v{value}")


def load(name):
    if name == "other":
        return ConceptVector(torch.ones(1280), "sd1", "other")
    if not name.startswith("v"):
        raise LibraryError(f"There is no concept vector {name!r}.")
    return vector(float(name[1:]))


def start(host, *rows, hires=1.0, **more):
    return begin(host, Settings(True, rows, hires, more.pop("fair", None)), TorchHook(lambda: host.unet), load, **more)


def values(tensor):
    """The one value of each row."""
    assert (tensor == tensor[:, :1, :1, :1]).all()
    return tensor[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("calls", [[4], [2, 2], [1, 1, 1, 1]])
def test_only_the_prompts_rows_are_steered_however_the_batch_is_cut(calls):
    host = Host(calls=calls)
    start(host, Row("v2", 0.5))
    assert values(host.sample()) == [1, 1, 0, 0]


@pytest.mark.parametrize(("side", "wanted"), [("cond", [1, 1, 0, 0]), ("uncond", [0, 0, 1, 1]), ("both", [1] * 4)])
def test_a_row_acts_on_its_side(side, wanted):
    host = Host()
    start(host, Row("v1", rows=side))
    assert values(host.sample()) == wanted


def test_rows_and_tags_add_up():
    host = Host()
    job = start(host, Row("v1"))
    job.tags = job.use([Row("v4", 0.5)])
    assert values(host.sample()) == [3, 3, 0, 0]


def test_a_window_is_that_of_the_models_own_timestep():
    host = Host()  # timesteps 900, 600, 300
    start(host, Row("v1", start=0.2, end=0.5))
    host.sample()
    assert [values(seen)[0] for seen in host.seen] == [0, 1, 0]


def test_hooks_are_there_only_while_the_run_samples():
    host = Host()
    host.inside = lambda step: found.append(host.hooks)
    found = []
    start(host, Row("v1"))
    assert host.hooks == 0
    host.sample()
    assert found == [0, 2, 2] and host.hooks == 0


def test_after_an_exception_in_the_unet_the_next_picture_is_not_steered():
    host = Host()

    def fail(step):
        if step == 1:
            raise RuntimeError("out of memory")

    host.after_call = fail
    start(host, Row("v1"))
    with pytest.raises(RuntimeError, match="out of memory"):
        host.sample()
    assert host.hooks == 0
    Job.drop(host)
    host.after_call = lambda step: None
    assert values(host.sample()) == [0] * 4


def test_nothing_of_p_is_left_changed_when_a_job_is_dropped():
    host = Host()
    before = dict(host.__dict__)
    start(host, Row("v1"))
    Job.drop(host)
    assert host.__dict__ == before


def test_a_copy_of_p_for_another_run_is_not_steered_by_the_first_ones_job():
    import copy

    host = Host()
    start(host, Row("v1"))
    other = copy.copy(host)
    assert Job.of(other) is None
    Job.drop(other)
    assert values(other.sample()) == [0] * 4
    assert Job.of(host) is not None and values(host.sample()) == [1, 1, 0, 0]


def test_a_second_run_on_the_same_p_is_wrapped_once():
    host = Host()
    start(host, Row("v1"))
    start(host, Row("v1"))
    assert values(host.sample()) == [1, 1, 0, 0]
    Job.drop(host)
    assert "sample" not in host.__dict__


def test_another_extensions_own_sample_comes_back():
    host = Host()
    host.sample = lambda: "theirs"
    theirs = host.sample
    start(host, Row("v1"))
    assert host.sample() == "theirs"
    Job.drop(host)
    assert host.sample is theirs


def test_an_unknown_vector_ends_the_run_before_it_samples():
    host = Host()
    start(host, Row("nobody"))
    with pytest.raises(LibraryError, match="nobody"):
        host.sample()
    assert host.seen == []


def test_an_unknown_name_in_the_hires_prompt_ends_the_run_in_the_unet():
    host = Host()
    job = start(host, Row("v1"))

    def hires(step):
        if step == 1:
            job.careful(lambda: setattr(job, "tags", job.use([Row("nobody")])))

    host.inside = hires
    with pytest.raises(LibraryError, match="nobody"):
        host.sample()
    assert len(host.seen) == 1 and host.hooks == 0


def test_a_vector_of_another_family_ends_the_run_and_names_both():
    host = Host()
    start(host, Row("other"))
    with pytest.raises(FamilyMismatch, match=r"Stable Diffusion 1\.x.*unlisted model"):
        host.sample()


def test_a_batch_that_is_not_understood_ends_the_run():
    host = Host()
    host.rows = 5  # another extension added one
    start(host, Row("v1"))
    with pytest.raises(ConceptSteerError, match="5 rows for 2 pictures"):
        host.sample()
    assert host.seen == [] and host.hooks == 0


def test_the_accordions_strengths_have_a_factor_in_the_hires_pass_and_tags_have_none():
    host = Host()
    job = start(host, Row("v1"), hires=0.5)
    job.tags = job.use([Row("v4")])
    host.inside = lambda step: setattr(host, "is_hr_pass", step > 0)
    host.sample()
    assert [values(seen)[0] for seen in host.seen] == [5, 4.5, 4.5]


def test_a_factor_of_zero_leaves_the_hires_pass_alone():
    host = Host()
    host.inside = lambda step: (setattr(host, "is_hr_pass", step > 0), found.append(host.hooks))
    found = []
    start(host, Row("v1"), hires=0.0)
    host.sample()
    assert [values(seen)[0] for seen in host.seen] == [1, 0, 0]


def test_a_model_that_is_exchanged_in_the_middle_is_steered_and_the_former_let_go():
    host = Host()
    first, second = host.unet, Unet()

    def swap(step):
        host.unet = second if step else first

    host.inside = swap
    start(host, Row("v1"))
    host.sample()
    assert [values(seen)[0] for seen in host.seen] == [1, 1, 1]
    for unet in (first, second):
        assert not unet._forward_pre_hooks and not unet.middle_block[-1]._forward_hooks


def test_a_replaced_unet_that_bypasses_the_mid_block_is_told():
    host = Host()
    host.unet.forward = lambda x, timesteps, context: x
    start(host, Row("v1"))
    host.sample()
    assert host.comments == [BYPASSED]
    assert host.extra_generation_params["Concept Steer"] is None


def test_every_picture_of_a_balanced_run_has_its_own_steers():
    host = Host(batch=2)
    steers = [[Steer(vector(float(i)))] if i else [] for i in range(4)]
    job = start(host, Row("v1"), fair=Fair("gender"), balance=lambda job: steers)
    assert values(host.sample()) == [1, 2, 0, 0]
    host.iteration = 1
    assert values(host.sample()) == [3, 4, 0, 0]
    assert job.pictures is steers


def test_a_note_goes_into_a_dict_of_its_own():
    host = Host()
    shared = host.extra_generation_params = {"Lora": "x"}
    start(host, Row("v1")).note("concept:v1:1")
    assert shared == {"Lora": "x"}
    assert host.extra_generation_params == {"Lora": "x", "Concept Steer": "concept:v1:1"}


# --- Forge


class Patcher:
    """Forge's model patcher: clones share the model and copy the list of patches."""

    def __init__(self, model, patches=()):
        self.model, self.patches = model, list(patches)

    def clone(self):
        return Patcher(self.model, self.patches)

    def set_model_output_block_patch(self, patch):
        self.patches.append(patch)


class Sampling:
    sigma_max = torch.tensor(14.6)

    def timestep(self, sigma):
        return sigma / self.sigma_max * 999


def forge():
    model = SimpleNamespace(diffusion_model=Unet(), predictor=Sampling())
    objects = SimpleNamespace(unet=Patcher(model))
    inner = SimpleNamespace(inner_model=SimpleNamespace(forge_objects=objects))
    return objects, SimpleNamespace(denoiser=SimpleNamespace(inner_model=inner), x=torch.zeros(2, 4, 2, 2))


def ask(objects, chunks=(1, 0), block=("output", 0)):
    h = torch.zeros(2 * len(chunks), CHANNELS, 2, 2)
    options = {"block": block, "cond_or_uncond": list(chunks), "sigmas": torch.tensor([7.0, 7.0])}
    for patch in objects.unet.patches:
        h, _ = patch(h, None, options)
    return values(h)


def test_forge_is_patched_once_and_steers_the_prompts_rows_only():
    objects, params = forge()
    former = objects.unet
    host = Host()
    host.sd_model = SimpleNamespace(forge_objects=objects)
    found = []

    def sample():
        job = Job.of(host)
        for _ in range(3):
            job.careful(lambda: job.before_evaluation(params))
            found.append((ask(objects), ask(objects, (1, 0, 0)), ask(objects, block=("output", 1))))

    host.sample = sample
    begin(host, Settings(True, (Row("v1"),)), ForgeHook(), load)
    host.sample()
    assert found == [([0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0])] * 3
    assert objects.unet is former and former.patches == []
