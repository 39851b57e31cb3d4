"""The gradient flow of one loss whose data are divided among several processes, and its end polished; also in one process.

torchrun --nproc-per-node 2 examples/distributed.py
python examples/distributed.py
"""

from __future__ import annotations

import os

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, distributed, nn
from torch.nn.functional import mse_loss

from torch_gradflow import GradientFlow, NewtonPolish


def shard() -> tuple[Tensor, Tensor]:
    """This process's part of 442 patients: 10 measurements each, and how the disease went on."""
    bunch = load_diabetes()
    x, y = torch.tensor(bunch.data), torch.tensor(bunch.target)[:, None]
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    return x[rank::size], y[rank::size]


def train() -> tuple[float, str]:
    """The loss of all data at the end, and what kind of point that is; the same in all processes."""
    x, y = shard()
    torch.manual_seed(0)  # all processes begin with the same parameters
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    # None where there is no process group, which means one process.
    settings = {"process_group": distributed.group.WORLD, "shard_size": len(x), "weight_decay": 0.01}

    optimizer = GradientFlow(model.parameters(), lr=5.0, **settings)
    for _ in range(20):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()

    polish = NewtonPolish(model.parameters(), **settings)

    def closure() -> Tensor:
        polish.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    loss = float(polish.step(closure))
    return loss, polish.result.certificate.kind


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # set by torchrun
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = train()
    if os.environ.get("RANK", "0") == "0":
        print("loss {:.12f}, {}".format(*found))
    if distributed.is_initialized():
        distributed.destroy_process_group()
