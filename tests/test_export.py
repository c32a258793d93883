import functools
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint
import eval as eval_file
import export
import loader
import pretrained
from configurator import configure
from conftest import documents, script, write_nanogpt
from test_eval import CPU, a_run
from tokenizer import GPT2Tokenizer

transformers = pytest.importorskip("transformers")

# what somebody has who knows transformers and not us
STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
losses = []
for text in texts:
    ids = torch.tensor([tokenizer("<|endoftext|>" + text)["input_ids"]])
    losses.append(model(ids, labels=ids).loss.item() * (ids.size(1) - 1))
end = tokenizer("<|endoftext|>", return_tensors="pt")["input_ids"]
greedy = model.generate(end, attention_mask=torch.ones_like(end), max_new_tokens=20,
                        do_sample=False, eos_token_id=None, pad_token_id=0)
print(json.dumps({"class": type(model).__name__, "losses": losses, "greedy": greedy[0].tolist()}))
"""
KINDS = [dict(bias=False), dict(bias=True), dict(block="modern", bias=False)]

FEW_WORDS = ["a", "b", "ab"], [("a", "b")]      # where a test is not about the vocabulary

VOCABULARY = functools.cache(export.vocabulary_and_merges)


@pytest.fixture(autouse=True)
def spelled_once(monkeypatch):
    """Work out once what takes a second: the spelling of all tokens, and their merges."""
    monkeypatch.setattr(export, "vocabulary_and_merges", VOCABULARY)


def text_of(data, k):
    ids = data.tokens[int(data.starts[k]) + 1:int(data.starts[k + 1])]
    return GPT2Tokenizer().decode_bytes(ids).decode()


def evaluated(capsys, *arguments):
    """What `python eval.py --json` prints, in this process, which has transformers loaded."""
    capsys.readouterr()
    eval_file.main(configure(eval_file.EvalConfig, ["--json", *CPU, *arguments]))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind, name", [(KINDS[0], "GPT2LMHeadModel"),
                                        (KINDS[2], "Qwen3ForCausalLM")])
def test_a_stranger_with_transformers_gets_the_same_losses_and_words(tiny, capsys, kind, name):
    model = a_run(tiny / "out", block_size=256, **kind)
    done = script("export.py", "--to=hf", cwd=tiny)
    assert f"opened again as {name}: logits differ by" in done.stdout and not done.stderr
    told = evaluated(capsys)
    data = loader.Dataset("data/tiny", "val", 1, 50304)
    texts = [text_of(data, k) for k in range(data.n_documents)]
    plain = [t for t in texts if "<|endoftext|>" not in t]      # which there is a token, not text
    asked = json.dumps(plain)
    found = json.loads(subprocess.run([sys.executable, "-c", STRANGER, "hf", asked], cwd=tiny,
                                      check=True, capture_output=True, text=True).stdout)
    assert found["class"] == name
    with torch.inference_mode():
        for text, loss in zip(plain, found["losses"], strict=True):
            ids = torch.tensor([[50256, *GPT2Tokenizer().encode(text).tolist()]])
            ours = model(ids[:, :-1], ids[:, 1:]).item() * (ids.size(1) - 1)
            assert loss == pytest.approx(ours, rel=1e-4)
        idx = torch.tensor([[50256]])
        for _ in range(20):
            idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], 1)
    assert found["greedy"] == idx[0].tolist()
    if len(plain) == len(texts):
        assert sum(found["losses"]) / told["tokens"] == pytest.approx(told["loss"], rel=1e-4)


def test_eval_of_the_folder_is_eval_of_the_run(tiny, capsys):
    """And a folder trains and samples as a run does."""
    a_run(tiny / "out", block="modern")
    export.main(export.ExportConfig(to="hf"))
    few = "--max_documents=8"
    one, other = (evaluated(capsys, few, *more)
                  for more in ((), ("--dataset=tiny", "--init_from=hf")))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5) and other["model"] == "hf"
    paired = evaluated(capsys, few, "--compare", "out", "hf")["b_minus_a"]
    assert abs(paired["loss"]) < 1e-5
    script("sample.py", "--init_from=hf", "--max_new_tokens=3", *CPU, cwd=tiny)
    done = script("train.py", "--init_from=hf", "--dataset=tiny", "--out_dir=out-more",
                  "--max_iters=1", "--warmup_iters=0", "--lr_decay_iters=2", "--batch_size=1",
                  "--block_size=16", "--gradient_accumulation_steps=1", "--eval_iters=2",
                  "--compile=False", *CPU, cwd=tiny)
    assert "finished at step 1" in done.stdout
    assert checkpoint.load(tiny / "out-more/ckpt.pt")["model_args"]["block"] == "modern"


def test_the_tokenizer_agrees_with_tiktoken_on_a_million_tokens():
    theirs, ours, n = export.make_tokenizer(1024), GPT2Tokenizer(), 0
    for seed in range(45):
        text = "\n".join(documents(250, seed)).replace("<|endoftext|>", "<|end|>")
        ids = ours.encode(text).tolist()
        assert theirs(text, verbose=False)["input_ids"] == ids
        n += len(ids)
        assert theirs.decode(ids) == text
    assert n > 1_000_000
    # every token of the vocabulary, and every letter that words are cut by
    text = "".join(f"a{chr(c)}'s " for c in range(0x20, 0x3400) if not 0xD800 <= c < 0xE000)
    assert theirs(text, verbose=False)["input_ids"] == ours.encode(text).tolist()
    assert len(theirs) == 50257 and theirs.eos_token_id == theirs.bos_token_id == 50256


def test_a_tokenizer_or_a_model_that_differs_is_not_written(tiny, monkeypatch):
    a_run(tiny / "out")
    make_tokenizer, to_transformers = export.make_tokenizer, pretrained.to_transformers
    cfg = export.ExportConfig(to="hf")

    def without_a_merge(block_size):
        tokens, merges = VOCABULARY()
        monkeypatch.setattr(export, "vocabulary_and_merges", lambda: (tokens, merges[20:]))
        return make_tokenizer(block_size)

    def other_weights(model):
        twin = to_transformers(model)
        with torch.no_grad():
            twin.transformer.ln_f.weight[0] += 0.1
        return twin
    with monkeypatch.context() as m:
        m.setattr(export, "make_tokenizer", without_a_merge)
        with pytest.raises(ValueError, match="cuts a document of data/tiny differently.*nothing"):
            export.main(cfg)
        m.undo()
    with monkeypatch.context() as m:
        m.setattr(pretrained, "to_transformers", other_weights)
        m.setattr(export, "vocabulary_and_merges", lambda: FEW_WORDS)
        for format in ("hf", "gguf"):
            with pytest.raises(ValueError, match="gives other logits.*nothing is written"):
                export.main(export.ExportConfig(to="hf", format=format))
    assert sorted(p.name for p in tiny.iterdir()) == ["data", "out"]


def test_an_export_is_replaced_when_asked_and_nothing_else_is(tiny):
    a_run(tiny / "out")
    export.main(export.ExportConfig())
    before = (tiny / "out/export/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out/export exists already; --overwrite replaces"):
        export.main(export.ExportConfig())
    a_run(tiny / "out-b", seed=1)
    export.main(export.ExportConfig(out_dir="out-b", to="out/export", overwrite=True))
    assert (tiny / "out/export/model.safetensors").read_bytes() != before
    (tiny / "mine").mkdir()
    (tiny / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine exists already and holds no export"):
        export.main(export.ExportConfig(to="mine", overwrite=True))
    assert (tiny / "mine/thesis.txt").read_text() == "years of work"
    assert not list(tiny.glob("**/*.new"))


def test_the_card_says_what_the_run_was_and_what_it_scored(tiny, capsys):
    a_run(tiny / "out")
    parts = checkpoint.load("out/ckpt.pt")
    checkpoint.save({**parts, "best_val_loss": 4.25, "tokens_per_step": 500_000}, "out/ckpt.pt")
    (tiny / "out/loss.png").write_bytes(b"a picture")
    told = evaluated(capsys)
    export.main(export.ExportConfig(to="hf"))
    words = (tiny / "hf/README.md").read_text(encoding="utf-8")
    assert "7 steps, 3.5 M tokens, on `tiny`" in words and "4.2500 nats" in words
    scores = f"{told['loss']:.4f} | {told['perplexity']:.2f} | {told['bits_per_byte']:.4f}"
    assert f"| {scores} |" in words
    assert "![Loss](loss.png)" in words and (tiny / "hf/loss.png").read_bytes() == b"a picture"


@pytest.mark.parametrize("kind", [*KINDS, dict(block="modern", n_kv_head=1, rope_theta=500.0)])
def test_a_gguf_file_holds_the_model(tiny, capsys, monkeypatch, kind):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(export, "vocabulary_and_merges", lambda: FEW_WORDS)
    model = a_run(tiny / "out", n_embd=64, vocab_size=320, **kind)
    export.main(export.ExportConfig(to="my-gpt", format="gguf"))
    said = capsys.readouterr().out
    assert "every bit as in the model" in said
    assert "ollama create my-gpt -f my-gpt/Modelfile" in said
    assert "FROM ./model.gguf" in (tiny / "my-gpt/Modelfile").read_text()
    reader = gguf.GGUFReader(tiny / "my-gpt/model.gguf")
    told = {key: field.contents() for key, field in reader.fields.items()}
    kind = told["general.architecture"]
    assert kind == ("qwen3" if model.config.block == "modern" else "gpt2")
    assert told[f"{kind}.context_length"] == 16 and told[f"{kind}.block_count"] == 2
    assert told[f"{kind}.attention.head_count"] == 2
    assert told[f"{kind}.attention.head_count_kv"] == model.config.n_kv_head
    if kind == "qwen3":
        assert told["qwen3.rope.freq_base"] == model.config.rope_theta
    stored = {t.name: np.asarray(t.data) for t in reader.tensors}
    block, C = model.transformer.h[1], 64
    if kind == "qwen3":
        k = block.attn.c_attn.weight[C:C + model.config.n_kv_head * 32]
        assert np.array_equal(stored["blk.1.attn_k.weight"], k.detach().numpy())
        gate = block.mlp.c_fc.weight.chunk(2)[0].detach().numpy()
        assert np.array_equal(stored["blk.1.ffn_gate.weight"], gate)
    else:
        assert np.array_equal(stored["blk.1.attn_qkv.weight"],
                              block.attn.c_attn.weight.detach().numpy())
        assert stored["blk.1.attn_qkv.bias"].shape == (3 * C,) and "output.weight" not in stored


def test_a_gguf_file_holds_the_vocabulary(tiny):
    gguf = pytest.importorskip("gguf")
    a_run(tiny / "out")
    export.main(export.ExportConfig(to="my-gpt", format="gguf"))
    told = {key: field.contents()
            for key, field in gguf.GGUFReader(tiny / "my-gpt/model.gguf").fields.items()}
    tokens, spell = told["tokenizer.ggml.tokens"], export.letters()
    assert len(tokens) == 50304 and tokens[50256] == "<|endoftext|>"
    decode = GPT2Tokenizer().decode_bytes
    assert all(tokens[i] == "".join(spell[b] for b in decode([i])) for i in range(0, 50256, 97))
    assert len(told["tokenizer.ggml.merges"]) == 50000
    assert told["tokenizer.ggml.bos_token_id"] == told["tokenizer.ggml.eos_token_id"] == 50256


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_continues_as_the_model_does(tiny, kind):
    """Needs `pip install llama-cpp-python`, which compiles for some minutes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = a_run(tiny / "out", block_size=128, n_embd=64, n_head=2, **kind)
    export.main(export.ExportConfig(to="gguf", format="gguf"))
    llama = llama_cpp.Llama(str(tiny / "gguf/model.gguf"), n_ctx=128, verbose=False)
    prompt = [50256, *GPT2Tokenizer().encode("The function returns").tolist()]
    assert llama.tokenize(b"The function returns", add_bos=True) == prompt
    idx = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(64):
            idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], 1)
    found = []
    for token in llama.generate(prompt, temp=0.0, top_k=1):
        found.append(token)
        if len(found) == 64:
            break
    assert found == idx[0, len(prompt):].tolist()


QUESTIONS = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_lm_eval_scores_a_folder_as_an_independent_loop_does(tiny):
    """Needs `pip install lm-eval[hf]`; the README's command, on questions that are here."""
    pytest.importorskip("lm_eval")
    model = a_run(tiny / "out", block_size=64, block="modern")
    export.main(export.ExportConfig(to="my-gpt"))
    questions = [{"question": f"The {word} of {i} is", "choices": ["even", "a naïve word", "東京"],
                  "answer": i % 3} for i in range(20) for word in ("sum", "number")]
    (tiny / "tasks").mkdir()
    (tiny / "tasks/local.yaml").write_text(QUESTIONS)
    (tiny / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    subprocess.run([sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
                    "pretrained=my-gpt,dtype=float32", "--tasks", "local", "--include_path",
                    "tasks", "--device", "cpu", "--batch_size", "16", "--output_path", "scores"],
                   check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    told = json.loads(next((tiny / "scores").rglob("results*.json")).read_text())["results"]
    encode, right = GPT2Tokenizer().encode, np.zeros(2)
    with torch.inference_mode():
        for q in questions:
            context, scores = encode(q["question"]).tolist(), []
            for choice in q["choices"]:
                ids = torch.tensor([context + encode(" " + choice).tolist()])
                log_p = model(ids)[0, :-1].log_softmax(-1)
                of_choice = log_p.gather(1, ids[0, 1:, None])[len(context) - 1:].sum().item()
                scores.append((of_choice, of_choice / len(choice)))
            right += [max(range(3), key=lambda i: scores[i][k]) == q["answer"] for k in (0, 1)]
    assert [told["local"]["acc,none"], told["local"]["acc_norm,none"]] \
        == pytest.approx(right / len(questions))
    assert 0 < right[0] < len(questions)


@pytest.mark.parametrize("arguments, sentence", [
    (["--format=onnx"], "format = 'onnx'; use hf or gguf"),
    (["--init_from=gpt2"], "--to=FOLDER says where to write"),
    (["--out_dir=nowhere"], "nowhere holds no ckpt.pt or best.pt"),
    (["--out_dir=out-chars"], "learned the characters of data/chars, and an export needs GPT-2's"),
    (["--out_dir=out-capped"], "no class of transformers computes this model: its nearest, gpt2, "
                               "lacks softcap = 15")])
def test_mistakes_get_one_sentence(tiny, arguments, sentence):
    write_nanogpt(tiny / "data/chars", np.arange(200) % 3)
    with open(tiny / "data/chars/meta.pkl", "wb") as f:
        pickle.dump({"vocab_size": 3, "stoi": {"a": 0}, "itos": {0: "a"}}, f)
    a_run(tiny / "out-chars", dataset="chars", vocab_size=3)
    a_run(tiny / "out-capped", softcap=15.0)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        export.main(configure(export.ExportConfig, arguments))
