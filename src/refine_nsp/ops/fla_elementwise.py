"""Run the functions of `norm`, `short_conv` and `swiglu` on flash-linear-attention's Triton kernels (0.6).

They compute in float32 and return the dtype of their inputs, as ours do. This file is imported only where they run, since they need Triton.
"""

from __future__ import annotations

from fla.modules.activations import swiglu
from fla.modules.causal_conv1d import causal_conv1d
from fla.modules.norm.fused_norm_gate import rms_norm_gated as _rms_norm_gated
from fla.modules.norm.l2norm import l2_norm
from fla.modules.norm.layernorm import rms_norm as _rms_norm
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `norm.rms_norm`."""
    return _rms_norm(x, weight, None, eps=eps)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `norm.rms_norm_gated`."""
    return _rms_norm_gated(x, gate, weight, None, eps=eps)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, history: Tensor | None) -> Tensor:
    """See `short_conv.short_conv`."""
    # Their state has a column for each of the W taps, channels first, and the oldest is never read.
    before = None if history is None else F.pad(history.mT, (1, 0)).to(x.dtype).contiguous()
    return causal_conv1d(x.contiguous(), weight.contiguous(), bias, initial_state=before, activation=activation)[0]


__all__ = ["l2_norm", "rms_norm", "rms_norm_gated", "short_conv", "swiglu"]
