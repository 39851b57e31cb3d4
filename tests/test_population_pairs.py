"""Expectations over Gaussian input: distribution functions, pairs of neurons, quadrature; against scipy and mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import scipy.special
import torch

from torch_gradflow import Activation, gauss_hermite_data, hermite_coefficients
from torch_gradflow.population.hermite import hermite_values
from torch_gradflow.population.neurons import neurons
from torch_gradflow.population.normal import bivariate_normal_cdf, owens_t
from torch_gradflow.population.pairs import Order, pair_moments

ORDERS: tuple[Order, ...] = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (4, 0))


def double(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_owens_t_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    h, a = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
    scale_h, scale_a = (10 ** (4 * torch.rand(20_000, generator=generator, dtype=torch.float64) - 2) for _ in range(2))
    h, a = h * scale_h, a * scale_a
    assert np.abs(owens_t(h, a).numpy() - scipy.special.owens_t(h.numpy(), a.numpy())).max() < 3e-16
    ends = [(0.0, math.inf), (1.0, math.inf), (-1.0, -math.inf), (2.0, 0.0), (0.0, 1.0), (1e-9, 1e9), (40.0, 0.3), (0.0, -2.0)]
    for x, slope in ends:
        assert abs(float(owens_t(double(x), double(slope))) - scipy.special.owens_t(x, slope)) < 2e-16


def probability(h: float, k: float, rho: float) -> mp.mpf:
    """P(X ≤ h, Y ≤ k) = ∫ φ(x) Φ((k − ρ x)/√(1 − ρ²)) dx with 18 digits."""
    h_, k_, rho_ = mp.mpf(h), mp.mpf(k), mp.mpf(rho)
    root = mp.sqrt((1 - rho_) * (1 + rho_))
    low, high = mp.mpf(-10), min(h_, mp.mpf(10))
    bend, width = (k_ / rho_, root / abs(rho_)) if rho else (mp.mpf(0), mp.mpf(1))
    cuts = [bend + width * j for j in (-9, -3, 0, 3, 9)] + [mp.mpf(j) for j in (-5, -2, 0, 2)]
    points = sorted({low, high, *(x for x in cuts if low < x < high)})
    return mp.quad(lambda x: mp.npdf(x) * mp.ncdf((k_ - rho_ * x) / root), points)


@pytest.mark.parametrize("rho", [0.3, -0.95, 0.9999, 1 - 1e-12, -1 + 1e-12])
def test_bivariate_normal_cdf_near_its_edges(rho: float) -> None:
    with mp.workdps(18):
        for h, k in ((0.5, 0.5000001), (0, -1), (5, 6), (0.58, 1.29)):
            found = float(bivariate_normal_cdf(double(h), double(k), double(rho)))
            assert abs(probability(h, k, rho) - found) < 5e-16


def test_bivariate_normal_cdf_of_equal_and_opposite_variables() -> None:
    h, k = double(-1.0, 0.0, 0.3, 2.0, 40.0), double(0.5, 0.0, 0.3, -2.0, 3.0)
    cdf = torch.special.ndtr
    one = torch.ones(5, dtype=torch.float64)
    assert torch.allclose(bivariate_normal_cdf(h, k, one), cdf(torch.minimum(h, k)), rtol=0, atol=3e-16)
    assert torch.allclose(bivariate_normal_cdf(h, k, -one), (cdf(h) + cdf(k) - 1).clamp(min=0), rtol=0, atol=3e-16)
    assert torch.allclose(bivariate_normal_cdf(h, k, 0 * one), cdf(h) * cdf(k), rtol=0, atol=3e-16)


Function = Callable[[mp.mpf], mp.mpf]


def expectation(g: Function, f: Function | None, u: Any, v: Any, b: float, c: float) -> mp.mpf:
    """E[g(u·x + b) f(v·x + c)] for two inputs; f is None for ReLU, whose expectation at given u·x is in closed form.

    By the trapezoidal rule for analytic g and f, or by mpmath's own where there is a kink.
    """
    along = mp.sqrt(sum(mp.mpf(t) ** 2 for t in u))
    first = sum(mp.mpf(s) * t for s, t in zip(u, v, strict=True)) / along
    second = mp.sqrt(sum(mp.mpf(t) ** 2 for t in v) - first**2)
    nodes = [mp.mpf(j) / 4 for j in range(-36, 37)]
    weights = [mp.npdf(y) / 4 for y in nodes]

    def inner(x: mp.mpf) -> mp.mpf:
        mean = first * x + c
        if f is None:
            return mean * mp.ncdf(mean / second) + second * mp.npdf(mean / second)
        return sum(w * f(mean + second * y) for y, w in zip(nodes, weights, strict=True))

    if f is not None:
        return sum(w * g(along * x + b) * inner(x) for x, w in zip(nodes, weights, strict=True))
    points = sorted([mp.mpf(-9), mp.mpf(-3), -b / along, mp.mpf(3), mp.mpf(9)])
    return mp.quad(lambda x: mp.npdf(x) * g(along * x + b) * inner(x), points)


SOFTPLUS = Activation("softplus", (1.0, 20.0))


@pytest.mark.parametrize(
    ("first", "second", "exact"),
    [
        (Activation("erf"), Activation("erf"), (mp.erf, mp.erf)),
        (Activation("normal_cdf"), Activation("erf"), (mp.ncdf, mp.erf)),
        (Activation("relu"), Activation("relu"), (lambda z: max(z, 0), None)),
        (SOFTPLUS, SOFTPLUS, (lambda z: mp.log(1 + mp.exp(z)),) * 2),
        (Activation("tanh"), Activation("erf"), (mp.tanh, mp.erf)),
        (Activation("sigmoid"), Activation("relu"), (lambda z: 1 / (1 + mp.exp(-z)), None)),
        (Activation("cube"), Activation("polynomial", (0.5, -1.0, 0.3)), (lambda z: z**3, lambda z: 0.5 - z + 0.3 * z * z)),
    ],
)
@pytest.mark.parametrize("biases", [(0.0, 0.0), (0.4, -0.7)])
def test_pairs_are_mpmaths_integrals(first: Activation, second: Activation, exact: Any, biases: tuple[float, float]) -> None:
    u, v = (0.9, -0.5), (0.3, 1.1)
    b, c = (None if biases == (0.0, 0.0) else double(bias) for bias in biases)
    found = pair_moments(neurons(first, double(u), b), neurons(second, double(v), c), ((0, 0),))[0, 0]
    with mp.workdps(18):
        assert abs(expectation(*exact, u, v, *biases) - float(found)) < 1e-13


@pytest.mark.parametrize("angle", [1e-3, 1e-7, 1e-12, math.pi - 1e-7])
def test_nearly_parallel_relu_neurons(angle: float) -> None:
    """E[g f], E[g′ f′] and E[δ f], without biases, against their formulas with 40 digits."""
    u, v = double(0.6, 0.8) * 1.3, torch.empty(2, dtype=torch.float64)
    v[0], v[1] = 0.6 * math.cos(angle) - 0.8 * math.sin(angle), 0.8 * math.cos(angle) + 0.6 * math.sin(angle)
    of = Activation("relu")
    found = pair_moments(neurons(of, u[None], None), neurons(of, v[None], None), ((0, 0), (1, 1), (2, 0)))
    with mp.workdps(40):
        x, y = ([mp.mpf(float(t)) for t in w] for w in (u, v))
        p, r, q = (sum(s * t for s, t in zip(one, two, strict=True)) for one, two in ((x, x), (y, y), (x, y)))
        sine = abs(x[0] * y[1] - x[1] * y[0])
        theta = mp.atan2(sine, q)
        wanted = {
            (0, 0): (sine + (mp.pi - theta) * q) / (2 * mp.pi),
            (1, 1): (mp.pi - theta) / (2 * mp.pi),
            (2, 0): sine / (2 * mp.pi * p),
        }
        for order, value in wanted.items():
            assert abs(value - float(found[order])) < 1e-15 * float(mp.sqrt(p * r))


@pytest.mark.parametrize("size", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("name", ["erf", "relu", "cube"])
def test_closed_forms_are_series(name: str, size: float) -> None:
    """All orders of what is in closed form, against the other way to compute them: Mehler's series in Hermite coefficients."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(n, 3, generator=generator, dtype=torch.float64) * size for n in (4, 5))
    b, c = (torch.randn(n, generator=generator, dtype=torch.float64) * size for n in (4, 5))
    one, other = neurons(Activation(name), u, b), neurons(Activation(name), v, c)
    cosine = u @ v.T / torch.outer(u.norm(dim=1), v.norm(dim=1))
    powers = cosine[..., None] ** torch.arange(1000)
    for order, found in pair_moments(one, other, ORDERS).items():
        left, right = one.coefficients(order[0], 1000), other.coefficients(order[1], 1000)
        series = torch.einsum("ijm,im,jm->ij", powers, left, right)
        size_of = float((left.norm(dim=1).max() * right.norm(dim=1).max()).clamp(min=1.0))
        assert float((series - found).abs().max()) < 1e-13 * size_of


def test_a_series_that_cannot_be_summed_says_so() -> None:
    u = double([60.0, 0.0], [60.0, 1e-3])
    layer = neurons(SOFTPLUS, u, None)
    with pytest.warns(RuntimeWarning, match="so nearly parallel"):
        pair_moments(layer, layer, ORDERS)


def test_hermite_polynomials_are_orthonormal() -> None:
    x, w = gauss_hermite_data(1, 60)
    h = hermite_values(x[:, 0], 40) * torch.exp(0.25 * x**2)
    assert torch.allclose(h.T @ (w[:, None] * h), torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12)
    for n in (0, 1, 4):
        powers = x ** torch.arange(n + 1)
        assert torch.allclose(powers @ double(*hermite_coefficients(n)), h[:, n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_gauss_hermite_data_are_exact_for_polynomials(d: int) -> None:
    x, w = gauss_hermite_data(d, 6)
    assert x.shape == (6**d, d) and w.shape == (6**d,)
    moments = [float((w * x[:, -1] ** m).sum()) for m in range(12)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0], abs=1e-10)
    assert float((w * x.prod(1) ** 2).sum()) == pytest.approx(1.0, abs=1e-13)


def test_gauss_hermite_data_of_many_nodes() -> None:
    x, w = gauss_hermite_data(1, 600)
    assert float((w * torch.cos(3 * x[:, 0])).sum()) == pytest.approx(math.exp(-4.5), abs=1e-14)


@pytest.mark.parametrize("arguments", [(4, 5), (0, 5), (2, 0), (2, 1.5)])
def test_gauss_hermite_data_refuses(arguments: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        gauss_hermite_data(*arguments)
