"""How a flow went: its loss, its gradient and its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torch_gradflow.flow.solution import FlowSolution
from torch_gradflow.optimizer_comparison import GRADIENTS_PER_PRODUCT
from torch_gradflow.plotting.axes import axes_or_new, by_name, finish, next_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]
Solutions = FlowSolution | Mapping[str, FlowSolution]
Clock = Literal["flow time", "wall time", "evaluations"]
Quantity = Literal["loss", "gradient norm"]
CLOCKS = {"flow time": "flow time $t$", "wall time": "wall time (s)", "evaluations": "gradient-equivalents"}


def plot_loss(
    solutions: Solutions,
    *,
    against: Clock = "flow time",
    quantity: Quantity = "loss",
    above: float = 0.0,
    ax: Axes | None = None,
) -> Axes:
    """Loss, or gradient norm, against flow time, wall time or evaluations; both axes logarithmic.

    Args:
        solutions: What ``integrate`` or ``GradientFlow.integrate`` returned, or several of them by name.
        against: "flow time"; "wall time", in seconds since the start of the run; or "evaluations", in gradient-equivalents as
            ``compare`` counts them: gradients + 2 (products Hv) + 2 P (Hessians).
        quantity: "loss" or "gradient norm", which is ‖∇L‖ in the infinity norm.
        above: What is subtracted from the losses, such as that of the minimum to which they lead.
        ax: Where to draw; None for a new figure.

    Returns:
        The Axes. Points that a logarithmic axis cannot show, such as the start at t = 0, are left out.

    Raises:
        TypeError, ValueError: For arguments that make no sense; for a solution without what is asked for; where nothing is
            left to draw.
        ImportError: If matplotlib is not installed.
    """
    named = by_name("solutions", solutions, FlowSolution)
    if against not in CLOCKS:
        raise ValueError(f"against must be one of {', '.join(map(repr, CLOCKS))}, not {against!r}.")
    if quantity not in ("loss", "gradient norm"):
        raise ValueError(f"quantity must be 'loss' or 'gradient norm', not {quantity!r}.")
    drawn = {name: (_clock(name, s, against), _quantity(s, quantity, above)) for name, s in named.items()}
    hint = f"; above={above:g} is not below any of its losses" if quantity == "loss" and above else ""
    label = "loss $L$" if not above else f"loss $L$ − {above:.6g}"
    ax = _log_log(drawn, f"no sample has a positive {quantity} at a positive {against}{hint}", ax)
    return finish(ax, CLOCKS[against], label if quantity == "loss" else r"gradient norm $\|\nabla L\|_\infty$")


def plot_step_size(solutions: Solutions, *, ax: Axes | None = None) -> Axes:
    """The lengths of the accepted steps against flow time; both axes logarithmic.

    Of a single solution, the methods that "auto" chose are named where they begin.

    Args:
        solutions: As for ``plot_loss``.
        ax: Where to draw; None for a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError, ValueError: For a solution without step sizes, or with nothing but its start.
        ImportError: If matplotlib is not installed.
    """
    named = by_name("solutions", solutions, FlowSolution)
    drawn = {name: (_array(s.t - s.t[0]), _recorded(name, s.step_sizes, "step sizes")) for name, s in named.items()}
    ax = _log_log(drawn, "no step was accepted", ax)
    if len(named) == 1:
        (solution,) = named.values()
        _name_choices(ax, solution)
    return finish(ax, CLOCKS["flow time"], "step size (flow time)")


def plot_order(solutions: Solutions, *, ax: Axes | None = None) -> Axes:
    """The orders of the accepted steps against flow time, which is logarithmic.

    Of a single solution, the methods that "auto" chose are named where they begin.

    Args:
        solutions: As for ``plot_loss``.
        ax: Where to draw; None for a new figure.

    Returns:
        The Axes. Each step is drawn at the time at which it ends, from the end of the last one that was sampled.

    Raises:
        TypeError, ValueError: For a solution without orders: scipy's LSODA and BDF do not tell them.
        ImportError: If matplotlib is not installed.
    """
    named = by_name("solutions", solutions, FlowSolution)
    drawn = {name: (_array(s.t - s.t[0]), _recorded(name, s.orders, "orders")) for name, s in named.items()}
    ax = _lines(drawn, "no step of known order was accepted", ax, drawstyle="steps-pre")
    ax.set_xscale("log")
    ax.set_ylim(0.5, 0.5 + max(6.0, *(float(y.max()) for _, y in drawn.values())))
    if len(named) == 1:
        (solution,) = named.values()
        _name_choices(ax, solution)
    return finish(ax, CLOCKS["flow time"], "order")


def _log_log(drawn: dict[str, tuple[Array, Array]], nothing: str, ax: Axes | None) -> Axes:
    """Lines on logarithmic axes."""
    ax = _lines(drawn, nothing, ax)
    from matplotlib.ticker import LogFormatterSciNotation

    ax.set_xscale("log")
    ax.set_yscale("log")
    # Less than a decade gets more than one number.
    ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.0, 0.7)))
    return ax


def _lines(drawn: dict[str, tuple[Array, Array]], nothing: str, ax: Axes | None, **style: Any) -> Axes:
    """A line for each, without the points that logarithmic axes cannot show; ``nothing`` says why one may have none left."""
    kept = {}
    for name, (x, y) in drawn.items():
        shown = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
        if not shown.any():
            raise ValueError(f"solutions{f'[{name!r}]' if name else ''} leaves nothing to draw: {nothing}.")
        kept[name] = x[shown], y[shown]
    ax = axes_or_new(ax)
    for name, (x, y) in kept.items():
        marker = "o" if len(x) == 1 else None
        ax.plot(x, y, **next_style(ax), **style, marker=marker, label=name or None)
    return ax


def _clock(name: str, solution: FlowSolution, against: Clock) -> Array:
    if against == "flow time":
        return _array(solution.t - solution.t[0])
    if against == "wall time":
        return _recorded(name, solution.seconds, "wall times")
    n_grad, n_hvp, n_hessian = _recorded(name, solution.evaluations, "evaluations").T
    n_parameters = solution.theta.shape[1]
    equivalents: Array = n_grad + GRADIENTS_PER_PRODUCT * (n_hvp + n_parameters * n_hessian)
    return equivalents


def _quantity(solution: FlowSolution, quantity: Quantity, above: float) -> Array:
    return _array(solution.loss) - above if quantity == "loss" else _array(solution.grad_norm)


def _recorded(name: str, values: Tensor | None, what: str) -> Array:
    if values is None:
        raise ValueError(f"solutions{f'[{name!r}]' if name else ''} holds no {what}; integrate anew to record them.")
    return _array(values)


def _array(values: Tensor) -> Array:
    array: Array = values.detach().cpu().double().numpy()
    return array


def _name_choices(ax: Axes, solution: FlowSolution) -> None:
    """A thin line where each method begins, with its name."""
    first = ax.get_xlim()[0]
    for choice in solution.choices:
        x = max(choice.t - float(solution.t[0]), first)
        ax.axvline(x, color="0.6", linewidth=0.8, zorder=1)
        ax.annotate(
            choice.method, (x, 0.02), xycoords=("data", "axes fraction"), xytext=(2, 0), textcoords="offset points",
            rotation=90, va="bottom", ha="left", fontsize="small", color="0.3",
        )  # fmt: skip
