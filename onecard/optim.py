"""How do the weights move, and how fast? AdamW, or Muon and AdamW; schedules of their rates.

Muon (Jordan 2024, kellerjordan.github.io/posts/muon) averages the gradient of a matrix and replaces
it by the nearest orthogonal matrix, so that the matrix learns equally fast in every direction.
"""
import math

import torch

from onecard.settings import UserError, in_range

# a, b, c of X <- a X + (b A + c A A) X, where A = X X' (Amsel et al. 2025, arXiv 2505.16932)
POLAR_EXPRESS = ((8.156555, -22.483293, 15.878770), (4.042930, -2.808917, 0.500018),
                 (3.891668, -2.772484, 0.506065), (3.285754, -2.368129, 0.464490),
                 (2.346541, -1.709783, 0.423236))
MARGIN = 1.02                   # X starts with a norm of 1 / MARGIN: room for bf16's rounding
ADAM_EPS = 1e-10                # beside Muon; rare tokens have gradients below AdamW's usual 1e-8
FIRST_MOMENTUM = 0.85           # of Muon, as in modded-nanogpt: at first, gradients change fast
WIDTH = 768                     # embedding_lr and head_lr are meant for this n_embd


def configure_optimizer(model, cfg, dtype):
    """The optimizer that `cfg` names. Each of its groups has a `peak_lr`; see set_rates."""
    usual = {"betas": (cfg.beta1, cfg.beta2), "fused": True}    # one kernel for a group's weights
    if cfg.optimizer == "adamw":
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
                  {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, **usual)
    else:
        muon_dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        muon = Muon(muon_groups(model), {
            "lr": cfg.learning_rate, "weight_decay": cfg.weight_decay, "momentum": cfg.momentum,
            "beta2": cfg.muon_beta2, "cautious": cfg.cautious, "dtype": muon_dtype})
        adamw = torch.optim.AdamW(adamw_groups(model, cfg), eps=ADAM_EPS, **usual)
        optimizer = MuonAndAdamW(muon, adamw)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def muon_groups(model):
    """The matrices of the blocks, in one group for each shape.

    A weight may hold several matrices of `rows` rows each: queries, keys and values in attn.c_attn,
    and both halves of a swiglu in mlp.c_fc.
    """
    C, inner = model.config.n_embd, model.config.inner_size
    groups = {}
    for block in model.transformer.h:
        rows_of = {block.attn.c_attn.weight: C, block.attn.c_proj.weight: C,
                   block.mlp.c_fc.weight: inner, block.mlp.c_proj.weight: C}
        for weight, rows in rows_of.items():
            group = groups.setdefault((rows, weight.size(1)), {"params": [], "rows": rows})
            group["params"].append(weight)
    return list(groups.values())


def adamw_groups(model, cfg):
    """All other weights: head, embedding, and the rest (norms, biases, positions)."""
    embedding, head = model.transformer.wte.weight, model.lm_head.weight    # one, if they are tied
    taken = {embedding, head} | {p for p in model.transformer.h.parameters() if p.dim() == 2}
    rest = [p for p in model.parameters() if p not in taken]
    by_width = math.sqrt(WIDTH / model.config.n_embd)           # wider models need smaller steps
    head_lr, embedding_lr = cfg.head_lr * by_width, cfg.embedding_lr * by_width
    groups = [{"params": [head], "lr": head_lr, "weight_decay": cfg.head_weight_decay},
              {"params": rest, "lr": cfg.scalar_lr, "weight_decay": 0.0}]
    if embedding is not head:
        groups.append({"params": [embedding], "lr": embedding_lr,
                       "weight_decay": cfg.embedding_weight_decay})
    return groups


def load_state(optimizer, state):
    """Load averages and step counts from a checkpoint. Rates, betas and decay stay today's."""
    if isinstance(optimizer, MuonAndAdamW):
        load_state(optimizer.muon, state.get("muon"))
        load_state(optimizer.adamw, state.get("adamw"))
        return
    groups = optimizer.state_dict()["param_groups"]
    try:
        averages = {number: {name: average.contiguous() for name, average in of_weight.items()}
                    for number, of_weight in state["state"].items()}
        optimizer.load_state_dict({"state": averages, "param_groups": groups})
        # torch compares no shapes, and its fused AdamW writes behind the end of a short average
        fits = all(average.shape == weight.shape for weight, averages in optimizer.state.items()
                   for name, average in averages.items() if name.startswith("exp_avg"))
    except (AttributeError, KeyError, TypeError):       # it is no state of an optimizer
        fits = False
    if not fits:
        raise UserError("this checkpoint has no state of this optimizer that fits its weights; "
                        "--init_from=FOLDER begins with its weights alone")


def cooldown_start(cfg):
    """The first step of wsd's cooldown. Its rate is still the peak."""
    return cfg.max_iters - round(cfg.cooldown * cfg.max_iters)


def is_before_cooldown(step, cfg):
    """Whether the cooldown begins with the next step."""
    return cfg.decay_lr and cfg.lr_schedule == "wsd" and step == cooldown_start(cfg)


def check_schedule(cfg):
    """Raise UserError if the learning rate would rise, or the warmup leaves no room for a decay."""
    if cfg.decay_lr and cfg.min_lr > cfg.learning_rate:
        raise UserError(f"min_lr = {cfg.min_lr} must be at most learning_rate = "
                        f"{cfg.learning_rate}")
    in_range(0, 1, cfg, "cooldown")
    longest_warmup = cfg.lr_decay_iters - 1
    if cfg.lr_schedule == "wsd":
        longest_warmup = cooldown_start(cfg)
    if cfg.decay_lr and cfg.warmup_iters > longest_warmup:
        raise UserError(f"warmup_iters = {cfg.warmup_iters} leaves no room for the decay of the "
                        f"learning rate. Nearest that works: --warmup_iters={longest_warmup}")


def lr_at(step, cfg):
    """The learning rate of a step: a linear warmup to learning_rate, then a decay to min_lr.

    The decay is a cosine, or with wsd (warmup, stable, decay) a straight line at the run's end.
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "wsd":
        cooldown_steps = max(cfg.max_iters - cooldown_start(cfg), 1)
        height = min((cfg.max_iters - step) / cooldown_steps, 1.0)  # 1 at the peak, 0 at the end
    else:
        progress = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
        height = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * height


def set_rates(optimizer, step, cfg):
    """Give every group the learning rate of this step, and Muon its momentum. Returns lr_at()."""
    lr = lr_at(step, cfg)
    share = lr / cfg.learning_rate      # the same for all groups
    momentum = cfg.momentum
    if step < cfg.momentum_warmup:
        momentum = FIRST_MOMENTUM + (momentum - FIRST_MOMENTUM) * (step / cfg.momentum_warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
        if "momentum" in group:
            group["momentum"] = momentum
    return lr


def orthogonalize(X):
    """The nearest orthogonal matrices to `X` (N, m, n): all singular values become nearly 1."""
    if X.size(1) > X.size(2):           # the products below are smaller for wide matrices
        return orthogonalize(X.mT).mT
    X = X / (MARGIN * X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT                                                          # (N, m, m)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def equalize(U, state, beta2):
    """Give every output of the matrices `U` (N, m, n) the same size over time, in place.

    Each output (or input, if there are more of these) is divided by the root of its running mean
    square. The size of the whole matrix stays (NorMuon, Li et al. 2025, arXiv 2510.05491).
    """
    mean_dim = 2 if U.size(1) >= U.size(2) else 1
    squares = U.square().mean(mean_dim, keepdim=True)               # (N, m, 1) or (N, 1, n)
    mean_squares = state.setdefault("mean_squares", torch.zeros_like(squares))
    mean_squares.lerp_(squares, 1 - beta2)
    size = U.norm(dim=(1, 2), keepdim=True)                                   # (N, 1, 1)
    U.mul_(mean_squares.clamp(min=1e-10).rsqrt())
    U.mul_(size / U.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10))


class Muon(torch.optim.Optimizer):
    """Muon, for groups as muon_groups makes them. On several GPUs, each computes every update.

    Settings: lr, weight_decay, momentum, dtype of the products, beta2 (above 0: equalize) and
    cautious (decay a weight only if its update shrinks it, too; Chen et al. 2025, 2510.12402).
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, rows = group["params"], group["rows"]
            matrices = [W for p in params for W in p.split(rows)]             # N x (m, n)
            X = torch.stack([G for p in params for G in p.grad.split(rows)])  # (N, m, n)
            state = self.state[params[0]]           # the first weight keeps the state of all
            if not state:
                state["average"] = torch.zeros_like(X)
            average = state["average"].lerp_(X, 1 - group["momentum"])
            X.lerp_(average, group["momentum"])     # Nesterov's momentum
            X = X.to(group["dtype"])
            X = orthogonalize(X).to(average.dtype, memory_format=torch.contiguous_format)
            if group["beta2"]:
                equalize(X, state, group["beta2"])
            rate = group["lr"] * math.sqrt(max(1, X.size(1) / X.size(2)))
            for W, U in zip(matrices, X, strict=True):
                decay = group["lr"] * group["weight_decay"]
                if group["cautious"]:
                    decay = decay * (W * U > 0)
                W.mul_(1 - decay)
                W.add_(U, alpha=-rate)
            del X, U                    # before the next group makes its stack


class MuonAndAdamW:
    """Two optimizers that act as one. GradScaler needs no more than param_groups and step()."""

    def __init__(self, muon, adamw):
        self.muon, self.adamw = muon, adamw

    @property
    def param_groups(self):
        return self.muon.param_groups + self.adamw.param_groups

    def step(self):
        self.muon.step()
        self.adamw.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}
