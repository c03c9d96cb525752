"""Training: data, the trainer, and pretraining of the tiny base."""

from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.data import DataArguments, prepare_data
from refine_nsp.training.trainer import ReFINETrainer

__all__ = ["DataArguments", "ReFINEConfig", "ReFINETrainer", "prepare_data"]
