import os
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import checkpoint
from conftest import script, write_nanogpt
from model import GPT, GPTConfig
from sample import generate, pick
from tokenizer import GPT2Tokenizer


def small(block_size=32, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=320, n_layer=2, n_head=4,
                          n_embd=64)).eval()
    with torch.no_grad():                           # opinions, so that the likeliest token varies
        for p in model.transformer.h.parameters():
            p.mul_(8)
    return model


def greedy(logits):
    return pick(logits, 0, 0, 1.0, 320)


@pytest.mark.parametrize("prompt", [1, 7, 32, 45])
@pytest.mark.parametrize("draw", ["greedy", "random"])
def test_cached_sampling_is_uncached_sampling(prompt, draw):
    model, idx = small(), torch.randint(320, (2, prompt))
    written = []
    for use_cache in (True, False):
        g = torch.Generator().manual_seed(1)
        take = (greedy if draw == "greedy"
                else lambda logits, g=g: pick(logits, 1.0, 50, 0.9, 320, g))
        written.append(torch.cat(list(generate(model, idx, 70, take, use_cache)), dim=1))
    assert torch.equal(*written) and written[0].unique().numel() > 10


def test_within_the_context_every_token_is_seen():
    model, idx = small(), torch.randint(320, (1, 5))
    for token in generate(model, idx, 27, greedy):
        assert token == model(idx)[:, -1].argmax()
        idx = torch.cat([idx, token], 1)


def test_beyond_the_context_the_last_half_of_it_or_more_is_seen():
    model, idx = small(block_size=16), torch.randint(320, (1, 40))
    start = 24
    for token in generate(model, idx, 40, greedy):
        if idx.size(1) - start > 16:
            start = idx.size(1) - 8
        assert token == model(idx[:, start:])[:, -1].argmax()
        idx = torch.cat([idx, token], 1)


def naive_distribution(logits, temperature, top_k, top_p, n_vocab):
    """The probabilities by the letter, for one row."""
    p = F.softmax(logits[:n_vocab].double() / temperature, -1)
    ranked = sorted(range(n_vocab), key=lambda i: -p[i])
    keep = ranked[:top_k] if top_k else ranked
    p = torch.tensor([p[i] if i in keep else 0.0 for i in range(n_vocab)])
    p /= p.sum()
    total, kept = 0.0, []
    for i in ranked:
        if total < top_p and p[i] > 0:
            kept.append(i)
        total += p[i]
    return {i: (p[i] / sum(p[j] for j in kept)).item() for i in kept}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 0, 0.6), (1.3, 8, 0.8), (1.0, 1, 1.0), (1.0, 0, 1e-9)])
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_mean(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(24) * 2
    wanted = naive_distribution(logits, temperature, top_k, top_p, 20)
    n = 20000
    drawn = pick(logits.expand(n, -1), temperature, top_k, top_p, 20).flatten()
    counts = torch.bincount(drawn, minlength=24)
    assert set(drawn.unique().tolist()) <= set(wanted)
    for i, p in wanted.items():
        assert counts[i] / n == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5 + 10 / n)


def test_rows_that_pad_the_vocabulary_never_win():
    logits = torch.zeros(500, 64)
    logits[:, 60:] = 100.0
    for temperature in (0, 1.0):
        assert pick(logits, temperature, 0, 1.0, 60).max() < 60


@pytest.fixture
def runs(work):
    """out-old and out-new, the second newer, untrained."""
    for i, name in enumerate(("out-old", "out-new")):
        (work / name).mkdir()
        torch.manual_seed(i)
        args = dict(block_size=64, vocab_size=50304, n_layer=1, n_head=1, n_embd=16, dropout=0.0,
                    bias=False)
        checkpoint.save({"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args,
                         "iter_num": i + 1, "config": {"dataset": "none"}},
                        work / name / "ckpt.pt")
        os.utime(work / name / "ckpt.pt", (1e9 + i, 1e9 + i))
    return work


def test_the_newest_run_writes_and_the_same_seed_writes_the_same(runs):
    args = ["--num_samples=2", "--max_new_tokens=20", "--device=cpu"]
    first = script("sample.py", *args, cwd=runs).stdout
    assert first.startswith("out-new/ckpt.pt, step 2") and first.count("---- sample") == 2
    assert script("sample.py", *args, cwd=runs).stdout == first
    assert script("sample.py", *args, "--seed=2", cwd=runs).stdout != first
    assert script("sample.py", *args, "--out_dir=out-old", cwd=runs).stdout.startswith(
        "out-old/ckpt.pt, step 1")


def test_a_prompt_may_come_from_a_file_and_be_longer_than_the_context(runs):
    prompt = "Zürich is a city. " * 40
    (runs / "p.txt").write_text(prompt, encoding="utf-8")
    told = script("sample.py", "--start=FILE:p.txt", "--num_samples=1", "--max_new_tokens=5",
                  cwd=runs).stdout
    n = len(GPT2Tokenizer().encode(prompt)) + 1
    assert (f"the prompt has {n} tokens; the model sees the last 64 of them" in told
            and prompt in told)


def test_letters_that_are_split_over_tokens_come_out_whole():
    import codecs
    text = "日本語 🙂 ё"
    letters, out = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for i in GPT2Tokenizer().encode(text):
        out += letters.decode(GPT2Tokenizer().decode_bytes([i]))
    assert out == text


def test_a_run_on_characters_is_sampled_in_characters(work):
    meta = {"vocab_size": 4, "stoi": dict(zip("abc\n", range(4), strict=True)),
            "itos": dict(enumerate("abc\n"))}
    write_nanogpt(work / "data/chars", np.zeros(100))
    (work / "data/chars/meta.pkl").write_bytes(pickle.dumps(meta))
    (work / "out").mkdir()
    args = dict(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8, dropout=0.0, bias=False)
    checkpoint.save({"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args,
                     "iter_num": 1, "config": {"dataset": "chars"}}, work / "out/ckpt.pt")
    told = script("sample.py", "--num_samples=1", "--max_new_tokens=30", "--start=ab",
                  cwd=work).stdout
    assert (set(told.split("----\n")[1]) <= set("abc\n")
            and len(told.split("----\n")[1].rstrip("\n")) > 2)


@pytest.mark.parametrize("args, words", [
    ([],
     "there is no run under out*/ with a checkpoint yet; `python train.py config/quickstart.py`"),
    (["--out_dir=nowhere"], "nowhere holds no ckpt.pt or best.pt"),
    (["--temperature=-1"], "temperature and top_k must not be negative"),
    (["--num_samples=0"], "num_samples and max_new_tokens must be at least 1"),
])
def test_mistakes_are_named(work, args, words):
    done = script("sample.py", *args, cwd=work, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_a_missing_prompt_file_is_named(runs):
    assert "there is no file gone.txt" in script(
        "sample.py", "--start=FILE:gone.txt", cwd=runs, check=False).stderr
