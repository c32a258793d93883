import json
import math
import os
import random
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import documents as make_texts
from conftest import write_parquet
from onecard import documents, samples
from onecard.settings import UserError

SEPARATOR = "<|endoftext|>"


def read(*paths, column="text"):
    """All documents of the files, and what was counted. What batches() promises is checked."""
    texts, counts = [], Counter()
    for batch in documents.batches(paths, column, counts):
        batch.validate(full=True)                   # UTF-8
        assert batch.type == pa.large_string() and len(batch) and not batch.null_count
        texts += batch.to_pylist()
    assert "" not in texts and counts["characters"] == sum(map(len, texts))
    assert counts["bytes read"] == sum(Path(path).stat().st_size for path in paths)
    return texts, {name: counts[name] for name in ("null", "empty", "repaired") if counts[name]}


def write(path, text):
    """Write bytes, or text as UTF-8, compressed if the name says so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(path) as f:
        f.write(text if isinstance(text, bytes) else text.encode())


def to_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("kind", [
    pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(),
    pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_form_of_a_text_column_gives_the_same_documents(work, kind):
    texts = make_texts(700)
    plain = pa.array([*texts[:300], None, "", None, *texts[300:]])
    column = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    rows = pa.StructArray.from_arrays([plain, plain], ["body", "other"])
    table = pa.table({"text": column, "outer": rows, "n": range(703), "tags": [["t"]] * 703})
    pq.write_table(table, "a.parquet", row_group_size=300)
    for name in ("text", "outer.body"):
        assert read("a.parquet", column=name) == (texts, {"null": 2, "empty": 1})
    for name in ("n", "outer", "tags", "tags.list.element"):
        with pytest.raises(UserError, match="one of those .* text, outer.body, outer.other$"):
            read("a.parquet", column=name)


def test_what_is_not_utf8_becomes_the_replacement_character_and_is_counted(work):
    long = "long \0" * 4 + "x" * 10_000             # a few broken characters in many good ones
    raw = [b"bad \xff\xfe end", "\ufffd stays".encode(), b"half \xed\xa0\x80 a pair"]
    write_parquet("a.parquet", [long.encode(), *raw], type=pa.binary())
    write("a.txt", b"\xc9t\xe9\n<|endoftext|>" + long.encode())
    write("a.jsonl", to_lines([long]).encode() + b'{"text": "\xff"}\n{"text": "a\\ud800b"}\n'
          b'{"text": "\\ud83d\\ude00"}')
    assert read("a.parquet", "a.txt", "a.jsonl") == ([
        long, "bad \ufffd\ufffd end", "\ufffd stays", "half \ufffd a pair", "\ufffdt\ufffd", long,
        long, "\ufffd", "a\ufffdb", "\U0001f600"], {"repaired": 7})
    write("b.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "cut \\ud83d"}\n')
    assert read("b.jsonl") == (["one", "cut \ufffd"], {"repaired": 1})     # not the wrong encoding
    write("c.txt", "\ufeffcut \ud83d here".encode("utf-16be", "surrogatepass"))
    assert read("c.txt") == (["cut \ufffd here"], {"repaired": 1})


FRENCH, NOISE = "d\xe9j\xe0 vu, na\xefve.\n" * 500, random.Random(0).randbytes(4000)


@pytest.mark.parametrize("name, raw, advice", [
    ("a.TXT.GZ", FRENCH.encode("latin1"), "a.TXT.GZ is no .*18.8% of 7,999 .*`iconv -f ENCODING"),
    ("a.jsonl", to_lines(["x"]).encode() + b'{"text": "\x80"}', "iconv"),
    ("a.txt", ("x" * 1999 + "\xe9" * 3).encode("latin1"), "0.1% of 2,002 characters are broken"),
    ("a.txt", "a text without a mark".encode("utf-16le"), "iconv"),
    ("a.json.zst", '{"text": "\\u0000"}', "100.0% of 1 characters"),
    ("a.parquet", NOISE, "Set --text_column"),
    ("a.parquet", ("x" * 989 + "\0" * 11).encode(), "1.1% of 1,000 characters are broken")])
def test_a_file_that_is_no_text_in_utf8_is_refused(work, name, raw, advice):
    if name == "a.parquet":
        write_parquet(name, [raw], type=pa.binary())
    else:
        write(name.replace(".GZ", ".gz"), raw)
        Path(name.replace(".GZ", ".gz")).rename(name)
    with pytest.raises(UserError, match=advice):
        read(name)


def test_a_large_file_that_is_no_text_is_refused_before_it_is_read_whole(work):
    write("a.txt", b"\xa7 is a paragraph, but not in UTF-8.\n\n" * 300_000)
    counts = Counter()
    with pytest.raises(UserError, match="2.7% of .* characters are broken"):
        list(documents.batches(["a.txt"], "text", counts))
    assert counts["bytes read"] < Path("a.txt").stat().st_size / 2


@pytest.mark.parametrize("name", ["a.txt", "a.json.zst"])
@pytest.mark.parametrize("encoding, mark", [
    ("utf-8", b"\xef\xbb\xbf"), ("utf-16le", b"\xff\xfe"), ("utf-16be", b"\xfe\xff")])
def test_the_mark_at_the_beginning_of_a_file_tells_its_encoding_and_is_no_text(
        work, name, encoding, mark):
    texts = [text.replace(SEPARATOR, "").strip() for text in make_texts(300)]
    if name.startswith("a.txt"):
        text = SEPARATOR.join([f"\r\n{text}\r\n" for text in texts]).replace("\n", "\r\n")
    else:
        text = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    write(name, mark + text.encode(encoding))
    assert read(name)[0] == texts
    write(name, (mark + (text + SEPARATOR * ("txt" in name)).encode(encoding)) * 2)   # cat a b
    assert read(name)[0] == texts * 2
    write(name, (mark + text.encode(encoding))[:-1])
    if encoding == "utf-16le":
        with pytest.raises(UserError, match="Perhaps it was cut off"):
            read(name)


@pytest.mark.parametrize("n_different", [4000, 20])
def test_the_memory_does_not_grow_with_the_file(work, n_different):
    text = random.Random(0).randbytes(5_000).hex()
    texts = [text[i:] + text[:i] for i in range(n_different)] * (4000 // n_different)
    # 40 MB in one row group; where texts come again, the file is small
    write_parquet("a.parquet", texts, row_group_size=4000, compression="none")
    before, highest = pa.total_allocated_bytes(), 0
    for _ in documents.batches(["a.parquet"], "text", Counter()):
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < 30e6


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_each_line_of_json_is_a_document(work, name):
    texts = [*make_texts(600), "x" * 3_000_000, "\u2028, \x85 and \r\n end no line"]
    plain = '{"text": "東 \u2028 \x85"}'                         # letters without escapes
    write(name, f'\ufeff{to_lines([*texts, None, ""])}\n \r\n{{"n": 1}}\r\n{plain}')
    assert read(name) == ([*texts, "東 \u2028 \x85"], {"null": 2, "empty": 1})


@pytest.mark.parametrize("name, newline", [("a.txt", "\n"), ("a.txt.gz", "\r\n")])
def test_a_text_file_is_cut_at_separators_or_at_blank_lines_once_it_is_long(work, name, newline):
    texts = [text.replace(SEPARATOR, "").strip() for text in make_texts(500)]
    for separator in (f"{newline}{SEPARATOR}{newline}", SEPARATOR):
        write(name, separator.join(["", *texts, " "]).replace("\n", newline))
        assert read(name)[0] == texts
    paragraphs = ["\n".join(text.split()) for text in texts]
    write(name, "\n\n".join(paragraphs).replace("\n", newline))
    texts = read(name)[0]
    assert "\n\n".join(texts) == "\n\n".join(paragraphs) and len(texts) > 3
    longest = max(map(len, paragraphs))
    assert all(16_000 <= len(text) <= 16_000 + longest + 2 for text in texts[:-1])


@pytest.mark.parametrize("line", ["no blank line after this one\n", "東é", "\U0001f642"])
def test_a_text_without_blank_lines_is_cut_but_never_inside_of_a_letter(work, line):
    write("a.txt", line * 200_000)
    texts = read("a.txt")[0]
    assert max(map(len, texts)) <= 500_000
    assert "".join(texts).replace("\n", "") == line.strip() * 200_000


@pytest.mark.parametrize("longest", [250_000, 500_000])
def test_a_separator_is_found_at_every_position_of_a_long_line(work, longest):
    for i in range(-1, 15):
        write("a.txt", "x" * (longest - i) + SEPARATOR + "y<|endof")
        *pieces, last = read("a.txt")[0]
        assert "".join(pieces) == "x" * (longest - i) and last == "y<|endof"


def test_names_mean_files_and_what_is_in_folders_and_no_name_the_one_parquet_file(work, capsys):
    paths = [Path(name) for name in ("f/B.TXT", "f/a.parquet", "g/aa.parquet", "f/b.Parquet",
                                     "f/c.jsonl.zst", "f/d.json.GZ")]
    hidden = [Path("f", name) for name in ("._a.parquet", ".x.txt", "_SUCCESS", "a.parquet.crc",
                                         "meta.json", "dataset_infos.json")]
    for path in (*paths, *hidden, documents.SAMPLE):
        write(path, "")
    assert documents.find(["f", "g"]) == paths and capsys.readouterr().out == ""
    for name in ("f/readme.md", "f/g.parquet/part.md", "f/e.parquet.gz"):
        write(name, "")
    assert documents.find(["f", "g"]) == paths
    assert capsys.readouterr().out == "f: 3 of 8 names are left out, such as e.parquet.gz\n"
    assert documents.find(["f/b.Parquet", "./f/b.Parquet", "g"]) == paths[2:4]
    for name in ("data/other/x.PARQUET", "data/fineweb/y.parquet", documents.FINEWEB):
        write(name, "")
        for hidden in ("._y.parquet", ".cache/z.parquet", "_temporary/z.parquet"):
            write(Path(name).parent / hidden, "")
        (Path(name).parent / "a.parquet").mkdir()
        assert documents.find_parquet("fineweb") == Path(name)
    assert documents.find_parquet("other") == Path("data/other/x.PARQUET")
    assert documents.find_parquet("sample") == documents.SAMPLE


def test_a_file_is_read_once_however_often_it_is_named(work):
    write("f/a.txt", "x")
    Path("f/b.txt").symlink_to(work / "f/a.txt")
    os.link("f/a.txt", "f/c.txt")
    names = ["f/a.txt", "f/../f/a.txt", work / "f/a.txt", "f"]
    assert documents.find(names) == [Path("f/a.txt")]


def test_the_indentation_of_a_text_stays_and_no_word_is_cut(work):
    lines = [f"    def f{i}(self):\n        return 'wordy{i} <|endof'\n" for i in range(3000)]
    code = "\n".join(lines)                                 # 150,000 letters, cut at blank lines
    write("a.txt", f"\n{code}{SEPARATOR}\n\n\u3000東京 \n\n{SEPARATOR}  \n{SEPARATOR}x")
    texts = read("a.txt")[0]
    assert texts[-2:] == ["\u3000東京 ", "x"] and all(text[:4] == "    " for text in texts[:-2])
    assert "\n\n".join(texts[:-2]) == code.strip("\n")
    write("b.txt", " ".join(f"wordy{i}" for i in range(100_000)))       # one line
    texts = read("b.txt")[0]
    assert len(texts) > 1 and [word for text in texts for word in text.split()] == [
        f"wordy{i}" for i in range(100_000)]


def test_a_flipped_bit_in_a_parquet_with_checksums_is_noticed(work):
    texts = [str(i) * 20 for i in range(5000)]
    write_parquet("a.parquet", texts, write_page_checksum=True, compression="none",
                  use_dictionary=False)
    whole = Path("a.parquet").read_bytes()
    position = whole.index(b"1234" * 20)
    Path("a.parquet").write_bytes(whole[:position] + b"0" + whole[position + 1:])
    with pytest.raises(UserError, match="a.parquet cannot be read"):
        read("a.parquet")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_a_damaged_file_is_named(work, name):
    texts = make_texts(3000)
    write_parquet("a.parquet", texts)
    write("a.jsonl.gz", to_lines(texts))
    write("a.txt.zst", SEPARATOR.join(texts))
    whole, middle = Path(name).read_bytes(), Path(name).stat().st_size // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(9000) + whole[middle + 9000:]):
        Path(name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} cannot be read: .* Perhaps it was cut off"):
            read(name)


def test_what_cannot_be_read_is_refused_with_its_reason(work):
    text = to_lines(make_texts(100)).encode()
    write("a.jsonl", text)
    write("b.jsonl.gz", text)
    Path("c.jsonl.gz").write_bytes(Path("b.jsonl.gz").read_bytes() * 2)
    assert read("c.jsonl.gz")[0] == read("a.jsonl")[0] * 2
    Path("d.jsonl.gz").write_bytes(text)
    Path("e.txt").mkdir()
    for name, reason in (("d.jsonl.gz", "incorrect header check"), ("e.txt", "Is a directory")):
        with pytest.raises(UserError, match=f"^{name} cannot be read: .*{reason}"):
            read(name)


def test_of_two_columns_with_one_name_none_is_taken_and_a_file_without_rows_is_empty(work):
    kinds = [("text", pa.string()), ("text", pa.int64()), ("n", pa.string())]
    pq.write_table(pa.table([["a"], [1], ["b"]], schema=pa.schema(kinds)), "a.parquet")
    with pytest.raises(UserError, match="a.parquet has several columns named 'text'; rename"):
        read("a.parquet")
    assert read("a.parquet", column="n")[0] == ["b"]
    pq.ParquetWriter("b.parquet", pa.schema(kinds[:1])).close()         # no row group
    assert read("b.parquet") == ([], {}) and documents.token_count("b.parquet") is None


@pytest.mark.parametrize("counts, total", [
    ([600, 398], 1000), ([600.0, 398], 1000), ([600.5, 398], None), ([math.nan, 398], None),
    ([None, 398], None), (["600", "398"], None), ([-600, 398], None), ([[600], [398]], None)])
def test_a_column_that_counts_tokens_is_a_hint_that_is_right_or_unknown(work, counts, total):
    pq.write_table(pa.table({"token_count": counts}), "a.parquet")
    assert documents.token_count("a.parquet") == total
    write("b.parquet", "no parquet")
    for name in (write_parquet("c.parquet", ["x"]), "b.parquet", "gone.parquet"):
        assert documents.token_count(name) is None


@pytest.mark.parametrize("files, names, sentence", [
    ({"f/a.parquet.gz": ""}, ["f"], "f is no .parquet, .jsonl, .json or"),
    ({"data/a.parquet": "", "data/b.parquet": ""}, [], "can mean 2 parquet files, data/a.pa"),
    ({"a.parquet": "no parquet"}, ["a.parquet"], "a.parquet cannot be read"),
    ({"a.txt": "x"}, [""], " does not exist"),
    ({"a.jsonl": "[1]\n"}, ["a.jsonl"], "line 1 of a.jsonl is no JSON object: '[1]"),
    ({"a.json": "[" * 100_000}, ["a.json"], "line 1 of a.json cannot be read as JSON (maximum"),
    ({"a.jsonl": '{"text": "x"}\n\n{"text'}, ["a.jsonl"], "line 3 of a.jsonl cannot be read"),
    ({"a.jsonl": '{"text": "x"}\n{"text": 5}'}, ["a.jsonl"], "line 2 of a.jsonl has no text in"),
    ({"a.jsonl": '\n{"content": "x"}'}, ["a.jsonl"], "line 2 of a.jsonl has no text in 'text'"),
    ({"a.jsonl": '{"body": "x", "n": 1}'}, ["a.jsonl"], "the fields that it has: body, n")])
def test_a_mistake_is_one_sentence(work, files, names, sentence):
    for path, text in files.items():
        write(path, text)
    with pytest.raises(UserError) as error:
        read(*documents.find(names or [documents.find_parquet("fineweb")]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_download_that_cannot_work_is_one_sentence(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)           # it is not installed
    with pytest.raises(UserError, match="^--download needs .*: pip install huggingface_hub$"):
        samples.download_fineweb()
    hub = types.SimpleNamespace(hf_hub_download=lambda *_, **__: open("no/network"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match="000_00000.parquet failed .*no/network.*tries again$"):
        samples.download_fineweb()
