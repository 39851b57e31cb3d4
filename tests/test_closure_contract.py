"""What closures may and may not do: each is right, or refused or warned of by name, never silently different."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from opening import assert_is_the_closure, called_at, closure_of, distance, elsewhere, open_it, trainable, vector
from problems import RECORDED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.objectives.base import ClosureError, DerivativeError
from torch_gradflow.objectives.closure import NoClosure
from torch_gradflow.objectives.opened import GradientFlowWarning, Memory


class Net:
    """A small network with data."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1)).to(dtype)
        self.x = torch.randn(20, 4, dtype=dtype)
        self.y = torch.randn(20, 1, dtype=dtype)
        self.parameters: list[nn.Parameter] = trainable(self.model)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def closure(self, loss: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
        return closure_of(self.parameters, self.loss if loss is None else loss)

    def zero(self) -> None:
        for p in self.parameters:
            p.grad = None

    def theta(self) -> Tensor:
        return vector(self.parameters, self.parameters, torch.float64)


@pytest.fixture
def net() -> Net:
    return Net()


class Round(torch.autograd.Function):
    """Rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Cube(torch.autograd.Function):
    """x³ with a right derivative, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubeOnce(Cube):
    """x³ with a right derivative, which cannot."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


def returns_a_number(net: Net) -> Any:
    return lambda: net.closure()().item()


def returns_a_dictionary(net: Net) -> Any:
    return lambda: {"loss": net.closure()(), "accuracy": torch.tensor(0.5)}


def returns_one_element(net: Net) -> Any:
    return lambda: net.closure()().reshape(1, 1)


def autograd_backward(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        loss = net.loss()
        torch.autograd.backward(loss)
        return loss

    return closure


def autograd_backward_of_two(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        loss, penalty = net.loss(), net.model[0].weight.pow(2).sum()
        torch.autograd.backward([loss, penalty])
        return loss + penalty

    return closure


def gradient_assigned(net: Net) -> Any:
    def closure() -> Tensor:
        loss = net.loss()
        for p, g in zip(net.parameters, torch.autograd.grad(loss, net.parameters), strict=True):
            p.grad = g
        return loss

    return closure


def several_backward_calls(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        losses = [F.mse_loss(net.model(x), y) / 3 for x, y in zip(net.x.split(7), net.y.split(7), strict=True)]
        for loss in losses:
            loss.backward()
        return torch.stack([loss.detach() for loss in losses]).sum()

    return closure


def losses_logged_in_place(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(net.x.split(7), net.y.split(7), strict=True):
            loss = F.mse_loss(net.model(x), y)
            loss.backward()
            total += loss.detach()
        return total

    return closure


def weighted_backward(net: Net) -> Any:
    weights = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]

    def closure() -> Tensor:
        net.zero()
        squares = (net.model(net.x) - net.y) ** 2
        squares.backward(gradient=weights)
        return (squares.detach() * weights).sum()

    return closure


def backward_to_some(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        loss = net.loss()
        loss.backward(inputs=net.parameters[:2])
        return loss

    return closure


def clipping(max_norm: float) -> Callable[[Net], Any]:
    def make(net: Net) -> Any:
        def closure() -> Tensor:
            loss = net.closure()()
            nn.utils.clip_grad_norm_(net.parameters, max_norm)
            return loss

        return closure

    return make


def hook_that_doubles(net: Net) -> Any:
    net.model[0].weight.register_hook(lambda gradient: 2 * gradient)
    return net.closure()


def hook_that_watches(net: Net) -> Any:
    norms: list[Tensor] = []
    net.model[0].weight.register_hook(lambda gradient: norms.append(gradient.norm()))
    return net.closure()


def forward_hook(net: Net) -> Any:
    net.model[1].register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return net.closure()


def straight_through(net: Net) -> Any:
    return net.closure(lambda: F.mse_loss(net.model[2](Round.apply(net.model[0](net.x))), net.y))


def custom_function(net: Net) -> Any:
    return net.closure(lambda: F.mse_loss(net.model[2](Cube.apply(net.model[0](net.x))), net.y))


def custom_function_once(net: Net) -> Any:
    return net.closure(lambda: F.mse_loss(net.model[2](CubeOnce.apply(net.model[0](net.x))), net.y))


def checkpointed(reentrant: bool) -> Callable[[Net], Any]:
    def make(net: Net) -> Any:
        # The reentrant variant wants an input that requires gradients.
        def loss() -> Tensor:
            h = checkpoint(lambda h: net.model[1](h), net.model[0](net.x), use_reentrant=reentrant)
            return F.mse_loss(net.model[2](h), net.y)

        return net.closure(loss)

    return make


def autocast(net: Net) -> Any:
    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(net.model(net.x).to(net.x), net.y)

    return net.closure(loss)


def loss_times_its_number(net: Net) -> Any:
    def loss() -> Tensor:
        value = net.loss()
        return value * value.item()

    return net.closure(loss)


def number_logged_after_backward(net: Net) -> Any:
    log: list[float] = []

    def closure() -> Tensor:
        loss = net.closure()()
        log.append(loss.item())
        return loss

    return closure


def branch_on_a_tensor(net: Net) -> Any:
    def loss() -> Tensor:
        value = net.loss()
        return 2 * value if value > 0.1 else value**2

    return net.closure(loss)


def branch_on_a_number(net: Net) -> Any:
    """The two sides meet at the start's loss + 0.02, beyond the reach of a small perturbation."""
    bound = net.loss().item() + 0.02

    def loss() -> Tensor:
        value = net.loss()
        return 3 * value - 2 * bound if value.item() > bound else value

    return net.closure(loss)


def branch_on_numpy(net: Net) -> Any:
    bound = net.loss().item() + 0.02

    def loss() -> Tensor:
        value = net.loss()
        return 3 * value - 2 * bound if value.detach().numpy() > bound else value

    return net.closure(loss)


def loop_until_converged(net: Net) -> Any:
    def loss() -> Tensor:
        h = torch.zeros(20, 1, dtype=torch.float64)
        for _ in range(50):
            h, before = torch.tanh(0.3 * h + net.model(net.x)), h
            if torch.allclose(h, before, atol=1e-3):
                break
        return F.mse_loss(h, net.y)

    return net.closure(loss)


def target_without_gradient(net: Net) -> Any:
    def loss() -> Tensor:
        with torch.no_grad():
            target = net.y + net.model(net.x.roll(1, 0))
        return F.mse_loss(net.model(net.x), target)

    return net.closure(loss)


def detached_factor(net: Net) -> Any:
    return net.closure(lambda: net.loss() * net.model[0].weight.detach().pow(2).sum())


def parameters_clamped(net: Net) -> Any:
    def loss() -> Tensor:
        with torch.no_grad():
            for p in net.parameters:
                p.clamp_(-5.0, 5.0)
        return net.loss()

    return net.closure(loss)


def data_assigned(net: Net) -> Any:
    """Activations replaced behind autograd's back."""

    def loss() -> Tensor:
        h = net.model[0](net.x)
        h.data = h.data.clamp(min=0.0)
        return F.mse_loss(net.model[2](h), net.y)

    return net.closure(loss)


def filled_buffer(net: Net) -> Any:
    buffer = torch.zeros(20, 6, dtype=torch.float64)

    def loss() -> Tensor:
        buffer.copy_(net.model[1](net.model[0](net.x)).detach())
        return F.mse_loss(net.model[2](net.model[1](net.model[0](net.x))), net.y) + buffer.mean()

    return net.closure(loss)


def results_in_a_new_tensor(net: Net) -> Any:
    def loss() -> Tensor:
        out = torch.zeros(20, 1, dtype=torch.float64)
        for i, (x, y) in enumerate(zip(net.x, net.y, strict=True)):
            out[i] = net.model(x) - y
        return out.pow(2).mean()

    return net.closure(loss)


def numpy_in_the_middle(net: Net) -> Any:
    """A factor that leaves torch and comes back as data."""

    def loss() -> Tensor:
        factor = np.exp(net.model[0].weight.detach().numpy().sum())
        return net.loss() * torch.as_tensor(factor)

    return net.closure(loss)


def inner_optimisation(net: Net) -> Any:
    """The loss after one inner gradient step (MAML)."""

    def loss() -> Tensor:
        inner = torch.autograd.grad(net.loss(), net.parameters, create_graph=True)
        fast = dict(zip([n for n, _ in net.model.named_parameters()], net.parameters, strict=True))
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), inner, strict=True)}
        return F.mse_loss(torch.func.functional_call(net.model, fast, (net.x.flip(0),)), net.y)

    return net.closure(loss)


@dataclass(frozen=True)
class Case:
    """A closure, the engine that has to serve, what its ``reason`` says, and what is warned of."""

    make: Callable[[Net], Any]
    engine: str = "replay"
    reason: str = ""
    warning: str | None = None
    rtol: float = 1e-12


NOT_ITS_GRADIENT = "not the gradient of the loss"
EDITED = "the gradient in .grad is not that of the recorded loss"

RIGHT = {
    "plain": Case(lambda net: net.closure()),
    "returns a number": Case(returns_a_number),
    "returns a dictionary": Case(returns_a_dictionary),
    "returns one element": Case(returns_one_element),
    "torch.autograd.backward": Case(autograd_backward),
    "torch.autograd.backward of two": Case(autograd_backward_of_two),
    "gradient assigned": Case(gradient_assigned),
    "several backward calls": Case(several_backward_calls),
    "losses logged in place": Case(losses_logged_in_place, "either"),
    "backward(gradient=...)": Case(weighted_backward),
    "backward(inputs=...)": Case(backward_to_some, "closure", EDITED, NOT_ITS_GRADIENT),
    "clipping, out of reach": Case(clipping(1e3)),
    "clipping": Case(clipping(0.1), "closure", EDITED + ".*clipping", NOT_ITS_GRADIENT + ".*clipping"),
    "hook that doubles": Case(hook_that_doubles, "closure", EDITED + ".*hook", NOT_ITS_GRADIENT + ".*hook"),
    "hook that watches": Case(hook_that_watches),
    "forward hook": Case(forward_hook),
    "straight-through": Case(straight_through, "closure", EDITED + ".*straight-through", NOT_ITS_GRADIENT),
    "custom Function": Case(custom_function, "closure", EDITED),
    "custom Function, once differentiable": Case(custom_function_once, "closure", EDITED),
    "checkpoint": Case(checkpointed(reentrant=False)),
    "checkpoint, reentrant": Case(checkpointed(reentrant=True), "closure", EDITED),
    "autocast": Case(autocast, rtol=1e-6),
    ".item() as a factor": Case(loss_times_its_number, "closure", "item", NOT_ITS_GRADIENT),
    ".item() after backward": Case(number_logged_after_backward),
    "if loss > 0.1": Case(branch_on_a_tensor, "closure", "decides by the value of a tensor"),
    "if loss.item() > bound": Case(branch_on_a_number, "closure", "item"),
    "if loss.numpy() > bound": Case(branch_on_numpy, "closure", "numpy"),
    "loop until converged": Case(loop_until_converged, "closure", r"decides by the value of a tensor \(allclose\)"),
    "target without gradient": Case(target_without_gradient, warning=NOT_ITS_GRADIENT + ".*no_grad target"),
    "detached factor": Case(detached_factor, warning=NOT_ITS_GRADIENT),
    "numpy in the middle": Case(numpy_in_the_middle, "closure", "numpy|numbers", NOT_ITS_GRADIENT),
    "parameters clamped": Case(parameters_clamped, "closure", "writes to a parameter in place"),
    ".data assigned": Case(data_assigned, "closure", r"assigns to \.data", NOT_ITS_GRADIENT),
    "filled buffer": Case(filled_buffer, "closure", "writes values that depend on the parameters", ".*"),
    "results in a new tensor": Case(results_in_a_new_tensor, "either"),
    "inner optimisation": Case(inner_optimisation),
}
FALLBACKS = [name for name, case in RIGHT.items() if case.engine == "closure"]


def expectation(case: Case) -> Any:
    return nullcontext() if case.warning is None else pytest.warns(GradientFlowWarning, match=case.warning)


@pytest.mark.parametrize("name", RIGHT)
def test_objective_is_the_closure(net: Net, name: str) -> None:
    """Loss and gradient at the start and elsewhere; fallbacks say why, and questionable gradients are warned of."""
    case = RIGHT[name]
    closure = case.make(net)
    with expectation(case):
        opened = open_it(closure, net.parameters)
    if case.engine != "either":
        assert opened.engine in (RECORDED if case.engine == "replay" else (case.engine,)), opened.reason
    if opened.engine in RECORDED:
        assert opened.reason == ""
    elif case.reason:
        assert re.search(case.reason, opened.reason)
    assert_is_the_closure(opened, closure, net.parameters, rtol=case.rtol)


@pytest.mark.parametrize("name", RIGHT)
def test_engine_closure_is_the_closure(net: Net, name: str) -> None:
    """Without any record, whatever a closure does."""
    case = RIGHT[name]
    closure = case.make(net)
    with expectation(case):
        opened = open_it(closure, net.parameters, engine="closure")
    assert opened.engine == "closure"
    assert_is_the_closure(opened, closure, net.parameters, rtol=case.rtol)


@pytest.mark.parametrize("name", RIGHT)
def test_without_check_the_objective_is_still_the_closure(net: Net, name: str) -> None:
    """Nothing is warned of then, and the closure is called once, but what is integrated is not another function."""
    case = RIGHT[name]
    closure = case.make(net)
    opened = open_it(closure, net.parameters, check=False)
    assert opened.objective.counts.n_closure == 1
    assert_is_the_closure(opened, closure, net.parameters, rtol=case.rtol)


@pytest.mark.parametrize("name", FALLBACKS)
def test_engine_replay_makes_every_fallback_an_error(net: Net, name: str) -> None:
    case = RIGHT[name]
    closure = case.make(net)
    start = net.theta()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        with pytest.raises(ClosureError, match=f"engine='replay' was asked for.*({case.reason})"):
            open_it(closure, net.parameters, engine="replay")
    assert torch.equal(net.theta(), start)


@pytest.mark.parametrize("name", RIGHT)
def test_hessian_is_right_or_refused(net: Net, name: str) -> None:
    """Products with the Hessian are differences of the closure's gradients, or there are none."""
    case = RIGHT[name]
    closure = case.make(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        opened = open_it(closure, net.parameters)
    direction = elsewhere(torch.zeros_like(opened.theta), 1.0)
    direction /= direction.norm()
    try:
        product = opened.objective.hvp(opened.theta, direction)
    except DerivativeError:
        product = None
    if product is None:
        assert opened.engine == "closure" or case.warning or name == "autocast"
        return
    step = 1e-5
    ahead = called_at(closure, net.parameters, opened.theta + step * direction)[1]
    behind = called_at(closure, net.parameters, opened.theta - step * direction)[1]
    assert distance(product, (ahead - behind) / (2 * step)) <= 1e-6


SECOND_DERIVATIVES_REFUSED = {
    "clipping": "radients are changed after the backward pass.*clipping",
    "straight-through": "straight-through|no second derivative",
    "custom Function, once differentiable": "second derivative|twice",
    "checkpoint, reentrant": "heckpoint",
    "target without gradient": "detached target",
    "hook that doubles": "hooks",
}


@pytest.mark.parametrize("name", SECOND_DERIVATIVES_REFUSED)
def test_second_derivatives_that_are_refused_by_name(net: Net, name: str) -> None:
    """``NewtonPolish`` needs them: it says why it cannot, and leaves the parameters alone."""
    closure = RIGHT[name].make(net)
    start = net.theta()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        with pytest.raises(DerivativeError, match=SECOND_DERIVATIVES_REFUSED[name]):
            NewtonPolish(net.parameters).step(closure)
    assert torch.equal(net.theta(), start)


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_none_after_backward_is_allowed(net: Net, engine: Any) -> None:
    """The loss is then what ``backward`` was called on, here the sum of two."""

    def closure() -> None:
        net.zero()
        net.loss().backward()
        net.model[0].weight.pow(2).sum().backward()

    def with_loss() -> Tensor:
        closure()
        return net.loss() + net.model[0].weight.pow(2).sum()

    opened = open_it(closure, net.parameters, engine=engine)
    assert opened.returned is None
    assert_is_the_closure(opened, with_loss, net.parameters)
    assert isinstance(GradientFlow(net.parameters, lr=0.1, engine=engine).step(closure), Tensor)


def test_custom_function_has_its_second_derivative(net: Net) -> None:
    """Where the closure serves, so does double backward through it."""
    closure = custom_function(net)
    hessian = open_it(closure, net.parameters, engine="closure").objective.hessian(net.theta())
    plain = net.closure(lambda: F.mse_loss(net.model[2](net.model[0](net.x) ** 3), net.y))
    assert distance(hessian, open_it(plain, net.parameters, engine="replay").objective.hessian(net.theta())) <= 1e-11


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_sparse_gradients(engine: Any) -> None:
    """``Embedding(sparse=True)``: dense θ, sparse ``.grad``; second derivatives are right or refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1)).double()
    x, y = torch.arange(10).reshape(5, 2) % 6, torch.randn(5, 1, dtype=torch.float64)
    parameters = trainable(model)
    closure = closure_of(parameters, lambda: F.mse_loss(model(x), y))
    opened = open_it(closure, parameters, engine=engine)
    assert_is_the_closure(opened, closure, parameters)
    model[0].sparse = False
    wanted = open_it(closure, parameters, engine="replay").objective.hessian(opened.theta)
    model[0].sparse = True
    try:
        found = opened.objective.hessian(opened.theta)
    except DerivativeError:
        pass
    else:
        assert distance(found, wanted) <= 1e-11
    opened.finish(opened.theta)
    assert parameters[0].grad is not None
    assert parameters[0].grad.is_sparse


def flow_step(net: Net, closure: Any, **settings: Any) -> GradientFlow:
    """One step of an optimizer on a net."""
    optimizer = GradientFlow(net.parameters, lr=0.5, **settings)
    optimizer.step(closure)
    return optimizer


def dropout(net: Net) -> Any:
    return net.closure(lambda: F.mse_loss(F.dropout(net.model(net.x), 0.5), net.y))


def dropout_module(net: Net) -> Any:
    model = nn.Sequential(*net.model, nn.Dropout(0.5))
    return net.closure(lambda: F.mse_loss(model(net.x), net.y))


def random_batch(net: Net) -> Any:
    def loss() -> Tensor:
        rows = torch.randint(20, (8,))
        return F.mse_loss(net.model(net.x[rows]), net.y[rows])

    return net.closure(loss)


def random_batch_of_numpy(net: Net) -> Any:
    generator = np.random.default_rng(0)

    def loss() -> Tensor:
        rows = torch.from_numpy(generator.permutation(20)[:8])
        return F.mse_loss(net.model(net.x[rows]), net.y[rows])

    return net.closure(loss)


def noise(net: Net) -> Any:
    return net.closure(lambda: F.mse_loss(net.model(net.x + 0.1 * torch.randn_like(net.x)), net.y))


def next_batch(net: Net) -> Any:
    batches = itertools.cycle(zip(net.x.split(5), net.y.split(5), strict=True))

    def loss() -> Tensor:
        x, y = next(batches)
        return F.mse_loss(net.model(x), y)

    return net.closure(loss)


def random_gradient(net: Net) -> Any:
    net.model[0].weight.register_hook(lambda gradient: gradient + 0.01 * torch.randn_like(gradient))
    return net.closure()


def scaled(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        loss = net.loss()
        (1024 * loss).backward()
        return loss

    return closure


def divided(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        loss = net.loss()
        (loss / 4).backward()
        return loss

    return closure


def grad_scaler(net: Net) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def closure() -> Tensor:
        net.zero()
        loss = net.loss()
        scaler.scale(loss).backward()
        return loss

    return closure


def one_term_missing(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        loss = net.loss()
        (loss + net.model[0].weight.pow(2).sum()).backward()
        return loss

    return closure


def no_zero_grad(net: Net) -> Any:
    def closure() -> Tensor:
        loss = net.loss()
        loss.backward()
        return loss

    return closure


def no_zero_grad_for_one(net: Net) -> Any:
    def closure() -> Tensor:
        for p in net.parameters[:-1]:
            p.grad = None
        loss = net.loss()
        loss.backward()
        return loss

    return closure


def no_backward(net: Net) -> Any:
    return net.loss


def no_backward_but_zeroed(net: Net) -> Any:
    def closure() -> Tensor:
        net.model.zero_grad(set_to_none=True)
        return net.loss()

    return closure


def no_backward_but_filled_with_zeros(net: Net) -> Any:
    def closure() -> Tensor:
        net.model.zero_grad(set_to_none=False)
        return net.loss()

    return closure


def vector_returned(net: Net) -> Any:
    def closure() -> Tensor:
        net.zero()
        losses = (net.model(net.x) - net.y) ** 2
        losses.sum().backward()
        return losses

    return closure


def tuple_returned(net: Net) -> Any:
    return lambda: (net.closure()(), 0.5)


def other_model(net: Net) -> Any:
    other = Net()

    def closure() -> Tensor:
        loss = other.loss()
        loss.backward()
        return loss

    return closure


REFUSED = {
    "dropout": (dropout, "stochastic.*switch dropout off"),
    "dropout module": (dropout_module, "stochastic.*switch dropout off"),
    "random batch": (random_batch, "stochastic.*draw and augment the batch before the closure"),
    "random batch of numpy": (random_batch_of_numpy, "stochastic.*draw and augment the batch before the closure"),
    "noise": (noise, "stochastic"),
    "next batch": (next_batch, "stochastic.*draw and augment the batch before the closure"),
    "random gradient": (random_gradient, "stochastic.*another gradient"),
    "scaled loss": (scaled, "scaled for mixed precision"),
    "GradScaler": (grad_scaler, "GradScaler"),
    "divided loss": (divided, "divided for gradient accumulation"),
    "one term missing": (one_term_missing, "without one of its terms"),
    "no zero_grad": (no_zero_grad, r"does not zero the gradients.*zero_grad\(\) inside the closure"),
    "no zero_grad for one": (no_zero_grad_for_one, "does not zero the gradients"),
    "no backward": (no_backward, "did not call backward"),
    "no backward, gradients None": (no_backward_but_zeroed, "did not call backward"),
    "no backward, gradients zero": (no_backward_but_filled_with_zeros, "did not call backward"),
    "vector": (vector_returned, r"returned Tensor of shape \(20, 1\); it must return the loss"),
    "tuple": (tuple_returned, "returned tuple; it must return the loss"),
    "other model": (other_model, "no parameter of this optimizer received a gradient.*another model"),
}


@pytest.mark.parametrize("entry", ["no gradients before", "gradients before"])
@pytest.mark.parametrize("engine", ["auto", "closure"])
@pytest.mark.parametrize("name", REFUSED)
def test_closures_that_are_refused_by_name(net: Net, name: str, engine: Any, entry: str) -> None:
    """On the first step, with the parameters left as they were."""
    make, text = REFUSED[name]
    closure = make(net)
    if entry == "gradients before":
        net.closure(lambda: net.model(net.x).sum())()
    start = net.theta()
    with pytest.raises(ClosureError, match=text):
        flow_step(net, closure, engine=engine)
    assert torch.equal(net.theta(), start)


def test_a_loss_that_depends_on_no_parameter_is_torch_s_own_error(net: Net) -> None:
    start = net.theta()
    with pytest.raises(RuntimeError, match="does not require grad"):
        flow_step(net, net.closure(lambda: net.x.mean()))
    assert torch.equal(net.theta(), start)


def test_closure_that_does_nothing(net: Net) -> None:
    """Lightning's manual optimisation passes ``lambda: None``; without gradients there is nothing to do."""
    start = net.theta()
    for closure in (None, lambda: None):
        with pytest.warns(GradientFlowWarning, match="no parameter has a gradient"):
            GradientFlow(net.parameters).step(closure)
        polish = NewtonPolish(net.parameters)
        assert polish.step(closure) is None
        with pytest.raises(ClosureError, match=r"(?s)NewtonPolish\.step\(\) without a closure .*zero_grad"):
            polish.step(closure)
    assert torch.equal(net.theta(), start)
    with pytest.raises(NoClosure):
        open_it(lambda: None, net.parameters)
    net.closure()()
    with pytest.raises(NoClosure):
        open_it(lambda: None, net.parameters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_loss_that_is_not_finite(net: Net, bad: float, engine: Any) -> None:
    start = net.theta()
    with pytest.raises(FloatingPointError, match=r"gives loss (nan|inf).*left as they are"):
        flow_step(net, net.closure(lambda: net.loss() * bad), engine=engine)
    assert torch.equal(net.theta(), start)


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_gradient_that_is_not_finite(net: Net, engine: Any) -> None:
    """√|w| at w = 0: a finite loss with an infinite gradient."""
    with torch.no_grad():
        net.model[0].weight[0, 0] = 0.0
    start = net.theta()
    with pytest.raises(FloatingPointError, match="gradient of norm"):
        flow_step(net, net.closure(lambda: net.loss() + net.model[0].weight[0, 0].abs().pow(0.25)), engine=engine)
    assert torch.equal(net.theta(), start)


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_overflow_away_from_the_start_is_a_value_and_no_error(engine: Any) -> None:
    """An integrator tries such points and rejects them; a gradient of inf is not one that was left from before."""
    rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    opened = open_it(closure_of([rate], lambda: torch.exp(rate)), [rate], engine=engine)
    for theta, wanted in ((1e4, float("inf")), (float("nan"), float("nan")), (700.0, 1.0142320547350045e304)):
        loss, gradient = opened.objective.loss_and_gradient(torch.tensor([theta], dtype=torch.float64))
        assert loss.item() == pytest.approx(wanted, nan_ok=True)
        assert gradient.item() == pytest.approx(wanted, nan_ok=True)


class Interrupted(Exception):
    """What a closure may raise."""


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_a_closure_that_raises_on_the_first_step(net: Net, engine: Any, call: int) -> None:
    """In its first call, or in those that check it: the exception comes out, nothing has moved."""
    calls = itertools.count(1)

    def loss() -> Tensor:
        if next(calls) == call:
            raise Interrupted
        return net.loss()

    start = net.theta()
    with pytest.raises(Interrupted):
        flow_step(net, net.closure(loss), engine=engine)
    assert torch.equal(net.theta(), start)


def test_a_closure_that_raises_in_the_middle_of_a_flow(net: Net) -> None:
    """The parameters are the last accepted point: one on the trajectory, downhill from the start."""
    left = 10**6

    def loss() -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted
        return net.loss()

    optimizer = GradientFlow(net.parameters, lr=1.0, engine="closure", rtol=1e-8)
    closure = net.closure(loss)
    before = net.loss().item()
    optimizer.step(closure)
    left = 30
    with pytest.raises(Interrupted):
        optimizer.step(closure)
    reached = net.theta()
    assert net.loss().item() < before
    assert 1.0 < optimizer.flow_time < 2.0
    other = Net()
    reference = GradientFlow(other.parameters, lr=1.0, rtol=1e-10)
    reference.integrate(other.closure(), optimizer.flow_time)
    assert distance(reached, other.theta()) <= 1e-6


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_gradient_accumulation_around_the_closure(net: Net, engine: Any) -> None:
    """The first half of the batch is outside: refused, in the first step and in later ones."""

    def outside() -> None:
        net.zero()
        (F.mse_loss(net.model(net.x[:10]), net.y[:10]) / 2).backward()

    def accumulating() -> Tensor:
        loss = F.mse_loss(net.model(net.x[10:]), net.y[10:]) / 2
        loss.backward()
        return loss

    outside()
    with pytest.raises(ClosureError, match=r"does not zero the gradients.*accumulate_grad_batches"):
        flow_step(net, accumulating, engine="auto")
    net.zero()
    optimizer = flow_step(net, net.closure(), engine=engine)
    outside()
    start = net.theta()
    with pytest.raises(ClosureError, match="does not zero the gradients"):
        optimizer.step(accumulating)
    assert torch.equal(net.theta(), start)


@pytest.mark.parametrize("engine", ["auto", "closure"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_every_way_of_zeroing_is_one(net: Net, engine: Any, set_to_none: bool) -> None:
    """In place or not, with several backward calls, with parameters that some or all losses do not use."""
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    unused.grad = torch.ones_like(unused)
    optimizer = GradientFlow([unused, *net.parameters], lr=0.5, engine=engine)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss, penalty = net.loss(), net.model[0].weight.pow(2).sum()
        loss.backward()
        penalty.backward()
        return (loss + penalty).detach()

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    other = Net()
    whole = GradientFlow(other.parameters, lr=0.5)
    for loss in losses:
        found = whole.step(other.closure(lambda: other.loss() + other.model[0].weight.pow(2).sum()))
        assert found.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_numbers_of_closure_calls(net: Net, engine: Any) -> None:
    """Two more than one on the first step, for the check; with replay none afterwards."""
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return net.loss()

    closure = net.closure(loss)
    optimizer = GradientFlow(net.parameters, lr=0.5, engine=engine, method="dopri5")
    per_step = []
    for _ in range(4):
        before = calls
        optimizer.step(closure)
        per_step.append(calls - before)
        assert optimizer.stats.n_closure == calls
    if engine == "auto":
        assert per_step == [3, 1, 1, 1]
    else:
        assert optimizer.stats.n_grad == calls
    calls = 0
    unchecked = GradientFlow(net.parameters, lr=0.5, check=False)
    unchecked.step(closure)
    assert calls == 1
    calls = 0
    NewtonPolish(net.parameters, max_iter=2, engine=engine).step(closure)
    assert calls == 3 or engine == "closure"


@pytest.mark.parametrize("engine", ["auto", "closure"])
@pytest.mark.parametrize("optimizer", [GradientFlow, NewtonPolish])
def test_grad_after_a_step_is_the_gradient_at_its_start(net: Net, engine: Any, optimizer: Any) -> None:
    """And what ``step`` of a flow returns is what the closure returned there."""
    closure = net.closure()
    running = optimizer(net.parameters, engine=engine)
    for _ in range(2):
        loss, gradient = called_at(closure, net.parameters, net.theta())
        returned = running.step(closure)
        assert torch.equal(vector([p.grad for p in net.parameters], net.parameters, torch.float64), gradient)
        if optimizer is GradientFlow:
            assert torch.equal(returned.detach(), loss)
            assert not torch.equal(loss, called_at(closure, net.parameters, net.theta())[0])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("engine", ["auto", "closure"])
def test_statistics_of_a_batch_norm_move_once_per_step(engine: Any, check: bool) -> None:
    """As in an ordinary loop; the flow is that of the loss with batch statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    parameters = trainable(model)
    closure = closure_of(parameters, lambda: F.mse_loss(model(x), y))
    optimizer = GradientFlow(parameters, lr=0.3, engine=engine, check=check)
    mean, variance = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for step in range(3):
        h = model[0](x).detach()
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0)
        with pytest.warns(GradientFlowWarning, match="statistics of a BatchNorm") if check and step == 0 else nullcontext():
            optimizer.step(closure)
        assert model[1].num_batches_tracked == step + 1
        assert distance(model[1].running_mean, mean) <= 1e-14
        assert distance(model[1].running_var, variance) <= 1e-14
    assert optimizer.stats.engine in (RECORDED if engine == "auto" else ("closure",))


def test_one_draw_of_a_random_closure_without_check(net: Net) -> None:
    """With ``check=False`` a step follows the loss of one draw, and the generator goes on as after one call."""
    for make in (dropout, random_batch, noise):
        closure = make(net)
        torch.manual_seed(3)
        closure()
        after_one = torch.get_rng_state()
        torch.manual_seed(3)
        opened = open_it(closure, net.parameters, check=False)

        def same_draw(closure: Any = closure) -> Tensor:
            torch.manual_seed(3)
            return closure()

        loss, gradient = opened.objective.loss_and_gradient(elsewhere(opened.theta))
        assert torch.equal(torch.get_rng_state(), after_one)
        wanted = called_at(same_draw, net.parameters, elsewhere(opened.theta))
        assert distance(loss, wanted[0]) <= 1e-12
        assert distance(gradient, wanted[1]) <= 1e-12


def test_generator_goes_on_as_after_one_call(net: Net) -> None:
    """The check's calls leave no trace in it."""
    torch.manual_seed(3)
    open_it(net.closure(), net.parameters)
    found = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_hidden", [6, 1000])
def test_a_wrong_gradient_is_noticed_in_models_of_any_size(n_hidden: int, dtype: torch.dtype) -> None:
    """A random direction alone is nearly orthogonal to the gradient of a large model, and sees nothing."""
    net = Net(dtype)
    net.model = nn.Sequential(nn.Linear(4, n_hidden), nn.Softplus(), nn.Linear(n_hidden, 1)).to(dtype)
    net.parameters = trainable(net.model)
    for p in net.parameters:
        p.register_hook(lambda gradient: gradient / 2)
    with pytest.warns(GradientFlowWarning, match=NOT_ITS_GRADIENT):
        open_it(net.closure(), net.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_a_right_gradient_is_never_warned_of(seed: int, dtype: torch.dtype) -> None:
    """Neither with kinks, nor with large weights, nor at a stationary point."""
    net = Net(dtype)
    torch.manual_seed(seed)
    net.model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1)).to(dtype)
    net.parameters = trainable(net.model)
    open_it(net.closure(), net.parameters)
    with torch.no_grad():
        for p in net.parameters:
            p.mul_(5.0)
    open_it(net.closure(), net.parameters)
    net.y = net.model(net.x).detach()
    open_it(net.closure(), net.parameters)


def test_warnings_are_given_once(net: Net) -> None:
    """Not at every step."""
    closure = RIGHT["clipping"].make(net)
    memory = Memory()
    with pytest.warns(GradientFlowWarning):
        open_it(closure, net.parameters, memory=memory)
    for _ in range(2):
        open_it(closure, net.parameters, memory=memory)


@pytest.mark.parametrize("name", ["hook that doubles", "if loss > 0.1", "clipping"])
def test_a_closure_that_stops_being_replayable_is_noticed_later(net: Net, name: str) -> None:
    """The comparison with ``.grad`` is made at every step, not only at the first."""
    optimizer = flow_step(net, net.closure())
    assert optimizer.stats.engine in RECORDED
    optimizer.step(RIGHT[name].make(net))
    assert optimizer.stats.engine == "closure"
    assert optimizer.stats.engine_reason
    if name == "hook that doubles":
        net.model[0].weight._backward_hooks = None
    optimizer.step(net.closure())
    assert optimizer.stats.engine in RECORDED
    assert optimizer.stats.engine_reason == ""


def test_float32_float64_and_replay_in_float64() -> None:
    """With ``dtype=torch.float64`` the replay computes a float32 model in float64."""
    net, exact = Net(torch.float32), Net()
    exact.x, exact.y = net.x.double(), net.y.double()
    exact.model.load_state_dict(net.model.state_dict())
    opened = open_it(net.closure(), net.parameters, dtype=torch.float64)
    assert opened.theta.dtype == torch.float64
    theta = elsewhere(opened.theta)
    loss, gradient = opened.objective.loss_and_gradient(theta)
    wanted = called_at(exact.closure(), exact.parameters, theta)
    assert distance(loss, wanted[0]) <= 1e-14
    assert distance(gradient, wanted[1]) <= 1e-13
    plain = open_it(net.closure(), net.parameters)
    assert plain.theta.dtype == torch.float32
    assert_is_the_closure(plain, net.closure(), net.parameters, rtol=1e-6)
