import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_file
from conftest import documents, run, write_nanogpt
from model import GPT, GPTConfig
from onecard import checkpoint
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT, GPT2Tokenizer
from test_tokenizers import write_letters

CPU = ["--device=cpu", "--dtype=float32"]
TEXTS = documents(12, longest=20) + ["", "naïve Zürich", "東京 🙂"]
IDS = [np.array([END_OF_TEXT, *GPT2Tokenizer().encode(text)], np.uint16) for text in TEXTS]


def write_run(folder, kind=GPT, scale=4, dataset="texts", vocab_size=50304, block_size=16):
    """A run whose model is not trained but has opinions; returns the model."""
    torch.manual_seed(len(folder))
    config = GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    Path(folder).mkdir()
    checkpoint.save(Path(folder) / "ckpt.pt", {
        "model": model.state_dict(), "model_args": config.model_args(), "iter_num": 7,
        "config": {"dataset": dataset}})
    return model


@pytest.fixture
def evaluated(work, capsys):
    """What `eval.py --json` prints, on data/texts, which has TEXTS, or on three characters."""
    write_nanogpt(work / "data" / "texts", np.concatenate(IDS))
    write_nanogpt(work / "data" / "chars", np.arange(200) % 3)
    write_letters(work / "data" / "chars", "aéb")

    def evaluate(*args):
        run(eval_file, *CPU, "--json", *args)
        return json.loads(capsys.readouterr().out)
    return evaluate


@torch.inference_mode()
def naive_loss(model, ids, stride):
    """-log p of a document, a token at a time, with what eval.py's docstring lets it see."""
    T, ids, total = model.config.block_size, ids.astype(np.int64), 0.0
    for target in range(1, len(ids)):
        begin = 0
        if target > T:                  # the first of the further windows that reaches it
            begin = min(math.ceil((target - T) / stride) * stride, len(ids) - 1 - T)
        logits = model(torch.from_numpy(ids[None, begin:target]))[0, -1]
        total -= logits.double().log_softmax(0)[ids[target]].item()
    return total


class SmallMemory(GPT):
    """A GPT on a device that has no memory for more than four windows."""

    def hidden(self, idx, cache=None):
        if idx.numel() > 4 * self.config.block_size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")
        return super().hidden(idx, cache)


@pytest.mark.parametrize("kind, stride, batch_size, message", [
    (GPT, 1, 3, ""), (GPT, 40, 64, ""),
    (SmallMemory, 5, 9, "out of memory: batch_size is 4 now\n")])
def test_every_token_counts_once_in_any_memory(work, capsys, kind, stride, batch_size, message):
    model, rng = write_run("out", kind, vocab_size=64, block_size=40), np.random.default_rng(0)
    documents = [rng.integers(64, size=n + 1) for n in (0, 1, 39, 40, 41, 100)]
    losses = eval_file.document_losses(model, documents, stride, batch_size)
    assert losses == pytest.approx([naive_loss(model, d, stride) for d in documents], rel=1e-5)
    assert capsys.readouterr() == ("", message)


def test_bits_per_byte_are_those_of_a_count_by_hand(evaluated):
    write_run("out", scale=0)           # each of 50,304 ids has the same probability
    result = evaluated()
    n_tokens, n_bytes = sum(map(len, IDS)) - 15, sum(len(text.encode()) for text in TEXTS)
    assert (result["documents"], result["tokens"], result["bytes"]) == (15, n_tokens, n_bytes)
    assert result["loss"] == pytest.approx(math.log(50304), rel=1e-6)
    assert result["perplexity"] == pytest.approx(50304, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(n_tokens * math.log2(50304) / n_bytes, rel=1e-6)


def test_the_first_character_has_nothing_before_it_and_does_not_count(evaluated):
    write_run("out", dataset="chars", vocab_size=3)
    result = evaluated("--stride=99")                       # more than the context
    assert (result["documents"], result["tokens"], result["bytes"]) == (1, 199, 199 + 67)
    assert result["loss_se"] is None and result["stride"] == 16


def test_the_standard_error_is_that_of_documents_drawn_again():
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 2000, 4000).astype(float)
    nats = n_tokens * (3 + rng.normal(0, 0.5, 4000))
    mean, error = eval_file.ratio(nats, n_tokens)
    draws = [rng.integers(4000, size=4000) for _ in range(1000)]
    means = [nats[draw].sum() / n_tokens[draw].sum() for draw in draws]
    assert error == pytest.approx(np.std(means), rel=0.1) and mean == pytest.approx(3, abs=0.05)


def test_two_models_are_compared_document_by_document(evaluated, capsys):
    models = write_run("out-a"), write_run("out-bb")
    nats_a, nats_b = [eval_file.document_losses(model, IDS[:10], 8, 16) for model in models]
    args = "--compare", "out-a", "out-bb", "--max_documents=10"
    result = evaluated(*args)
    a, b, paired = result["a"], result["b"], result["b_minus_a"]
    n_tokens = np.array([len(ids) - 1 for ids in IDS[:10]])
    rest = nats_b - nats_a - paired["loss"] * n_tokens      # Cochran 1977, 2.46
    assert paired["loss_se"] == pytest.approx(math.sqrt(10 / 9 * rest @ rest) / n_tokens.sum())
    run(eval_file, *CPU, *args)
    printed = capsys.readouterr().out
    for line in ("data/texts val: 10 documents", "out-a/ckpt.pt, step 7: context 16, stride 8",
                 f"loss           {a['loss']:.4f} +- {a['loss_se']:.4f} nats a token",
                 f"bits per byte  {b['bits_per_byte']:.4f} +- ",
                 f"second - first: {b['loss'] - a['loss']:.4f} +- "):
        assert line in printed


@pytest.mark.parametrize("args, sentence", [
    (["--compare", "out"], "only --compare takes models, and two of them: --compare out-a out-b"),
    (["--compare", "out", "out-chars"], "out-chars/ckpt.pt, step 7 has another vocabulary than"),
    (["--compare", "out-none", "out-chars"], "out-none/ckpt.pt, step 7 has another vocabulary than"
     " data/chars"),                                    # the first of the two that has a dataset
    (["--out_dir=out-small"], "its 64 ids are neither GPT-2's nor"),
    (["--out_dir=out", "--dataset=bare"], "holds token 50300, but the model knows"),
    (["--out_dir=out-chars", "--dataset=other"], "has another vocabulary than data/other"),
    (["--out_dir=out-chars", "--dataset=bare"], "has another vocabulary than data/bare"),
    (["--out_dir=out", "--dataset=empty"], "data/empty val has no document with a token to")])
def test_mistakes_get_one_sentence(evaluated, args, sentence):
    write_run("out")
    write_run("out-chars", dataset="chars", vocab_size=3)
    write_run("out-small", vocab_size=64)
    write_run("out-none", dataset="")
    write_nanogpt(Path("data/bare"), [END_OF_TEXT, 50300, 7])
    write_nanogpt(Path("data/empty"), [END_OF_TEXT] * 3)
    write_nanogpt(Path("data/other"), np.arange(200) % 3)
    write_letters(Path("data/other"), "xyz")
    with pytest.raises(UserError) as error:
        evaluated(*args)
    assert sentence in str(error.value)


def test_a_dataset_may_be_any_prepared_folder(evaluated):
    Path("data/texts").rename("elsewhere")
    write_run("out", dataset=str(Path("elsewhere").resolve()))
    assert evaluated()["loss"] == evaluated("--dataset=elsewhere")["loss"]


def test_a_model_that_knows_nothing_has_a_perplexity(evaluated):
    write_run("out", scale=300)
    result = evaluated()
    assert result["loss"] > 710 and math.isfinite(result["perplexity"])
