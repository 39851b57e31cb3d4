"""Runge–Kutta–Chebyshev: an explicit method of order 2 whose s gradients per step reach s² times as far as one would.

For dθ/dt = −∇L(θ) an explicit method must keep h λ below its stability boundary β, λ the largest eigenvalue of the Hessian:
that, not accuracy, is what limits it on a stiff flow. Here the s stages of a step are spent on stability: the stability
polynomial is a shifted Chebyshev polynomial, β ≈ 0.65 s², and a step over h costs √(h λ/0.65) gradients instead of the h λ/2
of s Euler steps. No Hessian, no linear system, a few vectors: for networks too large, or losses too rough, for what needs
either. The price: cost grows with √λ, which implicit methods do not feel.

The method (P. J. van der Houwen, B. P. Sommeijer, On the internal stability of explicit, m-stage Runge–Kutta methods for large
m-values, ZAMM 60, 1980; B. P. Sommeijer, L. F. Shampine, J. G. Verwer, RKC: an explicit solver for parabolic PDEs, J. Comput.
Appl. Math. 88, 1998), with the Chebyshev polynomials T_j, w₀ = 1 + ε/s², w₁ = T_s′(w₀)/T_s″(w₀), b_j = T_j″(w₀)/T_j′(w₀)²,
b₀ = b₂, b₁ = 1/w₀, a_j = 1 − b_j T_j(w₀), for the increments D_j of the stages, f_j = −∇L(θ + D_j):

    D₀ = 0,  D₁ = b₁ w₁ h f₀,
    D_j = (2 w₀ b_j/b_{j−1}) D_{j−1} − (b_j/b_{j−2}) D_{j−2} + (2 w₁ b_j/b_{j−1}) h (f_{j−1} − a_{j−1} f₀),

so that D_s = (P_s(−hH) − 1) θ for L = ½ θᵀHθ, P_s(z) = a_s + b_s T_s(w₀ + w₁ z) = 1 + z + z²/2 + O(z³). It lies between
a_s − b_s ≈ 1/3 and a_s + b_s ≈ 1 − ε/3 for −β ≤ z ≤ −w₁⁻¹ε/s², β = (1 + w₀)/w₁ ≈ ⅔ (s² − 1)(1 − 2ε/15). Increments rather than
the stages themselves go through the recursion, so that what is small is rounded as what is small.

What rounding allows: an error in stage k reaches the end of the step multiplied by (b_s/b_k) U_{s−k}(w₀ + w₁ z), at most
1.3 (s − k + 1), so s stages add up to about s²/2 (J. G. Verwer, W. H. Hundsdorfer, B. P. Sommeijer, Convergence properties
of the Runge–Kutta–Chebyshev method, Numer. Math. 57, 1990). That many roundings u/2 of one sign would take the whole local
tolerance τ at s = 2 √(τ/u), where steps end: 1.3 million stages at rtol = 10⁻⁴ in float64, 57 in float32. (Roundings have
both signs: in float32, with eigenvalues up to 10⁶, such steps were as accurate as those with a quarter of the stages.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.flow.control import norm, weights
from torch_gradflow.flow.method import Derivative, Span
from torch_gradflow.flow.onestep import OneStepMethod, Stepper, Trial
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective

# ε: stiff modes lose 5 % per step at least, for 2 % of the boundary (the value of Sommeijer, Shampine and Verwer).
DAMPING = 2 / 13
# What β(s)/(s² − 1) tends to, 2 (κ coth κ − 1)/κ² with κ = √(2ε), and is to 0.2 % from s = 2 on: ⅔ (1 − 2ε/15), nearly.
BOUNDARY = 2 * (math.sqrt(2 * DAMPING) / math.tanh(math.sqrt(2 * DAMPING)) - 1) / (2 * DAMPING)
# λ is estimated again after so many accepted steps, as in their code; that takes two or three gradients.
REFRESH = 25
# And after a step that failed, if the estimate is so many accepted steps old: a younger one is not to blame, and at the
# kinks of ReLU networks, where a third of the steps fail, an estimate each time took 18 % of the gradients.
REFRESH_FAILED = 5
# λ is taken to be larger than its estimate by this: it may grow until the next one. (T33, seeds 1–3: 5 % costs some rejected
# steps, 20 % costs 4 % more stages.)
MARGIN = 1.1
# Lanczos steps at most, and the relative error bound at which they end earlier. What is left of the bound is added to λ.
LANCZOS = 8
LANCZOS_ACCURACY = 0.05
# The rtol at which the local tolerance is rtol itself, see ``local_tolerance``.
CALIBRATED_AT = 1e-4

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Coefficients:
    """The recursion of s stages.

    Attributes:
        first: b₁ w₁: D₁ is this times h f₀.
        rest: For j = 2, …, s the factors of D_{j−1}, D_{j−2}, h f_{j−1} and h f₀.
    """

    first: float
    rest: tuple[tuple[float, float, float, float], ...]


@lru_cache(maxsize=64)
def coefficients(n_stages: int) -> Coefficients:
    """The coefficients for s ≥ 2 stages, to a few roundings for any s.

    With w₀ = cosh α: T_j = cosh jα, T_j′ = j U_{j−1}, U_k = sinh((k + 1) α)/sinh α, T_j″ = j U_{j−1}′, and, to avoid the
    cancellation of the closed form at small jα, the sum of positive terms U_k′ = U_{k−2}′ + 2k U_{k−1}.
    """
    s = n_stages
    excess = DAMPING / s**2
    alpha = _angle(excess)
    j = np.arange(s + 1)
    first_kind = np.cosh(j * alpha)
    second_kind = np.sinh(j[1:] * alpha) / np.sinh(alpha)  # U_0, …, U_{s−1}
    terms = np.concatenate([[0.0], 2 * j[1:s] * second_kind[: s - 1]])
    slope = np.empty(s)  # U_0′, …, U_{s−1}′
    slope[0::2], slope[1::2] = np.cumsum(terms[0::2]), np.cumsum(terms[1::2])
    w0, w1 = 1 + excess, second_kind[-1] / slope[-1]
    b = np.empty(s + 1)
    b[2:] = slope[1:] / (j[2:] * second_kind[1:] ** 2)
    b[0], b[1] = b[2], 1 / w0
    a = 1 - b * first_kind
    a[1] = 0.0
    newer, older = 2 * w0 * b[2:] / b[1:-1], -b[2:] / b[:-2]
    slopes = 2 * w1 * b[2:] / b[1:-1]
    table = np.stack([newer, older, slopes, -a[1:-1] * slopes], axis=1)
    return Coefficients(float(b[1] * w1), tuple((row[0], row[1], row[2], row[3]) for row in table.tolist()))


def stability_boundary(n_stages: int) -> float:
    """β(s) = (1 + w₀)/w₁: up to it |P_s(−hλ)| is at most about 1 − ε/3 (but near 0, where it is e^(−hλ))."""
    excess = DAMPING / n_stages**2
    alpha = _angle(excess)
    sinh = math.sinh(alpha)
    return (2 + excess) * (n_stages * sinh / math.tanh(n_stages * alpha) - (1 + excess)) / sinh**2


def stages_for(reach: float) -> int:
    """The least number of stages s ≥ 2 with β(s) ≥ hλ."""
    s = max(2, math.floor(math.sqrt(1 + max(reach, 0.0) / BOUNDARY)) - 1)
    while stability_boundary(s) < reach:
        s += 1
    return s


def most_stages(tolerance: float, resolution: float) -> int:
    """How many stages rounding allows, see the module."""
    return max(2, math.floor(2 * math.sqrt(tolerance / resolution)))


def increment(
    gradient_at: Callable[[Tensor], Tensor], theta: Tensor, gradient: Tensor, step_size: float, scheme: Coefficients
) -> Tensor:
    """D_s, shape ``(P,)``, by s − 1 gradients.

    Args:
        gradient_at: ∇L.
        theta: θ, shape ``(P,)``.
        gradient: ∇L(θ).
        step_size: h.
        scheme: The coefficients for s stages.
    """
    older, newer = torch.zeros_like(theta), gradient * (-scheme.first * step_size)
    for on_newer, on_older, on_slope, on_first in scheme.rest:
        slope = gradient_at(theta + newer)
        older.mul_(on_older).add_(newer, alpha=on_newer)
        older.sub_(slope, alpha=on_slope * step_size).sub_(gradient, alpha=on_first * step_size)
        older, newer = newer, older
    return newer


def error_estimate(change: Tensor, gradient: Tensor, gradient_there: Tensor, step_size: float) -> Tensor:
    """(12 (θ − θ₁) + 6 h (f + f₁))/15, shape ``(P,)``: 12/15 of the difference to the trapezoidal rule.

    Along the exact flow it is h³ θ‴/15 + O(h⁴): 12 (h³/4 − h³/6) = h³. With the step's own error, −h³ θ‴/15 for large s
    (P_s(z) = 1 + z + z²/2 + z³/10 + O(z⁴)), it becomes 9/5 of that error: an estimate on the safe side. In stiff modes, where
    θ is at rest up to an error δ, it is about 0.4 h λ δ: it sees gradients that are not at rest.
    """
    return change.mul(-0.8).sub_(gradient + gradient_there, alpha=0.4 * step_size)


def local_tolerance(rtol: float, resolution: float) -> float:
    """τ = rtol √(rtol/10⁻⁴): the relative error allowed per step so that that of the flow falls in proportion to rtol.

    n steps of order 2 with an error of τ each, n ~ τ^(−1/3), add up to τ^(2/3): with τ = rtol, a hundredth of rtol would give
    a 22nd of the error (G. Söderlind, L. Wang, Evaluating numerical ODE/DAE methods, algorithms and software, J. Comput.
    Appl. Math. 185, 2006). So calibrated, the error on T33 (seeds 1–3, atol = rtol) is between a sixth of rtol and 8 rtol, for
    rtol from 10⁻³ to 10⁻⁸ up to t = 10³, for 10⁻⁴ and 10⁻⁵ up to 10⁷. Not below 20 roundings.
    """
    return max(rtol * math.sqrt(rtol / CALIBRATED_AT), 20 * resolution)


def largest_curvature(product: Product, start: Tensor) -> tuple[float, Tensor]:
    """An upper bound of the largest eigenvalue of a symmetric matrix, as a rule within 5 %, and its approximate eigenvector.

    Up to 8 Lanczos steps. The residual norm of the largest Ritz value is added to it (Y. Zhou, R.-C. Li, Bounding the
    spectrum of large Hermitian matrices, Linear Algebra Appl. 435, 2011): from a start without memory that is too large rather
    than too small. Zero where nothing is known, because no product was finite.

    Args:
        product: v ↦ Hv for unit vectors v of shape ``(P,)``.
        start: A vector with some of the wanted eigenvector in it, not zero.
    """
    n = min(LANCZOS, start.numel())
    basis = start.new_empty(n, start.numel())
    basis[0] = start / start.norm()
    ritz = np.zeros((n, n))
    value, residual, vector = 0.0, 0.0, basis[0].clone()
    for k in range(n):
        image = product(basis[k])
        size = float(image.norm())
        if not math.isfinite(size):
            break
        ritz[k, k] = float(basis[k] @ image)
        for _ in range(2):  # once is not enough where the image is nearly in the span
            image = image - (basis[: k + 1] @ image) @ basis[: k + 1]
        left = float(image.norm())
        values, vectors = np.linalg.eigh(ritz[: k + 1, : k + 1])
        value, residual = float(values[-1]), left * abs(float(vectors[-1, -1]))
        vector = basis.new_tensor(vectors[:, -1].tolist()) @ basis[: k + 1]
        if residual <= LANCZOS_ACCURACY * abs(value) or left <= 1e-12 * size or k == n - 1:
            break
        ritz[k, k + 1] = ritz[k + 1, k] = left
        basis[k + 1] = image / left
    return value + residual, vector


class _Rkc2Run(Stepper):
    """One run: λ, its eigenvector (the one row of ``curvature``), and how many steps ago they were estimated."""

    def __init__(self, objective: Objective, span: Span, numbers: tuple[float, ...], exact: bool) -> None:
        self._objective = objective
        self._exact = exact
        tolerance = local_tolerance(span.rtol, objective.resolution)
        self._rtol, self._atol = tolerance, span.atol * tolerance / span.rtol
        self._most = most_stages(tolerance, objective.resolution)
        self._largest, age = numbers or (math.nan, 0.0)
        self._age = int(age)
        self._here: Knot | None = None
        self._tried = False

    def numbers(self) -> tuple[float, ...]:
        """λ, and the steps since it was estimated."""
        return self._largest, float(self._age)

    def attempt(self, here: Knot, step_size: float) -> Trial | float:
        """See ``Stepper``."""
        self._look(here)
        if self._largest > 0:
            longest = stability_boundary(self._most) / self._largest
            if step_size > longest * (1 + 1e-9):
                return longest
        self._tried = True
        n_stages = min(self._most, stages_for(step_size * self._largest))
        change = increment(self._gradient_at, here.theta, here.gradient, step_size, coefficients(n_stages))
        theta = here.theta + change
        loss, gradient = self._objective.loss_and_gradient(theta)
        error = error_estimate(change, here.gradient, gradient, step_size)
        return Trial(theta, norm(error, weights(self._rtol, self._atol, here.theta, theta)), (loss, gradient))

    def _gradient_at(self, theta: Tensor) -> Tensor:
        return self._objective.loss_and_gradient(theta)[1]

    def _look(self, here: Knot) -> None:
        """Estimate λ where that is due: at first, after ``REFRESH`` accepted steps, or after a step that failed."""
        if here is not self._here:
            self._here, self._tried = here, False
            self._age += 1
            due = math.isnan(self._largest) or self._age > REFRESH
        else:
            due = self._tried and self._age >= REFRESH_FAILED
        if due:
            self._estimate(here)

    def _estimate(self, here: Knot) -> None:
        value, vector = largest_curvature(self._product(here), _beginning(self.curvature, here.gradient))
        self._largest, self._age, self.curvature = MARGIN * max(value, 0.0), 0, vector[None]

    def _product(self, here: Knot) -> Product:
        """H(θ)v, or (∇L(θ + δv) − ∇L(θ))/δ with δ = √u ‖θ‖, where truncation and rounding are alike."""
        if self._exact:
            return lambda vector: self._objective.hvp(here.theta, vector)
        delta = math.sqrt(self._objective.resolution) * (float(here.theta.norm()) or 1.0)
        return lambda vector: (self._gradient_at(here.theta + delta * vector) - here.gradient) / delta


class Rkc2(OneStepMethod):
    """RKC2 with as many stages as the largest curvature asks for.

    Args:
        exact: Whether the largest curvature is estimated by Hessian–vector products. By default it is by differences to the
            gradient at the accepted point, one gradient each, where a product costs more than one gradient; they also see the
            kinks of a loss that has no Hessian.
    """

    name = "rkc2"
    order = 2
    estimate = 2
    n_knots = 2

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self.needs: Derivative = "hvp" if exact else "gradient"

    def begin(self, objective: Objective, span: Span, numbers: tuple[float, ...]) -> Stepper:
        """See ``OneStepMethod``."""
        return _Rkc2Run(objective, span, numbers, self._exact)


def _angle(excess: float) -> float:
    """α with cosh α = 1 + excess, to full relative accuracy."""
    return math.log1p(excess + math.sqrt(excess * (2 + excess)))


def _beginning(known: Tensor | None, gradient: Tensor) -> Tensor:
    """Where Lanczos begins: at what was the eigenvector, and at the gradient, in which a mode that overtook it shows."""
    if known is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(gradient.numel(), generator=generator).to(gradient)
        vector = noise / noise.norm()
    else:
        vector = known[0]
    size = float(gradient.norm())
    mixed: Tensor = vector + gradient * (0.5 / size) if size else vector
    return mixed
