"""Rows of a Parquet file in batches whose size in memory is bounded, and as bytes that another process can take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hammer.errors import DataError

if TYPE_CHECKING:
    import pyarrow

MAX_BATCH_ROWS = 1024
READ_BUFFER_BYTES = 1 << 20
# The library's defaults, 100 MB and a million entries, refuse the footers of large files with many row groups.
THRIFT_LIMITS: dict[str, Any] = {
    "thrift_string_size_limit": (1 << 31) - 1,
    "thrift_container_size_limit": (1 << 31) - 1,
}


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Neighbouring rows as an Arrow stream; `end` is the number of the row behind them, counted from 0 in the file."""

    payload: bytes
    end: int


def count_rows(path: Path) -> int:
    """Return the rows of the file, from its footer."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, **THRIFT_LIMITS) as file:
            return file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from error


def read_row_batches(
    path: Path, columns: Sequence[str], batch_bytes: int, *, first_row: int, end_row: int
) -> Iterator[RowBatch]:
    """Yield rows `first_row` up to `end_row` with these columns (all columns if one is missing, to name them).

    Row groups are read through a small buffer; the rows of a batch follow from their average size in the row group.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # pyarrow's documentation: pre_buffer=False needs the least memory, and with a positive buffer_size a
        # column chunk is read through a buffer.
        # Pages may have a checksum, which pyarrow compares on demand only.
        checks = {"page_checksum_verification": True}
        options = {"pre_buffer": False, "buffer_size": READ_BUFFER_BYTES, **checks, **THRIFT_LIMITS}
        with pyarrow.parquet.ParquetFile(path, **options) as file:
            _refuse_twins(path, columns, file.schema_arrow.names)
            known = list(columns) if set(columns) <= set(file.schema_arrow.names) else None
            group_end = 0
            for group in range(file.num_row_groups):
                group_begin, group_end = group_end, group_end + file.metadata.row_group(group).num_rows
                if group_end <= first_row or group_begin >= end_row:
                    continue
                batch_rows = _count_rows_a_batch(file.metadata.row_group(group), columns, batch_bytes)
                row = group_begin
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=known, use_threads=False):
                    begin, row = row, row + batch.num_rows
                    wanted = batch[max(first_row - begin, 0) : max(min(end_row, row) - begin, 0)]
                    end = max(first_row, begin)
                    # The number of rows follows from their average size, so a batch can be larger than batch_bytes.
                    for part in _cut_batch(wanted, batch_bytes):
                        end += part.num_rows
                        yield RowBatch(_to_stream(part), end)
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from error


def _refuse_twins(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise DataError for a column of which there are two: a record has one text of each name."""
    for column in columns:
        if names.count(column) > 1:
            raise DataError(
                f"{path}: column {column} must be there once, got it {names.count(column)} times. Rename the others."
            )


def decode_parquet_rows(payload: bytes | bytearray) -> list[dict[str, Any]]:
    """Return the rows of a batch; a string that is not UTF-8 stays bytes."""
    import pyarrow

    with pyarrow.ipc.open_stream(payload) as stream:
        rows = stream.read_all()
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        # to_pylist fails for the whole batch. Cell by cell, only the bad record is reported.
        return [{name: _to_python(rows[name][row]) for name in rows.column_names} for row in range(rows.num_rows)]


def _to_python(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _count_rows_a_batch(group: Any, columns: Sequence[str], batch_bytes: int) -> int:
    chunks = [group.column(index) for index in range(group.num_columns)]
    # The uncompressed size, because the bound is for memory. The compressed size may be many times smaller.
    size_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
    return min(max(batch_bytes * group.num_rows // max(size_bytes, 1), 1), MAX_BATCH_ROWS)


def _cut_batch(batch: "pyarrow.RecordBatch", max_bytes: int) -> Iterator["pyarrow.RecordBatch"]:
    """Halve a batch in which a few rows are much larger than the average, until each part is small or one row."""
    if batch.num_rows > 1 and batch.nbytes > 2 * max_bytes:
        middle = batch.num_rows // 2
        yield from _cut_batch(batch[:middle], max_bytes)
        yield from _cut_batch(batch[middle:], max_bytes)
    elif batch.num_rows:
        yield batch


def _to_stream(batch: "pyarrow.RecordBatch") -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: file must be Parquet, got one that does not parse ({error}). Write it again.")
