"""The arithmetic of secant iterations, compiled: for few parameters in float64 on a CPU.

An iteration consists of some thirty tensor operations on a few numbers each, which take several times as long as a gradient of
a small network for a thousand samples. Here it is one pass over the tensors' memory. It does what ``secant.PlainArithmetic``
does; tests compare them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from torch_gradflow.flow.secant import INDEPENDENT, ORTHOGONAL, SAME, Arithmetic, Equation, Iteration, Pairs, Solve

# Up to so many parameters the compiled factorisation is faster than LAPACK's with its calls.
CHOLESKY_LIMIT = 64
_EPS = 2.0**-52


def _compiled(function: Any) -> Any:
    return njit(cache=True, error_model="numpy")(function)


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
def _iterate(
    rows: Any, a: float, longest: float, at: Any, found: Any, delta: Any, point: Any, s: Any, z: Any, q: Any,
    gradient: Any, upper: Any, basis: Any, shift: float,
    found_out: Any, delta_out: Any, point_out: Any, s_out: Any, z_out: Any, q_out: Any,
) -> float:  # fmt: skip
    """The size of the change; −1 where the pair is of no use."""
    n, size = s.shape
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

    upper: Any
    basis: Any
    a: float

    def __call__(self, right: Tensor) -> Tensor:
        """M⁻¹ ``right``."""
        out = right.clone()
        _base(self.upper, self.basis, self.a, out.numpy())
        return out


_NO_BASIS = np.empty((0, 0))


@dataclass(frozen=True)
class ArrayIteration(Iteration):
    """One whose tensors need not be asked for their memory once more, which takes as long as the work; not to be changed.

    Attributes:
        arrays: ``at``, ``found``, ``delta``, ``point``, and s, z and q of the pairs.
    """

    arrays: tuple[Any, ...] = ()


def _arrays(iteration: Iteration) -> tuple[Any, ...]:
    if isinstance(iteration, ArrayIteration):
        return iteration.arrays
    pairs = iteration.pairs
    vectors = iteration.at, iteration.found, iteration.delta, iteration.point, pairs.s, pairs.z, pairs.q
    return tuple(vector.numpy() for vector in vectors)


class CompiledArithmetic(Arithmetic):
    """On arrays."""

    def iterated(
        self, iteration: Iteration, gradient: Tensor, equation: Equation, solve: Solve
    ) -> tuple[Iteration, float] | None:
        """See ``Arithmetic``."""
        assert isinstance(solve, Factorised)
        n, size = iteration.pairs.s.shape
        before = _arrays(iteration)
        found, delta, point, q = np.empty(size), np.empty(size), np.empty(size), np.empty(n + 1)
        s, z = np.empty((n + 1, size)), np.empty((n + 1, size))
        change = _iterate(
            equation.rows.numpy(), equation.a, equation.longest, *before, gradient.numpy(), solve.upper, solve.basis,
            solve.a, found, delta, point, s, z, q,
        )  # fmt: skip
        if change < 0:
            return None
        tensor, smallest = torch.from_numpy, min(change, iteration.smallest)
        pairs, arrays = Pairs(tensor(s), tensor(z), tensor(q)), (before[3], found, delta, point, s, z, q)
        now = ArrayIteration(
            iteration.point, tensor(found), tensor(delta), tensor(point), pairs, iteration.n + 1, smallest, arrays
        )  # fmt: skip
        return now, change

    def factor(self, matrix: Tensor, a: float) -> Solve | None:
        """See ``Arithmetic``."""
        upper = _upper(matrix, a)
        return None if upper is None else Factorised(upper, _NO_BASIS, 0.0)

    def low_rank_factor(self, basis: Tensor, small: Tensor, a: float) -> Solve | None:
        """See ``Arithmetic``."""
        upper = _upper(small, a)
        return None if upper is None else Factorised(upper, basis.numpy(), a)

    def corrected(self, matrix: Tensor, a: float, pairs: Pairs) -> Tensor | None:
        """See ``Arithmetic``."""
        out = np.empty(matrix.shape)
        good = _corrected(matrix.numpy(), a, pairs.s.numpy(), pairs.z.numpy(), pairs.q.numpy(), out)
        return torch.from_numpy(out) if good else None


def _upper(matrix: Tensor, a: float) -> Any:
    """R of ``matrix`` + a I = Rᵀ R; None if that is not positive definite."""
    if matrix.shape[0] <= CHOLESKY_LIMIT:
        upper = np.empty(matrix.shape)
        return upper if _cholesky(matrix.numpy(), a, upper) else None
    shifted = matrix.clone()
    shifted.diagonal().add_(a)
    lower, failed = torch.linalg.cholesky_ex(shifted)
    return None if int(failed) else np.ascontiguousarray(lower.mT.numpy())
