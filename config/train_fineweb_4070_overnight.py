# A GPT as good as OpenAI's GPT-2 124M, from one RTX 4070 and one FineWeb file, overnight.
#     python train.py config/train_fineweb_4070_overnight.py
# Val loss predicted, not measured: 3.28 to 3.30. It is the evening's run, two and a half times as
# long: text read a second and a third time is nearly as good as new text.

out_dir = 'out-fineweb-overnight'
eval_interval = 1000                    # every 131 M tokens, 13 times in the run
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
weight_decay = 0.05                     # cautious; forgets in a fifth of the run
lr_schedule = 'wsd'                     # a longer run can start from before the cooldown
cooldown = 0.7                          # linear to 0 over the last 70 %
min_lr = 0.0
max_iters = 13300                       # 1.74 G tokens: 2.5 epochs, where the file has 0.7 G
warmup_iters = 100
