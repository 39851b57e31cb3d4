"""The loss of a multi-layer perceptron as an Objective, on closed-form derivatives; a penalty that merges two neurons."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_number
from torch_gradflow.objectives.base import NO_RESIDUALS, EvaluationCounts, Objective
from torch_gradflow.objectives.least_squares import LeastSquares
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.perceptron.kernels import CompensatedKernel, CompiledKernel, KernelName, choose_kernel, compensated_kernel

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
        recognised: Network, loss and samples as given, and how φ comes from θ.

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
        places = torch.arange(network.n_parameters) if index is None else index
        self.recognised = RecognisedPerceptron(network, loss, samples, places, frozen, scale, decay)
        self.dtype, self.device = dtype, samples.x.device
        self.resolution = torch.finfo(dtype).eps
        self.counts = EvaluationCounts() if counts is None else counts
        samples.check(network, loss)
        self._loss = loss
        self._n_samples = samples.x.shape[1]
        self._kernel = choose_kernel(network, loss, samples.to(dtype), kernel)
        self.kernel = self._kernel.name
        self._compensated: CompensatedKernel | None = None
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
        return *super().kind(), self.kernel, self.network.sizes, self._n_samples, self._compensated is not None

    def compensated(self) -> PerceptronObjective:
        """This objective, with loss and gradient computed to 31 digits and then rounded.

        So each element of the gradient at θ is known to half an ulp, where float64 leaves an error of about
        ``ε Σ_n w_n |f_n| |∂f_n|``; penalties are added in float64. (As θ itself is rounded to float64, no θ may have a
        gradient much below ε ‖H‖ ‖θ‖; this tells how large it really is.) It takes 8 to 25 times as long. Counts are shared.

        Raises:
            NotImplementedError: Where that is not offered: other losses than the squared error, activations without
                double-double formulas, kernels other than "numba", types other than float64.
        """
        if self.dtype != torch.float64:
            raise NotImplementedError(f"a compensated gradient is of float64 parameters, not of {self.dtype}.")
        precise = copy.copy(self)
        precise._compensated = compensated_kernel(self.network, self._loss, self._kernel)
        return precise

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        self.counts.n_grad += 1
        kernel = self._kernel if self._compensated is None else self._compensated
        loss, gradient = kernel.loss_and_gradient(self._phi(theta))
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
        if self._compensated is not None:
            loss, gradient = self._compensated.loss_and_gradient(self._phi(theta))
        return self._of_theta(theta, loss, gradient, hessian)

    def loss_and_gradient_many(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L at many points, in one pass of the compiled kernel."""
        if not isinstance(self._kernel, CompiledKernel) or self._compensated is not None:
            return super().loss_and_gradient_many(thetas)
        self.counts.n_grad += len(thetas)
        loss, gradient = self._kernel.loss_and_gradient_many(self._phi(thetas, 2))
        gradient = gradient if self._inverse is None else gradient[:, self._inverse]
        gradient = gradient if self._scale is None else gradient * self._scale
        return (loss, gradient) if self._decay is None else self._decayed(thetas, loss, gradient)

    def loss_gradient_hessian_many(self, thetas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H at many points, in one pass of the compiled kernel; counted as m Hessians."""
        if not isinstance(self._kernel, CompiledKernel) or self._compensated is not None:
            return super().loss_gradient_hessian_many(thetas)
        self.counts.n_hessian += len(thetas)
        return self._of_theta(thetas, *self._kernel.loss_gradient_hessian_many(self._phi(thetas, 2)))

    @property
    def has_residuals(self) -> bool:
        """Whether it is the squared error, with penalties, if any, that are not negative."""
        return self._loss.name == "squared error" and (self._decay is None or bool((self._decay >= 0).all()))

    def residuals(self, theta: Tensor) -> Tensor:
        """r_no = √(2 w_n) (f_o(x_n) − t_no), output by output, and √(2 c) θ where there is a penalty."""
        self._check_residuals()
        self.counts.n_grad += 1
        residuals = self._kernel.residuals(self._phi(theta))
        return residuals if self._decay is None else torch.cat([residuals, (2 * self._decay).sqrt() * theta])

    def pull_back(self, theta: Tensor, cotangent: Tensor) -> Tensor:
        """J(θ)ᵀu."""
        self._check_residuals()
        self.counts.n_grad += 1
        own = self._n_samples * self.network.sizes[-1]
        pulled = self._kernel.pull_back(self._phi(theta), cotangent[:own])
        pulled = self._scaled(pulled if self._inverse is None else pulled[self._inverse])
        return pulled if self._decay is None else pulled + (2 * self._decay).sqrt() * cotangent[own:]

    def least_squares(self, theta: Tensor) -> LeastSquares:
        """L(θ), ∇L(θ) and the factor of J(θ).

        With N samples of O outputs it takes about 2 N O P² operations; measured, 3 to 7 times as long as the Hessian.
        """
        self._check_residuals()
        self.counts.n_jacobian += 1
        blocks = self._kernel.jacobian_blocks(self._phi(theta))
        if self._inverse is not None:
            places = torch.cat([self._inverse, self._inverse.new_tensor([self.network.n_parameters])])
            blocks = (block[places] for block in blocks)
        found = LeastSquares.of_blocks(blocks, theta.detach())
        found = found if self._scale is None else found.scaled(self._scale)
        return found if self._decay is None else found.with_decay(theta.detach(), 2 * self._decay)

    def _check_residuals(self) -> None:
        if not self.has_residuals:
            raise NotImplementedError(NO_RESIDUALS)

    def _of_theta(self, theta: Tensor, loss: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives by φ as those by θ, at one point or, along a first dimension, many."""
        if self._inverse is not None:
            gradient, hessian = gradient[..., self._inverse], hessian[..., self._inverse[:, None], self._inverse]
        if self._scale is not None:
            gradient, hessian = gradient * self._scale, hessian * self._scale * self._scale[:, None]
        if self._decay is not None:
            hessian.diagonal(dim1=-2, dim2=-1).add_(2 * self._decay)
            loss, gradient = self._decayed(theta, loss, gradient)
        return loss, gradient, hessian

    def _decayed(self, theta: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert self._decay is not None
        weighted = self._decay * theta.detach()
        return loss + (weighted * theta.detach()).sum(-1), gradient + 2 * weighted

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows in the order of θ, each times its scale."""
        if self._scale is None:
            return rows
        return rows * (self._scale if rows.dim() == 1 else self._scale[:, None])

    def _phi(self, theta: Tensor, dim: int = 1) -> Tensor:
        """φ for θ of shape ``(P,)``, or for dim = 2 of the rows of a matrix."""
        if theta.shape[-1:] != self._shape or theta.dim() != dim:  # a compiled kernel would read beyond its end
            wanted = f"({self.n_parameters},)" if dim == 1 else f"(m, {self.n_parameters})"
            raise ValueError(f"theta must have the shape {wanted}, not {tuple(theta.shape)}.")
        theta = theta.detach() if theta.requires_grad else theta
        theta = theta if self._scale is None else theta * self._scale
        if self._moving is None:
            return theta
        phi = theta[..., self._moving.clamp(min=0)]
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
