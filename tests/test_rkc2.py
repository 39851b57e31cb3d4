"""Runge–Kutta–Chebyshev: the polynomial, its order, its estimate, what rounding leaves, and flows followed with it."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from torch_gradflow import GradientFlow, integrate
from torch_gradflow.flow.method import Arrival, RunEnd, Span
from torch_gradflow.flow.methods import METHODS
from torch_gradflow.flow.rkc2 import (
    DAMPING,
    Coefficients,
    Rkc2,
    coefficients,
    error_estimate,
    increment,
    largest_curvature,
    most_stages,
    stability_boundary,
    stages_for,
)
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.module import ModuleObjective

STAGES = (2, 3, 5, 20, 200)
mpmath.mp.dps = 50


class Exact:
    """a_s, b_s, w₀ and w₁ with 50 digits, from the recursions of T_j, T_j′ and T_j″."""

    def __init__(self, s: int) -> None:
        self.s, self.w0 = s, 1 + mpmath.mpf(DAMPING) / s**2
        value, slope, bend = [mpmath.mpf(1), self.w0], [mpmath.mpf(0), mpmath.mpf(1)], [mpmath.mpf(0)] * 2
        for j in range(2, s + 1):
            value.append(2 * self.w0 * value[-1] - value[-2])
            slope.append(2 * value[j - 1] + 2 * self.w0 * slope[-1] - slope[-2])
            bend.append(4 * slope[j - 1] + 2 * self.w0 * bend[-1] - bend[-2])
        self.w1 = slope[s] / bend[s]
        self.b = [bend[2] / slope[2] ** 2, 1 / self.w0, *(bend[j] / slope[j] ** 2 for j in range(2, s + 1))]
        self.a = [1 - b * t for b, t in zip(self.b, value, strict=True)]

    def polynomial(self, z: float) -> mpmath.mpf:
        """P_s(z); T_s by its trigonometric or hyperbolic form."""
        x = self.w0 + self.w1 * z
        inside = abs(x) <= 1
        size = mpmath.cos(self.s * mpmath.acos(x)) if inside else mpmath.cosh(self.s * mpmath.acosh(abs(x)))
        sign = -1 if not inside and x < 0 and self.s % 2 else 1
        return self.a[-1] + self.b[-1] * sign * size


class Diagonal(Objective):
    """½ Σ λ_i θ_i² + ¼ c Σ θ_i⁴ without autograd."""

    def __init__(self, eigenvalues: Tensor, quartic: float = 0.0) -> None:
        self.eigenvalues, self.quartic = eigenvalues, quartic
        self.n_parameters, self.dtype, self.device = eigenvalues.numel(), eigenvalues.dtype, eigenvalues.device
        self.resolution, self.counts = torch.finfo(self.dtype).eps, EvaluationCounts()

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        gradient = self.eigenvalues * theta
        loss = 0.5 * (gradient @ theta)
        if self.quartic:
            gradient.add_(theta**3, alpha=self.quartic)
            loss = loss + 0.25 * self.quartic * (theta**4).sum()
        return loss, gradient

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        self.counts.n_hvp += 1
        return self.eigenvalues * vectors + 3 * self.quartic * theta**2 * vectors

    def hessian(self, theta: Tensor) -> Tensor:
        raise NotImplementedError


def values(s: int, z: list[float]) -> list[float]:
    """P_s(z) as the implementation computes it: one step of length 1 from ones, with the eigenvalues −z."""
    objective = Diagonal(-torch.tensor(z, dtype=torch.float64))
    start = torch.ones(len(z), dtype=torch.float64)
    gradient = objective.loss_and_gradient(start)[1]
    change = increment(lambda theta: objective.loss_and_gradient(theta)[1], start, gradient, 1.0, coefficients(s))
    assert objective.counts.n_grad == s
    return (1 + change).tolist()


def function(term: object, n: int) -> FunctionObjective:
    return FunctionObjective(lambda: (term,), n, torch.float64, torch.device("cpu"))  # type: ignore[arg-type]


def t33(seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[ModuleObjective, Tensor]:
    model, x, y = teacher_student(seed)
    objective = ModuleObjective(model.to(dtype), nn.functional.mse_loss, (x.to(dtype), y.to(dtype)))
    return objective, objective.initial_theta()


@cache
def reference(seed: int, t_end: float) -> Tensor:
    """θ of T33 by scipy on derivatives written out in numpy: nothing is shared with the package."""
    model, x, y = teacher_student(seed)
    problem = NumpyPerceptron(x, y, 8)
    method, rtol = ("DOP853", 1e-12) if t_end <= 10 else ("Radau", 1e-10)
    solution = solve_ivp(
        lambda t, theta: -problem.loss_and_gradient(theta)[1],
        (0, t_end),
        flat(model).numpy(),
        method=method,
        rtol=rtol,
        atol=1e-2 * rtol,
    )
    return torch.from_numpy(np.ascontiguousarray(solution.y[:, -1]))


def relative_error(theta: Tensor, true: Tensor) -> float:
    return float((theta - true).norm() / true.norm())


# The polynomial


@pytest.mark.parametrize("s", [*STAGES, 2000])
def test_coefficients_are_right_to_rounding(s: int) -> None:
    """Against 50 digits, for thousands of stages too."""
    exact, found = Exact(s), coefficients(s)
    a, b, w0, w1 = exact.a, exact.b, exact.w0, exact.w1
    assert float(abs(found.first / (b[1] * w1) - 1)) <= 1e-14
    assert len(found.rest) == s - 1
    for j, row in enumerate(found.rest, start=2):
        forward = 2 * w1 * b[j] / b[j - 1]
        expected = (2 * w0 * b[j] / b[j - 1], -b[j] / b[j - 2], forward, -a[j - 1] * forward)
        for value, true in zip(row, expected, strict=True):
            assert float(abs(value - true)) <= 1e-14 * max(float(abs(true)), s**-2)


@pytest.mark.parametrize("s", [*STAGES, 2000])
def test_the_polynomial_has_order_2(s: int) -> None:
    """P_s(z) = 1 + z + z²/2 + c z³ + …, by the recursion on power series with the coefficients as they are."""
    scheme = coefficients(s)
    older, newer = [mpmath.mpf(0)] * 4, [0, mpmath.mpf(scheme.first), 0, 0]
    for on_newer, on_older, on_slope, on_first in scheme.rest:
        slope = [0, 1 + newer[0], newer[1], newer[2]]  # z (1 + D)
        following = [on_newer * n + on_older * o + on_slope * f for n, o, f in zip(newer, older, slope, strict=True)]
        following[1] += on_first
        older, newer = newer, following
    cubic = {2: 0.0, 3: 0.0632, 5: 0.0885}.get(s, 0.101)
    for value, true, bound in zip(newer, (0, 1, 0.5, cubic), (0, 1e-15, 1e-15, 1e-3), strict=True):
        assert float(abs(value - true)) <= max(bound, 1e-16 * s**2 if bound < 1e-4 else 0)


@pytest.mark.parametrize("s", [*STAGES, 7, 2000])
def test_a_step_is_the_stability_polynomial(s: int) -> None:
    """In every mode, up to a few times s² roundings, which is what internal stability allows."""
    z = [-stability_boundary(s) * (k / 40) ** 2 for k in range(41)] + [-1e-3, 0.3, 1.0]
    exact = Exact(s)
    for found, at in zip(values(s, z), z, strict=True):
        assert found == pytest.approx(float(exact.polynomial(at)), abs=1e-15 * s**2, rel=1e-14)


@pytest.mark.parametrize("s", [2, 3, 4, 5, 7, 20, 200, 2000])
def test_stable_up_to_the_boundary_and_no_further(s: int) -> None:
    """Damped on [−β, 0], unstable just beyond; β is what the asymptotic formula says."""
    exact, beta = Exact(s), stability_boundary(s)
    assert beta == pytest.approx(float((1 + exact.w0) / exact.w1), rel=1e-13)
    assert beta == pytest.approx(2 / 3 * (s**2 - 1) * (1 - 2 * DAMPING / 15), rel=3e-3)
    inside = values(s, np.linspace(-beta, 0, 5001).tolist())
    assert max(abs(p) for p in inside) <= 1 + 1e-15 * s**2
    damped = values(s, np.linspace(-beta, -0.2, 5001).tolist())
    assert max(abs(p) for p in damped) <= 1 - 0.23 * DAMPING
    # Where |P| = 1: at T_s = 1 + … for even s, at P = −1 for odd s.
    level = mpmath.cosh(s * mpmath.acosh(exact.w0)) if s % 2 == 0 else (1 + exact.a[-1]) / exact.b[-1]
    edge = (mpmath.cosh(mpmath.acosh(level) / s) + exact.w0) / exact.w1
    assert beta <= float(edge) <= beta * (1 + 2 / s**2)
    assert abs(float(exact.polynomial(-edge * 1.0001))) > 1
    assert abs(float(exact.polynomial(-edge * 0.9999))) < 1


def test_the_number_of_stages_is_the_least_that_is_stable() -> None:
    """For any h λ, negative ones and the boundaries themselves included."""
    assert stages_for(-3.0) == stages_for(0.0) == stages_for(stability_boundary(2)) == 2
    for reach in np.geomspace(1.9, 1e8, 300):
        s = stages_for(float(reach))
        assert stability_boundary(s) >= reach
        assert s == 2 or stability_boundary(s - 1) < reach


@pytest.mark.parametrize("s", [20, 200])
def test_internal_stability(s: int) -> None:
    """An error in stage k comes out at most 1.3 (s − k + 1) times as large: about s²/2 in all."""
    scheme = coefficients(s)
    eigenvalues = torch.linspace(0, stability_boundary(s), 2001, dtype=torch.float64)
    zero, total = torch.zeros_like(eigenvalues), torch.zeros_like(eigenvalues)
    for k in range(2, s):
        calls = [1]

        def gradient_at(theta: Tensor, k: int = k, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            # Such that the increment of stage k is off by 1.
            return eigenvalues * theta - (1 / scheme.rest[k - 2][2] if calls[0] == k else 0.0)

        out = increment(gradient_at, zero, zero, 1.0, scheme).abs()
        assert float(out.max()) <= 1.35 * (s - k + 1)
        total += out
    assert float(total.max()) <= 0.5 * s**2 * 1.1
    assert most_stages(1e-4, 2.2e-16) > 1e6
    assert most_stages(1e-4, 1.2e-7) == 57


# Order and estimate on nonlinear flows


class Coupled(Diagonal):
    """½ (x − sin t)² + ¼ (xy − 1)² + y⁴/10 − t − ½ cos xt of θ = (x, y, t): not separable, and t drives x as time would."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(3, dtype=torch.float64))

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        x, y, t = theta.tolist()
        off, product, wave = x - math.sin(t), x * y - 1, 0.5 * math.sin(x * t)
        loss = 0.5 * off**2 + 0.25 * product**2 + 0.1 * y**4 - t - 0.5 * math.cos(x * t)
        slopes = (off + 0.5 * product * y + wave * t, 0.5 * product * x + 0.4 * y**3, -off * math.cos(t) - 1 + wave * x)
        return theta.new_tensor(loss), theta.new_tensor(slopes)


def fixed_steps(objective: Objective, theta: Tensor, t_end: float, n: int, scheme: Coefficients) -> tuple[Tensor, Tensor]:
    """n equal steps: the end, and the estimate of the first step."""
    h, estimates = t_end / n, []
    gradient = objective.loss_and_gradient(theta)[1]
    for _ in range(n):
        change = increment(lambda at: objective.loss_and_gradient(at)[1], theta, gradient, h, scheme)
        theta = theta + change
        there = objective.loss_and_gradient(theta)[1]
        estimates.append(error_estimate(change, gradient, there, h))
        gradient = there
    return theta, estimates[0]


@cache
def coupled_reference(t_end: float) -> Tensor:
    objective = Coupled()
    solution = solve_ivp(
        lambda t, y: -objective.loss_and_gradient(torch.from_numpy(y.copy()))[1].numpy(),
        (0, t_end),
        [1.5, -0.7, 0.2],
        method="DOP853",
        rtol=3e-14,
        atol=1e-15,
    )
    return torch.from_numpy(solution.y[:, -1].copy())


@pytest.mark.parametrize("s", STAGES)
def test_order_2(s: int) -> None:
    """Halving the steps divides the error by four."""
    objective, start, counts = Coupled(), torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64), (16, 32, 64)
    errors = [
        float((fixed_steps(objective, start, 1.0, n, coefficients(s))[0] - coupled_reference(1.0)).norm()) for n in counts
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(2, abs=0.1), (errors, orders)


@pytest.mark.parametrize("s", STAGES)
def test_the_estimate_has_order_3_and_the_size_of_the_error(s: int) -> None:
    """It falls as the error of one step does, is never below it, and at most twice it where the flow is linear."""
    objective, start = Coupled(), torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64)
    sizes = []
    for h in (0.04, 0.02, 0.01):
        end, estimate = fixed_steps(objective, start, h, 1, coefficients(s))
        error = float((end - coupled_reference(h)).norm())
        sizes.append((error, float(estimate.norm())))
        assert 0.9 <= sizes[-1][1] / error <= 3
    for i in range(2):
        assert math.log2(sizes[-2][i] / sizes[-1][i]) == pytest.approx(3, abs=0.15)
    linear = Diagonal(torch.ones(1, dtype=torch.float64))
    end, estimate = fixed_steps(linear, torch.ones(1, dtype=torch.float64), 1e-2, 1, coefficients(s))
    error = float(end) - math.exp(-1e-2)
    c = float(mpmath.taylor(Exact(s).polynomial, 0, 3)[3]) if s < 20 else 0.101
    assert float(estimate) / error == pytest.approx(0.8 * (0.25 - c) / (c - 1 / 6) * -1 * -1, rel=0.05)


def test_stiff_modes_are_at_rest() -> None:
    """Eigenvalues up to 1e6: the slow mode decides the error, and s grows with the square root."""
    objective = Diagonal(torch.tensor([1.0, 30.0, 1e3, 1e6], dtype=torch.float64))
    solution = integrate(objective, torch.ones(4, dtype=torch.float64), (0.0, 1.0), method="rkc2", rtol=1e-5)
    assert solution.status == "t_end"
    assert abs(float(solution.theta[-1, 0]) - math.exp(-1)) <= 1e-5
    assert float(solution.theta[-1, 1:].abs().max()) <= 1e-5
    assert solution.n_grad <= 25_000  # Euler's method would take half a million


# The largest curvature


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))[0]
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [10.0, *(10 * 0.5**k for k in range(1, 40))],  # as of a network's Hessian
        [10.0, 9.9, *np.linspace(0, 8, 60)],
        [1.0, -50.0, *np.linspace(-1, 0.5, 30)],  # negative ones do not count
        [-1.0, *np.linspace(-9, -2, 20)],
        [3.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
    ],
)
def test_the_largest_curvature_is_bounded_from_above(eigenvalues: list[float]) -> None:
    """From a start that knows nothing, and closely from the eigenvector that it returns."""
    matrix, top = symmetric(eigenvalues), max(eigenvalues)
    start = torch.randn(len(eigenvalues), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, vector = largest_curvature(lambda v: matrix @ v, start)
    assert top - 1e-9 <= found <= top + 0.35 * max(abs(e) for e in eigenvalues)
    for _ in range(3):
        found, vector = largest_curvature(lambda v: matrix @ v, vector + 0.1 * start / start.norm())
    assert top - 1e-9 <= found <= top + 0.06 * abs(top) + 1e-9


def test_a_curvature_that_is_not_finite_stays_unknown() -> None:
    found, vector = largest_curvature(lambda v: v * math.nan, torch.ones(3, dtype=torch.float64))
    assert found == 0.0
    assert bool(torch.isfinite(vector).all())


def test_differences_find_what_products_find() -> None:
    """With the same number of derivatives: one gradient costs less than one product."""
    results = []
    for exact in (False, True):
        objective = Diagonal(torch.logspace(-2, 3, 50, dtype=torch.float64), quartic=1.0)
        end = run(Rkc2(exact), objective, torch.linspace(-1, 1, 50, dtype=torch.float64), 5.0, 1e-4)
        results.append((end, objective.counts))
    (by_gradients, grads), (by_products, products) = results
    assert relative_error(by_gradients.knot.theta, by_products.knot.theta) <= 1e-6
    assert by_gradients.n_accepted == by_products.n_accepted
    assert grads.n_hvp == 0 < products.n_hvp
    assert grads.n_grad == products.n_grad + products.n_hvp
    assert (Rkc2().needs, Rkc2(exact=True).needs) == ("gradient", "hvp")


# Flows


def run(
    method: Rkc2,
    objective: Objective,
    theta: Tensor,
    t_end: float,
    rtol: float,
    stop_after: int = -1,
    before: RunEnd | None = None,
) -> RunEnd:
    """A run to ``t_end``, or to the given number of accepted steps; ``before`` is the run that it goes on from."""
    start = before.knot if before is not None else Knot(0.0, theta, *objective.loss_and_gradient(theta))
    visits = [0]

    def visit(arrival: Arrival) -> bool:
        visits[0] += 1
        return visits[0] == stop_after

    step_size = None if before is None else before.step_size
    memory = None if before is None else before.memory
    return method.run(objective, start, Span(t_end, rtol, 0.01 * rtol, step_size), visit, memory)


@pytest.mark.parametrize("seed", [1, 2])
def test_error_is_proportional_to_the_tolerance(seed: int) -> None:
    """T33 to t = 10: between a fifth of rtol and 5 rtol, from 1e-3 to 1e-6."""
    for rtol in (1e-3, 1e-4, 1e-5, 1e-6):
        objective, theta = t33(seed)
        solution = integrate(objective, theta, (0.0, 10.0), method="rkc2", rtol=rtol, atol=rtol)
        assert solution.status == "t_end"
        assert 0.1 <= relative_error(solution.theta[-1], reference(seed, 10.0)) / rtol <= 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_error_is_proportional_to_the_tolerance_on_a_long_flow(seed: int) -> None:
    """T33 to t = 1000, where h λ reaches 1e4; the gradients that it takes."""
    for rtol, n_grad in ((1e-3, 1000), (1e-4, 1500), (1e-5, 2600), (1e-6, 5500), (1e-7, 13_000)):
        objective, theta = t33(seed)
        solution = integrate(objective, theta, (0.0, 1e3), method="rkc2", rtol=rtol, atol=rtol)
        assert 0.1 <= relative_error(solution.theta[-1], reference(seed, 1e3)) / rtol <= 6
        assert solution.n_grad <= n_grad


def test_a_stiff_flow_takes_few_gradients() -> None:
    """T33 to t = 100 at 1e-4: a fifth of what dopri5 takes at most, with few rejections."""
    objective, theta = t33()
    stabilised = integrate(objective, theta, (0.0, 100.0), method="rkc2", rtol=1e-4, atol=1e-4)
    explicit = integrate(objective, theta, (0.0, 100.0), method="dopri5", rtol=1e-4, atol=1e-4)
    assert stabilised.n_grad <= explicit.n_grad / 5
    assert stabilised.n_rejected <= 5
    assert stabilised.dissipation_error <= 3e-3


def test_samples_between_steps() -> None:
    """The cubic through accepted points and slopes is as good as the steps."""
    objective = Diagonal(torch.tensor([0.3, 1.0, 40.0], dtype=torch.float64))
    start, times = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), [0.0, 1e-4, 0.03, 0.4, 1.1, 2.9, 3.0]
    solution = integrate(objective, start, (0.0, 3.0), method="rkc2", rtol=1e-5, t_eval=times)
    exact = start * torch.exp(-objective.eigenvalues * torch.tensor(times, dtype=torch.float64)[:, None])
    assert float((solution.theta - exact).abs().max()) <= 5e-5


def test_a_run_goes_on_from_its_memory_bit_for_bit() -> None:
    """Stopped after any step: the same points, the same evaluations."""
    objective, theta = t33()
    whole = run(Rkc2(), objective, theta, 30.0, 1e-4)
    n_whole = objective.counts.n_grad
    for stop_after in (1, 3, 26, 40):
        objective, theta = t33()
        part = run(Rkc2(), objective, theta, 30.0, 1e-4, stop_after)
        assert part.memory is not None
        assert part.memory.curvature is not None
        assert part.memory.curvature.shape == (1, 33)
        rest = run(Rkc2(), objective, theta, 30.0, 1e-4, before=part)
        assert torch.equal(rest.knot.theta, whole.knot.theta)
        assert part.n_accepted + rest.n_accepted == whole.n_accepted
        assert objective.counts.n_grad == n_whole


def test_relu_network() -> None:
    """Kinks cost some rejections; the error is that of the tolerance, to a factor."""
    smooth, x, y = teacher_student(1)
    objective = ModuleObjective(nn.Sequential(smooth[0], nn.ReLU(), smooth[2]), nn.functional.mse_loss, (x, y))
    start = true = objective.initial_theta()
    for _ in range(2000):  # the classical method in steps of 1/400, which do not mind the kinks either
        slopes = [objective.loss_and_gradient(true)[1]]
        for part in (0.5, 0.5, 1.0):
            slopes.append(objective.loss_and_gradient(true - part / 400 * slopes[-1])[1])
        true = true - (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + slopes[3]) / 2400
    for rtol, n_grad in ((1e-3, 300), (1e-4, 800)):
        before = objective.counts.n_grad
        end = run(Rkc2(), objective, start, 5.0, rtol)
        assert end.status == "t_end"
        assert relative_error(end.knot.theta, true) <= 10 * rtol
        assert objective.counts.n_grad - before <= n_grad


def test_saddle_to_saddle() -> None:
    """A deep linear network from a small start: growing modes are followed, the curvature may be negative at first."""

    def term(theta: Tensor) -> Tensor:
        a, b, c = theta.reshape(3, 2, 2)
        return ((c @ b @ a - torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))) ** 2).sum()

    start = 0.1 * torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coarse, fine = (integrate(function(term, 12), start, (0.0, 3.0), method="rkc2", rtol=rtol) for rtol in (1e-4, 1e-6))
    assert coarse.status == fine.status == "t_end"
    assert relative_error(coarse.theta[-1], fine.theta[-1]) <= 1e-2
    assert float(fine.loss[-1]) < 0.5 * float(fine.loss[0])


class Peak(TorchDispatchMode):
    """The most memory that large tensors took at once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.live, self.peak = least, {}, 0  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.live[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def test_large_problems_take_a_few_vectors() -> None:
    """10⁵ parameters: two dozen vectors at most, the eight of the Lanczos basis included."""
    n = 100_000
    objective = Diagonal(torch.logspace(-3, 3.5, n, dtype=torch.float64), quartic=1.0)
    start = torch.ones(n, dtype=torch.float64)
    with Peak(8 * n) as memory:
        end = run(Rkc2(), objective, start, 2.0, 1e-2)
    assert end.status == "t_end"
    assert memory.peak <= 24 * 8 * n
    assert objective.counts.n_grad / end.n_accepted > 6
    values_ = objective.eigenvalues
    decay = torch.exp(-2 * values_ * 2.0)
    exact = (values_ * decay / (values_ + 1 - decay)).sqrt()  # θ' = −λθ − θ³ from 1
    assert float((end.knot.theta - exact).abs().max()) <= 1e-2


def test_float32() -> None:
    """At the default tolerance, and with no more stages than rounding allows."""
    objective, theta = t33(dtype=torch.float32)
    solution = integrate(objective, theta, (0.0, 10.0), method="rkc2")
    assert solution.theta.dtype == torch.float32
    assert relative_error(solution.theta[-1].double(), reference(1, 10.0)) <= 5e-4
    stiff = Diagonal(torch.tensor([0.5, 1e5], dtype=torch.float32))
    end = run(Rkc2(), stiff, torch.ones(2), 3.0, 1e-4)
    assert end.status == "t_end"
    assert stiff.counts.n_grad <= (end.n_accepted + 10) * 58
    assert float(end.knot.theta[0]) == pytest.approx(math.exp(-1.5), abs=1e-3)


def test_max_evals_and_divergence_are_statuses() -> None:
    """The last accepted point is kept."""
    objective = Diagonal(torch.tensor([1.0, 1e5], dtype=torch.float64))
    start = torch.ones(2, dtype=torch.float64)
    solution = integrate(objective, start, (0.0, 100.0), method="rkc2", max_evals=200)
    assert solution.status == "max_evals"
    assert 0 < float(solution.t[-1]) < 100
    term = lambda theta: -(theta**3).sum() / 3  # noqa: E731
    solution = integrate(function(term, 1), start[:1], (0.0, 2.0), method="rkc2", rtol=1e-4)
    assert solution.status in ("underflow", "not finite")
    assert float(solution.t[-1]) == pytest.approx(1.0, abs=1e-2)


def test_steps_beyond_the_domain_are_shortened() -> None:
    """√θ has no value for θ < 0, nor has its curvature in the neighbourhood of a start next to 0."""
    term = lambda theta: (theta.sqrt() * (theta - 3)).sum()  # noqa: E731
    start = torch.full((1,), 1e-3, dtype=torch.float64)
    solution = integrate(function(term, 1), start, (0.0, 50.0), method="rkc2", step_size=10.0)
    assert solution.status == "t_end"
    assert float(solution.theta[-1]) == pytest.approx(1.0, abs=1e-5)


def test_a_start_at_rest_stays_there() -> None:
    """Zero gradient, zero θ: one step to the end."""
    objective = Diagonal(torch.ones(3, dtype=torch.float64))
    solution = integrate(objective, torch.zeros(3, dtype=torch.float64), (0.0, 1e6), method="rkc2")
    assert solution.status == "t_end"
    assert bool((solution.theta == 0).all())


def test_by_name_and_in_the_optimizer() -> None:
    """Pieces of a flow come to the same point as the whole."""
    assert isinstance(METHODS["rkc2"], Rkc2)
    model, x, y = teacher_student(1)
    optimizer = GradientFlow(model.parameters(), lr=2.5, method="rkc2", rtol=1e-5)
    closure = make_closure(optimizer, model, x, y)
    for _ in range(4):
        optimizer.step(closure)
    assert relative_error(flat(model), reference(1, 10.0)) <= 1e-4
