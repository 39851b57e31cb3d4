"""Many runs of one objective in lockstep in this process: who joins and leaves, what each is told, whose fault an error is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
# They are joined by others when so much of the batch is free: one by one, each would cost all of them a copy.
ROOM = 0.125
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
                room = min(len(waiting), capacity - len(batch.members))
                if room >= ROOM * capacity or not batch.members:
                    batch.admit([waiting.popleft() for _ in range(room)])
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
            self._try(member, self._begin, member)
            if member.is_over:
                self._tell(member)
            else:
                joining.append(member)
        if joining:
            new = Runs.starting([member.knot for member in joining], self._span)
            self._runs = new if self._runs is None or not self.members else self._runs.joined(new)
            self.members += joining

    def _begin(self, member: _Member) -> None:
        if not member.run.begin():
            member.is_over = True
        elif member.knot.t >= self._span.t_end:
            member.run.end(RunEnd("t_end", member.knot, self._span.step_size or 0.0, 0, 0))
            member.is_over = True

    def interrupt(self) -> None:
        """End all at their last accepted points."""
        members, self.members = self.members, []
        for member in members:
            if not member.is_over:
                self._try(member, member.run.interrupt)
            self._tell(member)

    def _try(self, member: _Member, action: Callable[..., object], *arguments: object) -> None:
        """Do something for a run, which fails alone if that, or an evaluation before, raised an exception."""
        try:
            if member.error is not None:
                raise member.error
            action(*arguments)
        except Exception as error:
            member.run.fail(error)
            member.is_over = True

    def _tell(self, member: _Member) -> None:
        self._done(member.index, Outcome(member.run.solution(), member.initial_loss))

    def _make_room(self) -> None:
        """Those that have come to their end leave."""
        over = [member for member in self.members if member.is_over]
        if over and self._runs is not None:
            staying = [place for place, member in enumerate(self.members) if not member.is_over]
            self.members = [self.members[place] for place in staying]
            self._runs = self._runs.chosen(np.array(staying, dtype=np.int64))
        for member in over:
            self._tell(member)

    # Their steps.

    def step(self) -> None:
        """Try a step of each run; those that cannot go on, or have come to their end, leave."""
        if self._runs is None:
            return
        for place in np.flatnonzero(self._runs.stuck()).tolist():
            endless = math.isinf(self._runs.numbers["error"][place])
            self._try(self.members[place], self._end, place, "not finite" if endless else "underflow")
        if self._settings.max_evals is not None:
            for place, member in enumerate(self.members):
                if n_evaluations(member.counts) >= member.limit and not member.is_over:
                    self._try(member, self._end, place, "max_evals")
        self._make_room()
        if not self.members:
            return
        step = try_step(self._runs, self._span, self._hessians_at, self._gradients_at)
        self._runs = step.runs
        self._arrive(step, np.flatnonzero(step.accepted).tolist())
        self._retry(step.runs, np.flatnonzero(~step.accepted).tolist())
        self._make_room()

    def _arrive(self, step: Step, places: list[int]) -> None:
        """Tell those runs whose steps were accepted."""
        runs, t_end = step.runs, self._span.t_end
        times, sizes, orders = runs.t.tolist(), runs.numbers["h"].tolist(), runs.numbers["last_order"].tolist()
        points, losses, gradients = runs.theta[:, 0].clone().unbind(), step.loss.unbind(), step.gradient.unbind()
        energies = step.energy.tolist()
        visited, kept, passed = [], [], []
        for place in places:
            member, t = self.members[place], times[place]
            member.knot = Knot(t, points[place], losses[place], gradients[place])
            if member.error is not None or t >= t_end:
                self._try(member, self._end, place, "t_end")
            elif member.run.looks_at(t):
                visited.append(place)
            elif member.run.samples(t):
                kept.append(place)
            else:
                passed.append((place, None))
        for place, exact in [*passed, *self._exact(kept)]:
            member = self.members[place]
            member.run.passes(member.knot, sizes[place], orders[place], (times[place], *energies[place]), exact)
        for place in visited:
            knot, between = self.members[place].knot, partial(runs.between, place)
            arrival = Arrival(knot, sizes[place], between, True, self._settings.method, orders[place])
            self._try(self.members[place], self._visit, place, arrival)

    def _exact(self, places: list[int]) -> Iterator[tuple[int, Knot]]:
        """The last points of these runs with loss and gradient evaluated there, where these are finite."""
        if not places:
            return
        points = torch.stack([self.members[place].knot.theta for place in places])
        losses, gradients = self._gradients_at(np.array(places), points)
        finite = (losses + gradients.sum(1)).isfinite().tolist()
        rows = zip(places, points.unbind(), losses.unbind(), gradients.unbind(), finite, strict=True)
        for place, point, loss, gradient, is_finite in rows:
            knot = self.members[place].knot
            yield place, Knot(knot.t, point, loss, gradient) if is_finite else knot

    def _visit(self, place: int, arrival: Arrival) -> None:
        if self.members[place].run.visit(arrival):
            self._end(place, "visit")

    def _retry(self, runs: Runs, places: list[int]) -> None:
        """Those whose steps were rejected try again, shorter, unless that has no end."""
        for place in places:
            member = self.members[place]
            endless = math.isinf(runs.numbers["error"][place])
            if member.error is not None or (endless and member.patience.exhausted(float(runs.t[place]))):
                self._try(member, self._end, place, "not finite")

    def _end(self, place: int, status: RunStatus) -> None:
        """A run came to its end."""
        assert self._runs is not None
        member, numbers = self.members[place], self._runs.numbers[place]
        n_accepted = int(numbers["n_accepted"])
        end = RunEnd(
            status,
            member.knot,
            float(numbers["h"]),
            n_accepted,
            int(numbers["n_rejected"]),
            approximate=n_accepted > 0,
            interpolant=partial(self._runs.between, place) if n_accepted else None,
            order=int(numbers["last_order"]),
        )
        member.run.end(end)
        member.is_over = True

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
        counts = self._objective.counts
        before = counts.n_grad, counts.n_hvp, counts.n_hessian
        members = [self.members[place] for place in places]
        try:
            found = evaluate(points)
        except Exception:
            found = self._one_by_one(members, points, evaluate)
        after = counts.n_grad, counts.n_hvp, counts.n_hessian
        n_grad, n_hvp, n_hessian = ((now - then) // len(members) for now, then in zip(after, before, strict=True))
        for member in members:
            member.counts.n_grad += n_grad
            member.counts.n_hvp += n_hvp
            member.counts.n_hessian += n_hessian
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
