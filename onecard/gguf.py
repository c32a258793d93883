"""A model becomes a file for llama.cpp and Ollama.

The file holds the weights in fp32, the shape of the network, and GPT-2's vocabulary.
"""
import numpy as np

from onecard.pretrained import transposed, vocabulary_and_merges
from onecard.settings import import_package
from onecard.tokenizers import END_OF_TEXT

MODELFILE = '''FROM ./model.gguf
TEMPLATE """{{ .Prompt }}"""
PARAMETER num_ctx %d
PARAMETER temperature 0.8
PARAMETER stop "<|endoftext|>"
'''


def write(folder, theirs, name):
    """Write `theirs`, from pretrained.to_transformers, and a Modelfile for Ollama to `folder`."""
    gguf = import_package("gguf", "--format=gguf")
    config = theirs.config
    writer = gguf.GGUFWriter(folder / "model.gguf", config.model_type)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    if config.model_type == "qwen3":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens, merges = vocabulary_and_merges()
    # rows of the embedding that no token uses
    padding = [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *padding])
    types = gguf.TokenType
    writer.add_token_types([types.NORMAL] * END_OF_TEXT + [types.CONTROL]
                           + [types.UNUSED] * len(padding))
    writer.add_token_merges([f"{first} {second}" for first, second in merges])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    writer.add_add_bos_token(True)      # every document of the training text began with it
    for key, array in tensors(theirs).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    modelfile = MODELFILE % config.max_position_embeddings
    (folder / "Modelfile").write_text(modelfile, encoding="utf-8")


def check(folder, theirs):
    """Read the file back and compare every number of its tensors. Returns what was compared."""
    import gguf
    reader = gguf.GGUFReader(folder / "model.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, array in tensors(theirs).items():
        if not np.array_equal(stored[name], array):
            raise RuntimeError(f"model.gguf does not hold the model's {name}; nothing is written")
    return f"{len(stored)} tensors, every number as in the model"


def tensors(theirs):
    """{name in the file: fp32 array}. The names are llama.cpp's, from the gguf package."""
    import gguf
    config, weights = theirs.config, theirs.state_dict()
    architecture = gguf.MODEL_ARCH[config.model_type.upper()]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if config.tie_word_embeddings:          # then llama.cpp uses the token embedding
        del weights["lm_head.weight"]
    return {table.get_name(name, (".weight", ".bias")): w.numpy()
            for name, w in transposed(weights).items()}
