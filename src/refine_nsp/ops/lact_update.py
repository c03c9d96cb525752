"""Update LaCT's fast weights once (Zhang et al. 2025, arXiv 2505.23884).

They are a SwiGLU network per head, f(x) = w1 (silu(w0 x) * (w2 x)), which queries read and which is trained on keys and values, a large
chunk at a time (`ops/lact.py`). One update, with gradient terms of the dot-product loss, per-token learning rates lr and the chunk's mean
momentum m:
d = gradient + m d_prev; [Newton-Schulz of d, not fed back into the momentum]; w <- w + d, every row rescaled to its initial norm.
With pre-norm the sum runs on unnormalised main weights. Fast weights are kept in float32 or better; matrix products run in the
dtype of keys and values, as in the original.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand

NORM_EPSILON = 1e-5
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Triple(NamedTuple):
    """Holds a tensor for each of w0 [.., Dh, D], w1 [.., D, Dh] and w2 [.., Dh, D]."""

    w0: Tensor
    w1: Tensor
    w2: Tensor


class Pair(NamedTuple):
    """Holds a `Triple` with w0 above w2, [.., 2 Dh, D], so that one product, faster than two, multiplies queries or keys by both."""

    w02: Tensor
    w1: Tensor

    @classmethod
    def of(cls, weights: Triple) -> Pair:
        """Put w0 and w2 together."""
        return cls(torch.cat([weights.w0, weights.w2], -2), weights.w1)

    def of_rows(self, B: int) -> Pair:
        """Expand weights of one row to B rows, without copying."""
        return Pair(*(w.expand(B, -1, -1, -1) for w in self))

    def parts(self) -> Triple:
        """Take w0, w1 and w2 apart."""
        w0, w2 = self.w02.chunk(2, -2)
        return Triple(w0, self.w1, w2)


class FastState(NamedTuple):
    """Holds the fast weights that queries read, their unnormalised sums (`main`, pre-norm only) and the last d (`momentum`, if any)."""

    weights: Pair
    main: Pair | None
    momentum: Pair | None


class UpdateRule(NamedTuple):
    """Says how weights are updated. muon: None, or the dtype of Newton-Schulz (bfloat16 as published, or float32: at least that)."""

    momentum: bool
    muon: torch.dtype | None
    prenorm: bool

    def muon_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Choose the dtype of Newton-Schulz for keys of a dtype: float32 asks for exact results, which in a float64 run is float64."""
        return self.muon if self.muon in (None, torch.bfloat16) else torch.promote_types(dtype, self.muon)


def row_norms(weights: Pair) -> Pair:
    """Compute the norm of every row (last axis) of each weight, kept as [.., 1]."""
    return Pair(*(w.norm(dim=-1, keepdim=True) for w in weights))


def initial_state(weights: Pair, rule: UpdateRule) -> FastState:
    """Make the state before any update."""
    zeros = Pair(*(torch.zeros_like(w) for w in weights)) if rule.momentum else None
    return FastState(weights, weights if rule.prenorm else None, zeros)


def read(weights: Pair, q: Tensor) -> Tensor:
    """Compute f(q) of queries [.., T, D], in their dtype."""
    w02, w1 = (w.to(q.dtype) for w in weights)  # kept wide and multiplied narrow, as the original does
    return (w1 @ gated(w02 @ q.mT)).mT


def gradient_terms(weights: Pair, k: Tensor, v: Tensor, lr: Tensor) -> Pair:
    """Compute the descent direction of -<f(k), v>, weighted by lr and summed over the chunk.

    k, v: [.., C, D]; lr: [.., C, 3 * width], the rates of w0, w1 and w2 side by side; width 1, or that of the weights' last axis.
    """
    w02, w1 = (w.to(k.dtype) for w in weights)
    # Written out, not left to autograd: an update is part of the forward pass, and the outer backward differentiates through it.
    hidden, dx = hidden_terms(w02 @ k.mT, w1.mT @ v.mT, lr.mT)
    d1 = (hidden @ v).mT
    if lr.shape[-1] == 3:
        return Pair(dx @ k, d1)
    # A rate for every channel of the keys, so w0 and w2 are not taught by the same ones.
    dgate, dup = dx.chunk(2, -2)
    of_w0, _, of_w2 = lr.chunk(3, -1)
    return Pair(torch.cat([dgate @ (k * of_w0).to(k.dtype), dup @ (k * of_w2).to(k.dtype)], -2), d1)


def newton_schulz(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonalise each matrix g [.., a, b] approximately (Muon), in `dtype`."""
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


def orthogonal(step: Pair, dtype: torch.dtype) -> Pair:
    """Apply `newton_schulz` to the parts of w0, w1 and w2 at once: w1's has their shape, transposed where it is not square."""
    w02 = step.w02.unflatten(-2, (2, -1))
    square = step.w1.shape[-1] == step.w1.shape[-2]
    # It is not transposed where it need not be: in bfloat16 it would be rounded differently than published.
    w1 = step.w1 if square else step.w1.mT
    w02, w1 = newton_schulz(torch.cat([w02, w1.unsqueeze(-3)], -3), dtype).split([2, 1], -3)
    w1 = w1.squeeze(-3)
    return Pair(w02.flatten(-3, -2), w1 if square else w1.mT)


def update(
    state: FastState, norms: Pair, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, rule: UpdateRule
) -> FastState:
    """Compute the state after one chunk of keys and values [.., C, D]; `norms` come from `row_norms` of the initial weights.

    lr: see `gradient_terms`. momentum: [.., C, 1], averaged over the chunk; None without.
    """
    step = gradient_terms(state.weights, k, v, lr)
    kept = None
    if rule.momentum:
        assert momentum is not None and state.momentum is not None
        mean = momentum.mean(-2, keepdim=True)
        # The momentum is kept as it is before Newton-Schulz, which would otherwise be fed its own output.
        step = kept = Pair(*(m * mean + d for d, m in zip(step, state.momentum, strict=True)))
    if (dtype := rule.muon_dtype(k.dtype)) is not None:
        step = orthogonal(step, dtype)
    start = state.main if state.main is not None else state.weights
    moved = Pair(*(w + d for w, d in zip(start, step, strict=True)))
    # Rows keep the norms they began with: without this the weights would grow with every chunk.
    scaled = (with_row_norms(w, n) for w, n in zip(moved, norms, strict=True))
    return FastState(Pair(*scaled), moved if rule.prenorm else None, kept)


def naive_read(weights: Pair, q: Tensor) -> Tensor:
    """Compute `read` by its definition."""
    w0, w1, w2 = (w.to(q.dtype) for w in weights.parts())
    return (F.silu(q @ w0.mT) * (q @ w2.mT)) @ w1.mT


def naive_update(
    state: FastState, norms: Pair, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, rule: UpdateRule
) -> FastState:
    """Compute `update` by its definition."""
    mains = (state.weights if state.main is None else state.main).parts()
    momenta = None if state.momentum is None else state.momentum.parts()
    rates, lengths, dtype = lr.chunk(3, -1), norms.parts(), rule.muon_dtype(k.dtype)
    w0, w1, w2 = (w.to(k.dtype) for w in state.weights.parts())
    hidden, dgate, dup = naive_hidden_terms(k @ w0.mT, k @ w2.mT, v @ w1)
    steps = [dgate.mT @ (k * rates[0]).to(k.dtype), v.mT @ (hidden * rates[1]).to(v.dtype), dup.mT @ (k * rates[2]).to(k.dtype)]
    after: list[list[Tensor]] = [[], [], []]
    for i, step in enumerate(steps):
        if momentum is not None and momenta is not None:
            step = step + momenta[i] * momentum.mean(-2, keepdim=True)
            after[2].append(step)
        after[1].append(mains[i] + (step if dtype is None else newton_schulz(step, dtype)))
        after[0].append(naive_with_row_norms(after[1][-1], lengths[i]))
    pairs = [Pair.of(Triple(*parts)) if parts else None for parts in after]
    assert pairs[0] is not None
    return FastState(pairs[0], pairs[1] if rule.prenorm else None, pairs[2])


def naive_hidden_terms(gate: Tensor, up: Tensor, dhidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute hidden = silu(gate) up, and the gradients of gate and up for hidden's gradient `dhidden`; all [.., C, Dh]."""
    sigma = torch.sigmoid(gate)
    return gate * sigma * up, dhidden * up * sigma * (1 + gate * (1 - sigma)), dhidden * gate * sigma


def naive_with_row_norms(w: Tensor, norms: Tensor) -> Tensor:
    """Scale the rows of w [.., a, b] to the norms [.., a, 1]."""
    return w / (w.norm(dim=-1, keepdim=True) + NORM_EPSILON) * norms


def gated(x: Tensor) -> Tensor:
    """Compute silu(gate) up, for gate above up in x [.., 2 Dh, C]: with tokens last, both are whole stretches of memory."""
    return _Gated.apply(x)


def hidden_terms(x: Tensor, dhidden: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `naive_hidden_terms` for gate above up in x [.., 2 Dh, C], tokens last, weighted by learning rates.

    Args:
        dhidden: [.., Dh, C]. lr: [.., 3 * width, C], the rates of w0, w1 and w2 above each other; width 1 or Dh.

    Returns:
        hidden times w1's rate [.., Dh, C], and the gradient of x, which for width 1 has the rates of w0 and w2 in it. In x's dtype.
    """
    return _HiddenTerms.apply(x, dhidden, lr)


def with_row_norms(w: Tensor, norms: Tensor) -> Tensor:
    """Compute `naive_with_row_norms`; norms may broadcast."""
    return _WithRowNorms.apply(w, norms)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -2)
        return F.silu(gate).mul_(up)

    @staticmethod
    @by_hand
    def backward(ctx: Context, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _gradient_of_gated(x, F.silu(x.chunk(2, -2)[0]), dy)


def _gradient_of_gated(x: Tensor, active: Tensor, dy: Tensor) -> Tensor:
    """Compute the gradient of x, for the gradient `dy` of active times up."""
    gate, up = x.chunk(2, -2)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, -2)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    torch.mul(active, dy, out=dup)
    return dx


class _HiddenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, dhidden: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dhidden, lr)
        gate, up = x.chunk(2, -2)
        active = F.silu(gate)
        dx = _gradient_of_gated(x, active, dhidden)
        if lr.shape[-2] == 3:
            dx.unflatten(-2, (2, -1)).mul_(lr[..., ::2, :].unsqueeze(-2))
        return active.mul_(up).mul_(lr.chunk(3, -2)[1]), dx

    @staticmethod
    @by_hand
    def backward(ctx: Context, of_hidden: Tensor, of_dx: Tensor) -> Gradients:
        x, h, lr = ctx.saved_tensors
        gate, up = x.chunk(2, -2)
        sigma = torch.sigmoid(gate)
        active = gate * sigma
        rest = active * sigma
        slope = (sigma + active).sub_(rest)
        curve = (sigma + slope).sub_(rest).mul_(1 - sigma)  # the slope's slope
        # A rate's gradient is what the rate weighs, times the gradient of that.
        dlr = torch.zeros_like(lr)
        of_w1, dlr_w1 = lr.chunk(3, -2)[1], dlr.chunk(3, -2)[1]
        weighed = (active * up).mul_(of_hidden)
        dlr_w1.copy_(weighed.sum(-2, True, dtype=lr.dtype) if of_w1.shape[-2] == 1 else weighed)
        of_hidden = (of_hidden * of_w1).to(x.dtype)
        if lr.shape[-2] == 3:
            weighed = torch.empty_like(x)
            torch.mul(h * up, slope, out=weighed.chunk(2, -2)[0])
            torch.mul(h, active, out=weighed.chunk(2, -2)[1])
            torch.sum(weighed.mul_(of_dx).unflatten(-2, (2, -1)), -2, dtype=lr.dtype, out=dlr[..., ::2, :])
            of_dx = (of_dx.unflatten(-2, (2, -1)) * lr[..., ::2, :].unsqueeze(-2)).to(x.dtype).flatten(-3, -2)
        of_dgate, of_dup = of_dx.chunk(2, -2)
        dx = torch.empty_like(x)
        sloped = of_dgate * slope
        torch.addcmul(of_hidden * active, sloped, h, out=dx.chunk(2, -2)[1])
        of_h = (of_dup * active).addcmul_(sloped, up)
        of_gate = curve.mul_(of_dgate).mul_(up).addcmul_(slope, of_dup).mul_(h)
        torch.addcmul(of_gate, slope.mul_(of_hidden), up, out=dx.chunk(2, -2)[0])
        return dx, of_h, dlr


class _WithRowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, w: Tensor, n: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        factor = (norm + NORM_EPSILON).reciprocal_()
        scale = n * factor
        ctx.save_for_backward(w, norm, factor, scale)
        ctx.kept = n.shape
        return w * scale

    @staticmethod
    @by_hand
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        w, norm, factor, scale = ctx.saved_tensors
        dn = (dy * w).sum(-1, keepdim=True).mul_(factor)
        # A row of zeros has no direction to follow; its dn is 0 already.
        along = (dn * scale).div_(norm.clamp(min=torch.finfo(norm.dtype).tiny))
        return (dy * scale).addcmul_(w, along, value=-1.0), dn.sum_to_size(ctx.kept)
