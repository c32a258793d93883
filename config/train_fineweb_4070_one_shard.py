# The usual recipe for one RTX 4070 (12 GB) and one FineWeb file, value by value.
#     python train.py config/train_fineweb_4070_one_shard.py
# It is not what it promises: 64 M parameters (not 110 M), about 0.7 G tokens in the file (not
# 6.5 G), about 175 epochs (not 15), 14 to 17 days (not 5). train.py prints the true numbers before
# the first step. train_fineweb_4070_overnight.py gets further in one night.

out_dir = 'out-fineweb-110M-one-shard'  # the recipe's name; the model has 64 M parameters
eval_interval = 500                     # steps: every 246 M tokens, a third of an epoch
eval_iters = 200                        # 200 x 12 windows = 2.46 M tokens of val, always the same
log_interval = 50                       # steps: about five minutes on a 4070
always_save_checkpoint = True           # 0.8 GB after each evaluation; best.pt is kept apart
wandb_log = False                       # log.jsonl has the same numbers, without an account

dataset = 'fineweb'                     # data/fineweb/, which prepare.py makes
batch_size = 12                         # windows in a micro-batch: 4.8 of the card's 12 GB
gradient_accumulation_steps = 40        # 12 x 40 x 1,024 = 491,520 tokens a step, as GPT-2 124M
block_size = 1024                       # GPT-2's context; a FineWeb document has about 700 tokens

n_layer = 12                            # GPT-2 small's depth
n_head = 8                              # heads of 64 dimensions, which attention kernels like
n_embd = 512                            # two thirds of GPT-2 small's width
dropout = 0.0                           # right for text that is seen once; 175 epochs may want 0.1
bias = False                            # no biases: a little faster, as good

learning_rate = 6e-4                    # GPT-3's value for a model of 125 M parameters
max_iters = 250000                      # 122.9 G tokens; 4 epochs of the file are 5,700 steps
warmup_iters = 2000                     # 1 G tokens, more than the whole file
lr_decay_iters = 250000                 # the cosine ends with the run; change it with max_iters
min_lr = 6e-5                           # a tenth of the highest rate
beta2 = 0.99                            # a longer average than GPT-3's 0.95
compile = True                          # a minute at the start, then much faster
