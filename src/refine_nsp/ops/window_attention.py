"""Attend within a causal sliding window in blocks of queries, so that memory and time are linear in T. d is the width of a head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.kernels import window_attention_runs
from refine_nsp.ops.precision import autocast_dtype

MIN_BLOCK = 64  # queries of a block at least: with a short window smaller ones would cost more than they save
LONGEST_AT_ONCE = 128  # up to this window the logits of all blocks are held, two windows of them a query


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
    past = past.to(q.device, non_blocking=True)
    # A block as long as the window sees at most two windows of keys, half of them masked: shorter ones mask less but read keys oftener.
    block = max(window, MIN_BLOCK)
    if block >= T:
        return _attend(q, k, v, window, past, 0, T)
    if window <= LONGEST_AT_ONCE:
        return _attend_at_once(q, k, v, window, past, block)
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


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor, block: int) -> Tensor:
    """Attend in all blocks by one batch of plain products, which on a CPU takes at most half as long as the fused kernel."""
    T, d = q.shape[2:]
    n, slots = -(-T // block), k.shape[2] - T
    after = n * block - T
    q = F.pad(q * d**-0.5, (0, 0, 0, after)).unflatten(2, (n, block))
    # A block reads the keys of the block before it and its own.
    k, v = (F.pad(x, (0, 0, block - slots, after)).unflatten(2, (n + 1, block)) for x in (k, v))
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], 3) for x in (k, v))  # [B, H, n, 2 * block, d]
    keys = torch.arange(-block, block, device=q.device)  # position relative to the block's first query
    back = torch.arange(block, device=q.device)[:, None] - keys
    filled = keys + block * torch.arange(n, device=q.device)[:, None, None] >= -past[:, None, None, None]  # [B, n, 1, 2 * block]
    hidden = ~((back >= 0) & (back < window) & filled)[:, None]
    logits = q @ k.mT
    # A query always sees itself, even one that only fills up a block. Adding has a gradient that costs nothing.
    bias = torch.zeros(hidden.shape, dtype=logits.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    return ((logits + bias).softmax(-1) @ v).flatten(2, 3)[:, :, :T]
