"""What a step of the Langevin methods costs besides the gradient, in units of a step of torch.optim.Adam(foreach=True).

Four parameter tensors in float32 (a network with one hidden layer) of about 1e3, 1e5 and 1e7 numbers, with gradients that stay
the same. All candidates run interleaved in one process; medians of the rounds. Drawing the random numbers that a method needs
is measured beside it, and what is left besides.

    python benchmarks/langevin.py [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _environment import environment
from torch import nn

from torch_gradflow import LOL, SGLD, AdLaLa, CCAdL, Langevin

RESULTS = Path(__file__).parent / "results" / "langevin.json"
# Width of the hidden layer of a network 100-width-10, and steps per measurement.
SIZES = {"1e3": (9, 200), "1e5": (900, 50), "1e7": (90_000, 1)}
METHODS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, foreach=True),
    "SGLD": SGLD,
    "Langevin": Langevin,
    "LOL": LOL,
    "AdLaLa": AdLaLa,
    "CCAdL": CCAdL,
}
# How often each tensor (the first layer's two, the second's) is drawn per step.
DRAWS = {"Adam": (0, 0), "SGLD": (1, 1), "Langevin": (1, 1), "LOL": (1, 1), "AdLaLa": (2, 1), "CCAdL": (2, 2)}


def parameters(width: int) -> list[nn.Parameter]:
    """Of a network 100-width-10, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, width), nn.Linear(width, 10))
    params = list(model.parameters())
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def draw(params: list[nn.Parameter], times: tuple[int, int]) -> None:
    """Random numbers as a step needs them."""
    for i, p in enumerate(params):
        for _ in range(times[i // 2]):
            torch.randn(p.shape, dtype=p.dtype)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Per call."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def measure(width: int, repeats: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of seconds per step, and of those for the random numbers."""
    candidates: dict[tuple[str, str], Callable[[], object]] = {}
    for name, make in METHODS.items():
        params = parameters(width)
        candidates[name, "step"] = make(params).step
        candidates[name, "noise"] = lambda params=params, name=name: draw(params, DRAWS[name])
    found: dict[tuple[str, str], list[float]] = {key: [] for key in candidates}
    for call in candidates.values():
        seconds(call, 3)
    for _ in range(rounds):
        for key, call in candidates.items():
            found[key].append(seconds(call, repeats))
    return {name: {what: statistics.median(found[name, what]) for what in ("step", "noise")} for name in METHODS}


def main() -> None:
    """Measure, print the table, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {size: measure(*setting, options.rounds) for size, setting in SIZES.items()}
    print(f"{'':10s}" + "".join(f"{size + ' parameters':>34s}" for size in SIZES))
    print(f"{'':10s}" + f"{'step':>14s}{'noise':>10s}{'rest':>10s}" * len(SIZES))
    for name in METHODS:
        cells = ""
        for size in SIZES:
            step, noise = (results[size][name][what] / results[size]["Adam"]["step"] for what in ("step", "noise"))
            cells += f"{step:14.2f}{noise:10.2f}{step - noise:10.2f}"
        print(f"{name:10s}{cells}")
    about = environment(("torch",), options.threads)
    RESULTS.write_text(json.dumps({"environment": about, "seconds": results}, indent=2) + "\n")
    print(f"\nIn units of a step of Adam; seconds in {RESULTS}")


if __name__ == "__main__":
    main()
