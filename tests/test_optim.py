import math
from types import SimpleNamespace

import pytest
import torch

import optim
from model import GPT, GPTConfig, model_args
from optim import Average, Muon, configure_optimizer, orthogonalize
from train import TrainConfig

CPU = torch.device("cpu")
SMALL = dict(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=64)


def stepped(optimizer, params, steps, seed=0):
    """`params` after `steps` steps with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params


def matrices(*shapes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator) / 8) for s in shapes]


def muon_group(params, **changes):
    return {"params": params, "rows": [[p.size(0)] for p in params], "momentum": 0.95, "beta2": 0.0,
            "cautious": False, "weight_decay": 0.1, **changes}


# the direction

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m, n", [(32, 64), (64, 256), (128, 341)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(m, n, dtype):
    torch.manual_seed(0)
    X = torch.randn(5, m, n) * torch.tensor([1e-6, 1e-2, 1, 30, 1e4])[:, None, None]
    values = torch.linalg.svdvals(orthogonalize(X.to(dtype)).float())
    assert 0.84 < values.min() and values.max() < 1.16


def test_it_is_the_polar_factor_of_an_svd():
    torch.manual_seed(0)
    X = torch.randn(3, 48, 96, dtype=torch.float64)
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    ours, right = orthogonalize(X), U @ V
    cosine = (ours * right).sum((1, 2)) / ours.norm(dim=(1, 2)) / right.norm(dim=(1, 2))
    assert cosine.min() > 0.995


def test_a_gradient_of_zeros_moves_nothing():
    p, = matrices((8, 16))
    before, p.grad = p.detach().clone(), torch.zeros(8, 16)
    Muon([muon_group([p], weight_decay=0.0, beta2=0.9)], lr=1.0).step()
    assert torch.equal(p, before)


# the step

@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_plain_muon_is_torchs(shape, weight_decay):
    ours, theirs = matrices(shape, shape), matrices(shape, shape)
    stepped(Muon([muon_group(ours, weight_decay=weight_decay)], lr=0.03, iteration="quintic"),
            ours, 6)
    stepped(torch.optim.Muon(theirs, lr=0.03, weight_decay=weight_decay, momentum=0.95), theirs, 6)
    start = matrices(shape, shape)
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - s).norm()        # bf16 products, in another order


def test_the_other_groups_get_torchs_adamw_bit_for_bit():
    ours, theirs = matrices((32, 16), (7,)), matrices((32, 16), (7,))
    stepped(Muon([{"params": ours, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-10,
                   "fused": True}], lr=0.01), ours, 5)
    stepped(torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1,
                              fused=True), theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_matrices_that_lie_one_below_the_other_move_as_if_apart():
    q, k = matrices((64, 64), (32, 64))
    both = torch.nn.Parameter(torch.cat((q, k)).detach().clone())
    group = dict(beta2=0.9, cautious=True)
    apart = Muon([muon_group([q, k], **group)], lr=0.03)
    joined = Muon([muon_group([both], rows=[[64, 32]], **group)], lr=0.03)
    for seed in range(4):
        both.grad = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
        q.grad, k.grad = both.grad.clone().split([64, 32])
        apart.step()
        joined.step()
    assert torch.allclose(both[:64], q, atol=1e-4) and torch.allclose(both[64:], k, atol=1e-4)


def test_a_step_has_the_size_that_the_learning_rate_says():
    """lr x sqrt(max(1, out / in)) x sqrt(rank), of every shape, with and without NorMuon."""
    for beta2 in (0.0, 0.95):
        params = matrices((64, 64), (64, 192), (192, 64))
        before = [p.detach().clone() for p in params]
        stepped(Muon([muon_group(params, weight_decay=0.0, beta2=beta2)], lr=0.01), params, 1)
        for p, b in zip(params, before, strict=True):
            right = 0.01 * math.sqrt(max(1, p.size(0) / p.size(1))) * 8
            assert (p - b).norm().item() == pytest.approx(right, rel=0.15)


@pytest.mark.parametrize("shape, axis", [((64, 64), 1), ((192, 64), 1), ((64, 192), 0)])
def test_normuon_gives_every_output_the_same_size(shape, axis):
    p, = matrices(shape)
    optimizer = Muon([muon_group([p], weight_decay=0.0, beta2=0.9)], lr=1.0)
    torch.manual_seed(0)
    loud = torch.ones(p.shape)
    loud.select(1 - axis, 0)[:] = 0.1           # an output whose gradient is always small
    for _ in range(30):
        before, p.grad = p.detach().clone(), torch.randn(p.shape) * loud
        optimizer.step()
    sizes = (p.detach() - before).square().mean(axis).sqrt()
    assert sizes.max() / sizes.min() < 1.8


def test_cautious_decay_shrinks_where_the_update_does_and_nowhere_else():
    p, = matrices((32, 64))
    plain = torch.nn.Parameter(p.detach().clone())
    before = p.detach().clone()
    stepped(Muon([muon_group([p], weight_decay=0.5, cautious=True)], lr=0.1), [p], 1)
    stepped(Muon([muon_group([plain], weight_decay=0.0)], lr=0.1), [plain], 1)
    moved = before - plain                              # what the update alone takes away
    shrunk = moved * before > 0
    assert 0.3 < shrunk.float().mean() < 0.7
    assert torch.allclose((plain - p)[shrunk], (0.05 * before)[shrunk], atol=1e-6)
    assert torch.equal(plain[~shrunk], p[~shrunk])


# which weights go where

def optimizer_of(**settings):
    cfg = TrainConfig(**{**SMALL, "optimizer": "muon", "learning_rate": 0.01, **settings})
    model = GPT(GPTConfig(**model_args(cfg)))
    return configure_optimizer(model, cfg, CPU), model, cfg


def test_adamw_alone_is_torchs_own():
    optimizer, _, cfg = optimizer_of(optimizer="adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert [g["lr_scale"] for g in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("tied, n_value_table", [(True, 0), (False, 0), (True, 1)])
def test_every_weight_is_in_one_group_with_its_own_rate_and_decay(block, tied, n_value_table):
    optimizer, model, cfg = optimizer_of(block=block, tie_word_embeddings=tied, weight_decay=0.2,
                                         n_value_table=n_value_table)
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(group_of) == sum(len(g["params"]) for g in optimizer.param_groups)
    optim.set_rates(optimizer, 0.005, 0.9)              # half of the peak
    for name, p in model.named_parameters():
        g = group_of.pop(id(p))
        if ".h." in name and p.dim() == 2:
            right = 0.005, 0.2, 0.9
        elif name == "transformer.wte.weight" and not tied:
            right = 0.25 * math.sqrt(12) / 2, 0.001, None
        elif name == "transformer.wve.weight":
            right = 0.125 * math.sqrt(12) / 2, 0.0, None
        elif name == "lm_head.weight" or name == "transformer.wte.weight":
            right = 0.003 * math.sqrt(12) / 2, 0.01, None
        else:
            right = 0.006 / 2, 0.0, None
        assert (pytest.approx(g["lr"]), g["weight_decay"], g.get("momentum")) == right, name
    assert not group_of


def test_queries_keys_values_and_gates_are_matrices_of_their_own():
    optimizer, model, _ = optimizer_of(block="modern", n_head=4, n_kv_head=2)
    block = model.transformer.h[0]
    rows = {id(p): r for p, r in zip(optimizer.param_groups[0]["params"],
                                     optimizer.param_groups[0]["rows"], strict=True)}
    n = block.mlp.c_proj.weight.size(1)
    assert [rows[id(part.weight)] for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc,
                                               block.mlp.c_proj)] \
        == [[64, 32, 32], [64], [n, n], [64]]


@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_the_state_goes_through_a_checkpoint_bit_for_bit(block, tmp_path):
    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            idx = torch.randint(320, (2, 16))
            model(idx, idx).backward()
            optim.set_rates(optimizer, 0.01, 0.9)
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    optimizer, model, _ = optimizer_of(block=block)
    train(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "x")
    train(model, optimizer, range(3, 6))
    again, other, _ = optimizer_of(block=block)
    weights, state = torch.load(tmp_path / "x", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(),
                                                 strict=True))


def one_of_two(rank, port_file, folder):
    """A rank of a run with gradients of its own, as train.py has them; saves what it ends with."""
    torch.distributed.init_process_group("gloo", f"file://{port_file}", world_size=2, rank=rank)
    torch.manual_seed(0)
    optimizer, model, _ = optimizer_of(block="modern")
    forward = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(4):
        idx = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(2 * step + rank))
        forward(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model.state_dict(), optimizer.state_dict()["state"]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_same_weights_and_state(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    (w0, s0), (w1, s1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(w0[name], w1[name]) for name in w0)
    assert len(s0) == 2 * 4 + 2 + 2 * 4 + 1
    assert all(torch.equal(s0[i][key], s1[i][key]) for i in s0 for key in s0[i])


# schedules

def test_wsd_warms_up_stays_and_cools_down_in_a_straight_line():
    cfg = TrainConfig(lr_schedule="wsd", learning_rate=1.0, min_lr=0.1, warmup_iters=10,
                      max_iters=100, cooldown=0.3)
    rates = [optim.lr_at(s, cfg) for s in range(120)]
    assert rates[9] == pytest.approx(10 / 11) and rates[10:71] == [1.0] * 61
    assert optim.cooldown_start(cfg) == 70
    assert rates[85] == pytest.approx(0.55) and rates[100:] == [pytest.approx(0.1)] * 20
    steps = [a - b for a, b in zip(rates[70:99], rates[71:100], strict=True)]
    assert steps == [pytest.approx(0.03)] * 29


def test_a_decay_that_ends_with_its_warm_up_is_at_its_end_after_it():
    theirs = SimpleNamespace(decay_lr=True, lr_schedule="cosine", warmup_iters=9, lr_decay_iters=9,
                             learning_rate=1.0, min_lr=0.1)
    assert optim.lr_at(10, theirs) == pytest.approx(0.1)


def test_momentum_warms_up_from_085():
    cfg = TrainConfig(momentum=0.95, momentum_warmup=10)
    assert [optim.momentum_at(s, cfg) for s in (0, 5, 10, 99)] == [
        0.85, pytest.approx(0.90), pytest.approx(0.95), pytest.approx(0.95)]
    assert optim.momentum_at(0, TrainConfig(momentum_warmup=0)) == 0.95


@pytest.mark.parametrize("settings, words", [
    (dict(optimizer="moon"), "optimizer = 'moon'; use adamw or muon"),
    (dict(lr_schedule="linear"), "lr_schedule = 'linear'; use cosine or wsd"),
    (dict(lr_schedule="wsd", cooldown=1.5), "cooldown = 1.5 is a share of max_iters"),
    (dict(lr_schedule="wsd", max_iters=100, cooldown=0.9, warmup_iters=20),
     "starts at step 10 .*--warmup_iters=10"),
    (dict(learning_rate=0.0), "learning_rate = 0.0 cannot be negative or 0"),
    (dict(patience=-1), "patience = -1 cannot be negative"),
    (dict(n_layer=5, n_value_table=4), "of 5 blocks every other one uses a table. "
     "Nearest that works: 3")])
def test_settings_that_cannot_be_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


# the average

def test_the_average_is_the_explicit_sum():
    model = torch.nn.Linear(3, 2)
    average, history = Average(model, half_life=4), [model.weight.detach().clone()]
    for _ in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        history.append(model.weight.detach().clone())
        average.update()
    d = 0.5 ** 0.25
    right = d**12 * history[0] + sum((1 - d) * d**(12 - i) * history[i] for i in range(1, 13))
    assert torch.allclose(average.weights["weight"], right, atol=1e-5)
    now = history[-1]
    with average:
        assert torch.allclose(model.weight, right, atol=1e-5)
    assert torch.equal(model.weight, now)
