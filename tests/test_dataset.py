import json
import math
import shutil
import threading
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import documents, write_nanogpt, write_parquet
from onecard import dataset
from onecard.dataset import Batches, Dataset, ensure_prepared, fixed_batches, known_tokens
from onecard.runtime import World
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT

CPU = torch.device("cpu")


def make(work, lengths, block_size=8, seed=0):
    """A Dataset whose documents have these lengths (with their 50256); no token comes twice."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    ids[np.cumsum([0, *lengths[:-1]])] = END_OF_TEXT
    return Dataset(write_nanogpt(work / "d", ids), "train", block_size, seed)


def naive_samples(data, lengths, epoch):
    """The windows of an epoch, in the order in which they train."""
    rng, size = np.random.default_rng([data.seed, epoch]), data.block_size
    pieces = np.split(data.tokens, np.cumsum(lengths)[:-1])
    stream = np.concatenate([pieces[d] for d in rng.permutation(len(pieces))])
    stream = np.roll(stream, -rng.integers(len(stream)))
    windows = [stream[k:k + size + 1] for k in range(0, len(stream) - size, size)]
    n = len(windows)
    stride = next(s for s in range(int(n * 0.618) or 1, n + 1) if math.gcd(s, n) == 1)
    return [windows[k * stride % n] for k in range(n)]


@pytest.mark.parametrize("lengths, block_size", [
    ([7, 1, 30, 2, 2, 50, 11], 8), ([100], 7), ([1] * 40, 4), ([5, 5], 9), ([300, 2, 290], 64)])
def test_an_epoch_is_every_window_of_the_shuffled_documents_once(work, lengths, block_size):
    for seed in (3, 4):
        data = make(work, lengths, block_size, seed)
        n = data.n_windows
        for epoch in (5, 0, 1):                     # samples can be read in any order
            samples = [data.sample(i) for i in reversed(range(epoch * n, (epoch + 1) * n))][::-1]
            assert np.array_equal(samples, naive_samples(data, lengths, epoch))


def batches_of(data, size, per_step=12, rank=0, ranks=1):
    settings = SimpleNamespace(batch_size=size, windows_per_step=per_step)
    return Batches(data, settings, World(CPU, rank=rank, size=ranks))


def step_of(data, step):            # its 12 samples as (idx, targets)
    ids = np.array([data.sample(i) for i in range(12 * step, 12 * step + 12)], np.int64)
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])


@pytest.mark.parametrize("size, ranks", [(12, 1), (4, 1), (2, 3), (1, 4)])
def test_the_order_depends_neither_on_batch_size_nor_on_ranks(work, size, ranks):
    data = make(work, [50, 60, 70])
    all_ranks = [batches_of(data, size, 12, rank, ranks) for rank in range(ranks)]
    for step in range(5):                           # crosses the border of an epoch
        batches = list(chain(*zip(*[rank.of_step(step) for rank in all_ranks], strict=True)))
        assert len(batches) == ranks * all_ranks[0].per_step == 12 // size
        for i, expected in enumerate(step_of(data, step)):
            assert torch.equal(torch.cat([batch[i] for batch in batches]), expected)


def test_a_resumed_interrupted_or_halved_step_is_the_same_step(work):
    data = make(work, [50, 60, 70])
    batches = batches_of(data, 12)
    for step, size in ((7, 12), (7, 6), (8, 3), (8, 1), (2, 1)):
        next(batches.of_step(step))                 # and then it is interrupted
        if size < batches.size:
            batches.halve()                         # to the largest divisor up to a half
        assert (batches.size, batches.per_step) == (size, 12 // size)
        idx = torch.cat([idx for idx, _ in batches.of_step(step)])
        assert torch.equal(idx, step_of(data, step)[0])
    for unable in (batches, batches_of(data, 6, ranks=2)):
        with pytest.raises(UserError, match="[16] windows at a time, cpu. A smaller block_size"):
            unable.halve()


def test_the_next_step_is_read_ahead_and_its_errors_reach_the_caller():
    samples, reached, threads = [], threading.Event(), set(threading.enumerate())

    def sample(i):
        samples.append(i)
        if i == 11:
            reached.set()
            raise OSError("the disk is gone")
        return np.array([i, i + 1], np.uint16)

    batches = batches_of(SimpleNamespace(sample=sample), 2, per_step=8, rank=1, ranks=2)
    assert [idx.flatten().tolist() for idx, _ in batches.of_step(0)] == [[2, 3], [6, 7]]
    assert reached.wait(10)                         # nobody wanted step 1 yet
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches.of_step(1))
    batches.close()
    assert samples == [2, 3, 6, 7, 10, 11] and set(threading.enumerate()) <= threads


@pytest.mark.parametrize("n_windows, size, ranks", [(10, 4, 1), (7, 3, 2), (1, 4, 3)])
def test_fixed_batches_are_the_file_from_first_to_last(work, n_windows, size, ranks):
    data, threads = make(work, [50, 31]), set(threading.enumerate())        # 10 windows
    by_rank = [fixed_batches(data, n_windows, size, World(CPU, rank=rank, size=ranks))
               for rank in range(ranks)]
    batches = list(chain(*zip(*by_rank, strict=True)))
    assert set(threading.enumerate()) <= threads
    assert all(idx.shape == targets.shape == (size, 8) for idx, targets, _ in batches)
    assert all((targets[n:] == -1).all() for _, targets, n in batches)
    ids = data.tokens[:8 * n_windows + 1]
    assert np.array_equal(torch.cat([idx[:n].flatten() for idx, _, n in batches]), ids[:-1])
    assert np.array_equal(torch.cat([t[:n].flatten() for _, t, n in batches]), ids[1:])


def test_a_folder_reads_the_same_without_its_index(tiny, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 50)               # tokens that are searched at a time
    write_nanogpt(tiny / "bare", np.fromfile("data/tiny/train.bin", np.uint16))
    prepared, bare = (Dataset(folder, "train", 32, seed=5) for folder in ("data/tiny", "bare"))
    for name in ("fingerprint", "n_tokens", "n_documents", "n_windows", "max_token"):
        assert getattr(prepared, name) == getattr(bare, name)
    assert np.array_equal(prepared.sample(11), bare.sample(11))
    assert prepared.sample(0).dtype == prepared.window(0).dtype == np.uint16
    ids = np.array([1, 2, END_OF_TEXT, 3, 4, END_OF_TEXT])  # nanoGPT's are behind the documents
    assert dataset.find_documents(ids)[0].tolist() == [0, 2, 5, 6]


def llm_c(magic):
    """The header of a file of llm.c."""
    return np.array([magic, 1, 100, *[0] * 253], np.int32).tobytes()


def wide(content, dtype):
    return np.frombuffer(content, np.uint16).astype(dtype).tobytes()


@pytest.mark.parametrize("name, new_bytes, words", [
    ("tiny/train.bin", lambda old: old[2:], "train.bin is not the file that prepare.py"),
    ("tiny/train.idx", lambda old: bytes(len(old)), "train.idx is not the file that prepare.py"),
    ("tiny/meta.json", lambda old: b"{", "meta.json is damaged"),
    ("letters/train.bin", lambda old: old[:16], "8 tokens, fewer than .* block_size . 1 = 9"),
    ("letters/train.bin", lambda old: old + b"c\0", "token 99, .* it needs --vocab_size=100"),
    ("letters/train.bin", lambda old: llm_c(20240520) + old,
     "train.bin begins with the 1,024 bytes of llm.c's header.* `tail -c .1025 .*train.bin > NEW`"),
    ("letters/train.bin", lambda old: llm_c(20240801) + old, "holds ids of 4 bytes or more"),
    ("letters/train.bin", lambda old: wide(old, np.int64), "holds ids of 4 bytes or more"),
    ("letters/train.bin", lambda old: wide(old[:18], np.int32), "holds ids of 4 bytes or more")])
def test_files_that_cannot_train_are_refused(tiny, name, new_bytes, words):
    shutil.copytree("data", "copy")
    path = tiny / "copy" / name
    path.write_bytes(new_bytes(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        Dataset(path.parent, "train", 8).check_vocabulary(99)


def test_a_dataset_that_the_first_version_prepared_is_read(tiny):
    shutil.copytree("data/tiny", "data/old")
    meta = json.loads(Path("data/old/meta.json").read_text())
    meta |= {"tokenizer": {"name": "gpt2", "sha256": "306c", "n_vocab": 50257},
             "part": None, "near_duplicates": None, "token_count_column": 9}
    Path("data/old/meta.json").write_text(json.dumps(meta))
    old, new = (Dataset(f"data/{name}", "val", 8) for name in ("old", "tiny"))
    assert np.array_equal(old.sample(3), new.sample(3))


def test_what_is_known_of_a_dataset_is_what_its_files_say(tiny):
    for name in ("tiny", "letters"):
        train, val = (Dataset(f"data/{name}", split, 8) for split in ("train", "val"))
        known = known_tokens(name)
        assert (known.train, known.val) == (train.n_tokens, val.n_tokens)
    write_parquet("data/mine/a.parquet", ["one", "two"])
    (tiny / "data/counted").mkdir()
    pq.write_table(pa.table({"token_count": [600, 398]}), "data/counted/a.parquet")
    assert known_tokens("none") is known_tokens("mine") is None
    known = known_tokens("counted")             # with a 50256 for each; val is a tenth of so few
    assert (known.train, known.val) == (900, 100) and "counted/a.parquet" in known.source
    assert known_tokens("mine", 1_000_000_000).val == 5_000_000


def test_a_dataset_that_is_missing_is_prepared_from_its_parquet(work, capfd):
    write_parquet("data/mine/a.parquet", [""])
    with pytest.raises(SystemExit, match="1"):              # no text
        ensure_prepared("mine", World(CPU))
    assert "`python prepare.py data/mine/a.parquet --dataset=mine`" in capfd.readouterr().out
    write_parquet("data/mine/a.parquet", documents(60))
    ensure_prepared("mine", World(CPU))
    assert sum(Dataset("data/mine", split, 8).n_documents for split in ("train", "val")) == 60


def test_ids_that_only_look_like_another_format_are_read(tiny):
    steps = np.random.default_rng(0).integers(1, 60, 200)
    steps[1::2] = 0
    for name, ids in (("zeros", steps * 0), ("one", [*steps, 5, 5]), ("odd", np.roll(steps, 1))):
        assert Dataset(write_nanogpt(tiny / name, ids), "train", 8).n_tokens == len(ids)


def test_a_dataset_may_be_the_path_of_a_prepared_folder(tiny, capfd):
    (tiny / "data/letters").rename("elsewhere")
    for name in ("elsewhere", str(tiny / "elsewhere"), "../" + tiny.name + "/elsewhere"):
        ensure_prepared(name, World(CPU))               # there is nothing to do
        assert known_tokens(name).train == known_tokens(name).val == 5000
    for name in (str(tiny / "gone"), "../gone", ""):
        with pytest.raises(UserError, match="must be a name under data/, or the path of a folder"):
            ensure_prepared(name, World(CPU))
    assert capfd.readouterr() == ("", "")
