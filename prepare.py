"""
Turn text into a dataset: data/<dataset>/train.bin and val.bin, GPT-2 token ids as uint16.

    python prepare.py                             # the one parquet file under data/
    python prepare.py --download                  # FineWeb's first file (2 GB), from the internet
    python prepare.py --sample                    # a small dataset from Python's documentation
    python prepare.py my.parquet --dataset=mine   # .parquet, .jsonl or .txt, also .gz and .zst

The token 50256, "end of text", stands before the tokens of every document. The new files are
written beside the old ones and renamed at the end, so stopping it midway leaves the folder as it
was.
"""
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from onecard import datafiles, documents, encoder, samples
from onecard.files import sha256
from onecard.settings import UserError, configure_and_run, in_range, one_of
from onecard.split import val_hash_limit


@dataclass(frozen=True)
class PrepareConfig:
    files: tuple = ()                   # text files or folders; none: the one file under data/
    dataset: str = ""                   # folder under data/; "": fineweb, or sample with --sample
    val: str = ""                       # a file to validate on; "": draw documents from the files
    val_fraction: float = 0.0           # share of documents for val; 0: automatic, usually 0.5 %
    text_column: str = "text"           # column or field that holds the text
    seed: int = 1337                    # decides which documents are drawn
    encoder: str = "auto"               # gigatoken (a fast package), tiktoken (same ids) or auto
    num_proc: int = 0                   # threads (nanoGPT's name); 0: one for each core
    download: bool = False              # fetch FineWeb's first file and prepare it
    sample: bool = False                # make a small dataset from Python's documentation
    force: bool = False                 # prepare again, and replace a dataset of other files

    def __post_init__(self):
        in_range(0, 0.99999, self, "val_fraction")     # training needs a share, too
        in_range(0, 1024, self, "num_proc")
        in_range(0, 2**63 - 1, self, "seed")
        one_of(self, encoder=("auto", "gigatoken", "tiktoken"))
        # Path(...).name drops folders in front of a name
        if self.dataset != Path(self.dataset).name or self.dataset == "..":
            raise UserError(f"dataset = {self.dataset!r} must be a name without / or .., as the "
                            f"dataset is written to {datafiles.DATA}/NAME")
        if self.val and self.val_fraction:
            raise UserError("--val names the text to validate on, --val_fraction draws it; set one")
        sources = [bool(self.files), self.sample, self.download]
        if sum(sources) > 1:
            raise UserError("files, --sample and --download each bring the text; set one of them")


def find_files(cfg, dataset):
    """The files of each split, {split: paths}. Fetches or makes the text first, if that is set."""
    names, val_files = cfg.files, []
    if cfg.val:
        val_files = documents.find([cfg.val])
    if cfg.download:
        samples.download_fineweb()
        names = [documents.FINEWEB]
    if cfg.sample:
        if not documents.SAMPLE.exists():
            samples.write_sample(documents.SAMPLE)
        names = [documents.SAMPLE]
    if not names:
        names = [documents.find_parquet(dataset)]   # under data/<dataset>, or the only one in data/
    return {"train": documents.find(names), "val": val_files}


def describe_inputs(files, cfg):
    """The part of meta.json that decides the ids: what is read, and by which settings."""
    sources = []
    for split, paths in files.items():
        for path in paths:
            sources.append({"name": path.name, "sha256": sha256(path), "split": split})
    return {"sources": sources, "text_column": cfg.text_column, "seed": cfg.seed,
            "val_fraction": cfg.val_fraction}


def comparison_key(inputs):
    """Equal keys mean: the same documents in each split. Names of files do not count."""
    sources = [(source["sha256"], source["split"]) for source in inputs["sources"]]
    return sources, inputs["text_column"], inputs["seed"], inputs["val_fraction"]


def is_made_from(folder, inputs):
    """Whether the folder is whole and was prepared from `inputs`. UserError for other inputs."""
    present = [name for name in datafiles.NAMES if (folder / name).exists()]
    if not present:
        return False
    meta = datafiles.read_meta(folder)      # it has the keys of inputs. None: nanoGPT's folder
    if meta and comparison_key(meta) == comparison_key(inputs):
        is_whole = len(present) == len(datafiles.NAMES)
        return is_whole
    raise UserError(f"{folder} was prepared from other files or with other settings; --force "
                    "replaces it, --dataset=NAME writes to another folder")


def write_splits(files, cfg, writers, bar):
    """Encode all documents into the two splits. Returns what was counted on the way.

    A document goes to val if its hash is below a limit. The hash is made from the seed and its ids:
    a random choice that puts equal documents into the same split. With --val, nothing is drawn, and
    train leaves out every document that is also in the val files.
    """
    counts = Counter()                          # documents.batches() adds to it while it reads
    val_hashes = np.zeros(0, np.uint64)
    limit = 0                                   # draw nothing for val
    if not cfg.val:
        limit = val_hash_limit(files["train"], cfg)     # by val_fraction, or the size of the text
    texts = documents.batches(files["val"], cfg.text_column, counts)
    for batch in encoder.encode(texts, cfg):
        val_hashes = np.append(val_hashes, batch.hashes)
        all_of_it = np.ones(len(batch.hashes), bool)
        writers["val"].add(batch, all_of_it)
        bar.update(counts["bytes read"] - bar.n)            # tqdm takes the difference
    texts = documents.batches(files["train"], cfg.text_column, counts)
    for batch in encoder.encode(texts, cfg):
        to_val = batch.hashes < limit
        in_val_files = np.isin(batch.hashes, val_hashes)
        writers["val"].add(batch, to_val)
        writers["train"].add(batch, ~to_val & ~in_val_files)
        counts["in both splits"] += int(in_val_files.sum())
        bar.update(counts["bytes read"] - bar.n)            # tqdm takes the difference
    return counts


def prepare(files, folder, cfg, inputs):
    """Write the dataset of the files into the folder."""
    began = time.monotonic()
    encoder_name = encoder.choose(cfg.encoder)
    print(f"preparing {folder} by {encoder_name}")
    if encoder_name == "tiktoken" and cfg.encoder == "auto":
        print("it is many times as fast after `pip install gigatoken`")
    n_bytes = sum(path.stat().st_size for path in files["train"] + files["val"])
    with datafiles.new_dataset(folder) as writers:
        # disable=None: no bar where the output is no terminal
        with tqdm(total=n_bytes, desc="read", unit="B", unit_scale=True, disable=None) as bar:
            counts = write_splits(files, cfg, writers, bar)
        skipped = {reason: counts[reason] for reason in ("null", "empty", "in both splits")
                   if counts[reason]}
        # write meta.json, and give the new files their names
        datafiles.finish(folder, writers, {
            **inputs, "skipped": skipped, "repaired_characters": counts["repaired"]})
    print(datafiles.describe(folder))
    for reason, n in skipped.items():
        print(f"documents {reason}: {n:,}")
    if counts["repaired"]:
        print(f"characters replaced, because they were not valid UTF-8: {counts['repaired']:,}")
    print(f"prepared in {time.monotonic() - began:.1f} s")


def main(cfg):
    default = "sample" if cfg.sample else "fineweb"
    dataset = cfg.dataset or default
    folder = datafiles.DATA / dataset
    with datafiles.locked(folder):
        files = find_files(cfg, dataset)
        inputs = describe_inputs(files, cfg)
        if not cfg.force and is_made_from(folder, inputs):
            print(f"{folder} is already prepared from these files; --force does it again")
        else:
            prepare(files, folder, cfg, inputs)


if __name__ == "__main__":
    configure_and_run(main, PrepareConfig, __doc__)
