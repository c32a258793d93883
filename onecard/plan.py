"""What will a run cost? Epochs, memory, time and disk, known before its first step.

    machine = cards.machine_named("RTX 4070", torch.bfloat16)
    plan = Plan(cfg, size, machine, memory.choose(cfg, size, machine), val_windows=2400, data=data)
    print(text(plan))

All numbers come from settings and counts: no model is made, and no file is written. A number that
nobody can know yet is printed as "-".
"""
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from onecard import cards, memory
from onecard.units import GIB, amount, gib, number, period

R_STAR = 15.387756                      # epochs in which the worth of a repetition falls to 1/e
TOKENS_PER_PARAMETER = 20               # compute-optimal (Hoffmann et al. 2022)
EAGER_SPEED = 1 / 1.5                   # of a compiled step (RTX 3060 and 4090: 1 / 1.49)
SHARE_OF_STEPS = 0.98                   # of a run's time; the rest is for saving and pictures


@dataclass(frozen=True)
class Size:
    """The network, counted."""
    network: object                     # its GPTConfig
    total: int                          # parameters
    blocks: int                         # parameters of blocks and norms
    flops_per_token: float              # of forward and backward


@dataclass(frozen=True)
class Plan:
    cfg: object                         # train.py's settings
    size: Size
    machine: cards.Machine
    fit: memory.Fit                     # how a micro-batch is computed
    val_windows: int                    # of an evaluation
    data: object = None                 # dataset.KnownTokens
    steps_before: int = 0               # of a resumed run
    measured: float | None = None       # its tokens a second with all processes, on this machine

    @property
    def tokens_per_step(self):
        return self.cfg.windows_per_step * self.cfg.block_size

    @property
    def steps_left(self):
        return max(self.cfg.max_iters - self.steps_before, 0)

    @property
    def peak_speed(self):
        """Tokens a second of all processes at the cards' dense peak, or None if it is unknown."""
        if self.machine.peak_flops is None:
            return None
        return self.machine.peak_flops / self.size.flops_per_token

    @property
    def speeds(self):
        """(lowest, highest) tokens a second of all processes, or None if nobody knows."""
        if self.measured:
            return self.measured, self.measured
        if self.peak_speed is None:
            return None
        lowest, highest, _ = self.usual_share
        eager = 1 if self.cfg.compile else EAGER_SPEED
        return eager * self.peak_speed * lowest, eager * self.peak_speed * highest

    @property
    def usual_share(self):
        """(lowest, highest share of the peak, where they come from) in public logs."""
        tokens = self.fit.batch_size * self.cfg.block_size
        return cards.usual_share(self.machine.card, self.cfg.n_embd, tokens)

    @property
    def peak_memory(self):
        """Bytes."""
        return memory.needed(self.cfg, self.size, self.machine, self.fit)

    @property
    def checkpoint(self):
        """Bytes of one: weights and AdamW's two averages in fp32; Muon keeps one of a matrix."""
        if self.cfg.optimizer == "muon":
            return 12 * self.size.total - 4 * self.size.blocks
        return 12 * self.size.total


# the numbers

def effective_tokens(unique, total):
    """How many new tokens teach as much as `total` tokens, of which `unique` are different.

    U + U R* (1 - exp(-R / R*)), where R repetitions follow the first epoch (Muennighoff et al.
    2023, equation 5).
    """
    if total <= unique:
        return total
    repetitions = total / unique - 1
    return unique + unique * R_STAR * (1 - math.exp(-repetitions / R_STAR))


def tokens_worth(effective, unique):
    """The inverse of effective_tokens(); None if no number of tokens is enough."""
    if effective <= unique:
        return effective
    left = 1 - (effective / unique - 1) / R_STAR
    if left <= 0:
        return None
    return unique * (1 - R_STAR * math.log(left))


def seconds(plan, speed):
    """Seconds of all that is left, at `speed` tokens a second."""
    if plan.steps_left == 0:
        return 0
    interval = plan.cfg.eval_interval
    n_evaluations = math.ceil(plan.cfg.max_iters / interval) - plan.steps_before // interval
    if plan.steps_before == 0:
        n_evaluations += 1              # before the first step
    of_steps = plan.steps_left * plan.tokens_per_step / speed
    return of_steps + n_evaluations * evaluation_seconds(plan, speed)


def evaluation_seconds(plan, speed):
    """Seconds of an evaluation: forward is a third of a step."""
    tokens = plan.val_windows * plan.cfg.block_size
    if plan.data:
        tokens = min(tokens, plan.data.val)
    return tokens / speed / 3


def steps_in(plan, seconds_left, speed):
    """How many steps the run has in all if it ends in `seconds_left`, evaluations included."""
    evaluation = evaluation_seconds(plan, speed)
    of_each_step = plan.tokens_per_step / speed + evaluation / plan.cfg.eval_interval
    for_steps = SHARE_OF_STEPS * seconds_left - evaluation      # the last one, after all steps
    return plan.steps_before + max(int(for_steps / of_each_step), 0)


def with_max_iters(cfg, max_iters, step):
    """`cfg` with a schedule of `max_iters` steps, or of the fewest that can still be planned.

    At `step`, where the run is, the learning rate must not have begun to fall.
    """
    fewest = max(step, cfg.warmup_iters) + 1
    if cfg.lr_schedule == "wsd" and cfg.cooldown < 1:
        fewest = math.ceil(fewest / (1 - cfg.cooldown)) + 1     # cooldown: the last share of them
    max_iters = max(max_iters, fewest)
    return replace(cfg, max_iters=max_iters, lr_decay_iters=max_iters)     # wsd does not read it


def disk(plan):
    """(bytes that checkpoints may still take, bytes that are free where they go)."""
    out_dir = Path(plan.cfg.out_dir).absolute()
    files = [path.stat() for path in out_dir.glob("*.pt")]
    existing = {file.st_ino: file.st_size for file in files}    # two names of a file count once
    n_kept = 3                          # the newest, the best, and one that is being written
    if plan.cfg.lr_schedule == "wsd":
        n_kept = 4                      # and the one before the cooldown
    to_come = max(n_kept * plan.checkpoint - sum(existing.values()), 0)
    folder = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    return to_come, shutil.disk_usage(folder).free


# in words

def refusals(plan):
    """Sentences that say why the run cannot work, and the nearest that does."""
    cfg, machine, sentences = plan.cfg, plan.machine, []
    if plan.peak_memory > machine.room:
        nearest = "not even one window fits: a smaller block_size, n_layer or n_embd is needed"
        any_size = replace(cfg, batch_size=0, tokens_per_step=plan.tokens_per_step)
        fit = memory.choose(any_size, plan.size, machine)
        if memory.needed(any_size, plan.size, machine, fit) <= machine.room:
            nearest = f"--batch_size={fit.batch_size}"
            if not cfg.tokens_per_step:
                n = cfg.windows_per_step // fit.batch_size
                nearest += f" --gradient_accumulation_steps={n}"
            nearest += " fits and gives the same steps"
        sentences.append(f"batch_size = {cfg.batch_size} needs {gib(plan.peak_memory)} of memory, "
                         f"and {machine.name} has room for {gib(machine.room)}; {nearest}")
    to_come, free = disk(plan)
    if to_come > free:
        sentences.append(f"the run writes up to {gib(to_come)}, and {gib(free)} are free where "
                         f"{cfg.out_dir} lies; make room, or give --out_dir on another disk")
    return sentences


def text(plan):
    """The plan as lines for people."""
    cfg, size, network = plan.cfg, plan.size, plan.size.network
    dtype, dataset = str(plan.machine.dtype).removeprefix("torch."), "-"
    if plan.data:
        dataset = f"{plan.data.source}: {plan.data.train:,} tokens to train on"
    to_come, free = disk(plan)
    lines = [
        f"machine    {plan.machine.name}, {dtype}",
        f"model      {amount(size.total)} parameters, {amount(size.blocks)} without embeddings "
        f"({network.n_layer} layers x {network.n_head} heads x {network.n_embd})",
        f"dataset    {dataset}",
        f"step       {plan.tokens_per_step:,} tokens = {cfg.batch_size} windows x "
        f"{cfg.windows_per_step // cfg.batch_size} micro-batches x {cfg.block_size:,}",
        *run_lines(plan), *memory_lines(plan), *time_lines(plan),
        f"disk       {gib(plan.checkpoint)} a checkpoint, up to {gib(to_come)} to come; "
        f"{gib(free)} are free"]
    return "\n".join(lines)


def run_lines(plan):
    cfg, run_tokens = plan.cfg, plan.tokens_per_step * plan.cfg.max_iters
    line = f"run        {cfg.max_iters:,} steps = {amount(run_tokens)} tokens = "
    if plan.data is None:
        return [f"{line}- epochs"]
    unique = max((plan.data.train - 1) // cfg.block_size, 1) * cfg.block_size   # whole windows
    epochs = number(run_tokens / unique)
    lines = [f"{line}{epochs} epochs"]
    if run_tokens > unique:
        worth = amount(effective_tokens(unique, run_tokens))
        repeated = amount(run_tokens - unique)
        lines.append(f"           {amount(unique)} tokens are new and {repeated} repeated: worth "
                     f"{worth} new ones (Muennighoff et al. 2023)")
    steps = max(4 * unique // plan.tokens_per_step, 1)
    settings, optimal = f"--max_iters={steps}", "more than this data can be worth"
    if cfg.lr_schedule == "cosine":
        settings += f" --lr_decay_iters={steps}"
    if tokens := tokens_worth(TOKENS_PER_PARAMETER * plan.size.total, unique):
        optimal = f"{math.ceil(tokens / plan.tokens_per_step):,} steps"
    lines.append(f"           4 epochs: {settings}; compute-optimal (worth "
                 f"{TOKENS_PER_PARAMETER} new tokens a parameter): {optimal}")
    if run_tokens > 16 * unique:
        lines.append(f"warning    {epochs} epochs: about 4 are nearly as good as new text, and "
                     "past about 16 another one adds next to nothing")
    return lines


def memory_lines(plan):
    room, margin = plan.machine.room, "DOES NOT FIT"
    if plan.peak_memory <= room:
        margin = f"{gib(room - plan.peak_memory)} to spare"
    lines = [f"memory     needs {gib(plan.peak_memory)}, {gib(room)} are free for it: {margin}"]
    if plan.cfg.device_name:
        most, least = (room - n * GIB for n in cards.SCREEN_GIB)
        line = f"           with a screen on this card, {gib(least)} to {gib(most)} are free"
        if plan.cfg.tokens_per_step:
            line += "; batch_size = 0 chooses less then"
        lines.append(line)
    if plan.machine.held_by_others > GIB / 2:
        held = gib(plan.machine.held_by_others)
        lines.append(f"           other programs hold {held} of this card")
    if plan.cfg.compile:
        recompute = "yes (smaller, 2 % slower)" if plan.fit.recompute else "no"
        lines.append(f"           recompute: {recompute}; logits of {plan.fit.chunk:,} tokens at a "
                     "time")
    return lines


def time_lines(plan):
    tflop = number(plan.tokens_per_step * plan.size.flops_per_token / 1e12)
    if plan.speeds is None:
        return [f"time       not known for this machine before 20 steps ({tflop} TFLOP each)"]
    slow, fast = plan.speeds
    step = period(plan.tokens_per_step / fast, plan.tokens_per_step / slow)
    total = period(seconds(plan, fast), seconds(plan, slow))
    line = f"{total}: {plan.steps_left:,} steps of {step} ({tflop} TFLOP) and the evaluations"
    if plan.measured:
        return [f"time       {line}, at {fast:,.0f} tokens/s as measured"]
    lowest, highest = slow / plan.peak_speed, fast / plan.peak_speed
    peak = number(plan.machine.peak_flops / 1e12)
    source = plan.usual_share[2]
    return [f"time       predicted {line}",
            f"           {slow:,.0f} to {fast:,.0f} tokens/s: {lowest:.0%} to {highest:.0%} of "
            f"{peak} TFLOP/s, {source}", *hours_lines(plan)]


def hours_lines(plan):
    if plan.cfg.hours == 0 or plan.steps_before:        # a resumed run keeps its steps
        return []
    all_steps = [steps_in(plan, 3600 * plan.cfg.hours, speed) for speed in plan.speeds]
    fewest, most = (with_max_iters(plan.cfg, steps, step=0).max_iters for steps in all_steps)
    tokens = f"{amount(fewest * plan.tokens_per_step)} to {amount(most * plan.tokens_per_step)}"
    hours = f"{plan.cfg.hours:g} hours are {fewest:,} to {most:,} steps = {tokens} tokens"
    return [f"hours      {hours}",
            "           after 20 steps, max_iters is set to what fits (2 % are kept for saving)"]
