import json

import numpy as np
import pytest
import torch

import loader
from conftest import write_nanogpt
from loader import END_OF_TEXT, Dataset


def make(folder, lengths, seed=0):
    """A nanoGPT folder whose documents have these lengths (with their 50256); no token repeats."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    ids[np.cumsum([0, *lengths[:-1]])] = END_OF_TEXT
    write_nanogpt(folder, ids)
    return ids


def naive_epoch(data, epoch):
    """The stream of an epoch by the letter: documents in order, end to end, entered somewhere."""
    order, _, entry = data._epoch(epoch)
    stream = np.concatenate([data.tokens[int(data.starts[d]):int(data.starts[d + 1])]
                             for d in order])
    return np.roll(stream, -entry)


@pytest.mark.parametrize("lengths, block_size", [
    ([7, 1, 30, 2, 2, 50, 11], 8), ([100], 7), ([1] * 40, 4), ([5, 5], 9), ([300, 2, 3, 290], 64),
    (list(range(1, 40)), 16)])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_token_is_a_target_once_an_epoch(work, lengths, block_size, epoch):
    ids = make(work / "d", lengths)
    data = Dataset(work / "d", "train", block_size, 50304, seed=3)
    windows = [data.sample(i) for i in range(epoch * data.n_windows, (epoch + 1) * data.n_windows)]
    targets = np.concatenate([w[1:] for w in windows])
    # the token that the ring is entered at, and the tail that fills no window, are all that is
    # missing
    assert len(targets) == data.n_windows * block_size and len(ids) - len(targets) <= block_size
    stream = naive_epoch(data, epoch)
    assert sorted(targets.tolist()) == sorted(stream[1:1 + len(targets)].tolist())
    # and each window is a piece of that stream, the next one beginning with the last token of the
    # one before
    cut = [stream[k * block_size:(k + 1) * block_size + 1].tolist() for k in range(data.n_windows)]
    assert sorted(cut) == sorted(w.tolist() for w in windows)


def test_epochs_differ_in_order_and_neighbours_and_seeds_too(work):
    make(work / "d", [9] * 60)
    data = [Dataset(work / "d", "train", 16, 50304, seed) for seed in (1, 2)]
    n = data[0].n_windows
    epochs = [[d.sample(e * n + k).tolist() for k in range(n)] for d in data for e in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert epochs[i] != epochs[j]
            assert not set(map(tuple, epochs[i])) >= set(map(tuple, epochs[j]))


def test_neighbouring_samples_come_from_places_far_apart(work):
    make(work / "d", [2000])
    data = Dataset(work / "d", "train", 10, 50304)
    places = [int(data.sample(i)[1]) for i in range(8)]
    assert min(abs(a - b) for a in places for b in places if a != b) > 60


def test_a_sample_depends_on_seed_and_number_only(work):
    make(work / "d", [13, 40, 8, 99])
    a, b = (Dataset(work / "d", "train", 8, 50304, seed=7) for _ in range(2))
    numbers = list(range(3 * a.n_windows))
    forward = {i: a.sample(i).tolist() for i in numbers}
    b.fixed_batch(0, 4, 4)
    assert all(b.sample(i).tolist() == forward[i] for i in reversed(numbers))


def test_the_order_does_not_depend_on_how_a_step_is_split(work):
    make(work / "d", [50, 60, 70])
    data = Dataset(work / "d", "train", 8, 50304)
    whole, _ = data.training_batch(24, 12)
    parts = torch.cat([data.training_batch(24 + 3 * k, 3)[0] for k in range(4)])
    assert torch.equal(whole, parts)


def test_targets_are_the_next_tokens(work):
    make(work / "d", [50, 60, 70])
    idx, targets = Dataset(work / "d", "train", 8, 50304).training_batch(0, 5)
    assert idx.shape == targets.shape == (5, 8) and idx.dtype == targets.dtype == torch.int64
    assert torch.equal(idx[:, 1:], targets[:, :-1])


def test_fixed_windows_are_the_file_from_first_to_last(work):
    ids = make(work / "d", [50, 31])
    data = Dataset(work / "d", "val", 8, 50304)
    assert data.n_windows == 10
    idx, targets = data.fixed_batch(0, 10, 10)
    assert np.array_equal(idx.flatten(), ids[:80]) and np.array_equal(targets.flatten(), ids[1:81])
    # a last batch keeps its shape and counts nothing twice
    _, padded = data.fixed_batch(8, 4, 10)
    assert np.array_equal(padded[:2].flatten(), ids[65:81]) and (padded[2:] == -1).all()


def test_documents_of_a_folder_without_index_lie_between_end_of_text_tokens(work, monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 7)         # so that documents cross what is read at a time
    make(work / "d", [5, 1, 20, 3])
    data = Dataset(work / "d", "train", 4, 50304)
    assert np.diff(data.starts).tolist() == [5, 1, 20, 3]
    # nanoGPT's puts it behind
    write_nanogpt(work / "openwebtext", [1, 2, END_OF_TEXT, 3, 4, 5, END_OF_TEXT])
    assert np.diff(Dataset(work / "openwebtext", "train", 4, 50304).starts).tolist() == [2, 4, 1]
    write_nanogpt(work / "characters", np.arange(64))
    assert Dataset(work / "characters", "train", 4, 65).n_documents == 1


def test_prepared_and_scanned_folders_are_read_alike(tiny):
    prepared = Dataset(tiny / "data" / "tiny", "train", 32, 50304, seed=5)
    bare = write_nanogpt(tiny / "bare", np.fromfile(tiny / "data/tiny/train.bin", np.uint16))
    scanned = Dataset(bare, "train", 32, 50304, seed=5)
    assert np.array_equal(prepared.starts, scanned.starts)
    assert prepared.fingerprint == scanned.fingerprint
    assert np.array_equal(prepared.sample(11), scanned.sample(11))


def test_batches_are_read_ahead_in_order(work):
    seen = []
    read = lambda place: (seen.append(place), (torch.tensor([place]),))[1]      # noqa: E731
    got = loader.ahead(read, range(5), torch.device("cpu"))
    assert next(got)[0].item() == 0
    assert seen == [0, 1] or seen == [0]    # the second was asked for before the first was used
    assert [t.item() for (t,) in got] == [1, 2, 3, 4] and seen == [0, 1, 2, 3, 4]


def test_an_error_while_reading_ahead_reaches_the_caller():
    def read(place):
        raise OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader.ahead(read, range(3), torch.device("cpu")))


def refused(words, *args, kind=ValueError):
    with pytest.raises(kind) as error:
        Dataset(*args)
    assert words in str(error.value), str(error.value)


def copy_of(tiny, change):
    """data/tiny, copied, with `change(folder)` made to it."""
    folder = tiny / "copy"
    folder.mkdir()
    for f in (tiny / "data" / "tiny").iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    change(folder)
    return folder


def test_a_dataset_that_is_not_prepared(work):
    refused("run `python prepare.py`", work / "none", "train", 8, 50304, kind=FileNotFoundError)


@pytest.mark.parametrize("change, words", [
    (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes()[:-200]),
     "bytes where meta.json says"),
    (lambda d: (d / "train.bin").write_bytes(bytes(len((d / "train.bin").read_bytes()))),
     "its checksum is not the one"),
    (lambda d: (d / "train.idx").write_bytes(bytes(len((d / "train.idx").read_bytes()))),
     "its checksum is not the one"),
    (lambda d: (d / "train.bin").write_bytes(b"abc"), "odd number of bytes"),
    (lambda d: (d / "train.bin").write_bytes(b""), "train.bin is empty"),
    (lambda d: (d / "meta.json").write_text("{"), "is not JSON"),
    (lambda d: (d / "meta.json").write_text(json.dumps({"format": 99})),
     "has format 99, this version reads 1"),
    (lambda d: (d / "meta.json.new").write_text("{}"), "run `python prepare.py` once more"),
])
def test_files_that_disagree_are_refused(tiny, change, words):
    refused(words, copy_of(tiny, change), "train", 8, 50304)


def test_a_missing_index_is_refused(tiny):
    folder = copy_of(tiny, lambda d: (d / "train.idx").unlink())
    refused("train.idx does not exist, but meta.json lists it",
            folder, "train", 8, 50304, kind=FileNotFoundError)


def test_fewer_tokens_than_a_window_are_refused(work):
    make(work / "d", [8])
    refused("fewer than one window of block_size + 1 = 9. Nearest that works: --block_size=7",
            work / "d", "train", 8, 50304)


def test_ids_beyond_the_models_vocabulary_are_refused(work):
    write_nanogpt(work / "d", np.arange(200))
    refused("holds token 199, but the model has vocab_size = 100; --vocab_size=256",
            work / "d", "train", 8, 100)
