"""Micro-batches are collated, sent to the device and counted, so that 1 x 8 equals 8 x 1 on any number of processes."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from refine_nsp.nsp.records import Batch
from refine_nsp.training.data import ANSWER_COLUMN, BEGINS_COLUMN, Collated
from refine_nsp.training.phases import MicroBatch, Phase
from refine_nsp.training.row_order import documents_of

Places = Sequence[tuple[int, int]]  # (example, document) of each row of a collated batch


def to_batch(inputs: Collated, device: torch.device) -> Batch:
    """Send a collated batch to the device without waiting for it. Lengths are read where they are: on the host, if nobody moved them."""
    no_columns = ("input_ids", "lengths", "context_scores", "_places", ANSWER_COLUMN, BEGINS_COLUMN)
    columns = {k: v for k, v in inputs.items() if k not in no_columns}
    ids, scores = inputs["input_ids"].to(device, non_blocking=True), inputs.get("context_scores")
    scores = None if scores is None else scores.to(device, non_blocking=True)
    return Batch.of(ids, inputs["lengths"], columns, scores, answer_starts=inputs.get(ANSWER_COLUMN))


def places_of(inputs: Collated) -> Places:
    """Return the (example, document) of each row of a collated batch; where a collator does not say, a row is an example."""
    rows = inputs["input_ids"] if "input_ids" in inputs else inputs["prompts"]
    return inputs.get("_places", [(i, 0) for i in range(len(rows))])


def share_of_batches(
    data: Dataset, collator: Callable[[list[dict[str, object]]], Collated], rows: int, process: int, processes: int
) -> Iterator[Collated]:
    """Collate a process' share of the validation rows, so many at once. Each row is there once in all, with its index in the set in
    `_places`: figures are the same on any number of processes."""
    indices = range(process, len(data), processes)
    for at in range(0, len(indices), rows):
        chosen = indices[at : at + rows]
        batch = collator([data[i] for i in chosen])
        yield {**batch, "_places": [(chosen[example], document) for example, document in places_of(batch)]}


def documents_in_lanes(
    data: Dataset, collator: Callable[[list[dict[str, object]]], Collated], lanes: int, process: int, processes: int
) -> Iterator[Collated]:
    """Collate a process' share of the documents as `share_of_batches` does of rows, so many side by side, window by window; `_lanes` says
    which lane each row is in."""
    begins: Sequence[bool] = data[BEGINS_COLUMN] if BEGINS_COLUMN in data.column_names else [True] * len(data)
    waiting = deque(documents_of(begins)[process::processes])
    reading: dict[int, Iterator[int]] = {}
    while True:
        chosen: dict[int, int] = {}
        for lane in range(lanes):
            while (row := next(reading.get(lane, iter(())), None)) is None and waiting:
                reading[lane] = iter(waiting.popleft())
            if row is not None:
                chosen[lane] = row
        if not chosen:
            return
        rows = [{**data[i], BEGINS_COLUMN: begins[i] or i == 0} for i in chosen.values()]
        yield {**collator(rows), "_lanes": list(chosen), "_places": [(i, 0) for i in chosen.values()]}


def set_totals(
    phase: Phase, batches: Sequence[MicroBatch], sum_over: Callable[[Tensor], Tensor] | None, processes: int, device: torch.device
) -> None:
    """Tell the micro-batches of an optimizer step what the step's sums are divided by: their counts over all of them and all processes,
    over the number of processes, since gradients are averaged over these."""
    totals: dict[str, float] = defaultdict(float)
    for counts in map(phase.count, batches):
        for name, count in counts.items():
            totals[name] += count
    if sum_over is not None and totals:
        names = sorted(totals)
        counted = torch.tensor([totals[n] for n in names], device=device, dtype=torch.float64)
        totals = dict(zip(names, (sum_over(counted) / processes).tolist(), strict=True))
    for batch in batches:
        batch.totals = {name: float(count) or 1.0 for name, count in totals.items()}


def of_one_width(batches: Sequence[MicroBatch], gather: Callable[[Tensor], Tensor], device: torch.device) -> list[MicroBatch]:
    """Widen micro-batches to the widest that any process has in their place: processes that hold parts of a model must make the same
    passes, and how many there are follows from widths."""
    own = torch.tensor([b.widths for b in batches], device=device)
    widest = gather(own[None]).amax(0).tolist()
    return [b.widened(widths) for b, widths in zip(batches, widest, strict=True)]


def deal(batches: Sequence[MicroBatch], hands: int) -> list[Sequence[MicroBatch]]:
    """Deal micro-batches out in their order to so many steps (fewer where there are not enough), as evenly as they go."""
    each, more = divmod(len(batches), hands)
    ends = [(i + 1) * each + min(i + 1, more) for i in range(min(hands, len(batches)))]
    return [batches[start:end] for start, end in zip([0, *ends], ends, strict=False)]
