"""Compute silu(gate) * up, keeping only its inputs for the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients
from refine_nsp.ops.kernels import fused
from refine_nsp.ops.precision import without_autocast


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up by its definition."""
    return gate * torch.sigmoid(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up elementwise, for any equal shapes."""
    if fused(gate):
        from refine_nsp.ops import fla_elementwise

        return fla_elementwise.swiglu(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        gate, up = ctx.saved_tensors
        # silu is computed once more, since keeping it from the forward would be a third tensor of the MLP's width for every layer. Passes
        # over memory cost the time here: so products are in place on fresh results, and the derivative is torch's own kernel.
        dup = F.silu(gate).mul_(dy)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dup
