"""What one step costs under each trainer, relative to the bare closure: zero_grad, forward pass and backward pass.

The recipes of ``examples/loops``, interleaved in one process, each with few and with many steps: the difference is what the
further steps took, without setting up. All integrate the same flow; what a trainer takes beyond the plain loop with a
closure is its own, and that of what it makes of the optimizer. Medians of the rounds.

    python benchmarks/loops.py [--rounds 7] [--steps 100]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _environment import environment, settle
from torch.nn.functional import mse_loss

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "loops.json"
RECIPES = (
    "plain_closure",
    "plain",
    "with_lightning",
    "with_fabric",
    "with_accelerate",
    "with_ignite",
    "with_skorch",
    "with_transformers",
)
PACKAGES = ("torch-gradflow", "torch", "lightning", "accelerate", "pytorch-ignite", "skorch", "transformers")
FEW = 10
CLOSURES = 500


def closure_seconds() -> float:
    """Of one bare closure, with SGD's zero_grad."""
    regression = importlib.import_module("regression")
    model, (x, y) = regression.network(), regression.data()
    optimizer = torch.optim.SGD(model.parameters())
    began = time.perf_counter()
    for _ in range(CLOSURES):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
    return (time.perf_counter() - began) / CLOSURES


def step_seconds(train: Callable[[int], float], n_steps: int) -> float:
    """Of one of the steps from the tenth on."""
    seconds = []
    for n in (FEW, n_steps):
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(n)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (n_steps - FEW)


def main() -> None:
    """Measure, print and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    settle(1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.path.insert(0, str(HERE.parent / "examples" / "loops"))
    trains = {name: importlib.import_module(name).train for name in RECIPES}
    for train in trains.values():
        step_seconds(train, FEW + 1)
    rounds: dict[str, list[float]] = {"closure": [], **{name: [] for name in RECIPES}}
    for _ in range(options.rounds):
        rounds["closure"].append(closure_seconds())
        for name, train in trains.items():
            rounds[name].append(step_seconds(train, options.steps))
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    unit, plain = seconds["closure"], seconds["plain_closure"]
    print(f"bare closure: {1e6 * unit:.0f} microseconds\n")
    print(f"{'':18s} {'step / closure':>15s} {'beyond the plain loop, ms':>27s}")
    found = {}
    for name in RECIPES:
        found[name] = {"step / closure": seconds[name] / unit, "beyond the plain loop, ms": 1e3 * (seconds[name] - plain)}
        print(f"{name:18s} {found[name]['step / closure']:15.1f} {found[name]['beyond the plain loop, ms']:27.2f}")
    more = {"rounds": options.rounds, "steps": options.steps, "closure (microseconds)": 1e6 * unit}
    kept = {"environment": environment(PACKAGES, 1, **more), "results": found}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"\nKept in {RESULTS}")


if __name__ == "__main__":
    main()
