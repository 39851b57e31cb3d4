"""What is known in closed form of students and teachers: against published values, and the population losses themselves."""

from __future__ import annotations

import math

import pytest
import torch
from test_population import Elementary, network, paper_erf
from torch import Tensor, nn

from torch_gradflow import (
    Activation,
    PopulationObjective,
    UnitRows,
    copy_average,
    copy_average_loss,
    critical_overlap,
    hermite_coefficients,
    information_exponent,
    integrate,
    minimize,
    relu_average,
)


def orthonormal(k: int, activation: nn.Module, n: int = 1) -> PopulationObjective:
    """n students and k teachers e_1, …, e_k, with one input more."""
    teacher = nn.Sequential(nn.Linear(k + 1, k, bias=False), activation, nn.Linear(k, 1, bias=False)).double()
    with torch.no_grad():
        teacher[0].weight.copy_(torch.eye(k, k + 1))
        teacher[2].weight.fill_(1.0)
    student = nn.Sequential(nn.Linear(k + 1, n, bias=False), activation, nn.Linear(n, 1, bias=False)).double()
    return PopulationObjective(student, teacher)


def test_losses_of_one_average() -> None:
    """Section 3 of the notes on arXiv 2311.01644: L*(k) of one erf neuron, and of one ReLU neuron."""
    published = {1: 0.0, 2: 0.0232216806, 3: 0.0405931773, 4: 0.0567545277, 5: 0.0724526452, 6: 0.0879232611, 7: 0.1032650650}
    published |= {8: 0.1185267922, 10: 0.1489066860, 20: 0.2998056108}
    for k, loss in published.items():
        assert copy_average_loss([k]) == pytest.approx(loss, abs=6e-11)
    assert copy_average_loss([1, 3, 2]) == pytest.approx(copy_average_loss([3]) + copy_average_loss([2]))
    for k, loss in {2: 0.1770238733, 3: 0.4847100605, 4: 0.9428329386, 5: 1.5601529945}.items():
        assert relu_average(k)[1] == pytest.approx(loss, abs=6e-11)


@pytest.mark.parametrize(
    ("sizes", "n_negative"),
    [
        ((1, 1, 3), 0),
        ((1, 4), 0),
        ((1, 1, 1, 5), 0),
        ((1, 1, 2), 0),
        ((1, 2, 2), 2),
        ((2, 3), 1),
        ((2, 2, 2, 2), 4),
        ((5,), 0),
    ],
)
def test_copy_average_points_are_critical(sizes: tuple[int, ...], n_negative: int) -> None:
    """Gradient 1e-15, the loss of the formula, and as many negative eigenvalues as published."""
    k, n = sum(sizes), len(sizes)
    objective = orthonormal(k, Elementary(paper_erf), n)
    ends = [sum(sizes[: i + 1]) for i in range(n)]
    groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    w, a = copy_average(torch.eye(k, k + 1, dtype=torch.float64), groups)
    loss, gradient, hessian = objective.loss_gradient_hessian(torch.cat([w.reshape(-1), a]))
    assert float(gradient.abs().max()) < 3e-15
    assert float(loss) == pytest.approx(copy_average_loss(sizes), abs=1e-14)
    values = torch.linalg.eigvalsh(hessian)
    assert int((values < 0).sum()) == n_negative and float(values.abs().min()) > 1e-6


def test_one_relu_neuron_finds_the_mean() -> None:
    k = 4
    objective = orthonormal(k, nn.ReLU())
    result = minimize(objective, torch.tensor([0.9, 1.0, 1.1, 1.0, 0.1, 1.5], dtype=torch.float64), method="trust-region")
    w, a = result.theta[:-1], result.theta[-1]
    strength, loss = relu_average(k)
    assert result.loss == pytest.approx(loss, abs=1e-13)
    assert float(a * w.norm()) == pytest.approx(strength, abs=1e-7)
    assert torch.allclose(w[:k], w[:k].mean().expand(k), rtol=0, atol=1e-7) and abs(float(w[k])) < 1e-7


def test_information_exponents() -> None:
    known = {"relu": 1, "erf": 1, "tanh": 1, "square": 2, "cube": 1}
    for name, exponent in known.items():
        assert information_exponent(Activation(name)) == exponent
    for p in (1, 2, 3, 5):
        assert information_exponent(Activation("polynomial", hermite_coefficients(p))) == p
    # He_3 + He_4 begins at 3.
    both = [a + b for a, b in zip((*hermite_coefficients(3), 0.0), hermite_coefficients(4), strict=True)]
    assert information_exponent(Activation("polynomial", tuple(both))) == 3
    with pytest.raises(ValueError, match="no Hermite coefficient"):
        information_exponent(Activation("polynomial", (2.0,)))


class Hermite(nn.Module):
    """h_p as a polynomial that is recognised."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.powers = hermite_coefficients(degree)

    def forward(self, z: Tensor) -> Tensor:
        total = self.powers[-1] * z
        for c in self.powers[-2:0:-1]:
            total = (total + c) * z
        return total + self.powers[0]


def correlation_on_sphere(w: Tensor, v: Tensor, degree: int) -> UnitRows:
    models = []
    for rows in (w, v):
        model = nn.Sequential(
            nn.Linear(rows.shape[1], len(rows), bias=False), Hermite(degree), nn.Linear(len(rows), 1, bias=False)
        ).double()
        with torch.no_grad():
            model[0].weight.copy_(rows)
            model[2].weight.fill_(1.0)
        model[2].weight.requires_grad_(False)
        models.append(model)
    return UnitRows(PopulationObjective(*models, loss="correlation"), *w.shape)


@pytest.mark.parametrize(("p", "k"), [(3, 3), (3, 8), (4, 5)])
def test_the_mean_becomes_a_minimum_at_the_critical_overlap(p: int, k: int) -> None:
    for shift in (-0.02, 0.02):
        gram = torch.full((k, k), critical_overlap(k, p) + shift, dtype=torch.float64).fill_diagonal_(1.0)
        v = torch.cat([torch.linalg.cholesky(gram), torch.zeros(k, 2, dtype=torch.float64)], 1)
        mean = v.mean(0, keepdim=True) / v.mean(0).norm()
        objective = correlation_on_sphere(mean, v, p)
        assert float(objective.loss_and_gradient(mean[0])[1].abs().max()) < 1e-14
        lowest = torch.linalg.eigvalsh(objective.hessian(mean[0]) + 100 * mean.T @ mean)[0]
        assert math.copysign(1.0, float(lowest)) == math.copysign(1.0, shift)


def test_neurons_follow_the_flow_of_their_overlaps() -> None:
    """m_j′ = p (m_j^{p−1} − m_j Σ_l m_l^p) for orthogonal index vectors; and every neuron keeps norm 1."""
    p, k, d = 4, 3, 6
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, d, generator=generator, dtype=torch.float64)
    w /= w.norm(dim=1, keepdim=True)
    objective = correlation_on_sphere(w, torch.eye(k, d, dtype=torch.float64), p)
    flow = integrate(objective, w.reshape(-1), (0.0, 10.0), method="dopri5", rtol=1e-8)
    end = flow.theta[-1].view(5, d)
    assert torch.allclose(end.norm(dim=1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-7)
    m = w[:, :k]
    slope = p * (m ** (p - 1) - m * (m**p).sum(1, keepdim=True))
    gradient = objective.loss_and_gradient(w.reshape(-1))[1].view(5, d)[:, :k]
    assert torch.allclose(-gradient, slope, rtol=0, atol=1e-14)
    assert torch.equal(end[:, :k].abs().argmax(1), m.abs().argmax(1))


def test_unit_rows_are_what_autograd_finds() -> None:
    student, teacher = network(3, 2, torch.tanh), network(3, 2, torch.tanh, seed=1)
    base = PopulationObjective(student, teacher)
    objective, theta = UnitRows(base, 2, 3), base.initial_theta()
    step, eye = 1e-5, torch.eye(len(theta), dtype=torch.float64)
    ends = [[objective.loss_and_gradient(theta + s * step * e) for s in (1, -1)] for e in eye]
    loss, gradient = objective.loss_and_gradient(theta)
    unit = torch.cat([(theta[:6].view(2, 3) / theta[:6].view(2, 3).norm(dim=1, keepdim=True)).reshape(-1), theta[6:]])
    assert torch.equal(loss, base.loss_and_gradient(unit)[0])
    assert torch.allclose(torch.stack([(a[0] - b[0]) / (2 * step) for a, b in ends]), gradient, rtol=0, atol=1e-9)
    hessian = objective.hessian(theta)
    assert torch.allclose(torch.stack([(a[1] - b[1]) / (2 * step) for a, b in ends]), hessian, rtol=0, atol=1e-8)
    assert torch.allclose(objective.hvp(theta, eye), hessian, rtol=0, atol=1e-13)
    assert objective.kind() != base.kind()


def test_what_is_refused() -> None:
    teachers = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="groups must be a partition"):
        copy_average(teachers, [[0, 1]])
    with pytest.raises(ValueError, match="orthonormal"):
        copy_average(2 * teachers, [[0, 1, 2]])
    with pytest.raises(ValueError, match="sizes must be a positive integer"):
        copy_average_loss([1, 0])
    with pytest.raises(ValueError, match="exponent must be an integer"):
        critical_overlap(3, 1)
    with pytest.raises(ValueError, match="degree must be an integer"):
        hermite_coefficients(-1)
    base = orthonormal(2, nn.ReLU())
    with pytest.raises(ValueError, match="at most"):
        UnitRows(base, 5, 5)
