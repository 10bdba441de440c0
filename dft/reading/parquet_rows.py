"""Read the rows of a Parquet file, and refuse those that would take too much memory before they do.

A value that many rows share stands in a file once, in a dictionary, so that a file of some kilobytes can hold rows of
gigabytes. Texts are therefore read as they are stored, a dictionary and the places in it, and the size of each row is
computed from that, before anything is copied.

Shapes: n rows or values of an array.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from dft.reading.json_rows import MAX_ROW_BYTES
from dft.reading.rows import RawRow

ROWS_AT_ONCE = 4096  # read at once, where they are small
BYTES_AT_ONCE = 16 << 20  # of rows as they are stored, of the average size in their row group
DECODED_BYTES = 64 << 20  # of rows that are copied at once, or a single row
BUFFER_BYTES = 1 << 20
VALUE_BYTES = 64  # what a value or an item of a list takes in Python, besides its text
MAX_VALUES = 1 << 28  # of a column in a row group: the places of so many take a GiB
MAX_UNPACKED, MAX_RATIO = 1 << 30, 1000  # bytes of a column in a row group, and how often its compressed bytes
UNDECODABLE = (ValueError, OverflowError, pyarrow.ArrowException)  # a text that isn't UTF-8, a date beyond Python's
TOO_LARGE = f"a row of more than {MAX_ROW_BYTES >> 20} MiB"


def parquet_rows(path: str) -> Iterator[RawRow]:
    """Reads the rows of one file.

    Raises:
        ValueError, pyarrow.ArrowException, OSError: the file, or the rest of it, can't be read.
    """
    # pre_buffer=True would hold whole row groups in memory
    options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with pyarrow.parquet.ParquetFile(path, **options) as file:
        schema, columns = file.schema_arrow, list(map(file.schema.column, range(len(file.schema))))
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"two columns have the same name: {', '.join(schema.names)}")
    schema = pyarrow.schema([field.with_type(_castable(field.type)) for field in schema])
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    line = 0
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts, **options) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            _check_group(group)
            row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            size = min(ROWS_AT_ONCE, max(1, BYTES_AT_ONCE // row_bytes))
            for batch in file.iter_batches(size, row_groups=[number]):
                for row in _rows(batch, schema):
                    line += 1
                    row.line = line
                    yield row


def _check_group(group: pyarrow.parquet.RowGroupMetaData) -> None:
    """Raises ValueError where a row group would take gigabytes, though it is small in the file."""
    for column in map(group.column, range(group.num_columns)):
        unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
        if column.num_values > MAX_VALUES or unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
            raise ValueError(
                f"{column.path_in_schema}: {column.num_values:,} values and {unpacked:,} bytes in a row group of "
                f"{packed:,} compressed bytes"
            )


def _rows(batch: pyarrow.RecordBatch, schema: pyarrow.Schema) -> Iterator[RawRow]:
    """The rows of a batch whose texts are dictionaries, without numbers."""
    sizes = bytes_of(pyarrow.StructArray.from_arrays(batch.columns, fields=list(batch.schema)))
    # rows that are copied together: as many as fit into DECODED_BYTES; a row that is refused is alone
    shares = (np.cumsum(sizes) // DECODED_BYTES).tolist()
    keys = [(share, index if sizes[index] > MAX_ROW_BYTES else -1) for index, share in enumerate(shares)]
    start = 0
    for (_, refused), same in groupby(keys):
        length = len(list(same))
        if refused >= 0:
            yield RawRow(0, "", reason="row_too_long", detail=TOO_LARGE)
        else:
            # take, unlike slice, leaves out the items of lists that belong to other rows
            rows = batch if length == len(batch) else batch.take(pyarrow.array(range(start, start + length)))
            yield from _values(rows.cast(schema))
        start += length


def _values(rows: pyarrow.RecordBatch) -> Iterator[RawRow]:
    """The rows as objects of Python; one by one if some can't be, and then these are refused alone."""
    try:
        values = rows.to_pylist()
    except UNDECODABLE as error:
        if len(rows) > 1:
            for index in range(len(rows)):
                yield from _values(rows.slice(index, 1))
        else:
            reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "unreadable_value"
            yield RawRow(0, "", reason=reason, detail=f"a value can't be read: {error}")
        return
    yield from (RawRow(0, "", value) for value in values)


def _castable(kind: pyarrow.DataType) -> pyarrow.DataType:
    """A type with the same values, to which texts from a dictionary can be cast: without views.

    Raises:
        ValueError: a list is a view, of which pyarrow makes invalid arrays.
    """
    if types.is_string_view(kind):
        return pyarrow.large_string()
    if types.is_binary_view(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_castable(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_castable(kind.key_type), _castable(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_castable(kind.value_type), kind.list_size)
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        raise ValueError(f"a column has the type {kind}, which isn't supported: write it as a list")
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_castable(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_castable(kind.value_type)))
    return kind


def bytes_of(array: pyarrow.Array) -> np.ndarray:
    """About what each value of an array takes as an object of Python, int64 [n]."""
    kind = array.type
    if types.is_dictionary(kind):
        lengths = np.append(bytes_of(array.dictionary), VALUE_BYTES)
        return lengths[_numbers(array.indices, len(array.dictionary))]
    if types.is_struct(kind):
        fields = map(bytes_of, array.flatten())  # unlike field(), it heeds where a slice begins
        return sum(fields, np.full(len(array), VALUE_BYTES))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        items = [array.keys, array.items] if types.is_map(kind) else [array.values]
        before = np.append(0, np.cumsum(sum(map(bytes_of, items))))  # [items + 1]
        return VALUE_BYTES + np.diff(before[_numbers(array.offsets, 0)])
    if types.is_fixed_size_list(kind):
        lengths = pyarrow.compute.list_value_length(array)
        items = pyarrow.compute.list_flatten(array)
        before = np.append(0, np.cumsum(bytes_of(items)))
        return VALUE_BYTES + np.diff(before[np.append(0, np.cumsum(_numbers(lengths, 0)))])
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return VALUE_BYTES + _numbers(pyarrow.compute.binary_length(array), 0)
    return np.full(len(array), VALUE_BYTES)


def _numbers(array: pyarrow.Array, null: int) -> np.ndarray:
    """An array of numbers as int64, with another number for null."""
    return pyarrow.compute.fill_null(array, null).to_numpy(zero_copy_only=False).astype(np.int64)
