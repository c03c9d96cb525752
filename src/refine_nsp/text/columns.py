"""Find the types of the columns that are needed of several files, and read the files as Arrow tables of just these columns.

Columns that nobody asked for are never looked at, so they may differ from file to file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from refine_nsp.errors import RefineError
from refine_nsp.text.formats import Row, format_of, opened, place, read_text, rows_of, say

LOOK_ROWS = 100  # rows of a file that are looked at, for the types of its columns, before it is streamed
MOST_LOOKED = 10_000  # as many are looked at while a column is still without values
TABLE_ROWS, TABLE_CHARACTERS = 1000, 2**23  # a table made of json or csv has at most so many
PARQUET_ROWS = 256  # rows of a batch
MISFITS = (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError)

JSON_TYPE: type[pa.DataType] | tuple[()] = vars(pa).get("JsonType", ())  # earlier releases of pyarrow have no such type

Types = dict[str, pa.DataType | None]  # by column; None: its values are of several types


@dataclass(frozen=True)
class Wanted:
    """Say which columns are read, and how; see `read_documents`.

    Attributes:
        read_ahead: bytes of a text that are looked at before the rest is streamed; None: everything is read at once.
        of_any_type: whether a column may hold values of several types (`as_found`).
    """

    columns: tuple[str, ...]
    also: tuple[str, ...] | None = ()
    read_ahead: int | None = None
    of_any_type: bool = False

    @property
    def streaming(self) -> bool:
        return self.read_ahead is not None

    def names(self, there: Iterable[str]) -> list[str]:
        """Select the names of a file's columns that may be needed."""
        return [name for name in there if self.also is None or name in self.columns or name in self.also]


def types_of(file: Path, wanted: Wanted) -> Types:
    """Find the types of the columns of a file that may be needed. Raises RefineError where it cannot be read."""
    kind = format_of(file)
    if kind == "text":
        if wanted.streaming:
            read_text(file, wanted.read_ahead)  # a file that is no text is refused before a run begins
        return {"text": pa.string()}
    if kind == "csv":
        first = next(rows_of(file, wanted.columns), None)
        return dict.fromkeys(wanted.names(first[2] if first else ()), pa.string())
    if kind == "json":
        return _types_of_rows(file, wanted)
    with _arrow(file) as (schema, _):
        return {name: plain(schema.field(name).type) for name in wanted.names(schema.names)}


def _types_of_rows(file: Path, wanted: Wanted) -> Types:
    """Find the types of a json file's columns by its first rows, up to where each column asked for by name has had a value.

    All rows are looked at where all columns are wanted and the file is not streamed: then it is read whole anyway.
    """
    rows, types, looked = rows_of(file, wanted.columns), Types(), 0
    while part := [row for _, _, row in islice(rows, LOOK_ROWS)]:
        for name in wanted.names(dict.fromkeys(name for row in part for name in row)):
            types[name] = merged(types.get(name, pa.null()), _type_of_values([row.get(name) for row in part], wanted.of_any_type))
        looked += len(part)
        documents = [types[name] for name in wanted.columns if name in types and not _unknown(types[name])]
        known = bool(documents) and not any(_unknown(types[name]) for name in types if name in (wanted.also or ()))
        settled = looked >= MOST_LOOKED or not any(map(_unknown, types.values()))
        text_or_ids = any(d == pa.string() or (pa.types.is_list(d) and pa.types.is_integer(d.value_type)) for d in documents if d)
        if known and (settled if wanted.streaming else wanted.also == () and text_or_ids):
            break
    return types


def _type_of_values(values: Sequence[object], of_any_type: bool = False) -> pa.DataType | None:
    try:
        return pa.array(values).type
    except MISFITS:
        kinds = set() if of_any_type else set(map(type, values))
        return pa.string() if str in kinds and dict not in kinds else None


def _unknown(found: pa.DataType | None) -> bool:
    """Tell whether no value has said yet of which type a column is. None, which stands for several types, is known."""
    return found is not None and (pa.types.is_null(found) or (pa.types.is_list(found) and pa.types.is_null(found.value_type)))


def plain(found: pa.DataType) -> pa.DataType:
    """Return the ordinary form of a type: text that is dictionary-encoded, large or a view is text."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return pa.string()
    lists = pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found) or pa.types.is_list(found)
    return pa.list_(plain(found.value_type)) if lists else found


def merged(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    """Return a type that holds the values of both, such as numbers with and without a point; None where there is none."""
    if a is None or b is None:
        return None
    try:
        schemas = [pa.schema([("x", a)]), pa.schema([("x", b)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except (pa.ArrowException, TypeError):
        return None


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_binary(found) or pa.types.is_large_binary(found)


def schema_of(types: Mapping[Path, Types], wanted: Wanted) -> tuple[pa.Schema, list[tuple[str, str]]]:
    """Return the columns to read, the document's first, and the columns left out because their values disagree, with the first such."""
    there = {name: None for of_file in types.values() for name in of_file}
    document = next(name for name in wanted.columns if name in there)
    any_type = pa.json_() if wanted.of_any_type and hasattr(datasets, "Json") else None
    of_several = any_type is not None and _type_of_files(document, types) is None
    fields: list[tuple[str, pa.DataType]] = [(document, any_type if of_several else _document_type(document, types))]
    left_out = []
    for name in (n for n in there if n != document and (wanted.also is None or n in wanted.also)):
        found = _type_of_files(name, types)
        if found is None:
            found = any_type
        if found is not None:
            fields.append((name, found))
        else:
            left_out.append((f"column {name!r}", _disagreement(name, list(types), wanted)))
    return pa.schema(fields), left_out


def _type_of_files(name: str, types: Mapping[Path, Types]) -> pa.DataType | None:
    """Return the type that holds a column's values in all files; None where they are of several types."""
    return functools.reduce(merged, (of_file.get(name, pa.null()) for of_file in types.values()), pa.null())


def _document_type(name: str, types: Mapping[Path, Types]) -> pa.DataType:
    """Return the document's type: text where any file has text, so that an error names a value that is not text, not the text."""
    found: list[pa.DataType | None] = [of_file[name] for of_file in types.values() if name in of_file]
    if any(f is None or _is_text(f) for f in found):
        return pa.string()
    if all(pa.types.is_list(f) or pa.types.is_null(f) for f in found) and any(pa.types.is_list(f) for f in found):
        together = functools.reduce(merged, found, pa.null())
        of = together.value_type if together is not None and pa.types.is_list(together) else pa.null()
        return together if pa.types.is_integer(of) or pa.types.is_struct(of) else pa.list_(pa.int64())  # tokens, messages
    return pa.string()


def _disagreement(name: str, files: Sequence[Path], wanted: Wanted) -> str:
    """Name the place of the first value of a column whose type does not agree with the values before it."""
    found: pa.DataType | None = pa.null()
    for file in files:
        for number, line, row in every_row(file, name, wanted):
            before, found = found, merged(found, _type_of_values([row.get(name)]))
            if found is None:
                return f"{place(file, number, line)} holds {shown(row[name])}, and the rows before {before}"
    return "its values are of several types"


def every_row(file: Path, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yield all rows of a file of any format, to find a wrong one for an error message."""
    if format_of(file) in ("json", "csv"):
        yield from rows_of(file, wanted.columns)
    elif format_of(file) == "text":
        yield 0, 0, {"text": read_text(file)}
    else:
        with _arrow(file) as (_, batches):
            values = (value for batch in batches([name]) if name in batch.schema.names for value in batch.column(name))
            yield from ((number, 0, {name: value.as_py()}) for number, value in enumerate(values))


def shown(value: object) -> str:
    """Show a value in an error: its beginning, and its type."""
    return f"{str(value)[:60]!r}, a {type(value).__name__}"


def tables_of(file: Path, schema: pa.Schema, wanted: Wanted) -> Iterator[pa.Table]:
    """Yield a file's rows as tables of `schema`, whose first column is the document's. Raises RefineError for a value that does not fit."""
    kind = format_of(file)
    if kind == "text":
        yield pa.table({name: [read_text(file)] if name == "text" else [None] for name in schema.names}, schema=schema)
    elif kind in ("json", "csv"):
        yield from _tables_of_rows(file, schema, wanted)
    else:
        number = 0
        with _arrow(file) as (_, batches):
            for batch in batches(schema.names):
                columns = [_fitting(batch, field, file, number, i == 0) for i, field in enumerate(schema)]
                yield pa.Table.from_arrays(columns, schema=schema)
                number += len(batch)


def _tables_of_rows(file: Path, schema: pa.Schema, wanted: Wanted) -> Iterator[pa.Table]:
    document, part, characters = schema.names[0], [], 0
    for row in rows_of(file, wanted.columns):
        part.append(row)
        value = row[2].get(document)
        characters += len(value) if isinstance(value, str | list) else 0
        if len(part) == TABLE_ROWS or characters > TABLE_CHARACTERS:
            yield _table(part, schema, file, wanted)
            part, characters = [], 0
    if part:
        yield _table(part, schema, file, wanted)


def _table(rows: Sequence[Row], schema: pa.Schema, file: Path, wanted: Wanted) -> pa.Table:
    columns = []
    for field in schema:
        values = [row.get(field.name) for _, _, row in rows]
        try:
            columns.append(_array(values, field.type))
        except MISFITS:
            columns.append(_array(_fitting_values(values, rows, field, file, wanted), field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _fitting_values(values: Sequence[object], rows: Sequence[Row], field: pa.Field, file: Path, wanted: Wanted) -> list[object]:
    """Replace values that are not of their column's type by None. Raises RefineError for one in the document's column."""
    fits = [_fits(value, field.type) for value in values]
    if all(fits):  # each value fits by itself though not together, as True among whole numbers
        return [_array([value], field.type)[0].as_py() for value in values]
    at = fits.index(False)
    error = misfit(place(file, *rows[at][:2]), field, values[at], field.name in wanted.columns)
    if field.name in wanted.columns:
        raise error
    say(f"{str(error).split(';')[0]}, where the first rows have {field.type}: read as missing, as are others like it")
    return [value if fit else None for value, fit in zip(values, fits, strict=True)]


def _array(values: Sequence[object], wanted: pa.DataType) -> pa.Array:
    """Make an array of values, in two steps, because Arrow makes 1 of 1.5 where it is told to make whole numbers."""
    if pa.types.is_string(wanted):
        return pa.array(values, wanted)
    if isinstance(wanted, JSON_TYPE):
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.ExtensionArray.from_storage(wanted, pa.array(texts, wanted.storage_type))
    found = pa.array(values)
    return found if found.type == wanted else _cast(found, wanted)


def _cast(found: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Convert values to a type that holds all of them. Raises one of MISFITS where it does not."""
    # Arrow itself would drop fields that the type lacks.
    if pa.types.is_nested(wanted) and merged(wanted, plain(found.type)) != wanted:
        raise pa.ArrowInvalid(f"{found.type} is not {wanted}")
    try:
        return found.cast(wanted)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        # Arrow cannot cast structs to ones with more fields. Built from plain values, they get nulls in those.
        return pa.array(found.to_pylist(), wanted)


def _fits(value: object, wanted: pa.DataType) -> bool:
    """Tell whether a value, plain or of Arrow, is of a type."""
    try:
        _cast(pa.array([value.as_py()], value.type), wanted) if isinstance(value, pa.Scalar) else _array([value], wanted)
    except MISFITS:
        return False
    return True


def misfit(where: str, field: pa.Field, value: object, is_document_column: bool) -> RefineError:
    """Make the error of a value that is not of its column's type."""
    seen = f"{where}: column {field.name!r} holds {shown(value)}"
    if is_document_column and isinstance(value, str) and pa.types.is_string(field.type):
        return RefineError(f"{seen}, with half a surrogate pair in it, which is no character")
    expected = "text in every row, or token ids in every row" if is_document_column else f"{field.type}, as in the rows looked at"
    return RefineError(f"{seen}; expected {expected}")


def _fitting(batch: pa.RecordBatch, field: pa.Field, file: Path, start: int, is_document_column: bool) -> pa.Array:
    """Convert a column of a parquet or arrow file, nulls where there is none, to the type of `field`; `start` is the batch's first row."""
    if field.name not in batch.schema.names:
        return pa.nulls(len(batch), field.type)
    column = batch.column(field.name)
    if column.type == field.type:
        return column
    if isinstance(field.type, JSON_TYPE):
        return _array(column.to_pylist(), field.type)
    found = plain(column.type)
    if pa.types.is_string(field.type) and not (_is_text(found) or pa.types.is_null(found)):
        at = next((i for i, value in enumerate(column) if value.is_valid), None)
        if at is None:
            return pa.nulls(len(batch), field.type)
        raise misfit(place(file, start + at), field, column[at].as_py(), True)
    try:
        return _cast(column, field.type)
    except MISFITS:
        at = next((i for i, value in enumerate(column) if not _fits(value, field.type)), 0)
        raise misfit(place(file, start + at), field, column[at].as_py(), is_document_column) from None


@contextmanager
def _arrow(file: Path) -> Iterator[tuple[pa.Schema, Callable[[Sequence[str]], Iterator[pa.RecordBatch]]]]:
    """Open a parquet or arrow file: give its schema, and a function that yields its batches with the columns named, where it has them."""
    with opened(file) as stream:
        if format_of(file) == "parquet":
            parquet = pq.ParquetFile(stream)
            schema = parquet.schema_arrow

            def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
                return parquet.iter_batches(PARQUET_ROWS, columns=[n for n in names if n in schema.names])
        else:
            parts: Iterable[pa.RecordBatch]
            try:
                parts = reader = pa.ipc.open_stream(stream)
            except pa.ArrowInvalid:
                stream.seek(0)
                reader = pa.ipc.open_file(stream)
                parts = map(reader.get_batch, range(reader.num_record_batches))
            schema = reader.schema

            def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
                return (part.select([n for n in names if n in schema.names]) for part in parts)

        yield schema, batches
