import json
import sys

import numpy as np
import pytest

import plot
from conftest import run
from onecard import figure
from onecard.settings import UserError

pytest.importorskip("matplotlib")
STEPS = np.arange(1, 201)
LOSSES = 3 + 8 * np.exp(-STEPS / 20) + np.random.default_rng(0).normal(0, 0.1, 200)
LOG = [{"step": 0, "event": "start"}, {"step": 0, "val_loss": 10.8, "hours": 0.0}]
for step, loss in enumerate(LOSSES, 1):     # of 1,000 tokens; val every 50, best at step 150
    LOG.append(dict(step=step, hours=step / 100, train_loss=loss, tokens=1000 * step, lr=step))
    if step % 50 == 0:
        LOG.append(dict(step=step, hours=step / 100, val_loss=3.1 + abs(step - 150) / 100))


def test_the_curves_are_those_of_the_log():
    axes = figure.make_figure({"out": LOG}).axes
    for i, x in enumerate((1000 * STEPS, STEPS / 100)):
        loss_axes, lr_axes = axes[i], axes[i + 2]
        raw, mean, val = loss_axes.lines
        assert np.allclose(raw.get_xydata(), np.stack((x, LOSSES), 1))
        assert np.allclose(val.get_xydata(), np.stack((x[49::50], [4.1, 3.6, 3.1, 3.6]), 1))
        assert np.allclose(lr_axes.lines[0].get_xydata(), np.stack((x, STEPS), 1))
        assert mean.get_label() == "out, train" and val.get_label() == "out, val, best 3.100"
        low, high = loss_axes.get_ylim()
        assert low < 3.0 < 4.1 < high < 8       # the first steps do not squeeze the rest


def test_runs_differ_by_colour_and_by_dashes():
    vals = figure.make_figure({f"out-{i}": LOG for i in range(4)}).axes[0].lines[2::3]
    for look in ("color", "linestyle"):
        assert len({line.properties()[look] for line in vals}) == 4


def test_smoothing_follows_the_mean_and_loses_the_noise():
    means = figure.smoothed(np.random.default_rng(0).normal(5, 1, 3000))
    assert means[300:].std() < 0.2 and means[300:].mean() == pytest.approx(5, abs=0.1)


def test_one_run_is_drawn_into_its_folder_and_several_into_a_file(work, capsys):
    for folder in (work / "out-a", work / "out-b"):
        folder.mkdir()
        lines = [*map(json.dumps, LOG), '{"step": 201, "tok']       # the last is being written
        (folder / "log.jsonl").write_text("\n".join(lines))
    (work / "out-a" / "ckpt.pt").touch()
    run(plot)                               # the newest run
    run(plot, "out-a", "out-b")
    run(plot, "out-a", "out-b", "--to=pictures/both.svg")
    written = capsys.readouterr().out.replace("wrote ", "").split()
    assert written == ["out-a/loss.png", "loss.png", "pictures/both.svg"]
    assert (work / "out-a/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (work / "pictures/both.svg").read_text()


@pytest.mark.parametrize("arguments, sentence", [
    (["out"], "out is no folder of a run"), ([], "there is no run under out"),
    (["."], "./log.jsonl holds no loss yet; the first step"),
    (["--to=loss.txt"], "to = 'loss.txt' is not a .png, .svg or .pdf"),
    (["without matplotlib"], "a picture needs matplotlib: pip install matplotlib$"),
    (["without matplotlib.figure"], "matplotlib.figure")])
def test_mistakes_are_one_sentence(work, monkeypatch, arguments, sentence):
    for name in ("matplotlib", "matplotlib.figure"):
        if arguments == [f"without {name}"]:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=sentence):
        run(plot, *arguments)
    assert not list(work.iterdir())


def test_what_a_log_lacks_leaves_the_rest_of_the_picture():
    log = [{key: value for key, value in entry.items() if key not in ("tokens", "lr")}
           for entry in LOG]
    log[20]["train_loss"], log[30]["train_loss"] = None, None       # they were not finite
    raw, mean, val = figure.make_figure({"out": log}).axes[1].lines         # over hours
    assert len(raw.get_xdata()) == 198 and len(val.get_xdata()) == 4
    assert np.isfinite(mean.get_ydata()).all()
