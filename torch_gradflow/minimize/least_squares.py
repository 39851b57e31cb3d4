"""Levenberg–Marquardt for sums of squares, with steps that follow the curvature of the residuals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_gradflow.minimize.acceptance import Judgement, Point, judge
from torch_gradflow.minimize.method import Iterate, Minimiser, Need
from torch_gradflow.minimize.trust_region import TrustRegionNewton, eigendecomposition, solve_subproblem
from torch_gradflow.objectives.base import DerivativeError, Objective

# Parameters up to which singular values are worth what they cost from the beginning.
MAX_SVD = 300


@dataclass(frozen=True)
class LevenbergMarquardt(Minimiser):
    """Gauss–Newton in a ball for L = ½‖r‖² (Moré 1978), with corrections for the curvature of r.

    The Levenberg–Marquardt step v minimises ½‖r + Jp‖² + ½μ‖p‖², where μ makes it as long as the trust region's radius. It is
    computed from the singular values of J's triangular factor, not from JᵀJ, in which those below the square root of
    rounding are lost. So it also serves where the Hessian is singular at a minimum of zero loss, as with students that have
    more neurons than their teacher, where Newton's method crawls. (Of more than ``MAX_SVD`` parameters the eigenvalues of JᵀJ
    are taken as long as μ exceeds that rounding: with 1153, in 0.4 s instead of 1 s, beside 0.2 s for the factor.)

    In narrow curved valleys v leaves the valley's floor. With e(p) = r(θ + p) − r − Jp, what the linear model misses, the
    step is therefore corrected by p ← v − (JᵀJ + μ)⁻¹ Jᵀ e(p), at whose fixed point Jᵀr(θ + p) + μp = 0. To second order the
    first correction is the geodesic acceleration of Transtrum and Sethna (2012, arXiv 1201.5885); the second adds what is of
    third order, and neither needs second derivatives. Each costs two gradients' work. (On 30 students of 8 neurons, N = 1000,
    from scratch, at most 600 iterations each: with geodesic acceleration at best 23 reached 1e-13, in 10 087 iterations; with
    two corrections 25 in 6 661; a third gained nothing; without, 4 of 12 did within 1500 iterations each. Scaling the
    variables as MINPACK does, 3 of 7 were solved, without it all 7.)

    The error of the corrected step grows like the fourth power of its length and more, hence the radius follows from the
    error of the last prediction as a step size does in the integration of differential equations: no oscillation between
    steps that are far too long and too short.

    Where the loss does not tend to zero, J alone gives linear convergence at best. So when neither loss nor gradient fall
    quickly any more, a step of Newton's method is tried, and if the gradient then falls to a tenth, trust-region Newton takes
    over: the minimum is near. (Farther away it is slower: in valleys of non-zero loss, too.)

    Attributes:
        corrections: How often the step is corrected.
        bend: A first correction longer than this, relative to v, is refused, and the radius halved. (Transtrum and Sethna's
            criterion |2 (a/2)| / |v| with their 0.75; the results hardly depend on it between 0.4 and 1.5.)
        error: The relative error of the predicted reduction, 1 − ratio, for which the radius stays as it is.
        least_change: Of the radius in one iteration, a factor.
        largest_change: Likewise.
        max_rejections: Rejected steps in a row in the rounding regime after which it is stuck.
        window: Iterations over which progress is judged.
        progress: Newton's step is tried when over so many iterations neither the loss fell by this share of it, nor the
            gradient norm to a tenth.
    """

    corrections: int = 2
    bend: float = 0.375
    error: float = 0.03
    least_change: float = 0.25
    largest_change: float = 2.5
    max_rejections: int = 4
    window: int = 10
    progress: float = 1e-3
    name: str = "levenberg-marquardt"
    needs: frozenset[Need] = frozenset({"residuals", "hessian"})
    matrices: int = 16  # R below a block of 4 P residuals, with the copies that its factorisation makes

    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """See ``Minimiser``; an iteration costs at most one Jacobian and six gradients, now and then a Hessian and a gradient.

        Raises:
            DerivativeError: If the Jacobian at the start is not finite.
        """
        point = Point(theta, loss, gradient)
        radius = 0.1 * (1.0 + float(theta.norm()))
        linear = linearised(objective, theta, exact=objective.n_parameters <= MAX_SVD)
        if linear is None:
            raise DerivativeError("the Jacobian of the residuals is not finite at this point: start where the loss is smooth.")
        rejections = 0
        history = [point]
        while True:
            base, predicted, damping = linear.damped_step(radius)
            if damping < linear.rounding:
                linear = linearised(objective, point.theta, exact=True) or linear
                base, predicted, damping = linear.damped_step(radius)
            length = float(base.norm())
            step = self._corrected(objective, linear, base, damping)
            if step is None:
                accepted, rounding, radius = False, False, 0.5 * length
            else:
                there = point.theta + step
                trial = Point(there, *objective.loss_and_gradient(there))
                whole = length < 0.99 * radius
                judgement = judge(point, trial, predicted, objective.resolution, newton=whole)
                accepted, rounding = judgement.accepted, judgement.rounding
                following: Linearised | None = linear
                if accepted and bool((trial.gradient != 0).any()):
                    following = linearised(objective, there, exact=linear.rounding == 0)
                accepted = accepted and following is not None
                radius = self._next_radius(radius, length, judgement, accepted)
                if accepted and following is not None:
                    point, linear = trial, following
            rejections = 0 if accepted else rejections + 1
            stuck = (rounding and rejections >= self.max_rejections) or not radius > smallest_radius(objective, point.theta)
            slow = stuck or self._stagnates(history)
            if slow and newton_is_faster(objective, point):
                break
            history = [point] if len(history) > self.window else [*history, point]
            yield Iterate(point.theta, point.loss, point.gradient, math.nan, radius, stuck)
        newton = TrustRegionNewton()
        why = "the loss does not tend to zero, and Newton's method takes over"
        for iterate in newton.iterate(objective, point.theta, point.loss, point.gradient):
            yield replace(iterate, method=newton.name, note=why)
            why = ""

    def _stagnates(self, history: list[Point]) -> bool:
        """Whether there was hardly any progress since the last time that this was asked with so many points."""
        if len(history) <= self.window:
            return False
        before, now = history[0], history[-1]
        falls = float(before.loss - now.loss) > self.progress * float(now.loss)
        return not falls and float(now.gradient.norm()) > 0.1 * float(before.gradient.norm())

    def _corrected(self, objective: Objective, linear: Linearised, base: Tensor, damping: float) -> Tensor | None:
        """The step after corrections, as many as draw together; None where the first one is already too long."""
        step, last = base, self.bend * float(base.norm())
        for i in range(self.corrections):
            correction = base - linear.damped_inverse(linear.missed(objective, step), damping) - step
            length = float(correction.norm())
            if not length <= last:
                return None if i == 0 else step
            step, last = step + correction, length
        return step

    def _next_radius(self, radius: float, length: float, judgement: Judgement, accepted: bool) -> float:
        """From how well the reduction was predicted, whose relative error grows like the length's fourth power."""
        if not accepted:
            return min(0.5, max(self.least_change, self._factor(judgement.ratio))) * length
        factor = min(self.largest_change, max(self.least_change, self._factor(judgement.ratio)))
        return factor * length if factor < 1 or length > 0.9 * radius else radius

    def _factor(self, ratio: float) -> float:
        return math.sqrt(math.sqrt(self.error / max(1.0 - ratio, 1e-6)))


@dataclass(frozen=True)
class Linearised:
    """r(θ + p) ≈ r + J p, with J = Q U S Vᵀ.

    Attributes:
        theta: θ, shape ``(P,)``.
        residuals: r, shape ``(M,)``.
        squares: S², of the singular values that are not zero, ascending, shape ``(k,)``.
        vectors: V, shape ``(P, k)``.
        slopes: Vᵀ Jᵀ r, shape ``(k,)``.
        rounding: Smaller squares are lost; 0 where none are.
    """

    theta: Tensor
    residuals: Tensor
    squares: Tensor
    vectors: Tensor
    slopes: Tensor
    rounding: float

    def damped_step(self, radius: float) -> tuple[Tensor, float, float]:
        """The minimiser p of ½‖r + Jp‖² within ‖p‖ ≤ ``radius``, the reduction by it, and μ with (JᵀJ + μ) p = −Jᵀr."""
        if not bool((self.slopes != 0).any()):
            return torch.zeros_like(self.theta), 0.0, 0.0
        parts, predicted = solve_subproblem(self.squares, self.slopes, radius)
        moving = parts.nonzero()
        i = int(moving[0])  # of the smallest singular value, from which μ stands out most
        damping = max(0.0, -float(self.slopes[i] / parts[i]) - float(self.squares[i]))
        return self.vectors @ parts, predicted, damping

    def damped_inverse(self, vector: Tensor, damping: float) -> Tensor:
        """(JᵀJ + μ)⁻¹ g for g in the span of J's rows."""
        return self.vectors @ ((self.vectors.T @ vector) / (self.squares + damping))

    def missed(self, objective: Objective, step: Tensor) -> Tensor:
        """Jᵀe for e = r(θ + p) − r − Jp, what the linear model misses."""
        change = objective.residuals(self.theta + step) - self.residuals
        return objective.pull_back(self.theta, change) - self.vectors @ (self.squares * (self.vectors.T @ step))


def linearised(objective: Objective, theta: Tensor, *, exact: bool) -> Linearised | None:
    """The residuals at θ to first order; None where they are not finite.

    Args:
        objective: L.
        theta: θ, shape ``(P,)``.
        exact: Whether from the singular values of J's triangular factor, or else from the eigenvalues of JᵀJ.
    """
    found = objective.least_squares(theta)
    factor, projection = found.factor, found.projection
    if not bool(torch.isfinite(factor).all()) or not bool(torch.isfinite(projection).all()):
        return None
    if exact:
        u, values, vt = torch.linalg.svd(factor, full_matrices=False)
        rounding, n = 0.0, int((values > 0).sum())
        squares, vectors = values[:n].flip(0) ** 2, vt[:n].flip(0).T
        slopes = (values[:n] * (u.T @ projection)[:n]).flip(0)
    else:
        squares, vectors = torch.linalg.eigh(factor.T @ factor)
        rounding = len(squares) * torch.finfo(squares.dtype).eps * float(squares[-1])
        kept = squares > rounding
        squares, vectors = squares[kept], vectors[:, kept]
        slopes = vectors.T @ (factor.T @ projection)
    return Linearised(theta, objective.residuals(theta), squares, vectors, slopes, rounding)


def newton_is_faster(objective: Objective, point: Point) -> bool:
    """Whether the Hessian is positive definite, and the Newton step takes the gradient norm to a tenth."""
    values, vectors = eigendecomposition(objective, point.theta)
    if not float(values[0]) > 0:
        return False
    there = point.theta - vectors @ ((vectors.T @ point.gradient) / values)
    loss, gradient = objective.loss_and_gradient(there)
    return bool(torch.isfinite(loss)) and float(gradient.norm()) < 0.1 * float(point.gradient.norm())


def smallest_radius(objective: Objective, theta: Tensor) -> float:
    """Steps shorter than this are lost in the rounding of θ."""
    return 1e-2 * objective.resolution * float(theta.norm())
