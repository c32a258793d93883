import json

import numpy as np
import pytest

import plot
import train
from conftest import script
from test_train import run

pytest.importorskip("matplotlib")


def write_run(folder, steps=200, seed=0, epoch=40_000, average=False):
    """A run's log.jsonl: 1,000 tokens a step, val every 50 steps, best at step 150."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    lines = [{"step": 0, "event": "start", "tokens_per_step": 1000, "tokens_per_epoch": epoch},
             {"step": 0, "val_loss": 10.8, "hours": 0.0}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "tokens": step * 1000, "epoch": step * 1000 / epoch,
                      "train_loss": 3 + 8 * np.exp(-step / 20) + 0.1 * rng.normal(), "lr": 1e-3,
                      "grad_norm": 1.0, "tokens_per_s": None, "mfu": None, "hours": step / 100})
        if step % 50 == 0:
            told = {"average_val_loss": 3.0 + abs(step - 150) / 100} if average else {}
            lines.append({"step": step, "val_loss": 3.1 + abs(step - 150) / 100, **told,
                          "hours": step / 100})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def lines_of(axes, label):
    return [line for line in axes.lines if str(line.get_label()).startswith(label)]


def test_the_lines_are_those_of_the_log(work):
    told = write_run(work / "out-a")
    fig = plot.figure([plot.read("out-a")])
    by_tokens, by_hours, lr_tokens, lr_hours = fig.axes
    losses = [line["train_loss"] for line in told if "train_loss" in line]
    for axes, x in ((by_tokens, np.arange(1, 201) / 1000), (by_hours, np.arange(1, 201) / 100)):
        raw = axes.lines[0]
        assert np.allclose(raw.get_xdata(), x) and np.allclose(raw.get_ydata(), losses)
        val, = lines_of(axes, "out-a, val: best 3.100")
        assert np.allclose(val.get_xdata(), x[49::50])
        assert np.allclose(val.get_ydata(), [4.1, 3.6, 3.1, 3.6])
        star, = [line for line in axes.lines if line.get_marker() == "*"]
        assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((x[149], 3.1))
        low, high = axes.get_ylim()
        assert low < 3.0 < 4.1 < high < 9           # the first steps do not squeeze the rest
    assert np.allclose(lr_tokens.lines[0].get_ydata(), 1e-3)
    assert by_tokens.texts[0].get_text().strip() == "epoch 1 ends" and len(by_tokens.texts) == 5
    assert lr_tokens.get_xlabel() == "tokens, M" and lr_hours.get_xlabel() == "hours"


def test_runs_are_told_apart_by_colour_and_by_dashes(work):
    for i in range(4):
        write_run(work / f"out-{i}", seed=i)
    fig = plot.figure([plot.read(f"out-{i}") for i in range(4)])
    vals = [lines_of(fig.axes[0], f"out-{i}, val")[0] for i in range(4)]
    for looks in ("get_color", "get_linestyle", "get_marker"):
        assert len({getattr(line, looks)() for line in vals}) == 4
    shown = [text.get_text() for text in fig.axes[1].get_legend().get_texts()]
    assert len(shown) == 8 and not fig.axes[0].texts     # epochs of several runs would be a fence


def test_the_better_of_weights_and_their_average_is_shown(work):
    write_run(work / "out", average=True)
    assert plot.read("out")["val"]["loss"][1:] == pytest.approx([4.0, 3.5, 3.0, 3.5])


def test_gpt2_is_a_line_where_it_was_measured(work):
    write_run(work / "out")
    assert plot.read("out")["gpt2"] is None
    (work / "out/eval.json").write_text(json.dumps({
        "a": {"model": "out/best.pt, step 150", "loss": 3.1}, "b": {"model": "gpt2", "loss": 2.5}}))
    fig = plot.figure([plot.read("out")])
    assert any(list(line.get_ydata()) == [2.5, 2.5] for line in fig.axes[0].lines)
    assert any("gpt2: 2.500" in text.get_text() for text in fig.axes[0].texts)
    assert fig.axes[0].get_ylim()[0] < 2.5


def test_smoothing_follows_the_mean_and_loses_the_noise():
    noise = np.random.default_rng(0).normal(5, 1, 3000)
    means = plot.smoothed(noise)
    assert means[0] == noise[0] and means[300:].std() < 0.2
    assert means[300:].mean() == pytest.approx(5, abs=0.1)
    assert plot.smoothed(np.full(7, 2.0)) == pytest.approx(np.full(7, 2.0))


def test_a_picture_that_fails_leaves_the_old_one(work, monkeypatch):
    write_run(work / "out")
    plot.draw([plot.read("out")], "loss.png")
    before = (work / "loss.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    from matplotlib.figure import Figure

    def half(self, path, **options):
        path.write_bytes(b"half a picture")
        raise OSError("No space left on device")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        plot.draw([plot.read("out")], "loss.png")
    assert (work / "loss.png").read_bytes() == before


def test_the_script_draws_a_run_that_goes_on_or_several(work):
    write_run(work / "out-a")
    (work / "out-a/ckpt.pt").write_bytes(b"")
    with open(work / "out-a/log.jsonl", "a") as f:
        f.write('{"step": 201, "tok')                       # a line that is being written
    assert "wrote out-a/loss.png" in script("plot.py", cwd=work).stdout
    write_run(work / "out-b", seed=1)
    script("plot.py", "out-a", "out-b", "--to=both.png", cwd=work)
    assert (work / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere"], "nowhere holds no log.jsonl"),
    (["new"], "new/log.jsonl has no step yet"),
    (["out", "--to=loss.pdf"], "--to=loss.png"),
    ([], "there is no run under out*/")])
def test_mistakes_get_one_sentence(work, arguments, sentence):
    write_run(work / "out")
    (work / "new").mkdir()
    (work / "new/log.jsonl").write_text('{"step": 0, "val_loss": 10.8, "hours": 0.0}\n')
    done = script("plot.py", *arguments, cwd=work, check=False)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_run_redraws_its_picture_and_never_stops_for_it(work, monkeypatch):
    write_run(work / "out")
    said = []
    train.draw(work / "out", said.append)
    assert (work / "out/loss.png").read_bytes().startswith(b"\x89PNG") and not said
    monkeypatch.setattr(plot, "figure", lambda runs: 1 / 0)
    train.draw(work / "out", said.append)
    assert said == ["warning    loss.png was not drawn: ZeroDivisionError: division by zero"]
    monkeypatch.setattr(plot, "figure", lambda runs: exec("raise ImportError"))
    train.draw(work / "out", said.append)                   # without matplotlib: no picture
    assert len(said) == 1


def test_train_leaves_a_picture_in_the_folder_of_the_run(tiny):
    run(max_iters=4, eval_interval=2)
    assert (tiny / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot.read("out")["val"]["step"].tolist() == [0, 2, 4]
