import io
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as transformers

import sample
from conftest import run, write_nanogpt
from model import GPT, GPTConfig
from onecard import checkpoint
from onecard.generate import SamplingConfig, generate, pick
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT, GPT2Tokenizer

MODERN = dict(position="rotary", norm="rmsnorm", qk_norm=True, mlp="swiglu", bias=False,
              tie_word_embeddings=False, embed_norm=True)
ARGS = ["--device=cpu", "--dtype=float32", "--max_new_tokens=20"]


def small(seed=0, vocab_size=50304, **settings):
    """A model with opinions: its likeliest tokens vary."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, vocab_size, n_layer=2, n_head=4, n_embd=64, **settings)).eval()
    for p in model.transformer.h.parameters():
        p.data.mul_(8)
    return model


@torch.no_grad()
def reciter(ids, block_size=64, vocab_size=50304):
    """A model that knows `ids` by heart: after any n tokens, the likeliest is ids[n - 1]."""
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=1, n_head=1,
                          n_embd=block_size, tie_word_embeddings=False, bias=False)).eval()
    for p in model.parameters():
        p.zero_()
    model.transformer.ln_f.weight.fill_(1)
    model.transformer.wpe.weight.copy_(torch.eye(block_size))
    model.lm_head.weight[ids, range(len(ids))] = 1
    return model


def save(model, folder="out", tokenizer=None, **settings):
    """A run's checkpoint. Without a tokenizer it is like nanoGPT's."""
    Path(folder).mkdir()
    parts = {"model": model.state_dict(), "model_args": model.config.model_args(), "iter_num": 7}
    if tokenizer is not None:
        parts["tokenizer"] = tokenizer
    checkpoint.save(Path(folder) / "ckpt.pt", {**parts, "config": settings})


@pytest.fixture
def written(work, capsys):
    """What sample.py prints with these arguments."""
    def write(*args):
        run(sample, *ARGS, *args)
        return capsys.readouterr().out
    return write


@pytest.mark.parametrize("network, n_prompt, fixed_shapes", [
    ({}, 1, False), ({}, 45, True), (MODERN, 32, True), (MODERN, 45, False)])
@pytest.mark.parametrize("sampling", [
    SamplingConfig(top_k=50, top_p=0.9, min_p=0.01, seed=3),
    SamplingConfig(temperature=0.0, repetition_penalty=1.3)])
def test_the_cache_changes_no_token_and_all_are_in_the_vocabulary(
        network, n_prompt, fixed_shapes, sampling):
    model, context = small(vocab_size=320, **network), torch.randint(60, (n_prompt,))
    sampling = replace(sampling, max_new_tokens=70)
    tokens = list(generate(model, context.tolist(), sampling, 60, fixed_shapes))
    assert len(set(tokens)) > 5 and max(tokens) < 60
    generator, context = torch.Generator().manual_seed(sampling.seed), context[-32:]
    for token in tokens:                # the whole context is read again for every token
        if len(context) > 32:
            context = context[-16:]
        logits = model(context[None])[0, -1, :60]
        in_text = torch.zeros(60, dtype=torch.bool).index_fill(0, context, True)
        expected = pick(logits, in_text, torch.rand(1, generator=generator), sampling)
        assert token == expected.item()
        context = torch.cat((context, expected))


@pytest.mark.parametrize("settings", [
    dict(), dict(top_p=0.6), dict(min_p=0.2), dict(min_p=1.0), dict(top_k=1), dict(top_p=1e-9),
    dict(temperature=0.5, top_k=10, top_p=0.9, min_p=0.1), dict(repetition_penalty=1.5),
    dict(repetition_penalty=2.0, top_k=4, temperature=2.0), dict(temperature=0.01),
    dict(repetition_penalty=100.0, top_k=2**31, temperature=100.0)])
def test_tokens_have_the_probabilities_of_transformers(settings):
    torch.manual_seed(0)
    sampling = SamplingConfig(**{"temperature": 1.0, "top_k": 0, **settings})
    logits, n = torch.randn(20) * 2 - 3, 1000
    logits[[0, 7, 19]] = -torch.inf
    context = torch.tensor([3, 3, 3, 4, 8, 10, 13, 14, 18])     # logits above and below 0
    steps = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampling.temperature),
        transformers.TopKLogitsWarper(sampling.top_k or 20),
        transformers.TopPLogitsWarper(sampling.top_p),
        transformers.MinPLogitsWarper(sampling.min_p)])
    p = steps(context[None], logits[None])[0].softmax(0)
    numbers = [0.0, *((torch.arange(n) + 0.5) / n).tolist(), 1 - 2**-24]    # evenly spaced
    in_text = torch.zeros(20, dtype=torch.bool).index_fill(0, context, True)
    drawn = torch.cat([pick(logits, in_text, torch.tensor([u]), sampling) for u in numbers])
    counts = torch.bincount(drawn, minlength=20)
    assert (counts - p * n).abs().max() < 3.01 and not counts[p == 0].any()


def test_letters_come_out_whole_and_a_text_ends_at_its_end_of_text_token(written):
    text = "日本語 🙂 ё naïve"          # the first token is half of a letter
    save(reciter([*GPT2Tokenizer().encode(text).tolist(), END_OF_TEXT, 11, 12]))
    assert written("--temperature=0").endswith(f"---- sample 3 ----\n{text}\n")


def test_a_prompt_from_a_file_may_be_longer_than_the_context(work, capsys):
    prompt = "Zürich is a city. " * 40
    Path("p.txt").write_text(prompt, encoding="utf-8")
    save(reciter([END_OF_TEXT] * 64))
    run(sample, *ARGS, "--start=FILE:p.txt", "--num_samples=1", "--temperature=0")
    printed, remarks = capsys.readouterr()
    assert remarks.startswith("the prompt has 282 tokens; the model sees the last 64 of them\n")
    assert printed.endswith(f"---- sample 1 ----\n{prompt}\n")


def test_a_piece_of_text_comes_before_the_next_token_is_computed():
    model, cfg = reciter([11, 12]), sample.SampleConfig(temperature=0.0)
    pieces = sample.continuation(model, GPT2Tokenizer(), [END_OF_TEXT], cfg)
    assert next(pieces) == GPT2Tokenizer().decode_bytes([11]).decode()
    model.load_state_dict(reciter([11, 13]).state_dict())
    assert next(pieces) == GPT2Tokenizer().decode_bytes([13]).decode()


def test_characters_are_continued_in_characters(written):
    write_nanogpt(Path("data/chars"), np.zeros(100))
    meta = {"stoi": {"a": 0, "b": 1, "c": 2, "\n": 3}, "itos": {0: "a", 1: "b", 2: "c", 3: "\n"}}
    Path("data/chars/meta.pkl").write_bytes(pickle.dumps(meta))
    save(reciter([0, 1, 2, 0], block_size=8, vocab_size=4), dataset="chars")
    args = ["--temperature=0", "--max_new_tokens=3"]
    assert written(*args).endswith("----\nabc\n")       # after a new line, which is not shown
    assert written(*args, "--start=ab").endswith("----\nabbca\n")
    Path("data/chars/meta.pkl").unlink()
    with pytest.raises(UserError, match="its 4 ids are neither GPT-2's nor"):
        written("--start=ab")
    save(reciter([0, 1, 2, 0], 8, 4), "alone", ["x", "y", "z", "\n"], dataset="chars")
    assert written(*args, "--out_dir=alone").endswith("----\nxyz\n")    # it needs no data folder
    with pytest.raises(UserError, match="'b', which is not one of the 4 characters"):
        written("--out_dir=alone", "--start=b")


@pytest.mark.parametrize("content", [
    "\ufeffZürich\r\n".encode(), "\ufeffZürich\n".encode("utf-16-le"),
    "\ufeffZürich\n".encode("utf-16-be"), "Zürich\n".encode()])
def test_a_byte_order_mark_is_no_text_and_utf_16_is_read(work, content):
    Path("p.txt").write_bytes(content)
    assert sample.read_start("FILE:p.txt") == "Zürich\n"


def test_the_newest_run_writes_and_a_seed_writes_the_same_however_many_are_written(written):
    save(small(1), "out-old"), save(small(2), "out-new")
    three = written()
    assert three.startswith("out-new/ckpt.pt, step 7") and three.count("---- sample") == 3
    assert three.startswith(written("--num_samples=2"))
    second = written("--num_samples=1", "--seed=1338").split("----\n")[1]
    assert second + "---- sample 3" in three and three.count(second) == 1


class Console(io.StringIO):
    """A stdout where somebody presses Ctrl-C while it shows a token, the 20th or so."""
    n_pieces = 0

    def write(self, text):
        super().write(text)
        self.n_pieces += 1
        if self.n_pieces == 25:
            raise KeyboardInterrupt


def test_interactive_continues_each_text_and_ctrl_c_stops_only_that(work, monkeypatch):
    save(small())
    console = Console()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\nA dog\n"))
    monkeypatch.setattr("sys.stdout", console)
    run(sample, *ARGS, "--interactive", "--start=The sea", "--max_new_tokens=40")
    _, first, second, third, last = console.getvalue().split("\n> ")
    assert first.startswith("The sea") and third.startswith("A dog") and last == "\n"
    assert second.startswith(first.removesuffix("\n"))      # Enter alone continues the last text
    n_first, n_third = len(GPT2Tokenizer().encode(first)), len(GPT2Tokenizer().encode(third))
    assert n_first < 30 < n_third                           # the first one was stopped


@pytest.mark.parametrize("setting, sentence", [
    ("--top_p=0", "top_p = 0.0 must be above 0 and at most 1"),
    ("--min_p=2", "min_p = 2.0 must be from 0 to 1"),
    ("--repetition_penalty=0", "repetition_penalty = 0.0 must be from 1 to"),
    ("--temperature=0.001", "temperature = 0.001 must be from 0.01 to"),
    ("--start=FILE:gone.txt", "No such file or directory: 'gone.txt'"),
    ("--start=FILE:latin.txt", "must name a text file in UTF-8 or UTF-16: 'utf-8' codec")])
def test_mistakes_get_one_sentence(written, setting, sentence):
    save(small())
    Path("latin.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(sentence)):
        written(setting)
