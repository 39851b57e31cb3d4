"""The same network, data and seeds, trained with several optimizers in one call: a table and a figure."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.minimize.certificate import certify
from torch_gradflow.objectives.module import LossFunction, ModuleObjective
from torch_gradflow.objectives.regularized import Penalties, Regularized
from torch_gradflow.optim.gradient_flow import GradientFlow
from torch_gradflow.optim.newton_polish import NewtonPolish
from torch_gradflow.styles import STYLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Stages = MakeOptimizer | Sequence[MakeOptimizer]
# With their own defaults. What comes after a plus begins where the other ended.
OPTIMIZERS: dict[str, tuple[MakeOptimizer, ...]] = {
    "Adam": (torch.optim.Adam,),
    "SGD": (torch.optim.SGD,),
    "LBFGS": (torch.optim.LBFGS,),
    "GradientFlow": (GradientFlow,),
    "NewtonPolish": (NewtonPolish,),
    "GradientFlow+NewtonPolish": (GradientFlow, NewtonPolish),
}
# A product Hv by automatic differentiation costs about as much as two gradients (Pearlmutter 1994), a Hessian P of them.
GRADIENTS_PER_PRODUCT = 2


@dataclass(frozen=True)
class ComparedRun:
    """One optimizer from one start.

    Attributes:
        name: The optimizer.
        seed: That of the start.
        loss: L at the end.
        grad_norm: ‖∇L‖ there, in the infinity norm.
        gradients: What it cost in gradient-equivalents: closures evaluated, or gradients + 2 (products Hv) + 2 P (Hessians),
            as if by automatic differentiation: closed-form Hessians of perceptrons cost far less.
        seconds: Wall time of the training loop, after an unmeasured step on a copy.
        verdict: What kind of critical point the end is, see ``certify``; "" where that was not asked for.
        theta: The parameters at the end, shape ``(P,)``.
        history: Before each step and at the end: gradient-equivalents, seconds, L; each at accepted points.
    """

    name: str
    seed: int
    loss: float
    grad_norm: float
    gradients: float
    seconds: float
    verdict: str
    theta: Tensor
    history: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: ``print`` it for the table.

    Attributes:
        runs: Optimizer by optimizer, in the order of the seeds.
    """

    runs: tuple[ComparedRun, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row per optimizer: medians over the seeds, and how often which verdict was reached."""
        rows = []
        for name in dict.fromkeys(run.name for run in self.runs):
            runs = [run for run in self.runs if run.name == name]
            numbers = {key: median(getattr(r, key) for r in runs) for key in ("loss", "grad_norm", "gradients", "seconds")}
            counts = Counter(run.verdict for run in runs).most_common()
            verdict = counts[0][0] if len(runs) == 1 else ", ".join(f"{n} {verdict}" for verdict, n in counts if verdict)
            rows.append({"name": name, **numbers, "verdict": verdict})
        return rows

    def __str__(self) -> str:
        """The table."""
        head = ("", "loss", "|gradient|", "gradients", "seconds", "critical point")
        cells = [
            (
                row["name"],
                f"{row['loss']:.9g}",
                f"{row['grad_norm']:.1e}",
                f"{row['gradients']:,.0f}",
                f"{row['seconds']:.2f}",
                row["verdict"],
            )
            for row in self.rows()
        ]
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *cells)]
        return "\n".join(line.rstrip() for line in lines)

    def _least(self, seed: int) -> float:
        """The smallest loss that a run from this start ended with."""
        return min((run.loss for run in self.runs if run.seed == seed and math.isfinite(run.loss)), default=0.0)

    def plot(self, *, above: float | None = None) -> Figure:
        """The loss against gradient-equivalents and against wall time, one line per run.

        Args:
            above: What is subtracted from the loss; None for the smallest loss that any run from the same start ended with
                (other starts may lead to other minima). Losses that are not above it are left out.

        Returns:
            A matplotlib Figure with two axes, both logarithmic.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("Comparison.plot needs matplotlib: pip install 'torch-gradflow[examples]'.") from None
        least = {run.seed: above if above is not None else self._least(run.seed) for run in self.runs}
        names = list(dict.fromkeys(run.name for run in self.runs))
        figure = Figure(figsize=(12, 4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for column, (axis, label) in enumerate(zip(axes, ("gradient-equivalents", "wall time (s)"), strict=True)):
            for run in self.runs:
                color, dashes = STYLES[names.index(run.name) % len(STYLES)]
                points = [(point[column], point[2] - least[run.seed]) for point in run.history if point[column] > 0]
                shown = [(cost, excess) for cost, excess in points if 0 < excess < math.inf]
                first = run.seed == next(r.seed for r in self.runs if r.name == run.name)
                label_of_run = run.name if first else None
                axis.loglog(*zip(*shown, strict=True), color=color, linestyle=dashes, label=label_of_run) if shown else None
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        values = set(least.values())
        subtracted = f"{values.pop():.6g}" if len(values) == 1 else "the smallest from the same start"
        axes[0].set_ylabel("loss" if subtracted == "0" else f"loss − {subtracted}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
        return figure


def compare(
    make_model: Callable[[], nn.Module],
    loss_fn: LossFunction,
    data: tuple[Tensor, Tensor],
    optimizers: Iterable[str] | Mapping[str, Stages] = ("Adam", "SGD", "LBFGS", "GradientFlow+NewtonPolish"),
    *,
    weight_decay: float = 0.0,
    n_steps: int = 100,
    seconds: float = math.inf,
    seeds: Sequence[int] = (0,),
    certificate: bool = True,
) -> Comparison:
    """Train the same network on the same data with several optimizers, in the same loop.

    Args:
        make_model: Makes the network; called under ``torch.manual_seed(seed)``, so that all optimizers start at the same
            parameters. The caller's random numbers are left alone.
        loss_fn: ``loss_fn(prediction, target)``, a scalar.
        data: ``(x, y)``; each step takes all of it.
        optimizers: Names of ``OPTIMIZERS``, which have their own defaults; or a dictionary of names with functions that make
            an optimizer of parameters (``lambda p: torch.optim.Adam(p, lr=0.01)``), or sequences of such, of which each
            begins where the one before ended. NewtonPolish takes one step.
        weight_decay: λ: adds λ/2 ‖θ‖² to the loss, the same for all.
        n_steps: Steps of any other optimizer.
        seconds: Wall time after which it takes no further step, ``inf`` for no limit.
        seeds: Starts.
        certificate: Whether to say what kind of critical point each run ended at (two Hessians, or products Hv).

    Returns:
        The runs, whose losses and gradients at the end are all evaluated by one and the same objective.

    Raises:
        TypeError, ValueError: For arguments that make no sense, naming them.
    """
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(
            "make_model must be a function that makes the network anew for each run, such as "
            f"lambda: nn.Sequential(...), not {type(make_model).__name__}."
        )
    check_number("weight_decay", weight_decay, least=0.0)
    check_count("n_steps", n_steps)
    check_number("seconds", seconds, above=0.0, infinite=True)
    if not seeds:
        raise ValueError("seeds must hold at least one seed.")
    chosen = _stages(optimizers)
    runs = []
    for name, make_optimizers in chosen.items():
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = make_model()
                _warm_up(make_optimizers, model, loss_fn, data, weight_decay)
                training = _Training(model, loss_fn, data, weight_decay, n_steps, seconds)
                runs.append(_run(training, name, seed, make_optimizers, certificate))
    return Comparison(tuple(runs))


def _stages(optimizers: Iterable[str] | Mapping[str, Stages]) -> dict[str, tuple[MakeOptimizer, ...]]:
    """What to train with, stage by stage."""
    if isinstance(optimizers, Mapping):
        chosen = {name: (make,) if callable(make) else tuple(make) for name, make in optimizers.items()}
    else:
        names = [optimizers] if isinstance(optimizers, str) else list(optimizers)
        unknown = [name for name in names if name not in OPTIMIZERS]
        if unknown:
            raise ValueError(
                f"optimizers must be among {', '.join(map(repr, OPTIMIZERS))}, or a dictionary of names with functions that "
                f"make an optimizer of parameters, not {unknown[0]!r}."
            )
        chosen = {name: OPTIMIZERS[name] for name in names}
    if not chosen or not all(chosen.values()):
        raise ValueError("optimizers must hold at least one optimizer, and each at least one stage.")
    return chosen


@dataclass
class _Training:
    """One training loop, through all of its stages.

    Attributes:
        model: The network.
        loss_fn: As for ``compare``.
        data: As for ``compare``.
        weight_decay: As for ``compare``.
        n_steps: As for ``compare``.
        seconds: As for ``compare``.
        began: When it began.
        spent: Gradient-equivalents of the stages before this one.
        history: See ``ComparedRun``.
    """

    model: nn.Module
    loss_fn: LossFunction
    data: tuple[Tensor, Tensor]
    weight_decay: float
    n_steps: int
    seconds: float
    began: float = field(default_factory=time.perf_counter)
    spent: float = 0.0
    history: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def train(self, optimizer: torch.optim.Optimizer) -> None:
        """The loop, the same for all."""
        n_closure, before = 0, self.spent
        moving = [p for p in self.model.parameters() if p.requires_grad]
        n_parameters = sum(p.numel() for p in moving)
        x, y = self.data

        def closure() -> Tensor:
            nonlocal n_closure
            n_closure += 1
            optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y)
            if self.weight_decay:
                loss = loss + 0.5 * self.weight_decay * torch.stack([p.square().sum() for p in moving]).sum()
            loss.backward()
            return loss

        if isinstance(optimizer, NewtonPolish):
            optimizer.step(closure)
            self.spent = before + _gradient_equivalents(optimizer.result, n_parameters)
            return
        for _ in range(self.n_steps):
            elapsed = self.elapsed
            if elapsed > self.seconds:
                break
            loss: Any = optimizer.step(closure)  # type: ignore[arg-type]  # torch's own closures return tensors, too
            self.history.append((self.spent, elapsed, loss.item()))
            stats = getattr(optimizer, "stats", None)
            self.spent = before + (n_closure if stats is None else _gradient_equivalents(stats, n_parameters))


def _warm_up(
    make_optimizers: tuple[MakeOptimizer, ...],
    model: nn.Module,
    loss_fn: LossFunction,
    data: tuple[Tensor, Tensor],
    weight_decay: float,
) -> None:
    """A step of each optimizer on a copy: the first loads modules and compiles kernels, which is no part of its cost."""
    with torch.random.fork_rng():
        training = _Training(copy.deepcopy(model), loss_fn, data, weight_decay, 1, math.inf)
        for optimizer in (make(training.model.parameters()) for make in make_optimizers):
            if not isinstance(optimizer, NewtonPolish):  # whose one step is all that it does
                training.train(optimizer)


def _run(
    training: _Training, name: str, seed: int, make_optimizers: tuple[MakeOptimizer, ...], certificate: bool
) -> ComparedRun:
    """Train, and look at the end."""
    model = training.model
    for make in make_optimizers:
        training.train(make(model.parameters()))
    elapsed = training.elapsed
    base = ModuleObjective(model, training.loss_fn, training.data)
    theta = base.initial_theta()
    decay = Penalties(weight_decay=torch.full_like(theta, training.weight_decay))
    objective = Regularized(base, decay) if training.weight_decay else base
    loss, gradient = objective.loss_and_gradient(theta)
    verdict = certify(objective, theta).kind if certificate else ""
    history = (*training.history, (training.spent, elapsed, float(loss)))
    return ComparedRun(name, seed, float(loss), float(gradient.abs().max()), training.spent, elapsed, verdict, theta, history)


def _gradient_equivalents(counts: Any, n_parameters: int) -> float:
    """Of what a ``FlowStats`` or a ``MinimizeResult`` counted."""
    return float(counts.n_grad + GRADIENTS_PER_PRODUCT * (counts.n_hvp + n_parameters * counts.n_hessian))
