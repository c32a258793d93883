"""
How good is a model? Loss, perplexity and bits per byte over a whole split, text by text.

    python eval.py                                          # the newest run, on its val split
    python eval.py --out_dir=out-quickstart --json          # for a program to read
    python eval.py --init_from=gpt2 --dataset=fineweb       # OpenAI's GPT-2 (needs transformers)
    python eval.py --compare out gpt2                       # two models on the very same texts

The whole of val, of a run, is kept in its folder as eval.json.

Each document is read alone, from its end-of-text token on, and every token of it counts once. One
that is longer than the context is read in windows that overlap: the first counts as a whole, each
further one moves on by `stride` tokens and counts these.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
import loader
import runtime
import tokenizer
from configurator import run

BUCKETS = (1, 128, 512, 1024, 4096)     # tokens from which a class of documents begins
CHUNK = 512                             # tokens whose logits exist at once


@dataclass(frozen=True)
class EvalConfig:
    out_dir: str = ""               # run to evaluate; "" = the newest under out*/
    init_from: str = "resume"       # resume (a run of ours or of nanoGPT), gpt2, ..., or a folder
    compare: bool = False           # evaluate two: runs, checkpoints, gpt2, ..., or folders
    files: tuple = ()               # these two
    dataset: str = ""               # folder under data/; "" = what the run was trained on
    split: str = "val"              # val or train
    stride: int = 0                 # tokens from one window to the next; 0 = half of the context
    max_documents: int = 0          # only the first so many; 0 = all
    batch_size: int = 16            # windows of the whole context at a time; halved where too many
    json: bool = False              # print one JSON object and nothing else
    device: str = "auto"            # cuda, cuda:1, mps, cpu; auto takes the best there is
    dtype: str = "auto"             # bfloat16, float16, float32; auto: what the device has

    def __post_init__(self):
        if self.compare and len(self.files) != 2:
            raise ValueError(f"--compare takes two models, not {len(self.files)}: "
                             "`python eval.py --compare out-a out-b`")
        if self.files and not self.compare:
            raise ValueError(f"{self.files[0]}: --out_dir={self.files[0]} evaluates that run, "
                             "--compare A B compares two")
        if self.split not in ("val", "train"):
            raise ValueError(f"split = {self.split!r}; use val or train")
        if min(self.stride, self.max_documents) < 0 or self.batch_size < 1:
            raise ValueError("stride and max_documents must not be negative, "
                             "and batch_size at least 1")


@torch.no_grad()
def evaluate(model, val, n_windows, B, world, autocast):
    """Mean loss over the first `n_windows` of `val`, each target once, split over the ranks.

    What train.py watches: windows of the file as it lies, over the borders of documents.
    """
    model.eval()
    places = range(world.rank * B, max(n_windows, B * world.size), B * world.size)
    losses, counts = [], []
    for place, (idx, targets) in zip(places, loader.ahead(
            lambda k: val.fixed_batch(k, B, n_windows), places, world.device), strict=True):
        counts.append(min(max(n_windows - place, 0), B))
        with autocast:
            losses.append(model(idx, targets) if counts[-1]
                          else torch.zeros((), device=world.device))
    model.train()
    losses, counts = torch.stack(losses).float(), torch.tensor(counts, device=world.device)
    total = world.sum(torch.stack([(losses * counts).sum(), counts.sum()]))
    return (total[0] / total[1]).item()


# every document

def windows(n, block_size, stride):
    """(begin, end, first that counts) of the windows that read `n` targets, each counted once."""
    end = min(n, block_size)
    yield 0, end, 0
    while end < n:
        counted, end = end, min(end + stride, n)
        yield end - block_size, end, counted


def token_losses(model, idx, targets):
    """-log p of each of `targets` (B, T) in nats, fp32 (B, T); 0 where the target is -1."""
    x, flat = model.hidden(idx).flatten(0, 1), targets.flatten()
    losses = [F.cross_entropy(model.logits(x_c).float(), t_c, ignore_index=-1, reduction="none")
              for x_c, t_c in zip(x.split(CHUNK), flat.split(CHUNK), strict=True)]
    return torch.cat(losses).view_as(targets)


@torch.inference_mode()
def document_losses(model, data, documents, stride, B, device, autocast):
    """Summed -log p in nats of every one of the first `documents` of `data`, float64 (documents,).

    The first token of a document is seen and does not count: it is the end of the text before.
    """
    T = model.config.block_size
    lengths = np.diff(data.starts.astype(np.int64))[:documents] - 1
    todo = [(document, *window) for document, n in enumerate(lengths) if n > 0
            for window in windows(int(n), T, stride)]
    todo.sort(key=lambda w: w[1] - w[2], reverse=True)      # the longest: memory runs out at once
    nats, world = np.zeros(documents), runtime.World(device)

    def batch(rows):
        """Summed losses of the windows `rows`, padded on the right to the longest."""
        longest = max(end - begin for _, begin, end, _ in rows)
        idx = np.zeros((len(rows), longest), np.int64)
        targets = np.full((len(rows), longest), -1, np.int64)
        for i, (document, begin, end, counted) in enumerate(rows):
            start = int(data.starts[document])
            ids = data.tokens[start + begin:start + end + 1]
            idx[i, :end - begin] = ids[:-1]
            targets[i, counted - begin:end - begin] = ids[1 + counted - begin:]
        with autocast:
            losses = token_losses(model, *(torch.from_numpy(a).to(device) for a in (idx, targets)))
        return losses.double().sum(1).cpu().numpy()

    def rows_of(B):
        """The next windows of `todo` that are, padded, no more than B contexts."""
        longest = todo[at][2] - todo[at][1]
        return todo[at:at + max(B * T // longest, 1)]

    at = 0
    with tqdm(total=int(lengths.sum()), unit="tok", unit_scale=True, disable=None) as bar:
        while at < len(todo):
            sums, B = runtime.smaller_when_full(
                lambda B: batch(rows_of(B)), B, world, "the evaluation",
                lambda text: tqdm.write(text, file=sys.stderr))
            rows = rows_of(B)
            np.add.at(nats, [document for document, *_ in rows], sums)
            at += len(rows)
            bar.update(sum(end - counted for *_, end, counted in rows))
    return nats


def document_sizes(data, vocabulary, documents):
    """(tokens that count, bytes of text that they are), int64 (documents,) each."""
    n_bytes = np.array([len(vocabulary.decode_bytes([i])) for i in range(vocabulary.n_vocab)])
    starts = data.starts.astype(np.int64)[:documents + 1]
    of_text = [int(n_bytes[data.tokens[a + 1:b]].sum())
               for a, b in zip(starts, starts[1:], strict=False)]
    return np.diff(starts) - 1, np.array(of_text)


def ratio(values, sizes):
    """(sum of `values` / sum of `sizes`, its standard error over documents: None of one alone)."""
    mean, n = float(values.sum() / sizes.sum()), len(values)
    if n < 2:
        return mean, None
    return mean, math.sqrt(n / (n - 1) * ((values - mean * sizes)**2).sum()) / float(sizes.sum())


def summary(nats, n_tokens, n_bytes):
    """Of some documents: how many, their sizes, loss and bits per byte with standard errors."""
    (loss, loss_se), (bpb, bpb_se) = ratio(nats, n_tokens), ratio(nats / math.log(2), n_bytes)
    return {"documents": len(nats), "tokens": int(n_tokens.sum()), "bytes": int(n_bytes.sum()),
            "loss": loss, "loss_se": loss_se, "perplexity": math.exp(loss),
            "bits_per_byte": bpb, "bits_per_byte_se": bpb_se}


def buckets(nats, n_tokens, n_bytes):
    """[(class of document lengths in words, its summary)], without classes that nothing is in."""
    found = []
    for low, high in zip(BUCKETS, (*BUCKETS[1:], math.inf), strict=True):
        here = (n_tokens >= low) & (n_tokens < high)
        if here.any():
            name = f"{low:,} and more" if high == math.inf else f"{low:,} to {high - 1:,}"
            found.append((name, summary(nats[here], n_tokens[here], n_bytes[here])))
    return found


# what is printed

def shown(value, error, digits=4):
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def report(result):
    yield f"{result['model']}: context {result['block_size']:,}, stride {result['stride']:,}"
    yield f"    loss           {shown(result['loss'], result['loss_se'])} nats a token"
    yield f"    perplexity     {result['perplexity']:.2f}"
    yield f"    bits per byte  {shown(result['bits_per_byte'], result['bits_per_byte_se'])}"
    yield "    tokens in a document  documents      tokens  loss"
    for name, part in result["by_length"]:
        yield (f"    {name:<20}  {part['documents']:>9,}  {part['tokens']:>10,}  "
               f"{shown(part['loss'], part['loss_se'])}")


def main(cfg):
    device = runtime.pick_device(cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
    names = cfg.files or (checkpoint.run_folder(cfg.out_dir) if cfg.init_from == "resume"
                          else cfg.init_from,)
    models = [checkpoint.open_model(name) for name in names]
    datasets = {settings["dataset"] for *_, settings in models if "dataset" in settings}
    if not cfg.dataset and len(datasets) != 1:
        raise ValueError("these models were trained on " + " and ".join(sorted(datasets)) +
                         "; --dataset=NAME says on which to evaluate" if datasets else
                         f"nothing tells what to evaluate {names[0]} on; "
                         "--dataset=NAME names a folder under data/")
    folder = Path("data") / (cfg.dataset or datasets.pop())
    vocabulary = tokenizer.of_dataset(folder)

    results, every, data = [], [], None
    for model, name, settings in models:
        if tokenizer.of_dataset(Path("data") / settings.get("dataset", "")).n_vocab \
                != vocabulary.n_vocab:
            raise ValueError(f"{name} has another vocabulary than {folder}")
        block_size = model.config.block_size
        if cfg.stride > block_size:
            raise ValueError(f"stride = {cfg.stride} would leave tokens out: the context of {name} "
                             f"is {block_size}. Nearest that works: --stride={block_size}")
        stride = cfg.stride or max(block_size // 2, 1)
        if data is None:                    # of one token a window: documents are not cut into any
            data = loader.Dataset(folder, cfg.split, 1, model.config.vocab_size)
            documents = min(cfg.max_documents or data.n_documents, data.n_documents)
            sizes = document_sizes(data, vocabulary, documents)
        nats = document_losses(model.to(device).eval(), data, documents, stride, cfg.batch_size,
                               device, autocast)
        model.to("cpu")
        every.append(nats)
        results.append({"model": name, "dataset": str(folder), "split": cfg.split,
                        "block_size": block_size, "stride": stride, **summary(nats, *sizes),
                        "by_length": buckets(nats, *sizes)})

    if cfg.compare:
        # the same documents: what is hard in both falls out of the difference
        difference, error = ratio(every[1] - every[0], sizes[0])
        in_bpb, bpb_error = ratio((every[1] - every[0]) / math.log(2), sizes[1])
        lower = float((every[1] < every[0])[sizes[0] > 0].mean())
        paired = {"loss": difference, "loss_se": error, "bits_per_byte": in_bpb,
                  "bits_per_byte_se": bpb_error, "documents_lower": lower}
    told = json.dumps({"a": results[0], "b": results[1], "b_minus_a": paired} if cfg.compare
                      else results[0])
    path = checkpoint.in_folder(names[0])
    if path and cfg.split == "val" and not cfg.max_documents:
        checkpoint.write_text(path.parent / "eval.json", told + "\n")
    if cfg.json:
        print(told)
        return
    first = results[0]
    print(f"{folder} {cfg.split}: {first['documents']:,} documents, {first['tokens']:,} tokens, "
          f"{first['bytes']:,} bytes of text; {runtime.device_name(device)}, "
          f"{str(dtype).removeprefix('torch.')}")
    for result in results:
        for line in report(result):
            print(line)
    if cfg.compare:
        print(f"second - first: {shown(difference, error)} nats a token, "
              f"{shown(in_bpb, bpb_error)} bits per byte; "
              f"the second is lower on {lower:.0%} of the documents")


if __name__ == "__main__":
    run(main, EvalConfig, __doc__)
