"""Turn inputs with pads and packed documents into rows of real tokens at a trunk's edge, and outputs back into the caller's layout."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refine_nsp.errors import RefineError
from refine_nsp.models.document_marks import find_documents
from refine_nsp.models.documents import run_documents
from refine_nsp.models.outputs import FastWeightModelOutput
from refine_nsp.models.padding import alignment, snapshot_tokens
from refine_nsp.models.protocols import Trunk
from refine_nsp.models.state import FastWeightCache
from refine_nsp.processes import is_sharded


def run_in_rows(
    trunk: Trunk, x: Tensor, marks: Mapping[str, object], attention_mask: Tensor | None = None, lengths: Tensor | None = None,
    past: FastWeightCache | None = None, use_cache: bool | None = None, snapshot_positions: Tensor | None = None,
    output_states: bool = False, output_hidden_states: bool | None = None,
) -> FastWeightModelOutput:  # fmt: skip
    """Run a trunk on the inputs of its `forward`, one document a row; packed documents leave the state after each row's last.

    marks: the keywords of `document_marks.MARKS`, and `cache_position`.

    Raises:
        RefineError: masks, positions or marks that do not fit the inputs, or rows that do not fit the cache.
    """
    B, T = x.shape[:2]
    aligned = alignment(attention_mask, lengths, B, T)
    _check_rows(past, B)
    documents = find_documents(marks, aligned, B, T, past)
    if use_cache is None:
        use_cache = bool(trunk.config.use_cache) and not trunk.training and documents is None
    if documents is None:
        _check_rows(past, B, use_cache)
        tokens = snapshot_tokens(snapshot_positions, aligned, B, T)
        return trunk.run_rows(x, aligned, past, tokens, use_cache, output_states, bool(output_hidden_states))

    def run(rows: Tensor, lengths: Tensor, tokens: Tensor | None) -> FastWeightModelOutput:
        inside = alignment(None, lengths, *rows.shape[:2])
        return trunk.run_rows(rows, inside, None, tokens, False, output_states, bool(output_hidden_states))

    positions = snapshot_tokens(snapshot_positions, None, B, T)
    # Processes that hold shards of a model run together, so none may run more passes than another.
    out, final = run_documents(run, x, documents, positions, use_cache, together=is_sharded(trunk))
    out.past_key_values = past
    if final is not None:
        out.past_key_values = past if past is not None else FastWeightCache()
        out.past_key_values.advance(final.layers, final.lengths, T)
    return out


def _check_rows(past: FastWeightCache | None, n_rows: int, use_cache: bool = False) -> None:
    """Raise a RefineError unless `n_rows` rows can continue from `past`: as many if its states are replaced, else a multiple of them."""
    if past is not None and past.is_initialized and (n_rows % past.batch_size or (use_cache and past.batch_size != n_rows)):
        raise RefineError(
            f"past_key_values has {past.batch_size} rows but the input has {n_rows}; use cache.expand(N) to repeat rows, or "
            "use_cache=False to go on from each with a whole number of rows"
        )


def one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return ids [B, T] or embeddings [B, T, D], whichever was given; a RefineError for both, neither, or no tokens."""
    if (input_ids is None) == (inputs_embeds is None):
        raise RefineError("pass either input_ids or inputs_embeds")
    if inputs_embeds is not None:
        return inputs_embeds
    assert input_ids is not None
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise RefineError(f"input_ids must be [B, T] with at least one token, got shape {tuple(input_ids.shape)}")
    return input_ids
