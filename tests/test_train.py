"""Are the numbers of a run right? Most tests run train.main in this process, eager and in fp32."""
import fcntl
import math
import os
import pickle
import re
import shutil
import struct
import termios
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import PROJECT, documents, free_port, run, write_nanogpt, write_parquet
from model import GPT, GPTConfig
from onecard import optim
from onecard.dataset import Dataset
from onecard.runlog import read_log
from onecard.settings import UserError, configure
from tiny_run import MUON, TINY, contents, log, run_tiny, same, saved, start, weights
from train import TrainConfig


def windows(data, numbers):
    """(idx, targets) of these windows of val, as the file has them."""
    ids = torch.from_numpy(np.stack([data.window(k) for k in numbers]).astype(np.int64))
    return ids[:, :-1], ids[:, 1:]


def test_the_loss_falls_and_the_log_has_every_step(tiny, capsys):
    run_tiny(max_iters=60, lr_decay_iters=60, eval_interval=20)
    entries, out = log(), capsys.readouterr().out
    assert "warning    letters does not say" in out and out.index("epochs") < out.index("step 0:")
    assert entries[1, "train_loss"] == pytest.approx(math.log(64), abs=0.2)
    # three ids may follow each one
    assert math.log(3) < entries[60, "val_loss"] < entries[0, "val_loss"] - 2
    assert [step for step, name in entries if name == "val_loss"] == [0, 20, 40, 60]
    assert [step for step, name in entries if name == "train_loss"] == list(range(1, 61))
    assert entries[60, "tokens"] == 60 * 4 * 2 * 16


def test_a_step_is_what_torch_makes_of_the_same_windows(tiny):
    """Three steps by hand: plain AdamW, the mean loss of all windows, clipped gradients."""
    run_tiny(max_iters=3, grad_clip=0.5)
    cfg = TrainConfig(**{**TINY, "max_iters": 3})
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig.of(cfg))
    data = Dataset("data/letters", "train", 16, cfg.seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), foreach=False)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, cfg)
        ids = torch.from_numpy(np.stack([data.sample(step * 8 + i) for i in range(8)]).astype(int))
        loss = model(ids[:, :-1], ids[:, 1:])
        assert log()[step + 1, "train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert log()[step + 1, "grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.allclose(w, weights()[k], atol=1e-5) for k, w in model.state_dict().items())


def test_the_logged_loss_is_the_mean_over_all_micro_batches(tiny):
    for out_dir, batch, accumulate in (("out-a", 8, 1), ("out-b", 2, 4), ("out-c", 1, 8)):
        run_tiny(out_dir=out_dir, batch_size=batch, gradient_accumulation_steps=accumulate,
                 eval_iters=24 // batch)
    run_tiny(out_dir="out-d", batch_size=0, tokens_per_step=8 * 16, eval_iters=2)   # what fits
    assert saved(out_dir="out-d")["config"]["batch_size"] == 8
    a = log("out-a")
    for out_dir in ("out-b", "out-c", "out-d"):
        other = log(out_dir)
        assert other.keys() == a.keys()
        assert all(other[k] == pytest.approx(a[k], rel=1e-4) for k in a)


@pytest.mark.parametrize("eval_iters, batch_size", [(5, 4), (1000, 64)])
def test_validation_is_the_mean_over_the_first_windows_or_all(tiny, eval_iters, batch_size):
    run_tiny(eval_iters=eval_iters, batch_size=batch_size, max_iters=1)
    data = Dataset("data/letters", "val", 16)
    model = GPT.from_checkpoint(saved())
    n = min(eval_iters * batch_size, data.n_windows)
    with torch.no_grad():
        loss = model(*windows(data, range(n))).item()
    assert log()[1, "val_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_follows_fp32(tiny, dtype):
    run_tiny(out_dir="out-32")
    run_tiny(out_dir="out-16", dtype=dtype)
    a, b = log("out-32"), log("out-16")
    assert all(b[k] == pytest.approx(a[k], abs=0.05) for k in a if "loss" in k[1])
    assert weights("out-16")["lm_head.weight"].dtype == torch.float32


def test_compiled_training_is_eager_training(tiny):
    settings = dict(max_iters=4, n_layer=1)     # each layer takes seconds to compile
    run_tiny(out_dir="out-eager", **settings)
    process = start(tiny, out_dir="out-compiled", compile=True, **settings)
    assert "compiling the model" in process.communicate()[0]
    a, b = log("out-eager"), log("out-compiled")
    assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-3) for k in a)
    assert weights("out-compiled").keys() == weights("out-eager").keys()    # no _orig_mod.


def test_without_a_compiler_it_names_what_is_missing_and_goes_on(tiny, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    run_tiny(compile=True, max_iters=1)
    out = capsys.readouterr().out
    assert "torch.compile cannot work here" in out and "g++" in out


def test_muon_and_the_modern_network_learn_faster(tiny):
    settings = dict(max_iters=30, lr_decay_iters=30, eval_interval=30, eval_iters=20)
    run_tiny(**settings, **MUON)
    run_tiny(out_dir="out-gpt2", **settings)
    modern, gpt2 = log(), log("out-gpt2")
    assert modern[0, "val_loss"] == pytest.approx(math.log(64), abs=1e-4)
    assert modern[30, "val_loss"] < gpt2[30, "val_loss"] < modern[0, "val_loss"] - 0.5


@pytest.mark.parametrize("name", ["evening", "week", "64m"])
def test_the_recipes_train(tiny, name):
    """As they are, but small."""
    cfg = configure(TrainConfig, [str(PROJECT / f"config/train_fineweb_4070_{name}.py")])
    small = ("dataset", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "batch_size",
             "gradient_accumulation_steps", "eval_iters", "device", "dtype", "compile")
    cfg = replace(cfg, **{key: TINY[key] for key in small}, tokens_per_step=0, max_iters=40,
                  warmup_iters=5, log_interval=1, momentum_warmup=20, eval_interval=50)
    run_tiny(**vars(cfg))
    entries = log(cfg.out_dir)
    assert entries[40, "val_loss"] < entries[0, "val_loss"] - 0.8
    assert saved("stable.pt", cfg.out_dir)["iter_num"] == optim.cooldown_start(cfg)


def test_a_run_is_fitted_to_its_hours_and_a_resumed_one_ends_at_the_same_step(tiny, capsys):
    hours = dict(hours=0.001, max_iters=10**6, lr_decay_iters=10**6, eval_interval=200)     # 3.6 s
    run_tiny(max_hours=0.0005, **hours)
    fitted, = re.findall(r"hours      ([\d,]+) steps fit into 0.001 hours", capsys.readouterr().out)
    fitted = int(fitted.replace(",", ""))
    assert 22 < saved()["iter_num"] < fitted == saved()["config"]["max_iters"]
    run_tiny(init_from="resume", **hours)
    assert saved()["iter_num"] == fitted and 0.0005 < saved()["hours"] < 0.004
    assert f"fitted to 0.001 hours: it ends after {fitted:,} steps" in capsys.readouterr().out
    run_tiny(init_from="resume", dry_run=True, **hours)
    assert "advice" not in capsys.readouterr().out      # it has its recipe
    rates = [rate for (step, name), rate in log().items() if name == "lr" and step > fitted - 5]
    assert rates and max(rates) < 3e-3                  # min_lr is 1e-3, the highest was 1e-2


def test_hours_that_are_too_few_take_the_shortest_schedule(tiny):
    run_tiny(hours=1e-6, max_iters=10**6, warmup_iters=30, lr_schedule="wsd", cooldown=0.5)
    assert saved()["iter_num"] == 63 and saved("stable.pt")["iter_num"] >= 30
    assert log()[63, "lr"] < 2e-3                       # min_lr is 1e-3, the highest was 1e-2


@pytest.mark.parametrize("settings", [{}, dict(lr_schedule="wsd", cooldown=0.5)])
def test_hours_change_no_run_that_decays_its_rate_already(tiny, settings):
    run_tiny(max_hours=1e-9, **settings)                # one step: it can still be fitted
    run_tiny(init_from="resume", max_iters=9, eval_interval=9, lr_decay_iters=12, **settings)
    with pytest.raises(UserError, match="decays its learning rate already, so --hours=5 can no"):
        run_tiny(init_from="resume", hours=5.0, **settings)


def test_one_can_watch_it_learn_and_that_changes_nothing(tiny, capsys):
    letters = dict(dataset="tiny", vocab_size=50304, dropout=0.2, max_iters=2, eval_interval=1)
    run_tiny(out_dir="out-quiet", **letters | dict(eval_interval=100), sample_tokens=0)
    assert "it writes" not in capsys.readouterr().out
    run_tiny(**letters, sample_tokens=20)
    assert capsys.readouterr().out.count("\n    it writes: ") == 2         # not at step 0
    samples = [entry["sample"] for entry in read_log("out/log.jsonl") if "val_loss" in entry]
    assert len(samples) == 3 and all(samples) and samples[0] != samples[-1]
    assert same(weights("out-quiet"), weights())


# several processes, other data

def two_processes(folder, local_ranks="01", second=None, **settings):
    """Run train.py as torchrun starts it. Returns (exit status, output) of both processes.

    The second one runs in the folder `second`, as if it was on another machine.
    """
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    processes = [start(where, env={**world, "RANK": rank, "LOCAL_RANK": local_rank}, **settings)
                 for where, rank, local_rank in zip((folder, second or folder), "01", local_ranks,
                                                    strict=True)]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()              # where one waits for the other for ever
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("settings, local_ranks", [({}, "01"), (MUON, "00")],
                         ids=["adamw on one machine", "muon on two machines"])
def test_two_processes_give_the_losses_of_one(tiny, settings, local_ranks):
    run_tiny(out_dir="out-one", eval_iters=5, **settings)
    codes, outputs = two_processes(tiny, local_ranks, out_dir="out-two", eval_iters=5, **settings)
    assert codes == [0, 0], outputs
    one, two = log("out-one"), log("out-two")
    assert one.keys() == two.keys() and all(two[k] == pytest.approx(one[k], abs=1e-4) for k in one)
    assert sum(output.count("step 0: val loss") for output in outputs) == 1
    a, b = weights("out-one"), weights("out-two")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    first, second = saved(out_dir="out-two")["rng"]
    assert not torch.equal(first["cpu"], second["cpu"])     # dropout differs between ranks


def test_processes_that_know_different_best_losses_save_together(tiny):
    run_tiny(lr_decay_iters=24)
    shutil.copytree(tiny, "second", ignore=shutil.ignore_patterns("best.pt", "second"))
    best = {**saved("best.pt"), "best_val_loss": 0.0}       # only the first machine knows it
    torch.save(best, "out/best.pt")
    codes, outputs = two_processes(tiny, "00", second="second", init_from="resume", max_iters=24,
                                   lr_decay_iters=24, always_save_checkpoint=False)
    assert codes == [0, 0], outputs
    assert saved()["iter_num"] == 24 and saved()["best_val_loss"] == 0.0


def test_a_step_that_the_processes_cannot_share_is_named(tiny):
    codes, outputs = two_processes(tiny, batch_size=0, tokens_per_step=16)
    assert codes == [1, 1]
    for output in outputs:
        assert "a step has 1 windows, which 2 processes cannot share" in output


def test_missing_data_is_prepared_first(work, capsys):
    write_parquet("data/fineweb_one_shard/000_00000.parquet", documents(200))
    run_tiny(dataset="fineweb", vocab_size=50304, max_iters=2)
    assert "data/fineweb is not prepared" in capsys.readouterr().out
    assert Path("data/fineweb/meta.json").exists() and Path("out/ckpt.pt").exists()


def test_a_nanogpt_folder_of_characters_trains(work):
    text = "to be or not to be\n" * 200
    letters = sorted(set(text))
    folder = write_nanogpt(work / "data/chars", [letters.index(c) for c in text])
    (folder / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": len(letters), "stoi": {c: i for i, c in enumerate(letters)},
        "itos": dict(enumerate(letters))}))
    run_tiny(dataset="chars", max_iters=20, lr_decay_iters=20, eval_interval=20)
    assert saved()["model_args"]["vocab_size"] == len(letters)
    assert log()[20, "val_loss"] < 0.7 * log()[0, "val_loss"]


# reports

def test_a_dry_run_prints_the_plan_without_data_and_changes_nothing(work, capsys):
    run(train, PROJECT / "config/train_fineweb_4070_one_shard.py", "--dry_run",
        "--device_name=RTX 4070", "--n_tokens=700_000_000")
    out = capsys.readouterr().out
    assert "64.0 M parameters" in out and "491,520 tokens" in out and "122.88 G tokens" in out
    write_parquet("data/mine/a.parquet", documents(200))    # not prepared
    before = sorted(work.rglob("*"))
    for dataset in ("nothing", "mine"):
        run(train, "--dry_run", f"--dataset={dataset}", "--n_layer=1")
    assert sorted(work.rglob("*")) == before


def test_the_bar_shows_loss_rate_and_epoch_on_a_terminal(tiny):
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = start(tiny, terminal=follower, max_iters=40)
    os.close(follower)
    out = b""
    while True:
        try:
            out += os.read(leader, 65536)
        except OSError:
            break
    assert process.wait(timeout=60) == 0
    last = [line for line in out.decode().split("\r") if "40/40" in line][-1]
    assert all(word in last for word in ("100%", "loss=", "lr=", "tok/s=", "epoch=")), last


def test_eval_only_evaluates_and_changes_nothing(tiny, capsys):
    run_tiny(max_iters=6)
    before = contents("out")
    run_tiny(init_from="resume", eval_only=True)
    assert f"step 6: val loss {log()[6, 'val_loss']:.4f}" in capsys.readouterr().out
    assert contents("out") == before


def test_a_run_folder_can_run_itself_again(tiny):
    run_tiny(out_dir="out-a", max_iters=4)
    run(train, "out-a/config.py", "--out_dir=out-b")
    assert log("out-a") == log("out-b")


def test_wandb_gets_the_numbers(tiny):
    pytest.importorskip("wandb")
    process = start(tiny, wandb_log=True, wandb_project="p", max_iters=3)
    assert "finished at step 3" in process.communicate()[0]
    files = list(tiny.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    assert all(word in content for word in (b"train/loss", b"val/loss", b"tokens_per_s"))


def test_tensorboard_gets_the_numbers_also_of_a_resumed_run(tiny):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_tiny(tensorboard_log=True, max_iters=2, eval_interval=2)
    run_tiny(tensorboard_log=True, max_iters=4, eval_interval=2, init_from="resume")
    events = EventAccumulator("out").Reload()
    for name, field in {"train/loss": "train_loss", "val/loss": "val_loss", "lr": "lr"}.items():
        logged = {entry["step"]: entry[field] for entry in read_log("out/log.jsonl")
                  if field in entry}
        found = {scalar.step: scalar.value for scalar in events.Scalars(name)}
        assert found == pytest.approx(logged, rel=1e-6) and max(found) == 4
