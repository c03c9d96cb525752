"""Normalise with hand-written backwards, which make few passes over memory: these, not arithmetic, cost time on a CPU.

Statistics are in float32 or better; results have the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.kernels import norm_runs


def naive_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def naive_rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute rms_norm(x) * weight * silu(gate)."""
    return naive_rms_norm(x, weight, eps) * F.silu(gate)


def naive_l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute x / sqrt(sum(x^2) + eps) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute x [..., D] / sqrt(mean(x^2) + eps) * weight [D] (or none)."""
    if norm_runs(x):
        from fla.modules.norm.layernorm import rms_norm as kernel

        return kernel(x, weight, None, eps=eps)
    return _ScaledNorm.apply(x, weight, eps, x.shape[-1])


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute x [..., D] / sqrt(sum(x^2) + eps), as flash-linear-attention's kernels normalise q and k."""
    if norm_runs(x):
        from fla.modules.norm.l2norm import l2_norm as kernel

        return kernel(x, eps)
    return _ScaledNorm.apply(x, None, eps, 1)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute rms_norm(x) * weight * silu(gate), all [..., D]."""
    if norm_runs(x):
        from fla.modules.norm.fused_norm_gate import rms_norm_gated as kernel

        return kernel(x, gate, weight, None, eps=eps).to(gate.dtype)
    return rms_norm(x, weight, eps).to(gate.dtype) * F.silu(gate)


class _ScaledNorm(torch.autograd.Function):
    """Computes x * (sum(x^2) / divisor + eps)^-1/2 * weight."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor | None, eps: float, divisor: int) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        xw = x.to(wide)
        # vector_norm reads x once; a mean of squares would write and read another tensor of its size.
        inverse = torch.linalg.vector_norm(xw, dim=-1, keepdim=True).square_().div_(divisor).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)  # x, not xw: in bfloat16 half as large, and cast again in no time
        ctx.kept = divisor
        y = xw * inverse
        if weight is not None:
            y *= weight.to(wide)
        return y.to(x.dtype)

    @staticmethod
    @by_hand
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        x, weight, inverse = ctx.saved_tensors
        wide, D = inverse.dtype, x.shape[-1]
        xw, dyw, r = x.to(wide).reshape(-1, D), dy.to(wide).reshape(-1, D), inverse.reshape(-1, 1)
        product = dyw * xw
        # Both reductions of dy * x are matrix-vector products: the gradient of the weight, and of the norm.
        if weight is None:
            dot, dweight = product.sum(-1, keepdim=True), None
            dx = dyw * r
        else:
            w = weight.to(wide)
            dot, dweight = (product @ w)[:, None], (r[:, 0] @ product).to(weight.dtype)
            dx = torch.mul(dyw, w, out=product).mul_(r)  # its two sums are taken, so the buffer is free
        # dx = r w dy - x r^3 / divisor * sum(x w dy), r = (sum(x^2) / divisor + eps)^-1/2.
        dx.addcmul_(xw, dot.mul_(r.pow(3)).div_(ctx.kept), value=-1.0)
        return dx.to(x.dtype).view_as(x), dweight, None, None
