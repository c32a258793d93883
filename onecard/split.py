"""Documents go into the val split if their hash is below a limit, which is computed first.

A hash is like a random number from 0 to 2**64, and equal documents have equal ones, so no text
comes into both splits.
"""
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onecard import documents, encoder
from onecard.settings import UserError

ENOUGH = 20                             # documents; expecting 20, there are none with chance e**-20
MOST = 1 << 20                          # different documents after which estimate() stops


def val_limit(paths, cfg):
    """The limit, a uint64, for the documents of these files. `cfg` has prepare.py's settings."""
    n_different, share = estimate(paths, cfg)
    if n_different * min(share, 1 - share) >= ENOUGH:
        return np.uint64(share * 2**64)
    # few documents: exactly their share, and at least one of each split
    columns = documents.batches(paths, cfg.text_column, Counter())
    hashes = [batch.hashes for batch in encoder.encode(columns, cfg)]
    different = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    n = len(different)
    if n < 2:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: different documents: {n}. Train and val need one each, so give "
                        "more text, or text to validate on by --val=FILE")
    n_val = min(max(round(share * n), 1), n - 1)
    return different[n_val]


def estimate(paths, cfg):
    """(different documents, share for val), by as much of the text as the answer needs."""
    different, n_bytes, share = set(), 0, cfg.val_fraction
    for texts in documents.batches(paths, cfg.text_column, Counter()):
        n_bytes += pc.sum(pc.binary_length(texts)).as_py()
        different.update(map(hash, texts.cast(pa.large_binary()).to_pylist()))
        share = cfg.val_fraction or documents.val_share(n_bytes)
        is_final = share in (cfg.val_fraction, documents.VAL_FRACTION)
        is_enough = len(different) * min(share, 1 - share) >= ENOUGH
        if (is_final and is_enough) or len(different) > MOST:
            break
    return len(different), share
