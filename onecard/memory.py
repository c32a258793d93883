"""How much memory does training need, and which micro-batch fits? Counted in bytes, by hand.

Usually a step is at its peak while the loss is computed: it holds what all layers keep for the
backward pass, and a chunk of logits. The count is within 4 % of the peaks of six runs on an H100.
dev/trace.py compares it with steps on tensors without data.

Weights, gradients, their averages and the stream between the blocks are in fp32: 4 bytes a number.
All others have `itemsize` bytes, which is 2 in bf16 and fp16. `c` is the GPTConfig of the network,
`size` a plan.Size and `machine` a cards.Machine.
"""
import math

from onecard.loss import CHUNK

FRAGMENTATION = 1.05                    # what CUDA's allocator holds, of what is alive (H100: 1.03)
MAX_WINDOWS = 2**12                     # of a micro-batch that is looked for
MAX_TOKENS = {"cuda": 2**16, "mps": 2**13, "cpu": 2**13}    # of a micro-batch; more is no faster


def needed(cfg, size, machine, batch_size):
    """Bytes that training needs with micro-batches of `batch_size` windows.

    An evaluation always needs less: it keeps nothing for a backward pass.
    """
    c, itemsize, tokens = size.network, machine.dtype.itemsize, batch_size * cfg.block_size
    state = 16 * size.total             # a weight, its gradient, and AdamW's two averages
    if machine.count > 1:
        state += 4 * size.total         # the sum of all processes' gradients
    kept = tokens * c.n_layer * kept_by_layer(c, itemsize, cfg.compile)
    if machine.kind == "cpu" and c.norm == "rmsnorm" and not cfg.compile:
        kept += tokens * c.n_layer * 24 * c.n_embd      # the result of each of its operations
    peak = kept + needed_by_loss(c, tokens, itemsize, cfg.compile)
    if cfg.compile:                     # its backward ends with all new gradients at once
        peak = max(peak, 4 * size.blocks + 8 * c.vocab_size * c.n_embd)
    elif itemsize == 2:
        peak += 2 * size.blocks         # autocast keeps its copies of the weights
    if cfg.optimizer == "muon":
        state -= 4 * size.blocks        # a matrix has one average
        # five stacks of all matrices of one shape: the attention's, or the first of the MLPs
        stack = c.n_layer * c.n_embd * max(4 * c.n_embd, mlp_width(c))
        peak = max(peak, 5 * itemsize * stack)
    return round(FRAGMENTATION * (state + peak))


def kept_by_layer(c, itemsize, compiled):
    """Bytes of one token that a layer keeps for its backward pass."""
    C = c.n_embd
    numbers = 4 * C + mlp_width(c)      # queries, keys, values, attention's result; MLP's first
    if c.position == "rotary" or c.qk_norm:
        numbers += 2 * C                # queries and keys once more, as attention sees them
        if not compiled:
            numbers += C                # attention's result, in another order
    if not compiled:                    # compiled, these are computed again:
        numbers += 2 * C + mlp_width(c)     # the results of both norms and the MLP's activation
    n_bytes = itemsize * numbers + 8 * C    # 8 C: the stream, before attention and before the MLP
    if c.dropout:
        n_bytes += 2 * C                # which numbers were dropped
    return n_bytes


def mlp_width(c):
    """How many numbers the MLP's first matrix makes of a token."""
    if c.mlp == "swiglu":
        return 2 * c.inner_size
    return c.inner_size


def needed_by_loss(c, tokens, itemsize, compiled):
    """Bytes of the last norm's result, of a chunk's logits, and of the head's gradient."""
    n_chunks = max(math.ceil(tokens / CHUNK), 2)
    n_logits = math.ceil(tokens / n_chunks) * c.vocab_size
    logit = 6                           # in fp32, and once more in bf16
    if compiled:
        logit = 2 * itemsize            # it and its gradient
    return 12 * tokens * c.n_embd + logit * n_logits + 8 * c.vocab_size * c.n_embd


def largest_batch(cfg, size, machine, max_tokens=math.inf):
    """Windows in the largest micro-batch that fits and divides a step; 0 if not even one fits."""
    windows = cfg.windows_per_step // machine.count
    fitting = [B for B in range(1, min(windows, MAX_WINDOWS) + 1)
               if windows % B == 0 and B * cfg.block_size <= max_tokens
               and needed(cfg, size, machine, B) <= machine.room]
    return max(fitting, default=0)


def choose_batch(cfg, size, machine):
    """The batch_size that batch_size = 0 stands for. If not even one window fits: one."""
    return max(largest_batch(cfg, size, machine, MAX_TOKENS[machine.kind]), 1)
