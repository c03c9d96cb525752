"""The method has one file for each step of the paper; `step.py` is its page, and calls them in order."""

from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Rollouts, StepResult

__all__ = ["ReFINEStep", "Rollouts", "StepResult"]
