"""scipy's implicit methods LSODA, BDF and Radau by these names, with the Hessian as their Jacobian: a reference.

Everything goes through scipy's ``OdeSolver`` classes, one step at a time: their steps, error estimates, step-size control and
interpolants, for dθ/dt = −∇L(θ) with the Jacobian −H(θ), dense and in float64, whatever the objective's type and device are.
What the adapter adds: each accepted point is handed out with loss and gradient; the known first gradient is not computed
again; a Jacobian that is not finite at a trial point is the last finite one instead, so that the step is shortened as scipy
shortens it for gradients that are not finite; steps into regions without finite values are tried again, shorter, where
scipy itself does not.

scipy is imported when such a method first runs. (torchdiffeq 0.2.5 requires and imports it anyway.)

The solvers cannot be stopped and continued as if there had been no stop: each run starts at order 1 (LSODA, BDF).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_gradflow.flow.control import CLOCK
from torch_gradflow.flow.method import (
    Arrival,
    Derivative,
    FlowMethod,
    Interpolant,
    Memory,
    RunEnd,
    RunStatus,
    Span,
    Visit,
    n_evaluations,
)
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective

Array = npt.NDArray[np.float64]
# Steps into regions without finite values after which a flow that hardly advances any more is given up (as for torchdiffeq's).
PATIENCE = 40
# A call at a time so much earlier (relative) than all since the last accepted point belongs to a new, shorter try.
EARLIER = 1e-6
# Below it scipy divides by a scale of zero, where atol, θ and its change all are zero.
LEAST_ATOL = 1e-300


@dataclass(frozen=True)
class ScipyMethod(FlowMethod):
    """One of scipy's solvers.

    Attributes:
        name: The name of its class in ``scipy.integrate``.
        order: Its highest order.
        degree: The highest degree of its interpolant.
        n_points: One more: that many values of the interpolant are its memory.
    """

    name: str
    order: int
    degree: int
    n_points: int
    n_knots: int = 0
    needs: Derivative = "hessian"

    @property
    def step_order(self) -> int:
        """The order of each step, 0 where it varies: scipy does not tell it."""
        return self.order if self.name == "Radau" else 0

    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """See ``FlowMethod``; with a memory, the gradient at ``start`` is computed.

        Raises:
            ImportError: If scipy is not installed.
        """
        solver_class = find_solver(self.name)
        if span.t_end <= start.t:
            return RunEnd("t_end", start, span.step_size or 0.0, 0, 0)
        state = _Run(self, objective, start, span, visit, known=memory is None)
        failures: list[float] = []
        while True:
            n_accepted = state.n_accepted
            status = state.segment(solver_class)
            if status == "underflow" and state.step_size and state.n_accepted == n_accepted:
                # LSODA gives up after ten tries: a first step that was asked for may be longer than that. It chooses its own.
                state.step_size = 0.0
                continue
            failures.append(state.knot.t)
            stuck = len(failures) > PATIENCE and failures[-1] - failures[-PATIENCE] <= 1e-3 * (failures[-1] - start.t)
            if status != "not finite" or stuck or not state.shorten():
                return state.end(status)


METHODS = {
    method.name: method
    for method in (ScipyMethod("LSODA", 12, 12, 13), ScipyMethod("BDF", 5, 5, 6), ScipyMethod("Radau", 5, 3, 4))
}
"""scipy's methods by name."""


def find_solver(name: str) -> Callable[..., Any]:
    """The class of that name in ``scipy.integrate``.

    Raises:
        ImportError: If scipy is not installed.
    """
    try:
        module = importlib.import_module("scipy.integrate")
    except ImportError as error:
        raise ImportError(
            f"method={name!r} is scipy's, which is not installed: pip install scipy (or torch-gradflow[scipy])."
        ) from error
    solver: Callable[..., Any] = getattr(module, name)
    return solver


def to_array(values: Tensor) -> Array:
    """A copy in float64 on the CPU."""
    return np.array(values.detach().cpu().to(torch.float64).numpy())


def to_tensor(values: Array, like: Tensor) -> Tensor:
    """A copy (scipy may write to the array later) in the type and on the device of ``like``."""
    return torch.from_numpy(np.array(values)).to(dtype=like.dtype).to(device=like.device)


def nodes(start: float, end: float, degree: int) -> list[float]:
    """Times through which a polynomial of that degree is well conditioned on [start, end]: end, start, those between.

    They are the extrema of a Chebyshev polynomial.
    """
    between = [0.5 * (1 + math.cos(math.pi * k / degree)) for k in range(1, degree)]
    return [end, start, *(start + part * (end - start) for part in between)]


class _Run:
    """The right-hand side and the Jacobian as scipy calls them, and where the run stands."""

    def __init__(
        self, method: ScipyMethod, objective: Objective, start: Knot, span: Span, visit: Visit, *, known: bool
    ) -> None:
        self.knot = start
        self.step_size = span.step_size or 0.0
        self.n_accepted = 0
        self._method = method
        self._objective = objective
        self._span = span
        self._visit = visit
        self._limit = n_evaluations(objective.counts) + span.max_evals
        self._n_rejected = 0
        self._approximate = not known
        self._interpolant: Interpolant | None = None
        self._remember: Callable[[], Memory | None] = lambda: None
        self._note = ""
        # The last point at which the gradient was taken, in float64 as scipy has it, with what was found there.
        self._last = (to_array(start.theta) if known else np.full(0, math.nan), start.loss, start.gradient)
        self._jacobian: Array | None = None
        # The shortest way from the last accepted point to another one at which a gradient was taken since.
        self._earliest = math.inf

    def end(self, status: RunStatus) -> RunEnd:
        """How the run ended."""
        return RunEnd(
            status,
            self.knot,
            self.step_size,
            self.n_accepted,
            self._n_rejected,
            self._approximate,
            self._remember(),
            interpolant=self._interpolant,
            note=self._note,
            order=self._method.step_order,
        )

    def segment(self, solver_class: Callable[..., Any]) -> RunStatus:
        """A new solver from the last accepted point, up to the end of the run or of what it can do."""
        span = self._span
        if n_evaluations(self._objective.counts) >= self._limit:
            return "max_evals"
        self._jacobian = None
        left = span.t_end - self.knot.t
        try:
            solver = solver_class(
                self._slope,
                self.knot.t,
                to_array(self.knot.theta),
                span.t_end,
                rtol=span.rtol,
                atol=max(span.atol, LEAST_ATOL),
                jac=self._minus_hessian,
                first_step=min(self.step_size, left) or None,
                max_step=span.max_step,
            )
            self._earliest = math.inf
            while True:
                # LSODA warns of what its status says too, numpy of what is then seen not to be finite.
                with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
                    warnings.filterwarnings("ignore", "lsoda: ", UserWarning)
                    message = solver.step()
                status = self._stepped(solver, message)
                if status is not None:
                    return status
        except _NotFinite:
            return "not finite"

    def shorten(self) -> bool:
        """Try again from the last accepted point, a fifth as far as before; False where no step is left to try."""
        self.step_size = 0.2 * self._earliest
        return max(CLOCK * abs(self.knot.t), 1e-300) < self.step_size < math.inf

    def _stepped(self, solver: Any, message: str | None) -> RunStatus | None:
        """What a step of the solver means; None to go on."""
        if solver.status == "failed":
            self._note = f"scipy's {self._method.name} says: {message}"
            return "underflow" if bool(torch.isfinite(self._last[2]).all()) else "not finite"
        if not np.isfinite(solver.y).all():
            return "not finite"
        self._accept(solver)
        if solver.status == "finished":
            return "t_end"
        if self._visit(self._arrival()):
            return "visit"
        return "max_evals" if n_evaluations(self._objective.counts) >= self._limit else None

    def _accept(self, solver: Any) -> None:
        finished = solver.status == "finished"
        t = self._span.t_end if finished else float(solver.t)
        theta = to_tensor(solver.y, self.knot.theta)
        at, loss, gradient = self._last
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
            raise _NotFinite
        # The solvers evaluate last at the point that they accept (Radau), or within the tolerance of their iterations of it.
        self._approximate = not np.array_equal(at, solver.y)
        wanted = float(getattr(solver, "h_abs", t - self.knot.t))
        # A step that was cut to end somewhere says nothing against the step size that was wanted.
        self.step_size = max(wanted, self.step_size) if finished else wanted
        self._keep(solver.dense_output(), self.knot.t, t, theta)
        self.knot = Knot(t, theta, loss, gradient)
        self.n_accepted += 1
        self._earliest = math.inf

    def _keep(self, dense: Callable[[float], Array], before: float, t: float, theta: Tensor) -> None:
        """scipy's interpolant over the last step; and the same polynomial by its values, which outlive scipy's."""
        degree = self._method.degree

        def interpolant(at: float) -> Tensor:
            return to_tensor(dense(at), theta)

        def remember() -> Memory:
            times = nodes(before, t, degree)
            rows = [theta, *(interpolant(at) for at in times[1:])]
            return Memory(tuple(times), torch.stack(rows), degree, None, ())

        self._interpolant, self._remember = interpolant, remember

    def _arrival(self) -> Arrival:
        name, order = self._method.name, self._method.step_order
        return Arrival(self.knot, self.step_size, self._interpolant, self._approximate, name, order, self._remember)

    def _slope(self, t: float, y: Array) -> Array:
        """−∇L; each time that comes before all since the last accepted point belongs to another try, after a rejection."""
        since = float(t) - self.knot.t
        if 0 < since < (1 - EARLIER) * self._earliest:
            self._n_rejected += math.isfinite(self._earliest)
            self._earliest = since
        if not np.array_equal(self._last[0], y):
            self._last = (np.array(y), *self._objective.loss_and_gradient(to_tensor(y, self.knot.theta)))
        return -to_array(self._last[2])

    def _minus_hessian(self, t: float, y: Array) -> Array:
        """−H; the last finite one where it is not finite."""
        jacobian = -to_array(self._objective.hessian(to_tensor(y, self.knot.theta)))
        if np.isfinite(jacobian).all():
            self._jacobian = jacobian
        elif self._jacobian is None:
            raise _NotFinite
        return np.array(self._jacobian)


class _NotFinite(Exception):
    """Raised where a solver would go on with values that are not finite."""
