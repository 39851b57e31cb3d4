"""Work and precision of integrators of the gradient flow: ours and others on the same objective and the same callbacks.

All methods follow the same flows through the same times in one run, interleaved, at tolerances (rtol = atol) from loose to
tight. The error is the largest of ‖θ − reference‖/‖reference‖ over the problem's times; references are computed once and kept
in ``benchmarks/references``. Work at a target error is interpolated between tolerances, log-log; what decides there and is
short is timed three times. Costs per call are measured in the same run, and "counted cost" is the counts times these.

    python benchmarks/integrators.py [--quick] [--problems T33 digits] [--methods bdf LSODA] [--seeds 1 2] [--output FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from _environment import environment, settle
from _flows import PROBLEMS, QUICK, QUICK_TOLERANCES, Problem, Setting
from _peers import MISSING, OPTIMIZERS, PACKAGES, PEERS, Path, Peer, Task, attempt, jax_flow
from _work import OURS, Results, Row, bracket, draw, failures, goals, show_work
from torch import Tensor

from torch_gradflow import WallTime, integrate
from torch_gradflow.flow.bdf_secant import DENSE_LIMIT
from torch_gradflow.flow.methods import METHODS

HERE = File(__file__).parent
RESULTS, REFERENCES, FIGURE = (
    HERE / "results" / "integrators.json",
    HERE / "references",
    HERE.parent / "docs" / "integrators.png",
)
# A peer need not become more accurate than this part of the target error.
ENOUGH = 0.5
# Left out of a quick run.
SLOW = ("diffrax Kvaerno5", "diffrax Tsit5", "torchdiffeq bosh3", "Radau")
# Timings of what decides, if it takes less than so many seconds.
REPEATS, SHORT = 3, 2.0


@contextmanager
def counted_eigendecompositions(size: int) -> Iterator[list[int]]:
    """How many of matrices of that size torch makes meanwhile."""
    found, genuine = [0], torch.linalg.eigh

    def eigh(matrix: Tensor, *arguments: Any, **options: Any) -> Any:
        found[0] += matrix.shape[-1] == size
        return genuine(matrix, *arguments, **options)

    torch.linalg.eigh = eigh
    try:
        yield found
    finally:
        torch.linalg.eigh = genuine


def our_path(method: str, row: Row | None = None) -> Peer:
    """One of our methods as a peer; what "auto" chose goes to ``row``."""

    def run(task: Task, tolerance: float) -> Path:
        solution = integrate(
            task.objective,
            task.theta0,
            (0.0, task.times[-1]),
            method=method,
            rtol=tolerance,
            atol=tolerance,
            t_eval=task.times,
            stop=WallTime(task.seconds),
            max_evals=task.evaluations,
        )
        if row is not None:
            row.choices = [(choice.t, choice.method, choice.reason) for choice in solution.choices]
        n = int(np.isin(solution.t.numpy(), task.times).sum())
        # bdf-secant factors its matrix once per step, where that is not of low rank; within "auto" at most at those steps that
        # took no Hessian.
        by_secants = "bdf-secant" in {method, *(choice.method for choice in solution.choices)}
        steps = solution.n_accepted + solution.n_rejected - solution.n_hessian
        n_factor = max(0, steps) if by_secants and solution.theta.shape[1] <= DENSE_LIMIT else 0
        return Path(solution.theta.numpy()[:n], "" if solution.status == "t_end" else solution.message, n_factor=n_factor)

    return run


def reference_of(problem: Problem, seed: int, made: Setting) -> tuple[np.ndarray, dict[str, float]]:
    """θ at the problem's times, and how far others are from it; from the file, if it was computed before."""
    loss, gradient = made.objective.loss_and_gradient(made.theta0)
    told = repr(
        (problem.name, seed, problem.times, problem.reference, f"{float(loss):.12g}", f"{float(gradient.norm()):.12g}")
    )
    file = REFERENCES / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.npz"
    if not file.exists():
        began = time.perf_counter()
        method, *tolerances = problem.reference
        task = made.task(problem.times, 600.0, 10**7)
        tight, loose = (attempt(our_path(method), task, tolerance) for tolerance in tolerances)
        if tight.status or loose.status:
            raise RuntimeError(f"{problem.name}, seed {seed}: no reference: {tight.status or loose.status}")
        REFERENCES.mkdir(exist_ok=True)
        distance = max(relative_errors(loose.theta, tight.theta))
        seconds = time.perf_counter() - began
        radau = confirmed(task, tight.theta) if problem.confirm and seed == 1 else math.nan
        np.savez(file, theta=tight.theta, distance=distance, radau=radau, told=told)
        print(f"  reference by {method} at {tolerances[0]:g}: {seconds:.0f} s, {distance:.1e} from {tolerances[1]:g}")
    with np.load(file) as found:
        return found["theta"], {"from a looser run": float(found["distance"]), "from Radau at 1e-11": float(found["radau"])}


def confirmed(task: Task, theta: np.ndarray) -> float:
    """How far scipy's Radau is from the reference."""
    path = attempt(PEERS["Radau"], task, 1e-11)
    distance = math.nan if path.status else max(relative_errors(path.theta, theta))
    print(f"  the reference is {distance:.1e} from scipy's Radau at 1e-11 {path.status}")
    return distance


def relative_errors(theta: np.ndarray, reference: np.ndarray) -> list[float]:
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(theta, reference, strict=False)]


def costs_of(made: Setting) -> dict[str, float]:
    """Median seconds per call."""
    objective, theta = made.objective, made.theta0
    vector = torch.randn(len(theta), dtype=theta.dtype, generator=torch.Generator().manual_seed(0))
    matrix = objective.hessian(theta)
    matrix = matrix + torch.eye(len(theta), dtype=theta.dtype) * matrix.abs().sum(1).max()
    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: objective.loss_and_gradient(theta),
        "hvp": lambda: objective.hvp(theta, vector),
        "hessian": lambda: objective.hessian(theta),
        "gradient and hessian": lambda: objective.loss_gradient_hessian(theta),
        "cholesky": lambda: torch.linalg.cholesky_ex(matrix),
        "eigh": lambda: torch.linalg.eigh(matrix),
        "lu": lambda: torch.linalg.lu_factor(matrix),
    }
    return {name: median_seconds(call) for name, call in calls.items()}


def median_seconds(call: Callable[[], Any], seconds: float = 0.15) -> float:
    call()  # what is compiled at first use is compiled
    began = time.perf_counter()
    call()
    if (first := time.perf_counter() - began) > 1.0:
        return first
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < 200):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def run(row: Row, task: Task, reference: np.ndarray) -> None:
    """One repetition."""
    ours = row.method in OURS
    method = our_path(row.method, row) if ours else PEERS[row.method]
    counts = task.objective.counts
    before = asdict(counts)
    with counted_eigendecompositions(task.objective.n_parameters) as eigh:
        began = time.perf_counter()
        path = attempt(method, task, row.tolerance)
        seconds = time.perf_counter() - began
    spent = {name: value - before[name] for name, value in asdict(counts).items()}
    row.counts = {"gradient": spent["n_grad"], "hvp": spent["n_hvp"], "hessian": spent["n_hessian"]}
    if path.gradients is not None:
        row.counts["gradient"] = path.gradients
    n_factor = max(0, spent["n_hessian"] - eigh[0]) + path.n_factor
    row.counts |= {"eigh": eigh[0], "cholesky": n_factor} if ours else {"lu": path.n_factor}
    row.seconds.append(path.seconds if path.seconds is not None else seconds)
    row.errors, row.status = relative_errors(path.theta, reference), path.status


def compare(problem: Problem, seed: int, wanted: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """All methods at all tolerances, then what decides again; and what calls cost."""
    made = problem.make(seed)
    print(f"\n{problem.name}, seed {seed}: P = {made.objective.n_parameters}, {made.objective.engine}", flush=True)
    costs = costs_of(made)
    print("  " + ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in costs.items()), flush=True)
    reference, distances = reference_of(problem, seed, made)
    task = made.task(problem.times, problem.seconds, problem.evaluations)
    methods = {m: t for m, t in problem.methods.items() if m in wanted and (seed == 1 or m not in problem.few)}
    told: dict[str, Any] = {"problem": problem.name, "seed": seed, "costs": costs, "reference": distances}
    told |= {"P": made.objective.n_parameters, "engine": made.objective.engine}
    if any(method.startswith("diffrax") for method in methods):
        told["jax gradient"] = jax_flow(task).gradient_seconds()
    warm_up(task, [method for method in methods if method in OURS])
    rows: dict[str, list[Row]] = {method: [] for method in methods}
    for i in range(max(map(len, methods.values()), default=0)):
        for method, tolerances in methods.items():
            if i < len(tolerances) and not is_done(method, rows[method], problem):
                rows[method].append(Row(problem.name, seed, method, tolerances[i]))
                run(rows[method][-1], task, reference)
                show_row(rows[method][-1])
    deciding = [row for found in rows.values() for row in bracket(found, problem.target) if row.seconds[0] < SHORT]
    for i in range(REPEATS - 1):
        for row in deciding[:: 1 if i % 2 else -1]:
            run(row, task, reference)
    return [row for each in rows.values() for row in each], told


def warm_up(task: Task, methods: Iterable[str]) -> None:
    """What is compiled at first use is compiled."""
    short = replace(task, times=(0.1 * task.times[0],), seconds=5.0)
    for method in methods:
        attempt(our_path(method), short, 1e-3)


def is_done(method: str, rows: Sequence[Row], problem: Problem) -> bool:
    """Whether tighter tolerances are of no interest or too expensive."""
    if not rows:
        return False
    last = rows[-1]
    if last.seconds[0] > 0.7 * problem.seconds or "over budget" in last.status or "max_evals" in last.status:
        return True
    return method not in OURS and last.error < ENOUGH * problem.target


def show_row(row: Row) -> None:
    errors = " ".join(f"{error:.1e}" for error in row.errors)
    c = row.counts
    counts = f"{c['gradient']:7d} g {c['hvp']:6d} hv {c['hessian']:5d} H"
    seconds = statistics.median(row.seconds)
    print(f"  {row.method:18} {row.tolerance:.0e} {counts} {seconds:8.3f} s  {errors}  {row.status[:70]}", flush=True)


def optimizers(problem: Problem) -> list[dict[str, Any]]:
    """Adam and SGD: SGD as Euler steps of the flow, Adam by its largest distance from the flow's curve."""
    made, found = problem.make(1), []
    reference, _ = reference_of(problem, 1, made)
    curve = integrate(
        made.objective, made.theta0, (0.0, 1e5), method="bdf", rtol=1e-8, t_eval=[0.0, *np.geomspace(1e-3, 1e5, 500)]
    )
    points = curve.theta.numpy()
    print("\nOptimizers as integrators, on " + problem.name)
    for name, rate in (("SGD", 0.1), ("SGD", 0.03), ("Adam", 1e-2), ("Adam", 1e-3)):
        task = made.task(problem.times, 90.0, 20_000 if name == "Adam" else 10**6)
        began = time.perf_counter()
        path = attempt(OPTIMIZERS[name], task, rate)
        seconds = time.perf_counter() - began
        if path.status:
            print(f"  {name} with learning rate {rate:g}: {path.status}")
            continue
        loss = float(made.objective.loss_and_gradient(torch.from_numpy(path.theta[-1]))[0])
        if name == "SGD":
            error, what = max(relative_errors(path.theta, reference)), "from the flow at the same times"
        else:
            nearest = np.sqrt(((path.theta[:, None] - points[None]) ** 2).sum(2)).min(1)
            error, what = float((nearest / np.linalg.norm(path.theta, axis=1)).max()), "from the flow's curve"
        found.append({"optimizer": name, "rate": rate, "distance": error, "what": what, "seconds": seconds, "loss": loss})
        print(f"  {name} with learning rate {rate:g}: at most {error:.1e} {what}; loss {loss:.2e}; {seconds:.1f} s")
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="beginnings of: " + "; ".join(p.name for p in PROBLEMS))
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of {', '.join((*OURS, *PEERS))}")
    parser.add_argument("--seeds", nargs="+", type=int, help="of those that the problem has")
    parser.add_argument("--quick", action="store_true", help="few problems and tolerances, seed 1; nothing is kept")
    parser.add_argument(
        "--output", type=File, default=None, help=f"where results are kept ({RESULTS}, if the run is complete)"
    )
    parser.add_argument("--figure", type=File, default=None, help=f"where the figure goes ({FIGURE}, if the run is complete)")
    arguments = parser.parse_args()
    if not (arguments.quick or arguments.problems or arguments.methods or arguments.seeds):
        arguments.output, arguments.figure = arguments.output or RESULTS, arguments.figure or FIGURE
    return arguments


def chosen(arguments: argparse.Namespace) -> list[Problem]:
    """The problems that were asked for."""
    found = [p for p in PROBLEMS if not arguments.problems or any(p.name.startswith(name) for name in arguments.problems)]
    if arguments.quick:
        found = [p for p in found if arguments.problems or p.name in QUICK]
    return found


def without_nan(found: Any) -> Any:
    """For JSON: None instead of what is no number."""
    if isinstance(found, dict):
        return {name: without_nan(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [without_nan(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def main() -> None:
    """Measure, print and keep the results."""
    arguments = parsed()
    settle(1)
    torch.set_num_threads(1)
    for name, why in MISSING.items():
        print(f"{name} is left out: {why}")
    for name in OURS:
        if name not in METHODS:
            print(f"{name} is left out: not registered")
    wanted = [name for name in (*OURS, *PEERS) if (name in METHODS or name in PEERS)]
    wanted = [name for name in wanted if not arguments.methods or name in arguments.methods]
    began, problems = time.perf_counter(), chosen(arguments)
    rows: list[Row] = []
    told: list[dict[str, Any]] = []
    found: dict[str, Any] = {"environment": environment(PACKAGES, 1, quick=arguments.quick)}
    for problem in problems:
        if arguments.quick:
            few = {
                m: tuple(x for x in t if x in QUICK_TOLERANCES) or t[-1:] for m, t in problem.methods.items() if m not in SLOW
            }
            problem = replace(problem, methods=few)
        seeds = [
            s
            for s in range(1, problem.seeds + 1)
            if (s in arguments.seeds if arguments.seeds else not arguments.quick or s == 1)
        ]
        started = time.perf_counter()
        for seed in seeds:
            new, costs = compare(problem, seed, wanted)
            rows += new
            told.append(costs)
        print(f"  {time.perf_counter() - started:.0f} s for {problem.name}", flush=True)
    results = Results(rows, told)
    problems = [problem for problem in problems if results.seeds(problem.name)]
    found |= {"settings": told, "work": show_work(results, problems), "goals": goals(results, problems)}
    if not arguments.methods and any(problem.name == "T33, N = 1e3, to t = 1e3" for problem in problems):
        found["optimizers"] = optimizers(next(p for p in problems if p.name == "T33, N = 1e3, to t = 1e3"))
    for each in told:
        if "jax gradient" in each:
            ratio = each["jax gradient"] / each["costs"]["gradient"]
            print(
                f"jax's gradient takes {ratio:.1f} times as long as ours ({each['problem']}): diffrax's seconds include that."
            )
    print("\nGoals", *found["goals"], sep="\n")
    failed = failures(results)
    print("\nDid not come to the end:" if failed else "\nAll came to the end.", *failed, sep="\n  ")
    found |= {"failures": failed, "rows": [asdict(row) for row in rows], "seconds": time.perf_counter() - began}
    if arguments.figure is not None:
        draw(results, problems, arguments.figure)
    if arguments.output is not None:
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(without_nan(found), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        print(f"Kept in {arguments.output}")
    print(f"{found['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
