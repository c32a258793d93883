"""Sampling: which token comes next, and the one after it, from a model with a KV cache.

Sizes: L = n_layer, B batch, H = n_head, T time, D = head_size, V tokens of the vocabulary.
"""
import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from onecard.runtime import matmul_dtype
from onecard.settings import UserError, in_range
from onecard.tokenizers import END_OF_TEXT


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.8        # 1 = as the model says, lower = safer, 0 = always the likeliest
    top_k: int = 200                # draw from the k likeliest tokens; 0 = from all
    top_p: float = 1.0              # draw from the likeliest tokens whose probabilities sum to this
    min_p: float = 0.0              # drop tokens below this share of the highest probability
    repetition_penalty: float = 1.0     # above 1, tokens of the text so far become less likely
    seed: int = 1337                # the same seed gives the same text
    max_new_tokens: int = 300       # limit of a continuation; an end-of-text token ends it earlier

    def __post_init__(self):
        in_range(0, 2**31, self, "top_k")
        in_range(1, 10**9, self, "max_new_tokens")
        in_range(0, 2**63 - 1, self, "seed")
        in_range(1, 100, self, "repetition_penalty")
        if self.temperature != 0:       # dividing logits by less could make them infinite
            in_range(0.01, 100, self, "temperature")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1 (no limit)")
        in_range(0, 1, self, "min_p")


class KVCache:
    """Keys and values of the tokens that the model has seen, with room for a context of them.

    With `fixed_shapes`, attention looks at all places and a mask hides the empty ones: then reading
    one token is always the same work, which a CUDA graph can repeat.
    """

    def __init__(self, model, fixed_shapes=False):
        c, device = model.config, model.lm_head.weight.device
        shape = (c.n_layer, 1, c.n_head, c.block_size, c.head_size)           # (L, B, H, T, D)
        self.k = torch.zeros(shape, device=device, dtype=matmul_dtype(device.type))
        self.v = torch.zeros_like(self.k)
        self.fixed_shapes = fixed_shapes
        self.n_read = torch.zeros(1, dtype=torch.long, device=device)   # a CUDA graph adds to it
        self.clear()

    def clear(self):
        self.n_read.zero_()
        self.n_visible = self.k.size(3) if self.fixed_shapes else 0     # places to look at

    def advance(self, T):
        """Make room for T more tokens; return their positions (T,). Once, before all layers."""
        self.positions = self.n_read + torch.arange(T, device=self.n_read.device)
        self.n_read += T
        self.mask = None                # a single token may look at all visible places
        if not self.fixed_shapes:
            self.n_visible += T
            assert self.n_visible <= self.k.size(3), f"a cache for {self.k.size(3)} tokens is full"
        if T > 1 or self.fixed_shapes:
            places = torch.arange(self.n_visible, device=self.n_read.device)
            self.mask = places <= self.positions[:, None]                     # (T, visible)
        return self.positions

    def extend(self, layer, k, v):
        """Add `k` and `v` (B, H, T, D) of the new tokens; return those of all visible places."""
        keys, values = self.k[layer], self.v[layer]
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        return keys[:, :, :self.n_visible], values[:, :, :self.n_visible]


class Sampler:
    """Chooses the next token, and the one after it.

    Its tensors are changed in place, because a CUDA graph needs fixed addresses.
    """

    def __init__(self, model, sampling, n_vocab, fixed_shapes):
        self.model, self.sampling, self.n_vocab = model, sampling, n_vocab
        # not model.hidden: training has compiled that one, which would compile for each length
        self.hidden = functools.partial(type(model).hidden, model)
        self.cache, self.device = KVCache(model, fixed_shapes), model.lm_head.weight.device
        # random numbers come from the CPU: the same ones on every device
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.uniforms = torch.zeros(model.config.block_size + 1, device=self.device)
        self.in_text = torch.zeros(n_vocab, dtype=torch.bool, device=self.device)
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)

    def read_text(self, ids):
        """Read a text, and choose the first token after it."""
        n = len(self.uniforms) - len(ids)       # until the cache is full
        self.uniforms[len(ids):] = torch.rand(n, generator=self.generator)
        ids = torch.tensor(ids, device=self.device)
        self.in_text.zero_().index_fill_(0, ids, True)
        self.cache.clear()
        self.choose(self.hidden(ids[None], self.cache))

    def read_token(self):
        """Read the last token, and choose the one after it."""
        self.choose(self.hidden(self.token[None], self.cache))

    def choose(self, hidden):
        logits = self.model.lm_head(hidden[0, -1])[:self.n_vocab].float()     # (V,)
        u = self.uniforms[self.cache.n_read]                                  # (1,)
        self.token.copy_(pick(logits, self.in_text, u, self.sampling))
        self.in_text.index_fill_(0, self.token, True)


def capture_graph(sampler):
    """A CUDA graph of reading one token; None if CUDA cannot capture it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):   # notes the kernels, and computes nothing
            sampler.read_token()
    except RuntimeError:                # then Python starts each kernel, which is slower
        return None
    return graph


@torch.inference_mode()
def generate(model, ids, sampling, n_vocab, fixed_shapes=None):
    """Yield the tokens that continue the list `ids`, one by one; each of them is below `n_vocab`.

    An end-of-text token ends them, and is not yielded.
    When the context is full, its last half stays, and is read again: every block_size / 2 tokens.
    On CUDA, `fixed_shapes` is the default, and a graph repeats the work of a token. Without it, the
    GPU would wait for Python.
    """
    block_size, on_cuda = model.config.block_size, model.lm_head.weight.is_cuda
    if fixed_shapes is None:
        fixed_shapes = on_cuda
    sampler, graph = Sampler(model, sampling, n_vocab, fixed_shapes), None
    ids = list(ids[-block_size:])
    for n in range(sampling.max_new_tokens):
        is_full = len(ids) > block_size
        if is_full:
            ids = ids[-max(block_size // 2, 1):]
        if is_full or n == 0:
            sampler.read_text(ids)
        elif graph:
            graph.replay()
        else:
            sampler.read_token()
        if on_cuda and fixed_shapes and n == 2:     # the first tokens have loaded all kernels
            graph = capture_graph(sampler)
        ids.append(sampler.token.item())
        if ids[-1] == END_OF_TEXT:
            return
        yield ids[-1]


def pick(logits, in_text, u, sampling):
    """The next token (1,), from `logits` (V,) and a uniform number `u` (1,), 0 <= u < 1.

    `in_text` (V,) is True for the tokens of the text so far. The order of the steps is that of
    transformers: repetition penalty (Keskar et al. 2019), temperature, top_k, top_p (Holtzman et
    al. 2020), min_p (Nguyen et al. 2024).
    """
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        lower = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(in_text, lower, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=0, keepdim=True)
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < sampling.top_k < len(logits):
        logits, ids = logits.topk(sampling.top_k)       # (k,), the likeliest first
    elif sampling.top_p < 1:            # topk sorts, too
        logits, ids = logits.sort(descending=True)
    p = F.softmax(logits / sampling.temperature, dim=0)
    if sampling.top_p < 1:
        p_before = p.cumsum(0) - p      # of all likelier tokens; 0 for the likeliest one
        p = p.masked_fill(p_before >= sampling.top_p, 0)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.max(), 0)
    # the first token whose cumulative probability is above u; right: never one of probability 0
    cumulative = p.cumsum(0)
    index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    return ids[index.clamp(max=len(ids) - 1)]       # rounding may give one too many
