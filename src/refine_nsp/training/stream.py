"""Text is read as it is needed, and a resumed run reads on from its checkpoint's place: nothing is read or tokenized a second time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
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
Row = dict[str, object]
FIRST: State = {"epoch": 0, "state": None}  # where the text begins
EMPTY = "the streamed text has no document that is long enough, which min_prefix, one position and K need"


class Stream(IterableDataset[Row]):
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

    def __iter__(self) -> Iterator[Row]:
        start, self.start = self.start, None
        self.places.clear()
        for example in self.rows_from(start):
            self.row += 1
            if self.row % self.every == 0:
                self.places.append((self.row, self.place()))
            yield example

    def rows_from(self, start: State | None) -> Iterator[Row]:
        """Yield the rows from a noted place on, or from the beginning, epoch after epoch; `row` says where that is."""
        # A place belongs to its epoch; `datasets` begins the following ones at their beginning.
        self.data.load_state_dict(None if start is None or "given_out" in start["state"] else start["state"])
        self.row, self.epoch = (0, 0) if start is None else (start["row"], start["state"]["epoch"])
        given_out = 0 if start is None else start["state"].get("given_out", 0)
        self.epoch_row = self.row - given_out
        while True:
            self.data.set_epoch(self.epoch)
            yield from islice(self.data, given_out, None)
            if self.row == 0:
                raise RefineError(EMPTY)
            self.check_files()
            self.epoch += 1
            self.epoch_row, given_out = self.row, 0

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


@dataclass
class Document(Iterator[Row]):
    """Give out the windows of a streamed document.

    Attributes:
        begin: where in the text it begins, None for a lane that has read nothing yet. rows: its windows. given: how many were given out.
    """

    begin: State | None
    rows: list[Row]
    given: int = 0

    def __next__(self) -> Row:
        if self.given == len(self.rows):
            raise StopIteration
        self.given += 1
        return self.rows[self.given - 1]


class LaneStream(Stream):
    """Iterate over streamed windows by lanes. A lane holds its document in memory.

    A checkpoint notes where in the text the document of each lane begins, and how many of its windows were given out: a resumed run reads
    these documents again and no others. Where a buffer shuffles, it reads the text from the beginning, and leaves out what was given out.
    """

    def __init__(self, data: IterableDataset, every: int, keep: int, lanes: int) -> None:
        super().__init__(data, every, keep)
        self.lanes = lanes
        self.reading: list[Iterator[Row]] = []  # the document of each lane
        self.ahead: State = FIRST  # where the first document begins that no lane has read

    def rows_from(self, start: State | None) -> Iterator[Row]:
        place: State = {"ahead": FIRST, "lanes": [(None, 0)] * self.lanes} | ({} if start is None else start["state"])
        given_out = place.get("given_out", 0)
        self.row = 0 if start is None else int(start["row"])
        self.reading = [self._document(begin, given) for begin, given in place["lanes"]]
        self.ahead = place["ahead"]
        rows = in_lanes(self._documents(self.ahead), self.reading, 0 if given_out else self.row)
        return islice(rows, given_out, None)

    def place(self) -> State:
        """Return where each lane reads and where the next document begins, or how many rows were given out."""
        if self.refills:
            return {"given_out": self.row}
        lanes = [(d.begin, d.given) for d in self.reading if isinstance(d, Document)]
        return {"ahead": self.ahead, "lanes": lanes}

    def _document(self, begin: State | None, given: int) -> Document:
        """Read the document again that begins at a place, without the windows that were given out."""
        return Document(begin, [] if begin is None else next(self._documents(begin)).rows, given)

    def _documents(self, begin: State) -> Iterator[Document]:
        """Yield one document after another from a place on, which must begin one, and note where the next begins."""
        rows: list[Row] = []
        for place, row in self._rows(begin):
            if row[BEGINS_COLUMN] and rows:
                self.ahead = place
                yield Document(begin, rows)
                begin, rows = place, []
            rows.append(row)

    def _rows(self, place: State) -> Iterator[tuple[State, Row]]:
        """Yield each window from a place on, epoch after epoch, and the place before it."""
        self.epoch = place["epoch"]
        self.data.load_state_dict(place["state"])  # it is of one epoch; `datasets` begins the following ones at their beginning
        while True:
            self.data.set_epoch(self.epoch)
            empty = place["state"] is None
            for row in self.data:
                empty = False
                yield place, row
                place = {"epoch": self.epoch, "state": None if self.refills else self.data.state_dict()}
            if empty:
                raise RefineError(EMPTY)
            self.check_files()
            self.epoch += 1
            place = {"epoch": self.epoch, "state": None}


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
