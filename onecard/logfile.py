"""log.jsonl of a run: one JSON object a line, for each step, evaluation and start."""
import json
import math
from pathlib import Path

from tqdm import tqdm

from onecard.files import write_text


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


class LogFile:
    """Writes log.jsonl. A full disk ends no run: what it does not take is tried again later."""

    def __init__(self, path):
        self.path = path
        self.older_lines = ""           # that stay before the new ones; None once they are written
        self.waiting = b""              # new lines that are not on the disk yet
        self.has_warned = False

    def keep_until(self, step):
        """Keep what the file has up to a step.

        A killed run may have logged steps after its last checkpoint; they will come again.
        """
        self.older_lines = "".join(json.dumps(entry) + "\n" for entry in read_log(self.path)
                                   if entry["step"] <= step)

    def add(self, entry):
        """Add the dict `entry` as a line; flush() writes it."""
        for name, number in entry.items():
            if isinstance(number, float) and not math.isfinite(number):
                entry[name] = None      # JSON has no infinity
        self.waiting += json.dumps(entry).encode() + b"\n"

    def flush(self):
        """Write the lines that are waiting."""
        if not self.waiting:            # as always on other ranks than the first one
            return
        try:
            if self.older_lines is not None:
                write_text(self.path, self.older_lines)
                self.older_lines = None
            with open(self.path, "ab", buffering=0) as file:
                n_written = file.write(self.waiting)        # on a full disk perhaps not all
            self.waiting, self.has_warned = self.waiting[n_written:], False
        except OSError as error:
            if not self.has_warned:
                tqdm.write(f"warning    {self.path} cannot be written, the run goes on, and tries "
                           f"it again: {error}")
            self.has_warned = True
