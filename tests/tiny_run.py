"""A run of train.py that takes a tenth of a second, and what it leaves behind."""
import fcntl
import os
import signal
import subprocess
import sys
import termios
import traceback
from pathlib import Path

import torch

import train
from conftest import restoring
from onecard import checkpoint, runlog
from onecard.runlog import read_log
from onecard.settings import configure_and_run
from train import TrainConfig

TINY = dict(dataset="letters", vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32,
            batch_size=4, gradient_accumulation_steps=2, max_iters=12, lr_decay_iters=12,
            warmup_iters=2, learning_rate=1e-2, min_lr=1e-3, eval_interval=6, eval_iters=3,
            device="cpu", dtype="float32", compile=False)
MODERN = dict(position="rotary", norm="rmsnorm", qk_norm=True, mlp="swiglu", bias=False,
              tie_word_embeddings=False, embed_norm=True, zero_init=True)
MUON = dict(**MODERN, optimizer="muon", lr_schedule="wsd", cooldown=0.5, learning_rate=0.02,
            min_lr=0.0, embedding_lr=0.05, momentum_warmup=4)


def run_tiny(**settings):
    """Train in this process."""
    matplotlib = sys.modules.get("matplotlib")
    sys.modules["matplotlib"] = None        # not installed: a picture takes as long as ten runs
    try:
        with restoring():
            train.main(TrainConfig(**{**TINY, **settings}))
    finally:
        del sys.modules["matplotlib"]
        if matplotlib:
            sys.modules["matplotlib"] = matplotlib


def run_steps(n, **settings):
    """Train n steps of a longer run, and stop after each, as max_hours does."""
    for step in range(n):
        init_from = "resume" if step else "scratch"
        run_tiny(**{"init_from": init_from, "max_hours": 1e-9, **settings})
        assert saved(out_dir=settings.get("out_dir", "out"))["iter_num"] == step + 1


def arguments(**settings):
    return [f"--{key}={value}" for key, value in {**TINY, **settings}.items()]


def start(folder, env=None, terminal=None, **settings):
    """Start train.py as a process of its own that prints a line for every step at once.

    It is a copy of this process, which has imported everything: that saves four seconds. Popen
    calls main() in the copy, and instead of the program that it would start then, the copy ends.
    With a file descriptor `terminal`, it prints there, and ends when that closes.
    """
    def main():
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)    # also where nohup runs the tests
        os.closerange(3, 1000)              # Popen waits until one of these is closed
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        os.environ.update(env or {})
        sys.argv = ["train.py", *arguments(**settings)]
        sys.modules["matplotlib"] = None    # not installed: see run_tiny
        runlog.SECONDS_BETWEEN_LINES = 0
        code = 0
        try:
            configure_and_run(train.main, TrainConfig, train.__doc__)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)

    return subprocess.Popen(["train.py"], cwd=folder, stdin=terminal,
                            stdout=terminal or subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, preexec_fn=main, start_new_session=bool(terminal),
                            restore_signals=False)      # as in any other Python


def wait_for(process, words):
    """Read what a process prints until `words` come."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without {words!r}")


def kill(process):
    process.kill()
    process.communicate()


def log(out_dir="out"):
    """The numbers of log.jsonl that do not depend on the clock, {(step, name): value}."""
    names = ("train_loss", "val_loss", "lr", "grad_norm", "tokens", "epoch")
    numbers = {}
    for entry in read_log(Path(out_dir, "log.jsonl")):
        for name in names:
            if name in entry:
                assert (entry["step"], name) not in numbers, "logged twice"
                numbers[entry["step"], name] = entry[name]
    return numbers


def contents(folder):
    """{name of a file: its bytes}."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def saved(name="ckpt.pt", out_dir="out"):
    return checkpoint.load(Path(out_dir, name))


def weights(out_dir="out"):
    return saved(out_dir=out_dir)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_run(a, b):
    """Whether two runs have the same losses and ended with the same weights, bit for bit."""
    return log(a) == log(b) and same(weights(a), weights(b))
