# The best that one FineWeb file and one RTX 4070 can give, in about four days.
#     python train.py config/train_fineweb_4070_week.py
# Val loss predicted, not measured: 3.02 to 3.14. The fourth reading of a text is worth nearly as
# much as the first, and after the sixteenth another one adds next to nothing (Muennighoff et al.
# 2023). So the time goes into a model five times as large, which reads the file twelve times; the
# sweeps of Kim et al. 2025 (arXiv 2509.14786) are best at such sizes for 8 to 16 epochs.
from config.modern import *

out_dir = 'out-fineweb-week'
eval_interval = 1000                    # steps: every 262 M tokens, a third of an epoch
eval_iters = 200                        # 200 x 12 windows = 2.46 M tokens of val, always the same
log_interval = 10                       # steps

dataset = 'fineweb'
batch_size = 0                          # as many windows in a micro-batch as the card has room for
tokens_per_step = 262144
block_size = 1024

n_layer = 16                            # 201 M parameters in blocks
n_embd = 1024
n_head = 8

optimizer = 'muon'
learning_rate = 0.02                    # the evening's x sqrt(2): the step is twice as large
embedding_lr = 0.35                     # the same
head_lr = 0.0042                        # the same
scalar_lr = 0.0085                      # the same
beta1 = 0.85                            # the evening's average, in tokens
beta2 = 0.97                            # the same
weight_decay = 0.12                     # cautious; four times what one epoch needs (Kim et al.)
head_weight_decay = 0.2                 # large, for the same reason
embedding_weight_decay = 0.002          # twice the usual 0.001: a guess
lr_schedule = 'wsd'
cooldown = 0.6
min_lr = 0.0
max_iters = 31900                       # 8.36 G tokens: 12 epochs, if the file has 0.7 G
warmup_iters = 300                      # 1 %
dropout = 0.0                           # not needed: 0.3 parameters for each token of the file
