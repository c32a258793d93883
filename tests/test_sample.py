import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import checkpoint
import sample
from conftest import PROJECT, script, write_nanogpt
from model import GPT, GPTConfig
from sample import Dice, SampleConfig, generate, lay_out_for_few, pick, show
from tokenizer import GPT2Tokenizer


def small(block_size=32, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=320, n_layer=2, n_head=4,
                          n_embd=64)).eval()
    with torch.no_grad():                           # opinions, so that the likeliest token varies
        for p in model.transformer.h.parameters():
            p.mul_(8)
    return model


def asked(**settings):
    return SampleConfig(**{"temperature": 1.0, "top_k": 0, **settings})


def greedy(logits, context):
    return pick(logits, context, None, asked(temperature=0.0), 320)


@pytest.mark.parametrize("prompt", [1, 7, 32, 45])
@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(top_k=50, top_p=0.9, min_p=0.01),
                                      dict(temperature=0.0, repetition_penalty=1.3)])
def test_cached_sampling_is_uncached_sampling(prompt, settings):
    model, idx = small(), torch.randint(320, (2, prompt))
    written = []
    for use_cache in (True, False):
        dice = Dice([1, 2], idx.device)
        written.append(torch.cat(list(generate(model, idx, 70, lambda *seen, dice=dice: pick(
            *seen, dice.throw(), asked(**settings), 320), use_cache)), dim=1))
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


def naive_distribution(logits, context, cfg, n_vocab):
    """{id: probability} by the letter, for one row."""
    logits = logits[:n_vocab].double().tolist()
    for i in set(context):
        logits[i] *= cfg.repetition_penalty if logits[i] < 0 else 1 / cfg.repetition_penalty
    p = F.softmax(torch.tensor(logits) / cfg.temperature, -1).tolist()
    ranked = sorted(range(n_vocab), key=lambda i: -p[i])[:cfg.top_k or None]
    total, kept = 0.0, []
    for i in ranked:
        if total < cfg.top_p * sum(p[j] for j in ranked):
            kept.append(i)
        total += p[i]
    kept = [i for i in kept if p[i] >= cfg.min_p * p[ranked[0]]]
    return {i: p[i] / sum(p[j] for j in kept) for i in kept}


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0.7, top_k=5), dict(top_p=0.6), dict(temperature=1.3, top_k=8,
    top_p=0.8), dict(top_k=1), dict(top_p=1e-9), dict(min_p=0.2), dict(min_p=1.0),
    dict(temperature=0.5, top_k=10, top_p=0.9, min_p=0.1), dict(repetition_penalty=1.5),
    dict(repetition_penalty=2.0, top_k=4, temperature=2.0)])
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_mean(settings):
    torch.manual_seed(0)
    logits, n, cfg = torch.randn(24) * 2, 20000, asked(**settings)
    context = [3, 3, 7, int(logits[:20].argmax()), int(logits[:20].argmin())]
    wanted = naive_distribution(logits, context, cfg, 20)
    drawn = pick(logits.expand(n, -1), torch.tensor(context).expand(n, -1), torch.rand(n, 1), cfg,
                 20).flatten()
    counts = torch.bincount(drawn, minlength=24)
    assert set(drawn.unique().tolist()) <= set(wanted)
    for i, p in wanted.items():
        assert counts[i] / n == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5 + 10 / n)


@pytest.mark.parametrize("settings", [dict(), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.3)])
def test_no_number_draws_what_has_no_probability(settings):
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf, 0.0, -1.0, -torch.inf]] * 3)
    u = torch.tensor([[0.0], [0.5], [1 - 2**-24]])          # the ends of what torch.rand gives
    drawn = pick(logits, torch.zeros(3, 1, dtype=torch.long), u, asked(**settings), 7)
    assert set(drawn.flatten().tolist()) <= {1, 2, 4, 5}


def test_the_likeliest_token_is_another_one_where_repeating_is_penalised():
    logits, context = torch.tensor([[3.0, 2.5, -1.0]]), torch.tensor([[0, 0, 2]])
    for penalty, likeliest in ((1.0, 0), (1.1, 0), (1.3, 1)):
        cfg = asked(temperature=0.0, repetition_penalty=penalty)
        assert pick(logits, context, None, cfg, 3).item() == likeliest
        # below 0 a penalty must not bring a token nearer to 0
        below = torch.tensor([[-1.0, -1.2, -9.0]])
        assert pick(below, context, None, cfg, 3).item() == likeliest


def test_matrices_laid_out_for_few_rows_are_the_same_matrices():
    model, idx = small(), torch.randint(320, (2, 9))
    before, logits = {k: w.clone() for k, w in model.state_dict().items()}, model(idx)
    lay_out_for_few(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.stride() == (1, 320)
    assert all(torch.equal(w, before[k]) for k, w in model.state_dict().items())
    assert torch.allclose(model(idx), logits, atol=1e-4)


def test_rows_that_pad_the_vocabulary_never_win():
    logits = torch.zeros(500, 64)
    logits[:, 60:] = 100.0
    for temperature in (0, 1.0):
        cfg = asked(temperature=float(temperature))
        assert pick(logits, torch.zeros(500, 1, dtype=torch.long), torch.rand(500, 1), cfg,
                    60).max() < 60


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


def test_a_sample_is_the_same_whichever_are_written_with_it(runs):
    args = ["--max_new_tokens=20", "--device=cpu", "--dtype=float32"]

    def written(*more):
        return script("sample.py", *args, *more, cwd=runs).stdout
    four = written("--num_samples=4")
    assert written("--num_samples=4", "--batch_size=3") == four
    assert four.startswith(written("--num_samples=2").rstrip("\n"))
    second = four.split("---- sample 2 ----\n")[1].split("\n---- sample 3")[0]
    assert written("--num_samples=1", "--seed=1338").endswith(f"---- sample 1 ----\n{second}\n")


def ids_of(text):
    return GPT2Tokenizer().encode(text).tolist()


def test_samples_are_printed_in_their_order_and_each_ends_at_its_end_of_text(capsys):
    end = 50256
    rows = [ids_of(" one two three four"), [*ids_of(" five"), end, *ids_of(" no no")],
            [end] + ids_of(" no no no"), ids_of(" six seven eight nine")]
    tokens, printed = [torch.tensor(step)[:, None] for step in zip(*rows, strict=True)], []

    def coming():
        for token in tokens:
            yield token
            printed.append(capsys.readouterr().out)
    texts, n_tokens = show(coming(), ["A:", "B:", "C:", "D:"], GPT2Tokenizer())
    assert texts == [" one two three four", " five", "", " six seven eight nine"]
    assert n_tokens == 9
    assert printed == ["A: one", " two", " three", " four"]         # as they come
    assert capsys.readouterr().out == "\nB: five\nC:\nD: six seven eight nine\n"
    show(iter([torch.tensor([[end], [end]])] * 3), ["A:", "B:"], GPT2Tokenizer())
    assert capsys.readouterr().out == "A:\nB:\n"


def test_each_line_of_a_file_is_continued(runs):
    (runs / "p.txt").write_text("The sea\n\nOnce upon\n", encoding="utf-8")
    told = script("sample.py", "--prompts=p.txt", "--num_samples=2", "--max_new_tokens=4",
                  "--device=cpu", cwd=runs).stdout
    for heading in ("prompt 1, sample 1 ----\nThe sea", "prompt 1, sample 2 ----\nThe sea",
                    "prompt 2, sample 1 ----\nOnce upon", "prompt 2, sample 2 ----\nOnce upon"):
        assert told.count(f"---- {heading}") == 1
    alone = script("sample.py", "--start=Once upon", "--num_samples=2", "--max_new_tokens=4",
                   "--device=cpu", cwd=runs).stdout
    assert told.endswith(alone.split("\n", 1)[1].replace("---- sample", "---- prompt 2, sample"))


def test_interactive_goes_on_after_ctrl_c_and_ends_with_the_input(runs):
    process = subprocess.Popen(
        [sys.executable, "-u", str(PROJECT / "sample.py"), "--interactive", "--device=cpu",
         "--max_new_tokens=100000"], cwd=runs, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,             # a shell's background jobs ignore Ctrl-C; this does not
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    told, watchdog = "", threading.Timer(100, process.kill)
    watchdog.start()

    def read_until(words):
        nonlocal told
        while words not in told:
            told += (byte := process.stdout.read(1)).decode("latin-1")
            assert byte, told + process.stderr.read().decode()
        before, told = told.split(words, 1)
        return before

    def type_in(text):
        process.stdin.write(text.encode())
        process.stdin.flush()
    read_until("\n> ")
    type_in("The sea\n")
    read_until("The sea")
    process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    first = read_until("\n> ")
    assert process.poll() is None
    type_in("\n")                           # goes on with the text so far
    assert read_until("The sea") == ""
    process.stdout.read(len(first))         # which is read again, then more comes
    process.send_signal(signal.SIGINT)
    read_until("\n> ")
    time.sleep(0.5)                         # until it waits for input
    process.send_signal(signal.SIGINT)
    read_until("\n> ")
    rest, errors = process.communicate()
    watchdog.cancel()
    assert process.returncode == 0 and b"Traceback" not in errors + rest, errors


def test_a_growing_cache_needs_no_plan_of_cudnn_for_each_length(runs, monkeypatch):
    done = []

    def nothing(*_):
        done.append("generate")
        return iter(())

    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", done.append)
    monkeypatch.setattr("sample.generate", nothing)
    sample.main(SampleConfig(num_samples=1, device="cpu"))
    assert done == [False, "generate"]


def test_memory_that_runs_out_is_one_sentence(runs, monkeypatch):
    monkeypatch.setattr("sample.KVCache", lambda *a: (_ for _ in ()).throw(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")))
    with pytest.raises(ValueError, match="out of memory with 8 continuations at a time; "
                                         "nearest that may fit: --batch_size=4"):
        sample.main(SampleConfig(num_samples=8, device="cpu"))


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
    (["--temperature=-1"], "temperature = -1 and top_k = 200 must not be negative"),
    (["--num_samples=0"], "num_samples = 0 must be at least 1"),
    (["--min_p=2"], "min_p = 2 from 0 to 1"),
    (["--repetition_penalty=0"], "repetition_penalty = 0 must be above 0; 1 is none"),
    (["--prompts=p.txt", "--start=a"], "each say what to continue; give one"),
    (["--interactive", "--start=a"], "each say what to continue; give one"),
    (["--prompts=gone.txt"], "prompts = 'gone.txt': there is no file gone.txt"),
])
def test_mistakes_are_named(work, args, words):
    done = script("sample.py", *args, cwd=work, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_a_prompt_file_that_cannot_be_used_is_named(runs):
    (runs / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (runs / "empty.txt").write_text("\n \n")
    for args, words in (
            ("--start=FILE:gone.txt", "there is no file gone.txt"),
            ("--start=FILE:latin.txt", "latin.txt is not UTF-8 text (invalid start byte at"),
            ("--prompts=empty.txt", "every line of it is empty")):
        assert words in script("sample.py", args, cwd=runs, check=False).stderr
