"""Does a run that diverges end, and does what it saved before stay good?"""
import math

import pytest
import torch

from onecard import checkpoint
from onecard.divergence import HIGH_STEPS, Guard
from onecard.settings import UserError
from tiny_run import MUON, contents, run_steps, run_tiny, saved


def guard(scale=None):
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    scaler.scale(torch.zeros(1))                    # it makes its scale at the first use
    return Guard(64, scaler)


@pytest.mark.parametrize("factor, words", [
    (1e38, "loss is (inf|nan)"), (1e30, r"loss is \d.* gradient (inf|nan)")])
def test_a_number_that_is_not_finite_stops_the_run_before_the_update(tiny, factor, words):
    run_steps(1)
    parts = saved()
    parts["model"]["transformer.ln_f.weight"] *= factor
    checkpoint.save("out/ckpt.pt", parts)
    before = contents("out")["ckpt.pt"]
    with pytest.raises(UserError, match=f"step 2: the {words}.* unchanged.*learning_rate"):
        run_tiny(init_from="resume")
    assert contents("out")["ckpt.pt"] == before


def test_a_loss_twice_as_high_as_guessing_stops_the_run_if_it_stays():
    g, high = guard(), 2 * math.log(64) + 0.01
    for step in range(1, 5 * HIGH_STEPS):
        g.before_update(step, high if step % HIGH_STEPS else 4.0, 1.0)      # it comes down again
    with pytest.raises(UserError, match="above 8.32 for 20 steps"):
        for step in range(HIGH_STEPS):
            g.before_update(step, high, 1.0)


def test_float16_may_skip_updates_but_not_for_ever():
    for scale in (2.0**16, 1.0):                    # the scaler halves it at each skipped update
        guard(scale).before_update(1, 3.0, math.inf)
    with pytest.raises(UserError, match="float16"):
        guard(scale=0.5).before_update(1, 3.0, math.nan)


@pytest.mark.parametrize("val_loss", [math.nan, math.inf, 8e11, 28.4])
def test_a_model_that_lost_what_it_knew_is_not_saved(val_loss):
    guard().before_save(1, 28.3)                    # it may know its training text by heart
    with pytest.raises(UserError, match="step 1: the validation loss is .* unchanged"):
        guard().before_save(1, val_loss)
    g = guard()
    g.before_update(1, 8.4, 1.0)                    # it does not
    with pytest.raises(UserError, match="step 1: the validation loss is 8.4"):
        g.before_save(1, 8.4)


@pytest.mark.parametrize("settings, change", [
    ({}, dict(learning_rate=9.0)),
    ({}, dict(learning_rate=9.0, dtype="float16")),
    ({}, dict(learning_rate=9.0, save_minutes=0.0, eval_interval=1000)),    # saved, not evaluated
    (MUON, dict(learning_rate=9.0, embedding_lr=9.0, head_lr=9.0))])
def test_a_diverged_model_never_replaces_a_good_one(tiny, settings, change):
    run_steps(1, **settings)
    before = contents("out")
    with pytest.raises(UserError, match="unchanged"):
        run_tiny(**{**settings, "init_from": "resume", "max_iters": 400, "lr_decay_iters": 400,
                    "warmup_iters": 0, "force": True, **change})
    after = contents("out")
    assert [after[name] for name in ("ckpt.pt", "config.py")] == [
        before[name] for name in ("ckpt.pt", "config.py")]
    run_tiny(**settings, init_from="resume")
    assert saved()["iter_num"] == 12 and saved("best.pt")["best_val_loss"] < 4.2
