"""What a training step needs, counted while the code itself runs a small part of it: live bytes at their peak, and matrix products.

Formulas would have to follow every change of the code; this follows by itself. A large model is counted with a few of its layers and few
tokens, twice as many of each, and the straight line through both is followed up to the model's own sizes: between two layers, two tokens
or two sequences nothing but their number differs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from refine_nsp.ops.memory import inside
from refine_nsp.training.shapes import tensors

Figures = dict[str, float]
Corners = Mapping[str, tuple[int, int]]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of attention on a CPU, as of the other kinds: causality is not deducted."""
    B, H, T, D = query.shape
    return 2 * B * H * T * key.shape[-2] * (D + value.shape[-1])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = query.shape
    return 2 * B * H * T * key.shape[-2] * (3 * D + 2 * value.shape[-1])


def _grouped_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Of experts: every row meets one matrix."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


# What PyTorch's own table leaves out.
FLOPS_OF: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}


class Counter(TorchDispatchMode):
    """Follows the storages that operations make, as long as something holds them.

    Attributes:
        bytes: held now, of storages made inside. peaks: at most so far, while each part of the step (`ops/memory.py`) was under way: each
            grows in proportion to sizes, which their maximum does not. flops: of matrix products, convolutions and attention (two
            for a multiplication and its addition).
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0
        self.peaks: Figures = {}
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (ours := FLOPS_OF.get(func._overloadpacket)) is not None:
            self.flops += ours(*args, **kwargs)
        elif (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        given = {id(t.untyped_storage()) for t in tensors((*args, *kwargs.values()))}
        for tensor in tensors((out,)):
            self._hold(tensor.untyped_storage(), given)
        return out

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """Count a storage once, until it goes; those of an operation's inputs were there before it."""
        key, size = id(storage), storage.nbytes()
        if key in given or key in self.known:
            return

        def gone(_: object) -> None:
            self.bytes -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        here = " ".join(inside)
        self.peaks[here] = max(self.peaks.get(here, 0), self.bytes)


@contextmanager
def counted() -> Iterator[Counter]:
    """Count what runs inside, backward passes too: those of a CPU run in the thread that asked for them."""
    with Counter() as counter:
        yield counter


def extrapolate(measure: Callable[..., Figures], at: Mapping[str, int], corners: Corners) -> Figures:
    """Each figure of `measure(**sizes)` at sizes `at`, from its values at all corners: linear in each size that is beyond its upper corner.

    Args:
        at: sizes by name. corners: two smaller values for each; a size that is not beyond the upper one is measured as it is.
    """
    far = [name for name, value in at.items() if value > corners[name][1]]
    near = {name: value for name, value in at.items() if name not in far}
    total: Figures = {}
    for ends in itertools.product((0, 1), repeat=len(far)):
        sizes = {name: corners[name][end] for name, end in zip(far, ends, strict=True)}
        weight = 1.0
        for name, end in zip(far, ends, strict=True):
            low, high = corners[name]
            share = (at[name] - low) / (high - low)
            weight *= share if end else 1 - share
        for name, value in measure(**near, **sizes).items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


def parameter_bytes(model: nn.Module, trainable: bool = False) -> int:
    """Of its weights, or of those that are trained."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trainable)
