"""Reward rollouts against the true continuation (paper, section 3.3), by built-in rewards or your own.

A reward is `f(*, completion_ids, truth_ids, hidden, truth_hidden, prompts_ids, **columns) -> [R] or [R, K]`: token ids [R, K] of
rollout and truth, final-norm hidden states [R, K, D] after consuming each, the R prefixes (for a reward that names them), and the
dataset's other columns, R values each (those it names, or all with `**columns`). A value per token is averaged over the K tokens.
Name one by dotted path, `package.module.function` or `package.module:function`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig, RewardSpec
from refine_nsp.errors import RefineError, closest
from refine_nsp.nsp.forward import Predictions
from refine_nsp.nsp.records import Columns, Judged, Sampled, gather_positions, masked_mean
from refine_nsp.ops.memory import part

Reward = Callable[..., Tensor]


class RewardInputs(TypedDict, total=False):
    """Hold all that a reward can ask for besides columns; the R prefixes are gathered for a reward that names them."""

    completion_ids: Tensor
    truth_ids: Tensor
    hidden: Tensor
    truth_hidden: Tensor
    prompts_ids: list[Tensor]


def cosine(*, hidden: Tensor, truth_hidden: Tensor, **_: object) -> Tensor:
    """Compute the cosine of the final-norm hidden states of rollout and truth, [R, K] in [-1, 1], float32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    a, b = hidden.double(), truth_hidden.double()
    # sqrt(|a|^2 |b|^2), not |a| |b|: for a = b it is the dot product itself, so equal states score exactly 1.
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return ((a * b).sum(-1) / norms.clamp(min=1e-12)).to(wide)


def exact_match(*, completion_ids: Tensor, truth_ids: Tensor, hidden: Tensor | None = None, **_: object) -> Tensor:
    """Give 1 where the token equals the true one, [R, K], float32 or the hidden states' better."""
    return (completion_ids == truth_ids).to(_wide(hidden))


def prefix_match(*, completion_ids: Tensor, truth_ids: Tensor, hidden: Tensor | None = None, **_: object) -> Tensor:
    """Give 1 as long as every token so far equals the true one, [R, K]; the mean's expectation has a closed form (`closed_form.py`)."""
    return (completion_ids == truth_ids).to(_wide(hidden)).cumprod(-1)


def _wide(hidden: Tensor | None) -> torch.dtype:
    """Choose the precision of rewards: float32 would leave 1e-7 in the otherwise exact gradients of a float64 run."""
    return torch.float32 if hidden is None else torch.promote_types(hidden.dtype, torch.float32)


def hybrid(*, completion_ids: Tensor, truth_ids: Tensor, hidden: Tensor, truth_hidden: Tensor, **_: object) -> Tensor:
    """Add cosine and exact match, [R, K]."""
    matches = exact_match(completion_ids=completion_ids, truth_ids=truth_ids, hidden=hidden)
    return cosine(hidden=hidden, truth_hidden=truth_hidden) + matches


def edit_similarity(*, completion_ids: Tensor, truth_ids: Tensor, hidden: Tensor | None = None, **_: object) -> Tensor:
    """Compute 1 - Levenshtein distance / K of rollout and truth, [R] in [0, 1], which forgives an insertion that shifts the rest.

    It is the worked example of a user's reward: `reward_funcs="refine_nsp.nsp.rewards.edit_similarity"`.
    """
    R, K = completion_ids.shape
    steps = torch.arange(K + 1, device=completion_ids.device, dtype=_wide(hidden))
    previous = steps.expand(R, -1)
    for i in range(1, K + 1):
        row = [steps[i].expand(R)]
        differ = (completion_ids[:, i - 1, None] != truth_ids).to(steps.dtype)  # [R, K]
        for j in range(1, K + 1):
            edits = torch.stack([previous[:, j] + 1, row[-1] + 1, previous[:, j - 1] + differ[:, j - 1]])
            row.append(edits.amin(0))
        previous = torch.stack(row, 1)
    return 1.0 - previous[:, K] / K


BUILT_IN: dict[str, Reward] = {"cosine": cosine, "exact_match": exact_match, "hybrid": hybrid, "prefix_match": prefix_match}


def resolve_reward(spec: RewardSpec) -> tuple[str, Reward]:
    """Find the name and the function of a reward. Raises RefineError for what is no built-in name, dotted path or callable."""
    if callable(spec):
        return str(getattr(spec, "__name__", type(spec).__name__)), spec
    if spec in BUILT_IN:
        return spec, BUILT_IN[spec]
    module_name, _, attribute = spec.replace(":", ".").rpartition(".")
    if not module_name:
        raise RefineError(
            f"no reward {spec!r}{closest(spec, BUILT_IN)}; there are {', '.join(BUILT_IN)}, or name your own as "
            "'package.module.function'"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RefineError(f"cannot import the reward {spec!r}: {error}") from error
    if not callable(function):
        raise RefineError(f"the reward {spec!r} is a {type(function).__name__}, expected a function")
    return attribute, function


@part("rollouts")
@torch.no_grad()
def judge(predictions: Predictions, sampled: Sampled) -> Judged:
    """Reward rollouts: each token and hidden state against the true continuation's."""
    B, P, N, K = sampled.tokens.shape
    batch, config, positions = predictions.work.batch, predictions.work.config, sampled.positions
    assert sampled.hidden is not None
    ahead = (positions.clamp(min=0)[..., None] + torch.arange(1, K + 1, device=positions.device)).flatten(1)  # [B, P*K]
    ahead = ahead.clamp(max=batch.input_ids.shape[1] - 1)
    truth = batch.input_ids.gather(1, ahead).view(B, P, 1, K).expand(B, P, N, K).reshape(-1, K)
    true_hidden = gather_positions(predictions.hidden, ahead).view(B, P, 1, K, -1).expand(B, P, N, K, -1).flatten(0, 2)
    rows = sampled.tokens.reshape(-1, K)
    # While a rollout equals the truth, its hidden states are the truth's: the same function of the same tokens. Taking them from
    # there keeps rounding (large in bfloat16) from costing a perfect rollout its perfect score.
    same = (rows == truth).long().cumprod(-1).bool()
    inputs: RewardInputs = {
        "completion_ids": rows,
        "truth_ids": truth,
        "hidden": torch.where(same[..., None], true_hidden, sampled.hidden.flatten(0, 2)),
        "truth_hidden": true_hidden,
    }
    if any("prompts_ids" in asked(resolve_reward(r)[1])[0] for r in config.rewards):
        ends = positions.tolist()
        inputs["prompts_ids"] = [batch.input_ids[b, : t + 1] for b, row in enumerate(ends) for t in row for _ in range(N)]
    columns = {name: [v for v in values for _ in range(P * N)] for name, values in batch.columns.items()}
    total, by_name = compute_rewards(config.rewards, config.reward_weights, inputs, columns)
    valid = positions >= 0
    metrics = {**sampled.metrics}
    for name, value in by_name.items():
        own = value.view(B, P, N), valid[..., None].expand(B, P, N)
        metrics[f"reward_{name}"] = mean = masked_mean(*own)
        metrics[f"reward_{name}_std"] = masked_mean((own[0] - mean).square(), own[1]).sqrt()
    metrics["entropy"] = masked_mean(predictions.entropy, batch.target_mask)
    metrics["entropy_at_positions"] = masked_mean(gather_positions(predictions.entropy, positions), valid)
    known = {**vars(sampled), "metrics": metrics}
    return Judged(**known, rewards=total.view(B, P, N), entropy=predictions.entropy)


def asked(function: Reward) -> tuple[set[str], bool]:
    """Tell which arguments a reward names, and whether it takes any others too."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def wants_columns(config: NSPConfig) -> bool:
    """Tell whether a reward may ask for columns of the dataset, which built-in ones do not."""
    return any(resolve_reward(r)[1] not in BUILT_IN.values() for r in config.rewards)


def compute_rewards(
    specs: Sequence[RewardSpec],
    weights: Sequence[float] | None,
    inputs: RewardInputs,
    columns: Columns | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of rewards [R], and each by name [R] (averaged over tokens, before its weight).

    Raises RefineError where a reward asks for a column that is not there, or returns another shape.
    """
    R, K = inputs["completion_ids"].shape
    by_name: dict[str, Tensor] = {}
    total = inputs["hidden"].new_zeros(R, dtype=_wide(inputs["hidden"]))
    for spec, weight in zip(specs, weights if weights is not None else [1.0] * len(specs), strict=True):
        name, function = resolve_reward(spec)
        returned = function(**_arguments(name, function, inputs, columns or {}))
        try:
            value = torch.as_tensor(returned, device=total.device)
        except (TypeError, ValueError, RuntimeError) as error:
            shown = f"{str(returned)[:60]!r}, a {type(returned).__name__}"
            raise RefineError(f"the reward {name} returned {shown}; expected numbers, [R]=[{R}] or [R, K]=[{R}, {K}]") from error
        if value.shape not in ((R,), (R, K)):
            raise RefineError(f"the reward {name} returned shape {tuple(value.shape)}; expected [R]=[{R}] or [R, K]=[{R}, {K}]")
        if function not in BUILT_IN.values() and not bool(value.isfinite().all()):
            raise RefineError(
                f"the reward {name} returned {float(value[~value.isfinite()][0])} for a rollout; expected finite numbers"
            )
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        by_name[name] = value.mean(-1) if value.ndim == 2 else value
        total = total + weight * by_name[name]
    return total, by_name


def _arguments(name: str, function: Reward, inputs: RewardInputs, columns: Columns) -> dict[str, object]:
    """Gather the arguments that a reward names, or everything where it takes anything."""
    named, anything = asked(function)
    there: dict[str, object] = {**columns, **inputs}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in named and parameter.default is parameter.empty and parameter.name not in there:
            raise RefineError(
                f"the reward {name} asks for {parameter.name!r}, which is neither given to rewards "
                f"({', '.join(RewardInputs.__annotations__)}) nor a column of the dataset "
                f"({', '.join(columns) or 'it has no other columns'})"
            )
    return there if anything else {k: v for k, v in there.items() if k in named}
