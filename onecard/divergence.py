"""A run that diverges ends before it saves, so that what was saved stays good."""
import math

from onecard.settings import UserError

HIGH_STEPS = 20                         # a run with a high loss for so many steps does not recover
VAL_MARGIN = 20                         # nats that a val loss may lie above the limit
REMEDY = ("The run stops here; what was saved before is unchanged. A lower learning_rate, a longer "
          "warmup_iters or dtype=float32 usually helps")


class Guard:
    """Raises UserError in a run that has diverged."""

    def __init__(self, vocab_size, scaler):
        # a model that knows nothing has a loss of ln(vocab_size); at twice that it is broken
        self.limit, self.scaler, self.n_high = 2 * math.log(vocab_size), scaler, 0

    def before_update(self, step, loss, grad_norm):
        """Raise UserError if the update of a step would break the weights, or if none helps."""
        result = (f"step {step:,}: the loss is {loss:.4g} and the norm of the gradient "
                  f"{grad_norm:.4g}")
        self.n_high = 0 if loss <= self.limit else self.n_high + 1
        is_broken = not math.isfinite(grad_norm)
        # in float16 a gradient may overflow: the scaler skips this update and halves its scale
        overflows = is_broken and self.scaler.is_enabled()
        if not math.isfinite(loss) or (is_broken and not overflows):
            raise UserError(f"{result}. {REMEDY}")
        if self.n_high >= HIGH_STEPS:
            raise UserError(f"{result}; the loss was above {self.limit:.3g} for {HIGH_STEPS} "
                            f"steps. {REMEDY}")
        if overflows and self.scaler.get_scale() < 1:
            raise UserError(f"{result}; float16 cannot hold the gradient, at any scale. {REMEDY}")

    def before_save(self, step, val_loss):
        """Raise UserError if the loss on some text of val says that the last update broke it."""
        limit = self.limit
        if self.n_high == 0:            # the model may only know its training text by heart
            limit += VAL_MARGIN
        if not val_loss <= limit:               # written so that nan fails, too
            raise UserError(f"step {step:,}: the validation loss is {val_loss:.4g}. {REMEDY}")
