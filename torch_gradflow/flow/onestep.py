"""The run of a one-step method: attempts, acceptance, the next step size. What a step is, is the method's business."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.flow.control import CLOCK, Controller, Patience, first_step_size
from torch_gradflow.flow.method import (
    Arrival,
    FlowMethod,
    Memory,
    RunEnd,
    RunStatus,
    Span,
    Visit,
    approaches,
    n_evaluations,
)
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective


@dataclass(frozen=True)
class Trial:
    """A step that was tried.

    Attributes:
        theta: θ at its end, shape ``(P,)``.
        error: Its estimated error in units of the tolerance; ``inf`` if it is none.
        slope: L(θ) and ∇L(θ), where the estimate took them; else None.
    """

    theta: Tensor
    error: float
    slope: tuple[Tensor, Tensor] | None = None


class Stepper(ABC):
    """One run of a one-step method: what it keeps while it goes along (a factorisation, a spectral radius).

    Attributes:
        curvature: What it would have to remember besides ``numbers``, see ``Memory.curvature``.
    """

    curvature: Tensor | None = None

    @abstractmethod
    def attempt(self, here: Knot, step_size: float) -> Trial | float:
        """A step from ``here``; or, where it must not be as long, the longest one that may be tried instead."""

    @abstractmethod
    def numbers(self) -> tuple[float, ...]:
        """What it would have to remember to go on as if it had not been stopped."""


class OneStepMethod(FlowMethod):
    """A method whose step depends on one point only.

    Attributes:
        estimate: The local error of a step is taken to be of the order h^(estimate + 1).
    """

    estimate: int
    n_points = 1

    @abstractmethod
    def begin(self, objective: Objective, span: Span, numbers: tuple[float, ...]) -> Stepper:
        """A stepper, which goes on with the ``numbers`` of an earlier one, or () for none."""

    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """See ``FlowMethod``."""
        control = Controller(self.estimate + 1)
        kept: tuple[float, ...] = ()
        if memory is not None and memory.times[0] == start.t:
            previous, *rest = memory.numbers
            control, kept = Controller(self.estimate + 1, previous or None), tuple(rest)
        stepper = self.begin(objective, span, kept)
        stepper.curvature = memory.curvature if memory is not None and kept else None
        limit = n_evaluations(objective.counts) + span.max_evals
        h = span.step_size or first_step_size(
            start.theta, start.gradient, cap=span.t_end - start.t, rtol=span.rtol, atol=span.atol
        )
        here, n_accepted, n_rejected, error = start, 0, 0, 0.0
        status: RunStatus | None = "t_end" if span.t_end <= start.t else None
        patience = Patience(start.t)
        while status is None:
            if n_evaluations(objective.counts) >= limit:
                status = "max_evals"
                break
            tried = min(approaches(here.t, h, span.t_end), span.max_step)
            if here.t + tried == here.t or tried <= CLOCK * abs(here.t) or tried < 1e-300:
                status = "not finite" if math.isinf(error) else "underflow"
                break
            trial = stepper.attempt(here, tried)
            if isinstance(trial, float):
                h = trial
                n_rejected += 1
                continue
            point = self._arrive(objective, trial, span.t_end if tried == span.t_end - here.t else here.t + tried)
            # A step that is accurate enough, but ends where L is not finite, is no better than one without an end.
            error = trial.error if point is not None or not trial.error <= 1 else math.inf
            if point is None or not error <= 1:
                factor, control = control.rejected(error)
                h = tried * factor
                n_rejected += 1
                if math.isinf(error) and patience.exhausted(here.t):
                    status = "not finite"
                continue
            factor, control = control.accepted(error)
            # A step that was cut to end somewhere says nothing against the step size that was wanted.
            h = max(h, tried * factor) if tried < h else tried * factor
            here = point
            n_accepted += 1
            if here.t >= span.t_end:
                status = "t_end"
            elif visit(self._arrival(here, h, control, stepper)):
                status = "visit"
        return RunEnd(status, here, h, n_accepted, n_rejected, memory=_remember(here, control, stepper), order=self.order)

    def _arrive(self, objective: Objective, trial: Trial, t: float) -> Knot | None:
        """The end of a step whose error is small enough, with its gradient; None if that is not finite."""
        if not trial.error <= 1:
            return None
        loss, gradient = trial.slope or objective.loss_and_gradient(trial.theta)
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
            return None
        return Knot(t, trial.theta, loss, gradient)

    def _arrival(self, here: Knot, step_size: float, control: Controller, stepper: Stepper) -> Arrival:
        return Arrival(here, step_size, None, False, self.name, self.order, lambda: _remember(here, control, stepper))


def _remember(here: Knot, control: Controller, stepper: Stepper) -> Memory:
    numbers = (control.previous or 0.0, *stepper.numbers())
    return Memory((here.t,), here.theta[None], 0, stepper.curvature, numbers)
