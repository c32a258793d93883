"""How do weights come from a model of transformers, and how do they become one?

GPT-2's shape is GPT2LMHeadModel there, the modern block Qwen3ForCausalLM; both hold the same
numbers under other names, so that there and back changes no bit of them.
"""
import torch
from torch.nn import functional as F

from model import BLOCKS, GPT, GPTConfig, make_norm

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
OF_QWEN3 = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
            "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
            "attn.c_proj": "self_attn.o_proj", "mlp.c_proj": "mlp.down_proj"}
# what of a config has to be as it always is, for our blocks to be the same function
USUAL = {
    "gpt2": {"layer_norm_epsilon": (1e-5,), "activation_function": tuple(ACTIVATIONS),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,)},
    "qwen3": {"rms_norm_eps": (1e-6,), "hidden_act": ("silu",), "attention_bias": (False,),
              "use_sliding_window": (False,)},
}


def import_transformers(name):
    """transformers, which `name` needs; raises ImportError that says what to install."""
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{name} needs transformers: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()       # of reading a file that is here
    return transformers


def read(name, dropout=0.0):
    """The GPT, on the CPU, of OpenAI's 'gpt2', 'gpt2-medium', ... or of a folder of transformers.

    Raises ValueError where that is no GPT-2 and no Qwen3, or one that differs from the usual.
    """
    transformers = import_transformers(f"init_from = {name!r}")

    def found(kind):
        try:
            return kind.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"init_from = {name!r}: transformers finds no model there: "
                             f"{str(error).splitlines()[0]}") from None

    c = found(transformers.AutoConfig)
    if c.model_type not in USUAL:
        raise ValueError(f"init_from = {name!r} is a model of type {c.model_type}; "
                         f"those of type {' and '.join(USUAL)} can be read")
    is_gpt2 = c.model_type == "gpt2"
    odd = [f"{key} = {getattr(c, key)!r}" for key, known in USUAL[c.model_type].items()
           if getattr(c, key) not in known]
    if not is_gpt2 and c.head_dim * c.num_attention_heads != c.hidden_size:
        odd.append(f"head_dim = {c.head_dim}, which is not hidden_size / num_attention_heads")
    if not is_gpt2 and _rope(c).get("rope_type", "default") != "default":
        odd.append(f"rope_type = {_rope(c)['rope_type']!r}")
    if odd:
        raise ValueError(f"init_from = {name!r} has {', '.join(odd)}, "
                         "which these blocks do not compute")
    theirs = found(transformers.AutoModelForCausalLM).float().state_dict()
    return (_from_gpt2 if is_gpt2 else _from_qwen3)(c, theirs, dropout)


def _rope(c):
    """How a config says rotary positions: in a dict since transformers 5."""
    return getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta}


def _fill(model, weights):
    for key, ours in model.state_dict().items():
        ours.copy_(weights[key])
    return model


def _from_gpt2(c, theirs, dropout):
    weights = {key: w.T if is_conv1d(key) else w for key, w in theirs.items()}
    # a model without biases comes back as one: it was written with zeros in their place
    bias = any(w.any() for key, w in weights.items() if key.endswith(".bias"))
    return _fill(GPT(GPTConfig(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, n_inner=c.n_inner or 0, dropout=dropout, bias=bias,
        mlp=ACTIVATIONS[c.activation_function], tie_word_embeddings=c.tie_word_embeddings)),
        weights)


def is_conv1d(key):
    """Whether GPT2LMHeadModel keeps this weight as (in, out)."""
    return key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _from_qwen3(c, theirs, dropout):
    model = GPT(GPTConfig(
        block="modern", block_size=c.max_position_embeddings, vocab_size=c.vocab_size,
        n_layer=c.num_hidden_layers, n_head=c.num_attention_heads, n_embd=c.hidden_size,
        n_kv_head=c.num_key_value_heads, n_inner=c.intermediate_size, dropout=dropout,
        tie_word_embeddings=c.tie_word_embeddings, embed_norm=False,
        rope_theta=float(_rope(c)["rope_theta"])))
    weights = {"transformer.wte.weight": theirs["model.embed_tokens.weight"],
               "transformer.ln_f.weight": theirs["model.norm.weight"],
               "lm_head.weight": theirs["lm_head.weight"]}
    for i in range(c.num_hidden_layers):
        here, there = f"transformer.h.{i}.", f"model.layers.{i}."
        weights |= {f"{here}{ours}.weight": theirs[f"{there}{name}.weight"]
                    for ours, name in OF_QWEN3.items()}
        weights[here + "attn.c_attn.weight"] = torch.cat(
            [theirs[f"{there}self_attn.{part}_proj.weight"] for part in "qkv"])
        weights[here + "mlp.c_fc.weight"] = torch.cat(
            [theirs[f"{there}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    return _fill(model, weights)


# and back

def family(config):
    """'gpt2' or 'qwen3': which class of transformers computes what a GPT of `config` computes.

    Raises ValueError that names the settings which keep it from being one of them.
    """
    free = {"gpt2": ("bias", "tie_word_embeddings", "zero_init", "mlp"),
            "qwen3": ("tie_word_embeddings", "zero_init", "embed_norm")}
    differ = {}
    for kind, block in (("gpt2", BLOCKS["gpt2"]), ("qwen3", BLOCKS["modern"])):
        differ[kind] = [f"{key} = {getattr(config, key)!r}" for key, value in block.items()
                        if key not in free[kind] and getattr(config, key) != value]
        differ[kind] += [f"{key} = {getattr(config, key):g}" for key in ("softcap", "n_value_table")
                         if getattr(config, key)]
    if config.mlp not in ("gelu", "gelu_tanh"):
        differ["gpt2"].append(f"mlp = {config.mlp!r}")
    if config.n_kv_head != config.n_head:
        differ["gpt2"].append(f"n_kv_head = {config.n_kv_head}")
    kind = min(differ, key=lambda kind: len(differ[kind]))
    if differ[kind]:
        raise ValueError(f"no class of transformers computes this model: its nearest, {kind}, "
                         f"lacks {', '.join(differ[kind])}")
    return kind


def to_transformers(model):
    """The GPT2LMHeadModel or Qwen3ForCausalLM, fp32, that computes the logits of `model`."""
    transformers, c = import_transformers("an export"), model.config
    end = 50256                     # GPT-2's end of text, before every document
    weights = {key: w.detach().float() for key, w in model.state_dict().items()}
    if family(c) == "gpt2":
        twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, n_inner=None if c.n_inner == 4 * c.n_embd else c.n_inner,
            activation_function="gelu" if c.mlp == "gelu" else "gelu_new",
            tie_word_embeddings=c.tie_word_embeddings, bos_token_id=end, eos_token_id=end,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        theirs = {key: weights[key].T if is_conv1d(key) else weights[key] if key in weights
                  else torch.zeros_like(w) for key, w in twin.state_dict().items()}
    else:
        table = weights["transformer.wte.weight"]
        if c.embed_norm:            # the same function of a token, once and for all
            table = F.rms_norm(table, (c.n_embd,), eps=make_norm(c, c.n_embd, weightless=True).eps)
        twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            head_dim=c.n_embd // c.n_head, num_key_value_heads=c.n_kv_head,
            intermediate_size=c.n_inner, rms_norm_eps=1e-6, rope_theta=c.rope_theta,
            tie_word_embeddings=c.tie_word_embeddings and not c.embed_norm,
            bos_token_id=end, eos_token_id=end))
        theirs = {"model.embed_tokens.weight": table, "lm_head.weight": weights["lm_head.weight"],
                  "model.norm.weight": weights["transformer.ln_f.weight"]}
        for i, block in enumerate(model.transformer.h):
            here, there = f"transformer.h.{i}.", f"model.layers.{i}."
            theirs |= {f"{there}{name}.weight": weights[f"{here}{ours}.weight"]
                       for ours, name in OF_QWEN3.items()}
            theirs |= {f"{there}self_attn.{part}_proj.weight": w for part, w in zip(
                "qkv", weights[here + "attn.c_attn.weight"].split(block.attn.sizes), strict=True)}
            theirs |= {f"{there}mlp.{part}_proj.weight": w for part, w in zip(
                ("gate", "up"), weights[here + "mlp.c_fc.weight"].chunk(2), strict=True)}
    twin.load_state_dict(theirs)
    return twin.eval()
