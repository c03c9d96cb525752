"""List what is checked of a model, a line each: what holds, what it means for training where it does not, and what to do then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from refine_nsp.models.checks import equalities
from refine_nsp.models.checks.equalities import Pair, Probe

WITH_STATES = "load it by refine_nsp.load, or give it states by with_states: they are taken by reference, or prefixes read again"
APART = "train on rows of one document, or load the model by refine_nsp.load, which gives every document a row of its own"
LENGTHS = "put rows of one length together, or load the model by refine_nsp.load and say lengths or attention_mask"


@dataclass(frozen=True)
class Line:
    """Describes a check."""

    name: str  # for JSON
    title: str  # what holds, as the table says it
    means: str  # what it means for training where it does not hold
    mend: str  # what to do then
    compare: Callable[[Probe], Pair | None]  # reads a text in two ways; None is a check that raises where it does not hold
    quick: bool = True  # whether it belongs to the quick ones
    in_float64: bool = True  # whether a copy in float64 takes it too
    in_bfloat16: bool = False  # whether a copy in bfloat16 takes it instead
    follows: tuple[str, ...] = ()  # lines that it cannot hold without
    answers: bool = False  # whether the model's own answers are compared, which another precision may give otherwise
    gradients: bool = False  # whether gradients are compared


LINES = (
    Line(
        "continuation", "a prefix, then its continuation from the cache = the whole",
        "whatever is learned or measured from a handed-over state (carried windows, rollouts, prefill and decode) is of another model",
        WITH_STATES, equalities.continuation,
    ),
    Line(
        "positions", "positions go on behind a cache by themselves",
        "a call with a cache alone, as in loops of one's own, reads what follows at the positions of the beginning",
        "pass position_ids that count on with every call that has a cache, as generate does", equalities.positions, quick=False,
        follows=("continuation",),
    ),
    Line(
        "single_tokens", "token by token = several at a time",
        "an answer is decoded by another computation than the one that is trained, so log-probabilities of rollouts are off policy",
        "decode with use_cache=False where it matters; the library runs rollouts of models with states several tokens at a time",
        equalities.single_tokens,
    ),
    Line(
        "states", "states after pieces = states after one pass",
        "states differ although outputs may not show it yet; over a long document they drift",
        WITH_STATES, equalities.states_after_pieces, quick=False,
        follows=("continuation", "single_tokens"),
    ),
    Line(
        "recurrence", "a recurrent state comes from the one before",
        "the context ends where several tokens follow a state, silently",
        WITH_STATES, equalities.recurrence,
    ),
    Line(
        "right_padding", "pads on the right change nothing",
        "a row's loss depends on how long the others of its batch are", LENGTHS, partial(equalities.padded, left=False),
    ),
    Line(
        "left_padding", "pads on the left change nothing",
        "batched prompts (evaluation, rollouts) are answered by a state that pads were written into",
        "answer prompts one by one, or load the model by refine_nsp.load and say lengths", partial(equalities.padded, left=True),
    ),
    Line(
        "pads_content", "the token that pads are made of changes nothing",
        "results depend on which id the tokenizer pads with", LENGTHS, equalities.pads_content, quick=False,
    ),
    Line(
        "padded_continuation", "tokens decoded behind left pads = without pads",
        "batched generation answers shorter prompts differently from the same prompts alone",
        "answer prompts one by one, or load the model by refine_nsp.load", equalities.decoding_behind_pads,
    ),
    Line(
        "rows", "rows do not see each other",
        "examples of a batch leak into each other: no loss of it can be trusted",
        "use batches of one and report it to the model's authors (a mixture of experts with a capacity does this by design)",
        equalities.rows,
    ),
    Line(
        "batch_size", "the batch's size changes nothing",
        "one batch of 8 is not 8 batches of 1: accumulation and evaluation depend on the batch size",
        "use batches of one, and compare runs of one batch size only", equalities.batch_size, quick=False,
    ),
    Line(
        "packed_position_ids", "packed documents, by position_ids = apart",
        "documents that are packed in one row read each other's ends, as context and in their states",
        APART, partial(equalities.packed, way="position_ids"),
    ),
    Line(
        "packed_cu_seqlens", "packed documents, by cu_seq_lens alone = apart",
        "marks that are read by FlashAttention and by kernels alone are taken and ignored elsewhere: documents mix without a word",
        "pass position_ids too (transformers' collator does). " + APART[0].upper() + APART[1:],
        partial(equalities.packed, way="cu_seqlens"), quick=False,
    ),
    Line(
        "packed_collator", "packed documents, by the flattening collator = apart",
        "padding-free training (DataCollatorWithFlattening, SFTTrainer's packing and padding_free) mixes documents", APART,
        partial(equalities.packed, way="collator"), quick=False, follows=("packed_position_ids",),
    ),
    Line(
        "gradient", "gradients through a cached state = through the whole",
        "losses behind a cached state do not train what wrote that state (or fail in the backward pass)",
        "train on whole sequences, or " + WITH_STATES, equalities.gradient, follows=("continuation",), gradients=True,
    ),
    Line(
        "generation", "generate with a cache = without",
        "answers depend on a setting that should change speed alone; scores of evaluations too",
        "evaluate with use_cache=False, or " + WITH_STATES, equalities.generation, quick=False, follows=("single_tokens",), answers=True,
    ),
    Line(
        "checkpointing", "gradient checkpointing changes nothing",
        "with gradient_checkpointing the model learns something else than without",
        "leave gradient_checkpointing out, or set segment_tokens instead", equalities.checkpointing, quick=False, gradients=True,
    ),
    Line(
        "checkpointing_cache", "gradient checkpointing keeps the cache",
        "with gradient_checkpointing, whatever continues from a cache in training begins from nothing; at most a log line says so",
        "leave gradient_checkpointing out where states are carried, or load the model by refine_nsp.load, which runs whole pieces again",
        equalities.checkpointing_with_cache, quick=False, gradients=True,
    ),
    Line(
        "kernels", "kernels = PyTorch's operations",
        "what is trained on a GPU is not what runs elsewhere", "set REFINE_NSP_KERNELS=torch, or change the kernels' release",
        equalities.kernels, quick=False, in_float64=False,
    ),
    Line(
        "save_and_load", "what is saved and loaded = the model",
        "a checkpoint is not the model that was trained: resuming and evaluation start from another",
        "compare the parameters' names in the folder with state_dict(), and tied ones above all", equalities.save_and_load,
        quick=False, in_float64=False,
    ),
    Line(
        "state_precision", "in bfloat16, recurrent states stay float32",
        "a state that is rounded to 8 bits at every hand-over forgets small updates: long contexts fade",
        "keep the model in float32 and train under autocast (bf16=True), which keeps states in float32 where the model does",
        equalities.state_precision, in_float64=False, in_bfloat16=True,
    ),
)  # fmt: skip
