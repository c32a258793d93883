"""Is the plan's memory right? Its formula beside a step that runs on tensors without data.

    python dev/trace.py

Prints a table: GiB that are alive at each peak of a step, and the plan's, which has 5 % more for
what an allocator wastes. The step runs as on a GPU. In a compiled one, torch's own partitioner
decides what the forward pass keeps.
"""
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from model import GPT, GPTConfig  # noqa: E402
from onecard import memory, optim, plan  # noqa: E402
from onecard.cards import Machine  # noqa: E402
from onecard.loss import linear_cross_entropy  # noqa: E402
from onecard.settings import read_config_file  # noqa: E402
from train import TrainConfig  # noqa: E402

MODERN = read_config_file(PROJECT / "config" / "modern.py")
TIED = {**MODERN, "tie_word_embeddings": True, "embed_norm": False}
CASES = (           # network, n_layer n_head n_embd, block_size batch_size, optimizer
    ("gpt2", {}, (12, 8, 512), (1024, 12), "adamw"),
    ("gpt2", {}, (12, 8, 512), (1024, 32), "adamw"),
    ("gpt2", {}, (12, 8, 512), (1024, 1), "adamw"),
    ("gpt2", {}, (12, 12, 768), (1024, 16), "adamw"),
    ("gpt2 with biases", {"bias": True}, (24, 16, 1024), (1024, 4), "adamw"),
    ("gpt2", {}, (24, 16, 1024), (1024, 1), "adamw"),
    ("gpt2", {}, (6, 6, 384), (256, 32), "adamw"),
    ("gpt2 with dropout", {"dropout": 0.1}, (6, 6, 384), (256, 8), "adamw"),
    ("gpt2", {}, (12, 8, 512), (2048, 8), "muon"),
    ("modern", MODERN, (12, 6, 768), (1024, 16), "muon"),
    ("modern", MODERN, (12, 6, 768), (1024, 16), "adamw"),
    ("modern, tied", TIED, (12, 8, 512), (1024, 16), "muon"),
    ("modern", MODERN, (16, 8, 1024), (1024, 4), "muon"),
    ("modern", MODERN, (16, 8, 1024), (1024, 8), "adamw"),
    ("modern", MODERN, (8, 4, 512), (2048, 6), "adamw"),
    ("modern", MODERN, (24, 8, 1024), (512, 1), "adamw"),
    ("modern", MODERN, (24, 8, 1024), (64, 1), "muon"),
    ("modern", MODERN, (6, 3, 384), (256, 2), "muon"),
    ("modern", MODERN, (6, 3, 384), (256, 32), "muon"))


class Trace(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage._cdata in self.alive:
            return
        n_bytes = -(-storage.nbytes() // 512) * 512         # CUDA's allocator rounds up to 512
        self.alive.add(storage._cdata)
        self.total += n_bytes
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self.drop, storage._cdata, n_bytes)

    def drop(self, key, n_bytes):
        self.alive.remove(key)
        self.total -= n_bytes

    def new_peak(self):
        """The peak until now; the next one starts from what is alive."""
        peak, self.peak = self.peak, self.total
        return peak


class FusedRMSNorm(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_weight = None if weight is None else torch.empty_like(weight)
        return torch.empty_like(x), grad_weight


def rms_norm_of_a_gpu(x, size, weight=None, eps=None):
    """Keeps its input for the backward pass. A CPU's keeps the result of each operation."""
    return FusedRMSNorm.apply(x, weight)


def fused_chunk(x, w, targets, counts, grad_w):
    """What a compiled loss_of_chunk keeps: logits in the dtype of w, and none in fp32."""
    logits, total = x @ w.T, x.new_zeros((), dtype=torch.float32)
    if grad_w is None:
        return total, None
    grad = torch.empty_like(logits)
    grad_w += grad.T @ x
    return total, grad @ w


def compiled_hidden(model):
    """model.hidden, keeping for its backward pass what it keeps when it is compiled."""
    torch._functorch.config.ban_recompute_materialized_backward = False     # as in GPT.compile
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx):
            return self.model.hidden(idx)

    hidden = Hidden()

    def function(values, idx):
        named = {f"model.{name}": t for name, t in zip(tensors, values, strict=True)}
        return torch.func.functional_call(hidden, named, (idx,))

    def partition(graph, inputs, **options):
        # weights are in memory anyway: keeping them is free, keeping them in bf16 is not
        options["static_lifetime_input_indices"] = list(range(len(tensors)))
        return min_cut_rematerialization_partition(graph, inputs, **options)

    traced = aot_function(function, fw_compiler=lambda graph, _: make_boxed_func(graph),
                          partition_fn=partition, decompositions=select_decomp_table())
    return lambda idx: traced(list(tensors.values()), idx)


def trace(cfg):
    """{"loss", "backward", "optimizer", "evaluation": bytes} at the peaks of a step in bf16.

    Compiled, "loss" is the peak from the loss on, and "backward" what is alive when the new
    gradients are there. The rest of a compiled pass is fused and cannot be traced.
    """
    autocast, rms_norm = torch.autocast("cpu", dtype=torch.bfloat16), F.rms_norm
    if not cfg.compile:
        rms_norm = rms_norm_of_a_gpu
    with torch.random.fork_rng(), mock.patch.object(F, "rms_norm", rms_norm), \
            FakeTensorMode(allow_non_fake_inputs=True), Trace() as traced:
        model = GPT(GPTConfig.of(cfg))
        for block in model.transformer.h:
            block.attn.dropout = 0.0            # a GPU's attention keeps nothing for its dropout
        optimizer = optim.configure_optimizer(model, cfg, torch.device("cpu"), torch.bfloat16)
        hidden, peaks = model.hidden, {"loss": 0, "backward": 0, "optimizer": 0}
        if cfg.compile:
            hidden, model.loss_of_chunk = compiled_hidden(model), fused_chunk

        def on_gradient(gradient):
            peaks["backward"] = max(peaks["backward"], traced.total)

        for p in model.parameters():
            p.register_hook(on_gradient)
        idx = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
        for _ in range(2):                      # the second step has gradients and averages
            with autocast:
                x = hidden(idx)
                if cfg.compile:
                    traced.new_peak()
                loss = linear_cross_entropy(x, model.lm_head.weight, idx, model.loss_of_chunk)
                del x
            if cfg.compile:
                peaks["loss"] = traced.new_peak()
            loss.backward()
            del loss
            if not cfg.compile:
                peaks["loss"] = traced.new_peak()
            traced.new_peak()
            optimizer.step()
            peaks["optimizer"] = max(peaks["optimizer"], traced.new_peak())
        optimizer.zero_grad(set_to_none=True)
        traced.new_peak()
        with torch.no_grad(), autocast:
            model.eval()(idx, idx)
        return {**peaks, "evaluation": traced.new_peak()}


def trace_whole(cfg):
    """trace(cfg), from what it says of two and of three layers: each further one needs as much."""
    two, three = trace(replace(cfg, n_layer=2)), trace(replace(cfg, n_layer=3))
    return {key: two[key] + (three[key] - two[key]) * (cfg.n_layer - 2) for key in two}


def row(name, network, shape, step, optimizer, compiled):
    """A line of the table."""
    (n_layer, n_head, n_embd), (block_size, batch_size) = shape, step
    cfg = TrainConfig(**{"bias": False, **network}, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                      block_size=block_size, batch_size=batch_size, optimizer=optimizer,
                      compile=compiled)
    peaks = trace_whole(cfg)
    with torch.device("meta"):
        model = GPT(GPTConfig.of(cfg))
    size = plan.Size(model.config, **model.count_parameters(), flops_per_token=0.0)
    machine = Machine("a GPU", "cuda", torch.bfloat16, math.inf)
    planned = memory.needed(cfg, size, machine, batch_size)
    cells = [f"{name} {n_layer} x {n_head} x {n_embd}", f"{batch_size} x {block_size}", optimizer,
             "compiled" if compiled else "eager",
             *[f"{n_bytes / 2**30:.2f}" for n_bytes in (*peaks.values(), planned)],
             f"{planned / max(peaks.values()):.3f}"]
    return f"| {' | '.join(cells)} |"


def main():
    print("| network | batch | optimizer | | loss | backward | optimizer | evaluation | planned | "
          "planned / largest |\n|---|---|---|---|--:|--:|--:|--:|--:|--:|")
    for compiled in (True, False):
        for case in CASES:
            print(row(*case, compiled), flush=True)


if __name__ == "__main__":
    main()
