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
from refine_nsp.errors import RefineError
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
    only)); 0 where t < 2W. Where states are carried, t counts from the first token that was read.

    Args:
        hidden: [B, T, D], final-norm output of the pass over the whole sequence.
        config: `local_window` (W), `local_span`.
    """
    d = hidden.new_zeros(batch.input_ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if batch.scores is not None:
        return batch.scores.to(d)
    local = local_hidden(model, batch, config.local_window, config.local_span)
    if local is not None:
        first = d.shape[1] - local.shape[1]
        targets = F.pad(batch.input_ids[:, 1:], (0, 1))[:, first:]
        d[:, first:] = divergence(head_weight(model), hidden[:, first:], local, targets, gain)
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
    """Predict tokens from local windows: the final-norm output of tokens 2W.., [B, T - 2W, D], each from a fresh state W to span * W - 1
    tokens back; None where no token is scored. Where states are carried, of all tokens [B, T, D].

    Windows of pads alone are not run, and their output is zeros. The processes of a model in shards must make the same passes; they run
    all windows.
    """
    if batch.starts is not None:
        return _local_hidden_of_document(model, batch, batch.starts.recent, W, span)
    B, T = batch.input_ids.shape
    if 2 * W >= T:
        return None
    stride = (span - 1) * W
    padded = F.pad(batch.input_ids, (0, -(T - 2 * W) % stride))
    windows = padded[:, W:].unfold(1, span * W, stride)  # [B, n, span * W]; what stands before 2W is scored 0, so never read
    n = windows.shape[1]
    ends = torch.full_like(batch.lengths, T) if is_sharded(model) else batch.text_lengths  # on the host
    needed = (2 * W + stride * torch.arange(n) < ends[:, None]).flatten().nonzero()[:, 0]
    needed = needed if len(needed) else needed.new_zeros(1)  # one of them says the output's width, where all rows are answers
    needed = needed.to(batch.input_ids.device, non_blocking=True)
    return _run_windows(model, windows.reshape(B * n, span * W), needed, W).reshape(B, n * stride, -1)[:, : T - 2 * W]


def _run_windows(model: CausalModel, windows: Tensor, needed: Tensor, W: int) -> Tensor:
    """Run the windows [n, span * W] numbered `needed`, and return what is behind their first W tokens; zeros for the others."""
    rows = windows[needed]
    at_once = TOKENS_AT_ONCE.get(rows.device.type, TOKENS_AT_ONCE["cpu"]) // windows.shape[1]
    parts = [model.model(some, use_cache=False).last_hidden_state[:, W:] for some in rows.split(max(1, at_once))]
    hidden = torch.cat(parts)
    return (
        hidden.new_zeros(len(windows), *hidden.shape[1:]).index_copy(0, needed, hidden) if len(hidden) < len(windows) else hidden
    )


def _local_hidden_of_document(model: CausalModel, batch: Batch, recent: Tensor, W: int, span: int) -> Tensor | None:
    """Predict all tokens [B, T, D] from the local windows that a pass over the whole document would have, by their place in it.

    recent: [B, H] long, the tokens before each row, at least span * W - 1 of them where there are so many.
    """
    (B, T), stride, before = batch.input_ids.shape, (span - 1) * W, batch.consumed
    if recent.shape[1] < min(int(before.max()), span * W - 1):
        raise RefineError(
            f"starts.recent has the last {recent.shape[1]} tokens; context scores with local_window={W} and local_span={span} read the "
            f"last {span * W - 1}"
        )
    sharded = is_sharded(model)
    if not sharded and int((before + batch.lengths).max()) <= 2 * W:
        return None
    first = torch.div(before - 2 * W, stride, rounding_mode="floor").clamp(min=0)  # [B], each row's first window, by number
    n = -(-T // stride) + 1
    begins = W + stride * (first[:, None] + torch.arange(n))  # [B, n], where windows begin in the document
    ends = torch.full_like(before, torch.iinfo(before.dtype).max) if sharded else before + batch.lengths
    needed = (begins + W < ends[:, None]).flatten().nonzero()[:, 0].to(recent.device, non_blocking=True)
    tokens = torch.cat([recent, batch.input_ids], 1)
    places = begins[..., None] + torch.arange(span * W) - before[:, None, None] + recent.shape[1]
    places = places.clamp(0, tokens.shape[1] - 1).flatten(1).to(recent.device, non_blocking=True)
    hidden = _run_windows(model, tokens.gather(1, places).view(B * n, span * W), needed, W).reshape(B, n * stride, -1)
    own = (before - 2 * W - stride * first)[:, None] + torch.arange(T)  # [B, T], each token's place among these
    own = own.clamp(0, n * stride - 1).to(recent.device, non_blocking=True)
    return hidden.gather(1, own[..., None].expand(-1, -1, hidden.shape[-1]))


def divergence(weight: Tensor, hidden: Tensor, local: Tensor, targets: Tensor, gain: bool) -> Tensor:
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
