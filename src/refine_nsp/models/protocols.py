"""These protocols state what the method asks of a model; our three families answer it, and transformers' models once they have states.

Annotations elsewhere name these protocols, since a borrowed hybrid is no subclass of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from refine_nsp.models.outputs import FastWeightModelOutput
from refine_nsp.models.padding import Alignment
from refine_nsp.models.state import FastWeightCache


class StateMixer(Protocol):
    """Writes and reads the state of a layer."""

    fast_weight_names: tuple[str, ...]  # the submodules and parameters that write to and read from the fast weights
    memory_names: tuple[str, ...]  # those that are the memory's alone, without which the layer would still mix tokens
    shares_states: bool  # whether rows that branch from one state read it together instead of a copy each (see `Branches`)


class Trunk(Protocol):
    """Runs tokens from states, and gives states: a model below its head."""

    training: bool

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def label(self) -> str:
        """Name the model in messages."""
        ...

    @property
    def kernels(self) -> str:
        """Say what computes the model, and why, in one line."""
        ...

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def mixers(self) -> Sequence[StateMixer]: ...

    @property
    def cuts_at_positions(self) -> bool:
        """Tell whether a pass is cut where states are wanted, so that the positions decide how many passes there are."""
        ...

    @property
    def rereads_prefixes(self) -> bool:
        """Tell whether the state of a prefix is its tokens, which are read again with whatever follows."""
        ...

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether states grow with every token read, as those of attention over everything do."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> FastWeightModelOutput:
        """Run T tokens from `past_key_values` (or from nothing); see `FastWeightModel.forward`."""
        ...

    def run_rows(
        self, x: Tensor, aligned: Alignment | None, past: FastWeightCache | None, tokens: Tensor | None, use_cache: bool,
        output_states: bool, output_hidden_states: bool,
    ) -> FastWeightModelOutput:  # fmt: skip
        """Run rows of one document each, x ids [B, T] or embeddings [B, T, D]; tokens [B, P]: where snapshots are taken, on the host."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class CausalModel(Protocol):
    """Makes logits [..., V] of its trunk's hidden states [..., D]: they are `lm_head` times these and no more."""

    training: bool

    @property
    def model(self) -> Trunk: ...

    @property
    def lm_head(self) -> nn.Module: ...

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def generation_config(self) -> GenerationConfig: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return logits [B, T, V] and what `Trunk` returns, or with `step` whatever that callable makes of the model."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self, mode: bool = True) -> CausalModel: ...

    def eval(self) -> CausalModel: ...

    def requires_grad_(self, requires_grad: bool = True) -> CausalModel: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts as `transformers.GenerationMixin.generate` does."""
        ...
