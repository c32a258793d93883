"""How good is a model? Loss, perplexity and bits per byte of a whole split, document by document.

    python eval.py                                          # the newest run, on its val split
    python eval.py --out_dir=out-quickstart --json          # for a program to read
    python eval.py --init_from=gpt2 --dataset=fineweb       # OpenAI's GPT-2 (needs transformers)
    python eval.py --compare out gpt2                       # two models on the same documents

The model reads each document alone, from its end-of-text token, and every token counts once. A
document that is longer than the context is read in windows that overlap: all of the first one
counts, and of each further one the last `stride` tokens.
"""
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import open_model
from onecard import checkpoint, runtime, tokenizers
from onecard.datafiles import folder_of
from onecard.dataset import Dataset
from onecard.settings import UserError, configure_and_run, in_range, one_of

PAD_TO = 64                             # windows are padded to a multiple of it: fewer kernels


@dataclass(frozen=True)
class EvalConfig:
    out_dir: str = ""               # run to evaluate; "" = the newest under out*/
    init_from: str = "resume"       # resume (the run in out_dir), gpt2, ..., a folder or a file
    compare: bool = False           # evaluate two models: --compare A B
    files: tuple = ()               # the two models to compare
    dataset: str = ""               # folder under data/; "" = the run's, or fineweb
    split: str = "val"              # val or train
    stride: int = 0                 # tokens between windows, at most the context; 0 = half of it
    max_documents: int = 0          # evaluate only the first so many documents; 0 = all
    batch_size: int = 16            # windows of full length at once; halved if memory runs out
    json: bool = False              # print one JSON object and nothing else
    device: str = "auto"            # cuda, cuda:1, mps, cpu; auto = the best of these
    dtype: str = "auto"             # bfloat16, float16, float32; auto = what suits the device

    def __post_init__(self):
        in_range(0, 2**20, self, "stride")
        in_range(0, 2**62, self, "max_documents")
        in_range(1, 2**16, self, "batch_size")
        one_of(self, split=("val", "train"))
        n_files = 2 if self.compare else 0
        if len(self.files) != n_files:
            raise UserError("only --compare takes models, and two of them: --compare out-a out-b")


def read_documents(cfg, folder, models):
    """The ids of each document, and the bytes of its text. UserError for another vocabulary."""
    data = Dataset(folder, cfg.split, block_size=1)
    for opened in models:
        tokenizer = tokenizers.of_dataset(folder, opened.model.config.vocab_size)
        if tokenizer.identity != opened.tokenizer.identity:
            raise UserError(f"{opened.label} has another vocabulary than {folder}")
        data.check_vocabulary(tokenizer.n_vocab)
    n_documents = cfg.max_documents or data.n_documents
    documents = np.split(np.asarray(data.tokens), data.starts[1:-1])[:n_documents]
    if max(map(len, documents)) < 2:
        raise UserError(f"{folder} {cfg.split} has no document with a token to predict")
    bytes_of_id = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    n_bytes = [bytes_of_id[ids[1:]].sum() for ids in documents]     # not of the end-of-text token
    return documents, np.array(n_bytes)


def windows_of(documents, block_size, stride):
    """Yield windows: (number of the document, ids, n). The last n ids count.

    Every id of a document counts in one window, but the first, which nothing predicts.
    """
    for number, ids in enumerate(documents):
        end, step = 0, block_size       # ids[end] is the last one that is predicted
        while end < len(ids) - 1:
            n = min(step, len(ids) - 1 - end)
            end += n
            begin = max(end - block_size, 0)
            yield number, ids[begin:end + 1], n
            step = stride               # from the second window on


@torch.inference_mode()
def window_losses(model, windows):
    """The loss in nats, summed over the ids that count in each of B windows, float32 (B,)."""
    device = model.lm_head.weight.device
    all_ids = [torch.from_numpy(ids.astype(np.int64)).to(device) for _, ids, _ in windows]
    idx = pad_sequence([ids[:-1] for ids in all_ids], batch_first=True)       # (B, T)
    length = min(math.ceil(idx.size(1) / PAD_TO) * PAD_TO, model.config.block_size)
    idx = F.pad(idx, (0, length - idx.size(1)))
    losses = []
    for x, ids, (_, _, n) in zip(model.hidden(idx), all_ids, windows, strict=True):
        x = x[:len(ids) - 1]            # without the padding
        logits = model.lm_head(x[-n:]).float()                                # (n, V)
        losses.append(F.cross_entropy(logits, ids[-n:], reduction="sum"))
    return torch.stack(losses).cpu().numpy()


def document_losses(model, documents, stride, batch_size):
    """The loss in nats, summed over each of N documents (arrays of ids), float64 (N,)."""
    block_size = model.config.block_size
    windows = list(windows_of(documents, block_size, stride))
    # the longest first: little padding, and if memory is too small, it shows at once
    windows.sort(key=lambda window: len(window[1]), reverse=True)
    nats = np.zeros(len(documents))
    bar = tqdm(total=len(windows), unit="window", disable=None)
    position = 0
    while position < len(windows):
        _, longest, _ = windows[position]
        n_rows = max(batch_size * block_size // (len(longest) - 1), 1)
        rows = windows[position:position + n_rows]
        try:
            losses = window_losses(model, rows)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not runtime.is_out_of_memory(error):
                raise
            batch_size //= 2            # the same windows again, fewer of them
            bar.write(f"out of memory: batch_size is {batch_size} now", file=sys.stderr)
            continue
        np.add.at(nats, [number for number, _, _ in rows], losses)
        position += len(rows)
        bar.update(len(rows))
    bar.close()
    return nats


def ratio(values, sizes):
    """sum(values) / sum(sizes), and its standard error over documents (None for a single one)."""
    n, mean = len(values), float(values.sum() / sizes.sum())
    if n < 2:
        return mean, None
    rest = values - mean * sizes        # of a ratio of sums: Cochran 1977, equation 2.46
    return mean, math.sqrt(n / (n - 1) * (rest @ rest)) / float(sizes.sum())


def means(nats, n_tokens, n_bytes):
    """Nats a token and bits a byte, with their standard errors."""
    loss, loss_se = ratio(nats, n_tokens)
    bits_per_byte, bits_per_byte_se = ratio(nats / math.log(2), n_bytes)
    return {"loss": loss, "loss_se": loss_se,
            "bits_per_byte": bits_per_byte, "bits_per_byte_se": bits_per_byte_se}


def with_error(values, name):
    """'3.2871 +- 0.0123', of a dict of means()."""
    error = values[f"{name}_se"]
    if error is None:
        return f"{values[name]:.4f}"
    return f"{values[name]:.4f} +- {error:.4f}"


def print_results(results, paired, machine):
    """Print the results of one model, or of two and what `paired` says of their difference."""
    first = results[0]
    print(f"{first['dataset']} {first['split']}: {first['documents']:,} documents, "
          f"{first['tokens']:,} tokens, {first['bytes']:,} bytes of text; {machine}")
    for result in results:
        print(f"{result['model']}: context {result['block_size']:,}, stride {result['stride']:,}")
        print(f"    loss           {with_error(result, 'loss')} nats a token")
        print(f"    perplexity     {result['perplexity']:.2f}")
        print(f"    bits per byte  {with_error(result, 'bits_per_byte')}")
    if paired:
        print(f"second - first: {with_error(paired, 'loss')} nats a token, "
              f"{with_error(paired, 'bits_per_byte')} bits per byte")


def main(cfg):
    device = runtime.pick_device(cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device)
    names = cfg.files or [checkpoint.source(cfg.init_from, cfg.out_dir)]
    models = [open_model(name) for name in names]
    datasets = [cfg.dataset, *[opened.dataset for opened in models], "fineweb"]
    folder = folder_of(next(filter(None, datasets)))        # the first one that has a name
    documents, n_bytes = read_documents(cfg, folder, models)
    n_tokens = np.array([len(ids) - 1 for ids in documents])    # nothing predicts the first one

    # cuDNN's attention is slow at each new length: 40 ms on an H100
    torch.backends.cuda.enable_cudnn_sdp(False)
    results, nats = [], []
    for opened in models:
        model, block_size = opened.model, opened.model.config.block_size
        stride = min(cfg.stride or max(block_size // 2, 1), block_size)
        model.to(device)
        with runtime.World(device, dtype).autocast():
            nats.append(document_losses(model, documents, stride, cfg.batch_size))
        result = {"model": opened.label, "dataset": str(folder), "split": cfg.split,
                  "block_size": block_size, "stride": stride, "documents": len(documents),
                  "tokens": int(n_tokens.sum()), "bytes": int(n_bytes.sum()),
                  **means(nats[-1], n_tokens, n_bytes)}
        result["perplexity"] = math.exp(min(result["loss"], 700))   # more is too large for a float
        results.append(result)

    output, paired = results[0], None
    if cfg.compare:                     # a document that is hard for both adds no error
        paired = means(nats[1] - nats[0], n_tokens, n_bytes)
        output = {"a": results[0], "b": results[1], "b_minus_a": paired}
    if cfg.json:
        print(json.dumps(output))
    else:
        print_results(results, paired, f"{runtime.device_name(device)}, {dtype}")


if __name__ == "__main__":
    configure_and_run(main, EvalConfig, __doc__, prints_results=True)
