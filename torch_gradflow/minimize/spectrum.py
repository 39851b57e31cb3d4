"""Eigenvalues of a Hessian, each with how well it is known: all of them, or the extreme ones from products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.minimize.rounding import rounded
from torch_gradflow.objectives.base import Objective

Products = Callable[[Tensor], Tensor]

# Rows of a Hessian that differ by less in size are left as they are: rounding then hides no more than it has to.
BALANCED = 1e6
# A row that rounding changes by more than this part of its size is noise, and is not scaled up.
NOISE = 1e-3
# How much larger than in a few trials the effect of rounding on an eigenvalue may be.
NOISE_FACTOR = 10.0
# Vectors of a Lanczos basis: the lowest eigenvalues lie close together and take many, which are kept to stay orthogonal.
LANCZOS_STEPS = 300
# The chance that an eigenvalue lies below the bound that is given for the lowest one.
RISK = 1e-3


@dataclass(frozen=True)
class Extremes:
    """Eigenpairs at both ends of a spectrum.

    Attributes:
        values: Ritz values, ascending, shape ``(k,)``.
        vectors: Ritz vectors, shape ``(P, k)``.
        residuals: ‖Hv − λv‖ of each, shape ``(k,)``: an eigenvalue lies within that distance (Weinstein 1934).
        lowest: All eigenvalues lie above this, but for a chance of ``RISK``.
        n_steps: Products that were taken for it.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    lowest: float
    n_steps: int


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues of a Hessian, and how many of them are negative or zero.

    Attributes:
        scale: s: numbers and vectors belong to S H S, which has as many negative, zero and positive eigenvalues as H
            (Sylvester's law of inertia).
        values: The eigenvalues of S H S, ascending, shape ``(P,)``.
        vectors: Its eigenvectors, shape ``(P, P)``.
        null: Which of the values cannot be told from zero.
        negative: Which are certainly negative.
        step: The Newton step in θ/s, over the values that are above rounding.
        decrement: √(gᵀ H⁺ g) over the same.
        tolerance: Up to which size values count as zero: the largest uncertainty of those that do, or that of rounding.
        eigenvalues: Those of H, ascending, shape ``(P,)``.
        uncertainties: How well each of them is known.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor
    null: Tensor
    negative: Tensor
    step: Tensor
    decrement: float
    tolerance: float
    eigenvalues: Tensor
    uncertainties: Tensor

    @property
    def n_zero(self) -> int:
        """Eigenvalues that cannot be told from zero."""
        return int(self.null.sum())

    @property
    def n_negative(self) -> int:
        """Eigenvalues that are certainly negative."""
        return int(self.negative.sum())

    @property
    def directions(self) -> Tensor:
        """The eigenvectors as directions of θ, shape ``(P, P)``."""
        return self.scale[:, None] * self.vectors


def full_spectrum(objective: Objective, theta: Tensor, gradient: Tensor, hessian: Tensor) -> Spectrum:
    """All eigenvalues; where some seem to be zero and H is badly scaled, those of a balanced H, if these leave none zero.

    One more Hessian, at the end of the Newton step; where H is badly scaled and seems singular, five.
    """
    found = _in_scale(objective, theta, gradient, hessian, torch.ones_like(theta), 0.0)
    if found.n_zero == 0:
        return found
    scale, noise = balance(hessian, lambda: [objective.hessian(point) - hessian for point in rounded(objective, theta, 3)])
    if not bool((scale != 1).any()):
        return found
    balanced = _in_scale(objective, theta, gradient, hessian, scale, noise)
    return balanced if balanced.n_zero == 0 else found


def _in_scale(objective: Objective, theta: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, noise: float) -> Spectrum:
    """From S H S, whose elements are known up to what changes its eigenvalues by ``noise``."""
    values, vectors = torch.linalg.eigh(scale[:, None] * hessian * scale)
    unit = objective.n_parameters * objective.resolution
    rounding = unit * float(values.abs().max()) + noise
    components = vectors.T @ (scale * gradient)
    resolved = values.abs() > rounding
    step = vectors @ torch.where(resolved, -components / torch.where(resolved, values, 1.0), 0.0)
    decrement = float((components[resolved] ** 2 / values[resolved]).abs().sum().sqrt())
    move, limit = scale * step, 0.1 * (1 + float(theta.norm()))
    there = objective.hessian(theta + move * min(1.0, limit / max(float(move.norm()), 1e-300)))
    uncertainties = rounding + 2 * (torch.linalg.eigvalsh(scale[:, None] * there * scale) - values).abs()
    null = values.abs() <= uncertainties
    tolerance = float(uncertainties[null].max()) if bool(null.any()) else rounding
    shown, known_to = values, uncertainties
    if bool((scale != 1).any()):
        shown, known_to = graded_eigenvalues(hessian, scale, unit)
        known_to = known_to + 2 * (graded_eigenvalues(there, scale, unit)[0] - shown).abs()
    negative = values < -uncertainties
    return Spectrum(scale, values, vectors, null, negative, step, decrement, tolerance, shown, known_to)


def balance(hessian: Tensor, changes: Callable[[], list[Tensor]]) -> tuple[Tensor, float]:
    """Scales s with which S H S has rows of about the same size; 1 where H is well scaled as it is.

    Of a matrix S H S that is well conditioned the signs of the eigenvalues can be told, however badly scaled H is (Barlow
    and Demmel 1990, SIAM J. Numer. Anal. 27, 762–791).

    Args:
        hessian: H, shape ``(P, P)``.
        changes: Changes of H when θ is rounded; called only where H is badly scaled.

    Returns:
        Powers of 2, so that scaling rounds nothing, shape ``(P,)``: rows that are noise, or zero, share the scale of the
        largest row. And how much, by those changes, the eigenvalues of S H S may be wrong.
    """
    one = torch.ones_like(hessian[0])
    sizes = hessian.abs().amax(1)
    largest = float(sizes.max())
    if largest == 0.0 or bool((sizes * BALANCED >= largest).all()):
        return one, 0.0
    seen = changes()
    trusted = (torch.stack(seen).abs().amax((0, 2)) <= NOISE * sizes) & (sizes > 0)
    scale = torch.where(trusted, one, largest**-0.5)
    for _ in range(20):  # Ruiz 2001: converges within a factor of 2 in about log2(log2(spread)) steps
        rows = (scale[:, None] * hessian * scale).abs().amax(1)
        scale = torch.where(trusted, scale / rows.sqrt().clamp(min=1e-300), scale)
    scale = torch.exp2(scale.log2().round())
    noise = [float(torch.linalg.eigvalsh(scale[:, None] * change * scale).abs().max()) for change in seen]
    return scale, NOISE_FACTOR * max(noise)


def graded_eigenvalues(hessian: Tensor, scale: Tensor, n_parameters_eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a badly scaled H, and how far rounding may have moved them.

    Where S H S is positive definite, the small ones are the inverses of the large eigenvalues of H⁻¹ = S (S H S)⁻¹ S, which
    rounding hardly touches; else an absolute error of P ε ‖H‖ hides them.

    Args:
        hessian: H, shape ``(P, P)``.
        scale: s.
        n_parameters_eps: P ε.

    Returns:
        Values, ascending, and their errors; shape ``(P,)`` each.
    """
    values = torch.linalg.eigvalsh(hessian)
    errors = torch.full_like(values, n_parameters_eps * float(values.abs().max()))
    factor, failed = torch.linalg.cholesky_ex(scale[:, None] * hessian * scale)
    if int(failed) != 0:
        return values, errors
    inverse = scale[:, None] * torch.cholesky_inverse(factor) * scale
    reciprocals = torch.linalg.eigvalsh(0.5 * (inverse + inverse.T)).flip(0)
    small = 1 / reciprocals.clamp(min=1e-300)
    errors_small = n_parameters_eps * float(reciprocals.max()) * small**2
    better = (errors_small < errors) & (reciprocals > 0)
    return torch.where(better, small, values), torch.where(better, errors_small, errors)


def extremes(products: Products, like: Tensor, *, n_lowest: int = 6, n_steps: int = LANCZOS_STEPS) -> Extremes:
    """The lowest eigenvalues and the largest, by Lanczos' method with full reorthogonalisation.

    The bound below all eigenvalues is that of Kuczyński and Woźniakowski (1992, SIAM J. Matrix Anal. Appl. 13, 1094–1122,
    theorem 4.2) for a random start: after k steps the lowest Ritz value lies above the lowest eigenvalue by more than ε
    times the width of the spectrum with a probability of at most 1.648 √P exp(−√ε (2k − 1)).

    Args:
        products: V ↦ H V for V of shape ``(P, k)``.
        like: A vector of the shape, type and device of θ.
        n_lowest: How many of the lowest to give.
        n_steps: Most products with a single vector; ends earlier where a negative eigenvalue is certain, or the bound below
            all of them is positive.

    Returns:
        At most ``n_lowest`` pairs from below, and the highest one.
    """
    n = like.numel()
    n_steps = min(n, n_steps)
    generator = torch.Generator().manual_seed(0)
    basis = like.new_zeros(n_steps, n)
    diagonal, off = like.new_zeros(n_steps), like.new_zeros(n_steps)
    vector = _random_unit(basis[:0], generator)
    eps = torch.finfo(like.dtype).eps
    size = 0.0
    values, rotation = like.new_zeros(1), like.new_ones(1, 1)
    for k in range(n_steps):
        basis[k] = vector
        image = products(vector[:, None])[:, 0]
        diagonal[k] = vector @ image
        size = max(size, float(image.norm()))
        known = basis[: k + 1]
        for _ in range(2):  # once more, because the first pass rounds
            image = image - known.T @ (known @ image)
        rest = float(image.norm())
        if k + 1 == n_steps or (k + 1) % 10 == 0:
            inner = off[:k]
            tridiagonal = torch.diag(diagonal[: k + 1]) + torch.diag(inner, 1) + torch.diag(inner, -1)
            values, rotation = torch.linalg.eigh(tridiagonal)
            residual = rest * abs(float(rotation[-1, 0])) + 10 * n**0.5 * eps * size
            if float(values[0]) < -10 * residual or _bound(values, n, residual) > 0:
                break
        if k + 1 < n_steps:
            split = rest <= 100 * n**0.5 * eps * size  # an invariant subspace: go on in what is orthogonal to it
            off[k] = 0.0 if split else rest
            vector = _random_unit(known, generator) if split else image / rest
    m = len(values)
    chosen = sorted({*range(min(n_lowest, m)), m - 1})
    vectors = basis[:m].T @ rotation[:, chosen]
    vectors = vectors / vectors.norm(dim=0)
    images = products(vectors)
    ritz = (vectors * images).sum(0)
    residuals = (images - ritz * vectors).norm(dim=0) + n**0.5 * eps * size
    return Extremes(ritz, vectors, residuals, _bound(values, n, float(residuals[0])), m)


def _bound(values: Tensor, n: int, residual: float) -> float:
    """What all of n eigenvalues lie above, but for a chance of ``RISK``, after as many steps as there are Ritz values."""
    lowest, width = float(values[0]), float(values[-1] - values[0])
    if len(values) == n:
        return lowest - residual
    epsilon = (math.log(1.648 * math.sqrt(n) / RISK) / (2 * len(values) - 1)) ** 2
    # At both ends ε times the true width is missing at most, which bounds it by the width that is seen.
    return lowest - epsilon * width / (1 - 2 * epsilon) - residual if epsilon < 0.5 else -math.inf


def _random_unit(known: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector, orthogonal to the rows of what is known."""
    vector = torch.randn(known.shape[1], generator=generator, dtype=torch.float64).to(known)
    for _ in range(2):
        vector = vector - known.T @ (known @ vector)
    unit: Tensor = vector / vector.norm()
    return unit
