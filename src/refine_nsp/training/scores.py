"""Context scores are computed once by the model that a run starts from, and kept with the data; a step then costs an NTP step.

Documents are scored by the mean over their tokens: LongFilter's measure of a document for long-context training (ICLR 2026). One that is
read as well by its last W tokens has a score near 0, however hard it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from filelock import FileLock, Timeout
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.files import made_whole, make_folder
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run_and_leave
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.teacher import Teacher
from refine_nsp.processes import process_state, to_device
from refine_nsp.progress import step_progress
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.data import BEGINS_COLUMN, TEXT_COLUMN, TOKENS_COLUMN, collate, tokenize
from refine_nsp.training.lane_states import LaneStates
from refine_nsp.training.sources import COUNT_COLUMN, SCORE_COLUMN

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
NUMBER_COLUMN = "document_number"
ENDINGS = (".jsonl", ".parquet")
PART_ROWS = 64  # so many rows are scored and kept together, and an interruption costs no more


def with_context_scores(
    data: Dataset | IterableDataset,
    model: nn.Module,
    config: NSPConfig,
    quiet: bool = True,
    autocast: torch.dtype | None = None,
    process: int = 0,
    processes: int = 1,
    carried: LaneStates | None = None,
    teacher: Teacher | None = None,
) -> Dataset:
    """Add a column `context_scores` to the data, d of every token (float32, or float64), and read it back where it is known.

    The scores are kept in the cache of `datasets`, by model, data and settings, and written part by part, so that an interrupted scoring is
    continued. Processes that need the same scores, of this run or of others, share the parts out: each begins with its own, continues
    with what nobody is at, and waits for the rest. So nothing depends on how many there are, nor on whether they see one disk.

    Args:
        autocast: what products are computed in, where that is not the weights' dtype. process, processes: the index among so many.
        carried: where the windows of a document continue from each other, what is kept between them, empty; the scores see the document.
        teacher: whose scores are computed, in its way; `model` is its own.

    Raises:
        RefineError: streamed data, or settings that use no context scores.
    """
    gain = wants_gain(config)
    if not isinstance(data, Dataset):
        raise RefineError("scores are kept with the data, which streaming does not keep; use context_scores='online'")
    told = ("teacher", teacher.masked) if teacher is not None else () if carried is None else ("carried", carried.keys)
    folder = _folder_of(scores_key(data, model, config, autocast, told))
    device = next(model.parameters()).device

    def scored(row: Mapping[str, object], index: int) -> dict[str, list[float]]:
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            return {"context_scores": scores_of(row, model, config, gain, device, carried, index == 0, teacher)}

    features = Features({**data.features, "context_scores": datasets.Sequence(Value(kept_dtype(model)))})
    ends = part_ends(len(data), None if carried is None else data[BEGINS_COLUMN][:])
    starts = [0, *ends[:-1]]
    own_first = sorted(starts, key=lambda start: (starts.index(start) - process) % processes)
    parts: dict[int, Dataset] = {}
    training = model.training
    model.eval()
    with step_progress(len(data), 0, "context scores", quiet) as progress:
        for start, blocking in [(s, False) for s in own_first] + [(s, True) for s in own_first]:
            if start in parts:
                continue
            rows = data.select(range(start, ends[starts.index(start)]))
            # The part is named here, since `datasets` would pickle the model to find a name for it.
            part = {"cache_file_name": str(folder / f"part-{start}.arrow"), "new_fingerprint": f"{folder.name}-{start}"}
            try:
                with FileLock(folder / f"part-{start}.lock", blocking=blocking):
                    parts[start] = rows.map(scored, with_indices=True, features=features, load_from_cache_file=True, **part)
            except Timeout:
                continue  # another process is at it
            progress.advance(sum(map(len, parts[start]["context_scores"])), len(rows))
    model.train(training)
    return concatenate_datasets([parts[start] for start in starts])


def _folder_of(key: str) -> Path:
    """Make the folder of the cache of `datasets` that scores of this name are kept in."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "refine_nsp_context_scores" / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rows_again(data: Dataset) -> tuple[list[int], list[int]] | None:
    """Find rows that are there several times: the first place of each row, and for every place its row among these. None: no row is."""
    if data._indices is None:
        return None
    taken = data._indices.column(0).to_numpy()
    rows, first, places = np.unique(taken, return_index=True, return_inverse=True)
    return None if len(rows) == len(taken) else (first.tolist(), places.tolist())


def scored_by_processes(
    data: Dataset, model: nn.Module, config: NSPConfig, args: ReFINEConfig, quiet: bool, teacher: Teacher | None = None
) -> Dataset:
    """Add context scores to a run's data by the model as it is, or by a teacher, each process scoring a share on its device. RefineError
    where a process does not have all of the weights yet."""
    if teacher is not None:
        model = cast(nn.Module, teacher.model)
    elif is_fsdp_enabled() or is_deepspeed_zero3_enabled():
        raise RefineError(
            "context_scores='cached' has every process score a share of the data by all of the weights, which "
            "fsdp_cpu_ram_efficient_loading and DeepSpeed's stage 3 do not give it: turn them off, or use context_scores='online'"
        )
    home = next(model.parameters()).device
    # The weights that FSDP is to share out are whole still, and on the host.
    to_device(model, args.device)
    autocast = AUTOCAST.get(args.mixed_precision)
    carried = LaneStates(config.local_span * config.local_window, args.carried_keys) if args.carry_states else None
    # A mixture has rows several times, which are scored once; a stream is refused there.
    again = rows_again(data) if carried is None and isinstance(data, Dataset) else None
    rows = data if again is None else data.select(again[0])
    own = args.process_index, args.world_size
    scored = with_context_scores(rows, model, config, quiet, autocast, *own, carried, teacher)
    scored = scored if again is None else scored.select(again[1])
    to_device(model, home)
    return scored


def part_ends(n_rows: int, begins: Sequence[bool] | None) -> list[int]:
    """Say where parts of PART_ROWS rows end; where windows continue from each other, of that many or more, in whole documents."""
    if begins is None:
        return [*range(PART_ROWS, n_rows, PART_ROWS), n_rows]
    ends: list[int] = []
    for row, begin in enumerate(begins):
        if begin and row - (ends[-1] if ends else 0) >= PART_ROWS:
            ends.append(row)
    return [*ends, n_rows]


def scores_key(
    data: Dataset,
    model: nn.Module,
    config: NSPConfig,
    autocast: torch.dtype | None = None,
    carried: tuple[object, ...] = (),
) -> str:
    """Name the scores by what they depend on: the data, the weights, what is computed with them, and which score it is."""
    gain = wants_gain(config)
    settings = (data._fingerprint, weights_key(model), model_key(model), config.local_window, config.local_span, gain)
    wide = (*carried, *(("float64",) if kept_dtype(model) == "float64" else ()))
    return Hasher.hash((*settings, *wide) if autocast is None else (*settings, *wide, str(autocast)))


def kept_dtype(model: nn.Module) -> str:
    """Return the dtype that a model's scores are kept in."""
    return "float64" if next(model.parameters()).dtype == torch.float64 else "float32"


def model_key(model: nn.Module) -> str:
    """Name a model's config, without where it came from: the same weights with another window are another model."""
    settings: dict[str, object] = model(step=lambda m: m.config.to_dict())
    return Hasher.hash({k: v for k, v in sorted(settings.items()) if k not in ("_name_or_path", "transformers_version")})


def wants_gain(config: NSPConfig) -> bool:
    """Tell whether a run's context score is the gain, or else the KL. RefineError where it uses neither."""
    name = config.context_score
    if name is None:
        raise RefineError(
            f"context_scores='cached' has nothing to keep: selection={config.selection!r} and token_weights={config.token_weights!r} of "
            f"estimator={config.estimator!r} use no context scores; leave it 'online'"
        )
    return name == "context_gain"


@torch.no_grad()
def scores_of(
    row: Mapping[str, object],
    model: nn.Module,
    config: NSPConfig,
    gain: bool,
    device: torch.device,
    carried: LaneStates | None = None,
    first: bool = False,
    teacher: Teacher | None = None,
) -> list[float]:
    """Compute d of one example's tokens; of a packed example document by document; of a window in its document, from what is `carried`;
    with a `teacher`, in its way."""
    inputs = collate([{k: row[k] for k in ("input_ids", "lengths") if k in row}])
    batch = Batch.of(inputs["input_ids"].to(device), inputs["lengths"])
    if carried is not None:
        if first or row[BEGINS_COLUMN]:
            carried.forget([0])
        batch = replace(batch, starts=carried.starts([0], device))

    def score(m: CausalModel) -> Tensor:
        if teacher is not None:
            return teacher.scores(batch, teacher.read(batch), config, gain)
        hidden, left = run_and_leave(m, batch, config)
        if carried is not None and left is not None:
            carried.keep([0], batch, left)
        return context_divergence(m, batch, hidden, config, gain)

    d = model(step=score).cpu()
    return torch.cat([x[:n] for x, n in zip(d, batch.sizes, strict=True)]).tolist()


def weights_key(model: nn.Module) -> str:
    """Name a model's weights by a digest of all of them."""
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def score_documents(
    documents: Dataset,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: NSPConfig,
    max_length: int,
    column: str = TEXT_COLUMN,
    autocast: torch.dtype | None = None,
    quiet: bool = False,
) -> Dataset:
    """Return the documents with two more columns: `context_score`, the mean context score of a document's tokens in nats (none where it has
    no token), and `num_tokens`. Documents are read in windows of `max_length` tokens, as training reads them; `context_score`,
    `local_window` and `local_span` of `config` say which score. See `with_context_scores`.

    Raises:
        RefineError: windows too short for any token to have a score, or documents with columns of these names.
    """
    check_length(max_length, config)
    if taken := [name for name in (SCORE_COLUMN, COUNT_COLUMN) if name in documents.column_names]:
        raise RefineError(f"the documents have a column {taken[0]!r} already; score the file they were made of, or rename it")
    column = TOKENS_COLUMN if column == TEXT_COLUMN and TEXT_COLUMN not in documents.column_names else column
    numbers: np.ndarray = np.arange(len(documents))
    only = documents.select_columns([column]).add_column(
        NUMBER_COLUMN, pa.array(numbers), new_fingerprint=Hasher.hash((documents._fingerprint, column, NUMBER_COLUMN))
    )
    state = process_state()
    with state.main_process_first():  # the others of a machine read what the first one leaves in the cache
        windows = tokenize(only, tokenizer, column, max_length, 1, packing=False, keep_columns=True)
    assert isinstance(windows, Dataset)
    scored = with_context_scores(windows, model, config, quiet, autocast, state.process_index, state.num_processes)
    totals, counts = totals_of(scored, len(documents))
    means = [total / count if count else None for total, count in zip(totals.tolist(), counts.tolist(), strict=True)]
    features = Features({SCORE_COLUMN: Value("float64"), COUNT_COLUMN: Value("int64")})
    more = Dataset.from_dict({SCORE_COLUMN: means, COUNT_COLUMN: counts.tolist()}, features)
    return concatenate_datasets([documents, more], axis=1)


def totals_of(windows: Dataset, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the scores of each document's tokens, and count them, over its windows."""
    totals, counts = np.zeros(documents), np.zeros(documents, dtype=np.int64)
    for table in windows.select_columns([NUMBER_COLUMN, "context_scores"]).with_format("arrow").iter(1000):
        numbers = table[NUMBER_COLUMN].to_numpy()
        lengths = pyarrow.compute.list_value_length(table["context_scores"]).to_numpy()
        scores = pyarrow.compute.list_flatten(table["context_scores"]).to_numpy()
        np.add.at(totals, np.repeat(numbers, lengths), scores)
        np.add.at(counts, numbers, lengths)
    return totals, counts


def check_length(max_length: int, config: NSPConfig) -> None:
    """Refuse windows in which no token has a score (RefineError)."""
    if max_length <= 2 * config.local_window:
        raise RefineError(
            f"max_length={max_length} leaves no token to score, which needs more than twice local_window={config.local_window}"
        )


def check_output(path: Path, inputs: Sequence[str]) -> None:
    """Refuse a file that cannot be written, before anything is scored: another kind, a folder, or the data itself (RefineError)."""
    if path.suffix not in ENDINGS:
        raise RefineError(f"--output {path}: expected a file that ends with {' or '.join(ENDINGS)}")
    if path.is_dir():
        raise RefineError(f"{path} is a folder; name a file to write")
    if any(path.resolve() == Path(name).resolve() for name in inputs):
        raise RefineError(f"--output {path} is the data itself; name another file")


def write_rows(rows: Dataset, path: Path) -> Path:
    """Write rows as jsonl or parquet, by the file's ending, whole or not at all."""
    make_folder(path.parent)
    with made_whole(path.with_name(f"{path.name}.tmp"), path) as temporary:
        if path.suffix == ".parquet":
            rows.to_parquet(temporary)
        else:
            with temporary.open("w", encoding="utf-8") as file:  # the writer of `datasets` rounds numbers
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return path
