"""
What will this run cost? Parameters, tokens, epochs, memory, time, disk: before the first step.

    python plan.py config/NAME.py                           # on this machine
    python plan.py config/NAME.py --device_name='RTX 4070'  # on any laptop
    python plan.py config/NAME.py --batch_size=0            # with the largest micro-batch that fits
    python plan.py config/NAME.py 000_00000.parquet         # of a file that is not prepared yet

train.py prints the same block before it starts (and stops after it with --dry_run).
"""
import contextlib
import difflib
import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import loader
import optim
import runtime
from configurator import run
from model import CHUNK, GPT, GPTConfig

GIB = 2**30
R_STAR = 15.387756      # repetitions until another one adds 1/e (Muennighoff et al. 2023, eq. 5)
TOKENS_PER_PARAMETER = 20           # compute-optimal (Hoffmann et al. 2022)
SHARE_OF_PEAK = 0.5                 # what a step reaches of the peak, until it is measured
VISIBLE = 0.976         # of a card's memory, to CUDA on Linux (4070: 11,994 of 12,282 MiB)
CONTEXT_GIB = 0.5                   # of CUDA itself, before the first tensor (0.51 on an H100)
KERNELS_GIB = 0.3                   # of the kernels that a run loads (0.24 on an H100)
FRAGMENTATION = 1.05                # what the allocator holds of what is traced (0.99 to 1.04 seen)
MOST_TOKENS = {"cuda": 2**16, "cpu": 2**13}     # in a micro-batch that batch_size = 0 chooses
SAMPLED_GROUPS = 8                  # row groups to tokenize where a file does not say its tokens


# tokens

def tokens_per_step(cfg):
    """Tokens in one step over all micro-batches and processes."""
    return cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size \
        if cfg.batch_size else cfg.tokens_per_step


def effective_tokens(unique, total):
    """What `total` tokens that repeat `unique` ones are worth in new tokens.

    U + U R* (1 - exp(-R / R*)), R the repetitions after the first time (Muennighoff et al. 2023,
    equation 5).
    """
    if total <= unique:
        return total
    return unique + unique * R_STAR * (1 - math.exp(-(total / unique - 1) / R_STAR))


def tokens_worth(effective, unique):
    """How many tokens of `unique` ones are worth `effective` new ones; None if no number is."""
    if effective <= unique:
        return effective
    left = 1 - (effective / unique - 1) / R_STAR
    return unique * (1 - R_STAR * math.log(left)) if left > 0 else None


def count_parquet(path, text_column="text"):
    """GPT-2 tokens of a parquet file, each document with its end-of-text, without preparing it.

    {"tokens", "documents", "error" (two standard errors, 0 for a count), "how"}: the sum of its
    column token_count, or an estimate from the tokens per byte of some row groups.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from sources import open_parquet
    from tokenizer import GPT2Tokenizer

    file = open_parquet(path, text_column)
    n_documents, n_groups = file.metadata.num_rows, file.metadata.num_row_groups
    if "token_count" in file.schema_arrow.names:
        counts = pq.read_table(path, columns=["token_count"]).column(0)
        return {"tokens": sum(x for x in counts.to_pylist() if x) + n_documents,
                "documents": n_documents, "error": 0, "how": "its column token_count"}
    column = [file.metadata.row_group(0).column(i).path_in_schema
              for i in range(file.metadata.num_columns)].index(text_column)
    n_bytes = np.array([file.metadata.row_group(g).column(column).total_uncompressed_size
                        for g in range(n_groups)], float)
    # evenly spread, each standing for the groups around it
    sampled = np.unique(np.linspace(0, n_groups - 1, min(SAMPLED_GROUPS, n_groups)).round()) \
        .astype(int)
    encode, tokens = GPT2Tokenizer().encode, []
    for g in sampled:
        texts = file.read_row_group(int(g), columns=[text_column]).column(0).to_pylist()
        tokens.append(sum(len(encode(text)) + 1 for text in texts if text))
    ratio = sum(tokens) / max(n_bytes[sampled].sum(), 1)
    n, residuals = len(sampled), np.array(tokens) - ratio * n_bytes[sampled]
    # of a ratio estimator (Cochran 1977, equation 6.13)
    error = 0 if n == n_groups else n_groups * math.sqrt(
        (1 - n / n_groups) / n * (residuals**2).sum() / max(n - 1, 1))
    return {"tokens": round(ratio * n_bytes.sum()), "documents": n_documents,
            "error": round(2 * error),
            "how": f"{n} of its {n_groups} row groups, tokenized"}


def of_dataset(data, val):
    """What a plan needs to know of two loader.Dataset."""
    return {"where": str(data.folder), "tokens": data.n_tokens, "documents": data.n_documents,
            "error": 0, "how": "prepared", "val_tokens": val.n_tokens, "prepared": True}


def not_prepared(where, found):
    """The same of what prepare.py has not seen, which will keep a part of it for validation."""
    from prepare import BYTES_PER_TOKEN, val_share

    share = val_share(found["tokens"] * BYTES_PER_TOKEN)
    val = round(found["tokens"] * share)
    return {**found, "where": str(where), "tokens": found["tokens"] - val, "val_tokens": val,
            "documents": round(found["documents"] * (1 - share)), "prepared": False}


# memory

class Trace(TorchDispatchMode):
    """Bytes of all tensors that are alive, by kind, while operations run on fake tensors."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.kind = {}, 0, "weights"
        self.start_peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.alive:
            n_bytes = -(-storage.nbytes() // 512) * 512         # as CUDA's allocator rounds
            self.alive[key] = n_bytes, self.kind
            self.total += n_bytes
            weakref.finalize(storage, self.drop, key)
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, self.kinds()

    def drop(self, key):
        self.total -= self.alive.pop(key)[0]

    def call(self, tensors, kind):
        """From now on `tensors` count as `kind`."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self.alive[key] = self.alive[key][0], kind

    def kinds(self):
        by_kind = {}
        for n_bytes, kind in self.alive.values():
            by_kind[kind] = by_kind.get(kind, 0) + n_bytes
        return by_kind

    def start_peak(self):
        self.peak, self.at_peak = self.total, self.kinds()


def fused_chunk(x, w, targets, counts, grad_w, softcap=0.0):
    """What model.loss_of_chunk keeps at a time where it is compiled: no wide logits."""
    logits, total = x @ w.T, x.new_zeros((), dtype=torch.float32)
    if grad_w is None:
        return total, None
    grad = torch.empty_like(logits)
    grad_w += grad.T @ x
    return total, grad @ w


def compiled_hidden(model):
    """A function of idx that computes `model.hidden` and keeps what torch.compile keeps of it."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table

    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx):
            return self.model.hidden(idx)

    hidden = Hidden()

    def pure(idx, *values):
        return torch.func.functional_call(
            hidden, {f"model.{n}": t for n, t in zip(tensors, values, strict=True)}, (idx,))

    traced = aot_function(pure, fw_compiler=lambda graph, _: make_boxed_func(graph),
                          partition_fn=min_cut_rematerialization_partition,
                          decompositions=select_decomp_table())
    return lambda idx: traced(idx, *tensors.values())


@contextlib.contextmanager
def faked(make, dtype, cfg):
    """(a Trace, the module that `make` makes, its optimizer), all of it on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), \
            Trace() as traced:
        model = make()
        optimizer = optim.configure_optimizer(model, cfg, torch.device("cpu"), dtype) if cfg \
            else torch.optim.AdamW(model.parameters(), fused=True)
        traced.kind = "optimizer"
        average = optim.Average(model, 1) if cfg and cfg.ema_half_life else None    # noqa: F841
        yield traced, model, optimizer


def trace_update(make, dtype, cfg):
    """Peak bytes of the optimizer's first step, which makes its state.

    Of all blocks: which of its groups Muon peaks at depends on how many there are.
    """
    with faked(make, dtype, cfg) as (traced, model, optimizer):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        return traced.peak


def trace_passes(make, batch_size, dtype, compiled, cfg):
    """{kind: bytes} at the peak of a micro-step, and the peak of an "evaluation"."""
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32)
    with faked(make, dtype, cfg) as (traced, model, optimizer):
        hidden = None
        if isinstance(model, GPT):
            for block in model.transformer.h:
                block.attn.dropout = 0.0        # fused attention keeps nothing for its dropout
            hidden = compiled_hidden(model) if compiled else model.hidden
            if compiled:
                model.loss_of_chunk = fused_chunk
        traced.kind = "activations"
        idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.long)
        for step in range(2):                   # the second one starts with gradients and state
            traced.kind = "activations"
            traced.start_peak()
            with autocast:
                if hidden:
                    x = hidden(idx)
                    traced.kind = "loss"
                    if compiled:
                        traced.start_peak()
                    loss = model.loss(x, idx)
                    del x
                else:
                    logits, loss = model(idx, idx)
            if compiled:
                at_peak = traced.at_peak
            traced.kind = "activations"
            loss.backward()
            if not compiled:
                at_peak = traced.at_peak
            loss = logits = None        # noqa: F841  (nanoGPT holds its logits until here)
            traced.call([p.grad for p in model.parameters()], "gradients")
            if step == 0:
                traced.kind = "optimizer"
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        traced.kind = "activations"
        traced.start_peak()
        with torch.no_grad(), autocast:
            model.eval()(idx, idx)
        return {**at_peak, "evaluation": traced.peak}


def trace_blocks(config, *how):
    """What trace_passes finds of a GPT, from a few of its blocks where it has many.

    They are alike, or every other one is, from where each value table has been read once.
    """
    alike, n_layer = 2 if config.n_value_table else 1, config.n_layer
    few = (n_layer - 1) % alike + 1 + alike * max(config.n_value_table - 1, 0)
    if few + alike >= n_layer:
        return trace_passes(partial(GPT, config), *how)
    one, two = (trace_passes(partial(GPT, replace(config, n_layer=n)), *how)
                for n in (few, few + alike))
    return {key: one[key] + (two[key] - one[key]) * (n_layer - few) // alike for key in two}


def trace(model, batch_size, dtype=torch.bfloat16, compiled=False, cfg=None):
    """Peak bytes of training `model` with micro-batches of `batch_size` windows, on fake tensors.

    `model` is a GPTConfig, or a function that makes a module whose call gives (logits, loss), such
    as nanoGPT's; the optimizer and the average of weights are those of `cfg`, a TrainConfig, else
    AdamW alone. Returns {"micro_step", "optimizer_step", "evaluation": bytes, "by_kind": {kind:
    bytes} at the peak of the micro-step}. Counts what is alive, all gradients included: neither
    CUDA's context nor what its allocator wastes. Not compiled, every operation's result counts.
    Compiled, the peak is at the loss, and passes that are fused with others have no results.
    """
    how = batch_size, dtype, compiled, cfg
    if isinstance(model, GPTConfig):
        found, model = trace_blocks(model, *how), partial(GPT, model)
    else:
        found = trace_passes(model, *how)
    evaluation = found.pop("evaluation")
    return {"micro_step": sum(found.values()), "evaluation": evaluation,
            "optimizer_step": trace_update(model, dtype, cfg), "by_kind": found}


def needed(traced):
    """Bytes that the allocator will hold for what `trace` found."""
    return round(max(traced["micro_step"], traced["optimizer_step"], traced["evaluation"])
                 * FRAGMENTATION)


def largest_batch(config, windows, room, dtype, compiled, known=None, cfg=None):
    """(batch_size, its trace): the largest divisor of `windows` that fits `room` bytes.

    Memory is taken to grow in a straight line with it; where it does not, one that fits too, but
    perhaps not the largest. `known` is (batch_size, trace) of one that is traced already.
    (0, trace of 1) where none fits.
    """
    limit = windows
    B, traced = known or (runtime.divisor(windows, max(CHUNK // config.block_size, 1)), None)
    traced = traced or trace(config, B, dtype, compiled, cfg)
    fits = {}
    while True:
        fits[B] = traced if needed(traced) <= room else None
        if not fits[B]:
            if B == 1:
                return 0, traced
            limit = min(limit, B - 1)
        # what grows with the batch is what is kept of it
        per_window = max(traced["by_kind"].get("activations", 0) / B * FRAGMENTATION, 1)
        guess = B + (room - needed(traced)) / per_window
        best = max((b for b in fits if fits[b]), default=0)
        B = runtime.divisor(windows, max(min(guess, limit), best, 1))
        if B in fits:
            return best, fits.get(best) or traced
        traced = trace(config, B, dtype, compiled, cfg)


# the machine

def machine(device, dtype, device_name=""):
    """What a plan counts on: {"name", "kind", "memory", "room": bytes, "flops": peak or None}.

    `room` is what the allocator may hold. For a `device_name`, from the table of cards.
    """
    if device_name:
        row = runtime.card(device_name)
        if not row:
            near = difflib.get_close_matches(device_name.lower(), runtime.CARDS, n=3, cutoff=0.3)
            raise ValueError(f"device_name = {device_name!r} is not in the table of cards; "
                             f"nearest: {', '.join(near) or ', '.join(runtime.CARDS)}")
        memory = row[0] * 2**20 * VISIBLE
        return {"name": device_name, "kind": "cuda", "memory": memory,
                "room": memory - (CONTEXT_GIB + KERNELS_GIB) * GIB,
                "flops": row[2] * 1e12 if dtype is not torch.float32 else None, "rated": True}
    room, memory = runtime.memory(device)
    rated = runtime.peak_flops(device, dtype)
    return {"name": runtime.device_name(device), "kind": device.type, "memory": memory,
            "room": room - (KERNELS_GIB * GIB if device.type == "cuda" else 0),
            "flops": rated or runtime.measured_flops(device, dtype), "rated": bool(rated)}


# the plan

def choose_batch(cfg, config, on, dtype, compiled, world_size=1):
    """(batch_size, gradient_accumulation_steps, trace) for batch_size = 0."""
    windows = tokens_per_step(cfg) // cfg.block_size // world_size
    most = max(MOST_TOKENS.get(on["kind"], MOST_TOKENS["cpu"]) // cfg.block_size, 1)
    B = runtime.divisor(windows, most)
    traced = trace(config, B, dtype, compiled, cfg)
    if needed(traced) > on["room"]:
        B, traced = largest_batch(config, windows, on["room"], dtype, compiled, (B, traced), cfg)
    B = B or 1                                              # which the plan then refuses
    return B, windows // B * world_size, traced


def make(cfg, config, data, on, dtype, compiled, world_size=1, measured=None, traced=None, done=0):
    """The plan as a dict of numbers: bytes, seconds, tokens.

    `cfg` is a TrainConfig, `config` the model's GPTConfig, `data` from of_dataset or not_prepared,
    `on` a machine, `measured` tokens per second of all processes where they are known, `done` the
    steps that a resumed run has behind it: time is for those that are left.
    """
    with torch.device("meta"):
        model = GPT(config)
    parts = model.transformer
    groups = {"token embedding": [parts.wte], "positions": [parts.wpe] if "wpe" in parts else [],
              "value embeddings": [parts.wve] if "wve" in parts else [],
              "head": [] if model.config.tie_word_embeddings else [model.lm_head],
              "attention": [b.attn for b in parts.h], "MLP": [b.mlp for b in parts.h]}
    groups = {name: sum(p.numel() for m in part for p in m.parameters())
              for name, part in groups.items()}
    n = model.n_params()
    groups["norms"] = n["total"] - sum(groups.values())

    per_step, unique = tokens_per_step(cfg), (data["tokens"] - 1) // cfg.block_size * cfg.block_size
    total = per_step * cfg.max_iters
    optimal = tokens_worth(TOKENS_PER_PARAMETER * n["total"], unique)
    tokens = {
        **data, "unique": unique, "per_step": per_step, "run": total, "epochs": total / unique,
        "repeated": max(total - unique, 0), "worth": effective_tokens(unique, total),
        "steps_of_4_epochs": max(4 * unique // per_step, 1),
        "steps_compute_optimal": math.ceil(optimal / per_step) if optimal else None}

    traced = traced or trace(config, cfg.batch_size, dtype, compiled, cfg)
    windows = per_step // cfg.block_size // world_size
    largest, _ = largest_batch(config, windows, on["room"], dtype, compiled,
                               (cfg.batch_size, traced), cfg)
    memory = {**traced, "needed": needed(traced), "room": on["room"], "of": on["memory"],
              "largest_batch_size": largest, "compiled": compiled,
              "its_accumulation": windows // largest * world_size if largest else None}

    flops = model.flops_per_token()
    share = None
    if not measured and on["flops"]:
        share, measured = SHARE_OF_PEAK, on["flops"] * SHARE_OF_PEAK / flops * world_size
    val_tokens = min(cfg.eval_iters * cfg.batch_size, max(data["val_tokens"] - 1, 0)
                     // cfg.block_size) * cfg.block_size
    steps = max(cfg.max_iters - done, 0)
    evaluations = cfg.max_iters // cfg.eval_interval - min(done, cfg.max_iters) \
        // cfg.eval_interval + (done == 0) + (steps > 0 and cfg.max_iters % cfg.eval_interval > 0)
    seconds = {
        "flops_per_step": flops * per_step, "share_of_peak": share, "tokens_per_s": measured,
        "step": per_step / measured if measured else None,
        # a forward is a third of a step; averaged weights are evaluated beside the others
        "evaluation": val_tokens / 3 * (1 + (cfg.ema_half_life > 0)) / measured if measured
        else None,
        "steps": steps, "evaluations": evaluations, "val_tokens": val_tokens}
    seconds["run"] = steps * seconds["step"] + evaluations * seconds["evaluation"] \
        if measured else None

    # in fp32 the weights, AdamW's two moments of each (Muon has one of a matrix), the average
    matrices = groups["attention"] + groups["MLP"] if cfg.optimizer == "muon" else 0
    checkpoint = 12 * n["total"] - 4 * matrices + 4 * n["total"] * (cfg.ema_half_life > 0)
    out_dir = Path(cfg.out_dir).absolute()
    parent = next(p for p in (out_dir, *out_dir.parents) if p.exists())
    there = {f.stat().st_ino: f.stat().st_size for f in out_dir.glob("*.pt")}   # links count once
    kept = 3 + (cfg.lr_schedule == "wsd")           # newest, best, one being written, stable
    disk = {"checkpoint": checkpoint,
            "checkpoints": max(kept * checkpoint - sum(there.values()), 0),
            "data": 0 if data["prepared"] else 2 * (data["tokens"] + data["val_tokens"]),
            "free": shutil.disk_usage(parent).free}
    return {"machine": on, "parameters": {**n, **groups}, "tokens": tokens, "memory": memory,
            "time": seconds, "disk": disk}


def refusals(plan, cfg):
    """Sentences that say why this cannot work, and the nearest that does."""
    memory, disk, told = plan["memory"], plan["disk"], []
    if memory["needed"] > memory["room"]:
        nearest = f"--batch_size={memory['largest_batch_size']} " \
            f"--gradient_accumulation_steps={memory['its_accumulation']} fits and gives the same " \
            "steps" if memory["largest_batch_size"] else \
            "not even one window at a time fits: a smaller block_size, n_layer or n_embd is needed"
        told.append(f"batch_size = {cfg.batch_size} needs {_gib(memory['needed'])} of memory and "
                    f"{plan['machine']['name']} has room for {_gib(memory['room'])}. {nearest}")
    if disk["checkpoints"] + disk["data"] > disk["free"]:
        told.append(f"the run writes up to {_gib(disk['checkpoints'] + disk['data'])} and "
                    f"{_gib(disk['free'])} are free where {cfg.out_dir} lies. Make room, or "
                    "give --out_dir on another disk")
    return told


def lines(plan, cfg, now=None):
    """The plan as lines of text."""
    n, t, memory, s = plan["parameters"], plan["tokens"], plan["memory"], plan["time"]
    kinds = ", ".join(f"{name} {memory['by_kind'].get(name, 0) / GIB:.2f}" for name in
                      ("weights", "gradients", "optimizer", "activations", "loss"))
    groups = ", ".join(f"{_count(n[name])} {name}" for name in (
        "token embedding", "positions", "value embeddings", "head", "attention", "MLP", "norms")
        if n[name])
    error = f" (+- {_count(t['error'])})" if t["error"] else ""
    documents = f" in {t['documents']:,} documents" if t["documents"] > 1 else ""
    source = "" if t["prepared"] else f" (from {t['how']}; not prepared yet)"
    told = [
        f"model      {_count(n['total'])} parameters, {_count(n['without_embeddings'])} without "
        f"embeddings ({cfg.n_layer} layers x {cfg.n_head} heads x {cfg.n_embd})",
        f"           {groups}",
        f"dataset    {t['where']}: {t['tokens']:,} tokens{error}{documents} to train on{source}",
        f"step       {t['per_step']:,} tokens = {cfg.batch_size} windows x "
        f"{cfg.gradient_accumulation_steps} micro-batches x {cfg.block_size}",
        f"run        {cfg.max_iters:,} steps = {_count(t['run'])} tokens = "
        f"{t['epochs']:,.{2 if t['epochs'] < 100 else 0}f} epochs"]
    if t["repeated"]:
        told.append(f"           {_count(t['unique'])} tokens are new and {_count(t['repeated'])} "
                    f"repeated: worth {_count(t['worth'])} new ones (Muennighoff et al. 2023)")
    optimal, four = t["steps_compute_optimal"], t["steps_of_4_epochs"]
    follows = f" --lr_decay_iters={four}" if cfg.lr_schedule == "cosine" else ""
    told.append(f"           4 epochs: --max_iters={four}{follows}; compute-optimal "
                f"({TOKENS_PER_PARAMETER} tokens a parameter): " +
                (f"{optimal:,} steps" if optimal else "more than this data can be worth"))
    if t["epochs"] > 16:
        told.append(f"warning    {t['epochs']:,.0f} epochs: about 4 are nearly as good as new "
                    "text, and past about 16 another one adds next to nothing")
    largest = memory["largest_batch_size"]
    told += [
        f"memory     {_gib(memory['needed'])} of the {_gib(memory['room'])} that are left for it"
        + (", CUDA's own taken off" if plan["machine"]["kind"] == "cuda" else "")
        + (f": {_gib(memory['room'] - memory['needed'])} to spare"
           if memory["needed"] <= memory["room"] else ": DOES NOT FIT"),
        f"           micro-step {_gib(memory['micro_step'])} ({kinds}), optimizer step "
        f"{_gib(memory['optimizer_step'])}, evaluation {_gib(memory['evaluation'])}"]
    if largest and largest != cfg.batch_size:
        told.append(f"           largest that fits: --batch_size={largest} "
                    f"--gradient_accumulation_steps={memory['its_accumulation']}")
    work = f"{s['flops_per_step'] / 1e12:,.4g} TFLOP a step (attention counted causally)"
    if s["tokens_per_s"]:
        peak = f"{plan['machine']['flops'] / 1e12:,.3g} TFLOP/s" + (
            "" if plan["machine"]["rated"] else " that a product of matrices reaches here")
        how = f"at {s['share_of_peak']:.0%} of the {peak}, assumed" if s["share_of_peak"] \
            else "as measured in this run"
        ends = (now or datetime.now()) + timedelta(seconds=min(s["run"], 1e10))
        told += [
            f"time       {_time(s['run'])}, to {ends:%A %Y-%m-%d %H:%M}: "
            f"{s['steps']:,} steps of {_time(s['step'])} and {s['evaluations']:,} evaluations "
            f"of {_time(s['evaluation'])}",
            f"           {work}; {s['tokens_per_s']:,.0f} tokens/s {how}"]
    else:
        told.append(f"time       {work}; how fast this machine is will show after some steps")
    disk = plan["disk"]
    told.append(
        f"disk       {_gib(disk['checkpoint'])} a checkpoint, up to {_gib(disk['checkpoints'])} "
        "to come"
        + (f", and {_gib(disk['data'])} of data" if disk["data"] else "")
        + f"; {_gib(disk['free'])} are free")
    return told


def _gib(n_bytes):
    return f"{n_bytes / GIB:,.1f} GiB" if n_bytes >= 0.1 * GIB else f"{n_bytes / 2**20:,.0f} MiB"


def _count(n):
    return f"{n / 1e9:,.2f} G" if n >= 1e9 else f"{n / 1e6:,.1f} M" if n >= 1e5 else f"{n:,.0f}"


def _time(s):
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if s >= 2 * size:
            return f"{s / size:,.1f} {unit}"
    return f"{s:,.2g} s" if s < 10 else f"{s:,.0f} s"


def measured_rate(log, device):
    """Tokens per second that the run of this log.jsonl had last on `device`, or None."""
    rate, here = None, False
    if Path(log).is_file():
        for line in Path(log).read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue                    # a line that was being written when the power went
            if entry.get("event") == "start":
                here = entry.get("device") == device
            rate = here and entry.get("tokens_per_s") or rate
    return rate


def settings():
    """The dataclass of plan.py's settings: train.py's and a few more."""
    from dataclasses import dataclass

    from train import TrainConfig

    @dataclass(frozen=True)
    class PlanConfig(TrainConfig):
        files: tuple = ()               # a parquet file, where the dataset is not prepared
        device_name: str = ""           # plan for this card ('RTX 4070'); "" = this machine
        n_tokens: int = 0               # tokens of the data, where neither it nor a file is here
        json: bool = False              # print all numbers as JSON
    return PlanConfig


def main(cfg):
    from dataclasses import replace

    import prepare
    import sources
    import train

    if len(cfg.files) + bool(cfg.n_tokens) > 1:
        also = " and --n_tokens" if cfg.n_tokens else ""
        raise ValueError(f"{', '.join(cfg.files)}{also}: each says how much text there is; give "
                         "one of them, or prepare the files together first")
    device = runtime.pick_device("cpu" if cfg.device_name else cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device) if not cfg.device_name or cfg.dtype != "auto" \
        else torch.bfloat16
    on = machine(device, dtype, cfg.device_name)
    folder = prepare.DATA / cfg.dataset
    parts = train.load_resume(cfg, None) if cfg.init_from == "resume" else None
    with torch.device("meta" if cfg.init_from == "scratch" else "cpu"):
        config = train.build_model(cfg, parts, folder).config
    if cfg.n_tokens:
        data = not_prepared("--n_tokens", {"tokens": cfg.n_tokens, "documents": 0, "error": 0,
                                           "how": "the command line"})
    elif loader.is_prepared(folder) and not cfg.files:
        data = of_dataset(*(loader.Dataset(folder, split, cfg.block_size, config.vocab_size)
                            for split in ("train", "val")))
    else:
        try:
            path = cfg.files[0] if cfg.files else sources.find_parquet(cfg.dataset)
        except ValueError as error:
            raise ValueError(f"{error}, or say how much text there is "
                             "(--n_tokens=700_000_000)") from None
        if sources.kind_of(str(path)) != ".parquet":
            raise ValueError(f"{path} does not say how many tokens it has; prepare it first, "
                             "or say how much text there is (--n_tokens=700_000_000)")
        data = not_prepared(path, count_parquet(path))
    rate = None if cfg.device_name or not parts else measured_rate(
        Path(cfg.out_dir) / "log.jsonl", runtime.device_name(device))
    traced = None
    if not cfg.batch_size:
        B, accumulation, traced = choose_batch(cfg, config, on, dtype, cfg.compile)
        cfg = replace(cfg, batch_size=B, gradient_accumulation_steps=accumulation)
    plan = make(cfg, config, data, on, dtype, cfg.compile, measured=rate, traced=traced,
                done=parts["iter_num"] if parts else 0)
    refused = refusals(plan, cfg)
    if cfg.json:
        print(json.dumps({**plan, "refusals": refused}, indent=1))
    else:
        print("\n".join([f"machine    {on['name']}, {str(dtype).removeprefix('torch.')}",
                         *lines(plan, cfg)]))
    if refused:
        sys.exit("\n".join(f"plan.py: {sentence}" for sentence in refused))


if __name__ == "__main__":
    run(main, settings(), __doc__)
