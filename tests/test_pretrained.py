"""Weights from and to transformers: the same logits, the same bits, and what is refused."""
import sys

import pytest
import torch

from model import GPT
from onecard import pretrained
from onecard.settings import UserError
from test_model import MODERN, noisy

transformers = pytest.importorskip("transformers")
IDX = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(0))
SHAPE = dict(vocab_size=320, max_position_embeddings=32, hidden_size=64, num_hidden_layers=2,
             num_attention_heads=4)
QWEN3 = SHAPE | dict(num_key_value_heads=4, head_dim=16, intermediate_size=96)


@pytest.mark.parametrize("kind", [
    dict(), dict(bias=False), dict(mlp="gelu_tanh", tie_word_embeddings=False), dict(n_inner=96),
    MODERN, MODERN | dict(n_inner=96, rope_theta=500.0),
    MODERN | dict(tie_word_embeddings=True, embed_norm=False),
    MODERN | dict(tie_word_embeddings=True)])
def test_a_model_that_goes_there_and_comes_back_has_the_same_bits(work, kind):
    model = noisy(**kind)
    there = pretrained.to_transformers(model.config, model.state_dict())
    there.save_pretrained("one")
    back = GPT.from_checkpoint(pretrained.read("one")).eval()
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
    ours = GPT.from_checkpoint(parts).eval()
    assert ours(IDX).std() > 0.3 and torch.allclose(ours(IDX), theirs(IDX).logits, atol=1e-4)


@pytest.mark.parametrize("kind, changes, sentence", [
    ("Llama", dict(), "of type llama; use one of type gpt2 or qwen3"),
    ("GPT2", dict(activation_function="relu"), "has activation_function = 'relu'; our blocks"),
    ("Qwen3", dict(num_key_value_heads=2), "num_key_value_heads = 2"),
    ("Qwen3", dict(head_dim=32), "head_dim = 32"),
    ("Qwen3", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), "linear"),
    (None, None, "other is not a checkpoint, and transformers finds no model there")])
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
