"""Count what a teacher takes: it is another model, frozen, whose passes come before the student's and leave nothing but hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from refine_nsp.config import NSPConfig
from refine_nsp.estimate.counter import Counter
from refine_nsp.estimate.few_layers import Blueprint
from refine_nsp.estimate.shapes import ShapesOnly, allocate
from refine_nsp.models import attends_only
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.teacher import Teacher, scores_beyond
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.distillation import Distillation
from refine_nsp.training.phases import Phase
from refine_nsp.training.teacher import window_of_student
from refine_nsp.training.transfer import Transfer


@dataclass(frozen=True)
class Taught:
    """Hold what a run has of its teacher.

    Attributes:
        blueprint: what the teacher is built from. window: tokens of the student's window. lambda_context: as the run has it. scored:
            whether every step computes the teacher's scores.
    """

    blueprint: Blueprint
    window: int
    lambda_context: float
    scored: bool

    @classmethod
    def of(cls, args: ReFINEConfig, student: nn.Module, blueprint: Blueprint) -> Taught:
        """Take from a run's settings what its steps do with a teacher."""
        scored = args.phase.reads_scores and args.context_scores == "online"
        return cls(blueprint, window_of_student(student, args.teacher_window), args.lambda_context, scored)

    def teacher(self, layers: Sequence[int] | None) -> Teacher:
        """Build a teacher of these layers (None: of all), whose weights are not written."""
        model = cast(CausalModel, allocate(self.blueprint.on_meta(layers)))
        return Teacher(model.eval().requires_grad_(False), attends_only(model.model))

    def phase(self, objective: str, config: NSPConfig, layers: Sequence[int] | None) -> Phase:
        """Make the phase of a student of these layers, by its objective.

        Transfer runs the teacher's same layers in its own step. In distillation one layer stands for the teacher: what its passes take,
        `measure` counts.
        """
        if objective == "transfer":
            return Transfer(config, self.teacher(layers))
        return Distillation(config, self.teacher([0]), self.lambda_context, self.window)

    def measure(
        self, args: ReFINEConfig, layers: Sequence[int], shapes: ShapesOnly, rows: int = 1, tokens: int = 0, segment: int = 0,
        segments: int = 0,
    ) -> tuple[dict[str, float], float]:  # fmt: skip
        """Measure the passes of a teacher of these layers: the peak of bytes by part of the step, and flops."""
        teacher = self.teacher(layers)
        batch = Batch.of(torch.randint(0, teacher.model.config.vocab_size, (rows, tokens or segment * segments)))
        with shapes, Counter() as counter, torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext():
            hidden = teacher.read(batch)
            if self.scored:
                teacher.scores(batch, hidden, scores_beyond(self.window))
        return counter.peaks, counter.flops
