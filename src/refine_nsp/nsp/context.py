"""Score tokens without labels: how much the whole prefix, against the last W tokens only, changes the prediction of a token.

These scores find the tokens whose prediction depends on far context; entropy finds mostly hard filler. Local predictions are made in
windows of `local_span` * W tokens that start from a fresh state. Those of the first W tokens of a window are not used, so that a token has
at least W and less than `local_span` * W tokens of context.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch
from refine_nsp.ops.linear_cross_entropy import block_tokens
from refine_nsp.ops.memory import part
from refine_nsp.processes import is_sharded

# Local windows of so many tokens are run together, by device: their activations come on top of those of the whole pass, and small
# batches leave a GPU idle.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@torch.no_grad()
def context_divergence(model: CausalModel, batch: Batch, hidden: Tensor, config: NSPConfig, gain: bool) -> Tensor:
    """Compute context scores d [B, T], float32 or better, or return those that the batch brings.

    d[t] = KL(p(.|whole prefix) || p(.|last W tokens only)), or with `gain` max(0, log p(x_{t+1}|whole prefix) - log p(x_{t+1}|last W
    only)); 0 where t < 2W.

    Args:
        hidden: [B, T, D], final-norm output of the pass over the whole sequence.
        config: `local_window` (W), `local_span`.
    """
    d = hidden.new_zeros(batch.input_ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if batch.scores is not None:
        return batch.scores.to(d)
    first = 2 * config.local_window
    if batch.input_ids.shape[1] > first:
        local = local_hidden(model, batch, config.local_window, config.local_span)
        targets = F.pad(batch.input_ids[:, 1:], (0, 1))[:, first:]
        d[:, first:] = _divergence(head_weight(model), hidden[:, first:], local, targets, gain)
        # Without a target (or at a pad) there is nothing to gain.
        d.masked_fill_(~(batch.target_mask if gain else batch.real), 0.0)
    return d


def next_sum(d: Tensor, K: int) -> Tensor:
    """Sum d[t] + ... + d[t+K-1] for every token of d [B, T] -> [B, T]."""
    T = d.shape[1]
    total = F.pad(d.cumsum(1), (1, K))
    total[:, T + 1 :] = total[:, T, None]
    return total[:, K : K + T] - total[:, :T]


@part("context")
@torch.no_grad()
def local_hidden(model: CausalModel, batch: Batch, W: int, span: int) -> Tensor:
    """Predict tokens 2W.. from local windows: the final-norm output [B, T - 2W, D], each from a fresh state W to span * W - 1 tokens back.

    Windows of pads alone are not run, and their output is zeros. The processes of a model in shards must make the same passes; they run
    all windows.
    """
    B, T = batch.input_ids.shape
    stride = (span - 1) * W
    padded = F.pad(batch.input_ids, (0, -(T - 2 * W) % stride))
    windows = padded[:, W:].unfold(1, span * W, stride)  # [B, n, span * W]; what stands before 2W is scored 0, so never read
    n = windows.shape[1]
    ends = torch.full_like(batch.lengths, T) if is_sharded(model) else batch.text_lengths  # on the host
    needed = (2 * W + stride * torch.arange(n) < ends[:, None]).flatten().nonzero()[:, 0]
    needed = needed if len(needed) else needed.new_zeros(1)  # one of them says the output's width, where all rows are answers
    needed = needed.to(batch.input_ids.device, non_blocking=True)
    rows = windows.reshape(B * n, span * W)[needed]
    at_once = TOKENS_AT_ONCE.get(rows.device.type, TOKENS_AT_ONCE["cpu"]) // (span * W)
    parts = [model.model(some, use_cache=False).last_hidden_state[:, W:] for some in rows.split(max(1, at_once))]
    hidden = torch.cat(parts)
    hidden = hidden.new_zeros(B * n, *hidden.shape[1:]).index_copy(0, needed, hidden) if len(hidden) < B * n else hidden
    return hidden.reshape(B, n * stride, -1)[:, : T - 2 * W]


def _divergence(weight: Tensor, hidden: Tensor, local: Tensor, targets: Tensor, gain: bool) -> Tensor:
    """Compute d of `context_divergence` for aligned hidden states [B, t, D] -> [B, t], by blocks of tokens."""
    n = block_tokens(2 * weight.shape[0], weight.device)
    parts = []
    for w, v, x in zip(hidden.flatten(0, 1).split(n), local.flatten(0, 1).split(n), targets.flatten().split(n), strict=True):
        p, q = ((h @ weight.T).to(torch.promote_types(h.dtype, torch.float32)).log_softmax(-1) for h in (w, v))
        if gain:
            parts.append((p - q).gather(-1, x[:, None])[:, 0].clamp(min=0.0))
        else:
            parts.append(torch.linalg.vecdot(p.exp(), p - q))
    return torch.cat(parts).view(hidden.shape[:2])
