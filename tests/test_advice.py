"""Which recipe does a plan advise for some hours, and which losses does it predict?"""
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import PROJECT, run
from model import GPTConfig
from onecard import advice, cards
from onecard.settings import configure
from train import TrainConfig, compute_plan, recipe_advice

FILE = SimpleNamespace(train=696_500_000, val=3_500_000)     # FineWeb's first one
NONE = "advice     none: no recipe is meant for"


def advised(hours, card="RTX 4070", data=FILE, less_memory=0, **settings):
    """What the plan says."""
    machine = cards.machine_named(card, torch.bfloat16)
    machine = replace(machine, room=machine.room - less_memory)
    return recipe_advice(TrainConfig(dry_run=True, hours=hours, **settings), machine, data)


def losses_of(text):
    """{recipe: (lowest, highest loss)}, in the order of the text."""
    return {name: (float(lowest), float(highest)) for lowest, highest, name
            in re.findall(r"([\d.]+) to ([\d.]+)  (\w+)\n", text)}


@pytest.mark.parametrize("hours, name", [(0.8, "64m"), (3.5, "evening"), (9.0, "overnight"),
                                         (90.0, "week")])
def test_each_recipe_is_the_advice_for_the_hours_that_it_was_made_for(hours, name):
    text = advised(hours)
    losses = losses_of(text)
    assert text.endswith(f"lowest: python train.py config/train_fineweb_4070_{name}.py "
                         f"--hours={hours:g}")
    assert list(losses)[0] == name and list(losses.values()) == sorted(losses.values(), key=sum)


def test_more_hours_faster_cards_and_compiled_models_reach_lower_losses():
    usual = sum(losses_of(advised(9.0))["evening"])
    assert sum(losses_of(advised(36.0))["evening"]) < usual
    assert sum(losses_of(advised(9.0, "RTX 4090"))["evening"]) < usual
    assert sum(losses_of(advised(9.0, compile=False))["evening"]) > usual + 0.05


def test_a_recipe_whose_schedule_is_longer_than_the_hours_is_not_named():
    assert set(losses_of(advised(1.0))) == {"64m", "evening", "overnight"}
    assert advised(0.001).startswith(NONE)


def test_nothing_is_predicted_for_a_small_text_or_a_small_card():
    assert advised(9.0, data=SimpleNamespace(train=400_000, val=40_000)).startswith(NONE)
    assert advised(9.0, less_memory=10 * 2**30).startswith(NONE)


def test_without_a_card_or_a_size_of_the_text_it_says_what_is_missing():
    assert "--n_tokens=" in advised(9.0, data=None)
    cpu = cards.Machine("a computer", "cpu", torch.float32, 2**34)
    assert "--device_name=" in recipe_advice(TrainConfig(dry_run=True, hours=9.0), cpu, FILE)


def test_a_text_that_is_read_often_teaches_less():
    new = advice.predicted_loss(85e6, 7e9, unique=7e9)
    assert advice.predicted_loss(85e6, 7e9, unique=0.7e9) > new + 0.01
    assert advice.predicted_loss(85e6, 2e9, unique=0.7e9) < advice.predicted_loss(85e6, 1e9, 0.7e9)


@pytest.mark.parametrize("name", advice.RECIPES)
def test_the_losses_in_config_and_readme_are_the_formulas(name):
    path = PROJECT / advice.config_file(name)
    cfg = configure(TrainConfig, [str(path)])
    recipe = compute_plan(cfg, GPTConfig.of(cfg), cards.machine_named("RTX 4070", torch.bfloat16))
    tokens = recipe.cfg.max_iters * recipe.tokens_per_step
    loss = advice.predicted_loss(recipe.size.blocks, tokens, FILE.train)
    losses = f"{loss - advice.MARGIN:.2f} to {loss + advice.MARGIN:.2f}"
    assert f"Val loss predicted, not measured: {losses}" in path.read_text(encoding="utf-8")
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"`{name}.py`.*\| {losses} \|", readme)


# track 3 of modded-nanogpt, #36, GPT-2's shape and vocabulary with Muon: the one public run of
# this network's kind that was repeated (n = 10)
def test_the_formula_meets_the_public_run_that_it_follows():
    assert advice.predicted_loss(85e6, 1.70e9, 10e9) == pytest.approx(3.279, abs=0.01)


def test_a_dry_run_with_hours_ends_in_advice_and_one_without_does_not(work, capsys):
    command = (PROJECT / "config" / "train_fineweb_4070_overnight.py", "--dry_run",
               "--device_name=RTX 4070", "--n_tokens=700000000")
    run(train, *command, "--hours=9")
    assert "advice     predicted val loss" in capsys.readouterr().out
    run(train, *command)
    assert "advice" not in capsys.readouterr().out
