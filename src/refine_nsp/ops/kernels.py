"""Choose the kernels of the operations: PyTorch's own, or flash-linear-attention's (Triton) on a CUDA device.

It is chosen once a process, by `REFINE_NSP_KERNELS`: `auto` (the default) takes flash-linear-attention 0.6 where it and a CUDA device are
there, `torch` never does, `fla` demands it. Where a kernel cannot serve an input (a head size, a dtype), PyTorch does, and one warning
names the reason. FlashAttention within a window comes with torch and runs on CUDA devices unless the choice is `torch`.

Under Triton's interpreter (`TRITON_INTERPRET=1`) kernels run on the CPU, on tiny inputs; so they are tested without a device.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from refine_nsp.environment import installed
from refine_nsp.errors import RefineError

VARIABLE = "REFINE_NSP_KERNELS"
CHOICES = ("auto", "torch", "fla")
WIDEST_KEY = 256  # channels of a head that flash-linear-attention's delta-rule kernels take
WIDEST_NORM = 65536  # bytes of a row that its norms take
HALF = (torch.bfloat16, torch.float16)
WIDEST_ATTENTION_HEAD = 256  # channels of a head that FlashAttention takes
ELEMENTWISE = ("short convolution", "norms", "SwiGLU")
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # elementwise kernels take these, and compute in float32


@dataclass(frozen=True)
class Kernels:
    """Describes the kernels of a process."""

    name: str  # "torch" or "fla"
    why: str  # in one line for people
    device: str = "cuda"  # the kind that its kernels run on
    gated: str | None = None  # why they do not run the gated delta rule

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


@functools.cache
def chosen() -> Kernels:
    """Choose the kernels of this process; a RefineError for an unknown choice, or for `fla` where it cannot run."""
    if wanted() == "torch":
        return Kernels("torch", f"{VARIABLE}=torch")
    problem = _problem()
    if problem is None:
        where = "under Triton's interpreter" if interpreted() else torch.cuda.get_device_name()
        found = installed("flash-linear-attention") or installed("fla-core") or "0.6"
        why = f"flash-linear-attention {found}, Triton {installed('triton')}, {where}"
        return Kernels("fla", why, "cpu" if interpreted() else "cuda", _gated_problem())
    if wanted() == "fla":
        raise RefineError(f"{VARIABLE}=fla, but {problem}; unset it to run on PyTorch's operations")
    return Kernels("torch", problem)


def wanted() -> str:
    """Read which of `CHOICES` is wanted; a RefineError for anything else."""
    choice = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if choice not in CHOICES:
        raise RefineError(f"{VARIABLE}={choice!r}: expected one of {', '.join(CHOICES)}")
    return choice


def interpreted() -> bool:
    """Tell whether Triton's kernels are interpreted on the CPU instead of compiled."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fused(x: Tensor) -> bool:
    """Tell whether an elementwise kernel (norms, convolution, SwiGLU) runs on x."""
    if not (x.is_cuda or interpreted()):  # on a CPU nothing else needs asking, so nothing is imported
        return False
    return x.dtype in FUSED_DTYPES and chosen().name == "fla" and x.device.type == chosen().device


def norm_runs(x: Tensor) -> bool:
    """Tell whether a norm over the last axis of x runs on a kernel; where its width forbids that, one warning says so."""
    if not fused(x):
        return False
    if (size := x.shape[-1] * x.element_size()) > WIDEST_NORM:
        _say_once(f"norms of rows of {size:,} bytes run on PyTorch's operations: its kernels take up to {WIDEST_NORM:,}")
        return False
    return True


def delta_rule_runs(x: Tensor, dtype: torch.dtype, key_width: int, gated: bool) -> bool:
    """Tell whether the delta rule runs on kernels for inputs on x's device, multiplied in `dtype`; where not, one warning says why."""
    if not fused(x):
        return False
    problem = delta_rule_problem(dtype, key_width, gated)
    if problem is not None:
        _say_once(f"the delta rule runs on PyTorch's operations: {problem}")
    return problem is None


def window_attention_runs(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether window attention of heads x [..., d], in `dtype`, runs on FlashAttention; where it does not, one warning says why."""
    if not x.is_cuda or wanted() == "torch":
        return False
    problem = window_attention_problem(dtype, x.shape[-1])
    if problem is not None:
        _say_once(f"window attention runs block by block: {problem}")
    return problem is None


def window_attention_problem(dtype: torch.dtype | None, width: int | None) -> str | None:
    """Say why torch's FlashAttention does not serve heads of this dtype and width (None: not known yet) on this device; None if it does."""
    if not _varlen_takes_windows():
        return f"torch {torch.__version__} has no varlen_attn with a window (2.13 has)"
    if torch.version.hip is not None:
        return "FlashAttention within a window is used on NVIDIA's devices alone"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"FlashAttention needs a device of capability 8.0, {torch.cuda.get_device_name()} has less"
    if dtype is not None and dtype not in HALF:
        return f"FlashAttention needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if width is not None and (width % 8 or width > WIDEST_ATTENTION_HEAD):
        return f"FlashAttention needs heads of a multiple of 8 up to {WIDEST_ATTENTION_HEAD}, not {width}"
    return None


@functools.cache
def _varlen_takes_windows() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def delta_rule_problem(dtype: torch.dtype | None, key_width: int, gated: bool) -> str | None:
    """Say why flash-linear-attention's kernels do not serve this delta rule; None if they do. A dtype of None is not known yet."""
    if key_width > WIDEST_KEY:
        return f"query/key heads of {key_width} are wider than the {WIDEST_KEY} its kernels support"
    if dtype == torch.float32 and not interpreted():
        return "float32 would be multiplied in TF32 there; for speed use bfloat16 (autocast or weights)"
    return chosen().gated if gated else None


def by_operation() -> dict[str, tuple[str, str]]:
    """List what computes each operation, "fla" or "torch", and why."""
    kernels, attention = chosen(), "block by block, on what scaled_dot_product_attention chooses for the device"
    if torch.cuda.is_available() and wanted() != "torch":
        problem = window_attention_problem(None, None)
        attention = f"{attention}: {problem}" if problem else f"FlashAttention in bfloat16 or float16, else {attention}"
    ours = {
        "fast weights of LaCT": ("torch", "large matrix products in the dtype of the activations, states in float32"),
        "window attention": ("torch", attention),
        "head and losses": ("torch", "logits of one block of tokens at a time"),
    }
    if kernels.name == "torch":
        return dict.fromkeys(("delta rule", "gated delta rule", *ELEMENTWISE), ("torch", kernels.why)) | ours
    limits = f"bfloat16 or float16, query/key heads of up to {WIDEST_KEY}; others on PyTorch's operations"
    gated = ("torch", kernels.gated) if kernels.gated is not None else ("fla", limits)
    return {"delta rule": ("fla", limits), "gated delta rule": gated} | dict.fromkeys(ELEMENTWISE, ("fla", kernels.why)) | ours


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _problem() -> str | None:
    """Say why flash-linear-attention cannot be used here; None if it can."""
    if not (torch.cuda.is_available() or interpreted()):
        return "no CUDA device"
    if find_spec("fla") is None or find_spec("triton") is None:
        return "flash-linear-attention is not installed: pip install 'refine-nsp[gpu]'"
    import fla

    # We call its inner functions, whose signatures belong to a minor version.
    if not fla.__version__.startswith("0.6."):
        return f"flash-linear-attention {fla.__version__} is installed; 0.6 is what this was written for: pip install 'refine-nsp[gpu]'"
    return None


def _gated_problem() -> str | None:
    """Ask flash-linear-attention for its own refusal of the gated rule, before a backward pass is half done."""
    if interpreted():
        return None
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    if not IS_NVIDIA_HOPPER or not TRITON_ABOVE_3_4_0 or TRITON_ABOVE_3_7_1 or find_spec("tilelang") is not None:
        return None
    return (
        f"Triton {installed('triton')} computes the gated rule's gradient wrongly on Hopper, and flash-linear-attention refuses it; "
        "Triton 3.7.1 or newer, or tilelang, mends it"
    )
