"""From the parameters θ that are trained to those of a network with standard normal input, and derivatives back."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gradflow.population.network import HiddenLayer, Parts


class Whitening:
    """Input x ~ N(μ, Σ) as x = μ + C y, y ~ N(0, I): a neuron w·x + b is (Cᵀw)·y + (b + w·μ).

    Args:
        mean: μ, shape ``(d,)``; None for 0.
        covariance: Σ, shape ``(d, d)``; None for I.

    Raises:
        ValueError: If Σ is not symmetric and positive definite.
    """

    def __init__(self, mean: Tensor | None, covariance: Tensor | None) -> None:
        self._mean, self._root = mean, None
        if covariance is not None:
            factor, failed = torch.linalg.cholesky_ex(covariance)
            if bool(failed) or not torch.allclose(covariance, covariance.T, rtol=1e-12, atol=0.0):
                raise ValueError("covariance must be symmetric and positive definite.")
            self._root = factor

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self._mean is not None or self._root is not None

    def layer(self, layer: HiddenLayer) -> HiddenLayer:
        """The network as it is for standard normal input: with biases where the mean makes them."""
        return HiddenLayer(layer.n_inputs, layer.activations, layer.bias or self._mean is not None, layer.output_bias)

    def to_white(self, layer: HiddenLayer, rows: Tensor) -> Tensor:
        """Parameters, or columns of directions, of ``layer`` as those for standard normal input; linear."""
        if not self.changes:
            return rows
        parts = layer.split(rows)
        u = parts.u if self._root is None else torch.einsum("id...,de->ie...", parts.u, self._root)
        b = parts.b
        if self._mean is not None:
            shift = torch.einsum("id...,d->i...", parts.u, self._mean)
            b = shift if b is None else b + shift
        return Parts(u, b, parts.a, parts.c).joined(self.layer(layer))

    def pull_back_matrix(self, layer: HiddenLayer, hessian: Tensor) -> Tensor:
        """A Hessian for standard normal input as that of the parameters of ``layer``."""
        if not self.changes:
            return hessian
        hessian = self.pull_back(layer, self.pull_back(layer, hessian).T)
        return 0.5 * (hessian + hessian.T)  # both sides were rounded differently

    def pull_back(self, layer: HiddenLayer, rows: Tensor) -> Tensor:
        """The transpose of ``to_white``."""
        if not self.changes:
            return rows
        parts = self.layer(layer).split(rows)
        u = parts.u if self._root is None else torch.einsum("ie...,de->id...", parts.u, self._root)
        if self._mean is not None:
            assert parts.b is not None
            u = u + torch.einsum("i...,d->id...", parts.b, self._mean)
        return Parts(u, parts.b if layer.bias else None, parts.a, parts.c).joined(layer)


class Selection:
    """φ_i = scale θ[index_i], or a frozen value: how a network's parameters φ come from those that are trained.

    Args:
        index: For each element of φ its place in θ, −1 where it is frozen; shape ``(P_φ,)``.
        frozen: φ with the values of what is frozen; None where nothing is.
        scale: What multiplies each element of θ, shape ``(P,)``; None for 1.
    """

    def __init__(self, index: Tensor, frozen: Tensor | None, scale: Tensor | None) -> None:
        self.n_parameters = int(index.max()) + 1
        self._size, self._frozen, self._scale = len(index), frozen, scale
        self._places: Tensor | None = None
        if not torch.equal(index, torch.arange(len(index), device=index.device)):
            self._places = torch.empty(self.n_parameters, dtype=torch.long, device=index.device)
            self._places[index[index >= 0]] = torch.arange(len(index), device=index.device)[index >= 0]

    def point(self, theta: Tensor) -> Tensor:
        """φ of θ."""
        phi = self.push(theta)
        return phi if self._frozen is None else phi + self._frozen

    def push(self, rows: Tensor) -> Tensor:
        """Columns of directions of θ as directions of φ."""
        rows = self._scaled(rows)
        if self._places is None:
            return rows
        spread = rows.new_zeros(self._size, *rows.shape[1:])
        spread[self._places] = rows
        return spread

    def pull_back_matrix(self, hessian: Tensor) -> Tensor:
        """A Hessian of φ as that of θ; may write to it."""
        if self._places is not None:
            hessian = hessian[self._places][:, self._places]
        if self._scale is not None:
            for row, scale in zip(hessian.split(256), self._scale.split(256), strict=True):
                row.mul_(scale[:, None] * self._scale)
        return hessian

    def pull_back(self, rows: Tensor) -> Tensor:
        """The transpose of ``push``."""
        return self._scaled(rows if self._places is None else rows[self._places])

    def _scaled(self, rows: Tensor) -> Tensor:
        if self._scale is None:
            return rows
        return rows * self._scale.reshape(-1, *[1] * (rows.dim() - 1))
