# The other half of cpu_speedrun.py: nanoGPT's model and recipe, same size and same text.
#     python train.py config/cpu_speedrun_nanogpt.py

out_dir = 'out-cpu-speedrun-nanogpt'
dataset = 'mine'
eval_interval = 50                      # steps
eval_iters = 12                         # 12 x 8 windows = 49,152 tokens of val
log_interval = 10                       # steps

batch_size = 8                          # windows in a micro-batch
gradient_accumulation_steps = 2         # 8 x 2 x 512 = 8,192 tokens a step
block_size = 512
n_layer = 6
n_head = 6
n_embd = 384

learning_rate = 1e-3                    # the best of 5e-4, 1e-3 and 2e-3, with three seeds each
beta2 = 0.99                            # steps of few tokens need a long average
max_iters = 735                         # 6.0 M tokens
lr_decay_iters = 735                    # the cosine ends with the run
warmup_iters = 36                       # 5 %
min_lr = 1e-4                           # a tenth of the highest rate
