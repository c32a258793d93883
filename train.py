"""
Train a GPT on a prepared dataset, on one GPU, on a CPU, or on several GPUs.

    python train.py config/quickstart.py                            # a first GPT, on any computer
    python train.py config/train_fineweb_4070_overnight.py          # the real run, on one card
    python train.py config/train_fineweb_4070_overnight.py --init_from=resume   # go on with it
    python train.py config/train_fineweb_4070_week.py --dry_run     # only print the plan
    torchrun --standalone --nproc_per_node=2 train.py --dataset=mine    # several cards

Ctrl-C finishes the step, saves and exits; a second one exits at once. `--help` lists every setting.
"""
import gc
import math
import time
from dataclasses import dataclass, replace

import torch

from model import GPT, GPTConfig
from onecard import advice, cards, dataset, memory, optim, plan, resume, runtime, tokenizers
from onecard.datafiles import folder_of
from onecard.dataset import Batches, Dataset, fixed_batches
from onecard.divergence import Guard
from onecard.generate import SamplingConfig, generate
from onecard.logfile import measured_speed
from onecard.resume import Progress, State
from onecard.runlog import RunLog
from onecard.settings import UserError, configure, configure_and_run, in_range, one_of


@dataclass(frozen=True)
class TrainConfig(GPTConfig):
    """The settings of a run. GPTConfig has those of the network."""
    # output
    out_dir: str = "out"                # folder of ckpt.pt, best.pt, log.jsonl, config.py, loss.png
    eval_interval: int = 2000           # steps from one evaluation to the next
    log_interval: int = 1               # steps from one line of log.jsonl to the next
    eval_iters: int = 200               # batches of val in an evaluation: always the same ones
    sample_tokens: int = 60             # tokens of the sample after an evaluation; 0 = no sample
    eval_only: bool = False             # evaluate once and exit
    always_save_checkpoint: bool = True     # save after every evaluation; False: if val improved
    save_minutes: float = 10.0          # save at least this often, in any case
    max_hours: float = 0.0              # save and stop after this many hours; 0 = no limit
    hours: float = 0.0                  # choose max_iters so that the run takes this long; 0 = off
    # init_from: resume continues the run in out_dir; FILE.pt continues the run that wrote it;
    # gpt2, or a folder (of a run or a transformers model), gives a new run its first weights
    init_from: str = "scratch"          # scratch, resume, FILE.pt, gpt2, or a folder with a model
    overwrite: bool = False             # start over in out_dir and replace the run in it
    force: bool = False                 # start even if memory is short or a resume has other data
    # the plan
    dry_run: bool = False               # print the plan and exit; changes nothing on the disk
    device_name: str = ""               # dry_run: plan for this card, such as 'RTX 4070'
    n_tokens: int = 0                   # dry_run: tokens of the text; 0 = those of the dataset
    # wandb, tensorboard
    wandb_log: bool = False             # also log to Weights & Biases
    wandb_project: str = "owt"          # project in Weights & Biases; owt: OpenWebText
    wandb_run_name: str = "gpt2"        # name of the run in this project
    tensorboard_log: bool = False       # also write TensorBoard's files into out_dir
    # data
    dataset: str = "openwebtext"        # folder under data/
    gradient_accumulation_steps: int = 40   # micro-batches in a step, all GPUs together
    batch_size: int = 12                # windows (block_size tokens) in a micro-batch; 0: what fits
    tokens_per_step: int = 0            # replaces gradient_accumulation_steps; 0 = off
    seed: int = 1337                    # random seed for first weights, data order and dropout
    # model: block_size, n_layer, ... are GPTConfig's
    bias: bool = False                  # biases in Linear and LayerNorm; here off, unlike GPTConfig
    # optimizer
    optimizer: str = "adamw"            # adamw; muon: Muon for matrices, AdamW for the rest
    learning_rate: float = 6e-4         # the highest rate; muon needs about 0.02
    max_iters: int = 600000             # steps in all
    weight_decay: float = 0.1           # for matrices; muon: only for matrices in the blocks
    beta1: float = 0.9                  # AdamW: decay of the average gradient
    beta2: float = 0.95                 # AdamW: decay of the average squared gradient
    grad_clip: float = 1.0              # clip the gradient to this norm; 0 = never
    decay_lr: bool = True               # warm up and decay; False: learning_rate all the time
    lr_schedule: str = "cosine"         # cosine, or wsd: warm up, stay, cool down
    warmup_iters: int = 2000            # steps of linear warm-up
    lr_decay_iters: int = 600000        # cosine only: step that reaches min_lr; usually max_iters
    cooldown: float = 0.4               # wsd only: share of the steps, at the end, to cool down
    min_lr: float = 6e-5                # the last learning rate; usually a tenth of the highest
    # only for optimizer = 'muon'
    # embedding_lr and head_lr are for a width of 768; they are multiplied by sqrt(768 / n_embd).
    # With tie_word_embeddings, the embedding is the head: then only the head's settings are used
    embedding_lr: float = 0.25          # rate for the token embedding
    head_lr: float = 0.003              # rate for the head
    scalar_lr: float = 0.006            # rate for other weights: norms, biases, positions
    embedding_weight_decay: float = 0.001   # for the token embedding
    head_weight_decay: float = 0.01     # for the head
    momentum: float = 0.95              # highest momentum of Muon; it begins at 0.85
    momentum_warmup: int = 300          # steps in which the momentum rises
    muon_beta2: float = 0.95            # of the NorMuon variant, see onecard/optim.py; 0 = off
    cautious: bool = True               # no weight_decay where the step makes the weight larger
    # machine
    backend: str = "auto"               # how processes talk: nccl on CUDA, else gloo
    device: str = "auto"                # cuda, cuda:1, mps, cpu; auto takes the best one
    dtype: str = "auto"                 # bfloat16, float16 (with scaled loss), float32, auto
    compile: bool = True                # torch.compile: a minute at the start, then much faster
    # compute cheap activations again in backward: much less memory, some 2 % slower
    recompute: str = "auto"             # yes, no; auto: only if there is no room to keep them

    def __post_init__(self):
        super().__post_init__()
        # the limits are far away: they catch typing errors, and numbers that would overflow
        in_range(1, 10**9, self, "eval_interval", "log_interval", "eval_iters",
                 "gradient_accumulation_steps", "lr_decay_iters")
        in_range(0, 10**9, self, "max_iters", "warmup_iters", "momentum_warmup")
        in_range(0, 2**16, self, "batch_size", "sample_tokens")
        in_range(0, 2**62, self, "tokens_per_step", "n_tokens", "seed")
        in_range(0, 10**6, self, "grad_clip", "max_hours", "hours", "save_minutes")
        in_range(1e-12, 10, self, "learning_rate")
        in_range(0, 10, self, "min_lr", "embedding_lr", "head_lr", "scalar_lr",
                 "weight_decay", "embedding_weight_decay", "head_weight_decay")
        in_range(0, 0.99999, self, "beta1", "beta2", "momentum", "muon_beta2")
        one_of(self, optimizer=("adamw", "muon"), lr_schedule=("cosine", "wsd"),
               backend=("auto", "nccl", "gloo"), recompute=("auto", "yes", "no"))
        if self.recompute == "yes" and not self.compile:
            raise UserError("recompute = 'yes' needs --compile=True: torch.compile does it")
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder for the run")
        optim.check_schedule(self)      # the warm-up must leave room for the decay
        if not self.dry_run and (self.device_name or self.n_tokens):
            raise UserError("device_name and n_tokens are for a plan; add --dry_run")
        if self.batch_size == 0 and self.tokens_per_step == 0:
            usual = TrainConfig.batch_size      # the default
            tokens = usual * self.gradient_accumulation_steps * self.block_size
            raise UserError("batch_size = 0 takes what fits, so tokens_per_step must say how large "
                            f"a step is. The default batch_size, {usual}, makes steps of "
                            f"--tokens_per_step={tokens}")
        micro_batch_tokens = max(self.batch_size, 1) * self.block_size      # 0 counts as one window
        if self.tokens_per_step and self.tokens_per_step % micro_batch_tokens > 0:
            nearest = max(round(self.tokens_per_step / micro_batch_tokens), 1) * micro_batch_tokens
            raise UserError(f"tokens_per_step = {self.tokens_per_step:,} does not divide into "
                            "micro-batches of batch_size x block_size = "
                            f"{micro_batch_tokens:,} tokens. Nearest that works: "
                            f"--tokens_per_step={nearest}")

    @property
    def windows_per_step(self):
        """Windows in one step, over all micro-batches and GPUs."""
        if self.tokens_per_step:
            return self.tokens_per_step // self.block_size
        return self.batch_size * self.gradient_accumulation_steps


# before the run

def model_config_of(cfg, saved):
    """The run's GPTConfig: from the checkpoint `saved` (a dict) if there is one, else from cfg."""
    if saved:
        model_config = GPTConfig.from_checkpoint(saved)
        if cfg.block_size > model_config.block_size:
            raise UserError(f"block_size = {cfg.block_size}, but the context of this model is "
                            f"{model_config.block_size} tokens; use at most that")
        # a smaller block_size is allowed: load_weights() keeps the first positions
        return replace(model_config, dropout=cfg.dropout, block_size=cfg.block_size)
    # some datasets do not say which tokenizer made them; then vocab_size decides
    tokenizer = tokenizers.of_dataset(folder_of(cfg.dataset), cfg.vocab_size)
    if isinstance(tokenizer, tokenizers.CharTokenizer):     # has far fewer ids than 50,304
        return GPTConfig.of(cfg, vocab_size=tokenizer.n_vocab)
    return GPTConfig.of(cfg)


def compute_plan(cfg, model_config, machine, token_counts=None, past=None):
    """The Plan of a run on a machine. plan.cfg is cfg, with what fits for a batch_size of 0.

    `token_counts` (dataset.KnownTokens) has the sizes of train and val; None if unknown.
    """
    past = past or {}                   # the checkpoint from which a run goes on; {}: a new run
    with torch.device("meta"):          # a model without memory, only to count its parameters
        model = GPT(model_config)
    counts = model.count_parameters()
    size = plan.Size(model_config, counts["total"], counts["blocks"], model.flops_per_token())
    # fit: how a micro-batch is computed (batch_size, chunk of the loss, recompute). A run that goes
    # on keeps its fit, because another one gives other rounding errors
    fit = memory.choose(cfg, size, machine, past.get("fit"))
    # the val windows do not depend on what fits, so val losses of two machines can be compared
    val_batch_size = cfg.batch_size or TrainConfig.batch_size       # 0: take the default
    default_windows = cfg.eval_iters * val_batch_size
    val_windows = past.get("val_windows", default_windows)
    cfg = replace(cfg, batch_size=fit.batch_size)
    return plan.Plan(cfg, size, machine, fit, val_windows, token_counts,
                     steps_before=past.get("iter_num", 0))


def recipe_advice(cfg, machine, token_counts):
    """Which recipe (of config/) is the best for cfg.hours on this machine, in words."""
    if not machine.peak_flops or not token_counts:  # peak_flops: None for an unknown card or fp32
        return ("advice     needs a card in bf16 or fp16 (--device_name='RTX 4070'), and the size "
                "of the text (--n_tokens=700_000_000)")
    recipes = {}
    for name in advice.RECIPES:
        path = runtime.PROJECT / advice.config_file(name)
        recipe = configure(TrainConfig, [str(path)])
        recipe = replace(recipe, compile=cfg.compile)       # not compiled, a recipe is slower
        recipes[name] = compute_plan(recipe, GPTConfig.of(recipe), machine, token_counts)
    return advice.text(recipes, cfg.hours)


def check_plan(cfg, model_config, saved, world):
    """Print the Plan of the run and return it. Raise UserError if memory or disk is too small.

    `world` is the processes of this run. With device_name, the plan is for another machine.
    """
    # saved: the checkpoint that gives the weights. past: the same one if its run goes on, and {} if
    # a new run begins
    past = saved if resume.goes_on(cfg) else {}
    cfg = resume.keep_max_iters(cfg, past, world)       # if --hours chose max_iters at the start
    if cfg.device_name:                 # a card that is not in this machine
        dtype = runtime.DTYPES.get(cfg.dtype, torch.bfloat16)       # bf16 for auto
        machine = cards.machine_named(cfg.device_name, dtype)
    else:
        machine = cards.machine_of(world)
    # room: bytes that are free for the run. The GPU with the least decides for all
    machine = replace(machine, room=min(world.gather(machine.room)))
    token_counts = dataset.known_tokens(cfg.dataset, cfg.n_tokens)
    run_plan = compute_plan(cfg, model_config, machine, token_counts, past)
    cfg = run_plan.cfg
    if cfg.windows_per_step % (cfg.batch_size * world.size) > 0:
        raise UserError(f"a step has {cfg.windows_per_step} windows, which {world.size} processes "
                        f"cannot share in micro-batches of {cfg.batch_size}")
    if past:                            # its log has a speed, which is better than a prediction
        run_plan = replace(run_plan, measured=measured_speed(cfg.out_dir, machine))
    world.print(plan.text(run_plan))
    if cfg.dry_run and cfg.hours and not past:
        world.print(recipe_advice(cfg, machine, token_counts))
    reasons = plan.refusals(run_plan)   # sentences: why memory or disk is not enough
    is_refused = world.any(len(reasons) > 0)        # if one process refuses, all stop
    if is_refused and not (cfg.force or cfg.dry_run or cfg.eval_only):
        why = "; ".join(reasons) or "another process lacks memory or disk"
        raise UserError(f"{why}. --force starts it all the same")
    for reason in reasons:
        world.print(f"warning    {reason}")
    return run_plan


def open_data(cfg, model_config, saved, world):
    """The two splits of the dataset, and the tokenizer of its ids."""
    folder = folder_of(cfg.dataset)
    train_data = Dataset(folder, "train", cfg.block_size, cfg.seed)
    val_data = Dataset(folder, "val", cfg.block_size)       # no seed: it is never shuffled
    train_data.check_vocabulary(model_config.vocab_size)
    val_data.check_vocabulary(model_config.vocab_size)
    tokenizer = tokenizers.of_dataset(folder, model_config.vocab_size)
    resume.check_tokenizer(cfg, saved, tokenizer, world)   # a saved model must have the same ids
    return train_data, val_data, tokenizer


def make_state(cfg, model_config, saved, fixed_parts, world):
    """The State of the run: new, or as the checkpoint `saved` has it.

    `fixed_parts` is written into every checkpoint and never changes, such as data checksums.
    """
    torch.manual_seed(cfg.seed)
    model = GPT(model_config)
    if saved:
        model.load_weights(saved)
    model.to(world.device)
    optimizer = optim.configure_optimizer(model, cfg, world.dtype)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype is torch.float16)
    state = State(model, optimizer, scaler, Progress(), fixed_parts)    # Progress(): step 0
    torch.manual_seed(cfg.seed + world.rank)    # dropout differs between ranks
    if resume.goes_on(cfg):                     # optimizer, step, random numbers
        resume.restore(state, saved, cfg, world)
    return state


# parts of the training loop

@torch.no_grad()
def evaluate(batches, model, val_data, n_windows):
    """Mean loss over the first `n_windows` of val: the same ones every time.

    `batches` only says how many windows are computed at a time, and on which ranks.
    """
    model.eval()
    loss_sum = torch.zeros((), device=batches.world.device)
    for idx, targets, n in fixed_batches(val_data, n_windows, batches.size, batches.world):
        if n > 0:       # windows of val in this batch; in the last one, a rank may have none
            with batches.world.autocast():
                loss_sum += n * model(idx, targets)     # the model gives the mean over n windows
    model.train()
    return (batches.world.sum(loss_sum) / n_windows).item()     # over the windows of all ranks


def sample(model, tokenizer, cfg, world):
    """Let the model write a new document, always with the same seed.

    generate() has random numbers of its own, so that samples do not change the run.
    """
    can_decode = tokenizer.n_vocab is not None         # None: an unknown tokenizer
    if not (world.is_main and cfg.sample_tokens and can_decode):
        return ""
    sampling = SamplingConfig(max_new_tokens=cfg.sample_tokens)
    model.eval()
    with world.autocast():
        ids = list(generate(model, [tokenizer.start], sampling, tokenizer.n_vocab,
                            fixed_shapes=False))    # no CUDA graph: it pays only for long samples
    model.train()
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def forward_backward(batches, ddp_model, step, scaler):
    """Add up the gradients of all micro-batches of a step; return their mean loss on this rank."""
    ddp_model.zero_grad()       # gradients of the step before, or of a try that ran out of memory
    mean_loss = 0.0
    for i, (idx, targets) in enumerate(batches.of_step(step)):      # those of this rank
        # DDP (only DDP) reads this: exchange gradients only in the last micro-batch
        is_last = i == batches.per_step - 1
        ddp_model.require_backward_grad_sync = is_last
        with batches.world.autocast():
            loss = ddp_model(idx, targets) / batches.per_step
        scaler.scale(loss).backward()
        mean_loss = mean_loss + loss.detach()       # loss is divided by per_step already
    return mean_loss


def halve_until_it_fits(compute, batches, *args):
    """Call compute(batches, *args), and again with smaller micro-batches if memory runs out.

    With several GPUs, halve() ends the run instead: all would have to halve at the same time.
    """
    while True:
        try:
            return compute(batches, *args)
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
        # after the except block: inside it, the error keeps tensors in memory
        runtime.free_memory(batches.world.device)
        batches.halve()                         # a UserError if that is impossible
        batches.world.print(f"out of memory: going on with {batches.size} windows at a time, "
                            "with the same results but for rounding and dropout")


def fit_to_hours(cfg, log, progress, world):
    """With --hours, set max_iters once, after 20 steps. Returns cfg, or a changed copy of it."""
    if cfg.hours in (0, progress.fitted_hours):     # no --hours, or this was done before
        return cfg
    if not log.just_measured:           # true once, when 20 steps have been timed
        return cfg
    run_plan = log.measured_plan()      # the plan of the remaining steps, with the measured speed
    seconds_left = 3600 * (cfg.hours - log.hours_with_resumes())
    max_iters = plan.steps_in(run_plan, seconds_left, run_plan.measured)    # and the steps before
    max_iters = world.gather(max_iters)[0]      # all ranks take the number of rank 0
    cfg = plan.with_max_iters(cfg, max_iters, progress.step)    # more, if the schedule needs more
    progress.fitted_hours = cfg.hours   # checkpoints have it, so that a resume keeps max_iters
    run_plan = replace(run_plan, cfg=cfg)
    log.set_plan(run_plan)
    world.print(f"hours      {cfg.max_iters:,} steps fit into {cfg.hours:g} hours. The plan "
                f"again:\n{plan.text(run_plan)}")
    return cfg


def update(optimizer, scaler):
    """Change the weights by their gradients, which are unscaled already."""
    try:
        scaler.step(optimizer)
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        raise UserError("out of memory in the optimizer, where a smaller batch_size does not help. "
                        "A smaller n_layer or n_embd does. The last ckpt.pt is unchanged") from None
    scaler.update()


def main(cfg):
    # where does it run: ranks of torchrun, device, dtype. A dry run may plan for another machine
    world = runtime.start(cfg.device, cfg.dtype, cfg.backend)
    if cfg.compile and not cfg.dry_run and not runtime.can_compile(world):
        cfg = replace(cfg, compile=False, recompute="auto")     # recompute needs compile

    # what will it cost? --dry_run ends here: it needs no data and writes nothing
    saved = resume.checkpoint_to_start_from(cfg, world)   # a dict; None for a new model
    if not cfg.dry_run:
        dataset.ensure_prepared(cfg.dataset, world)     # runs prepare.py if data is missing
    model_config = model_config_of(cfg, saved)
    run_plan = check_plan(cfg, model_config, saved, world)
    cfg = run_plan.cfg                                  # now with a batch_size that fits
    if cfg.dry_run:
        return

    # data: an epoch shuffles all documents, joins them and cuts them into windows of block_size
    # tokens. Windows are numbered through all epochs, and each step takes the next windows_per_step
    # of them. So the number of the step is all that a resume needs
    train_data, val_data, tokenizer = open_data(cfg, model_config, saved, world)
    n_val = min(run_plan.val_windows, val_data.n_windows)      # windows of an evaluation
    n_check = min(n_val, cfg.batch_size)        # windows of a quick check before other saves

    # model, optimizer, loss scaler, step; the fixed parts go into every checkpoint
    fixed_parts = resume.fixed_parts(run_plan, train_data, val_data, tokenizer)
    state = make_state(cfg, model_config, saved, fixed_parts, world)
    model, optimizer, scaler, progress = state.model, state.optimizer, state.scaler, state.progress
    del saved                                   # as large as the model and its optimizer

    # reports, compiling, batches
    model.tokens_per_chunk = run_plan.fit.chunk     # tokens whose loss is computed at a time
    log = RunLog(run_plan, world, progress)
    if world.is_main and not cfg.eval_only:
        resume.open_folder(cfg, progress)       # make out_dir; an old run stays until a save
        log.open(train_data)                    # it counts epochs by the size of the data
    if cfg.compile:
        world.print("compiling the model (about a minute; the next start is faster)")
        model.compile(recompute=run_plan.fit.recompute, dynamic=False)
    ddp_model = runtime.distribute(model, world)    # the model itself, if there is one GPU
    batches = Batches(train_data, cfg, world)   # reads the next batch in a thread
    guard = Guard(model_config.vocab_size, scaler)  # ends a run that diverges (far above ln(V))
    stop = runtime.stop_on_signals()            # set by Ctrl-C; a second one exits at once
    saved_time = time.monotonic()
    gc.disable()                                # garbage collection would interrupt steps
    gc.freeze()                                 # save() collects, but skips what exists now

    while True:
        step = progress.step
        trained = step > log.first_step         # since this start
        last = step >= cfg.max_iters

        # evaluate at the start, every eval_interval steps and at the end; not right after a resume:
        # if an evaluation was due at that step, it was done before the save
        due = last or step % cfg.eval_interval == 0
        just_resumed = step > 0 and step == log.first_step
        evaluates = cfg.eval_only or (due and not just_resumed)
        if evaluates:
            progress.val_loss = halve_until_it_fits(evaluate, batches, model, val_data, n_val)
            log.evaluation(progress.val_loss, sample(model, tokenizer, cfg, world))
        if cfg.eval_only:
            break

        # save at the end, after an evaluation, before a cooldown, every save_minutes; all ranks do
        out_of_time = trained and cfg.max_hours > 0 and log.hours_since_start() > cfg.max_hours
        ending = world.any(last or stop.requested or out_of_time)   # if one rank ends, all end
        improved = evaluates and progress.val_loss < progress.best_val_loss
        worth_saving = improved or (evaluates and cfg.always_save_checkpoint)
        cooldown_next = optim.is_before_cooldown(step, cfg)
        overdue = time.monotonic() - saved_time > 60 * cfg.save_minutes
        if trained and world.any(ending or worth_saving or cooldown_next or overdue):
            check_loss = progress.val_loss
            if not evaluates:                   # a few windows show whether the model is broken
                check_loss = halve_until_it_fits(evaluate, batches, model, val_data, n_check)
            guard.before_save(step, check_loss)     # ends a run that has diverged
            progress.hours = log.hours_with_resumes()
            # is_best: also best.pt and best_val_loss. is_stable: also stable.pt, for longer runs
            resume.save(state, cfg, world, is_best=improved, is_stable=cooldown_next)
            log.flush()         # a new log replaces an old one (--overwrite) after the first save
            saved_time = time.monotonic()
        if ending:
            break

        # one step: forward and backward of all micro-batches, then one update
        started = time.monotonic()
        lr = optim.set_rates(optimizer, step, cfg)
        loss = halve_until_it_fits(forward_backward, batches, ddp_model, step, scaler)
        scaler.unscale_(optimizer)
        max_norm = cfg.grad_clip or math.inf    # inf: only measure the norm
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        loss, grad_norm = torch.stack([world.mean(loss), grad_norm]).tolist()   # waits for the GPU
        guard.before_update(step + 1, loss, grad_norm)          # reports count steps from 1
        update(optimizer, scaler)
        progress.step += 1
        log.step(loss, lr, grad_norm, time.monotonic() - started)
        cfg = fit_to_hours(cfg, log, progress, world)   # --hours: sets max_iters after 20 steps

    batches.close()
    log.close()
    world.close()
    resume.check_saved(progress, world)     # a UserError if the last save failed (with a warning)


if __name__ == "__main__":
    configure_and_run(main, TrainConfig, __doc__)
