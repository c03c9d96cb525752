"""Fixtures shared by all tests: one thread (the models are tiny), float64 where exactness is claimed, and the optional reference data."""

import gc
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take the million objects of imported libraries out of what garbage is looked for in: every training ends with such a search."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    """Folder of reference fixtures and sample data beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("reference data (a folder named shared beside the checkout) is not here")
    return folder
