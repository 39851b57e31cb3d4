"""The arithmetic of many runs' backward differentiation steps, compiled: for few parameters in float64 on a CPU.

Three passes over the memory of all runs, instead of a hundred calls of numpy and torch. They do what ``bdf_batched.Plain``
does; tests compare them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.flow.bdf_batched import PLAN, Arithmetic, Mask, Plain, Prediction, Runs, Step
from torch_gradflow.flow.bdf_compiled import CHOLESKY_LIMIT, cholesky_solve, combine, compiled, correct, formula
from torch_gradflow.flow.control import SAFETY
from torch_gradflow.flow.dense import LONGEST
from torch_gradflow.flow.method import Span
from torch_gradflow.flow.multistep import HYSTERESIS, LOYALTY, MAX_GROWTH, MAX_ORDER, MAX_POINTS, MIN_GROWTH


@compiled
def _factor(error: float, order: int) -> float:
    return SAFETY * math.pow(max(error, 1e-8), -1 / (order + 1))


@compiled
def _predict(numbers: Any, theta: Any, t_end: float, rtol: float, atol: float, plans: Any, rows: Any) -> None:
    table = np.empty((4, MAX_POINTS))
    for r in range(len(numbers)):
        run, plan = numbers[r], plans[r]
        t, h = run.times[0], run.h
        left = t_end - t
        h = left if h >= left * (1 - 1e-10) else min(h, 0.5 * left)
        plan.h = h
        plan.t = t_end if h == left else t + h
        plan.order = min(run.order, max(1, run.n_points - 1))
        plan.tau = math.log1p((plan.t - t) / (t - run.origin + run.unit))
        if run.n_points == 1:
            table[:] = 0.0
            table[0, 0], table[0, 1], table[1, 1] = 1.0, h, 1.0
            plan.a, plan.below, plan.own, plan.above = 1 / h, 0.0, 0.5, 0.0
        else:
            found = formula(run.times, run.n_points, plan.t, run.origin, run.unit, plan.order, table)
            plan.a, plan.below, plan.own, plan.above = found
        combine(table, theta[r], rtol, atol, rows[r])


@compiled
def _accept(run: Any, plan: Any, after: Any, low: float, own: float, high: float) -> None:
    order, n_steps = plan.order, run.n_steps + 1
    factor, next_order = _factor(own, order), order
    if plan.below != 0.0 and LOYALTY * _factor(low, order - 1) > factor:
        factor, next_order = LOYALTY * _factor(low, order - 1), order - 1
    if plan.above != 0.0 and order < MAX_ORDER and n_steps > order and LOYALTY * _factor(high, order + 1) >= factor:
        factor, next_order = LOYALTY * _factor(high, order + 1), order + 1
    if run.n_failures > 0:
        factor = min(factor, 1.0)
    bounded = min(10.0 if run.n_points == 1 else MAX_GROWTH, max(MIN_GROWTH, factor))
    factor = 1.0 if 1.0 <= factor <= HYSTERESIS else bounded
    longer = math.expm1(min(factor * plan.tau, LONGEST)) * (plan.t - run.origin + run.unit)
    after.times[0] = plan.t
    for i in range(MAX_POINTS - 1):
        after.times[i + 1] = run.times[i]
    after.n_points = min(run.n_points + 1, MAX_POINTS)
    after.h = max(run.h, longer) if plan.h < run.h else longer
    after.order = next_order
    after.n_steps = n_steps if next_order == order else 0
    after.n_failures = 0
    after.error = own
    after.last_order = order
    after.n_accepted += 1


@compiled
def _reject(run: Any, plan: Any, after: Any, own: float, is_solved: bool) -> None:
    error = own if is_solved and own > 1 else math.inf
    shorter = 0.35 if math.isinf(error) else max(0.2, min(0.8, SAFETY * error ** (-1 / (run.order + 1))))
    after.h = plan.h * shorter
    if is_solved:
        after.error = error
    after.n_failures += 1
    after.n_steps = 0
    if after.n_failures >= 3:
        after.order = 1
        after.n_points = min(run.n_points, 2)
    after.n_rejected += 1


@compiled
def _finish(
    numbers: Any,
    theta: Any,
    plans: Any,
    rows: Any,
    delta: Any,
    loss: Any,
    gradient: Any,
    solved: Any,
    after: Any,
    after_theta: Any,
    slopes: Any,
    energy: Any,
    accepted: Any,
) -> None:
    for r in range(len(numbers)):
        plan = plans[r]
        low, own, high, change = correct(delta[r], gradient[r], plan.a, rows[r], after_theta[r, 0], slopes[r])
        low, own, high = plan.below * low, plan.own * own, plan.above * high
        energy[r, 0], energy[r, 1] = loss[r] + change, 0.0
        for p in range(slopes.shape[1]):
            energy[r, 1] += slopes[r, p] ** 2
        accepted[r] = solved[r] and own <= 1 and math.isfinite(energy[r, 0])
        if accepted[r]:
            after_theta[r, 1:] = theta[r, :-1]
            _accept(numbers[r], plan, after[r], low, own, high)
        else:
            after_theta[r] = theta[r]
            _reject(numbers[r], plan, after[r], own, solved[r])


@compiled
def _solve(plans: Any, rows: Any, gradient: Any, hessian: Any, delta: Any, solved: Any) -> None:
    """The lower triangles of H become Cholesky factors of H + a, with inverse diagonals."""
    for r in range(len(plans)):
        solved[r] = cholesky_solve(hessian[r], plans[r].a, gradient[r], rows[r, 1], hessian[r], delta[r])
        if not solved[r]:
            delta[r] = 0.0


class Compiled(Arithmetic):
    """See ``Arithmetic``; in float64 on the CPU."""

    def predict(self, runs: Runs, span: Span) -> Prediction:
        """See ``Arithmetic``."""
        k, _, size = runs.theta.shape
        found = Prediction(np.empty(k, PLAN), torch.from_numpy(np.empty((k, 5, size))))
        _predict(runs.numbers, runs.theta.numpy(), span.t_end, span.rtol, span.atol, found.plans, found.rows.numpy())
        return found

    def solve(self, prediction: Prediction, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Arithmetic``."""
        if gradient.shape[1] > CHOLESKY_LIMIT:
            return Plain().solve(prediction, gradient, hessian)
        delta, solved = np.empty(gradient.shape), np.empty(len(gradient), dtype=np.bool_)
        rows, matrices = prediction.rows.numpy(), hessian.contiguous().numpy()
        _solve(prediction.plans, rows, gradient.contiguous().numpy(), matrices, delta, solved)
        return torch.from_numpy(delta), torch.from_numpy(solved)

    def finish(
        self, runs: Runs, prediction: Prediction, delta: Tensor, loss: Tensor, gradient: Tensor, solved: Tensor
    ) -> Step:
        """See ``Arithmetic``."""
        k, _, size = runs.theta.shape
        numbers, theta = runs.numbers.copy(), np.empty(runs.theta.shape)
        slope, energy = np.empty((k, size)), np.empty((k, 2))
        accepted: Mask = np.empty(k, dtype=np.bool_)
        given = (delta, loss, gradient, solved)
        _finish(
            runs.numbers,
            runs.theta.numpy(),
            prediction.plans,
            prediction.rows.numpy(),
            *(tensor.contiguous().numpy() for tensor in given),
            numbers,
            theta,
            slope,
            energy,
            accepted,
        )
        after = Runs(numbers, torch.from_numpy(theta))
        return Step(after, accepted, torch.from_numpy(energy)[:, 0], torch.from_numpy(slope), energy)
