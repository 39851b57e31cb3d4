"""bdf and bdf-cg: formulas, compiled arithmetic, order, stiffness, saddles, ends of every kind, steps of an optimizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torch_gradflow import GradientFlow, integrate
from torch_gradflow.flow import bdf, bdf_cg, bdf_compiled
from torch_gradflow.flow.bdf import Bdf, CompiledAlgebra, Corrector, Direct, PlainAlgebra, algebra_for
from torch_gradflow.flow.bdf_cg import BdfCg, ConjugateGradients, Eigenbasis, RitzVectors
from torch_gradflow.flow.control import first_step_size
from torch_gradflow.flow.dense import Clock, polynomial
from torch_gradflow.flow.method import Arrival, Memory, RunEnd, Span
from torch_gradflow.flow.multistep import MAX_ORDER, MAX_POINTS, OrderControl, formula
from torch_gradflow.flow.solution import FlowReport, FlowSolution, Knot
from torch_gradflow.flow.stopping import FlowTime, GradientNorm, LossPlateau, LossValue, StoppingRule
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.regularized import Rescaled

BOTH = ("bdf", "bdf-cg")
T33_TIMES = (1.0, 10.0, 100.0, 1000.0)


def function(term: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype = torch.float64) -> FunctionObjective:
    return FunctionObjective(lambda: (term,), n, dtype, torch.device("cpu"))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def t33(seed: int = 1, n_samples: int = 300, dtype: torch.dtype | None = None) -> tuple[ModuleObjective, Tensor]:
    model, x, y = teacher_student(seed, n_samples=n_samples)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y), dtype=dtype)
    return objective, objective.initial_theta()


@cache
def reference(seed: int = 1, times: tuple[float, ...] = T33_TIMES) -> Tensor:
    """θ of T33 with 300 samples by scipy's Radau on derivatives written out in numpy: nothing is shared with the package."""
    model, x, y = teacher_student(seed, n_samples=300)
    problem = NumpyPerceptron(x, y, 8)
    field = lambda t, theta: -problem.loss_and_gradient(theta)[1]  # noqa: E731
    start = flat(model).numpy()
    solution = solve_ivp(field, (0, times[-1]), start, method="Radau", rtol=1e-10, atol=1e-12, t_eval=times)
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))


def deep_tanh(seed: int = 0) -> tuple[ModuleObjective, Tensor]:
    """A 2-20-20-1 tanh network on 200 samples: 501 parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.randn(200, 2, dtype=torch.float64)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, torch.sin(2 * x[:, :1]) * x[:, 1:]))
    return objective, objective.initial_theta()


def errors(found: Tensor, true: Tensor) -> Tensor:
    """‖Δθ‖/‖θ‖ of each row."""
    return (found - true).norm(dim=-1) / true.norm(dim=-1)


def same(a: FlowSolution, b: FlowSolution) -> bool:
    return torch.equal(a.t, b.t) and torch.equal(a.theta, b.theta) and torch.equal(a.loss, b.loss)


# The formulas


def random_times(rng: np.random.Generator, n: int) -> tuple[list[float], float]:
    """n decreasing times with steps that differ by up to a factor of ten, and the step that comes next."""
    steps = 10 ** rng.uniform(-0.5, 0.5, n)
    return [float(t) for t in rng.uniform(-3, 3) - np.concatenate([[0], np.cumsum(steps[1:])])], float(steps[0])


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_formula_is_exact_for_polynomials(order: int) -> None:
    """Predictors of degree k − 1, k, k + 1 and the slope agree with numpy's polynomials on random step sequences."""
    rng = np.random.default_rng(order)
    for _ in range(20):
        times, h = random_times(rng, order + 2)
        plan = formula(times, h, order)
        t = times[0] + h
        for degree, weights in ((order - 1, plan.lower), (order, plan.predictor), (order + 1, plan.higher)):
            if degree == 0:
                assert weights is None
                continue
            assert weights is not None and len(weights) == degree + 1
            p = np.polynomial.Polynomial(rng.standard_normal(degree + 1), domain=[t - 1, t + 1])
            value = sum(w * p(s) for w, s in zip(weights, times, strict=False))
            scale = sum(abs(w * p(s)) for w, s in zip(weights, times, strict=False))
            assert value == pytest.approx(p(t), abs=1e-13 * scale)
            if degree == order:
                slope = sum(w * p(s) for w, s in zip(plan.slope, times, strict=False)) / h
                scale = sum(abs(w * p(s)) for w, s in zip(plan.slope, times, strict=False)) / h
                assert slope == pytest.approx(p.deriv()(t), abs=1e-13 * scale)


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_formula_with_equal_steps_is_the_textbooks(order: int) -> None:
    """p′ + α/h (θ − p) is Σ_{j ≤ k} ∇^j θ / j, by exact arithmetic; h/(t − t_k) is 1/(k + 1)."""
    plan = formula([-float(j) for j in range(order + 2)], 1.0, order)
    # Weights of θ_new, θ_0, …: of the backward differences of θ_new.
    expected = [Fraction(0)] * (order + 1)
    for j in range(1, order + 1):
        for i in range(j + 1):
            expected[i] += Fraction((-1) ** i * math.comb(j, i), j)
    # θ_k has no weight: it is in the predictor and leaves again.
    rest = [s - plan.alpha * p for s, p in zip(plan.slope, plan.predictor, strict=True)]
    assert [plan.alpha, *rest] == pytest.approx([*(float(e) for e in expected), 0.0], abs=1e-12)
    assert plan.constants == pytest.approx([1 / order, 1 / (order + 1), 1 / (order + 2)])


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_formula_meets_the_equation_that_defines_it(order: int) -> None:
    """The polynomial through the new point and θ_0 … θ_{k−1} has the slope p_k′ + (α/h) δ there."""
    rng = np.random.default_rng(10 + order)
    times, h = random_times(rng, order + 2)
    values, new = rng.standard_normal(order + 2), rng.standard_normal()
    plan = formula(times, h, order)
    delta = new - sum(w * v for w, v in zip(plan.predictor, values, strict=False))
    slope = (sum(w * v for w, v in zip(plan.slope, values, strict=False)) + plan.alpha * delta) / h
    t = times[0] + h
    through = np.polynomial.Polynomial.fit([t, *times[:order]], [new, *values[:order]], order)
    assert slope == pytest.approx(through.deriv()(t), rel=1e-7, abs=1e-7)


def test_the_next_order_is_the_one_that_allows_longer_steps() -> None:
    """Up only after k + 1 steps and never past 6; down at once; loyal where orders are alike; no growth after a rejection."""
    new, old = OrderControl(3, 0), OrderControl(3, 3)
    assert new.accepted(0.1, 0.5, 1e-4, False)[1] == OrderControl(3, 1)
    assert old.accepted(0.1, 0.5, 1e-4, False)[1] == OrderControl(4, 0)
    assert old.accepted(0.1, 1e-4, 0.5, False)[1] == OrderControl(2, 0)
    assert OrderControl(6, 9).accepted(0.1, 0.5, 1e-8, False)[1].order == 6
    alike = 0.5
    assert old.accepted(alike ** (4 / 4), alike ** (3 / 4), alike ** (5 / 4), False)[1].order == 3
    assert old.accepted(0.5, None, None, False)[0] == 1.0  # within the hysteresis
    assert old.accepted(1e-8, None, None, False)[0] == 3.0
    assert OrderControl(1, 0).accepted(1e-8, None, None, True)[0] == 10.0
    assert OrderControl(3, 0, 1).accepted(1e-8, None, None, False)[0] == 1.0
    factor, control = old.rejected(16.0)
    assert factor == pytest.approx(0.45)
    assert control == OrderControl(3, 0, 1)
    assert control.rejected(math.inf)[1].rejected(2.0)[1] == OrderControl(1, 0, 3)


# Compiled arithmetic

SIZES = (1, 2, 33, 64, 65, 200)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_compiled_arithmetic_is_the_plain_one(order: int, n: int) -> None:
    """Predictions, slopes, tolerated errors, error norms, history and gradient agree to rounding, with few points too."""
    rng = np.random.default_rng(100 * order + n)
    generator = torch.Generator().manual_seed(order)
    for n_points in range(order + 1, MAX_POINTS + 1):
        times, h = random_times(rng, n_points)
        theta = torch.randn(n_points, n, generator=generator, dtype=torch.float64)
        clock = Clock(times[-1] - 1.0, float(rng.uniform(0.1, 10.0)))
        arguments = (tuple(times), times[0] + h, clock, order, theta, 1e-6, 1e-8)
        plain, compiled = PlainAlgebra().predict(*arguments), bdf_compiled.predict(*arguments)
        assert compiled[0] == pytest.approx(plain[0], rel=1e-13)
        assert compiled[1] == pytest.approx(plain[1], rel=1e-13)
        size = 1e3 * theta.abs().max() * max(1, 1 / h) * 10.0**order
        known = [0, 1, 2, 3, 4] if order > 1 else [0, 1, 3, 4]  # there is no order below the first
        assert torch.allclose(compiled[2][known], plain[2][known], rtol=1e-12, atol=float(1e-16 * size))
        delta, gradient = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
        before, loss = theta.clone(), torch.tensor(0.7, dtype=torch.float64)
        ours = bdf_compiled.finish(delta, loss, gradient, 2.5, theta, plain[2])
        theirs = PlainAlgebra().finish(delta, loss, gradient, 2.5, theta, plain[2])
        assert ours[0] == pytest.approx(theirs[0], rel=1e-11)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-11, abs=1e-11)
        for one, other in zip(ours[2:], theirs[2:], strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-13, atol=1e-13)
        assert torch.equal(theta, before)
        assert torch.equal(ours[2][1:], before[: MAX_POINTS - 1])


@pytest.mark.parametrize("n", SIZES)
def test_compiled_factorisation_is_torchs(n: int) -> None:
    """δ agrees; a negative eigenvalue of H + a is found wherever it hides; H is left alone."""
    generator = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    gradient, slope = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    for least, good in ((-0.9, True), (-1.1, False), (math.nan, False)):
        hessian = (q * torch.cat([vector(least), torch.logspace(-3, 3, n, dtype=torch.float64)[1:]])) @ q.T
        hessian = 0.5 * (hessian + hessian.T)
        before = hessian.clone()
        delta = bdf_compiled.solve(hessian, 1.0, gradient, torch.stack([gradient, slope]))
        assert torch.equal(hessian.nan_to_num(), before.nan_to_num())
        assert (delta is not None) == good
        if delta is not None:
            wanted = torch.linalg.solve(hessian + torch.eye(n, dtype=torch.float64), -(gradient + slope))
            assert torch.allclose(delta, wanted, rtol=1e-9, atol=1e-11)


def test_compiled_arithmetic_serves_few_parameters_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert isinstance(algebra_for(cpu, torch.float64, 33), CompiledAlgebra)
    assert isinstance(algebra_for(cpu, torch.float32, 33), PlainAlgebra)
    assert isinstance(algebra_for(cpu, torch.float64, bdf.COMPILED_LIMIT + 1), PlainAlgebra)
    assert isinstance(algebra_for(torch.device("cuda"), torch.float64, 33), PlainAlgebra)


def test_both_arithmetics_follow_the_same_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, theta0 = t33()
    compiled = integrate(objective, theta0, (0.0, 100.0), method="bdf")
    monkeypatch.setattr(bdf, "algebra_for", lambda *args: PlainAlgebra())
    plain = integrate(objective, theta0, (0.0, 100.0), method="bdf")
    assert plain.n_accepted == compiled.n_accepted
    assert errors(plain.theta[-1], compiled.theta[-1]) < 1e-9


class Kept(Objective):
    """½ θᵀHθ that hands out its own H, as an objective of the user's may."""

    def __init__(self, h: Tensor) -> None:
        self.h, self.n_parameters, self.dtype, self.device = h, len(h), h.dtype, h.device
        self.resolution = torch.finfo(h.dtype).eps
        self.counts = function(torch.sum, 1).counts

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        return 0.5 * theta @ self.h @ theta, self.h @ theta

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        self.counts.n_hvp += 1
        return self.h @ vectors

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        return self.h


@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
@pytest.mark.parametrize("n", [3, 80])
@pytest.mark.parametrize("method", BOTH)
def test_a_hessian_that_the_objective_keeps_is_left_alone(method: str, n: int, rtol: float) -> None:
    eigenvalues = torch.logspace(-2, 2, n, dtype=torch.float64)
    objective = Kept(torch.diag(eigenvalues))
    theta0 = torch.ones(n, dtype=torch.float64)
    solution = integrate(objective, theta0, (0.0, 3.0), method=method, rtol=rtol)
    assert torch.equal(objective.h, torch.diag(eigenvalues))
    assert errors(solution.theta[-1], torch.exp(-3 * eigenvalues)) < 3 * rtol


# Logarithmic time


def test_clock_is_logarithmic_and_exact_over_short_steps() -> None:
    clock = Clock(origin=2.0, unit=1e-3)
    assert clock.of(2.0) == 0.0
    for t in (2.0, 2.0005, 3.0, 1e6):
        assert clock.rate(t) == pytest.approx((clock.of(t * (1 + 1e-7)) - clock.of(t)) / (t * 1e-7), rel=1e-3)
        assert t + clock.after(t, 0.3) == pytest.approx(2.0 + clock.unit * math.expm1(clock.of(t) + 0.3), rel=1e-12)
        assert clock.between(t, 2 * t) == pytest.approx(clock.of(2 * t) - clock.of(t), rel=1e-12)
    # A step of 1e-12 t: the difference of two values of ``of`` has lost all but three digits.
    later = 1e6 + 1e-6
    assert clock.between(1e6, later) == pytest.approx((later - 1e6) / (1e6 - 2.0 + 1e-3), rel=1e-9)
    assert math.isfinite(clock.after(1e200, 1e3))


@pytest.mark.parametrize("degree", range(1, 8))
def test_interpolation_is_exact_for_polynomials_in_logarithmic_time(degree: int) -> None:
    """At accepted points to the last bits, between them to rounding."""
    clock = Clock(origin=1.0, unit=0.1)
    p = np.polynomial.Polynomial(np.random.default_rng(degree).standard_normal(degree + 1))
    times = [1.0 + 5.0 * 0.7**j for j in range(degree + 1)]
    value = lambda t: vector(p(clock.of(t)), -3 * p(clock.of(t)))  # noqa: E731
    memory = Memory(tuple(times), torch.stack([value(t) for t in times]), degree, None, (), clock)
    for t in [*times, *np.linspace(times[1], times[0], 7).tolist()]:
        assert torch.allclose(memory(t), value(t), rtol=1e-10, atol=1e-11)
    assert torch.equal(memory(times[1]), value(times[1]))
    assert memory.covers(times[1]) and memory.covers(times[0])
    assert not memory.covers(math.nextafter(times[1], 0)) and not memory.covers(math.nextafter(times[0], 9))


def test_interpolation_without_a_clock_is_in_time_itself() -> None:
    theta = torch.stack([vector(t**2) for t in (3.0, 2.0, 0.5)])
    assert float(polynomial(1.7, (3.0, 2.0, 0.5), theta)) == pytest.approx(1.7**2)


def test_steps_far_below_the_rounding_of_logarithmic_time() -> None:
    """Pieces of 1e-11 of the time that has passed: θ moves on by what it should, and nothing divides by zero."""
    objective = function(lambda x: 0.5 * (x**2).sum(), 1)
    end = Bdf().run(objective, at(objective, vector(1.0)), Span(30.0, 1e-8, 1e-40), lambda arrival: False)
    for _ in range(20):
        memory, knot = end.memory, end.knot
        assert memory is not None
        span = Span(knot.t + 1e-14 * 30, 1e-8, 1e-40, end.step_size)
        end = Bdf().run(objective, knot, span, lambda arrival: False, memory)
        assert end.status == "t_end"
    assert float(end.knot.theta) == pytest.approx(math.exp(-end.knot.t), rel=1e-6)


# Order and tolerance


def at(objective: Objective, theta: Tensor, t: float = 0.0) -> Knot:
    return Knot(t, theta, *objective.loss_and_gradient(theta))


def predicted(theta: Tensor, slope: Tensor, tolerated: Tensor) -> Tensor:
    """Rows of a prediction."""
    return torch.stack([theta, slope, theta, theta, tolerated])


# Its time is t itself, to 10 digits.
LINEAR = Clock(0.0, 1e10)


def fixed_steps(order: int, n: int, correct: Callable[[Objective], Corrector]) -> float:
    """The error at t = 2 of equal steps 2/n of that order on θ′ = −θ³, from exact values, by the pieces of ``Bdf``."""
    objective = function(lambda x: 0.25 * (x**4).sum(), 2)
    exact = lambda t: vector(1.5, 0.8) / (1 + 2 * vector(1.5, 0.8) ** 2 * t).sqrt()  # noqa: E731
    corrector, algebra, h = correct(objective), PlainAlgebra(), 2 / n
    theta = torch.stack([exact((order - j) * h) for j in range(order + 1)])
    for i in range(order, n):
        times = tuple((i - j) * h for j in range(len(theta)))
        a, _, rows = algebra.predict(times, times[0] + h, LINEAR, order, theta, 1e-6, 1e-8)
        found = corrector.solve(rows, a)
        assert found is not None
        theta = algebra.finish(found.delta, found.loss, found.gradient, a, theta, rows)[2]
    return float((theta[0] - exact(2.0)).norm())


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_order_with_fixed_steps(order: int) -> None:
    """Halving the steps divides the error by 2^k: one Newton step from the predicted point is enough."""
    one, other = (fixed_steps(order, n, lambda objective: Direct(objective, False)) for n in (200, 400))
    assert order - 0.5 < math.log2(one / other) < order + 0.9


def test_verification_solves_the_equation_itself() -> None:
    """Verified, a step's equation holds to a tenth of the tolerance; linearised, to the square of δ."""
    objective = function(lambda x: 0.25 * (x**4).sum() + 50 * (x[1] - x[0] ** 2) ** 2, 2)
    theta, slope, tolerated = vector(1.0, 1.0), vector(-0.5, -1.0), torch.full((2,), 1e-3, dtype=torch.float64)

    def residual(verify: bool) -> float:
        found = Direct(objective, verify).solve(predicted(theta, slope, tolerated), 3.0)
        assert found is not None
        rest = slope + 3.0 * found.delta + objective.loss_and_gradient(theta + found.delta)[1]
        hessian = objective.hessian(theta + found.delta) + 3 * torch.eye(2, dtype=torch.float64)
        return float(torch.linalg.solve(hessian, rest).norm())

    assert residual(True) < 1e-4 < residual(False)


def test_verification_gives_up_where_the_iteration_does_not_settle() -> None:
    """A quartic wall right behind the point at which the Hessian was taken."""
    objective = function(lambda x: 1e6 * (x**4).sum(), 1)
    tolerated = vector(1e-9)
    assert Direct(objective, True).solve(predicted(vector(1e-3), vector(-50.0), tolerated), 1.0) is None


def test_loose_tolerances_take_a_second_gradient_and_tight_ones_do_not() -> None:
    objective, theta0 = t33()
    loose = integrate(objective, theta0, (0.0, 100.0), method="bdf", rtol=1e-5)
    tight = integrate(objective, theta0, (0.0, 100.0), method="bdf", rtol=1e-6)
    assert loose.n_grad >= loose.n_accepted
    assert tight.n_grad <= len(tight.t) + 1  # those of the samples
    assert loose.n_hessian < tight.n_hessian <= tight.n_accepted + tight.n_rejected


EIGENVALUES = torch.logspace(-8, 4, 13, dtype=torch.float64)


@pytest.mark.parametrize("rtol", [1e-4, 1e-6, *(pytest.param(r, marks=pytest.mark.slow) for r in (1e-5, 1e-7, 1e-8, 1e-9))])
@pytest.mark.parametrize("method", BOTH)
def test_error_of_linear_flows_is_proportional_to_rtol(method: str, rtol: float) -> None:
    """Eigenvalues from 1e-8 to 1e4, from where all of them move to where only the slowest do."""
    objective = function(lambda x: 0.5 * (EIGENVALUES * x**2).sum(), 13)
    theta0, times = torch.linspace(1, 2, 13, dtype=torch.float64), vector(1e-3, 1.0, 1e3, 1e6)
    solution = integrate(objective, theta0, (0.0, 1e6), method=method, rtol=rtol, t_eval=times.tolist())
    exact = theta0 * torch.exp(-EIGENVALUES * times[:, None])
    assert float(errors(solution.theta, exact).max()) < 5 * rtol
    assert float(errors(solution.theta, exact).max()) > 1e-3 * rtol  # no work is wasted


@cache
def valley() -> Tensor:
    """A curved, stiff valley of a quartic loss: by scipy's Radau."""

    def field(t: float, x: np.ndarray) -> np.ndarray:
        off = 100 * (x[1] - x[0] ** 2)
        return np.array([2 * off * x[0] - x[0] ** 3, -off - x[1] ** 3])

    solution = solve_ivp(field, (0, 100), [1.5, -1.0], method="Radau", rtol=1e-12, atol=1e-14, t_eval=[0.1, 1, 10, 100])
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))


def curved(x: Tensor) -> Tensor:
    return 0.25 * (x**4).sum() + 50 * (x[1] - x[0] ** 2) ** 2


@pytest.mark.parametrize("method", BOTH)
def test_error_of_nonlinear_flows_is_proportional_to_rtol(method: str) -> None:
    ratios = []
    for rtol in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        solution = integrate(
            function(curved, 2), vector(1.5, -1.0), (0.0, 100.0), method=method, rtol=rtol, t_eval=[0.1, 1.0, 10.0, 100.0]
        )
        ratios.append(float(errors(solution.theta, valley()).max()) / rtol)
    assert max(ratios) < 30
    assert np.median(ratios) < 10
    assert max(ratios) < 50 * min(ratios)


@pytest.mark.parametrize("rtol", [1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("method", BOTH)
def test_trajectory_agrees_with_radau(method: str, seed: int, rtol: float) -> None:
    """θ of T33 up to t = 1000, samples between steps and at the end, within 5 rtol."""
    objective, theta0 = t33(seed)
    solution = integrate(objective, theta0, (0.0, 1e3), method=method, rtol=rtol, t_eval=T33_TIMES)
    assert solution.status == "t_end"
    assert float(errors(solution.theta, reference(seed)).max()) < 5 * rtol
    assert solution.dissipation_error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", BOTH)
def test_trajectory_agrees_with_radau_for_long(method: str, seed: int, rtol: float) -> None:
    """The same up to t = 1e5."""
    times = (10.0, 1e3, 1e4, 1e5)
    objective, theta0 = t33(seed)
    solution = integrate(objective, theta0, (0.0, 1e5), method=method, rtol=rtol, t_eval=times)
    assert float(errors(solution.theta, reference(seed, times)).max()) < 30 * rtol


@cache
def along_the_wall(wall: float) -> Tensor:
    """Down a valley with a wall of that curvature, which turns on the way: by scipy's Radau."""

    def field(t: float, x: np.ndarray) -> np.ndarray:
        off = x[1] - np.sin(x[0])
        return np.array([wall * off * np.cos(x[0]) - 0.1 * x[0], -wall * off])

    def jacobian(t: float, x: np.ndarray) -> np.ndarray:
        off, s, c = x[1] - np.sin(x[0]), np.sin(x[0]), np.cos(x[0])
        return -np.array([[wall * (c * c + off * s) + 0.1, -wall * c], [-wall * c, wall]])

    times, start = [1.0, 10.0, 30.0, 100.0], [1.5, np.sin(1.5)]
    solution = solve_ivp(field, (0, 100), start, method="Radau", jac=jacobian, rtol=1e-11, atol=1e-14, t_eval=times)
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))


@pytest.mark.parametrize("method", [*BOTH, "ritz"])
def test_largest_eigenvalue_costs_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a stiff valley that turns, with walls of curvature 1e2 to 1e6, steps are as many and as accurate.

    The stiff direction turns by 40°: an eigenbasis, or Ritz vectors, of the start know nothing of it any more.
    """
    if method == "ritz":
        monkeypatch.setattr(bdf_cg, "DENSE_LIMIT", 1)
    counts = []
    for wall in (1e2, 1e4, 1e6):
        objective = function(lambda x, wall=wall: 0.5 * wall * (x[1] - torch.sin(x[0])) ** 2 + 0.05 * x[0] ** 2, 2)
        solution = integrate(
            objective,
            vector(1.5, math.sin(1.5)),
            (0.0, 100.0),
            method="bdf" if method == "bdf" else "bdf-cg",
            rtol=1e-7,
            t_eval=[1.0, 10.0, 30.0, 100.0],
        )
        assert float(errors(solution.theta, along_the_wall(wall)).max()) < 30e-7
        counts.append(solution.n_accepted + solution.n_rejected)
    assert max(counts) < 1.6 * min(counts)


# Saddles


def escape(x0: float, t: Tensor) -> Tensor:
    """x(t) of x′ = x − x³."""
    return 1 / torch.sqrt(1 + (1 / x0**2 - 1) * torch.exp(-2 * t))


@pytest.mark.parametrize("step_size", [None, 50.0])
@pytest.mark.parametrize("method", BOTH)
def test_escape_from_a_saddle_is_followed(method: str, step_size: float | None) -> None:
    """x grows from 1e-6 to 1; a first step that would jump over the growth is rejected."""
    objective = function(lambda x: 0.25 * (x[0] ** 2 - 1) ** 2 + 0.5 * x[1] ** 2, 2)
    times = [1.0, 10.0, 13.0, 14.0, 15.0, 30.0]
    solution = integrate(
        objective, vector(1e-6, 1.0), (0.0, 30.0), method=method, rtol=1e-7, atol=1e-15, t_eval=times, step_size=step_size
    )
    found = solution.theta[:, 0]
    assert float(((found - escape(1e-6, solution.t)).abs() / escape(1e-6, solution.t)).max()) < 3e-5
    assert solution.n_rejected > 0 or step_size is None


@pytest.mark.parametrize("n", [2, 80])
@pytest.mark.parametrize("dense", [True, False])
def test_steps_too_long_for_an_unstable_mode_have_no_solution(dense: bool, n: int) -> None:
    """α/h + λ_min > 0 or nothing: by Cholesky, eigenvalues, and conjugate gradients with either preconditioner."""
    eigenvalues = torch.linspace(-1.0, 5.0, n, dtype=torch.float64)
    objective, theta = function(lambda x: 0.5 * (eigenvalues * x**2).sum(), n), torch.ones(n, dtype=torch.float64)
    slope, tolerated = torch.zeros_like(theta), torch.full_like(theta, 1e-8)
    correctors: list[Corrector] = (
        [Direct(objective, False), Direct(objective, True)]
        if dense
        else [ConjugateGradients(objective, Eigenbasis()), ConjugateGradients(objective, RitzVectors())]
    )
    for corrector in correctors:
        for a, good in ((1.1, True), (0.9, False), (1.1, True), (1e-3, False)):
            found = corrector.solve(predicted(theta, slope, tolerated), a)
            assert (found is not None) == good
            if found is not None:
                assert torch.allclose(found.delta, -eigenvalues / (eigenvalues + a), atol=1e-7)


# Other coordinates and types


@pytest.mark.parametrize("method", BOTH)
def test_time_scales_of_groups(method: str) -> None:
    """θ′ = −D H θ in the coordinates D^(-½) θ: against the matrix exponential."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    h, d = a @ a.T, vector(1e-3, 1.0, 30.0, 1e4)
    objective = Rescaled(function(lambda x: 0.5 * x @ h @ x, 4), d)
    theta0 = vector(1.0, -2.0, 0.5, 3.0)
    solution = integrate(objective, theta0 / d.sqrt(), (0.0, 20.0), method=method, rtol=1e-8, t_eval=[1e-4, 0.3, 20.0])
    for t, phi in zip(solution.t, solution.theta, strict=True):
        exact = torch.linalg.matrix_exp(-t * d[:, None] * h) @ theta0
        assert errors(phi * d.sqrt(), exact) < 1e-6


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("rtol", [1e-3, 1e-4, 1e-5])
def test_float32(method: str, rtol: float) -> None:
    """Within 10 rtol down to the floor of float32, at a bounded cost."""
    objective, theta0 = t33(dtype=torch.float32)
    solution = integrate(objective, theta0, (0.0, 1e3), method=method, rtol=rtol, t_eval=T33_TIMES)
    assert solution.status == "t_end"
    assert solution.theta.dtype == torch.float32
    assert float(errors(solution.theta.double(), reference()).max()) < 10 * rtol
    assert solution.n_accepted + solution.n_rejected < 400


# Ends of a flow


@pytest.mark.parametrize("method", BOTH)
def test_divergence_to_infinity_ends_as_not_finite(method: str) -> None:
    """θ′ = θ leaves the numbers that there are where θ²/2 overflows."""
    objective = function(lambda x: -0.5 * (x**2).sum(), 1)
    solution = integrate(objective, vector(1e140), (0.0, 1e4), method=method, rtol=1e-4, max_evals=20_000)
    assert solution.status == "not finite"
    assert "the flow diverges" in solution.message
    assert float(solution.t[-1]) == pytest.approx(math.log(math.sqrt(sys.float_info.max) / 1e140), rel=1e-2)
    assert math.isfinite(float(solution.theta[-1]))


@pytest.mark.parametrize("method", BOTH)
def test_blow_up_in_finite_time_ends(method: str) -> None:
    """θ′ = θ² has no value beyond t = 1."""
    objective = function(lambda x: -(x**3).sum() / 3, 1)
    solution = integrate(objective, vector(1.0), (0.0, 2.0), method=method, max_evals=20_000)
    assert solution.status in ("underflow", "not finite")
    assert float(solution.t[-1]) == pytest.approx(1.0, abs=1e-3)
    assert float(solution.theta[-1]) > 1e10


@pytest.mark.parametrize("method", BOTH)
def test_trial_steps_beyond_the_domain_are_shortened(method: str) -> None:
    """√θ has no value for θ < 0."""
    objective = function(lambda x: (x.sqrt() * (x - 3)).sum(), 1)
    solution = integrate(objective, vector(1e-3), (0.0, 50.0), step_size=10.0, method=method)
    assert solution.status == "t_end"
    assert float(solution.theta[-1]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (GradientNorm(1e-6), "GradientNorm"),
        (LossValue(1e-8), "LossValue"),
        (LossPlateau(1e-3), "LossPlateau"),
        (FlowTime(1e9), "FlowTime"),
    ],
)
@pytest.mark.parametrize("method", BOTH)
def test_endless_flows_end_by_their_rules(method: str, rule: StoppingRule, name: str) -> None:
    """The point at the end satisfies the rule with loss and gradient of its own, not of a linearisation."""
    rest = 1.0 if name == "LossPlateau" else 0.0
    objective = function(lambda x: 0.5 * (vector(0.1, 30.0) * x**2).sum() + rest, 2)
    solution = integrate(objective, vector(1.0, 1.0), (0.0, math.inf), method=method, stop=rule)
    assert solution.status == "stopped"
    assert f"Stopped by {name}" in solution.message
    loss, gradient = objective.loss_and_gradient(solution.theta[-1])
    assert float(solution.loss[-1]) == float(loss)
    assert float(solution.grad_norm[-1]) == float(gradient.abs().max())


@pytest.mark.parametrize("method", BOTH)
def test_a_flow_at_rest_reaches_any_time(method: str) -> None:
    """Once nothing moves, steps grow without end, and nothing overflows."""
    objective = function(lambda x: 0.5 * (vector(1.0, 10.0) * x**2).sum(), 2)
    solution = integrate(objective, vector(1.0, 1.0), (0.0, 1e300), method=method, rtol=1e-4)
    assert solution.status == "t_end"
    assert solution.n_accepted < 300
    rest = integrate(objective, vector(0.0, 0.0), (0.0, math.inf), method=method, stop=FlowTime(100.0))
    assert rest.status == "stopped"
    assert first_step_size(vector(0.0), vector(0.0), cap=math.inf, rtol=1e-6, atol=1e-8) == 1.0


@pytest.mark.parametrize("method", BOTH)
def test_max_evals_bounds_all_evaluations(method: str) -> None:
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 1e3), method=method, max_evals=60)
    assert solution.status == "max_evals"
    spent = solution.n_grad + solution.n_hvp + solution.n_hessian
    # One for the start, those of the samples, and what the last step took beyond the bound.
    assert 60 <= spent <= 60 + 1 + len(solution.t) + 20
    assert 0 < float(solution.t[-1]) < 1e3


class Broken(Exception):
    """What the objective raises."""


def breaking(base: Objective, error: type[BaseException], at: int) -> tuple[Objective, list[Tensor]]:
    """``base``, whose evaluation of that number raises; and the points at which it was asked for a Hessian or a product."""
    asked: list[Tensor] = []

    def count(theta: Tensor) -> None:
        asked.append(theta)
        if len(asked) == at:
            raise error

    original = base.loss_gradient_hessian, base.hvp

    def loss_gradient_hessian(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count(theta)
        return original[0](theta)

    def hvp(theta: Tensor, vectors: Tensor) -> Tensor:
        count(theta)
        return original[1](theta, vectors)

    base.loss_gradient_hessian, base.hvp = loss_gradient_hessian, hvp  # type: ignore[method-assign]
    return base, asked


@pytest.mark.parametrize("method", BOTH)
def test_interruption_within_the_objective_keeps_the_last_accepted_point(method: str) -> None:
    reached: list[FlowReport] = []
    objective, _ = breaking(t33()[0], KeyboardInterrupt, 60)
    solution = integrate(objective, t33()[1], (0.0, 1e3), method=method, progress=reached.append)
    assert solution.status == "interrupted"
    assert "Interrupted by the user" in solution.message
    assert float(solution.t[-1]) == reached[-1].t
    true = integrate(*t33(), (0.0, float(solution.t[-1])), method=method)
    assert errors(solution.theta[-1], true.theta[-1]) < 1e-5


@pytest.mark.parametrize("method", BOTH)
def test_exception_within_the_objective_keeps_the_last_accepted_point(method: str) -> None:
    """It is raised; parameters and solution are those of the last accepted point."""
    model, x, y = teacher_student(1, n_samples=300)
    optimizer = GradientFlow(model.parameters(), method=method)
    closure = make_closure(optimizer, model, x, y)
    reached: list[FlowReport] = []

    def fail(report: FlowReport) -> None:
        reached.append(report)
        if report.t > 1.0:
            raise Broken

    with pytest.raises(Broken):
        optimizer.integrate(closure, 100.0, progress=fail)
    assert optimizer.solution is not None
    assert optimizer.solution.status == "failed"
    assert torch.equal(flat(model), optimizer.solution.theta[-1])
    assert optimizer.flow_time == reached[-1].t > 1.0


# Memory of a run


@pytest.mark.parametrize("method", [Bdf(), BdfCg()], ids=lambda method: method.name)
@pytest.mark.parametrize("ritz", [False, True])
def test_a_run_in_pieces_is_the_run(method: Bdf | BdfCg, ritz: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at any accepted point and begun anew from its memory, a run takes the same steps to the last bit."""
    if ritz:
        monkeypatch.setattr(bdf_cg, "DENSE_LIMIT", 10)
    objective, theta0 = t33()
    start, span = at(objective, theta0), Span(50.0, 1e-6, 1e-8)
    whole = method.run(objective, start, span, lambda arrival: False)
    pieces, knot, memory, h = 0, start, None, None
    while True:
        taken = 0

        def visit(arrival: Arrival) -> bool:
            nonlocal taken
            taken += 1
            return taken == 7

        end: RunEnd = method.run(objective, knot, Span(50.0, 1e-6, 1e-8, h), visit, memory)
        knot, memory, h = end.knot, end.memory, end.step_size
        pieces += 1
        if end.status == "t_end":
            break
    assert pieces > 10
    assert torch.equal(knot.theta, whole.knot.theta)


# bdf-cg


@pytest.mark.parametrize("ritz", [False, True])
@pytest.mark.parametrize("rtol", [1e-6, 1e-8])
def test_conjugate_gradients_follow_the_same_flow(rtol: float, ritz: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """T33 and a network with two hidden layers, with an old eigenbasis and with Ritz vectors alone."""
    if ritz:
        monkeypatch.setattr(bdf_cg, "DENSE_LIMIT", 10)
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 1e3), method="bdf-cg", rtol=rtol, t_eval=T33_TIMES)
    assert float(errors(solution.theta, reference()).max()) < 5 * rtol
    assert (solution.n_hessian == 0) == ritz
    assert solution.n_hvp < (30 if ritz else 5) * solution.n_accepted
    objective, theta0 = deep_tanh()
    one, other = (integrate(objective, theta0, (0.0, 10.0), method=name, rtol=rtol) for name in BOTH)
    assert errors(other.theta[-1], one.theta[-1]) < 10 * rtol
    assert (other.n_hessian == 0) == ritz
    assert other.n_accepted < 1.2 * one.n_accepted


def test_ritz_vectors_approximate_the_inverse() -> None:
    """After a solve the largest eigenvalues are known, and the next solve takes few iterations."""
    generator = torch.Generator().manual_seed(0)
    n = 300
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.cat([torch.logspace(1, 5, 20, dtype=torch.float64), 1e-3 * torch.ones(n - 20, dtype=torch.float64)])
    hessian = (q * eigenvalues) @ q.T
    objective, ritz = Kept(hessian), RitzVectors()
    corrector, tolerated = ConjugateGradients(objective, ritz), torch.full((n,), 1e-9, dtype=torch.float64)
    counts = []
    for a in (1.0, 0.5, 0.01):
        theta = torch.randn(n, generator=generator, dtype=torch.float64)
        before = objective.counts.n_hvp
        found = corrector.solve(predicted(theta, torch.zeros_like(theta), tolerated), a)
        counts.append(objective.counts.n_hvp - before)
        assert found is not None
        wanted = torch.linalg.solve(hessian + a * torch.eye(n, dtype=torch.float64), -hessian @ theta)
        assert torch.allclose(found.delta, wanted, atol=1e-8)
    assert counts[0] > 20
    assert max(counts[1:]) <= 15
    curvature = ritz.curvature()
    assert curvature is not None
    vectors = curvature[: len(curvature) // 2]
    assert torch.allclose(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64), atol=1e-8)
    again = RitzVectors()
    again.recall(curvature)
    v = torch.randn(n, generator=generator, dtype=torch.float64)
    assert torch.equal(again.apply(v, 0.3), ritz.apply(v, 0.3))


def test_an_old_eigenbasis_is_replaced_by_its_iteration_counts() -> None:
    """The Hessian turns under it: a new one is taken, and the solution stays right."""
    generator = torch.Generator().manual_seed(0)
    n = 40
    objective = Kept(torch.diag(torch.logspace(-2, 4, n, dtype=torch.float64)))
    corrector, tolerated = ConjugateGradients(objective, Eigenbasis()), torch.full((n,), 1e-9, dtype=torch.float64)
    for turn, hessians in ((0.0, 1), (1e-3, 1), (1.0, 2), (0.0, 2)):
        skew = torch.randn(n, n, generator=generator, dtype=torch.float64)
        q = torch.linalg.matrix_exp(turn * (skew - skew.T))
        objective.h = q @ objective.h @ q.T
        theta = torch.randn(n, generator=generator, dtype=torch.float64)
        found = corrector.solve(predicted(theta, torch.zeros_like(theta), tolerated), 0.1)
        assert found is not None
        wanted = torch.linalg.solve(objective.h + 0.1 * torch.eye(n, dtype=torch.float64), -objective.h @ theta)
        assert torch.allclose(found.delta, wanted, atol=1e-7)
        assert objective.counts.n_hessian >= hessians


# Steps of an optimizer


@pytest.mark.parametrize("n_steps", [1, 7, 50])
@pytest.mark.parametrize("method", [*BOTH, "auto"])
def test_equal_steps_are_one_integration(method: str, n_steps: int) -> None:
    """The same end within the tolerance, and at most half as much again plus two evaluations per step."""
    model, x, y = teacher_student(1, n_samples=300)
    whole = GradientFlow(model.parameters(), method=method)
    whole.integrate(make_closure(whole, model, x, y), 100.0)
    model, x, y = teacher_student(1, n_samples=300)
    optimizer = GradientFlow(model.parameters(), lr=100.0 / n_steps, method=method)
    closure = make_closure(optimizer, model, x, y)
    for _ in range(n_steps):
        optimizer.step(closure)
    assert optimizer.flow_time == pytest.approx(100.0)
    assert errors(flat(model), reference()[2]) < 5e-6
    if method != "auto":  # its choices depend on what is measured
        assert optimizer.stats.n_hessian <= 1.5 * whole.stats.n_hessian + 3
        assert optimizer.stats.n_hvp <= 1.5 * whole.stats.n_hvp
    assert optimizer.stats.n_closure <= n_steps + 2


@pytest.mark.parametrize("method", BOTH)
def test_steps_resume_bit_for_bit(method: str) -> None:
    """Through ``state_dict``, at any of the steps."""

    def train(resume_at: int | None) -> Tensor:
        model, x, y = teacher_student(1, n_samples=300)
        optimizer = GradientFlow(model.parameters(), lr=0.7, method=method)
        for i in range(12):
            if i == resume_at:
                kept = model.state_dict(), optimizer.state_dict()
                model, x, y = teacher_student(1, n_samples=300)
                model.load_state_dict(kept[0])
                optimizer = GradientFlow(model.parameters(), lr=0.7, method=method)
                optimizer.load_state_dict(kept[1])
            optimizer.step(make_closure(optimizer, model, x, y))
        return flat(model)

    whole = train(None)
    for resume_at in (1, 2, 6, 11):
        assert torch.equal(train(resume_at), whole)


@pytest.mark.parametrize("method", BOTH)
def test_another_objective_starts_anew(method: str) -> None:
    """New data at each step: what is remembered belongs to another loss, and is not used."""
    model, x, y = teacher_student(1, n_samples=300)
    optimizer = GradientFlow(model.parameters(), lr=0.5, method=method)
    objective_theta = flat(model)
    for part in (slice(0, 100), slice(100, 200), slice(200, 300)):
        optimizer.step(make_closure(optimizer, model, x[part], y[part]))
        problem = NumpyPerceptron(x[part], y[part], 8)
        field = lambda t, theta, problem=problem: -problem.loss_and_gradient(theta)[1]  # noqa: E731
        solution = solve_ivp(field, (0, 0.5), objective_theta.numpy(), method="DOP853", rtol=1e-11, atol=1e-13)
        objective_theta = torch.from_numpy(np.ascontiguousarray(solution.y[:, -1]))
        assert errors(flat(model), objective_theta) < 1e-5
