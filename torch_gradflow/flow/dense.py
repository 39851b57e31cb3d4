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
        """θ(t) for t within the window, shape ``(P,)``."""
        return self._combine([self._weights(t, self._stencil(t))])[0]

    def with_error(self, t: float, rtol: float, atol: float) -> tuple[Tensor, float]:
        """θ(t), and an estimate of its error in units of the tolerance (root mean square over the parameters).

        Polynomials through one and two points fewer converge geometrically where the points are dense enough: with their
        distances d₁ = |p_s − p_{s−1}| and d₂ = |p_{s−1} − p_{s−2}| the error is about d₁²/d₂. Cubics (s = 2) serve methods of
        so low an order that their steps are short; no error is estimated for them.
        """
        widest = self._stencil(t)
        stencils = [widest]
        while len(stencils) < 3 and stencils[-1].stop - stencils[-1].start > 1:
            stencils.append(self._without_farthest(t, stencils[-1]))
        values = self._combine([self._weights(t, stencil) for stencil in stencils])
        if len(self.times) < 3:
            return values[0], 0.0
        scale = atol + rtol * values[0].abs()
        near, far = (float(((values[k] - values[k + 1]) / scale).square().mean().sqrt()) for k in (0, 1))
        return values[0], near * min(1.0, near / far) if far > 0 else near

    def _combine(self, weights: list[list[float]]) -> Tensor:
        return self.theta.new_tensor(weights) @ torch.cat([self.theta, self.gradient])

    def _weights(self, t: float, stencil: slice) -> list[float]:
        """The weights of all θ_i and ∇L_i in θ(t); zero outside of the stencil.

        With the Lagrange polynomials l_i: θ(t) = Σ (1 − 2 (t − t_i) l_i'(t_i)) l_i(t)² θ_i + (t − t_i) l_i(t)² θ_i'.
        """
        n = len(self.times)
        weights = [0.0] * (2 * n)
        for i in range(stencil.start, stencil.stop):
            t_i = self.times[i]
            others = [self.times[j] for j in range(stencil.start, stencil.stop) if j != i]
            lagrange = math.prod((t - t_j) / (t_i - t_j) for t_j in others)
            derivative = sum(1 / (t_i - t_j) for t_j in others)
            weights[i] = (1 - 2 * (t - t_i) * derivative) * lagrange**2
            weights[n + i] = -(t - t_i) * lagrange**2
        return weights

    def _without_farthest(self, t: float, stencil: slice) -> slice:
        if abs(t - self.times[stencil.start]) > abs(t - self.times[stencil.stop - 1]):
            return slice(stencil.start + 1, stencil.stop)
        return slice(stencil.start, stencil.stop - 1)

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
