"""How does text become GPT-2 token ids, one string or a million documents at a time?

The vocabulary lies in data/gpt2.tiktoken, so nothing is downloaded. A folder made by nanoGPT's
character-level scripts brings its own vocabulary (meta.pkl), which `of_dataset` finds.
"""
import base64
import functools
import hashlib
import pickle
from pathlib import Path

import numpy as np
import tiktoken

VOCAB_FILE = Path(__file__).resolve().parent / "data" / "gpt2.tiktoken"
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
N_VOCAB = 50257                     # ids 0 to 50256
END_OF_TEXT = 50256                 # stands before every document

# How GPT-2 cuts text into words before the merges (Radford et al. 2019, encoder.py).
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@functools.cache
def _gpt2():
    data = VOCAB_FILE.read_bytes() if VOCAB_FILE.is_file() else b""
    if hashlib.sha256(data).hexdigest() != VOCAB_SHA256:
        raise ValueError(f"{VOCAB_FILE} is missing or changed; `git checkout {VOCAB_FILE.name}` "
                         "in its folder brings back GPT-2's vocabulary")
    ranks = {base64.b64decode(token): int(rank)
             for token, rank in map(bytes.split, data.splitlines())}
    return tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT})


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding. Text that contains "<|endoftext|>" is text, never id 50256."""
    n_vocab = N_VOCAB
    start = END_OF_TEXT             # what a model saw before the first word of every document

    def encode(self, text):
        """uint16 array of token ids of `text`."""
        text = text.encode("utf-8", "replace").decode()             # lone surrogates become "?"
        return _gpt2().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode_bytes(self, ids):
        """The bytes of `ids`: whole documents are valid UTF-8, one token perhaps half a letter."""
        return _gpt2().decode_bytes([int(i) for i in ids])


class CharTokenizer:
    """The character-level vocabulary of a nanoGPT dataset, {"stoi": ..., "itos": ...}."""

    def __init__(self, meta):
        self.stoi, self.itos = meta["stoi"], meta["itos"]
        self.n_vocab = len(self.itos)
        self.start = self.stoi.get("\n", 0)

    def encode(self, text):
        unknown = sorted(set(text) - set(self.stoi))
        if unknown:
            raise ValueError(f"the text has {unknown[0]!r}, "
                             f"which this model's {self.n_vocab} characters lack")
        return np.array([self.stoi[c] for c in text], dtype=np.uint16)

    def decode_bytes(self, ids):
        return "".join(self.itos[int(i)] for i in ids).encode()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise ValueError(f"meta.pkl asks for {module}.{name}; only plain dicts are read from it")


def of_dataset(folder):
    """The tokenizer of a dataset folder: GPT-2's, unless it has a meta.pkl of characters."""
    meta = Path(folder) / "meta.pkl"
    if not meta.is_file():
        return GPT2Tokenizer()
    with open(meta, "rb") as f:
        return CharTokenizer(_PlainUnpickler(f).load())
