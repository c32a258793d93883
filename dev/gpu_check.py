"""What only a GPU can show, in one command: speed, memory, sampling, and that they are right.

    python dev/gpu_check.py             # about eight minutes on an H100
    python dev/gpu_check.py --toy=True  # does it run at all? Half a minute on any computer

By turns: a plain GPT-2 step as nanoGPT takes it, ours, ours without each of its changes, and ours
as a captured CUDA graph. Prints tables, adds each row to dev/gpu.jsonl, and exits with 1 if a
promise is broken.
"""
import gc
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "dev")]

from bench import Stepper, ours, plain, planned  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from onecard import runtime  # noqa: E402
from onecard.generate import DrawConfig, generate  # noqa: E402
from onecard.loss import product_in_fp32  # noqa: E402
from onecard.settings import configure, configure_and_run  # noqa: E402
from train import TrainConfig  # noqa: E402

ROUNDS = 10                             # measured steps of each variant, by turns
PLAIN = "plain (nanoGPT's way)"
TOY = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--vocab_size=512",
       "--batch_size=2", "--tokens_per_step=256", "--compile=False"]
CONFIGS = {
    "mission": "train_fineweb_4070_one_shard.py",
    "evening": "train_fineweb_4070_evening.py",
    "small": "cpu_speedrun.py"}


@dataclass(frozen=True)
class CheckConfig:
    toy: bool = False                   # tiny models that are not compiled, on any computer
    out: str = str(PROJECT / "dev" / "gpu.jsonl")       # rows of the tables are added to this file


class Captured(Stepper):
    """A Stepper that records a micro-batch once, as a CUDA graph, and then repeats it."""
    graph = None

    def gradients(self):
        if self.world.device.type != "cuda" or len(self.losses) < 2:    # the first steps compile
            return super().gradients()
        if self.graph is None:
            self.capture()
        for p, gradient in zip(self.model.parameters(), self.gradient_tensors, strict=True):
            p.grad = gradient           # an optimizer's zero_grad has dropped it
        torch._foreach_zero_(self.gradient_tensors)
        self.loss_sum.zero_()
        for _ in range(self.batches.per_step):
            self.graph.replay()
        return self.loss_sum.clone()

    def capture(self):
        device, n = self.world.device, self.batches.per_step
        self.idx, self.targets = next(iter(self.batches.of_step(0)))
        self.loss_sum = torch.zeros((), device=device)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.gradient_tensors = [p.grad for p in self.model.parameters()]
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may go on asking for memory
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            with torch.autocast(device.type, self.world.dtype, cache_enabled=False):
                loss = self.model(self.idx, self.targets) / n
            loss.backward()
            self.loss_sum += loss.detach()


def gpt(stream_in_fp32=False):
    """The class GPT from a fresh copy of model.py: two copies share no compiled code."""
    spec = importlib.util.spec_from_file_location(f"model_{time.perf_counter_ns()}",
                                                  PROJECT / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if stream_in_fp32:
        module.product_dtype = lambda device_type: torch.float32
    return module.GPT


def steppers_of(name, cfg, world, fit):
    """(variant, its Stepper), one after the other."""
    yield PLAIN, Stepper(plain(cfg), replace(cfg, optimizer="adamw"), world)
    yield "ours", Stepper(ours(cfg, world, fit, gpt()), cfg, world)
    if name != "small":
        stream = gpt(stream_in_fp32=True)
        small_chunks, recompute = replace(fit, chunk=2048), replace(fit, recompute=True)
        yield "stream in fp32", Stepper(ours(cfg, world, fit, stream), cfg, world)
        yield "chunks of 2,048", Stepper(ours(cfg, world, small_chunks, gpt()), cfg, world)
        yield "recompute", Stepper(ours(cfg, world, recompute, gpt()), cfg, world)
    yield "captured", Captured(ours(cfg, world, fit, gpt()), cfg, world)


def kernels(stepper):
    """(milliseconds, number) of the kernels of one micro-batch; None where there is no GPU."""
    if stepper.world.device.type != "cuda":
        return None, None
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        stepper.gradients()
        torch.cuda.synchronize()
    stepper.model.zero_grad(set_to_none=True)
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    n = stepper.batches.per_step
    return sum(e.time_range.elapsed_us() for e in events) / 1000 / n, len(events) / n


def measure(name, cfg, world):
    """The rows of one table, as dicts."""
    fit, n_bytes = planned(cfg, world)
    cfg = replace(cfg, batch_size=fit.batch_size)
    rows, steppers = [], []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for variant, stepper in steppers_of(name, cfg, world, fit):
        torch.set_rng_state(state)      # the next one begins with the same weights
        ms, number = kernels(stepper)
        steppers.append(stepper)
        rows.append({"config": name, "variant": variant, "batch_size": fit.batch_size,
                     "chunk": fit.chunk, "kernel_ms": ms, "kernels": number,
                     "peak_gib": (stepper.peak or 0) / 2**30, "planned_gib": n_bytes / 2**30})
    speeds = [[stepper.step() for stepper in steppers] for _ in range(ROUNDS)]
    for i, row in enumerate(rows):
        row["tokens_per_s"] = statistics.median(of_round[i] for of_round in speeds)
        row["micro_ms"] = 1000 * cfg.batch_size * cfg.block_size / row["tokens_per_s"]
        row["losses"] = [loss for loss, norm in steppers[i].losses]
        row["grad_norm"] = steppers[i].losses[0][1]
    return rows


def print_table(rows):
    print(f"{'':24}{'tokens/s':>10}{'micro ms':>10}{'kernel ms':>11}{'kernels':>9}{'peak GiB':>10}"
          f"{'loss':>9}{'norm':>9}")
    for row in rows:
        print(f"{row['variant']:24}{row['tokens_per_s']:10,.0f}{row['micro_ms']:10.2f}"
              f"{row['kernel_ms'] or 0:11.2f}{row['kernels'] or 0:9.0f}{row['peak_gib']:10.2f}"
              f"{row['losses'][0]:9.4f}{row['grad_norm']:9.4f}", flush=True)


def promises_of(rows):
    """(kept, promise) for a table."""
    of = {row["variant"]: row for row in rows}
    own, name = of["ours"], rows[0]["config"]
    if own["kernels"]:                  # on a GPU
        ratio = own["tokens_per_s"] / of[PLAIN]["tokens_per_s"]
        memory = own["planned_gib"] / own["peak_gib"]
        yield ratio > 1, f"{name}: {ratio:.2f} times the plain step's speed, above 1"
        yield 1 <= memory <= 1.1, f"{name}: the plan is {memory:.2f} of its memory, 1 to 1.1"
    for variant, row in of.items():
        if variant in (PLAIN, "ours"):
            continue
        pairs = zip(row["losses"], own["losses"], strict=True)
        same = all(abs(a - b) < 0.05 + 0.02 * b for a, b in pairs)
        same = same and abs(row["grad_norm"] / own["grad_norm"] - 1) < 0.03
        yield same, f"{name}, {variant}: the losses and the first gradient of ours"


def tokens_of(model, n, draw, fixed_shapes):
    """n tokens, and how many there were a second."""
    started = time.perf_counter()
    tokens = list(generate(model, [1, 2, 3], n, draw, 500, fixed_shapes))
    return tokens, n / (time.perf_counter() - started)


def check_sampling(cfg, world):
    """(rows, promises): tokens a second, and the same tokens whatever the shapes."""
    model = GPT(GPTConfig.of(cfg)).to(world.device).eval()
    torch.backends.cuda.enable_cudnn_sdp(False)         # as in sample.py
    rows, promises, n = [], [], cfg.block_size - 20
    torch.set_float32_matmul_precision("highest")       # two likely tokens may be nearly alike
    for draw in (DrawConfig(temperature=0.0), DrawConfig(seed=3)):
        pair = [tokens_of(model, min(n, 150), draw, fixed)[0] for fixed in (True, False)]
        promises.append((pair[0] == pair[1],
                         f"sampling, temperature {draw.temperature}: a graph changes no token"))
    for fixed_shapes, length in ((True, n), (False, min(n, 150))):
        with world.autocast():
            _, speed = tokens_of(model, length, DrawConfig(), fixed_shapes)
        rows.append({"sampling": "mission", "graph": fixed_shapes, "tokens_per_s": speed})
    if world.device.type == "cuda":
        speed = rows[0]["tokens_per_s"]
        promises.append((speed > 500, f"sampling: {speed:,.0f} tokens/s, above 500"))
    return rows, promises


def check_products(world):
    """(kept, promise): a sum of products is in fp32, whatever fp16 can hold."""
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.full((8, 4096), 40.0, device=world.device, dtype=dtype)
        product = product_in_fp32(a, a.T)
        yield bool((product == 40 * 40 * 4096).all()), f"sums of {dtype} products are in fp32"


def main(cfg):
    toy, dtype = [], "auto"
    if cfg.toy:
        toy, dtype = TOY, "bfloat16"
    world = runtime.start(dtype=dtype)
    machine = {"device": runtime.device_name(world.device), "torch": str(torch.__version__),
               "dtype": str(world.dtype), "date": time.strftime("%Y-%m-%d")}
    print(*machine.values())
    configs = {name: configure(TrainConfig, [str(PROJECT / "config" / file), *toy])
               for name, file in CONFIGS.items()}
    promises, all_rows = list(check_products(world)), []
    for name, c in configs.items():
        print(f"\n{name}: {c.n_layer} x {c.n_head} x {c.n_embd}")
        rows = measure(name, c, world)
        gc.collect()                    # its models
        runtime.free_memory(world.device)
        print_table(rows)
        promises += promises_of(rows)
        all_rows += rows
    rows, kept = check_sampling(configs["mission"], world)
    for row in rows:
        print(f"\nsampling, graph: {row['graph']}, {row['tokens_per_s']:,.0f} tokens/s", end="")
    promises += kept
    print("\n")
    for kept, promise in promises:
        print("kept  " if kept else "BROKEN", promise)
    with open(cfg.out, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(machine | row) + "\n" for row in [*all_rows, *rows])
    if not all(kept for kept, _ in promises):
        sys.exit(1)


if __name__ == "__main__":
    configure_and_run(main, CheckConfig, __doc__)
