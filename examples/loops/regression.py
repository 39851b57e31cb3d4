"""What all recipes train: a small tanh network in float64 on the diabetes data that scikit-learn ships."""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

LR = 2.5  # flow time per step
N_STEPS = 20


def network() -> nn.Sequential:
    """97 parameters, always the same ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def data() -> tuple[Tensor, Tensor]:
    """442 patients: 10 measurements, and how the disease went on; all scaled to standard deviation 1."""
    bunch = load_diabetes()
    x, y = torch.tensor(bunch.data), torch.tensor(bunch.target)[:, None]
    return x / x.std(0), (y - y.mean()) / y.std()


def final_loss(model: nn.Module) -> float:
    """The loss where training ended, evaluated in the same way for all."""
    x, y = data()
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), y).item()
