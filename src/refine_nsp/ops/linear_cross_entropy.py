"""Cross-entropy of a language-model head without ever holding [T, V] logits.

The head is applied to one block of tokens at a time. Since the weight of every token in the loss is known beforehand (1 / number of
targets, or 0), the gradient is formed in the forward pass while the block's logits are there: logits are computed once, and the
backward only multiplies by the incoming scalar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refine_nsp.ops.precision import autocast_dtype, without_autocast

BLOCK_LOGITS = 2**22  # logits held at once: 16 MB in float32


@dataclass(frozen=True)
class TokenStats:
    """Per token, without gradient; nats. All [n], float32 or better but `argmax` (long)."""

    nll: Tensor
    entropy: Tensor
    argmax: Tensor


def block_tokens(vocabulary: int) -> int:
    """Tokens per block so that a block's logits stay near `BLOCK_LOGITS`."""
    return max(16, BLOCK_LOGITS // vocabulary)


def naive_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, TokenStats]:
    """All logits at once; same arguments and results as `linear_cross_entropy`."""
    logits = hidden @ weight.T
    log_p = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (nll * token_weights).sum(), TokenStats(nll.detach(), entropy.detach(), logits.argmax(-1))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, TokenStats]:
    """sum_i token_weights[i] * NLL_i of a linear head, by blocks of tokens.

    Args:
        hidden: [n, D], after the final norm.
        weight: [V, D] of the head.
        targets: [n] long, each in [0, V); where the weight is 0 the target only needs to be in range.
        token_weights: [n], for example mask / mask.sum(). Not differentiated.

    Returns:
        The scalar loss (float32 or better) and detached per-token NLL, entropy and argmax.
    """
    dtype = autocast_dtype(hidden)
    loss, nll, entropy, argmax = _run(hidden.to(dtype), weight.to(dtype), targets, token_weights)
    return loss, TokenStats(nll, entropy, argmax)


@without_autocast
def _run(*args: Tensor) -> tuple[Tensor, ...]:
    return _LinearCrossEntropy.apply(*args)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Any:
        n, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        need_h, need_w = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_h else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_w else None
        nll, entropy = (torch.empty(n, dtype=wide, device=hidden.device) for _ in range(2))
        argmax = torch.empty(n, dtype=torch.long, device=hidden.device)
        token_weights = token_weights.to(wide)
        for block in torch.arange(n, device=hidden.device).split(block_tokens(weight.shape[0])):
            s = slice(int(block[0]), int(block[-1]) + 1)
            h = hidden[s]
            logits = (h @ weight.T).to(wide)
            top = logits.max(-1)
            argmax[s] = top.indices
            at_target = logits.gather(-1, targets[s, None])[:, 0] - top.values
            logits -= top.values[:, None]
            p = torch.exp(logits)
            mass = p.sum(-1)
            log_mass = mass.log()
            nll[s] = log_mass - at_target
            # H = log Z - E[logit]; the expectation is a row-wise dot product, without another [block, V] buffer.
            expected = torch.linalg.vecdot(p, logits) / mass
            entropy[s] = log_mass - expected
            if need_h or need_w:
                p *= (token_weights[s] / mass)[:, None]  # becomes d loss / d logits
                p.scatter_add_(-1, targets[s, None], -token_weights[s, None])
                p = p.to(hidden.dtype)
                if dhidden is not None:
                    torch.mm(p, weight, out=dhidden[s])
                if dweight is not None:
                    dweight += p.T @ h
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        ctx.mark_non_differentiable(nll, entropy, argmax)
        return (nll * token_weights).sum(), nll, entropy, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> Any:
        dhidden, dweight = ctx.saved_tensors
        scaled = [None if g is None else g * dloss.to(g.dtype) for g in (dhidden, dweight)]
        return scaled[0], scaled[1], None, None


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of `tokens` [...] under softmax(logits [..., V] / temperature), and its entropy; both differentiable."""
    log_p = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    return log_p.gather(-1, tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
