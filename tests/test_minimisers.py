"""Each minimiser against closed forms, scipy's minimisers, and a high-precision solution."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable
from itertools import pairwise

import mpmath as mp
import numpy as np
import psutil
import pytest
import scipy.optimize
import torch
from problems import NumpyPerceptron, flat, make_closure, teacher_student
from torch import Tensor, nn

from torch_gradflow import DerivativeError, ModuleObjective, NewtonPolish, Objective, integrate, minimize
from torch_gradflow.minimize import auto
from torch_gradflow.minimize.acceptance import Point, improves, judge
from torch_gradflow.minimize.krylov import KrylovSpace, truncated_cg
from torch_gradflow.minimize.line_search import LinePoint, LineSearch
from torch_gradflow.minimize.methods import METHODS, find_method
from torch_gradflow.minimize.quasi_newton import DenseInverse, LimitedMemory, SecantMatrix
from torch_gradflow.objectives.function import FunctionObjective

OURS = ("auto", "trust-region", "trust-region-lanczos", "trust-region-cg", "newton", "saddle-free", "bfgs", "lbfgs")
SECOND_ORDER = ("auto", "trust-region", "trust-region-lanczos", "trust-region-cg", "newton", "saddle-free")
nan = math.nan


def objective_of(term: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype = torch.float64) -> FunctionObjective:
    """A function of θ as an Objective."""
    return FunctionObjective(lambda: (term,), n, dtype, torch.device("cpu"))


def vector(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(theta: Tensor) -> Tensor:
    """The banana valley with its minimum at (1, 1, …)."""
    return (100 * (theta[1:] - theta[:-1] ** 2) ** 2 + (1 - theta[:-1]) ** 2).sum()


def quadratic(seed: int, n: int, eigenvalues: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """½ (θ − θ*)ᵀ H (θ − θ*) + 1 in random directions, with H and θ*."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    hessian = basis @ torch.diag(eigenvalues) @ basis.T
    best = torch.randn(n, dtype=torch.float64, generator=generator)
    return lambda t: 0.5 * (t - best) @ hessian @ (t - best) + 1.0, hessian, best


@pytest.fixture(scope="module")
def student() -> tuple[Objective, Tensor]:
    """A 13-parameter student near a regular minimum: the end of a flow to t = 100."""
    model, x, y = teacher_student(5, n_student=3)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    return objective, integrate(objective, flat(model), (0.0, 100.0), method="bdf", rtol=1e-4).theta[-1]


# --- all methods


@pytest.mark.parametrize("method", OURS)
def test_a_student_to_round_off(method: str, student: tuple[Objective, Tensor]) -> None:
    """The gradient, written out in numpy, is zero to round-off at the point found; the loss never rises on the way."""
    objective, theta = student
    losses: list[float] = []
    gtol = 1e-13 if method != "lbfgs" else 1e-8  # it needs 5000 gradients for 1e-13
    result = minimize(
        objective, theta, method=method, gtol=gtol, certificate=False, progress=lambda report: losses.append(report.loss)
    )
    assert result.status == "converged", result.message
    _, x, y = teacher_student(5, n_student=3)
    assert np.abs(NumpyPerceptron(x, y, 3).loss_and_gradient(result.theta.numpy())[1]).max() <= gtol + 2e-15
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    assert result.method == method


@pytest.mark.parametrize("method", [m for m in OURS if m != "lbfgs"])
def test_the_minimum_agrees_with_high_precision(method: str) -> None:
    """θ of a logistic regression with weight decay against Newton's method in 40 digits."""
    rng = np.random.default_rng(3)
    x, sign = rng.standard_normal((12, 3)), np.where(rng.random(12) < 0.5, -1.0, 1.0)
    data, signs = torch.from_numpy(x), torch.from_numpy(sign)
    term = lambda t: nn.functional.softplus(-signs * (data @ t)).mean() + 0.05 * (t @ t)  # noqa: E731
    result = minimize(objective_of(term, 3), torch.zeros(3, dtype=torch.float64), method=method, certificate=False)
    with mp.workdps(40):
        theta = mp.matrix([0, 0, 0])
        for _ in range(12):
            gradient, hessian = theta / 10, mp.eye(3) / 10
            for row, s in zip(x.tolist(), sign.tolist(), strict=True):
                v = mp.matrix(row)
                p = 1 / (1 + mp.exp(s * (v.T * theta)[0]))
                gradient, hessian = gradient - v * (s * p / 12), hessian + (v * v.T) * (p * (1 - p) / 12)
            theta = theta - mp.lu_solve(hessian, gradient)
        expected = vector(*(float(value) for value in theta))
    assert result.grad_norm <= 1e-13
    assert float((result.theta - expected).abs().max()) <= 2e-12


@pytest.mark.parametrize("method", OURS)
def test_rosenbrock(method: str) -> None:
    """From (−1.2, 1, −1.2, 1) to one of the two minima, as scipy's own derivatives of that function confirm."""
    result = minimize(objective_of(rosenbrock, 4), vector(-1.2, 1.0, -1.2, 1.0), method=method, certificate=False)
    assert result.status in ("converged", "rounding"), result.message
    assert np.abs(scipy.optimize.rosen_der(result.theta.numpy())).max() <= 1e-12
    assert np.linalg.eigvalsh(scipy.optimize.rosen_hess(result.theta.numpy()))[0] > 0


@pytest.mark.parametrize("method", OURS)
def test_float32_ends_truthfully(method: str) -> None:
    """gtol=1e-13 is out of reach: the gradient comes down to rounding, and the status says so."""
    _, hessian, best = quadratic(1, 5, vector(0.1, 0.5, 1.0, 2.0, 3.0))
    hessian32, best32 = hessian.float(), best.float()
    single = lambda t: 0.5 * (t - best32) @ hessian32 @ (t - best32) + 1.0  # noqa: E731
    result = minimize(objective_of(single, 5, torch.float32), torch.zeros(5), method=method, certificate=False)
    assert result.theta.dtype == torch.float32
    assert result.status in ("converged", "rounding")
    assert result.grad_norm <= 2e-6


@pytest.mark.parametrize("method", OURS)
def test_badly_scaled_variables(method: str) -> None:
    """Curvatures from 1e-8 to 1e8 on the diagonal: no verdict of convergence before the gradient norm says so."""
    scales = vector(1e-8, 1e-3, 1.0, 1e4, 1e8)
    best = vector(3.0, -2.0, 1.0, 0.5, -0.1)
    term = lambda t: 0.5 * (scales * (t - best) ** 2).sum()  # noqa: E731
    result = minimize(objective_of(term, 5), torch.ones(5, dtype=torch.float64), method=method, gtol=1e-12, max_iter=500)
    assert (result.status == "converged") == (result.grad_norm <= 1e-12)
    if method in ("auto", "trust-region", "newton", "saddle-free"):
        assert float(((result.theta - best) * scales).abs().max()) <= 1e-12
        assert result.certificate is not None
        assert result.certificate.kind == "minimum"


@pytest.mark.parametrize("method", OURS)
def test_rank_deficient_quadratics(method: str) -> None:
    """A singular Hessian: any point of the plane of minima will do; θ − θ* has no component outside the null space."""
    term, hessian, best = quadratic(2, 6, vector(0.0, 0.0, 0.5, 1.0, 2.0, 4.0))
    result = minimize(objective_of(term, 6), torch.ones(6, dtype=torch.float64), method=method)
    assert result.grad_norm <= 1e-13, result.message
    assert float((hessian @ (result.theta - best)).abs().max()) <= 1e-13
    assert float((result.theta - best).norm()) <= 10
    assert result.certificate is not None
    assert result.certificate.kind == "degenerate minimum"


@pytest.mark.parametrize("method", OURS)
def test_a_singular_minimum(method: str) -> None:
    """θ₁⁴ + θ₂²: the gradient falls below the tolerance though Newton's convergence is linear."""
    result = minimize(objective_of(lambda t: t[0] ** 4 + t[1] ** 2, 2), vector(1.0, 1.0), method=method)
    assert result.grad_norm <= 1e-13, result.message
    assert result.certificate is not None
    assert result.certificate.kind == "degenerate minimum"


@pytest.mark.parametrize("method", OURS)
def test_an_indefinite_start(method: str) -> None:
    """θ₁⁴/4 − θ₁²/2 + θ₂² from near its saddle: the minimum, not the saddle."""
    term = lambda t: t[0] ** 4 / 4 - t[0] ** 2 / 2 + t[1] ** 2  # noqa: E731
    result = minimize(objective_of(term, 2), vector(1e-3, 0.3), method=method)
    assert abs(float(result.theta[0])) == pytest.approx(1.0, abs=1e-12)
    assert result.certificate is not None
    assert result.certificate.kind == "minimum"


@pytest.mark.parametrize("method", OURS)
def test_steps_shorten_at_the_border_of_the_domain(method: str) -> None:
    """−log θ₁ − log(1 − θ₁) + θ₂²/2, NaN outside (0, 1), from close to the border."""

    def term(t: Tensor) -> Tensor:
        return -torch.log(t[0]) - torch.log(1 - t[0]) + 0.5 * t[1] ** 2

    result = minimize(objective_of(term, 2), vector(1e-4, 2.0), method=method, certificate=False)
    assert result.status == "converged", result.message
    assert result.theta.tolist() == pytest.approx([0.5, 0.0], abs=1e-13)


@pytest.mark.parametrize("method", OURS)
def test_a_plateau_ends_at_once(method: str) -> None:
    """Dead ReLUs: a gradient of exactly zero is converged, and the certificate says that all is flat."""
    result = minimize(objective_of(lambda t: torch.relu(t).sum() + 2.0, 3), vector(-1.0, -2.0, -3.0), method=method)
    assert (result.status, result.n_iter, result.grad_norm) == ("converged", 0, 0.0)
    assert result.certificate is not None
    assert result.certificate.kind in ("degenerate minimum", "degenerate (undecided)")
    assert result.certificate.n_zero == 3


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_hessians_that_are_not_finite(method: str) -> None:
    """A sentence, not an endless loop."""

    class Infinite(FunctionObjective):
        def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
            return vectors * math.inf

        def hessian(self, theta: Tensor) -> Tensor:
            return torch.full((2, 2), math.inf, dtype=theta.dtype)

    objective = Infinite(lambda: (lambda t: (t**2).sum(),), 2, torch.float64, torch.device("cpu"))
    with pytest.raises(DerivativeError, match="not finite"):
        minimize(objective, vector(1.0, 1.0), method=method, certificate=False)


@pytest.mark.parametrize("method", ["trust-region", "trust-region-cg", "bfgs", "newton", "scipy:BFGS"])
def test_an_exception_leaves_the_last_point(method: str) -> None:
    """The model keeps the best point before the objective failed."""
    model, x, y = teacher_student(5, n_student=3)
    optimizer = NewtonPolish(model.parameters(), method=method, engine="closure")
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise RuntimeError("the disk is full")
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    before = float(nn.functional.mse_loss(model(x), y).detach())
    with pytest.raises(RuntimeError, match="the disk is full"):
        optimizer.step(closure)
    assert optimizer.result is not None
    assert optimizer.result.status == "failed"
    assert torch.equal(flat(model), optimizer.result.theta)
    assert float(nn.functional.mse_loss(model(x), y).detach()) <= before


@pytest.mark.parametrize("method", ["bfgs", "trust-region-lanczos", "newton", "scipy:SLSQP"])
def test_ctrl_c_keeps_the_best_point(method: str) -> None:
    """KeyboardInterrupt is raised again; result and parameters are the best point, and no thread is left behind."""
    n_threads = threading.active_count()
    model, x, y = teacher_student(5, n_student=3)

    def interrupt(report: object) -> None:
        if getattr(report, "n_iter", 0) == 5:
            raise KeyboardInterrupt

    polish = NewtonPolish(model.parameters(), method=method, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        polish.step(make_closure(polish, model, x, y))
    assert polish.result is not None
    assert polish.result.status == "interrupted"
    assert torch.equal(flat(model), polish.result.theta)
    assert threading.active_count() == n_threads


def test_unknown_methods_are_refused() -> None:
    """With the names of those that there are."""
    with pytest.raises(ValueError, match=r"method must be one of 'auto', 'trust-region'.*not 'nexton'"):
        find_method("nexton")
    with pytest.raises(ValueError, match="method must be one of"):
        NewtonPolish([nn.Parameter(vector(1.0))], method="BFGS")
    with pytest.raises(ValueError, match=r"'levenberg-marquardt' needs a sum of squares"):
        minimize(objective_of(rosenbrock, 2), vector(0.0, 0.0), method="levenberg-marquardt")


@pytest.mark.parametrize("method", ["trust-region-cg", "lbfgs", "newton"])
def test_saddles_are_left_where_that_is_asked_for(method: str) -> None:
    """A start on the saddle's ridge, along which all gradients point to the saddle θ₁⁴/4 − θ₁²/2 + θ₂² has at 0."""
    objective = objective_of(lambda t: t[0] ** 4 / 4 - t[0] ** 2 / 2 + t[1] ** 2, 2)
    stays = minimize(objective, vector(0.0, 0.3), method=method)
    assert stays.certificate is not None
    assert (stays.certificate.kind, stays.choices) == ("saddle", ())
    leaves = minimize(objective, vector(0.0, 0.3), method=method, escape=True)
    assert leaves.certificate is not None
    assert leaves.certificate.kind == "minimum"
    assert abs(float(leaves.theta[0])) == pytest.approx(1.0, abs=1e-12)
    assert leaves.choices[0].reason.startswith("a saddle was left")
    with pytest.raises(ValueError, match="escape=True needs certificate=True"):
        minimize(objective, vector(0.0, 0.3), escape=True, certificate=False)


# --- acceptance


def test_acceptance_by_the_gradient_below_the_rounding_of_the_loss() -> None:
    """A rise of one unit in the last place is no reason to refuse a step that halves the gradient; a real rise is."""
    here = Point(vector(0.0), torch.tensor(1.0, dtype=torch.float64), vector(1e-9))
    better = Point(vector(1e-9), torch.tensor(1.0 + 2.2e-16, dtype=torch.float64), vector(5e-10))
    worse = Point(vector(1e-9), torch.tensor(1.0 + 1e-9, dtype=torch.float64), vector(5e-10))
    assert judge(here, better, 1e-18, 2.2e-16, newton=True).accepted
    assert not judge(here, worse, 1e-18, 2.2e-16, newton=True).accepted
    assert not judge(better, here, 1e-18, 2.2e-16, newton=True).accepted
    assert judge(here, better, 1e-18, 2.2e-16, newton=True).rounding
    assert improves(here, better, 2.2e-16)
    assert not improves(here, worse, 2.2e-16)
    assert not improves(here, Point(vector(0.0), torch.tensor(nan), vector(0.0)), 2.2e-16)


# --- the line search


def more_thuente(number: int) -> Callable[[float], tuple[float, float]]:
    """The test functions 1 to 6 of Moré and Thuente (1994, ACM TOMS 20, 286–307, section 5), with their slopes."""

    def first(a: float) -> tuple[float, float]:
        return -a / (a * a + 2), (a * a - 2) / (a * a + 2) ** 2

    def second(a: float) -> tuple[float, float]:
        b = a + 0.004
        return b**5 - 2 * b**4, 5 * b**4 - 8 * b**3

    def third(a: float) -> tuple[float, float]:
        beta, wiggles = 0.01, 39
        if a <= 1 - beta:
            value, slope = 1 - a, -1.0
        elif a >= 1 + beta:
            value, slope = a - 1, 1.0
        else:
            value, slope = (a - 1) ** 2 / (2 * beta) + beta / 2, (a - 1) / beta
        angle = wiggles * math.pi / 2
        return value + 2 * (1 - beta) / (wiggles * math.pi) * math.sin(angle * a), slope + (1 - beta) * math.cos(angle * a)

    def yanai(one: float, two: float) -> Callable[[float], tuple[float, float]]:
        g1, g2 = (math.sqrt(1 + b * b) - b for b in (one, two))

        def value(a: float) -> tuple[float, float]:
            left, right = math.hypot(1 - a, two), math.hypot(a, one)
            return g1 * left + g2 * right, g1 * (a - 1) / left + g2 * a / right

        return value

    return [first, second, third, yanai(1e-3, 1e-3), yanai(1e-2, 1e-3), yanai(1e-3, 1e-2)][number - 1]


@pytest.mark.parametrize("first_trial", [1e-3, 1e-1, 1e1, 1e3])
@pytest.mark.parametrize("number", range(1, 7))
def test_line_search_on_the_functions_of_more_and_thuente(number: int, first_trial: float) -> None:
    """What it returns satisfies Wolfe's conditions, recomputed here; in few evaluations."""
    phi, search = more_thuente(number), LineSearch(curvature=0.1, decrease=1e-3)
    calls: list[float] = []

    def counted(alpha: float) -> tuple[float, float]:
        calls.append(alpha)
        return phi(alpha)

    start = LinePoint(0.0, *phi(0.0))
    found = search.search(counted, start, first_trial, 0.0)
    assert found is not None
    value, slope = phi(found.alpha)
    assert value <= start.value + search.decrease * found.alpha * start.slope or (
        (2 * search.decrease - 1) * start.slope >= slope and value <= start.value
    )
    assert slope >= search.curvature * start.slope
    assert found.alpha == calls[-1]
    assert len(calls) <= 25


def test_line_search_below_the_rounding_of_the_function() -> None:
    """1 + (α − 1e-9)² − 1e-18 is flat in float64 up to 1e-8: its slopes lead to the minimum, within Wolfe's curvature."""
    phi = lambda a: (1.0 + ((a - 1e-9) ** 2 - 1e-18), 2 * (a - 1e-9))  # noqa: E731
    found = LineSearch().search(phi, LinePoint(0.0, *phi(0.0)), 1e-7, 1e-15)
    assert found is not None
    assert abs(found.slope) <= 0.9 * 2e-9
    assert found.value <= 1.0 + 1e-15


def test_line_search_shortens_where_there_is_no_value() -> None:
    """−log(1 − α) − 2α ends at α = 1, and has its minimum at ½."""

    def phi(alpha: float) -> tuple[float, float]:
        return (-math.log(1 - alpha) - 2 * alpha, 1 / (1 - alpha) - 2) if alpha < 1 else (nan, nan)

    found = LineSearch(curvature=0.1).search(phi, LinePoint(0.0, *phi(0.0)), 1e6, 0.0)
    assert found is not None
    assert found.alpha == pytest.approx(0.5, abs=0.06)


def test_line_search_gives_up_on_what_only_rises_or_falls() -> None:
    """A slope that belongs to another function, and one without an end: None, after a bounded number of evaluations."""
    calls = 0

    def phi(alpha: float) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        return alpha, -1.0

    assert LineSearch().search(phi, LinePoint(0.0, 0.0, -1.0), 1.0, 0.0) is None
    assert LineSearch(decrease=0.5).search(lambda a: (-0.1 * a, -1.0), LinePoint(0.0, 0.0, -1.0), 1.0, 0.0) is None
    assert calls <= 100


# --- Krylov spaces


@pytest.mark.parametrize("kind", ["definite", "indefinite", "singular"])
@pytest.mark.parametrize("radius", [1e-2, 1.0, 1e2])
def test_lanczos_solves_the_subproblem(kind: str, radius: float) -> None:
    """(H + μ)p = −g, μ ≥ 0, H + μ ⪰ 0, μ(Δ − ‖p‖) = 0 hold for what the whole Krylov space gives (KKT)."""
    spectrum = {"definite": (0.1, 5.0), "indefinite": (-2.0, 5.0), "singular": (0.0, 5.0)}[kind]
    n = 20
    _, hessian, _ = quadratic(4, n, torch.linspace(*spectrum, n, dtype=torch.float64))
    g = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    space = KrylovSpace(lambda v: hessian @ v, g, n)
    space.grow(1)
    found = space.minimise(radius, 1e-12)
    p = found.step
    mu = max(0.0, -float(p @ (g + hessian @ p)) / float(p @ p))
    assert float(p.norm()) <= radius * (1 + 1e-9)
    # The ball's border is found to 1e-3, and p then scaled to it.
    assert mu < 1e-12 or float(p.norm()) >= radius * (1 - 2e-3)
    assert float((hessian @ p + mu * p + g).norm()) <= (2e-3 if mu > 1e-12 else 1e-10) * float(g.norm())
    assert mu >= -spectrum[0] - 1e-2
    assert found.predicted == pytest.approx(-float(g @ p + 0.5 * p @ hessian @ p), rel=1e-9)
    before = space.size
    assert float(space.minimise(0.1 * radius, 1e-12).step.norm()) <= 0.1 * radius * (1 + 1e-9)
    assert space.size == before  # a smaller radius costs no product


@pytest.mark.parametrize("radius", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("lowest", [0.1, -2.0])
def test_truncated_cg_reduces_the_model_as_steihaug_shows(lowest: float, radius: float) -> None:
    """At least half of the best reduction where H is positive definite (Yuan 2000), never less than the Cauchy point's."""
    n = 20
    _, hessian, _ = quadratic(6, n, torch.linspace(lowest, 5.0, n, dtype=torch.float64))
    g = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = truncated_cg(lambda v: hessian @ v, g, hessian @ g, radius, 1e-12, 100)
    space = KrylovSpace(lambda v: hessian @ v, g, n)
    space.grow(1)
    best = space.minimise(radius, 1e-12).predicted
    curvature = float(g @ hessian @ g)
    along = radius / float(g.norm())
    cauchy = min(along, float(g @ g) / curvature) if curvature > 0 else along
    assert found.predicted >= (cauchy * float(g @ g) - 0.5 * cauchy**2 * curvature) * (1 - 1e-12)
    assert found.predicted <= best * (1 + 1e-3)
    assert float(found.step.norm()) <= radius * (1 + 1e-12)
    if lowest > 0:
        assert found.predicted >= 0.5 * best
    assert found.predicted == pytest.approx(-float(g @ found.step + 0.5 * found.step @ hessian @ found.step), rel=1e-9)


@pytest.mark.parametrize("method", ["trust-region-cg", "trust-region-lanczos", "lbfgs"])
def test_no_dense_matrix_for_many_parameters(method: str) -> None:
    """Parameters whose Hessian would take 320 GB, with a minimum known in closed form."""
    n = 200_000
    scales = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    term = lambda t: 0.5 * (scales * t * t).sum() - t.sum() + 1.0  # noqa: E731
    result = minimize(objective_of(term, n), torch.zeros(n, dtype=torch.float64), method=method, gtol=1e-10, certificate=False)
    assert result.status == "converged", result.message
    assert float((result.theta - 1 / scales).abs().max()) <= 1e-10
    assert result.n_hessian == 0


def test_memory_is_checked_for_dense_methods_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name of a method that needs none."""
    available = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    objective, start = objective_of(rosenbrock, 10), torch.zeros(10, dtype=torch.float64)
    for method in ("trust-region", "newton", "bfgs"):
        with pytest.raises(MemoryError, match="method='trust-region-lanczos'"):
            minimize(objective, start, method=method)
    result = minimize(objective, start, certificate=False)
    assert result.status == "converged"
    assert [choice.method for choice in result.choices] == ["trust-region-lanczos"]


# --- quasi-Newton


def test_bfgs_learns_the_inverse_hessian() -> None:
    """The secant equation B y = s holds after each update; B stays symmetric; n exact conjugate steps give H⁻¹."""
    _, hessian, _ = quadratic(8, 5, vector(0.5, 1.0, 2.0, 3.0, 4.0))
    matrix = DenseInverse()
    directions = torch.linalg.eigh(hessian)[1]
    for s in directions.T:  # conjugate to each other
        matrix.learn(s, hessian @ s)
        assert float((matrix.apply(hessian @ s) - s).norm()) <= 1e-13
    columns = torch.stack([matrix.apply(e) for e in torch.eye(5, dtype=torch.float64)])
    assert float((columns - columns.T).abs().max()) <= 1e-14
    assert float((columns - torch.linalg.inv(hessian)).abs().max()) <= 1e-13


def test_two_loops_equal_the_dense_update() -> None:
    """As long as no pair was forgotten, and from the same scaled identity (that of the newest pair)."""
    _, hessian, _ = quadratic(9, 6, torch.linspace(0.5, 4.0, 6, dtype=torch.float64))
    generator = torch.Generator().manual_seed(10)
    pairs = [(s, hessian @ s) for s in torch.randn(4, 6, dtype=torch.float64, generator=generator)]
    limited: SecantMatrix = LimitedMemory(10)
    for s, y in pairs:
        limited.learn(s, y)
    gamma = float(pairs[-1][0] @ pairs[-1][1]) / float(pairs[-1][1] @ pairs[-1][1])
    dense = gamma * torch.eye(6, dtype=torch.float64)
    for s, y in pairs:
        rho, eye = 1 / float(s @ y), torch.eye(6, dtype=torch.float64)
        dense = (eye - rho * torch.outer(s, y)) @ dense @ (eye - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
    g = torch.randn(6, dtype=torch.float64, generator=generator)
    assert float((limited.apply(g) - dense @ g).norm()) <= 1e-13 * float(g.norm())


# --- other packages


@pytest.mark.parametrize("method", ["scipy:BFGS", "scipy:L-BFGS-B", "scipy:SLSQP", "scipy:trust-exact", "scipy:trust-ncg"])
def test_scipy_by_name(method: str) -> None:
    """The best point that scipy sees, with as many gradients as scipy asked for; Rosenbrock's valley."""
    result = minimize(objective_of(rosenbrock, 4), vector(-1.2, 1.0, -1.2, 1.0), method=method, gtol=1e-6, certificate=False)
    assert result.status == "converged", result.message
    needs_second = method in ("scipy:trust-exact", "scipy:trust-ncg")  # which are confirmed by gradients on first use
    assert result.n_grad == result.n_iter + 1 or (needs_second and result.n_grad > result.n_iter)
    assert (result.n_hessian > 0) == (method == "scipy:trust-exact")
    assert (result.n_hvp > 0) == (method == "scipy:trust-ncg")


def test_what_a_package_says_when_it_ends_is_told() -> None:
    """A method that needs a definite Hessian on a saddle, and limits that hold for all."""
    saddle = objective_of(lambda t: t[0] ** 4 - t[0] ** 2 + t[1] ** 2, 2)
    result = minimize(saddle, vector(0.1, 1.0), method="scipy:dogleg", certificate=False)
    assert result.status == "rounding"
    assert "scipy:dogleg ended:" in result.message
    limited = minimize(objective_of(rosenbrock, 4), vector(-1.2, 1.0, -1.2, 1.0), method="scipy:BFGS", max_iter=7)
    assert (limited.status, limited.n_iter) == ("max_iter", 7)
    assert threading.active_count() == 1


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs them; nothing has moved."""
    genuine = importlib.import_module

    def missing(name: str, package: str | None = None) -> object:
        if name.split(".")[0] in ("scipy", "nlopt"):
            raise ImportError(name)
        return genuine(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    for method, remedy in (("scipy:BFGS", "pip install scipy"), ("nlopt:LD_SLSQP", "pip install nlopt")):
        with pytest.raises(ImportError, match=remedy):
            minimize(objective_of(rosenbrock, 2), vector(0.0, 0.0), method=method)


def test_nlopt_by_name() -> None:
    """Where it is installed."""
    pytest.importorskip("nlopt")
    result = minimize(objective_of(rosenbrock, 4), vector(-1.2, 1.0, -1.2, 1.0), method="nlopt:LD_SLSQP", gtol=1e-6)
    assert result.status == "converged", result.message
    assert result.certificate is not None
    assert result.certificate.kind == "minimum"


# --- auto


def test_auto_takes_newton_at_regular_minima(student: tuple[Objective, Tensor]) -> None:
    """And says so."""
    objective, theta = student
    result = minimize(objective, theta, certificate=False)
    assert [choice.method for choice in result.choices] == ["trust-region"]
    assert result.choices[0].n_iter == 0
    assert result.choices[0].reason
    assert result.n_jacobian == 0


def test_auto_reaches_zero_loss_where_hessians_are_singular() -> None:
    """A student with more neurons than its teacher: Newton crawls, least squares do not; a true certificate."""
    model, x, y = teacher_student(4)
    result = minimize(ModuleObjective(model, nn.functional.mse_loss, (x, y)), flat(model), max_iter=600)
    assert result.status == "converged", result.message
    assert [choice.method for choice in result.choices][:2] == ["trust-region", "levenberg-marquardt"]
    assert result.n_hessian + result.n_jacobian <= 400
    assert np.abs(NumpyPerceptron(x, y, 8).loss_and_gradient(result.theta.numpy())[1]).max() <= 1.1e-13
    assert result.loss <= 1e-17
    assert result.certificate is not None
    assert result.certificate.kind != "not critical"


def valley(theta: Tensor) -> Tensor:
    """A narrow valley along a circle, gently sloping to (1, 0): no sum of squares that anybody knows of."""
    radius = theta.norm()
    return 1e4 * (radius - 1) ** 2 + 1e-3 * (1 - theta[0] / radius)


def test_auto_follows_the_flow_along_a_valley(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Newton's steps stay short and there are no residuals; the choices tell, and the end is the minimum."""
    monkeypatch.setattr(auto, "LONG_PATIENCE", 30)
    result = minimize(objective_of(valley, 2), vector(-0.99, 0.14), method="auto")
    assert [choice.method for choice in result.choices][:2] == ["trust-region", "bdf"]
    assert result.theta.tolist() == pytest.approx([1.0, 0.0], abs=1e-9)
    assert result.certificate is not None
    assert result.certificate.kind == "minimum"


def test_ctrl_c_within_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The point to which the flow came is kept."""
    monkeypatch.setattr(auto, "LONG_PATIENCE", 30)

    class Interrupted(FunctionObjective):
        def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
            if self.counts.n_grad == 120:
                self.counts.n_grad += 1
                raise KeyboardInterrupt
            return super().loss_and_gradient(theta)

    objective = Interrupted(lambda: (valley,), 2, torch.float64, torch.device("cpu"))
    result = minimize(objective, vector(-0.99, 0.14))
    assert result.status == "interrupted"
    assert [choice.method for choice in result.choices] == ["trust-region", "bdf"]
    assert result.loss <= float(valley(vector(-0.99, 0.14)))


def test_auto_uses_krylov_spaces_where_hessians_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many parameters; the end is the same."""
    monkeypatch.setattr(auto, "MAX_DENSE", 3)
    result = minimize(objective_of(rosenbrock, 4), vector(-1.2, 1.0, -1.2, 1.0))
    assert [choice.method for choice in result.choices] == ["trust-region-lanczos"]
    assert result.n_hessian <= 5  # those of the certificate
    assert np.abs(scipy.optimize.rosen_der(result.theta.numpy())).max() <= 1e-12


def test_auto_takes_residuals_where_krylov_spaces_crawl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many parameters, Levenberg–Marquardt reaches singular minima of zero loss, and soon."""
    monkeypatch.setattr(auto, "MAX_DENSE", 3)
    model, x, y = teacher_student(2)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    result = minimize(objective, flat(model), certificate=False)
    assert [choice.method for choice in result.choices] == ["trust-region-lanczos", "levenberg-marquardt"]
    assert result.status == "converged", result.message
    assert result.n_hvp < 1000


def test_auto_hands_over_where_rounding_stops_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """To Newton's method, whose gradient test goes farther; the loss never rises on the way."""
    monkeypatch.setattr(auto, "LONG_PATIENCE", 2)
    model, x, y = teacher_student(6, n_student=3)
    losses: list[float] = []
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    result = minimize(objective, flat(model), certificate=False, progress=lambda report: losses.append(report.loss))
    assert result.status == "converged", result.message
    assert "levenberg-marquardt" in [choice.method for choice in result.choices]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))


def test_all_methods_are_listed() -> None:
    """Under the names that they carry."""
    assert set(OURS) | {"levenberg-marquardt", "scipy:SLSQP", "nlopt:LD_SLSQP"} <= set(METHODS)
    assert all(method.name == name for name, method in METHODS.items())
