"""The picture of plot.py and train.py: losses and learning rates of runs, by matplotlib."""
import math
from pathlib import Path

import numpy as np

from onecard.files import written_beside
from onecard.settings import UserError

# colour-blind people can tell these apart (Okabe and Ito 2008); the dashes help in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


def draw(logs, path):
    """Write the picture of some runs to `path`, atomically: .png, .svg or .pdf.

    `logs` is {name of a run: the entries of its log.jsonl}.
    """
    figure = make_figure(logs)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        figure.savefig(beside, format=Path(path).suffix[1:], dpi=120)


def make_figure(logs):
    """The matplotlib Figure: losses above, learning rates below, over tokens and over hours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=[5, 1])
    late_losses = []
    for i, (name, entries) in enumerate(logs.items()):
        name = name.replace("$", r"\$")     # else it begins a formula
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        late_losses.extend(draw_run(axes, name, entries, style))
    low, high = min(late_losses), max(late_losses)
    margin = 0.05 * max(high - low, 0.1)
    axes[0, 0].set(ylabel="loss, nats a token", ylim=(low - margin, high + margin))
    axes[1, 0].set(ylabel="learning rate", xlabel="tokens", ylim=(0, None))
    axes[1, 0].xaxis.set_major_formatter(EngFormatter())    # 500 M, 1 G
    axes[1, 1].set(xlabel="hours")
    axes[0, 1].legend(loc="upper right", fontsize=8)
    for ax in axes.flat:
        ax.grid(True, color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_run(axes, name, entries, style):
    """Draw a run into all four axes; return its losses without the first tenth, which is steep."""
    # at step 0 the model has learned nothing: its loss is far above all others
    entries = [entry for entry in entries if entry["step"] > 0]
    train = [entry for entry in entries if entry.get("train_loss") is not None]
    val = [entry for entry in entries if entry.get("val_loss") is not None]
    if not train:
        raise UserError(f"{name}/log.jsonl holds no loss yet; the first step takes some minutes")
    # evaluations have no tokens
    tokens_per_step = (column(train, "tokens") / column(train, "step"))[-1]
    losses, val_losses = column(train, "train_loss"), column(val, "val_loss")
    means = smoothed(losses)
    for j, (key, scale) in enumerate([("step", tokens_per_step), ("hours", 1)]):
        x, val_x = scale * column(train, key), scale * column(val, key)
        axes[0, j].plot(x, losses, color=style["color"], alpha=0.2, linewidth=0.6)
        axes[0, j].plot(x, means, **style, linewidth=1, label=f"{name}, train")
        if val:
            axes[0, j].plot(val_x, val_losses, **style, linewidth=2, marker="o", markersize=4,
                            label=f"{name}, val, best {val_losses.min():.3f}")
        axes[1, j].plot(x, column(train, "lr"), **style)
    return [*means[len(means) // 10:], *val_losses[len(val_losses) // 10:]]


def column(entries, key):
    """The numbers of `key`; nan, which matplotlib leaves out, where there is none."""
    return np.array([entry.get(key) for entry in entries], dtype=float)


def smoothed(losses):
    """Their exponential moving average, over about a thirtieth of them."""
    keep = math.exp(-1 / max(len(losses) / 30, 3))
    total, weight, means = 0.0, 0.0, []
    for loss in losses:
        total = keep * total + loss
        weight = keep * weight + 1
        means.append(total / weight)
    return np.array(means)
