"""Settings of the method (paper, sections 3-4 and Table 2), as one frozen dataclass, and the presets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from refine_nsp.errors import RefineError, closest

RewardSpec = str | Callable[..., Any]
Objective = Literal["refine", "ntp"]  # what long text, or a prompt, is trained on: ReFINE, or the cross-entropy alone

# Spellings of the paper, and of its code, for a pair of score and draw.
PUBLISHED_SELECTIONS = {"uniform": ("none", "sample"), "argmax": ("entropy", "greatest"), "argmin": ("entropy", "least")}

MAX_ORDER = (
    1000  # every order is a term to add up; beyond a few dozen the objective is the log-probability in all but the rarest tokens
)

_AT_LEAST_ONE = ("positions_per_sequence", "rollout_length", "num_generations", "min_prefix", "local_window")
_POSITIVE = ("tau", "temperature", "dual_clip")
_NOT_NEGATIVE = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "lambda_rl", "lambda_ntp")


@lru_cache
def choices_of(cls: Any) -> dict[str, tuple[Any, ...]]:
    """The values a dataclass' `Literal` fields may take, by field; None is among them where it is."""
    choices = {}
    for name, hint in get_type_hints(cls).items():
        options: list[Any] = []
        for part in (hint, *get_args(hint)):
            options += get_args(part) if get_origin(part) is Literal else [None] if part is NoneType else []
        if any(o is not None for o in options):
            choices[name] = tuple(options)
    return choices


def check_choices(settings: Any) -> None:
    """RefineError for the first field of a dataclass whose value its `Literal` does not hold, naming the nearest."""
    kind: Any = type(settings)
    for name, options in choices_of(kind).items():
        check_choice(name, getattr(settings, name), options)


def check_choice(name: str, value: Any, options: Iterable[Any]) -> None:
    """RefineError unless `value` is one of the options."""
    if value not in options:
        names = [str(o) for o in options if o is not None]
        raise RefineError(f"{name}={value!r} is not one of {', '.join(names)}{closest(value, names)}")


@dataclass(frozen=True)
class NSPConfig:
    """Next-sequence prediction: where rollouts are sampled, how, what is rewarded, and how that becomes a loss.

    Attributes:
        positions_per_sequence: P, chunks of a sequence and positions chosen, one a chunk (the paper's c).
        rollout_length: K tokens per rollout (the paper's k).
        num_generations: N rollouts per position (the paper's n).
        estimator: `sampled`: rollouts, rewarded (the paper). `closed_form`: no rollouts; what infinitely many of them would teach, for
            every token, as one function of the true tokens' probabilities (docs/method.md).
        order: M of the closed form, a whole number or `inf`. 1 is the expected reward, `inf` the log-probability, and between them the
            logarithm's series is cut after M terms: a token weighs by the chance that at least one of M rollouts matches.
        token_weights: of the closed form: every token by its context score (`context`: by KL, `context_gain`), or the positions chosen by
            `selection` alike (`selected`).
        schedule: where the states of prefixes come from; all give the same loss and gradients. `fused`: from the gradient pass
            itself; `snapshot`: from one more pass without gradients; `reprefill`: every prefix is run again, as published; `auto`:
            `fused`, but `snapshot` by segments, and in training where rollouts serve several steps or are compared across micro-batches.
            With weights in shards, hybrids, and models by segments, always take `snapshot` (docs/scaling.md).
        segment_tokens: longer sequences are run in segments of so many tokens, through their states: activations of one segment at a
            time, the same loss and gradients, one more forward pass (docs/scaling.md). Default: in one piece.
        reward_funcs: `cosine`, `exact_match`, `hybrid`, `prefix_match`, a dotted path or a callable (see `refine_nsp.nsp.rewards`), or
            several. Default: `cosine`, and for the closed form `prefix_match`, which has one.
        reward_weights: one weight per reward; None: all 1.
        selection: the score positions are drawn by: `entropy`, `context_kl`, `context_gain` or `none`; and the paper's spellings of a
            score with its draw: `uniform` (none, sample), `argmax` (entropy, greatest), `argmin` (entropy, least).
        draw: from the scores of a chunk: `sample`, the `greatest` or the `least`. Default: `sample`.
        tau: softmax temperature over the scores of a chunk.
        smoothing: of the entropy: `centred` over real tokens, `published` (zeros beyond the edges), or `none`.
        smoothing_window: odd width of the pooling; None: K, or K + 1 when K is even.
        published: follow the rules of the paper's code instead of ours: which positions there are, short texts, the remainder of the
            chunks, smoothing, EOS in rollouts and behind answers, groups of one, test time (the table in docs/method.md).
        min_prefix: tokens that must stand before a position; with `published`, tokens of the shortest prefix, and as many at the end.
        local_window: W of the context scores: they compare the whole prefix with its last W tokens.
        local_span: those are read in windows of local_span * W tokens, so with at least W and less than local_span * W of context: more
            costs less, local_span / (local_span - 1) tokens run a token.
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
    estimator: Literal["sampled", "closed_form"] = "sampled"
    order: float = 1
    token_weights: Literal["context", "context_gain", "selected"] = "context"
    schedule: Literal["auto", "fused", "snapshot", "reprefill"] = "auto"
    segment_tokens: int | None = None
    reward_funcs: RewardSpec | list[RewardSpec] | None = None
    reward_weights: list[float] | None = None
    selection: Literal["entropy", "context_kl", "context_gain", "none", "uniform", "argmax", "argmin"] = "entropy"
    draw: Literal["sample", "greatest", "least"] | None = None
    tau: float = 1.0
    smoothing: Literal["centred", "published", "none"] = "centred"
    smoothing_window: int | None = None
    published: bool = False
    min_prefix: int = 20
    local_window: int = 64
    local_span: int = 2
    temperature: float = 1.0
    advantage_group: Literal["auto", "sequence", "position"] = "auto"
    advantage_scale: Literal["std", "none", "global"] = "std"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    lambda_rl: float = 0.2
    lambda_ntp: float = 1.0

    def __post_init__(self) -> None:
        if self.order == "inf":  # as files have it
            object.__setattr__(self, "order", math.inf)
        elif isinstance(self.order, float) and self.order.is_integer():  # as flags have it
            object.__setattr__(self, "order", int(self.order))
        check_choices(self)
        if self.draw not in (None, self.drawn):
            raise RefineError(
                f"selection={self.selection!r} draws the {self.drawn}, so it cannot go with draw={self.draw!r}; name a score"
            )
        for name in _AT_LEAST_ONE:
            if (value := getattr(self, name)) < 1:
                raise RefineError(f"{name} must be at least 1, got {value}")
        for name in _POSITIVE:
            if not (value := getattr(self, name)) > 0:
                raise RefineError(f"{name} must be positive, got {value}")
        for name in _NOT_NEGATIVE:
            if not (value := getattr(self, name)) >= 0:
                raise RefineError(f"{name} must not be negative, got {value}")
        if self.local_span < 2:
            raise RefineError(f"local_span must be at least 2 (windows of two times local_window), got {self.local_span}")
        if self.segment_tokens is not None and self.segment_tokens < 2:
            raise RefineError(
                f"segment_tokens must be at least 2, got {self.segment_tokens}; leave it out to run sequences in one piece"
            )
        if self.segment_tokens is not None and self.schedule == "reprefill":
            raise RefineError("schedule='reprefill' runs every prefix in one piece; with segment_tokens use schedule='snapshot'")
        if self.smoothing_window is not None and (self.smoothing_window < 1 or self.smoothing_window % 2 == 0):
            raise RefineError(f"smoothing_window must be odd and positive, got {self.smoothing_window}")
        if self.clip_low > 1:
            raise RefineError(f"clip_low must be at most 1, got {self.clip_low}")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise RefineError(f"{len(self.rewards)} rewards but {len(self.reward_weights)} reward_weights")
        if not self.rewards:
            raise RefineError("reward_funcs is empty: name at least one")
        if self.published:
            self._check_published()
        if not self.samples_rollouts:
            self._check_closed_form()
        elif self.order != 1:
            raise RefineError(
                f"order={self.order} belongs to estimator='closed_form', and estimator='sampled' makes rollouts; leave it out"
            )

    def _check_closed_form(self) -> None:
        """RefineError for an order that is none, and for what only sampling can estimate."""
        known = isinstance(self.order, int | float)
        if not known or not (self.order == math.inf or (1 <= self.order <= MAX_ORDER and self.order == int(self.order))):
            raise RefineError(
                f"order={self.order}: expected a whole number from 1 (the expected reward) to {MAX_ORDER}, or inf (the log-probability)"
            )
        closed = {"prefix_match"} | ({"exact_match"} if self.rollout_length == 1 else set())
        if len(self.rewards) > 1 or self.rewards[0] not in closed:
            names = ", ".join(r if isinstance(r, str) else getattr(r, "__name__", type(r).__name__) for r in self.rewards)
            raise RefineError(
                f"estimator={self.estimator!r} has no closed form of the reward {names}; prefix_match has one, and exact_match with "
                "rollout_length=1. Choose one of these, or estimator='sampled'"
            )
        for name, value in (("temperature", 1.0), ("kl_coef", 0.0), ("entropy_coef", 0.0)):
            if getattr(self, name) != value:
                raise RefineError(
                    f"{name}={getattr(self, name)} belongs to rollouts; with estimator={self.estimator!r} leave it at {value}"
                )

    def _check_published(self) -> None:
        """RefineError for what the published code cannot do."""
        if not self.samples_rollouts:
            raise RefineError(f"published=True belongs to rollouts; estimator={self.estimator!r} is not in the published code")
        if self.smoothing == "none":
            raise RefineError("published=True smooths as the published code does; leave smoothing='none' out")
        if self.rollout_length > self.min_prefix:
            raise RefineError(
                f"published=True keeps min_prefix={self.min_prefix} tokens free at the end of a text, too few for "
                f"rollout_length={self.rollout_length}; set rollout_length to at most {self.min_prefix}"
            )

    @property
    def samples_rollouts(self) -> bool:
        """Whether rollouts are sampled."""
        return self.estimator == "sampled"

    @property
    def samples_first(self) -> bool:
        """Whether rollouts are sampled in a pass of their own, without gradients, before they are learned from."""
        by_itself = self.schedule == "auto" and self.segment_tokens is not None
        return self.samples_rollouts and (by_itself or self.schedule in ("snapshot", "reprefill"))

    @property
    def rewards(self) -> list[RewardSpec]:
        """The rewards as a list, the default resolved."""
        if self.reward_funcs is None:
            return ["cosine" if self.samples_rollouts else "prefix_match"]
        return list(self.reward_funcs) if isinstance(self.reward_funcs, list | tuple) else [self.reward_funcs]

    @property
    def reward_names(self) -> list[Any]:
        """The rewards by name; a callable by its dotted path."""
        return [_plain(r) for r in self.rewards]

    def as_dict(self) -> dict[str, Any]:
        """Plain values by field; a callable reward as its dotted path."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def __getstate__(self) -> dict[str, Any]:
        # transformers pickles a run's arguments beside its checkpoints, which a reward made in a function could not be part of.
        return self.as_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "order": math.inf if state["order"] == "inf" else state["order"]})

    def __copy__(self) -> NSPConfig:
        return self  # frozen; and a copy by way of the state above would lose a callable reward

    def __deepcopy__(self, memo: Any) -> NSPConfig:
        return self

    @property
    def score(self) -> str:
        """What positions are drawn by, whatever way `selection` spells it."""
        return PUBLISHED_SELECTIONS.get(self.selection, (self.selection, ""))[0]

    @property
    def drawn(self) -> str:
        """How they are drawn: as `selection` implies, else by `draw`, else `sample`."""
        return PUBLISHED_SELECTIONS.get(self.selection, ("", self.draw or "sample"))[1]

    @property
    def smoothed(self) -> str:
        """How the entropy is smoothed: by `smoothing`; as published, only where positions are sampled."""
        if not self.published:
            return self.smoothing
        return "published" if self.drawn == "sample" else "none"

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
        """Tokens a sequence needs for one position: a prefix, the position itself, and its continuation. With `published`: the position,
        `min_prefix` tokens at the end, and a token for each chunk."""
        if self.published:
            return max(self.min_prefix + 1, self.positions_per_sequence)
        return self.min_prefix + 1 + self.rollout_length

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NSPConfig:
        """Return a published preset (`mid_training`, `post_training`, `test_time`; paper, Table 2) or ours (`context`, `expected`,
        `likelihood`), with other values for single fields."""
        check_known(overrides, (f.name for f in fields(cls)))
        return cls(**{**preset_settings(name), **overrides})


def _plain(value: Any) -> Any:
    if value == math.inf:
        return "inf"  # JSON has no other word for it
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if not callable(value):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)  # a partial, or an object with __call__
    return f"{named.__module__}.{named.__qualname__}"


def preset_settings(name: str) -> dict[str, Any]:
    """What a preset sets. RefineError for an unknown name."""
    if name not in PRESETS:
        raise RefineError(f"no preset {name!r}{closest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def check_known(names: Iterable[str], known: Iterable[str]) -> None:
    """RefineError for the first name that is no setting."""
    known = list(known)
    for name in names:
        if name not in known:
            raise RefineError(f"no setting {name!r}{closest(name, known)}")


PRESETS: dict[str, dict[str, Any]] = {
    "mid_training": {"reward_funcs": "cosine", "lambda_rl": 0.2},
    "post_training": {"reward_funcs": "hybrid", "lambda_rl": 0.2},
    "test_time": {"reward_funcs": "exact_match", "lambda_rl": 0.4},
    # Positions whose continuation depends on far context, several rollouts each compared with one another.
    "context": {
        "reward_funcs": "hybrid",
        "lambda_rl": 1.0,
        "selection": "context_kl",
        "num_generations": 8,
        "advantage_group": "position",
        "advantage_scale": "global",
        "baseline": "leave_one_out",
    },
    # The policy gradient in closed form, over all tokens by how much their prediction depends on far context. Lambda is what the trials of
    # benchmarks/study chose, on a set that no figure reports on.
    "expected": {"estimator": "closed_form", "order": 1, "rollout_length": 3, "local_span": 4, "lambda_rl": 4.0},
    # Cross-entropy at the same token weights, lambda likewise.
    "likelihood": {"estimator": "closed_form", "order": math.inf, "rollout_length": 1, "local_span": 4, "lambda_rl": 30.0},
}
