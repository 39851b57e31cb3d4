"""Closures opened as objectives, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_gradflow.objectives.base import EvaluationCounts
from torch_gradflow.objectives.closure import open_closure
from torch_gradflow.objectives.opened import Engine, Memory, Opened
from torch_gradflow.objectives.parameters import ParameterLayout


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def closure_of(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure that zeroes the gradients of ``parameters``, calls ``loss`` and goes backward."""

    def closure() -> Tensor:
        for p in parameters:
            p.grad = None
        value = loss()
        value.backward()
        return value

    return closure


def open_it(
    closure: Callable[[], Any],
    parameters: Sequence[Tensor],
    *,
    engine: Engine = "auto",
    check: bool = True,
    dtype: torch.dtype | None = None,
    memory: Memory | None = None,
) -> Opened:
    """``open_closure`` with everything that an optimizer would bring along."""
    memory = Memory(check=check) if memory is None else memory
    return open_closure(closure, parameters, ParameterLayout.of(parameters, dtype), memory, EvaluationCounts(), engine=engine)


def vector(tensors: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One vector from ``tensors``, with zeros in the shape of ``like`` for None."""
    dense = [torch.zeros_like(p) if t is None else t.to_dense() for t, p in zip(tensors, like, strict=True)]
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in dense])


def called_at(closure: Callable[[], Any], parameters: Sequence[Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    """What the closure itself gives at θ: the loss it returns, and ``.grad``; parameters are restored."""
    before = [p.detach().clone() for p in parameters]
    start = 0
    with torch.no_grad():
        for p in parameters:
            p.copy_(theta[start : start + p.numel()].view_as(p))
            start += p.numel()
    try:
        returned = closure()
        loss = torch.as_tensor(returned["loss"] if isinstance(returned, dict) else returned, dtype=theta.dtype)
        return loss.detach().reshape(()), vector([p.grad for p in parameters], parameters, theta.dtype)
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def elsewhere(theta: Tensor, size: float = 0.1) -> Tensor:
    """A point at some distance from θ."""
    generator = torch.Generator().manual_seed(7)
    return theta + size * torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def assert_is_the_closure(
    opened: Opened, closure: Callable[[], Any], parameters: Sequence[Tensor], *, rtol: float = 1e-12
) -> None:
    """At the start and elsewhere, the objective has the closure's own loss and gradient."""
    for theta in (opened.theta, elsewhere(opened.theta)):
        loss, gradient = opened.objective.loss_and_gradient(theta)
        wanted_loss, wanted_gradient = called_at(closure, parameters, theta)
        assert distance(loss, wanted_loss) <= rtol
        assert distance(gradient, wanted_gradient) <= rtol
