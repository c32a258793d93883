"""Weights from and to transformers: the same logits, the same bits, and what is refused."""
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT
from onecard import checkpoint, pretrained
from onecard.settings import UserError
from onecard.tokenizers import VOCABULARY_SHA256, of_checkpoint
from test_model import MODERN, noisy

transformers = pytest.importorskip("transformers")
IDX = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(0))
SHAPE = dict(vocab_size=320, max_position_embeddings=32, hidden_size=64, num_hidden_layers=2,
             num_attention_heads=4)
QWEN3 = SHAPE | dict(num_key_value_heads=4, head_dim=16, intermediate_size=96)


@pytest.mark.parametrize("kind", [
    dict(), dict(bias=False, n_inner=96), dict(mlp="gelu_tanh", tie_word_embeddings=False),
    MODERN, MODERN | dict(n_inner=96, rope_theta=500.0),
    MODERN | dict(tie_word_embeddings=True, embed_norm=False),
    MODERN | dict(tie_word_embeddings=True)])
def test_a_model_that_goes_there_and_comes_back_has_the_same_bits(work, kind):
    model = noisy(**kind)
    there = pretrained.to_transformers(model.config, model.state_dict())
    there.save_pretrained("one")
    back = GPT.from_checkpoint(pretrained.read("one"))
    pretrained.to_transformers(back.config, back.state_dict()).save_pretrained("two")
    for name in ("model.safetensors", "config.json"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()
    assert model(IDX).std() > 0.3
    assert torch.allclose(model(IDX), there(IDX).logits, atol=2e-5)
    assert torch.allclose(model(IDX), back(IDX), atol=2e-5)


@pytest.mark.parametrize("config", [
    transformers.GPT2Config(**SHAPE), transformers.Qwen3Config(**QWEN3)])
def test_a_folder_that_others_wrote_in_half_precision_is_read_as_fp32(work, config):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.bfloat16().save_pretrained("theirs")
    theirs = type(theirs).from_pretrained("theirs").float().eval()
    parts = pretrained.read("theirs")
    assert all(w.dtype == torch.float32 for w in parts["model"].values())
    ours = GPT.from_checkpoint(parts)
    assert ours(IDX).std() > 0.3 and torch.allclose(ours(IDX), theirs(IDX).logits, atol=1e-4)


@pytest.mark.parametrize("kind, changes, sentence", [
    ("Llama", dict(), "of type llama; use one of type gpt2 or qwen3"),
    ("GPT2", dict(activation_function="relu"), "has activation_function = 'relu'; our model"),
    ("Qwen3", dict(num_key_value_heads=2), "num_key_value_heads = 2"),
    ("Qwen3", dict(head_dim=32), "head_dim = 32"),
    ("Qwen3", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), "linear"),
    (None, None, "other is not a checkpoint, and transformers cannot read it: ")])
def test_a_folder_that_cannot_be_read_is_refused(work, monkeypatch, kind, changes, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (work / "other").mkdir()
    if kind:
        config = getattr(transformers, f"{kind}Config")(**QWEN3 | changes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained("other")
    with pytest.raises(UserError, match=sentence):
        pretrained.read("other")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="not a checkpoint; .* needs transformers.*pip install"):
        pretrained.read("gpt2")


@pytest.mark.parametrize("config, prefix", [
    (transformers.GPT2Config(**SHAPE), "transformer.h.1."),
    (transformers.Qwen3Config(**QWEN3), "model.layers.1.")])
@pytest.mark.parametrize("change, sentence", [
    (lambda name, w: None, "does not hold the weights of its config.json"),
    (lambda name, w: {f"old.{name}": w}, "does not hold the weights of its config.json"),
    (lambda name, w: {name: w[..., :3].clone()}, "transformers cannot read it")])
def test_a_weight_that_is_missing_is_never_a_random_one(work, config, prefix, change, sentence):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("one")
    weights = load_file("one/model.safetensors")
    for name in [name for name in weights if name.startswith(prefix)][2:4]:
        w = weights.pop(name)
        weights |= change(name, w) or {}
    save_file(weights, "one/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        pretrained.read("one")


@pytest.mark.parametrize("position", [0, 8, 20, -1])
def test_a_damaged_file_of_weights_is_one_sentence(work, position):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE)).save_pretrained("one")
    content = bytearray((work / "one/model.safetensors").read_bytes())
    content[position] ^= 0x80
    if position < 0:
        del content[position:]
    (work / "one/model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="one is not a checkpoint, and transformers cannot read it"):
        pretrained.read("one")


@pytest.mark.parametrize("change, identity", [
    ("none", VOCABULARY_SHA256), ("one token more", VOCABULARY_SHA256),
    ("two tokens swapped", "unknown"), ("fewer tokens", "unknown")])
def test_a_folder_has_gpt2s_ids_only_with_gpt2s_tokenizer(work, change, identity):
    config = transformers.GPT2Config(**SHAPE | dict(vocab_size=50304))
    transformers.GPT2LMHeadModel(config).save_pretrained("one")
    tokens, merges = pretrained.vocabulary_and_merges()
    if change == "two tokens swapped":
        tokens = tokens | {"A": tokens["B"], "B": tokens["A"]}
    elif change == "one token more":
        tokens = tokens | {"[PAD]": 50257}
    elif change == "fewer tokens":
        tokens, merges = dict(list(tokens.items())[:256]) | {"<|endoftext|>": 256}, []
    if change != "none":
        transformers.GPT2Tokenizer(tokens, merges).save_pretrained("one")
    assert of_checkpoint(pretrained.read("one")).identity == identity


@pytest.mark.parametrize("name, hint", [
    ("resum", "did you mean resume?"), ("gpt2medium", "did you mean gpt2-medium?"),
    ("openai-community/gpt2", "gpt2-large, gpt2-xl")])
def test_a_name_that_is_mistyped_asks_nobody(work, monkeypatch, name, hint):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=f"'{name}' is no folder and no .pt file") as error:
        checkpoint.read(name)
    assert str(error.value).endswith(hint)


def test_code_in_a_folder_is_not_run(work, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (work / "one").mkdir()
    (work / "one/evil.py").write_text("open('pwned', 'w')\nclass Evil: pass\n")
    (work / "one/config.json").write_text(json.dumps(
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil",
                                            "AutoModelForCausalLM": "evil.Evil"}}))
    with pytest.raises(UserError, match="transformers cannot read it"):
        pretrained.read("one")
    assert not (work / "pwned").exists()
