"""Values between accepted points: Hermite interpolation through θ and dθ/dt, or Lagrange interpolation through θ alone."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.flow.solution import Knot


@dataclass(frozen=True)
class HermiteWindow:
    """The polynomial of degree 2s − 1 through s consecutive accepted points and their slopes.

    Its error is O(h^{2s}) between the points, so s = 2, 3, 4 suits methods of order up to 3, 5, 7 (Hairer, Nørsett and
    Wanner, Solving Ordinary Differential Equations I, section II.6); it needs nothing of the method itself.

    Attributes:
        times: The s flow times, ascending.
        theta: θ there, shape ``(s, P)``.
        gradient: ∇L there, shape ``(s, P)``; dθ/dt is its negative.
    """

    times: tuple[float, ...]
    theta: Tensor
    gradient: Tensor

    @classmethod
    def through(cls, knots: list[Knot]) -> HermiteWindow:
        """The window of these accepted points."""
        return cls(
            tuple(knot.t for knot in knots),
            torch.stack([knot.theta for knot in knots]),
            torch.stack([knot.gradient for knot in knots]),
        )

    def covers(self, t: float) -> bool:
        """Whether t lies between the first and the last point."""
        return self.times[0] <= t <= self.times[-1]

    def __call__(self, t: float) -> Tensor:
        """θ(t) for t within the window, shape ``(P,)``."""
        return self.value_and_slope(t)[0]

    def value_and_slope(self, t: float) -> tuple[Tensor, Tensor]:
        """The polynomial p and its derivative p' at t, both of shape ``(P,)``."""
        weights = self.theta.new_tensor(self._weights(t))
        value, slope = weights @ torch.cat([self.theta, self.gradient])
        return value, slope

    def _weights(self, t: float) -> list[list[float]]:
        """The weights of all θ_i and ∇L_i in p(t) and in p'(t); zero outside of the stencil.

        With the Lagrange polynomials l_i: p(t) = Σ (1 − 2 (t − t_i) l_i'(t_i)) l_i(t)² θ_i + (t − t_i) l_i(t)² θ_i'.
        """
        n, stencil = len(self.times), self._stencil(t)
        value, slope = [0.0] * (2 * n), [0.0] * (2 * n)
        for i in range(stencil.start, stencil.stop):
            t_i = self.times[i]
            others = [self.times[j] for j in range(stencil.start, stencil.stop) if j != i]
            factors = [(t - t_j) / (t_i - t_j) for t_j in others]
            lagrange = math.prod(factors)
            change = sum(math.prod(factors[:k] + factors[k + 1 :]) / (t_i - t_k) for k, t_k in enumerate(others))  # l_i'(t)
            bend = sum(1 / (t_i - t_j) for t_j in others)  # l_i'(t_i)
            linear = 1 - 2 * (t - t_i) * bend
            value[i], slope[i] = linear * lagrange**2, 2 * lagrange * (linear * change - bend * lagrange)
            value[n + i] = -(t - t_i) * lagrange**2
            slope[n + i] = -(lagrange**2) - 2 * (t - t_i) * lagrange * change
        return [value, slope]

    def _stencil(self, t: float) -> slice:
        """The points to use: those around t whose intervals are not so much shorter than t's own that rounding grows."""
        n = len(self.times)
        first = min(max(sum(t_i <= t for t_i in self.times) - 1, 0), n - 2)
        last = first + 1
        shortest = (self.times[last] - self.times[first]) * (0.01 if self.theta.dtype == torch.float64 else 0.3)
        while first > 0 and self.times[first] - self.times[first - 1] >= shortest:
            first -= 1
        while last < n - 1 and self.times[last + 1] - self.times[last] >= shortest:
            last += 1
        return slice(first, last + 1)


def lagrange_weights(t: float, nodes: Sequence[float]) -> list[float]:
    """The values at t of the Lagrange polynomials of distinct nodes."""
    return [math.prod((t - other) / (own - other) for j, other in enumerate(nodes) if j != i) for i, own in enumerate(nodes)]


# The longest step in logarithmic time: one more would only carry a flow that stands still past the largest number.
LONGEST = 40.0


@dataclass(frozen=True)
class Clock:
    """Logarithmic time τ = log(1 + (t − origin)/unit), in which the polynomials of the method are drawn.

    A flow that settles goes through its changes in equal steps of log t, and polynomials in τ follow that for longer: on T33
    steps are a quarter fewer at equal error than with polynomials in t. Over steps short against t the two are the same. In τ
    the flow is dθ/dτ = −(dt/dτ) ∇L(θ), a gradient flow at another speed.

    Attributes:
        origin: Where the flow began.
        unit: The time below which τ is linear in t.
    """

    origin: float
    unit: float

    def of(self, t: float) -> float:
        """τ(t)."""
        return math.log1p((t - self.origin) / self.unit)

    def between(self, t: float, later: float) -> float:
        """τ(later) − τ(t), also where these are close to each other."""
        return math.log1p((later - t) / (t - self.origin + self.unit))

    def rate(self, t: float) -> float:
        """dτ/dt."""
        return 1 / (t - self.origin + self.unit)

    def after(self, t: float, step: float) -> float:
        """The time from t on that a step in τ takes."""
        return math.expm1(min(step, LONGEST)) * (t - self.origin + self.unit)


def polynomial(t: float, times: Sequence[float], theta: Tensor, clock: Clock | None = None) -> Tensor:
    """The value at t of the polynomial, in the clock's time, through the first ``len(times)`` rows of theta; ``(P,)``."""
    if clock is not None:
        now = times[0]
        t, times = -clock.between(t, now), [-clock.between(own, now) for own in times]
    return theta.new_tensor(lagrange_weights(t, times)) @ theta[: len(times)]


@dataclass(frozen=True)
class FlowPath:
    """θ(t) over a whole solution, by each step's own interpolation.

    Attributes:
        times: The accepted points' flow times, ascending.
        pieces: For each step between them, θ(t) within it.
        scale: Factors s where the flow was followed in the coordinates θ/s, shape ``(P,)``; or None.
    """

    times: tuple[float, ...]
    pieces: tuple[Callable[[float], Tensor], ...]
    scale: Tensor | None = None

    def __call__(self, t: float) -> Tensor:
        """θ(t), shape ``(P,)``.

        Raises:
            ValueError: If t is outside of the solution.
        """
        if not self.times[0] <= t <= self.times[-1]:
            raise ValueError(f"t must lie within the solution, from {self.times[0]:g} to {self.times[-1]:g}, not at {t!r}.")
        theta = self.pieces[max(bisect_left(self.times, t) - 1, 0)](t)
        return theta if self.scale is None else theta * self.scale


def path_through(
    knots: Sequence[Knot], interpolants: Sequence[Callable[[float], Tensor] | None], width: int, scale: Tensor | None
) -> FlowPath:
    """The path through accepted points; steps without an interpolant of their own get that of ``HermiteWindow``.

    Args:
        knots: Accepted points, t ascending.
        interpolants: One for each step between them, or None.
        width: Accepted points through which slopes interpolate.
        scale: See ``FlowPath``.
    """
    pieces: list[Callable[[float], Tensor]] = []
    for i, own in enumerate(interpolants):
        if own is None:
            first = max(0, min(i + 1 - width // 2, len(knots) - width))
            own = HermiteWindow.through(list(knots[first : first + max(2, width)]))
        pieces.append(own)
    if not pieces:
        pieces.append(lambda t: knots[0].theta)
    return FlowPath(tuple(knot.t for knot in knots), tuple(pieces), scale)
