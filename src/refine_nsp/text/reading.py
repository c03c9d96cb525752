"""Read the split and the columns that are asked for from files, folders, globs, folders saved by `datasets`, or the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import (
    Dataset,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)

from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.text.builder import build, say_missing
from refine_nsp.text.columns import Types, Wanted, every_row, schema_of, types_of
from refine_nsp.text.folders import Found, LeftOut, choose, find_files, path_of, say_left_out
from refine_nsp.text.formats import BLOCK, ending_of, format_of, place

READ_AHEAD = BLOCK  # bytes that are read of a file that will be streamed, to see that it is text before a run begins


def read_documents(
    name: str,
    columns: Sequence[str] = ("text",),
    config: str | None = None,
    split: str | Sequence[str] = "train",
    streaming: bool = False,
    also: Sequence[str] | None = None,
    as_found: bool = False,
) -> Dataset | IterableDataset:
    """Read the rows of a file, folder, glob, folder saved by `datasets`, or hub dataset.

    One line says which files of a folder are not read, and why.

    Args:
        columns: names of which any may hold the document. The first that is there is read, and every file must have it.
        config: the configuration of a hub dataset, or of a folder whose README lists several.
        split: a split as `load_dataset` takes it (`train`, `train[:10%]`, `train+test`), or several, of which the first that is there is
            read. The only split of a folder is read whatever it is called. A file or a glob has no splits.
        streaming: whether rows are read only as they are asked for.
        also: other columns that are read where they are there; None: all whose types agree.
        as_found: whether the caller looks at each row and refuses what it cannot take. Then a column may hold values of several types,
            and rows without a document are not counted in a warning.

    Raises:
        RefineError: nothing is there, a column or split is missing, the hub is out of reach, or a file or row, named, cannot be read.
    """
    wanted = Wanted(tuple(columns), None if also is None else tuple(also), READ_AHEAD if streaming else None, as_found)
    path = path_of(name)
    if _is_saved(path):
        data = _load_saved(path, split, wanted)
    elif (found := find_files(name, config)) is not None:
        data = _load_files(name, found, split, wanted)
    else:
        data = _load_hub(name, config, split, wanted)
    if isinstance(data, Dataset) and not as_found:
        document = next(c for c in columns if c in data.column_names)
        say_missing(name, data.data.column(document).null_count, data.data.num_rows, document)
    return data


def place_of(
    name: str, columns: Sequence[str], config: str | None, split: str | Sequence[str], is_wrong: Callable[[object], bool]
) -> str | None:
    """Find the file and the row of the first wrong value, for an error message. Return None where no file of `name` holds one."""
    path, wanted = path_of(name), Wanted(tuple(columns), (), READ_AHEAD)
    if _is_saved(path) or (found := find_files(name, config)) is None:
        return None
    for names, _ in _parts(name, split):
        for file in _files_of(name, found, names):
            column = next((c for c in columns if c in types_of(file, wanted)), columns[0])
            for number, line, row in every_row(file, column, wanted):
                if is_wrong(row.get(column)):
                    return place(file, number, line)
    return None


def _parts(name: str, split: str | Sequence[str], streaming: bool = False) -> list[tuple[list[str], str]]:
    """Cut a split such as `train[:10%]+test` into its parts: for each the names asked for, and its slice or an empty text."""
    if not isinstance(split, str):
        return [(list(split), "")]
    parts = [re.fullmatch(r"\s*([^\[\]()+\s]+)\s*((?:\[[^\]]*\](?:\([^)]*\))?)?)\s*", part) for part in split.split("+")]
    if not all(parts):
        raise RefineError(f"split={split!r}: expected a name, with a slice if you like: train, train[:10%], train+test")
    if streaming and any(match[2] for match in parts if match):
        raise RefineError(f"{name}: a slice of a split needs its number of rows, which streamed text does not say; leave it out")
    return [([match[1]], match[2]) for match in parts if match]


def _sliced(data: Dataset, part: str) -> Dataset:
    """Return the rows of a slice such as `[:10%]`."""
    try:
        spans = ReadInstruction.from_spec(f"train{part}").to_absolute({"train": len(data)})
    except (ValueError, AssertionError) as error:
        raise RefineError(f"split: {part!r} is no slice of {len(data)} rows ({first_line(error)})") from error
    return data.select([i for span in spans for i in range(span.from_ or 0, len(data) if span.to is None else span.to)])


def _load_files(name: str, found: Found, split: str | Sequence[str], wanted: Wanted) -> Dataset | IterableDataset:
    parts = _parts(name, split, wanted.streaming)
    of_parts = [_files_of(name, found, names) for names, _ in parts]
    if not any(part for _, part in parts):  # without slices all parts are read as one list of files
        of_parts, parts = [list(dict.fromkeys(file for files in of_parts for file in files))], [([], "")]
    others = {file: f"split {split}" for split, of_split in found.splits.items() for file in of_split}
    unread = [file for file in found.files if not any(file in files for files in of_parts)]
    left_out = [*found.left_out, *((file.name, others.get(file, "of no split")) for file in unread)]
    read = []
    for files, (_, part) in zip(of_parts, parts, strict=True):
        data = _read(name, files, wanted, left_out)
        read.append(_sliced(data, part) if part and isinstance(data, Dataset) else data)
    say_left_out(name, list(dict.fromkeys(left_out)))
    return read[0] if len(read) == 1 else concatenate_datasets(read)


def _files_of(name: str, found: Found, asked: Sequence[str]) -> list[Path]:
    if list(asked) == ["all"] and "all" not in found.splits:
        return found.files
    chosen = choose(list(found.splits), asked, bool(found.of_no_split), name)
    return found.of_no_split if chosen is None else found.splits[chosen]


def _read(name: str, files: Sequence[Path], wanted: Wanted, left_out: LeftOut) -> Dataset | IterableDataset:
    """Read the files that hold documents, and append the others to `left_out`."""
    types = _holding_documents(name, {file: types_of(file, wanted) for file in files}, wanted, left_out)
    schema, odd = schema_of(types, wanted)
    left_out += odd
    stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in types]
    try:
        data = build(stamps, schema, wanted)
    except RefineError:
        raise
    except Exception as error:  # datasets wraps whatever is raised while it reads
        cause = error.__cause__ or error
        raise cause if isinstance(cause, RefineError) else RefineError(f"cannot read {name}: {first_line(cause)}") from error
    if isinstance(data, IterableDataset):  # sizes let whoever reads the files again see that they have not changed
        data.info.download_checksums = {str(file.resolve()): {"num_bytes": file.stat().st_size} for file in types}
    return data


def _holding_documents(name: str, types: dict[Path, Types], wanted: Wanted, left_out: LeftOut) -> dict[Path, Types]:
    """Return the files that have the document's column.

    Files of an ending of which none has the column are appended to `left_out`; a file without it among others that have it is an error.
    """
    there = {column for of_file in types.values() for column in of_file}
    document = next((c for c in wanted.columns if c in there), None)
    if document is None:
        raise no_column(name, wanted.columns, _all_columns(next(iter(types))))
    holding = {_kind(file) for file, of_file in types.items() if document in of_file}
    records = holding - {"text"}
    kept: dict[Path, Types] = {}
    for file, of_file in types.items():
        if records and _kind(file) == "text":
            left_out.append((file.name, "text beside files of rows: name it by itself"))
        elif _kind(file) not in holding:
            left_out.append((file.name, f"no column {document!r}"))
        elif document not in of_file:
            raise no_column(str(file), (document,), _all_columns(file), "The files beside it do: leave it out, or rename it")
        else:
            kept[file] = of_file
    return kept


def _kind(file: Path) -> str:
    """Name the kind by which files are alike: text, or their ending, since a .json next to .jsonl may be anything."""
    return "text" if format_of(file) == "text" else ending_of(file)


def _all_columns(file: Path) -> list[str]:
    """List all columns of a file, also those nobody asked for, for an error message."""
    return list(types_of(file, Wanted((), None, READ_AHEAD)))


def no_column(
    name: str, columns: Sequence[str], there: Sequence[str], remedy: str = "Name one with --text_column, or rename it"
) -> RefineError:
    """Make the error of a file or dataset without the document's column."""
    names = " or ".join(map(repr, columns))
    return RefineError(f"{name} has no column {names}{closest(columns[0], there)}; it has {', '.join(there) or 'none'}. {remedy}")


def _is_saved(path: Path) -> bool:
    return path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists())


def _load_saved(path: Path, split: str | Sequence[str], wanted: Wanted) -> Dataset | IterableDataset:
    """Load a folder saved by `datasets`. It is memory-mapped, so streaming it saves nothing."""
    parts = _parts(str(path), split, wanted.streaming)
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for files that are missing or cut off
        raise RefineError(f"cannot read {path}, a folder saved by datasets: {first_line(error)}") from error
    if isinstance(loaded, Dataset) and not any(part for _, part in parts):
        parts = parts[:1]
    read = []
    for names, part in parts:
        if isinstance(loaded, Dataset):
            data = loaded
        elif names == ["all"]:
            data = concatenate_datasets(list(loaded.values()))
        else:
            data = loaded[str(choose(list(loaded), names, False, str(path)))]
        read.append(_sliced(data, part) if part else data)
    data = _narrowed(str(path), read[0] if len(read) == 1 else concatenate_datasets(read), wanted)
    if not wanted.streaming or not isinstance(data, Dataset):
        return data
    streamed = data.to_iterable_dataset()
    files = [f["filename"] for f in data.cache_files]
    streamed.info.download_checksums = {file: {"num_bytes": Path(file).stat().st_size} for file in files}
    return streamed


def _load_hub(name: str, config: str | None, split: str | Sequence[str], wanted: Wanted) -> Dataset | IterableDataset:
    def loaded(asked: str) -> Dataset | IterableDataset:
        return load_dataset(name, config, split=asked, streaming=wanted.streaming)

    try:
        try:
            data = loaded(split if isinstance(split, str) else split[0])
        except ValueError as error:
            if not re.match("(Unknown|Bad) split", first_line(error)) or len(_parts(name, split)) > 1:
                raise
            names, part = _parts(name, split)[0]
            data = loaded(f"{choose(get_dataset_split_names(name, config), names, False, name)}{part}")
    except RefineError:
        raise
    except Exception as error:  # the network, a missing name or a configuration each raise their own kind
        raise RefineError(f"{name!r} is neither a file nor a dataset the hub gave: {first_line(error)}") from error
    return _narrowed(name, data, wanted)


def _narrowed(name: str, data: Dataset | IterableDataset, wanted: Wanted) -> Dataset | IterableDataset:
    """Select the columns that are needed. Raises RefineError where no column holds the document."""
    there = data.column_names
    if there is None:  # streamed rows do not always say their columns
        there = list(next(iter(data.take(1)), {})) if isinstance(data, IterableDataset) else []
    document = next((c for c in wanted.columns if c in there), None)
    if document is None:
        raise no_column(name, wanted.columns, there)
    needed = there if wanted.also is None else [document, *(c for c in there if c in wanted.also and c != document)]
    return data if list(needed) == list(there) else data.select_columns(list(needed))
