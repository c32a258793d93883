"""
How fast is a step on this machine, and what does it need? Measured beside the plan and a baseline.

    python bench.py config/quickstart.py
    python bench.py config/quickstart.py --baseline     # in turns with a step as nanoGPT does it

Prints tokens per second, the share of what a product of matrices reaches in the same run, peak
memory beside the planned one, and where the seconds go; adds a line to dev/bench.jsonl.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

import checkpoint
import loader
import optim
import plan
import runtime
import train
from configurator import run
from eval import evaluate

ROWS = Path("dev") / "bench.jsonl"


@dataclass(frozen=True)
class BenchConfig(train.TrainConfig):
    rounds: int = 7                     # measured micro-batches of each kind, in turns
    baseline: bool = False              # also a plain step: fp32 (GPU: bf16) eager; bf16 compiled
    memory_of: str = ""                 # ours, plain, compiled: print its peak in bytes, no more


class PlainBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.n_embd, bias=c.bias) for _ in range(2))
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias), nn.GELU(),
                                 nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                   for t in self.c_attn(self.ln_1(x)).split(C, 2))            # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class Plain(nn.Module):
    """The same network as nanoGPT computes it: torch's attention, and all logits of the loss."""

    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size,
                                                                                c.n_embd)
        self.h = nn.Sequential(*(PlainBlock(c) for _ in range(c.n_layer)))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        logits = self.ln_f(self.h(x)) @ self.wte.weight.T                     # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Step:
    """A model with its optimizer and the seconds of its micro-steps, by phase."""

    def __init__(self, name, model, cfg, device, dtype, compiled):
        self.name, self.model, self.device = name, model.to(device), device
        if compiled:
            self.model.compile(dynamic=False)
        self.autocast = torch.autocast(device.type, dtype=dtype,
                                       enabled=dtype is not torch.float32)
        self.optimizer = optim.configure_optimizer(self.model, cfg, device, dtype)
        self.seconds = {"micro": [], "forward": [], "backward": [], "optimizer": []}

    def forward(self, idx, targets):
        # nanoGPT compiles with torch's own choice of what to keep for the backward
        with torch._functorch.config.patch(
                ban_recompute_materialized_backward=self.name == "compiled"), self.autocast:
            out = self.model(idx, targets)
        return (None, out) if torch.is_tensor(out) else out

    def micro_steps(self, idx, targets, n):
        """Back to back, as in a step of training."""
        began = self.now()
        for _ in range(n):
            logits, loss = self.forward(idx, targets)   # held until the next, as in nanoGPT's loop
            loss.backward()
        self.seconds["micro"].append((self.now() - began) / n)

    def phases(self, idx, targets):
        """One micro-step that waits for the device between its parts."""
        began = self.now()
        logits, loss = self.forward(idx, targets)
        done = self.now()
        loss.backward()
        self.seconds["forward"].append(done - began)
        self.seconds["backward"].append(self.now() - done)

    def update(self):
        began = self.now()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds["optimizer"].append(self.now() - began)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def forget(self):
        self.seconds = {name: [] for name in self.seconds}


def make_step(kind, cfg, model, device, dtype):
    """'ours' as train.py runs it, or 'plain' and 'compiled' as nanoGPT does."""
    if kind == "ours":
        return Step(kind, model, cfg, device, dtype, cfg.compile)
    plain_dtype = torch.float32 if kind == "plain" and device.type == "cpu" else dtype
    return Step(kind, Plain(model.config), replace(cfg, optimizer="adamw"), device, plain_dtype,
                kind == "compiled")


def peak_memory(step, idx, targets):
    """Bytes of weights, gradients, optimizer and one micro-step at its peak, or None if unknown."""
    step.micro_steps(idx, targets, 1)
    step.update()
    step.micro_steps(idx, targets, 1)       # from here on everything is there that a step has
    runtime.free_memory(step.device)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.micro_steps(idx, targets, 1)
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if step.device.type != "cpu" or not status.is_file():
        return None

    def kib(name):
        return next(int(line.split()[1]) for line in status.read_text().splitlines()
                    if line.startswith(name))
    Path("/proc/self/clear_refs").write_text("5")           # the peak starts here
    before = kib("VmRSS:")
    step.micro_steps(idx, targets, 1)
    state = 16 * sum(p.numel() for p in step.model.parameters())
    return state + (kib("VmHWM:") - before) * 1024


def memory_in_another_process(kind):
    """peak_memory, where nothing else was allocated and glibc gives memory back at once."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--memory_of={kind}"],
                          text=True, capture_output=True, env={
                              **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536",
                              "MALLOC_TRIM_THRESHOLD_": "65536"})
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    last = done.stdout.split()[-1]
    return None if last == "None" else int(last)


def main(cfg):
    world = runtime.start(cfg.device)
    device = world.device
    dtype = runtime.pick_dtype(cfg.dtype, device)
    if cfg.compile and runtime.compile_obstacle(device):
        cfg = replace(cfg, compile=False)
    torch.manual_seed(cfg.seed)
    folder = train.ensure_prepared(cfg.dataset, world)
    model = train.build_model(cfg, None, folder)
    data = loader.Dataset(folder, "train", cfg.block_size, model.config.vocab_size, cfg.seed)
    val = loader.Dataset(folder, "val", cfg.block_size, model.config.vocab_size)
    on = plan.machine(device, dtype)
    if not cfg.batch_size:
        B, accumulation, _ = plan.choose_batch(cfg, model.config, on, dtype, cfg.compile)
        cfg = replace(cfg, batch_size=B, gradient_accumulation_steps=accumulation)
    B = cfg.batch_size
    if cfg.memory_of:
        step = make_step(cfg.memory_of, cfg, model, device, dtype)
        batch = (t.to(device) for t in data.training_batch(0, B))
        print(peak_memory(step, *batch))
        return

    kinds = ("ours", "plain", "compiled") if cfg.baseline else ("ours",)
    planned = plan.trace(model.config, B, dtype, cfg.compile, cfg)
    print(f"machine    {runtime.device_name(device)}, {str(dtype).removeprefix('torch.')}, "
          f"torch {torch.__version__}")
    print(f"step       {cfg.n_layer} layers x {cfg.n_head} heads x {cfg.n_embd}, {B} windows of "
          f"{cfg.block_size}, {'compiled' if cfg.compile else 'eager'}")
    memory = {kind: memory_in_another_process(kind) for kind in kinds}
    steps = [make_step(kind, cfg, model, device, dtype) for kind in kinds]
    batches = loader.ahead(lambda place: data.training_batch(place, B),
                           range(0, (cfg.rounds + 3) * B, B), device)
    peaks, waited = [], []
    for r in range(cfg.rounds + 2):         # the first two compile and make the optimizer's state
        began = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - began)
        for step in steps:
            if r == 2:
                step.forget()
            step.micro_steps(*batch, n=8 if device.type == "cuda" else 1)
            if step is steps[0]:
                step.phases(*batch)
            step.update()
        peaks.append(runtime.measured_flops(device, dtype, at_least_s=0.1))
    ours, peak = steps[0], max(peaks)
    n_windows = min(4 * B, val.n_windows)
    evaluate(ours.model, val, n_windows, B, world, ours.autocast)
    began = ours.now()
    evaluate(ours.model, val, n_windows, B, world, ours.autocast)
    evaluation = (ours.now() - began) / n_windows
    with tempfile.TemporaryDirectory(dir=".") as there:
        began = time.perf_counter()
        checkpoint.save({"model": ours.model.state_dict(),
                         "optimizer": ours.optimizer.state_dict()}, Path(there) / "ckpt.pt")
        save = time.perf_counter() - began

    median = {name: statistics.median(s) for name, s in ours.seconds.items()}
    micro = median.pop("micro")
    whole = cfg.gradient_accumulation_steps * (micro + statistics.median(waited[2:])) \
        + median["optimizer"]
    rate = plan.tokens_per_step(cfg) / whole
    row = {"date": time.strftime("%Y-%m-%d"), "device": runtime.device_name(device),
           "torch": str(torch.__version__), "dtype": str(dtype), "compile": cfg.compile,
           "shape": [cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, B], "tokens_per_s": rate,
           "micro_tokens_per_s": B * cfg.block_size / micro,
           "flops": B * cfg.block_size * model.flops_per_token() / micro, "matmul_flops": peak,
           "memory": memory["ours"], "planned_memory": planned["micro_step"],
           "seconds": {"data": statistics.median(waited[2:]), **median,
                       "evaluation_per_window": evaluation, "save": save}, "rounds": cfg.rounds}
    print(f"speed      {rate:,.0f} tokens/s; a micro-batch reaches {row['flops'] / 1e12:,.3g} "
          f"TFLOP/s, {row['flops'] / peak:.0%} of the {peak / 1e12:,.3g} of a product of matrices")
    print("seconds    " + ", ".join(f"{name} {s:.4f}" for name, s in row["seconds"].items()))
    shown = f"{memory['ours'] / plan.GIB:.2f} GiB" if memory["ours"] else "-"
    print(f"memory     {shown} at the peak of a micro-step, "
          f"{planned['micro_step'] / plan.GIB:.2f} planned")
    for step in steps[1:]:
        name = f"{'bf16' if step.autocast._enabled else 'fp32'} " \
            f"{'compiled' if step.name == 'compiled' else 'eager'}"
        ratios = sorted(theirs / mine for theirs, mine in
                        zip(step.seconds["micro"], ours.seconds["micro"], strict=True))
        row[step.name] = {"speedup": statistics.median(ratios), "from": ratios[0],
                          "to": ratios[-1], "memory": memory[step.name]}
        share = f"{memory['ours'] / memory[step.name]:.2f}" if memory["ours"] else "an unknown part"
        print(f"baseline   nanoGPT's step, {name}: ours is {row[step.name]['speedup']:.2f} times "
              f"as fast ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds) and peaks at "
              f"{share} of its memory")
    ROWS.parent.mkdir(exist_ok=True)
    with open(ROWS, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run(main, BenchConfig, __doc__)
