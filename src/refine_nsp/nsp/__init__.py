"""The method, one file a step of the paper: selection, rollout, rewards, advantage, objective; `step` calls them in order."""

from refine_nsp.nsp.records import Rollouts, StepResult
from refine_nsp.nsp.step import ReFINEStep

__all__ = ["ReFINEStep", "Rollouts", "StepResult"]
