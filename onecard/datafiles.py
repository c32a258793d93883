"""The files of a dataset, and how new ones replace them all at once.

    data/fineweb/train.bin  val.bin     uint16 token ids; every document is 50256, then its text
    data/fineweb/train.idx  val.idx     uint64 position where each document begins, and the end
    data/fineweb/meta.json              what made them: sources, settings, counts, checksums

New files are written beside these: train.bin.new and so on, meta.json.new last. While that one
exists, all five are whole and only have to be renamed.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from onecard.files import DATA, lock, replace, sha256, unlock, write_text
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT, GPT2Tokenizer

FORMAT = 1                              # of meta.json and the files that it describes
SPLITS = ("train", "val")
NAMES = ("train.bin", "train.idx", "val.bin", "val.idx", "meta.json")     # renamed in this order
HEADER = """\
                                      bytes   tokens a document:
        documents          tokens   a token    median      90 %     longest"""
SHOWN_TOKENS = 60                       # of a document, in describe()


def is_prepared(folder):
    """True if the folder holds a dataset of ours or of nanoGPT's."""
    return (Path(folder) / "train.bin").is_file()


def folder_of(dataset):
    """The folder that a `dataset` setting means: a name under data/, or a prepared folder."""
    path = Path(dataset)
    is_name = path.parts and not path.is_absolute() and ".." not in path.parts
    if is_name and (is_prepared(DATA / path) or not is_prepared(path)):
        return DATA / path
    if dataset and is_prepared(path):
        return path
    raise UserError(f"dataset = {dataset!r} must be a name under {DATA}/, or the path of a folder "
                    "that holds a train.bin")


def read_meta(folder):
    """The dict of meta.json, or None for a folder without one, as nanoGPT's scripts leave it."""
    path = Path(folder) / "meta.json"
    if path.with_name("meta.json.new").exists():
        raise UserError(f"prepare.py was stopped while it replaced {folder}; `python prepare.py "
                        f"--dataset={path.parent.name}` finishes that")
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and {"splits", "sources"} <= meta.keys():
            return meta
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged or of another format than {FORMAT}; `python prepare.py "
                    f"FILES --dataset={path.parent.name} --force` makes it again")


def verify(path, digest):
    """Raise UserError unless the file has this SHA-256."""
    if not path.is_file() or sha256(path) != digest:
        raise UserError(f"{path} is not the file that prepare.py wrote (another checksum); `python "
                        f"prepare.py FILES --dataset={path.parent.name} --force` makes it again")


def describe(folder):
    """A table of what is in a prepared dataset, and how a document of each split begins."""
    table, texts = [HEADER], []
    for split, counts in read_meta(folder)["splits"].items():
        n_documents, n_tokens = counts["documents"], counts["tokens"]
        bytes_a_token = counts["text_bytes"] / (n_tokens - n_documents)
        lengths = np.diff(np.fromfile(folder / f"{split}.idx", np.int64))
        median, ninety, longest = np.quantile(lengths, (0.5, 0.9, 1.0), method="nearest")
        table.append(f"{split:5}{n_documents:>12,}{n_tokens:>16,}{bytes_a_token:>10.2f}"
                     f"{median:>10,}{ninety:>10,}{longest:>12,}")
        text = beginning(folder / f"{split}.bin", lengths[0])
        texts.append(f"{split} begins: {text}")
    return "\n".join(table + texts)


def beginning(path, n_tokens):
    """The first words of the first document, which has `n_tokens`, in one line."""
    ids = np.fromfile(path, np.uint16, count=min(n_tokens, SHOWN_TOKENS))
    text = GPT2Tokenizer().decode_bytes(ids[1:]).decode("utf-8", "ignore")
    # What is not printable could move the cursor of a terminal, or change its colours.
    return "".join(letter if letter.isprintable() else " " for letter in text)


@contextlib.contextmanager
def write_errors(folder):
    """Turn an OSError of writing (a full disk, a folder of somebody else) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be prepared ({error}). Make room, or close what uses its "
                        "files; the same command tries again") from None


@contextlib.contextmanager
def locked(folder):
    """Make the folder, and lock it for the block. Only one process can write a dataset to it.

    Finishes what a process that was killed left. A new folder that stays empty is removed.
    """
    is_new = not folder.exists()
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, "preparing a dataset")
    try:
        with write_errors(folder):
            rename_new_files(folder)
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):      # it is not empty
                folder.rmdir()
        unlock(folder)


def finish_renames(folder):
    """Finish what a process that was killed while it replaced the files of a dataset left."""
    if (folder / "meta.json.new").exists():
        with locked(folder):
            pass


def rename_new_files(folder):
    """Rename the new files of a dataset, if all are whole. After a kill, call it again."""
    if (folder / "meta.json.new").exists():
        for name in NAMES:
            beside = folder / f"{name}.new"
            if beside.exists():         # else it was renamed before a kill
                replace(beside, folder / name)


@contextlib.contextmanager
def new_dataset(folder):
    """Yield a SplitWriter of each split, {split: writer}, inside of locked(folder).

        with new_dataset(folder) as writers:
            writers["train"].add(batch, chosen)
            finish(folder, writers, meta)       # until here the old files are untouched

    If the block raises, the new files are removed.
    """
    with write_errors(folder):
        writers = {split: SplitWriter(folder, split) for split in SPLITS}
        try:
            yield writers
        finally:
            for writer in writers.values():
                writer.close()
            if not (folder / "meta.json.new").exists():         # else they are whole
                for name in NAMES:
                    (folder / f"{name}.new").unlink(missing_ok=True)


def finish(folder, writers, meta):
    """Complete the new files, and let them take the place of the old ones."""
    counts = {split: writer.finish() for split, writer in writers.items()}
    for split in SPLITS:
        if not counts[split]["documents"]:
            raise UserError(f"no document is left for {split}, as its files hold none or the same "
                            "ones as --val; give other files")
    meta = {"format": FORMAT, **meta, "tokenizer": "gpt2", "splits": counts}
    write_text(folder / "meta.json.new", json.dumps(meta, indent=2))
    rename_new_files(folder)


class SplitWriter:
    """Writes train.bin.new and train.idx.new, or val's, and counts what is in them."""

    def __init__(self, folder, split):
        self.bin = open(folder / f"{split}.bin.new", "wb")
        self.idx = open(folder / f"{split}.idx.new", "wb")
        self.digest, self.lengths, self.text_bytes = hashlib.sha256(), [], 0

    def add(self, batch, chosen):
        """Append the documents of `batch` for which `chosen` (bool) is True."""
        ids = batch.ids[np.repeat(chosen, batch.lengths)]
        self.bin.write(ids)
        self.digest.update(ids)
        self.lengths.append(batch.lengths[chosen])
        self.text_bytes += int(batch.text_bytes[chosen].sum())

    def finish(self):
        """Bring the files to the disk; returns their entry in meta.json."""
        starts = np.concatenate([[0], *self.lengths]).cumsum().astype(np.uint64)
        self.idx.write(starts)
        for file in self.bin, self.idx:
            file.flush()
            os.fsync(file.fileno())
        self.close()
        return {"documents": len(starts) - 1, "tokens": int(starts[-1]),
                "text_bytes": self.text_bytes, "max_token": END_OF_TEXT,
                "bin_sha256": self.digest.hexdigest(),
                "idx_sha256": hashlib.sha256(starts).hexdigest()}

    def close(self):
        for file in self.bin, self.idx:
            with contextlib.suppress(OSError):      # the disk is full, which was reported before
                file.close()
