# A first GPT, on any computer, in a few minutes:
#     python train.py config/quickstart.py

out_dir = 'out-quickstart'
dataset = 'sample'                      # Python's own documentation, 0.6 M tokens, made on the spot
eval_interval = 100                     # often, to see the loss fall
eval_iters = 20                         # 20 x 8 windows = 20,480 tokens of val
log_interval = 10                       # steps from line to line

batch_size = 8                          # 8 x 128 = 1,024 tokens a step: many small steps
gradient_accumulation_steps = 1
block_size = 128                        # most docstrings are shorter
n_layer = 4                             # 4 x 4 x 192: 11.5 M parameters, 9.7 M of them embeddings
n_head = 4
n_embd = 192

learning_rate = 3e-3                    # a small model takes five times what GPT-2 takes
max_iters = 700                         # 0.7 M tokens, 1.3 epochs
lr_decay_iters = 700                    # the cosine ends with the run
warmup_iters = 20
min_lr = 3e-4                           # a tenth of the peak
beta2 = 0.99                            # few tokens a step make a noisy gradient: a longer memory
