"""Does a run go on as if it had never stopped, and is nothing lost?"""
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_nanogpt
from onecard import checkpoint
from onecard.dataset import Dataset
from onecard.runlog import read_log
from onecard.settings import UserError
from tiny_run import (
    MUON,
    contents,
    kill,
    log,
    run_steps,
    run_tiny,
    same,
    same_run,
    saved,
    start,
    wait_for,
    weights,
)


@pytest.mark.parametrize("settings", [
    dict(dropout=0.2, log_interval=2), dict(dtype="float16"), dict(MUON, dropout=0.2)],
    ids=["adamw", "fp16", "muon"])
def test_a_run_that_stopped_after_every_step_is_the_uninterrupted_run(tiny, settings):
    settings = dict(max_iters=8, eval_interval=4, **settings)
    run_tiny(out_dir="out-whole", **settings)
    run_steps(8, out_dir="out-cut", **settings)
    assert same_run("out-cut", "out-whole")
    a, b = (saved(out_dir=f"out-{name}") for name in ("cut", "whole"))
    assert str(a["optimizer"]) == str(b["optimizer"])
    assert torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"])
    assert a["best_val_loss"] == b["best_val_loss"] and a["scaler"] == b["scaler"]


def test_a_run_resumes_over_the_end_of_an_epoch(tiny):
    n = Dataset("data/letters", "train", 16).n_windows
    steps = n // 64 + 2
    settings = dict(batch_size=32, gradient_accumulation_steps=2, max_iters=steps,
                    lr_decay_iters=steps, eval_interval=1000, n_layer=1, n_embd=8, n_head=1)
    run_tiny(out_dir="out-whole", **settings)
    assert log("out-whole")[steps, "epoch"] > 1
    run_steps(2, out_dir="out-cut", **settings)
    run_tiny(out_dir="out-cut", init_from="resume", **settings)
    assert same_run("out-cut", "out-whole")


def test_a_run_resumes_with_other_micro_batches(tiny):
    run_tiny(out_dir="out-whole")
    run_steps(2, out_dir="out-cut")
    run_tiny(out_dir="out-cut", init_from="resume", batch_size=1, gradient_accumulation_steps=8,
             eval_iters=12)
    a, b = log("out-whole"), log("out-cut")
    assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-4) for k in a)


def test_log_lines_after_the_checkpoint_of_a_killed_run_are_dropped(tiny):
    run_tiny(out_dir="out-whole")
    run_steps(2, out_dir="out-cut")
    with open("out-cut/log.jsonl", "a") as f:
        f.write('{"step": 3, "train_loss": 99}\n{"step": 4, "train_')
    run_tiny(out_dir="out-cut", init_from="resume")
    assert log("out-cut") == log("out-whole")


@pytest.mark.parametrize("change, words", [
    (dict(block_size=8, n_head=4, n_embd=64, bias=True, mlp="swiglu"),
     "block_size is 16 there and 8 here; n_head is 2 there and 4 here; n_embd is 32 there and 64 "
     "here; bias is False there and True here; mlp is gelu there and swiglu here"),
    (dict(optimizer="muon"), "optimizer is adamw there and muon here"),
    (dict(batch_size=8), "tokens_per_step is 128 there and 256 here. --force goes on"),
    (dict(seed=1), "seed is 1337 there and 1 here"),
    (dict(dataset="other"), "dataset is "),
])
def test_going_on_with_something_else_is_an_error_that_names_it(tiny, change, words):
    write_nanogpt(tiny / "data/other", np.arange(2000) % 64)
    run_steps(1)
    before = weights()
    with pytest.raises(UserError) as error:
        run_tiny(init_from="resume", **change)
    assert words in str(error.value) and same(weights(), before)
    if "force" in words:
        run_tiny(init_from="resume", force=True, **change)
        assert saved()["iter_num"] == 12


def test_a_gpt2_of_the_first_version_goes_on(tiny):
    """It saved None for the settings that were derived from others."""
    run_tiny(out_dir="out-whole")
    run_steps(2)
    parts = saved()
    parts["config"] |= {"block": "gpt2", "position": None, "norm": None, "qk_norm": None}
    checkpoint.save("out/ckpt.pt", parts)
    run_tiny(init_from="resume")
    assert same_run("out", "out-whole")


# a longer run

@pytest.mark.parametrize("settings, out_dir", [({}, "out"), (MUON, "out-longer")],
                         ids=["adamw in its folder", "muon in another"])
def test_a_wsd_run_that_is_lengthened_is_the_longer_run(tiny, settings, out_dir):
    settings = {**settings, "lr_schedule": "wsd", "cooldown": 0.5, "min_lr": 0.0}
    run_tiny(out_dir="out-long", max_iters=20, **settings)
    run_tiny(**settings)
    finished = saved("best.pt")
    assert finished["iter_num"] == 12 and log()[12, "lr"] < log()[6, "lr"] / 5
    assert saved("stable.pt")["iter_num"] == 6
    run_tiny(init_from="out/stable.pt", out_dir=out_dir, max_iters=20, **settings)
    assert same(weights(out_dir), weights("out-long"))
    longer, whole = log(out_dir), log("out-long")
    assert all(longer[k] == whole[k] for k in longer) and max(longer) == max(whole)
    best = saved("best.pt", out_dir)["best_val_loss"]
    if out_dir == "out":                # the best of both, and never a worse one than before
        assert best <= finished["best_val_loss"] and longer == whole


def test_best_pt_of_a_finished_run_stays_until_the_longer_run_is_better(tiny):
    settings = dict(lr_schedule="wsd", cooldown=0.5)
    run_tiny(**settings)
    finished = saved("best.pt")
    assert finished["best_val_loss"] < saved("stable.pt")["best_val_loss"]
    run_tiny(init_from="out/stable.pt", max_iters=20, max_hours=1e-9, **settings)
    assert saved()["iter_num"] == 7
    assert saved()["best_val_loss"] == finished["best_val_loss"]


@pytest.mark.parametrize("settings, changes", [
    (dict(lr_schedule="wsd", cooldown=0.8), [
        dict(max_iters=20), dict(cooldown=0.1), dict(lr_schedule="cosine", lr_decay_iters=20)]),
    ({}, [dict(lr_decay_iters=24), dict(learning_rate=0.1), dict(decay_lr=False)])])
def test_a_learning_rate_does_not_rise_again_in_silence(tiny, settings, changes):
    run_steps(5, **settings)
    for change in changes:
        changed = {"init_from": "resume", **settings, **change}
        with pytest.raises(UserError, match="would rise from 0.00.* to 0.*out/stable.pt goes on"):
            run_tiny(**changed)
    run_tiny(**changed, force=True)
    assert saved()["iter_num"] == 12


# nothing is lost

def test_a_used_folder_is_never_started_over_unasked(tiny):
    run_tiny(**MUON, max_iters=4)
    for name in ("ckpt.pt", "best.pt", "stable.pt"):
        before = contents("out")
        init_from = {"ckpt.pt": "resume"}.get(name, f"out/{name}")
        with pytest.raises(UserError, match=rf"out holds a run \({name}.*--init_from={init_from} "
                                            "goes on with it, --out_dir=OTHER .* --overwrite"):
            run_tiny(seed=2)
        run_tiny(**MUON, max_iters=4, init_from=init_from, eval_only=True)
        assert contents("out") == before
        if name != "stable.pt":
            os.unlink(f"out/{name}")
    run_tiny(seed=2, overwrite=True, max_iters=1, eval_interval=5)
    assert saved("best.pt")["iter_num"] == saved()["iter_num"] == 1
    assert max(step for step, _ in log()) == 1 and not Path("out/stable.pt").exists()


def test_the_old_run_stays_until_the_first_checkpoint_of_its_successor(tiny):
    run_tiny(max_iters=4)
    before = contents("out")
    # the new run fails before its first step, then before its first save, then it is killed
    sys.modules["wandb"] = None
    with pytest.raises(UserError, match="wandb_log = True needs wandb"):
        run_tiny(overwrite=True, wandb_log=True)
    del sys.modules["wandb"]
    with pytest.raises(UserError, match="learning_rate"):
        run_tiny(overwrite=True, learning_rate=9, eval_interval=50, max_iters=50, dtype="float16")
    process = start(tiny, overwrite=True, max_iters=10**6, eval_interval=10**6)
    wait_for(process, "step 20/")
    kill(process)
    after = contents("out")
    assert {name: after.pop(name) for name in before} == before
    assert set(after) <= {"ckpt.pt.onecard-new"}
    run_tiny(overwrite=True, max_iters=2, eval_interval=2)
    assert saved()["iter_num"] == 2 and max(step for step, _ in log()) == 2
    assert "max_iters = 2\n" in Path("out/config.py").read_text()


def test_a_resumed_run_keeps_its_micro_batches(tiny):
    """Others round otherwise: it would not be the same run, bit for bit."""
    free = dict(batch_size=0, tokens_per_step=128)
    run_tiny(**free, max_iters=6)
    parts = saved()
    assert parts["fit"]["batch_size"] != 2
    parts["fit"]["batch_size"] = 2
    torch.save(parts, "out/ckpt.pt")
    run_tiny(**free, init_from="resume")
    assert saved()["iter_num"] == 12 and saved()["fit"]["batch_size"] == 2


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(tiny):
    run_tiny(max_iters=6)
    process = start(tiny, init_from="resume", eval_interval=10**6, max_iters=10**6)
    wait_for(process, "step 8/")
    assert checkpoint.read("out")[0]["iter_num"] == 6       # reading is possible all the time
    whole = Path("out/ckpt.pt").read_bytes()
    Path("out/ckpt.pt").write_bytes(b"half of one")     # the other run may still write it
    for overwrite in (False, True):
        for init_from in ("resume", "scratch"):
            with pytest.raises(UserError, match="another process is training in .*out; wait until"):
                run_tiny(init_from=init_from, overwrite=overwrite)
    kill(process)
    Path("out/ckpt.pt").write_bytes(whole)
    run_tiny(init_from="resume")
    assert saved()["iter_num"] == 12


def test_a_folder_that_was_moved_away_is_made_again_and_still_locked(tiny):
    process = start(tiny, max_iters=10**6, lr_decay_iters=10**6)
    wait_for(process, "step 8/")
    os.rename("out", "moved")
    wait_for(process, "step 30/")
    assert saved()["iter_num"] >= 24
    with pytest.raises(UserError, match="another process is training"):
        run_tiny(overwrite=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_run_that_replaces_another_does_not_inherit_its_best_loss(tiny):
    run_tiny(out_dir="good", max_iters=30, lr_decay_iters=30)
    run_tiny(out_dir="start", max_iters=6)
    run_tiny(out_dir="good", overwrite=True, init_from="start/ckpt.pt")
    losses = [loss for (step, name), loss in log("good").items() if name == "val_loss"]
    assert saved("best.pt", "good")["best_val_loss"] == min(losses)


def test_a_branch_from_stable_pt_leaves_the_log_until_it_saves(tiny):
    run_tiny(lr_schedule="wsd", cooldown=0.5)
    before = contents("out")
    process = start(tiny, lr_schedule="wsd", cooldown=0.5, max_iters=10**6, eval_interval=10**6,
                    init_from="out/stable.pt")
    wait_for(process, "step 40/")
    kill(process)
    assert {name: contents("out")[name] for name in before} == before


def test_a_config_of_the_user_is_never_replaced(tiny):
    Path("mine").mkdir()
    Path("mine/config.py").write_text("# my comments\n")
    with pytest.raises(UserError, match="mine holds a config.py, which a run would replace"):
        run_tiny(out_dir="mine")
    assert Path("mine/config.py").read_text() == "# my comments\n"


def test_a_damaged_best_pt_says_what_to_do(tiny):
    run_tiny(max_iters=6)
    os.unlink("out/best.pt")                        # the same file as ckpt.pt
    Path("out/best.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="Delete out/best.pt, and the run goes on from ckpt.pt"):
        run_tiny(init_from="resume")
    os.unlink("out/best.pt")
    run_tiny(init_from="resume")


def test_killed_between_best_pt_and_ckpt_pt_both_are_right(tiny):
    run_tiny(max_iters=6)
    old = contents("out")
    run_tiny(init_from="resume")
    shutil.copytree("out", "out-whole")
    Path("out/ckpt.pt").write_bytes(old["ckpt.pt"])         # best.pt, of step 12, comes first
    os.link("out/best.pt", "out/ckpt.pt.onecard-new")               # what a kill leaves
    run_tiny(init_from="resume")
    assert same_run("out", "out-whole")
    assert saved("best.pt")["iter_num"] == 12
    assert saved("best.pt")["best_val_loss"] == saved()["best_val_loss"] == log()[12, "val_loss"]


def test_a_resumed_run_validates_on_the_same_windows(tiny, capsys):
    run_tiny(max_iters=6, eval_iters=5, batch_size=4)
    first = log()[6, "val_loss"]
    run_tiny(init_from="resume", eval_only=True, eval_iters=7, batch_size=8,
             gradient_accumulation_steps=1)
    assert f"step 6: val loss {first:.4f}" in capsys.readouterr().out
    np.fromfile("data/letters/val.bin", np.uint16)[::-1].tofile("data/letters/val.bin")
    with pytest.raises(UserError, match="val_dataset is .* there and .* here"):
        run_tiny(init_from="resume")
    run_tiny(batch_size=0, tokens_per_step=128, out_dir="out-0", max_iters=1)
    assert saved(out_dir="out-0")["val_windows"] == 3 * 12


@pytest.mark.parametrize("init_from", ["resume", "out"])
def test_a_model_of_other_ids_is_not_trained_in_silence(tiny, init_from):
    run_tiny(max_iters=2)
    letters = "".join(map(chr, range(64)))
    meta = {"vocab_size": 64, "itos": dict(enumerate(letters)),
            "stoi": {letter: i for i, letter in enumerate(letters)}}
    Path("data/letters/meta.pkl").write_bytes(pickle.dumps(meta))
    settings = dict(init_from=init_from, out_dir="out" if init_from == "resume" else "out-2")
    with pytest.raises(UserError, match="mean other texts .* --force"):
        run_tiny(**settings)
    run_tiny(**settings, force=True)
    assert saved(out_dir=settings["out_dir"])["tokenizer"] == list(letters)


def overfitted(folder):
    """A dataset on which val gets better first and then worse."""
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 4, 400))
    write_nanogpt(folder / "data/few", steps % 64, np.cumsum(rng.integers(1, 6, 2000)) % 64)


def test_best_pt_has_the_lowest_val_loss_of_the_log_also_over_a_resume(tiny):
    overfitted(tiny)
    settings = dict(dataset="few", max_iters=80, lr_decay_iters=80, eval_interval=4)
    process = start(tiny, **settings)
    wait_for(process, "step 50/")
    process.send_signal(signal.SIGINT)
    process.communicate()
    run_tiny(init_from="resume", **settings)
    losses = {entry["val_loss"]: entry["step"] for entry in read_log("out/log.jsonl")
              if "val_loss" in entry}
    best = saved("best.pt")
    assert 0 < losses[min(losses)] < 80 and len(losses) == 21
    assert (best["best_val_loss"], best["iter_num"]) == (min(losses), losses[min(losses)])
    assert saved()["best_val_loss"] == min(losses) and saved()["iter_num"] == 80


def test_always_save_checkpoint_off_saves_only_better_models(tiny):
    overfitted(tiny)
    process = start(tiny, always_save_checkpoint=False, dataset="few", max_iters=80,
                    lr_decay_iters=80, eval_interval=4)
    wait_for(process, "step 79/")
    kill(process)
    assert saved()["iter_num"] == saved("best.pt")["iter_num"] < 76


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits(tiny, number):
    process = start(tiny, max_iters=100000, lr_decay_iters=100000)
    wait_for(process, "step 10/")
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopping" in out
    assert "stopped on request at step" in out and "--init_from=resume goes on" in out
    assert saved()["iter_num"] >= 10


def test_a_second_signal_ends_the_process_at_once(tiny):
    process = start(tiny, max_iters=100000, lr_decay_iters=100000,
                    gradient_accumulation_steps=4001)
    wait_for(process, "step 0: val loss")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    wait_for(process, "stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT and not Path("out/ckpt.pt").exists()


def kill_and_resume(folder, kills, seed=0):
    """Kill -9 a run at random moments and resume it; it ends as the run that nobody killed."""
    settings = dict(max_iters=50, lr_decay_iters=50, eval_interval=20, dropout=0.1,
                    save_minutes=0.0, log_interval=1)
    run_tiny(out_dir="out-whole", **settings)
    rng, killed, init_from = random.Random(seed), 0, "scratch"
    while killed < kills:
        process = start(folder, out_dir="out-cut", init_from=init_from, **settings)
        wait_for(process, "output ")
        time.sleep(rng.uniform(0.0, 1.0))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
        if not Path("out-cut/ckpt.pt").exists():
            continue
        init_from = "resume"
        if saved(out_dir="out-cut")["iter_num"] == settings["max_iters"]:
            assert same_run("out-cut", "out-whole")
            for path in Path("out-cut").iterdir():      # finished: begin again
                path.unlink()
            init_from = "scratch"
    run_tiny(out_dir="out-cut", init_from=init_from, **settings)
    assert same_run("out-cut", "out-whole")


def test_killed_at_any_moment_a_resumed_run_ends_the_same(tiny):
    kill_and_resume(tiny, kills=2)


@pytest.mark.slow
def test_killed_at_20_random_moments(tiny):
    kill_and_resume(tiny, kills=20, seed=1)


# what a run starts from

def test_it_starts_from_a_folder_of_transformers_and_from_a_run(tiny):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, n_embd=32, n_layer=2, n_head=2, activation_function="gelu")).eval()
    theirs.save_pretrained("hf")
    text = dict(dataset="tiny", vocab_size=50304)       # what counts is the model's 50,257
    run_tiny(init_from="hf", out_dir="out-hf", max_iters=2, **text)
    data = Dataset("data/tiny", "val", 16)
    ids = torch.from_numpy(np.stack([data.window(k) for k in range(12)]).astype(np.int64))
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
    assert log("out-hf")[0, "val_loss"] == pytest.approx(loss, abs=2e-4)
    assert saved(out_dir="out-hf")["model_args"]["block_size"] == 16
    run_tiny(init_from="out-hf", out_dir="out-more", max_iters=1, **text)
    assert log("out-more")[0, "val_loss"] == pytest.approx(log("out-hf")[2, "val_loss"], abs=1e-6)
    with pytest.raises(UserError, match="block_size = 32, but the context of this model is 16"):
        run_tiny(init_from="out-hf", out_dir="out-longer", block_size=32, **text)
    # with the settings that it was started with
    run_tiny(init_from="resume", out_dir="out-hf", max_iters=4, **text)
    assert saved(out_dir="out-hf")["iter_num"] == 4


def test_the_checkpoint_has_nanogpts_keys_and_plain_contents(tiny):
    run_tiny(max_iters=2)
    parts = torch.load("out/ckpt.pt", weights_only=True)
    assert ({"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
            <= parts.keys())
    assert parts["model_args"] == dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False,
                                       vocab_size=64, dropout=0.0)
