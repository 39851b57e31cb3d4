"""Step sizes and orders: error norms, the first step, controllers. They know nothing of methods or objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A step is this much shorter than the one whose error is expected to equal the tolerance.
SAFETY = 0.9
# The least and the largest factor between a step and the next one.
MIN_FACTOR, MAX_FACTOR = 0.2, 5.0
# Trial steps into regions without finite values after which a flow that hardly advances any more is given up.
PATIENCE = 40
# Step sizes below this fraction of t (and of the first step, at t = 0) no longer move the clock reliably.
CLOCK = 4e-16


def weights(rtol: float, atol: float, *points: Tensor) -> Tensor:
    """atol + rtol max |θ_i| over the points: the size of a component's error that is tolerated, shape ``(P,)``; never zero."""
    largest = points[0].abs()
    for point in points[1:]:
        largest = torch.maximum(largest, point.abs())
    return largest.mul_(rtol).add_(atol).clamp_(min=torch.finfo(largest.dtype).tiny)


def norm(error: Tensor, tolerated: Tensor) -> float:
    """Root mean square of the error in units of ``weights``; ``inf`` where it is not finite."""
    size = float((error / tolerated).square_().mean().sqrt())
    return size if math.isfinite(size) else math.inf


def first_step_size(theta: Tensor, gradient: Tensor, *, cap: float, rtol: float, atol: float) -> float:
    """A step that moves θ by √rtol/2 of its size: all that can be said while nothing is known of curvature.

    A step of order 1 that moves θ by a fraction δ has a local error of δ²/2 of θ's size if the gradient changes at the
    rate at which θ does (dθ/dt = −λθ): an eighth of the tolerance. Sizes are largest components, where a component of θ
    has at least the size at which the absolute tolerance takes over, atol/rtol.

    Args:
        theta: θ, shape ``(P,)``.
        gradient: ∇L there, shape ``(P,)``.
        cap: The longest step allowed: the result where the gradient is zero, or θ has no size (1 if it is infinite).
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        FloatingPointError: If the gradient is not finite.
    """
    largest, steepest = torch.stack([theta.abs().amax(), gradient.abs().amax()]).tolist()
    require_finite(steepest)
    increment: float = 0.5 * math.sqrt(rtol) * (largest + atol / rtol)
    if increment and steepest:
        return min(cap, increment / float(steepest))
    return cap if math.isfinite(cap) else 1.0


def require_finite(size: float) -> None:
    """Raise FloatingPointError if the size of a gradient at the flow's own point is not finite."""
    if not math.isfinite(size):
        raise FloatingPointError(
            "The gradient is not finite at the point that the flow stands at, so no shorter step can help: restore "
            "parameters at which the loss and its gradient are finite, or change the loss."
        )


class Patience:
    """Counts trial steps into regions without finite values, and says when a flow that hardly advances is given up.

    Args:
        start: Where the flow began.
    """

    def __init__(self, start: float) -> None:
        self._start = start
        self._failures: list[float] = []

    def exhausted(self, t: float) -> bool:
        """After one more such step from t: whether over the last ``PATIENCE`` ones the flow hardly advanced."""
        self._failures = [*self._failures[-PATIENCE:], t]
        hardly = max(1e-3 * (t - self._start), 1e-5 * abs(t))
        return len(self._failures) > PATIENCE and t - self._failures[0] <= hardly


@dataclass(frozen=True)
class Controller:
    """Proportional–integral control of the step size of a one-step method.

    After an accepted step with error e (in units of the tolerance), after one with error e′, the next step is longer by
    the factor 0.9 e^(−0.7/q) e′^(0.4/q) for errors of order h^q (Gustafsson 1991; Hairer and Wanner, Solving Ordinary
    Differential Equations II, section IV.2).

    Attributes:
        exponent: q, the order of the estimate plus one.
        previous: e′, or None where control is integral only: at the start, and after a rejection.
    """

    exponent: int
    previous: float | None = None

    def accepted(self, error: float) -> tuple[float, Controller]:
        """The factor by which the next step is longer, and the controller for it."""
        floored = max(error, 1e-8)
        if self.previous is None:
            factor = SAFETY * floored ** (-1 / self.exponent)
        else:
            factor = SAFETY * floored ** (-0.7 / self.exponent) * self.previous ** (0.4 / self.exponent)
        return min(MAX_FACTOR, max(MIN_FACTOR, factor)), Controller(self.exponent, floored)

    def rejected(self, error: float) -> tuple[float, Controller]:
        """The factor for another try, and the controller for it."""
        factor = MIN_FACTOR if math.isinf(error) else SAFETY * error ** (-1 / self.exponent)
        return min(0.9, max(MIN_FACTOR, factor)), Controller(self.exponent)
