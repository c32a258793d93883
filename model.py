"""The network: GPT-2, with the parameter names of OpenAI's checkpoint.

With the settings of config/modern.py, its blocks are built like those of Qwen3. Checkpoints of
nanoGPT (github.com/karpathy/nanoGPT) can be loaded, too. Sizes in comments: B batch, T time,
L = n_layer, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch._functorch.config  # for GPT.compile(); torch has no public setting for it
import torch.nn as nn
from torch.nn import functional as F

from onecard import checkpoint, tokenizers
from onecard.attention import causal_attention, rotary_angles, rotate
from onecard.loss import SMALLEST_CHUNK, linear_cross_entropy, loss_of_logits
from onecard.runtime import matmul_dtype
from onecard.settings import UserError, convert, in_range, one_of

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
NANOGPT_ARGS = (*SIZES, "dropout", "bias")      # what a checkpoint of nanoGPT says


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024              # tokens of context
    vocab_size: int = 50304             # rows of the embedding: GPT-2's 50,257, padded for speed
    n_layer: int = 12                   # blocks
    n_head: int = 12                    # attention heads in a block
    n_embd: int = 768                   # width: numbers that stand for one token
    dropout: float = 0.0                # 0 for pretraining, 0.1 or more for finetuning
    bias: bool = True                   # biases in Linear and LayerNorm
    # GPT-2's choices; config/modern.py has the other ones
    position: str = "learned"           # learned or rotary
    norm: str = "layernorm"             # layernorm or rmsnorm
    qk_norm: bool = False               # normalize queries and keys
    mlp: str = "gelu"                   # gelu, gelu_tanh (OpenAI's weights) or swiglu
    n_inner: int = 0                    # hidden width of the MLP; 0 means 4 C, or 8/3 C for swiglu
    tie_word_embeddings: bool = True    # the head shares the weights of the token embedding
    embed_norm: bool = False            # normalize the token embedding
    zero_init: bool = False             # blocks and an untied head give zero at first
    rope_theta: float = 10000.0         # base of the rotary angles; larger for longer contexts

    def __post_init__(self):
        in_range(1, 1000, self, "n_layer")
        in_range(1, 2**16, self, "vocab_size", "n_head", "n_embd")      # ids are uint16
        in_range(1, 2**20, self, "block_size")
        in_range(0, 2**20, self, "n_inner")
        in_range(1, 10**12, self, "rope_theta")
        one_of(self, position=("learned", "rotary"), norm=("layernorm", "rmsnorm"),
               mlp=("gelu", "gelu_tanh", "swiglu"))
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} "
                            f"heads; use a multiple of {self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise UserError(f"rotary positions need an even n_embd / n_head, not {self.head_size}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout = {self.dropout} is a probability, from 0 to below 1")

    @classmethod
    def of(cls, settings, **changes):
        """The GPTConfig within `settings`, which may have more fields (train.py's)."""
        ours = {f.name: getattr(settings, f.name) for f in fields(cls)}
        return cls(**(ours | changes))

    @classmethod
    def from_checkpoint(cls, parts):
        """The GPTConfig of a checkpoint: `parts` is the dict that checkpoint.read() returns."""
        args = dict(parts["model_args"])
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(args) - set(known)):
            raise UserError(f"this checkpoint was made by another version: it has the settings "
                            f"{', '.join(unknown)}, which are no longer read")
        if missing := sorted(set(SIZES) - args.keys()):
            raise UserError(f"this checkpoint does not say its {', '.join(missing)}")
        for key, value in args.items():
            source = f"this checkpoint has {key} = {value!r}"       # begins the message of an error
            args[key] = convert(value, known[key], source)
        return cls(**args)

    def model_args(self):
        """The dict in a checkpoint: nanoGPT's seven settings, and others that were changed."""
        defaults = asdict(GPTConfig())
        return {key: value for key, value in asdict(self).items()
                if key in NANOGPT_ARGS or value != defaults[key]}

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def inner_size(self):
        """The hidden width of the MLP: n_inner, or what a 0 means."""
        if self.n_inner:
            return self.n_inner
        # swiglu has three matrices, the others two: 8/3 C makes as many weights as 4 C. GPUs are
        # fast with multiples of 64
        if self.mlp == "swiglu":
            return math.ceil(8 * self.n_embd / 3 / 64) * 64
        return 4 * self.n_embd

    @property
    def mlp_width(self):
        """Outputs of the MLP's first matrix. In swiglu, one half is a gate for the other half."""
        if self.mlp == "swiglu":
            return 2 * self.inner_size
        return self.inner_size


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, computed in fp32; the result has the dtype of `x`."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, computed in fp32; the result has the dtype of `x`."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def make_norm(config, size):
    """The norm that `config` names, over the last dimension."""
    if config.norm == "layernorm":
        return LayerNorm(size, bias=config.bias)
    return RMSNorm(size, eps=1e-6)


class CausalSelfAttention(nn.Module):
    """Its layers have OpenAI's names; the c_ stands for a convolution of width 1, a Linear."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer              # index of this block's part in a KV cache
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_size)
            self.k_norm = make_norm(config, config.head_size)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos_sin=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)                              # 3 x (B, T, C)
        q = self.q_norm(q.view(B, T, self.n_head, -1))                        # (B, T, H, D)
        k = self.k_norm(k.view(B, T, self.n_head, -1))
        v = v.view(B, T, self.n_head, -1)
        if cos_sin is not None:
            q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)     # (B, H, T, D)
        if cache is None:               # training: a whole window
            dropout = self.dropout if self.training else 0.0
            y = causal_attention(q, k, v, dropout)      # torch's, or a faster one for CPUs
        else:                           # sampling: new tokens look at all tokens so far
            k, v = cache.extend(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, cache.mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.inner_size, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)                                                  # (B, T, mlp_width)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=2)
            x = F.silu(gate) * value
        elif self.kind == "gelu_tanh":
            x = F.gelu(x, approximate="tanh")
        else:
            x = F.gelu(x)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin=None, cache=None):
        x = x + self.attn(self.ln_1(x), cos_sin, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.chunk_loss = loss_of_logits        # compile() puts a compiled one here
        self.tokens_per_chunk = SMALLEST_CHUNK  # train.py sets what is best
        # OpenAI's names: wte, wpe are the token and position embedding, h the blocks
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        else:
            angles = rotary_angles(config.block_size, config.head_size, config.rope_theta)
            self.register_buffer("cos_sin", angles, persistent=False)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight   # shared (Press and Wolf 2017)
        self.init_weights()

    def init_weights(self):
        """Initialize as GPT-2 does; with zero_init, every block starts as the identity."""
        c = self.config
        matrix_std, head_std = 0.02, 0.02
        residual_std = 0.02 / math.sqrt(2 * c.n_layer)      # the residual stream sums 2 L outputs
        if c.zero_init:
            matrix_std = 0.55 / math.sqrt(c.n_embd)         # nanochat's and modded-nanogpt's value
            residual_std, head_std = 0.0, 0.0
        embedding_std = 0.02
        # with embed_norm, the size of the embedding does not matter, but a tied head must be small
        if c.embed_norm and not c.tie_word_embeddings:
            embedding_std = 1.0

        nn.init.normal_(self.transformer.wte.weight, std=embedding_std)
        if c.position == "learned":
            nn.init.normal_(self.transformer.wpe.weight, std=0.02)
        for block in self.transformer.h:
            nn.init.normal_(block.attn.c_attn.weight, std=matrix_std)
            nn.init.normal_(block.attn.c_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=matrix_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
            if c.qk_norm:               # above 1: sharper attention (nanochat's value)
                nn.init.constant_(block.attn.q_norm.weight, 1.2)
                nn.init.constant_(block.attn.k_norm.weight, 1.2)
        if not c.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, std=head_std)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """The final hidden states (B, T, C) of `idx` (B, T); lm_head makes logits of them.

        A `cache` (generate.KVCache) holds keys and values of the tokens before `idx`.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens do not fit the context"
        if cache is None:
            positions = slice(0, T)     # rows of wpe or cos_sin
        else:
            positions = cache.advance(T)    # the next T of them, as a tensor (T,)
        x = self.transformer.wte(idx)                                         # (B, T, C)
        if self.config.embed_norm:
            x = F.rms_norm(x, (self.config.n_embd,), eps=1e-6)
        cos_sin = None
        if self.config.position == "rotary":
            cos_sin = self.cos_sin[:, positions]                              # (2, T, 1, D)
        else:
            x = x + self.transformer.wpe.weight[positions]
        x = self.transformer.drop(x)
        # under bf16 autocast, the residual stream is bf16, too: half the memory traffic. fp16 could
        # overflow
        if matmul_dtype(x.device.type) is torch.bfloat16:
            x = x.bfloat16()
        for block in self.transformer.h:
            x = block(x, cos_sin, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of `idx` (B, T); with `targets` (B, T) the mean cross-entropy in nats.

        Targets of -1 do not count. The loss is computed chunk by chunk, so the logits of all tokens
        are never in memory at the same time.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        return linear_cross_entropy(x, self.lm_head.weight, targets, self.tokens_per_chunk,
                                    self.chunk_loss)

    def compile(self, recompute=False, **options):
        """Compile in place; the weights keep their names.

        With `recompute`, backward computes cheap activations again instead of reading them: half
        the memory, some 2 % slower.
        """
        # True forbids to recompute
        torch._functorch.config.ban_recompute_materialized_backward = not recompute
        # two graphs: a single one would keep the logits of all chunks until the loss is complete
        self.hidden = torch.compile(self.hidden, **options)
        self.chunk_loss = torch.compile(self.chunk_loss, **options)

    def count_parameters(self):
        """{"total": all parameters, "blocks": all but the embeddings and the head}."""
        total = sum(p.numel() for p in self.parameters())
        blocks = [*self.transformer.h.parameters(), *self.transformer.ln_f.parameters()]
        return {"total": total, "blocks": sum(p.numel() for p in blocks)}

    def flops_per_token(self):
        """FLOPs of forward and backward for a token of a full window; a multiply-add counts twice.

        A weight of a matrix (blocks and head) costs 6. Attention to all T tokens costs 12 L C T
        (PaLM's appendix B); causal attention is half of it, because a token sees T / 2 on average.
        """
        c = self.config
        multiplied = self.lm_head.weight.numel() + sum(
            p.numel() for p in self.transformer.h.parameters() if p.dim() == 2)
        return 6 * multiplied + 6 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_checkpoint(cls, parts):
        """The model in a checkpoint, as checkpoint.read() returns it, in eval mode."""
        model = cls(GPTConfig.from_checkpoint(parts))
        model.load_weights(parts)
        return model.eval()

    def load_weights(self, parts):
        """Take the weights of a checkpoint."""
        # nanoGPT: compiled models have the prefix _orig_mod., and older ones a mask in attn.bias
        # (the biases that we need are in attn.c_attn.bias)
        weights = {name.removeprefix("_orig_mod."): w for name, w in parts["model"].items()
                   if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        wpe = "transformer.wpe.weight"
        if wpe in weights:              # the checkpoint may have more positions than this model
            weights[wpe] = weights[wpe][:self.config.block_size]
        ours = {name: w.shape for name, w in self.state_dict().items()}
        theirs = {name: w.shape for name, w in weights.items()}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise UserError(f"this checkpoint is damaged or of another network: its {name} has "
                                f"the shape {theirs.get(name)}, and its model_args need "
                                f"{ours.get(name)} (None: there is no such weight)")
        for name, weight in weights.items():
            if not (weight.is_floating_point() and weight.isfinite().all()):
                raise UserError(f"the {name} of this model must be floating-point numbers without "
                                "nan and infinity; use another checkpoint")
        embedding, head = weights["transformer.wte.weight"], weights["lm_head.weight"]
        if self.config.tie_word_embeddings and not torch.equal(embedding, head):
            raise UserError("this model has a head of its own, and its settings say that the head "
                            "shares the weights of the token embedding")
        self.load_state_dict(weights)


@dataclass
class OpenedModel:
    """A trained model, ready for use."""
    model: GPT                          # on the CPU
    label: str                          # to print
    tokenizer: object                   # one of onecard/tokenizers.py
    dataset: str                        # name of its training data; "" if it is not known


def open_model(name):
    """The model of a run's folder, a .pt file, "gpt2" (or larger), or a transformers folder."""
    parts, label = checkpoint.read(name)
    model, tokenizer = GPT.from_checkpoint(parts), tokenizers.of_checkpoint(parts)
    if isinstance(tokenizer, tokenizers.UnknownTokenizer):
        raise UserError(f"{label}: its {model.config.vocab_size:,} ids are neither GPT-2's nor "
                        "characters of a known dataset, so they cannot become text. If nanoGPT "
                        "made the dataset, its folder with meta.pkl must be under data/")
    dataset = parts.get("config", {}).get("dataset", "")
    return OpenedModel(model, label, tokenizer, str(dataset))
