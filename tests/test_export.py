"""Exports: what transformers and GGUF's readers open is the model, and nothing else is touched."""
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

import export
from conftest import documents, run, write_nanogpt
from model import GPT, GPTConfig, open_model
from onecard import checkpoint, gguf, pretrained
from onecard.settings import UserError
from onecard.tokenizers import END_OF_TEXT, GPT2Tokenizer
from test_model import MODERN

transformers = pytest.importorskip("transformers")
gguf_package = pytest.importorskip("gguf")
END = "<|endoftext|>"
FAMILIES = {"gpt2": dict(bias=False), "qwen3": MODERN | dict(rope_theta=500.0)}
both_families = pytest.mark.parametrize("family", FAMILIES)
# llama.cpp's name for a tensor of a block, ours, and the rows of ours that it has
GGUF_ROWS = {"gpt2": [("attn_qkv", "attn.c_attn", 0, 96), ("ffn_down", "mlp.c_proj", 0, 32)],
             "qwen3": [("attn_k", "attn.c_attn", 32, 64), ("ffn_up", "mlp.c_fc", 128, 256)]}


def write_run(folder, tokenizer=None, **changes):
    """Write the checkpoint of a run, with random weights that are not all small."""
    sizes = dict(block_size=128, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4).add_(0.02 * torch.randn_like(p))
    parts = {"model": model.state_dict(), "model_args": model.config.model_args(),
             "iter_num": 7, "config": {"dataset": "tiny"}, "tokenizer": tokenizer}
    folder.mkdir()
    checkpoint.save(folder / "best.pt", parts)
    return parts


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder with both families as runs (out-) and exports (hf-)."""
    folder = tmp_path_factory.mktemp("exports")
    for family, changes in FAMILIES.items():
        write_run(folder / f"out-{family}", **changes)
        run(export, f"--out_dir={folder}/out-{family}", f"--to={folder}/hf-{family}")
    return folder


def greedy(model, n_tokens):
    idx = torch.tensor([[END_OF_TEXT]])
    with torch.inference_mode():
        for _ in range(n_tokens):
            idx = torch.cat([idx, model(idx)[:, -1:].argmax(2)], 1)
    return idx


@both_families
def test_a_stranger_with_transformers_gets_the_same_losses_and_words(exports, family):
    folder = exports / f"hf-{family}"
    model = open_model(exports / f"out-{family}").model.eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    for text in documents(8):
        ids = torch.tensor([encode(END + text)["input_ids"][:128]])
        loss = model(ids[:, :-1], ids[:, 1:]).item()
        assert loss == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-4)
    prompt = encode(END, return_tensors="pt")
    words = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(words, greedy(model, 20))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"# out-{family}" in card and "M parameters, trained on tiny" in card


def test_the_tokenizer_is_gpt2s(exports):
    theirs = transformers.AutoTokenizer.from_pretrained(exports / "hf-gpt2")
    every_letter = "".join(f"a{chr(c)}'s " for c in range(0x20, 0x3400))    # each may cut words
    many_words = "\n".join(documents(2500)).replace(END, "<|end|>")         # 200,000 tokens
    for text in (every_letter, many_words):
        ids = theirs(text, verbose=False)["input_ids"]
        assert ids == GPT2Tokenizer().encode(text).tolist()     # without END before it, as GPT-2's
        assert theirs.decode(ids) == text
    assert len(theirs) == 50257 and theirs(END)["input_ids"] == [END_OF_TEXT]
    assert theirs.eos_token_id == theirs.bos_token_id == END_OF_TEXT


@both_families
def test_a_gguf_file_has_the_weights_under_the_names_of_llama_cpp(exports, family):
    model = open_model(exports / f"out-{family}").model
    weights = model.state_dict()
    tensors = gguf.tensors(pretrained.to_transformers(model.config, weights))
    for name, ours, begin, end in GGUF_ROWS[family]:
        right = weights[f"transformer.h.1.{ours}.weight"][begin:end]
        assert torch.equal(torch.tensor(tensors[f"blk.1.{name}.weight"]), right)


def test_a_gguf_file_holds_the_shape_the_vocabulary_and_the_weights(exports, work):
    model = open_model(exports / "out-qwen3").model
    gguf.write(work, pretrained.to_transformers(model.config, model.state_dict()), "my name")
    reader = gguf_package.GGUFReader("model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.name"] == "my name" and fields["general.architecture"] == "qwen3"
    assert fields["qwen3.context_length"] == 128
    assert fields["qwen3.attention.key_length"] == 16 and fields["qwen3.rope.freq_base"] == 500.0
    theirs = transformers.AutoTokenizer.from_pretrained(exports / "hf-qwen3")
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:50257] == theirs.convert_ids_to_tokens(range(50257)) and len(tokens) == 50304
    assert "FROM ./model.gguf" in Path("Modelfile").read_text()


@pytest.mark.slow
@both_families
def test_llama_cpp_continues_as_the_model_does(exports, work, family):
    """Needs `pip install llama-cpp-python`, which compiles for some minutes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    run(export, f"--out_dir={exports}/out-{family}", "--to=gguf", "--format=gguf")
    llama = llama_cpp.Llama("gguf/model.gguf", n_ctx=128, verbose=False)
    for text in documents(100):
        ids = GPT2Tokenizer().encode(text).tolist()
        assert llama.tokenize(text.encode(), add_bos=True) == [END_OF_TEXT, *ids]
    words = list(itertools.islice(llama.generate([END_OF_TEXT], temp=0.0, top_k=1), 64))
    model = open_model(exports / f"out-{family}").model.eval()
    assert [END_OF_TEXT, *words] == greedy(model, 64)[0].tolist()


def test_what_differs_from_the_model_is_refused(exports, tiny):
    model = open_model(exports / "out-qwen3").model.eval()
    theirs = pretrained.to_transformers(model.config, model.state_dict())
    theirs.model.layers[1].self_attn.k_proj.weight.data[0, 0] += 1
    with pytest.raises(RuntimeError, match="gives other logits: they differ by .*nothing"):
        export.compare_logits(model, theirs)
    writer = gguf_package.GGUFWriter("model.gguf", "qwen3")
    for name, array in gguf.tensors(theirs).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf.check(tiny, theirs)
    theirs.model.layers[1].self_attn.k_proj.weight.data[0, 0] += 1
    with pytest.raises(RuntimeError, match="does not hold the model's blk.1.attn_k.weight"):
        gguf.check(tiny, theirs)
    report = export.check_hf(exports / "hf-qwen3", model, "tiny")
    assert "tokens of its text are the same" in report
    write_nanogpt(tiny / "data" / "more", [END_OF_TEXT, 50300, END_OF_TEXT])
    with pytest.raises(UserError, match="dataset more has other tokens than .*nothing is written"):
        export.check_hf(exports / "hf-qwen3", model, "more")
    assert "tokens" not in export.check_hf(exports / "hf-qwen3", model, "/")
    path = shutil.copytree(exports / "hf-qwen3", tiny / "changed") / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    del content["model"]["merges"][:20]
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match="dataset tiny has other tokens than .*nothing is written"):
        export.check_hf(tiny / "changed", model, "tiny")


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_an_export_that_fails_leaves_nothing(work, kind):
    parts = write_run(work / "out")
    parts["model"]["transformer.ln_f.weight"].fill_(3e38)   # logits become infinite
    checkpoint.save("out/best.pt", parts)
    with pytest.raises(RuntimeError, match="gives other logits: they differ by nan"):
        run(export, "--out_dir=out", "--to=exports/one", f"--format={kind}")
    assert {path.name for path in work.rglob("*")} == {"out", "best.pt", "exports"}


@pytest.mark.parametrize("arguments, sentence", [
    (["--format=onnx"], "format = 'onnx'; use hf or gguf"),
    (["--init_from=gpt2"], "--to=FOLDER must say where to write"),
    (["--out_dir=nowhere"], "nowhere holds no ckpt.pt or best.pt"),
    (["--out_dir=characters"], "its 65 ids are neither GPT-2's nor"),
    (["--out_dir=letters"], "has a vocabulary of its own .2 ids., and an export needs GPT-2's"),
    (["--out_dir=own", "--format=gguf"], "its 50,304 ids are neither GPT-2's nor"),
    (["--out_dir=mixed"], "nearest that they know, qwen3, cannot have norm = 'layernorm'"),
    (["--out_dir=embedded"], "nearest that they know, gpt2, cannot have embed_norm = True"),
    (["--out_dir=mixed", "--to=mine"], "mine is there already, and stays as it is")])
def test_mistakes_get_one_sentence(work, arguments, sentence):
    runs = {"characters": dict(vocab_size=65), "letters": dict(tokenizer=["a", "b"], vocab_size=2),
            "own": dict(tokenizer="unknown"), "mixed": dict(position="rotary"),
            "embedded": dict(embed_norm=True)}
    for name, changes in runs.items():
        if f"--out_dir={name}" in arguments:
            write_run(work / name, **changes)
    (work / "mine").write_text("years of work")
    with pytest.raises(UserError, match=sentence):
        run(export, *arguments)
    assert (work / "mine").read_text() == "years of work"
