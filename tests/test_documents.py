import json
import random
import sys
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
    """All documents of the files, and what was skipped. What batches() promises is checked."""
    texts, skipped = [], Counter()
    for batch in documents.batches(paths, column, skipped):
        batch.validate(full=True)                   # UTF-8
        assert batch.type == pa.large_string() and len(batch) and not batch.null_count
        texts += batch.to_pylist()
    assert "" not in texts
    return texts, skipped


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
            documents.text_bytes(["a.parquet"], name)


def test_what_is_not_utf8_becomes_the_replacement_character_and_is_counted(work):
    raw = [b"good", b"bad \xff\xfe end", "\ufffd stays".encode(), b"half \xed\xa0\x80 a pair"]
    write_parquet("a.parquet", raw, type=pa.binary())
    write("a.txt", b"\xc9t\xe9\n<|endoftext|>good")
    write("a.jsonl", b'{"text": "\xff"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}')
    texts, skipped = read("a.parquet", "a.txt", "a.jsonl")
    assert texts == ["good", "bad \ufffd\ufffd end", "\ufffd stays", "half \ufffd a pair",
                     "\ufffdt\ufffd", "good", "\ufffd", "a\ufffdb", "\U0001f600"]
    assert skipped["repaired"] == 5


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_each_line_of_json_is_a_document(work, name):
    texts = [*make_texts(600), "x" * 3_000_000, "\u2028, \x85 and \r\n end no line"]
    plain = '{"text": "東 \u2028 \x85"}'                         # letters without escapes
    write(name, f'\ufeff{to_lines([*texts, None, ""])}\n \r\n{{"n": 1}}\r\n{plain}')
    assert read(name) == ([*texts, "東 \u2028 \x85"], {"null": 2, "empty": 1})


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
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


def test_names_mean_files_and_what_is_in_folders_and_no_name_the_one_parquet_file(work):
    paths = [Path(name) for name in ("f/a.parquet", "g/aa.parquet", "f/b.parquet", "f/c.jsonl.zst")]
    for path in (*paths, Path("f/readme.md"), documents.SAMPLE):
        write(path, "")
    assert documents.find(["f", "g"], "x") == paths
    assert documents.find(["f/b.parquet", "./f/b.parquet", "g"], "x") == paths[1:3]
    for name in ("data/other/x.parquet", "data/fineweb/y.parquet", documents.FINEWEB):
        write(name, "")
        assert documents.find([], "fineweb") == [Path(name)]
    assert documents.find((), "other") == [Path("data/other/x.parquet")]
    assert documents.find((), "sample") == [documents.SAMPLE]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_a_file_is_measured_without_reading_and_a_damaged_one_is_named(work, name):
    texts = make_texts(3000)
    write_parquet("a.parquet", texts)
    write("a.jsonl.gz", to_lines(texts))
    write("a.txt.zst", SEPARATOR.join(texts))
    truth = sum(len(text.encode()) for text in texts)
    assert 0.6 < documents.text_bytes([name, name], "text") / (2 * truth) < 1.7
    whole, middle = Path(name).read_bytes(), Path(name).stat().st_size // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(9000) + whole[middle + 9000:]):
        Path(name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} cannot be read, perhaps it was cut off"):
            read(name)


def test_a_column_that_counts_tokens_is_believed_and_a_small_text_gives_more_to_val(work):
    for kind, total in ((pa.int32(), 1000), (pa.float64(), 1000), (pa.string(), None)):
        pq.write_table(pa.table({"token_count": pa.array([600, 398]).cast(kind)}), "a.parquet")
        assert documents.token_count("a.parquet") == total
    assert documents.token_count(write_parquet("b.parquet", ["x"])) is None
    shares = [documents.val_share(text_bytes) for text_bytes in (0, 1e6, 4e6, 1e8, 3e9)]
    assert shares == [0.1, 0.1, 0.05, 0.005, 0.005]


@pytest.mark.parametrize("files, names, sentence", [
    ({}, ["gone.parquet"], "gone.parquet does not exist"),
    ({"f/a.parquet.gz": ""}, ["f"], "f is no .parquet, .jsonl or .txt file"),
    ({}, [], "there is no parquet file under"),
    ({"data/a.parquet": "", "data/b.parquet": ""}, [], "can mean 2 parquet files, as data/a.pa"),
    ({"a.parquet": "no parquet"}, ["a.parquet"], "a.parquet cannot be read"),
    ({"a.jsonl": "[1]\n"}, ["a.jsonl"], "line 1 of a.jsonl is no JSON object: '[1]"),
    ({"a.jsonl": '{"text": "x"}\n\n{"text'}, ["a.jsonl"], "line 3 of a.jsonl is no JSON object"),
    ({"a.jsonl": '{"text": "x"}\n{"text": 5}'}, ["a.jsonl"], "line 2 of a.jsonl has no text in"),
    ({"a.jsonl": '{"body": "x", "n": 1}'}, ["a.jsonl"], "the fields that it has: body, n")])
def test_a_mistake_is_one_sentence(work, files, names, sentence):
    for path, text in files.items():
        write(path, text)
    with pytest.raises(UserError) as error:
        read(*documents.find(names, "fineweb"))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_download_that_cannot_work_is_one_sentence(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="000_00000.parquet failed .*pip install huggingface_hub"):
        samples.download_fineweb()
