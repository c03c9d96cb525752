"""The GPU suite runs on a CUDA device, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`); else it is skipped by reason."""

import os

import pytest
import torch

# Before the package: importing it imports flash-linear-attention, whose kernels are decorated then.
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.gpu.interpreter import patch_loops

    patch_loops()

from refine_nsp.ops import kernels


def pytest_collection_modifyitems(items):
    """Reasons to skip, before any fixture."""
    reason = None
    if not torch.cuda.is_available() and not kernels.interpreted():
        reason = "no CUDA device"
    elif kernels.chosen().name != "fla":
        reason = f"kernels are off: {kernels.chosen().why}"
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif kernels.interpreted() and "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a device, not the interpreter"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(kernels.chosen().device)


@pytest.fixture
def on_torch(monkeypatch):
    """A function that runs another with PyTorch's operations."""

    def run(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "chosen", lambda: kernels.Kernels("torch", "this test"))
            return f(*args)

    return run


@pytest.fixture(params=["float32", "half"])
def dtype(request) -> torch.dtype:
    """float32 only where it is exact: compiled delta rules are not used for it. half: bfloat16, but the interpreter has float16 alone."""
    if request.param == "float32":
        return torch.float32
    return torch.float16 if kernels.interpreted() else torch.bfloat16
