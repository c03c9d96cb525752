"""Text is read as it is needed, and a resumed run reads on from its checkpoint's place: nothing is read or tokenized a second time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from refine_nsp.errors import RefineError
from refine_nsp.files import write_atomically
from refine_nsp.training.data import BEGINS_COLUMN
from refine_nsp.training.row_order import in_lanes

STREAM_FILE = "stream.json"
State = dict[str, Any]  # a place in the text, as `datasets` writes it or as `Stream.place` does


class Stream(IterableDataset[dict[str, object]]):
    """Iterate over the rows of a streamed dataset, again from its beginning when it ends (as epoch 1, 2, ... of the dataset).

    Every process reads all rows and keeps its share. The place in the text is noted at the end of every optimizer step's rows, `every` so
    many, and kept for the latest `keep` steps: data loaders read ahead of the step that a checkpoint is of. Where a buffer shuffles, what
    is in it follows from all rows before: that epoch is read again from its beginning, and what was given out is left out.

    Raises:
        RefineError: there is no row in it; or, at the end of an epoch and when a checkpoint is saved, one of its local files has changed.
    """

    def __init__(self, data: datasets.IterableDataset, every: int, keep: int) -> None:
        self.data, self.every = data, every
        self.sizes: dict[str, int] = {f: known["num_bytes"] for f, known in (data.info.download_checksums or {}).items()}
        self.row, self.epoch, self.epoch_row = 0, 0, 0  # the next row and its epoch; the first row of that epoch
        self.refills = has_buffer(data._ex_iterable)
        self.start: State | None = None  # where the next iteration begins
        self.places: deque[tuple[int, State]] = deque(maxlen=keep)

    def __iter__(self) -> Iterator[dict[str, object]]:
        start, self.start = self.start, None
        self.places.clear()
        for example in self.rows_from(start):
            self.row += 1
            if self.row % self.every == 0:
                self.places.append((self.row, self.place()))
            yield example

    def rows_from(self, start: State | None) -> Iterator[dict[str, object]]:
        """Return the rows from a noted place on, or from the beginning, and say in `row` and `epoch` where that is."""
        # A place belongs to its epoch; `datasets` begins the following ones at their beginning.
        self.data.load_state_dict(None if start is None or "given_out" in start["state"] else start["state"])
        self.row, self.epoch = (0, 0) if start is None else (start["row"], start["state"]["epoch"])
        return self.epochs(0 if start is None else start["state"].get("given_out", 0))

    def epochs(self, given_out: int = 0) -> Iterator[dict[str, object]]:
        """Yield the rows of one epoch after another; of the first without those given out before."""
        found = self.row > 0  # all of the first may have been given out
        while True:
            self.data.set_epoch(self.epoch)
            self.epoch_row = self.row - given_out
            for example in islice(self.data, given_out, None):
                found = True
                yield example
            if not found:
                raise RefineError("the streamed text has no document that is long enough for min_prefix, one position and K")
            self.check_files()
            self.epoch, given_out, found = self.epoch + 1, 0, False

    def place(self) -> State:
        """Return where the next row is read: the epoch, and the dataset's own state or how many of the epoch's rows came before."""
        return {"epoch": self.epoch, "given_out": self.row - self.epoch_row} if self.refills else self.data.state_dict()

    def check_files(self) -> None:
        """Refuse files that are not as large as when they were opened (RefineError): the run would continue with other text in silence."""
        for name, size in self.sizes.items():
            file = Path(name)
            if not file.exists():
                raise RefineError(f"{file} has gone while it was streamed; put it back, and resume from the last checkpoint")
            if file.stat().st_size != size:
                raise RefineError(
                    f"{file} had {size} bytes when it was opened and has {file.stat().st_size} now; put it back and resume, or begin anew"
                )

    def save(self, folder: Path, row: int) -> None:
        """Note in a checkpoint's folder how to continue at `row`, the end of an optimizer step."""
        self.check_files()
        state = next(state for at, state in self.places if at == row)
        sizes = sorted(self.sizes.values())  # without names: files may be resumed from elsewhere
        write_atomically(folder / STREAM_FILE, json.dumps({"row": row, "state": state, "sizes": sizes}) + "\n")

    def load(self, folder: Path) -> bool:
        """Begin the next iteration where a checkpoint says, and return whether it says so. RefineError where the files had other sizes."""
        path = folder / STREAM_FILE
        if not path.exists():
            return False
        start = json.loads(path.read_text(encoding="utf-8"))
        sizes = sorted(self.sizes.values())
        if start.get("sizes", sizes) != sizes:
            raise RefineError(
                f"{folder} is of a run whose streamed files had {sum(start['sizes'])} bytes in {len(start['sizes'])} files; these have "
                f"{sum(sizes)} in {len(sizes)}, so its place in them means nothing: put back what they were, or begin a new run"
            )
        self.start = start
        return True


class LaneStream(Stream):
    """Iterate over streamed windows by lanes. A lane holds the rest of its document in memory, which follows from all that was read before:
    a resumed run reads the text again from its beginning, and leaves out what was given out."""

    def __init__(self, data: IterableDataset, every: int, keep: int, lanes: int) -> None:
        super().__init__(data, every, keep)
        self.lanes = lanes

    def rows_from(self, start: State | None) -> Iterator[dict[str, object]]:
        self.data.load_state_dict(None)
        self.row, self.epoch = 0 if start is None else start["row"], 0
        return islice(in_lanes(grouped(self.epochs()), self.lanes), self.row, None)

    def place(self) -> State:
        """Return how many rows were given out, from which it follows where the next stands."""
        return {"epoch": 0, "given_out": self.row}


def grouped(rows: Iterable[dict[str, object]]) -> Iterator[Iterator[dict[str, object]]]:
    """Yield the windows of each document, read from the stream as a whole."""
    document: list[dict[str, object]] = []
    for row in rows:
        if row[BEGINS_COLUMN] and document:
            yield iter(document)
            document = []
        document.append(row)
    if document:
        yield iter(document)


def has_buffer(part: object) -> bool:
    """Tell whether the rows of a streamed dataset's iterable go through a shuffle buffer, which a dataset's state leaves out."""
    inner = (getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ()))
    return isinstance(part, BufferShuffledExamplesIterable) or any(has_buffer(x) for x in inner if x is not None)


def check_streaming(args: TrainingArguments) -> None:
    """Have every process read the stream itself, and refuse settings by which its place would not be known (RefineError)."""
    if args.max_steps <= 0:
        raise RefineError("streamed text has no known end: set max_steps")
    if args.train_sampling_strategy == "group_by_length":
        raise RefineError(
            "train_sampling_strategy='group_by_length' needs all lengths, and streamed text comes as it comes; leave it out"
        )
    if args.dataloader_num_workers > 0:
        raise RefineError(
            f"dataloader_num_workers={args.dataloader_num_workers}: a checkpoint cannot note where other processes read; leave it at 0"
        )
    # Otherwise the first process would read for all, and send them batches cut from one that is padded to the longest of all rows.
    assert isinstance(args.accelerator_config, AcceleratorConfig)
    args.accelerator_config.dispatch_batches = False
