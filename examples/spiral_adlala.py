"""Spirals: partitioned Langevin methods beside Adam and SGD in the same training loop (arXiv 1908.11843).

Two spirals of four turns each, 500 training samples, 1,000 test samples, a network 2-100(relu)-1 in batches of 25: a task on
which Adam finds boundaries that miss the turns. AdLaLa moves the first layer with adaptive Langevin dynamics, and the second
one with Langevin dynamics; LOL takes Langevin and overdamped Langevin dynamics. Then the handwritten digits that scikit-learn
ships, on which AdLaLa does not win. Printed: tables of the test accuracy for each seed. Saved: a figure with the accuracy
against epochs, and the decision boundaries of the first seed.

The networks of all seeds are trained side by side in one loop; each has its own data, batches and parameters.

    python examples/spiral_adlala.py [--seeds 5] [--epochs 4000] [--quick] [--figure spiral_adlala.png]
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from torch_gradflow import LOL, AdLaLa, Langevin

Layers = Sequence[Iterable[Tensor]]
Make = Callable[[Layers], torch.optim.Optimizer]


def groups(layers: Layers) -> list[dict[str, Iterable[Tensor]]]:
    """One parameter group per layer."""
    return [{"params": layer} for layer in layers]


# The settings of the paper's authors; SGD and overdamped steps are as long as Langevin's.
SPIRAL_METHODS: dict[str, Make] = {
    "Adam": lambda layers: torch.optim.Adam(groups(layers), lr=0.005),
    "SGD": lambda layers: torch.optim.SGD(groups(layers), lr=0.25),
    "Langevin": lambda layers: Langevin(groups(layers), lr=0.25, temperature=1e-4, friction=0.1),
    "LOL": lambda layers: LOL(groups(layers), lr=0.25, temperature=1e-4, friction=0.1),
    "AdLaLa": lambda layers: AdLaLa(groups(layers), lr=0.25, temperature=1e-4, friction=0.1, noise=1e-2, coupling=0.05),
}
# Those of a third party for MNIST.
DIGITS_METHODS: dict[str, Make] = {
    "Adam": lambda layers: torch.optim.Adam(groups(layers)),
    "AdLaLa": lambda layers: AdLaLa(
        [{"params": layers[0], "temperature": 1e-4}, {"params": layers[1], "temperature": 5e-5}],
        lr=0.1,
        friction=0.15,
        noise=0.05,
        coupling=0.05,
    ),
}


@dataclass(frozen=True)
class Task:
    """Data for each seed, shapes ``(seeds, samples, ...)``, and what to do with them."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    n_hidden: int
    n_out: int
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]


class Linears(nn.Module):
    """The linear layers of all seeds, each on its own samples.

    Args:
        layers: One per seed.
        apart: Keep each seed's weights and biases as tensors of their own, for methods that do not move each number for
            itself: the adaptive thermostat has one friction per tensor.
    """

    def __init__(self, layers: Sequence[nn.Linear], apart: bool) -> None:
        super().__init__()
        weights, biases = (torch.stack([getattr(a, name).detach() for a in layers]) for name in ("weight", "bias"))
        self.weights = nn.ParameterList(w.clone() for w in weights.split(1 if apart else len(layers)))
        self.biases = nn.ParameterList(b.clone() for b in biases.split(1 if apart else len(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(seeds, samples, n_in)`` to ``(seeds, samples, n_out)``."""
        return torch.baddbmm(torch.cat(list(self.biases))[:, None], x, torch.cat(list(self.weights)).mT)


def networks(task: Task, apart: bool) -> nn.Sequential:
    """One network with a hidden relu layer for each seed, at torch's initial parameters."""
    hidden, out = [], []
    for seed in range(len(task.y)):
        torch.manual_seed(seed)
        hidden.append(nn.Linear(task.x.shape[2], task.n_hidden))
        out.append(nn.Linear(task.n_hidden, task.n_out))
    return nn.Sequential(Linears(hidden, apart), nn.ReLU(), Linears(out, apart=False))


def spiral(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on two spirals of four turns, with a little noise, and which of them each is on."""
    t = torch.rand(n, generator=generator).sqrt()
    y = (torch.arange(n) % 2).float()
    angle = 8.0 * math.pi * t
    x = 2.0 * t[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) * (1.0 - 2.0 * y)[:, None]
    return x + 0.02 * torch.randn(n, 2, generator=generator), y


def spirals(n_seeds: int) -> Task:
    """The task of the paper."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(n_seeds)]
    x, y = (torch.stack(part) for part in zip(*(spiral(500, g) for g in generators), strict=True))
    x_test, y_test = (torch.stack(part) for part in zip(*(spiral(1000, g) for g in generators), strict=True))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return n_seeds * binary_cross_entropy_with_logits(z[..., 0], y)  # the sum over the seeds

    return Task(x, y, x_test, y_test, 100, 1, 25, loss, lambda z, y: (z[..., 0] > 0) == (y > 0.5))


def digits(n_seeds: int) -> Task:
    """1797 images of 8 x 8 pixels, 1200 of them for training."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16.0, torch.tensor(data.target)
    orders = torch.stack([torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) for seed in range(n_seeds)])
    train, test = orders[:, :1200], orders[:, 1200:]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return n_seeds * cross_entropy(z.flatten(0, 1), y.flatten())

    return Task(x[train], y[train], x[test], y[test], 100, 10, 100, loss, lambda z, y: z.argmax(-1) == y)


@dataclass(frozen=True)
class Run:
    """The accuracies on the test samples, shape ``(records, seeds)``, at some epochs, and the networks at a few of them."""

    epochs: list[int]
    accuracy: Tensor
    networks: dict[int, nn.Sequential]


def train(task: Task, make: Make, n_epochs: int, keep: Sequence[int], apart: bool) -> Run:
    """The training loop, the same for every method."""
    n_seeds, n_samples = task.y.shape
    model = networks(task, apart)
    optimizer = make([model[0].parameters(), model[2].parameters()])
    torch.manual_seed(n_seeds)
    every, rows = max(1, n_epochs // 80), torch.arange(n_seeds)[:, None]
    epochs, accuracies, kept = [], [], {}
    for epoch in range(1, n_epochs + 1):
        order = torch.rand(n_seeds, n_samples).argsort(1)
        batches = zip(task.x[rows, order].split(task.batch, 1), task.y[rows, order].split(task.batch, 1), strict=True)
        for x, y in batches:
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            optimizer.step()
        if epoch % every == 0 or epoch == n_epochs:
            with torch.no_grad():
                right = task.correct(model(task.x_test), task.y_test)
            epochs.append(epoch)
            accuracies.append(100.0 * right.float().mean(1))
        if epoch in keep:
            kept[epoch] = copy.deepcopy(model)
    return Run(epochs, torch.stack(accuracies), kept)


def compare(title: str, task: Task, methods: dict[str, Make], n_epochs: int, keep: Sequence[int] = ()) -> dict[str, Run]:
    """Train with every method, print the table."""
    n_seeds = len(task.y)
    print(f"\n{title}: accuracy on test samples in %, mean of the last eighth of {n_epochs} epochs")
    print(f"{'':10s}" + "".join(f"  seed {seed}" for seed in range(n_seeds)) + "    mean  seconds")
    runs = {}
    for name, make in methods.items():
        began = time.perf_counter()
        runs[name] = train(task, make, n_epochs, keep, apart=name == "AdLaLa")
        found = last(runs[name])
        cells = "".join(f"{value:8.1f}" for value in [*found.tolist(), float(found.mean())])
        print(f"{name:10s}{cells} {time.perf_counter() - began:8.0f}")
    lead = last(runs["AdLaLa"]) - last(runs["Adam"])
    n_ahead, points = int((lead > 0).sum()), float(lead.mean())
    print(f"AdLaLa is ahead of Adam for {n_ahead} of {n_seeds} seeds, by {points:.1f} points in the mean.")
    return runs


def last(run: Run) -> Tensor:
    """The accuracy of each seed, averaged over the last eighth of the records, as it fluctuates from batch to batch."""
    return run.accuracy[-max(1, len(run.accuracy) // 8) :].mean(0)


def draw_accuracy(axis: Axes, runs: dict[str, Run]) -> None:
    """Means over the seeds, with all seeds between the edges of the bands."""
    for name, run in runs.items():
        (line,) = axis.plot(run.epochs, run.accuracy.mean(1), label=name)
        axis.fill_between(run.epochs, run.accuracy.amin(1), run.accuracy.amax(1), alpha=0.15, color=line.get_color())
    axis.set_xlabel("epoch")
    axis.set_ylabel("test accuracy in %")
    axis.grid(alpha=0.3)
    axis.legend(ncols=len(runs), loc="lower right")


def draw_boundary(axis: Axes, network: nn.Module, task: Task) -> None:
    """What the first seed's network makes of the plane, with its training samples."""
    ticks = torch.linspace(-2.2, 2.2, 221)
    plane = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        p = network(plane.expand(len(task.y), -1, -1))[0, :, 0].sigmoid().view(len(ticks), len(ticks)).T
    axis.contourf(ticks, ticks, p, levels=10, cmap="RdBu", alpha=0.6, vmin=0.0, vmax=1.0)
    axis.scatter(*task.x[0].T, c=task.y[0], cmap="RdBu", s=4, edgecolors="black", linewidths=0.2)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_aspect("equal")


def draw(runs: dict[str, Run], task: Task, epochs: Sequence[int], path: Path) -> None:
    """The figure: accuracies above, decision boundaries at some epochs below."""
    figure = plt.figure(figsize=(12, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 3))
    draw_accuracy(above.subplots(), runs)
    axes = below.subplots(len(epochs), len(runs))
    for column, (name, run) in enumerate(runs.items()):
        for row, epoch in enumerate(epochs):
            draw_boundary(axes[row, column], run.networks[epoch], task)
            axes[row, column].set_title(f"{name}, epoch {epoch}")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run everything, print the tables, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4000)
    parser.add_argument("--quick", action="store_true", help="two seeds and a few epochs, only to see that it runs")
    parser.add_argument("--figure", type=Path, default=Path("spiral_adlala.png"))
    options = parser.parse_args()
    n_seeds, n_epochs, n_digits = (2, 4, 2) if options.quick else (options.seeds, options.epochs, 100)
    torch.set_num_threads(1)  # networks this small gain nothing from threads
    early = max(1, n_epochs // 8)
    task = spirals(n_seeds)
    runs = compare("Spirals", task, SPIRAL_METHODS, n_epochs, (early, n_epochs))
    compare("Digits", digits(n_seeds), DIGITS_METHODS, n_digits)

    draw(runs, task, (early, n_epochs), options.figure)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
