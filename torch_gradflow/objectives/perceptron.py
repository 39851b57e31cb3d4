"""The loss of a multi-layer perceptron as an Objective, on closed-form derivatives; a penalty that merges two neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_number
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.perceptron.kernels import KernelName, choose_kernel

WIDE = "its layers are so wide that torch's own backward pass is faster than the closed form"


class PerceptronObjective(Objective):
    """L(φ) = Σ_n w_n ℓ(f_φ(x_n), t_n), and Σ c θ² if asked for; by default θ is φ, in the order of ``Perceptron``.

    Args:
        network: The perceptron.
        loss: ℓ.
        samples: Data and weights, on one device.
        dtype: The type of θ, and in plain torch that of the computation; the compiled kernels compute in float64 always.
        index: For each element of φ its place in θ, each place once; −1 where it is frozen. None: θ is φ.
        frozen: φ with the values of what is frozen.
        scale: What multiplies each element of θ in φ, shape ``(P,)``.
        decay: c, shape ``(P,)``; weight decay λ/2 ‖θ‖² is c = λ/2.
        kernel: "auto" (by a measured rule, see ``torch_gradflow.perceptron.kernels``), "torch" or "numba".
        counts: Where evaluations are counted.

    Attributes:
        kernel: The name of the kernel that serves.
        network: As given.

    Raises:
        ValueError: For data that do not fit the network, or a kernel that cannot serve.
    """

    def __init__(
        self,
        network: Perceptron,
        loss: Loss,
        samples: Samples,
        *,
        dtype: torch.dtype = torch.float64,
        index: Tensor | None = None,
        frozen: Tensor | None = None,
        scale: Tensor | None = None,
        decay: Tensor | None = None,
        kernel: KernelName = "auto",
        counts: EvaluationCounts | None = None,
    ) -> None:
        self.network = network
        self.dtype, self.device = dtype, samples.x.device
        self.resolution = torch.finfo(dtype).eps
        self.counts = EvaluationCounts() if counts is None else counts
        samples.check(network, loss)
        self._n_samples = samples.x.shape[1]
        self._kernel = choose_kernel(network, loss, samples.to(dtype), kernel)
        self.kernel = self._kernel.name
        self._moving: Tensor | None = None
        self._inverse: Tensor | None = None
        self._frozen: Tensor | None = None
        self.n_parameters = network.n_parameters
        if index is not None and not torch.equal(index.cpu(), torch.arange(network.n_parameters)):
            if frozen is None and bool((index < 0).any()):
                raise ValueError("frozen must hold the values of the parameters whose index is negative; it is None.")
            index = index.to(self.device)
            self._moving = index
            self._inverse = torch.empty(int(index.max()) + 1, dtype=torch.long, device=self.device)
            places = torch.arange(len(index), device=self.device)
            self._inverse[index[index >= 0]] = places[index >= 0]
            self.n_parameters = len(self._inverse)
            if frozen is not None:
                self._frozen = frozen.to(self.device, dtype)
        self._shape = torch.Size([self.n_parameters])
        self._scale = None if scale is None else scale.to(self.device, dtype)
        self._decay = None if decay is None else decay.to(self.device, dtype)

    @classmethod
    def of(
        cls,
        found: RecognisedPerceptron,
        dtype: torch.dtype,
        *,
        kernel: KernelName = "auto",
        counts: EvaluationCounts | None = None,
    ) -> PerceptronObjective:
        """What was recognised, as an objective of θ."""
        return cls(
            found.network,
            found.loss,
            found.samples,
            dtype=dtype,
            index=found.index,
            frozen=found.frozen,
            scale=found.scale,
            decay=found.decay,
            kernel=kernel,
            counts=counts,
        )

    def kind(self) -> tuple[Any, ...]:
        """See ``Objective``."""
        return *super().kind(), self.kernel, self.network.sizes, self._n_samples

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        self.counts.n_grad += 1
        loss, gradient = self._kernel.loss_and_gradient(self._phi(theta))
        gradient = self._scaled(gradient if self._inverse is None else gradient[self._inverse])
        return (loss, gradient) if self._decay is None else self._decayed(theta, loss, gradient)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V."""
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.n_parameters:
            wanted = f"({self.n_parameters},) or ({self.n_parameters}, k)"
            raise ValueError(f"vectors must have the shape {wanted}, not {tuple(vectors.shape)}.")
        columns = vectors.detach() if vectors.requires_grad else vectors
        columns = columns if columns.dim() == 2 else columns[:, None]
        self.counts.n_hvp += columns.shape[1]
        moved = self._scaled(columns)
        if self._inverse is None:
            products = self._kernel.hvp(self._phi(theta), moved)
        else:
            spread = columns.new_zeros(self.network.n_parameters, columns.shape[1])
            spread[self._inverse] = moved
            products = self._kernel.hvp(self._phi(theta), spread)[self._inverse]
        products = self._scaled(products)
        if self._decay is not None:
            products = products + 2 * self._decay[:, None] * columns
        return products if vectors.dim() == 2 else products[:, 0]

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ)."""
        return self.loss_gradient_hessian(theta)[2]

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(θ), ∇L(θ) and H(θ) for the price of H(θ); counted as one Hessian."""
        self.counts.n_hessian += 1
        loss, gradient, hessian = self._kernel.loss_gradient_hessian(self._phi(theta))
        if self._inverse is not None:
            gradient, hessian = gradient[self._inverse], hessian[self._inverse][:, self._inverse]
        if self._scale is not None:
            gradient, hessian = gradient * self._scale, hessian * self._scale * self._scale[:, None]
        if self._decay is not None:
            hessian.diagonal().add_(2 * self._decay)
            loss, gradient = self._decayed(theta, loss, gradient)
        return loss, gradient, hessian

    def _decayed(self, theta: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert self._decay is not None
        weighted = self._decay * theta.detach()
        return loss + weighted @ theta.detach(), gradient + 2 * weighted

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows in the order of θ, each times its scale."""
        if self._scale is None:
            return rows
        return rows * (self._scale if rows.dim() == 1 else self._scale[:, None])

    def _phi(self, theta: Tensor) -> Tensor:
        if theta.shape != self._shape:  # a compiled kernel would read beyond its end
            raise ValueError(f"theta must have the shape ({self.n_parameters},), not {tuple(theta.shape)}.")
        theta = self._scaled(theta.detach() if theta.requires_grad else theta)
        if self._moving is None:
            return theta
        phi = theta[self._moving.clamp(min=0)]
        return phi if self._frozen is None else torch.where(self._moving < 0, self._frozen, phi)


class Merging(Objective):
    """L(θ) + λ/2 ‖w_i − w_j‖² for the input weights of two neurons of one layer: a pull towards a symmetric saddle.

    Raising λ walks from a minimum along the path on which two neurons become one (Brea, Martinelli, Şimşek, Gerstner 2023).

    Args:
        base: L, for instance a ``PerceptronObjective``.
        network: The perceptron whose parameters θ are.
        strength: λ ≥ 0.
        layer: Which layer, 0 for the first.
        neurons: i and j.

    Raises:
        ValueError: For neurons that the layer does not have, or a negative strength.
    """

    def __init__(self, base: Objective, network: Perceptron, strength: float, *, layer: int, neurons: tuple[int, int]) -> None:
        if base.n_parameters != network.n_parameters:
            raise ValueError(f"base has {base.n_parameters} parameters and network {network.n_parameters}; they must agree.")
        check_number("strength", strength, least=0.0)
        if not 0 <= layer < network.n_layers:
            raise ValueError(f"layer must be one of 0, …, {network.n_layers - 1}, not {layer!r}.")
        i, j = neurons
        if i == j or not all(0 <= n < network.sizes[layer + 1] for n in neurons):
            raise ValueError(f"neurons must be two of the {network.sizes[layer + 1]} of layer {layer}, not {neurons!r}.")
        self.n_parameters, self.dtype, self.device = base.n_parameters, base.dtype, base.device
        self.resolution, self.counts = base.resolution, base.counts
        self._base, self._strength = base, strength
        start, fan_in = network.offsets()[layer][0], network.sizes[layer]
        self._i, self._j = (slice(start + n * fan_in, start + (n + 1) * fan_in) for n in (i, j))

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """With the penalty."""
        loss, gradient = self._base.loss_and_gradient(theta)
        apart = theta[self._i] - theta[self._j]
        return loss + 0.5 * self._strength * (apart @ apart), gradient + self._pull(theta[:, None])[:, 0]

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """With the penalty."""
        columns = vectors.reshape(self.n_parameters, -1)
        return (self._base.hvp(theta, columns) + self._pull(columns)).reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """With the penalty."""
        return self._base.hessian(theta) + self._pull(torch.eye(self.n_parameters, dtype=self.dtype, device=self.device))

    def _pull(self, columns: Tensor) -> Tensor:
        """The penalty's constant Hessian times some columns."""
        apart = self._strength * (columns[self._i] - columns[self._j])
        product = torch.zeros_like(columns)
        product[self._i], product[self._j] = apart, -apart
        return product
