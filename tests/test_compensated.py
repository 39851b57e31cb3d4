"""Loss and gradient in double-double arithmetic against mpmath, in 50 digits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from problems import flat, teacher_student
from torch import Tensor, nn

from torch_gradflow.minimize.certificate import certify
from torch_gradflow.minimize.minimize import minimize
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.regularized import Penalties, Regularized, Rescaled
from torch_gradflow.perceptron.activations import IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples

EPS = 2.0**-53
DOUBLE_DOUBLE = 2.0**-102

Scalar = Callable[..., mp.mpf]


def logistic(z: mp.mpf) -> mp.mpf:
    """1/(1 + exp(−z))."""
    return 1 / (1 + mp.exp(-z))


def softplus(z: mp.mpf, beta: float, threshold: float) -> mp.mpf:
    """With torch's threshold."""
    return z if beta * z > threshold else mp.log1p(mp.exp(beta * z)) / beta


def polynomial(z: mp.mpf, *coefficients: float) -> mp.mpf:
    """With ascending coefficients."""
    return mp.fsum(mp.mpf(c) * z**i for i, c in enumerate(coefficients))


# The parameters that are tested, and g and g′ as functions of z and of the parameters.
EXACT: dict[str, tuple[tuple[float, ...], Scalar, Scalar]] = {
    "identity": ((), lambda z: z, lambda z: mp.mpf(1)),
    "relu": ((), lambda z: max(z, mp.mpf(0)), lambda z: mp.mpf(z > 0)),
    "leaky_relu": ((0.3,), lambda z, p: z if z > 0 else p * z, lambda z, p: mp.mpf(1) if z > 0 else mp.mpf(p)),
    "silu": ((), lambda z: z * logistic(z), lambda z: logistic(z) * (1 + z * logistic(-z))),
    "sigmoid": ((), logistic, lambda z: logistic(z) * logistic(-z)),
    "log_sigmoid": ((), lambda z: -mp.log1p(mp.exp(-z)), lambda z: logistic(-z)),
    "tanh": ((), mp.tanh, lambda z: mp.sech(z) ** 2),
    "softplus": ((1.7, 9.0), softplus, lambda z, beta, most: mp.mpf(1) if beta * z > most else logistic(beta * z)),
    "sigmoid_softplus": (
        (),
        lambda z: logistic(4 * z) + softplus(z, 1.0, 20.0),
        lambda z: 4 * logistic(4 * z) * logistic(-4 * z) + (1 if z > 20 else logistic(z)),
    ),
    "square": ((), lambda z: z * z, lambda z: 2 * z),
    "cube": ((), lambda z: z**3, lambda z: 3 * z * z),
    "polynomial": (
        (0.1, -0.7, 0.3, 0.2),
        polynomial,
        lambda z, *c: mp.fsum(i * mp.mpf(c[i]) * z ** (i - 1) for i in range(1, len(c))),
    ),
}


def numbers(tensor: Tensor) -> list[mp.mpf]:
    """The elements, exactly."""
    return [mp.mpf(v) for v in tensor.reshape(-1).tolist()]


def exact(network: Perceptron, samples: Samples, phi: Tensor) -> tuple[mp.mpf, list[mp.mpf]]:
    """Loss and gradient of the squared error, by backpropagation written out sample by sample."""
    p, gradient, loss = numbers(phi), [mp.mpf(0)] * phi.numel(), mp.mpf(0)
    activations = [[kind for count, kind in runs for _ in range(count)] for runs in network.activations]
    shapes = list(zip(network.sizes, network.sizes[1:], network.offsets(), activations, strict=False))
    for n, w in enumerate(numbers(samples.weights)):
        a, slopes = [numbers(samples.x[:, n])], []
        for d, k, (start, bias), kinds in shapes:
            z = [
                mp.fsum(p[start + j * d + m] * a[-1][m] for m in range(d)) + (p[bias + j] if bias is not None else 0)
                for j in range(k)
            ]
            a.append([EXACT[kind.name][1](v, *kind.parameters) for kind, v in zip(kinds, z, strict=True)])
            slopes.append([EXACT[kind.name][2](v, *kind.parameters) for kind, v in zip(kinds, z, strict=True)])
        residuals = [f - t for f, t in zip(a[-1], numbers(samples.targets[:, n]), strict=True)]
        loss += w * mp.fsum(r * r for r in residuals)
        delta = [2 * w * r * s for r, s in zip(residuals, slopes[-1], strict=True)]
        for layer in reversed(range(len(shapes))):
            d, k, (start, bias), _ = shapes[layer]
            for j in range(k):
                for m in range(d):
                    gradient[start + j * d + m] += delta[j] * a[layer][m]
                if bias is not None:
                    gradient[bias + j] += delta[j]
            if layer:
                back = [mp.fsum(p[start + j * d + m] * delta[j] for j in range(k)) for m in range(d)]
                delta = [b * s for b, s in zip(back, slopes[layer - 1], strict=True)]
    return loss, gradient


def worst(found: Tensor, wanted: list[mp.mpf]) -> float:
    """The largest error of an element: relative, after what double-double numbers of order 1 leave when they cancel."""
    pairs = zip(numbers(found), wanted, strict=True)
    return max(float((abs(f - w) - DOUBLE_DOUBLE) / abs(w)) for f, w in pairs if w != 0)


def samples_of(network: Perceptron, n: int, seed: int) -> Samples:
    """Random data with different weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(network.sizes[0], n, generator=generator, dtype=torch.float64)
    targets = torch.randn(network.sizes[-1], n, generator=generator, dtype=torch.float64)
    return Samples(x, targets, torch.rand(n, generator=generator, dtype=torch.float64) / n)


def test_every_activation_to_half_an_ulp() -> None:
    """A network with a neuron of each, hidden and in the output, at arguments from tiny to large."""
    with mp.workdps(50):
        hidden = tuple((1, Activation(name, parameters)) for name, (parameters, _, _) in EXACT.items())
        output = ((1, IDENTITY), (1, Activation("tanh")), (1, Activation("sigmoid")))
        network = Perceptron((2, len(hidden), 3), (True, False), (hidden, output))
        for seed, size in ((1, 0.5), (2, 4.0), (3, 30.0)):
            samples = samples_of(network, 21, seed)
            generator = torch.Generator().manual_seed(seed)
            phi = torch.randn(network.n_parameters, generator=generator, dtype=torch.float64)
            phi[: 3 * len(hidden)] *= size  # hidden arguments up to about 80
            phi[3 * len(hidden) :] /= size**3  # so that the output's stay moderate
            objective = PerceptronObjective(network, Loss("squared error"), samples).compensated()
            loss, gradient = objective.loss_and_gradient(phi)
            wanted_loss, wanted = exact(network, samples, phi)
            assert abs(mp.mpf(float(loss)) - wanted_loss) <= 1.001 * EPS * wanted_loss
            assert worst(gradient, wanted) <= 1.001 * EPS


def test_a_deep_network_without_biases() -> None:
    """Three layers, a number of samples that fills no vector."""
    with mp.workdps(50):
        network = Perceptron.of((3, 4, 2, 1), Activation("tanh"), IDENTITY, bias=False)
        samples = samples_of(network, 67, 5)
        phi = torch.linspace(-1, 1, network.n_parameters, dtype=torch.float64) ** 3 + 0.1
        objective = PerceptronObjective(network, Loss("squared error"), samples).compensated()
        assert worst(objective.loss_and_gradient(phi)[1], exact(network, samples, phi)[1]) <= 1.001 * EPS


def near_a_minimum() -> tuple[PerceptronObjective, Samples, Tensor]:
    """A student near a minimum of non-zero loss, where the gradient is the difference of much larger numbers."""
    model, x, y = teacher_student(2, n_student=3, n_samples=200)
    network = Perceptron.of((2, 3, 1), Activation("softplus", (1.0, 20.0)), IDENTITY)
    samples = Samples(x.T.contiguous(), y.T.contiguous(), torch.full((len(x),), 1 / len(x), dtype=torch.float64))
    objective = PerceptronObjective(network, Loss("squared error"), samples)
    return objective, samples, minimize(objective, flat(model), method="levenberg-marquardt", certificate=False).theta


def test_a_gradient_of_which_float64_has_few_digits() -> None:
    """At a minimum ∇L is what rounding leaves of it: float64 gives it to some 1e-17, this to the last digit."""
    objective, samples, theta = near_a_minimum()
    with mp.workdps(50):
        loss, gradient = objective.compensated().loss_and_gradient(theta)
        plain_loss, plain = objective.loss_and_gradient(theta)
        wanted_loss, wanted = exact(objective.network, samples, theta)
        size = max(abs(w) for w in wanted)
        assert size <= 1.1e-13
        assert worst(gradient, wanted) <= 1.001 * EPS
        assert abs(mp.mpf(float(loss)) - wanted_loss) <= 1.001 * EPS * wanted_loss
        assert max(abs(p - w) for p, w in zip(numbers(plain), wanted, strict=True)) > 1e3 * EPS * size
        assert float(plain_loss) == pytest.approx(float(loss), rel=1e-11)


def test_second_derivatives_and_counts_are_those_of_the_objective() -> None:
    """Only loss and gradient are computed otherwise; evaluations are counted together; copies are independent."""
    objective, _, theta = near_a_minimum()
    precise = objective.compensated()
    before = objective.counts.n_grad
    loss, gradient, hessian = precise.loss_gradient_hessian(theta)
    assert torch.equal(hessian, objective.hessian(theta))
    assert torch.equal(precise.hvp(theta, theta), objective.hvp(theta, theta))
    again = copy.deepcopy(precise).loss_and_gradient(theta)
    assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)
    assert torch.equal(precise.loss_and_gradient(theta)[1], gradient)
    assert objective.counts.n_grad == before + 1
    assert precise.kind() != objective.kind()


def test_wrappers_pass_it_on() -> None:
    """Weight decay and time constants around a compensated loss; the model's objective, too."""
    objective, _, theta = near_a_minimum()
    _, gradient = objective.compensated().loss_and_gradient(theta)
    decay = torch.full_like(theta, 0.3)
    decayed = Regularized(objective, Penalties(weight_decay=decay)).compensated()
    assert torch.equal(decayed.loss_and_gradient(theta)[1], gradient + decay * theta)
    roots = torch.full_like(theta, 2.0)
    rescaled = Rescaled(objective, roots**2).compensated()
    assert torch.equal(rescaled.loss_and_gradient(theta / 2)[1], roots * gradient)
    model, x, y = teacher_student(2, n_student=3, n_samples=200)
    module = ModuleObjective(model, nn.MSELoss(), (x, y)).compensated()
    assert torch.allclose(module.loss_and_gradient(theta)[1], gradient, rtol=1e-14, atol=0.0)


def test_what_is_not_offered_is_refused_with_the_reason() -> None:
    """Other losses, activations, kernels and types."""
    network = Perceptron.of((2, 3, 1), Activation("gelu"), IDENTITY)
    tanh = Perceptron.of((2, 3, 1), Activation("tanh"), IDENTITY)
    samples, squares = samples_of(network, 9, 0), Loss("squared error")
    with pytest.raises(NotImplementedError, match="not for 'gelu'"):
        PerceptronObjective(network, squares, samples).compensated()
    with pytest.raises(NotImplementedError, match="not for 'huber'"):
        PerceptronObjective(tanh, Loss("huber"), samples).compensated()
    with pytest.raises(NotImplementedError, match="needs kernel='numba', and 'torch' serves"):
        PerceptronObjective(tanh, squares, samples, kernel="torch").compensated()
    with pytest.raises(NotImplementedError, match=r"not of torch\.float32"):
        PerceptronObjective(tanh, squares, samples, dtype=torch.float32).compensated()
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).double()
    module = ModuleObjective(model, nn.MSELoss(), (samples.x.T, torch.zeros(9, 2, dtype=torch.float64)))
    with pytest.raises(NotImplementedError, match="perceptrons in closed form only"):
        module.compensated()


def test_certificates_tell_the_gradient_norm_without_rounding() -> None:
    objective, samples, theta = near_a_minimum()
    certificate = certify(objective, theta)
    assert certificate.kind != "not critical"
    with mp.workdps(50):
        norm = max(abs(component) for component in exact(objective.network, samples, theta)[1])
        assert abs(certificate.gradient_norm - norm) <= 1e-15 * norm
