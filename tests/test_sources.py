import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sources
from conftest import documents, write_parquet


def read(path, column="text", done=0, **batch):
    """All documents of a file, as its batches bring them."""
    out, numbers = [], []
    for source in sources.joined(sources.sources_of(str(path), column)):
        for number, texts, _ in sources.batches(source, column, done):
            numbers += range(number, number + len(texts))
            out += sources.plain(texts).to_pylist()
    assert numbers == list(range(done, done + len(out)))
    return out


def write_lines(path, lines):
    opened = gzip.open(path, "wb") if str(path).endswith(".gz") else open(path, "wb")
    with opened as f:
        f.write(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view(),
                                  pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_form_of_a_text_column_is_read_from_any_row_on(work, monkeypatch, kind):
    docs = documents(500) + [None, ""]
    monkeypatch.setattr(sources, "BATCH_BYTES", 7000)
    table = pa.table({"text": pa.array(docs, pa.string()).cast(kind)
                      if not pa.types.is_dictionary(kind) else pa.array(docs).dictionary_encode()})
    pq.write_table(table, "a.parquet", row_group_size=70)
    assert read("a.parquet") == docs
    for done in (1, 69, 70, 300, 501, 502):
        assert read("a.parquet", done=done) == docs[done:]


def test_a_column_inside_of_a_column_is_named_with_a_dot(work):
    rows = [{"text": "one", "n": 1}, None, {"text": None, "n": 2}, {"text": "two", "n": 3}]
    pq.write_table(pa.table({"doc": rows, "parts": [["a"]] * 4}), "a.parquet")
    assert read("a.parquet", "doc.text") == ["one", None, None, "two"]
    with pytest.raises(ValueError, match="no column 'text'; it has doc.text, doc.n, parts"):
        read("a.parquet")
    with pytest.raises(ValueError, match="column 'parts' of a.parquet is of type list<.*>, not "
                                         "text; columns of text are doc.text"):
        read("a.parquet", "parts")


def test_only_the_needed_columns_are_read(work, monkeypatch):
    asked = []

    class File(pq.ParquetFile):
        def iter_batches(self, *args, columns, **options):
            asked.append(columns)
            return super().iter_batches(*args, columns=columns, **options)
    monkeypatch.setattr(pq, "ParquetFile", File)
    pq.write_table(pa.table({"text": ["a"], "token_count": [1], "url": ["u"]}), "a.parquet")
    assert read("a.parquet") == ["a"] and asked == [["text", "token_count"]]


def test_batches_stay_small_where_some_documents_are_long(work, monkeypatch):
    docs = ["s"] * 1000 + ["l" * 30_000] * 20 + ["s"] * 1000
    monkeypatch.setattr(sources, "BATCH_BYTES", 50_000)
    write_parquet("a.parquet", docs, row_group_size=5000)
    source, = sources.sources_of("a.parquet", "text")
    sizes = [sum(map(len, texts.to_pylist())) for _, texts, _ in sources.batches(source, "text")]
    assert sum(sizes) == sum(map(len, docs)) and max(sizes) <= 100_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_of_json_are_read_wherever_the_blocks_end(work, monkeypatch, name):
    docs = [*documents(300), "", None, "x" * 20_000, "\u2028 and \x85 end no line"]
    lines = [json.dumps({"n": i, "text": d, "more": [{"text": 1}]}).encode()
             for i, d in enumerate(docs)]
    write_lines(name, [*lines, b"", b'{"n": 1}'])
    for size in (100, 5000, 1 << 20):
        monkeypatch.setattr(sources, "BATCH_BYTES", size)
        assert read(name) == [*docs, None]
    assert read(name, done=250) == [*docs, None][250:]


def test_half_a_surrogate_pair_in_json_becomes_the_replacement_character(work):
    write_lines("a.jsonl", [b'{"text": "one"}', b'{"text": "a\\ud800b"}', b'{"text": "\xff"}',
                            b'{"text": "\\ud83d\\ude00"}'])
    assert read("a.jsonl") == ["one", "a\ufffdb", "\ufffd", "\U0001f600"]


@pytest.mark.parametrize("lines, words", [
    ([b"one", b"two"], "a.jsonl is not JSON lines: its first line is not an object"),
    ([b"[1]"], "a.jsonl is not JSON lines"),
    ([b'{"body": "x", "n": 1}'], "no field 'text'; its first line has body, n. Name the one"),
    ([b'{"text": "x"}'] * 9 + [b'{"text": "x"'], "line 10 of a.jsonl is not a JSON object: b'{"),
    ([b'{"text": "x"}', b'{"text": 5}'], "line 2 of a.jsonl: text is int, not text"),
])
def test_lines_that_are_not_json_are_named(work, lines, words):
    write_lines("a.jsonl", lines)
    with pytest.raises(ValueError) as error:
        read("a.jsonl")
    assert words in str(error.value)


def test_a_cut_off_archive_is_named(work):
    write_lines("a.jsonl.gz", [json.dumps({"text": d}).encode() for d in documents(3000)])
    whole = (work / "a.jsonl.gz").read_bytes()
    (work / "a.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.jsonl.gz is damaged after [\d,]+ bytes of text"):
        read("a.jsonl.gz")


def cut_plainly(text):
    """The rule of .txt in its slowest form: the whole text at once."""
    out = []
    for i, piece in enumerate(text.split(b"<|endoftext|>")):
        piece = piece.removeprefix(b"\n") if i else piece
        while True:
            blank = piece.find(b"\n\n", 16 << 10, 64 << 10)
            line = piece.find(b"\n", 64 << 10, 1 << 20)
            if blank >= 0:
                end, after = blank, blank + 2
            elif line >= 0:
                end, after = line, line + 1
            elif len(piece) > 1 << 20:
                end = after = 1 << 20
            else:
                break
            out.append(piece[:end])
            piece = piece[after:]
        out.append(piece)
    return [p.strip(b"\n") for p in out if p.strip()]


def test_plain_text_is_cut_by_its_rule_wherever_the_blocks_end(work, monkeypatch):
    rng = random.Random(0)
    pieces = []
    for _ in range(60):
        lines = [bytes(rng.choices(b"abc ", k=rng.randint(1, 300)))
                 for _ in range(rng.randint(1, 400))]
        pieces.append(rng.choice([b"\n", b"\n\n", b" "]).join(lines))
    pieces.append(b"z" * 2_500_000)
    text = b"\n<|endoftext|>\n".join(pieces)
    (work / "a.txt").write_bytes(text)
    wanted = cut_plainly(text)
    for size in (1000, 1 << 20):
        monkeypatch.setattr(sources, "BATCH_BYTES", size)
        found = read("a.txt")
        assert [d.strip("\n").encode() for d in found] == wanted
    assert read("a.txt", done=40) == found[40:]


def test_a_letter_is_never_cut_in_half(work):
    (work / "a.txt").write_text("é" * 1_500_000 + "x" + "東" * 900_000, encoding="utf-8")
    found = read("a.txt")
    assert len(found) > 3 and "".join(found) == (work / "a.txt").read_text(encoding="utf-8")


def test_folders_and_patterns_are_the_files_in_them_in_order_of_their_names(work):
    for name in ("f/b.parquet", "f/a.parquet", "g/aa.parquet"):
        write_parquet(name, ["x"])
    (work / "f/readme.md").write_text("no text for training")
    (work / "f/c.jsonl.zst").write_bytes(b"")
    everything = ["f/a.parquet", "g/aa.parquet", "f/b.parquet", "f/c.jsonl.zst"]
    assert sources.named(["f", "g"]) == everything
    assert sources.named(["?/*.parquet"]) == everything[:3]
    with pytest.raises(ValueError, match="f/a.parquet is named twice"):
        sources.named(["f", "f/a.parquet"])
    (work / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder empty has no .parquet, .jsonl or .txt file"):
        sources.named(["empty"])


@pytest.mark.parametrize("name", ["a.csv", "a", "a.parquet.gz", "a.json"])
def test_another_kind_of_file_is_refused(work, name):
    (work / name).write_text("x")
    with pytest.raises(ValueError, match="is not .parquet, .jsonl or .txt"):
        read(name)
