"""Turn a trained model into what other tools open: a folder for transformers, a file for llama.cpp.

    python export.py                                            # the newest run, to its export/
    python export.py --out_dir=out --to=my-gpt                  # for transformers
    python export.py --out_dir=out --to=my-gpt --format=gguf    # for llama.cpp and Ollama

What is written is opened again and compared with the model before it gets its name. Needs
`pip install "transformers>=5" gguf`.
"""
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import open_model
from onecard import checkpoint, gguf, pretrained, tokenizers
from onecard.datafiles import folder_of
from onecard.settings import UserError, configure_and_run, one_of

TOLERANCE = 1e-4                    # between logits in fp32, as a share of the largest
CHECKED_IDS = 1_000_000             # of the run's val.bin, which the tokenizer is tested on
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT with {size:.1f} M parameters, trained on {dataset}. It continues text. It was not
tuned for chat or for safety. Begin each text with `<|endoftext|>`, as in training:

    from transformers import pipeline
    print(pipeline("text-generation", "THIS FOLDER")("<|endoftext|>The function returns"))
"""


@dataclass(frozen=True)
class ExportConfig:
    out_dir: str = ""               # run to export; "" = the newest under out*/
    init_from: str = "resume"       # resume (the run in out_dir), gpt2, ..., a folder or a file
    to: str = ""                    # folder to write; "" = export/ in the run's folder
    format: str = "hf"              # hf (transformers and all that reads its folders) or gguf

    def __post_init__(self):
        one_of(self, format=("hf", "gguf"))
        if self.init_from != "resume" and not self.to:
            raise UserError(f"with init_from = {self.init_from!r}, --to=FOLDER must say where to "
                            "write")


def write_hf(folder, theirs, card):
    """Write `theirs`, from pretrained.to_transformers, with GPT-2's tokenizer to `folder`."""
    import transformers
    theirs.save_pretrained(folder)
    tokens, merges = pretrained.vocabulary_and_merges()
    context = theirs.config.max_position_embeddings
    transformers.GPT2Tokenizer(tokens, merges, model_max_length=context).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_hf(folder, model, dataset):
    """Open the folder as a user does, and compare it with `model`. Returns what was compared."""
    import transformers
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    difference = compare_logits(model, exported)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    n_ids = 0
    for document in own_documents(dataset):
        is_gpt2 = max(document, default=0) < tokenizers.N_VOCAB
        if is_gpt2:
            text = tokenizers.gpt2().decode(document)
            # if "<|endoftext|>" stands in a text, transformers reads the special token
            ids = hf_tokenizer(text, verbose=False)["input_ids"]        # no warning of a long text
            is_gpt2 = "<|endoftext|>" in text or ids == document
        if not is_gpt2:
            raise UserError(f"the dataset {dataset} has other tokens than GPT-2's tokenizer makes, "
                            "so other programs cannot use this model; nothing is written")
        n_ids += len(document)
    report = f"logits differ by {difference:.0e} at most"
    if n_ids:
        report += f", {n_ids:,} tokens of its text are the same"
    return report


def own_documents(dataset):
    """Documents of a dataset's val.bin, lists of ids; none if it is not on the disk."""
    try:
        path = folder_of(dataset) / "val.bin"
    except UserError:                   # the path of a folder that is no longer there
        return []
    if not path.is_file():
        return []
    ids = np.fromfile(path, np.uint16, count=CHECKED_IDS)
    starts = np.flatnonzero(ids == tokenizers.END_OF_TEXT)
    return [ids[begin + 1:end].tolist()
            for begin, end in zip(starts[:-1], starts[1:], strict=True)]


@torch.inference_mode()
def compare_logits(model, theirs):
    """The largest difference between the logits of both. RuntimeError if it is too large."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(tokenizers.N_VOCAB, (2, model.config.block_size), generator=generator)
    logits = model(idx)                                                       # (2, T, V)
    difference = (logits - theirs(idx).logits).abs().max().item()
    limit = TOLERANCE * max(1.0, logits.abs().max().item())
    if not difference <= limit:         # written so that nan fails, too
        raise RuntimeError(f"the exported model gives other logits: they differ by "
                           f"{difference:.1e}, the limit is {limit:.1e}; nothing is written")
    return difference


def main(cfg):
    source = checkpoint.source(cfg.init_from, cfg.out_dir)
    to = Path(cfg.to or Path(source) / "export")
    if to.exists():
        raise UserError(f"{to} is there already, and stays as it is; --to=OTHER writes elsewhere")
    opened = open_model(source)
    model, label = opened.model, opened.label
    if opened.tokenizer.identity != tokenizers.VOCABULARY_SHA256:
        raise UserError(f"{label} has a vocabulary of its own ({model.config.vocab_size} ids), "
                        "and an export needs GPT-2's")
    size = model.count_parameters()["total"] / 1e6
    print(f"{label}: {pretrained.kind_of(model.config)}, {size:.1f} M parameters")
    theirs = pretrained.to_transformers(model.config, model.state_dict())
    name = Path(source).resolve().name

    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{to.name}.", dir=to.parent) as beside:
        folder = Path(beside) / to.name
        folder.mkdir()
        if cfg.format == "hf":
            card = CARD.format(name=name, size=size, dataset=opened.dataset or "unknown text")
            write_hf(folder, theirs, card)
            report = check_hf(folder, model, opened.dataset)
        else:
            compare_logits(model, theirs)
            gguf.write(folder, theirs, name)
            report = gguf.check(folder, theirs)
        os.replace(folder, to)
    print(f"wrote {to} and opened it again: {report}")
    if cfg.format == "gguf":
        print(f"    ollama create {name} -f {to}/Modelfile\n    ollama run {name}")


if __name__ == "__main__":
    configure_and_run(main, ExportConfig, __doc__)
