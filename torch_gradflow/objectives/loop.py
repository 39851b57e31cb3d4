"""A plain training loop, unmodified, as an Objective: no closure, only what was recorded of its forward pass.

Between ``optimizer.zero_grad()`` and ``optimizer.step()`` a loop computes a loss, or several, and calls ``backward``. What
was recorded of it is L(θ), the sum of these losses, with everything else held fixed that the loop took for granted: data,
what it computed under ``no_grad``, numbers that it read out of tensors. The record serves where it gives the gradient that
the loop left in ``.grad``, which is checked at every step; the loop cannot be called again, so where the record does not
serve, that gradient is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.objectives.base import EvaluationCounts
from torch_gradflow.objectives.contract import downhill, not_the_slope
from torch_gradflow.objectives.opened import NOT_A_GRADIENT, Engine, Memory, Opened, gradients_left, try_replay
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.processes import ALONE, Pass, Processes
from torch_gradflow.objectives.program import Program
from torch_gradflow.objectives.record import Recording
from torch_gradflow.objectives.trees import version_of

NOT_ZEROED_BEFORE = (
    "optimizer.zero_grad() was not called between the last step and this forward pass, so that nothing was recorded "
    "(model.zero_grad() does not tell the optimizer, and nothing is recorded after zero_grad() under no_grad or with all lr "
    "zero; call optimizer.zero_grad() before the forward pass)"
)


class NoRecord(Exception):
    """The record of the forward pass does not serve, for the reason that is the message.

    Attributes:
        passing: Whether the next pass may show that it would have served.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def gradient_left(parameters: Sequence[Tensor], layout: ParameterLayout) -> Tensor:
    """What the loop's backward left in ``.grad``, shape ``(P,)``.

    Raises:
        FloatingPointError: If it is not finite.
    """
    gradient = layout.gradient(parameters)
    if not bool(torch.isfinite(gradient).all()):
        raise FloatingPointError(
            f"the gradient in .grad is not finite (its norm is {float(gradient.norm())}); the parameters were left as they "
            "are. Start from other parameters, mend the loss, or skip this step."
        )
    return gradient


def open_loop(
    recording: Recording | None,
    parameters: Sequence[Tensor],
    layout: ParameterLayout,
    memory: Memory,
    counts: EvaluationCounts,
    *,
    engine: Engine = "auto",
    why_not: str = NOT_ZEROED_BEFORE,
    theta: Tensor | None = None,
    expected: Callable[[Tensor, Tensor, Tensor], bool] | None = None,
    processes: Processes = ALONE,
    settings: str = "",
) -> Opened:
    """Make what was recorded of a loop an Objective of the flat vector of ``parameters``.

    Args:
        recording: What was recorded since ``zero_grad()``, or None.
        parameters: The tensors that θ stands for.
        layout: Their layout; with a wider ``dtype`` than theirs the replay computes in that type.
        memory: What was learnt in earlier steps; updated.
        counts: Where evaluations are counted.
        engine: "auto", or one that must serve.
        why_not: Why there is no recording, if there is none.
        theta: θ in ``layout.dtype`` where it is known more precisely than the parameters hold it.
        expected: Whether (loss, gradient, θ) at the start are those that an unchanged objective would give.
        processes: Those among which the data are divided; each has a loop of its own.
        settings: What has to be the same in all of them.

    Raises:
        NoRecord: If the record does not serve.
        FloatingPointError: If loss or gradient are not finite.
    """
    theta = layout.flatten(parameters) if theta is None else theta
    seen = processes.meet(lambda: _look_at(recording, parameters, layout, memory, why_not), theta, settings)
    loss, gradient, recording, program = seen.loss, seen.gradient, seen.recording, seen.program
    behaves, untouched = seen.flags
    unchanged = expected is not None and expected(loss, gradient, theta)
    resolution = layout.resolution(recording.autocast)
    tried = try_replay(program, theta, loss, gradient, layout, memory, counts, resolution, unchanged, processes, engine)
    reason = tried.reason
    if tried.objective is not None and not untouched:
        reason = _changed_by_hand(seen, parameters, theta, layout, processes)
    if tried.objective is None or reason:
        memory.program = None
        raise NoRecord(reason)
    # Two digits cannot tell.
    if memory.check and not behaves and resolution < 1e-4:
        shift = downhill(theta, tried.gradient, layout)
        moved = processes.joint(tried.objective).loss_and_gradient(theta + shift)
        described = not_the_slope((tried.loss, tried.gradient), moved, shift, layout)
        memory.not_a_gradient = processes.share(described, layout.device)
        if memory.not_a_gradient:
            memory.warn_once(NOT_A_GRADIENT.format(memory.not_a_gradient))
        else:
            memory.behaved.add(memory.structure)
    if program.holds_fixed:
        memory.warn_once(
            "the loss uses values that were computed from the parameters under no_grad. They are held fixed within a step, "
            "like data; the next step takes them as the loop computes them then."
        )
    if recording.normalises:
        memory.warn_once(
            "a normalisation uses the statistics of the batch (BatchNorm in training mode). Its running statistics move once "
            "per step, and the flow is that of the loss with batch statistics; call model.eval() to follow the loss of the "
            "model as it will be used."
        )
    memory.program = program
    return Opened(
        tried.objective,
        seen.recorded,
        theta,
        tried.loss,
        tried.gradient,
        tried.engine,
        "",
        tried.unchanged,
        parameters,
        layout,
        list(zip(parameters, gradients_left([p.grad for p in parameters], gradient, layout, processes), strict=True)),
    )


@dataclass(frozen=True)
class Look(Pass):
    """What the loop's pass left; its flags: whether such gradients were seen to be the loss's, whether none was changed since.

    Attributes:
        recording: What was recorded of it.
        program: What can be replayed.
        recorded: The loss, in its own type.
    """

    recording: Recording
    program: Program
    recorded: Tensor


def _look_at(
    recording: Recording | None, parameters: Sequence[Tensor], layout: ParameterLayout, memory: Memory, why_not: str
) -> Look:
    if recording is None:
        raise NoRecord(why_not)
    gradient = gradient_left(parameters, layout)
    program = _usable(recording, parameters, memory)
    if recording.loss is None or recording.loss.numel() != 1:
        raise NoRecord("backward was called on a tensor with more than one element")
    recorded = recording.loss.detach().reshape(())
    loss = recorded.to(dtype=layout.dtype, device=layout.device)
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"the loss is {float(loss)}; the parameters were left as they are.")
    flags = (program.structure in memory.behaved, not recording.gradients_were_changed())
    return Look(loss, gradient, flags, recording, program, recorded)


def _usable(recording: Recording, parameters: Sequence[Tensor], memory: Memory) -> Program:
    """The recorded program, if nothing speaks against it.

    A number that was read out of the loss, or a decision by its value, speaks against it unless the pass before ran just
    the same, number for number, at other parameters: then it was only logged.
    """
    program = recording.program()
    before, memory.previous = memory.previous, program
    if program is None:
        raise NoRecord(_why_nothing(recording))
    if recording.doubts:
        raise NoRecord("; ".join(recording.doubts))
    if recording.parameter_versions != [version_of(p) for p in parameters]:
        raise NoRecord("the parameters were changed between the forward pass and step(), or others move now than before")
    advice = "; do so after backward(), or within optimizer.recording_paused()"
    if program.follows_reading:
        raise NoRecord("; ".join(recording.readings) + ", and uses tensors that were made after that" + advice)
    trusted, memory.trusting = memory.trusting, bool(recording.suspicions) or recording.reads_fixed
    if memory.trusting and before is not None and not _ran_the_same(program, before):
        if trusted:
            memory.warn_once(
                "numbers that the loss uses, or decisions that it takes, changed from one pass to the next, while numbers are "
                "read out of tensors that depend on the parameters. Within a step they were held fixed, and may not have been "
                "meant so. Compute them by torch functions, or read numbers after backward()."
            )
        memory.reads_matter = memory.reads_matter or bool(recording.suspicions)
    if recording.suspicions and (before is None or memory.reads_matter):
        memory.trusting = False
        raise NoRecord("; ".join(recording.suspicions) + advice, passing=before is None)
    if program.structure in memory.distrusted:
        raise NoRecord(memory.distrusted[program.structure])
    return program


def _changed_by_hand(
    seen: Look, parameters: Sequence[Tensor], theta: Tensor, layout: ParameterLayout, processes: Processes
) -> str:
    """How gradients that were written to after ``backward`` differ from what it left, or "".

    The comparison that every step makes cannot see what is small beside the largest component; this one is by tensor, with
    the same computation in the same types.
    """

    def once_more() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            values = [p.detach().requires_grad_(True) for p in parameters]
            found = torch.autograd.grad(seen.program.evaluate(values), values, allow_unused=True)
        return seen.loss, layout.flatten(found)

    _, found = processes.whole(once_more, theta)
    tolerance = 1e3 * layout.resolution(seen.recording.autocast)
    for left, own in zip(layout.split(seen.gradient), layout.split(found), strict=True):
        if own.numel() and bool((left - own).abs().max() > tolerance * own.abs().max()):
            return "gradients were changed after backward (by clipping, masking, a decay that was added, or the like)"
    return ""


def _ran_the_same(program: Program, before: Program) -> bool:
    return program.structure == before.structure and program.numbers() == before.numbers()


def _why_nothing(recording: Recording) -> str:
    if recording.doubts:
        return "; ".join(recording.doubts)
    if recording.custom_function:
        return "a custom autograd Function stands between the parameters and the loss; what such Functions compute is not seen"
    if recording.n_backward:
        return (
            "backward was called on a loss that was not computed from the parameters between zero_grad() and backward(); "
            "call zero_grad() before the forward pass"
        )
    return "no call of Tensor.backward was seen between zero_grad() and step() (torch.autograd.backward is not seen)"
