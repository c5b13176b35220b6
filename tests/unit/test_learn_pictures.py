"""Vectors from pictures, on tiny real UNets; pictures are 16 x 16 pixels, latents 8 x 8."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny_diffusers import LAYOUTS, bag_of_words, schedule, tiny_denoiser, tiny_unet

from concept_steer.denoiser import Conditioning, Cost, HState
from concept_steer.errors import FamilyMismatch, LearnError
from concept_steer.hosts.diffusers import Components, DiffusersDenoiser
from concept_steer.learn import learn_pictures
from concept_steer.learn.noised import balanced_batches, build_noised, noisy_times
from concept_steer.learn.picture_sets import held_out
from concept_steer.learn.result import encode
from concept_steer.vector import ConceptVector

pytest.importorskip("diffusers")
SMALL = {"steps": 10, "batch": 8, "noises": 4}
LONG = {"steps": 60, "noises": 8, "rate": 2.0, "patience": 99}  # a small spread of h asks for a large rate


def encode_pictures(pixels: torch.Tensor) -> torch.Tensor:
    """A stand-in for a VAE: three colours and their mean, at half the size."""
    return F.avg_pool2d(torch.cat([pixels, pixels.mean(1, keepdim=True)], 1), 2)


def model(layout: str = "mid only", prediction_type: str = "epsilon", text=bag_of_words) -> DiffusersDenoiser:
    """A UNet whose prediction hangs on h: a random one makes little of it, and hardly any noise could be explained."""
    unet = tiny_unet(layout)
    with torch.no_grad():
        unet.conv_out.weight *= 3
        for block in unet.up_blocks:
            for resnet in block.resnets:
                resnet.conv1.weight[:, resnet.conv1.out_channels :] *= 0.1  # what comes through the skips
                resnet.conv_shortcut.weight[:, resnet.conv1.out_channels :] *= 0.1
    return DiffusersDenoiser(Components(unet, schedule(prediction_type), text, encode_pictures))


class Painter:
    """A Denoiser that knows its answer: the perfect one for pictures of the single colour that h names.

    h = BASIS of (BELIEF + 0.2 * mean of x): so to bring RED pictures nearer c has to name RED - BELIEF, and only that.
    """

    family, channels, latent_shape, checkpoint_hash = "custom:24x8", 8, (4, 8, 8), "0" * 64
    device, dtype = torch.device("cpu"), torch.float32
    BASIS = torch.linalg.qr(torch.randn(8, 4, generator=torch.Generator().manual_seed(3)))[0].T  # (4, 8)
    BELIEF = torch.tensor([0.1, 0.3, 0.1, 0.2])
    encode_pictures = staticmethod(encode_pictures)
    frozen = staticmethod(nullcontext)

    def __init__(self) -> None:
        self.cost, self.schedule = Cost(), schedule()

    def encode_text(self, prompts):
        return Conditioning(torch.zeros(len(prompts), 1, 24))

    def to_h(self, x, t, cond):
        h = (self.BELIEF + 0.2 * x.mean((2, 3))) @ self.BASIS
        levels = torch.cat(
            [level.view(-1, 1).expand(len(x) if level.numel() == 1 else -1, 1) for level in self.schedule.signal(t, x)],
            1,
        )
        return HState(h[:, :, None, None].expand(-1, -1, 2, 2), (x,), levels, cond)

    def from_h(self, state):
        (x,) = state.skips
        alpha, sigma = state.emb[:, :, None, None, None].unbind(1)
        colour = state.h.mean((2, 3)) @ self.BASIS.T - 0.2 * x.mean((2, 3))
        return (x - alpha * colour[:, :, None, None]) / sigma

    def predict(self, x, t, cond, steers=(), is_cond=None):
        return self.from_h(self.to_h(x, t, cond))

    def colour(self, vector: ConceptVector) -> torch.Tensor:
        """What colour (red, green, blue, mean) a vector adds."""
        return self.BASIS @ vector.tensor


def with_pooled(prompts) -> Conditioning:
    cond = bag_of_words(prompts)
    return Conditioning(cond.embeds, cond.embeds[:, 0, :12])


def pictures(count: int, seed: int = 0, colour: tuple[float, float, float] = (0, 0, 0)) -> torch.Tensor:
    """Noise around a colour."""
    noise = 0.2 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(colour).view(1, 3, 1, 1) + noise).clamp(-1, 1)


RED, BLUE = (0.7, -0.4, -0.4), (-0.4, -0.4, 0.7)
PICTURES, OTHERS = pictures(8, 1, RED), pictures(8, 2, BLUE)


@pytest.fixture(scope="module")
def denoiser():
    return model()


@pytest.fixture(scope="module")
def painter():
    return Painter()


@pytest.fixture(scope="module")
def learned(painter):
    return learn_pictures(painter, PICTURES, "a cat", **LONG, start="zero")


def mean_colour(pixels: torch.Tensor) -> torch.Tensor:
    return encode_pictures(pixels).mean((0, 2, 3))


def test_it_learns_what_the_pictures_show_and_the_model_does_not_expect(painter, learned):
    wanted = mean_colour(PICTURES) - Painter.BELIEF
    torch.testing.assert_close(painter.colour(learned.vector), wanted, rtol=0, atol=0.05)
    assert learned.held_out[0] == pytest.approx(1.0, abs=1e-4)  # no vector at all
    assert learned.explained == pytest.approx(1 - min(learned.held_out), abs=1e-4)
    assert learned.explained > 0.8 and learned.separation > 0.8
    assert len(learned.losses) == 60 and len(learned.held_out) == 11
    assert learned.stopped == "finished after 60 steps"


def test_what_both_batches_share_is_not_learned(painter, learned):
    """Both are red pictures, which the model does not expect; the concept is a little blue."""
    bluish = pictures(8, 5, (RED[0], RED[1], RED[2] + 0.3))
    result = learn_pictures(painter, bluish, "a cat", without=PICTURES, **LONG)
    wanted = mean_colour(bluish) - mean_colour(PICTURES)
    torch.testing.assert_close(painter.colour(result.vector), wanted, rtol=0, atol=0.05)
    assert result.explained > 0 and result.separation > 0.6
    alone = learn_pictures(painter, bluish, "a cat", **LONG)
    assert (painter.colour(alone.vector) - wanted).norm() > 0.5  # without the contrast red is learned too


def test_the_batches_swapped_give_the_opposite(painter):
    there, back = (
        learn_pictures(painter, a, "a cat", without=b, **LONG).vector
        for a, b in ((PICTURES, OTHERS), (OTHERS, PICTURES))
    )
    torch.testing.assert_close(painter.colour(there), -painter.colour(back), rtol=0, atol=0.05)


def test_pictures_that_show_nothing_of_their_own_explain_nothing(painter):
    same = learn_pictures(painter, PICTURES, "a cat", without=pictures(8, 3, RED), **LONG)
    assert abs(same.explained) < 0.1
    assert painter.colour(same.vector).norm() < 0.1


def test_the_difference_of_h_is_where_learning_begins(painter):
    """Here h shows a fifth of the colour, so the largest of the scales tried (2) fits best."""
    seen = []
    learn_pictures(
        painter, PICTURES, "a cat", without=OTHERS, **{**SMALL, "noises": 8}, progress=lambda *a: seen.append(a[3])
    )
    shown = painter.colour(seen[0])
    wanted = mean_colour(PICTURES) - mean_colour(OTHERS)
    assert F.cosine_similarity(shown, wanted, dim=0) > 0.95
    assert 0.1 < shown.norm() / wanted.norm() < 0.4


def test_metadata_and_summary_say_how_it_was_made(painter, learned):
    info = learned.vector.info
    assert (info["method"], info["prompt"], info["pictures"]) == ("pictures", "a cat", "8")
    assert (info["steps"], info["seed"], info["checkpoint_hash"]) == ("60", "0", "0" * 64)
    assert info["picture_set_hash"] == hashlib.sha256(PICTURES.numpy().tobytes()).hexdigest()
    assert float(info["calibration"]) > 0
    assert (learned.vector.family, learned.vector.title) == ("custom:24x8", "a cat")
    assert "unseen pictures" in learned.summary() and learned.report()["method"] == "pictures"
    contrast = learn_pictures(painter, PICTURES, "a cat", without=OTHERS[:5], title="my cat", **SMALL).vector
    assert (contrast.title, contrast.info["pictures_without"]) == ("my cat", "5")
    assert contrast.info["picture_set_hash_without"] == hashlib.sha256(OTHERS[:5].numpy().tobytes()).hexdigest()


def test_the_cost_is_counted_and_the_work_announced(denoiser):
    seen = []
    result = learn_pictures(
        denoiser, PICTURES, "a cat", **SMALL, patience=99, start="zero", caching=lambda *a: seen.append(a)
    )
    items, held, drawn = 8 * 4, 2 * 4, 8
    encoder = items + drawn * 20 + drawn * 4
    decoder = items + drawn * 20 + 10 * 8 + held * 11
    assert (result.unet_rows, result.backward_rows) == ((encoder + decoder) / 2, 10 * 8)
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    assert {total for _, total in seen} == {2 + 4 + 20 + 4}
    seen.clear()
    learn_pictures(denoiser, PICTURES, "a cat", without=OTHERS, **SMALL, caching=lambda *a: seen.append(a))
    assert seen[-1] == (2 + 2 + 8, 2 + 2 + 8)


def test_no_encoder_row_is_computed_while_learning(denoiser):
    seen = []
    learn_pictures(
        denoiser, PICTURES, "a", **SMALL, patience=99, progress=lambda *a: seen.append(denoiser.cost.encoder_rows)
    )
    assert len(seen) == 10 and len(set(seen)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("without", [None, OTHERS])
def test_every_layout_learns_channel_vectors_and_maps(layout, spatial, without):
    any_model = model(layout, text=with_pooled if layout == "sdxl" else bag_of_words)
    settings = {**SMALL, "without": without, "spatial": spatial}
    result = learn_pictures(any_model, PICTURES, "a cat", **settings)
    assert result.vector.tensor.shape == ((32, 2, 2) if spatial else (32,))
    seen = []
    learn_pictures(any_model, PICTURES, "a cat", **settings, start=result.vector, progress=lambda *a: seen.append(a[3]))
    torch.testing.assert_close(seen[0].tensor, result.vector.tensor)


def test_v_prediction_models_are_learned_from_too():
    """The loss asks for the same noise: an epsilon model and a v model that say the same learn the same."""
    v_model = model(prediction_type="v_prediction")
    result = learn_pictures(v_model, PICTURES, "a cat", **SMALL, start="zero")
    assert result.held_out[0] == pytest.approx(1.0, abs=1e-4)
    assert result.explained > 0
    target = v_model.schedule.prediction_of(torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), 500)
    x = v_model.schedule.add_noise(torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), 500)
    torch.testing.assert_close(v_model.schedule.to_epsilon(x, target, 500), torch.full((1, 4, 8, 8), 2.0))


def test_ready_latents_are_taken_as_they_are(denoiser):
    by_pixels = learn_pictures(denoiser, PICTURES, "a cat", without=OTHERS, **SMALL)
    by_latents = learn_pictures(
        denoiser, encode_pictures(PICTURES), "a cat", without=encode_pictures(OTHERS), latents=True, **SMALL
    )
    assert torch.equal(by_pixels.vector.tensor, by_latents.vector.tensor)


def test_pictures_of_another_size_work(denoiser):
    wide = F.interpolate(PICTURES, (16, 32))
    assert learn_pictures(denoiser, wide, "a cat", spatial=True, **SMALL).vector.tensor.shape == (32, 2, 4)


def test_two_pictures_are_enough(denoiser):
    assert learn_pictures(denoiser, PICTURES[:2], "a cat", without=OTHERS[:2], **SMALL, start="zero").losses


def test_the_same_seed_gives_the_same_vector(denoiser):
    a, b = (learn_pictures(denoiser, PICTURES, "a cat", **SMALL, seed=3) for _ in range(2))
    other = learn_pictures(denoiser, PICTURES, "a cat", **SMALL, seed=4)
    assert torch.equal(a.vector.tensor, b.vector.tensor)
    assert a.vector != other.vector


def test_learning_works_for_callers_in_inference_mode(denoiser):
    outside = learn_pictures(denoiser, PICTURES, "a cat", without=OTHERS, **SMALL)
    with torch.inference_mode():
        inside = learn_pictures(denoiser, PICTURES.clone(), "a cat", without=OTHERS.clone(), **SMALL)
    assert torch.equal(inside.vector.tensor, outside.vector.tensor)
    assert not inside.vector.tensor.is_inference()


def test_learning_leaves_every_weight_and_flag_as_it_was(denoiser):
    before = {name: value.clone() for name, value in denoiser.unet.state_dict().items()}
    learn_pictures(denoiser, PICTURES, "a cat", **SMALL)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.unet.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in denoiser.unet.parameters())


def test_stopping_keeps_the_best_so_far(painter):
    steps = []
    result = learn_pictures(
        painter,
        PICTURES,
        "a cat",
        **{**SMALL, "steps": 500},
        start="zero",
        progress=lambda step, *rest: steps.append(step),
        stop=lambda: len(steps) >= 5,
    )
    assert len(result.losses) == 5
    assert result.stopped.startswith("stopped by request after 5 of 500")
    assert result.explained == pytest.approx(1 - min(result.held_out), abs=1e-4)


@pytest.mark.parametrize("calls", [0, 1, 5, 29, 30])  # encoding, noising, drawing, the last batch, the first step
def test_stopping_before_the_first_step_is_an_error(denoiser, calls):
    asked = iter(range(1000))
    with pytest.raises(LearnError, match="before its first step"):
        learn_pictures(denoiser, PICTURES, "a cat", **SMALL, stop=lambda: next(asked) >= calls)


@pytest.mark.parametrize("without", [None, OTHERS])
def test_nan_stops_learning_with_the_last_good_vector(without):
    spoiled = model()
    settings = {**SMALL, "start": "zero", "patience": 99, "without": without}
    healthy = learn_pictures(spoiled, PICTURES, "a cat", **settings)

    def spoil(step, total, loss, vector):
        if step == 6:
            spoiled.unet.conv_out.register_forward_hook(lambda m, a, out: out * float("nan"))

    result = learn_pictures(spoiled, PICTURES, "a cat", **settings, progress=spoil)
    assert result.stopped.startswith("stopped at step 6 of 10 because of NaN")
    assert result.losses == healthy.losses[:6]
    assert torch.isfinite(result.vector.tensor).all()
    assert result.explained == (None if without is not None else pytest.approx(1 - min(result.held_out)))


def test_a_model_that_gives_nan_from_the_start_is_named():
    broken = model()
    with torch.no_grad():
        broken.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(LearnError, match="not finite"):
        learn_pictures(broken, PICTURES, "a cat", **SMALL)


def test_patience_ends_learning_that_no_longer_gets_better(painter):
    result = learn_pictures(painter, PICTURES, "a cat", **{**SMALL, "steps": 200}, rate=100.0, patience=2)
    assert "no longer got better" in result.stopped
    assert len(result.losses) < 200


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (PICTURES[:1], "too few pictures: 1"),
        (PICTURES[:0], "too few pictures: 0"),
        (PICTURES[0], "must have the shape"),
        (PICTURES[:, :2], "must have the shape"),
        (PICTURES.repeat(1, 1, 1, 0), "must have the shape"),
        ((PICTURES * 127 + 128).byte(), "floating point"),
        (PICTURES.numpy(), "not ndarray"),
        (PICTURES * 2, "go from"),
        (PICTURES.masked_fill(PICTURES.max() == PICTURES, float("nan")), "not finite"),
        (PICTURES[:1].expand(4, -1, -1, -1), "identical"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused_on_either_side(denoiser, pixels, said):
    with pytest.raises(LearnError, match=said):
        learn_pictures(denoiser, pixels, "a cat")
    with pytest.raises(LearnError, match=said.replace("pictures", "pictures without the concept")):
        learn_pictures(denoiser, PICTURES, "a cat", without=pixels)


def test_settings_out_of_range_and_foreign_starts_are_refused(denoiser):
    with pytest.raises(LearnError, match="prompt is empty"):
        learn_pictures(denoiser, PICTURES, "  ")
    with pytest.raises(LearnError, match="noises at 2"):
        learn_pictures(denoiser, PICTURES, "a cat", noises=1)
    with pytest.raises(LearnError, match="differ in size"):
        learn_pictures(denoiser, PICTURES, "a cat", without=F.interpolate(OTHERS, (16, 32)))
    with pytest.raises(LearnError, match="are the same"):
        learn_pictures(denoiser, PICTURES, "a cat", without=PICTURES.clone())
    with pytest.raises(LearnError, match="shape"):
        learn_pictures(denoiser, PICTURES, "a cat", latents=True)
    with pytest.raises(FamilyMismatch):
        learn_pictures(denoiser, PICTURES, "a cat", start=ConceptVector(torch.ones(1280), "sd1"))


def test_a_vector_that_helps_no_held_out_picture_is_refused(painter):
    with pytest.raises(LearnError, match="Nothing was learned: on held-out pictures"):
        learn_pictures(painter, PICTURES, "a cat", **SMALL, start="zero", rate=1e6)


@torch.no_grad()
def test_noises_come_in_pairs_that_cancel(denoiser):
    x0, times = encode_pictures(PICTURES[:3]), noisy_times(denoiser.schedule, 2)
    items = build_noised(
        denoiser,
        x0,
        encode(denoiser, ["a cat"])["a cat"],
        numbers=[0, 1, 0],
        held_out=torch.tensor([False, True, False]),
        times=times,
        seed=5,
        batch=4,
        advance=lambda: None,
    )
    assert len(items.states) == len(items.target) == len(items.error) == len(items.h) == 3 * 2 * 2
    torch.testing.assert_close(items.target[0::2], -items.target[1::2])
    assert torch.equal(items.target[:4], items.target[8:])  # the same number, the same noises
    assert not torch.equal(items.target[:4], items.target[4:8])
    assert items.held_out.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    x = denoiser.schedule.add_noise(x0[1:2], items.target[6:7], times[1])
    state = denoiser.to_h(x, times[1], denoiser.encode_text(["a cat"]))
    torch.testing.assert_close(items.h[6:7], state.h, rtol=1e-4, atol=1e-5)
    expected = (denoiser.from_h(state) - items.target[6:7]).square().mean()
    torch.testing.assert_close(items.error[6], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_batch_spans_the_timesteps_and_both_kinds(denoiser):
    items = build_noised(
        denoiser,
        encode_pictures(torch.cat([PICTURES, OTHERS[:4]])),
        encode(denoiser, ["a cat"])["a cat"],
        numbers=list(range(12)),
        held_out=torch.zeros(12, dtype=torch.bool),
        times=noisy_times(denoiser.schedule, 4),
        seed=0,
        batch=32,
        advance=lambda: None,
    )
    batches = balanced_batches(items, [torch.arange(6), torch.tensor([8, 9, 11])], 16, torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(12)]
    for batch in drawn:
        pictured, times = items.picture[batch], items.bucket[batch]
        for kind in (pictured < 8, pictured >= 8):
            assert sorted(times[kind].tolist()) == sorted([0, 1, 2, 3] * 2)
        assert batch[1::2] == [i + 1 for i in batch[0::2]] and all(i % 2 == 0 for i in batch[0::2])
    first = [i for batch in drawn[:6] for i in batch if items.picture[i] < 8]
    assert sorted(first) == list(range(6 * 8))  # every item once before any comes again
    assert {int(items.picture[i]) for batch in drawn for i in batch} == {0, 1, 2, 3, 4, 5, 8, 9, 11}


@pytest.mark.parametrize(("count", "share", "expected"), [(2, 0.25, 1), (12, 0.25, 3), (3, 0.99, 2), (20, 0.01, 1)])
def test_some_pictures_are_held_out_and_some_are_not(count, share, expected):
    assert int(held_out(count, share, torch.Generator().manual_seed(0)).sum()) == expected


def test_the_timesteps_are_spread_over_the_noisy_part(denoiser):
    times = noisy_times(denoiser.schedule, 4)
    assert times == [475.0, 625.0, 775.0, 925.0]


def test_a_model_without_a_picture_encoder_says_so():
    from concept_steer.errors import ConceptSteerError

    with pytest.raises(ConceptSteerError, match="encode pictures"):
        learn_pictures(tiny_denoiser(), PICTURES, "a cat")
