"""Which recipe gets furthest in the hours that there are? Its losses are predicted, by a formula.

    loss = 2.71 + 0.172 (85 M / N) ^ 0.615 + 0.465 (1 G / D) ^ 0.295

N are the parameters of the blocks, D the tokens; a token that is read again counts as much as it is
worth. The formula is for the modern network with Muon on text like FineWeb. It follows public runs
(dev/LOG.md, "Losses before the first step"); none of onecard's own runs was long enough.
"""
import math

from onecard import plan

MARGIN = 0.06                           # of a predicted loss, above and below


def predicted_loss(blocks, tokens, unique):
    """Val loss in nats a token after `tokens`, of which `unique` are different."""
    worth = plan.effective_tokens(unique, tokens)
    return 2.71 + 0.172 * (85e6 / blocks) ** 0.615 + 0.465 * (1e9 / worth) ** 0.295


def tokens_in(recipe, hours, speed):
    """Tokens that a recipe's Plan reads if its run is fitted to these hours."""
    return max(plan.steps_in(recipe, 3600 * hours, speed), 1) * recipe.tokens_per_step


def loss_range(recipe, hours):
    """(lowest, highest) predicted val loss of such a run."""
    losses = [predicted_loss(recipe.size.blocks, tokens_in(recipe, hours, speed),
                             recipe.data.train) for speed in recipe.speeds]
    return min(losses) - MARGIN, max(losses) + MARGIN


def nearest_recipes(recipes, hours):
    """{network: config file}: of recipes with the same network, that for such a long run."""
    def distance(path):
        recipe = recipes[path]
        usual = recipe.cfg.max_iters * recipe.tokens_per_step
        return abs(math.log(usual / tokens_in(recipe, hours, recipe.speeds[0])))

    fitting = [path for path, recipe in recipes.items()
               if recipe.peak_memory <= recipe.machine.room]
    fitting.sort(key=distance, reverse=True)        # the last one stays
    return {recipes[path].size.network: path for path in fitting}


def text(recipes, hours):
    """The best recipe as lines for people. `recipes` are {config file: Plan} on one machine."""
    losses = {path: loss_range(recipes[path], hours)
              for path in nearest_recipes(recipes, hours).values()}
    if not losses:
        return "advice     no recipe fits on this card"
    ranking = sorted(losses, key=lambda path: sum(losses[path]))
    lines = [f"advice     predicted val loss of each recipe after {hours:g} hours:"]
    for path in ranking:
        lowest, highest = losses[path]
        lines.append(f"           {lowest:.2f} to {highest:.2f}  {path}")
    lines.append(f"           best: python train.py {ranking[0]} --hours={hours:g}")
    return "\n".join(lines)
