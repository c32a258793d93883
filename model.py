"""What is the network? GPT-2 with its names: configuration, blocks, initialisation, loss, FLOPs.

`block = 'modern'` changes the same blocks into those of transformers' Qwen3ForCausalLM. Sizes in
comments: B batch, T time, C = n_embd, H = n_head, K = n_kv_head, D = C / H, V = vocab_size.
"""
import math
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch._functorch.config
import torch.nn as nn
from torch.nn import functional as F

# A compiled model makes again what a pass over memory can make from what it keeps anyway, which
# halves the activations at the same speed.
torch._functorch.config.ban_recompute_materialized_backward = False


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024          # tokens of context
    vocab_size: int = 50304         # embedding rows: GPT-2's 50257, padded for speed to 64 x 786
    n_layer: int = 12               # blocks
    n_head: int = 12                # attention heads in a block
    n_embd: int = 768               # width
    dropout: float = 0.0            # 0 for pretraining, 0.1 or more for finetuning or repeated data
    bias: bool | None = None        # biases in Linear and LayerNorm, as GPT-2 has them
    block: str = "gpt2"             # gpt2 or modern: decides every setting that is None
    position: str | None = None     # learned (wpe) or rotary
    norm: str | None = None         # layernorm, rmsnorm, or rmsnorm_weightless
    qk_norm: bool | None = None     # normalise queries and keys, with a weight where norm has one
    mlp: str | None = None          # gelu, gelu_tanh (OpenAI's GPT-2), swiglu or relu2
    n_inner: int = 0                # width inside the MLP; 0: 4 n_embd, 8/3 n_embd for swiglu
    n_kv_head: int = 0              # heads of keys and values, each for several queries; 0: n_head
    tie_word_embeddings: bool | None = None  # the head's weights are the token embedding's
    embed_norm: bool | None = None  # normalise the token embedding (weightless RMSNorm)
    zero_init: bool | None = None   # start with c_proj, and a head of its own, at zero
    softcap: float = 0.0            # logits are softcap * tanh(logits / softcap); 0: as they come
    rope_theta: float = 10000.0     # longest wavelength of rotary positions, in 2 pi tokens
    n_value_table: int = 0          # embeddings that every other block adds to its values, by turns

    def __post_init__(self):
        for name, known in {"block": tuple(BLOCKS), **CHOICES}.items():
            if getattr(self, name) not in (*known, None):
                raise ValueError(f"{name} = {getattr(self, name)!r}; use {' or '.join(known)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("n_inner", "n_kv_head", "softcap", "n_value_table"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} cannot be negative")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta = {self.rope_theta} must be above 0; usual is 10000")
        D = self.n_embd // self.n_head
        if self.n_embd % self.n_head:
            nearest = max(D, 1) * self.n_head
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} "
                             f"heads. Nearest that works: n_embd = {nearest}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} is not a multiple of n_kv_head = "
                             f"{self.n_kv_head}. "
                             f"Nearest that works: {math.gcd(self.n_head, self.n_kv_head)}")
        if D % 2 and (self.position or BLOCKS[self.block]["position"]) == "rotary":
            raise ValueError("rotary positions turn pairs of numbers, and n_embd / n_head = "
                             f"{D} is odd. Nearest that works: n_embd = {(D + 1) * self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} is a probability, from 0 to below 1")

    def resolved(self):
        """The same with nothing left to derive: no None, no 0 that stands for another number."""
        unset = {name: value for name, value in BLOCKS[self.block].items()
                 if getattr(self, name) is None}
        full = replace(self, **unset, n_kv_head=self.n_kv_head or self.n_head)
        # swiglu multiplies twice: 8/3 n_embd, in multiples of 64, is as much work as 4 n_embd
        usual = -(-8 * self.n_embd // 192) * 64 if full.mlp == "swiglu" else 4 * self.n_embd
        return replace(full, n_inner=self.n_inner or usual)


BLOCKS = {
    "gpt2": dict(bias=True, position="learned", norm="layernorm", qk_norm=False, mlp="gelu",
                 tie_word_embeddings=True, embed_norm=False, zero_init=False),
    "modern": dict(bias=False, position="rotary", norm="rmsnorm", qk_norm=True, mlp="swiglu",
                   tie_word_embeddings=False, embed_norm=True, zero_init=True),
}
CHOICES = {"position": ("learned", "rotary"), "mlp": ("gelu", "gelu_tanh", "swiglu", "relu2"),
           "norm": ("layernorm", "rmsnorm", "rmsnorm_weightless")}
NANOGPT_ARGS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")


def model_args(cfg):
    """The fields of `cfg` (a GPTConfig or an extension of it) that make a model, as a dict.

    nanoGPT's, and of the others what these and `block` do not give already: a GPT-2 has nanoGPT's
    only, which nanoGPT can read.
    """
    asked = GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}).resolved()
    args = {name: getattr(asked, name) for name in NANOGPT_ARGS}
    if asked.block != "gpt2":
        args["block"] = asked.block
    implied = asdict(GPTConfig(**args).resolved())
    return args | {name: value for name, value in asdict(asked).items() if value != implied[name]}


class KVCache:
    """Keys and values of the tokens seen so far, in tensors made once for `length` tokens."""

    def __init__(self, config, batch_size, device, dtype, length):
        shape = (2, config.n_layer, batch_size, config.n_kv_head, length,
                 config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype)       # 2 x (L, B, K, T, D)
        self.length = 0             # tokens in it

    def extend(self, layer, k, v):
        """Add `k`, `v` (B, K, T, D) after what is there; return all keys and values of `layer`."""
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"{end} tokens in a cache for {self.k.size(3)}"
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


PIECE = 128                         # queries at a time in CausalAttentionOnCPU


class CausalAttentionOnCPU(torch.autograd.Function):
    """softmax(q k / sqrt(D)) v, causal, by plain products: compiled, faster on a CPU than SDPA.

    q, k, v (B, H, T, D). Queries go PIECE at a time, against the keys that they can see. As in
    FlashAttention (Dao et al. 2022) backward makes the weights again from their logsumexp; it makes
    them transposed, since a compiler that sees the same product twice keeps the first one.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y, sums = [], []
        for begin, end in _pieces(q):
            scores = (q[:, :, begin:end] @ k[:, :, :end].mT).float() * q.size(3) ** -0.5
            scores = scores.masked_fill(_future(begin, end), -math.inf)
            sums.append(scores.logsumexp(3, keepdim=True))
            y.append((scores - sums[-1]).exp().to(v.dtype) @ v[:, :, :end])
        y, sums = torch.cat(y, 2), torch.cat(sums, 2).mT
        ctx.save_for_backward(q, k, v, y, sums)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        q, k, v, y, sums = ctx.saved_tensors
        T, D = q.shape[2:]
        delta = (grad_y.float() * y.float()).sum(3)[:, :, None]               # (B, H, 1, T)
        grad_q, grad_k, grad_v = [], 0, 0
        for begin, end in _pieces(q):
            q_i, grad_i = q[:, :, begin:end], grad_y[:, :, begin:end]
            scores = (k[:, :, :end] @ q_i.mT).float() * D ** -0.5             # (B, H, end, piece)
            scores = scores.masked_fill(_future(begin, end).mT, -math.inf)
            p = (scores - sums[..., begin:end]).exp()
            grad_p = (v[:, :, :end] @ grad_i.mT).float() - delta[..., begin:end]
            grad_scores = (p * grad_p * D ** -0.5).to(q.dtype)
            grad_q.append(grad_scores.mT @ k[:, :, :end])
            grad_k += F.pad(grad_scores @ q_i, (0, 0, 0, T - end))
            grad_v += F.pad(p.to(v.dtype) @ grad_i, (0, 0, 0, T - end))
        return torch.cat(grad_q, 2), grad_k, grad_v


def _pieces(q):
    return [(begin, min(begin + PIECE, q.size(2))) for begin in range(0, q.size(2), PIECE)]


def _future(begin, end):
    """(end - begin, end): which keys lie after which of the queries begin to end."""
    place = torch.arange(end, dtype=torch.int32)            # comparing int64 takes twice as long
    return place > place[begin:, None]


def causal_attention(q, k, v, dropout):
    """softmax(q k / sqrt(D)) v where each token sees itself and what came before; (B, H, T, D)."""
    compiled_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if q.device.type == "cpu" and compiled_training and not dropout:
        return CausalAttentionOnCPU.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


class RMSNorm(nn.RMSNorm):
    """torch's, in the dtype of its input, for which autocast leaves the weight too wide."""

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(config, size, weightless=False):
    """The norm of `config` over the last `size` numbers of a tensor."""
    if config.norm == "layernorm" and not weightless:
        return nn.LayerNorm(size, bias=config.bias)
    return RMSNorm(size, eps=1e-6,
                   elementwise_affine=not weightless and config.norm != "rmsnorm_weightless")


def rotary(config, pos):
    """Cosine and sine of the angles of places `pos` (T,), (T, D / 2) each (Su et al. 2021)."""
    D = config.n_embd // config.n_head
    speed = config.rope_theta ** (-torch.arange(0, D, 2, device=pos.device).float() / D)
    angle = pos.float()[:, None] * speed                                      # (T, D / 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """`x` (B, H, T, D) where number i of a head turns together with number i + D / 2."""
    a, b = x.float().chunk(2, 3)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), 3).to(x.dtype)


GATE_WIDTH = 12                     # numbers of the stream that decide how far a gate is open


class CausalSelfAttention(nn.Module):
    """Attention, in every other block (the last one too) with value embeddings where there are any.

    Those are rows of a table for the tokens, added to the values of each head through a gate, which
    tell a block deep down which token it is at (Zhou et al. 2024, arXiv 2410.17897; modded-nanogpt;
    the gates are nanochat's).
    """

    def __init__(self, config, layer):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.sizes = [C, config.n_kv_head * D, config.n_kv_head * D]    # of q, k, v in c_attn
        self.c_attn = nn.Linear(C, sum(self.sizes), bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = make_norm(config, D), make_norm(config, D)
        self.table = None                                               # which of the value tables
        if config.n_value_table and (config.n_layer - layer) % 2:
            self.table = layer // 2 % config.n_value_table
            self.v_gate = nn.Linear(min(GATE_WIDTH, C), config.n_kv_head, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.layer, self.config, self.dropout = layer, config, config.dropout

    def forward(self, x, turn=None, cache=None, values=()):
        B, T, C = x.shape
        H, K = self.config.n_head, self.config.n_kv_head
        q, k, v = (part.view(B, T, -1, C // H).transpose(1, 2)                # (B, H or K, T, D)
                   for part in self.c_attn(x).split(self.sizes, 2))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn:
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k = q.to(v.dtype), k.to(v.dtype)                 # a norm may leave them in fp32
        if self.table is not None:
            gate = 2 * self.v_gate(x[..., :GATE_WIDTH]).sigmoid()             # (B, T, K)
            looked_up = values[self.table].view(B, T, K, -1).to(v.dtype)
            v = v + (gate[..., None] * looked_up).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k.to(cache.k.dtype), v.to(cache.v.dtype))
        if K < H:
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:                                               # each sees its own and all of the past
            mask = None if T == 1 else torch.ones(
                T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind, gates = config.mlp, 2 if config.mlp == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, gates * config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)                                                      # (B, T, inner)
        if self.kind == "swiglu":                           # its rows: the gate, then what it opens
            gate, x = x.chunk(2, 2)
            x = F.silu(gate) * x
        else:
            x = F.relu(x).square() if self.kind == "relu2" else \
                F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, turn=None, cache=None, values=()):
        x = x + self.attn(self.ln_1(x), turn, cache, values)
        return x + self.mlp(self.ln_2(x))


CHUNK = 2048                        # tokens, at most half of all, whose logits exist at once


def capped(logits, softcap):
    """Logits between -softcap and softcap, all but unchanged near 0 (Gemma 2); 0: unchanged."""
    return softcap * (logits / softcap).tanh() if softcap else logits


def loss_of_chunk(x, w, targets, counts, grad_w, softcap=0.0):
    """Summed cross-entropy of capped `x @ w.T`, x (N, C), w (V, C), targets and counts (N,).

    Where `grad_w` (V, C) is a tensor, the chunk's part of it is added there, and the gradient of
    `x` is the second result.
    """
    targets, counts = targets[:, None], counts[:, None]
    logits = capped((x @ w.T).to(torch.promote_types(w.dtype, torch.float32)), softcap)
    slope = 1 - (logits / softcap).square() if softcap and grad_w is not None else None   # of tanh
    aimed = logits.gather(1, targets)
    if torch.compiler.is_compiling():
        logsumexp = logits.logsumexp(1, keepdim=True)
    else:                                   # in the place of the logits, once for loss and gradient
        largest = logits.amax(1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        sums = exponentials.sum(1, keepdim=True)
        logsumexp = sums.log() + largest
    total = ((logsumexp - aimed) * counts).sum()
    if grad_w is None:
        return total, None
    if torch.compiler.is_compiling():       # becomes one pass, which a scatter would cut into three
        columns = torch.arange(w.size(0), device=w.device)
        grad = ((logits - logsumexp).exp() - (columns == targets).to(logits.dtype)) * counts
    else:
        grad = exponentials.mul_(counts / sums)
        grad.scatter_add_(1, targets, -counts.to(grad.dtype))
    grad = (grad if slope is None else grad * slope).to(w.dtype)
    grad_w += grad.T @ x
    return total, grad @ w


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `x @ weight.T` in nats, without all of its logits at once.

    x (N, C), weight (V, C), targets (N,) of which -1 do not count; products in `dtype`, the loss
    and the sums over chunks in fp32 (fp64 where dtype is). `chunk` is loss_of_chunk, perhaps
    compiled. It turns logits into their part of both gradients while they are there, which costs
    no product more than the plain loss.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, needs_grad, chunk, softcap=0.0):
        w, wide = weight.to(dtype), torch.promote_types(dtype, torch.float32)
        counts = targets >= 0
        n = counts.sum()
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x, grad_w = [], torch.zeros_like(weight, dtype=wide) if needs_grad else None
        n_chunks = max(-(-len(x) // CHUNK), 2)
        pieces = (t.chunk(n_chunks) for t in (x.to(dtype), targets.clamp(min=0), counts))
        for x_c, targets_c, counts_c in zip(*pieces, strict=True):
            total_c, grad_x_c = chunk(x_c, w, targets_c, counts_c, grad_w, softcap)
            total += total_c
            grad_x.append(grad_x_c)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_w, n)
        return total / n

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w, n = ctx.saved_tensors
        scale = grad_loss / n               # in place: a second backward is an error, not a copy
        return grad_x.to(grad_w.dtype) * scale, grad_w.mul_(scale), None, None, None, None, None


EMBEDDINGS = ("transformer.wpe", "transformer.wve", "transformer.wte", "lm_head")


class GPT(nn.Module):
    loss_of_chunk = staticmethod(loss_of_chunk)

    def __init__(self, config):
        super().__init__()
        self.config = config = GPTConfig(**model_args(config)).resolved()
        learned = config.position == "learned"
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **(dict(wpe=nn.Embedding(config.block_size, config.n_embd)) if learned else {}),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=make_norm(config, config.n_embd),
        ))
        if not learned:     # once: compiled code would make an angle again for each number it turns
            turn = torch.stack(rotary(config, torch.arange(config.block_size)))
            self.register_buffer("turn", turn, persistent=False)              # (2, T, D / 2)
        if config.embed_norm:
            self.transformer["ln_e"] = make_norm(config, config.n_embd, weightless=True)
        if config.n_value_table:            # side by side, so that a token's are read at once
            self.transformer["wve"] = nn.Embedding(
                config.vocab_size,
                config.n_value_table * config.n_kv_head * config.n_embd // config.n_head)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight           # (Press and Wolf 2017)
        self.init_weights()

    def init_weights(self):
        """N(0, 0.02), over sqrt(2 n_layer) for the 2 n_layer sums into the residual stream.

        With zero_init these start at 0, a head of its own too, and the other matrices of the blocks
        at N(0, 0.55 / sqrt(C)). An embedding that is normalised and not tied starts at N(0, 1),
        weights of normed queries and keys at 1.2: together 1.44, for sharper attention. Value
        embeddings start as large as the values are, N(0, 0.5), and their gates half open.
        """
        c = self.config
        for name, p in self.named_parameters():
            if name.endswith(("bias", "v_gate.weight")):
                nn.init.zeros_(p)
            elif "wve" in name:
                nn.init.normal_(p, std=0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                nn.init.constant_(p, 1.2)
            elif p.dim() == 2:
                residual, block = name.endswith("c_proj.weight"), ".h." in name
                std = 0.02 / math.sqrt(2 * c.n_layer) if residual else 0.02
                if c.zero_init and block:
                    std = 0.0 if residual else 0.55 / math.sqrt(c.n_embd)
                if not c.tie_word_embeddings:
                    if "lm_head" in name and c.zero_init:
                        std = 0.0
                    if "wte" in name and c.embed_norm:
                        std = 1.0
                nn.init.normal_(p, std=std)

    def hidden(self, idx, cache=None):
        """What the last block and the final norm make of `idx` (B, T): (B, T, C)."""
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        assert past + T <= self.config.block_size, \
            f"{past} + {T} tokens in a context of {self.config.block_size}"
        x, turn = self.transformer.wte(idx), None                             # (B, T, C)
        if self.config.embed_norm:
            x = self.transformer.ln_e(x)
        if self.config.position == "rotary":
            turn = self.turn[:, past:past + T].unbind()
        else:
            x = x + self.transformer.wpe(torch.arange(past, past + T, device=idx.device))
        x, n = self.transformer.drop(x), self.config.n_value_table
        values = self.transformer.wve(idx).chunk(n, 2) if n else ()           # n x (B, T, K D)
        for block in self.transformer.h:
            x = block(x, turn, cache, values)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def loss(self, x, targets):
        """Mean cross-entropy in nats of what `hidden` made, x (B, T, C), against targets (B, T)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):         # it casts by itself, once for all
            return LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                            dtype, torch.is_grad_enabled(), self.loss_of_chunk,
                                            self.config.softcap)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of `idx` (B, T); with `targets` (B, T) the mean cross-entropy in nats.

        Targets of -1 do not count. The logits of a loss never exist all at once.
        """
        x = self.hidden(idx)                                                  # (B, T, C)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def logits(self, x):
        """Logits (..., V) of what `hidden` made, x (..., C)."""
        return capped(self.lm_head(x), self.config.softcap)

    def compile(self, **options):
        """Compile `hidden` and one chunk of the loss, in place; weights keep their names.

        As one graph, a GPU's scheduler would keep the logits of all chunks until the end.
        """
        self.hidden = torch.compile(self.hidden, **options)
        self.loss_of_chunk = torch.compile(self.loss_of_chunk, **options)

    def n_params(self):
        """Parameters: {"total": all, tied ones once, "without_embeddings": norms and blocks}."""
        total = sum(p.numel() for p in self.parameters())
        blocks = sum(p.numel() for name, p in self.named_parameters()
                     if not name.startswith(EMBEDDINGS))
        return {"total": total, "without_embeddings": blocks}

    def flops_per_token(self):
        """FLOPs of forward and backward per token of a full window, a multiply-add as two.

        6 per weight that is multiplied (blocks and head), and attention counted causally: a token
        attends to T / 2 others on average, 6 L C T in all (PaLM's appendix B counts all T, which is
        twice that).
        """
        c = self.config
        looked_up = EMBEDDINGS[:2] if c.tie_word_embeddings else EMBEDDINGS[:3]
        matmul = sum(p.numel() for name, p in self.named_parameters()
                     if p.dim() == 2 and not name.startswith(looked_up))
        return 6 * matmul + 6 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size):
        """Forget positions from `block_size` on, to train a pretrained model on shorter windows."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size = {block_size}, but this model has learned "
                             f"{self.config.block_size} positions")
        self.config = replace(self.config, block_size=block_size)
        if self.config.position == "learned":
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size], freeze=False)
