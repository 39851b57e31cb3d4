"""What the benchmark of integrators makes of its runs: work at an error, the issue's goals line by line, the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path as File
from typing import Any

from _flows import Problem

OURS = ("auto", "bdf", "bdf-cg", "bdf-secant", "exprb53", "rkc2", "dopri5")
# How far beyond the most accurate run an error may be extrapolated to.
REACH = 2.5


@dataclass
class Row:
    """One method at one tolerance on one problem with one seed.

    Attributes:
        errors: Relative errors at the problem's times.
        seconds: Of each repetition.
        counts: Evaluations ("gradient", "hvp", "hessian") and factorisations ("cholesky", "eigh", "lu").
        status: "" or why it ended early.
        choices: What "auto" chose when and why.
    """

    problem: str
    seed: int
    method: str
    tolerance: float
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    status: str = ""
    choices: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest; ``inf`` where it did not come to the end."""
        return math.inf if self.status else max(self.errors)


def bracket(rows: Sequence[Row], target: float) -> list[Row]:
    """The two rows between whose errors the target lies, the tightest such pair; or the one that comes closest."""
    rows = [row for row in rows if math.isfinite(row.error)]
    pairs = [[a, b] for a, b in pairwise(rows) if a.error >= target > b.error]
    if pairs:
        return pairs[-1]
    if rows and rows[0].error < target:
        return [rows[0]]
    return list(rows[-2:])


def work_at(rows: Sequence[Row], target: float, work: Callable[[Row], float]) -> tuple[float, str]:
    """Work at the target error, log-log between the tolerances, and a mark.

    "≤": the loosest run is more accurate than that, and its work is given. "~": extrapolated. ``nan`` where no run came near.
    """
    chosen = bracket(rows, target)
    if not chosen:
        return math.nan, ""
    values = [math.log(max(work(row), 1e-12)) for row in chosen]
    errors = [math.log(max(row.error, 1e-15)) for row in chosen]
    at = math.log(target)
    if len(chosen) == 1:
        return (math.exp(values[0]), "≤") if errors[0] < at else (math.nan, "")
    if errors[1] >= at + math.log(REACH) or errors[0] <= errors[1]:
        return math.nan, ""
    slope = (values[1] - values[0]) / (errors[1] - errors[0])
    return math.exp(values[1] + slope * (at - errors[1])), "" if errors[1] < at else "~"


def counted_cost(row: Row, costs: dict[str, float]) -> float:
    """Seconds by counts and costs per call; ``nan`` where the calls are not counted."""
    if row.method.startswith("diffrax Kv"):
        return math.nan
    hessian = costs["gradient and hessian" if row.method in OURS else "hessian"]
    rest = ("gradient", "hvp", "cholesky", "eigh", "lu")
    return row.counts["hessian"] * hessian + sum(row.counts.get(name, 0) * costs[name] for name in rest)


class Results:
    """All rows of a run, and questions to them."""

    def __init__(self, rows: list[Row], told: list[dict[str, Any]]) -> None:
        self.rows, self.told = rows, told
        self._costs = {(each["problem"], each["seed"]): each["costs"] for each in told}

    def of(self, problem: str, method: str, seed: int) -> list[Row]:
        return [r for r in self.rows if (r.problem, r.method, r.seed) == (problem, method, seed)]

    def seeds(self, problem: str) -> list[int]:
        return sorted({row.seed for row in self.rows if row.problem == problem})

    def methods(self, problem: str) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows if row.problem == problem))

    def work(self, problem: Problem, method: str, seed: int, what: str) -> tuple[float, str]:
        """At the problem's target error: "seconds", "counted", or the count of that name."""
        return work_at(self.of(problem.name, method, seed), problem.target, lambda row: self.amount(row, what))

    def amount(self, row: Row, what: str) -> float:
        """As ``work``, of one row; also "equivalents", the counted cost in gradients."""
        costs = self._costs[row.problem, row.seed]
        if what == "seconds":
            return statistics.median(row.seconds)
        if what in ("counted", "equivalents"):
            return counted_cost(row, costs) / (costs["gradient"] if what == "equivalents" else 1.0)
        return float(row.counts[what])

    def median_work(self, problem: Problem, method: str, what: str) -> tuple[float, int]:
        """Over the seeds that came there, and how many these are."""
        found = [self.work(problem, method, seed, what)[0] for seed in self.seeds(problem.name)]
        found = [value for value in found if not math.isnan(value)]
        return (statistics.median(found), len(found)) if found else (math.nan, 0)


def show_work(results: Results, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Work at each problem's target error, medians over the seeds."""
    kept = []
    for problem in problems:
        n = len(results.seeds(problem.name))
        print(f"\n{problem.name}: work at an error of {problem.target:g} (medians over the seeds that reach it)")
        print(f"  {'':18} seeds  gradients      HVPs  Hessians   seconds   counted")
        for method in results.methods(problem.name):
            names = ("gradient", "hvp", "hessian", "seconds", "counted")
            values = {name: results.median_work(problem, method, name)[0] for name in names}
            reached = results.median_work(problem, method, "seconds")[1]
            marks = {results.work(problem, method, seed, "seconds")[1] for seed in results.seeds(problem.name)}
            values["counted"] = math.nan if math.isnan(values["counted"]) else values["counted"]
            numbers = "".join(f"{values[name]:10.0f}" for name in names[:3]) + "".join(f"{values[n]:10.3f}" for n in names[3:])
            print(f"  {method:18} {reached:2d}/{n:<2d} {numbers} {''.join(sorted(marks))}")
            kept.append({"problem": problem.name, "method": method, "target": problem.target, "reached": reached} | values)
    return kept


def goals(results: Results, problems: Sequence[Problem]) -> list[str]:
    """The issue's goals, line by line, with what was measured."""
    by_name = {problem.name: problem for problem in problems}
    lines: list[str] = []
    for name in ("T33, N = 1e4", "T33, N = 1e3"):
        if name in by_name:
            lines += long_run(results, by_name[name])
    short = by_name.get("T33, N = 1e3, to t = 1e3")
    for name in ("T33, N = 1e3", "T33, N = 1e4"):
        if name in by_name:
            each = [results.work(by_name[name], "bdf-secant", seed, "gradient")[0] for seed in results.seeds(name)]
            lines.append(
                f"(b) {name}: gradients only, to t = 1e7 at 1e-6: {listed(each)} gradients, median {middle(each):.0f}"
            )
    if short is not None:
        lines += short_run(results, short)
    wide = by_name.get("T601, N = 1e4")
    if wide is not None:
        lines += wide_run(results, wide)
    lines += automatic(results, problems) + calibration(results, problems)
    return lines


def long_run(results: Results, problem: Problem) -> list[str]:
    seeds, lines = results.seeds(problem.name), []
    for method in ("bdf", "auto", "bdf-cg"):
        if method not in results.methods(problem.name):
            continue
        work = {
            what: [results.work(problem, method, s, what)[0] for s in seeds] for what in ("hessian", "gradient", "seconds")
        }
        lines.append(
            f"(a) {problem.name}, t = 1e7 at 1e-6, {method}: gradient+Hessian {listed(work['hessian'])}, median "
            f"{middle(work['hessian']):.0f}; further gradients {listed(work['gradient'])}; "
            f"seconds {listed(work['seconds'], '.3f')}"
        )
        ratios = {
            peer: [results.work(problem, peer, s, "seconds")[0] / mine for s, mine in zip(seeds, work["seconds"], strict=True)]
            for peer in ("LSODA", "BDF", "Radau")
        }
        better = [min((a, b), key=lambda r: (math.isnan(r), r)) for a, b in zip(ratios["LSODA"], ratios["BDF"], strict=True)]
        told = "; ".join(f"{peer} {listed(each, '.2f')}" for peer, each in ratios.items())
        lines.append(f"    seconds of peers over {method}: {told}; better of LSODA and BDF: median {middle(better):.2f}")
    return lines


def short_run(results: Results, problem: Problem) -> list[str]:
    seeds, peer = results.seeds(problem.name), "torchdiffeq dopri5"
    theirs = [results.work(problem, peer, seed, "gradient")[0] for seed in seeds]
    ours = [results.work(problem, "bdf-secant", seed, "gradient")[0] for seed in seeds]
    fewer = [a / b for a, b in zip(theirs, ours, strict=True)]
    lines = [
        f"(b) {problem.name} at 1e-6: bdf-secant {listed(ours)} gradients, dopri5 {listed(theirs)}: "
        f"{listed(fewer, '.1f')} times fewer"
    ]
    for method in ("bdf", "auto", "bdf-secant"):
        pairs = [[results.work(problem, name, seed, "seconds")[0] for name in (peer, method)] for seed in seeds]
        lines.append(
            f"(c) {problem.name} at 1e-6: {method} {listed([b for _, b in pairs], '.4f')} s, torchdiffeq's dopri5 "
            f"{listed([a for a, _ in pairs], '.2f')} s: {listed([a / b for a, b in pairs], '.0f')} times faster"
        )
    return lines


def wide_run(results: Results, problem: Problem) -> list[str]:
    seconds = {method: results.work(problem, method, 1, "seconds")[0] for method in results.methods(problem.name)}
    seconds = {method: value for method, value in seconds.items() if not math.isnan(value)}
    peers = {method: value for method, value in seconds.items() if method not in OURS}
    if not peers:
        return [f"(d) {problem.name}: no peer reached {problem.target:g}"]
    best = min(peers, key=peers.__getitem__)
    told = ", ".join(f"{method} {value:.1f} s" for method, value in seconds.items())
    ratios = ", ".join(f"{m} {peers[best] / value:.2f}" for m, value in seconds.items() if m in OURS)
    return [f"(d) {problem.name} at {problem.target:g}: {told}; the best peer, {best}, over ours: {ratios}"]


def automatic(results: Results, problems: Sequence[Problem]) -> list[str]:
    lines = []
    for problem in problems:
        cost = {m: results.median_work(problem, m, "counted")[0] for m in results.methods(problem.name) if m in OURS}
        cost = {method: value for method, value in cost.items() if not math.isnan(value)}
        single = {method: value for method, value in cost.items() if method != "auto"}
        if not single:
            continue
        best = min(single, key=single.__getitem__)
        if "auto" not in results.methods(problem.name):
            continue
        if "auto" not in cost:
            lines.append(
                f"(e) {problem.name}: auto did not reach {problem.target:g}; {best} did, at {single[best]:.3f} s counted"
            )
            continue
        seconds = {method: results.median_work(problem, method, "seconds")[0] for method in (best, "auto")}
        lines.append(
            f"(e) {problem.name}: counted cost of auto {cost['auto']:.3f} s, of {best} {single[best]:.3f} s: "
            f"{cost['auto'] / single[best]:.2f} (seconds {seconds['auto']:.3f} and {seconds[best]:.3f})"
        )
    return lines


def calibration(results: Results, problems: Sequence[Problem]) -> list[str]:
    """Global error in units of the tolerance."""
    lines, names = [], {problem.name for problem in problems}
    for method in dict.fromkeys(row.method for row in results.rows):
        rows = [row for row in results.rows if row.method == method and row.problem in names and math.isfinite(row.error)]
        if rows:
            worst = max(rows, key=lambda row: row.error / row.tolerance)
            ratios = [row.error / row.tolerance for row in rows]
            lines.append(
                f"(f) error / rtol of {method}: median {statistics.median(ratios):.2g}, worst {max(ratios):.2g} "
                f"({worst.problem}, seed {worst.seed}, {worst.tolerance:g}; {len(rows)} runs)"
            )
    return lines


def listed(values: Iterable[float], form: str = ".0f") -> str:
    return "/".join("–" if math.isnan(value) else format(value, form) for value in values)


def middle(values: Iterable[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return statistics.median(found) if found else math.nan


def failures(results: Results) -> list[str]:
    return [f"{r.problem}, seed {r.seed}, {r.method} at {r.tolerance:g}: {r.status}" for r in results.rows if r.status]


def draw(results: Results, problems: Sequence[Problem], file: File) -> None:
    """Two panels per problem: error against gradient-equivalents and against seconds; medians over the seeds."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import NullFormatter
    except ImportError:
        print("No figure: matplotlib is not installed.")
        return
    names = list(dict.fromkeys(row.method for row in results.rows))
    ours = [name for name in OURS if name in names]
    peers = [name for name in names if name not in OURS]
    style: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(ours):
        style[name] = {"color": f"C{i}", "marker": "o", "lw": 2.2 if name == "auto" else 1.6, "ms": 4}
    for i, name in enumerate(peers):
        style[name] = {"color": plt.get_cmap("Dark2")(i % 8), "marker": "sv^<>DPX*"[i % 9], "lw": 0.9, "ms": 4, "ls": "--"}
    n_rows = math.ceil((len(problems) + 1) / 2)
    figure, axes = plt.subplots(n_rows, 4, figsize=(17, 3.4 * n_rows), squeeze=False)
    for i, problem in enumerate(problems):
        pair = axes[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2]
        for axis, what, label in zip(pair, ("equivalents", "seconds"), ("cost in gradients", "seconds"), strict=True):
            for method in results.methods(problem.name):
                points = curve(results, problem.name, method, what)
                if points:
                    axis.plot(*zip(*points, strict=True), label=method, **style[method])
            axis.axhline(problem.target, color="0.7", lw=0.8, zorder=0)
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(True, which="major", color="0.92")
        pair[0].set_ylabel("relative error")
        pair[0].set_title(
            f"{problem.name}, to t = {problem.times[-1]:g}".replace(", to t = 1e3,", ","), loc="left", fontsize=10
        )
    for axis in axes.flat[2 * len(problems) :]:
        axis.axis("off")
    handles = [plt.Line2D([], [], label=name, **style[name]) for name in (*ours, *peers)]
    axes.flat[-2].legend(handles=handles, loc="center", ncols=2, frameon=False, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    print(f"Figure in {file}")


def curve(results: Results, problem: str, method: str, what: str) -> list[tuple[float, float]]:
    """Median work and geometric mean of the error over the seeds, for each tolerance."""
    rows = [row for row in results.rows if (row.problem, row.method) == (problem, method) and math.isfinite(row.error)]
    points = []
    for tolerance in sorted({row.tolerance for row in rows}, reverse=True):
        same = [row for row in rows if row.tolerance == tolerance]
        work = statistics.median(results.amount(row, what) for row in same)
        if not math.isnan(work):
            points.append((work, math.exp(statistics.fmean(math.log(max(row.error, 1e-15)) for row in same))))
    return points
