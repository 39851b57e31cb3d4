"""Objectives made of others: with weight decay and norm barrier, and in rescaled coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.least_squares import LeastSquares


@dataclass(frozen=True)
class Penalties:
    """F(θ) = s L(θ) + ½ Σ λ_i θ_i² + B(‖θ‖² / 2P).

    The barrier B(w) = (w − c)³/3 for w > c, else 0, keeps norms finite where a minimum lies at infinity (Brea et al.,
    arXiv 2301.10638, section 2). Both penalties are minimised also where L is maximised (s = −1).

    Attributes:
        weight_decay: λ, a number per parameter, shape ``(P,)``, or None.
        max_norm: c, or None for no barrier.
        sign: s, 1.0 to minimise L, −1.0 to maximise it.
    """

    weight_decay: Tensor | None = None
    max_norm: float | None = None
    sign: float = 1.0

    def excess(self, theta: Tensor) -> Tensor:
        """max(0, w − c) for w = ‖θ‖²/(2P)."""
        c = float("inf") if self.max_norm is None else self.max_norm
        return (theta @ theta / (2 * theta.numel()) - c).clamp(min=0.0)

    def add(self, theta: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """F and ∇F at θ from L and ∇L there."""
        loss, gradient = self.sign * loss, self.sign * gradient
        if self.weight_decay is not None:
            decay = self.weight_decay * theta
            loss = loss + 0.5 * (decay @ theta)
            gradient = gradient + decay
        if self.max_norm is not None:
            excess = self.excess(theta)
            loss = loss + excess**3 / 3
            gradient = gradient + excess**2 / theta.numel() * theta
        return loss, gradient

    def add_products(self, theta: Tensor, products: Tensor, columns: Tensor) -> Tensor:
        """∇²F V from ∇²L V, both of shape ``(P, k)``."""
        products = self.sign * products
        if self.weight_decay is not None:
            products = products + self.weight_decay[:, None] * columns
        if self.max_norm is not None:
            excess, n = self.excess(theta), theta.numel()
            products = products + excess**2 / n * columns + 2 * excess / n**2 * torch.outer(theta, theta @ columns)
        return products


class Regularized(Objective):
    """L with ``penalties``.

    Args:
        base: L.
        penalties: What is added, and the sign of L.
    """

    def __init__(self, base: Objective, penalties: Penalties) -> None:
        self.n_parameters = base.n_parameters
        self.dtype = base.dtype
        self.device = base.device
        self.resolution = base.resolution
        self.counts: EvaluationCounts = base.counts
        self._base = base
        self._penalties = penalties

    @property
    def base(self) -> Objective:
        """L."""
        return self._base

    @property
    def penalties(self) -> Penalties:
        """What is added."""
        return self._penalties

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return "regularized", *self._base.kind()

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """F(θ) and ∇F(θ)."""
        return self._penalties.add(theta, *self._base.loss_and_gradient(theta))

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """∇²F(θ) V."""
        columns = vectors.reshape(self.n_parameters, -1)
        products = self._penalties.add_products(theta, self._base.hvp(theta, columns), columns)
        return products.reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """∇²F(θ)."""
        return self._add_hessian(theta, self._base.hessian(theta))

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F(θ), ∇F(θ) and ∇²F(θ)."""
        loss, gradient, hessian = self._base.loss_gradient_hessian(theta)
        return *self._penalties.add(theta, loss, gradient), self._add_hessian(theta, hessian)

    @property
    def has_residuals(self) -> bool:
        """Whether F is a sum of squares: weight decay is one, the barrier is not, nor is what is maximised."""
        penalties = self._penalties
        decays = penalties.weight_decay is None or bool((penalties.weight_decay >= 0).all())
        return self._base.has_residuals and penalties.max_norm is None and penalties.sign == 1.0 and decays

    def residuals(self, theta: Tensor) -> Tensor:
        """Those of L, and √λ θ."""
        decay, residuals = self._penalties.weight_decay, self._base.residuals(theta)
        return residuals if decay is None else torch.cat([residuals, decay.sqrt() * theta])

    def pull_back(self, theta: Tensor, cotangent: Tensor) -> Tensor:
        """J(θ)ᵀu."""
        decay = self._penalties.weight_decay
        if decay is None:
            return self._base.pull_back(theta, cotangent)
        n = self.n_parameters
        return self._base.pull_back(theta, cotangent[:-n]) + decay.sqrt() * cotangent[-n:]

    def least_squares(self, theta: Tensor) -> LeastSquares:
        """F(θ), ∇F(θ) and the factor of J(θ)."""
        decay, base = self._penalties.weight_decay, self._base.least_squares(theta)
        return base if decay is None else base.with_decay(theta, decay)

    def compensated(self) -> Regularized:
        """With L compensated; the penalties are added in float64."""
        return Regularized(self._base.compensated(), self._penalties)

    def _add_hessian(self, theta: Tensor, hessian: Tensor) -> Tensor:
        eye = torch.eye(self.n_parameters, dtype=self.dtype, device=self.device)
        return self._penalties.add_products(theta, hessian, eye)


class Rescaled(Objective):
    """L in the coordinates φ = D^(-½) θ, in which the flow dθ/dt = −D ∇L(θ) is again a plain gradient flow.

    Inverse time constants D = diag(d), one per parameter, so become part of the objective: its gradient is D^½ ∇L, its
    Hessian the symmetric D^½ H D^½.

    Args:
        base: L(θ).
        inverse_time_constants: d, positive, shape ``(P,)``.
    """

    def __init__(self, base: Objective, inverse_time_constants: Tensor) -> None:
        self.n_parameters = base.n_parameters
        self.dtype = base.dtype
        self.device = base.device
        self.resolution = base.resolution
        self.counts: EvaluationCounts = base.counts
        self._base = base
        self._root = inverse_time_constants.sqrt()

    @property
    def base(self) -> Objective:
        """L."""
        return self._base

    @property
    def scale(self) -> Tensor:
        """What multiplies φ in θ, D^½."""
        return self._root

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return "rescaled", *self._base.kind()

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(D^½ φ) and D^½ ∇L(D^½ φ)."""
        loss, gradient = self._base.loss_and_gradient(self._root * theta)
        return loss, self._root * gradient

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """D^½ H D^½ V."""
        columns = vectors.reshape(self.n_parameters, -1)
        products = self._root[:, None] * self._base.hvp(self._root * theta, self._root[:, None] * columns)
        return products.reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """D^½ H D^½."""
        return self._root[:, None] * self._base.hessian(self._root * theta) * self._root

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, D^½ ∇L and D^½ H D^½."""
        loss, gradient, hessian = self._base.loss_gradient_hessian(self._root * theta)
        return loss, self._root * gradient, self._root[:, None] * hessian * self._root

    @property
    def has_residuals(self) -> bool:
        """Whether L has."""
        return self._base.has_residuals

    def residuals(self, theta: Tensor) -> Tensor:
        """r(D^½ φ)."""
        return self._base.residuals(self._root * theta)

    def pull_back(self, theta: Tensor, cotangent: Tensor) -> Tensor:
        """D^½ Jᵀu."""
        return self._root * self._base.pull_back(self._root * theta, cotangent)

    def least_squares(self, theta: Tensor) -> LeastSquares:
        """L, D^½ ∇L and the factor of J D^½."""
        return self._base.least_squares(self._root * theta).scaled(self._root)

    def compensated(self) -> Rescaled:
        """With L compensated."""
        return Rescaled(self._base.compensated(), self._root**2)
