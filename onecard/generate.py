"""Which token comes next, and which one after it? Sampling from a model with a KV cache.

Sizes: L = n_layer, B batch, H = n_head, T time, D = head_size, V tokens of the vocabulary.
"""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

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
    """Keys and values of the tokens that the model has seen, with room for `length` tokens."""

    def __init__(self, config, batch_size, device, dtype, length):
        shape = (config.n_layer, batch_size, config.n_head, length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)               # (L, B, H, T, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0                 # tokens in it; the model counts them, after its last layer

    def extend(self, layer, k, v):
        """Add `k` and `v` (B, H, T, D) of new tokens; return those of all tokens so far."""
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"{end} tokens in a cache for {self.k.size(3)}"
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


@torch.inference_mode()
def generate(model, ids, max_new_tokens, draw, n_vocab):
    """Yield the tokens that continue the list `ids`, one by one; each of them is below `n_vocab`.

    When the context is full, its last half stays, and is read again: once in block_size / 2 tokens.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    context = torch.tensor([ids[-block_size:]], device=device)                # (1, T)
    dtype = torch.float32               # of keys and values
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, 1, device, dtype, block_size)
    generator = torch.Generator().manual_seed(draw.seed)
    unread = context                    # tokens that are not in the cache yet
    for _ in range(max_new_tokens):
        if context.size(1) > block_size:
            context = context[:, -max(block_size // 2, 1):]
            cache.length, unread = 0, context
        hidden = model.hidden(unread, cache)[0, -1]                           # (C,)
        logits = model.lm_head(hidden)[:n_vocab].float()                      # (V,)
        # one number a token, from the CPU: the same random numbers on every device
        u = torch.rand(1, generator=generator).to(device)
        unread = pick(logits, context[0], u, draw)[None]                      # (1, 1)
        context = torch.cat((context, unread), dim=1)
        yield unread.item()


def pick(logits, context, u, draw):
    """The next token (1,), from `logits` (V,) and a uniform number `u` (1,), 0 <= u < 1.

    `context` (T,) is the text so far. The order of the steps is that of transformers: repetition
    penalty (Keskar et al. 2019), temperature, top_k, top_p (Holtzman et al. 2020), min_p (Nguyen
    et al. 2024).
    """
    if draw.repetition_penalty != 1:
        seen, penalty = logits[context], draw.repetition_penalty
        seen = torch.where(seen > 0, seen / penalty, seen * penalty)    # lower, of either sign
        logits = logits.scatter(0, context, seen)
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
    return ids[index.clamp(max=len(ids) - 1)]
