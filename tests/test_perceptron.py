"""Derivatives of perceptrons in closed form, in plain torch and compiled, against autograd on a forward pass written anew."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_gradflow import Activation, Loss, Merging, Perceptron, PerceptronObjective, Samples, register_activation
from torch_gradflow.perceptron.activations import FORMULAS, IDENTITY, REGISTERED
from torch_gradflow.perceptron.architecture import LOSSES

KERNELS = ("torch", "numba")
TIGHT = 1e-12


class Known(NamedTuple):
    """An activation, and what torch computes under that name."""

    activation: Activation
    function: Callable[[Tensor], Tensor]


KNOWN: dict[str, Known] = {
    known.activation.name: known
    for known in (
        Known(IDENTITY, lambda z: z + 0),
        Known(Activation("relu"), F.relu),
        Known(Activation("leaky_relu", (0.25,)), lambda z: F.leaky_relu(z, 0.25)),
        Known(Activation("elu", (1.3,)), lambda z: F.elu(z, 1.3)),
        Known(Activation("selu"), F.selu),
        Known(Activation("celu", (0.75,)), lambda z: F.celu(z, 0.75)),
        Known(Activation("gelu"), F.gelu),
        Known(Activation("gelu_tanh"), lambda z: F.gelu(z, approximate="tanh")),
        Known(Activation("silu"), F.silu),
        Known(Activation("mish"), F.mish),
        Known(Activation("sigmoid"), torch.sigmoid),
        Known(Activation("log_sigmoid"), F.logsigmoid),
        Known(Activation("tanh"), torch.tanh),
        Known(Activation("softplus", (1.5, 18.0)), lambda z: F.softplus(z, 1.5, 18.0)),
        Known(Activation("softsign"), F.softsign),
        Known(Activation("erf"), torch.erf),
        Known(Activation("normal_cdf"), torch.special.ndtr),
        Known(Activation("sigmoid_softplus"), lambda z: torch.sigmoid(4 * z) + F.softplus(z)),
        Known(Activation("square"), torch.square),
        Known(Activation("cube"), lambda z: z**3),
        Known(Activation("polynomial", (1.0, -2.0, 0.0, 0.5)), lambda z: 1 - 2 * z + 0.5 * z**3),
    )
}
UNBOUNDED = {"square", "cube", "polynomial"}  # beyond linear growth


def tanh_with_all_digits(z: Tensor) -> Tensor:
    """tanh, but autograd's derivatives do not lose digits as its 1 − tanh² does where that is small."""
    e = torch.exp(-2 * z.abs())
    return z.sign() * (1 - e) / (1 + e)


FUNCTIONS = {known.activation: known.function for known in KNOWN.values()} | {Activation("tanh"): tanh_with_all_digits}


class Problem(NamedTuple):
    """A perceptron with data, and where to differentiate."""

    network: Perceptron
    loss: Loss
    samples: Samples
    phi: Tensor

    def objective(self, kernel: Any, **options: Any) -> PerceptronObjective:
        return PerceptronObjective(self.network, self.loss, self.samples, kernel=kernel, **options)


def forward(problem: Problem, phi: Tensor) -> Tensor:
    """The loss, by torch's own functions, samples along rows."""
    network, loss, samples, _ = problem
    a, rest = samples.x.T, phi
    for fan_in, fan_out, bias, runs in zip(
        network.sizes, network.sizes[1:], network.biases, network.activations, strict=False
    ):
        weight, rest = rest[: fan_in * fan_out].view(fan_out, fan_in), rest[fan_in * fan_out :]
        z = a @ weight.T
        if bias:
            z, rest = z + rest[:fan_out], rest[fan_out:]
        columns = z.split([count for count, _ in runs], dim=1)
        a = torch.cat([FUNCTIONS[kind](part) for (_, kind), part in zip(runs, columns, strict=True)], dim=1)
    t, w = samples.targets.T, samples.weights[:, None]
    if loss.name == "squared error":
        return (w * (a - t) ** 2).sum()
    if loss.name == "cross entropy":
        return -(w * t * F.log_softmax(a, 1)).sum()
    if loss.name == "binary cross entropy":
        yes, no = t.chunk(2, dim=1)
        return -(w * (yes * F.logsigmoid(a) + no * F.logsigmoid(-a))).sum()  # softplus has a threshold
    return (w * F.huber_loss(a, t, reduction="none", delta=loss.delta)).sum()


def derivatives(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """L, ∇L and H by autograd."""

    def value(phi: Tensor) -> Tensor:
        return forward(problem, phi)

    gradient = torch.func.grad(value)
    return value(problem.phi), gradient(problem.phi), torch.func.jacrev(gradient)(problem.phi)


def distance(found: Tensor, wanted: Tensor, least: float = 1e-30) -> float:
    """The largest difference, relative to the largest element, or to ``least`` if that is larger."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


def make_samples(sizes: tuple[int, ...], loss: Loss, n: int, generator: torch.Generator, scale: float = 1.0) -> Samples:
    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x = scale * torch.randn(sizes[0], n, generator=generator, dtype=torch.float64)
    targets = rand(loss.n_targets(sizes[-1]), n)
    weights = rand(n) * (rand(n) > 0.2) / n
    weights[0] = 1 / n
    return Samples(x, targets, weights)


def make_problem(
    sizes: tuple[int, ...] = (2, 5, 1),
    activation: str = "tanh",
    loss: Loss | None = None,
    *,
    n: int = 50,
    output: Activation = IDENTITY,
    bias: bool = True,
    scale: float = 1.0,
) -> Problem:
    """A usual one."""
    loss = Loss("squared error") if loss is None else loss
    generator = torch.Generator().manual_seed(5)
    network = Perceptron.of(sizes, KNOWN[activation].activation, output, bias=bias)
    samples = make_samples(sizes, loss, n, generator)
    phi = scale * torch.randn(network.n_parameters, generator=generator, dtype=torch.float64)
    return Problem(network, loss, samples, phi)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Networks of all kinds. Polynomials stay in the last hidden layer: higher powers are ill-conditioned, not wrong."""
    depth = draw(st.integers(1, 4))
    sizes = (*draw(st.lists(st.integers(1, 9), min_size=depth, max_size=depth)), draw(st.integers(1, 5)))
    biases = tuple(draw(st.lists(st.booleans(), min_size=depth, max_size=depth)))
    tame = sorted(set(KNOWN) - UNBOUNDED)
    activations = []
    for layer, width in enumerate(sizes[1:]):
        names = st.sampled_from(sorted(KNOWN) if layer == max(depth - 2, 0) else tame)
        count = width if draw(st.booleans()) else 1
        kinds = [KNOWN[draw(names)].activation for _ in range(count)]
        activations.append(tuple((width // count, kind) for kind in kinds))
    loss = Loss(draw(st.sampled_from(LOSSES)), delta=draw(st.sampled_from([0.3, 1.0])))
    n = draw(st.sampled_from([1, 7, 16, 17, 129, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    network = Perceptron(sizes, biases, tuple(activations))
    phi = 0.7 * torch.randn(network.n_parameters, generator=generator, dtype=torch.float64)
    return Problem(network, loss, make_samples(sizes, loss, n, generator), phi)


def assert_exact(problem: Problem, kernel: Any) -> None:
    """Everything that an objective gives, to rounding."""
    wanted = derivatives(problem)
    # Outputs and targets are of size 1: small residuals, and autograd's 1 − tanh² where it is saturated, have fewer digits.
    least = max(1e-2 * float(wanted[0]), 1e-3)
    objective = problem.objective(kernel)
    assert objective.kernel == kernel
    loss, gradient = objective.loss_and_gradient(problem.phi)
    assert distance(loss, wanted[0]) <= TIGHT
    assert distance(gradient, wanted[1], least) <= TIGHT
    for found, exact in zip(objective.loss_gradient_hessian(problem.phi), wanted, strict=True):
        assert distance(found, exact, least) <= TIGHT
    found = objective.hessian(problem.phi)
    assert distance(found, found.T, least) <= TIGHT
    generator = torch.Generator().manual_seed(0)
    for shape in ((len(problem.phi),), (len(problem.phi), 1), (len(problem.phi), 5)):
        vectors = torch.randn(shape, generator=generator, dtype=torch.float64)
        products = objective.hvp(problem.phi, vectors)
        assert products.shape == vectors.shape
        size = float((wanted[2].abs() @ vectors.abs()).max())
        assert float((products - wanted[2] @ vectors).abs().max()) <= TIGHT * max(size, least)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(problem=problems())
def test_random_perceptrons(kernel: str, problem: Problem) -> None:
    assert_exact(problem, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, derandomize=True, max_examples=500)
@given(problem=problems())
def test_many_random_perceptrons(kernel: str, problem: Problem) -> None:
    assert_exact(problem, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", KNOWN)
def test_each_activation_and_loss(name: str, loss: Any, kernel: str) -> None:
    """In a hidden layer of a network whose Hessian is compiled."""
    assert_exact(make_problem((2, 4, 1), name, Loss(loss, 0.4), n=21, scale=0.7), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 1025])
def test_numbers_of_samples(n: int, kernel: str) -> None:
    """Around the lengths of vectors and chunks."""
    assert_exact(make_problem((3, 6, 1), "softplus", n=n), kernel)
    assert_exact(make_problem((1, 3, 2), "tanh", n=n, bias=False), kernel)
    assert_exact(make_problem((2, 3, 4, 1), "silu", n=n), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 4), (40, 30, 1), (2, 33, 20, 3), (70, 1, 1), (2, 17, 1, 16, 18, 1)])
def test_narrow_and_wide_layers(sizes: tuple[int, ...], kernel: str) -> None:
    assert_exact(make_problem(sizes, "gelu", n=40, output=Activation("tanh"), scale=0.3), kernel)


# Activations


GRID = torch.cat([torch.linspace(-30, 30, 2001, dtype=torch.float64) + 1e-3, torch.tensor([0.0, -0.0, 1.0, -1.0]).double()])
EXTREME = torch.tensor([1e3, -1e3, 1e5, -1e5], dtype=torch.float64)


def by_autograd(function: Callable[[Tensor], Tensor], z: Tensor) -> list[Tensor]:
    leaf = z.clone().requires_grad_()
    value = function(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    bend = torch.autograd.grad(slope.sum(), leaf)[0] if slope.requires_grad else torch.zeros_like(z)
    return [t.detach() for t in (value, slope, bend)]


@pytest.mark.parametrize("name", KNOWN)
def test_activation_and_its_derivatives(name: str) -> None:
    """On a grid, at kinks, and far out, those of torch."""
    activation, function = KNOWN[name]
    z = torch.cat([GRID, EXTREME])
    wanted = by_autograd(function, z)
    for order in range(3):
        found = activation.derivatives(z, order)
        assert len(found) == order + 1
        for a, b in zip(found, wanted, strict=False):
            assert bool(torch.isfinite(a).all())
            finite = torch.isfinite(b)  # torch's own derivatives are NaN where numbers overflow within
            assert float(((a - b).abs() / (1e-3 + b.abs()))[finite].max()) <= 1e-10


def test_slope_of_leaky_relu_that_has_no_float32() -> None:
    z = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert Activation("leaky_relu", (0.1,)).derivatives(z)[1].tolist() == [0.1, 1.0]


def test_softplus_at_its_threshold() -> None:
    z = torch.tensor([12.0], dtype=torch.float64)
    assert torch.equal(KNOWN["softplus"].activation.derivatives(z)[2], by_autograd(KNOWN["softplus"].function, z)[2])


@pytest.mark.parametrize("name", KNOWN)
def test_compiled_activation_far_out(name: str) -> None:
    """One neuron, one sample: the kernel at given pre-activations, where the gradient is g′."""
    activation, function = KNOWN[name]
    network = Perceptron((1, 1), (False,), (((1, activation),),))
    one = torch.ones(1, dtype=torch.float64)
    for z in [*torch.linspace(-30.1, 30.1, 61, dtype=torch.float64), *EXTREME]:
        if name in UNBOUNDED and abs(z) > 100:
            continue
        value, slope, bend = by_autograd(function, z.reshape(1))
        # Huber's loss far away from its target is linear: L = δ (t − f − δ/2).
        target = float(value) + 10.0 + abs(float(value))
        samples = Samples(one[None], torch.full((1, 1), target, dtype=torch.float64), one)
        objective = PerceptronObjective(network, Loss("huber", 1.0), samples, kernel="numba")
        loss, gradient = objective.loss_and_gradient(z.reshape(1))
        assert float(loss) == pytest.approx(target - float(value) - 0.5, rel=1e-13)
        assert float(gradient) == pytest.approx(-float(slope), rel=1e-11, abs=1e-14)
        found = float(objective.hvp(z.reshape(1), one))
        if name == "mish" and bool(bend.isnan()):  # torch's own
            bend = torch.zeros(1)
        assert found == pytest.approx(-float(bend), rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1e3, 1e5])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", sorted(set(KNOWN) - UNBOUNDED))
def test_extreme_weights(name: str, loss: Any, size: float, kernel: str) -> None:
    """No overflow, no NaN."""
    problem = make_problem((2, 4, 1), name, Loss(loss), n=17)
    signs = torch.where(torch.arange(len(problem.phi)) % 2 == 0, size, -size).double()
    objective = problem.objective(kernel)
    for phi in (size * problem.phi, signs, torch.full_like(signs, size)):
        results = (*objective.loss_gradient_hessian(phi), objective.hvp(phi, torch.ones_like(phi)))
        assert all(bool(torch.isfinite(t).all()) for t in results)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 3, 1), (2, 3, 2, 2)])
def test_nan_shows(sizes: tuple[int, ...], kernel: str) -> None:
    """In any element of φ, and is gone with the next φ."""
    for name in ("tanh", "softplus", "gelu", "relu", "elu", "softsign", "sigmoid_softplus"):
        problem = make_problem(sizes, name, n=9)
        objective = problem.objective(kernel)
        for i in range(len(problem.phi)):
            phi = problem.phi.clone()
            phi[i] = math.nan
            loss, gradient, hessian = objective.loss_gradient_hessian(phi)
            assert bool(loss.isnan()), (name, i)
            assert bool(gradient.isnan().any()), (name, i)
            assert bool(hessian.isnan().any()), (name, i)
            assert bool(objective.loss_and_gradient(phi)[0].isnan()), (name, i)
        wanted = problem.objective(kernel).loss_gradient_hessian(problem.phi)
        assert all(torch.equal(a, b) for a, b in zip(objective.loss_gradient_hessian(problem.phi), wanted, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(3, 7, 1), (3, 6, 5, 2)])
def test_float32(sizes: tuple[int, ...], kernel: str) -> None:
    """Results are of the type of θ, and right to its digits."""
    problem = make_problem(sizes, "gelu", n=100)
    wanted = derivatives(problem)
    objective = problem.objective(kernel, dtype=torch.float32)
    phi = problem.phi.float()
    results = (*objective.loss_gradient_hessian(phi), *objective.loss_and_gradient(phi))
    assert all(t.dtype == torch.float32 for t in results)
    for found, exact in zip(results, (*wanted, *wanted[:2]), strict=True):
        assert distance(found.double(), exact) <= 2e-6
    assert objective.hvp(phi, phi).dtype == torch.float32
    assert objective.hvp(phi, phi[:, None].repeat(1, 3)).dtype == torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 5, 1), (2, 5, 4, 2)])
def test_given_tensors_are_left_alone(sizes: tuple[int, ...], kernel: str) -> None:
    """θ, vectors and data are not written to, and results are new."""
    problem = make_problem(sizes, n=30)
    given_tensors = (problem.samples.x, problem.samples.targets, problem.samples.weights, problem.phi)
    before = [t.clone() for t in given_tensors]
    objective = problem.objective(kernel)
    first = (*objective.loss_gradient_hessian(problem.phi), *objective.loss_and_gradient(problem.phi))
    first += (objective.hvp(problem.phi, problem.phi),)
    kept = [t.clone() for t in first]
    objective.loss_and_gradient(2 * problem.phi)
    objective.loss_gradient_hessian(2 * problem.phi)
    objective.hvp(2 * problem.phi, problem.phi)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_order_of_arguments_does_not_matter(kernel: str) -> None:
    problem = make_problem((2, 5, 1), n=30)
    samples = Samples(problem.samples.x.T.contiguous().T, problem.samples.targets, problem.samples.weights)
    objective = PerceptronObjective(problem.network, problem.loss, samples, kernel=kernel)  # type: ignore[arg-type]
    phi = torch.stack([problem.phi, problem.phi], 1)[:, 0]
    v = torch.randn(4, len(phi), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = problem.objective(kernel)
    assert torch.equal(objective.loss_and_gradient(phi)[1], wanted.loss_and_gradient(problem.phi)[1])
    assert torch.equal(objective.hvp(phi, v.T), wanted.hvp(problem.phi, v.T.contiguous()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 5, 1), (2, 4, 3, 2)])
def test_tensors_of_other_kinds(sizes: tuple[int, ...], kernel: str) -> None:
    """Parameters, parts of a graph, and negations that have not taken place are what they stand for."""
    problem = make_problem(sizes, n=30)
    phi, objective = problem.phi, problem.objective(kernel)
    others = [
        torch.nn.Parameter(phi.clone()),
        phi.clone().requires_grad_() * 1,
        torch._neg_view(-phi),
        phi.repeat(2, 1).T[:, 0],
    ]

    def results(phi: Tensor) -> list[Tensor]:
        return [*objective.loss_and_gradient(phi), *objective.loss_gradient_hessian(phi), objective.hvp(phi, phi)]

    wanted = results(phi)
    for other in others:
        for a, b in zip(results(other), wanted, strict=True):
            assert distance(a, b) <= 1e-14 and not a.requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 5, 1), (2, 4, 3, 2)])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda objective: pickle.loads(pickle.dumps(objective))])
def test_copies(copied: Callable[[PerceptronObjective], PerceptronObjective], sizes: tuple[int, ...], kernel: str) -> None:
    """They serve when what they are copies of is gone."""
    problem = make_problem(sizes, n=30)
    objective = problem.objective(kernel)
    wanted = [*objective.loss_gradient_hessian(problem.phi), objective.loss_and_gradient(problem.phi)[1]]
    other = copied(objective)
    objective.loss_gradient_hessian(2 * problem.phi)
    del objective
    for found in (other, copied(other)):
        results = [*found.loss_gradient_hessian(problem.phi), found.loss_and_gradient(problem.phi)[1]]
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("sizes", [(2, 5, 1), (2, 4, 3, 2)])
def test_memory_of_another_device_is_not_read(sizes: tuple[int, ...]) -> None:
    problem = make_problem(sizes, n=30)
    objective, elsewhere = problem.objective("numba"), problem.phi.to("meta")
    for call in (objective.loss_and_gradient, objective.hessian, lambda phi: objective.hvp(problem.phi, phi)):
        with pytest.raises(TypeError, match="computes on the CPU, and the parameters are on meta"):
            call(elsewhere)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 5, 1), (2, 4, 3, 2)])
def test_inference_mode(sizes: tuple[int, ...], kernel: str) -> None:
    """What is made in it serves outside, too."""
    problem = make_problem(sizes, n=300)
    with torch.inference_mode():
        objective = problem.objective(kernel)
        first = objective.hessian(problem.phi)
    assert torch.equal(objective.hessian(problem.phi), first)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(3, 8, 1), (2, 5, 5, 2)])
def test_threads(sizes: tuple[int, ...], kernel: str) -> None:
    """Two give what one gives, in any order of calls."""
    problem = make_problem(sizes, "softplus", n=20_000, scale=0.5)
    v = torch.randn(len(problem.phi), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def results(objective: PerceptronObjective) -> list[Tensor]:
        products = objective.hvp(problem.phi, v)
        return [*objective.loss_and_gradient(problem.phi), products, *objective.loss_gradient_hessian(problem.phi)]

    before = torch.get_num_threads()
    objective = problem.objective(kernel)
    try:
        torch.set_num_threads(1)
        one = results(objective)
        torch.set_num_threads(2)
        two, again = results(objective), results(problem.objective(kernel))
        torch.set_num_threads(1)
        back = results(objective)
    finally:
        torch.set_num_threads(before)
    for others in (two, again, back):
        assert all(distance(a, b) <= 1e-13 for a, b in zip(others, one, strict=True))


# The objective


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 4, 2), (2, 4, 3, 2, 1)])
def test_index_frozen_and_decay(sizes: tuple[int, ...], kernel: str) -> None:
    """θ in another order than φ, some of φ frozen, and Σ c θ²."""
    problem = make_problem(sizes, "silu", n=20)
    p = len(problem.phi)
    generator = torch.Generator().manual_seed(2)
    still = torch.arange(p) % 3 == 0
    index = torch.full((p,), -1)
    index[~still] = torch.randperm(int((~still).sum()), generator=generator)
    c = torch.rand(int((~still).sum()), generator=generator, dtype=torch.float64)
    frozen = torch.where(still, problem.phi, 0.0)
    theta = torch.empty_like(c)
    theta[index[~still]] = problem.phi[~still]

    def value(theta: Tensor) -> Tensor:
        return forward(problem, torch.where(still, frozen, theta[index.clamp(min=0)])) + (c * theta**2).sum()

    objective = problem.objective(kernel, index=index, frozen=frozen, decay=c)
    assert objective.n_parameters == len(c)
    wanted = (value(theta), torch.func.grad(value)(theta), torch.func.hessian(value)(theta))
    for found, exact in zip(objective.loss_gradient_hessian(theta), wanted, strict=True):
        assert distance(found, exact) <= TIGHT
    for found, exact in zip(objective.loss_and_gradient(theta), wanted, strict=False):
        assert distance(found, exact) <= TIGHT
    v = torch.randn(len(c), 3, generator=generator, dtype=torch.float64)
    assert distance(objective.hvp(theta, v), wanted[2] @ v) <= TIGHT
    assert distance(objective.hvp(theta, v[:, 0]), wanted[2] @ v[:, 0]) <= TIGHT


def test_counts() -> None:
    problem = make_problem()
    objective = problem.objective("torch")
    objective.loss_and_gradient(problem.phi)
    objective.hvp(problem.phi, problem.phi)
    objective.hvp(problem.phi, torch.ones(len(problem.phi), 4, dtype=torch.float64))
    objective.hessian(problem.phi)
    objective.loss_gradient_hessian(problem.phi)
    counts = objective.counts
    assert (counts.n_grad, counts.n_hvp, counts.n_hessian, counts.n_closure) == (1, 5, 2, 0)


@pytest.mark.parametrize(("layer", "neurons"), [(0, (0, 3)), (1, (2, 1)), (2, (1, 0))])
def test_merging(layer: int, neurons: tuple[int, int]) -> None:
    problem = make_problem((2, 4, 3, 2), "softplus", n=20)
    strength = 0.7
    objective = Merging(problem.objective("torch"), problem.network, strength, layer=layer, neurons=neurons)

    def value(phi: Tensor) -> Tensor:
        rest = phi
        for fan_in, fan_out in list(zip(problem.network.sizes, problem.network.sizes[1:], strict=False))[:layer]:
            rest = rest[fan_out * (fan_in + 1) :]
        fan_in, fan_out = problem.network.sizes[layer : layer + 2]
        w = rest[: fan_in * fan_out].view(fan_out, fan_in)
        return forward(problem, phi) + 0.5 * strength * (w[neurons[0]] - w[neurons[1]]).square().sum()

    wanted = (value(problem.phi), torch.func.grad(value)(problem.phi), torch.func.hessian(value)(problem.phi))
    for found, exact in zip(objective.loss_and_gradient(problem.phi), wanted, strict=False):
        assert distance(found, exact) <= TIGHT
    assert distance(objective.hessian(problem.phi), wanted[2]) <= TIGHT
    v = torch.randn(len(problem.phi), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert distance(objective.hvp(problem.phi, v), wanted[2] @ v) <= TIGHT
    assert distance(objective.hvp(problem.phi, v[:, 0]), wanted[2] @ v[:, 0]) <= TIGHT


# What is refused


def test_merging_refuses() -> None:
    problem = make_problem((2, 4, 1))
    objective = problem.objective("torch")
    for options, message in (
        ({"layer": 2, "neurons": (0, 1)}, "layer must be one of 0, …, 1, not 2"),
        ({"layer": -1, "neurons": (0, 1)}, "layer must be"),
        ({"layer": 0, "neurons": (0, 4)}, r"neurons must be two of the 4 of layer 0, not \(0, 4\)"),
        ({"layer": 0, "neurons": (1, 1)}, "neurons must be"),
        ({"layer": 1, "neurons": (0, 1)}, "neurons must be two of the 1 of layer 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Merging(objective, problem.network, 1.0, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength"):
        Merging(objective, problem.network, -1.0, layer=0, neurons=(0, 1))
    other = Perceptron.of((4, 1), IDENTITY, IDENTITY)
    with pytest.raises(ValueError, match="base has 17 parameters and network 5"):
        Merging(objective, other, 1.0, layer=0, neurons=(0, 1))


@pytest.mark.parametrize(
    ("sizes", "biases", "counts", "message"),
    [
        ((2,), (), (), "sizes must be at least two numbers of neurons"),
        ((2, 0, 1), (True, True), (0, 1), r"each 1 or more, not \(2, 0, 1\)"),
        ((0, 1), (True,), (1,), "each 1 or more"),
        ((2, 3, 1), (True,), (3, 1), "biases and activations must have one entry for each of the 2 layers, not 1 and 2"),
        ((2, 3, 1), (True, True), (3,), "not 2 and 1"),
        ((2, 3, 1), (True, True), (2, 1), r"activations\[0\] must cover the 3 neurons"),
    ],
)
def test_networks_that_make_no_sense(sizes: Any, biases: Any, counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perceptron(sizes, biases, tuple(((count, IDENTITY),) for count in counts))


def test_samples_that_do_not_fit() -> None:
    problem = make_problem((2, 3, 1), n=5)
    x, targets, weights = problem.samples.x, problem.samples.targets, problem.samples.weights
    for samples, message in (
        (Samples(x[:1], targets, weights), r"x must have the shape \(2, N\)"),
        (Samples(x[:, :0], targets[:, :0], weights[:0]), r"x must have the shape \(2, N\) with N > 0 samples, not \(2, 0\)"),
        (Samples(x[0], targets, weights), "x must have the shape"),
        (Samples(x, targets[:, :4], weights), r"targets must have the shape \(1, N\)"),
        (Samples(x, targets.expand(2, 5), weights), "targets must have the shape"),
        (Samples(x, targets, weights[:4]), r"weights must have the shape \(5,\), not \(4,\)"),
        (Samples(x, targets, -weights), "weights must not be negative"),
        (Samples(x, targets, weights * math.nan), "weights must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptronObjective(problem.network, problem.loss, samples)
    with pytest.raises(ValueError, match=r"targets must have the shape \(2, N\)"):
        PerceptronObjective(problem.network, Loss("binary cross entropy"), problem.samples)


@pytest.mark.parametrize("kernel", ["jax", "", None, True])
def test_kernels_that_do_not_exist(kernel: Any) -> None:
    with pytest.raises(ValueError, match="kernel must be 'auto', 'torch' or 'numba', not"):
        make_problem().objective(kernel)


def test_activations_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"name must be a known activation, not 'swish'\. Known: .*silu.*register_activation"):
        Activation("swish")


@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_that_do_not_exist(kernel: str) -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*squared error.*not 'square error'"):
        make_problem(loss=Loss("square error")).objective(kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan])
def test_widths_of_huber_that_make_no_sense(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must"):
        Loss("huber", delta)


@pytest.mark.parametrize(("name", "numbers"), [("softplus", ()), ("leaky_relu", ()), ("tanh", (1.0,)), ("elu", (1.0, 2.0))])
def test_activations_with_another_number_of_parameters(name: str, numbers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="parameters"):
        Activation(name, numbers)


def test_usual_network_without_layers() -> None:
    with pytest.raises(ValueError, match="sizes must be at least two"):
        Perceptron.of((3,), IDENTITY, IDENTITY)


def test_frozen_elements_need_values() -> None:
    problem = make_problem()
    index = torch.arange(len(problem.phi)) - 1
    with pytest.raises(ValueError, match="frozen"):
        problem.objective("torch", index=index)


def test_theta_of_another_length() -> None:
    """Refused by name, before a kernel touches memory that is not its own: in a process of its own."""
    found = run_python(f"""{OBJECTIVE}
calls = (
    lambda: o.loss_and_gradient(t[:-1]),
    lambda: o.hessian(t[:-1]),
    lambda: o.hvp(t[:-1], t),
    lambda: o.hvp(t, torch.ones(3, len(t), dtype=torch.float64)),
)
for call in calls:
  try:
    call()
  except ValueError as error:
    print("refused", error)
""")
    assert found.count("refused") == 4


# Registration


@pytest.mark.usefixtures("registry")
def test_registered_activation() -> None:
    """It serves in plain torch; the compiled kernel does not know it."""
    kind = register_activation("perceptron_sine", torch.sin, torch.cos, lambda z: -torch.sin(z))
    assert kind == Activation("perceptron_sine")
    problem = make_problem((2, 4, 1), output=kind)
    assert problem.objective("auto").kernel == "torch"
    FUNCTIONS[kind] = torch.sin
    assert_exact(problem, "torch")
    with pytest.raises(ValueError, match="kernel='numba' cannot serve: it does not know the activation 'perceptron_sine'"):
        problem.objective("numba")


@pytest.mark.usefixtures("registry")
def test_piecewise_linear_functions_can_be_registered() -> None:
    kind = register_activation("perceptron_abs", torch.abs, torch.sign, torch.zeros_like)
    z = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    assert [t.tolist() for t in kind.derivatives(z)] == [[2.0, 3.0], [-1.0, 1.0], [0.0, 0.0]]
    assert len(kind.derivatives(z, 1)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tanh", torch.sin, torch.cos, torch.sin), "name='tanh' is taken"),
        (("p_1", torch.sin, torch.sin, lambda z: -torch.sin(z)), "first is not the first derivative of function"),
        (("p_2", torch.sin, torch.cos, torch.sin), r"second is not the second derivative .*differs .* by .* at z = "),
        (("p_3", lambda z: torch.sin(z) - z.mean(), torch.cos, lambda z: -torch.sin(z)), "first is not|not elementwise"),
        (("p_4", lambda z: z.cumsum(0), torch.ones_like, torch.zeros_like), "function is not elementwise"),
        (("p_5", torch.sum, torch.ones_like, torch.zeros_like), "function is not elementwise"),
        (("p_6", torch.sin, lambda z: torch.cos(z) * (1 + 1e-6), lambda z: -torch.sin(z)), "first is not"),
    ],
)
def test_registrations_that_are_refused(arguments: Any, message: str) -> None:
    known = set(FORMULAS), set(REGISTERED)
    with pytest.raises(ValueError, match=message):
        register_activation(*arguments)
    assert (set(FORMULAS), set(REGISTERED)) == known


@pytest.mark.usefixtures("registry")
def test_function_of_neighbours_is_not_elementwise() -> None:
    """z_i + z_{-i}: equal under a flip, and its gradient is that of 2 z."""
    with pytest.raises(ValueError, match="not elementwise"):
        register_activation("perceptron_folded", lambda z: z + z.flip(0), lambda z: torch.full_like(z, 2.0), torch.zeros_like)


# In other processes


OBJECTIVE = """
import torch
from torch_gradflow import *
tanh, identity = Activation("tanh"), Activation("identity")
n = Perceptron.of((2, 4, 1), tanh, identity)
x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(2, 10)
o = PerceptronObjective(n, Loss("squared error"), Samples(x, x[:1], torch.full((10,), 0.1, dtype=torch.float64)))
t = torch.linspace(-1, 1, 17, dtype=torch.float64)
"""


def run_python(program: str, **environment: str) -> str:
    """What it prints; lines of the program may be indented by what ``OBJECTIVE`` is not."""
    lines = program.split("\n")
    indent = min((len(x) - len(x.lstrip()) for x in lines if x.startswith("        ")), default=0)
    text = "\n".join(x[indent:] if x.startswith(" " * indent) else x.lstrip() for x in lines)
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_is_cheap() -> None:
    """Neither Numba nor torch's compiler is imported before they are needed."""
    found = run_python("""
        import sys
        import torch_gradflow
        print([name for name in ("numba", "llvmlite", "torch._dynamo", "torch._inductor") if name in sys.modules])
    """)
    assert found == "[]\n"


def test_without_numba() -> None:
    """Plain torch does everything, and one warning says so."""
    found = run_python(f"""
        import sys, warnings
        sys.modules["numba"] = None
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            {"; ".join(OBJECTIVE.strip().splitlines())}
            print(o.kernel, float(o.loss_and_gradient(t)[0]) > 0, o.hessian(t).shape == (17, 17), o.hvp(t, t).shape == (17,))
            try:
                PerceptronObjective(n, Loss("squared error"), Samples(x, x[:1], x[0].abs()), kernel="numba")
            except ValueError as error:
                print(error)
            model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
            optimizer = GradientFlow(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x.T), x[:1].T).backward()
                optimizer.step()
            print(optimizer.stats.engine)
            print(ModuleObjective(model, torch.nn.MSELoss(), (x.T, x[:1].T)).engine)
        print([str(w.message) for w in said])
    """)
    first, refused, engine, module, warned = found.splitlines()
    assert first == "torch True True True"
    assert refused == "kernel='numba' cannot serve: Numba is missing or fails here."
    assert (engine, module) == ("perceptron", "perceptron")
    assert warned.count("Numba cannot be used (") == 1 and "plain torch" in warned and warned.count("', '") == 0


@pytest.mark.slow
def test_kernels_compiled_in_processes_of_their_own(tmp_path: Path) -> None:
    """Each stands in the cache on disk; all of them then serve in one process that compiles nothing."""
    deep = """
m, u = Perceptron.of((2, 4, 3, 2), tanh, identity), torch.linspace(-1, 1, 35, dtype=torch.float64)
y = Samples(x, x, torch.full((10,), 0.1, dtype=torch.float64))
d = PerceptronObjective(m, Loss("squared error"), y)
"""
    for part in ("o.loss_and_gradient(t)", "o.hvp(t, t)", "o.hessian(t)", f"{deep}\nd.hessian(u)"):
        run_python(f"{OBJECTIVE}\nassert o.kernel == 'numba'\n{part}", NUMBA_CACHE_DIR=str(tmp_path))
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.nb?")}
    assert files
    found = run_python(
        f"{OBJECTIVE}\n{deep}\n"
        "s = Samples(x, x[:1], torch.full((10,), 0.1, dtype=torch.float64))\n"
        "p = PerceptronObjective(n, Loss('squared error'), s, kernel='torch')\n"
        "v = torch.stack([t, t**2], 1)\n"
        "pairs = [*zip(o.loss_gradient_hessian(t), p.loss_gradient_hessian(t)), (o.hvp(t, v), p.hvp(t, v))]\n"
        "pairs += [*zip(o.loss_and_gradient(t), p.loss_and_gradient(t))]\n"
        "e = PerceptronObjective(m, Loss('squared error'), y, kernel='torch')\n"
        "pairs += [*zip(d.loss_gradient_hessian(u), e.loss_gradient_hessian(u))]\n"
        "print(o.kernel, max(float((a - b).abs().max()) for a, b in pairs) < 1e-13)\n",
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert found == "numba True\n"
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.nb?")} == files


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "n_samples"), [("numba", 100_000), ("torch", 10_000)])
def test_memory_of_a_large_hessian(kernel: str, n_samples: int) -> None:
    """P = 1997, N = 1e5 (fewer in plain torch, which takes minutes): less than 600 MB beyond what stands before."""
    found = run_python(f"""
        import resource
        {"; ".join(OBJECTIVE.strip().splitlines())}
        o.loss_gradient_hessian(t), o.hvp(t, t)
        g = torch.Generator().manual_seed(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        n = Perceptron.of((2, 499, 1), Activation("softplus", (1.0, 20.0)), identity)
        x = torch.randn(2, {n_samples}, generator=g, dtype=torch.float64)
        s = Samples(x, x[:1], torch.full(({n_samples},), 1e-5, dtype=torch.float64))
        o = PerceptronObjective(n, Loss("squared error"), s, kernel={kernel!r})
        h = o.hessian(torch.randn(n.n_parameters, generator=g, dtype=torch.float64))
        assert h.shape == (1997, 1997)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    assert int(found) / 1024 < 600


@pytest.mark.parametrize("name", ["tanh", "mish"])
def test_derivatives_keep_their_digits_where_it_saturates(name: str) -> None:
    """Against mpmath, relative to their own size, not to the largest."""
    for z in (-12.0, -3.0, 0.5, 6.0, 12.0, 17.0):
        found = Activation(name).derivatives(torch.tensor([z], dtype=torch.float64))
        with mpmath.workdps(50):
            formula = {"tanh": mpmath.tanh, "mish": lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x)))}[name]
            wanted = [float(mpmath.diff(formula, z, n)) for n in range(3)]
        for ours, theirs in zip(found, wanted, strict=True):
            assert float(ours) == pytest.approx(theirs, rel=1e-13, abs=1e-25)
