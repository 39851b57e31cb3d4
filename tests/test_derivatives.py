"""Second derivatives of unmodified closures, against ``torch.autograd.functional.hessian``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from opening import called_at, closure_of, distance, elsewhere, open_it, trainable
from problems import RECORDED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_gradflow import NewtonPolish
from torch_gradflow.objectives import function
from torch_gradflow.objectives.base import DerivativeError
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.opened import GradientFlowWarning

Loss = Callable[[Tensor], Tensor]


class Problem(nn.Module):
    """A model with its data and loss: calling it gives the loss."""

    def __init__(self, model: nn.Module, x: Tensor, loss: Loss, penalty: float = 0.0) -> None:
        super().__init__()
        self.model, self.x, self.loss, self.penalty = model, x, loss, penalty

    def forward(self) -> Tensor:
        """The loss."""
        loss = self.loss(self.model(self.x))
        if self.penalty:
            loss = loss + self.penalty * sum(p.pow(2).sum() for p in self.model.parameters())
        return loss


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        """x + f(x)."""
        return x + self.inner(x)


class LastState(nn.Module):
    """A linear readout of a recurrent network's last output."""

    def __init__(self, recurrent: nn.Module, size: int) -> None:
        super().__init__()
        self.recurrent, self.readout = recurrent, nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The readout."""
        return self.readout(self.recurrent(x)[0][:, -1])


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Encoded and decoded."""
        return torch.tanh(self.encoder(x)) @ self.encoder.weight


class Shared(nn.Sequential):
    """One layer under two names."""

    def __init__(self) -> None:
        layer = nn.Linear(4, 4)
        super().__init__(layer, nn.Softplus(), layer)


def mse(y: Tensor) -> Loss:
    """Mean squared error with target ``y``."""
    return lambda prediction: F.mse_loss(prediction, y)


def normal(*shape: int) -> Tensor:
    """Gaussian float64 data."""
    return torch.randn(*shape, dtype=torch.float64)


def mlp(*between: nn.Module, n_out: int = 1) -> nn.Sequential:
    """4 inputs, 5 hidden neurons."""
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, n_out))


def frozen() -> Problem:
    """An MLP whose first layer does not learn."""
    model = mlp(nn.Softplus(), nn.Linear(5, 5), nn.Tanh())
    model[0].requires_grad_(False)
    return Problem(model, normal(20, 4), mse(normal(20, 1)))


def normalised(layer: nn.Module) -> Problem:
    """An MLP with a normalisation layer."""
    model = mlp(layer, nn.Softplus())
    problem = Problem(model, normal(20, 4), mse(normal(20, 1)))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return problem


def transformer() -> Problem:
    """A transformer's layer in training mode, without dropout."""
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, activation=F.gelu, batch_first=True)
    return Problem(layer, normal(6, 3, 4), mse(normal(6, 3, 4)))


def penalised() -> Problem:
    """An MLP with a weight penalty."""
    return Problem(mlp(nn.Softplus()), normal(20, 4), mse(normal(20, 1)), penalty=0.05)


@dataclass(frozen=True)
class Case:
    """A problem, and whether its closure is expected to be warned of."""

    build: Callable[[], Problem]
    warns: bool = False


CASES = {
    "mlp softplus mse": Case(lambda: Problem(mlp(nn.Softplus()), normal(20, 4), mse(normal(20, 1)))),
    "mlp tanh cross-entropy": Case(
        lambda: Problem(mlp(nn.Tanh(), n_out=3), normal(20, 4), lambda z: F.cross_entropy(z, torch.arange(20) % 3))
    ),
    "mlp silu bce": Case(
        lambda: Problem(
            mlp(nn.SiLU()), normal(20, 4), lambda z: nn.BCEWithLogitsLoss()(z[:, 0], (torch.arange(20) % 2).double())
        )
    ),
    "mlp gelu huber": Case(
        lambda: Problem(mlp(nn.GELU()), normal(20, 4), lambda z: F.huber_loss(z, torch.full((20, 1), 1.3).double(), delta=0.7))
    ),
    "conv1d": Case(
        lambda: Problem(
            nn.Sequential(nn.Conv1d(2, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 1)),
            normal(8, 2, 6),
            mse(normal(8, 1)),
        )
    ),
    "conv2d": Case(
        lambda: Problem(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)),
            normal(8, 1, 6, 6),
            lambda z: F.cross_entropy(z, torch.arange(8) % 2),
        )
    ),
    "layer norm": Case(lambda: normalised(nn.LayerNorm(5))),
    "layer norm in a residual": Case(
        lambda: Problem(
            nn.Sequential(nn.Linear(4, 4), Residual(nn.LayerNorm(4), nn.Linear(4, 4), nn.Softplus())),
            normal(20, 4),
            mse(normal(20, 4)),
        )
    ),
    "batch norm, batch statistics": Case(lambda: normalised(nn.BatchNorm1d(5)), warns=True),
    "batch norm, running statistics": Case(lambda: normalised(nn.BatchNorm1d(5).eval())),
    "batch norm without statistics": Case(lambda: normalised(nn.BatchNorm1d(5, track_running_stats=False))),
    "group norm": Case(
        lambda: Problem(
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Softplus(), nn.Flatten(), nn.Linear(16, 1)),
            normal(8, 2, 6),
            mse(normal(8, 1)),
        )
    ),
    "instance norm": Case(
        lambda: Problem(
            nn.Sequential(nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)),
            normal(8, 2, 6),
            mse(normal(8, 1)),
        )
    ),
    "lstm": Case(lambda: Problem(LastState(nn.LSTM(2, 3, batch_first=True), 3), normal(6, 4, 2), mse(normal(6, 1)))),
    "gru": Case(lambda: Problem(LastState(nn.GRU(2, 3, batch_first=True), 3), normal(6, 4, 2), mse(normal(6, 1)))),
    "transformer": Case(transformer),
    "embedding": Case(
        lambda: Problem(
            nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)),
            torch.arange(20).reshape(10, 2) % 5,
            mse(normal(10, 1)),
        )
    ),
    "tied by transposition": Case(lambda: Problem(Tied(), normal(20, 4), mse(normal(20, 4)))),
    "one layer twice": Case(lambda: Problem(Shared(), normal(20, 4), mse(normal(20, 4)))),
    "frozen layer": Case(frozen),
    "weight penalty": Case(penalised),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str) -> Problem:
    """The problem of a case, in float64."""
    return CASES[name].build().double()


def expectation(name: str) -> Any:
    """The context in which a case's closure is opened."""
    return pytest.warns(GradientFlowWarning, match="statistics") if CASES[name].warns else nullcontext()


def as_function(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of the flat vector of the trainable parameters, and that vector."""
    named = {name: p for name, p in problem.named_parameters() if p.requires_grad}

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        values = {n: part.view_as(p).to(p.dtype) for (n, p), part in zip(named.items(), parts, strict=True)}
        # A copy, because torch 2.13's functional_call does not put back the parameters of a layer with two names.
        return torch.func.functional_call(copy.deepcopy(problem), values, ())

    return loss, torch.cat([p.detach().reshape(-1).double() for p in named.values()])


def reference(problem: Problem) -> Tensor:
    """The Hessian by looped double backward, with torch alone."""
    loss, theta = as_function(problem)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, theta)


@pytest.mark.parametrize("engine", ["auto", "replay", "closure"])
@pytest.mark.parametrize("name", CASES)
def test_hessian_is_that_of_looped_double_backward(name: str, engine: Any) -> None:
    """Of any closure, through either engine, to 1e-11; and products with vectors are those of the Hessian."""
    problem = build(name)
    parameters = trainable(problem)
    with expectation(name):
        opened = open_it(closure_of(parameters, problem), parameters, engine=engine)
    assert opened.engine == engine or (engine == "auto" and opened.engine in RECORDED), opened.reason
    wanted = reference(problem)
    found = opened.objective.hessian(opened.theta)
    assert distance(found, wanted) <= 1e-11
    assert torch.equal(found, found.T)
    vectors = normal(len(wanted), 3)
    products = opened.objective.hvp(opened.theta, vectors)
    assert products.shape == vectors.shape
    assert distance(products, wanted @ vectors) <= 1e-11
    assert distance(opened.objective.hvp(opened.theta, vectors[:, 0]), wanted @ vectors[:, 0]) <= 1e-11


@pytest.mark.parametrize("name", CASES)
def test_engines_agree(name: str) -> None:
    """Loss, gradient and Hessian–vector product of the replay are those of the closure, also elsewhere."""
    problem = build(name)
    parameters = trainable(problem)
    closure = closure_of(parameters, problem)
    with expectation(name):
        replay = open_it(closure, parameters, engine="replay")
    with expectation(name):
        again = open_it(closure, parameters, engine="closure")
    theta = elsewhere(replay.theta)
    loss, gradient = replay.objective.loss_and_gradient(theta)
    for other in (again.objective.loss_and_gradient(theta), called_at(closure, parameters, theta)):
        assert distance(loss, other[0]) <= 1e-13
        assert distance(gradient, other[1]) <= 1e-12
    direction = normal(len(theta))
    found, wanted = replay.objective.hvp(theta, direction), again.objective.hvp(theta, direction)
    assert distance(found, wanted) <= 1e-11


@pytest.mark.parametrize("name", ["layer norm", "batch norm without statistics", "group norm"])
def test_a_wrong_path_of_torch_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were ``torch.func.hessian`` our first path, it would be rejected exactly where it is wrong."""
    problem = build(name)
    parameters = trainable(problem)
    loss, theta = as_function(problem)
    wanted = reference(problem)
    torch_is_right = distance(torch.func.hessian(loss)(theta), wanted) <= 1e-6

    def hessian_of_torch(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
        return torch.func.hessian(term)(theta) @ columns

    monkeypatch.setitem(function._BY_PATH, "torch.func", hessian_of_torch)
    with expectation(name):
        objective = open_it(closure_of(parameters, problem), parameters, engine="replay").objective
    assert distance(objective.hessian(theta), wanted) <= 1e-11
    assert isinstance(objective, FunctionObjective)
    assert (objective.second_derivatives == "torch.func") == torch_is_right


def quartic(theta: Tensor) -> Tensor:
    """A function with a Hessian that is easily written down: 3 θᵢ² on the diagonal, and 1 everywhere."""
    return theta.pow(4).sum() / 4 + theta.sum() ** 2 / 2


def objective_of(term: Callable[[Tensor], Tensor], n: int) -> FunctionObjective:
    """A single term on the CPU in float64."""
    return FunctionObjective(lambda: (term,), n, torch.float64, torch.device("cpu"))


def off_by_a_little(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
    """Products that are wrong in a way that keeps shapes and symmetry."""
    return 1.01 * function._looped_double_backward(term, theta, columns)


def failing(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
    """A path that torch does not support."""
    raise RuntimeError("not implemented for this function")


@pytest.mark.parametrize("broken", [off_by_a_little, failing])
def test_the_next_path_serves_where_one_is_wrong(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order; each result is that of a right path."""
    theta = normal(6)
    wanted = torch.diag(3 * theta**2) + 1
    for wrong, chosen in zip([None, *function.PATHS[:-1]], function.PATHS, strict=True):
        if wrong is not None:
            monkeypatch.setitem(function._BY_PATH, wrong, broken)
        objective = objective_of(quartic, 6)
        assert distance(objective.hessian(theta), wanted) <= 1e-14
        assert objective.second_derivatives == chosen


def test_no_right_path_is_an_error_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing unconfirmed is ever returned."""
    monkeypatch.setitem(function._BY_PATH, "torch.func", failing)
    monkeypatch.setitem(function._BY_PATH, "batched double backward", off_by_a_little)
    monkeypatch.setitem(function._BY_PATH, "double backward", off_by_a_little)
    objective = objective_of(quartic, 6)
    with pytest.raises(DerivativeError, match=r"torch.func: not implemented.*batched double backward: off by 9\.9e-03.*not "):
        objective.hessian(normal(6))
    with pytest.raises(DerivativeError):
        objective.hvp(normal(6), normal(6))


def test_a_path_is_confirmed_anew_for_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was right for a model in evaluation mode need not be right for the same model in training mode."""
    right = function._BY_PATH["torch.func"]
    x, y = normal(20, 4), torch.arange(20) % 3
    model = mlp(nn.BatchNorm1d(5), nn.Tanh(), n_out=3).double().eval()
    parameters = trainable(model)

    def wrong_in_training(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
        return (1.2 if model.training else 1.0) * right(term, theta, columns)

    monkeypatch.setitem(function._BY_PATH, "torch.func", wrong_in_training)
    optimizer = NewtonPolish(parameters, max_iter=1, certificate=False)
    closure = closure_of(parameters, lambda: F.cross_entropy(model(x), y))
    optimizer.step(closure)
    assert optimizer._memory.second_derivatives == "torch.func"
    model.train()
    optimizer.step(closure)
    assert optimizer._memory.second_derivatives == "batched double backward"


def test_memory_bound_makes_smaller_batches_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large activations or a small bound mean few vectors at a time, and the same Hessian."""
    widths: list[int] = []

    def watched(path: Any) -> Any:
        def products(term: Callable[[Tensor], Tensor], theta: Tensor, columns: Tensor) -> Tensor:
            widths.append(columns.shape[1])
            return path(term, theta, columns)

        return products

    for name, path in list(function._BY_PATH.items()):
        monkeypatch.setitem(function._BY_PATH, name, watched(path))
    model = mlp(nn.Softplus()).double()
    parameters = trainable(model)

    def hessian(n_samples: int) -> tuple[Tensor, int]:
        x = torch.sin(torch.arange(4 * n_samples, dtype=torch.float64)).reshape(-1, 4)
        opened = open_it(closure_of(parameters, lambda: F.mse_loss(model(x), x[:, :1])), parameters, engine="replay")
        opened.objective.hvp(opened.theta, opened.theta)
        widths.clear()
        result = opened.objective.hessian(opened.theta)
        assert sum(widths) == len(result)
        return result, max(widths)

    whole, width = hessian(1000)
    assert width == len(whole)
    monkeypatch.setattr(function, "CHUNK_BYTES", 4 * 2**20)
    parts, narrower = hessian(1000)
    assert 4 < narrower < width
    assert distance(parts, whole) <= 1e-14
    assert hessian(4000)[1] <= narrower // 3
    monkeypatch.setattr(function, "CHUNK_BYTES", 1)
    single, one = hessian(1000)
    assert one == 1
    assert distance(single, whole) <= 1e-14


@pytest.mark.parametrize("engine", ["replay", "closure"])
def test_several_floating_types(engine: Any) -> None:
    """A float32 layer inside a float64 model: θ is float64, and derivatives are as exact as that layer."""

    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    class CastBack(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model = nn.Sequential(
        nn.Linear(4, 3).double(), nn.Softplus(), Cast(), nn.Linear(3, 3), nn.Tanh(), CastBack(), nn.Linear(3, 1).double()
    )
    problem = Problem(model, normal(20, 4), mse(normal(20, 1)))
    parameters = trainable(problem)
    opened = open_it(closure_of(parameters, problem), parameters, engine=engine)
    assert opened.theta.dtype == torch.float64
    wanted = reference(problem)
    assert distance(opened.objective.hessian(opened.theta), wanted) <= 1e-5
    loss, gradient = opened.objective.loss_and_gradient(elsewhere(opened.theta))
    wanted_loss, wanted_gradient = called_at(closure_of(parameters, problem), parameters, elsewhere(opened.theta))
    assert distance(loss, wanted_loss) <= 1e-12
    assert distance(gradient, wanted_gradient) <= 1e-6


@pytest.mark.parametrize("engine", ["replay", "closure"])
def test_parameter_that_the_loss_does_not_use(engine: Any) -> None:
    """Its ``.grad`` stays None, its rows of the Hessian are zero."""
    problem = build("mlp softplus mse")
    unused = nn.Parameter(normal(3))
    parameters = [unused, *trainable(problem)]
    opened = open_it(closure_of(parameters, problem), parameters, engine=engine)
    hessian = opened.objective.hessian(opened.theta)
    assert unused.grad is None
    assert not opened.gradient[:3].any()
    assert not hessian[:3].any()
    assert distance(hessian[3:, 3:], reference(problem)) <= 1e-11
    opened.finish(opened.theta)
    assert unused.grad is None


@pytest.mark.parametrize("engine", ["replay", "closure"])
def test_piecewise_linear_and_linear_models(engine: Any) -> None:
    """A ReLU network away from its kinks, and a loss that is linear in some parameters."""
    relu = Problem(mlp(nn.ReLU()), normal(20, 4), mse(normal(20, 1))).double()
    linear = Problem(nn.Linear(4, 1), normal(20, 4), lambda z: z.mean()).double()
    for problem in (relu, linear):
        parameters = trainable(problem)
        opened = open_it(closure_of(parameters, problem), parameters, engine=engine)
        found, wanted = opened.objective.hessian(opened.theta), reference(problem)
        assert float((found - wanted).abs().max()) <= 1e-12


def test_nothing_is_left_in_a_mode() -> None:
    """Evaluations neither switch grad mode, nor warn, nor leave graphs on what they return."""
    problem = build("transformer")
    parameters = trainable(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_it(closure_of(parameters, problem), parameters)
    with torch.no_grad():
        results = [
            *opened.objective.loss_and_gradient(opened.theta),
            opened.objective.hvp(opened.theta, opened.theta),
            opened.objective.hessian(opened.theta),
        ]
        assert not torch.is_grad_enabled()
    assert not any(r.requires_grad for r in results)
    assert torch.backends.cuda.flash_sdp_enabled()
