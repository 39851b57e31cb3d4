"""Neurons g(u·x + b) with standard normal x: the expectations of one neuron that the loss and its derivatives are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.perceptron.activations import Activation
from torch_gradflow.population import steps
from torch_gradflow.population.derivatives import check_smooth, derivative
from torch_gradflow.population.hermite import projection
from torch_gradflow.population.normal import ROOT_2, density, distribution
from torch_gradflow.population.steps import Steps

# The square of a norm counts as at least this, so that it can be divided by.
_LEAST_SQUARE = 1e-60
# Quadrature nodes: doubled until every second one would do, to this relative accuracy, as far as that many.
_FIRST_NODES, _MOST_NODES, _ENOUGH = 129, 4097, 1e-14
_LEAST_TERMS = 64


class Neurons(ABC):
    """Some neurons with one activation g: z_i = u_i·x + b_i for x ~ N(0, I).

    Args:
        u: Input weights, shape ``(n, d)``, in float64.
        b: Biases, shape ``(n,)``; None where they are 0.
    """

    def __init__(self, u: Tensor, b: Tensor | None) -> None:
        self.u, self.b = u, b

    @cached_property
    def variance(self) -> Tensor:
        """|u_i|², shape ``(n,)``."""
        return (self.u * self.u).sum(1).clamp(min=_LEAST_SQUARE)

    @abstractmethod
    def mean(self, k: int) -> Tensor:
        """E[g⁽ᵏ⁾(z)], shape ``(n,)``, for k ≤ 4."""

    @abstractmethod
    def mean_of_square(self, k: int) -> Tensor:
        """E[(g²)⁽ᵏ⁾(z)], shape ``(n,)``, for k ≤ 4."""

    @abstractmethod
    def coefficients(self, k: int, n_terms: int) -> Tensor:
        """E[g⁽ᵏ⁾(z) h_m(y)] for z = b + |u| y, Hermite polynomials h_m and m < n_terms; shape ``(n, n_terms)``."""


def _leibniz(k: int, product: Callable[[int, int], Tensor]) -> Tensor:
    """(g²)⁽ᵏ⁾ from ``product(i, j)`` = g⁽ⁱ⁾ g⁽ʲ⁾, i ≥ j."""
    total = product(k, 0) * (2 if k else 1)
    for i in range(1, k // 2 + 1):
        total = total + (1 if 2 * i == k else 2) * math.comb(k, i) * product(k - i, i)
    return total


class Smooth(Neurons):
    """With an activation that has four continuous derivatives, by quadrature.

    Args:
        activation: g.
        u: See ``Neurons``.
        b: See ``Neurons``.
    """

    def __init__(self, activation: Activation, u: Tensor, b: Tensor | None) -> None:
        super().__init__(u, b)
        self.activation = activation
        self._n_nodes, self._n_terms = _FIRST_NODES, 0
        self._values: dict[int, Tensor] = {}
        self._coefficients: dict[tuple[int, int], Tensor] = {}

    def mean(self, k: int) -> Tensor:
        """See ``Neurons``."""
        return self.coefficients(k, _LEAST_TERMS)[:, 0]

    def mean_of_square(self, k: int) -> Tensor:
        """See ``Neurons``."""
        self._resolve(_LEAST_TERMS)
        weights = projection(self._n_nodes, 1)[1].to(self.u.device)
        values = _leibniz(k, lambda i, j: self._at_nodes(i) * self._at_nodes(j))
        return (values @ weights)[:, 0]

    def coefficients(self, k: int, n_terms: int) -> Tensor:
        """See ``Neurons``."""
        self._resolve(n_terms)
        if (k, n_terms) not in self._coefficients:
            matrix = projection(self._n_nodes, n_terms)[1].to(self.u.device)
            self._coefficients[k, n_terms] = self._at_nodes(k) @ matrix
        return self._coefficients[k, n_terms]

    def _at_nodes(self, k: int) -> Tensor:
        """g⁽ᵏ⁾ at the nodes, shape ``(n, nodes)``."""
        if k not in self._values:
            nodes = projection(self._n_nodes, 1)[0].to(self.u.device)
            z = self.variance.sqrt()[:, None] * nodes
            self._values[k] = derivative(self.activation, k, z if self.b is None else z + self.b[:, None])
        return self._values[k]

    def _resolve(self, n_terms: int) -> None:
        """Take so many nodes that half of them give the same coefficients of the fourth derivative."""
        while self._n_terms < n_terms:
            values, matrix = self._at_nodes(4), projection(self._n_nodes, n_terms)[1].to(self.u.device)
            fine, coarse = values @ matrix, 2 * (values[:, ::2] @ matrix[::2])
            if self._n_nodes >= _MOST_NODES or bool((fine - coarse).abs().max() <= _ENOUGH * (1 + fine.abs().max())):
                self._n_terms = n_terms
            else:
                self._n_nodes = 2 * self._n_nodes - 1
                self._values.clear()
                self._coefficients.clear()


class Sigmoidal(Neurons):
    """With g(z) = offset + height Φ(slope z) for the normal cdf Φ; erf(z) is −1 + 2 Φ(√2 z).

    Args:
        offset: See above.
        height: See above.
        slope: See above.
        u: See ``Neurons``.
        b: See ``Neurons``.
    """

    def __init__(self, offset: float, height: float, slope: float, u: Tensor, b: Tensor | None) -> None:
        super().__init__(u, b)
        self.offset, self.height, self.slope = offset, height, slope

    def mean(self, k: int) -> Tensor:
        """See ``Neurons``."""
        value = self.scaled(k) * self.step(k)
        return value + self.offset if k == 0 else value

    def mean_of_square(self, k: int) -> Tensor:
        """See ``Neurons``."""
        return _leibniz(k, self._with_itself)

    @cached_property
    def _with_itself(self) -> Callable[[int, int], Tensor]:
        """E[g⁽ⁱ⁾ g⁽ʲ⁾] of each neuron."""
        return self.products(self, self.variance, self.variance, self.variance, self.b, self.b)

    def coefficients(self, k: int, n_terms: int) -> Tensor:
        """See ``Neurons``: those of the blurred step, of which y is a part only."""
        blurred, b = 1 + self.slope**2 * self.variance, None if self.b is None else self.slope * self.b
        share = self.slope * (self.variance / blurred).sqrt()
        m = torch.arange(n_terms, dtype=share.dtype, device=share.device)
        found = self.scaled(k) * share[:, None] ** m * steps.coefficients(k, blurred, b, n_terms)
        if k == 0:
            found[:, 0] += self.offset
        return found

    def scaled(self, k: int) -> float:
        """What multiplies Φ⁽ᵏ⁾ in g⁽ᵏ⁾."""
        return self.height * self.slope**k

    def step(self, k: int) -> Tensor:
        """E[Φ⁽ᵏ⁾(slope z)]: Φ is a step that is blurred by a normal variable of variance 1."""
        return steps.single(k, 1 + self.slope**2 * self.variance, None if self.b is None else self.slope * self.b)

    def products(
        self, other: Sigmoidal, p: Tensor, r: Tensor, q: Tensor, b: Tensor | None, c: Tensor | None
    ) -> Callable[[int, int], Tensor]:
        """E[g⁽ᵏ⁾(z₁) f⁽ˡ⁾(z₂)] as a function of k ≥ l, for variances p and r, covariance q and means b and c.

        Without biases E[erf erf] is Williams' (1997) arcsine.
        """
        s, t = self.slope, other.slope
        p, r, q = s * s * p, t * t * r, s * t * q
        b, c = (None, None) if b is None or c is None else (s * b, t * c)
        pair = Steps(1 + p, 1 + r, q, (1 + p + r + (p * r - q * q).clamp(min=0.0)).sqrt(), b, c)

        def product(k: int, j: int) -> Tensor:
            first, second = self.scaled(k), other.scaled(j)
            if b is None and k == 0:  # Φ as a half and an odd function
                odd = first * second / (2 * math.pi) * torch.atan2(q, pair.root)
                return odd + (self.offset + self.height / 2) * (other.offset + other.height / 2)
            value = first * second * pair.moment(k, j)
            if b is None and k % 2 == 0:
                return value
            if j == 0:
                value = value + first * other.offset * steps.single(k, 1 + p, b)
            if k == 0:
                value = value + self.offset * (second * steps.single(0, 1 + r, c) + other.offset)
            return value

        return product


class Ramp(Neurons):
    """With g(z) = max(z, 0), ReLU."""

    def mean(self, k: int) -> Tensor:
        """See ``Neurons``."""
        return steps.single(k - 1, self.variance, self.b)

    def mean_of_square(self, k: int) -> Tensor:
        """See ``Neurons``: (g²)′ = 2 g."""
        if k > 0:
            return 2 * steps.single(k - 2, self.variance, self.b)
        if self.b is None:
            return 0.5 * self.variance
        root = self.variance.sqrt()
        h = self.b / root
        return (self.b * self.b + self.variance) * distribution(h) + self.b * root * density(h)

    def coefficients(self, k: int, n_terms: int) -> Tensor:
        """See ``Neurons``."""
        return steps.coefficients(k - 1, self.variance, self.b, n_terms)

    def angle_root(self, other: Ramp) -> Tensor:
        """√(|u|²|v|² − (u·v)²) for all pairs, shape ``(n, m)``, to the last digit also where they are nearly parallel.

        By both half angles (Kahan): |û − v̂| and |û + v̂|.
        """
        u, v = (neurons.u / neurons.variance.sqrt()[:, None] for neurons in (self, other))
        exact = "donot_use_mm_for_euclid_dist"
        apart, together = (torch.cdist(u, w, compute_mode=exact) for w in (v, -v))
        return 0.5 * apart * together * torch.outer(self.variance, other.variance).sqrt()


class Polynomial(Neurons):
    """With g(z) = Σ_m c_m zᵐ.

    Args:
        powers: c, ascending.
        u: See ``Neurons``.
        b: See ``Neurons``.
    """

    def __init__(self, powers: tuple[float, ...], u: Tensor, b: Tensor | None) -> None:
        super().__init__(u, b)
        self.powers = powers
        self._means: dict[int, Tensor] = {}

    @property
    def degree(self) -> int:
        """That of g."""
        return len(self.powers) - 1

    def mean(self, k: int) -> Tensor:
        """See ``Neurons``; here for any k."""
        if k not in self._means:
            powers = self.powers
            for _ in range(k):
                powers = tuple(m * c for m, c in enumerate(powers))[1:]
            self._means[k] = _mean_of_polynomial(powers, self.variance, self.b)
        return self._means[k]

    def mean_of_square(self, k: int) -> Tensor:
        """See ``Neurons``."""
        square = tuple(np.polynomial.polynomial.polymul(self.powers, self.powers).tolist())
        return Polynomial(square, self.u, self.b).mean(k)

    def coefficients(self, k: int, n_terms: int) -> Tensor:
        """See ``Neurons``."""
        found = self.u.new_zeros(len(self.u), n_terms)
        for m in range(min(n_terms, self.degree + 1 - k)):
            found[:, m] = self.variance ** (m / 2) * self.mean(k + m) / math.sqrt(math.factorial(m))
        return found


def _mean_of_polynomial(powers: tuple[float, ...], p: Tensor, b: Tensor | None) -> Tensor:
    """Σ c_m E[zᵐ] for z ~ N(b, p), by E[zᵐ⁺¹] = b E[zᵐ] + m p E[zᵐ⁻¹]."""
    total, before, moment = torch.zeros_like(p), torch.zeros_like(p), torch.ones_like(p)
    for m, c in enumerate(powers):
        total = total + c * moment
        following = m * p * before if b is None else m * p * before + b * moment
        before, moment = moment, following
    return total


def neurons(activation: Activation, u: Tensor, b: Tensor | None) -> Neurons:
    """Neurons with that activation, input weights u of shape ``(n, d)`` and biases b of shape ``(n,)`` (None for 0).

    Raises:
        ValueError: For an activation with a kink other than ReLU's.
    """
    if activation.name == "erf":
        return Sigmoidal(-1.0, 2.0, ROOT_2, u, b)
    if activation.name == "normal_cdf":
        return Sigmoidal(0.0, 1.0, 1.0, u, b)
    if activation.name == "relu":
        return Ramp(u, b)
    if activation.name in _POWERS or activation.name == "polynomial":
        return Polynomial(_POWERS.get(activation.name, activation.parameters), u, b)
    check_smooth(activation)
    return Smooth(activation, u, b)


_POWERS = {"identity": (0.0, 1.0), "square": (0.0, 0.0, 1.0), "cube": (0.0, 0.0, 0.0, 1.0)}
