# Our recipe against nanoGPT's, on any computer: this file and cpu_speedrun_nanogpt.py.
#     python prepare.py my.parquet --dataset=mine
#     python train.py config/cpu_speedrun.py
# On 31 M tokens of English text: val loss 5.72 after these 200 steps (5.27 after 400), where
# nanoGPT itself has 5.81 after the 735 steps of the other file (three seeds each; dev/LOG.md).
from config.modern import *

out_dir = 'out-cpu-speedrun'
dataset = 'mine'
eval_interval = 50                      # steps: every 0.4 M tokens
eval_iters = 12                         # 12 x 8 windows = 49,152 tokens of val
log_interval = 10                       # steps

batch_size = 8                          # windows in a micro-batch
gradient_accumulation_steps = 2         # 8 x 2 x 512 = 8,192 tokens a step
block_size = 512
n_layer = 6
n_head = 6
n_embd = 384

optimizer = 'muon'
learning_rate = 0.01
beta1 = 0.8                             # a short run has no time for a long average
beta2 = 0.95
momentum_warmup = 16                    # steps, a twelfth of the run
lr_schedule = 'wsd'
cooldown = 0.7                          # the last 70 % go down to 0 in a straight line
min_lr = 0.0
max_iters = 200                         # 1.6 M tokens
warmup_iters = 10
