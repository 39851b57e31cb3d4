"""What travels out of an integration: accepted points, reports along the way, the solution at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Status = Literal["t_end", "stopped", "max_evals", "underflow", "not finite", "interrupted", "failed"]


@dataclass(frozen=True)
class Knot:
    """An accepted point of a flow.

    Attributes:
        t: Flow time.
        theta: θ(t), shape ``(P,)``.
        loss: L, a 0-dimensional tensor.
        gradient: ∇L, shape ``(P,)``.
    """

    t: float
    theta: Tensor
    loss: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Sample:
    """A point of a solution, and where the run stood when it was taken.

    Attributes:
        knot: The point.
        step: Length of the accepted step that ends at the point or contains it; nan at the start.
        order: Its order; 0 at the start, and where the method does not tell.
        seconds: Wall time since the start of the run.
        evaluations: Gradients, Hessian–vector products and Hessians since then.
    """

    knot: Knot
    step: float
    order: int
    seconds: float
    evaluations: tuple[int, int, int]


@dataclass(frozen=True)
class Choice:
    """A method that "auto" chose.

    Attributes:
        t: Flow time from which on it served.
        method: Its name.
        reason: Why.
    """

    t: float
    method: str
    reason: str


def add_choices(earlier: tuple[Choice, ...], later: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Both, without those that only go on with the method that served anyway."""
    for choice in later:
        if not earlier or choice.method != earlier[-1].method:
            earlier = (*earlier, choice)
    return earlier


@dataclass(frozen=True)
class FlowReport:
    """Where a running integration stands: what stopping rules and progress displays see.

    Attributes:
        t: Flow time.
        loss: L at the last accepted point.
        grad_norm: ‖∇L‖ there, in the infinity norm.
        n_grad: Gradients evaluated so far.
        elapsed: Wall time since the start, in seconds.
        step_size: The step size that comes next, in flow time.
    """

    t: float
    loss: float
    grad_norm: float
    n_grad: int
    elapsed: float
    step_size: float


@dataclass(frozen=True)
class FlowSolution:
    """A sampled solution of the gradient flow.

    Attributes:
        t: Flow times of the samples, shape ``(n,)``, float64 on the CPU.
        theta: θ at those times, shape ``(n, P)``.
        loss: L at those times, shape ``(n,)``, float64 on the CPU.
        grad_norm: ‖∇L‖ in the infinity norm at those times, shape ``(n,)``, float64 on the CPU.
        n_grad: Gradients evaluated, the first one and those for samples included.
        n_hessian: Dense Hessians evaluated.
        n_hvp: Hessian–vector products evaluated.
        n_accepted: Accepted steps.
        n_rejected: Rejected steps.
        status: "t_end" (reached the end), "stopped" (by a stopping rule), "max_evals", "underflow" (no step is small
            enough for the tolerance), "not finite" (loss or gradient overflow), "interrupted" (Ctrl-C), "failed" (an
            exception in the objective, which is raised).
        message: The same as a sentence.
        method: The integrator.
        step_size: The step size that would have come next.
        dissipation_error: How far what the loss lost is from ∫‖∇L‖² dt along the accepted points, relative; see
            ``torch_gradflow.flow.energy``.
        choices: What "auto" chose, when and why.
        path: θ(t) at any time within the solution, where ``dense_output`` was asked for; else None.
        global_error: ‖Δθ‖/‖θ‖ at the samples against a run with a tenth of the tolerances, shape ``(n,)``, where it was
            asked for; else None.
        step_sizes: Lengths of the accepted steps that end at the samples, or contain them, shape ``(n,)``; nan at the start.
            None, as the next three, for a solution of which only the points are known.
        orders: Orders of those steps, shape ``(n,)``, int64; 0 at the start and where the method does not tell (LSODA, BDF).
        seconds: Wall time from the start of the run until each sample was taken, shape ``(n,)``.
        evaluations: Gradients, Hessian–vector products and Hessians until then, shape ``(n, 3)``, int64.
    """

    t: Tensor
    theta: Tensor
    loss: Tensor
    grad_norm: Tensor
    n_grad: int
    n_hessian: int
    n_hvp: int
    n_accepted: int
    n_rejected: int
    status: Status
    message: str
    method: str
    step_size: float
    dissipation_error: float = math.nan
    choices: tuple[Choice, ...] = ()
    path: Callable[[float], Tensor] | None = None
    global_error: Tensor | None = None
    step_sizes: Tensor | None = None
    orders: Tensor | None = None
    seconds: Tensor | None = None
    evaluations: Tensor | None = None
