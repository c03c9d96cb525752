"""Choose where rollouts are sampled (paper, section 3.1): score every token, cut the sequence into P chunks, draw one position a chunk.

Two axes: a score (how interesting a token is) and a draw (how a position is taken from the scores of its chunk), each a table of
functions by the names `NSPConfig` takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.context import context_divergence, next_sum
from refine_nsp.nsp.forward import Predictions
from refine_nsp.nsp.records import Batch, inverse_cdf


@torch.no_grad()
def select(predictions: Predictions) -> Tensor:
    """Choose positions [B, P] long by the score and the draw of the settings; -1 where a chunk has no admissible token."""
    work = predictions.work
    return select_positions(SCORES[work.config.score](predictions), work.batch, work.draws.positions, work.config)


def entropy_score(predictions: Predictions) -> Tensor:
    """Score by the entropy of the next-token distribution, smoothed (section 3.1)."""
    return smooth_entropy(predictions.entropy, predictions.work.batch, predictions.work.config)


def context_score(predictions: Predictions, gain: bool) -> Tensor:
    """Score by how much far context changes the prediction of the next K tokens: by their KL, or by what it gains for the true ones."""
    work = predictions.work
    d = context_divergence(work.model, work.batch, predictions.hidden, work.config, gain)
    return next_sum(d, work.config.rollout_length)


SCORES: dict[str, Callable[[Predictions], Tensor]] = {
    "entropy": entropy_score,
    "context_kl": partial(context_score, gain=False),
    "context_gain": partial(context_score, gain=True),
    "none": lambda predictions: torch.zeros_like(predictions.entropy),
}  # (what a pass says of every token) -> scores [B, T]; higher is more interesting


def smooth_entropy(entropy: Tensor, batch: Batch, config: NSPConfig) -> Tensor:
    """Take the moving average of entropy [B, T] over an odd window -> [B, T].

    `centred` averages the real tokens inside the window; `published` counts zeros beyond the edges and whatever stands at pads as well.
    """
    if config.smoothed == "none":
        return entropy
    window = config.window
    if config.smoothed == "published":
        return F.avg_pool1d(entropy[:, None], window, stride=1, padding=window // 2)[:, 0]
    real = batch.real.to(entropy.dtype)
    pooled = [F.avg_pool1d(x[:, None], window, stride=1, padding=window // 2)[:, 0] for x in (entropy * real, real)]
    return pooled[0] / pooled[1].clamp(min=torch.finfo(entropy.dtype).tiny)


def draw_sample(scores: Tensor, allowed: Tensor, u: Tensor, tau: float) -> Tensor:
    """Draw from softmax(score / tau) over the allowed tokens of each chunk."""
    logits = (scores / tau).masked_fill(~allowed, -torch.inf)
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    return inverse_cdf((logits - top).exp(), u.to(scores.device, non_blocking=True)[..., None])[..., 0]


DRAWS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sample": draw_sample,
    "greatest": lambda scores, allowed, u, tau: scores.masked_fill(~allowed, -torch.inf).argmax(-1),
    "least": lambda scores, allowed, u, tau: (-scores).masked_fill(~allowed, -torch.inf).argmax(-1),
}  # (scores [B, P, T], allowed [B, P, T] bool, u [B, P], tau) -> token [B, P] long


def select_positions(scores: Tensor, batch: Batch, u: Tensor, config: NSPConfig) -> Tensor:
    """Choose one position per chunk by scores [B, T] -> [B, P] long, -1 where a chunk has no admissible token.

    u: [B, P] uniforms in [0, 1). As published, several chunks may have the same position.
    """
    P, T = config.positions_per_sequence, scores.shape[1]
    if int(count_positions(batch.text_lengths, config, batch.consumed).sum()) < P * int((batch.text_lengths > 0).sum()):
        _warn_once_about_short_sequences()
    allowed = chunk_tokens(batch.text_lengths, T, config, batch.consumed).to(scores.device, non_blocking=True)  # [B, P, T]
    # A broken model (NaN) still gets admissible positions; its step is skipped where losses and gradients are checked.
    tokenwise = scores.double().nan_to_num()[:, None].expand(-1, P, -1)
    chosen = DRAWS[config.drawn](tokenwise, allowed, u, config.tau)
    if config.published:  # its code draws anywhere, and moves what lies outside the bounds to the nearer one
        first, last = (x[:, None].to(chosen.device, non_blocking=True) for x in bounds(batch.text_lengths, config))
        chosen = chosen.clamp(first, last)
    return torch.where(allowed.any(-1), chosen, -1)


def chunk_of_tokens(lengths: Tensor, n_tokens: int, P: int) -> Tensor:
    """Number the P equal chunks of the real tokens that tokens fall in, [B, T] long; the remainder goes to the last."""
    size = torch.div(lengths, P, rounding_mode="floor").clamp(min=1)
    index = torch.arange(n_tokens)
    return torch.div(index, size[:, None], rounding_mode="floor").clamp(max=P - 1)


def bounds(lengths: Tensor, config: NSPConfig, consumed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give the first and last admissible position of each sequence, [B] each; there is none where the last comes before the first.

    Ours have at least `min_prefix` tokens before t (`consumed` [B] before a row's first among them) and K after it. Published ones have
    `min_prefix` tokens up to t and as many after it; on a text that is too short for both, the second rule wins.
    """
    if config.published:
        last = lengths - 1 - config.min_prefix
        return last.clamp(max=config.min_prefix - 1), last
    before = torch.zeros_like(lengths) if consumed is None else consumed
    return (config.min_prefix - before).clamp(min=0), lengths - 1 - config.rollout_length


def admissible(lengths: Tensor, n_tokens: int, config: NSPConfig, consumed: Tensor | None = None) -> Tensor:
    """Mark where positions can be, from the first to the last of `bounds`; [B, T] bool."""
    t = torch.arange(n_tokens)
    first, last = bounds(lengths, config, consumed)
    return (t >= first[:, None]) & (t <= last[:, None])


def chunk_tokens(lengths: Tensor, n_tokens: int, config: NSPConfig, consumed: Tensor | None = None) -> Tensor:
    """Mark the tokens of each chunk that its position is drawn from, the admissible ones; [B, P, T] bool.

    As published, all are drawn from so long as the sequence has `config.shortest` tokens, and the remainder is in no chunk.
    """
    P = config.positions_per_sequence
    chunk = chunk_of_tokens(lengths, n_tokens, P)
    inside = chunk[:, None] == torch.arange(P)[:, None]
    if not config.published:
        return admissible(lengths, n_tokens, config, consumed)[:, None] & inside
    in_chunks = torch.where(lengths < config.shortest, 0, lengths - lengths % P)
    return inside & (torch.arange(n_tokens) < in_chunks[:, None])[:, None]


def count_positions(lengths: Tensor, config: NSPConfig, consumed: Tensor | None = None) -> Tensor:
    """Count the positions that `select_positions` will choose in each sequence [B]; they depend on lengths, and tokens before, alone."""
    longest = max(lengths.tolist(), default=0)
    return chunk_tokens(lengths, max(longest, 1), config, consumed).any(-1).sum(-1)


_warned = False


def _warn_once_about_short_sequences() -> None:
    """Warn, at the first time only, that some chunks hold no position."""
    global _warned
    if not _warned:
        _warned = True
        rule = "(min_prefix tokens before it, rollout_length after it): they get fewer positions"
        warnings.warn(f"some sequences are too short for all their chunks to hold a position {rule}", stacklevel=4)
