"""What a flow carries from one optimizer step to the next, kept where torch keeps an optimizer's state.

Tensors stand in ``optimizer.state[parameter]`` in the parameter's shape (so checkpoints of any kind know them): "theta", where
the last step left the parameter, in the type in which the flow is computed; "slope",
the gradient to be expected at the next step if nothing changes, and "knots", the accepted points around and ahead of the
present, θ first, then gradients. Plain numbers stand in the parameter groups, the same in each. All of it is in the
coordinates φ = θ/√d of the flow. While the flow advances with one gradient per call (``flow.adams``), the "knots" are the
last accepted point and the gradients kept, and "theta" is the proposal that stands in the parameters. Nothing is held
anywhere else, so that a resumed flow continues bit for bit.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_gradflow.flow.adams import AdamsState
from torch_gradflow.flow.continuation import Continuation
from torch_gradflow.flow.dense import HermiteWindow
from torch_gradflow.flow.solution import Knot
from torch_gradflow.optim.closure_optimizer import ActiveParameters

DEFAULTS: dict[str, Any] = {
    "flow_time": 0.0,
    "step_size": 0.0,
    "expected_loss": math.nan,
    "knot_times": [],
    "seen": 0,
    "moved_at": [],
    "multistep": [],
    "owed": 0.0,
}


@dataclass(frozen=True)
class Carried:
    """The state of a flow at the start of a step, if the objective did not change.

    Attributes:
        state: Where the flow stands; loss and gradient are the expected ones.
        seen: How many steps in a row saw this objective before.
    """

    state: Continuation
    seen: int


def reference_lr(optimizer: Optimizer) -> float:
    """The first non-zero lr: the unit of flow time."""
    return next(float(group["lr"]) for group in optimizer.param_groups if float(group["lr"]) != 0.0)


def step_size(optimizer: Optimizer) -> float | None:
    """The integrator's next step size, None before the first step."""
    return float(optimizer.param_groups[0]["step_size"]) or None


def initialise(optimizer: Optimizer, n_knots: int, dtype: torch.dtype) -> None:
    """Give each parameter that requires gradients the entries that it will have after a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and not optimizer.state[p]:
                optimizer.state[p] = {
                    "theta": p.detach().to(dtype, copy=True),
                    "slope": torch.zeros_like(p, dtype=dtype),
                    "knots": torch.zeros(2 * n_knots, *p.shape, dtype=dtype, device=p.device),
                }


def read(optimizer: Optimizer, active: ActiveParameters, n_knots: int) -> Carried | None:
    """What the last step left, or None if there is nothing, or if other parameters move now, or at other speeds."""
    group, states = optimizer.param_groups[0], _states(optimizer, active, n_knots)
    if states is None or math.isnan(group["expected_loss"]):
        return None
    layout, t = active.layout, float(group["flow_time"])
    loss = torch.tensor(group["expected_loss"], dtype=layout.dtype, device=layout.device)
    # θ itself is in the parameters; the caller puts it in.
    here = Knot(t, layout.flatten(active.tensors), loss, layout.flatten([s["slope"] for s in states]))
    window = None
    if group["knot_times"]:
        knots = torch.cat([s["knots"].reshape(2 * n_knots, -1) for s in states], dim=1)
        window = HermiteWindow(tuple(group["knot_times"]), knots[:n_knots], knots[n_knots:])
    return Carried(Continuation(here, step_size(optimizer), window), int(group["seen"]))


def write(optimizer: Optimizer, active: ActiveParameters, state: Continuation, seen: int) -> None:
    """Keep where the flow stands for the next step."""
    layout, window = active.layout, state.window
    slopes = layout.split(state.here.gradient)
    n_knots = 0
    columns: list[Tensor] = []
    if window is not None:
        n_knots = len(window.times)
        knots = torch.cat([window.theta, window.gradient])
        columns = list(knots.split([shape.numel() for shape in layout.shapes], dim=1))
    for i, p in enumerate(active.tensors):
        optimizer.state[p]["slope"] = slopes[i].clone()
        if window is not None:
            optimizer.state[p]["knots"] = columns[i].reshape(2 * n_knots, *p.shape).contiguous()
    _write_numbers(
        optimizer,
        flow_time=state.here.t,
        step_size=state.step_size or 0.0,
        expected_loss=float(state.here.loss),
        knot_times=[] if window is None else list(window.times),
        seen=seen,
        moved_at=_speeds(optimizer),
        multistep=[],
        owed=0.0,
    )


def read_multistep(optimizer: Optimizer, active: ActiveParameters, n_knots: int) -> AdamsState | None:
    """Where a flow with one gradient per call stands, or None; the same conditions as for ``read``."""
    group, states = optimizer.param_groups[0], _states(optimizer, active, n_knots)
    if states is None or not group["multistep"]:
        return None
    rows = torch.cat([s["knots"].reshape(2 * n_knots, -1) for s in states], dim=1)
    order, proposed, n_rejected, restless, jump = group["multistep"]
    times = tuple(group["knot_times"])
    return AdamsState(
        t=times[0],
        theta=rows[0],
        times=times,
        gradients=rows[1 : 1 + len(times)],
        order=int(order),
        proposed=float(proposed),
        step_size=float(group["step_size"]),
        n_rejected=int(n_rejected),
        restless=bool(restless),
        jump=float(jump),
    )


def write_multistep(optimizer: Optimizer, active: ActiveParameters, state: AdamsState, n_knots: int, owed: float) -> None:
    """Keep where a flow with one gradient per call stands, and the flow time that its calls were short of."""
    unused = state.theta.new_zeros(2 * n_knots - 1 - len(state.times), state.theta.numel())
    rows = torch.cat([state.theta[None], state.gradients, unused])
    columns = rows.split([shape.numel() for shape in active.layout.shapes], dim=1)
    for p, column in zip(active.tensors, columns, strict=True):
        optimizer.state[p]["knots"] = column.reshape(2 * n_knots, *p.shape).contiguous()
    numbers = [state.order, state.proposed, state.n_rejected, state.restless, state.jump]
    forget(optimizer, state.t, state.step_size)
    _write_numbers(
        optimizer, knot_times=list(state.times), multistep=[float(x) for x in numbers], owed=owed, moved_at=_speeds(optimizer)
    )


def forget(optimizer: Optimizer, flow_time: float, next_step_size: float | None = None) -> None:
    """Keep flow time and step size only: the next step starts anew."""
    known = step_size(optimizer) if next_step_size is None else next_step_size
    _write_numbers(
        optimizer,
        **{**copy.deepcopy(DEFAULTS), "flow_time": flow_time, "step_size": known or 0.0},
    )


def _states(optimizer: Optimizer, active: ActiveParameters, n_knots: int) -> list[dict[str, Any]] | None:
    """The state of each moving parameter, or None if others moved before, at other speeds, or by another method."""
    if optimizer.param_groups[0]["moved_at"] != _speeds(optimizer):
        return None
    states = [optimizer.state[p] for p in active.tensors]
    for state in states:
        if "slope" not in state or state["knots"].shape[0] != 2 * n_knots or state["knots"].dtype != active.layout.dtype:
            return None
    return states


def _write_numbers(optimizer: Optimizer, **numbers: Any) -> None:
    for group in optimizer.param_groups:
        group.update(numbers)


def _speeds(optimizer: Optimizer) -> list[float]:
    """The inverse time constant of each parameter tensor, 0 where it does not move."""
    reference = reference_lr(optimizer)
    return [float(g["lr"]) / reference if p.requires_grad else 0.0 for g in optimizer.param_groups for p in g["params"]]
