# Our recipe against nanoGPT's, on any computer: this file and cpu_speedrun_nanogpt.py beside it.
#     python prepare.py my.parquet --dataset=mine
#     python train.py config/cpu_speedrun.py
# On 31 M tokens of English text: val loss 5.72 after these 200 steps (5.27 after 400), where
# nanoGPT itself has 5.81 after the other's 735 (three seeds each, two of 400; dev/LOG.md).

out_dir = 'out-cpu-speedrun'
dataset = 'mine'
eval_interval = 50                      # every 0.4 M tokens
eval_iters = 12                         # 12 x 8 windows = 49,152 tokens of val
log_interval = 10

batch_size = 8                          # windows at a time
gradient_accumulation_steps = 2         # 8 x 2 x 512 = 8,192 tokens a step
block_size = 512
block = 'modern'
n_layer = 6
n_head = 6
n_embd = 384

optimizer = 'muon'
learning_rate = 0.01
beta1 = 0.8                             # of AdamW: so short a run has no time for more memory
beta2 = 0.95
momentum_warmup = 16                    # steps, a twelfth of the run
lr_schedule = 'wsd'
cooldown = 0.7                          # linear to 0 over the last 70 %
min_lr = 0.0
max_iters = 200                         # 1.6 M tokens
warmup_iters = 10
