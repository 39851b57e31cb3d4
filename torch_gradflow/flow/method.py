"""What the driver, optimizers and "auto" see of an integrator: a name, what it needs, a run from one point to a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from torch_gradflow.flow.dense import Clock, polynomial
from torch_gradflow.flow.solution import Choice, Knot
from torch_gradflow.objectives.base import EvaluationCounts, Objective

# Values between the last accepted point and the one before it: θ(t), shape ``(P,)``.
Interpolant = Callable[[float], Tensor]
RunStatus = Literal["t_end", "visit", "max_evals", "underflow", "not finite"]
Derivative = Literal["gradient", "hvp", "hessian"]


@dataclass(frozen=True)
class Arrival:
    """An accepted step, as a visitor sees it.

    Attributes:
        knot: The accepted point.
        step_size: The step size to come.
        interpolant: θ(t) from the accepted point before this one up to this one by the method's own polynomial; None where
            the slopes at accepted points serve (``HermiteWindow``).
        approximate: Whether the knot's loss and gradient are those of the method's linearisation (their error is that of
            the square of the tolerance), or of another nearby point: whoever keeps them evaluates them anew.
        method: The integrator that took the step.
        order: The order of the step; 0 where the integrator does not tell.
        remember: What a run needs to go on from here, see ``Memory``.
    """

    knot: Knot
    step_size: float
    interpolant: Interpolant | None
    approximate: bool
    method: str
    order: int
    remember: Callable[[], Memory | None] = lambda: None


# Called with each accepted step; True ends the run there.
Visit = Callable[[Arrival], bool]


@dataclass(frozen=True)
class Memory:
    """What a method with memory carries from one run to the next, to go on as if there had been no end.

    Everything is rows of length P, or numbers, so that it fits into any optimizer's state and any checkpoint.

    Attributes:
        times: Flow times of accepted points, newest first.
        theta: θ there, shape ``(len(times), P)``.
        degree: Between the two newest points the polynomial of this degree through the newest ones is the solution; 0 where
            there is no such polynomial.
        curvature: What is known of the Hessian, shape ``(n, P)``, shared and never written to; or None.
        numbers: Order and the like, as the method needs.
        clock: The time in which that polynomial is one; None for t itself.
    """

    times: tuple[float, ...]
    theta: Tensor
    degree: int
    curvature: Tensor | None
    numbers: tuple[float, ...]
    clock: Clock | None = None

    def covers(self, t: float) -> bool:
        """Whether t lies between the two newest points."""
        return self.degree > 0 and self.times[1] <= t <= self.times[0]

    def __call__(self, t: float) -> Tensor:
        """θ(t) there, shape ``(P,)``."""
        return polynomial(t, self.times[: self.degree + 1], self.theta, self.clock)


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        status: "t_end", "visit" (the visitor stopped it), "max_evals", "underflow" or "not finite".
        knot: The last accepted point.
        step_size: The step size that the controller would take next.
        n_accepted: Accepted steps.
        n_rejected: Rejected steps.
        approximate: Whether the knot's loss and gradient are approximate, see ``Arrival``.
        memory: What the method needs to go on, or None.
        choices: What "auto" chose, when and why.
        interpolant: θ(t) over the last step, see ``Arrival``.
        note: What the message should say besides the status, or "".
        order: Of the last step, see ``Arrival``.
    """

    status: RunStatus
    knot: Knot
    step_size: float
    n_accepted: int
    n_rejected: int
    approximate: bool = False
    memory: Memory | None = None
    choices: tuple[Choice, ...] = ()
    interpolant: Interpolant | None = None
    note: str = ""
    order: int = 0


@dataclass(frozen=True)
class Span:
    """What a run is asked for.

    Attributes:
        t_end: Where to end exactly, may be infinite.
        rtol: Relative tolerance of the local error.
        atol: Absolute tolerance.
        step_size: The first step size to try; None lets the method choose it.
        max_evals: Gradients, Hessian–vector products and Hessians that may be spent together; checked before each step.
        max_step: The longest step.
    """

    t_end: float
    rtol: float
    atol: float
    step_size: float | None = None
    max_evals: float = math.inf
    max_step: float = math.inf


class FlowMethod(ABC):
    """An integrator of dθ/dt = −∇L(θ).

    Attributes:
        name: By which users choose it.
        order: The (highest) order of its local polynomial.
        needs: The highest derivative that it evaluates.
        n_knots: Accepted points, with their slopes, through which values between steps are interpolated
            (``HermiteWindow``); 0 for methods with an interpolant of their own.
        n_points: Accepted points that its memory holds at most; 0 for methods without memory.
    """

    name: str
    order: int
    needs: Derivative
    n_knots: int
    n_points: int

    @abstractmethod
    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """Integrate from ``start`` to exactly ``span.t_end``.

        Args:
            objective: L.
            start: The first point, with its loss and gradient.
            span: Where to, and how accurately.
            visit: Called at each accepted point but the one at ``t_end``.
            memory: What an earlier run of this method on the same objective left, if it ended at ``start``; else None.
        """

    def moved(
        self, memory: Memory | None, times: tuple[float, ...], theta: Tensor, gradient: Tensor, clock: Clock
    ) -> Memory | None:
        """A memory that ends at other accepted points, which another method took, with what this one knew of the Hessian.

        Args:
            memory: What this method left elsewhere on the same objective, or None.
            times: Flow times of accepted points, newest first, at least two.
            theta: θ there, shape ``(len(times), P)``.
            gradient: ∇L at the newest.
            clock: The time in which to go on.

        Returns:
            The memory; None for methods that need none.
        """
        return None


def n_evaluations(counts: EvaluationCounts) -> int:
    """What ``max_evals`` bounds."""
    return counts.n_grad + counts.n_hvp + counts.n_hessian


def approaches(t: float, step_size: float, t_end: float) -> float:
    """The step size, cut or stretched by a hair to end at ``t_end``, or half the rest where that is less."""
    left = t_end - t
    if step_size >= left * (1 - 1e-10):
        return left
    return step_size if step_size <= 0.5 * left else 0.5 * left
