"""Parameters of a model as one flat vector θ, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor


def working_dtype(parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> torch.dtype:
    """The floating type of θ: ``dtype`` if given, else the widest of the parameters', at least float32."""
    if dtype is not None:
        return dtype
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


@dataclass(frozen=True)
class ParameterLayout:
    """Where each parameter lies in θ.

    Attributes:
        shapes: The parameters' shapes, in the order in which they stand in θ.
        dtypes: The parameters' own floating types.
        dtype: The floating type of θ.
        device: The device of all parameters and of θ.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> ParameterLayout:
        """The layout of ``parameters``, which must be dense, real and on one device (see ``check_parameters``)."""
        return cls(
            shapes=tuple(p.shape for p in parameters),
            dtypes=tuple(p.dtype for p in parameters),
            dtype=working_dtype(parameters, dtype),
            device=parameters[0].device,
        )

    @property
    def n_parameters(self) -> int:
        """P, the length of θ."""
        return sum(shape.numel() for shape in self.shapes)

    def resolution(self, autocast: torch.dtype | None = None) -> float:
        """The rounding unit in which the model computes: that of its narrowest type, or that to which autocast casts."""
        dtypes = self.dtypes if autocast is None else (*self.dtypes, autocast)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One new vector of shape ``(P,)`` from tensors of the parameters' shapes; None stands for zeros."""
        parts = [
            torch.zeros(shape.numel(), dtype=self.dtype, device=self.device)
            if tensor is None
            else (tensor.to_dense() if tensor.is_sparse else tensor).detach().reshape(-1).to(self.dtype)
            for shape, tensor in zip(self.shapes, tensors, strict=True)
        ]
        return torch.cat(parts)

    def split(self, theta: Tensor) -> list[Tensor]:
        """Views of θ in the parameters' shapes, in θ's own floating type (differentiable)."""
        parts = theta.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def split_as_parameters(self, theta: Tensor) -> list[Tensor]:
        """As ``split``, each part cast to its parameter's own floating type (differentiable)."""
        return [part.to(dtype) for part, dtype in zip(self.split(theta), self.dtypes, strict=True)]

    def expand(self, values: Sequence[float]) -> Tensor:
        """The vector of shape ``(P,)`` that repeats one number per parameter tensor over its elements."""
        if len(set(values)) == 1:
            return torch.full((self.n_parameters,), values[0], dtype=self.dtype, device=self.device)
        repeats = torch.tensor([shape.numel() for shape in self.shapes], device=self.device)
        return torch.tensor(values, dtype=self.dtype, device=self.device).repeat_interleave(repeats)

    @torch.no_grad()
    def write(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """Copy θ into ``parameters``, rounded once to their own floating types."""
        for parameter, part in zip(parameters, self.split(theta), strict=True):
            parameter.copy_(part)

    def gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """The parameters' ``.grad`` as one new vector; a parameter without gradient counts as zero."""
        return self.flatten([p.grad for p in parameters])


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Refuse what a flat vector cannot stand for.

    Raises:
        TypeError: For complex, integer, sparse, sharded (DTensor) or flattened (FSDP) parameters.
        ValueError: For parameters that lie on more than one device, or in the same memory.
    """
    for i, p in enumerate(parameters):
        kinds = {cls.__name__ for cls in type(p).__mro__}
        if "DTensor" in kinds or "FlatParameter" in kinds or hasattr(p, "_is_flat_param"):
            raise TypeError(
                f"params[{i}] is sharded over processes ({type(p).__name__}): FSDP, DTensor and tensor parallelism "
                "are not supported. Build the optimizer from the parameters of the unsharded module."
            )
        if p.is_complex():
            raise TypeError(
                f"params[{i}] is complex ({p.dtype}): the gradient flow is defined for real parameters. "
                "Store real and imaginary parts as real parameters (torch.view_as_real)."
            )
        if not p.is_floating_point():
            raise TypeError(f"params[{i}] is of type {p.dtype}; give floating-point parameters only.")
        if p.layout != torch.strided:
            raise TypeError(f"params[{i}] has layout {p.layout}: give dense parameters (p.to_dense()).")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"params lie on several devices ({names}); move the model to one device.")
    check_memory_apart(parameters)


def check_memory_apart(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that share memory: θ would hold the same numbers twice.

    Raises:
        ValueError: Naming two of them.
    """
    spans = []
    for i, p in enumerate(parameters):
        reach = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) + 1
        if p.numel() and p.data_ptr():
            spans.append((p.data_ptr(), p.data_ptr() + reach * p.element_size(), i))
    spans.sort()
    for (_, end, i), (begin, _, j) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"params[{i}] and params[{j}] share memory (one was made from the other, as by nn.Parameter(w.t())): they "
                "would flow as two. Tie weights by using one nn.Parameter in both places, transposed in the forward pass."
            )
