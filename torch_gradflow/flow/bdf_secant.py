"""Backward differentiation by gradients alone: the stiff flow for objectives without Hessians, and for training loops.

The equation of a step, p′ + a δ = −∇L(θ_p + δ) (see ``bdf``), is solved by quasi-Newton iterations. What they find out about
the Hessian is carried along the whole trajectory (``secant``): a flow to t = 1e7 with 33 parameters takes some 1300 gradients,
four per step, where an explicit method would take 1e8.

It is a state machine with one gradient per call, like ``adams``: a state proposes a point, the caller evaluates ∇L there,
``advance`` judges it and makes the next proposal. ``BdfSecant`` drives it with an objective; a training loop drives it by
its own gradients, whose parameters then always are predicted or nearly converged points, at most a few tolerances from the
trajectory. Iterations begin at p_{k+1}, which is closer to the solution than p_k.

In a loop L may change between any two calls. That shows as steps which fail: each second failure in a row asks for the
gradient at the accepted point once more. Where it is another one, ``adams`` takes over, which makes progress at every call
under an L that changes at every call (mini-batches), and hands back once L came to rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.flow import adams
from torch_gradflow.flow.adams import AdamsState, Packed
from torch_gradflow.flow.bdf import MOVED_ORDER, UNIT, algebra_for
from torch_gradflow.flow.control import CLOCK, Patience, first_step_size, norm, require_finite, weights
from torch_gradflow.flow.dense import Clock, polynomial
from torch_gradflow.flow.method import (
    Arrival,
    Derivative,
    FlowMethod,
    Interpolant,
    Memory,
    RunEnd,
    RunStatus,
    Span,
    Visit,
    approaches,
    n_evaluations,
)
from torch_gradflow.flow.multistep import MAX_ORDER, MAX_POINTS, OrderControl
from torch_gradflow.flow.secant import (
    STACK,
    Dense,
    Difference,
    Equation,
    Iteration,
    LowRank,
    Pairs,
    Secant,
    Solve,
    arithmetic_for,
)
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective

# "refined": the iteration inside the step goes on.
Verdict = Literal["accepted", "rejected", "confirmed", "changed", "refined"]

# Up to so many parameters B is a matrix. At 151 that takes less time than eigenpairs, at 601 three times as much.
DENSE_LIMIT = 250
# Else so many eigenpairs are kept at most, and so many numbers. With 40 of 151 or of 601 the gradients are as many as with
# the whole matrix, with 20 of 151 a third more.
RANK, RANK_NUMBERS = 64, 2**24
# An iteration ends when its last change is below this fraction of the tolerance. To a given accuracy on T33 0.1 takes up to
# 5 % more gradients, 0.05 up to 10 %; with 0.3 steps become shorter, errors grow and orders fall.
SETTLED = 0.2
# δ of an accepted step is at most 1/c tolerances, where c δ is its error; no single change may be larger. One that wants to
# be so much larger cannot end in an accepted step, and shows that the gradient is that of another L.
FAR = 100.0
# An iteration fails when it is larger than this, relative to the smallest, after so many; when it is above 1 after more.
GROWTH, PATIENCE, MANY, TOO_MANY = 5.0, 7, 12, 25
# After so many rejections in a row there is no step that succeeds.
STUCK = 40
# How far from a known gradient a suspicious direction is looked at, in tolerances.
PROBE = 0.1


@dataclass(frozen=True)
class Limits:
    """What a proposal has to keep to.

    Attributes:
        cap: The longest step.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        t_end: Where to end exactly, may be infinite.
        watch: Whether L may change.
    """

    cap: float
    rtol: float
    atol: float
    t_end: float
    watch: bool


@dataclass(frozen=True)
class Step:
    """The step that is being taken; it follows from the rest of the state.

    Attributes:
        h: Its length.
        t: Where it ends.
        order: k.
        a: α/h.
        constants: Those of the errors c (θ − p_j) at the orders j = k − 1, k, k + 1; 0 where there is none.
        rows: p_k, its slope, p_{k−1}, p_{k+1} and the tolerated errors, shape ``(5, P)``.
        solve: (B + a I)⁻¹; None if that is not positive definite.
    """

    h: float
    t: float
    order: int
    a: float
    constants: tuple[float, float, float]
    rows: Tensor
    solve: Solve | None


@dataclass(frozen=True)
class SecantState:
    """Where the flow stands, and what it proposes next.

    Attributes:
        times: Flow times of the accepted points that are kept, newest first; at most 8.
        theta: θ there, shape ``(len(times), P)``.
        gradient: −dθ/dt at the newest of them, as the method has it, shape ``(P,)``.
        degree: That of the polynomial between the two newest points.
        clock: The time in which that polynomial is one.
        control: Of the order.
        step_size: What the controller wants next, not capped.
        secant: What is known of the Hessian.
        step: The step that is being taken.
        iteration: Where that stands.
        accuracy: a of the last accepted step; 0.0 where ``gradient`` is exact.
        asked: The accepted point itself is to be evaluated once more.
        probe: A displacement from ``iteration.at`` along which the curvature is wanted, or None.
        restless: The objective changed, and did not come to rest since: what goes on instead; or None.
    """

    times: tuple[float, ...]
    theta: Tensor
    gradient: Tensor
    degree: int
    clock: Clock
    control: OrderControl
    step_size: float
    secant: Secant
    step: Step
    iteration: Iteration
    accuracy: float = 0.0
    asked: bool = False
    probe: Tensor | None = None
    restless: AdamsState | None = None

    @property
    def t(self) -> float:
        """Flow time of the last accepted point."""
        return self.times[0]

    @property
    def proposed(self) -> float:
        """Size of the proposed step in flow time; 0.0 if the accepted point itself is to be evaluated once more."""
        if self.restless is not None:
            return self.restless.proposed
        return 0.0 if self.asked else self.step.h

    @property
    def accepted(self) -> Tensor:
        """The last accepted point, shape ``(P,)``."""
        return self.theta[0]

    @property
    def known(self) -> Tensor:
        """∇L there, as the method has it, shape ``(P,)``."""
        return self.gradient

    def is_known(self, gradient: Tensor) -> bool:
        """Whether this is the gradient at the accepted point, as far as it is known.

        After a step of the method that is as well as the point itself: the difference is that of the point's error.
        """
        difference = gradient - self.gradient
        size, jump = torch.stack([self.gradient.abs().amax(), difference.abs().amax()]).tolist()
        if jump <= torch.finfo(gradient.dtype).eps ** 0.55 * size:
            return True
        solve = self.secant.factor(self.accuracy) if self.accuracy else None
        return solve is not None and norm(solve(difference), self.step.rows[4]) <= 1

    def asking(self) -> SecantState:
        """The same flow, which wants the accepted point itself to be evaluated once more."""
        if self.restless is not None:
            return replace(self, restless=self.restless.asking())
        return replace(self, asked=True)

    def proposal(self) -> Tensor:
        """θ at which the next gradient is wanted, shape ``(P,)``; not to be written to."""
        if self.restless is not None:
            return self.restless.proposal()
        if self.asked:
            return self.theta[0]
        return self.iteration.point if self.probe is None else self.iteration.at + self.probe


def begin(
    t: float,
    theta: Tensor,
    gradient: Tensor,
    *,
    cap: float,
    rtol: float,
    atol: float,
    step_size: float | None = None,
    t_end: float = math.inf,
    watch: bool = True,
    secant: Secant | None = None,
) -> SecantState:
    """The flow at its first point, with the proposal of a first step of order 1.

    Args:
        t: Flow time.
        theta: θ, shape ``(P,)``; copied.
        gradient: ∇L there, shape ``(P,)``; copied.
        cap: The longest step allowed, positive.
        rtol: Relative tolerance of the local error.
        atol: Absolute tolerance.
        step_size: The first step size to try; None for ``first_step_size``.
        t_end: Where to end exactly.
        watch: Whether L may change between calls.
        secant: What is known of the Hessian; None for nothing, in a form that suits P.

    Raises:
        FloatingPointError: If the gradient is not finite.
    """
    require_finite(float(gradient.abs().amax()))
    first = first_step_size(theta, gradient, cap=min(cap, t_end - t), rtol=rtol, atol=atol) if step_size is None else step_size
    theta, gradient = theta.detach().clone(), gradient.detach().clone()
    if secant is None:
        secant = nothing(theta)
    state = SecantState(
        (t,), theta[None], gradient, 0, Clock(t, UNIT * first), OrderControl(), first, secant,
        Step(0.0, t, 1, 0.0, (0.0, 0.0, 0.0), theta[None], None),
        _still(theta, gradient),
    )  # fmt: skip
    return _proposed(state, Limits(cap, rtol, atol, t_end, watch))


def _still(theta: Tensor, gradient: Tensor) -> Iteration:
    """At an accepted point, before there is a step."""
    return Iteration(theta, gradient, torch.zeros_like(theta), theta, Pairs.none(theta))


def nothing(theta: Tensor, dense_limit: int = DENSE_LIMIT, rank: int = RANK) -> Secant:
    """What is known of the Hessian at the start, in the form that suits P."""
    if len(theta) <= dense_limit:
        return Dense.nothing(theta)
    return LowRank.nothing(theta, min(rank, max(8, RANK_NUMBERS // len(theta))))


def advance(
    state: SecantState,
    gradient: Tensor,
    *,
    cap: float,
    rtol: float,
    atol: float,
    t_end: float = math.inf,
    watch: bool = True,
) -> tuple[SecantState, Verdict]:
    """Judge the proposal of ``state`` by the gradient there.

    Args:
        state: The state, which is left as it is.
        gradient: ∇L at ``state.proposal()``, shape ``(P,)``; copied.
        cap: The longest step allowed from now on, positive.
        rtol: Relative tolerance of the local error.
        atol: Absolute tolerance.
        t_end: Where to end exactly.
        watch: Whether L may change between calls; if not, no gradient is spent on that question.

    Returns:
        The new state, with a new proposal, and the verdict: "refined" (the step's equation is not solved yet); "accepted";
        "rejected" (the step is too long, or the gradient not finite); "confirmed" (the accepted point was evaluated once
        more, L is the same); "changed" (L is another one than at the accepted point).

    Raises:
        FloatingPointError: If the accepted point was evaluated once more, and the gradient is not finite.
    """
    limits, gradient = Limits(cap, rtol, atol, t_end, watch), gradient.detach().contiguous()
    if state.restless is not None:
        return _go_on_restless(state, state.restless, gradient, limits)
    if state.asked:
        return _compare(state, gradient, limits)
    if state.probe is not None:
        return _look(state, state.probe, gradient, limits)
    return _iterate(state, gradient, limits)


def _iterate(state: SecantState, gradient: Tensor, limits: Limits) -> tuple[SecantState, Verdict]:
    """One iteration towards the solution of the step's equation."""
    step, before, taken = state.step, state.iteration, None
    equation = Equation(step.rows, step.a, 1 / step.constants[1])
    if step.solve is not None and len(before.pairs) < STACK:
        taken = arithmetic_for(gradient).iterated(before, gradient, equation, step.solve)
    if taken is None:
        state, taken = _reconsidered(state, gradient, equation)
    if taken is None:
        return _rejected(state, math.inf, limits), "rejected"
    now, size = taken
    if size < SETTLED:
        return _arrived(state, now, limits)
    state = replace(state, iteration=now)
    stalls = now.n >= PATIENCE and size > GROWTH * now.smallest
    if not size <= FAR * equation.longest or stalls or (now.n >= MANY and size > 1) or now.n >= TOO_MANY:
        return _rejected(state, math.inf, limits), "rejected"
    if step.h > limits.cap:
        return _proposed(replace(state, secant=state.secant.learned(now.pairs, step.a)), limits), "refined"
    return state, "refined"


def _reconsidered(
    state: SecantState, gradient: Tensor, equation: Equation
) -> tuple[SecantState, tuple[Iteration, float] | None]:
    """The iteration where the gradient does not give another pair, or there are too many; where B changes, the state.

    None if the step is too long: for an unstable mode, or as the gradient is not finite.
    """
    step, before = state.step, state.iteration
    seen = Difference.at_proposal(before, gradient, equation)
    if not seen.is_finite or step.solve is None:
        # Nothing is known of that point; and the step is too long as well.
        return state, None
    pairs, solve = before.pairs, step.solve
    if not seen.is_nothing and not seen.is_convex and before.n:  # at n = 0 it says less: the gradient changes along an arc
        state = replace(state, iteration=before.seen(gradient))
        return _corrected(state, seen.s / math.sqrt(seen.s_s), seen.s_z / seen.s_s - step.a), None
    if not seen.is_nothing and seen.is_convex:
        secant = state.secant.learned(pairs, step.a)
        better = secant.factor(step.a)
        newest = Pairs.none(seen.s).joined(seen.s, seen.z)
        assert newest is not None
        pairs = newest
        if better is not None:
            state, solve = replace(state, secant=secant, step=replace(step, solve=better)), better
    return state, before.moved(gradient, pairs, equation, solve)


def _corrected(state: SecantState, direction: Tensor, curvature: float) -> SecantState:
    """With the curvature along a unit vector known better."""
    secant = state.secant.learned(state.iteration.pairs, state.step.a).corrected(direction, curvature)
    return replace(state, secant=secant, iteration=state.iteration.without_pairs())


def _look(state: SecantState, probe: Tensor, gradient: Tensor, limits: Limits) -> tuple[SecantState, Verdict]:
    """Whether the curvature that forbids the step is there."""
    length = float(probe.norm())
    curvature = float(probe @ (gradient - state.iteration.found)) / length**2
    if not math.isfinite(curvature):
        return _rejected(replace(state, probe=None), math.inf, limits), "rejected"
    state = _corrected(replace(state, probe=None), probe / length, curvature)
    if curvature + state.step.a > 0:
        again = _proposed(state, limits)
        if again.probe is None:
            return again, "refined"
        if state.iteration.n >= MANY:
            return _proposed(replace(state, secant=_forgotten(state.secant)), limits), "refined"
        return replace(again, iteration=replace(again.iteration, n=state.iteration.n + 1)), "refined"
    # As long as it is: growth must be followed, not damped.
    shorter = state.step.h * max(0.1, 0.5 * state.step.a / -curvature)
    control = replace(state.control, n_steps=0)
    return _proposed(replace(state, step_size=shorter, control=control), limits), "rejected"


def _arrived(state: SecantState, iteration: Iteration, limits: Limits) -> tuple[SecantState, Verdict]:
    """The equation is solved: judge the step by its error."""
    step = state.step
    delta = iteration.delta
    algebra = algebra_for(delta.device, delta.dtype, delta.shape[0])
    norms, _, theta, _, _, gradient = algebra.finish(delta, delta[0], iteration.found, step.a, state.theta, step.rows)
    low, own, high = (size * constant for size, constant in zip(norms, step.constants, strict=True))
    if not own <= 1:
        return _rejected(replace(state, iteration=iteration), own if math.isfinite(own) else math.inf, limits), "rejected"
    control = OrderControl(step.order, state.control.n_steps, state.control.n_rejected)
    lower, higher = low if step.constants[0] else None, high if step.constants[2] else None
    factor, control = control.accepted(own, lower, higher, len(state.times) == 1)
    longer = state.clock.after(step.t, factor * state.clock.between(state.t, step.t))
    times = (step.t, *state.times[: MAX_POINTS - 1])
    accepted = replace(
        state,
        times=times,
        theta=theta,
        gradient=gradient,
        degree=min(step.order + 1, len(times) - 1),
        control=control,
        # A step that was cut to end somewhere says nothing against the step size that was wanted.
        step_size=max(state.step_size, longer) if step.h < state.step_size else longer,
        secant=state.secant.learned(iteration.pairs, step.a),
        iteration=iteration,
        accuracy=step.a,
    )
    return _proposed(accepted, limits), "accepted"


def _rejected(state: SecantState, error: float, limits: Limits) -> SecantState:
    """Another try from the accepted point, by a shorter step; each second time to see whether L is still the same."""
    factor, control = state.control.rejected(error)
    times, theta = state.times, state.theta
    if control.n_rejected >= 3 and len(times) > 2:
        # The past says nothing any more.
        times, theta = times[:2], theta[:2]
    again = replace(
        state,
        times=times,
        theta=theta,
        degree=min(state.degree, len(times) - 1),
        control=control,
        step_size=state.step.h * factor,
        secant=state.secant.learned(state.iteration.pairs, state.step.a),
    )
    return replace(_proposed(again, limits), asked=limits.watch and control.n_rejected % 2 == 0)


def _proposed(state: SecantState, limits: Limits) -> SecantState:
    """With a new step."""
    t, floor = state.t, 4 * CLOCK * abs(state.t)
    wanted = max(state.step_size, floor, 1e-300)
    wanted = limits.cap if wanted >= (1 - adams.HAIR) * limits.cap else wanted
    step = _step(state, approaches(t, wanted, limits.t_end) if t < limits.t_end else wanted, limits)
    predicted = step.rows[0]
    delta = step.rows[3] - predicted if step.constants[2] else torch.zeros_like(predicted)
    iteration = Iteration(state.iteration.at, state.iteration.found, delta, predicted + delta, Pairs.none(delta))
    probe = None
    if step.solve is None:
        _, direction = state.secant.most_negative()
        probe = direction * (PROBE / norm(direction, step.rows[4]))
    return replace(state, step=step, iteration=iteration, probe=probe, asked=False)


def _step(state: SecantState, h: float, limits: Limits) -> Step:
    """The step of that length from the accepted point."""
    times, theta, clock = state.times, state.theta, state.clock
    t = limits.t_end if h == limits.t_end - times[0] else times[0] + h
    if len(times) == 1:
        slope = -state.gradient
        predicted = theta[0] + h * slope
        tolerated = weights(limits.rtol, limits.atol, theta[0], predicted)
        rows = torch.stack([predicted, slope, predicted, predicted, tolerated])
        return Step(h, t, 1, 1 / h, (0.0, 0.5, 0.0), rows, state.secant.factor(1 / h))
    order = min(state.control.order, len(times) - 1)
    algebra = algebra_for(theta.device, theta.dtype, theta.shape[1])
    a, constants, rows = algebra.predict(times, t, clock, order, theta, limits.rtol, limits.atol)
    return Step(h, t, order, a, constants, rows, state.secant.factor(a))


def _compare(state: SecantState, gradient: Tensor, limits: Limits) -> tuple[SecantState, Verdict]:
    """Whether the gradient at the accepted point is still the one that is known."""
    jump = float((gradient - state.gradient).abs().amax())
    require_finite(jump)
    if state.is_known(gradient):
        return replace(state, asked=False), "confirmed"
    step_size = first_step_size(state.theta[0], gradient, cap=limits.cap, rtol=limits.rtol, atol=limits.atol)
    step_size = min(step_size, state.step_size)
    proposed = limits.cap if step_size >= (1 - adams.HAIR) * limits.cap else step_size
    restless = AdamsState(
        state.t, state.theta[0], (state.t,), gradient.clone()[None], 1, proposed, step_size, 0, True, jump
    )  # fmt: skip
    return _restless(state, restless), "changed"


def _go_on_restless(state: SecantState, restless: AdamsState, gradient: Tensor, limits: Limits) -> tuple[SecantState, Verdict]:
    """A step while L changes; at rest, the flow begins anew."""
    cap, rtol, atol = limits.cap, limits.rtol, limits.atol
    restless, verdict = adams.advance(restless, gradient, cap=cap, rtol=rtol, atol=atol)
    if restless.restless:
        return _restless(state, restless), verdict
    at_rest = begin(
        restless.t, restless.theta, restless.gradients[0], cap=cap, rtol=rtol, atol=atol, step_size=restless.step_size,
        secant=_forgotten(state.secant),
    )  # fmt: skip
    return at_rest, verdict


def _restless(state: SecantState, restless: AdamsState) -> SecantState:
    return replace(
        state,
        times=(restless.t,),
        theta=restless.theta[None],
        gradient=restless.gradients[0],
        degree=0,
        control=OrderControl(),
        step_size=restless.step_size,
        secant=_forgotten(state.secant),
        iteration=_still(restless.theta, restless.gradients[0]),
        accuracy=0.0,
        asked=False,
        probe=None,
        restless=restless,
    )


def _forgotten(secant: Secant) -> Secant:
    """Nothing, in the same form."""
    rows = secant.rows()
    like = rows.new_empty(rows.shape[1])
    return LowRank.nothing(like, secant.capacity) if secant.capacity else Dense.nothing(like)


def pack(state: SecantState) -> Packed:
    """Everything in the state, at whichever of its calls."""
    secant, restless, iteration = state.secant, state.restless, state.iteration
    pairs = iteration.pairs
    known = secant.rows()
    vectors = [state.gradient, iteration.at, iteration.found, iteration.delta]
    vectors += [] if state.probe is None else [state.probe]
    inner = None if restless is None else adams.pack(restless)
    numbers = [
        state.degree, state.clock.origin, state.clock.unit, state.control.order, state.control.n_steps,
        state.control.n_rejected, state.step_size, state.step.h, state.step.t, iteration.n, iteration.smallest,
        state.accuracy, state.asked, state.probe is not None, len(known), secant.capacity,
        len(pairs), *pairs.q.tolist(), 0 if inner is None else len(inner.times),
    ]  # fmt: skip
    rows = [state.theta, torch.stack(vectors), known, pairs.s, pairs.z]
    if inner is not None:
        numbers += [*inner.times, *inner.numbers]
        rows.append(inner.rows)
    return Packed(state.times, torch.cat(rows), tuple(float(x) for x in numbers))


def unpack(packed: Packed, *, rtol: float, atol: float) -> SecantState:
    """The state, bit for bit, as long as the tolerances are the same."""
    rest = list(packed.numbers)

    def take(n: int = 1) -> list[float]:
        taken, rest[:] = rest[:n], rest[n:]
        return taken

    (degree, origin, unit, order, n_steps, n_rejected, step_size, h, t) = take(9)
    n_iterations, smallest, accuracy, asked, probed, n_known, capacity, n_pairs = take(8)
    q = take(int(n_pairs))
    (n_inner,) = take()
    n_rows = int(n_inner) + 1 if n_inner else 0
    sizes = [len(packed.times), 4 + int(probed), int(n_known), int(n_pairs), int(n_pairs), n_rows]
    theta, vectors, known, s, z, inner = (part.contiguous() for part in packed.rows[: sum(sizes)].split(sizes))
    gradient, at, found, delta, *probe = vectors
    restless = adams.unpack(Packed(tuple(take(int(n_inner))), inner, tuple(rest))) if n_inner else None
    state = SecantState(
        times=packed.times,
        theta=theta,
        gradient=gradient,
        degree=int(degree),
        clock=Clock(origin, unit),
        control=OrderControl(int(order), int(n_steps), int(n_rejected)),
        step_size=step_size,
        secant=LowRank.of(known, int(capacity)) if capacity else Dense(known),
        step=Step(h, t, 1, 0.0, (0.0, 0.0, 0.0), theta[:1], None),
        iteration=_still(at, found),
        accuracy=accuracy,
        asked=bool(asked),
        probe=probe[0] if probe else None,
        restless=restless,
    )
    step = _step(state, h, Limits(math.inf, rtol, atol, t, True))
    pairs = Pairs(s, z, theta.new_tensor(q))
    iteration = Iteration(at, found, delta, step.rows[0] + delta, pairs, int(n_iterations), smallest)
    return replace(state, step=step, iteration=iteration)


class BdfSecant(FlowMethod):
    """Backward differentiation with a secant approximation of the Hessian.

    Args:
        dense_limit: Up to so many parameters that is a matrix.
        rank: How many eigenpairs are kept of it beyond.
    """

    name = "bdf-secant"
    order = MAX_ORDER
    needs: Derivative = "gradient"
    n_knots = 0
    n_points = MAX_POINTS

    def __init__(self, dense_limit: int = DENSE_LIMIT, rank: int = RANK) -> None:
        self._dense_limit, self._rank = dense_limit, rank

    def run(self, objective: Objective, start: Knot, span: Span, visit: Visit, memory: Memory | None = None) -> RunEnd:
        """See ``FlowMethod``."""
        state = self._begun(start, span, memory)
        limit = n_evaluations(objective.counts) + span.max_evals
        knot, step_size, interpolant = start, state.step_size, None
        n_accepted = n_rejected = order = 0
        finite, patience, in_a_row = True, Patience(start.t), 0
        status: RunStatus | None = "t_end" if span.t_end <= start.t else None
        while status is None:
            if n_evaluations(objective.counts) >= limit:
                status = "max_evals"
            elif state.step_size <= CLOCK * abs(state.t) or state.step_size < 1e-300:
                status = "underflow" if finite else "not finite"
            else:
                point, tried = state.proposal(), state.step.order
                loss, gradient = objective.loss_and_gradient(point)
                state, verdict = advance(
                    state, gradient, cap=span.max_step, rtol=span.rtol, atol=span.atol, t_end=span.t_end, watch=False
                )
                if verdict == "rejected":
                    n_rejected += 1
                    in_a_row += 1
                    finite = bool(torch.isfinite(gradient).all()) and math.isfinite(float(loss))
                    if (not finite and patience.exhausted(state.t)) or in_a_row > STUCK:
                        status = "underflow" if finite else "not finite"
                elif verdict == "accepted":
                    n_accepted, in_a_row, order = n_accepted + 1, 0, tried
                    theta = state.theta[0]
                    loss = loss + 0.5 * (gradient + state.gradient) @ (theta - point)
                    step_size, interpolant = state.step_size, _path(state)
                    if not math.isfinite(float(loss)):
                        status = "not finite"
                        continue
                    knot = Knot(state.t, theta, loss, state.gradient)
                    if state.t >= span.t_end:
                        status = "t_end"
                    elif visit(Arrival(knot, step_size, interpolant, True, self.name, order, _remembering(state))):
                        status = "visit"
        memory = _memory(state) if state.t == knot.t and (n_accepted or memory is not None) else None
        approximate = n_accepted > 0
        return RunEnd(
            status, knot, state.step_size, n_accepted, n_rejected, approximate, memory, interpolant=interpolant,
            order=order,
        )  # fmt: skip

    def moved(
        self, memory: Memory | None, times: tuple[float, ...], theta: Tensor, gradient: Tensor, clock: Clock
    ) -> Memory | None:
        """See ``FlowMethod``."""
        degree = min(MOVED_ORDER, len(times) - 1)
        secant = nothing(theta[0], self._dense_limit, self._rank)
        if memory is not None and memory.curvature is not None:
            rows = torch.cat([memory.theta, memory.curvature])
            secant = unpack(Packed(memory.times, rows, memory.numbers), rtol=1.0, atol=1.0).secant
        start = begin(times[0], theta[0], gradient, cap=math.inf, rtol=1e-6, atol=1e-6, watch=False, secant=secant)
        control = OrderControl(degree)
        return _memory(replace(start, times=times, theta=theta, degree=degree, clock=clock, control=control))

    def _begun(self, start: Knot, span: Span, memory: Memory | None) -> SecantState:
        limits = Limits(span.max_step, span.rtol, span.atol, span.t_end, False)
        if memory is not None and memory.curvature is not None and memory.clock is not None and memory.times[0] == start.t:
            rows = torch.cat([memory.theta, memory.curvature])
            state = unpack(Packed(memory.times, rows, memory.numbers), rtol=span.rtol, atol=span.atol)
            return _proposed(replace(state, step_size=span.step_size or state.step_size), limits)
        return begin(
            start.t, start.theta, start.gradient, cap=span.max_step, rtol=span.rtol, atol=span.atol,
            step_size=span.step_size, t_end=span.t_end, watch=False,
            secant=nothing(start.theta, self._dense_limit, self._rank),
        )  # fmt: skip


def _path(state: SecantState) -> Interpolant:
    times, theta, clock = state.times[: state.degree + 1], state.theta, state.clock
    return lambda t: polynomial(t, times, theta, clock)


def _remembering(state: SecantState) -> Callable[[], Memory]:
    return lambda: _memory(state)


def _memory(state: SecantState) -> Memory:
    """What the next run needs; iterations inside a step that is not accepted are begun anew there."""
    packed = pack(
        replace(
            state, iteration=state.iteration.without_pairs(), secant=state.secant.learned(state.iteration.pairs, state.step.a)
        )
    )
    n = len(state.times)
    return Memory(state.times, packed.rows[:n], state.degree, packed.rows[n:], packed.numbers, state.clock)
