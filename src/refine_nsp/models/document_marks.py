"""Read the marks of documents packed in one row, as transformers, flash-attention, Mamba-2 and flash-linear-attention give them.

`position_ids` that begin again at 0, `cu_seq_lens_q` and `cu_seq_lens_k` (with `max_length_q`, `max_length_k`) or `cu_seqlens`, which count
tokens from the first column of all rows, and `seq_idx`, a number for each document, all say where documents begin; they must agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from refine_nsp.errors import RefineError
from refine_nsp.models.documents import Documents
from refine_nsp.models.keywords import refuse_unknown
from refine_nsp.models.padding import Alignment
from refine_nsp.models.state import FastWeightCache, consumed_tokens

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
LONGEST = ("max_length_q", "max_length_k")
MARKS = ("position_ids", *BOUNDARIES, *LONGEST, "seq_idx")

F = TypeVar("F", bound=Callable[..., object])


def takes_marks(forward: F) -> F:
    """Put the marks into the signature of a `forward` that takes them by **kwargs: transformers' Trainer drops columns not in it."""
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    missing = [name for name in MARKS if name not in signature.parameters]
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    parameters[at:at] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in missing]
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    return forward


def marks_among(keywords: Mapping[str, object], forward: Callable[..., object]) -> dict[str, object]:
    """Return the marks among the keywords of a call, with `cache_position`; a RefineError for others that `forward` does not read."""
    names = (*MARKS, "cache_position")
    refuse_unknown(forward, {n: x for n, x in keywords.items() if n not in names})
    return {n: x for n, x in keywords.items() if n in names}


class _RealTokens:
    """Lists the n real tokens of all rows, one behind the other. columns: [n] long, in the flattened input; rows: [n] long."""

    def __init__(self, real: Tensor) -> None:
        self.n_rows, self.n_tokens = real.shape
        self.columns = real.flatten().nonzero()[:, 0]
        self.rows = self.columns // max(self.n_tokens, 1)
        self.begins_row = _changes(self.rows)

    def where(self, index: int) -> str:
        """Name a token's place in messages."""
        column = int(self.columns[index])
        return f"row {column // self.n_tokens}, column {column % self.n_tokens}"


def find_documents(
    marks: Mapping[str, object], aligned: Alignment | None, n_rows: int, n_tokens: int, past: FastWeightCache | None
) -> Documents | None:
    """Find the documents of [B, T] columns; None when every row is a single one, as without marks.

    marks: values of `MARKS`, None where not given, and `cache_position`; past: states that the rows continue from.

    Raises:
        RefineError: marks that are not what their names promise, or that contradict each other.
    """
    given = {name: value for name, value in marks.items() if value is not None}
    if not given:
        return None
    real = torch.ones(n_rows, n_tokens, dtype=torch.bool) if aligned is None else aligned.real(n_tokens)
    columns = past.columns if past is not None else 0
    if "cache_position" in given:
        counted = _whole_numbers("cache_position", given["cache_position"])
        if counted.shape != (n_tokens,) or bool((counted != columns + torch.arange(n_tokens)).any()):
            raise RefineError(
                f"cache_position must count the {n_tokens} columns of the input on from the {columns} that past_key_values have seen, got "
                f"{_some(counted)}; it may be left out"
            )
    numbers = _grid("seq_idx", given["seq_idx"], n_rows, n_tokens) if "seq_idx" in given else None
    if numbers is not None:
        real = real & (numbers >= 0)  # causal-conv1d leaves out what has a negative number
    tokens, begins = _RealTokens(real), {}
    for name in BOUNDARIES:
        if name in given:
            begins[name] = _by_boundaries(name, given[name], tokens)
    if numbers is not None:
        begins["seq_idx"] = _by_numbers(numbers, tokens)
    if "position_ids" in given:
        places = _grid("position_ids", given["position_ids"], n_rows, n_tokens)
        begins["position_ids"] = _by_positions(places, tokens, consumed_tokens(past, n_rows), columns)
    _agree(begins, tokens)
    documents = Documents.of(real, next(iter(begins.values())) if begins else tokens.begins_row)
    longest = int(documents.lengths.max())
    for name in LONGEST:
        if name in given and (limit := int(_whole_numbers(name, given[name]))) < longest:
            raise RefineError(f"{name}={limit} is less than the longest document, which has {longest} tokens")
    if len(documents.rows) == n_rows and (numbers is None or bool((numbers >= 0).all())):
        return None
    if past is not None and past.is_initialized:
        raise RefineError(
            f"{', '.join(begins)} packs documents behind past_key_values, which hold one; a document of a packed row starts from a "
            "fresh state: pass either the cache or the packed rows"
        )
    return documents


def begins_again(position_ids: object, attention_mask: object) -> bool:
    """Tell whether positions [B, T] begin again within a row, as where documents are packed.

    Without a mask any break in their counting does, since transformers' attention finds documents so; with one, only a fall.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return False
    if attention_mask is None:
        return bool((position_ids.diff(dim=1) != 1).any())
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return False  # such a mask says itself which tokens see each other
    real = (attention_mask[:, -position_ids.shape[1] :] != 0).cpu()
    places = position_ids.cpu().expand_as(real)[real]
    rows = real.nonzero()[:, 0]
    return bool(((places.diff() <= 0) & (rows.diff() == 0)).any())


def is_packed(keywords: Mapping[str, object]) -> bool:
    """Tell whether the keywords of a call mark packed documents."""
    if any(keywords.get(name) is not None for name in (*BOUNDARIES, "seq_idx")):
        return True
    return begins_again(keywords.get("position_ids"), keywords.get("attention_mask"))


# Each kind of mark gives [n] bool over real tokens, true where a document begins.
def _by_boundaries(name: str, value: object, tokens: _RealTokens) -> Tensor:
    ends = _whole_numbers(name, value)
    total = tokens.n_rows * tokens.n_tokens
    if ends.ndim != 1 or len(ends) < 2:
        raise RefineError(f"{name} must be [documents + 1] numbers such as [0, 5, 12], got the shape {tuple(ends.shape)}")
    if int(ends[0]) != 0 or int(ends[-1]) != total or bool((ends.diff() < 0).any()):
        raise RefineError(
            f"{name} must start at 0, never fall and end at the {total} columns of the input, got {_some(ends)}; it counts columns, "
            "pads included, all rows one behind the other"
        )
    rows = torch.arange(tokens.n_rows) * tokens.n_tokens
    if not bool(torch.isin(rows, ends).all()):
        raise RefineError(f"{name}={_some(ends)}: a document goes over from one row of {tokens.n_tokens} columns to the next")
    first = torch.zeros(total + 1, dtype=torch.long)
    first[ends] = 1
    return _changes(first.cumsum(0)[tokens.columns])


def _by_numbers(numbers: Tensor, tokens: _RealTokens) -> Tensor:
    flat = numbers.flatten()[tokens.columns]
    begins = _changes(flat) | tokens.begins_row
    runs = torch.stack([tokens.rows[begins], flat[begins]], 1)
    if len(runs.unique(dim=0)) < len(runs):
        listed = runs.tolist()
        again = begins.nonzero()[next(i for i, run in enumerate(listed) if run in listed[:i]), 0]
        raise RefineError(
            f"seq_idx comes back to a number in {tokens.where(int(again))}; a document's tokens must stand together"
        )
    return begins


def _by_positions(places: Tensor, tokens: _RealTokens, consumed: Tensor, columns: int) -> Tensor:
    """Find where positions begin a document.

    Rows that count their columns are one document each. Others count real tokens, from those consumed before or again from 0.
    """
    counted = tokens.columns % tokens.n_tokens
    flat = places.flatten()[tokens.columns]
    misses = torch.zeros(tokens.n_rows, dtype=torch.long).index_add(0, tokens.rows, (flat != counted + columns).long())
    by_column = (misses == 0)[tokens.rows]
    before = flat.roll(1)
    goes_on = (flat == before + 1) & ~tokens.begins_row
    starts = tokens.begins_row & (flat == consumed[tokens.rows])
    again = (flat == 0) & ~tokens.begins_row
    bad = ~(by_column | goes_on | starts | again)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        first, next_one = int(consumed[tokens.rows[i]]), f"{int(before[i]) + 1}, or 0 for another document"
        expected = first if bool(tokens.begins_row[i]) else next_one
        raise RefineError(
            f"position_ids has {int(flat[i])} in {tokens.where(i)}, expected {expected}: these models count a document's tokens from "
            "its first one; leave position_ids out, or let them begin again at 0 where a document begins"
        )
    return tokens.begins_row | (~by_column & again)


def _agree(begins: Mapping[str, Tensor], tokens: _RealTokens) -> None:
    names = list(begins)
    for name in names[1:]:
        differs = (begins[name] != begins[names[0]]).nonzero()
        if len(differs):
            i = int(differs[0, 0])
            one, other = (names[0], name) if bool(begins[names[0]][i]) else (name, names[0])
            raise RefineError(f"{one} begins a document in {tokens.where(i)} and {other} does not; pass one, or make them agree")


def _grid(name: str, value: object, n_rows: int, n_tokens: int) -> Tensor:
    numbers = _whole_numbers(name, value)
    if numbers.ndim != 2 or numbers.shape[1] != n_tokens or numbers.shape[0] not in (1, n_rows):
        raise RefineError(f"{name} must be [B, T] = [{n_rows}, {n_tokens}] (or [1, {n_tokens}]), got {tuple(numbers.shape)}")
    return numbers.expand(n_rows, n_tokens)


def _whole_numbers(name: str, value: object) -> Tensor:
    """Return the value as long, on the host."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise RefineError(f"{name} must be whole numbers, got {type(value).__name__}") from None
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise RefineError(f"{name} must be whole numbers, got {numbers.dtype}")
    return numbers.cpu().long()


def _changes(values: Tensor) -> Tensor:
    """Mark the first value and every value that differs from the one before, [n] bool."""
    first = torch.ones(min(1, len(values)), dtype=torch.bool)
    return torch.cat([first, values[1:] != values[:-1]])


def _some(values: Tensor) -> str:
    shown = [str(v) for v in values.flatten()[:8].tolist()]
    return f"[{', '.join(shown)}{', ...' if values.numel() > 8 else ''}]"
