"""What does a run report? A bar, log.jsonl, loss.png; wandb and TensorBoard if they are wanted.

A report never ends a run: what cannot be printed is dropped, and what cannot be written is said.
"""
import math
import statistics
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from onecard import figure, plan, resume, runtime
from onecard.logfile import LogFile, read_log
from onecard.trackers import TensorBoard, Wandb
from onecard.units import gib, period

SECONDS_BETWEEN_PICTURES = 60           # one takes about a second
SECONDS_BETWEEN_LINES = 10              # where no terminal shows a bar
STEPS_TO_MEASURE = 20                   # after the first one, which compiles
NEXT = """Next:
    python sample.py --out_dir={out_dir}   # let it write
    python eval.py --out_dir={out_dir}     # how good it is, text by text
    python plot.py {out_dir}               # its loss as a picture, {out_dir}/loss.png"""


class RunLog:
    """The reports of a run. Only the first rank opens it and writes."""

    def __init__(self, run_plan, world, progress):
        self.plan, self.cfg, self.world, self.progress = run_plan, run_plan.cfg, world, progress
        self.out_dir = Path(self.cfg.out_dir)
        self.file = LogFile(self.out_dir / "log.jsonl")
        self.first_step, self.hours_before = progress.step, progress.hours
        self.started = time.monotonic()
        self.recent = deque(maxlen=200)     # seconds of the last steps
        self.slow_seconds, self.said_slow = 0.0, False
        self.drawn_at = self.started        # when the last loss.png was drawn
        self.printed_at = -math.inf         # when the last line of a step was printed
        self.is_open, self.bar, self.trackers = False, None, []

    def open(self, data):
        """Start log.jsonl, or go on with it from the step of the checkpoint."""
        self.tokens_per_epoch = data.n_windows * data.block_size
        if self.cfg.wandb_log:
            self.trackers.append(Wandb(self.cfg, self.progress))
        if self.cfg.tensorboard_log:
            self.trackers.append(TensorBoard(self.cfg, self.first_step))
        if resume.in_own_folder(self.cfg):
            self.file.keep_until(self.first_step)
        self.is_open = True
        self.write(event="start", time=time.strftime("%Y-%m-%dT%H:%M:%S"),
                   device=runtime.device_name(self.world.device), world_size=self.world.size,
                   versions=runtime.versions(), config=asdict(self.cfg),
                   dataset=data.fingerprint, parameters=self.plan.size.total)
        print(f"output     {self.out_dir}, from step {self.first_step:,} on")

    def write(self, **entry):
        """Add a line to log.jsonl."""
        self.file.add({"step": self.progress.step, **entry})
        self.flush()

    def flush(self):
        """Write log.jsonl, if it is not an older run's that still has to stay."""
        if not self.progress.holds_old_run:
            self.file.flush()

    def hours_since_start(self):
        """Hours since this process began to train."""
        return (time.monotonic() - self.started) / 3600

    def hours_with_resumes(self):
        """Hours of training so far, over all processes that went on with this run."""
        return self.hours_before + self.hours_since_start()

    def evaluation(self, val_loss, sample):
        """Report a validation loss, and what the model writes now."""
        step = self.progress.step
        self.world.print(f"step {step:,}: val loss {val_loss:.4f}")
        if sample and step > 0:             # at step 0 it writes noise
            self.world.print(f"    it writes: {' '.join(sample.split())}")
        if not self.is_open:
            return
        self.write(val_loss=val_loss, hours=self.hours_with_resumes(), sample=sample)
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
            figure.draw({str(self.out_dir): read_log(self.file.path)}, self.out_dir / "loss.png")
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
                   tokens_per_s=rate, mfu=mfu, hours=self.hours_with_resumes())
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
        last_steps = list(self.recent)[-STEPS_TO_MEASURE:]
        measured = self.plan.tokens_per_step / statistics.median(last_steps)
        return replace(self.plan, steps_before=self.progress.step, measured=measured)

    def set_plan(self, run_plan):
        """Report by this plan from now on."""
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
                             f"{period(total, total)} from here, until {end}")

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
                held = (f" This run holds {gib(torch.cuda.memory_reserved(device))} of the "
                        f"card, and {gib(runtime.free_bytes(device))} are free: if that is "
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
        elif self.cfg.max_hours and self.hours_since_start() > self.cfg.max_hours:
            reason = "max_hours are over: stopped"
        if self.progress.holds_old_run or not (self.out_dir / "ckpt.pt").is_file():
            advice = "Nothing was saved"
        hours = self.hours_with_resumes()
        print(f"{reason} at step {step:,} after {hours:.2f} hours, best val loss {best}. {advice}")
