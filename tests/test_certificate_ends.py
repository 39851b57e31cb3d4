"""Singular and unbounded ends: valleys explained by symmetries, channels to infinity, saddles that are left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import teacher_student
from torch import Tensor, nn

from torch_gradflow.minimize.certificate import CriticalPoint, certify
from torch_gradflow.minimize.channels import find_channel
from torch_gradflow.minimize.escape import leave_saddle
from torch_gradflow.minimize.minimize import minimize
from torch_gradflow.minimize.network import known_network
from torch_gradflow.minimize.symmetries import symmetries
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.activations import IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples

SOFTPLUS = Activation("softplus", (1.0, 20.0))


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(network: Perceptron, phi: Tensor, x: Tensor) -> Tensor:
    """f(x), written with the activations' formulas alone."""
    a = x
    for layer, (start, bias) in enumerate(network.offsets()):
        fan_in, fan_out = network.sizes[layer], network.sizes[layer + 1]
        z = phi[start : start + fan_in * fan_out].view(fan_out, fan_in) @ a
        z = z if bias is None else z + phi[bias : bias + fan_out, None]
        rows = z.split([count for count, _ in network.activations[layer]])
        a = torch.cat([kind.derivatives(part, 0)[0] for (_, kind), part in zip(network.activations[layer], rows, strict=True)])
    return a


def realised(network: Perceptron, phi: Tensor, n_samples: int = 40) -> tuple[PerceptronObjective, RecognisedPerceptron]:
    """The squared error of data that this very network makes, so that φ is a minimum with loss zero."""
    x = normal(7, network.sizes[0], n_samples)
    weights = torch.full((n_samples,), 1 / n_samples, dtype=torch.float64)
    samples, loss = Samples(x, outputs(network, phi, x), weights), Loss("squared error")
    index = torch.arange(network.n_parameters)
    known = RecognisedPerceptron(network, loss, samples, index, None, None, None)
    return PerceptronObjective(network, loss, samples), known


def rank_of_jacobian(network: Perceptron, phi: Tensor, x: Tensor) -> int:
    """That of ∂f/∂φ by autograd: at zero loss it is the rank of the Hessian."""
    jacobian = torch.autograd.functional.jacobian(lambda p: outputs(network, p, x).reshape(-1), phi)
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))


LEAKY = Activation("leaky_relu", (0.1,))
# The network, and how many dimensions its symmetries have at a generic point: r² for each linear hidden layer of r neurons,
# and r more where its biases can be moved into those of the next; one for each homogeneous neuron.
GENERIC = [
    ("linear", Perceptron.of((3, 2, 3), IDENTITY, IDENTITY, bias=False), 4),
    ("linear with biases", Perceptron.of((3, 2, 3), IDENTITY, IDENTITY), 4 + 2),
    ("deep linear", Perceptron.of((3, 2, 2, 3), IDENTITY, IDENTITY, bias=False), 4 + 4),
    ("relu", Perceptron.of((2, 4, 1), Activation("relu"), IDENTITY), 4),
    ("leaky relu", Perceptron.of((2, 3, 2, 1), LEAKY, IDENTITY), 3 + 2),
    ("square", Perceptron.of((3, 1, 1), Activation("square"), IDENTITY), 1),
    ("cube", Perceptron.of((2, 2, 1), Activation("cube"), IDENTITY, bias=False), 2),
    ("tanh", Perceptron.of((2, 3, 1), Activation("tanh"), IDENTITY), 0),
    (
        "linear and relu side by side",
        Perceptron((2, 4, 2), (True, True), (((2, IDENTITY), (2, Activation("relu"))), ((2, IDENTITY),))),
        4 + 2 + 2,
    ),
]


@pytest.mark.parametrize(("name", "network", "dimensions"), GENERIC, ids=[name for name, _, _ in GENERIC])
def test_zero_eigenvalues_of_a_realised_network_are_those_of_its_symmetries(
    name: str, network: Perceptron, dimensions: int
) -> None:
    """The orbit's dimension, the Hessian's nullity, and the number that is explained are the same."""
    phi = normal(5, network.n_parameters)  # where no neuron is linear, or dead, on all data
    objective, known = realised(network, phi)
    assert network.n_parameters - rank_of_jacobian(network, phi, known.samples.x) == dimensions
    certificate = certify(objective, phi, network=known)
    assert certificate.n_zero == dimensions
    assert certificate.kind == ("degenerate minimum" if dimensions else "minimum")
    if dimensions:
        assert certificate.end == "valley of minima"
        assert certificate.explanation is not None
        assert (certificate.explanation.n_predicted, certificate.explanation.n_explained) == (dimensions, dimensions)
        assert f"{dimensions} of them explained by the architecture" in certificate.message
    else:
        assert certificate.explanation is None


@pytest.mark.parametrize(("name", "network", "dimensions"), GENERIC, ids=[name for name, _, _ in GENERIC])
def test_symmetries_leave_outputs_alone(name: str, network: Perceptron, dimensions: int) -> None:
    """The derivative of f along each direction is zero, by autograd."""
    phi, x = normal(4, network.n_parameters), normal(5, network.sizes[0], 20)
    known = known_network(
        PerceptronObjective(network, Loss("squared error"), Samples(x, outputs(network, phi, x), x[0] ** 0)), None
    )
    assert known is not None
    jacobian = torch.autograd.functional.jacobian(lambda p: outputs(network, p, x).reshape(-1), phi)
    for symmetry in symmetries(known, phi):
        for direction in symmetry.tangents.T:
            assert float((jacobian @ direction).abs().max()) < 1e-12


def of_neurons(*neurons: tuple[float, float, float, float]) -> Tensor:
    """φ of a network (2, n, 1) from (w_1, w_2, b, a) of each neuron, with the output bias 0.3."""
    rows = torch.tensor(neurons, dtype=torch.float64)
    return torch.cat([rows[:, :2].reshape(-1), rows[:, 2], rows[:, 3], torch.tensor([0.3], dtype=torch.float64)])


A, B = (0.6, -0.4, 0.2, 1.3), (-0.5, 0.9, 0.1, 0.8)


@pytest.mark.parametrize(
    ("name", "kind", "neurons", "n_zero", "names"),
    [
        # Opposite changes of equal neurons' weights change f at second order only: zero eigenvalues, but no symmetry.
        ("equal", SOFTPLUS, (A, B, (*A[:3], -0.4)), 4, (("equal neurons", 1),)),
        ("opposite", Activation("tanh"), (A, B, (-0.6, 0.4, -0.2, -0.4)), 4, (("equal neurons", 1),)),
        ("unused", SOFTPLUS, (A, B, (0.1, 0.7, -0.3, 0.0)), 3, (("neurons without output", 3),)),
        # Rows of the Hessian that hold nothing but rounding must not be scaled up to tell signs from them.
        ("hardly used", SOFTPLUS, (A, B, (0.1, 0.7, -0.3, 1e-11)), 3, (("neurons without output", 3),)),
        ("unused equal", SOFTPLUS, (A, (*A[:3], 0.0)), 4, (("neurons without output", 3), ("equal neurons", 1))),
        (
            "dead",
            Activation("relu"),
            ((0.6, -0.4, 0.2, 1.3), (0.1, 0.1, -9.0, 0.7)),
            5,
            (("rescaling of homogeneous neurons", 2), ("dead neurons", 3)),
        ),
    ],
)
def test_special_neurons(
    name: str, kind: Activation, neurons: tuple[tuple[float, ...], ...], n_zero: int, names: tuple[tuple[str, int], ...]
) -> None:
    """Neurons that are equal, opposite, unused or dead leave directions free; counted, and named."""
    network = Perceptron.of((2, len(neurons), 1), kind, IDENTITY)
    phi = of_neurons(*neurons)  # type: ignore[arg-type]
    objective, known = realised(network, phi)
    certificate = certify(objective, phi, network=known)
    explanation = certificate.explanation
    assert explanation is not None
    assert certificate.n_zero == network.n_parameters - rank_of_jacobian(network, phi, known.samples.x)
    assert certificate.n_zero == n_zero
    assert explanation.names == names
    assert explanation.n_explained == sum(n for _, n in names)
    assert certificate.kind == "degenerate minimum"
    # What symmetries do not explain, or not all at once, is decided by the loss, which is zero.
    assert explanation.joint == (name != "unused equal")
    settled = explanation.joint and explanation.n_explained == n_zero
    assert certificate.end == ("valley of minima" if settled else "zero loss")
    assert ("so that it cannot fall" in certificate.message) != settled


def test_a_neuron_at_its_kink_is_not_dead() -> None:
    """With zero weights it has no slope on any sample, but a small step gives it one, and the loss falls."""
    network = Perceptron.of((2, 1, 1), Activation("relu"), IDENTITY)
    phi = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.3], dtype=torch.float64)
    x = normal(1, 2, 30)
    samples = Samples(x, x[:1] ** 2, torch.full((30,), 1 / 30, dtype=torch.float64))
    phi[-1] = (x[0] ** 2).mean()
    known = RecognisedPerceptron(network, Loss("squared error"), samples, torch.arange(5), None, None, None)
    certificate = certify(PerceptronObjective(network, known.loss, samples), phi, network=known)
    assert certificate.explanation is not None
    assert "dead neurons" not in dict(certificate.explanation.names)
    assert certificate.kind == "saddle"


def test_constant_inputs_and_the_softmax() -> None:
    """Softmax regression with an input that is always zero: its weights are free, and what all logits have in common."""
    network, loss = Perceptron.of((3, 4), IDENTITY, IDENTITY), Loss("cross entropy")
    x = normal(1, 3, 60)
    x[1] = 0.0
    classes = torch.arange(60) % 4
    samples = Samples(x, torch.eye(4, dtype=torch.float64)[classes].T, torch.full((60,), 1 / 60, dtype=torch.float64))
    objective = PerceptronObjective(network, loss, samples)
    known = RecognisedPerceptron(network, loss, samples, torch.arange(16), None, None, None)
    phi = torch.zeros(16, dtype=torch.float64)
    for _ in range(12):  # convex: Newton's method with the pseudo-inverse
        _, gradient, hessian = objective.loss_gradient_hessian(phi)
        phi = phi - torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True) @ gradient
    certificate = certify(objective, phi, network=known)
    assert certificate.kind == "degenerate minimum"
    assert certificate.explanation is not None
    # 4 weights of the zero input, and a shift per remaining input and for the biases; those overlap in nothing.
    assert certificate.n_zero == certificate.explanation.n_explained == 4 + 3
    assert dict(certificate.explanation.names) == {"shift of all logits": 4, "linearly dependent inputs of a layer": 3}


def test_frozen_and_permuted_parameters() -> None:
    """With frozen output weights no neuron can be rescaled; in another order, and scaled, all can."""
    network = Perceptron.of((2, 3, 1), Activation("relu"), IDENTITY)
    phi = normal(4, 13)
    _, known = realised(network, phi)
    index = torch.arange(13)
    index[9:] = -1
    frozen = replace(known, index=index, frozen=phi)
    objective = PerceptronObjective(network, known.loss, known.samples, index=index, frozen=phi)
    certificate = certify(objective, phi[:9].clone(), network=frozen)
    assert certificate.explanation is None or certificate.explanation.n_predicted == 0
    order, scale = torch.randperm(13, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2.0, 13).double()
    permuted = replace(known, index=order, scale=scale)
    objective = PerceptronObjective(network, known.loss, known.samples, index=order, scale=scale)
    theta = torch.empty_like(phi)
    theta[order] = phi
    theta = theta / scale
    assert float(objective.loss_and_gradient(theta)[0]) < 1e-28
    certificate = certify(objective, theta, network=permuted)
    assert certificate.explanation is not None
    assert certificate.n_zero == certificate.explanation.n_explained == 3


# --- Channels to infinity -----------------------------------------------------------------------------------------------

X, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(120))


def erf_pair(epsilon: float) -> tuple[PerceptronObjective, Tensor, float]:
    """The toy of arXiv 2506.14951, figure 6: two neurons erf(wx/√2) without biases, in its first channel at that ε; and h.

    The target is erf((5x + 2.5)/√2) + erf((5x − 2.5)/√2), x standard normal (by quadrature); w, c and a as published.
    """
    x, weights = X, WEIGHTS / math.sqrt(2 * math.pi)
    target = torch.erf((5 * x + 2.5) / math.sqrt(2)) + torch.erf((5 * x - 2.5) / math.sqrt(2))
    network = Perceptron.of((1, 2, 1), Activation("erf"), IDENTITY, bias=False)
    objective = PerceptronObjective(network, Loss("squared error"), Samples(x[None], target[None], weights))
    w, c, a = 0.866296, 1.66756, 1.49668
    z = w * x / math.sqrt(2)
    slope = 2 / math.sqrt(math.pi) * torch.exp(-z * z) / math.sqrt(2)  # of σ(u) = erf(u/√2), at u = w x
    second, third = -w * x * slope, ((w * x) ** 2 - 1) * slope
    residual = c * torch.erf(z) + a * x * slope - target
    h = float((weights * 2 * residual * (c / 2 * x**2 * second + a / 6 * x**3 * third)).sum())
    phi = torch.tensor([w + epsilon, w - epsilon], dtype=torch.float64) / math.sqrt(2)
    return (
        objective,
        torch.cat([phi, torch.tensor([c / 2 + a / (2 * epsilon), c / 2 - a / (2 * epsilon)], dtype=torch.float64)]),
        h,
    )


def test_a_channel_to_infinity() -> None:
    """Named with its two neurons; its attraction h is that of the expansion of the loss."""
    objective, theta, h = erf_pair(0.01)
    assert h == pytest.approx(0.0071, abs=5e-5)  # as published
    certificate = certify(objective, theta)
    assert certificate.end == "channel to infinity"
    channel = certificate.channel
    assert channel is not None
    assert (channel.layer, channel.neurons) == (0, (0, 1))
    assert channel.output_sum == pytest.approx((1.66756,), rel=1e-9)
    assert channel.output_difference == pytest.approx(1.49668 / 0.01)
    assert channel.epsilon == pytest.approx(0.01 / math.sqrt(2))
    errors = []
    for epsilon in (0.01, 0.005):
        found = certify(*erf_pair(epsilon)[:2]).channel
        assert found is not None
        # ε is measured in the weights of erf(z), which are those of the paper by √2.
        errors.append(found.fall / (0.75 * epsilon**2) - h)
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.05)  # L = L₀ + ε² h + O(ε⁴)
    assert abs(errors[1]) < 1e-3 * h
    assert "the minimum lies at infinity" in certificate.message


def test_the_motion_must_be_that_of_a_channel() -> None:
    """From a larger ε it is; from a point that differs in nothing else than a shift across the channel it is not."""
    objective, theta, _ = erf_pair(0.01)
    _, before, _ = erf_pair(0.02)
    found = certify(objective, theta, earlier=before).channel
    assert found is not None
    assert found.within is not None
    assert found.within > 0.999
    network = Perceptron.of((2, 2, 1), Activation("tanh"), IDENTITY)
    phi = of_neurons((0.5, -0.3, 0.1, 40.0), (0.51, -0.3, 0.1, -39.0))
    known = known_network(realised(network, phi)[0], None)
    assert known is not None
    # A loss that falls as the pair comes nearer.
    objective_ = FunctionObjective(lambda: (lambda t: (t[0] - t[2]) ** 2,), 9, torch.float64, torch.device("cpu"))
    loss, _ = objective_.loss_and_gradient(phi)
    for place, inside in ((4, False), (6, True), (8, False)):
        earlier = phi.clone()
        earlier[place] += 1e-3
        assert (find_channel(objective_, known, phi, loss, earlier=earlier) is not None) == inside


@pytest.mark.parametrize("scale", [0.02, 0.01])
def test_a_channel_with_the_constant_neuron(scale: float) -> None:
    """A softplus neuron that learns a line as w → 0, a → ∞, the output bias opposed; the loss falls about in proportion."""
    network = Perceptron.of((1, 1, 1), SOFTPLUS, IDENTITY)
    x = normal(1, 1, 50)
    weights = torch.full((50,), 0.02, dtype=torch.float64)
    objective = PerceptronObjective(network, Loss("squared error"), Samples(x, 0.7 * x - 0.2, weights))

    def loss_at(s: float) -> float:
        """Of the pair at w = s, a = 0.7/(s σ(β)) and the bias that makes f(0) = −0.2, written out."""
        f = 0.7 / (s / (1 + math.exp(-0.5))) * (torch.nn.functional.softplus(s * x + 0.5) - math.log1p(math.exp(0.5))) - 0.2
        return float((weights * (f - 0.7 * x + 0.2) ** 2).sum())

    a = 0.7 / (scale / (1 + math.exp(-0.5)))
    bias = -0.2 - a * math.log1p(math.exp(0.5))
    certificate = certify(objective, torch.tensor([scale, 0.5, a, bias], dtype=torch.float64))
    assert certificate.end == "channel to infinity"
    channel = certificate.channel
    assert channel is not None
    assert channel.neurons == (0, None)
    assert channel.fall == pytest.approx(loss_at(scale) - loss_at(scale / 2), rel=1e-9)
    assert channel.epsilon == pytest.approx(scale / 2)
    assert channel.output_sum == pytest.approx((a + bias / math.log1p(math.exp(0.5)),))
    assert "neuron 0 of layer 0 and the biases above it align" in certificate.message


def test_what_is_no_channel() -> None:
    """Where the loss rises as the pair comes nearer, where outputs are not opposed, where neurons are equal or far apart."""
    objective, theta, _ = erf_pair(0.01)
    known = known_network(objective, None)
    assert known is not None
    loss, _ = objective.loss_and_gradient(theta)
    assert find_channel(objective, known, theta, loss) is not None
    upside_down = FunctionObjective(lambda: (lambda t: -((t[0] - t[1]) ** 2),), 4, torch.float64, torch.device("cpu"))
    assert find_channel(upside_down, known, theta, upside_down.loss_and_gradient(theta)[0]) is None
    for change in (theta.abs(), theta * torch.tensor([1.0, 1.2, 1.0, 1.0]), theta[[0, 0, 2, 3]]):
        assert find_channel(objective, known, change, objective.loss_and_gradient(change)[0]) is None


# --- Leaving saddles ----------------------------------------------------------------------------------------------------


def objective_of(term: Callable[[Tensor], Tensor], n: int) -> FunctionObjective:
    """A function of θ as an Objective."""
    return FunctionObjective(lambda: (term,), n, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "term", "theta"),
    [
        ("double well", lambda t: t[0] ** 4 / 4 - t[0] ** 2 / 2 + t[1] ** 2, (0.0, 0.0)),
        ("shallow", lambda t: 1 + t[0] ** 4 / 4 - 1e-6 * t[0] ** 2 + t[1] ** 2, (0.0, 0.0)),
        ("cubic", lambda t: t[0] ** 3 + t[0] ** 4 + t[1] ** 2, (0.0, 0.0)),
        ("soon a wall", lambda t: -(t[0] ** 2) + 1e8 * t[0] ** 4 + t[1] ** 2, (0.0, 0.0)),
        ("one side lower", lambda t: -(t[0] ** 2) / 2 + t[0] ** 3 / 10 + t[0] ** 4 / 4 + t[1] ** 2, (0.0, 0.0)),
        ("NaN beyond", lambda t: -(t[0] ** 2) + 0 * torch.log(1e-2 - t[0] ** 2) + t[1] ** 2, (0.0, 0.0)),
    ],
)
def test_saddles_are_left_downhill(name: str, term: Callable[[Tensor], Tensor], theta: tuple[float, float]) -> None:
    """To a finite, lower loss, not across the valley's other direction."""
    objective, start = objective_of(term, 2), torch.tensor(theta, dtype=torch.float64)
    point = certify(objective, start)
    assert point.kind == "saddle"
    there = leave_saddle(objective, start, point)
    assert float(objective.loss_and_gradient(there)[0]) < float(objective.loss_and_gradient(start)[0])
    if name == "one side lower":
        assert float(there[0]) < 0


def test_only_saddles_are_left() -> None:
    """A minimum is refused; where the loss falls nowhere that can be seen, θ stays."""
    bowl: Objective = objective_of(lambda t: (t**2).sum(), 2)
    origin = torch.zeros(2, dtype=torch.float64)
    point = certify(bowl, origin)
    with pytest.raises(ValueError, match=r"point must be a saddle.*'minimum'"):
        leave_saddle(bowl, origin, point)
    claimed: CriticalPoint = replace(point, descent=torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(leave_saddle(bowl, origin, claimed), origin)


def test_auto_goes_on_to_zero_loss_where_the_end_is_undecided() -> None:
    """More neurons than the teacher's: a gradient of 1e-13 says little; where the loss comes to zero, the certificate is."""
    model, x, y = teacher_student(1, n_samples=100)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    theta = objective.initial_theta()
    before, settled = minimize(objective, theta, certificate=False), minimize(objective, theta)
    assert before.status == settled.status == "converged"
    there = certify(objective, before.theta)
    assert there.end == "undecided" and f"can fall by {before.loss:.1e} at most" in there.message
    assert settled.certificate is not None and settled.certificate.end == "zero loss"
    assert settled.loss < 1e-27 < before.loss and before.n_iter < settled.n_iter <= before.n_iter + 300
    # Methods that were asked for by name stop where they were told to.
    assert minimize(objective, before.theta, method="levenberg-marquardt").n_iter == 0
