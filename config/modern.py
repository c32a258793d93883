# The network of today: rotary positions, RMSNorm, QK-norm, SwiGLU. These are Qwen3's blocks, which
# transformers and llama.cpp can open. A recipe takes these settings by
#     from config.modern import *

position = 'rotary'                     # rotate queries and keys; there is no position embedding
norm = 'rmsnorm'                        # as good as LayerNorm, and simpler
qk_norm = True                          # normalize queries and keys: attention stays stable
mlp = 'swiglu'                          # a gated MLP
bias = False                            # no biases in Linear
tie_word_embeddings = False             # the head has weights of its own
embed_norm = True                       # normalize the token embedding: it can learn fast
zero_init = True                        # every block starts as the identity
