"""How fast is a step? Ours, and that of a plain GPT-2 of the same shape.

    python dev/bench.py config/quickstart.py
    python dev/bench.py config/train_fineweb_4070_overnight.py

Ours is train.py's. The plain one is nanoGPT's: torch's attention, all logits at once, AdamW. On a
CPU it computes in fp32. Prints tokens a second of both, their ratio, on a GPU their peaks of
memory, and how long the run will take. The last line is a row for the table in dev/cards.md.
"""
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import GPT, GPTConfig  # noqa: E402
from onecard import cards, optim, plan, runtime  # noqa: E402
from onecard.dataset import half  # noqa: E402
from onecard.settings import configure_and_run  # noqa: E402
from onecard.units import gib  # noqa: E402
from train import TrainConfig, compute_plan, forward_backward  # noqa: E402

ROUNDS = 7                              # measured steps of each kind
MICRO_BATCHES = 8                       # of a measured step, if the run's have more


class PlainBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd, bias=False), nn.GELU(),
                                 nn.Linear(4 * c.n_embd, c.n_embd, bias=False))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.Sequential(*[PlainBlock(c) for _ in range(c.n_layer)])
        self.ln_f = nn.LayerNorm(c.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe.weight[:idx.size(1)]
        logits = self.ln_f(self.h(x)) @ self.wte.weight.T                     # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Stepper:
    """A model that takes steps, always on the same windows. The first two are not measured."""

    def __init__(self, model, cfg, world):
        self.world, self.batch_size = world, cfg.batch_size
        resident = 0
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
        self.model = model.to(world.device)
        self.optimizer = optim.configure_optimizer(model, cfg, world.dtype)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype is torch.float16)
        generator = torch.Generator().manual_seed(1)
        shape = (2, cfg.batch_size, cfg.block_size)
        windows = torch.randint(cfg.vocab_size, shape, generator=generator).to(world.device)
        n = min(cfg.windows_per_step // cfg.batch_size, MICRO_BATCHES)
        # what forward_backward needs of a Batches
        self.batches = SimpleNamespace(per_step=n, of_step=lambda step: [tuple(windows)] * n,
                                       world=world)
        self.n_tokens = n * cfg.batch_size * cfg.block_size
        self.losses = []
        for _ in range(2):              # the first ones compile and make the optimizer's averages
            self.step()
        self.peak = 0                   # bytes; unknown on a CPU
        if world.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - resident

    def gradients(self):
        """Forward and backward of all micro-batches; returns the loss."""
        return forward_backward(self.batches, self.model, 0, self.scaler)

    def step(self):
        """Tokens a second of one step."""
        started = time.perf_counter()
        loss = self.gradients()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # train.py waits for the GPU here, too
        self.losses.append(torch.stack([loss, norm]).tolist())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.zero_grad()          # other models may need the memory
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return self.n_tokens / (time.perf_counter() - started)


def ours(cfg, fit, model_class=GPT):
    """The model that train.py trains, as the plan computes a micro-batch."""
    model = model_class(GPTConfig.of(cfg))
    model.tokens_per_chunk = fit.chunk
    if cfg.compile:
        model.compile(recompute=fit.recompute, dynamic=False)
    return model


def plain(cfg):
    """A plain GPT-2 of the same shape."""
    model = PlainGPT(cfg)
    if cfg.compile:
        model.compile(dynamic=False)
    return model


def plain_stepper(cfg, world):
    """The Stepper of a plain GPT-2, with smaller micro-batches if it runs out of memory."""
    while True:
        try:
            return Stepper(plain(cfg), replace(cfg, optimizer="adamw"), world)
        except (RuntimeError, MemoryError) as error:
            if cfg.batch_size == 1 or not runtime.is_out_of_memory(error):
                raise
        runtime.free_memory(world.device)
        cfg = replace(cfg, batch_size=half(cfg.batch_size))


def measure(name, stepper):
    """Print and return the median tokens a second of ROUNDS steps."""
    rates = sorted(stepper.step() for _ in range(ROUNDS))
    peak = f"{stepper.peak / 2**30:.2f} GiB" if stepper.peak else "-"
    median = statistics.median(rates)
    print(f"{name:6} {median:,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f}), peak memory "
          f"{peak}, micro-batches of {stepper.batch_size} windows")
    return median


def planned(cfg, world):
    """The Plan of `cfg` on this machine."""
    return compute_plan(cfg, GPTConfig.of(cfg), cards.machine_of(world))


def row_of(run_plan):
    """A row for the table of dev/cards.md."""
    cfg, machine, rate, share = run_plan.cfg, run_plan.machine, run_plan.measured, "-"
    flops = rate * run_plan.size.flops_per_token
    if machine.peak_flops:
        share = f"{flops / machine.peak_flops:.1%}"
    return (f"| {machine.name} | onecard {cfg.n_layer} x {cfg.n_head} x {cfg.n_embd}, "
            f"{cfg.optimizer} | {cfg.batch_size} x {cfg.block_size} | {rate:,.0f} | "
            f"{flops / 1e12:.1f} | {share} | dev/bench.py, torch {torch.__version__}, "
            f"{time.strftime('%Y-%m')} |")


def main(cfg):
    world = runtime.start(cfg.device, cfg.dtype)
    plain_dtype = torch.float32 if world.device.type == "cpu" else world.dtype
    if cfg.compile and not runtime.can_compile(world):
        cfg = replace(cfg, compile=False, recompute="auto")
    run_plan = planned(cfg, world)
    cfg = run_plan.cfg
    print(f"{runtime.device_name(world.device)}, torch {torch.__version__}, compile = "
          f"{cfg.compile}: {cfg.n_layer} x {cfg.n_head} x {cfg.n_embd}, windows of "
          f"{cfg.block_size}, {ROUNDS} steps")
    # one after the other, as a card may have no room for both
    speed = measure("ours", Stepper(ours(cfg, run_plan.fit), cfg, world))
    runtime.free_memory(world.device)
    plain_speed = measure("plain", plain_stepper(cfg, replace(world, dtype=plain_dtype)))
    run_plan = replace(run_plan, measured=speed)
    print(f"ratio  {speed / plain_speed:.2f}")
    print(f"plan   peak memory {gib(run_plan.peak_memory)}\n{plan.time_lines(run_plan)[0]}")
    print(row_of(run_plan))


if __name__ == "__main__":
    configure_and_run(main, TrainConfig, __doc__)
