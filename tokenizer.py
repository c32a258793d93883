"""How does text become GPT-2 token ids, one string or a million documents at a time?

The vocabulary lies in data/gpt2.tiktoken, so nothing is downloaded. A folder made by nanoGPT's
character-level scripts brings its own vocabulary (meta.pkl), which `of_dataset` finds.
"""
import base64
import contextlib
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import tiktoken

VOCAB_FILE = Path(__file__).resolve().parent / "data" / "gpt2.tiktoken"
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
N_VOCAB = 50257                     # ids 0 to 50256
END_OF_TEXT = 50256                 # stands before every document

# How GPT-2 cuts text into words before the merges (Radford et al. 2019, encoder.py).
# `\s++$` changes no word: it takes the white space at the end of a text without a stack.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+"""
# White space of which tiktoken's regular expressions run out of stack (at about a million).
GAP = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}")

# gigatoken remembers every word that it has met. It is made anew, and forgets them, when this
# process has grown by so much memory since the first was made, or where a system does not tell that
# (in /proc) after so much text.
MOST_GROWTH = 384 << 20             # bytes; at this it may be about to double
MOST_TEXT = 64 << 20                # bytes
LEAST_TEXT = 8 << 20                # bytes between two; what it remembers takes a while to pay


@functools.cache
def ranks():
    """{bytes of a token: its id}, 0 to 50255, which is also the order of the merges."""
    data = VOCAB_FILE.read_bytes() if VOCAB_FILE.is_file() else b""
    if hashlib.sha256(data).hexdigest() != VOCAB_SHA256:
        raise ValueError(f"{VOCAB_FILE} is missing or changed; `git checkout {VOCAB_FILE.name}` "
                         "in its folder brings back GPT-2's vocabulary")
    return {base64.b64decode(token): int(rank)
            for token, rank in map(bytes.split, data.splitlines())}


@functools.cache
def _gpt2():
    return tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ranks(),
                             special_tokens={"<|endoftext|>": END_OF_TEXT})


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding. Text that contains "<|endoftext|>" is text, never id 50256."""
    n_vocab = N_VOCAB
    start = END_OF_TEXT             # what a model saw before the first word of every document

    def encode(self, text):
        """uint16 array of token ids of `text`."""
        text = text.encode("utf-8", "replace").decode()             # lone surrogates become "?"
        try:
            return _gpt2().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:          # the gap is cut where GPT-2 cuts it: before its last letter
            cuts = [0, *(gap.end() - 1 for gap in GAP.finditer(text) if gap.end() < len(text)),
                    len(text)]
            if len(cuts) == 2:
                raise
            return np.concatenate([self.encode(text[a:b])
                                   for a, b in zip(cuts, cuts[1:], strict=False)])

    def decode_bytes(self, ids):
        """The bytes of `ids`: whole documents are valid UTF-8, one token perhaps half a letter."""
        return _gpt2().decode_bytes([int(i) for i in ids])


def resident():
    """Bytes of memory that this process has; None on a system that does not tell."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


class _Gigatoken:
    """The library gigatoken on arrow's buffers, with a bound to what it remembers.

    Raises Disputed for text with a letter that it does not take as tiktoken does.
    """

    def __init__(self):
        import awkward  # which gigatoken brings
        import gigatoken
        self.contents, self.index = awkward.contents, awkward.index
        self.array, self.new = awkward.Array, lambda: gigatoken.Tokenizer.from_tiktoken(
            VOCAB_FILE, pretokenizer="gpt2", special_tokens={})
        self.tokenizer, self.n_bytes, self.at_first = self.new(), 0, resident()
        self.disputed = self._disputed()
        self.disputed_bytes = np.array([int.from_bytes(chr(c).encode().ljust(4, b"\0"), "big")
                                        for c in self.disputed], np.uint32)
        self.begins = np.zeros(1 << 16, bool)           # by the first two bytes of a letter
        self.begins[self.disputed_bytes >> 16] = True
        self.leads = sorted({int(lead) for lead in self.disputed_bytes >> 24})

    def _is_full(self):
        if resident() is None:
            return self.n_bytes > MOST_TEXT
        return self.n_bytes > LEAST_TEXT and resident() - self.at_first > MOST_GROWTH

    def _disputed(self):
        """The letters that one of both takes for letters or digits and the other does not, since
        their tables are of different years. What Unicode had in 2002 is not disputed."""
        new = [c for c in range(0x80, 0x40000)
               if unicodedata.ucd_3_2_0.category(chr(c)) == "Cn"]
        lines = "".join(f"{chr(c)}'s\n" for c in new)      # 's is a word behind a letter only
        line_end = GPT2Tokenizer().encode("\n")[0]
        one, other = (np.diff(np.flatnonzero(ids == line_end), prepend=-1)
                      for ids in (self.tokenizer.encode(lines), GPT2Tokenizer().encode(lines)))
        return [c for c, differ in zip(new, one != other, strict=True) if differ]

    def _has_disputed(self, data):
        leads = [lead for lead in self.leads if bytes([lead]) in data]
        if not leads:
            return False
        data = np.frombuffer(data + b"\0\0\0", np.uint8)        # a last letter has 4 bytes too
        begins = data == leads[0]
        for lead in leads[1:]:
            begins |= data == lead
        places = np.flatnonzero(begins)
        places = places[self.begins[data[places].astype(np.uint16) << 8 | data[places + 1]]]
        letters = data[places[:, None] + np.arange(4)]
        letters[letters[:, 0] < 0xE0, 2] = 0            # of two bytes; the next letter's go
        letters[letters[:, 0] < 0xF0, 3] = 0            # of three
        return bool(np.isin(letters.view(">u4"), self.disputed_bytes).any())

    def encode(self, column):
        """(token ids uint32, where each document begins in them and the end, int64)."""
        offsets, data = buffers(column)
        if self._has_disputed(data[offsets[0]:offsets[-1]].tobytes()):
            raise Disputed
        letters = self.contents.NumpyArray(data, parameters={"__array__": "byte"})
        layout = self.contents.ListOffsetArray(self.index.Index64(offsets), letters,
                                               parameters={"__array__": "bytestring"})
        tokenizer = self.tokenizer or self.new()        # another thread may be renewing it
        found = tokenizer.encode_batch(self.array(layout), parallel=False).layout
        del tokenizer
        self.n_bytes += int(offsets[-1] - offsets[0])
        if self._is_full():
            self.tokenizer, self.n_bytes = None, 0      # the old one goes before the new one comes
            self.tokenizer = self.new()
        return found.content.data, found.offsets.data


class Disputed(ValueError):
    """Text has letters so new that gigatoken and tiktoken take them differently."""


@functools.cache
def _gigatoken():
    _gpt2()                         # which checks the vocabulary
    return _Gigatoken()


def encoder_of(asked):
    """The encoder that 'auto', 'gigatoken' or 'tiktoken' means here.

    Raises ImportError where gigatoken is asked for and not there, ValueError where the vocabulary
    is missing or changed.
    """
    _gpt2()
    there = importlib.util.find_spec("gigatoken") is not None
    if asked == "gigatoken" and not there:
        raise ImportError("--encoder=gigatoken needs gigatoken: pip install gigatoken")
    return asked if asked != "auto" else "gigatoken" if there else "tiktoken"


def get_ready(encoder):
    """Make what encode_documents and letter_sums make once, which takes some tenths of a second."""
    _letter_sums()
    if encoder == "gigatoken":
        _gigatoken()


def buffers(column):
    """(offsets int64, bytes uint8) of a column of string or large_string."""
    kind = np.int64 if pa.types.is_large_string(column.type) else np.int32
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, kind)[column.offset:column.offset + len(column) + 1]
    return offsets.astype(np.int64), np.frombuffer(data or b"", np.uint8)


def valid(column):
    """The column with U+FFFD where its bytes are not UTF-8."""
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return pa.array([b and b.decode("utf-8", "replace")
                         for b in column.view(kind).to_pylist()], column.type)


def encode_documents(column, encoder):
    """The documents of a column of text without nulls, as (ids, starts).

    ids is uint16: END_OF_TEXT and the document's tokens, one document after the other. starts is
    int64: where each begins, and the end.
    """
    tokens = None
    if encoder == "gigatoken":
        with contextlib.suppress(Disputed):
            tokens, offsets = _gigatoken().encode(column)
    if tokens is None:
        encode = GPT2Tokenizer().encode
        found = [encode(text) for text in column.to_pylist()]
        tokens = np.concatenate([np.zeros(0, np.uint16), *found])
        offsets = np.cumsum([0, *map(len, found)])
    starts = offsets + np.arange(len(offsets))
    ids, is_text = np.empty(starts[-1], np.uint16), np.ones(starts[-1], bool)
    ids[starts[:-1]], is_text[starts[:-1]] = END_OF_TEXT, False
    ids[is_text] = tokens
    return ids, starts


@functools.cache
def _letter_sums():
    """uint64 per token id: the sum of a random number for each of its letters and digits."""
    of_byte = np.random.default_rng(0).integers(2**64, size=256, dtype=np.uint64)
    of_byte[[b for b in range(128) if not chr(b).isalnum()]] = 0
    for lower in range(ord("a"), ord("z") + 1):
        of_byte[lower - 32] = of_byte[lower]
    return np.array([of_byte[list(_gpt2().decode_single_token_bytes(i))].sum(dtype=np.uint64)
                     for i in range(END_OF_TEXT)] + [0], np.uint64)


def letter_sums(ids, starts):
    """uint64 per document: the same for texts that differ in white space, punctuation and case.

    It does not depend on how words are cut into tokens. Texts with the same letters in another
    order share it too.
    """
    return np.add.reduceat(_letter_sums().take(ids), starts[:-1])


def normalized(text):
    """The letters and digits of `text`, bytes, a to z small; bytes past ASCII as they are."""
    return text.translate(_SMALL, _NOT_TEXT)


_SMALL = bytes(b + 32 if 65 <= b <= 90 else b for b in range(256))
_NOT_TEXT = bytes(b for b in range(128) if not chr(b).isalnum())


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
        characters = _PlainUnpickler(f).load()
    if not {"stoi", "itos"} <= set(characters):
        raise ValueError(f"{meta} has no characters (stoi, itos), so it does not say how text "
                         "becomes these tokens. Without that file they are taken for GPT-2's, and "
                         "--vocab_size says how many there are")
    return CharTokenizer(characters)
