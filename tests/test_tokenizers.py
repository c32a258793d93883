import pickle
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from conftest import documents
from onecard import tokenizers
from onecard.settings import UserError
from onecard.tokenizers import (
    END_OF_TEXT,
    VOCABULARY_SHA256,
    GPT2Tokenizer,
    gpt2,
    is_recorded,
    of_checkpoint,
    of_dataset,
)

HARD = ["", " ", "a", "\n\n\n", "  two  spaces  ", "tabs\t\tand\r\nWindows\r\n", "\x00null\x00",
        "🙂👨‍👩‍👧 emoji", "don't we'll I'm they've he'd it's you're", "12345678901234567890",
        "<|endoftext|>", "x" * 20000, " " * 3000, "東京都の人口は約1400万人です。", "ещё",
        "e\u0301\u200b\ufeff", "".join(map(chr, range(1, 500)))]


def write_letters(folder, letters="ab\n", **changes):
    """The meta.pkl of a nanoGPT dataset of these characters."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"stoi": {c: i for i, c in enumerate(letters)}, "itos": dict(enumerate(letters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta | changes))


@pytest.fixture(scope="module")
def reference():
    """tiktoken with OpenAI's own pattern."""
    return tiktoken.Encoding("reference", pat_str=r50k_pat_str, special_tokens={},
                             mergeable_ranks=gpt2()._mergeable_ranks)


def test_ids_are_gpt2s_and_decode_back_and_none_is_the_end_of_text(reference):
    assert GPT2Tokenizer().encode("Hello world").tolist() == [15496, 995]
    for text in HARD + documents(100):
        ids = GPT2Tokenizer().encode(text)
        assert ids.dtype == np.uint16 and ids.tolist() == reference.encode_ordinary(text)
        assert GPT2Tokenizer().decode_bytes(ids).decode() == text and END_OF_TEXT not in ids
    assert GPT2Tokenizer().decode_bytes([END_OF_TEXT]) == b"<|endoftext|>"
    assert GPT2Tokenizer().decode_bytes(GPT2Tokenizer().encode("a\ud800b")) == b"a?b"


@pytest.mark.parametrize("before, gap, after", [("a\n", "\u3000", "b"), ("a", " ", "\x1c")])
def test_white_space_beyond_tiktokens_stack_is_cut_where_gpt2_cuts(reference, before, gap, after):
    for encode, n in (reference.encode_ordinary, 2000), (GPT2Tokenizer().encode, 1_100_000):
        pieces = [*encode(before + gap * (n - 1)), *encode(gap + after)]
        assert list(encode(before + gap * n + after)) == pieces


def test_a_changed_vocabulary_is_one_sentence(work, monkeypatch):
    Path("gpt2.tiktoken").write_bytes(tokenizers.VOCABULARY.read_bytes()[:-3])
    monkeypatch.setattr(tokenizers, "VOCABULARY", Path("gpt2.tiktoken"))
    with pytest.raises(UserError, match="gpt2.tiktoken is missing or changed; `git checkout"):
        gpt2.__wrapped__()              # gpt2() is cached


def test_a_folder_with_characters_has_its_own_tokenizer(work):
    write_letters(work, "helo, wörd\n")
    characters = of_dataset(work, 64)
    ids = characters.encode("hold\nö")
    assert characters.n_vocab == 11 and characters.decode_bytes([characters.start]) == b"\n"
    assert ids.dtype == np.uint16 and characters.decode_bytes(ids).decode() == "hold\nö"
    with pytest.raises(UserError, match="'z', which is not one of the 11 characters"):
        characters.encode("hz")
    assert isinstance(of_dataset(work / "other", 50304), GPT2Tokenizer)


@pytest.mark.parametrize("content", [
    b"cbuiltins\nprint\n(S'this must not run'\ntR.", b"no pickle", b"", pickle.dumps([1]),
    pickle.dumps({"vocab_size": 4096}), pickle.dumps({"itos": {0: "ab"}, "stoi": {"ab": 0}}),
    pickle.dumps({"itos": {1: "a"}, "stoi": {"a": 1}}),
    pickle.dumps({"itos": {0: 7}, "stoi": {7: 0}})])
def test_a_meta_pkl_without_characters_is_one_sentence_and_runs_nothing(work, capsys, content):
    Path("meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="no characters .*Without that file, .*--vocab_size"):
        of_dataset(work, 64)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("files, vocab_size, identity", [
    (["meta.json"], 64, VOCABULARY_SHA256), (["meta.json", "meta.pkl"], 3, VOCABULARY_SHA256),
    (["meta.pkl"], 50304, ["a", "b", "\n"]), ([], 50304, VOCABULARY_SHA256),
    ([], 50257, VOCABULARY_SHA256), ([], 50256, "unknown"), ([], 3, "unknown")])
def test_ids_are_gpt2s_or_characters_or_unknown(work, files, vocab_size, identity):
    write_letters(work / "letters")
    for name in files:
        Path(name).write_bytes(Path("letters/meta.pkl").read_bytes())
    assert of_dataset(work, vocab_size).identity == identity
    assert is_recorded(work) == bool(files)


@pytest.mark.parametrize("identity, dataset, vocab_size, expected", [
    # what a checkpoint says counts, and not what its dataset is now
    (VOCABULARY_SHA256, "letters", 50304, VOCABULARY_SHA256),
    (["x", "y"], "letters", 2, ["x", "y"]), ("unknown", "letters", 3, "unknown"),
    ("of a later version", "", 50304, "unknown"),
    # a model without rows for all of these ids
    (VOCABULARY_SHA256, "", 1000, "unknown"), (["x", "y"], "", 1, "unknown"),
    # nanoGPT's says nothing: the characters of its dataset if they are as many, else by its size
    (None, "letters", 3, ["a", "b", "\n"]), (None, "letters", 4, "unknown"),
    (None, "letters", 50304, VOCABULARY_SHA256), (None, "gone", 50257, VOCABULARY_SHA256),
    (None, "gone", 1500, "unknown"), (None, "prepared", 64, "unknown")])
def test_a_checkpoint_knows_its_tokenizer(work, identity, dataset, vocab_size, expected):
    write_letters(work / "data" / "letters")
    (work / "data" / "prepared").mkdir()
    (work / "data" / "prepared" / "meta.json").touch()
    parts = {"model_args": {"vocab_size": vocab_size}, "config": {"dataset": dataset}}
    if identity is not None:
        parts["tokenizer"] = identity
    vocabulary = of_checkpoint(parts)
    assert vocabulary.identity == expected
    assert of_checkpoint(parts | {"tokenizer": vocabulary.identity}).identity == expected
