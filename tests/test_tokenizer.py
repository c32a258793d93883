import contextlib
import pickle
import random

import numpy as np
import pyarrow as pa
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


def column(texts, kind=None):
    return pa.array([t.encode("utf-8", "replace").decode() for t in texts], kind or pa.string())


def contractions():
    """Every contraction of the pattern, in every case, after and before what may matter to it."""
    endings = ["s", "d", "m", "t", "ll", "ve", "re"]
    return [before + "'" + form + after for ending in endings
            for form in {ending, ending.upper(), ending.title()}
            for before in ("", "I", " ", "'", "1", "\n", "é")
            for after in ("", " x", "x", "'", "1")]


def hard_texts(n, seed=0):
    """`n` texts of letters from every plane of Unicode, in runs and mixed with white space."""
    rng = random.Random(seed)
    planes = [(0, 0x80), (0, 0x250), (0x300, 0x600), (0x900, 0x2000), (0x2000, 0x3100),
              (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0x10000), (0x10000, 0x20000),
              (0x20000, 0x40000), (0x40000, 0x110000)]
    white = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"
    out = []
    for _ in range(n):
        pieces = []
        for _ in range(rng.randint(1, 40)):
            low, high = rng.choice(planes)
            letter = rng.randrange(low, high)
            pieces.append(rng.choice([
                chr(letter) * rng.choice([1, 1, 2, 9]), chr(rng.randrange(low, high)),
                "".join(rng.choices(white, k=rng.randint(1, 4))),
                rng.choice(["<|endoftext|>", "'s", "'ll", "\r\n", "\x00", " "]),
                str(rng.randrange(10**rng.randint(1, 12)))]))
        out.append("".join(pieces))
    return out


def assert_encoders_agree(texts):
    """On `texts` together, of which some may go to tiktoken, and on those that gigatoken takes."""
    pytest.importorskip("gigatoken")
    disputed = set(map(chr, tokenizer._gigatoken().disputed))
    taken = [t for t in texts if disputed.isdisjoint(t)]
    assert len(taken) > len(texts) / 2 or len(texts) == len(disputed)
    if taken:
        tokenizer._gigatoken().encode(column(taken))        # which raises Disputed if it does not
        assert_agree(taken)
    if len(taken) < len(texts):
        assert_agree(texts)


def assert_agree(texts):
    one, other = (tokenizer.encode_documents(column(texts), e) for e in ("gigatoken", "tiktoken"))
    assert np.array_equal(one[1], other[1]) and np.array_equal(one[0], other[0])
    assert one[0].dtype == np.uint16 and len(one[1]) == len(texts) + 1


@pytest.mark.parametrize("make", [
    lambda: HARD, contractions, lambda: hard_texts(3000), lambda: documents(300),
    lambda: [chr(c) + "a" + chr(c) * 2 + " " + chr(c) for c in range(0x110000)
             if not 0xD800 <= c < 0xE000][::97],
    lambda: ["a" * 1_000_000], lambda: [" " * 1_200_000 + "x", "\n" * 1_200_000],
    lambda: ["".join(random.Random(0).choices("abcdefghij", k=1_000_000))],
], ids=["hard", "contractions", "planes", "documents", "letters", "one letter", "gaps", "no space"])
def test_both_encoders_agree(make):
    assert_encoders_agree(make())


def test_letters_that_only_one_of_the_encoders_knows_are_found_and_left_to_tiktoken():
    pytest.importorskip("gigatoken")
    disputed = tokenizer._gigatoken().disputed
    for c in disputed[::50] + [0x0E01, 0x4E00, 0x1F600]:
        raises = pytest.raises(tokenizer.Disputed) if c in disputed else contextlib.nullcontext()
        with raises:
            tokenizer._gigatoken().encode(column(["a", f"b{chr(c)}", "c"])[1:])
        tokenizer._gigatoken().encode(column(["a", f"b{chr(c)}", "c"])[2:])
    assert_encoders_agree([f"{chr(c)}'s {chr(c)}'ll" for c in disputed])


@pytest.mark.slow
def test_both_encoders_agree_at_length():
    for seed in range(40):
        assert_encoders_agree(hard_texts(5000, seed))
    assert_encoders_agree([chr(c) + "a" + chr(c) * 2 + " " + chr(c) for c in range(0x110000)
                           if not 0xD800 <= c < 0xE000])
    assert_encoders_agree([chr(c) + "'s" + chr(c) + "1" + chr(c) for c in range(0x110000)
                           if not 0xD800 <= c < 0xE000])
    assert_encoders_agree(["".join(random.Random(0).choices("abcdefghij", k=10_000_000))])


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_documents_are_the_end_of_text_and_their_tokens(encoder):
    texts = ["one", "two words", "", "three", "<|endoftext|>"]
    encode = GPT2Tokenizer().encode
    wanted = [np.concatenate([[END_OF_TEXT], encode(t)]) for t in texts]
    whole = column(["before", *texts, "after"], pa.large_string())
    for given in (column(texts), column(texts, pa.large_string()), whole.slice(1, len(texts))):
        ids, starts = tokenizer.encode_documents(given, encoder)
        assert ids.tolist() == np.concatenate(wanted).tolist()
        assert starts.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()


def test_white_space_that_is_longer_than_tiktokens_stack_is_encoded():
    gap = 1_200_000
    for text in ("a" + " " * gap + "b", "\n" * gap, " \t" * gap + "x" + "\n" * gap + "y"):
        ids = GPT2Tokenizer().encode(text)
        assert GPT2Tokenizer().decode_bytes(ids).decode() == text
    # cut where GPT-2 cuts: the same as a gap that fits
    long, short = (GPT2Tokenizer().encode("a" + " " * n + "b").tolist() for n in (gap, 1000))
    assert long[:3] == short[:3] and long[-2:] == short[-2:]
    assert len(long) - len(short) == gap - 1000


def test_letter_sums_are_the_same_for_the_same_letters_and_for_nothing_else():
    texts = ["The quick brown fox's 2 tails", "the QUICK,brown\n\nfoxs 2 tails!", "Grüße aus 東京",
             "grüße  aus-東京", "GRÜSSE aus 東京", *documents(500)]
    sums = tokenizer.letter_sums(*tokenizer.encode_documents(column(texts), "tiktoken"))
    assert sums[0] == sums[1] and sums[2] == sums[3] and sums[3] != sums[4]
    of_text = {}
    for text, s in zip(texts, sums.tolist(), strict=True):
        of_text.setdefault(bytes(sorted(tokenizer.normalized(text.encode()))), set()).add(s)
    assert all(len(s) == 1 for s in of_text.values())
    assert len({s for found in of_text.values() for s in found}) == len(of_text)


def test_an_encoder_that_is_not_there_is_not_taken_in_silence(monkeypatch):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    assert tokenizer.encoder_of("auto") == tokenizer.encoder_of("tiktoken") == "tiktoken"
    with pytest.raises(ImportError, match="pip install gigatoken"):
        tokenizer.encoder_of("gigatoken")


def test_a_changed_vocabulary_is_refused(work, monkeypatch):
    (work / "gpt2.tiktoken").write_bytes(tokenizer.VOCAB_FILE.read_bytes()[:-3])
    monkeypatch.setattr(tokenizer, "VOCAB_FILE", work / "gpt2.tiktoken")
    for name in ("ranks", "_gpt2"):         # whatever was read before
        monkeypatch.setattr(tokenizer, name, getattr(tokenizer, name).__wrapped__)
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


def test_a_meta_pkl_without_characters_is_refused_in_a_sentence(work):
    (work / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4096}))
    with pytest.raises(ValueError, match="no characters .*Without that file .*--vocab_size"):
        of_dataset(work)


def test_a_pickle_that_would_run_code_is_refused(work):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))
    (work / "meta.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="only plain dicts"):
        of_dataset(work)
