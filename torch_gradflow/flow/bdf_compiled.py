"""The arithmetic of a backward differentiation step, compiled: for few parameters in float64 on a CPU.

With some dozens of parameters a step is forty tensor operations on a few numbers each: 200 µs of calls around 10 µs of work,
as much as a gradient with its Hessian takes for a thousand samples. Here it is three passes over the tensors' memory, which
are given as addresses: as arguments, arrays cost as much as the work. They do what ``multistep.formula`` and
``bdf.PlainAlgebra`` do; tests compare them.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from torch_gradflow.flow.dense import Clock
from torch_gradflow.flow.multistep import MAX_POINTS
from torch_gradflow.perceptron.vector_math import numbers_at

# Up to so many parameters the compiled factorisation is faster than LAPACK's with its calls.
CHOLESKY_LIMIT = 64
# The smallest number that a tolerated error may be.
TINY = 2.2250738585072014e-308
_N = MAX_POINTS


def compiled(function: Any) -> Any:
    """Compiled at its first call, then kept on disk."""
    return njit(cache=True, error_model="numpy")(function)


@compiled
def formula(times: Any, n: int, t: float, origin: float, unit: float, order: int, table: Any) -> Any:
    """Writes the weights of p_k(t), its slope, p_{k−1} and p_{k+1} (0 where there is none) to rows of ``table``.

    Returns α/h, and 1/reach for the orders k − 1, k, k + 1, 0 where there are no points. The clock is that of ``Clock``.
    """
    m = min(order + 2, n)
    ages = np.empty(_N)
    reach = np.empty(_N)
    weights = np.zeros(_N)
    now = times[0]
    tau = math.log1p((t - now) / (now - origin + unit))
    speed = 1 / (t - origin + unit) / tau
    for j in range(m):
        ages[j] = math.log1p((now - times[j]) / (times[j] - origin + unit)) / tau
        reach[j] = 1.0 + ages[j]
    table[:] = 0.0
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
        elif j == order - 1 and order > 1:
            table[2, : j + 1] = weights[: j + 1]
        elif j == order + 1:
            table[3, : j + 1] = weights[: j + 1]
    alpha = 0.0
    for j in range(order):
        alpha += 1 / reach[j]
    lower = 1 / reach[order - 1] if order > 1 else 0.0
    higher = 1 / reach[order + 1] if m > order + 1 else 0.0
    return alpha * speed, lower, 1 / reach[order], higher


@compiled
def combine(table: Any, theta: Any, rtol: float, atol: float, rows: Any) -> None:
    """Writes p_k, its slope, p_{k−1}, p_{k+1} and the tolerated errors."""
    n, size = theta.shape
    rows[:4] = 0.0
    for row in range(4):
        for i in range(n):
            w = table[row, i]
            if w != 0.0:
                for p in range(size):
                    rows[row, p] += w * theta[i, p]
    for p in range(size):
        rows[4, p] = max(atol + rtol * max(abs(theta[0, p]), abs(rows[0, p])), TINY)


@compiled
def correct(delta: Any, gradient: Any, a: float, rows: Any, new: Any, new_gradient: Any) -> Any:
    """Writes θ and the gradient there; the errors at the orders below, own and above, and by how much the loss changes."""
    size = delta.shape[0]
    low = own = high = change = 0.0
    for p in range(size):
        d = delta[p]
        moved = rows[0, p] + d
        scale = 1 / rows[4, p]
        own += (d * scale) ** 2
        low += ((moved - rows[2, p]) * scale) ** 2
        high += ((moved - rows[3, p]) * scale) ** 2
        slope = -(rows[1, p] + a * d)
        change += 0.5 * (gradient[p] + slope) * d
        new[p] = moved
        new_gradient[p] = slope
    return math.sqrt(low / size), math.sqrt(own / size), math.sqrt(high / size), change


@compiled
def cholesky_solve(hessian: Any, a: float, gradient: Any, slope: Any, factor: Any, delta: Any) -> bool:
    """δ = −(H + a)⁻¹ (g + p′); whether H + a is positive definite. ``factor`` may be ``hessian``, which then is lost."""
    size = delta.shape[0]
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


@compiled
def _predict(
    times: Any, n: int, t: float, origin: float, unit: float, order: int, theta_at: int, size: int, rtol: float, atol: float,
    rows_at: int,
) -> Any:  # fmt: skip
    theta, rows = numbers_at(theta_at, n * size).reshape(n, size), numbers_at(rows_at, 5 * size).reshape(5, size)
    table = np.empty((4, _N))
    found = formula(times, n, t, origin, unit, order, table)
    combine(table, theta, rtol, atol, rows)
    return found


@compiled
def _finish(
    delta_at: int, loss_at: int, gradient_at: int, a: float, theta_at: int, rows_at: int, size: int,
    history_at: int, kept: int, new_gradient_at: int, new_loss_at: int,
) -> Any:  # fmt: skip
    """Writes the new history, gradient and loss; returns errors and that loss."""
    delta, gradient = numbers_at(delta_at, size), numbers_at(gradient_at, size)
    theta, rows = numbers_at(theta_at, (kept - 1) * size), numbers_at(rows_at, 5 * size).reshape(5, size)
    history, new_gradient = numbers_at(history_at, kept * size), numbers_at(new_gradient_at, size)
    low, own, high, change = correct(delta, gradient, a, rows, history[:size], new_gradient)
    for i in range((kept - 1) * size):
        history[size + i] = theta[i]
    loss = numbers_at(loss_at, 1)[0] + change
    numbers_at(new_loss_at, 1)[0] = loss
    return low, own, high, loss


@compiled
def _solve(hessian_at: int, a: float, gradient_at: int, rows_at: int, delta_at: int, size: int) -> bool:
    hessian = numbers_at(hessian_at, size * size).reshape(size, size)
    gradient, slope, delta = numbers_at(gradient_at, size), numbers_at(rows_at, 2 * size)[size:], numbers_at(delta_at, size)
    return bool(cholesky_solve(hessian, a, gradient, slope, np.empty((size, size)), delta))


def predict(
    times: tuple[float, ...], t: float, clock: Clock, order: int, theta: Tensor, rtol: float, atol: float
) -> tuple[float, tuple[float, float, float], Tensor]:
    """What ``formula`` returns, and the rows that ``combine`` names."""
    n, size = theta.shape
    rows = torch.from_numpy(np.empty((5, size)))
    a, *constants = _predict(
        np.array(times), n, t, clock.origin, clock.unit, order, theta.data_ptr(), size, rtol, atol, rows.data_ptr()
    )
    return a, (constants[0], constants[1], constants[2]), rows


def finish(
    delta: Tensor, loss: Tensor, gradient: Tensor, a: float, theta: Tensor, rows: Tensor
) -> tuple[tuple[float, float, float], float, Tensor, Tensor, Tensor, Tensor]:
    """Error norms at the orders below, own and above; L at θ as a number; the new history; θ, L and the gradient there."""
    n, size = theta.shape
    kept = min(n + 1, _N)
    gradient = gradient.contiguous()
    rows_after = np.empty((kept, size))
    history, new = torch.from_numpy(rows_after), torch.from_numpy(rows_after[0])
    new_gradient, new_loss = torch.from_numpy(np.empty(size)), torch.from_numpy(np.empty(()))
    low, own, high, value = _finish(
        delta.data_ptr(), loss.data_ptr(), gradient.data_ptr(), a, theta.data_ptr(), rows.data_ptr(), size,
        new.data_ptr(), kept, new_gradient.data_ptr(), new_loss.data_ptr(),
    )  # fmt: skip
    return (low, own, high), value, history, new, new_loss, new_gradient


def solve(hessian: Tensor, a: float, gradient: Tensor, rows: Tensor) -> Tensor | None:
    """δ = −(H + a)⁻¹ (g + p′), or None where H + a is not positive definite; ``rows`` begins with θ_p and p′."""
    size = gradient.shape[0]
    delta = torch.from_numpy(np.empty(size))
    hessian, gradient = hessian.contiguous(), gradient.contiguous()
    good = _solve(hessian.data_ptr(), a, gradient.data_ptr(), rows.data_ptr(), delta.data_ptr(), size)
    return delta if good else None
