"""This file holds the outputs of forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from refine_nsp.models.state import FastWeightCache, PrefixStates


@dataclass
class FastWeightModelOutput(ModelOutput):
    """Holds the output of a trunk."""

    last_hidden_state: Tensor  # [B, T, D], after the final norm
    past_key_values: FastWeightCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    snapshots: FastWeightCache | None = None  # states at the positions that were asked for, B*P rows
    states: PrefixStates | None = None  # what states can be taken from afterwards
    document_starts: Tensor | None = (
        None  # [B, T] bool, on the host: the columns where packed documents begin; None: none are packed
    )


@dataclass
class FastWeightCausalLMOutput(CausalLMOutputWithPast):
    """Holds the output of a causal model, as in transformers, with its trunk's `last_hidden_state`, `snapshots` and `states`."""

    last_hidden_state: Tensor | None = None
    snapshots: FastWeightCache | None = None
    states: PrefixStates | None = None


Output = TypeVar("Output", bound=ModelOutput)


def as_asked(output: Output, return_dict: bool | None, config: PreTrainedConfig) -> Output | tuple[object, ...]:
    """Return the output, or a tuple of what it holds where `return_dict` (by default the config's) is False, as in transformers."""
    wants_dict = config.return_dict if return_dict is None else return_dict
    return output if wants_dict else output.to_tuple()
