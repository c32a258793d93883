"""Where does text come from, and how does it arrive, some megabytes at a time?

A source is a file of documents: parquet (a column of text), .jsonl (a field of every line) or .txt
(documents end at <|endoftext|>, or at a blank line once they have 16 kB), the last two also as .gz
and .zst.
"""
import ast
import functools
import glob
import itertools
import json
import os
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
from tqdm import tqdm

from loader import sha256
from tokenizer import GPT2Tokenizer

DATA = Path("data")
FINEWEB = DATA / "fineweb_one_shard" / "000_00000.parquet"     # where --download puts it
SAMPLE = DATA / "sample" / "sample.parquet"
DOWNLOAD_TRIES = 5                  # in a row without a single new byte
BATCH_BYTES = 4 << 20               # of text that a worker gets at a time, about
SEPARATOR = b"<|endoftext|>"        # between the documents of a .txt file
TXT_DOCUMENT = 16 << 10             # bytes after which a blank line ends a document too,
TXT_LINES = 64 << 10                # the end of a line,
TXT_LONGEST = 1 << 20               # and any letter
KINDS = (".parquet", ".jsonl", ".txt")
COMPRESSED = {".gz": 3.0, ".zst": 3.0}      # how many bytes of text a byte of the file has, about


@dataclass(frozen=True)
class Source:
    """A file, or the row groups `first` to `last` - 1 of a parquet file."""
    path: str
    split: str = "train"
    first: int = 0
    last: int = 0                   # 0 for what has no row groups
    text_bytes: int = 0             # about


# where the files are

def kind_of(path):
    """'.parquet', '.jsonl' or '.txt'; a ValueError for another."""
    kinds = [s for s in Path(path).suffixes[-2:] if s not in COMPRESSED]
    if not kinds or kinds[-1] not in KINDS or (kinds[-1] == ".parquet" and path.endswith(
            tuple(COMPRESSED))):
        raise ValueError(f"{path} is not .parquet, .jsonl or .txt (the last two also as .gz or "
                         ".zst), which is what prepare.py reads")
    return kinds[-1]


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


def named(arguments):
    """The files that `arguments` name (files, folders, patterns), in the order of their names."""
    found = []
    for argument in arguments:
        if os.path.isdir(argument):
            inside = sorted(str(p) for p in Path(argument).iterdir()
                            if p.is_file() and set(p.suffixes) & set(KINDS))
            if not inside:
                raise ValueError(f"the folder {argument} has no .parquet, .jsonl or .txt file")
            found += inside
        elif not os.path.exists(argument) and glob.glob(argument):
            found += glob.glob(argument)        # a console that does not do it itself
        else:
            found.append(argument)
    found.sort(key=lambda path: (Path(path).name, path))
    twice = [a for a, b in zip(found, found[1:], strict=False) if a == b]
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    return found


# what is in them

def open_parquet(path, text_column):
    """pq.ParquetFile whose `text_column` holds text, or a ValueError that says what is there."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return _open_parquet(str(path), text_column, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)     # a footer may be megabytes, and is asked for more than once
def _open_parquet(path, text_column, changed):
    try:
        file = pq.ParquetFile(path, pre_buffer=False)       # else all of it stays in memory
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file (was it cut off?): "
                         f"{str(error).splitlines()[0].split('. ')[0]}") from None
    schema = file.schema_arrow
    first, *inner = text_column.split(".") if text_column not in schema.names else [text_column]
    kind = schema.field(first).type if first in schema.names else None
    for name in inner:              # a column in a column: doc.text
        kind = kind.field(name).type if kind is not None and pa.types.is_struct(kind) \
            and kind.get_field_index(name) >= 0 else None
    if kind is None:
        raise ValueError(f"{path} has no column {text_column!r}; it has "
                         f"{', '.join(columns(schema))}. "
                         "Name the one with the text: --text_column=...")
    if not is_text(kind):
        raise ValueError(
            f"column {text_column!r} of {path} is of type {kind}, not text; columns of text are "
            f"{', '.join(columns(schema, is_text)) or 'none'}")
    return file


def is_text(kind):
    """True for an arrow type whose values are text, or bytes that may be."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
        pa.types.is_binary, pa.types.is_large_binary))


def columns(fields, wanted=lambda kind: True, before=""):
    """The names of the `wanted` columns, those inside of others as outer.inner."""
    names = []
    for field in fields:
        if pa.types.is_struct(field.type):
            names += columns(field.type, wanted, f"{before}{field.name}.")
        elif wanted(field.type):
            names.append(before + field.name)
    return names


def sources_of(path, text_column, split="train"):
    """The Sources of a file: one for every row group of a parquet file, else one."""
    if kind_of(path) == ".parquet":
        file = open_parquet(path, text_column)
        leaf = next(c for c in range(len(file.schema))
                    if file.schema.column(c).path == text_column)
        sizes = [file.metadata.row_group(g).column(leaf).total_uncompressed_size
                 for g in range(file.metadata.num_row_groups)]
        return [Source(path, split, g, g + 1, n) for g, n in enumerate(sizes)]
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if kind_of(path) == ".jsonl":
        first_line(path, text_column)
    return [Source(path, split, 0, 0,
                   int(Path(path).stat().st_size * COMPRESSED.get(Path(path).suffix, 1.0)))]


def joined(sources):
    """The same with neighbouring row groups of one file as one Source."""
    out = []
    for s in sources:
        if out and out[-1].path == s.path and out[-1].split == s.split and out[-1].last == s.first:
            out[-1] = Source(s.path, s.split, out[-1].first, s.last,
                             out[-1].text_bytes + s.text_bytes)
        else:
            out.append(s)
    return out


def rows_of(path, text_column):
    """How many rows a parquet file has; None for another, which does not tell."""
    if kind_of(path) != ".parquet":
        return None
    return open_parquet(path, text_column).metadata.num_rows


def first_row(source, text_column):
    """The number in its file of the first document of a source."""
    if not source.first:
        return 0
    metadata = open_parquet(source.path, text_column).metadata
    return sum(metadata.row_group(g).num_rows for g in range(source.first))


# reading

def batches(source, text_column, done=0):
    """Yield (number of the first document, column of texts, sum of its token_count or None).

    Some BATCH_BYTES of text each, from document `done` of the source on. The column is a pa.Array
    of string, large_string or a dictionary of them; null where a row has no text.
    """
    read = {".parquet": parquet_batches, ".jsonl": jsonl_batches, ".txt": txt_batches}
    for row, column, counts in read[kind_of(source.path)](source, text_column, done):
        for begin, end in cuts(column, min(max(done - row, 0), len(column))):
            told = None if counts is None else \
                int(pc.sum(counts.slice(begin, end - begin)).as_py() or 0)
            yield row + begin, column.slice(begin, end - begin), told


def cuts(column, begin):
    """(begin, end) of the pieces of `column` from row `begin` on, none far above BATCH_BYTES."""
    if column.nbytes <= 2 * BATCH_BYTES:
        return [(begin, len(column))] if begin < len(column) else []
    lengths = pc.fill_null(pc.binary_length(plain(column)), 0)
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False))
    edges = [begin]
    while edges[-1] < len(column):
        before = ends[edges[-1] - 1] if edges[-1] else 0
        edges.append(max(int(np.searchsorted(ends, before + BATCH_BYTES)), edges[-1] + 1))
    return list(zip(edges, [*edges[1:-1], len(column)], strict=False))


def plain(column):
    """A column of text as string or large_string, whatever form of it the file has."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column = column.view(pa.string() if pa.types.is_binary(column.type) else pa.large_string())
    return column


def parquet_batches(source, text_column, done):
    file = open_parquet(source.path, text_column)
    told = ["token_count"] * ("token_count" in file.schema_arrow.names)
    inner = text_column.split(".")[1:] if text_column not in file.schema_arrow.names else []
    groups = list(range(source.first, source.last))
    rows = [file.metadata.row_group(g).num_rows for g in groups]
    n_rows = max(int(sum(rows) * BATCH_BYTES / max(source.text_bytes, 1)), 1)
    ends = np.cumsum(rows)
    first = int(np.searchsorted(ends, done, side="right"))  # what is done is not even read
    groups, row = groups[first:], int(ends[first - 1]) if first else 0
    if not groups:
        return
    try:
        for batch in file.iter_batches(min(n_rows, 1 << 16), row_groups=groups,
                                       columns=[text_column, *told]):
            column = batch.column(0)
            yield (row, pc.struct_field(column, inner) if inner else column,
                   batch.column(1) if told else None)
            row += len(batch)
    except (pa.ArrowInvalid, OSError) as error:
        where = damaged(file, groups, text_column)
        raise ValueError(f"{source.path} is damaged in row group {where} (of 0 to "
                         f"{file.metadata.num_row_groups - 1}): "
                         f"{str(error).splitlines()[0].rstrip('.')}. Fetch it again") from None


def damaged(file, groups, text_column):
    """The first of the row groups that cannot be read; a batch may be of several."""
    for group in groups:
        try:
            for _ in file.iter_batches(1024, row_groups=[group], columns=[text_column]):
                pass
        except (pa.ArrowInvalid, OSError):
            return group
    return groups[-1]


def blocks(path):
    """The bytes of a file, unpacked if it is .gz or .zst, some megabytes at a time."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    n_bytes = 0
    try:
        with pa.input_stream(path, compression=compression, buffer_size=1 << 20) as stream:
            while block := stream.read(BATCH_BYTES):
                n_bytes += len(block)
                yield block
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged after {n_bytes:,} bytes of text (was it cut off?): "
                         f"{str(error).splitlines()[0].rstrip('.')}. Fetch it again") from None


def first_line(path, text_column):
    """Check that a .jsonl file has `text_column`, by its first line."""
    line = b""
    for block in blocks(path):
        line += block
        if b"\n" in line.lstrip():
            break
    line = line.lstrip().split(b"\n")[0]
    try:
        fields = json.loads(line or b"{}")
        assert isinstance(fields, dict)
    except (ValueError, AssertionError):
        raise ValueError(f"{path} is not JSON lines: its first line is not an object "
                         f"({line[:40]!r})") from None
    if line and text_column not in fields:
        raise ValueError(f"{path} has no field {text_column!r}; its first line has "
                         f"{', '.join(fields)}. Name the one with the text: --text_column=...")


def jsonl_batches(source, text_column, done):
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema([(text_column, pa.string())]),
                                        unexpected_field_behavior="ignore")
    lines = row = 0
    for block in whole_lines(source.path):
        reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        try:
            table = pyarrow.json.read_json(pa.BufferReader(block), reading, options)
            column = table[text_column].combine_chunks()
            column.validate(full=True)
        except (pa.ArrowInvalid, UnicodeDecodeError):   # half a surrogate pair, or not JSON
            column = pa.array(slowly(block, source.path, text_column, lines), pa.string())
        lines += block.count(b"\n")
        yield row, column, None
        row += len(column)


def slowly(block, path, text_column, lines):
    """The texts of lines of JSON, or a ValueError with the number of the line that is none."""
    for number, line in enumerate(block.splitlines(), lines + 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8", "replace")).get(text_column)
        except (ValueError, AttributeError):
            raise ValueError(f"line {number:,} of {path} is not a JSON object: "
                             f"{line[:40]!r}") from None
        if not isinstance(text, str | None):
            raise ValueError(f"line {number:,} of {path}: {text_column} is "
                             f"{type(text).__name__}, not text")
        yield text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def whole_lines(path):
    """The blocks of a file, cut at ends of lines."""
    rest = []
    for block in blocks(path):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = []
        rest.append(block[end:])
    if any(rest):
        yield b"".join(rest) + b"\n"


def txt_batches(source, text_column, done):
    row, documents, n_bytes = 0, [], 0
    for text in itertools.chain(txt_documents(blocks(source.path)), [None]):
        if documents and (text is None or n_bytes >= BATCH_BYTES):
            yield row, pa.array(documents, pa.binary()).view(pa.string()), None
            row, documents, n_bytes = row + len(documents), [], 0
        documents.append(text)
        n_bytes += len(text or b"")


def txt_documents(text_blocks):
    """The documents of a .txt file, bytes, wherever its blocks happen to end."""
    rest, last = b"", False
    text_blocks = iter(text_blocks)
    while not last or rest:
        while not last and len(rest) < 2 * TXT_LONGEST:
            block = next(text_blocks, None)
            last = block is None
            rest += block or b""
        end, after = txt_end(rest)
        if rest[:end].strip():
            yield rest[:end]
        rest = rest[after:]


def txt_end(text):
    """(where the document ends that `text` begins with, where the next one begins)."""
    separator = text.find(SEPARATOR, 0, TXT_LONGEST + len(SEPARATOR))
    room = separator if separator >= 0 else len(text)
    for what, begin, stop in ((b"\n\n", TXT_DOCUMENT, TXT_LINES), (b"\n", TXT_LINES, TXT_LONGEST)):
        end = text.find(what, begin, min(stop, room))
        if end >= 0:
            return end, end + len(what)
    if separator >= 0:              # the line that it stands on is no part of the documents
        after = separator + len(SEPARATOR)
        return (separator - text.endswith(b"\n", 0, separator),
                after + text.startswith(b"\n", after))
    end = min(TXT_LONGEST, len(text))
    while end < len(text) and text[end] & 0xC0 == 0x80:    # never half a letter
        end -= 1
    return end, end


# files that are made or fetched

def bar(total, unit, initial=0):
    """A progress bar on a terminal; elsewhere it prints nothing, and the caller's lines tell."""
    return tqdm(total=total, unit=unit, initial=initial, unit_scale=True, disable=None,
                dynamic_ncols=True, smoothing=0.1)


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
