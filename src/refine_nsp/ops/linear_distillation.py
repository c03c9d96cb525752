"""Compute the divergence of a student's predictions from a teacher's without ever holding [T, V] logits of either.

Both heads are applied to one block of tokens at a time. With p the teacher's distribution and q the student's, the gradient of
KL(p || q) by the student's logits is q - p, and that of the cross-entropy of the true token is q less 1 at that token; so one block gives
both losses and, since the weight of every token is known beforehand, both gradients (see `linear_cross_entropy`). n counts tokens.

The teacher may have a few rows more or fewer in its head than the student, as padded vocabularies do: ids beyond the student's are left
out of the teacher's distribution, and ids beyond the teacher's have no probability in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.ops.autograd import Context, Gradients, by_hand
from refine_nsp.ops.linear_cross_entropy import block_tokens, cast_inputs, naive_linear_cross_entropy
from refine_nsp.ops.precision import autocast_dtype, without_autocast


@dataclass(frozen=True)
class Lesson:
    """Holds what a student is to learn about n tokens; nothing of it is differentiated."""

    hidden: Tensor  # [n, Dt], the teacher's, after its final norm
    weight: Tensor  # [Vt, Dt], its head's
    targets: Tensor  # [n] long, the true next tokens
    kl_weights: Tensor  # [n], what each token counts in the divergence
    target_weights: Tensor | None = None  # [n], and in the cross-entropy; None leaves that out


@dataclass(frozen=True)
class Divergence:
    """Holds the loss, a scalar with gradient, and what it is the sum of, detached."""

    loss: Tensor
    kl: Tensor  # [n], nats
    nll: Tensor | None  # [n], nats; None where it was left out


def naive_linear_distillation(hidden: Tensor, weight: Tensor, lesson: Lesson) -> Divergence:
    """Compute the loss with all logits at once, by autograd; same arguments and results as `linear_distillation`."""
    V = min(len(weight), len(lesson.weight))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = F.log_softmax((lesson.hidden @ lesson.weight[:V].T).detach().to(wide), -1)
    log_q = F.log_softmax((hidden @ weight.T).to(wide), -1)[:, :V]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = (kl * lesson.kl_weights).sum()
    if lesson.target_weights is None:
        return Divergence(loss, kl.detach(), None)
    ntp, stats = naive_linear_cross_entropy(hidden, weight, lesson.targets, lesson.target_weights)
    return Divergence(loss + ntp, kl.detach(), stats.nll)


def linear_distillation(hidden: Tensor, weight: Tensor, lesson: Lesson) -> Divergence:
    """Compute sum_i kl_weights[i] * KL(teacher || student)_i + target_weights[i] * NLL_i of linear heads, by blocks of tokens.

    Args:
        hidden: [n, D], the student's, after its final norm. weight: [V, D], its head's.
        lesson: what is to be learned; see `Lesson`.

    Returns:
        The scalar loss (float32 or better), and the detached divergence and NLL of every token.
    """
    # As in `linear_cross_entropy`: casts are outside the function, so that autograd casts gradients back.
    student = cast_inputs(hidden, weight)
    teacher = [x.detach().to(autocast_dtype(lesson.weight)) for x in (lesson.hidden, lesson.weight)]
    run = without_autocast(_LinearDistillation.apply)
    loss, kl, nll = run(*student, *teacher, lesson.targets, lesson.kl_weights, lesson.target_weights)
    return Divergence(loss, kl, nll if lesson.target_weights is not None else None)


class _Block:
    """Holds one block's log-probabilities of the student, `log_q` [m, V], and probabilities of the teacher, `p` [m, min(V, Vt)]; and their
    divergence `kl` [m]."""

    def __init__(self, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, wide: torch.dtype) -> None:
        self.log_q = torch.log_softmax(hidden @ weight.T, -1, dtype=wide)
        log_p = torch.log_softmax(teacher @ teacher_weight[: len(weight)].T, -1, dtype=wide)
        self.p = log_p.exp()
        log_p -= self.log_q[:, : log_p.shape[1]]  # term by term, since the difference of two sums would lose its digits near 0
        self.kl = torch.linalg.vecdot(self.p, log_p)

    def logit_gradient(self, targets: Tensor, kl_weights: Tensor, target_weights: Tensor | None) -> Tensor:
        """Give the gradient [m, V] of the block's loss by the student's logits; the block is overwritten."""
        both = kl_weights if target_weights is None else kl_weights + target_weights
        gradient = self.log_q.exp_()
        gradient *= both[:, None]
        self.p *= kl_weights[:, None]
        gradient[:, : self.p.shape[1]] -= self.p
        if target_weights is not None:
            gradient.scatter_add_(-1, targets[:, None], -target_weights[:, None])
        return gradient


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, targets: Tensor, kl_weights: Tensor,
        target_weights: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        kl_weights = kl_weights.to(wide)
        target_weights = None if target_weights is None else target_weights.to(wide)
        kl, nll = torch.empty_like(kl_weights), torch.zeros_like(kl_weights)
        # The teacher's logits lie beside the student's.
        size = block_tokens(len(weight) + len(teacher_weight), weight.device)
        for s in (slice(start, min(start + size, n)) for start in range(0, n, size)):
            block = _Block(hidden[s], weight, teacher[s], teacher_weight, wide)
            kl[s] = block.kl
            if target_weights is not None:
                nll[s] = -block.log_q.gather(-1, targets[s, None])[:, 0]
            if dhidden is None and dweight is None:
                continue
            counts = None if target_weights is None else target_weights[s]
            gradient = block.logit_gradient(targets[s], kl_weights[s], counts).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(gradient, weight, out=dhidden[s])
            if dweight is not None:
                dweight += gradient.T @ hidden[s]
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        ctx.mark_non_differentiable(kl, nll)
        loss = (kl * kl_weights).sum()
        return loss if target_weights is None else loss + (nll * target_weights).sum(), kl, nll

    @staticmethod
    @by_hand
    def backward(ctx: Context, dloss: Tensor, *_: Tensor | None) -> Gradients:
        scaled = [None if g is None else g * dloss.to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)
