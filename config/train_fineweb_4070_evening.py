# The best of one RTX 4070 (12 GB) and one FineWeb file in an evening: every token of it, once.
#     python train.py config/train_fineweb_4070_evening.py
# Val loss predicted, not measured: 3.34 to 3.46. OpenAI's GPT-2 124M has 3.29 on such text.
# Values without a source are those that nanochat and modded-nanogpt's track 3 agree on.
from config.modern import *

out_dir = 'out-fineweb-evening'
eval_interval = 500                     # steps: every 66 M tokens
eval_iters = 200                        # 200 x 12 windows = 2.46 M tokens of val, always the same
log_interval = 10                       # steps

dataset = 'fineweb'
batch_size = 0                          # as many windows in a micro-batch as the card has room for
tokens_per_step = 131072                # little text is better read in many small steps
block_size = 1024

n_layer = 12                            # GPT-2 small's depth and width: 85 M parameters in blocks
n_embd = 768                            # 77 M more in the embeddings: they cost memory, not time
n_head = 6                              # heads of 128 dimensions: a little better than 12 of 64

optimizer = 'muon'                      # reaches AdamW's loss on 0.6 of the tokens (track 3)
learning_rate = 0.015                   # of matrices; track 3's runs have 0.010 to 0.022
embedding_lr = 0.25                     # large, because the embedding is normalized
head_lr = 0.003                         # track 3: 0.004, nanochat: 0.008, for four times the step
scalar_lr = 0.006                       # they have 0.010 to 0.015, for four times the step
beta1 = 0.9                             # AdamW, for embedding, head and norms
beta2 = 0.98                            # in tokens as long as 0.95 at four times the step
weight_decay = 0.1                      # cautious; the weights forget in a quarter of the run
lr_schedule = 'wsd'                     # a longer run can go on from before the cooldown
cooldown = 0.7                          # the last 70 % go down to 0 in a straight line
min_lr = 0.0
max_iters = 5310                        # 696 M tokens: one epoch, if the file has 0.7 G
warmup_iters = 100                      # 2 %
