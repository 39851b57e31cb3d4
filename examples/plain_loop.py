"""The loop that everybody writes, twice: with Adam, and with the gradient flow. Only the optimizer's line differs.

A small tanh network in float64 learns the handwritten digits that scikit-learn ships, with weight decay in the loss, from the
same initial parameters. Printed: a table. Saved: a figure with the loss in each iteration, and where two of the weights
went, beside the true flow (another method, a tolerance 1,000 times tighter).

    python examples/plain_loop.py [--figure plain_loop.png]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torch_gradflow import GradientFlow, ModuleObjective, integrate, minimize
from torch_gradflow.objectives.regularized import Penalties, Regularized

N_STEPS = 200
LR = 2.5


def network() -> nn.Sequential:
    """610 parameters, always the same ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()


def decay(model: nn.Module) -> Tensor:
    """Weight decay as a term of the loss, so that both optimizers have the same objective."""
    return 0.005 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def train_with_adam(x: Tensor, y: Tensor) -> tuple[list[float], list[Tensor], torch.optim.Optimizer]:
    """The loop, with Adam."""
    losses, path = [], []
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(N_STEPS):
        path.append(flat(model))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + decay(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, path, optimizer


def train_with_gradient_flow(x: Tensor, y: Tensor) -> tuple[list[float], list[Tensor], torch.optim.Optimizer]:
    """The loop, with the gradient flow."""
    losses, path = [], []
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(N_STEPS):
        path.append(flat(model))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + decay(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, path, optimizer


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def objective(x: Tensor, y: Tensor) -> Regularized:
    """The same objective as a function of the flat parameter vector."""
    base = ModuleObjective(network(), nn.CrossEntropyLoss(), (x, y))
    return Regularized(base, Penalties(weight_decay=torch.full((base.n_parameters,), 0.01, dtype=base.dtype)))


def true_flow(x: Tensor, y: Tensor) -> Tensor:
    """The flow at the times at which the loop's steps begin, shape ``(N_STEPS, P)``."""
    times = [LR * k for k in range(N_STEPS)]
    return integrate(objective(x, y), flat(network()), (0.0, times[-1]), method="dopri8", rtol=1e-9, t_eval=times).theta


def main() -> None:
    """Run both loops, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("plain_loop.png"))
    figure_path = parser.parse_args().figure
    torch.set_num_threads(1)  # networks this small gain nothing from threads
    data = load_digits()
    x, y = torch.tensor(data.data[:1000]) / 16.0, torch.tensor(data.target[:1000])
    train_with_gradient_flow(x[:10], y[:10])  # the first run compiles kernels, which is no part of a step's cost
    true = true_flow(x, y)
    end = minimize(objective(x, y), true[-1], certificate=False)
    # The two weights that the flow moves furthest.
    i, j = (true[-1] - true[0]).abs().topk(2).indices.tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    right.plot(true[:, i], true[:, j], color="black", linewidth=4, alpha=0.25, label="true flow")
    print(f"{'':13s} {'loss':>10s} {'gradients':>10s} {'seconds':>8s} {'distance to the true flow / norm':>33s}")
    for name, train, color in (
        ("Adam", train_with_adam, "tab:orange"),
        ("GradientFlow", train_with_gradient_flow, "tab:blue"),
    ):
        began = time.perf_counter()
        losses, path, optimizer = train(x, y)
        seconds = time.perf_counter() - began
        way = torch.stack(path)
        off = max(float((theta - true).norm(dim=1).min() / theta.norm()) for theta in way)
        n_grad = optimizer.stats.n_grad if isinstance(optimizer, GradientFlow) else N_STEPS
        print(f"{name:13s} {losses[-1]:10.6f} {n_grad:10,d} {seconds:8.2f} {off:33.1e}")
        left.semilogy([loss - end.loss for loss in losses], color=color, label=name)
        right.plot(way[:, i], way[:, j], color=color, linewidth=1.2, marker=".", markersize=3, label=name)
    left.set_xlabel("iteration")
    left.set_ylabel("loss − that of the minimum at the end of the flow")
    right.set_xlabel(f"parameter {i}")
    right.set_ylabel(f"parameter {j}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(figure_path, dpi=120)
    print(f"\nFigure: {figure_path}")


if __name__ == "__main__":
    main()
