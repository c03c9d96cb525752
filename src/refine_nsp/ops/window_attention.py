"""Causal sliding-window attention, block by block, so that memory and time are linear in T. d is the width of a head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_BLOCK = 128  # queries a call: a short window would make many calls too small to pay for themselves


def naive_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor) -> Tensor:
    """One [T, past + T] mask; same arguments as `window_attention`."""
    return _attend(q, k, v, window, past, 0, q.shape[2])


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor) -> Tensor:
    """Each query sees itself and the `window - 1` keys before it.

    Args:
        q: [B, H, T, d].
        k, v: [B, H, slots + T, d]: slots of keys from before, the newest last, then those of the T queries.
        window: at least 1.
        past: [B] long, how many of the slots are filled.
    """
    T = q.shape[2]
    # A block as long as the window sees at most two windows of keys, half of them masked: shorter ones mask less but read keys oftener.
    block = max(window, MIN_BLOCK)
    if block >= T:
        return _attend(q, k, v, window, past, 0, T)
    return torch.cat([_attend(q, k, v, window, past, s, min(s + block, T)) for s in range(0, T, block)], 2)


def branched_window_attention(
    q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor
) -> Tensor:
    """`window_attention` of S*n rows, of which n neighbours share their past: it is neither copied nor joined to their own keys.

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


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, past: Tensor, start: int, end: int) -> Tensor:
    """Queries start .. end - 1."""
    slots = k.shape[2] - q.shape[2]
    first = max(0, slots + start - window + 1)  # what lies before the first query's window is not even read
    keys = torch.arange(first, slots + end, device=q.device) - slots  # position relative to the first query
    queries = torch.arange(start, end, device=q.device)
    back = queries[:, None] - keys
    visible = (back >= 0) & (back < window) & (keys >= -past[:, None, None])  # [B, t, keys]
    span = slice(first, slots + end)
    return F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, span], v[:, :, span], attn_mask=visible[:, None])
