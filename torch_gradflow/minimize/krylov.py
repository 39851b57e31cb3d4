"""Trust-region Newton without matrices: the model is minimised within a Krylov space of Hessian–vector products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.minimize.method import Need
from torch_gradflow.minimize.trust_region import (
    Model,
    ModelStep,
    NotTwiceDifferentiableError,
    TrustRegion,
    solve_subproblem,
)
from torch_gradflow.objectives.base import Objective

Product = Callable[[Tensor], Tensor]
# Orthonormal vectors that "trust-region-lanczos" keeps at most: with 1e6 parameters, 2.4 GB in float64.
MAX_VECTORS = 300
# Products that one step of "trust-region-cg" may take; beyond, the radius rules.
MAX_PRODUCTS = 1000


def forcing(gradient: Tensor) -> float:
    """How small the model's gradient must become, relative to ‖g‖: min(0.1, √‖g‖).

    The bound by √‖g‖ makes the convergence superlinear (Nocedal and Wright, Numerical Optimization, 2006, section 7.1).
    """
    return min(0.1, math.sqrt(float(gradient.norm())))


def checked_product(objective: Objective, theta: Tensor) -> Product:
    """v ↦ H(θ) v, which raises NotTwiceDifferentiableError where that is not finite."""

    def product(vector: Tensor) -> Tensor:
        found = objective.hvp(theta, vector)
        if not bool(torch.isfinite(found).all()):
            raise NotTwiceDifferentiableError("a Hessian–vector product is not finite here: start where the loss is smooth.")
        return found

    return product


@dataclass(frozen=True)
class TrustRegionCG(TrustRegion):
    """Conjugate gradients, cut at the ball or at negative curvature (Steihaug 1983; Toint 1981): O(P) memory."""

    name: str = "trust-region-cg"
    needs: frozenset[Need] = frozenset({"hvp"})

    def model(self, objective: Objective, theta: Tensor, gradient: Tensor) -> Model:
        """Each radius costs its own products."""
        product = checked_product(objective, theta)
        most = min(2 * len(gradient), MAX_PRODUCTS)
        first = product(gradient)

        def solve(radius: float) -> ModelStep:
            return truncated_cg(product, gradient, first, radius, forcing(gradient), most)

        return solve


def truncated_cg(product: Product, gradient: Tensor, first: Tensor, radius: float, tolerance: float, most: int) -> ModelStep:
    """Reduce g·p + ½ p·Hp over ‖p‖ ≤ Δ by conjugate gradients from p = 0.

    The iterates' norms grow and the model falls all the way; where the next one would leave the ball, or the curvature
    along the direction is not positive, the direction is followed to the sphere (Steihaug 1983, The conjugate gradient
    method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20, 626–637).

    Args:
        product: v ↦ Hv.
        gradient: g, shape ``(P,)``.
        first: Hg.
        radius: Δ > 0.
        tolerance: Done when ‖Hp + g‖ is at most this times ‖g‖.
        most: Products at most.
    """
    step, residual, image = torch.zeros_like(gradient), gradient, torch.zeros_like(gradient)
    direction, square = -gradient, float(gradient @ gradient)
    goal, inside = tolerance**2 * square, True
    for i in range(most):
        if square <= goal:
            break
        curved = -first if i == 0 else product(direction)
        curvature = float(direction @ curved)
        length = square / curvature if curvature > 0 else math.inf
        inside = curvature > 0 and float((step + length * direction).norm()) < radius
        if not inside:
            length = to_sphere(step, direction, radius)
        step, image = step + length * direction, image + length * curved
        if not inside:
            break
        residual = residual + length * curved
        before, square = square, float(residual @ residual)
        direction = -residual + (square / before) * direction
    predicted = -float(gradient @ step + 0.5 * (step @ image))
    return ModelStep(step, max(predicted, 0.0), inside, math.nan)


def to_sphere(step: Tensor, direction: Tensor, radius: float) -> float:
    """The τ ≥ 0 with ‖p + τ d‖ = Δ."""
    a, b, c = float(direction @ direction), float(step @ direction), float(step @ step) - radius**2
    root = math.sqrt(max(b * b - a * c, 0.0))
    return -c / (b + root) if b > 0 else (root - b) / a


@dataclass(frozen=True)
class TrustRegionLanczos(TrustRegion):
    """The model's exact minimiser within the Krylov space of g, also on the sphere (Gould, Lucidi, Roma and Toint 1999).

    The vectors are kept (at most ``MAX_VECTORS``) and orthogonalised against each other, so that a rejected step costs no
    product: the tridiagonal problem is solved again with the smaller radius.
    """

    name: str = "trust-region-lanczos"
    needs: frozenset[Need] = frozenset({"hvp"})

    def model(self, objective: Objective, theta: Tensor, gradient: Tensor) -> Model:
        """All radii share one Krylov space, which grows as far as they need."""
        space = KrylovSpace(checked_product(objective, theta), gradient, min(len(gradient), MAX_VECTORS))
        space.grow(1)
        tolerance = forcing(gradient)
        return lambda radius: space.minimise(radius, tolerance)


class KrylovSpace:
    """span(g, Hg, H²g, …) with an orthonormal basis in which H is tridiagonal (Lanczos), grown on demand.

    Args:
        product: v ↦ Hv.
        gradient: g, shape ``(P,)``, not zero.
        most: Vectors at most.
    """

    def __init__(self, product: Product, gradient: Tensor, most: int) -> None:
        self._product, self._most = product, most
        self._norm = float(gradient.norm())
        self._basis = (gradient / self._norm)[None]
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self._exhausted = False

    @property
    def size(self) -> int:
        """Products so far."""
        return len(self._diagonal)

    def grow(self, size: int) -> None:
        """Up to that many products, as long as the space is not invariant."""
        while self.size < min(size, self._most) and not self._exhausted:
            last = self._basis[-1]
            image = self._product(last)
            self._diagonal.append(float(last @ image))
            for _ in range(2):  # twice is enough (Parlett, The Symmetric Eigenvalue Problem, 1980, section 6.9)
                image = image - self._basis.T @ (self._basis @ image)
            left = float(image.norm())
            largest = max(map(abs, (*self._diagonal, *self._beside)))
            self._beside.append(left)
            eps = torch.finfo(last.dtype).eps
            self._exhausted = left <= 16 * eps * largest
            if not self._exhausted and self.size < self._most:
                self._basis = torch.cat([self._basis, image[None] / left])

    def minimise(self, radius: float, tolerance: float) -> ModelStep:
        """Minimise g·p + ½ p·Hp over p in the space with ‖p‖ ≤ Δ, growing it until (H + μ)p + g is small.

        Within the space the conditions of Moré and Sorensen hold; the residual (H + μ)p + g points along the next basis
        vector, with length β |h_k| (Gould, Lucidi, Roma and Toint 1999, Solving the trust-region subproblem using the
        Lanczos method, SIAM J. Optim. 9, 504–525, theorem 5.1).

        Args:
            radius: Δ > 0.
            tolerance: Done when that is at most this times ‖g‖.
        """
        while True:
            step, predicted, lowest = self._solve(radius)
            if self._exhausted or self.size >= self._most:
                break
            if self._beside[-1] * abs(float(step[-1])) <= tolerance * self._norm:
                break
            self.grow(self.size + 1 + self.size // 4)
        newton = lowest > 0 and float(step.norm()) < 0.99 * radius
        return ModelStep(self._basis[: self.size].T @ step, max(predicted, 0.0), newton, math.nan)

    def _solve(self, radius: float) -> tuple[Tensor, float, float]:
        """The minimiser in the space's coordinates, the reduction, and the lowest Ritz value."""
        like = self._basis
        beside = torch.tensor(self._beside[:-1], dtype=like.dtype, device=like.device)
        matrix = torch.diag(torch.tensor(self._diagonal, dtype=like.dtype, device=like.device))
        matrix = matrix + torch.diag(beside, 1) + torch.diag(beside, -1)
        values, vectors = torch.linalg.eigh(matrix)
        step, predicted = solve_subproblem(values, self._norm * vectors[0], radius)
        return vectors @ step, predicted, float(values[0])
