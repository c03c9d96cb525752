"""What a step would do on an accelerator, watched on a CPU: where the host waits for the device (readings, and copies to it that block),
and where their tensors are mixed.

A tensor is on the host when code made it there (a factory without `device=`, `.cpu()`, or a function of host tensors alone) or the test
said so; every other tensor stands for one on the device.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__len__,
    Tensor.nonzero, torch.nonzero, torch.masked_select, Tensor.masked_select, Tensor.unique, torch.unique, torch.equal, Tensor.equal,
    torch.allclose,
} - {Tensor.__len__}  # fmt: skip
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}  # by host tensors too: they are sent along
READING_OPS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
SENT = {torch.tensor, torch.as_tensor}  # with a device: made on the host, and copied
FACTORIES = {
    torch.arange, torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.eye,
}  # fmt: skip


def on_host(x: Tensor) -> bool:
    return getattr(x, "on_host", False)


def host(x: Tensor) -> Tensor:
    x.on_host = True
    return x


class DeviceRules(TorchFunctionMode):
    """Attributes: waits: places that wait for the device; mixed: places that mix its tensors with the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is Tensor.cpu:
            if not on_host(tensors[0]):
                self.waits.append(place())
            return host(tensors[0].detach().clone())
        out = func(*args, **kwargs)
        if func in READS and tensors and not on_host(tensors[0]):
            self.waits.append(place())
        if func in INDEXING and any(
            x.dtype == torch.bool and not on_host(x) for x in tree_leaves(args[1]) if isinstance(x, Tensor)
        ):
            self.waits.append(place())  # how many are true decides a shape, or an index is made of them
        target = args[1] if len(args) > 1 else kwargs.get("device", kwargs.get("other"))
        if func is Tensor.to and (isinstance(target, torch.device) or (isinstance(target, Tensor) and not on_host(target))):
            if on_host(tensors[0]) and not kwargs.get("non_blocking"):
                self.waits.append(place())  # a copy that blocks is made when the device has done all that was asked before
            return out.detach().clone() if on_host(tensors[0]) else out
        if func in SENT and "device" in kwargs and not isinstance(args[0], Tensor):
            self.waits.append(place())
        sizes = {on_host(x) for x in tensors if x.ndim > 0}
        if len(sizes) == 2 and func not in INDEXING:
            self.mixed.append(f"{place()} {func.__name__}")
        made = func in FACTORIES and "device" not in kwargs
        if made or (tensors and all(on_host(x) for x in tensors)):
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    host(x)
        return out


class Readings(TorchDispatchMode):
    """Attributes: ops: those of a device that its host would have to wait for, backward passes included, wherever tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if name in READING_OPS or (name.startswith("index") and masks):
            self.ops.append(f"{name} {place()}")
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The innermost line of the package."""
    frames = [f for f in traceback.extract_stack() if "refine_nsp" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "outside the package"
