"""This room prepares data and trains models on it, in all three phases of the paper."""

from refine_nsp.training.answers import AnswerArguments, prepare_answers
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.data import DataArguments
from refine_nsp.training.nested import PostTrainer, PostTrainingConfig
from refine_nsp.training.phases import MicroBatch, NextSequence, NextToken, Phase
from refine_nsp.training.sources import prepare_data
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer
from refine_nsp.training.trainer import ReFINETrainer

__all__ = [
    "AnswerArguments",
    "DataArguments",
    "MicroBatch",
    "NextSequence",
    "NextToken",
    "Phase",
    "PostTrainer",
    "PostTrainingConfig",
    "ReFINEConfig",
    "ReFINETrainer",
    "TestTimeConfig",
    "TestTimeTrainer",
    "prepare_answers",
    "prepare_data",
]
