"""The safety switch in the web UIs: what a run gets that asked for it, under the administrator's lock.

It fails closed: a run that safety cannot be vouched for ends with an error, and no picture comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import SafetyError
from ..safety import SafetyPlan, SafetySettings, plan
from ..safety.safety_set import SHIPPED
from .webui_guidance import Guidance, Opened

PLAIN = 0.887  # grey level of a picture that is withheld
REPLACED = (
    "Concept Steer is on, but another extension samples this picture in a way that Concept Steer is not told of the "
    "end of. Switch that extension off, or Concept Steer."
)


def plan_for(
    settings: SafetySettings, family: str, channels: int, folders: Sequence[Any], can_guide: bool
) -> SafetyPlan:
    """The plan for a model. can_guide: whether the web UI can predict a safety text beside the prompt.

    Errors: those of `safety.plan`; SafetyError at level strict where that wants guidance and there is none.
    """
    if settings.level == "strict" and settings.method == "auto" and not can_guide:
        raise SafetyError(
            "Safety strict is learned vectors and Safe Latent Diffusion together, and this web UI offers no place for "
            "the latter, so nothing is drawn. Use the level 'standard', or the method 'vectors', or AUTOMATIC1111."
        )
    return plan(settings, family, channels, folders=[*folders, SHIPPED], can_guide=can_guide)


class Guard:
    """Safety over one run of the web UI, for whatever models it uses. make: (family, channels) -> plan.

    guidance: (settings of Safe Latent Diffusion, for which pictures) -> Guidance, None where the host has no place.
    """

    def __init__(
        self,
        settings: SafetySettings,
        make: Callable[[str, int], SafetyPlan],
        guidance: Callable[[Any, Opened | None], Guidance] | None = None,
    ) -> None:
        self.settings, self.make, self.guidance = settings, make, guidance
        self.plans: dict[tuple[str, int], SafetyPlan] = {}
        self.guides: dict[tuple[str, int], Guidance] = {}
        self.now: tuple[str, int] | None = None
        self.done = False
        self._wanted = self._reached = self._guided = self._rows = 0

    def use(self, family: str, channels: int) -> SafetyPlan:
        """The plan of the model that runs now. Errors: SafetyError, FamilyMismatch."""
        key = (family, channels)
        if key not in self.plans:
            made = self.make(family, channels)
            if made.guide is not None:
                if self.guidance is None:
                    raise SafetyError("Safe Latent Diffusion is not possible in this web UI, so nothing is drawn.")
                self.guides[key] = self.guidance(made.guide, made.firings.so_far if made.gated else None)
            self.plans[key] = made
        self.now = key
        return self.plans[key]

    def start(self) -> None:
        """A pass of sampling begins."""
        self.done = False
        for made in self.plans.values():
            made.firings.begin()

    @property
    def steers(self) -> tuple[Any, ...]:
        return () if self.now is None else self.plans[self.now].steers

    def begin(self, rows: int) -> None:
        """An evaluation begins; `rows` of it are prompts'. Errors: SafetyError when the last one went around us."""
        self.check()
        self._wanted, self._reached, self._rows = self._wanted + 1, 0, rows if self.steers else 0

    def reached(self, rows: int) -> None:
        """So many prompts' rows of h came by."""
        self._reached += rows

    def after(self, asked: Any, denoised: Any) -> None:
        """on_cfg_denoised."""
        guide = None if self.now is None else self.guides.get(self.now)
        if guide is not None:
            guide.after(asked, denoised)
        self._guided += 1

    def check(self) -> None:
        """Errors: SafetyError when the last evaluation cannot have been kept safe."""
        if self._reached < self._rows:
            raise SafetyError(
                "Safety is on, but the model ran without its mid block's output being reached, so its vectors could "
                "not act and no picture is handed out. A replaced UNet (TensorRT, another engine, a cache) bypasses "
                "it: choose 'None' as the SD Unet, or the method 'sld'."
            )
        if self.guides and self._guided != self._wanted:
            raise SafetyError(
                "Safety is on, but the web UI joined predictions without asking Safe Latent Diffusion, so no picture "
                "is handed out. Another extension changes sampling; switch it off."
            )

    def finish(self, samples: Any, stopped: bool) -> None:
        """After a pass. Errors: SafetyError when it cannot be vouched for."""
        self.check()
        if not self._wanted and not stopped:
            raise SafetyError(
                "Safety is on, but this sampler never told the extension of its evaluations, so no picture is handed "
                "out. Choose one of the web UI's own samplers."
            )
        for one in samples if isinstance(samples, (list, tuple)) else [samples]:
            if isinstance(one, Tensor) and not bool(one.isfinite().all()):
                raise SafetyError(
                    "Sampling gave values that are no numbers (NaN), so safety cannot vouch for the picture. Try "
                    "another precision (--no-half), another sampler, or a lower CFG."
                )
        self._wanted = self._reached = self._guided = self._rows = 0
        self.done = True

    def report(self) -> str:
        """What it did, in words."""
        lines = [made.report().text().replace("\nFinished pictures were not looked at.", "")
                 for made in self.plans.values()]  # fmt: skip
        return "\n".join(lines)
