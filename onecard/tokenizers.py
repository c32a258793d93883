"""Text becomes token ids, and ids become text again.

GPT-2's vocabulary lies in data/gpt2.tiktoken, so nothing is downloaded. A folder of nanoGPT's
character-level scripts brings its own vocabulary, meta.pkl.
"""
import base64
import functools
import io
import pickle
import re
from pathlib import Path

import numpy as np
import tiktoken

from onecard.files import DATA, sha256
from onecard.settings import UserError

VOCABULARY = Path(__file__).resolve().parent.parent / "data" / "gpt2.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
N_VOCAB = 50257                         # ids 0 to 50256
END_OF_TEXT = 50256                     # stands before every document

# How GPT-2 cuts a text into words (Radford et al. 2019, encoder.py). `\s++$` is ours: the words are
# the same, and long white space at the end of a text needs no stack of the regex engine.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+"""
# Where to cut a text with so much white space (a million characters) that this stack is too small:
# before the last one ahead of a word, where GPT-2 cuts, too. Python counts \x1c to \x1f as white
# space, and GPT-2 does not.
GAP = re.compile(r"(?=[^\S\x1c-\x1f][\S\x1c-\x1f])(?<=[^\S\x1c-\x1f]{100000})")


@functools.cache
def gpt2():
    """tiktoken's encoder with GPT-2's vocabulary."""
    if not VOCABULARY.is_file() or sha256(VOCABULARY) != VOCABULARY_SHA256:
        raise UserError(f"{VOCABULARY} is missing or changed; `git checkout {VOCABULARY}` "
                        "restores it")
    lines = VOCABULARY.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    return tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT})


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding. "<|endoftext|>" in a text is text, never id 50256."""
    identity = VOCABULARY_SHA256        # what a checkpoint says of the meaning of its ids
    n_vocab = N_VOCAB
    start = END_OF_TEXT                 # the id that stands before a document's first word

    def encode(self, text):
        """The token ids of `text`, uint16."""
        text = text.encode("utf-8", "replace").decode()     # half a surrogate pair becomes "?"
        encode = functools.partial(gpt2().encode_to_numpy, disallowed_special=())
        try:
            ids = encode(text)
        except ValueError:
            ids = np.concatenate([encode(piece) for piece in GAP.split(text)])
        return ids.astype(np.uint16)

    def decode_bytes(self, ids):
        """The bytes of `ids`. A document's are valid UTF-8; one token's may be half a letter."""
        return gpt2().decode_bytes([int(i) for i in ids])


class CharTokenizer:
    """A vocabulary of characters, as a nanoGPT dataset has it."""

    def __init__(self, letters):
        if not all(isinstance(letter, str) and len(letter) == 1 for letter in letters):
            raise UserError("a vocabulary of characters needs one character for each id")
        self.identity = letters         # in the order of their ids
        self.stoi = {letter: i for i, letter in enumerate(letters)}
        self.n_vocab = len(letters)
        self.start = self.stoi.get("\n", 0)

    def encode(self, text):
        """The ids of the characters of `text`, uint16."""
        unknown = sorted(set(text) - set(self.stoi))
        if unknown:
            raise UserError(f"the text has {unknown[0]!r}, which is not one of the "
                            f"{self.n_vocab} characters that this model knows")
        return np.array([self.stoi[letter] for letter in text], np.uint16)

    def decode_bytes(self, ids):
        """The bytes of `ids`, UTF-8."""
        return "".join(self.identity[int(i)] for i in ids).encode("utf-8", "replace")


class UnknownTokenizer:
    """Stands for a vocabulary that nobody recorded: its ids can be trained on, but not read."""
    identity = "unknown"
    n_vocab = None


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers; a pickle that names any code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} is code")


def is_recorded(folder):
    """Whether a dataset says which tokenizer made its ids. nanoGPT's GPT-2 datasets do not."""
    return any((Path(folder) / name).is_file() for name in ("meta.json", "meta.pkl"))


def of_dataset(folder, vocab_size):
    """The tokenizer of a dataset's ids, for a model of `vocab_size` ids."""
    path = Path(folder) / "meta.pkl"
    if path.with_name("meta.json").is_file():       # prepare.py's
        return GPT2Tokenizer()
    if not path.is_file():
        return likely_tokenizer(vocab_size)
    try:
        itos = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        return CharTokenizer([itos[i] for i in range(len(itos))])
    except Exception:                   # a damaged pickle can raise anything
        raise UserError(f"{path} has no characters (itos), one for each id. Without that file, ids "
                        f"are GPT-2's with a --vocab_size from {N_VOCAB} on; with a smaller one "
                        "they can be trained on, but not read") from None


def of_checkpoint(parts):
    """The tokenizer of the ids of a model, from its checkpoint."""
    vocab_size, identity = parts["model_args"]["vocab_size"], parts.get("tokenizer")
    if identity is None:                # nanoGPT's sample.py finds characters by the dataset
        dataset = str(parts.get("config", {}).get("dataset", ""))
        tokenizer = of_dataset(DATA / dataset, vocab_size)
        return tokenizer if tokenizer.n_vocab == vocab_size else likely_tokenizer(vocab_size)
    if isinstance(identity, list) and len(identity) <= vocab_size:
        return CharTokenizer(identity)
    if identity == VOCABULARY_SHA256:
        return likely_tokenizer(vocab_size)
    return UnknownTokenizer()


def likely_tokenizer(vocab_size):
    """What a model of `vocab_size` ids most likely has: GPT-2's, if these are enough for them."""
    if vocab_size >= N_VOCAB:
        return GPT2Tokenizer()
    return UnknownTokenizer()
