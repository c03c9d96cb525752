"""Copy a model in float64, whose arithmetic is taken for exact, and measure how far two sets of tensors are apart."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

SMALL = 1e-3  # a tensor counts as at least so large, as a share of the largest of its set: what is all rounding has no error of its own


class Float64Stays(TorchFunctionMode):
    """Let casts of float64 to float32 do nothing: those of norms and decays would hide an error of a state behind rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args[:1])
        if wide and func == Tensor.float:
            return args[0]
        if wide:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Apply `Float64Stays`, also where the backward pass runs a forward pass again, which modes do not reach."""
    settings = cast(Any, inspect.unwrap(checkpoint)).__kwdefaults__
    before = settings["context_fn"]
    settings["context_fn"] = lambda: (nullcontext(), Float64Stays())
    try:
        with Float64Stays():
            yield
    finally:
        settings["context_fn"] = before


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a module with its numbers in another precision; there is never a second copy in the module's own."""
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(dtype) if p.is_floating_point() else p.detach().clone(), p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = b.detach().to(dtype) if b.is_floating_point() else b.detach().clone()
    copied = copy.deepcopy(module, memo)
    config = vars(copied).get("config")
    if config is not None:
        vars(config)["_experts_implementation_internal"] = "eager"  # the others have no float64
    return copied


def float64_problem(module: nn.Module) -> str | None:
    """Say why a float64 copy, with what a backward pass needs, does not fit into free memory; None if it does."""
    numbers = [*module.parameters(), *module.buffers()]
    need = 3 * 8 * sum(x.numel() for x in numbers)
    device = next((x.device for x in numbers), torch.device("cpu"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return None if need < free else f"a float64 copy needs {need / 2**30:.1f} GiB of {free / 2**30:.1f} free"


def largest(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Measure how far `found` is from `expected`: the largest difference of a number, over the size (RMS) of its tensor."""
    return _distance(expected, found, lambda x: x.square().mean().sqrt(), torch.max)


def average(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Measure how far `found` is from `expected`: the worst tensor's mean difference, over the mean size of its numbers."""
    return _distance(expected, found, lambda x: x.abs().mean(), torch.mean)


def _distance(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    size: Callable[[Tensor], Tensor],
    over: Callable[[Tensor], Tensor],
) -> float:
    wide = [(x.detach().double(), found[name].detach().double()) for name, x in expected.items() if x.numel()]
    sizes = [float(size(x)) for x, _ in wide]
    least = max(SMALL * max(sizes, default=0.0), 1e-30)
    worst = [float(over((x - y).abs())) / max(n, least) for (x, y), n in zip(wide, sizes, strict=True)]
    return float("inf") if any(e != e for e in worst) else max(worst, default=0.0)
