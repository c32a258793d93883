"""What is in a prepared dataset, and in which order is it read?

There is no state: sample i of a run depends on the seed and on i alone. An epoch is the documents
in random order, joined to a ring, which is cut at a random token into windows of block_size + 1
tokens. Neighbours share one token, so every token is a target once, but for the few that are left.
"""
import functools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onecard import datafiles, documents
from onecard.datafiles import folder_of
from onecard.files import sha256
from onecard.runtime import PROJECT
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT

CHUNK = 1 << 24                         # tokens that are searched for documents at a time
LLM_C = {20240520: 2, 20240801: 4}      # {first int32 of a file of llm.c: bytes of its ids}


class Dataset:
    """One split ("train" or "val") of a folder that prepare.py or nanoGPT made, as windows."""

    def __init__(self, folder, split, block_size, seed=0):
        self.path, self.block_size, self.seed = Path(folder) / f"{split}.bin", block_size, seed
        meta = datafiles.read_meta(folder)
        self.n_tokens = self.path.stat().st_size // 2
        if self.n_tokens <= block_size:
            raise UserError(f"{self.path} has {self.n_tokens:,} tokens, fewer than one window of "
                            f"block_size + 1 = {block_size + 1:,}; a smaller --block_size fits")
        self.tokens = np.memmap(self.path, np.uint16, "r", shape=self.n_tokens)
        if meta:
            counts, index = meta["splits"][split], self.path.with_suffix(".idx")
            datafiles.verify(self.path, counts["bin_sha256"])
            datafiles.verify(index, counts["idx_sha256"])
            self.starts = np.fromfile(index, np.int64)
            self.max_token, self.fingerprint = counts["max_token"], counts["bin_sha256"]
        else:                           # nanoGPT's folders have neither index nor meta.json
            check_raw(self.path, self.tokens)
            self.starts, self.max_token = find_documents(self.tokens)
            self.fingerprint = sha256(self.path)
        self.n_documents = len(self.starts) - 1
        self.n_windows = (self.n_tokens - 1) // block_size
        # consecutive samples are this many windows apart, so that a step sees many documents;
        # no common divisor with n_windows, so that every window comes once
        self.stride = int(self.n_windows * 0.618) or 1
        while math.gcd(self.stride, self.n_windows) > 1:
            self.stride += 1
        self.shuffled = functools.lru_cache(maxsize=1)(self.shuffle)

    def check_vocabulary(self, vocab_size):
        """Raise UserError if this text has ids that a model of `vocab_size` ids lacks."""
        if self.max_token >= vocab_size:
            raise UserError(f"{self.path} holds token {self.max_token}, but the model knows only "
                            f"ids below {vocab_size}; it needs --vocab_size={self.max_token + 1}")

    def shuffle(self, epoch):
        """The stream of an epoch: its documents, where each ends, where the first window begins."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.n_documents)
        ends = np.cumsum(np.diff(self.starts)[order])
        return order, ends, rng.integers(self.n_tokens)

    def sample(self, i):
        """Training sample i: block_size + 1 token ids, uint16."""
        epoch, k = divmod(i, self.n_windows)
        order, ends, offset = self.shuffled(epoch)
        window = k * self.stride % self.n_windows
        position = offset + window * self.block_size
        pieces, missing = [], self.block_size + 1
        while missing:                                  # one document after the other
            position %= self.n_tokens                   # after the last document comes the first
            j = np.searchsorted(ends, position, side="right")
            end = self.starts[order[j] + 1]             # of the document, in the file
            begin = end - (ends[j] - position)
            piece = self.tokens[begin:end][:missing]
            pieces.append(piece)
            missing -= len(piece)
            position += len(piece)
        return np.concatenate(pieces)

    def window(self, k):
        """Window k of the file as it lies: block_size + 1 token ids. The first follows the last."""
        begin = k % self.n_windows * self.block_size
        return self.tokens[begin:begin + self.block_size + 1]


def check_raw(path, tokens):
    """Raise UserError if a file that nothing describes does not hold uint16 ids from its start."""
    bytes_of_id = LLM_C.get(int(tokens[:2].copy().view(np.uint32)[0]))
    if bytes_of_id == 2:
        raise UserError(f"{path} begins with the 1,024 bytes of llm.c's header, which are no ids; "
                        f"`tail -c +1025 {path} > NEW` writes a file without them")
    if bytes_of_id == 4 or (tokens[:CHUNK:2].any() and not tokens[1:CHUNK:2].any()):
        raise UserError(f"{path} holds ids of 4 bytes or more, and uint16 (2 bytes) is needed; "
                        "write them again by numpy's astype(np.uint16)")


def find_documents(tokens):
    """(where each document starts, and the end; the largest id) of a file without an index."""
    starts, max_token = [[0, len(tokens)]], 0
    for begin in range(0, len(tokens), CHUNK):
        chunk = tokens[begin:begin + CHUNK]
        starts.append(np.flatnonzero(chunk == END_OF_TEXT) + begin)
        max_token = max(max_token, int(chunk.max()))
    return np.unique(np.concatenate(starts)), max_token


class ReadAhead:
    """Reads batches in a thread: while the caller works on one, the next one is read."""

    def __init__(self, window, world):
        self.window, self.world = window, world     # window(k) gives block_size + 1 ids
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.expected, self.future = None, None

    def read(self, first, n):
        windows = [self.window(k) for k in range(first, first + n)]
        ids = torch.from_numpy(np.stack(windows, dtype=np.int64))
        batch = [ids[:, :-1].contiguous(), ids[:, 1:].contiguous()]
        if self.world.device.type == "cuda":        # such a copy runs beside the GPU's work
            batch = [tensor.pin_memory() for tensor in batch]
        return batch

    def get(self, first, n):
        """Windows first to first + n - 1 on the device: idx and targets, (n, T) int64 each."""
        if self.expected != (first, n):
            self.future = self.thread.submit(self.read, first, n)
        batch = self.future.result()
        following = first + n * self.world.size     # the other ranks take the windows between
        self.expected, self.future = (following, n), self.thread.submit(self.read, following, n)
        return [tensor.to(self.world.device, non_blocking=tensor.is_pinned()) for tensor in batch]


class Batches:
    """The micro-batches of each step, for this rank. An interrupted step can be read again."""

    def __init__(self, data, cfg, world):
        self.world, self.ahead = world, ReadAhead(data.sample, world)
        self.size = cfg.batch_size              # windows in a micro-batch
        self.windows_per_step = cfg.windows_per_step
        self.close = self.ahead.thread.shutdown

    @property
    def per_step(self):
        """Micro-batches of this rank in one step."""
        return self.windows_per_step // (self.size * self.world.size)

    def of_step(self, step):
        """Yield the micro-batches of `step`: idx and targets, (B, T) int64 each."""
        first = step * self.windows_per_step + self.world.rank * self.size
        for i in range(self.per_step):
            yield self.ahead.get(first + i * self.world.size * self.size, self.size)

    def halve(self):
        """Read smaller micro-batches, after memory ran out. Only rounding and dropout change."""
        if self.size == 1 or self.world.size > 1:       # the other ranks do not know of it
            raise UserError(f"out of memory with {self.size} windows at a time, "
                            f"{self.world.device}. A smaller block_size, n_layer or n_embd fits"
                            " (or batch_size, on several GPUs)")
        self.size = half(self.size)


def half(n):
    """The largest divisor of `n` that is at most its half."""
    return next(d for d in range(n // 2, 0, -1) if n % d == 0)


def fixed_batches(data, n_windows, batch_size, world):
    """Yield (idx, targets, n): this rank's share of the first `n_windows` windows of the file.

    The targets behind the first n windows are -1. Every rank gets equally many batches.
    """
    ahead = ReadAhead(data.window, world)
    for begin in range(0, n_windows, batch_size * world.size):
        first = begin + world.rank * batch_size
        n = min(max(n_windows - first, 0), batch_size)
        idx, targets = ahead.get(first, batch_size)
        targets[n:] = -1
        yield idx, targets, n
    ahead.thread.shutdown()


def ensure_prepared(dataset, world):
    """Prepare a dataset that is missing, from the one parquet file that it can mean."""
    folder = folder_of(dataset)
    if world.is_main:
        datafiles.finish_renames(folder)
    if world.is_main and not datafiles.is_prepared(folder):
        source = "--sample" if dataset == "sample" else documents.find_parquet(dataset)
        print(f"{folder} is not prepared yet: `python prepare.py {source} --dataset={dataset}`")
        # a process of its own, which gives all its memory back
        command = [sys.executable, PROJECT / "prepare.py", source, f"--dataset={dataset}"]
        if code := subprocess.run(command).returncode:
            sys.exit(code)
    world.wait()


@dataclass
class KnownTokens:
    """How much text a dataset has, as far as one can know without preparing it."""
    train: int
    val: int
    source: str                         # where these numbers come from


def known_tokens(dataset, n_tokens=0):
    """KnownTokens of a dataset, or None. `n_tokens` of it are known otherwise. Writes nothing."""
    folder = folder_of(dataset)
    paths = [folder / f"{split}.bin" for split in datafiles.SPLITS]
    if n_tokens:
        source = "n_tokens"
    elif all(path.is_file() for path in paths):
        train, val = [path.stat().st_size // 2 for path in paths]
        return KnownTokens(train, val, str(folder))
    else:
        try:
            path = documents.find_parquet(dataset)
        except UserError:               # there is none, or there are several
            return None
        n_tokens, source = documents.token_count(path), f"{path}, by its column token_count"
        if n_tokens is None:
            return None
    val = round(n_tokens * documents.val_share(n_tokens * documents.BYTES_PER_TOKEN))
    return KnownTokens(n_tokens - val, val, source)
