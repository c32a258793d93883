"""Is a prepared dataset whole, and what is in it?

`check("data/fineweb")` compares the files of a folder with its meta.json, goes through all tokens
once and prints how many documents there are, how long they are, and one of each split. Documents
and places in a file count from 0.
"""
import math
import re
from pathlib import Path

import numpy as np

import duplicates
import loader
from loader import END_OF_TEXT
from sources import bar
from tokenizer import GPT2Tokenizer, of_dataset

ZEROS = 64                          # so many at a file's end are hardly text; it was never written
SHOWN = 400                         # characters of a document that are printed
LENGTHS = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
LONGEST = 0.01                      # share of the documents whose share of the tokens is told
AGAIN = "run `python prepare.py --force` to make the dataset again"
# All but newline and tab that can move a terminal's cursor, change its colours or turn its text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check(folder):
    """Print what is in a dataset folder.

    Raises FileNotFoundError where it or one of its files is missing, ValueError for the first
    thing in it that is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; run `python prepare.py` to make it")
    metas = loader.metas(folder)
    files = {split: [(folder / f"{split}{infix}.bin", f"meta{infix}.json",
                      meta and meta["splits"][split]) for infix, meta in metas or [("", None)]]
             for split in ("train", "val")}
    for of_split in files.values():         # all sizes first: a checksum takes seconds
        for file in of_split:
            verify_sizes(*file)
        if not any(path.stat().st_size for path, _, _ in of_split):
            raise ValueError(f"{of_split[0][0]} is empty; {AGAIN}")
    tokenizer = of_dataset(folder)
    contents = {split: [read(*file, tokenizer) for file in of_split]
                for split, of_split in files.items()}
    if metas:
        print(f"{folder} is whole{f', in {len(metas)} parts' * (len(metas) > 1)}: sizes, checksums "
              "and counts are those of meta.json, and all documents begin with token 50256")
    else:
        print(f"{folder} has no meta.json (nanoGPT's scripts write none), so there are no "
              "checksums to verify; a document begins at each token 50256")
    print_table({split: (np.concatenate([np.diff(starts) for _, starts in contents[split]]),
                         sum(told["text_bytes"] for _, _, told in of_split) if metas else None)
                 for split, of_split in files.items()})
    if isinstance(tokenizer, GPT2Tokenizer):
        print_duplicates([path for path, _, _ in files["train"]], contents["val"])
    for split, of_split in contents.items():
        print_document(split, of_split, tokenizer)


def verify_sizes(path, meta_name, told):
    """Raise an error unless a .bin file and its index exist in the size that meta.json tells."""
    sizes = {path: told["tokens"] * 2, path.with_suffix(".idx"): told["documents"] * 8 + 8} \
        if told else {path: None}
    for file, n_bytes in sizes.items():
        if not file.is_file():
            listed = f", but {meta_name} lists it" if told else ""
            raise FileNotFoundError(f"{file} does not exist{listed}; {AGAIN}")
        there = file.stat().st_size
        if told and there != n_bytes:
            raise ValueError(f"{file} has {there:,} bytes where {meta_name} says {n_bytes:,}; "
                             f"{AGAIN}")
        if there % 2:
            raise ValueError(f"{file} has an odd number of bytes, so it is not uint16 "
                             f"or was cut off; {AGAIN}")


def read(path, meta_name, told, tokenizer):
    """(tokens, where each document starts and the last one ends, int64) of a .bin file.

    Raises ValueError for the first thing in the file or its index that is wrong.
    """
    idx_path = path.with_suffix(".idx")
    for file, name in ((path, "bin_sha256"), (idx_path, "idx_sha256")):
        if told and loader.sha256(file) != told[name]:
            raise ValueError(f"{file} is not the file that prepare.py wrote "
                             f"(its checksum is not the one in {meta_name}); {AGAIN}")
    # a part may have no document of a split, and an empty file cannot be mapped
    tokens = np.memmap(path, np.uint16, "r") if path.stat().st_size else np.zeros(0, np.uint16)
    ends_of_text, largest, beyond, zeros = scan(tokens, tokenizer.n_vocab)
    if zeros >= ZEROS:
        letter = tokenizer.decode_bytes([0]).decode()
        what = f"{path} ends with {zeros:,} times token 0 ({letter!r})"
        if not told:
            raise ValueError(f"{what}, as a file does whose writing was stopped; {AGAIN}")
        print(f"warning: {what}, but its checksum is right, so the last document may end like that")
    if told:
        starts = np.fromfile(idx_path, np.uint64)
        verify_index(idx_path, path, tokens, starts, ends_of_text)
        starts = starts.astype(np.int64)
    else:
        starts = np.unique(np.concatenate([[0], ends_of_text, [len(tokens)]]))
    if beyond is not None:
        raise ValueError(f"{path} has token {tokens[beyond]} at place {beyond:,}, in document "
                         f"{np.searchsorted(starts, beyond, side='right') - 1:,}, but the "
                         f"vocabulary ends with {tokenizer.n_vocab - 1}; {AGAIN}")
    if told and largest != told["max_token"]:
        raise ValueError(f"the largest token in {path} is {largest} where {meta_name} says "
                         f"{told['max_token']}; {AGAIN}")
    return tokens, starts


def scan(tokens, n_vocab):
    """(places of all tokens 50256, the largest token, place of the first token that n_vocab lacks
    or None, how many tokens 0 stand at the end)."""
    places, largest, beyond, zeros = [np.zeros(0, np.int64)], 0, None, 0
    for at in range(0, len(tokens), loader.CHUNK):
        chunk = tokens[at:at + loader.CHUNK]
        places.append(np.flatnonzero(chunk == END_OF_TEXT) + at)
        largest = max(largest, int(chunk.max()))
        if largest >= n_vocab and beyond is None:
            beyond = at + int((chunk >= n_vocab).argmax())
        backwards = chunk[::-1] != 0
        zeros = int(backwards.argmax()) if backwards.any() else zeros + len(chunk)
    return np.concatenate(places), largest, beyond, zeros


def verify_index(idx_path, path, tokens, starts, ends_of_text):
    """Raise a ValueError unless documents fill the file and 50256 begins each, and only begins."""
    if starts[0] != 0 or starts[-1] != len(tokens):
        raise ValueError(f"{idx_path} goes from {starts[0]:,} to {starts[-1]:,} where the tokens "
                         f"go from 0 to {len(tokens):,}; {AGAIN}")
    longer = starts[1:] > starts[:-1]
    if not longer.all():
        d = longer.argmin()
        raise ValueError(f"{idx_path} has document {d:,} from {starts[d]:,} to {starts[d + 1]:,}, "
                         f"which holds no token; {AGAIN}")
    starts = starts.astype(np.int64)
    wrong = np.setxor1d(starts[:-1], ends_of_text, assume_unique=True)
    if len(wrong):
        place, d = wrong[0], np.searchsorted(starts, wrong[0], side="right") - 1
        what = f"document {d:,} begins with token {tokens[place]} instead of 50256" \
            if place == starts[d] else f"token 50256 stands inside document {d:,}"
        raise ValueError(f"{what} (place {place:,} of {path}), so the index and the tokens "
                         f"do not belong together; {AGAIN}")


def print_table(splits):
    """Print what {split: (tokens of each document, bytes of text or None)} amounts to."""
    columns = []
    for split, (lengths, n_bytes) in splits.items():
        ordered, n_tokens, n = np.sort(lengths), int(lengths.sum()), len(lengths)
        quantiles = {name: ordered[round(share * (n - 1))] for name, share in LENGTHS.items()}
        long = int(ordered[-math.ceil(n * LONGEST):].sum())
        columns.append({
            "": split, "documents": f"{n:,}", "tokens": f"{n_tokens:,}",
            "bytes of text": "-" if n_bytes is None else f"{n_bytes:,}",
            "bytes per token (50256 not counted)":
                f"{n_bytes / (n_tokens - n):.2f}" if n_bytes and n_tokens > n else "-",
            "tokens per document (50256 counted)": "",
            **{f"    {name}": f"{length:,}" for name, length in quantiles.items()},
            "share of the longest 1 % of documents": f"{100 * long / n_tokens:.1f} %"})
    widths = [max(map(len, column.values())) + 2 for column in columns]
    name_width = max(map(len, columns[0]))
    for name in columns[0]:
        cells = [column[name].rjust(width) for column, width in zip(columns, widths, strict=True)]
        print(f"{name:{name_width}}{''.join(cells)}".rstrip())


def print_duplicates(train_bins, parts):
    """Print how many documents of val, the [(tokens, starts)] of its parts, stand in train too."""
    before = np.cumsum([0, *(len(tokens) for tokens, _ in parts)])
    starts = np.concatenate([[0], *(s[1:] + b for (_, s), b in zip(parts, before, strict=False))])
    n_tokens = sum(path.stat().st_size for path in train_bins) // 2
    with bar(n_tokens, " tokens") as progress:
        leaked, judged = duplicates.leaked(train_bins, np.concatenate([t for t, _ in parts]),
                                           starts, progress.update)
    print(f"\n{leaked.sum():,} of {len(leaked):,} documents of val stand in train for the most "
          f"part (too short to be judged: {(~judged).sum():,})"
          + "; `python prepare.py --dedup_val --force` leaves them out of val"
          * bool(leaked.any()))


def print_document(split, parts, tokenizer):
    """Print how a random document begins, of the [(tokens, starts)] of a split."""
    number = here = int(np.random.default_rng().integers(sum(len(s) - 1 for _, s in parts)))
    while here >= len(parts[0][1]) - 1:
        here, parts = here - len(parts[0][1]) + 1, parts[1:]
    tokens, starts = parts[0]
    ids = tokens[starts[here]:starts[here + 1]]
    begin = ids[:4 * SHOWN + 1]     # a character is four bytes at most, and a token one at least
    text = tokenizer.decode_bytes(begin[begin != END_OF_TEXT]).decode("utf-8", "replace")
    shown = CONTROL.sub(lambda c: c[0].encode("unicode_escape").decode(), text[:SHOWN])
    print(f"\ndocument {number:,} of {split}, {len(ids):,} tokens:\n"
          f"{shown}{' [...]' * (len(text) > SHOWN)}")
