"""Trust-region Newton: one loop for all models of the loss, and the exact model on the eigendecomposition of the Hessian."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.minimize.acceptance import Point, judge
from torch_gradflow.minimize.method import Iterate, Minimiser, Need
from torch_gradflow.objectives.base import DerivativeError, Objective

# Dense matrices alive at once: the Hessian, its unsymmetrised products, eigenvectors and the work space of eigh.
DENSE_MATRICES = 6


@dataclass(frozen=True)
class ModelStep:
    """A minimiser of the quadratic model g·p + ½ p·Hp within a ball.

    Attributes:
        step: p, shape ``(P,)``.
        predicted: The model's reduction, ≥ 0.
        newton: Whether the model is convex, as far as it is known, and p its minimum, inside the ball.
        smallest_eigenvalue: Of H; nan where it is not known.
    """

    step: Tensor
    predicted: float
    newton: bool
    smallest_eigenvalue: float


class NotTwiceDifferentiableError(DerivativeError):
    """The Hessian at some point is not finite."""


# The model's minimiser for a radius: asked again with a smaller one after a rejection.
Model = Callable[[float], ModelStep]


class TrustRegion(Minimiser):
    """The trust-region iteration (Conn, Gould and Toint, Trust Region Methods, 2000, algorithm 6.1.1).

    Steps are accepted by ``judge``, so that the gradient comes down to round-off.

    Attributes:
        shrink_below: Ratio under which the radius shrinks to a quarter of the step.
        grow_above: Ratio over which the radius grows by 2.5 where it limited the step.
        max_rejections: Rejected steps in a row in the rounding regime after which it is stuck.
    """

    shrink_below: float = 0.25
    grow_above: float = 0.75
    max_rejections: int = 4

    @abstractmethod
    def model(self, objective: Objective, theta: Tensor, gradient: Tensor) -> Model:
        """The quadratic model at θ.

        Raises:
            NotTwiceDifferentiableError: If the Hessian, or its products, are not finite.
        """

    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """See ``Minimiser``.

        Raises:
            NotTwiceDifferentiableError: If the Hessian at the start is not finite.
        """
        eps = objective.resolution
        point = Point(theta, loss, gradient)
        radius = 0.1 * (1.0 + float(theta.norm()))
        largest = 1e3 * radius
        rejections = 0
        model = self.model(objective, theta, gradient)
        while True:
            found = model(radius)
            length = float(found.step.norm())
            there = point.theta + found.step
            trial = Point(there, *objective.loss_and_gradient(there))
            judgement = judge(point, trial, found.predicted, eps, newton=found.newton)
            if judgement.ratio < self.shrink_below:
                radius = 0.25 * length
            elif judgement.ratio > self.grow_above and length > 0.9 * radius:
                radius = min(2.5 * radius, largest)
            accepted = judgement.accepted
            if accepted and bool((trial.gradient != 0).any()):
                try:
                    model = self.model(objective, trial.theta, trial.gradient)
                except NotTwiceDifferentiableError:  # no place to go on from
                    accepted, radius = False, 0.25 * length
            if accepted:
                point = trial
            rejections = 0 if accepted else rejections + 1
            stuck = judgement.rounding and rejections >= self.max_rejections
            stuck = stuck or not radius > eps * float(point.theta.norm()) * 1e-2
            yield Iterate(point.theta, point.loss, point.gradient, found.smallest_eigenvalue, radius, stuck)


@dataclass(frozen=True)
class TrustRegionNewton(TrustRegion):
    """Newton's method in a ball, for any Hessian: definite, indefinite or singular (Moré and Sorensen 1983)."""

    name: str = "trust-region"
    needs: frozenset[Need] = frozenset({"hessian"})
    matrices: int = DENSE_MATRICES

    def model(self, objective: Objective, theta: Tensor, gradient: Tensor) -> Model:
        """One Hessian and its eigendecomposition serve all radii."""
        values, vectors = eigendecomposition(objective, theta)
        components = vectors.T @ gradient
        lowest = float(values[0])

        def solve(radius: float) -> ModelStep:
            step, predicted = solve_subproblem(values, components, radius)
            newton = lowest > 0 and float(step.norm()) < 0.99 * radius
            return ModelStep(vectors @ step, predicted, newton, lowest)

        return solve


def eigendecomposition(objective: Objective, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors (columns) of H(θ).

    Raises:
        NotTwiceDifferentiableError: If H is not finite.
    """
    hessian = objective.hessian(theta)
    if not bool(torch.isfinite(hessian).all()):
        raise NotTwiceDifferentiableError("the Hessian is not finite at this point: start where the loss is smooth.")
    values, vectors = torch.linalg.eigh(hessian)
    return values, vectors


def solve_subproblem(values: Tensor, components: Tensor, radius: float) -> tuple[Tensor, float]:
    """Minimise g·p + ½ p·Λp over ‖p‖ ≤ Δ, in the basis of eigenvectors.

    The solution is p_i = −g_i/(λ_i + μ) with the least μ ≥ max(0, −λ_1) for which ‖p‖ ≤ Δ; where g has no component
    along the lowest eigenvectors (the hard case), a multiple of the lowest one is added (Moré and Sorensen, 1983,
    Computing a Trust Region Step, SIAM J. Sci. Stat. Comput. 4, 553–572).

    Args:
        values: λ, the eigenvalues, ascending, shape ``(P,)``.
        components: g in the eigenbasis, shape ``(P,)``.
        radius: Δ > 0.

    Returns:
        p in the eigenbasis, and the predicted reduction −(g·p + ½ p·Λp) ≥ 0.
    """
    lowest = float(values[0])
    eps = torch.finfo(values.dtype).eps
    if lowest > 0:
        step = -components / values
        if float(step.norm()) <= radius:
            return step, _reduction(values, components, step)
    norm = float(components.norm())
    bottom = values - lowest <= eps * max(abs(lowest), abs(float(values[-1])))
    least = max(0.0, -lowest)
    if lowest <= 0 and float(components[bottom].norm()) <= 16 * eps * norm:
        shifted = torch.where(bottom, 1.0, values + least)
        step = torch.where(bottom, 0.0, -components / shifted)
        length = float(step.norm())
        if length < radius:
            step[int(bottom.nonzero()[0])] = math.sqrt(radius**2 - length**2) if lowest < 0 else 0.0
            return step, _reduction(values, components, step)
    # ‖p(μ)‖ falls with μ; Newton's method on 1/‖p‖ − 1/Δ, kept inside a bracket. (μ + λ_1 is the unknown, so that
    # nothing cancels where it is small.)
    lower, upper = max(0.0, lowest), norm / radius + max(0.0, lowest)
    shift = min(max(norm / radius, lower), upper)
    gaps = values - lowest
    for _ in range(100):
        denominator = gaps + shift
        step = -components / denominator
        length = float(step.norm())
        if not abs(length - radius) > 1e-3 * radius:
            break
        if length > radius:
            lower = shift
        else:
            upper = shift
        slope = float((components**2 / denominator**3).sum())
        proposal = shift + length**2 / slope * (length - radius) / radius if slope > 0 else math.inf
        middle = math.sqrt(lower * upper) if lower > 0 else max(0.5 * upper, 0.0)
        shift = proposal if lower < proposal < upper else (0.5 * (lower + upper) if lower > 0.1 * upper else middle)
        if shift <= 0.0 or not math.isfinite(shift):
            shift = 1e-3 * upper
    if float(step.norm()) > radius:  # type: ignore[possibly-undefined]  # the loop runs at least once
        step = step * (radius / float(step.norm()))
    return step, _reduction(values, components, step)


def _reduction(values: Tensor, components: Tensor, step: Tensor) -> float:
    return -float(components @ step + 0.5 * (values * step) @ step)
