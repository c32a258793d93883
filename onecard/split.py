"""Documents go into the val split if their hash is below a limit, which is computed first.

A hash is like a random number from 0 to 2**64, and equal documents have equal ones, so no text
comes into both splits.
"""
from collections import Counter

import pyarrow.compute as pc

from onecard import documents, encoder
from onecard.settings import UserError

ENOUGH = 20                             # documents; expecting 20, there are none with chance e**-20


def val_hash_limit(paths, cfg):
    """The limit for the documents of these files. `cfg` has prepare.py's settings."""
    share, n_smaller = estimate(paths, cfg)
    if n_smaller >= ENOUGH:
        return int(share * 2**64)
    # few documents: exactly their share, and at least one of each split
    hashes = set()
    for batch in encoder.encode(documents.batches(paths, cfg.text_column, Counter()), cfg):
        hashes.update(batch.hashes.tolist())
    n = len(hashes)
    if n < 2:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: different documents: {n}. Train and val need one each, so give "
                        "more text, or text to validate on by --val=FILE")
    n_val = min(max(round(share * n), 1), n - 1)
    return sorted(hashes)[n_val]


def estimate(paths, cfg):
    """(share for val, documents of the smaller split), by as much of the text as it needs."""
    different, n_bytes, share, n_smaller = set(), 0, cfg.val_fraction, 0
    for texts in documents.batches(paths, cfg.text_column, Counter()):
        n_bytes += pc.sum(pc.binary_length(texts)).as_py()
        different.update(map(hash, texts.to_pylist()))
        share = cfg.val_fraction or documents.val_share(n_bytes)
        n_smaller = len(different) * min(share, 1 - share)
        is_final = share in (cfg.val_fraction, documents.VAL_FRACTION)
        if is_final and n_smaller >= ENOUGH:
            break
    return share, n_smaller
