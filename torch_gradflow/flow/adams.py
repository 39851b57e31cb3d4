"""The gradient flow with one gradient per call: for training loops that evaluate the gradient themselves.

Variable-step Adams–Bashforth methods of order 1 to 3 (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations
I, section III.5) as a state machine. A state proposes a point; the caller evaluates ∇L there; ``advance`` judges the
proposal by that gradient and makes the next one. The gradient that judges a step is the one that the next step starts
with, so an accepted step costs a single gradient.

All polynomials are written in units of the step size, with factors (u + b_i)/(1 + b_i) where b_i is the age of the i-th
gradient: numbers of moderate size, however short or long the steps are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.flow.control import first_step_size, require_finite

Verdict = Literal["accepted", "rejected", "confirmed", "changed"]

MAX_ORDER = 3
# A step is this much shorter than the one whose error is expected to equal the tolerance. At 0.9, with growth straight
# after a rejection, a fifth of the steps were rejected where stability limits them; each costs as much as a step.
SAFETY = 0.8
# By how much a step may be longer than the one before, and shorter than a rejected one.
MAX_GROWTH, MAX_SHRINKING = 2.0, 0.2
# Another order than the present one must allow longer steps even if they are shortened by this.
LOYALTY = 0.8
# Steps within so much of the cap are the cap.
HAIR = 1e-3
# L came to rest when the gradient changes along a step by so much less than it changed at one and the same point.
REST = 0.1
# How often, in calls, this is tried at least where L changes at every call.
PROBE_EVERY = 128


@dataclass(frozen=True)
class AdamsState:
    """Where the flow stands, and what it proposes next.

    Attributes:
        t: Flow time of the last accepted point.
        theta: The last accepted point, shape ``(P,)``.
        times: Times of the accepted points whose gradients are kept, newest first: ``times[0] == t``; at most 3.
        gradients: ∇L there, shape ``(len(times), P)``.
        order: Order of the proposed step.
        proposed: Size of the proposed step in flow time; 0.0 if the accepted point itself is to be evaluated once more.
        step_size: What the controller wants next, not capped, but at most twice the last accepted step.
        n_rejected: Rejections in a row; while restless, calls without a sign of rest.
        restless: The objective changed, and no sign of rest came since.
        jump: The largest component by which the gradient changed at one and the same point; 0.0 where none was seen.
    """

    t: float
    theta: Tensor
    times: tuple[float, ...]
    gradients: Tensor
    order: int
    proposed: float
    step_size: float
    n_rejected: int
    restless: bool
    jump: float

    @property
    def accepted(self) -> Tensor:
        """The last accepted point, shape ``(P,)``."""
        return self.theta

    @property
    def known(self) -> Tensor:
        """∇L there, shape ``(P,)``."""
        return self.gradients[0]

    def is_known(self, gradient: Tensor) -> bool:
        """Whether this is the gradient at the accepted point that was kept, up to rounding."""
        size, difference = torch.stack([self.known.abs().amax(), (gradient - self.known).abs().amax()]).tolist()
        return bool(difference <= torch.finfo(self.known.dtype).eps ** 0.55 * size)

    def asking(self) -> AdamsState:
        """The same flow, which wants the accepted point itself to be evaluated once more."""
        return replace(self, proposed=0.0)

    def proposal(self) -> Tensor:
        """θ at which the next gradient is wanted, shape ``(P,)``; not to be written to."""
        if not self.proposed:
            return self.theta
        weights = explicit_weights(_ages(self.times[: self.order], self.proposed))
        return self.theta - _combination([self.proposed * weight for weight in weights], self.gradients)


def begin(
    t: float,
    theta: Tensor,
    gradient: Tensor,
    *,
    cap: float,
    rtol: float,
    atol: float,
    step_size: float | None = None,
    restless: bool = False,
) -> AdamsState:
    """The flow at its first point, with the proposal of a first step of order 1.

    Args:
        t: Flow time.
        theta: θ, shape ``(P,)``; copied.
        gradient: ∇L there, shape ``(P,)``; copied.
        cap: The longest step allowed, positive and finite.
        rtol: Relative tolerance of the local error.
        atol: Absolute tolerance.
        step_size: The first step size to try; None for ``first_step_size``.
        restless: Whether the objective is known to have changed just now.

    Raises:
        FloatingPointError: If the gradient is not finite.
    """
    if step_size is None:
        step_size = first_step_size(theta, gradient, cap=cap, rtol=rtol, atol=atol)
    else:
        require_finite(float(gradient.abs().amax()))
    theta, gradients = theta.detach().clone(), gradient.detach().clone()[None]
    return AdamsState(t, theta, (t,), gradients, 1, _capped(step_size, cap), step_size, 0, restless, 0.0)


def advance(state: AdamsState, gradient: Tensor, *, cap: float, rtol: float, atol: float) -> tuple[AdamsState, Verdict]:
    """Judge the proposal of ``state`` by the gradient there.

    A step whose error estimate exceeds the tolerance is tried again, shorter. Each second rejection in a row raises the
    question whether L is still the same: the accepted point is evaluated once more, and the history dropped if its
    gradient changed.

    The flow of the new L starts there, restless: L may change at every call, as with mini-batches. It came to rest if a
    step succeeds along which the gradient changes far less than it did at the one point; small steps alone would succeed
    anyhow. The first failure is tried again, shorter. After that every call goes on from where it stands, by steps of order
    1 that grow to ``first_step_size``; now and then (the 2nd, 4th, 8th, …, and each 128th call) one is so short that it
    succeeds if L rests.

    Args:
        state: The state, which is left as it is.
        gradient: ∇L at ``state.proposal()``, shape ``(P,)``; copied.
        cap: The longest step allowed from now on, positive and finite.
        rtol: Relative tolerance of the local error.
        atol: Absolute tolerance.

    Returns:
        The new state, with a new proposal, and the verdict: "accepted"; "rejected" (the proposal was too far away, or the
        gradient there not finite); "confirmed" (the accepted point was evaluated once more, L is the same); "changed" (L
        is another one than at the accepted point, and the flow starts anew at the point that was proposed).

    Raises:
        FloatingPointError: If the accepted point was evaluated once more, and the gradient is not finite.
    """
    gradient = gradient.detach()
    if not state.proposed:
        return _compare(state, gradient, cap, rtol, atol)
    theta, ages = state.proposal(), _ages(state.times, state.proposed)
    errors = _error_estimates(state, theta, gradient, ages, rtol, atol)
    error = errors[state.order - 1]
    if not state.restless:
        if error <= 1:
            return _accept(state, theta, gradient, ages, errors, cap), "accepted"
        return _reject(state, error, ages[: state.order], cap), "rejected"
    difference = float((gradient - state.gradients[0]).abs().amax())
    # How far the step is from being as short as a sign of rest takes; 1 or more if it gives one.
    rest = REST * state.jump / difference if state.jump and difference else math.inf
    if error <= 1 <= rest:
        return _accept(state, theta, gradient, ages, errors, cap), "accepted"
    if math.isinf(error) or (error > 1 and not state.n_rejected):
        return _reject(state, error, ages[: state.order], cap), "rejected"
    n_calls = state.n_rejected + 1
    probe = n_calls > 1 and (n_calls & (n_calls - 1) == 0 or n_calls % PROBE_EVERY == 0)
    factor = min(SAFETY * rest, _shrinking(error, ages[: state.order])) if probe else MAX_GROWTH
    step_size = min(first_step_size(theta, gradient, cap=cap, rtol=rtol, atol=atol), min(factor, MAX_GROWTH) * state.proposed)
    fresh = _restart(state.t + state.proposed, theta, gradient, step_size, cap, n_calls, state.jump)
    return fresh, "accepted" if error <= 1 else "changed"


def explicit_weights(ages: Sequence[float]) -> list[float]:
    """The weights of an explicit Adams step of length 1.

    They are the integrals over 0 ≤ u ≤ 1 of the Lagrange polynomials of the nodes −b_i.

    Args:
        ages: b_i, distinct, in units of the step.
    """
    return [
        sum(_antiderivative([(b / (b - own), 1 / (b - own)) for j, b in enumerate(ages) if j != i]))
        for i, own in enumerate(ages)
    ]


def error_weights(ages: Sequence[float]) -> tuple[float, list[float]]:
    """What the implicit Adams step of length 1, through the new gradient f too, adds to the explicit one.

    That is (∫ Π (u + b_i) du) f[1, −b_0, −b_1, …], or γ (f − Σ l_i f_i) with the extrapolation Σ l_i f_i of the kept
    gradients to u = 1.

    Args:
        ages: b_i, distinct, in units of the step.

    Returns:
        γ = ∫ Π (u + b_i)/(1 + b_i) du over 0 ≤ u ≤ 1, and the l_i.
    """
    extrapolation = [math.prod((1 + b) / (b - own) for j, b in enumerate(ages) if j != i) for i, own in enumerate(ages)]
    return sum(_antiderivative(_same_start(ages))), extrapolation


@dataclass(frozen=True)
class Packed:
    """A state as rows of length P and numbers, which fit into any optimizer's state and any checkpoint.

    Attributes:
        times: Flow times of accepted points, newest first.
        rows: Shape ``(n, P)``.
        numbers: Of any type that a float holds exactly.
    """

    times: tuple[float, ...]
    rows: Tensor
    numbers: tuple[float, ...]


def pack(state: AdamsState) -> Packed:
    """Everything in the state."""
    numbers = (state.order, state.proposed, state.step_size, state.n_rejected, state.restless, state.jump)
    return Packed(state.times, torch.cat([state.theta[None], state.gradients]), tuple(float(x) for x in numbers))


def unpack(packed: Packed) -> AdamsState:
    """The state, bit for bit."""
    order, proposed, step_size, n_rejected, restless, jump = packed.numbers
    return AdamsState(
        t=packed.times[0],
        theta=packed.rows[0],
        times=packed.times,
        gradients=packed.rows[1 : 1 + len(packed.times)],
        order=int(order),
        proposed=proposed,
        step_size=step_size,
        n_rejected=int(n_rejected),
        restless=bool(restless),
        jump=jump,
    )


def _error_estimates(
    state: AdamsState, theta: Tensor, gradient: Tensor, ages: Sequence[float], rtol: float, atol: float
) -> list[float]:
    """The error of the proposed step in units of the tolerance, if it were one of order 1, 2, …: as the history allows.

    Infinite where it, or the gradient, is not finite. Root mean square over the components.
    """
    scale = atol + rtol * torch.maximum(state.theta.abs(), theta.abs())
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # 0/0 where atol, θ and the error are all zero
    wide = torch.promote_types(scale.dtype, torch.float32)
    norms = []
    for order in range(1, len(ages) + 1):
        weight, extrapolation = error_weights(ages[:order])
        error = (gradient - _combination(extrapolation, state.gradients)) / scale
        norms.append(torch.linalg.vector_norm(error, dtype=wide) * (weight * state.proposed / math.sqrt(theta.numel())))
    return [norm if math.isfinite(norm) else math.inf for norm in torch.stack(norms).tolist()]


def _accept(
    state: AdamsState, theta: Tensor, gradient: Tensor, ages: Sequence[float], errors: Sequence[float], cap: float
) -> AdamsState:
    """Go on from the proposal, by the order that allows the longest step."""
    t = state.t + state.proposed
    reaches = []
    for order, error in enumerate(errors, start=1):
        weight, _ = error_weights(ages[:order])
        reaches.append(_reach(_next_start(ages[:order]), weight, error))
    order = max(range(1, len(errors) + 1), key=lambda order: reaches[order - 1] * (1 if order == state.order else LOYALTY))
    step_size = state.proposed * min(1.0 if state.n_rejected else MAX_GROWTH, SAFETY * reaches[order - 1])
    # A step too short for the clock leaves two gradients at one time.
    older = [i for i, t_i in enumerate(state.times) if t_i < t][: MAX_ORDER - 1]
    return AdamsState(
        t,
        theta,
        (t, *(state.times[i] for i in older)),
        torch.stack([gradient, *(state.gradients[i] for i in older)]),
        min(order, 1 + len(older)),
        _capped(step_size, cap),
        step_size,
        0,
        False,
        0.0,
    )


def _reject(state: AdamsState, error: float, ages: Sequence[float], cap: float) -> AdamsState:
    """Go back to the accepted point, for a shorter step; each second time to see whether L is still the same."""
    shrinking = _shrinking(error, ages)
    # Restless, the next step must succeed if L came to rest: it is as short as that takes.
    if not state.restless or not shrinking:
        shrinking = max(MAX_SHRINKING, shrinking)
    step_size, n_rejected = state.proposed * shrinking, state.n_rejected + 1
    if n_rejected % 2:
        return replace(state, proposed=_capped(step_size, cap), step_size=step_size, n_rejected=n_rejected)
    return replace(state, order=1, proposed=0.0, step_size=step_size, n_rejected=n_rejected)


def _shrinking(error: float, ages: Sequence[float]) -> float:
    """How much shorter a step from the same point, by the same gradients, must be than one with that error."""
    weight, _ = error_weights(ages)
    return SAFETY * _reach(_same_start(ages), weight, error)


def _compare(state: AdamsState, gradient: Tensor, cap: float, rtol: float, atol: float) -> tuple[AdamsState, Verdict]:
    """Whether the gradient at the accepted point is still the one that was kept, up to rounding."""
    difference = float((gradient - state.known).abs().amax())
    require_finite(difference)
    if state.is_known(gradient):
        return replace(state, proposed=_capped(state.step_size, cap), restless=False, jump=0.0), "confirmed"
    step_size = min(first_step_size(state.theta, gradient, cap=cap, rtol=rtol, atol=atol), state.step_size)
    n_rejected = state.n_rejected if state.restless else 0
    return _restart(state.t, state.theta, gradient, step_size, cap, n_rejected, difference), "changed"


def _restart(
    t: float, theta: Tensor, gradient: Tensor, step_size: float, cap: float, n_rejected: int, jump: float
) -> AdamsState:
    """The flow of an L that changed."""
    gradients, proposed = gradient.clone()[None], _capped(step_size, cap)
    return AdamsState(t, theta, (t,), gradients, 1, proposed, step_size, n_rejected, True, jump)


def _capped(step_size: float, cap: float) -> float:
    return cap if step_size >= (1 - HAIR) * cap else step_size


def _combination(weights: Sequence[float], gradients: Tensor) -> Tensor:
    """Σ w_i g_i over the given weights, shape ``(P,)``; not as a matrix product, which may round to TF32."""
    total = weights[0] * gradients[0]
    for weight, gradient in zip(weights[1:], gradients[1:], strict=False):
        total.add_(gradient, alpha=weight)
    return total


def _ages(times: Sequence[float], step: float) -> list[float]:
    """How long before the newest of these times they were, in units of the step."""
    return [(times[0] - t) / step for t in times]


def _same_start(ages: Sequence[float]) -> list[tuple[float, float]]:
    """Factors of Π (u + b_i)/(1 + b_i): how the error of a step from the same point grows with its length."""
    return [(b / (1 + b), 1 / (1 + b)) for b in ages]


def _next_start(ages: Sequence[float]) -> list[tuple[float, float]]:
    """The same for a step from the end of the step to which the ages belong, in its units and with its divided difference.

    There the ages are 0, 1 + b_0, 1 + b_1, …, the oldest gradient is no longer used, and the product is divided by the
    same Π (1 + b_i).
    """
    return [(0.0, 1 / (1 + ages[-1])), *((1.0, 1 / (1 + b)) for b in ages[:-1])]


def _antiderivative(factors: Sequence[tuple[float, float]]) -> list[float]:
    """The coefficients c_1, c_2, … of ∫ Π (p_i + q_i v) dv over 0 ≤ v ≤ u = Σ c_j u^j."""
    product = [1.0]
    for p, q in factors:
        product = [p * a + q * b for a, b in zip([*product, 0.0], [0.0, *product], strict=True)]
    return [c / j for j, c in enumerate(product, start=1)]


def _reach(factors: Sequence[tuple[float, float]], weight: float, error: float) -> float:
    """The length u of a step at which the error reaches the tolerance: ∫ Π (p_i + q_i v) dv = weight/error.

    Newton's method from the right, where it descends: the integral is convex, no p_i or q_i is negative.

    Args:
        factors: p_i and q_i.
        weight: The integral for the step whose error is known.
        error: That error, in units of the tolerance.
    """
    if error == 0 or math.isinf(error):
        return math.inf if error == 0 else 0.0
    coefficients, value = _antiderivative(factors), weight / error
    u: float = min((value / c) ** (1 / j) for j, c in enumerate(coefficients, start=1) if c > 0)
    for _ in range(6):
        integral = 0.0
        for c in reversed(coefficients):
            integral = (integral + c) * u
        u -= (integral - value) / math.prod(p + q * u for p, q in factors)
    return u
