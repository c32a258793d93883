"""What the tests share: a folder to work in, documents, parquet files, small datasets, scripts."""
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
    pq.write_table(pa.table({column: pa.array(texts, type=kind), "id": list(range(len(texts)))}),
                   path, **{"row_group_size": 100, **options})
    return Path(path)


def write_nanogpt(folder, train, val=None):
    """A dataset as nanoGPT's scripts leave it: uint16 ids and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(train, np.uint16).tofile(folder / "train.bin")
    np.asarray(train if val is None else val, np.uint16).tofile(folder / "val.bin")
    return folder


def script(name, *args, cwd, check=True, env=None, **options):
    """Run a script of the project in `cwd` as a user does; returns the finished process.

    Where it can, in a fork of a process that has loaded torch already, which takes longer than most
    of what is tested; not with `options` of subprocess.run, nor prepare.py, which does not load it.
    """
    command = [str(PROJECT / name), *map(str, args)]
    env = {**os.environ, **(env or {})}
    if options or name == "prepare.py" \
            or "forkserver" not in multiprocessing.get_all_start_methods():
        done = subprocess.run([sys.executable, *command], cwd=cwd, text=True, capture_output=True,
                              env=env, **options)
    else:
        done = forked(command, cwd, env)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def forked(command, cwd, env):
    """What subprocess.run gives for a script of Python, from the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "pyarrow.parquet", "tiktoken", "tqdm",
                                    "matplotlib.figure"])
    with tempfile.TemporaryDirectory() as told:
        process = context.Process(target=as_main, args=(command, str(cwd), env, told))
        process.start()
        process.join()
        out, err = (Path(told, name).read_text(encoding="utf-8") for name in ("1", "2"))
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def as_main(command, cwd, env, told):
    """Become the script `command`; what it prints goes into the files 1 and 2 in `told`."""
    for descriptor in (1, 2):
        os.dup2(os.open(Path(told, str(descriptor)), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = command, str(PROJECT)
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with data/tiny/, prepared by prepare.py from 300 documents."""
    where = tmp_path_factory.mktemp("prepared")
    write_parquet(where / "tiny.parquet", documents(300))
    script("prepare.py", "tiny.parquet", "--dataset=tiny", "--num_proc=1", cwd=where)
    return where


@pytest.fixture
def tiny(work, prepared):
    """Stand in a folder with data/tiny/ and data/letters/, 5,000 learnable ids below 64."""
    (work / "data").mkdir()
    (work / "data" / "tiny").symlink_to(prepared / "data" / "tiny")
    steps = np.random.default_rng(0).integers(1, 4, 5000)
    write_nanogpt(work / "data" / "letters", np.cumsum(steps) % 64, np.cumsum(steps[::-1]) % 64)
    return work
