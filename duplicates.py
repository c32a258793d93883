"""Which documents of val stand nearly the same in train?

A document of val has leaked if more than half of its passages of 50 tokens stand in train, all in
one document or each in another. Case, white space and punctuation do not count: tokens that are
nothing else are dropped, and tokens of the same letters and digits are one class. Every passage of
train is looked up. Of a document of val it is every passage where there are at most SAMPLES, and
else SAMPLES of them, evenly spread. A document with fewer than 50 tokens left has no passage, so it
is never called leaked; nor is a copy that has another word in every 50 tokens.

A passage is known by a hash of 64 bits. Train is read in chunks; only val's size takes memory.
"""
import functools
import itertools
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tokenizer import END_OF_TEXT, N_VOCAB, _gpt2

PASSAGE = 50                        # tokens; so long a passage stands nowhere twice by chance
STEPS = (1, 2, 4, 8, 16, 18)        # a hash of 1 token becomes one of 2, 4, 8, 16, 32, PASSAGE
FACTOR = 0x9E3779B97F4A7C15         # 2**64 / golden ratio; odd, so that no token is lost
SAMPLES = 31                        # passages of a val document to look for; odd: no draws
CHUNK = 1 << 18                     # tokens of train at a time; 2 MiB of hashes stay in the cache
AHEAD = 256                         # tokens read at a time to complete a chunk's last passage


@functools.cache
def _classes():
    """(N_VOCAB,) uint16: the class of every token id, 0 = dropped."""
    table, known = np.zeros(N_VOCAB, np.uint16), {"": 0}
    for token in range(END_OF_TEXT):
        data = _gpt2().decode_single_token_bytes(token)
        # curly quotes are two tokens, E2 80 and a last byte, which few letters have alone
        last_byte = len(data) == 1 and 0x80 <= data[0] < 0xC0
        text = b"" if last_byte else data.removesuffix(b"\xe2\x80")
        letters = "".join(c for c in text.decode("utf-8", "surrogateescape").lower()
                          if unicodedata.category(c) == "Cs"            # a part of a letter
                          or unicodedata.category(c)[0] in "LMN")       # letter, accent, digit
        table[token] = known.setdefault(letters, len(known))
    table[END_OF_TEXT] = len(known)     # never dropped: no passage of val goes across it
    return table


def _kept(path, first, n):
    """(classes of tokens first to first + n - 1 that are not dropped, how many tokens it read)."""
    tokens = np.fromfile(path, np.uint16, n, offset=2 * first)
    classes = _classes().take(tokens)
    return classes.compress(classes != 0), len(tokens)


def _hashes(classes):
    """(..., n) uint16 -> (..., n - PASSAGE + 1) uint64, the hash of the passage from each place."""
    hashed, factor = classes.astype(np.uint64), FACTOR
    for step in STEPS:
        longer = hashed[..., :-step] * np.uint64(factor)
        longer += hashed[..., step:]
        hashed, factor = longer, factor * factor % 2**64
    return hashed


def _samples(tokens, starts):
    """(document, hash) of val's sampled passages, and the number of documents."""
    n_documents = len(starts) - 1
    classes = _classes().take(tokens)
    lengths = np.add.reduceat(classes != 0, starts[:-1], dtype=np.int64)    # 50256 counted
    classes = classes.compress(classes != 0)
    n_passages = np.maximum(lengths - PASSAGE, 0)
    n_samples = np.minimum(n_passages, SAMPLES)
    document = np.repeat(np.arange(n_documents), n_samples)
    rank = np.arange(len(document)) - (np.cumsum(n_samples) - n_samples)[document]
    places = (np.cumsum(lengths) - lengths + 1)[document] + \
        (2 * rank + 1) * n_passages[document] // (2 * n_samples[document])
    hashed = np.empty(len(places), np.uint64)
    for at in range(0, len(places), CHUNK // PASSAGE + 1):
        part = slice(at, at + CHUNK // PASSAGE + 1)
        hashed[part] = _hashes(classes[places[part, None] + np.arange(PASSAGE)])[:, 0]
    return document, hashed, n_documents


def leaked(train_bins, tokens, starts, progress=None, num_threads=2):
    """(documents of val,) bool: does most of the document stand in train? And which were judged.

    train_bins are the paths of train.bin or of its parts, tokens (uint16) and starts (int64, where
    each document begins, and the end) are val's. `progress(n)` is called for every n tokens of
    train that are done.
    """
    document, hashed, n_documents = _samples(tokens, starts)
    wanted, which = np.unique(hashed, return_inverse=True)
    found = np.zeros(len(wanted), bool)
    n_bits = (16 * len(wanted) + 1).bit_length()        # 1 of 16 to 32 places is set
    shift = np.uint64(64 - n_bits)
    perhaps = np.zeros(1 << n_bits, bool)               # by the first bits of a hash
    perhaps[wanted >> shift] = True

    def look_up(train_bin, first):
        classes, n = _kept(train_bin, first, CHUNK)
        ahead, at = classes[:0], first + n
        while len(ahead) < PASSAGE - 1:
            more, n_more = _kept(train_bin, at, AHEAD)
            if not n_more:
                break
            ahead, at = np.concatenate([ahead, more]), at + n_more
        classes = np.concatenate([classes, ahead[:PASSAGE - 1]])
        if len(classes) >= PASSAGE and len(wanted):
            hashed = _hashes(classes)
            hashed = hashed.compress(perhaps.take((hashed >> shift).view(np.int64)))
            hashed.sort()                               # so that the search stays in the cache
            place = np.searchsorted(wanted[:-1], hashed)        # at most len(wanted) - 1
            found[place[wanted[place] == hashed]] = True
        return n

    _classes()                                          # before the threads, which share it
    with ThreadPoolExecutor(num_threads) as pool:
        for path in train_bins:
            firsts = range(0, path.stat().st_size // 2, CHUNK)
            for n in pool.map(look_up, itertools.repeat(path), firsts):
                if progress:
                    progress(n)
    n_found = np.bincount(document, found[which], n_documents)
    n_sampled = np.bincount(document, minlength=n_documents)
    return 2 * n_found > n_sampled, n_sampled > 0
