"""
Turn text into a dataset: data/<dataset>/train.bin and val.bin, GPT-2 token ids as uint16.

    python prepare.py                             # the one parquet file under data/
    python prepare.py --download                  # fetch FineWeb's first file (2 GB) before that
    python prepare.py --sample                    # a small dataset from Python's documentation
    python prepare.py my.parquet --dataset=mine   # .parquet, .jsonl or .txt, also .gz and .zst

Every document becomes 50256 (end of text) and then its tokens. The new files are written beside the
old ones and renamed at the end, so a prepare that is stopped leaves the folder as it was.
"""
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from onecard import datafiles, documents, encoder, samples
from onecard.files import sha256
from onecard.settings import UserError, at_least, configure_and_run, one_of


@dataclass(frozen=True)
class PrepareConfig:
    files: tuple = ()                   # text files or folders of them; none: the one under data/
    dataset: str = ""                   # folder under data/; "": fineweb, or sample with --sample
    val: str = ""                       # a file to validate on; "": documents drawn from the files
    val_fraction: float = 0.0           # share of the documents that is drawn; 0: chosen by size
    text_column: str = "text"           # column or field that holds the text
    seed: int = 1337                    # decides which documents are drawn
    encoder: str = "auto"               # gigatoken, tiktoken (same ids, slower) or auto
    num_proc: int = 0                   # threads that encode; 0: one for each core
    download: bool = False              # fetch FineWeb's first file and prepare it
    sample: bool = False                # make a small dataset from Python's documentation
    force: bool = False                 # do it again, replace what was made from other files

    def __post_init__(self):
        at_least(0, self, "val_fraction", "num_proc")
        one_of(self, encoder=("auto", "gigatoken", "tiktoken"))
        if self.val_fraction >= 1:
            raise UserError(f"val_fraction = {self.val_fraction} must be below 1, as it is a share")
        if self.val and self.val_fraction:
            raise UserError("--val names the text to validate on, --val_fraction draws it; set one")
        sources = [bool(self.files), self.sample, self.download]
        if sum(sources) > 1:
            raise UserError("files, --sample and --download each bring the text; set one of them")


def find_files(cfg, dataset):
    """The files of each split, {split: paths}. Fetches or makes the text first, if that is set."""
    names, val_files = cfg.files, []
    if cfg.val:
        val_files = documents.find([cfg.val], dataset)
    if cfg.download:
        samples.download_fineweb()
        names = [documents.FINEWEB]
    if cfg.sample:
        if not documents.SAMPLE.exists():
            samples.write_sample(documents.SAMPLE)
        names = [documents.SAMPLE]
    return {"train": documents.find(names, dataset), "val": val_files}


def describe_inputs(files, cfg):
    """The part of meta.json that decides the ids: what is read, and by which settings."""
    sources = [{"name": path.name, "sha256": sha256(path), "split": split}
               for split in files for path in files[split]]
    return {"sources": sources, "text_column": cfg.text_column, "seed": cfg.seed,
            "val_fraction": cfg.val_fraction}


def comparison_key(inputs):
    """What is equal for two datasets that have the same documents in each split."""
    sources = [(source["sha256"], source["split"]) for source in inputs["sources"]]
    return sources, inputs["text_column"], inputs["seed"], inputs["val_fraction"]


def is_made_from(folder, inputs):
    """True if the folder was prepared from `inputs`. Raises UserError for other inputs."""
    if not datafiles.is_prepared(folder):
        return False
    meta = datafiles.read_meta(folder)          # None: made by nanoGPT, nobody knows from what
    if meta and comparison_key(meta) == comparison_key(inputs):
        return True
    raise UserError(f"{folder} was prepared from other files or with other settings; --force "
                    "replaces it, --dataset=NAME writes to another folder")


def write_splits(files, cfg, share, writers, bar):
    """Encode all documents into the two splits. Returns how many were left out, and why."""
    skipped, val_hashes = Counter(), np.zeros(0, np.uint64)
    if cfg.val:
        columns = documents.batches(files["val"], cfg.text_column, skipped)
        for batch in encoder.encode(columns, cfg):
            val_hashes = np.append(val_hashes, batch.hashes)
            writers["val"].add(batch, np.ones(len(batch.hashes), bool))
            bar.update(batch.text_bytes.sum())
    columns = documents.batches(files["train"], cfg.text_column, skipped)
    for batch in encoder.encode(columns, cfg):
        # A hash is like a random number from 0 to 2**64, but equal documents have equal ones. So
        # this draws `share` of the documents, and never puts a text into both splits.
        is_val = batch.hashes < np.uint64(share * 2**64)
        is_in_both = np.isin(batch.hashes, val_hashes)
        writers["val"].add(batch, is_val)
        writers["train"].add(batch, ~is_val & ~is_in_both)
        skipped["in both splits"] += int(is_in_both.sum())
        bar.update(batch.text_bytes.sum())
    return {reason: n for reason, n in skipped.items() if n}


def prepare(files, folder, cfg, inputs):
    """Write the dataset of the files into the folder."""
    began = time.time()
    name = encoder.choose(cfg.encoder)
    print(f"preparing {folder} by {name}")
    if name == "tiktoken" and cfg.encoder == "auto":
        print("`pip install gigatoken` makes the same ids many times as fast")
    text_bytes = documents.text_bytes(files["train"] + files["val"], cfg.text_column)
    share = cfg.val_fraction or documents.val_share(text_bytes)
    if cfg.val:
        share = 0.0                     # nothing is drawn
    with datafiles.new_dataset(folder) as writers:
        with tqdm(total=text_bytes, unit="B", unit_scale=True, disable=None) as bar:
            skipped = write_splits(files, cfg, share, writers, bar)
        datafiles.finish(folder, writers, {**inputs, "skipped": skipped})
    print(datafiles.describe(folder))
    for reason, n in skipped.items():
        print(f"documents {reason}: {n:,}")
    print(f"prepared in {time.time() - began:.1f} s")


def main(cfg):
    default = "sample" if cfg.sample else "fineweb"
    dataset = cfg.dataset or default
    folder = datafiles.DATA / dataset
    datafiles.finish_renames(folder)
    files = find_files(cfg, dataset)
    inputs = describe_inputs(files, cfg)
    if not cfg.force and is_made_from(folder, inputs):
        print(f"{folder} is already prepared from these files; --force does it again")
    else:
        prepare(files, folder, cfg, inputs)


if __name__ == "__main__":
    configure_and_run(main, PrepareConfig, __doc__)
