"""Backward differentiation formulas of variable step and order, as numbers: predictors, slopes, errors, the choice of order.

Through accepted points θ_0, θ_1, … at times t_0 > t_1 > … goes, for each degree j, the polynomial p_j of θ_0, …, θ_j. The
formula of order k asks that the polynomial through the new point θ and θ_0, …, θ_{k−1} has the slope −∇L(θ) at the new time
t = t_0 + h. With δ = θ − p_k(t) that is

    p_k′(t) + (α/h) δ = −∇L(θ),   α = Σ_{j<k} h/(t − t_j),

and the local error is close to h/(t − t_k) (θ − p_k(t)) (Brayton, Gustavson and Hachtel 1972; Hairer, Nørsett and Wanner,
Solving Ordinary Differential Equations I, section III.5). Variable steps enter exactly; nothing is rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch_gradflow.flow.control import SAFETY

# The spectrum is real, and the formula of order 6 is stable on the whole negative axis; that of order 7 is unstable.
MAX_ORDER = 6
# Points that predictors of degree 7 take: the error of order 6 + 1 is looked at before it is refused.
MAX_POINTS = MAX_ORDER + 2
# Another order than the present one must allow longer steps even if they are shortened by this.
LOYALTY = 0.95
# Steps change only if they may grow by more than this, or must shrink, and by how much at most.
HYSTERESIS, MAX_GROWTH, MIN_GROWTH = 1.2, 3.0, 0.3


@dataclass(frozen=True)
class Formula:
    """A step of length h at order k, as weights of θ_0, θ_1, ….

    Attributes:
        order: k.
        alpha: α.
        predictor: Those of p_k(t).
        slope: Those of h p_k′(t).
        constants: h/(t − t_j) for the degrees k − 1, k, k + 1, as far as there are points.
        lower: Those of p_{k−1}(t), or None for k = 1.
        higher: Those of p_{k+1}(t), or None where there are not enough points.
    """

    order: int
    alpha: float
    predictor: list[float]
    slope: list[float]
    constants: tuple[float, ...]
    lower: list[float] | None
    higher: list[float] | None


def formula(times: Sequence[float], step: float, order: int) -> Formula:
    """The formula of that order; ``times`` are those of the accepted points, newest first, more than ``order`` of them."""
    ages = [(times[0] - t) / step for t in times[: order + 2]]
    reach = [1.0 + age for age in ages]  # (t − t_j)/h
    predictors: list[list[float]] = []
    weights: list[float] = []
    for j, own in enumerate(ages):
        # From the polynomials of degree j − 1 to those of degree j: one more factor each, and one more polynomial.
        weights = [w * reach[j] / (own - age) for w, age in zip(weights, ages, strict=False)]
        weights.append(math.prod(r / (age - own) for r, age in zip(reach[:j], ages, strict=False)))
        predictors.append(weights)
    predictor = predictors[order]
    total = sum(1 / r for r in reach[: order + 1])
    return Formula(
        order,
        sum(1 / r for r in reach[:order]),
        predictor,
        [w * (total - 1 / r) for w, r in zip(predictor, reach, strict=False)],
        tuple(1 / r for r in reach[max(order - 1, 0) : order + 2]),
        predictors[order - 1] if order > 1 else None,
        predictors[order + 1] if len(ages) > order + 1 else None,
    )


@dataclass(frozen=True)
class OrderControl:
    """What the next step and its order follow from.

    Attributes:
        order: Of the next step.
        n_steps: Accepted steps at this order so far.
        n_rejected: Rejections in a row.
    """

    order: int = 1
    n_steps: int = 0
    n_rejected: int = 0

    def accepted(self, error: float, lower: float | None, higher: float | None, first: bool) -> tuple[float, OrderControl]:
        """The factor by which the next step is longer, and the control for it.

        Args:
            error: The estimated error of the step that was accepted, in units of the tolerance.
            lower: The error that it would have had at the order below, or None.
            higher: The same for the order above; it is looked at after k + 1 steps at order k, when all of its points come
                from steps that were accepted at that order.
            first: Whether that was the first step of all, whose length was a guess.
        """
        k, n_steps = self.order, self.n_steps + 1
        candidates = [(_factor(error, k), k)]
        if lower is not None:
            candidates.append((LOYALTY * _factor(lower, k - 1), k - 1))
        if higher is not None and k < MAX_ORDER and n_steps > k:
            candidates.append((LOYALTY * _factor(higher, k + 1), k + 1))
        factor, order = max(candidates)
        control = OrderControl(order, 0 if order != k else n_steps)
        if self.n_rejected:
            factor = min(factor, 1.0)
        if 1.0 <= factor <= HYSTERESIS:
            return 1.0, control
        return min(10.0 if first else MAX_GROWTH, max(MIN_GROWTH, factor)), control

    def rejected(self, error: float) -> tuple[float, OrderControl]:
        """The factor for another try; after three rejections in a row it is one of order 1."""
        n_rejected = self.n_rejected + 1
        factor = 0.35 if math.isinf(error) else max(0.2, min(0.8, SAFETY * error ** (-1 / (self.order + 1))))
        if n_rejected >= 3:
            return factor, OrderControl(1, 0, n_rejected)
        return factor, replace(self, n_steps=0, n_rejected=n_rejected)


def _factor(error: float, order: int) -> float:
    return SAFETY * math.pow(max(error, 1e-8), -1 / (order + 1))
