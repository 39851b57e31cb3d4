"""The line search of Hager and Zhang, which works down to rounding.

Far from a minimum it ends at a point that satisfies Wolfe's conditions. Near one, the change of the function is below its
rounding, and the condition of sufficient decrease is noise; the approximate Wolfe condition states the same in terms of the
slopes, which are accurate there (Hager and Zhang 2005, A new conjugate gradient method with guaranteed descent and an
efficient line search, SIAM J. Optim. 16, 170–192; 2006, Algorithm 851: CG_DESCENT, ACM TOMS 32, 113–137).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# φ and φ' at α ≥ 0.
Function = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class LinePoint:
    """φ at α.

    Attributes:
        alpha: α.
        value: φ(α); inf where it is not finite.
        slope: φ'(α).
    """

    alpha: float
    value: float
    slope: float


@dataclass(frozen=True)
class LineSearch:
    """The parameters of the search, by default those of the paper (2005, section 4).

    Attributes:
        decrease: δ of Wolfe's first condition, φ(α) − φ(0) ≤ δ α φ'(0).
        curvature: σ of Wolfe's second condition, φ'(α) ≥ σ φ'(0).
        expand: ρ: how much farther to look while the function still falls.
        shrink: γ: an interval that a secant step shrinks by less than this is bisected.
        max_evals: Evaluations after which it gives up.
    """

    decrease: float = 0.1
    curvature: float = 0.9
    expand: float = 5.0
    shrink: float = 0.66
    max_evals: int = 60

    def search(self, phi: Function, start: LinePoint, alpha: float, noise: float) -> LinePoint | None:
        """A point that satisfies Wolfe's conditions, or the approximate ones.

        Args:
            phi: φ and its slope; values that are not finite mean that α is too long.
            start: φ at 0, where its slope is negative.
            alpha: The first trial, > 0.
            noise: The error of φ, ε ≥ 0: a rise up to this counts as none.

        Returns:
            The point, or None where there is none to be found: φ is not smooth, or all is noise.
        """
        return _Search(self, phi, start, noise).run(alpha)


class _Search:
    """One search: ``done`` is the first evaluated point that satisfies the conditions."""

    def __init__(self, settings: LineSearch, phi: Function, start: LinePoint, noise: float) -> None:
        self._settings, self._phi, self._start = settings, phi, start
        self._ceiling = start.value + noise
        self._left = settings.max_evals
        self.done: LinePoint | None = None

    def run(self, alpha: float) -> LinePoint | None:
        """Algorithm L0–L3 of the paper."""
        interval = self._bracket(alpha)
        while interval is not None and self._goes_on(interval):
            low, high = self._secant_twice(*interval)
            before = interval[1].alpha - interval[0].alpha
            if self.done is None and high.alpha - low.alpha > self._settings.shrink * before:
                low, high = self._update(low, high, self._evaluate(0.5 * (low.alpha + high.alpha)))
            interval = low, high
        return self.done

    def _goes_on(self, interval: tuple[LinePoint, LinePoint]) -> bool:
        """Whether there is something between the ends of the interval, and evaluations left."""
        low, high = interval[0].alpha, interval[1].alpha
        return self.done is None and self._left > 0 and low < 0.5 * (low + high) < high

    def _evaluate(self, alpha: float) -> LinePoint:
        value, slope = self._phi(alpha)
        self._left -= 1
        finite = math.isfinite(value) and math.isfinite(slope)
        point = LinePoint(alpha, value, slope) if finite else LinePoint(alpha, math.inf, -math.inf)
        if self.done is None and finite and self._satisfies(point):
            self.done = point
        return point

    def _satisfies(self, point: LinePoint) -> bool:
        """Wolfe's conditions (T1), or the approximate ones (T2)."""
        s, start = self._settings, self._start
        if point.slope < s.curvature * start.slope:
            return False
        wolfe = point.value - start.value <= s.decrease * point.alpha * start.slope
        return wolfe or (point.slope <= (2 * s.decrease - 1) * start.slope and point.value <= self._ceiling)

    def _bracket(self, alpha: float) -> tuple[LinePoint, LinePoint] | None:
        """An interval whose lower end is low and falls, and whose upper end rises (B0–B3)."""
        low, point = self._start, self._evaluate(alpha)
        while self.done is None and self._left > 0:
            if point.slope >= 0:
                return low, point
            if point.value > self._ceiling:
                return self._bisect(low, point)
            low, point = point, self._evaluate(self._settings.expand * point.alpha)
        return None

    def _bisect(self, low: LinePoint, high: LinePoint) -> tuple[LinePoint, LinePoint]:
        """Between a point that is low and falls and one that is high and falls there is one that rises (U3)."""
        while self._goes_on((low, high)):
            point = self._evaluate(0.5 * (low.alpha + high.alpha))
            if point.slope >= 0:
                return low, point
            low, high = (point, high) if point.value <= self._ceiling else (low, point)
        return low, high

    def _secant_twice(self, low: LinePoint, high: LinePoint) -> tuple[LinePoint, LinePoint]:
        """Shrink the interval from both sides by secant steps (S1–S4)."""
        a, b = self._secant(low, high, low, high)
        if self.done is None and b is not high:
            return self._secant(high, b, a, b)
        if self.done is None and a is not low:
            return self._secant(low, a, a, b)
        return a, b

    def _secant(self, one: LinePoint, other: LinePoint, low: LinePoint, high: LinePoint) -> tuple[LinePoint, LinePoint]:
        """The interval, shrunk to the point where the line through both slopes is zero, if that lies inside."""
        rise = other.slope - one.slope
        if rise == 0 or not math.isfinite(rise):
            return low, high
        alpha = (one.alpha * other.slope - other.alpha * one.slope) / rise
        return self._update(low, high, self._evaluate(alpha)) if low.alpha < alpha < high.alpha else (low, high)

    def _update(self, low: LinePoint, high: LinePoint, point: LinePoint) -> tuple[LinePoint, LinePoint]:
        """The part of the interval that a point inside leaves (U1–U3)."""
        if point.slope >= 0:
            return low, point
        return (point, high) if point.value <= self._ceiling else self._bisect(low, point)
