"""Where to roll out (paper, section 3.1): score every token, cut the sequence into P chunks, draw one position a chunk."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.records import inverse_cdf


def smooth_entropy(entropy: Tensor, lengths: Tensor, config: NSPConfig) -> Tensor:
    """Moving average of entropy [B, T] with an odd window -> [B, T].

    `centred` averages the real tokens inside the window. `published` divides by the whole window, counting zeros beyond the edges
    and whatever stands at pads, as the original code does.
    """
    if config.smoothing == "none":
        return entropy
    window = config.window
    if config.smoothing == "published":
        return F.avg_pool1d(entropy[:, None], window, stride=1, padding=window // 2)[:, 0]
    real = _real(entropy, lengths).to(entropy.dtype)
    pooled = [F.avg_pool1d(x[:, None], window, stride=1, padding=window // 2)[:, 0] for x in (entropy * real, real)]
    return pooled[0] / pooled[1].clamp(min=torch.finfo(entropy.dtype).tiny)


def chunk_of_tokens(lengths: Tensor, n_tokens: int, P: int) -> Tensor:
    """[B, T] long: which of the P equal chunks of the real tokens each token falls in; the remainder goes to the last."""
    size = torch.div(lengths, P, rounding_mode="floor").clamp(min=1)
    index = torch.arange(n_tokens, device=lengths.device)
    return torch.div(index, size[:, None], rounding_mode="floor").clamp(max=P - 1)


def admissible(lengths: Tensor, n_tokens: int, config: NSPConfig) -> Tensor:
    """[B, T] bool: t with at least `min_prefix` tokens before it and K after it: min_prefix <= t and t + K <= length - 1."""
    t = torch.arange(n_tokens, device=lengths.device)
    return (t >= config.min_prefix) & (t + config.rollout_length <= lengths[:, None] - 1)


def select_positions(scores: Tensor, lengths: Tensor, u: Tensor, config: NSPConfig) -> Tensor:
    """One position per chunk -> [B, P] long, -1 where a chunk has no admissible token.

    Args:
        scores: [B, T]; smoothed entropy, or a context score.
        lengths: [B] long.
        u: [B, P] uniforms in [0, 1).
        config: `selection`, `tau`, `positions_per_sequence`, `min_prefix`, `rollout_length`.
    """
    P, T = config.positions_per_sequence, scores.shape[1]
    chunk = chunk_of_tokens(lengths, T, P)
    allowed = admissible(lengths, T, config)[:, None] & (chunk[:, None] == torch.arange(P, device=chunk.device)[:, None])
    some = allowed.any(-1)  # [B, P]
    if not bool(some.all()):
        _warn_once_about_short_sequences()
    # A broken model (NaN) still gets admissible positions; its step is skipped where losses and gradients are checked.
    tokenwise = scores.double().nan_to_num()[:, None].expand(-1, P, -1)  # [B, P, T]
    if config.selection in ("argmax", "argmin"):
        sign = 1.0 if config.selection == "argmax" else -1.0
        chosen = (sign * tokenwise).masked_fill(~allowed, -torch.inf).argmax(-1)
    else:
        logits = torch.zeros_like(tokenwise) if config.selection == "uniform" else tokenwise / config.tau
        logits = logits.masked_fill(~allowed, -torch.inf)
        top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        chosen = inverse_cdf((logits - top).exp(), u.to(scores.device))
    return chosen.where(some, torch.full_like(chosen, -1))


def _real(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


_warned = False


def _warn_once_about_short_sequences() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "some sequences are too short for all their chunks to hold a position (min_prefix tokens before it, "
            "rollout_length after it): they get fewer positions",
            stacklevel=3,
        )


def count_positions(lengths: Tensor, n_tokens: int, config: NSPConfig) -> Tensor:
    """How many positions `select_positions` will choose in each sequence [B]: it depends on lengths alone."""
    chunk = chunk_of_tokens(lengths, n_tokens, config.positions_per_sequence)
    allowed = admissible(lengths, n_tokens, config)
    ids = torch.arange(config.positions_per_sequence, device=lengths.device)
    return (allowed[:, None] & (chunk[:, None] == ids[:, None])).any(-1).sum(-1)
