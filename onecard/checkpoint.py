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
         "best_val_loss": (int, float, torch.Tensor),
         "hours": (int, float), "rng": list, "config": dict}


def save(path, parts, copies=()):
    """Write the dict `parts` to `copies`, names beside `path`, and then to `path`, atomically."""
    path = Path(path)
    try:
        with written_beside(path) as beside:
            torch.save(parts, beside)
            for name in copies:
                link_or_copy(beside, path.with_name(name))
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        reason = str(error).partition("\n")[0]
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
    if not isinstance(parts, dict):
        parts = {}
    missing = [key for key in REQUIRED if key not in parts]
    if missing:
        raise UserError(f"{origin}: it has no {', '.join(missing)}")
    for key, types in TYPES.items():
        if key in parts and not isinstance(parts[key], types):
            raise UserError(f"{origin}: its {key} is of type {type(parts[key]).__name__}")
    if not all(isinstance(weight, torch.Tensor) for weight in parts["model"].values()):
        raise UserError(f"{origin}: its model holds something that is no tensor")
    loss = parts.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        raise UserError(f"{origin}: its best_val_loss has {loss.numel()} numbers")


def read(name):
    """Read a run's folder, a .pt file or a pretrained model; return (checkpoint dict, label).

    A pretrained model is OpenAI's 'gpt2', 'gpt2-medium', ..., or a folder of transformers.
    """
    path = Path(name) if Path(name).suffix == ".pt" else best_or_newest(name)
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
        return float(load(path, mmap=True).get("best_val_loss", "inf"))     # nanoGPT's is a tensor
    except UserError as error:
        raise UserError(f"{error}. Delete {path}, and the run goes on from {NEWEST}") from None


def best_or_newest(folder):
    """The checkpoint that stands for a run: best.pt, else ckpt.pt, else None."""
    for name in (BEST, NEWEST):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def source(init_from="resume", out_dir=""):
    """What init_from names: "resume" is the run in `out_dir`.

    Without out_dir, it is the run in out* or out*/* that saved a checkpoint last.
    """
    if init_from != "resume":
        return init_from
    if out_dir and best_or_newest(out_dir) is None:
        raise UserError(f"{out_dir} holds no {NEWEST} or {BEST}")
    if out_dir:
        return Path(out_dir)
    patterns = [f"{folder}/{name}" for folder in ("out*", "out*/*") for name in (BEST, NEWEST)]
    files = [file for pattern in patterns for file in Path().glob(pattern)]
    if not files:
        raise UserError("there is no run under out*/ with a checkpoint yet; "
                        "`python train.py config/quickstart.py` makes one in a few minutes, "
                        "--out_dir= names another folder")
    return max(files, key=lambda file: file.stat().st_mtime).parent
