"""What only a GPU can show, in one command: speed, memory, sampling, and that they are right.

    python dev/gpu_check.py             # about eight minutes on an H100
    python dev/gpu_check.py --toy=True  # does it run at all? Half a minute on any computer

By turns: a plain GPT-2 step as nanoGPT takes it, ours, ours without each of its changes, and ours
as a captured CUDA graph. Prints tables, adds each row to dev/gpu.jsonl as soon as it is known, and
exits with 1 if a promise is broken. A card of 12 GB shows the first two.
"""
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "dev")]

from bench import Stepper, ours, plain_stepper, planned  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from onecard import runtime  # noqa: E402
from onecard.generate import SamplingConfig, generate  # noqa: E402
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
            p.grad = gradient           # kernels() may have dropped it
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
            with self.world.autocast():     # as before: other settings would compile again
                loss = self.model(self.idx, self.targets) / n
            self.scaler.scale(loss).backward()
            self.loss_sum += loss.detach()


def gpt(stream_in_fp32=False):
    """The class GPT from a fresh copy of model.py: two copies share no compiled hidden()."""
    spec = importlib.util.spec_from_file_location(f"model_{time.perf_counter_ns()}",
                                                  PROJECT / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if stream_in_fp32:
        module.product_dtype = lambda device_type: torch.float32
    return module.GPT


def variants_of(name, cfg, world, fit):
    """{variant: a function that makes its Stepper}"""
    def make(model_class=None, stepper=Stepper, **changes):
        return stepper(ours(cfg, replace(fit, **changes), model_class or gpt()), cfg, world)

    variants = {PLAIN: lambda: plain_stepper(cfg, world),
                "ours": make}
    if runtime.free_bytes(world.device) < 40 * 2**30 and world.device.type == "cuda":
        return variants                 # there is no room for more of them beside each other
    if name != "small":
        variants["stream in fp32"] = lambda: make(gpt(stream_in_fp32=True))
        variants["chunks of 2,048"] = lambda: make(chunk=2048)
        variants["recompute"] = lambda: make(recompute=True)
    variants["captured"] = lambda: make(stepper=Captured)       # the one that is likeliest to fail
    return variants


def kernels(stepper):
    """(milliseconds, number) of the kernels of one micro-batch; 0 where there is no GPU."""
    if stepper.world.device.type != "cuda":
        return 0, 0
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        stepper.gradients()
        torch.cuda.synchronize()
    stepper.model.zero_grad(set_to_none=True)
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    n = stepper.batches.per_step
    return sum(e.time_range.elapsed_us() for e in events) / 1000 / n, len(events) / n


def measure(name, cfg, world, keep, rounds):
    """The rows of one table, as dicts; `keep` gets each one early."""
    run_plan = planned(cfg, world)
    cfg, fit = run_plan.cfg, run_plan.fit       # its batch_size is above 0
    rows, steppers = [], []
    torch._dynamo.reset()               # the loss is compiled for at most eight shapes
    for variant, make in variants_of(name, cfg, world, fit).items():
        torch.manual_seed(0)            # each one begins with the same weights
        row = {"config": name, "variant": variant, **asdict(fit),
               "planned_gib": run_plan.peak_memory / 2**30}
        try:
            stepper = make()
            row["kernel_ms"], row["kernels"] = kernels(stepper)
        except Exception as error:      # without room, or a graph that cannot be captured
            keep(row | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            runtime.free_memory(world.device)
            continue
        row |= {"peak_gib": stepper.peak / 2**30, "grad_norm": stepper.losses[0][1]}
        steppers.append(stepper)
        rows.append(row)
    speeds = [[stepper.step() for stepper in steppers] for _ in range(rounds)]
    for i, row in enumerate(rows):
        row["tokens_per_s"] = statistics.median(of_round[i] for of_round in speeds)
        row["micro_ms"] = 1000 * cfg.batch_size * cfg.block_size / row["tokens_per_s"]
        row["losses"] = [loss for loss, norm in steppers[i].losses]
        keep(row)
    return rows


def print_table(rows):
    print(f"{'':24}{'tokens/s':>10}{'micro ms':>10}{'kernel ms':>11}{'kernels':>9}{'peak GiB':>10}"
          f"{'loss':>9}{'norm':>9}")
    for row in rows:
        print(f"{row['variant']:24}{row['tokens_per_s']:10,.0f}{row['micro_ms']:10.2f}"
              f"{row['kernel_ms']:11.2f}{row['kernels']:9.0f}{row['peak_gib']:10.2f}"
              f"{row['losses'][0]:9.4f}{row['grad_norm']:9.4f}", flush=True)


def promises_of(name, rows, on_gpu):
    """(kept, promise) for a table."""
    of = {row["variant"]: row for row in rows}
    if "ours" not in of:
        yield False, f"{name}: ours runs at all"
        return
    own = of.pop("ours")
    if on_gpu:
        memory = own["planned_gib"] / own["peak_gib"]
        yield 1 <= memory <= 1.1, f"{name}: the plan is {memory:.2f} of its memory, 1 to 1.1"
    plain = of.pop(PLAIN, None)
    if on_gpu and plain and name == "mission":          # the same network and optimizer
        ratio = own["tokens_per_s"] / plain["tokens_per_s"]
        yield ratio > 1, f"{name}: {ratio:.2f} times the plain step's speed, above 1"
    for variant, row in of.items():
        pairs = zip(row["losses"], own["losses"], strict=True)
        same = all(abs(a - b) < 0.05 + 0.02 * b for a, b in pairs)
        same = same and abs(row["grad_norm"] / own["grad_norm"] - 1) < 0.03
        yield same, f"{name}, {variant}: the losses and the first gradient of ours"


def tokens_of(model, n, sampling, fixed_shapes):
    """n tokens, and how many there were a second."""
    started = time.perf_counter()
    n_vocab = min(50256, model.config.vocab_size)       # no end of the text
    sampling = replace(sampling, max_new_tokens=n)
    tokens = list(generate(model, [1, 2, 3], sampling, n_vocab, fixed_shapes))
    return tokens, len(tokens) / (time.perf_counter() - started)


def check_tokens(cfg, world):
    """(kept, promise): the same tokens with a graph, also where the context fills up."""
    network = replace(GPTConfig.of(cfg), block_size=64, tie_word_embeddings=False)
    model = GPT(network).to(world.device).eval()
    for parameter in model.transformer.h.parameters():
        parameter.data.mul_(8)          # opinions: else it writes one token for ever
    torch.set_float32_matmul_precision("highest")       # two tokens may be nearly as likely
    for sampling in (SamplingConfig(temperature=0.0), SamplingConfig(seed=3)):
        pair = [tokens_of(model, 150, sampling, fixed)[0] for fixed in (True, False)]
        same = pair[0] == pair[1] and len(set(pair[0])) > 3
        yield same, f"sampling, temperature {sampling.temperature}: a graph changes no token"
    torch.set_float32_matmul_precision("high")          # as runtime.start() has it


def check_sampling(cfg, world, keep):
    """(kept, promise): tokens a second of one sample."""
    model = GPT(GPTConfig.of(cfg)).to(world.device).eval()
    n = cfg.block_size - 20
    for fixed_shapes, length in ((True, n), (False, min(n, 150))):
        with world.autocast():
            _, speed = tokens_of(model, length, SamplingConfig(), fixed_shapes)
        keep({"sampling": "mission", "graph": fixed_shapes, "tokens_per_s": speed})
        print(f"sampling, graph: {fixed_shapes}, {speed:,.0f} tokens/s")
        if fixed_shapes:
            yield speed > 500, f"sampling: {speed:,.0f} tokens/s, above 500"


def check_products(world):
    """(kept, promise): a sum of products is in fp32, whatever fp16 can hold."""
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.full((8, 4096), 40.0, device=world.device, dtype=dtype)
        product = product_in_fp32(a, a.T)
        yield bool((product == 40 * 40 * 4096).all()), f"sums of {dtype} products are in fp32"


def main(cfg):
    toy, dtype, rounds = [], "auto", ROUNDS
    if cfg.toy:
        toy, dtype, rounds = TOY, "bfloat16", 2
    world = runtime.start(dtype=dtype)
    on_gpu = world.device.type == "cuda" and not cfg.toy        # else nothing is promised of speed
    machine = {"device": runtime.device_name(world.device), "torch": str(torch.__version__),
               "dtype": str(world.dtype), "date": time.strftime("%Y-%m-%d")}
    print(*machine.values())

    def keep(row):
        with open(cfg.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(machine | row) + "\n")
        if "error" in row:
            print(f"{row['variant']}: {row['error']}", flush=True)

    configs = {name: configure(TrainConfig, [str(PROJECT / "config" / file), *toy])
               for name, file in CONFIGS.items()}
    torch.backends.cuda.enable_cudnn_sdp(False)         # as sample.py does
    promises = [*check_products(world), *check_tokens(configs["mission"], world)]
    speed = list(check_sampling(configs["mission"], world, keep))
    if on_gpu:
        promises += speed
    torch.backends.cuda.enable_cudnn_sdp(True)          # as in train.py
    for name, c in configs.items():
        print(f"\n{name}: {c.n_layer} x {c.n_head} x {c.n_embd}")
        rows = measure(name, c, world, keep, rounds)
        runtime.free_memory(world.device)       # of its models
        print_table(rows)
        promises += promises_of(name, rows, on_gpu)
    print()
    for kept, promise in promises:
        print("kept  " if kept else "BROKEN", promise)
    if not all(kept for kept, _ in promises):
        sys.exit(1)


if __name__ == "__main__":
    configure_and_run(main, CheckConfig, __doc__)
