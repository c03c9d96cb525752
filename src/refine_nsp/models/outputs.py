"""This file holds the outputs of forward passes, and the states that a pass keeps on its way through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from refine_nsp.errors import RefineError
from refine_nsp.models.state import FastWeightCache, LayerState, LayerTrace, StatesOfPass


@dataclass
class FastWeightModelOutput(ModelOutput):
    """Holds the output of a trunk.

    Attributes:
        last_hidden_state: [B, T, D], after the final norm.
        snapshots: states at the positions that were asked for, B*P rows.
        states: what states can be taken from afterwards.
        document_starts: [B, T] bool, on the host, true in the columns where packed documents begin; None where none are packed.
    """

    last_hidden_state: Tensor
    past_key_values: FastWeightCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    snapshots: FastWeightCache | None = None
    states: StatesOfPass | None = None
    document_starts: Tensor | None = None


@dataclass
class FastWeightCausalLMOutput(CausalLMOutputWithPast):
    """Holds the output of a causal model, as in transformers, with its trunk's `last_hidden_state`, `snapshots` and `states`."""

    last_hidden_state: Tensor | None = None
    snapshots: FastWeightCache | None = None
    states: StatesOfPass | None = None


Output = TypeVar("Output", bound=ModelOutput)


def as_asked(output: Output, return_dict: bool | None, config: PreTrainedConfig) -> Output | tuple[object, ...]:
    """Return the output, or a tuple of what it holds where `return_dict` (by default the config's) is False, as in transformers."""
    wants_dict = config.return_dict if return_dict is None else return_dict
    return output if wants_dict else output.to_tuple()


def check_rows(past: FastWeightCache, n_rows: int, use_cache: bool) -> None:
    """Raise a RefineError unless `n_rows` rows can continue from `past`: as many if its states are replaced, else a multiple of them."""
    if n_rows % past.batch_size or (use_cache and past.batch_size != n_rows):
        raise RefineError(
            f"past_key_values has {past.batch_size} rows but the input has {n_rows}; use cache.expand(N) to repeat rows, or "
            "use_cache=False to go on from each with a whole number of rows"
        )


class Kept:
    """Keeps the states of a pass, layer by layer: after `final` [B, 1], after `tokens` [B, P], and the traces if `everything`."""

    def __init__(self, final: Tensor | None, tokens: Tensor | None, everything: bool) -> None:
        self.final, self.tokens, self.everything = final, tokens, everything
        self.finals: list[LayerState] = []
        self.snapshots: list[LayerState] = []
        self.traces: list[LayerTrace] = []

    def take(self, trace: LayerTrace | None) -> None:
        """Take what is wanted of a layer's trace; the rest of it is freed before the next layer runs."""
        if trace is None:
            return
        if self.final is not None:
            self.finals.append(trace.at(self.final))
        if self.tokens is not None:
            self.snapshots.append(trace.at(self.tokens))
        if self.everything:
            self.traces.append(trace)

    def snapshots_after(self, offsets: Tensor) -> FastWeightCache | None:
        """Return the snapshots as B*P rows; offsets [B]: tokens before the pass."""
        if self.tokens is None:
            return None
        lengths = (offsets[:, None] + self.tokens + 1).reshape(-1)
        return FastWeightCache(self.snapshots, lengths, int(lengths.max()))
