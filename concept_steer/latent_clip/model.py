"""Latent-CLIP (Becker et al. 2503.08455): a CLIP whose picture tower reads VAE latents, in plain torch.

The networks are OpenCLIP's ViT-B, with its names of weights; the patch embedding takes the latent's channels. Both
published sizes (`CONFIGS`), the embedded model's small one and any other of this layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spaces import LatentSpace, fit
from .tokenizer import ClipTokenizer


class LatentClip(Protocol):
    """What scoring, ranking and search need: latents and texts as unit vectors of one space."""

    @property
    def space(self) -> LatentSpace:
        """Whose latents it reads."""
        ...

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax (exp of CLIP's logit scale)."""
        ...

    def encode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) -> unit vectors (B, D), fp32. Gradients pass."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (B, D), fp32."""
        ...


@dataclass(frozen=True)
class TowerSize:
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of one latent CLIP. size: the side of the latents it reads, in cells; patch: cells of a patch's side.

    scaled_input: whether the picture tower was trained on scaled latents; the published ones were on unscaled ones.
    """

    embed: int
    vision: TowerSize
    text: TowerSize
    patch: int
    size: int = 64
    channels: int = 4
    vocabulary: int = 49408
    context: int = 77
    quick_gelu: bool = False
    scaled_input: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "vision": vars(self.vision), "text": vars(self.text)}

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> ClipConfig:
        """Errors: TypeError, KeyError for other fields than there are."""
        towers = {name: TowerSize(**stored[name]) for name in ("vision", "text")}
        return ClipConfig(**{**stored, **towers})


CONFIGS = {
    "Latent-ViT-B-8-512": ClipConfig(512, TowerSize(768, 12, 12), TowerSize(512, 12, 8), patch=8),
    "Latent-ViT-B-4-512-plus": ClipConfig(640, TowerSize(768, 12, 12), TowerSize(640, 12, 10), patch=4),
}


class _QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Attention(nn.Module):
    """Self-attention with the names of weights of nn.MultiheadAttention. x: (B, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        rows, length, width = x.shape
        joined = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = joined.view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(rows, length, width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", _QuickGelu() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, size: TowerSize, quick_gelu: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(size.width, size.heads, quick_gelu) for _ in range(size.layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


class PictureTower(nn.Module):
    """Latents (B, C, size, size), at the scale that the tower was trained on -> (B, embed), not normalised."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.vision.width
        places = (config.size // config.patch) ** 2 + 1
        self.conv1 = nn.Conv2d(config.channels, width, config.patch, config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(places, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(config.vision, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed) * width**-0.5)

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.conv1(latents).flatten(2).transpose(1, 2)
        summary = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([summary, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class LatentClipModel(nn.Module):
    """Both towers with their tokenizer: a `LatentClip`. Keys of the state dict: OpenCLIP's, the picture tower's under
    "visual." (the public checkpoints have "visual.latent_vit.", see checkpoint.py)."""

    def __init__(self, config: ClipConfig, space: LatentSpace, tokenizer: ClipTokenizer) -> None:
        super().__init__()
        self.config, self.space, self.tokenizer = config, space, tokenizer
        width = config.text.width
        self.visual = PictureTower(config)
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context, width) * 0.01)
        self.transformer = _Transformer(config.text, config.quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / .07), where CLIP starts

    @property
    def scale(self) -> float:
        return float(self.logit_scale.detach().float().exp())

    def text_features(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, embed), not normalised: what stands at the end token, the highest id of a row."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        ends = ids.argmax(dim=1)
        return x[torch.arange(len(ids), device=x.device), ends] @ self.text_projection

    def encode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W), at least `config.size` high and wide -> unit vectors (B, D), fp32.

        Gradients pass. Errors: ConceptSteerError for another shape, fewer cells, or values that are not finite.
        """
        self.space.check(latents)
        x = fit(latents, self.config.size)
        x = x if self.config.scaled_input else x / self.space.scaling
        weight = self.visual.conv1.weight
        return F.normalize(self.visual(x.to(weight.device, weight.dtype)).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (B, D), fp32. What goes beyond the context (77 tokens) is cut off."""
        ids = self.tokenizer(list(prompts), self.config.context).to(self.token_embedding.weight.device)
        return F.normalize(self.text_features(ids).float(), dim=-1)
