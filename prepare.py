"""
text -> data/<dataset>/{train,val}.bin + index + meta.json

    python prepare.py                            # the one parquet file under data/ -> data/fineweb/
    python prepare.py --download                 # fetch FineWeb's first file (2 GB) before that
    python prepare.py --sample                   # a small dataset from Python's own documentation
    python prepare.py my.parquet --dataset=mine  # any parquet file with a column of text
    python prepare.py a.jsonl.gz b.txt folder --val=c.parquet --dataset=mine
    python prepare.py --part=2/8 folder --dataset=mine     # the second of eight machines
    python prepare.py --check data/mine          # is it whole, and what is in it?

Every document becomes 50256 (end of text) and then its GPT-2 tokens, in the order of the files'
names. What was in the folder before stays until the new files are whole; what was stopped goes on
where it was, by the same command.
"""
import collections
import contextlib
import errno
import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

import check
import duplicates
import sources
from configurator import run
from loader import FORMAT, read_meta, sha256, unfinished
from sources import DATA, FINEWEB, SAMPLE
from tokenizer import (
    END_OF_TEXT,
    N_VOCAB,
    VOCAB_SHA256,
    GPT2Tokenizer,
    encode_documents,
    encoder_of,
    get_ready,
    letter_sums,
    normalized,
    valid,
)

BYTES_PER_TOKEN = 4.5           # of English text, to guess before counting
VAL_TOKENS = 50_000             # what a small dataset's validation split should have
MAX_VAL_FRACTION = 0.1          # but never more of its documents than this
MOST_THREADS = 3                # of gigatoken; these encode as fast as one thread can read
PROVED_EVERY = 1000             # documents, FineWeb's row group: one of them is encoded again by
PROVED_BYTES = 100_000          # tiktoken as a proof, if it is not longer than this
SAVE_BYTES = 256 << 20          # of text, after which a stopped prepare can go on from there


@dataclass(frozen=True)
class PrepareConfig:
    files: tuple = ()               # of text, or folders of them; none = the one under data/
    dataset: str = ""               # folder under data/; "" = fineweb, or sample with --sample
    val: str = ""                   # file to validate on; "" = drawn from the files
    text_column: str = "text"       # column that holds the documents; outer.inner for nested ones
    val_fraction: float = 0.0       # of the documents; 0 = 0.005, more where the files are small
    dedup_val: bool = False         # leave out of val what stands nearly the same in train
    seed: int = 1337                # decides which documents are drawn for validation
    encoder: str = "auto"           # gigatoken, tiktoken (same bytes, slower); auto = what is there
    num_proc: int = 0               # workers; 0 = one per core
    part: str = ""                  # i/n: only part i of n, train.i.bin, for n machines
    check: str = ""                 # dataset folder to verify and describe; nothing is prepared
    download: bool = False          # fetch FineWeb's CC-MAIN-2013-20/000_00000.parquet first
    sample: bool = False            # build data/sample/ from the documentation of this Python
    force: bool = False             # redo what is already prepared, replace what was made otherwise

    def __post_init__(self):
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction = {self.val_fraction} is a share of the documents, "
                             "from 0 to below 1")
        if self.val and self.val_fraction:
            raise ValueError("val_fraction draws validation documents from the files, "
                             "and --val gives them apart; set one of the two")
        if self.num_proc < 0:
            raise ValueError(f"num_proc = {self.num_proc} is a number of workers; "
                             "0 takes one per core")
        if self.encoder not in ("auto", "gigatoken", "tiktoken"):
            raise ValueError(f"encoder = {self.encoder!r} is auto, gigatoken or tiktoken")
        if self.part:
            match = re.fullmatch(r"(\d+)/(\d+)", self.part)
            if not match or not 1 <= int(match[1]) <= int(match[2]):
                raise ValueError(f"part = {self.part!r} is i/n with i from 1 to n, as 2/8")
            if self.dedup_val:
                raise ValueError("dedup_val compares val with the whole of train, "
                                 "which a part does not have; leave out one of the two")

    @property
    def infix(self):
        """'' for a whole dataset, '.2' for the files of part 2."""
        return "." + self.part.split("/")[0] if self.part else ""


def val_share(n_bytes):
    """Share of the documents that validate where nobody says: more of a small text of `n_bytes`."""
    return min(max(0.005, VAL_TOKENS * BYTES_PER_TOKEN / max(n_bytes, 1)), MAX_VAL_FRACTION)


# what is read

def work_of(files, cfg):
    """(the Sources that this run reads, bytes of text in all files that train comes from)."""
    every = [s for path in files for s in sources.sources_of(path, cfg.text_column)]
    total = sum(s.text_bytes for s in every)
    if cfg.val:
        every += sources.sources_of(cfg.val, cfg.text_column, "val")
    if cfg.part:                    # neighbours that make an n-th of the text
        i, n = map(int, cfg.part.split("/"))
        if n > len(every):
            raise ValueError(f"part = {cfg.part}: the files have {len(every)} row groups or files "
                             f"of text, which is what parts are made of; --part=1/{len(every)} is "
                             "the smallest")
        sizes = np.array([max(s.text_bytes, 1) for s in every], float)
        places = (np.cumsum(sizes) - sizes / 2) / sizes.sum() * n
        every = [s for s, place in zip(every, places, strict=True) if int(place) == i - 1]
    return sources.joined(every), total


def asked_for(files, work, cfg):
    """The part of meta.json that decides the bytes: what goes in, and by which settings.

    The checksum of a file that only other parts read is None.
    """
    read = {s.path for s in work} | ({cfg.val} - {""})
    told = [{"name": Path(path).name, "rows": sources.rows_of(path, cfg.text_column),
             "bytes": Path(path).stat().st_size,
             "sha256": sha256(path) if path in read else None, "split": split}
            for path, split in [*((f, "train") for f in files), (cfg.val, "val")] if path]
    return {"sources": told, "text_column": cfg.text_column, "seed": cfg.seed,
            "val_fraction": cfg.val_fraction, "dedup_val": cfg.dedup_val,
            "part": [int(n) for n in cfg.part.split("/")] if cfg.part else None,
            "tokenizer": {"name": "gpt2", "sha256": VOCAB_SHA256, "n_vocab": N_VOCAB,
                          "end_of_text": END_OF_TEXT}}


# what a worker does

def encode(column, encoder, where, number):
    """The documents of a batch that begins with document `number` of the file `where`.

    Returns (ids uint16, starts int64, letter sums uint64, bytes of text int64) of those that have
    text, and how many were null or empty. A document of every PROVED_EVERY, and of every batch, is
    proved against tiktoken.
    """
    column = sources.plain(column)
    lengths = pc.binary_length(column)
    n_null = lengths.null_count
    rows = np.flatnonzero(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))
    skipped = {"null": n_null, "empty": len(column) - len(rows) - n_null}
    if len(rows) < len(column):
        column = column.filter(pc.greater(lengths, 0))
    if not len(rows):
        return (np.zeros(0, np.uint16), np.zeros(1, np.int64), np.zeros(0, np.uint64),
                np.zeros(0, np.int64)), skipped
    column = valid(column)
    ids, starts = encode_documents(column, encoder)
    n_bytes = pc.binary_length(column).to_numpy().astype(np.int64)
    if encoder != "tiktoken":
        short = np.flatnonzero(n_bytes <= PROVED_BYTES)
        chosen = short[(number + rows[short]) % PROVED_EVERY == PROVED_EVERY // 2]
        for d in chosen if len(chosen) else short[number % max(len(short), 1):][:1]:
            proof = GPT2Tokenizer().encode(column[int(d)].as_py())
            if not np.array_equal(ids[starts[d] + 1:starts[d + 1]], proof):
                raise ValueError(f"document {number + rows[d]:,} of {where} (counted from 0): "
                                 f"{encoder} makes other tokens of it than tiktoken. "
                                 "--encoder=tiktoken is slower and right; please report it")
    return (ids, starts, letter_sums(ids, starts), n_bytes), skipped


def of_documents(ids, starts, taken):
    """The ids of the documents that the bool array `taken` marks."""
    edges = np.flatnonzero(np.diff(taken, prepend=False, append=False))
    return np.concatenate([ids[:0], *(ids[starts[a]:starts[b]] for a, b in edges.reshape(-1, 2))])


def drawn(sums, seed, share):
    """True for the documents that validate: `share` of them, by a hash of their letters and `seed`.

    The same text is on the same side everywhere, however it is punctuated and set.
    """
    key = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    x = sums ^ np.frombuffer(key, "<u8")        # then the mixing of splitmix64 (Steele et al. 2014)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) < np.uint64(int(share * 2**64))


class Texts:
    """A set of documents that knows its like, whatever their white space, punctuation and case."""

    def __init__(self):
        self.sums, self.digests = np.zeros(0, np.uint64), set()

    def _digest(self, ids):
        return hashlib.blake2b(normalized(GPT2Tokenizer().decode_bytes(ids[1:])),
                               digest_size=16).digest()

    def add(self, ids, starts, sums):
        self.sums = np.union1d(self.sums, sums)
        self.digests |= {self._digest(ids[a:b]) for a, b in zip(starts, starts[1:], strict=False)}

    def has(self, ids, starts, sums):
        """bool per document."""
        found = np.isin(sums, self.sums)
        for d in np.flatnonzero(found):
            found[d] = self._digest(ids[starts[d]:starts[d + 1]]) in self.digests
        return found


# what is written

class SplitWriter:
    """Writes NAME.bin.new and NAME.idx.new, and knows their counts and checksums at the end.

    `before` is the counts() of a writer that was stopped: its files are cut to that, and go on.
    """

    def __init__(self, folder, name, before=None):
        self.paths = [folder / f"{name}.{kind}.new" for kind in ("bin", "idx")]
        self.digests = [hashlib.sha256(), hashlib.sha256()]
        self.documents = self.tokens = self.text_bytes = self.max_token = 0
        if before:
            vars(self).update(before)
            self.files = [open(p, "r+b") for p in self.paths]
            for f, digest, size in zip(self.files, self.digests, self._sizes(), strict=True):
                f.truncate(size)
                while block := f.read(1 << 22):
                    digest.update(block)
        else:
            self.files = [open(p, "wb") for p in self.paths]
            self._write(1, np.zeros(1, np.uint64))

    def _sizes(self):
        return self.tokens * 2, self.documents * 8 + 8

    def _write(self, which, array):
        self.files[which].write(array.data)
        self.digests[which].update(array.data)

    def add(self, ids, lengths, n_bytes):
        if len(lengths):
            self._write(0, ids)
            self._write(1, np.uint64(self.tokens) + np.cumsum(lengths, dtype=np.uint64))
            self.documents += len(lengths)
            self.tokens += len(ids)
            self.max_token = max(self.max_token, int(ids.max()))
        self.text_bytes += int(n_bytes)

    def counts(self):
        """What there is so far; all that a writer needs to go on from here."""
        return {name: getattr(self, name)
                for name in ("documents", "tokens", "text_bytes", "max_token")}

    def sync(self):
        for f in self.files:
            f.flush()
            os.fsync(f.fileno())

    def close(self):
        for f in self.files:
            with contextlib.suppress(OSError):      # a full disk, which was told already
                f.close()

    def finish(self):
        """Put the files on the disk; return their entry in meta.json."""
        self.sync()
        self.close()
        return {**self.counts(), "bin_sha256": self.digests[0].hexdigest(),
                "idx_sha256": self.digests[1].hexdigest()}


def write_json(path, content):
    """Write beside, then rename: the old file or the new one, never half."""
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def commit(folder, infix=""):
    """Rename the files of a finished prepare into place, meta.json last.

    meta.json.new is written when all others are whole, so where it exists a stopped commit goes on.
    """
    state_path(folder, infix).unlink(missing_ok=True)
    for name in ("train{}.bin", "train{}.idx", "val{}.bin", "val{}.idx", "meta{}.json"):
        beside = folder / f"{name.format(infix)}.new"
        if beside.exists():
            os.replace(beside, folder / name.format(infix))


def state_path(folder, infix):
    return folder / f"stopped{infix}.json"


# workers

def _start_worker():
    """A worker does not outlive its parent, which may be killed without a chance to stop it."""
    parent = multiprocessing.parent_process()

    def follow():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _ctrl_c_blocked():
    """Processes started in here leave Ctrl-C to their parent, from their first moment on."""
    if not hasattr(signal, "pthread_sigmask"):          # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pool_of(encoder, n_workers):
    """Threads for gigatoken, which frees the interpreter; for tiktoken processes, 1.25 times
    as fast as threads on 2 cores."""
    if encoder == "gigatoken":
        return ThreadPoolExecutor(n_workers)
    spawn = multiprocessing.get_context("spawn")    # the same on every system, safe beside threads
    return ProcessPoolExecutor(n_workers, mp_context=spawn, initializer=_start_worker)


def in_order(function, tasks, encoder, n_workers):
    """Yield (note, function(*arguments)) for tasks (note, arguments), in order, over workers."""
    if n_workers == 1 and encoder == "tiktoken":
        for note, arguments in tasks:
            yield note, function(*arguments)
        return
    with pool_of(encoder, n_workers) as pool:
        running = collections.deque()
        try:
            for note, arguments in tasks:
                with _ctrl_c_blocked():             # the pool starts its processes as it needs them
                    running.append((note, pool.submit(function, *arguments)))
                if len(running) > n_workers + 2:    # bounds the memory, whatever the file's size
                    note, result = running.popleft()
                    yield note, result.result()
            while running:
                note, result = running.popleft()
                yield note, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(items):
    """Yield `items`, whose next one a thread makes meanwhile."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def encoded(work, cfg, encoder, n_workers, place=0, done=0):
    """Yield ((source's number, split, documents read of it, token_count), encode()'s answer) from
    document `done` of source `place` on, batch by batch in order."""
    def tasks():
        for i, source in enumerate(work[place:], place):
            before = sources.first_row(source, cfg.text_column)
            for row, column, told in sources.batches(source, cfg.text_column,
                                                     done if i == place else 0):
                yield ((i, source.split, row + len(column), told),
                       (column, encoder, source.path, before + row))
    return in_order(encode, read_ahead(tasks()), encoder, n_workers)


# the run

def refuse_to_mix(folder, cfg):
    """A ValueError where a part would lie beside a whole dataset, or the other way round."""
    others = sorted(p.name for p in folder.glob("meta*.json"))
    if cfg.part and "meta.json" in others or not cfg.part and set(others) - {"meta.json"}:
        raise ValueError(f"{folder} holds {'a whole dataset' if cfg.part else 'a dataset in parts'}"
                         f" ({', '.join(others[:3])}); --dataset=NAME writes elsewhere, "
                         "or remove that folder")


def made_before(folder, cfg, asked):
    """True if `folder` holds what is asked for; a ValueError if it holds something else."""
    meta = read_meta(folder, cfg.infix)
    if meta and all(meta.get(key) == asked[key] or key not in meta and not asked[key]
                    for key in asked):
        print(f"{folder} is already prepared from {', '.join(s['name'] for s in meta['sources'])}: "
              f"{summary(meta)}. Nothing to do (--force redoes it)")
        return True
    if meta or (folder / f"train{cfg.infix}.bin").exists():
        made_from = ", ".join(s["name"] for s in meta["sources"]) if meta \
            else "something else (there is no meta.json)"
        raise ValueError(f"{folder} was prepared from {made_from}, or with other settings. "
                         "--force replaces it, --dataset=NAME writes elsewhere")
    return False


def stopped_before(folder, cfg, asked, share):
    """The state that a stopped prepare of the same input left in `folder`, or None."""
    path = state_path(folder, cfg.infix)
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    parts = [folder / f"{split}{cfg.infix}.{kind}.new"
             for split in ("train", "val") for kind in ("bin", "idx")]
    sizes = [n for s in state["splits"].values() for n in (s["tokens"] * 2, s["documents"] * 8 + 8)]
    whole = all(p.is_file() and p.stat().st_size >= n for p, n in zip(parts, sizes, strict=True))
    if state["asked"] == asked and state["share"] == share and whole:
        return state
    now = {s["name"]: s["sha256"] for s in asked["sources"]}
    changed = [s["name"] for s in state["asked"]["sources"]
               if now.get(s["name"], s["sha256"]) != s["sha256"]]
    print(f"a prepare of {folder} was stopped, but "
          + (f"{', '.join(changed)} changed since then" if changed
             else "it was of other files or with other settings") + "; starting over")
    return None


def write_splits(work, cfg, share, encoder, n_workers, writers, state, save, progress):
    """Encode everything into `writers` and `state`; `save` what is finished now and then."""
    in_val, since = Texts(), 0
    if cfg.val:                     # a text of val that stands in train too is left out of train
        val = sources.joined(sources.sources_of(cfg.val, cfg.text_column, "val"))
        for _, ((ids, starts, sums, _), _) in encoded(val, cfg, encoder, 1):
            in_val.add(ids, starts, sums)
    skipped = collections.Counter(state["skipped"])
    for (place, split, done, told), ((ids, starts, sums, n_bytes), not_taken) in encoded(
            work, cfg, encoder, n_workers, state["place"], state["done"]):
        side = {"val": np.full(len(sums), split == "val")}
        twice = np.zeros(len(sums), bool)
        if split == "train" and cfg.val:
            twice = in_val.has(ids, starts, sums)
        elif split == "train":
            side["val"] = drawn(sums, cfg.seed, share)
        side["train"] = ~side["val"] & ~twice
        for name, writer in writers.items():
            taken = side[name]
            writer.add(of_documents(ids, starts, taken), np.diff(starts)[taken],
                       n_bytes[taken].sum())
        skipped.update({**not_taken, "in both splits": int(twice.sum())})
        before = state["token_count"]
        state.update(               # in one go, so that Ctrl-C finds all of it or nothing
            place=place, done=done, splits={name: w.counts() for name, w in writers.items()},
            skipped={why: n for why, n in sorted(skipped.items()) if n},
            token_count=None if None in (told, before) else before + told)
        n_tokens = sum(w.tokens for w in writers.values())
        progress.set_postfix_str(f"{n_tokens / 1e6:,.1f} M tokens", refresh=False)
        progress.update(int(n_bytes.sum()))
        since += int(n_bytes.sum())
        if since >= SAVE_BYTES:
            save()
            since = 0


def prepare(files, folder, cfg):
    """Tokenize `files` into `folder`, unless that was done before."""
    began = time.time()
    encoder = encoder_of(cfg.encoder)
    ready = threading.Thread(target=get_ready, args=(encoder,), daemon=True)
    ready.start()
    work, total = work_of(files, cfg)
    asked = asked_for(files, work, cfg)
    if unfinished(folder, cfg.infix).exists():
        print(f"finishing the prepare of {folder} that was stopped while it renamed its files")
        commit(folder, cfg.infix)
    refuse_to_mix(folder, cfg)
    if not cfg.force and made_before(folder, cfg, asked):
        return

    n_workers = cfg.num_proc or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    n_workers = min(n_workers, MOST_THREADS) if encoder == "gigatoken" else n_workers
    share = 0.0 if cfg.val else cfg.val_fraction or val_share(total)
    n_bytes = sum(s.text_bytes for s in work)
    rows = [s["rows"] for s in asked["sources"]]
    print(f"preparing {folder} from {told_files(files)}: "
          + ("" if None in rows else f"{sum(rows):,} documents, ")
          + f"about {n_bytes / 1e6:,.{0 if n_bytes > 1e7 else 1}f} MB of text"
          + f" in part {cfg.part}" * bool(cfg.part)
          + f", {encoder}, {n_workers} worker{'s' * (n_workers > 1)}, "
          + (f"val from {cfg.val}" if cfg.val else f"{share:.2%} of the documents for val"))
    if encoder == "tiktoken" and cfg.encoder == "auto" and n_bytes > 100e6:
        print("pip install gigatoken makes the same bytes several times as fast")
    make_room(folder, n_bytes / BYTES_PER_TOKEN * 2)
    state = stopped_before(folder, cfg, asked, share)
    if state:
        n_done = sum(counts["documents"] for counts in state["splits"].values())
        print(f"going on after {n_done:,} documents, where it was stopped")
    else:
        state_path(folder, cfg.infix).unlink(missing_ok=True)
        state = {"asked": asked, "share": share, "place": 0, "done": 0, "skipped": {},
                 "token_count": 0, "splits": {}}
    writers = {split: SplitWriter(folder, split + cfg.infix, state["splits"].get(split))
               for split in ("train", "val")}

    def save():
        for writer in writers.values():
            writer.sync()
        write_json(state_path(folder, cfg.infix), state)

    def remove():
        for path in (*(p for w in writers.values() for p in w.paths),
                     state_path(folder, cfg.infix)):
            path.unlink(missing_ok=True)

    ready.join()
    n_before = sum(writer.text_bytes for writer in writers.values())
    try:
        with sources.bar(n_bytes, "B", initial=n_before) as progress:
            write_splits(work, cfg, share, encoder, n_workers, writers, state, save, progress)
            progress.total = progress.n
        save()
    except BaseException as error:      # Ctrl-C too: what was there stays, what is done is kept
        with contextlib.suppress(OSError):
            if state["splits"]:
                save()
        for writer in writers.values():
            writer.close()
        if not state["splits"]:
            remove()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(f"no space is left for {folder}, which will have about "
                          f"{n_bytes / BYTES_PER_TOKEN * 2 / 1e6:,.1f} MB. Make room; the same "
                          f"command {'goes on from there' if state['splits'] else 'begins anew'}"
                          ) from None
        raise
    for split, writer in writers.items():
        if not writer.documents and not cfg.part:
            remove()
            why = ", ".join(f"{n:,} are {what}" for what, n in state["skipped"].items())
            raise ValueError(f"no document is left for {split} ({why or 'there are few'}). Give "
                             "more text" + ", a larger --val_fraction or a --val=FILE"
                             * (split == "val"))
    meta = finished(folder, cfg, asked, share, encoder, writers, state)
    write_json(unfinished(folder, cfg.infix), meta)
    commit(folder, cfg.infix)
    report(folder, cfg, meta, n_before, time.time() - began)


def make_room(folder, n_bytes):
    """Make `folder`, and refuse where it cannot take `n_bytes` more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".writable", "w"):
            pass
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}); "
                      "choose another place or free that one") from None
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ValueError(f"{folder} will have about {n_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} "
                         "MB are free on its disk; make room first")


def finished(folder, cfg, asked, share, encoder, writers, state):
    """meta.json of files that are whole; before that, val without what stands in train too."""
    splits = {name: writer.finish() for name, writer in writers.items()}
    near = None
    if cfg.dedup_val:
        ids, starts = (np.fromfile(path, kind) for path, kind in zip(
            writers["val"].paths, (np.uint16, np.uint64), strict=True))
        starts = starts.astype(np.int64)
        print("looking for documents of val that stand nearly the same in train")
        with sources.bar(splits["train"]["tokens"], " tokens") as progress:
            leaked, _ = duplicates.leaked(writers["train"].paths[:1], ids, starts, progress.update)
        near = int(leaked.sum())
        if leaked.all():
            raise ValueError("every document of val stands in train too; "
                             "give another --val or leave out --dedup_val")
        if near:
            splits["val"] = without(folder, leaked, ids, starts, writers["val"].paths)
    versions = {name: importlib.metadata.version(name) for name in {encoder, "tiktoken", "pyarrow"}}
    return {"format": FORMAT, **asked, "drawn_fraction": share, "splits": splits,
            "skipped": state["skipped"], "token_count_column": state["token_count"],
            "near_duplicates": near, "versions": dict(sorted(versions.items()))}


def without(folder, leaked, ids, starts, paths):
    """Write val again without the documents that are `leaked`; return its entry in meta.json."""
    kept = SplitWriter(folder, "val.kept")
    text = GPT2Tokenizer()
    for d in np.flatnonzero(~leaked):
        document = ids[starts[d]:starts[d + 1]]
        kept.add(document, [len(document)], len(text.decode_bytes(document[1:])))
    entry = kept.finish()
    state_path(folder, "").unlink(missing_ok=True)     # val is no longer what it was stopped with
    for new, old in zip(kept.paths, paths, strict=True):
        os.replace(new, old)
    return entry


def told_files(files):
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(map(str, files[:3])) + more


def report(folder, cfg, meta, n_before, seconds):
    splits, told = meta["splits"].values(), meta["token_count_column"]
    mb, counted = (sum(s["text_bytes"] for s in splits) / 1e6,
                   sum(s["tokens"] - s["documents"] for s in splits))
    print(f"{folder}: {summary(meta)} in {seconds:.1f} s "
          f"({mb - n_before / 1e6:,.1f} MB, {(mb - n_before / 1e6) / seconds:.1f} MB/s)")
    if meta["skipped"]:
        print("left out: " + ", ".join(f"{n:,} documents {why}"
                                       for why, n in meta["skipped"].items()))
    if cfg.dedup_val:
        print(f"left out of val: {meta['near_duplicates']:,} documents that stand in train for the "
              "most part")
    if cfg.part:
        print(f"part {cfg.part}; train.py reads them when all are in {folder}")
    if told is not None and "in both splits" not in meta["skipped"] and not cfg.dedup_val:
        same = "the same as" if told == counted else f"{counted - told:+,} against"
        print(f"{counted:,} tokens of text, {same} the sum of the files' token_count column")


def summary(meta):
    return ", ".join(f"{name} {s['documents']:,} documents and {s['tokens']:,} tokens"
                     for name, s in meta["splits"].items())


def main(cfg):
    if cfg.check:
        check.check(Path(cfg.check))
        return
    if cfg.sample and (cfg.files or cfg.download):
        raise ValueError("--sample builds its own text; leave out the files and --download")
    dataset = cfg.dataset or ("sample" if cfg.sample else "fineweb")
    if cfg.download:
        sources.download()
    if cfg.sample and (cfg.force or not SAMPLE.exists()):
        sources.write_sample(SAMPLE)
    if cfg.files:
        files = sources.named(cfg.files)
    else:
        files = [str(SAMPLE if cfg.sample else FINEWEB if cfg.download
                     else sources.find_parquet(dataset))]
    try:
        prepare(files, DATA / dataset, cfg)
    except KeyboardInterrupt:
        kept = state_path(DATA / dataset, cfg.infix).exists()
        sys.exit(f"\nstopped; {DATA / dataset} is as it was before"
                 + "; the same command goes on from here" * kept)


if __name__ == "__main__":
    run(main, PrepareConfig, __doc__)
