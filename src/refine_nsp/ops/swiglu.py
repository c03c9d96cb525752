"""Compute silu(gate) * up, keeping only its inputs for the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.kernels import fused


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up by its definition."""
    return gate * torch.sigmoid(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up elementwise, for any equal shapes."""
    if fused(gate):
        from fla.modules.activations import swiglu as kernel

        return kernel(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @by_hand
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        gate, up = ctx.saved_tensors
        # silu is computed once more, since keeping it from the forward would be a third tensor of the MLP's width for every layer. Passes
        # over memory cost the time here: so products are in place on fresh results, and the derivative is torch's own kernel.
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
