"""The Langevin family against closed forms, programs written out line by line, and exactly propagated second moments."""

from __future__ import annotations

import copy
import io
import math
import pickle
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, make_closure, teacher_student
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve_discrete_lyapunov
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from torch_gradflow import (
    HMC,
    LOL,
    SGLD,
    AdLaLa,
    CCAdL,
    Langevin,
    MultiLayerLangevin,
    Observables,
    PartitionedLangevin,
    TemperatureScheduler,
    integrated_autocorrelation_time,
    layer_groups,
    time_average,
)
from torch_gradflow.optim.langevin.splitting import BAOAB, GLA1, GLA2, SPLITTINGS, mirrored, program

Array = np.ndarray[Any, np.dtype[np.float64]]
TAU = 0.7
PRESETS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "Langevin": Langevin,
    "MultiLayerLangevin": MultiLayerLangevin,
    "AdLaLa": AdLaLa,
    "LOL": LOL,
    "SGLD": SGLD,
    "CCAdL": CCAdL,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def quadratic_step(optimizer: torch.optim.Optimizer, p: nn.Parameter, k: float, noise: Tensor | float = 0.0) -> None:
    """One step on L = k θ²/2, with noise in the gradient."""
    p.grad = k * p.detach() + noise
    optimizer.step()


# Linear dynamics: one step of θ'' = −kθ is z -> M z + B R for z = (θ, p), R the normal numbers that it draws. M and B are read
# off the optimizer itself, and second moments are then propagated exactly instead of being sampled.


def linear_step(k: float, h: float, tau: float, n_draws: int, **settings: Any) -> tuple[Array, Array]:
    """M, shape ``(2, 2)``, and B, shape ``(2, n_draws)``, of all steps but the first."""
    p = vector(1.0, 0.0)
    optimizer = PartitionedLangevin([p], h, temperature=0.0, **settings)
    optimizer.state[p]["momentum"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    optimizer.param_groups[0]["n_steps"] = 1
    quadratic_step(optimizer, p, k)
    m = np.stack([p.detach().numpy(), optimizer.state[p]["momentum"].numpy()])
    p = vector(*[0.0] * 20)
    optimizer = PartitionedLangevin([p], h, temperature=tau, generator=seeded(), **settings)
    optimizer.state[p]["momentum"] = torch.zeros(20, dtype=torch.float64)
    optimizer.param_groups[0]["n_steps"] = 1
    quadratic_step(optimizer, p, k)
    again = seeded()
    draws = np.stack([torch.randn(20, generator=again, dtype=torch.float64).numpy() for _ in range(n_draws)], axis=1)
    moved = np.stack([p.detach().numpy(), optimizer.state[p]["momentum"].numpy()], axis=1)
    b, *_ = np.linalg.lstsq(draws, moved)
    assert np.allclose(draws @ b, moved, rtol=0, atol=1e-13)  # nothing else is random
    return m, b.T


def word_matrices(word: str, k: float, h: float, tau: float, gamma: float) -> list[tuple[Array, Array]]:
    """Each letter of A, B, O as matrix and covariance of its noise, written out independently."""
    found = []
    for letter in word:
        t = h / word.count(letter)
        c = math.exp(-gamma * t)
        found.append(
            {
                "A": (np.array([[1.0, t], [0.0, 1.0]]), np.zeros((2, 2))),
                "B": (np.array([[1.0, 0.0], [-t * k, 1.0]]), np.zeros((2, 2))),
                "O": (np.diag([1.0, c]), np.diag([0.0, tau * (1 - c * c)])),
            }[letter]
        )
    return found


def compose(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """One after the other: z -> Mz + noise of covariance Q."""
    m, q = np.eye(2), np.zeros((2, 2))
    for matrix, covariance in parts:
        m, q = matrix @ m, matrix @ q @ matrix.T + covariance
    return m, q


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0, math.inf])
@pytest.mark.parametrize("k", [0.3, 1.0, 50.0])
def test_baoab_samples_the_exact_variance(gamma: float, k: float) -> None:
    """⟨θ²⟩ = τ/k for every stable step size, and ⟨p²⟩ = τ(1 − h²k/4) at the end of the sweep."""
    for part in (0.05, 0.5, 0.99):
        h = 2.0 * part / math.sqrt(k)
        m, b = linear_step(k, h, TAU, 1, friction=gamma)
        assert np.abs(np.linalg.eigvals(m)).max() < 1.0
        half_kick = np.array([[1.0, 0.0], [-h * k / 2, 1.0]])
        covariance = half_kick @ solve_discrete_lyapunov(m, b @ b.T) @ half_kick.T
        expected = np.diag([TAU / k, TAU * (1 - h * h * k / 4)])
        assert np.allclose(covariance, expected, rtol=1e-9, atol=1e-9 * TAU / math.sqrt(k))


@pytest.mark.parametrize("k", [0.3, 1.0])
def test_overdamped_variance(k: float) -> None:
    """Euler and Maruyama: ⟨θ²⟩ = τ/(k(1 − hk/2)), first order in h."""
    h = 0.4
    p = vector(1.0)
    quadratic_step(SGLD([p], h, temperature=0.0), p, k)
    assert p.item() == pytest.approx(1 - h * k, rel=1e-14)
    q = vector(*[0.0] * 10)
    quadratic_step(SGLD([q], h, temperature=TAU, generator=seeded()), q, k)
    drawn = torch.randn(10, generator=seeded(), dtype=torch.float64)
    assert torch.allclose(q.detach(), math.sqrt(2 * TAU * h) * drawn, rtol=1e-14)
    stationary = 2 * TAU * h / (1 - (1 - h * k) ** 2)
    assert stationary == pytest.approx(TAU / (k * (1 - h * k / 2)), rel=1e-14)


@pytest.mark.parametrize(("word", "closing"), [(BAOAB, "B"), (GLA1, "O"), (GLA2, "BO"), ("OBABO", "BO"), ("ABOBA", "BOBA")])
def test_rotated_splitting_is_the_splitting(word: str, closing: str) -> None:
    """What a step runs differs from the word by where it is cut: with C the word's end after the cut, C ∘ step = word ∘ C."""
    k, h, gamma = 2.0, 0.5, 0.6
    parts = word_matrices(word, k, h, TAU, gamma)
    whole, noise = compose(parts)
    cut, _ = compose(parts[len(word) - len(closing) :])
    n_draws = sum(letter == "O" for letter, _ in program(word).cycle)
    m, b = linear_step(k, h, TAU, n_draws, friction=gamma, splitting=word)
    assert np.allclose(cut @ m, whole @ cut, atol=1e-13)
    end, end_noise = compose(parts[len(word) - len(closing) :])
    ours = end @ solve_discrete_lyapunov(m, b @ b.T) @ end.T + end_noise
    assert np.allclose(ours, solve_discrete_lyapunov(whole, noise), rtol=1e-10, atol=1e-12)


def second_moment_error(word: str, h: float, time: float) -> float:
    """The error of ⟨θ²⟩ at a given time, from the opening step to the last, moments propagated exactly; k = γ = 1."""
    settings = {"friction": 1.0, "splitting": word} if word != "GW" else {"thermostat": "overdamped"}
    p = vector(1.0)
    optimizer = PartitionedLangevin([p], h, temperature=0.0, **settings)
    quadratic_step(optimizer, p, 1.0)
    if word == "GW":
        mean, variance = p.item(), 2 * TAU * h
        for _ in range(round(time / h) - 1):
            mean, variance = (1 - h) * mean, (1 - h) ** 2 * variance + 2 * TAU * h
        return abs(mean**2 + variance - (math.exp(-2 * time) + TAU * (1 - math.exp(-2 * time))))
    z = np.array([p.item(), optimizer.state[p]["momentum"].item()])
    q = vector(*[0.0] * 20)
    noisy = PartitionedLangevin([q], h, temperature=TAU, generator=seeded(), **settings)
    quadratic_step(noisy, q, 1.0)
    n_draws = sum(letter == "O" for letter, _ in program(word).opening)
    again = seeded()
    draws = np.stack(
        [torch.randn(20, generator=again, dtype=torch.float64).numpy() for _ in range(n_draws)] or [np.ones(20)], 1
    )
    b, *_ = np.linalg.lstsq(draws, np.stack([q.detach().numpy(), noisy.state[q]["momentum"].numpy()], axis=1))
    covariance = b.T @ b
    m, c = linear_step(1.0, h, TAU, 1, **settings)
    for _ in range(round(time / h) - 1):
        z, covariance = m @ z, m @ covariance @ m.T + c @ c.T
    flow = np.array([[0.0, 1.0], [-1.0, -1.0]])
    stationary = TAU * np.eye(2)
    forward = expm(time * flow)
    exact = forward @ (np.diag([1.0, 0.0]) - stationary) @ forward.T + stationary
    return float(abs(z[0] ** 2 + covariance[0, 0] - exact[0, 0]))


@pytest.mark.parametrize(("word", "order"), [(BAOAB, 2), ("OBABO", 2), (GLA1, 1), ("GW", 1)])
def test_weak_order(word: str, order: int) -> None:
    """Symmetric splittings are of weak order two, the others of order one: ⟨θ²⟩ at t = 2, from the very first step."""
    errors = [second_moment_error(word, 2.0 / n, 2.0) for n in (20, 40, 80, 160)]
    slopes = np.diff(np.log2(errors))
    assert -slopes[-1] == pytest.approx(order, abs=0.05)


# Nonlinear problems, line by line


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    return teacher_student(0, n_samples=30)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, n_steps: int) -> None:
    """The loop that everybody writes."""
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


class Reference:
    """A network's parameters as four numpy arrays, with gradients written out in numpy, and torch's stream of noise."""

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        self.shapes = [tuple(p.shape) for p in model.parameters()]
        self.perceptron = NumpyPerceptron(x, y, model[0].out_features)
        self.theta = self.split(flat(model).numpy())
        self.p = [np.zeros(shape) for shape in self.shapes]
        self.stream = seeded()

    def split(self, vector: Array) -> list[Array]:
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        return [part.reshape(shape).copy() for part, shape in zip(np.split(vector, ends), self.shapes, strict=True)]

    def gradient(self) -> list[Array]:
        return self.split(self.perceptron.loss_and_gradient(np.concatenate([t.ravel() for t in self.theta]))[1])

    def normal(self, i: int) -> Array:
        return torch.randn(self.shapes[i], generator=self.stream, dtype=torch.float64).numpy()

    def langevin(self, i: int, h: float, gamma: float, tau: float) -> None:
        """A O A."""
        c = math.exp(-gamma * h)
        self.theta[i] += h / 2 * self.p[i]
        self.p[i] = c * self.p[i] + math.sqrt((1 - c * c) * tau) * self.normal(i)
        self.theta[i] += h / 2 * self.p[i]

    def adaptive(self, i: int, h: float, tau: float, sigma: float, eps: float, xi: list[float]) -> None:
        """A C D E D C A."""
        self.theta[i] += h / 2 * self.p[i]
        self.p[i] = math.exp(-h / 2 * xi[i]) * self.p[i]
        self.p[i] = self.p[i] + sigma * math.sqrt(h / 2) * self.normal(i)
        xi[i] += h * eps * (np.sum(self.p[i] * self.p[i]) - self.p[i].size * tau)
        self.p[i] = self.p[i] + sigma * math.sqrt(h / 2) * self.normal(i)
        self.p[i] = math.exp(-h / 2 * xi[i]) * self.p[i]
        self.theta[i] += h / 2 * self.p[i]

    def agrees(self, model: nn.Module) -> bool:
        return np.allclose(np.concatenate([t.ravel() for t in self.theta]), flat(model).numpy(), rtol=1e-11, atol=1e-13)


def test_langevin_line_by_line() -> None:
    """One half B at the start, then A O A, and B with each new gradient."""
    model, x, y = network()
    reference, h = Reference(model, x, y), 0.25
    train(Langevin(model.parameters(), temperature=0.01, generator=seeded()), model, x, y, 6)
    for step in range(6):
        for i, g in enumerate(reference.gradient()):
            reference.p[i] -= (h if step else h / 2) * g
            reference.langevin(i, h, 0.1, 0.01)
    assert reference.agrees(model)


def test_adlala_line_by_line() -> None:
    """The order of the authors' program, with one ξ for each tensor of the first layer, beginning at 0.1."""
    model, x, y = network()
    reference, h, xi = Reference(model, x, y), 0.25, [0.1, 0.1]
    optimizer = AdLaLa(model.parameters(), temperature=0.01, noise=0.3, generator=seeded())
    train(optimizer, model, x, y, 6)
    for step in range(6):
        for i, g in enumerate(reference.gradient()):
            reference.p[i] -= (h if step else h / 2) * g
            if i < 2:
                reference.adaptive(i, h, 0.01, 0.3, 0.05, xi)
            else:
                reference.langevin(i, h, 0.1, 0.01)
    assert reference.agrees(model)
    assert [optimizer.state[p]["xi"].item() for p in model[0].parameters()] == pytest.approx(xi, rel=1e-12)


def test_lol_line_by_line() -> None:
    """Langevin dynamics of the first layer, Euler and Maruyama of the second."""
    model, x, y = network()
    reference, h = Reference(model, x, y), 0.25
    train(LOL(model.parameters(), temperature=0.01, generator=seeded()), model, x, y, 6)
    for step in range(6):
        for i, g in enumerate(reference.gradient()):
            if i < 2:
                reference.p[i] -= (h if step else h / 2) * g
                reference.langevin(i, h, 0.1, 0.01)
            else:
                reference.theta[i] += -h * g + math.sqrt(2 * 0.01 * h) * reference.normal(i)
    assert reference.agrees(model)


def test_multi_layer_langevin_line_by_line() -> None:
    """Temperature and friction of each layer's own."""
    model, x, y = network()
    reference, h = Reference(model, x, y), 0.25
    optimizer = MultiLayerLangevin(model.parameters(), temperature=(0.01, 0.02), friction=(0.1, 3.0), generator=seeded())
    train(optimizer, model, x, y, 6)
    for step in range(6):
        for i, g in enumerate(reference.gradient()):
            reference.p[i] -= (h if step else h / 2) * g
            reference.langevin(i, h, *((0.1, 0.01) if i < 2 else (3.0, 0.02)))
    assert reference.agrees(model)


def test_ccadl_line_by_line() -> None:
    """The adaptive thermostat with the friction h v/(2τ) besides."""
    h, tau, sigma, eps, xi = 0.1, 0.3, 0.2, 0.05, 0.1
    p = vector(1.0, -2.0, 0.5)
    optimizer = CCAdL([p], h, temperature=tau, noise=sigma, coupling=eps, generator=seeded())
    theta, momentum, v, last, stream = p.detach().numpy().copy(), np.zeros(3), np.zeros(3), np.zeros(3), seeded()
    noise = torch.randn(5, 3, generator=seeded(7), dtype=torch.float64)
    for n in range(5):
        gradient = 2.0 * theta + noise[n].numpy()
        quadratic_step(optimizer, p, 2.0, noise[n])
        if n:
            v += (0.5 * (gradient - last) ** 2 - v) / n
        last = gradient
        momentum -= (h if n else h / 2) * gradient
        theta += h / 2 * momentum
        momentum *= math.exp(-h / 2 * xi)
        momentum += sigma * math.sqrt(h / 2) * torch.randn(3, generator=stream, dtype=torch.float64).numpy()
        xi += h / 2 * eps * (momentum @ momentum - 3 * tau)
        momentum *= np.exp(-h * h * v / (2 * tau))
        xi += h / 2 * eps * (momentum @ momentum - 3 * tau)
        momentum += sigma * math.sqrt(h / 2) * torch.randn(3, generator=stream, dtype=torch.float64).numpy()
        momentum *= math.exp(-h / 2 * xi)
        theta += h / 2 * momentum
    assert np.allclose(p.detach().numpy(), theta, rtol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"thermostat": "none"}, {"thermostat": "adaptive-langevin", "noise": 0.0, "friction": 0.4, "temperature": 0.02}],
)
def test_deterministic_parts_are_reversible(settings: dict[str, Any]) -> None:
    """With momenta and ξ turned round the same steps lead back; the momenta between steps lack half a kick."""
    model, x, y = network()
    start = flat(model)
    h = 0.2
    optimizer = PartitionedLangevin(model.parameters(), h, **settings)
    train(optimizer, model, x, y, 40)
    far = flat(model)
    assert (far - start).norm() > 0.5
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    for p in model.parameters():
        state = optimizer.state[p]
        state["momentum"] = h * p.grad - state["momentum"]
        if "xi" in state:
            state["xi"].neg_()
    train(optimizer, model, x, y, 40)
    assert torch.allclose(flat(model), start, rtol=0, atol=1e-10)


def test_adaptive_thermostat_without_noise_is_of_order_two() -> None:
    """Then it is the Nosé–Hoover ODE θ' = p, p' = −θ − ξp, ξ' = ε(p·p − Nτ), here by scipy for three coordinates."""
    start, tau, eps, xi = [1.0, -0.5, 0.2], 0.1, 0.7, 0.3

    def slope(_: float, z: Array) -> Array:
        theta, p, friction = z[:3], z[3:6], z[6]
        return np.concatenate([p, -theta - friction * p, [eps * (p @ p - 3 * tau)]])

    exact = solve_ivp(slope, (0.0, 3.0), [*start, 0.0, 0.0, 0.0, xi], rtol=1e-11, atol=1e-12).y[:, -1]
    errors = []
    for n in (30, 60, 120):
        p = vector(*start)
        settings: dict[str, Any] = {"thermostat": "adaptive-langevin", "friction": xi, "coupling": eps}
        optimizer = PartitionedLangevin([p], 3.0 / n, temperature=tau, noise=0.0, **settings)
        for _ in range(n):
            quadratic_step(optimizer, p, 1.0)
        state = optimizer.state[p]
        momentum = state["momentum"] - 1.5 / n * p.detach()
        found = torch.cat([p.detach(), momentum, state["xi"][None]]).numpy()
        errors.append(np.abs(found - exact).max())
    assert np.diff(np.log2(errors)) == pytest.approx([-2.0, -2.0], abs=0.1)


def test_leapfrog_keeps_the_energy() -> None:
    """The thermostat "none": no drift of the energy, and errors of second order."""
    errors = []
    for h in (0.2, 0.1):
        p = vector(1.0)
        optimizer, worst = PartitionedLangevin([p], h, thermostat="none"), 0.0
        for _ in range(round(20 / h)):
            quadratic_step(optimizer, p, 1.0)
            momentum = optimizer.state[p]["momentum"].item() - h / 2 * p.item()
            worst = max(worst, abs(0.5 * (p.item() ** 2 + momentum**2) - 0.5))
        errors.append(worst)
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


# Noise in the gradient


def temperatures_under_noise(make: Callable[[nn.Parameter], PartitionedLangevin], strength: Tensor) -> Tensor:
    """⟨θ²⟩ of each coordinate on L = θ²/2, averaged over time, with noise of the given strengths in the gradient."""
    p = nn.Parameter(torch.zeros_like(strength))
    optimizer, noise = make(p), seeded(1)
    squares = torch.zeros_like(strength)
    for step in range(1000):
        quadratic_step(optimizer, p, 1.0, strength * torch.randn(strength.shape, generator=noise, dtype=torch.float64))
        if step >= 400:
            squares += p.detach() ** 2 / 600
    return squares


def test_adaptive_thermostat_regulates_where_langevin_heats_up() -> None:
    """Noise of a strength that nobody told the optimizer: its heat is τ' = hs²/(2γ) without the adaptive thermostat."""
    h, s, n = 0.05, 6.0, 2000
    strength = torch.full((n,), s, dtype=torch.float64)
    plain = temperatures_under_noise(
        lambda p: Langevin([p], h, temperature=0.5, friction=1.0, generator=seeded()), strength
    ).mean()
    m, b = linear_step(1.0, h, 0.5, 1, friction=1.0)
    from_gradient = np.array([[-h * h / 2 * (1 + math.exp(-h))], [-h * math.exp(-h)]]) * s  # a kick −hs, then A O A
    heated = solve_discrete_lyapunov(m, b @ b.T + from_gradient @ from_gradient.T)[0, 0]
    assert heated == pytest.approx(0.5 + h * s * s / 2, rel=0.05)
    assert float(plain) == pytest.approx(heated, rel=0.03)

    recorder = Observables()

    def adaptive(p: nn.Parameter) -> PartitionedLangevin:
        optimizer = PartitionedLangevin(
            [p], h, thermostat="adaptive-langevin", temperature=0.5, noise=1.0, friction=1.0, coupling=1e-3, generator=seeded()
        )
        optimizer.recorder = recorder
        return optimizer

    regulated = temperatures_under_noise(adaptive, strength).mean()
    assert float(regulated) == pytest.approx(0.5, rel=0.03)
    # Half a kick brings a quarter of a kick's heat, of which the momenta before and after it have none and all.
    kinetic = recorder.kinetic_temperature[400:, 0].mean()
    assert float(kinetic) == pytest.approx(0.5 - h * h * s * s / 4, rel=0.03)
    assert float(recorder.virial_temperature[400:, 0].mean()) == pytest.approx(0.5, rel=0.03)


def test_covariance_control_where_noise_differs() -> None:
    """One adaptive friction is too much for quiet coordinates and too little for loud ones; the controlled one is right."""
    strength = torch.tensor([0.0, 8.0], dtype=torch.float64).repeat_interleave(1000)
    shared: dict[str, Any] = {"temperature": 0.5, "noise": 1.0, "friction": 1.0, "coupling": 1e-3}

    def quiet_and_loud(make: Callable[[nn.Parameter], PartitionedLangevin]) -> tuple[float, float]:
        quiet, loud = temperatures_under_noise(make, strength).view(2, -1).mean(1).tolist()
        return quiet, loud

    quiet, loud = quiet_and_loud(
        lambda p: PartitionedLangevin([p], 0.05, thermostat="adaptive-langevin", generator=seeded(), **shared)
    )
    assert quiet < 0.4 and loud > 0.6
    quiet, loud = quiet_and_loud(lambda p: CCAdL([p], 0.05, generator=seeded(), **shared))
    assert quiet == pytest.approx(0.5, rel=0.05) and loud == pytest.approx(0.5, rel=0.05)


# HMC


def gaussian(p: nn.Parameter, k: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        p.grad = k * p.detach()
        return 0.5 * (k * p.detach() ** 2).sum()

    return closure


@pytest.mark.parametrize(("h", "n_leapfrog"), [(1.2, 1), (1.6, 3)])
def test_hmc_accepts_as_theory_has_it(h: float, n_leapfrog: int) -> None:
    """On a Gaussian in one dimension the mean acceptance is 1 − (2/π) arctan √(μ/2), μ the mean of ΔH/τ.

    (M. Calvo, D. Sanz-Alonso, J. M. Sanz-Serna, 2021, HMC: reducing the number of rejections by not using leapfrog, J. Comput.
    Phys. 437; μ = ‖M‖²/2 − 1 for the leapfrog map M at k = 1.)
    """
    p, n = vector(0.3), 1500
    optimizer = HMC([p], h, n_leapfrog=n_leapfrog, temperature=TAU, generator=seeded())
    closure, squares = gaussian(p, torch.ones(1, dtype=torch.float64)), []
    for _ in range(n):
        optimizer.step(closure)
        squares.append(p.item() ** 2)
    parts = word_matrices("BAB", 1.0, h, TAU, 0.0) * n_leapfrog
    mu = 0.5 * np.sum(compose(parts)[0] ** 2) - 1
    expected = 1 - 2 / math.pi * math.atan(math.sqrt(mu / 2))
    assert 0.4 < expected < 0.95
    assert 1 - optimizer.rejection_rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))
    variance = time_average(torch.tensor(squares, dtype=torch.float64), discard=50)
    assert variance.mean == pytest.approx(TAU, abs=4 * variance.error)


def test_hmc_on_a_network_and_after_failures() -> None:
    """Small steps are nearly always accepted; a closure that raises leaves the parameters where they were."""
    model, x, y = network()
    optimizer = HMC(model.parameters(), 0.01, n_leapfrog=3, temperature=1e-3, weight_decay=1e-3, generator=seeded())
    closure = make_closure(optimizer, model, x, y)
    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert optimizer.rejection_rate < 0.1 and len(set(losses)) > 15
    before, calls = flat(model), []

    def fails() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return closure()

    with pytest.raises(RuntimeError, match="no more"):
        optimizer.step(fails)
    assert torch.equal(flat(model), before)

    def nothing() -> Tensor:
        return closure() * math.nan

    optimizer.step(nothing)
    assert torch.equal(flat(model), before) and optimizer.param_groups[0]["n_trajectories"] == 21
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="group 1: temperature must be"):
        optimizer.add_param_group({"params": [vector(1.0)], "temperature": 2.0})


def test_hmc_resumes_bit_for_bit() -> None:
    """With the generator's state."""

    def begin() -> tuple[nn.Parameter, HMC, Callable[[], Tensor]]:
        p = vector(0.1, 0.2)
        return p, HMC([p], 0.5, temperature=TAU, generator=seeded(3)), gaussian(p, torch.ones(2, dtype=torch.float64))

    p, optimizer, closure = begin()
    for _ in range(5):
        optimizer.step(closure)
    q, other, other_closure = begin()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    q.data.copy_(p)
    for _ in range(5):
        optimizer.step(closure)
        other.step(other_closure)
    assert torch.equal(p, q) and optimizer.rejection_rate == other.rejection_rate


# Splittings


def test_splittings_are_what_their_names_say() -> None:
    assert SPLITTINGS["langevin"] == "BAOAB" and SPLITTINGS["adaptive-langevin"] == "BACDEDCAB" and SPLITTINGS["none"] == "BAB"
    assert (
        SPLITTINGS["covariance-controlled"] == "BACDEVEDCAB"
        and mirrored("BABO") == "BABOBAB"
        and (GLA1, GLA2) == ("BAO", "BABO")
    )
    found = program("BACDEDCAB")
    half = [("A", 0.5), ("C", 0.5), ("D", 0.5)]
    assert found.cycle == (("B", 1.0), *half, ("E", 1.0), *reversed(half))
    assert found.opening == (("B", 0.5), *found.cycle[1:])
    assert program("OBABO").cycle == (("B", 0.5), ("O", 1.0), ("B", 0.5), ("A", 1.0))
    assert program("OBABO").opening == (("O", 0.5), ("B", 0.5), ("A", 1.0))
    assert program("ABOBA").cycle == program("ABOBA").opening == (("B", 0.5), ("O", 1.0), ("B", 0.5), ("A", 1.0))
    assert program("GW").cycle == (("G", 1.0), ("W", 1.0))


@pytest.mark.parametrize("word", ["BABAB", "AOA", "BABABO", "GWG", ""])
def test_splittings_with_several_gradients_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="one place of the parameters per sweep"):
        program(word)


# The conventions of torch.optim


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_in_for_adam_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Checkpoints of torch.save and of torch.distributed, deep copies and pickles go on with the same noise."""
    model, x, y = network()
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    make = PRESETS[name]
    optimizer = make(model.parameters(), generator=seeded())
    train(optimizer, model, x, y, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    distributed = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin, pickled = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    others = [twin, pickled]
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    for how in ("saved", "distributed"):
        other, _, _ = network()
        other.to(dtype).load_state_dict(kept["model"])
        anew = make(other.parameters(), generator=seeded(9))
        if how == "saved":
            anew.load_state_dict(kept["optimizer"])
        else:
            set_optimizer_state_dict(other, anew, distributed)
        others.append((other, anew))
    train(optimizer, model, x, y, 4)
    for other, anew in others:
        train(anew, other, x, y, 4)
        assert torch.equal(flat(other), flat(model))
    assert all(p.dtype == dtype for p in model.parameters()) and bool(flat(model).isfinite().all())


def test_asking_for_the_state_changes_nothing() -> None:
    """torch.distributed's function makes a step of length zero first, after which the first step is still the first."""
    ends = []
    for ask in (False, True):
        model, x, y = network()
        optimizer = PartitionedLangevin(model.parameters(), thermostat="covariance-controlled", generator=seeded())
        if ask:
            assert len(get_optimizer_state_dict(model, optimizer)["state"]) == 4
        train(optimizer, model, x, y, 3)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_global_generator_and_manual_seed() -> None:
    """Without a generator the noise is torch's own, and torch.manual_seed repeats it."""
    ends = []
    for _ in range(2):
        model, x, y = network()
        torch.manual_seed(5)
        train(Langevin(model.parameters(), temperature=0.1), model, x, y, 3)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_closure_is_optional_and_evaluated_once() -> None:
    ends = []
    for with_closure in (False, True):
        model, x, y = network()
        optimizer = AdLaLa(model.parameters(), generator=seeded())
        if with_closure:
            closure = make_closure(optimizer, model, x, y)
            assert all(optimizer.step(closure).item() > 0 for _ in range(3))
        else:
            train(optimizer, model, x, y, 3)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_without_noise_it_is_sgd() -> None:
    """The overdamped thermostat at temperature zero, with the same weight decay and sign."""
    ends = []
    for make in (
        lambda p: SGLD(p, 0.1, temperature=0.0, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3),
    ):
        model, x, y = network()
        train(make(model.parameters()), model, x, y, 5)
        ends.append(flat(model))
    assert torch.allclose(*ends, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("thermostat", ["langevin", "overdamped"])
def test_weight_decay_and_maximize(thermostat: str) -> None:
    """A decay of λ is the loss λ/2 ‖θ‖² more; maximising −L is minimising L; the recorder sees the same."""
    found = []
    for sign, decay, k in ((1.0, 0.0, 2.5), (1.0, 0.5, 2.0), (-1.0, 0.5, 2.0)):
        p = vector(1.0, -0.4)
        optimizer = PartitionedLangevin(
            [p], 0.3, thermostat=thermostat, weight_decay=decay, maximize=sign < 0, generator=seeded()
        )
        optimizer.recorder = Observables()
        for _ in range(5):
            quadratic_step(optimizer, p, sign * k)
        found.append(torch.cat([p.detach(), optimizer.recorder.virial_temperature.flatten()]))
    assert torch.allclose(found[0], found[1], rtol=1e-13) and torch.allclose(found[0], found[2], rtol=1e-13)


def test_parameters_without_gradient_stay() -> None:
    """Frozen ones, and those that were not used; they join when they get a gradient, with their opening step."""
    used, unused, frozen = vector(1.0), vector(1.0), vector(1.0).requires_grad_(False)
    optimizer = Langevin([used, unused, frozen], 0.1, temperature=0.0)
    quadratic_step(optimizer, used, 1.0)
    assert used.item() != 1.0 and unused.item() == frozen.item() == 1.0 and len(optimizer.state) == 1
    first = used.item()
    unused.grad = unused.detach().clone()
    quadratic_step(optimizer, used, 1.0)
    assert unused.item() == first


def test_lr_zero_moves_nothing() -> None:
    model, x, y = network()
    before = flat(model)
    for make in PRESETS.values():
        train(make(model.parameters(), lr=0.0), model, x, y, 2)
    assert torch.equal(flat(model), before)


def test_lr_scheduler_and_groups_of_their_own() -> None:
    """Schedulers move ``lr`` of each group; a group may have a thermostat of its own."""
    a, b = vector(1.0), vector(1.0)
    groups = [{"params": [a], "lr": 0.2}, {"params": [b], "thermostat": "overdamped"}]
    optimizer = PartitionedLangevin(groups, 0.1, temperature=0.0)
    scheduler = ExponentialLR(optimizer, 0.5)
    expected = 1.0
    for n in range(3):
        a.grad, b.grad = a.detach().clone(), b.detach().clone()
        optimizer.step()
        scheduler.step()
        expected *= 1 - 0.1 * 0.5**n
    assert b.item() == pytest.approx(expected, rel=1e-14) and optimizer.param_groups[0]["lr"] == 0.2 / 8
    optimizer.add_param_group({"params": [vector(2.0)], "thermostat": "adaptive-langevin"})
    assert optimizer.param_groups[2]["noise"] == 0.01


def test_annealing() -> None:
    """By a function of the steps, and by torch's own schedulers; both are the temperatures that they say."""

    def moved(optimizer: PartitionedLangevin, q: nn.Parameter, after: Callable[[], Any]) -> list[float]:
        found = []
        for _ in range(4):
            q.data.zero_()
            quadratic_step(optimizer, q, 0.0)
            found.append(q.item())
            after()
        return found

    q = vector(0.0)
    drawn = [torch.randn(1, generator=g, dtype=torch.float64).item() for g in [seeded()] for _ in range(4)]
    by_function = SGLD([q], 0.5, temperature=2.0, annealing=lambda n: 1 / (1 + n), generator=seeded())
    assert moved(by_function, q, lambda: None) == pytest.approx(
        [math.sqrt(2 * 0.5 * 2.0 / (1 + n)) * drawn[n] for n in range(4)], rel=1e-13
    )
    optimizer = SGLD([q], 0.5, temperature=2.0, generator=seeded())
    schedule = TemperatureScheduler(optimizer, lambda stand_in: CosineAnnealingLR(stand_in, 4))
    cosine = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(5)]
    assert moved(optimizer, q, schedule.step) == pytest.approx(
        [math.sqrt(2 * 0.5 * 2.0 * cosine[n]) * drawn[n] for n in range(4)], rel=1e-12
    )
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["temperature"] == pytest.approx(0.0, abs=1e-15)
    other = SGLD([q], 0.5, temperature=2.0)
    again = TemperatureScheduler(other, lambda stand_in: ExponentialLR(stand_in, 0.5))
    again.step()
    resumed = SGLD([q], 0.5, temperature=2.0)
    loaded = TemperatureScheduler(resumed, lambda stand_in: ExponentialLR(stand_in, 0.5))
    loaded.load_state_dict(again.state_dict())
    assert resumed.param_groups[0]["temperature"] == 1.0
    loaded.step()
    assert resumed.param_groups[0]["temperature"] == 0.5


@pytest.mark.parametrize("bounds", [(-0.5, 0.8), (-0.5, math.inf), (-math.inf, 0.8)])
@pytest.mark.parametrize("thermostat", ["langevin", "overdamped"])
def test_bounds_are_kept(bounds: tuple[float, float], thermostat: str) -> None:
    """Under a force that pushes out and strong noise no coordinate ever leaves."""
    p = vector(*torch.linspace(-0.5, 0.8, 50).tolist())
    optimizer = PartitionedLangevin(
        [p], 0.5, thermostat=thermostat, temperature=1.0, friction=1.0, bounds=bounds, generator=seeded()
    )
    for _ in range(200):
        quadratic_step(optimizer, p, 1.0 if math.isinf(bounds[1] - bounds[0]) else -1.0)
        assert bounds[0] <= p.min().item() and p.max().item() <= bounds[1]


def test_reflection_is_that_of_a_billiard() -> None:
    """A free motion between two walls is the triangle wave, and the momentum's sign follows it."""
    p = vector(0.3)
    optimizer = PartitionedLangevin([p], 0.7, thermostat="none", bounds=(0.0, 1.0))
    optimizer.state[p]["momentum"] = torch.tensor([1.9], dtype=torch.float64)
    for n in range(1, 12):
        quadratic_step(optimizer, p, 0.0)
        along = (0.3 + 0.7 * 1.9 * n) % 2.0
        assert p.item() == pytest.approx(min(along, 2.0 - along), abs=1e-12)
        assert math.copysign(1.0, optimizer.state[p]["momentum"].item()) == (1.0 if along < 1.0 else -1.0)


def test_bounds_are_a_flat_prior() -> None:
    """Without a force the coordinates spread evenly: mean 1/2 and variance 1/12."""
    p = vector(*[0.1] * 4000)
    optimizer = Langevin([p], 0.3, temperature=1.0, friction=1.0, bounds=(0.0, 1.0), generator=seeded())
    for _ in range(60):
        quadratic_step(optimizer, p, 0.0)
    assert p.mean().item() == pytest.approx(0.5, abs=0.02) and p.var().item() == pytest.approx(1 / 12, abs=0.004)


# Layers


def test_layer_groups() -> None:
    """One group per layer in the model's order; the last settings serve the rest; shared tensors stand once."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 1))
    groups = layer_groups(model, {"thermostat": "adaptive-langevin"}, {"thermostat": "langevin"})
    assert [[p.numel() for p in group["params"]] for group in groups] == [[6, 3], [3, 3], [9, 3], [3, 1]]
    assert [group["thermostat"] for group in groups] == ["adaptive-langevin", *["langevin"] * 3]
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert [len(group["params"]) for group in layer_groups(tied)] == [2, 1]
    with pytest.raises(ValueError, match="settings for 3"):
        layer_groups(tied, {}, {}, {})


def test_presets_find_the_first_layer() -> None:
    """Bare parameters, named ones, and groups make the same partition."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    for params in (model.parameters(), model.named_parameters(), layer_groups(model)):
        optimizer = AdLaLa(params)
        assert [g["thermostat"] for g in optimizer.param_groups] == ["adaptive-langevin", "langevin", "langevin"]
        assert [[p.numel() for p in g["params"]] for g in optimizer.param_groups] == [[6, 3], [9, 3], [3, 1]]
    assert [g["thermostat"] for g in LOL(model.parameters()).param_groups] == ["langevin", "overdamped", "overdamped"]
    optimizer = MultiLayerLangevin(model.parameters(), temperature=(1e-3, 1e-4), friction=(0.1, 0.2, 0.3))
    assert [(g["temperature"], g["friction"]) for g in optimizer.param_groups] == [(1e-3, 0.1), (1e-4, 0.2), (1e-4, 0.3)]
    with pytest.raises(TypeError, match="not one tensor"):
        AdLaLa(vector(1.0, 2.0))
    with pytest.raises(ValueError, match=r"1 layer\(s\)"):
        AdLaLa(nn.Linear(2, 3).parameters())


# Observables


def test_recorder() -> None:
    """Equipartition on a quadratic, by both temperatures, each group for itself; every so many steps."""
    a, b = vector(*[0.0] * 3000), vector(*[0.0] * 3000)
    k, h = 2.0, 0.5
    groups = [{"params": [a], "temperature": 0.3}, {"params": [b], "thermostat": "overdamped", "lr": 0.01}]
    optimizer = PartitionedLangevin(groups, h, temperature=0.8, friction=1.0, generator=seeded())
    optimizer.recorder = recorder = Observables(every=2)
    assert recorder.kinetic_temperature.numel() == 0

    def closure() -> Tensor:
        a.grad, b.grad = k * a.detach(), k * b.detach()
        return 0.5 * k * (a.detach().square().sum() + b.detach().square().sum())

    for _ in range(600):
        optimizer.step(closure)
    assert recorder.kinetic_temperature.shape == recorder.virial_temperature.shape == (300, 2)
    assert float(recorder.kinetic_temperature[50:, 0].mean()) == pytest.approx(0.3 * (1 - h * h * k / 4), rel=0.02)
    assert float(recorder.virial_temperature[50:, 0].mean()) == pytest.approx(0.3, rel=0.02)
    assert float(recorder.virial_temperature[100:, 1].mean()) == pytest.approx(0.8 / (1 - 0.01 * k / 2), rel=0.04)
    assert bool(recorder.kinetic_temperature[:, 1].isnan().all())
    assert torch.allclose(recorder.loss, 1500 * recorder.virial_temperature.sum(1), rtol=1e-12)


def test_recorder_changes_nothing() -> None:
    ends = []
    for recorder in (None, Observables()):
        model, x, y = network()
        optimizer = AdLaLa(model.parameters(), generator=seeded())
        optimizer.recorder = recorder
        train(optimizer, model, x, y, 5)
        ends.append(flat(model))
    assert torch.equal(*ends) and recorder is not None
    assert recorder.kinetic_temperature.shape == (5, 2) and bool(recorder.loss.isnan().all())


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_autocorrelation_time(rho: float) -> None:
    """An autoregressive series has the time (1 + ρ)/(1 − ρ), and its mean the error that follows from it."""
    n = 40_000
    drawn = torch.randn(n, generator=seeded(), dtype=torch.float64).numpy()
    series = np.empty(n)
    value = 0.0
    for i, r in enumerate(drawn):
        value = rho * value + math.sqrt(1 - rho * rho) * r
        series[i] = value
    expected = (1 + rho) / (1 - rho)
    assert integrated_autocorrelation_time(torch.from_numpy(series)) == pytest.approx(expected, rel=0.1)
    found = time_average(torch.from_numpy(series))
    assert found.error == pytest.approx(math.sqrt(expected / n), rel=0.08) and abs(found.mean) < 4 * found.error
    assert integrated_autocorrelation_time(torch.ones(10)) == 1.0
    with pytest.raises(ValueError, match="four finite numbers"):
        integrated_autocorrelation_time(torch.ones(3))


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a number >= 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be"),
        ({"friction": "much"}, TypeError, "friction must be a number"),
        ({"friction": math.inf, "thermostat": "adaptive-langevin"}, ValueError, "friction must be"),
        ({"noise": -1.0}, ValueError, "noise must be"),
        ({"coupling": math.inf}, ValueError, "coupling must be"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ({"thermostat": "warm"}, ValueError, "thermostat must be one of langevin"),
        ({"splitting": "BAB"}, ValueError, "a word of all of its letters A, B, O"),
        ({"splitting": "BAOABAOAB"}, ValueError, "one place of the parameters"),
        ({"thermostat": "covariance-controlled", "temperature": 0.0}, ValueError, "> 0"),
        ({"bounds": (1.0, 0.0)}, ValueError, "low < high"),
        ({"bounds": 3.0}, ValueError, "low < high"),
        ({"maximize": 1}, TypeError, "maximize must be True or False"),
        ({"annealing": 0.5}, TypeError, "annealing must be a function"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_numbers(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        PartitionedLangevin([vector(1.0)], **settings)


def test_schedules_that_go_wrong() -> None:
    """Found before anything moves, in any group."""
    a, b = vector(1.0), vector(1.0)
    factors = [1.0, -1.0]
    groups = [{"params": [a]}, {"params": [b], "thermostat": "covariance-controlled"}]
    optimizer = PartitionedLangevin(groups, annealing=lambda n: factors[n])
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    before = a.item(), b.item()
    with pytest.raises(ValueError, match="group 0: temperature must be a number >= 0"):
        optimizer.step()
    factors[1] = 0.0
    with pytest.raises(ValueError, match="group 1: temperature of the covariance-controlled thermostat must be"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = -0.1
    factors[1] = 1.0
    with pytest.raises(ValueError, match="group 1: lr must be"):
        optimizer.step()
    assert (a.item(), b.item()) == before


def test_bad_parameters_and_gradients() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match="too coarse"):
            Langevin([nn.Parameter(torch.ones(2, dtype=dtype))])
    with pytest.raises(TypeError, match="complex"):
        Langevin([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    good, table = vector(1.0), nn.Embedding(3, 2, sparse=True).double()
    optimizer = Langevin([good, *table.parameters()])
    (good.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(RuntimeError, match="needs dense gradients"):
        optimizer.step()
    assert good.item() == 1.0 and not optimizer.state
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.step(3)
    with pytest.raises(ValueError, match="group 1: lr must be"):
        optimizer.add_param_group({"params": [vector(2.0)], "lr": -1})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="not one of Langevin"):
        optimizer.load_state_dict(torch.optim.Adam([good, *table.parameters()]).state_dict())


# Hosts


def test_hooks_and_grad_scaler() -> None:
    """Hooks before and after steps, and torch's GradScaler around them, as with any optimizer."""
    model, x, y = network()
    other, _, _ = network()
    plain, scaled = (AdLaLa(m.parameters(), generator=seeded()) for m in (model, other))
    train(plain, model, x, y, 3)
    calls: list[str] = []
    scaled.register_step_pre_hook(lambda *_: calls.append("before"))
    scaled.register_step_post_hook(lambda *_: calls.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        scaled.zero_grad()
        scaler.scale(nn.functional.mse_loss(other(x), y)).backward()
        scaler.step(scaled)
        scaler.update()
    assert torch.equal(flat(model), flat(other)) and calls == ["before", "after"] * 3


def test_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds and a few epochs of the spirals."""
    example, figure = Path(__file__).parents[1] / "examples" / "spiral_adlala.py", tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", [example.name, "--quick", "--figure", str(figure)])
    n_threads = torch.get_num_threads()
    try:
        runpy.run_path(str(example), run_name="__main__")
    finally:
        torch.set_num_threads(n_threads)
    printed = capsys.readouterr().out
    assert printed.count("AdLaLa is ahead of Adam") == 2
    assert figure.stat().st_size > 10_000


def test_compiled_model() -> None:
    """The same steps as with the model itself."""
    ends = []
    for compiled in (False, True):
        model, x, y = network()
        used = torch.compile(model, backend="eager") if compiled else model
        train(AdLaLa(model.parameters(), generator=seeded()), used, x, y, 3)
        ends.append(flat(model))
    assert torch.allclose(*ends, rtol=1e-13, atol=1e-15)


def test_lightning_automatic_optimization() -> None:
    """``configure_optimizers`` returns it, and the trajectory is that of the plain loop."""
    lightning = pytest.importorskip("lightning")
    model, x, y = network()
    train(AdLaLa(model.parameters(), generator=seeded()), model, x, y, 3)
    other, _, _ = network()

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = other

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return AdLaLa(self.parameters(), generator=seeded())

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=3, accelerator="cpu", devices=1, **quiet).fit(Regression())
    assert torch.allclose(flat(other), flat(model), rtol=1e-11, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(PRESETS))
def test_on_a_device(name: str) -> None:
    """The steps are those on the CPU, apart from the noise; the generator must be on the device."""
    ends = []
    for device in ("cpu", "cuda"):
        model, x, y = (part.to(device) for part in network())
        settings = {"temperature": 0.0} if name not in ("CCAdL", "MultiLayerLangevin") else {}
        generator = torch.Generator(device).manual_seed(0)
        train(PRESETS[name](model.parameters(), generator=generator, **settings), model, x, y, 5)
        ends.append(flat(model).cpu())
        if device == "cuda":
            with pytest.raises(ValueError, match="generator is on cpu"):
                PRESETS[name](model.parameters(), generator=seeded())
    assert bool(ends[1].isfinite().all())
