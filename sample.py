"""Let a trained model write.

    python sample.py                                        # from the newest run under out*/
    python sample.py --out_dir=out-quickstart --start="The function returns"
    python sample.py --start=FILE:prompt.txt --num_samples=1 --temperature=0.7
    python sample.py --interactive                          # you begin, it continues
    python sample.py --init_from=gpt2                       # OpenAI's GPT-2 (needs transformers)
"""
import codecs
import contextlib
import itertools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import open_model
from onecard import checkpoint, runtime, tokenizers
from onecard.files import text_encoding
from onecard.generate import SamplingConfig, generate
from onecard.settings import UserError, configure_and_run, in_range


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """Settings, besides those of SamplingConfig: temperature, top_k, seed, max_new_tokens, ..."""
    out_dir: str = ""               # run to sample from; "" = the newest under out*/
    init_from: str = "resume"       # resume (the run in out_dir), gpt2, a folder or a .pt file
    start: str = ""                 # text to continue; FILE:name reads a file; "" = a new document
    interactive: bool = False       # ask for the beginning of a text, continue it, ask again
    num_samples: int = 3            # continuations of start, with the seeds seed, seed + 1, ...
    device: str = "auto"            # cuda, cuda:1, mps, cpu; auto = the best of these
    dtype: str = "auto"             # bfloat16, float16, float32; auto = what suits the device

    def __post_init__(self):
        super().__post_init__()
        in_range(1, 10**9, self, "num_samples")


def read_start(start):
    """The text to continue: `start` itself, or what is in the file of FILE:name."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        content = path.read_bytes()
        return content.decode(text_encoding(content)).replace("\r\n", "\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"start = {start!r} must name a text file in UTF-8 or UTF-16: "
                        f"{error}") from None


def encode_prompt(text, tokenizer, block_size):
    """The tokens of `text`. A GPT-2 prompt begins with end-of-text, as documents in training do."""
    is_gpt2 = isinstance(tokenizer, tokenizers.GPT2Tokenizer)
    if is_gpt2:
        text = text.removeprefix("<|endoftext|>")       # it comes first anyway
    ids = tokenizer.encode(text).tolist()
    if is_gpt2 or not ids:              # a character model needs a start only if text is empty
        ids = [tokenizer.start] + ids
    if len(ids) > block_size:
        print(f"the prompt has {len(ids):,} tokens; the model sees the last {block_size:,} of "
              "them", file=sys.stderr)      # generate() cuts them
    return ids


def continuation(model, tokenizer, ids, cfg):
    """Yield what the model writes after the tokens `ids`, a piece of text for each token."""
    make_decoder = codecs.getincrementaldecoder("utf-8")
    decoder = make_decoder(errors="replace")    # it waits until all bytes of a letter are there
    for token in generate(model, ids, cfg, tokenizer.n_vocab):
        yield decoder.decode(tokenizer.decode_bytes([token]))


def write_samples(model, tokenizer, text, cfg):
    """Print continuations of `text` as they come."""
    ids = encode_prompt(text, tokenizer, model.config.block_size)
    n_tokens, start_time = 0, time.perf_counter()
    for n in range(cfg.num_samples):
        print(f"---- sample {n + 1} ----\n{text}", end="", flush=True)
        for piece in continuation(model, tokenizer, ids, replace(cfg, seed=cfg.seed + n)):
            print(piece, end="", flush=True)
            n_tokens += 1
        print()
    seconds = time.perf_counter() - start_time
    print(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} a second",
          file=sys.stderr)


def interact(model, tokenizer, text, cfg):
    """Ask for the beginning of a text, continue it, and ask again."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401       # arrow keys in input(); Windows has them anyway
    print("Type the beginning of a text. Enter alone continues the last text. Ctrl-C stops a "
          "text, Ctrl-D ends (on Windows Ctrl-Z and Enter).")
    for seed in itertools.count(cfg.seed):      # each text gets a new seed
        try:
            text = input("\n> ") or text
            ids = encode_prompt(text, tokenizer, model.config.block_size)
            print(text, end="", flush=True)
            for piece in continuation(model, tokenizer, ids, replace(cfg, seed=seed)):
                text += piece
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:       # while typing: drop the line. While writing: stop
            print()
        except EOFError:
            print()
            return


def main(cfg):
    text = read_start(cfg.start)
    device = runtime.pick_device(cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device)
    source = checkpoint.source(cfg.init_from, cfg.out_dir)      # a folder, a file, or "gpt2"
    opened = open_model(source)
    print(f"{opened.label}, {runtime.device_name(device)}, {dtype}")
    # cuDNN's attention is slow at each new length: 40 ms a token on an H100
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = opened.model
    # on a CPU, a token takes 3/4 of the time if the matrices are stored by columns
    if device.type == "cpu" and dtype is torch.float32:
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data = weight.data.T.contiguous().T
    action = interact if cfg.interactive else write_samples
    try:
        with runtime.World(device, dtype).autocast():       # a world of one process
            action(model.to(device), opened.tokenizer, text, cfg)
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device}; perhaps a run trains on it. --device=cpu "
                        "needs no memory of a GPU") from None


if __name__ == "__main__":
    # prints_results=True: if another program reads the output and ends, this script ends, too
    configure_and_run(main, SampleConfig, __doc__, prints_results=True)
