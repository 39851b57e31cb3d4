"""Many runs of one objective in lockstep in this process: who joins, who leaves, what each run records, whose fault an error is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.flow.bdf_batched import Integers, Runs, Step, try_step
from torch_gradflow.flow.control import Patience
from torch_gradflow.flow.ensemble_worker import Outcome, Settings, failed_at_once
from torch_gradflow.flow.integrate import FlowRun, tolerances
from torch_gradflow.flow.method import Arrival, RunEnd, RunStatus, Span, n_evaluations
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.interrupts import Interrupts

# Integrators whose steps can be taken together.
BATCHED = ("bdf",)
# Runs under way at once: with more, calls are hardly shared further, while Hessians leave the cache.
MAX_RUNS = 64
# Memory of the Hessians of a step.
HESSIAN_BYTES = 2**28


def follow_together(
    objective: Objective, starts: Iterable[tuple[int, Tensor]], settings: Settings, done: Callable[[int, Outcome], None]
) -> bool:
    """Do runs of one objective; a run that comes to its end makes room for the next one.

    What goes wrong in a run becomes a solution of status "failed"; at Ctrl-C those under way are "interrupted".

    Args:
        objective: L, for all.
        starts: Of each run its index and θ(t₀), shape ``(P,)``.
        settings: The rest; its method is one of ``BATCHED``.
        done: Called with the index and the outcome of each run that began.

    Returns:
        Whether all were done, and none interrupted.
    """
    batch = _Batch(objective, settings, done)
    waiting = deque(starts)
    size = 8 * objective.n_parameters**2
    capacity = max(1, min(MAX_RUNS, HESSIAN_BYTES // size))
    try:
        with Interrupts() as interrupts:
            while waiting or batch.members:
                interrupts.deliver()
                batch.admit([waiting.popleft() for _ in range(min(len(waiting), capacity - len(batch.members)))])
                batch.step()
    except KeyboardInterrupt:
        batch.interrupt()
        return False
    return True


class _Shared(Objective):
    """The objective of all runs, as one of them sees it: with counts of its own."""

    def __init__(self, objective: Objective) -> None:
        self.n_parameters, self.dtype, self.device = objective.n_parameters, objective.dtype, objective.device
        self.resolution, self.counts = objective.resolution, EvaluationCounts()
        self._objective = objective

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ)."""
        self.counts.n_grad += 1
        return self._objective.loss_and_gradient(theta)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """H(θ) V."""
        self.counts.n_hvp += vectors.shape[1] if vectors.dim() == 2 else 1
        return self._objective.hvp(theta, vectors)

    def hessian(self, theta: Tensor) -> Tensor:
        """H(θ)."""
        self.counts.n_hessian += 1
        return self._objective.hessian(theta)


@dataclass
class _Member:
    """A run that is under way.

    Attributes:
        index: Its place in the ensemble.
        run: What it records.
        counts: Its evaluations.
        limit: How many it may make.
        initial_loss: L at its start.
        knot: Its last accepted point.
        patience: With steps into regions without finite values.
        error: What an evaluation for it raised, or None.
        is_over: Whether it has come to its end.
    """

    index: int
    run: FlowRun
    counts: EvaluationCounts
    limit: float
    initial_loss: float
    knot: Knot
    patience: Patience
    error: Exception | None = None
    is_over: bool = False


class _Batch:
    """The runs that are under way, and where they stand.

    Args:
        objective: L.
        settings: What they have in common.
        done: Told the outcomes.

    Attributes:
        members: The runs.
    """

    def __init__(self, objective: Objective, settings: Settings, done: Callable[[int, Outcome], None]) -> None:
        self.members: list[_Member] = []
        self._objective, self._settings, self._done = objective, settings, done
        rtol, atol, _ = tolerances(settings.rtol, settings.atol, objective.resolution)
        self._span = Span(float(settings.t_span[1]), rtol, atol, settings.step_size)
        self._runs: Runs | None = None

    # Who joins, and who leaves.

    def admit(self, starts: Sequence[tuple[int, Tensor]]) -> None:
        """Begin runs, given by their index and θ(t₀) each."""
        joining = []
        for index, theta in starts:
            shared = _Shared(self._objective)
            try:
                run = self._settings.run(shared, theta)
            except Exception as error:
                self._done(index, failed_at_once(theta, self._settings, error))
                continue
            limit = n_evaluations(shared.counts) + (self._settings.max_evals or math.inf)
            patience = Patience(run.last.t)
            member = _Member(index, run, shared.counts, limit, float(run.last.loss), run.last, patience)
            self._try(member, partial(self._begin, member))
            if not member.is_over:
                joining.append(member)
        if joining:
            new = Runs.starting([member.knot for member in joining], self._span)
            self._runs = new if self._runs is None or not self.members else self._runs.joined(new)
            self.members += joining

    def _begin(self, member: _Member) -> None:
        if not member.run.begin():
            self._close(member)
        elif member.knot.t >= self._span.t_end:
            member.run.end(RunEnd("t_end", member.knot, self._span.step_size or 0.0, 0, 0))
            self._close(member)

    def interrupt(self) -> None:
        """End all at their last accepted points."""
        for member in self.members:
            if not member.is_over:
                self._try(member, member.run.interrupt)
                self._close(member)
        self.members = []

    def _try(self, member: _Member, action: Callable[[], object]) -> None:
        """Do something for a run, which fails alone if that raises an exception."""
        try:
            if member.error is not None:
                raise member.error
            action()
        except Exception as error:
            member.run.fail(error)
            self._close(member)

    def _close(self, member: _Member) -> None:
        if not member.is_over:
            member.is_over = True
            self._done(member.index, Outcome(member.run.solution(), member.initial_loss))

    def _leave(self) -> None:
        """Those that have ended make room."""
        if self._runs is None or not any(member.is_over for member in self.members):
            return
        staying = [place for place, member in enumerate(self.members) if not member.is_over]
        self.members = [self.members[place] for place in staying]
        self._runs = self._runs.chosen(np.array(staying, dtype=np.int64))

    # Their steps.

    def step(self) -> None:
        """Try a step of each run; those that cannot go on, or have come to their end, leave."""
        if self._runs is None:
            return
        for place in np.flatnonzero(self._runs.stuck()):
            member = self.members[place]
            status: RunStatus = "not finite" if math.isinf(self._runs.numbers["error"][place]) else "underflow"
            self._try(member, partial(self._end, member, place, status))
        for place, member in enumerate(self.members):
            if not member.is_over and n_evaluations(member.counts) >= member.limit:
                self._try(member, partial(self._end, member, place, "max_evals"))
        self._leave()
        if not self.members:
            return
        step = try_step(self._runs, self._span, self._hessians_at, self._gradients_at)
        self._runs = step.runs
        arrived, rejected = np.flatnonzero(step.accepted), np.flatnonzero(~step.accepted)
        self._arrive(step, arrived)
        for place in rejected:
            member = self.members[place]
            gives_up = math.isinf(step.runs.numbers["error"][place]) and member.patience.exhausted(float(step.runs.t[place]))
            if gives_up or member.error is not None:
                self._try(member, partial(self._end, member, place, "not finite"))
        self._leave()

    def _arrive(self, step: Step, places: Integers) -> None:
        """Tell those runs whose steps were accepted."""
        times, points, sizes = step.runs.t.tolist(), step.runs.theta[:, 0].clone().unbind(), step.runs.numbers["h"].tolist()
        orders, losses, gradients = step.runs.numbers["last_order"].tolist(), step.loss.unbind(), step.gradient.unbind()
        for place in places:
            self.members[place].knot = Knot(times[place], points[place], losses[place], gradients[place])
        exact = self._samples(step, [place for place in places if self.members[place].run.samples(times[place])])
        for place in places:
            member = self.members[place]
            if times[place] >= self._span.t_end:
                self._try(member, partial(self._end, member, place, "t_end"))
                continue
            interpolant = step.runs.interpolant(place)
            arrival = Arrival(member.knot, sizes[place], interpolant, True, self._settings.method, orders[place])
            self._try(member, partial(self._visit, member, place, arrival, exact.get(place)))

    def _samples(self, step: Step, places: list[int]) -> dict[int, Knot]:
        """The points of runs that keep them, with loss and gradient evaluated there, where these are finite."""
        if not places:
            return {}
        index = np.array(places, dtype=np.int64)
        points = step.runs.theta[torch.from_numpy(index).to(step.runs.theta.device), 0]
        losses, gradients = self._gradients_at(index, points)
        finite = (losses.isfinite() & gradients.isfinite().all(1)).tolist()
        knots = [self.members[place].knot for place in places]
        found = zip(places, knots, losses, gradients, finite, strict=True)
        return {i: replace(knot, loss=loss, gradient=gradient) if good else knot for i, knot, loss, gradient, good in found}

    def _visit(self, member: _Member, place: int, arrival: Arrival, exact: Knot | None) -> None:
        if member.run.visit(arrival, exact):
            self._end(member, place, "visit")

    def _end(self, member: _Member, place: int, status: RunStatus) -> None:
        """A run came to its end."""
        assert self._runs is not None
        numbers = self._runs.numbers[place]
        n_accepted = int(numbers["n_accepted"])
        end = RunEnd(
            status,
            member.knot,
            float(numbers["h"]),
            n_accepted,
            int(numbers["n_rejected"]),
            approximate=n_accepted > 0,
            interpolant=self._runs.interpolant(place) if n_accepted else None,
            order=int(numbers["last_order"]),
        )
        member.run.end(end)
        self._close(member)

    # Evaluations: many at once; one by one where one of them raises an exception.

    def _gradients_at(self, places: Integers, points: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = self._evaluated(places, points, self._objective.loss_and_gradient_many)
        return losses, gradients

    def _hessians_at(self, places: Integers, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, gradients, hessians = self._evaluated(places, points, self._objective.loss_gradient_hessian_many)
        return losses, gradients, hessians

    def _evaluated(
        self, places: Integers, points: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Values at points of these runs, counted for each."""
        before = astuple(self._objective.counts)
        members = [self.members[place] for place in places]
        try:
            found = evaluate(points)
        except Exception:
            found = self._one_by_one(members, points, evaluate)
        spent = [(now - then) // len(members) for now, then in zip(astuple(self._objective.counts), before, strict=True)]
        for member in members:
            counts = member.counts
            counts.n_grad += spent[0]
            counts.n_hvp += spent[1]
            counts.n_hessian += spent[2]
        return found

    def _one_by_one(
        self, members: list[_Member], points: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The same for one after the other, NaN for those that raise an exception, which is kept."""
        found: list[tuple[Tensor, ...] | None] = []
        for member, point in zip(members, points, strict=True):
            try:
                found.append(evaluate(point[None]))
            except Exception as error:
                member.error = error
                found.append(None)
        good = next((values for values in found if values is not None), None)
        if good is None:
            p = points.shape[1]
            good = (points.new_empty(1), points.new_empty(1, p), points.new_empty(1, p, p))
        parts = [tuple(torch.full_like(part, math.nan) for part in good) if values is None else values for values in found]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
