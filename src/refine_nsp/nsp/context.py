"""Score tokens without labels: how much the whole prefix, against the last W tokens only, changes the prediction of a token.

Local predictions are made in windows of `local_span` * W tokens that start from a fresh state. Those of the first W tokens of a window are
not used, so that a token has at least W and less than `local_span` * W tokens of context.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch
from refine_nsp.ops.linear_cross_entropy import head_divergence
from refine_nsp.ops.memory import part
from refine_nsp.processes import is_sharded

# Local windows of so many tokens are run together, by device: their activations come on top of those of the whole pass, and small
# batches leave a GPU idle.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@torch.no_grad()
def context_divergence(model: CausalModel, batch: Batch, hidden: Tensor, config: NSPConfig, gain: bool) -> Tensor:
    """Compute context scores d [B, T], float32 or better, or return those that the batch brings.

    d[t] = KL(p(.|whole prefix) || p(.|last W tokens only)), or with `gain` max(0, log p(x_{t+1}|whole prefix) - log p(x_{t+1}|last W
    only)); 0 where t < 2W. Where states are carried, t counts from the first token that was read.

    hidden: [B, T, D], final-norm output of the pass over the whole sequence.
    """
    d = hidden.new_zeros(batch.input_ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if batch.scores is not None:
        return batch.scores.to(d)
    local = local_hidden(model, batch, config.local_window, config.local_span)
    if local is not None:
        first = 2 * config.local_window if batch.starts is None else 0
        targets = F.pad(batch.input_ids[:, 1:], (0, 1))[:, first:]
        d[:, first:] = divergence(head_weight(model), hidden[:, first:], local[:, first:], targets, gain)
        # Without a target (or at a pad) there is nothing to gain.
        d.masked_fill_(~((batch.target_mask if gain else batch.real) & have_far_context(batch, config.local_window)), 0.0)
    return d


def have_far_context(batch: Batch, W: int) -> Tensor:
    """Mark the tokens with at least 2W tokens before them in their document, which alone are scored; [B, T] bool on the device."""
    far = torch.arange(batch.input_ids.shape[1]) >= 2 * W - batch.consumed[:, None]
    return far.to(batch.input_ids.device, non_blocking=True)


def next_sum(d: Tensor, K: int) -> Tensor:
    """Sum d[t] + ... + d[t+K-1] for every token of d [B, T] -> [B, T]."""
    T = d.shape[1]
    total = F.pad(d.cumsum(1), (1, K))
    total[:, T + 1 :] = total[:, T, None]
    return total[:, K : K + T] - total[:, :T]


@part("context")
@torch.no_grad()
def local_hidden(model: CausalModel, batch: Batch, W: int, span: int) -> Tensor | None:
    """Predict tokens from local windows: the final-norm output [B, T, D] of every token that can be scored, from a fresh state W to
    span * W - 1 tokens back; None where no token can. Windows lie where a pass over the whole document would have them.

    Windows of pads alone are not run, and their output is zeros. The processes of a model in shards must make the same passes, and run
    all windows.

    Raises:
        RefineError: `starts.recent` holds too few of the tokens before the rows.
    """
    (B, T), stride, before = batch.input_ids.shape, (span - 1) * W, batch.consumed
    recent = batch.input_ids[:, :0] if batch.starts is None else batch.starts.recent
    if recent.shape[1] < min(int(before.max()), span * W - 1):
        raise RefineError(
            f"starts.recent has the last {recent.shape[1]} tokens; context scores with local_window={W} and local_span={span} read the "
            f"last {span * W - 1}"
        )
    sharded = is_sharded(model)
    ends = before + (T if sharded else batch.text_lengths)  # [B] on the host, in the document
    if sharded and batch.starts is not None:  # rows begin where they will, so it takes all to be as many
        ends = torch.full_like(before, torch.iinfo(before.dtype).max)
    if int(ends.max()) <= 2 * W:
        return None
    first = torch.div(before - 2 * W, stride, rounding_mode="floor").clamp(min=0)  # [B], each row's first window, by number
    n = -(-T // stride) + 1
    begins = W + stride * (first[:, None] + torch.arange(n))  # [B, n], where windows begin in the document
    needed = (begins + W < ends[:, None]).flatten().nonzero()[:, 0].to(recent.device, non_blocking=True)
    tokens = torch.cat([recent, batch.input_ids], 1)
    places = begins[..., None] + torch.arange(span * W) - before[:, None, None] + recent.shape[1]
    places = places.clamp(0, tokens.shape[1] - 1).flatten(1).to(recent.device, non_blocking=True)
    windows = tokens.gather(1, places).view(B * n, span * W)[needed]
    at_once = max(1, TOKENS_AT_ONCE.get(windows.device.type, TOKENS_AT_ONCE["cpu"]) // windows.shape[1])
    parts = [model.model(some, use_cache=False).last_hidden_state[:, W:] for some in windows.split(at_once)]
    run = torch.cat(parts)
    hidden = run.new_zeros(B * n, *run.shape[1:]).index_copy(0, needed, run).view(B, n * stride, -1)
    own = (before - 2 * W - stride * first)[:, None] + torch.arange(T)  # [B, T], each token's place among these
    own = own.clamp(0, n * stride - 1).to(recent.device, non_blocking=True)
    return hidden.gather(1, own[..., None].expand(-1, -1, hidden.shape[-1]))


def divergence(weight: Tensor, hidden: Tensor, local: Tensor, targets: Tensor, gain: bool) -> Tensor:
    """Compute d of `context_divergence` for aligned hidden states [B, t, D] -> [B, t], by blocks of tokens."""
    d = head_divergence(hidden.flatten(0, 1), local.flatten(0, 1), weight, targets.flatten(), gain)
    return d.view(hidden.shape[:2])
