"""The (gated) delta rule over a sequence, with its state at any position.

Per head, with S in [Dk, Dv]: S <- exp(g) S, then S <- S + k (beta (v - S'k))', o = S'q / sqrt(Dk) (Yang et al. 2024, arXiv
2406.06484; gated: arXiv 2412.06464). In a chunk of C tokens that starts from S0, with b the running sum of g inside the chunk and
D[i,j] = exp(b[i] - b[j]) for i >= j (at most 1, so nothing overflows),

    A = tril(beta K K' * D, -1),  X = (I + A)^-1,  U = X (beta V) - X (beta exp(b) K) S0,
    O = (exp(b) Q S0 + tril(Q K' * D) U) / sqrt(Dk),
    S after r tokens = exp(b[r-1]) S0 + sum_{i<r} exp(b[r-1] - b[i]) k_i u_i'      for any r.

So everything but one D x D update per chunk is batched over chunks, and a snapshot is one masked product. The backward is written
by hand: with dXv = X' dU (the gradient of beta V), that of A is -tril(dXv U', -1) and that of (beta exp(b) K) is -dXv S0'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refine_nsp.ops.precision import without_autocast

DEFAULT_CHUNK = 64


def naive_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the yardstick for `delta_rule`. Same arguments; returns o and the final state."""
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2) * q.shape[-1] ** -0.5, k.repeat_interleave(group, 2)
    S = v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            S = S * g[:, t].exp()[..., None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * u[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S


@dataclass(frozen=True)
class DeltaStates:
    """What a pass of `delta_rule` leaves behind, enough for its state after any token."""

    starts: Tensor  # [B, HV, n + 1, Dk, Dv], state before each chunk, and after the last
    u: Tensor  # [B, HV, n, C, Dv], what each token wrote
    k: Tensor  # [B, T, H, Dk]
    g: Tensor | None  # [B, T, HV]

    @without_autocast
    def at(self, positions: Tensor) -> Tensor:
        """State after the token at `positions` [B, P] long (-1: the initial state) -> [B, P, HV, Dk, Dv], differentiable."""
        B, HV, n, C, _ = self.u.shape
        T, group = self.k.shape[1], HV // self.k.shape[2]
        consumed = positions + 1
        chunk, r = consumed // C, consumed % C
        rows = torch.arange(B, device=positions.device)[:, None]
        start = self.starts[rows, :, chunk]  # [B, P, HV, Dk, Dv]
        if not bool(r.any()):
            return start
        tokens = chunk[..., None] * C + torch.arange(C, device=positions.device)  # [B, P, C]
        inside = torch.arange(C, device=positions.device) < r[..., None]
        tokens = tokens.clamp(max=T - 1)
        k = self.k[rows[..., None], tokens].to(start.dtype).repeat_interleave(group, 3)  # [B, P, C, HV, Dk]
        u = self.u[rows, :, chunk.clamp(max=n - 1)]  # [B, P, HV, C, Dv]
        if self.g is None:
            k = k.masked_fill(~inside[..., None, None], 0.0)
        else:
            g = self.g[rows[..., None], tokens].to(start.dtype).masked_fill(~inside[..., None], 0.0)
            total = g.sum(2, keepdim=True)  # [B, P, 1, HV]
            decay = (total - g.cumsum(2)).exp().masked_fill(~inside[..., None], 0.0)
            k, start = k * decay[..., None], start * total.exp()[:, :, 0, :, None, None]
        return start + torch.einsum("bpchk,bphcv->bphkv", k, u)


@without_autocast
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK,
) -> tuple[Tensor, DeltaStates]:
    """The (gated) delta rule in chunks, with a hand-written backward.

    Args:
        q, k: [B, T, H, Dk], already normalised; q is scaled by Dk**-0.5 inside.
        v: [B, T, HV, Dv]; HV a multiple of H, value head j uses query/key head j // (HV // H).
        beta: [B, T, HV], write strength; 0 writes nothing (pads).
        g: [B, T, HV] log decay (<= 0), or None for the plain rule.
        initial_state: [B, HV, Dk, Dv] or None for zeros.
        chunk_size: tokens per chunk.

    Returns:
        o [B, T, HV, Dv] and the states, both in float32 (float64 for float64 inputs).
    """
    T, H, HV = q.shape[1], q.shape[2], v.shape[2]
    if HV % H:
        raise ValueError(f"the {HV} value heads must be a multiple of the {H} query/key heads")
    C = min(chunk_size, T)
    dtype = torch.promote_types(q.dtype, torch.float32)
    chunks = [_to_chunks(x, C, HV, dtype) for x in (q, k, v)]
    gates = [None if x is None else _to_chunks(x[..., None], C, HV, dtype).squeeze(-1) for x in (beta, g)]
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    o, starts, u = _ChunkedDeltaRule.apply(*chunks, *gates, initial_state)
    o = o.flatten(2, 3)[:, :, :T].transpose(1, 2)
    return o, DeltaStates(starts, u, k, g)


def _to_chunks(x: Tensor, C: int, HV: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] -> [B, HV, n, C, D] contiguous, zeros behind the last token."""
    B, T, H, D = x.shape
    x = x.transpose(1, 2)
    if T % C:
        x = torch.nn.functional.pad(x, (0, 0, 0, -T % C))
    if HV != H:
        x = x.repeat_interleave(HV // H, 1)
    return x.reshape(B, HV, -1, C, D).contiguous().to(dtype)


def _inverse_unit_lower(A: Tensor) -> Tensor:
    """(I + A)^-1 for strictly lower triangular A [..., C, C]."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)


@dataclass
class _Decay:
    """Decays inside chunks; all None for the plain rule, whose work they would double."""

    pair: Tensor | None  # [..., n, C, C] exp(b_i - b_j), lower triangle with diagonal
    from_start: Tensor | None  # [..., n, C, 1] exp(b_i)
    to_end: Tensor | None  # [..., n, C, 1] exp(b_last - b_i)
    whole: Tensor | None  # [..., n, 1, 1] exp(b_last)


def _decay(g: Tensor | None) -> _Decay:
    if g is None:
        return _Decay(None, None, None, None)
    b = g.cumsum(-1)
    pair = (b[..., :, None] - b[..., None, :]).tril_().exp_().tril_()
    last = b[..., -1:]
    return _Decay(pair, b.exp()[..., None], (last - b).exp()[..., None], last.exp()[..., None])


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _ChunkedDeltaRule(torch.autograd.Function):
    """q, k, v [B, HV, n, C, D], beta and g [B, HV, n, C], S0 -> o [B, HV, n, C, Dv], starts [B, HV, n+1, Dk, Dv], u."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor | None) -> Any:
        B, HV, n, _, Dk = q.shape
        Dv, scale = v.shape[-1], Dk**-0.5
        decay, b = _decay(g), beta[..., None]
        kb = k * b
        A = _times(kb @ k.mT, decay.pair).tril_(-1)
        X = _inverse_unit_lower(A)
        u = X @ (v * b)
        w = X @ _times(kb, decay.from_start)
        k_end = _times(k, decay.to_end)
        starts = q.new_empty(B, HV, n + 1, Dk, Dv)
        starts[:, :, 0] = 0.0 if S0 is None else S0
        flat_starts, flat_u, flat_w, flat_k = (x.flatten(0, 1) for x in (starts, u, w, k_end))
        whole = None if decay.whole is None else decay.whole.flatten(0, 1)
        for c in range(n):
            S = flat_starts[:, c]
            flat_u[:, c].baddbmm_(flat_w[:, c], S, alpha=-1.0)
            kept = S if whole is None else S * whole[:, c]
            torch.baddbmm(kept, flat_k[:, c].mT, flat_u[:, c], out=flat_starts[:, c + 1])
        P = _times(q @ k.mT, decay.pair).tril_()
        o = P @ u
        o += _times(q, decay.from_start) @ starts[:, :, :-1]
        o *= scale
        ctx.save_for_backward(q, k, v, beta, g, X, w, u, starts)
        ctx.set_materialize_grads(False)
        ctx.has_initial = S0 is not None
        return o, starts, u

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dstarts: Tensor | None, du_out: Tensor | None) -> Any:
        q, k, v, beta, g, X, w, u, starts = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        decay, b, S = _decay(g), beta[..., None], starts[:, :, :-1]
        do = torch.zeros_like(v) if do is None else do * scale
        P = _times(q @ k.mT, decay.pair).tril_()
        du = P.mT @ do
        if du_out is not None:
            du += du_out
        q_start, k_end = _times(q, decay.from_start), _times(k, decay.to_end)
        dS = starts.new_zeros(starts.shape) if dstarts is None else dstarts.clone()
        dS[:, :, :-1] += q_start.mT @ do
        _backward_through_chunks(dS, du, w, k_end, decay.whole)

        dv_b = X.mT @ du  # gradient of beta * v
        dA = -(dv_b @ u.mT).tril_(-1)
        dkw = -(dv_b @ S.mT)  # gradient of beta * exp(b) * k
        dk_end = u @ dS[:, :, 1:].mT
        dP = (do @ u.mT).tril_()
        dq_start = do @ S.mT
        dg = (
            None
            if g is None
            else _gate_gradient(
                decay,
                A_grad=dA,
                P=P,
                dP=dP,
                kb=k * b,
                k=k,
                dkw=dkw,
                k_end=k_end,
                dk_end=dk_end,
                q_start=q_start,
                dq_start=dq_start,
                S=S,
                dS=dS,
            )
        )
        dA, dP = _times(dA, decay.pair), _times(dP, decay.pair)
        dkb = _times(dkw, decay.from_start) + dA @ k
        dq = _times(dq_start, decay.from_start) + dP @ k
        dk = _times(dk_end, decay.to_end) + dA.mT @ (k * b)
        dk += dP.mT @ q
        dk += dkb * b
        dbeta = (dkb * k).sum(-1) + (dv_b * v).sum(-1)
        return dq, dk, dv_b * b, dbeta, dg, dS[:, :, 0] if ctx.has_initial else None


def _backward_through_chunks(dS: Tensor, du: Tensor, w: Tensor, k_end: Tensor, whole: Tensor | None) -> None:
    """In place: dS [.., n+1, Dk, Dv] and du [.., n, C, Dv] gain what flows back through the states."""
    dS, du, w, k_end = (x.flatten(0, 1) for x in (dS, du, w, k_end))
    for c in range(du.shape[1] - 1, -1, -1):
        after = dS[:, c + 1]
        du[:, c].baddbmm_(k_end[:, c], after)
        dS[:, c].baddbmm_(w[:, c].mT, du[:, c], alpha=-1.0)
        dS[:, c] += after if whole is None else after * whole.flatten(0, 1)[:, c]


def _gate_gradient(
    decay: _Decay, *, A_grad: Tensor, P: Tensor, dP: Tensor, kb: Tensor, k: Tensor, dkw: Tensor, k_end: Tensor,
    dk_end: Tensor, q_start: Tensor, dq_start: Tensor, S: Tensor, dS: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of g [.., n, C]: every decay is exp of a difference of running sums b, so each term lands on its two ends."""
    assert decay.pair is not None and decay.from_start is not None and decay.whole is not None
    pairs = (kb @ k.mT) * decay.pair * A_grad + P * dP
    db = pairs.sum(-1) - pairs.sum(-2)
    db += (dkw * kb * decay.from_start).sum(-1) + (dq_start * q_start).sum(-1)
    end = (dk_end * k_end).sum(-1)
    db -= end
    db[..., -1] += end.sum(-1) + (S * dS[:, :, 1:]).sum((-1, -2)) * decay.whole[..., 0, 0]
    return db.flip(-1).cumsum(-1).flip(-1)
