"""What is the network? GPT-2 with its names: configuration, blocks, initialisation, loss, FLOPs.

Sizes in comments: B batch, T time, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""
import math
from dataclasses import asdict, dataclass, fields

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
    bias: bool = True               # biases in Linear and LayerNorm, as GPT-2 has them

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            nearest = max(self.n_embd // self.n_head, 1) * self.n_head
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} "
                             f"heads. Nearest that works: n_embd = {nearest}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} is a probability, from 0 to below 1")


def model_args(cfg):
    """The fields of `cfg` (a GPTConfig or an extension of it) that make a model, as a dict."""
    return {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}


class KVCache:
    """Keys and values of the tokens seen so far, in tensors made once for the whole context."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (2, config.n_layer, batch_size, config.n_head, config.block_size,
                 config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype)       # 2 x (L, B, H, T, D)
        self.length = 0             # tokens in it

    def extend(self, layer, k, v):
        """Add `k`, `v` (B, H, T, D) after what is there; return all keys and values of `layer`."""
        end = self.length + k.size(2)
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


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)   # 3 x (B, H, T, D)
        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:                                               # each sees its own and all of the past
            k, v = cache.extend(self.layer, k.to(cache.k.dtype), v.to(cache.v.dtype))
            mask = None if T == 1 else torch.ones(
                T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


CHUNK = 2048                        # tokens, at most half of all, whose logits exist at once


def loss_of_chunk(x, w, targets, counts, grad_w):
    """Summed cross-entropy of `x @ w.T`, x (N, C), w (V, C), targets and counts (N,).

    Where `grad_w` (V, C) is a tensor, the chunk's part of it is added there, and the gradient of
    `x` is the second result.
    """
    targets, counts = targets[:, None], counts[:, None]
    logits = (x @ w.T).to(torch.promote_types(w.dtype, torch.float32))       # (N, V)
    logsumexp = logits.logsumexp(1, keepdim=True)
    total = ((logsumexp - logits.gather(1, targets)) * counts).sum()
    if grad_w is None:
        return total, None
    if torch.compiler.is_compiling():       # becomes one pass, which a scatter would cut into three
        columns = torch.arange(w.size(0), device=w.device)
        grad = ((logits - logsumexp).exp() - (columns == targets).to(logits.dtype)) * counts
    else:
        grad = logits.sub_(logsumexp).exp_()
        grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype)).mul_(counts)
    grad = grad.to(w.dtype)
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
    def forward(ctx, x, weight, targets, dtype, needs_grad, chunk):
        w, wide = weight.to(dtype), torch.promote_types(dtype, torch.float32)
        counts = targets >= 0
        n = counts.sum()
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x, grad_w = [], torch.zeros_like(weight, dtype=wide) if needs_grad else None
        n_chunks = max(-(-len(x) // CHUNK), 2)
        pieces = (t.chunk(n_chunks) for t in (x.to(dtype), targets.clamp(min=0), counts))
        for x_c, targets_c, counts_c in zip(*pieces, strict=True):
            total_c, grad_x_c = chunk(x_c, w, targets_c, counts_c, grad_w)
            total += total_c
            grad_x.append(grad_x_c)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_w, n)
        return total / n

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w, n = ctx.saved_tensors
        scale = grad_loss / n               # in place: a second backward is an error, not a copy
        return grad_x.to(grad_w.dtype) * scale, grad_w.mul_(scale), None, None, None, None


class GPT(nn.Module):
    loss_of_chunk = staticmethod(loss_of_chunk)

    def __init__(self, config):
        super().__init__()
        self.config = config = GPTConfig(**model_args(config))
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight   # tied (Press and Wolf 2017)
        self.init_weights()

    def init_weights(self):
        """N(0, 0.02), over sqrt(2 n_layer) for the 2 n_layer sums into the residual stream."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None):
        """What the last block and the final norm make of `idx` (B, T): (B, T, C)."""
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        assert past + T <= self.config.block_size, \
            f"{past} + {T} tokens in a context of {self.config.block_size}"
        pos = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx)
                                  + self.transformer.wpe(pos))                # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def loss(self, x, targets):
        """Mean cross-entropy in nats of what `hidden` made, x (B, T, C), against targets (B, T)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):         # it casts by itself, once for all
            return LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                            dtype, torch.is_grad_enabled(), self.loss_of_chunk)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of `idx` (B, T); with `targets` (B, T) the mean cross-entropy in nats.

        Targets of -1 do not count. The logits of a loss never exist all at once.
        """
        x = self.hidden(idx)                                                  # (B, T, C)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def compile(self, **options):
        """Compile `hidden` and one chunk of the loss, in place; weights keep their names.

        As one graph, a GPU's scheduler would keep the logits of all chunks until the end.
        """
        self.hidden = torch.compile(self.hidden, **options)
        self.loss_of_chunk = torch.compile(self.loss_of_chunk, **options)

    def n_params(self):
        """Parameters: {"total": all, tied ones once, "without_embeddings": without wte and wpe}."""
        total = sum(p.numel() for p in self.parameters())
        return {"total": total,
                "without_embeddings": total - self.transformer.wte.weight.numel()
                                            - self.transformer.wpe.weight.numel()}

    def flops_per_token(self):
        """FLOPs of forward and backward per token of a full window, a multiply-add as two.

        6 per weight that is multiplied (blocks and head), and attention counted causally: a token
        attends to T / 2 others on average, 6 L C T in all (PaLM's appendix B counts all T, which is
        twice that).
        """
        c = self.config
        matmul = sum(p.numel() for name, p in self.named_parameters()
                     if p.dim() == 2 and "wpe" not in name)
        return 6 * matmul + 6 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size):
        """Forget positions from `block_size` on, to train a pretrained model on shorter windows."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size = {block_size}, but this model has learned "
                             f"{self.config.block_size} positions")
        self.config = GPTConfig(**{**asdict(self.config), "block_size": block_size})
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size], freeze=False)

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """OpenAI's weights ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or a folder like these.

        The exact GELU stands in for GPT-2's tanh approximation of it, as in nanoGPT.
        """
        try:
            from transformers import AutoConfig, GPT2LMHeadModel
        except ImportError:
            raise ImportError(f"init_from = {name!r} needs transformers: "
                              "pip install transformers") from None
        try:
            c = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"init_from = {name!r}: transformers finds no model there: "
                             f"{str(error).splitlines()[0]}") from None
        if c.model_type != "gpt2" or c.n_inner not in (None, 4 * c.n_embd):
            raise ValueError(f"init_from = {name!r} is a model of type {c.model_type}; "
                             "only GPT-2's shape can be read")
        weights = GPT2LMHeadModel.from_pretrained(name).state_dict()
        model = cls(GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer,
                              n_head=c.n_head, n_embd=c.n_embd, dropout=dropout, bias=True))
        for key, ours in model.state_dict().items():
            is_conv1d = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            ours.copy_(weights[key].T if is_conv1d else weights[key])   # kept as (in, out) there
        return model
