"""Let a trunk of transformers (a model below its head) answer the calls of this package too.

None of its code is repeated here. How it gives states is a `StateMethod`: by reference where a layer's states can be handed over exactly
(`by_reference.py`), else by reading the tokens of a prefix again (`by_tokens.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import FastWeightModel
from refine_nsp.models.branches import Branches
from refine_nsp.models.outputs import FastWeightModelOutput
from refine_nsp.models.padding import Alignment, columns_to_tokens
from refine_nsp.models.protocols import StateMixer
from refine_nsp.models.state import FastWeightCache, PrefixStates, StatesOfPass


class StateMethod(Protocol):
    """Keeps the states of a trunk in its way. x: ids [B, T] or embeddings [B, T, D]; past: states of B rows, or None."""

    rereads_prefixes: bool  # see `protocols.Trunk`
    keeps_all_tokens: bool  # see `protocols.Trunk`

    def run(self, x: Tensor, past: FastWeightCache | None) -> Tensor:
        """Return hidden states [B, T, D]."""
        ...

    def run_and_take(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor) -> tuple[Tensor, FastWeightCache]:
        """Return hidden states, and the states after tokens `wanted` [B, P] long on the host (-1: before the first) as B*P rows."""
        ...

    def run_and_keep(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, StatesOfPass]:
        """Return hidden states, and what the states at any token can be taken from afterwards."""
        ...


class StatefulTrunk(PreTrainedModel):
    """Answers the calls of `FastWeightModel.forward` for a trunk of transformers, whose class it is mixed into."""

    _refine_plain: ClassVar[type[PreTrainedModel]]  # the trunk's own class
    layers: nn.ModuleList
    state_method: StateMethod
    head_factor: float  # hidden states are scaled by it, so that `lm_head` alone makes logits of them
    answers_plainly: bool  # whether a call is left to transformers' own code
    mixers: list[StateMixer]
    kernel_names: list[str]  # of other packages, where they can run

    @property
    def cuts_at_positions(self) -> bool:
        """See `protocols.Trunk`."""
        return not self.rereads_prefixes

    @property
    def rereads_prefixes(self) -> bool:
        """See `protocols.Trunk`."""
        return self.state_method.rereads_prefixes

    @property
    def keeps_all_tokens(self) -> bool:
        """See `protocols.Trunk`."""
        return self.state_method.keeps_all_tokens

    @property
    def label(self) -> str:
        """Name the model in messages."""
        return f"{self.config.model_type} ({type(self).__name__})"

    @property
    def kernels(self) -> str:
        """Say what computes the model, and how its states are kept."""
        on_device = f", on a CUDA device {', '.join(self.kernel_names)}" if self.kernel_names else ""
        return f"transformers' own{on_device}; states {'read again from tokens' if self.rereads_prefixes else 'by reference'}"

    def read(self, **arguments: Any) -> FastWeightModelOutput | tuple[object, ...]:
        """Answer a call as `FastWeightModel.forward` does, with hidden states scaled by `head_factor`."""
        if arguments.get("output_hidden_states"):
            raise RefineError(
                f"{self.label} gives its layers' hidden states only when asked without states; leave out lengths and such"
            )
        return FastWeightModel.forward(self, **arguments)

    def run_rows(
        self, x: Tensor, aligned: Alignment | None, past: FastWeightCache | None, tokens: Tensor | None, use_cache: bool,
        output_states: bool, output_hidden_states: bool,
    ) -> FastWeightModelOutput:  # fmt: skip
        """See `protocols.Trunk.run_rows`."""
        B, T = x.shape[:2]
        before = None
        if past is not None and past.is_initialized:
            before = past if past.batch_size == B else past.expand(B // past.batch_size)
        if aligned is not None and aligned.order is not None:
            x = aligned.align(x) if x.ndim == 3 else aligned.align(x[..., None])[..., 0]
        ends = (torch.full((B,), T) if aligned is None else aligned.lengths)[:, None] - 1

        asked = [w for w in (tokens, ends if use_cache else None) if w is not None]
        wanted = torch.cat(asked, 1) if asked else None
        taken = states = snapshots = None
        if output_states:
            hidden, kept = self.state_method.run_and_keep(x, before)
            states = PrefixStates(kept, columns_to_tokens(aligned, T))
            taken = None if wanted is None else kept.at(wanted)
        elif wanted is not None:
            hidden, taken = self.state_method.run_and_take(x, before, wanted)
        else:
            hidden = self.state_method.run(x, before)
        after = before
        if taken is not None:
            snapshots, after = _parted(taken, B, tokens, past, use_cache, T)
        if self.head_factor != 1.0:
            hidden = hidden * self.head_factor
        hidden = hidden if aligned is None else aligned.restore(hidden)
        return FastWeightModelOutput(hidden, past_key_values=after, snapshots=snapshots, states=states)

    def branch(self, cache: FastWeightCache, n: int) -> Branches:
        """Start n neighbouring rows from each state of `cache`, to continue token by token; the cache is only read."""
        return Branches(self, cache, n)

    # --- the model as it is -------------------------------------------------------------------------------------------
    def plain(self, x: Tensor, **arguments: Any) -> Tensor:
        """Return the hidden states [B, T, D] of the model's own forward pass."""
        inputs = {"input_ids" if x.ndim == 2 else "inputs_embeds": x}
        hidden = self._refine_plain.forward(self, **inputs, **arguments).last_hidden_state
        dtype = self.get_input_embeddings().weight.dtype
        # Mamba-2 leaves a half-precision model in float32, and casts before its head.
        return hidden.to(dtype) if hidden.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16) else hidden

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Leave calls to transformers' own code inside: that is what the plain causal model asks for."""
        before, self.answers_plainly = self.answers_plainly, True
        try:
            yield
        finally:
            self.answers_plainly = before

    def checkpointed(self, forward: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return forward(*tensors), a piece of a pass, which is run again as a whole in the backward pass if checkpointing is on.

        transformers' layers, checkpointed one by one, would drop the cache.
        """
        layers = [vars(m) for m in self.modules() if vars(m).get("gradient_checkpointing")] if self.training else []
        if not layers:
            return forward(*tensors)

        def unwrapped(*given: Tensor) -> tuple[Tensor, ...]:
            for layer in layers:
                layer["gradient_checkpointing"] = False
            try:
                return forward(*given)
            finally:
                for layer in layers:
                    layer["gradient_checkpointing"] = True

        return checkpoint(unwrapped, *tensors, use_reentrant=False) if torch.is_grad_enabled() else unwrapped(*tensors)


class StatefulCausalModel(PreTrainedModel, GenerationMixin):
    """Describes a causal model of transformers with states; it stands in annotations only, since each model keeps its own bases."""

    _refine_plain: ClassVar[type[PreTrainedModel]]  # the model's own class
    model: StatefulTrunk
    lm_head: nn.Module
    generation_config: GenerationConfig


def _parted(
    taken: FastWeightCache, n_rows: int, tokens: Tensor | None, given: FastWeightCache | None, use_cache: bool, n_columns: int
) -> tuple[FastWeightCache | None, FastWeightCache | None]:
    """Part the states that were taken, row by row, into snapshots and those after the pass, which go into the cache that was `given`."""
    P = 0 if tokens is None else tokens.shape[1]
    if not use_cache:
        return taken, given
    final = taken
    snapshots = None
    if P:
        slots = torch.arange(taken.batch_size).view(n_rows, P + 1)
        snapshots, final = taken.index(slots[:, :P].flatten()), taken.index(slots[:, P])
    cache = given if given is not None else FastWeightCache()
    cache.advance(final.layers, final.lengths, n_columns)
    return snapshots, cache
