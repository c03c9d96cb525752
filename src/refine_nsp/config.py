"""The settings of the method (paper, sections 3-4 and Table 2) are one frozen dataclass, which says who reads each; presets name some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from refine_nsp.errors import RefineError, closest
from refine_nsp.fields import Reader, SettingError, check_read, default_of, live, setting

RewardSpec = str | Callable[..., Any]
Objective = Literal["refine", "ntp"]  # text, or a prompt, is learned by ReFINE or by the cross-entropy alone

# The paper and its code have a word of their own for these pairs of a score and a draw.
PUBLISHED_SELECTIONS = {"uniform": ("none", "sample"), "argmax": ("entropy", "greatest"), "argmin": ("entropy", "least")}

# Every order adds a term; beyond a few dozen of them the objective is the log-probability in all but the rarest tokens.
MAX_ORDER = 1000

# Each entry names settings, says what must hold of their values, and puts that in the words of an error message.
Ranges = Sequence[tuple[Sequence[str], Callable[[Any], bool], str]]
RANGES: Ranges = (
    (
        ("positions_per_sequence", "rollout_length", "num_generations", "min_prefix", "local_window"),
        lambda x: x >= 1,
        "must be at least 1",
    ),
    (("tau", "temperature", "dual_clip"), lambda x: x > 0, "must be positive"),
    (
        ("clip_low", "clip_high", "kl_coef", "entropy_coef", "lambda_rl", "lambda_ntp"),
        lambda x: x >= 0,
        "must not be negative",
    ),
    (("clip_low",), lambda x: x <= 1, "must be at most 1"),
    (("local_span",), lambda x: x >= 2, "must be at least 2 (windows of two times local_window)"),
    (("segment_tokens",), lambda x: x is None or x >= 2, "must be at least 2, or left out to run sequences in one piece"),
    (("smoothing_window",), lambda x: x is None or (x >= 1 and x % 2 == 1), "must be odd and positive"),
)


def check_ranges(settings: object, ranges: Ranges) -> None:
    """Refuse the first value that is out of its range."""
    for names, holds, words in ranges:
        for name in names:
            if not holds(value := getattr(settings, name)):
                raise RefineError(f"{name} {words}, got {value}")


@lru_cache
def choices_of(cls: type) -> dict[str, tuple[object, ...]]:
    """List the values that each `Literal` field of a dataclass may take; None is among them where the field may be None."""
    choices = {}
    for name, hint in get_type_hints(cls).items():
        options: list[object] = []
        for part in (hint, *get_args(hint)):
            options += get_args(part) if get_origin(part) is Literal else [None] if part is NoneType else []
        if any(o is not None for o in options):
            choices[name] = tuple(options)
    return choices


def check_choices(settings: object) -> None:
    """Refuse the first value of a dataclass that its field's `Literal` does not hold."""
    kind: Any = type(settings)
    for name, options in choices_of(kind).items():
        check_choice(name, getattr(settings, name), options)


def check_choice(name: str, value: object, options: Iterable[object]) -> None:
    """Refuse a value that is none of the options. The RefineError names the nearest one."""
    if value not in (options := list(options)):
        names = [str(o) for o in options if o is not None]
        raise RefineError(f"{name}={value!r} is not one of {', '.join(names)}{closest(value, names)}")


# These conditions say who reads the fields below. An error message shows their words, as the setting that would have to be made.
SAMPLED = Reader("estimator='sampled'", lambda c: c.estimator == "sampled")
CLOSED_FORM = Reader("estimator='closed_form'", lambda c: c.estimator == "closed_form")
SELECTS = Reader("estimator='sampled' or token_weights='selected'", lambda c: c.selects)
BY_A_SCORE = Reader("a selection that names a score and no draw", lambda c: c.selection not in PUBLISHED_SELECTIONS)
BY_CHANCE = Reader("a selection by scores, with draw='sample'", lambda c: c.score != "none" and c.drawn == "sample")
BY_ENTROPY = Reader("selection='entropy'", lambda c: c.score == "entropy")
OURS = Reader("published=False", lambda c: not c.published)
SMOOTHED = Reader("entropies that are smoothed, with published=True by draw='sample'", lambda c: c.smoothed != "none")
CONTEXT_SCORES = Reader(
    "context scores, by selection='context_kl' or token_weights='context'", lambda c: c.context_score is not None
)
# Where a pass learns from the rollouts that were sampled from itself, the ratio of the policies is 1 and nothing is clipped.
BEFOREHAND = Reader(
    "rollouts sampled beforehand (steps_per_generation above 1, or schedule='snapshot')", lambda c: c.schedule != "fused"
)
DUAL_CLIPS = Reader(BEFOREHAND.words, lambda c: c.schedule != "fused" or c.dual_clip < 1)


@dataclass(frozen=True)
class NSPConfig:
    """The settings of next-sequence prediction: where rollouts are sampled, how, what is rewarded, and how that becomes a loss.

    Each field says by which other settings it is read; `live` names those that a configuration reads.

    Attributes:
        positions_per_sequence: P: a sequence is cut into so many chunks, and one position is chosen in each (the paper's c).
        rollout_length: K tokens per rollout (the paper's k).
        num_generations: N rollouts per position (the paper's n).
        estimator: `sampled`: rollouts are sampled and rewarded (the paper). `closed_form`: no rollouts; what infinitely many of them
            would teach, for every token, is one function of the true tokens' probabilities (docs/method.md).
        order: M of the closed form, a whole number or `inf`. 1 is the expected reward, `inf` the log-probability, and between them the
            logarithm's series is cut after M terms: a token weighs by the chance that at least one of M rollouts matches.
        token_weights: how much tokens count in the closed form: every token by its context score (`context`: by KL, `context_gain`), or
            the positions chosen by `selection`, all alike (`selected`).
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
        draw: how a position is taken by the scores of its chunk: `sample`, the `greatest` or the `least`. Default: `sample`.
        tau: softmax temperature over the scores of a chunk.
        smoothing: how entropies are averaged: `centred` over real tokens, `published` (zeros beyond the edges), or `none`.
        smoothing_window: odd width of the pooling; None: K, or K + 1 when K is even.
        published: follow the rules of the paper's code instead of ours: which positions there are, short texts, the remainder of the
            chunks, smoothing, EOS in rollouts and behind answers, groups of one, test time (the table in docs/method.md).
        min_prefix: tokens that must stand before a position; with `published`, tokens of the shortest prefix, and as many at the end.
        local_window: W: context scores compare the whole prefix with its last W tokens.
        local_span: these last tokens are read in windows of local_span * W tokens, so with at least W and less than local_span * W of
            context. A longer span costs less: local_span / (local_span - 1) tokens are run for each token.
        temperature: rollouts are sampled at it; log-probabilities are those of the tempered distribution.
        advantage_group: which rollouts are compared with each other: all of a `sequence`, or of a `position`; `auto`: sequence if N = 1.
        advantage_scale: advantages are divided by the group's `std`, by one `global` standard deviation, or by nothing (`none`).
        baseline: what is subtracted from a reward: the group's `mean`, or the mean of the others (`leave_one_out`).
        clip_low, clip_high: the ratio to the old policy is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: the bound on the loss where the advantage is negative, in units of |advantage|.
        kl_coef: the weight of the KL to a frozen reference model.
        entropy_coef: the weight of an entropy bonus.
        lambda_rl, lambda_ntp: the weights of the policy loss and of the cross-entropy.

    Raises:
        RefineError: a value out of range, or one that nothing reads, naming it and what would read it.
    """

    positions_per_sequence: int = setting(8, read_by=SELECTS, also="validation", common=True, card=True, resume=True)
    rollout_length: int = setting(5, common=True, card=True, resume=True)
    num_generations: int = setting(1, read_by=SAMPLED, common=True, card=True, resume=True)
    estimator: Literal["sampled", "closed_form"] = setting("sampled", common=True, card=True, resume=True)
    order: float = setting(1, read_by=CLOSED_FORM, common=True, card=True, resume=True)
    token_weights: Literal["context", "context_gain", "selected"] = setting(
        "context", read_by=CLOSED_FORM, common=True, card=True, resume=True
    )
    schedule: Literal["auto", "fused", "snapshot", "reprefill"] = setting("auto", read_by=SAMPLED, common=True)
    segment_tokens: int | None = setting(None)
    reward_funcs: RewardSpec | list[RewardSpec] | None = setting(None, common=True, card=True, resume=True)
    reward_weights: list[float] | None = setting(None, read_by=SAMPLED, resume=True)
    selection: Literal["entropy", "context_kl", "context_gain", "none", "uniform", "argmax", "argmin"] = setting(
        "entropy", read_by=SELECTS, common=True, card=True, resume=True
    )
    draw: Literal["sample", "greatest", "least"] | None = setting(None, read_by=SELECTS & BY_A_SCORE, resume=True)
    tau: float = setting(1.0, read_by=SELECTS & BY_CHANCE, resume=True)
    smoothing: Literal["centred", "published", "none"] = setting("centred", read_by=SELECTS & BY_ENTROPY & OURS, resume=True)
    smoothing_window: int | None = setting(None, read_by=SELECTS & BY_ENTROPY & SMOOTHED, resume=True)
    published: bool = setting(False, read_by=SELECTS, card=True, resume=True)
    min_prefix: int = setting(20, read_by=SELECTS, also="validation", resume=True)
    local_window: int = setting(64, read_by=CONTEXT_SCORES, resume=True)
    local_span: int = setting(2, read_by=CONTEXT_SCORES, resume=True)
    temperature: float = setting(1.0, read_by=SAMPLED, resume=True)
    advantage_group: Literal["auto", "sequence", "position"] = setting("auto", read_by=SAMPLED, resume=True)
    advantage_scale: Literal["std", "none", "global"] = setting("std", read_by=SAMPLED, resume=True)
    baseline: Literal["mean", "leave_one_out"] = setting("mean", read_by=SAMPLED, resume=True)
    clip_low: float = setting(0.2, read_by=SAMPLED & BEFOREHAND, resume=True)
    clip_high: float = setting(0.2, read_by=SAMPLED & BEFOREHAND, resume=True)
    dual_clip: float = setting(3.0, read_by=SAMPLED & DUAL_CLIPS, resume=True)
    kl_coef: float = setting(0.0, read_by=SAMPLED, resume=True)
    entropy_coef: float = setting(0.0, read_by=SAMPLED, resume=True)
    lambda_rl: float = setting(0.2, common=True, card=True, resume=True)
    lambda_ntp: float = setting(1.0, resume=True)

    def __post_init__(self) -> None:
        if self.order == "inf" or (isinstance(self.order, float) and self.order.is_integer()):  # as files and flags have it
            object.__setattr__(self, "order", math.inf if self.order == "inf" else int(self.order))
        check_choices(self)
        if self.draw not in (None, self.drawn):
            raise RefineError(
                f"selection={self.selection!r} draws the {self.drawn}, so it cannot go with draw={self.draw!r}; name a score"
            )
        check_ranges(self, RANGES)
        if not self.rewards:
            raise RefineError("reward_funcs is empty: name at least one")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise RefineError(f"{len(self.rewards)} rewards but {len(self.reward_weights)} reward_weights")
        if self.segment_tokens is not None and self.samples_rollouts and self.schedule == "reprefill":
            raise RefineError("schedule='reprefill' runs every prefix in one piece; with segment_tokens use schedule='snapshot'")
        if self.published and not self.samples_rollouts:
            raise RefineError(f"published=True belongs to rollouts; estimator={self.estimator!r} is not in the published code")
        check_read(self)
        if not self.samples_rollouts:
            self._check_closed_form()
        if self.published and self.rollout_length > self.min_prefix:
            raise RefineError(
                f"published=True keeps min_prefix={self.min_prefix} tokens free at the end of a text, too few for "
                f"rollout_length={self.rollout_length}; set rollout_length to at most {self.min_prefix}"
            )

    def _check_closed_form(self) -> None:
        """Refuse an order that there is not, and rewards that have no closed form."""
        if self.order != math.inf and (not isinstance(self.order, int) or not 1 <= self.order <= MAX_ORDER):
            raise RefineError(
                f"order={self.order}: expected a whole number from 1 (the expected reward) to {MAX_ORDER}, or inf (the log-probability)"
            )
        closed = {"prefix_match"} | ({"exact_match"} if self.rollout_length == 1 else set())
        if len(self.rewards) > 1 or self.rewards[0] not in closed:
            names = ", ".join(r if isinstance(r, str) else getattr(r, "__name__", type(r).__name__) for r in self.rewards)
            raise SettingError(
                f"estimator={self.estimator!r} has no closed form of the reward {names}; prefix_match has one, and exact_match with "
                "rollout_length=1. Choose one of these, or estimator='sampled'",
                ["reward_funcs"],
            )

    @property
    def live(self) -> frozenset[str]:
        """The names of the fields that a step by these settings reads."""
        return live(self)

    @property
    def selects(self) -> bool:
        """Tell whether positions are chosen: for rollouts, or for the closed form by `token_weights="selected"`."""
        return self.estimator == "sampled" or self.token_weights == "selected"

    @property
    def context_score(self) -> Literal["context_kl", "context_gain"] | None:
        """The context score that positions are drawn by, or that tokens weigh by; None where neither needs one."""
        name = self.score if self.selects else self.token_weights
        return "context_gain" if name == "context_gain" else "context_kl" if name in ("context", "context_kl") else None

    def at_random(self) -> NSPConfig:
        """Return settings by which positions are drawn uniformly, where rollouts of these lengths could be: validation takes them."""
        kept = ("positions_per_sequence", "rollout_length", "min_prefix", "published", "segment_tokens")
        return NSPConfig(selection="uniform", **{name: getattr(self, name) for name in kept})

    @property
    def samples_rollouts(self) -> bool:
        """Tell whether rollouts are sampled."""
        return self.estimator == "sampled"

    @property
    def rewards(self) -> list[RewardSpec]:
        """The rewards as a list; the default stands there as what it means."""
        if self.reward_funcs is None:
            return ["cosine" if self.samples_rollouts else "prefix_match"]
        return list(self.reward_funcs) if isinstance(self.reward_funcs, list | tuple) else [self.reward_funcs]

    @property
    def reward_names(self) -> list[str]:
        """The names of the rewards; a callable has its dotted path."""
        return [str(_plain(r)) for r in self.rewards]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values by field; a callable reward becomes its dotted path."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def __getstate__(self) -> dict[str, object]:
        # transformers pickles a run's arguments beside its checkpoints, which a reward made in a function could not be part of.
        return self.as_dict()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({**state, "order": math.inf if state["order"] == "inf" else state["order"]})

    def __copy__(self) -> NSPConfig:
        return self  # frozen; and a copy by way of the state above would lose a callable reward

    def __deepcopy__(self, memo: object) -> NSPConfig:
        return self

    @property
    def score(self) -> str:
        """The score that positions are drawn by, whichever way `selection` spells it."""
        return PUBLISHED_SELECTIONS.get(self.selection, (self.selection, ""))[0]

    @property
    def drawn(self) -> str:
        """Say how positions are drawn: as `selection` implies, else by `draw`, else `sample`."""
        return PUBLISHED_SELECTIONS.get(self.selection, ("", self.draw or "sample"))[1]

    @property
    def smoothed(self) -> str:
        """Say how entropies are smoothed: by `smoothing`, or as published, which smooths only where positions are sampled."""
        if not self.published:
            return self.smoothing
        return "published" if self.drawn == "sample" else "none"

    @property
    def window(self) -> int:
        """The odd width of the window that entropies are averaged over."""
        return self.smoothing_window or self.rollout_length + 1 - self.rollout_length % 2

    @property
    def group(self) -> str:
        """The group that advantages are formed in, `sequence` or `position`; `auto` is resolved."""
        usual = "sequence" if self.num_generations == 1 else "position"
        return usual if self.advantage_group == "auto" else self.advantage_group

    @property
    def shortest(self) -> int:
        """The tokens that a sequence needs for one position: a prefix, the position itself, and its continuation."""
        if self.published:  # the position and `min_prefix` tokens at the end, and at least a token for each chunk
            return max(self.min_prefix + 1, self.positions_per_sequence)
        return self.min_prefix + 1 + self.rollout_length

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NSPConfig:
        """Return a published preset (`mid_training`, `post_training`, `test_time`; paper, Table 2) or ours (`context`, `expected`,
        `likelihood`), with other values for single fields. A RefineError says what would mend a value that does not go with the preset."""
        check_known(overrides, (f.name for f in fields(cls)))
        try:
            return cls(**{**preset_settings(name), **overrides})
        except SettingError as error:
            raise SettingError(f"{error}{_way_out(name, overrides, error.names)}", error.names) from None


def _plain(value: object) -> object:
    if value == math.inf:
        return "inf"  # JSON has no other word for it
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if not callable(value):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)  # a partial, or an object with __call__
    return f"{named.__module__}.{named.__qualname__}"


def _way_out(name: str, given: Mapping[str, Any], refused: Sequence[str]) -> str:
    """Say what helps where a preset has set what the settings given with it leave unread; say nothing where it has not."""
    sets = preset_settings(name)
    unwanted = [n for n in refused if n in sets and given.get(n, sets[n]) == sets[n]]
    if not unwanted:
        return ""
    usual = {f.name: default_of(f) for f in fields(NSPConfig)}
    chosen = {n: value for n, value in given.items() if n not in refused and value != sets.get(n, usual[n])}
    fitting = []
    for other, settings in PRESETS.items():
        with suppress(RefineError):
            NSPConfig(**settings | chosen)
            fitting += [other] if other != name else []
    another = f", or take another preset ({', '.join(fitting)})" if fitting else ""
    back = ", ".join(f"{n}={usual[n]!r}" for n in unwanted)
    return f". The preset {name} sets {', '.join(unwanted)}: give {back} as well{another}"


def preset_settings(name: str) -> dict[str, Any]:
    """Return what a preset sets. RefineError for an unknown name."""
    if name not in PRESETS:
        raise RefineError(f"no preset {name!r}{closest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def check_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first name that is no setting. The RefineError names the nearest one."""
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
