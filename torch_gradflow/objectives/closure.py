"""Any training-loop closure, unmodified, as an Objective.

The closure that ``optimizer.step(closure)`` is given zeroes the gradients, computes the loss, calls ``backward`` and
returns the loss, all at the parameters' present values. ``open_closure`` runs it once under a recorder
(``objectives.record``) and offers L(θ) anywhere:

* engine "replay": the recorded calls, replayed as a pure function of θ. The closure is not called again.
* engine "closure": the parameters are set to θ and the closure is called again; second derivatives come from keeping the
  graph of the backward pass that it asks for (double backward).

The replay serves only where its loss and gradient at the start equal the closure's own, which is checked on every step;
on the first step also at a second point, and the closure is called once more at the same point to see whether it is a
function at all. So a no_grad target, a straight-through estimator, a hook on a gradient, clipping inside the closure and
numbers frozen by ``.item()`` are noticed where they matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_gradflow.objectives.base import ClosureError, DerivativeError, EvaluationCounts, Objective
from torch_gradflow.objectives.function import (
    FunctionObjective,
    SecondDerivatives,
    hvp_disagreement,
    second_order_kernels,
)
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.record import Program, Recorder

Engine = Literal["auto", "replay", "closure"]
Closure = Callable[[], Any]


class GradientFlowWarning(UserWarning):
    """Something works, but not quite as its user may think."""


class NoClosure(Exception):
    """The closure returned None and changed no gradient (Lightning's manual optimisation passes such a one)."""


@dataclass
class ClosureMemory:
    """What stays known of a closure from one step to the next.

    Attributes:
        check: Whether the contract is to be checked on first use.
        checked: Whether it was.
        program: The last program whose replay was confirmed.
        confirmed: The structures of programs whose replay was the closure also at other parameters.
        structure: The structure of the program that was replayed last.
        second_derivatives: The confirmed path to second derivatives of programs of that structure.
        said: Warnings already given.
    """

    check: bool = True
    checked: bool = False
    program: Program | None = None
    confirmed: set[tuple[Any, ...]] = field(default_factory=set)
    structure: tuple[Any, ...] = ()
    second_derivatives: SecondDerivatives | None = None
    said: set[str] = field(default_factory=set)

    def warn_once(self, message: str) -> None:
        """Warn with ``message`` unless that was done before."""
        if message not in self.said:
            self.said.add(message)
            warnings.warn(message, GradientFlowWarning, stacklevel=5)


@dataclass
class OpenedClosure:
    """One step's objective, see ``open_closure``.

    Attributes:
        objective: L(θ).
        returned: What the closure returned at the start.
        theta: θ at the start.
        loss: L at the start.
        gradient: ∇L at the start, as the closure's own backward left it in ``.grad``.
        engine: Which engine serves, "replay" or "closure".
        reason: Why the replay does not serve, or "".
        unchanged: Whether loss and gradient at the start are those that were expected.
    """

    objective: Objective
    returned: Any
    theta: Tensor
    loss: Tensor
    gradient: Tensor
    engine: str
    reason: str
    unchanged: bool
    _parameters: Sequence[Tensor]
    _layout: ParameterLayout
    _gradients: Sequence[Tensor | None]

    def finish(self, theta: Tensor) -> None:
        """Put θ into the parameters and the gradient at the start back into ``.grad``."""
        self._layout.write(theta, self._parameters)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


def open_closure(
    closure: Closure,
    parameters: Sequence[Tensor],
    layout: ParameterLayout,
    memory: ClosureMemory,
    counts: EvaluationCounts,
    *,
    engine: Engine = "auto",
    theta: Tensor | None = None,
    expected: Callable[[Tensor, Tensor, Tensor], bool] | None = None,
) -> OpenedClosure:
    """Call ``closure`` once and make its loss an Objective of the flat vector of ``parameters``.

    Args:
        closure: Zeroes gradients, computes the loss, calls ``backward``, returns the loss.
        parameters: The tensors that θ stands for.
        layout: Their layout; with a wider ``dtype`` than theirs the replay computes in that type.
        memory: What was learnt in earlier steps; updated.
        counts: Where evaluations are counted.
        engine: "auto", or one that must serve.
        theta: θ in ``layout.dtype`` where it is known more precisely than the parameters hold it.
        expected: Whether (loss, gradient, θ) at the start are those that an unchanged objective would give.

    Raises:
        ClosureError: If the closure breaks its contract, with its name and remedy.
        FloatingPointError: If loss or gradient at the start are not finite.
        NoClosure: If the closure does nothing.
    """
    theta = layout.flatten(parameters) if theta is None else theta
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
    entry = layout.gradient(parameters) if any(p.grad is not None for p in parameters) else None
    random_state = _random_state(layout.device)
    counts.n_closure += 1
    counts.n_grad += 1
    recorder = Recorder(parameters)
    with torch.enable_grad(), recorder:
        returned = closure()
    untouched = all(p.grad is g and (g is None or g._version == v) for p, (g, v) in zip(parameters, before, strict=True))
    if returned is None and untouched:
        raise NoClosure
    _check_backward(parameters, recorder, untouched)
    gradients = [None if p.grad is None else p.grad.detach().clone() for p in parameters]
    gradient = layout.flatten(gradients)
    loss = _loss_of(returned, recorder, layout)
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
        raise FloatingPointError(
            f"the closure gives loss {float(loss)} and a gradient of norm {float(gradient.norm())} at the current "
            "parameters, which were left as they are. Start from other parameters or mend the loss."
        )
    _check_scale(loss, recorder, layout)
    unchanged = expected is not None and expected(loss, gradient, theta)

    program, reason = (None, "engine='closure' was asked for") if engine == "closure" else _usable(recorder, returned, memory)
    resolution = layout.resolution(recorder.autocast)
    replay: FunctionObjective | None = None
    if program is not None:
        if program.structure() != memory.structure:
            memory.structure, memory.second_derivatives = program.structure(), None
        known = memory.program is not None and unchanged and memory.program.same_function_as(program)
        replay = replayed(program, layout, counts, resolution, memory.second_derivatives)
        wide = any(dtype != layout.dtype for dtype in layout.dtypes)
        if not known or wide:
            reason, found = _compare_at_start(replay, theta, loss, gradient, entry, layout)
            if reason:
                replay = None
            elif wide:
                # The closure's own loss and gradient are those of narrower numbers, at the rounded θ.
                loss, gradient = found
    once_more = ReevaluatedClosure(closure, parameters, layout, counts, resolution, random_state, recorder.written)
    opened = OpenedClosure(
        replay if replay is not None else once_more,
        returned,
        theta,
        loss,
        gradient,
        "replay" if replay is not None else "closure",
        reason,
        unchanged,
        parameters,
        layout,
        gradients,
    )
    if memory.check and not memory.checked:
        try:
            _check_contract(opened, closure, once_more, replay, memory)
            if opened.engine == "replay" and program is not None:
                memory.confirmed.add(program.structure())
        finally:
            opened.finish(theta)
        memory.checked = True
    if opened.engine == "replay":
        memory.program = program
    elif engine == "replay":
        raise ClosureError(f"engine='replay' was asked for, but the record of the closure cannot be used: {opened.reason}.")
    else:
        memory.program = None
    return opened


def replayed(
    program: Program,
    layout: ParameterLayout,
    counts: EvaluationCounts,
    resolution: float,
    second_derivatives: SecondDerivatives | None = None,
) -> FunctionObjective:
    """The program as an Objective; computed in ``layout.dtype`` where that is wider than the parameters' types."""
    wide = layout.dtype == torch.float64 and any(dtype != torch.float64 for dtype in layout.dtypes)
    if wide and torch.float64 not in layout.dtypes:
        widened, resolution = program.in_float64(), torch.finfo(torch.float64).eps

        def term(theta: Tensor) -> Tensor:
            return widened.evaluate(layout.split(theta))
    else:

        def term(theta: Tensor) -> Tensor:
            return program.evaluate(layout.split_as_parameters(theta)).to(layout.dtype)

    return FunctionObjective(
        lambda: (term,),
        layout.n_parameters,
        layout.dtype,
        layout.device,
        counts=counts,
        second_derivatives=second_derivatives,
        resolution=resolution,
    )


class ReevaluatedClosure(Objective):
    """L(θ) by setting the parameters and calling the closure again.

    Every call sees the same random numbers (the generator's state at the start of the step) and the buffers that the
    first call left, so within a step it is one function of θ. The owner restores the parameters afterwards.
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
        self._confirmed = False

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """One more call of the closure, at θ."""
        self.counts.n_closure += 1
        self.counts.n_grad += 1
        self._layout.write(theta, self._parameters)
        with self._same_circumstances():
            loss = self._closure()
        return _loss_of(loss, None, self._layout), self._layout.gradient(self._parameters)

    def call_at(self, theta: Tensor, *, fresh: bool) -> tuple[Tensor, Tensor]:
        """As ``loss_and_gradient``; ``fresh`` lets random numbers and buffers go on as they would in a loop."""
        if not fresh:
            return self.loss_and_gradient(theta)
        self.counts.n_closure += 1
        self.counts.n_grad += 1
        self._layout.write(theta, self._parameters)
        with torch.enable_grad():
            loss = self._closure()
        return _loss_of(loss, None, self._layout), self._layout.gradient(self._parameters)

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
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.n_parameters, 1, generator=generator, dtype=torch.float64)
        probe = (probe / probe.norm()).to(dtype=self.dtype, device=self.device)
        error = hvp_disagreement(self, theta, probe[:, 0], self._products(theta, probe)[:, 0])
        if error is not None:
            raise DerivativeError(
                f"the double backward pass through the closure is off by {error:.1e} (relative) from differences of its "
                "gradients: gradients are changed after the backward pass (clipping, hooks), a custom autograd Function "
                "has no second derivative, or the gradient is not that of the loss."
            )
        self._confirmed = True

    def _products(self, theta: Tensor, columns: Tensor) -> Tensor:
        self._layout.write(theta, self._parameters)
        keeper = GraphKeeper(self._parameters)
        self.counts.n_closure += 1
        products = torch.zeros_like(columns)
        with second_order_kernels(self.device), self._same_circumstances():
            with keeper:
                self._closure()
            if not keeper.gradients:
                raise DerivativeError(
                    "second derivatives need the closure to call loss.backward(); it used torch.autograd.backward or "
                    "something else that does not go through Tensor.backward."
                )
            pairs = [(i, g) for i, g in enumerate(keeper.gradients) if g is not None and g.requires_grad]
            for k in range(columns.shape[1] if pairs else 0):
                parts = self._layout.split_as_parameters(columns[:, k])
                rows = torch.autograd.grad(
                    [g for _, g in pairs],
                    list(self._parameters),
                    [parts[i] for i, _ in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
                products[:, k] = self._layout.flatten(rows)
        return products

    @contextmanager
    def _same_circumstances(self) -> Iterator[None]:
        state = _random_state(self.device)
        _set_random_state(self._random_state)
        try:
            with torch.enable_grad():
                yield
        finally:
            _set_random_state(state)
            with torch.no_grad():
                for buffer, value in self._buffers:
                    buffer.copy_(value)


class GraphKeeper(TorchFunctionMode):
    """While entered, ``loss.backward()`` keeps its graph: the gradients can be differentiated again.

    Attributes:
        gradients: One differentiable gradient per parameter (None where the loss does not depend on it); empty until
            ``backward`` was called.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.gradients: list[Tensor | None] = []
        self._parameters = parameters

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
        parts = torch.autograd.grad(loss, list(self._parameters), gradient, create_graph=True, allow_unused=True)
        known = self.gradients or [None] * len(parts)
        self.gradients = [b if a is None else (a if b is None else a + b) for a, b in zip(known, parts, strict=True)]
        # The closure may look at .grad (to clip it, to log its norm).
        for parameter, part in zip(self._parameters, parts, strict=True):
            if part is not None:
                old = parameter.grad
                parameter.grad = part.detach().clone() if old is None else old.detach() + part.detach()


def _check_backward(parameters: Sequence[Tensor], recorder: Recorder, untouched: bool) -> None:
    if untouched or all(p.grad is None for p in parameters):
        if recorder.n_backward:
            raise ClosureError(
                "the closure called backward, but no parameter of this optimizer received a gradient: the loss does not "
                "depend on them, or the optimizer was built from another model's parameters."
            )
        raise ClosureError(
            "the closure did not call backward: after it ran, no parameter had a new gradient. A closure zeroes the "
            "gradients, computes the loss, calls loss.backward() and returns the loss."
        )


def _loss_of(returned: Any, recorder: Recorder | None, layout: ParameterLayout) -> Tensor:
    if returned is None and recorder is not None and recorder.loss is not None:
        returned = recorder.loss
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


def _check_scale(loss: Tensor, recorder: Recorder, layout: ParameterLayout) -> None:
    if recorder.loss is None or recorder.loss.numel() != 1:
        return
    used = recorder.loss.reshape(()).to(loss)
    if not bool(torch.isclose(used, loss, rtol=1e3 * layout.resolution(), atol=1e-30)):
        raise ClosureError(
            f"the closure returned the loss {float(loss):.8g} but called backward on {float(used):.8g}. The gradient in "
            ".grad must be that of the loss it returns: a loss scaled for mixed precision (GradScaler), divided for "
            "gradient accumulation, or without one of its terms is another objective with another flow time. Call "
            "backward on the tensor that is returned (and use bfloat16 or float32 instead of a GradScaler)."
        )


def _usable(recorder: Recorder, returned: Any, memory: ClosureMemory) -> tuple[Program | None, str]:
    program = recorder.program(returned)
    reads = f"it reads numbers out of tensors ({', '.join(sorted(recorder.reads))})"
    if recorder.reads and not memory.check:
        return None, f"{reads}, and check=False"
    # Such a record is right at the start of every step; whether elsewhere too, only the contract check has seen.
    if recorder.reads and memory.checked and program is not None and program.structure() not in memory.confirmed:
        return None, f"{reads}, and was not confirmed at other parameters"
    if program is None:
        return None, recorder.doubts[0] if recorder.doubts else "no call of Tensor.backward was seen"
    if recorder.doubts:
        return None, "; ".join(recorder.doubts)
    return program, ""


def _compare_at_start(
    replay: Objective,
    theta: Tensor,
    loss: Tensor,
    gradient: Tensor,
    entry: Tensor | None,
    layout: ParameterLayout,
) -> tuple[str, tuple[Tensor, Tensor]]:
    """Why the replay is not the closure at the start, or ""; and what the replay gives there."""
    wanted = (loss, gradient)
    try:
        found = replay.loss_and_gradient(theta)
    except Exception as error:  # a replay can fail in any way that user code can: that only means it is not used
        text = str(error).splitlines()[0] if str(error) else ""
        return f"its record cannot be replayed ({type(error).__name__}: {text})", wanted
    if agree(found, wanted, layout):
        return "", found
    if entry is not None and agree((loss, found[1] + entry), (loss, gradient), layout) and bool((entry != 0).any()):
        raise ClosureError(
            "the closure does not zero the gradients: .grad after it is the sum of the gradient before it and its own. "
            "Call optimizer.zero_grad() inside the closure. (Lightning's accumulate_grad_batches > 1 does this: only "
            "part of the objective is inside the closure then, so leave it at 1 and use larger batches.)"
        )
    if agree((found[0], gradient), (loss, gradient), layout):
        return (
            "the gradient in .grad is not that of the recorded loss (a custom autograd Function such as a "
            "straight-through estimator, a hook on a gradient, or gradients changed after backward such as clipping)"
        ), found
    return "the replayed loss is not the closure's (data changed outside of torch, or a function that is not recorded)", found


def _check_contract(
    opened: OpenedClosure,
    closure: Closure,
    again: ReevaluatedClosure,
    replay: FunctionObjective | None,
    memory: ClosureMemory,
) -> None:
    """Two more calls of the closure: is it a function of θ, is the replay that function, is the gradient its own?"""
    layout, theta, loss, gradient = opened._layout, opened.theta, opened.loss, opened.gradient
    buffers = again._buffers
    state = _random_state(layout.device)
    try:
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(layout.n_parameters, generator=generator, dtype=torch.float64).to(theta)
        size = 1e-3 if layout.resolution() < 1e-12 else 1e-2
        shift *= size * (theta.abs() + 0.1 * float(theta.abs().mean()) + 1e-3)
        moved = again.call_at(theta + shift, fresh=False)
        # The last call is the one at the start of the step: what it logs, and what Lightning keeps of it, belongs there.
        second = again.call_at(theta, fresh=True)
        if not agree((second[0], gradient), (loss, gradient), layout):
            raise ClosureError(
                f"the closure is stochastic: called twice with the same parameters it returned {float(loss):.10g} and "
                f"{float(second[0]):.10g}. One step follows the flow of one fixed objective: switch dropout off "
                "(model.eval()), and draw and augment the batch before the closure, not inside it. (check=False lets it "
                "pass: a step then follows the flow of the one draw of its first call.)"
            )
        if not agree(second, (loss, gradient), layout):
            added = (loss, second[1] - moved[1])
            if agree(added, (loss, gradient), layout) or (
                replay is not None and agree(added, replay.loss_and_gradient(theta), layout)
            ):
                raise ClosureError(
                    "the closure does not zero the gradients: called again, it added to the gradient that was "
                    "there. Call optimizer.zero_grad() inside the closure."
                )
            raise ClosureError(
                "the closure is stochastic: called twice with the same parameters it gave the same loss but another "
                "gradient. Make the gradient a function of the parameters, or pass check=False."
            )
        if replay is not None and not agree(replay.loss_and_gradient(theta + shift), moved, layout):
            opened.objective, opened.engine = again, "closure"
            opened.reason = (
                "replayed at other parameters, the record differs from the closure (numbers read with .item(), control "
                "flow that depends on values)"
            )
        rise = float(moved[0] - loss)
        predicted = float(0.5 * (gradient + moved[1]) @ shift)
        rounding = 50 * layout.resolution() * abs(float(loss))
        allowed = 0.05 * float(gradient.norm() + moved[1].norm()) * float(shift.norm()) + rounding
        if abs(rise - predicted) > allowed:
            memory.warn_once(
                f"what backward leaves in .grad is not the gradient of the loss: along a small step the loss changes by "
                f"{rise:.3e}, the gradients say {predicted:.3e}. (A detached or no_grad target, a straight-through "
                "estimator, clipping or a hook inside the closure?) The flow follows .grad."
            )
        if buffers:
            memory.warn_once(
                f"the closure writes to {len(buffers)} tensors that are not parameters (statistics of a BatchNorm in "
                "training mode, counters). They move once per step, and the flow is that of the loss with batch "
                "statistics; call model.eval() to follow the loss of the model as it will be used."
            )
    finally:
        _set_random_state(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def agree(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], layout: ParameterLayout) -> bool:
    """Equal loss and gradient up to what another order of summation can change."""
    eps = layout.resolution()
    # Half of the digits: 2e-9 in float64, 2e-4 in float32; 7e-2 in bfloat16, which has two.
    relative = max(4 * eps, eps**0.55)
    (loss, gradient), (wanted_loss, wanted_gradient) = found, wanted
    if not bool(torch.isclose(loss, wanted_loss, rtol=relative, atol=1e-30)):
        return False
    size = float(wanted_gradient.abs().max()) if wanted_gradient.numel() else 0.0
    # A gradient sums residuals, whose size is that of the square root of the loss.
    floor = 100 * eps * abs(float(wanted_loss)) ** 0.5
    return bool((gradient - wanted_gradient).abs().max() <= relative * size + floor)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, torch.device(device))
