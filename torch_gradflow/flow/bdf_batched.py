"""Backward differentiation for many runs at once: the method of ``bdf`` with one more dimension, so that its calls are shared.

For small networks a step is some dozens of calls around a few µs of work. Here each call works on all runs: the numbers of a
run (times, step size, order, rejections) are an element of a numpy array, its points rows of a tensor. Runs have nothing in
common but that their steps are tried in lockstep: each has steps, orders and rejections of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_gradflow.flow.bdf import COMPILED_LIMIT, UNIT, VERIFY_ABOVE
from torch_gradflow.flow.control import CLOCK, SAFETY, first_step_size, weights
from torch_gradflow.flow.dense import LONGEST, Clock, polynomial
from torch_gradflow.flow.method import Span
from torch_gradflow.flow.multistep import HYSTERESIS, LOYALTY, MAX_GROWTH, MAX_ORDER, MAX_POINTS, MIN_GROWTH
from torch_gradflow.flow.solution import Knot

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
# The numbers of a run: times of its accepted points, newest first, and how many there are; the step size to come, its order,
# and accepted and rejected steps in a row, from which these follow (see ``OrderControl``); its clock (see ``Clock``); the last
# step's error in units of the tolerance, and the last accepted step's order (0 before it); steps so far.
RUN = np.dtype(
    [
        ("times", np.float64, MAX_POINTS),
        ("n_points", np.int64),
        ("h", np.float64),
        ("order", np.int64),
        ("n_steps", np.int64),
        ("n_failures", np.int64),
        ("origin", np.float64),
        ("unit", np.float64),
        ("error", np.float64),
        ("last_order", np.int64),
        ("n_accepted", np.int64),
        ("n_rejected", np.int64),
    ]
)
# What a run's step is: its length, end and order; α/h of its equation in t; h/(t − t_j) for the degrees k − 1, k, k + 1, or 0
# where there is no such formula; its length in logarithmic time.
PLAN = np.dtype(
    [
        ("h", np.float64),
        ("t", np.float64),
        ("order", np.int64),
        ("a", np.float64),
        ("below", np.float64),
        ("own", np.float64),
        ("above", np.float64),
        ("tau", np.float64),
    ]
)
# L, ∇L and (the second one) H for some of the runs: their places, and a point for each, shape ``(len(places), P)``.
GradientsAt = Callable[[Integers, Tensor], tuple[Tensor, Tensor]]
HessiansAt = Callable[[Integers, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Runs:
    """Where k runs stand; never written to.

    Attributes:
        numbers: Of the type ``RUN``, shape ``(k,)``.
        theta: θ at the accepted points, shape ``(k, MAX_POINTS, P)``; before the first step dθ/dt follows the one point.
    """

    numbers: NDArray[Any]
    theta: Tensor

    @classmethod
    def starting(cls, knots: Sequence[Knot], span: Span) -> Runs:
        """Runs from these points, towards the same end with the same tolerances."""
        numbers = np.zeros(len(knots), RUN)
        numbers["n_points"] = numbers["order"] = 1
        numbers["times"][:, 0] = numbers["origin"] = [knot.t for knot in knots]
        numbers["h"] = [span.step_size or _first_step_size(knot, span) for knot in knots]
        numbers["unit"] = UNIT * numbers["h"]
        first, slope = torch.stack([knot.theta for knot in knots]), -torch.stack([knot.gradient for knot in knots])
        rest = first.new_zeros(len(knots), MAX_POINTS - 2, first.shape[1])
        return cls(numbers, torch.cat([first[:, None], slope[:, None], rest], dim=1))

    def chosen(self, places: Integers) -> Runs:
        """Some of them."""
        return Runs(self.numbers[places], self.theta[torch.from_numpy(places).to(self.theta.device)])

    def joined(self, others: Runs) -> Runs:
        """These, then the others."""
        return Runs(np.concatenate([self.numbers, others.numbers]), torch.cat([self.theta, others.theta]))

    @property
    def t(self) -> Numbers:
        """The flow times at which they stand."""
        times: Numbers = self.numbers["times"][:, 0]
        return times

    def stuck(self) -> Mask:
        """Whose step sizes are below what moves the clock."""
        t, h = self.t, self.numbers["h"]
        found: Mask = (t + h == t) | (h <= CLOCK * abs(t)) | (h < 1e-300)
        return found

    def between(self, place: int, t: float) -> Tensor:
        """θ(t) over the last step of a run, shape ``(P,)``."""
        run = self.numbers[place]
        n = min(int(run["last_order"]) + 2, int(run["n_points"]))
        clock = Clock(float(run["origin"]), float(run["unit"]))
        return polynomial(t, run["times"][:n].tolist(), self.theta[place], clock)


def _first_step_size(knot: Knot, span: Span) -> float:
    return first_step_size(knot.theta, knot.gradient, cap=span.t_end - knot.t, rtol=span.rtol, atol=span.atol)


@dataclass(frozen=True)
class Prediction:
    """The steps of k runs, before anything is evaluated.

    Attributes:
        plans: Of the type ``PLAN``, shape ``(k,)``.
        rows: p_k, its slope by t, p_{k−1}, p_{k+1} and the tolerated errors, shape ``(k, 5, P)``.
    """

    plans: NDArray[Any]
    rows: Tensor

    @property
    def a(self) -> Tensor:
        """α/h, shape ``(k, 1)``."""
        return self.rows.new_tensor(self.plans["a"])[:, None]


@dataclass(frozen=True)
class Step:
    """What trying a step of every run led to.

    Attributes:
        runs: Where they stand now.
        accepted: Whose steps were.
        loss: L at the new points, as the linearisation has it, shape ``(k,)``.
        gradient: ∇L there, shape ``(k, P)``.
        energy: L and ‖∇L‖² there, as numbers, shape ``(k, 2)``.
    """

    runs: Runs
    accepted: Mask
    loss: Tensor
    gradient: Tensor
    energy: Numbers


class Arithmetic(ABC):
    """What steps compute besides evaluations."""

    @abstractmethod
    def predict(self, runs: Runs, span: Span) -> Prediction:
        """The steps to be tried."""

    @abstractmethod
    def solve(self, prediction: Prediction, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """θ − p_k by gradient and Hessian at p_k, and for which runs H + a is positive definite; ``hessian`` is lost."""

    @abstractmethod
    def finish(
        self, runs: Runs, prediction: Prediction, delta: Tensor, loss: Tensor, gradient: Tensor, solved: Tensor
    ) -> Step:
        """What follows from θ − p_k, from loss and gradient at p_k, and from whether the equations were solved."""


class Plain(Arithmetic):
    """In numpy, and on tensors of any kind."""

    def predict(self, runs: Runs, span: Span) -> Prediction:
        """See ``Arithmetic``."""
        t, left, wanted = runs.t, span.t_end - runs.t, runs.numbers["h"]
        plans = np.zeros(len(t), PLAN)
        h = np.where(wanted >= left * (1 - 1e-10), left, np.minimum(wanted, 0.5 * left))  # see ``method.approaches``
        plans["h"], plans["t"] = h, np.where(h == left, span.t_end, t + h)
        plans["order"] = np.minimum(runs.numbers["order"], np.maximum(1, runs.numbers["n_points"] - 1))
        rows = runs.theta.new_tensor(_formulas(runs.numbers, plans)) @ runs.theta
        tolerated = weights(span.rtol, span.atol, runs.theta[:, 0], rows[:, 0])
        return Prediction(plans, torch.cat([rows, tolerated[:, None]], dim=1))

    def solve(self, prediction: Prediction, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Arithmetic``."""
        factor, solved = _factorised(prediction, hessian)
        return _solve(factor, -(gradient + prediction.rows[:, 1])), solved

    def finish(
        self, runs: Runs, prediction: Prediction, delta: Tensor, loss: Tensor, gradient: Tensor, solved: Tensor
    ) -> Step:
        """See ``Arithmetic``."""
        plans, rows = prediction.plans, prediction.rows
        new = rows[:, 0] + delta
        slope = -(rows[:, 1] + prediction.a * delta)
        apart = (new[:, None] - rows[:, [2, 0, 3]]) / rows[:, 4:]
        loss = loss + 0.5 * ((gradient + slope) * delta).sum(1)
        norms, others = apart.square_().mean(2).sqrt_(), (loss, slope.square().sum(1), solved)
        found = torch.cat([norms, *(other[:, None].to(loss.dtype) for other in others)], dim=1)
        numbers = found.to("cpu", torch.float64).numpy()
        errors, is_solved = (
            numbers[:, :3] * np.stack([plans["below"], plans["own"], plans["above"]], axis=1),
            numbers[:, 5] != 0,
        )
        accepted = is_solved & (errors[:, 1] <= 1) & np.isfinite(numbers[:, 3])
        after = _after_acceptance(runs.numbers, plans, errors)
        theta = torch.cat([new[:, None], runs.theta[:, :-1]], dim=1)
        if not accepted.all():
            after = np.where(accepted, after, _after_rejection(runs.numbers, plans, errors[:, 1], is_solved))
            theta = torch.where(torch.from_numpy(accepted).to(theta.device)[:, None, None], theta, runs.theta)
        return Step(Runs(after, theta), accepted, loss, slope, numbers[:, 3:5])


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # of points that are not there
def _formulas(numbers: NDArray[Any], plans: NDArray[Any]) -> Numbers:
    """The weights of the points in p_k, its slope by t, p_{k−1} and p_{k+1}, shape ``(k, 4, MAX_POINTS)``, 0 where unused.

    ``multistep.formula`` with one more dimension, in logarithmic time; it completes the plans. Where there is one point only,
    dθ/dt takes the second one's place: p = θ_0 + h dθ/dt, and the error's constant is 1/2.
    """
    times, n, order = numbers["times"], numbers["n_points"], plans["order"]
    since = times + (numbers["unit"] - numbers["origin"])[:, None]
    plans["tau"] = tau = np.log1p((plans["t"] - times[:, 0]) / since[:, 0])
    speed = 1 / (plans["t"] - numbers["origin"] + numbers["unit"]) / tau
    ages = np.log1p((times[:, :1] - times) / since) / tau[:, None]
    reach = 1 + ages  # (t − t_j)/h
    points = np.arange(MAX_POINTS)
    factors = reach[:, None, :] / (ages[:, None, :] - ages[:, :, None])
    factors[:, points, points] = 1.0
    products = factors.cumprod(2)  # at [:, i, j] the weight of θ_i in p_j, for i ≤ j
    runs, k, above = np.arange(len(n)), order[:, None], np.minimum(order + 1, MAX_POINTS - 1)
    has_lower, has_higher = order > 1, n > order + 1
    inverse = 1 / reach
    terms = np.where(points <= k, inverse, 0.0)
    predictor = np.where(points <= k, products[runs, :, order], 0.0)
    slope = predictor * (terms.sum(1, keepdims=True) - terms) * speed[:, None]
    lower = np.where((points < k) & has_lower[:, None], products[runs, :, order - 1], 0.0)
    higher = np.where((points <= k + 1) & has_higher[:, None], products[runs, :, above], 0.0)
    table = np.stack([predictor, slope, lower, higher], axis=1)
    first = n == 1
    table[first] = 0.0
    table[first, 0, 0], table[first, 0, 1], table[first, 1, 1] = 1.0, plans["h"][first], 1.0
    plans["a"] = np.where(first, 1 / plans["h"], np.where(points < k, inverse, 0.0).sum(1) * speed)
    plans["below"] = np.where(has_lower, inverse[runs, order - 1], 0.0)
    plans["own"] = np.where(first, 0.5, inverse[runs, order])
    plans["above"] = np.where(has_higher, inverse[runs, above], 0.0)
    return table


@cache
def arithmetic_for(device: torch.device, dtype: torch.dtype, n_parameters: int) -> Arithmetic:
    """Which serves: compiled for few parameters in float64 on a CPU, where Numba can be imported."""
    if device.type != "cpu" or dtype != torch.float64 or n_parameters > COMPILED_LIMIT:
        return Plain()
    try:
        found: Arithmetic = import_module("torch_gradflow.flow.bdf_batched_compiled").Compiled()
    except ImportError:
        return Plain()
    return found


def try_step(runs: Runs, span: Span, hessians_at: HessiansAt, gradients_at: GradientsAt) -> Step:
    """Try a step of every run, as ``bdf`` does.

    Args:
        runs: Where they stand.
        span: Where to, and how accurately; its other numbers are not looked at.
        hessians_at: Evaluates; NaN for a run makes its step a rejected one. The Hessians are written to.
        gradients_at: The same without Hessians, for tolerances at which the linearisation is verified.
    """
    arithmetic = arithmetic_for(runs.theta.device, runs.theta.dtype, runs.theta.shape[2])
    prediction = arithmetic.predict(runs, span)
    loss, gradient, hessian = hessians_at(np.arange(len(prediction.plans)), prediction.rows[:, 0].contiguous())
    if span.rtol > VERIFY_ABOVE:
        delta, solved = _verified(prediction, gradient, hessian, gradients_at)
    else:
        delta, solved = arithmetic.solve(prediction, gradient, hessian)
    return arithmetic.finish(runs, prediction, delta, loss, gradient, solved)


def _factorised(prediction: Prediction, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of H + a, and whether they exist; ``hessian`` is written to."""
    hessian.diagonal(dim1=1, dim2=2).add_(prediction.a)
    factor, info = torch.linalg.cholesky_ex(hessian)
    return factor, info == 0


def _verified(prediction: Prediction, gradient: Tensor, hessian: Tensor, gradients_at: GradientsAt) -> tuple[Tensor, Tensor]:
    """Simplified Newton iterations, see ``bdf.Direct``, each for those runs that have not settled; δ, and who has."""
    rows, a = prediction.rows, prediction.a
    factor, solved = _factorised(prediction, hessian)
    delta, settled = _solve(factor, -(gradient + rows[:, 1])), torch.zeros_like(solved)
    busy = solved.nonzero()[:, 0]
    before = torch.full_like(busy, torch.inf, dtype=delta.dtype)
    for _ in range(4):
        if not len(busy):
            break
        own = delta[busy]
        _, there = gradients_at(busy.cpu().numpy(), rows[busy, 0] + own)
        change = _solve(factor[busy], -(there + rows[busy, 1] + a[busy] * own))
        size = (change / rows[busy, 4]).square_().mean(1).sqrt_().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        delta[busy] = own + change
        settled[busy] = size < 0.1
        going_on = (size >= 0.1) & ~(size > 0.9 * before)
        busy, before = busy[going_on], size[going_on]
    return delta, settled


@np.errstate(invalid="ignore", over="ignore")  # of steps that are not accepted
def _after_acceptance(numbers: NDArray[Any], plans: NDArray[Any], errors: Numbers) -> NDArray[Any]:
    """The runs after accepted steps: ``OrderControl.accepted``, and what follows from it."""
    first, n_steps, order = numbers["n_points"] == 1, numbers["n_steps"] + 1, plans["order"]
    lower, factor, higher = (SAFETY * np.maximum(errors[:, i], 1e-8) ** (-1 / (order + i)) for i in range(3))
    down = (plans["below"] != 0) & (LOYALTY * lower > factor)
    factor, next_order = np.where(down, LOYALTY * lower, factor), np.where(down, order - 1, order)
    up = (plans["above"] != 0) & (order < MAX_ORDER) & (n_steps > order) & (LOYALTY * higher >= factor)
    factor, next_order = np.where(up, LOYALTY * higher, factor), np.where(up, order + 1, next_order)
    factor = np.where(numbers["n_failures"] > 0, np.minimum(factor, 1.0), factor)
    bounded = np.clip(factor, MIN_GROWTH, np.where(first, 10.0, MAX_GROWTH))
    factor = np.where((factor >= 1.0) & (factor <= HYSTERESIS), 1.0, bounded)
    longer = np.expm1(np.minimum(factor * plans["tau"], LONGEST)) * (plans["t"] - numbers["origin"] + numbers["unit"])
    after = numbers.copy()
    after["times"][:, 1:], after["times"][:, 0] = numbers["times"][:, :-1], plans["t"]
    after["n_points"] = np.minimum(numbers["n_points"] + 1, MAX_POINTS)
    # A step that was cut to end somewhere says nothing against the step size that was wanted.
    after["h"] = np.where(plans["h"] < numbers["h"], np.maximum(numbers["h"], longer), longer)
    after["order"], after["n_steps"], after["n_failures"] = next_order, np.where(next_order != order, 0, n_steps), 0
    after["error"], after["last_order"] = errors[:, 1], order
    after["n_accepted"] += 1
    return after


@np.errstate(invalid="ignore", over="ignore")  # of steps that are not rejected
def _after_rejection(numbers: NDArray[Any], plans: NDArray[Any], own: Numbers, is_solved: Mask) -> NDArray[Any]:
    """The runs after rejected steps: ``OrderControl.rejected``, and what follows from it."""
    error = np.where(is_solved & (own > 1), own, np.inf)
    shorter = np.clip(SAFETY * error ** (-1 / (numbers["order"] + 1)), 0.2, 0.8)
    after = numbers.copy()
    after["h"] = plans["h"] * np.where(np.isinf(error), 0.35, shorter)
    after["error"] = np.where(is_solved, error, numbers["error"])
    after["n_failures"] += 1
    after["n_steps"] = 0
    late = after["n_failures"] >= 3  # the past says nothing any more
    after["order"][late] = 1
    after["n_points"][late] = np.minimum(numbers["n_points"][late], 2)
    after["n_rejected"] += 1
    return after


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
