# The best of one RTX 4070 (12 GB) and one FineWeb file in an evening: every token of it, once.
#     python train.py config/train_fineweb_4070_evening.py
# Val loss predicted, not measured: 3.39 (3.35 to 3.44); OpenAI's GPT-2 124M has 3.29 on such text.
# Values without a source here are those that nanochat and modded-nanogpt's track 3 agree on.

out_dir = 'out-fineweb-evening'
eval_interval = 500                     # every 66 M tokens, ten times in the run
eval_iters = 150                        # 150 x 16 windows = 2.46 M tokens of val, always the same
log_interval = 10

dataset = 'fineweb'
batch_size = 16                         # windows at a time
gradient_accumulation_steps = 8         # 16 x 8 x 1024 = 131,072 tokens a step: many small steps
block_size = 1024                       # are worth more than few large ones on so little text

block = 'modern'                        # rotary, RMSNorm, QK-norm, SwiGLU: Qwen3's blocks
n_layer = 12                            # GPT-2 small's depth and width: 85 M parameters of blocks,
n_embd = 768                            # and 77 M in the embeddings, which cost memory and no time
n_head = 6                              # of 128 dimensions, a little better than 12 of 64

optimizer = 'muon'                      # the same loss on 0.6 of AdamW's tokens (track 3)
learning_rate = 0.015                   # of the matrices; between 0.010 and 0.022 in their runs
embedding_lr = 0.25                     # large, since the embedding is normalised
head_lr = 0.003                         # track 3's 0.004 and nanochat's 0.008 are for four times
scalar_lr = 0.006                       # the tokens a step: half of these; of 0.010 to 0.015 here
beta1 = 0.9                             # of AdamW, for embedding, head and norms
beta2 = 0.98                            # 0.95 at four times the tokens a step: as long in tokens
weight_decay = 0.1                      # cautious; forgets in a quarter of the run
lr_schedule = 'wsd'                     # a longer run can start from before the cooldown
cooldown = 0.7                          # linear to 0 over the last 70 %
min_lr = 0.0
max_iters = 5310                        # 696 M tokens: one epoch, where the file has 0.7 G
warmup_iters = 100                      # 2 %
