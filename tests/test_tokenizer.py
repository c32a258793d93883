import pickle

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

import tokenizer
from conftest import documents
from tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer, of_dataset

HARD = ["", " ", "a", "\n\n\n", "  two  spaces  ", "tabs\t\tand\r\nWindows\r\n", "\x00null\x00",
        "🙂👨‍👩‍👧 emoji", "don't we'll I'm they've he'd it's you're", "12345678901234567890",
        "<|endoftext|>", "x" * 20000, " " * 3000, "東京都の人口は約1400万人です。", "ещё",
        "e\u0301\u200b\ufeff", "".join(map(chr, range(1, 500)))]


def test_known_ids_of_gpt2():
    assert GPT2Tokenizer().encode("Hello world").tolist() == [15496, 995]
    assert GPT2Tokenizer().encode(" the quick brown fox").tolist() == [262, 2068, 7586, 21831]


@pytest.mark.parametrize("text", HARD + documents(30), ids=lambda t: repr(t[:12]))
def test_ids_are_tiktokens_and_decode_back(text):
    t = GPT2Tokenizer()
    reference = tiktoken.Encoding("reference", pat_str=r50k_pat_str, special_tokens={},
                                  mergeable_ranks=tokenizer._gpt2()._mergeable_ranks)
    ids = t.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == reference.encode_ordinary(text)
    assert t.decode_bytes(ids).decode() == text


def test_text_never_becomes_the_end_of_text_token():
    ids = GPT2Tokenizer().encode("before<|endoftext|>after")
    assert END_OF_TEXT not in ids and len(ids) > 3
    assert GPT2Tokenizer().decode_bytes([END_OF_TEXT]) == b"<|endoftext|>"


def test_a_lone_surrogate_does_not_stop_it():
    assert GPT2Tokenizer().decode_bytes(GPT2Tokenizer().encode("a\ud800b")) == b"a?b"


def test_a_changed_vocabulary_is_refused(work, monkeypatch):
    (work / "gpt2.tiktoken").write_bytes(tokenizer.VOCAB_FILE.read_bytes()[:-3])
    monkeypatch.setattr(tokenizer, "VOCAB_FILE", work / "gpt2.tiktoken")
    monkeypatch.setattr(tokenizer, "_gpt2", tokenizer._gpt2.__wrapped__)
    with pytest.raises(ValueError, match="missing or changed"):
        GPT2Tokenizer().encode("a")


def test_nanogpts_character_vocabulary_is_found_and_read(work):
    letters = sorted(set("hello world\n"))
    meta = {"vocab_size": len(letters), "stoi": {c: i for i, c in enumerate(letters)},
            "itos": dict(enumerate(letters))}
    (work / "meta.pkl").write_bytes(pickle.dumps(meta))
    t = of_dataset(work)
    assert t.n_vocab == len(letters) and t.decode_bytes(t.encode("hold")) == b"hold"
    with pytest.raises(ValueError, match="'z', which this model's 9 characters lack"):
        t.encode("z")
    assert isinstance(t, CharTokenizer) and isinstance(of_dataset(work / "other"), GPT2Tokenizer)


def test_a_pickle_that_would_run_code_is_refused(work):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))
    (work / "meta.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="only plain dicts"):
        of_dataset(work)
