"""All fast-weight language models share these blocks, this layer loop and this language-model head; a family is a mixer.

Padding is dealt with once, in `layout.py`: real tokens are moved to the left, rows carry their lengths, and outputs are moved back, so that
no mixer sees a pad between real tokens. Lengths, offsets and positions are tensors on the host below that edge: they decide shapes, and
asking a device for them would make the host wait in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from refine_nsp.errors import RefineError
from refine_nsp.models.document_marks import MARKS, marks_among, takes_marks
from refine_nsp.models.layout import one_input, run_in_rows
from refine_nsp.models.outputs import FastWeightCausalLMOutput, FastWeightModelOutput, as_asked
from refine_nsp.models.padding import Alignment, columns_to_tokens
from refine_nsp.models.protocols import CausalModel, StateMixer, Trunk
from refine_nsp.models.state import FastWeightCache, LayerState, LayerTrace, PrefixStates, states_after
from refine_nsp.ops.kernels import chosen
from refine_nsp.ops.norm import rms_norm, rms_norm_gated
from refine_nsp.ops.swiglu import swiglu

SUPPORTED_ACTIVATIONS = ("swish", "silu")


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight, times silu(gate) where there is one, over the last axis, with statistics in float32 or better."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps) if gate is None else rms_norm_gated(x, gate, self.weight, self.eps)


class SwiGLUMLP(nn.Module):
    """Computes down(silu(gate(x)) * up(x)), by default 2/3 * hidden_ratio * D wide, rounded up to a multiple of 256."""

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        if width is None:
            width = 256 * math.ceil(int(D * (config.hidden_ratio if config.hidden_ratio is not None else 4) * 2 / 3) / 256)
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Mixer(StateMixer, Protocol):
    """Mixes tokens in a block: an `nn.Module` of a config, which makes a family."""

    @property
    def without_kernels(self) -> str | None:
        """Say which part runs on PyTorch's operations although kernels are there; None: none."""
        ...

    def __call__(
        self, x: Tensor, lengths: Tensor | None, state: LayerState | None, offsets: Tensor, branches: int | None
    ) -> tuple[Tensor, LayerTrace | None]:
        """Mix tokens x [B, T, D] into y [B, T, D], and return what the state at any of them can be rebuilt from.

        Args:
            lengths: [B] long on the host, real tokens of each row, on the left; None: all T.
            state: what the rows continue from, or None. offsets: its rows' tokens so far, long, on the host.
            branches: so many neighbouring rows of x continue from each row of the state (all tokens are real, and the trace is not
                needed); None: state and x have the same rows.
        """
        ...


class FamilyConfig(PreTrainedConfig):
    """Declares the fields that the families' configurations share. `fuse_*` do not change what is computed."""

    keys_to_ignore_at_inference = ["past_key_values", "last_hidden_state"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int | None = 2048
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.refuse_unsupported(hidden_act=SUPPORTED_ACTIVATIONS)

    def refuse_unsupported(self, **supported: tuple[object, ...]) -> None:
        """Raise a RefineError naming the first of these fields whose value is not among the supported ones."""
        for name, values in supported.items():
            if (value := getattr(self, name)) not in values:
                raise RefineError(
                    f"{type(self).__name__}: {name}={value!r} is not supported; expected {' or '.join(map(repr, values))}"
                )


class FastWeightBlock(GradientCheckpointingLayer):
    """Computes x + mixer(norm(x)), then x + mlp(norm(x)), or with `mixes_only` mixer(norm(x)); it is called as a `Mixer` is."""

    def __init__(self, config: FamilyConfig, mixer: Mixer) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn: Mixer = mixer
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLUMLP(config)

    def forward(
        self, x: Tensor, lengths: Tensor | None, state: LayerState | None, offsets: Tensor, branches: int | None = None,
        mixes_only: bool = False,
    ) -> tuple[Tensor, LayerTrace | None]:  # fmt: skip
        y, trace = self.attn(self.attn_norm(x), lengths, state, offsets, branches)
        if mixes_only:
            return y, trace
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), trace


class FastWeightPreTrainedModel(PreTrainedModel):
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state cannot be rolled back, so generate() refuses assisted decoding by name
    _no_split_modules = ["FastWeightBlock"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif hasattr(module, "init_weights_"):
            cast(Any, module).init_weights_()


class FastWeightModel(FastWeightPreTrainedModel):
    """Runs embedding, blocks and final norm. A family names its `mixer_class`, whose instances are `Mixer`s."""

    mixer_class: ClassVar[Callable[..., Mixer]]
    cuts_at_positions = False
    rereads_prefixes = False
    keeps_all_tokens = False

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__(config)
        chosen()  # a choice of kernels that cannot be had should be refused before anything is loaded
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([FastWeightBlock(config, self.mixer_class(config)) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def label(self) -> str:
        """Name the model in messages."""
        return f"{self.config.model_type} ({type(self).__name__})"

    @property
    def mixers(self) -> list[Mixer]:
        """List the mixer of each layer; where PEFT adapts a mixer's own parameters, the one inside its wrapper."""
        mixers: list[Any] = [cast(FastWeightBlock, layer).attn for layer in self.layers]
        return [mixer.get_base_layer() if hasattr(mixer, "get_base_layer") else mixer for mixer in mixers]

    @property
    def kernels(self) -> str:
        """Say what computes the model, and why, in one line."""
        exceptions = sorted({mixer.without_kernels for mixer in self.mixers if mixer.without_kernels is not None})
        return "; ".join([str(chosen()), *(exceptions if chosen().name == "fla" else [])])

    @takes_marks
    def forward(
        self: Trunk,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: FastWeightCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        lengths: Tensor | None = None,
        snapshot_positions: Tensor | None = None,
        output_states: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FastWeightModelOutput | tuple[object, ...]:
        """Run T tokens from the states `past_key_values`, or from nothing.

        Args:
            input_ids: [B, T] long; or `inputs_embeds` [B, T, D].
            attention_mask: [B, T] or [B, past + T], 1 for real tokens, any pattern; or `lengths` [B] long for right padding, best
                on the host, where they are needed.
            past_key_values: states that the rows continue from. With `use_cache` they are replaced in the given object (no tensor is
                written in place); without, they are only read, and may have S rows with B = S*n: n neighbours continue from each.
            use_cache: default `config.use_cache` in eval mode, False in training mode and for packed documents.
            snapshot_positions: [B, P] long, input column of the last token of each prefix (-1: before the first).
            output_states: also return `states`, from which snapshots can be taken after the outputs are known.
            position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, cu_seqlens, seq_idx: where documents that are
                packed in one row begin, each from a fresh state (`models/document_marks.py`).
            cache_position: may count the columns, which these models know.

        Raises:
            RefineError: both or neither of input_ids and inputs_embeds, a foreign cache, positions out of range, bad masks, marks of
                documents that contradict each other, or a keyword that nobody reads.
        """
        marks = marks_among(kwargs, FastWeightModel.forward)
        if past_key_values is not None and not isinstance(past_key_values, FastWeightCache):
            raise RefineError(f"past_key_values must be a FastWeightCache, got {type(past_key_values).__name__}")
        out = run_in_rows(
            self, one_input(input_ids, inputs_embeds), marks, attention_mask, lengths, past_key_values, use_cache, snapshot_positions,
            output_states, output_hidden_states,
        )  # fmt: skip
        return as_asked(out, return_dict, self.config)

    def run_rows(
        self, x: Tensor, aligned: Alignment | None, past: FastWeightCache | None, tokens: Tensor | None, use_cache: bool,
        output_states: bool, output_hidden_states: bool,
    ) -> FastWeightModelOutput:  # fmt: skip
        """See `protocols.Trunk.run_rows`."""
        B, T = x.shape[:2]
        row_lengths = None if aligned is None else aligned.lengths
        branches = None
        if past is not None and past.is_initialized:
            n = B // past.batch_size
            if use_cache or output_states or output_hidden_states or tokens is not None or aligned is not None:
                past = past if n == 1 else past.expand(n)  # where states are kept, every row gets one of its own
            else:
                branches = n
        offsets = past.lengths if past is not None and past.lengths is not None else torch.zeros(B, dtype=torch.long)
        final = (row_lengths if row_lengths is not None else torch.full((B,), T))[:, None] - 1

        finals: list[LayerState] = []
        snapshots: list[LayerState] = []
        traces: list[LayerTrace] = []
        hidden: list[Tensor] = []
        x = self.embeddings(x) if x.ndim == 2 else x
        x = x if aligned is None else aligned.align(x)
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden.append(x if aligned is None else aligned.restore(x))
            state = past.layers[i] if past is not None and past.is_initialized else None
            x, trace = layer(x, row_lengths, state, offsets, branches)
            # What is not wanted of a layer's trace is freed before the next layer has run.
            if use_cache:
                finals.append(trace.at(final))
            if tokens is not None:
                snapshots.append(trace.at(tokens))
            if output_states:
                traces.append(trace)
        x = self.norm(x)
        x = x if aligned is None else aligned.restore(x)
        if output_hidden_states:
            hidden.append(x)
        if use_cache:
            past = past if past is not None else FastWeightCache()
            past.advance(finals, offsets + final[:, 0] + 1, T)

        def take(positions: Tensor) -> FastWeightCache:
            return states_after([trace.at(positions) for trace in traces], offsets, positions)

        return FastWeightModelOutput(
            last_hidden_state=x,
            past_key_values=past,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            snapshots=None if tokens is None else states_after(snapshots, offsets, tokens),
            states=PrefixStates(take, columns_to_tokens(aligned, T)) if output_states else None,
        )


class FastWeightForCausalLM(FastWeightPreTrainedModel, GenerationMixin):
    """Puts a language-model head on a trunk. `generate()` works as for any causal model, also batched with left padding."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    trunk_class: ClassVar[type[FastWeightModel]]

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_marks
    def forward(
        self: CausalModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: FastWeightCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        lengths: Tensor | None = None,
        snapshot_positions: Tensor | None = None,
        output_states: bool = False,
        step: Callable[[CausalModel], object] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> object:
        """Return logits [B, T, V] (or of the last `logits_to_keep` columns), and the mean cross-entropy when `labels` are given.

        Args:
            labels: [B, T], shifted inside (-100: ignored); what the first column of a row or of a packed document holds is no target.
            num_items_in_batch: what the sum of cross-entropies is divided by instead of its own count (transformers' Trainer gives
                the targets of a whole gradient accumulation).
            step: a callable that gets this module; its result is returned. A whole training step is then one forward call, which
                is what DDP, FSDP and PEFT wrappers need to see.

        The other arguments are those of `FastWeightModel.forward`.
        """
        if step is not None:
            return step(self)
        marks = marks_among(kwargs, FastWeightForCausalLM.forward)
        out = self.model(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=use_cache,
            output_hidden_states=output_hidden_states, lengths=lengths, snapshot_positions=snapshot_positions,
            output_states=output_states, return_dict=True, **marks,
        )  # fmt: skip
        return as_asked(_with_logits(self.lm_head, out, labels, logits_to_keep, num_items_in_batch), return_dict, self.config)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, generation_mode: object, *args: Any, **kwargs: Any
    ) -> bool:
        if generation_config.cache_implementation is not None:
            kind = generation_config.cache_implementation
            raise RefineError(f"cache_implementation={kind!r} does not apply: fast-weight models keep a state; leave it unset")
        packed = [name for name in MARKS if name != "position_ids" and model_kwargs.get(name) is not None]
        if packed:
            raise RefineError(
                f"generate() continues a row's last document and cannot take {packed[0]}, which covers the prompt alone; pass "
                "position_ids that begin again, or the last document by itself"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FastWeightCache()
        return False


def _with_logits(
    head: nn.Module, out: FastWeightModelOutput, labels: Tensor | None, logits_to_keep: int | Tensor, divisor: int | Tensor | None
) -> FastWeightCausalLMOutput:
    """Make a causal model's output of its trunk's."""
    h = out.last_hidden_state
    assert h is not None
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = head(h if labels is not None else h[:, kept])
    if labels is not None and out.document_starts is not None:
        labels = labels.masked_fill(out.document_starts.to(labels.device), -100)
    return FastWeightCausalLMOutput(
        loss=None if labels is None else _next_token_loss(logits, labels, divisor),
        logits=logits if labels is None else logits[:, kept],
        past_key_values=out.past_key_values,
        hidden_states=out.hidden_states,
        last_hidden_state=h,
        snapshots=out.snapshots,
        states=out.states,
    )


def _next_token_loss(logits: Tensor, labels: Tensor, divisor: int | Tensor | None) -> Tensor:
    """Average the cross-entropy of logits [B, T, V] for the labels [B, T] one column on, in float32 or better; or sum / divisor."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    loss = nn.functional.cross_entropy(wide, targets, reduction="mean" if divisor is None else "sum")
    return loss if divisor is None else loss / divisor
