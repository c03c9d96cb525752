"""Take the states of transformers' own layers, and hand them back, by reference.

The stock cache copies states in place, which breaks gradients and changes snapshots under their owners' hands. Keys and values are held
with the newest token last: rows of different lengths have their holes at the start, so that a sliding window counts tokens, and a prefix'
keys are a slice of the whole pass' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin, get_layer_types_and_kwargs

from refine_nsp.models.state import LayerState, tensors_of

# What a layer can keep so that its state is exact: keys and values of all tokens or of a window, states of one size, both, or nothing.
EXACT_KINDS = ("full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding", "dummy")
ATTENDING_KINDS = ("full_attention", "sliding_attention", "hybrid", "hybrid_sliding")
RECURRENT_KINDS = ("linear_attention", "conv", "hybrid", "hybrid_sliding")


def kinds_of(config: PreTrainedConfig) -> tuple[list[str], list[int | None]]:
    """List what each layer of a model keeps, and the window of its keys and values (None: all of them)."""
    kinds, settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return list(kinds), [s.get("sliding_window") for s in settings]


class Lent(Tensor):
    """Lends a copy of a state to a layer that may write to it; what `copy_` writes is kept aside, as part of its graph."""

    written: Tensor | None

    @classmethod
    def of(cls, state: Tensor) -> Lent:
        """Lend a clone, since a kernel may write where no function sees it."""
        lent = state.clone().as_subclass(cls)
        lent.written = None
        return lent

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func == Tensor.copy_ and isinstance(args[0], Lent):
            args[0].written = cast(Tensor, args[1])
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def returned(state: Tensor) -> Tensor:
    """Return a state as its layer left it."""
    if not isinstance(state, Lent):
        return state
    return state.as_subclass(Tensor) if state.written is None else state.written


class _Replacing:
    """Makes a cache's recurrent layers, which it is mixed into, replace their states instead of copying into them."""

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    conv_kernel_size: dict[int, int]
    has_previous_state: dict[int, bool]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the state's inputs and the new ones behind them; the last `conv_kernel_size` become the state."""
        width = conv_kernel_size if conv_kernel_size is not None else conv_states.shape[-1]
        past = self.conv_states[state_idx]
        inputs = conv_states if past is None else torch.cat([past, conv_states], -1)
        inputs = F.pad(inputs, (max(0, width - inputs.shape[-1]), 0))
        self.set_state("conv", state_idx, inputs[..., inputs.shape[-1] - width :])
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.set_state("recurrent", state_idx, recurrent_states)
        return recurrent_states

    def set_state(self, what: str, state_idx: int, state: Tensor) -> None:
        self.has_previous_state[state_idx] = True
        if what == "conv":
            self.conv_states[state_idx], self.is_conv_states_initialized[state_idx] = state, True
            self.conv_kernel_size[state_idx] = state.shape[-1]
        else:
            self.recurrent_states[state_idx], self.is_recurrent_states_initialized[state_idx] = state, True


L = TypeVar("L")


@cache
def _replacing_class(layer_class: type) -> type:
    return type(layer_class.__name__, (_Replacing, layer_class), {})


def replacing(layer: L) -> L:
    """Make a fresh layer of a cache replace its states, if it is recurrent."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return layer
    same: L = object.__new__(_replacing_class(type(layer)))
    vars(same).update(vars(layer))
    return same


class ReferenceCache(DynamicCache):
    """Serves one pass as transformers' cache, continuing from the states of its layers; they are read, never written."""

    columns: int  # tokens of the longest row so far; keys and values of all tokens are so wide

    def __init__(self, config: PreTrainedConfig, layers: Sequence[LayerState] = (), columns: int = 0) -> None:
        super().__init__(config=config)
        self.columns = columns
        self.layers = [replacing(layer) for layer in self.layers]
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                vars(layer)["record_past"] = True  # windows stay whole until the pass is over; no convolution is updated in place
        for layer, state in zip(self.layers, layers, strict=False):
            self._fill(layer, state)

    def _fill(self, layer: object, state: LayerState) -> None:
        for name, tensor in state.items():
            if isinstance(layer, _Replacing) and name not in ("keys", "values"):
                what, index = name.rsplit("_", 1)
                layer.set_state(what, int(index), tensor)
        if "keys" in state:
            assert isinstance(layer, CacheLayerMixin)
            layer.lazy_initialization(state["keys"], state["values"])
            layer.keys, layer.values = state["keys"], state["values"]
            if hasattr(layer, "cumulative_length"):
                vars(layer)["cumulative_length"] = self.columns

    def states(self) -> list[LayerState]:
        """Return every layer's state: `keys`, `values` [B, Ha, S, Dk], `conv_i` [B, channels, W], `recurrent_i` [B, ...]."""
        return [{name: returned(x) for name, x in tensors_of(layer).items()} for layer in self.layers]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._lend(super().get_conv_state(layer_idx, state_idx), self.layers[layer_idx], "conv", state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._lend(super().get_recurrent_state(layer_idx, state_idx), self.layers[layer_idx], "recurrent", state_idx)

    @staticmethod
    def _lend(state: Tensor | None, layer: object, what: str, state_idx: int) -> Tensor | None:
        if state is None:
            return None
        assert isinstance(layer, _Replacing)
        lent = Lent.of(state)
        layer.set_state(what, state_idx, lent)
        return lent

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._attends else self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, layer_idx) if self._attends else (self.columns + query_length, 0)

    @property
    def _attends(self) -> bool:
        return any(isinstance(layer, CacheLayerMixin) for layer in self.layers)


def prefix(layers: Sequence[LayerState], windows: Sequence[int | None], drop: int) -> list[LayerState]:
    """Cut states back by their `drop` newest tokens (which only keys and values allow), and windows to what the next token reads."""

    def cut(x: Tensor, window: int | None) -> Tensor:
        end = x.shape[2] - drop
        return x[:, :, 0 if window is None else max(0, end - window + 1) : end]

    return [
        {name: cut(x, window) if name in ("keys", "values") else x for name, x in layer.items()}
        for layer, window in zip(layers, windows, strict=True)
    ]


def trimmed(layers: Sequence[LayerState], columns: int) -> list[LayerState]:
    """Cut keys and values to their newest `columns`: the others are a hole in every row."""
    return [
        {name: x[:, :, -columns:] if name in ("keys", "values") and x.shape[2] > columns else x for name, x in layer.items()}
        for layer in layers
    ]
