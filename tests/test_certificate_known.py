"""Certificates of objectives that know their network themselves, also behind penalties and time scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_gradflow.minimize.certificate import certify
from torch_gradflow.minimize.network import known_network
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.regularized import Penalties, Regularized, Rescaled
from torch_gradflow.perceptron.activations import IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples


def newton(objective: Objective, theta: Tensor, n_steps: int = 20) -> Tensor:
    """Newton's method with |eigenvalues|, damped."""
    for _ in range(n_steps):
        _, gradient, hessian = objective.loss_gradient_hessian(theta)
        values, vectors = torch.linalg.eigh(hessian)
        step = -vectors @ ((vectors.T @ gradient) / values.abs())
        theta = theta + step * min(1.0, 0.5 / float(step.norm()))
    return theta


def tanh_network(seed: int) -> tuple[PerceptronObjective, Tensor]:
    """Two tanh neurons without biases on noisy data of such a network; its parameters."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 60, generator=generator, dtype=torch.float64), torch.randn(1, 60, generator=generator).double()
    network = Perceptron.of((2, 2, 1), Activation("tanh"), IDENTITY, bias=False)
    start = torch.tensor([1.5, 0.1, 0.1, 1.0, 1.0, -1.0], dtype=torch.float64)
    targets = start[4:] @ torch.tanh(start[:4].view(2, 2) @ x) + 0.1 * noise
    samples = Samples(x, targets, torch.full((60,), 1 / 60, dtype=torch.float64))
    return PerceptronObjective(network, Loss("squared error"), samples), start


@pytest.mark.parametrize("wrapper", ["none", "weight decay", "rescaled", "rescaled weight decay"])
def test_minima_are_proven_without_naming_the_network(wrapper: str) -> None:
    """Of the loss itself, with weight decay, and in rescaled coordinates."""
    objective: Objective
    objective, start = tanh_network(0)
    d = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    if "weight decay" in wrapper:
        objective = Regularized(objective, Penalties(weight_decay=torch.full((6,), 0.02, dtype=torch.float64)))
    if "rescaled" in wrapper:
        objective, start = Rescaled(objective, d), start / d.sqrt()
    theta = newton(objective, start)
    certificate = certify(objective, theta, rigorous=True)
    assert certificate.kind == "minimum"
    assert certificate.proof is not None
    assert certificate.proof.proven
    assert 0 < certificate.proof.lowest_eigenvalue <= float(certificate.eigenvalues[0])


def test_a_module_is_proven_too() -> None:
    """The closed form behind a ModuleObjective."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1)).double()
    x = torch.randn(30, 2, dtype=torch.float64)
    objective = ModuleObjective(model, nn.MSELoss(), (x, x[:, :1] ** 2))
    certificate = certify(objective, newton(objective, objective.initial_theta(), 60), rigorous=True)
    assert certificate.proof is not None
    assert certificate.proof.proven


def test_barriers_and_maximisation_are_not_proven() -> None:
    """The network is known still."""
    objective, start = tanh_network(0)
    for penalties in (Penalties(max_norm=5.0), Penalties(sign=-1.0)):
        known = known_network(Regularized(objective, penalties), None)
        assert known is not None
        assert known.network == objective.network
        proof = certify(Regularized(objective, penalties), start, rigorous=True).proof
        assert proof is not None
        assert "its loss and its data are not known" in proof.message


def test_weight_decay_breaks_the_rescaling_symmetry() -> None:
    """A direction that the architecture predicts but the penalty bends explains nothing, and rescaling counts in any scale."""
    generator = torch.Generator().manual_seed(2)
    network = Perceptron.of((2, 3, 1), Activation("relu"), IDENTITY, bias=False)
    x, phi = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 40), (9,)))
    targets = phi[6:] @ (phi[:6].view(3, 2) @ x).relu()
    samples = Samples(x, targets[None], torch.full((40,), 1 / 40, dtype=torch.float64))
    objective = PerceptronObjective(network, Loss("squared error"), samples)
    d = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)
    for each, theta in ((objective, phi), (Rescaled(objective, d), phi / d.sqrt())):
        explanation = certify(each, theta).explanation
        assert explanation is not None
        assert explanation.n_explained == explanation.n_predicted == 3
    decayed = Regularized(objective, Penalties(weight_decay=torch.full((9,), 1e-3, dtype=torch.float64)))
    assert float(certify(decayed, phi).eigenvalues[0]) == pytest.approx(1e-3, rel=1e-9)
