"""What survives a crash? Files that are the old one or the new one, never half: ckpt.pt, best.pt.

ckpt.pt is the newest state of a run, best.pt the one with the lowest validation loss so far (of an
average of weights, if that has it), stable.pt the one before a cooldown of the learning rate. They
hold nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss, config), so that its
sample.py reads them, and what an exact continuation needs besides.
"""
import os
import shutil
import time
from pathlib import Path

import torch

import pretrained
from model import GPT, GPTConfig

NEWEST, BEST, STABLE = "ckpt.pt", "best.pt", "stable.pt"


def replace(beside, path):
    """Put the finished file `beside` in the place of `path`, which is then whole, or untouched."""
    with open(beside, "rb+") as f:
        os.fsync(f.fileno())
    for wait_s in (0.1, 0.5, 2.0, None):
        try:
            os.replace(beside, path)
            break
        except PermissionError:                 # Windows, while a virus scanner has the file open
            if wait_s is None:
                raise
            time.sleep(wait_s)
    if os.name == "posix":                      # the new name itself must reach the disk too
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save(parts, path):
    """Write the dict `parts` to `path`, atomically."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    try:
        torch.save(parts, beside)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        free_gib = shutil.disk_usage(path.parent).free / 2**30
        raise OSError(f"could not write {path} ({free_gib:.1f} GiB free): "
                      f"{str(error).splitlines()[0]}. "
                      "What was there before is unchanged") from error
    replace(beside, path)


def write_text(path, text):
    """Write `text` to `path`, atomically."""
    beside = Path(path).with_name(Path(path).name + ".new")
    beside.write_text(text, encoding="utf-8")
    replace(beside, path)


def copy(source, path):
    """Make `path` the same file as `source`, atomically: by a hard link, else by a copy."""
    beside = Path(path).with_name(Path(path).name + ".new")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    replace(beside, path)


def load(path):
    """The dict in a checkpoint file, its tensors on the CPU. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; "
                                "a run saves its first checkpoint after some minutes")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # torch has a dozen types for what is no checkpoint
        raise ValueError(f"{path} is not a checkpoint that can be read "
                         f"({type(error).__name__})") from error
    missing = [key for key in ("model", "model_args", "iter_num") if key not in parts]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this project or of nanoGPT: "
                         f"it has no {', '.join(missing)}")
    return parts


def load_model(parts, dropout=0.0):
    """The GPT of a checkpoint, on the CPU. nanoGPT's compiled models ('_orig_mod.') read too."""
    model = GPT(GPTConfig(**{**parts["model_args"], "dropout": dropout}))
    model.load_state_dict({key.removeprefix("_orig_mod."): tensor
                           for key, tensor in parts["model"].items()})
    return model


def in_folder(folder):
    """The checkpoint to use a run by: best.pt, else ckpt.pt, else None."""
    return next((Path(folder) / name for name in (BEST, NEWEST)
                 if (Path(folder) / name).is_file()), None)


def open_model(name, dropout=0.0):
    """(GPT on the CPU, what it is, settings of its run) of a run's folder or a checkpoint file.

    Or of what transformers has: 'gpt2', ..., or a folder in its format; then without settings.
    """
    path = Path(name) if Path(name).is_file() else in_folder(name)
    if path is None:
        return pretrained.read(str(name), dropout), str(name), {}
    parts = load(path)
    return (load_model(parts, dropout), f"{path}, step {parts['iter_num']:,}",
            parts.get("config", {}))


def run_folder(out_dir):
    """The run that `out_dir` names, '' the newest. Raises ValueError where no checkpoint is."""
    folder = out_dir or newest_run()
    if not folder:
        raise ValueError("there is no run under out*/ with a checkpoint yet; "
                         "`python train.py config/quickstart.py` makes one in a few minutes, "
                         "--out_dir= names another folder")
    if in_folder(folder) is None:
        raise ValueError(f"{folder} holds no {NEWEST} or {BEST}")
    return folder


def newest_run(where="."):
    """The folder `out*` (or one inside it) under `where` that saved a checkpoint last, or None."""
    files = [f for name in (BEST, NEWEST) for pattern in (f"out*/{name}", f"out*/*/{name}")
             for f in Path(where).glob(pattern)]
    return max(files, key=lambda f: f.stat().st_mtime).parent if files else None
