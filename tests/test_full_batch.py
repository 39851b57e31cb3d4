"""FullBatch: the whole data set as one objective, whatever the batches; and a batch's memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opening import open_it, trainable
from problems import flat, make_closure, teacher_student
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import FullBatch, GradientFlow, NewtonPolish

N = 230


class Tagged(nn.Module):
    """Not a perceptron: its output is damped by the size of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = teacher_student(1, n_samples=N)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / (1 + 0.1 * x.square().sum(1, keepdim=True))


def problem(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    return model, *teacher_student(1, n_samples=N)[1:]


def whole(kind: Callable[[], nn.Module], method: str) -> Tensor:
    """The flow of all data at once, by the ordinary closure."""
    model, x, y = problem(kind())
    optimizer = GradientFlow(model.parameters(), lr=0.5, method=method)
    for _ in range(2):
        optimizer.step(make_closure(optimizer, model, x, y))
    return flat(model)


def network() -> nn.Module:
    return teacher_student(1, n_samples=N)[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "engine", "method"),
    [(network, "perceptron", "bdf"), (Tagged, "replay", "dopri5"), (Tagged, "replay", "bdf-cg")],
)
def test_the_flow_is_that_of_all_data_at_once(kind: Callable[[], nn.Module], engine: str, method: str, stream: bool) -> None:
    """Batches of 64, the last one of 38, in another order at each pass where they are read anew."""
    model, x, y = problem(kind())
    optimizer = GradientFlow(model.parameters(), lr=0.5, method=method)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    everything = FullBatch(loader, lambda batch: mse_loss(model(batch[0]), batch[1]), optimizer, stream=stream)
    for _ in range(2):
        loss = optimizer.step(everything)
    assert optimizer.stats.engine == ("closure" if stream else engine)
    assert ("stream=True" in optimizer.stats.engine_reason) == stream
    assert float((flat(model) - whole(kind, method)).norm() / flat(model).norm()) < 1e-9
    assert float(everything()) == pytest.approx(mse_loss(model(x), y).item(), rel=1e-12)
    assert float(loss) > float(everything())


@pytest.mark.parametrize("stream", [False, True])
def test_newton_polish(stream: bool) -> None:
    model, x, y = problem(network())
    GradientFlow(model.parameters(), lr=1e4, method="bdf").step(make_closure(torch.optim.SGD(model.parameters()), model, x, y))
    optimizer = NewtonPolish(model.parameters(), gtol=1e-9, weight_decay=1e-2)
    batches = [{"x": x[i : i + 100], "y": y[i : i + 100]} for i in range(0, N, 100)]
    optimizer.step(FullBatch(batches, lambda batch: mse_loss(model(batch["x"]), batch["y"]), optimizer, stream=stream))
    assert optimizer.result is not None and optimizer.result.grad_norm <= 1e-9
    loss = mse_loss(model(x), y) + 5e-3 * sum(p.square().sum() for p in model.parameters())
    assert all(float(g.abs().max()) < 2e-9 for g in torch.autograd.grad(loss, list(model.parameters())))


def test_sums_and_sizes() -> None:
    model, x, y = problem(network())
    optimizer = GradientFlow(model.parameters())
    batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, N, 100)]
    summed = FullBatch(batches, lambda b: mse_loss(model(b[0]), b[1], reduction="sum"), optimizer, reduction="sum")
    assert float(summed()) == pytest.approx(mse_loss(model(x), y, reduction="sum").item(), rel=1e-12)
    by_size = FullBatch(batches, lambda b: mse_loss(model(b[0]), b[1]), optimizer, size=lambda b: 2 * len(b[1]))
    assert float(by_size()) == pytest.approx(mse_loss(model(x), y).item(), rel=1e-12)


class Live:
    """How many bytes are kept for backward passes, and the most of it."""

    now = most = 0

    class Kept:
        def __init__(self, owner: Live, tensor: Tensor) -> None:
            self.owner, self.tensor = owner, tensor
            owner.now += tensor.nbytes
            owner.most = max(owner.most, owner.now)

        def __del__(self) -> None:
            self.owner.now -= self.tensor.nbytes

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(lambda tensor: Live.Kept(self, tensor), lambda kept: kept.tensor)


@pytest.mark.parametrize("stream", [False, True])
def test_one_batch_of_intermediate_results_at_a_time(stream: bool) -> None:
    """Gradients, and products of a closure that is called again, keep a tenth of what all data at once take."""
    model, x, y = problem(Tagged())
    parameters = trainable(model)
    batches = [(x[i : i + 23], y[i : i + 23]) for i in range(0, N, 23)]
    optimizer = torch.optim.SGD(parameters)
    closure = FullBatch(batches, lambda b: mse_loss(model(b[0]), b[1]), optimizer, stream=stream)
    opened = open_it(closure, parameters, check=False)
    alone = open_it(make_closure(optimizer, model, x, y), parameters, check=False, engine="closure" if stream else "replay")
    assert opened.engine == alone.engine == ("closure" if stream else "replay")

    def most(call: Callable[[], Any]) -> int:
        live = Live()
        with live.hooks():
            call()
        return live.most

    theta = opened.theta
    kept, of_all = (most(lambda o=o: o.objective.loss_and_gradient(theta)) for o in (opened, alone))
    assert kept < 0.15 * of_all
    if stream:
        kept, of_all = (most(lambda o=o: o.objective.hvp(theta, theta)) for o in (opened, alone))
        assert kept < 0.15 * of_all
    assert float((opened.objective.hessian(theta) - alone.objective.hessian(theta)).abs().max()) < 1e-12


def test_losses_that_share_a_forward_pass_are_replayed_together() -> None:
    """Two losses of one output: the forward pass is not repeated for each, and the derivatives are those of the sum."""
    model, x, y = problem(Tagged())
    parameters, calls = trainable(model), [0]

    def closure() -> Tensor:
        for p in parameters:
            p.grad = None
        out = model(x)
        parts = (out - y).square().mean(), 0.1 * (out - y).abs().sqrt().mean()
        parts[0].backward(retain_graph=True)
        parts[1].backward()
        calls[0] += 1
        return (parts[0] + parts[1]).detach()

    opened = open_it(closure, parameters)
    assert opened.engine == "replay"
    loss, gradient = opened.objective.loss_and_gradient(opened.theta)
    assert float(loss) == pytest.approx(float(opened.loss), rel=1e-12)
    assert float((gradient - opened.gradient).abs().max()) < 1e-12


def test_what_it_refuses() -> None:
    model, x, y = problem(network())
    optimizer = GradientFlow(model.parameters())
    loss = lambda batch: mse_loss(model(batch[0]), batch[1])  # noqa: E731
    data = TensorDataset(x, y)
    with pytest.raises(TypeError, match="loader must be a DataLoader or another iterable"):
        FullBatch(3, loss, optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="it is an iterator"):
        FullBatch(iter(DataLoader(data)), loss, optimizer)
    with pytest.raises(ValueError, match="drop_last=False"):
        FullBatch(DataLoader(data, 64, drop_last=True), loss, optimizer)
    with pytest.raises(ValueError, match="loader has no batches"):
        FullBatch([], loss, optimizer)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'none'"):
        FullBatch([(x, y)], loss, optimizer, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batch of type str is not known; pass size="):
        FullBatch(["x"], loss, optimizer)
    with pytest.raises(ValueError, match=r"size must give a positive integer for each batch; it gave \[0\]"):
        FullBatch([(x, y)], loss, optimizer, size=lambda _: 0)
    with pytest.raises(TypeError, match="one element for each batch"):
        FullBatch([(x, y)], lambda b: (model(b[0]) - b[1]).square(), optimizer)()
    shrinking = [(x, y), (x, y)]
    closure = FullBatch(shrinking, loss, optimizer, stream=True)
    shrinking.pop()
    before = flat(model)
    with pytest.raises(ValueError, match=f"loader gave {2 * N} samples at first and {N} now"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)
