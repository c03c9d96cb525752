"""Run a step for its shapes alone: floating-point tensors are allocated and never written, so that nothing is computed.

Memory that is not written to takes no place, so a model of any width can be counted. Integers and booleans are real where they come from
integers alone, since code branches on them and takes shapes from them; those that would come from floating-point numbers are chosen so that
a step stays a usual one (experts and positions evenly spread, nothing infinite).

torch's own `FakeTensorMode` stops at the first length that is read, because every integer is fake too; with real integers around it, it
takes five to ten times as long and cannot hold the tensors by which hybrids lend their states to rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

aten = torch.ops.aten
FILLED = (aten.zeros.default, aten.ones.default, aten.full.default)
CHOOSING = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.multinomial.default)
SEARCHING = (aten.searchsorted.Tensor,)
GOLDEN = 0.6180339887  # its multiples fill the unit interval evenly and never regularly

M = TypeVar("M", bound=nn.Module)
Arguments = tuple[object, ...]
Keywords = dict[str, object]


def tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Find the tensors among an operation's arguments or results, which are tensors, lists of them, and others."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors(x)


def is_unwritten(x: Tensor) -> bool:
    """Tell whether nothing is known of a tensor but its shape."""
    return x.dtype.is_floating_point or x.dtype.is_complex


class ShapesOnly(TorchDispatchMode):
    """Let floating-point operations return memory that is not written to, while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[object, object] = {}

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None) -> object:
        kwargs = kwargs or {}
        given = list(tensors((*args, *kwargs.values())))
        if not given:
            return _made(func, args, kwargs)
        aliases = func is aten._unsafe_view.default or any(r.alias_info is not None for r in func._schema.returns)
        if not any(map(is_unwritten, given)):
            dtype = kwargs.get("dtype")
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                return torch.empty(given[0].shape, dtype=dtype)
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        if aliases:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0
        if (special := SPECIAL.get(func)) is not None:
            return special(*args, **kwargs)
        return self._shaped(func, args, kwargs)

    def _shaped(self, func: OpOverload, args: Arguments, kwargs: Keywords) -> object:
        """Make what an operation would return by its rule for shapes, which is asked once for each kind of arguments."""
        if func is aten.index.Tensor:
            args = (args[0], _places(args[1]), *args[2:])
        if kwargs.get("generator") is not None:
            kwargs = kwargs | {"generator": None}
        key = (func, *map(_described, (*args, *sorted(kwargs.items()))))
        if key not in self.seen:
            bare_args, bare_kwargs = tree_map(_without_memory, (args, kwargs))
            self.seen[key] = func(*bare_args, **bare_kwargs)
        width = next((x.shape[-1] for x in args if isinstance(x, Tensor) and x.ndim), 1)
        return tree_map_only(Tensor, lambda shape: _filled(func, args, shape, width), self.seen[key])


def _made(func: OpOverload, args: Arguments, kwargs: Keywords) -> object:
    """Make the result of an operation that takes no tensor, such as `zeros`."""
    if func in FILLED:
        by_default = torch.tensor(args[1]).dtype if func is aten.full.default else torch.get_default_dtype()
        dtype = kwargs.get("dtype") or by_default
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return aten.empty.memory_format(args[0], dtype=dtype)
    return func(*args, **kwargs)


def _described(x: object) -> object:
    """Return what a rule for shapes may look at."""
    if isinstance(x, Tensor):
        return (x.size(), x.stride(), x.dtype)
    if isinstance(x, tuple | list):
        return tuple(map(_described, x))
    return (type(x), x)


def _without_memory(x: object) -> object:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _places(indices: object) -> list[Tensor | None]:
    """Replace the masks among the indices of a tensor by the places where they hold."""
    assert isinstance(indices, Sequence)
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


def _filled(func: OpOverload, args: Arguments, shape: Tensor, width: int) -> Tensor:
    """Make a tensor of this shape: unwritten, or indices (of `width` places) and conditions as a usual step has them."""
    size, dtype = shape.size(), shape.dtype
    if is_unwritten(shape):
        return torch.empty_strided(size, shape.stride(), dtype=dtype)
    if dtype == torch.bool:
        # x != x asks for what is not a number.
        return torch.full(size, not (func is aten.ne.Tensor and args[0] is args[1]))
    chosen = size[-1] if func in CHOOSING and size and size[-1] > 1 else 1
    if chosen > 1:  # several of each row, as experts are
        rows = torch.arange(size.numel() // chosen)[:, None]
        return ((rows + torch.arange(chosen) * (width // chosen)) % width).to(dtype).view(size)
    last = size[-2] if func in SEARCHING else size[-1] if size else 1  # one of each row, as positions are: somewhere in its part
    row = torch.arange(last, dtype=torch.float64)
    index = ((row + (row + 1) * GOLDEN % 1) * width / max(last, 1)).to(dtype)
    return index.view(-1, *([1] * (func in SEARCHING))).expand(size).contiguous()


def _written(func: OpOverload, args: Arguments, kwargs: Keywords) -> object:
    """Return what an operation in place returns: the tensors that it was to write to."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    returns = len(func._schema.returns)
    return None if returns == 0 else written[0] if returns == 1 else tuple(written[:returns])


def _grouped(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Multiply groups of rows with a matrix each, or groups of columns; torch's rule for these shapes knows bfloat16 only."""
    dtype = out_dtype or a.dtype
    if a.ndim == 2 and b.ndim == 2:
        assert offs is not None
        return torch.empty(len(offs), a.shape[0], b.shape[1], dtype=dtype)
    return torch.empty(*a.shape[:-1], b.shape[-1], dtype=dtype)


SPECIAL: Mapping[object, Callable[..., Tensor]] = {
    aten._grouped_mm.default: _grouped,
    aten.masked_select.default: lambda x, mask: x.new_empty(int(mask.expand(torch.broadcast_shapes(x.shape, mask.shape)).sum())),
    aten.nonzero.default: lambda x: torch.ones(x.shape, dtype=torch.bool).nonzero(),
}


def allocate(model: M) -> M:
    """Give the weights of a model on the meta device memory, unwritten; in place, and once where modules share them."""
    parameters: dict[nn.Parameter, nn.Parameter] = {}
    buffers: dict[Tensor, Tensor] = {}

    def new(x: Tensor) -> Tensor:
        return (torch.empty if is_unwritten(x) else torch.zeros)(x.shape, dtype=x.dtype)

    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[name] = parameters.setdefault(p, nn.Parameter(new(p), p.requires_grad))
        for name, x in module._buffers.items():
            if x is not None and x.is_meta:
                module._buffers[name] = buffers.setdefault(x, new(x))
    return model
