"""How far along the gradient flow, and how far from it, within a fixed time? The comparison of arXiv 2301.10638.

Students learn a teacher with four softplus neurons from 10,000 Gaussian inputs. From the same parameters start, with the same
compiled derivatives: integrators of this package; torchdiffeq's dopri5, scipy's LSODA, and CVODE with GMRES (if scikit-sundae
is installed), all with the same tolerance; torch's Adam and gradient descent with the paper's learning rates and a larger
one; and Adam with autograd, the loop that everybody writes. Seconds are those of the processor, so that a busy machine matters
little. Printed: medians over the seeds. Saved: a figure.

    python examples/paper_ode_comparison.py [--parameters 601] [--seconds 60] [--seeds 10] [--rtol 1e-6] [--full]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from torch_gradflow import FlowReport, ModuleObjective, integrate, trajectory_distance
from torch_gradflow.flow.stopping import Check, StoppingRule

try:
    from sksundae import cvode
except ImportError:
    cvode = None

T_END = 1e10
# For each number of parameters: inputs, hidden neurons, first seed, seconds here, and seconds in the paper.
SIZES = {33: (2, 8, 111, 2.5, 20.0), 601: (4, 100, 101, 20.0, 120.0)}


class Problem:
    """Teacher, student and data; the loss is the mean square."""

    def __init__(self, n_inputs: int, n_hidden: int, n_samples: int, seed: int) -> None:
        torch.manual_seed(seed)
        layers = ((nn.Linear(n_inputs, width), nn.Softplus(), nn.Linear(width, 1)) for width in (4, n_hidden))
        teacher, self.student = (nn.Sequential(*three).double() for three in layers)
        for parameter in teacher.parameters():
            nn.init.normal_(parameter)
        for parameter in self.student.parameters():
            nn.init.xavier_normal_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
        self.x = torch.randn(n_samples, n_inputs, dtype=torch.float64)
        self.y = teacher(self.x).detach()
        self.objective = ModuleObjective(self.student, mse_loss, (self.x, self.y))
        self.theta0 = parameters_to_vector(self.student.parameters()).detach()


@dataclass(frozen=True)
class CpuTime(StoppingRule):
    """Stop when this process has used so many seconds of the processor: a stopping rule of one's own."""

    limit: float

    def begin(self) -> Check:
        return lambda report: f"Stopped by {self}." if time.process_time() > self.limit else None


@dataclass(frozen=True)
class Run:
    """A trajectory, and the seconds after which each of its samples was there."""

    t: Tensor
    theta: Tensor
    seconds: Sequence[float] = ()


Method = Callable[[Problem, float, float], Run]


def flow(method: str) -> Method:
    """An integrator by its name."""

    def run(problem: Problem, seconds: float, rtol: float) -> Run:
        began, seen = time.process_time(), [(0.0, 0.0)]

        def look(report: FlowReport) -> None:
            seen.append((report.t, time.process_time() - began))

        stop, span = CpuTime(began + seconds), (0.0, T_END)
        found = integrate(problem.objective, problem.theta0, span, method=method, rtol=rtol, stop=stop, progress=look)
        seen.append((float(found.t[-1]), time.process_time() - began))
        return Run(found.t, found.theta, np.interp(found.t, *zip(*seen, strict=True)).tolist())

    return run


def cvode_gmres(problem: Problem, seconds: float, rtol: float) -> Run:
    """SUNDIALS' CVODE: BDF, with GMRES on exact Hessian–vector products."""

    def field(t: float, y: np.ndarray, slope: np.ndarray) -> None:
        slope[:] = -problem.objective.loss_and_gradient(torch.tensor(y))[1]

    def product(t: float, y: np.ndarray, slope: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        out[:] = -problem.objective.hvp(torch.tensor(y), torch.tensor(v))

    def points() -> Iterator[tuple[float, Tensor]]:
        krylov = {"linsolver": "gmres", "krylov_dim": 30, "jactimes": cvode.CVODEJacTimes(None, product)}
        solver = cvode.CVODE(field, method="BDF", rtol=rtol, atol=rtol / 100, **krylov)
        found = solver.init_step(0.0, problem.theta0.numpy())
        while found.success:
            yield float(found.t), torch.tensor(found.y)
            if found.t >= T_END:
                return
            found = solver.step(T_END, method="onestep", tstop=T_END)

    return collected(points(), seconds)


def descent(kind: type[torch.optim.Optimizer], rate: float, *, autograd: bool = False) -> Method:
    """An optimizer of torch with the compiled gradient, or in the usual loop; its time is rate × steps."""

    def run(problem: Problem, seconds: float, rtol: float) -> Run:
        model, theta = copy.deepcopy(problem.student), nn.Parameter(problem.theta0.clone())
        parameters = list(model.parameters()) if autograd else [theta]
        optimizer = kind(parameters, lr=rate)

        def points() -> Iterator[tuple[float, Tensor]]:
            for step in itertools.count():
                yield step * rate, parameters_to_vector(parameters).detach()
                optimizer.zero_grad()
                if autograd:
                    mse_loss(model(problem.x), problem.y).backward()
                else:
                    theta.grad = problem.objective.loss_and_gradient(theta.detach())[1]
                optimizer.step()

        return collected(points(), seconds)

    return run


def collected(points: Iterator[tuple[float, Tensor]], seconds: float) -> Run:
    """What comes within the time and is finite: about 20 points per decade, and the last one."""
    began, kept = time.process_time(), []
    for t, theta in itertools.takewhile(lambda point: bool(point[1].isfinite().all()), points):
        if len(kept) > 1 and kept[-1][0] < 10**0.05 * kept[-2][0]:
            kept.pop()
        kept.append((t, theta, time.process_time() - began))
        if kept[-1][2] > seconds:
            break
    t, theta, elapsed = zip(*kept, strict=True)
    return Run(torch.tensor(t, dtype=torch.float64), torch.stack(theta), elapsed)


# With color, line and marker.
METHODS: dict[str, tuple[Method, str, str, str]] = {
    "auto": (flow("auto"), "tab:blue", "-", "o"),
    "bdf": (flow("bdf"), "tab:cyan", "-", "s"),
    "LSODA": (flow("LSODA"), "tab:green", "-", "o"),
    "CVODE, GMRES": (cvode_gmres, "tab:purple", "-", "o"),
    "dopri5": (flow("dopri5"), "tab:red", "-", "o"),
    "Adam 1e-2": (descent(torch.optim.Adam, 1e-2), "tab:orange", "-", "o"),
    "Adam 1e-3": (descent(torch.optim.Adam, 1e-3), "tab:orange", "--", "s"),
    "Adam 1e-4": (descent(torch.optim.Adam, 1e-4), "tab:orange", ":", "^"),
    "Adam 1e-3, autograd": (descent(torch.optim.Adam, 1e-3, autograd=True), "tab:brown", "--", "s"),
    "descent 1e-1": (descent(torch.optim.SGD, 1e-1), "0.5", "-", "o"),
    "descent 1e-2": (descent(torch.optim.SGD, 1e-2), "0.5", "--", "s"),
    "descent 1e-3": (descent(torch.optim.SGD, 1e-3), "0.5", ":", "^"),
}
if cvode is None:
    del METHODS["CVODE, GMRES"]


def compare(problem: Problem, seconds: float, rtol: float, axes: Sequence[Axes], bold: bool) -> dict[str, list[float]]:
    """Loss, gradient, t_m, d_m and seconds of each method on one problem, which go into the figure too."""
    exact = integrate(problem.objective, problem.theta0, (0.0, T_END), method="bdf", rtol=1e-9, dense_output=True)
    runs = {name: method(problem, seconds, rtol) for name, (method, *_) in METHODS.items()}
    # Densely, and at the runs' own times: else d_m would be what lies between the reference's samples. Rounded, as samples
    # that differ by rounding alone would end the search for the nearest one.
    grid = [0.0, *np.geomspace(1e-6, T_END, 20_000).tolist(), *itertools.chain(*(run.t.tolist() for run in runs.values()))]
    times = sorted({min(float(f"{t:.9g}"), exact.path.times[-1]) for t in grid})
    reference = Run(torch.tensor(times, dtype=torch.float64), torch.stack([exact.path(t) for t in times]))
    rows = {}
    for name, run in runs.items():
        loss = [float(problem.objective.loss_and_gradient(theta)[0]) for theta in run.theta]
        gradient = float(problem.objective.loss_and_gradient(run.theta[-1])[1].abs().max())
        near = trajectory_distance(run, reference)
        rows[name] = [loss[-1], gradient, near.progress, near.distance, run.seconds[-1]]
        _, color, line, marker = METHODS[name]
        curve = {"color": color, "linestyle": line, "linewidth": 1.8 if bold else 0.5}
        axes[0].loglog(run.seconds[1:], loss[1:], **curve)
        axes[1].loglog(near.matched_times[1:], near.distances[1:], **curve)
        axes[2].loglog(near.distance, near.progress, marker, color=color, markersize=7, alpha=0.7, markeredgewidth=0)
    return rows


def main() -> None:
    """Run everything, print a table for each problem, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", choices=SIZES, default=[33])
    parser.add_argument("--seconds", type=float, help="for each method and seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--full", action="store_true", help="both problems, ten seeds, the paper's times: six hours")
    parser.add_argument("--figure", type=Path, default=Path("paper_ode_comparison.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, n_seeds = (list(SIZES), 10) if options.full else (options.parameters, options.seeds)
    figure, axes = plt.subplots(len(sizes), 3, figsize=(15, 4.4 * len(sizes) + 0.6), layout="constrained", squeeze=False)
    for size, row in zip(sizes, axes, strict=True):
        n_inputs, n_hidden, first, short, full = SIZES[size]
        seconds = options.seconds or (full if options.full else short)
        for method, *_ in METHODS.values():  # compiles what is compiled on first use
            method(Problem(n_inputs, n_hidden, options.samples, 0), 0.1, options.rtol)
        seeds = range(first, first + n_seeds)
        problems = (Problem(n_inputs, n_hidden, options.samples, seed) for seed in seeds)
        found = [compare(problem, seconds, options.rtol, row, i == 0) for i, problem in enumerate(problems)]
        print(f"\n{size} parameters, {n_seeds} seeds, at most {seconds:g} s for each method, rtol = {options.rtol:g}; medians")
        print(f"{'':20s} {'loss':>8s} {'|gradient|':>10s} {'t_m':>8s} {'d_m':>8s} {'seconds':>8s}")
        for name in METHODS:
            loss, gradient, t_m, d_m, used = map(statistics.median, zip(*(each[name] for each in found), strict=True))
            print(f"{name:20s} {loss:8.1e} {gradient:10.1e} {t_m:8.1e} {d_m:8.1e} {used:8.2f}")
        row[0].set(title=f"{size} parameters: loss (bold: seed {first})", xlabel="seconds of one core", ylabel="loss")
        row[1].set(
            title="distance to the exact flow", xlabel="flow time t there", ylabel="‖θ − θ(t)‖² / 2P", ylim=(1e-18, None)
        )
        row[2].set(title="all seeds: best at the top left", xlabel="mean distance d_m", ylabel="progress t_m")
        for axis in row:
            axis.grid(alpha=0.3)
    for name, (_, color, line, marker) in METHODS.items():
        axes[0, 0].plot([], [], color=color, linestyle=line, marker=marker, markeredgewidth=0, linewidth=1.8, label=name)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(options.figure, dpi=110)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
