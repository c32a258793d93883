"""What the tests share: a folder to work in, documents, parquet files, small datasets, scripts."""
import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from onecard import files
from onecard.settings import configure

PROJECT = Path(__file__).resolve().parent.parent
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")       # the models are tiny; more threads only wait
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")     # other tests have the other cores

WORDS = (
    "the of and a to in is that it was for on are as with his they at be this from have or by "
    "one had\nnot but what all were when we there can an your which their said if do will each "
    "about how up out them then\nshe many some so these would other into has more her two like "
    "him see time could no make than first been its\nnaïve Zürich 東京 Привет 🙂 don't we'll "
    "3.14 1,024 <|endoftext|> \n \n\n \t"
).split(" ")


def documents(n, seed=0, longest=120):
    """`n` different documents of words in several scripts."""
    rng = random.Random(seed)
    return [f"Document {seed}-{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
            for i in range(n)]


def write_parquet(path, texts, column="text", **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kind = options.pop("type", pa.string())
    table = pa.table({column: pa.array(texts, type=kind), "id": list(range(len(texts)))})
    pq.write_table(table, path, **{"row_group_size": 100, **options})
    return Path(path)


def write_nanogpt(folder, train, val=None):
    """A dataset as nanoGPT's scripts leave it: uint16 ids and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(train, np.uint16).tofile(folder / "train.bin")
    np.asarray(train if val is None else val, np.uint16).tofile(folder / "val.bin")
    return folder


def script(name, *args, cwd=None, check=True, env=None):
    """Run a script of the project in `cwd` as a user does; returns the finished process."""
    command = [sys.executable, str(PROJECT / name), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True,
                          env={**os.environ, **(env or {})})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run(module, *args):
    """Run the main() of a script in this process: the same, without seconds of imports."""
    cls = next(value for name, value in vars(module).items()
               if name.endswith("Config") and value.__module__ == module.__name__)
    return module.main(configure(cls, [str(argument) for argument in args]))


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def restoring():
    """Afterwards, signals, garbage collection and locks are as before a run of train.py."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        for folder in list(files.LOCKS):
            files.unlock(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with data/tiny/, prepared by prepare.py from 300 documents."""
    where = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(where)
        write_parquet("tiny.parquet", documents(300))
        run(prepare, "tiny.parquet", "--dataset=tiny", "--encoder=tiktoken")
    return where


@pytest.fixture
def tiny(work, prepared):
    """Stand in a folder with data/tiny/ and data/letters/, 5,000 learnable ids below 64."""
    (work / "data").mkdir()
    (work / "data" / "tiny").symlink_to(prepared / "data" / "tiny")
    steps = np.random.default_rng(0).integers(1, 4, 5000)
    write_nanogpt(work / "data" / "letters", np.cumsum(steps) % 64, np.cumsum(steps[::-1]) % 64)
    return work
