"""The flows that the benchmark of integrators follows: networks, data, times, and which methods go at which tolerances."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import torch
import torch.nn.functional as F
from _peers import Task
from torch import Tensor, nn

from torch_gradflow import ModuleObjective

sys.path.insert(0, str(File(__file__).parents[1] / "tests"))
from problems import teacher_student

ALL = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True)
class Setting:
    """A problem with one seed."""

    objective: ModuleObjective
    theta0: Tensor
    sizes: tuple[int, ...]
    activation: str
    data: tuple[Tensor, Tensor]

    def task(self, times: tuple[float, ...], seconds: float, evaluations: int) -> Task:
        """The flow through these times, with what a run may take."""
        return Task(self.objective, self.theta0, times, self.sizes, self.activation, self.data, seconds, evaluations)


@dataclass(frozen=True)
class Problem:
    """A flow to follow.

    Attributes:
        name: Its name.
        make: Builds it from a seed.
        times: Where errors are measured, ascending.
        target: The error at which work is compared.
        methods: Tolerances for each method of ours and each peer.
        reference: A method of ours, its tolerance, and a looser one whose distance tells how good the reference is.
        confirm: Whether the first seed's reference is compared with scipy's Radau at 1e-11 when it is computed.
        seeds: How many, from 1.
        few: Methods that run on the first seed only.
        seconds: What one run may take.
        evaluations: What one run may evaluate.
    """

    name: str
    make: Callable[[int], Setting]
    times: tuple[float, ...]
    target: float
    methods: dict[str, tuple[float, ...]]
    reference: tuple[str, float, float]
    confirm: bool = False
    seeds: int = 1
    few: frozenset[str] = frozenset()
    seconds: float = 20.0
    evaluations: int = 200_000


def network(sizes: Sequence[int], activation: str, *, bias: bool = True) -> nn.Sequential:
    """A perceptron in float64 with torch's own start."""
    act = {"tanh": nn.Tanh, "softplus": nn.Softplus, "relu": nn.ReLU}.get(activation)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias)] + ([act()] if act is not None else [])
    return nn.Sequential(*(layers if act is None else layers[:-1])).double()


def setting(model: nn.Module, data: tuple[Tensor, Tensor], sizes: Sequence[int], activation: str, loss: Any) -> Setting:
    objective = ModuleObjective(model, loss, data)
    return Setting(objective, objective.initial_theta(), tuple(sizes), activation, data)


def student(seed: int, *, n_samples: int, n_inputs: int = 2, n_student: int = 8) -> Setting:
    """T33, and T601 with 4 inputs and 100 hidden neurons."""
    model, x, y = teacher_student(seed, n_inputs=n_inputs, n_student=n_student, n_samples=n_samples)
    return setting(model, (x, y), (n_inputs, n_student, 1), "softplus", F.mse_loss)


def deep_tanh(seed: int) -> Setting:
    """2-10-10-1 on 300 points of a smooth function."""
    torch.manual_seed(seed)
    model, x = network((2, 10, 10, 1), "tanh"), torch.randn(300, 2, dtype=torch.float64)
    y = (torch.sin(2 * x[:, 0]) * torch.cos(x[:, 1]))[:, None]
    return setting(model, (x, y), (2, 10, 10, 1), "tanh", F.mse_loss)


def kinked(seed: int) -> Setting:
    """T33's data and start with ReLU in student and teacher."""
    model, x, _ = teacher_student(seed)
    torch.manual_seed(seed)
    teacher = network((2, 4, 1), "relu")
    relu = nn.Sequential(model[0], nn.ReLU(), model[2])
    with torch.no_grad():
        for p in teacher.parameters():
            p.normal_()
        y = teacher(x)
    return setting(relu, (x, y), (2, 8, 1), "relu", F.mse_loss)


def deep_linear(seed: int) -> Setting:
    """Four 5x5 factors, starting near the saddle at zero; modes are learned one after the other."""
    torch.manual_seed(seed)
    model = network((5,) * 5, "identity", bias=False)
    left, right = (torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0] for _ in range(2))
    x = torch.randn(200, 5, dtype=torch.float64)
    y = x @ (left @ torch.diag(torch.tensor([6.0, 4.0, 2.5, 1.0, 0.25], dtype=torch.float64)) @ right.T)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return setting(model, (x, y), (5,) * 5, "identity", F.mse_loss)


def digits(seed: int) -> Setting:
    """64-26-10 with cross-entropy on 8x8 digits: scikit-learn's, or ten noisy random patterns where it is missing."""
    torch.manual_seed(seed)
    try:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images) / 16, torch.from_numpy(labels).long()
    except ImportError:
        y = torch.randint(10, (1797,))
        x = (torch.rand(10, 64, dtype=torch.float64)[y] + 0.5 * torch.randn(1797, 64, dtype=torch.float64)).clamp(0, 1)
    return setting(network((64, 26, 10), "tanh"), (x, y), (64, 26, 10), "tanh", F.cross_entropy)


def both(tolerances: tuple[float, ...], *names: str) -> dict[str, tuple[float, ...]]:
    return dict.fromkeys(names, tolerances)


STIFF = both(ALL, "LSODA", "BDF") | both((1e-5, 1e-6), "Radau")
SUNDIALS = both((*ALL, 1e-9), "CVODE dense", "CVODE gmres")
OUR_STIFF = both(ALL, "auto", "bdf", "bdf-cg", "bdf-secant", "exprb53")
T33 = (10.0, 1e3, 1e5, 1e7)
FEW = frozenset({"CVODE dense", "CVODE gmres", "exprb53", "rkc2", "diffrax Kvaerno5", "diffrax Tsit5"})

PROBLEMS = (
    Problem(
        "T33, N = 1e3",
        lambda seed: student(seed, n_samples=1000),
        T33,
        1e-6,
        OUR_STIFF | STIFF | SUNDIALS | both((1e-6,), "diffrax Kvaerno5"),
        ("bdf", 1e-11, 1e-10),
        confirm=True,
        seeds=5,
        few=FEW,
    ),
    Problem(
        "T33, N = 1e4",
        lambda seed: student(seed, n_samples=10_000),
        T33,
        1e-6,
        OUR_STIFF | STIFF | SUNDIALS,
        ("bdf", 1e-11, 1e-10),
        confirm=True,
        seeds=5,
        few=FEW | {"bdf-cg"},
        seconds=30.0,
    ),
    Problem(
        "T33, N = 1e3, to t = 1e3",
        lambda seed: student(seed, n_samples=1000),
        (10.0, 1e3),
        1e-6,
        OUR_STIFF
        | both((1e-5, 1e-6), "rkc2", "LSODA", "BDF")
        | both((1e-6,), "dopri5")
        | both((3e-7,), "torchdiffeq dopri5")
        | both((1e-6,), "torchdiffeq bosh3")
        | both((3e-7,), "diffrax Tsit5"),
        ("bdf", 1e-11, 1e-10),
        seeds=3,
        few=FEW | {"dopri5", "torchdiffeq bosh3"},
        seconds=120.0,
    ),
    Problem(
        "T601, N = 1e3",
        lambda seed: student(seed, n_samples=1000, n_inputs=4, n_student=100),
        (1.0, 10.0, 1e3, 1e5),
        2e-6,
        both((1e-5, 1e-6, 1e-7, 1e-8), "auto", "bdf-cg", "bdf-secant")
        | both((1e-6, 1e-7), "bdf", "LSODA", "BDF")
        | both((1e-7, 1e-8), "CVODE dense", "CVODE gmres"),
        ("bdf-cg", 1e-10, 1e-9),
        seconds=40.0,
    ),
    Problem(
        "T601, N = 1e4",
        lambda seed: student(seed, n_samples=10_000, n_inputs=4, n_student=100),
        (1.0, 10.0, 1e3, 1e5),
        2e-6,
        both((1e-7, 1e-8), "auto", "bdf-cg", "bdf-secant")
        | both((1e-6, 1e-7), "LSODA", "BDF")
        | both((3e-8, 1e-8), "CVODE dense")
        | both((2e-7, 5e-8), "CVODE gmres"),
        ("bdf-cg", 1e-10, 1e-9),
        seconds=90.0,
    ),
    Problem(
        "deep tanh 2-10-10-1",
        deep_tanh,
        (1.0, 10.0, 1e3, 1e5),
        1e-5,
        both(ALL, "auto", "bdf", "bdf-cg", "bdf-secant")
        | both((1e-4, 1e-5, 1e-6), "exprb53")
        | both(ALL, "LSODA", "BDF", "CVODE dense"),
        ("bdf", 1e-11, 1e-10),
    ),
    Problem(
        "ReLU 2-8-1",
        kinked,
        (1.0, 10.0, 100.0),
        1e-3,
        both((1e-3, 1e-4, 1e-5), "auto", "bdf", "bdf-cg", "bdf-secant", "exprb53", "rkc2", "dopri5")
        | both((1e-3, 1e-4, 1e-5), "LSODA", "BDF", "CVODE dense", "torchdiffeq bosh3"),
        ("dopri5", 1e-8, 1e-7),
        seconds=5.0,
    ),
    Problem(
        "deep linear 4x(5x5)",
        deep_linear,
        (10.0, 100.0, 300.0, 1e3),
        1e-5,
        both(ALL, "auto", "bdf", "bdf-cg", "bdf-secant", "exprb53")
        | both((1e-5, 1e-6, 1e-7), "rkc2")
        | STIFF
        | both(ALL, "CVODE dense"),
        ("exprb53", 1e-11, 1e-10),
    ),
    Problem(
        "digits 64-26-10",
        digits,
        (1.0, 10.0, 100.0, 1e3),
        1e-3,
        both((1e-4, 1e-5), "auto", "bdf-cg", "bdf-secant", "CVODE gmres", "LSODA") | both((1e-4,), "rkc2", "CVODE dense"),
        ("bdf-cg", 1e-9, 1e-8),
        seconds=40.0,
    ),
)
# In less than two minutes: problems, methods with fewer tolerances, one seed.
QUICK = ("T33, N = 1e3", "T33, N = 1e3, to t = 1e3", "ReLU 2-8-1", "deep linear 4x(5x5)")
QUICK_TOLERANCES = (1e-4, 1e-6, 1e-7)
