"""The arithmetic of secant iterations, compiled: for few parameters in float64 on a CPU.

An iteration consists of some thirty tensor operations on a few numbers each, which take several times as long as a gradient of
a small network for a thousand samples. Here it is one pass over the tensors' memory, given by addresses: as arguments,
arrays cost as much as the work. It does what ``secant.PlainArithmetic`` does; tests compare them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from torch_gradflow.flow.secant import INDEPENDENT, ORTHOGONAL, SAME, Arithmetic, Equation, Iteration, Pairs, Solve
from torch_gradflow.perceptron.vector_math import numbers_at

# Up to so many parameters the compiled factorisation is faster than LAPACK's with its calls.
CHOLESKY_LIMIT = 64
_EPS = 2.0**-52


def _compiled(function: Any) -> Any:
    return njit(cache=True, error_model="numpy")(function)


@_compiled
def _matrix_at(address: int, n: int, size: int) -> Any:
    """The rows at an address."""
    return numbers_at(address, n * size).reshape(n, size)


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})  # several terms at a time
def _dot(x: Any, y: Any) -> Any:
    total = 0.0
    for p in range(x.shape[0]):
        total += x[p] * y[p]
    return total


@_compiled
def _pair(point: Any, at: Any, gradient: Any, found: Any, a: float, s: Any, z: Any) -> bool:
    """Writes s and z; whether they are of use as a pair."""
    s_s = s_z = z_z = size = 0.0
    for p in range(point.shape[0]):
        s[p] = point[p] - at[p]
        z[p] = gradient[p] - found[p] + a * s[p]
        s_s += s[p] * s[p]
        s_z += s[p] * z[p]
        z_z += z[p] * z[p]
        size += point[p] * point[p]
    return bool(z_z < np.inf and s_s > (SAME * _EPS) ** 2 * size and s_z > _EPS**ORTHOGONAL * math.sqrt(s_s * z_z))


@_compiled
def _join(s: Any, z: Any, q: Any, s_out: Any, z_out: Any, q_out: Any) -> bool:
    """The last row of ``s_out`` and ``z_out`` is made conjugate to the others; whether something is left of it."""
    n, size = s.shape
    raw = _dot(s_out[n], z_out[n])
    shares = np.empty(n)
    for i in range(n):
        shares[i] = 0.5 * (_dot(z[i], s_out[n]) + _dot(s[i], z_out[n])) / q[i]
    for i in range(n):
        q_out[i] = q[i]
        for p in range(size):
            s_out[i, p] = s[i, p]
            z_out[i, p] = z[i, p]
            s_out[n, p] -= shares[i] * s[i, p]
            z_out[n, p] -= shares[i] * z[i, p]
    q_out[n] = _dot(s_out[n], z_out[n])
    return bool(q_out[n] > INDEPENDENT * raw)


@_compiled
def _substitute(upper: Any, x: Any) -> None:
    """In place: (Uᵀ U)⁻¹ x."""
    size = x.shape[0]
    for k in range(size):
        x[k] /= upper[k, k]
        for j in range(k + 1, size):
            x[j] -= upper[k, j] * x[k]
    for k in range(size - 1, -1, -1):
        x[k] = (x[k] - _dot(upper[k, k + 1 :], x[k + 1 :])) / upper[k, k]


@_compiled
def _base(upper: Any, basis: Any, a: float, x: Any) -> None:
    """In place, see ``Factorised``."""
    if a == 0.0:
        _substitute(upper, x)
        return
    n, size = basis.shape
    known, inside = np.empty(n), np.empty(n)
    for i in range(n):
        known[i] = inside[i] = _dot(basis[i], x)
    _substitute(upper, known)
    for p in range(size):
        x[p] /= a
    for i in range(n):
        share = known[i] - inside[i] / a
        for p in range(size):
            x[p] += share * basis[i, p]


@_compiled
def _solve(s: Any, z: Any, q: Any, upper: Any, basis: Any, a: float, x: Any) -> None:
    """In place: by the pairs and ``_base``."""
    n, size = s.shape
    known = np.empty(n)
    for i in range(n):
        known[i] = _dot(s[i], x) / q[i]
    for i in range(n):
        for p in range(size):
            x[p] -= known[i] * z[i, p]
    _base(upper, basis, a, x)
    for i in range(n):
        known[i] -= _dot(z[i], x) / q[i]
    for i in range(n):
        for p in range(size):
            x[p] += known[i] * s[i, p]


@_compiled
def _solve_at(upper_at: int, n_upper: int, basis_at: int, n_basis: int, a: float, x_at: int, size: int) -> None:
    """In place, see ``Factorised``."""
    upper, basis = _matrix_at(upper_at, n_upper, n_upper), _matrix_at(basis_at, n_basis, size)
    _base(upper, basis, a, numbers_at(x_at, size))


@_compiled
def _iterate(
    n: int, size: int, rows_at: int, a: float, longest: float, at_at: int, found_at: int, delta_at: int, point_at: int,
    s_at: int, z_at: int, q_at: int, gradient_at: int, upper_at: int, n_upper: int, basis_at: int, n_basis: int, shift: float,
    found_out_at: int, delta_out_at: int, point_out_at: int, s_out_at: int, z_out_at: int, q_out_at: int,
) -> float:  # fmt: skip
    """The size of the change; −1 where the pair is of no use."""
    rows, at, found = _matrix_at(rows_at, 5, size), numbers_at(at_at, size), numbers_at(found_at, size)
    delta, point, gradient = numbers_at(delta_at, size), numbers_at(point_at, size), numbers_at(gradient_at, size)
    s, z, q = _matrix_at(s_at, n, size), _matrix_at(z_at, n, size), numbers_at(q_at, n)
    upper, basis = _matrix_at(upper_at, n_upper, n_upper), _matrix_at(basis_at, n_basis, size)
    found_out, delta_out = numbers_at(found_out_at, size), numbers_at(delta_out_at, size)
    point_out, q_out = numbers_at(point_out_at, size), numbers_at(q_out_at, n + 1)
    s_out, z_out = _matrix_at(s_out_at, n + 1, size), _matrix_at(z_out_at, n + 1, size)
    if not _pair(point, at, gradient, found, a, s_out[n], z_out[n]):
        return -1.0
    if not _join(s, z, q, s_out, z_out, q_out):
        return -1.0
    for p in range(size):
        found_out[p] = gradient[p]
        delta_out[p] = -(gradient[p] + rows[1, p] + a * delta[p])
    _solve(s_out, z_out, q_out, upper, basis, shift, delta_out)
    total = 0.0
    for p in range(size):
        total += (delta_out[p] / rows[4, p]) ** 2
    change = math.sqrt(total / size)
    factor = longest / change if change > longest else 1.0
    for p in range(size):
        delta_out[p] = delta[p] + factor * delta_out[p]
        point_out[p] = rows[0, p] + delta_out[p]
    return change if change < np.inf else np.inf


@_compiled
def _cholesky(matrix: Any, a: float, upper: Any) -> bool:
    """``matrix`` + a I = Uᵀ U; whether that is positive definite."""
    size = matrix.shape[0]
    for i in range(size):
        for j in range(i, size):
            upper[i, j] = matrix[i, j]
        upper[i, i] += a
        for k in range(i):
            share = upper[k, i]
            for j in range(i, size):
                upper[i, j] -= share * upper[k, j]
        if not upper[i, i] > 0.0:
            return False
        scale = 1 / math.sqrt(upper[i, i])
        for j in range(i, size):
            upper[i, j] *= scale
    return True


@_compiled
def _corrected(matrix: Any, a: float, s: Any, z: Any, q: Any, out: Any) -> bool:
    n, size = s.shape
    lost = np.empty((n, size))
    for k in range(n):
        for i in range(size):
            lost[k, i] = _dot(matrix[i], s[k]) + a * s[k, i]
    gram = np.empty((n, n))
    for k in range(n):
        for i in range(k + 1):
            gram[k, i] = _dot(lost[k], s[i])
    for k in range(n):
        for i in range(k):
            share = gram[k, i]
            for j in range(i):
                share -= gram[k, j] * gram[i, j]
            gram[k, i] = share / gram[i, i]
            gram[k, k] -= gram[k, i] ** 2
        if not gram[k, k] > 0.0:
            return False
        gram[k, k] = math.sqrt(gram[k, k])
        for i in range(k):
            for p in range(size):
                lost[k, p] -= gram[k, i] * lost[i, p]
        for p in range(size):
            lost[k, p] /= gram[k, k]
    gained = np.empty((n, size))
    for k in range(n):
        scale = math.sqrt(q[k])
        for p in range(size):
            gained[k, p] = z[k, p] / scale
    for i in range(size):
        out[i] = matrix[i]
        for k in range(n):
            more, less = gained[k, i], lost[k, i]
            for j in range(size):
                out[i, j] += more * gained[k, j] - less * lost[k, j]
    return True


@dataclass(frozen=True)
class Factorised:
    """M⁻¹ v.

    Attributes:
        upper: R of M = Rᵀ R, shape ``(P, P)``; or of S + a I = Rᵀ R where M = Uᵀ S U + a I, shape ``(n, n)``.
        basis: U, shape ``(n, P)``; or nothing.
        a: a; or 0.0.
    """

    upper: Tensor
    basis: Tensor
    a: float

    @property
    def place(self) -> tuple[int, int, int, int, float]:
        """Addresses and sizes."""
        return self.upper.data_ptr(), self.upper.shape[0], self.basis.data_ptr(), self.basis.shape[0], self.a

    def __call__(self, right: Tensor) -> Tensor:
        """M⁻¹ ``right``."""
        out = right.clone(memory_format=torch.contiguous_format)
        _solve_at(*self.place, out.data_ptr(), out.shape[0])
        return out


_NO_BASIS = torch.empty(0, 0, dtype=torch.float64)


class CompiledArithmetic(Arithmetic):
    """On addresses."""

    def iterated(
        self, iteration: Iteration, gradient: Tensor, equation: Equation, solve: Solve
    ) -> tuple[Iteration, float] | None:
        """See ``Arithmetic``."""
        assert isinstance(solve, Factorised)
        pairs = iteration.pairs
        n, size = pairs.s.shape
        found, delta, point, q = _empty(size), _empty(size), _empty(size), _empty(n + 1)
        s, z = _empty(n + 1, size), _empty(n + 1, size)
        change = _iterate(
            n, size, equation.rows.data_ptr(), equation.a, equation.longest,
            iteration.at.data_ptr(), iteration.found.data_ptr(), iteration.delta.data_ptr(), iteration.point.data_ptr(),
            pairs.s.data_ptr(), pairs.z.data_ptr(), pairs.q.data_ptr(), gradient.data_ptr(), *solve.place,
            found.data_ptr(), delta.data_ptr(), point.data_ptr(), s.data_ptr(), z.data_ptr(), q.data_ptr(),
        )  # fmt: skip
        if change < 0:
            return None
        smallest = min(change, iteration.smallest)
        return Iteration(iteration.point, found, delta, point, Pairs(s, z, q), iteration.n + 1, smallest), change

    def factor(self, matrix: Tensor, a: float) -> Solve | None:
        """See ``Arithmetic``."""
        upper = _upper(matrix, a)
        return None if upper is None else Factorised(upper, _NO_BASIS, 0.0)

    def low_rank_factor(self, basis: Tensor, small: Tensor, a: float) -> Solve | None:
        """See ``Arithmetic``."""
        upper = _upper(small, a)
        return None if upper is None else Factorised(upper, basis, a)

    def corrected(self, matrix: Tensor, a: float, pairs: Pairs) -> Tensor | None:
        """See ``Arithmetic``."""
        out = np.empty(matrix.shape)
        good = _corrected(matrix.numpy(), a, pairs.s.numpy(), pairs.z.numpy(), pairs.q.numpy(), out)
        return torch.from_numpy(out) if good else None


def _upper(matrix: Tensor, a: float) -> Tensor | None:
    """R of ``matrix`` + a I = Rᵀ R; None if that is not positive definite."""
    if matrix.shape[0] <= CHOLESKY_LIMIT:
        upper = np.empty(matrix.shape)
        return torch.from_numpy(upper) if _cholesky(matrix.numpy(), a, upper) else None
    shifted = matrix.clone()
    shifted.diagonal().add_(a)
    factor, failed = torch.linalg.cholesky_ex(shifted, upper=True)
    return None if int(failed) else factor.contiguous()


def _empty(*shape: int) -> Tensor:
    return torch.from_numpy(np.empty(shape))  # quicker than torch.empty
