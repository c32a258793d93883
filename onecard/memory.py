"""How much memory training needs, and which micro-batch is best. Counted by hand.

Usually a step is at its peak while the loss is computed: it holds what all layers keep for the
backward pass, and a chunk of logits.

Weights, gradients and their averages are in fp32: 4 bytes a number. All others have `itemsize`
bytes, which is 2 in bf16 and fp16. `c` is the GPTConfig of the network, `size` a plan.Size and
`machine` a cards.Machine.
"""
import math
from dataclasses import asdict, dataclass

import torch

from onecard.loss import SMALLEST_CHUNK

FRAGMENTATION = 1.05                    # what CUDA's allocator holds, of what is alive (H100: 1.03)
MAX_TOKENS = {"cuda": 2**16, "mps": 2**13, "cpu": 2**13}    # of a micro-batch; more is no faster
# bytes that an RTX 4070 really moves while it computes one FLOP: 454 GB/s, 37 TFLOP/s
BYTES_PER_FLOP = 1 / 80
SLACK = 0.005                           # so much slower is good enough, to save memory


@dataclass(frozen=True)
class Fit:
    """How a micro-batch is computed."""
    batch_size: int                     # windows in it
    chunk: int                          # tokens whose logits exist at the same time
    recompute: bool                     # compute cheap activations again in backward


def choose(cfg, size, machine, saved=None):
    """The smallest Fit with room that is at most half a per cent slower than the fastest.

    If none has room, the one that needs the least memory. A resumed run keeps its own (`saved`, a
    dict) if that has room: another one gives other rounding errors.
    """
    batch_sizes = [cfg.batch_size]
    if cfg.batch_size == 0:             # all that divide a step
        windows = max(cfg.windows_per_step // machine.count, 1)
        most = max(MAX_TOKENS[machine.kind] // cfg.block_size, 1)
        batch_sizes = [B for B in range(1, min(windows, most) + 1) if windows % B == 0]
    fits = [fit for B in batch_sizes for fit in fits_of(cfg, B)]
    memory = {fit: needed(cfg, size, machine, fit) for fit in fits}
    traffics = {fit: traffic(cfg, size, fit) for fit in fits if memory[fit] <= machine.room}
    for fit in traffics:
        if asdict(fit) == saved:
            return fit
    if traffics:                        # as many bytes more as move in SLACK of a token's time
        limit = min(traffics.values()) + SLACK * BYTES_PER_FLOP * size.flops_per_token
        fits = [fit for fit in traffics if traffics[fit] <= limit]
    return min(fits, key=memory.get)


def fits_of(cfg, batch_size):
    """Every way to compute micro-batches of `batch_size` windows."""
    tokens = batch_size * cfg.block_size
    n_chunks = [1]
    while tokens / (2 * n_chunks[-1]) >= SMALLEST_CHUNK:
        n_chunks.append(2 * n_chunks[-1])
    chunks = [math.ceil(tokens / n / 128) * 128 for n in n_chunks]      # 128: a tile of a product
    recomputes = {"auto": (False, True), "no": (False,), "yes": (True,)}[cfg.recompute]
    if not cfg.compile:
        recomputes = (False,)
    return [Fit(batch_size, chunk, recompute) for chunk in chunks for recompute in recomputes]


def traffic(cfg, size, fit):
    """Bytes a token of this Fit for weights and recomputing; only differences have a meaning.

    Weights are moved once a micro-batch, so small ones move more for each token. Counted in
    Inductor's schedule and in loss.py.
    """
    c, tokens = size.network, fit.batch_size * cfg.block_size
    n_chunks = math.ceil(tokens / fit.chunk)
    # in each micro-batch, a weight is cast to bf16 (6 bytes), and its gradient is cast to fp32 and
    # added to that of the micro-batch before (18). The head's is added up over chunks (16), and
    # scaled in place (8)
    weights = (6 + 18) * size.blocks + (6 + 16 * n_chunks + 8) * c.vocab_size * c.n_embd
    recomputed = 0
    if fit.recompute:
        weights += 6 * size.blocks      # they are cast again
        recomputed = 12 * c.n_layer * c.n_embd
    return weights / tokens + recomputed


def needed(cfg, size, machine, fit):
    """Bytes that training needs with this Fit.

    An evaluation always needs less: it keeps nothing for a backward pass.
    """
    c, itemsize, tokens = size.network, machine.dtype.itemsize, fit.batch_size * cfg.block_size
    state = 16 * size.total             # a weight, its gradient, and AdamW's two averages
    if machine.count > 1:
        state += 4 * size.total         # the sum of all processes' gradients
    kept = tokens * c.n_layer * kept_by_layer(c, machine.dtype, cfg.compile, fit.recompute)
    if machine.kind == "cpu" and c.norm == "rmsnorm" and not cfg.compile:
        kept += tokens * c.n_layer * 24 * c.n_embd      # the result of each of its operations
    if itemsize == 2 and not fit.recompute:
        kept += 2 * size.blocks         # the weights in bf16 or fp16
    peak = kept + needed_by_loss(c, tokens, fit.chunk, itemsize, cfg.compile)
    if cfg.compile:                     # its backward returns all new gradients together
        peak = max(peak, 4 * size.blocks + 8 * c.vocab_size * c.n_embd)
    if cfg.optimizer == "muon":
        state -= 4 * size.blocks        # a matrix has one average
        # Muon holds five copies of its largest stack of matrices of one shape
        stack = c.n_layer * c.n_embd * max(4 * c.n_embd, c.mlp_width)
        peak = max(peak, 5 * itemsize * stack)
    return round(FRAGMENTATION * (state + peak))


def kept_by_layer(c, dtype, compiled, recompute):
    """Bytes of one token that a layer keeps for its backward pass."""
    C, itemsize = c.n_embd, dtype.itemsize
    # queries, keys, values, attention's result, and that of the MLP's first matrix
    numbers = 4 * C + c.mlp_width
    if c.position == "rotary" or c.qk_norm:
        numbers += 2 * C                # queries and keys once more, as attention sees them
    if not recompute:
        numbers += 2 * C + c.inner_size     # the results of both norms and the MLP's activation
    n_bytes = itemsize * numbers
    # the residual stream twice, before attention and before the MLP, in bf16 or fp32
    if compiled and dtype is torch.bfloat16:
        n_bytes += 2 * 2 * C
    else:
        n_bytes += 2 * 4 * C
    if c.dropout:
        n_bytes += 2 * C                # masks of attention's and the MLP's, a byte a number
    if not compiled:                    # PyTorch keeps both factors of each product
        if c.mlp == "swiglu":
            n_bytes += itemsize * c.inner_size      # silu of the gate
        if c.qk_norm and itemsize == 2:
            n_bytes += 8 * C            # queries and keys in fp32
        if c.dropout:
            n_bytes += 2 * C            # a copy of the mask for attention
    return n_bytes


def needed_by_loss(c, tokens, chunk, itemsize, compiled):
    """Bytes of the last norm's result, of a chunk's logits, and of the head's gradient."""
    logit = itemsize                    # bytes; its gradient overwrites it
    if itemsize == 2 and not compiled:
        logit = 2 + 4                   # in bf16, and once more in fp32
    head = 2 + 4                        # its weight in bf16, and its gradient in fp32
    if chunk < tokens:
        head += 4                       # the sum of the chunks' gradients, and the next one
    n_logits = min(chunk, tokens) * c.vocab_size
    return 3 * itemsize * tokens * c.n_embd + logit * n_logits + head * c.vocab_size * c.n_embd
