# A first GPT, on any computer, in a few minutes:
#     python train.py config/quickstart.py

out_dir = 'out-quickstart'
dataset = 'sample'                      # Python's own documentation, 0.6 M tokens, made on the spot
eval_interval = 40                      # often, to see the loss fall
eval_iters = 10                         # 10 x 8 windows = 10,240 tokens of val
log_interval = 2                        # steps from line to line

batch_size = 8                          # 8 x 128 = 1,024 tokens a step: many small steps
gradient_accumulation_steps = 1
block_size = 128                        # most docstrings are shorter
block = 'modern'                        # with Muon, 120 steps get below the 4.78 that GPT-2's block
n_layer = 4                             # and AdamW reach in 700
n_head = 4
n_embd = 192                            # 21.1 M parameters, 19.3 M of them in the embeddings

optimizer = 'muon'
learning_rate = 0.02
beta1 = 0.8                             # of AdamW: so short a run has no time for more memory
beta2 = 0.95
momentum_warmup = 12                    # steps, a tenth of the run
lr_schedule = 'wsd'
cooldown = 0.7                          # linear to 0 over the last 70 %
min_lr = 0.0
max_iters = 120                         # 0.12 M tokens, 0.2 epochs
warmup_iters = 6

compile = False                         # 120 steps do not earn back the minute that it takes
