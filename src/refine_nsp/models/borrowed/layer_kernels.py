"""Let functions of transformers' layers decide at each call whether they run on a kernel.

Where flash-linear-attention, mamba-ssm or causal-conv1d is installed, transformers puts its kernels in the place of the layers' own PyTorch
code when a layer's file is imported. But kernels take tensors of a CUDA device alone, and a model that is loaded starts on the CPU.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from refine_nsp.ops import kernels


def decide_at_each_call(trunk: nn.Module) -> list[str]:
    """Bind the kernels in the files of transformers that `trunk`'s layers come from to tensors they can run on; return their names."""
    names = []
    for file in sorted({type(module).__module__ for module in trunk.modules()}):
        for name, function in list(vars(sys.modules[file]).items()):
            kernel = substitute_of(function)
            if kernel is not None:
                function = deciding(function, kernel)
                setattr(sys.modules[file], name, function)
            if hasattr(function, "kernel_name"):
                names.append(function.kernel_name)
    return sorted(set(names))


def substitute_of(function: object) -> Callable[..., object] | None:
    """Find the kernel that transformers calls in the place of a layer's own function, or None."""
    if not inspect.isfunction(function) or not hasattr(function, "__wrapped__"):
        return None
    kernel = inspect.getclosurevars(function).nonlocals.get("implementation")  # of `use_kernel_func_from_hub_with_fallback`
    return None if kernel is vars(function)["__wrapped__"] else kernel


def deciding(function: Callable[..., object], kernel: Callable[..., object]) -> Callable[..., object]:
    """Make a function that calls `function`, which calls `kernel`, where that runs, and elsewhere the layer's own PyTorch code."""
    own, package = vars(function)["__wrapped__"], kernel.__module__.partition(".")[0]

    def runs(x: Tensor) -> bool:
        if package == "fla":  # kernels of the delta rule, of queries [B, T, H, Dk]
            return kernels.delta_rule_runs(x, x.dtype, x.shape[-1], "gated" in kernel.__name__)
        return x.is_cuda and kernels.wanted() != "torch"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> object:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        # Packed sequences are kept apart by kernels alone; the layers' own code would mix them without a word.
        packed = any(kwargs.get(name) is not None for name in ("cu_seqlens", "seq_idx"))
        return (function if packed or runs(x) else own)(*args, **kwargs)

    vars(call)["kernel_name"] = f"{kernel.__name__} ({package})"
    return call
