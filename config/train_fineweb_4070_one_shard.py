# The usual recipe for one RTX 4070 (12 GB) and one FineWeb file, value by value as it goes around.
#     python train.py config/train_fineweb_4070_one_shard.py
# What it promises and what it is differ: 64 M parameters (not 110 M), about 0.7 G tokens in the
# file (not 6.5 G), about 175 epochs (not 15), about three weeks (not 5 days). train.py prints the
# true numbers before the first step.

out_dir = 'out-fineweb-110M-one-shard'  # the name is the recipe's; the model has 64 M parameters
eval_interval = 500                     # every 246 M tokens, about every third of an epoch
eval_iters = 200                        # 200 x 12 windows = 2.46 M tokens of val, always the same
log_interval = 50                       # one line in log.jsonl for 50 steps, some minutes on a 4070
always_save_checkpoint = True           # 0.8 GB at each evaluation; the best one is kept apart
wandb_log = False                       # log.jsonl has it all, without an account

dataset = 'fineweb'                     # data/fineweb/, which prepare.py makes
batch_size = 12                         # windows at a time; 3.4 GiB planned, so 12 GB have room
gradient_accumulation_steps = 40        # 12 x 40 x 1024 = 491,520 tokens a step, about GPT-2 124M's
block_size = 1024                       # GPT-2's context; a FineWeb document has about 700 tokens

n_layer = 12                            # 12 x 8 x 512: GPT-2 small at two thirds of its width
n_head = 8                              # of 64 dimensions, a size that fast attention kernels like
n_embd = 512                            # 25.8 of the 64 M parameters embed the 50,304 tokens
dropout = 0.0                           # right for text seen once; at 175 epochs 0.1 may be better
bias = False                            # none in Linear and LayerNorm: a little faster, no worse

learning_rate = 6e-4                    # GPT-3's value for a model of 125 M
max_iters = 250000                      # 122.9 G tokens. 4 epochs of the file: about 5,700 steps
warmup_iters = 2000                     # 1 G tokens of warm-up, longer than the whole file once
lr_decay_iters = 250000                 # the cosine ends with the run; change it with max_iters
min_lr = 6e-5                           # a tenth of the peak
beta2 = 0.99                            # longer memory than GPT-3's 0.95: smoother, slow to forget
compile = True                          # torch.compile: a minute at the start, much faster then
