"""The embedded world: a small policy and generated tasks, so that everything runs on any machine without a download.

base_policy.py  the paths of the checkpoints
families.py     generators of tasks, and the prompt tables built from them
noisy_rewards.py  reward functions that are wrong on a share of the completions
tokenizer.py    the character tokenizer
train_base.py   the script that trained the checkpoints
base/           a checkpoint: Llama architecture, 0.9 M parameters, safetensors
ladder/         another one, whose accuracy on `reverse` falls with the length of the word
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
