"""Every number of the plan against an independent count."""
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import PROJECT
from model import GPT, GPTConfig
from onecard import cards, memory, optim, plan
from onecard.cards import Machine, machine_named
from onecard.settings import configure, read_config_file
from train import TrainConfig

GIB = 2**30
MODERN = read_config_file(PROJECT / "config" / "modern.py")
TIED = {**MODERN, "tie_word_embeddings": True, "embed_norm": False}
MISSION = configure(TrainConfig, [str(PROJECT / "config" / "train_fineweb_4070_one_shard.py")])
GPU = Machine("a card", "cuda", torch.bfloat16, 1e12)
TEXT = SimpleNamespace(train=10_000_001, val=100_000, source="data/text")
SMALL = dict(block_size=64, vocab_size=3200, n_layer=3, n_head=2, n_embd=64, bias=False,
             batch_size=4, gradient_accumulation_steps=6, max_iters=100, eval_interval=30,
             eval_iters=5, lr_decay_iters=3000, warmup_iters=10)


def small(**settings):
    return TrainConfig(**{**SMALL, **settings})


def size_of(cfg):
    with torch.device("meta"):
        model = GPT(GPTConfig.of(cfg))
    return plan.Size(model.config, **model.count_parameters(),
                     flops_per_token=model.flops_per_token())


def plan_of(cfg, machine=GPU, data=TEXT, fit=None, **past):
    size = size_of(cfg)
    fit = fit or memory.choose(cfg, size, machine)
    return plan.Plan(cfg, size, machine, fit, cfg.eval_iters * cfg.batch_size, data, **past)


def test_the_missions_plan_has_its_true_numbers(work):
    data = SimpleNamespace(train=696_500_000, val=3_500_000, source="a file")
    shown = plan.text(plan_of(MISSION, machine_named("RTX 4070", torch.bfloat16), data))
    for words in ("machine    RTX 4070, bfloat16\n",
                  "64.0 M parameters, 37.8 M without embeddings (12 layers x 8 heads x 512)",
                  "a file: 696,500,000 tokens to train on",
                  "491,520 tokens = 12 windows x 40 micro-batches x 1,024",
                  "250,000 steps = 122.88 G tokens = 176 epochs",
                  "696.5 M tokens are new and 122.18 G repeated: worth 11.41 G new ones",
                  "4 epochs: --max_iters=5668 --lr_decay_iters=5668; compute-optimal (worth 20 "
                  "new tokens a parameter): 2,640 steps",
                  "warning    176 epochs",
                  "memory     needs 4.8 GiB, 10.9 GiB are free for it: 6.1 GiB to spare",
                  "recompute: no; logits of 12,288 tokens at a time"):
        assert words in shown, shown
    # owners of this card measured, at other sizes, what is 15 to 17 days here
    shortest, longest = re.search(r"predicted ([\d.]+) to ([\d.]+) days", shown).groups()
    assert 13 < float(shortest) < 15 and 16 < float(longest) < 18
    assert list(work.iterdir()) == []           # it has written nothing


def test_what_is_unknown_prints_a_dash():
    cpu = Machine("a CPU", "cpu", torch.float32, math.inf)
    shown = plan.text(plan_of(small(), cpu, data=None))
    for words in ("dataset    -\n", "= - epochs\n", " - are free for it: - to spare\n",
                  "time       not known for this machine before 20 steps"):
        assert words in shown, shown
    assert not plan.refusals(plan_of(small(), cpu, data=None))


# tokens

def test_tokens_and_epochs_are_those_of_a_count_by_hand():
    data = SimpleNamespace(train=30 * 64, val=100, source="data/text")
    windows = len(range(64, data.train, 64))    # each needs 64 tokens and the one after them: 29
    shown = plan.text(plan_of(small(max_iters=10), data=data))
    assert "step       1,536 tokens = 4 windows x 6 micro-batches x 64\n" in shown
    assert f"10 steps = 15,360 tokens = {15360 / (windows * 64):.2f} epochs\n" in shown
    assert f"4 epochs: --max_iters={4 * windows * 64 // 1536} --lr_decay_iters=" in shown
    assert "repeated" in shown and "warning" not in shown


@pytest.mark.parametrize("epochs", [0.5, 1, 1.7, 4, 16, 175])
def test_repeated_tokens_are_worth_what_the_law_says(epochs):
    """Repetition r is worth e^(-r / R*) of a new token: a sum over thin slices of the run."""
    slices, repeated = 20_000, max(epochs - 1, 0)
    worth = [math.exp(-repeated * (i + 0.5) / slices / 15.387756) for i in range(slices)]
    by_hand = min(epochs, 1) + repeated * sum(worth) / slices
    assert plan.effective_tokens(1e9, epochs * 1e9) == pytest.approx(by_hand * 1e9, rel=1e-6)
    assert plan.tokens_worth(by_hand * 1e9, 1e9) == pytest.approx(epochs * 1e9, rel=1e-3)


def test_data_that_is_too_small_for_the_model_is_named():
    hungry = SimpleNamespace(train=1001, val=100, source="data/text")
    assert plan.tokens_worth(17e9, 1e9) is None and plan.effective_tokens(1e9, 1e15) < 17e9
    assert "more than this data can be worth" in plan.text(plan_of(small(), data=hungry))


# memory

def kept_bytes(cfg, recompute):
    """Bytes, weights excluded, that a real model keeps for the backward pass of hidden()."""
    model = GPT(GPTConfig.of(cfg))
    if cfg.compile:                     # torch's own choice of what to keep, without a compiler
        torch._dynamo.reset()
        model.compile(recompute, dynamic=False, backend="aot_eager_decomp_partition")
    kept = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    weights = set(kept)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    idx = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size))
    with torch.autocast("cpu", torch.bfloat16), \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(idx)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


@pytest.mark.parametrize("network, compiled, recompute", [
    ({}, False, False), (MODERN, False, False), ({}, True, False), (MODERN, True, True)])
def test_layers_keep_what_the_formula_says(network, compiled, recompute):
    cfg = small(**network, n_layer=2, n_embd=128, vocab_size=64, compile=compiled)
    c, tokens = GPTConfig.of(cfg), cfg.batch_size * cfg.block_size
    by_layer = memory.kept_by_layer(c, torch.bfloat16, compiled, recompute)
    expected = tokens * (2 * by_layer + 4 * 128)                # and ln_f's input
    if not recompute:                           # the weights in bf16
        expected += 2 * size_of(cfg).blocks
    if not compiled:                            # what only a CPU keeps
        expected += tokens * 2 * 24 * 128 * (c.norm == "rmsnorm")
    assert kept_bytes(cfg, recompute) == pytest.approx(expected, rel=0.1)


MUON, EAGER = {"optimizer": "muon"}, {"compile": False}


@pytest.mark.parametrize("network, shape, settings, fit, traced", [
    # GiB of steps on tensors without data, in bf16 (dev/LOG.md). All but the last four are at their
    # peak in the loss, the others in backward or in the optimizer
    ({}, (12, 8, 512), {}, (12, 12288, False), 4.67),
    ({}, (12, 8, 512), {}, (12, 2048, True), 2.89),
    (MODERN, (12, 6, 768), MUON, (16, 2048, True), 6.56),
    (TIED, (12, 8, 512), MUON, (16, 4096, False), 5.06),
    (MODERN, (16, 8, 1024), MUON, (4, 2048, True), 6.27),
    ({}, (12, 8, 512), EAGER, (12, 4096, False), 4.90),
    (MODERN, (12, 6, 768), MUON | EAGER, (16, 4096, False), 11.27),
    (MODERN, (24, 8, 1024), {"block_size": 512}, (1, 512, False), 7.58),
    (MODERN, (24, 8, 1024), MUON | {"block_size": 64}, (1, 128, False), 6.44),
    (MODERN, (24, 8, 1024), MUON | {"block_size": 64} | EAGER, (1, 128, False), 5.96)])
def test_planned_memory_is_0_to_10_percent_above_a_traced_step(
        network, shape, settings, fit, traced):
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), shape, strict=True))
    cfg = TrainConfig(**network, **sizes, **settings)
    assert 1 <= plan_of(cfg, fit=memory.Fit(*fit)).peak_memory / GIB / traced <= 1.10


FREE = dict(batch_size=0, block_size=1024, tokens_per_step=2**18, vocab_size=50304)


def test_a_chosen_micro_batch_fits_every_card_and_leaves_room():
    cfg = small(**FREE | MODERN | MUON, n_layer=12, n_head=6, n_embd=768)
    size = size_of(cfg)
    chosen = {room: memory.choose(cfg, size, replace(GPU, room=room * GIB))
              for room in (6, 7, 9, 11, 15, 23, 100)}
    for room, fit in chosen.items():
        assert memory.needed(cfg, size, GPU, fit) <= room * GIB
    tokens = [fit.batch_size for fit in chosen.values()]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]
    assert not chosen[100].recompute
    assert memory.needed(cfg, size, GPU, chosen[100]) < 20 * GIB        # more would give nothing


def test_what_has_no_room_is_made_small_before_it_is_refused():
    cfg = small(**FREE | MODERN | MUON, n_layer=16, n_head=8, n_embd=1024)
    size = size_of(cfg)
    assert memory.choose(cfg, size, GPU).recompute is False
    narrow = replace(GPU, room=6.6 * GIB)
    fit = memory.choose(cfg, size, narrow)
    assert fit.recompute and memory.needed(cfg, size, narrow, fit) <= narrow.room
    assert not memory.choose(replace(cfg, recompute="no"), size, narrow).recompute
    assert memory.choose(replace(cfg, recompute="yes"), size, GPU).recompute
    nothing = memory.choose(cfg, size, replace(GPU, room=1))
    assert nothing == memory.Fit(1, 1024, recompute=True)


@pytest.mark.parametrize("name", ["evening", "64m", "week", "one_shard"])
def test_each_recipe_fits_a_card_of_8_gb_and_one_of_12_gb_beside_a_screen(name):
    cfg = configure(TrainConfig, [str(PROJECT / "config" / f"train_fineweb_4070_{name}.py")])
    size = size_of(cfg)
    for card, screen in (("RTX 4060", 0), ("RTX 4070", 3), ("RTX 3080", 1)):
        machine = machine_named(card, torch.bfloat16)
        machine = replace(machine, room=machine.room - screen * GIB)
        fit = memory.choose(cfg, size, machine)
        assert memory.needed(cfg, size, machine, fit) <= machine.room
    planned = plan_of(replace(cfg, dry_run=True, device_name="RTX 4070", batch_size=fit.batch_size),
                      machine_named("RTX 4070", torch.bfloat16))
    assert "with a screen on this card, 7.9 GiB to 9.9 GiB are free" in plan.text(planned)


def test_a_resumed_run_computes_as_it_did_while_there_is_room():
    """Another chunk rounds otherwise: it would not be the same run, bit for bit."""
    cfg = small(**FREE, n_layer=12, n_head=8, n_embd=512)
    size, old = size_of(cfg), {"batch_size": 8, "chunk": 4096, "recompute": True}
    assert memory.choose(cfg, size, GPU) != memory.Fit(**old)
    assert memory.choose(cfg, size, GPU, old) == memory.Fit(**old)
    assert memory.choose(cfg, size, replace(GPU, room=2 * GIB), old) != memory.Fit(**old)
    assert memory.choose(replace(cfg, batch_size=4), size, GPU, old).batch_size == 4


def test_a_set_batch_size_stays_and_its_loss_takes_the_room_that_there_is():
    cfg = configure(TrainConfig, [str(PROJECT / "config" / "train_fineweb_4070_one_shard.py")])
    fits = [memory.choose(cfg, size_of(cfg), replace(GPU, room=room * GIB)) for room in (3, 5)]
    assert fits == [memory.Fit(12, 3072, recompute=True), memory.Fit(12, 12288, recompute=False)]


def test_several_processes_need_room_for_the_sum_of_their_gradients():
    cfg, size, fit = small(), size_of(small()), memory.Fit(1, 128, recompute=False)
    one, two = [memory.needed(cfg, size, replace(GPU, count=n), fit) for n in (1, 2)]
    assert two - one == pytest.approx(1.05 * 4 * size.total, abs=2)


@pytest.mark.parametrize("settings, machine, words", [
    (dict(batch_size=24, gradient_accumulation_steps=2), {"room": 2e7},
     r"batch_size = 24 needs (.+) of memory, and a card has room for 19 MiB; --batch_size=\d+ "
     r"--gradient_accumulation_steps=\d+ fits and gives the same steps"),
    (dict(tokens_per_step=24 * 64, batch_size=24), {"room": 2e7}, r"; --batch_size=\d+ fits"),
    (dict(), {"room": 1e6}, "not even one window fits: a smaller block_size, n_layer or n_embd")])
def test_what_does_not_fit_names_what_does(settings, machine, words):
    cfg, machine = small(**settings), replace(GPU, **machine)
    sentence, = plan.refusals(plan_of(cfg, machine))
    assert re.search(words, sentence) and "DOES NOT FIT" in plan.text(plan_of(cfg, machine))
    if batch := re.search(r"--batch_size=(\d+)", sentence):
        fitting = replace(cfg, batch_size=int(batch[1]))
        assert not plan.refusals(plan_of(fitting, machine))


# time and disk

CARD = replace(GPU, card=cards.Card(12000, 500, 50.0, logs=((32, 0.5), (96, 0.7))))


def test_time_is_flops_over_a_share_of_the_peak():
    cfg = small()
    matrices = sum(p.numel() for name, p in GPT(GPTConfig.of(cfg)).named_parameters()
                   if p.dim() == 2 and "wpe" not in name)
    seen = sum(range(1, 65)) / 64               # tokens that a token sees, on average
    flops = (6 * matrices + 3 * 2 * 2 * 64 * 3 * seen) * 4 * 6 * 64
    slow, fast = plan_of(cfg, CARD).speeds
    step, run = 4 * 6 * 64 / fast, plan.seconds(plan_of(cfg, CARD), fast)
    assert step == pytest.approx(flops / 50e12 / 0.66, rel=0.01)    # 0.6 at 64 wide, 10 % more
    assert fast == pytest.approx(slow * 1.1 / 0.9 / 0.6)            # micro-batches of 256 tokens
    assert run == pytest.approx(100 * step + 5 * step * 5 * 4 / 24 / 3)     # evaluations: 0, 30, ..
    assert plan_of(cfg, replace(CARD, count=2)).speeds == pytest.approx((2 * slow, 2 * fast))
    assert plan_of(small(compile=False), CARD).speeds[1] < fast
    assert "32% to 66% of 50 TFLOP/s, by logs of this card at 32 and 96 wide" in plan.text(
        plan_of(cfg, CARD))


def test_a_plan_for_some_hours_says_how_many_steps_they_are():
    planned = plan_of(small(hours=2.0), CARD)
    fewest, most = re.search(r"2 hours are ([\d,]+) to ([\d,]+) steps", plan.text(planned)).groups()
    for steps, speed in zip((fewest, most), planned.speeds, strict=True):
        steps = int(steps.replace(",", ""))
        as_long = replace(planned, cfg=replace(planned.cfg, max_iters=steps))
        assert plan.seconds(as_long, speed) == pytest.approx(0.98 * 7200, rel=0.01)


@pytest.mark.parametrize("before, evaluations", [(0, 5), (1, 4), (60, 2), (61, 2), (200, 0)])
def test_a_resumed_run_plans_what_is_left_at_the_speed_it_had(before, evaluations):
    resumed = plan_of(small(), CARD, steps_before=before, measured=1536.0)
    assert plan.seconds(resumed, 1536.0) == pytest.approx(
        max(100 - before, 0) + evaluations * 5 * 4 / 24 / 3)
    assert "at 1,536 tokens/s as measured" in plan.text(resumed)


@pytest.mark.parametrize("recipe", [{}, dict(**MODERN, optimizer="muon", lr_schedule="wsd")])
def test_a_checkpoint_is_as_large_as_planned_and_a_full_disk_is_refused(work, recipe):
    cfg = small(**recipe, n_embd=128, out_dir="runs/a")
    model = GPT(GPTConfig.of(cfg))
    optimizer = optim.configure_optimizer(model, cfg, torch.float32)
    model(*torch.ones(2, 1, 64, dtype=torch.long)).backward()
    optimizer.step()
    (work / "runs" / "a").mkdir(parents=True)
    torch.save([model.state_dict(), optimizer.state_dict()], "runs/a/ckpt.pt")
    size = (work / "runs" / "a" / "ckpt.pt").stat().st_size
    planned, n_kept = plan_of(cfg), 4 if recipe else 3
    assert planned.checkpoint == pytest.approx(size, rel=0.05)
    assert plan.disk(planned)[0] == n_kept * planned.checkpoint - size
    (work / "runs" / "a" / "best.pt").hardlink_to("runs/a/ckpt.pt")     # the same file again
    assert plan.disk(planned)[0] == n_kept * planned.checkpoint - size
    huge = replace(planned, size=replace(planned.size, total=10**15))
    assert "make room, or give --out_dir on another disk" in plan.refusals(huge)[-1]
