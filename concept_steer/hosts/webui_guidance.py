"""Safe Latent Diffusion in AUTOMATIC1111: a further prediction, taken between its two official callbacks.

eps_u + s_g (eps_p - eps_u - gamma) is plain CFG on eps_p - gamma. on_cfg_denoiser tells what will be predicted;
on_cfg_denoised hands over the predictions before they are joined: there gamma is taken out of the prompts' ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SafetyError
from ..guidance.safe_latent_diffusion import PUBLISHED_STEPS, SafeLatentDiffusion, SafetyState

LAST = 999  # training timestep of pure noise
SLACK = 1e-3
Opened = Callable[[int], Sequence[bool]]


class Steps:
    """Numbers for evaluations by their noise: a step begins where it is lower than before.

    A sampler that comes back to a level (Heun's corrector) is at that step again. One that looks between two levels
    (DPM2, DPM++ SDE) counts as if these were steps of its own: the host does not tell which are.
    """

    def __init__(self) -> None:
        self.levels: list[float] = []

    def number(self, level: float) -> int:
        slack = SLACK * abs(level)
        for number, known in enumerate(self.levels):
            if abs(known - level) <= slack:
                return number
        self.levels.append(level)
        self.levels.sort(reverse=True)
        return self.levels.index(level)


class Guidance:
    """One method over a run. encode: (text, on_cfg_denoiser's parameters) -> the web UI's conditioning, one row.

    key: the conditioning_key of the model in use, which says how the web UI packs a condition. opened: (pictures) ->
    for which of them it acts, asked after their prompts were predicted; None: for all.
    """

    def __init__(
        self,
        settings: SafeLatentDiffusion,
        encode: Callable[[str, Any], Any],
        key: Callable[[], str],
        opened: Opened | None = None,
    ) -> None:
        self.settings, self.encode, self.key, self.opened = settings, encode, key, opened
        self.applied = 0
        self._denoiser: Any = None
        self._begin()

    def _begin(self) -> None:
        self.state, self.steps = SafetyState(self.settings), Steps()

    def after(self, asked: Any, denoised: Any) -> None:
        """asked: on_cfg_denoiser's parameters as they became, denoised: on_cfg_denoised's. Changes denoised.x in place.

        Errors: SafetyError for batches in which the prompts' rows are not known.
        """
        denoiser, out, model = asked.denoiser, denoised.x, denoised.inner_model
        if denoiser is not self._denoiser or denoiser.step == 0:  # a pass begins: its momentum is its own
            self._denoiser = denoiser
            self._begin()
        parts = parts_of(asked)
        count, pictures = sum(parts), len(parts)
        if out.shape[0] != count + pictures or asked.x.shape[0] < count:
            raise SafetyError(
                f"Safe Latent Diffusion met {out.shape[0]} predictions for {pictures} pictures with {count} prompts: "
                "an editing model (InstructPix2Pix), or another extension changed the batch. Use learned vectors "
                "(method 'vectors'), or switch that extension off."
            )
        level = float(asked.sigma.reshape(-1)[0])
        time = float(model.sigma_to_t(asked.sigma.reshape(-1)[:1])) if hasattr(model, "sigma_to_t") else level
        # the warm-up ends at a noise level, so that it means the same for every schedule and for img2img
        acting = self.settings.acts and time <= (1 - self.settings.warmup / PUBLISHED_STEPS) * LAST * (1 + 1e-4)
        step = self.steps.number(level)
        self.applied += 1
        needed = acting or (self.settings.acts and self.settings.remembers)
        if not needed:
            return
        guided = list(range(pictures))
        if self.opened is not None:
            guided = [i for i, acts in enumerate(self.opened(pictures)) if acts]
            if not guided:
                return
        first = [sum(parts[:i]) for i in range(pictures)]
        picture = torch.tensor([i for i, many in enumerate(parts) for _ in range(many)], device=out.device)
        noise = _Noise(asked, hasattr(model, "sigma_to_t"))
        uncond, safety = self._further(asked, out, model, first, guided, self.state.wants(step, acting), noise)
        gamma = self.state.gamma(
            step,
            uncond[picture],
            noise.of(out[:count], range(count)),
            None if safety is None else safety[picture],
        )
        if acting:
            acts = [on and i in guided for on, i in zip(_positive(asked, count), picture.tolist(), strict=True)]
            rows = torch.tensor([row for row, on in enumerate(acts) if on], device=out.device, dtype=torch.long)
            out[rows] = noise.less(out[:count], gamma, range(count))[rows]

    def _further(
        self,
        asked: Any,
        out: Tensor,
        model: Any,
        first: Sequence[int],
        guided: Sequence[int],
        wanted: bool,
        noise: _Noise,
    ) -> tuple[Tensor, Tensor | None]:
        """eps of no prompt and of the safety text (B, C, H, W), with one more call for what the host has not predicted.

        Where the host skips the negative prompt (NGMS, early steps), the prompts' predictions stand in its place. Of
        pictures that are not guided, the safety text's is that of no prompt.
        """
        pictures, rows = len(first), [first[i] for i in guided]
        uncond = noise.of(out[-pictures:], first)
        skipped = torch.equal(out[-pictures:], out[list(first)])

        def predicted(text: Any) -> Tensor:
            found = model(asked.x[rows], asked.sigma[rows], cond=self._condition(text, asked, rows))
            return uncond.index_copy(0, torch.tensor(list(guided), device=out.device), noise.of(found, rows))

        if skipped:
            uncond = predicted(_chosen(asked.text_uncond, guided))
        safety = predicted(_repeated(self.encode(self.settings.text, asked), len(rows))) if wanted else None
        return uncond, safety

    def _condition(self, text: Any, asked: Any, rows: Sequence[int]) -> Mapping[str, Any]:
        """As the web UI packs it (modules/sd_samplers_cfg_denoiser.py, make_condition_dict)."""
        image = asked.image_cond[list(rows)]
        if self.key() == "crossattn-adm":
            return {"c_crossattn": [text], "c_adm": image}
        text = text if isinstance(text, Mapping) else {"c_crossattn": [text]}
        return {**text, "c_concat": [image]}


class _Noise:
    """Between what a sampler family's denoiser returns and predicted noise, fp32.

    k-diffusion: the denoised picture x - sigma eps; the older samplers (DDIM, PLMS, UniPC): eps itself.
    """

    def __init__(self, asked: Any, denoises: bool) -> None:
        self.asked, self.denoises = asked, denoises

    def _width(self, rows: Sequence[int]) -> Tensor:
        return self.asked.sigma[list(rows)].float().view(-1, 1, 1, 1)

    def of(self, out: Tensor, rows: Sequence[int]) -> Tensor:
        if not self.denoises:
            return out.float()
        return (self.asked.x[list(rows)].float() - out.float()) / self._width(rows)

    def less(self, out: Tensor, gamma: Tensor, rows: Sequence[int]) -> Tensor:
        """`out` with gamma taken out of its noise."""
        change = self._width(rows) * gamma if self.denoises else -gamma
        return (out.float() + change).to(out.dtype)


def parts_of(params: Any) -> list[int]:
    """How many prompts (joined by AND) each picture of the batch has. params: on_cfg_denoiser's."""
    rows, pictures = _rows(params.text_cond), _rows(params.text_uncond)
    parts = [len(prompts) for prompts in _prompts(params)]
    # fewer or more rows than that: another extension changed the prompts, all pictures alike
    return parts if sum(parts) == rows and len(parts) == pictures else [rows // pictures] * pictures


def embeddings(cond: Any) -> Any:
    """The prompt embeddings (B, L, D) of a conditioning, which is a dict for SDXL."""
    return cond["crossattn"] if isinstance(cond, Mapping) else cond


def _rows(cond: Any) -> int:
    return int(embeddings(cond).shape[0])


def _prompts(params: Any) -> Sequence[Any]:
    given = getattr(getattr(params.denoiser, "sampler", None), "sampler_extra_args", None) or {}
    return getattr(given.get("cond"), "batch", None) or ()


def _positive(params: Any, count: int) -> list[bool]:
    """Of each prompt joined by AND, whether its weight is positive: away from a negative one is towards safety."""
    weights = [float(getattr(part, "weight", 1.0)) for picture in _prompts(params) for part in picture]
    return [weight > 0 for weight in weights] if len(weights) == count else [True] * count


def _chosen(cond: Any, rows: Sequence[int]) -> Any:
    if isinstance(cond, Mapping):
        return {key: _chosen(value, rows) for key, value in cond.items()}
    return cond[list(rows)]


def _repeated(cond: Any, rows: int) -> Any:
    if isinstance(cond, Mapping):
        return {key: _repeated(value, rows) for key, value in cond.items()}
    return cond[:1].expand(rows, *cond.shape[1:])
