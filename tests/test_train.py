"""The run as a whole. Most tests run train.main in this process, uncompiled and in fp32."""
import copy
import functools
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import checkpoint
import optim
import plan
import runtime
import train
from configurator import configure
from conftest import PROJECT, documents, free_port, script, write_nanogpt, write_parquet
from loader import Dataset
from model import GPT, GPTConfig, model_args
from train import TrainConfig

TINY = dict(dataset="letters", vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32,
            batch_size=4, gradient_accumulation_steps=2, max_iters=12, lr_decay_iters=12,
            warmup_iters=2, learning_rate=1e-2, min_lr=1e-3, eval_interval=6, eval_iters=3,
            device="cpu", dtype="float32", compile=False)
TRACE, FLOPS = plan.trace, functools.cache(runtime.measured_flops)


def run(**settings):
    train.main(TrainConfig(**{**TINY, **settings}))


def arguments(**settings):
    return [f"--{k}={v}" for k, v in {**TINY, **settings}.items()]


def log(out_dir="out"):
    """The numbers of log.jsonl that do not depend on the clock, {(step, name): value}."""
    told = {}
    for line in Path(out_dir, "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        told.update({(entry["step"], k): v for k, v in entry.items()
                     if k in ("train_loss", "val_loss", "lr", "grad_norm", "tokens", "epoch")})
    return told


def weights(out_dir="out"):
    return checkpoint.load(Path(out_dir, "ckpt.pt"))["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@functools.cache
def traced_once(model, batch_size, dtype, compiled, *optimizer):
    return TRACE(model, batch_size, dtype, compiled, TrainConfig(**dict(optimizer)))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No picture, and one trace of a shape: nine tenths of so small a run. Others test these."""
    def trace(model, batch_size, dtype, compiled, cfg):
        return copy.deepcopy(traced_once(model, batch_size, dtype, compiled, *(
            (name, getattr(cfg, name)) for name in ("optimizer", "muon_beta2", "ema_half_life"))))

    monkeypatch.setattr(plan, "trace", trace)
    monkeypatch.setattr(runtime, "measured_flops", FLOPS)
    monkeypatch.setattr(train, "draw", lambda out_dir, say: None)


@pytest.fixture(autouse=True)
def signals():
    """Leave the signal handlers as they were."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    gc.enable()
    gc.unfreeze()
    for s, handler in before.items():
        signal.signal(s, handler)


# the numbers are right

def test_the_loss_falls_and_the_log_tells_it(tiny):
    run(max_iters=60, lr_decay_iters=60, eval_interval=20)
    told = log()
    assert told[1, "train_loss"] == pytest.approx(math.log(64), abs=0.2)
    # three ids may follow each
    assert math.log(3) < told[60, "val_loss"] < told[0, "val_loss"] - 2
    assert [s for s, k in told if k == "val_loss"] == [0, 20, 40, 60]
    assert [s for s, k in told if k == "train_loss"] == list(range(1, 61))
    assert told[60, "tokens"] == 60 * 4 * 2 * 16


def test_a_step_is_what_torch_makes_of_the_same_windows(tiny):
    """Three steps by hand: plain AdamW over the mean loss of all its windows, gradients clipped."""
    run(max_iters=3, grad_clip=0.5)
    cfg = TrainConfig(**{**TINY, "max_iters": 3})
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(**model_args(cfg)))
    data = Dataset("data/letters", "train", 16, 64, cfg.seed)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95), foreach=False)
    for step, told in enumerate(log()[s, "train_loss"] for s in (1, 2, 3)):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, cfg)
        loss = model(*data.training_batch(step * 8, 8))
        assert told == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert log()[step + 1, "grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.allclose(w, weights()[k], atol=1e-5) for k, w in model.state_dict().items())


def test_the_logged_loss_is_the_mean_over_all_micro_batches(tiny):
    for out_dir, batch, accumulate in (("out-a", 8, 1), ("out-b", 2, 4), ("out-c", 1, 8)):
        run(out_dir=out_dir, batch_size=batch, gradient_accumulation_steps=accumulate,
            eval_iters=24 // batch)
    a = log("out-a")
    for other in (log("out-b"), log("out-c")):
        assert other.keys() == a.keys()
        assert all(other[k] == pytest.approx(a[k], rel=1e-4) for k in a)


def test_validation_is_the_mean_over_the_first_windows_always_the_same(tiny):
    run(eval_iters=5, eval_interval=4)
    data = Dataset("data/letters", "val", 16, 64)
    model = checkpoint.load_model(checkpoint.load("out/ckpt.pt")).eval()
    with torch.no_grad():
        losses = [model(*data.fixed_batch(k, 1, 20)).item() for k in range(20)]
    assert log()[12, "val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 7, 64])
def test_validation_takes_all_windows_where_there_are_fewer_than_asked_for(tiny, batch_size):
    run(eval_iters=1000, batch_size=batch_size, max_iters=1)
    data = Dataset("data/letters", "val", 16, 64)
    model = checkpoint.load_model(checkpoint.load("out/ckpt.pt")).eval()
    with torch.no_grad():
        whole = model(*data.fixed_batch(0, data.n_windows, data.n_windows)).item()
    assert log()[1, "val_loss"] == pytest.approx(whole, rel=1e-5)


def test_how_often_it_is_evaluated_changes_nothing_else(tiny):
    run(out_dir="out-a", dropout=0.2, eval_interval=1)
    run(out_dir="out-b", dropout=0.2, eval_interval=100)
    assert same(weights("out-a"), weights("out-b"))


def test_the_learning_rate_warms_up_and_follows_the_cosine():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [optim.lr_at(s, cfg) for s in range(130)]
    assert (rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
            and rates[10] == 1.0)
    assert rates[60] == pytest.approx(0.55) and rates[110:] == [pytest.approx(0.1)] * 20
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert optim.lr_at(0, TrainConfig(decay_lr=False, learning_rate=0.3)) == 0.3


def test_weight_decay_falls_on_matrices_only():
    cfg = TrainConfig(**{**TINY, "bias": True})
    model = GPT(GPTConfig(**model_args(cfg)))
    decayed, free = optim.configure_optimizer(model, cfg, torch.device("cpu")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and "ln" not in names[id(p)]
               for p in decayed["params"])
    assert all("ln" in names[id(p)] or names[id(p)].endswith("bias") for p in free["params"])
    assert len(names) == len(decayed["params"]) + len(free["params"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_follows_fp32(tiny, dtype):
    run(out_dir="out-32")
    run(out_dir="out-16", dtype=dtype)
    a, b = log("out-32"), log("out-16")
    assert all(b[k] == pytest.approx(a[k], abs=0.05) for k in a if "loss" in k[1])
    assert checkpoint.load("out-16/ckpt.pt")["model"]["lm_head.weight"].dtype == torch.float32


def test_compiled_training_is_eager_training(tiny):
    settings = dict(max_iters=4, n_layer=1)         # each layer takes seconds to compile
    run(out_dir="out-eager", **settings)
    done = script("train.py", *arguments(out_dir="out-compiled", compile=True, **settings),
                  cwd=tiny)
    assert "compiling the model" in done.stdout
    a, b = log("out-eager"), log("out-compiled")
    assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-3) for k in a)
    assert weights("out-compiled").keys() == weights("out-eager").keys()        # no _orig_mod.


def test_without_a_compiler_it_says_what_is_missing_and_goes_on(tiny, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    run(compile=True, max_iters=1)
    assert ("torch.compile cannot work here, going on without it (slower): there is no C++ compiler"
            in capsys.readouterr().out)


# it goes on as if it had never stopped

@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop_at", [5, 6, 11])
def test_a_resumed_run_is_the_uninterrupted_run(tiny, stop_at, dropout):
    settings = dict(dropout=dropout, max_iters=12, gradient_accumulation_steps=2, log_interval=2)
    run(out_dir="out-whole", **settings)
    stop_after(stop_at, out_dir="out-cut", **settings)
    assert checkpoint.load("out-cut/ckpt.pt")["iter_num"] == stop_at
    torch.rand(100)                             # the generator of another process stands elsewhere
    run(out_dir="out-cut", init_from="resume", **settings)
    assert log("out-cut") == log("out-whole") and same(weights("out-cut"), weights("out-whole"))
    a, b = (checkpoint.load(f"out-{x}/ckpt.pt") for x in ("cut", "whole"))
    assert (str(a["optimizer"]) == str(b["optimizer"])
            and torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"]))
    assert a["best_val_loss"] == b["best_val_loss"]


def stop_after(steps, **settings):
    """Run, and ask to stop as Ctrl-C does while step `steps` is under way."""
    ordinary, seen = optim.lr_at, []

    def counting(step, cfg):
        if step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        seen.append(step)
        return ordinary(step, cfg)
    optim.lr_at = counting
    try:
        run(**settings)
    finally:
        optim.lr_at = ordinary
    assert seen[-1] == steps - 1


def test_a_run_resumes_over_the_end_of_an_epoch(tiny):
    n = Dataset("data/letters", "train", 16, 64).n_windows
    steps = n // 64 + 3
    settings = dict(batch_size=32, gradient_accumulation_steps=2, max_iters=steps + 2,
                    lr_decay_iters=steps + 2, eval_interval=1000, n_layer=1, n_embd=8, n_head=1)
    run(out_dir="out-whole", **settings)
    assert log("out-whole")[steps, "epoch"] > 1
    stop_after(steps - 3, out_dir="out-cut", **settings)
    run(out_dir="out-cut", init_from="resume", **settings)
    assert log("out-cut") == log("out-whole") and same(weights("out-cut"), weights("out-whole"))


def test_a_run_resumes_with_another_split_of_its_steps(tiny):
    run(out_dir="out-whole")
    stop_after(5, out_dir="out-cut")
    run(out_dir="out-cut", init_from="resume", batch_size=1, gradient_accumulation_steps=8,
        eval_iters=12)
    a, b = log("out-whole"), log("out-cut")
    assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-4) for k in a)


def test_lines_of_the_log_that_a_killed_run_wrote_after_its_checkpoint_go(tiny):
    run(out_dir="out-whole")
    stop_after(5, out_dir="out-cut")
    with open("out-cut/log.jsonl", "a") as f:
        f.write('{"step": 6, "train_loss": 99}\n{"step": 7, "train_')
    run(out_dir="out-cut", init_from="resume")
    assert log("out-cut") == log("out-whole")


def test_todays_settings_win_over_those_of_the_checkpoint(tiny):
    stop_after(5)
    run(init_from="resume", weight_decay=0.3, beta2=0.9, learning_rate=5e-3, dropout=0.1)
    groups = checkpoint.load("out/ckpt.pt")["optimizer"]["param_groups"]
    assert groups[0]["weight_decay"] == 0.3 and groups[0]["betas"] == (0.9, 0.9)
    assert log()[6, "lr"] == optim.lr_at(5, TrainConfig(**{**TINY, "learning_rate": 5e-3}))


def test_fp16_resumes_with_its_loss_scale(tiny):
    run(out_dir="out-whole", dtype="float16")
    stop_after(5, out_dir="out-cut", dtype="float16")
    run(out_dir="out-cut", init_from="resume", dtype="float16")
    assert log("out-cut") == log("out-whole") and same(weights("out-cut"), weights("out-whole"))


@pytest.mark.parametrize("change, words", [
    (dict(n_layer=3), "cannot resume out/ckpt.pt: n_layer is 2 there and 3 here"),
    (dict(n_embd=64, n_head=4), "n_head is 2 there and 4 here; n_embd is 32 there and 64 here"),
    (dict(block_size=8), "block_size is 16 there and 8 here"),
    (dict(bias=True), "bias is False there and True here"),
    (dict(block="modern"), "cannot resume out/ckpt.pt: block is gpt2 there and modern here. "),
    (dict(optimizer="muon"), "optimizer is adamw there and muon here"),
    (dict(batch_size=8), "tokens_per_step is 128 there and 256 here. --force resumes all the same"),
    (dict(seed=1), "seed is 1337 there and 1 here"),
    (dict(dataset="other"), "dataset is "),
])
def test_resuming_something_else_is_an_error_that_names_it(tiny, change, words):
    write_nanogpt(tiny / "data/other", np.arange(2000) % 64)
    stop_after(2)
    before = weights()
    with pytest.raises(ValueError) as error:
        run(init_from="resume", **change)
    assert words in str(error.value) and same(weights(), before)
    if "force" in words:
        run(init_from="resume", force=True, **change)
        assert checkpoint.load("out/ckpt.pt")["iter_num"] == 12


def test_resuming_nothing_is_named(tiny):
    with pytest.raises(FileNotFoundError, match="out/ckpt.pt does not exist"):
        run(init_from="resume")


# muon, schedules, averages

MUON = dict(block="modern", optimizer="muon", lr_schedule="wsd", cooldown=0.5, learning_rate=0.02,
            min_lr=0.0, embedding_lr=0.05, momentum_warmup=4)


def test_muon_and_the_modern_block_learn(tiny):
    run(max_iters=60, eval_interval=60, eval_iters=20, **MUON)
    run(out_dir="out-gpt2", max_iters=60, lr_decay_iters=60, eval_interval=60, eval_iters=20)
    told, gpt2 = log(), log("out-gpt2")
    assert told[0, "val_loss"] == pytest.approx(math.log(64), abs=1e-4)
    assert told[60, "val_loss"] < gpt2[60, "val_loss"] < told[0, "val_loss"] - 0.5


@pytest.mark.parametrize("stop_at", [5, 9])
def test_a_resumed_run_with_muon_and_an_average_is_the_uninterrupted_run(tiny, stop_at):
    settings = dict(**MUON, n_value_table=1, dropout=0.2, ema_half_life=2)
    run(out_dir="out-whole", **settings)
    stop_after(stop_at, out_dir="out-cut", **settings)
    run(out_dir="out-cut", init_from="resume", **settings)
    assert log("out-cut") == log("out-whole") and same(weights("out-cut"), weights("out-whole"))
    a, b = (checkpoint.load(f"out-{x}/ckpt.pt") for x in ("cut", "whole"))
    assert same(a["average"], b["average"]) and str(a["optimizer"]) == str(b["optimizer"])


@pytest.mark.parametrize("settings", [{}, MUON], ids=["adamw", "muon"])
def test_a_finished_wsd_run_that_is_lengthened_is_the_longer_run(tiny, settings):
    settings = {**settings, "lr_schedule": "wsd", "cooldown": 0.5, "min_lr": 0.0}
    run(out_dir="out-long", max_iters=20, **settings)
    run(**settings)
    finished = checkpoint.load("out/best.pt")
    assert finished["iter_num"] == 12 and log()[12, "lr"] < log()[6, "lr"] / 5
    assert checkpoint.load("out/stable.pt")["iter_num"] == 6
    run(init_from="resume", max_iters=20, **settings)
    assert log() == log("out-long") and same(weights(), weights("out-long"))
    best = checkpoint.load("out/best.pt")["best_val_loss"]      # never a worse one than before
    assert best <= finished["best_val_loss"]


def test_a_run_that_is_cut_short_can_be_lengthened_again(tiny):
    settings = {"lr_schedule": "wsd", "cooldown": 0.5}
    run(out_dir="out-long", max_iters=24, **settings)
    stop_after(8, max_iters=24, **settings)
    run(init_from="resume", max_iters=10, **settings)       # whose cooldown began at step 5
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == 10
    assert checkpoint.load("out/stable.pt")["iter_num"] == 8
    run(init_from="resume", max_iters=24, **settings)
    assert log() == log("out-long") and same(weights(), weights("out-long"))


def test_a_longer_run_replaces_the_best_of_the_shorter_one_by_a_better_one_only(tiny, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.9, 3.5])            # steps 0, 6, 12; again 12, and 18
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    settings = dict(lr_schedule="wsd", cooldown=0.5)
    run(**settings)
    finished = checkpoint.load("out/best.pt")
    run(init_from="resume", max_iters=18, **settings)
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == 18 == 6 + 2 * 6
    best = checkpoint.load("out/best.pt")
    assert best["best_val_loss"] == 3.0 and same(best["model"], finished["model"])


def test_settings_that_change_nothing_are_named(tiny, capsys):
    run(max_iters=1, head_lr=0.1, cautious=False, cooldown=0.1, rope_theta=5.0)
    told = capsys.readouterr().out
    assert "note       with optimizer = 'adamw', head_lr, cautious change nothing" in told
    assert "note       with lr_schedule = 'cosine', cooldown changes nothing" in told
    assert "note       with position = 'learned', rope_theta changes nothing" in told
    run(overwrite=True, tie_word_embeddings=True, **{**MUON, "lr_decay_iters": 7})
    told = capsys.readouterr().out
    assert "note       with tie_word_embeddings = True, embedding_lr changes nothing" in told
    assert "note       with lr_schedule = 'wsd', lr_decay_iters changes nothing" in told
    run(overwrite=True, tie_word_embeddings=True, n_value_table=1, **MUON)
    assert "embedding_lr changes nothing" not in capsys.readouterr().out
    run(overwrite=True, **{**MUON, "lr_decay_iters": TrainConfig.lr_decay_iters})
    assert "note  " not in capsys.readouterr().out


def test_a_model_that_export_refuses_is_named_before_the_first_step(tiny, capsys):
    run(dry_run=True, block="modern", mlp="relu2", n_value_table=1)
    assert "note       no class of transformers computes this model: its nearest, qwen3, lacks " \
        "mlp = 'relu2', n_value_table = 1, so export.py will refuse it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["evening", "overnight", "week", "64m"])
def test_the_recipes_for_the_4070_train(tiny, name):
    """As they are, but for the size: every setting in them means something."""
    cfg = configure(TrainConfig, [str(PROJECT / f"config/train_fineweb_4070_{name}.py")])
    assert not list(train.ignored(cfg))
    small = ("dataset", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "batch_size",
             "gradient_accumulation_steps", "eval_iters", "device", "dtype", "compile")
    cfg = replace(cfg, **{k: TINY[k] for k in small}, max_iters=150, warmup_iters=5, log_interval=1,
                  momentum_warmup=20, eval_interval=50)
    train.main(cfg)
    told = log(cfg.out_dir)
    assert told[150, "val_loss"] < told[0, "val_loss"] - 0.8
    assert checkpoint.load(Path(cfg.out_dir, "stable.pt"))["iter_num"] == optim.cooldown_start(cfg)


def test_muons_momentum_warms_up(tiny):
    for steps in (3, 9):
        run(overwrite=True, **{**MUON, "max_iters": steps, "warmup_iters": 1})
        momentum = checkpoint.load("out/ckpt.pt")["optimizer"]["param_groups"][0]["momentum"]
        assert momentum == pytest.approx({3: 0.90, 9: 0.95}[steps])


def test_the_average_takes_every_step_in(tiny):
    run(max_iters=1, ema_half_life=1)
    torch.manual_seed(1337)
    start = GPT(GPTConfig(**model_args(TrainConfig(**TINY)))).state_dict()
    parts = checkpoint.load("out/ckpt.pt")
    for name, w in parts["average"].items():
        assert torch.allclose(w, (start[name] + parts["model"][name]) / 2, atol=1e-7)
        assert name.endswith("weight") and not torch.equal(w, start[name])


def test_a_run_that_stopped_in_its_cooldown_goes_on_there(tiny):
    settings = dict(lr_schedule="wsd", cooldown=0.5)
    run(out_dir="out-whole", **settings)
    stop_after(9, out_dir="out-cut", **settings)
    run(out_dir="out-cut", init_from="resume", **settings)
    assert log("out-cut") == log("out-whole") and same(weights("out-cut"), weights("out-whole"))


def test_a_cosine_that_is_lengthened_warns_of_its_jump(tiny, capsys):
    run()
    run(init_from="resume", max_iters=24, lr_decay_iters=24)
    assert "the learning rate jumps from 1.0e-03 to 6.1e-03 here" in capsys.readouterr().out
    stop_after(5, overwrite=True)
    run(init_from="resume")
    assert "jumps" not in capsys.readouterr().out


def test_a_rate_that_would_jump_up_again_is_refused(tiny):
    settings = dict(lr_schedule="wsd", cooldown=0.5)
    run(**settings)
    Path("out/stable.pt").unlink()
    with pytest.raises(ValueError, match="at step 12, its learning rate has come down from step 6 "
                                         "on, and max_iters = 20 would raise it again.*stable.pt"):
        run(init_from="resume", max_iters=20, **settings)
    run(init_from="resume", max_iters=20, force=True, **settings)
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == 20


def test_the_average_is_evaluated_and_sampled_from_where_it_is_better(tiny, monkeypatch):
    losses = iter([4.0, 3.0, 2.5, 2.0, 2.2])            # step 0; then of the weights, the average
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    run(ema_half_life=3)
    told = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [e["average_val_loss"] for e in told if "average_val_loss" in e] == [2.5, 2.2]
    best, newest = checkpoint.load("out/best.pt"), checkpoint.load("out/ckpt.pt")
    assert best["iter_num"] == 12 and best["best_val_loss"] == 2.0 and same(best["model"],
                                                                            newest["model"])
    losses = iter([4.0, 3.0, 2.5, 3.0, 2.2])
    run(ema_half_life=3, overwrite=True)
    best, newest = checkpoint.load("out/best.pt"), checkpoint.load("out/ckpt.pt")
    assert best["best_val_loss"] == 2.2 and all(
        torch.equal(best["model"][name], w) for name, w in newest["average"].items())
    assert not same(best["model"], newest["model"])


def test_patience_stops_a_run_that_no_longer_improves(tiny, monkeypatch, capsys):
    losses = iter([5.0, 4.0, 3.0, 3.1, 3.2, 3.3])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    run(patience=3, eval_interval=2, max_iters=50, lr_decay_iters=50)
    assert "no better val loss in 3 evaluations, stopped at step 10" in capsys.readouterr().out
    assert checkpoint.load("out/best.pt")["iter_num"] == 4


def test_patience_counts_on_where_a_run_goes_on(tiny, monkeypatch):
    losses = iter([5.0, 4.0, 4.1, 4.2, 4.3])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    settings = dict(patience=3, eval_interval=2, max_iters=50, lr_decay_iters=50)
    stop_after(5, **settings)
    run(init_from="resume", **settings)
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == 8


# nothing is lost

def test_a_used_folder_is_never_started_over_unasked(tiny):
    run(max_iters=2)
    before = weights()
    with pytest.raises(ValueError, match="out holds a run at step 2. --init_from=resume goes on "
                                         "with it, --out_dir=OTHER starts beside it, "
                                         "--overwrite starts over"):
        run(seed=2)
    assert same(weights(), before)
    os.unlink("out/ckpt.pt")                                    # the best alone is worth as much
    with pytest.raises(ValueError, match="out holds a run at step 2"):
        run(seed=2)
    assert Path("out/best.pt").exists()
    run(seed=2, overwrite=True, max_iters=1, eval_interval=5)
    assert checkpoint.load("out/best.pt")["iter_num"] == 1      # not the old run's
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == 1 and len(log()) < 12


def val_losses(monkeypatch, *values):
    """Let the evaluations of a run find these losses."""
    values = iter(values)
    monkeypatch.setattr(train, "evaluate", lambda *_: next(values))


def test_the_best_checkpoint_is_the_one_with_the_lowest_val_loss(tiny, monkeypatch):
    val_losses(monkeypatch, 10.0, 5.0, 3.0, 4.0, 3.5)
    run(eval_interval=2, max_iters=8)
    best, newest = checkpoint.load("out/best.pt"), checkpoint.load("out/ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (4, 3.0)
    assert (newest["iter_num"], newest["best_val_loss"]) == (8, 3.0)
    val_losses(monkeypatch, 3.2, 2.9, 3.1)                      # and over a resume
    run(eval_interval=2, max_iters=14, init_from="resume")
    best, newest = checkpoint.load("out/best.pt"), checkpoint.load("out/ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (12, 2.9) and newest["iter_num"] == 14


def test_it_saves_between_evaluations_too(tiny, monkeypatch):
    saved, ordinary = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save",
        lambda parts, path: (saved.append(parts["iter_num"]), ordinary(parts, path)))
    run(eval_interval=100, save_minutes=0.0)
    assert saved == [*range(1, 13), 12][:len(saved)] and len(saved) >= 12


def test_always_save_checkpoint_off_saves_only_what_is_better(tiny, monkeypatch):
    saved, ordinary = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save",
        lambda parts, path: (saved.append(parts["iter_num"]), ordinary(parts, path)))
    val_losses(monkeypatch, 10.0, 5.0, 6.0, 4.0, 4.5)
    run(eval_interval=2, max_iters=8, always_save_checkpoint=False)
    assert saved == [2, 6, 8]                                   # and the end of the run


def test_a_loss_that_is_not_a_number_stops_the_run_before_the_update(tiny):
    stop_after(5)
    parts = checkpoint.load("out/ckpt.pt")
    parts["model"]["transformer.ln_f.weight"][0] = math.nan
    checkpoint.save(parts, "out/ckpt.pt")
    before = open("out/ckpt.pt", "rb").read()
    with pytest.raises(ValueError, match="step 6: the loss is nan .* stops before the update; "
                                         "out/ckpt.pt is as it was saved before. "
                                         "A lower learning_rate than 0.01"):
        run(init_from="resume")
    assert open("out/ckpt.pt", "rb").read() == before


def test_a_gradient_that_is_not_a_number_stops_it_too(tiny, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(ValueError, match="step 1: the loss is 4.* and the gradient's norm inf"
                                         ".*nothing was saved yet"):
        run()


def test_max_hours_stops_saves_and_goes_on_another_evening(tiny, capsys):
    run(out_dir="out-whole")
    run(out_dir="out", max_hours=1e-9)
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == 1
    assert "max_hours are over at step 1" in capsys.readouterr().out
    run(out_dir="out", init_from="resume")
    assert same(weights("out"), weights("out-whole"))


def start(work, *args):
    return subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *args], cwd=work,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without {words!r}")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits(tiny, which):
    process = start(tiny, *arguments(max_iters=100000, lr_decay_iters=100000))
    wait_for(process, "step 10/")
    process.send_signal(which)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopping: finishing this step and saving" in told
    assert "stopped on request at step" in told and "--init_from=resume goes on" in told
    assert checkpoint.load("out/ckpt.pt")["iter_num"] >= 10


def test_a_second_signal_stops_at_once(tiny):
    process = start(tiny, *arguments(max_iters=100000, lr_decay_iters=100000,
                                     gradient_accumulation_steps=4001))
    wait_for(process, "step 0: val loss")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    wait_for(process, "stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT and not Path("out/ckpt.pt").exists()


def kill_and_resume(work, kills, seed=0):
    """Kill -9 a run at random moments, resume each time; it ends as the run that nobody killed."""
    settings = dict(max_iters=100, lr_decay_iters=100, eval_interval=25, dropout=0.1,
                    save_minutes=0.0)
    run(out_dir="out-whole", **settings)
    rng, killed, init_from = random.Random(seed), 0, "scratch"
    while killed < kills:
        process = start(work, *arguments(out_dir="out-cut", init_from=init_from, **settings))
        wait_for(process, "output ")
        time.sleep(rng.uniform(0.0, 2.5))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
        if Path("out-cut/ckpt.pt").exists():
            checkpoint.load("out-cut/ckpt.pt")          # whole, always
            init_from = "resume"
            if checkpoint.load("out-cut/ckpt.pt")["iter_num"] == settings["max_iters"]:
                assert (log("out-cut") == log("out-whole")
                        and same(weights("out-cut"), weights("out-whole")))
                for f in Path("out-cut").iterdir():     # finished: begin again
                    f.unlink()
                init_from = "scratch"
    script("train.py", *arguments(out_dir="out-cut", init_from=init_from, **settings), cwd=work)
    assert log("out-cut") == log("out-whole") and same(weights("out-cut"), weights("out-whole"))


def test_killed_at_any_moment_a_resumed_run_ends_the_same(tiny):
    kill_and_resume(tiny, kills=2)


@pytest.mark.slow
def test_killed_at_20_random_moments(tiny):
    kill_and_resume(tiny, kills=20, seed=1)


# several processes, other beginnings, other tools

def two_processes(work, *args):
    """Run train.py as torchrun starts it; torchrun itself runs in test_readme.py."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda rank: script(
            "train.py", *args, cwd=work, check=False,
            env={**world, "RANK": rank, "LOCAL_RANK": rank}), ("0", "1")))


@pytest.mark.parametrize("settings", [{}, MUON], ids=["adamw", "muon"])
def test_two_processes_give_the_losses_of_one(tiny, settings):
    run(out_dir="out-one", eval_iters=5, **settings)
    told = two_processes(tiny, *arguments(out_dir="out-two", eval_iters=5, **settings))
    assert [done.returncode for done in told] == [0, 0], told
    one, two = log("out-one"), log("out-two")
    assert one.keys() == two.keys() and all(two[k] == pytest.approx(one[k], abs=1e-4) for k in one)
    assert sum(done.stdout.count("step 0: val loss") for done in told) == 1
    a, b = weights("out-one"), weights("out-two")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert len(checkpoint.load("out-two/ckpt.pt")["rng"]) == 2


def test_an_accumulation_that_the_processes_cannot_share_is_named(tiny):
    for done in two_processes(tiny, *arguments(gradient_accumulation_steps=3)):
        assert ("gradient_accumulation_steps = 3 is not a multiple of the 2 processes. "
                "Nearest that works: 2") in done.stderr


def test_it_prepares_the_one_file_that_it_can_mean(work):
    write_parquet("data/fineweb_one_shard/000_00000.parquet", documents(200))
    done = script("train.py", *arguments(dataset="fineweb", vocab_size=50304, max_iters=2),
                  cwd=work)
    assert ("data/fineweb is not prepared yet: doing that first, from data/fineweb_one_shard"
            in done.stdout)
    assert Path("data/fineweb/meta.json").exists() and Path("out/ckpt.pt").exists()


def test_it_finishes_a_prepare_that_was_killed_between_its_renames(work, prepared):
    folder = work / "data" / "tiny"
    folder.mkdir(parents=True)
    for f in (prepared / "data" / "tiny").iterdir():
        name = f.name if f.name == "train.bin" else f"{f.name}.new"
        (folder / name).write_bytes(f.read_bytes())
    run(dataset="tiny", vocab_size=50304, max_iters=1)
    assert Path("out/ckpt.pt").exists() and not list(folder.glob("*.new"))


def test_without_data_it_says_what_to_do(work):
    done = script("train.py", *arguments(dataset="fineweb", vocab_size=50304), cwd=work,
                  check=False)
    assert (done.returncode == 1
            and done.stderr.startswith("train.py: there is no parquet file under"))
    assert ("data/fineweb_one_shard/000_00000.parquet" in done.stderr
            and "Traceback" not in done.stderr)


def test_it_starts_from_a_folder_of_transformers_and_from_a_run(tiny):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, n_embd=32, n_layer=2, n_head=2, activation_function="gelu")).eval()
    hf.save_pretrained("hf")
    text = dict(dataset="tiny", vocab_size=50304)           # what the model has counts, 50257
    run(init_from="hf", out_dir="out-hf", max_iters=2, **text)
    data = Dataset("data/tiny", "val", 16, 50257)
    with torch.no_grad():
        windows = torch.from_numpy(np.stack([data.window(k) for k in range(12)]).astype(np.int64))
        wanted = hf(windows, labels=windows).loss.item()
    assert log("out-hf")[0, "val_loss"] == pytest.approx(wanted, abs=2e-4)
    assert checkpoint.load("out-hf/ckpt.pt")["model_args"]["block_size"] == 16
    run(init_from="out-hf", out_dir="out-more", max_iters=1, **text)
    assert log("out-more")[0, "val_loss"] == pytest.approx(log("out-hf")[2, "val_loss"], abs=1e-6)
    # with the settings that it was started with
    run(init_from="resume", out_dir="out-hf", max_iters=4, **text)
    assert checkpoint.load("out-hf/ckpt.pt")["iter_num"] == 4


def test_a_nanogpt_folder_of_characters_trains(work):
    import pickle
    text = "to be or not to be\n" * 200
    letters = sorted(set(text))
    folder = write_nanogpt(work / "data/chars", [letters.index(c) for c in text])
    (folder / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": len(letters), "stoi": {c: i for i, c in enumerate(letters)},
        "itos": dict(enumerate(letters))}))
    run(dataset="chars", max_iters=60, lr_decay_iters=60, eval_interval=60)
    assert checkpoint.load("out/ckpt.pt")["model_args"]["vocab_size"] == len(letters)
    assert log()[60, "val_loss"] < 0.7 * log()[0, "val_loss"]


def test_the_checkpoint_has_nanogpts_keys_and_plain_contents(tiny):
    run(max_iters=2)
    parts = torch.load("out/ckpt.pt", weights_only=True)
    assert ({"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
            <= parts.keys())
    assert parts["model_args"] == dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False,
                                       vocab_size=64, dropout=0.0)
    assert (parts["config"]["dataset"] == "letters"
            and {"scaler", "rng", "dataset", "versions"} <= parts.keys())


def test_eval_only_evaluates_and_changes_nothing(tiny, capsys):
    run(max_iters=6)
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    run(init_from="resume", eval_only=True)
    assert f"step 6: val loss {log()[6, 'val_loss']:.4f}" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in Path("out").iterdir()} == before


def test_a_run_folder_can_run_itself_again(tiny):
    run(out_dir="out-a", max_iters=4)
    again = configure(TrainConfig, ["out-a/config.py", "--out_dir=out-b"])
    train.main(again)
    assert log("out-a") == log("out-b")


def test_wandb_is_told(tiny):
    pytest.importorskip("wandb")
    script("train.py",
           *arguments(wandb_log=True, wandb_project="p", wandb_run_name="r", max_iters=3),
           cwd=tiny, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    files = list(tiny.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    told = files[0].read_bytes()
    assert all(word in told for word in (b"train/loss", b"val/loss", b"tokens_per_s", b"letters"))


def test_without_wandb_it_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb, or set --wandb_log=False"):
        run(wandb_log=True)


def test_tensorboard_is_told_and_a_resumed_run_goes_on_there(tiny):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(tensorboard_log=True, max_iters=2, eval_interval=2)
    run(tensorboard_log=True, max_iters=4, eval_interval=2, init_from="resume")
    told = EventAccumulator("out").Reload()
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    for name, field in {"train/loss": "train_loss", "val/loss": "val_loss", "lr": "lr"}.items():
        wanted = {e["step"]: e[field] for e in lines if field in e}
        found = {scalar.step: scalar.value for scalar in told.Scalars(name)}
        assert found == pytest.approx(wanted, rel=1e-6) and max(found) == 4


def test_without_tensorboard_it_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or set --tensorboard_log=Fal"):
        run(tensorboard_log=True)


# what it says

def test_it_tells_what_the_run_is_before_the_first_step(tiny, capsys):
    text = dict(dataset="tiny", vocab_size=50304)
    run(max_iters=3, batch_size=3, gradient_accumulation_steps=2, **text)
    told = capsys.readouterr().out
    data = Dataset("data/tiny", "train", 16, 50304)
    model = GPT(GPTConfig(**model_args(TrainConfig(**{**TINY, **text}))))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters" in told
    assert f"{data.n_tokens:,} tokens in {data.n_documents} documents to train on" in told
    assert "96 tokens = 3 windows x 2 micro-batches x 16" in told
    assert f"3 steps = 288 tokens = {3 * 6 / data.n_windows:.2f} epochs" in told
    assert "warning" not in told and told.index("epochs") < told.index("step 0: val loss")


def test_it_warns_of_epochs_that_give_nothing(tiny, capsys):
    n = Dataset("data/letters", "train", 16, 64).n_windows
    run(max_iters=20 * n // 8, n_layer=1, n_head=1, n_embd=4, max_hours=1e-9)
    told = capsys.readouterr().out
    assert ("epochs: about 4 are nearly as good as new text" in told
            and f"--max_iters={4 * n // 8}" in told)


def test_a_dry_run_tells_the_plan_and_touches_nothing(tiny, capsys):
    run(dry_run=True)
    assert "micro-step" in capsys.readouterr().out and not Path("out").exists()


# memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")


def no_room_for(monkeypatch, most, error=FULL):
    """Let every micro-batch of more than `most` windows run out of memory, half-way through."""
    plain = GPT.loss

    def loss(self, x, targets):
        if len(x) > most and not isinstance(x, FakeTensor):         # which the plan traces
            if torch.is_grad_enabled():
                plain(self, x[:1], targets[:1]).backward()      # some gradients are there already
            raise error
        return plain(self, x, targets)
    monkeypatch.setattr(GPT, "loss", loss)


@pytest.mark.parametrize("error", [
    FULL,
    RuntimeError("MPS backend out of memory (MPS allocated: 18.03 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)")])
def test_out_of_memory_goes_on_with_smaller_micro_batches_and_the_same_losses(
        tiny, monkeypatch, capsys, error):
    run(out_dir="out-room", max_iters=6)
    no_room_for(monkeypatch, 1, error)
    run(out_dir="out-full", max_iters=6)
    said = capsys.readouterr().out
    for what in ("a step", "an evaluation"):
        for B in (2, 1):                    # of 4
            assert f"out of memory in {what}: going on with {B} windows at a time" in said
    room, full = log("out-room"), log("out-full")
    assert room.keys() == full.keys()
    assert all(full[k] == pytest.approx(room[k], abs=1e-4) for k in room)
    for name, w in weights("out-room").items():
        assert torch.allclose(w, weights("out-full")[name], atol=1e-3), name


def test_the_type_of_error_that_cuda_raises_is_known():
    assert torch.cuda.OutOfMemoryError is torch.OutOfMemoryError
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert not runtime.is_out_of_memory(RuntimeError("shapes do not match"))


def test_one_window_that_does_not_fit_is_one_sentence_and_loses_nothing(tiny, monkeypatch):
    run(max_iters=2)
    before = weights()
    no_room_for(monkeypatch, 0)
    with pytest.raises(ValueError, match="out of memory in a step with 1 windows at a time, cpu. A "
                                         "smaller block_size, n_layer or n_embd fits"):
        run(init_from="resume", max_iters=4, eval_interval=50)
    assert same(weights(), before)


def test_an_error_that_is_not_about_memory_keeps_its_traceback(tiny, monkeypatch):
    no_room_for(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run()


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_real_limit_of_memory_is_survived(tiny):
    """32 windows of 128 need more than what is left, a few of them do not."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch, train
train.plan.machine = lambda *a: {{"name": "cpu", "kind": "cpu", "memory": 1e12, "room": 1e12,
                                 "flops": 1e12, "rated": False}}
evaluate, limit = train.evaluate, []
def and_then_limit(*a):             # when all threads run
    value = evaluate(*a)
    if not limit:
        limit.append(int(open("/proc/self/statm").read().split()[0]) * 4096 + 350 * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit[0], limit[0]))
    return value
train.evaluate = and_then_limit
from configurator import configure
train.main(configure(train.TrainConfig, sys.argv[1:]))
"""
    small = dict(dataset="tiny", vocab_size=50304, block_size=128, n_embd=32, n_layer=2,
                 gradient_accumulation_steps=1, max_iters=2, eval_iters=1, learning_rate=1e-4)
    done = subprocess.run([sys.executable, "-c", program,
                           *arguments(**{**small, "batch_size": 32, "out_dir": "out-full"})],
                          text=True, capture_output=True, cwd=tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of memory in a step: going on with" in done.stdout
    run(**{**small, "batch_size": 2, "gradient_accumulation_steps": 16, "eval_iters": 16})
    one, other = log("out-full"), log()
    assert all(one[k] == pytest.approx(other[k], abs=1e-4) for k in other)


@pytest.mark.parametrize("settings, B, accumulation", [
    (dict(batch_size=0, tokens_per_step=128), 8, 1), (dict(tokens_per_step=256), 4, 4)])
def test_a_step_of_so_many_tokens_reads_the_same_windows_however_it_is_cut(
        tiny, settings, B, accumulation):
    tokens = settings["tokens_per_step"]
    run(out_dir="out-told", batch_size=1, gradient_accumulation_steps=tokens // 16, eval_iters=12)
    run(**{"eval_iters": 12 // B or 1, **settings})
    told, found = log("out-told"), log()
    assert {k for k in told if k[1] == "train_loss"} <= found.keys()
    assert all(found[k] == pytest.approx(told[k], abs=1e-4) for k in told if k[1] == "train_loss")
    cfg = checkpoint.load("out/ckpt.pt")["config"]
    assert (cfg["batch_size"], cfg["gradient_accumulation_steps"]) == (B, accumulation)


def test_batch_size_0_keeps_the_tokens_of_a_step_that_the_config_gives(tmp_path):
    mission = str(PROJECT / "config/train_fineweb_4070_one_shard.py")
    assert configure(TrainConfig, [mission, "--batch_size=0"]).tokens_per_step == 491_520
    cfg = configure(TrainConfig, [mission, "--batch_size=0", "--tokens_per_step=524288"])
    assert cfg.tokens_per_step == 524_288
    (tmp_path / "own.py").write_text("batch_size = 0\nblock_size = 256\n")
    assert configure(TrainConfig, [str(tmp_path / "own.py")]).tokens_per_step == 12 * 40 * 256


@pytest.mark.parametrize("settings, words", [
    (dict(tokens_per_step=100), "tokens_per_step = 100 is not a multiple of batch_size x block_size"
                                " = 64. Nearest that works: 64"),
    (dict(tokens_per_step=100, batch_size=0), "not a multiple of block_size = 16. Nearest that "
                                              "works: 96"),
    (dict(batch_size=0), "batch_size = 0 takes what fits, and needs tokens_per_step"),
    (dict(batch_size=-1), "0 takes what fits")])
def test_steps_that_cannot_be_cut_are_named(settings, words):
    with pytest.raises(ValueError) as error:
        TrainConfig(**{**TINY, **settings})
    assert words in str(error.value)


def test_what_does_not_fit_is_refused_with_what_does_unless_forced(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train.plan, "machine", lambda *a: {
        "name": "a small card", "kind": "cuda", "memory": 3e6, "room": 2e6, "flops": None,
        "rated": False})
    with pytest.raises(ValueError, match=r"batch_size = 64 needs 5 MiB of memory and a small card "
                                         r"has room for 2 MiB. --batch_size=\d+ .*--force starts"):
        run(batch_size=64)
    assert not Path("out").exists()
    run(batch_size=64, max_iters=1, force=True)
    assert "DOES NOT FIT" in capsys.readouterr().out and checkpoint.in_folder("out")


def test_the_bar_shows_loss_rate_epoch_and_time_left(tiny):
    """On a terminal, which a pseudo-terminal is."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *arguments(max_iters=40)],
        cwd=tiny, stdout=follower, stderr=follower)
    os.close(follower)
    told = b""
    while True:
        try:
            told += os.read(leader, 65536)
        except OSError:
            break
    assert process.wait(timeout=60) == 0
    last = [line for line in told.decode().split("\r") if "40/40" in line][-1]
    assert all(word in last
               for word in ("100%", "loss=", "lr=", "tok/s=", "epoch=", "step/s")), last
    assert "step 12: val loss" in told.decode()
