"""``ModuleObjective``: a model, a loss function and data, accumulated chunk by chunk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from opening import distance, elsewhere, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from torch_gradflow.objectives.module import ModuleObjective, hessian, hessian_spectrum

N = 23  # a prime: no chunk size divides it


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(N, 2, generator=generator, dtype=torch.float64)


def by_autograd(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian at θ on all data at once, with plain autograd on a copy of the model."""
    model = copy.deepcopy(model)
    parameters = trainable(model)
    nn.utils.vector_to_parameters(theta.clone(), parameters)
    loss = loss_fn(model(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return loss.detach(), gradient.detach(), torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def assert_equal(objective: ModuleObjective, wanted: tuple[Tensor, Tensor, Tensor], theta: Tensor) -> None:
    loss, gradient = objective.loss_and_gradient(theta)
    assert distance(loss, wanted[0]) <= 1e-14
    assert distance(gradient, wanted[1]) <= 1e-13
    assert distance(objective.hessian(theta), wanted[2]) <= 1e-12
    assert distance(objective.hvp(theta, theta), wanted[2] @ theta) <= 1e-12


@pytest.mark.parametrize("chunks", ["whole", 1, 5, 8, 100, "loader", "list"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_over_chunks_are_those_over_all_data(
    model: nn.Sequential, data: tuple[Tensor, Tensor], chunks: Any, reduction: Any
) -> None:
    """Also where the last chunk is smaller than the others."""
    loss_fn = nn.MSELoss(reduction=reduction)
    if chunks == "loader":
        objective = ModuleObjective(model, loss_fn, DataLoader(TensorDataset(*data), batch_size=7))
    elif chunks == "list":
        objective = ModuleObjective(model, loss_fn, [(x, y) for x, y in zip(*(t.split(9) for t in data), strict=True)])
    else:
        objective = ModuleObjective(model, loss_fn, data, chunk_size=None if chunks == "whole" else chunks)
    assert objective.reduction == reduction
    theta = elsewhere(objective.initial_theta())
    assert_equal(objective, by_autograd(model, loss_fn, *data, theta), theta)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_of_a_function(model: nn.Sequential, data: tuple[Tensor, Tensor], reduction: Any) -> None:
    """A plain function has no ``reduction``: what is given counts, and "mean" otherwise."""

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction=reduction)

    objective = ModuleObjective(model, loss_fn, data, chunk_size=6, reduction=reduction)
    theta = elsewhere(objective.initial_theta())
    assert_equal(objective, by_autograd(model, loss_fn, *data, theta), theta)
    assert ModuleObjective(model, loss_fn, data).reduction == "mean"


def test_class_indices(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0], torch.arange(N) % 2
    objective = ModuleObjective(model, nn.CrossEntropyLoss(), (x, y), chunk_size=10)
    theta = elsewhere(objective.initial_theta())
    assert_equal(objective, by_autograd(model, nn.CrossEntropyLoss(), x, y, theta), theta)


def test_the_model_is_left_alone(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    """Evaluations change neither parameters nor gradients; ``write`` is what puts θ in."""
    objective = ModuleObjective(model, nn.MSELoss(), data, chunk_size=6)
    start, before = objective.initial_theta(), list(model.parameters())
    theta = elsewhere(start)
    objective.hessian(theta)
    objective.loss_and_gradient(theta)
    assert torch.equal(objective.initial_theta(), start)
    assert all(a is b and a.grad is None for a, b in zip(model.parameters(), before, strict=True))
    objective.write(theta)
    assert torch.equal(objective.initial_theta(), theta)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_frozen_parameters_are_not_part_of_theta(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    model[0].requires_grad_(False)
    objective = ModuleObjective(model, nn.MSELoss(), data, chunk_size=6)
    assert objective.n_parameters == 4 * 2 + 2
    theta = elsewhere(objective.initial_theta())
    assert_equal(objective, by_autograd(model, nn.MSELoss(), *data, theta), theta)


@pytest.mark.parametrize("share", ["module", "parameter"])
def test_what_is_shared_counts_once_and_stays_shared(data: tuple[Tensor, Tensor], share: str) -> None:
    """One layer under two names, or one weight in two layers; after an evaluation both are still what they were."""
    torch.manual_seed(0)
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    if share == "parameter":
        other.weight = layer.weight
    model = nn.Sequential(layer, nn.Softplus(), layer if share == "module" else other).double()
    x, y = data[0], data[0].flip(0)
    objective = ModuleObjective(model, nn.MSELoss(), (x, y), chunk_size=6)
    assert objective.n_parameters == 9 + 3 * (1 if share == "module" else 2)
    parameters = list(model.parameters())
    theta = elsewhere(objective.initial_theta())
    wanted = by_autograd(model, nn.MSELoss(), x, y, theta)
    assert_equal(objective, wanted, theta)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert model[0].weight is model[2].weight
    assert isinstance(model[0].weight, nn.Parameter)


def test_float64_for_a_float32_model(data: tuple[Tensor, Tensor]) -> None:
    """θ is then a more precise vector than the model can hold; loss and gradient are those of the rounded one."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = (t.float() for t in data)
    objective = ModuleObjective(model, nn.MSELoss(), (x, y), dtype=torch.float64)
    theta = objective.initial_theta()
    loss, gradient = objective.loss_and_gradient(theta)
    assert theta.dtype == loss.dtype == gradient.dtype == torch.float64
    wanted = by_autograd(model, nn.MSELoss(), x, y, theta.float())
    assert distance(loss, wanted[0].double()) <= 1e-6
    assert distance(gradient, wanted[1].double()) <= 1e-6


def test_counts(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    """A gradient over all chunks is one gradient."""
    objective = ModuleObjective(model, nn.MSELoss(), data, chunk_size=6)
    theta = objective.initial_theta()
    objective.hvp(theta, torch.eye(len(theta), 3, dtype=torch.float64))
    before = objective.counts.n_grad
    objective.loss_and_gradient(theta)
    objective.hessian(theta)
    assert objective.counts.n_grad == before + 1
    assert (objective.counts.n_hvp, objective.counts.n_hessian, objective.counts.n_closure) == (3, 1, 0)


def shuffled(data: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=5, shuffle=True)


REFUSED = {
    "shuffling loader": (shuffled, {}, ValueError, "differ at each evaluation.*shuffle=False"),
    "iterator": (lambda d: iter([d]), {}, TypeError, "read only once; give a list"),
    "generator": (lambda d: (pair for pair in [d]), {}, TypeError, "read only once; give a list"),
    "no batches": (lambda d: [], {}, ValueError, "data holds no samples"),
    "no samples": (lambda d: (d[0][:0], d[1][:0]), {}, ValueError, "data holds no samples"),
    "unequal lengths": (lambda d: (d[0], d[1][:-1]), {}, ValueError, "as many targets as inputs, not 22 and 23"),
    "chunk size 0": (lambda d: d, {"chunk_size": 0}, ValueError, "chunk_size must be a positive integer, not 0"),
    "chunk size for batches": (lambda d: [d], {"chunk_size": 4}, ValueError, "an iterable of batches brings its own chunks"),
    "reduction none": (lambda d: d, {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', not 'none'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_are_refused(model: nn.Sequential, data: tuple[Tensor, Tensor], name: str) -> None:
    make, settings, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        ModuleObjective(model, nn.MSELoss(), make(data), **settings)


def test_losses_and_models_that_are_refused(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'none'"):
        ModuleObjective(model, nn.MSELoss(reduction="none"), data)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        ModuleObjective(model.requires_grad_(False), nn.MSELoss(), data)


def test_a_mean_that_is_not_one_over_samples_is_refused(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    """Class weights and ``ignore_index`` divide each chunk by another number: fine for one chunk, wrong for several."""
    y = (torch.arange(N) < 8).long()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0], dtype=torch.float64))
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert_equal(ModuleObjective(model, weighted, (data[0], y)), by_autograd(model, weighted, data[0], y, theta), theta)
    with pytest.raises(ValueError, match="weight"):
        ModuleObjective(model, weighted, (data[0], y), chunk_size=6)
    y[:7] = -100
    plain = nn.CrossEntropyLoss()
    assert_equal(ModuleObjective(model, plain, (data[0], y)), by_autograd(model, plain, data[0], y, theta), theta)
    with pytest.raises(ValueError, match="ignore_index"):
        ModuleObjective(model, plain, (data[0], y), chunk_size=6)


def random_subset(data: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=5, sampler=SubsetRandomSampler(range(N)))


def random_batches(data: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_sampler=BatchSampler(RandomSampler(range(N)), 5, drop_last=False))


@pytest.mark.parametrize("loader", [random_subset, random_batches])
def test_every_kind_of_shuffling_is_refused(model: nn.Sequential, data: tuple[Tensor, Tensor], loader: Any) -> None:
    """Whatever the sampler: batches that differ from one pass to the next are no fixed objective."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="differ at each evaluation"):
        ModuleObjective(model, nn.MSELoss(), loader(data))


def test_hessian_and_spectrum(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    """At the model's parameters, in one call."""
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = by_autograd(model, nn.MSELoss(), *data, theta)
    found = hessian(model, nn.MSELoss(), data, chunk_size=6)
    assert_equal(ModuleObjective(model, nn.MSELoss(), data), expected, theta)
    assert torch.allclose(found, ModuleObjective(model, nn.MSELoss(), data).hessian(theta), rtol=1e-12, atol=1e-14)
    assert torch.allclose(hessian_spectrum(model, nn.MSELoss(), data), torch.linalg.eigvalsh(found), rtol=1e-10, atol=1e-13)
