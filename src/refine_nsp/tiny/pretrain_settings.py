"""Settings of pretraining say how large a base is and what its data are, in addition to the settings of every training here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_type_hints

from refine_nsp.config import Objective, check_ranges
from refine_nsp.errors import RefineError, closest
from refine_nsp.fields import Reader, setting
from refine_nsp.tiny.documents import SHORTEST_ROW
from refine_nsp.tiny.families import FACTS, FAMILIES
from refine_nsp.training.arguments import ReFINEConfig, with_notes
from refine_nsp.values import accepted


@dataclass(frozen=True)
class PretrainPhase:
    """A phase is a stretch of pretraining whose rows have one length and one mixture.

    Attributes:
        steps: optimizer steps. length: tokens of a row.
        shares: share of the rows that each family of generated documents has (`tiny/families.py`); the other rows are plain text.
        dense: statements and questions take at most this share of a generated document; the rest hides them.
        answer_weight: weight of an answer's tokens in the loss; all other tokens weigh 1.
    """

    steps: int
    length: int
    shares: dict[str, float]
    dense: float
    answer_weight: float

    def __post_init__(self) -> None:
        bounds = {"steps": (0, math.inf), "length": (2, math.inf), "dense": (0, 1), "answer_weight": (0, math.inf)}
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not least <= value <= most or value == math.inf:
                raise RefineError(f"phases: {name} is {value!r}; expected a number from {least} to {most}")
        if not isinstance(self.shares, Mapping):
            raise RefineError(f"shares={self.shares!r}: expected a share for each family, as in {{facts: 0.5}}")
        for name, share in self.shares.items():
            if name not in FAMILIES:
                raise RefineError(f"shares: no family {name!r}{closest(name, FAMILIES)}; there are {', '.join(FAMILIES)}")
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise RefineError(f"shares: {name} is {share}; a share of rows is between 0 and 1")
        if (total := sum(self.shares.values())) > 1 + 1e-9:
            raise RefineError(f"shares add up to {total:g}; all of them together are at most 1, what is left is plain text")
        if self.length < SHORTEST_ROW and any(share for name, share in self.shares.items() if name != FACTS):
            raise RefineError(f"rows of {self.length} tokens hold only facts; other families need {SHORTEST_ROW}")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> PretrainPhase:
        """Make a phase of a mapping, as a YAML file has it. Raises RefineError for a key that is no field, or a missing one."""
        if not isinstance(given, Mapping):
            raise RefineError(f"phases: {given!r} is no mapping of settings to values")
        known = {f.name for f in fields(cls)}
        if unknown := [key for key in given if key not in known]:
            hint = "; recall_share: s is now shares: {facts: s}" if "recall_share" in unknown else closest(unknown[0], known)
            raise RefineError(f"phases: unknown key {unknown[0]!r}{hint}")
        if missing := sorted(known - set(given)):
            raise RefineError(f"phases: {', '.join(missing)} missing in {dict(given)}")
        hints = get_type_hints(cls)
        return cls(**{name: accepted(hints[name]).meant(f"phases: {name}", value) for name, value in given.items()})


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "window", "probes_per_kind")
LACT = Reader("model_type='lact_swiglu'", lambda args: args.model_type == "lact_swiglu")


@with_notes
@dataclass
class PretrainConfig(ReFINEConfig):
    """Extend `ReFINEConfig` by the sizes of a new base and the phases of its data. The shipped bases' settings: recipes/pretrain_*.yaml.

    The learning rate rises for `warmup_steps`, then falls linearly to a tenth (`polynomial`, unless `lr_scheduler_kwargs` say otherwise).

    Attributes:
        max_steps: optimizer steps; by default those of all phases, and at most so many.
        max_length: tokens of an example: as many rows of a phase as fit into it stand side by side, and go through the model together.
        model_type: kind of the model, `delta_net`, `gated_deltanet` or `lact_swiglu`.
        start_from: folder or shipped name of a base of these sizes to train further, with its tokenizer and new optimizer moments; None:
            a new model.
        vocab_size: pieces of the tokenizer.
        hidden_size: width of the model.
        num_hidden_layers: layers of the model.
        intermediate_size: width of its MLPs.
        num_heads: heads of the delta rule, or of LaCT's attention and fast weights.
        window: tokens of LaCT's attention window and chunk; short, so that the fast weights must hold what is further away.
        store_dtype: type of the saved weights, `float32` or `bfloat16`; they load as float32 either way.
        probe_lengths: tokens of the recall probes' prompts, which every validation measures.
        probes_per_kind: probes for each family, wording and length.
        phases: stretches of the training, one after another.
    """

    model_type: Literal["delta_net", "gated_deltanet", "lact_swiglu"] = setting("delta_net", common=True, resume=True)
    start_from: str | None = setting(None, common=True, resume=True)
    vocab_size: int = setting(2048, common=True, resume=True)
    hidden_size: int = setting(128, common=True, resume=True)
    num_hidden_layers: int = setting(4, common=True, resume=True)
    num_heads: int = setting(2, common=True, resume=True)
    intermediate_size: int = setting(384, common=True, resume=True)
    window: int = setting(64, read_by=LACT, resume=True)
    store_dtype: Literal["float32", "bfloat16"] = setting("float32", common=True)
    probe_lengths: list[int] = setting(default_factory=lambda: [256, 512, 1024], common=True)
    probes_per_kind: int = setting(64, common=True)
    phases: list[PretrainPhase] = setting(
        default_factory=lambda: [
            PretrainPhase(300, 128, {FACTS: 0.6}, 1.0, 4.0),
            PretrainPhase(500, 256, {FACTS: 0.4}, 0.6, 2.0),
            PretrainPhase(1000, 512, {FACTS: 0.3}, 0.3, 1.0),
        ],
        resume=True,
    )

    # Pretraining's own defaults for what every training has.
    output_dir: str | None = "runs/pretrain"
    objective: Objective = setting("ntp", resume=True)
    seed: int = 0
    max_length: int = setting(4096, common=True, resume=True)
    per_device_train_batch_size: int = 1
    train_sampling_strategy: str = "sequential"
    learning_rate: float = setting(3e-3, common=True, resume=True)
    lr_scheduler_type: str = setting("polynomial", resume=True)
    warmup_steps: float = 50
    weight_decay: float = setting(0.1, resume=True)
    adam_beta2: float = 0.95
    logging_steps: float = setting(50, common=True)
    save_steps: float = 250
    save_total_limit: int | None = 2
    eval_strategy: str = "steps"
    eval_steps: float | None = 200

    def __post_init__(self) -> None:
        self.phases = [phase if isinstance(phase, PretrainPhase) else PretrainPhase.read(phase) for phase in self.phases or ()]
        if self.max_steps < 1:
            self.max_steps = self.total_steps
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"lr_end": float(self.learning_rate) / 10}
        if self.total_steps < 1:
            raise RefineError("pretraining needs phases with at least one step")
        super().__post_init__()
        if self.carry_states:
            raise RefineError("carry_states is for documents longer than a row; pretraining's are not, so leave it out")
        check_ranges(self, ((SIZES, lambda x: x >= 1, "must be at least 1"),))
        if LACT(self) and self.num_heads != 2:
            raise RefineError(f"num_heads={self.num_heads}: this LaCT starts with two heads that look one and two tokens back")
        if not 1 <= self.max_steps <= self.total_steps:
            raise RefineError(f"max_steps={self.max_steps}: the phases have {self.total_steps} steps; expected 1 to so many")
        if self.warmup_steps >= self.max_steps:
            raise RefineError(f"warmup_steps={self.warmup_steps:g} must be fewer than the {self.max_steps} steps of the run")
        if any(phase.length > self.max_length for phase in self.phases):
            raise RefineError(f"max_length={self.max_length}: an example must hold at least a row of each phase")

    @property
    def total_steps(self) -> int:
        """Count the steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def families(self) -> list[str]:
        """List the families that any phase trains on, in the order of `FAMILIES`."""
        return [name for name in FAMILIES if any(phase.shares.get(name) for phase in self.phases)]

    def phase_at(self, step: int) -> PretrainPhase:
        """Return the phase that a step, counted from 0, belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(f"the phases have {self.total_steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values, for loggers and model cards."""
        return {**super().to_dict(), "phases": [asdict(phase) for phase in self.phases]}
