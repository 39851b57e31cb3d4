"""The loss of a multi-layer perceptron as an Objective, on closed-form derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.perceptron.kernels import KernelName, choose_kernel


class PerceptronObjective(Objective):
    """L(φ) = Σ_n w_n ℓ(f_φ(x_n), t_n); by default θ is φ, the network's parameters in their canonical order.

    Args:
        network: The perceptron.
        loss: ℓ.
        samples: Data and weights, on one device.
        dtype: The type of θ, and in plain torch that of the computation; the compiled kernels compute in float64 always.
        index: For each element of φ its place in θ, each place once; −1 where it is frozen. None: θ is φ.
        frozen: φ with the values of what is frozen.
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
        kernel: KernelName = "auto",
        counts: EvaluationCounts | None = None,
    ) -> None:
        self.network = network
        self.dtype, self.device = dtype, samples.x.device
        self.resolution = torch.finfo(dtype).eps
        self.counts = EvaluationCounts() if counts is None else counts
        samples.check(network, loss)
        self._kernel = choose_kernel(network, loss, samples.to(dtype), kernel)
        self.kernel = self._kernel.name
        self._moving: Tensor | None = None
        self._inverse: Tensor | None = None
        self._frozen: Tensor | None = None
        self.n_parameters = network.n_parameters
        if index is not None and not torch.equal(index.cpu(), torch.arange(network.n_parameters)):
            index = index.to(self.device)
            self._moving = index
            self._inverse = torch.empty(int(index.max()) + 1, dtype=torch.long, device=self.device)
            places = torch.arange(len(index), device=self.device)
            self._inverse[index[index >= 0]] = places[index >= 0]
            self.n_parameters = len(self._inverse)
            if frozen is not None:
                self._frozen = frozen.to(self.device, dtype)

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
            kernel=kernel,
            counts=counts,
        )

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        self.counts.n_grad += 1
        loss, gradient = self._kernel.loss_and_gradient(self._phi(theta))
        return loss, gradient if self._inverse is None else gradient[self._inverse]

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V."""
        columns = vectors.reshape(self.n_parameters, -1)
        self.counts.n_hvp += columns.shape[1]
        if self._inverse is None:
            return self._kernel.hvp(self._phi(theta), columns).reshape(vectors.shape)
        spread = columns.new_zeros(self.network.n_parameters, columns.shape[1])
        spread[self._inverse] = columns
        return self._kernel.hvp(self._phi(theta), spread)[self._inverse].reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ)."""
        return self.loss_gradient_hessian(theta)[2]

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L(θ), ∇L(θ) and H(θ) for the price of H(θ); counted as one Hessian."""
        self.counts.n_hessian += 1
        loss, gradient, hessian = self._kernel.loss_gradient_hessian(self._phi(theta))
        if self._inverse is not None:
            gradient, hessian = gradient[self._inverse], hessian[self._inverse][:, self._inverse]
        return loss, gradient, hessian

    def _phi(self, theta: Tensor) -> Tensor:
        if self._moving is None:
            return theta.detach()
        phi = theta.detach()[self._moving.clamp(min=0)]
        return phi if self._frozen is None else torch.where(self._moving < 0, self._frozen, phi)
