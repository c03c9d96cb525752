"""Which kernels are chosen, what is said of it, and what is refused. What they compute is tested in tests/gpu."""

import inspect
from unittest.mock import create_autospec

import pytest
import torch
from torch.nn.attention import varlen

from refine_nsp.environment import devices
from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_model
from refine_nsp.ops import kernels
from refine_nsp.ops import linear_cross_entropy as head
from refine_nsp.ops.kernels import Kernels, by_operation, chosen
from refine_nsp.ops.window_attention import naive_window_attention, window_attention
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


def packed_attention(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What `varlen_attn` documents: sequences packed one behind the other, each last query beside its last key, (left, right) keys seen."""
    outputs = []
    for (a, b), (c, d) in zip(*(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) for cu in (cu_seq_q, cu_seq_k)), strict=True):
        assert b - a <= max_q and d - c <= max_k
        ahead = torch.arange(d - c)[None] - (torch.arange(b - a)[:, None] + (d - c) - (b - a))
        seen = (ahead >= -window_size[0]) & (ahead <= window_size[1])
        heads = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention's place taken by `packed_attention`; the calls it got."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return packed_attention(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    monkeypatch.setattr("refine_nsp.ops.window_attention.window_attention_runs", lambda x, dtype: True)
    return calls


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("slots", [0, 7])
def test_window_attention_as_flash_attention_is_called(flash, window, slots):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (20, slots + 20, slots + 20))
    past = torch.full((2,), slots)
    results = [f(q, k, v, window, past) for f in (window_attention, naive_window_attention)]
    cotangent = torch.randn_like(results[0])
    torch.testing.assert_close(*results)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), cotangent) for o in results), strict=True):
        torch.testing.assert_close(a, b)
    assert flash == [{"window_size": (window - 1, 0)}]
    window_attention(q, k, v, window, past - 1 if slots else past)  # slots with gaps, which that kernel does not know
    assert len(flash) == (1 if slots else 2)


def test_flash_attention_is_called_as_the_installed_torch_declares_it():
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"] and "window_size" in names


def test_what_flash_attention_cannot_do_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    problem = kernels.window_attention_problem
    assert problem(None, None) is None and problem(torch.bfloat16, 64) is None
    assert "not float32" in problem(torch.float32, 64) and "not 20" in problem(torch.bfloat16, 20)
    assert "not 264" in problem(torch.float16, 264)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    assert "capability 8.0, T4 has less" in problem(torch.bfloat16, 64)


def test_blocks_of_the_head_fit_the_device(monkeypatch):
    cuda, gib = torch.device("cuda"), 2**30
    free = {"bytes": 70 * gib}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gib)

    def taken(vocabulary: int) -> int:
        return head.block_tokens(vocabulary, cuda) * vocabulary * head.BYTES_A_LOGIT

    assert gib < taken(32000) <= 80 * gib // 32 and head.block_tokens(32000, cuda) % 128 == 0
    roomy = head.block_tokens(32000, cuda)
    free["bytes"] = 60 * gib
    assert head.block_tokens(32000, cuda) == roomy  # the same from step to step
    free["bytes"] = 2 * gib
    assert taken(32000) <= gib // 2 and taken(250_000) <= gib // 2
    assert head.block_tokens(32000, torch.device("cpu")) == 131


@pytest.fixture
def an_h100(monkeypatch):
    """What torch says of a device, where there is none."""
    facts = {"device_count": 1, "is_available": True, "get_device_capability": (9, 0), "get_device_name": "H100", "is_bf16_supported": True,
             "mem_get_info": (70 * 2**30, 80 * 2**30)}  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name), return_value=value))


def test_what_is_said_of_a_device_with_and_without_kernels(an_h100, monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert devices()[1]["device"] == "cuda:0" and devices()[1]["memory"] == "70.0 of 80.0 GiB free"
    assert devices()[1]["name"].startswith("H100, capability 9.0") and devices()[1]["bfloat16"] == "by the device"
    by = by_operation()
    assert by["delta rule"] == ("torch", "flash-linear-attention is not installed: pip install 'refine-nsp[gpu]'")
    assert by["window attention"][1].startswith("FlashAttention in bfloat16 or float16, else block by block")
    chosen.cache_clear()
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert by_operation()["window attention"][1].startswith("block by block")
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert by_operation()["window attention"][1].endswith("NVIDIA's devices alone")
