"""L(θ) by setting the parameters and calling the closure again; second derivatives by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_gradflow.objectives.base import ClosureError, DerivativeError, EvaluationCounts, Objective
from torch_gradflow.objectives.function import disagreement, probe_vectors, second_order_kernels
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.uncompiled import uncompiled

Closure = Callable[[], Any]
NOT_ZEROED = (
    "the closure does not zero the gradients: what it leaves in .grad is the sum of the gradient before it and its own. "
    "Call optimizer.zero_grad() inside the closure. (Lightning's accumulate_grad_batches > 1 does this: only part of the "
    "objective is inside the closure then, so leave it at 1 and use larger batches.)"
)


class ReevaluatedClosure(Objective):
    """L(θ) by setting the parameters and calling the closure again.

    Every call sees the same random numbers (the generator's state at the start of the step) and the buffers that the
    first call left, so within a step it is one function of θ. The owner restores the parameters afterwards.

    Args:
        closure: The closure.
        parameters: The tensors that θ stands for.
        layout: Their layout.
        counts: Where evaluations are counted.
        resolution: The rounding unit of the closure.
        random_state: That of the generators at the start of the step.
        buffers: Tensors to which the closure writes.
        apart: Whether it is the loss of one process among several, which must not wait for others within its backward pass,
            as it would with a DistributedDataParallel model.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Sequence[Tensor],
        layout: ParameterLayout,
        counts: EvaluationCounts,
        resolution: float,
        random_state: Mapping[str, Tensor],
        buffers: Sequence[Tensor],
        *,
        apart: bool = False,
    ) -> None:
        self.n_parameters = layout.n_parameters
        self.dtype = layout.dtype
        self.device = layout.device
        self.resolution = resolution
        self.counts = counts
        self._closure = closure
        self._parameters = parameters
        self._layout = layout
        self._random_state = random_state
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]
        self._apart = apart
        self._confirmed = False

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """One more call of the closure, at θ."""
        with self._same_circumstances():
            return self._call_at(theta)

    def call_afresh(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """As ``loss_and_gradient``, but random numbers and buffers go on as they would in a training loop."""
        with torch.enable_grad():
            return self._call_at(theta)

    def _call_at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_closure += 1
        self.counts.n_grad += 1
        self._layout.write(theta, self._parameters)
        # A mark that only a closure which zeroes its gradients removes.
        for p in self._parameters:
            p.grad = torch.full_like(p, torch.finfo(p.dtype).max / 8)
        watch = LocalBackward(self._parameters) if self._apart else BackwardWatch()
        with watch:
            returned = self._closure()
        gradient = self._layout.gradient(self._parameters)
        for p, part in zip(self._parameters, self._layout.split(gradient), strict=True):
            mark = torch.finfo(p.dtype).max / 8
            if part.numel() and bool(((part - mark).abs() <= mark / 2).all()):  # a gradient that overflows is not the mark
                raise ClosureError(NOT_ZEROED)
        return loss_of(returned, watch.loss, self._layout), gradient

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V by double backward through the closure's own backward pass, one vector at a time."""
        columns = vectors.reshape(self.n_parameters, -1)
        self._confirm(theta)
        self.counts.n_hvp += columns.shape[1]
        return self._products(theta, columns).reshape(vectors.shape)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ), symmetrised, by double backward, one column at a time."""
        self._confirm(theta)
        self.counts.n_hessian += 1
        hessian = self._products(theta, torch.eye(self.n_parameters, dtype=self.dtype, device=self.device))
        return 0.5 * (hessian + hessian.T)

    def _confirm(self, theta: Tensor) -> None:
        if self._confirmed:
            return
        probe = probe_vectors(theta)
        why = disagreement(self, theta, probe, self._products(theta, probe))
        if why:
            raise DerivativeError(
                f"the double backward pass through the closure is {why}: gradients are changed after the backward pass "
                "(clipping, hooks), a custom autograd Function has no second derivative, or the gradient is not that of "
                "the loss (a detached or no_grad target)."
            )
        self._confirmed = True

    def _products(self, theta: Tensor, columns: Tensor) -> Tensor:
        self._layout.write(theta, self._parameters)
        differentiator = BackwardDifferentiator(self._parameters, self._layout, columns)
        self.counts.n_closure += 1
        with second_order_kernels(self.device), self._same_circumstances():
            try:
                with differentiator:
                    self._closure()
            except RuntimeError as error:
                raise DerivativeError(
                    f"the closure's backward pass cannot be differentiated: {str(error).splitlines()[0]}"
                ) from error
        if not differentiator.n_backward:
            raise DerivativeError(
                "second derivatives need the closure to call loss.backward(); it used torch.autograd.backward or "
                "something else that does not go through Tensor.backward."
            )
        return differentiator.products

    @contextmanager
    def _same_circumstances(self) -> Iterator[None]:
        state = random_state(self.device)
        set_random_state(self._random_state)
        try:
            with torch.enable_grad():
                yield
        finally:
            set_random_state(state)
            self.restore_buffers()

    def restore_buffers(self) -> None:
        """Put the buffers back to what the first call of the step left in them."""
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)


class BackwardWatch(TorchFunctionMode):
    """Notes what ``backward`` is called on, for closures that do not return their loss.

    Attributes:
        loss: The sum of what ``backward`` was called on, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss: Tensor | None = None

    @uncompiled
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.Tensor.backward:
            return func(*args, **(kwargs or {}))
        if args[0].numel() == 1:
            loss = args[0].detach().clone()
            self.loss = loss if self.loss is None else self.loss + loss
        return self.run_backward(*args, **(kwargs or {}))

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass itself."""
        loss.backward(*args, **kwargs)


class LocalBackward(BackwardWatch):
    """While entered, ``loss.backward()`` adds gradients to ``.grad`` of the parameters alone, and accumulates nowhere else.

    So what waits for gradients to be accumulated takes no notice: DistributedDataParallel averages none, and no process waits
    in its backward pass for another one, which may have failed.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = parameters

    def run_backward(
        self, loss: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, *_: Any, **__: Any
    ) -> None:
        """The gradients of the parameters."""
        parts = torch.autograd.grad(loss, list(self._parameters), gradient, retain_graph, allow_unused=True)
        add_gradients(self._parameters, parts)


class BackwardDifferentiator(TorchFunctionMode):
    """While entered, each ``loss.backward()`` is differentiated along given vectors; then its graph is let go.

    Args:
        parameters: The tensors that θ stands for.
        layout: How they lie in θ.
        columns: The vectors V, shape ``(P, k)``.

    Attributes:
        products: H V for the sum of all losses that ``backward`` was called on, shape ``(P, k)``.
        n_backward: How many there were.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: ParameterLayout, columns: Tensor) -> None:
        super().__init__()
        self.products = torch.zeros_like(columns)
        self.n_backward = 0
        self._parameters, self._layout, self._columns = list(parameters), layout, columns

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.Tensor.backward:
            return func(*args, **(kwargs or {}))
        self._backward(*args, **(kwargs or {}))
        return None

    def _backward(self, loss: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
        self.n_backward += 1
        found = torch.autograd.grad(loss, self._parameters, gradient, create_graph=True, allow_unused=True)
        pairs = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]
        for k in range(self._columns.shape[1] if pairs else 0):
            parts = self._layout.split_as_parameters(self._columns[:, k])
            rows = torch.autograd.grad(
                [g for _, g in pairs],
                self._parameters,
                [parts[i] for i, _ in pairs],
                retain_graph=True,
                allow_unused=True,
            )
            self.products[:, k] += self._layout.flatten(rows)
        # The closure may look at .grad (to clip it, to log its norm).
        add_gradients(self._parameters, found)


def add_gradients(parameters: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    """Add one gradient per parameter to its ``.grad``, as a backward pass does; None is nothing."""
    for parameter, part in zip(parameters, parts, strict=True):
        if part is not None:
            old = parameter.grad
            parameter.grad = part.detach().clone() if old is None else old.detach() + part.detach()


def loss_of(returned: Any, backward_loss: Tensor | None, layout: ParameterLayout) -> Tensor:
    """The loss as a 0-dimensional tensor of θ's type, from what a closure returned or, if that is None, went backward on.

    Raises:
        ClosureError: If it is not a number.
    """
    if returned is None and backward_loss is not None:
        returned = backward_loss
    if isinstance(returned, Mapping) and "loss" in returned:
        returned = returned["loss"]
    if isinstance(returned, Tensor) and returned.numel() == 1:
        return returned.detach().reshape(()).to(dtype=layout.dtype, device=layout.device)
    if isinstance(returned, int | float):
        return torch.tensor(float(returned), dtype=layout.dtype, device=layout.device)
    raise ClosureError(
        f"the closure returned {type(returned).__name__}"
        + (f" of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else "")
        + "; it must return the loss, a tensor with one element or a number."
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators on the CPU and on ``device``."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put back what ``random_state`` gave."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, torch.device(device))
