"""One network, one data set, several optimizers, one call: a table and a figure.

The diabetes data that scikit-learn ships, a tanh network with 97 parameters in float64, weight decay, three starts.

    python examples/compare_optimizers.py [--figure compare_optimizers.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import nn

from torch_gradflow import GradientFlow, NewtonPolish, compare


def network() -> nn.Sequential:
    """97 parameters."""
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def main() -> None:
    """Train, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("compare_optimizers.png"))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from threads
    data = load_diabetes()
    x, y = torch.tensor(data.data), torch.tensor(data.target)[:, None]
    x, y = x / x.std(0), (y - y.mean()) / y.std()

    comparison = compare(
        network,
        nn.functional.mse_loss,
        (x, y),
        {
            "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
            "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
            "LBFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
            "GradientFlow": lambda p: GradientFlow(p, lr=2.5),
            "GradientFlow+NewtonPolish": (lambda p: GradientFlow(p, lr=2.5), NewtonPolish),
        },
        weight_decay=1e-2,
        n_steps=options.steps,
        seeds=(0, 1, 2),
    )
    print(comparison)
    comparison.plot().savefig(options.figure, dpi=120)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
