"""What a minimisation returns, and what it reports along the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from torch_gradflow.minimize.certificate import CriticalPoint

MinimizeStatus = Literal["converged", "rounding", "max_iter", "interrupted", "failed"]


@dataclass(frozen=True)
class MinimizeChoice:
    """A method that "auto" chose, or a saddle that was left.

    Attributes:
        n_iter: Iterations before it served.
        method: Its name.
        reason: Why.
    """

    n_iter: int
    method: str
    reason: str


@dataclass(frozen=True)
class MinimizeReport:
    """Where a running minimisation stands.

    Attributes:
        n_iter: Iterations so far.
        loss: L at the present point.
        grad_norm: ‖∇L‖ there, in the infinity norm.
        smallest_eigenvalue: Of the Hessian where the last step began; nan where it is not known.
        radius: Of the trust region, or the length of the step for methods without one.
    """

    n_iter: int
    loss: float
    grad_norm: float
    smallest_eigenvalue: float
    radius: float


@dataclass(frozen=True)
class MinimizeResult:
    """The end of a minimisation.

    Attributes:
        theta: The best point, shape ``(P,)``.
        loss: L there.
        grad_norm: ‖∇L‖ there, in the infinity norm.
        n_iter: Iterations.
        n_grad: Gradients evaluated, those of the certificate included.
        n_hvp: Hessian–vector products evaluated.
        n_hessian: Dense Hessians evaluated, those of the certificate included.
        n_jacobian: Jacobians of residuals evaluated.
        status: "converged" (gradient norm at most gtol), "rounding" (rounding errors hide any further progress, or the
            method gave up: the message says which),
            "max_iter", "interrupted" (Ctrl-C), "failed" (an exception in the objective, which is raised).
        message: The same as a sentence, with how fast it was converging where it did not arrive.
        method: The minimiser.
        certificate: What kind of point this is, or None where it was not asked for or the run was cut off.
        choices: What "auto" chose, when and why; and which saddles were left.
    """

    theta: Tensor
    loss: float
    grad_norm: float
    n_iter: int
    n_grad: int
    n_hvp: int
    n_hessian: int
    n_jacobian: int
    status: MinimizeStatus
    message: str
    method: str
    certificate: CriticalPoint | None
    choices: tuple[MinimizeChoice, ...] = ()
