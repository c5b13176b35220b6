"""Safe Latent Diffusion in ComfyUI, through wrappers only: it works below CFG, so it composes with what acts there.

eps_u + s_g (eps_p - eps_u - gamma) is plain CFG on eps_p - gamma. So the prompt's prediction is replaced where it is
made (CALC_COND_BATCH, the safety text in the same batch), and every CFG function, guider and sampler goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import comfy.samplers
import torch
from torch import Tensor

from ..errors import ConceptSteerError
from ..guidance.safe_latent_diffusion import PUBLISHED_STEPS, SafeLatentDiffusion, SafetyState, step_of
from .comfy_plan import KEY, SAFETY

SETTINGS, RUN = f"{KEY}_safe_latent_diffusion", f"{KEY}_safety_run"
OWN_EMPTY = f"{KEY}_empty"  # a list of our own, for guiders without a negative prompt
OF_THE_TEXT = ("cross_attn", "pooled_output", "attention_mask", "gligen", "model_conds", "uuid", KEY)
Conds = Sequence[Mapping[str, Any]]
Opened = Callable[[int], Sequence[bool]]


@dataclass(frozen=True, eq=False)
class Safety:
    """What a MODEL carries: the method's settings, and its texts as CONDITIONING (None: the guider brings them).

    opened: (pictures) -> for which of them it acts, asked after their prompts were predicted; None: for all.
    """

    settings: SafeLatentDiffusion
    text: Any = None
    empty: Any = None
    opened: Opened | None = None

    def __deepcopy__(self, memo: Any) -> Safety:
        return self  # ComfyUI copies a model's options with all their content at every clone


def safe_model(model: Any, clip: Any, settings: SafeLatentDiffusion, opened: Opened | None = None) -> Any:
    """A clone of the MODEL that samples with Safe Latent Diffusion; the very same object when it is off.

    The safety text takes part as the prompt does: areas, masks, ControlNets, hooks and step ranges of each part of the
    prompt hold for it too. opened: see `Safety`. Errors: ConceptSteerError for a model that predicts no noise or has
    the method already.
    """
    if not settings.acts:
        return model
    text, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (settings.text, ""))
    return _with_wrappers(model, Safety(settings, text, empty, opened))


class SafeGuider(comfy.samplers.CFGGuider):
    """CFG with a third conditioning, which gets areas, ControlNets and hooks of its own, as the other two do."""

    def __init__(self, model: Any, settings: SafeLatentDiffusion) -> None:
        super().__init__(_with_wrappers(model, Safety(settings)))

    def set_conds(self, positive: Any, negative: Any, safety: Any = None) -> None:
        """CONDITIONING each."""
        if safety is None:
            raise ConceptSteerError("Safe Latent Diffusion needs the encoded safety text as its third conditioning.")
        self.inner_set_conds({"positive": positive, "negative": negative, SAFETY: safety})


def guider_of(
    model: Any, positive: Any, negative: Any, safety: Any, cfg: float, settings: SafeLatentDiffusion
) -> comfy.samplers.CFGGuider:
    """A guider for SamplerCustomAdvanced; ComfyUI's own plain one when the method is off. Errors: `safe_model`'s."""
    guider: Any
    if settings.acts:
        guider = SafeGuider(model, settings)
        guider.set_conds(positive, negative, safety)
    else:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def _with_wrappers(model: Any, safety: Safety) -> Any:
    from comfy.patcher_extension import WrappersMP

    options = model.model_options.get("transformer_options", {})
    if SETTINGS in options:
        raise ConceptSteerError(
            "This model has Safe Latent Diffusion already: use one node of it, and write all that is unwanted into its "
            "text."
        )
    _check_predicts_noise(model.get_model_object("model_sampling"))
    clone = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
    ):
        clone.add_wrapper_with_key(kind, SETTINGS, wrapper)
    clone.model_options.setdefault("transformer_options", {})[SETTINGS] = safety
    return clone


def _check_predicts_noise(sampling: Any) -> None:
    from comfy.model_sampling import CONST

    if isinstance(sampling, CONST):
        raise ConceptSteerError(
            "This model predicts a flow (as SD 3 and Flux do), and Safe Latent Diffusion's thresholds are made for "
            "predictions of noise: use an SD 1.x, SD 2.x or SDXL checkpoint, or the demo model."
        )


class SafetyRun:
    """One run of a sampler: its momentum, and which prompts of the present evaluation are safe already."""

    def __init__(self, safety: Safety, sigmas: Tensor, sampling: Any) -> None:
        self.settings, self.opened = safety.settings, safety.opened
        self.sigmas = [float(sigma) for sigma in sigmas]
        # the warm-up ends at a noise level, so that it means the same for every scheduler and with denoise below 1
        self.end_of_warmup = float(sampling.percent_to_sigma(self.settings.warmup / PUBLISHED_STEPS)) * (1 + 1e-4)
        self.states: dict[str, SafetyState] = {}
        self.newest = -1
        self.lists: Mapping[str, Conds] = {}
        self.waiting: set[str] = set()
        self.step, self.at_step, self.acting = 0, True, False
        self.shape: tuple[int, ...] = ()

    def __deepcopy__(self, memo: Any) -> SafetyRun:
        return self

    def evaluate(self, lists: Mapping[str, Conds], x: Tensor, sigma: float) -> None:
        """Another evaluation by the sampler begins."""
        self.lists, self.shape = lists, tuple(x.shape)
        self.waiting = {name for name in lists if _is_prompt(name) and lists[name]}
        self.step, exact = step_of(self.sigmas, sigma)
        self.at_step = exact or self.step > self.newest
        self.newest = max(self.newest, self.step)
        self.acting = self.settings.acts and sigma <= self.end_of_warmup

    def check(self) -> None:
        """Errors: ConceptSteerError when no prompt came by, so that the picture would not be safe.

        (One of several may be left out by its guider: DualCFG does so at weight 1.)
        """
        if self.acting and len(self.waiting) == sum(map(_is_prompt, self.lists)):
            raise ConceptSteerError(
                "Safe Latent Diffusion could not act: another node predicts the prompt by a way of its own. Take that "
                "node out, or this one, if the picture needs no safety."
            )

    def name_of(self, conds: Conds | None) -> str | None:
        """The list of the guider that this is (a context window or another pack may have copied it)."""
        for name, mine in self.lists.items():
            if conds is mine:
                return name
        ids = {cond.get("uuid") for cond in conds or ()}
        found = (name for name, mine in self.lists.items() if ids and {cond.get("uuid") for cond in mine} == ids)
        return next(found, None)

    def uncond(self) -> str:
        """The list that stands for no prompt: PerpNeg's empty one rather than its negative."""
        names = [name for name in self.lists if not _is_prompt(name) and name != SAFETY]
        return next((name for name in names if "empty" in name), names[0])

    def predict(
        self, call: Any, conds: Sequence[Conds | None], prompts: Mapping[int, str], x: Tensor, sigma: Tensor
    ) -> list[Tensor]:
        """The denoised pictures of `conds`, the prompts' with gamma taken out. call: conds -> denoised of each.

        Where only some pictures are guided, the further conditionings have a call of their own: the others' batch, and
        so their bits, are as they would be without.
        """
        first, rows = [], torch.ones(x.shape[0], dtype=torch.bool)
        if self.opened is not None:
            first = list(call(conds))
            rows = torch.tensor(list(self.opened(x.shape[0])))
            if not bool(rows.any()):
                return first
        guided = rows.to(x.device).view(-1, *[1] * (x.ndim - 1))
        state = [self.states.setdefault(name, SafetyState(self.settings)) for name in prompts.values()]
        longer, known = list(conds), [self.name_of(c) for c in conds]
        wanted = state[0].wants(self.step, self.acting)
        places = {}
        for name in (self.uncond(), *([SAFETY] if wanted else [])):
            places[name] = known.index(name) if name in known else len(longer)
            if places[name] == len(longer):
                longer.append(self.lists[name])
        if first:
            more = len(longer) - len(conds)
            out = [*first, *(list(call([*[None] * len(conds), *longer[-more:]]))[-more:] if more else [])]
        else:
            out = list(call(longer))
        width = sigma.float().view(-1, *[1] * (x.ndim - 1))
        noise = {index: (x.float() - out[index].float()) / width for index in (*places.values(), *prompts)}
        uncond, safety = noise[places[self.uncond()]], noise[places[SAFETY]] if wanted else None
        if safety is not None:
            safety = torch.where(guided, safety, uncond)  # no direction, and none in the momentum
        for one, index in zip(state, prompts, strict=True):
            gamma = one.gamma(self.step, uncond, noise[index], safety, keep=self.at_step)
            if self.acting:
                safe = (out[index].float() + width * gamma).to(out[index].dtype)
                out[index] = torch.where(guided, safe, out[index])
        return out[: len(conds)]


def outer_sample(
    executor: Any, noise: Tensor, latent_image: Any, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any
):
    """OUTER_SAMPLE wrapper: one run, with a fresh state, and the safety text among the guider's conditionings.

    It is there before ComfyUI prepares them, so areas, masks, ControlNets, hooks and memory are ComfyUI's own work.
    """
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    safety: Safety = options[SETTINGS]
    sampling = guider.model_patcher.get_model_object("model_sampling")
    _check_predicts_noise(sampling)  # a ModelSampling node may have come later
    prompts = [cond for name in guider.conds if _is_prompt(name) for cond in guider.conds[name]]
    if SAFETY not in guider.conds:
        guider.conds[SAFETY] = beside(prompts, safety.text)
    if all(_is_prompt(name) or name == SAFETY for name in guider.conds):
        if safety.empty is None:
            raise ConceptSteerError("Safe Latent Diffusion needs a negative conditioning, which may be empty.")
        guider.conds[OWN_EMPTY] = [{**cond, "prompt_type": "negative"} for cond in beside(prompts, safety.empty)]
    options[RUN] = SafetyRun(safety, sigmas, sampling)
    try:
        return executor(noise, latent_image, sampler, sigmas, *rest, **more)
    finally:
        del options[RUN]


def predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Any:
    """PREDICT_NOISE wrapper: one evaluation by the sampler."""
    run: SafetyRun = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is None:
        raise ConceptSteerError(
            "Safe Latent Diffusion was not told of this run's beginning: another node samples by a way of its own. "
            "Take that node out, or this one, if the picture needs no safety."
        )
    run.evaluate(executor.class_obj.conds, x, float(timestep.reshape(-1)[0]))
    result = executor(x, timestep, model_options, seed)
    run.check()
    return result


def calc_cond_batch(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> Any:
    """CALC_COND_BATCH wrapper: the first time in an evaluation that a prompt is predicted, gamma is taken out of it.

    Later calls are other nodes' own (perturbed attention, self-attention guidance, ...), and stay as they are.
    """
    run: SafetyRun | None = model_options.get("transformer_options", {}).get(RUN)
    if run is None:
        return executor(model, conds, x, timestep, model_options)
    names = {i: run.name_of(c) for i, c in enumerate(conds) if c}
    prompts = {i: name for i, name in names.items() if name is not None and name in run.waiting}
    needed = run.acting or (run.settings.acts and run.settings.remembers)
    if not prompts or not needed:
        return executor(model, conds, x, timestep, model_options)
    if tuple(x.shape) != run.shape:
        raise ConceptSteerError(
            f"Safe Latent Diffusion met a part {tuple(x.shape)} of the latents {run.shape}: context windows, which "
            "predict a long batch piece by piece, are not supported. Sample without them."
        )
    run.waiting -= set(prompts.values())
    sigma = timestep.reshape(-1).expand(x.shape[0]) if timestep.numel() == 1 else timestep
    return run.predict(lambda longer: executor(model, longer, x, timestep, model_options), conds, prompts, x, sigma)


def beside(prompts: Conds, conditioning: Any) -> list[dict[str, Any]]:
    """A text as conditionings with the prompt's areas, masks, ControlNets, hooks and ranges; equal ones only once.

    prompts: ComfyUI's dicts before it prepares them. conditioning: CONDITIONING of the text.
    """
    from comfy.sampler_helpers import convert_cond

    made: dict[Any, dict[str, Any]] = {}
    for prompt in prompts:
        kept = {key: value for key, value in prompt.items() if key not in OF_THE_TEXT}
        for text in convert_cond(conditioning):
            ranges = [[cond.get(f"clip_{end}_percent") for end in ("start", "end")] for cond in (kept, text)]
            if None not in (*ranges[0], *ranges[1]) and ranges[0] != ranges[1]:
                continue  # an encoder with a schedule: each part of the prompt has its own part of the text
            own = {key: value for key, value in text.items() if key != "hooks"}
            alike = tuple(sorted((key, _identity(value)) for key, value in kept.items()))
            made.setdefault((alike, tuple(ranges[1])), {**kept, **own, "model_conds": {}, "uuid": uuid4()})
    return list(made.values())


def _identity(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    plain = all(isinstance(part, (bool, int, float, str)) for part in parts)
    return repr(value) if plain else f"id {id(value)}"


def _is_prompt(name: str) -> bool:
    return name != SAFETY and "negative" not in name and "empty" not in name
