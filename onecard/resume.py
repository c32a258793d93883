"""How does a run start from a checkpoint, and go on exactly where it was?"""
import gc
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from onecard import checkpoint, optim, runtime, tokenizers
from onecard.datafiles import folder_of
from onecard.files import lock, write_text
from onecard.settings import UserError, config_text

FILES = (checkpoint.NEWEST, checkpoint.BEST, checkpoint.STABLE, "log.jsonl")


@dataclass
class Progress:
    """How far a run is."""
    step: int = 0
    saved_step: int = 0                 # of the newest checkpoint
    val_loss: float = math.inf          # of the last evaluation
    best_val_loss: float = math.inf     # of best.pt
    hours: float = 0.0
    holds_old_run: bool = False         # out_dir has another run's files until the first save
    wandb_id: str = ""
    fitted_hours: float = 0.0           # the setting `hours` to which max_iters was fitted


@dataclass
class State:
    """What a checkpoint saves and a resume restores."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    fixed: dict                         # what does not change, see fixed_parts()


def goes_on(cfg):
    """Whether a run goes on from a checkpoint's step and optimizer, not only from its weights."""
    return cfg.init_from == "resume" or cfg.init_from.endswith(".pt")


def checkpoint_to_start_from(cfg, world):
    """The checkpoint (or the weights of transformers) that init_from names; None for a new model.

    Raises UserError if a run in out_dir would be lost, or still trains.
    """
    if world.is_main and Path(cfg.out_dir).is_dir() and not (cfg.eval_only or cfg.dry_run):
        lock(cfg.out_dir, "training")           # before its checkpoint is read
    used = files_of_run(cfg, (checkpoint.NEWEST, checkpoint.BEST, checkpoint.STABLE))
    if used and not (in_own_folder(cfg) or cfg.overwrite or cfg.eval_only or cfg.dry_run):
        name = "resume" if used[0].name == checkpoint.NEWEST else used[0]
        raise UserError(f"{cfg.out_dir} holds a run ({used[0].name}). --init_from={name} goes on "
                        "with it, --out_dir=OTHER starts beside it, --overwrite replaces it")
    if cfg.init_from == "scratch":
        return None
    if cfg.init_from == "resume":
        return checkpoint.load(Path(cfg.out_dir) / checkpoint.NEWEST)
    parts, _ = checkpoint.read(cfg.init_from)
    return parts


def files_of_run(cfg, names):
    """The paths of those of these files that are in out_dir."""
    return [Path(cfg.out_dir) / name for name in names if (Path(cfg.out_dir) / name).is_file()]


def in_own_folder(cfg):
    """Whether the run goes on from a checkpoint that lies in its own folder."""
    if cfg.init_from == "resume":
        return True
    return goes_on(cfg) and Path(cfg.init_from).parent.resolve() == Path(cfg.out_dir).resolve()


def open_folder(cfg, progress):
    """Make out_dir. Files of an older run stay in it until the first save."""
    make_folder(cfg)
    used = files_of_run(cfg, FILES)
    if not used and files_of_run(cfg, ["config.py"]):
        raise UserError(f"{cfg.out_dir} holds a config.py, which a run would replace; set another "
                        "--out_dir")
    progress.holds_old_run = bool(used) and cfg.init_from != "resume"


def make_folder(cfg):
    """Make out_dir, also if somebody moved it away, and keep other runs out of it."""
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    lock(cfg.out_dir, "training")


def check_tokenizer(cfg, saved, tokenizer, world):
    """Raise UserError if the model of a checkpoint reads other ids than the dataset has."""
    if not tokenizers.is_recorded(folder_of(cfg.dataset)):
        meaning = "are taken for GPT-2's"
        if tokenizer.identity == tokenizers.UnknownTokenizer.identity:
            meaning = "can be trained on, but not become text"
        world.print(f"warning    {cfg.dataset} does not say which tokenizer made its ids; they "
                    f"{meaning}")
    if saved and tokenizers.of_checkpoint(saved).identity != tokenizer.identity and not cfg.force:
        raise UserError(f"the ids of dataset = {cfg.dataset!r} mean other texts than those of "
                        f"the model of init_from = {cfg.init_from!r}. --force trains it all the "
                        "same, as if it was new")


def fixed_parts(run_plan, train_data, val_data, tokenizer):
    """What does not change while a run trains; a checkpoint keeps it."""
    return {"dataset": train_data.fingerprint, "val_dataset": val_data.fingerprint,
            "tokenizer": tokenizer.identity, "seed": run_plan.cfg.seed,
            "tokens_per_step": run_plan.tokens_per_step, "val_windows": run_plan.val_windows,
            "fit": asdict(run_plan.fit)}


def keep_max_iters(cfg, past, world):
    """A run that was fitted to its hours, and is resumed, keeps its number of steps."""
    fitted = past.get("fitted_hours", 0) if cfg.init_from == "resume" else 0
    if not fitted or cfg.hours not in (0, fitted):
        return cfg
    steps = past["config"]["max_iters"]
    world.print(f"hours      this run was fitted to {fitted:g} hours: it ends after {steps:,} "
                "steps")
    return replace(cfg, hours=fitted, max_iters=steps,
                   lr_decay_iters=past["config"]["lr_decay_iters"])


def check_settings(state, parts, cfg):
    """Raise UserError if a checkpoint cannot go on with these settings on this data."""
    saved = parts.get("config", {})     # the settings that the run was started with
    # nanoGPT has fewer of them, and the first version saved None for one that it derived
    theirs = {**asdict(state.model.config), **parts["model_args"], "optimizer": "adamw"}
    theirs |= {name: saved[name] for name in theirs if saved.get(name) is not None}
    # dropout may change; the dataset has vocab_size
    ours = {name: getattr(cfg, name) for name in theirs if name not in ("dropout", "vocab_size")}
    refuse_differences(theirs, ours, "Give the settings of that run, or another --out_dir")
    if cfg.force:
        return
    ours = {name: value for name, value in state.fixed.items() if name not in ("tokenizer", "fit")}
    refuse_differences(parts, ours, "--force goes on all the same")
    check_rate(parts["iter_num"], saved, cfg)


def check_rate(step, saved, cfg):
    """Raise UserError if the learning rate of a run would rise again within its decay."""
    known = {name: value for name, value in saved.items() if value is not None}
    old = SimpleNamespace(**asdict(type(cfg)()) | known)        # nanoGPT has fewer settings
    before, now = optim.lr_at(step, old), optim.lr_at(step, cfg)
    decays = step > old.warmup_iters and before < old.learning_rate
    if decays and cfg.hours not in (0, old.hours):
        raise UserError(f"this run decays its learning rate already, so --hours={cfg.hours:g} can "
                        f"no longer change its length. Give --hours={old.hours:g}, or begin before "
                        f"the decay (with wsd: --init_from={cfg.out_dir}/{checkpoint.STABLE})")
    if decays and now > before:
        raise UserError(f"this run decays its learning rate, which would rise from {before:.3g} to "
                        f"{now:.3g} with these settings of the schedule. Give its own, or --force; "
                        f"with wsd, --init_from={cfg.out_dir}/{checkpoint.STABLE} goes on from "
                        "before the decay")


def refuse_differences(theirs, ours, remedy):
    """Raise UserError if the checkpoint has another value of one of our settings."""
    reasons = [f"{name} is {theirs[name]} there and {value} here" for name, value in ours.items()
               if name in theirs and theirs[name] != value]
    if reasons:
        raise UserError(f"cannot go on from this checkpoint: {'; '.join(reasons)}. {remedy}")


def save(state, cfg, world, is_best, is_stable):
    """Write ckpt.pt, all that an exact resume needs, and copy it to best.pt and stable.pt.

    If that fails, the run goes on, and best.pt and best_val_loss stay as they were.
    """
    gc.collect()                                # the training loop has switched it off
    rng = world.gather(runtime.rng_state(world.device))
    model, progress, out_dir = state.model, state.progress, Path(cfg.out_dir)
    replaces = progress.holds_old_run and not in_own_folder(cfg)
    best_val_loss, names = progress.best_val_loss, [checkpoint.NEWEST]
    if is_best:
        best_val_loss = progress.val_loss
    if is_best or replaces:                     # best.pt of the old run must not stay
        names.append(checkpoint.BEST)
    if is_stable:                               # a longer run can go on from this one
        names.append(checkpoint.STABLE)
    parts = {
        **state.fixed, "model": model.state_dict(), "model_args": model.config.model_args(),
        "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(),
        "iter_num": progress.step, "best_val_loss": best_val_loss, "hours": progress.hours,
        "wandb_id": progress.wandb_id, "fitted_hours": progress.fitted_hours, "rng": rng,
        "config": asdict(cfg), "versions": runtime.versions()}
    if world.is_main:
        try:
            make_folder(cfg)
            checkpoint.save(out_dir / checkpoint.NEWEST, parts, names[1:])
        except (UserError, OSError) as error:
            world.print(f"warning    step {progress.step:,} is not saved ({', '.join(names)}): "
                        f"{error}")
            return
        try:
            write_text(out_dir / "config.py", config_text(cfg))
            if replaces:                        # what the older run left
                for name in set(FILES) - set(names):
                    (out_dir / name).unlink(missing_ok=True)
        except OSError as error:
            world.print(f"warning    {error}")
    progress.best_val_loss, progress.saved_step = best_val_loss, progress.step
    progress.holds_old_run = False


def check_saved(progress, world):
    """Raise UserError if the last save failed."""
    if world.is_main and progress.saved_step != progress.step:
        raise UserError(f"step {progress.step:,} could not be saved, as the warning above says; "
                        f"the last one that was saved is {progress.saved_step:,}")


def restore(state, parts, cfg, world):
    """Give `state` the optimizer, loss scale, random numbers and progress of a checkpoint."""
    check_settings(state, parts, cfg)
    optim.load_state(state.optimizer, parts.get("optimizer", {}))
    try:
        if parts.get("scaler"):
            state.scaler.load_state_dict(parts["scaler"])
        if world.rank < len(parts.get("rng", [])):
            runtime.set_rng_state(parts["rng"][world.rank], world.device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError("this checkpoint has no scaler or rng that torch can use: "
                        f"{error}") from None
    progress = state.progress
    progress.step = progress.saved_step = parts["iter_num"]
    progress.hours = parts.get("hours", 0.0)
    if in_own_folder(cfg):
        # best.pt may be of a later step than `parts`, and stays until a better one comes
        progress.best_val_loss = checkpoint.best_loss(cfg.out_dir)
        progress.wandb_id = parts.get("wandb_id", "")
    if cfg.init_from == "resume":               # from stable.pt, hours are fitted anew
        progress.fitted_hours = parts.get("fitted_hours", 0.0)
