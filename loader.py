"""What is in a prepared dataset, and in which order is it read?

A dataset is a folder with train.bin and val.bin (uint16 token ids), and from prepare.py also
train.idx and val.idx (uint64 start of every document, and the end) and meta.json. nanoGPT's
folders lack these; their documents are found by reading the file once.

There is no state. Sample i of a run is a pure function of (seed, i): an epoch lays all documents
end to end in a new order, a ring that is entered at a random place and cut into windows of
block_size + 1 tokens that overlap by one. So every token is a target exactly once an epoch, but
for the tail that fills no window.
"""
import functools
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

FORMAT = 1                          # of meta.json and the files that it describes
END_OF_TEXT = 50256                 # GPT-2's, before every document
UNFINISHED = "meta.json.new"        # exists while a finished prepare is renaming its files
CHUNK = 1 << 24                     # tokens read at a time when a file is gone through


def read_meta(folder):
    """The dict of meta.json, or None for a folder without one (nanoGPT's)."""
    path = Path(folder) / "meta.json"
    if (path.parent / UNFINISHED).exists():
        raise ValueError(f"{folder} was being replaced when prepare.py was stopped; "
                         "run `python prepare.py` once more with the same settings, "
                         "which finishes it")
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); run `python prepare.py --force`") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')}, this version reads {FORMAT}; "
                         "run `python prepare.py --force`")
    return meta


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Dataset:
    """One split ('train' or 'val') of a dataset folder, as windows of block_size + 1 tokens.

    Raises FileNotFoundError where it is not prepared, ValueError where its files disagree with
    meta.json, are too short for one window or hold ids that a model of `vocab_size` rows does
    not have.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        self.folder, self.split, self.block_size, self.seed = Path(folder), split, block_size, seed
        bin_path, idx_path = self.folder / f"{split}.bin", self.folder / f"{split}.idx"
        meta = read_meta(folder)
        if not bin_path.is_file():
            raise FileNotFoundError(f"{bin_path} does not exist; "
                                    "run `python prepare.py` to make it")
        if bin_path.stat().st_size % 2:
            raise ValueError(f"{bin_path} has an odd number of bytes, so it is not uint16 "
                             "or was cut off; run `python prepare.py --force`")
        if bin_path.stat().st_size == 0:
            raise ValueError(f"{bin_path} is empty; run `python prepare.py --force`")
        self.tokens = np.memmap(bin_path, dtype=np.uint16, mode="r")
        self.n_tokens = len(self.tokens)
        if meta:
            told = meta["splits"][split]
            self._verify(bin_path, told["tokens"] * 2, told["bin_sha256"])
            self._verify(idx_path, told["documents"] * 8 + 8, told["idx_sha256"])
            self.starts = np.memmap(idx_path, dtype=np.uint64, mode="r")
            self.text_bytes, self.fingerprint = told["text_bytes"], told["bin_sha256"]
            largest = told["max_token"]
        else:
            self.starts, largest = self._scan()
            self.text_bytes, self.fingerprint = None, sha256(bin_path)
        if largest >= vocab_size:
            raise ValueError(f"{bin_path} holds token {largest}, "
                             f"but the model has vocab_size = {vocab_size}; "
                             f"--vocab_size={-(-(int(largest) + 1) // 64) * 64} has room for it")
        self.n_documents = len(self.starts) - 1
        self.n_windows = (self.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise ValueError(f"{bin_path} has {self.n_tokens:,} tokens, fewer than one window of "
                             f"block_size + 1 = {block_size + 1:,}. "
                             f"Nearest that works: --block_size={max(self.n_tokens - 1, 1)}")
        # consecutive samples come from far apart, so that a step never sees one long document only
        self.stride = int(self.n_windows * 0.618) or 1
        while math.gcd(self.stride, self.n_windows) > 1:
            self.stride += 1
        # two are kept, for the step that ends one epoch and begins the next
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _verify(self, path, n_bytes, digest):
        what = "run `python prepare.py --force` to make the dataset again"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but meta.json lists it; {what}")
        if path.stat().st_size != n_bytes:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes "
                             f"where meta.json says {n_bytes:,}; {what}")
        if sha256(path) != digest:
            raise ValueError(f"{path} is not the file that prepare.py wrote "
                             f"(its checksum is not the one in meta.json); {what}")

    def _scan(self):
        """(starts, largest id) of a file without index: a document lies between two 50256."""
        starts, largest = [np.zeros(1, np.uint64)], 0
        for at in range(0, self.n_tokens, CHUNK):
            chunk = self.tokens[at:at + CHUNK]
            starts.append(np.flatnonzero(chunk == END_OF_TEXT).astype(np.uint64) + np.uint64(at))
            largest = max(largest, int(chunk.max()))
        starts.append(np.array([self.n_tokens], np.uint64))
        return np.unique(np.concatenate(starts)), largest

    def _epoch(self, epoch):
        """(documents in this epoch's order, where each ends in it, where the ring is entered)."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.n_documents)
        ends = np.cumsum(np.diff(self.starts)[order]).astype(np.int64)
        return order, ends, int(rng.integers(self.n_tokens))

    def sample(self, i):
        """Training sample i: block_size + 1 token ids, uint16."""
        epoch, k = divmod(i, self.n_windows)
        order, ends, entry = self._epoch(epoch)
        at = (entry + k * self.stride % self.n_windows * self.block_size) % self.n_tokens
        window, filled = np.empty(self.block_size + 1, np.uint16), 0
        while filled < len(window):
            place = np.searchsorted(ends, at, side="right")
            n = min(int(ends[place]) - at, len(window) - filled)
            begin = int(self.starts[order[place] + 1]) - (int(ends[place]) - at)
            window[filled:filled + n] = self.tokens[begin:begin + n]
            filled, at = filled + n, (at + n) % self.n_tokens
        return window

    def window(self, k):
        """Window k of the file as it lies: block_size + 1 token ids, uint16."""
        return np.asarray(self.tokens[k * self.block_size:(k + 1) * self.block_size + 1])

    def training_batch(self, first, n):
        """Samples first to first + n - 1 as (idx, targets), each (n, T) int64."""
        return _split(np.stack([self.sample(i) for i in range(first, first + n)]))

    def fixed_batch(self, first, n, stop):
        """Windows first to first + n - 1: (idx, targets); targets are -1 from window `stop` on."""
        idx, targets = _split(np.stack([self.window(min(k, stop - 1))
                                        for k in range(first, first + n)]))
        targets[max(stop - first, 0):] = -1
        return idx, targets


def _split(windows):
    """(n, T + 1) token ids -> idx and targets, (n, T) int64 each."""
    # here, so that the workers of prepare.py need not load it
    import torch

    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def ahead(read, places, device):
    """Yield `read(place)` on `device` for each of `places`; meanwhile a thread reads the next."""
    pin = device.type == "cuda"     # from pinned memory a copy to the GPU overlaps with its work

    def fetch(place):
        batch = read(place)
        return [t.pin_memory() for t in batch] if pin else batch

    places = iter(places)
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(fetch, next(places))
        for place in places:
            batch, coming = coming.result(), pool.submit(fetch, place)
            yield tuple(t.to(device, non_blocking=pin) for t in batch)
        yield tuple(t.to(device, non_blocking=pin) for t in coming.result())
