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

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What a Cholesky factor, or whatever takes its place, does: M⁻¹ v.
Solve = Callable[[Tensor], Tensor]
# A pair of which the others say all but this fraction (of s · z) is not made conjugate: rounding would be left.
INDEPENDENT = 1e-3


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
        return cls(like.new_zeros(0, len(like)), like.new_zeros(0, len(like)), like.new_zeros(0))

    def __len__(self) -> int:
        return len(self.q)

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
        shifted = self.matrix.clone()
        shifted.diagonal().add_(a)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            return None
        return lambda right: torch.cholesky_solve(right[:, None], factor)[:, 0]

    def learned(self, pairs: Pairs, a: float) -> Dense:
        """See ``Secant``."""
        if not len(pairs):
            return self
        changes = _changes(torch.addmm(pairs.s, pairs.s, self.matrix, beta=a), pairs)
        if changes is None:
            return self.learned(pairs.newest(), a) if len(pairs) > 1 else self
        gained, lost = changes
        return Dense(self.matrix + torch.cat([gained, -lost]).T @ torch.cat([gained, lost]))

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
    """The eigenpairs of B of largest modulus, for P too large for a matrix: (r + 1) P numbers, O(r² P) operations per step.

    What is forgotten is what is soft; a direction that is not, while a stiff one is needed, costs an iteration to learn it
    again. (Pairs of which the oldest are forgotten, as usual, lose stiff directions: with 20 pairs for 151 parameters an
    integration did not arrive in 20,000 gradients, with 20 eigenpairs it took 1710.)

    Attributes:
        vectors: Orthonormal rows u_i, shape ``(n, P)`` with n ≤ r.
        values: λ_i, shape ``(n,)``; B = Σ λ_i u_i u_iᵀ.
        capacity: r.
    """

    vectors: Tensor
    values: Tensor
    capacity: int

    @classmethod
    def nothing(cls, like: Tensor, capacity: int) -> LowRank:
        """B = 0."""
        return cls(like.new_zeros(0, len(like)), like.new_zeros(0), capacity)

    def factor(self, a: float) -> Solve | None:
        """See ``Secant``."""
        if not len(self.values):
            return lambda right: right / a
        if not float(self.values.min()) > -(1 - 1e-8) * a:
            return None
        change = -self.values / (a * (self.values + a))
        return lambda right: right / a + (change * (self.vectors @ right)) @ self.vectors

    def learned(self, pairs: Pairs, a: float) -> LowRank:
        """See ``Secant``."""
        if not len(pairs):
            return self
        image = a * pairs.s + (pairs.s @ self.vectors.T * self.values) @ self.vectors
        changes = _changes(image, pairs)
        if changes is None:
            return self.learned(pairs.newest(), a) if len(pairs) > 1 else self
        return self._added(*changes)

    def most_negative(self) -> tuple[float, Tensor]:
        """See ``Secant``."""
        i = int(self.values.argmin())
        return float(self.values[i]), self.vectors[i]

    def corrected(self, direction: Tensor, curvature: float) -> LowRank:
        """See ``Secant``."""
        missing = curvature - float(self.values @ (self.vectors @ direction).square())
        row = direction[None] * abs(missing) ** 0.5
        nothing = row[:0]
        return self._added(row, nothing) if missing > 0 else self._added(nothing, row)

    def rows(self) -> Tensor:
        """See ``Secant``: the u_i, and the λ_i at the beginning of the last row."""
        last = self.vectors.new_zeros(1, self.vectors.shape[1])
        last[0, : len(self.values)] = self.values
        return torch.cat([self.vectors, last])

    @classmethod
    def of(cls, rows: Tensor, capacity: int) -> LowRank:
        """The inverse of ``rows``."""
        return cls(rows[:-1].contiguous(), rows[-1, : len(rows) - 1].clone(), capacity)

    def _added(self, gained: Tensor, lost: Tensor) -> LowRank:
        """B + Gᵀ G − Lᵀ L, truncated."""
        rows = torch.cat([gained, lost])
        inside = rows @ self.vectors.T
        rest = rows - inside @ self.vectors
        again = rest @ self.vectors.T
        basis, upper = torch.linalg.qr((rest - again @ self.vectors).T)
        parts = torch.cat([inside + again, upper.T], dim=1)
        signs = torch.cat([parts.new_ones(len(gained)), -parts.new_ones(len(lost))])
        small = (parts * signs[:, None]).T @ parts
        small.diagonal()[: len(self.values)] += self.values
        values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
        sizes, order = values.abs().sort(descending=True)
        # Rows that lie within the span leave a basis of rounding errors, with eigenvalues alike.
        n_known = int((sizes > 10 * torch.finfo(sizes.dtype).eps * sizes[0]).sum())
        kept = order[: min(self.capacity, self.vectors.shape[1], n_known)]
        rotation = vectors[:, kept].T
        n = len(self.values)
        return LowRank(rotation[:, :n] @ self.vectors + rotation[:, n:] @ basis.T, values[kept], self.capacity)


def _changes(image: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor] | None:
    """G and L of the correction Gᵀ G − Lᵀ L; ``image`` is (M S)ᵀ. None where Sᵀ M S is singular up to rounding."""
    factor, failed = torch.linalg.cholesky_ex(image @ pairs.s.T)
    if int(failed):
        return None
    return pairs.z / pairs.q.sqrt()[:, None], torch.linalg.solve_triangular(factor, image, upper=False)
