"""Every number of the plan against an independent count."""
import functools
import json
import math
import re
import shlex
import time
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

import model as model_file
import plan
from configurator import configure
from conftest import PROJECT, documents, script, write_parquet
from loader import Dataset
from model import GPT, GPTConfig, model_args
from tokenizer import GPT2Tokenizer
from train import TrainConfig

MISSION = str(PROJECT / "config/train_fineweb_4070_one_shard.py")
SMALL = GPTConfig(block_size=64, vocab_size=3200, n_layer=3, n_head=2, n_embd=64, bias=False)
CARD = {"name": "a card", "kind": "cuda", "memory": 12e9, "room": 11e9, "flops": 50e12,
        "rated": True}
TEXT = {"where": "text", "tokens": 10_000_001, "documents": 10, "error": 0, "how": "", "val_tokens":
        100_000, "prepared": True}
GIB = 2**30


def small_cfg(**settings):
    return TrainConfig(**{**model_args(SMALL), "batch_size": 4, "gradient_accumulation_steps": 6,
                          "max_iters": 100, "eval_interval": 30, "eval_iters": 5,
                          "lr_decay_iters": 3000, **settings})


def test_the_missions_plan_is_the_readmes_in_seconds_and_without_a_gpu(work):
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"^python (plan\.py .*)\n```\n\n```\n(machine .*?)```", readme,
                               re.M | re.S).groups()
    (work / "config").symlink_to(PROJECT / "config")
    began = time.time()
    told = script(*shlex.split(command), cwd=work).stdout
    assert time.time() - began < 60         # 9 s alone on two cores; tests may run beside others
    for words in ("64.0 M parameters, 37.8 M without embeddings (12 layers x 8 heads x 512)",
                  "491,520 tokens = 12 windows x 40 micro-batches x 1024",
                  "250,000 steps = 122.88 G tokens = 176 epochs", "20.5 days"):
        assert words in told, told
    # all that the README shows, but for the day of the end and this disk
    shown, told = (re.sub(r"(?m)to \w+ \d{4}.*?:\d\d:|^disk .*", "", t).split("\n")
                   for t in (shown, told))
    assert told == shown


def test_the_missions_memory_leaves_most_of_12_gib():
    cfg = configure(TrainConfig, [MISSION])
    room = plan.machine(torch.device("cpu"), torch.bfloat16, "RTX 4070")["room"]
    assert 10.7 < room / GIB < 11.2
    eager, compiled = (plan.trace(GPTConfig(**model_args(cfg)), 12, compiled=c)
                       for c in (False, True))
    assert compiled["micro_step"] < eager["micro_step"] < 4.5 * GIB
    assert plan.needed(plan.trace(GPTConfig(**model_args(cfg)), 32)) < room
    big = GPTConfig(**{**model_args(cfg), "n_head": 12, "n_embd": 768})
    assert plan.needed(plan.trace(big, 16)) < room


# parameters

@pytest.mark.parametrize("block, n_value_table", [("gpt2", 0), ("modern", 0), ("modern", 1)])
def test_parameters_are_those_of_the_model_and_the_groups_add_up(block, n_value_table):
    shape = replace(SMALL, block=block, n_value_table=n_value_table)
    planned = plan.make(small_cfg(block=block), shape, TEXT, CARD, torch.float32, False)
    n, model = planned["parameters"], GPT(shape)
    by_name = {"token embedding": "wte", "positions": "wpe", "head": "lm_head",
               "value embeddings": "wve", "attention": ".attn.", "MLP": ".mlp.", "norms": "ln_"}
    told = plan.lines(planned, small_cfg(block=block))[1]
    assert (" positions" in told) == (block == "gpt2") and (" head" in told) == (block == "modern")
    assert (" value embeddings" in told) == (n_value_table > 0)
    for group, part in by_name.items():
        assert n[group] == sum(p.numel() for name, p in model.named_parameters() if part in name)
    assert n["total"] == sum(p.numel() for p in model.parameters()) == sum(n[g] for g in by_name)


# tokens

def test_tokens_epochs_and_steps_are_those_of_a_count_by_hand():
    t = plan.make(small_cfg(), SMALL, TEXT, CARD, torch.float32, False)["tokens"]
    assert t["per_step"] == 4 * 6 * 64 and t["run"] == 100 * 4 * 6 * 64
    windows = 0
    while (windows + 1) * 64 + 1 <= TEXT["tokens"]:
        windows += 1
    assert t["unique"] == windows * 64 and t["epochs"] == t["run"] / t["unique"]
    assert t["steps_of_4_epochs"] == 4 * windows * 64 // t["per_step"]
    assert t["repeated"] == 0 and t["worth"] == t["run"]


@pytest.mark.parametrize("n, words", [(10, " in 10 documents to train"), (1, "tokens to train")])
def test_documents_are_counted_where_there_are_several(n, words):
    told = plan.make(small_cfg(), SMALL, {**TEXT, "documents": n}, CARD, torch.float32, False)
    assert words in "\n".join(plan.lines(told, small_cfg()))


@pytest.mark.parametrize("epochs", [0.5, 1, 1.7, 4, 16, 175])
def test_repeated_tokens_are_worth_what_the_law_says(epochs):
    """Each repetition is worth e^(-r / R*) of a new token: a sum over thin slices of the run."""
    slices = 20_000
    by_hand = min(epochs, 1) + sum(
        math.exp(-(max(epochs - 1, 0) * (i + 0.5) / slices) / 15.387756)
        for i in range(slices)) * max(epochs - 1, 0) / slices
    assert plan.effective_tokens(1e9, epochs * 1e9) == pytest.approx(by_hand * 1e9, rel=1e-6)
    assert plan.tokens_worth(by_hand * 1e9, 1e9) == pytest.approx(epochs * 1e9, rel=1e-3)


def test_what_no_number_of_epochs_is_worth_is_said():
    assert plan.tokens_worth(17e9, 1e9) is None and plan.effective_tokens(1e9, 1e15) < 17e9
    hungry = {**TEXT, "tokens": 1001}
    told = plan.make(small_cfg(max_iters=1), SMALL, hungry, CARD, torch.float32, False)
    assert "more than this data can be worth" in "\n".join(plan.lines(told, small_cfg()))


def truth(texts):
    encode = GPT2Tokenizer().encode
    return sum(len(encode(text)) + 1 for text in texts)


def test_a_file_that_counts_its_tokens_is_believed(work):
    import pyarrow as pa
    import pyarrow.parquet as pq
    texts = documents(300)
    pq.write_table(pa.table({"text": texts, "token_count": [truth([t]) - 1 for t in texts]}),
                   "a.parquet")
    found = plan.count_parquet("a.parquet")
    assert (found["tokens"], found["documents"], found["error"]) == (truth(texts), 300, 0)
    assert found["how"] == "its column token_count"


def test_a_file_that_does_not_is_sampled_and_the_error_bar_is_honest(work):
    inside = 0
    for seed in range(20):
        texts = documents(3000, seed=seed)
        write_parquet("a.parquet", texts, compression="zstd", use_dictionary=False)
        found = plan.count_parquet("a.parquet")
        assert found["documents"] == 3000 and 0 < found["error"] < 0.05 * found["tokens"]
        assert "8 of its 30 row groups" in found["how"]
        inside += abs(found["tokens"] - truth(texts)) <= found["error"]
    assert inside >= 16                     # of 20: two standard errors, estimated from 8 groups


def test_a_file_of_few_row_groups_is_counted_whole(work):
    texts = documents(300)
    found = plan.count_parquet(write_parquet("a.parquet", texts))
    assert (found["tokens"], found["error"]) == (truth(texts), 0)


def test_the_plan_before_preparing_is_the_plan_after(tiny):
    """But for which documents are drawn for validation."""
    write_parquet("data/other/a.parquet", documents(3000))
    before = json.loads(script("plan.py", "--dataset=other", "--json", "--block_size=64",
                               "--n_layer=1", "--compile=False", cwd=tiny).stdout)
    script("prepare.py", "--dataset=other", "--num_proc=1", cwd=tiny)
    after = json.loads(script("plan.py", "--dataset=other", "--json", "--block_size=64",
                              "--n_layer=1", "--compile=False", cwd=tiny).stdout)
    assert not before["tokens"]["prepared"] and after["tokens"]["prepared"]
    assert before["disk"]["data"] > 0 == after["disk"]["data"]
    assert after["tokens"]["tokens"] == Dataset("data/other", "train", 64, 50304).n_tokens
    assert before["tokens"]["tokens"] == pytest.approx(after["tokens"]["tokens"], rel=0.03)
    assert before["tokens"]["val_tokens"] == pytest.approx(after["tokens"]["val_tokens"], rel=0.15)


@pytest.mark.parametrize("given, told", [
    (["a.parquet", "b.parquet"], "a.parquet, b.parquet: each says how much text there is"),
    (["a.parquet", "--n_tokens=9"], "a.parquet and --n_tokens: each says how much text there is")])
def test_no_word_on_how_much_text_there_is_is_ignored(work, given, told):
    done = script("plan.py", MISSION, *given, cwd=work, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"plan.py: {told}; give one of them")


def test_without_any_data_it_says_how_to_plan_all_the_same(work):
    done = script("plan.py", MISSION, cwd=work, check=False)
    assert done.returncode == 1 and "--n_tokens=700_000_000" in done.stderr
    assert "Traceback" not in done.stderr
    (work / "a.jsonl").write_text('{"text": "x"}')
    done = script("plan.py", MISSION, "a.jsonl", cwd=work, check=False)
    assert done.stderr == ("plan.py: a.jsonl does not say how many tokens it has; prepare it "
                           "first, or say how much text there is (--n_tokens=700_000_000)\n")


# memory

@pytest.mark.parametrize("compiled", [False, True])
def test_weights_gradients_and_optimizer_take_4_4_and_8_bytes_a_parameter(compiled):
    traced = plan.trace(SMALL, 4, compiled=compiled)
    n = sum(-(-p.numel() * 4 // 512) * 512 for p in GPT(SMALL).parameters())
    kinds = traced["by_kind"]
    assert kinds["weights"] == kinds["gradients"] == n
    assert 2 * n <= kinds["optimizer"] < 2 * n + 512 * 2 * len(list(GPT(SMALL).parameters()))
    assert traced["optimizer_step"] >= 4 * n and traced["evaluation"] > 3 * n


def test_a_peak_is_the_most_that_was_alive_at_once_and_its_kinds_add_up_to_it():
    with FakeTensorMode(), plan.Trace() as traced:
        a = torch.empty(1024)                   # 4 KiB
        traced.kind = "loss"
        b = torch.empty(2048)
        del a, b
        c = torch.empty(1)                      # 512 bytes, as the allocator rounds
    assert traced.at_peak == {"weights": 4096, "loss": 8192}
    assert traced.peak == sum(traced.at_peak.values()) and traced.total == 512 and len(c) == 1


@pytest.mark.parametrize("settings, compiled", [
    *((settings, compiled) for compiled in (False, True) for settings in (
        {}, {"dropout": 0.1, "bias": True, "softcap": 15.0},
        {"block": "modern", "optimizer": "muon", "ema_half_life": 5, "n_kv_head": 1})),
    ({"n_layer": 7, "n_value_table": 2}, True),
    ({"n_layer": 6, "n_value_table": 1}, False)])
def test_what_a_few_blocks_tell_is_what_all_blocks_take(settings, compiled):
    cfg = small_cfg(**settings)                 # of 3 blocks, where 1 and 2 tell; 3 and 5 of 7
    shape = GPTConfig(**model_args(cfg))
    traced = plan.trace(shape, 3, torch.bfloat16, compiled, cfg)
    whole = plan.trace_passes(lambda: GPT(shape), 3, torch.bfloat16, compiled, cfg)
    assert {**traced["by_kind"], "evaluation": traced["evaluation"]} == whole


def test_muon_keeps_one_number_of_a_matrix_and_the_average_one_of_every_weight():
    shape = replace(SMALL, block="modern")
    n = plan.make(small_cfg(), shape, TEXT, CARD, torch.float32, False)["parameters"]
    matrices, total = n["attention"] + n["MLP"], n["total"]
    for average in (0, 50):
        cfg = small_cfg(block="modern", optimizer="muon", ema_half_life=average)
        traced = plan.trace(shape, 4, cfg=cfg)
        right = 4 * matrices + 8 * (total - matrices) + (4 * total if average else 0)
        assert traced["by_kind"]["optimizer"] == pytest.approx(right, rel=0.02)
    adamw = plan.trace(shape, 4, cfg=small_cfg(block="modern"))
    assert adamw["by_kind"]["optimizer"] == pytest.approx(8 * total, rel=0.02)


def saved_bytes(loss, model):
    """Bytes that autograd keeps for the backward of `loss`, weights not counted."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, seen, todo = {}, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [function for function, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += list(getattr(node, "saved_tensors", ()))
        for tensor in saved:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in weights:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


@pytest.mark.parametrize("compiled", [False, True])
@inductor.patch("cpp.simdlen", 1)           # plain C++ compiles in two thirds of the time
def test_activations_are_what_a_real_model_keeps(monkeypatch, compiled):
    monkeypatch.setattr(model_file, "causal_attention", lambda q, k, v, dropout:
                        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    model = GPT(SMALL)
    if compiled:
        model.compile(dynamic=False)
    idx = torch.randint(3200, (16, 64))
    with torch.autocast("cpu", torch.bfloat16):
        x = model.hidden(idx)
    kept = saved_bytes(x, model)
    traced = plan.trace(SMALL, 16, compiled=compiled)["by_kind"]["activations"]
    assert kept <= traced <= (1.2 if compiled else 1.1) * kept, (traced, kept)


def test_a_model_that_returns_its_logits_is_traced_with_them():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SMALL
            self.wte = torch.nn.Embedding(3200, 64)

        def forward(self, idx, targets):
            logits = self.wte(idx) @ self.wte.weight.T
            return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                             targets.flatten())
    peak = plan.trace(Plain, 8, torch.float32)["micro_step"]
    logits = 8 * 64 * 3200 * 4              # they, their log-softmax and its gradient at least
    assert 3 * logits < peak < 5 * logits + 20 * 3200 * 64 * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_the_largest_batch_is_the_largest_that_fits(compiled, monkeypatch):
    monkeypatch.setattr(plan, "trace", functools.cache(plan.trace))     # each takes a second
    traced = {d: plan.trace(SMALL, d, torch.bfloat16, compiled, None) for d in (1, 2, 3, 6)}
    needs = {d: plan.needed(traced[d]) for d in traced}
    for room, fits in ((needs[1] - 1, 0), (needs[1], 1), (needs[3] - 1, 2), (needs[6] - 1, 3),
                       (needs[6], 6), (1e12, 6)):
        for known in (None, *traced.items()):       # where the search starts: from 6, else there
            found = plan.largest_batch(SMALL, 6, room, torch.bfloat16, compiled, known)
            assert found == (fits, traced[fits or 1]), (room, known)


def test_what_does_not_fit_names_what_does():
    cfg, card = small_cfg(batch_size=24, gradient_accumulation_steps=2), {**CARD, "room": 2e7}
    planned = plan.make(cfg, SMALL, TEXT, card, torch.bfloat16, False)
    B, accumulation = (planned["memory"][k] for k in ("largest_batch_size", "its_accumulation"))
    assert B * accumulation == 48 and 0 < B < 24
    told, = plan.refusals(planned, cfg)
    assert (f"needs {plan._gib(planned['memory']['needed'])}" in told
            and f"--batch_size={B} --gradient_accumulation_steps={accumulation} fits" in told)
    fits = small_cfg(batch_size=B, gradient_accumulation_steps=accumulation)
    assert not plan.refusals(plan.make(fits, SMALL, TEXT, card, torch.bfloat16, False), fits)


def test_tracing_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan.trace(GPTConfig(**{**model_args(SMALL), "dropout": 0.1}), 2)
    assert torch.equal(torch.get_rng_state(), before)


# the machine, time and disk

@pytest.mark.parametrize("name", ["RTX 4070", "rtx 4070", "4070", "NVIDIA GeForce RTX 4070"])
def test_a_card_is_found_by_any_of_its_names(name):
    on = plan.machine(torch.device("cpu"), torch.bfloat16, name)
    assert on["flops"] == 58.3e12 and on["memory"] / GIB == pytest.approx(11.7, abs=0.05)


def test_a_card_that_is_not_known_names_its_neighbours():
    with pytest.raises(ValueError, match="'RTX 4071' is not in the table of cards; nearest: rtx 4"):
        plan.machine(torch.device("cpu"), torch.bfloat16, "RTX 4071")


def test_time_is_flops_over_half_of_the_peak_or_what_was_measured():
    cfg = small_cfg()
    matmul = sum(p.numel() for name, p in GPT(SMALL).named_parameters()
                 if p.dim() == 2 and "wpe" not in name)
    a_token = 6 * matmul + sum(6 * 2 * 64 * 3 * (t + 1) for t in range(64)) / 64    # causal pairs
    s = plan.make(cfg, SMALL, TEXT, CARD, torch.float32, False)["time"]
    assert s["flops_per_step"] == pytest.approx(a_token * 4 * 6 * 64, rel=0.01)
    assert s["step"] == pytest.approx(s["flops_per_step"] / 25e12)
    assert s["evaluations"] == len([i for i in range(101) if i % 30 == 0 or i == 100])
    assert s["val_tokens"] == 5 * 4 * 64
    assert s["evaluation"] == pytest.approx(s["step"] * s["val_tokens"] / (4 * 6 * 64) / 3)
    assert s["run"] == pytest.approx(100 * s["step"] + 5 * s["evaluation"])
    for done in (1, 60, 61, 100):
        left = plan.make(cfg, SMALL, TEXT, CARD, torch.float32, False, done=done)["time"]
        evaluations = len([i for i in range(done + 1, 101) if i % 30 == 0 or i == 100])
        assert (left["steps"], left["evaluations"]) == (100 - done, evaluations)
        assert left["run"] == pytest.approx((100 - done) * s["step"]
                                            + evaluations * s["evaluation"])
    measured = plan.make(cfg, SMALL, TEXT, CARD, torch.float32, False, measured=1000.0)
    assert measured["time"]["step"] == 4 * 6 * 64 / 1000
    told = "\n".join(plan.lines(measured, cfg, now=datetime(2026, 1, 1)))
    assert float(re.search(r"([\d.]+) TFLOP a step", told)[1]) == pytest.approx(
        s["flops_per_step"] / 1e12, rel=1e-3)
    assert "as measured in this run" in told and "to Thursday 2026-01-01 00:02" in told


def test_the_rate_that_a_run_had_on_this_device_is_read_from_its_log(work):
    lines = [dict(event="start", device="here"), dict(tokens_per_s=5.0), dict(tokens_per_s=7.0),
             dict(tokens_per_s=None), dict(event="start", device="there"), dict(tokens_per_s=9.0)]
    (work / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"half')
    assert plan.measured_rate("log.jsonl", "here") == 7.0
    assert plan.measured_rate("log.jsonl", "there") == 9.0
    assert plan.measured_rate("log.jsonl", "elsewhere") is None
    assert plan.measured_rate("none.jsonl", "here") is None


@pytest.mark.parametrize("recipe", [
    {}, dict(block="modern", optimizer="muon", lr_schedule="wsd", warmup_iters=0, ema_half_life=5)])
def test_a_checkpoint_is_as_large_as_planned_and_a_full_disk_is_refused(tiny, recipe):
    import train
    cfg = TrainConfig(dataset="letters", vocab_size=64, block_size=16, n_layer=2, n_head=2,
                      n_embd=128, batch_size=4, gradient_accumulation_steps=2, max_iters=1,
                      device="cpu", compile=False, eval_iters=2, **recipe)
    train.main(cfg)
    planned = plan.make(cfg, GPTConfig(**model_args(cfg)), TEXT, CARD, torch.float32, False)
    size = (tiny / "out" / "ckpt.pt").stat().st_size
    assert planned["disk"]["checkpoint"] == pytest.approx(size, rel=0.05)
    room = planned["disk"]["checkpoints"]           # ckpt.pt and best.pt are one file so far
    assert room == pytest.approx((3 if recipe else 2) * size, rel=0.1)
    planned["disk"]["free"] = room - 1
    assert "Make room, or give --out_dir on another disk" in plan.refusals(planned, cfg)[0]


def test_json_holds_every_number(tiny):
    told = json.loads(script("plan.py", "--dataset=letters", "--json", "--block_size=16",
                             "--vocab_size=64", "--n_layer=1", "--compile=False", cwd=tiny).stdout)
    assert set(told) == {"machine", "parameters", "tokens", "memory", "time", "disk", "refusals"}
    assert told["tokens"]["tokens"] == 5000 and told["machine"]["kind"] in ("cpu", "cuda", "mps")


def test_a_resumed_run_plans_what_is_left_at_the_rate_it_had(tiny):
    settings = ["--dataset=letters", "--block_size=16", "--vocab_size=64", "--n_layer=1",
                "--n_head=1", "--n_embd=16", "--batch_size=2", "--gradient_accumulation_steps=1",
                "--eval_interval=50", "--eval_iters=2", "--device=cpu", "--compile=False"]
    script("train.py", *settings, "--max_iters=6", cwd=tiny)
    fresh = json.loads(script("plan.py", *settings, "--max_iters=20", "--json", cwd=tiny).stdout)
    resumed = json.loads(script("plan.py", *settings, "--max_iters=20", "--json",
                                "--init_from=resume", cwd=tiny).stdout)
    assert fresh["time"]["steps"] == 20 and resumed["time"]["steps"] == 14
    rates = [json.loads(line).get("tokens_per_s") for line in open("out/log.jsonl")]
    assert resumed["time"]["tokens_per_s"] == [r for r in rates if r][-1]
    assert fresh["time"]["share_of_peak"] == 0.5 and resumed["time"]["share_of_peak"] is None
