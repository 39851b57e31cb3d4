"""Expectations of steps, ramps and their derivatives: what the pair functions of ReLU, erf and the normal cdf are made of.

For the step Θ, with Θ⁽⁻¹⁾(y) = max(y, 0), Θ⁽¹⁾ = δ, Θ⁽²⁾ = δ′, … and jointly normal y₁, y₂,

    S_kl = E[Θ⁽ᵏ⁾(y₁) Θ⁽ˡ⁾(y₂)].

S_00 is the probability of a quadrant, S_11 the density at the origin; the others follow from y Θ⁽ᵏ⁺¹⁾(y) = −k Θ⁽ᵏ⁾(y) and
integration by parts (Stein's lemma), E[y₁ G] = b E[G] + p E[∂₁G] + q E[∂₂G].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_gradflow.population.hermite import hermite_values
from torch_gradflow.population.normal import ROOT_2_PI, density, distribution, given, orthant

# S_11 and what is made of it grow like 1/sine of the angle between y₁ and y₂, and cancel in second derivatives; where the sine
# is below this, they are taken there, so that neither the error nor what is lost by cancellation exceeds about 1e-8.
_LEAST_SINE = 1e-8


def single(k: int, p: Tensor, b: Tensor | None) -> Tensor:
    """E[Θ⁽ᵏ⁾(y)] for y ~ N(b, p) and k = −1, …, 4; b is None for 0."""
    root = p.sqrt()
    h = torch.zeros_like(p) if b is None else b / root
    if k == 0:
        return distribution(h)
    first = density(h) / root
    if k == 1:
        return first
    if k == -1:
        return root * (h * distribution(h) + density(h))
    second = -h / root * first
    if k == 2:
        return second
    third = -(first + h * root * second) / p
    return third if k == 3 else -(2 * second + h * root * third) / p


def coefficients(k: int, p: Tensor, b: Tensor | None, n_terms: int) -> Tensor:
    """E[Θ⁽ᵏ⁾(y) h_m(x)] for y = b + √p x, Hermite polynomials h_m and m < n_terms; shape ``(n, n_terms)``.

    Those of δ are the density times h_m where y = 0; from one derivative to the next it is
    √p E[Θ⁽ᵏ⁺¹⁾ h_m] = √(m + 1) E[Θ⁽ᵏ⁾ h_{m+1}].

    Args:
        k: From −1 to 4.
        p: Variances, shape ``(n,)``.
        b: Means, shape ``(n,)``, or None.
        n_terms: How many.
    """
    root = p.sqrt()
    x = torch.zeros_like(p) if b is None else -b / root
    found = hermite_values(x, n_terms + max(k - 1, 0)) * (torch.exp(-0.25 * x * x) / (ROOT_2_PI * root))[:, None]
    roots = torch.arange(1, found.shape[1] + 1, dtype=p.dtype, device=p.device).sqrt()
    for order in range(0, k - 1 if k < 1 else 0, -1):
        found = torch.cat([single(order, p, b)[:, None], root[:, None] * found[:, :-1] / roots[:-1]], 1)
    for _ in range(1, k):
        found = found[:, 1:] * roots[: found.shape[1] - 1] / root[:, None]
    return found


@dataclass(frozen=True)
class Steps:
    """Of pairs (y₁, y₂); all shapes broadcast.

    Attributes:
        p: The variance of y₁.
        r: That of y₂.
        q: Their covariance.
        root: √(p r − q²).
        b: The mean of y₁; None where both means are zero.
        c: That of y₂.
    """

    p: Tensor
    r: Tensor
    q: Tensor
    root: Tensor
    b: Tensor | None
    c: Tensor | None

    def moment(self, k: int, l: int) -> Tensor:  # noqa: E741  # as in the formulas
        """S_kl for l ≤ k with −1 ≤ l ≤ 2, k + l ≤ 4."""
        return self._formulas[k, l]()

    @property
    def _formulas(self) -> dict[tuple[int, int], Callable[[], Tensor]]:
        return {
            (-1, -1): lambda: self._stein(self.p * self._s1r + self.q * self._s00, lambda: self._s0r),
            (0, -1): lambda: self._s0r,
            (1, -1): lambda: self._s1r,
            (2, -1): lambda: self._s2r,
            (3, -1): lambda: self._stein(self._s1r + self.q * self._s20, lambda: self._s2r) / -self.p,
            (0, 0): lambda: self._s00,
            (1, 0): lambda: self._s10,
            (2, 0): lambda: self._s20,
            (3, 0): lambda: self._s30,
            (4, 0): lambda: self._stein(2 * self._s20 + self.q * self._s31, lambda: self._s30) / -self.p,
            (1, 1): lambda: self._s11,
            (2, 1): lambda: self._s21,
            (2, 2): lambda: self._s22,
            (3, 1): lambda: self._s31,
        }

    def _stein(self, rest: Tensor, times_b: Callable[[], Tensor]) -> Tensor:
        """``rest`` + b ``times_b()``; what is not needed is not computed."""
        return rest if self.b is None else rest + self.b * times_b()

    @cached_property
    def _gap(self) -> Tensor:
        """p r − q²; at least what it is where the sine of the angle is ``_LEAST_SINE``."""
        return torch.maximum(self.root * self.root, _LEAST_SINE**2 * self.p * self.r)

    @cached_property
    def _given_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of y₂ where y₁ = 0, its standard deviation there, and the ratio of the two."""
        deviation = self.root / self.p.sqrt()
        if self.b is None or self.c is None:
            zero = torch.zeros_like(deviation)
            return zero, deviation, zero
        scale = (self.p * self.r).sqrt()
        ratio = given(self.b / self.p.sqrt(), self.c / self.r.sqrt(), self.q / scale, self.root / scale)[0]
        return ratio * deviation, deviation, ratio

    @cached_property
    def _slopes(self) -> tuple[Tensor, Tensor] | None:
        """Minus the logarithmic derivatives of the density at the origin by b and c; None where they are zero."""
        if self.b is None or self.c is None:
            return None
        return (self.r * self.b - self.q * self.c) / self._gap, (self.p * self.c - self.q * self.b) / self._gap

    @cached_property
    def _s00(self) -> Tensor:
        scale = (self.p * self.r).sqrt()
        h, k = (None, None) if self.b is None or self.c is None else (self.b / self.p.sqrt(), self.c / self.r.sqrt())
        return orthant(h, k, self.q / scale, self.root / scale)

    @cached_property
    def _s10(self) -> Tensor:
        return single(1, self.p, self.b) * distribution(self._given_zero[2])

    @cached_property
    def _s11(self) -> Tensor:
        if self.b is None:
            return 1 / (2 * math.pi * self._gap.sqrt())
        return single(1, self.p, self.b) * density(self._given_zero[2]) * (self.p / self._gap).sqrt()

    @cached_property
    def _s20(self) -> Tensor:
        return self._stein(self.q * self._s11, lambda: self._s10) / -self.p

    @cached_property
    def _s21(self) -> Tensor:
        return torch.zeros_like(self._s11) if self._slopes is None else -self._slopes[0] * self._s11

    @cached_property
    def _s22(self) -> Tensor:
        curvature = self.q / self._gap
        return (curvature if self._slopes is None else curvature + self._slopes[0] * self._slopes[1]) * self._s11

    @cached_property
    def _s30(self) -> Tensor:
        return self._stein(self._s10 + self.q * self._s21, lambda: self._s20) / -self.p

    @cached_property
    def _s31(self) -> Tensor:
        curvature = -self.r / self._gap
        return (curvature if self._slopes is None else curvature + self._slopes[0] ** 2) * self._s11

    @cached_property
    def _s0r(self) -> Tensor:
        swapped = Steps(self.r, self.p, self.q, self.root, self.c, self.b)
        rest = self.r * swapped._s10 + self.q * self._s10
        return rest if self.c is None else rest + self.c * self._s00

    @cached_property
    def _s1r(self) -> Tensor:
        mean, deviation, ratio = self._given_zero
        ramp = mean * distribution(ratio) + deviation * density(ratio)
        return single(1, self.p, self.b) * ramp

    @cached_property
    def _s2r(self) -> Tensor:
        return self._stein(self.q * self._s10, lambda: self._s1r) / -self.p
