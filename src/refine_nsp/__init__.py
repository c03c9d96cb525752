"""refine-nsp: train fast-weight language models on next-sequence prediction (ReFINE, arXiv 2602.16704).

Importing the package registers DeltaNet, Gated DeltaNet and LaCT with transformers' Auto classes.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
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
from refine_nsp.nsp.step import ReFINEStep

if TYPE_CHECKING:
    from refine_nsp.training import PostTrainer, PostTrainingConfig, ReFINEConfig, ReFINETrainer, TestTimeConfig, TestTimeTrainer

try:
    __version__ = version("refine-nsp")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

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


def __getattr__(name: str) -> Any:
    # The trainers pull in accelerate and datasets; inference should not pay for them.
    if name in __all__:
        from refine_nsp import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
