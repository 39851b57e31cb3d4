"""Which kernel computes: plain torch, or the compiled one."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.perceptron.plain import PlainKernel

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


def choose_kernel(network: Perceptron, loss: Loss, samples: Samples, which: KernelName) -> Kernel:
    """The kernel for these data.

    Raises:
        ValueError: If ``which`` is no kernel.
    """
    if which not in ("auto", "torch", "numba"):
        raise ValueError(f"kernel must be 'auto', 'torch' or 'numba', not {which!r}.")
    return PlainKernel(network, loss, samples)
