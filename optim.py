"""How do weights move? Parameter groups, AdamW, Muon, schedules, and an average of the weights.

Muon (Jordan 2024, kellerjordan.github.io/posts/muon) moves each matrix of the blocks by the nearest
orthogonal matrix to its averaged gradient, so that every direction is learned at the same speed.
"""
import math

import torch
from torch.optim.adamw import adamw

# a, b, c of X <- a X + (b A + c A A) X with A = X X', and by how much to shrink X before:
# each step's own polynomial (Amsel et al. 2025, arXiv 2505.16932, for 5 steps), or Jordan's fixed
# one, which torch.optim.Muon has too
ITERATIONS = {
    "polar_express": (1.02, ((8.156555, -22.483293, 15.878770), (4.042930, -2.808917, 0.500018),
                             (3.891668, -2.772484, 0.506065), (3.285754, -2.368129, 0.464490),
                             (2.346541, -1.709783, 0.423236))),
    "quintic": (1.0, ((3.4445, -4.7750, 2.0315),) * 5),
}
ADAM_EPS = 1e-10                # beside Muon: as small as the gradients of rare tokens
FIRST_MOMENTUM = 0.85           # of Muon, as in modded-nanogpt: short while the gradient turns fast
WIDTH = 768                     # n_embd at which embedding_lr and head_lr are what they say
VALUES = 0.5                    # of wte's learning rate has a value embedding's, as in nanochat


def configure_optimizer(model, cfg, device, dtype=torch.bfloat16):
    """The optimizer that `cfg` asks for; each of its groups has its `lr_scale`.

    Products inside Muon are in bf16 where `dtype`, the run's, is; else in fp32.
    """
    fused = device.type in ("cuda", "cpu", "mps")
    if cfg.optimizer == "adamw":
        decay = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        return torch.optim.AdamW(
            [{"params": decay, "weight_decay": cfg.weight_decay, "lr_scale": 1.0},
             {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0}],
            lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)
    named, c = dict(model.named_parameters()), model.config
    by_width = math.sqrt(WIDTH / c.n_embd)
    matrices = {name: p for name, p in named.items() if ".h." in name and p.dim() == 2}
    table = {} if c.tie_word_embeddings else {"transformer.wte.weight": named.pop(
        "transformer.wte.weight")}
    values = [named.pop("transformer.wve.weight")] if c.n_value_table else []
    head = named.pop("transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight")
    rest = [p for name, p in named.items() if name not in matrices]
    adam = {"betas": (cfg.beta1, cfg.beta2), "eps": ADAM_EPS, "fused": fused}
    groups = [
        {"params": list(matrices.values()), "weight_decay": cfg.weight_decay, "lr_scale": 1.0,
         "rows": [rows_of(name, model) for name in matrices], "momentum": cfg.momentum,
         "beta2": cfg.muon_beta2, "cautious": cfg.cautious},
        {"params": list(table.values()), "weight_decay": cfg.embedding_weight_decay,
         "lr_scale": cfg.embedding_lr * by_width / cfg.learning_rate, **adam},
        {"params": values, "weight_decay": 0.0,
         "lr_scale": VALUES * cfg.embedding_lr * by_width / cfg.learning_rate, **adam},
        {"params": [head], "weight_decay": cfg.head_weight_decay,
         "lr_scale": cfg.head_lr * by_width / cfg.learning_rate, **adam},
        {"params": rest, "weight_decay": 0.0,
         "lr_scale": cfg.scalar_lr / cfg.learning_rate, **adam}]
    return Muon([g for g in groups if g["params"]], lr=cfg.learning_rate,
                dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)


def rows_of(name, model):
    """Rows of each matrix that the weight `name` of a block holds, one below the other."""
    block = model.get_submodule(name.rsplit(".", 2)[0])
    if name.endswith("c_attn.weight"):
        return block.sizes
    n = model.get_parameter(name).size(0)
    return [n // 2, n // 2] if name.endswith("c_fc.weight") and block.kind == "swiglu" else [n]


def cooldown_start(cfg):
    """The first step of wsd's cooldown, whose rate is still the peak."""
    return cfg.max_iters - round(cfg.cooldown * cfg.max_iters)


def lr_at(step, cfg):
    """Learning rate of step `step`: a linear warm-up to learning_rate, then down to min_lr.

    By a cosine, or (wsd) after a level stretch in a straight line that ends with the run.
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "wsd":
        left = (cfg.max_iters - step) / max(cfg.max_iters - cooldown_start(cfg), 1)
        return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * min(max(left, 0.0), 1.0)
    # of at least one step: a checkpoint of nanoGPT may have a decay that ends with its warm-up
    done = min((step - cfg.warmup_iters) / max(cfg.lr_decay_iters - cfg.warmup_iters, 1), 1.0)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * done)) / 2


def momentum_at(step, cfg):
    """Muon's momentum of step `step`, which rises for cfg.momentum_warmup steps."""
    done = min(step / cfg.momentum_warmup, 1.0) if cfg.momentum_warmup else 1.0
    return FIRST_MOMENTUM + (cfg.momentum - FIRST_MOMENTUM) * done


def set_rates(optimizer, lr, momentum):
    """Give every group its share of the learning rate `lr`, and Muon's its `momentum`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = momentum


def orthogonalize(X, iteration="polar_express"):
    """The nearest orthogonal matrices to `X` (N, m, n), m <= n: all singular values near 1.

    By a polynomial in X that needs nothing but products, so that bf16 does.
    """
    shrink, coefficients = ITERATIONS[iteration]
    X = X / (X.norm(dim=(1, 2), keepdim=True) * shrink + 1e-7)
    for a, b, c in coefficients:
        A = X @ X.mT                                                          # (N, m, m)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


class Muon(torch.optim.Optimizer):
    """Muon for groups that have a "momentum", AdamW for the others.

    A Muon group has 2-D `params`, and for each of them in `rows` the rows of the matrices that it
    holds one below the other, which are orthogonalised apart. With "beta2" above 0, each output of
    a matrix (each input, where it has more) is divided by the root mean square of its own past
    updates (NorMuon, Li et al. 2025, arXiv 2510.05491). With "cautious", weight decay only where
    the update shrinks the weight too (Chen et al. 2025, arXiv 2510.12402). Every rank makes the
    whole update, from the same gradients.
    """

    def __init__(self, groups, lr, dtype=torch.bfloat16, iteration="polar_express"):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.dtype, self.iteration = dtype, iteration

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (self.muon if "momentum" in group else self.adamw)(group)

    def adamw(self, group):
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros((), device=p.device),
                                     exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(params, [p.grad for p in params], *([s[key] for s in states] for key in
                                                  ("exp_avg", "exp_avg_sq")), [],
              [s["step"] for s in states], fused=group["fused"], amsgrad=False, beta1=beta1,
              beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
              maximize=False)

    def muon(self, group):
        lr, momentum = group["lr"], group["momentum"]
        moved = [(p, rows) for p, rows in zip(group["params"], group["rows"], strict=True)
                 if p.grad is not None]
        for p, _ in moved:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p, _ in moved]
        averages = [self.state[p]["momentum_buffer"] for p, _ in moved]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)     # Nesterov's, in the gradients' place
        together = {}                                       # matrices of one shape go together
        for p, rows in moved:
            for at, (w, u) in enumerate(zip(p.split(rows), p.grad.split(rows), strict=True)):
                together.setdefault(w.shape, []).append((w, u, self.state[p], at))
        for (m, n), pieces in together.items():
            weights, updates, *places = zip(*pieces, strict=True)
            W, tall = torch.stack(weights), m > n                             # (N, m, n)
            U = torch.empty_like(W, dtype=self.dtype)
            torch._foreach_copy_(U.unbind(), updates)
            U = orthogonalize(U.mT if tall else U, self.iteration)
            U = (U.mT if tall else U).to(W.dtype, memory_format=torch.contiguous_format)
            if group["beta2"]:
                U = self.normalized(U, *places, group["beta2"])
            decay = lr * group["weight_decay"]
            W.mul_(1 - decay * (U * W > 0) if group["cautious"] else 1 - decay)
            W.add_(U, alpha=-lr * math.sqrt(max(1, m / n)))
            torch._foreach_copy_(weights, W.unbind())

    def normalized(self, U, states, ats, beta2):
        """`U` (N, m, n) with the outputs of each matrix of equal size, and itself as before."""
        mean = U.square().mean(2 if U.size(1) >= U.size(2) else 1, keepdim=True)
        moments = [state.setdefault(f"second_moment_{at}", torch.zeros_like(mean[0]))
                   for state, at in zip(states, ats, strict=True)]
        torch._foreach_lerp_(moments, mean.unbind(), 1 - beta2)
        scaled = U * torch.stack(moments).clamp(min=1e-10).rsqrt()
        size, now = (X.norm(dim=(1, 2), keepdim=True) for X in (U, scaled))
        return scaled * (size / now.clamp(min=1e-10))


class Average:
    """An exponential moving average of the weights of `model`: average += (w - average) * (1 - d).

    d = 0.5 ** (1 / half_life): what a step put in counts half after `half_life` steps.
    """

    def __init__(self, model, half_life):
        self.decay, self.model = 0.5 ** (1 / half_life), model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(list(self.weights.values()), list(self.model.parameters()),
                             1 - self.decay)

    def swap(self):
        """Exchange the average and the weights of the model; a second time puts them back."""
        for name, p in self.model.named_parameters():
            p.data, self.weights[name] = self.weights[name], p.data

    def __enter__(self):
        self.swap()

    def __exit__(self, *error):
        self.swap()
