"""Do the tools of dev/ run? What they measure needs a GPU."""
import json
import re
import sys

import torch

from conftest import PROJECT, run
from onecard.runtime import World
from train import TrainConfig

sys.path.append(str(PROJECT / "dev"))
import bench  # noqa: E402
import gpu_check  # noqa: E402
import plans  # noqa: E402


def test_the_check_for_gpus_runs_on_any_computer(work, capsys):
    run(gpu_check, "--toy=True", "--out=rows.jsonl")
    out = capsys.readouterr().out
    assert "BROKEN" not in out and "a graph changes no token" in out
    rows = [json.loads(line) for line in open("rows.jsonl", encoding="utf-8")]
    speeds = [row["tokens_per_s"] for row in rows if row.get("config") == "mission"]
    assert len(speeds) == 6 and min(speeds) > 0
    assert all(row["planned_gib"] > 0 for row in rows if "config" in row)
    assert [row["graph"] for row in rows if "sampling" in row] == [True, False]


def test_the_bench_compares_with_a_plain_gpt2(capsys):
    bench.main(TrainConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=256,
                           compile=False, max_iters=200))
    out = capsys.readouterr().out
    assert "plain " in out and "ours " in out and "ratio " in out
    assert re.search(r"time       .*: 200 steps of .* tokens/s as measured\n", out)
    columns = (PROJECT / "dev" / "cards.md").read_text(encoding="utf-8").split("|---|")[0]
    assert out.splitlines()[-1].count("|") == columns.splitlines()[-1].count("|") == 8


def test_a_plain_gpt2_that_has_no_memory_takes_smaller_micro_batches(monkeypatch):
    class SmallMemory(bench.PlainGPT):
        def forward(self, idx, targets):
            if idx.size(0) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")
            return super().forward(idx, targets)

    monkeypatch.setattr(bench, "PlainGPT", SmallMemory)
    cfg = TrainConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32, compile=False,
                      batch_size=12, tokens_per_step=24 * 16)
    stepper = bench.plain_stepper(cfg, World(torch.device("cpu")))
    assert (stepper.batch_size, stepper.n_tokens) == (3, 24 * 16) and stepper.step() > 0


def test_the_table_of_recipes_and_cards_is_todays(capsys):
    plans.main()
    table = capsys.readouterr().out
    assert table.count("\n") > 20
    assert table in (PROJECT / "dev" / "cards.md").read_text(encoding="utf-8")
