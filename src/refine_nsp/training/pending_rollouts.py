"""Rollouts that wait for their optimizer steps are part of a checkpoint, and are dealt out anew where a run is resumed otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refine_nsp.errors import RefineError
from refine_nsp.nsp.records import Batch, Rollouts
from refine_nsp.training.checkpoints import Dealing
from refine_nsp.training.data import ANSWER_COLUMN
from refine_nsp.training.phases import MicroBatch

ROLLOUTS_FILE = "rollouts.process{}.safetensors"  # every process has its own
TENSORS = ("positions", "tokens", "log_probs", "rewards", "advantages", "entropy")
BY_TOKEN = ("input_ids", "entropy")  # [B, T], right-padded


def save_pending(folder: Path, process: int, batches: Sequence[MicroBatch]) -> None:
    """Write a process' micro-batches that wait with their rollouts into a checkpoint's folder."""
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        starts = batch.sequences.answer_starts
        tensors |= {f"{i}.input_ids": batch.input_ids, f"{i}.lengths": batch.lengths}
        tensors[f"{i}.{ANSWER_COLUMN}"] = torch.zeros_like(batch.lengths) if starts is None else starts
        tensors |= {f"{i}.{name}": getattr(batch.rollouts, name).contiguous() for name in TENSORS}
    save_file(tensors, folder / ROLLOUTS_FILE.format(process), metadata={"count": str(len(batches))})


def load_pending(folder: Path, process: int, own: Dealing, device: torch.device) -> list[MicroBatch] | None:
    """Read this process' micro-batches that wait in a checkpoint; None when there are none. Where the checkpoint's steps were dealt out
    otherwise, its rows are dealt out anew, so that every step learns from those it would have learned from.

    Raises:
        RefineError: files of other processes are missing, or a micro-batch is not whole (packed documents, the end of an epoch).
    """
    made = Dealing.of(folder)
    if made is None or made == own:
        path = folder / ROLLOUTS_FILE.format(process)
        return [micro_batch_of(tensors, device) for tensors in read_pending(path)] if path.exists() else None
    paths = [folder / ROLLOUTS_FILE.format(p) for p in range(made.processes)]
    there = [path for path in paths if path.exists()]
    if not there:
        return None
    by_process = [read_pending(path) for path in there]
    whole = all(len(tensors["lengths"]) == made.batch for waiting in by_process for tensors in waiting)
    if len(there) < made.processes or not whole:
        raise RefineError(
            f"{folder} has rollouts that wait for their steps, made with {made}, and cannot deal them out for {own}: "
            f"{'files of other processes are not here' if whole else 'they are not whole batches'}. Resume as it was made"
        )
    # Batches were dealt to processes in turn.
    rows = [row_of(tensors, i) for turn in zip(*by_process, strict=True) for tensors in turn for i in range(made.batch)]
    mine = [rows[at : at + own.batch] for at in range(process * own.batch, len(rows), own.processes * own.batch)]
    return [micro_batch_of(stack_rows(batch), device) for batch in mine]


def read_pending(path: Path) -> list[dict[str, Tensor]]:
    """Read the tensors of each micro-batch that waits, by name."""
    with safe_open(path, "pt") as file:
        names, there = ("input_ids", "lengths", ANSWER_COLUMN, *TENSORS), {*file.keys()}
        count = int(file.metadata()["count"])
        return [{name: file.get_tensor(key) for name in names if (key := f"{i}.{name}") in there} for i in range(count)]


def row_of(tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Take sequence i out of a micro-batch, without its padding."""
    length = int(tensors["lengths"][i])
    return {name: t[i, :length] if name in BY_TOKEN else t[i] for name, t in tensors.items()}


def stack_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Make a micro-batch of sequences, right-padded with 0."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: pad_sequence(c, batch_first=True) if name in BY_TOKEN else torch.stack(c) for name, c in columns.items()}


def micro_batch_of(tensors: Mapping[str, Tensor], device: torch.device) -> MicroBatch:
    """Make a micro-batch that has its rollouts, on the device."""
    made: dict[str, Any] = {name: tensors[name].to(device) for name in TENSORS}
    rollouts = Rollouts(**made, hidden=None, num_positions=int((tensors["positions"] >= 0).sum()))
    batch = Batch.of(tensors["input_ids"].to(device), tensors["lengths"], answer_starts=tensors.get(ANSWER_COLUMN))
    return MicroBatch(batch, rollouts=rollouts)
