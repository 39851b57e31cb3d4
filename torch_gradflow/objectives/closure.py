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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.objectives.base import ClosureError, EvaluationCounts, Objective
from torch_gradflow.objectives.contract import ContractReport, added_up, check_contract
from torch_gradflow.objectives.full_batch import FullBatch
from torch_gradflow.objectives.opened import NOT_A_GRADIENT, Engine, Memory, Opened, gradients_left, try_replay
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.processes import ALONE, Pass, ProcessError, Processes
from torch_gradflow.objectives.program import Program
from torch_gradflow.objectives.record import Recorder, Recording
from torch_gradflow.objectives.reevaluated import (
    NOT_ZEROED,
    Closure,
    LocalBackward,
    ReevaluatedClosure,
    loss_of,
    random_state,
)


class NoClosure(Exception):
    """The closure returned None and changed no gradient (Lightning's manual optimisation passes such a one)."""


def open_closure(
    closure: Closure,
    parameters: Sequence[Tensor],
    layout: ParameterLayout,
    memory: Memory,
    counts: EvaluationCounts,
    *,
    engine: Engine = "auto",
    theta: Tensor | None = None,
    expected: Callable[[Tensor, Tensor, Tensor], bool] | None = None,
    bystanders: Sequence[Tensor] = (),
    processes: Processes = ALONE,
    settings: str = "",
) -> Opened:
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
        processes: Those among which the data are divided; each calls its own closure.
        settings: What has to be the same in all of them.

    Raises:
        ClosureError: If the closure breaks its contract, with its name and remedy.
        FloatingPointError: If loss or gradient at the start are not finite.
        NoClosure: If the closure does nothing.
    """
    theta = layout.flatten(parameters) if theta is None else theta
    entry = layout.gradient(parameters)
    state = random_state(layout.device)
    first = processes.meet(
        lambda: _first_call(closure, parameters, layout, memory, counts, engine, bystanders, processes), theta, settings
    )
    called, usable = first.flags
    recording, program, reason = first.recording, first.program, first.reason
    if not called:
        if not processes.all(first.did_nothing):
            raise ProcessError("the closure does something in some processes, and nothing in others.")
        raise NoClosure
    loss, gradient = first.loss, first.gradient
    unchanged = expected is not None and expected(loss, gradient, theta)
    if program is not None and not usable:
        program, reason = None, "the record of another process cannot be used"
    resolution = layout.resolution(recording.autocast)
    replay: Objective | None = None
    tried, own = None, (loss, gradient)  # the closure's own, in its own types
    if program is not None:
        tried = try_replay(program, theta, loss, gradient, layout, memory, counts, resolution, unchanged, processes, engine)
        replay, reason, loss, unchanged = tried.objective, tried.reason, tried.loss, tried.unchanged
        if reason and tried.found is not None:
            _, before = processes.whole(lambda: (first.loss, entry), theta)
            if added_up(gradient, before, tried.found, tried.found, layout):
                raise ClosureError(NOT_ZEROED)
        gradient = tried.gradient
    once_more = ReevaluatedClosure(
        closure, parameters, layout, counts, resolution, state, recording.written, apart=processes.size > 1
    )
    left = [
        *gradients_left(first.gradients[: len(parameters)], own[1], layout, processes),
        *first.gradients[len(parameters) :],
    ]
    opened = Opened(
        replay if replay is not None else once_more,
        first.returned,
        theta,
        loss,
        gradient,
        "closure" if tried is None or replay is None else tried.engine,
        reason,
        unchanged,
        parameters,
        layout,
        list(zip((*parameters, *bystanders), left, strict=True)),
    )
    if memory.check and not memory.checked:
        try:
            report = check_contract(theta, *own, layout, once_more, replay, processes)
            _heed(report, opened, once_more, len(recording.written), memory)
        finally:
            opened.finish(theta)
        memory.checked = True
    if opened.engine != "closure":
        memory.program = program
    elif engine in ("replay", "perceptron"):
        raise ClosureError(f"engine={engine!r} was asked for, but the record of the closure cannot be used: {opened.reason}.")
    else:
        memory.program = None
    return opened


@dataclass(frozen=True)
class FirstCall(Pass):
    """What the call of the closure at the start gave; its flags: whether it did something, whether the program serves.

    Attributes:
        did_nothing: Whether it returned None and changed no gradient.
        returned: What it returned.
        recording: What was recorded of it.
        program: What can be replayed, or None.
        reason: Why there is nothing, or "".
        gradients: What it left in ``.grad`` of each parameter, and of each bystander.
    """

    did_nothing: bool
    returned: Any
    recording: Recording
    program: Program | None
    reason: str
    gradients: list[Tensor | None]


def _first_call(
    closure: Closure,
    parameters: Sequence[Tensor],
    layout: ParameterLayout,
    memory: Memory,
    counts: EvaluationCounts,
    engine: Engine,
    bystanders: Sequence[Tensor],
    processes: Processes,
) -> FirstCall:
    own = [*parameters, *(p for p in bystanders if p.requires_grad)]
    backward = nullcontext() if processes.size == 1 else LocalBackward(own)
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
    recording = Recording(parameters)
    if isinstance(closure, FullBatch) and closure.stream:
        recording.give_up("the batches are read anew at each evaluation (stream=True)")  # it would hold all of them
    with torch.enable_grad(), backward, Recorder([recording]):
        returned = closure()
    untouched = all(p.grad is g and (g is None or g._version == v) for p, (g, v) in zip(parameters, before, strict=True))
    if returned is None and untouched:
        nothing = torch.zeros(1 + layout.n_parameters, dtype=layout.dtype, device=layout.device)
        return FirstCall(nothing[0], nothing[1:], (False, False), True, None, recording, None, "", [])
    counts.n_closure += 1
    counts.n_grad += 1
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
    if engine == "closure":
        program, reason = None, "engine='closure' was asked for"
    else:
        program, reason = _usable(recording, returned, memory)
    return FirstCall(loss, gradient, (True, program is not None), False, returned, recording, program, reason, gradients)


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


def _usable(recording: Recording, returned: Any, memory: Memory) -> tuple[Program | None, str]:
    program = recording.program(returned)
    if program is None:
        return None, recording.doubts[0] if recording.doubts else "no call of Tensor.backward was seen"
    if recording.doubts:
        return None, "; ".join(recording.doubts)
    doubt = memory.distrusted.get(program.structure, "")
    return (None if doubt else program), doubt


def _heed(report: ContractReport, opened: Opened, again: ReevaluatedClosure, n_written: int, memory: Memory) -> None:
    """Draw the consequences of the contract check."""
    if not report.replay_holds:
        opened.objective, opened.engine = again, "closure"
        opened.reason = "replayed at other parameters, the record differs from the closure (control flow, frozen numbers)"
        memory.distrusted[memory.structure] = opened.reason
    memory.not_a_gradient = report.not_a_gradient
    if report.not_a_gradient:
        memory.warn_once(NOT_A_GRADIENT.format(report.not_a_gradient))
    if n_written:
        memory.warn_once(
            f"the closure writes to {n_written} tensors that are not parameters (statistics of a BatchNorm in training "
            "mode, counters). They move once per step, and the flow is that of the loss with batch statistics; call "
            "model.eval() to follow the loss of the model as it will be used."
        )
