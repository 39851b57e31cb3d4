"""Models × dtypes × methods × engines: each follows the flow that scipy follows on the same closure.

The next method is one line in METHODS, the next model one in MODELS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import RECORDED, flat, make_closure
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.objectives.opened import Engine

T_END = 0.6
# Method: how far its error may be above rtol.
METHODS = {"auto": 10.0, "dopri5": 10.0, "dopri8": 10.0, "bosh3": 10.0, "adaptive_heun": 10.0, "fehlberg2": 200.0}
# dtype: the tolerance with which it is tried.
DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}

Case = tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


class Recurrent(nn.Module):
    """An LSTM with a linear read-out of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, T, 2)`` to ``(N, 1)``."""
        return self.out(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """One head of attention over a short sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, T, 4)`` to ``(N, 1)``."""
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """One layer used twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, 4)`` to ``(N, 1)``."""
        return self.frozen(self.layer(torch.tanh(self.layer(x))))


def regression(model: nn.Module, *shape: int) -> Case:
    """Mean squared error on random data."""
    return model, torch.randn(12, *shape), torch.randn(12, 1), F.mse_loss


def classification(model: nn.Module, *shape: int) -> Case:
    """Cross-entropy with three classes on random data."""
    return model, torch.randn(12, *shape), torch.arange(12) % 3, F.cross_entropy


MODELS: dict[str, Callable[[], Case]] = {
    "linear": lambda: regression(nn.Linear(3, 1), 3),
    "mlp": lambda: regression(nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1)), 3),
    "deep tanh": lambda: regression(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), 2),
    "classifier": lambda: classification(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)), 4),
    "convolution": lambda: classification(nn.Sequential(nn.Conv1d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)), 1, 6),
    "layer norm": lambda: regression(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)), 3),
    "group norm": lambda: regression(nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(1, 4), nn.Tanh(), nn.Linear(4, 1)), 3),
    "recurrent": lambda: regression(Recurrent(), 4, 2),
    "attention": lambda: regression(Attention(), 3, 4),
    "tied and frozen": lambda: regression(Tied(), 4),
}


def build(name: str, dtype: torch.dtype) -> Case:
    """The same model and data in either type."""
    torch.manual_seed(1)
    model, x, y, loss_fn = MODELS[name]()
    return model.to(dtype), x.to(dtype), y.to(dtype) if y.is_floating_point() else y, loss_fn


def true_end(name: str) -> Tensor:
    """θ(T_END) by scipy's DOP853 on the gradients that ``backward`` leaves in a plain float64 loop."""
    model, x, y, loss_fn = build(name, torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def field(t: float, theta: np.ndarray) -> np.ndarray:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(theta.copy()), parameters)
        gradients = torch.autograd.grad(loss_fn(model(x), y), parameters)
        return -torch.cat([g.reshape(-1) for g in gradients]).numpy()

    start = torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    solution = solve_ivp(field, (0.0, T_END), start, method="DOP853", rtol=1e-11, atol=1e-13)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(solution.y[:, -1].copy()), parameters)
    return flat(model)


ENDS: dict[str, Tensor] = {}


def check_end(name: str, dtype: torch.dtype, method: str, engine: Engine) -> None:
    """Three steps end where scipy does."""
    if name not in ENDS:
        ENDS[name] = true_end(name)
    case = build(name, dtype)
    optimizer = GradientFlow(case[0].parameters(), lr=T_END / 3, method=method, engine=engine, rtol=DTYPES[dtype])
    closure = make_closure(optimizer, *case)
    for _ in range(3):
        optimizer.step(closure)
    error = float((flat(case[0]).double() - ENDS[name]).norm() / ENDS[name].norm())
    assert error <= METHODS[method] * DTYPES[dtype]
    assert all(p.dtype == dtype for p in case[0].parameters())
    assert optimizer.stats.engine in (("closure",) if engine == "closure" else RECORDED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype) -> None:
    """Every model in every type, with the default method."""
    check_end(name, dtype, "auto", "auto")


@pytest.mark.parametrize("engine", ["replay", "closure"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "fehlberg2"])
@pytest.mark.parametrize("name", ["mlp", "classifier"])
def test_methods(name: str, method: str, engine: Engine) -> None:
    """Every method with every engine."""
    check_end(name, torch.float32 if method == "adaptive_heun" else torch.float64, method, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "closure"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_everything(name: str, dtype: torch.dtype, method: str, engine: Engine) -> None:
    """The whole matrix."""
    check_end(name, dtype, method, engine)


@pytest.mark.parametrize("engine", ["auto", "closure"])
@pytest.mark.parametrize("name", ["linear", "mlp", "classifier", "layer norm", "group norm", "attention", "tied and frozen"])
def test_polish(name: str, engine: Engine) -> None:
    """With weight decay every model has a fixed point nearby: gradients of a plain loop confirm it."""
    case = build(name, torch.float64)
    model, x, y, loss_fn = case
    polish = NewtonPolish(model.parameters(), weight_decay=0.1, engine=engine)
    polish.step(make_closure(polish, *case))
    assert polish.result is not None
    assert polish.result.status == "converged"
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss_fn(model(x), y), parameters)
    residual = torch.cat([(g + 0.1 * p).reshape(-1) for g, p in zip(gradients, parameters, strict=True)])
    assert float(residual.detach().abs().max()) <= 2e-13
