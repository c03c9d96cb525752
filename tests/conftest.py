"""Fixtures shared by all tests: one thread (the models are tiny), float64 where exactness is claimed, and the optional reference data."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Importing makes a million objects and hardly any garbage: looking for it all the while takes a quarter of the time until tests begin.
gc.disable()
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Take the million objects of imported libraries out of what garbage is looked for in: every training ends with such a search."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def libraries_are_no_garbage() -> Iterator[None]:
    """Do the same with what the tests of a file have imported only as they ran."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    """Folder of reference fixtures and sample data beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("reference data (a folder named shared beside the checkout) is not here")
    return folder
