"""Run the (gated) delta rule on flash-linear-attention's Triton kernels (0.6), with the state at any position chosen afterwards.

Their forward frees the state before each chunk and what each token wrote. Here the same kernels are called one by one, so that both can
be kept for `DeltaStates`; a pass whose states nobody wants costs what theirs costs. Where a snapshot has a gradient, it enters the
reverse recurrence of the states at its chunk's boundary: that one loop (`_reverse_states`) is ours, since theirs takes a gradient at the
end alone.

The running state is float32 throughout, and so are the final state and every state that a pass continues from. The states *before chunks*
are stored in the inputs' dtype: a snapshot inside a sequence is that state, rounded once to bfloat16 (a relative error of at most 2^-9
per entry, which does not accumulate), plus what the tokens of its chunk wrote. Decays are running sums in units of log 2.

b [B, T, HV] is the running sum of g inside chunks of C = 64 tokens, n their number; the layout of states is [Dk, Dv].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
from fla.ops.utils import chunk_local_cumsum
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients

C = 64  # tokens per chunk, the only size for which all their kernels are fused


def in_chunks(u: Tensor) -> Tensor:
    """Cut [B, T, HV, Dv] into chunks [n, B, HV, C, Dv], a view where T is a multiple of C."""
    T = u.shape[1]
    if T % C:
        u = F.pad(u, (0, 0, 0, 0, 0, -T % C))
    return u.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)


class KernelDeltaRule(torch.autograd.Function):
    """Runs the rule over T tokens.

    All is contiguous: q, k [B, T, H, Dk] and v [B, T, HV, Dv] of one dtype, bfloat16 or float16; beta [B, T, HV]; g [B, T, HV] or None; the
    initial state [B, HV, Dk, Dv], float32, or None for zeros. It returns o [B, T, HV, Dv]; the state before each chunk
    [B, n, HV, Dk, Dv] and what each token wrote [B, T, HV, Dv], in the inputs' dtype; and the final state [B, HV, Dk, Dv], float32.
    """

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor | None
    ) -> tuple[Tensor, ...]:
        b = None if g is None else chunk_local_cumsum(g, chunk_size=C, scale=1 / math.log(2))
        # The plain rule too goes by the kernels of the gated one, which take no decay as well.
        w, xv, X = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=b, beta=beta, chunk_size=C)
        starts, u, final = chunk_gated_delta_rule_fwd_h(
            k=k, w=w, u=xv, g=b, initial_state=S0, output_final_state=True, chunk_size=C
        )
        o = chunk_fwd_o(q=q, k=k, v=u, h=starts, g=b, scale=q.shape[-1] ** -0.5, chunk_size=C)
        # starts and u are computed once more in the backward, as theirs does: n states a layer would soon fill the memory.
        ctx.save_for_backward(q, k, v, beta, b, X, S0)
        ctx.set_materialize_grads(False)
        ctx.kept = None if g is None else g.dtype
        return o, starts, u, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, do: Tensor | None, dstarts: Tensor | None, du: Tensor | None, dfinal: Tensor | None) -> Gradients:
        q, k, v, beta, b, X, S0 = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        do = torch.zeros_like(v) if do is None else do.contiguous()
        w, xv = recompute_w_u_fwd(k=k, v=v, beta=beta, A=X, g=b)
        starts, u, _ = chunk_gated_delta_rule_fwd_h(k=k, w=w, u=xv, g=b, initial_state=S0, chunk_size=C)
        own = chunk_bwd_dv_local(q=q, k=k, do=do, g=b, scale=scale, chunk_size=C)
        if du is not None:
            own += du
        dfinal = None if dfinal is None else dfinal.contiguous()
        reverse = {"q": q, "k": k, "w": w, "g": b, "h0": S0, "dht": dfinal, "do": do, "dv": own, "scale": scale}
        if dstarts is None:
            dafter, dS0, du = chunk_gated_delta_rule_bwd_dhu(**reverse, chunk_size=C)
        else:
            dafter, dS0, du = reverse_states(**reverse, dstarts=dstarts.contiguous())
        dq, dk, dw, db = chunk_bwd_dqkwg(q=q, k=k, v=u, w=w, g=b, h=starts, dv=du, do=do, dh=dafter, scale=scale, chunk_size=C)
        dk_inside, dv, dbeta, db_inside = prepare_wy_repr_bwd(k=k, v=v, beta=beta, g=b, A=X, dw=dw, du=du)
        dk += dk_inside
        dg = None
        if db is not None:
            dg = chunk_local_cumsum(db.add_(db_inside), chunk_size=C, reverse=True).to(ctx.kept)
        return dq, dk, dv, dbeta, dg, dS0


def reverse_states(
    q: Tensor, k: Tensor, w: Tensor, g: Tensor | None, h0: Tensor | None, dht: Tensor | None, do: Tensor, dv: Tensor, scale: float,
    dstarts: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Compute the gradients that flow back through the states, as `chunk_gated_delta_rule_bwd_dhu` with one at every chunk's start too.

    Args:
        q, k: [B, T, H, Dk]. w: [B, T, HV, Dk], X (beta exp(b) K). g: b [B, T, HV] in units of log 2, or None. do: [B, T, HV, Dv].
        dv: [B, T, HV, Dv], the gradient of u from within its chunk. h0, dht: initial state, gradient of the final one, or None.
        dstarts: [B, n, HV, Dk, Dv], the gradient of the state before each chunk from outside.

    Returns:
        The gradient of the state after each chunk [B, n, HV, Dk, Dv], of the initial state, and of u.
    """
    (B, T, H, Dk), (HV, Dv) = q.shape, do.shape[2:]
    dafter, du = torch.empty_like(dstarts), torch.empty_like(dv)
    dS0 = None if h0 is None else torch.empty_like(h0, dtype=torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(Dv, meta["BV"]), B * HV

    _reverse_states[grid](
        q, k, w, g, do, dv, dstarts, dht, dafter, dS0, du, scale, T, H=H, HV=HV, Dk=Dk, Dv=Dv, CHUNK=C,
        BK=max(16, triton.next_power_of_2(Dk)), GATED=g is not None, FINAL=dht is not None, INITIAL=dS0 is not None,
    )  # fmt: skip
    return dafter, dS0, du


@triton.autotune(
    configs=[
        triton.Config({"BV": BV}, num_warps=warps, num_stages=stages)
        for BV in (32, 16, 64)
        for warps in (4, 8)
        for stages in (2, 3)
    ],
    key=["H", "HV", "Dk", "Dv", "GATED"],
)
@triton.jit(do_not_specialize=["T"])
def _reverse_states(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows only its own
    q, k, w, b, do, du_inside, dstarts, dfinal, dafter, dinitial, du, scale, T,
    H: tl.constexpr, HV: tl.constexpr, Dk: tl.constexpr, Dv: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, FINAL: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Walk back through the chunks of one head of one row, for BV columns of its state."""
    columns, head_of_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = head_of_row // HV, head_of_row % HV
    n = tl.cdiv(T, CHUNK)
    i, j, t = tl.arange(0, BK), columns * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    # Offsets inside a chunk are 32 bits wide, and the same for every chunk: 64-bit ones of whole tiles would fill the registers.
    entry, there = i[:, None] * Dv + j[None, :], (i[:, None] < Dk) & (j[None, :] < Dv)
    shared, own = t[:, None] * (H * Dk) + i[None, :], t[:, None] * (HV * Dk) + i[None, :]
    values = t[:, None] * (HV * Dv) + j[None, :]
    q += head // (HV // H) * Dk
    k += head // (HV // H) * Dk
    dS = tl.zeros([BK, BV], dtype=tl.float32)
    if FINAL:
        dS += tl.load(dfinal + head_of_row * Dk * Dv + entry, mask=there, other=0.0).to(tl.float32)
    for back in range(n):
        c = n - 1 - back
        first = row * T + c * CHUNK  # 64 bits
        real = t < T - c * CHUNK
        real_keys, real_values = real[:, None] & (i[None, :] < Dk), real[:, None] & (j[None, :] < Dv)
        state = ((row * n + c) * HV + head) * Dk * Dv
        tl.store(dafter + state + entry, dS.to(dafter.dtype.element_ty), mask=there)
        of_values = (first * HV + head) * Dv
        k_c = tl.load(k + first * H * Dk + shared, mask=real_keys, other=0.0)
        du_c = tl.dot(k_c, dS.to(k_c.dtype))
        if GATED:
            b_c = tl.load(b + first * HV + head + t * HV, mask=real, other=0.0)
            last = tl.load(b + (first + tl.minimum(CHUNK, T - c * CHUNK) - 1) * HV + head)
            du_c *= tl.where(real, tl.exp2(last - b_c), 0.0)[:, None]
        du_c += tl.load(du_inside + of_values + values, mask=real_values, other=0.0)
        tl.store(du + of_values + values, du_c.to(du.dtype.element_ty), mask=real_values)
        q_c = tl.load(q + first * H * Dk + shared, mask=real_keys, other=0.0)
        do_c = tl.load(do + of_values + values, mask=real_values, other=0.0)
        if GATED:
            dS *= tl.exp2(last)
            q_c = (q_c * tl.exp2(b_c)[:, None]).to(do_c.dtype)
        w_c = tl.load(w + (first * HV + head) * Dk + own, mask=real_keys, other=0.0)
        dS += tl.dot(tl.trans(q_c), do_c) * scale
        dS -= tl.dot(tl.trans(w_c), du_c.to(w_c.dtype))
        dS += tl.load(dstarts + state + entry, mask=there, other=0.0).to(tl.float32)
    if INITIAL:
        tl.store(dinitial + head_of_row * Dk * Dv + entry, dS, mask=there)
