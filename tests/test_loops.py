"""step() without a closure, in loops as people write them: each follows the right flow, or says by name why it cannot.

What is right is told by scipy's DOP853 on gradients that ``torch.autograd.grad`` gives, in float64, without torch_gradflow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import flat, make_closure
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import GradientFlow, GradientFlowWarning, ModuleObjective, NewtonPolish, integrate

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


def mse(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
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
    assert optimizer.stats.engine == "replay", optimizer.stats.engine_reason
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
        loss().backward()  # type: ignore[no-untyped-call]
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
    assert float(returned) == float(loss)
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
    assert optimizer.stats.engine == "replay"
    assert distance(model, batch_flows(network(), batches(), [short, LR, LR, LR])) <= NEAR


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
    assert optimizer.stats.engine == "replay"
    assert distance(model, flow_end(network(), mse(x, y), sum(lengths))) <= NEAR


# torch.compile, modes, threads


def printing(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward pass in two compiled parts: print breaks the graph."""

    def forward(x: Tensor) -> Tensor:
        hidden = model[1](model[0](x))  # type: ignore[operator, index]
        print("in the middle")
        out: Tensor = model[2](hidden)  # type: ignore[operator, index]
        return out

    return forward


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"backend": "eager"}, id="eager"),
        pytest.param({"backend": "eager", "fullgraph": True}, id="eager, fullgraph"),
        pytest.param({"backend": "aot_eager"}, id="aot_eager"),
        pytest.param({}, id="inductor", marks=pytest.mark.slow),
        pytest.param({"fullgraph": True}, id="inductor, fullgraph", marks=pytest.mark.slow),
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


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
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
    assert torch.overrides._get_current_function_mode_stack() == [] or last  # type: ignore[attr-defined]


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
