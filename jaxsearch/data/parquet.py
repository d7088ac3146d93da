"""Rows of a Parquet file as the JSON values of records, with bounds on what a file may unpack to.

A process of its own reads the file: a damaged footer can end pyarrow's process (an uncaught C++ exception in 26.0.1), and only a process
can be held to an amount of memory, whatever the file says of itself. The rows come back as JSON lines.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsearch.data.jsonl import MAX_LINE_BYTES, BadRow, printable
from jaxsearch.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 512
MAX_MEMORY_BYTES = 3 << 30
"""Address space of the process that reads a file."""
MAX_CHUNK_BYTES = 64_000_000
"""What one column of a row group may unpack to where that is more than `MAX_RATIO` times what is stored."""
MAX_RATIO = 100
MAX_EXPANSION = 1000
"""What all rows together may unpack to, in sizes of the file, where that is more than a gigabyte."""
MAX_ENTRIES = 1 << 24
"""Values of one column in one row group, where a row has more than a thousand of them on average."""


class ParquetError(InputError):
    """A file is no Parquet, is damaged, has other columns than the records, or unpacks to too much."""


@dataclass(frozen=True)
class Column:
    """What one field of a record may be in Parquet."""

    leaf: str
    """"text", "number", "whole number" or "true or false"."""
    mapping: bool = False
    """Whether it is a struct or a map from text to `leaf`."""
    required: bool = False
    time: bool = False
    """Whether a timestamp is as good as text."""

    def __str__(self) -> str:
        kind = f"a struct or a map from text, with {self.leaf} values" if self.mapping else self.leaf
        return f"{kind}, or a timestamp" if self.time else kind


def read_rows(
    path: str | os.PathLike[str], columns: Mapping[str, Column]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(row number from 1, values or `BadRow`) of each row, in batches: never the whole file.

    Nulls are left out, as an absent key is in JSON, but not where the values are true or false: there null means "not eligible".
    A row of more than `MAX_LINE_BYTES` is refused before it is converted.

    Args:
      columns: what each field may be; others are refused.

    Raises:
      ParquetError: the file cannot be used; rows yielded before are good.
    """
    specs = json.dumps({name: dataclasses.asdict(column) for name, column in columns.items()})
    command = [sys.executable, "-P", "-m", "jaxsearch.data.parquet", os.path.abspath(path), specs]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    ) as reader:
        assert reader.stdout is not None
        try:
            for line in reader.stdout:
                number, values, problem = json.loads(line)
                if number is None:
                    if problem:
                        raise ParquetError(problem)
                    return
                yield number, BadRow(**problem) if problem else values
        finally:
            reader.kill()
    raise ParquetError(f"damaged, or needs too much memory: its reader ended with status {reader.returncode}")


def _environment() -> dict[str, str]:
    """This package first; one thread and plain malloc, which reserve no address space in advance."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _write_rows(path: str, specs: str) -> None:
    """What the reading process does: one JSON line [row, values, problem] a row, then [null, null, problem of the file or null]."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    columns = {name: Column(**spec) for name, spec in json.loads(specs).items()}
    last: list[Any] = [None, None, None]
    try:
        for number, row in _unpack(path, columns):
            problem = dataclasses.asdict(row) if isinstance(row, BadRow) else None
            print(json.dumps([number, None if problem else row, problem], ensure_ascii=False))
    except ParquetError as error:
        last[2] = str(error)
    print(json.dumps(last), flush=True)


def _unpack(path: str, columns: Mapping[str, Column]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ParquetError("reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        footer = pq.read_metadata(path)
        _check_sizes(footer)
        _check_schema(footer.schema.to_arrow_schema(), columns)
        # Strings stay references into a dictionary: a long one that occurs in a million rows is held once.
        leaves = [footer.schema.column(i) for i in range(footer.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        with pq.ParquetFile(
            path, metadata=footer, read_dictionary=texts, pre_buffer=False, buffer_size=1 << 20
        ) as file:
            start = unpacked = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                sizes = sum((_row_bytes(column) for column in batch.columns), np.zeros(len(batch), np.int64))
                unpacked += int(sizes.sum())
                if unpacked > max(1e9, MAX_EXPANSION * os.path.getsize(path)):
                    raise ParquetError(
                        f"its rows unpack to more than {MAX_EXPANSION} times its size (row {start + 1:,})"
                    )
                yield from _rows(batch, sizes, start, columns)
                start += len(batch)
    except ParquetError:
        raise
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise ParquetError(f"no Parquet, or damaged: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0])


def _check_sizes(footer: Any) -> None:
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            stored, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            name = printable(chunk.path_in_schema)
            if unpacked > MAX_CHUNK_BYTES and unpacked > MAX_RATIO * max(stored, 1):
                raise ParquetError(
                    f"column {name} unpacks from {stored:,} to {unpacked:,} bytes: write smaller row groups"
                )
            if chunk.num_values > max(MAX_ENTRIES, 1000 * group.num_rows):
                raise ParquetError(
                    f"column {name} has {chunk.num_values:,} values in {group.num_rows:,} rows: write smaller row groups"
                )


def _check_schema(schema: "pa.Schema", columns: Mapping[str, Column]) -> None:
    for name in schema.names:
        if name not in columns:
            raise ParquetError(f"column {printable(repr(name))} is unknown; known are {', '.join(columns)}")
        if schema.names.count(name) > 1:
            raise ParquetError(f"column {name} occurs twice; keep one")
    for name, column in columns.items():
        if name not in schema.names:
            if column.required:
                raise ParquetError(f"column {name} is missing: it is required ({column})")
        elif not _fits(found := schema.field(name).type, column):
            raise ParquetError(f"column {name} has type {printable(str(found))}: use {column}")


def _fits(found: "pa.DataType", column: Column) -> bool:
    from pyarrow import types

    if types.is_null(found) or (column.time and types.is_timestamp(found)):
        return True
    if not column.mapping:
        return _leaf(found, column.leaf)
    if types.is_struct(found):
        names = [found.field(i).name for i in range(found.num_fields)]
        return len(set(names)) == len(names) and all(
            _leaf(found.field(i).type, column.leaf) for i in range(found.num_fields)
        )
    return types.is_map(found) and _leaf(found.key_type, "text") and _leaf(found.item_type, column.leaf)


def _leaf(found: "pa.DataType", leaf: str) -> bool:
    from pyarrow import types

    if types.is_dictionary(found):
        found = found.value_type
    if leaf == "text":
        return types.is_string(found) or types.is_large_string(found) or types.is_null(found)
    if leaf == "true or false":
        return types.is_boolean(found) or types.is_null(found)
    if leaf == "number" and types.is_floating(found):
        return True
    return types.is_integer(found) or types.is_null(found)


def _rows(
    batch: "pa.RecordBatch", sizes: np.ndarray, start: int, columns: Mapping[str, Column]
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Rows of one batch, converted in slices of at most `MAX_LINE_BYTES`; `sizes` is int64 [rows]."""
    row = 0
    while row < len(batch):
        if sizes[row] > MAX_LINE_BYTES:
            reason = f"the row has {sizes[row]:,} bytes: more than {MAX_LINE_BYTES:,} bytes"
            yield start + row + 1, BadRow("line too long", reason)
            row += 1
            continue
        fitting = int(np.searchsorted(np.cumsum(sizes[row:]), MAX_LINE_BYTES, side="right"))
        part = batch.slice(row, fitting)
        for offset, values in enumerate(_convert(part, columns)):
            yield start + row + offset + 1, values
        row += fitting


def _row_bytes(array: "pa.Array") -> np.ndarray:
    """int64 [rows]: about what each row takes, from lengths alone."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(array.type):
        if not len(array.dictionary):
            return np.zeros(len(array), np.int64)
        lengths = _row_bytes(array.dictionary)
        return lengths[pc.fill_null(array.indices, 0).to_numpy(zero_copy_only=False)]
    if types.is_string(array.type) or types.is_large_string(array.type):
        lengths = pc.fill_null(pc.binary_length(array), 0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    if types.is_struct(array.type):
        return sum((_row_bytes(part) for part in array.flatten()), np.zeros(len(array), np.int64))
    if types.is_map(array.type):
        first, last = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
        entries = sum(_row_bytes(part.slice(first, last - first)) for part in (array.keys, array.items))
        total = np.concatenate([[0], np.cumsum(entries + 16)])
        offsets = array.offsets.to_numpy(zero_copy_only=False) - first
        return total[offsets[1:]] - total[offsets[:-1]]
    assert isinstance(array, pa.Array)
    return np.full(len(array), 8, np.int64)


def _convert(batch: "pa.RecordBatch", columns: Mapping[str, Column]) -> Sequence[dict[str, Any] | BadRow]:
    """Values of each row; where the batch as a whole cannot be converted, row by row, so that the bad row is named."""
    try:
        values = {name: _values(batch[name], columns[name]) for name in batch.schema.names}
    except UnicodeDecodeError as error:
        problem = BadRow("not UTF-8", f"a text is not UTF-8 ({error.reason})")
    except KeyError as error:
        problem = BadRow("duplicate key", f"a key occurs twice in one map; keep one ({_first_line(error)})")
    except (ValueError, OverflowError, ArithmeticError) as error:
        problem = BadRow("bad value", _first_line(error))
    else:
        return [
            {name: cells[row] for name, cells in values.items() if cells[row] is not None}
            for row in range(len(batch))
        ]
    if len(batch) == 1:
        return [problem]
    return [_convert(batch.slice(row, 1), columns)[0] for row in range(len(batch))]


def _values(array: "pa.Array", column: Column) -> list[Any]:
    from pyarrow import types

    if types.is_timestamp(array.type):
        return [None if time is None else _iso(time) for time in _times(array)]
    values = array.to_pylist(maps_as_pydicts="strict")
    if types.is_struct(array.type) and column.leaf != "true or false":
        return [
            None if value is None else {key: leaf for key, leaf in value.items() if leaf is not None}
            for value in values
        ]
    return values


def _times(array: "pa.Array") -> list[datetime | None]:
    import pyarrow as pa

    # Without its zone Arrow's time is UTC, and microseconds are what Python has.
    return array.cast(pa.timestamp(array.type.unit)).cast(pa.timestamp("us"), safe=False).to_pylist()


def _iso(time: datetime) -> str:
    return time.replace(tzinfo=UTC).isoformat().replace("+00:00", "Z")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    _write_rows(*sys.argv[1:])
