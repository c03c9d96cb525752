"""The settings of a training run are transformers' own, a few of ours, and the method's as one `NSPConfig`."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import Field, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import torch
from transformers import TrainingArguments

from refine_nsp.config import CONTEXT_SCORES, SAMPLED, NSPConfig, Ranges, check_choices, check_known, check_ranges
from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, notes, setting
from refine_nsp.nsp.rewards import resolve_reward
from refine_nsp.nsp.schedule import Needs, with_schedule
from refine_nsp.training.distillation import Distillation
from refine_nsp.training.phases import PHASES, Phase
from refine_nsp.training.settings import check as check_settings
from refine_nsp.training.settings import check_places, take_as_meant
from refine_nsp.training.transfer import Transfer

NSP_KEYWORDS = tuple(f.name for f in fields(NSPConfig))
T = TypeVar("T", bound=type[Any])

# What is to be known of transformers' own settings, whose types and defaults stay as they are there. What `resume` leaves out is logging,
# saving, validating, places, speed and memory.
INHERITED = {
    "output_dir": notes(common=True, help="folder of the run: checkpoints, the final model, its card, its report"),
    "max_steps": notes(common=True, card=True, help="optimizer steps; default: num_train_epochs decides"),
    "num_train_epochs": notes(common=True, card=True, help="times the data is gone through, where max_steps is not given"),
    "per_device_train_batch_size": notes(
        common=True, card=True, help="sequences that go through the model together, on each device"
    ),
    "gradient_accumulation_steps": notes(common=True, card=True, help="so many of these batches make an optimizer step"),
    "eval_strategy": notes(
        common=True, help="validate never (no), every eval_steps (steps), or after every epoch (epoch)"
    ),
    "eval_steps": notes(
        common=True, help="optimizer steps between validations; below 1: a share of all steps. Default: logging_steps"
    ),
    "save_steps": notes(common=True, help="optimizer steps between checkpoints; below 1: a share of all steps"),
    "save_strategy": notes(
        help="checkpoints every save_steps (steps), after every epoch (epoch), with every best validation (best), or never (no)"
    ),
    "resume_from_checkpoint": notes(
        common=True, help="`last`: continue after the newest whole checkpoint in output_dir; or the folder of one"
    ),
    "bf16": notes(
        common=True, card=True, resume=True, help="matrix products in bfloat16; weights and optimizer state keep their precision"
    ),
    "gradient_checkpointing": notes(
        common=True, help="keep no activations of blocks, but compute them again going backward: less memory, more time"
    ),
    "report_to": notes(help="where figures go besides metrics.jsonl: none, tensorboard, trackio, wandb, or several"),
    "use_cpu": notes(help="run on the CPU, even where there is a GPU"),
    "seed": notes(common=True, card=True, resume=True, help="seed of all randomness of training"),
} | dict.fromkeys(
    (
        "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
        "neftune_noise_alpha", "fp16", "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last",
    ),
    notes(resume=True),
)  # fmt: skip

COUNTS = ("steps_per_generation", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AMOUNTS = ("num_train_epochs", "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "dataloader_num_workers")
RANGES: Ranges = (
    (COUNTS, lambda x: x >= 1, "must be at least 1"),
    (AMOUNTS, lambda x: 0 <= x < math.inf, "must be a finite number of at least 0"),
    (("fast_weight_learning_rate",), lambda x: x is None or 0 < x < math.inf, "must be a finite number above 0"),
    (("adam_beta1", "adam_beta2"), lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    (("lambda_context",), lambda x: 0 <= x < math.inf, "must be a finite number of at least 0"),
    (("carried_keys", "teacher_window"), lambda x: x is None or x >= 1, "must be at least 1"),
    (("carry_between_documents",), lambda x: 0 <= x <= 1, "must be a chance from 0 to 1"),
    (("seed", "data_seed"), lambda x: x is None or 0 <= x < 2**32, "must be a whole number from 0 to 2**32 - 1"),
)


CARRIES = Reader("carry_states=True", lambda args: args.carry_states)
DISTILLS = Reader("objective='distill'", lambda args: args.objective == "distill")
TAUGHT = Reader(
    "objective='distill' or 'transfer', or context_scores='teacher'",
    lambda args: args.objective in ("distill", "transfer") or args.context_scores == "teacher",
)
SCORED = Reader(
    f"{CONTEXT_SCORES.words}, or objective='distill' with lambda_context",
    lambda args: CONTEXT_SCORES(args.nsp) or (args.objective == "distill" and args.lambda_context > 0),
)


def of_nsp(reader: Reader) -> Reader:
    """Make the same condition on a run's settings, which hold the method's as `nsp`."""
    return Reader(reader.words, lambda args: reader(args.nsp))


def with_notes(cls: T) -> T:
    """Put what `INHERITED` says of transformers' settings on this class' fields; transformers' own class stays as it is."""
    known: dict[str, Field[Any]] = vars(cls)["__dataclass_fields__"]
    for name, told in INHERITED.items():
        known[name] = copy.copy(known[name])
        known[name].metadata = MappingProxyType(told)
    return cls


def with_nsp(cls: T) -> T:
    """Let a dataclass with a field `nsp` take `preset=` and `NSPConfig`'s fields as keywords of its own, so that every setting is declared,
    described and checked in `NSPConfig` alone: `preset="context", rollout_length=3` is `nsp=NSPConfig.preset("context", rollout_length=3)`.
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
    """Make the method's settings of what was given of them; single fields win. RefineError where both `nsp` and `preset` are given."""
    if isinstance(rewards := flat.get("reward_funcs"), list | tuple) and len(rewards) == 1:
        flat = {**flat, "reward_funcs": rewards[0]}
    if nsp is not None:
        if preset is not None:
            raise RefineError(f"got both nsp and preset={preset!r}; use nsp=NSPConfig.preset({preset!r}, ...)")
        return replace(nsp, **flat)
    name = preset if preset is not None else default_preset
    return NSPConfig(**flat) if name is None else NSPConfig.preset(name, **flat)


@with_nsp
@with_notes
@dataclass
class ReFINEConfig(TrainingArguments):
    """Extend `TrainingArguments` by a few settings of ours and by the method's.

    These are given as `nsp=NSPConfig(...)`, or as `preset=` and the fields of `NSPConfig` among the keywords. `objective="ntp"` takes them
    too, and does not read them: it is the control of a comparison, the same run with one switch.

    Attributes:
        objective: `refine`; `ntp`: the same run with the cross-entropy alone; `distill`: learn a teacher's predictions, and the true
            tokens by `lambda_ntp`; or `transfer`: the memory of each layer alone learns what the teacher's attention there gives
            (docs/your_own_checkpoint.md).
        teacher: the frozen model to learn from, a folder or a hub name: any causal language model with the same tokenizer.
        lambda_context: in distillation a token weighs 1 + lambda_context times how much, in nats, the teacher's prediction needs what is
            beyond the window; 0: all tokens weigh the same.
        teacher_window: tokens of that window; default: the window of the model that is trained.
        max_length: tokens per sequence.
        steps_per_generation: optimizer steps that learn from one batch of rollouts. Above 1 the ratio to the policy that sampled
            them is clipped, and `schedule` cannot be `fused`.
        context_scores: when they are computed: in every step, by the model as it is (`online`), or once beforehand, by the model that
            the run starts from, and kept with the data (`cached`): a step then costs what an NTP step costs; or kept likewise, by the
            `teacher`. In distillation they are always the teacher's, computed in every step (`online`) or beforehand (`teacher`).
        log_completions: show a table of rollouts at every logging step, and keep it in completions.jsonl.
        num_completions_to_print: rows of that table.
        carry_states: windows of a document follow each other, each starting from the states that the one before left; the gradient ends
            where a window begins (docs/long_documents.md).
        carry_between_documents: the chance that a document starts from the states of the one that its lane read before, instead of from
            nothing (arXiv 2507.02782).
        carried_keys: attention over everything keeps the keys and values of its newest so many tokens between windows, which would grow
            with the document otherwise; a layer with a window keeps no more than these either.
        fast_weight_learning_rate: learning rate of the parameters that are the memory's alone (LaCT's), by the same schedule; new memory
            learns at 1e-3, where pretrained weights bear 1e-5. With learning_rate 0 the memory alone is trained and the rest frozen.
        max_skipped_steps: stop after so many steps in a row with a loss or gradient that is not finite (each such update is skipped).
    """

    default_preset: ClassVar[str | None] = None

    nsp: NSPConfig = setting(default_factory=NSPConfig)
    objective: Literal["refine", "ntp", "distill", "transfer"] = setting("refine", common=True, card=True, resume=True)
    teacher: str | None = setting(None, read_by=TAUGHT, common=True, card=True, resume=True)
    lambda_context: float = setting(10.0, read_by=DISTILLS, common=True, card=True, resume=True)
    teacher_window: int | None = setting(None, read_by=DISTILLS, card=True, resume=True)
    max_length: int = setting(1024, common=True, card=True, resume=True)
    steps_per_generation: int = setting(1, read_by=of_nsp(SAMPLED), common=True, resume=True)
    context_scores: Literal["online", "cached", "teacher"] = setting("online", read_by=SCORED, common=True, resume=True)
    log_completions: bool = setting(False, read_by=of_nsp(SAMPLED), common=True)
    num_completions_to_print: int = setting(8, read_by=Reader("log_completions", lambda args: args.log_completions))
    carry_states: bool = setting(False, common=True, card=True, resume=True)
    carry_between_documents: float = setting(0.0, read_by=CARRIES, card=True, resume=True)
    carried_keys: int | None = setting(None, read_by=CARRIES, card=True, resume=True)
    max_skipped_steps: int = setting(5)
    per_device_eval_batch_size: int = setting(
        0, help="Sequences that are validated together, on each device; 0: per_device_train_batch_size."
    )

    learning_rate: float = setting(1e-6, common=True, card=True, resume=True, help="Paper, Table 2.")
    fast_weight_learning_rate: float | None = setting(None, common=True, card=True, resume=True)
    lr_scheduler_type: str = setting("constant", card=True, resume=True, help="Paper, Table 2: constant, no warm-up.")
    weight_decay: float = setting(0.01, resume=True, help="Paper, Table 2.")
    max_grad_norm: float = setting(1.0, resume=True, help="The paper says 0.2, its code 1.0.")
    logging_steps: float = setting(10, common=True, help="Log every so many optimizer steps.")
    logging_nan_inf_filter: bool = setting(
        False, help="Hide losses that are not finite from logs: every step then waits for the device, twice."
    )

    def __post_init__(self) -> None:
        take_as_meant(self)
        if self.per_device_eval_batch_size == 0:  # what memory is there for; transformers' 8 takes several times a training step
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        check_places(self)
        try:
            super().__post_init__()
        except RefineError:
            raise
        except Exception as error:  # transformers refuses in its own words
            raise RefineError(f"these settings do not go together: {' '.join(str(error).split())}") from error
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nowhere to copy to, and torch would warn
        check_choices(self)
        check_ranges(self, RANGES)
        check_read(self)
        self._check_noise()
        self._check_carrying()
        self._check_teacher()
        check_settings(self, self.learning_rate or self.fast_weight_learning_rate or 0.0)
        for reward in self.nsp.rewards:
            resolve_reward(reward)
        if "estimator" in self.phase.reads:
            self.nsp = with_schedule(self.nsp, self.needs)
            self._check_method()

    @property
    def phase(self) -> Phase:
        """Make the phase that the objective names, which says what of these settings it uses."""
        if self.objective == "distill":
            return Distillation(self.nsp, lambda_context=self.lambda_context)
        if self.objective == "transfer":
            return Transfer(self.nsp)
        return PHASES[self.objective](self.nsp)

    @property
    def needs(self) -> Needs:
        """Tell what this run asks of the schedule of its rollouts."""
        return Needs(self.steps_per_generation, self.gradient_accumulation_steps)

    def _check_noise(self) -> None:
        """Refuse noise on embeddings where a step reads a sequence more than once, and must read the same each time (RefineError)."""
        if self.neftune_noise_alpha is None or (self.phase.reads_once and self.nsp.segment_tokens is None):
            return
        if self.objective == "transfer":
            raise RefineError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} is for embeddings, which objective='transfer' does not read"
            )
        more = f"objective={self.objective!r} samples and scores by one pass what it learns from in another"
        if self.nsp.segment_tokens is not None:
            more = f"segment_tokens={self.nsp.segment_tokens} runs segments again"
        raise RefineError(
            f"neftune_noise_alpha={self.neftune_noise_alpha} puts other noise on the embeddings in every pass, and {more}; leave it "
            "out, or train by the cross-entropy alone"
        )

    def _check_carrying(self) -> None:
        """Refuse settings that do not go with windows which continue from each other (RefineError)."""
        if not self.carry_states:
            return
        for name, wrong in (
            ("train_sampling_strategy", "group_by_length"),
            ("ignore_data_skip", True),
            ("auto_find_batch_size", True),
        ):
            if getattr(self, name) == wrong:
                raise RefineError(
                    f"{name}={wrong!r} would put windows behind other documents' states; leave it out, or carry_states"
                )
        if self.nsp.kl_coef > 0 and "kl_coef" in self.phase.reads:
            raise RefineError(
                f"kl_coef={self.nsp.kl_coef} needs a reference model, whose states are not carried; leave kl_coef out"
            )

    def _check_teacher(self) -> None:
        """Refuse a teacher's work without a teacher, and scores of another model in distillation (RefineError)."""
        if TAUGHT(self) and self.teacher is None:
            asks = f"objective={self.objective!r}" if self.context_scores != "teacher" else "context_scores='teacher'"
            raise RefineError(f"{asks} needs a teacher: a folder or a hub name of a model with the student's tokenizer")
        if self.objective == "distill" and self.context_scores == "cached":
            raise RefineError(
                "context_scores='cached' keeps the scores of the model that the run starts from, and distillation weighs by its teacher's; "
                "use 'teacher', which keeps those"
            )
        if self.objective == "transfer" and self.context_scores != "online":
            raise RefineError(
                f"context_scores={self.context_scores!r} is not read by objective='transfer', where all tokens weigh the same; leave it out"
            )
        if TAUGHT(self) and self.carry_states:
            raise RefineError(
                "carry_states: the states of a document are not carried for a teacher, which would see less than the student; leave "
                "carry_states out, and raise max_length"
            )

    def _check_method(self) -> None:
        """Refuse settings of the run and of the method that do not fit together (RefineError)."""
        nsp = self.nsp
        if self.max_length < nsp.rollout_length + 1:
            raise RefineError(f"max_length={self.max_length} cannot hold a rollout of K={nsp.rollout_length} and a prefix")
        if nsp.positions_per_sequence * 2 > self.max_length:
            raise RefineError(
                f"positions_per_sequence={nsp.positions_per_sequence} is too many for max_length={self.max_length}: each needs 2 tokens"
            )

    def weights_dtype(self, dtype: str | None) -> str | None:
        """Name the dtype that a model is loaded in to be trained: `dtype` where one is given; else float32 under autocast (`bf16`, `fp16`),
        since small steps would round away in the dtype of most checkpoints; else None, for the checkpoint's own."""
        return "float32" if dtype is None and self.mixed_precision != "no" else dtype

    def to_dict(self) -> dict[str, Any]:
        """Return all settings by name, as transformers does for loggers and model cards, with the method's among them."""
        return {**super().to_dict(), "nsp": self.nsp.as_dict()}
