"""Run a step for its shapes alone: floating-point tensors are allocated and never written, so that nothing is computed.

A model of any width can be counted so, in the seconds that its operations need to be named: memory that is not written to takes no place.
Integers and booleans are real where they come from integers alone, since code branches on them and takes shapes from them; those that
would come from floating-point numbers are chosen so that a step stays a usual one (experts and positions evenly spread, nothing infinite).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FILLED = (aten.zeros.default, aten.ones.default, aten.full.default)
Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]


def tensors(values: Any) -> Iterator[Tensor]:
    """Of an operation's arguments or results, which are tensors, lists of them, and others."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors(x)


def is_unwritten(x: Any) -> bool:
    """Whether nothing is known of a value but its shape."""
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


class ShapesOnly(TorchDispatchMode):
    """Inside, floating-point operations give memory that is not written to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, list[Spec | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((*args, *kwargs.values())))
        if not given:
            return self._made(func, args, kwargs)
        aliases = func is aten._unsafe_view.default or any(r.alias_info is not None for r in func._schema.returns)
        if not any(map(is_unwritten, given)):
            dtype = kwargs.get("dtype")
            if dtype is not None and dtype.is_floating_point:
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

    @staticmethod
    def _made(func: Any, args: Any, kwargs: Any) -> Any:
        """By an operation without tensors."""
        if func in FILLED:
            given = kwargs.get("dtype") or (
                torch.tensor(args[1]).dtype if func is aten.full.default else torch.get_default_dtype()
            )
            if given.is_floating_point:
                return torch.empty(args[0], dtype=given)
        return func(*args, **kwargs)

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What it would give, by its rule for shapes; each case is asked for once."""
        if func is aten.index.Tensor:
            args = (args[0], _positions(args[1]), *args[2:])
        if kwargs.get("generator") is not None:
            kwargs = kwargs | {"generator": None}
        key = (func, *(_described(x) for x in (*args, *sorted(kwargs.items()))))
        if key not in self.seen:
            out = func(*_without_memory(args), **{name: _without_memory(x) for name, x in kwargs.items()})
            self.seen[key] = [(x.size(), x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in _several(out)]
            if isinstance(out, list):
                self.seen[key].append(None)
        specs = self.seen[key]
        width = next((x.shape[-1] for x in args if isinstance(x, Tensor) and x.ndim), 1)
        made = [_filled(func, args, spec, width) if isinstance(spec, tuple) else spec for spec in specs]
        if specs[-1:] == [None] and len(func._schema.returns) == 1:
            return made[:-1]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)


def _several(out: Any) -> list[Any]:
    return list(out) if isinstance(out, tuple | list) else [out]


def _described(x: Any) -> Any:
    """What a rule for shapes may look at."""
    if isinstance(x, Tensor):
        return (x.size(), x.stride(), x.dtype)
    if isinstance(x, tuple | list):
        return tuple(_described(y) for y in x)
    return (type(x), x)


def _without_memory(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, list | tuple):
        return type(x)(map(_without_memory, x))
    return torch.device("meta") if isinstance(x, torch.device) else x


def _positions(indices: Any) -> list[Tensor | None]:
    """Masks as the places where they hold."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


def _filled(func: Any, args: Any, spec: Spec, width: int) -> Tensor:
    """A tensor of these sizes: unwritten, or indices and conditions of a usual step."""
    size, stride, dtype = spec
    if dtype.is_floating_point or dtype.is_complex:
        return torch.empty_strided(size, stride, dtype=dtype)
    if dtype == torch.bool:
        # x != x asks for what is not a number.
        return torch.full(size, not (func is aten.ne.Tensor and args[0] is args[1]))
    chosen = size[-1] if func in CHOOSING and size and size[-1] > 1 else 1
    if chosen > 1:  # of each row, as experts
        rows = torch.arange(size.numel() // chosen)[:, None]
        return ((rows + torch.arange(chosen) * (width // chosen)) % width).to(dtype).view(size)
    last = size[-2] if func in SEARCHING else size[-1] if size else 1  # one of each row, as positions: somewhere in its part
    row = torch.arange(last, dtype=torch.float64)
    index = ((row + (row + 1) * GOLDEN % 1) * width / max(last, 1)).to(dtype)
    return index.view(-1, *([1] * (func in SEARCHING))).expand(size).contiguous()


GOLDEN = 0.6180339887  # its multiples fill the unit interval evenly and never regularly
CHOOSING = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.multinomial.default)
SEARCHING = (aten.searchsorted.Tensor,)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation in place returns: the tensors it was to write to."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    returns = len(func._schema.returns)
    return None if returns == 0 else written[0] if returns == 1 else tuple(written[:returns])


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """Products of groups of rows with a matrix each, or of columns, whose rule for shapes knows bfloat16 only."""
    dtype = out_dtype or a.dtype
    if a.ndim == 2 and b.ndim == 2:
        assert offs is not None
        return torch.empty(len(offs), a.shape[0], b.shape[1], dtype=dtype)
    return torch.empty(*a.shape[:-1], b.shape[-1], dtype=dtype)


def _selected(x: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return torch.empty(int(mask.expand(shape).sum()), dtype=x.dtype)


SPECIAL: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped,
    aten.masked_select.default: _selected,
    aten.nonzero.default: lambda x: torch.ones(x.shape, dtype=torch.bool).nonzero(),
}


def allocate(model: nn.Module) -> nn.Module:
    """Give the weights of a model on the meta device memory, unwritten; in place, shared ones once."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(x: Any) -> Any:
        if id(x) not in made:
            new = torch.empty(x.shape, dtype=x.dtype) if is_unwritten(x) else torch.zeros(x.shape, dtype=x.dtype)
            made[id(x)] = (nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new, x)
        return made[id(x)][0]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and x.is_meta:
                    held[name] = of(x)
    return model
