"""Which token comes next, and which one after it? Sampling from a model with a KV cache.

Sizes: L = n_layer, B batch, H = n_head, T time, D = head_size, V tokens of the vocabulary.
"""
import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from onecard.runtime import product_dtype
from onecard.settings import UserError, in_range


@dataclass(frozen=True)
class DrawConfig:
    temperature: float = 0.8        # 1 = as the model says, lower = safer, 0 = always the likeliest
    top_k: int = 200                # draw from the k likeliest tokens; 0 = from all
    top_p: float = 1.0              # draw from the likeliest tokens whose probabilities sum to this
    min_p: float = 0.0              # drop tokens below this share of the highest probability
    repetition_penalty: float = 1.0     # above 1, tokens of the text so far become less likely
    seed: int = 1337                # the same seed gives the same text

    def __post_init__(self):
        in_range(0, 2**31, self, "top_k")
        in_range(0, 2**63 - 1, self, "seed")
        in_range(1, 100, self, "repetition_penalty")
        if self.temperature != 0:       # logits / a smaller number could be infinite
            in_range(0.01, 100, self, "temperature")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1 (no limit)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p = {self.min_p} must be between 0 (no limit) and 1")


class KVCache:
    """Keys and values of the tokens that the model has seen, with room for `length` tokens.

    With `fixed_shapes`, attention looks at all places and a mask hides the empty ones: then reading
    one token is always the same work, which a CUDA graph can repeat.
    """

    def __init__(self, config, batch_size, device, dtype, length, fixed_shapes=False):
        shape = (config.n_layer, batch_size, config.n_head, length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)               # (L, B, H, T, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.fixed_shapes = fixed_shapes
        self.n_read = torch.zeros(1, dtype=torch.long, device=device)   # a graph can count in it
        self.clear()

    def clear(self):
        self.n_read.zero_()
        self.visible = self.k.size(3) if self.fixed_shapes else 0       # places to look at

    def advance(self, T):
        """The positions (T,) of T more tokens. Once for all layers."""
        self.positions = self.n_read + torch.arange(T, device=self.n_read.device)
        self.n_read += T
        self.mask = None                # a single token may look at all places
        if not self.fixed_shapes:
            self.visible += T
            assert self.visible <= self.k.size(3), f"a cache for {self.k.size(3)} tokens is full"
        if T > 1 or self.fixed_shapes:
            places = torch.arange(self.visible, device=self.n_read.device)
            self.mask = places <= self.positions[:, None]                     # (T, visible)
        return self.positions

    def extend(self, layer, k, v):
        """Add `k` and `v` (B, H, T, D) of the new tokens; return those of all visible places."""
        keys, values = self.k[layer], self.v[layer]
        keys.index_copy_(2, self.positions, k.to(keys.dtype))
        values.index_copy_(2, self.positions, v.to(values.dtype))
        return keys[:, :, :self.visible], values[:, :, :self.visible]


class Writer:
    """Chooses the next token, and the one after it.

    Its tensors keep their addresses and are changed in place, as a CUDA graph needs it.
    """

    def __init__(self, model, draw, n_vocab, fixed_shapes):
        self.model, self.draw, self.n_vocab = model, draw, n_vocab
        # of the class: a run that trains has compiled model.hidden, which would compile each length
        self.hidden = functools.partial(type(model).hidden, model)
        self.device, length = model.lm_head.weight.device, model.config.block_size
        self.cache = KVCache(model.config, 1, self.device, product_dtype(self.device.type), length,
                             fixed_shapes)
        # random numbers come from the CPU: the same ones on every device
        self.generator = torch.Generator().manual_seed(draw.seed)
        self.numbers = torch.zeros(length + 1, device=self.device)
        self.n_chosen = torch.zeros(1, dtype=torch.long, device=self.device)
        self.in_text = torch.zeros(n_vocab, dtype=torch.bool, device=self.device)
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)

    def read(self, ids):
        """Read a text, and choose the first token after it."""
        n = len(self.numbers) - len(ids)        # one for each free place, and one more
        self.numbers[:n] = torch.rand(n, generator=self.generator)
        self.n_chosen.zero_()
        ids = torch.tensor(ids, device=self.device)
        self.in_text.zero_().index_fill_(0, ids, True)
        self.cache.clear()
        self.choose(self.hidden(ids[None], self.cache))

    def read_token(self):
        """Read the last token, and choose the one after it."""
        self.choose(self.hidden(self.token[None], self.cache))

    def choose(self, hidden):
        logits = self.model.lm_head(hidden[0, -1])[:self.n_vocab].float()     # (V,)
        u = self.numbers[self.n_chosen]                                       # (1,)
        self.token.copy_(pick(logits, self.in_text, u, self.draw))
        self.in_text.index_fill_(0, self.token, True)
        self.n_chosen += 1


def record(writer):
    """A CUDA graph of reading one token; None if CUDA cannot record it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):   # records, and computes nothing
            writer.read_token()
    except RuntimeError:                # then Python starts each kernel, which is slower
        return None
    return graph


@torch.inference_mode()
def generate(model, ids, max_new_tokens, draw, n_vocab, fixed_shapes=None):
    """Yield the tokens that continue the list `ids`, one by one; each of them is below `n_vocab`.

    When the context is full, its last half stays, and is read again: once in block_size / 2 tokens.
    On CUDA, `fixed_shapes` is the default, and a graph repeats the work of a token: the GPU would
    wait for Python otherwise.
    """
    block_size, on_cuda = model.config.block_size, model.lm_head.weight.is_cuda
    if fixed_shapes is None:
        fixed_shapes = on_cuda
    writer, graph = Writer(model, draw, n_vocab, fixed_shapes), None
    ids = list(ids[-block_size:])
    for n in range(max_new_tokens):
        if n == 0 or len(ids) > block_size:
            if len(ids) > block_size:
                ids = ids[-max(block_size // 2, 1):]
            writer.read(ids)
        elif graph:
            graph.replay()
        else:
            writer.read_token()
        if on_cuda and fixed_shapes and n == 2:     # the first tokens have loaded all kernels
            graph = record(writer)
        ids.append(writer.token.item())
        yield ids[-1]


def pick(logits, in_text, u, draw):
    """The next token (1,), from `logits` (V,) and a uniform number `u` (1,), 0 <= u < 1.

    `in_text` (V,) is True for the tokens of the text so far. The order of the steps is that of
    transformers: repetition penalty (Keskar et al. 2019), temperature, top_k, top_p (Holtzman et
    al. 2020), min_p (Nguyen et al. 2024).
    """
    if draw.repetition_penalty != 1:
        penalty = draw.repetition_penalty
        lower = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(in_text, lower, logits)
    if draw.temperature == 0:
        return logits.argmax(dim=0, keepdim=True)
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < draw.top_k < len(logits):
        logits, ids = logits.topk(draw.top_k)       # (k,), the likeliest first
    elif draw.top_p < 1:
        logits, ids = logits.sort(descending=True)
    p = F.softmax(logits / draw.temperature, dim=0)
    if draw.top_p < 1:
        p_before = p.cumsum(0) - p      # of all likelier tokens; 0 for the likeliest, which stays
        p = p.masked_fill(p_before >= draw.top_p, 0)
    if draw.min_p > 0:
        p = p.masked_fill(p < draw.min_p * p.max(), 0)
    # p divides the line from 0 to its sum into pieces, one a token; u points into one of them
    ends = p.cumsum(0)
    index = torch.searchsorted(ends, u * ends[-1], right=True)      # right: never an empty piece
    return ids[index.clamp(max=len(ids) - 1)]       # rounding may point behind the end
