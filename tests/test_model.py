"""The network: the one of transformers, causal, counted, compiled, cached, and read again."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import PROJECT
from model import GPT, GPTConfig, LayerNorm, RMSNorm, open_model
from onecard import checkpoint
from onecard.generate import KVCache
from onecard.pretrained import to_transformers
from onecard.settings import UserError, read_config_file
from onecard.tokenizers import VOCABULARY_SHA256

MODERN = read_config_file(PROJECT / "config" / "modern.py")
every_kind = pytest.mark.parametrize("kind", [dict(), MODERN], ids=["gpt2", "modern"])


def small(seed=0, **changes):
    sizes = dict(block_size=32, vocab_size=320, n_layer=3, n_head=4, n_embd=64)
    torch.manual_seed(seed)
    return GPT(GPTConfig(**sizes | changes)).eval()


def noisy(**changes):
    """A small model with noise on every weight, so that zeros, ones and biases matter, too."""
    model = small(**changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def parts_of(model):
    """What a checkpoint of `model` holds."""
    return {"model": model.state_dict(), "model_args": model.config.model_args(), "iter_num": 7}


@pytest.mark.parametrize("kind", [
    dict(), dict(bias=False, mlp="gelu_tanh", n_inner=96), MODERN,
    MODERN | dict(n_inner=96, rope_theta=500.0, tie_word_embeddings=True, embed_norm=False)])
def test_logits_and_loss_are_those_of_transformers(kind):
    pytest.importorskip("transformers")
    model = noisy(**kind)
    twin = to_transformers(model.config, model.state_dict())
    idx = torch.randint(320, (2, 32))
    logits = model(idx)
    assert logits.std() > 0.3 and torch.allclose(logits, twin(idx).logits, atol=2e-5)
    assert torch.allclose(model(idx[:, :-1], idx[:, 1:]), twin(idx, labels=idx).loss, atol=1e-5)


@pytest.mark.parametrize("name", MODERN)
def test_each_modern_setting_works_alone(name):
    model = small(**{name: MODERN[name]})
    idx = torch.randint(320, (2, 32))
    model(idx, idx).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    plain = small()
    same_weights = model.state_dict().keys() == plain.state_dict().keys()
    assert not (same_weights and torch.equal(model(idx), plain(idx)))


# part of a weight's name, mean, standard deviation; the first line that fits counts
GPT2_INIT = [("bias", 0, 0), ("ln_", 1, 0),
             ("c_proj", 0, 0.02 / math.sqrt(2 * 8)),    # 8 layers add 16 outputs up
             ("", 0, 0.02)]
MODERN_INIT = [("ln_", 1, 0), ("q_norm", 1.2, 0), ("k_norm", 1.2, 0), ("wte", 0, 1),
               ("c_proj", 0, 0), ("lm_head", 0, 0),     # every block starts as the identity
               ("", 0, 0.55 / math.sqrt(256))]


@pytest.mark.parametrize("kind, table", [(dict(), GPT2_INIT), (MODERN, MODERN_INIT)])
def test_initial_weights_are_those_of_the_papers(kind, table):
    for name, p in small(n_embd=256, n_layer=8, **kind).named_parameters():
        mean, std = next((mean, std) for part, mean, std in table if part in name)
        assert p.mean().item() == pytest.approx(mean, abs=0.05 * std + 1e-6), name
        assert p.std().item() == pytest.approx(std, abs=0.05 * std + 1e-6), name


def test_dropout_acts_in_training_only():
    model = small(dropout=0.3)
    idx = torch.randint(320, (2, 16))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


class Products(TorchDispatchMode):
    """Notes the dtype of each product of matrices, attention among them."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm") or "attention" in name:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [dict(), MODERN, dict(qk_norm=True)])
def test_under_autocast_all_products_are_in_bf16(kind):
    model = small(**kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Products() as products:
        model.hidden(torch.randint(320, (2, 32)))
    assert products.dtypes == 3 * 5 * [torch.bfloat16]      # 3 blocks, 4 matrices and attention


@every_kind
def test_flops_per_token_are_those_that_torch_counts(kind):
    model = small(**kind | dict(bias=False))
    idx = torch.randint(320, (4, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    c = model.config
    # torch counts attention to all T tokens; ours to the T / 2 that a token sees on average
    other_half = 6 * c.n_layer * c.n_embd * c.block_size
    assert model.flops_per_token() + other_half == counter.get_total_flops() / idx.numel()


@every_kind
def test_reading_a_text_in_pieces_with_a_cache_changes_nothing(kind):
    model = noisy(**kind)
    idx, cache = torch.randint(320, (1, 29)), KVCache(model)
    with torch.no_grad():
        pieces = [model.hidden(piece, cache) for piece in idx.split([20, 1, 1, 1, 5, 1], 1)]
        assert torch.allclose(torch.cat(pieces, 1), model.hidden(idx), atol=1e-5)
    assert cache.n_read == cache.n_visible == 29


@pytest.mark.parametrize("backend", [
    "aot_eager_decomp_partition",                       # all of torch.compile but the C++
    pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_has_the_loss_and_the_gradients_of_the_plain_one(backend):
    model = noisy(n_layer=1, block_size=160, **MODERN)  # attention in two pieces
    model.train()
    idx, targets = torch.randint(320, (2, 3, 160))
    loss = model(idx, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.compile(dynamic=False, backend=backend)
    compiled_loss = model(idx, targets)
    compiled_loss.backward()
    assert torch.allclose(compiled_loss, loss, rtol=1e-5)
    assert dict(model.named_parameters()).keys() == gradients.keys()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-5), name


@every_kind
def test_a_shorter_context_forgets_only_the_later_positions(kind):
    model = noisy(**kind)
    shorter = GPT(replace(model.config, block_size=16)).eval()
    shorter.load_weights(parts_of(model))
    idx = torch.randint(320, (1, 16))
    assert torch.equal(shorter(idx), model(idx)) and shorter.config.block_size == 16


def test_a_model_is_opened_by_its_folder_its_file_or_as_one_of_transformers(work):
    model = noisy(**MODERN | dict(embed_norm=False, vocab_size=50304))
    (work / "out").mkdir()
    checkpoint.save("out/ckpt.pt", {**parts_of(model), "config": {"dataset": "tiny"}})
    to_transformers(model.config, model.state_dict()).save_pretrained("theirs")
    labels, idx = [], torch.randint(50257, (1, 16))
    for name in ("out", "out/ckpt.pt", "theirs"):
        opened = open_model(name)
        labels.append((opened.label, opened.dataset))
        assert torch.equal(opened.model(idx), model(idx))
        assert opened.tokenizer.identity == VOCABULARY_SHA256
    run = ("out/ckpt.pt, step 7", "tiny")
    assert labels == [run, run, ("theirs", "")]


def test_a_model_of_ids_that_nobody_knows_is_not_used(work):
    checkpoint.save("ckpt.pt", parts_of(small()))
    with pytest.raises(UserError, match="ckpt.pt, step 7: its 320 ids are neither GPT-2's"):
        open_model("ckpt.pt")


@pytest.mark.parametrize("changes, sentence", [
    (dict(norm="rms"), "norm = 'rms'; use layernorm or rmsnorm"),
    (dict(n_layer=0), "n_layer = 0 must be from 1 to"),
    (dict(vocab_size=2**16 + 1), "vocab_size = 65537 must be from .* to 65,536"),
    (dict(block_size=2**21), "block_size = 2097152 must be from .* to 1,048,576"),
    (dict(n_inner=-1), "n_inner = -1 must be from 0 to"),
    (dict(n_head=7), "n_embd = 64 does not divide into n_head = 7 heads; use a multiple of 7"),
    (dict(n_embd=60, position="rotary"), "rotary positions need an even n_embd / n_head, not 15"),
    (dict(rope_theta=0.0), "rope_theta = 0.0 must be from 1 to"),
    (dict(dropout=1.5), "dropout = 1.5 is a probability")])
def test_a_network_that_cannot_be_is_named(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        small(**changes)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(block="modern", softcap=5.0), "another version: it has the settings block, softcap"),
    (dict(n_layer="3"), "has n_layer = '3': n_layer is of type int, not str"),
    (dict(rope_theta=math.nan), "rope_theta must be a finite number"),
    (dict(n_embd=10**9), "n_embd = 1000000000 must be from 1 to"),
    (dict(n_layer=2), "transformer.h.2.attn.c_attn.bias .* need None"),
    (dict(n_layer=4), "transformer.h.3.attn.c_attn.bias has the shape None"),
    (dict(n_embd=128), "lm_head.weight has the shape .*320, 64.* need .*320, 128"),
    (dict(block_size=64), "wpe.weight has the shape .*32, 64.* need .*64, 64")])
def test_a_checkpoint_that_does_not_fit_is_named(arguments, sentence):
    parts = parts_of(small())
    parts["model_args"] |= arguments
    with pytest.raises(UserError, match=sentence):
        GPT.from_checkpoint(parts)


def test_a_checkpoint_that_does_not_say_its_sizes_is_named():
    parts = parts_of(small()) | {"model_args": {"bias": True}}
    with pytest.raises(UserError, match="say its block_size, n_embd, n_head, n_layer, vocab_size"):
        GPT.from_checkpoint(parts)


def test_weights_of_another_shape_are_named():
    parts = parts_of(small())
    for name, w in list(parts["model"].items())[::5]:
        for other in (w[:-1], w[None]):
            with pytest.raises(UserError, match=f"of another network: its {name} has the shape"):
                GPT.from_checkpoint({**parts, "model": {**parts["model"], name: other}})


def test_weights_that_are_no_numbers_and_a_head_that_is_not_tied_are_refused():
    parts = parts_of(noisy())
    wte = parts["model"]["transformer.wte.weight"]
    for change in (wte.to(torch.int64), wte * math.nan, wte / 0, wte.to(torch.complex64)):
        with pytest.raises(UserError, match="wte.weight of this model must be floating-point"):
            weights = {**parts["model"], "transformer.wte.weight": change}
            GPT.from_checkpoint({**parts, "model": weights})
    with pytest.raises(UserError, match="a head of its own"):
        GPT.from_checkpoint({**parts, "model": {**parts["model"], "lm_head.weight": wte + 1}})


def test_nanogpts_prefix_and_masks_are_no_names_of_weights_and_other_names_are_refused():
    model = noisy()
    parts = parts_of(model)
    parts["model"] = {f"_orig_mod.{name}": w for name, w in parts["model"].items()}
    for layer in range(3):
        mask = f"_orig_mod.transformer.h.{layer}.attn.bias"
        parts["model"][mask] = torch.ones(1, 1, 32, 32).tril()
    idx = torch.randint(320, (1, 16))
    assert torch.equal(GPT.from_checkpoint(parts).eval()(idx), model(idx))
    parts["model"]["transformer.h.0.attn.gate"] = torch.ones(1)
    with pytest.raises(UserError, match="h.0.attn.gate has the shape .* need None"):
        GPT.from_checkpoint(parts)


@pytest.mark.parametrize("make_norm, plain", [
    (RMSNorm, F.rms_norm), (LayerNorm, F.layer_norm)], ids=["rmsnorm", "layernorm"])
def test_a_norm_in_bf16_is_computed_in_fp32_and_rounded_once(make_norm, plain):
    norm, x = make_norm(64, eps=1e-6), torch.randn(100, 64).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    exact = plain(x.double(), (64,), eps=1e-6) * norm.weight
    y = norm(x)
    assert y.dtype == torch.bfloat16 and (y == exact.bfloat16()).float().mean() > 0.999
    x = torch.randn(100, 64)            # in fp32, it is torch's, bit for bit
    assert torch.equal(norm(x), plain(x, (64,), norm.weight, eps=1e-6))


def test_what_flows_between_the_blocks_may_be_larger_than_fp16_can_hold():
    model = small()
    model.transformer.wpe.weight.data *= 1e7
    with torch.autocast("cpu", torch.float16):
        assert model(torch.randint(320, (2, 32))).isfinite().all()


@every_kind
def test_rounding_to_bf16_moves_the_gradient_by_little(kind):
    """With a stream in fp32, the error is 0.9 to 1.0 % at this size; now it is 1.1 to 1.4 %."""
    model = noisy(n_layer=6, n_embd=128, **kind)
    idx, targets = torch.randint(320, (2, 8, 32))

    def gradient():
        model.zero_grad()
        model(idx, targets).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradient()
    assert (rounded - exact).norm() < 0.018 * exact.norm()
