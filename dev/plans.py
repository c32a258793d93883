"""What does each recipe need on cards of 8 to 24 GB? A table for dev/cards.md.

    python dev/plans.py
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from model import GPTConfig  # noqa: E402
from onecard import cards, plan  # noqa: E402
from onecard.settings import configure  # noqa: E402
from onecard.units import period  # noqa: E402
from train import TrainConfig, compute_plan  # noqa: E402

RECIPES = ("evening", "overnight", "64m", "week", "one_shard")
CARDS = ("RTX 4060", "RTX 3080", "RTX 4070", "RTX 5060 Ti", "RTX 4090")
DATA = SimpleNamespace(train=696_500_000, val=3_500_000)


def row(recipe, name):
    cfg = configure(TrainConfig, [str(PROJECT / "config" / f"train_fineweb_4070_{recipe}.py")])
    machine = cards.machine_named(name, torch.bfloat16)
    planned = compute_plan(cfg, GPTConfig.of(cfg), machine, DATA)
    fit = planned.fit
    slow, fast = planned.speeds
    recompute = "yes" if fit.recompute else "no"
    cells = [recipe, f"{machine.card.memory_mib / 1024:.0f} GB ({name})",
             f"{fit.batch_size} x {cfg.block_size}", f"{fit.chunk:,}", recompute,
             f"{planned.peak_memory / 2**30:.1f} of {machine.room / 2**30:.1f}",
             period(plan.seconds(planned, fast), plan.seconds(planned, slow))]
    return f"| {' | '.join(cells)} |"


def main():
    print("| recipe | card | micro-batch | logits | recompute | GiB | predicted |\n"
          "|---|---|---|--:|---|--:|--:|")
    for recipe in RECIPES:
        for name in CARDS:
            print(row(recipe, name))


if __name__ == "__main__":
    main()
