"""
Train a GPT on a prepared dataset, on one GPU, on a CPU, or on several GPUs.

    python train.py config/quickstart.py                    # a first GPT, on any computer
    python train.py config/train_fineweb_4070_one_shard.py  # the real run, on one graphics card
    python train.py config/train_fineweb_4070_one_shard.py --init_from=resume   # go on with it
    torchrun --standalone --nproc_per_node=2 train.py config/train_gpt2.py      # several cards

Ctrl-C finishes the step, saves and exits; a second one exits at once. `--help` lists every setting.
"""
import gc
import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import loader
import optim
import plan
import plot
import prepare
import pretrained
import runtime
import sources
import tokenizer
from configurator import run, write_config_file
from eval import evaluate
from model import GPT, GPTConfig, model_args
from plan import tokens_per_step
from runtime import smaller_when_full


@dataclass(frozen=True)
class TrainConfig(GPTConfig):
    # where it goes
    out_dir: str = "out"                    # the run's ckpt.pt, best.pt, log.jsonl, config.py
    eval_interval: int = 2000               # steps from one evaluation to the next
    log_interval: int = 1                   # steps from one line of log.jsonl to the next
    eval_iters: int = 200                   # always val's first eval_iters x batch_size windows
    eval_only: bool = False                 # evaluate once and exit
    always_save_checkpoint: bool = True     # save at every evaluation; False: when val improved
    save_minutes: float = 10.0              # save ckpt.pt also when the last save is this old
    max_hours: float = 0.0                  # save and stop then, to go on another day; 0 = no limit
    init_from: str = "scratch"              # scratch, resume (from out_dir), gpt2, ..., or a folder
    overwrite: bool = False                 # start over in out_dir, replacing the run there
    force: bool = False                     # run what the plan refuses; resume on changed data
    dry_run: bool = False                   # print the plan and exit
    # wandb, tensorboard
    wandb_log: bool = False                 # also log to Weights & Biases
    wandb_project: str = "owt"              # project there
    wandb_run_name: str = "gpt2"            # name of the run there
    tensorboard_log: bool = False           # also write TensorBoard's files into out_dir
    # data
    dataset: str = "openwebtext"            # folder under data/
    gradient_accumulation_steps: int = 40   # micro-batches in a step, over all GPUs
    batch_size: int = 12                    # windows in a micro-batch, decides the memory; 0: fits
    tokens_per_step: int = 0                # decides the accumulation; 0 = as the two above give it
    seed: int = 1337                        # of the weights, the data order and dropout
    # model: block_size, n_layer, ... are GPTConfig's
    bias: bool = False                      # in Linear and LayerNorm; False: a bit better, faster
    # optimizer
    optimizer: str = "adamw"                # adamw, or muon: for the blocks' matrices, adamw beside
    learning_rate: float = 6e-4             # at the peak; of muon about 0.02
    max_iters: int = 600000                 # steps in all
    weight_decay: float = 0.1               # on matrices, not on biases and norms
    beta1: float = 0.9                      # AdamW's memory of the gradient
    beta2: float = 0.95                     # AdamW's memory of its square
    grad_clip: float = 1.0                  # clip gradients to this norm; 0 = never
    decay_lr: bool = True                   # warm up and decay; False: learning_rate all the way
    lr_schedule: str = "cosine"             # cosine, or wsd: warm up, stay, cool down to the end
    warmup_iters: int = 2000                # steps of warm-up
    lr_decay_iters: int = 600000            # of cosine: step where min_lr is reached: max_iters
    cooldown: float = 0.4                   # of wsd: this share of max_iters, linear to min_lr
    min_lr: float = 6e-5                    # learning rate at the end, usually a tenth of the peak
    # of optimizer = 'muon' only
    embedding_lr: float = 0.25              # of wte (half of it for wve), times sqrt(768 / n_embd)
    head_lr: float = 0.003                  # of lm_head and of a wte tied to it, likewise
    scalar_lr: float = 0.006                # of norms, biases and wpe
    embedding_weight_decay: float = 0.001   # of wte
    head_weight_decay: float = 0.01         # of lm_head
    momentum: float = 0.95                  # of the matrices, from 0.85 at the start
    momentum_warmup: int = 300              # steps until it is there
    muon_beta2: float = 0.95                # memory of each output's size (NorMuon); 0 = none
    cautious: bool = True                   # weight decay only where the update shrinks it too
    # many epochs
    ema_half_life: int = 0                  # steps; also evaluate an average of the weights; 0: no
    patience: int = 0                       # stop after so many evaluations without a best; 0: no
    # machine
    backend: str = "auto"                   # of torchrun: nccl (CUDA), gloo (else)
    device: str = "auto"                    # cuda, cuda:1, mps, cpu; auto takes the best there is
    dtype: str = "auto"                     # bfloat16, float16 (loss scaling), float32; auto: best
    compile: bool = True                    # torch.compile: a minute at the start, much faster then

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_interval", "log_interval", "eval_iters",
                     "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.batch_size < 0:
            raise ValueError(f"batch_size = {self.batch_size} is a number of windows; "
                             "0 takes what fits")
        chunk = max(self.batch_size, 1) * self.block_size
        if self.tokens_per_step % chunk:
            raise ValueError(f"tokens_per_step = {self.tokens_per_step:,} is not a multiple of "
                             f"{'batch_size x ' * (self.batch_size > 0)}block_size = {chunk:,}. "
                             f"Nearest that works: {max(self.tokens_per_step // chunk, 1) * chunk}")
        if not self.batch_size and not self.tokens_per_step:
            raise ValueError("batch_size = 0 takes what fits, and needs tokens_per_step to know "
                             "how much a step is")
        if self.batch_size and self.tokens_per_step:    # a frozen dataclass's only way to derive
            object.__setattr__(self, "gradient_accumulation_steps", self.tokens_per_step // chunk)
        for name, known in dict(optimizer=("adamw", "muon"), lr_schedule=("cosine", "wsd")).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}; use {' or '.join(known)}")
        for name in ("learning_rate", "ema_half_life", "patience", "momentum_warmup"):
            if getattr(self, name) < 0 or name == "learning_rate" and not self.learning_rate:
                raise ValueError(f"{name} = {getattr(self, name)} cannot be negative"
                                 f"{' or 0' * (name == 'learning_rate')}")
        every_other = (self.n_layer + 1) // 2
        if self.n_value_table > every_other:
            raise ValueError(f"n_value_table = {self.n_value_table}, but of {self.n_layer} blocks "
                             f"every other one uses a table. Nearest that works: {every_other}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown = {self.cooldown} is a share of max_iters, from 0 to 1")
        wsd = self.decay_lr and self.lr_schedule == "wsd"
        if wsd and optim.cooldown_start(self) < self.warmup_iters:
            raise ValueError(
                f"warmup_iters = {self.warmup_iters} reaches into the cooldown, which starts at "
                f"step {optim.cooldown_start(self)} (max_iters = {self.max_iters}, cooldown = "
                f"{self.cooldown:g}). Nearest that works: --warmup_iters="
                f"{optim.cooldown_start(self)}")
        if self.decay_lr and not wsd and self.lr_decay_iters <= self.warmup_iters:
            raise ValueError(f"lr_decay_iters = {self.lr_decay_iters} must come after "
                             f"warmup_iters = {self.warmup_iters}, or set --decay_lr=False")

    @classmethod
    def complete(cls, settings, in_files):
        """`settings` where batch_size = 0 keeps the tokens of a step that a config file gives."""
        if settings.get("batch_size") == 0 and not settings.get("tokens_per_step"):
            batch_size = in_files.get("batch_size") or cls.batch_size
            others = (settings.get(name, getattr(cls, name))
                      for name in ("gradient_accumulation_steps", "block_size"))
            return {**settings, "tokens_per_step": math.prod((batch_size, *others))}
        return settings


MUON_ONLY = ("embedding_lr", "head_lr", "scalar_lr", "embedding_weight_decay", "head_weight_decay",
             "momentum", "momentum_warmup", "muon_beta2", "cautious")


def ignored(cfg):
    """Sentences that name settings which were changed and change nothing."""
    wsd, model, muon = cfg.lr_schedule == "wsd", GPTConfig(**model_args(cfg)).resolved(), \
        cfg.optimizer == "muon"
    idle = {"optimizer = 'adamw'": () if muon else MUON_ONLY,
            "tie_word_embeddings = True": ("embedding_weight_decay",)
            + ("embedding_lr",) * (not model.n_value_table)
            if muon and model.tie_word_embeddings else (),
            "decay_lr = False": ("lr_schedule", "cooldown") if not cfg.decay_lr else (),
            f"lr_schedule = {cfg.lr_schedule!r}": ("lr_decay_iters" if wsd else "cooldown",),
            "position = 'learned'": ("rope_theta",) if model.position == "learned" else ()}
    for why, names in idle.items():
        changed = [name for name in names if getattr(cfg, name) != getattr(TrainConfig, name)]
        if changed:
            yield f"with {why}, {', '.join(changed)} change{'s' * (len(changed) == 1)} nothing"


def not_exportable(config):
    """A sentence where a model of `config` opens in this project only, and what keeps it there."""
    try:
        pretrained.family(config)
    except ValueError as why:
        yield f"{why}, so export.py will refuse it"


# data

def ensure_prepared(dataset, world):
    """Prepare data/<dataset> if it is not, where there is one parquet file that it can mean."""
    folder = prepare.DATA / dataset
    for unfinished in folder.glob("meta*.json.new") if world.is_main else ():
        # its files are whole, a kill came between their renames
        prepare.commit(folder, unfinished.name.removeprefix("meta").removesuffix(".json.new"))
    if world.is_main and not loader.is_prepared(folder):
        source = sources.find_parquet(dataset)
        print(f"{folder} is not prepared yet: doing that first, from {source}")
        command = [sys.executable, prepare.__file__, f"--dataset={dataset}"]
        command += ["--sample"] if dataset == "sample" else [str(source)]
        if subprocess.run(command).returncode:  # its own process: its workers need not load torch
            sys.exit(1)
    world.wait()
    return folder


# model

def build_model(cfg, parts, folder):
    """The GPT to train: from a checkpoint's `parts`, from pretrained weights, or new."""
    if parts:
        return checkpoint.load_model(parts, dropout=cfg.dropout)
    if cfg.init_from == "scratch":
        vocabulary = tokenizer.of_dataset(folder)
        size = cfg.vocab_size if isinstance(vocabulary, tokenizer.GPT2Tokenizer) \
            else vocabulary.n_vocab
        return GPT(GPTConfig(**{**model_args(cfg), "vocab_size": size}))
    model = checkpoint.open_model(cfg.init_from, cfg.dropout)[0]
    if cfg.block_size != model.config.block_size:
        model.crop_block_size(cfg.block_size)
    return model


def load_resume(cfg, world):
    """The newest checkpoint of out_dir to resume, None for a new run; refuses to lose work."""
    newest, used = Path(cfg.out_dir) / checkpoint.NEWEST, checkpoint.in_folder(cfg.out_dir)
    if cfg.init_from != "resume":
        if used and not (cfg.overwrite or cfg.eval_only or cfg.dry_run):
            at = checkpoint.load(used)["iter_num"]
            raise ValueError(f"{cfg.out_dir} holds a run at step {at:,}. "
                             "--init_from=resume goes on with it, "
                             "--out_dir=OTHER starts beside it, "
                             "--overwrite starts over and replaces it")
        return None
    parts = before_cooldown(checkpoint.load(newest), cfg)
    # what was asked for when it began; a vocabulary may have been smaller
    config = parts.get("config", {})
    asked = {k: v for k, v in config.items() if k in GPTConfig.__annotations__}
    then, now = (asdict(GPTConfig(**args).resolved()) for args in (
        {**parts["model_args"], **asked}, model_args(cfg)))
    changed = [k for k, v in now.items() if k not in ("dropout", "vocab_size") and then[k] != v]
    set_here = [k for k in changed if getattr(cfg, k) is not None
                and (getattr(cfg, k) or k not in ("n_inner", "n_kv_head"))]
    changed = [f"{k} is {then[k]} there and {now[k]} here" for k in set_here or changed]
    optimizer = config.get("optimizer", "adamw")
    if optimizer != cfg.optimizer:
        changed.append(f"optimizer is {optimizer} there and {cfg.optimizer} here")
    if changed:
        raise ValueError(f"cannot resume {newest}: {'; '.join(changed)}. "
                         "Weights and what an optimizer remembers fit one shape only; give the "
                         "settings of that run, or start another --out_dir")
    return parts


def asked_before(cfg, parts):
    """The settings of the run that `parts` are of, and today's where it had none of that name."""
    return SimpleNamespace(**{**asdict(cfg), **parts.get("config", {})})


def before_cooldown(parts, cfg):
    """`parts`, or stable.pt where they are in a cooldown that a longer run has not come to yet.

    Only from before it does a longer run go on without a jump of the learning rate.
    """
    then = asked_before(cfg, parts)
    began = optim.cooldown_start(then)
    if not {cfg.lr_schedule, then.lr_schedule} == {"wsd"} or not cfg.decay_lr \
            or parts["iter_num"] <= began or optim.cooldown_start(cfg) <= began:
        return parts
    stable = Path(cfg.out_dir) / checkpoint.STABLE
    if not stable.is_file():
        if cfg.force:
            return parts
        raise ValueError(
            f"{cfg.out_dir} is at step {parts['iter_num']:,}, its learning rate has come down from "
            f"step {began:,} on, and max_iters = {cfg.max_iters:,} would raise it again, which "
            f"costs more than it gives; {stable}, from before that, is not there. "
            "--force does it all the same")
    before = checkpoint.load(stable)
    before["best_val_loss"] = min(before["best_val_loss"], parts["best_val_loss"])
    return before


def cools_at_once(cfg, parts):
    """Whether a run that is resumed with fewer steps than planned starts inside its cooldown."""
    then = asked_before(cfg, parts)
    return {cfg.lr_schedule, then.lr_schedule} == {"wsd"} and cfg.decay_lr \
        and optim.cooldown_start(cfg) <= parts["iter_num"] <= optim.cooldown_start(then)


def jump(cfg, parts):
    """(learning rate of this step before, and now), or None where a resumed run keeps it down."""
    then, step = asked_before(cfg, parts), parts["iter_num"]
    before, after = optim.lr_at(step, then), optim.lr_at(step, cfg)
    warm = step >= max(cfg.warmup_iters, then.warmup_iters)
    return (before, after) if warm and after > 1.2 * before else None


def check_continues(cfg, parts, data):
    """Refuse to resume on other data, order or step size, which would break the run in silence."""
    new = {"dataset": data.fingerprint, "seed": cfg.seed, "tokens_per_step": tokens_per_step(cfg)}
    changed = [f"{k} is {parts[k]} there and {v} here" for k, v in new.items()
               if k in parts and parts[k] != v]
    if changed and not cfg.force:
        raise ValueError(f"cannot resume {cfg.out_dir}: {'; '.join(changed)}. "
                         "--force resumes all the same")


# while it runs

def stop_requested():
    """An event that the first SIGINT or SIGTERM sets; the second one kills the process at once."""
    asked = threading.Event()

    def on_signal(number, frame):
        asked.set()
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)
        tqdm.write("\nstopping: finishing this step and saving (once more = stop at once)",
                   file=sys.stderr)

    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, on_signal)
    return asked


def accumulate(forward, micro_batches, micro_steps, world, autocast, scaler):
    """Add a step's gradients up; returns its mean loss over all micro-batches of this process."""
    step_loss = torch.zeros((), device=world.device)
    for m in range(micro_steps):
        idx, targets = next(micro_batches)
        if world.size > 1:
            forward.require_backward_grad_sync = m == micro_steps - 1
        with autocast:
            loss = forward(idx, targets) / micro_steps
        scaler.scale(loss).backward()
        step_loss += loss.detach()
    return step_loss


class Log:
    """log.jsonl of a run, from step `at` on: lines of later steps, of a killed run, are dropped."""

    def __init__(self, path, at):
        kept = []
        if at is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    kept += [line] * (json.loads(line)["step"] <= at)
                except ValueError:
                    continue                # a line that was being written when the power went
        checkpoint.write_text(path, "".join(line + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, **entry):
        self.file.write(json.dumps(entry) + "\n")


def draw(out_dir, say):
    """The run's loss.png, where matplotlib is there; a picture never stops a run."""
    try:
        plot.draw([plot.read(out_dir)], out_dir / "loss.png")
    except ImportError:
        pass
    except Exception as error:
        say(f"warning    loss.png was not drawn: {type(error).__name__}: {error}")


def trackers(cfg, step):
    """[(log({name: number}, step), finish())] of the services that the settings turn on."""
    found = []
    if cfg.wandb_log:
        try:
            import wandb
        except ImportError:
            raise ImportError("wandb_log = True needs wandb: "
                              "pip install wandb, or set --wandb_log=False") from None
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg),
                   resume="allow" if step else None)
        found.append((lambda numbers, step: wandb.log({"iter": step, **numbers}, step=step),
                      wandb.finish))
    if cfg.tensorboard_log:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("tensorboard_log = True needs tensorboard: pip install tensorboard, "
                              "or set --tensorboard_log=False") from None
        writer = SummaryWriter(cfg.out_dir, purge_step=step + 1 if step else None)

        def log(numbers, step):
            for name, number in numbers.items():
                if number is not None:
                    writer.add_scalar(name, number, step)
        found.append((log, writer.close))
    return found


def main(cfg):
    # where am I
    world = runtime.start(cfg.device, cfg.backend)
    device, out_dir = world.device, Path(cfg.out_dir)
    say = (lambda text: tqdm.write(text, file=sys.stdout)) if world.is_main else lambda text: None
    dtype = runtime.pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
    if cfg.compile:
        obstacle = runtime.compile_obstacle(device)
        if obstacle:
            say(f"torch.compile cannot work here, going on without it (slower): {obstacle}")
            cfg = replace(cfg, compile=False)
    shared, n = ("gradient_accumulation_steps", cfg.gradient_accumulation_steps) \
        if cfg.batch_size else ("tokens_per_step / block_size",
                                tokens_per_step(cfg) // cfg.block_size)
    if n % world.size:
        nearest = max(n // world.size, 1) * world.size
        raise ValueError(f"{shared} = {n} is not a multiple of the {world.size} processes. "
                         f"Nearest that works: {nearest}")

    # data, model, and whether they fit together and go on with what was
    parts = load_resume(cfg, world)
    folder = ensure_prepared(cfg.dataset, world)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, parts, folder)
    data = loader.Dataset(folder, "train", cfg.block_size, model.config.vocab_size, cfg.seed)
    val = loader.Dataset(folder, "val", cfg.block_size, model.config.vocab_size)

    # what it will cost, and whether it can work
    on, traced = plan.machine(device, dtype), None
    if not cfg.batch_size:
        B, accumulation, traced = world.gather(plan.choose_batch(
            cfg, model.config, on, dtype, cfg.compile, world.size))[0]
        cfg = replace(cfg, batch_size=B, gradient_accumulation_steps=accumulation)
    rate = plan.measured_rate(out_dir / "log.jsonl", runtime.device_name(device)) \
        if cfg.init_from == "resume" else None
    if world.is_main:
        planned = plan.make(cfg, model.config, plan.of_dataset(data, val), on, dtype, cfg.compile,
                            world.size, rate, traced, parts["iter_num"] if parts else 0)
        say(f"machine    {on['name']} x {world.size}, {str(dtype).removeprefix('torch.')}, "
            f"torch {torch.__version__}")
        for line in plan.lines(planned, cfg):
            say(line)
        for sentence in (*ignored(cfg), *not_exportable(model.config)):
            say(f"note       {sentence}")
        refused = plan.refusals(planned, cfg)
        if refused and not (cfg.force or cfg.dry_run or cfg.eval_only):
            raise ValueError(f"{'; '.join(refused)}. --force starts it all the same")
        for sentence in refused:
            say(f"warning    {sentence}")
    if cfg.dry_run:
        return world.close()
    n_val = min(cfg.eval_iters * cfg.batch_size, val.n_windows)
    model.to(device)

    # optimizer, and the state of a run that goes on
    optimizer = optim.configure_optimizer(model, cfg, device, dtype)
    average = optim.Average(model, cfg.ema_half_life) if cfg.ema_half_life else None
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    step, best_val_loss, hours_before, not_better = 0, float("inf"), 0.0, 0
    torch.manual_seed(cfg.seed + world.rank)    # dropout differs between ranks
    if parts:
        check_continues(cfg, parts, data)
        if jump(cfg, parts):
            say("warning    the learning rate jumps from {:.1e} to {:.1e} here: the loss will rise "
                "first. --lr_schedule=wsd makes runs that can be lengthened".format(
                    *jump(cfg, parts)))
        if world.is_main and cools_at_once(cfg, parts):     # from here a longer run can go on
            checkpoint.copy(out_dir / checkpoint.NEWEST, out_dir / checkpoint.STABLE)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(parts["optimizer"])
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)              # today's settings, not those of the checkpoint
        step, best_val_loss = parts["iter_num"], float(parts["best_val_loss"])
        hours_before, not_better = parts.get("hours", 0.0), parts.get("not_better", 0)
        if average and "average" in parts:
            average.weights = {name: w.to(device) for name, w in parts["average"].items()}
        if scaler.is_enabled() and parts.get("scaler"):
            scaler.load_state_dict(parts["scaler"])
        if world.rank < len(parts.get("rng", [])):
            runtime.set_rng_state(parts["rng"][world.rank], device)
        parts = None                            # 12 bytes per parameter that nobody needs any more
    out_dir.mkdir(parents=True, exist_ok=True)

    say(f"output     {out_dir}" + (f", going on from step {step:,}" if step else ""))

    # logging
    log, tracked = None, []
    if world.is_main and not cfg.eval_only:
        if cfg.init_from != "resume":           # an older run is here only with --overwrite
            for name in (checkpoint.NEWEST, checkpoint.BEST, checkpoint.STABLE):
                (out_dir / name).unlink(missing_ok=True)
        write_config_file(out_dir / "config.py", cfg)
        log = Log(out_dir / "log.jsonl", step if cfg.init_from == "resume" else None)
        log.write(step=step, event="start", time=time.strftime("%Y-%m-%dT%H:%M:%S"),
                  dataset=data.fingerprint, device=runtime.device_name(device), dtype=str(dtype),
                  world_size=world.size, tokens_per_step=tokens_per_step(cfg),
                  tokens_per_epoch=data.n_windows * data.block_size, parameters=model.n_params(),
                  versions=runtime.versions(), config=asdict(cfg))
        tracked = trackers(cfg, step)

    if cfg.compile:
        say("compiling the model (about a minute; kept in .cache/ for the next start)")
        model.compile(dynamic=False)
    forward = model if world.size == 1 else DistributedDataParallel(
        model, broadcast_buffers=False, gradient_as_bucket_view=True)

    peak_flops = runtime.peak_flops(device, dtype)

    def save():
        """Write ckpt.pt, and what is the same or its average as best.pt and stable.pt."""
        gc.collect()
        rng = world.gather(runtime.rng_state(device))
        if not world.is_main:
            return
        parts = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "model_args": model_args(model.config), "iter_num": step,
            "best_val_loss": best_val_loss, "config": asdict(cfg),
            "scaler": scaler.state_dict(), "rng": rng,
            "dataset": data.fingerprint, "seed": cfg.seed,
            "tokens_per_step": tokens_per_step(cfg), "not_better": not_better,
            "hours": hours(), "versions": runtime.versions()}
        if average:
            parts["average"] = average.weights
        checkpoint.save(parts, out_dir / checkpoint.NEWEST)
        if improved and average_wins:
            with average:
                checkpoint.save({**parts, "model": model.state_dict(), "average": {}},
                                out_dir / checkpoint.BEST)
        elif improved:
            checkpoint.copy(out_dir / checkpoint.NEWEST, out_dir / checkpoint.BEST)
        if stable:
            checkpoint.copy(out_dir / checkpoint.NEWEST, out_dir / checkpoint.STABLE)

    def hours():
        return hours_before + (time.time() - began) / 3600

    # the loop
    stop = stop_requested()
    B = B_eval = cfg.batch_size
    windows_per_step = B * cfg.gradient_accumulation_steps

    def micro_batches_of(B):
        """The micro-batches from this step on, of B windows each."""
        return loader.ahead(
            lambda place: data.training_batch(place, B),
            (place for s in range(step, cfg.max_iters)
             for place in range(s * windows_per_step + world.rank * B,
                                (s + 1) * windows_per_step, world.size * B)), device)

    def gradients(B_now):
        """The loss of this step, whose gradients add up in the model, in micro-batches of B_now."""
        nonlocal B, micro_batches
        if B_now != B:                      # the last try ran out of memory half-way
            optimizer.zero_grad(set_to_none=True)
            micro_batches.close()
            B, micro_batches = B_now, micro_batches_of(B_now)
        return accumulate(forward, micro_batches, windows_per_step // world.size // B, world,
                          autocast, scaler)

    micro_batches = micro_batches_of(B)
    gc.freeze()                             # what is here stays; the rest is collected in save(),
    gc.disable()                            # and not in mid-step
    began = saved_at = time.time()
    step_at_start, seconds, steps_timed = step, 0.0, 0
    bar = tqdm(total=cfg.max_iters, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05,
               disable=None if world.is_main and not cfg.eval_only else True)

    while True:
        # evaluate, save, stop; a checkpoint that is resumed was evaluated before it was saved
        last, trained = step >= cfg.max_iters, step > step_at_start
        improved = worth_saving = average_wins = given_up = False
        stable = trained and cfg.decay_lr and cfg.lr_schedule == "wsd" \
            and step == optim.cooldown_start(cfg)
        if cfg.eval_only or (trained or step == 0) and (last or step % cfg.eval_interval == 0):
            val_loss, B_eval = smaller_when_full(
                lambda B: evaluate(model, val, n_val, B, world, autocast),
                B_eval, world, "an evaluation", say)
            told = {"val_loss": val_loss}
            if average and trained:
                with average:
                    told["average_val_loss"], B_eval = smaller_when_full(
                        lambda B: evaluate(model, val, n_val, B, world, autocast),
                        B_eval, world, "an evaluation", say)
                average_wins = told["average_val_loss"] < val_loss
            say(f"step {step:,}: val loss {val_loss:.4f}" + "".join(
                f", of the averaged weights {loss:.4f}" for loss in [*told.values()][1:]))
            if cfg.eval_only:
                break
            improved = min(told.values()) < best_val_loss
            not_better = 0 if improved else not_better + 1
            given_up = cfg.patience and not_better >= cfg.patience
            worth_saving = improved or cfg.always_save_checkpoint
            best_val_loss = min(best_val_loss, *told.values())
            if world.is_main:
                log.write(step=step, **told, hours=hours())
                if trained:
                    draw(out_dir, say)
                for track, _ in tracked:
                    track({f"val/{k.replace('val_', '')}": v for k, v in told.items()}, step)
        out_of_time = trained and cfg.max_hours and time.time() - began > cfg.max_hours * 3600
        ending = world.any(last or given_up or stop.is_set() or out_of_time)
        overdue = time.time() - saved_at > cfg.save_minutes * 60
        if trained and world.any(worth_saving or stable or ending or overdue):
            save()
            saved_at = time.time()
        if ending:
            break

        # one step
        t0 = time.time()
        lr = optim.lr_at(step, cfg)
        optim.set_rates(optimizer, lr, optim.momentum_at(step, cfg))
        step_loss, _ = smaller_when_full(gradients, B, world, "a step", say)
        step_loss = world.sum(step_loss / world.size)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        # the one wait for the device in a step:
        # no update may follow a loss or gradient that is not a number
        loss_value, norm_value = torch.stack([step_loss, grad_norm]).tolist()
        if not math.isfinite(loss_value) or not (math.isfinite(norm_value) or scaler.is_enabled()):
            bar.close()
            kept = f"{out_dir / checkpoint.NEWEST} is as it was saved before" \
                if (out_dir / checkpoint.NEWEST).exists() else "nothing was saved yet"
            raise ValueError(f"step {step + 1:,}: the loss is {loss_value} and the gradient's "
                             f"norm {norm_value}, so the run stops before the update; {kept}. "
                             f"A lower learning_rate than {cfg.learning_rate:g}, a longer "
                             "warmup_iters or dtype=float32 usually helps")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update()
        step += 1

        if step == step_at_start + 2 and device.type == "cuda" and world.is_main:
            used, held = (most(device) / 2**30 for most in (torch.cuda.max_memory_allocated,
                                                            torch.cuda.max_memory_reserved))
            say(f"memory     {used:.2f} GiB at the peak of two steps, {held:.2f} are held for it; "
                f"{planned['memory']['needed'] / 2**30:.2f} planned")

        # tell; the first step of a process compiles, so its time says nothing
        if step > step_at_start + 1:
            seconds, steps_timed = seconds + time.time() - t0, steps_timed + 1
        epoch = step * windows_per_step / data.n_windows
        rate = steps_timed * tokens_per_step(cfg) / seconds if seconds else None
        mfu = rate * model.flops_per_token() / peak_flops / world.size \
            if rate and peak_flops else None
        shown = {"loss": f"{loss_value:.3f}", "lr": f"{lr:.1e}",
                 "tok/s": f"{rate:,.0f}" if rate else "-",
                 "mfu": f"{mfu:.0%}" if mfu else "-", "epoch": f"{epoch:.2f}"}
        bar.set_postfix(shown, refresh=False)
        if step == step_at_start + 1:
            bar.n = bar.last_print_n = bar.initial = step       # the bar's clock starts here
            bar.unpause()
        else:
            bar.update()
        if world.is_main and (step % cfg.log_interval == 0 or step == 1):
            log.write(step=step, tokens=step * tokens_per_step(cfg), epoch=epoch,
                      train_loss=loss_value, lr=lr, grad_norm=norm_value,
                      tokens_per_s=rate, mfu=mfu, hours=hours())
            for track, _ in tracked:
                track({"train/loss": loss_value, "lr": lr, "tokens_per_s": rate, "mfu": mfu}, step)
            if bar.disable:
                left = (cfg.max_iters - step) * seconds / steps_timed if steps_timed else None
                say(f"step {step:,}/{cfg.max_iters:,}: "
                    + ", ".join(f"{k} {v}" for k, v in shown.items())
                    + (f", {tqdm.format_interval(left)} left" if left else ""))
            seconds, steps_timed = 0.0, 0

    bar.close()
    gc.enable()
    gc.unfreeze()
    if not cfg.eval_only:
        why = "finished" if last else "max_hours are over" if out_of_time else \
            f"no better val loss in {not_better} evaluations, stopped" if given_up else \
            "stopped on request"
        say(f"{why} at step {step:,} after {hours():.2f} hours, best val loss {best_val_loss:.4f}. "
            + (f"`python sample.py --out_dir={out_dir}` samples from it" if last or given_up
               else "--init_from=resume goes on"))
    for _, finish in tracked:
        finish()
    world.close()


if __name__ == "__main__":
    run(main, TrainConfig, __doc__)
