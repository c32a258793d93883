import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import prepare
from conftest import documents, run, script, write_nanogpt, write_parquet
from onecard import datafiles
from onecard.datafiles import NAMES
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT, GPT2Tokenizer


def make(*args):
    """Run prepare.py with the encoder that starts ten times as fast."""
    run(prepare, "--encoder=tiktoken", *args)


def both(folder):
    """The documents of (train, val), decoded. The files are verified as a training run does it."""
    splits = []
    for split, counts in datafiles.read_meta(folder)["splits"].items():
        tokens, starts = Path(folder, f"{split}.bin"), Path(folder, f"{split}.idx")
        datafiles.verify(tokens, counts["bin_sha256"])
        datafiles.verify(starts, counts["idx_sha256"])
        tokens, starts = np.fromfile(tokens, np.uint16), np.fromfile(starts, np.int64)
        assert starts[0] == 0 and starts[-1] == len(tokens) and max(tokens) == counts["max_token"]
        pieces = np.split(tokens, starts[1:-1])
        assert all(p[0] == END_OF_TEXT and END_OF_TEXT not in p[1:] for p in pieces)
        splits.append([GPT2Tokenizer().decode_bytes(p[1:]).decode() for p in pieces])
    return splits


def contents(folder, names=None):
    """{name of a file: its bytes}, of these names or of all."""
    return {name: Path(folder, name).read_bytes() for name in names or os.listdir(folder)}


def test_every_document_is_in_order_in_one_split_by_its_text_and_the_seed(work, capsys):
    docs = random.Random(0).sample(documents(300) * 3, 900)
    write_parquet("a.parquet", docs[:400])
    write_parquet("b.parquet", docs[400:])
    vals = []
    for seed in (1, 2):
        make("b.parquet", "a.parquet", f"--dataset={seed}", f"--seed={seed}",
            "--val_fraction=0.1")
        train, val = both(f"data/{seed}")
        assert len(train + val) == 900 and 60 < len(val) < 130
        assert train == [d for d in docs if d not in val] and val == [d for d in docs if d in val]
        assert sorted(contents(f"data/{seed}")) == sorted(NAMES)
        vals.append(val)
    assert vals[0] != vals[1]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, docs in (("train", train), ("val", val)):
        lengths = sorted(len(GPT2Tokenizer().encode(d)) + 1 for d in docs)
        n, n_tokens, n_bytes = len(docs), sum(lengths), sum(len(d.encode()) for d in docs)
        median, ninety, longest = (lengths[round((n - 1) * share)] for share in (0.5, 0.9, 1))
        assert [name, str(n), f"{n_tokens:,}", f"{n_bytes / (n_tokens - n):.2f}", str(median),
                str(ninety), str(longest)] in table


def test_the_bytes_depend_on_neither_encoder_nor_threads_nor_row_groups(work):
    docs = [*documents(800), "<|endoftext|> is text", "\x00", " ", "\r\n" * 50, "a" * 5000, "అ"]
    write_parquet("data/fineweb_one_shard/000_00000.parquet", docs)     # these two need no name
    write_parquet("data/sample/sample.parquet", docs, row_group_size=1000)
    run(prepare)
    run(prepare, "--sample", "--num_proc=1")
    make("--dataset=t", "--num_proc=2", "data/sample")
    for folder in ("data/sample", "data/t"):
        assert contents(folder, NAMES[:4]) == contents("data/fineweb", NAMES[:4])


@pytest.mark.parametrize("n, share, n_val", [(2, 0, 1), (115, 0, 12), (5, 0.99, 4),
                                             (150, 0.9, 135), (150, 1e-9, 1)])
def test_few_documents_give_exactly_their_share_to_val_for_every_seed(work, n, share, n_val):
    docs = documents(n)
    write_parquet("a.parquet", [*docs, *docs[:n // 2]])         # equal ones count once
    vals = []
    for seed in range(4):
        make("a.parquet", f"--dataset={seed}", f"--seed={seed}", f"--val_fraction={share}")
        train, val = both(f"data/{seed}")
        assert len(set(val)) == n_val and len(train + val) == n + n // 2
        assert set(train) == set(docs) - set(val)
        vals.append(frozenset(val))
    assert n == 2 or len(set(vals)) > 1


@pytest.mark.parametrize("missing", NAMES)
def test_what_is_left_of_a_dataset_is_only_replaced_by_the_same_or_by_force(work, missing):
    write_parquet("a.parquet", documents(50))
    write_parquet("b.parquet", documents(50, seed=1))
    make("a.parquet", "--dataset=d")
    whole = contents("data/d")
    Path("data/d", missing).unlink()
    left = contents("data/d")
    with pytest.raises(UserError, match="prepared from other files .* --force"):
        make("b.parquet", "--dataset=d")
    assert contents("data/d") == left
    if missing != "meta.json":
        make("a.parquet", "--dataset=d")
        assert contents("data/d") == whole


@pytest.mark.parametrize("n_different", [700, 30])
def test_the_split_does_not_depend_on_how_the_text_is_packed(work, n_different):
    docs = [f"{i % n_different}." + " The same words again." * 150 for i in range(900)]   # 3.1 MB
    write_parquet("a.parquet", docs, use_dictionary=True)       # small
    Path("b.txt").write_text("<|endoftext|>".join(docs))
    with pa.output_stream("c.json.gz") as f:
        f.write("".join(json.dumps({"text": text}) + "\n" for text in docs).encode())
    for name in ("a.parquet", "b.txt", "c.json.gz"):
        make(name, f"--dataset={name}")
        assert contents(f"data/{name}", NAMES[:4]) == contents("data/a.parquet", NAMES[:4])
    expected = n_different * 200_000 / sum(map(len, docs))
    n_val = len(set(both("data/b.txt")[1]))
    assert expected / 2 < n_val < expected * 2 and (n_different > 30 or n_val == round(expected))


def test_a_val_file_is_val_whole_and_what_is_left_out_is_counted(work, capsys):
    cannot_harm_the_terminal = "red \x1b[31m\a back\b\r\x7f \x9b2J \u202eturned 東京"
    docs, val = documents(200), [cannot_harm_the_terminal, *documents(40, 1), " man bites dog"]
    raw = [text.encode() for text in [*docs, *val[:3], " dog bites man"]]
    write_parquet("a.parquet", [*raw, b"", None, None, b"bad \xff\xfe end"], type=pa.binary())
    write_parquet("v.parquet", val)
    make("a.parquet", "--dataset=a", "--val=v.parquet")
    assert both("data/a") == [[*docs, " dog bites man", "bad \ufffd\ufffd end"], val]
    report = capsys.readouterr().out
    for reason in ("documents in both splits: 3", "documents null: 2", "documents empty: 1",
                   "characters replaced, because they were not valid UTF-8: 2"):
        assert f"\n{reason}\n" in report
    assert "val begins: red  [31m  back     2J  turned 東京\n" in report


def test_a_second_run_does_nothing_and_only_force_replaces_something_else(work, capsys):
    write_parquet("a.parquet", documents(100))
    write_parquet("b.parquet", documents(100, seed=1))
    make("a.parquet", "--dataset=a")
    write_nanogpt(work / "data/n", [1, 2, 3])
    meta = Path("data/a/meta.json")                 # another version may write other keys, too
    meta.write_text(meta.read_text().replace('"name"', '"rows": 100, "name"'))
    before = contents("data/a"), contents("data/n")
    make("a.parquet", "--dataset=a", "--encoder=auto")
    assert "already prepared" in capsys.readouterr().out
    for args in ("b.parquet --dataset=a", "a.parquet --dataset=n", "a.parquet --dataset=a --seed=5",
                 "a.parquet --dataset=a --val=b.parquet"):
        with pytest.raises(UserError, match="was prepared from other files .* --force replaces"):
            make(*args.split())
    assert (contents("data/a"), contents("data/n")) == before
    make("b.parquet", "--dataset=n", "--force")
    assert set(sum(both("data/n"), [])) == set(documents(100, seed=1))


@pytest.mark.parametrize("args, words", [
    ("", "there is no parquet file under"), ("gone.parquet", "gone.parquet does not exist"),
    ("a.parquet --val=gone.parquet", "gone.parquet does not exist"),
    ("a.parquet --text_column=body", "a.parquet has no column of text 'body'"),
    ("a.parquet", "a.parquet: different documents: 1. Train and val need one each"),
    ("empty.parquet", "empty.parquet: different documents: 0"),
    ("a.parquet --val=empty.parquet", "no document is left for val"),
    ("a.parquet --val=a.parquet", "no document is left for train"),
    ("noise.txt", "noise.txt is no text in UTF-8"),
    ("a.parquet --sample", "each bring the text"), ("--download --sample", "each bring the text"),
    ("a.parquet --val_fraction=1", "val_fraction = 1.0 must be from 0 to 0.99999"),
    ("a.parquet --val=a.parquet --val_fraction=0.1", "draws it; set one"),
    ("a.parquet --encoder=fast", "encoder = 'fast'; use auto or gigatoken or tiktoken"),
    *[(f"a.parquet --dataset={name}", f"dataset = '{name}' must be a name without / or ..")
      for name in ("../a", "data/a", "..", ".")]])
def test_a_mistake_is_one_sentence_and_leaves_nothing(work, args, words):
    write_parquet("a.parquet", ["y", "y"])
    write_parquet("empty.parquet", ["", None])
    Path("noise.txt").write_bytes(random.Random(0).randbytes(9999))
    before = sorted(work.rglob("*"))
    with pytest.raises(UserError) as error:
        make(*args.split())
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(path for path in work.rglob("*") if path != work / "data") == before


def test_an_empty_folder_of_the_user_stays_and_a_name_that_is_taken_is_one_sentence(work):
    Path("data/d").mkdir(parents=True)
    Path("data/f").write_text("a file")
    for name, words in (("d", "gone.parquet does not exist"), ("f", "data/f cannot be prepared")):
        with pytest.raises(UserError, match=words):
            make("gone.parquet", f"--dataset={name}")
    assert Path("data/d").is_dir() and Path("data/f").read_text() == "a file"


def test_of_two_processes_one_writes_a_dataset_and_the_other_gets_one_sentence(work):
    write_parquet("old.parquet", documents(60, seed=1))
    write_parquet("new.parquet", documents(90, seed=2))
    make("new.parquet", "--dataset=d")
    new = contents("data/d")
    make("old.parquet", "--dataset=d", "--force")
    with datafiles.locked(Path("data/d")):
        for name in NAMES:
            Path(f"data/d/{name}.new").write_text("not whole")  # as if this process were renaming
        done = script("prepare.py", "new.parquet", "--dataset=d", "--force", check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "another process is preparing a dataset in" in done.stderr
        os.remove("data/d/meta.json.new")
    make("new.parquet", "--dataset=d", "--force")
    assert contents("data/d") == new


def test_a_full_disk_is_one_sentence_and_what_was_there_stays(work):
    write_parquet("a.parquet", documents(100))
    write_parquet("b.parquet", documents(3000))
    make("a.parquet", "--dataset=d")
    before = contents("data/d")
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="data/d cannot be prepared .*too large.*Make room"):
            make("b.parquet", "--dataset=d", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert contents("data/d") == before


def test_stopped_at_random_moments_it_leaves_the_old_dataset_or_the_new_one(work):
    write_parquet("old.parquet", documents(60, seed=1))
    write_parquet("new.parquet", documents(1000, seed=2))
    new = ["new.parquet", "--dataset=d", "--force"]

    def child():
        signal.signal(signal.SIGINT, signal.default_int_handler)    # as in a terminal
        make(*new)

    make(*new)
    began = time.monotonic()
    make(*new)
    duration = time.monotonic() - began
    wanted, rng = contents("data/d"), random.Random(0)
    for number in [signal.SIGKILL, signal.SIGINT] * 6:
        make("old.parquet", "--dataset=d", "--force")
        old = contents("data/d")
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        time.sleep(rng.uniform(0, 1.2) * duration)
        os.kill(process.pid, number)
        process.join()
        with datafiles.locked(Path("data/d")):
            pass
        both("data/d")
        assert contents("data/d", NAMES) in (old, wanted)
        make(*new)              # stray files confuse nothing
        assert contents("data/d") == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_between_the_renames_is_finished_by_the_next_start(work, name):
    write_parquet("old.parquet", documents(60, seed=1))
    write_parquet("new.parquet", documents(90, seed=2))
    make("new.parquet", "--dataset=wanted")
    make("old.parquet", "--dataset=d")
    os.remove(f"data/d/{name}")
    os.mkdir(f"data/d/{name}")          # to a folder nothing is renamed
    with pytest.raises(UserError, match=f"data/d cannot be prepared .*{name}"):
        make("new.parquet", "--dataset=d", "--force")
    with pytest.raises(UserError, match="`python prepare.py --dataset=d` finishes that"):
        datafiles.read_meta("data/d")
    os.rmdir(f"data/d/{name}")
    make("new.parquet", "--dataset=d")
    assert contents("data/d") == contents("data/wanted")
