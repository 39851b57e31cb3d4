"""Problems that many tests share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

# The engines that evaluate what was recorded.
RECORDED = ("perceptron", "replay")


def teacher_student(
    seed: int, *, n_student: int = 8, n_teacher: int = 4, n_inputs: int = 2, n_samples: int = 1000
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The teacher–student problem T33 of the literature on gradient flow (arXiv 2301.10638), in float64.

    A student with one hidden layer of ``n_student`` softplus neurons (33 parameters for 8) learns a teacher of 4 from
    Gaussian inputs; Glorot-normal weights, zero biases.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_inputs, n_samples))
    w, b = rng.standard_normal((n_teacher, n_inputs)), rng.standard_normal(n_teacher)
    a, c = rng.standard_normal(n_teacher), rng.standard_normal()
    y = a @ np.logaddexp(0, w @ x + b[:, None]) + c
    w0 = rng.standard_normal((n_student, n_inputs)) * np.sqrt(2 / (n_inputs + n_student))
    a0 = rng.standard_normal((1, n_student)) * np.sqrt(2 / (n_student + 1))
    model = nn.Sequential(nn.Linear(n_inputs, n_student), nn.Softplus(), nn.Linear(n_student, 1)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (w0, np.zeros(n_student), a0, np.zeros(1)), strict=True):
            parameter.copy_(torch.from_numpy(np.asarray(value)))
    return model, torch.from_numpy(np.ascontiguousarray(x.T)), torch.from_numpy(y)[:, None]


def make_closure(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[], Tensor]:
    """The closure that every training loop writes."""
    loss_fn = nn.functional.mse_loss if loss_fn is None else loss_fn

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    return closure


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class NumpyPerceptron:
    """Loss and gradient of a one-hidden-layer softplus network written out in numpy: independent of torch's autograd."""

    def __init__(self, x: Tensor, y: Tensor, n_hidden: int) -> None:
        self.x, self.y, self.k = x.numpy(), y.numpy()[:, 0], n_hidden

    def loss_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean squared error and its gradient, θ in the order of ``model.parameters()``."""
        d, k, n = self.x.shape[1], self.k, len(self.y)
        w, b, a, c = theta[: k * d].reshape(k, d), theta[k * d : k * d + k], theta[k * d + k : -1], theta[-1]
        z = self.x @ w.T + b
        h = np.logaddexp(0, z)
        e = h @ a + c - self.y
        s = (2 / n) * e[:, None] * a / (1 + np.exp(-z))
        return float(e @ e / n), np.concatenate([(s.T @ self.x).ravel(), s.sum(0), (2 / n) * (h.T @ e), [2 * e.mean()]])
