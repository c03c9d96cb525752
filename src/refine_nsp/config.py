"""Settings of the method (paper, sections 3-4 and Table 2), as one frozen dataclass, and the published presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from refine_nsp.errors import RefineError, closest

SELECTIONS = ("entropy", "uniform", "argmax", "argmin", "context_kl", "context_gain")
SCHEDULES = ("reprefill", "snapshot", "fused")
REWARDS = ("cosine", "exact_match", "hybrid")
RewardSpec = str | Callable[..., Any]

_CHOICES = {
    "schedule": SCHEDULES,
    "selection": SELECTIONS,
    "smoothing": ("centred", "published", "none"),
    "advantage_group": ("auto", "sequence", "position"),
    "advantage_scale": ("std", "none", "global"),
    "baseline": ("mean", "leave_one_out"),
}
_AT_LEAST_ONE = ("positions_per_sequence", "rollout_length", "num_generations", "min_prefix", "local_window")
_POSITIVE = ("tau", "temperature", "dual_clip")
_NOT_NEGATIVE = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "lambda_rl", "lambda_ntp")


@dataclass(frozen=True)
class NSPConfig:
    """Next-sequence prediction: where to roll out, how, what is rewarded, and how that becomes a loss.

    Attributes:
        positions_per_sequence: P, chunks of a sequence and positions chosen, one a chunk (the paper's c).
        rollout_length: K tokens per rollout (the paper's k).
        num_generations: N rollouts per position (the paper's n).
        schedule: where prefix states come from; all give the same loss and gradients. `reprefill` recomputes each prefix (as
            published), `snapshot` takes states from one more no-grad pass, `fused` from the gradient pass itself.
        reward: `cosine`, `exact_match`, `hybrid`, a dotted path or a callable (see `refine_nsp.nsp.rewards`), or several.
        reward_weights: one weight per reward; None: all 1.
        selection: `entropy`, `uniform`, `argmax`, `argmin` (of the smoothed entropy), `context_kl`, `context_gain`.
        tau: softmax temperature over the scores of a chunk.
        smoothing: of the entropy: `centred` over real tokens, `published` (zeros beyond the edges), or `none`.
        smoothing_window: odd width of the pooling; None: K, or K + 1 when K is even.
        min_prefix: tokens that must stand before a position.
        local_window: W of the context scores.
        temperature: of the rollouts; log-probabilities are those of the tempered distribution.
        advantage_group: rollouts compared with each other: all of a `sequence`, or of a `position`; `auto`: sequence if N = 1.
        advantage_scale: divide by the group's `std`, by one `global` standard deviation, or by nothing.
        baseline: the group's `mean`, or the mean of the others (`leave_one_out`).
        clip_low, clip_high: the ratio to the old policy is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound on the loss where the advantage is negative, in units of |advantage|.
        kl_coef: weight of KL to a frozen reference model; entropy_coef: weight of an entropy bonus.
        lambda_rl, lambda_ntp: weights of the policy loss and of the cross-entropy.

    Raises:
        RefineError: a value out of range, naming it.
    """

    positions_per_sequence: int = 8
    rollout_length: int = 5
    num_generations: int = 1
    schedule: str = "snapshot"
    reward: RewardSpec | list[RewardSpec] = "cosine"
    reward_weights: list[float] | None = None
    selection: str = "entropy"
    tau: float = 1.0
    smoothing: str = "centred"
    smoothing_window: int | None = None
    min_prefix: int = 20
    local_window: int = 64
    temperature: float = 1.0
    advantage_group: str = "auto"
    advantage_scale: str = "std"
    baseline: str = "mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    lambda_rl: float = 0.2
    lambda_ntp: float = 1.0

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            if (value := getattr(self, name)) not in options:
                raise RefineError(f"{name}={value!r} is not one of {', '.join(options)}{closest(str(value), options)}")
        for name in _AT_LEAST_ONE:
            if (value := getattr(self, name)) < 1:
                raise RefineError(f"{name} must be at least 1, got {value}")
        for name in _POSITIVE:
            if not (value := getattr(self, name)) > 0:
                raise RefineError(f"{name} must be positive, got {value}")
        for name in _NOT_NEGATIVE:
            if not (value := getattr(self, name)) >= 0:
                raise RefineError(f"{name} must not be negative, got {value}")
        if self.smoothing_window is not None and (self.smoothing_window < 1 or self.smoothing_window % 2 == 0):
            raise RefineError(f"smoothing_window must be odd and positive, got {self.smoothing_window}")
        if self.clip_low > 1:
            raise RefineError(f"clip_low must be at most 1, got {self.clip_low}")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise RefineError(f"{len(self.rewards)} rewards but {len(self.reward_weights)} reward_weights")
        if not self.rewards:
            raise RefineError("reward is empty: name at least one")

    @property
    def rewards(self) -> list[RewardSpec]:
        """The rewards as a list."""
        return list(self.reward) if isinstance(self.reward, list | tuple) else [self.reward]

    @property
    def window(self) -> int:
        """Odd width of the entropy pooling."""
        K = self.rollout_length
        return self.smoothing_window if self.smoothing_window is not None else K + 1 - K % 2

    @property
    def group(self) -> str:
        """`sequence` or `position`, with `auto` resolved."""
        if self.advantage_group != "auto":
            return self.advantage_group
        return "sequence" if self.num_generations == 1 else "position"

    @property
    def shortest(self) -> int:
        """Tokens a sequence needs for one position: a prefix, the position itself, and its continuation."""
        return self.min_prefix + 1 + self.rollout_length

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NSPConfig:
        """A published preset (`mid_training`, `post_training`, `test_time`; paper, Table 2) or ours (`context`)."""
        if name not in PRESETS:
            raise RefineError(f"no preset {name!r}{closest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        for key in overrides:
            if key not in known:
                raise RefineError(f"no setting {key!r}{closest(key, known)}")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: dict[str, dict[str, Any]] = {
    "mid_training": {"reward": "cosine", "lambda_rl": 0.2},
    "post_training": {"reward": "hybrid", "lambda_rl": 0.2},
    "test_time": {"reward": "exact_match", "lambda_rl": 0.4},
    # Positions whose continuation depends on far context, several rollouts each compared with one another.
    "context": {
        "reward": "hybrid",
        "lambda_rl": 1.0,
        "selection": "context_kl",
        "num_generations": 8,
        "advantage_group": "position",
        "advantage_scale": "global",
        "baseline": "leave_one_out",
    },
}
