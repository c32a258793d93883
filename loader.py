"""What is in a prepared dataset, and in which order is it read?

A dataset is a folder with train.bin and val.bin (uint16 token ids), and from prepare.py also
train.idx and val.idx (uint64 start of every document, and the end) and meta.json. It may come in
parts (train.1.bin, train.2.bin, ...), which are read as if they were one file. nanoGPT's folders
have no index; their documents are found by reading the file once.

There is no state. Sample i of a run is a pure function of (seed, i): an epoch lays all documents
end to end in a new order, a ring that is entered at a random place and cut into windows of
block_size + 1 tokens that overlap by one. So every token is a target exactly once an epoch, but
for the tail that fills no window.
"""
import functools
import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

FORMAT = 1                          # of meta.json and the files that it describes
END_OF_TEXT = 50256                 # GPT-2's, before every document
CHUNK = 1 << 24                     # tokens read at a time when a file is gone through


def unfinished(folder, infix=""):
    """The file that exists while a finished prepare is renaming its files."""
    return Path(folder) / f"meta{infix}.json.new"


def read_meta(folder, infix=""):
    """The dict of meta.json, or None for a folder without one (nanoGPT's).

    `infix` is '.2' for part 2 of a dataset.
    """
    path = Path(folder) / f"meta{infix}.json"
    if unfinished(folder, infix).exists():
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


def is_prepared(folder):
    """True if there is a train.bin, or one of its parts."""
    return any(re.fullmatch(r"train(\.\d+)?\.bin", p.name) for p in Path(folder).glob("train*.bin"))


def metas(folder):
    """[(infix, meta)]: [("", meta)] of a whole dataset, [(".1", meta), ...] of one in parts, [] of
    a folder without meta.json. Raises ValueError where parts are missing or are of different runs.
    """
    meta = read_meta(folder)
    if meta:
        return [("", meta)]
    found = sorted(int(m[1]) for p in Path(folder).glob("meta.*.json*")
                   if (m := re.fullmatch(r"meta\.(\d+)\.json(\.new)?", p.name)))
    if not found:
        return []
    parts = {i: read_meta(folder, f".{i}") for i in dict.fromkeys(found)}
    n = parts[found[0]]["part"][1]
    same = [{**meta, "part": meta["part"][1],
             "sources": [{**s, "sha256": None} for s in meta["sources"]],
             **dict.fromkeys(("splits", "skipped", "token_count_column", "versions"))}
            for meta in parts.values()]
    for i, meta in zip(parts, same, strict=True):
        if meta != same[0]:
            raise ValueError(f"part {i} in {folder} was prepared from other files or with other "
                             f"settings than part {found[0]}; prepare it again with the same")
    missing = [i for i in range(1, n + 1) if i not in parts]
    if missing:
        raise ValueError(f"{folder} lacks part{'s' * (len(missing) > 1)} "
                         f"{', '.join(map(str, missing))} of {n}: copy train.{missing[0]}.bin, .idx"
                         f", val.{missing[0]}.bin, .idx and meta.{missing[0]}.json into it, or run "
                         f"`python prepare.py --part={missing[0]}/{n}` with the same settings")
    return [(f".{i}", parts[i]) for i in range(1, n + 1)]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Tokens:
    """The token ids of one file, or of several as if they were one: tokens[begin:end]."""

    def __init__(self, paths):
        # an empty file cannot be mapped; a part may have no document for val
        self.files = [np.memmap(path, np.uint16, "r") if path.stat().st_size
                      else np.zeros(0, np.uint16) for path in paths]
        self.ends = np.cumsum([len(f) for f in self.files])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, at):
        begin, end, _ = at.indices(len(self))
        i = int(np.searchsorted(self.ends, begin, side="right"))
        pieces = []
        while begin < end:
            before = int(self.ends[i]) - len(self.files[i])
            pieces.append(self.files[i][begin - before:end - before])
            begin, i = begin + len(pieces[-1]), i + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])


class Dataset:
    """One split ('train' or 'val') of a dataset folder, as windows of block_size + 1 tokens.

    Raises FileNotFoundError where it is not prepared, ValueError where its files disagree with
    meta.json, are too short for one window or hold ids that a model of `vocab_size` rows does
    not have.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        self.folder, self.split, self.block_size, self.seed = Path(folder), split, block_size, seed
        parts = metas(folder)
        paths = [self.folder / f"{split}{infix}.bin" for infix, _ in parts or [("", None)]]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist; "
                                        "run `python prepare.py` to make it")
            if path.stat().st_size % 2:
                raise ValueError(f"{path} has an odd number of bytes, so it is not uint16 "
                                 "or was cut off; run `python prepare.py --force`")
        self.tokens = Tokens(paths)
        self.n_tokens = len(self.tokens)
        if not self.n_tokens:
            raise ValueError(f"{paths[0]} is empty; run `python prepare.py --force`")
        if parts:
            told = [meta["splits"][split] for _, meta in parts]
            starts, before = [np.zeros(1, np.uint64)], 0
            for path, part in zip(paths, told, strict=True):
                self._verify(path, part["tokens"] * 2, part["bin_sha256"])
                index = path.with_suffix(".idx")
                self._verify(index, part["documents"] * 8 + 8, part["idx_sha256"])
                starts.append(np.memmap(index, np.uint64, "r")[1:] + np.uint64(before))
                before += part["tokens"]
            self.starts = np.concatenate(starts)
            self.text_bytes = sum(part["text_bytes"] for part in told)
            sums = [part["bin_sha256"] for part in told]
            self.fingerprint = sums[0] if len(sums) == 1 else \
                hashlib.sha256("".join(sums).encode()).hexdigest()
            largest = max(part["max_token"] for part in told)
        else:
            self.starts, largest = self._scan()
            self.text_bytes, self.fingerprint = None, sha256(paths[0])
        if largest >= vocab_size:
            raise ValueError(f"{paths[0]} holds token {largest}, "
                             f"but the model has vocab_size = {vocab_size}; "
                             f"--vocab_size={-(-(int(largest) + 1) // 64) * 64} has room for it")
        self.n_documents = len(self.starts) - 1
        self.n_windows = (self.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise ValueError(f"{paths[0]} has {self.n_tokens:,} tokens, fewer than one window of "
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
