"""One update of LaCT's fast weights (Zhang et al. 2025, arXiv 2505.23884): a SwiGLU network per head, f(x) = w1 (silu(w0 x) * (w2 x)),
that is read by queries and trained on keys and values, a large chunk at a time. `ops/lact.py` runs it over a sequence.

One update, with gradient terms of the dot-product loss, per-token learning rates lr and the chunk's mean momentum m:
d = gradient + m d_prev; [Newton-Schulz of d, not fed back into the momentum]; w <- w + d, every row rescaled to its initial norm.
With pre-norm the sum runs on unnormalised main weights. Fast weights are kept in float32 or better; matrix products run in the
dtype of keys and values, as in the original.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refine_nsp.ops.precision import without_autocast

NORM_EPSILON = 1e-5
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Triple(NamedTuple):
    """Something for each of w0 [.., Dh, D], w1 [.., D, Dh] and w2 [.., Dh, D]."""

    w0: Tensor
    w1: Tensor
    w2: Tensor


class FastState(NamedTuple):
    """weights: what queries read; main: unnormalised sums (pre-norm only); momentum: last d (momentum only)."""

    weights: Triple
    main: Triple | None
    momentum: Triple | None


class UpdateRule(NamedTuple):
    """muon: None, or the dtype of Newton-Schulz (bfloat16 as published, or float32: at least that)."""

    momentum: bool
    muon: torch.dtype | None
    prenorm: bool


def row_norms(weights: Triple) -> Triple:
    """Norm of every row (last axis) of each weight, kept as [.., 1]."""
    return Triple(*(w.norm(dim=-1, keepdim=True) for w in weights))


def initial_state(weights: Triple, rule: UpdateRule) -> FastState:
    """The state before any update."""
    zeros = Triple(*(torch.zeros_like(w) for w in weights)) if rule.momentum else None
    return FastState(weights, weights if rule.prenorm else None, zeros)


def read(weights: Triple, q: Tensor) -> Tensor:
    """f(q): q [.., T, D] -> [.., T, D], in q's dtype."""
    w0, w1, w2 = (w.to(q.dtype) for w in weights)  # kept wide, multiplied narrow: as the original does
    return (F.silu(q @ w0.mT) * (q @ w2.mT)) @ w1.mT


def gradient_terms(weights: Triple, k: Tensor, v: Tensor, lr: Triple) -> Triple:
    """lr-weighted descent direction of -<f(k), v> summed over the chunk.

    k, v: [.., C, D]; lr: [.., C, 1] (or a width that broadcasts) for each weight.
    """
    w0, w1, w2 = (w.to(k.dtype) for w in weights)
    # Written out, not left to autograd: an update is part of the forward pass, and the outer backward differentiates through it.
    hidden, dgate, dup = hidden_terms(k @ w0.mT, k @ w2.mT, v @ w1)
    d1 = v.mT @ (hidden * lr.w1).to(v.dtype)
    d0 = dgate.mT @ (k * lr.w0).to(k.dtype)
    d2 = dup.mT @ (k * lr.w2).to(k.dtype)
    return Triple(d0, d1, d2)


def newton_schulz(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate orthogonalisation of each matrix g [.., a, b] (Muon), computed in `dtype`."""
    x = g.to(dtype)
    # The Gram matrix below has the size of the rows: transposed, it is the smaller of the two.
    wide = x.shape[-2] > x.shape[-1]
    if wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values of at most 1, where the polynomials converge
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


def update(
    state: FastState, norms: Triple, k: Tensor, v: Tensor, lr: Triple, momentum: Tensor | None, rule: UpdateRule
) -> FastState:
    """The state after one chunk of keys and values [.., C, D]; `norms` from `row_norms` of the initial weights.

    momentum: [.., C, 1], averaged over the chunk; None without.
    """
    step = gradient_terms(state.weights, k, v, lr)
    kept = None
    if rule.momentum:
        assert momentum is not None and state.momentum is not None
        mean = momentum.mean(-2, keepdim=True)
        # The momentum that is kept is that before Newton-Schulz, which would otherwise be fed its own output.
        step = kept = Triple(*(d + m * mean for d, m in zip(step, state.momentum, strict=True)))
    if rule.muon is not None:
        # A choice of float32 means "exact": in a float64 run that is float64.
        dtype = rule.muon if rule.muon == torch.bfloat16 else torch.promote_types(k.dtype, rule.muon)
        step = Triple(*(newton_schulz(d, dtype) for d in step))
    start = state.main if state.main is not None else state.weights
    moved = Triple(*(w + d for w, d in zip(start, step, strict=True)))
    # Rows keep the norms they began with: without this the weights would grow with every chunk.
    scaled = (with_row_norms(w, n) for w, n in zip(moved, norms, strict=True))
    return FastState(Triple(*scaled), moved if rule.prenorm else None, kept)


# --- elementwise parts with hand-written backwards: on a CPU they cost memory passes, not arithmetic, so few are made ---------


def naive_hidden_terms(gate: Tensor, up: Tensor, dhidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden = silu(gate) up, and the gradients of gate and up for hidden's gradient `dhidden`; all [.., C, Dh]."""
    sigma = torch.sigmoid(gate)
    return gate * sigma * up, dhidden * up * sigma * (1 + gate * (1 - sigma)), dhidden * gate * sigma


def naive_with_row_norms(w: Tensor, norms: Tensor) -> Tensor:
    """w [.., a, b], its rows made as long as `norms` [.., a, 1] says."""
    return w / (w.norm(dim=-1, keepdim=True) + NORM_EPSILON) * norms


def hidden_terms(gate: Tensor, up: Tensor, dhidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`naive_hidden_terms`, in the inputs' dtype."""
    return _HiddenTerms.apply(gate, up, dhidden)


def with_row_norms(w: Tensor, norms: Tensor) -> Tensor:
    """`naive_with_row_norms`; norms may broadcast."""
    return _WithRowNorms.apply(w, norms)


class _HiddenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, dhidden: Tensor) -> Any:
        ctx.save_for_backward(gate, up, dhidden)
        active = F.silu(gate)
        return active * up, torch.ops.aten.silu_backward(dhidden * up, gate), active.mul_(dhidden)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, of_hidden: Tensor, of_dgate: Tensor, of_dup: Tensor) -> Any:
        gate, up, dhidden = ctx.saved_tensors
        sigma = torch.sigmoid(gate)
        active = gate * sigma
        rest = active * sigma
        slope = (sigma + active).sub_(rest)
        curve = (sigma + slope).sub_(rest).mul_(1 - sigma)  # the slope's slope
        sloped = of_dgate * slope
        of_up = (of_hidden * active).addcmul_(sloped, dhidden)
        of_dhidden = (of_dup * active).addcmul_(sloped, up)
        of_gate = curve.mul_(of_dgate).mul_(up).addcmul_(slope, of_dup).mul_(dhidden)
        return of_gate.addcmul_(slope.mul_(of_hidden), up), of_up, of_dhidden


class _WithRowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, n: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        ctx.save_for_backward(w, n, norm)
        return w * (n / (norm + NORM_EPSILON))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        w, n, norm = ctx.saved_tensors
        factor = 1 / (norm + NORM_EPSILON)
        dn = (dy * w).sum(-1, keepdim=True) * factor
        # A row of zeros has no direction to follow; its dn is 0 already.
        along = dn * factor * n / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return (dy * (n * factor)).addcmul_(w, along, value=-1.0), dn.sum_to_size(n.shape)
