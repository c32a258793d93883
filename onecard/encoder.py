"""A million documents become token ids, by gigatoken where it is installed, else by tiktoken.

Both make the same ids, and both work in threads. gigatoken is many times as fast.
"""
import hashlib
import importlib.util
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onecard.settings import import_package
from onecard.tokenizers import END_OF_TEXT, VOCABULARY, GPT2Tokenizer, gpt2

START = np.array([END_OF_TEXT], np.uint16)      # stands before every document
RENEW_TOKENS = 48 << 20                 # by then, gigatoken remembers up to a gigabyte of words
BATCH_BYTES = 4 << 20                   # of text; small batches cost more time
MAX_THREADS = 3                         # of gigatoken: more would wait for the caller, which reads


@dataclass
class Batch:
    """The ids of some documents, one document after the other."""
    ids: np.ndarray                     # uint16; 50256 stands before each document
    lengths: np.ndarray                 # int64, tokens of each document with its 50256
    hashes: np.ndarray                  # uint64, equal for documents with equal ids
    text_bytes: np.ndarray              # int64, of each document in UTF-8


def encode(columns, cfg):
    """Yield the documents of `columns` (arrow's large_string) as Batches, in order.

    Threads encode, while the caller reads and works on a batch.
    `cfg` has the settings encoder, num_proc and seed of prepare.py.
    """
    tokenize, n_threads = by_tiktoken, cfg.num_proc or os.cpu_count()
    if choose(cfg.encoder) == "gigatoken":
        tokenize, n_threads = Gigatoken(), min(n_threads, MAX_THREADS)
    pool, waiting = ThreadPoolExecutor(n_threads), deque()
    try:
        for column in joined(columns):
            waiting.append(pool.submit(make_batch, tokenize, column, cfg.seed))
            if len(waiting) > 2 * n_threads:        # a limit, so that memory does not fill up
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def choose(name):
    """The encoder that the setting "auto", "gigatoken" or "tiktoken" means."""
    gpt2()                              # raises UserError if the vocabulary is damaged
    if name == "gigatoken":
        import_package("gigatoken", "--encoder=gigatoken")
    if name == "auto":
        name = "gigatoken" if importlib.util.find_spec("gigatoken") else "tiktoken"
    return name


def joined(columns):
    """Yield the same documents in columns of about BATCH_BYTES."""
    waiting = []
    for column in columns:
        waiting.append(column)
        if sum(part.nbytes for part in waiting) >= BATCH_BYTES:
            yield pa.concat_arrays(waiting)
            waiting = []
    if waiting:
        yield pa.concat_arrays(waiting)


def make_batch(tokenize, column, seed):
    """The Batch of a column of texts."""
    documents = tokenize(column)
    pieces = []
    for document in documents:
        pieces += [START, document]
    ids = np.concatenate(pieces)
    lengths = np.array([len(document) + 1 for document in documents])
    return Batch(ids, lengths, hash_documents(documents, seed), pc.binary_length(column).to_numpy())


def hash_documents(documents, seed):
    """A uint64 for each document, equal for equal documents and for practically no others."""
    salt = str(seed).encode()
    digests = [hashlib.sha256(salt + document.tobytes()).digest()[:8] for document in documents]
    return np.frombuffer(b"".join(digests), np.uint64)


def by_tiktoken(column):
    """The ids of each document, a list of uint16 arrays."""
    return [GPT2Tokenizer().encode(text) for text in column.to_pylist()]


class Gigatoken:
    """The same ids by the library gigatoken, faster. tiktoken encodes disputed documents."""

    def __init__(self):
        self.renew()

    def renew(self):
        import gigatoken
        self.n_tokens = 0
        self.tokenizer = gigatoken.Tokenizer.from_tiktoken(
            VOCABULARY, pretokenizer="gpt2", special_tokens={})

    def __call__(self, column):
        texts = column.cast(pa.large_binary()).to_pylist()
        encoded = self.tokenizer.encode_batch(texts, parallel=False).layout
        ids = encoded.content.data.astype(np.uint16)        # of all documents
        offsets = encoded.offsets.data.tolist()             # where each begins, and the end
        documents = [ids[begin:end] for begin, end in itertools.pairwise(offsets)]
        for i in disputed_documents(column):
            documents[i] = GPT2Tokenizer().encode(column[i].as_py())
        self.n_tokens += len(ids)       # not exact: threads add at the same time
        if self.n_tokens > RENEW_TOKENS:
            self.renew()
        return documents


def disputed_documents(column):
    """Indices of the documents with a letter for which gigatoken and tiktoken may differ.

    Their tables are of different versions of Unicode. All letters that one may lack begin with the
    bytes E0 (but not Devanagari, Thai), E1 80 to E1 B7, EA 80 to EA AF, or F0 (but not F0 9D
    and F0 9F).
    """
    _, starts, data = column.buffers()              # joined() makes columns that are no slices
    starts, data = np.frombuffer(starts, np.int64), np.frombuffer(data, np.uint8)
    first = np.flatnonzero(data >= 0xE0)            # first bytes of letters of three or four bytes
    lead, second = data[first], data[first + 1]
    is_disputed = (((lead == 0xE0) & ~np.isin(second, (0xA4, 0xA5, 0xB8, 0xB9)))
                   | ((lead == 0xE1) & (second < 0xB8)) | ((lead == 0xEA) & (second < 0xB0))
                   | ((lead == 0xF0) & (second != 0x9D) & (second != 0x9F)))
    return np.unique(np.searchsorted(starts, first[is_disputed], side="right") - 1)
