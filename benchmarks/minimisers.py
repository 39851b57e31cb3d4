"""Minimisers side by side: ours and others on the same objective, from the same starts, to a gradient of 1e-13.

Starts are the ends of gradient flows to t = 1e3 and, on the first seeds, θ0 and t = 1e5. A run ends when the gradient norm is
at most 1e-13, when the method gives up, or when it has spent what it may, in gradients or seconds of the processor; the best
point that it saw counts. Work is counted in gradients: each Hessian, Hessian–vector product and Jacobian counts what it costs,
measured in the same run. A Jacobian of a peer counts as much as one of ours, which includes its triangular factor. Other
linear algebra shows in the seconds only.

    python benchmarks/minimisers.py [--quick] [--problems T33 digits] [--methods auto newton] [--seeds 1 2] [--output FILE]

Forty minutes of an idle core; results are kept after each run. With --problems or the like and --output, rows of that file are
replaced and added to, and derivatives count what they are said there to cost.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

import torch
from _environment import commit, environment, settle
from _minima import ADAPTED, GTOL, MISSING, PACKAGES, PEERS, PROBLEMS, Found, Meter, Problem, Setting
from integrators import without_nan
from torch import Tensor

from torch_gradflow import certify, integrate, minimize
from torch_gradflow.minimize.minimize import MinimizeRun

RESULTS = File(__file__).parent / "results" / "minimisers.json"
OURS = (
    "auto",
    "trust-region",
    "levenberg-marquardt",
    "trust-region-lanczos",
    "trust-region-cg",
    "newton",
    "saddle-free",
    "bfgs",
    "lbfgs",
)
QUICK = {"T33, r = 8": (1, 2), "T33, r = 3": (2, 5), "diabetes": (1,)}
# On the first seeds only: methods that on T33 need tens of thousands of gradients, or seconds; and starts but the usual one.
SLOW = frozenset(
    {
        "torch LBFGS",
        "Adam",
        "torchmin newton-exact",
        "torchmin trust-exact",
        "torchmin bfgs",
        "trust-region-lanczos",
        "trust-region-cg",
        "saddle-free",
        "lbfgs",
        "scipy L-BFGS-B",
    }
)
FIRST_OF_SLOW, FIRST_OF_STARTS, USUAL_START = 1, 2, 1e3
# Iterations beyond the goal, for the loss that can be reached, where they are cheap: up to so many parameters.
AFTERWARDS, FEW_PARAMETERS = 200, 200
# "Never more than this times the best peer."
WORST = 1.5


@dataclass
class Row:
    """One method from one start.

    Attributes:
        start: Flow time of the start.
        flow: Hessians that the flow to the start took.
        counts: Evaluations: "gradient", "hvp", "hessian", "jacobian".
        work: The same in gradients, by measured costs.
        seconds: Of the processor.
        commit: Of the code that ran.
        kind: Of the end, by the certificate, for "auto", which goes on for it if need be; this is not counted.
        last_loss: Of "auto" where it goes on until rounding ends it, or a few more iterations.
    """

    problem: str
    seed: int
    start: float
    method: str
    flow: int
    loss: float
    grad_norm: float
    counts: dict[str, int]
    work: float
    seconds: float
    status: str
    choices: list[tuple[int, str]]
    commit: str | None
    kind: str = ""
    last_loss: float = math.nan

    @property
    def key(self) -> tuple[str, int, float, str]:
        """What was run."""
        return self.problem, self.seed, self.start, self.method

    @property
    def reached(self) -> bool:
        """Whether the gradient came down to the goal."""
        return self.grad_norm <= GTOL


def ours(method: str, made: Setting, theta: Tensor, meter: Meter) -> Found:
    """One of our methods, or one of scipy's or NLopt's through our adapter, within its limit; "auto" up to its certificate."""

    def watch(report: Any) -> None:
        if report.grad_norm <= GTOL:
            meter.stop()
        elif meter.is_over():
            raise KeyboardInterrupt

    goes_on = method == "auto" and made.objective.n_parameters <= FEW_PARAMETERS
    run = MinimizeRun(made.objective, theta, method=method, gtol=GTOL, max_iter=10**6, certificate=goes_on, progress=watch)
    status = ""
    try:
        run.run()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        status = f"{type(error).__name__}: {error}"[:100]
    result = run.result()
    choices = [(choice.n_iter, choice.method) for choice in result.choices]
    kind = "" if result.certificate is None else result.certificate.end
    return Found(result.theta, result.loss, result.grad_norm, status or result.status, choices, kind)


def median_seconds(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """Of the processor, which others that work beside it do not stretch."""
    call()  # what is compiled at first use is compiled
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < 200):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def costs_of(made: Setting) -> dict[str, float]:
    """Seconds per call."""
    objective, theta = made.objective, made.theta0
    vector = torch.randn(len(theta), dtype=theta.dtype, generator=torch.Generator().manual_seed(0))
    costs = {
        "gradient": median_seconds(lambda: objective.loss_and_gradient(theta)),
        "hvp": median_seconds(lambda: objective.hvp(theta, vector)),
        "hessian": median_seconds(lambda: objective.hessian(theta)),
        "jacobian": 0.0,
    }
    if objective.has_residuals:
        costs["jacobian"] = median_seconds(lambda: objective.least_squares(theta))
    return costs


def run(problem: Problem, seed: int, start: Start, method: str, made: Setting, costs: dict[str, float]) -> Row:
    """One method from one start; where "auto" arrives, also the loss at which rounding ends it."""
    meter = Meter(made.objective, costs, problem.work, problem.seconds)
    peer = PEERS.get(method)
    found = ours(ADAPTED.get(method, method), made, start.theta, meter) if peer is None else peer(made, start.theta, meter)
    row = Row(
        problem.name,
        seed,
        start.time,
        method,
        start.n_hessian,
        found.loss,
        found.grad_norm,
        meter.counts(),
        meter.work(),
        meter.seconds(),
        found.status,
        found.choices,
        commit(),
    )
    if method == "auto":
        if row.reached and made.objective.n_parameters <= FEW_PARAMETERS:
            row.last_loss = minimize(made.objective, found.theta, gtol=0.0, max_iter=AFTERWARDS, certificate=False).loss
        row.kind = found.kind or certify(made.objective, found.theta, gtol=GTOL).end
    return row


@dataclass(frozen=True)
class Start:
    """Where a flow to a time came, and the Hessians that it took."""

    time: float
    theta: Tensor
    n_hessian: int

    @classmethod
    def after(cls, time: float, made: Setting) -> Start:
        """The end of the gradient flow from θ0."""
        if time == 0:
            return cls(time, made.theta0, 0)
        flow = integrate(made.objective, made.theta0, (0.0, time), method="bdf", rtol=1e-5)
        return cls(time, flow.theta[-1], flow.n_hessian)


def compare(problem: Problem, seed: int, methods: Sequence[str], known: dict[str, dict[str, float]]) -> Iterator[Row]:
    """All methods from all starts; what derivatives cost is taken from ``known``, or measured and put there."""
    made = problem.make(seed)
    name = f"{problem.name}, seed {seed}"
    measured = costs_of(made)
    costs = known.setdefault(name, measured)
    print(f"\n{name}: P = {made.objective.n_parameters}; " + costs_line(costs), flush=True)
    left_out = set(problem.few)
    if seed > FIRST_OF_SLOW:
        left_out |= SLOW
    if not made.objective.has_residuals:
        left_out |= {"levenberg-marquardt", "scipy least_squares"}
    for flow_time in problem.starts if seed <= FIRST_OF_STARTS else (USUAL_START,):
        start = Start.after(flow_time, made)
        for method in methods:
            if method not in left_out:
                row = run(problem, seed, start, method, made, costs)
                show(row)
                yield row


def costs_line(costs: dict[str, float]) -> str:
    first = costs["gradient"]
    return f"a gradient takes {1e3 * first:.3g} ms, " + ", ".join(
        f"a {name} {seconds / first:.1f} of it" for name, seconds in costs.items() if name != "gradient" and seconds
    )


def show(row: Row) -> None:
    counts = " ".join(f"{n} {name[:3]}" for name, n in row.counts.items() if n)
    mark = "*" if row.reached else " "
    told = f"{row.kind or row.status[:40]} {row.choices or ''}"
    print(
        f"  {row.start:6.0e} {row.method:22} {mark}{row.loss:.3e} {row.grad_norm:.0e} {row.work:9.0f} {row.seconds:7.2f} s  "
        f"{counts}  {told}",
        flush=True,
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """Per problem and start: how often each method arrives, with how much work; then what was aimed for."""
    lines = []
    for problem, start in dict.fromkeys((row.problem, row.start) for row in rows):
        here = [row for row in rows if (row.problem, row.start) == (problem, start)]
        seeds = len({row.seed for row in here})
        lines.append(f"\n{problem}, from t = {start:g} ({seeds} seeds): seeds reached; median work in gradients, and seconds")
        for method in dict.fromkeys(row.method for row in here):
            done = [row for row in here if row.method == method and row.reached]
            n = len(done)
            tail = (
                f"{statistics.median(r.work for r in done):9.0f} {statistics.median(r.seconds for r in done):8.2f}"
                if n
                else ""
            )
            lines.append(f"  {method:22} {n:2d} {tail}")
        lines += ratios(here)
    return lines + goals(rows)


def ratios(here: Sequence[Row]) -> list[str]:
    """Work and seconds of "auto" over those of the best peer, seed by seed."""
    found: dict[str, list[float]] = {"work": [], "seconds": []}
    alone = behind = 0
    for seed in sorted({row.seed for row in here}):
        same = [row for row in here if row.seed == seed]
        auto = next((row for row in same if row.method == "auto"), None)
        peers = [row for row in same if row.method not in OURS and row.reached]
        if auto is None:
            continue
        if auto.reached and peers:
            for what, values in found.items():
                values.append(getattr(auto, what) / max(min(getattr(row, what) for row in peers), 1e-9))
        alone += auto.reached and not peers
        behind += bool(peers) and not auto.reached
    lines = [f"  auto alone arrives on {alone} seeds, a peer alone on {behind}"]
    for what, values in found.items():
        if values:
            worse = sum(value > WORST for value in values)
            lines.append(
                f"  {what} of auto over the best peer's: median {statistics.median(values):.2f}, largest {max(values):.2f}, "
                f"above {WORST} on {worse} of {len(values)}"
            )
    return lines


def goals(rows: Sequence[Row]) -> list[str]:
    """Where every neuron of the teacher can be learned: Hessians and Jacobians from θ0 on, and what is certified."""
    lines = [""]
    for start in dict.fromkeys(row.start for row in rows):
        same = [row for row in rows if (row.problem, row.method, row.start) == ("T33, r = 8", "auto", start)]
        if not same:
            continue
        second = [row.counts["hessian"] + row.counts["jacobian"] + row.flow for row in same]
        told_each = "/".join(f"{n}" if row.reached else f"({n})" for n, row in zip(second, same, strict=True))
        zero = sum(row.reached and row.last_loss <= 1e-25 for row in same)
        lines.append(f"T33, r = 8, auto from t = {start:g}: Hessians and Jacobians from θ0 on {told_each}; () not reached")
        lines.append(
            f"    reached {sum(row.reached for row in same)} of {len(same)}; on to rounding, loss up to 1e-25: {zero}"
        )
        lines.append("    certified: " + ", ".join(f"{row.seed}: {row.kind}" for row in same))
    return lines


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="beginnings of: " + "; ".join(p.name for p in PROBLEMS))
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of {', '.join((*OURS, *ADAPTED, *PEERS))}")
    parser.add_argument("--seeds", nargs="+", type=int, help="of those that the problem has")
    parser.add_argument("--work", type=float, help="what a run may take, in gradients, instead of what the problem says")
    parser.add_argument("--quick", action="store_true", help="few problems and seeds, and less work; nothing is kept")
    parser.add_argument("--output", type=File, help=f"where results are kept ({RESULTS}, if the run is complete)")
    arguments = parser.parse_args()
    if not (arguments.quick or arguments.problems or arguments.methods or arguments.seeds or arguments.work):
        arguments.output = arguments.output or RESULTS
    return arguments


def chosen(arguments: argparse.Namespace) -> Iterable[tuple[Problem, int]]:
    """Problems and seeds that were asked for."""
    for problem in PROBLEMS:
        wanted = not arguments.problems or any(problem.name.startswith(name) for name in arguments.problems)
        if not wanted or (arguments.quick and not arguments.problems and problem.name not in QUICK):
            continue
        seeds = QUICK.get(problem.name, (1,)) if arguments.quick else range(1, problem.seeds + 1)
        limit = arguments.work or (3000.0 if arguments.quick else problem.work)
        for seed in seeds:
            if not arguments.seeds or seed in arguments.seeds:
                yield replace(problem, work=limit), seed


def kept(file: File) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """The rows of a file, and what derivatives cost."""
    if not file.exists():
        return [], {}
    found = json.loads(file.read_text())
    rows = [{name: math.nan if value is None else value for name, value in row.items()} for row in found["rows"]]
    return [Row(**row) for row in rows], found["costs"]


def keep(file: File, rows: Sequence[Row], costs: dict[str, dict[str, float]], **more: Any) -> None:
    """Write what is known so far."""
    written = {
        "environment": environment(PACKAGES, 1, **more),
        "summary": [line for line in summary(rows) if line],
        "costs": costs,
        "rows": [asdict(row) for row in rows],
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(without_nan(written), indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Measure, print and keep the results."""
    arguments = parsed()
    settle(1)
    torch.set_num_threads(1)
    for name, why in MISSING.items():
        print(f"{name} is left out: {why}")
    everything = (*OURS, *ADAPTED, *PEERS)
    methods = [name for name in everything if not arguments.methods or name in arguments.methods]
    partial = arguments.problems or arguments.methods or arguments.seeds or arguments.work
    rows, costs = kept(arguments.output) if arguments.output and partial else ([], {})
    found = {row.key: row for row in rows}
    for problem, seed in chosen(arguments):
        for row in compare(problem, seed, methods, costs):
            found[row.key] = row
            if arguments.output:
                keep(arguments.output, list(found.values()), costs, complete=False, quick=arguments.quick)
    if arguments.output:
        keep(arguments.output, list(found.values()), costs, complete=True, quick=arguments.quick)
    print("\n".join(summary(list(found.values()))))
    if arguments.output:
        print(f"Results in {arguments.output}")


if __name__ == "__main__":
    main()
