"""Which kernel computes the derivatives of a perceptron: plain torch, or the one that Numba compiles.

The compiled kernel serves on CPUs; it computes in float64 whatever the type of φ. Numba is imported, and the kernel compiled
(or loaded from Numba's cache on disk), when it is needed first. What it then gives is compared once with plain torch; where
Numba is missing or fails, a warning says so once, and plain torch serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.perceptron.activations import CODES, IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.perceptron.plain import GRADIENT_CHUNK, JACOBIAN_ROWS, PlainKernel

if TYPE_CHECKING:
    from torch_gradflow.perceptron.blocks import BlockHessian
    from torch_gradflow.perceptron.compensated import CompensatedGradient
    from torch_gradflow.perceptron.compiled import CompiledPerceptron
    from torch_gradflow.perceptron.residuals import CompiledResiduals

# Weights in one layer from which on torch's own backward pass is faster (one thread, N = 1000): 2-200-200-1, with 40,000, took
# three quarters of its time, 784-32-10, with 25,088, as long, 256-256, with 65,536, 1.1 times, 784-128-10, with 100,352, 1.2.
WIDE_LAYER = 2**15
KernelName = Literal["auto", "torch", "numba"]


class Kernel(Protocol):
    """Derivatives of one perceptron's loss as functions of φ, shape ``(P,)``."""

    name: str

    def loss_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L."""

    def hvp(self, phi: Tensor, vectors: Tensor) -> Tensor:
        """H V for V of shape ``(P, k)``."""

    def loss_gradient_hessian(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H."""

    def residuals(self, phi: Tensor) -> Tensor:
        """r of the squared error L = ½‖r‖², shape ``(O N,)``."""

    def pull_back(self, phi: Tensor, cotangent: Tensor) -> Tensor:
        """Jᵀu for the Jacobian J of r and u of shape ``(O N,)``."""

    def jacobian_blocks(self, phi: Tensor) -> Iterator[Tensor]:
        """J and r, some residuals at a time: blocks of shape ``(P + 1, m)``, Jᵀ with r as its last row."""


class CompiledKernel:
    """The compiled kernel, on tensors.

    Args:
        network: The perceptron.
        loss: Its loss.
        samples: The data, on the CPU.
        compiled: The class of the kernel.
    """

    name = "numba"

    def __init__(self, network: Perceptron, loss: Loss, samples: Samples, compiled: type[CompiledPerceptron]) -> None:
        kinds = [kind for runs in network.activations for count, kind in runs for _ in range(count)]
        n_numbers = max(2, *(len(kind.parameters) for kind in kinds))
        numbers = torch.zeros(len(kinds), n_numbers, dtype=torch.float64)
        for row, kind in zip(numbers, kinds, strict=True):
            row[: len(kind.parameters)] = torch.tensor(kind.parameters, dtype=torch.float64)
        codes = torch.tensor([CODES[kind.name] for kind in kinds])
        wide = samples.to(torch.float64)
        self._kernel = compiled(
            network.sizes,
            network.biases,
            codes.numpy(),
            numbers.numpy(),
            loss.code,
            loss.delta,
            wide.x.numpy(),
            wide.targets.numpy(),
            wide.weights.numpy(),
        )
        self._blocks: BlockHessian | None = None
        self._residuals: CompiledResiduals | None = None
        self._order = network.n_parameters

    def loss_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L."""
        point = _readable(phi)
        loss, gradient = torch.from_numpy(np.empty(())), torch.from_numpy(np.empty(self._order))  # quicker than torch.empty
        self._kernel.loss_and_gradient(point, gradient, loss)
        return (loss, gradient) if phi.dtype == torch.float64 else (loss.to(phi.dtype), gradient.to(phi.dtype))

    def hvp(self, phi: Tensor, vectors: Tensor) -> Tensor:
        """H V."""
        rows = _readable(vectors if vectors.shape[1] == 1 else vectors.T)
        products = torch.empty_like(rows)
        self._kernel.hvp(_readable(phi), rows, products)
        columns = products if vectors.shape[1] == 1 else products.T
        return columns if phi.dtype == torch.float64 else columns.to(phi.dtype)

    def loss_gradient_hessian(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H."""
        point, order = _readable(phi), self._order
        loss, gradient = torch.from_numpy(np.empty(())), torch.from_numpy(np.empty(order))
        hessian = torch.from_numpy(np.empty((order, order)))  # numpy asks for large pages, torch does not
        self._with_hessian().loss_gradient_hessian(point, gradient, hessian, loss)
        if phi.dtype == torch.float64:
            return loss, gradient, hessian
        return loss.to(phi.dtype), gradient.to(phi.dtype), hessian.to(phi.dtype)

    def loss_and_gradient_many(self, phis: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L for each row of ``phis``."""
        points = _readable(phis)
        losses, gradients = torch.from_numpy(np.empty(len(points))), torch.from_numpy(np.empty(points.shape))
        self._kernel.loss_and_gradient_many(points, gradients, losses)
        return losses.to(phis.dtype), gradients.to(phis.dtype)

    def loss_gradient_hessian_many(self, phis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, ∇L and H for each row of ``phis``."""
        points = _readable(phis)
        losses, gradients = torch.from_numpy(np.empty(len(points))), torch.from_numpy(np.empty(points.shape))
        hessians = torch.from_numpy(np.empty((*points.shape, self._order)))
        kernel = self._with_hessian()
        if isinstance(kernel, type(self._kernel)):
            kernel.loss_gradient_hessian_many(points, gradients, hessians, losses)
        else:
            for row in zip(points, gradients, hessians, losses, strict=True):
                kernel.loss_gradient_hessian(*row)
        return losses.to(phis.dtype), gradients.to(phis.dtype), hessians.to(phis.dtype)

    def residuals(self, phi: Tensor) -> Tensor:
        """r."""
        return torch.from_numpy(self._of_residuals().residuals(_readable(phi).numpy())).to(phi.dtype)

    def pull_back(self, phi: Tensor, cotangent: Tensor) -> Tensor:
        """Jᵀu."""
        pulled = self._of_residuals().pull_back(_readable(phi).numpy(), _readable(cotangent).numpy())
        return torch.from_numpy(pulled).to(phi.dtype)

    def jacobian_blocks(self, phi: Tensor) -> Iterator[Tensor]:
        """Blocks of J and r."""
        size = max(GRADIENT_CHUNK // (8 * (self._order + 1)), JACOBIAN_ROWS * self._order)
        for block in self._of_residuals().jacobian_blocks(_readable(phi).numpy(), size):
            yield torch.from_numpy(block).to(phi.dtype)

    def _of_residuals(self) -> CompiledResiduals:
        """What computes residuals."""
        if self._residuals is None:
            from torch_gradflow.perceptron.residuals import CompiledResiduals

            self._residuals = CompiledResiduals(self._kernel)
        return self._residuals

    def compensated(self) -> CompensatedKernel:
        """The one for the same data in double-double arithmetic."""
        from torch_gradflow.perceptron.compensated import CompensatedGradient

        return CompensatedKernel(CompensatedGradient(self._kernel))

    def _with_hessian(self) -> CompiledPerceptron | BlockHessian:
        """What computes Hessians: of one hidden layer and one output the kernel, else the one for blocks."""
        if self._kernel.has_hessian:
            return self._kernel
        if self._blocks is None:
            from torch_gradflow.perceptron.blocks import BlockHessian

            self._blocks = BlockHessian(self._kernel)
        return self._blocks


class CompensatedKernel:
    """The compiled loss and gradient in double-double arithmetic, on tensors.

    Args:
        gradient: What computes them.
    """

    def __init__(self, gradient: CompensatedGradient) -> None:
        self._gradient = gradient

    def loss_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L."""
        loss, gradient = self._gradient.loss_and_gradient(_readable(phi).numpy())
        return torch.tensor(loss, dtype=torch.float64), torch.from_numpy(gradient)


def compensated_kernel(network: Perceptron, loss: Loss, kernel: Kernel) -> CompensatedKernel:
    """The one for the data of ``kernel``.

    Raises:
        NotImplementedError: With the reason, where there is none.
    """
    if not isinstance(kernel, CompiledKernel):
        raise NotImplementedError(f"a compensated gradient needs kernel='numba', and {kernel.name!r} serves.")
    if loss.name != "squared error":
        raise NotImplementedError(f"a compensated gradient is offered for the squared error, not for {loss.name!r}.")
    from torch_gradflow.perceptron.compensated import ACTIVATIONS

    unknown = {kind.name for runs in network.activations for _, kind in runs} - {*ACTIVATIONS}
    if unknown:
        known = ", ".join(ACTIVATIONS)
        raise NotImplementedError(f"a compensated gradient is offered for the activations {known}, not for {min(unknown)!r}.")
    return kernel.compensated()


def is_wide(network: Perceptron) -> bool:
    """Whether torch's own backward pass is faster than a closed form."""
    return any(a * b >= WIDE_LAYER for a, b in pairwise(network.sizes))


def choose_kernel(network: Perceptron, loss: Loss, samples: Samples, which: KernelName) -> Kernel:
    """The kernel for these data.

    Raises:
        ValueError: If ``which`` is no kernel, or one that cannot serve.
    """
    if which not in ("auto", "torch", "numba"):
        raise ValueError(f"kernel must be 'auto', 'torch' or 'numba', not {which!r}.")
    if which != "torch":
        why_not = _why_not_compiled(network, samples)
        compiled = None if why_not else load_compiled()
        if compiled is not None:
            return CompiledKernel(network, loss, samples, compiled)
        if which == "numba":
            raise ValueError(f"kernel='numba' cannot serve: {why_not or 'Numba is missing or fails here'}.")
    return PlainKernel(network, loss, samples)


def _why_not_compiled(network: Perceptron, samples: Samples) -> str:
    if samples.x.device.type != "cpu":
        return f"the data are on {samples.x.device}, and it computes on CPUs"
    unknown = {kind.name for runs in network.activations for _, kind in runs if kind.name not in CODES}
    return f"it does not know the activation {unknown.pop()!r}" if unknown else ""


@cache
def load_compiled() -> type[CompiledPerceptron] | None:
    """The class of the compiled kernel; None, with a warning, where Numba is missing or does not compute what torch does."""
    try:
        from torch_gradflow.perceptron.compiled import CompiledPerceptron

        _compare(CompiledPerceptron)
    except Exception as error:  # whatever an installation of a compiler can fail with
        what = str(error).splitlines()[0] if str(error) else ""
        warnings.warn(
            f"Numba cannot be used ({type(error).__name__}: {what}): derivatives of perceptrons are computed in plain torch, "
            "which is slower. Reinstall numba to mend that.",
            stacklevel=2,
        )
        return None
    return CompiledPerceptron


def _compare(compiled: type[CompiledPerceptron]) -> None:
    network = Perceptron.of((2, 3, 1), Activation("tanh"), IDENTITY)
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)
    samples = Samples(x, x[:1] ** 2, torch.full((5,), 0.2, dtype=torch.float64))
    phi = torch.linspace(-1, 1, network.n_parameters, dtype=torch.float64)
    loss = Loss("squared error")
    found = CompiledKernel(network, loss, samples, compiled).loss_and_gradient(phi)[1]
    wanted = PlainKernel(network, loss, samples).loss_and_gradient(phi)[1]
    if not torch.allclose(found, wanted, rtol=1e-10, atol=1e-12):
        raise ArithmeticError("its gradients are not those of torch")


def _readable(tensor: Tensor) -> Tensor:
    """The tensor as the compiled kernel reads memory: float64, contiguous, on the CPU, of no special kind.

    Raises:
        TypeError: If it is on another device.
    """
    # What is read by its address must be what it seems: not a subclass, not a negation that has not taken place.
    is_usual = type(tensor) is Tensor and tensor.dtype == torch.float64 and tensor.is_cpu and tensor.is_contiguous()
    if is_usual and not tensor.requires_grad and not tensor.is_neg():
        return tensor
    if not tensor.is_cpu:
        raise TypeError(f"The compiled kernel computes on the CPU, and the parameters are on {tensor.device}.")
    return tensor.detach().to(torch.float64).resolve_neg().contiguous()
