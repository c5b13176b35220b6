"""What the checks share: the embedded model, short words for sampling, and a recorder of h and its rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from concept_steer_pack.concept_steer.hosts import comfy_demo
from concept_steer_pack.concept_steer.hosts.comfy import family_of
from concept_steer_pack.concept_steer.vector import ConceptVector
from torch import Tensor

import nodes as comfy_nodes

CELLS = 16  # the demo model's latent is 16 x 16


@cache
def demo() -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE of the embedded model."""
    return comfy_demo.load()


@cache
def embedding(text: str) -> Tensor:
    return conditioning(text)[0][0]


def conditioning(text: str) -> Any:
    """A CONDITIONING, fresh each time."""
    clip = demo()[1]
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def vector(seed: int = 0, channels: int = 192, family: str = "demo", scale: float = 0.5, **more: Any) -> ConceptVector:
    made = torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * scale
    return ConceptVector(made, family, title=f"vector {seed}", **more)


def vector_for(model: Any, seed: int = 0, scale: float = 0.5) -> ConceptVector:
    family, channels = family_of(model)
    return vector(seed, channels, family, scale)


def call(node: Any, **inputs: Any) -> Any:
    """Run a node's class as ComfyUI does, old or new kind; its first output."""
    new = isinstance(node, type) and issubclass(node, io.ComfyNode)
    return (node.execute(**inputs) if new else getattr(node(), node.FUNCTION)(**inputs))[0]


def sample(
    model: Any,
    positive: Any = None,
    negative: Any = None,
    steps: int = 4,
    cfg: float = 4.0,
    sampler: str = "euler",
    batch: int = 2,
    size: tuple[int, int] = (CELLS, CELLS),
    latent: Tensor | None = None,
    denoise: float = 1.0,
    seed: int = 1,
) -> Tensor:
    """Stock KSampler; the latents."""
    empty = torch.zeros(batch, 4, *size) if latent is None else latent
    positive = conditioning("a doctor") if positive is None else positive
    negative = conditioning("") if negative is None else negative
    (out,) = comfy_nodes.common_ksampler(
        model, seed, steps, cfg, sampler, "normal", positive, negative, {"samples": empty}, denoise=denoise
    )
    return out["samples"]


@dataclass(frozen=True)
class Call:
    """One evaluation of the UNet: whose prompt each row is, h before and after steering, x, sigma, and its chunks."""

    prompts: list[str]
    before: Tensor  # with ControlNet's part
    after: Tensor
    x: Tensor
    sigma: float
    chunks: list[int]
    context: Tensor
    prediction: Tensor


@contextmanager
def recorded(model: Any, prompts: Sequence[str]) -> Iterator[tuple[Any, list[Call]]]:
    """(a clone of model to sample with, its calls). A row is known by its text embedding, so by nothing of ours."""
    calls: list[Call] = []
    now: dict[str, Any] = {}
    clone, unet = model.clone(), model.model.diffusion_model

    def wrapper(
        executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any, **more: Any
    ):
        middle = (control or {}).get("middle") or [None]
        added = None if middle[-1] is None else middle[-1].clone()
        result = executor(x, t, c_concat, c_crossattn, control, options, **more)
        before = now["before"] if added is None else now["before"] + added
        names = [_whose(row, prompts) for row in c_crossattn]
        chunks = list(options["cond_or_uncond"])
        sigma = float(t.reshape(-1)[0])
        calls.append(Call(names, before, now["after"], x.clone(), sigma, chunks, c_crossattn, now["prediction"]))
        return result

    def middle(module: Any, args: Any, output: Tensor) -> None:
        now["before"] = output.clone()

    def decoder(module: Any, args: Any) -> None:
        now["after"] = args[0][:, : now["before"].shape[1]].clone()

    def end(module: Any, args: Any, output: Tensor) -> None:
        now["prediction"] = output.clone()

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "recorder", wrapper)
    hooks = [
        unet.middle_block[-1].register_forward_hook(middle),
        unet.output_blocks[0][0].register_forward_pre_hook(decoder),
        unet.register_forward_hook(end),
    ]
    try:
        yield clone, calls
    finally:
        for hook in hooks:
            hook.remove()


def _whose(row: Tensor, prompts: Sequence[str]) -> str:
    for prompt in prompts:
        if torch.equal(row, embedding(prompt)[0].to(row)):
            return prompt
    raise AssertionError(f"a row belongs to none of {list(prompts)}")


def rows_got(calls: Sequence[Call], added: dict[str, Tensor | None]) -> str:
    """Each prompt's rows got exactly this tensor (None: kept their bits), in every call; each prompt was seen."""
    assert calls, "the model was never called"
    seen = {prompt: 0 for prompt in added}
    for number, one in enumerate(calls):
        for row, prompt in enumerate(one.prompts):
            seen[prompt] += 1
            c = added[prompt]
            want = one.before[row] if c is None else one.before[row] + c
            off = float((one.after[row] - want).abs().max())
            words = "changed" if c is None else "missed its vector"
            assert torch.equal(one.after[row], want), f"call {number}, row {row} ({prompt!r}) {words} by up to {off:g}"
    assert all(seen.values()), f"never evaluated: {[prompt for prompt, count in seen.items() if not count]}"
    layouts = sorted({str(one.chunks) for one in calls})
    return f"{len(calls)} calls, {sum(seen.values())} rows, layouts {', '.join(layouts)}"


def column(made: ConceptVector, strength: float = 1.0) -> Tensor:
    """What a (C,) vector adds to one row of h."""
    return (made.tensor * strength).view(-1, 1, 1)


def same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b), f"differs by up to {float((a - b).abs().max()):g}"


def different(a: Tensor, b: Tensor, least: float = 1e-3) -> str:
    most = float((a - b).abs().max())
    assert most > least, f"differs by {most:g} only"
    return f"max difference {most:.3g}"


def raises(kind: type[BaseException], action: Any, *words: str) -> str:
    """The text of the error, which has all these words."""
    try:
        action()
    except kind as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in: {text}"
        return text
    raise AssertionError(f"no {kind.__name__}")


def output_folder() -> Path:
    """Where a check leaves files for the outer tests: --base-directory's output."""
    return Path(sys.argv[sys.argv.index("--base-directory") + 1]) / "output"


def free_memory_of(value: float) -> Any:
    """ComfyUI believes that just this much memory is free, when it decides which rows share a batch."""
    real = comfy.model_management.get_free_memory

    def told(device: Any = None, torch_free_too: bool = False) -> Any:
        return real(device, True) if torch_free_too else value

    return replaced(comfy.model_management, "get_free_memory", told)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)
