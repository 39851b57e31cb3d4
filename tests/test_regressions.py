"""Mistakes that were made once, each in the smallest form in which it showed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import flat, make_closure, teacher_student
from torch import Tensor, nn

from torch_gradflow import GradientFlow, GradientFlowWarning, NewtonPolish, certify, integrate
from torch_gradflow.objectives.function import FunctionObjective


def run(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], n_steps: int, **settings: object) -> GradientFlow:
    """Some steps on a loss."""
    optimizer = GradientFlow(parameters, **settings)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss.detach()

    for _ in range(n_steps):
        optimizer.step(closure)
    return optimizer


def test_float32_with_fast_growing_first_steps() -> None:
    """The window then has two points that may be used, not three."""
    w = nn.Parameter(torch.tensor([0.3, 0.7, 1.1]))
    x = torch.linspace(-1, 1, 30).reshape(10, 3)
    optimizer = run([w], lambda: ((x @ w) ** 2).mean(), 40, lr=1e-3)
    assert optimizer.flow_time == pytest.approx(0.04)


@pytest.mark.parametrize("write", ["add_", "data"])
def test_a_replay_does_not_write_to_the_users_tensors(write: str) -> None:
    """An average of activations moves once per step, as in any loop."""
    w = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
    average = torch.zeros(2, dtype=torch.float64)

    def loss() -> Tensor:
        h = torch.tanh(w) + 0
        h += 1
        with torch.no_grad():
            (average if write == "add_" else average.data).add_(torch.ones_like(h.detach()))
        return (h**2).sum()

    optimizer = run([w], loss, 3, check=False, engine="replay", lr=0.5)
    assert optimizer.stats.n_closure == 3
    assert torch.equal(average, torch.full((2,), 3.0, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::torch_gradflow.GradientFlowWarning")
def test_a_record_that_was_wrong_once_is_not_trusted_again() -> None:
    """A factor that leaves torch by a way that cannot be seen: right at the start of every step, wrong elsewhere."""
    w = nn.Parameter(torch.tensor([0.5, -0.2], dtype=torch.float64))
    engines = []
    optimizer = GradientFlow([w], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        hidden = float(np.frombuffer(bytes(w.untyped_storage())).sum())
        loss = (1.0 + hidden**2) * (w**2).sum()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
        engines.append(optimizer.stats.engine)
    assert engines == ["closure"] * 3


def test_shapes_that_depend_on_values_are_not_frozen() -> None:
    """The mean over positive activations divides by their number, which changes along the flow."""
    x = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(20, 2)
    ends = []
    for engine in ("auto", "closure"):
        w = nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))

        def loss(w: nn.Parameter = w) -> Tensor:
            h = x @ w + 0.1
            positive = h[h > 0]
            return (positive**2).sum() / len(positive) + 0.1 * (w - 1).square().sum()

        optimizer = run([w], loss, 3, engine=engine, lr=0.3)
        assert optimizer.stats.engine == "closure"
        ends.append(w.detach().clone())
    assert torch.equal(*ends)


def test_max_evals_while_running_ahead_keeps_what_was_reached() -> None:
    """Every step advances by what its evaluations bought."""
    w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    stiff = torch.tensor([1.0, 1e3], dtype=torch.float64)
    optimizer = GradientFlow([w], lr=10.0, method="dopri5", max_evals=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (stiff * w**2).sum()
        loss.backward()
        return loss.detach()

    times = [0.0]
    for _ in range(4):
        with pytest.warns(GradientFlowWarning, match="max_evals"):
            optimizer.step(closure)
        times.append(optimizer.flow_time)
    assert all(b - a > 0.03 for a, b in pairwise(times[1:]))


def drifting_flow(remembers: bool) -> Tensor:
    """The end of 100 steps on a loss whose coefficient falls a little at every step."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = GradientFlow([w], lr=0.01)
    coefficient = 1.0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = coefficient * (w**2).sum()
        loss.backward()
        return loss.detach()

    for _ in range(100):
        coefficient *= 1 - 1e-9
        optimizer.step(closure)
        if not remembers:
            optimizer.param_groups[0]["expected_loss"] = float("nan")
    return w.detach()


def test_a_slow_drift_of_the_objective_is_followed() -> None:
    """Nothing that was computed ahead for one objective serves another, however near."""
    assert torch.equal(drifting_flow(True), drifting_flow(False))


def test_parameters_that_the_user_sets_stay_set() -> None:
    """Also where the loss does not depend on them, so that no gradient tells."""
    w, dead = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = GradientFlow([w, dead], lr=0.01, method="dopri8")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum() + 0 * dead.sum()
        loss.backward()
        return loss.detach()

    for _ in range(4):
        optimizer.step(closure)
    with torch.no_grad():
        dead.fill_(7.0)
    optimizer.step(closure)
    assert torch.equal(dead.detach(), torch.full((2,), 7.0, dtype=torch.float64))


def test_gradients_of_frozen_groups_are_those_of_the_start() -> None:
    """Also where the closure is called again at other parameters."""
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = GradientFlow([{"params": [a]}, {"params": [b], "lr": 0.0}], engine="closure")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a**2 * b**2).sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    assert b.grad is not None
    assert torch.equal(b.grad, torch.full((2,), 2.0, dtype=torch.float64))


def test_stats_after_integrate_are_those_of_its_end() -> None:
    """Whatever was sampled, and for methods whose last stage is not the accepted point."""
    for method in ("dopri5", "adaptive_heun", "fehlberg2"):
        model, x, y = teacher_student(1)
        optimizer = GradientFlow(model.parameters(), method=method, rtol=1e-4)
        optimizer.integrate(make_closure(optimizer, model, x, y), 1.0, t_eval=[0.0])
        loss = nn.functional.mse_loss(model(x), y)
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert optimizer.stats.loss == pytest.approx(loss.item(), rel=1e-12)
        assert optimizer.stats.grad_norm == pytest.approx(float(gradient.abs().max()), rel=1e-9)


def test_a_diverging_flow_ends_in_float32() -> None:
    """−½‖w‖² grows like exp(t) until the loss overflows, at t of about 44."""
    term = lambda theta: -0.5 * (theta**2).sum()  # noqa: E731
    objective = FunctionObjective(lambda: (term,), 2, torch.float32, torch.device("cpu"))
    solution = integrate(objective, torch.ones(2), (0.0, 100.0), max_evals=100_000)
    assert solution.status == "not finite"
    assert bool(torch.isfinite(solution.loss).all())
    assert solution.n_grad < 20_000


def test_polishing_a_loss_that_is_a_small_difference() -> None:
    """The rounding of loss − constant is that of its parts."""
    model, x, y = teacher_student(5, n_student=3)
    flow = GradientFlow(model.parameters())
    flow.integrate(make_closure(flow, model, x, y), 100.0)
    start = flat(model)
    first = NewtonPolish(model.parameters())
    first.step(make_closure(first, model, x, y))
    assert first.result is not None
    lowest = first.result.loss
    nn.utils.vector_to_parameters(start, model.parameters())
    polish = NewtonPolish(model.parameters())

    def shifted(prediction: Tensor, target: Tensor) -> Tensor:
        return (nn.functional.mse_loss(prediction, target) + 1.0) - (lowest + 1.0)

    polish.step(make_closure(polish, model, x, y, shifted))
    assert polish.result is not None
    assert polish.result.grad_norm <= 1e-13


def test_certificates_that_were_too_sure() -> None:
    """A far fall behind a barrier is no saddle, and a fall below the rounding of the loss is not seen."""

    def objective(term: Callable[[Tensor], Tensor]) -> FunctionObjective:
        return FunctionObjective(lambda: (term,), 2, torch.float64, torch.device("cpu"))

    origin = torch.zeros(2, dtype=torch.float64)
    barrier = certify(objective(lambda t: 0.5 * t[0] ** 2 + t[1] ** 4 - 2e4 * t[1] ** 6), origin)
    assert barrier.kind == "degenerate minimum"
    hidden = certify(objective(lambda t: 1e3 + 0.5 * t[0] ** 2 - 1e-3 * t[1] ** 4), origin)
    assert hidden.kind == "degenerate (undecided)"
