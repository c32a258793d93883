"""Does every weight move as its optimizer promises, at the rate of its group and step?"""
import math
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from onecard import optim
from onecard.settings import UserError
from test_model import MODERN

WARMUP = [0.01 * (step + 1) / 11 for step in range(10)]


def settings(**changes):
    usual = dict(
        optimizer="muon", learning_rate=0.01, weight_decay=0.2, beta1=0.9, beta2=0.95, cooldown=0.3,
        embedding_lr=0.25, embedding_weight_decay=0.001, head_lr=0.003, head_weight_decay=0.01,
        scalar_lr=0.006, momentum=0.95, momentum_warmup=10, muon_beta2=0.95, cautious=True,
        decay_lr=True, lr_schedule="cosine", min_lr=0.001, warmup_iters=10, lr_decay_iters=90)
    return SimpleNamespace(**usual | changes, max_iters=100)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon(*params, **changes):
    """A Muon of matrices of one shape: plain, as torch has it, but for `changes`."""
    base = dict(lr=0.1, weight_decay=0, momentum=0.95, beta2=0, cautious=False, dtype=torch.float32)
    return optim.Muon([{"params": params, "rows": len(params[0])}], base | changes)


def optimizer_of(network=MODERN, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=80, n_layer=2, n_head=2, n_embd=32, **network))
    return optim.configure_optimizer(model, settings(**changes), torch.float32), model


def random_steps(optimizer, n):
    for step in range(n):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = random(*p.shape, seed=step)
        optimizer.step()


def train(optimizer, model, steps, scale=1.0):
    """Train as train.py does; returns all weights as one vector."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in steps:
        idx = torch.randint(80, (2, 16), generator=torch.Generator().manual_seed(step))
        scaler.scale(model(idx, idx)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    return torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("m, n, dtype", [
    (32, 64, torch.float32), (64, 256, torch.bfloat16), (128, 96, torch.bfloat16)])
def test_orthogonalize_gives_the_polar_factor_of_an_svd(m, n, dtype):
    X = random(5, m, n) * torch.tensor([1e-6, 1e-2, 1, 30, 1e4])[:, None, None]
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    ours = optim.orthogonalize(X.to(dtype)).float()
    values = torch.linalg.svdvals(ours)
    assert 0.84 < values.min() and values.max() < 1.16
    assert torch.cosine_similarity(ours.flatten(1), (U @ V).flatten(1)).min() > 0.99
    assert not optim.orthogonalize(torch.zeros(1, m, n)).any()


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_plain_muon_is_torchs(shape, monkeypatch):
    monkeypatch.setattr(optim, "POLAR_EXPRESS", [(3.4445, -4.7750, 2.0315)] * 5)    # torch's
    monkeypatch.setattr(optim, "MARGIN", 1)
    start = random(*shape) / 8
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    random_steps(muon(ours, weight_decay=0.5), 6)
    random_steps(torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5), 6)
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # torch's products are in bf16


@pytest.mark.parametrize("shape, axis", [((64, 64), 1), ((192, 64), 1), ((64, 192), 0)])
def test_normuon_gives_every_output_the_same_size_and_keeps_that_of_the_matrix(shape, axis):
    ours, plain = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizers = {ours: muon(ours, beta2=0.9), plain: muon(plain)}
    mean_squares = 0
    for step in range(30):
        for p, optimizer in optimizers.items():
            p.data.zero_()                      # so that it is its last step
            p.grad = random(*shape, seed=step)
            optimizer.step()
        mean_squares = 0.9 * mean_squares + 0.1 * plain.square().mean(axis, keepdim=True)
        right = plain / mean_squares.sqrt()
        assert torch.allclose(ours, right * plain.norm() / right.norm(), atol=1e-5)


def test_cautious_decay_shrinks_where_the_update_does_and_nowhere_else():
    before = random(32, 64) / 8
    cautious, plain = (torch.nn.Parameter(before.clone()) for _ in range(2))
    random_steps(muon(cautious, weight_decay=0.5, cautious=True), 1)
    random_steps(muon(plain), 1)
    shrinks = (before - plain) * before > 0
    assert 0.3 < shrinks.float().mean() < 0.7
    assert torch.allclose(cautious, torch.where(shrinks, plain - 0.05 * before, plain), atol=1e-6)


@pytest.mark.parametrize("kind, eps, network", [
    ("adamw", 1e-8, {}), ("muon", 1e-10, {}), ("muon", 1e-10, MODERN)])
def test_every_weight_has_its_rate_and_decay_and_moves_by_torchs_adamw_or_muon(kind, eps, network):
    optimizer, model = optimizer_of(network, optimizer=kind)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    by_width, copies, groups = math.sqrt(768 / 32), {}, []
    for name, p in model.named_parameters():
        right = {"lr": 0.006, "weight_decay": 0.0}              # norms, biases, positions
        if p.dim() == 2 and (kind == "adamw" or ".h." in name):
            right = {"lr": 0.01, "weight_decay": 0.2}
        elif kind == "adamw":
            right = {"lr": 0.01, "weight_decay": 0.0}
        elif p is model.lm_head.weight:                         # the embedding, too, where tied
            right = {"lr": 0.003 * by_width, "weight_decay": 0.01}
        elif name == "transformer.wte.weight":
            right = {"lr": 0.25 * by_width, "weight_decay": 0.001}
        group = group_of.pop(p)
        assert {key: group[key] for key in right} == pytest.approx(right), name
        if "momentum" not in group:
            copies[p] = torch.nn.Parameter(p.detach().clone())
            groups.append({"params": [copies[p]], **right})
    random_steps(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=eps, fused=True), 3)
    random_steps(optimizer, 3)
    assert all(torch.equal(p, copy) for p, copy in copies.items()) and not group_of


@pytest.mark.parametrize("network, layer, n", [
    ({}, "attn.c_attn", 3), (MODERN, "attn.c_proj", 1), (MODERN, "mlp.c_fc", 2)])
def test_queries_keys_values_and_gates_move_as_matrices_of_their_own(network, layer, n):
    optimizer, model = optimizer_of(network)
    p = model.get_parameter(f"transformer.h.1.{layer}.weight")
    parts = [torch.nn.Parameter(part.detach().clone()) for part in p.chunk(n)]
    apart = muon(*parts, lr=0.01, weight_decay=0.2, beta2=0.95, cautious=True)
    for _ in range(3):
        random_steps(optimizer, 1)
        for part, gradient in zip(parts, p.grad.chunk(n), strict=True):
            part.grad = gradient
        apart.step()
    assert torch.allclose(p, torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize("kind, network", [("adamw", {}), ("muon", MODERN)])
def test_the_state_goes_through_a_checkpoint_and_todays_settings_win(kind, network, tmp_path):
    ours, model = optimizer_of(network, optimizer=kind)
    changes = dict(learning_rate=0.02, weight_decay=0.5, beta2=0.8, momentum=0.9)
    changed, right = (optimizer_of(network, optimizer=kind, **changes)[0] for _ in range(2))
    optim.load_state(changed, ours.state_dict())
    assert changed.state_dict() == right.state_dict()
    train(ours, model, range(3))
    torch.save((model.state_dict(), ours.state_dict()), tmp_path / "x")
    weights, state = torch.load(tmp_path / "x", weights_only=True)
    again, other = optimizer_of(network, optimizer=kind)
    other.load_state_dict(weights)
    optim.load_state(again, state)
    assert torch.equal(train(ours, model, range(3, 6)), train(again, other, range(3, 6)))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loss_scale_changes_nothing_and_an_overflow_moves_nothing(kind):
    ours, model = optimizer_of(optimizer=kind)
    right = train(*optimizer_of(optimizer=kind), range(3))
    assert torch.equal(train(ours, model, range(3), scale=1024.0), right)
    assert torch.equal(train(ours, model, range(3), scale=math.inf), right)


@pytest.mark.parametrize("changes, rates", [
    (dict(), WARMUP + [0.0055 + 0.0045 * math.cos(math.pi * min(s / 80, 1)) for s in range(90)]),
    (dict(lr_schedule="wsd"), WARMUP + [0.01] * 60 + [0.01 - 0.0003 * s for s in range(30)]),
    (dict(lr_schedule="wsd", cooldown=0.0), WARMUP + [0.01] * 90),
    (dict(decay_lr=False), [0.01] * 100)])
def test_the_rate_warms_up_and_falls_as_a_cosine_or_at_the_end_in_a_straight_line(changes, rates):
    assert [optim.lr_at(step, settings(**changes)) for step in range(100)] == pytest.approx(rates)


def test_every_group_follows_the_schedule_from_its_own_peak_and_momentum_warms_up_from_085():
    optimizer, _ = optimizer_of()
    peaks = [group["lr"] for group in optimizer.param_groups]
    cfg = settings(lr_schedule="wsd", warmup_iters=0, momentum_warmup=40)
    for step, share, momentum in ((0, 1, 0.85), (20, 1, 0.9), (85, 0.55, 0.95)):
        optim.set_rates(optimizer, step, cfg)
        assert [group["lr"] / share for group in optimizer.param_groups] == pytest.approx(peaks)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(momentum)


@pytest.mark.parametrize("changes, sentence", [
    (dict(cooldown=30), "cooldown = 30 must be"), (dict(warmup_iters=90), "--warmup_iters=89"),
    (dict(warmup_iters=71, lr_schedule="wsd"), "no room .* Nearest that works: --warmup_iters=70")])
def test_a_warmup_that_leaves_no_room_for_the_decay_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        optim.check_schedule(settings(**changes))


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_averages_of_another_shape_are_refused(name):
    optimizer, model = optimizer_of({}, optimizer="adamw")
    train(optimizer, model, range(1))
    averages = optimizer.state[model.lm_head.weight]
    averages[name] = averages[name][:-1]
    with pytest.raises(UserError, match="no state of this optimizer that fits"):
        optim.load_state(optimizer_of({}, optimizer="adamw")[0], optimizer.state_dict())


@pytest.mark.parametrize("state", [{}, {"state": {"a": 1}}, {"muon": {"state": {}}}])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_no_state_of_an_optimizer_is_one_sentence(kind, state):
    with pytest.raises(UserError, match="this checkpoint .* --init_from=FOLDER begins with"):
        optim.load_state(optimizer_of(optimizer=kind)[0], state)
