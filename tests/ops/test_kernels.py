"""Which kernels are chosen, what is said of it, and what is refused. What they compute is tested in tests/gpu."""

import pytest
import torch

from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_model
from refine_nsp.ops import kernels
from refine_nsp.ops.kernels import Kernels, by_operation, chosen
from tests.models.families import build

WITHOUT_DEVICE = pytest.mark.skipif(torch.cuda.is_available() or kernels.interpreted(), reason="kernels can run here")


@pytest.fixture(autouse=True)
def fresh():
    """The choice is made once a process; here once a test."""
    chosen.cache_clear()
    yield
    chosen.cache_clear()


@WITHOUT_DEVICE
def test_without_a_device_pytorch_computes_and_says_why(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert str(chosen()) == "torch (no CUDA device)"
    assert {runs_on for runs_on, _ in by_operation().values()} == {"torch"}
    assert build("delta_net").model.kernels == "torch (no CUDA device)"


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, " Torch ")
    monkeypatch.setattr(kernels, "_problem", lambda: None)
    assert by_operation()["delta rule"] == ("torch", "REFINE_NSP_KERNELS=torch")


def test_an_unknown_choice_is_refused_where_a_model_is_made(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(RefineError, match="REFINE_NSP_KERNELS='cuda': expected one of auto, torch, fla"):
        load_model("refine-nsp/tiny-delta-net")


def test_kernels_that_are_demanded_and_cannot_run_are_refused(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "fla")
    monkeypatch.setattr(kernels, "_problem", lambda: "no CUDA device")
    with pytest.raises(RefineError, match="=fla, but no CUDA device; unset it"):
        by_operation()


def test_what_a_device_cannot_compute_is_named_by_operation_and_by_model(monkeypatch):
    there = Kernels("fla", "flash-linear-attention 0.6.0", "cuda", gated="its Triton is broken")
    for module in ("refine_nsp.ops.kernels", "refine_nsp.models.blocks"):
        monkeypatch.setattr(f"{module}.chosen", lambda: there)
    named = by_operation()
    assert named["gated delta rule"] == ("torch", "its Triton is broken") and named["delta rule"][0] == "fla"
    assert {named[name] for name in kernels.ELEMENTWISE} == {("fla", "flash-linear-attention 0.6.0")}
    assert build("gated_deltanet").model.kernels.endswith("the delta rule on PyTorch's operations (its Triton is broken)")
    assert build("delta_net").model.kernels == "fla (flash-linear-attention 0.6.0)"
