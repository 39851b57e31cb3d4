"""The Newton–Kantorovich quantity of a point: how near a critical point must lie, if the estimates hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.objectives.base import Objective


@dataclass(frozen=True)
class Kantorovich:
    """Kantorovich's theorem with estimates for its constants; an estimate, therefore, and not a proof.

    If ‖H(θ)⁻¹‖ ≤ β, ‖H(θ)⁻¹ ∇L(θ)‖ ≤ η, ‖H(θ₁) − H(θ₂)‖ ≤ K ‖θ₁ − θ₂‖ and h = β η K ≤ 1/2, then there is a critical point
    within (1 − √(1 − 2h))/(β K) of θ, and no other one nearer than (1 + √(1 − 2h))/(β K) (Kantorovich 1948; Gragg and Tapia
    1974, SIAM J. Numer. Anal. 11, 10–13).

    Attributes:
        beta: β, from the eigenvalues.
        eta: η, the length of the Newton step.
        lipschitz: K, the largest found along the Newton step and two random directions.
        existence: The first radius; NaN for h > 1/2.
        uniqueness: The second radius; infinite for K = 0, NaN for h > 1/2.
    """

    beta: float
    eta: float
    lipschitz: float
    existence: float
    uniqueness: float

    @property
    def h(self) -> float:
        """The product β η K."""
        return self.beta * self.eta * self.lipschitz

    def __str__(self) -> str:
        """In words."""
        start = f"Newton-Kantorovich, with an estimated Lipschitz constant: h = {self.h:.1e}"
        if not self.h <= 0.5:
            return f"{start}, above 1/2, so that no critical point near by is promised"
        return f"{start}, a critical point within {self.existence:.1e} and no other within {self.uniqueness:.1e}"


def radii(beta: float, eta: float, lipschitz: float) -> tuple[float, float]:
    """The radii of existence and of uniqueness; NaN for h > 1/2."""
    h = beta * eta * lipschitz
    if not h <= 0.5:
        return math.nan, math.nan
    root = math.sqrt(1 - 2 * h)
    # (1 − √(1 − 2h))/(βK), written so that nothing cancels for a small h.
    return 2 * eta / (1 + root), (1 + root) / (beta * lipschitz) if beta * lipschitz > 0 else math.inf


def estimate(objective: Objective, theta: Tensor, hessian: Tensor, scale: Tensor, values: Tensor, step: Tensor) -> Kantorovich:
    """The constants in the coordinates θ/s, the radii in θ; three more Hessians.

    Args:
        objective: L.
        theta: The point, shape ``(P,)``.
        hessian: H there.
        scale: s, shape ``(P,)``.
        values: The eigenvalues of S H S, none of them zero.
        step: The Newton step in θ/s.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, len(theta), generator=generator, dtype=torch.float64).to(theta)
    directions = [*random, *([step] if bool((step != 0).any()) else [])]
    lipschitz = 0.0
    for direction in directions:
        length = objective.resolution ** (1 / 3) * (1 + float(theta.norm())) / float((scale * direction).norm())
        there = objective.hessian(theta + length * scale * direction)
        change = scale[:, None] * (there - hessian) * scale
        lipschitz = max(lipschitz, float(torch.linalg.eigvalsh(change).abs().max()) / (length * float(direction.norm())))
    beta, eta = 1 / float(values.abs().min()), float(step.norm())
    existence, uniqueness = radii(beta, eta, lipschitz)
    return Kantorovich(beta, eta, lipschitz, existence * float(scale.max()), uniqueness * float(scale.min()))
