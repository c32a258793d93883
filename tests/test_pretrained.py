import pytest
import torch

import pretrained
from test_model import hf_twin, qwen3_twin, small, stirred

transformers = pytest.importorskip("transformers")
KINDS = [dict(), dict(bias=False), dict(mlp="gelu_tanh", tie_word_embeddings=False),
         dict(n_inner=96), dict(block="modern"),
         dict(block="modern", n_kv_head=2, rope_theta=500.0, n_inner=96),
         dict(block="modern", tie_word_embeddings=True, embed_norm=False),
         dict(block="modern", tie_word_embeddings=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_there_computes_the_same(kind):
    model = stirred(small(**kind))
    idx = torch.randint(320, (2, 32))
    ours, theirs = model(idx), pretrained.to_transformers(model)(idx).logits
    assert ours.std() > 0.3 and torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_and_there_changes_no_bit(work, kind):
    model = stirred(small(**kind))
    pretrained.to_transformers(model).save_pretrained("one")
    again = pretrained.read("one")
    pretrained.to_transformers(again).save_pretrained("two")
    assert (work / "one/model.safetensors").read_bytes() \
        == (work / "two/model.safetensors").read_bytes()
    one, two = ((work / f / "config.json").read_text() for f in ("one", "two"))
    assert one == two
    idx = torch.randint(320, (2, 32))
    assert torch.allclose(model(idx), again(idx), atol=2e-5)
    if not model.config.embed_norm:         # which is folded into the embedding on the way
        assert all(torch.equal(a, b) for a, b in zip(
            model.state_dict().values(), again.state_dict().values(), strict=True))
        assert {**vars(again.config), "block": 0, "zero_init": 0} \
            == {**vars(model.config), "block": 0, "zero_init": 0}


@pytest.mark.parametrize("twin, kind", [(hf_twin, dict(mlp="gelu_tanh")),
                                        (qwen3_twin, dict(block="modern"))])
def test_a_folder_that_others_wrote_is_read(work, twin, kind):
    """The twins are written in the tests of the model, tensor by tensor."""
    model = stirred(small(**kind))
    twin(model).save_pretrained("hf")
    idx = torch.randint(320, (2, 32))
    assert torch.allclose(pretrained.read("hf", dropout=0.1).eval()(idx), model(idx), atol=2e-5)
    assert pretrained.read("hf", dropout=0.1).config.dropout == 0.1


def test_half_precision_weights_are_read_as_fp32(work):
    model = stirred(small())
    hf_twin(model).bfloat16().save_pretrained("hf")
    again = pretrained.read("hf")
    assert all(w.dtype is torch.float32 for w in again.state_dict().values())
    assert torch.equal(again.transformer.wte.weight,
                       model.transformer.wte.weight.bfloat16().float())


@pytest.mark.parametrize("config, words", [
    (lambda: transformers.LlamaConfig(hidden_size=32),
     "of type llama; those of type gpt2 and qwen3 can be read"),
    (lambda: transformers.GPT2Config(activation_function="relu"), "activation_function = 'relu', "
     "which these blocks do not compute"),
    (lambda: transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True),
     "scale_attn_by_inverse_layer_idx = True"),
    (lambda: transformers.Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=32),
     "head_dim = 32, which is not"),
    (lambda: transformers.Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=16,
                                      rope_parameters={"rope_type": "linear", "factor": 2.0,
                                                       "rope_theta": 1e4}),
     "rope_type = 'linear'")])
def test_a_folder_that_these_blocks_do_not_compute_is_refused(work, config, words):
    config().save_pretrained("other")
    with pytest.raises(ValueError, match=words):
        pretrained.read("other")


def test_a_folder_that_is_none_is_refused(work):
    with pytest.raises(ValueError, match="finds no model there"):
        pretrained.read(str(work / "nothing"))
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained("no-weights")
    with pytest.raises(ValueError, match="finds no model there"):
        pretrained.read("no-weights")


@pytest.mark.parametrize("kind, words", [
    (dict(block="modern", norm="rmsnorm_weightless"), "its nearest, qwen3, lacks norm = "
     "'rmsnorm_weightless'"),
    (dict(softcap=15.0), "its nearest, gpt2, lacks softcap = 15"),
    (dict(n_kv_head=2), "its nearest, gpt2, lacks n_kv_head = 2"),
    (dict(mlp="relu2"), "its nearest, gpt2, lacks mlp = 'relu2'"),
    (dict(block="modern", n_value_table=1), "its nearest, qwen3, lacks n_value_table = 1")])
def test_a_model_that_no_class_computes_is_named(kind, words):
    with pytest.raises(ValueError, match=words):
        pretrained.to_transformers(small(**kind))
