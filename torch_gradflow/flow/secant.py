"""A secant approximation B of the Hessian for equations (B + a I) d = r, where a changes with every step of an integrator.

A gradient at another point shows what the Hessian does to one vector: y = ∇L(θ + s) − ∇L(θ) ≈ H s. B is corrected by such
pairs so that it does the same. It is not B that is updated but M = B + a I, whose pairs are (s, z = y + a s): wherever a
step of length α/a can be taken at all, H + a I is positive definite, and the BFGS correction

    M − M S (Sᵀ M S)⁻¹ Sᵀ M + Z (Sᵀ Z)⁻¹ Zᵀ

keeps M so (Broyden 1970, Fletcher 1970, Goldfarb 1970, Shanno 1970; for blocks Schnabel, Quasi-Newton methods using multiple
secant equations, 1983). Along a curved valley the stiff directions turn a little towards soft ones; that changes H by two
ranks, which BFGS corrects at once. The symmetric rank-one correction needs two pairs for it, and what it makes of the first
one has spurious curvatures of either sign: integrations of a teacher–student problem to t = 1e7 took a fifth more gradients,
were less accurate by a factor of 3, and each failed to solve the equation of several steps.

Within a step the pairs are conjugate, s_i · z_j = 0: then Sᵀ Z is diagonal, each new pair keeps what the others say, and

    M⁻¹ → (I − S Q⁻¹ Zᵀ) M⁻¹ (I − Z Q⁻¹ Sᵀ) + S Q⁻¹ Sᵀ,   Q = diag(s_i · z_i),

takes four products of few rows beside one solution by the factor of the M that the step began with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from torch_gradflow.flow.control import norm

# What a Cholesky factor, or whatever takes its place, does: M⁻¹ v.
Solve = Callable[[Tensor], Tensor]
# A pair of which the others say all but this fraction (of s · z) is not made conjugate: rounding would be left.
INDEPENDENT = 1e-3
# Points that differ by less are the same, as a multiple of the rounding error; and s · z is zero below this power of it,
# relative to the sizes of s and z.
SAME, ORTHOGONAL = 100.0, 0.75
# So many pairs are kept apart from B within a step.
STACK = 8
# A direction that is this small, in units of ε and of the rows that show it, is rounding.
ROUNDING = 1e3
# A low-rank matrix of r eigenpairs may have so many times r rows before it is truncated.
SPARE = 1.5
# Beyond so many parameters the calls of tensor operations no longer count.
COMPILED_LIMIT = 2000


@dataclass(frozen=True)
class Pairs:
    """Conjugate pairs, oldest first.

    Attributes:
        s: Displacements, shape ``(n, P)``.
        z: (H + a I) s, shape ``(n, P)``; s_i · z_j = 0 for i ≠ j.
        q: s_i · z_i > 0, shape ``(n,)``.
    """

    s: Tensor
    z: Tensor
    q: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Pairs:
        """No pairs of vectors like this one."""
        return _none(like.shape[0], like.dtype, like.device)

    def __len__(self) -> int:
        return self.q.shape[0]

    def newest(self) -> Pairs:
        """The last one alone: where rounding forbids more, it says most."""
        return Pairs(self.s[-1:], self.z[-1:], self.q[-1:])

    def joined(self, s: Tensor, z: Tensor) -> Pairs | None:
        """With one more pair, s · z > 0, made conjugate to these; None if they say nearly all of it."""
        q = s @ z
        if len(self):
            share = 0.5 * (self.z @ s + self.s @ z) / self.q
            s, z, raw = s - share @ self.s, z - share @ self.z, q
            q = s @ z
            if not bool(q > INDEPENDENT * raw):
                return None
        return Pairs(torch.cat([self.s, s[None]]), torch.cat([self.z, z[None]]), torch.cat([self.q, q[None]]))

    def solve(self, base: Solve, right: Tensor) -> Tensor:
        """M⁻¹ ``right``, where ``base`` is that of the M that knows nothing of these pairs."""
        if not len(self):
            return base(right)
        known = (self.s @ right) / self.q
        found = base(right - known @ self.z)
        return found + (known - (self.z @ found) / self.q) @ self.s


@cache
def _none(n_parameters: int, dtype: torch.dtype, device: torch.device) -> Pairs:
    rows = torch.zeros(0, n_parameters, dtype=dtype, device=device)
    return Pairs(rows, rows, rows.new_zeros(0))


@dataclass(frozen=True)
class Equation:
    """That of a step, p′ + a δ = −∇L(θ_p + δ).

    Attributes:
        rows: Begins with θ_p and p′, and ends with the tolerated errors; shape ``(5, P)``.
        a: a.
        longest: The largest change of δ at a time, in tolerances.
    """

    rows: Tensor
    a: float
    longest: float


@dataclass(frozen=True)
class Iteration:
    """Where the iteration towards its solution stands.

    Attributes:
        at: Where L was evaluated last, shape ``(P,)``.
        found: ∇L there.
        delta: δ, shape ``(P,)``.
        point: θ_p + δ.
        pairs: Of B + a I, found in this step.
        n: Gradients in this step.
        smallest: The smallest change among them, in tolerances.
    """

    at: Tensor
    found: Tensor
    delta: Tensor
    point: Tensor
    pairs: Pairs
    n: int = 0
    smallest: float = math.inf

    def without_pairs(self) -> Iteration:
        """The same after the pairs were learned, or forgotten."""
        return Iteration(self.at, self.found, self.delta, self.point, Pairs.none(self.at), self.n, self.smallest)

    def seen(self, gradient: Tensor) -> Iteration:
        """The same after L was evaluated at ``point``; the gradient there is copied."""
        return Iteration(self.point, gradient.clone(), self.delta, self.point, self.pairs, self.n, self.smallest)

    def moved(self, gradient: Tensor, pairs: Pairs, equation: Equation, solve: Solve) -> tuple[Iteration, float]:
        """After a quasi-Newton change of δ by the gradient at ``point``, which is copied; its size, before it was cut."""
        rows = equation.rows
        change = -pairs.solve(solve, gradient.add(rows[1]).add_(self.delta, alpha=equation.a))
        size = norm(change, rows[4])
        if size > equation.longest:
            change = change * (equation.longest / size)
        delta = self.delta + change
        now = Iteration(
            self.point, gradient.clone(), delta, rows[0] + delta, pairs, self.n + 1, min(size, self.smallest)
        )  # fmt: skip
        return now, size


@dataclass(frozen=True)
class Difference:
    """What a gradient at another point shows.

    Attributes:
        s: The distance from the last point, shape ``(P,)``.
        z: (H + a I) s.
        s_s: s · s.
        s_z: s · z.
        z_z: z · z.
        point_point: The square of the point.
    """

    s: Tensor
    z: Tensor
    s_s: float
    s_z: float
    z_z: float
    point_point: float

    @classmethod
    def at_proposal(cls, iteration: Iteration, gradient: Tensor, equation: Equation) -> Difference:
        """That of the gradient at θ_p + δ."""
        point = iteration.point
        s = point - iteration.at
        z = torch.add(gradient - iteration.found, s, alpha=equation.a)
        return cls(s, z, *torch.stack([s @ s, s @ z, z @ z, point @ point]).tolist())

    @property
    def is_finite(self) -> bool:
        """Whether the gradient is."""
        return math.isfinite(self.z_z)

    @property
    def is_nothing(self) -> bool:
        """Whether that is where it was evaluated last."""
        return self.s_s <= (SAME * torch.finfo(self.s.dtype).eps) ** 2 * self.point_point

    @property
    def is_convex(self) -> bool:
        """Whether M is positive definite along s."""
        smallest: float = torch.finfo(self.s.dtype).eps ** ORTHOGONAL * math.sqrt(self.s_s * self.z_z)
        return self.s_z > smallest


class Arithmetic(ABC):
    """The costly steps, in one of two ways."""

    @abstractmethod
    def iterated(
        self, iteration: Iteration, gradient: Tensor, equation: Equation, solve: Solve
    ) -> tuple[Iteration, float] | None:
        """``Iteration.moved`` with one more pair; None where the gradient does not give one that ``Pairs.joined`` can take."""

    @abstractmethod
    def factor(self, matrix: Tensor, a: float) -> Solve | None:
        """How to solve with ``matrix`` + a I; None if that is not positive definite."""

    @abstractmethod
    def low_rank_factor(self, basis: Tensor, small: Tensor, a: float) -> Solve | None:
        """How to solve with Uᵀ S U + a I, where U has orthonormal rows; None if that is not positive definite."""

    @abstractmethod
    def corrected(self, matrix: Tensor, a: float, pairs: Pairs) -> Tensor | None:
        """``matrix``, corrected by pairs of ``matrix`` + a I; None where Sᵀ M S is singular up to rounding."""


class PlainArithmetic(Arithmetic):
    """On tensors of any kind."""

    def iterated(
        self, iteration: Iteration, gradient: Tensor, equation: Equation, solve: Solve
    ) -> tuple[Iteration, float] | None:
        """See ``Arithmetic``."""
        seen = Difference.at_proposal(iteration, gradient, equation)
        if not seen.is_finite or seen.is_nothing or not seen.is_convex:
            return None
        pairs = iteration.pairs.joined(seen.s, seen.z)
        return None if pairs is None else iteration.moved(gradient, pairs, equation, solve)

    def factor(self, matrix: Tensor, a: float) -> Solve | None:
        """See ``Arithmetic``."""
        shifted = matrix.clone()
        shifted.diagonal().add_(a)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            return None
        return lambda right: torch.cholesky_solve(right[:, None], factor)[:, 0]

    def low_rank_factor(self, basis: Tensor, small: Tensor, a: float) -> Solve | None:
        """See ``Arithmetic``."""
        within = self.factor(small, a)
        if within is None:
            return None

        def solve(right: Tensor) -> Tensor:
            inside = basis @ right
            return right / a + (within(inside) - inside / a) @ basis

        return solve

    def corrected(self, matrix: Tensor, a: float, pairs: Pairs) -> Tensor | None:
        """See ``Arithmetic``."""
        changes = _changes(torch.addmm(pairs.s, pairs.s, matrix, beta=a), pairs)
        if changes is None:
            return None
        gained, lost = changes
        return matrix + torch.cat([gained, -lost]).T @ torch.cat([gained, lost])


def arithmetic_for(vector: Tensor) -> Arithmetic:
    """Which of them serves: compiled for few parameters in float64 on a CPU, where Numba can be imported."""
    return _arithmetic_for(vector.device, vector.dtype, vector.shape[-1])


@cache
def _arithmetic_for(device: torch.device, dtype: torch.dtype, n_parameters: int) -> Arithmetic:
    if device.type != "cpu" or dtype != torch.float64 or n_parameters > COMPILED_LIMIT:
        return PlainArithmetic()
    try:
        compiled: Arithmetic = import_module("torch_gradflow.flow.secant_compiled").CompiledArithmetic()
    except ImportError:
        return PlainArithmetic()
    return compiled


class Secant(ABC):
    """What is known of the Hessian from gradients; a value.

    Attributes:
        capacity: How many eigenpairs it consists of at most; 0 where it is a matrix.
    """

    capacity: int

    @abstractmethod
    def factor(self, a: float) -> Solve | None:
        """How to solve with B + a I; None if that is not positive definite."""

    @abstractmethod
    def learned(self, pairs: Pairs, a: float) -> Secant:
        """B corrected by pairs of B + a I."""

    @abstractmethod
    def most_negative(self) -> tuple[float, Tensor]:
        """The lowest eigenvalue of B and its unit eigenvector."""

    @abstractmethod
    def corrected(self, direction: Tensor, curvature: float) -> Secant:
        """With vᵀ B v replaced for a unit vector v."""

    @abstractmethod
    def rows(self) -> Tensor:
        """Everything in it, shape ``(n, P)``; not to be written to."""


@dataclass(frozen=True)
class Dense(Secant):
    """All of B: P² numbers, a Cholesky factorisation per a, and products of few rows with P columns besides.

    Attributes:
        matrix: B, shape ``(P, P)``.
    """

    matrix: Tensor
    capacity: int = 0

    @classmethod
    def nothing(cls, like: Tensor) -> Dense:
        """B = 0: nothing is stiff until that is seen."""
        return cls(like.new_zeros(len(like), len(like)))

    def factor(self, a: float) -> Solve | None:
        """See ``Secant``."""
        return arithmetic_for(self.matrix).factor(self.matrix, a)

    def learned(self, pairs: Pairs, a: float) -> Dense:
        """See ``Secant``."""
        if not len(pairs):
            return self
        matrix = arithmetic_for(self.matrix).corrected(self.matrix, a, pairs)
        if matrix is None:
            return self.learned(pairs.newest(), a) if len(pairs) > 1 else self
        return Dense(matrix)

    def most_negative(self) -> tuple[float, Tensor]:
        """See ``Secant``."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return float(values[0]), vectors[:, 0].contiguous()

    def corrected(self, direction: Tensor, curvature: float) -> Dense:
        """See ``Secant``."""
        present = float(direction @ (self.matrix @ direction))
        return Dense(torch.addr(self.matrix, direction, direction, alpha=curvature - present))

    def rows(self) -> Tensor:
        """See ``Secant``."""
        return self.matrix


@dataclass(frozen=True)
class LowRank(Secant):
    """B = Uᵀ S U with few rows U, for P too large for a matrix: O(r P) numbers, O(r P) operations per solution.

    New pairs add rows; when there are more than 1.5 r, only the r eigenpairs of largest modulus are kept. (To keep r
    always takes a decomposition per step: on 601 parameters that was half of all time.) What is forgotten is what is soft; a
    direction that is not, while a stiff one is needed, costs an iteration to learn it again. (Pairs of which the oldest are
    forgotten, as usual, lose stiff directions: with 20 pairs for 151 parameters an integration did not arrive in 20,000
    gradients, with 20 eigenpairs it took 1710.)

    Attributes:
        basis: U, orthonormal rows, shape ``(n, P)`` with n ≤ ``SPARE`` r.
        small: S, symmetric, shape ``(n, n)``.
        capacity: r.
    """

    basis: Tensor
    small: Tensor
    capacity: int

    @classmethod
    def nothing(cls, like: Tensor, capacity: int) -> LowRank:
        """B = 0."""
        return cls(like.new_zeros(0, len(like)), like.new_zeros(0, 0), capacity)

    def factor(self, a: float) -> Solve | None:
        """See ``Secant``."""
        return arithmetic_for(self.basis).low_rank_factor(self.basis, self.small, a)

    def learned(self, pairs: Pairs, a: float) -> LowRank:
        """See ``Secant``."""
        if not len(pairs):
            return self
        image = a * pairs.s + (pairs.s @ self.basis.T @ self.small) @ self.basis
        changes = _changes(image, pairs)
        if changes is None:
            return self.learned(pairs.newest(), a) if len(pairs) > 1 else self
        return self._added(*changes)

    def most_negative(self) -> tuple[float, Tensor]:
        """See ``Secant``."""
        values, vectors = torch.linalg.eigh(self.small)
        return float(values[0]), vectors[:, 0] @ self.basis

    def corrected(self, direction: Tensor, curvature: float) -> LowRank:
        """See ``Secant``."""
        inside = self.basis @ direction
        missing = curvature - float(inside @ (self.small @ inside))
        row = direction[None] * abs(missing) ** 0.5
        nothing = row[:0]
        return self._added(row, nothing) if missing > 0 else self._added(nothing, row)

    def rows(self) -> Tensor:
        """See ``Secant``: U, and below it the elements of S."""
        n, size = self.basis.shape
        below = self.basis.new_zeros(_rows_of(n, size) - n, size)
        below.view(-1)[: n * n] = self.small.flatten()
        return torch.cat([self.basis, below])

    @classmethod
    def of(cls, rows: Tensor, capacity: int) -> LowRank:
        """The inverse of ``rows``."""
        total, size = rows.shape
        n = next(n for n in range(total + 1) if _rows_of(n, size) == total)
        return cls(rows[:n].contiguous(), rows[n:].flatten()[: n * n].view(n, n).clone(), capacity)

    def _added(self, gained: Tensor, lost: Tensor) -> LowRank:
        """B + Gᵀ G − Lᵀ L."""
        rows, n = torch.cat([gained, lost]), len(self.basis)
        inside = rows @ self.basis.T
        new, upper = torch.linalg.qr((rows - inside @ self.basis).T)
        # Of rows that lie within the span nearly, what is left is not quite orthogonal to it before it is made so again.
        within = self.basis @ new
        new, again = torch.linalg.qr(new - self.basis.T @ within)
        outside = (again @ upper).T
        # Where nothing but rounding errors is left, there is no new direction.
        found = outside.square().sum(0) > (ROUNDING * torch.finfo(rows.dtype).eps) ** 2 * rows.square().sum()
        new, outside = new[:, found], outside[:, found]
        parts = torch.cat([inside + (within @ upper).T, outside], dim=1)
        signs = torch.cat([parts.new_ones(len(gained)), -parts.new_ones(len(lost))])
        small = (parts * signs[:, None]).T @ parts
        small[:n, :n] += self.small
        grown = LowRank(torch.cat([self.basis, new.T]), 0.5 * (small + small.T), self.capacity)
        return grown if len(small) <= min(SPARE * self.capacity, rows.shape[1]) else grown.truncated()

    def truncated(self) -> LowRank:
        """The eigenpairs of largest modulus, no more than there is room for."""
        values, vectors = torch.linalg.eigh(self.small)
        sizes, order = values.abs().sort(descending=True)
        # Rows that lie within the span leave a basis of rounding errors, with eigenvalues alike.
        n_known = int((sizes > 10 * torch.finfo(sizes.dtype).eps * sizes[0]).sum())
        kept = order[: min(self.capacity, self.basis.shape[1], n_known)]
        return LowRank(vectors[:, kept].T @ self.basis, torch.diag(values[kept]), self.capacity)


def _rows_of(n: int, n_parameters: int) -> int:
    """How many rows n rows and n² numbers are."""
    return n + -(-n * n // n_parameters)


def _changes(image: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor] | None:
    """G and L of the correction Gᵀ G − Lᵀ L; ``image`` is (M S)ᵀ. None where Sᵀ M S is singular up to rounding."""
    factor, failed = torch.linalg.cholesky_ex(image @ pairs.s.T)
    if int(failed):
        return None
    return pairs.z / pairs.q.sqrt()[:, None], torch.linalg.solve_triangular(factor, image, upper=False)
