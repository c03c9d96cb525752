"""Padding is dealt with once, at the model's edge: real tokens move to the left, rows carry lengths, outputs move back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_nsp.errors import RefineError


@dataclass(frozen=True)
class Alignment:
    """Moves a row's real tokens to the left, and outputs back; all tensors are on the host."""

    lengths: Tensor  # [B] long, real tokens of each row
    order: Tensor | None  # [B, T] long, the input column of each aligned slot; None: already aligned (right padding)
    slot: Tensor | None  # [B, T] long, the inverse of `order`

    def align(self, x: Tensor) -> Tensor:
        """Move real tokens to the left, [B, T, D] -> [B, T, D]."""
        return x if self.order is None else _gather(x, self.order)

    def real(self, n_tokens: int) -> Tensor:
        """Mark the input columns of real tokens, [B, T] bool."""
        slots = torch.arange(n_tokens) if self.slot is None else self.slot
        return slots < self.lengths[:, None]

    def restore(self, x: Tensor) -> Tensor:
        """Move outputs [B, T, D] back to the input columns; those at pads are finite and meaningless."""
        return x if self.slot is None else _gather(x, self.slot)


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    return x.gather(1, columns.to(x.device, non_blocking=True)[..., None].expand_as(x))


def alignment(mask: Tensor | None, lengths: Tensor | None, n_rows: int, n_tokens: int) -> Alignment | None:
    """Find the alignment for a 0/1 mask [B, >= T] (its last T columns count) or lengths [B]; None when every token is real."""
    if mask is not None and lengths is not None:
        raise RefineError("got both attention_mask and lengths; pass one of them")
    if lengths is not None:
        lengths = lengths.cpu()
        if lengths.shape != (n_rows,):
            raise RefineError(f"lengths must be [B] = [{n_rows}], got shape {tuple(lengths.shape)}")
        if int(lengths.max()) > n_tokens or int(lengths.min()) < 0:
            raise RefineError(f"lengths must be between 0 and the {n_tokens} columns of input_ids, got {lengths.tolist()}")
        return None if bool((lengths == n_tokens).all()) else Alignment(lengths.long(), None, None)
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != n_rows or mask.shape[1] < n_tokens:
        raise RefineError(
            f"attention_mask must be [B, T] = [{n_rows}, {n_tokens}] (or [B, past + T]), got shape {tuple(mask.shape)}"
        )
    last = mask[:, -n_tokens:].cpu()
    real = last != 0
    if bool((real & (last != 1)).any()):
        odd = last[real & (last != 1)][0].item()
        raise RefineError(
            f"attention_mask must hold 1 for real tokens and 0 for pads, got {odd:g}; where it numbers packed documents, pass the numbers "
            "as seq_idx; where it is added to attention scores, pass the mask of 0 and 1 that it was made from"
        )
    if bool(real.all()):
        return None
    lengths = real.sum(1)
    slots = torch.arange(n_tokens)
    if bool((real == (slots < lengths[:, None])).all()):  # right padding only
        return Alignment(lengths, None, None)
    order = torch.argsort(~real, dim=1, stable=True)
    return Alignment(lengths, order, torch.argsort(order, dim=1))


def by_rows(rows: Sequence[int], tokens: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Lay out tokens [M] by their rows as [n_rows, P], -1 where a row has fewer; the second result is their places in it, [M] long."""
    lists: list[list[int]] = [[] for _ in range(n_rows)]
    places = []
    for row, token in zip(rows, tokens.tolist(), strict=True):
        places.append((row, len(lists[row])))
        lists[row].append(token)
    width = max(map(len, lists))
    table = torch.tensor([row + [-1] * (width - len(row)) for row in lists])
    return table, torch.tensor([row * width + i for row, i in places])


def columns_to_tokens(aligned: Alignment | None, n_tokens: int) -> Tensor | None:
    """Number the input columns by the row's real tokens, [B, T] long on the host, pads as the token before; None: by themselves."""
    return None if aligned is None or aligned.slot is None else aligned.real(n_tokens).long().cumsum(1) - 1


def tokens_in(columns: Tensor, columns_to_tokens: Tensor | None) -> Tensor:
    """Turn input columns [B, P] (-1: before the first) into indices among each row's real tokens."""
    if columns_to_tokens is None:
        return columns
    return columns_to_tokens.gather(1, columns.clamp(min=0)).where(columns >= 0, columns)


def snapshot_tokens(positions: Tensor | None, aligned: Alignment | None, n_rows: int, n_tokens: int) -> Tensor | None:
    """Turn the input columns [B, P] of snapshots into indices among each row's real tokens, on the host; a RefineError at pads."""
    if positions is None:
        return None
    positions = positions.cpu()
    if positions.ndim != 2 or positions.shape[0] != n_rows:
        raise RefineError(f"snapshot_positions must be [B, P] = [{n_rows}, P], got shape {tuple(positions.shape)}")
    if positions.numel() and (int(positions.max()) >= n_tokens or int(positions.min()) < -1):
        least, most = int(positions.min()), int(positions.max())
        raise RefineError(f"snapshot_positions must lie in -1..{n_tokens - 1}, got {least}..{most}")
    to_tokens = columns_to_tokens(aligned, n_tokens)
    if aligned is not None and to_tokens is None and bool((positions >= aligned.lengths[:, None]).any()):
        raise RefineError("snapshot_positions point at pads: each must be below its row's length")
    return tokens_in(positions, to_tokens)
