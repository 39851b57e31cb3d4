"""What a flow carries from one optimizer step to the next, kept where torch keeps an optimizer's state.

Tensors stand in ``optimizer.state[parameter]`` in the parameter's shape (so checkpoints of any kind know them): "theta", where
the last step left the parameter, in the type in which the flow is computed; "slope", the gradient to be expected at the next
step if nothing changes; "knots", the accepted points around and ahead of the present, θ first, then gradients; and for methods
with a memory "points", the accepted points that it holds, and "curvature", what it knows of the Hessian (of each row of
length P the parameter's own part). Plain numbers stand in the parameter groups, the same in each. All of it is in the
coordinates φ = θ/√d of the flow. While the flow advances with one gradient per call (``flow.stepwise``), "stepwise" holds its
rows, and "theta" is the proposal that stands in the parameters. Nothing is held anywhere else: a resumed flow continues
bit for bit.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_gradflow.flow import stepwise
from torch_gradflow.flow.adams import Packed
from torch_gradflow.flow.continuation import Continuation
from torch_gradflow.flow.dense import Clock, HermiteWindow
from torch_gradflow.flow.method import FlowMethod, Memory
from torch_gradflow.flow.solution import Knot
from torch_gradflow.flow.stepwise import StepwiseState
from torch_gradflow.optim.closure_optimizer import ActiveParameters

DEFAULTS: dict[str, Any] = {
    "flow_time": 0.0,
    "step_size": 0.0,
    "expected_loss": math.nan,
    "knot_times": [],
    "memory": [],
    "seen": 0,
    "moved_at": [],
    "stepwise": [],
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


def initialise(optimizer: Optimizer, method: FlowMethod, dtype: torch.dtype) -> None:
    """Give each parameter that requires gradients the entries that it will have after a step."""
    moving = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in moving:
        if not optimizer.state[p]:
            rows = {"knots": 2 * method.n_knots, "points": method.n_points}
            optimizer.state[p] = {
                "theta": p.detach().to(dtype, copy=True),
                "slope": torch.zeros_like(p, dtype=dtype),
                **{name: torch.zeros(n, *p.shape, dtype=dtype, device=p.device) for name, n in rows.items() if n},
            }


def read(optimizer: Optimizer, active: ActiveParameters, method: FlowMethod) -> Carried | None:
    """What the last step left, or None if there is nothing, or if other parameters move now, or at other speeds."""
    group, states = optimizer.param_groups[0], _states(optimizer, active, method)
    if states is None or math.isnan(group["expected_loss"]):
        return None
    layout, t = active.layout, float(group["flow_time"])
    loss = torch.tensor(group["expected_loss"], dtype=layout.dtype, device=layout.device)
    # θ itself is in the parameters; the caller puts it in.
    here = Knot(t, layout.flatten(active.tensors), loss, layout.flatten([s["slope"] for s in states]))
    window = None
    if group["knot_times"]:
        n, knots = len(group["knot_times"]), _gather(states, "knots")
        window = HermiteWindow(tuple(group["knot_times"]), knots[:n], knots[n : 2 * n])
    return Carried(Continuation(here, step_size(optimizer), window, _read_memory(group, states)), int(group["seen"]))


def _read_memory(group: dict[str, Any], states: list[dict[str, Any]]) -> Memory | None:
    if not group["memory"]:
        return None
    n_times, degree, n_rows, origin, unit, *rest = group["memory"]
    times, numbers = rest[: int(n_times)], rest[int(n_times) :]
    return Memory(
        tuple(times),
        _gather(states, "points")[: len(times)],
        int(degree),
        # A checkpoint loaded into a state that was made beforehand may lack it: it is found anew then.
        _gather(states, "curvature") if n_rows and all("curvature" in s for s in states) else None,
        tuple(numbers),
        Clock(origin, unit) if unit else None,
    )


def _write_memory(optimizer: Optimizer, active: ActiveParameters, method: FlowMethod, memory: Memory) -> list[float]:
    """The rows into the states; the numbers are returned."""
    n_rows = 0 if memory.curvature is None else memory.curvature.shape[0]
    _scatter(optimizer, active, "points", memory.theta, method.n_points)
    if memory.curvature is not None:
        _scatter(optimizer, active, "curvature", memory.curvature, n_rows)
    clock = (0.0, 0.0) if memory.clock is None else (memory.clock.origin, memory.clock.unit)
    return [float(x) for x in (len(memory.times), memory.degree, n_rows, *clock, *memory.times, *memory.numbers)]


def _gather(states: list[dict[str, Any]], name: str) -> Tensor:
    """Rows of length P from the parameters' parts."""
    return torch.cat([s[name].reshape(s[name].shape[0], -1) for s in states], dim=1)


def _scatter(optimizer: Optimizer, active: ActiveParameters, name: str, rows: Tensor, n_rows: int) -> None:
    """The inverse of ``_gather``; rows that are missing up to ``n_rows`` are zero."""
    missing = rows.new_zeros(max(0, n_rows - rows.shape[0]), rows.shape[1])
    columns = torch.cat([rows, missing]).split([shape.numel() for shape in active.layout.shapes], dim=1)
    for p, column in zip(active.tensors, columns, strict=True):
        optimizer.state[p][name] = column.reshape(column.shape[0], *p.shape).contiguous()


def write(optimizer: Optimizer, active: ActiveParameters, method: FlowMethod, state: Continuation, seen: int) -> None:
    """Keep where the flow stands for the next step."""
    layout, window, memory = active.layout, state.window, state.memory
    for p, slope in zip(active.tensors, layout.split(state.here.gradient), strict=True):
        optimizer.state[p]["slope"] = slope.clone()
        optimizer.state[p].pop("stepwise", None)
    if window is not None:
        _scatter(optimizer, active, "knots", torch.cat([window.theta, window.gradient]), 2 * method.n_knots)
    _write_numbers(
        optimizer,
        flow_time=state.here.t,
        step_size=state.step_size or 0.0,
        expected_loss=float(state.here.loss),
        knot_times=[] if window is None else list(window.times),
        memory=[] if memory is None else _write_memory(optimizer, active, method, memory),
        seen=seen,
        moved_at=_speeds(optimizer),
        stepwise=[],
        owed=0.0,
    )


def read_stepwise(
    optimizer: Optimizer, active: ActiveParameters, method: FlowMethod, *, rtol: float, atol: float
) -> StepwiseState | None:
    """Where a flow with one gradient per call stands, or None; the same conditions as for ``read``."""
    group, states = optimizer.param_groups[0], _states(optimizer, active, method)
    # A checkpoint loaded into a state that was made beforehand may lack it: the flow begins anew then.
    if states is None or not group["stepwise"] or any("stepwise" not in s for s in states):
        return None
    name, n_times, *rest = group["stepwise"]
    packed = Packed(tuple(rest[: int(n_times)]), _gather(states, "stepwise"), tuple(rest[int(n_times) :]))
    return stepwise.unpack(stepwise.NAMES[int(name)], packed, rtol=rtol, atol=atol)


def write_stepwise(optimizer: Optimizer, active: ActiveParameters, state: StepwiseState, owed: float) -> None:
    """Keep where a flow with one gradient per call stands, and the flow time that its calls were short of."""
    forget(optimizer, state.t, state.step_size)
    packed = stepwise.pack(state)
    _scatter(optimizer, active, "stepwise", packed.rows, len(packed.rows))
    numbers = [stepwise.NAMES.index(stepwise.name_of(state)), len(packed.times), *packed.times, *packed.numbers]
    _write_numbers(optimizer, stepwise=[float(x) for x in numbers], owed=owed, moved_at=_speeds(optimizer))


def forget(optimizer: Optimizer, flow_time: float, next_step_size: float | None = None) -> None:
    """Keep flow time and step size only: the next step starts anew."""
    known = step_size(optimizer) if next_step_size is None else next_step_size
    for state in optimizer.state.values():
        state.pop("stepwise", None)
    _write_numbers(
        optimizer,
        **{**copy.deepcopy(DEFAULTS), "flow_time": flow_time, "step_size": known or 0.0},
    )


def _states(optimizer: Optimizer, active: ActiveParameters, method: FlowMethod) -> list[dict[str, Any]] | None:
    """The state of each moving parameter, or None if others moved before, at other speeds, or by another method."""
    if optimizer.param_groups[0]["moved_at"] != _speeds(optimizer):
        return None
    states = [optimizer.state[p] for p in active.tensors]
    for state in states:
        knots = state["knots"].shape[0] if "knots" in state else 0
        if "slope" not in state or knots != 2 * method.n_knots or state["slope"].dtype != active.layout.dtype:
            return None
    return states


def _write_numbers(optimizer: Optimizer, **numbers: Any) -> None:
    for group in optimizer.param_groups:
        group.update(numbers)


def _speeds(optimizer: Optimizer) -> list[float]:
    """The inverse time constant of each parameter tensor, 0 where it does not move."""
    reference = reference_lr(optimizer)
    return [float(g["lr"]) / reference if p.requires_grad else 0.0 for g in optimizer.param_groups for p in g["params"]]
