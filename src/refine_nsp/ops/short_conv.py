"""Compute the short causal convolution of each channel in front of q, k and v: W (mostly 4) shifted multiply-adds, on [B, T, D].

PyTorch's own convolution takes [B, D, T], which costs two transposes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.kernels import fused


def naive_short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, history: Tensor | None = None
) -> Tensor:
    """Compute y[t] = activation(bias + sum_i weight[:, i] * x[t - W + 1 + i]) by conv1d; same arguments as `short_conv`."""
    W = weight.shape[1]
    before = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if history is None else history
    y = F.conv1d(torch.cat([before, x], 1).mT, weight[:, None], bias, groups=x.shape[2]).mT
    return F.silu(y) if activation == "silu" else y


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, history: Tensor | None = None) -> Tensor:
    """Convolve x over time, causally and each channel by itself.

    Args:
        x: [B, T, D].
        weight: [D, W], the last tap is the current token.
        bias: [D] or None.
        activation: "silu" or None.
        history: [B, W - 1, D], the inputs before x (None: zeros).
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if fused(x):
        from fla.modules.causal_conv1d import causal_conv1d

        # Its state has a column for each of the W taps, channels first, and the oldest is never read.
        before = None if history is None else F.pad(history.mT, (1, 0)).to(x.dtype).contiguous()
        return causal_conv1d(x.contiguous(), weight.contiguous(), bias, initial_state=before, activation=activation)[0]
    return _ShortConv.apply(x, weight, bias, activation == "silu", history)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None) -> Tensor:
        z = _convolve(x, weight, bias, history)
        ctx.save_for_backward(x, weight, bias, history, z if silu else None)
        return F.silu(z) if silu else z

    @staticmethod
    @by_hand
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        x, weight, bias, history, z = ctx.saved_tensors
        T, W = x.shape[1], weight.shape[1]
        dz = dy if z is None else torch.ops.aten.silu_backward(dy, z)
        wide, taps = x.to(dz.dtype), _taps(weight, dz.dtype)
        dx = dz * taps[-1]
        dtaps = torch.zeros_like(taps)
        buffer = dz * wide  # it holds the products of one tap after another; what a tap does not reach is set to zero
        dtaps[-1] = _sum_rows(buffer)
        for tap, back in _reaching(W, T):
            dx[:, : T - back].addcmul_(dz[:, back:], taps[tap])
            torch.mul(dz[:, back:], wide[:, : T - back], out=buffer[:, back:])
            buffer[:, back - 1] = 0.0
            dtaps[tap] = _sum_rows(buffer)
        dhistory = None
        if history is not None:
            dhistory = torch.zeros_like(history)
            for tap, start, count in _history_taps(W, T):
                dhistory[:, start : start + count].addcmul_(dz[:, :count], taps[tap])
                dtaps[tap] += (dz[:, :count] * history[:, start : start + count]).sum((0, 1))
        dbias = None if bias is None else _sum_rows(dz).to(bias.dtype)
        return dx.to(x.dtype), dtaps.T.to(weight.dtype), dbias, None, dhistory


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out the taps as [W, D], a tap's channels side by side: strided ones cost two to three times as much."""
    return weight.to(dtype).T.contiguous()


def _reaching(W: int, T: int) -> list[tuple[int, int]]:
    """List (tap, how many tokens back it looks) for the taps that reach into x; fewer than W - 1 if there are fewer tokens."""
    return [(W - 1 - back, back) for back in range(1, min(W, T))]


def _history_taps(W: int, T: int) -> list[tuple[int, int, int]]:
    """List (tap, first history slot, tokens): tap i of tokens 0..count-1 falls on history slots i..i+count-1."""
    return [(tap, tap, min(W - 1 - tap, T)) for tap in range(W - 1)]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
    T, W = x.shape[1], weight.shape[1]
    x = x.to(torch.promote_types(x.dtype, weight.dtype))  # once, not in every product of different dtypes
    taps = _taps(weight, x.dtype)
    z = x * taps[-1]
    for tap, back in _reaching(W, T):
        z[:, back:].addcmul_(x[:, : T - back], taps[tap])
    if history is not None:
        for tap, start, count in _history_taps(W, T):
            # Histories are states, which may be wider than what the layer computes in.
            z[:, :count].addcmul_(history[:, start : start + count].to(z.dtype), taps[tap])
    return z if bias is None else z.add_(bias)


def _sum_rows(x: Tensor) -> Tensor:
    """Sum [..., D] to [D] by a matrix product, several times faster on a CPU than a sum over the outer axes."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.new_ones(1, len(rows)).mm(rows)[0]
