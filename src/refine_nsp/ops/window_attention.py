"""Attend within a causal sliding window in blocks of queries, so that memory and time are linear in T. d is the width of a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.kernels import window_attention_runs
from refine_nsp.ops.precision import autocast_dtype, without_autocast

BLOCK = 64  # queries of a block: shorter ones mask less but read keys oftener
LONGEST_KEPT = 128  # up to this window probabilities are kept for the backward pass, two windows of them a query
LOGITS_AT_ONCE = 2**19  # of the blocks that are attended from together: more no longer fit the cache, fewer make more calls


def naive_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor) -> Tensor:
    """Attend with one [T, past + T] mask; same arguments as `window_attention`."""
    return _attend(q, k, v, window, past.to(q.device), 0, q.shape[2])


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor) -> Tensor:
    """Attend from each query to itself and the `window - 1` keys before it.

    Args:
        q: [B, H, T, d].
        k, v: [B, H, slots + T, d]: slots of keys from before, the newest last, then those of the T queries.
        window: at least 1.
        past: [B] long, on the host: how many of the slots are filled.
    """
    T, slots = q.shape[2], k.shape[2] - q.shape[2]
    dtype = autocast_dtype(q)
    if T > 1 and bool((past == slots).all()) and window_attention_runs(q, dtype):
        return _flash(q.to(dtype), k.to(dtype), v.to(dtype), window)
    if T > BLOCK and q.device.type == "cpu":
        return _ByHand.apply(q.to(dtype), k.to(dtype), v.to(dtype), window, past)
    past = past.to(q.device, non_blocking=True)
    block = max(window, BLOCK)  # a longer one than by hand, because the fused kernel is called for each
    if block >= T:
        return _attend(q, k, v, window, past, 0, T)
    return torch.cat([_attend(q, k, v, window, past, s, min(s + block, T)) for s in range(0, T, block)], 2)


def branched_window_attention(
    q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor
) -> Tensor:
    """Compute `window_attention` of S*n rows, n neighbours sharing a past, which is neither copied nor joined to their own keys.

    Args:
        q, k, v: [S*n, H, T, d]. past_k, past_v: [S, H, window - 1, d], the newest last. past: [S] long, how many of them are filled.
    """
    S, (R, H, T, d) = past_k.shape[0], q.shape
    W, n = past_k.shape[2], R // S  # W: window - 1, without the query itself
    t = torch.arange(T, device=q.device)[:, None]
    slot = torch.arange(W, device=q.device)
    # Slot i holds the key at position i - W, and query t sees back to position t - W.
    seen = (slot >= t) & (slot >= W - past[:, None, None])  # [S, T, W]: within the window, and filled
    back = t - torch.arange(T, device=q.device)
    own = (back >= 0) & (back < window)  # [T, T]
    folded = q.view(S, n, H, T, d).transpose(1, 2).flatten(2, 3)  # [S, H, n*T, d]: their queries are read together
    to_past = (folded @ past_k.mT).view(S, H, n, T, W).transpose(1, 2)
    to_past = to_past.masked_fill(~seen[:, None, None], -torch.inf).flatten(0, 1)
    # A query always sees itself, so no row of logits is all -inf, whose softmax would be nan.
    to_own = (q @ k.mT).masked_fill(~own, -torch.inf)
    # One softmax needs the logits joined, which are small; the keys and values behind them stay apart.
    p = (torch.cat([to_past, to_own], -1) * d**-0.5).softmax(-1)
    p_past = p[..., :W].unflatten(0, (S, n)).transpose(1, 2).flatten(2, 3)  # [S, H, n*T, W]
    from_past = (p_past @ past_v).view(S, H, n, T, d).transpose(1, 2).flatten(0, 1)
    return from_past + p[..., W:] @ v


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Run FlashAttention's kernel on rows whose slots are all filled: it takes neither mask nor gaps, and reads windows alone."""
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = q.shape
    n_keys = k.shape[2]
    rows = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H, d]: rows one behind the other
    # The last query is aligned with the last key; (left, right) does not count the query itself.
    o = varlen_attn(q, k, v, rows * T, rows * n_keys, T, n_keys, window_size=(window - 1, 0))
    assert isinstance(o, Tensor)
    return o.unflatten(0, (B, T)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor, start: int, end: int) -> Tensor:
    """Attend from queries start .. end - 1."""
    slots = k.shape[2] - q.shape[2]
    first = max(0, slots + start - window + 1)  # keys before the first query's window are not even read
    keys = torch.arange(first, slots + end, device=q.device) - slots  # position relative to the first query
    queries = torch.arange(start, end, device=q.device)
    back = queries[:, None] - keys
    visible = (back >= 0) & (back < window) & (keys >= -past[:, None, None])  # [B, t, keys]
    span = slice(first, slots + end)
    return F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, span], v[:, :, span], attn_mask=visible[:, None])


class _ByHand(torch.autograd.Function):
    """Attends by plain products in short blocks of queries. The backward pass computes the probabilities of long windows again."""

    @staticmethod
    @without_autocast
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor) -> Tensor:
        saved, kept = (q, k, v), []
        ctx.kept = blocks = _Blocks.of(q, k, window, past)
        (B, H, T, _), d = q.shape, v.shape[-1]
        # Laid out by token, as a layer needs it next: joining the heads then copies nothing.
        o = q.new_empty(B, blocks.n, BLOCK, H, d)
        q, k, v = blocks.queries(q), blocks.keys(k), blocks.keys(v)
        for group in blocks.groups():
            p = group.attention(group.own(q), group.seen(k))
            kept += [p] if window <= LONGEST_KEPT else []
            o[:, group.first : group.end] = (p.to(v.dtype) @ group.seen(v)).view(B, H, -1, BLOCK, d).permute(0, 2, 3, 1, 4)
        ctx.save_for_backward(*saved, *kept)
        return o.flatten(1, 2)[:, :T].transpose(1, 2)

    @staticmethod
    @by_hand
    def backward(ctx: Context, do: Tensor) -> Gradients:
        blocks: _Blocks = ctx.kept
        q, k, v, *kept = ctx.saved_tensors
        q, k, v, do = blocks.queries(q), blocks.keys(k), blocks.keys(v), blocks.queries(do)
        dq = torch.empty_like(q)
        # Several blocks see a key, so their parts are summed up in float32 or better.
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for i, group in enumerate(blocks.groups()):
            q_own, k_seen, do_own = group.own(q), group.seen(k), group.own(do)
            p = kept[i] if kept else group.attention(q_own, k_seen)
            group.add_seen(dv, p.to(do.dtype).mT @ do_own)
            dp = do_own.to(p.dtype) @ group.seen(v).to(p.dtype).mT
            dlogits = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).to(q.dtype)
            dq[:, group.first : group.end] = (dlogits @ k_seen).view_as(dq[:, group.first : group.end])
            group.add_seen(dk, dlogits.mT @ q_own)
        dq, dk = dq.mul_(blocks.scale), dk.mul_(blocks.scale)
        return blocks.of_queries(dq), *(blocks.of_keys(x.to(k.dtype)) for x in (dk, dv)), None, None


@dataclass(frozen=True)
class _Blocks:
    """Cuts T queries into n blocks; each sees its own keys and those of `before` blocks before it."""

    band: Tensor  # [BLOCK, (before + 1) * BLOCK], float32 or better: 0, or -inf where a key is behind its query or before the window
    past: Tensor  # [B] long
    heads: int
    T: int
    slots: int
    n: int
    before: int
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, window: int, past: Tensor) -> _Blocks:
        """Lay out the blocks for queries q [B, H, T, d] and keys k [B, H, slots + T, d]."""
        _, H, T, d = q.shape
        before = -(-(min(window, k.shape[2]) - 1) // BLOCK)
        back = torch.arange(BLOCK)[:, None] - torch.arange(-before * BLOCK, BLOCK)
        hidden = (back < 0) | (back >= window)
        band = torch.zeros(hidden.shape, dtype=torch.promote_types(q.dtype, torch.float32)).masked_fill_(hidden, -torch.inf)
        return cls(band, past, H, T, k.shape[2] - T, -(-T // BLOCK), before, d**-0.5)

    def queries(self, x: Tensor) -> Tensor:
        """Cut x [B, H, T, d] into blocks [B * H, n, BLOCK, d], with zeros behind."""
        return _cut(x, 0, self.n * BLOCK - self.T)

    def keys(self, x: Tensor) -> Tensor:
        """Cut x [B, H, slots + T, d] into blocks [B * H, before + n, BLOCK, d], with zeros around, or without slots that no query sees."""
        return _cut(x, self.before * BLOCK - self.slots, self.n * BLOCK - self.T)

    def of_queries(self, x: Tensor) -> Tensor:
        """Undo `queries`."""
        return x.flatten(1, 2)[:, : self.T].unflatten(0, (-1, self.heads))

    def of_keys(self, x: Tensor) -> Tensor:
        """Undo `keys`, with zeros for what it left out."""
        uncut = F.pad(x.flatten(1, 2), (0, 0, self.slots - self.before * BLOCK, self.T - self.n * BLOCK))
        return uncut.unflatten(0, (-1, self.heads))

    def groups(self) -> Iterator[_Group]:
        """Give groups of neighbouring blocks, as many at once as have few enough logits."""
        size = max(1, LOGITS_AT_ONCE // (len(self.past) * self.heads * self.band.numel()))
        for first in range(0, self.n, size):
            end = min(first + size, self.n)
            # The first blocks see no key that far back.
            before = min(self.before, end - 1 + -(-self.slots // BLOCK))
            yield _Group(self, first, end, before)


@dataclass(frozen=True)
class _Group:
    """Takes blocks first .. end - 1 together, g = end - first; N = B * H * g of them in all, which see `before` blocks before their own."""

    blocks: _Blocks
    first: int
    end: int
    before: int

    def own(self, x: Tensor) -> Tensor:
        """Take the blocks [N, BLOCK, d] of x from `queries`."""
        return x[:, self.first : self.end].flatten(0, 1).contiguous()

    def seen(self, x: Tensor) -> Tensor:
        """Take what each block sees, [N, (before + 1) * BLOCK, d], of x from `keys`."""
        seen = self._reach(x).unfold(1, self.before + 1, 1)  # [B * H, g, BLOCK, d, before + 1]
        # Products of transposed matrices that are not contiguous take twice as long as the copy and the product.
        return seen.permute(0, 1, 4, 2, 3).flatten(2, 3).flatten(0, 1).contiguous()

    def add_seen(self, total: Tensor, x: Tensor) -> None:
        """Add x [N, (before + 1) * BLOCK, d] to the keys of `total` that it belongs to."""
        g, width = self.end - self.first, self.before + 1
        x, keys = x.view(len(total), g, width, BLOCK, -1), self._reach(total)
        if g < width:
            for i, part in enumerate(x.unbind(1)):
                keys[:, i : i + width].add_(part)
        else:
            for i, part in enumerate(x.unbind(2)):
                keys[:, i : i + g].add_(part)

    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute the probabilities [N, BLOCK, (before + 1) * BLOCK]. A query always sees itself, so no row of logits is all -inf."""
        width = k.shape[1]
        bias = self.blocks.band[:, -width:]
        if self.first < self.before:
            keys = torch.arange(width) - self.before * BLOCK + BLOCK * torch.arange(self.first, self.end)[:, None]
            empty = keys < -self.blocks.past[:, None, None]  # [B, g, width]
            bias = bias.masked_fill(empty[:, None, :, None], -torch.inf).expand(-1, self.blocks.heads, -1, -1, -1).flatten(0, 2)
        # What is subtracted from logits and from dp is nearly all of them where a query attends to one key (a sink), so half a precision
        # of either leaves little of the gradient.
        return torch.baddbmm(bias, q.to(bias.dtype), k.to(bias.dtype).mT, alpha=self.blocks.scale).softmax(-1)

    def _reach(self, x: Tensor) -> Tensor:
        """Take the blocks of x from `keys` that any block of the group sees."""
        return x[:, self.blocks.before + self.first - self.before : self.blocks.before + self.end]


def _cut(x: Tensor, front: int, behind: int) -> Tensor:
    """Cut x [B, H, .., d] into blocks [B * H, .., BLOCK, d] after adding zeros, or leaving out where a number is negative."""
    return F.pad(x, (0, 0, front, behind)).flatten(0, 1).contiguous().unflatten(1, (-1, BLOCK))
