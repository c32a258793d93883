"""What does a run report? A bar, log.jsonl, loss.png; wandb and TensorBoard if they are wanted.

A report never ends a run: what cannot be printed is dropped, and what cannot be written is said.
"""
import json
import math
import statistics
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from onecard import figure, plan, resume, runtime
from onecard.files import write_text
from onecard.settings import UserError, import_package

SECONDS_BETWEEN_PICTURES = 60           # one takes about a second
SECONDS_BETWEEN_LINES = 10              # where no terminal shows a bar
STEPS_TO_MEASURE = 20                   # after the first one, which compiles
NEXT = """Next:
    python sample.py --out_dir={out_dir}   # let it write
    python eval.py --out_dir={out_dir}     # how good it is, text by text
    python plot.py {out_dir}               # its loss as a picture, {out_dir}/loss.png"""


def read_log(path):
    """The entries of log.jsonl. A line that no run of ours can have written is left out."""
    entries = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries


def measured_speed(out_dir, machine):
    """The tokens per second that the run in `out_dir` last had on this machine, or None."""
    rate, same_device = None, False
    for entry in read_log(Path(out_dir) / "log.jsonl"):
        if entry.get("event") == "start":
            device = entry.get("device"), entry.get("world_size")
            same_device = device == (machine.name, machine.count)
        if same_device and entry.get("tokens_per_s"):
            rate = entry["tokens_per_s"]
    return rate


class RunLog:
    """The reports of a run. Only the first rank opens it and writes."""

    def __init__(self, run_plan, world, progress):
        self.plan, self.cfg, self.world, self.progress = run_plan, run_plan.cfg, world, progress
        self.out_dir = Path(self.cfg.out_dir)
        self.path = self.out_dir / "log.jsonl"
        self.first_step, self.hours_before = progress.step, progress.hours
        self.started = time.monotonic()
        self.recent = deque(maxlen=200)     # seconds of the last steps
        self.slow_seconds, self.said_slow = 0.0, False
        self.drawn_at = self.started        # when the last loss.png was drawn
        self.printed_at = -math.inf         # when the last line of a step was printed
        self.is_open, self.said_unwritten = False, False
        self.older_lines = None         # what log.jsonl had before, until it is written again
        self.waiting = b""              # new lines that are not on the disk yet
        self.bar, self.trackers = None, []

    def open(self, data):
        """Start log.jsonl, or go on with it from the step of the checkpoint."""
        self.tokens_per_epoch = data.n_windows * data.block_size
        if self.cfg.wandb_log:
            self.trackers.append(Wandb(self.cfg, self.progress))
        if self.cfg.tensorboard_log:
            self.trackers.append(TensorBoard(self.cfg, self.first_step))
        # a killed run may have logged steps after its last checkpoint: they will come again
        entries = read_log(self.path) if resume.in_own_folder(self.cfg) else []
        self.older_lines = "".join(json.dumps(entry) + "\n" for entry in entries
                            if entry["step"] <= self.first_step)
        self.is_open = True
        self.write(event="start", time=time.strftime("%Y-%m-%dT%H:%M:%S"),
                   device=runtime.device_name(self.world.device), world_size=self.world.size,
                   versions=runtime.versions(), config=asdict(self.cfg),
                   dataset=data.fingerprint, parameters=self.plan.size.total)
        print(f"output     {self.out_dir}, from step {self.first_step:,} on")

    def write(self, **entry):
        """Add a line to log.jsonl."""
        entry = {"step": self.progress.step, **entry}
        for name, number in entry.items():
            if isinstance(number, float) and not math.isfinite(number):
                entry[name] = None          # JSON has no infinity
        self.waiting += json.dumps(entry).encode() + b"\n"
        self.flush()

    def flush(self):
        """Write the lines that are waiting. What the disk does not take is tried again later."""
        if self.progress.holds_old_run or not self.waiting:       # log.jsonl is the old run's
            return
        try:
            if self.older_lines is not None:
                write_text(self.path, self.older_lines)
                self.older_lines = None
            with open(self.path, "ab", buffering=0) as file:
                n_written = file.write(self.waiting)      # on a full disk perhaps not all
            self.waiting, self.said_unwritten = self.waiting[n_written:], False
        except OSError as error:
            if not self.said_unwritten:     # say it once
                self.world.print(f"warning    {self.path} cannot be written, the run goes on, and "
                                 f"tries it again: {error}")
            self.said_unwritten = True

    def hours_of_process(self):
        """Hours since this process began to train."""
        return (time.monotonic() - self.started) / 3600

    def hours(self):
        """Hours of training so far, over all processes that went on with this run."""
        return self.hours_before + self.hours_of_process()

    def evaluation(self, sample):
        """Report a validation loss, and what the model writes now."""
        step, val_loss = self.progress.step, self.progress.val_loss
        self.world.print(f"step {step:,}: val loss {val_loss:.4f}")
        if sample and step > 0:             # at step 0 it writes noise
            self.world.print(f"    it writes: {' '.join(sample.split())}")
        if not self.is_open:
            return
        self.write(val_loss=val_loss, hours=self.hours(), sample=sample)
        self.track({"val/loss": val_loss})
        if time.monotonic() - self.drawn_at > SECONDS_BETWEEN_PICTURES:
            self.draw()

    def track(self, numbers):
        """Send numbers to wandb and TensorBoard. One that fails gets no more."""
        for tracker in list(self.trackers):
            try:
                tracker.log(numbers, self.progress.step)
            except Exception as error:
                self.trackers.remove(tracker)
                self.world.print(f"warning    {type(tracker).__name__} failed, and the run goes on "
                                 f"without it: {error}")

    def draw(self):
        """loss.png of this run, if matplotlib is installed. A picture never stops a run."""
        self.drawn_at = time.monotonic()
        if self.progress.holds_old_run or self.progress.step == self.first_step:
            return                          # no step of this run is in the log
        try:
            figure.draw({str(self.out_dir): read_log(self.path)}, self.out_dir / "loss.png")
        except ModuleNotFoundError:
            pass
        except Exception as error:
            self.world.print(f"warning    loss.png was not drawn: {error}")

    def step(self, loss, lr, grad_norm, seconds):
        """Report a step that took so many seconds."""
        step = self.progress.step
        if step > self.first_step + 1:      # the first step compiles: its time says nothing
            self.recent.append(seconds)
        if not self.is_open:
            return
        self.warn_of_slow_steps(seconds)
        if self.just_measured:
            self.compare_with_plan()
        tokens, rate, mfu = step * self.plan.tokens_per_step, None, None
        epoch = tokens / self.tokens_per_epoch
        numbers = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "epoch": f"{epoch:.2f}"}
        if self.recent:
            rate = self.measured_plan().measured
            numbers["tok/s"] = f"{rate:,.0f}"
        if rate and self.plan.peak_speed:
            mfu = rate / self.plan.peak_speed
            numbers["mfu"] = f"{mfu:.0%}"
        self.move_bar(numbers)
        if step % self.cfg.log_interval and step != 1:
            return
        self.write(tokens=tokens, epoch=epoch, train_loss=loss, lr=lr, grad_norm=grad_norm,
                   tokens_per_s=rate, mfu=mfu, hours=self.hours())
        self.track({"train/loss": loss, "lr": lr, "tokens_per_s": rate, "mfu": mfu})
        if self.bar.disable and time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LINES:
            if rate:
                seconds_left = plan.seconds(self.measured_plan(), rate)
                numbers["left"] = tqdm.format_interval(seconds_left)
            line = ", ".join(f"{name} {number}" for name, number in numbers.items())
            print(f"step {step:,}/{self.cfg.max_iters:,}: {line}")
            self.printed_at = time.monotonic()

    @property
    def just_measured(self):
        """Whether the last step was the one after which the speed is known."""
        return len(self.recent) == STEPS_TO_MEASURE

    def measured_plan(self):
        """The plan of what is left, at the speed of the last steps."""
        measured = self.plan.tokens_per_step / statistics.median(self.recent)
        return replace(self.plan, steps_before=self.progress.step, measured=measured)

    def follow(self, run_plan):
        """Report by another plan from now on."""
        self.plan, self.cfg = run_plan, run_plan.cfg
        if self.is_open:
            self.bar.total = self.cfg.max_iters
            self.write(event="hours", max_iters=self.cfg.max_iters)

    def compare_with_plan(self):
        """Log the measured speed; say it if the plan had none, or is off by over a tenth."""
        run_plan = self.measured_plan()
        measured = run_plan.measured
        predicted = self.plan.speeds    # (lowest, highest), or None
        self.write(event="measured", measured_tokens_per_s=measured,
                   predicted_tokens_per_s=predicted)
        if not predicted or not 0.9 * predicted[0] < measured < 1.1 * predicted[1]:
            total = plan.seconds(run_plan, measured)
            end = time.strftime("%A %d %B, %H:%M", time.localtime(time.time() + total))
            self.world.print(f"measured   {measured:,.0f} tokens/s: "
                             f"{plan.period(total, total)} from here, until {end}")

    def warn_of_slow_steps(self, seconds):
        """Say it once if steps take twice as long as usual for a minute."""
        if self.recent and seconds >= 2 * statistics.median(self.recent):
            self.slow_seconds += seconds
        else:
            self.slow_seconds = 0.0
        if self.slow_seconds > 60 and not self.said_slow:
            self.said_slow = True
            device, held = self.world.device, ""
            if device.type == "cuda":
                held = (f" This run holds {plan.gib(torch.cuda.memory_reserved(device))} of the "
                        f"card, and {plan.gib(runtime.free_bytes(device))} are free: if that is "
                        "little, close other programs, or resume with --batch_size=0.")
            self.world.print(f"warning    steps take over twice as long as before.{held} A hot "
                             "card or another program can be the cause, too")

    def move_bar(self, numbers):
        if self.bar:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update()
        else:                               # its clock starts after the first step
            self.bar = tqdm(total=self.cfg.max_iters, initial=self.progress.step, unit="step",
                            dynamic_ncols=True, smoothing=0.05, disable=None)

    def close(self):
        """End the bar; say why the run ends and how to go on."""
        if self.bar:
            self.bar.close()
        if not self.is_open:
            return
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                print(f"warning    {type(tracker).__name__} did not end well: {error}")
        self.draw()
        step, best = self.progress.step, "-"
        if math.isfinite(self.progress.best_val_loss):
            best = f"{self.progress.best_val_loss:.4f}"
        reason, advice = "stopped on request", "--init_from=resume goes on"
        if step >= self.cfg.max_iters:
            reason = "finished"
            advice = NEXT.format(out_dir=self.out_dir)
        elif self.cfg.max_hours and self.hours_of_process() > self.cfg.max_hours:
            reason = "max_hours are over: stopped"
        if self.progress.holds_old_run or not (self.out_dir / "ckpt.pt").is_file():
            advice = "Nothing was saved"
        print(f"{reason} at step {step:,} after {self.hours():.2f} hours, best val loss {best}. "
              f"{advice}")


class Wandb:
    def __init__(self, cfg, progress):
        self.wandb = import_package("wandb", "wandb_log = True")
        try:
            run = self.wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name,
                                  config=asdict(cfg), id=progress.wandb_id or None, resume="allow")
            progress.wandb_id = run.id      # a resumed run goes on in the same one
        except Exception as error:          # no account, no network, a wrong project
            raise UserError(f"wandb does not start ({error}). `wandb login` gives it your "
                            "account, WANDB_MODE=offline needs none, and --wandb_log=False goes "
                            "without it") from None

    def log(self, numbers, step):
        self.wandb.log({"iter": step, **numbers}, step=step)

    def close(self):
        self.wandb.finish()


class TensorBoard:
    def __init__(self, cfg, first_step):
        import_package("tensorboard", "tensorboard_log = True")
        from torch.utils.tensorboard import SummaryWriter
        try:                            # points behind first_step, of a killed run, will come again
            self.writer = SummaryWriter(cfg.out_dir, purge_step=first_step + 1)
        except Exception as error:
            raise UserError(f"TensorBoard cannot write into {cfg.out_dir}: {error}") from None

    def log(self, numbers, step):
        for name, number in numbers.items():
            if number is not None:
                self.writer.add_scalar(name, number, step)

    def close(self):
        self.writer.close()
