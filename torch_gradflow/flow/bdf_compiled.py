"""The arithmetic of a backward differentiation step, compiled: for few parameters in float64 on a CPU.

With some dozens of parameters a step is forty tensor operations on a few numbers each: 200 µs of calls around 10 µs of work,
as much as a gradient with its Hessian takes for a thousand samples. Here it is three passes over the tensors' memory. They
do what ``multistep.formula`` and ``bdf.PlainAlgebra`` do; tests compare them.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from torch_gradflow.flow.multistep import MAX_POINTS

# Up to so many parameters the compiled factorisation is faster than LAPACK's with its calls.
CHOLESKY_LIMIT = 64
_N = MAX_POINTS


def _compiled(function: Any) -> Any:
    return njit(cache=True, error_model="numpy")(function)


@_compiled
def _predict(taus: Any, n: int, tau: float, order: int, speed: float, theta: Any, rtol: float, atol: float, out: Any) -> Any:
    """Rows of ``out``: p_k, its slope, p_{k−1}, p_{k+1} (as far as they exist), tolerated errors. Returns α and 1/reach."""
    m = min(order + 2, n)
    ages = np.empty(_N)
    reach = np.empty(_N)
    for j in range(m):
        ages[j] = (taus[0] - taus[j]) / tau
        reach[j] = 1.0 + ages[j]
    weights = np.zeros(_N)
    table = np.zeros((4, _N))
    for j in range(m):
        new = 1.0
        for i in range(j):
            weights[i] *= reach[j] / (ages[j] - ages[i])
            new *= reach[i] / (ages[i] - ages[j])
        weights[j] = new
        if j == order:
            total = 0.0
            for i in range(order + 1):
                total += 1 / reach[i]
            for i in range(order + 1):
                table[0, i] = weights[i]
                table[1, i] = weights[i] * (total - 1 / reach[i]) * speed
        elif j == order - 1:
            table[2, : j + 1] = weights[: j + 1]
        elif j == order + 1:
            table[3, : j + 1] = weights[: j + 1]
    alpha = 0.0
    for j in range(order):
        alpha += 1 / reach[j]
    size = theta.shape[1]
    out[:4] = 0.0
    for row in range(4):
        for i in range(m):
            w = table[row, i]
            if w != 0.0:
                for p in range(size):
                    out[row, p] += w * theta[i, p]
    for p in range(size):
        largest = max(abs(theta[0, p]), abs(out[0, p]))
        out[4, p] = max(atol + rtol * largest, 2.2250738585072014e-308)
    return alpha, 1 / reach[order - 1], 1 / reach[order], (1 / reach[order + 1] if m > order + 1 else 0.0)


@_compiled
def _finish(delta: Any, gradient: Any, a: float, order: int, theta: Any, out: Any, after: Any) -> Any:
    """Writes the new history and, last, the new gradient into ``after``; returns error norms and the change of the loss."""
    size = theta.shape[1]
    low = own = high = change = 0.0
    for p in range(size):
        d = delta[p]
        new = out[0, p] + d
        scale = 1 / out[4, p]
        own += (d * scale) ** 2
        low += ((new - out[2, p]) * scale) ** 2
        high += ((new - out[3, p]) * scale) ** 2
        slope = -(out[1, p] + a * d)
        change += 0.5 * (gradient[p] + slope) * d
        after[0, p] = new
        after[after.shape[0] - 1, p] = slope
    for i in range(after.shape[0] - 2):
        for p in range(size):
            after[i + 1, p] = theta[i, p]
    return math.sqrt(low / size), math.sqrt(own / size), math.sqrt(high / size), change


@_compiled
def _solve(hessian: Any, a: float, gradient: Any, slope: Any, delta: Any) -> bool:
    """δ = −(H + a)⁻¹ (g + p′) by a Cholesky factorisation; whether that is positive definite."""
    size = delta.shape[0]
    factor = np.empty((size, size))
    for i in range(size):
        for j in range(i):
            s = hessian[i, j]
            for k in range(j):
                s -= factor[i, k] * factor[j, k]
            factor[i, j] = s * factor[j, j]
        s = hessian[i, i] + a
        for k in range(i):
            s -= factor[i, k] * factor[i, k]
        if not s > 0.0:
            return False
        factor[i, i] = 1 / math.sqrt(s)  # its inverse is what is needed
    for i in range(size):
        s = -(gradient[i] + slope[i])
        for k in range(i):
            s -= factor[i, k] * delta[k]
        delta[i] = s * factor[i, i]
    for i in range(size - 1, -1, -1):
        delta[i] *= factor[i, i]
        for k in range(i):
            delta[k] -= factor[i, k] * delta[i]
    return True


def predict(
    taus: list[float], tau: float, order: int, speed: float, theta: Tensor, rtol: float, atol: float
) -> tuple[float, tuple[float, float, float], Tensor]:
    """α, 1/reach for the orders k − 1, k, k + 1 (0 where there are no points), and the rows that ``_predict`` names."""
    out = np.empty((5, theta.shape[1]))
    alpha, *constants = _predict(np.array(taus), len(taus), tau, order, speed, theta.numpy(), rtol, atol, out)
    low, own, high = constants
    return alpha, (low if order > 1 else 0.0, own, high), torch.from_numpy(out)


def finish(
    delta: Tensor, gradient: Tensor, a: float, order: int, theta: Tensor, out: Tensor
) -> tuple[tuple[float, float, float], float, Tensor, Tensor, Tensor]:
    """Error norms at the orders below, own and above; by how much the loss changes; the new history; θ; the gradient there."""
    kept = min(theta.shape[0] + 1, _N)
    after = np.empty((kept + 1, theta.shape[1]))
    low, own, high, change = _finish(delta.numpy(), gradient.numpy(), a, order, theta.numpy(), out.numpy(), after)
    rows = torch.from_numpy(after[:kept]), torch.from_numpy(after[0]), torch.from_numpy(after[kept])
    return (low, own, high), change, *rows


def solve(hessian: Tensor, a: float, gradient: Tensor, slope: Tensor) -> Tensor | None:
    """δ = −(H + a)⁻¹ (g + p′), or None where H + a is not positive definite."""
    delta = np.empty(gradient.shape)
    good = _solve(hessian.numpy(), a, gradient.numpy(), slope.numpy(), delta)
    return torch.from_numpy(delta) if good else None
