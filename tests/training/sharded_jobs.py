"""`tests.training.jobs` by FSDP on a CPU: accelerate shards models on accelerators alone, so it is told that this is one."""

import warnings
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from tests.training.jobs import run_jobs

original = AcceleratorState.__init__


def with_sharding(self, *args, **kwargs) -> None:
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    original(self, *args, **kwargs)


def run_sharded_jobs(path: Path) -> None:
    """`run_jobs` with shards, in a process of its own."""
    AcceleratorState.__init__ = with_sharding
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    run_jobs(path)
