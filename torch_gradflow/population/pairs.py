"""The expectations E[g⁽ᵏ⁾(z₁) f⁽ˡ⁾(z₂)] of all pairs of two sets of neurons, from which loss and derivatives are made.

Two pre-activations are jointly normal, so that these are functions of two variances, a covariance and two means. By
integration by parts each derivative by one of those is another such expectation (Price 1958): ∂/∂q E[g f] = E[g′ f′],
∂/∂p E[g f] = ½ E[g″ f], ∂/∂b E[g f] = E[g′ f].

They come in closed form where both activations are of the erf family, both ReLU, or both polynomials; otherwise from the
series E[g f] = Σ_m ρᵐ E[g h_m] E[f h_m] (Mehler 1866), whose terms are products of what each neuron has alone: the
two-dimensional quadrature falls apart into one for each neuron.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_gradflow.population.neurons import Neurons, Polynomial, Ramp, Sigmoidal
from torch_gradflow.population.steps import Steps

# Orders (k, l) of derivatives.
Order = tuple[int, int]
# Terms of a series: doubled until the last quarter of them counts for no more than this, as far as that many.
_FIRST_TERMS, _MOST_TERMS, _ENOUGH = 64, 2048, 1e-15
# Where the most terms leave more than this of a pair's size, a warning says so.
_ACCEPTABLE = 1e-10


def pair_moments(first: Neurons, second: Neurons, orders: Sequence[Order]) -> dict[Order, Tensor]:
    """E[g⁽ᵏ⁾(z_i) f⁽ˡ⁾(z_j)] for all neurons i of ``first`` and j of ``second``, shape ``(n, m)``, by order (k, l), k ≥ l.

    Where both are the same object, what stands on the diagonal means nothing.
    """
    if isinstance(first, Polynomial) and isinstance(second, Polynomial):
        return _of_polynomials(first, second, orders)
    if isinstance(first, Sigmoidal) and isinstance(second, Sigmoidal):
        p, r, b, c = _along(first, second)
        product = first.products(second, p, r, _covariance(first, second), b, c)
        return {order: product(*order) for order in orders}
    if isinstance(first, Ramp) and isinstance(second, Ramp):
        p, r, b, c = _along(first, second)
        root = first.angle_root(second)
        if first is second:
            root.diagonal().copy_(first.variance)
        steps = Steps(p, r, _covariance(first, second), root, b, c)
        return {(k, j): steps.moment(k - 1, j - 1) for k, j in orders}
    return _of_series(first, second, orders)


def _along(first: Neurons, second: Neurons) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Variances and means as columns and rows; the means are None where all are zero."""
    b, c = first.b, second.b
    if b is None and c is not None:
        b = torch.zeros_like(first.variance)
    if c is None and b is not None:
        c = torch.zeros_like(second.variance)
    columns = None if b is None else b[:, None]
    return first.variance[:, None], second.variance[None], columns, None if c is None else c[None]


def _covariance(first: Neurons, second: Neurons) -> Tensor:
    """u·v, shape ``(n, m)``; zero on the diagonal where it would be the variance."""
    q = first.u @ second.u.T
    if first is second:
        q.fill_diagonal_(0.0)
    return q


def _of_polynomials(first: Polynomial, second: Polynomial, orders: Sequence[Order]) -> dict[Order, Tensor]:
    """Σ_m qᵐ/m! E[g⁽ᵏ⁺ᵐ⁾] E[f⁽ˡ⁺ᵐ⁾], which ends at the degree."""
    q = _covariance(first, second)
    found = {}
    for k, j in orders:
        total = torch.zeros_like(q)
        for m in range(min(first.degree - k, second.degree - j), -1, -1):
            total = total * q / (m + 1) + torch.outer(first.mean(k + m), second.mean(j + m))
        found[k, j] = total
    return found


def _of_series(first: Neurons, second: Neurons, orders: Sequence[Order]) -> dict[Order, Tensor]:
    """Σ_m ρᵐ E[g⁽ᵏ⁾ h_m] E[f⁽ˡ⁾ h_m], with as many terms as all pairs need."""
    cosine = _covariance(first, second) / torch.outer(first.variance, second.variance).sqrt()
    cosine = cosine.clamp(-1.0, 1.0)
    steepest = max(orders, key=lambda order: (sum(order), order[1]))
    n_terms = _FIRST_TERMS
    powers = cosine[..., None] ** torch.arange(n_terms, dtype=cosine.dtype, device=cosine.device)
    while (left := _last_quarter(powers, first, second, steepest)) > _ENOUGH and n_terms < _MOST_TERMS:
        powers = torch.cat([powers, powers * cosine[..., None] ** n_terms], -1)
        n_terms *= 2
    if left > _ACCEPTABLE:
        warnings.warn(
            f"two neurons are so nearly parallel, and their weights so large (norms up to {_largest(first, second):.3g}), "
            f"that {n_terms} terms leave a relative error of about {left:.1e} in the population loss's derivatives.",
            RuntimeWarning,
            stacklevel=2,
        )
    found = {}
    for j in sorted({order[1] for order in orders}):
        weighted = powers * second.coefficients(j, n_terms)
        for k in (order[0] for order in orders if order[1] == j):
            found[k, j] = (weighted @ first.coefficients(k, n_terms)[..., None])[..., 0]
    return found


def _last_quarter(powers: Tensor, first: Neurons, second: Neurons, order: Order) -> float:
    """The largest share of a pair's last quarter of terms in the product of the two functions' sizes."""
    n_terms = powers.shape[-1]
    one, other = first.coefficients(order[0], n_terms).abs(), second.coefficients(order[1], n_terms).abs()
    begin = 3 * n_terms // 4
    tail = ((powers[..., begin:].abs() * other[:, begin:]) @ one[:, begin:, None])[..., 0]
    size = torch.outer(one.norm(dim=1), other.norm(dim=1)).clamp(min=math.sqrt(torch.finfo(one.dtype).tiny))
    return float((tail / size).max())


def _largest(first: Neurons, second: Neurons) -> float:
    return float(max(first.variance.max(), second.variance.max()).sqrt())
