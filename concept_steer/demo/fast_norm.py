"""A GroupNorm for training on CPUs: torch's own backward takes half of a training step in bf16, channels-last.

Same function as `nn.GroupNorm` up to rounding (test: tests/unit/test_demo_training.py); used while training only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):  # type: ignore[override]
        batch, channels = x.shape[:2]
        dims = tuple(range(2, x.ndim))
        count = x[0, 0].numel() * channels // groups
        total = x.sum(dims, dtype=torch.float32).view(batch, groups, -1).sum(2)
        squares = torch.linalg.vector_norm(x, dim=dims, dtype=torch.float32).square().view(batch, groups, -1).sum(2)
        mean = total / count
        rstd = (squares / count - mean.square()).clamp_min(0).add(eps).rsqrt()
        mean_c, rstd_c = (v.repeat_interleave(channels // groups, 1) for v in (mean, rstd))
        scale = rstd_c * weight.float()
        shift = bias.float() - mean_c * scale
        ctx.save_for_backward(x, weight, mean_c, rstd_c)
        ctx.groups, ctx.count = groups, count
        shape = (batch, channels) + (1,) * len(dims)
        return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        dims = tuple(range(2, x.ndim))
        shape = (batch, channels) + (1,) * len(dims)
        sum_g = grad.sum(dims, dtype=torch.float32)
        sum_gx = (grad * x).sum(dims, dtype=torch.float32)
        d_weight = ((sum_gx - mean * sum_g) * rstd).sum(0)
        w = weight.float()

        def group(v):  # (B, C) summed over each group, spread over its channels again
            return v.view(batch, ctx.groups, -1).sum(2).repeat_interleave(channels // ctx.groups, 1)

        g1 = group(sum_g * w) / ctx.count
        g2 = group((sum_gx - mean * sum_g) * rstd * w) / ctx.count
        a = (rstd * w).view(shape).to(x.dtype)
        b = (-rstd * rstd * g2).view(shape).to(x.dtype)
        c = (rstd * (rstd * mean * g2 - g1)).view(shape).to(x.dtype)
        return (
            torch.addcmul(c, x, b).addcmul_(grad, a),
            d_weight.to(weight.dtype),
            sum_g.sum(0).to(weight.dtype),
            None,
            None,
        )


class FastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with a faster backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def speed_up(module: Any) -> Any:
    """Turn every GroupNorm of `module` into a FastGroupNorm, in place; weights and state-dict keys stay."""
    for child in module.modules():
        if type(child) is nn.GroupNorm:
            child.__class__ = FastGroupNorm
    return module
