"""Which recipe does a plan advise for some hours, and which losses does it predict?"""
import re
from types import SimpleNamespace

import pytest
import torch

from conftest import PROJECT, script
from onecard import advice, cards
from train import recipes

FILE = SimpleNamespace(train=696_500_000, val=3_500_000)     # FineWeb's first one


def plans(card="RTX 4070", data=FILE):
    return recipes(cards.machine_named(card, torch.bfloat16), data)


def advised(hours, **of_machine):
    """(the recipe, {recipe: (lowest, highest loss)}) that the text names."""
    lines = advice.text(plans(**of_machine), hours).splitlines()
    losses = {name: (float(lowest), float(highest)) for line in lines for lowest, highest, name
              in re.findall(r"([\d.]+) to ([\d.]+)  config/train_fineweb_4070_(\w+).py", line)}
    name, = re.findall(rf"best: python train.py config/train_fineweb_4070_(\w+).py "
                       rf"--hours={hours:g}", lines[-1])
    return name, losses


@pytest.mark.parametrize("hours, name", [(1, "64m"), (3.5, "evening"), (9, "overnight"),
                                         (90, "week")])
def test_each_recipe_is_the_advice_for_the_hours_that_it_was_made_for(hours, name):
    best, losses = advised(hours)
    assert best == name == min(losses, key=lambda recipe: sum(losses[recipe]))
    assert len(losses) == 3                             # evening and overnight are one network


def test_more_hours_and_faster_cards_reach_lower_losses_but_never_the_formulas_end():
    losses = [sum(advised(hours)[1]["week"]) / 2 for hours in (1, 4, 16, 64, 256, 10**5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 2.9
    assert sum(advised(9, card="RTX 4090")[1]["week"]) < sum(advised(9)[1]["week"])


def test_a_text_that_is_read_often_teaches_less():
    new = advice.predicted_loss(85e6, 7e9, unique=7e9)
    assert advice.predicted_loss(85e6, 7e9, unique=0.7e9) > new + 0.01
    assert advice.predicted_loss(85e6, 2e9, unique=0.7e9) < advice.predicted_loss(85e6, 1e9, 0.7e9)


def test_a_recipe_that_does_not_fit_is_not_advised():
    recipes_of_card = plans()
    for plan in recipes_of_card.values():
        object.__setattr__(plan.machine, "room", 2**30)
    assert advice.text(recipes_of_card, 9.0) == "advice     no recipe fits on this card"


@pytest.mark.parametrize("name", ["evening", "overnight", "64m", "week"])
def test_the_losses_in_config_and_readme_are_the_formulas(name):
    recipe = plans()[f"config/train_fineweb_4070_{name}.py"]
    tokens = recipe.cfg.max_iters * recipe.tokens_per_step
    loss = advice.predicted_loss(recipe.size.blocks, tokens, FILE.train)
    losses = f"{loss - advice.MARGIN:.2f} to {loss + advice.MARGIN:.2f}"
    head = (PROJECT / "config" / f"train_fineweb_4070_{name}.py").read_text(encoding="utf-8")
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert f"Val loss predicted, not measured: {losses}" in head
    assert re.search(rf"`{name}.py`.*\| {losses} \|", readme)


# track 3 of modded-nanogpt, #36, GPT-2's shape and vocabulary with Muon: the one public run of
# this network's kind that was repeated (n = 10)
def test_the_formula_meets_the_public_run_that_it_follows():
    assert advice.predicted_loss(85e6, 1.70e9, 10e9) == pytest.approx(3.279, abs=0.01)


def test_a_dry_run_with_hours_ends_in_advice_and_one_without_does_not(work):
    command = ("train.py", PROJECT / "config" / "train_fineweb_4070_overnight.py", "--dry_run",
               "--device_name=RTX 4070", "--n_tokens=700000000")
    assert "recipe after 9 hours:\n" in script(*command, "--hours=9", cwd=work).stdout
    assert "advice" not in script(*command, cwd=work).stdout
