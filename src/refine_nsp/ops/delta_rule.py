"""Run the (gated) delta rule over a sequence, and give its state at any position.

Per head, with S in [Dk, Dv]: S <- exp(g) S, then S <- S + k (beta (v - S'k))', o = S'q / sqrt(Dk) (Yang et al. 2024, arXiv
2406.06484; gated: arXiv 2412.06464). In a chunk of C tokens that starts from S0, with b the running sum of g inside the chunk and
D[i,j] = exp(b[i] - b[j]) for i >= j (at most 1, so nothing overflows),

    A = tril(beta K K' * D, -1),  X = (I + A)^-1,  U = X (beta V) - X (beta exp(b) K) S0,
    O = (exp(b) Q S0 + tril(Q K' * D) U) / sqrt(Dk),
    S after r tokens = exp(b[r-1]) S0 + sum_{i<r} exp(b[r-1] - b[i]) k_i u_i'      for any r.

So everything but one D x D update per chunk is batched over chunks, and a snapshot is one masked product. The backward is written
by hand: with dXv = X' dU (the gradient of beta V), that of A is -tril(dXv U', -1) and that of (beta exp(b) K) is -dXv S0'.

n counts chunks; in the code P is tril(Q K' * D) and w is X (beta exp(b) K); only `DeltaStates.at` has P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.kernels import delta_rule_runs
from refine_nsp.ops.precision import autocast_dtype, without_autocast


def naive_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the rule token by token: the definition that `delta_rule` is tested against. Returns o and the final state."""
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
    """Rebuilds the states of a pass of `delta_rule` after any token from those before its chunks."""

    starts: Tensor  # [n or more, B, HV, Dk, Dv], state before each chunk; from kernels in the inputs' dtype
    final: Tensor  # [B, HV, Dk, Dv], state after each row's last real token, float32 or better
    written: Callable[[], Tensor]  # -> u [n, B, HV, C, Dv], what each token wrote
    k: Tensor  # [B, T, H, Dk]
    g: Tensor | None  # [B, T, HV]
    chunk: int  # C
    lengths: Tensor | None  # [B] long, on the host; None: all T

    @without_autocast
    def at(self, positions: Tensor) -> Tensor:
        """Rebuild the state [B, P, HV, Dk, Dv] after the tokens at `positions` [B, P] long, best on the host (-1: before the first)."""
        C, (B, P), T, device = self.chunk, positions.shape, self.k.shape[1], self.k.device
        consumed = positions.cpu() + 1
        if bool((consumed >= (T if self.lengths is None else self.lengths[:, None])).all()):
            return self.final[:, None].expand(-1, P, -1, -1, -1)  # so it is when decoding, and right before: nothing to add
        # A position at a chunk's end counts as its last token: no chunk begins behind the last one.
        chunk = torch.div(consumed - 1, C, rounding_mode="floor").clamp(min=0)
        r = (consumed - chunk * C).to(device, non_blocking=True)
        chunk = chunk.to(device, non_blocking=True)
        rows, dtype = torch.arange(B, device=device)[:, None], self.final.dtype
        start, u = (x[chunk, rows].to(dtype) for x in (self.starts, self.written()))  # [B, P, HV, Dk, Dv], [B, P, HV, C, Dv]
        inside = torch.arange(C, device=device) < r[..., None]  # [B, P, C]
        # Past the end there is nothing `inside`, but something must be there to index.
        tokens = (chunk[..., None] * C + torch.arange(C, device=device)).clamp(max=T - 1)
        k = self.k[rows[..., None], tokens].to(dtype).repeat_interleave(u.shape[2] // self.k.shape[2], 3)  # [B, P, C, HV, Dk]
        if self.g is None:
            k = k.masked_fill(~inside[..., None, None], 0.0)
        else:
            g = self.g[rows[..., None], tokens].to(dtype).masked_fill(~inside[..., None], 0.0)
            total = g.sum(2, keepdim=True)  # [B, P, 1, HV], b[r - 1]: g is 0 from r on
            # From r on the exponent is 0, so the factor would be 1 there.
            decay = (total - g.cumsum(2)).exp().masked_fill(~inside[..., None], 0.0)
            k, start = k * decay[..., None], start * total.exp()[:, :, 0, :, None, None]
        return start + torch.einsum("bpchk,bphcv->bphkv", k, u)


@dataclass(frozen=True)
class OneToken:
    """Gives the states of a pass of one token; see `DeltaStates`."""

    initial: Tensor | None  # [B, HV, Dk, Dv], or zeros
    final: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """Take the state after or before the token; see `DeltaStates.at`."""
        after, final = positions.cpu() >= 0, self.final[:, None]
        if bool(after.all()):
            return final.expand(-1, positions.shape[1], -1, -1, -1)
        initial = torch.zeros_like(final) if self.initial is None else self.initial[:, None]
        return torch.where(after[..., None, None, None].to(final.device, non_blocking=True), final, initial)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, DeltaStates | OneToken]:
    """Run the (gated) delta rule over a sequence in chunks, on the kernels chosen (`ops/kernels.py`) or on PyTorch's operations.

    Args:
        q, k: [B, T, H, Dk], already normalised; q is scaled by Dk**-0.5 inside.
        v: [B, T, HV, Dv]; HV a multiple of H, value head j uses query/key head j // (HV // H).
        beta: [B, T, HV], write strength; 0 writes nothing (pads).
        g: [B, T, HV] log decay (<= 0), or None for the plain rule.
        initial_state: [B, HV, Dk, Dv] or None for zeros.
        chunk_size: tokens per chunk of PyTorch's operations; the default is the fastest measured, 32 for heads of up to 64, else 64.
        lengths: [B] long, on the host: how many of a row's tokens are real, all others writing nothing; None: all.

    Returns:
        o [B, T, HV, Dv] and the states, both in float32 (float64 for float64 inputs); on kernels o is in the inputs' dtype.
    """
    H, HV = q.shape[2], v.shape[2]
    if HV % H:
        raise ValueError(f"the {HV} value heads must be a multiple of the {H} query/key heads")
    dtype = autocast_dtype(q)
    if delta_rule_runs(q, dtype, q.shape[-1], g is not None):
        return _on_kernels(q.to(dtype), k.to(dtype), v.to(dtype), beta, g, initial_state, lengths)
    return _in_chunks(q, k, v, beta, g, initial_state, chunk_size, lengths)


@without_autocast
def _on_kernels(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, DeltaStates | OneToken]:
    from refine_nsp.ops import fla_delta_rule as kernels  # needs Triton, so only here

    S0 = None if initial_state is None else initial_state.to(torch.float32)
    g = None if g is None else g.to(torch.float32)
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule as in_one_launch

        o, final = in_one_launch(q, k, v, g, beta=beta, initial_state=S0, output_final_state=True)
        return o, OneToken(S0, final)
    tail = (x if x is None else x.contiguous() for x in (g, S0))
    o, starts, u, final = kernels.KernelDeltaRule.apply(q, k, v, beta, *tail)
    return o, DeltaStates(starts.transpose(0, 1), final, partial(kernels.in_chunks, u), k, g, kernels.C, lengths)


@without_autocast
def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    S0: Tensor | None,
    chunk_size: int | None,
    lengths: Tensor | None,
) -> tuple[Tensor, DeltaStates]:
    T, HV = q.shape[1], v.shape[2]
    # Longer chunks mean fewer updates of the state but more work inside, which small heads don't repay.
    C = min(chunk_size or (32 if max(q.shape[-1], v.shape[-1]) <= 64 else 64), T)
    # A state is a sum over the sequence: in bfloat16 it would soon round away what a single token writes.
    dtype = torch.promote_types(q.dtype, torch.float32)
    chunks = [_to_chunks(x, C, HV, dtype) for x in (q, k, v)]
    gates = [None if x is None else _to_chunks(x[..., None], C, HV, dtype).squeeze(-1) for x in (beta, g)]
    o, starts, u = _ChunkedDeltaRule.apply(*chunks, *gates, None if S0 is None else S0.to(dtype))
    o = o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
    # It is copied, since a slice would keep the states of all chunks alive with the last one.
    return o, DeltaStates(starts, starts[-1].clone(), lambda: u, k, g, C, lengths)


def _to_chunks(x: Tensor, C: int, HV: int, dtype: torch.dtype) -> Tensor:
    """Cut [B, T, H, D] into contiguous chunks [n, B, HV, C, D], which a loop goes through, with zeros behind the last token."""
    B, T, H, D = x.shape
    if T % C:
        # Zero keys and beta write nothing, zero g decays nothing: the state behind the last chunk is that after the last token.
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -T % C))
    if HV != H:
        x = x.repeat_interleave(HV // H, 2)
    return x.reshape(B, -1, C, HV, D).permute(1, 0, 3, 2, 4).to(dtype).contiguous()


class _Decay(NamedTuple):
    """Holds the decays inside chunks; all are None for the plain rule, whose work they would double."""

    pair: Tensor | None  # [..., n, C, C] exp(b_i - b_j), lower triangle with diagonal
    from_start: Tensor | None  # [..., n, C, 1] exp(b_i)
    to_end: Tensor | None  # [..., n, C, 1] exp(b_last - b_i)
    whole: Tensor | None  # [..., n, 1, 1] exp(b_last)


def _decay(g: Tensor | None) -> _Decay:
    if g is None:
        return _Decay(None, None, None, None)
    b = g.cumsum(-1)
    # Differences are taken before exp: exp(b_i) / exp(b_j) is 0 / 0 under strong decay. Above the diagonal they are positive, exp may
    # overflow, and inf times 0 is nan: so they are cleared before exp, and what exp makes of 0 is cleared after it.
    pair = (b[..., :, None] - b[..., None, :]).tril_().exp_().tril_()
    last = b[..., -1:]
    return _Decay(pair, b.exp()[..., None], (last - b).exp()[..., None], last.exp()[..., None])


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _scale(x: Tensor, factor: Tensor | None) -> Tensor:
    """Compute `_times` in place."""
    return x if factor is None else x.mul_(factor)


def _minus_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute -(a @ b) in one pass over memory."""
    zero = a.new_zeros(1, 1, 1)  # with beta=0 it is not read
    return torch.baddbmm(zero, *_flat(a, b), beta=0.0, alpha=-1.0).view(*a.shape[:-1], b.shape[-1])


class _ChunkedDeltaRule(torch.autograd.Function):
    """Turns q, k, v [n, B, HV, C, D], beta and g [n, B, HV, C] and S0 into o and u [n, B, HV, C, Dv], starts [n+1, B, HV, Dk, Dv]."""

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor | None
    ) -> tuple[Tensor, ...]:
        n, B, HV, _, Dk = q.shape
        Dv, scale = v.shape[-1], Dk**-0.5
        decay, b = _decay(g), beta[..., None]
        kb = k * b
        A = _scale(kb @ k.mT, decay.pair).tril_(-1)
        # `unitriangular` takes the diagonal as 1 and never reads it, so A stands for I + A. It is solved by substitution, since a series in
        # powers of A would cancel badly where keys are alike, and kept as a matrix, because it is applied three times.
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        X = torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)
        u = X @ (v * b)
        w = X @ _times(kb, decay.from_start)
        k_end = _times(k, decay.to_end)
        # Each state is written to its place among all of them: a list would have to be stacked, which copies them once more.
        starts = q.new_empty(n + 1, B, HV, Dk, Dv)
        starts[0] = 0.0 if S0 is None else S0
        heads = [x.flatten(1, 2) for x in (starts, u, w, k_end)]  # views: the loop writes through them
        # u was X (beta V) until here: what depends on S0 is all that must wait for the chunk before. starts has one state more.
        for c, (S, u_c, w_c, k_c) in enumerate(zip(*heads, strict=False)):
            u_c.baddbmm_(w_c, S, alpha=-1.0)
            kept = S if decay.whole is None else S * decay.whole[c].flatten(0, 1)
            torch.baddbmm(kept, k_c.mT, u_c, out=heads[0][c + 1])
        P = q @ k.mT
        P = P.tril_() if decay.pair is None else P.mul_(decay.pair)  # the decays are lower triangular themselves
        o = P @ u
        o += _times(q, decay.from_start) @ starts[:-1]
        o *= scale
        ctx.save_for_backward(q, k, v, beta, X, w, u, starts, P, None if g is None else A, *decay)
        ctx.set_materialize_grads(False)  # or states that nobody uses would get zero gradients of their full size
        return o, starts, u

    @staticmethod
    @by_hand
    def backward(ctx: Context, do: Tensor | None, dstarts: Tensor | None, du_out: Tensor | None) -> Gradients:
        q, k, v, beta, X, w, u, starts, P, A, *decays = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        decay, b, S = _Decay(*decays), beta[..., None], starts[:-1]
        do = torch.zeros_like(v) if do is None else do * scale
        du = P.mT @ do
        if du_out is not None:
            du += du_out
        q_start, k_end = _times(q, decay.from_start), _times(k, decay.to_end)
        # A copy: the loop below adds to it, and the incoming gradient may be somebody else's too.
        dS = starts.new_zeros(starts.shape) if dstarts is None else dstarts.clone()
        dS[:-1] += q_start.mT @ do
        _backward_through_chunks(dS, du, w, k_end, decay.whole)

        dv_b = X.mT @ du  # gradient of beta * v
        dA = _minus_product(dv_b, u.mT).tril_(-1)
        dkw = _minus_product(dv_b, S.mT)  # gradient of beta * exp(b) * k
        dk_end = u @ dS[1:].mT
        dP = do @ u.mT
        dq = do @ S.mT
        kb, dg = k * b, None
        if A is not None:  # before the decays go into dA, dP, dkw, dk_end and dq in place below
            # Every decay is exp(b_i - b_j), so the gradient of a decayed quantity, times that quantity, is added to the gradient of b_i
            # and subtracted from that of b_j.
            pairs = torch.addcmul(dA * A, dP, P)
            db = pairs.sum(-1) - pairs.sum(-2)
            db += _end_gradients(decay, dkw, kb, dq, q_start, dk_end, k_end, S, dS)
            dg = db.flip(-1).cumsum(-1).flip(-1)  # b is the running sum of g, so g[j] is in every b[i], i >= j
        dA, dP = _scale(dA, decay.pair), dP.tril_() if decay.pair is None else dP.mul_(decay.pair)
        dkw, dk_end, dq = _scale(dkw, decay.from_start), _scale(dk_end, decay.to_end), _scale(dq, decay.from_start)
        # Sums of products are accumulated by the product itself, which saves a pass over memory for each.
        dq = torch.baddbmm(*_flat(dq, dP, k)).view_as(q)
        dkb = torch.baddbmm(*_flat(dkw, dA, k)).view_as(k)
        dk = torch.baddbmm(*_flat(dk_end, dA.mT, kb))
        dk.baddbmm_(*_flat(dP.mT, q))
        dk = dk.view_as(k).addcmul_(dkb, b)
        dbeta = torch.linalg.vecdot(dkb, k) + torch.linalg.vecdot(dv_b, v)
        return dq, dk, dv_b.mul_(b), dbeta, dg, dS[0] if ctx.needs_input_grad[5] else None


def _flat(*matrices: Tensor) -> list[Tensor]:
    """Flatten [n, B, HV, a, b] to [n * B * HV, a, b], for batched products that add to their output."""
    return [x.flatten(0, 2) for x in matrices]


def _backward_through_chunks(dS: Tensor, du: Tensor, w: Tensor, k_end: Tensor, whole: Tensor | None) -> None:
    """Add to dS [n+1, .., Dk, Dv] and du [n, .., C, Dv], in place, the gradients that flow back through the states."""
    dS, du, w, k_end = (x.flatten(1, 2) for x in (dS, du, w, k_end))
    for c in range(du.shape[0] - 1, -1, -1):
        after = dS[c + 1]  # complete: this chunk's u needs it, and the state before needs that u
        du[c].baddbmm_(k_end[c], after)
        dS[c].baddbmm_(w[c].mT, du[c], alpha=-1.0)
        dS[c] += after if whole is None else after * whole[c].flatten(0, 1)


def _end_gradients(
    decay: _Decay, dkw: Tensor, kb: Tensor, dq_start: Tensor, q_start: Tensor, dk_end: Tensor, k_end: Tensor, S: Tensor, dS: Tensor
) -> Tensor:  # fmt: skip
    """Compute the gradient of b [n, .., C] through what decays from a chunk's start or to its end."""
    assert decay.from_start is not None and decay.whole is not None
    vecdot = torch.linalg.vecdot
    db = vecdot(dkw, kb) * decay.from_start[..., 0] + vecdot(dq_start, q_start)
    # to_end is exp(b_last - b_i), and the state itself decays by exp(b_last).
    end = vecdot(dk_end, k_end)
    db -= end
    db[..., -1] += end.sum(-1) + vecdot(S.flatten(-2), dS[1:].flatten(-2)) * decay.whole[..., 0, 0]
    return db
