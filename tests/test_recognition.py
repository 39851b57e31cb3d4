"""Which losses are recognised as those of multi-layer perceptrons, and that all others are left alone: right, or not used."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opening import called_at, closure_of, distance, elsewhere, open_it, vector
from problems import flat, make_closure, teacher_student
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import (
    ClosureError,
    GradientFlow,
    GradientFlowWarning,
    ModuleObjective,
    NewtonPolish,
    gradient,
    hessian,
    hessian_spectrum,
    hvp,
    integrate,
    minimize,
    register_activation,
)

N = 12
# What two engines may differ by after a few steps: rounding, and what the choice of steps makes of it.
SAME = 1e-9
NOT_ONE = "it is not recognised as the loss of a multi-layer perceptron"
LOOKS_LIKE = "looks like that of a multi-layer perceptron"

Loss = Callable[[], Tensor]


class Problem(NamedTuple):
    """Parameters, and the loss as a function of their present values."""

    parameters: list[Tensor]
    loss: Loss


class Data:
    """Some float64 data of each kind, the same for each test."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.x, self.y, self.many = randn(N, 3), randn(N, 1), randn(N, 4)
        self.classes = torch.arange(N) % 4
        self.weights = torch.rand(N, generator=g, dtype=torch.float64)
        self.by_class = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
        self.yes = (self.y > 0).double()
        self.mask = self.y[:, 0] > 0


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters()]


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, n_outputs: int = 1, *more: nn.Module, seed: int = 0) -> nn.Sequential:
    """3-5-4-n, the second layer without biases."""
    torch.manual_seed(seed)
    hidden = (nn.Linear(3, 5), activation(), nn.Linear(5, 4, bias=False), activation())
    return nn.Sequential(*hidden, nn.Linear(4, n_outputs), *more).double()


def small(n_outputs: int = 1, activation: Callable[[], nn.Module] = nn.Tanh, *, seed: int = 0) -> nn.Sequential:
    """3-5-n."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, n_outputs)).double()


def matrices(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.5 * torch.randn(*shape, generator=g, dtype=torch.float64)) for shape in shapes]


def of_one(loss: Callable[[nn.Sequential, Data], Tensor]) -> Callable[[Data], Problem]:
    """A loss of the 3-5-4-1 network."""

    def problem(d: Data) -> Problem:
        model = mlp()
        return Problem(parameters_of(model), lambda: loss(model, d))

    return problem


def of_four(loss: Callable[[nn.Sequential, Data], Tensor]) -> Callable[[Data], Problem]:
    """A loss of a 3-5-4-4 network."""

    def problem(d: Data) -> Problem:
        model = mlp(nn.GELU, 4)
        return Problem(parameters_of(model), lambda: loss(model, d))

    return problem


def of_matrices(loss: Callable[[Tensor, Tensor, Tensor, Data], Tensor], *, bias: int = 5) -> Callable[[Data], Problem]:
    """A loss of W_1 (3 × 5), b_1 and W_2 (1 × 5)."""

    def problem(d: Data) -> Problem:
        w1, b1, w2 = matrices((3, 5), (bias,), (1, 5))
        return Problem([w2, w1, b1], lambda: loss(w1, b1, w2, d))

    return problem


def with_module(make: Callable[[], nn.Module], *, trained: bool = True) -> Callable[[Data], Problem]:
    """The mean squared error of a module on 3 inputs and 1 output."""

    def problem(d: Data) -> Problem:
        torch.manual_seed(0)
        model = make().double().train(trained)
        return Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))

    return problem


def closure_for(problem: Problem) -> Callable[[], Tensor]:
    return closure_of(problem.parameters, problem.loss)


# What is recognised


def residual_times_itself(model: nn.Module, d: Data) -> Tensor:
    r = model(d.x) - d.y
    return (r * r).mean()


def in_chunks(model: nn.Module, d: Data) -> Tensor:
    return F.mse_loss(model(d.x[:5]), d.y[:5]) / 2 + F.mse_loss(model(d.x[5:]), d.y[5:]) / 2


def stacked_chunks(model: nn.Module, d: Data) -> Tensor:
    return torch.stack([F.mse_loss(model(a), b) for a, b in zip(d.x.split(5), d.y.split(5), strict=True)]).mean()


def difference_of_chunks(model: nn.Module, d: Data) -> Tensor:
    """Still positive weights."""
    return F.mse_loss(model(d.x[:5]), d.y[:5]) - (-0.5) * F.mse_loss(model(d.x[5:]), d.y[5:])


def by_neuron(z: Tensor) -> Tensor:
    return torch.cat([torch.tanh(z[:, :2]), torch.relu(z[:, 2:4]), z[:, 4:]], dim=1)


def cubic(z: Tensor) -> Tensor:
    return 1 - 2 * z + 0.5 * z**3


def squared(z: Tensor) -> Tensor:
    return z * z


def quartic(z: Tensor) -> Tensor:
    return (z - 0.5).pow(2) * (1 + z) / 3 - z.square()


def cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def sigmoid_softplus(z: Tensor) -> Tensor:
    return torch.sigmoid(4 * z) + F.softplus(z)


def errors(model: nn.Module, d: Data) -> Tensor:
    """Squared, one column per output."""
    return (model(d.x) - d.many) ** 2


def in_sequences(d: Data) -> Tensor:
    """The inputs as three sequences of four."""
    return d.x.view(3, 4, 3)


def dropouts(*, p: float, trained: bool) -> Callable[[Data], Problem]:
    """Dropout wherever it can stand, more than once in a row, in place too."""

    def problem(d: Data) -> Problem:
        m = small()

        def drop(z: Tensor, *, inplace: bool = False) -> Tensor:
            return F.alpha_dropout(F.dropout(z, p, trained, inplace), p, trained)

        def loss() -> Tensor:
            hidden = drop(torch.tanh(drop(m[0](drop(d.x)))), inplace=True)
            return drop(F.mse_loss(drop(drop(F.linear(hidden, drop(m[2].weight), m[2].bias)).flatten()), d.y[:, 0]))

        return Problem(parameters_of(m), loss)

    return problem


def dropout_by_neuron(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    z = F.dropout(d.x @ w1 + b1, training=False)
    z = torch.cat([torch.tanh(z[:, :2]), torch.dropout(z[:, 2:], 0.5, False)], dim=1)
    return F.mse_loss((z @ w2.T)[:, 0], d.y[:, 0])


def decayed(model: nn.Module, d: Data) -> Tensor:
    return F.mse_loss(model(d.x), d.y) + 1e-3 * sum(p.square().sum() for p in model.parameters())


def norms(model: nn.Module, d: Data) -> Tensor:
    return F.mse_loss(model(d.x), d.y) + 0.1 * torch.stack([p.norm() ** 2 for p in model.parameters()]).sum()


def frozen_first(d: Data) -> Problem:
    model = mlp()
    model[0].requires_grad_(False)
    return Problem([p for p in model.parameters() if p.requires_grad], lambda: F.mse_loss(model(d.x), d.y))


def frozen_in_the_middle(d: Data) -> Problem:
    model = mlp()
    model[2].requires_grad_(False)
    return Problem([p for p in model.parameters() if p.requires_grad], lambda: F.mse_loss(model(d.x), d.y))


def frozen_bias(d: Data) -> Problem:
    model = mlp()
    model[4].bias.requires_grad_(False)
    return Problem([p for p in model.parameters() if p.requires_grad], lambda: F.mse_loss(model(d.x), d.y))


def frozen_transposed(d: Data) -> Problem:
    w1, b1, w2 = (p.detach() for p in matrices((3, 5), (5,), (4, 5)))
    (w3,) = matrices((1, 4))
    return Problem([w3], lambda: F.mse_loss(torch.tanh(torch.tanh(d.x @ w1 + b1) @ w2.T) @ w3.T, d.y))


def penalty(model: nn.Module) -> Tensor:
    return 0.1 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def scaled_frozen(d: Data) -> Problem:
    """In another order than the layers, with one of them frozen between factors."""
    w1, b1, w3 = matrices((3, 5), (5,), (1, 4))
    w2 = matrices((4, 5))[0].detach()
    return Problem([w3, b1, w1], lambda: F.mse_loss(2 * torch.tanh(torch.erf(-(d.x @ w1 + b1)) @ w2.T / 3) @ w3.T, d.y))


def hooked_forward(d: Data) -> Problem:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))


def input_that_requires_gradients(d: Data) -> Problem:
    model = mlp()
    x = d.x.clone().requires_grad_()
    return Problem(parameters_of(model), lambda: F.mse_loss(model(x), d.y))


def parameters_in_another_order(d: Data) -> Problem:
    model = mlp()
    return Problem(parameters_of(model)[::-1], lambda: F.mse_loss(model(d.x), d.y))


def activation_layer(make: Callable[[], nn.Module]) -> Callable[[Data], Problem]:
    def problem(d: Data) -> Problem:
        model = mlp(make)
        return Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))

    return problem


RECOGNISED: dict[str, Callable[[Data], Problem]] = {
    "mse_loss": of_one(lambda m, d: F.mse_loss(m(d.x), d.y)),
    "target first": of_one(lambda m, d: F.mse_loss(d.y, m(d.x))),
    "by hand": of_one(lambda m, d: ((m(d.x) - d.y) ** 2).mean()),
    "halved, divided, the other way round": of_one(lambda m, d: 0.5 * (d.y - m(d.x)).pow(2).sum() / N),
    "residual times itself": of_one(residual_times_itself),
    "square": of_one(lambda m, d: torch.square(m(d.x) - d.y).mean()),
    "negative of negative": of_one(lambda m, d: F.mse_loss(m(d.x), d.y).neg().neg()),
    "penalties from a tensor that is zero": of_one(
        lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * sum(((p**2).sum() for p in m.parameters()), start=torch.zeros(()))
    ),
    "squeezed": of_one(lambda m, d: F.mse_loss(m(d.x).squeeze(-1), d.y[:, 0])),
    "column": of_one(lambda m, d: F.mse_loss(m(d.x)[:, 0], d.y[:, 0])),
    "column by ellipsis": of_one(lambda m, d: F.mse_loss(m(d.x)[..., 0], d.y[:, 0])),
    "flattened": of_one(lambda m, d: F.mse_loss(m(d.x).flatten(), d.y.flatten())),
    "weights": of_one(lambda m, d: (d.weights[:, None] * (m(d.x) - d.y) ** 2).mean()),
    "weights and reduction none": of_one(
        lambda m, d: (d.weights * F.mse_loss(m(d.x)[:, 0], d.y[:, 0], reduction="none")).sum()
    ),
    "weight 0": of_one(lambda m, d: ((d.weights > 0.5).double()[:, None] * (m(d.x) - d.y) ** 2).mean()),
    "factor as a tensor": of_one(lambda m, d: F.mse_loss(m(d.x), d.y) * torch.tensor(0.3, dtype=torch.float64)),
    "in chunks": of_one(in_chunks),
    "stacked chunks": of_one(stacked_chunks),
    "difference of chunks": of_one(difference_of_chunks),
    "sum by Python": of_one(lambda m, d: sum(F.mse_loss(m(a), b) for a, b in zip(d.x.split(5), d.y.split(5), strict=True))),
    "mean of sums": of_four(lambda m, d: errors(m, d).sum(1).mean()),
    "mean of sums, last dimension": of_four(lambda m, d: errors(m, d).sum(dim=-1, keepdim=True).mean(axis=0).squeeze()),
    "sum of means": of_four(lambda m, d: errors(m, d).mean(1).sum()),
    "sum of means over samples": of_four(lambda m, d: torch.sum(torch.mean(errors(m, d), dim=0))),
    "mean of halves of sums": of_four(lambda m, d: (0.5 * errors(m, d).sum(1)).mean() / 3),
    "weights between two reductions": of_four(lambda m, d: (d.weights * errors(m, d).sum(1)).mean()),
    "weighted mean of sums": of_four(lambda m, d: (errors(m, d).sum(1) * d.weights).sum() / d.weights.sum()),
    "divided by weights": of_four(lambda m, d: (errors(m, d).mean(-1) / (1 + d.weights)).sum()),
    "scalar product with weights": of_four(lambda m, d: d.weights @ errors(m, d).sum(1)),
    "dot with weights": of_four(lambda m, d: torch.dot(errors(m, d).sum(1), d.weights)),
    "weights twice": of_four(lambda m, d: (d.weights * (d.weights[:, None] * errors(m, d)).sum(1)).sum(0)),
    "all dimensions by name": of_four(lambda m, d: errors(m, d).sum(dim=(0, 1))),
    "mean of a mean": of_one(lambda m, d: F.mse_loss(m(d.x), d.y).mean()),
    "some samples' losses": of_four(lambda m, d: errors(m, d)[d.mask].sum(1).mean()),
    "the first samples' losses": of_four(lambda m, d: F.mse_loss(m(d.x), d.many, reduction="none")[:5].mean()),
    "weights broadcast over samples by mistake": of_one(lambda m, d: (d.weights * (m(d.x) - d.y) ** 2).mean()),
    "sequences": of_four(lambda m, d: F.mse_loss(m(in_sequences(d)), d.many.view(3, 4, 4))),
    "sequences, weights by sequence": of_four(
        lambda m, d: (
            d.weights[:3, None] * F.huber_loss(m(in_sequences(d)), d.many.view(3, 4, 4), reduction="none").sum(2)
        ).mean()
    ),
    "sequences, last element left out": of_four(
        lambda m, d: ((m(in_sequences(d)) - d.many.view(3, 4, 4)) ** 2)[:, :-1].sum(-1).mean()
    ),
    "sequences of classes, flattened": of_four(
        lambda m, d: F.cross_entropy(m(in_sequences(d)).flatten(0, 1), d.classes.view(3, 4).flatten())
    ),
    "sequences of classes, reshaped": of_four(
        lambda m, d: F.cross_entropy(
            m(in_sequences(d)).reshape(-1, 4), d.classes, weight=d.by_class, ignore_index=1, label_smoothing=0.1
        )
    ),
    "sequences of classes, by length": of_four(
        lambda m, d: (
            F.cross_entropy(m(in_sequences(d)).contiguous().view(-1, 4), d.classes, reduction="none").view(3, 4).sum(1).mean()
        )
    ),
    "sequences of classes, nll": of_four(
        lambda m, d: F.nll_loss(F.log_softmax(m(in_sequences(d)).view(N, 4), dim=-1), d.classes, weight=d.by_class)
    ),
    "sequences of classes, probabilities": of_four(
        lambda m, d: F.cross_entropy(m(in_sequences(d)).flatten(end_dim=1), d.many.softmax(1), reduction="sum")
    ),
    "huber": of_one(lambda m, d: F.huber_loss(m(d.x), d.y, delta=0.5)),
    "smooth L1": of_one(lambda m, d: F.smooth_l1_loss(m(d.x), d.y, beta=0.5, reduction="sum")),
    "HuberLoss": of_one(lambda m, d: nn.HuberLoss(delta=0.7)(m(d.x), d.y)),
    "binary": of_one(
        lambda m, d: F.binary_cross_entropy_with_logits(
            m(d.x).flatten(), d.yes[:, 0], pos_weight=torch.tensor(2.0, dtype=torch.float64), weight=d.weights
        )
    ),
    "binary, soft targets": of_one(lambda m, d: F.binary_cross_entropy_with_logits(m(d.x), d.y.sigmoid(), reduction="sum")),
    "cross entropy": of_four(lambda m, d: F.cross_entropy(m(d.x), d.classes)),
    "cross entropy, summed": of_four(lambda m, d: F.cross_entropy(m(d.x), d.classes, reduction="sum")),
    "cross entropy, label weights": of_four(
        lambda m, d: F.cross_entropy(m(d.x), d.classes, weight=d.by_class, label_smoothing=0.1, ignore_index=2)
    ),
    "cross entropy, probabilities": of_four(
        lambda m, d: F.cross_entropy(m(d.x), d.many.softmax(1), weight=d.by_class, label_smoothing=0.1)
    ),
    "cross entropy, sample weights": of_four(
        lambda m, d: (F.cross_entropy(m(d.x), d.classes, weight=d.by_class, reduction="none") * d.weights).mean()
    ),
    "cross entropy, ignored and per sample": of_four(
        lambda m, d: F.cross_entropy(m(d.x), d.classes, ignore_index=1, reduction="none").mean()
    ),
    "nll of log_softmax": of_four(lambda m, d: F.nll_loss(F.log_softmax(m(d.x), dim=1), d.classes, weight=d.by_class)),
    "several outputs": of_four(lambda m, d: F.mse_loss(m(d.x), d.many, reduction="sum")),
    "several outputs, flat": of_four(lambda m, d: F.mse_loss(m(d.x).reshape(-1), d.many.reshape(-1))),
    "several outputs, binary": of_four(
        lambda m, d: F.binary_cross_entropy_with_logits(m(d.x), d.many.sigmoid(), pos_weight=d.by_class)
    ),
    "batches of rows": of_four(lambda m, d: F.mse_loss(m(d.x.view(3, 4, 3)), d.many.view(3, 4, 4))),
    "one sample, no batch": of_one(lambda m, d: F.mse_loss(m(d.x[0]), d.y[0])),
    "transposed data": of_one(lambda m, d: F.mse_loss(m(d.x.T.contiguous().T), d.y)),
    "expanded data": of_one(lambda m, d: F.mse_loss(m(d.x[:1].expand(N, 3)), d.y)),
    "output activation": lambda d: Problem(parameters_of(m := mlp(nn.Tanh, 1, nn.Sigmoid())), lambda: F.mse_loss(m(d.x), d.y)),
    "forward hook that doubles": hooked_forward,
    "scaled inside": of_one(lambda m, d: F.mse_loss(m[4](torch.tanh(m[2](torch.sigmoid(-m[0](d.x))) / 3)), d.y)),
    "scaled everywhere": of_one(
        lambda m, d: F.mse_loss(-2 * m[4](3 * F.gelu(0.5 * m[2](torch.tanh(2 * m[0](d.x)) / 7)) * 0.5), d.y)
    ),
    "scaled, with decay": of_one(lambda m, d: F.mse_loss(3 * m[2:](torch.tanh(2 * m[0](d.x))), d.y) + penalty(m)),
    "scaled linear layer": of_one(lambda m, d: F.mse_loss(m[4](2 * m[2](m[:2](d.x))), d.y)),
    "scaled polynomial": of_matrices(lambda w1, b1, w2, d: F.mse_loss(-0.1 * (cubic(d.x @ w1 + b1) @ w2.T), d.y)),
    "scaled normal cdf": of_matrices(lambda w1, b1, w2, d: F.mse_loss(3 * (cdf(2 * (d.x @ w1 + b1)) @ w2.T), d.y)),
    "scaled, frozen and transposed": scaled_frozen,
    "linear": lambda d: Problem(parameters_of(m := nn.Linear(3, 1).double()), lambda: F.mse_loss(m(d.x), d.y)),
    "nested modules": with_module(lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.SiLU()), nn.Linear(4, 1))),
    "dropout in evaluation mode": with_module(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1)), trained=False
    ),
    "dropout before the activation": with_module(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 1), nn.AlphaDropout(0.2)),
        trained=False,
    ),
    "dropout everywhere, in evaluation mode": dropouts(p=0.5, trained=False),
    "dropout everywhere, with probability 0": dropouts(p=0.0, trained=True),
    "dropout of some neurons, in evaluation mode": of_matrices(dropout_by_neuron),
    "ReLU in place": with_module(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 1))),
    "matmul": of_matrices(lambda w1, b1, w2, d: ((torch.tanh(d.x @ w1 + b1) @ w2.T - d.y) ** 2).mean()),
    "addmm": of_matrices(lambda w1, b1, w2, d: ((torch.relu(torch.addmm(b1, d.x, w1)).mm(w2.t()) - d.y) ** 2).mean()),
    "transposed twice": of_matrices(
        lambda w1, b1, w2, d: F.mse_loss(torch.tanh(F.linear(d.x, w1.T, b1)) @ w2.permute(1, 0), d.y)
    ),
    "normal cdf": of_matrices(lambda w1, b1, w2, d: F.mse_loss(cdf(d.x @ w1 + b1) @ w2.T, d.y)),
    "special.ndtr": of_matrices(lambda w1, b1, w2, d: F.mse_loss(torch.special.ndtr(d.x @ w1 + b1) @ w2.T, d.y)),
    "erf": of_matrices(lambda w1, b1, w2, d: F.mse_loss(torch.erf(d.x @ w1 + b1) @ w2.T, d.y)),
    "sigmoid and softplus": of_matrices(lambda w1, b1, w2, d: F.mse_loss(sigmoid_softplus(d.x @ w1 + b1) @ w2.T, d.y)),
    "square activation": of_matrices(lambda w1, b1, w2, d: F.mse_loss(squared(d.x @ w1 + b1) @ w2.T, d.y)),
    "cube": of_matrices(lambda w1, b1, w2, d: F.mse_loss((d.x @ w1 + b1) ** 3 @ w2.T, d.y)),
    "polynomial": of_matrices(lambda w1, b1, w2, d: F.mse_loss(cubic(d.x @ w1 + b1) @ w2.T, d.y)),
    "quartic": of_matrices(lambda w1, b1, w2, d: F.mse_loss(quartic(d.x @ w1 + b1) @ w2.T, d.y)),
    "by neuron": of_matrices(lambda w1, b1, w2, d: F.mse_loss(by_neuron(d.x @ w1 + b1) @ w2.T, d.y)),
    "weight decay": of_one(decayed),
    "squared norms": of_one(norms),
    "decay of one matrix": of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * (m[0].weight ** 2).mean()),
    "frozen first layer": frozen_first,
    "frozen in the middle": frozen_in_the_middle,
    "frozen bias": frozen_bias,
    "frozen and transposed": frozen_transposed,
    "input that requires gradients": input_that_requires_gradients,
    "parameters in another order": parameters_in_another_order,
    **{
        f"activation {i}": activation_layer(make)
        for i, make in enumerate(
            [
                *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid),
                *(nn.Softsign, nn.Identity, lambda: nn.GELU(approximate="tanh"), lambda: nn.Softplus(2.0, 10.0)),
                *(lambda: nn.LeakyReLU(0.2, inplace=True), lambda: nn.ELU(1.5), lambda: nn.CELU(0.5)),
            ]
        )
    },
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised_and_exact(name: str) -> None:
    """Loss, gradient and Hessian are the closure's own, and those of the replay, at the start and elsewhere."""
    problem = RECOGNISED[name](Data())
    closure = closure_for(problem)
    opened = open_it(closure, problem.parameters)
    assert opened.engine == "perceptron"
    replay = open_it(closure, problem.parameters, engine="replay")
    assert replay.engine == "replay"
    for theta in (opened.theta, elsewhere(opened.theta, 0.3)):
        wanted = called_at(closure, problem.parameters, theta)
        for objective in (opened.objective, replay.objective):
            found = objective.loss_and_gradient(theta)
            assert distance(found[0], wanted[0]) <= 1e-12
            assert distance(found[1], wanted[1]) <= 1e-12
        exact = replay.objective.hessian(theta)
        found = opened.objective.hessian(theta)
        assert distance(found, exact) <= 1e-11
        assert distance(opened.objective.hvp(theta, exact[:, :3]), exact @ exact[:, :3]) <= 1e-11


def test_several_backward_calls_are_one_perceptron() -> None:
    d, model = Data(), mlp()

    def closure() -> Tensor:
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for i, j in ((0, 1), (1, 5), (5, 7), (7, N)):
            loss = F.mse_loss(model(d.x[i:j]), d.y[i:j]) * (j - i) / N
            loss.backward()
            total = total + loss.detach()
        return total

    opened = open_it(closure, parameters_of(model))
    assert opened.engine == "perceptron"
    wanted = called_at(
        closure_of(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y)), parameters_of(model), opened.theta
    )
    assert distance(opened.objective.loss_and_gradient(opened.theta)[1], wanted[1]) <= 1e-13


# What is not


def tied(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    return F.mse_loss(torch.tanh(d.x @ w1 + b1) @ w1.T, d.x) + 0.0 * w2.square().sum()


def used_twice(d: Data) -> Problem:
    torch.manual_seed(0)
    layer, last = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    return Problem(parameters_of(layer, last), lambda: F.mse_loss(last(torch.tanh(layer(torch.tanh(layer(d.x))))), d.y))


def detached_weight(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(F.linear(m[:4](d.x), m[4].weight.detach(), m[4].bias), d.y)


def skip(m: nn.Sequential, d: Data) -> Tensor:
    h = m[1](m[0](d.x))
    return F.mse_loss(m[4](m[3](m[2](h) + h[:, :4])), d.y)


def activation_plus_argument(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    z = d.x @ w1 + b1
    return F.mse_loss((torch.tanh(z) + z) @ w2.T, d.y)


def dense_skip(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    return F.mse_loss(torch.cat([torch.tanh(d.x @ w1 + b1)[:, :2], d.x], dim=1) @ w2.T, d.y)


def wrong_slices(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    z = d.x @ w1 + b1
    return F.mse_loss(torch.cat([torch.tanh(z[:, 2:]), torch.relu(z[:, :2])], 1) @ w2.T, d.y)


def overlapping_slices(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    z = d.x @ w1 + b1
    return F.mse_loss(torch.cat([torch.tanh(z[:, :2]), torch.relu(z[:, 1:4])], 1) @ w2.T, d.y)


def every_other_column(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    z = d.x @ w1 + b1
    return F.mse_loss(torch.cat([torch.tanh(z[:, ::2]), torch.relu(z[:, 1::2])], 1) @ w2.T, d.y)


def slices_of_two_layers(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    return F.mse_loss(torch.cat([torch.tanh((d.x @ w1)[:, :2]), torch.relu((d.x @ w1)[:, 2:] + b1[2:])], 1) @ w2.T, d.y)


def two_losses(m: nn.Sequential, d: Data) -> Tensor:
    out = m(d.x)
    return F.mse_loss(out[:, :1], d.y) + F.huber_loss(out[:, 1:2], d.y)


def two_kinds_of_loss(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m(d.x[:5]), d.y[:5]) + F.huber_loss(m(d.x[5:]), d.y[5:])


def two_activations(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m[4](m[:4](d.x[:5])), d.y[:5]) + F.mse_loss(m[4](torch.sigmoid(m[2](m[:2](d.x[5:])))), d.y[5:])


def part_of_the_network(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m(d.x), d.y) + F.mse_loss(m[0](d.x), d.many[:, [0, 1, 2, 3, 0]])


def two_networks(d: Data) -> Problem:
    one, other = small(), small(seed=1)
    return Problem(parameters_of(one, other), lambda: F.mse_loss(one(d.x[:5]), d.y[:5]) + F.mse_loss(other(d.x[5:]), d.y[5:]))


def committee(d: Data) -> Problem:
    one, other = small(), small(seed=1)
    return Problem(parameters_of(one, other), lambda: F.mse_loss(one(d.x) + other(d.x), d.y))


def penalty_on_activations(m: nn.Sequential, d: Data) -> Tensor:
    h = m[:4](d.x)
    return F.mse_loss(m[4](h), d.y) + 0.1 * h.square().mean()


def target_detached(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m(d.x), m(d.x.flip(0)).detach())


def target_moving(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m(d.x), m(d.x.flip(0)))


def in_place_twice(m: nn.Sequential, d: Data) -> Tensor:
    z = m[0](d.x)
    z.mul_(2.0)
    return F.mse_loss(m[1:](z), d.y) + 0.1 * F.mse_loss(z, torch.ones_like(z))


def added_in_place(m: nn.Sequential, d: Data) -> Tensor:
    h = m[0](d.x)
    h += torch.sin(d.x[:, :1])
    return F.mse_loss(m[1:](h), d.y)


def column_set(m: nn.Sequential, d: Data) -> Tensor:
    h = m[0](d.x)
    h[:, 0] = 0.0
    return F.mse_loss(m[1:](h), d.y)


def relu_in_place_of_what_is_used(m: nn.Sequential, d: Data) -> Tensor:
    z = m[0](d.x)
    h = F.relu(z, inplace=True)
    return F.mse_loss(m[2:](h), d.y) + 0.1 * F.mse_loss(z, torch.ones_like(z))


def gradient_penalty(m: nn.Sequential, d: Data) -> Tensor:
    x = d.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    return F.mse_loss(m(d.x), d.y) + slope.square().mean()


def maxout(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m[4](m[2](m[0](d.x)).view(N, 4, 1).max(dim=2).values), d.y)


class Straight(torch.autograd.Function):
    """tanh, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return torch.tanh(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class OwnTanh(torch.autograd.Function):
    """tanh itself."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(value := torch.tanh(z))
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return gradients[0] * (1 - value * value)


class Recurrent(nn.Module):
    """An LSTM over the three inputs, and a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.unsqueeze(-1))[0][:, -1])


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 2, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.unsqueeze(1))).flatten(1))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Bilinear(3, 3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x, x)))


class Scaled(nn.Module):
    """A learnt factor for each hidden neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale)


def between(make: Callable[[], nn.Module]) -> Callable[[Data], Problem]:
    """A module between two linear layers."""
    return with_module(lambda: nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 1)))


def scaled_in_one_loss(m: nn.Sequential, d: Data) -> Tensor:
    return F.mse_loss(m(d.x[:5]), d.y[:5]) + F.mse_loss(m[1:](2 * m[0](d.x[5:])), d.y[5:])


class SlicedInTime(nn.Module):
    """What acts on slices along the second of three dimensions looks like what acts on some of the neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.view(3, 4, 3))
        return self.last(torch.cat([torch.tanh(z[:, :2]), torch.relu(z[:, 2:])], dim=1)).view(N, 1)


def clipped(m: nn.Sequential, d: Data) -> Tensor:
    """In place, where nothing is clipped at the start."""
    h = m[0](d.x)
    h[h > 3.0] = 3.0
    return F.mse_loss(m[1:](h), d.y)


def learnt_scale(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    return F.mse_loss(torch.tanh(b1 * (d.x @ w1)) @ w2.T, d.y)


def learnt_weight_of_the_loss(w1: Tensor, b1: Tensor, w2: Tensor, d: Data) -> Tensor:
    return F.mse_loss(torch.tanh(d.x @ w1) @ w2.T, d.y) * b1


class LookAlike(NamedTuple):
    """A problem that is no perceptron's, and what the error says that ``engine="perceptron"`` gets."""

    problem: Callable[[Data], Problem]
    reason: str


ALREADY_USED = "a parameter is used more than once, or not at all"
NO_LAYER = "is neither an affine map nor a known activation"
LOOK_ALIKES: dict[str, LookAlike] = {
    "tied weights": LookAlike(of_matrices(tied), ALREADY_USED),
    "layer used twice": LookAlike(used_twice, ALREADY_USED),
    "detached weight": LookAlike(of_one(detached_weight), "detach|" + ALREADY_USED),
    "detached hidden layer": LookAlike(
        of_one(lambda m, d: F.mse_loss(m[2:](m[:2](d.x).detach()), d.y)), "detach|" + ALREADY_USED
    ),
    "scaled after the last activation": LookAlike(
        of_one(lambda m, d: F.mse_loss(2 * torch.sigmoid(m(d.x)), d.y)), "the last activation gives is multiplied by a number"
    ),
    "shifted before an activation": LookAlike(of_one(lambda m, d: F.mse_loss(m[1:](m[0](d.x) + 0.5), d.y)), NO_LAYER),
    "shifted after an activation": LookAlike(of_one(lambda m, d: F.mse_loss(m[2:](2 * m[:2](d.x) - 1), d.y)), NO_LAYER),
    "scaled by neuron": LookAlike(of_one(lambda m, d: F.mse_loss(m[1:](m[0](d.x) * d.weights[:5]), d.y)), f"mul {NO_LAYER}"),
    "scaled by sample": LookAlike(of_one(lambda m, d: F.mse_loss(m[1:](m[0](d.x) * d.weights[:, None]), d.y)), "mul"),
    "scaled by itself": LookAlike(of_one(lambda m, d: F.mse_loss(m[1:](m[0](d.x) / m[0](d.x).detach().norm()), d.y)), "div"),
    "scaled differently in two losses": LookAlike(of_one(scaled_in_one_loss), "of different networks, or of different losses"),
    "some neurons, scaled": LookAlike(
        of_four(lambda m, d: F.cross_entropy(torch.cat([2 * m(d.x)[:, :3]], dim=1), d.classes % 3)), "slices do not cover"
    ),
    "skip connection": LookAlike(of_one(skip), NO_LAYER),
    "activation plus its argument": LookAlike(of_matrices(activation_plus_argument), f"add {NO_LAYER}"),
    "inputs joined to a layer": LookAlike(of_matrices(dense_skip), "cat joins"),
    "slices in another order": LookAlike(of_matrices(wrong_slices), "the slices of a layer do not follow one another"),
    "overlapping slices": LookAlike(of_matrices(overlapping_slices), "the slices of a layer do not follow one another"),
    "every other column": LookAlike(of_matrices(every_other_column), "cat joins"),
    "slices of two layers": LookAlike(of_matrices(slices_of_two_layers), "cat joins"),
    "layer norm": LookAlike(between(lambda: nn.LayerNorm(4)), f"layer_norm {NO_LAYER}"),
    "softmax inside": LookAlike(between(lambda: nn.Softmax(dim=1)), f"softmax {NO_LAYER}"),
    "hardtanh": LookAlike(between(nn.Hardtanh), f"hardtanh {NO_LAYER}"),
    "ReLU6": LookAlike(between(nn.ReLU6), NO_LAYER),
    "PReLU": LookAlike(between(nn.PReLU), "prelu"),
    "GLU": LookAlike(with_module(lambda: nn.Sequential(nn.Linear(3, 4), nn.GLU(), nn.Linear(2, 1))), f"glu {NO_LAYER}"),
    "hardswish": LookAlike(between(nn.Hardswish), f"hardswish {NO_LAYER}"),
    "abs": LookAlike(of_one(lambda m, d: F.mse_loss(m[2:](m[0](d.x).abs()), d.y)), f"abs {NO_LAYER}"),
    "sin": LookAlike(of_one(lambda m, d: F.mse_loss(m[2:](torch.sin(m[0](d.x))), d.y)), f"sin {NO_LAYER}"),
    "clamp": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x).clamp(-1, 1), d.y)), f"clamp {NO_LAYER}"),
    "root of sums": LookAlike(of_four(lambda m, d: errors(m, d).sum(1).sqrt().mean()), "the mean of sqrt is not a known loss"),
    "square of sums": LookAlike(
        of_four(lambda m, d: ((m(d.x) - d.many).sum(1) ** 2).mean()), "is not a difference of output and target.*sum"
    ),
    "largest of sums": LookAlike(of_four(lambda m, d: errors(m, d).sum(1).amax()), "ends with amax"),
    "largest of means": LookAlike(of_four(lambda m, d: errors(m, d).amax(1).mean()), "the mean of amax"),
    "product of losses": LookAlike(of_four(lambda m, d: errors(m, d).mean(0).prod()), "ends with prod"),
    "logarithm of sums": LookAlike(of_four(lambda m, d: errors(m, d).sum(1).log1p().sum()), "the sum of log1p"),
    "mean of norms": LookAlike(of_four(lambda m, d: torch.linalg.vector_norm(m(d.x) - d.many, dim=1).mean()), "linalg_vector"),
    "weights of outputs between": LookAlike(
        of_four(lambda m, d: (errors(m, d).sum(0) * d.by_class).mean()), "outputs of one sample are weighted differently"
    ),
    "losses of some outputs": LookAlike(
        of_four(lambda m, d: errors(m, d)[:, :2].sum(1).mean()), "outputs of one sample are weighted differently"
    ),
    "weights of elements": LookAlike(
        of_four(lambda m, d: (d.many.abs() * errors(m, d)).sum(1).mean()), "outputs of one sample are weighted differently"
    ),
    "weights that are losses": LookAlike(
        of_four(lambda m, d: (errors(m, d).sum(1) * errors(m, d).detach().sum(1)).mean()), "the mean of mul"
    ),
    "losses divided by losses": LookAlike(
        of_four(lambda m, d: (d.weights / (1 + errors(m, d).sum(1))).mean()), "the mean of (div|__rdiv__|__rtruediv__|mul)"
    ),
    "losses rounded down": LookAlike(
        of_four(lambda m, d: (errors(m, d).sum(1) + torch.div(errors(m, d), 2.0, rounding_mode="trunc").sum(1)).mean()), "add"
    ),
    "weights that become negative": LookAlike(
        of_four(lambda m, d: ((d.weights - 0.5) * errors(m, d).sum(1)).mean()), "negative weight"
    ),
    "scale that is a parameter": LookAlike(of_matrices(learnt_scale), f"mul {NO_LAYER}"),
    "loss times a parameter": LookAlike(of_matrices(learnt_weight_of_the_loss, bias=1), "ends with mul"),
    "sequences, time first": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d)).transpose(0, 1).reshape(-1, 4), d.classes)),
        f"transpose {NO_LAYER}",
    ),
    "sequences, classes second": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d)).transpose(1, 2), d.classes.view(3, 4))),
        f"transpose {NO_LAYER}",
    ),
    "sequences, time taken for classes": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d)), d.classes.view(3, 4))), "not one class"
    ),
    "sequences, time and classes joined": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d)).flatten(1), d.classes[:3])),
        "the classes of the loss are not the network's outputs",
    ),
    "sequences, classes cut in two": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d)).view(-1, 2), d.classes.repeat(2) % 2)),
        "the classes of the loss are not the network's outputs",
    ),
    "sequences, last element": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d))[:, -1], d.classes[:3])), f"__getitem__ {NO_LAYER}"
    ),
    "sequences, first element": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d))[:, 0], d.classes[:3])), "uses a part of the output only"
    ),
    "sequences, averaged": LookAlike(
        of_four(lambda m, d: F.cross_entropy(m(in_sequences(d)).mean(1), d.classes[:3])), f"mean {NO_LAYER}"
    ),
    "sequences, joined before the last layer": LookAlike(
        of_one(lambda m, d: F.mse_loss(m[4](m[:4](in_sequences(d)).mean(1)), d.y[:3])), f"mean {NO_LAYER}"
    ),
    "slices along time": LookAlike(with_module(SlicedInTime), "cat joins slices of something else than a matrix"),
    "log_softmax in another type": LookAlike(
        of_four(lambda m, d: F.nll_loss(torch.log_softmax(m(d.x), 1, torch.float64), d.classes)), "log_softmax"
    ),
    "clipped in place": LookAlike(of_one(clipped), "is used 3 times"),
    "maximum over a dimension": LookAlike(of_one(maxout), "has several results|max|value"),
    "LSTM": LookAlike(with_module(Recurrent), "lstm|several results|__getitem__"),
    "convolution": LookAlike(with_module(Convolutional), f"flatten {NO_LAYER}"),
    "bilinear": LookAlike(with_module(Bilinear), f"bilinear {NO_LAYER}"),
    "einsum": LookAlike(
        of_one(lambda m, d: F.mse_loss(torch.einsum("ni,oi->no", m[:4](d.x), m[4].weight) + m[4].bias, d.y)), "einsum"
    ),
    "learnt factor": LookAlike(with_module(Scaled), f"mul {NO_LAYER}"),
    "weight norm": LookAlike(
        with_module(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1))),
        "a weight matrix is made by",
    ),
    "masked weights": LookAlike(
        of_matrices(lambda w1, b1, w2, d: F.mse_loss(torch.tanh(d.x @ (w1 * (d.x[:3, :1] > 0)) + b1) @ w2.T, d.y)),
        "a weight matrix is made by mul",
    ),
    "scaled bias": LookAlike(
        of_matrices(lambda w1, b1, w2, d: F.mse_loss(torch.tanh(d.x @ w1 + 2 * b1) @ w2.T, d.y)), "add|a bias is made by"
    ),
    "bias of each sample": LookAlike(
        of_matrices(lambda w1, b1, w2, d: F.mse_loss(torch.tanh(d.x @ w1 + b1[:, None]) @ w2.T, d.y), bias=N), "add|bias"
    ),
    "one bias for all": LookAlike(
        of_matrices(lambda w1, b1, w2, d: F.mse_loss(torch.tanh(d.x @ w1 + b1) @ w2.T, d.y), bias=1), r"shape \(1,\)"
    ),
    "features first": LookAlike(
        of_matrices(lambda w1, b1, w2, d: F.mse_loss(w2 @ torch.tanh(w1.T @ d.x.T + b1[:, None]), d.y.T)),
        "a weight matrix is made by tanh",
    ),
    "samples mixed by a transpose": LookAlike(
        of_four(lambda m, d: F.mse_loss(m(d.x).T.flatten(), d.many.flatten())), f"T {NO_LAYER}"
    ),
    "samples mixed by a transpose and a reshape": LookAlike(
        of_four(lambda m, d: F.mse_loss(m(d.x).T.reshape(N, 4), d.many)), f"T {NO_LAYER}"
    ),
    "reshape between layers": LookAlike(
        of_one(lambda m, d: F.mse_loss(m[4](m[:4](d.x).T.reshape(N, 4)), d.y)), f"reshape {NO_LAYER}"
    ),
    "some samples of the output": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x)[d.mask], d.y[d.mask])), f"__getitem__ {NO_LAYER}"
    ),
    "the output expanded": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x).expand(N, 4), d.many)), f"expand {NO_LAYER}"),
    "broadcasting by mistake": LookAlike(of_one(lambda m, d: ((m(d.x) - d.y[:, 0]) ** 2).mean()), "the target another"),
    "two losses of two outputs": LookAlike(of_four(two_losses), "used 2 times|__getitem__"),
    "two kinds of loss": LookAlike(of_one(two_kinds_of_loss), "of different networks, or of different losses"),
    "two activations": LookAlike(of_one(two_activations), "of different networks, or of different losses"),
    "loss of a hidden layer": LookAlike(of_one(part_of_the_network), "different networks"),
    "two networks": LookAlike(two_networks, "different networks"),
    "sum of two networks": LookAlike(committee, f"add {NO_LAYER}"),
    "L1 penalty": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 1e-3 * m[0].weight.abs().sum()), "the sum of abs is not a known loss"
    ),
    "norm penalty": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * m[0].weight.norm()), "ends with norm"),
    "penalty on a sum": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * m[0].weight.sum() ** 2), "ends with (pow|__pow__)"
    ),
    "penalty to the fourth": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * (m[0].weight ** 4).sum()), "pow"),
    "penalty on a part": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * m[0].weight[0].square().sum()), "square|__getitem__"
    ),
    "penalty towards somewhere": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * (m[0].weight - 1).square().sum()),
        "a parameter enters the loss by itself",
    ),
    "parameter in the loss": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 0.1 * m[4].bias.sum()), "a parameter enters the loss by itself"
    ),
    "penalty on activations": LookAlike(of_one(penalty_on_activations), "the mean of square is not a known loss"),
    "gradient penalty": LookAlike(of_one(gradient_penalty), "."),
    "detached target": LookAlike(of_one(target_detached), "both depend on the parameters"),
    "target of the same network": LookAlike(of_one(target_moving), "both depend on the parameters"),
    "loss divided by a norm": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y) / m[0].weight.norm()), "ends with div"),
    "loss times its own scale": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.y) * m(d.x).detach().square().mean()), "ends with mul"
    ),
    "root of the loss": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y).sqrt()), "ends with sqrt"),
    "logarithm of the loss": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y).log1p()), "ends with log1p"),
    "square of the loss": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y) ** 2), "ends with"),
    "a constant added": LookAlike(of_one(lambda m, d: F.mse_loss(m(d.x), d.y) + 1.0), "is added to the loss"),
    "flooding": LookAlike(of_one(lambda m, d: (F.mse_loss(m(d.x), d.y) - 0.1).abs() + 0.1), "is added to the loss|abs"),
    "weights per output": LookAlike(
        of_four(lambda m, d: (d.by_class * (m(d.x) - d.many) ** 2).mean()), "outputs of one sample are weighted differently"
    ),
    "negative weights": LookAlike(
        of_one(lambda m, d: ((d.weights[:, None] - 0.5) * (m(d.x) - d.y) ** 2).mean()), "negative weight"
    ),
    "a loss subtracted": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x[:5]), d.y[:5]) - F.mse_loss(m(d.x[5:]), d.y[5:])), "negative weight"
    ),
    "the loss's negative": LookAlike(of_one(lambda m, d: -F.mse_loss(m(d.x), d.y)), "negative weight"),
    "integer targets": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x), d.classes[:, None])), "the target is not a tensor of numbers"
    ),
    "a number as target": LookAlike(of_one(lambda m, d: ((m(d.x) - 1.0) ** 2).mean()), "is not a known loss|target"),
    "no target": LookAlike(of_one(lambda m, d: (m(d.x) ** 2).mean()), "is not a difference of output and target"),
    "L1 loss": LookAlike(of_one(lambda m, d: F.l1_loss(m(d.x), d.y)), "ends with l1_loss"),
    "smooth L1 with a kink": LookAlike(of_one(lambda m, d: F.smooth_l1_loss(m(d.x), d.y, beta=0.0)), "has kinks"),
    "log cosh": LookAlike(of_one(lambda m, d: torch.log(torch.cosh(m(d.x) - d.y)).mean()), "the mean of log"),
    "Poisson": LookAlike(of_one(lambda m, d: F.poisson_nll_loss(m(d.x), d.yes)), "ends with poisson_nll_loss"),
    "Kullback-Leibler": LookAlike(
        of_four(lambda m, d: F.kl_div(F.log_softmax(m(d.x), 1), d.many.softmax(1), reduction="batchmean")), "ends with"
    ),
    "negative probabilities": LookAlike(of_four(lambda m, d: F.cross_entropy(m(d.x), d.many)), "is negative"),
    "binary targets beyond 0 and 1": LookAlike(
        of_one(lambda m, d: F.binary_cross_entropy_with_logits(m(d.x), 3 * d.y)), "not between 0 and 1"
    ),
    "classes along the samples": LookAlike(
        of_four(lambda m, d: F.nll_loss(F.log_softmax(m(d.x), dim=0), d.classes)), r"log_softmax\(…, dim=1\)"
    ),
    "nll of probabilities": LookAlike(of_four(lambda m, d: F.nll_loss(m(d.x).softmax(1), d.classes)), "log_softmax"),
    "in place, and used twice": LookAlike(of_one(in_place_twice), "."),
    "added in place": LookAlike(of_one(added_in_place), "writes in place"),
    "column set in place": LookAlike(of_one(column_set), "is used 2 times"),
    "rectified in place, and used": LookAlike(of_one(relu_in_place_of_what_is_used), "used 2 times|."),
    "cast in between": LookAlike(
        of_one(lambda m, d: F.mse_loss(m(d.x).to(torch.float32).double(), d.y)), f"(to|double) {NO_LAYER}"
    ),
    "noise on the input of a layer": LookAlike(
        of_one(lambda m, d: F.mse_loss(m[2:](m[1](m[0](d.x)) + d.x[:, :1]), d.y)), "add"
    ),
}
# Their loss or gradient is not a function that two calls of the closure would agree on, or cannot be recorded.
DETACHED = {"detached hidden layer", "detached target", "loss times its own scale", "weights that are losses"}


def drive(optimizer: GradientFlow, problem: Problem, mode: str, n: int = 2) -> list[str]:
    """Some steps, by closure or in a plain loop; the engines that served."""
    engines = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    for _ in range(n):
        if mode == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        engines.append(optimizer.stats.engine)
    return engines


def reference(problem: Problem, mode: str, **options: Any) -> Tensor:
    """θ where the flow ends without closed forms."""
    start = [p.detach().clone() for p in problem.parameters]
    try:
        drive(GradientFlow(problem.parameters, engine="replay", **options), problem, mode)
    except ClosureError:
        with torch.no_grad():
            for p, value in zip(problem.parameters, start, strict=True):
                p.copy_(value)
        drive(GradientFlow(problem.parameters, engine="closure", **options), problem, mode)
    return vector(problem.parameters, problem.parameters, torch.float64)


@pytest.mark.parametrize("mode", ["closure", "loop"])
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_not_recognised(name: str, mode: str) -> None:
    """The flow is that of the other engines, without a word about perceptrons; asked for, the reason is said."""
    make, reason = LOOK_ALIKES[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        problem = make(Data())
        engines = drive(GradientFlow(problem.parameters, lr=0.05, rtol=1e-4, method="dopri5"), problem, mode)
        wanted = reference(make(Data()), mode, lr=0.05, rtol=1e-4, method="dopri5")
    assert "perceptron" not in engines
    assert distance(vector(problem.parameters, problem.parameters, torch.float64), wanted) <= SAME
    messages = [str(w.message) for w in said]
    assert not any("perceptron" in message for message in messages)
    assert (messages != []) == (name in DETACHED), messages
    asked = GradientFlow((problem := make(Data())).parameters, lr=0.1, engine="perceptron", check=False)
    start = vector(problem.parameters, problem.parameters, torch.float64)
    with pytest.raises(ClosureError, match=f"engine='perceptron' was asked for.*({reason})"):
        drive(asked, problem, mode)
    assert torch.equal(vector(problem.parameters, problem.parameters, torch.float64), start)


# Known to be left alone, because no two calls agree, or because of what is recorded


@pytest.mark.parametrize("mode", ["closure", "loop"])
def test_dropout_in_training_mode(mode: str) -> None:
    torch.manual_seed(0)
    d, model = Data(), nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)).double()
    problem = Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))
    optimizer = GradientFlow(model.parameters(), lr=0.1)
    if mode == "closure":
        with pytest.raises(ClosureError, match="stochastic"):
            drive(optimizer, problem, mode)
    else:
        with pytest.warns(GradientFlowWarning, match="one gradient per call"):
            drive(optimizer, problem, mode)
    assert optimizer.stats.engine != "perceptron"


def test_batch_norm_in_both_modes() -> None:
    d = Data()
    for trained in (False, True):
        problem = with_module(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)), trained=trained
        )(d)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientFlowWarning)
            engines = drive(GradientFlow(problem.parameters, lr=0.1), problem, "closure")
        assert "perceptron" not in engines
        closure = closure_for(problem)
        with pytest.raises(ClosureError, match=f"batch_norm {NO_LAYER}|several results"):
            open_it(closure, problem.parameters, engine="perceptron", check=False)


@pytest.mark.parametrize("mode", ["closure", "loop"])
def test_autocast_is_not_recognised(mode: str) -> None:
    d, model = Data(), small().float()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(d.x.float())
        return F.mse_loss(out.float(), d.y.float())

    problem = Problem(parameters_of(model), loss)
    optimizer = GradientFlow(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)  # two digits do not tell whether it is a gradient
        assert "perceptron" not in drive(optimizer, problem, mode)


@pytest.mark.parametrize("function", [Straight, OwnTanh])
def test_autograd_functions(function: Any) -> None:
    """What an own Function computes is not seen; the flow is that of ``.grad``."""
    d = Data()

    def problem() -> Problem:
        m = mlp()
        return Problem(parameters_of(m), lambda: F.mse_loss(m[2:](function.apply(m[0](d.x))), d.y))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = problem()
        engines = drive(GradientFlow(found.parameters, lr=0.1), found, "closure")
        wanted = reference(problem(), "closure", lr=0.1)
    assert "perceptron" not in engines
    assert distance(vector(found.parameters, found.parameters, torch.float64), wanted) <= SAME
    assert not any("perceptron" in str(w.message) for w in said)


@pytest.mark.parametrize("what", ["hook", "clipping"])
def test_gradients_changed_after_backward(what: str) -> None:
    """``.grad`` is not that of the recorded loss, nor of the perceptron."""
    d = Data()

    def flow(engine: Any) -> tuple[Tensor, str]:
        model = mlp()
        optimizer = GradientFlow(model.parameters(), lr=0.1, engine=engine)
        if what == "hook":
            model[0].weight.register_hook(lambda g: 2 * g)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(d.x), d.y)
            loss.backward()
            if what == "clipping":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return loss

        optimizer.step(closure)
        return flat(model), optimizer.stats.engine

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, engine = flow("auto")
        wanted, _ = flow("closure")
    assert engine == "closure"
    assert distance(found, wanted) <= SAME
    assert not any("perceptron" in str(w.message) for w in said)


@pytest.mark.parametrize("mode", ["closure", "loop"])
def test_target_under_no_grad(mode: str) -> None:
    """In a loop it is held fixed within a step, like data; in a closure it is part of what is replayed."""
    d = Data()

    def problem() -> Problem:
        m = mlp()

        def loss() -> Tensor:
            with torch.no_grad():
                target = m(d.x.flip(0))
            return F.mse_loss(m(d.x), target)

        return Problem(parameters_of(m), loss)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientFlowWarning)
        found = problem()
        engines = drive(GradientFlow(found.parameters, lr=0.1), found, mode, 3)
        wanted = problem()
        drive(GradientFlow(wanted.parameters, lr=0.1, engine="replay"), wanted, mode, 3)
    assert ("perceptron" in engines) == (mode == "loop")
    assert distance(*(vector(p.parameters, p.parameters, torch.float64) for p in (found, wanted))) <= SAME


# Steps that are recognised, while what surrounds them changes


def loop_of(
    model: nn.Module, optimizer: GradientFlow, mode: str, engines: list[str]
) -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """A function that does one step on the sum of some losses, with one backward for each."""

    def step(losses: Callable[[], Sequence[Tensor]]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for loss in losses():
                loss.backward()
                total = total + loss.detach()
            return total

        if mode == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        engines.append(optimizer.stats.engine)

    return step


Step = Callable[[Callable[[], Sequence[Tensor]]], None]


def data_changed_in_place(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(4):
        step(lambda: [F.mse_loss(model(d.x), d.y)])
        d.x.mul_(1.1) if i % 2 else d.y.add_(0.1)


def data_changed_through_numpy(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    """Which no version counter tells."""
    for i in range(4):
        step(lambda: [F.mse_loss(model(d.x), d.y)])
        (d.x if i % 2 else d.y).numpy()[i] += 0.5


def one_column_changed_through_numpy(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    """Data of a single sample, or with a single column, need no transposition: that they are copied all the same."""
    x, y = d.x[:1].clone(), d.y[:1].clone()
    for i in range(4):
        step(lambda: [F.mse_loss(model(x), y)])
        y.numpy()[0] += 0.1 * i


def targets_replaced(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(4):
        y = d.y * (1 + i)
        step(lambda y=y: [F.mse_loss(model(d.x), y)])  # type: ignore[misc]


def the_same_data_anew(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for _ in range(4):
        step(lambda: [F.mse_loss(model(d.x.clone()), d.y.clone())])


def weights_changed(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(4):
        step(lambda: [(d.weights[:, None] * (model(d.x) - d.y) ** 2).mean()])
        d.weights[i] = 0.0


def factor_changed(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(4):
        step(lambda i=i: [(1 + i) * F.mse_loss(model(d.x), d.y) + 0.01 * i * model[0].weight.square().sum()])  # type: ignore[misc]


def parameters_moved_by_hand(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for _ in range(4):
        step(lambda: [F.mse_loss(model(d.x), d.y)])
        with torch.no_grad():
            model[2].weight.mul_(0.9)


def chunks(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    ends = ((0, 1), (1, 5), (5, 7), (7, N))
    for _ in range(3):
        step(lambda: [F.mse_loss(model(d.x[i:j]), d.y[i:j]) * (j - i) / N for i, j in ends])


def mini_batches(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for _ in range(2):
        for x, y in DataLoader(TensorDataset(d.x, d.y), batch_size=5):
            step(lambda x=x, y=y: [F.mse_loss(model(x), y)])  # type: ignore[misc]


def frozen_layer_moved_by_hand(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    model[0].requires_grad_(False)
    for _ in range(3):
        step(lambda: [F.mse_loss(model(d.x), d.y)])
        model[0].weight.mul_(0.9)


def requires_grad_toggled(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(4):
        model[2].requires_grad_(i % 2 == 0)
        step(lambda: [F.mse_loss(model(d.x), d.y)])


def loss_changed(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(4):
        step(lambda i=i: [F.mse_loss(model(d.x), d.y) if i % 2 else F.huber_loss(model(d.x), d.y, delta=0.3)])  # type: ignore[misc]


def activation_changed(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for activation in (nn.Tanh(), nn.Softplus(), nn.Softplus(beta=2.0), nn.Tanh()):
        model[1] = activation
        step(lambda: [F.mse_loss(model(d.x), d.y)])


def rate_changed(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    for i in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + i)
        step(lambda: [F.mse_loss(model(d.x), d.y)])


def one_layer_stops(model: nn.Sequential, d: Data, step: Step, optimizer: GradientFlow) -> None:
    """Its lr is 0 from the second step on."""
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    for _ in range(3):
        step(lambda: [F.mse_loss(model(d.x), d.y)])
        optimizer.param_groups[1]["lr"] = 0.0


CHANGES = [
    *(data_changed_in_place, data_changed_through_numpy, one_column_changed_through_numpy, targets_replaced),
    *(the_same_data_anew, weights_changed, factor_changed, parameters_moved_by_hand, chunks, mini_batches),
    *(frozen_layer_moved_by_hand, requires_grad_toggled, loss_changed, activation_changed, rate_changed, one_layer_stops),
]
Scenario = Callable[[nn.Sequential, Data, Step, GradientFlow], None]


@pytest.mark.parametrize("mode", ["closure", "loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps(change: Scenario, mode: str) -> None:
    """Every step is recognised, and the flow is that of the replay."""
    ends = []
    for engine in ("auto", "replay"):
        d, model = Data(), small()
        moving = model[0].parameters() if change is one_layer_stops else model.parameters()
        optimizer = GradientFlow(moving, lr=0.1, engine=engine, method="dopri5")  # type: ignore[arg-type]
        engines: list[str] = []
        change(model, d, loop_of(model, optimizer, mode, engines), optimizer)
        assert set(engines) == {"perceptron" if engine == "auto" else "replay"}
        ends.append(flat(model))
    assert distance(*ends) <= SAME


OPTIONS: dict[str, dict[str, Any]] = {
    "weight decay": {"weight_decay": 0.1},
    "barrier": {"max_norm": 0.01},
    "maximize": {"maximize": True, "weight_decay": 1.0},
    "no check": {"check": False},
    "dopri8": {"method": "dopri8"},
}


@pytest.mark.parametrize("mode", ["closure", "loop"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, mode: str) -> None:
    ends = []
    for engine in ("perceptron", "replay"):
        d, model = Data(), small()
        problem = Problem(parameters_of(model), lambda: F.huber_loss(model(d.x), d.y))  # noqa: B023
        assert drive(GradientFlow(model.parameters(), lr=0.1, engine=engine, **OPTIONS[name]), problem, mode) == [engine] * 2
        ends.append(flat(model))
    assert distance(*ends) <= SAME


@pytest.mark.parametrize("mode", ["closure", "loop"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_groups_in_another_order_than_the_layers(frozen: int | None, mode: str) -> None:
    """Each with its own lr, one of them 0."""
    ends = []
    for engine in ("perceptron", "replay"):
        d, model = Data(), small()
        rates = [0.05, 0.2] if frozen is None else [0.0 if i == frozen else 0.1 for i in range(2)]
        groups = [
            {"params": [model[2].bias, model[0].weight], "lr": rates[0]},
            {"params": [model[0].bias, model[2].weight], "lr": rates[1], "weight_decay": 0.1},
        ]
        problem = Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))  # noqa: B023
        start = flat(model)
        assert drive(GradientFlow(groups, engine=engine), problem, mode) == [engine] * 2  # type: ignore[arg-type]
        ends.append(flat(model))
        still = [p for g in groups if g["lr"] == 0.0 for p in g["params"]]  # type: ignore[attr-defined]
        before = dict(zip(map(id, model.parameters()), start.split([p.numel() for p in model.parameters()]), strict=True))
        assert all(torch.equal(p.detach().reshape(-1), before[id(p)]) for p in still)
    assert distance(*ends) <= SAME


@pytest.mark.parametrize("mode", ["closure", "loop"])
def test_float64_master_copy_of_a_float32_model(mode: str) -> None:
    """The flow of the same numbers in float64, rounded once per step."""
    ends = []
    for wide in (True, False):
        d, model = Data(), small().float()
        x, y = d.x.float(), d.y.float()
        if not wide:
            model, x, y = model.double(), x.double(), y.double()
        problem = Problem(parameters_of(model), lambda: F.mse_loss(model(x), y))  # noqa: B023
        optimizer = GradientFlow(model.parameters(), lr=0.1, dtype=torch.float64)
        assert drive(optimizer, problem, mode, 3) == ["perceptron"] * 3
        ends.append(optimizer.state[model[0].weight]["theta"] if wide else model[0].weight.detach())
    assert distance(*ends) <= SAME


@pytest.mark.parametrize("mode", ["closure", "loop"])
def test_float32(mode: str) -> None:
    ends = []
    for engine in ("perceptron", "replay"):
        d, model = Data(), small().float()
        x, y = d.x.float(), d.y.float()
        problem = Problem(parameters_of(model), lambda: F.mse_loss(model(x), y))  # noqa: B023
        assert drive(GradientFlow(model.parameters(), lr=0.1, engine=engine), problem, mode, 3) == [engine] * 3
        ends.append(flat(model))
    assert distance(*ends) <= 1e-5


# What engine= means


@pytest.mark.parametrize("mode", ["closure", "loop"])
@pytest.mark.parametrize("engine", ["auto", "perceptron", "replay", "closure"])
def test_engine(engine: Any, mode: str) -> None:
    """Of a recognised problem: the one that is asked for serves; without a closure, "closure" has one gradient per call."""
    d, model = Data(), small()
    problem = Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))
    optimizer = GradientFlow(model.parameters(), lr=0.1, engine=engine)
    served = drive(optimizer, problem, mode)
    if engine == "closure":
        assert served == ["closure" if mode == "closure" else "fallback"] * 2
        assert "engine='closure' was asked for" in optimizer.stats.engine_reason
    else:
        assert served == ["perceptron" if engine == "auto" else engine] * 2
        assert optimizer.stats.engine_reason == ""


def test_engine_perceptron_needs_a_record() -> None:
    with pytest.raises(ValueError, match="record=False leaves engine='perceptron' nothing"):
        GradientFlow(small().parameters(), engine="perceptron", record=False)


@pytest.mark.parametrize("engine", ["auto", "perceptron", "replay"])
def test_newton_polish(engine: Any) -> None:
    """The same minimum by all engines; one that is not recognised is refused by name, and nothing moves."""
    d, model = Data(), small()
    optimizer = NewtonPolish(model.parameters(), engine=engine, weight_decay=0.1)
    optimizer.step(make_closure(optimizer, model, d.x, d.y))
    assert optimizer.result is not None and optimizer.result.status == "converged"
    twin = small()
    optimizer = NewtonPolish(twin.parameters(), engine="closure", weight_decay=0.1)
    optimizer.step(make_closure(optimizer, twin, d.x, d.y))
    assert distance(flat(model), flat(twin)) <= 1e-7
    if engine == "perceptron":
        other = small(activation=nn.Hardswish)
        start = flat(other)
        optimizer = NewtonPolish(other.parameters(), engine=engine)
        with pytest.raises(ClosureError, match=f"hardswish {NO_LAYER}"):
            optimizer.step(make_closure(optimizer, other, d.x, d.y))
        assert torch.equal(flat(other), start)


def wave(z: Tensor) -> Tensor:
    return torch.sin(torch.cos(z))


def wave_slope(z: Tensor) -> Tensor:
    return -torch.cos(torch.cos(z)) * torch.sin(z)


def wave_bend(z: Tensor) -> Tensor:
    return -torch.sin(torch.cos(z)) * torch.sin(z) ** 2 - torch.cos(torch.cos(z)) * torch.cos(z)


@pytest.mark.usefixtures("registry")
def test_registered_activation_is_recognised() -> None:
    d, model = Data(), mlp()
    problem = Problem(parameters_of(model), lambda: F.mse_loss(model[2:](wave(model[0](d.x))), d.y))
    closure = closure_for(problem)
    assert open_it(closure, problem.parameters).engine == "replay"
    register_activation("recognition_wave", wave, wave_slope, wave_bend)
    opened = open_it(closure, problem.parameters)
    assert opened.engine == "perceptron"
    replay = open_it(closure, problem.parameters, engine="replay").objective
    assert distance(opened.objective.hessian(opened.theta), replay.hessian(opened.theta)) <= 1e-11


@pytest.mark.usefixtures("registry")
def test_same_numbers_as_other_arguments() -> None:
    """A registered activation with beta 2, and a model that has the 2 for a threshold."""

    def softened(z: Tensor) -> Tensor:
        return torch.sin(F.softplus(z, 2.0))

    def slope(z: Tensor) -> Tensor:
        return torch.cos(F.softplus(z, 2.0)) * torch.sigmoid(2 * z)

    def bend(z: Tensor) -> Tensor:
        s = torch.sigmoid(2 * z)
        return -torch.sin(F.softplus(z, 2.0)) * s * s + torch.cos(F.softplus(z, 2.0)) * 2 * s * (1 - s)

    register_activation("recognition_softened", softened, slope, bend)
    d, model = Data(), mlp()
    uses = {"perceptron": softened, "replay": lambda z: torch.sin(F.softplus(z, threshold=2.0))}
    for engine, function in uses.items():
        problem = Problem(parameters_of(model), lambda: F.mse_loss(model[2:](function(model[0](d.x))), d.y))  # noqa: B023
        assert open_it(closure_for(problem), problem.parameters).engine == engine


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("mode", ["closure", "loop"])
def test_what_differs_is_not_used_and_said_once(mode: str) -> None:
    """A derivative that becomes a wrong one after its registration."""
    factor = [1.0]
    register_activation("recognition_altered", wave, lambda z: factor[0] * wave_slope(z), wave_bend)
    factor[0] = 2.0

    def problem() -> Problem:
        d, model = Data(), mlp()
        return Problem(parameters_of(model), lambda: F.mse_loss(model[2:](wave(model[0](d.x))), d.y))

    found, wanted = problem(), problem()
    with pytest.warns(GradientFlowWarning, match=f"{LOOKS_LIKE}.*the gradient in .grad") as said:
        engines = drive(GradientFlow(found.parameters, lr=0.1), found, mode, 3)
    assert len(said) == 1
    assert engines == ["replay"] * 3
    drive(GradientFlow(wanted.parameters, lr=0.1, engine="replay"), wanted, mode, 3)
    assert distance(*(vector(p.parameters, p.parameters, torch.float64) for p in (found, wanted))) <= SAME
    with pytest.raises(ClosureError, match=r"as one, it differs: the gradient in \.grad"):
        drive(GradientFlow(found.parameters, lr=0.1, engine="perceptron"), found, mode)


@pytest.mark.usefixtures("registry")
def test_module_that_differs() -> None:
    factor = [1.0]
    register_activation("recognition_module", wave, lambda z: factor[0] * wave_slope(z), wave_bend)
    factor[0] = 2.0

    class Wave(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return wave(z)

    d = Data()
    objective = ModuleObjective(small(activation=Wave), nn.MSELoss(), (d.x, d.y))
    assert objective.engine == "torch.func"
    assert "the loss or its gradient differs" in objective.engine_reason
    with pytest.raises(ValueError, match=r"engine='perceptron' was asked for.*differs"):
        ModuleObjective(small(activation=Wave), nn.MSELoss(), (d.x, d.y), engine="perceptron")


# Models and data given as such

MODULES: dict[str, tuple[Callable[[], nn.Module], nn.Module, Callable[[Data], Tensor]]] = {
    "mean squared error": (mlp, nn.MSELoss(), lambda d: d.y),
    "sum of squares": (mlp, nn.MSELoss(reduction="sum"), lambda d: d.y),
    "Huber": (lambda: mlp(nn.Softplus), nn.HuberLoss(delta=0.3), lambda d: d.y),
    "classes": (lambda: mlp(nn.GELU, 4), nn.CrossEntropyLoss(), lambda d: d.classes),
    "binary": (lambda: small(activation=nn.SiLU), nn.BCEWithLogitsLoss(), lambda d: d.yes),
}


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", MODULES)
def test_public_functions(name: str, chunk_size: int | None) -> None:
    """gradient, hvp, hessian and hessian_spectrum are those of torch.func."""
    make, loss_fn, target = MODULES[name]
    d, model = Data(), make()
    data = (d.x, target(d))
    options = {"chunk_size": chunk_size}
    assert ModuleObjective(model, loss_fn, data, **options).engine == "perceptron"  # type: ignore[arg-type]
    v = torch.randn(flat(model).numel(), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    functions: list[Callable[..., Tensor]] = [
        *(gradient, hessian, hessian_spectrum),
        lambda *args, **kwargs: hvp(*args, v, **kwargs),
        lambda *args, **kwargs: hvp(*args, v[:, 0], **kwargs),
    ]
    for function in functions:
        found = function(model, loss_fn, data, engine="perceptron", **options)
        wanted = function(model, loss_fn, data, engine="torch.func", **options)
        assert found.shape == wanted.shape
        assert distance(found, wanted) <= 1e-12


@pytest.mark.parametrize("engine", ["perceptron", "torch.func"])
def test_vectors_of_another_shape(engine: str) -> None:
    d, model = Data(), small()
    p = flat(model).numel()
    for shape in ((p - 1,), (3, p), (p, 1, 1), ()):
        with pytest.raises(ValueError, match=rf"vectors must have the shape \({p},\) or \({p}, k\)"):
            hvp(model, nn.MSELoss(), (d.x, d.y), torch.zeros(shape, dtype=torch.float64), engine=engine)


@pytest.mark.parametrize(
    ("make", "loss_fn", "reason"),
    [
        (lambda: small(activation=nn.Hardswish), nn.MSELoss(), f"hardswish {NO_LAYER}"),
        (small, nn.L1Loss(), "l1_loss"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double(), nn.MSELoss(), "layer_norm"),
        (lambda: small().float(), nn.MSELoss(), "wider"),
    ],
)
def test_module_that_is_not_recognised(make: Callable[[], nn.Module], loss_fn: nn.Module, reason: str) -> None:
    d, model = Data(), make()
    dtype = next(model.parameters()).dtype
    data = (d.x.to(dtype), d.y.to(dtype))
    objective = ModuleObjective(model, loss_fn, data, dtype=torch.float64)
    assert objective.engine == "torch.func"
    assert reason in objective.engine_reason
    with pytest.raises(ValueError, match=f"engine='perceptron' was asked for.*{reason}"):
        ModuleObjective(model, loss_fn, data, dtype=torch.float64, engine="perceptron")


def test_engine_of_a_module() -> None:
    d, model = Data(), small()
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.y))
    assert (objective.engine, objective.engine_reason) == ("perceptron", "")
    assert (objective.counts.n_grad, objective.counts.n_hvp, objective.counts.n_hessian) == (0, 0, 0)
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.y), engine="torch.func")
    assert (objective.engine, objective.engine_reason) == ("torch.func", "engine='torch.func' was asked for")
    with pytest.raises(ValueError, match=r"engine must be 'auto', 'perceptron' or 'torch\.func', not 'numba'"):
        ModuleObjective(model, nn.MSELoss(), (d.x, d.y), engine="numba")  # type: ignore[arg-type]


def test_data_of_a_loader_are_not_recognised() -> None:
    d, model = Data(), small()
    loader = DataLoader(TensorDataset(d.x, d.y), batch_size=5)
    objective = ModuleObjective(model, nn.MSELoss(), loader)
    assert objective.engine == "torch.func" and "the data are not tensors" in objective.engine_reason
    whole = ModuleObjective(model, nn.MSELoss(), (d.x, d.y))
    theta = whole.initial_theta()
    assert distance(objective.loss_and_gradient(theta)[1], whole.loss_and_gradient(theta)[1]) <= 1e-13


def change_by_torch(d: Data) -> None:
    d.x[0] += 1.0
    d.y.mul_(2.0)


def test_data_changed_after_the_objective_was_made() -> None:
    """Loss and derivatives are those of the new data, as without closed forms."""
    d, model = Data(), small()
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.y))
    theta = objective.initial_theta()
    objective.loss_and_gradient(theta)
    change_by_torch(d)
    other = ModuleObjective(model, nn.MSELoss(), (d.x, d.y), engine="torch.func")
    assert distance(objective.loss_and_gradient(theta)[1], other.loss_and_gradient(theta)[1]) <= 1e-13
    assert distance(objective.hessian(theta), other.hessian(theta)) <= 1e-12
    assert objective.engine == "perceptron"


class Doubled(nn.Module):
    """Twice the input, plus what a buffer holds."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.shift


def prepared() -> nn.Sequential:
    return nn.Sequential(Doubled(), *small()).double()


def frozen_part() -> nn.Sequential:
    model = small()
    model[0].requires_grad_(False)
    return model


def change_data(model: nn.Module, d: Data) -> None:
    d.x.mul_(2.0)


def change_buffer(model: nn.Module, d: Data) -> None:
    for buffer in model.buffers():
        buffer.add_(1.0)


def change_frozen(model: nn.Module, d: Data) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if not p.requires_grad:
                p.mul_(2.0)


@pytest.mark.parametrize(
    ("make", "change"), [(prepared, change_data), (prepared, change_buffer), (frozen_part, change_frozen)]
)
def test_what_stands_before_the_first_layer_changes_after_the_objective_was_made(
    make: Callable[[], nn.Module], change: Callable[[nn.Module, Data], None]
) -> None:
    """Data that are transformed first, a buffer, a frozen layer."""
    d, model = Data(), make()
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.y))
    theta = objective.initial_theta()
    change(model, d)
    other = ModuleObjective(model, nn.MSELoss(), (d.x, d.y), engine="torch.func")
    assert distance(objective.loss_and_gradient(theta)[1], other.loss_and_gradient(theta)[1]) <= 1e-13


def test_frozen_last_layer_changed_after_the_objective_was_made() -> None:
    d, model = Data(), small()
    model[2].requires_grad_(False)
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.y))
    theta = objective.initial_theta()
    model[2].weight.mul_(2.0)
    other = ModuleObjective(model, nn.MSELoss(), (d.x, d.y), engine="torch.func")
    assert distance(objective.loss_and_gradient(theta)[1], other.loss_and_gradient(theta)[1]) <= 1e-13
    assert objective.engine == "perceptron"


@pytest.mark.parametrize("which", ["a module's", "a function's"])
def test_weights_in_the_loss_changed_after_the_objective_was_made(which: str) -> None:
    """Tensors that belong neither to the model nor to the data; of one of them the loss uses a part."""
    d, model = Data(), small(4)
    factors = torch.ones(2 * N, dtype=torch.float64)

    def weighted(output: Tensor, target: Tensor) -> Tensor:
        return (factors[:N] * F.cross_entropy(output, target, reduction="none")).mean()

    loss_fn = weighted if which == "a function's" else nn.CrossEntropyLoss(weight=d.by_class)
    objective = ModuleObjective(model, loss_fn, (d.x, d.classes), engine="perceptron")
    theta = objective.initial_theta()
    for tensor in (d.by_class, factors):
        tensor[1] *= 3.0
    other = ModuleObjective(model, loss_fn, (d.x, d.classes), engine="torch.func")
    assert distance(objective.loss_and_gradient(theta)[1], other.loss_and_gradient(theta)[1]) <= 1e-13
    assert objective.engine == "perceptron"


class Penalised(nn.Module):
    """The output, and squares of the first weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net[0].weight.square().sum()


def test_penalty_in_every_chunk() -> None:
    d, model = Data(), Penalised()

    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target) + 0.1 * output[1]

    for reduction in ("mean", "sum"):
        one, other = (
            ModuleObjective(model, loss_fn, (d.x, d.y), chunk_size=5, reduction=reduction, engine=engine)  # type: ignore[arg-type]
            for engine in ("perceptron", "torch.func")
        )
        theta = one.initial_theta()
        assert distance(one.loss_and_gradient(theta)[1], other.loss_and_gradient(theta)[1]) <= 1e-13
        assert distance(one.hessian(theta), other.hessian(theta)) <= 1e-12


def test_layers_in_another_order_in_every_chunk() -> None:
    """Of equal weights, so that at the start the loss does not tell."""

    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()
            self.layers[1].load_state_dict(self.layers[0].state_dict())

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layers if x[0, 0] > 0 else reversed(self.layers)
            return second(torch.tanh(first(x)))

    d, model = Data(), Swapping()
    d.x[0, 0], d.x[6, 0] = 1.0, -1.0
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.x.flip(1)), chunk_size=6)
    assert (objective.engine, objective.engine_reason) == ("torch.func", "the chunks differ in their operations")


def test_integrate_and_minimize_end_at_the_same_point() -> None:
    d, model = Data(), small()
    engines: tuple[Any, Any] = ("perceptron", "torch.func")
    objectives = [ModuleObjective(model, nn.HuberLoss(), (d.x, d.y), engine=e) for e in engines]
    assert [objective.engine for objective in objectives] == list(engines)
    theta = objectives[0].initial_theta()
    flows = [integrate(objective, theta, (0.0, 20.0), method="dopri5").theta[-1] for objective in objectives]
    assert distance(*flows) <= 1e-8
    model, x, y = teacher_student(1, n_student=2, n_teacher=2, n_samples=100)
    objectives = [ModuleObjective(model, nn.MSELoss(), (x, y), engine=e) for e in engines]
    ends = [minimize(objective, objective.initial_theta()) for objective in objectives]
    assert ends[0].status == ends[1].status == "converged"
    assert abs(float(ends[0].loss) - float(ends[1].loss)) <= 1e-12


def test_stats_tell_who_served_in_integrate() -> None:
    d, model = Data(), small()
    optimizer = GradientFlow(model.parameters(), method="dopri5")
    optimizer.integrate(make_closure(optimizer, model, d.x, d.y), 1.0)
    assert optimizer.stats.engine == "perceptron"
    twin = small()
    other = GradientFlow(twin.parameters(), engine="replay", method="dopri5")
    other.integrate(make_closure(other, twin, d.x, d.y), 1.0)
    assert distance(flat(model), flat(twin)) <= SAME


# Things that were found wrong


def opened_like_the_closure(problem: Problem) -> None:
    """Whatever serves, it is the closure, and nothing is said of perceptrons."""
    closure = closure_for(problem)
    opened = open_it(closure, problem.parameters, check=False)
    for theta in (opened.theta, elsewhere(opened.theta)):
        wanted = called_at(closure, problem.parameters, theta)
        found = opened.objective.loss_and_gradient(theta)
        assert distance(found[0], wanted[0]) <= 1e-12
        assert distance(found[1], wanted[1]) <= 1e-12


def in_both_directions(d: Data) -> Problem:
    w, v = matrices((3, 3), (3, 1))
    return Problem(
        [w, v], lambda: F.mse_loss(torch.tanh(F.linear(d.x, w)) @ v, d.y) + F.mse_loss(torch.tanh(d.x @ w) @ v, d.y)
    )


def no_hidden_neurons(d: Data) -> Problem:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 1)).double()
    return Problem(parameters_of(model), lambda: F.mse_loss(model(d.x), d.y))


SUSPECTS: dict[str, Callable[[Data], Problem]] = {
    "argument by name": of_one(lambda m, d: F.mse_loss(torch.squeeze(input=m(d.x)), d.y[:, 0])),
    "first of a batch": of_one(lambda m, d: F.mse_loss(m(d.x.view(3, 4, 3))[:, 0], d.y[:3])),
    "weight and its transpose": in_both_directions,
    "log_softmax in float32": of_four(lambda m, d: F.nll_loss(F.log_softmax(m(d.x), 1, dtype=torch.float32), d.classes)),
    "no hidden neurons": no_hidden_neurons,
    "celu whose alpha has no float32": activation_layer(lambda: nn.CELU(0.6)),
}


@pytest.mark.parametrize("name", SUSPECTS)
def test_suspects(name: str) -> None:
    opened_like_the_closure(SUSPECTS[name](Data()))


def test_no_samples() -> None:
    """A sum over none is 0, with a gradient of zeros."""
    d, model = Data(), mlp()
    closure = closure_of(parameters_of(model), lambda: F.mse_loss(model(d.x[:0]), d.y[:0], reduction="sum"))
    opened = open_it(closure, parameters_of(model))
    loss, slope = opened.objective.loss_and_gradient(opened.theta)
    assert float(loss) == 0.0 and not bool(slope.any())


def test_all_classes_ignored() -> None:
    """The mean over nothing is NaN."""
    d, model = Data(), mlp(nn.Tanh, 4)
    objective = ModuleObjective(model, nn.CrossEntropyLoss(ignore_index=0), (d.x, torch.zeros(N, dtype=torch.long)))
    assert math.isnan(float(objective.loss_and_gradient(objective.initial_theta())[0]))


def test_numpy_is_not_needed_by_name() -> None:
    """Targets that numpy brings in another type: torch promotes, and so do we."""
    d, model = Data(), small().float()
    y = torch.from_numpy(np.asarray(d.y.numpy()))
    problem = Problem(parameters_of(model), lambda: F.mse_loss(model(d.x.float()), y))
    opened = open_it(closure_for(problem), problem.parameters)
    wanted = called_at(closure_for(problem), problem.parameters, opened.theta)
    assert distance(opened.objective.loss_and_gradient(opened.theta)[1], wanted[1]) <= 1e-6


@pytest.mark.parametrize("engine", ["auto", "perceptron"])
def test_wide_layers_are_left_to_torch(engine: Any) -> None:
    """Unless it is asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1)).double()
    x, y = torch.randn(10, 64, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    optimizer = GradientFlow(model.parameters(), lr=0.01, engine=engine)
    optimizer.step(make_closure(optimizer, model, x, y))
    objective = ModuleObjective(model, nn.MSELoss(), (x, y), engine=engine)
    if engine == "auto":
        assert optimizer.stats.engine == "replay"
        assert objective.engine == "torch.func" and "wide" in objective.engine_reason
    else:
        assert optimizer.stats.engine == objective.engine == "perceptron"


def test_a_part_of_the_model_replaced_after_the_objective_was_made() -> None:
    d, model = Data(), small()
    objective = ModuleObjective(model, nn.MSELoss(), (d.x, d.y))
    theta = objective.initial_theta()
    model[1] = nn.ReLU()
    other = ModuleObjective(model, nn.MSELoss(), (d.x, d.y), engine="torch.func")
    assert distance(objective.loss_and_gradient(theta)[1], other.loss_and_gradient(theta)[1]) <= 1e-13
    assert objective.engine == "perceptron"
