"""A recorded forward pass, replayed at other parameters, against the closure itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from opening import called_at, closure_of, distance, elsewhere, trainable, vector
from torch import Tensor, nn
from torch.nn import functional as F

from torch_gradflow.objectives.program import Program
from torch_gradflow.objectives.record import Recorder, Recording

Closure = Callable[[], Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def record(closure: Closure, parameters: Sequence[Tensor]) -> Program:
    """The program of a closure about which the recorder has no doubts."""
    recording = Recording(parameters)
    with Recorder([recording]):
        returned = closure()
    program = recording.program(returned)
    assert recording.doubts == []
    assert program is not None
    return program


def replay(program: Program, parameters: Sequence[Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the program at θ, by ordinary autograd."""
    parts = theta.split([p.numel() for p in parameters])
    values = [part.reshape(p.shape).to(p.dtype).requires_grad_() for part, p in zip(parts, parameters, strict=True)]
    loss = program.evaluate(values)
    gradients = torch.autograd.grad(loss, values, allow_unused=True)
    return loss.detach().to(theta.dtype), vector(gradients, parameters, theta.dtype)


def assert_replays(closure: Closure, parameters: Sequence[Tensor], *, rtol: float = 1e-14) -> Program:
    """The program is the closure, at the start and elsewhere."""
    start = vector(parameters, parameters, torch.float64)
    program = record(closure, parameters)
    for theta in (start, elsewhere(start, 0.3)):
        loss, gradient = replay(program, parameters, theta)
        wanted_loss, wanted_gradient = called_at(closure, parameters, theta)
        assert distance(loss, wanted_loss) <= rtol
        assert distance(gradient, wanted_gradient) <= rtol
    return program


class Net:
    """A small float64 network with data, whose loss is computed by one of many programs."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.x = torch.randn(10, 4, dtype=torch.float64)
        self.y = torch.randn(10, 3, dtype=torch.float64)
        self.index = torch.arange(10) % 3

    @property
    def parameters(self) -> list[nn.Parameter]:
        return trainable(self.model)

    def hidden(self) -> Tensor:
        return self.model[0](self.x)


def mean_square(values: Tensor) -> Tensor:
    return values.pow(2).mean()


def add_in_place(net: Net) -> Tensor:
    h = net.hidden()
    h += torch.sin(net.x).sum(1, keepdim=True)
    h *= 2.0
    return F.mse_loss(net.model[2](h), net.y)


def set_a_column(net: Net) -> Tensor:
    h = net.model[1](net.hidden()).clone()
    h[:, 0] = 0
    h[1:3, 2] = 2 * h[4:6, 3]
    return F.mse_loss(net.model[2](h), net.y)


def rectify_in_place(net: Net) -> Tensor:
    return F.mse_loss(net.model[2](net.hidden().relu_()), net.y)


def write_through_a_view(net: Net) -> Tensor:
    h = net.model[1](net.hidden()).clone()
    h.view(-1)[3:9].mul_(3.0)
    first, _ = h.chunk(2, dim=1)
    return mean_square(h) + first.sum()


def assemble(net: Net) -> Tensor:
    parts = [net.model(x) for x in net.x.split(3)]
    return F.mse_loss(torch.cat(parts), net.y) + mean_square(torch.stack(parts[:3]))


def index_with_tensors(net: Net) -> Tensor:
    z = net.model(net.x)
    return -F.log_softmax(z, dim=1)[torch.arange(10), net.index].mean() + z[net.index > 0].sum() + z[..., None, 0:2].mean()


def sort_and_pick(net: Net) -> Tensor:
    z = net.model(net.x)
    largest, where = torch.max(z, dim=1)
    values, _ = z.sort(dim=0)
    top = z.topk(2, dim=1)
    return mean_square(largest) + values[0].sum() + top.values.mean() + net.y.gather(1, where[:, None]).mean() * largest.mean()


def einstein(net: Net) -> Tensor:
    return mean_square(torch.einsum("bi,oi->bo", net.hidden(), net.model[2].weight) + net.model[2].bias - net.y)


def views(net: Net) -> Tensor:
    z = net.model(net.x)
    return z.view(5, 6).T.reshape(3, 10).unflatten(1, (2, 5)).transpose(0, 2).flatten().unsqueeze(0).expand(2, -1).pow(2).sum()


def tuples(net: Net) -> Tensor:
    a, b, c = net.model(net.x).unbind(1)
    variance, mean = torch.var_mean(torch.stack((a, b), 1), dim=0)
    return (a * b).sum() + c.square().mean() + variance.sum() * mean.sum()


def detached(net: Net) -> Tensor:
    z = net.model(net.x)
    return F.mse_loss(z, net.y) * z.detach().abs().mean()


def data_attribute(net: Net) -> Tensor:
    z = net.model(net.x)
    return F.mse_loss(z, net.y) * z.data.abs().mean()


def target_without_gradient(net: Net) -> Tensor:
    with torch.no_grad():
        target = torch.tanh(net.model(net.x.flip(0))) + 0.5
    return F.mse_loss(net.model(net.x), target)


def gradient_switched_by_function(net: Net) -> Tensor:
    torch.set_grad_enabled(False)
    target = net.model(net.x.flip(0))
    torch.set_grad_enabled(True)
    return F.mse_loss(net.model(net.x), target)


def gradient_penalty(net: Net) -> Tensor:
    x = net.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net.model(x).sum(), x, create_graph=True)
    return F.mse_loss(net.model(net.x), net.y) + (slope.norm(dim=1) - 1).pow(2).mean()


def penalty_on_the_gradient(net: Net) -> Tensor:
    loss = F.mse_loss(net.model(net.x), net.y)
    slopes = torch.autograd.grad(loss, net.parameters, create_graph=True)
    return loss + sum(s.pow(2).sum() for s in slopes)


def arithmetic_of_python(net: Net) -> Tensor:
    z = net.model(net.x)
    return (1.0 - z).abs().sum() / z.shape[0] + 2.0 ** z[0, 0] + (-z).max() + len(z) * abs(z[1, 1]) - z.numel()


def operators(net: Net) -> Tensor:
    z = net.model(net.x)
    w = (z @ z.T).softmax(-1)
    return torch.where(z > 0, z, 0.1 * z).sum() + w.logsumexp(1).mean() + torch.linalg.norm(w) + w.trace() + z.cumsum(0).std()


def parametrised(net: Net) -> Tensor:
    weight = net.model[0].weight / net.model[0].weight.norm(dim=1, keepdim=True)
    return F.mse_loss(net.model[2](torch.tanh(F.linear(net.x, weight, net.model[0].bias))), net.y)


def recurrence(net: Net) -> Tensor:
    h = net.x.new_zeros(10, 6)
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(3):
        h = torch.tanh(h + net.hidden())
        total = total + mean_square(net.model[2](h) - net.y)
    return total


def accumulated_in_place(net: Net) -> Tensor:
    total = mean_square(net.model(net.x))
    for p in net.parameters:
        total += 0.1 * p.abs().sum()
    return total


LOSSES = [
    *(add_in_place, set_a_column, rectify_in_place, write_through_a_view, assemble, accumulated_in_place),
    *(index_with_tensors, sort_and_pick, einstein, views, tuples, detached, data_attribute, target_without_gradient),
    *(gradient_switched_by_function, gradient_penalty, penalty_on_the_gradient, arithmetic_of_python, operators),
    *(parametrised, recurrence),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_replay_is_the_closure(loss: Callable[[Net], Tensor]) -> None:
    """Loss and gradient, to rounding, at other parameters than those of the recording."""
    net = Net()
    assert_replays(closure_of(net.parameters, lambda: loss(net)), net.parameters)


@pytest.mark.parametrize("loss", LOSSES)
def test_replay_can_be_transformed(loss: Callable[[Net], Tensor]) -> None:
    """``torch.func.grad`` of a replay is its gradient, or it is refused with an error, never something else."""
    net = Net()
    closure = closure_of(net.parameters, lambda: loss(net))
    program = record(closure, net.parameters)
    start = vector(net.parameters, net.parameters, torch.float64)
    wanted = called_at(closure, net.parameters, start)[1]
    try:
        gradients = torch.func.grad(program.evaluate)(tuple(p.detach() for p in net.parameters))
    except RuntimeError:
        assert loss in {gradient_penalty, penalty_on_the_gradient}
    else:
        assert distance(vector(gradients, net.parameters, torch.float64), wanted) <= 1e-12


def test_values_made_in_the_closure_from_data_are_constants() -> None:
    """Weights computed from data, masks, and targets made anew at each call."""
    net = Net()

    def loss() -> Tensor:
        weights = torch.softmax(net.x.sum(1), 0)
        mask = (net.y > 0).double()
        mask[0] = 1.0
        return (weights[:, None] * mask * (net.model(net.x) - net.y) ** 2).sum()

    assert_replays(closure_of(net.parameters, loss), net.parameters)


@pytest.mark.parametrize("made", ["in the closure", "before"])
def test_writing_results_into_a_tensor_made_without_them_is_doubted(made: str) -> None:
    """A replay would have to write into the caller's tensor, or into the one that a former call made."""
    net = Net()
    buffer = torch.zeros(10, 3, dtype=torch.float64)

    def loss() -> Tensor:
        out = torch.zeros(10, 3, dtype=torch.float64) if made == "in the closure" else buffer.detach()
        out[:] = net.model(net.x) if made == "in the closure" else net.model(net.x).detach()
        return mean_square(net.model(net.x) - 0.5 * out)

    recording = Recording(net.parameters)
    with Recorder([recording]):
        returned = closure_of(net.parameters, loss)()
    recording.program(returned)
    assert "it writes values that depend on the parameters into a tensor that was made without them" in recording.doubts


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_is_part_of_a_call(cache: bool) -> None:
    """Replayed under the autocast in which each call was made, and only there."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(10, 4), torch.randn(10, 3)
    parameters = trainable(model)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            z = model(x)
        assert z.dtype == torch.bfloat16
        return F.mse_loss(z.float(), y) + model[0].weight.matmul(x.T).pow(2).mean()

    assert_replays(closure_of(parameters, loss), parameters, rtol=1e-6)


def test_autocast_switched_off_inside_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(10, 4), torch.randn(10, 3)
    parameters = trainable(model)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = model[1](model[0](x))
            with torch.autocast("cpu", enabled=False):
                z = model[2](h.float())
        return F.mse_loss(z, y)

    assert_replays(closure_of(parameters, loss), parameters, rtol=1e-6)


def test_several_backward_calls() -> None:
    """L is the sum of all on which ``backward`` was called."""
    net = Net()

    def closure() -> Tensor:
        net.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(net.x.split(4), net.y.split(4), strict=True):
            loss = F.mse_loss(net.model(x), y)
            loss.backward()
            total = total + loss.detach()
        return total

    program = assert_replays(closure, net.parameters)
    assert len(program.losses) == 3


def test_backward_twice_through_one_graph() -> None:
    net = Net()

    def closure() -> Tensor:
        net.model.zero_grad()
        z = net.model(net.x)
        first, second = F.mse_loss(z, net.y), z.abs().mean()
        first.backward(retain_graph=True)
        second.backward()
        return (first + second).detach()

    assert_replays(closure, net.parameters)


@pytest.mark.parametrize("keyword", [True, False])
def test_backward_with_a_gradient(keyword: bool) -> None:
    """The weights of ``backward(gradient=...)`` are part of L."""
    net = Net()
    weights = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)

    def closure() -> Tensor:
        net.model.zero_grad()
        losses = F.mse_loss(net.model(net.x), net.y, reduction="none").mean(1)
        if keyword:
            losses.backward(gradient=weights)
        else:
            losses.backward(weights)
        return (losses.detach() * weights).sum()

    assert_replays(closure, net.parameters)


def test_compiled_model() -> None:
    """What ``torch.compile`` makes of a model replays like the model."""
    net = Net()
    compiled = torch.compile(net.model, backend="eager")
    assert_replays(closure_of(net.parameters, lambda: F.mse_loss(compiled(net.x), net.y)), net.parameters)


def test_layer_used_twice_and_scalar_parameter() -> None:
    """Dropout in evaluation mode, outputs in a dictionary."""
    layer = nn.Linear(4, 4).double()
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    drop = nn.Dropout(0.5).eval()
    x = torch.randn(10, 4, dtype=torch.float64)
    parameters = [scale, *layer.parameters()]

    def loss() -> Tensor:
        outputs = {"a": layer(x), "b": layer(drop(F.softplus(layer(x))))}
        return scale * sum(mean_square(v) for v in outputs.values()) + scale**2

    assert_replays(closure_of(parameters, loss), parameters)


def test_no_intermediate_tensor_outlives_the_recording() -> None:
    """A program names intermediate results; data and what is made from data alone it keeps."""
    net = Net()
    seen: list[weakref.ref[Tensor]] = []

    def loss() -> Tensor:
        h = net.hidden()
        a = torch.tanh(h)
        z = net.model[2](a)
        value = F.mse_loss(z, net.y)
        seen.extend(weakref.ref(t) for t in (h, a, z, value))
        return value

    closure = closure_of(net.parameters, loss)
    recording = Recording(net.parameters)
    with Recorder([recording]):
        returned = closure()
    program = recording.program(returned)
    assert program is not None
    del returned
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4
    assert {id(t) for t, _ in program.constants} == {id(net.x), id(net.y)}


def test_what_is_recorded_for_nothing_is_dropped() -> None:
    """Metrics computed beside the loss are not replayed, nor is what follows ``backward``."""
    net = Net()

    def closure() -> Tensor:
        net.model.zero_grad()
        z = net.model(net.x)
        (z.argmax(1) == net.index).double().mean()
        loss = F.mse_loss(z, net.y)
        loss.backward()
        mean_square(net.model(net.x))
        return loss

    program = assert_replays(closure, net.parameters)
    assert [c.function.__name__ for c in program.calls] == ["linear", "tanh", "linear", "mse_loss"]


def test_data_written_to_are_noticed() -> None:
    """A program whose constants changed since says so; one recorded afterwards is another function."""
    net = Net()
    closure = closure_of(net.parameters, lambda: F.mse_loss(net.model(net.x), net.y))
    first, second = record(closure, net.parameters), record(closure, net.parameters)
    assert not first.changed_constants()
    assert first.same_function_as(second)
    with torch.no_grad():
        for p in net.parameters:
            p.add_(0.1)
    assert first.same_function_as(record(closure, net.parameters))
    net.x[3, 1] += 1.0
    assert first.changed_constants()
    assert not first.same_function_as(second)
    assert not first.same_function_as(record(closure, net.parameters))


def test_data_written_to_through_a_view_or_out_are_noticed() -> None:
    net = Net()
    closure = closure_of(net.parameters, lambda: F.mse_loss(net.model(net.x[2:8]), net.y[2:8]))
    program = record(closure, net.parameters)
    net.x.view(-1)[9] = 4.0
    assert program.changed_constants()
    program = record(closure, net.parameters)
    torch.neg(net.y.clone(), out=net.y)
    assert program.changed_constants()


def test_a_buffer_that_is_filled_twice_in_one_closure_is_doubted() -> None:
    """A replay would see the last batch in both places; a buffer used once, or copied, is fine."""
    net = Net()
    buffer = torch.empty(5, 4, dtype=torch.float64)

    def loss(copied: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in net.x.split(5):
            buffer.copy_(part)
            total = total + net.model(buffer.clone() if copied else buffer).sin().sum()
        return total

    assert_replays(closure_of(net.parameters, lambda: loss(copied=True)), net.parameters)
    recording = Recording(net.parameters)
    with Recorder([recording]), torch.no_grad():
        total = loss(copied=False)
    recording.program(total)
    assert any("written to in place" in doubt for doubt in recording.doubts)


def test_equal_copies_of_data_are_the_same_function() -> None:
    """A loader that collates the same batch anew changes nothing; other data, order or settings do."""
    net = Net()

    def program(x: Tensor, y: Tensor, slope: float = 0.1) -> Program:
        return record(closure_of(net.parameters, lambda: F.mse_loss(F.leaky_relu(net.model(x), slope), y)), net.parameters)

    reference = program(net.x, net.y)
    assert reference.same_function_as(program(net.x.clone(), net.y.clone()))
    assert not reference.same_function_as(program(net.x.flip(0), net.y))
    assert not reference.same_function_as(program(net.x, net.y + 1e-15))
    assert not reference.same_function_as(program(net.x, net.y, 0.2))
    assert not reference.same_function_as(program(net.x[:5], net.y[:5]))


def test_nan_in_data_does_not_make_them_another_function_silently() -> None:
    """NaN is not equal to itself: the safe answer is "another function"."""
    net = Net()
    x = net.x.clone()
    x[0, 0] = float("nan")
    closure = closure_of(net.parameters, lambda: F.mse_loss(net.model(x.clone())[1:], net.y[1:]))
    first, second = record(closure, net.parameters), record(closure, net.parameters)
    assert not first.same_function_as(second)


FLOAT32_LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "plain": lambda model, x, y: F.mse_loss(model(x), y),
    "casts": lambda model, x, y: F.mse_loss(model(x).float(), y.to(torch.float32)).to(torch.float32),
    "type as data": lambda model, x, y: F.mse_loss(model(x).to(y), y.type_as(x)),
    "dtype argument": lambda model, x, y: F.softmax(model(x), 1, dtype=torch.float32).mul(y).sum(dtype=torch.float32),
    "made in the closure": lambda model, x, y: F.mse_loss(model(x) + torch.ones(3), y) + x.new_tensor(0.5) * model(x).sum(),
    "weights": lambda model, x, y: F.cross_entropy(model(x), torch.arange(10) % 3, weight=torch.tensor([1.0, 2.0, 0.5])),
    "integers": lambda model, x, y: F.mse_loss(model(x), y) * torch.arange(3).sum() + model(x)[torch.tensor([1, 2])].sum(),
    "made from the parameters": lambda model, x, y: (
        F.mse_loss(model(x) + torch.zeros_like(model(x)), y) + model(x).new_zeros(3).sum()
    ),
}


@pytest.mark.parametrize("name", FLOAT32_LOSSES)
def test_float64_replay_of_a_float32_model(name: str) -> None:
    """The program in float64 is the loss of the same model in float64 on the same data, to rounding."""
    loss = FLOAT32_LOSSES[name]
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(10, 4), torch.randn(10, 3)
    parameters = trainable(model)
    program = record(closure_of(parameters, lambda: loss(model, x, y)), parameters).in_float64()
    parameters = trainable(model.double())
    theta = elsewhere(vector(parameters, parameters, torch.float64), 0.3)
    found = replay(program, parameters, theta)
    assert found[0].dtype == torch.float64
    exact = {
        "plain": loss,
        "casts": FLOAT32_LOSSES["plain"],
        "type as data": FLOAT32_LOSSES["plain"],
        "dtype argument": lambda model, x, y: F.softmax(model(x), 1).mul(y).sum(),
        "made in the closure": lambda model, x, y: F.mse_loss(model(x) + 1.0, y) + 0.5 * model(x).sum(),
        "weights": lambda model, x, y: F.cross_entropy(
            model(x), torch.arange(10) % 3, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
        ),
        "integers": loss,
        "made from the parameters": FLOAT32_LOSSES["plain"],
    }[name]
    wanted = called_at(closure_of(parameters, lambda: exact(model, x.double(), y.double())), parameters, theta)
    assert distance(found[0], wanted[0]) <= 1e-14
    assert distance(found[1], wanted[1]) <= 1e-13


def test_the_mode_is_gone_after_an_exception() -> None:
    """What the closure raises comes out, and nothing is recorded any more."""
    net = Net()
    recording = Recording(net.parameters)

    def broken() -> None:
        with Recorder([recording]):
            net.hidden()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert not torch.overrides._get_current_function_mode_stack()
    n = recording.n_calls
    net.hidden()
    assert recording.n_calls == n


def test_recording_changes_no_result() -> None:
    """Loss and gradients under the recorder are those without it, to the last bit."""
    net = Net()
    closure = closure_of(net.parameters, lambda: F.mse_loss(net.model(net.x), net.y))
    wanted = closure(), [p.grad for p in net.parameters]
    recording = Recording(net.parameters)
    with Recorder([recording]):
        found = closure(), [p.grad for p in net.parameters]
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


def test_default_device_and_other_modes_are_seen_through() -> None:
    """``with torch.device(...)`` inside or around the closure is a mode of the same kind."""
    net = Net()

    def loss() -> Tensor:
        with torch.device("cpu"):
            return F.mse_loss(net.model(net.x) + torch.ones(3, dtype=torch.float64), net.y)

    with torch.device("cpu"):
        assert_replays(closure_of(net.parameters, loss), net.parameters)
