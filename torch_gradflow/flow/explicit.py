"""torchdiffeq's adaptive explicit Runge–Kutta methods behind one adapter.

Everything goes through torchdiffeq's public ``odeint``: its steps, its error estimate and its step-size control. What the
adapter adds, by the callbacks that ``odeint`` offers: each accepted point is handed out with its loss and gradient, with
no further evaluation; the last step size is carried on; the end time is hit exactly (``step_t``; otherwise torchdiffeq
steps past it and interpolates); the known first gradient is not computed again; and what torchdiffeq reports by a failing
assertion (step-size underflow, non-finite values) becomes a status with the last accepted point at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from torch_gradflow.flow.control import Patience
from torch_gradflow.flow.method import Arrival, Derivative, FlowMethod, Memory, RunEnd, RunStatus, Span, Visit, n_evaluations
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective


@dataclass(frozen=True)
class ExplicitMethod(FlowMethod):
    """One of torchdiffeq's adaptive methods.

    Attributes:
        name: Its name in torchdiffeq.
        order: Its order.
        first_same_as_last: Whether the last stage is the slope at the accepted point, and so free. It is not for
            adaptive_heun and fehlberg2, where torchdiffeq goes on with the slope of the last stage instead: the
            gradient of an accepted point is then that of the stage, O(h²) away.
        n_knots: Accepted points through which values in between are interpolated.
    """

    name: str
    order: int
    first_same_as_last: bool
    n_knots: int
    n_points: int = 0
    needs: Derivative = "gradient"

    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """See ``FlowMethod``; ``step_size=None`` lets torchdiffeq choose the first step, with one more gradient."""
        state = _Run(self, objective, start, visit, span)
        patience = Patience(start.t)
        while True:
            end = self._segment(state, span)
            if end != "not finite":
                return state.end(end)
            # A trial step left the region where L is finite: try again from the last accepted point, shorter.
            state.n_rejected += 1
            if patience.exhausted(state.knot.t):
                return state.end("not finite")
            state.step_size = 0.2 * (state.tried if state.tried > 0 else state.step_size or 1.0)
            if state.knot.t + state.step_size * 1e-3 == state.knot.t or state.step_size < 1e-300:
                return state.end("not finite")

    def _segment(self, state: _Run, span: Span) -> RunStatus:
        device = state.knot.theta.device
        time_dtype = torch.float32 if device.type == "mps" else torch.float64
        state.begin_segment()
        length = span.t_end - state.knot.t
        times = torch.tensor([0.0, length], dtype=time_dtype, device=device)
        options: dict[str, Any] = {"dtype": time_dtype, "max_step": span.max_step}
        if math.isfinite(length):
            options["step_t"] = times[1:]
        if state.step_size:
            options["first_step"] = min(state.step_size, length)
        try:
            with torch.no_grad():
                path = odeint(
                    state, state.knot.theta, times, rtol=span.rtol, atol=span.atol, method=self.name, options=options
                )
        except _EndOfSegment as end:
            return end.status
        if not bool(torch.isfinite(state.last.loss)) or not bool(torch.isfinite(state.last.gradient).all()):
            state.n_accepted -= 1
            return "not finite"
        state.accept(path[-1] if not self.first_same_as_last else state.last.theta, span.t_end)
        return "t_end"


class _EndOfSegment(Exception):
    """Raised inside odeint's callbacks to leave it."""

    def __init__(self, status: RunStatus) -> None:
        super().__init__(status)
        self.status = status


class _Run:
    """The right-hand side −∇L as torchdiffeq calls it, with torchdiffeq's callbacks."""

    def __init__(self, method: ExplicitMethod, objective: Objective, start: Knot, visit: Visit, span: Span) -> None:
        self.knot = start
        self.last = start
        self.step_size = span.step_size
        self.tried = 0.0
        self.n_accepted = 0
        self.n_rejected = 0
        self._method = method
        self._objective = objective
        self._visit = visit
        self._limit = n_evaluations(objective.counts) + span.max_evals
        self._origin = start.t
        self._first = True
        self._accepted = False

    def end(self, status: RunStatus) -> RunEnd:
        """How the run ended."""
        approximate = self.n_accepted > 0 and not self._method.first_same_as_last
        return RunEnd(
            status, self.knot, self.step_size or 0.0, self.n_accepted, self.n_rejected, approximate, order=self._method.order
        )

    def begin_segment(self) -> None:
        """Start again from the last accepted point."""
        self._origin = self.knot.t
        self._first = True
        self._accepted = False

    def __call__(self, t: Tensor, theta: Tensor) -> Tensor:
        if self._first:
            self._first = False
            return -self.knot.gradient
        loss, gradient = self._objective.loss_and_gradient(theta)
        self.last = Knot(0.0, theta, loss, gradient)
        return -gradient

    def accept(self, theta: Tensor, t: float) -> None:
        """Make ``theta`` the last accepted point."""
        self.knot = Knot(t, theta, self.last.loss, self.last.gradient)

    def callback_step(self, t0: Tensor, theta: Tensor, dt: Tensor) -> None:
        """Before each trial step, with the step size before it is cut to hit the end time."""
        step_size = float(dt)
        if self._accepted:
            self._accepted = False
            if not bool(torch.isfinite(self.last.loss)) or not bool(torch.isfinite(self.last.gradient).all()):
                self.n_accepted -= 1
                raise _EndOfSegment("not finite")
            self.accept(theta, self._origin + float(t0))
            method = self._method
            arrival = Arrival(self.knot, step_size, None, not method.first_same_as_last, method.name, method.order)
            if step_size > 0 and self._visit(arrival):
                self.step_size = step_size
                raise _EndOfSegment("visit")
        # torchdiffeq's controller turns a NaN error estimate into a step size of zero.
        if not step_size > 0 or not math.isfinite(step_size):
            raise _EndOfSegment("not finite")
        self.step_size = self.tried = step_size
        if self._origin + float(t0) + step_size == self._origin + float(t0):
            raise _EndOfSegment("underflow")
        if n_evaluations(self._objective.counts) >= self._limit:
            raise _EndOfSegment("max_evals")

    def callback_accept_step(self, t0: Tensor, theta: Tensor, dt: Tensor) -> None:
        """After an accepted step; the new point comes with the next ``callback_step``."""
        self._accepted = True
        self.n_accepted += 1

    def callback_reject_step(self, t0: Tensor, theta: Tensor, dt: Tensor) -> None:
        """After a rejected step."""
        self.n_rejected += 1


METHODS = {
    method.name: method
    for method in (
        ExplicitMethod("dopri5", 5, True, 3),
        ExplicitMethod("dopri8", 8, True, 5),
        ExplicitMethod("bosh3", 3, True, 2),
        ExplicitMethod("fehlberg2", 2, False, 2),
        ExplicitMethod("adaptive_heun", 2, False, 2),
    )
}
