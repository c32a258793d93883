# The best that one FineWeb file and an RTX 4070 give at all, in five to six days.
#     python train.py config/train_fineweb_4070_week.py
# Val loss predicted, not measured: 3.10 to 3.18. Not 175 epochs of 64 M parameters: a token is
# worth nearly as much the 4th time as the 1st and next to nothing after the 16th (Muennighoff et
# al. 2023), so the time goes into a model five times as large that reads the file twelve times.

out_dir = 'out-fineweb-week'
eval_interval = 1000                    # every 262 M tokens, about every third of an epoch
eval_iters = 600                        # 600 x 4 windows = 2.46 M tokens of val
log_interval = 10

dataset = 'fineweb'
batch_size = 4                          # windows at a time: of 8, a 12 GB card is full
gradient_accumulation_steps = 64        # 4 x 64 x 1024 = 262,144 tokens a step
block_size = 1024

block = 'modern'
n_layer = 16                            # 201 M parameters of blocks: the most that still reads the
n_embd = 1024                           # file 8 to 16 times in these days, where the sweeps of
n_head = 8                              # Kim et al. 2025 (arXiv 2509.14786) have their best

optimizer = 'muon'
learning_rate = 0.02                    # the evening's, times the root of twice the tokens a step
embedding_lr = 0.35                     # likewise, and the next two
head_lr = 0.0042
scalar_lr = 0.0085
beta1 = 0.85                            # of AdamW: the evening's memory, in tokens
beta2 = 0.97
weight_decay = 0.12                     # cautious; forgets in a third of an epoch: about 4 times
head_weight_decay = 0.2                 # what one epoch wants, as in these sweeps
embedding_weight_decay = 0.002          # more than the usual 0.001, as above: a judgement
lr_schedule = 'wsd'
cooldown = 0.6
min_lr = 0.0
max_iters = 31900                       # 8.36 G tokens: 12 epochs, where the file has 0.7 G
warmup_iters = 300                      # 1 %

ema_half_life = 1000                    # steps, 0.37 of an epoch: slowrun's, on repeated text
dropout = 0.0                           # with 0.3 parameters a token of the file: no need
