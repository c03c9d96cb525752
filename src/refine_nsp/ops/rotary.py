"""Embed absolute positions by rotation, half-split: channel i is paired with i + head_dim / 2."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_nsp.ops.autograd import Context, Gradients


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cos and sin [B, T, 1, head_dim / 2] for positions [B, T] long, in float32 or better."""
    # In bfloat16 positions beyond 256 are no longer told apart, and angles are wrong long before.
    dtype = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device) / head_dim
    angle = positions[..., None].to(dtype) / theta**exponent
    # The tables are half as wide as a head: both halves turn by the same angles.
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def naive_apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `apply_rotary` by its definition."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, head_dim] by the tables of `rotary_tables`, which get no gradient; keeps x's dtype."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Rotates in few passes over memory; its gradient is the rotation back, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        wide = x.to(cos.dtype)
        (a, b), y = wide.chunk(2, -1), torch.empty_like(wide)
        torch.mul(a, cos, out=y.chunk(2, -1)[0]).addcmul_(b, sin, value=-1.0)
        torch.mul(b, cos, out=y.chunk(2, -1)[1]).addcmul_(a, sin)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(dy, cos, -sin), None, None
