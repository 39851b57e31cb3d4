"""What a closure has to keep to, and how its breaches are recognised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.objectives.base import ClosureError, Objective
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.processes import Processes
from torch_gradflow.objectives.reevaluated import ReevaluatedClosure, random_state, set_random_state


@dataclass(frozen=True)
class ContractReport:
    """What two more calls of the closure showed.

    Attributes:
        replay_holds: Whether the replay is the closure also at other parameters.
        not_a_gradient: How the gradients fail to be those of the loss, or "".
    """

    replay_holds: bool
    not_a_gradient: str


def check_contract(
    theta: Tensor,
    loss: Tensor,
    gradient: Tensor,
    layout: ParameterLayout,
    again: ReevaluatedClosure,
    replay: Objective | None,
    processes: Processes,
) -> ContractReport:
    """Two more calls of the closure: is it a function of θ, is the replay that function, is the gradient its own?

    Args:
        theta: θ at the start.
        loss: What the closure gave there.
        gradient: What its backward left in ``.grad``.
        layout: The parameters' layout.
        again: The closure, to be called again; the caller restores parameters and gradients.
        replay: The replay, if it served at the start.
        processes: Those whose whole loss it is: loss and gradient are that of the whole, closure and replay one's own.

    Raises:
        ClosureError: If the closure is stochastic, or does not zero the gradients.
    """
    state = random_state(layout.device)
    try:
        shift = downhill(theta, gradient, layout)
        moved = processes.joint(again).loss_and_gradient(theta + shift)
        # The last call is the one at the start of the step: what it logs, and what Lightning keeps of it, belongs there.
        second = processes.whole(lambda: again.call_afresh(theta), theta)
        if not agree((second[0], gradient), (loss, gradient), layout):
            raise ClosureError(
                f"the closure is stochastic: called twice with the same parameters it returned {float(loss):.10g} and "
                f"{float(second[0]):.10g}. One step follows the flow of one fixed objective: switch dropout off "
                "(model.eval()), and draw and augment the batch before the closure, not inside it. (check=False lets it "
                "pass: a step then follows the flow of the one draw of its first call.)"
            )
        if not agree(second, (loss, gradient), layout):
            raise ClosureError(
                "the closure is stochastic: called twice with the same parameters it gave the same loss but another "
                "gradient. Make the gradient a function of the parameters, or pass check=False."
            )
        elsewhere = replay is None or _same_there(processes.joint(replay), theta + shift, moved, layout)
        described = processes.share(not_the_slope((loss, gradient), moved, shift, layout), layout.device)
        return ContractReport(replay_holds=elsewhere, not_a_gradient=described)
    finally:
        set_random_state(state)
        again.restore_buffers()


def _same_there(replay: Objective, theta: Tensor, wanted: tuple[Tensor, Tensor], layout: ParameterLayout) -> bool:
    found = replay.loss_and_gradient(theta)
    return agree(found, wanted, layout) or only_rounding(replay, theta, found, wanted, layout)


def only_rounding(
    objective: Objective,
    theta: Tensor,
    found: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    layout: ParameterLayout,
) -> bool:
    """Whether loss and gradient differ no more than a change of θ by some rounding units changes them.

    Where residuals are nothing but rounding errors, another order of summation gives others altogether.
    """
    signs = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(theta)
    near = objective.loss_and_gradient(theta * (1 + 32 * layout.resolution() * signs))
    noise = [float((a - b).abs().max()) for a, b in zip(near, found, strict=True)]
    difference = [float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True)]
    # Near a minimum the loss hardly changes; there it must agree to the digits that it has.
    noise[0] += _relative(layout) * abs(float(wanted[0]))
    return all(d <= 8 * n for d, n in zip(difference, noise, strict=True))


def not_the_slope(start: tuple[Tensor, Tensor], moved: tuple[Tensor, Tensor], shift: Tensor, layout: ParameterLayout) -> str:
    """How gradients fail to be those of the loss, from both at two points, ``shift`` apart; or ""."""
    (loss, gradient), (moved_loss, moved_gradient) = start, moved
    rise, before, after = float(moved_loss - loss), float(gradient @ shift), float(moved_gradient @ shift)
    # The trapezoidal rule is right up to third order in the step, which has to be longer in float32.
    rounding = 100 * layout.resolution() * abs(float(loss))
    allowed = (0.01 if layout.resolution() < 1e-12 else 0.1) * (abs(before) + abs(after) + abs(rise)) + rounding
    if abs(rise - 0.5 * (before + after)) <= allowed:
        return ""
    return f"along a small step the loss changes by {rise:.3e}, the gradients say {0.5 * (before + after):.3e}"


def downhill(theta: Tensor, gradient: Tensor, layout: ParameterLayout) -> Tensor:
    """A small step that goes down in every coordinate, so that the change of the loss is not an accident of signs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(layout.n_parameters, generator=generator, dtype=torch.float64).to(theta)
    size = 1e-6 if layout.resolution() < 1e-12 else 3e-3
    length = size * (theta.abs() + 0.1 * float(theta.abs().mean()) + 1e-3)
    return length * torch.where(gradient == 0, noise, -gradient.sign() * noise.abs())


def added_up(found: Tensor, before: Tensor, own: Tensor, wanted: Tensor, layout: ParameterLayout) -> bool:
    """Whether the gradients ``found`` differ from those wanted just where they are ``before`` + ``own``: not zeroed."""
    one = torch.ones((), dtype=found.dtype, device=found.device)
    parts = zip(*(layout.split(t) for t in (found, before, own, wanted)), strict=True)
    different = [(f, b, o) for f, b, o, w in parts if not agree((one, f), (one, w), layout)]
    return bool(different) and all(bool((b != 0).any()) and agree((one, f), (one, b + o), layout) for f, b, o in different)


def agree(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], layout: ParameterLayout, *, tight: bool = False
) -> bool:
    """Equal loss and gradient up to what another order of summation can change.

    ``tight`` is for the same computation done twice, where a slow drift of the objective should not hide; where θ is wider
    than the parameters, one side is rounded to their type, and it means nothing.
    """
    eps, relative = layout.resolution(), _relative(layout)
    if tight and layout.dtype in layout.dtypes:
        relative = 64 * eps
    (loss, gradient), (wanted_loss, wanted_gradient) = found, wanted
    if not bool(torch.isclose(loss, wanted_loss, rtol=relative, atol=1e-30)):
        return False
    size = float(wanted_gradient.abs().max()) if wanted_gradient.numel() else 0.0
    # A gradient sums residuals, whose size is that of the square root of the loss.
    floor = 100 * eps * abs(float(wanted_loss)) ** 0.5
    return bool((gradient - wanted_gradient).abs().max() <= relative * size + floor)


def _relative(layout: ParameterLayout) -> float:
    """Half of the digits: 2e-9 in float64, 2e-4 in float32; 7e-2 in bfloat16, which has two."""
    eps = layout.resolution()
    return max(4 * eps, math.pow(eps, 0.55))
