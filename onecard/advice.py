"""Which recipe gets furthest in the given hours? Its losses are predicted, by a formula.

    loss = 2.71 + 0.172 (85 M / N) ^ 0.615 + 0.465 (1 G / D) ^ 0.295

N are the parameters of the blocks, D the tokens; repeated ones count less (plan.effective_tokens).
The formula is for the modern network with Muon on text like FineWeb. It follows public runs
(dev/LOG.md, "Losses before the first step"); none of onecard's own runs was long enough.
"""
import math

from onecard import plan

RECIPES = "64m", "evening", "overnight", "week"     # config/train_fineweb_4070_*.py
MARGIN = 0.06                           # of a predicted loss, above and below
FEWEST_TOKENS = 0.1e9                   # the formula is not made for fewer


def predicted_loss(blocks, tokens, unique):
    """Val loss in nats a token after `tokens`, of which `unique` are different."""
    worth = plan.effective_tokens(unique, tokens)
    return 2.71 + 0.172 * (85e6 / blocks) ** 0.615 + 0.465 * (1e9 / worth) ** 0.295


def tokens_in(hours, speed):
    """Tokens that a run reads in these hours. The time of evaluations (1 %) is ignored."""
    return plan.SHARE_OF_STEPS * 3600 * hours * speed


def loss_range(recipe, hours):
    """(lowest, highest) val loss of a recipe's Plan, if its run is fitted to these hours."""
    losses = [predicted_loss(recipe.size.blocks, tokens_in(hours, speed), recipe.data.train)
              for speed in recipe.speeds]
    return min(losses) - MARGIN, max(losses) + MARGIN


def is_possible(recipe, hours):
    """Whether a recipe has enough text, memory, and time for its shortest schedule."""
    tokens = tokens_in(hours, recipe.speeds[0])
    # with_max_iters() takes the shortest schedule, as 0 steps are too few
    fewest_steps = plan.with_max_iters(recipe.cfg, max_iters=0, step=0).max_iters
    shortest = fewest_steps * recipe.tokens_per_step
    has_room = recipe.peak_memory <= recipe.machine.room
    has_text = recipe.data.train >= FEWEST_TOKENS
    return has_room and has_text and tokens >= max(shortest, FEWEST_TOKENS)


def text(recipes, hours):
    """The ranking as lines for people. `recipes` are {name: Plan} for one machine and one text."""
    def rank(name):                     # equal losses: the recipe whose usual length is nearest
        recipe = recipes[name]
        usual = recipe.cfg.max_iters * recipe.tokens_per_step
        middle = math.sqrt(math.prod(tokens_in(hours, speed) for speed in recipe.speeds))
        return sum(loss_range(recipe, hours)), abs(math.log(usual / middle))

    possible = [name for name, recipe in recipes.items() if is_possible(recipe, hours)]
    if not possible:
        return f"advice     none: no recipe is meant for {hours:g} hours with this card and text"
    ranking = sorted(possible, key=rank)
    lines = [f"advice     predicted val loss after {hours:g} hours:"]
    for name in ranking:
        lowest, highest = loss_range(recipes[name], hours)
        lines.append(f"           {lowest:.2f} to {highest:.2f}  {name}")
    lines.append(f"           lowest: python train.py {config_file(ranking[0])} --hours={hours:g}")
    return "\n".join(lines)


def config_file(name):
    return f"config/train_fineweb_4070_{name}.py"
