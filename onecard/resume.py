"""How does a run start from a checkpoint, and go on exactly where it was?"""
import gc
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from onecard import checkpoint, optim, runtime
from onecard.files import write_text
from onecard.settings import UserError, config_text


@dataclass
class Progress:
    """How far a run is."""
    step: int = 0
    best_val_loss: float = math.inf
    hours: float = 0.0


@dataclass
class State:
    """All that changes while a run trains: what a checkpoint saves and a resume restores."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    fingerprint: str                    # of the data, which does not change


def goes_on(cfg):
    """Whether a run goes on from a checkpoint's step and optimizer, not only from its weights."""
    return cfg.init_from == "resume" or cfg.init_from.endswith(".pt")


def first_checkpoint(cfg):
    """The checkpoint (or the weights of transformers) that init_from names; None for a new model.

    Raises UserError if a run in out_dir would be lost.
    """
    used = checkpoint.in_folder(cfg.out_dir)
    if used and not (same_run(cfg) or cfg.overwrite or cfg.eval_only or cfg.dry_run):
        step = checkpoint.load(used)["iter_num"]
        raise UserError(f"{cfg.out_dir} holds a run at step {step:,}. --init_from=resume goes on "
                        "with it, --out_dir=OTHER starts beside it, --overwrite replaces it")
    if cfg.init_from == "scratch":
        return None
    if cfg.init_from == "resume":
        return checkpoint.load(Path(cfg.out_dir) / checkpoint.NEWEST)
    parts, _ = checkpoint.read(cfg.init_from)
    return parts


def same_run(cfg):
    """Whether the run goes on from a checkpoint that lies in its own folder."""
    if cfg.init_from == "resume":
        return True
    return goes_on(cfg) and Path(cfg.init_from).parent.resolve() == Path(cfg.out_dir).resolve()


def make_folder(cfg):
    """Make out_dir and its config.py. If another run is there, --overwrite was given: remove it."""
    out_dir = Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not same_run(cfg):
        for name in (checkpoint.NEWEST, checkpoint.BEST, checkpoint.STABLE, "log.jsonl"):
            (out_dir / name).unlink(missing_ok=True)
    write_text(out_dir / "config.py", config_text(cfg))


def check_same_run(state, parts, cfg):
    """Raise UserError if a checkpoint cannot go on with these settings on this data."""
    saved = parts.get("config", {})     # the settings that the run was started with
    config_class = type(state.model.config)
    ours = {**asdict(config_class.of(cfg)), "optimizer": cfg.optimizer}
    theirs = {**asdict(config_class(**parts["model_args"])), "optimizer": "adamw"}
    # the first version saved None for a setting that was derived from others
    theirs |= {name: saved[name] for name in theirs if saved.get(name) is not None}
    for name in ("dropout", "vocab_size"):      # may change; a character dataset has its own
        del ours[name]
    refuse(differences(theirs, ours), "Give the settings of that run, or another --out_dir")
    if cfg.force:
        return
    ours = {"dataset": state.fingerprint, "seed": cfg.seed, "tokens_per_step": tokens_per_step(cfg)}
    refuse(differences(parts, ours), "--force goes on all the same")
    if saved.get("lr_schedule") != "wsd" or cfg.lr_schedule != "wsd":
        return
    cooldown_start = saved["max_iters"] - round(saved["cooldown"] * saved["max_iters"])
    if cfg.max_iters > saved["max_iters"] and parts["iter_num"] > cooldown_start:
        raise UserError(f"this run began to cool down at step {cooldown_start:,}; a larger "
                        "max_iters would raise its learning rate again. "
                        f"--init_from={cfg.out_dir}/{checkpoint.STABLE} goes on from before that")


def differences(theirs, ours):
    """["n_layer is 12 there and 6 here", ...] of the settings that the checkpoint has, too."""
    return [f"{name} is {theirs[name]} there and {value} here" for name, value in ours.items()
            if name in theirs and theirs[name] != value]


def refuse(reasons, remedy):
    if reasons:
        raise UserError(f"cannot go on from this checkpoint: {'; '.join(reasons)}. {remedy}")


def tokens_per_step(cfg):
    return cfg.windows_per_step * cfg.block_size


def save(state, cfg, world, is_best, is_stable):
    """Write ckpt.pt, all that an exact resume needs, and copy it to best.pt and stable.pt."""
    gc.collect()                                # the training loop has switched it off
    rng = world.gather(runtime.rng_state(world.device))
    if not world.is_main:
        return
    model, progress, out_dir = state.model, state.progress, Path(cfg.out_dir)
    checkpoint.save(out_dir / checkpoint.NEWEST, {
        "model": model.state_dict(), "model_args": model.config.model_args(),
        "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(),
        "iter_num": progress.step, "best_val_loss": progress.best_val_loss,
        "hours": progress.hours, "rng": rng, "config": asdict(cfg), "dataset": state.fingerprint,
        "seed": cfg.seed, "tokens_per_step": tokens_per_step(cfg),
        "versions": runtime.versions()})
    if is_best:
        checkpoint.copy(out_dir / checkpoint.NEWEST, out_dir / checkpoint.BEST)
    if is_stable:                               # a longer run can go on from this one
        checkpoint.copy(out_dir / checkpoint.NEWEST, out_dir / checkpoint.STABLE)


def restore(state, parts, cfg, world):
    """Give `state` the optimizer, loss scale, random numbers and progress of a checkpoint."""
    check_same_run(state, parts, cfg)
    optim.load_state(state.optimizer, parts["optimizer"])
    if state.scaler.is_enabled() and parts.get("scaler"):
        state.scaler.load_state_dict(parts["scaler"])
    if world.rank < len(parts.get("rng", [])):
        runtime.set_rng_state(parts["rng"][world.rank], world.device)
    # from stable.pt, best.pt may be of a later step, and stays until a better one comes
    best = min(float(parts["best_val_loss"]), checkpoint.best_loss(cfg.out_dir))
    progress = state.progress
    progress.step, progress.best_val_loss = parts["iter_num"], best
    progress.hours = parts.get("hours", 0.0)
