"""Files of text become batches of documents.

A row of a .parquet file is a document: its text is in one column. A line of a .jsonl or .json file
is one: its text is in one field. In a .txt file a document ends at <|endoftext|>, or at the first
blank line after 16,000 characters. Files that are not parquet are UTF-8, or UTF-16 with a byte
order mark, and may be compressed, as .gz or .zst.
"""
import functools
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onecard.datafiles import DATA, NAMES
from onecard.files import text_encoding
from onecard.settings import UserError

FINEWEB = DATA / "fineweb_one_shard" / "000_00000.parquet"
SAMPLE = DATA / "sample" / "sample.parquet"
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst",
           ".txt", ".txt.gz", ".txt.zst")
PACKED = {".gz": "gzip", ".zst": "zstd"}
# files of Hugging Face that describe a dataset
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")
BYTES_PER_TOKEN = 4.5               # of English text, about
VAL_FRACTION = 0.005                # share of the documents that go into val
VAL_BYTES = 200_000                 # of text that val should have, if the text is small
MAX_VAL_FRACTION = 0.1              # but no more than this share
ROWS = 256                          # documents read at once
SEPARATOR = "<|endoftext|>"         # in a .txt file, between documents
TXT_ENOUGH = 16_000                 # characters of a document after which a blank line ends it
TXT_LONGEST = 250_000               # characters after which the next white space ends it
LONGEST_WORD = 1000                 # characters; a long line is cut in a word that is longer
LONGEST_LINE = 1 << 28              # characters of a line of JSON; more would fill the memory
BYTE_ORDER_MARK = "\ufeff"          # some programs write it at the beginning of a file
REPLACEMENT = "\ufffd".encode()
HALF = re.compile(rb"\xed[\xa0-\xb1\xb4-\xbf][\x80-\xbf]")    # half of a surrogate pair
NO_UTF8 = re.compile(rb"\xed[\xb2\xb3][\x80-\xbf]")      # what open_text() makes of a byte
MAX_BROKEN = 0.001                  # share of a file's characters that may be no UTF-8, or NUL
MAX_BROKEN_EARLY = 0.01             # the same for the beginning of a file: do not read 2 GB in vain
EARLY = 1_000_000                   # characters of that beginning


def find(names):
    """The files that `names` mean (files and folders), sorted by file name."""
    paths = {}                          # {(disk, number of the file): path}: each file once
    for name in names:
        path = Path(name)
        if not name or not path.exists():
            raise UserError(f"{name} does not exist")
        inside = [p for p in path.iterdir() if not is_hidden(p.name)] if path.is_dir() else [path]
        texts = [p for p in inside if p.is_file() and p.name.lower().endswith(ENDINGS)]
        if not texts:
            raise UserError(f"{path} is no .parquet, .jsonl, .json or .txt file (the last three "
                            "also as .gz or .zst), and no folder with one")
        if others := sorted(set(inside) - set(texts)):
            print(f"{path}: {len(others)} of {len(inside)} names are left out, "
                  f"such as {others[0].name}")
        for text in texts:
            paths.setdefault((text.stat().st_dev, text.stat().st_ino), text)
    return sorted(paths.values(), key=lambda path: (path.name, path))


def is_hidden(name):
    """True for what programs leave beside a file of text: ._a.parquet, a.parquet.crc, meta.json."""
    return name.startswith((".", "_")) or name.endswith(".crc") or name in (*NAMES, *DESCRIPTIONS)


def parquet_files(folder):
    """The parquet files in a folder and in its folders, without what is hidden."""
    return [path for path in sorted(folder.rglob("*"))
            if path.suffix.lower() == ".parquet" and path.is_file()
            and not any(map(is_hidden, path.relative_to(folder).parts))]


def find_parquet(dataset):
    """The one parquet file that `dataset` can mean. Raises UserError for none, or several."""
    if dataset == "fineweb" and FINEWEB.is_file():
        return FINEWEB
    paths = parquet_files(DATA / dataset)
    if dataset == "fineweb" and not paths:
        paths = [path for path in parquet_files(DATA) if path != SAMPLE]
    if not paths:
        raise UserError(f"there is no parquet file under {DATA.resolve()} for {dataset}. `python "
                        "prepare.py FILE --dataset=NAME` reads yours, --download fetches FineWeb's")
    if len(paths) > 1:
        raise UserError(f"{dataset} can mean {len(paths)} parquet files, {paths[0]} and "
                        f"{paths[1]}. Name yours: `python prepare.py FILE --dataset={dataset}`")
    return paths[0]


def val_share(text_bytes):
    """The share of the documents that is drawn for validation: more of a small text."""
    wanted = VAL_BYTES / max(text_bytes, 1)
    return min(max(wanted, VAL_FRACTION), MAX_VAL_FRACTION)


def token_count(path):
    """GPT-2 tokens of a file by the column token_count, which FineWeb has; None if unknown."""
    try:
        counts = pq.read_table(path, columns=["token_count"])["token_count"]
        total = pc.sum(counts.cast(pa.uint32()))            # fails for NaN, fractions, -1
    except (pa.ArrowException, OSError, KeyError):
        return None
    is_number = pa.types.is_integer(counts.type) or pa.types.is_floating(counts.type)
    if not is_number or counts.null_count or not len(counts):
        return None
    return total.as_py() + len(counts)                      # a 50256 for each document


def batches(paths, text_column, counts):
    """Yield the documents of the files as arrays of large_string.

    No document is null or empty, and all are valid UTF-8. `counts` is a Counter. It gets the "bytes
    read" of the files, how many documents were left out ("null", "empty"), and how many
    "characters" there are; of these, how many were "repaired", or are "broken" (no UTF-8 or NUL).
    Raises UserError if too many are broken.
    """
    for path in map(Path, paths):
        before = counts.copy()
        try:
            with open(path, "rb") as file:
                for column in columns_of(file, text_column):
                    counts["bytes read"] = before["bytes read"] + file.tell()
                    texts = clean(column, counts)
                    if counts["characters"] - before["characters"] > EARLY:
                        refuse_broken(path, counts - before, MAX_BROKEN_EARLY)
                    if len(texts):
                        yield texts
        except (pa.ArrowException, OSError, UnicodeError) as error:
            hint = ". Perhaps it was cut off, or is of another kind"
            if getattr(error, "errno", None):           # the system says why
                hint = ""
            raise UserError(f"{path} cannot be read: {error}{hint}") from None
        refuse_broken(path, counts - before, MAX_BROKEN)
        counts["bytes read"] = before["bytes read"] + path.stat().st_size


def clean(column, counts):
    """An array of large_binary as large_string: no document null or empty, all valid UTF-8."""
    texts = column.filter(pc.greater(pc.binary_length(column), 0))
    counts["null"] += column.null_count
    counts["empty"] += len(column) - column.null_count - len(texts)
    try:
        texts = texts.cast(pa.large_string())               # checks UTF-8
    except pa.ArrowInvalid:
        texts = repair(texts, counts)
    if len(texts):
        data = np.frombuffer(texts.buffers()[2], np.int8)   # filter() has made it: it is no slice
        counts["broken"] += len(data) - np.count_nonzero(data)      # NUL
        counts["characters"] += np.count_nonzero(data >= -64)       # bytes below continue one
    return texts


def repair(texts, counts):
    """An array of large_binary as large_string, with U+FFFD for what is not UTF-8."""
    texts = texts.to_pylist()
    raw = [HALF.sub(REPLACEMENT, NO_UTF8.sub(b"\xff", text)) for text in texts]
    valid = [text.decode("utf-8", "replace").encode() for text in raw]
    n_before, n_raw, n_after = [sum(text.count(REPLACEMENT) for text in version)
                                for version in (texts, raw, valid)]
    counts["repaired"] += n_after - n_before
    counts["broken"] += n_after - n_raw                     # half a letter was cut, not misread
    return pa.array(valid, pa.large_binary()).cast(pa.large_string())


def refuse_broken(path, counts, limit):
    """Raise UserError if more than `limit` of a file's characters are broken."""
    n_read, n_broken = counts["characters"], counts["broken"]
    if n_broken <= limit * n_read:
        return
    advice = ("Write it again in UTF-8. `iconv -f ENCODING -t UTF-8` converts a file, if you know "
              "its encoding, such as LATIN1, UTF-16LE, GBK or SHIFT_JIS")
    if path.suffix.lower() == ".parquet":
        advice = "Set --text_column to a column that holds text"
    raise UserError(f"{path} is no text in UTF-8: {n_broken / n_read:.1%} of {n_read:,} characters "
                    f"are broken. {advice}")


def columns_of(file, text_column):
    """Yield the documents of an open file as arrays of large_binary."""
    name = str(file.name).lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        yield from parquet_columns(file, text_column)
        return
    text = open_text(file)
    documents = jsonl_documents(text, file.name, text_column)
    if name.endswith(".txt"):
        documents = txt_documents(text)
    while texts := list(itertools.islice(documents, ROWS)):
        raw = [text and text.encode("utf-8", "surrogatepass") for text in texts]
        yield pa.array(raw, pa.large_binary())


def parquet_columns(file, text_column):
    """Yield the column of text. One inside of another is outer.inner."""
    # without these two, all that was read or a whole row group would stay in memory
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20,
                             page_checksum_verification=True)
    # a repetition level above 0 is a list
    texts = [column.path for column in parquet.schema
             if column.physical_type == "BYTE_ARRAY" and column.max_repetition_level == 0]
    if text_column not in texts:
        raise UserError(f"{file.name} has no column of text {text_column!r}; set --text_column to "
                        f"one of those that it has: {', '.join(texts) or 'none'}")
    if parquet.schema_arrow.names.count(text_column.split(".")[0]) > 1:
        raise UserError(f"{file.name} has several columns named {text_column!r}; rename them, or "
                        "set --text_column to another one")
    for batch in parquet.iter_batches(ROWS, columns=[text_column]):
        column = batch.column(0)
        while pa.types.is_struct(column.type):              # outer.inner: its only field
            column = pc.struct_field(column, 0)
        yield pc.cast(column, pa.large_binary())


def open_text(file):
    """The text in an open file, unpacked. A byte that is not UTF-8 becomes a lone surrogate."""
    if compression := PACKED.get(Path(file.name).suffix.lower()):
        file = pa.CompressedInputStream(file, compression)
    file = io.BufferedReader(file)
    encoding = text_encoding(file.peek(4))
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    return io.TextIOWrapper(file, encoding, errors)


def jsonl_documents(file, path, field):
    """Yield the text of every line, None for one without."""
    is_first = True
    lines = iter(functools.partial(file.readline, LONGEST_LINE), "")
    for number, line in enumerate(lines, 1):
        if len(line) == LONGEST_LINE:
            raise UserError(f"line {number:,} of {path} is longer than {LONGEST_LINE:,} letters; "
                            f'write every document as a line, {{"{field}": "..."}}')
        line = line.lstrip(BYTE_ORDER_MARK).strip()
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number:,} of {path} cannot be read as JSON ({error}): "
                            f"{line[:40]!r}") from None
        if not isinstance(record, dict):
            raise UserError(f"line {number:,} of {path} is no JSON object: {line[:40]!r}")
        text = record.get(field)
        is_missing, is_first = is_first and field not in record, False
        if is_missing or not isinstance(text, str | None):
            raise UserError(f"line {number:,} of {path} has no text in {field!r}; set --text_column"
                            f" to one of the fields that it has: {', '.join(record)}")
        yield text


def txt_documents(file):
    """Yield the text before every separator, or up to a blank line once it is long enough."""
    text = ""
    while line := file.readline(TXT_LONGEST):
        for _ in range(LONGEST_WORD):       # a long line is cut at white space
            if line[-1:].isspace() or not (letter := file.readline(1)):
                break
            line += letter
        *endings, line = line.split(SEPARATOR)
        for ending in endings:
            yield trimmed(text + ending)
            text = ""
        text += line
        if len(text) > TXT_LONGEST or (len(text) > TXT_ENOUGH and line.isspace()):
            yield trimmed(text)
            text = ""
    yield trimmed(text)


def trimmed(text):
    """A document without the empty lines around it; "" if there is nothing but white space."""
    text = text.lstrip("\n" + BYTE_ORDER_MARK).rstrip("\n")
    return "" if text.isspace() else text
