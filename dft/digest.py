"""A hash of tokenized rows."""

import hashlib

import numpy as np
from datasets import Dataset

ROWS_AT_ONCE = 1000


def digest_of_rows(rows: Dataset) -> str:
    """A hash of the tokens, labels and loss weights of all rows in their order, 16 hexadecimal digits.

    1e8 tokens take some 3 seconds.
    """
    columns = [name for name in ("input_ids", "labels", "loss_weights") if name in rows.column_names]
    digest = hashlib.blake2b(",".join(columns).encode(), digest_size=8)
    for batch in rows.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        for name in columns:
            column = batch[name].combine_chunks()
            digest.update(np.diff(column.offsets.to_numpy()).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
