"""A LoRA on the UNet, trained by peft and written in kohya's layout: ComfyUI, AUTOMATIC1111 and diffusers read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..denoiser import frozen
from ..errors import LearnError
from ..unet_names import unet_key
from ..vector_file import write_atomic

NAME = "concept_steer"
LEVEL = re.compile(r"down_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.")
# attention, and every convolution of the residual blocks: what a UNet paints with
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "proj_in", "proj_out")
ENDINGS = tuple(f".{target}" for target in TARGETS)
State = dict[str, Tensor]


def check_installed() -> None:
    """Errors: LearnError where what trains a LoRA is missing; it says what to install."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise LearnError(
            f"Training a LoRA needs {error.name}: pip install 'concept-steer[erase]', or with the Python that runs the "
            "host pip install peft accelerate (ComfyUI), pip install --no-deps peft==0.13.2 (AUTOMATIC1111)."
        ) from error


@contextmanager
def adapted(
    denoiser: Any,
    rank: int,
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = TARGETS,
) -> Iterator[None]:
    """Inside, the UNet of the denoiser carries a LoRA: `state`, or a new one that changes nothing yet.

    targets: diffusers' names of the layers that it is on.

    Its weights want gradients, the UNet's own do not; afterwards everything is as it was. ComfyUI's UNet is replaced
    by a copy in fp32 for as long. Errors: LearnError without peft, or in a host whose model cannot be trained.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    diffusers = hasattr(denoiser.unet, "add_adapter")
    if not diffusers and not hasattr(denoiser, "trainable"):
        raise LearnError("The UNet of this host cannot be trained: learn a LoRA on the command line.")
    denoiser.checkpoint_hash  # noqa: B018 - cached now: the LoRA renames the weights it wraps
    names = _names(denoiser)
    endings = tuple(f".{target}" for target in targets)
    layers = [own for own, name in names.items() if name.endswith(endings)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    with frozen(denoiser.unet) if diffusers else denoiser.trainable():
        unet = denoiser.unet
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                if diffusers:
                    unet.add_adapter(config, adapter_name=NAME)
                else:
                    inject_adapter_in_model(config, unet, adapter_name=NAME)
            for name, parameter in unet.named_parameters():
                parameter.requires_grad_("lora_" in name)
                if "lora_" in name and state is None:
                    parameter.data = parameter.data.float()  # Adam's small steps get lost in half precision
            if state is not None:
                back = {name: module for module, name in names.items()}
                set_peft_model_state_dict(unet, _renamed(state, back), adapter_name=NAME)
            yield
        finally:
            if diffusers:
                unet.unload_lora()


def state_of(denoiser: Any) -> State:
    """A copy of the weights of the LoRA that the UNet carries now, on the CPU, under diffusers' names."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(denoiser.unet, adapter_name=NAME)
    return _renamed({name: tensor.detach().cpu().clone() for name, tensor in found.items()}, _names(denoiser))


def _names(denoiser: Any) -> dict[str, str]:
    """diffusers' names of the UNet's layers, by their own."""
    if hasattr(denoiser, "diffusers_names"):
        return dict(denoiser.diffusers_names())
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: name for name, module in denoiser.unet.named_modules() if isinstance(module, kinds)}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """peft's weights (MODULE.lora_A.weight) with other names of their modules."""
    found: State = {}
    for key, tensor in state.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        found[f"{names.get(module, module)}.{part}.weight"] = tensor
    return found


def rank_of(state: Mapping[str, Tensor]) -> int:
    """Of peft's weights."""
    return next(len(tensor) for name, tensor in state.items() if name.endswith("lora_A.weight"))


def kohya(state: Mapping[str, Tensor]) -> State:
    """peft's weights in kohya's layout: lora_unet_*.lora_down.weight, lora_up.weight and alpha.

    AUTOMATIC1111 finds a layer by diffusers' name only where a level has two residual blocks, as in SD and SDXL: other
    UNets' layers are called as ldm calls them, which all hosts know, and diffusers for SDXL.
    """
    named: State = {}
    blocks = _blocks(state)
    for name, tensor in state.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        key = _called(module, blocks)
        named[f"{key}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor.float().contiguous()
        if part == "lora_A":
            named[f"{key}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return named


def _blocks(names: Iterable[str]) -> int:
    """Residual blocks a level of the UNet whose layers have these names in diffusers; 2 where they do not tell."""
    return 1 + max((int(found[1]) for name in names if (found := LEVEL.match(name))), default=1)


def _called(name: str, blocks: int) -> str:
    own = name if blocks == 2 else unet_key(f"{name}.weight", blocks).removesuffix(".weight")
    return "lora_unet_" + own.replace(".", "_")


def save(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str], overwrite: bool = False) -> Path:
    """Write peft's weights in kohya's layout, atomically. Errors: VectorFileError."""
    rank = rank_of(state)
    told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    info = {f"geom_erasing.{key}": value for key, value in about.items()}
    text = {**told, **info, "modelspec.sai_model_spec": "1.0.0", "ss_network_args": json.dumps({"conv_dim": str(rank)})}
    return write_atomic(path, safetensors.torch.save(kohya(state), text), overwrite=overwrite)


def load(path: Path, denoiser: Any) -> State:
    """Weights that `save` wrote, under the names of this UNet, for `adapted`. Errors: LearnError."""
    try:
        stored = safetensors.torch.load_file(path)
    except Exception as error:
        raise LearnError(f"{path} cannot be read as a LoRA ({error}).") from error
    names = [name for name in _names(denoiser).values() if name.endswith(ENDINGS)]
    known = {_called(name, blocks): name for name in names for blocks in (2, _blocks(names))}
    found: State = {}
    for key, tensor in stored.items():
        module, _, part = key.partition(".")
        if module not in known:
            raise LearnError(f"{path} was made for another model: this one has no {module.removeprefix('lora_unet_')}.")
        if part.startswith("lora_"):
            found[f"{known[module]}.lora_{'A' if 'down' in part else 'B'}.weight"] = tensor
    return found
