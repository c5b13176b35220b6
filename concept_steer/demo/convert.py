"""Key names: diffusers' layout to the original latent-diffusion ("ldm") layout that ComfyUI and A1111 read, and back.

Both directions are one-to-one renamings (and a reshape of the VAE's attention matrices), so a round trip is exact.
"""

from __future__ import annotations

import re

from torch import Tensor

from ..unet_names import unet_key

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
PICTURE_PREFIX = "latent_clip."
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_key(key: str, levels: int = 4) -> str:
    """The ldm name of one diffusers AutoencoderKL key."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        key = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return key


def _is_vae_attention(key: str) -> bool:
    return key.endswith(".weight") and (".mid.attn_1." in key) and ".norm." not in key


def to_ldm(unet, vae, text, picture, attention_up: tuple[bool, ...] = (False, False, False)) -> dict[str, Tensor]:
    """One state dict in ldm layout from diffusers' and transformers' state dicts (any dtype, kept)."""
    out = {UNET_PREFIX + unet_key(key, attention_up=attention_up): value for key, value in unet.items()}
    for key, value in vae.items():
        name = vae_key(key)
        out[VAE_PREFIX + name] = value[:, :, None, None] if _is_vae_attention(name) else value
    out |= {(PICTURE_PREFIX if key.startswith("text_projection") else TEXT_PREFIX) + key: v for key, v in text.items()}
    out |= {PICTURE_PREFIX + key: value for key, value in picture.items()}
    return {key: value.contiguous() for key, value in out.items()}


def from_ldm(
    state: dict[str, Tensor], unet_keys, vae_keys, attention_up: tuple[bool, ...] = (False, False, False)
) -> dict[str, dict[str, Tensor]]:
    """The inverse of `to_ldm`: {"unet", "vae", "text", "picture"}; key lists come from the modules to be filled."""
    unet = {key: state[UNET_PREFIX + unet_key(key, attention_up=attention_up)] for key in unet_keys}
    vae = {}
    for key in vae_keys:
        name = vae_key(key)
        value = state[VAE_PREFIX + name]
        vae[key] = value[:, :, 0, 0] if _is_vae_attention(name) else value
    text = {key[len(TEXT_PREFIX) :]: value for key, value in state.items() if key.startswith(TEXT_PREFIX)}
    picture = {key[len(PICTURE_PREFIX) :]: value for key, value in state.items() if key.startswith(PICTURE_PREFIX)}
    text |= {key: picture.pop(key) for key in list(picture) if key.startswith("text_projection")}
    return {"unet": unet, "vae": vae, "text": text, "picture": picture}
