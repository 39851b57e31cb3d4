"""Residuals, their Jacobian's factor, and Levenberg–Marquardt, against autograd, numpy and scipy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import mpmath as mp
import numpy as np
import pytest
import scipy.optimize
import torch
from problems import make_closure, teacher_student
from torch import Tensor, nn

from torch_gradflow import NewtonPolish
from torch_gradflow.minimize import least_squares
from torch_gradflow.minimize.least_squares import LevenbergMarquardt, Linearised, linearised
from torch_gradflow.minimize.method import Iterate
from torch_gradflow.minimize.minimize import minimize
from torch_gradflow.objectives.base import DerivativeError, Objective
from torch_gradflow.objectives.least_squares import LeastSquares
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.regularized import Penalties, Regularized, Rescaled
from torch_gradflow.perceptron.activations import IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples
from torch_gradflow.perceptron.kernels import KernelName

SQUARES = Loss("squared error")
NETWORKS = {
    "one hidden layer": Perceptron.of((2, 5, 1), Activation("softplus", (1.0, 20.0)), IDENTITY),
    "deep, two outputs": Perceptron.of((3, 4, 3, 2), Activation("tanh"), Activation("sigmoid")),
    "no biases": Perceptron.of((2, 3, 2), Activation("gelu"), IDENTITY, bias=False),
    "linear": Perceptron.of((4, 3), IDENTITY, IDENTITY),
    "mixed": Perceptron((2, 4, 1), (False, True), (((1, Activation("relu")), (3, Activation("erf"))), ((1, IDENTITY),))),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples_of(network: Perceptron, n: int) -> Samples:
    """Random data with different weights, one of them 0."""
    weights = random(n, seed=3).abs() / n
    weights[0] = 0.0
    return Samples(random(network.sizes[0], n, seed=1), random(network.sizes[-1], n, seed=2), weights)


def residuals_in_torch(network: Perceptron, samples: Samples, phi: Tensor) -> Tensor:
    """√(2 w) (f − t), output by output, with torch's functions."""
    a = samples.x
    for layer, (start, bias) in enumerate(network.offsets()):
        d, k = network.sizes[layer], network.sizes[layer + 1]
        z = phi[start : start + k * d].reshape(k, d) @ a
        z = z if bias is None else z + phi[bias : bias + k, None]
        parts = z.split([count for count, _ in network.activations[layer]])
        a = torch.cat([kind.derivatives(p, 0)[0] for (_, kind), p in zip(network.activations[layer], parts, strict=True)])
    return ((2 * samples.weights).sqrt() * (a - samples.targets)).flatten()


def check_against(objective: Objective, theta: Tensor, residuals: Callable[[Tensor], Tensor]) -> None:
    """Everything that has to do with residuals, against autograd through ``residuals``, a function of θ."""
    assert objective.has_residuals
    r, jacobian = residuals(theta), torch.func.jacrev(residuals)(theta)
    found, counts = objective.least_squares(theta), objective.counts
    loss, gradient = objective.loss_and_gradient(theta)
    size = float(jacobian.norm())
    assert torch.allclose(objective.residuals(theta), r, rtol=1e-12, atol=1e-13)
    assert float(found.loss) == pytest.approx(float(0.5 * r @ r), rel=1e-13)
    assert float(loss) == pytest.approx(float(found.loss), rel=1e-13)
    for g in (found.gradient, gradient, found.factor.T @ found.projection, objective.pull_back(theta, r)):
        assert torch.allclose(g, jacobian.T @ r, rtol=1e-11, atol=1e-13 * size)
    u = random(len(r), seed=9)
    assert torch.allclose(objective.pull_back(theta, u), jacobian.T @ u, rtol=1e-11, atol=1e-13 * size)
    assert torch.equal(found.factor, found.factor.triu())
    assert torch.allclose(found.factor.T @ found.factor, jacobian.T @ jacobian, rtol=1e-11, atol=1e-14 * size**2)
    values = torch.linalg.svdvals(jacobian)
    assert torch.allclose(torch.linalg.svdvals(found.factor), values, rtol=1e-11, atol=1e-14 * size)
    assert counts.n_jacobian == 1


@pytest.mark.parametrize("kernel", ["torch", "numba"])
@pytest.mark.parametrize("n", [5, 77, 700])
@pytest.mark.parametrize("name", NETWORKS)
def test_residuals_of_perceptrons(name: str, n: int, kernel: KernelName) -> None:
    """Both kernels, against torch.func.jacrev; with fewer residuals than parameters, too."""
    network = NETWORKS[name]
    samples, phi = samples_of(network, n), random(network.n_parameters, seed=4)
    objective = PerceptronObjective(network, SQUARES, samples, kernel=kernel)
    check_against(objective, phi, partial(residuals_in_torch, network, samples))
    assert len(objective.least_squares(phi).projection) == min(network.n_parameters, n * network.sizes[-1])


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_frozen_and_scaled_parameters_and_penalties(kernel: KernelName) -> None:
    """θ in another order than φ, some of φ frozen, time constants, and Σ c θ²."""
    network = NETWORKS["deep, two outputs"]
    samples, n = samples_of(network, 40), network.n_parameters
    frozen, moving = random(n, seed=5), n - 6
    index = torch.full((n,), -1)
    index[3 : 3 + moving] = torch.arange(moving).flip(0)
    scale, decay = random(moving, seed=6).abs() + 0.5, random(moving, seed=7).abs()
    objective = PerceptronObjective(
        network, SQUARES, samples, index=index, frozen=frozen, scale=scale, decay=decay, kernel=kernel
    )

    def residuals(theta: Tensor) -> Tensor:
        phi = torch.cat([frozen[:3], (scale * theta).flip(0), frozen[3 + moving :]])
        return torch.cat([residuals_in_torch(network, samples, phi), (2 * decay).sqrt() * theta])

    check_against(objective, random(moving, seed=8), residuals)


def test_wrappers_and_models() -> None:
    """Weight decay, rescaled coordinates, and a model with nn.MSELoss, by mean and by sum, in chunks and as a whole."""
    network = NETWORKS["one hidden layer"]
    samples, theta = samples_of(network, 60), random(network.n_parameters, seed=4)
    plain = partial(residuals_in_torch, network, samples)
    decay = random(len(theta), seed=5).abs()
    regularized = Regularized(PerceptronObjective(network, SQUARES, samples), Penalties(weight_decay=decay))
    check_against(regularized, theta, lambda t: torch.cat([plain(t), decay.sqrt() * t]))
    roots = random(len(theta), seed=6).abs() + 0.1
    rescaled = Rescaled(PerceptronObjective(network, SQUARES, samples), roots**2)
    check_against(rescaled, theta, lambda t: plain(roots * t))
    model, x, y = teacher_student(1, n_samples=50)
    for reduction, factor in (("mean", 2 / 50), ("sum", 2.0)):
        module = ModuleObjective(model, nn.MSELoss(reduction=reduction), (x, y), chunk_size=20)

        def of_model(t: Tensor, module: ModuleObjective = module, factor: float = factor) -> Tensor:
            parts = dict(zip(dict(model.named_parameters()), module.layout.split(t), strict=True))
            return factor**0.5 * (torch.func.functional_call(model, parts, (x,)) - y)[:, 0]

        check_against(module, module.initial_theta(), of_model)


def test_float32_residuals() -> None:
    """In the type of θ, to its rounding."""
    network = NETWORKS["one hidden layer"]
    samples, theta = samples_of(network, 60), random(network.n_parameters, seed=4).float()
    wanted = PerceptronObjective(network, SQUARES, samples).least_squares(theta.double())
    for kernel in ("torch", "numba"):
        found = PerceptronObjective(network, SQUARES, samples, dtype=torch.float32, kernel=kernel).least_squares(theta)
        assert found.factor.dtype == torch.float32
        assert torch.allclose(found.factor.abs().double(), wanted.factor.abs(), rtol=1e-3, atol=1e-5)


def test_what_has_no_residuals() -> None:
    """Other losses, the norm barrier, what is maximised, negative penalties, functions: refused with the reason."""
    network = NETWORKS["one hidden layer"]
    samples, theta = samples_of(network, 20), random(network.n_parameters, seed=4)
    huber = PerceptronObjective(network, Loss("huber"), samples)
    square = PerceptronObjective(network, SQUARES, samples)
    assert not huber.has_residuals
    for call in (huber.residuals, huber.least_squares, partial(huber.pull_back, cotangent=theta)):
        with pytest.raises(NotImplementedError, match="not known as a sum of squares"):
            call(theta)
    assert not PerceptronObjective(network, SQUARES, samples, decay=-torch.ones_like(theta)).has_residuals
    assert not Regularized(huber, Penalties()).has_residuals
    assert not Regularized(square, Penalties(max_norm=1.0)).has_residuals
    assert not Regularized(square, Penalties(sign=-1.0)).has_residuals
    assert not Regularized(square, Penalties(weight_decay=-torch.ones_like(theta))).has_residuals
    assert Regularized(square, Penalties()).has_residuals
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).double()
    module = ModuleObjective(model, nn.MSELoss(), (random(9, 2), random(9, 2)))
    assert not module.has_residuals
    with pytest.raises(NotImplementedError, match="not known as a sum of squares"):
        module.least_squares(module.initial_theta())
    with pytest.raises(ValueError, match="levenberg-marquardt"):
        minimize(huber, theta, method="levenberg-marquardt")


def test_blocks_one_after_the_other_are_one_decomposition() -> None:
    """However the residuals are cut into blocks, R is that of numpy up to signs."""
    jacobian, r = random(60, 7), random(60, seed=1)
    expected = np.linalg.qr(jacobian.numpy(), mode="r")
    whole = torch.cat([jacobian.T, r[None]])
    for cuts in ([60], [3, 4, 20, 33], [1] * 60):
        found = LeastSquares.of_blocks(whole.split(cuts, dim=1), torch.zeros(7, dtype=torch.float64))
        signs = torch.sign(found.factor.diagonal()) * torch.from_numpy(np.sign(np.diag(expected)))
        assert np.allclose((signs[:, None] * found.factor).numpy(), expected, rtol=1e-12, atol=1e-13)
        assert torch.allclose(found.factor.T @ found.projection, jacobian.T @ r, rtol=1e-12)


def test_small_singular_values_survive() -> None:
    """Of two nearly equal neurons: to a few digits 1e-12 below the largest one, where JᵀJ has none."""
    network = Perceptron.of((1, 2, 1), Activation("tanh"), IDENTITY)
    phi = torch.tensor([0.7, 0.7 + 1e-10, 0.2, 0.2, 0.5, 0.5 + 1e-7, 0.1], dtype=torch.float64)
    samples = Samples(random(1, 30), random(1, 30, seed=1), torch.full((30,), 1 / 30, dtype=torch.float64))
    factor = PerceptronObjective(network, SQUARES, samples).least_squares(phi).factor
    with mp.workdps(40):
        rows = []
        for x, w in zip(samples.x[0].tolist(), samples.weights.tolist(), strict=True):
            p = [mp.mpf(v) for v in phi.tolist()]
            t = [mp.tanh(p[j] * x + p[2 + j]) for j in (0, 1)]
            slopes = [p[4 + j] * (1 - t[j] ** 2) for j in (0, 1)]
            root = mp.sqrt(2 * mp.mpf(w))
            rows.append([root * v for v in (slopes[0] * x, slopes[1] * x, *slopes, *t, mp.mpf(1))])
        exact = [float(v) for v in mp.svd_r(mp.matrix(rows), compute_uv=False)]
    found = torch.linalg.svdvals(factor).tolist()
    assert exact[-3] < 1e-9 * exact[0]
    assert found == pytest.approx(exact, abs=1e-15 * exact[0])
    normal = torch.linalg.eigvalsh(factor.T @ factor).flip(0).clamp(min=0).sqrt().tolist()
    assert abs(normal[-3] - exact[-3]) > exact[-3]


def student(seed: int, **sizes: int) -> tuple[ModuleObjective, Tensor]:
    """T33, or another teacher–student problem."""
    model, x, y = teacher_student(seed, **sizes)
    objective = ModuleObjective(model, nn.MSELoss(), (x, y))
    return objective, objective.initial_theta()


@pytest.mark.parametrize("exact", [True, False])
def test_damped_steps(exact: bool) -> None:
    """(JᵀJ + μ) p = −Jᵀr, ‖p‖ at most the radius, μ > 0 only where it is reached; the reduction is that of ½‖r + Jp‖²."""
    network = NETWORKS["one hidden layer"]
    samples, phi = samples_of(network, 60), random(network.n_parameters, seed=4)
    linear = linearised(PerceptronObjective(network, SQUARES, samples), phi, exact=exact)
    assert linear is not None
    assert (linear.rounding == 0) == exact
    r = residuals_in_torch(network, samples, phi)
    jacobian = torch.func.jacrev(partial(residuals_in_torch, network, samples))(phi)
    for radius in (1e-4, 1e-2, 1.0, 1e6):
        p, predicted, damping = linear.damped_step(radius)
        assert float(p.norm()) <= radius * (1 + 1e-12)
        assert (damping > 0) == (float(p.norm()) > 0.99 * radius)
        left = jacobian.T @ (jacobian @ p) + damping * p
        assert torch.allclose(left, -(jacobian.T @ r), rtol=0.0, atol=3e-3 * float((jacobian.T @ r).norm()))
        fall = 0.5 * float(r @ r - (r + jacobian @ p) @ (r + jacobian @ p))
        assert predicted == pytest.approx(fall, rel=1e-9)
        g = jacobian.T @ r
        expected = torch.linalg.solve(jacobian.T @ jacobian + damping * torch.eye(len(g), dtype=g.dtype), g)
        if damping > 0:
            assert torch.allclose(linear.damped_inverse(g, damping), expected, rtol=1e-6)


def test_the_first_correction_is_the_geodesic_acceleration() -> None:
    """Of a short step v: −½ (JᵀJ + μ)⁻¹ Jᵀ r″(v, v), with r″ from forward mode twice."""
    network = NETWORKS["one hidden layer"]
    samples, phi = samples_of(network, 60), random(network.n_parameters, seed=4)
    objective = PerceptronObjective(network, SQUARES, samples)
    residuals = partial(residuals_in_torch, network, samples)
    linear = linearised(objective, phi, exact=True)
    assert linear is not None
    errors = []
    for radius in (1e-2, 1e-3):
        v, _, damping = linear.damped_step(radius)
        correction = -linear.damped_inverse(linear.missed(objective, v), damping)
        along = lambda p, v=v: torch.func.jvp(residuals, (p,), (v,))[1]  # noqa: E731
        second = torch.func.jvp(along, (phi,), (v,))[1]
        pulled = torch.func.vjp(residuals, phi)[1](second)[0]
        acceleration = -0.5 * linear.damped_inverse(pulled, damping)
        errors.append(float((correction - acceleration).norm() / acceleration.norm()))
    assert errors[1] < 0.2 * errors[0] < 0.02


@pytest.mark.parametrize(("seed", "within"), [(1, 100), (2, 80), (3, 100), (19, 100)])
def test_singular_minima_of_zero_loss(seed: int, within: int) -> None:
    """More neurons than the teacher: to 1e-13 from scratch, where Newton's method needs thousands of steps."""
    objective, theta = student(seed)
    result = minimize(objective, theta, method="levenberg-marquardt", max_iter=within, certificate=False)
    assert result.status == "converged"
    assert result.loss <= 1e-19
    assert objective.counts.n_jacobian <= within
    assert float(objective.loss_and_gradient(result.theta)[1].abs().max()) == result.grad_norm


@pytest.mark.parametrize("seed", [1, 2])
def test_eigenvalues_instead_of_singular_values(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Of many parameters: to the same gradient, since singular values are taken where the rounding of JᵀJ would hide them."""
    monkeypatch.setattr(least_squares, "MAX_SVD", 0)
    taken: list[bool] = []

    def watched(objective: Objective, theta: Tensor, *, exact: bool) -> Linearised | None:
        taken.append(exact)
        return linearised(objective, theta, exact=exact)

    monkeypatch.setattr(least_squares, "linearised", watched)
    objective, theta = student(seed)
    result = minimize(objective, theta, method="levenberg-marquardt", max_iter=100, certificate=False)
    assert result.status == "converged"
    assert taken == sorted(taken)
    assert 10 < taken.index(True) < len(taken)


@pytest.mark.parametrize("seed", [2, 10])
def test_regular_minima_as_scipy_finds_them(seed: int) -> None:
    """Fewer neurons than the teacher: scipy, started beside the minimum that was found, ends at it."""
    objective, theta = student(seed, n_student=3)
    result = minimize(objective, theta, method="levenberg-marquardt", certificate=False)
    assert result.status == "converged"
    beside = result.theta.numpy() * (1 + 1e-3)
    found = scipy.optimize.least_squares(
        lambda t: objective.residuals(torch.from_numpy(t)).numpy(), beside, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    assert result.loss == pytest.approx(found.cost, rel=1e-12)
    assert np.abs(found.x - result.theta.numpy()).max() < 1e-4


def iterates(objective: Objective, theta: Tensor, most: int) -> list[Iterate]:
    """Those of the method until the gradient is 1e-13 or it is stuck."""
    found: list[Iterate] = []
    for iterate in LevenbergMarquardt().iterate(objective, theta, *objective.loss_and_gradient(theta)):
        found.append(iterate)
        if float(iterate.gradient.abs().max()) <= 1e-13 or iterate.stuck or len(found) == most:
            break
    return found


def test_newton_takes_over_near_minima_of_large_loss() -> None:
    """Where residuals remain, J alone converges linearly: the last steps are Newton's, and the switch is told."""
    model, x, y = teacher_student(2, n_student=1, n_samples=300)
    y = y + 2.0 * random(300, 1)
    objective = ModuleObjective(model, nn.MSELoss(), (x, y))
    found = iterates(objective, objective.initial_theta(), 300)
    assert float(found[-1].gradient.abs().max()) <= 1e-13
    losses = [float(i.loss) for i in found]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    assert [i.note for i in found if i.note] == ["the loss does not tend to zero, and Newton's method takes over"]
    assert found[-1].method == "trust-region" and found[0].method == ""


def test_a_region_without_values_is_not_entered() -> None:
    """Steps to where the residuals overflow are refused; at such a start the error says so."""
    network = Perceptron.of((1, 2, 1), Activation("cube"), Activation("cube"))
    samples = Samples(torch.full((1, 5), 1e60, dtype=torch.float64), random(1, 5), torch.ones(5, dtype=torch.float64))
    objective = PerceptronObjective(network, SQUARES, samples)
    start = torch.full((network.n_parameters,), 1e-62, dtype=torch.float64)
    found = iterates(objective, start, 30)
    assert all(bool(torch.isfinite(i.loss)) and bool(torch.isfinite(i.gradient).all()) for i in found)
    with pytest.raises(DerivativeError, match="Jacobian of the residuals is not finite"):
        iterates(objective, torch.ones_like(start), 1)


def test_fewer_samples_than_parameters() -> None:
    """Six samples, 33 parameters: interpolated in a few steps."""
    objective, theta = student(1, n_samples=6)
    result = minimize(objective, theta, method="levenberg-marquardt", max_iter=20, certificate=False)
    assert result.status == "converged"
    assert result.loss <= 1e-25


def test_a_plateau() -> None:
    """Where every ReLU is dead, J is zero but for the output's bias, which is set to the mean of the targets."""
    network = Perceptron.of((2, 3, 1), Activation("relu"), IDENTITY)
    samples = Samples(random(2, 20).abs(), random(1, 20, seed=1), torch.full((20,), 0.05, dtype=torch.float64))
    theta = torch.tensor([-1.0] * 9 + [0.5] * 4, dtype=torch.float64)
    objective = PerceptronObjective(network, SQUARES, samples)
    found = iterates(objective, theta, 20)[-1]
    assert float(found.gradient.abs().max()) <= 1e-15
    assert torch.equal(found.theta[:-1], theta[:-1])
    assert float(found.theta[-1]) == pytest.approx(float(samples.targets.mean()), rel=1e-14)
    assert next(iter(LevenbergMarquardt().iterate(objective, found.theta, found.loss, 0 * found.gradient))) is not None
    nothing = Perceptron.of((2, 3, 1), Activation("relu"), IDENTITY, bias=False)
    dead = PerceptronObjective(nothing, SQUARES, samples)
    flat = -torch.ones(9, dtype=torch.float64)
    assert iterates(dead, flat, 5)[-1].theta.equal(flat)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-3}])
def test_polishing_a_training_loop(options: dict[str, float]) -> None:
    """NewtonPolish by name, with weight decay too; the gradient is confirmed by torch's autograd."""
    model, x, y = teacher_student(3)
    optimizer = NewtonPolish(model.parameters(), method="levenberg-marquardt", **options)
    optimizer.step(make_closure(optimizer, model, x, y))
    assert optimizer.result is not None
    assert optimizer.result.status == "converged"
    loss = nn.functional.mse_loss(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    decay = options.get("weight_decay", 0.0)
    left = [float((g + decay * p.detach()).abs().max()) for g, p in zip(gradients, model.parameters(), strict=True)]
    assert max(left) <= 1e-13


@pytest.mark.slow
def test_twenty_students_from_scratch() -> None:
    """T33, seeds 1 to 20, within 1500 iterations: at least 17 to 1e-13."""
    arrived = []
    for seed in range(1, 21):
        objective, theta = student(seed)
        result = minimize(objective, theta, method="levenberg-marquardt", max_iter=1500, certificate=False)
        print(seed, result.status, f"{result.loss:.1e} {result.grad_norm:.1e}", result.n_iter, objective.counts.n_jacobian)
        if result.status == "converged":
            arrived.append(seed)
    assert len(arrived) >= 17
