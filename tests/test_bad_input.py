"""Every public argument, given nonsense: what the error says, and that nothing was changed before it was raised."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import flat, make_closure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import GradientFlow, NewtonPolish, integrate, minimize
from torch_gradflow.flow import stopping
from torch_gradflow.objectives.base import ClosureError
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.optim.closure_optimizer import ClosureOptimizer

X = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).reshape(12, 2)
Y = X.sin().sum(1, keepdim=True)
KINDS = [GradientFlow, NewtonPolish]


def network() -> nn.Sequential:
    """A small network in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def objective() -> ModuleObjective:
    """Its loss."""
    return ModuleObjective(network(), nn.functional.mse_loss, (X, Y))


def raises(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    """``call`` raises ``error`` (not a subclass by accident of a KeyError or so) with a text that matches."""
    with pytest.raises(error) as caught:
        call()
    assert re.search(text, str(caught.value), re.DOTALL), f"{text!r} is not in {str(caught.value)!r}"


# Arguments that both optimizers take

BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, r"\blr must .*-1\.0"),
    ({"lr": math.nan}, ValueError, r"\blr must .*nan"),
    ({"lr": math.inf}, ValueError, r"\blr must .*inf"),
    ({"lr": "fast"}, TypeError, r"\blr must .*'fast'"),
    ({"lr": None}, TypeError, r"\blr must .*None"),
    ({"lr": torch.ones(2)}, TypeError, r"\blr must .*tensor"),
    ({"weight_decay": -0.1}, ValueError, r"\bweight_decay must .*-0\.1"),
    ({"weight_decay": math.nan}, ValueError, r"\bweight_decay must .*nan"),
    ({"weight_decay": [1]}, TypeError, r"\bweight_decay must .*\[1\]"),
    ({"max_norm": -1.0}, ValueError, r"\bmax_norm must .*-1\.0"),
    ({"max_norm": math.nan}, ValueError, r"\bmax_norm must .*nan"),
    ({"max_norm": math.inf}, ValueError, r"\bmax_norm must .*inf"),
    ({"max_norm": "big"}, TypeError, r"\bmax_norm must .*'big'"),
    ({"maximize": 1}, TypeError, r"\bmaximize must .*1"),
    ({"maximize": "yes"}, TypeError, r"\bmaximize must .*'yes'"),
    ({"dtype": torch.float16}, ValueError, r"\bdtype must .*torch\.float16"),
    ({"dtype": torch.complex128}, ValueError, r"\bdtype must .*torch\.complex128"),
    ({"dtype": "float64"}, ValueError, r"\bdtype must .*'float64'"),
    ({"dtype": torch.float32}, ValueError, r"\bdtype=torch\.float32 is narrower .*torch\.float64"),
    ({"engine": "graph"}, ValueError, r"\bengine must .*'graph'"),
    ({"engine": None}, ValueError, r"\bengine must .*None"),
    ({"check": 1}, TypeError, r"\bcheck must .*1"),
    ({"check": None}, TypeError, r"\bcheck must .*None"),
    ({"method": "rk45"}, ValueError, r"\bmethod must .*'rk45'"),
    ({"method": None}, ValueError, r"\bmethod must .*None"),
    ({"method": ["dopri5"]}, ValueError, r"\bmethod must .*\['dopri5'\]"),
]
FLOW: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rtol": 0.0}, ValueError, r"\brtol must .*0\.0"),
    ({"rtol": -1e-6}, ValueError, r"\brtol must .*-1e-06"),
    ({"rtol": 1.0}, ValueError, r"\brtol must .*1\.0"),
    ({"rtol": math.nan}, ValueError, r"\brtol must .*nan"),
    ({"rtol": "tight"}, TypeError, r"\brtol must .*'tight'"),
    ({"atol": -1e-9}, ValueError, r"\batol must .*-1e-09"),
    ({"atol": math.inf}, ValueError, r"\batol must .*inf"),
    ({"atol": math.nan}, ValueError, r"\batol must .*nan"),
    ({"atol": "tight"}, TypeError, r"\batol must .*'tight'"),
    ({"max_evals": 0}, ValueError, r"\bmax_evals must .*0"),
    ({"max_evals": -5}, ValueError, r"\bmax_evals must .*-5"),
    ({"max_evals": 1.5}, ValueError, r"\bmax_evals must .*1\.5"),
    ({"max_evals": None}, ValueError, r"\bmax_evals must .*None"),
]
POLISH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gtol": -1.0}, ValueError, r"\bgtol must .*-1\.0"),
    ({"gtol": math.nan}, ValueError, r"\bgtol must .*nan"),
    ({"gtol": math.inf}, ValueError, r"\bgtol must .*inf"),
    ({"gtol": "tight"}, TypeError, r"\bgtol must .*'tight'"),
    ({"max_iter": 0}, ValueError, r"\bmax_iter must .*0"),
    ({"max_iter": 2.5}, ValueError, r"\bmax_iter must .*2\.5"),
    ({"certificate": "yes"}, TypeError, r"\bcertificate must .*'yes'"),
    ({"progress": 5}, TypeError, r"\bprogress must .*5"),
]


def names(table: list[tuple[dict[str, Any], type[Exception], str]]) -> list[str]:
    """A readable name for each row."""
    return [f"{name}={str(value)[:20]}" for settings, *_ in table for name, value in settings.items()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("settings", "error", "text"), BOTH, ids=names(BOTH))
def test_arguments_of_both_optimizers(
    kind: type[ClosureOptimizer], settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    """The constructor refuses them by name and value."""
    raises(lambda: kind(network().parameters(), **settings), error, text)


@pytest.mark.parametrize(("settings", "error", "text"), FLOW, ids=names(FLOW))
def test_arguments_of_gradient_flow(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """The constructor refuses them by name and value."""
    raises(lambda: GradientFlow(network().parameters(), **settings), error, text)


@pytest.mark.parametrize(("settings", "error", "text"), POLISH, ids=names(POLISH))
def test_arguments_of_newton_polish(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """The constructor refuses them by name and value."""
    raises(lambda: NewtonPolish(network().parameters(), **settings), error, text)


def test_unknown_argument() -> None:
    """Python's own error names it."""
    for kind in KINDS:
        raises(lambda kind=kind: kind(network().parameters(), momentum=0.9), TypeError, "momentum")


# Parameters


class DTensor(Tensor):
    """What torch calls a tensor that is sharded over processes, by name."""


def flat_parameter() -> nn.Parameter:
    """What FSDP leaves in place of parameters."""
    parameter = nn.Parameter(torch.zeros(4))
    parameter._is_flat_param = True
    return parameter


PARAMETERS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("empty", list, ValueError, "empty parameter list"),
    ("one tensor", lambda: torch.zeros(3, requires_grad=True), TypeError, "params argument given to the optimizer"),
    ("not tensors", lambda: [1.0, 2.0], TypeError, "can only optimize Tensors"),
    ("not leaves", lambda: [torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    ("complex", lambda: [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], TypeError, r"params\[0\].*complex64"),
    (
        "integer",
        lambda: [nn.Parameter(torch.zeros(2)), torch.zeros(2, dtype=torch.int64)],
        TypeError,
        r"params\[1\].*torch\.int64",
    ),
    ("sparse", lambda: [nn.Parameter(torch.eye(2).to_sparse())], TypeError, r"params\[0\].*torch\.sparse_coo.*to_dense"),
    (
        "several devices",
        lambda: [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))],
        ValueError,
        r"params .*several devices \(cpu, meta\)",
    ),
    ("FSDP", lambda: [flat_parameter()], TypeError, r"params\[0\].*sharded.*FSDP"),
    ("DTensor", lambda: [torch.zeros(2).as_subclass(DTensor)], TypeError, r"params\[0\].*sharded.*\(DTensor\)"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "error", "text"), [row[1:] for row in PARAMETERS], ids=[row[0] for row in PARAMETERS])
def test_parameters_that_cannot_flow(
    kind: type[ClosureOptimizer], make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    """Named by their place in the list, with the reason."""
    raises(lambda: kind(make()), error, text)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_parameter_in_two_groups() -> None:
    """torch's own error."""
    model = network()
    groups = [{"params": list(model.parameters())}, {"params": [model[0].weight]}]
    raises(lambda: GradientFlow(groups), ValueError, "more than one parameter group")


GROUPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, r"params group 1: lr must .*-1\.0"),
    ({"weight_decay": math.nan}, ValueError, r"params group 1: weight_decay must .*nan"),
    ({"maximize": True}, ValueError, r"maximize must be the same in all groups"),
    ({"maximize": "no"}, TypeError, r"params group 1: maximize must .*'no'"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("settings", "error", "text"), GROUPS, ids=names(GROUPS))
def test_bad_second_group(kind: type[ClosureOptimizer], settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Named with the group's number, at construction and when it is added; nothing is added then."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": list(model[2].parameters()), **settings}]
    raises(lambda: kind(groups), error, text)
    optimizer = kind(model[0].parameters())
    raises(lambda: optimizer.add_param_group({"params": model[2].parameters(), **settings}), error, text)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[2].parameters()})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("lr", math.nan, ValueError, r"params group 0: lr must .*nan"),
        ("lr", -0.1, ValueError, r"params group 0: lr must .*-0\.1"),
        ("weight_decay", "x", TypeError, r"params group 0: weight_decay must .*'x'"),
    ],
)
def test_group_spoilt_between_steps(
    kind: type[ClosureOptimizer], name: str, value: Any, error: type[Exception], text: str
) -> None:
    """A scheduler or a user who writes nonsense into a group is told so at the next step, before anything happens."""
    model = network()
    optimizer = kind(model.parameters())
    optimizer.param_groups[0][name] = value
    before = flat(model)
    raises(lambda: optimizer.step(make_closure(optimizer, model, X, Y)), error, text)
    assert torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())


# Steps


@pytest.fixture
def used() -> Iterator[tuple[nn.Sequential, GradientFlow, Callable[[], Tensor]]]:
    """A flow after two steps; at the end, it must be as it was before the test, whatever the test tried."""
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=0.1)
    closure = make_closure(optimizer, model, X, Y)
    for _ in range(2):
        optimizer.step(closure)
    before, time, stats = flat(model), optimizer.flow_time, optimizer.stats
    gradients = [p.grad for p in model.parameters()]
    versions = [g._version for g in gradients if g is not None]
    state = [t.clone() for p in model.parameters() for t in optimizer.state[p].values()]
    yield model, optimizer, closure
    assert torch.equal(flat(model), before)
    assert optimizer.flow_time == time and optimizer.stats == stats
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True)), "the closure was called"
    assert [g._version for g in gradients if g is not None] == versions, "the closure was called"
    after = [t for p in model.parameters() for t in optimizer.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


Used = tuple[nn.Sequential, GradientFlow, Callable[[], Tensor]]
LOSS = torch.zeros(())
STEPS: list[tuple[str, Callable[[GradientFlow], Any], type[Exception], str]] = [
    ("a loss", lambda o: o.step(LOSS), TypeError, r"closure must be a function.*tensor"),
    ("a number", lambda o: o.step(3), TypeError, r"closure must be a function.*3"),
    ("no backward", lambda o: o.step(lambda: LOSS), RuntimeError, r"closure did not call backward"),
    ("integrate(None)", lambda o: o.integrate(None, 1.0), ClosureError, r"integrate\(\) without a closure .*zero_grad"),
    ("integrate(3)", lambda o: o.integrate(3, 1.0), TypeError, r"closure must .*3"),
]


@pytest.mark.parametrize(("call", "error", "text"), [row[1:] for row in STEPS], ids=[row[0] for row in STEPS])
def test_closures_that_are_none(used: Used, call: Callable[[GradientFlow], Any], error: type[Exception], text: str) -> None:
    """The error says what a closure is, and the flow stands as it stood."""
    raises(lambda: call(used[1]), error, text)


@pytest.mark.parametrize("closure", [3, LOSS], ids=["number", "tensor"])
def test_polish_closures_that_are_none(closure: Any) -> None:
    """The same for NewtonPolish."""
    model = network()
    optimizer = NewtonPolish(model.parameters())
    before = flat(model)
    with pytest.raises(TypeError, match="closure must"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before) and optimizer.result is None


INTEGRATE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"t_end": 0.0}, ValueError, r"\bt_end must .*0\.0"),
    ({"t_end": -1.0}, ValueError, r"\bt_end must .*-1\.0"),
    ({"t_end": math.nan}, ValueError, r"\bt_end must .*nan"),
    ({"t_end": "late"}, TypeError, r"\bt_end must .*'late'"),
    ({"t_end": math.inf}, ValueError, r"\bt_end=inf needs a stopping rule"),
    ({"t_eval": []}, ValueError, r"\bt_eval must hold at least one"),
    ({"t_eval": [0.5, 0.5]}, ValueError, r"\bt_eval must .*ascending"),
    ({"t_eval": [0.5, 0.2]}, ValueError, r"\bt_eval must .*ascending"),
    ({"t_eval": [0.5, 2.0]}, ValueError, r"\bt_eval must .*2\b"),
    ({"t_eval": [-0.5, 0.5]}, ValueError, r"\bt_eval must .*-0\.5"),
    ({"t_eval": [math.nan]}, ValueError, r"\bt_eval must .*"),
    ({"t_eval": 0.5}, TypeError, r"\bt_eval must .*0\.5"),
    ({"stop": 5}, TypeError, r"\bstop must .*5"),
    ({"stop": [1e-3]}, TypeError, r"\bstop must .*0\.001"),
    ({"stop": "never"}, TypeError, r"\bstop must .*"),
    ({"max_evals": 0}, ValueError, r"\bmax_evals must .*0"),
    ({"max_evals": math.nan}, ValueError, r"\bmax_evals must .*nan"),
    ({"max_evals": "few"}, ValueError, r"\bmax_evals must .*'few'"),
    ({"progress": 5}, TypeError, r"\bprogress must .*5"),
]


@pytest.mark.parametrize(("settings", "error", "text"), INTEGRATE, ids=names(INTEGRATE))
def test_arguments_of_the_method_integrate(used: Used, settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Refused before the closure is called."""
    _, optimizer, closure = used
    raises(lambda: optimizer.integrate(closure, **{"t_end": 1.0, **settings}), error, text)


def test_integrate_with_nothing_to_move() -> None:
    """With all lrs zero there is no flow time, so ``integrate`` says so."""
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=0.0)
    raises(lambda: optimizer.integrate(make_closure(optimizer, model, X, Y), 1.0), ValueError, "all lr are 0")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, used: Used) -> None:
    """Losses of several processes have to be combined, so the group has to be named: for step, integrate and NewtonPolish."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
    model, optimizer, closure = used
    polish = NewtonPolish(model.parameters())
    raises(lambda: optimizer.step(closure), ValueError, r"GradientFlow .*4 processes.*process_group=")
    raises(lambda: optimizer.integrate(closure, 1.0), ValueError, r"4 processes.*process_group=")
    raises(lambda: polish.step(closure), ValueError, r"NewtonPolish .*4 processes.*process_group=")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
    GradientFlow(network().parameters(), lr=0.0).step(lambda: None)


def test_state_of_another_optimizer_is_refused(used: Used) -> None:
    """A checkpoint of Adam is not one of a flow: said on loading, not by a KeyError at the next step."""
    model, optimizer, _ = used
    adam = torch.optim.Adam(model.parameters())
    raises(lambda: optimizer.load_state_dict(adam.state_dict()), ValueError, "state_dict.*GradientFlow")


# The functions without an optimizer


FLOWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"objective": lambda theta: theta.sum()}, TypeError, r"\bobjective must .*"),
    ({"objective": None}, TypeError, r"\bobjective must .*None"),
    ({"theta0": torch.zeros(3, dtype=torch.float64)}, ValueError, r"\btheta0 must .*\(13,\).*\(3,\)"),
    ({"theta0": torch.zeros(13, 1, dtype=torch.float64)}, ValueError, r"\btheta0 must .*\(13, 1\)"),
    ({"theta0": torch.zeros(13)}, TypeError, r"\btheta0 must .*torch\.float64.*torch\.float32"),
    ({"theta0": [0.0] * 13}, TypeError, r"\btheta0 must .*"),
    ({"theta0": torch.full((13,), math.nan, dtype=torch.float64)}, FloatingPointError, r"not finite at theta0"),
    ({"t_span": (1.0, 0.0)}, ValueError, r"\bt_span must .*\(1\.0, 0\.0\)"),
    ({"t_span": (math.inf, math.inf)}, ValueError, r"\bt_span must .*inf"),
    ({"t_span": (0.0, math.nan)}, ValueError, r"\bt_span must .*nan"),
    ({"t_span": (0.0,)}, ValueError, r"\bt_span must .*\(0\.0,\)"),
    ({"t_span": 1.0}, TypeError, r"\bt_span must .*1\.0"),
    ({"method": "euler"}, ValueError, r"\bmethod must .*'euler'"),
    ({"rtol": 0.0}, ValueError, r"\brtol must .*0\.0"),
    ({"rtol": "x"}, TypeError, r"\brtol must .*'x'"),
    ({"atol": -1.0}, ValueError, r"\batol must .*-1\.0"),
    ({"t_eval": [2.0]}, ValueError, r"\bt_eval must .*2\b"),
    ({"t_eval": [0.2, math.nan]}, ValueError, r"\bt_eval must .*"),
    ({"stop": 5}, TypeError, r"\bstop must .*5"),
    ({"max_evals": -1}, ValueError, r"\bmax_evals must .*-1"),
    ({"step_size": 0.0}, ValueError, r"\bstep_size must .*0\.0"),
    ({"step_size": math.inf}, ValueError, r"\bstep_size must .*inf"),
    ({"step_size": "small"}, TypeError, r"\bstep_size must .*'small'"),
    ({"progress": "bar"}, TypeError, r"\bprogress must .*'bar'"),
]


@pytest.mark.parametrize(("settings", "error", "text"), FLOWS, ids=names(FLOWS))
def test_arguments_of_integrate(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Refused by name and value."""
    good: dict[str, Any] = {"objective": objective(), "theta0": objective().initial_theta(), "t_span": (0.0, 1.0)}
    raises(lambda: integrate(**{**good, **settings}), error, text)


class Endless(ModuleObjective):
    """Ends a flow that nothing else would end."""

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class, 300 times."""
        if self.counts.n_grad >= 300:
            raise RuntimeError("the flow would never end")
        return super().loss_and_gradient(theta)


def test_infinite_time_without_a_stopping_rule() -> None:
    """A flow without an end is refused at once."""
    endless = Endless(network(), nn.functional.mse_loss, (X, Y))
    raises(lambda: integrate(endless, endless.initial_theta(), (0.0, math.inf)), ValueError, r"t_span.*inf.*stop")


MINIMA: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"objective": None}, TypeError, r"\bobjective must .*None"),
    ({"theta0": torch.zeros(3, dtype=torch.float64)}, ValueError, r"\btheta0 must .*\(13,\).*\(3,\)"),
    ({"theta0": torch.zeros(13)}, TypeError, r"\btheta0 must .*torch\.float64.*torch\.float32"),
    ({"theta0": torch.full((13,), math.inf, dtype=torch.float64)}, FloatingPointError, r"not finite at theta0"),
    ({"method": "BFGS"}, ValueError, r"\bmethod must .*'BFGS'"),
    ({"gtol": -1e-3}, ValueError, r"\bgtol must .*-0\.001"),
    ({"gtol": "x"}, TypeError, r"\bgtol must .*'x'"),
    ({"max_iter": 0}, ValueError, r"\bmax_iter must .*0"),
    ({"max_iter": 3.0}, ValueError, r"\bmax_iter must .*3\.0"),
    ({"certificate": 1}, TypeError, r"\bcertificate must .*1"),
    ({"progress": "bar"}, TypeError, r"\bprogress must .*'bar'"),
]


@pytest.mark.parametrize(("settings", "error", "text"), MINIMA, ids=names(MINIMA))
def test_arguments_of_minimize(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Refused by name and value."""
    good: dict[str, Any] = {"objective": objective(), "theta0": objective().initial_theta()}
    raises(lambda: minimize(**{**good, **settings}), error, text)


def test_hessian_that_does_not_fit_is_refused_before_anything_is_allocated() -> None:
    """With the number of parameters and the size it would take; the closure is not even called."""
    model = nn.Linear(2000, 1000)
    optimizer = NewtonPolish(model.parameters(), method="trust-region")

    def closure() -> Tensor:
        raise AssertionError("the closure was called")

    raises(lambda: optimizer.step(closure), MemoryError, r"2,001,000 parameters takes 14,\d\d\d\.\d GiB")


# ModuleObjective


def shuffling() -> DataLoader[Any]:
    """Another order at each pass."""
    return DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)


MODULES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("model", {"model": nn.Tanh()}, ValueError, r"model has no parameter"),
    ("model", {"model": network().requires_grad_(False)}, ValueError, r"model has no parameter that requires gradients"),
    ("model", {"model": torch.sin}, TypeError, r"\bmodel must .*sin"),
    ("complex model", {"model": nn.Linear(2, 1, dtype=torch.complex64)}, TypeError, r"params\[0\] is complex"),
    ("loss_fn", {"loss_fn": 3}, TypeError, r"\bloss_fn must .*3"),
    ("loss_fn", {"loss_fn": nn.MSELoss(reduction="none")}, ValueError, r"\breduction must .*'none'"),
    ("data", {"data": None}, TypeError, r"\bdata must .*None"),
    ("data", {"data": (X, Y[:5])}, ValueError, r"\bdata must .*5 and 12"),
    ("data", {"data": (X[:0], Y[:0])}, ValueError, r"\bdata holds no samples"),
    ("data", {"data": []}, ValueError, r"\bdata holds no samples"),
    ("data", {"data": iter([(X, Y)])}, TypeError, r"\bdata is an iterator"),
    ("data", {"data": shuffling()}, ValueError, r"\bbatches of data differ at each evaluation"),
    ("reduction", {"reduction": "max"}, ValueError, r"\breduction must .*'max'"),
    ("chunk_size", {"chunk_size": 0}, ValueError, r"\bchunk_size must .*0"),
    ("chunk_size", {"chunk_size": 2.5}, ValueError, r"\bchunk_size must .*2\.5"),
    ("chunk_size", {"chunk_size": 4, "data": [(X, Y)]}, ValueError, r"\bchunk_size splits tensors"),
    ("dtype", {"dtype": torch.int64}, ValueError, r"\bdtype must .*torch\.int64"),
    ("dtype", {"dtype": "float64"}, ValueError, r"\bdtype must .*'float64'"),
]


@pytest.mark.parametrize(("settings", "error", "text"), [row[1:] for row in MODULES], ids=[row[0] for row in MODULES])
def test_arguments_of_module_objective(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    """Refused by name and value."""
    good: dict[str, Any] = {"model": network(), "loss_fn": nn.functional.mse_loss, "data": (X, Y)}
    raises(lambda: ModuleObjective(**{**good, **settings}), error, text)


# Stopping rules


RULES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("FlowTime", lambda: stopping.FlowTime(0.0), ValueError, r"\bt must .*0\.0"),
    ("FlowTime", lambda: stopping.FlowTime(math.nan), ValueError, r"\bt must .*nan"),
    ("FlowTime", lambda: stopping.FlowTime("x"), TypeError, r"\bt must .*'x'"),
    ("WallTime", lambda: stopping.WallTime(-1), ValueError, r"\bseconds must .*-1"),
    ("Evaluations", lambda: stopping.Evaluations(0), ValueError, r"\bn_grad must .*0"),
    ("GradientNorm", lambda: stopping.GradientNorm(0.0), ValueError, r"\bbelow must .*0\.0"),
    ("LossValue", lambda: stopping.LossValue(math.nan), ValueError, r"\bbelow must .*nan"),
    ("LossValue", lambda: stopping.LossValue("x"), TypeError, r"\bbelow must .*'x'"),
    ("LossPlateau", lambda: stopping.LossPlateau(relative=0.0), ValueError, r"\brelative must .*0\.0"),
    ("LossPlateau", lambda: stopping.LossPlateau(factor=1.0), ValueError, r"\bfactor must .*1\.0"),
    ("LossPlateau", lambda: stopping.LossPlateau(factor=math.nan), ValueError, r"\bfactor must .*nan"),
]


@pytest.mark.parametrize(("call", "error", "text"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_arguments_of_stopping_rules(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    """Refused by name and value."""
    raises(call, error, text)
