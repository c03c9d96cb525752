"""The method, one file a step of the paper: selection, rollout, rewards, advantage, objective; `step` calls them in order."""

from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Rollouts, StepResult

__all__ = ["ReFINEStep", "Rollouts", "StepResult"]
