"""Make the phases that learn from a teacher, once it is loaded and the student is there to compare it with."""

from __future__ import annotations

from typing import cast

from torch import nn

from refine_nsp.errors import RefineError
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.teacher import Teacher
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.distillation import Distillation
from refine_nsp.training.phases import Phase
from refine_nsp.training.teacher import check_window, window_of_student
from refine_nsp.training.transfer import Transfer, check_transfer


def taught(args: ReFINEConfig, student: nn.Module, teacher: Teacher | None) -> Phase:
    """Make the phase of `distill` or `transfer`.

    Raises:
        RefineError: there is no teacher (the trainer was given no model to compare it with), nothing lies beyond the window that the
            student attends in, or its layers cannot teach the student's.
    """
    if teacher is None or args.teacher is None:
        raise RefineError(
            f"objective={args.objective!r} needs the student's model when the trainer is made; give model, not model_init"
        )
    name = args.teacher
    window = window_of_student(student, args.teacher_window)
    if args.objective == "transfer":
        check_transfer(name, teacher, cast(CausalModel, without_adapters(student)))
    check_window(window, args.max_length, teacher, name)
    if args.objective == "transfer":
        return Transfer(args.nsp, teacher)
    return Distillation(args.nsp, teacher, args.lambda_context, window)
