"""An objective of unit vectors: neurons whose input weights count by their direction only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_count
from torch_gradflow.objectives.base import Objective


class UnitRows(Objective):
    """L with w_i/‖w_i‖ in place of w_i: a function on a product of spheres.

    Its gradient is tangential, so that the flow keeps every ‖w_i‖; from ‖w_i‖ = 1 it is the flow on the spheres. The Hessian
    at a critical point has a zero eigenvalue for each w_i, along itself.

    Args:
        base: L(θ), where θ begins with the rows w_1, …, w_n.
        n_rows: n.
        length: The number of elements of each row.

    Raises:
        ValueError: If θ is shorter than that.
    """

    def __init__(self, base: Objective, n_rows: int, length: int) -> None:
        check_count("n_rows", n_rows)
        check_count("length", length)
        if n_rows * length > base.n_parameters:
            raise ValueError(
                f"n_rows × length must be at most {base.n_parameters}, the parameters of base, not {n_rows * length}."
            )
        self.n_parameters, self.dtype, self.device = base.n_parameters, base.dtype, base.device
        self.resolution, self.counts = base.resolution, base.counts
        self._base, self._n, self._d = base, n_rows, length

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return "unit rows", *self._base.kind()

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L and its gradient."""
        unit, norms = self._normalized(theta)
        loss, gradient = self._base.loss_and_gradient(unit)
        return loss, self._tangential(unit, norms, gradient[:, None])[:, 0]

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """Products with its Hessian."""
        unit, norms = self._normalized(theta)
        columns = vectors.reshape(self.n_parameters, -1)
        _, gradient = self._base.loss_and_gradient(unit)
        inner = self._base.hvp(unit, self._tangential(unit, norms, columns))
        products = self._tangential(unit, norms, inner) + self._curvature(unit, norms, gradient, columns)
        return products.reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """Its Hessian."""
        unit, norms = self._normalized(theta)
        _, gradient, hessian = self._base.loss_gradient_hessian(unit)
        hessian = self._tangential(unit, norms, self._tangential(unit, norms, hessian).T)
        eye = torch.eye(self.n_parameters, dtype=self.dtype, device=self.device)
        hessian = hessian + self._curvature(unit, norms, gradient, eye)
        return 0.5 * (hessian + hessian.T)

    def _rows(self, columns: Tensor) -> Tensor:
        """What of the columns belongs to the rows w, shape ``(n, d, m)``."""
        return columns[: self._n * self._d].reshape(self._n, self._d, -1)

    def _with_rows(self, columns: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([rows.reshape(self._n * self._d, -1), columns[self._n * self._d :]])

    def _normalized(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """θ with unit rows, and their norms, shape ``(n, 1, 1)``."""
        rows = self._rows(theta[:, None])
        norms = rows.norm(dim=1, keepdim=True)
        return self._with_rows(theta[:, None], rows / norms)[:, 0], norms

    def _tangential(self, unit: Tensor, norms: Tensor, columns: Tensor) -> Tensor:
        """J V for the symmetric Jacobian J = (I − ûûᵀ)/‖w‖ of each row."""
        u, rows = self._rows(unit[:, None]), self._rows(columns)
        return self._with_rows(columns, (rows - u * (u * rows).sum(1, keepdim=True)) / norms)

    def _curvature(self, unit: Tensor, norms: Tensor, gradient: Tensor, columns: Tensor) -> Tensor:
        """What the second derivatives of w/‖w‖ add: −(û (Pg)ᵀ + (Pg) ûᵀ + (û·g) P)/‖w‖² times V, with P = I − ûûᵀ."""
        u, g, rows = self._rows(unit[:, None]), self._rows(gradient[:, None]), self._rows(columns)
        along = (u * g).sum(1, keepdim=True)
        across, of_u = g - along * u, (u * rows).sum(1, keepdim=True)
        added = u * (across * rows).sum(1, keepdim=True) + across * of_u + along * (rows - of_u * u)
        return self._with_rows(torch.zeros_like(columns), -added / norms**2)
