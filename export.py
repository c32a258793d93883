"""
Turn a trained model into what other tools open: a folder for transformers, a file for llama.cpp.

    python export.py                                        # the newest run, into its export/
    python export.py --out_dir=out --to=my-gpt              # for transformers' Auto classes
    python export.py --out_dir=out --to=my-gpt --format=gguf        # for llama.cpp and Ollama

What is written is opened again and compared with the model before it takes its name.
"""
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import loader
import pretrained
import tokenizer
from configurator import run

CHECKED = 1_000_000                 # tokens of the run's own text that both tokenizers must make
TOLERANCE = 1e-4                    # between logits in fp32
GREEDY = 64                         # tokens that both must continue with alike


@dataclass(frozen=True)
class ExportConfig:
    out_dir: str = ""               # run to export; "" = the newest under out*/
    init_from: str = "resume"       # resume (a run of ours or of nanoGPT), gpt2, ..., or a folder
    to: str = ""                    # folder to write; "" = export/ in the run's folder
    format: str = "hf"              # hf (transformers and all that reads its folders) or gguf
    overwrite: bool = False         # replace an export that is there

    def __post_init__(self):
        if self.format not in ("hf", "gguf"):
            raise ValueError(f"format = {self.format!r}; use hf or gguf")
        if self.init_from != "resume" and not self.to:
            raise ValueError("--to=FOLDER says where to write")


# the tokenizer

def letters():
    """{byte: the letter that stands for it} in the files of GPT-2's tokenizer (encoder.py)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + n) for n, b in enumerate(others)}


def vocabulary_and_merges():
    """(tokens in the order of their ids, merges as pairs of tokens), all spelled in `letters`.

    A merge is what a token of n bytes comes from: the two parts that the merges before its own
    leave of it.
    """
    ranks, spell = tokenizer.ranks(), letters()

    def spelled(token):
        return "".join(spell[b] for b in token)

    def parts_before(token):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            at = min(range(len(parts) - 1),
                     key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return parts

    tokens = sorted(ranks, key=ranks.get)
    return ([spelled(token) for token in tokens],
            [tuple(map(spelled, parts_before(token))) for token in tokens if len(token) > 1])


def make_tokenizer(block_size):
    """GPT-2's tokenizer for transformers, from the vocabulary file alone."""
    transformers = pretrained.import_transformers("an export")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = vocabulary_and_merges()
    end = "<|endoftext|>"
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*tokens, end])}, merges))
    inner.add_special_tokens([end])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, unk_token=end,
        model_max_length=block_size, clean_up_tokenization_spaces=False)


def check_tokenizer(theirs, folder, most=CHECKED):
    """Encode texts of a dataset again; returns how many tokens agreed with the dataset's.

    Raises ValueError at the first document that they cut differently.
    """
    ours, n = tokenizer.GPT2Tokenizer(), 0
    for split in ("val", "train"):
        data = loader.Dataset(folder, split, 1, tokenizer.N_VOCAB)
        for a, b in zip(data.starts[:-1], data.starts[1:], strict=True):
            if n >= most:
                return n
            ids = data.tokens[int(a) + 1:int(b)]
            text = ours.decode_bytes(ids).decode("utf-8", "replace")
            if "<|endoftext|>" in text:         # there it is the token, here it is text
                continue
            if theirs(text, verbose=False)["input_ids"] != ours.encode(text).tolist():
                raise ValueError(f"the exported tokenizer cuts a document of {folder} differently: "
                                 f"the one at token {int(a):,} of {split}.bin; nothing is written")
            n += len(ids)
    return n


# what is written is the model

@torch.inference_mode()
def compare(model, theirs):
    """Largest difference of logits between `model` and `theirs`, which maps ids (B, T) to logits.

    Raises ValueError where it is above TOLERANCE, or where their likeliest continuations part.
    """
    n_vocab = min(tokenizer.N_VOCAB, model.config.vocab_size)
    T = model.config.block_size
    idx = torch.randint(n_vocab, (2, T), generator=torch.Generator().manual_seed(0))
    difference = (model(idx) - theirs(idx)).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(f"the exported model gives other logits: {difference:.1e} apart where "
                         f"{TOLERANCE:.0e} is the limit; nothing is written")
    start = torch.tensor([[min(tokenizer.END_OF_TEXT, n_vocab - 1)]])
    n, both = min(GREEDY, T - 1), []
    for logits_of in (model, theirs):
        idx = start
        for _ in range(n):
            idx = torch.cat([idx, logits_of(idx)[:, -1:, :n_vocab].argmax(-1)], 1)
        both.append(idx)
    if not torch.equal(*both):
        raise ValueError("the exported model continues differently; nothing is written")
    return difference


# the folder for transformers

def write_hf(model, folder, words):
    make_tokenizer(model.config.block_size).save_pretrained(folder)
    pretrained.to_transformers(model).save_pretrained(folder)
    # said as transformers 4 says it, which 5 reads too
    rotary = {"rope_theta": model.config.rope_theta} if model.config.position == "rotary" else {}
    for name, more in (("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
                       ("config.json", rotary)):
        told = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(told | more, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(words, encoding="utf-8")


def check_hf(model, folder, dataset):
    transformers = pretrained.import_transformers("an export")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    difference = compare(model, lambda idx: again(idx).logits)
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder)
    n = check_tokenizer(vocabulary, dataset) if loader.is_prepared(dataset) else 0
    return (f"opened again as {type(again).__name__}: logits differ by {difference:.0e} at most, "
            f"the same {min(GREEDY, model.config.block_size - 1)} likeliest tokens; tokenizer "
            + (f"checked on {n:,} tokens of {dataset}" if n else
               f"not checked on text, since {dataset} is not here"))


def card(model, name, parts, run_folder):
    """README.md of an export: what it is, how it came about, how good it is, how to use it."""
    n, c, settings = model.n_params(), model.config, parts.get("config", {})
    tokens = parts.get("iter_num", 0) * parts.get("tokens_per_step", 0)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
             f"# {run_folder.resolve().name if run_folder else name}", "",
             f"A GPT of {n['total'] / 1e6:.1f} M parameters, {n['without_embeddings'] / 1e6:.1f} M "
             f"without embeddings: {c.n_layer} layers x {c.n_head} heads x {c.n_embd}, context "
             f"{c.block_size:,}, GPT-2's vocabulary. A base model: it continues text, and was not "
             "taught to answer or to refuse.", "", "## Training", ""]
    if parts:
        best = float(parts.get("best_val_loss", math.inf))
        lines += [f"- {parts['iter_num']:,} steps"
                  + (f", {tokens / 1e6:,.1f} M tokens" if tokens else "")
                  + f", on `{settings.get('dataset', 'unknown')}`"]
        lines += [f"- best validation loss while training: {best:.4f} nats"] * (best < math.inf)
        lines += [f"- {key} = {settings[key]!r}" for key in (
            "optimizer", "learning_rate", "lr_schedule", "max_iters", "weight_decay", "dropout",
            "seed") if key in settings]
        lines += [""]
    if run_folder and (run_folder / "loss.png").is_file():
        lines += ["![Loss](loss.png)", ""]
    scores = run_folder / "eval.json" if run_folder else None
    if scores and scores.is_file():
        told = json.loads(scores.read_text(encoding="utf-8"))
        lines += ["## Scores", "", "Each document alone, every token of it once:", "",
                  "| model | text | loss (nats a token) | perplexity | bits per byte |",
                  "|---|---|--:|--:|--:|"]
        lines += [f"| {r['model']} | {r['dataset']} {r['split']}, {r['documents']:,} documents | "
                  f"{r['loss']:.4f} | {r['perplexity']:.2f} | {r['bits_per_byte']:.4f} |"
                  for r in (told.get("a", told), told.get("b")) if r]
        lines += [""]
    lines += ["## Use", "", "```python", "from transformers import pipeline",
              "write = pipeline('text-generation', 'THIS FOLDER')",
              "print(write('<|endoftext|>The function returns', max_new_tokens=50)"
              "[0]['generated_text'])", "```", "",
              "`<|endoftext|>` stood before every text that it learned from; give it first.", ""]
    return "\n".join(lines)


# the file for llama.cpp

def gguf_tensors(model):
    """{name in GGUF: fp32 array, (out, in) or (n,)}; the file of 'gpt2' or 'qwen3'."""
    weights = {key: w.detach().float().numpy()
               for key, w in pretrained.to_transformers(model).state_dict().items()}
    if pretrained.family(model.config) == "qwen3":
        names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
                 "lm_head": "output"}
        inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
                 "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
                 "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
                 "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
                 "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
        layer = "model.layers."
    else:
        names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd",
                 "transformer.ln_f": "output_norm", "lm_head": "output"}
        inner = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
                 "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        layer = "transformer.h."
        weights = {key: np.ascontiguousarray(w.T) if pretrained.is_conv1d(key) else w
                   for key, w in weights.items()}
    if model.config.tie_word_embeddings and not model.config.embed_norm:
        del weights["lm_head.weight"]           # llama.cpp takes the token embedding then
    found = {}
    for key, w in weights.items():
        module, kind = key.rsplit(".", 1)
        if module.startswith(layer):
            i, module = module.removeprefix(layer).split(".", 1)
            found[f"blk.{i}.{inner[module]}.{kind}"] = w
        else:
            found[f"{names[module]}.{kind}"] = w
    return found


def write_gguf(model, folder, name):
    try:
        import gguf
    except ImportError:
        raise ImportError("format = 'gguf' needs gguf: pip install gguf") from None
    c, kind = model.config, pretrained.family(model.config)
    tokens, merges = vocabulary_and_merges()
    padding = [f"[PAD{i}]" for i in range(len(tokens) + 1, c.vocab_size)]
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] \
        + [gguf.TokenType.UNUSED] * len(padding)

    w = gguf.GGUFWriter(folder / "model.gguf", kind)
    w.add_name(name)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    w.add_context_length(c.block_size)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.n_inner)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_kv_head)
    if kind == "qwen3":
        w.add_layer_norm_rms_eps(1e-6)
        w.add_rope_freq_base(c.rope_theta)
        w.add_key_length(c.n_embd // c.n_head)
        w.add_value_length(c.n_embd // c.n_head)
    else:
        w.add_layer_norm_eps(1e-5)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([*tokens, "<|endoftext|>", *padding])
    w.add_token_types(kinds)
    w.add_token_merges([" ".join(pair) for pair in merges])
    w.add_bos_token_id(tokenizer.END_OF_TEXT)
    w.add_eos_token_id(tokenizer.END_OF_TEXT)
    w.add_add_bos_token(True)                   # as every document began that it learned from
    for key, tensor in gguf_tensors(model).items():
        w.add_tensor(key, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    (folder / "Modelfile").write_text(
        'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n'
        f"PARAMETER num_ctx {c.block_size}\nPARAMETER temperature 0.8\n"
        'PARAMETER stop "<|endoftext|>"\n', encoding="utf-8")


def check_gguf(model, folder):
    """Read the file back; raises ValueError unless it holds the bits of the model."""
    import gguf
    stored = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    wanted = gguf_tensors(model)
    wrong = [key for key in wanted.keys() | stored.keys() if key not in stored or key not in wanted
             or not np.array_equal(stored[key].reshape(-1), wanted[key].reshape(-1))]
    if wrong:
        raise ValueError(f"the GGUF file does not hold the model's {sorted(wrong)[0]}; "
                         "nothing is written")
    twin = pretrained.to_transformers(model)
    compare(model, lambda idx: twin(idx).logits)
    return f"read back: {len(stored)} tensors, every bit as in the model"


def main(cfg):
    run_folder = Path(checkpoint.run_folder(cfg.out_dir)) if cfg.init_from == "resume" else None
    source = run_folder or cfg.init_from
    model, name, settings = checkpoint.open_model(source)
    model.float().eval()
    path = checkpoint.in_folder(source)
    parts = checkpoint.load(path) if path else {}
    dataset = Path("data") / settings.get("dataset", "")
    if not isinstance(tokenizer.of_dataset(dataset), tokenizer.GPT2Tokenizer):
        raise ValueError(f"{name} learned the characters of {dataset}, "
                         "and an export needs GPT-2's vocabulary")
    pretrained.family(model.config)             # which refuses what no class there computes
    to = Path(cfg.to) if cfg.to else run_folder / "export"
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        ours = any((to / f).is_file() for f in ("config.json", "model.gguf"))
        if not (cfg.overwrite and ours):
            raise ValueError(f"{to} exists already" + (
                "; --overwrite replaces the export in it, --to=OTHER writes elsewhere" if ours else
                " and holds no export; --to=OTHER writes elsewhere"))

    print(f"{name}: {pretrained.family(model.config)}, {model.n_params()['total'] / 1e6:.1f} M "
          "parameters")
    beside = to.with_name(to.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        if cfg.format == "hf":
            write_hf(model, beside, card(model, name, parts, run_folder))
            if run_folder and (run_folder / "loss.png").is_file():
                shutil.copyfile(run_folder / "loss.png", beside / "loss.png")
            print(check_hf(model, beside, dataset))
        else:
            write_gguf(model, beside, to.resolve().name)
            print(check_gguf(model, beside))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(to, ignore_errors=True)
    os.replace(beside, to)
    size = sum(f.stat().st_size for f in to.iterdir()) / 2**20
    print(f"wrote {to} ({size:.0f} MiB)")
    if cfg.format == "gguf":
        print(f"    ollama create {to.resolve().name} -f {to}/Modelfile\n"
              f"    ollama run {to.resolve().name} \"The function returns\"")


if __name__ == "__main__":
    run(main, ExportConfig, __doc__)
