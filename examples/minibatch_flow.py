"""What a flow of mini-batches is: SGD at the same learning rate, the flow of each batch, and the flow of all data.

A step of SGD with learning rate lr is one Euler step of the flow of its batch's loss, and a step of GradientFlow on that
batch is the flow itself for the time lr. Both are near the flow of the whole loss while lr is small. As lr grows, SGD
becomes unstable; the flow of the batches never does, but goes further and further towards the minimum of each batch, whose
noise it fits, and so away from the flow of the whole loss. Only ``FullBatch`` follows that one, whatever lr is.

A softplus network (33 parameters) learns a noisy teacher from 500 samples in batches of 25, for the same flow time at each
learning rate. Printed: a table. Saved: a figure.

    python examples/minibatch_flow.py [--time 20] [--figure minibatch_flow.png]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import FullBatch, GradientFlow

RATES = (0.05, 0.15, 0.5, 1.5, 5.0)
SHOWN = 0.15
N_SAMPLES, BATCH = 500, 25
NAMES = ("SGD", "flow of each batch", "flow of all data")
STYLES = (("#D55E00", ":"), ("#009E73", "--"), ("#0072B2", "-"))
Curve = tuple[list[float], list[float]]


def data() -> tuple[Tensor, Tensor]:
    """Inputs and noisy targets of a teacher with four neurons."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 1)).double()
    x = torch.randn(N_SAMPLES, 2, dtype=torch.float64)
    y = 3 * teacher(x).detach()
    return x, y + 0.3 * torch.randn_like(y)


def student() -> nn.Sequential:
    """Always the same one."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 1)).double()


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end, always in the same order."""
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    while True:
        yield from loader


def train(name: str, lr: float, time: float, x: Tensor, y: Tensor) -> Curve:
    """Flow times, and the loss of all data at each."""
    model, stream = student(), batches(x, y)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if name != "SGD":
        optimizer = GradientFlow(model.parameters(), lr=lr, method="dopri5", rtol=1e-4)
    everything = FullBatch(
        DataLoader(TensorDataset(x, y), BATCH), lambda batch: mse_loss(model(batch[0]), batch[1]), optimizer
    )

    def of_next_batch() -> Callable[[], Tensor]:
        inputs, targets = next(stream)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        return closure

    times, losses = [0.0], [mse_loss(model(x), y).item()]
    for step in range(round(time / lr)):
        optimizer.step(everything if name == "flow of all data" else of_next_batch())
        times.append(lr * (step + 1))
        losses.append(mse_loss(model(x), y).item())
    return times, losses


def last_tenth(losses: list[float]) -> float:
    """The mean of the last tenth; NaN where the loss is above that at the start."""
    tail = losses[-max(1, len(losses) // 10) :]
    mean = sum(tail) / len(tail)
    return mean if mean < losses[0] else math.nan


def main() -> None:
    """Train by all three at each rate, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=float, default=20.0, help="flow time of each run")
    parser.add_argument("--figure", type=Path, default=Path("minibatch_flow.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from threads
    x, y = data()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    print(f"Loss of all data after the flow time {options.time:g}, the mean of the last tenth of the steps\n")
    print(f"{'lr':>20s} " + " ".join(f"{lr:10g}" for lr in RATES))
    for name, (color, dashes) in zip(NAMES, STYLES, strict=True):
        runs = {lr: train(name, lr, options.time, x, y) for lr in RATES}
        ends = [last_tenth(losses) for _, losses in runs.values()]
        print(f"{name:>20s} " + " ".join(f"{end:10.4g}" for end in ends))
        left.semilogx(RATES, ends, color=color, linestyle=dashes, marker="o", label=name)
        right.loglog(runs[SHOWN][0][1:], runs[SHOWN][1][1:], color=color, linestyle=dashes, label=name)
    left.set(xlabel="learning rate: the flow time of a step", ylabel=f"loss of all data at t ≈ {options.time:g}")
    right.set(xlabel="flow time", ylabel="loss of all data", title=f"lr = {SHOWN:g}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(options.figure, dpi=120)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
