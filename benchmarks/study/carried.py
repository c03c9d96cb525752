"""Make the section on carried states in docs/results.md from the kept figures of its jobs (`benchmarks/carried_study.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WINDOW, SPAN, LANES = 1024, 8, 8  # tokens; windows that are measured; rows of a step
NEEDLE_WINDOWS = (2, 4, 8)
RECORD = Path(__file__).resolve().parent / "records" / "carried.json.gz"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results.md"
BASE, WINDOWS, CARRIED, FULL = "base", "windows", "carried", "full"
# Settings of a ReFINEConfig; all arms read the same tokens in a step.
ARMS: dict[str, dict[str, Any]] = {
    WINDOWS: {"max_length": WINDOW, "per_device_train_batch_size": LANES},
    CARRIED: {"max_length": WINDOW, "per_device_train_batch_size": LANES, "carry_states": True},
    FULL: {"max_length": SPAN * WINDOW, "per_device_train_batch_size": 1},
}
Figures = dict[str, Any]


def name_of(kind: str, *arguments: Any) -> str:
    """Name a job, as its file is called."""
    return "-".join(str(part).replace(" ", "_") for part in (kind, *arguments))


def write(record: Path, document: Path) -> str:
    return ""
