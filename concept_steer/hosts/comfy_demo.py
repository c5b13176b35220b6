"""The embedded model in ComfyUI's own classes: MODEL, CLIP and VAE that every stock node can use.

ComfyUI's checkpoint loader knows only fixed sizes of text encoder and VAE, so a small model brings its own loader.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from ..demo import architecture, convert, model, student
from ..errors import ConceptSteerError

_WIDTHS = architecture.UNET["block_out_channels"]
_VAE_WIDTHS = architecture.VAE["block_out_channels"]
UNET: dict[str, Any] = {
    "image_size": architecture.LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": _WIDTHS[0],
    "channel_mult": [width // _WIDTHS[0] for width in _WIDTHS],
    "num_res_blocks": [1] * len(_WIDTHS),
    "transformer_depth": [0] * len(_WIDTHS),
    "transformer_depth_output": [0] * (2 * len(_WIDTHS)),
    "transformer_depth_middle": 1,
    "context_dim": architecture.TEXT_WIDTH,  # ComfyUI's detection looks in the input blocks, which have none
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
}
VAE: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 8 * architecture.LATENT,
    "in_channels": 3,
    "out_ch": 3,
    "ch": _VAE_WIDTHS[0],
    "ch_mult": [width // _VAE_WIDTHS[0] for width in _VAE_WIDTHS],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class DemoLatents(comfy.latent_formats.LatentFormat):
    """The scale of the latents, and colours for ComfyUI's live preview where the model file has them."""

    def __init__(self, scale: float = 1.0, colours: Any = None) -> None:
        self.scale_factor = scale
        if colours:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = colours[:4], colours[4]


class DemoConfig(comfy.supported_models_base.BASE):
    """What ComfyUI needs to know of the UNet; SD's noise schedule and epsilon prediction are its defaults."""

    unet_config = UNET
    unet_extra_config: ClassVar[dict[str, int]] = {
        "num_heads": architecture.UNET["attention_head_dim"],
        "num_head_channels": -1,
    }
    latent_format = DemoLatents
    memory_usage_factor = 1.0


class DemoPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that refuses a LoRA of another model in words, instead of ignoring it."""

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        check_lora(patches, self.model.state_dict())
        return super().add_patches(patches, strength_patch, strength_model)


def check_lora(patches: Any, weights: Any) -> None:
    """ConceptSteerError when nothing of a LoRA fits these weights, or a part has another shape."""
    if not patches:
        raise ConceptSteerError(
            "This LoRA was made for another model: none of its weights is in the embedded demo model. "
            "Use it with the model it was trained on."
        )
    for key, patch in patches.items():
        name = key if isinstance(key, str) else key[0]
        parts = getattr(patch, "weights", None)
        if name not in weights or not isinstance(parts, (tuple, list)) or len(parts) < 2:
            continue
        up, down = parts[0], parts[1]
        if not all(isinstance(part, torch.Tensor) and part.ndim > 1 for part in (up, down)):
            continue
        found, wanted = (up.shape[0], down.flatten(1).shape[1]), tuple(weights[name].flatten(1).shape)
        if found != wanted:
            raise ConceptSteerError(
                f"This LoRA was made for another model: for {name} it has {found}, the embedded demo model {wanted}. "
                "Use it with the model it was trained on."
            )


class _Target:
    """ComfyUI's way to name the classes of a text encoder."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.clip, self.tokenizer = clip, tokenizer
        self.params: dict[str, Any] = {}


def load(path: Path = model.MODEL_FILE, one_step: bool = False) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of the embedded model; ConceptSteerError when its file is missing or another's.

    one_step: with the UNet of its student.
    """
    state, metadata = model.read(path)
    if one_step:
        state = {**state, **student.read()}
    unet, vae, text = _parts(state)
    colours = json.loads(metadata.get("demo.latent_rgb", "null"))
    latents = DemoLatents(float(metadata["demo.scaling_factor"]), colours)
    vae_config = {"params": {"ddconfig": VAE, "embed_dim": 4}}
    return _model(unet, latents), _clip(text, metadata), comfy.sd.VAE(vae, config=vae_config)


def _parts(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    unet, vae, text = (
        {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        for prefix in (convert.UNET_PREFIX, convert.VAE_PREFIX, convert.TEXT_PREFIX)
    )
    text["text_projection.weight"] = state[convert.PICTURE_PREFIX + "text_projection.weight"]
    return unet, vae, text


def _model(weights: dict[str, Any], latents: DemoLatents) -> Any:
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    config = DemoConfig(UNET)
    config.latent_format = latents
    dtype = comfy.model_management.unet_dtype(model_params=12_000_000, supported_dtypes=[torch.float16, torch.float32])
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, [torch.float32]))
    made = config.get_model({}, "", device=offload)
    made.load_model_weights(dict(weights), "")
    return DemoPatcher(made, load_device=device, offload_device=offload)


def _clip(weights: dict[str, Any], metadata: dict[str, str]) -> Any:
    vocabulary = json.loads(metadata["tokenizer.vocab"])
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    config = {**architecture.TEXT, "vocab_size": len(vocabulary), "eos_token_id": end}

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=config,
                special_tokens={"start": start, "end": end, "pad": end},
                model_options=model_options or {},
            )
            # ComfyUI's class always makes CLIP's 49,408 rows
            table = self.operations.Embedding(len(vocabulary), architecture.TEXT_WIDTH, dtype=dtype, device=device)
            self.transformer.set_input_embeddings(table)

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device, dtype=dtype, model_options=model_options or {}, clip_name="demo", clip_model=Encoder
            )

    with tempfile.TemporaryDirectory() as folder:
        files = str(model.write_tokenizer(metadata, Path(folder)))

        class Words(comfy.sd1_clip.SDTokenizer):
            def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
                super().__init__(
                    files,
                    embedding_directory=embedding_directory,
                    embedding_size=architecture.TEXT_WIDTH,
                    embedding_key="clip_demo",
                    tokenizer_data=tokenizer_data or {},
                )

        class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
            def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
                super().__init__(embedding_directory, tokenizer_data or {}, clip_name="demo", tokenizer=Words)

        clip = comfy.sd.CLIP(_Target(Model, Tokenizer), embedding_directory=_embeddings())
    missing, _ = clip.cond_stage_model.load_sd(weights)
    wanted = [key for key in missing if "position_ids" not in key]
    if wanted:
        raise ConceptSteerError(f"The embedded model's text encoder lacks {', '.join(wanted[:3])}: reinstall it.")
    return clip


def _embeddings() -> Any:
    import folder_paths

    return folder_paths.get_folder_paths("embeddings")
