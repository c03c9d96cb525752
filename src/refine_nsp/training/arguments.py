"""Settings of a training run: transformers' own, a few of ours, and the method's as one `NSPConfig`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from transformers import TrainingArguments

from refine_nsp.config import NSPConfig, Objective, check_choices, check_known, preset_settings
from refine_nsp.errors import RefineError
from refine_nsp.nsp.rewards import resolve_reward
from refine_nsp.training.phases import PHASES, Phase
from refine_nsp.training.scores import wants_gain
from refine_nsp.training.settings import check as check_settings
from refine_nsp.training.settings import check_places, take_as_meant

NSP_KEYWORDS = tuple(f.name for f in fields(NSPConfig))
T = TypeVar("T", bound=type[Any])


def with_nsp(cls: T) -> T:
    """Let a dataclass with a field `nsp` take `nsp=NSPConfig(...)`, `preset=` and `NSPConfig`'s fields as keywords of its own.

    So `ReFINEConfig(nsp=NSPConfig.preset("context", rollout_length=3))` and `ReFINEConfig(preset="context", rollout_length=3)` are the
    same, and every setting is declared, described and checked in `NSPConfig` alone.
    """
    made: Any = cls
    generated = made.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, nsp: NSPConfig | None = None, preset: str | None = None, **kwargs: Any) -> None:
        flat = {name: kwargs.pop(name) for name in NSP_KEYWORDS if name in kwargs}
        check_known(kwargs, ["preset", *NSP_KEYWORDS, *(f.name for f in fields(cls) if f.init)])
        generated(self, *args, nsp=nsp_of(nsp, preset, flat, made.default_preset), **kwargs)

    made.__init__ = __init__
    return cls


def nsp_of(nsp: NSPConfig | None, preset: str | None, flat: dict[str, Any], default_preset: str | None) -> NSPConfig:
    """The method's settings from what was given of them; single fields win. RefineError for both `nsp` and `preset`."""
    if isinstance(rewards := flat.get("reward_funcs"), list | tuple) and len(rewards) == 1:
        flat = {**flat, "reward_funcs": rewards[0]}
    if nsp is not None:
        if preset is not None:
            raise RefineError(f"got both nsp and preset={preset!r}; use nsp=NSPConfig.preset({preset!r}, ...)")
        return replace(nsp, **flat)
    name = preset if preset is not None else default_preset
    return NSPConfig(**{**(preset_settings(name) if name is not None else {}), **flat})


@with_nsp
@dataclass
class ReFINEConfig(TrainingArguments):
    """Extend `TrainingArguments` by a few settings of ours and by the method's, given as `nsp=NSPConfig(...)`, or as `preset=` and fields of
    `NSPConfig` among the keywords.

    Attributes:
        objective: `refine`, or `ntp`: the same run with the cross-entropy alone.
        max_length: tokens per sequence.
        steps_per_generation: optimizer steps that learn from one batch of rollouts. Above 1 the ratio to the policy that sampled
            them is clipped, and `schedule` cannot be `fused`.
        context_scores: where a run needs them, computed in every step by the model as it is (`online`), or once beforehand by the model
            it starts from, and kept with the data (`cached`): what a step costs then is what an NTP step costs.
        log_completions: show a table of rollouts at every logging step, and keep it in completions.jsonl.
        num_completions_to_print: rows of that table.
        max_skipped_steps: stop after so many steps in a row with a loss or gradient that is not finite (each such update is skipped).
    """

    default_preset: ClassVar[str | None] = None

    nsp: NSPConfig = field(default_factory=NSPConfig)
    objective: Objective = "refine"
    max_length: int = 1024
    steps_per_generation: int = 1
    context_scores: Literal["online", "cached"] = "online"
    log_completions: bool = False
    num_completions_to_print: int = 8
    max_skipped_steps: int = 5

    learning_rate: float = field(default=1e-6, metadata={"help": "Paper, Table 2."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Paper, Table 2: constant, no warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Paper, Table 2."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The paper says 0.2, its code 1.0."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide losses that are not finite from logs: every step then waits for the device, twice."},
    )

    def __post_init__(self) -> None:
        take_as_meant(self)
        check_places(self)
        try:
            super().__post_init__()
        except RefineError:
            raise
        except Exception as error:  # of transformers, in its words
            raise RefineError(f"these settings do not go together: {' '.join(str(error).split())}") from error
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nowhere to copy to, and torch would warn
        check_choices(self)
        counts = (
            "steps_per_generation",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise RefineError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "num_train_epochs",
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "warmup_steps",
            "dataloader_num_workers",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise RefineError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RefineError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("seed", "data_seed"):
            if (seed := getattr(self, name)) is not None and not 0 <= seed < 2**32:
                raise RefineError(f"{name} must be a whole number from 0 to 2**32 - 1, got {seed}")
        check_settings(self)
        for reward in self.nsp.rewards:
            resolve_reward(reward)
        if self.nsp.schedule == "auto":
            self.nsp = replace(self.nsp, schedule=self._schedule())
        if "estimator" in self.phase.reads:
            self._check_method()

    @property
    def phase(self) -> Phase:
        """Make the phase that the objective names, which says what of these settings it uses."""
        return PHASES[self.objective](self.nsp)

    def _schedule(self) -> Literal["fused", "snapshot"]:
        """`fused` where what is sampled in a pass can be learned from in it: it serves one step, and is compared with nothing else. By
        segments, states are cheaper where positions are known."""
        first = self.steps_per_generation > 1 or self._compares_micro_batches or self.nsp.segment_tokens is not None
        return "snapshot" if first else "fused"

    @property
    def _compares_micro_batches(self) -> bool:
        """Whether advantages need the rewards of all micro-batches of a step: they have one scale."""
        return self.nsp.samples_rollouts and self.nsp.advantage_scale == "global" and self.gradient_accumulation_steps > 1

    def _check_method(self) -> None:
        """RefineError where the run's settings and the method's do not fit together."""
        nsp = self.nsp
        if self.steps_per_generation > 1 and nsp.schedule == "fused":
            raise RefineError(
                f"schedule='fused' samples and learns in one pass, so steps_per_generation={self.steps_per_generation} cannot "
                "reuse its rollouts; use schedule='snapshot'"
            )
        if self._compares_micro_batches and nsp.schedule == "fused":
            raise RefineError(
                f"advantage_scale='global' is one scale for the {self.gradient_accumulation_steps} micro-batches of a step, and "
                "schedule='fused' learns from each before it knows the next; use schedule='snapshot'"
            )
        if self.steps_per_generation > 1 and not nsp.samples_rollouts:
            raise RefineError(
                f"estimator={nsp.estimator!r} makes no rollouts that steps_per_generation={self.steps_per_generation} could reuse; leave "
                "it at 1"
            )
        if self.context_scores == "cached" and not self.phase.reads_scores:
            wants_gain(nsp)  # says what would need them
        if self.log_completions and not nsp.samples_rollouts:
            raise RefineError(f"log_completions shows rollouts, and estimator={nsp.estimator!r} makes none; leave it off")
        if self.max_length < nsp.rollout_length + 1:
            raise RefineError(f"max_length={self.max_length} cannot hold a rollout of K={nsp.rollout_length} and a prefix")
        if nsp.positions_per_sequence * 2 > self.max_length:
            raise RefineError(
                f"positions_per_sequence={nsp.positions_per_sequence} is too many for max_length={self.max_length}: each of the "
                "P chunks needs room for a position"
            )

    def weights_dtype(self, dtype: str | None) -> str | None:
        """What a model that is to be trained is loaded in: `dtype` where one is given; else, under autocast (`bf16`, `fp16`), float32,
        since small steps would round away in what most checkpoints have; else None, the checkpoint's."""
        return "float32" if dtype is None and self.mixed_precision != "no" else dtype

    def to_dict(self) -> dict[str, Any]:
        """As in transformers (loggers and model cards take it), the method's settings among the others."""
        return {**super().to_dict(), "nsp": self.nsp.as_dict()}
