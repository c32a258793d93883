import math

import pytest
import torch
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from configurator import configure
from conftest import PROJECT
from model import GPT, GPTConfig, KVCache, model_args
from train import TrainConfig

SMALL = dict(block_size=32, vocab_size=320, n_layer=3, n_head=4, n_embd=64)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **changes})).eval()


EVERY_KIND = [dict(), dict(block="modern"), dict(block="modern", n_kv_head=2, softcap=5.0),
              dict(position="rotary", norm="rmsnorm_weightless", mlp="relu2", bias=False),
              dict(block="modern", n_kv_head=2, n_value_table=2)]
kinds = pytest.mark.parametrize("kind", EVERY_KIND,
                                ids=["gpt2", "modern", "grouped", "mixed", "values"])


def stirred(model):
    """`model` with noise on every weight, so that zeros, ones and biases matter too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def hf_twin(model):
    """transformers' GPT-2 with the weights of `model`."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size,
        n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.mlp],
        attn_implementation="eager")).eval()
    ours, theirs = model.state_dict(), twin.state_dict()
    for key, w in theirs.items():
        if key in ours:
            conv1d = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            w.copy_(ours[key].T if conv1d else ours[key])
        else:
            assert key.endswith("bias"), key
            w.zero_()
    return twin


@pytest.mark.parametrize("kind", [dict(), dict(bias=False), dict(mlp="gelu_tanh")])
def test_logits_and_loss_are_those_of_transformers(kind):
    model = stirred(small(**kind))
    twin = hf_twin(model)
    idx = torch.randint(320, (2, 32))
    assert torch.allclose(model(idx), twin(idx).logits, atol=2e-5)
    assert torch.allclose(model(idx[:, :-1], idx[:, 1:]), twin(idx, labels=idx).loss, atol=1e-5)


def qwen3_twin(model):
    """transformers' Qwen3ForCausalLM with the weights of `model`, whose block is modern."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.n_embd // c.n_head,
        num_key_value_heads=c.n_kv_head, intermediate_size=c.n_inner, hidden_act="silu",
        rms_norm_eps=1e-6, tie_word_embeddings=c.tie_word_embeddings, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        attn_implementation="eager")).eval()
    table = model.transformer.wte.weight.detach()
    if c.embed_norm:                        # the same function of a token, once and for all
        table = F.rms_norm(table, (c.n_embd,), eps=1e-6)
    weights = {"model.embed_tokens.weight": table, "lm_head.weight": model.lm_head.weight,
               "model.norm.weight": model.transformer.ln_f.weight}
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.split(block.attn.sizes)
        gate, up = block.mlp.c_fc.weight.chunk(2)
        weights.update({f"model.layers.{i}.{name}.weight": w for name, w in {
            "input_layernorm": block.ln_1.weight, "post_attention_layernorm": block.ln_2.weight,
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.c_proj.weight,
            "self_attn.q_norm": block.attn.q_norm.weight,
            "self_attn.k_norm": block.attn.k_norm.weight, "mlp.gate_proj": gate,
            "mlp.up_proj": up, "mlp.down_proj": block.mlp.c_proj.weight}.items()})
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("kind", [
    dict(), dict(n_kv_head=2), dict(n_inner=96, rope_theta=500.0),
    dict(tie_word_embeddings=True, embed_norm=False)])
def test_the_modern_block_is_that_of_transformers_qwen3(kind):
    model = stirred(small(block="modern", **kind))
    twin = qwen3_twin(model)
    idx = torch.randint(320, (2, 32))
    ours, theirs = model(idx), twin(idx).logits
    assert ours.std() > 0.3 and torch.allclose(ours, theirs, atol=2e-5)
    assert torch.allclose(model(idx[:, :-1], idx[:, 1:]), twin(idx, labels=idx).loss, atol=1e-5)


def test_each_setting_of_a_block_can_be_set_alone():
    norms = {"layernorm": torch.nn.LayerNorm, "rmsnorm": torch.nn.RMSNorm}
    for block, other in (("gpt2", "modern"), ("modern", "gpt2")):
        for name, value in model_file.BLOCKS[other].items():
            model = small(block=block, **{name: value})
            assert {n: getattr(model.config, n) for n in model_file.BLOCKS[block]} \
                == {**model_file.BLOCKS[block], name: value}
            c, attn = model.config, model.transformer.h[0].attn
            assert (model.lm_head.weight is model.transformer.wte.weight) == c.tie_word_embeddings
            assert ("wpe" in model.transformer) == (c.position == "learned")
            assert isinstance(model.transformer.ln_f, norms[c.norm])
            assert hasattr(attn, "q_norm") == c.qk_norm
            assert (attn.c_attn.bias is not None) == c.bias
            assert model.transformer.h[0].mlp.c_fc.weight.size(0) \
                == (2 * 192 if c.mlp == "swiglu" else 256)
            assert ("ln_e" in model.transformer) == c.embed_norm
            assert bool((attn.c_proj.weight == 0).all()) == c.zero_init
            args = model_args(c)                    # a checkpoint's, from which it is made again
            assert GPT(GPTConfig(**args)).config == c


def test_a_gpt2s_arguments_are_those_that_nanogpt_knows():
    assert list(model_args(TrainConfig())) == ["block_size", "vocab_size", "n_layer", "n_head",
                                               "n_embd", "dropout", "bias"]
    assert model_args(TrainConfig(block="modern"))["block"] == "modern"


@pytest.mark.parametrize("settings, words", [
    (dict(block="modem"), "block = 'modem'; use gpt2 or modern"),
    (dict(norm="rms"), "norm = 'rms'; use layernorm or rmsnorm or rmsnorm_weightless"),
    (dict(n_head=6, n_embd=96, n_kv_head=4),
     "n_head = 6 is not a multiple of n_kv_head = 4. Nearest that works: 2"),
    (dict(block="modern", n_embd=60),
     "n_embd / n_head = 15 is odd. Nearest that works: n_embd = 64"),
    (dict(softcap=-1.0), "softcap = -1.0 cannot be negative"),
    (dict(rope_theta=0.0), "rope_theta = 0.0 must be above 0")])
def test_a_shape_that_cannot_be_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        small(**settings)


def test_the_modern_block_starts_knowing_nothing_at_all():
    model = small(block="modern", vocab_size=50304, n_embd=256)
    idx = torch.randint(50257, (4, 32))
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(math.log(50304), abs=1e-5)
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":
            assert (p == 0).all(), name
        elif p.dim() == 2:
            std = 1.0 if "wte" in name else 0.55 / 16
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (p == (1.2 if "q_norm" in name or "k_norm" in name else 1.0)).all(), name


def test_rotary_positions_know_distances_and_not_places():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    config = GPTConfig(n_embd=64, n_head=4)
    at = [model_file.rotary(config, torch.tensor([place])) for place in (3, 10, 103, 110)]
    near, far = ((model_file.rotate(q, *at[i]) * model_file.rotate(k, *at[i + 1])).sum()
                 for i in (0, 2))
    other = (model_file.rotate(q, *at[0]) * model_file.rotate(k, *at[2])).sum()
    assert near == pytest.approx(far.item(), abs=1e-4) and abs(near - other) > 0.1


def test_the_angles_of_rotary_positions_are_made_once_and_not_in_a_step():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.add(f.overloadpacket.__name__)
            return f(*args, **(kwargs or {}))

    seen, model = set(), small(block="modern")
    with Seen():
        model(torch.zeros(2, 32, dtype=torch.long), torch.zeros(2, 32, dtype=torch.long)).backward()
    assert "mul" in seen and not seen & {"cos", "sin"}
    assert not any("turn" in name for name in model.state_dict())       # as transformers has it
    cos, sin = model_file.rotary(model.config, torch.arange(32))
    assert torch.equal(model.turn[0], cos) and torch.equal(model.turn[1], sin)


@pytest.mark.parametrize("n_layer, n, uses", [(4, 2, [None, 0, None, 1]), (3, 2, [0, None, 1]),
                                              (5, 2, [0, None, 1, None, 0]), (3, 0, [None] * 3)])
def test_every_other_block_adds_rows_of_its_own_table_to_its_values(n_layer, n, uses):
    model = stirred(small(block="modern", n_layer=n_layer, n_value_table=n, n_kv_head=2))
    assert [block.attn.table for block in model.transformer.h] == uses
    assert ("wve" in model.transformer) == (n > 0)
    idx = torch.randint(320, (2, 32))
    for block in model.transformer.h:
        attn, x, seen = block.attn, torch.randn(2, 32, 64), []
        plain = attn.c_attn(x)[..., -32:]                   # two heads of keys and values of 16
        if attn.table is not None:
            rows = model.transformer.wve.weight[:, attn.table * 32:][:, :32]
            gates = 2 * torch.sigmoid(x[..., :12] @ attn.v_gate.weight.T)
            plain = plain + rows[idx] * gates.repeat_interleave(16, -1)
        values = model.transformer.wve(idx).chunk(n, 2) if n else ()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_file, "causal_attention",
                          lambda q, k, v, dropout, seen=seen: seen.append(v) or v)
            attn(x, model_file.rotary(model.config, torch.arange(32)), values=values)
        heads = seen[0][:, ::2].transpose(1, 2).flatten(2)  # each stands for two queries' heads
        assert torch.allclose(heads, plain, atol=1e-6)


@kinds
def test_under_autocast_attention_and_the_blocks_products_are_in_bf16(kind):
    model, dtypes = small(**kind), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(part in str(function) for part in ("aten.mm", "aten.addmm", "attention")):
                dtypes.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Watch():
        model.hidden(torch.randint(320, (2, 32)))
    assert len(dtypes) >= 3 * 5 and set(dtypes) == {torch.bfloat16}


@kinds
def test_a_token_sees_its_past_and_never_its_future(kind):
    model = stirred(small(**kind))
    idx = torch.randint(320, (1, 32))
    changed = idx.clone()
    changed[0, 20:] = 7
    a, b = model(idx), model(changed)
    assert (torch.allclose(a[:, :20], b[:, :20], atol=1e-6)
            and not torch.allclose(a[:, 20:], b[:, 20:], atol=1e-3))


def test_targets_of_minus_one_do_not_count():
    model = small()
    idx, targets = torch.randint(320, (2, 16)), torch.randint(320, (2, 16))
    masked = targets.clone()
    masked[1] = -1
    assert torch.allclose(model(idx, masked), model(idx[:1], targets[:1]), atol=1e-6)


@kinds
def test_the_loss_is_the_mean_over_tokens_in_fp32(kind):
    model = stirred(small(**kind))
    idx, targets = torch.randint(320, (3, 16)), torch.randint(320, (3, 16))
    by_hand = -F.log_softmax(model(idx).double(), -1).gather(2, targets[..., None]).mean()
    assert model(idx, targets).item() == pytest.approx(by_hand.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, targets).dtype == torch.float32


def both_losses(dtype, softcap=0.0, n=45, vocabulary=320, width=64):
    """(loss, gradient of x, of the weights) in chunks, and by F.cross_entropy in the wide dtype."""
    torch.manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, width, dtype=wide)
    w = torch.randn(vocabulary, width, dtype=wide) / 4
    targets = torch.randint(vocabulary, (n,))
    targets[[0, 7, 30]] = -1
    results = []
    for loss in (lambda x, w: model_file.LinearCrossEntropy.apply(
                     x, w, targets, dtype, True, model_file.loss_of_chunk, softcap),
                 lambda x, w: F.cross_entropy(
                     softcap * torch.tanh(x @ w.T / softcap) if softcap else x @ w.T, targets,
                     ignore_index=-1)):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        value = loss(x, w)
        (3 * value).backward()
        results.append((value.detach(), x.grad, w.grad))
    return results


@pytest.mark.parametrize("compiling", [False, True])      # each has its own lines for the gradient
@pytest.mark.parametrize("chunk, softcap", [(1, 0.0), (16, 0.0), (45, 0.0), (1024, 0.0), (16, 2.0)])
def test_the_loss_in_chunks_and_its_gradients_are_the_plain_ones(monkeypatch, chunk, softcap,
                                                                 compiling):
    monkeypatch.setattr(model_file, "CHUNK", chunk)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    for ours, plain in zip(*both_losses(torch.float64, softcap), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_loss_in_chunks_is_right_to_the_rounding_of_its_dtype(monkeypatch, dtype, rounding):
    monkeypatch.setattr(model_file, "CHUNK", 16)
    (loss, *grads), (plain, *plain_grads) = both_losses(dtype)
    assert loss.dtype == torch.float32 and abs(loss - plain) < rounding * plain
    for ours, right in zip(grads, plain_grads, strict=True):
        assert ours.dtype == torch.float32 and (ours - right).norm() < 2 * rounding * right.norm()


def test_without_gradients_the_loss_is_the_same(monkeypatch):
    monkeypatch.setattr(model_file, "CHUNK", 16)
    model = small()
    idx, targets = torch.randint(320, (3, 16)), torch.randint(320, (3, 16))
    with torch.no_grad():
        without = model(idx, targets)
    assert torch.equal(without, model(idx, targets).detach())


def test_the_logits_of_a_loss_never_exist_all_at_once(monkeypatch):
    monkeypatch.setattr(model_file, "CHUNK", 16)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    model = small(n_layer=1)
    idx = torch.randint(320, (8, 32))
    with Watch():
        model(idx, idx).backward()
    assert largest < 8 * 32 * 320


def test_a_second_backward_through_a_loss_is_an_error_and_not_a_wrong_gradient():
    model = small(n_layer=1)
    idx = torch.randint(320, (2, 16))
    loss = model(idx, idx)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("length", [1, 5, 16, 100])
def test_attention_in_pieces_is_attention(monkeypatch, length):
    monkeypatch.setattr(model_file, "PIECE", 16)
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 3, length, 16)
    results = []
    for attention in (model_file.CausalAttentionOnCPU.apply,
                      lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        y.backward(grad)
        results.append([y, *(t.grad for t in inputs)])
    for ours, right in zip(*results, strict=True):
        assert torch.allclose(ours, right, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param(EVERY_KIND[0], marks=pytest.mark.slow),
                                  {**EVERY_KIND[2], "n_value_table": 1}], ids=["gpt2", "modern"])
@inductor.patch("cpp.simdlen", 1)           # plain C++ compiles in two thirds of the time
def test_a_compiled_model_has_the_loss_and_gradients_of_the_plain_one(monkeypatch, kind):
    monkeypatch.setattr(model_file, "CHUNK", 24)
    monkeypatch.setattr(model_file, "PIECE", 20)
    model = stirred(small(n_layer=1, **kind))
    model.train()
    idx, targets = torch.randint(320, (3, 32)), torch.randint(320, (3, 32))
    model(idx, targets).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = model(idx, targets).item()
    model.zero_grad()
    model.compile(dynamic=False)
    compiled = model(idx, targets)
    compiled.backward()
    assert compiled.item() == pytest.approx(loss, rel=1e-5)
    assert set(dict(model.named_parameters())) == set(plain)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, plain[name], atol=1e-5), name


@kinds
@pytest.mark.parametrize("pieces", [[20, 1, 1, 1, 5, 1], [1] * 29, [29]])
def test_keys_and_values_from_the_cache_change_nothing(pieces, kind):
    model = stirred(small(**kind))
    idx = torch.randint(320, (2, sum(pieces)))
    cache, at, parts = KVCache(model.config, 2, idx.device, torch.float32, 32), 0, []
    with torch.no_grad():
        whole = model.hidden(idx)
        for n in pieces:
            parts.append(model.hidden(idx[:, at:at + n], cache))
            at += n
    assert cache.length == idx.size(1) and torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_initial_weights_are_gpt2s():
    model = small(n_embd=256, n_layer=8, bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.dim() == 1:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_new_model_knows_nothing():
    model = small(vocab_size=50304)
    idx = torch.randint(50257, (4, 32))
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(math.log(50304), abs=0.1)


def test_dropout_acts_in_training_only():
    model = small(dropout=0.3)
    idx = torch.randint(320, (2, 16))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("shape, total, without", [
    ("mission", 64.0e6, 37.8e6), (dict(n_head=12, n_embd=768), 124.3e6, 84.9e6)])
def test_parameters_are_counted_as_they_are(shape, total, without):
    if shape == "mission":
        shape = model_args(configure(
            TrainConfig, [str(PROJECT / "config" / "train_fineweb_4070_one_shard.py")]))
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**shape, "bias": False}))
    n, c = model.n_params(), model.config
    blocks = c.n_layer * (12 * c.n_embd ** 2 + 2 * c.n_embd) + c.n_embd
    assert n["without_embeddings"] == blocks == pytest.approx(without, rel=0.002)
    assert (n["total"] == blocks + (c.vocab_size + c.block_size) * c.n_embd
            == pytest.approx(total, rel=0.002))


@pytest.mark.parametrize("kind", [*EVERY_KIND, {**EVERY_KIND[4], "tie_word_embeddings": True}])
def test_flops_per_token_are_those_that_torch_counts(kind):
    model = small(**{**kind, "bias": False})
    idx = torch.randint(320, (4, 32))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):
        model(idx, idx).backward()
    c = model.config
    counted = counter.get_total_flops() / idx.numel()
    # torch counts attention over all T, ours over the T / 2 that a token can see on average
    assert (model.flops_per_token() + 6 * c.n_layer * c.n_embd * c.block_size
            == pytest.approx(counted, rel=1e-6))


@kinds
def test_cropping_forgets_positions_only(kind):
    model = stirred(small(**kind))
    idx = torch.randint(320, (1, 16))
    before = model(idx)
    model.crop_block_size(16)
    assert torch.equal(model(idx), before) and model.config.block_size == 16
    assert kind or model.transformer.wpe.weight.requires_grad
    with pytest.raises(ValueError, match="has learned 16 positions"):
        model.crop_block_size(64)
