"""A flow that is advanced piece by piece, as an optimizer's steps do, without paying for each start.

On a new objective a piece ends exactly at its end time. Once an objective was seen twice, steps keep their natural size:
the flow runs ahead of what is asked for, and pieces are served from the polynomial through the last few accepted points
(``HermiteWindow``). Pieces far below the natural step size then cost no integrator step at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_gradflow.flow.dense import HermiteWindow
from torch_gradflow.flow.method import Arrival, FlowMethod, Memory, RunEnd, Span, n_evaluations
from torch_gradflow.flow.solution import Choice, Knot
from torch_gradflow.objectives.base import Objective

# The largest defect of an interpolated point, times the step, in units of the tolerance: the error was
# measured at up to three times it.
ALLOWED_DEFECT = 3.0


@dataclass(frozen=True)
class Continuation:
    """Where a flow stands between two pieces.

    Attributes:
        here: The present point, with loss and gradient.
        step_size: The controller's next step size, None at the very start.
        window: Accepted points around and ahead of the present, through which slopes interpolate, or None.
        memory: That of a method with memory, whose newest point is the present or ahead of it, or None.
    """

    here: Knot
    step_size: float | None
    window: HermiteWindow | None
    memory: Memory | None = None


@dataclass(frozen=True)
class Piece:
    """What one call of ``advance`` did: the new state, how its last run ended, and what "auto" chose on the way.

    ``order`` is that of its last step; 0 where it took none, or the method does not tell.
    """

    state: Continuation
    status: str
    n_accepted: int
    n_rejected: int
    end: RunEnd | None
    choices: tuple[Choice, ...] = ()
    order: int = 0


def advance(
    method: FlowMethod,
    objective: Objective,
    state: Continuation,
    duration: float,
    *,
    rtol: float,
    atol: float,
    ahead: bool,
    max_evals: float = math.inf,
    on_accept: Callable[[Knot], None] = lambda knot: None,
) -> Piece:
    """Follow the flow for the time ``duration``, which must be positive.

    Args:
        method: The integrator.
        objective: L, the same as before where ``state.window`` is not None.
        state: Where the flow stands.
        duration: Flow time.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        ahead: Whether steps may run past the end of this piece.
        max_evals: Gradients that may be spent.
        on_accept: Called at each accepted point of this piece but its last.

    Returns:
        The piece, with status "t_end", or the status of the run that failed and the last accepted point.
    """
    target = state.here.t + duration
    n_accepted = n_rejected = 0
    choices: tuple[Choice, ...] = ()
    if ahead:
        ready, step_size, order = state, state.step_size, 0
        spent, reached = n_evaluations(objective.counts), [state.here]

        def reach(knot: Knot) -> None:
            reached.append(knot)
            on_accept(knot)

        if not _covers(state, target):
            ready, end = _extend(method, objective, state, target, rtol, atol, max_evals, reach)
            step_size, n_accepted, n_rejected, choices = end.step_size, end.n_accepted, end.n_rejected, end.choices
            order = end.order
        if _covers(ready, target):
            here = _at(method, objective, ready, target, rtol, atol)
            return Piece(replace(ready, here=here, step_size=step_size), "t_end", n_accepted, n_rejected, None, choices, order)
        # Running ahead failed somewhere: go on, as far as this piece needs, from the last point on the way.
        max_evals -= n_evaluations(objective.counts) - spent
        state = Continuation(reached[-1], step_size, None)
        if max_evals <= 0:
            end = replace(end, status="max_evals", knot=reached[-1])
            return Piece(state, end.status, n_accepted, n_rejected, end, choices, order)

    def visit(arrival: Arrival) -> bool:
        on_accept(arrival.knot)
        return False

    memory = state.memory if state.memory is not None and state.memory.times[0] == state.here.t else None
    end = method.run(objective, state.here, Span(target, rtol, atol, state.step_size, max_evals), visit, memory)
    here = replace_gradient(end.knot, objective) if end.approximate else end.knot
    return Piece(
        Continuation(here, end.step_size or state.step_size, None, end.memory),
        end.status,
        n_accepted + end.n_accepted,
        n_rejected + end.n_rejected,
        end,
        choices + end.choices,
        end.order,
    )


def point_between(method: FlowMethod, objective: Objective, window: HermiteWindow, t: float, rtol: float, atol: float) -> Knot:
    """The flow at t within a window, with loss and gradient.

    The window's polynomial p serves where its defect p' + ∇L(p), which costs the one gradient that is wanted anyway, is
    small: the defect times the distance of the accepted points around t bounds the error, roughly. Where it is larger
    than the tolerance (steps of dopri8 can be longer than a polynomial bridges, and the first steps grow fast), a step
    from the last accepted point before t is taken instead.
    """
    theta, slope = window.value_and_slope(t)
    loss, gradient = objective.loss_and_gradient(theta)
    polynomial = Knot(t, theta, loss, gradient)
    if t in window.times:
        return polynomial
    i = sum(t_i <= t for t_i in window.times) - 1
    defect = (slope + gradient) * (window.times[i + 1] - window.times[i]) / (atol + rtol * theta.abs())
    if float(defect.square().mean().sqrt()) <= ALLOWED_DEFECT:
        return polynomial
    start = Knot(window.times[i], window.theta[i], loss, window.gradient[i])
    end = method.run(objective, start, Span(t, rtol, atol, t - start.t, 1000), lambda arrival: False)
    if end.status != "t_end":
        return polynomial
    return replace_gradient(end.knot, objective) if end.approximate else end.knot


def replace_gradient(knot: Knot, objective: Objective) -> Knot:
    """The accepted point with loss and gradient of its own, not of the last stage or of a linearisation.

    Where these are not finite, being at the edge of what can be represented, it stays as it was.
    """
    loss, gradient = objective.loss_and_gradient(knot.theta)
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
        return knot
    return replace(knot, loss=loss, gradient=gradient)


def _covers(state: Continuation, t: float) -> bool:
    return (state.memory is not None and state.memory.covers(t)) or (state.window is not None and state.window.covers(t))


def _at(method: FlowMethod, objective: Objective, state: Continuation, t: float, rtol: float, atol: float) -> Knot:
    if state.memory is not None and state.memory.covers(t):
        theta = state.memory(t)
        return Knot(t, theta, *objective.loss_and_gradient(theta))
    assert state.window is not None
    return point_between(method, objective, state.window, t, rtol, atol)


def _extend(
    method: FlowMethod,
    objective: Objective,
    state: Continuation,
    target: float,
    rtol: float,
    atol: float,
    max_evals: float,
    on_accept: Callable[[Knot], None],
) -> tuple[Continuation, RunEnd]:
    """Steps of natural size until they cover the target: one past it, and ``n_knots`` points where slopes interpolate."""
    knots = [state.here] if state.window is None else _knots(state.window, state.here.loss)
    if state.window is None and state.memory is not None and state.memory.times[0] != state.here.t:
        # Loss and gradient at the newest point are not looked at, where there is a memory.
        knots = [replace(state.here, t=state.memory.times[0], theta=state.memory.theta[0])]

    def visit(arrival: Arrival) -> bool:
        knots.append(arrival.knot)
        if state.here.t < arrival.knot.t <= target:
            on_accept(arrival.knot)
        return arrival.knot.t >= target and (arrival.interpolant is not None or len(knots) >= method.n_knots)

    span = Span(math.inf, rtol, atol, state.step_size, max_evals)
    end = method.run(objective, knots[-1], span, visit, state.memory)
    if end.status != "visit":
        return replace(state, window=None, memory=None), end
    own = end.memory is not None and end.memory.covers(target)
    window = None if own else HermiteWindow.through(knots[-method.n_knots :])
    return replace(state, window=window, memory=end.memory), end


def _knots(window: HermiteWindow, loss: Tensor) -> list[Knot]:
    return [
        Knot(t, theta, loss, gradient) for t, theta, gradient in zip(window.times, window.theta, window.gradient, strict=True)
    ]
