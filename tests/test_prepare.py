import errno
import gzip
import hashlib
import http.server
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
import sources
import tokenizer
from conftest import PROJECT, documents, script, write_parquet
from loader import END_OF_TEXT, Dataset
from tokenizer import GPT2Tokenizer, normalized

NAMES = ("meta.json", "train.bin", "train.idx", "val.bin", "val.idx")


def run_prepare(*args, **settings):
    """prepare.py in this process, with one worker."""
    settings = {"num_proc": 1, **settings}
    prepare.main(prepare.PrepareConfig(files=tuple(map(str, args)), **settings))


def texts(folder, split):
    """The documents of a prepared split, decoded."""
    tokens, starts = (np.fromfile(folder / f"{split}.bin", np.uint16),
                      np.fromfile(folder / f"{split}.idx", np.uint64))
    assert starts[0] == 0 and starts[-1] == len(tokens)
    pieces = [tokens[int(a):int(b)] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert all(p[0] == END_OF_TEXT and END_OF_TEXT not in p[1:] for p in pieces)
    return [GPT2Tokenizer().decode_bytes(p[1:]).decode() for p in pieces]


def files_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_every_document_comes_back_in_order_on_one_side(work):
    docs = documents(700)
    write_parquet("a.parquet", docs)
    run_prepare("a.parquet", dataset="a", val_fraction=0.1)
    train, val = (texts(work / "data/a", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(docs) and 30 < len(val) < 120
    assert (train == [d for d in docs if d in set(train)]
            and val == [d for d in docs if d in set(val)])


def test_the_files_can_be_trained_on_and_meta_json_tells_their_truth(work):
    docs = documents(300)
    source = write_parquet("a.parquet", docs)
    run_prepare("a.parquet", dataset="a", val_fraction=0.2)
    meta = json.loads((work / "data/a/meta.json").read_text())
    for split in ("train", "val"):
        data, told, decoded = (Dataset(work / "data/a", split, 16, 50304), meta["splits"][split],
                               texts(work / "data/a", split))
        assert (told["documents"] == data.n_documents == len(decoded)
                and told["tokens"] == data.n_tokens)
        assert told["text_bytes"] == data.text_bytes == sum(len(d.encode()) for d in decoded)
        assert told["max_token"] == data.tokens[:].max()
        assert told["bin_sha256"] == files_of(work / "data/a")[f"{split}.bin"]
    assert meta["sources"] == [{"name": "a.parquet", "bytes": source.stat().st_size, "rows": 300,
                                "split": "train",
                                "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}]
    assert meta["tokenizer"]["n_vocab"] == 50257 and meta["seed"] == 1337
    assert sorted(p.name for p in (work / "data/a").iterdir()) == list(NAMES)


def test_the_bytes_do_not_depend_on_the_number_of_processes_or_row_groups(work, monkeypatch):
    docs = documents(1200)
    write_parquet("x/a.parquet", docs)
    write_parquet("y/a.parquet", docs, row_group_size=1200)
    for n in (1, 2, 3):
        script("prepare.py", "x/a.parquet", f"--dataset=p{n}", f"--num_proc={n}", cwd=work)
    run_prepare("y/a.parquet", dataset="y")
    monkeypatch.setattr(sources, "BATCH_BYTES", 9000)
    run_prepare("x/a.parquet", dataset="z")
    sums = [files_of(work / "data" / d) for d in ("p1", "p2", "p3", "z")]
    assert all(s == sums[0] for s in sums)
    assert files_of(work / "data/y")["train.bin"] == sums[0]["train.bin"]


def test_equal_documents_land_on_one_side(work):
    docs = documents(50) * 10
    random.Random(0).shuffle(docs)
    write_parquet("a.parquet", docs)
    run_prepare("a.parquet", dataset="a", val_fraction=0.3)
    train, val = (set(texts(work / "data/a", split)) for split in ("train", "val"))
    assert train and val and not train & val


def test_the_seed_decides_what_is_val(work):
    write_parquet("a.parquet", documents(300))
    for seed in (1, 2):
        run_prepare("a.parquet", dataset=f"s{seed}", seed=seed, val_fraction=0.2)
    assert set(texts(work / "data/s1", "val")) != set(texts(work / "data/s2", "val"))


def test_a_val_file_is_val_whole_and_its_texts_leave_train(work, capsys):
    docs, val = documents(200), documents(40, seed=1)
    write_parquet("a.parquet", docs[:150] + val[:3] + docs[150:])
    write_parquet("v.parquet", val)
    run_prepare("a.parquet", dataset="a", val="v.parquet")
    assert texts(work / "data/a", "val") == val and texts(work / "data/a", "train") == docs
    assert "left out: 3 documents in both splits" in capsys.readouterr().out


def test_a_text_of_the_same_letters_in_another_order_stays(work):
    docs = [*documents(100), "the dog bites the man"]
    write_parquet("a.parquet", docs)
    write_parquet("v.parquet", ["The man bites the dog!"])
    run_prepare("a.parquet", dataset="a", val="v.parquet")
    assert texts(work / "data/a", "train") == docs


def test_several_files_are_one_dataset_in_their_order(work):
    docs = documents(90)
    write_parquet("a.parquet", docs[:40])
    write_parquet("b.parquet", docs[40:])
    write_parquet("v.parquet", documents(5, seed=9))
    run_prepare("a.parquet", "b.parquet", dataset="ab", val="v.parquet")
    assert texts(work / "data/ab", "train") == docs


def test_empty_and_null_documents_are_left_out_and_counted(work, capsys):
    docs = documents(60)
    write_parquet("a.parquet", docs[:30] + ["", None, None] + docs[30:])
    run_prepare("a.parquet", dataset="a", val_fraction=0.3)
    assert sorted(texts(work / "data/a", "train") + texts(work / "data/a", "val")) == sorted(docs)
    assert "left out: 1 documents empty, 2 documents null" in capsys.readouterr().out
    assert json.loads((work / "data/a/meta.json").read_text())["skipped"] == {"empty": 1, "null": 2}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_columns_of_text_are_read_alike(work, kind):
    docs = documents(60)
    write_parquet("a.parquet", docs, column="content", type=kind)
    run_prepare("a.parquet", dataset="a", text_column="content", val_fraction=0.2)
    assert sorted(texts(work / "data/a", "train") + texts(work / "data/a", "val")) == sorted(docs)


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_broken_utf8_does_not_stop_it(work, encoder):
    raw = [b"good", b"bad \xff\xfe end", None, *(d.encode() for d in documents(40))]
    write_parquet("a.parquet", raw, type=pa.binary())
    run_prepare("a.parquet", dataset="a", val_fraction=0.2, encoder=encoder)
    kept = texts(work / "data/a", "train") + texts(work / "data/a", "val")
    assert {"good", "bad \ufffd\ufffd end"} < set(kept)


def test_both_encoders_write_the_same_bytes(work):
    docs = documents(600) + ["<|endoftext|> is text", "\x00", " ", "\r\n" * 50, "a" * 5000]
    write_parquet("a.parquet", docs)
    for encoder in ("gigatoken", "tiktoken"):
        run_prepare("a.parquet", dataset=encoder, encoder=encoder)
    one, other = (files_of(work / "data" / e) for e in ("gigatoken", "tiktoken"))
    assert all(one[name] == other[name] for name in NAMES[1:])


def test_a_document_that_gigatoken_gets_wrong_stops_it_and_is_named(work, monkeypatch):
    write_parquet("a.parquet", documents(300))
    right = prepare.encode_documents

    def wrong(column, encoder):
        ids, starts = right(column, encoder)
        if column[0].as_py().startswith("Document 0-"):
            ids[starts[:-1] + 1] += 1               # the first token of every document
        return ids, starts
    monkeypatch.setattr(prepare, "encode_documents", wrong)
    with pytest.raises(ValueError, match=r"document \d+ of a.parquet \(counted from 0\): gigatoken "
                                         "makes other tokens of it than tiktoken"):
        run_prepare("a.parquet", dataset="a", encoder="gigatoken")
    assert not list(work.glob("data/a/train.bin"))


def test_a_document_of_every_batch_is_proved_against_tiktoken(work, monkeypatch):
    write_parquet("a.parquet", documents(500))
    monkeypatch.setattr(sources, "BATCH_BYTES", 20_000)
    proved, batches, encode = [], [], prepare.encode
    monkeypatch.setattr(prepare, "encode",
                        lambda *args: batches.append(len(args[0])) or encode(*args))

    class Proof(GPT2Tokenizer):
        def encode(self, text):
            proved.append(int(text.split("-")[1].split(":")[0]))
            return super().encode(text)
    monkeypatch.setattr(prepare, "GPT2Tokenizer", Proof)
    run_prepare("a.parquet", dataset="a", encoder="gigatoken")
    ends = np.cumsum(batches)
    assert len(batches) > 5 and np.searchsorted(ends, sorted(proved), "right").tolist() \
        == list(range(len(batches)))
    proved.clear(), batches.clear()
    monkeypatch.setattr(sources, "BATCH_BYTES", 1 << 30)
    write_parquet("b.parquet", documents(4000, longest=20), row_group_size=1000)
    run_prepare("b.parquet", dataset="b", encoder="gigatoken")
    assert batches == [4000] and [n // 1000 for n in proved] == [0, 1, 2, 3]   # of every row group


def test_a_text_that_differs_in_form_only_is_on_one_side(work):
    docs = documents(300)
    forms = [d.upper().replace(" ", "\n", 5) + "!!" for d in docs if d.isascii()]
    write_parquet("a.parquet", docs + forms)
    run_prepare("a.parquet", dataset="a", val_fraction=0.3)
    sides = [{normalized(t.encode()) for t in texts(work / "data/a", split)}
             for split in ("train", "val")]
    assert len(forms) > 20 and all(sides) and not sides[0] & sides[1]
    write_parquet("v.parquet", [f.replace("!", "?") for f in forms])
    run_prepare("a.parquet", dataset="v", val="v.parquet")
    left = {normalized(t.encode()) for t in texts(work / "data/v", "train")}
    assert left and not left & {normalized(f.encode()) for f in forms}


def test_a_val_document_that_stands_nearly_the_same_in_train_is_told_and_left_out(work, capsys):
    rng = random.Random(3)
    words = [f"{a}{b}" for a in ("red", "green", "blue", "old", "new") for b in
             ("house", "tree", "river", "stone", "bird", "road", "cloud", "field")]
    docs = [" ".join(rng.choices(words, k=150)) for _ in range(60)]
    copy = docs[7] + " and this was added by somebody else"
    write_parquet("a.parquet", docs)
    write_parquet("v.parquet", [copy, " ".join(rng.choices(words, k=150))])
    run_prepare("a.parquet", dataset="a", val="v.parquet")
    run_prepare(check="data/a")
    assert ("1 of 2 documents of val stand in train for the most part (too short to be judged: 0); "
            "`python prepare.py --dedup_val --force` leaves them out of val"
            ) in capsys.readouterr().out
    assert texts(work / "data/a", "val")[0] == copy
    run_prepare("a.parquet", dataset="a", val="v.parquet", dedup_val=True, force=True)
    assert "left out of val: 1 documents that stand in train" in capsys.readouterr().out
    assert len(texts(work / "data/a", "val")) == 1 and copy not in texts(work / "data/a", "val")
    val = Dataset(work / "data/a", "val", 16, 50304)    # counts and checksums are those of the rest
    assert val.n_documents == 1
    assert val.text_bytes == len(texts(work / "data/a", "val")[0].encode())


def test_small_files_give_more_of_themselves_to_val(work):
    assert prepare.PrepareConfig().val_fraction == 0
    for n, low, high in ((100, 0.1, 0.1), (9000, 0.02, 0.1)):
        write_parquet(f"{n}.parquet", documents(n, longest=200))
        run_prepare(f"{n}.parquet", dataset=f"d{n}")
        meta = json.loads((work / f"data/d{n}/meta.json").read_text())
        assert low <= meta["drawn_fraction"] <= high
    assert 25_000 < meta["splits"]["val"]["tokens"] < 100_000


def test_its_count_is_held_against_the_files_own(work, capsys):
    docs = documents(100)
    counts = [len(GPT2Tokenizer().encode(d)) for d in docs]
    pq.write_table(pa.table({"text": docs, "token_count": counts}), "a.parquet")
    run_prepare("a.parquet", dataset="a")
    assert (f"{sum(counts):,} tokens of text, the same as the sum of the files' token_count"
            in capsys.readouterr().out)
    pq.write_table(pa.table({"text": docs, "token_count": [c + 1 for c in counts]}), "b.parquet")
    run_prepare("b.parquet", dataset="b")
    assert ("tokens of text, -100 against the sum of the files' token_count"
            in capsys.readouterr().out)


def test_lines_of_json_and_plain_text_are_read_by_the_same_door(work):
    docs = documents(200)
    write_parquet("p.parquet", docs)
    with gzip.open("j.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": d, "n": i}) + "\n" for i, d in enumerate(docs))
    pa.output_stream("z.jsonl.zst", compression="zstd").write(gzip.open("j.jsonl.gz").read())
    plain = [d.strip("\n").replace("<|endoftext|>", "") for d in docs]
    (work / "t.txt").write_text("\n<|endoftext|>\n".join(plain), encoding="utf-8")
    for kind in ("p.parquet", "j.jsonl.gz", "z.jsonl.zst", "t.txt"):
        run_prepare(kind, dataset=kind[0])
    p, j, z, t = (files_of(work / "data" / d) for d in "pjzt")
    assert all(p[name] == j[name] == z[name] for name in NAMES[1:])
    assert sorted(texts(work / "data/t", "train") + texts(work / "data/t", "val")) == sorted(plain)


@pytest.mark.parametrize("n, val", [(2, ""), (3, ""), (5, ""), (3, "v.parquet")])
def test_the_parts_of_n_machines_are_the_single_run(work, n, val):
    docs = documents(1000)
    write_parquet("v.parquet", docs[3:6] + documents(50, seed=1))
    write_parquet("f/a.parquet", docs[:450])
    write_parquet("f/b.parquet", docs[450:])
    run_prepare("f", dataset="whole", val=val)
    for i in range(1, n + 1):
        run_prepare("f", dataset="parts", part=f"{i}/{n}", val=val)
        if i < n:
            with pytest.raises(ValueError, match=f"lacks parts? .*{n}.* of {n}: copy train"):
                Dataset(work / "data/parts", "train", 16, 50304)
    for split in ("train", "val"):
        joined = b"".join((work / f"data/parts/{split}.{i}.bin").read_bytes()
                          for i in range(1, n + 1))
        assert joined == (work / f"data/whole/{split}.bin").read_bytes()
        one, many = (Dataset(work / "data" / d, split, 16, 50304, seed=3)
                     for d in ("whole", "parts"))
        assert (one.n_tokens, one.n_documents, one.text_bytes, one.n_windows) \
            == (many.n_tokens, many.n_documents, many.text_bytes, many.n_windows)
        assert np.array_equal(one.starts, many.starts)
        assert all(np.array_equal(one.sample(i), many.sample(i))
                   for i in range(0, 2 * one.n_windows, 7))
        assert all(np.array_equal(one.window(i), many.window(i)) for i in range(one.n_windows))


def test_parts_that_do_not_belong_together_are_refused(work):
    write_parquet("a.parquet", documents(400))
    run_prepare("a.parquet", dataset="p", part="1/2")
    run_prepare("a.parquet", dataset="p", part="2/2", seed=7)
    with pytest.raises(ValueError, match="part 2 in data/p was prepared from other files or with "
                                         "other settings than part 1"):
        Dataset("data/p", "train", 16, 50304)
    with pytest.raises(ValueError, match="data/p holds a dataset in parts"):
        run_prepare("a.parquet", dataset="p")
    run_prepare("a.parquet", dataset="w")
    with pytest.raises(ValueError, match="data/w holds a whole dataset"):
        run_prepare("a.parquet", dataset="w", part="1/2", force=True)
    with pytest.raises(ValueError, match="--part=1/4 is the smallest"):
        run_prepare("a.parquet", dataset="q", part="1/9")


def test_train_reads_parts(work):
    write_parquet("a.parquet", documents(400))
    for i in (1, 2):
        script("prepare.py", "a.parquet", "--dataset=p", f"--part={i}/2", cwd=work)
    done = script("train.py", "--dataset=p", "--n_layer=1", "--n_head=1", "--n_embd=16",
                  "--block_size=16", "--max_iters=2", "--device=cpu", "--compile=False",
                  "--eval_iters=1", "--gradient_accumulation_steps=1", "--batch_size=2", cwd=work)
    assert "step 2" in done.stdout, done.stdout


def test_a_second_run_on_the_same_input_does_nothing(work, capsys):
    write_parquet("a.parquet", documents(100))
    run_prepare("a.parquet", dataset="a")
    before = {p: p.stat().st_mtime_ns for p in (work / "data/a").iterdir()}
    run_prepare("a.parquet", dataset="a")
    assert "Nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (work / "data/a").iterdir()} == before
    run_prepare("a.parquet", dataset="a", force=True)
    assert all(p.stat().st_mtime_ns > t for p, t in before.items())


def test_another_input_never_replaces_a_dataset_unasked(work):
    write_parquet("a.parquet", documents(100))
    write_parquet("b.parquet", documents(100, seed=1))
    run_prepare("a.parquet", dataset="a")
    before = files_of(work / "data/a")
    for args, settings in ((["b.parquet"], {}), (["a.parquet"], {"seed": 5})):
        with pytest.raises(ValueError, match="was prepared from a.parquet, or with other settings. "
                                             "--force replaces it"):
            run_prepare(*args, dataset="a", **settings)
    assert files_of(work / "data/a") == before
    run_prepare("b.parquet", dataset="a", force=True)
    assert files_of(work / "data/a") != before


def test_the_memory_does_not_grow_with_the_file(work):
    text = random.Random(0).randbytes(5_000).hex()
    write_parquet("a.parquet", [text[i:] + text[:i] for i in range(6000)], compression="none",
                  use_dictionary=False)
    before, most = pa.total_allocated_bytes(), 0
    source, = sources.joined(sources.sources_of("a.parquet", "text"))
    for _ in sources.batches(source, "text"):
        most = max(most, pa.total_allocated_bytes() - before)
    assert os.path.getsize("a.parquet") > 55e6 and most < 20e6


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads its memory from /proc")
def test_what_gigatoken_remembers_is_bounded(work, monkeypatch):
    rng = np.random.default_rng(0)
    renewed, limit = [], 100 << 20
    monkeypatch.setattr(tokenizer, "MOST_GROWTH", limit)
    gigatoken, before = tokenizer._Gigatoken(), tokenizer.resident()
    new, highest = gigatoken.new, 0
    gigatoken.new = lambda: renewed.append(1) or new()
    for _ in range(24):             # 48 MB of words that nobody has met
        letters = rng.integers(97, 123, 2 << 20, dtype=np.uint8)
        letters[np.cumsum(rng.integers(6, 15, len(letters) // 15))] = 32
        gigatoken.encode(pa.array([letters.tobytes()], pa.binary()).view(pa.string()))
        highest = max(highest, tokenizer.resident())
    assert renewed and highest - before < 3 * limit


# where the file is

def test_the_one_parquet_file_under_data_is_found(work):
    docs = documents(80)
    write_parquet("data/sample/sample.parquet", documents(5))
    write_parquet("data/fineweb_one_shard/000_00000.parquet", docs)
    run_prepare()
    assert len(texts(work / "data/fineweb", "train") + texts(work / "data/fineweb", "val")) == 80


def test_other_peoples_files_under_data_are_no_matter(work):
    write_parquet("data/fineweb_one_shard/000_00000.parquet", documents(80))
    write_parquet("data/mine/x.parquet", documents(80, seed=2))
    assert str(sources.find_parquet("fineweb")) == "data/fineweb_one_shard/000_00000.parquet"
    assert str(sources.find_parquet("mine")) == "data/mine/x.parquet"


def test_it_may_lie_in_the_folder_of_the_dataset_itself(work):
    write_parquet("data/fineweb/000_00000.parquet", documents(80))
    run_prepare()
    assert (sorted(p.name for p in (work / "data/fineweb").iterdir())
            == ["000_00000.parquet", *NAMES])
    write_parquet("data/mine/x.parquet", documents(80, seed=2))
    run_prepare(dataset="mine")
    assert (work / "data/mine/meta.json").exists()


# mistakes

@pytest.mark.parametrize("make, args, settings, words", [
    (None, [], {}, "there is no parquet file under"),
    (lambda: (write_parquet("data/a.parquet", ["x"]), write_parquet("data/b.parquet", ["x"])),
     [], {},
     "there are 2 parquet files that fineweb can mean: data/a.parquet, data/b.parquet"),
    (None, ["gone.parquet"], {}, "gone.parquet does not exist"),
    (lambda: open("a.parquet", "wb").write(b"this is no parquet file"), ["a.parquet"], {},
     "not a whole parquet file"),
    (lambda: write_parquet("a.parquet", ["x"], column="body"), ["a.parquet"], {},
     "a.parquet has no column 'text'; it has body, id. Name the one with the text: --text_column="),
    (lambda: write_parquet("a.parquet", ["x"]), ["a.parquet"], {"text_column": "id"},
     "column 'id' of a.parquet is of type int64, not text; columns of text are text"),
    (lambda: write_parquet("a.parquet", ["", None]), ["a.parquet"], {},
     "no document is left for train"),
    (lambda: write_parquet("a.parquet", ["y"]), ["a.parquet"], {}, "no document is left for val"),
    (None, ["a.parquet"], {"sample": True}, "--sample builds its own text"),
])
def test_a_mistake_is_named_and_leaves_nothing_that_trains(work, make, args, settings, words):
    if make:
        make()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_prepare(*args, **settings)
    assert words in str(error.value)
    assert not list(work.glob("data/*/train.bin")) and not list(work.glob("data/*/meta.json"))


@pytest.mark.parametrize("settings, words", [
    (dict(val_fraction=1.5), "val_fraction = 1.5 is a share"), (dict(num_proc=-1), "num_proc = -1"),
    (dict(val="v", val_fraction=0.1), "set one of the two"),
    (dict(part="3/2"), "i/n with i from 1 to n"), (dict(part="x"), "i/n with i from 1 to n"),
    (dict(part="1/2", dedup_val=True), "leave out one of the two"),
    (dict(encoder="fast"), "is auto, gigatoken or tiktoken")])
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        prepare.PrepareConfig(**settings)


def test_a_truncated_file_is_named(work):
    write_parquet("a.parquet", documents(2000))
    whole = (work / "a.parquet").read_bytes()
    (work / "a.parquet").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole parquet file"):
        run_prepare("a.parquet")
    hole = bytearray(whole)
    metadata = pq.ParquetFile(pa.BufferReader(whole)).metadata
    begin = metadata.row_group(13).column(0).data_page_offset
    hole[begin + 50:begin + 2000] = bytes(1950)         # the footer is there, the data is not
    (work / "a.parquet").write_bytes(hole)
    with pytest.raises(ValueError, match=r"a.parquet is damaged in row group 13 \(of 0 to 19\)"):
        run_prepare("a.parquet")


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_named(work, monkeypatch, capsys):
    write_parquet("a.parquet", documents(3000))
    (work / "data").write_text("a file, not a folder")
    with pytest.raises(OSError, match="data/d cannot be written \\(Not a directory\\)"):
        run_prepare("a.parquet", dataset="d")
    (work / "data").unlink()
    free = prepare.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="MB are free on its disk; make room first"):
        run_prepare("a.parquet", dataset="d")
    monkeypatch.undo()
    done = script("prepare.py", "a.parquet", "--dataset=d", "--num_proc=1", cwd=work, check=False,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    full = prepare.SplitWriter.add

    def add(writer, ids, lengths, n_bytes):
        if writer.documents > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        full(writer, ids, lengths, n_bytes)
    monkeypatch.chdir(work)
    monkeypatch.setattr(sources, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(prepare.SplitWriter, "add", add)
    with pytest.raises(OSError, match="no space is left for data/e, .* the same command goes on"):
        run_prepare("a.parquet", dataset="e")
    monkeypatch.setattr(prepare.SplitWriter, "add", full)
    run_prepare("a.parquet", dataset="e")
    assert "going on after" in capsys.readouterr().out
    run_prepare("a.parquet", dataset="f")
    assert files_of(work / "data/e") == files_of(work / "data/f")


def test_a_vocabulary_that_is_missing_is_one_sentence(work):
    for path in PROJECT.glob("*.py"):
        (work / path.name).write_bytes(path.read_bytes())
    write_parquet("a.parquet", documents(10))
    done = subprocess.run([sys.executable, "prepare.py", "a.parquet"], text=True,
                          capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "gpt2.tiktoken is missing or changed; `git checkout" in done.stderr


def test_a_mistake_is_one_sentence_for_the_user(work):
    done = script("prepare.py", "gone.parquet", cwd=work, check=False)
    assert done.returncode == 1 and done.stderr == "prepare.py: gone.parquet does not exist\n"


# stopped at any moment

def test_what_was_stopped_goes_on_from_its_last_batch_and_ends_in_the_same_bytes(
        work, monkeypatch, capsys):
    docs = documents(2000)
    write_parquet("a.parquet", docs[:900])
    write_parquet("b.parquet", docs[900:])
    monkeypatch.setattr(sources, "BATCH_BYTES", 20_000)
    run_prepare("a.parquet", "b.parquet", dataset="wanted")
    encode, numbers, stop = prepare.encode, [], None

    def stopped(column, encoder, where, number):
        numbers.append((where, number))
        if (where, len(numbers)) == stop:
            raise KeyboardInterrupt
        return encode(column, encoder, where, number)
    monkeypatch.setattr(prepare, "encode", stopped)
    for at in (("a.parquet", 5), ("b.parquet", 12), ("b.parquet", 9)):
        stop = at
        numbers.clear()
        with pytest.raises(SystemExit, match="is as it was before; the same command goes on"):
            run_prepare("a.parquet", "b.parquet", dataset="d", encoder="tiktoken")
        assert not (work / "data/d/train.bin").exists()
        numbers.clear(), capsys.readouterr()
    stop = None
    for name in ("train.bin", "train.idx", "val.bin", "val.idx"):
        with open(work / f"data/d/{name}.new", "ab") as f:
            f.write(b"written after the state was saved, before a kill")
    run_prepare("a.parquet", "b.parquet", dataset="d", encoder="tiktoken")
    assert "going on after" in capsys.readouterr().out
    assert {where for where, _ in numbers} == {"b.parquet"}         # not from the beginning
    assert numbers[0][1] > 0
    for name in NAMES[1:]:
        assert files_of(work / "data/d")[name] == files_of(work / "data/wanted")[name]
    assert sorted(files_of(work / "data/d")) == list(NAMES)


@pytest.mark.parametrize("change, words", [
    (lambda: write_parquet("a.parquet", documents(2000, seed=5)),
     "was stopped, but a.parquet changed since then; starting over"),
    (lambda: None, "was stopped, but it was of other files or with other settings; starting over"),
])
def test_what_was_stopped_does_not_go_on_with_another_input(work, monkeypatch, capsys, change,
                                                            words):
    write_parquet("a.parquet", documents(2000))
    monkeypatch.setattr(sources, "BATCH_BYTES", 20_000)
    encode, calls = prepare.encode, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(*args)
    monkeypatch.setattr(prepare, "encode", stopped)
    with pytest.raises(SystemExit):
        run_prepare("a.parquet", dataset="d", seed=1, encoder="tiktoken")
    change()
    write_splits = prepare.write_splits

    def begin(*args):               # a kill from here on must not bring the old state back
        assert not (work / "data/d/stopped.json").exists()
        return write_splits(*args)
    monkeypatch.setattr(prepare, "write_splits", begin)
    seed = 1 if "changed" in words else 2
    run_prepare("a.parquet", dataset="d", seed=seed)
    assert words in capsys.readouterr().out
    run_prepare("a.parquet", dataset="fresh", seed=seed)
    assert files_of(work / "data/d") == files_of(work / "data/fresh")


def test_killed_late_it_goes_on_and_ends_in_the_same_bytes(work):
    write_parquet("a.parquet", documents(20_000))
    script("prepare.py", "a.parquet", "--dataset=wanted", cwd=work)
    slow = ("import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "if __name__ == '__main__':\n"
            "    import prepare, sources\n"
            "    prepare.SAVE_BYTES = sources.BATCH_BYTES = 100_000\n"
            "    prepare.main(prepare.PrepareConfig(files=('a.parquet',), dataset='d', num_proc=1,"
            " encoder='tiktoken'))\n")
    process = subprocess.Popen([sys.executable, "-c", slow, str(PROJECT)], cwd=work,
                               stdout=subprocess.DEVNULL)
    state, done = work / "data/d/stopped.json", 0
    while done < 18_000:
        assert process.poll() is None, "it was through before it could be killed"
        if state.exists():
            done = sum(s["documents"] for s in json.loads(state.read_text())["splits"].values())
    process.kill()
    process.wait()
    told = script("prepare.py", "a.parquet", "--dataset=d", cwd=work).stdout
    assert int(told.split("going on after ")[1].split()[0].replace(",", "")) >= 18_000
    for name in NAMES[1:]:
        assert files_of(work / "data/d")[name] == files_of(work / "data/wanted")[name]


def hear_ctrl_c():
    """A shell starts what it puts in the background deaf to Ctrl-C, and the tests may run there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(work, *args):
    return subprocess.Popen([sys.executable, str(PROJECT / "prepare.py"), *args], cwd=work,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, preexec_fn=hear_ctrl_c)


def kill_and_rerun(work, kills, n_documents, seed=0):
    """Kill `kills` prepares that replace an older dataset; each rerun ends in the same bytes."""
    write_parquet("old.parquet", documents(60, seed=1))
    write_parquet("new.parquet", documents(n_documents, seed=2))
    new = ["new.parquet", "--dataset=d", "--num_proc=2", "--force"]
    script("prepare.py", "old.parquet", "--dataset=d", cwd=work)
    old = files_of(work / "data/d")
    began = time.time()
    script("prepare.py", *new[:1], "--dataset=reference", "--num_proc=2", cwd=work)
    duration, wanted = time.time() - began, files_of(work / "data/reference")
    rng, seen = random.Random(seed), {"old": 0, "new": 0}
    for _ in range(kills):
        script("prepare.py", "old.parquet", "--dataset=d", "--force", "--num_proc=1", cwd=work)
        process = start(work, *new)
        time.sleep(rng.uniform(0.2, 1.1) * duration)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        left = {k: v for k, v in files_of(work / "data/d").items() if k in NAMES}
        assert left in (old, wanted)                    # whole, the old or the new
        seen["old" if left == old else "new"] += 1
        script("prepare.py", *new, cwd=work)
        assert files_of(work / "data/d") == wanted
    assert not alive(work), "a worker outlived the prepare that was killed"
    return seen


def alive(work):
    """Processes that still stand in `work`."""
    time.sleep(1.0)
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += [pid] * (os.readlink(f"/proc/{pid}/cwd") == str(work)
                              and int(pid) != os.getpid())
        except OSError:
            pass
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_killed_at_any_moment_a_rerun_ends_in_the_same_bytes(work):
    kill_and_rerun(work, kills=2, n_documents=3000)


@pytest.mark.slow
def test_killed_at_20_random_moments(work):
    print(kill_and_rerun(work, kills=20, n_documents=20000))


@pytest.mark.parametrize("renamed", range(5))
def test_a_kill_between_the_renames_is_finished_by_the_next_run(work, renamed, capsys):
    write_parquet("old.parquet", documents(60, seed=1))
    write_parquet("new.parquet", documents(90, seed=2))
    run_prepare("new.parquet", dataset="wanted")
    run_prepare("old.parquet", dataset="d")
    folder = work / "data/d"
    for name in NAMES:
        (folder / f"{name}.new").write_bytes((work / "data/wanted" / name).read_bytes())
    for name in ("train.bin", "train.idx", "val.bin", "val.idx")[:renamed]:
        os.replace(folder / f"{name}.new", folder / name)
    with pytest.raises(ValueError, match="run `python prepare.py` once more"):
        Dataset(folder, "train", 16, 50304)
    run_prepare("new.parquet", dataset="d")
    assert files_of(folder) == files_of(work / "data/wanted")
    assert "finishing the prepare" in capsys.readouterr().out


def test_ctrl_c_leaves_what_was_there_and_says_so(work):
    write_parquet("a.parquet", documents(100))
    write_parquet("b.parquet", documents(10000, seed=1, longest=200) * 20)
    script("prepare.py", "a.parquet", "--dataset=d", cwd=work)
    before = files_of(work / "data/d")
    process = start(work, "b.parquet", "--dataset=d", "--force", "--num_proc=2")
    written = work / "data/d/train.bin.new"
    while not written.exists() or written.stat().st_size < 5e6:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in told, told
    assert "stopped; data/d is as it was before" in told
    left = files_of(work / "data/d")
    assert {name: left[name] for name in before} == before
    assert "the same command goes on from here" in told and "stopped.json" in left
    told = script("prepare.py", "b.parquet", "--dataset=d", "--force", cwd=work).stdout
    assert "going on after" in told and sorted(files_of(work / "data/d")) == list(NAMES)


# the sample and the download

def test_the_sample_is_pythons_documentation_in_finewebs_schema(work):
    script("prepare.py", "--sample", cwd=work)
    table = pq.read_table("data/sample/sample.parquet")
    assert table.column_names == ["text", "id", "dump", "url", "date", "file_path", "language",
                                  "language_score", "token_count"]
    assert any("Return a" in t for t in table["text"].to_pylist()[:3000])
    counted = [len(GPT2Tokenizer().encode(t)) for t in table["text"].to_pylist()]
    assert counted == table["token_count"].to_pylist() and sum(counted) > 300_000
    kept = texts(work / "data/sample", "train") + texts(work / "data/sample", "val")
    assert sorted(kept) == sorted(table["text"].to_pylist())


class Hub(http.server.BaseHTTPRequestHandler):
    """What answers for one file as the hub does: sizes and checksums by HEAD, a part of it by GET.

    `cut` are the lengths after which it breaks off its next answers.
    """
    def answer(self):
        hub = self.server
        first = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{hub.etag}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(hub.payload) - first))
        self.end_headers()
        return first

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if "/resolve/" not in self.path:
            return self.send_error(404)
        first, hub = self.answer(), self.server
        hub.served.append((self.path, first))
        self.wfile.write(hub.payload[first:][:hub.cut.pop(0) if hub.cut else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(work):
    pytest.importorskip("huggingface_hub")
    write_parquet("hub.parquet", documents(200))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.payload, server.cut, server.served = (work / "hub.parquet").read_bytes(), [], []
    server.etag = hashlib.sha256(server.payload).hexdigest()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
                  "HF_HOME": str(work / "hf"), "NO_PROXY": "127.0.0.1"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_download_goes_on_where_it_was_cut_off(work, hub):
    hub.cut = [5000, 3000]
    script("prepare.py", "--download", cwd=work, env=hub.env)
    path = "/datasets/HuggingFaceFW/fineweb/resolve/main/data/CC-MAIN-2013-20/000_00000.parquet"
    assert hub.served == [(path, 0), (path, 5000), (path, 8000)]
    assert (work / "data/fineweb_one_shard/000_00000.parquet").read_bytes() == hub.payload
    assert len(texts(work / "data/fineweb", "train") + texts(work / "data/fineweb", "val")) == 200
    assert "already here" in script("prepare.py", "--download", cwd=work, env=hub.env).stdout


def test_a_download_that_was_given_up_goes_on_in_the_next_run(work, hub):
    hub.cut = [7000, *[0] * sources.DOWNLOAD_TRIES]
    done = script("prepare.py", "--download", cwd=work, check=False,
                  env={**hub.env, "PYTHONPATH": str(write_fast_sleep(work))})
    assert done.stderr == (f"prepare.py: the download stopped at 7,000 of {len(hub.payload):,} "
                           "bytes. The same command goes on from there\n")
    script("prepare.py", "--download", cwd=work, env=hub.env)
    assert hub.served[-1][1] == 7000
    assert (work / "data/fineweb_one_shard/000_00000.parquet").read_bytes() == hub.payload


def write_fast_sleep(work):
    """A folder whose sitecustomize.py makes waiting short, for a script that waits and retries."""
    (work / "fast").mkdir()
    (work / "fast/sitecustomize.py").write_text("import time\n_s = time.sleep\n"
                                                "time.sleep = lambda s: _s(min(s, .01))\n")
    return work / "fast"


def test_a_download_with_another_checksum_is_refused(work, hub):
    hub.etag = "0" * 64
    done = script("prepare.py", "--download", cwd=work, env=hub.env, check=False)
    assert ("is not the file (its checksum differs)" in done.stderr
            and "Traceback" not in done.stderr)
    assert not list((work / "data/fineweb_one_shard").iterdir())


def test_a_hub_that_does_not_answer_is_named(work, hub):
    done = script("prepare.py", "--download", cwd=work, check=False,
                  env={**hub.env, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "the hub does not answer for http://127.0.0.1:9/datasets" in done.stderr
    assert "Traceback" not in done.stderr
