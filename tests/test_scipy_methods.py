"""scipy's solvers by name: scipy's own results, with the package's Hessian, interpolation, ends, statuses and errors."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from scipy.integrate._ivp import bdf, radau
from torch import Tensor, nn

from torch_gradflow import GradientFlow, integrate
from torch_gradflow.flow.method import Arrival, RunEnd, Span
from torch_gradflow.flow.methods import METHODS
from torch_gradflow.flow.scipy_methods import nodes
from torch_gradflow.flow.solution import FlowReport, Knot
from torch_gradflow.flow.stopping import FlowTime, GradientNorm
from torch_gradflow.objectives.base import EvaluationCounts, Objective

NAMES = ("LSODA", "BDF", "Radau")


class Valley(Objective):
    """½ λ (y − x²)² + ½ x² of θ = (x, y): stiff along a curved valley."""

    n_parameters, device = 2, torch.device("cpu")

    def __init__(self, stiffness: float = 1e3, dtype: torch.dtype = torch.float64) -> None:
        self.stiffness, self.dtype, self.resolution = stiffness, dtype, torch.finfo(dtype).eps
        self.counts = EvaluationCounts()
        self.points: list[Tensor] = []

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        self.points.append(theta)
        x, y = theta.tolist()
        off = self.stiffness * (y - x * x)
        return theta.new_tensor(0.5 * off**2 / self.stiffness + 0.5 * x * x), theta.new_tensor([x - 2 * x * off, off])

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        raise NotImplementedError

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        (x, y), k = theta.tolist(), self.stiffness
        return theta.new_tensor([[1 - 2 * k * (y - 3 * x * x), -2 * k * x], [-2 * k * x, k]])

    def field(self, t: float, theta: np.ndarray) -> np.ndarray:
        return -self.loss_and_gradient(torch.from_numpy(theta.copy()))[1].numpy()

    def jacobian(self, t: float, theta: np.ndarray) -> np.ndarray:
        return -self.hessian(torch.from_numpy(theta.copy())).numpy()


class Broken(Valley):
    """Raises, or has no values, where something holds."""

    def __init__(self, where: object, what: object) -> None:
        super().__init__(10.0)
        self.where, self.what = where, what

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = super().loss_and_gradient(theta)
        if self.where(theta):  # type: ignore[operator]
            if isinstance(self.what, BaseException):
                raise self.what
            return loss * math.nan, gradient * math.nan
        return loss, gradient


START = torch.tensor([1.2, 0.5], dtype=torch.float64)


def run(name: str, objective: Objective, t_end: float, rtol: float = 1e-6, **span: float) -> tuple[list[Arrival], RunEnd]:
    arrivals: list[Arrival] = []
    start = Knot(0.0, START.to(objective.dtype), *objective.loss_and_gradient(START.to(objective.dtype)))
    end = METHODS[name].run(
        objective, start, Span(t_end, rtol, 0.01 * rtol, **span), lambda arrival: bool(arrivals.append(arrival))
    )
    return arrivals, end


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_the_same_steps_as_solve_ivp(name: str, rtol: float) -> None:
    """Bit for bit, with the same evaluations, but for the first gradient, which is known here."""
    bare, objective = Valley(), Valley()
    expected = solve_ivp(
        bare.field, (0, 30.0), START.numpy(), method=name, jac=bare.jacobian, rtol=rtol, atol=0.01 * rtol, dense_output=True
    )
    arrivals, end = run(name, objective, 30.0, rtol)
    times = [0.0, *(a.knot.t for a in arrivals), end.knot.t]
    assert end.status == "t_end"
    assert end.knot.t == 30.0
    assert times[:-1] == expected.t[:-1].tolist()
    points = torch.stack([START, *(a.knot.theta for a in arrivals), end.knot.theta])
    assert np.array_equal(points.numpy(), expected.y.T)
    assert end.n_accepted == len(expected.t) - 1
    assert objective.counts.n_hessian == bare.counts.n_hessian > 0
    # scipy evaluates some points twice in a row (the first one, and Radau those that it accepted).
    assert objective.counts.n_grad <= bare.counts.n_grad
    for arrival, (t_old, t_new) in zip(arrivals, pairwise(times), strict=False):
        assert arrival.interpolant is not None
        for part in (0.0, 0.3, 1.0):
            t = t_old + part * (t_new - t_old)
            assert np.allclose(arrival.interpolant(t).numpy(), expected.sol(t), rtol=0, atol=10 * rtol)


@pytest.mark.parametrize("name", NAMES)
def test_knots_have_their_loss_and_gradient_or_say_that_they_are_approximate(name: str) -> None:
    """Without an evaluation more than scipy's; Radau's are exact."""
    objective = Valley()
    arrivals, _ = run(name, objective, 5.0)
    for arrival in arrivals:
        loss, gradient = objective.loss_and_gradient(arrival.knot.theta)
        if arrival.approximate:
            assert float((gradient - arrival.knot.gradient).abs().max()) <= 1e-2
        else:
            assert torch.equal(gradient, arrival.knot.gradient)
            assert torch.equal(loss, arrival.knot.loss)
    assert any(arrival.approximate for arrival in arrivals) == (name != "Radau")


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_the_interpolant_over_the_last_step(name: str) -> None:
    """It goes into any checkpoint, and a run goes on from it at its newest point."""
    objective = Valley()
    arrivals, end = run(name, objective, 3.0)
    before = arrivals[-1].knot.t
    assert end.memory is not None
    assert end.memory.theta.shape == (METHODS[name].n_points, 2)
    assert end.memory.covers(before) and end.memory.covers(3.0) and not end.memory.covers(0.9 * before)
    assert torch.equal(end.memory(3.0), end.knot.theta)
    for t in np.linspace(before, 3.0, 7).tolist():
        assert torch.allclose(end.memory(t), end.interpolant(t), rtol=1e-12, atol=1e-12)
    unknown = Knot(3.0, end.knot.theta, end.knot.loss * math.nan, end.knot.gradient * math.nan)
    on = METHODS[name].run(objective, unknown, Span(6.0, 1e-6, 1e-8), lambda arrival: False, end.memory)
    whole = run(name, objective, 6.0)[1]
    assert float((on.knot.theta - whole.knot.theta).abs().max()) <= 1e-5


def test_nodes_are_the_extrema_of_a_chebyshev_polynomial() -> None:
    assert nodes(0.0, 2.0, 3) == pytest.approx([2.0, 0.0, 1.5, 0.5])
    assert nodes(1.0, 3.0, 1) == [3.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_trajectory_and_samples(name: str) -> None:
    """T33 to t = 10, sampled in between, against a tight run of another method."""
    model, x, y = teacher_student(1)
    optimizer = GradientFlow(model.parameters(), method=name, rtol=1e-7)
    found = optimizer.integrate(make_closure(optimizer, model, x, y), 10.0, t_eval=[0.1, 3.0, 10.0])
    assert found.n_hessian > 0
    assert found.status == "t_end"
    assert found.dissipation_error <= 1e-3
    assert torch.equal(flat(model), found.theta[-1])
    model, x, y = teacher_student(1)
    optimizer = GradientFlow(model.parameters(), method="dopri5", rtol=1e-9)
    true = optimizer.integrate(make_closure(optimizer, model, x, y), 10.0, t_eval=[0.1, 3.0, 10.0])
    assert float(((found.theta - true.theta).norm(dim=1) / true.theta.norm(dim=1)).max()) <= 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_a_flow(name: str) -> None:
    """Steps of the optimizer come to where one integration comes."""
    model, x, y = teacher_student(1)
    optimizer = GradientFlow(model.parameters(), lr=0.5, method=name)
    closure = make_closure(optimizer, model, x, y)
    for _ in range(6):
        optimizer.step(closure)
    end = flat(model)
    model, x, y = teacher_student(1)
    whole = GradientFlow(model.parameters(), method="dopri5")
    whole.integrate(make_closure(whole, model, x, y), 3.0)
    assert float((end - flat(model)).norm() / end.norm()) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_endless_flows_are_stopped_by_rules(name: str) -> None:
    """t_end = inf; gradients that are approximate are looked at again before a rule ends the flow."""
    solution = integrate(Valley(), START, (0.0, math.inf), method=name, stop=[GradientNorm(1e-5), FlowTime(1e6)])
    assert solution.status == "stopped"
    assert "GradientNorm" in solution.message
    assert float(solution.grad_norm[-1]) <= 1e-5
    assert 5 < float(solution.t[-1]) < 100


@pytest.mark.parametrize("name", NAMES)
def test_max_evals_and_step_sizes(name: str) -> None:
    """max_evals is checked at each step; the first and the longest step are as asked for."""
    objective = Valley()
    _, end = run(name, objective, 100.0, max_evals=60)
    assert end.status == "max_evals"
    assert 61 <= objective.counts.n_grad + objective.counts.n_hessian <= 100
    arrivals, end = run(name, Valley(), 2.0, step_size=1e-5, max_step=0.1)
    times = [0.0, *(a.knot.t for a in arrivals), 2.0]
    assert times[1] <= 1.01e-5
    assert max(b - a for a, b in pairwise(times)) <= 0.1 * (1 + 1e-12)
    assert end.step_size >= 0.05
    assert run(name, Valley(), 0.0)[1].n_accepted == 0


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    """θ travels in float32, the solver's in float64."""
    _, end = run(name, Valley(dtype=torch.float32), 3.0, 1e-4)
    _, true = run(name, Valley(), 3.0, 1e-8)
    assert end.knot.theta.dtype == torch.float32
    assert float((end.knot.theta.double() - true.knot.theta).abs().max()) <= 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_exceptions_of_the_objective_pass_through(name: str, error: BaseException) -> None:
    """Out of scipy's compiled code too; the driver keeps the last accepted point."""
    objective = Broken(lambda theta: float(theta[0]) < 0.8, error)
    with pytest.raises(type(error)):
        run(name, objective, 5.0)
    if isinstance(error, KeyboardInterrupt):
        solution = integrate(objective, START, (0.0, 5.0), method=name)
        assert solution.status == "interrupted"
        assert 0.8 <= float(solution.theta[-1, 0]) < 1.1
        assert "t = " in solution.message


@pytest.mark.parametrize("name", NAMES)
def test_a_visitor_ends_the_run(name: str) -> None:
    """At the accepted point that it saw; its own exceptions pass."""
    objective, seen = Valley(), []
    start = Knot(0.0, START, *objective.loss_and_gradient(START))

    def visit(arrival: Arrival) -> bool:
        seen.append(arrival.knot)
        return len(seen) == 7

    end = METHODS[name].run(objective, start, Span(10.0, 1e-6, 1e-8), visit)
    assert end.status == "visit"
    assert end.knot is seen[-1]
    assert end.n_accepted == 7

    def stop(report: FlowReport) -> None:
        if report.t > 1.0:
            raise KeyboardInterrupt

    assert integrate(Valley(), START, (0.0, 10.0), method=name, progress=stop).status == "interrupted"


@pytest.mark.parametrize("name", NAMES)
def test_regions_without_values(name: str) -> None:
    """Trial steps into them are repeated, shorter; a flow that runs into one ends before it, "not finite"."""
    objective = Broken(lambda theta: float(theta[0]) < -1e-9, None)  # the flow tends to 0 from above
    _, end = run(name, objective, 12.0, 1e-4, step_size=20.0)
    assert end.status == "t_end"
    _, end = run(name, Broken(lambda theta: float(theta[0]) < 0.5, None), 5.0)
    assert end.status == "not finite"
    assert float(end.knot.theta[0]) == pytest.approx(0.5, abs=1e-2)
    assert bool(torch.isfinite(end.knot.gradient).all())


class Escaping(Valley):
    """−x³/3 − y: x tends to infinity at t = 1/x₀."""

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        return -(theta[0] ** 3) / 3 - theta[1], torch.stack([-(theta[0] ** 2), torch.full_like(theta[0], -1.0)])

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        return torch.diag(torch.stack([-2 * theta[0], torch.zeros_like(theta[0])]))


@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_a_status(name: str) -> None:
    """With scipy's message as a note where it gave up."""
    _, end = run(name, Escaping(), 2.0, max_evals=20_000)
    assert end.status in ("underflow", "not finite")
    assert end.knot.t == pytest.approx(1 / 1.2, abs=1e-3)
    assert bool(torch.isfinite(end.knot.theta).all())
    assert end.status == "not finite" or "scipy's" in end.note


def test_rejected_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as BDF and Radau tried besides those accepted; for LSODA those that show in the times of its evaluations."""
    tried: list[float] = []
    solve_bdf, solve_radau = bdf.solve_bdf_system, radau.solve_collocation_system
    monkeypatch.setattr(bdf, "solve_bdf_system", lambda f, t, *rest: (tried.append(t), solve_bdf(f, t, *rest))[1])
    monkeypatch.setattr(
        radau, "solve_collocation_system", lambda f, t, y, h, *rest: (tried.append(t + h), solve_radau(f, t, y, h, *rest))[1]
    )
    for name in ("BDF", "Radau"):
        tried.clear()
        _, end = run(name, Valley(), 10.0, step_size=5.0)
        different = 1 + sum(a != b for a, b in pairwise(tried))
        assert end.n_rejected == different - end.n_accepted > 0
    assert run("LSODA", Valley(), 10.0, step_size=1e-2)[1].n_rejected > 0


def test_lsoda_survives_a_first_step_that_is_far_too_long() -> None:
    """It gives up after ten tries; then it chooses its own."""
    _, end = run("LSODA", Valley(), 10.0, step_size=5.0)
    assert end.status == "t_end"


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    for name in NAMES:
        with pytest.raises(ImportError, match=rf"{name}.*pip install scipy"):
            integrate(Valley(), START, (0.0, 1.0), method=name)


def test_rates_of_groups_reach_the_jacobian() -> None:
    """In the scaled coordinates the Hessian is D^½ H D^½: two groups at different speeds."""
    model, x, y = teacher_student(1)
    parts = list(model.parameters())

    def end(name: str) -> Tensor:
        for p, value in zip(parts, teacher_student(1)[0].parameters(), strict=True):
            p.data.copy_(value.data)
        optimizer = GradientFlow([{"params": parts[:2], "lr": 2.0}, {"params": parts[2:], "lr": 0.5}], method=name, rtol=1e-7)
        optimizer.step(make_closure(optimizer, model, x, y))
        assert optimizer.stats.n_hessian > 0 or name in ("dopri5", "LSODA")  # whose Adams methods serve here
        return flat(model)

    true = end("dopri5")
    for name in NAMES:
        assert float((end(name) - true).norm() / true.norm()) <= 1e-5


def test_networks_with_kinks() -> None:
    """LSODA and BDF get through a ReLU network at a loose tolerance."""
    smooth, x, y = teacher_student(1)
    for name in ("LSODA", "BDF"):
        model = nn.Sequential(smooth[0], nn.ReLU(), smooth[2])
        optimizer = GradientFlow(model.parameters(), method=name, rtol=1e-3)
        solution = optimizer.integrate(make_closure(optimizer, model, x, y), 1.0)
        assert solution.status == "t_end"
