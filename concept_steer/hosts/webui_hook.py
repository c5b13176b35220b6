"""Where the web UIs let h be changed: a hook on AUTOMATIC1111's mid block, an output-block patch in Forge, reForge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from .comfy import timestep_of
from .ldm_unet import text_width, unet_family
from .webui_guidance import embeddings, parts_of
from .webui_job import Job
from .webui_plan import Count, Row, rows_of_chunks


class TorchHook:
    """AUTOMATIC1111: a pre-hook on the UNet learns rows and timestep, a hook on the mid block's last layer steers.

    unet_of: the UNet in use now; the refiner and the hires checkpoint exchange it in the middle of a run.
    """

    def __init__(self, unet_of: Callable[[], Any]) -> None:
        self.unet_of = unet_of
        self._unet: Any = None
        self._handles: list[Any] = []
        self._count: Count | None = None
        self._now: tuple[float, list[Row]] | None = None
        self._aside = False
        self._known: tuple[Any, tuple[str, int]] | None = None

    def family(self, p: Any, params: Any = None) -> tuple[str, int]:
        unet = self.unet_of()
        if self._known is None or self._known[0] is not unet:
            self._known = (unet, unet_family(unet, text_width(unet), type(unet).__module__))
        return self._known[1]

    def attach(self, job: Job, params: Any) -> int:
        """Errors: ConceptSteerError when the batch is not understood; the hooks are on by then, to raise it again."""
        unet = self.unet_of()
        if unet is not self._unet:
            self.detach()
            self._handles = [
                unet.register_forward_pre_hook(
                    lambda m, args, kwargs: self._before(job, args, kwargs), with_kwargs=True
                ),
                unet.middle_block[-1].register_forward_hook(lambda m, args, out: self._after(job, out)),
            ]
            self._unet = unet
        self._count = self._now = None
        parts = parts_of(params)
        self._count = Count(parts, params.x.shape[0], embeddings(params.text_uncond))
        return sum(parts)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._unet, self._count, self._now, self._known = [], None, None, None, None

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def _before(self, job: Job, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if job.failure is not None:
            self.detach()  # where sampling is not ours to end, nobody else would
            raise job.failure
        self._now = None
        if self._count is None or self._aside:
            return
        given = dict(zip(("x", "timesteps", "context"), args, strict=False)) | kwargs
        rows = self._count.take(given["x"].shape[0], given.get("context"))
        self._now = float(given["timesteps"].reshape(-1)[0]), rows

    def _after(self, job: Job, out: Tensor) -> Tensor | None:
        if self._now is None:
            return None
        (timestep, rows), self._now = self._now, None
        steered = job.steered(out, timestep, rows)
        return None if steered is out else steered


class ForgeHook:
    """Forge and reForge: one clone of their model patcher per UNet, whose patch asks the job while there is one."""

    def __init__(self) -> None:
        self._objects: Any = None
        self._former: Any = None
        self._patched: Any = None
        self._job: Job | None = None

    def family(self, p: Any, params: Any = None) -> tuple[str, int]:
        objects = p.sd_model.forge_objects if params is None else params.denoiser.inner_model.inner_model.forge_objects
        unet = objects.unet.model.diffusion_model
        return unet_family(unet, text_width(unet), type(objects.unet.model).__name__)

    def attach(self, job: Job, params: Any) -> int:
        objects = params.denoiser.inner_model.inner_model.forge_objects
        self._job = job
        if objects.unet is self._patched:
            return int(params.x.shape[0])  # a clone for every step would patch once more at each
        former = objects.unet
        clone = former.clone()
        model = clone.model
        sampling = getattr(model, "predictor", None) or model.model_sampling  # Forge's name, reForge's

        # a closure: the patchers are deep-copied, and a bound method would be copied with all of this
        def patch(h: Tensor, hsp: Any, options: dict[str, Any]) -> tuple[Tensor, Any]:
            if self._job is None or options.get("block") != ("output", 0):
                return h, hsp
            rows = rows_of_chunks(options["cond_or_uncond"], h.shape[0])
            return self._job.steered(h, timestep_of(sampling, options["sigmas"].reshape(-1)[0]), rows), hsp

        clone.set_model_output_block_patch(patch)
        self._objects, self._former, self._patched = objects, former, clone
        objects.unet = clone
        return int(params.x.shape[0])

    def aside(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def detach(self) -> None:
        if self._objects is not None and self._objects.unet is self._patched:
            self._objects.unet = self._former
        self._objects = self._former = self._patched = self._job = None
