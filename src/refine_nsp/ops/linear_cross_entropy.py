"""Compute the losses of a language-model head without ever holding [T, V] logits.

The head is applied to one block of tokens at a time. Since every token's weight in the loss is known beforehand, the gradient is formed in
the forward pass while the block's logits are there; the backward only multiplies by the incoming scalar. n counts tokens, m the tokens of
a block.

`linear_next_sequence` adds next-sequence prediction in closed form (docs/method.md). With log-probabilities l_i of the true tokens, a
rollout from t matches its first j tokens with probability P_j = exp(l_t + ... + l_{t+j-1}), and J_t = (1/K) sum_{j=1..K} f_M(P_j) with
f_M(P) = -sum_{k=1..M} (1 - P)^k / k, which is P - 1 for M = 1 and log P for M = inf (arXiv 2602.02710). J_t is a function of the l_i
alone, so its gradient with respect to the logits is that of a cross-entropy whose coefficients are

    c_i = d(sum_t w_t J_t) / d l_i = (1/K) sum_{t in i-K+1..i} w_t sum_{j > i-t} (1 - (1 - P_j)^M),

for K = 1 c_i = w_i (1 - (1 - p_i)^M). The same block gives both; a block reads K - 1 tokens more on either side, which is all c_i needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.precision import autocast_dtype, without_autocast

BLOCK_LOGITS = 2**22  # logits held at once: 16 MB in float32
# A logit of a block is held in bfloat16, then wide, with its exponential, a second head's logit to compare with, and its gradient.
BYTES_A_LOGIT = 2 + 4 + 4 + 4 + 2
DEVICE_SHARE, FREE_SHARE = 32, 4  # a block takes at most 1/32 of a device's memory and 1/4 of what is free of it


@dataclass(frozen=True)
class TokenStats:
    """Holds the statistics of n tokens in nats, without gradient. All are [n] in float32 or better, except `argmax` (long)."""

    nll: Tensor
    entropy: Tensor
    argmax: Tensor


def block_tokens(vocabulary: int, device: torch.device) -> int:
    """Choose the tokens of a block so that its logits stay in a processor's cache, or as many as a CUDA device has memory for."""
    if device.type == "cuda":
        tokens = _device_logits(device) // vocabulary
        return max(16, tokens - tokens % 128 if tokens > 128 else tokens)  # whole tiles
    # Every block reads all of the head's weights: with fewer tokens a huge vocabulary would be read for next to no arithmetic.
    return max(16, BLOCK_LOGITS // vocabulary)


def naive_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, TokenStats]:
    """Compute the loss with all logits at once; same arguments and results as `linear_cross_entropy`."""
    logits = hidden @ weight.T
    log_p = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (nll * token_weights).sum(), TokenStats(nll.detach(), entropy.detach(), logits.argmax(-1))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, TokenStats]:
    """Compute sum_i token_weights[i] * NLL_i of a linear head, by blocks of tokens.

    Args:
        hidden: [n, D], after the final norm.
        weight: [V, D], the head's.
        targets: [n] long, each in [0, V); where the weight is 0 the target only needs to be in range.
        token_weights: [n], for example mask / mask.sum(). Not differentiated.

    Returns:
        The scalar loss (float32 or better) and detached per-token NLL, entropy and argmax.
    """
    # Cast outside the function, so that autograd casts the gradients back.
    hidden, weight = cast_inputs(hidden, weight)
    loss, *stats = without_autocast(_LinearCrossEntropy.apply)(hidden, weight, targets, token_weights)
    return loss, TokenStats(*stats)


def _device_logits(device: torch.device) -> int:
    """Count the logits of a block, a power of two: free memory differs from step to step, and sums should be split alike."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    logits = min(total // DEVICE_SHARE, free // FREE_SHARE) // BYTES_A_LOGIT
    return 1 << max(logits, BLOCK_LOGITS).bit_length() - 1


def cast_inputs(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors to the dtype of the products, and detach them where gradients are off, which a function's autograd does not tell it."""
    dtype = autocast_dtype(tensors[0])
    return [(x if torch.is_grad_enabled() else x.detach()).to(dtype) for x in tensors]


def _blocks(n: int, weight: Tensor) -> list[slice]:
    """Cut n tokens into consecutive blocks, for the head `weight` [V, D]."""
    size = block_tokens(weight.shape[0], weight.device)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class _Block:
    """Holds the unnormalised softmax of one block's logits (`p` [m, V], `mass` [m]) and the statistics of its tokens, all in `wide`."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, wide: torch.dtype) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        # The product runs in the model's dtype, as in its own head; only sums over V need more.
        logits = (hidden @ weight.T).to(wide)
        top = logits.max(-1)
        self.argmax = top.indices
        at_target = logits.gather(-1, targets[:, None])[:, 0] - top.values
        logits -= top.values[:, None]  # so exp is at most 1; in place, since this is the largest tensor of a step
        self.p = torch.exp(logits)
        self.mass = self.p.sum(-1)
        log_mass = self.mass.log()
        self.nll = log_mass - at_target
        # H = log Z - E[logit]; the expectation is a row-wise dot product, without another [block, V] buffer.
        self.entropy = log_mass - torch.linalg.vecdot(self.p, logits) / self.mass

    def divergence(self, local: Tensor, gain: bool) -> Tensor:
        """Compute KL(p || q) [m], q the softmax of the head on `local` [m, D]; with `gain` max(0, log p - log q) of the target."""
        logits = (local @ self.weight.T).to(self.p.dtype)
        log_mass = logits.logsumexp(-1)
        if gain:
            log_q = logits.gather(-1, self.targets[:, None])[:, 0] - log_mass
            return (-self.nll - log_q).clamp(min=0.0)
        # This is E_p[-log q] - H(p), which rounding can bring below 0 where the two agree.
        return (log_mass - torch.linalg.vecdot(self.p, logits) / self.mass - self.entropy).clamp(min=0.0)


class _Outputs:
    """Collects the results of all blocks: statistics of every token, and the two gradients of a weighted sum of NLLs."""

    def __init__(self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> None:
        n, self.wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        self.dhidden = torch.empty_like(hidden) if need_hidden else None
        # It is wide, since it sums over blocks; each row of dhidden comes from one block.
        self.dweight = torch.zeros(weight.shape, dtype=self.wide, device=weight.device) if need_weight else None
        self.dtype = weight.dtype
        self.nll, self.entropy = (torch.empty(n, dtype=self.wide, device=hidden.device) for _ in range(2))
        self.argmax = torch.empty(n, dtype=torch.long, device=hidden.device)

    def keep(self, s: slice, block: _Block, inside: slice) -> None:
        """Keep the statistics of the tokens `inside` the block, which are tokens `s` of all."""
        self.nll[s], self.entropy[s], self.argmax[s] = block.nll[inside], block.entropy[inside], block.argmax[inside]

    def add_gradient(self, s: slice, block: _Block, inside: slice, token_weights: Tensor) -> None:
        """Add the gradient of sum(token_weights * NLL) over the tokens `inside`; the block's softmax is overwritten."""
        if self.dhidden is None and self.dweight is None:
            return
        p = block.p[inside]  # a view: it is scaled where it lies
        p *= (token_weights / block.mass[inside])[:, None]  # becomes d loss / d logits
        p.scatter_add_(-1, block.targets[inside, None], -token_weights[:, None])
        p = p.to(block.hidden.dtype)  # products in the dtype of the forward ones
        if self.dhidden is not None:
            torch.mm(p, block.weight, out=self.dhidden[s])
        if self.dweight is not None:
            self.dweight += p.T @ block.hidden[inside]

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of hidden and of the head, in their dtypes."""
        return self.dhidden, None if self.dweight is None else self.dweight.to(self.dtype)


@torch.no_grad()
@without_autocast
def head_divergence(hidden: Tensor, local: Tensor, weight: Tensor, targets: Tensor, gain: bool) -> Tensor:
    """Compute KL(p || q) [n] of a head's distributions on `hidden` and `local` [n, D], by blocks of tokens, float32 or better; with `gain`
    max(0, log p - log q) of the targets [n]. Each block reads the logits once for each of the two."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(hidden.dtype)
    return torch.cat(
        [_Block(hidden[s], weight, targets[s], wide).divergence(local[s], gain) for s in _blocks(hidden.shape[0], weight)]
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, ...]:
        out = _Outputs(hidden, weight, *ctx.needs_input_grad[:2])
        token_weights = token_weights.to(out.wide)
        for s in _blocks(hidden.shape[0], weight):
            block = _Block(hidden[s], weight, targets[s], out.wide)
            out.keep(s, block, slice(None))
            out.add_gradient(s, block, slice(None), token_weights[s])
        ctx.save_for_backward(*out.gradients())
        ctx.mark_non_differentiable(out.nll, out.entropy, out.argmax)
        return (out.nll * token_weights).sum(), out.nll, out.entropy, out.argmax

    @staticmethod
    @by_hand
    def backward(ctx: Context, dloss: Tensor, *_: Tensor | None) -> Gradients:
        dhidden, dweight = ctx.saved_tensors
        scaled = [None if g is None else g * dloss.to(g.dtype) for g in (dhidden, dweight)]
        return scaled[0], scaled[1], None, None


@dataclass(frozen=True)
class SequenceTerm:
    """Describes the second term of `linear_next_sequence`."""

    token_weights: Tensor  # [n], w_t; 0 wherever t + K passes the end of t's own sequence
    K: int  # tokens of a continuation
    order: float = 1  # M of f_M, from 1 to `inf`
    local: Tensor | None = None  # [n, D]: w_t is token_weights[t] times the head's divergence on `hidden` from that on `local`
    gain: bool = False  # the divergence is not their KL, but what is gained in log p of the target


@dataclass(frozen=True)
class SequenceLosses:
    """Holds the losses of `linear_next_sequence`, scalars with gradient, and detached figures of each token."""

    loss: Tensor  # ntp_scale * ntp + policy_scale * policy
    ntp: Tensor
    policy: Tensor
    token_weights: Tensor  # [n], the w_t used
    values: Tensor  # [n], J_t
    matches: Tensor  # [n], (1/K) sum_j P_j, the share of K tokens that a rollout is expected to match before its first miss


def log_matches(log_p: Tensor, K: int) -> Tensor:
    """Compute log P_j [n, K], the log-probability that a rollout from each token matches its first j = 1..K tokens, from log_p [n].

    Tokens beyond the last count as certain: windows that reach them have weight 0.
    """
    return F.pad(log_p, (0, K - 1)).unfold(0, K, 1).cumsum(-1)


def naive_truncated_log(log_P: Tensor, order: int) -> Tensor:
    """Compute f_M(P) = -sum_{k=1..M} (1 - P)^k / k by its definition. Differentiable; loses digits where P is near 1."""
    miss = 1 - log_P.exp()
    return -sum((miss**k / k for k in range(1, order + 1)), torch.zeros_like(miss))


def truncated_log(log_P: Tensor, order: float) -> Tensor:
    """Compute f_M(P) of any shape from log P: the logarithm's series around P = 1 cut after M = `order` terms; all of it for `inf`."""
    if order == math.inf:
        return log_P
    miss = -torch.expm1(log_P)  # 1 - P without cancellation near P = 1; all terms of the series have one sign
    total = torch.zeros_like(miss)
    for k in range(int(order), 0, -1):  # Horner's rule
        total = miss * (1 / k + total)
    return -total


def truncated_log_slope(log_P: Tensor, order: float) -> Tensor:
    """Compute d f_M / d log P = 1 - (1 - P)^M of any shape: the chance that at least one of M rollouts matches."""
    if order == math.inf:
        return torch.ones_like(log_P)
    if order == 1:
        return log_P.exp()
    # log(1 - P), by the form that keeps its digits: near P = 1 from 1 - P itself, near P = 0 from P.
    log_miss = torch.where(log_P > -math.log(2), (-torch.expm1(log_P)).log(), torch.log1p(-log_P.exp()))
    return -torch.expm1(order * log_miss)


def match_coefficients(log_p: Tensor, token_weights: Tensor, K: int, order: float = 1) -> Tensor:
    """Compute c_i [n] = d(sum_t token_weights_t J_t) / d log_p_i, which makes the gradient of J that of a cross-entropy."""
    n = len(log_p)
    # A factor l_{t+j} stands in every P of at least j + 1 matches.
    later = truncated_log_slope(log_matches(log_p, K), order).flip(-1).cumsum(-1).flip(-1)
    parts = token_weights[:, None] * later / K  # [n, K]: of window t, for its token t + j
    # Token i is the j-th of window i - j: its parts lie on a diagonal, which K shifted additions sum without a scatter.
    total = parts[:, 0].clone()
    for j in range(1, min(K, n)):
        total[j:] += parts[: n - j, j]
    return total


def naive_linear_next_sequence(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor, term: SequenceTerm,
    ntp_scale: float = 1.0, policy_scale: float = 1.0,
) -> tuple[SequenceLosses, TokenStats]:  # fmt: skip
    """Compute the losses with all logits at once, by autograd; same arguments and results as `linear_next_sequence`."""
    ntp, stats = naive_linear_cross_entropy(hidden, weight, targets, target_weights)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = F.log_softmax((hidden @ weight.T).to(wide), -1)
    at_target = log_p.gather(-1, targets[:, None])[:, 0]
    w = term.token_weights.to(wide)
    if term.local is not None:
        log_q = F.log_softmax((term.local @ weight.T).to(wide), -1)
        gain = (at_target - log_q.gather(-1, targets[:, None])[:, 0]).clamp(min=0.0)
        w = w * (gain if term.gain else (log_p.exp() * (log_p - log_q)).sum(-1)).detach()
    log_P = log_matches(at_target, term.K)
    values = (log_P if term.order == math.inf else naive_truncated_log(log_P, int(term.order))).mean(-1)
    policy, matches = -(w * values).sum(), log_P.exp().mean(-1)
    loss = ntp_scale * ntp + policy_scale * policy
    return SequenceLosses(loss, ntp, policy, w.detach(), values.detach(), matches.detach()), stats


def linear_next_sequence(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor, term: SequenceTerm,
    ntp_scale: float = 1.0, policy_scale: float = 1.0,
) -> tuple[SequenceLosses, TokenStats]:  # fmt: skip
    """Compute ntp_scale * sum_i target_weights_i NLL_i - policy_scale * sum_t w_t J_t of a linear head, by blocks of tokens.

    Args:
        hidden, weight, targets: as for `linear_cross_entropy`; rows of several sequences may follow each other.
        target_weights: [n], what each target counts in the cross-entropy. Not differentiated.
        term: see `SequenceTerm`. Its token weights and `local` are not differentiated.

    Returns:
        The losses, and detached per-token statistics. The gradient of `loss` is formed with the blocks; that of `ntp` or `policy`
        alone, when asked for, by running the blocks again.
    """
    hidden, weight = cast_inputs(hidden, weight)
    local = None if term.local is None else term.local.detach().to(hidden.dtype)
    settings = (term.K, term.order, term.gain, ntp_scale, policy_scale)
    run = without_autocast(_LinearNextSequence.apply)
    results = run(hidden, weight, targets, target_weights, term.token_weights, local, settings)
    return SequenceLosses(*results[:6]), TokenStats(*results[6:])


class _LinearNextSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor, token_weights: Tensor, local: Tensor | None,
        settings: tuple[int, float, bool, float, float],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        K, order, gain, ntp_scale, policy_scale = settings
        n, out = hidden.shape[0], _Outputs(hidden, weight, *ctx.needs_input_grad[:2])
        target_weights, token_weights = target_weights.to(out.wide), token_weights.to(out.wide)
        used, values, matches, coefficients = (torch.empty_like(out.nll) for _ in range(4))
        for s in _blocks(n, weight):
            # Windows that begin up to K - 1 tokens before the block reach into it; windows that begin in it reach as far behind it.
            around = slice(max(0, s.start - K + 1), min(n, s.stop + K - 1))
            inside = slice(s.start - around.start, s.stop - around.start)
            block = _Block(hidden[around], weight, targets[around], out.wide)
            w = token_weights[around]
            if local is not None:
                w = w * block.divergence(local[around], gain)
            log_P = log_matches(-block.nll, K)[inside]
            used[s], values[s], matches[s] = w[inside], truncated_log(log_P, order).mean(-1), log_P.exp().mean(-1)
            coefficients[s] = match_coefficients(-block.nll, w, K, order)[inside]
            out.keep(s, block, inside)
            # The policy loss is -sum w J, so in the NLLs -l it grows with c: one sign for both.
            out.add_gradient(s, block, inside, ntp_scale * target_weights[s] + policy_scale * coefficients[s])
        ctx.save_for_backward(hidden, weight, targets, target_weights, coefficients, *out.gradients())
        ctx.set_materialize_grads(False)  # None says which of the three losses is not asked for
        ntp, policy = (out.nll * target_weights).sum(), -(used * values).sum()
        statistics = (used, values, matches, out.nll, out.entropy, out.argmax)
        ctx.mark_non_differentiable(*statistics)
        return (ntp_scale * ntp + policy_scale * policy, ntp, policy, *statistics)

    @staticmethod
    @by_hand
    def backward(ctx: Context, dloss: Tensor | None, dntp: Tensor | None, dpolicy: Tensor | None, *_: Tensor | None) -> Gradients:
        hidden, weight, targets, target_weights, coefficients, *gradients = ctx.saved_tensors
        scaled: list[Tensor | None] = [None if g is None or dloss is None else g * dloss.to(g.dtype) for g in gradients]
        if dntp is not None or dpolicy is not None:
            again = _Outputs(hidden, weight, *ctx.needs_input_grad[:2])
            parts = [x * d for x, d in ((target_weights, dntp), (coefficients, dpolicy)) if d is not None]
            for s in _blocks(len(hidden), weight):
                again.add_gradient(s, _Block(hidden[s], weight, targets[s], again.wide), slice(None), sum(parts[1:], parts[0])[s])
            scaled = [b if a is None else a if b is None else a + b for a, b in zip(scaled, again.gradients(), strict=True)]
        return (*scaled, None, None, None, None, None)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the logarithm of softmax(logits [..., V] / temperature), in float32 or better; differentiable."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)


def entropy_of(log_p: Tensor) -> Tensor:
    """Compute the entropy [...] of distributions whose log-probabilities are given [..., V], nats; differentiable."""
    return -(log_p.exp() * log_p).sum(-1)
