"""Values between accepted points: Hermite interpolation through θ and dθ/dt."""

from __future__ import annotations

import math
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
        """θ(t) for t within the window, shape ``(P,)``.

        With the Lagrange polynomials l_i: θ(t) = Σ (1 − 2 (t − t_i) l_i'(t_i)) l_i(t)² θ_i + (t − t_i) l_i(t)² θ_i'.
        """
        stencil = self._stencil(t)
        times = self.times[stencil]
        values, slopes = [], []
        for i, t_i in enumerate(times):
            others = [t_j for j, t_j in enumerate(times) if j != i]
            lagrange = math.prod((t - t_j) / (t_i - t_j) for t_j in others)
            derivative = sum(1 / (t_i - t_j) for t_j in others)
            values.append((1 - 2 * (t - t_i) * derivative) * lagrange**2)
            slopes.append(-(t - t_i) * lagrange**2)
        weights = self.theta.new_tensor([values, slopes])
        return weights[0] @ self.theta[stencil] + weights[1] @ self.gradient[stencil]

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
