"""Ball arithmetic against mpmath and autograd, and what is proven with it, or refused."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from flint import arb, ctx
from problems import flat, teacher_student
from torch import Tensor

from torch_gradflow.minimize.balls import FORMULAS, BallLoss
from torch_gradflow.minimize.certificate import certify
from torch_gradflow.minimize.network import known_network
from torch_gradflow.minimize.proof import Proof, above, below, prove_minimum
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.activations import IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples

PARAMETERS = {"softplus": (1.3, 20.0), "polynomial": (0.2, -1.0, 0.3, 0.7)}
SOFTPLUS = Activation("softplus", (1.0, 20.0))


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(network: Perceptron, loss: Loss, n_samples: int) -> tuple[PerceptronObjective, RecognisedPerceptron]:
    """Random data for a network."""
    n_out = network.sizes[-1]
    targets = normal(2, loss.n_targets(n_out), n_samples)
    targets = targets if loss.name == "squared error" else targets.abs()
    samples = Samples(normal(1, network.sizes[0], n_samples), targets, normal(3, n_samples).abs() / n_samples)
    index = torch.arange(network.n_parameters)
    return PerceptronObjective(network, loss, samples), RecognisedPerceptron(network, loss, samples, index, None, None, None)


def balls_of(known: RecognisedPerceptron, objective: PerceptronObjective) -> BallLoss:
    """The loss in ball arithmetic."""
    found = known_network(objective, known)
    assert found is not None
    return BallLoss(found, known.loss, known.samples)


FUNCTIONS = {
    "identity": lambda z: z,
    "tanh": mpmath.tanh,
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "softplus": lambda z: mpmath.log1p(mpmath.exp(mpmath.mpf(1.3) * z)) / mpmath.mpf(1.3),
    "erf": mpmath.erf,
    "normal_cdf": mpmath.ncdf,
    "gelu": lambda z: z * mpmath.ncdf(z),
    "gelu_tanh": lambda z: z * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf(0.044715) * z**3))) / 2,
    "silu": lambda z: z / (1 + mpmath.exp(-z)),
    "sigmoid_softplus": lambda z: 1 / (1 + mpmath.exp(-4 * z)) + mpmath.log1p(mpmath.exp(z)),
    "square": lambda z: z**2,
    "cube": lambda z: z**3,
    "polynomial": lambda z: sum(mpmath.mpf(c) * z**k for k, c in enumerate(PARAMETERS["polynomial"])),
}


def to_arb(number: mpmath.mpf) -> arb:
    """An mpmath number, exactly."""
    sign, mantissa, exponent, _ = number._mpf_
    return arb(-mantissa if sign else mantissa) * arb(2) ** exponent


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("z", [-3.7, -0.31, 0.0, 0.6, 2.9])
def test_activations_enclose_mpmath(name: str, z: float) -> None:
    """g by mpmath and g′, g″ by its numerical differentiation at 60 digits, at a point and within a ball."""
    assert FORMULAS.keys() == FUNCTIONS.keys()
    with ctx.workprec(280), mpmath.workdps(80):
        exact = [to_arb(mpmath.diff(FUNCTIONS[name], mpmath.mpf(z), order)) for order in range(3)]
    with ctx.workprec(128):
        formula = FORMULAS[name](*PARAMETERS.get(name, ()))
        for ball in (arb(z), arb(z, 1e-3), arb(z + 1e-3, 2e-3)):
            for found, wanted in zip(formula(ball), exact, strict=True):
                assert arb(found.mid(), found.rad() + arb(1e-25)).contains(wanted)
        assert all(found.rad() < 1e-30 for found in formula(arb(z)))


def test_loss_derivatives_enclose_mpmath() -> None:
    """Gradient and Hessian of a small network by mpmath's numerical differentiation of the loss itself."""
    network, loss = Perceptron.of((1, 2, 1), Activation("tanh"), IDENTITY), Loss("squared error")
    objective, known = problem(network, loss, 4)
    theta, samples = normal(4, 7), known.samples

    def value(*t: mpmath.mpf) -> mpmath.mpf:
        total = mpmath.mpf(0)
        for x, y, w in zip(samples.x[0].tolist(), samples.targets[0].tolist(), samples.weights.tolist(), strict=True):
            f = t[6] + sum(t[4 + i] * mpmath.tanh(t[i] * x + t[2 + i]) for i in range(2))
            total += w * (f - y) ** 2
        return total

    with ctx.workprec(128), mpmath.workdps(90):
        balls, point = balls_of(known, objective), [arb(v) for v in theta.tolist()]
        gradient, hessian = balls.gradient(point), balls.hessian(point)
        at = tuple(mpmath.mpf(v) for v in theta.tolist())
        for i in range(7):
            for j in range(-1, i + 1):
                orders = tuple(int(k == i) + int(k == j) for k in range(7))
                found = gradient[i] if j < 0 else hessian[i, j]
                wanted = to_arb(mpmath.diff(value, at, orders))
                assert found.rad() < 1e-30
                assert arb(found.mid(), found.rad() + arb(1e-25)).contains(wanted)
                assert j < 0 or hessian[j, i].mid() == found.mid()


MIXED = Perceptron(
    (2, 3, 2, 2),
    (True, False, True),
    (((2, Activation("tanh")), (1, Activation("gelu"))), ((2, SOFTPLUS),), ((1, Activation("sigmoid")), (1, IDENTITY))),
)
NETWORKS = {
    "linear": Perceptron.of((3, 2), IDENTITY, IDENTITY),
    "one hidden layer": Perceptron.of((2, 3, 2), Activation("sigmoid_softplus"), IDENTITY),
    "without biases": Perceptron.of((2, 3, 1), Activation("erf"), IDENTITY, bias=False),
    "deep": Perceptron.of((2, 2, 3, 2, 1), Activation("silu"), IDENTITY),
    "mixed": MIXED,
}


@pytest.mark.parametrize("loss", ["squared error", "cross entropy", "binary cross entropy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_boxes_enclose_the_derivatives_at_their_points(name: str, loss: str) -> None:
    """At random points of a box, closed forms (which are tested against autograd) lie in the enclosures; these are narrow."""
    network = NETWORKS[name]
    objective, known = problem(network, Loss(loss), 30)  # type: ignore[arg-type]
    theta, width = normal(5, network.n_parameters), 1e-6
    with ctx.workprec(128):
        balls, box = balls_of(known, objective), [arb(v, width) for v in theta.tolist()]
        gradient, hessian = balls.gradient(box), balls.hessian(box)
    for seed in range(3):
        shift = width * (1 - 2 * torch.rand(len(theta), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        _, g, h = objective.loss_gradient_hessian(theta + (shift if seed else width * shift.sign()))
        assert all(
            arb(ball.mid(), ball.rad() + arb(1e-13)).contains(arb(v)) for ball, v in zip(gradient, g.tolist(), strict=True)
        )
        for i, row in enumerate(h.tolist()):
            for j, v in enumerate(row):
                assert arb(hessian[i, j].mid(), hessian[i, j].rad() + arb(1e-13)).contains(arb(v))
                assert hessian[i, j].rad() < 1e-2


def test_frozen_permuted_scaled_and_decayed_parameters() -> None:
    """The same for θ that is not φ: gradients and Hessians of the objective itself."""
    network, loss = Perceptron.of((2, 3, 1), Activation("tanh"), IDENTITY), Loss("squared error")
    _, known = problem(network, loss, 20)
    index = torch.tensor([3, 0, 1, 2, -1, 4, 5, 6, -1, 7, 8, 9, 10])
    known = replace(
        known,
        index=index,
        frozen=normal(1, 13),
        scale=torch.linspace(0.5, 2, 11).double(),
        decay=torch.linspace(0, 1, 11).double(),
    )
    objective = PerceptronObjective(
        network, loss, known.samples, index=index, frozen=known.frozen, scale=known.scale, decay=known.decay
    )
    theta = normal(2, 11)
    _, g, h = objective.loss_gradient_hessian(theta)
    with ctx.workprec(128):
        balls, point = balls_of(known, objective), [arb(v) for v in theta.tolist()]
        gradient, hessian = balls.gradient(point), balls.hessian(point)
    assert torch.allclose(torch.tensor([float(v) for v in gradient], dtype=torch.float64), g, rtol=1e-12, atol=1e-14)
    found = torch.tensor([[float(v) for v in row] for row in hessian.tolist()], dtype=torch.float64)
    assert torch.allclose(found, h, rtol=1e-12, atol=1e-14)


def test_floats_bound_balls() -> None:
    """Rounded outwards."""
    with ctx.workprec(128):
        ball = arb(1) / 3
        assert arb(above(ball)) > ball > arb(below(ball))
        assert above(ball) - below(ball) < 1e-15
        assert arb(1.0, 0.1).contains(arb(1.1)) and arb(1.0, 0.1).contains(arb(0.9))


# --- Proofs -------------------------------------------------------------------------------------------------------------


def one_neuron(n_nodes: int) -> tuple[PerceptronObjective, RecognisedPerceptron, Tensor]:
    """One neuron erf(w·x/√2) learns two orthonormal ones; x standard normal, by Gauss–Hermite quadrature in two dimensions.

    The population loss has a minimum at a = k, w = Σ v_j/√(k(2k − 1)), here k = 2 (arXiv 2311.01644); the parameters of the
    network are w/√2 and a.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    x = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes)).reshape(2, -1))
    samples = Samples(
        x,
        torch.erf(x / math.sqrt(2)).sum(0, keepdim=True),
        torch.from_numpy(np.outer(weights, weights).reshape(-1) / (2 * math.pi)),
    )
    network, loss = Perceptron.of((2, 1, 1), Activation("erf"), IDENTITY, bias=False), Loss("squared error")
    known = RecognisedPerceptron(network, loss, samples, torch.arange(3), None, None, None)
    closed_form = torch.tensor([1 / math.sqrt(12), 1 / math.sqrt(12), 2.0], dtype=torch.float64)
    return PerceptronObjective(network, loss, samples), known, closed_form


def newton(objective: PerceptronObjective, theta: Tensor, n_steps: int = 8) -> Tensor:
    """Plain Newton steps."""
    for _ in range(n_steps):
        _, gradient, hessian = objective.loss_gradient_hessian(theta)
        theta = theta - torch.linalg.solve(hessian, gradient)
    return theta


def test_the_one_neuron_minimum_is_proven() -> None:
    """The minimum of the quadrature's loss, which lies as near to the closed form as the quadrature is exact.

    What is proven is a theorem on the finite sum; that this is the population's loss up to 1e-10 is not part of it, and is
    seen from the closed form's loss and place.
    """
    objective, known, closed_form = one_neuron(60)
    expected = 2 / 3 - 8 / math.pi * math.asin(1 / 4)
    assert float(objective.loss_and_gradient(closed_form)[0]) == pytest.approx(expected, abs=1e-9)
    theta = newton(objective, closed_form)
    assert float((theta - closed_form).norm()) < 1e-8
    certificate = certify(objective, theta, rigorous=True, network=known)
    assert certificate.kind == "minimum"
    proof = certificate.proof
    assert proof is not None
    assert proof.proven
    assert proof.existence < 1e-14
    assert proof.uniqueness > 1e-4
    # The closed form lies in the box in which there is no other critical point.
    assert float((theta - closed_form).abs().max()) < proof.uniqueness
    assert 0 < proof.lowest_eigenvalue <= float(certificate.eigenvalues[0])
    assert certificate.message.endswith(proof.message)
    assert "Proven in ball arithmetic" in proof.message


def t33(seed: int, n_samples: int) -> tuple[PerceptronObjective, RecognisedPerceptron, Tensor]:
    """Three softplus neurons that learn four."""
    model, x, y = teacher_student(seed, n_student=3, n_samples=n_samples)
    network, loss = Perceptron.of((2, 3, 1), SOFTPLUS, IDENTITY), Loss("squared error")
    samples = Samples(x.T.contiguous(), y.T.contiguous(), torch.full((n_samples,), 1 / n_samples, dtype=torch.float64))
    known = RecognisedPerceptron(network, loss, samples, torch.arange(13), None, None, None)
    return PerceptronObjective(network, loss, samples), known, flat(model)


# The minimum that trust-region Newton finds from seed 2's start, to a few digits.
MINIMUM = (
    *(0.61658, 1.478417, 1.601762, 2.312457, -0.935585, 0.979699, -0.511602, -0.170992, 1.095026),
    *(1.057753, -0.363288, -0.220706, -0.816843),
)


def test_a_minimum_of_three_neurons_that_learn_four_is_proven() -> None:
    """T33 with r = 3: another loss than zero; from a rounded minimum the proof takes Newton steps of its own."""
    objective, known, _ = t33(2, 1000)
    theta = newton(objective, torch.tensor(MINIMUM, dtype=torch.float64))
    certificate = certify(objective, theta, rigorous=True, network=known)
    proof = certificate.proof
    assert proof is not None
    assert proof.proven
    assert proof.existence < 1e-12
    assert proof.uniqueness > 1e-9
    assert 0 < proof.lowest_eigenvalue <= float(certificate.eigenvalues[0])
    near = theta + 1e-9 * normal(0, 13)
    found = known_network(objective, known)
    again = prove_minimum(found, near)
    assert again.proven
    assert float((near - theta).norm()) - proof.existence <= again.existence < 1.1 * float((near - theta).norm()) + 1e-12


def refused(proof: Proof | None, why: str) -> None:
    """Nothing is proven, and the reason is this."""
    assert proof is not None
    assert not proof.proven
    assert math.isnan(proof.existence)
    assert proof.message.startswith("Not proven: ")
    assert why in proof.message


def test_a_saddle_is_refused() -> None:
    """w = 0, a = 0 of the one-neuron problem; that it is none is a theorem too."""
    objective, known, _ = one_neuron(20)
    saddle = certify(objective, torch.zeros(3, dtype=torch.float64), rigorous=True, network=known)
    assert saddle.kind == "saddle"
    refused(saddle.proof, "certainly negative")


def test_a_valley_is_refused() -> None:
    """Two linear layers: b a = 2 is a valley of minima, of which none is the only one."""
    network = Perceptron.of((1, 1, 1), IDENTITY, IDENTITY, bias=False)
    x = normal(1, 1, 20)
    samples = Samples(x, 2 * x, torch.full((20,), 0.05, dtype=torch.float64))
    known = RecognisedPerceptron(network, Loss("squared error"), samples, torch.arange(2), None, None, None)
    objective = PerceptronObjective(network, known.loss, samples)
    valley = certify(objective, torch.tensor([0.5, 4.0], dtype=torch.float64), rigorous=True, network=known)
    assert valley.end == "valley of minima"
    refused(valley.proof, "in a valley of minima no critical point is the only one")


def test_what_cannot_be_proven_says_why() -> None:
    """Kinks, losses that are not analytic, thresholds, sizes, unknown data, slopes."""
    squared = Loss("squared error")

    def proof_of(network: Perceptron, loss: Loss, n_samples: int = 20) -> Proof:
        objective, known = problem(network, loss, n_samples)
        return prove_minimum(known_network(objective, known), normal(1, network.n_parameters))

    refused(proof_of(Perceptron.of((2, 3, 1), Activation("relu"), IDENTITY), squared), "'relu' is not analytic")
    refused(proof_of(Perceptron.of((2, 3, 1), IDENTITY, IDENTITY), Loss("huber")), "'huber' is not analytic")
    refused(proof_of(Perceptron.of((2, 13, 1), SOFTPLUS, IDENTITY), squared), "at most 50 parameters")
    refused(proof_of(Perceptron.of((2, 1), IDENTITY, IDENTITY), squared, 10_001), "10000 samples")
    objective, known, start = t33(2, 50)
    refused(certify(objective, start, rigorous=True, network=known.network).proof, "its loss and its data are not known")
    threshold = Perceptron.of((1, 1), Activation("softplus", (1.0, 1.0)), Activation("softplus", (1.0, 1.0)), bias=False)
    samples = Samples(*(torch.ones(1, n, dtype=torch.float64) for n in (1, 1)), torch.ones(1, dtype=torch.float64))
    known = RecognisedPerceptron(threshold, squared, samples, torch.arange(1), None, None, None)
    found = known_network(PerceptronObjective(threshold, squared, samples), known)
    refused(prove_minimum(found, torch.ones(1, dtype=torch.float64)), "at that threshold")


def test_a_slope_is_refused() -> None:
    """log(1 + exp(−θ)) is convex everywhere, and its minimum lies at infinity."""
    network, loss = Perceptron.of((1, 1), IDENTITY, IDENTITY, bias=False), Loss("binary cross entropy")
    one = torch.ones(1, 1, dtype=torch.float64)
    samples = Samples(one, torch.tensor([[1.0], [0.0]], dtype=torch.float64), one[0])
    known = RecognisedPerceptron(network, loss, samples, torch.arange(1), None, None, None)
    found = known_network(PerceptronObjective(network, loss, samples), known)
    refused(prove_minimum(found, 0 * one[0]), "could not be shown to contract")


def test_a_box_ends_before_a_threshold() -> None:
    """torch's softplus is another function beyond it: nothing is claimed there."""
    network = Perceptron.of((1, 1), IDENTITY, Activation("softplus", (1.0, 0.901)), bias=False)
    one, target = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), math.log1p(math.exp(0.9)), dtype=torch.float64)
    samples = Samples(one, target, one[0])
    known = RecognisedPerceptron(network, Loss("squared error"), samples, torch.arange(1), None, None, None)
    found = known_network(PerceptronObjective(network, known.loss, samples), known)
    proof = prove_minimum(found, torch.tensor([0.9], dtype=torch.float64))
    assert proof.proven
    assert 1e-6 < proof.uniqueness < 0.001


def test_a_quadratic_is_proven_from_afar() -> None:
    """Linear regression: the minimum by numpy's least squares lies within the stated distance."""
    network, loss = Perceptron.of((2, 1), IDENTITY, IDENTITY), Loss("squared error")
    objective, known = problem(network, loss, 25)
    roots = known.samples.weights.sqrt().numpy()
    design = np.vstack([known.samples.x.numpy(), np.ones(25)]).T * roots[:, None]
    best = np.linalg.lstsq(design, known.samples.targets[0].numpy() * roots, rcond=None)[0]
    theta = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)
    proof = prove_minimum(known_network(objective, known), theta)
    assert proof.proven
    distance = float(np.linalg.norm(theta.numpy() - best))
    assert distance * (1 - 1e-12) <= proof.existence < distance * 1.001
    lowest = float(np.linalg.eigvalsh(2 * design.T @ design)[0])
    assert proof.lowest_eigenvalue == pytest.approx(lowest, rel=1e-9)
    assert proof.lowest_eigenvalue <= lowest


def test_python_flint_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is evaluated."""
    monkeypatch.setitem(sys.modules, "flint", None)
    objective, known, start = t33(2, 50)
    with pytest.raises(ImportError, match=r"pip install 'torch-gradflow\[proof\]'"):
        certify(objective, start, rigorous=True, network=known)
    assert objective.counts.n_grad == 0
