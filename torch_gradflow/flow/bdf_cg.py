"""Backward differentiation where Hessians are dear: conjugate gradients on Hessian–vector products at the predicted point.

The equation (a + H) δ = −(∇L + p′) of a step needs only a few products with H where the preconditioner knows the large
eigenvalues. What is known of an old Hessian serves any a = α/h at no cost, being diagonal with it: an eigendecomposition,
or, for more parameters than a dense matrix is kept for, the Ritz vectors that the iterations themselves bring. It is made anew
where it needs too many iterations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from torch_gradflow.flow.bdf import Correction, Corrector, MultistepMethod
from torch_gradflow.flow.control import norm
from torch_gradflow.flow.method import Derivative, Memory, Span
from torch_gradflow.objectives.base import Objective

# Up to so many parameters an eigendecomposition is kept: it takes as long as about 40 products of two such matrices.
DENSE_LIMIT = 1024
# The equation is solved to this fraction of the tolerance. No eigenvalue of a + H is far below a, so that the residual over a
# bounds the error. What an old preconditioner makes of the residual does not: on a stiff valley that had turned, errors grew
# to 10⁶ tolerances; and on T33, to t = 1e7, solving no better than that took as many products, or, with Ritz vectors, more.
ACCURACY = 0.1
# With an eigendecomposition: iterations after which it is made anew at the next step, and after which at once.
STALE, HOPELESS = 6, 14
# With Ritz vectors: how many are kept at most, how many numbers they and their products may be, and the most iterations.
N_RITZ, RITZ_NUMBERS, MAX_ITERATIONS = 100, 2**25, 400


class Preconditioner(ABC):
    """An approximation of a + H, for any a."""

    max_iterations: int

    @abstractmethod
    def apply(self, vector: Tensor, a: float) -> Tensor:
        """(a + H)⁻¹ v, roughly; symmetric and positive definite."""

    @abstractmethod
    def learn(self, directions: list[Tensor], products: list[Tensor]) -> None:
        """After a solve: the directions of its iterations, and H times them."""

    @abstractmethod
    def curvature(self) -> Tensor | None:
        """All that it knows, as rows of length P."""

    @abstractmethod
    def recall(self, curvature: Tensor) -> None:
        """The inverse of ``curvature``."""


class Eigenbasis(Preconditioner):
    """Q (a + |Λ|)⁻¹ Qᵀ of a Hessian Q Λ Qᵀ that was once evaluated."""

    max_iterations = HOPELESS

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    @property
    def stale(self) -> bool:
        """Whether there is none, or its last solve took too many iterations."""
        return self._rows is None

    def refresh(self, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Take this Hessian; its eigenvalues and eigenvectors."""
        eigenvalues, q = torch.linalg.eigh(hessian)
        self._rows = torch.cat([q.T, eigenvalues[None]])
        return eigenvalues, q

    def drop(self) -> None:
        """Forget it."""
        self._rows = None

    def apply(self, vector: Tensor, a: float) -> Tensor:
        """See ``Preconditioner``."""
        assert self._rows is not None
        qt, eigenvalues = self._rows[:-1], self._rows[-1]
        return (qt @ vector / (eigenvalues.abs() + a)) @ qt

    def learn(self, directions: list[Tensor], products: list[Tensor]) -> None:
        """A solve with many iterations shows that it is too old."""
        if len(directions) > STALE:
            self.drop()

    def curvature(self) -> Tensor | None:
        """Qᵀ, and Λ as the last row."""
        return self._rows

    def recall(self, curvature: Tensor) -> None:
        """See ``Preconditioner``."""
        self._rows = curvature


class RitzVectors(Preconditioner):
    """1/a outside of the span of some orthonormal w_i, and w_i (a + |θ_i|)⁻¹ w_iᵀ within it.

    The w_i and θ_i are the Ritz vectors and values of largest modulus in the span of the directions of the last solve and of
    the w_i before it (a recycled subspace in the manner of Parks et al. 2006, "Recycling Krylov subspaces for sequences of
    linear systems").
    """

    max_iterations = MAX_ITERATIONS

    def __init__(self) -> None:
        self._vectors: Tensor | None = None
        self._images: Tensor | None = None
        self._sizes: Tensor | None = None

    def apply(self, vector: Tensor, a: float) -> Tensor:
        """See ``Preconditioner``."""
        if self._vectors is None or self._sizes is None:
            return vector / a
        return vector / a + ((1 / (self._sizes + a) - 1 / a) * (self._vectors @ vector)) @ self._vectors

    def learn(self, directions: list[Tensor], products: list[Tensor]) -> None:
        """Take the directions into the span, and keep the Ritz vectors of largest modulus."""
        basis, images = _orthonormal(torch.stack(directions), torch.stack(products))
        if self._vectors is not None and self._images is not None:
            # Of older vectors only what the new directions leave: their products are those of an older Hessian.
            inside = self._vectors @ basis.T
            rest, rest_images = _orthonormal(self._vectors - inside @ basis, self._images - inside @ images, relative=False)
            basis, images = torch.cat([basis, rest]), torch.cat([images, rest_images])
        projected = basis @ images.T
        values, coefficients = torch.linalg.eigh(0.5 * (projected + projected.T))
        n_kept = min(N_RITZ, max(8, RITZ_NUMBERS // (2 * basis.shape[1])))
        kept = values.abs().argsort(descending=True)[:n_kept]
        change = coefficients[:, kept].T
        self._vectors, self._images = change @ basis, change @ images
        self._sizes = self._measured(self._vectors, self._images)

    def curvature(self) -> Tensor | None:
        """The w_i, and below them their products with H."""
        if self._vectors is None or self._images is None:
            return None
        return torch.cat([self._vectors, self._images])

    def recall(self, curvature: Tensor) -> None:
        """See ``Preconditioner``."""
        self._vectors, self._images = curvature.chunk(2)
        self._sizes = self._measured(self._vectors, self._images)

    @staticmethod
    def _measured(vectors: Tensor, images: Tensor) -> Tensor:
        """|θ_i|, the same to the last bit whenever it is asked."""
        return (vectors * images).sum(1).abs()


def _orthonormal(rows: Tensor, images: Tensor, *, relative: bool = True) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows' span, and the images changed alike; what is a tenth of a row's size is left out."""
    if relative:
        scale = 1 / rows.norm(dim=1, keepdim=True)
        rows, images = rows * scale, images * scale
    weights, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = weights > 1e-2
    change = (vectors[:, kept] / weights[kept].sqrt()).T
    return change @ rows, change @ images


class ConjugateGradients(Corrector):
    """By conjugate gradients.

    Args:
        objective: L.
        preconditioner: What is known of its Hessian.
    """

    def __init__(self, objective: Objective, preconditioner: Preconditioner) -> None:
        self._objective = objective
        self._known = preconditioner

    def solve(self, rows: Tensor, a: float) -> Correction | None:
        """See ``Corrector``."""
        theta, slope, tolerated = rows[0], rows[1], rows[4]
        if isinstance(self._known, Eigenbasis) and self._known.stale:
            return self._solve_densely(self._known, theta, slope, a)
        loss, gradient = self._objective.loss_and_gradient(theta)
        residual = -(gradient + slope)
        solution, direction = torch.zeros_like(theta), self._known.apply(residual, a)
        energy = float(residual @ direction)
        directions: list[Tensor] = []
        products: list[Tensor] = []
        settled = energy == 0.0
        while not settled and len(directions) < self._known.max_iterations:
            product = self._objective.hvp(theta, direction)
            image = product + a * direction
            bend = float(direction @ image)
            if not bend > 0:
                return None  # a mode that grows faster than the step resolves, or a number that is not finite
            directions.append(direction)
            products.append(product)
            length = energy / bend
            solution = solution + length * direction
            residual = residual - length * image
            improved = self._known.apply(residual, a)
            settled = norm(residual / a, tolerated) < ACCURACY
            after = float(residual @ improved)
            settled = settled or after == 0.0
            direction = improved + (after / energy) * direction
            energy = after
        if directions:
            self._known.learn(directions, products)
        if not settled:
            if isinstance(self._known, Eigenbasis):
                return self._solve_densely(self._known, theta, slope, a)
            return None
        return Correction(solution, loss, gradient)

    def _solve_densely(self, known: Eigenbasis, theta: Tensor, slope: Tensor, a: float) -> Correction | None:
        """With a new Hessian, whose eigendecomposition solves this step exactly."""
        loss, gradient, hessian = self._objective.loss_gradient_hessian(theta)
        if not bool(torch.isfinite(hessian).all()):
            return None
        eigenvalues, q = known.refresh(hessian)
        shifted = eigenvalues + a
        if not float(shifted[0]) > 0:
            return None
        return Correction(-(q @ ((q.T @ (gradient + slope)) / shifted)), loss, gradient)

    def failed(self) -> None:
        """An old Hessian costs iterations, not accuracy: it is not to blame."""

    def curvature(self) -> Tensor | None:
        """See ``Corrector``."""
        return self._known.curvature()


class BdfCg(MultistepMethod):
    """Backward differentiation with Hessian–vector products."""

    name = "bdf-cg"
    needs: Derivative = "hvp"

    def corrector(self, objective: Objective, span: Span, memory: Memory | None) -> Corrector:
        """See ``MultistepMethod``."""
        known: Preconditioner = Eigenbasis() if objective.n_parameters <= DENSE_LIMIT else RitzVectors()
        if memory is not None and memory.curvature is not None:
            known.recall(memory.curvature)
        return ConjugateGradients(objective, known)
