"""Embed absolute positions by rotation, half-split: channel i is paired with i + head_dim / 2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cos and sin [B, T, 1, head_dim / 2] for positions [B, T] long, in float32 or better."""
    # In bfloat16 positions beyond 256 are no longer told apart, and angles are wrong long before.
    dtype = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device) / head_dim
    angle = positions[..., None].to(dtype) / theta**exponent
    # The tables are half as wide as a head: both halves turn by the same angles.
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, head_dim] by the tables of `rotary_tables`; keeps x's dtype."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
