"""Runs in lockstep: the steps of each run alone, what it records, stops, failures and interruptions of its own."""

from __future__ import annotations

import _thread
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, teacher_student
from scipy.integrate import solve_ivp
from test_ensemble import Valley, make_nothing, make_valley, starts, troubled
from torch import Tensor, nn

from torch_gradflow import (
    Activation,
    Ensemble,
    EnsembleReport,
    Evaluations,
    FlowSolution,
    FlowTime,
    GradientNorm,
    Loss,
    LossValue,
    ModuleObjective,
    Objective,
    Perceptron,
    PerceptronObjective,
    Samples,
    integrate,
    integrate_many,
)
from torch_gradflow.flow import bdf_batched, ensemble_batched
from torch_gradflow.flow.bdf_batched import RUN, Plain, Runs, arithmetic_for
from torch_gradflow.flow.bdf_batched_compiled import Compiled
from torch_gradflow.flow.dense import Clock
from torch_gradflow.flow.method import Span, approaches
from torch_gradflow.flow.multistep import MAX_POINTS, OrderControl, formula
from torch_gradflow.objectives.function import FunctionObjective

BATCHED: dict[str, Any] = {"method": "bdf", "executor": "batched"}
COUNTS = ("n_grad", "n_hessian", "n_hvp", "n_accepted", "n_rejected", "status", "method")


def network(n_samples: int = 60, dtype: torch.dtype = torch.float64, engine: Any = "auto") -> tuple[ModuleObjective, Tensor]:
    """A 2-4-1 softplus network that learns a teacher, and random starts of different stiffness."""
    model, x, y = teacher_student(1, n_student=4, n_samples=n_samples)
    objective = ModuleObjective(model.to(dtype), nn.functional.mse_loss, (x.to(dtype), y.to(dtype)), engine=engine)
    points = torch.randn(5, objective.n_parameters, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return objective, points.to(dtype)


def agree(found: FlowSolution, alone: FlowSolution) -> None:
    """The same steps and, up to rounding (of which the steps' lengths see more), the same numbers."""
    assert [getattr(found, name) for name in COUNTS] == [getattr(alone, name) for name in COUNTS]
    for name in ("t", "theta", "loss", "grad_norm", "step_sizes"):
        one, other = getattr(found, name), getattr(alone, name)
        scale = float(other[other.isfinite()].abs().max()) if bool(other.isfinite().any()) else 1.0
        near = 1e-6 if name in ("t", "step_sizes") else 1e-8
        assert torch.allclose(one, other, rtol=near, atol=near * scale, equal_nan=True), name
    for name in ("orders", "evaluations"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert found.step_size == pytest.approx(alone.step_size, rel=1e-6)
    assert found.dissipation_error == pytest.approx(alone.dissipation_error, rel=1e-3, abs=1e-6)
    assert found.seconds is not None and bool((found.seconds.diff() >= 0).all())


def all_agree(found: Ensemble, objective: Objective, points: Tensor, span: tuple[float, float], **options: Any) -> None:
    assert len(found) == len(points) and "together in this process" in found.message
    for solution, start in zip(found, points, strict=True):
        agree(solution, integrate(objective, start, span, method="bdf", **options))


@pytest.fixture(params=["compiled", "plain"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to compute, in turn."""
    if request.param == "plain":
        monkeypatch.setattr(bdf_batched, "arithmetic_for", lambda *_: Plain())
    return str(request.param)


# --- The same steps ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
def test_runs_are_those_of_integrate(rtol: float) -> None:
    """With and without the verifying gradient: steps, orders, samples, counts; the objective is left alone."""
    objective, points = network()
    before = objective.counts.n_grad
    found = integrate_many(objective, points, (0.0, 1e4), rtol=rtol, **BATCHED)
    assert objective.counts.n_grad == before
    all_agree(found, objective, points, (0.0, 1e4), rtol=rtol)
    assert [s.status for s in found] == ["t_end"] * 5 and sum(s.n_rejected for s in found) > 0
    assert all(solution.message == "Reached the end time, t = 10000." for solution in found)


@pytest.mark.usefixtures("arithmetic")
def test_against_scipy() -> None:
    """θ at several times by scipy's Radau on derivatives written out in numpy: nothing is shared with the package."""
    objective, points = network()
    model, x, y = teacher_student(1, n_student=4, n_samples=60)
    assert torch.equal(flat(model), objective.initial_theta())
    problem, times = NumpyPerceptron(x, y, 4), [1.0, 10.0, 30.0]
    found = integrate_many(objective, points[:2], (0.0, 30.0), t_eval=times, rtol=1e-8, **BATCHED)
    for solution, start in zip(found, points, strict=False):
        field = lambda t, theta: -problem.loss_and_gradient(theta)[1]  # noqa: E731
        true = solve_ivp(field, (0, 30), start.numpy(), method="Radau", rtol=1e-10, atol=1e-12, t_eval=times)
        wanted = torch.from_numpy(np.ascontiguousarray(true.y.T))
        assert float(((solution.theta - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < 1e-6
        assert solution.loss.tolist() == pytest.approx([problem.loss_and_gradient(row.numpy())[0] for row in solution.theta])


def random_runs(rng: np.random.Generator, count: int) -> Runs:
    """States in the middle of runs, of all orders, some just begun, some after rejections."""
    numbers = np.zeros(count, RUN)
    numbers["n_points"] = rng.integers(1, MAX_POINTS + 1, count)
    numbers["origin"] = rng.uniform(-1, 1, count)
    steps = 10 ** rng.uniform(-1, 0, (count, MAX_POINTS))
    steps[:, 0] = 0.0
    numbers["times"] = numbers["origin"][:, None] + 10 - steps.cumsum(1)
    numbers["unit"], numbers["h"] = 10 ** rng.uniform(-1, 2, count), 10 ** rng.uniform(-1, 0.5, count)
    numbers["order"] = np.minimum(rng.integers(1, 7, count), np.maximum(1, numbers["n_points"] - 1))
    numbers["n_steps"] = rng.integers(0, 9, count)
    numbers["n_failures"] = rng.integers(0, 4, count) * rng.integers(0, 2, count)
    numbers["error"] = rng.uniform(0, 1, count)
    return Runs(numbers, torch.from_numpy(rng.standard_normal((count, MAX_POINTS, 3))))


def test_formulas_and_control_are_those_of_single_runs() -> None:
    """Both arithmetics, row by row, against ``multistep.formula``, ``OrderControl`` and ``approaches``."""
    rng = np.random.default_rng(0)
    runs, span = random_runs(rng, 60), Span(20.0, 1e-4, 1e-6)
    delta = torch.from_numpy(rng.standard_normal((60, 3)) * 10 ** rng.uniform(-6, -3, (60, 1)))
    gradient, loss, solved = torch.ones_like(delta), torch.ones(60, dtype=torch.float64), torch.ones(60, dtype=torch.bool)
    solved[::7], loss[3] = False, math.nan
    accepted = []
    for arithmetic in (Plain(), Compiled()):
        prediction = arithmetic.predict(runs, span)
        step = arithmetic.finish(runs, prediction, delta, loss, gradient, solved)
        accepted.append(step.accepted.tolist())
        for i, (run, plan, after) in enumerate(zip(runs.numbers, prediction.plans, step.runs.numbers, strict=True)):
            times, clock, n = run["times"].tolist(), Clock(run["origin"], run["unit"]), int(run["n_points"])
            h = approaches(times[0], float(run["h"]), span.t_end)
            assert plan["h"] == pytest.approx(h, rel=1e-14) and plan["t"] == pytest.approx(times[0] + h, rel=1e-14)
            order, theta, rows = int(plan["order"]), runs.theta[i], prediction.rows[i]
            tau = clock.between(times[0], float(plan["t"]))
            if n == 1:
                a, constants = 1 / h, [0.0, 0.5, 0.0]
                expected = [theta[0] + h * theta[1], theta[1], None, None]
            else:
                speed = clock.rate(float(plan["t"])) / tau
                known = formula([-clock.between(t, times[0]) for t in times[:n]], tau, order)
                below, *rest = known.constants if known.lower else (0.0, *known.constants[-2 if known.higher else -1 :])
                a, constants = known.alpha * speed, [below, *rest] + ([] if known.higher else [0.0])
                weights = (known.predictor, [w * speed for w in known.slope], known.lower, known.higher)
                expected = [None if w is None else theta.new_tensor(w) @ theta[: len(w)] for w in weights]
            assert plan["a"] == pytest.approx(a, rel=1e-9)
            assert [plan["below"], plan["own"], plan["above"]] == pytest.approx(constants, rel=1e-9)
            for row, wanted in zip(rows, expected, strict=False):
                assert wanted is None or torch.allclose(row, wanted, rtol=1e-7, atol=1e-7)
            norms = [float(((rows[0] + delta[i] - rows[j]) / rows[4]).square().mean().sqrt()) for j in (2, 0, 3)]
            low, own, high = (norm * c for norm, c in zip(norms, constants, strict=True))
            control = OrderControl(order, int(run["n_steps"]), int(run["n_failures"]))
            good = bool(solved[i]) and own <= 1 and i != 3
            assert bool(step.accepted[i]) == good
            if good:
                lower, higher = low if constants[0] else None, high if constants[2] else None
                factor, then = control.accepted(own, lower, higher, n == 1)
                longer = clock.after(float(plan["t"]), factor * tau)
                assert after["h"] == pytest.approx(max(run["h"], longer) if h < run["h"] else longer, rel=1e-7)
                assert torch.equal(step.runs.theta[i, 1:], theta[:-1])
            else:
                error = own if bool(solved[i]) and own > 1 else math.inf
                factor, then = OrderControl(int(run["order"]), control.n_steps, control.n_rejected).rejected(error)
                assert after["h"] == pytest.approx(h * factor, rel=1e-7)
                assert after["n_points"] == (min(n, 2) if then.n_rejected >= 3 else n)
                assert torch.equal(step.runs.theta[i], theta)
            assert (after["order"], after["n_steps"], after["n_failures"]) == (then.order, then.n_steps, then.n_rejected)
    assert accepted[0] == accepted[1] and 10 < sum(accepted[0]) < 50


def test_both_solve_the_equations() -> None:
    """Against torch.linalg.solve; matrices that are not positive definite are named, and only they."""
    rng = np.random.default_rng(1)
    runs = random_runs(rng, 12)
    half = torch.from_numpy(rng.standard_normal((12, 3, 3)))
    hessian, gradient = half @ half.mT, torch.from_numpy(rng.standard_normal((12, 3)))
    hessian[5] -= 1e3 * torch.eye(3, dtype=torch.float64)
    for arithmetic in (Plain(), Compiled()):
        prediction = arithmetic.predict(runs, Span(20.0, 1e-4, 1e-6))
        delta, solved = arithmetic.solve(prediction, gradient, hessian.clone())
        assert solved.tolist() == [i != 5 for i in range(12)]
        full = hessian + prediction.a[:, :, None] * torch.eye(3, dtype=torch.float64)
        wanted = torch.linalg.solve(full, -(gradient + prediction.rows[:, 1]))
        assert torch.allclose(delta[solved], wanted[solved], rtol=1e-9, atol=1e-12)


def test_which_arithmetic_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert isinstance(arithmetic_for(cpu, torch.float64, 17), Compiled)
    assert isinstance(arithmetic_for(cpu, torch.float32, 17), Plain)
    assert isinstance(arithmetic_for(torch.device("cuda"), torch.float64, 17), Plain)
    assert isinstance(arithmetic_for(cpu, torch.float64, 5000), Plain)
    monkeypatch.setattr(bdf_batched, "import_module", partial(_raise, ImportError("no Numba here")))
    arithmetic_for.cache_clear()
    assert isinstance(arithmetic_for(cpu, torch.float64, 17), Plain)
    arithmetic_for.cache_clear()


def _raise(error: Exception, *_: object) -> None:
    raise error


@pytest.mark.parametrize("kind", ["float32", "torch.func", "own class"])
def test_other_objectives(kind: str) -> None:
    """In float32, of functions by vmap, and of a class that only evaluates one point at a time."""
    objective: Objective
    if kind == "own class":
        objective, points = Valley(), starts(4)
    elif kind == "float32":
        objective, points = network(dtype=torch.float32)
    else:
        objective, points = network(20, engine="torch.func")
        objective.hessian(points[0])  # confirms its path, which takes some gradients
    found = integrate_many(objective, points[:2], (0.0, 0.1), **BATCHED)
    for solution, start in zip(found, points, strict=False):
        alone = integrate(objective, start, (0.0, 0.1), method="bdf")
        if kind == "float32":  # whose rounding may decide on a step
            assert torch.allclose(solution.theta[-1], alone.theta[-1], rtol=1e-3, atol=1e-3)
        else:
            agree(solution, alone)


# --- What each run records, and where it ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"t_eval": [0.0, 0.001, 0.5, 30.0, 100.0]},
        {"t_eval": [0.5, 0.6], "max_evals": 60},
        {"stop": GradientNorm(1e-2)},
        {"stop": [LossValue(0.5), FlowTime(20.0)], "step_size": 1e-3},
        {"stop": Evaluations(40)},
        {"max_evals": 90},
    ],
    ids=lambda options: "-".join(options),
)
def test_each_run_has_its_own_samples_and_ends(options: dict[str, Any]) -> None:
    objective, points = network()
    found = integrate_many(objective, points, (0.0, 100.0), **options, **BATCHED)
    all_agree(found, objective, points, (0.0, 100.0), **options)
    for solution, start in zip(found, points, strict=True):
        assert solution.message == integrate(objective, start, (0.0, 100.0), method="bdf", **options).message


def test_a_run_that_leaves_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time: results come as they are there, and are those of all at once."""
    objective, points = network()
    whole = integrate_many(objective, points, (0.0, 100.0), **BATCHED)
    monkeypatch.setattr(ensemble_batched, "MAX_RUNS", 2)
    order: list[int] = []
    reports: list[EnsembleReport] = []
    note = lambda index, solution: order.append(index)  # noqa: E731
    found = integrate_many(objective, points, (0.0, 100.0), on_result=note, progress=reports.append, **BATCHED)
    for one, other in zip(found, whole, strict=True):
        agree(one, other)
    assert sorted(order) == [0, 1, 2, 3, 4] and set(order[:2]) <= {0, 1, 2} and [r.n_done for r in reports] == [1, 2, 3, 4, 5]


def test_runs_that_have_nothing_to_do() -> None:
    """An empty span, and a rule that is met at the start, as alone."""
    objective, points = network()
    at_once = integrate_many(objective, points, (0.0, 0.0), **BATCHED)
    assert [s.status for s in at_once] == ["t_end"] * 5 and all(len(s.t) == 1 for s in at_once)
    loss = float(objective.loss_and_gradient(points[1])[0])
    mixed = integrate_many(objective, points, (0.0, 1.0), stop=LossValue(loss), **BATCHED)
    assert mixed[1].status == "stopped" and mixed[1].n_accepted == 0
    all_agree(mixed, objective, points, (0.0, 1.0), stop=LossValue(loss))


# --- What goes wrong stays with its run -------------------------------------------------------------------------------


class Cliff(Valley):
    """A valley that ends: beyond θ_0 < −3 nothing is finite."""

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = super().loss_and_gradient(theta)
        return (loss, gradient) if theta[0] > -3 else (loss * math.nan, gradient * math.nan)


class Abyss(Objective):
    """L = −¼ Σ θ_i⁴ where that grows: each flow leaves all bounds in finite time."""

    def __init__(self) -> None:
        valley = Valley()
        self.n_parameters, self.dtype, self.device = 3, valley.dtype, valley.device
        self.resolution, self.counts = valley.resolution, valley.counts

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        return -0.25 * (theta**4).sum(), -(theta**3)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        self.counts.n_hvp += vectors.shape[1] if vectors.dim() == 2 else 1
        return self.hessian(theta) @ vectors

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        return torch.diag(-3 * theta**2)


class Raising(Valley):
    """A valley in which points with θ_0 near a place have no value: at once, or only close to it."""

    def __init__(self, place: float, later: bool) -> None:
        super().__init__()
        self._place, self._later = place, later

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        if theta[0] < self._place and not (self._later and theta[0] < self._place - 0.05):
            raise ArithmeticError("no value here")
        return super().loss_and_gradient(theta)


@pytest.mark.parametrize("later", [False, True])
def test_exceptions_stay_with_their_runs(later: bool) -> None:
    """Whether the first evaluation raises it or a later one: the others go on as if nothing had been."""
    points = troubled()
    points[2, 0] = -4.0
    found = integrate_many(Raising(-3.9, later), points, (0.0, 5.0), **BATCHED)
    assert found.failed == (2,) and "no value here" in found[2].message
    assert found[2].message.startswith("Failed at t = " if later else "Failed before the first step with")
    for i in (0, 1, 3, 4, 5):
        agree(found[i], integrate(Valley(), points[i], (0.0, 5.0), method="bdf"))


def test_points_without_values_end_only_their_run() -> None:
    far = starts()
    far[1, 0] = -5.0
    found = integrate_many(Cliff(), far, (0.0, 5.0), **BATCHED)
    assert found.failed == (1,) and "not finite at theta0" in found[1].message
    assert [s.status for s in found].count("t_end") == 5
    points = torch.tensor([[1.0, 0.5, 0.1], [0.0, 0.0, 0.0], [0.01, 0.01, 0.02]], dtype=torch.float64)
    diverging = integrate_many(Abyss(), points, (0.0, 10.0), **BATCHED)
    assert diverging[0].status in ("underflow", "not finite") and [s.status for s in diverging[1:]] == ["t_end"] * 2
    all_agree(diverging, Abyss(), points, (0.0, 10.0))


def test_factories_and_what_they_raise() -> None:
    made = integrate_many(make_valley, starts(3), (0.0, 1.0), **BATCHED)
    all_agree(made, Valley(), starts(3), (0.0, 1.0))
    nothing = integrate_many(make_nothing, starts(2), (0.0, 1.0), **BATCHED)  # type: ignore[arg-type]
    assert nothing.failed == (0, 1) and "must return an Objective, not 'nothing'" in nothing[1].message


def test_what_on_result_raises_is_raised() -> None:
    with pytest.raises(LookupError, match="not wanted"):
        integrate_many(Valley(), starts(), (0.0, 1.0), on_result=partial(_raise, LookupError("not wanted")), **BATCHED)


# --- Interruption and directories -------------------------------------------------------------------------------------


def test_ctrl_c_ends_all_at_their_last_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Finished runs stay, on disk too; those under way keep their points; those that wait did not begin."""
    monkeypatch.setattr(ensemble_batched, "MAX_RUNS", 3)
    objective, points = network()
    points = torch.cat([points, -points])
    done: list[int] = []

    def note(index: int, solution: FlowSolution) -> None:
        done.append(index)
        if len(done) == 4:
            _thread.interrupt_main()

    found = integrate_many(objective, points, (0.0, 100.0), on_result=note, directory=tmp_path, **BATCHED)
    assert found.status == "interrupted" and found.message.startswith("Interrupted by the user")
    assert sorted(done) == [i for i, s in enumerate(found) if s.status == "t_end"] and 4 <= len(done) < 9
    under_way = [s for s in found if s.status == "interrupted" and s.message.startswith("Interrupted by the user at t = ")]
    assert under_way and all(len(s.t) > 1 and s.theta.isfinite().all() for s in under_way)
    assert found[9].message == "Interrupted before it began."
    again = integrate_many(objective, points, (0.0, 100.0), directory=tmp_path, **BATCHED)
    assert again.n_loaded == len(done)
    all_agree(again, objective, points, (0.0, 100.0))
    third = integrate_many(objective, points, (0.0, 100.0), directory=tmp_path, executor="serial", method="bdf")
    assert third.n_loaded == 10


# --- Bad input, and what is chosen ------------------------------------------------------------------------------------


def test_what_cannot_be_batched_is_refused() -> None:
    points = starts(2)
    with pytest.raises(ValueError, match=r"executor='batched' .* which method='auto' cannot: pass method='bdf', or executor="):
        integrate_many(Valley(), points, (0.0, 1.0), executor="batched")
    with pytest.raises(ValueError, match="needs one objective for all starts, and objective is a sequence of 2: pass one"):
        integrate_many([Valley(), Valley()], points, (0.0, 1.0), **BATCHED)


def test_it_is_not_chosen_by_itself() -> None:
    """So that without it results do not depend on who computes them."""
    found = integrate_many(Valley(), starts(), (0.0, 1.0), method="bdf")
    assert "one after the other" in found.message


# --- Evaluations at many points ---------------------------------------------------------------------------------------


def many_agree(objective: Objective, points: Tensor) -> None:
    """At many points what comes at each, and counted as that."""
    before = objective.counts.n_grad, objective.counts.n_hessian
    found, gradients = objective.loss_gradient_hessian_many(points), objective.loss_and_gradient_many(points)
    spent = objective.counts.n_grad - before[0], objective.counts.n_hessian - before[1]
    before = objective.counts.n_grad, objective.counts.n_hessian
    alone = [objective.loss_gradient_hessian(point) for point in points]
    singles = [objective.loss_and_gradient(point) for point in points]
    assert spent == (objective.counts.n_grad - before[0], objective.counts.n_hessian - before[1])
    for one, other in zip((*found, *gradients), (*zip(*alone, strict=True), *zip(*singles, strict=True)), strict=True):
        assert torch.allclose(one, torch.stack(other), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [(2, 3, 1), (2, 3, 3, 1), (2, 4, 2)])
@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_perceptrons_at_many_points(sizes: tuple[int, ...], kernel: Any) -> None:
    """Of one and more hidden layers; with frozen, permuted and scaled parameters, and weight decay."""
    generator = torch.Generator().manual_seed(0)
    perceptron = Perceptron.of(sizes, Activation("tanh"), Activation("identity"))
    x, y = (torch.randn(n, 30, generator=generator, dtype=torch.float64) for n in (2, sizes[-1]))
    samples = Samples(x, y, torch.full((30,), 1 / 30, dtype=torch.float64))
    n = perceptron.n_parameters
    points = torch.randn(4, n, generator=generator, dtype=torch.float64)
    many_agree(PerceptronObjective(perceptron, Loss("squared error"), samples, kernel=kernel), points)
    index = torch.randperm(n, generator=generator) - 1  # one is frozen
    numbers = torch.rand(2, n - 1, generator=generator, dtype=torch.float64)
    options = {"index": index, "frozen": points[0], "scale": numbers[0] + 0.5, "decay": numbers[1]}
    changed = PerceptronObjective(perceptron, Loss("squared error"), samples, kernel=kernel, **options)
    many_agree(changed, points[:, 1:].contiguous())
    for rows in (points[:, :-2], points[0]):
        with pytest.raises(ValueError, match="theta must have the shape"):
            changed.loss_and_gradient_many(rows)


@pytest.mark.parametrize("is_mapped", [True, False])
def test_functions_at_many_points(is_mapped: bool) -> None:
    """By torch.func.vmap where that gives the same, else in a loop: a function that asks for a number cannot be mapped."""

    def smooth(theta: Tensor) -> Tensor:
        return (theta**4).sum() + theta.prod()

    def asking(theta: Tensor) -> Tensor:
        return smooth(theta) if float(theta.detach().sum()) > 0 else 2 * smooth(theta)

    def constant(theta: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    terms: tuple[Callable[[Tensor], Tensor], ...] = (smooth, constant) if is_mapped else (asking,)
    path: Any = "torch.func" if is_mapped else "double backward"
    objective = FunctionObjective(lambda: terms, 3, torch.float64, torch.device("cpu"), second_derivatives=path)
    points = starts(5)
    objective.loss_gradient_hessian_many(points)  # the first points confirm it
    many_agree(objective, points)
    assert objective._is_mapped is is_mapped
