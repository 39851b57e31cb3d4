"""What a tolerance means: for every method the error at the end falls in proportion to rtol, over five decades."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from torch_gradflow import Objective, integrate
from torch_gradflow.flow.methods import METHODS
from torch_gradflow.objectives.base import EvaluationCounts

RTOLS = (1e-4, 1e-5, 1e-7, 1e-9)
# Of order 2 and 3: tighter tolerances take too many steps.
LOW_ORDER = ("rkc2", "bosh3")
# Of torchdiffeq's methods of order 2 the error is another power of rtol: their estimate is that of order 1.
TESTED = [method for method in METHODS if method not in ("fehlberg2", "adaptive_heun")]


class Clocked(Objective):
    """L(x, s) = −s + ½ k (x − sin s)²: s is a clock, which x chases and slows down; stiff for large k."""

    n_parameters, dtype, device = 2, torch.float64, torch.device("cpu")
    resolution = torch.finfo(torch.float64).eps
    start, end = (1.0, 0.0), 6.0

    def __init__(self, k: float = 10.0) -> None:
        self.k, self.counts = k, EvaluationCounts()

    def field(self, _: float, point: np.ndarray) -> np.ndarray:
        """−∇L, in numpy."""
        x, s = point
        return np.array([-self.k * (x - np.sin(s)), 1 + self.k * (x - np.sin(s)) * np.cos(s)])

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        x, s = theta.tolist()
        off = x - math.sin(s)
        gradient = theta.new_tensor([self.k * off, -1 - self.k * off * math.cos(s)])
        return theta.new_tensor(-s + 0.5 * self.k * off**2), gradient

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        return self._hessian(theta)

    def _hessian(self, theta: Tensor) -> Tensor:
        x, s = theta.tolist()
        mixed = -self.k * math.cos(s)
        return theta.new_tensor([[self.k, mixed], [mixed, self.k * (math.cos(s) ** 2 + (x - math.sin(s)) * math.sin(s))]])

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        self.counts.n_hvp += 1 if vectors.dim() == 1 else vectors.shape[1]
        return self._hessian(theta) @ vectors


class Valley(Clocked):
    """Rosenbrock's function: a fast descent, then a slow curved valley."""

    start, end = (-0.7, 1.0), 4.0

    def field(self, _: float, point: np.ndarray) -> np.ndarray:
        x, y = point
        return np.array([-2 * (x - 1) + 4 * self.k * x * (y - x**2), -2 * self.k * (y - x**2)])

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        x, y = theta.tolist()
        off = y - x**2
        return theta.new_tensor((x - 1) ** 2 + self.k * off**2), theta.new_tensor(
            [2 * (x - 1) - 4 * self.k * x * off, 2 * self.k * off]
        )

    def _hessian(self, theta: Tensor) -> Tensor:
        x, y = theta.tolist()
        return theta.new_tensor([[2 - 4 * self.k * (y - 3 * x**2), -4 * self.k * x], [-4 * self.k * x, 2 * self.k]])


PROBLEMS: dict[str, type[Clocked]] = {"clocked": Clocked, "valley": Valley}


@cache
def reference(name: str) -> Tensor:
    """By scipy's DOP853 on the field in numpy."""
    problem = PROBLEMS[name]()
    solution = solve_ivp(problem.field, (0.0, problem.end), problem.start, method="DOP853", rtol=3e-14, atol=1e-15)
    return torch.from_numpy(solution.y[:, -1].copy())


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_are_those_of_the_field(name: str) -> None:
    problem = PROBLEMS[name]()
    theta = torch.tensor([0.3, 0.4], dtype=torch.float64)
    _, gradient = problem.loss_and_gradient(theta)
    assert np.allclose(-gradient.numpy(), problem.field(0.0, theta.numpy()), rtol=1e-14)
    steps = 1e-6 * torch.eye(2, dtype=torch.float64)
    columns = [
        (problem.loss_and_gradient(theta + step)[1] - problem.loss_and_gradient(theta - step)[1]) / 2e-6 for step in steps
    ]
    assert torch.allclose(problem.hessian(theta), torch.stack(columns), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", TESTED)
def test_error_is_proportional_to_rtol(method: str, name: str) -> None:
    """The error grows about as rtol, and is at most 100 rtol.

    Control of the error per step makes it rtol^(k/(k + 1)) for a method of order k: from 2/3 on.
    """
    true = reference(name)
    rtols = RTOLS[:3] if method in LOW_ORDER else RTOLS
    errors = []
    for rtol in rtols:
        problem = PROBLEMS[name]()
        theta0 = torch.tensor(problem.start, dtype=torch.float64)
        end = integrate(problem, theta0, (0.0, problem.end), method=method, rtol=rtol, atol=rtol).theta[-1]
        errors.append(float((end - true).norm() / true.norm()))
    slope = np.polyfit(np.log(rtols), np.log(np.maximum(errors, 1e-14)), 1)[0]
    assert max(e / r for e, r in zip(errors, rtols, strict=True)) < 100
    # LSODA itself changes from one family of methods to another, at times that depend on rtol.
    assert 0.65 < slope < 1.3 or method == "LSODA"
