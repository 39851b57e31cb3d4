"""Many flows of a small network: one after the other, in lockstep, and in a pool of processes.

Networks of 17 and 33 parameters (float64, mean squared error), method "bdf" at its default tolerance to t = 1e3, from random
starts. The ways are interleaved; the least of the rounds counts, as what else runs on a machine only adds. Runs one after the
other take as long whatever their number, so that no more than 8 are done; ratios are of times per step. Processes are measured
on request, for the largest number of starts only, with their start of some seconds.

    python benchmarks/ensembles.py [--rounds 2] [--processes]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _environment import environment, settle
from torch import Tensor, nn

from torch_gradflow import ModuleObjective, integrate_many

RESULTS = Path(__file__).parent / "results" / "ensembles.json"
NETWORKS = {"2-4-1 softplus": (4, nn.Softplus), "2-8-1 tanh": (8, nn.Tanh)}
SAMPLES = (100, 1000)
STARTS = (1, 8, 64, 256)
T_END = 1e3
# So many are done one after the other.
FEW = 8
Way = Literal["serial", "batched", "processes"]


def problem(width: int, activation: type[nn.Module], n_samples: int) -> ModuleObjective:
    """A network that learns a random one of four softplus neurons."""
    rng = np.random.default_rng(1)
    x, w, b = rng.standard_normal((n_samples, 2)), rng.standard_normal((4, 2)), rng.standard_normal(4)
    y = np.logaddexp(0, x @ w.T + b) @ rng.standard_normal((4, 1))
    model = nn.Sequential(nn.Linear(2, width), activation(), nn.Linear(width, 1)).double()
    return ModuleObjective(model, nn.functional.mse_loss, (torch.from_numpy(x), torch.from_numpy(y)))


def seconds(objective: ModuleObjective, points: Tensor, way: Way) -> tuple[float, list[int]]:
    """For all runs; and the steps of each."""
    began = time.perf_counter()
    found = integrate_many(objective, points, (0.0, T_END), method="bdf", executor=way)
    taken = time.perf_counter() - began
    assert not found.failed, found.message
    return taken, [solution.n_accepted + solution.n_rejected for solution in found]


def compare(objective: ModuleObjective, n_starts: int, rounds: int, processes: bool) -> dict[str, Any]:
    """Times of each way, and ratios."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(n_starts, objective.n_parameters, generator=generator, dtype=torch.float64)
    ways: list[Way] = ["serial", "batched"]
    if processes and n_starts == max(STARTS):
        ways.append("processes")
    per_step: dict[str, float] = dict.fromkeys(ways, float("inf"))
    n_steps = 0
    for _ in range(rounds):
        for way in ways:
            spent, steps = seconds(objective, points[:FEW] if way == "serial" else points, way)
            per_step[way], n_steps = min(per_step[way], spent / sum(steps)), sum(steps)
    found: dict[str, Any] = {f"{way} (µs per step)": 1e6 * per_step[way] for way in ways}
    found |= {f"{way} (ms per run)": 1e3 * per_step[way] * n_steps / n_starts for way in ways}
    return found | {f"serial / {way}": per_step["serial"] / per_step[way] for way in ways if way != "serial"}


def main() -> None:
    """Measure, print and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", action="store_true", help="a pool of processes, too, on all CPUs")
    arguments = parser.parse_args()
    if not arguments.processes:
        settle(1)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (width, activation) in NETWORKS.items():
        for n_samples in SAMPLES:
            objective = problem(width, activation, n_samples)
            seconds(objective, torch.ones(2, objective.n_parameters, dtype=torch.float64), "serial")  # compiles
            seconds(objective, torch.ones(2, objective.n_parameters, dtype=torch.float64), "batched")
            for n_starts in STARTS:
                key = f"{name}, N = {n_samples}, {n_starts} starts"
                results[key] = compare(objective, n_starts, arguments.rounds, arguments.processes)
                print(f"{key:40s}", "  ".join(f"{what} {value:8.2f}" for what, value in results[key].items()), flush=True)
    around = environment(("torch-gradflow", "torch", "numba"), 1, rounds=arguments.rounds, cpus=os.cpu_count())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": around, "results": results}, indent=2) + "\n")
    print(f"\nKept in {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


if __name__ == "__main__":
    main()
