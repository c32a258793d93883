"""Are all reports true, and does none of them ever end a run?"""
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import PROJECT, run
from onecard.cards import Machine
from onecard.logfile import measured_speed, read_log
from onecard.resume import Progress
from onecard.runlog import RunLog
from onecard.runtime import World
from onecard.settings import UserError
from tiny_run import arguments, run_steps, run_tiny, saved, start, wait_for
from train import TrainConfig

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.mark.parametrize("redirections", [
    ">&- 2>/dev/full <&-", "2>&1 | head -n 1; exit ${PIPESTATUS[0]}"])
def test_a_run_goes_on_when_nothing_can_be_printed(tiny, redirections):
    command = f"{sys.executable} {PROJECT / 'train.py'} {' '.join(arguments())} {redirections}"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.returncode == 0 and saved()["iter_num"] == 12
    assert len(read_log("out/log.jsonl")) == 1 + 12 + 3     # and where it began


def test_without_a_terminal_steps_are_printed_every_ten_seconds_at_most(tiny, capsys):
    run_tiny()
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d+)/12: loss", out, re.M) == ["1"]             # and then it ended
    assert len(read_log("out/log.jsonl")) == 1 + 12 + 3         # nothing is left out there


def test_ctrl_c_saves_although_it_ends_the_reader_of_the_pipe_too(tiny):
    process = start(tiny, max_iters=10**6, lr_decay_iters=10**6)
    wait_for(process, "step 10/")
    process.stdout.close()                          # as tee does on Ctrl-C
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and saved()["iter_num"] >= 10


def test_a_closed_terminal_saves_the_run(tiny):
    master, terminal = os.openpty()
    process = start(tiny, terminal=terminal, max_iters=10**6, lr_decay_iters=10**6)
    os.close(terminal)
    text = b""
    while b"step 12: val loss" not in text:
        text += os.read(master, 1000)
    os.close(master)                                # sends SIGHUP
    assert process.wait(60) == 0 and saved()["iter_num"] > 1


def limit_files(process, n_bytes):
    """No file that the process writes can grow beyond this: as if the disk was full."""
    limit = (n_bytes, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_stops_no_run_and_is_made_up_for_later(tiny):
    process = start(tiny, max_iters=10**6, lr_decay_iters=10**6, eval_interval=10)
    wait_for(process, "step 11/")
    first = saved()
    limit_files(process, 4000)
    wait_for(process, "warning")
    wait_for(process, "step 40/")
    assert saved()["iter_num"] == first["iter_num"]     # whole, as it was
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, UNLIMITED)
    wait_for(process, "step 60/")
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped on request" in out
    steps = [entry["step"] for entry in read_log("out/log.jsonl") if "train_loss" in entry]
    assert steps == list(range(1, saved()["iter_num"] + 1))
    losses = [entry["val_loss"] for entry in read_log("out/log.jsonl") if "val_loss" in entry]
    assert saved("best.pt")["best_val_loss"] == saved()["best_val_loss"] >= min(losses[1:])


def test_a_run_that_could_not_be_saved_at_its_end_says_so_and_fails(tiny):
    process = start(tiny, max_iters=10**6, lr_decay_iters=10**6, eval_interval=10)
    wait_for(process, "step 11/")
    limit_files(process, 4000)
    wait_for(process, "could not write out/ckpt.pt")
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "could not be saved, as the warning above says; the last one that was saved is 10" in out
    run_tiny(init_from="resume", max_iters=saved()["iter_num"] + 1)


BAD_LINES = [b"5", b"null", b"{}", b'{"step": "3"}', b'{"step": null}',
             b"\xff\xfe\x00", b'{"step": 2, "tra', b"[1, 2]", b"[" * 5000]


def test_a_line_that_is_not_ours_is_skipped(tiny):
    pytest.importorskip("matplotlib")
    import plot
    run_steps(3)
    good = Path("out/log.jsonl").read_bytes()
    lines = good.splitlines()
    Path("out/log.jsonl").write_bytes(b"\n".join(BAD_LINES + lines + BAD_LINES))
    assert read_log("out/log.jsonl") == [json.loads(line) for line in lines]
    run(plot, "out")
    run_tiny(init_from="resume")
    steps = [entry["step"] for entry in read_log("out/log.jsonl") if "train_loss" in entry]
    assert steps == list(range(1, 13))


def test_after_20_steps_the_measured_speed_is_said_and_logged(tiny, capsys):
    run_tiny(max_iters=22, lr_decay_iters=22)
    said, = re.findall(r"measured   ([\d,]+) tokens/s: .* from here, until \w+ \d+ \w+, \d+:\d+\n",
                       capsys.readouterr().out)
    entry, = [e for e in read_log("out/log.jsonl") if e.get("event") == "measured"]
    assert entry["step"] == 21 and entry["predicted_tokens_per_s"] is None      # a CPU
    assert f"{entry['measured_tokens_per_s']:,.0f}" == said
    # a resumed run is planned by it, on the same device with as many processes
    machine = Machine(read_log("out/log.jsonl")[0]["device"], "cpu", torch.float32, math.inf)
    assert measured_speed("out", machine) > 0
    assert measured_speed("out", replace(machine, count=2)) is None
    assert measured_speed("out", replace(machine, name="RTX 4070")) is None


def test_a_minute_of_slow_steps_is_said_once(capsys):
    plan = SimpleNamespace(cfg=TrainConfig())
    log = RunLog(plan, World(torch.device("cpu")), Progress())
    log.recent.extend(100 * [1.0])
    for seconds in [1.5] * 100 + [3.0] * 20 + [1.0] + [3.0] * 20:       # never a whole minute
        log.warn_of_slow_steps(seconds)
    assert not capsys.readouterr().out
    for _ in range(100):
        log.warn_of_slow_steps(3.0)
    assert capsys.readouterr().out.count("steps take over twice as long as before") == 1


def test_what_is_not_finite_is_null_in_the_log(tiny):
    run_tiny(dtype="float16", max_iters=3)          # its first gradients may overflow
    for line in Path("out/log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_hours_do_not_come_from_a_clock_that_can_be_set_back(tiny, monkeypatch):
    clock = iter(range(10**9, 0, -86400))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    run_tiny(max_hours=1e-9, max_iters=50)
    assert saved()["iter_num"] == 1 and saved()["hours"] > 0


def test_wandb_that_does_not_start_is_one_sentence_before_the_first_step(tiny, monkeypatch):
    wandb = SimpleNamespace(init=lambda **settings: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match="wandb does not start .division by zero.*wandb login"):
        run_tiny(wandb_log=True)
    assert not Path("out/log.jsonl").exists()


def test_a_resumed_run_is_the_same_run_in_wandb_and_a_failing_one_is_left_out(tiny, monkeypatch,
                                                                              capsys):
    ids = []

    def init(**settings):
        ids.append(settings["id"])
        return SimpleNamespace(id=settings["id"] or "abc")

    wandb = SimpleNamespace(init=init, log=lambda numbers, step: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_steps(2, wandb_log=True)
    assert ids == [None, "abc"] and saved()["wandb_id"] == "abc"
    assert "Wandb failed, and the run goes on without it" in capsys.readouterr().out
