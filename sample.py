"""
Let a trained model write.

    python sample.py                                        # from the newest run under out*/
    python sample.py --out_dir=out-quickstart --start="The function returns"
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.7
    python sample.py --prompts=prompts.txt                  # each line of a file
    python sample.py --interactive                          # you begin, it goes on
    python sample.py --init_from=gpt2                       # OpenAI's GPT-2 (needs transformers)
"""
import codecs
import itertools
import sys
import time
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
    prompts: str = ""               # a text file, each line of which is continued; "" = start is
    interactive: bool = False       # ask for the beginning of a text, continue it, ask again
    num_samples: int = 3            # continuations of each beginning
    max_new_tokens: int = 300       # the most that each of them has
    temperature: float = 0.8        # 1 = as the model says, lower = safer, 0 = always the likeliest
    top_k: int = 200                # draw from the k likeliest tokens only; 0 = from all
    top_p: float = 1.0              # draw from the likeliest that sum to this probability; 1 = all
    min_p: float = 0.0              # only what has this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: what stands in the text already is less likely
    seed: int = 1337                # the same seed writes the same text
    batch_size: int = 16            # continuations that are written at a time; each needs memory
    device: str = "auto"            # cuda, cuda:1, mps, cpu; auto takes the best there is
    dtype: str = "auto"             # bfloat16, float16, float32; auto: what the device has

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature = {self.temperature:g} and top_k = {self.top_k} "
                             "must not be negative")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p = {self.top_p:g} lies above 0 and up to 1, "
                             f"min_p = {self.min_p:g} from 0 to 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty:g} must be above 0; "
                             "1 is none, 1.1 to 1.3 are usual")
        if self.prompts and self.start or self.interactive and (self.start or self.prompts):
            raise ValueError("start, prompts and interactive each say what to continue; give one")


# which token

def pick(logits, context, u, cfg, n_vocab):
    """Choose a token id for each row (B, 1), by `cfg`, from `logits` (B, V) of the last position.

    `context` (B, T) is what the model saw, `u` (B, 1) a uniform number from 0 to 1 for each row,
    which decides among what is left: so a token costs one random number, the same on any device.
    Only ids below `n_vocab` can come out: the rows beyond it pad the embedding and are no token.
    The order is transformers': penalty (Keskar et al. 2019), temperature, top_k, top_p (Holtzman
    et al. 2020), min_p (Nguyen et al. 2024).
    """
    logits = logits[:, :n_vocab].float()
    if cfg.repetition_penalty != 1:
        seen = logits.gather(1, context)
        seen = torch.where(seen > 0, seen / cfg.repetition_penalty, seen * cfg.repetition_penalty)
        logits = logits.scatter(1, context, seen)
    if cfg.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None                                                                # where not sorted
    if 0 < cfg.top_k < n_vocab:
        logits, ids = logits.topk(cfg.top_k, dim=-1)
    elif cfg.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    p = F.softmax(logits / cfg.temperature, dim=-1)
    if cfg.top_p < 1:                                       # the first one always stays
        p = p.masked_fill(p.cumsum(dim=-1) - p >= cfg.top_p, 0)
    if cfg.min_p:
        p = p.masked_fill(p < cfg.min_p * p.amax(dim=-1, keepdim=True), 0)
    reached = p.cumsum(dim=-1)
    # the first token that reaches more than u of the sum, which is not 0: no token of p = 0 does
    token = torch.searchsorted(reached, u * reached[:, -1:], right=True).clamp(max=p.size(1) - 1)
    return token if ids is None else ids.gather(1, token)


class Dice:
    """A stream of uniform numbers for each of several samples, whichever are written together."""

    def __init__(self, seeds, device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def throw(self):
        """The next number of each sample, below 1 (B, 1)."""
        return torch.stack([torch.rand(1, generator=g) for g in self.generators]).to(self.device)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, draw, use_cache=True):
    """Yield token ids (B, 1) that continue `idx` (B, T), by `draw(last logits, what was seen)`.

    The model sees as much of the text as its context holds. When that is full, the last half of it
    is kept and the context fills again, so that keys and values are recomputed once every
    block_size / 2 tokens. `use_cache=False` recomputes them for every token, with the same outcome.
    """
    block_size = model.config.block_size
    dtype = torch.get_autocast_dtype(idx.device.type) \
        if torch.is_autocast_enabled(idx.device.type) else torch.float32
    context, cache, token = idx[:, -block_size:], None, None        # (B, up to block_size)
    longest = min(context.size(1) + max_new_tokens, block_size)
    for _ in range(max_new_tokens):
        if context.size(1) > block_size:
            context, cache = context[:, -max(block_size // 2, 1):], None
        if use_cache and cache is None:
            cache = KVCache(model.config, idx.size(0), idx.device, dtype, longest)
            new = context
        else:
            new = token if use_cache else context
        hidden = model.hidden(new, cache)[:, -1]                    # (B, C)
        token = draw(model.logits(hidden), context)
        context = torch.cat([context, token], dim=1)
        yield token


def lay_out_for_few(model):
    """Store matrices column by column: the same numbers, and a CPU is faster with few rows."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T


# what is printed

def show(tokens, headings, vocabulary, interactive=False):
    """Print continuations as they come, the first while the others wait.

    `tokens` yields (B, 1) for the B `headings`. Each ends at an end-of-text token, or where
    interactive at Ctrl-C. Returns their texts and how many tokens these are in all.
    """
    n, n_tokens = len(headings), 0
    letters = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n)]
    texts, ended, shown, current = [""] * n, [False] * n, 0, 0
    print(headings[0], end="", flush=True)

    def flush():
        nonlocal shown, current
        while True:
            print(texts[current][shown:], end="", flush=True)
            shown = len(texts[current])
            if not ended[current] or current == n - 1:
                return
            shown, current = 0, current + 1
            print("\n" + headings[current], end="")

    try:
        for token in tokens:
            for row, i in enumerate(token.flatten().tolist()):
                ended[row] |= i == tokenizer.END_OF_TEXT
                if not ended[row]:                          # a token may be half a letter
                    texts[row] += letters[row].decode(vocabulary.decode_bytes([i]))
                    n_tokens += 1
            flush()
            if all(ended):
                break
    except KeyboardInterrupt:
        if not interactive:
            raise
    texts = [text + d.decode(b"", final=True) for text, d in zip(texts, letters, strict=True)]
    ended = [True] * n
    flush()
    print(flush=True)
    return texts, n_tokens


def read(name, what):
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: {path} is not UTF-8 text ({error.reason} at byte "
                         f"{error.start}); save it as UTF-8") from None


def beginnings(cfg):
    """The texts to continue that `cfg` names."""
    if cfg.prompts:
        found = [line for line in read(cfg.prompts, f"prompts = {cfg.prompts!r}").splitlines()
                 if line.strip()]
        if not found:
            raise ValueError(f"prompts = {cfg.prompts!r}: every line of it is empty")
        return found
    if cfg.start.startswith("FILE:"):
        return [read(cfg.start.removeprefix("FILE:"), f"start = {cfg.start!r}")]
    return [cfg.start]


def interact(go_on):
    """Ask for a text, continue it by `go_on(text)`, which returns it longer, and ask again."""
    try:
        import readline  # noqa: F401       # arrow keys in input(); Windows has them anyway
    except ImportError:
        pass
    print("Type how a text begins. Enter alone goes on with the last one, Ctrl-C stops it, "
          "Ctrl-D ends (on Windows Ctrl-Z and Enter).")
    text = ""
    while True:
        try:
            text = go_on(input("\n> ") or text)
        except KeyboardInterrupt:           # at the prompt: drop what was typed
            print()
        except EOFError:
            return print()


def main(cfg):
    device = runtime.pick_device(cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device)
    prompts = beginnings(cfg)
    model, name, settings = checkpoint.open_model(
        checkpoint.run_folder(cfg.out_dir) if cfg.init_from == "resume" else cfg.init_from)
    model.to(device).eval()
    torch.backends.cuda.enable_cudnn_sdp(False)     # it plans for every length anew: 40 ms a token
    vocabulary = tokenizer.of_dataset(Path("data") / settings.get("dataset", ""))
    n_vocab = min(vocabulary.n_vocab, model.config.vocab_size)
    print(f"{name}, {runtime.device_name(device)}, {str(dtype).removeprefix('torch.')}")
    at_a_time = 1 if cfg.interactive else min(cfg.num_samples, cfg.batch_size)
    if device.type == "cpu" and dtype is torch.float32 and at_a_time <= 4:     # slower with 8
        lay_out_for_few(model)
    n_tokens, began = 0, time.perf_counter()

    def continued(prompt, headings, seeds):
        """Print a continuation of `prompt` under each of `headings`; returns their texts."""
        nonlocal n_tokens
        ids = [int(i) for i in vocabulary.encode(prompt)]
        if isinstance(vocabulary, tokenizer.GPT2Tokenizer) or not ids:
            ids = [vocabulary.start] + ids  # as every document began that the model learned from
        if len(ids) > model.config.block_size:
            print(f"the prompt has {len(ids):,} tokens; "
                  f"the model sees the last {model.config.block_size:,} of them")
        idx, dice = torch.tensor([ids], device=device).expand(len(seeds), -1), Dice(seeds, device)
        try:
            texts, n = show(generate(model, idx, cfg.max_new_tokens, lambda *seen: pick(
                *seen, dice.throw(), cfg, n_vocab)), headings, vocabulary, cfg.interactive)
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            less = f"--batch_size={len(seeds) // 2}" if len(seeds) > 1 else "--device=cpu"
            raise ValueError(f"out of memory with {len(seeds)} continuations at a time; "
                             f"nearest that may fit: {less}") from None
        n_tokens += n
        return texts

    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        if cfg.interactive:
            if cfg.num_samples != SampleConfig.num_samples:
                print("note: interactive writes one continuation, num_samples changes nothing")
            seeds = itertools.count(cfg.seed)       # a text that is typed twice goes on in two ways
            return interact(lambda text: text + continued(text, [text], [next(seeds)])[0])
        for p, prompt in enumerate(prompts):
            of = f"prompt {p + 1}, " if cfg.prompts else ""
            for first in range(0, cfg.num_samples, cfg.batch_size):
                numbers = range(first, min(first + cfg.batch_size, cfg.num_samples))
                continued(prompt, [f"---- {of}sample {n + 1} ----\n{prompt}" for n in numbers],
                          [cfg.seed + n for n in numbers])
    seconds = time.perf_counter() - began
    print(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} a second",
          file=sys.stderr)


if __name__ == "__main__":
    run(main, SampleConfig, __doc__)
