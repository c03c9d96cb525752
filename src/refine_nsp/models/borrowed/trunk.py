"""Let a trunk of transformers (a model below its head) answer the calls of this package too.

None of its code is repeated here. How it gives states is its `state_method`: by reference where a layer's states can be handed over exactly
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

from refine_nsp.models.outputs import FastWeightModelOutput
from refine_nsp.models.padding import Alignment, columns_to_tokens
from refine_nsp.models.protocols import StateMixer
from refine_nsp.models.state import FastWeightCache, PrefixStates, TakeStates


class StateMethod(Protocol):
    """Keeps the states of a trunk in its way; see `ByReference`."""

    rereads_prefixes: bool  # see `protocols.Trunk`
    keeps_all_tokens: bool  # see `protocols.Trunk`

    def run(self, x: Tensor, past: FastWeightCache | None) -> Tensor: ...

    def run_and_take(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor) -> tuple[Tensor, FastWeightCache]: ...

    def run_and_keep(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, TakeStates]: ...


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
        return not self.rereads_prefixes

    @property
    def rereads_prefixes(self) -> bool:
        return self.state_method.rereads_prefixes

    @property
    def keeps_all_tokens(self) -> bool:
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
            taken = None if wanted is None else kept(wanted)
        elif wanted is not None:
            hidden, taken = self.state_method.run_and_take(x, before, wanted)
        else:
            hidden = self.state_method.run(x, before)
        after = before if taken is None else past
        if taken is not None and use_cache:
            slots = torch.arange(taken.batch_size).view(B, -1)
            final = taken
            if slots.shape[1] > 1:
                snapshots, final = taken.index(slots[:, :-1].flatten()), taken.index(slots[:, -1])
            after = past if past is not None else FastWeightCache()
            after.advance(final.layers, final.lengths, T)
        else:
            snapshots = taken
        if self.head_factor != 1.0:
            hidden = hidden * self.head_factor
        hidden = hidden if aligned is None else aligned.restore(hidden)
        return FastWeightModelOutput(hidden, past_key_values=after, snapshots=snapshots, states=states)

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
        """Return forward(*tensors), run again whole in the backward pass if checkpointing is on: layers alone would drop the cache."""
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
