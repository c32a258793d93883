import os
import time

import pytest
import torch

import checkpoint
from model import GPT, GPTConfig

SHAPE = dict(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, dropout=0.1, bias=False)


def parts(seed=0, **more):
    torch.manual_seed(seed)
    return {"model": GPT(GPTConfig(**SHAPE)).state_dict(), "model_args": dict(SHAPE),
            "iter_num": 7, **more}


def test_what_is_saved_comes_back(work):
    checkpoint.save(parts(), "ckpt.pt")
    model = checkpoint.load_model(checkpoint.load("ckpt.pt"))
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), parts()["model"].values(), strict=True))
    assert os.listdir() == ["ckpt.pt"]


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_a_save_that_dies_leaves_the_old_file(work, monkeypatch, moment):
    checkpoint.save(parts(), "ckpt.pt")
    before = open("ckpt.pt", "rb").read()

    def die_half_way(what, path):
        path.write_bytes(b"half of a checkpoint")
        raise RuntimeError("[enforce fail at inline_container.cc] . "
                           "PytorchStreamWriter failed writing file")
    if moment == "while writing":
        monkeypatch.setattr(torch, "save", die_half_way)
        with pytest.raises(OSError, match=r"could not write ckpt.pt \(.* GiB free\)"
                                          r".*What was there before is unchanged"):
            checkpoint.save(parts(1), "ckpt.pt")
        assert os.listdir() == ["ckpt.pt"]
    else:
        monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(parts(1), "ckpt.pt")
    assert open("ckpt.pt", "rb").read() == before


def test_a_file_that_is_held_open_elsewhere_is_tried_again(work, monkeypatch):
    checkpoint.save(parts(), "ckpt.pt")
    real, refusals = os.replace, [PermissionError(), PermissionError()]

    def replace(a, b):
        if refusals:
            raise refusals.pop()
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(parts(1), "ckpt.pt")
    assert torch.equal(checkpoint.load("ckpt.pt")["model"]["lm_head.weight"],
                       parts(1)["model"]["lm_head.weight"])


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_stays_when_the_newest_is_replaced(work, monkeypatch, links):
    if not links:
        monkeypatch.setattr(
            os, "link", lambda a, b: (_ for _ in ()).throw(OSError("no links on this disk")))
    checkpoint.save(parts(1), "ckpt.pt")
    checkpoint.copy("ckpt.pt", "best.pt")
    checkpoint.save(parts(2), "ckpt.pt")
    assert torch.equal(checkpoint.load("best.pt")["model"]["lm_head.weight"],
                       parts(1)["model"]["lm_head.weight"])
    assert torch.equal(checkpoint.load("ckpt.pt")["model"]["lm_head.weight"],
                       parts(2)["model"]["lm_head.weight"])


def test_a_checkpoint_of_nanogpts_compiled_model_reads(work):
    theirs = parts(optimizer={}, best_val_loss=torch.tensor(3.0), config={"dataset": "x"})
    theirs["model"] = {f"_orig_mod.{k}": v for k, v in theirs["model"].items()}
    torch.save(theirs, "ckpt.pt")
    model = checkpoint.load_model(checkpoint.load("ckpt.pt"))
    assert torch.equal(model.lm_head.weight, parts()["model"]["lm_head.weight"])


@pytest.mark.parametrize("content, kind, words", [
    (None, FileNotFoundError, "ckpt.pt does not exist"),
    (b"", ValueError, "not a checkpoint that can be read"),
    (b"junk" * 1000, ValueError, "not a checkpoint that can be read"),
    ({"weights": 1}, ValueError, "it has no model, model_args, iter_num"),
])
def test_what_is_no_checkpoint_is_named(work, content, kind, words):
    if isinstance(content, bytes):
        (work / "ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, "ckpt.pt")
    with pytest.raises(kind) as error:
        checkpoint.load("ckpt.pt")
    assert words in str(error.value)


def test_code_in_a_checkpoint_is_not_run(work):
    class Evil:
        def __reduce__(self):
            return (open, ("pwned", "w"))
    torch.save({**parts(), "config": Evil()}, "ckpt.pt")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        checkpoint.load("ckpt.pt")
    assert not (work / "pwned").exists()


def test_the_newest_run_is_found(work):
    assert checkpoint.newest_run() is None
    for name in ("out-b", "out-a", "out/run"):
        (work / name).mkdir(parents=True)
        checkpoint.save(parts(), work / name / "ckpt.pt")
        os.utime(work / name / "ckpt.pt", (time.time() - 60, time.time() - 60))
    (work / "out-later-but-empty").mkdir()
    os.utime(work / "out-a/ckpt.pt")
    assert checkpoint.newest_run() == checkpoint.Path("out-a")
    checkpoint.copy("out/run/ckpt.pt", "out/run/best.pt")
    os.utime(work / "out/run/best.pt", (time.time() + 60, time.time() + 60))
    assert checkpoint.newest_run() == checkpoint.Path("out/run")
    assert (checkpoint.in_folder("out/run").name == "best.pt"
            and checkpoint.in_folder("out-a").name == "ckpt.pt")
