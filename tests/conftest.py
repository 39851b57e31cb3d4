"""Small tensors gain nothing from threads, and lose much where other processes share the cores."""

import torch

torch.set_num_threads(1)
