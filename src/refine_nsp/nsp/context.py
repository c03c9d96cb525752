"""Label-free context scores: how much the whole prefix, against the last W tokens only, changes the next K predictions.

They find the positions whose continuation depends on far context; entropy finds mostly hard filler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.ops.linear_cross_entropy import block_tokens

TOKENS_AT_ONCE = 8192  # of the local windows, so that memory does not grow with T


@torch.no_grad()
def context_scores(model: Any, input_ids: Tensor, hidden: Tensor, lengths: Tensor, config: NSPConfig) -> Tensor:
    """score(t) = d[t] + ... + d[t+K-1] -> [B, T], float32 or better.

    `context_kl`: d[t] = KL(p(.|whole prefix) || p(.|last W tokens only)); `context_gain`: d[t] = max(0, log p(x_{t+1}|whole
    prefix) - log p(x_{t+1}|last W only)). 0 where t < 2W.

    Args:
        model: a causal model of this package.
        input_ids: [B, T] long. hidden: [B, T, D], final-norm output of the pass over the whole sequence.
        lengths: [B] long. config: `selection`, `local_window` (W), `rollout_length` (K).
    """
    B, T = input_ids.shape
    W = config.local_window
    d = hidden.new_zeros(B, T, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if T > 2 * W:
        local = local_hidden(model, input_ids, W)  # tokens 2W ..
        targets = F.pad(input_ids[:, 1:], (0, 1))[:, 2 * W :]
        gain = config.selection == "context_gain"
        d[:, 2 * W :] = _divergence(model.lm_head.weight, hidden[:, 2 * W :], local, targets, gain)
        # Without a target (or at a pad) there is nothing to gain.
        d.masked_fill_(torch.arange(T, device=d.device) >= lengths[:, None] - (1 if gain else 0), 0.0)
    total = F.pad(d.cumsum(1), (1, config.rollout_length))
    total[:, T + 1 :] = total[:, T, None]
    return total[:, config.rollout_length : config.rollout_length + T] - total[:, :T]


def local_hidden(model: Any, input_ids: Tensor, W: int) -> Tensor:
    """Final-norm output [B, T - 2W, D] at tokens 2W.., each from a fresh state W to 2W - 1 tokens before it.

    Windows of 2W tokens with stride W, read in their second half.
    """
    B, T = input_ids.shape
    padded = F.pad(input_ids, (0, -T % W))
    windows = padded.unfold(1, 2 * W, W)[:, 1:]  # [B, n, 2W]; the first one is read where t < 2W, which counts as 0
    n = windows.shape[1]
    flat = windows.reshape(-1, 2 * W)
    parts = [
        model.model(rows, use_cache=False).last_hidden_state[:, W:] for rows in flat.split(max(1, TOKENS_AT_ONCE // (2 * W)))
    ]
    return torch.cat(parts).reshape(B, n * W, -1)[:, : T - 2 * W]


def _divergence(weight: Tensor, whole: Tensor, local: Tensor, targets: Tensor, gain: bool) -> Tensor:
    """d of `context_scores` for aligned hidden states [B, t, D] -> [B, t], by blocks of tokens."""
    n = block_tokens(2 * weight.shape[0])
    parts = []
    for w, v, x in zip(whole.flatten(0, 1).split(n), local.flatten(0, 1).split(n), targets.flatten().split(n), strict=True):
        p, q = ((h @ weight.T).to(torch.promote_types(h.dtype, torch.float32)).log_softmax(-1) for h in (w, v))
        if gain:
            parts.append((p - q).gather(-1, x[:, None])[:, 0].clamp(min=0.0))
        else:
            parts.append(torch.linalg.vecdot(p.exp(), p - q))
    return torch.cat(parts).view(whole.shape[:2])
