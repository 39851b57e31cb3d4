"""auto: what it decides from; that it follows the flow whatever it chooses, and succeeds where one of the methods does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torch_gradflow import GradientFlow, integrate
from torch_gradflow.flow.auto import FIRST, Auto
from torch_gradflow.flow.costs import Costs, differentiations
from torch_gradflow.flow.method import Arrival, Span
from torch_gradflow.flow.methods import METHODS, RACING, find_method
from torch_gradflow.flow.roughness import is_rough
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.module import ModuleObjective

ALL = ("bdf", "bdf-cg", "bdf-secant")


def t33(seed: int = 1, dtype: torch.dtype | None = None) -> tuple[ModuleObjective, Tensor]:
    model, x, y = teacher_student(seed, n_samples=300)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y), dtype=dtype)
    return objective, objective.initial_theta()


@cache
def reference(seed: int = 1) -> Tensor:
    """θ(1), θ(10), θ(100), θ(1000) of T33 by scipy's Radau on derivatives written out in numpy."""
    model, x, y = teacher_student(seed, n_samples=300)
    problem = NumpyPerceptron(x, y, 8)
    field = lambda t, theta: -problem.loss_and_gradient(theta)[1]  # noqa: E731
    times = [1, 10, 100, 1000]
    solution = solve_ivp(field, (0, 1e3), flat(model).numpy(), method="Radau", rtol=1e-10, atol=1e-12, t_eval=times)
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))


def errors(found: Tensor, true: Tensor) -> Tensor:
    return (found - true).norm(dim=-1) / true.norm(dim=-1)


def fixed_costs(monkeypatch: pytest.MonkeyPatch, costs: Costs) -> None:
    """A clock that shows what the test wants."""
    monkeypatch.setattr(Auto, "_costs", lambda self, objective, theta: costs)


CHEAP = Costs(gradient=1e-3, hvp=2e-3, hessian=2e-3, cholesky=1e-5, eigh=1e-4)
DEAR = Costs(gradient=1e-3, hvp=1.0, hessian=1e3, cholesky=1e2, eigh=1e3)


# What decides


@pytest.mark.parametrize(
    ("costs", "known", "best"),
    [
        (CHEAP, ALL, "bdf"),
        (Costs(1.0, 1.2, 50.0, 0.1, 20.0), ALL, "bdf-secant"),
        (Costs(1.0, 0.2, 10.0, 0.1, 1.0), ALL, "bdf-cg"),
        (DEAR, ALL, "bdf-secant"),
        (DEAR, ("bdf", "bdf-cg"), "bdf-cg"),
        (Costs(1.0), ALL, "bdf-secant"),
        (Costs(1.0, 0.1), ALL, "bdf-cg"),
        (Costs(1.0, 1.0), ALL, "bdf-secant"),
        (Costs(1.0), ("bdf", "bdf-cg"), ""),
        (CHEAP, (), ""),
    ],
)
def test_the_cheapest_way_of_backward_differentiation(costs: Costs, known: tuple[str, ...], best: str) -> None:
    """Of those that are known and possible; what was not measured is not expected of anything."""
    found = differentiations(costs, 33, known, 1e-6)
    assert next(iter(found), "") == best
    assert list(found.values()) == sorted(found.values())
    assert set(found) <= set(known)


def test_costs_are_counts_times_seconds() -> None:
    costs = Costs(gradient=2.0, hvp=3.0, hessian=5.0, cholesky=7.0, eigh=11.0)
    before, after = EvaluationCounts(1, 2, 3), EvaluationCounts(2, 4, 5)
    assert costs.of(after, before, costs.factorisation("bdf")) == 2 + 2 * 3 + 2 * (5 + 7)
    assert costs.of(after, before, costs.factorisation("exprb53")) == 2 + 2 * 3 + 2 * (5 + 11)
    assert Costs(2.0).of(EvaluationCounts(4), EvaluationCounts(1), math.nan) == 6.0


def test_costs_are_measured_once_for_objectives_of_a_kind() -> None:
    objective, theta = t33()
    auto = Auto({name: METHODS[name] for name in RACING})
    costs = auto._costs(objective, theta)
    assert auto._costs(objective, theta + 1) is costs
    other, theta = t33(2)
    assert auto._costs(other, theta) is costs
    model, x, y = teacher_student(1, n_samples=50)
    smaller = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    assert auto._costs(smaller, smaller.initial_theta()) is not costs
    assert costs.gradient > 0 and costs.hessian > 0
    assert not any(math.isnan(cost) for cost in (costs.hvp, costs.cholesky, costs.eigh))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_nothing_is_timed_where_algorithms_are_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "measure", lambda *_: pytest.fail("timed"))
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 1e3), t_eval=[1.0, 10.0, 100.0, 1000.0])
    assert float(errors(solution.theta, reference()).max()) < 1e-5
    assert "bdf" in {choice.method for choice in solution.choices}
    assert math.isnan(Costs.nominal(10**6).hessian)


def test_every_method_in_the_race_is_known() -> None:
    assert set(RACING) <= set(METHODS)
    assert FIRST in RACING
    assert isinstance(find_method("auto"), Auto)


# What it follows


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("rtol", [1e-5, 1e-6, 1e-8])
def test_trajectory_agrees_with_radau(rtol: float, seed: int) -> None:
    objective, theta0 = t33(seed)
    solution = integrate(objective, theta0, (0.0, 1e3), rtol=rtol, t_eval=[1.0, 10.0, 100.0, 1000.0])
    assert solution.status == "t_end"
    assert float(errors(solution.theta, reference(seed)).max()) < 10 * rtol


@pytest.mark.parametrize("costs", [CHEAP, DEAR, Costs(1e-3), Costs(1e-3, 1e-3)])
def test_any_costs_lead_to_the_same_flow(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dear or cheap Hessians change the choice, not the solution; the same costs make the same choices."""
    fixed_costs(monkeypatch, costs)
    objective, theta0 = t33()
    one, other = (integrate(objective, theta0, (0.0, 1e3), t_eval=[1.0, 10.0, 100.0, 1000.0]) for _ in range(2))
    assert float(errors(one.theta, reference()).max()) < 1e-5
    assert torch.equal(one.theta, other.theta)
    assert one.choices == other.choices
    served = {choice.method for choice in one.choices}
    if costs is CHEAP:
        assert "bdf" in served
        assert one.n_hessian > 0
    if costs is DEAR:
        assert served & {"bdf-secant"}
        assert not served & {"bdf", "exprb53"}


def test_choices_are_recorded_with_times_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_costs(monkeypatch, CHEAP)
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 1e3))
    times = [choice.t for choice in solution.choices]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert solution.choices[0].method == FIRST
    assert "expected costs per step" in solution.choices[1].reason
    assert all(choice.reason and choice.method in RACING for choice in solution.choices)
    assert len({choice.method for choice in solution.choices}) > 1
    assert solution.method == "auto"


def deep_linear() -> tuple[ModuleObjective, Tensor]:
    """Four 5 × 5 matrices from a small start: one saddle after the other."""
    generator = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(4)]).double()
    x = normal(100, 5)
    values = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0], dtype=torch.float64)
    y = x @ torch.linalg.qr(normal(5, 5))[0] @ torch.diag(values) @ torch.linalg.qr(normal(5, 5))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * normal(5, 5) + 0.1 * torch.eye(5))
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    return objective, objective.initial_theta()


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_saddles_are_left_on_time(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saddle to saddle in a deep linear network: against scipy's DOP853."""
    fixed_costs(monkeypatch, costs)
    objective, theta0 = deep_linear()
    field = lambda t, y: -objective.loss_and_gradient(torch.from_numpy(y))[1].numpy()  # noqa: E731
    times = [10.0, 100.0, 300.0]
    true = solve_ivp(field, (0, 300), theta0.numpy(), method="DOP853", rtol=1e-11, atol=1e-13, t_eval=times).y.T
    solution = integrate(objective, theta0, (0.0, 300.0), rtol=1e-7, t_eval=times)
    assert solution.status == "t_end"
    assert float(solution.loss[-1]) < 0.5 * float(solution.loss[0])
    assert float(errors(solution.theta, torch.from_numpy(np.ascontiguousarray(true))).max()) < 1e-4


# Never fails where a method succeeds


class Plain(Objective):
    """An objective of the user's own that knows no second derivatives, or no Hessian."""

    def __init__(self, base: Objective, has_hvp: bool) -> None:
        self.n_parameters, self.dtype, self.device = base.n_parameters, base.dtype, base.device
        self.resolution, self.counts = base.resolution, base.counts
        self._base, self._has_hvp = base, has_hvp

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self._base.loss_and_gradient(theta)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        if not self._has_hvp:
            raise NotImplementedError("no products")
        return self._base.hvp(theta, vectors)

    def hessian(self, theta: Tensor) -> Tensor:
        raise NotImplementedError("no Hessian")


@pytest.mark.parametrize("has_hvp", [False, True])
def test_without_second_derivatives(has_hvp: bool) -> None:
    objective, theta0 = t33()
    solution = integrate(Plain(objective, has_hvp), theta0, (0.0, 1e3), t_eval=[1.0, 10.0, 100.0, 1000.0])
    assert solution.status == "t_end"
    assert float(errors(solution.theta, reference()).max()) < 1e-5
    assert solution.n_hessian == 0


def test_a_network_with_kinks() -> None:
    """ReLU: a gradient that jumps; the loss falls, and the solution says what it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x = torch.randn(100, 2, dtype=torch.float64)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, torch.sin(x.sum(1, keepdim=True))))
    theta0 = objective.initial_theta()
    solution = integrate(objective, theta0, (0.0, 30.0), rtol=1e-4)
    assert solution.status == "t_end"
    tight = integrate(objective, theta0, (0.0, 30.0), rtol=1e-5, method="dopri5", max_evals=100_000)
    assert errors(solution.theta[-1], tight.theta[-1]) < 2e-2


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_float32(rtol: float) -> None:
    objective, theta0 = t33(dtype=torch.float32)
    solution = integrate(objective, theta0, (0.0, 1e3), rtol=rtol, t_eval=[1.0, 10.0, 100.0, 1000.0])
    assert solution.status == "t_end"
    assert float(errors(solution.theta.double(), reference()).max()) < 20 * rtol


def function(term: Callable[[Tensor], Tensor], n: int) -> FunctionObjective:
    return FunctionObjective(lambda: (term,), n, torch.float64, torch.device("cpu"))


def test_it_ends_where_the_flow_ends() -> None:
    """At the edge of the domain, with a finite point, in finite time."""
    objective = function(lambda x: x.log().sum(), 1)
    solution = integrate(objective, torch.ones(1, dtype=torch.float64), (0.0, 10.0), max_evals=20_000)
    assert solution.status in ("underflow", "not finite")
    assert float(solution.t[-1]) == pytest.approx(0.5, abs=1e-3)


# Memory


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_a_run_in_pieces_follows_the_flow(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every fifth accepted point, with a start whose loss and gradient are anything: as ``GradientFlow`` does."""
    fixed_costs(monkeypatch, costs)
    objective, theta0 = t33()
    auto, knot, memory, h, pieces = find_method("auto"), Knot(0.0, theta0, *objective.loss_and_gradient(theta0)), None, None, 0
    while knot.t < 100.0:
        taken = 0

        def visit(arrival: Arrival) -> bool:
            nonlocal taken
            taken += 1
            return taken == 5

        end = auto.run(objective, knot, Span(100.0, 1e-6, 1e-8, h), visit, memory)
        assert end.memory is not None
        stale = end.approximate  # whoever goes on from a memory has no exact gradient there
        knot = Knot(end.knot.t, end.knot.theta, end.knot.loss, end.knot.gradient * (1.001 if stale else 1.0))
        memory, h, pieces = end.memory, end.step_size, pieces + 1
    assert pieces > 5
    assert errors(knot.theta, reference()[2]) < 1e-5


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_steps_resume_bit_for_bit(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are among what a state_dict carries."""
    fixed_costs(monkeypatch, costs)

    def train(resume_at: int | None) -> Tensor:
        model, x, y = teacher_student(1, n_samples=300)
        optimizer = GradientFlow(model.parameters(), lr=2.0, method="auto")
        for i in range(25):
            if i == resume_at:
                kept = model.state_dict(), optimizer.state_dict()
                model, x, y = teacher_student(1, n_samples=300)
                model.load_state_dict(kept[0])
                optimizer = GradientFlow(model.parameters(), lr=2.0, method="auto")
                optimizer.load_state_dict(kept[1])
            optimizer.step(make_closure(optimizer, model, x, y))
        return flat(model)

    whole = train(None)
    for resume_at in (1, 5, 12, 24):
        assert torch.equal(train(resume_at), whole)


def test_stats_of_an_optimizer_tell_what_served(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_costs(monkeypatch, CHEAP)
    model, x, y = teacher_student(1, n_samples=300)
    optimizer = GradientFlow(model.parameters(), lr=5.0, method="auto")
    closure = make_closure(optimizer, model, x, y)
    for _ in range(20):
        optimizer.step(closure)
    choices = optimizer.stats.choices
    assert choices[0].method == FIRST
    assert len(choices) > 1
    assert all(one.method != other.method for one, other in pairwise(choices))
    assert optimizer.stats.method == choices[-1].method
    assert errors(flat(model), reference()[2]) < 1e-5


# What it costs


def network(activation: nn.Module, *sizes: int, dtype: torch.dtype | None = None) -> tuple[ModuleObjective, Tensor]:
    torch.manual_seed(1)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), activation)][:-1]
    x = torch.randn(200, sizes[0], dtype=torch.float64)
    y = (torch.sin(2 * x[:, 0]) * torch.cos(x[:, -1]))[:, None]
    objective = ModuleObjective(nn.Sequential(*layers).double(), nn.functional.mse_loss, (x, y), dtype=dtype)
    return objective, objective.initial_theta()


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Softplus(), nn.SiLU(), nn.GELU(), nn.Sigmoid()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smooth_networks_are_smooth(activation: nn.Module, dtype: torch.dtype) -> None:
    objective, theta = network(activation, 2, 8, 8, 1, dtype=dtype)
    assert not is_rough(objective, theta, objective.loss_and_gradient(theta)[1])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh()])
def test_networks_with_kinks_are_rough(activation: nn.Module) -> None:
    objective, theta = network(activation, 2, 8, 8, 1)
    assert is_rough(objective, theta, objective.loss_and_gradient(theta)[1])
    assert objective.counts.n_grad == 7


def test_a_stationary_point_is_not_rough() -> None:
    objective = function(lambda x: x.square().sum(), 3)
    theta = torch.zeros(3, dtype=torch.float64)
    assert not is_rough(objective, theta, objective.loss_and_gradient(theta)[1])


def counted(objective: Objective, theta0: Tensor, t_end: float, method: str, costs: Costs) -> tuple[float, Tensor]:
    """Seconds by counts and costs, where both factorisations cost the same."""
    before = replace(objective.counts)
    solution = integrate(objective, theta0, (0.0, t_end), method=method, rtol=1e-6, atol=1e-6, t_eval=[0.0, t_end])
    assert solution.status == "t_end"
    return costs.of(objective.counts, before, costs.factorisation(method)), solution.theta[-1]


@pytest.mark.parametrize(
    ("make", "t_end", "costs"),
    [
        (t33, 1e5, Costs(1.0, 1.6, 2.5, 0.2, 0.2)),
        (partial(network, nn.Tanh(), 2, 10, 10, 1), 300.0, Costs(1.0, 1.8, 17.0, 2.0, 2.0)),
    ],
)
def test_it_costs_little_more_than_the_best_method(
    make: Callable[[], tuple[ModuleObjective, Tensor]], t_end: float, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At costs about as measured on such networks, in gradients: what the choice itself takes is bounded."""
    fixed_costs(monkeypatch, costs)
    objective, theta0 = make()
    spent, found = counted(objective, theta0, t_end, "auto", costs)
    single = {name: counted(objective, theta0, t_end, name, costs) for name in ("bdf", "bdf-secant", "bdf-cg")}
    assert spent < 1.2 * min(cost for cost, _ in single.values())
    assert errors(found, single["bdf"][1]) < 1e-4


def test_where_it_is_rough_chebyshev_steps_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(1.0, 2.0, 3.6, 0.3, 4.8)
    fixed_costs(monkeypatch, costs)
    objective, theta0 = network(nn.ReLU(), 2, 8, 8, 1)
    before = objective.counts.n_grad
    solution = integrate(objective, theta0, (0.0, 10.0), rtol=1e-4, atol=1e-4)
    spent = objective.counts.n_grad - before
    assert solution.choices[0].method == "rkc2"
    assert "not smooth" in solution.choices[0].reason
    alone = integrate(objective, theta0, (0.0, 10.0), rtol=1e-4, atol=1e-4, method="rkc2")
    assert spent < 1.3 * alone.n_grad
    assert errors(solution.theta[-1], alone.theta[-1]) < 1e-2


def test_a_piece_that_a_few_steps_cover_is_not_examined() -> None:
    """As in loops over mini-batches, where each call is another loss, with the step size of the last one."""
    objective, theta0 = network(nn.Tanh(), 2, 8, 1)
    whole, piece = (
        integrate(objective, theta0, (0.0, 1e-3), rtol=1e-6, step_size=step_size).n_grad for step_size in (None, 1e-3)
    )
    assert piece <= 8 and whole >= piece + 6


def test_steps_that_cost_less_than_expected_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way of backward differentiation whose steps turn out dear hands over to the one expected to cost less."""
    fixed_costs(monkeypatch, Costs(gradient=1.0, hvp=50.0, hessian=4.1, cholesky=0.2, eigh=100.0))
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 1e6), rtol=1e-6)
    assert [choice.method for choice in solution.choices] == [FIRST, "bdf-secant", "bdf"]
    assert "are expected to take" in solution.choices[-1].reason
