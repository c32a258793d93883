"""How fast is a step? Ours by turns with that of a plain GPT-2 of the same shape.

    python dev/bench.py config/quickstart.py
    python dev/bench.py config/train_fineweb_4070_overnight.py

Ours is train.py's. The plain one is nanoGPT's: torch's attention, all logits at once, AdamW; in
fp32 on a CPU. Prints tokens a second of both, their ratio, and on a GPU their peaks of memory.
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
from onecard import optim, runtime  # noqa: E402
from onecard.settings import configure_and_run  # noqa: E402
from train import TrainConfig, forward_backward  # noqa: E402

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
    """A model that takes steps, always of the same windows."""

    def __init__(self, model, cfg, device, dtype):
        self.device, resident = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
        self.model = model.to(device)
        self.optimizer = optim.configure_optimizer(model, cfg, device, dtype)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        if cfg.compile:
            model.compile(dynamic=False)
        windows = torch.randint(cfg.vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)
        n = min(cfg.windows_per_step // cfg.batch_size, MICRO_BATCHES)
        self.batches = SimpleNamespace(per_step=n, of_step=lambda step: [tuple(windows)] * n)
        self.n_tokens = n * cfg.batch_size * cfg.block_size
        for _ in range(2):              # the first ones compile and make the optimizer's averages
            self.step()
        self.peak = None
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - resident

    def step(self):
        """Tokens a second of one step."""
        started = time.perf_counter()
        forward_backward(self.model, self.batches, 0, self.scaler, self.autocast)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        norm.item()                     # train.py waits for the GPU here, too
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.n_tokens / (time.perf_counter() - started)


def main(cfg):
    world = runtime.start(cfg.device)
    device, dtype = world.device, runtime.pick_dtype(cfg.dtype, world.device)
    plain_dtype = torch.float32 if device.type == "cpu" else dtype
    cfg = replace(cfg, compile=cfg.compile and runtime.can_compile(world))
    # the plain one comes first: ours changes what torch.compile keeps for the backward pass
    steppers = [Stepper(PlainGPT(cfg), replace(cfg, optimizer="adamw"), device, plain_dtype),
                Stepper(GPT(GPTConfig.of(cfg)), cfg, device, dtype)]
    speeds = [[stepper.step() for stepper in steppers] for _ in range(ROUNDS)]
    print(f"{runtime.device_name(device)}, torch {torch.__version__}, compile = {cfg.compile}: "
          f"{cfg.n_layer} x {cfg.n_head} x {cfg.n_embd}, micro-batches of {cfg.batch_size} x "
          f"{cfg.block_size}, {ROUNDS} rounds")
    for i, name in enumerate(("plain", "ours")):
        rates = sorted(pair[i] for pair in speeds)
        peak = "-"
        if steppers[i].peak:
            peak = f"{steppers[i].peak / 2**30:.2f} GiB"
        print(f"{name:6} {statistics.median(rates):,.0f} tokens/s ({rates[0]:,.0f} to "
              f"{rates[-1]:,.0f}), peak memory {peak}")
    ratios = sorted(ours / plain for plain, ours in speeds)
    print(f"ratio  {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    configure_and_run(main, TrainConfig, __doc__)
