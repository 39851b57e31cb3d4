"""Sums of squares to first order: residuals, and the triangular factor of their Jacobian."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeastSquares:
    """L(θ) = ½‖r(θ)‖² around one θ: r(θ + p) ≈ r + J p, with J = Q R.

    R comes from J by Householder reflections, not from JᵀJ: singular values of J down to the rounding unit times the largest
    are in R, in JᵀJ only those above its square root (Björck 1996, Numerical Methods for Least Squares Problems, section
    2.2). At minima of zero loss where the Hessian is singular, such small ones decide the step.

    Attributes:
        loss: L(θ), a 0-dimensional tensor.
        gradient: Jᵀr, shape ``(P,)``.
        factor: R, upper triangular, shape ``(P, P)``, or ``(M, P)`` where there are fewer residuals M than parameters.
        projection: Qᵀr, with as many elements as R has rows.
    """

    loss: Tensor
    gradient: Tensor
    factor: Tensor
    projection: Tensor

    @classmethod
    def of_blocks(cls, blocks: Iterable[Tensor], theta: Tensor) -> LeastSquares:
        """From J and r, a few residuals at a time.

        The factor of [J r] is updated block by block (Golub, Plemmons and Sameh 1988, "Parallel block schemes for large-scale
        least-squares computations"), so that no more of J than one block is ever needed at once.

        Args:
            blocks: Of shape ``(P + 1, m)``: the residuals' gradients as columns, and in the last row the residuals.
            theta: Of shape ``(P,)``, on their device.
        """
        n = theta.numel()
        rows: Tensor | None = None
        loss, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        for block in blocks:
            residuals = block[-1]
            loss += 0.5 * (residuals @ residuals)
            gradient += block[:-1] @ residuals
            rows = _triangular((block if rows is None else torch.cat([rows, block], dim=1)).T).T
        assert rows is not None  # there are samples
        k = min(n, rows.shape[1])
        return cls(loss, gradient, rows[:n, :k].T, rows[n, :k].clone())

    def with_decay(self, theta: Tensor, decay: Tensor) -> LeastSquares:
        """That of L + ½ Σ λ_i θ_i², with residuals √λ_i θ_i more.

        Args:
            theta: θ, shape ``(P,)``.
            decay: λ ≥ 0, shape ``(P,)``.
        """
        root = decay.sqrt()
        own = torch.cat([self.factor.T, self.projection.unsqueeze(0)])
        more = torch.cat([torch.diag(root), (root * theta).unsqueeze(0)])
        n, rows = theta.numel(), _triangular(torch.cat([own, more], dim=1).T)
        loss, gradient = self.loss + 0.5 * (decay @ theta**2), self.gradient + decay * theta
        return LeastSquares(loss, gradient, rows[:n, :n], rows[:n, n].clone())

    def scaled(self, scale: Tensor) -> LeastSquares:
        """That as a function of φ, where θ = ``scale`` φ elementwise."""
        return replace(self, gradient=scale * self.gradient, factor=self.factor * scale)


def _triangular(matrix: Tensor) -> Tensor:
    """R of the matrix' QR decomposition."""
    return torch.geqrf(matrix)[0][: min(matrix.shape)].triu()
