"""What integrators and minimisers see of a problem: L(θ) of one flat vector, and its derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class EvaluationCounts:
    """How often each derivative was evaluated.

    Attributes:
        n_grad: Gradients, each with its loss; the backward pass that a closure ran itself is one.
        n_hvp: Hessian–vector products, one per vector.
        n_hessian: Dense Hessians.
        n_closure: Calls of the user's closure (0 where there is none).
    """

    n_grad: int = 0
    n_hvp: int = 0
    n_hessian: int = 0
    n_closure: int = 0


class Objective(ABC):
    """A twice differentiable function L of one flat parameter vector θ of shape ``(P,)``.

    Every method takes θ on ``device`` in ``dtype``, leaves it unchanged, returns tensors that are detached
    from any graph, and counts itself in ``counts``.

    Attributes:
        n_parameters: P.
        dtype: The floating type in which θ travels and derivatives come back.
        device: Where θ lives.
        counts: Evaluations so far.
    """

    n_parameters: int
    dtype: torch.dtype
    device: torch.device
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


class DerivativeError(RuntimeError):
    """No way of computing a derivative gave a result that could be confirmed."""


class ClosureError(RuntimeError):
    """The training closure breaks the contract that an optimizer which evaluates it elsewhere relies on."""
