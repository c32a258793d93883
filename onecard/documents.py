"""How do files become batches of documents?

A row of a .parquet file is a document: its text is in one column. A line of a .jsonl file is one:
its text is in one field. In a .txt file a document ends at <|endoftext|>, or at the first blank
line after 16,000 letters. The last two kinds may be compressed, as .gz or .zst.
"""
import contextlib
import io
import itertools
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onecard.datafiles import DATA
from onecard.settings import UserError

FINEWEB = DATA / "fineweb_one_shard" / "000_00000.parquet"
SAMPLE = DATA / "sample" / "sample.parquet"
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
RATIOS = {".gz": 3, ".zst": 3}      # bytes of text in one byte of a compressed file, about
BYTES_PER_TOKEN = 4.5               # of English text, about
VAL_FRACTION = 0.005                # share of the documents that validate
VAL_BYTES = 200_000                 # of text, which a small dataset should validate on
MAX_VAL_FRACTION = 0.1              # the limit where the text is very small
ROWS = 256                          # documents read at once
SEPARATOR = "<|endoftext|>"         # in a .txt file, between documents
TXT_ENOUGH = 16_000                 # letters of a document after which a blank line ends it
TXT_LONGEST = 250_000               # letters of a document after which the end of any line does
SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")      # half a letter of UTF-16, in UTF-8


def find(names, dataset):
    """The files that `names` mean (files and folders), in the order of their names.

    Without names it is the one parquet file that `dataset` can mean.
    """
    if not names:
        return [find_parquet(dataset)]
    paths = set()
    for path in map(Path, names):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        inside = path.iterdir() if path.is_dir() else [path]
        texts = [p for p in inside if p.name.endswith(ENDINGS)]
        if not texts:
            raise UserError(f"{path} is no .parquet, .jsonl or .txt file (the last two also as "
                            ".gz or .zst), and no folder with one")
        paths.update(texts)
    return sorted(paths, key=lambda path: (path.name, path))


def find_parquet(dataset):
    """The one parquet file that `dataset` can mean. Raises UserError for none, or several."""
    if dataset == "fineweb" and FINEWEB.is_file():
        return FINEWEB
    paths = sorted((DATA / dataset).rglob("*.parquet"))
    if dataset == "fineweb" and not paths:
        paths = sorted(path for path in DATA.rglob("*.parquet") if path != SAMPLE)
    if not paths:
        raise UserError(f"there is no parquet file under {DATA.resolve()} for {dataset}. `python "
                        "prepare.py FILE --dataset=NAME` reads yours, --download fetches FineWeb's")
    if len(paths) > 1:
        raise UserError(f"{dataset} can mean {len(paths)} parquet files, as {paths[0]} and "
                        f"{paths[1]}. Name yours: `python prepare.py FILE --dataset={dataset}`")
    return paths[0]


def text_bytes(paths, text_column):
    """Bytes of text in the files, about, by their sizes and parquet's footers."""
    total = 0
    for path in map(Path, paths):
        if path.suffix == ".parquet":
            file, position = open_parquet(path, text_column)
            for i in range(file.num_row_groups):
                total += file.metadata.row_group(i).column(position).total_uncompressed_size
        else:
            total += path.stat().st_size * RATIOS.get(path.suffix, 1)
    return total


def val_share(text_bytes):
    """The share of the documents that is drawn for validation: more of a small text."""
    wanted = VAL_BYTES / max(text_bytes, 1)
    return min(max(wanted, VAL_FRACTION), MAX_VAL_FRACTION)


def token_count(path):
    """GPT-2 tokens of a file by the column token_count, which FineWeb has; None without one."""
    try:
        counts = pq.read_table(path, columns=["token_count"])["token_count"]
        return int(pc.sum(counts, min_count=0).as_py()) + len(counts)   # a 50256 for each document
    except (pa.ArrowException, OSError, KeyError):
        return None


def batches(paths, text_column, skipped):
    """Yield the documents of the files as arrays of large_string.

    No document is null or empty, and all are valid UTF-8. `skipped` is a Counter. It gets how many
    documents were left out ("null", "empty") and how many were "repaired".
    """
    for path in map(Path, paths):
        if path.suffix == ".parquet":
            columns = parquet_columns(path, text_column)
        elif ".jsonl" in path.suffixes:
            columns = text_columns(jsonl_documents(path, text_column))
        else:
            columns = text_columns(txt_documents(path))
        with readable(path):
            for column in columns:
                texts = clean(column, skipped)
                if len(texts):
                    yield texts


@contextlib.contextmanager
def readable(path):
    """Turn the error that a damaged file causes into a UserError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read, perhaps it was cut off: {error}") from None


def clean(column, skipped):
    """An array of large_binary as large_string: no document null or empty, all valid UTF-8."""
    texts = column.filter(pc.greater(pc.binary_length(column), 0))
    skipped["null"] += column.null_count
    skipped["empty"] += len(column) - column.null_count - len(texts)
    try:
        return texts.cast(pa.large_string())                # checks UTF-8
    except pa.ArrowInvalid:
        return repair(texts, skipped)


def repair(column, skipped):
    """An array of large_binary as large_string, with U+FFFD for what is not UTF-8."""
    raw = [SURROGATE.sub(b"\xff", text) for text in column.to_pylist()]     # one U+FFFD, not three
    texts = pa.array([text.decode("utf-8", "replace") for text in raw], pa.large_string())
    skipped["repaired"] += pc.not_equal(texts.cast(pa.large_binary()), column).true_count
    return texts


def open_parquet(path, text_column):
    """The file, and the position of its column of text. One inside of another is outer.inner."""
    with readable(path):
        # without these two, all that was read or a whole row group would stay in memory
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    # a repetition level above 0 is a list
    texts = {column.path: i for i, column in enumerate(file.schema)
             if column.physical_type == "BYTE_ARRAY" and column.max_repetition_level == 0}
    if text_column not in texts:
        raise UserError(f"{path} has no column of text {text_column!r}; set --text_column to one "
                        f"of those that it has: {', '.join(texts)}")
    return file, texts[text_column]


def parquet_columns(path, text_column):
    file, _ = open_parquet(path, text_column)
    for batch in file.iter_batches(ROWS, columns=[text_column]):
        column = batch.column(0)
        while pa.types.is_struct(column.type):              # outer.inner: its only field
            column = pc.struct_field(column, 0)
        yield pc.cast(column, pa.large_binary())


def text_columns(documents):
    """Yield arrays of large_binary from an iterator of str and None."""
    while texts := list(itertools.islice(documents, ROWS)):
        raw = [text and text.encode("utf-8", "surrogatepass") for text in texts]
        yield pa.array(raw, pa.large_binary())


def open_text(path):
    """The lines of a file as str. A byte that is not UTF-8 becomes a lone surrogate."""
    stream = pa.input_stream(path)                          # unpacks .gz and .zst
    return io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape")


def jsonl_documents(path, field):
    """Yield the text of every line, None for one without."""
    for number, line in enumerate(open_text(path), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
            text = record.get(field)
        except (ValueError, AttributeError):
            raise UserError(f"line {number:,} of {path} is no JSON object: {line[:40]!r}") from None
        is_missing = number == 1 and field not in record
        if is_missing or not isinstance(text, str | None):
            raise UserError(f"line {number:,} of {path} has no text in {field!r}; set --text_column"
                            f" to one of the fields that it has: {', '.join(record)}")
        yield text


def txt_documents(path):
    """Yield the text before every separator, or up to a blank line once it is long enough."""
    file, text = open_text(path), ""
    while line := file.readline(TXT_LONGEST):
        *last_lines, line = line.split(SEPARATOR)
        for last_line in last_lines:
            yield (text + last_line).strip()
            text = ""
        text += line
        if len(text) > TXT_LONGEST or (len(text) > TXT_ENOUGH and line.isspace()):
            yield text.strip()
            text = ""
    yield text.strip()
