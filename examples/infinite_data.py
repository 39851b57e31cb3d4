"""How fast does the gradient flow on N samples become that on infinitely many? The comparison of arXiv 2301.10638.

A student with three softplus neurons learns a teacher with eight, from nine Gaussian inputs, without biases. The flow on
infinite data is that of a ``PopulationObjective``; flows on samples start at the same parameters. Printed: the squared
distance between the parameters at the end, which falls like 1/N as long as all flows choose the same minimum. Saved: a
figure.

    python examples/infinite_data.py [--samples 1000 10000 100000] [--seeds 20] [--time 1000]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from torch_gradflow import ModuleObjective, PopulationObjective, integrate

N_INPUTS, N_TEACHER, N_STUDENT = 9, 8, 3


def networks(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Student (Glorot normal) and teacher (standard normal)."""
    torch.manual_seed(seed)
    student, teacher = (
        nn.Sequential(nn.Linear(N_INPUTS, n, bias=False), nn.Softplus(), nn.Linear(n, 1, bias=False)).double()
        for n in (N_STUDENT, N_TEACHER)
    )
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    for parameter in student.parameters():
        nn.init.xavier_normal_(parameter)
    return student, teacher


def slope(sizes: list[int], distances: list[list[float]]) -> float:
    """Of the logarithm of the mean squared distance against that of N, by least squares."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor([sum(found) / len(found) for found in distances], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def main() -> None:
    """Run the flows, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--seeds", type=int, default=20, help="samples of each size")
    parser.add_argument("--network", type=int, default=34, help="seed of the parameters")
    parser.add_argument("--time", type=float, default=1000.0, help="flow time")
    parser.add_argument("--figure", type=Path, default=Path("infinite_data.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    student, teacher = networks(options.network)
    objective = PopulationObjective(student, teacher)
    theta0 = objective.initial_theta()
    times = torch.cat([torch.zeros(1), torch.logspace(-1, math.log10(options.time), 40)]).double()
    span = (0.0, options.time)

    began = time.perf_counter()
    limit = integrate(objective, theta0, span, t_eval=times, rtol=1e-7, method="bdf")
    print(f"infinite data: loss {limit.loss[0]:.6f} to {limit.loss[-1]:.6f}, {time.perf_counter() - began:.1f} s\n")
    print(f"{'N':>8s} {'squared distance':>17s} {'least':>9s} {'largest':>9s} {'seconds':>8s}")
    figure, (ends, along) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    distances = []
    for n in options.samples:
        began, paths = time.perf_counter(), []
        for seed in range(options.seeds):
            x = torch.randn(n, N_INPUTS, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
            with torch.no_grad():
                sample = ModuleObjective(student, mse_loss, (x, teacher(x)))
            paths.append(integrate(sample, theta0, span, t_eval=times, rtol=1e-7, method="bdf").theta)
        squared: Tensor = ((torch.stack(paths) - limit.theta) ** 2).sum(2)
        distances.append(squared[:, -1].tolist())
        seconds = (time.perf_counter() - began) / options.seeds
        mean, least, largest = sum(distances[-1]) / options.seeds, min(distances[-1]), max(distances[-1])
        print(f"{n:8d} {mean:17.2e} {least:9.1e} {largest:9.1e} {seconds:8.1f}")
        ends.loglog([n] * options.seeds, distances[-1], "o", color="tab:blue", alpha=0.35)
        along.loglog(times[1:], squared.mean(0)[1:], label=f"N = {n:,}")
    found = slope(options.samples, distances)
    print(f"\nThe mean squared distance falls like N to the power {found:.2f}.")
    first = sum(distances[0]) / options.seeds
    line = [first * options.samples[0] / n for n in options.samples]
    ends.loglog(options.samples, line, "--", color="black", label="proportional to 1/N")
    ends.set(xlabel="N", ylabel=f"squared distance to infinite data, t = {options.time:g}", title=f"slope {found:.2f}")
    along.set(xlabel="flow time", ylabel="mean squared distance")
    for axis in (ends, along):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(options.figure, dpi=110)
    print(f"Figure: {options.figure}")


if __name__ == "__main__":
    main()
