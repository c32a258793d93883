"""
parquet -> data/<dataset>/{train,val}.bin + index + meta.json

    python prepare.py                            # the one parquet file under data/ -> data/fineweb/
    python prepare.py --download                 # fetch FineWeb's first file (2 GB) before that
    python prepare.py --sample                   # a small dataset from Python's own documentation
    python prepare.py my.parquet --dataset=mine  # any parquet file with a column of text
    python prepare.py a.parquet b.parquet --val=c.parquet --dataset=mine

Every document becomes 50256 (end of text) and then its GPT-2 tokens, in the order of the file. What
was in the folder before stays until the new files are whole.
"""
import ast
import collections
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

from configurator import run
from loader import FORMAT, UNFINISHED, read_meta, sha256
from tokenizer import END_OF_TEXT, N_VOCAB, VOCAB_SHA256, GPT2Tokenizer

DATA = Path("data")
FINEWEB = DATA / "fineweb_one_shard" / "000_00000.parquet"     # where --download puts it
SAMPLE = DATA / "sample" / "sample.parquet"
DOWNLOAD_TRIES = 5                  # in a row without a single new byte
ROWS_PER_TASK = 500             # documents that one worker gets at a time, about 1.5 MB of web text
BYTES_PER_TOKEN = 4.5           # of English text, to guess a validation fraction before counting
VAL_TOKENS = 50_000             # what a small dataset's validation split should have
MAX_VAL_FRACTION = 0.1          # but never more of its documents than this


@dataclass(frozen=True)
class PrepareConfig:
    files: tuple = ()               # parquet files; none = the one under data/
    dataset: str = ""               # folder under data/; "" = fineweb, or sample with --sample
    val: str = ""                   # parquet file to validate on; "" = drawn from the files
    text_column: str = "text"       # column that holds the documents
    val_fraction: float = 0.0       # of the documents; 0 = 0.005, more where the files are small
    seed: int = 1337                # decides which documents are drawn for validation
    num_proc: int = 0               # worker processes; 0 = one per core
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
            raise ValueError(f"num_proc = {self.num_proc} is a number of processes; "
                             "0 takes one per core")


def val_share(n_bytes):
    """Share of the documents that validate where nobody says: more of a small text of `n_bytes`."""
    return min(max(0.005, VAL_TOKENS * BYTES_PER_TOKEN / max(n_bytes, 1)), MAX_VAL_FRACTION)


def find_parquet(dataset):
    """The one parquet file that `dataset` can mean: in data/<dataset>/, or for 'fineweb' where our
    user puts it, else anywhere under data/.

    Raises ValueError where there is none or more than one.
    """
    if dataset == "sample":
        return SAMPLE
    places = [DATA / dataset]
    if dataset == "fineweb":
        places = [FINEWEB.parent, DATA / dataset, DATA]
    found = []
    for place in places:
        found = found or sorted(p for p in place.rglob("*.parquet") if p != SAMPLE)
    if not found:
        raise ValueError(f"there is no parquet file under {places[-1].resolve()}. Move yours to "
                         f"{FINEWEB if dataset == 'fineweb' else DATA / dataset / 'FILE.parquet'}, "
                         "or name it (`python prepare.py FILE --dataset=NAME`), "
                         "or fetch FineWeb's (`python prepare.py --download`)")
    if len(found) > 1:
        raise ValueError(f"there are {len(found)} parquet files that {dataset} can mean: "
                         f"{', '.join(map(str, found[:5]))}. "
                         f"Name those to use: `python prepare.py {found[0]} --dataset={dataset}`")
    return found[0]


def download():
    """Fetch the FineWeb file to FINEWEB, going on where an earlier try was cut off."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
    except ImportError:
        raise ImportError("--download needs huggingface_hub: pip install huggingface_hub") from None
    if FINEWEB.is_file():
        print(f"{FINEWEB} is already here")
        return
    url = hf_hub_url("HuggingFaceFW/fineweb", "data/CC-MAIN-2013-20/000_00000.parquet",
                     repo_type="dataset")
    try:
        about = get_hf_file_metadata(url)
    except Exception as error:          # of several libraries: no network, or the hub is down
        raise OSError(f"the hub does not answer for {url}: {error}") from None
    FINEWEB.parent.mkdir(parents=True, exist_ok=True)
    part = FINEWEB.with_name(f"{FINEWEB.name}.{about.etag[:16]}.part")  # of this version of it
    with open(part, "ab") as f, bar(about.size, "B") as progress:
        progress.update(f.tell())
        failures = 0
        while f.tell() < about.size and failures < DOWNLOAD_TRIES:
            before = f.tell()
            try:
                request = urllib.request.Request(url, headers={"Range": f"bytes={before}-"})
                with urllib.request.urlopen(request, timeout=30) as answer:
                    if before and answer.status != 206:
                        raise OSError(f"{url} does not send a part of the file; remove {part}")
                    while block := answer.read(1 << 20):
                        f.write(block)
                        progress.update(len(block))
            except urllib.error.URLError as error:
                print(f"the download was cut off at {f.tell():,} bytes ({error.reason}); going on")
            f.flush()
            failures = 0 if f.tell() > before else failures + 1
            time.sleep(2 ** failures - 1)
        size = f.tell()
    if size != about.size:
        raise OSError(f"the download stopped at {size:,} of {about.size:,} bytes. "
                      "The same command goes on from there")
    if len(about.etag) == 64 and sha256(part) != about.etag:
        part.unlink()
        raise OSError(f"what came from {url} is not the file (its checksum differs); try again")
    os.replace(part, FINEWEB)


def write_sample(path):
    """Write a parquet file in FineWeb's schema from this Python's documentation, a document each:
    the help topics of pydoc and the docstrings of the standard library."""
    documents = []
    try:
        from pydoc_data.topics import topics
        documents += [(f"pydoc/{name}", text) for name, text in sorted(topics.items())]
    except ImportError:             # some Linux distributions leave it out
        pass
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        part = source.relative_to(library)
        if {"site-packages", "dist-packages",
            "test", "tests", "idle_test", "lib2to3"} & set(part.parts):
            continue
        try:
            tree = ast.parse(source.read_bytes())
        except (SyntaxError, ValueError):
            continue                # files that show errors on purpose
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    documents.append((f"{part.as_posix()}#{getattr(node, 'name', '')}", text))
    if not documents:
        raise ValueError(f"this Python has no documentation in {library}; take another text: "
                         "`python prepare.py FILE.parquet --dataset=NAME`")
    tokenizer = GPT2Tokenizer()
    n = len(documents)
    table = pa.table({
        "text": [text for _, text in documents], "id": [f"<urn:sample:{i}>" for i in range(n)],
        "dump": ["python-documentation"] * n, "url": [url for url, _ in documents],
        "date": [sys.version.split()[0]] * n, "file_path": [str(library)] * n,
        "language": ["en"] * n, "language_score": [1.0] * n,
        "token_count": [len(tokenizer.encode(text)) for _, text in documents],
    })
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    pq.write_table(table, beside, row_group_size=1000, compression="zstd")
    os.replace(beside, path)


def open_parquet(path, text_column):
    """pq.ParquetFile whose `text_column` holds text, or a ValueError that says what is there."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        file = pq.ParquetFile(path, pre_buffer=False)       # else all of it stays in memory
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file (was it cut off?): "
                         f"{str(error).splitlines()[0]}") from None
    schema = file.schema_arrow
    if text_column not in schema.names:
        raise ValueError(f"{path} has no column {text_column!r}; it has {', '.join(schema.names)}. "
                         "Name the one with the text: --text_column=...")
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(
            f"column {text_column!r} of {path} is of type {kind}, not text; columns of text are "
            f"{', '.join(f.name for f in schema if pa.types.is_string(f.type)) or 'none'}")
    return file


def text_bytes(file, text_column):
    """About how many bytes of text a parquet file holds, from its footer."""
    column = next(c for c in range(len(file.schema)) if file.schema.column(c).path == text_column)
    return sum(file.metadata.row_group(g).column(column).total_uncompressed_size
               for g in range(file.metadata.num_row_groups))


def batches(path, text_column):
    """Yield (column of texts, sum of the file's own token_count or None) per ROWS_PER_TASK rows."""
    file = open_parquet(path, text_column)
    columns = [text_column] + ["token_count"] * ("token_count" in file.schema_arrow.names)
    try:
        for batch in file.iter_batches(ROWS_PER_TASK, columns=columns):
            counts = batch.column("token_count") if len(columns) > 1 else None
            yield (batch.column(text_column),
                   (pc.sum(counts).as_py() or 0) if counts is not None else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}. "
                         "Fetch it again") from None


def texts_of(column):
    """The documents of an arrow column as str, None for null. Broken UTF-8 becomes U+FFFD."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        binary = pa.large_binary() if pa.types.is_large_string(raw.type) else pa.binary()
        return [b and b.decode("utf-8", "replace") for b in raw.view(binary).to_pylist()]


def fingerprint(text, seed):
    """64 bits of a hash of (seed, text): the same text, the same side of the split, everywhere."""
    key = str(seed).encode()
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=key).digest(), "little")


def fingerprints(column, seed):
    """uint64 fingerprints of the documents of a column that have text."""
    return np.array([fingerprint(text, seed) for text in texts_of(column) if text], np.uint64)


def encode(column, seed, val_below, left_out):
    """What a worker does with a batch of documents.

    Documents whose fingerprint is below `val_below` (of 2**64) go to val, those in `left_out`
    (sorted uint64) nowhere. Returns {"train": (tokens uint16, lengths), "val": (tokens uint16,
    lengths)}, the bytes of text of each, and how many were empty, null or left out.
    """
    tokenizer = GPT2Tokenizer()
    tokens, lengths = {"train": [], "val": []}, {"train": [], "val": []}
    n_bytes, skipped = {"train": 0, "val": 0}, collections.Counter()
    for text in texts_of(column):
        if not text:
            skipped["null" if text is None else "empty"] += 1
            continue
        mark = fingerprint(text, seed)
        if len(left_out) and \
                left_out[min(np.searchsorted(left_out, mark), len(left_out) - 1)] == mark:
            skipped["in both splits"] += 1
            continue
        split = "val" if mark < val_below else "train"
        ids = tokenizer.encode(text)
        tokens[split] += [np.array([END_OF_TEXT], np.uint16), ids]
        lengths[split].append(len(ids) + 1)
        n_bytes[split] += len(text.encode("utf-8", "replace"))
    joined = {s: (np.concatenate(tokens[s]) if tokens[s] else np.zeros(0, np.uint16),
                  np.array(lengths[s], np.uint64)) for s in tokens}
    return joined, n_bytes, skipped


class SplitWriter:
    """Writes NAME.bin.new and NAME.idx.new, and knows their counts and checksums at the end."""

    def __init__(self, folder, split):
        self.paths = [folder / f"{split}.{kind}.new" for kind in ("bin", "idx")]
        self.files = [open(p, "wb") for p in self.paths]
        self.digests = [hashlib.sha256(), hashlib.sha256()]
        self.documents = self.tokens = self.text_bytes = self.max_token = 0
        self._write(1, np.zeros(1, np.uint64))

    def _write(self, which, array):
        data = array.tobytes()
        self.files[which].write(data)
        self.digests[which].update(data)

    def add(self, tokens, lengths, n_bytes):
        if len(lengths):
            self._write(0, tokens)
            self._write(1, np.uint64(self.tokens) + np.cumsum(lengths, dtype=np.uint64))
            self.documents += len(lengths)
            self.tokens += len(tokens)
            self.max_token = max(self.max_token, int(tokens.max()))
        self.text_bytes += n_bytes

    def discard(self):
        for f, path in zip(self.files, self.paths, strict=True):
            f.close()
            path.unlink(missing_ok=True)

    def finish(self):
        """Put the files on the disk; return their entry in meta.json."""
        for f in self.files:
            f.flush()
            os.fsync(f.fileno())
            f.close()
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes,
                "max_token": self.max_token, "bin_sha256": self.digests[0].hexdigest(),
                "idx_sha256": self.digests[1].hexdigest()}


def commit(folder):
    """Rename the files of a finished prepare into place, meta.json last.

    meta.json.new is written when all others are whole, so where it exists a stopped commit goes on.
    """
    for name in ("train.bin", "train.idx", "val.bin", "val.idx", "meta.json"):
        beside = folder / f"{name}.new"
        if beside.exists():
            os.replace(beside, folder / name)


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


def in_order(function, tasks, num_proc):
    """Yield (note, function(*arguments)) for tasks (note, arguments), in order, over processes."""
    if num_proc == 1:
        for note, arguments in tasks:
            yield note, function(*arguments)
        return
    spawn = multiprocessing.get_context("spawn")    # the same on every system, safe beside threads
    with ProcessPoolExecutor(num_proc, mp_context=spawn, initializer=_start_worker) as pool:
        running = collections.deque()
        try:
            for note, arguments in tasks:
                with _ctrl_c_blocked():             # the pool starts its processes as it needs them
                    running.append((note, pool.submit(function, *arguments)))
                if len(running) > 2 * num_proc:     # bounds the memory, whatever the file's size
                    note, result = running.popleft()
                    yield note, result.result()
            while running:
                note, result = running.popleft()
                yield note, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def bar(total, unit):
    """A progress bar on a terminal; elsewhere it prints nothing, and the caller's lines tell."""
    return tqdm(total=total, unit=unit, unit_scale=True, disable=None, dynamic_ncols=True,
                smoothing=0.1)


def asked_for(files, cfg):
    """The part of meta.json that decides the bytes: what goes in, and by which settings."""
    sources = [{"name": Path(path).name,
                "rows": open_parquet(path, cfg.text_column).metadata.num_rows,
                "bytes": Path(path).stat().st_size, "sha256": sha256(path), "split": split}
               for path, split in [*((f, "train") for f in files), (cfg.val, "val")] if path]
    return {"sources": sources, "text_column": cfg.text_column, "seed": cfg.seed,
            "val_fraction": cfg.val_fraction,
            "tokenizer": {"name": "gpt2", "sha256": VOCAB_SHA256, "n_vocab": N_VOCAB,
                          "end_of_text": END_OF_TEXT}}


def made_before(folder, asked):
    """True if `folder` holds what is asked for; a ValueError if it holds something else."""
    meta = read_meta(folder)
    if meta and {key: meta[key] for key in asked} == asked:
        print(f"{folder} is already prepared from {', '.join(s['name'] for s in meta['sources'])}: "
              f"{summary(meta)}. Nothing to do (--force redoes it)")
        return True
    if meta or (folder / "train.bin").exists():
        made_from = ", ".join(s["name"] for s in meta["sources"]) if meta \
            else "something else (there is no meta.json)"
        raise ValueError(f"{folder} was prepared from {made_from}, or with other settings. "
                         "--force replaces it, --dataset=NAME writes elsewhere")
    return False


def write_splits(files, cfg, share, writers, num_proc, progress):
    """Tokenize everything into `writers`. Returns (how many documents were left out and why, the
    sum of the files' own token_count column or None)."""
    skipped, told_tokens, began = collections.Counter(), [], time.time()
    nothing = np.zeros(0, np.uint64)
    in_val = nothing
    if cfg.val:                     # a text of val that stands in train too is left out of train
        in_val = np.unique(np.concatenate([
            nothing, *(fingerprints(column, cfg.seed)
                       for column, _ in batches(cfg.val, cfg.text_column))]))
    everything = [*((f, int(share * 2**64), in_val) for f in files), (cfg.val, 2**64, nothing)]
    tasks = ((told, (column, cfg.seed, val_below, left_out))
             for path, val_below, left_out in everything if path
             for column, told in batches(path, cfg.text_column))
    for told, (splits, n_bytes, not_taken) in in_order(encode, tasks, num_proc):
        for split, (tokens, lengths) in splits.items():
            writers[split].add(tokens, lengths, n_bytes[split])
        skipped.update(not_taken)
        told_tokens.append(told)
        n_tokens, done = (sum(getattr(w, what) for w in writers.values())
                          for what in ("tokens", "text_bytes"))
        progress.set_postfix_str(f"{n_tokens / 1e6:,.1f} M tokens, "
                                 f"{done / 1e6 / (time.time() - began):.1f} MB/s", refresh=False)
        progress.update(sum(len(lengths) for _, lengths in splits.values())
                        + sum(not_taken.values()))
    return dict(sorted(skipped.items())), None if None in told_tokens else sum(told_tokens)


def prepare(files, folder, cfg):
    """Tokenize parquet `files` into `folder`, unless that was done before."""
    began = time.time()
    asked = asked_for(files, cfg)
    if (folder / UNFINISHED).exists():
        print(f"finishing the prepare of {folder} that was stopped while it renamed its files")
        commit(folder)
    if not cfg.force and made_before(folder, asked):
        return

    num_proc = cfg.num_proc or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    n_bytes = sum(text_bytes(open_parquet(f, cfg.text_column), cfg.text_column) for f in files)
    share = 0.0 if cfg.val else cfg.val_fraction or val_share(n_bytes)
    rows = sum(s["rows"] for s in asked["sources"])
    print(f"preparing {folder} from {', '.join(map(str, files))}: {rows:,} documents, "
          f"about {n_bytes / 1e6:,.0f} MB of text, {num_proc} process{'es' * (num_proc > 1)}, "
          + (f"val from {cfg.val}" if cfg.val else f"{share:.2%} of the documents for val"))
    folder.mkdir(parents=True, exist_ok=True)
    writers = {split: SplitWriter(folder, split) for split in ("train", "val")}
    try:
        with bar(rows, " docs") as progress:
            skipped, told_tokens = write_splits(files, cfg, share, writers, num_proc, progress)
        for name, writer in writers.items():
            if not writer.documents:
                more = ", a larger --val_fraction or a --val=FILE" * (name == "val")
                raise ValueError(f"no document is left for {name} ({skipped or 'of all'}). "
                                 f"Give more text{more}")
        splits = {name: writer.finish() for name, writer in writers.items()}
    except BaseException:               # Ctrl-C too: what is half done goes, what was there stays
        for writer in writers.values():
            writer.discard()
        raise
    meta = {"format": FORMAT, **asked, "drawn_fraction": share, "splits": splits,
            "skipped": skipped, "token_count_column": told_tokens,
            "versions": {"tiktoken": tiktoken.__version__, "pyarrow": pa.__version__}}
    beside = folder / f"{UNFINISHED}.part"
    with open(beside, "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, folder / UNFINISHED)
    commit(folder)
    report(folder, meta, time.time() - began)


def report(folder, meta, seconds):
    splits, told = meta["splits"].values(), meta["token_count_column"]
    mb, counted = (sum(s["text_bytes"] for s in splits) / 1e6,
                   sum(s["tokens"] - s["documents"] for s in splits))
    print(f"{folder}: {summary(meta)} in {seconds:.1f} s ({mb / seconds:.1f} MB/s)")
    if meta["skipped"]:
        print("left out: " + ", ".join(f"{n:,} documents {why}"
                                       for why, n in meta["skipped"].items()))
    if told is not None and "in both splits" not in meta["skipped"]:
        same = "the same as" if told == counted else f"{counted - told:+,} against"
        print(f"{counted:,} tokens of text, {same} the sum of the files' token_count column")


def summary(meta):
    return ", ".join(f"{name} {s['documents']:,} documents and {s['tokens']:,} tokens"
                     for name, s in meta["splits"].items())


def main(cfg):
    if cfg.sample and (cfg.files or cfg.download):
        raise ValueError("--sample builds its own text; leave out the files and --download")
    dataset = cfg.dataset or ("sample" if cfg.sample else "fineweb")
    if cfg.download:
        download()
    if cfg.sample and (cfg.force or not SAMPLE.exists()):
        write_sample(SAMPLE)
    if cfg.files:
        files = list(cfg.files)
    else:
        files = [str(SAMPLE if cfg.sample else FINEWEB if cfg.download else find_parquet(dataset))]
    try:
        prepare(files, DATA / dataset, cfg)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {DATA / dataset} is as it was before")


if __name__ == "__main__":
    run(main, PrepareConfig, __doc__)
