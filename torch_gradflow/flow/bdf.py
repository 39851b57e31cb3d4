"""Backward differentiation with gradient and Hessian at the predicted point: the method of the long, stiff phase.

A method that linearises at the start of a step follows a curved valley only as far as its stiff directions stay the same;
at the predicted point, the end of the step up to (k + 1) tolerances, they already are those of the end. So one Newton step
from there is enough: one gradient, one Hessian, one Cholesky solve, nothing iterated, nothing kept. The spectrum is real, so
order 6 serves; a factorisation that fails shows a mode that grows faster than the step resolves (α/h + λ_min ≤ 0), and the
step is taken again, shorter: growth must be followed, not damped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from torch_gradflow.flow.control import CLOCK, Patience, first_step_size, norm, weights
from torch_gradflow.flow.dense import Clock, polynomial
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
    approaches,
    n_evaluations,
)
from torch_gradflow.flow.multistep import MAX_ORDER, MAX_POINTS, OrderControl, formula
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective

# The unit of logarithmic time, in first steps (between 100 and 10,000 the work on T33 differs by 3 %).
UNIT = 1000.0
# The order to begin with on points that another method took.
MOVED_ORDER = 4
# Beyond so many parameters the calls of tensor operations no longer count.
COMPILED_LIMIT = 2000
# Above this relative tolerance a second gradient verifies the linearisation: at 1e-5 it made errors at t = 1e7 four times
# smaller on T33, below 3e-6 it changed nothing.
VERIFY_ABOVE = 3e-6


@dataclass(frozen=True)
class Correction:
    """The solution of p′ + a δ = −∇L(θ_p + δ), linearised at the predicted point θ_p.

    Attributes:
        delta: δ, shape ``(P,)``.
        loss: L(θ_p).
        gradient: ∇L(θ_p), shape ``(P,)``.
    """

    delta: Tensor
    loss: Tensor
    gradient: Tensor


class Corrector(ABC):
    """How the equation of a step is solved; one object per run, with what it keeps from step to step."""

    @abstractmethod
    def solve(self, rows: Tensor, a: float) -> Correction | None:
        """δ for a prediction; None where the step is too long for an unstable mode.

        Args:
            rows: θ_p, p′, two more, and the sizes of tolerated errors: those of ``PlainAlgebra.predict``, shape ``(5, P)``.
            a: α/h > 0.
        """

    @abstractmethod
    def failed(self) -> None:
        """Called when a step was rejected."""

    def curvature(self) -> Tensor | None:
        """What it would have to remember, see ``Memory.curvature``."""
        return None

    def numbers(self) -> tuple[float, ...]:
        """The same as numbers."""
        return ()


class PlainAlgebra:
    """What a step computes from its history besides the solution of its equation, on tensors of any kind."""

    def predict(
        self, times: tuple[float, ...], t: float, clock: Clock, order: int, theta: Tensor, rtol: float, atol: float
    ) -> tuple[float, tuple[float, float, float], Tensor]:
        """α/h, constants and rows, for a step from ``times[0]`` to t.

        The constants are those of ``Formula`` for the orders k − 1, k, k + 1 (0 where there is no such order, or too few
        points); the rows p_k, its slope in t, p_{k−1}, p_{k+1} and the tolerated errors, shape ``(5, P)``.
        """
        now = times[0]
        # Reckoned from the newest one on: differences of large numbers would be lost.
        taus, tau = [0.0, *(-clock.between(other, now) for other in times[1:])], clock.between(now, t)
        speed = clock.rate(t) / tau
        plan = formula(taus, tau, order)
        wanted = (plan.predictor, [weight * speed for weight in plan.slope], plan.lower or [], plan.higher or [])
        rows = theta.new_tensor([row + [0.0] * (theta.shape[0] - len(row)) for row in wanted]) @ theta
        constants = (
            plan.constants[0] if plan.lower is not None else 0.0,
            plan.constants[1],
            plan.constants[2] if plan.higher is not None else 0.0,
        )
        return plan.alpha * speed, constants, torch.cat([rows, weights(rtol, atol, theta[0], rows[0])[None]])

    def finish(
        self, delta: Tensor, loss: Tensor, gradient: Tensor, a: float, theta: Tensor, rows: Tensor
    ) -> tuple[tuple[float, float, float], float, Tensor, Tensor, Tensor, Tensor]:
        """What follows from δ, and loss and gradient at the predicted point.

        The sizes of θ − p_j for j = k − 1, k, k + 1 in units of the tolerance; the loss at θ as a number; the new history;
        its first row, θ; the loss and the gradient there.
        """
        new = rows[0] + delta
        slope = -(rows[1] + a * delta)
        apart = (new - rows[[2, 0, 3]]) / rows[4]
        low, own, high = apart.square_().mean(1).sqrt_().tolist()
        loss = loss + 0.5 * ((gradient + slope) @ delta)
        return (low, own, high), float(loss), torch.cat([new[None], theta[: MAX_POINTS - 1]]), new, loss, slope


class CompiledAlgebra:
    """The same in compiled passes, see ``bdf_compiled``."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.predict, self.finish = module.predict, module.finish


@cache
def algebra_for(device: torch.device, dtype: torch.dtype, n_parameters: int) -> PlainAlgebra | CompiledAlgebra:
    """Which of them serves: compiled for few parameters in float64 on a CPU, where Numba can be imported."""
    if device.type != "cpu" or dtype != torch.float64 or n_parameters > COMPILED_LIMIT:
        return PlainAlgebra()
    try:
        return CompiledAlgebra(import_module("torch_gradflow.flow.bdf_compiled"))
    except ImportError:
        return PlainAlgebra()


class Direct(Corrector):
    """By the Hessian and its Cholesky factorisation.

    Args:
        objective: L.
        verify: Whether a second gradient, at the corrected point, confirms or mends the linearisation.
    """

    def __init__(self, objective: Objective, verify: bool) -> None:
        self._objective = objective
        self._verify = verify
        algebra = algebra_for(objective.device, objective.dtype, objective.n_parameters)
        few = isinstance(algebra, CompiledAlgebra) and objective.n_parameters <= algebra.module.CHOLESKY_LIMIT
        self._compiled = algebra.module if isinstance(algebra, CompiledAlgebra) and few else None

    def solve(self, rows: Tensor, a: float) -> Correction | None:
        """See ``Corrector``."""
        loss, gradient, hessian = self._objective.loss_gradient_hessian(rows[0])
        if self._compiled is not None and not self._verify:
            delta = self._compiled.solve(hessian, a, gradient, rows)
            return None if delta is None else Correction(delta, loss, gradient)
        diagonal = hessian.diagonal()
        kept = diagonal.clone()
        diagonal.add_(a)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        diagonal.copy_(kept)  # the objective may keep it
        if int(failed):
            return None
        delta = _solve(factor, -(gradient + rows[1]))
        if self._verify:
            return self._verified(rows, a, factor, Correction(delta, loss, gradient))
        return Correction(delta, loss, gradient)

    def failed(self) -> None:
        """Nothing is kept that could be to blame."""

    def _verified(self, rows: Tensor, a: float, factor: Tensor, found: Correction) -> Correction | None:
        """Simplified Newton iterations until they change less than a tenth of the tolerance; None if they do not settle."""
        delta, before = found.delta, math.inf
        for _ in range(4):
            _, gradient = self._objective.loss_and_gradient(rows[0] + delta)
            change = _solve(factor, -(gradient + rows[1] + a * delta))
            size = norm(change, rows[4])
            delta = delta + change
            if size < 0.1:
                return Correction(delta, found.loss, found.gradient)
            if size > 0.9 * before:
                return None
            before = size
        return None


class MultistepMethod(FlowMethod):
    """Variable-step, variable-order backward differentiation, with any way of solving its equation."""

    order = MAX_ORDER
    n_knots = 0
    n_points = MAX_POINTS

    @abstractmethod
    def corrector(self, objective: Objective, span: Span, memory: Memory | None) -> Corrector:
        """What solves the steps' equations in one run."""

    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """See ``FlowMethod``."""
        march = _March(self.name, objective, start, span, self.corrector(objective, span, memory), memory)
        limit = n_evaluations(objective.counts) + span.max_evals
        patience = Patience(start.t)
        status: RunStatus | None = "t_end" if span.t_end <= start.t else None
        while status is None:
            if n_evaluations(objective.counts) >= limit:
                status = "max_evals"
            elif march.stuck():
                status = "not finite" if math.isinf(march.error) else "underflow"
            elif march.step():
                if march.times[0] >= span.t_end:
                    status = "t_end"
                elif visit(march.arrival()):
                    status = "visit"
            elif math.isinf(march.error) and patience.exhausted(march.times[0]):
                status = "not finite"
        return march.end(status)

    def moved(
        self, memory: Memory | None, times: tuple[float, ...], theta: Tensor, gradient: Tensor, clock: Clock
    ) -> Memory | None:
        """See ``FlowMethod``."""
        degree = min(MOVED_ORDER, len(times) - 1)
        curvature = None if memory is None else memory.curvature
        return Memory(times, theta, degree, curvature, (float(degree), 0.0, 0.0), clock)


class Bdf(MultistepMethod):
    """Backward differentiation with dense Hessians."""

    name = "bdf"
    needs: Derivative = "hessian"

    def corrector(self, objective: Objective, span: Span, memory: Memory | None) -> Corrector:
        """See ``MultistepMethod``."""
        return Direct(objective, span.rtol > VERIFY_ABOVE)


class _March:
    """The state of one run: accepted points, the order, the step size to come."""

    def __init__(
        self, name: str, objective: Objective, start: Knot, span: Span, corrector: Corrector, memory: Memory | None
    ) -> None:
        self.error = 0.0
        self.n_accepted = self.n_rejected = 0
        self._order = 0
        self._name, self._span, self._corrector = name, span, corrector
        self._algebra = algebra_for(objective.device, objective.dtype, objective.n_parameters)
        self._slope0 = -start.gradient
        self._knot, self._approximate = start, False
        self._h = span.step_size or first_step_size(
            start.theta, start.gradient, cap=span.t_end - start.t, rtol=span.rtol, atol=span.atol
        )
        if memory is not None and memory.clock is not None and memory.times[0] == start.t:
            self.times, self._theta, self._degree = memory.times, memory.theta, memory.degree
            order, n_steps, n_rejected, *_ = memory.numbers
            self._control = OrderControl(int(order), int(n_steps), int(n_rejected))
            self._clock = memory.clock
        else:
            self.times, self._theta, self._degree = (start.t,), start.theta[None], 0
            self._control = OrderControl()
            self._clock = Clock(start.t, UNIT * self._h)

    def stuck(self) -> bool:
        """Whether the step size is below what moves the clock."""
        t = self.times[0]
        return t + self._h == t or self._h <= CLOCK * abs(t) or self._h < 1e-300

    def step(self) -> bool:
        """Try a step; whether it was accepted."""
        t, clock = self.times[0], self._clock
        h = min(approaches(t, self._h, self._span.t_end), self._span.max_step)
        t_new = self._span.t_end if h == self._span.t_end - t else t + h
        order = min(self._control.order, max(1, len(self.times) - 1))
        rtol, atol = self._span.rtol, self._span.atol
        if len(self.times) == 1:
            constants = (0.0, 0.5, 0.0)
            a, slope, current = 1 / h, self._slope0, self._theta[0]
            predicted = current + h * slope
            tolerated = weights(rtol, atol, current, predicted)
            rows = torch.stack([predicted, slope, predicted, predicted, tolerated])
        else:
            a, constants, rows = self._algebra.predict(self.times, t_new, clock, order, self._theta, rtol, atol)
        found = self._corrector.solve(rows, a)
        if found is None:
            return self._reject(math.inf, h, self.error)
        (low, own, high), value, theta, new, loss, gradient = self._algebra.finish(
            found.delta, found.loss, found.gradient, a, self._theta, rows
        )
        below, here, above = constants
        own *= here
        if not own <= 1 or not math.isfinite(value):
            error = own if own > 1 else math.inf
            return self._reject(error, h, error)
        control = OrderControl(order, self._control.n_steps, self._control.n_rejected)
        lower, higher = low * below if below else None, high * above if above else None
        factor, self._control = control.accepted(own, lower, higher, len(self.times) == 1)
        self._knot, self._approximate = Knot(t_new, new, loss, gradient), True
        self.times, self._theta = (t_new, *self.times[: MAX_POINTS - 1]), theta
        self._degree = min(order + 1, len(self.times) - 1)
        self.error = own
        self._order = order
        self.n_accepted += 1
        longer = clock.after(t_new, factor * clock.between(t, t_new))
        # A step that was cut to end somewhere says nothing against the step size that was wanted.
        self._h = max(self._h, longer) if h < self._h else longer
        return True

    def _reject(self, error: float, h: float, kept: float) -> bool:
        self.n_rejected += 1
        self.error = kept
        self._corrector.failed()
        factor, self._control = self._control.rejected(error)
        if self._control.n_rejected >= 3 and len(self.times) > 2:
            # The past says nothing any more.
            self.times, self._theta = self.times[:2], self._theta[:2]
        self._h = h * factor
        return False

    def _interpolant(self) -> Interpolant:
        times, theta, clock = self.times[: self._degree + 1], self._theta, self._clock
        return lambda t: polynomial(t, times, theta, clock)

    def _memory(self) -> Memory:
        control, clock = self._control, self._clock
        state = (float(control.order), float(control.n_steps), float(control.n_rejected))
        numbers = (*state, *self._corrector.numbers())
        return Memory(self.times, self._theta, self._degree, self._corrector.curvature(), numbers, clock)

    def arrival(self) -> Arrival:
        """The step that was accepted."""
        return Arrival(self._knot, self._h, self._interpolant(), True, self._name, self._order, self._memory)

    def end(self, status: RunStatus) -> RunEnd:
        """How the run ended."""
        return RunEnd(
            status,
            self._knot,
            self._h,
            self.n_accepted,
            self.n_rejected,
            self._approximate,
            self._memory(),
            interpolant=self._interpolant() if self.n_accepted else None,
            order=self._order,
        )


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], factor)[:, 0]
