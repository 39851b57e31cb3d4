"""What integrators and minimisers see of a problem: L(θ) of one flat vector, and its derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.objectives.least_squares import LeastSquares

NO_RESIDUALS = "the loss of this objective is not known as a sum of squares."


@dataclass
class EvaluationCounts:
    """How often each derivative was evaluated.

    Attributes:
        n_grad: Gradients, each with its loss; the backward pass that a closure ran itself is one. So is a vector of residuals
            (half a gradient's work), and a product with a transposed Jacobian.
        n_hvp: Hessian–vector products, one per vector.
        n_hessian: Dense Hessians.
        n_closure: Calls of the user's closure (0 where there is none).
        n_jacobian: Jacobians of residuals, each with its triangular factor.
    """

    n_grad: int = 0
    n_hvp: int = 0
    n_hessian: int = 0
    n_closure: int = 0
    n_jacobian: int = 0


class Objective(ABC):
    """A twice differentiable function L of one flat parameter vector θ of shape ``(P,)``.

    Every method takes θ on ``device`` in ``dtype``, leaves it unchanged, returns tensors that are detached
    from any graph, and counts itself in ``counts``.

    Attributes:
        n_parameters: P, the length of θ.
        dtype: The floating type in which θ travels and derivatives come back.
        device: Where θ lives.
        resolution: The rounding unit of losses and gradients: that of the narrowest type in which they are computed.
        counts: Evaluations so far.
    """

    n_parameters: int
    dtype: torch.dtype
    device: torch.device
    resolution: float
    counts: EvaluationCounts

    @abstractmethod
    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ), a 0-dimensional tensor, and ∇L(θ) of shape ``(P,)``."""

    @abstractmethod
    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V for ``vectors`` V of shape ``(P,)`` or ``(P, k)``; the result has the shape of V."""

    @abstractmethod
    def hessian(self, theta: Tensor) -> Tensor:
        """The dense, symmetric H(θ) of shape ``(P, P)``."""

    @property
    def has_residuals(self) -> bool:
        """Whether L(θ) = ½‖r(θ)‖² with known residuals r; the next three methods raise ``NotImplementedError`` where not."""
        return False

    def residuals(self, theta: Tensor) -> Tensor:
        """r(θ), shape ``(M,)``."""
        raise NotImplementedError(NO_RESIDUALS)

    def pull_back(self, theta: Tensor, cotangent: Tensor) -> Tensor:
        """J(θ)ᵀu for the Jacobian J of r and ``cotangent`` u of shape ``(M,)``; shape ``(P,)``."""
        raise NotImplementedError(NO_RESIDUALS)

    def least_squares(self, theta: Tensor) -> LeastSquares:
        """L(θ), ∇L(θ) and the triangular factor of J(θ); counted as one Jacobian."""
        raise NotImplementedError(NO_RESIDUALS)

    def compensated(self) -> Objective:
        """The same function, with loss and gradient rounded only once, where that is offered.

        Raises:
            NotImplementedError: With the reason, where it is not.
        """
        raise NotImplementedError("a compensated gradient is offered for perceptrons in closed form only.")

    def kind(self) -> tuple[Any, ...]:
        """What its costs depend on: objectives of the same kind take about as long."""
        return type(self).__name__, self.n_parameters, self.dtype, self.device.type

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(θ), ∇L(θ) and H(θ); where they come in one pass, counted as one Hessian."""
        loss, gradient = self.loss_and_gradient(theta)
        return loss, gradient, self.hessian(theta)

    def loss_and_gradient_many(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """L, shape ``(m,)``, and ∇L, shape ``(m, P)``, at the rows of ``thetas``, shape ``(m, P)``; m gradients."""
        losses, gradients = zip(*map(self.loss_and_gradient, thetas), strict=True)
        return torch.stack(losses), torch.stack(gradients)

    def loss_gradient_hessian_many(self, thetas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H, this of shape ``(m, P, P)``, at the rows of ``thetas``, shape ``(m, P)``."""
        losses, gradients, hessians = zip(*map(self.loss_gradient_hessian, thetas), strict=True)
        return torch.stack(losses), torch.stack(gradients), torch.stack(hessians)


def check_start(objective: Objective, theta0: Tensor) -> None:
    """Check that ``theta0`` is a point of ``objective``.

    Raises:
        TypeError, ValueError: Naming the argument.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, for instance a ModuleObjective, not {objective!r}.")
    if not isinstance(theta0, Tensor):
        raise TypeError(f"theta0 must be a tensor, not {theta0!r}.")
    if theta0.shape != (objective.n_parameters,):
        raise ValueError(f"theta0 must have the shape ({objective.n_parameters},), not {tuple(theta0.shape)}.")
    if theta0.dtype != objective.dtype or theta0.device != objective.device:
        raise TypeError(
            f"theta0 must be of the objective's type and device, {objective.dtype} on {objective.device}, not "
            f"{theta0.dtype} on {theta0.device}."
        )


class DerivativeError(RuntimeError):
    """No way of computing a derivative gave a result that could be confirmed."""


class ClosureError(RuntimeError):
    """The training closure breaks the contract that an optimizer which evaluates it elsewhere relies on."""
