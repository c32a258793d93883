# A GPT as good as OpenAI's GPT-2 124M, from one RTX 4070 and one FineWeb file, overnight.
#     python train.py config/train_fineweb_4070_overnight.py
# Val loss predicted, not measured: 3.22 to 3.34. It is the evening's run, two and a half times as
# long: text that is read a second and a third time is nearly as good as new text.
from config.train_fineweb_4070_evening import *

out_dir = 'out-fineweb-overnight'
eval_interval = 1000                    # steps: every 131 M tokens
max_iters = 13300                       # 1.74 G tokens: 2.5 epochs, if the file has 0.7 G
weight_decay = 0.05                     # cautious; half of the evening's for a longer run
