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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from torch_gradflow.objectives.base import ClosureError, EvaluationCounts, Objective
from torch_gradflow.objectives.contract import ContractReport, added_up, agree, check_contract
from torch_gradflow.objectives.function import FunctionObjective, SecondDerivatives
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.program import Program
from torch_gradflow.objectives.record import Recorder, Recording
from torch_gradflow.objectives.reevaluated import NOT_ZEROED, Closure, ReevaluatedClosure, loss_of, random_state

Engine = Literal["auto", "replay", "closure"]


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
        structure: The structure of the program that was replayed last.
        second_derivatives: The confirmed path to second derivatives of programs of that structure.
        not_a_gradient: How the gradients were seen not to be those of the loss, or "".
        distrusted: Structures of programs that were seen not to be the closure, each with the reason.
        said: Warnings already given.
    """

    check: bool = True
    checked: bool = False
    program: Program | None = None
    structure: tuple[Any, ...] = ()
    second_derivatives: SecondDerivatives | None = None
    not_a_gradient: str = ""
    distrusted: dict[tuple[Any, ...], str] = field(default_factory=dict)
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
    _gradients: Sequence[tuple[Tensor, Tensor | None]]

    def finish(self, theta: Tensor) -> None:
        """Put θ into the parameters and the gradient at the start back into ``.grad``."""
        self._layout.write(theta, self._parameters)
        for parameter, gradient in self._gradients:
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
    bystanders: Sequence[Tensor] = (),
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
        bystanders: Further tensors whose ``.grad`` is to be that of the start afterwards.
        expected: Whether (loss, gradient, θ) at the start are those that an unchanged objective would give.

    Raises:
        ClosureError: If the closure breaks its contract, with its name and remedy.
        FloatingPointError: If loss or gradient at the start are not finite.
        NoClosure: If the closure does nothing.
    """
    theta = layout.flatten(parameters) if theta is None else theta
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
    entry = layout.gradient(parameters) if any(p.grad is not None for p in parameters) else None
    state = random_state(layout.device)
    counts.n_closure += 1
    counts.n_grad += 1
    recording = Recording(parameters)
    with torch.enable_grad(), Recorder([recording]):
        returned = closure()
    untouched = all(p.grad is g and (g is None or g._version == v) for p, (g, v) in zip(parameters, before, strict=True))
    if returned is None and untouched:
        raise NoClosure
    _check_backward(parameters, recording, untouched)
    gradients = [None if p.grad is None else p.grad.detach().clone() for p in (*parameters, *bystanders)]
    gradient = layout.flatten(gradients[: len(parameters)])
    loss = loss_of(returned, recording.loss, layout)
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
        raise FloatingPointError(
            f"the closure gives loss {float(loss)} and a gradient of norm {float(gradient.norm())} at the current "
            "parameters, which were left as they are. Start from other parameters or mend the loss."
        )
    _check_scale(loss, recording, layout)
    unchanged = expected is not None and expected(loss, gradient, theta)

    program, reason = (None, "engine='closure' was asked for") if engine == "closure" else _usable(recording, returned)
    resolution = layout.resolution(recording.autocast)
    replay: FunctionObjective | None = None
    doubt = None if program is None else memory.distrusted.get(program.structure())
    if doubt is not None:
        program, reason = None, doubt
    if program is not None:
        if program.structure() != memory.structure:
            memory.structure, memory.second_derivatives = program.structure(), None
        # Without a program in memory (after a restart) loss and gradient alone have to tell.
        unchanged = unchanged and (memory.program is None or memory.program.same_function_as(program))
        known = memory.program is not None and unchanged
        replay = replayed(program, layout, counts, resolution, memory.second_derivatives)
        wide = any(dtype != layout.dtype for dtype in layout.dtypes)
        if not known or wide:
            reason, found = _compare_at_start(replay, theta, loss, gradient, entry, layout)
            if reason:
                replay = None
            elif wide:
                # The closure's own loss and gradient are those of narrower numbers, at the rounded θ.
                loss, gradient = found
    once_more = ReevaluatedClosure(closure, parameters, layout, counts, resolution, state, recording.written)
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
        list(zip((*parameters, *bystanders), gradients, strict=True)),
    )
    if memory.check and not memory.checked:
        try:
            report = check_contract(theta, loss, gradient, layout, once_more, replay)
            _heed(report, opened, once_more, len(recording.written), memory)
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


def _check_backward(parameters: Sequence[Tensor], recording: Recording, untouched: bool) -> None:
    zero = recording.n_backward == 0 and not any(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)
    if untouched or zero or all(p.grad is None for p in parameters):
        if recording.n_backward:
            raise ClosureError(
                "the closure called backward, but no parameter of this optimizer received a gradient: the loss does not "
                "depend on them, or the optimizer was built from another model's parameters."
            )
        raise ClosureError(
            "the closure did not call backward: after it ran, no parameter had a new gradient. A closure zeroes the "
            "gradients, computes the loss, calls loss.backward() and returns the loss."
        )


def _check_scale(loss: Tensor, recording: Recording, layout: ParameterLayout) -> None:
    if recording.loss is None or recording.loss.numel() != 1:
        return
    used = recording.loss.reshape(()).to(loss)
    if not bool(torch.isclose(used, loss, rtol=1e3 * layout.resolution(), atol=1e-30)):
        raise ClosureError(
            f"the closure returned the loss {float(loss):.8g} but called backward on {float(used):.8g}. The gradient in "
            ".grad must be that of the loss it returns: a loss scaled for mixed precision (GradScaler), divided for "
            "gradient accumulation, or without one of its terms is another objective with another flow time. Call "
            "backward on the tensor that is returned (and use bfloat16 or float32 instead of a GradScaler)."
        )


def _usable(recording: Recording, returned: Any) -> tuple[Program | None, str]:
    program = recording.program(returned)
    if program is None:
        return None, recording.doubts[0] if recording.doubts else "no call of Tensor.backward was seen"
    if recording.doubts:
        return None, "; ".join(recording.doubts)
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
    if entry is not None and added_up(gradient, entry, found[1], found[1], layout):
        raise ClosureError(NOT_ZEROED)
    if agree((found[0], gradient), (loss, gradient), layout):
        return (
            "the gradient in .grad is not that of the recorded loss (a custom autograd Function such as a "
            "straight-through estimator, a hook on a gradient, or gradients changed after backward such as clipping)"
        ), found
    return "the replayed loss is not the closure's (data changed outside of torch, or a function that is not recorded)", found


def _heed(
    report: ContractReport, opened: OpenedClosure, again: ReevaluatedClosure, n_written: int, memory: ClosureMemory
) -> None:
    """Draw the consequences of the contract check."""
    if not report.replay_holds:
        opened.objective, opened.engine = again, "closure"
        opened.reason = "replayed at other parameters, the record differs from the closure (control flow, frozen numbers)"
        memory.distrusted[memory.structure] = opened.reason
    memory.not_a_gradient = report.not_a_gradient
    if report.not_a_gradient:
        memory.warn_once(
            f"what backward leaves in .grad is not the gradient of the loss: {report.not_a_gradient}. (A detached or "
            "no_grad target, a straight-through estimator, clipping or a hook inside the closure?) The flow follows .grad."
        )
    if n_written:
        memory.warn_once(
            f"the closure writes to {n_written} tensors that are not parameters (statistics of a BatchNorm in training "
            "mode, counters). They move once per step, and the flow is that of the loss with batch statistics; call "
            "model.eval() to follow the loss of the model as it will be used."
        )
