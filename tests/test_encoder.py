import hashlib
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from conftest import PROJECT, documents
from onecard import encoder
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT, GPT2Tokenizer
from prepare import PrepareConfig
from test_tokenizers import HARD

pytest.importorskip("gigatoken")
CONTRACTIONS = [f"{before}'{ending}{after}" for ending in "s d m t ll ve re S LL Re".split()
                for before in ("", "I", " ", "'", "1", "\n", "é") for after in ("", " x", "'", "1")]


def column(texts):
    return pa.array(texts, pa.large_string())


def batches(texts, name, num_proc=1, seed=0):
    columns = [column(texts[i:i + 5]) for i in range(0, len(texts), 5)]
    return list(encoder.encode(columns, PrepareConfig(encoder=name, num_proc=num_proc, seed=seed)))


def mixtures(n):
    """Texts of letters from all of Unicode, in runs and mixed with white space."""
    rng = random.Random(0)
    pieces = ["'s", "'ll", "\r\n", "\x00", "12345", *" \t\n\x0b\x1c\x85\xa0\u1680\u2028\u3000"] * 5
    for first, end in [(0, 0x80), (0, 0x600), (0x600, 0x3100), (0, 0xD800), (0xE000, 0x110000)]:
        pieces += [chr(rng.randrange(first, end)) * rng.choice([1, 1, 9]) for _ in range(200)]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(n)]


def test_the_ids_of_every_document_are_tiktokens(monkeypatch):
    letters = "".join(random.Random(0).choices("abcdefghij", k=100_000))
    texts = [*HARD[1:], *documents(300), *CONTRACTIONS, *mixtures(1000), "a" * 100_000,
             " " * 1_100_000 + "x", "\n" * 100_000, letters + "\u0c05", letters]
    monkeypatch.setattr(encoder, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(encoder, "RENEW_TOKENS", 100_000)
    left = list(reversed(texts))
    for batch in batches(texts, "gigatoken", 3):
        assert batch.ids.dtype == np.uint16 and batch.lengths.sum() == len(batch.ids)
        pieces = np.split(batch.ids, np.cumsum(batch.lengths)[:-1])
        for ids, n_bytes in zip(pieces, batch.text_bytes, strict=True):
            text = left.pop()
            assert ids.tolist() == [END_OF_TEXT, *GPT2Tokenizer().encode(text)]
            assert n_bytes == len(text.encode())
    assert not left


def test_all_letters_disputed_or_not_are_cut_as_tiktoken_cuts_them():
    numbers = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 50)]
    letters = [chr(c) for c in numbers]         # of the rare ones above 0x20000 one in 50
    disputed = set(encoder.disputed_documents(column(letters)))
    assert len(disputed) < len(letters) / 2
    letters = [letters[i] for i in sorted(range(len(letters)), key=disputed.__contains__)]
    texts = column(["".join(f"{c}'s1{c}\n" for c in letters[i:i + 5000])
                    for i in range(0, len(letters), 5000)])
    for ours, tiktokens in zip(encoder.Gigatoken()(texts), encoder.by_tiktoken(texts), strict=True):
        assert np.array_equal(ours, tiktokens)


def test_common_scripts_are_not_disputed_and_gigatoken_is_renewed(monkeypatch):
    words = "Größe Рус 東京都の 한국어 ἀρχή عرب Tiếng हिन्दी ไทย 🙂 “quotes” 𝑥² \u0c05"
    texts = column(words.split())
    assert encoder.disputed_documents(texts).tolist() == [12]
    gigatoken = encoder.Gigatoken()
    before = gigatoken.tokenizer
    monkeypatch.setattr(encoder, "RENEW_TOKENS", 10)    # it would remember a gigabyte of words
    gigatoken(texts)
    assert gigatoken.tokenizer is not before


def test_equal_documents_have_equal_hashes_and_others_do_not():
    texts = documents(100) + [" a b", " b a", " a b a", " dog bites man", " man bites dog"]
    random.Random(0).shuffle(texts)
    hashes = {}
    for name, part in (("tiktoken", texts), ("gigatoken", texts), ("tiktoken", texts[7:])):
        made = np.concatenate([batch.hashes for batch in batches(part, name)])
        for text, number in zip(part, made.tolist(), strict=True):
            assert hashes.setdefault(text, number) == number
    assert len(set(hashes.values())) == len(texts)
    for text, number in hashes.items():         # so each text stays in its split
        digest = hashlib.sha256(b"0" + GPT2Tokenizer().encode(text).tobytes()).digest()
        assert number == int.from_bytes(digest[:8], "little")
    other_seed = batches(texts, "tiktoken", seed=1)[0].hashes.tolist()
    assert not set(hashes.values()).intersection(other_seed)


def test_without_gigatoken_tiktoken_is_taken_and_torch_is_never_loaded(monkeypatch):
    code = "import sys, prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)
    monkeypatch.setitem(sys.modules, "gigatoken", None)         # as if it were not installed
    assert encoder.choose("auto") == encoder.choose("tiktoken") == "tiktoken"
    with pytest.raises(UserError, match="pip install gigatoken"):
        encoder.choose("gigatoken")
