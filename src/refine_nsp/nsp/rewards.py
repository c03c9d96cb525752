"""Rewards of a rollout against the true continuation (paper, section 3.3), and how to add your own.

A reward is `f(*, completion_ids, truth_ids, hidden, truth_hidden, prompts_ids, **columns) -> [R] or [R, K]`: token ids [R, K] of
rollout and truth, final-norm hidden states [R, K, D] after consuming each, and the R prefixes. A value per token is averaged over
the K tokens. Name one by dotted path, `package.module.function` or `package.module:function`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from refine_nsp.config import REWARDS, RewardSpec
from refine_nsp.errors import RefineError, closest

Reward = Callable[..., Tensor]


def cosine(*, hidden: Tensor, truth_hidden: Tensor, **_: Any) -> Tensor:
    """Cosine of the final-norm hidden states of rollout and truth, [R, K] in [-1, 1], float32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    a, b = hidden.double(), truth_hidden.double()
    # sqrt(|a|^2 |b|^2), not |a| |b|: for a = b it is the dot product itself, so equal states score exactly 1.
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return ((a * b).sum(-1) / norms.clamp(min=1e-12)).to(wide)


def exact_match(*, completion_ids: Tensor, truth_ids: Tensor, **_: Any) -> Tensor:
    """1 where the token equals the true one, [R, K]."""
    return (completion_ids == truth_ids).float()


def hybrid(**inputs: Any) -> Tensor:
    """Cosine plus exact match, [R, K]."""
    return cosine(**inputs) + exact_match(**inputs)


def edit_similarity(*, completion_ids: Tensor, truth_ids: Tensor, **_: Any) -> Tensor:
    """1 - Levenshtein distance / K between rollout and truth, [R] in [0, 1]: forgives an insertion that shifts the rest.

    The worked example of a user's reward: `reward="refine_nsp.nsp.rewards.edit_similarity"`.
    """
    R, K = completion_ids.shape
    steps = torch.arange(K + 1, device=completion_ids.device, dtype=torch.float32)
    previous = steps.expand(R, -1)
    for i in range(1, K + 1):
        row = [steps[i].expand(R)]
        differ = (completion_ids[:, i - 1, None] != truth_ids).float()  # [R, K]
        for j in range(1, K + 1):
            edits = torch.stack([previous[:, j] + 1, row[-1] + 1, previous[:, j - 1] + differ[:, j - 1]])
            row.append(edits.amin(0))
        previous = torch.stack(row, 1)
    return 1.0 - previous[:, K] / K


BUILT_IN: dict[str, Reward] = {"cosine": cosine, "exact_match": exact_match, "hybrid": hybrid}


def resolve_reward(spec: RewardSpec) -> tuple[str, Reward]:
    """Name and function of a built-in name, a dotted path or a callable. Raises RefineError when there is no such thing."""
    if callable(spec):
        return str(getattr(spec, "__name__", type(spec).__name__)), spec
    if spec in BUILT_IN:
        return spec, BUILT_IN[spec]
    module_name, _, attribute = spec.replace(":", ".").rpartition(".")
    if not module_name:
        raise RefineError(
            f"no reward {spec!r}{closest(spec, REWARDS)}; there are {', '.join(REWARDS)}, or name your own as "
            "'package.module.function'"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RefineError(f"cannot import the reward {spec!r}: {error}") from error
    if not callable(function):
        raise RefineError(f"the reward {spec!r} is a {type(function).__name__}, expected a function")
    return attribute, function


def compute_rewards(
    specs: Sequence[RewardSpec], weights: Sequence[float] | None, inputs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the rewards [R], and each by name [R] (averaged over tokens, before its weight)."""
    R, K = inputs["completion_ids"].shape
    by_name: dict[str, Tensor] = {}
    total = torch.zeros(R, device=inputs["hidden"].device)
    for spec, weight in zip(specs, weights if weights is not None else [1.0] * len(specs), strict=True):
        name, function = resolve_reward(spec)
        value = torch.as_tensor(function(**inputs), device=total.device)
        if value.shape not in ((R,), (R, K)):
            raise RefineError(f"the reward {name} returned shape {tuple(value.shape)}; expected [R]=[{R}] or [R, K]=[{R}, {K}]")
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        by_name[name] = value.mean(-1) if value.ndim == 2 else value
        total = total + weight * by_name[name]
    return total, by_name
