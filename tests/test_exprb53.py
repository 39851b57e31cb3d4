"""exprb53: φ-functions to the last place, orders by conditions and by measurement, saddles, Krylov spaces, resumption."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torch_gradflow.flow.exprb53 import (
    C2,
    C3,
    OF_D2,
    OF_D3,
    Eigenbasis,
    ExponentialStepper,
    Exprb53,
    Exprb53Lanczos,
    Function,
    Krylov,
    KrylovSpace,
    TooLong,
    allowed_growth,
)
from torch_gradflow.flow.method import Arrival, RunEnd, Span
from torch_gradflow.flow.onestep import OneStepMethod, Trial
from torch_gradflow.flow.phi import phi
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.module import ModuleObjective

METHODS = (Exprb53(), Exprb53Lanczos())
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def function(term: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype = torch.float64) -> FunctionObjective:
    return FunctionObjective(lambda: (term,), n, dtype, torch.device("cpu"))


def quadratic(eigenvalues: list[float]) -> tuple[FunctionObjective, Tensor, Tensor]:
    """½ θᵀHθ + bᵀθ with H = QΛQᵀ: the objective, H and b."""
    generator = torch.Generator().manual_seed(1)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    h = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    return function(lambda theta: 0.5 * theta @ h @ theta + b @ theta, n), h, b


def t33(seed: int = 1, dtype: torch.dtype | None = None) -> tuple[ModuleObjective, Tensor]:
    model, x, y = teacher_student(seed)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y), dtype=dtype)
    return objective, objective.initial_theta()


def deep_linear(scale: float = 0.1) -> tuple[ModuleObjective, Tensor]:
    """Four 3 × 3 matrices from a small start: P = 36, three saddles on the way."""
    generator = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(4)]).double()
    x = normal(100, 3)
    y = x @ torch.linalg.qr(normal(3, 3))[0] @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * normal(3, 3))
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    return objective, objective.initial_theta()


def at(objective: Objective, theta: Tensor, t: float = 0.0) -> Knot:
    return Knot(t, theta, *objective.loss_and_gradient(theta))


def follow(
    method: OneStepMethod, objective: Objective, theta: Tensor, t_end: float, rtol: float = 1e-6, h: float | None = None
) -> RunEnd:
    return method.run(objective, at(objective, theta), Span(t_end, rtol, rtol / 100, h), lambda arrival: False)


def relative_error(theta: Tensor, true: Tensor) -> float:
    return float((theta - true).norm() / true.norm())


def reference(objective: Objective, theta: Tensor, times: list[float]) -> Tensor:
    """By scipy's DOP853 on the objective's own gradients."""
    field = lambda t, y: -objective.loss_and_gradient(torch.from_numpy(y))[1].numpy()  # noqa: E731
    solution = solve_ivp(field, (0, times[-1]), theta.numpy(), method="DOP853", rtol=1e-12, atol=1e-14, t_eval=times)
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))


@cache
def reference_t33() -> Tensor:
    """θ(10) of T33 by DOP853 on derivatives written out in numpy: nothing is shared with the package."""
    model, x, y = teacher_student(1)
    problem = NumpyPerceptron(x, y, 8)
    field = lambda t, theta: -problem.loss_and_gradient(theta)[1]  # noqa: E731
    solution = solve_ivp(field, (0, 10), flat(model).numpy(), method="DOP853", rtol=1e-12, atol=1e-14)
    return torch.from_numpy(np.ascontiguousarray(solution.y[:, -1]))


# φ-functions


def arguments() -> list[float]:
    small = [s * 10.0**e for s in (-1, 1) for e in (-300, -17, -16, -8, -3, -1)]
    around = [s * v for s in (-1, 1) for v in (0.5, 1.0, 2.0, math.pi, 4.3, 5.0, math.nextafter(5.0, 6.0), 5.1, 8.0, 30.0)]
    return [0.0, *small, *around, -700.0, 700.0, -1e4, -1e7, *np.linspace(-7, 7, 57).tolist()]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 6), (torch.float32, 6)])
def test_phi_functions_to_a_few_units_in_the_last_place(dtype: torch.dtype, bound: float) -> None:
    """Against mpmath's ₁F₁ with 50 digits."""
    z = torch.tensor([v for v in arguments() if dtype == torch.float64 or abs(v) < 80 or v < 0], dtype=dtype)
    values = phi(z, 5)
    with mpmath.workdps(50):
        for k in range(1, 6):
            for argument, value in zip(z.tolist(), values[k].tolist(), strict=True):
                true = mpmath.hyp1f1(1, k + 1, argument) / mpmath.factorial(k)
                assert abs(value - true) <= bound * torch.finfo(dtype).eps * true, (k, argument)


def test_phi_functions_keep_the_shape_and_know_their_limits() -> None:
    z = torch.zeros(2, 3, dtype=torch.float64)
    z[0, 0], z[1, 2] = -math.inf, 800.0
    values = phi(z, 4)
    assert values.shape == (5, 2, 3)
    assert values[:, 0, 1].tolist() == [1, 1, 1 / 2, 1 / 6, 1 / 24]
    assert values[:, 0, 0].tolist() == [0, 0, 0, 0, 0]
    assert bool(torch.isinf(values[:, 1, 2]).all())


# Orders


def value(terms: Function, z: float) -> float:
    return sum(weight * float(phi(torch.tensor(c * z, dtype=torch.float64), k)[k]) for weight, k, c in terms)


@pytest.mark.parametrize("z", [0.0, -0.3, -4.0, -1e3, 2.0])
def test_order_conditions(z: float) -> None:
    """Of order 4 for all Z, and of order 5 at Z = 0 (Luan and Ostermann 2014, Table 2)."""
    a32, quadratic2, cubic2 = (value(terms, z) for terms in OF_D2)
    quadratic3, cubic3 = (value(terms, z) for terms in OF_D3)
    b2, b3 = quadratic2 + cubic2, quadratic3 + cubic3
    of = lambda k, c=1.0: value(((1.0, k, c),), z)  # noqa: E731
    assert b2 * C2**2 + b3 * C3**2 == pytest.approx(2 * of(3), rel=1e-12)
    assert b2 * C2**3 + b3 * C3**3 == pytest.approx(6 * of(4), rel=1e-11)
    # The embedded solution, without the cubic terms, is of order 3.
    assert quadratic2 * C2**2 + quadratic3 * C3**2 == pytest.approx(2 * of(3), rel=1e-12)
    if z == 0:
        errors = -(C2**3) * of(3, C2), a32 * C2**2 / 2 - C3**3 * of(3, C3)
        assert b2 * C2**4 + b3 * C3**4 == pytest.approx(1 / 5, rel=1e-13)
        assert b2 * C2 * errors[0] + b3 * C3 * errors[1] == pytest.approx(0, abs=1e-15)


def steps(objective: Objective, theta: Tensor, t_end: float, n: int, *, embedded: bool) -> Tensor:
    """n equal steps, with the solution of order 5 or with the embedded one, whatever the error estimates say."""
    span = Span(math.inf, 1e-6, 1e-8)
    for _ in range(n):
        stepper = Exprb53().begin(objective, span, ())
        assert isinstance(stepper, ExponentialStepper)
        here = at(objective, theta)
        stepper.attempt(here, t_end / n)
        increment, error = stepper._step(here, t_end / n)
        theta = theta + increment - (error if embedded else 0)
    return theta


@pytest.mark.parametrize(("after", "duration", "n", "orders"), [(0.0, 0.5, 32, (5.0, 3.0)), (10.0, 10.0, 8, (4.5, 3.0))])
def test_orders_of_the_solution_and_of_the_embedded_one(
    after: float, duration: float, n: int, orders: tuple[float, float]
) -> None:
    """5 and 3 on T33; from t = 10 on, where h λ is 17 and 9, between 4 (uniformly in the stiffness) and 5, and 3."""
    objective, start = t33()
    if after:
        start = reference_t33()
    true = reference(objective, start, [duration])[0]
    for order, embedded in zip(orders, (False, True), strict=True):
        errors = [relative_error(steps(objective, start, duration, m, embedded=embedded), true) for m in (n, 2 * n)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), errors


def test_the_error_estimate_is_of_order_5_as_it_is_calibrated() -> None:
    """E of h⁴ to the power of 5/4, halving the step."""
    objective = function(lambda theta: (theta**4).sum() / 4 + (theta.prod()).exp() / 2, 2)
    here = at(objective, torch.tensor([1.0, 0.5], dtype=torch.float64))
    stepper = Exprb53().begin(objective, Span(math.inf, 1e-6, 1e-8), ())
    errors = [trial.error for h in (0.01, 0.005) if isinstance(trial := stepper.attempt(here, h), Trial)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.15)


# Exactness, accuracy


@by_method
@pytest.mark.parametrize("h", [1e-3, 1.0, 1e3, 1e7])
def test_quadratic_losses_are_solved_exactly_by_one_step(method: OneStepMethod, h: float) -> None:
    """θ(t) = θ + t φ_1(−tH) f, with eigenvalues from 1e-8 to 20, one of them negative."""
    objective, hessian, b = quadratic([20.0, 13.0, 1.0, 0.1, 1e-4, 1e-8, -1e-8])
    start = torch.ones(7, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(hessian)
    true = start - vectors @ (h * phi(-h * values, 1)[1] * (vectors.T @ (hessian @ start + b)))
    end = follow(method, objective, start, h, h=h)
    assert (end.n_accepted, end.n_rejected) == (1, 0)
    assert relative_error(end.knot.theta, true) <= 1e-7 if h > 1e3 else 1e-12  # rounding of H: h δλ


@pytest.mark.parametrize("rtol", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
def test_t33_is_as_accurate_as_asked_for(rtol: float) -> None:
    """At t = 10, against DOP853 on other derivatives; 32 steps at rtol = 10⁻⁴, half as many again for each further digit."""
    objective, start = t33()
    end = follow(Exprb53(), objective, start, 10.0, rtol)
    assert end.status == "t_end"
    assert relative_error(end.knot.theta, reference_t33()) <= 0.5 * rtol
    assert end.n_accepted <= 36 * 1.5 ** -math.log10(rtol / 1e-4)


def test_errors_fall_in_proportion_to_rtol_at_saddles() -> None:
    """Deep linear network from a small start: errors at times between saddles over five decades of rtol."""
    objective, start = deep_linear()
    true = reference(objective, start, [20.0])[0]
    ratios = [
        relative_error(follow(Exprb53(), objective, start, 20.0, rtol).knot.theta, true) / rtol
        for rtol in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
    ]
    assert max(ratios) <= 10, ratios
    assert max(ratios) <= 20 * min(ratios), ratios


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_t33_to_later_times(seed: int) -> None:
    """t = 1000 against scipy's Radau with our Hessian: error at most 5 rtol."""
    objective, start = t33(seed)
    solution = solve_ivp(
        lambda t, y: -objective.loss_and_gradient(torch.from_numpy(y))[1].numpy(),
        (0, 1000),
        start.numpy(),
        method="Radau",
        jac=lambda t, y: -objective.hessian(torch.from_numpy(y)).numpy(),
        rtol=1e-10,
        atol=1e-12,
    )
    true = torch.from_numpy(np.ascontiguousarray(solution.y[:, -1]))
    for rtol in (1e-4, 1e-6, 1e-8):
        end = follow(Exprb53(), objective, start, 1000.0, rtol)
        assert relative_error(end.knot.theta, true) <= 5 * rtol


# Saddles, rejections, failures


def test_a_saddle_is_left_on_the_right_branch() -> None:
    """L = −θ₁²/2 + θ₁⁴/4 + θ₂²/2 from θ₁ = −10⁻⁹: θ₁(t)² = 1/(1 + (10¹⁸ − 1) e^(−2t))."""
    objective = function(lambda theta: -(theta[0] ** 2) / 2 + theta[0] ** 4 / 4 + theta[1] ** 2 / 2, 2)
    start = torch.tensor([-1e-9, 1.0], dtype=torch.float64)
    for t, rtol in ((10.0, 1e-6), (20.0, 1e-6), (21.0, 1e-6), (40.0, 1e-6)):
        end = Exprb53().run(objective, at(objective, start), Span(t, rtol, 1e-14), lambda arrival: False)
        assert end.status == "t_end"
        assert float(end.knot.theta[0]) == pytest.approx(-1 / math.sqrt(1 + (1e18 - 1) * math.exp(-2 * t)), rel=20 * rtol)


@by_method
def test_unstable_modes_bound_the_step(method: OneStepMethod) -> None:
    """λ = −2 at rtol = 10⁻⁶: h ≤ log(10⁻⁶/ε)/2, and the bound is not asked for twice."""
    objective, _, _ = quadratic([5.0, 1.0, -2.0])
    stepper = method.begin(objective, Span(math.inf, 1e-6, 1e-8), ())
    here = at(objective, torch.ones(3, dtype=torch.float64))
    longest = stepper.attempt(here, 100.0)
    assert isinstance(longest, float)
    assert longest == pytest.approx(allowed_growth(1e-6, 2.2e-16) / 2, rel=1e-2)  # by Ritz values: not quite
    again = stepper.attempt(here, longest * (1 + 1e-10))
    assert isinstance(again, Trial) or (method.needs == "hvp" and 0.99 * longest < again < longest)
    end = follow(method, objective, here.theta, 30.0, h=30.0)
    assert end.status == "t_end"
    assert end.n_accepted <= 10


def test_a_rejected_step_costs_two_gradients_and_no_hessian() -> None:
    objective, start = t33()
    stepper = Exprb53().begin(objective, Span(math.inf, 1e-6, 1e-8), ())
    here = at(objective, start)
    trial = stepper.attempt(here, 2.0)
    assert isinstance(trial, Trial) and trial.error > 1
    assert (objective.counts.n_grad, objective.counts.n_hessian) == (3, 1)
    stepper.attempt(here, 1.0)
    assert (objective.counts.n_grad, objective.counts.n_hessian) == (5, 1)
    end = follow(Exprb53(), objective, start, 1.0, h=1.0)
    assert end.n_rejected >= 1
    assert relative_error(end.knot.theta, follow(Exprb53(), objective, start, 1.0, 1e-9).knot.theta) <= 1e-6


def test_one_hessian_and_two_gradients_per_step() -> None:
    """The first gradient is the start's, the last point has one of its own, and no Hessian."""
    objective, start = t33()
    end = follow(Exprb53(), objective, start, 5.0)
    assert end.n_rejected == 0
    assert objective.counts.n_hessian == end.n_accepted
    assert objective.counts.n_grad == 2 * end.n_accepted + 2


@by_method
def test_trial_steps_beyond_the_domain_are_shortened(method: OneStepMethod) -> None:
    """√θ has no value for θ < 0."""
    objective = function(lambda theta: (theta.sqrt() * (theta - 3)).sum(), 1)
    end = follow(method, objective, torch.full((1,), 1e-3, dtype=torch.float64), 50.0, h=10.0)
    assert end.status == "t_end"
    assert end.n_rejected >= 1
    assert float(end.knot.theta) == pytest.approx(1.0, abs=1e-6)


@by_method
def test_divergence_ends_with_a_status(method: OneStepMethod) -> None:
    """θ' = θ² blows up at t = 1."""
    objective = function(lambda theta: -(theta**3).sum() / 3, 1)
    span = Span(2.0, 1e-6, 1e-8, max_evals=1000)
    end = method.run(objective, at(objective, torch.ones(1, dtype=torch.float64)), span, lambda arrival: False)
    assert end.status in ("underflow", "not finite", "max_evals")
    assert end.knot.t == pytest.approx(1.0, abs=1e-3)


def test_a_hessian_that_is_not_finite_is_named() -> None:
    """|θ|^1.5 at zero."""
    objective = function(lambda theta: (theta.abs() ** 1.5).sum() + theta.sum(), 1)
    objective.second_derivatives = "double backward"
    start = Knot(0.0, torch.zeros(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64), torch.ones(1).double())
    with pytest.raises(FloatingPointError, match="Hessian is not finite at t = 0"):
        Exprb53().run(objective, start, Span(1.0, 1e-6, 1e-8), lambda arrival: False)


@by_method
def test_a_start_without_gradient_stays(method: OneStepMethod) -> None:
    objective, _, _ = quadratic([1.0, -1.0])
    start = -torch.linalg.solve(objective.hessian(torch.zeros(2).double()), at(objective, torch.zeros(2).double()).gradient)
    knot = Knot(0.0, start, torch.zeros(()), torch.zeros(2, dtype=torch.float64))
    end = method.run(objective, knot, Span(3.0, 1e-6, 1e-8), lambda arrival: False)
    assert end.status == "t_end"
    assert relative_error(end.knot.theta, start) <= 1e-12


# Krylov spaces


def test_krylov_approximations_keep_their_error_bounds() -> None:
    """For spectra with unstable modes, all functions of the method: the true error is at most the bound, and not far below."""
    _, hessian, _ = quadratic([*np.linspace(0.0, 30.0, 60).tolist(), -1.5, -0.4])
    vector = torch.linspace(-1, 1, 62, dtype=torch.float64)
    ones, exact = torch.ones(62, dtype=torch.float64), Eigenbasis(hessian, 100.0)
    space = KrylovSpace(lambda v: hessian @ v, vector, ones)
    compared = 0
    for size in range(2, 40, 3):
        space.grow(size)
        direction = float(space._basis[size].square().mean().sqrt())
        for functions in (OF_D2[:1], OF_D2[1:2], OF_D3[1:]):
            true = exact.lift(exact.apply(functions, exact.project(vector), 1.7)[0][0])
            values, products = space.apply(functions, 1.7, space.ritz())
            error, bound = float(1.7 * (values[0] - true).norm()), space.error(functions, 1.7, space.ritz()) / direction
            assert error <= bound + 1e-12
            if bound > 1e-8:
                compared += 1
                assert bound <= 300 * error
            assert torch.allclose(products[0], hessian @ values[0], atol=1e-11)
    assert compared >= 8


@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_lanczos_takes_the_steps_of_the_dense_method(rtol: float) -> None:
    """Through the first saddles of a deep linear network: the same steps, almost, and the same end within the tolerance."""
    objective, start = deep_linear()
    dense, lanczos = (follow(method, objective, start, 20.0, rtol) for method in METHODS)
    assert objective.counts.n_hvp > 0
    assert abs(lanczos.n_accepted - dense.n_accepted) <= 0.1 * dense.n_accepted
    assert relative_error(lanczos.knot.theta, dense.knot.theta) <= 2 * rtol


def test_the_space_of_the_gradient_serves_all_step_sizes() -> None:
    """After a rejection only what depends on the step size costs products again."""
    objective, start = t33()
    stepper = Exprb53Lanczos().begin(objective, Span(math.inf, 1e-6, 1e-8), ())
    here = at(objective, start)
    stepper.attempt(here, 0.1)
    assert isinstance(stepper, ExponentialStepper)
    assert isinstance(stepper._linear, Krylov)
    assert stepper._linear._first is not None
    space = stepper._linear._first[1]
    before = space.size
    stepper.attempt(here, 0.05)
    assert stepper._linear._first[1] is space
    assert space.size == before


def test_a_space_at_its_cap_asks_for_a_shorter_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """h λ = 10⁵ with 12 products: the step is shortened to what they are enough for, without further products."""
    monkeypatch.setattr("torch_gradflow.flow.exprb53.KRYLOV_CAP", 12)
    objective, hessian, b = quadratic(np.linspace(1.0, 1e3, 50).tolist())
    n_products = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal n_products
        n_products += 1
        return hessian @ vector

    linear = Krylov(product, torch.full((50,), 1e-6, dtype=torch.float64), 20.0)
    with pytest.raises(TooLong) as reason:
        linear.apply(OF_D2, b, 100.0)
    assert n_products == 12
    assert 1e-4 < reason.value.step_size < 10.0
    linear.apply(OF_D2, b, reason.value.step_size)
    assert n_products == 12
    end = follow(Exprb53Lanczos(), objective, torch.ones(50, dtype=torch.float64), 0.1, 1e-4)
    assert end.status == "t_end"


# Runs


@by_method
@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_run_is_the_same_bit_for_bit(method: OneStepMethod, after: int) -> None:
    objective, start = deep_linear()
    span = Span(3.0, 1e-6, 1e-8)
    arrivals: list[Arrival] = []
    method.run(objective, at(objective, start), span, lambda arrival: bool(arrivals.append(arrival)))
    seen: list[Arrival] = []

    def stop(arrival: Arrival) -> bool:
        seen.append(arrival)
        return len(seen) == after

    end = method.run(objective, at(objective, start), span, stop)
    assert end.status == "visit"
    knot = replace(end.knot, theta=end.knot.theta.clone())
    rest: list[Arrival] = []
    method.run(objective, knot, replace(span, step_size=end.step_size), lambda arrival: bool(rest.append(arrival)), end.memory)
    assert [a.knot.t for a in arrivals] == [a.knot.t for a in (*seen, *rest)]
    assert all(torch.equal(a.knot.theta, b.knot.theta) for a, b in zip(arrivals, (*seen, *rest), strict=True))


@by_method
def test_float32(method: OneStepMethod) -> None:
    """In float32 from start to end, to float32's accuracy."""
    objective, start = t33(dtype=torch.float32)
    assert start.dtype == torch.float32
    end = follow(method, objective, start, 10.0, 1e-4)
    assert end.status == "t_end"
    assert end.knot.theta.dtype == torch.float32
    assert relative_error(end.knot.theta.double(), reference_t33()) <= 1e-4


def test_max_evals_and_max_step_are_kept() -> None:
    objective, start = t33()
    end = Exprb53().run(objective, at(objective, start), Span(100.0, 1e-6, 1e-8, max_evals=30), lambda arrival: False)
    assert end.status == "max_evals"
    times = [0.0]
    span = Span(1.0, 1e-6, 1e-8, max_step=0.05)
    Exprb53().run(objective, at(objective, start), span, lambda arrival: bool(times.append(arrival.knot.t)))
    assert float(np.diff(times).max()) <= 0.05 * (1 + 1e-12)
