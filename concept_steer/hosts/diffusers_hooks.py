"""Steer a diffusers pipeline or UNet as it is: hooks on the UNet and its mid block, gone without a trace afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ..denoiser import steer_rows
from ..errors import ConceptSteerError
from ..steering import Steer, check_steers
from .diffusers_unet import family_of

RowKind = Literal["cond", "uncond"]
Layout = Sequence[RowKind]


class Handle:
    """Steering in force until `remove()` or the end of the `with` block. Removing twice does no harm."""

    def __init__(self, unet: Any, steers: tuple[Steer, ...], layout: Callable[[], Layout]) -> None:
        self._steers = steers
        self._layout = layout
        self._plan: tuple[float | Tensor, list[bool]] | None = None
        self._hooks: list[Any] = []
        try:
            self._hooks.append(unet.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(unet.mid_block.register_forward_hook(self._steer))
            self._hooks.append(unet.register_forward_hook(self._after, always_call=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._plan = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        rows, layout = sample.shape[0], list(self._layout())
        if not layout or rows % len(layout):
            raise ConceptSteerError(
                f"The UNet was called with {rows} rows, which the layout {tuple(layout)} does not divide. "
                "Give steer(..., layout=...) the order of the rows, e.g. ('uncond', 'cond')."
            )
        each = rows // len(layout)
        self._plan = (timestep, [kind == "cond" for kind in layout for _ in range(each)])

    def _steer(self, module: Any, args: Any, output: Any) -> Any:
        if self._plan is None:
            raise ConceptSteerError(
                "The mid block ran outside the UNet's own forward while steering is attached to it, so the timestep "
                "is unknown. Remove the handle first; learning and analysis take steers as arguments instead."
            )
        timestep, is_cond = self._plan
        time = timestep.detach().float() if isinstance(timestep, torch.Tensor) else timestep
        if isinstance(output, tuple):
            return (steer_rows(output[0], self._steers, time, is_cond), *output[1:])
        return steer_rows(output, self._steers, time, is_cond)

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self._plan = None


def steer(pipe_or_unet: Any, steers: Steer | Sequence[Steer], *, layout: Layout | None = None) -> Handle:
    """Add concept vectors to the mid-block output h of every following picture, until the handle is removed.

    Use it as `with steer(pipe, [Steer(vector)]): pipe(...)`. The rows of a batch are read from the pipeline at each
    call (unconditional first, then the prompt's; perturbed-attention rows count as the prompt's). For a bare UNet, or
    a pipeline with an order of its own, give `layout`: the kinds of row in order, each standing for an equal share of
    the batch; a bare UNet's default is ("cond",). Several handles stack in the order they were made; steers of one
    call are summed in fp32 and do not depend on their order. A ControlNet's middle residual is added after the steer.

    Raises FamilyMismatch (vector of another model family) at once, ConceptSteerError for a UNet without mid block, and
    during sampling when the batch does not fit the layout.
    """
    wanted = (steers,) if isinstance(steers, Steer) else tuple(steers)
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    family, channels = family_of(unet)
    check_steers(wanted, family, channels)
    if layout is not None:
        fixed = _checked(layout)
        return Handle(unet, wanted, lambda: fixed)
    if unet is pipe_or_unet:
        return Handle(unet, wanted, lambda: ("cond",))
    known = hasattr(type(pipe_or_unet), "do_classifier_free_guidance")
    if not known or hasattr(type(pipe_or_unet), "image_guidance_scale"):
        raise ConceptSteerError(
            f"The order of the rows in a {type(pipe_or_unet).__name__}'s batch is not known. "
            "Give steer(..., layout=...), e.g. ('uncond', 'cond')."
        )
    return Handle(unet, wanted, lambda: pipeline_layout(pipe_or_unet))


def pipeline_layout(pipe: Any) -> Layout:
    """The kinds of row in the batch of the picture that the pipeline is making now."""
    layout: tuple[RowKind, ...] = ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)
    return (*layout, "cond") if getattr(pipe, "do_perturbed_attention_guidance", False) else layout


def _checked(layout: Layout) -> tuple[RowKind, ...]:
    bad = [kind for kind in layout if kind not in ("cond", "uncond")]
    if bad or not layout:
        raise ConceptSteerError(f"A layout lists 'cond' and 'uncond' in the batch's order; found {tuple(layout)!r}.")
    return tuple(layout)
