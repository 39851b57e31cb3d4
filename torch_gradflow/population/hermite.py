"""Hermite polynomials, orthonormal under the standard normal density, and quadrature with them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.checks import check_count

# Half the width of the interval outside of which exp(−y²/4) and what is multiplied with it are below 1e-18.
HALF_WIDTH = 13.0


def hermite_coefficients(degree: int) -> tuple[float, ...]:
    """The coefficients, ascending, of He_n/√n!: the polynomial of degree n with E[h_n(y) h_m(y)] = δ_nm for y ~ N(0, 1).

    For instance as the parameters of ``Activation("polynomial", ...)``.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise ValueError(f"degree must be an integer, 0 or more, not {degree!r}.")
    coefficients = np.polynomial.hermite_e.herme2poly([0.0] * degree + [1.0]) / math.sqrt(math.factorial(degree))
    return tuple(coefficients.tolist())


def hermite_values(y: Tensor, n_terms: int) -> Tensor:
    """h_n(y) exp(−y²/4) for n < n_terms, which neither overflow nor lose digits; shape ``(len(y), n_terms)``."""
    columns = [torch.exp(-0.25 * y * y)]
    for n in range(1, n_terms):
        before = math.sqrt(n - 1) * columns[-2] if n > 1 else 0.0
        columns.append((y * columns[-1] - before) / math.sqrt(n))
    return torch.stack(columns, 1)


@lru_cache(maxsize=16)
def projection(n_nodes: int, n_terms: int) -> tuple[Tensor, Tensor]:
    """Nodes y, shape ``(n_nodes,)``, and the matrix ``(n_nodes, n_terms)`` that takes values there to Hermite coefficients.

    By the trapezoidal rule, which on analytic functions with Gaussian decay converges geometrically in the number of nodes,
    where Gauss–Hermite's does in its square root only (Trefethen 2022, "Exactness of quadrature formulas").
    """
    y = torch.linspace(-HALF_WIDTH, HALF_WIDTH, n_nodes, dtype=torch.float64)
    step = 2 * HALF_WIDTH / (n_nodes - 1)
    weight = torch.exp(-0.25 * y * y) * (step / math.sqrt(2 * math.pi))
    return y, hermite_values(y, n_terms) * weight[:, None]


def gauss_hermite_data(n_inputs: int, n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the product Gauss–Hermite rule: Σ_m w_m f(x_m) = E[f(x)] for x ~ N(0, I).

    It is exact for polynomials of degree up to 2 n − 1 in each input. With the weights as those of a squared error,
    ``(w[:, None] * (model(x) - teacher(x)) ** 2).sum()``, a network of any depth is trained on infinite data, as far as the
    rule resolves it.

    Args:
        n_inputs: d, at most 3: there are nᵈ nodes.
        n: Nodes per input.

    Returns:
        x of shape ``(nᵈ, d)`` and w of shape ``(nᵈ,)``, in float64; nodes whose weight is below 1e-300 are left out.

    Raises:
        ValueError: For other numbers of inputs, or no nodes.
    """
    check_count("n", n)
    if n_inputs not in (1, 2, 3):
        raise ValueError(f"n_inputs must be 1, 2 or 3, not {n_inputs!r}: a grid of more has too many nodes; sample instead.")
    # Golub and Welsch (1969) for the nodes; the weights are Christoffel's numbers 1/Σ_m h_m(x)², which cannot overflow here.
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    axis = torch.linalg.eigvalsh(torch.diag(off, 1) + torch.diag(off, -1))
    weight = torch.exp(-0.5 * axis * axis) / (hermite_values(axis, n) ** 2).sum(1)
    x = torch.cartesian_prod(*[axis] * n_inputs).reshape(-1, n_inputs)
    w = torch.cartesian_prod(*[weight] * n_inputs).reshape(-1, n_inputs).prod(1)
    kept = w > 1e-300
    return x[kept], w[kept]
