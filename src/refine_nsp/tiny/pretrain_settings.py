"""What decides a tiny base: its sizes, and the phases of its pretraining."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from refine_nsp.errors import RefineError, closest
from refine_nsp.tiny.documents import SHORTEST_ROW
from refine_nsp.tiny.families import FAMILIES

FACTS = "facts"  # of `tiny/recall.py`
SHARED = (FACTS, *FAMILIES)
STORE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PretrainPhase:
    """A stretch of pretraining.

    Attributes:
        steps: of `tokens_per_step` tokens, in rows of `length`.
        shares: of the rows by family of generated documents: `facts` (`tiny/recall.py`) and those of `tiny/families.py`; the other
            rows are plain text.
        dense: at most this share of a generated document is statements and questions; the rest hides them.
        answer_weight: of an answer's tokens in the loss; other tokens weigh 1.
    """

    steps: int
    length: int
    shares: dict[str, float]
    dense: float
    answer_weight: float

    def __post_init__(self) -> None:
        if self.steps < 0 or self.length < 2 or not (0 <= self.dense <= 1 and 0 <= self.answer_weight < math.inf):
            raise RefineError(
                f"phases: steps={self.steps} must not be negative, length={self.length} at least 2, dense={self.dense} between 0 and 1, "
                f"answer_weight={self.answer_weight} a finite number of at least 0"
            )
        if not isinstance(self.shares, Mapping):
            raise RefineError(f"shares={self.shares!r}: expected a share for each family, as in {{facts: 0.5}}")
        for name, share in self.shares.items():
            if name not in SHARED:
                raise RefineError(f"shares: no family {name!r}{closest(name, SHARED)}; there are {', '.join(SHARED)}")
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise RefineError(f"shares: {name} is {share}; a share of rows is between 0 and 1")
        if (total := sum(self.shares.values())) > 1 + 1e-9:
            raise RefineError(f"shares add up to {total:g}; all of them together are at most 1, what is left is plain text")
        if self.length < SHORTEST_ROW and any(share for name, share in self.shares.items() if name != FACTS):
            raise RefineError(f"rows of {self.length} tokens hold only facts; other families need {SHORTEST_ROW}")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the base model. those of the shipped bases: recipes/pretrain_*.yaml.

    Attributes:
        model_type: `delta_net`, `gated_deltanet` or `lact_swiglu`.
        start_from: folder or shipped name of a base of these sizes to go on from, with its tokenizer and new optimizer moments; None
            starts from nothing.
        num_heads: of the delta rule, or of LaCT's attention and fast weights.
        window: LaCT's attention window and chunk, in tokens; short, so that what is further away must be in the fast weights.
        bf16: matrix products run in bfloat16 (autocast), a quarter to a half faster on CPUs that have them; weights stay float32.
        store_dtype: of the saved weights, `float32` or `bfloat16`; they load as float32 either way.
        probe_steps: recall and held-out text are measured after so many steps, and at the end.
        probe_lengths: tokens of the recall probes' prompts. probes_per_kind: how many for each family, wording and length.
    """

    output_dir: str = "runs/pretrain"
    seed: int = 0
    model_type: str = "delta_net"
    start_from: str | None = None
    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 384
    window: int = 64
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    bf16: bool = False
    store_dtype: str = "float32"
    save_steps: int = 250
    log_steps: int = 50
    probe_steps: int = 200
    probe_lengths: list[int] = field(default_factory=lambda: [256, 512, 1024])
    probes_per_kind: int = 64
    phases: list[PretrainPhase] = field(
        default_factory=lambda: [
            PretrainPhase(300, 128, {FACTS: 0.6}, 1.0, 4.0),
            PretrainPhase(500, 256, {FACTS: 0.4}, 0.6, 2.0),
            PretrainPhase(1000, 512, {FACTS: 0.3}, 0.3, 1.0),
        ]
    )

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size hidden_size num_hidden_layers num_heads intermediate_size window tokens_per_step probes_per_kind".split()
        )
        for name in (*sizes, "save_steps", "log_steps", "probe_steps"):
            if getattr(self, name) < 1:
                raise RefineError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RefineError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if self.store_dtype not in STORE_DTYPES:
            raise RefineError(f"store_dtype={self.store_dtype!r} is not one of {', '.join(STORE_DTYPES)}")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> PretrainConfig:
        """From a mapping such as a YAML file's, with its phases as mappings. RefineError for a key that is none of the fields."""
        known = {f.name for f in fields(cls)}
        for key in settings:
            if key not in known:
                raise RefineError(f"unknown key {key!r}{closest(key, known)}")
        given = dict(settings)
        if "phases" in given:
            given["phases"] = [_read_phase(phase) for phase in given["phases"]]
        return cls(**given)

    @property
    def total_steps(self) -> int:
        return sum(p.steps for p in self.phases)

    @property
    def families(self) -> list[str]:
        """Those that any phase trains on, in the order of `SHARED`."""
        return [name for name in SHARED if any(p.shares.get(name) for p in self.phases)]


def _read_phase(given: Mapping[str, Any]) -> PretrainPhase:
    known = {f.name for f in fields(PretrainPhase)}
    if unknown := [key for key in given if key not in known]:
        hint = "; recall_share: s is now shares: {facts: s}" if "recall_share" in unknown else closest(unknown[0], known)
        raise RefineError(f"phases: unknown key {unknown[0]!r}{hint}")
    if missing := sorted(known - set(given)):
        raise RefineError(f"phases: {', '.join(missing)} missing in {dict(given)}")
    return PretrainPhase(**given)
