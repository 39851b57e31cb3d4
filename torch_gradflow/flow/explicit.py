"""torchdiffeq's adaptive explicit Runge–Kutta methods behind one adapter.

Everything goes through torchdiffeq's public ``odeint``: its steps, its error estimate and its step-size control. What the
adapter adds, by the callbacks that ``odeint`` offers: each accepted point is handed out with its loss and gradient, with
no further evaluation; the last step size is carried on; the end time is hit exactly (``step_t``; otherwise torchdiffeq
steps past it and interpolates); the known first gradient is not computed again; and what torchdiffeq reports by a failing
assertion (step-size underflow, non-finite values) becomes a status with the last accepted point at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective

# Trial steps into regions without finite values after which a flow that hardly advances any more is given up.
PATIENCE = 40
# Called with an accepted point and the step size to come; True ends the run there.
Visit = Callable[[Knot, float], bool]
RunStatus = Literal["t_end", "visit", "max_evals", "underflow", "not finite"]


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        status: "t_end", "visit" (the visitor stopped it), "max_evals", "underflow" or "not finite".
        knot: The last accepted point.
        step_size: The step size that the controller would take next.
        n_accepted: Accepted steps.
        n_rejected: Rejected steps.
    """

    status: RunStatus
    knot: Knot
    step_size: float
    n_accepted: int
    n_rejected: int


@dataclass(frozen=True)
class ExplicitMethod:
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

    def run(
        self,
        objective: Objective,
        start: Knot,
        t_end: float,
        *,
        rtol: float,
        atol: float,
        step_size: float | None,
        visit: Visit,
        max_evals: float = math.inf,
        max_step: float = math.inf,
    ) -> RunEnd:
        """Integrate dθ/dt = −∇L(θ) from ``start`` to exactly ``t_end``, which may be infinite.

        Args:
            objective: L.
            start: The first point, with its loss and gradient.
            t_end: Where to end.
            rtol: Relative tolerance of the local error, in torchdiffeq's root-mean-square norm.
            atol: Absolute tolerance.
            step_size: The first step size to try; None lets torchdiffeq choose it (one more gradient).
            visit: Called at each accepted point but the one at ``t_end``.
            max_evals: Gradients that may be spent; checked before each step.
            max_step: The longest step.
        """
        state = _Run(self, objective, start, visit, max_evals, step_size)
        failures: list[float] = []
        while True:
            end = self._segment(state, t_end, rtol, atol, max_step)
            if end != "not finite":
                return RunEnd(end, state.knot, state.step_size or 0.0, state.n_accepted, state.n_rejected)
            # A trial step left the region where L is finite: try again from the last accepted point, shorter.
            state.n_rejected += 1
            failures.append(state.knot.t)
            if len(failures) > PATIENCE and failures[-1] - failures[-PATIENCE] <= 1e-3 * (failures[-1] - start.t):
                return RunEnd("not finite", state.knot, state.step_size or 0.0, state.n_accepted, state.n_rejected)
            state.step_size = 0.2 * (state.tried if state.tried > 0 else state.step_size or 1.0)
            if state.knot.t + state.step_size * 1e-3 == state.knot.t or state.step_size < 1e-300:
                return RunEnd("not finite", state.knot, state.step_size, state.n_accepted, state.n_rejected)

    def _segment(self, state: _Run, t_end: float, rtol: float, atol: float, max_step: float) -> RunStatus:
        device = state.knot.theta.device
        time_dtype = torch.float32 if device.type == "mps" else torch.float64
        state.begin_segment()
        length = t_end - state.knot.t
        times = torch.tensor([0.0, length], dtype=time_dtype, device=device)
        options: dict[str, Any] = {"dtype": time_dtype, "max_step": max_step}
        if math.isfinite(length):
            options["step_t"] = times[1:]
        if state.step_size:
            options["first_step"] = min(state.step_size, length)
        try:
            with torch.no_grad():
                path = odeint(state, state.knot.theta, times, rtol=rtol, atol=atol, method=self.name, options=options)
        except _EndOfSegment as end:
            return end.status
        if not bool(torch.isfinite(state.last.loss)) or not bool(torch.isfinite(state.last.gradient).all()):
            state.n_accepted -= 1
            return "not finite"
        state.accept(path[-1] if not self.first_same_as_last else state.last.theta, t_end)
        return "t_end"


class _EndOfSegment(Exception):
    """Raised inside odeint's callbacks to leave it."""

    def __init__(self, status: RunStatus) -> None:
        super().__init__(status)
        self.status = status


class _Run:
    """The right-hand side −∇L as torchdiffeq calls it, with torchdiffeq's callbacks."""

    def __init__(
        self,
        method: ExplicitMethod,
        objective: Objective,
        start: Knot,
        visit: Visit,
        max_evals: float,
        step_size: float | None,
    ) -> None:
        self.knot = start
        self.last = start
        self.step_size = step_size
        self.tried = 0.0
        self.n_accepted = 0
        self.n_rejected = 0
        self._method = method
        self._objective = objective
        self._visit = visit
        self._limit = objective.counts.n_grad + max_evals
        self._origin = start.t
        self._first = True
        self._accepted = False

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
            if step_size > 0 and self._visit(self.knot, step_size):
                self.step_size = step_size
                raise _EndOfSegment("visit")
        # torchdiffeq's controller turns a NaN error estimate into a step size of zero.
        if not step_size > 0 or not math.isfinite(step_size):
            raise _EndOfSegment("not finite")
        self.step_size = self.tried = step_size
        if self._origin + float(t0) + step_size == self._origin + float(t0):
            raise _EndOfSegment("underflow")
        if self._objective.counts.n_grad >= self._limit:
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


def find_method(name: str) -> ExplicitMethod:
    """The method of that name; "auto" is dopri5, the best of torchdiffeq's at the tolerances 1e-4 to 1e-8.

    Raises:
        ValueError: For an unknown name.
    """
    if name == "auto":
        return METHODS["dopri5"]
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, METHODS))}, not {name!r}.")
    return METHODS[name]
