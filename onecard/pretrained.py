"""Weights from a model of transformers, and a model of transformers from weights.

Our GPT-2 is GPT2LMHeadModel there, the network of config/modern.py is Qwen3ForCausalLM. Both hold
the same numbers under other names. This needs transformers 5.
"""
import difflib
import functools
from pathlib import Path

import torch
from torch.nn import functional as F

from onecard.settings import UserError, import_package
from onecard.tokenizers import (
    END_OF_TEXT,
    VOCABULARY,
    VOCABULARY_SHA256,
    UnknownTokenizer,
    gpt2,
)

PROBE = " The Zürich 2024 don't\n\n  東京🙂"     # other tokenizers split it in another way
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")      # from the internet
# {our setting: its name in transformers}; a GPT2Config accepts these names, too
NAMES_THERE = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
    "tie_word_embeddings": "tie_word_embeddings"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# {our setting: the values that transformers can compute}; the first one is what read() sets
EXPORTABLE = {
    "gpt2": {"position": ["learned"], "norm": ["layernorm"], "qk_norm": [False],
             "mlp": ["gelu", "gelu_tanh"], "embed_norm": [False]},
    "qwen3": {"position": ["rotary"], "norm": ["rmsnorm"], "qk_norm": [True], "mlp": ["swiglu"],
              "bias": [False]},
}
# {their setting: the values that our model can compute}
IMPORTABLE = {
    "gpt2": {"layer_norm_epsilon": [1e-5], "activation_function": list(ACTIVATIONS),
             "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False]},
    "qwen3": {"rms_norm_eps": [1e-6], "hidden_act": ["silu"], "attention_bias": [False],
              "use_sliding_window": [False]},
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as (in, out)
# {our module: the modules of Qwen3 that it concatenates}, in a block
QWEN3_BLOCK = {
    "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"],
}


def open_theirs(name):
    """(model of transformers, identity of its tokenizer or None); `name` as in read()."""
    is_folder = name != "" and Path(name).is_dir()
    if not is_folder and name not in OPENAI_MODELS:
        close = difflib.get_close_matches(name, ("resume", *OPENAI_MODELS), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{name!r} is no folder and no .pt file, and the models that are fetched "
                        f"are {', '.join(OPENAI_MODELS)}{hint}")
    transformers = import_package("transformers", f"{name} is not a checkpoint; reading it")
    try:                                # without trust_remote_code, no code in a folder runs
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True)
        identity = identity_of(transformers, Path(name))
    except Exception as error:          # a damaged file can raise anything
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} is not a checkpoint, and transformers cannot read it: "
                        f"{first_line}") from None
    # transformers makes up what is missing, and drops what is unexpected
    for problem in ("missing", "unexpected"):
        if names := sorted(report[f"{problem}_keys"]):
            raise UserError(f"{name} does not hold the weights of its config.json: {names[0]} is "
                            f"{problem} ({len(names)} in all); fetch that folder again")
    return theirs, identity


def read(name):
    """{"model_args": fields of GPTConfig, "model": our weights in fp32, "tokenizer": identity}.

    `name` is OpenAI's 'gpt2', 'gpt2-medium', ..., or a folder of transformers. Raises UserError if
    that is not a GPT-2 or a Qwen3, or has settings that our model does not support.
    """
    theirs, identity = open_theirs(name)
    config, weights = theirs.config, theirs.float().state_dict()
    kind = config.model_type
    if kind not in IMPORTABLE:
        raise UserError(f"{name} is a model of type {kind}; use one of type gpt2 or qwen3")
    allowed = dict(IMPORTABLE[kind])
    if kind == "qwen3":
        rope_theta = config.rope_parameters["rope_theta"]
        allowed |= {"num_key_value_heads": [config.num_attention_heads],
                  "head_dim": [config.hidden_size // config.num_attention_heads],
                  "rope_parameters": [{"rope_type": "default", "rope_theta": rope_theta}]}
    if settings := unsupported(config, allowed):
        raise UserError(f"{name} has {settings}; our model does not support that")

    model_args = {key: values[0] for key, values in EXPORTABLE[kind].items()}
    model_args |= {ours: getattr(config, key) for ours, key in NAMES_THERE.items()}
    if kind == "gpt2":
        mlp = ACTIVATIONS[config.activation_function]
        model_args |= {"n_inner": config.n_inner or 0, "mlp": mlp}
        return {"model_args": model_args, "model": transposed(weights), "tokenizer": identity}
    model_args |= {"n_inner": config.intermediate_size, "rope_theta": rope_theta}
    model = {f"{ours}.weight": torch.cat([weights[f"{part}.weight"] for part in parts])
             for ours, parts in qwen3_names(config.num_hidden_layers).items()}
    return {"model_args": model_args, "model": model, "tokenizer": identity}


def identity_of(transformers, folder):
    """Which tokenizer a folder holds, as tokenizers.of_checkpoint knows it; None if it has none."""
    patterns = "*token*", "vocab*", "merges*", "*.model"
    if not any(list(folder.glob(pattern)) for pattern in patterns):
        return None                     # AutoTokenizer would make an empty one
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours, _ = vocabulary_and_merges()
    ids = theirs.encode(PROBE, add_special_tokens=False)
    if ours.items() <= theirs.get_vocab().items() and ids == gpt2().encode(PROBE):
        return VOCABULARY_SHA256
    return UnknownTokenizer.identity


@functools.cache
def vocabulary_and_merges():
    """({token: id}, merges) of GPT-2, as its own files spell them."""
    from transformers.convert_slow_tokenizer import TikTokenConverter
    tokens, merges = TikTokenConverter().extract_vocab_merges_from_model(str(VOCABULARY))
    return tokens | {"<|endoftext|>": END_OF_TEXT}, merges


def unsupported(config, allowed):
    """The settings of `config` whose value is not among the allowed ones, as a text."""
    return ", ".join(f"{key} = {getattr(config, key)!r}" for key, values in allowed.items()
                     if getattr(config, key) not in values)


def transposed(weights):
    """Our weights of GPT-2 from theirs, or theirs from ours."""
    return {name: w.T if name.endswith(TRANSPOSED) else w for name, w in weights.items()}


def qwen3_names(n_layer):
    """{our module: the modules of Qwen3 that it concatenates}, of the whole model."""
    names = {"transformer.wte": ["model.embed_tokens"], "transformer.ln_f": ["model.norm"],
             "lm_head": ["lm_head"]}
    for i in range(n_layer):
        for ours, parts in QWEN3_BLOCK.items():
            names[f"transformer.h.{i}.{ours}"] = [f"model.layers.{i}.{part}" for part in parts]
    return names


def kind_of(config):
    """'gpt2' or 'qwen3': the model of transformers that computes a network of this GPTConfig."""
    kind = "gpt2" if config.position == "learned" else "qwen3"
    if settings := unsupported(config, EXPORTABLE[kind]):
        raise UserError("other programs do not know this network: the nearest that they know, "
                        f"{kind}, cannot have {settings}")
    return kind


def to_transformers(config, weights):
    """The GPT2LMHeadModel or Qwen3ForCausalLM with these weights, a GPT's state_dict."""
    transformers = import_package("transformers", "an export")
    transformers.utils.logging.disable_progress_bar()
    settings = {key: getattr(config, ours) for ours, key in NAMES_THERE.items()}
    settings |= {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    if kind_of(config) == "gpt2":
        activation = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp]
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            **settings, n_inner=config.inner_size, activation_function=activation,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        # if we have no biases, theirs stay zero
        model.load_state_dict(model.state_dict() | transposed(weights))
        return model.eval()

    if config.embed_norm:               # Qwen3 has no such norm: store the normalized rows
        rows = F.rms_norm(weights["transformer.wte.weight"], (config.n_embd,), eps=1e-6)
        weights = weights | {"transformer.wte.weight": rows}
        settings["tie_word_embeddings"] = False
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **settings, intermediate_size=config.inner_size, head_dim=config.head_size,
        num_key_value_heads=config.n_head, rms_norm_eps=1e-6, rope_theta=config.rope_theta))
    model.config.rope_theta = config.rope_theta     # where transformers 4 looks for it
    theirs = {}
    for ours, parts in qwen3_names(config.n_layer).items():
        pieces = weights[f"{ours}.weight"].chunk(len(parts))
        theirs |= {f"{part}.weight": w for part, w in zip(parts, pieces, strict=True)}
    model.load_state_dict(theirs)
    return model.eval()
