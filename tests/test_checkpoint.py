import os
import resource
import time
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from onecard import checkpoint
from onecard.settings import UserError

SHAPE = dict(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, dropout=0.1, bias=False)


def parts(seed=0, **more):
    torch.manual_seed(seed)
    return {"model": GPT(GPTConfig(**SHAPE)).state_dict(), "model_args": dict(SHAPE),
            "iter_num": 7, **more}


def head(name):
    return checkpoint.load(name)["model"]["lm_head.weight"]


def test_what_is_saved_comes_back(work):
    checkpoint.save("ckpt.pt", parts())
    model = GPT.from_checkpoint(checkpoint.load("ckpt.pt"))
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), parts()["model"].values(), strict=True))
    assert os.listdir() == ["ckpt.pt"]


def test_a_save_that_the_disk_has_no_room_for_leaves_the_old_file(work):
    checkpoint.save("ckpt.pt", parts())
    before = Path("ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not write ckpt.pt \(.* GiB free\).*"
                                            "What was there before is unchanged"):
            checkpoint.save("ckpt.pt", parts(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir() == ["ckpt.pt"] and Path("ckpt.pt").read_bytes() == before


def test_a_file_that_is_held_open_elsewhere_is_tried_again(work, monkeypatch):
    checkpoint.save("ckpt.pt", parts())
    real, refusals = os.replace, [PermissionError(), PermissionError()]

    def replace(a, b):
        if refusals:
            raise refusals.pop()
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save("ckpt.pt", parts(1))
    assert torch.equal(head("ckpt.pt"), parts(1)["model"]["lm_head.weight"])


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_stays_when_the_newest_is_replaced(work, monkeypatch, links):
    if not links:
        def no_link(a, b):
            raise OSError("no links on this disk")
        monkeypatch.setattr(os, "link", no_link)
    checkpoint.save("ckpt.pt", parts(1))
    checkpoint.copy("ckpt.pt", "best.pt")
    checkpoint.save("ckpt.pt", parts(2))
    assert torch.equal(head("best.pt"), parts(1)["model"]["lm_head.weight"])
    assert torch.equal(head("ckpt.pt"), parts(2)["model"]["lm_head.weight"])


@pytest.mark.parametrize("content, words", [
    (None, "ckpt.pt does not exist"),
    (b"", "not a checkpoint that can be read"),
    (b"junk" * 1000, "not a checkpoint that can be read"),
    ({"weights": 1}, "it has no model, model_args, iter_num"),
    ([1, 2], "it has no model, model_args, iter_num"),
])
def test_what_is_no_checkpoint_is_named(work, content, words):
    if isinstance(content, bytes):
        Path("ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, "ckpt.pt")
    with pytest.raises(UserError) as error:
        checkpoint.load("ckpt.pt")
    assert words in str(error.value)


def test_code_in_a_checkpoint_is_not_run(work):
    class Evil:
        def __reduce__(self):
            return (open, ("pwned", "w"))
    torch.save({**parts(), "config": Evil()}, "ckpt.pt")
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        checkpoint.load("ckpt.pt")
    assert not Path("pwned").exists()


def test_the_newest_run_is_found(work):
    assert checkpoint.newest_run() is None
    for name in ("out-b", "out-a", "out/run"):
        (work / name).mkdir(parents=True)
        checkpoint.save(work / name / "ckpt.pt", parts())
        os.utime(work / name / "ckpt.pt", (time.time() - 60, time.time() - 60))
    (work / "out-later-but-empty").mkdir()
    os.utime(work / "out-a/ckpt.pt")
    assert checkpoint.newest_run() == checkpoint.run_folder() == Path("out-a")
    checkpoint.copy("out/run/ckpt.pt", "out/run/best.pt")
    os.utime(work / "out/run/best.pt", (time.time() + 60, time.time() + 60))
    assert checkpoint.newest_run() == Path("out/run")
    assert checkpoint.in_folder("out/run").name == "best.pt"
    assert checkpoint.in_folder("out-a").name == "ckpt.pt"
    with pytest.raises(UserError, match="out-later-but-empty holds no ckpt.pt or best.pt"):
        checkpoint.run_folder("out-later-but-empty")
