"""The φ-functions of exponential integrators, for real arguments: accurate to a few units in the last place for all of them.

φ_0(z) = e^z and, for k ≥ 1, φ_k(z) = ∫₀¹ e^{(1−s)z} s^{k−1}/(k−1)! ds = Σ_j z^j/(j+k)!, so that
φ_k(z) = (φ_{k−1}(z) − 1/(k−1)!)/z (Hochbruck and Ostermann, Exponential integrators, Acta Numerica 2010, section 2.1).

The recursion loses digits where |z| is small: there sums of positive terms serve, which lose none.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# Sums up to here, the recursion beyond: from there on a step of the recursion hands on at most 1.25 of the relative error
# that it inherits, and adds its own two roundings; 36 terms of the sums leave out less than 1e-17.
SERIES, N_TERMS = 5.0, 36


def phi(z: Tensor, highest: int) -> Tensor:
    """φ_0(z), …, φ_highest(z), highest ≥ 1, shape ``(highest + 1, *z.shape)``; beyond 709 (float64) they overflow to ``inf``.

    For 0 ≤ z ≤ 5 the Taylor series is summed. For −5 ≤ z < 0, where its terms alternate, Kummer's transformation of
    φ_k(z) = ₁F₁(1; k+1; z)/k! gives positive terms: φ_k(−x) = e^{−x}/(k−1)! Σ_j x^j/((k+j) j!).
    """
    flat = z.reshape(-1)
    near = flat.abs() <= SERIES
    # Where the sums serve, the recursion is computed from some harmless number.
    far = flat.masked_fill(near, SERIES)
    rows = [torch.expm1(far) / far]
    for k in range(1, highest):
        rows.append((rows[-1] - 1 / math.factorial(k)) / far)
    values = torch.where(near, _sums(flat.clamp(-SERIES, SERIES), highest), torch.stack(rows))
    return torch.cat([torch.exp(flat)[None], values]).reshape(highest + 1, *z.shape)


def _sums(z: Tensor, highest: int) -> Tensor:
    """φ_1, …, φ_highest for |z| ≤ ``SERIES``, shape ``(highest, len(z))``."""
    factors = z.abs().repeat(N_TERMS, 1)
    factors[0] = 1
    powers = torch.cumprod(factors, 0)
    both = _coefficients(highest, z.dtype, z.device) @ powers
    return torch.where(z < 0, torch.exp(z) * both[highest:], both[:highest])


@lru_cache
def _coefficients(highest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1/(j+k)!, and below them 1/((k−1)! (k+j) j!), in rows for k = 1, …, highest, for j = 0, …, N_TERMS − 1."""
    orders, terms = range(1, highest + 1), range(N_TERMS)
    taylor = [[1 / math.factorial(j + k) for j in terms] for k in orders]
    kummer = [[1 / (math.factorial(k - 1) * (k + j) * math.factorial(j)) for j in terms] for k in orders]
    return torch.tensor(taylor + kummer, dtype=dtype, device=device)
