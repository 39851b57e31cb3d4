"""The method that chooses: by measured costs, by what each method makes of this flow, and again while the flow changes.

A few explicit steps come first. Then backward differentiation is in charge, in the way (dense, by conjugate gradients, by
secants) whose steps are expected to cost least, as they cost what they cost anywhere: so many gradients, products, Hessians
and factorisations, each measured. Where another way is found to cost less, it goes on. Where the gradient is not smooth, as
six gradients tell at the start, explicit Chebyshev steps are in charge instead: smoothness is what high orders live on.

Whether other kinds of steps pay (exponential ones at saddles; Chebyshev ones where they cost less, or where backward
differentiation is in trouble) cannot be read off a point, but tried: now and then another method takes a few steps, and the
one that pays less per unit of logarithmic time goes on. Trials are not lost, as all methods continue from the same accepted
points, those with a memory through the points that others accepted; but a multistep method has to find its step and order
again after one. So trials must be worth it: each method's may only take a small share of what is spent, less if it lost
before, and methods whose steps cost more than they can be longer are not tried.

Costs are the counts times what was measured (seconds per gradient, product, Hessian and factorisation), once for objectives
of one kind in one process: there, and where a flow is resumed, choices are the same each time. In another process they may
differ where two methods are about equal, and with them the solution, within the tolerance. Where that matters, name a method,
or call ``torch.use_deterministic_algorithms(True)``: costs are then nominal, those of a small perceptron.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.flow.continuation import replace_gradient
from torch_gradflow.flow.costs import PRODUCT_CALL, Costs, differentiations, secant_arithmetic
from torch_gradflow.flow.dense import Clock
from torch_gradflow.flow.method import Arrival, Derivative, FlowMethod, Memory, RunEnd, Span, Visit, n_evaluations
from torch_gradflow.flow.multistep import MAX_POINTS
from torch_gradflow.flow.roughness import is_rough
from torch_gradflow.flow.solution import Choice, Knot
from torch_gradflow.objectives.base import DerivativeError, Objective

# The method of the first steps: it needs nothing but gradients. Backward differentiation of order 4 can go on from so many.
FIRST, FIRST_STEPS = "dopri5", 5
# The method for gradients that are not smooth. On 2-8-1 with ReLU (seeds 1–3) it took between 0.85 and 1.4 times as many
# gradients as "bdf-secant" to an error of 10⁻³, and less than that to 3 × 10⁻⁴; "dopri5" was up to six times less accurate.
ROUGH = "rkc2"
# Methods whose steps the largest curvature limits, not accuracy.
STABILITY_LIMITED = ("dopri5", "rkc2")
# Accepted steps of a trial, and how many of them are left out of its judgement while a method finds its order and step.
TRIAL, WARM_UP = {True: 18, False: 5}, {True: 12, False: 2}
# What trials of a method may take of all that others spend meanwhile: at any time; of exponential steps while the gradient
# grows; of any while backward differentiation is in trouble; and of backward differentiation, which soon pays where it does
# not yet.
SHARE, SHARE_GROWING, SHARE_TROUBLE, SHARE_STIFF = 0.03, 0.15, 0.25, 0.1
# A method that lost waits twice as long, or as many times as long as it paid more, but at most so many times.
MAX_BACKOFF = 8.0
# A trial ends early where it takes this many times what was expected.
HOPELESS = 2.0
# While backward differentiation goes well, these are tried where one of their steps costs no more than so many of its own: few
# are that much longer. (On T33, with 2.6, trials of "exprb53" and finding the step again after them took 5 to 10 % of a flow.)
LONGER = {"exprb53": 2.0, "rkc2": 1.0}
# A one-step method takes over if it pays less than this fraction of what the one in charge pays; exponential steps where the
# gradient does not grow only below the second: what they gain in curved valleys does not last. Backward differentiation may
# pay a little more than a one-step method: its trial begins on foreign points, and it gets better.
TAKE_OVER, STRICT, LENIENT = 0.7, 0.6, 1.2
# One way of backward differentiation takes over from another that takes so many times what it is expected to take itself.
DEARER = 1.3
# The gradient grows (negative curvature along the flow: a saddle is being left) if it did so in most of the last five steps.
GROWING, FORGETTING = 2.8, 0.8
# Backward differentiation is in trouble, by modes that grow or a loss that is not smooth, where over its last (about fifteen)
# steps so much comes together: a rejection counts as two, an order of 1 or 2, which smooth flows soon leave, as one.
TROUBLE, REMEMBERED, REJECTION, LOW_ORDER = 8.0, 0.93, 2.0, 2
# Gradients per step of "rkc2": for a step as long as those of ``FIRST``, which stability allows (√(3.3/0.65) at its boundary;
# with longer ones they grow by the root), and at least.
RKC2_GRADIENTS, RKC2_LEAST = 2.3, 4.0
# A method that took so many steps lately is known to cost what these took.
SERVED = 2.5
# The first step of backward differentiation, in those of ``FIRST``: near the stability boundary of these, polynomials through
# their points are noisy. And where it comes back to points that another method took, in what it would have been.
HANDED_OVER, RESUMED = 0.1, 0.5
# Steps that a multistep method in charge takes before others may try: it begins with short ones of low order.
SETTLE = 40
# The flow ends where so many methods could not go on.
ENOUGH = 3
# How much the latest step counts in what is paid.
LATEST = 0.05


@dataclass
class _Entrant:
    """What is known of one method in the race.

    Attributes:
        method: The method.
        backoff: How many times as long as at first it waits for its next trial, because it lost.
        since: What others spent since its last one.
        paid: What its latest steps took, an exponential average.
        gained: The logarithmic time that they gained, in the same average.
        n_steps: How many they are, in the same average.
        step_size: What its controller wanted next.
        seen: When that was, in flow time; 0.0 if never.
        memory: What it left when it served last.
    """

    method: FlowMethod
    backoff: float = 1.0
    since: float = 0.0
    paid: float = 0.0
    gained: float = 0.0
    n_steps: float = 0.0
    step_size: float = 0.0
    seen: float = 0.0
    memory: Memory | None = None

    @property
    def rate(self) -> float:
        """Cost per logarithmic time."""
        return self.paid / self.gained if self.gained else math.inf

    def note(self, paid: float, gained: float) -> None:
        """A step."""
        keep = 1 - LATEST
        self.paid, self.gained = keep * self.paid + paid, keep * self.gained + gained
        self.n_steps = keep * self.n_steps + 1

    def numbers(self) -> tuple[float, ...]:
        """All but the method and its memory."""
        return self.backoff, self.since, self.paid, self.gained, self.n_steps, self.step_size, self.seen


class Auto(FlowMethod):
    """See the module.

    Args:
        methods: Those that may serve, by name; ``FIRST`` is one of them.
    """

    name = "auto"
    order = 6
    needs: Derivative = "hessian"
    n_knots = 3
    n_points = MAX_POINTS

    def __init__(self, methods: Mapping[str, FlowMethod]) -> None:
        self._methods = dict(methods)
        self._measured: dict[tuple[Any, ...], Costs] = {}

    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """See ``FlowMethod``."""
        return _Race(self._methods, self._costs, objective, start, span, visit, memory).run()

    def _costs(self, objective: Objective, theta: Tensor) -> Costs:
        """What calls of objectives of this kind take, measured once: two runs of one problem make the same choices."""
        if torch.are_deterministic_algorithms_enabled():
            return Costs.nominal(objective.n_parameters)
        key = (*objective.kind(), torch.get_num_threads())
        if key not in self._measured:
            self._measured[key] = Costs.measure(objective, theta)
        return self._measured[key]


class _Race:
    """One run of "auto"."""

    def __init__(
        self,
        methods: dict[str, FlowMethod],
        costs: Callable[[Objective, Tensor], Costs],
        objective: Objective,
        start: Knot,
        span: Span,
        visit: Visit,
        memory: Memory | None,
    ) -> None:
        self._objective, self._span, self._visit, self._measure = objective, span, visit, costs
        self._knot, self._approximate = start, False
        self._entrants = {name: _Entrant(method) for name, method in methods.items()}
        self._entrants[FIRST].step_size = span.step_size or 0.0
        self._limit = n_evaluations(objective.counts) + span.max_evals
        self._counts = replace(objective.counts)
        self._costs: Costs | None = None
        # What a step of backward differentiation is expected to cost in each of its ways, the cheapest first.
        self._ways: dict[str, float] = {}
        # Steps of this length are known to be stable; whether the gradient is not smooth.
        self._stable, self._rough = 0.0, False
        self._charge = self._current = FIRST
        self._n_trial = self._n_steps = self._n_in_charge = 0
        self._times: tuple[float, ...] = (start.t,)
        self._theta = start.theta[None]
        self._origin, self._unit = start.t, 0.0
        # Methods that could not go on hereabouts.
        self._failed: set[str] = set()
        self._failed_at = -math.inf
        self._trouble = self._growth = self._size = 0.0
        self._n_accepted = self._n_rejected = 0
        self._stop = False
        reason = "explicit steps at the start"
        if memory is not None and memory.times[0] == start.t:
            self._recall(memory)
            reason = "as before"
        elif ROUGH in methods and not self._is_short() and is_rough(objective, start.theta, start.gradient):
            self._charge = self._current = ROUGH
            self._rough = True
            reason = "the gradient is not smooth"
        self._choices = [Choice(start.t, self._current, reason)]

    def _is_short(self) -> bool:
        """Whether the first steps are known to reach the end, as with mini-batches in a loop: nothing will be chosen then."""
        return self._span.t_end - self._origin <= FIRST_STEPS * (self._span.step_size or 0.0)

    def run(self) -> RunEnd:
        """Bouts of one method after the other."""
        while True:
            try:
                end = self._bout()
            except DerivativeError:
                if self._entrants[self._current].method.needs == "gradient":
                    raise
                self._drop_out()
                continue
            self._n_accepted += end.n_accepted
            self._n_rejected += end.n_rejected
            self._knot, self._approximate = end.knot, end.approximate
            if end.status == "t_end":
                self._entrants[self._current].memory = end.memory
                self._note(end.knot, end.order)
            elif end.status != "visit" and not self._recovers(end):
                return self._end(end)
            if end.status == "t_end" or self._stop:
                return self._end(end)

    def _bout(self) -> RunEnd:
        """The current method, until another one is to take a step."""
        entrant, bout, on_trial = self._entrants[self._current], self._current, bool(self._n_trial)
        multistep = entrant.method.n_points > 1
        if self._approximate and not multistep:
            self._knot, self._approximate = replace_gradient(self._knot, self._objective), False
        evaluations = self._limit - n_evaluations(self._objective.counts)
        if self._n_trial and self._costs is not None:
            evaluations = min(evaluations, max(20.0, HOPELESS * self._price(self._current) / self._costs.gradient))
        step_size = entrant.step_size or self._entrants[self._charge].step_size
        if entrant.seen and entrant.step_size and self._current not in STABILITY_LIMITED:
            # Where accuracy limits steps, they grow with the flow's own time while others serve.
            step_size *= (self._times[0] - self._origin + self._unit) / (entrant.seen - self._origin + self._unit)
        if multistep and (entrant.memory is None or entrant.memory.times[0] != self._times[0]):
            step_size = RESUMED * step_size or HANDED_OVER * self._entrants[FIRST].step_size
        span = replace(self._span, step_size=step_size or None, max_evals=evaluations)

        def visit(arrival: Arrival) -> bool:
            self._knot, self._approximate = arrival.knot, arrival.approximate
            self._note(arrival.knot, arrival.order)
            entrant.step_size, entrant.seen = arrival.step_size, arrival.knot.t
            entrant.memory = arrival.remember()
            self._decide()
            self._stop = self._visit(replace(arrival, remember=self._remember))
            return self._stop or self._current != bout or (on_trial and not self._n_trial)

        return entrant.method.run(self._objective, self._knot, span, visit, self._memory_for(self._current))

    def _note(self, knot: Knot, order: int) -> None:
        """An accepted point, and what it took."""
        if knot.t - self._failed_at > 1e-3 * (knot.t - self._origin):
            self._failed.clear()
        gained = self._log(knot.t) - self._log(self._times[0])
        self._times = (knot.t, *self._times[: MAX_POINTS - 1])
        self._theta = torch.cat([knot.theta[None], self._theta[: MAX_POINTS - 1]])
        self._n_steps += 1
        self._note_growth(knot.gradient)
        counts, before = self._objective.counts, self._counts
        if self._current in self._ways:
            rejected = self._current == "bdf" and counts.n_hessian - before.n_hessian > 1
            self._trouble = REMEMBERED * self._trouble + REJECTION * rejected + (order <= LOW_ORDER)
        paid = self._spent()
        entrant = self._entrants[self._current]
        if not self._n_trial or self._n_trial > WARM_UP[entrant.method.n_points > 1]:
            entrant.note(paid, gained)
        for name, other in self._entrants.items():
            if name != self._current:
                other.since += paid

    def _spent(self) -> float:
        counts, before = self._objective.counts, self._counts
        self._counts = replace(counts)
        if self._costs is None:
            return float(counts.n_grad - before.n_grad)
        spent = self._costs.of(counts, before, self._costs.factorisation(self._current))
        if self._current == "bdf-secant":
            spent += (counts.n_grad - before.n_grad) * secant_arithmetic(self._objective.n_parameters)
        return spent + (counts.n_hvp - before.n_hvp) * PRODUCT_CALL

    def _log(self, t: float) -> float:
        return math.log1p((t - self._origin) / self._unit) if self._unit else 0.0

    def _decide(self) -> None:
        """Who takes the next step."""
        if self._costs is None:
            if self._n_steps >= FIRST_STEPS:
                self._open()
            return
        entrant, charge = self._entrants[self._current], self._entrants[self._charge]
        if self._n_trial:
            self._n_trial += 1
            if self._n_trial <= TRIAL[entrant.method.n_points > 1]:
                return
            if entrant.rate < self._threshold() * charge.rate:
                self._win()
            else:
                self._lose()
            return
        self._n_in_charge += 1
        if self._charge in self._ways and self._trouble <= TROUBLE and (self._n_in_charge < SETTLE or self._is_dearer()):
            return
        due = [name for name in self._entrants if self._is_due(name)]
        if due:
            self._try(min(due, key=self._price))

    def _is_dearer(self) -> bool:
        """Whether another way of backward differentiation is expected to take much less; it takes over without a trial."""
        way = min(self._ways, key=self._step_cost)
        ratio = self._step_cost(self._charge) / self._step_cost(way)
        if ratio > DEARER:
            self._entrants[way].step_size, self._entrants[way].seen = self._entrants[self._charge].step_size, self._times[0]
            reason = f"its steps are expected to take {1 / ratio:.2f} times what those of {self._charge} do"
            self._charge = self._current = way
            self._n_in_charge = 0
            self._choices.append(Choice(self._times[0], way, reason))
        return ratio > DEARER

    def _is_due(self, name: str) -> bool:
        """Whether it is time for a trial: others spent enough, and its steps may be worth what they cost."""
        entrant, share, longer = self._entrants[name], SHARE, math.inf
        if name in (FIRST, self._charge) or not math.isfinite(self._price(name)):
            return False
        if name in self._ways:
            if self._charge in self._ways or name != min(self._ways, key=self._promise):
                return False
            share = SHARE_STIFF
        elif self._charge in self._ways and self._trouble > TROUBLE:
            share = SHARE_TROUBLE
        elif self._charge in self._ways:
            longer = LONGER[name]
            share = SHARE_GROWING if name == "exprb53" and self._growth > GROWING else SHARE
        # It may have lost to what the method in charge no longer does.
        backoff = 1.0 if entrant.rate < self._entrants[self._charge].rate else entrant.backoff
        fits = self._step_cost(name) <= longer * self._step_cost(self._charge)
        return fits and entrant.since * share >= backoff * self._price(name)

    def _promise(self, name: str) -> tuple[float, float]:
        """By which the ways of backward differentiation are tried: those that were not, then those that paid less."""
        entrant = self._entrants[name]
        return (entrant.rate if entrant.n_steps > SERVED else 0.0), self._step_cost(name)

    def _step_cost(self, name: str) -> float:
        """Of one step: as measured where the method served, else as expected."""
        entrant, costs = self._entrants[name], self._costs
        assert costs is not None
        if entrant.n_steps > SERVED:
            return entrant.paid / entrant.n_steps
        if name == "exprb53":
            return costs.hessian + costs.eigh + 2 * costs.gradient
        if name == "rkc2":
            longer = self._entrants[self._charge].step_size / self._stable
            return costs.gradient * max(RKC2_LEAST, RKC2_GRADIENTS * math.sqrt(longer))
        return 6 * costs.gradient if name == FIRST else self._ways.get(name, math.inf)

    def _price(self, name: str) -> float:
        """What a trial is expected to cost; ``inf`` for what is not possible."""
        price = TRIAL[self._entrants[name].method.n_points > 1] * self._step_cost(name)
        return math.inf if math.isnan(price) else price

    def _threshold(self) -> float:
        """At which fraction of what is paid now the method on trial takes over."""
        if self._current in self._ways and not self._rough:
            return LENIENT
        return STRICT if self._current == "exprb53" and self._growth <= GROWING else TAKE_OVER

    def _note_growth(self, gradient: Tensor) -> None:
        """Whether the gradient grows."""
        size = float(torch.linalg.vector_norm(gradient))
        self._growth = FORGETTING * self._growth + (size > self._size > 0)
        self._size = size

    def _open(self) -> None:
        """The first steps are done: measure, and choose."""
        self._expect(self._measure(self._objective, self._theta[0]))
        assert self._costs is not None
        self._counts = replace(self._objective.counts)
        self._unit = max(self._times[0] - self._origin, 1e-300) / 4
        self._stable = self._times[0] - self._times[1] if len(self._times) > 1 else self._unit
        # What the first steps took, in the units in which others are measured.
        for entrant in self._entrants.values():
            entrant.since *= self._costs.gradient
            entrant.paid = entrant.gained = entrant.n_steps = 0.0
        for newer, older in pairwise(self._times[:6]):
            self._entrants[FIRST].note(6 * self._costs.gradient, self._log(newer) - self._log(older))
        if self._rough:
            return
        # Backward differentiation may not pay yet, but stiffness comes, and what it begins early it goes on with.
        self._charge = self._current = next(iter(self._ways), self._charge)
        listed = ", ".join(f"{name} {1e3 * cost:.3g} ms" for name, cost in self._ways.items())
        self._choices.append(Choice(self._times[0], self._charge, f"expected costs per step: {listed}"))

    def _expect(self, costs: Costs) -> None:
        """What steps cost follows from what calls cost."""
        self._costs = costs
        self._ways = differentiations(costs, self._objective.n_parameters, tuple(self._entrants), self._span.rtol)

    def _try(self, name: str) -> None:
        self._current, self._n_trial = name, 1
        entrant = self._entrants[name]
        entrant.since = entrant.paid = entrant.gained = entrant.n_steps = 0.0

    def _win(self) -> None:
        winner, loser = self._entrants[self._current], self._entrants[self._charge]
        reason = f"pays {winner.rate / loser.rate:.2f} times what {self._charge} did"
        for name, other in self._entrants.items():
            other.backoff = 1.0
            if name in self._ways or name == self._charge:
                other.since = 0.0
        self._charge, self._n_trial, self._n_in_charge = self._current, 0, 0
        self._choices.append(Choice(self._times[0], self._charge, reason))

    def _lose(self) -> None:
        entrant = self._entrants[self._current]
        ratio = entrant.rate / max(self._entrants[self._charge].rate, 1e-300)
        if self._current not in self._ways or self._rough:
            entrant.backoff = min(max(2.0, ratio) * entrant.backoff, MAX_BACKOFF)
        entrant.since = 0.0
        self._current, self._n_trial = self._charge, 0

    def _drop_out(self) -> None:
        """Where second derivatives cannot be had after all, methods that need them leave the race."""
        for entrant in self._entrants.values():
            if entrant.method.needs != "gradient":
                entrant.memory, entrant.n_steps = None, 0.0
        assert self._costs is not None
        self._expect(Costs(self._costs.gradient))
        reason = f"{self._current} has no second derivatives"
        self._charge = self._current = next(iter(self._ways), FIRST)
        self._n_trial = self._n_in_charge = 0
        self._spent()
        self._choices.append(Choice(self._knot.t, self._charge, reason))

    def _recovers(self, end: RunEnd) -> bool:
        """Whether another method goes on where the current one ended."""
        if n_evaluations(self._objective.counts) >= self._limit:
            return False
        self._spent()
        if self._n_trial:
            self._lose()
            return True
        if end.status == "max_evals":
            return False
        self._failed.add(self._current)
        self._failed_at = end.knot.t
        if self._costs is None:
            self._open()
        left = [name for name in self._entrants if name not in self._failed and math.isfinite(self._price(name))]
        if not left or len(self._failed) >= ENOUGH:
            return False
        self._choices.append(Choice(end.knot.t, left[0], f"{self._current} ended with {end.status!r}"))
        self._charge = self._current = left[0]
        self._n_trial = 0
        self._entrants[left[0]].step_size = 0.0
        return True

    def _memory_for(self, name: str) -> Memory | None:
        """What the method left, as if it had come to the present points itself."""
        entrant = self._entrants[name]
        if entrant.memory is not None and entrant.memory.times[0] == self._times[0]:
            return entrant.memory
        if len(self._times) < 2:
            return None
        return entrant.method.moved(entrant.memory, self._times, self._theta, self._knot.gradient, self._clock())

    def _clock(self) -> Clock:
        """That of the last method that had one, so that steps stay what they were."""
        clocks = [e.memory.clock for e in (self._entrants[self._charge], *self._entrants.values()) if e.memory is not None]
        return next((clock for clock in clocks if clock is not None), Clock(self._origin, self._unit))

    def _remember(self) -> Memory:
        """All of it, for a later race; ``_recall`` is the inverse. Of memories those of two methods are kept."""
        names = list(self._entrants)
        costs = (0.0,) * 6 if self._costs is None else (1.0, *astuple(self._costs))
        numbers = [float(names.index(name)) for name in (self._charge, self._current)]
        numbers += [float(self._n_trial), float(self._n_steps), float(self._n_in_charge), self._origin, self._unit, *costs]
        numbers += [self._trouble, self._growth, self._size, self._stable, float(self._rough)]
        numbers += [number for entrant in self._entrants.values() for number in entrant.numbers()]
        kept = [name for name in dict.fromkeys((self._current, self._charge)) if self._entrants[name].memory is not None]
        numbers.append(float(len(kept)))
        curvatures = []
        points = self._times, self._theta
        degree, clock = 0, None
        for name in kept:
            memory = self._entrants[name].memory
            assert memory is not None
            here = memory.times[0] == self._times[0]
            if here and memory.clock is not None:
                points, degree, clock = (memory.times, memory.theta), memory.degree, memory.clock
            own = (0.0, 0.0) if memory.clock is None else (memory.clock.origin, memory.clock.unit)
            n_rows = 0 if memory.curvature is None else memory.curvature.shape[0]
            sizes = (names.index(name), here, len(memory.times), memory.degree, n_rows, len(memory.numbers))
            numbers += [float(x) for x in (*sizes, *own, *memory.times, *memory.numbers)]
            if memory.curvature is not None:
                curvatures.append(memory.curvature)
        return Memory(*points, degree, torch.cat(curvatures) if curvatures else None, tuple(numbers), clock)

    def _recall(self, memory: Memory) -> None:
        names, numbers = list(self._entrants), list(memory.numbers)

        def take(n: int) -> list[float]:
            taken, numbers[:] = numbers[:n], numbers[n:]
            return taken

        self._charge, self._current = (names[int(i)] for i in take(2))
        n_trial, n_steps, n_in_charge, self._origin, self._unit, measured, *costs = take(11)
        self._n_trial, self._n_steps, self._n_in_charge = int(n_trial), int(n_steps), int(n_in_charge)
        self._trouble, self._growth, self._size, self._stable, rough = take(5)
        self._rough = bool(rough)
        if measured:
            self._expect(Costs(*costs))
        for entrant in self._entrants.values():
            entrant.backoff, entrant.since, entrant.paid, entrant.gained = take(4)
            entrant.n_steps, entrant.step_size, entrant.seen = take(3)
        self._times, self._theta = memory.times, memory.theta
        rows = 0
        for _ in range(int(take(1)[0])):
            index, here, n_times, degree, n_rows, n_numbers, origin, unit = take(8)
            times, own = tuple(take(int(n_times))), tuple(take(int(n_numbers)))
            curvature = None
            if n_rows and memory.curvature is not None:
                curvature = memory.curvature[rows : rows + int(n_rows)]
            rows += int(n_rows)
            # Of a method that served before, only what it knew of the Hessian is wanted, not its points.
            theta = self._theta[: len(times)] if here else self._theta.new_zeros(len(times), self._theta.shape[1])
            clock = Clock(origin, unit) if unit else None
            self._entrants[names[int(index)]].memory = Memory(times, theta, int(degree), curvature, own, clock)
            # A multistep method came here: the gradient that is handed over is that of its linearisation, or of another point.
            self._approximate = self._approximate or (bool(here) and clock is not None)

    def _end(self, end: RunEnd) -> RunEnd:
        memory = None if self._times[0] != end.knot.t else self._remember()
        n_accepted, n_rejected = self._n_accepted, self._n_rejected
        return replace(end, n_accepted=n_accepted, n_rejected=n_rejected, choices=tuple(self._choices), memory=memory)
