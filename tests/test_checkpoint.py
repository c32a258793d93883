import os
import random
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


def test_a_save_that_the_disk_has_no_room_for_leaves_the_old_file(work):
    checkpoint.save("ckpt.pt", parts())
    before = Path("ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not write ckpt.pt \(.* GiB free\).*"
                                            "It is as it was before"):
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
    checkpoint.link_or_copy("ckpt.pt", "best.pt")
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
    with pytest.raises(UserError, match="there is no run under out"):
        checkpoint.source()
    for name in ("out-b", "out-a", "out/run"):
        (work / name).mkdir(parents=True)
        checkpoint.save(work / name / "ckpt.pt", parts())
        os.utime(work / name / "ckpt.pt", (time.time() - 60, time.time() - 60))
    (work / "out-later-but-empty").mkdir()
    os.utime(work / "out-a/ckpt.pt")
    assert checkpoint.source() == Path("out-a")
    checkpoint.link_or_copy("out/run/ckpt.pt", "out/run/best.pt")
    os.utime(work / "out/run/best.pt", (time.time() + 60, time.time() + 60))
    assert checkpoint.source() == Path("out/run")
    assert checkpoint.best_or_newest("out/run").name == "best.pt"
    assert checkpoint.best_or_newest("out-a").name == "ckpt.pt"
    with pytest.raises(UserError, match="out-later-but-empty holds no ckpt.pt or best.pt"):
        checkpoint.source(out_dir="out-later-but-empty")


def test_a_bit_that_flips_is_noticed_wherever_it_is(work):
    checkpoint.save("ckpt.pt", parts(optimizer={"state": {0: torch.ones(9)}}, best_val_loss=3.5))
    content, rng = Path("ckpt.pt").read_bytes(), random.Random(0)
    right = checkpoint.load("ckpt.pt")
    directory = content.index(b"PK\x01\x02")        # of the zip, at its end
    positions = rng.choices(range(directory), k=300) + rng.choices(
        range(directory, len(content)), k=300)
    n_noticed = 0
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        Path("ckpt.pt").write_bytes(changed)
        try:
            read = checkpoint.load("ckpt.pt")
        except UserError as error:
            assert "ckpt.pt is damaged: " in str(error) or "not a checkpoint that can" in str(error)
            n_noticed += 1
        else:                           # the bit was of no use: of padding, or of a date
            assert torch.equal(read["optimizer"]["state"][0], torch.ones(9))
            assert all(torch.equal(w, right["model"][name]) for name, w in read["model"].items())
            assert read["model_args"] == right["model_args"] and read["best_val_loss"] == 3.5
    assert n_noticed > 300


def test_the_record_that_is_damaged_is_named_and_best_loss_notices_it_too(work):
    checkpoint.save("best.pt", parts(best_val_loss=2.5))
    assert checkpoint.best_loss(".") == 2.5
    content = bytearray(Path("best.pt").read_bytes())
    content[content.index(head("best.pt").numpy().tobytes()) + 1000] ^= 1
    Path("best.pt").write_bytes(content)
    for read in (checkpoint.load, lambda path: checkpoint.best_loss(".")):
        with pytest.raises(UserError, match="best.pt is damaged: .*data/0 in it is not what"):
            read("best.pt")
    Path("best.pt").write_bytes(content[:-9])
    with pytest.raises(UserError, match="best.pt is not a checkpoint that can be read"):
        checkpoint.best_loss(".")


@pytest.mark.parametrize("key, value, words", [
    ("model", [1], "model is of type list"), ("model_args", None, "model_args is of type NoneType"),
    ("iter_num", 7.5, "iter_num is of type float"), ("config", 1, "config is of type int"),
    ("best_val_loss", torch.ones(2), "best_val_loss has 2 numbers"),
    ("optimizer", None, "optimizer is of type NoneType")])
def test_a_part_of_another_type_is_named(work, key, value, words):
    checkpoint.save("ckpt.pt", parts() | {key: value})
    with pytest.raises(UserError, match=f"checkpoint of this project or of nanoGPT: its {words}"):
        checkpoint.load("ckpt.pt")


def test_a_loss_that_nanogpt_saved_as_a_tensor_is_a_number(work):
    checkpoint.save("best.pt", parts(best_val_loss=torch.tensor(2.5)))
    assert checkpoint.best_loss(".") == checkpoint.load("best.pt")["best_val_loss"] == 2.5
    checkpoint.save("best.pt", parts())
    assert checkpoint.best_loss(".") == checkpoint.best_loss("nowhere") == float("inf")


def test_best_pt_is_whole_before_ckpt_pt_gets_its_name(work):
    Path("ckpt.pt").mkdir()                         # so that this name cannot be taken
    with pytest.raises(UserError, match="could not write ckpt.pt"):
        checkpoint.save("ckpt.pt", parts(2), copies=["best.pt"])
    assert checkpoint.load("best.pt")["iter_num"] == parts(2)["iter_num"]


def test_what_a_killed_save_left_is_no_way_into_best_pt(work):
    checkpoint.save("ckpt.pt", parts(1), copies=["best.pt"])
    os.link("best.pt", "ckpt.pt.onecard-new")       # a kill between the two names leaves this
    before = Path("best.pt").read_bytes()
    checkpoint.save("ckpt.pt", parts(2))
    assert Path("best.pt").read_bytes() == before
