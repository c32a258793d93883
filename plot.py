"""
Draw the loss of a run, or of several together: over tokens, over hours, and the learning rate.

    python plot.py                                  # the newest run, into its loss.png
    python plot.py out-a out-b                      # both, into loss.png here
    python plot.py out-a out-b --to=both.png --show

Needs matplotlib. The lines come from log.jsonl; where eval.json knows GPT-2's loss on the same
texts, that is a line too.
"""
import json
import math
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
from configurator import run

# told apart by colour-blind people (Okabe and Ito 2008), and in print by their dashes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class PlotConfig:
    files: tuple = ()               # folders of runs; none = the newest under out*/
    to: str = ""                    # picture to write; "" = loss.png, of one run in its folder
    show: bool = False              # open the picture too


def read(folder):
    """What log.jsonl of a run says: {"name", "train": {field: array}, "val": ..., "epoch": tokens}.

    Fields are step, tokens, hours and loss; of train lr too. "gpt2" is (name, loss) or None.
    """
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no log.jsonl; a run writes it from its first step on")
    start, train, val = {}, [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue                # a line that is being written, or was when the power went
        if entry.get("event") == "start":
            start = entry
        elif "train_loss" in entry:
            train.append({**entry, "loss": entry["train_loss"]})
        elif "val_loss" in entry:
            val.append({**entry, "loss": min(entry["val_loss"],
                                             entry.get("average_val_loss", math.inf)),
                        "tokens": entry["step"] * start.get("tokens_per_step", math.nan)})
    if not train:
        raise ValueError(f"{path} has no step yet; the first one takes a minute or two")

    def column(entries, name):
        return np.array([math.nan if entry.get(name) is None else entry[name] for entry in entries])

    scores, gpt2 = Path(folder) / "eval.json", None
    if scores.is_file():
        told = json.loads(scores.read_text(encoding="utf-8"))
        gpt2 = next(((r["model"], r["loss"]) for r in (told.get("a"), told.get("b"))
                     if r and r["model"].startswith("gpt2")), None)
    return {"name": str(folder), "epoch": start.get("tokens_per_epoch"), "gpt2": gpt2,
            "train": {k: column(train, k) for k in ("step", "tokens", "hours", "loss", "lr")},
            "val": {k: column(val, k) for k in ("step", "tokens", "hours", "loss")}}


def smoothed(values):
    """Running mean over the last thirtieth of them (at least three), the newest weigh most."""
    keep, total, weight, means = math.exp(-1 / max(len(values) / 30, 3)), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return np.array(means)


def figure(runs):
    """The matplotlib Figure of some runs, as `read` gives them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from None
    fig = Figure(figsize=(11, 5.5), layout="constrained")
    (by_tokens, by_hours), (lr_tokens, lr_hours) = fig.subplots(
        2, 2, sharex="col", sharey="row", height_ratios=[5, 1])
    most = max(r["train"]["tokens"][-1] for r in runs)
    unit, letter = (1e9, "G") if most >= 1e9 else (1e6, "M")
    hour, time_unit = (1, "hours") if max(r["train"]["hours"][-1] for r in runs) >= 1 \
        else (1 / 60, "minutes")
    lows, highs = [], []
    for i, r in enumerate(runs):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        train, val = r["train"], r["val"]
        mean = smoothed(train["loss"])
        trained = val["step"] > 0                       # the first is that of no training at all
        for axes, lr_axes, x, scale in ((by_tokens, lr_tokens, "tokens", unit),
                                        (by_hours, lr_hours, "hours", hour)):
            axes.plot(train[x] / scale, train["loss"], color=colour, alpha=0.2, linewidth=0.6)
            axes.plot(train[x] / scale, mean, color=colour, linestyle=dash, linewidth=1.0,
                      label=f"{r['name']}, train")
            if trained.any():
                at, best = val[x][trained] / scale, val["loss"][trained].min()
                axes.plot(at, val["loss"][trained], color=colour, linestyle=dash, linewidth=2.0,
                          marker=MARKERS[i % len(MARKERS)], markersize=4,
                          label=f"{r['name']}, val: best {best:.3f}")
                axes.plot(at[val["loss"][trained].argmin()], best, marker="*", markersize=13,
                          color=colour, markeredgecolor="black", linestyle="")
            lr_axes.plot(train[x] / scale, train["lr"], color=colour, linestyle=dash, linewidth=1.2)
        if len(runs) == 1 and r["epoch"]:
            n = int(train["tokens"][-1] // r["epoch"])
            for k in range(1, n + 1, max(n // 20, 1)):
                by_tokens.axvline(k * r["epoch"] / unit, color="0.75", linewidth=0.8, zorder=0)
                by_tokens.annotate(f" epoch {k} ends", (k * r["epoch"] / unit, 1), rotation=90,
                                   xycoords=("data", "axes fraction"), color="0.45", fontsize=7,
                                   verticalalignment="top", horizontalalignment="right")
        lows.append(min([*mean, *val["loss"][trained]]))
        # what comes after the first steep tenth fills the picture
        highs.append(max([*mean[len(mean) // 10:], *val["loss"][trained]]))
    for name, loss in dict(r["gpt2"] for r in runs if r["gpt2"]).items():
        for axes in (by_tokens, by_hours):
            axes.axhline(loss, color="black", linewidth=1.0, linestyle=(0, (1, 3)))
            axes.annotate(f"{name}: {loss:.3f}, each text alone", (0.99, loss), fontsize=8,
                          xycoords=("axes fraction", "data"), horizontalalignment="right",
                          verticalalignment="bottom")
        lows.append(loss)
    room = max(max(highs) - min(lows), 0.1)
    by_tokens.set_ylim(min(lows) - 0.05 * room, max(highs) + 0.05 * room)
    by_tokens.set_ylabel("loss, nats a token")
    lr_tokens.set_ylabel("learning rate")
    lr_tokens.set_xlabel(f"tokens, {letter}")
    lr_hours.set_xlabel(time_unit)
    lr_tokens.set_ylim(bottom=0)
    for axes in fig.axes:
        axes.grid(True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    by_hours.legend(loc="upper right", fontsize=8, framealpha=0.9)
    return fig


def draw(runs, path):
    """Write the picture of some runs to `path`, a .png, atomically."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    figure(runs).savefig(beside, format="png", dpi=120)
    checkpoint.replace(beside, path)


def main(cfg):
    folders = cfg.files or (checkpoint.run_folder(""),)
    path = Path(cfg.to or (Path(folders[0]) / "loss.png" if len(folders) == 1 else "loss.png"))
    if path.suffix != ".png":
        raise ValueError(f"to = {str(path)!r} is a picture; --to={path.with_suffix('.png')}")
    runs = [read(folder) for folder in folders]
    draw(runs, path)
    print(f"wrote {path}")
    if cfg.show and not webbrowser.open(path.resolve().as_uri()):
        print("no program opens pictures here")


if __name__ == "__main__":
    run(main, PlotConfig, __doc__)
