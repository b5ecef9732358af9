"""Read parquet shards row by row.

Streams page by page with bounded memory, and reads only the columns of text and domain. A text that is not UTF-8 is a
bad line. pyarrow is needed for parquet only.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from megashear.errors import DataError
from megashear.preprocess.shard_files import EXCERPT, LONGEST_LINE, BadLine, Document, ShardPiece

ROWS = 64  # rows decoded at a time
BUFFER = 1 << 20  # bytes read at a time, per column


def parquet_rows(
    piece: ShardPiece, text_key: str, keys: Sequence[str], on_bytes: Callable[[int], None]
) -> Iterator[Document | BadLine]:
    """Yield every row of a parquet file, or of a piece's row groups, numbered from 1.

    keys: columns to keep in a document's record beside the text, where the file has them (of a dotted key, the first
    name); on_bytes is told how far the file has been read, in bytes. Raises DataError where pyarrow is not installed,
    the file cannot be read, is truncated or damaged, or has no column of text.
    """
    path = piece.path
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: parquet needs pyarrow, which is not installed; pip install pyarrow") from error
    number, size = 0, 0
    try:
        size = piece.share(path.stat().st_size)[1] - piece.share(path.stat().st_size)[0]
        with ParquetFile(path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True) as file:
            columns = chosen_columns(file.schema_arrow, path, text_key, keys)
            groups = range(*piece.share(file.metadata.num_row_groups))
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            batches = file.iter_batches(ROWS, row_groups=list(groups), columns=columns, use_threads=False)
            for batch in batches if groups else ():
                number += batch.num_rows
                on_bytes(size * number // rows)
                yield from batch_rows(batch, number - batch.num_rows, text_key)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
        raise damaged(path, error) from error
    except pyarrow.ArrowException as error:
        raise damaged(path, error) from error
    if number != rows:
        raise DataError(f"{path}: {number} rows read, its footer says {rows}; the file is damaged, fetch it again")
    on_bytes(size)


def damaged(path: Path, error: Exception) -> DataError:
    """The message for a file that pyarrow cannot decode."""
    reason = " ".join(str(error).split())[:EXCERPT]
    return DataError(f"{path}: truncated or damaged parquet ({reason}); fetch it again")


def chosen_columns(schema: "pyarrow.Schema", path: Path, text_key: str, keys: Sequence[str]) -> list[str]:
    """Columns to read; raises DataError where the text's column is missing or holds no strings."""
    import pyarrow.types as types

    if schema.names.count(text_key) != 1:
        raise DataError(f"{path}: no one column {text_key!r} (it has {', '.join(schema.names)}); give --text-key")
    kind = schema.field(text_key).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(kind) for test in tests):
        raise DataError(f"{path}: the column {text_key!r} is of type {kind}, not a string; give --text-key")
    return [text_key, *dict.fromkeys(name for key in keys if (name := key.split(".")[0]) in schema.names)]


def batch_rows(batch: "pyarrow.RecordBatch", before: int, text_key: str) -> Iterator[Document | BadLine]:
    """Documents and bad lines of one batch; `before` rows came earlier."""
    text_N = binary(batch.column(0)).to_pylist()
    names = batch.schema.names[1:]
    value_KN = [column_values(batch.column(1 + place)) for place in range(len(names))]
    for row, raw in enumerate(text_N):
        number, problem, text = before + row + 1, "", ""
        if raw is None:
            problem = f"field {text_key!r} is null"
        elif len(raw) > LONGEST_LINE:
            problem = f"longer than {LONGEST_LINE} bytes"
        else:
            text, problem = decode(raw)
        record: dict[str, Any] = {text_key: text}
        for name, value_N in zip(names, value_KN, strict=True):
            record[name] = value_N[row]
            if isinstance(record[name], UnicodeDecodeError):
                problem = problem or f"field {name!r} is not UTF-8"
        if problem:
            yield BadLine(number, problem, (raw or b"")[:EXCERPT].decode("utf-8", "replace"))
        else:
            yield Document(number, text, record)


def decode(raw: bytes) -> tuple[str, str]:
    """A text, or why it is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start})"
    return text, "" if text.strip() else "empty text"


def binary(column: "pyarrow.Array") -> "pyarrow.Array":
    """A column of strings as bytes: pyarrow does not check that strings are UTF-8 when it reads them."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


def column_values(column: "pyarrow.Array") -> list[Any]:
    """Values as Python objects; the UnicodeDecodeError in place of one that cannot be decoded."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [one_value(value) for value in column]


def one_value(value: "pyarrow.Scalar") -> Any:
    """A value as a Python object, or its UnicodeDecodeError."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error
