"""Count what a step needs while it runs: live bytes at their peak, by part of the step, and matrix products.

torch's own `MemTracker` refuses a model that runs twice in a step, as context scores, rollouts and segments make it do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from refine_nsp.estimate.shapes import tensors
from refine_nsp.ops.memory import inside


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> int:
    """Count attention on a CPU as torch counts the other kinds: causality is not deducted."""
    B, H, T, D = query.shape
    return 2 * B * H * T * key.shape[-2] * (D + value.shape[-1])


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> int:
    B, H, T, D = query.shape
    return 2 * B * H * T * key.shape[-2] * (3 * D + 2 * value.shape[-1])


def _grouped_flops(a: Tensor, b: Tensor, *args: object, **kwargs: object) -> int:
    """Count the products of experts: every row meets one matrix."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


# PyTorch's own table, and what it leaves out.
FLOPS_OF: Mapping[object, Callable[..., int]] = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}


class Counter(TorchDispatchMode):
    """Follow the storages that operations make inside, as long as something holds them.

    Backward passes are followed too: on a CPU they run in the thread that asked for them.

    Attributes:
        bytes: held now, in storages made inside. peaks: the most that was held while each part of the step (`ops/memory.py`) was under
            way: each grows in proportion to sizes, which their maximum does not. flops: of matrix products, convolutions and
            attention (two for a multiplication and its addition).
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0
        self.peaks: dict[str, float] = {}
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (flops := FLOPS_OF.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        given = {id(t.untyped_storage()) for t in tensors((*args, *kwargs.values()))}
        for tensor in tensors((out,)):
            self._hold(tensor.untyped_storage(), given)
        return out

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """Count a storage once, until it goes; storages of an operation's inputs were there before it."""
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
