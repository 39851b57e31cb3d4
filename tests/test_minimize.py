"""Fixed points to round-off, and a certificate that says what they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
from problems import NumpyPerceptron, flat, make_closure, teacher_student
from torch import Tensor, nn

from torch_gradflow import GradientFlow, NewtonPolish, minimize
from torch_gradflow.minimize.certificate import certify
from torch_gradflow.minimize.trust_region import solve_subproblem
from torch_gradflow.objectives.function import FunctionObjective


def objective_of(term: Callable[[Tensor], Tensor], n: int) -> FunctionObjective:
    """A function of θ as an Objective."""
    return FunctionObjective(lambda: (term,), n, torch.float64, torch.device("cpu"))


def vector(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(theta: Tensor) -> Tensor:
    """The banana valley with its minimum at (1, 1, ...)."""
    return (100 * (theta[1:] - theta[:-1] ** 2) ** 2 + (1 - theta[:-1]) ** 2).sum()


def numpy_hessian(problem: NumpyPerceptron, theta: np.ndarray) -> np.ndarray:
    """The Hessian by Richardson-extrapolated central differences of a gradient that is written out in numpy."""
    n = len(theta)
    columns = []
    for i in range(n):
        e = np.zeros(n)
        e[i] = 1.0
        slope = [
            (problem.loss_and_gradient(theta + h * e)[1] - problem.loss_and_gradient(theta - h * e)[1]) / (2 * h)
            for h in (2e-3, 1e-3, 5e-4)
        ]
        first = [(4 * slope[k + 1] - slope[k]) / 3 for k in (0, 1)]
        columns.append((16 * first[1] - first[0]) / 15)
    hessian = np.stack(columns)
    return 0.5 * (hessian + hessian.T)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["definite", "indefinite", "singular", "hard case", "zero gradient", "tiny scale"])
def test_subproblem_satisfies_the_conditions_of_more_and_sorensen(kind: str, seed: int) -> None:
    """(Λ + μI)p = −g, μ ≥ 0, Λ + μI ⪰ 0, μ(Δ − ‖p‖) = 0: necessary and sufficient for the global solution."""
    rng = np.random.default_rng(seed)
    n, radius = 7, float(10.0 ** rng.uniform(-6, 2))
    values = np.sort(rng.standard_normal(n))
    components = rng.standard_normal(n)
    if kind == "definite":
        values = values - values[0] + 1e-3
    elif kind == "singular":
        values = values - values[0]
    elif kind == "hard case":
        values[0] = -1.0
        values[1:] = np.abs(values[1:])
        components[0] = 0.0
    elif kind == "zero gradient":
        components[:] = 0.0
    elif kind == "tiny scale":
        values, components = values * 1e-9, components * 1e-14
    order = np.argsort(values)
    lam, g = torch.from_numpy(values[order]), torch.from_numpy(components[order])
    step, predicted = solve_subproblem(lam, g, radius)
    assert float(step.norm()) <= radius * (1 + 1e-12)
    best = min(_model_on_grid(lam, g, radius), 0.0)
    assert -predicted <= best * (1 - 2e-3) + 1e-30
    assert predicted == pytest.approx(-float(g @ step + 0.5 * (lam * step) @ step), rel=1e-9, abs=1e-300)


def _model_on_grid(lam: Tensor, g: Tensor, radius: float) -> float:
    """The exact minimum of the model by bisection on μ in high precision, the hard case included."""
    import mpmath as mp

    mp.mp.dps = 50
    values, parts, delta = [mp.mpf(v) for v in lam.tolist()], [mp.mpf(v) for v in g.tolist()], mp.mpf(radius)

    def step(mu: mp.mpf) -> list[mp.mpf]:
        return [-c / (v + mu) if c != 0 else mp.mpf(0) for v, c in zip(values, parts, strict=True)]

    def length(p: list[mp.mpf]) -> mp.mpf:
        return mp.sqrt(sum(q * q for q in p))

    def model(p: list[mp.mpf]) -> float:
        return float(sum(c * q + v * q * q / 2 for c, q, v in zip(parts, p, values, strict=True)))

    least = max(mp.mpf(0), -values[0])
    low = least + mp.mpf(10) ** -40
    if length(step(low)) <= delta:
        p = step(low)
        if values[0] < 0:
            p[0] += mp.sqrt(delta**2 - length(p) ** 2)
        return model(p)
    high = least + 2 * length(parts) / delta + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length(step(middle)) > delta else (low, middle)
    return model(step(high))


def test_rosenbrock_to_round_off() -> None:
    """Through the banana valley to its minimum."""
    result = minimize(objective_of(rosenbrock, 10), torch.full((10,), -1.2, dtype=torch.float64))
    assert result.status == "converged"
    assert result.grad_norm <= 1e-13
    assert result.certificate is not None
    assert result.certificate.kind == "minimum"
    assert "Converged after" in result.message


def test_a_saddle_is_left() -> None:
    """From the exact saddle of θ₁⁴/4 − θ₁²/2 + θ₂², where the gradient has no component along the way down."""
    term = lambda t: t[0] ** 4 / 4 - t[0] ** 2 / 2 + t[1] ** 2  # noqa: E731
    result = minimize(objective_of(term, 2), vector(0.0, 0.3))
    assert abs(float(result.theta[0])) == pytest.approx(1.0)
    assert result.certificate is not None
    assert result.certificate.kind == "minimum"


@pytest.mark.parametrize(
    ("name", "term", "theta", "kind"),
    [
        ("bowl", lambda t: (t**2).sum() + 1.0, (0.0, 0.0), "minimum"),
        ("flat but regular", lambda t: 1e-9 * t[0] ** 2 + t[1] ** 2, (0.0, 0.0), "minimum"),
        ("valley of minima", lambda t: (t[0] * t[1] - 1) ** 2 + 0.5, (0.5, 2.0), "degenerate minimum"),
        ("quartic", lambda t: t[0] ** 4 + t[1] ** 2, (0.0, 0.0), "degenerate minimum"),
        ("near a quartic", lambda t: t[0] ** 4 / 4 + t[1] ** 2 + 1, (1e-5, 0.0), "degenerate minimum"),
        ("constant direction", lambda t: t[1] ** 2 + 0 * t[0], (3.0, 0.0), "degenerate minimum"),
        ("saddle", lambda t: t[0] ** 2 - t[1] ** 2, (0.0, 0.0), "saddle"),
        ("cubic", lambda t: t[0] ** 3 + t[1] ** 2, (0.0, 0.0), "saddle"),
        ("monkey", lambda t: t[0] ** 3 - 3 * t[0] * t[1] ** 2, (0.0, 0.0), "saddle"),
        ("curved fall", lambda t: (t[1] - t[0] ** 2) ** 2 - t[0] ** 6, (0.0, 0.0), "saddle"),
        ("slope", lambda t: (t**2).sum() + 1e-6 * t[0], (0.0, 0.0), "not critical"),
    ],
)
def test_kinds_of_critical_points(name: str, term: Callable[[Tensor], Tensor], theta: tuple[float, float], kind: str) -> None:
    """Each kind on a function for which it is known."""
    certificate = certify(objective_of(term, 2), vector(*theta))
    assert certificate.kind == kind
    assert certificate.message.lower().startswith(certificate.kind)


def test_undecided_where_the_valley_floor_cannot_be_found() -> None:
    """A null direction along which the loss has no value gives no answer, and the certificate says so."""
    wall = lambda t: t[1] ** 2 + torch.where(t[0].abs() > 5e-3, torch.nan, 0.0) * t[0]  # noqa: E731
    certificate = certify(objective_of(wall, 2), vector(0.0, 0.0))
    assert certificate.kind == "degenerate (undecided)"
    assert certificate.n_zero == 1


def test_certificate_agrees_with_numpy_on_an_independent_hessian() -> None:
    """Eigenvalues, decrement and tolerances at a minimum of a 13-parameter network."""
    model, x, y = teacher_student(10, n_student=3)
    flow = GradientFlow(model.parameters())
    flow.integrate(make_closure(flow, model, x, y), 100.0)
    polish = NewtonPolish(model.parameters())
    polish.step(make_closure(polish, model, x, y))
    result = polish.result
    assert result is not None
    assert result.certificate is not None
    theta = flat(model).numpy()
    hessian = numpy_hessian(NumpyPerceptron(x, y, 3), theta)
    expected = np.linalg.eigvalsh(hessian)
    assert np.abs(result.certificate.eigenvalues.numpy() - expected).max() <= 1e-9 * expected[-1]
    assert result.certificate.kind == "minimum"
    assert result.certificate.newton_decrement <= 1e-12
    assert abs(NumpyPerceptron(x, y, 3).loss_and_gradient(theta)[1]).max() <= 1e-13


def polished(seed: int, n_student: int, max_iter: int) -> tuple[NewtonPolish, float]:
    """T33 with another number of neurons, after a flow to t = 100; the optimizer and the loss before it."""
    model, x, y = teacher_student(seed, n_student=n_student)
    flow = GradientFlow(model.parameters(), rtol=1e-4)
    solution = flow.integrate(make_closure(flow, model, x, y), 100.0)
    polish = NewtonPolish(model.parameters(), max_iter=max_iter)
    polish.step(make_closure(polish, model, x, y))
    return polish, float(solution.loss[-1])


def check_truthful(polish: NewtonPolish, before: float) -> None:
    """The verdict fits the figures, and nothing went uphill."""
    result = polish.result
    assert result is not None
    assert result.certificate is not None
    assert result.loss <= before * (1 + 1e-12)
    certificate = result.certificate
    if result.status == "converged":
        assert result.grad_norm <= 1e-13
    if result.status == "max_iter":
        assert "max_iter" in result.message
        assert f"{result.grad_norm:.2e}" in result.message
    assert (certificate.kind == "not critical") == (result.grad_norm > certificate.gradient_tolerance)
    if certificate.kind == "minimum":
        assert bool((certificate.eigenvalues > certificate.uncertainties).all())


@pytest.mark.parametrize("seed", [2, 5, 10, 17])
def test_regular_minima_to_round_off(seed: int) -> None:
    """Fewer neurons than the teacher: regular minima, reached to round-off."""
    polish, before = polished(seed, 3, 2000)
    check_truthful(polish, before)
    assert polish.result is not None
    assert polish.result.status == "converged"
    assert polish.result.certificate is not None
    assert polish.result.certificate.kind == "minimum"


@pytest.mark.parametrize("seed", [1, 4])
def test_zero_loss_valleys_end_with_a_truthful_status(seed: int) -> None:
    """More neurons than the teacher: zero loss can be reached, Hessians become singular, convergence is slow."""
    polish, before = polished(seed, 8, 60)
    check_truthful(polish, before)


# Seeds whose students have no finite minimum below the flow's point at t = 100: the flow's norm grows without bound
# (measured up to t = 1e11), while the loss tends to its infimum: channels to infinity.
CHANNELS = (1, 3, 8, 12, 15, 18, 19)


@pytest.mark.slow
def test_polishing_twenty_students() -> None:
    """r = 3: of 13 seeds with a finite minimum 12 are taken to a critical point; the verdict is truthful on all 20."""
    critical = []
    for seed in range(1, 21):
        polish, before = polished(seed, 3, 2500)
        check_truthful(polish, before)
        assert polish.result is not None
        assert polish.result.certificate is not None
        if polish.result.certificate.kind != "not critical":
            critical.append(seed)
        print(seed, polish.result.status, f"{polish.result.grad_norm:.1e}", polish.result.certificate.message)
    assert set(critical) >= {2, 4, 5, 6, 7, 9, 10, 13, 14, 16, 17, 20}
    assert not set(critical) & set(CHANNELS)


@pytest.mark.slow
def test_polishing_twenty_over_parameterised_students() -> None:
    """r = 8: a truthful status on all 20, and no loss increase."""
    for seed in range(1, 21):
        polish, before = polished(seed, 8, 300)
        check_truthful(polish, before)
        assert polish.result is not None
        print(seed, polish.result.status, f"{polish.result.loss:.1e} {polish.result.grad_norm:.1e}", polish.result.message)


def test_the_loss_never_rises() -> None:
    """Accepted steps go downhill, up to rounding; the message says whether it was still converging."""
    model, x, y = teacher_student(3)
    losses: list[float] = []
    polish = NewtonPolish(model.parameters(), max_iter=40, progress=lambda report: losses.append(report.loss))
    polish.step(make_closure(polish, model, x, y))
    assert len(losses) == 40
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    assert polish.result is not None
    assert polish.result.status == "max_iter"
    assert "over the last 20 iterations" in polish.result.message


def test_float32_ends_at_its_rounding() -> None:
    """gtol=1e-13 is out of reach in float32: the status says "rounding", and float64 inside gets there."""
    model, x, y = teacher_student(10, n_student=3)
    flow = GradientFlow(model.parameters())
    flow.integrate(make_closure(flow, model, x, y), 100.0)
    model, x, y = model.float(), x.float(), y.float()
    polish = NewtonPolish(model.parameters())
    polish.step(make_closure(polish, model, x, y))
    assert polish.result is not None
    assert polish.result.status == "rounding"
    assert polish.result.grad_norm < 1e-4
    double = NewtonPolish(model.parameters(), dtype=torch.float64)
    double.step(make_closure(double, model, x, y))
    assert double.result is not None
    assert double.result.grad_norm <= 1e-13
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_interruption_keeps_the_best_point() -> None:
    """Ctrl-C is raised again by step; the result and the parameters are the last accepted point."""
    model, x, y = teacher_student(5, n_student=3)

    def interrupt(report: object) -> None:
        if getattr(report, "n_iter", 0) == 5:
            raise KeyboardInterrupt

    polish = NewtonPolish(model.parameters(), progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        polish.step(make_closure(polish, model, x, y))
    assert polish.result is not None
    assert polish.result.status == "interrupted"
    assert torch.equal(flat(model), polish.result.theta)


def test_hessians_that_do_not_fit_are_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their size, and the parameters untouched."""
    model = nn.Linear(100_000, 4)
    before = flat(model)
    optimizer = NewtonPolish(model.parameters(), method="trust-region")
    available = type("Memory", (), {"available": 8 * 2**30})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    with pytest.raises(MemoryError, match=r"400,004 parameters takes 596\.1 GiB.*8\.0 GiB are free"):
        optimizer.step(make_closure(optimizer, model, torch.zeros(1, 100_000), torch.zeros(1, 4)))
    assert torch.equal(flat(model), before)


def test_maximize_and_penalties() -> None:
    """−L is minimised, with weight decay and barrier minimised all the same."""
    p = nn.Parameter(vector(0.5))
    optimizer = NewtonPolish([p], maximize=True, weight_decay=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.sin(p).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert math.cos(float(p.detach())) == pytest.approx(0.1 * float(p.detach()), abs=1e-14)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """progress=True shows loss, gradient norm, lowest eigenvalue and the reason of the end."""
    minimize(objective_of(rosenbrock, 2), vector(-1.2, 1.0), progress=True)
    shown = capsys.readouterr().err
    assert "|grad|" in shown
    assert "Converged after" in shown
