import json
import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import checkpoint
import eval as eval_file
import loader
from conftest import documents, script, write_nanogpt, write_parquet
from model import GPT, GPTConfig
from tokenizer import GPT2Tokenizer

SHAPE = dict(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
CPU = ["--device=cpu", "--dtype=float32"]


def a_run(folder, seed=0, dataset="tiny", **shape):
    """A run folder with a model of its own opinions; returns the model."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **shape})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    folder.mkdir()
    checkpoint.save({"model": model.state_dict(), "iter_num": 7, "config": {"dataset": dataset},
                     "model_args": {**SHAPE, **shape}}, folder / "ckpt.pt")
    return model


def naive_losses(model, data, stride):
    """-log p summed over each document, a token at a time, with what the docstring lets it see."""
    T, found = model.config.block_size, []
    for a, b in zip(data.starts[:-1], data.starts[1:], strict=True):
        ids = data.tokens[int(a):int(b)].astype(np.int64)
        total = 0.0
        for place in range(1, len(ids)):
            # the window that counts this one: the first, or one of those that move on by stride
            moves = max(-(-(place - T) // stride), 0)
            end = min(T + moves * stride, len(ids) - 1)
            begin = end - T if moves else 0
            logits = model(torch.from_numpy(ids[None, begin:place]))[0, -1]
            total -= F.log_softmax(logits.double(), -1)[ids[place]].item()
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize("stride, B", [(1, 3), (5, 1), (8, 4), (16, 64)])
def test_every_token_counts_once_and_sees_what_was_promised(tiny, stride, B):
    model = a_run(tiny / "out")
    data = loader.Dataset("data/tiny", "val", 1, 50304)
    n = min(data.n_documents, 6)
    data.starts = data.starts[:n + 1]
    longest = int(np.diff(data.starts).max())
    assert longest > 3 * 16
    found = eval_file.document_losses(model, data, n, stride, B, torch.device("cpu"),
                                      nullcontext())
    with torch.inference_mode():
        assert found == pytest.approx(naive_losses(model, data, stride), rel=1e-5)


@pytest.mark.parametrize("n, block_size, stride", [
    (1, 8, 4), (8, 8, 4), (9, 8, 4), (100, 8, 1), (100, 8, 8), (101, 8, 3)])
def test_windows_count_every_target_once(n, block_size, stride):
    counted = []
    for begin, end, first in eval_file.windows(n, block_size, stride):
        assert 0 <= begin <= first < end <= n and end - begin <= block_size
        assert begin == 0 or end - begin == block_size      # as much context as there is
        counted += range(first, end)
    assert counted == list(range(n))


def test_bits_per_byte_of_three_documents_by_hand(work):
    """With a head of zeros each token has ln V nats, so bits per byte are a count of tokens."""
    texts = ["naïve Zürich", "東京 🙂 Привет", "plain words"]
    assert [len(t.encode()) for t in texts] == [14, 24, 11]
    write_parquet("three.parquet", texts + documents(50))
    write_parquet("val.parquet", texts)
    script("prepare.py", "three.parquet", "--val=val.parquet", "--dataset=three", "--num_proc=1",
           cwd=work)
    model = a_run(work / "out", dataset="three")
    parts = checkpoint.load("out/ckpt.pt")
    parts["model"] = {k: torch.zeros_like(w) for k, w in model.state_dict().items()}
    checkpoint.save(parts, "out/ckpt.pt")
    told = json.loads(script("eval.py", "--json", *CPU, cwd=work).stdout)
    n_tokens = sum(len(GPT2Tokenizer().encode(t)) for t in texts)
    assert (told["documents"], told["tokens"], told["bytes"]) == (3, n_tokens, 49)
    assert told["loss"] == pytest.approx(math.log(50304), rel=1e-6)
    assert told["perplexity"] == pytest.approx(50304, rel=1e-5)
    assert told["bits_per_byte"] == pytest.approx(n_tokens * math.log2(50304) / 49, rel=1e-6)


def test_bytes_are_those_of_the_original_text(prepared):
    data = loader.Dataset(prepared / "data" / "tiny", "train", 1, 50304)
    n_tokens, n_bytes = eval_file.document_sizes(data, GPT2Tokenizer(), data.n_documents)
    assert n_bytes.sum() == data.text_bytes and n_tokens.sum() == data.n_tokens - data.n_documents


def test_the_standard_error_is_that_of_documents_drawn_anew():
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 2000, 4000).astype(float)
    nats = n_tokens * (3 + rng.normal(0, 0.5, 4000))
    mean, error = eval_file.ratio(nats, n_tokens)
    drawn = [rng.integers(4000, size=4000) for _ in range(1000)]
    means = [nats[i].sum() / n_tokens[i].sum() for i in drawn]
    assert error == pytest.approx(np.std(means), rel=0.1) and mean == pytest.approx(3, abs=0.05)
    assert eval_file.ratio(nats[:1], n_tokens[:1])[1] is None


def test_what_is_printed_is_what_json_says(tiny):
    a_run(tiny / "out")
    done = script("eval.py", "--out_dir=out", *CPU, cwd=tiny)
    told = json.loads(script("eval.py", "--json", *CPU, cwd=tiny).stdout)
    meta = json.loads((tiny / "data" / "tiny" / "meta.json").read_text())["splits"]["val"]
    assert told["documents"] == meta["documents"] and told["bytes"] == meta["text_bytes"]
    assert f"loss           {told['loss']:.4f} +- {told['loss_se']:.4f} nats a token" in done.stdout
    assert f"bits per byte  {told['bits_per_byte']:.4f}" in done.stdout
    assert "out/ckpt.pt, step 7: context 16, stride 8" in done.stdout
    by_length = [part for _, part in told["by_length"]]
    for what in ("documents", "tokens", "bytes"):
        assert sum(part[what] for part in by_length) == told[what]
    assert len(re.findall(r"^    \d[\d,]* to ", done.stdout, re.M)) == len(by_length) >= 2


def test_two_models_are_compared_document_by_document(tiny):
    """The difference of the means, with the error of the difference and not of the means."""
    one = a_run(tiny / "out-a")
    with torch.no_grad():
        one.transformer.ln_f.weight.mul_(0.9)
    checkpoint.save({**checkpoint.load("out-a/ckpt.pt"), "model": one.state_dict(), "iter_num": 9},
                    "out-a/best.pt")
    both, few = ["out-a/ckpt.pt", "out-a/best.pt"], [*CPU, "--max_documents=10"]
    told = json.loads(script("eval.py", "--compare", *both, "--json", *few, cwd=tiny).stdout)
    a, b, paired = told["a"], told["b"], told["b_minus_a"]
    assert paired["loss"] == pytest.approx(b["loss"] - a["loss"], abs=1e-6)
    assert paired["bits_per_byte"] == pytest.approx(b["bits_per_byte"] - a["bits_per_byte"],
                                                    abs=1e-6)
    assert paired["loss"] < 0 and paired["loss_se"] < a["loss_se"] / 2
    done = script("eval.py", "--compare", *both, *few, cwd=tiny)
    assert f"second - first: {paired['loss']:.4f} +- {paired['loss_se']:.4f} nats" in done.stdout
    same = json.loads(script("eval.py", "--compare", both[0], "out-a/ckpt.pt", "--json", *few,
                             cwd=tiny).stdout)["b_minus_a"]
    assert same["loss"] == same["loss_se"] == same["documents_lower"] == 0


def test_characters_and_files_of_nanogpt_are_evaluated_too(work):
    """Without an end-of-text token the first one has nothing before it, and does not count."""
    import pickle
    folder = write_nanogpt(work / "data" / "chars", np.arange(200) % 3)
    with open(folder / "meta.pkl", "wb") as f:
        pickle.dump({"vocab_size": 3, "stoi": {"a": 0, "é": 1, "b": 2},
                     "itos": {0: "a", 1: "é", 2: "b"}}, f)
    a_run(work / "out", dataset="chars", vocab_size=3)
    told = json.loads(script("eval.py", "--json", *CPU, cwd=work).stdout)
    assert (told["documents"], told["tokens"], told["bytes"]) == (1, 199, 199 + 67)
    assert told["loss_se"] is None


def test_memory_that_runs_out_halves_the_batch_and_changes_no_number(tiny, monkeypatch, capfd):
    model = a_run(tiny / "out")
    data = loader.Dataset("data/tiny", "val", 1, 50304)
    whole = eval_file.document_losses(model, data, 5, 8, 16, torch.device("cpu"), nullcontext())
    token_losses, sizes = eval_file.token_losses, []

    def with_little_memory(model, idx, targets):
        if idx.numel() > 4 * 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")
        sizes.append(idx.numel())
        return token_losses(model, idx, targets)
    monkeypatch.setattr(eval_file, "token_losses", with_little_memory)
    less = eval_file.document_losses(model, data, 5, 8, 16, torch.device("cpu"), nullcontext())
    assert less == pytest.approx(whole, rel=1e-6) and max(sizes) <= 4 * 16
    said = capfd.readouterr()
    assert "going on with 4 windows at a time" in said.err and not said.out


@pytest.mark.parametrize("arguments, sentence", [
    (["--compare", "out"], "--compare takes two models, not 1: `python eval.py --compare"),
    (["out"], "out: --out_dir=out evaluates that run, --compare A B compares two"),
    (["--split=test"], "split = 'test'; use val or train"),
    (["--out_dir=out", "--stride=17"], "is 16. Nearest that works: --stride=16"),
    (["--out_dir=out", "--dataset=nothing"], "run `python prepare.py` to make it"),
    (["--out_dir=nowhere"], "nowhere holds no ckpt.pt or best.pt"),
    (["--compare", "out", "out-b"], "were trained on letters and tiny; --dataset=NAME says")])
def test_mistakes_get_one_sentence(tiny, arguments, sentence):
    a_run(tiny / "out")
    a_run(tiny / "out-b", dataset="letters")
    done = script("eval.py", *arguments, *CPU, cwd=tiny, check=False)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
