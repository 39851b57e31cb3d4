"""How low does the loss come within a fixed time? The comparison of final losses of arXiv 2301.10638.

Students with four times as many softplus neurons as their teacher, so that zero loss can be reached, learn from 10,000
Gaussian inputs. From the same parameters start, with the same compiled derivatives: the gradient flow; this package's
minimisers; those of scipy and, if it is installed, of NLopt; and Adam. Seconds are those of the processor. Printed: medians
and ranges of the final losses over the seeds. Saved: a figure.

    python examples/paper_final_loss.py [--parameters 33 1153] [--seconds 20] [--seeds 10] [--full]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from torch_gradflow import ModuleObjective, integrate, minimize
from torch_gradflow.flow.stopping import Check, StoppingRule

# For each number of parameters: inputs (and neurons of the teacher), neurons of the student, seconds here and in the paper.
SIZES = {33: (2, 8, 5.0, 360.0), 1153: (16, 64, 40.0, 360.0)}
# What counts as no loss at all: the paper's smallest.
LEAST = 2e-32


def problem(n_inputs: int, n_hidden: int, n_samples: int, seed: int) -> tuple[ModuleObjective, Tensor]:
    """Mean squared error on a teacher's targets, and the student's parameters at the start."""
    torch.manual_seed(seed)
    layers = ((nn.Linear(n_inputs, width), nn.Softplus(), nn.Linear(width, 1)) for width in (n_inputs, n_hidden))
    teacher, student = (nn.Sequential(*three).double() for three in layers)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    for parameter in student.parameters():
        nn.init.xavier_normal_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
    x = torch.randn(n_samples, n_inputs, dtype=torch.float64)
    return ModuleObjective(student, mse_loss, (x, teacher(x).detach())), parameters_to_vector(student.parameters()).detach()


@dataclass
class Clock(StoppingRule):
    """Seconds of the processor since now, and the least loss that was seen by then; at most so many times."""

    limit: float
    most: float = math.inf

    def __post_init__(self) -> None:
        self.began, self.curve = time.process_time(), [(0.0, math.inf)]

    def see(self, loss: float) -> bool:
        """Whether time is up."""
        seconds = time.process_time() - self.began
        self.curve.append((seconds, min(loss, self.curve[-1][1])))
        return seconds > self.limit or len(self.curve) > self.most

    def begin(self) -> Check:
        """As a stopping rule of a flow."""
        return lambda report: "Time is up." if self.see(report.loss) else None

    def look(self, report: Any) -> None:
        """As the progress display of a minimiser, which an interruption ends."""
        if self.see(report.loss):
            raise KeyboardInterrupt


Method = Callable[[ModuleObjective, Tensor, Clock], None]


def flow(objective: ModuleObjective, theta: Tensor, clock: Clock) -> None:
    """The gradient flow, as far as it comes."""
    integrate(objective, theta, (0.0, 1e12), rtol=1e-5, stop=clock)


def minimiser(name: str) -> Method:
    """One of ``minimize``, down to rounding."""

    def run(objective: ModuleObjective, theta: Tensor, clock: Clock) -> None:
        minimize(objective, theta, method=name, gtol=1e-16, max_iter=10**7, certificate=False, progress=clock.look)

    return run


def adam(objective: ModuleObjective, theta: Tensor, clock: Clock) -> None:
    """torch's Adam with the paper's learning rate and the compiled gradient."""
    parameter = nn.Parameter(theta.clone())
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    loss = math.inf
    while not clock.see(loss):
        found, parameter.grad = objective.loss_and_gradient(parameter.detach())
        loss = float(found)
        optimizer.step()


METHODS: dict[str, Method] = {
    "flow": flow,
    "auto": minimiser("auto"),
    "levenberg-marquardt": minimiser("levenberg-marquardt"),
    "trust-region": minimiser("trust-region"),
    "bfgs": minimiser("bfgs"),
    "lbfgs": minimiser("lbfgs"),
    "scipy:SLSQP": minimiser("scipy:SLSQP"),
    "scipy:BFGS": minimiser("scipy:BFGS"),
    "scipy:L-BFGS-B": minimiser("scipy:L-BFGS-B"),
    "nlopt:LD_SLSQP": minimiser("nlopt:LD_SLSQP"),
    "Adam 1e-3": adam,
}
if importlib.util.find_spec("nlopt") is None:
    del METHODS["nlopt:LD_SLSQP"]
COLORS = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))


def main() -> None:
    """Run everything, print a table for each problem, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", choices=SIZES, default=[33])
    parser.add_argument("--seconds", type=float, help="for each method and seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--full", action="store_true", help="both problems, ten seeds, the paper's times: 20 hours")
    parser.add_argument("--figure", type=Path, default=Path("paper_final_loss.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, n_seeds = (list(SIZES), 10) if options.full else (options.parameters, options.seeds)
    for method in METHODS.values():  # compiles what is compiled on first use
        method(*problem(*SIZES[33][:2], options.samples, 0), Clock(60.0, most=300))
    figure, axes = plt.subplots(len(sizes), 2, figsize=(13, 4.6 * len(sizes)), layout="constrained", squeeze=False)
    for size, (curves, ends) in zip(sizes, axes, strict=True):
        n_inputs, n_hidden, short, full = SIZES[size]
        seconds = options.seconds or (full if options.full else short)
        losses: dict[str, list[float]] = {name: [] for name in METHODS}
        for seed in range(1, n_seeds + 1):
            for name, method in METHODS.items():
                clock = Clock(seconds)
                method(*problem(n_inputs, n_hidden, options.samples, seed), clock)
                losses[name].append(max(clock.curve[-1][1], LEAST))
                style = {"color": COLORS[name], "linewidth": 1.8 if seed == 1 else 0.5, "label": name if seed == 1 else None}
                curves.loglog(*zip(*clock.curve[1:], strict=True), **style)
                ends.semilogx(losses[name][-1], list(METHODS).index(name), "o", color=COLORS[name], alpha=0.7)
        print(f"\n{size} parameters, {n_seeds} seeds, at most {seconds:g} s for each method: final losses")
        print(f"{'':20s} {'median':>8s} {'least':>8s} {'largest':>8s}")
        for name, found in losses.items():
            print(f"{name:20s} {statistics.median(found):8.1e} {min(found):8.1e} {max(found):8.1e}")
        curves.set(title=f"{size} parameters (bold: seed 1)", xlabel="seconds of one core", ylabel="least loss so far")
        ends.set(title="final loss, all seeds", xlabel="loss", yticks=range(len(METHODS)), yticklabels=list(METHODS))
        ends.invert_yaxis()
        curves.legend(fontsize="x-small", loc="lower left")
        for axis in (curves, ends):
            axis.grid(alpha=0.3)
    figure.savefig(options.figure, dpi=110)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
