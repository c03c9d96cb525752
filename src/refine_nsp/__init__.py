"""refine-nsp: train fast-weight language models on next-sequence prediction (ReFINE, arXiv 2602.16704).

Importing the package registers DeltaNet, Gated DeltaNet and LaCT with transformers' Auto classes.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_nsp.config import NSPConfig
from refine_nsp.environment import installed
from refine_nsp.errors import RefineError

if TYPE_CHECKING:
    from refine_nsp.models import (
        DeltaNetConfig,
        DeltaNetForCausalLM,
        FastWeightCache,
        GatedDeltaNetConfig,
        GatedDeltaNetForCausalLM,
        LaCTConfig,
        LaCTForCausalLM,
        load,
        with_states,
    )
    from refine_nsp.nsp.module import ReFINEStep
    from refine_nsp.training import PostTrainer, PostTrainingConfig, ReFINEConfig, ReFINETrainer, TestTimeConfig, TestTimeTrainer

__version__ = installed("refine-nsp") or "0+unknown"  # unknown where a source tree is run that was not installed
__all__ = [
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "FastWeightCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "LaCTConfig",
    "LaCTForCausalLM",
    "NSPConfig",
    "PostTrainer",
    "PostTrainingConfig",
    "ReFINEConfig",
    "ReFINEStep",
    "ReFINETrainer",
    "RefineError",
    "TestTimeConfig",
    "TestTimeTrainer",
    "load",
    "with_states",
]
# The trainers pull in accelerate and datasets; inference should not pay for them.
_TRAINING = ("PostTrainer", "PostTrainingConfig", "ReFINEConfig", "ReFINETrainer", "TestTimeConfig", "TestTimeTrainer")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "training" if name in _TRAINING else "nsp.module" if name == "ReFINEStep" else "models"
    return getattr(importlib.import_module(f"refine_nsp.{room}"), name)


# Importing the models registers them. The command does so where it loads one: its help needs neither torch nor transformers.
# Python sets argv[0] to "-m" while it looks for the module that `python -m refine_nsp.cli` names.
_AS_COMMAND = Path(*sys.argv[:1]).stem == "refine-nsp" or (sys.argv[:1] == ["-m"] and "refine_nsp.cli" in sys.orig_argv)
if not _AS_COMMAND:
    from refine_nsp import models as models
