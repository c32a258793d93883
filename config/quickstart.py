# A first GPT, on any computer, in a few minutes:
#     python train.py config/quickstart.py
from config.modern import *  # GPT-2 with AdamW would need six times the steps (dev/LOG.md)

out_dir = 'out-quickstart'
dataset = 'sample'                      # Python's own documentation, 0.4 M tokens; made if missing
eval_interval = 100                     # steps
eval_iters = 10                         # 10 x 4 windows = 10,240 tokens of val
log_interval = 20                       # steps

batch_size = 4                          # windows in a micro-batch
gradient_accumulation_steps = 1         # 4 x 256 = 1,024 tokens a step: many small steps
block_size = 256                        # some paragraphs
n_layer = 4
n_head = 4
n_embd = 192                            # 21.1 M parameters, 19.3 M of them in the embeddings

optimizer = 'muon'
learning_rate = 0.02
beta1 = 0.8                             # a short run has no time for a long average
beta2 = 0.95
momentum_warmup = 40                    # steps, a tenth of the run
lr_schedule = 'wsd'
cooldown = 0.7                          # the last 70 % go down to 0 in a straight line
min_lr = 0.0
max_iters = 400                         # 0.41 M tokens, one epoch
warmup_iters = 6

compile = False                         # compiling takes longer than 400 steps gain by it
