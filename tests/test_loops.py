"""step() without a closure, in loops as people write them: each follows the right flow, or says by name why it cannot.

What is right is told by scipy's DOP853 on gradients that ``torch.autograd.grad`` gives, in float64, without torch_gradflow.
"""

from __future__ import annotations

import ast
import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import RECORDED, NumpyPerceptron, flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import ClosureError, GradientFlow, GradientFlowWarning, ModuleObjective, NewtonPolish, integrate
from torch_gradflow.flow import stepwise

LR = 0.3
# Errors of θ relative to its size: what rtol=1e-6 (float64) and 1e-4 (float32) may cost in a few steps.
NEAR, NEAR32 = 1e-5, 1e-3
Gradients = Callable[[], Sequence[Tensor]]


def network(*, n_inputs: int = 3, n_outputs: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A small tanh network, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_inputs, 5), nn.Tanh(), nn.Linear(5, n_outputs)).to(dtype)


def data(n: int = 12, *, n_inputs: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, n_inputs, generator=generator), torch.randn(n, 1, generator=generator)
    return x.to(dtype), y.to(dtype)


def follow(parameters: Iterable[Tensor], gradients: Gradients, time: float) -> None:
    """Take the parameters (float64) along θ' = −gradients for that time, by scipy's DOP853."""
    moving = list(parameters)

    def field(_: float, theta: np.ndarray) -> np.ndarray:
        vector_to_parameters(torch.from_numpy(theta.copy()), moving)
        return -torch.cat([g.reshape(-1) for g in gradients()]).detach().numpy()

    start = parameters_to_vector(moving).detach().numpy().copy()
    end = solve_ivp(field, (0.0, time), start, method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    vector_to_parameters(torch.from_numpy(end.copy()), moving)


def slope(parameters: Iterable[Tensor], loss: Callable[[], Tensor], sign: float = 1.0) -> Gradients:
    """The gradient of a loss, from autograd alone."""
    moving = list(parameters)
    return lambda: [sign * g for g in torch.autograd.grad(loss(), moving)]


def flow_end(model: nn.Module, loss: Callable[[nn.Module], Tensor], time: float) -> Tensor:
    """θ(time) of a float64 copy of the model, flat, under dθ/dt = −∇loss(copy)."""
    twin = copy.deepcopy(model).double()
    moving = [p for p in twin.parameters() if p.requires_grad]
    follow(moving, slope(moving, lambda: loss(twin)), time)
    return flat(twin)


def mse(x: Tensor, y: Tensor) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
    """The mean squared error of a model on these data, as a function of the model."""
    return lambda model: F.mse_loss(model(x.double()), y.double())


def distance(found: Tensor | nn.Module, wanted: Tensor | nn.Module) -> float:
    """‖Δθ‖ / ‖θ‖."""
    a, b = (flat(t).double() if isinstance(t, nn.Module) else t.double() for t in (found, wanted))
    return float((a - b).norm() / b.norm())


def named(reason: str) -> AbstractContextManager[Any]:
    """The warning with which a loop goes over to one gradient per call, naming the reason."""
    return pytest.warns(GradientFlowWarning, match=f"one gradient per call.*{reason}")


def assert_replayed(optimizer: GradientFlow, flow_time: float) -> None:
    """The last step was a replay, and the flow came as far as it should."""
    assert optimizer.stats.engine in RECORDED, optimizer.stats.engine_reason
    assert optimizer.stats.engine_reason == ""
    assert optimizer.stats.status == "t_end"
    assert optimizer.flow_time == pytest.approx(flow_time, rel=1e-12)


def assert_fell_back(optimizer: GradientFlow, reason: str) -> None:
    """The last step had one gradient, and ``stats`` names the reason."""
    assert optimizer.stats.engine == "fallback"
    assert reason in optimizer.stats.engine_reason


def passes(
    optimizer: GradientFlow | NewtonPolish, loss: Callable[[], Tensor], n: int, *, last: bool = False, **zero: bool
) -> None:
    """The plain loop."""
    for _ in range(n):
        if not last:
            optimizer.zero_grad(**zero)
        loss().backward()
        optimizer.step()
        if last:
            optimizer.zero_grad(**zero)


# The plain loop is the loop with a closure, and integrate


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_plain_loop_closure_and_integrate_end_at_one_point(last: bool, set_to_none: bool) -> None:
    """Five steps, wherever zero_grad() stands: the flow at 5·lr."""
    x, y = data()
    end = flow_end(network(), mse(x, y), 5 * LR)
    plain, closed, whole = network(), network(), network()
    optimizer = GradientFlow(plain.parameters(), lr=LR)
    passes(optimizer, lambda: F.mse_loss(plain(x), y), 5, last=last, set_to_none=set_to_none)
    assert_replayed(optimizer, 5 * LR)
    with_closure = GradientFlow(closed.parameters(), lr=LR)
    for _ in range(5):
        with_closure.step(make_closure(with_closure, closed, x, y))
    in_one_go = GradientFlow(whole.parameters(), lr=LR)
    in_one_go.integrate(make_closure(in_one_go, whole, x, y), 5 * LR)
    for model in (plain, closed, whole):
        assert distance(model, end) <= NEAR


def test_step_returns_the_loss_at_its_start_and_leaves_the_gradient_there() -> None:
    """As with a closure."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    returned = optimizer.step()
    assert float(returned.detach()) == float(loss.detach())
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_zero_grad_last_moves_a_little_then_makes_up_for_it() -> None:
    """The first iteration has no record; the second ends at 2·lr, without a warning."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 1, last=True)
    assert optimizer.stats.engine == "fallback"
    assert optimizer.flow_time == 0.0
    passes(optimizer, lambda: F.mse_loss(model(x), y), 1, last=True)
    assert_replayed(optimizer, 2 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 2 * LR)) <= NEAR


def test_zero_grad_first_and_last() -> None:
    """Called twice between two steps, it begins the record anew."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(3):
        passes(optimizer, lambda: F.mse_loss(model(x), y), 1)
        optimizer.zero_grad()
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 3 * LR)) <= NEAR


# Accumulation


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 4, 2, 1)])
def test_accumulation_over_four_backward_calls(sizes: tuple[int, ...], last: bool) -> None:
    """Chunks weighted by their share of the samples, equal or not: the flow of the mean over all."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(3):
        if not last:
            optimizer.zero_grad()
        for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
            loss = F.mse_loss(model(part), target) * len(part) / len(x)
            loss.backward()
        optimizer.step()
        if last:
            optimizer.zero_grad()
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 3 * LR)) <= NEAR


def test_two_losses_with_retain_graph() -> None:
    """The sum of both is followed, though they share a graph."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(x)
        F.mse_loss(out, y).backward(retain_graph=True)
        (0.1 * out.square().mean()).backward()
        optimizer.step()
    assert_replayed(optimizer, 3 * LR)
    end = flow_end(network(), lambda m: F.mse_loss(m(x), y) + 0.1 * m(x).square().mean(), 3 * LR)
    assert distance(model, end) <= NEAR


# Evaluation between steps


@pytest.mark.parametrize("where", ["after step", "before forward", "before backward", "before step"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_evaluation_anywhere(last: bool, grad: bool, where: str) -> None:
    """Another loss of the same model, computed and read with or without grad, belongs to no record."""
    x, y = data()
    other_x, other_y = data(seed=2)
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    seen = []

    def evaluate(now: str) -> None:
        if now == where:
            with torch.set_grad_enabled(grad):
                seen.append(F.mse_loss(model(other_x), other_y).item())

    for _ in range(4):
        if not last:
            optimizer.zero_grad()
        evaluate("before forward")
        loss = F.mse_loss(model(x), y)
        evaluate("before backward")
        loss.backward()
        evaluate("before step")
        optimizer.step()
        if last:
            optimizer.zero_grad()
        evaluate("after step")
    assert_replayed(optimizer, 4 * LR)
    assert len(set(seen)) == 4
    assert distance(model, flow_end(network(), mse(x, y), 4 * LR)) <= NEAR


def test_evaluation_with_the_predictions_of_the_loss() -> None:
    """An accuracy from the same predictions, under no_grad or paused, disturbs nothing."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR, engine="replay")
    for _ in range(3):
        optimizer.zero_grad()
        out = model(x)
        loss = F.mse_loss(out, y)
        with torch.no_grad():
            assert float(((out > 0) == (y > 0)).double().mean()) >= 0
        with optimizer.recording_paused():
            assert out.detach().abs().max().item() > 0
        loss.backward()
        optimizer.step()
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 3 * LR)) <= NEAR


# Mini-batches


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Several batches of data."""
    return [data(seed=10 + k) for k in range(n)]


def batch_flows(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], times: Iterable[float]) -> Tensor:
    """The flow of each batch's loss in turn, each for its time."""
    twin = copy.deepcopy(model).double()
    for (x, y), time in zip(pairs, times, strict=True):
        follow(twin.parameters(), slope(twin.parameters(), lambda x=x, y=y: mse(x, y)(twin)), time)  # type: ignore[misc]
    return flat(twin)


def test_each_step_follows_the_flow_of_its_own_batch() -> None:
    """By scipy, and by torch_gradflow.integrate of each batch's ModuleObjective."""
    model, other = network(), network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for x, y in batches():
        passes(optimizer, lambda x=x, y=y: F.mse_loss(model(x), y), 1)  # type: ignore[misc]
        objective = ModuleObjective(other, F.mse_loss, (x, y))
        objective.write(integrate(objective, objective.initial_theta(), (0.0, LR)).theta[-1])
    assert_replayed(optimizer, 4 * LR)
    assert distance(model, batch_flows(network(), batches(), [LR] * 4)) <= NEAR
    assert distance(model, other) <= NEAR


def test_batches_with_zero_grad_last() -> None:
    """The first batch, which has no record, gets a short step; all others lr each, which flow_time adds up."""
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for x, y in batches():
        passes(optimizer, lambda x=x, y=y: F.mse_loss(model(x), y), 1, last=True)  # type: ignore[misc]
    short = optimizer.flow_time - 3 * LR
    assert 0 < short <= LR
    assert optimizer.stats.engine in RECORDED
    assert distance(model, batch_flows(network(), batches(), [short, LR, LR, LR])) <= NEAR


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_data_loader(last: bool, n_workers: int) -> None:
    """Workers that are forked while a record is being made."""
    x, y = data(8)
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    fork = "fork" if n_workers else None
    loader = DataLoader(TensorDataset(x, y), batch_size=4, num_workers=n_workers, multiprocessing_context=fork)
    times = []
    for _ in range(2):
        optimizer.zero_grad()  # before the workers are forked
        for part, target in loader:
            before = optimizer.flow_time
            passes(optimizer, lambda part=part, target=target: F.mse_loss(model(part), target), 1, last=last)  # type: ignore[misc]
            times.append(optimizer.flow_time - before)
    assert_replayed(optimizer, 4 * LR)
    pairs = list(zip(x.split(4), y.split(4), strict=True)) * 2
    assert distance(model, batch_flows(network(), pairs, times)) <= NEAR


def test_scheduler() -> None:
    """Each step is as long as the scheduler says."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for _ in range(5):
        passes(optimizer, lambda: F.mse_loss(model(x), y), 1)
        scheduler.step()
    lengths = [LR, LR, LR / 2, LR / 2, LR / 4]
    assert optimizer.stats.engine in RECORDED
    assert distance(model, flow_end(network(), mse(x, y), sum(lengths))) <= NEAR


# torch.compile, modes, threads


def printing(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward pass in two compiled parts: print breaks the graph."""

    def forward(x: Tensor) -> Tensor:
        hidden = model[1](model[0](x))  # type: ignore[index]
        print("in the middle")
        out: Tensor = model[2](hidden)  # type: ignore[index]
        return out

    return forward


# Inductor uses what torch deprecates.
uses_inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"backend": "eager"}, id="eager"),
        pytest.param({"backend": "eager", "fullgraph": True}, id="eager, fullgraph"),
        pytest.param({"backend": "aot_eager"}, id="aot_eager"),
        pytest.param({}, id="inductor", marks=[pytest.mark.slow, uses_inductor]),
        pytest.param({"fullgraph": True}, id="inductor, fullgraph", marks=[pytest.mark.slow, uses_inductor]),
    ],
)
def test_compiled_model(settings: dict[str, Any], last: bool) -> None:
    """The compiled model's own loss is followed, whatever compiles it."""
    torch.compiler.reset()
    x, y = data()
    model = network()
    compiled = torch.compile(model, **settings)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    passes(optimizer, lambda: F.mse_loss(compiled(x), y), 4, last=last)
    assert_replayed(optimizer, 4 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 4 * LR)) <= NEAR


# Dynamo looks at .grad of what comes in after a break, with any optimizer, and hides the warning only if it is no error.
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@looks_at_grad
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, uses_inductor])])
def test_compiled_model_with_a_graph_break(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Both parts are seen, and what lies between."""
    torch.compiler.reset()
    x, y = data()
    model = network()
    compiled = torch.compile(printing(model), backend=backend)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    passes(optimizer, lambda: F.mse_loss(compiled(x), y), 4)
    assert capfd.readouterr().out.count("in the middle") == 4
    assert_replayed(optimizer, 4 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 4 * LR)) <= NEAR


@looks_at_grad
def test_a_compiled_training_pass() -> None:
    """Forward, loss and backward in one compiled function, zero_grad and step outside: a break of the graph at most."""
    torch.compiler.reset()
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)

    def one_pass(x: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss.detach()

    compiled = torch.compile(one_pass, backend="eager")
    for _ in range(4):
        optimizer.zero_grad()
        compiled(x, y)
        optimizer.step()
    assert_replayed(optimizer, 4 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 4 * LR)) <= NEAR


@pytest.mark.parametrize("around", ["zero_grad", "forward", "backward", "zero_grad and forward", "pass", "loop"])
@pytest.mark.parametrize("last", [False, True])
def test_default_device_around_parts_of_the_loop(last: bool, around: str) -> None:
    """A mode of torch that is entered and left before, within or after the record."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)

    def on(part: str) -> AbstractContextManager[Any]:
        return torch.device("cpu") if part == around else nullcontext()

    with on("loop"):
        for _ in range(4):
            with on("pass"):
                with on("zero_grad and forward"):
                    with on("zero_grad"):
                        if not last:
                            optimizer.zero_grad()
                    with on("forward"):
                        loss = F.mse_loss(model(x), y)
                with on("backward"):
                    loss.backward()
                optimizer.step()
            if last:
                with on("zero_grad"):
                    optimizer.zero_grad()
    assert_replayed(optimizer, 4 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 4 * LR)) <= NEAR


# Several optimizers in one loop


def halves_end(model: nn.Sequential, loss: Callable[[nn.Module], Tensor], n: int, other: Callable[..., Any] | None) -> Tensor:
    """Two halves that move at the same time, each along the flow at the other's old value; the second by ``other``."""
    twin = copy.deepcopy(model)
    first, second = list(twin[0].parameters()), list(twin[2].parameters())
    adam = None if other is None else other(second)
    for _ in range(n):
        old = [p.detach().clone() for p in first]
        for p, g in zip(second, torch.autograd.grad(loss(twin), second), strict=True):
            p.grad = g
        follow(first, slope(first, lambda: loss(twin)), LR)
        new = [p.detach().clone() for p in first]
        vector_to_parameters(parameters_to_vector(old), first)
        if adam is None:
            follow(second, slope(second, lambda: loss(twin)), LR)
        else:
            adam.step()
        vector_to_parameters(parameters_to_vector(new), first)
    return flat(twin)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("beside", ["GradientFlow", "Adam", "Adam first"])
def test_two_optimizers_on_two_halves_of_one_model(beside: str, last: bool) -> None:
    """A shared loss: each holds the other's half fixed where it was in the forward pass."""
    x, y = data()
    model = network()
    first = GradientFlow(model[0].parameters(), lr=LR)
    second: torch.optim.Optimizer
    if beside == "GradientFlow":
        second, other = GradientFlow(model[2].parameters(), lr=LR), None
    else:
        second, other = torch.optim.Adam(model[2].parameters(), lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)
    pair = [second, first] if beside == "Adam first" else [first, second]
    if last:  # the order of the record, not of the first iteration, is what is tested here
        for optimizer in pair:
            optimizer.zero_grad()
    for _ in range(3):
        if not last:
            for optimizer in pair:
                optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        for optimizer in pair:
            optimizer.step()
        if last:
            for optimizer in reversed(pair):
                optimizer.zero_grad()
    assert_replayed(first, 3 * LR)
    if isinstance(second, GradientFlow):
        assert_replayed(second, 3 * LR)
    assert distance(model, halves_end(network(), mse(x, y), 3, other)) <= NEAR


def gan() -> tuple[nn.Sequential, nn.Sequential, Tensor, Tensor]:
    """Generator, discriminator, real data and noise."""
    return network(n_inputs=2, n_outputs=3, seed=3), network(seed=4), data()[0], data(n_inputs=2, seed=5)[0]


def gan_end(n: int) -> tuple[Tensor, Tensor]:
    """n turns: the discriminator flows against the old generator, then the generator against the new discriminator."""
    generator, discriminator, real, noise = gan()
    for _ in range(n):
        fake = generator(noise).detach()

        def judge(fake: Tensor = fake) -> Tensor:
            return F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()

        follow(discriminator.parameters(), slope(discriminator.parameters(), judge), LR)
        follow(
            generator.parameters(),
            slope(generator.parameters(), lambda: F.softplus(-discriminator(generator(noise))).mean()),
            LR,
        )
    return flat(generator), flat(discriminator)


@pytest.mark.parametrize("order", ["generator first", "discriminator first", "each before its own pass", "both before each"])
@pytest.mark.parametrize("one_forward", [False, True])
def test_gan(one_forward: bool, order: str) -> None:
    """A pair that shares losses; the fakes are generated once for both, or twice."""
    generator, discriminator, real, noise = gan()
    of_g = GradientFlow(generator.parameters(), lr=LR, engine="auto")
    of_d = GradientFlow(discriminator.parameters(), lr=LR, engine="auto")
    if one_forward and order == "each before its own pass":
        pytest.skip("then the generator's pass is not recorded: see the twelve loops")
    if one_forward and order == "both before each":
        pytest.skip("the same")
    pair = [of_g, of_d] if order == "generator first" else [of_d, of_g]
    for _ in range(3):
        if order != "each before its own pass":
            for optimizer in pair:
                optimizer.zero_grad()
        else:
            of_d.zero_grad()
        fake = generator(noise)
        (F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()).backward()
        of_d.step()
        if order == "both before each":
            for optimizer in pair:
                optimizer.zero_grad()
        elif order == "each before its own pass":
            of_g.zero_grad()
        F.softplus(-discriminator(fake if one_forward else generator(noise))).mean().backward()
        of_g.step()
    assert_replayed(of_g, 3 * LR)
    assert_replayed(of_d, 3 * LR)
    wanted_g, wanted_d = gan_end(3)
    assert distance(generator, wanted_g) <= NEAR
    assert distance(discriminator, wanted_d) <= NEAR


# What the loss may contain


def objective_end(model: nn.Module, loss: Callable[[nn.Module], Tensor], **settings: Any) -> tuple[nn.Module, GradientFlow]:
    """The model after three passes of a plain loop on this loss, and its optimizer."""
    optimizer = GradientFlow(model.parameters(), lr=LR, **settings)
    passes(optimizer, lambda: loss(model), 3)
    return model, optimizer


def test_groups_with_their_own_lr() -> None:
    """Relative inverse time constants, as with a closure."""
    x, y = data()
    model = network()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3 * LR}]
    optimizer = GradientFlow(groups, lr=LR)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 3)
    assert_replayed(optimizer, 3 * LR)
    twin = network()
    speeds = [1.0, 1.0, 3.0, 3.0]
    raw = slope(twin.parameters(), lambda: F.mse_loss(twin(x), y))
    follow(twin.parameters(), lambda: [s * g for s, g in zip(speeds, raw(), strict=True)], 3 * LR)
    assert distance(model, twin) <= NEAR


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_and_maximize(maximize: bool, last: bool) -> None:
    """Coupled decay, and a concave objective turned round."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR, weight_decay=0.2, maximize=maximize)
    sign = -1 if maximize else 1
    passes(optimizer, lambda: sign * F.mse_loss(model(x), y), 4, last=last)
    assert_replayed(optimizer, 4 * LR)
    end = flow_end(network(), lambda m: F.mse_loss(m(x), y) + 0.1 * sum(p.square().sum() for p in m.parameters()), 4 * LR)
    assert distance(model, end) <= NEAR


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_float32_model(dtype: torch.dtype | None, last: bool) -> None:
    """In its own type, and with a master copy in float64, which only the last rounding separates from the flow."""
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = GradientFlow(model.parameters(), lr=LR, dtype=dtype)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 4, last=last)
    assert_replayed(optimizer, 4 * LR)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # The first iteration with zero_grad last has a gradient in float32 only, where it does not move the end.
    near = NEAR32 if dtype is None else NEAR
    assert distance(model, flow_end(network(dtype=torch.float32), mse(x, y), 4 * LR)) <= near


def test_frozen_layers() -> None:
    """A layer that does not require gradients stays, whether the optimizer has it or not."""
    x, y = data()

    def build() -> nn.Sequential:
        model = network()
        model[0].requires_grad_(False)
        return model

    for parameters in (lambda m: m.parameters(), lambda m: m[2].parameters()):
        model = build()
        optimizer = GradientFlow(parameters(model), lr=LR)
        passes(optimizer, lambda model=model: F.mse_loss(model(x), y), 3)  # type: ignore[misc]
        assert_replayed(optimizer, 3 * LR)
        assert distance(model, flow_end(build(), mse(x, y), 3 * LR)) <= NEAR
        assert torch.equal(parameters_to_vector(model[0].parameters()), parameters_to_vector(network()[0].parameters()))


def test_a_layer_frozen_in_the_middle_of_training() -> None:
    """From then on the flow is that of the others."""
    x, y = data()
    model, twin = network(), network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 2)
    model[0].requires_grad_(False)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 2)
    assert_replayed(optimizer, 4 * LR)
    follow(twin.parameters(), slope(twin.parameters(), lambda: F.mse_loss(twin(x), y)), 2 * LR)
    follow(twin[2].parameters(), slope(twin[2].parameters(), lambda: F.mse_loss(twin(x), y)), 2 * LR)
    assert distance(model, twin) <= NEAR


class Recurrent(nn.Module):
    """A recurrent layer with a linear read-out of its last state."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(2, 3, batch_first=True, **settings)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(x)[0][:, -1])
        return out


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_models(kind: str) -> None:
    """Two layers, no dropout."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 2).double(), torch.randn(6, 1).double()
    start = Recurrent(kind, num_layers=2).double()
    model, optimizer = objective_end(copy.deepcopy(start), mse(x, y))
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(start, mse(x, y), 3 * LR)) <= NEAR


def test_batch_norm_in_training_mode() -> None:
    """The flow of the loss with batch statistics, with a warning; running statistics move once per step."""
    torch.manual_seed(0)
    x, y = data()
    start = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
    with pytest.warns(GradientFlowWarning, match="BatchNorm in training mode"):
        model, optimizer = objective_end(copy.deepcopy(start), mse(x, y))
    assert_replayed(optimizer, 3 * LR)
    assert int(model.get_buffer("1.num_batches_tracked")) == 3
    assert distance(model, flow_end(start, mse(x, y), 3 * LR)) <= NEAR


def test_no_grad_target_is_held_fixed() -> None:
    """A target computed from the parameters under no_grad is data within a step, with a warning."""
    x, _ = data()
    model, twin = network(), network()
    optimizer = GradientFlow(model.parameters(), lr=LR)

    def loss() -> Tensor:
        with torch.no_grad():
            target = 0.5 * model(x + 1)
        return F.mse_loss(model(x), target)

    with pytest.warns(GradientFlowWarning, match="held fixed within a step"):
        passes(optimizer, loss, 3)
    assert_replayed(optimizer, 3 * LR)
    for _ in range(3):
        fixed = 0.5 * twin(x + 1).detach()
        follow(twin.parameters(), slope(twin.parameters(), lambda f=fixed: F.mse_loss(twin(x), f)), LR)  # type: ignore[misc]
    assert distance(model, twin) <= NEAR


def test_detached_target_moves_with_theta() -> None:
    """A detached target is part of the pass: .grad is followed, which is not the gradient of the loss, with a warning."""
    x, _ = data()
    model, twin = network(), network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with pytest.warns(GradientFlowWarning, match="is not the gradient of the loss"):
        passes(optimizer, lambda: F.mse_loss(model(x), 0.5 * model(x + 1).detach()), 3)
    assert_replayed(optimizer, 3 * LR)
    semigradient = slope(twin.parameters(), lambda: F.mse_loss(twin(x), 0.5 * twin(x + 1).detach()))
    follow(twin.parameters(), semigradient, 3 * LR)
    assert distance(model, twin) <= NEAR


@pytest.mark.parametrize(
    "what",
    ["create_graph", "penalised input", "functional_call", "weight norm", "loss of loss"],
)
def test_unusual_losses(what: str) -> None:
    """Gradients within the loss, and parameters that are not what the layers compute with."""
    x, y = data()
    start: nn.Module = network()
    if what == "weight norm":
        nn.utils.parametrizations.weight_norm(start[0])  # type: ignore[index]

    def loss(model: nn.Module) -> Tensor:
        if what == "functional_call":
            halved = {name: 0.5 * p for name, p in model.named_parameters()}
            return mse(x, y)(lambda x: torch.func.functional_call(model, halved, (x,)))
        inner = F.mse_loss(model(x), y)
        if what == "create_graph":
            slopes = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
            return inner + 0.1 * sum(g.square().sum() for g in slopes)
        if what == "penalised input":
            points = x.clone().requires_grad_()
            (field,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
            return inner + 0.1 * (field.norm(dim=1) - 1).square().mean()
        return inner.exp() if what == "loss of loss" else inner

    model, optimizer = objective_end(copy.deepcopy(start), loss)
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(start, loss, 3 * LR)) <= NEAR


def test_a_loop_in_another_thread() -> None:
    """zero_grad to step in a thread of its own, the optimizer made elsewhere, another loop in this thread meanwhile."""
    x, y = data()
    models = [network(), network()]
    optimizers = [GradientFlow(m.parameters(), lr=LR) for m in models]
    turns = threading.Barrier(2, timeout=20)

    def loop(k: int) -> None:
        for _ in range(3):
            optimizers[k].zero_grad()
            turns.wait()
            loss = F.mse_loss(models[k](x), y)
            turns.wait()
            loss.backward()
            optimizers[k].step()

    thread = threading.Thread(target=loop, args=(1,))
    thread.start()
    loop(0)
    thread.join()
    end = flow_end(network(), mse(x, y), 3 * LR)
    for model, optimizer in zip(models, optimizers, strict=True):
        assert_replayed(optimizer, 3 * LR)
        assert distance(model, end) <= NEAR


# Numbers that are read out


@pytest.mark.parametrize("last", [False, True])
def test_loss_logged_before_backward(last: bool) -> None:
    """The first pass cannot know that the number is only logged: one gradient, silently; then it makes up for it."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    logged, engines = [], []

    def loss() -> Tensor:
        value = F.mse_loss(model(x), y)
        logged.append(value.item())
        return value

    for _ in range(5):
        passes(optimizer, loss, 1, last=last)
        engines.append(optimizer.stats.engine)
    n = 2 if last else 1
    assert engines[:n] == ["fallback"] * n and all(engine in RECORDED for engine in engines[n:])
    assert_replayed(optimizer, 5 * LR)
    assert len(set(logged)) == 5
    assert distance(model, flow_end(network(), mse(x, y), 5 * LR)) <= NEAR


def with_number(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss that is scaled by a number read out of it."""
    loss = F.mse_loss(model(x), y)
    return loss / (1.0 + loss.item())


def with_decision(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss whose weight is a matter of comparing values (both weights are met in turn)."""
    loss = F.mse_loss(model(x), y)
    weight = float(loss.detach() * 1e6 % 2)
    return (1 + weight) * loss


@pytest.mark.parametrize(("loss", "reason"), [(with_number, r"\.item\(\)"), (with_decision, r"float\(\)")])
def test_a_number_that_enters_the_loss(loss: Callable[[nn.Module, Tensor, Tensor], Tensor], reason: str) -> None:
    """Named, and never replayed with a frozen number."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named(f"reads a number.*{reason}"):
        for _ in range(6):
            passes(optimizer, lambda: loss(model, x, y), 1)
            assert_fell_back(optimizer, "reads a number out of a tensor that depends on the parameters")


# The fallback is on the right flow


def fallback_end(optimizer: GradientFlow, model: nn.Module, gradients: Callable[[nn.Module], Gradients]) -> float:
    """How far the accepted point lies from the flow at flow_time, relative to the way that the flow came."""
    optimizer.synchronize()
    twin = network()
    start = flat(twin)
    follow(twin.parameters(), gradients(twin), optimizer.flow_time)
    assert optimizer.flow_time > 0.05
    return float((flat(model) - flat(twin)).norm() / (flat(twin) - start).norm())


FALLEN = 1e-3


def clipped(model: nn.Module, loss: Callable[[nn.Module], Tensor], size: float) -> Gradients:
    """The gradient field that clip_grad_norm_ makes."""
    raw = slope(model.parameters(), lambda: loss(model))

    def field() -> list[Tensor]:
        gradients = raw()
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        return [g * min(1.0, size / (float(norm) + 1e-6)) for g in gradients]

    return field


@pytest.mark.parametrize("last", [False, True])
def test_gradient_clipping(last: bool) -> None:
    """Named, and the flow of the clipped field is followed."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("multiple of it .clipping"):
        for _ in range(200):
            if not last:
                optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            if last:
                optimizer.zero_grad()
    assert_fell_back(optimizer, "clipping")
    assert fallback_end(optimizer, model, lambda m: clipped(m, mse(x, y), 0.05)) <= FALLEN


def test_model_zero_grad() -> None:
    """The optimizer is not told: named, with the remedy, and on the flow."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("model.zero_grad.. does not tell the optimizer"):
        for _ in range(200):
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert_fell_back(optimizer, "optimizer.zero_grad() was not called")
    assert fallback_end(optimizer, model, lambda m: slope(m.parameters(), lambda: mse(x, y)(m))) <= FALLEN


def test_zero_grad_between_forward_and_backward() -> None:
    """As in torch's tutorials: named, with the remedy, and on the flow."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("call zero_grad.. before the forward pass"):
        for _ in range(200):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_fell_back(optimizer, "not computed from the parameters between zero_grad() and backward()")
    assert fallback_end(optimizer, model, lambda m: slope(m.parameters(), lambda: mse(x, y)(m))) <= FALLEN


def test_torch_autograd_backward() -> None:
    """Not seen: named, and on the flow."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("torch.autograd.backward is not seen"):
        for _ in range(200):
            optimizer.zero_grad()
            torch.autograd.backward(F.mse_loss(model(x), y))
            optimizer.step()
    assert_fell_back(optimizer, "no call of Tensor.backward was seen")
    assert fallback_end(optimizer, model, lambda m: slope(m.parameters(), lambda: mse(x, y)(m))) <= FALLEN


def test_a_second_loss_that_is_not_recorded() -> None:
    """Its gradient is in .grad, so that the record of the first does not pass for the whole."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("a second loss that was not recorded"):
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            torch.autograd.backward(0.1 * model(x).square().mean())
            optimizer.step()
    assert_fell_back(optimizer, "a second loss")

    def both(m: nn.Module) -> Gradients:
        return slope(m.parameters(), lambda: F.mse_loss(m(x), y) + 0.1 * m(x).square().mean())

    assert fallback_end(optimizer, model, both) <= FALLEN


def test_gradients_that_were_not_zeroed() -> None:
    """.grad that holds more than the pass that was recorded: named."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    F.mse_loss(model(x), y).backward()
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    for p, g in zip(model.parameters(), kept, strict=True):
        p.grad = g + 1
    with named("not that of the recorded loss"):
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def test_parameter_hook() -> None:
    """A hook that changes gradients: named, and the changed field is followed."""
    x, y = data()
    model = network()
    next(model.parameters()).register_hook(lambda g: 0.5 * g)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("a hook on a gradient"):
        passes(optimizer, lambda: F.mse_loss(model(x), y), 200)
    assert_fell_back(optimizer, "a hook on a gradient")

    def halved(m: nn.Module) -> Gradients:
        raw = slope(m.parameters(), lambda: mse(x, y)(m))
        return lambda: [0.5 * g if k == 0 else g for k, g in enumerate(raw())]

    assert fallback_end(optimizer, model, halved) <= FALLEN


class Through(torch.autograd.Function):
    """Rounds, and passes gradients through doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_custom_function_with_a_gradient_of_its_own() -> None:
    """A straight-through estimator as an autograd Function, not called through a torch function: named, and on its flow."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("custom autograd Function"):
        passes(optimizer, lambda: F.mse_loss(Through.apply(model(x)), y), 100)  # type: ignore[no-untyped-call]
    assert optimizer.stats.engine == "fallback"
    assert fallback_end(optimizer, model, lambda m: slope(m.parameters(), lambda: 2 * mse(x, y)(m))) <= FALLEN


def test_straight_through_by_detach() -> None:
    """x + (round(x) − x).detach(): the flow of .grad, warned of."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=1e-3)

    def loss(m: nn.Module) -> Tensor:
        out = m(x)
        return F.mse_loss(out + (0.1 * torch.sin(20 * out)).detach(), y)

    with pytest.warns(GradientFlowWarning, match="straight-through"):
        passes(optimizer, lambda: loss(model), 3)
    assert_replayed(optimizer, 3e-3)
    twin = network()
    follow(twin.parameters(), slope(twin.parameters(), lambda: loss(twin)), 3e-3)
    assert distance(model, twin) <= NEAR


def test_dropout() -> None:
    """Random at every pass: named, in a loop."""
    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Linear(5, 1)).double()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    start = F.mse_loss(model.eval()(x), y).item()
    model.train()
    with named("random numbers .dropout"):
        passes(optimizer, lambda: F.mse_loss(model(x), y), 100)
    assert_fell_back(optimizer, "dropout")
    assert F.mse_loss(model.eval()(x), y).item() < start
    passes(optimizer, lambda: F.mse_loss(model(x), y), 1)
    assert optimizer.stats.engine in RECORDED


def test_data_changed_between_backward_and_step() -> None:
    """A batch buffer that is filled again too early: named, never the flow of the new data's loss."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("written to in place"):
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            x += 0.1
            optimizer.step()
            assert_fell_back(optimizer, "written to in place")


def test_data_changed_between_steps_in_place() -> None:
    """One buffer, filled anew before each pass: a mini-batch like another."""
    x, y = data()
    buffer = torch.empty_like(x)
    pairs = [(x, y), (x + 0.5, y), (x - 0.5, y)]
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for values, _ in pairs:
        buffer.copy_(values)
        passes(optimizer, lambda: F.mse_loss(model(buffer), y), 1)
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, batch_flows(network(), pairs, [LR] * 3)) <= NEAR


def test_autocast_to_bfloat16() -> None:
    """Right to bfloat16's two digits, without a warning."""
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = GradientFlow(model.parameters(), lr=LR)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(model(x), y)

    passes(optimizer, loss, 4)
    assert_replayed(optimizer, 4 * LR)
    assert distance(model, flow_end(network(dtype=torch.float32), mse(x, y), 4 * LR)) <= 2e-2


@pytest.mark.parametrize("last", [False, True])
def test_grad_scaler(last: bool) -> None:
    """It unscales the gradients, not the loss that was recorded: named, and on the flow of the loss itself."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu")
    with named("multiple of it .clipping or scaling"):
        for _ in range(200):
            if not last:
                optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            if last:
                optimizer.zero_grad()
    assert_fell_back(optimizer, "scaling after backward")
    assert fallback_end(optimizer, model, lambda m: slope(m.parameters(), lambda: mse(x, y)(m))) <= FALLEN


def test_disabled_grad_scaler() -> None:
    """GradScaler(enabled=False), as scripts for GPUs have it on a CPU, changes nothing."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 3 * LR)) <= NEAR


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("model.zero_grad", "was not called between the last step and this forward pass"),
        ("dropout", "random numbers"),
        ("clipping", "clipping"),
        ("item", "reads a number"),
        ("between", "call zero_grad.. before the forward pass"),
    ],
)
@pytest.mark.parametrize("polish", [False, True])
def test_where_the_record_must_serve_its_failure_is_an_error(how: str, reason: str, polish: bool) -> None:
    """engine="replay", and NewtonPolish: a ClosureError that names the reason, and nothing moves."""
    x, y = data()
    model = network()
    optimizer = NewtonPolish(model.parameters()) if polish else GradientFlow(model.parameters(), lr=LR, engine="replay")
    before = flat(model)
    optimizer.zero_grad()
    if how == "model.zero_grad":
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        before = flat(model)
        model.zero_grad()
    out = F.dropout(model(x), 0.5, training=how == "dropout")
    loss = F.mse_loss(out, y)
    if how == "item":
        loss = loss / loss.item()
    if how == "between":
        optimizer.zero_grad()
    loss.backward()
    if how == "clipping":
        clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(ClosureError, match=reason):
        optimizer.step()
    assert torch.equal(flat(model), before)


# NewtonPolish in a plain loop


@pytest.mark.parametrize("last", [False, True])
def test_newton_polish(last: bool) -> None:
    """One pass converges; with zero_grad last the first step moves nothing, the second one converges."""
    x, y = data()
    model = network()
    start = flat(model)
    polish = NewtonPolish(model.parameters(), weight_decay=0.1)
    passes(polish, lambda: F.mse_loss(model(x), y), 1, last=last)
    if last:
        assert polish.result is None
        assert torch.equal(flat(model), start)
        passes(polish, lambda: F.mse_loss(model(x), y), 1, last=True)
    assert polish.result is not None
    assert polish.result.status == "converged"
    gradients = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    residual = torch.cat([(g + 0.1 * p).reshape(-1) for g, p in zip(gradients, model.parameters(), strict=True)])
    assert float(residual.detach().abs().max()) <= 2e-13


def test_flow_then_polish_in_one_loop() -> None:
    """GradientFlow for the way, NewtonPolish for the end, as any two optimizers in turn."""
    x, y = data()
    model = network()
    flow = GradientFlow(model.parameters(), lr=5.0, weight_decay=0.1)
    polish = NewtonPolish(model.parameters(), weight_decay=0.1)
    for k in range(6):
        optimizer = polish if k == 5 else flow
        passes(optimizer, lambda: F.mse_loss(model(x), y), 1)
    assert_replayed(flow, 25.0)
    assert polish.result is not None
    assert polish.result.status == "converged"


# Twelve loops that a stranger might write, each ending in the right flow or in a named refusal


def test_stranger_1_the_quickstart() -> None:
    """Loop 1: PyTorch's quickstart: train() with zero_grad last, loss.item() logged, test() under no_grad."""
    torch.manual_seed(0)
    inputs = torch.randn(24, 4)
    labels = (inputs.sum(1) > 0).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 2))
    start = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    times: list[float] = []

    def train() -> None:
        model.train()
        for batch, (x, y) in enumerate(loader):
            before = optimizer.flow_time
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch % 2 == 0:
                print(f"loss: {loss.item():>7f}")
            times.append(optimizer.flow_time - before)

    def test() -> float:
        model.eval()
        correct = 0.0
        with torch.no_grad():
            for x, y in loader:
                correct += (model(x).argmax(1) == y).type(torch.float).sum().item()
        return correct / len(inputs)

    accuracy = 0.0
    for _ in range(3):
        train()
        accuracy = test()
    assert optimizer.stats.engine in RECORDED
    assert accuracy > 0.5
    # The first batch has no record and gets a first, short step, whose end the second batch's step starts from.
    assert times[1] == pytest.approx(LR, abs=LR * 0.1)
    twin = copy.deepcopy(start).double()
    pairs = list(zip(inputs.double().split(8), labels.split(8), strict=True)) * 3
    for (x, y), time in zip(pairs, [optimizer.flow_time - 8 * LR] + [LR] * 8, strict=True):
        follow(twin.parameters(), slope(twin.parameters(), lambda x=x, y=y: loss_fn(twin(x), y)), time)  # type: ignore[misc]
    assert distance(model, twin) <= NEAR32


def test_stranger_2_learning_pytorch_with_examples() -> None:
    """Loop 2: the sine fitted by a cubic, with zero_grad between forward and backward: named, and on the flow."""
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    y = torch.sin(3 * x)
    xx = x.unsqueeze(-1).pow(torch.tensor([1, 2, 3]))

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0, 1)).double()

    model = build()
    loss_fn = nn.MSELoss(reduction="sum")
    optimizer = GradientFlow(model.parameters(), lr=1e-1)
    with named("call zero_grad.. before the forward pass"):
        for t in range(300):
            loss = loss_fn(model(xx), y)
            if t % 100 == 99:
                print(t, loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_fell_back(optimizer, "before the forward pass")
    optimizer.synchronize()
    assert optimizer.flow_time > 0.1
    assert distance(model, flow_end(build(), lambda m: loss_fn(m(xx), y), optimizer.flow_time)) <= 1e-4


class Regression(nn.Module):
    """What a stranger calls Net."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        out: Tensor = self.fc2(torch.sigmoid(self.fc1(x)))
        return out


def test_stranger_3_regularisation_over_named_parameters() -> None:
    """Loop 3: a custom forward, a penalty summed over the weights by name, running loss collected after the step."""
    x, y = data()
    torch.manual_seed(0)
    net = Regression().double()
    start = copy.deepcopy(net)
    criterion = nn.MSELoss()
    optimizer = GradientFlow(net.parameters(), lr=LR)
    running_loss = 0.0
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        reg: Any = 0.0
        for name, param in net.named_parameters():
            if "weight" in name:
                reg = reg + torch.sqrt(param.pow(2) + 0.01).sum() + torch.norm(param, 2)
        loss = loss + 0.01 * reg
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    assert running_loss > 0
    assert_replayed(optimizer, 5 * LR)

    def regularised(m: nn.Module) -> Tensor:
        weights = [p for name, p in m.named_parameters() if name.endswith("weight")]
        return F.mse_loss(m(x), y) + 0.01 * sum((p * p + 0.01).sqrt().sum() + (p * p).sum().sqrt() for p in weights)

    assert distance(net, flow_end(start, regularised, 5 * LR)) <= NEAR


def test_stranger_4_shuffled_epochs_and_a_schedule() -> None:
    """Loop 4: epochs, DataLoader(shuffle=True), zero_grad first, StepLR per epoch, tqdm-like averages with .item()."""
    inputs, targets = data(16)
    model = network()
    generator = torch.Generator().manual_seed(3)
    seen: list[tuple[Tensor, Tensor]] = []
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True, generator=generator)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    times = []
    for _ in range(3):
        epoch_loss = 0.0
        for xb, yb in loader:
            optimizer.zero_grad(set_to_none=True)
            loss = F.mse_loss(model(xb), yb)
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item() * xb.size(0)
            seen.append((xb, yb))
            times.append(float(scheduler.get_last_lr()[0]))
        scheduler.step()
    assert optimizer.stats.engine in RECORDED
    assert times == pytest.approx([LR] * 4 + [LR / 2] * 4 + [LR / 4] * 4)
    assert distance(model, batch_flows(network(), seen, times)) <= NEAR


def test_stranger_5_early_stopping() -> None:
    """Loop 5: the best state_dict is kept by deepcopy, validation between steps, the best one loaded, training goes on."""
    x, y = data()
    x_val, y_val = data(seed=2)
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    best, best_state, best_at = float("inf"), model.state_dict(), -1
    for epoch in range(6):
        model.train()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            val = F.mse_loss(model(x_val), y_val).item()
        if val < best:
            best, best_at = val, epoch
            best_state = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    assert_replayed(optimizer, 6 * LR)
    assert best_at >= 0
    end = flow_end(network(), mse(x, y), (best_at + 1) * LR)
    assert distance(model, end) <= NEAR
    # From there once more: a new start of the integrator at the point that was loaded.
    passes(optimizer, lambda: F.mse_loss(model(x), y), 2)
    assert optimizer.stats.engine in RECORDED
    assert distance(model, flow_end(network(), mse(x, y), (best_at + 3) * LR)) <= NEAR


def test_stranger_6_gradient_accumulation() -> None:
    """Loop 6: loss / 4 and `if (i + 1) % 4 == 0: step(); zero_grad()`: the mean of each four batches is followed."""
    x, y = data(32)
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    accumulation_steps = 4
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    optimizer.zero_grad()
    for _ in range(2):
        for i, (xb, yb) in enumerate(loader):
            loss = F.mse_loss(model(xb), yb) / accumulation_steps
            loss.backward()
            if (i + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert_replayed(optimizer, 4 * LR)
    pairs = [(x[:16], y[:16]), (x[16:], y[16:])] * 2
    assert distance(model, batch_flows(network(), pairs, [LR] * 4)) <= NEAR


def test_stranger_7_clip_grad_norm() -> None:
    """Loop 7: clip_grad_norm_ that clips at first and not later: named while it clips, the flow of the clipped field."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    engines = []
    with named("clipping"):
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.7)
            optimizer.step()
            engines.append(optimizer.stats.engine)
            if optimizer.flow_time > 3.0:
                break
    assert engines[0] == "fallback"
    assert engines[-1] in RECORDED
    optimizer.synchronize()
    twin = network()
    follow(twin.parameters(), clipped(twin, mse(x, y), 0.7), optimizer.flow_time)
    assert distance(model, twin) <= 1e-3


def test_stranger_8_mixed_precision() -> None:
    """Loop 8: autocast and GradScaler, set_to_none=True, unscale_ and clipping: named, the loss goes down.

    Gradients with three digits are rougher than the tolerance: that takes corrections, a call each.
    """
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    with named("scaling after backward"):
        for _ in range(120):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
                loss = F.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert_fell_back(optimizer, "scaling")
    assert losses[-1] < 0.9 * losses[0]


def test_stranger_9_dcgan() -> None:
    """Loop 9: the DCGAN tutorial's order: two backward calls for D, one pass of G for both, optimizers' zero_grad.

    D is replayed; G's fakes were generated before its zero_grad, which is named.
    """
    generator, discriminator, real, noise = gan()
    criterion = nn.BCEWithLogitsLoss()
    opt_d = GradientFlow(discriminator.parameters(), lr=LR)
    opt_g = GradientFlow(generator.parameters(), lr=LR)
    start_g, start_d = flat(generator), copy.deepcopy(discriminator)
    first_d, first_fake = flat(discriminator), real
    with named("call zero_grad.. before the forward pass"):
        for k in range(4):
            opt_d.zero_grad()
            label = torch.full((len(real), 1), 1.0, dtype=torch.float64)
            criterion(discriminator(real), label).backward()
            fake = generator(noise)
            label = torch.full((len(real), 1), 0.0, dtype=torch.float64)
            criterion(discriminator(fake.detach()), label).backward()
            opt_d.step()
            if k == 0:
                first_d, first_fake = flat(discriminator), fake.detach()
            opt_g.zero_grad()
            label = torch.full((len(real), 1), 1.0, dtype=torch.float64)
            criterion(discriminator(fake), label).backward()
            opt_g.step()
    assert_replayed(opt_d, 4 * LR)
    assert_fell_back(opt_g, "call zero_grad() before the forward pass")
    assert not torch.equal(flat(generator), start_g)
    judged = lambda m: F.softplus(-m(real)).mean() + F.softplus(m(first_fake)).mean()  # noqa: E731
    assert distance(first_d, flow_end(start_d, judged, LR)) <= NEAR


def test_stranger_10_teacher_with_an_average_of_the_student() -> None:
    """Loop 10: mean teacher: a copy that follows as a moving average and gives targets under no_grad."""
    x, y = data()
    student = network()
    teacher = copy.deepcopy(student)
    for p in teacher.parameters():
        p.requires_grad_(False)
    optimizer = GradientFlow(student.parameters(), lr=LR)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x + 0.1)
        out = student(x)
        loss = F.mse_loss(out, y) + 0.5 * F.mse_loss(out, target)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for pt, ps in zip(teacher.parameters(), student.parameters(), strict=True):
                pt.mul_(0.9).add_(ps, alpha=0.1)
    assert_replayed(optimizer, 4 * LR)
    twin, slow = network(), network()
    for _ in range(4):
        aim = slow(x + 0.1).detach()
        loss_fn = lambda aim=aim: F.mse_loss(twin(x), y) + 0.5 * F.mse_loss(twin(x), aim)  # type: ignore[misc]  # noqa: E731
        follow(twin.parameters(), slope(twin.parameters(), loss_fn), LR)
        mixed = 0.9 * parameters_to_vector(slow.parameters()) + 0.1 * parameters_to_vector(twin.parameters())
        vector_to_parameters(mixed.detach(), slow.parameters())
    assert distance(student, twin) <= NEAR
    assert distance(teacher, slow) <= NEAR


def test_stranger_11_physics_informed() -> None:
    """Loop 11: u' = −u with u(0) = 1 by a network whose derivative is taken with create_graph=True at points made once."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64).view(-1, 1).requires_grad_(True)
    t0 = torch.zeros(1, 1, dtype=torch.float64)
    model = network(n_inputs=1)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for epoch in range(4):
        optimizer.zero_grad()
        u = model(t)
        u_t = torch.autograd.grad(u, t, grad_outputs=torch.ones_like(u), create_graph=True)[0]
        loss_physics = torch.mean((u_t + u) ** 2)
        loss_start = torch.mean((model(t0) - 1) ** 2)
        loss = loss_physics + loss_start
        loss.backward()
        optimizer.step()
        if epoch % 2 == 0:
            print(epoch, loss.item(), loss_physics.item())
    assert_replayed(optimizer, 4 * LR)

    def residual(m: nn.Module) -> Tensor:
        # The derivative written out: u = a·tanh(w t + b) + c, u' = a·(1 − tanh²) w.
        (w, b), (a, c) = m[0].parameters(), m[2].parameters()  # type: ignore[index]
        h = torch.tanh(t.detach() @ w.T + b)
        u, u_t = h @ a.T + c, (1 - h * h) @ (a * w.T).T
        return (u_t + u).square().mean() + (torch.tanh(b) @ a.T + c - 1).square().mean()

    assert distance(model, flow_end(network(n_inputs=1), residual, 4 * LR)) <= NEAR


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's weights, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 2)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


def test_stranger_12_tied_autoencoder_with_logged_gradient_norms() -> None:
    """Loop 12: a tied, weight-normed autoencoder in train(), which logs gradient norms between backward and step."""
    x = data(n_inputs=4)[0]
    torch.manual_seed(0)
    model = TiedAutoencoder().double()
    start = copy.deepcopy(model)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    history: list[dict[str, float]] = []

    def train(n_epochs: int) -> None:
        for _ in range(n_epochs):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), x)
            loss.backward()
            norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
            total = torch.sqrt(sum(p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None)).item()  # type: ignore[arg-type]
            weights = sum(p.norm().item() for p in model.parameters())
            history.append({**norms, "total": total, "weights": weights, "loss": loss.item()})
            optimizer.step()

    train(4)
    assert_replayed(optimizer, 4 * LR)
    assert len({entry["total"] for entry in history}) == 4
    assert distance(model, flow_end(start, lambda m: F.mse_loss(m(x), x), 4 * LR)) <= NEAR


# What the README and the example say


def test_the_loops_of_the_example_differ_in_the_line_of_the_optimizer_only() -> None:
    """``examples/plain_loop.py``."""
    source = (Path(__file__).parents[1] / "examples" / "plain_loop.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    bodies = [
        [ast.unparse(part) for part in ast.walk(functions[f"train_with_{name}"]) if isinstance(part, ast.stmt)][2:]
        for name in ("adam", "gradient_flow")
    ]
    different = [pair for pair in zip(*bodies, strict=True) if pair[0] != pair[1]]
    assert different == [
        (
            "optimizer = torch.optim.Adam(model.parameters(), lr=0.01)",
            "optimizer = GradientFlow(model.parameters(), lr=LR)",
        )
    ]


@pytest.mark.parametrize("fallback", ["bdf-secant", "adams-bashforth"])
def test_error_of_the_fallback_follows_the_tolerance(fallback: Any) -> None:
    """rtol a hundred times smaller: an error some thirty times smaller, as for any method of order 3 (100^(3/4) = 32)."""
    x, y = data()
    errors = []
    for rtol in (1e-4, 1e-6, 1e-8):
        model = network()
        optimizer = GradientFlow(model.parameters(), lr=10.0, rtol=rtol, record=False, fallback=fallback)
        while optimizer.flow_time < 3.0:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        optimizer.synchronize()
        assert optimizer.stats.engine == "fallback" and optimizer.stats.method == fallback
        errors.append(distance(model, flow_end(network(), mse(x, y), optimizer.flow_time)))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-6


def test_a_stiff_flow_is_followed_by_one_gradient_per_call() -> None:
    """Against Radau on derivatives in numpy: to t = 300 (stability would keep explicit steps below 0.1: thousands of calls).

    In all calls the parameters are close to the trajectory: at predicted points, or at nearly converged ones.
    """
    model, x, y = teacher_student(1, n_samples=100)
    problem = NumpyPerceptron(x, y, 8)
    true = solve_ivp(
        lambda t, theta: -problem.loss_and_gradient(theta)[1],
        (0.0, 1e4),
        flat(model).numpy(),
        method="Radau",
        rtol=1e-9,
        atol=1e-11,
        dense_output=True,
    ).sol
    optimizer = GradientFlow(model.parameters(), lr=1e9, rtol=1e-6, record=False)
    n_calls, worst = 0, 0.0
    while optimizer.flow_time < 300 and n_calls < 600:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        n_calls += 1
        near = np.linspace(0.5 * optimizer.flow_time, 1.5 * optimizer.flow_time + 1e-3, 300)
        distances = np.linalg.norm(true(near).T - flat(model).numpy(), axis=1) / np.linalg.norm(true(near), axis=0)
        worst = max(worst, float(distances.min()))
    assert optimizer.stats.method == "bdf-secant"
    assert n_calls < 500
    assert worst < 1e-2
    optimizer.synchronize()
    end = torch.from_numpy(true(optimizer.flow_time))
    assert distance(model, end) < 3e-5


def test_many_parameters_fall_back_to_the_method_that_keeps_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    monkeypatch.setattr(stepwise, "MOST_PARAMETERS", 3)
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR, record=False)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 3)
    assert optimizer.stats.method == "adams-bashforth"


def test_fallback_must_be_known() -> None:
    with pytest.raises(ValueError, match="fallback must be one of 'auto', 'bdf-secant', 'adams-bashforth', not 'euler'"):
        GradientFlow(network().parameters(), fallback="euler")  # type: ignore[arg-type]


def test_a_step_of_the_fallback_that_is_too_long_is_rejected_and_recovered() -> None:
    """The loss turns steep in the middle of training: one rejection, and the flow of the new loss from there."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=10.0, record=False)

    def run(n: int, factor: float) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            (factor * F.mse_loss(model(x), y)).backward()
            optimizer.step()

    run(40, 1.0)
    middle, copied = copy.deepcopy((model, optimizer))
    copied.synchronize()
    t, before = optimizer.flow_time, optimizer.stats.n_rejected
    run(60, 1e4)
    optimizer.synchronize()
    assert optimizer.stats.n_rejected > before
    lasted = optimizer.flow_time - t
    assert lasted > 0
    end = flow_end(middle, lambda m: 1e4 * mse(x, y)(m), lasted)
    assert distance(model, end) <= 1e-3


def test_a_pass_that_cannot_be_recorded_goes_on() -> None:
    """Arguments of a kind that nobody foresaw: the loop is not disturbed, the reason is named."""

    class Size(NamedTuple):
        n: int
        m: int

    class Sealed(Size):
        def __new__(cls, n: int, m: int) -> Self:
            if inspect.stack()[1].function == "map_leaves":
                raise ValueError("not to be copied")
            return super().__new__(cls, n, m)

    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)

    def forward() -> Tensor:
        out = model(x)
        return F.mse_loss(out.reshape(Sealed(out.shape[0], 1)), y)

    with named("could not be recorded .ValueError: not to be copied"):
        passes(optimizer, forward, 5)
    assert_fell_back(optimizer, "could not be recorded")


# What a review found to be wrong in silence


def numbers_as_weights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Sample weights made from numbers that were read out of the residuals."""
    errors = F.mse_loss(model(x), y, reduction="none")[:, 0]
    weights = torch.tensor([e.item() for e in errors.detach()], dtype=x.dtype)
    return (weights * errors).sum() / weights.sum()


def hard_examples(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Trains on the samples with the largest errors, found by sorting numbers."""
    errors = F.mse_loss(model(x), y, reduction="none")[:, 0]
    worst = sorted(range(len(x)), key=lambda i: -errors[i].item())[:4]
    return F.mse_loss(model(x[worst]), y[worst])


@pytest.mark.parametrize("loss", [numbers_as_weights, hard_examples])
def test_tensors_made_of_numbers_that_were_read(loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    """They would be constants that are none: named, at every step."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with pytest.warns(GradientFlowWarning, match="reads a number"):
        passes(optimizer, lambda: loss(model, x, y), 4)
    assert optimizer.stats.engine == "fallback" and optimizer.stats.n_accepted <= 4


@pytest.mark.parametrize("where", ["no_grad", "grad"])
def test_a_decision_that_changes_is_told_at_the_next_pass(where: str) -> None:
    """It came out equal in two passes, and changed within the step that trusted it."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=0.02)
    start = F.mse_loss(model(x), y).item()

    def loss() -> Tensor:
        value = F.mse_loss(model(x), y)
        with torch.no_grad() if where == "no_grad" else nullcontext():
            large = bool(value > 0.8 * start)
        return value if large else 0.1 * value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradientFlowWarning)
        passes(optimizer, loss, 100)
    assert "changed from one pass to the next" in str(caught[0].message)
    # Numbers that autograd might have followed are never trusted again; those under no_grad are fixed on purpose.
    assert optimizer.stats.engine in (RECORDED if where == "no_grad" else ("fallback",))


def test_parameters_that_share_memory_are_refused() -> None:
    """A way to tie weights that would make two parameters of the same numbers; also after the optimizer was made."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    x, _ = data()
    model[1].weight.data = model[0].weight.data.t()
    optimizer.zero_grad()
    F.mse_loss(model(x), x).backward()
    before = flat(model)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(before, flat(model))
    with pytest.raises(ValueError, match="share memory"):
        GradientFlow(model.parameters(), lr=LR)
    views = [nn.Parameter(part) for part in torch.zeros(6).split(2)]
    GradientFlow(views, lr=LR)


@pytest.mark.parametrize("what", ["masked", "decayed", "clipped, out of reach"])
def test_small_gradients_that_were_changed_after_backward(what: str) -> None:
    """Far below the largest component, and in float32; what changes nothing is no reason."""
    torch.manual_seed(0)
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
    optimizer = GradientFlow(model.parameters(), lr=LR)
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    if what == "masked":
        for p in model[0].parameters():
            p.grad.zero_()
    elif what == "decayed":
        for p in model[2].parameters():
            p.grad.add_(p.detach(), alpha=1e-3)
    else:
        clip_grad_norm_(model.parameters(), 1e6)
    with nullcontext() if "reach" in what else named("changed after backward"):
        optimizer.step()
    assert optimizer.stats.engine in (RECORDED if "reach" in what else ("fallback",))


class Branch(nn.Module):
    """A network with a branch that starts with the factor zero, so that its gradient says nothing of what is in it."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)
        self.factor = nn.Parameter(torch.zeros(()))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.second(h + self.factor * self.inner(h))
        return out


def through_numpy(h: Tensor) -> Tensor:
    """A function with a gradient that is not made of torch functions."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return torch.from_numpy(np.sin(h.detach().numpy()))

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.cos(ctx.saved_tensors[0])

    found: Tensor = Sine.apply(h)  # type: ignore[no-untyped-call]
    return found


def in_another_thread(h: Tensor) -> Tensor:
    """The same from a pool."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.sin, h).result()


@pytest.mark.parametrize("inner", [through_numpy, in_another_thread])
def test_hidden_branches_whose_gradient_is_zero(inner: Callable[[Tensor], Tensor]) -> None:
    """The comparison at the start cannot see them; what is not seen is noticed by the graph."""
    x, y = data()
    torch.manual_seed(0)
    model = Branch(inner).double()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("that is not seen"):
        passes(optimizer, lambda: F.mse_loss(model(x), y), 2)
    assert_fell_back(optimizer, "that is not seen")


def test_backward_of_a_vector() -> None:
    """``backward(gradient=...)`` of more than one element, again and again."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        losses = (model(x) - y).square().flatten()
        losses.backward(torch.full_like(losses, 1 / len(losses)))  # type: ignore[no-untyped-call]
        optimizer.step()
    assert_replayed(optimizer, 3 * LR)
    assert distance(model, flow_end(network(), mse(x, y), 3 * LR)) <= NEAR


def test_a_number_read_in_compiled_code() -> None:
    """Goes on, by name."""
    torch.compiler.reset()
    x, y = data()
    model = network()
    compiled = torch.compile(lambda a: a * min(2.0, a.item() + 1), backend="eager")
    optimizer = GradientFlow(model.parameters(), lr=LR)
    with named("in compiled code"):
        passes(optimizer, lambda: compiled(F.mse_loss(model(x), y)), 3)
    assert_fell_back(optimizer, "in compiled code")


def test_a_factorisation_that_fails_at_a_trial_point() -> None:
    """The step is tried again, shorter; the covariance that has none is never reached."""
    torch.manual_seed(0)
    x = torch.randn(3, 20, dtype=torch.float64)
    covariance = nn.Parameter(torch.eye(3, dtype=torch.float64) * 0.05)
    optimizer = GradientFlow([covariance], lr=1e-3)

    def loss() -> Tensor:
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, x, upper=False)
        return 0.5 * white.square().mean(1).sum() + factor.diagonal().log().sum()

    values = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert torch.isfinite(covariance).all()


def test_another_optimizer_goes_on_after_zero_grad() -> None:
    """Nothing more is kept of passes at parameters that are left behind."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    passes(optimizer, lambda: F.mse_loss(model(x), y), 2, last=True)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(50):
        F.mse_loss(model(x), y).backward()
        adam.step()
        adam.zero_grad()
    recording = optimizer._loop.recording
    assert recording is not None and recording.paused and not recording._calls
    with named("are written to in place after"):
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def test_weights_clamped_before_the_pass() -> None:
    """``p.data.clamp_()`` right after ``zero_grad()`` does not matter."""
    x, y = data()
    model = network()
    optimizer = GradientFlow(model.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        for p in model.parameters():
            p.data.clamp_(-10, 10)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert_replayed(optimizer, 3 * LR)
