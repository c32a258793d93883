"""Has the run diverged? Then it ends before it saves, so that what was saved stays good."""
import math

from onecard.settings import UserError

HIGH_STEPS = 20                         # in a row, after which a run does not recover
SKIPPED_STEPS = 24                      # updates in a row that the loss scaler of float16 left out
BY_HEART = 20                           # nats, above the limit of the training loss
REMEDY = ("The run stops here; what was saved before is unchanged. A lower learning_rate, a longer "
          "warmup_iters or dtype=float32 usually helps")


class Guard:
    """Raises UserError in a run that has diverged."""

    def __init__(self, vocab_size, scaler):
        # a model that knows nothing has a loss of ln(vocab_size), and a broken one has more
        self.limit, self.scaler = 2 * math.log(max(vocab_size, 2)), scaler
        self.n_high, self.n_skipped = 0, 0

    def before_update(self, step, loss, grad_norm):
        """Check a step whose update would put nan or infinity into the weights, or is useless."""
        numbers = (f"step {step:,}: the loss is {loss:.4g} and the norm of the gradient "
                   f"{grad_norm:.4g}")
        self.n_high += 1
        if loss <= self.limit:
            self.n_high = 0
        self.n_skipped += 1
        if math.isfinite(grad_norm):
            self.n_skipped = 0
        # in float16 a gradient may overflow: the scaler leaves out this update and scales less
        overflows = self.n_skipped > 0 and self.scaler.is_enabled()
        if not math.isfinite(loss) or (self.n_skipped and not overflows):
            raise UserError(f"{numbers}. {REMEDY}")
        if self.n_high >= HIGH_STEPS:
            raise UserError(f"{numbers}; the loss was above {self.limit:.3g} for {HIGH_STEPS} "
                            f"steps. {REMEDY}")
        if self.n_skipped >= SKIPPED_STEPS or (overflows and self.scaler.get_scale() < 1):
            raise UserError(f"{numbers}; float16 cannot hold the gradient, and {self.n_skipped} "
                            f"updates in a row were left out. {REMEDY}")

    def before_save(self, step, val_loss):
        """Check the loss on some text of val, after the last update."""
        # alone, a high val loss may mean that the model knows its training text by heart
        limit = self.limit if self.n_high else self.limit + BY_HEART
        if not val_loss <= limit:               # written so that nan fails, too
            raise UserError(f"step {step:,}: the validation loss is {val_loss:.4g}. {REMEDY}")
