"""
Let a trained model write.

    python sample.py                                        # from the newest run under out*/
    python sample.py --out_dir=out-quickstart --start="The function returns"
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.7
    python sample.py --init_from=gpt2                       # OpenAI's GPT-2 (needs transformers)
"""
import codecs
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import checkpoint
import runtime
import tokenizer
from configurator import run
from model import KVCache


@dataclass(frozen=True)
class SampleConfig:
    out_dir: str = ""               # run to sample from; "" = the newest under out*/
    init_from: str = "resume"       # resume (a run of ours or of nanoGPT), gpt2, ..., or a folder
    start: str = ""                 # text to continue; FILE:name reads a file; "" = a new document
    num_samples: int = 3            # continuations to write
    max_new_tokens: int = 300       # length of each
    temperature: float = 0.8        # 1 = as the model says, lower = safer, 0 = always the likeliest
    top_k: int = 200                # draw from the k likeliest tokens only; 0 = from all
    top_p: float = 1.0              # draw from the likeliest that sum to this probability; 1 = all
    seed: int = 1337                # the same seed writes the same text
    device: str = "auto"            # cuda, cuda:1, mps, cpu; auto takes the best there is
    dtype: str = "auto"             # bfloat16, float16, float32; auto: what the device has

    def __post_init__(self):
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError("num_samples and max_new_tokens must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k must not be negative, "
                             "and top_p lies above 0 and up to 1")


def pick(logits, temperature, top_k, top_p, n_vocab, generator=None):
    """Draw one token id (B, 1) from `logits` (B, V) of the last position.

    Only ids below `n_vocab` can come out: the rows beyond it pad the embedding and are no token.
    """
    logits = logits[:, :n_vocab].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < n_vocab:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ranked, ids = logits.sort(dim=-1, descending=True)
        probability = ranked.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p  # the first one always stays
        logits = logits.masked_fill(beyond.scatter(1, ids, beyond), -torch.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, draw, use_cache=True):
    """Yield token ids (B, 1) that continue `idx` (B, T), by `draw(logits of the last position)`.

    The model sees as much of the text as its context holds. When that is full, the last half of it
    is kept and the context fills again, so that keys and values are recomputed once every
    block_size / 2 tokens. `use_cache=False` recomputes them for every token, with the same outcome.
    """
    block_size = model.config.block_size
    dtype = torch.get_autocast_dtype(idx.device.type) \
        if torch.is_autocast_enabled(idx.device.type) else torch.float32
    context, cache = idx[:, -block_size:], None                     # (B, up to block_size)
    for _ in range(max_new_tokens):
        if context.size(1) > block_size:
            context, cache = context[:, -max(block_size // 2, 1):], None
        if use_cache and cache is None:
            cache, new = KVCache(model.config, idx.size(0), idx.device, dtype), context
        else:
            new = context[:, -1:] if use_cache else context
        hidden = model.hidden(new, cache)[:, -1]                    # (B, C)
        token = draw(model.logits(hidden))
        context = torch.cat([context, token], dim=1)
        yield token


def read_start(start):
    if not start.startswith("FILE:"):
        return start
    path = Path(start[len("FILE:"):])
    if not path.is_file():
        raise ValueError(f"start = {start!r}: there is no file {path}")
    return path.read_text(encoding="utf-8")


def main(cfg):
    device = runtime.pick_device(cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device)
    model, name, settings = checkpoint.open_model(
        checkpoint.run_folder(cfg.out_dir) if cfg.init_from == "resume" else cfg.init_from)
    model.to(device).eval()
    vocabulary = tokenizer.of_dataset(Path("data") / settings.get("dataset", ""))
    prompt = read_start(cfg.start)
    ids = [int(i) for i in vocabulary.encode(prompt)]
    if isinstance(vocabulary, tokenizer.GPT2Tokenizer) or not ids:
        ids = [vocabulary.start] + ids      # as every document began that the model learned from
    print(f"{name}, {runtime.device_name(device)}, {str(dtype).removeprefix('torch.')}")
    if len(ids) > model.config.block_size:
        print(f"the prompt has {len(ids):,} tokens; "
              f"the model sees the last {model.config.block_size:,} of them")

    torch.manual_seed(cfg.seed)
    idx = torch.tensor([ids], device=device)
    n_vocab = min(vocabulary.n_vocab, model.config.vocab_size)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        for n in range(cfg.num_samples):
            print(f"---- sample {n + 1} ----\n{prompt}", end="", flush=True)
            letters = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may be half letters
            for token in generate(model, idx, cfg.max_new_tokens, lambda logits: pick(
                    logits, cfg.temperature, cfg.top_k, cfg.top_p, n_vocab)):
                if token.item() == tokenizer.END_OF_TEXT:
                    break
                print(letters.decode(vocabulary.decode_bytes([token.item()])), end="", flush=True)
            print(letters.decode(b"", final=True))


if __name__ == "__main__":
    run(main, SampleConfig, __doc__)
