"""Checkpoints, which survive a crash: each file is complete, the old one or the new one.

ckpt.pt is the newest state of a run, best.pt the one with the lowest validation loss, stable.pt
the last one before the learning rate decays. They hold nanoGPT's keys (model, optimizer,
model_args, iter_num, best_val_loss, config), so that its sample.py reads them, and what an exact
resume needs.
"""
import os
import shutil
import zipfile
from pathlib import Path

import torch

from onecard import pretrained
from onecard.files import written_beside
from onecard.settings import UserError

NEWEST, BEST, STABLE = "ckpt.pt", "best.pt", "stable.pt"
FOLDER = 0x10                           # in external_attr of a zip's record
REQUIRED = ("model", "model_args", "iter_num")
TYPES = {"model": dict, "model_args": dict, "iter_num": int, "optimizer": dict, "scaler": dict,
         "best_val_loss": (int, float, torch.Tensor),   # nanoGPT's is a tensor
         "hours": (int, float), "rng": list, "config": dict}


def save(path, parts, copies=()):
    """Write the dict `parts` to `copies` and then to `path`, each of them atomically."""
    path = Path(path)
    try:
        with written_beside(path) as beside:
            torch.save(parts, beside)
            for other in copies:
                link_or_copy(beside, other)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        reason, free = str(error).partition("\n")[0], 0.0
        if path.parent.is_dir():
            free = shutil.disk_usage(path.parent).free / 2**30
        raise UserError(f"could not write {path} ({free:.1f} GiB free): {reason}. "
                        "It is as it was before") from error


def link_or_copy(source, path):
    """Make `path` the same file as `source`, atomically: by a hard link if possible."""
    with written_beside(path) as beside:
        try:
            os.link(source, beside)
        except OSError:                         # this disk has no links
            shutil.copyfile(source, beside)


def load(path, mmap=False):
    """The dict in a checkpoint file, its tensors on the CPU. Nothing in the file is executed.

    With `mmap`, the tensors stay on the disk: they need no memory.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run saves its first checkpoint after some "
                        "minutes")
    try:
        damaged, parts = damaged_record(path), None
        if not damaged:
            parts = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:                  # torch has a dozen types for a broken file
        raise UserError(f"{path} is not a checkpoint that can be read "
                        f"({type(error).__name__})") from error
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it is not what was written; use another "
                        "checkpoint")
    check_parts(path, parts)
    # what sampling does not need may be missing
    parts = {"best_val_loss": float("inf"), "optimizer": {}, **parts}
    parts["best_val_loss"] = float(parts["best_val_loss"])
    return parts


def damaged_record(path):
    """The name of a record of the zip file that is not what torch wrote, or None.

    torch.load looks at no checksum.
    """
    with zipfile.ZipFile(path) as records:
        for record in records.infolist():       # torch writes no compressed records, no folders
            if record.file_size != record.compress_size or record.external_attr & FOLDER:
                return record.filename
        return records.testzip()                # compares checksums


def check_parts(path, parts):
    """Raise UserError if a key is missing in a checkpoint, or its value has another type."""
    origin = f"{path} is not a checkpoint of this project or of nanoGPT"
    keys = parts.keys() if isinstance(parts, dict) else ()
    missing = [key for key in REQUIRED if key not in keys]
    if missing:
        raise UserError(f"{origin}: it has no {', '.join(missing)}")
    tensors = parts["model"].values() if isinstance(parts["model"], dict) else ()
    if any(type(w) is not torch.Tensor or w.layout is not torch.strided for w in tensors):
        raise UserError(f"{origin}: its model holds something that is no plain tensor")
    for key, types in TYPES.items():
        if key in parts and not isinstance(parts[key], types):
            raise UserError(f"{origin}: its {key} is of type {type(parts[key]).__name__}")
    loss = parts.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        raise UserError(f"{origin}: its best_val_loss has {loss.numel()} numbers")


def read(name):
    """Read a run's folder, a .pt file or a pretrained model; return (checkpoint dict, label).

    A pretrained model is OpenAI's 'gpt2', 'gpt2-medium', ..., or a folder of transformers.
    """
    is_file = Path(name).suffix == ".pt"
    path = Path(name) if is_file else best_or_newest(name)
    if path is None:
        return pretrained.read(str(name)), str(name)
    parts = load(path)
    return parts, f"{path}, step {parts['iter_num']:,}"


def best_loss(folder):
    """The validation loss of best.pt in `folder`; infinite if there is none."""
    path = Path(folder) / BEST
    if not path.is_file():
        return float("inf")
    try:
        return load(path, mmap=True)["best_val_loss"]
    except UserError as error:
        raise UserError(f"{error}. Delete {path}, and the run goes on from {NEWEST}") from None


def best_or_newest(folder):
    """The checkpoint that stands for a run: best.pt, else ckpt.pt, else None."""
    for name in (BEST, NEWEST):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def run_folder(out_dir=""):
    """The run in `out_dir`; "" is the newest under out*/. UserError where no checkpoint is."""
    folder = out_dir or newest_run()
    if not folder:
        raise UserError("there is no run under out*/ with a checkpoint yet; "
                        "`python train.py config/quickstart.py` makes one in a few minutes, "
                        "--out_dir= names another folder")
    if best_or_newest(folder) is None:
        raise UserError(f"{folder} holds no {NEWEST} or {BEST}")
    return Path(folder)


def newest_run():
    """The folder out* (or one inside it) that saved a checkpoint last, or None."""
    patterns = [f"{folder}/{name}" for folder in ("out*", "out*/*") for name in (BEST, NEWEST)]
    files = [file for pattern in patterns for file in Path().glob(pattern)]
    if not files:
        return None
    return max(files, key=lambda file: file.stat().st_mtime).parent
