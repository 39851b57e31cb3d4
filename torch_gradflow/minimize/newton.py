"""Newton's method with a line search, and its saddle-free variant."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_gradflow.minimize.acceptance import Point
from torch_gradflow.minimize.descent import Direction, Directions, LineSearchMethod
from torch_gradflow.minimize.line_search import LineSearch
from torch_gradflow.minimize.method import Need
from torch_gradflow.minimize.trust_region import DENSE_MATRICES, eigendecomposition
from torch_gradflow.objectives.base import Objective


@dataclass(frozen=True)
class Newton(LineSearchMethod):
    """p = −H⁻¹g where H is positive definite; else −(H + μ)⁻¹g with a shift that makes it so.

    μ = ‖g‖/(1 + ‖θ‖) − λ_1: it vanishes at the solution, which keeps the convergence fast where H is singular there (Li,
    Fukushima, Qi and Yamashita 2004, Regularized Newton methods for convex minimization problems with singular solutions,
    Comput. Optim. Appl. 28, 131–147), and no step along the lowest eigenvector is longer than 1 + ‖θ‖.
    """

    name: str = "newton"
    needs: frozenset[Need] = frozenset({"hessian"})
    matrices: int = DENSE_MATRICES
    line_search: LineSearch = field(default_factory=LineSearch)

    def directions(self, objective: Objective) -> Directions:
        """One Hessian and its eigendecomposition per direction."""
        return _NewtonDirections(objective, saddle_free=False)


@dataclass(frozen=True)
class SaddleFreeNewton(LineSearchMethod):
    """p = −|H|⁻¹g, |H| with the absolute eigenvalues of H: saddles repel.

    Dauphin, Pascanu, Gulcehre, Cho, Ganguli and Bengio 2014, Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization, NeurIPS 27. Eigenvalues that are zero within rounding, or would make a step
    longer than 1 + ‖θ‖, count as ‖g‖/(1 + ‖θ‖).
    """

    name: str = "saddle-free"
    needs: frozenset[Need] = frozenset({"hessian"})
    matrices: int = DENSE_MATRICES
    line_search: LineSearch = field(default_factory=LineSearch)

    def directions(self, objective: Objective) -> Directions:
        """One Hessian and its eigendecomposition per direction."""
        return _NewtonDirections(objective, saddle_free=True)


class _NewtonDirections(Directions):
    def __init__(self, objective: Objective, *, saddle_free: bool) -> None:
        self._objective, self._saddle_free = objective, saddle_free

    def next(self, point: Point) -> Direction:
        """See the methods."""
        values, vectors = eigendecomposition(self._objective, point.theta)
        components = vectors.T @ point.gradient
        least = float(point.gradient.norm()) / (1 + float(point.theta.norm()))
        change = saddle_free if self._saddle_free else shifted
        rounding = len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())
        curvature = change(values, components, rounding, least)
        return Direction(-(vectors @ (components / curvature)), smallest_eigenvalue=float(values[0]))


def shifted(values: Tensor, components: Tensor, rounding: float, least: float) -> Tensor:
    """λ where all are positive beyond rounding, else λ − λ_1 + ``least``."""
    return values if float(values[0]) > rounding else values - values[0] + max(least, rounding)


def saddle_free(values: Tensor, components: Tensor, rounding: float, least: float) -> Tensor:
    """|λ|, or ``least`` where that is zero within rounding or the step along the eigenvector would be longer."""
    size = values.abs()
    usable = (size > rounding) & (size >= least * components.abs() / components.norm())
    return torch.where(usable, size, max(least, rounding))
