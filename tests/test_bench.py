"""What the benchmark measures is what it says."""
import json
import sys
from pathlib import Path

import pytest
import torch

import plan
from bench import Plain
from conftest import script
from model import GPT, GPTConfig

SHAPE = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=64, bias=False)


def test_the_baseline_is_the_same_network():
    ours, plain = GPT(GPTConfig(**SHAPE)), Plain(GPTConfig(**SHAPE))
    names = {"transformer.": "", "attn.c_attn": "c_attn", "attn.c_proj": "c_proj",
             "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    weights = {}
    for name, tensor in ours.state_dict().items():
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        weights[name] = tensor
    weights.pop("lm_head.weight")
    plain.load_state_dict(weights)
    idx, targets = torch.randint(320, (3, 32)), torch.randint(320, (3, 32))
    assert ours(idx, targets).item() == pytest.approx(plain(idx, targets)[1].item(), rel=1e-5)


def test_a_benchmark_tells_speed_memory_and_the_ratio_to_the_baseline(tiny):
    told = script("bench.py", "--dataset=tiny", "--block_size=32", "--n_layer=2", "--n_head=2",
                  "--n_embd=64", "--batch_size=16", "--gradient_accumulation_steps=3",
                  "--device=cpu", "--dtype=float32", "--compile=False", "--rounds=1",
                  cwd=tiny).stdout
    row = json.loads(Path("dev/bench.jsonl").read_text())
    s, config = row["seconds"], GPTConfig(**{**SHAPE, "vocab_size": 50304})
    micro = 16 * 32 / row["micro_tokens_per_s"]
    assert row["tokens_per_s"] == pytest.approx(
        3 * 16 * 32 / (3 * (micro + s["data"]) + s["optimizer"]), rel=1e-6)
    assert row["flops"] == pytest.approx(GPT(config).flops_per_token() * 16 * 32 / micro)
    assert all(seconds > 0 for seconds in s.values()) and 0 < row["flops"] < row["matmul_flops"]
    assert row["planned_memory"] == plan.trace(config, 16, torch.float32)["micro_step"]
    if sys.platform == "linux":
        assert row["memory"] == pytest.approx(row["planned_memory"], rel=0.3)
        assert f"{row['memory'] / 2**30:.2f} GiB at the peak" in told
    assert f"{row['tokens_per_s']:,.0f} tokens/s" in told
