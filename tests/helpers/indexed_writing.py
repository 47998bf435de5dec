"""Documents written one by one, as tests spell them out."""

from collections.abc import Sequence

import numpy as np

from megatron_hammer.data.indexed.pair_writer import IndexedWriter


def add_document(writer: IndexedWriter, ids: np.ndarray, sequence_lengths: Sequence[int] | None = None) -> None:
    """Add one document: of one sequence, or of several whose lengths add up to `ids`."""
    if sequence_lengths is None:
        sequence_lengths = (len(ids),) if len(ids) else ()
    lengths = np.array(sequence_lengths, dtype=np.int64)
    writer.add_documents(ids, lengths, np.array([len(lengths)]))
