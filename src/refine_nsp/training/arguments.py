"""Settings of a training run: transformers' own, the method's, and a few of ours."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments

from refine_nsp.config import PRESETS, NSPConfig
from refine_nsp.errors import RefineError, closest
from refine_nsp.nsp.rewards import resolve_reward

_RENAMED = {"reward": "reward_funcs"}  # TRL's name
_NSP_FIELDS = {f.name: _RENAMED.get(f.name, f.name) for f in fields(NSPConfig)}


@dataclass
class ReFINEConfig(TrainingArguments):
    """`TrainingArguments` plus `NSPConfig`'s fields (its `reward` is called `reward_funcs` here, as in TRL).

    Attributes:
        objective: `refine`, or `ntp`: the same run with the cross-entropy alone.
        preset: start from a preset of `NSPConfig` (`mid_training`, `post_training`, `test_time`, `context`); fields given
            explicitly win.
        max_length: tokens per sequence.
        steps_per_generation: optimizer steps that learn from one batch of rollouts. Above 1 the ratio to the policy that sampled
            them is clipped, and `schedule` cannot be `fused`.
        log_completions: show a table of rollouts at every logging step, and keep it in completions.jsonl.
        num_completions_to_print: rows of that table.
        reward_funcs: `cosine`, `exact_match`, `hybrid`, or a dotted path to your own (`package.module.function`); several are summed.
        max_skipped_steps: stop after so many steps in a row whose loss or gradient is not finite (each is skipped).
    """

    objective: str = "refine"
    preset: str | None = None
    max_length: int = 1024
    steps_per_generation: int = 1
    log_completions: bool = False
    num_completions_to_print: int = 8
    max_skipped_steps: int = 5

    positions_per_sequence: int | None = None
    rollout_length: int | None = None
    num_generations: int | None = None
    schedule: str | None = None
    reward_funcs: list[str] | None = None
    reward_weights: list[float] | None = None
    selection: str | None = None
    tau: float | None = None
    smoothing: str | None = None
    smoothing_window: int | None = None
    min_prefix: int | None = None
    local_window: int | None = None
    temperature: float | None = None
    advantage_group: str | None = None
    advantage_scale: str | None = None
    baseline: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float | None = None
    entropy_coef: float | None = None
    lambda_rl: float | None = None
    lambda_ntp: float | None = None

    learning_rate: float = field(default=1e-6, metadata={"help": "Paper, Table 2."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Paper, Table 2: constant, no warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Paper, Table 2."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The paper says 0.2, its code 1.0."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nowhere to copy to, and torch would warn
        if self.objective not in ("refine", "ntp"):
            raise RefineError(
                f"objective={self.objective!r} is not one of refine, ntp{closest(self.objective, ('refine', 'ntp'))}"
            )
        if self.steps_per_generation < 1:
            raise RefineError(f"steps_per_generation must be at least 1, got {self.steps_per_generation}")
        nsp = self.nsp()
        for reward in nsp.rewards:
            resolve_reward(reward)
        if self.steps_per_generation > 1 and nsp.schedule == "fused" and self.objective == "refine":
            raise RefineError(
                f"schedule='fused' samples and learns in one pass, so steps_per_generation={self.steps_per_generation} cannot "
                "reuse its rollouts; use schedule='snapshot'"
            )
        if self.max_length < nsp.rollout_length + 1:
            raise RefineError(f"max_length={self.max_length} cannot hold a rollout of K={nsp.rollout_length} and a prefix")
        if self.positions_per_sequence is not None and self.positions_per_sequence * 2 > self.max_length:
            raise RefineError(
                f"positions_per_sequence={self.positions_per_sequence} is too many for max_length={self.max_length}: each of the "
                "P chunks needs room for a position"
            )

    def nsp(self) -> NSPConfig:
        """The method's settings: the preset, with every field given explicitly on top."""
        given = {name: getattr(self, ours) for name, ours in _NSP_FIELDS.items()}
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(given.get("reward"), list) and len(given["reward"]) == 1:
            given["reward"] = given["reward"][0]
        if self.preset is None:
            return NSPConfig(**given)
        if self.preset not in PRESETS:
            raise RefineError(f"no preset {self.preset!r}{closest(self.preset, PRESETS)}; there are {', '.join(PRESETS)}")
        return NSPConfig.preset(self.preset, **given)
