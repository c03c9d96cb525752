"""Compare each rollout's reward with the others of its group (GRPO; paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.records import Judged, Metrics, Rollouts, Work

EPSILON = 1e-6


@torch.no_grad()
def compare(parts: Sequence[Judged], work: Work) -> list[Rollouts]:
    """Give judged rollouts their advantages, formed over all parts together: a global scale is one for all that are learned from."""
    rewards, valid = torch.cat([r.rewards for r in parts]), torch.cat([r.positions >= 0 for r in parts])
    advantages, metrics = compute_advantages(rewards, valid, work.config, work.learning.sum_over)
    metrics |= {"advantage_min": advantages.min(), "advantage_max": advantages.max()}
    own = advantages.split([len(r.rewards) for r in parts])
    known = [{**vars(r), "metrics": {**r.metrics, **metrics}} for r in parts]
    return [Rollouts(**k, advantages=a) for k, a in zip(known, own, strict=True)]


def compute_advantages(
    rewards: Tensor, valid: Tensor, config: NSPConfig, sum_over: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Metrics]:
    """Compute (reward - baseline) / scale within groups of rewards [B, P, N]; 0 where valid [B, P] bool is not set.

    A group is the P*N rollouts of a sequence (the paper, at N = 1) or the N of a position. The baseline is the group's mean, or the mean
    of the others. The scale is the group's unbiased std + 1e-6, one std of all baselined rewards + 1e-6, or 1. A group of one has
    advantage 0; as published it has baseline 0 and std 1, so that its advantage is its reward.

    Args:
        sum_over: adds [sum of squares, count] up over all processes that learn from one step, for `advantage_scale="global"`; they must
            all come here equally often.

    Returns:
        advantages [B, P, N], and as metrics the groups' mean standard deviation, and the share of them whose advantages are all 0.
    """
    B, P, N = rewards.shape
    shape = (B, P * N) if config.group == "sequence" else (B * P, N)
    r = rewards.reshape(shape)
    mask = valid[..., None].expand(B, P, N).reshape(shape)
    count = mask.sum(-1, keepdim=True).to(r.dtype)  # as whole numbers, their quotients would be float32
    mean = (r * mask).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (r - mean) * mask
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    lowest, highest = r.masked_fill(~mask, torch.inf).amin(-1), r.masked_fill(~mask, -torch.inf).amax(-1)
    compared = ((count[:, 0] > 1) & (highest > lowest))[:, None]
    exists, scale = count[:, 0] > 0, std
    if config.published:
        alone = count == 1
        centred, scale, compared = torch.where(alone, r * mask, centred), std.masked_fill(alone, 1.0), compared | alone

    advantage = centred * (count / (count - 1).clamp(min=1)) if config.baseline == "leave_one_out" else centred
    advantage = advantage * compared
    if config.advantage_scale == "std":
        advantage = advantage / (scale + EPSILON)
    elif config.advantage_scale == "global":
        sums = torch.stack([advantage.square().sum(), mask.sum().to(advantage.dtype)])
        squares, rollouts = sum_over(sums) if sum_over is not None else sums
        advantage = advantage / ((squares / rollouts.clamp(min=1)).sqrt() + EPSILON)
    groups = exists.sum().clamp(min=1)
    return advantage.reshape(B, P, N), {
        "reward_group_std": (std[:, 0] * exists).sum() / groups,
        "groups_without_spread": (exists & ~compared[:, 0]).sum().to(r.dtype) / groups,
    }
