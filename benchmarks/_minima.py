"""The losses that the benchmark of minimisers minimises, and other people's minimisers on the same derivatives."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _flows import network, teacher_student
from scipy.optimize import least_squares
from torch import Tensor

from torch_gradflow import ModuleObjective, Objective
from torch_gradflow.objectives.regularized import Penalties, Regularized

PACKAGES = ("torch", "numpy", "scipy", "numba", "nlopt", "pytorch-minimize", "scikit-learn")
MISSING: dict[str, str] = {}
try:
    import torchmin
except ImportError:
    torchmin = None
    MISSING["pytorch-minimize"] = "not installed (pip install pytorch-minimize)"
try:
    import nlopt
except ImportError:
    nlopt = None
    MISSING["NLopt"] = "not installed (pip install nlopt)"
GTOL = 1e-13


@dataclass(frozen=True)
class Setting:
    """A problem with one seed.

    Attributes:
        objective: L.
        theta0: Where it starts, shape ``(P,)``.
        function: L in torch, for packages that differentiate by themselves.
        jacobian: Of the objective's residuals, shape ``(M, P)``; None where it has none.
    """

    objective: Objective
    theta0: Tensor
    function: Callable[[Tensor], Tensor]
    jacobian: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Problem:
    """A loss to minimise.

    Attributes:
        name: Its name.
        make: Builds it from a seed.
        seeds: How many, from 1.
        starts: Flow times of the starts; 0 is θ0.
        work: What one run may take, in gradients.
        seconds: What one run may take, in seconds of the processor.
        few: Methods that are left out.
    """

    name: str
    make: Callable[[int], Setting]
    seeds: int
    starts: tuple[float, ...] = (0.0, 1e3, 1e5)
    work: float = 5_000.0
    seconds: float = 5.0
    few: frozenset[str] = frozenset()


def student(seed: int, **sizes: int) -> Setting:
    """A student of a teacher, see ``problems.teacher_student``."""
    model, x, y = teacher_student(seed, **sizes)
    objective = ModuleObjective(model, F.mse_loss, (x, y))
    function = function_of(model, F.mse_loss, x, y, 0.0)
    return Setting(objective, objective.initial_theta(), function, one_layer(x.numpy(), "softplus"))


def decayed(model: torch.nn.Module, loss: Any, x: Tensor, y: Tensor, decay: float) -> Setting:
    base = ModuleObjective(model, loss, (x, y))
    weights = torch.full((base.n_parameters,), decay, dtype=base.dtype)
    jacobian = one_layer(x.numpy(), "tanh", decay) if loss is F.mse_loss else None
    function = function_of(model, loss, x, y, decay)
    return Setting(Regularized(base, Penalties(weight_decay=weights)), base.initial_theta(), function, jacobian)


def function_of(model: torch.nn.Module, loss: Any, x: Tensor, y: Tensor, decay: float) -> Callable[[Tensor], Tensor]:
    """L(θ) in torch."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def value(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return loss(torch.func.functional_call(model, named, x), y) + 0.5 * decay * (theta @ theta)

    return value


def one_layer(x: np.ndarray, activation: str, decay: float = 0.0) -> Callable[[np.ndarray], np.ndarray]:
    """∂r/∂θ of r = √(2/N) (f − y), and √λ θ, for a network with one hidden layer and one output, for peers that need it."""
    n, d = x.shape

    def jacobian(theta: np.ndarray) -> np.ndarray:
        k = (len(theta) - 1) // (d + 2)
        w, b, a = theta[: k * d].reshape(k, d), theta[k * d : k * d + k], theta[k * d + k : -1]
        z = x @ w.T + b
        h = np.tanh(z) if activation == "tanh" else np.logaddexp(0, z)
        s = a * (1 - h * h if activation == "tanh" else 0.5 * (1 + np.tanh(0.5 * z)))
        rows = np.concatenate([(s[:, :, None] * x[:, None, :]).reshape(n, -1), s, h, np.ones((n, 1))], axis=1)
        rows *= np.sqrt(2 / n)
        return np.concatenate([rows, np.sqrt(decay) * np.eye(len(theta))]) if decay else rows

    return jacobian


def diabetes(seed: int) -> Setting:
    """10-8-1 tanh with weight decay 0.01 on scikit-learn's diabetes data."""
    from sklearn.datasets import load_diabetes

    torch.manual_seed(seed)
    inputs, target = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True))
    x, y = (inputs - inputs.mean(0)) / inputs.std(0), ((target - target.mean()) / target.std())[:, None]
    return decayed(network((10, 8, 1), "tanh"), F.mse_loss, x, y, 1e-2)


def digits(seed: int) -> Setting:
    """64-8-10 tanh with cross-entropy and weight decay 0.01 on 1000 of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images)[:1000] / 16, torch.from_numpy(labels).long()[:1000]
    return decayed(network((64, 8, 10), "tanh"), F.cross_entropy, x, y, 1e-2)


DENSE_AND_SLOW = frozenset({"torchmin newton-exact", "torchmin trust-exact", "torchmin bfgs", "Adam"})
PROBLEMS = (
    Problem("T33, r = 8", student, 20),
    Problem("T33, r = 3", lambda seed: student(seed, n_student=3), 20),
    Problem("k = 16 teacher", lambda seed: student(seed, n_teacher=16), 3),
    Problem(
        "1153 parameters",
        lambda seed: student(seed, n_student=64, n_teacher=16, n_inputs=16, n_samples=2000),
        1,
        (1e3,),
        25_000.0,
        75.0,
        DENSE_AND_SLOW | {"trust-region", "newton", "saddle-free", "trust-region-cg", "bfgs", "lbfgs"},
    ),
    Problem("diabetes", diabetes, 3, (0.0, 1e3)),
    Problem("digits", digits, 1, (0.0, 1e3), 10_000.0, 10.0),
)


@dataclass
class Found:
    """What a run found.

    Attributes:
        theta: Its best point.
        loss: L there.
        grad_norm: ‖∇L‖ there, in the infinity norm.
        status: Why it ended.
        choices: What "auto" chose, and when.
        kind: Of the end, if there is a certificate.
    """

    theta: Tensor
    loss: float
    grad_norm: float
    status: str
    choices: list[tuple[int, str]]
    kind: str = ""


class Meter:
    """What was evaluated since it was made, in gradients; and how much may be.

    Args:
        objective: Whose counts are read.
        costs: Seconds per call: "gradient", "hvp", "hessian", "jacobian".
        work: What may be spent, in gradients.
        seconds: What may be spent, in seconds of the processor.
    """

    def __init__(self, objective: Objective, costs: dict[str, float], work: float, seconds: float) -> None:
        self._objective, self._costs, self._work, self._seconds = objective, costs, work, seconds
        self._before, self._began = self._now(), time.process_time()
        self._end: tuple[dict[str, int], float] | None = None

    def _now(self) -> dict[str, int]:
        counts = self._objective.counts
        return {"gradient": counts.n_grad, "hvp": counts.n_hvp, "hessian": counts.n_hessian, "jacobian": counts.n_jacobian}

    def counts(self) -> dict[str, int]:
        """Evaluations."""
        now = self._now() if self._end is None else self._end[0]
        return {name: n - self._before[name] for name, n in now.items()}

    def work(self) -> float:
        """The same in gradients."""
        return sum(n * self._costs[name] for name, n in self.counts().items()) / self._costs["gradient"]

    def seconds(self) -> float:
        """Of the processor."""
        return (time.process_time() if self._end is None else self._end[1]) - self._began

    def stop(self) -> None:
        """What comes now counts no more."""
        self._end = self._end or (self._now(), time.process_time())

    def is_over(self) -> bool:
        """Whether a limit is reached."""
        return self._end is None and (self.work() >= self._work or self.seconds() >= self._seconds)


class EnoughError(Exception):
    """The gradient is small enough, or the limit is reached."""


class Best:
    """The best point that a peer has seen; ends it as soon as it is good enough, or has spent too much."""

    def __init__(self, objective: Objective, meter: Meter) -> None:
        self._objective, self._meter = objective, meter
        self.loss, self.grad_norm, self.theta = float("inf"), float("inf"), torch.empty(0)

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L and ∇L.

        Raises:
            EnoughError: See the class.
        """
        found = self._objective.loss_and_gradient(theta)
        loss, norm = float(found[0]), float(found[1].abs().max())
        if loss < self.loss * (1 - 1e-12) or (norm < self.grad_norm and loss <= self.loss * (1 + 1e-12)):
            self.loss, self.grad_norm, self.theta = loss, norm, theta
        if norm <= GTOL or self._meter.is_over():
            raise EnoughError
        return found


Peer = Callable[[Setting, Tensor, Meter], Found]


def peer(run: Callable[[Setting, Tensor, Best], str]) -> Peer:
    """A run of a peer, ended when it is good enough."""

    def found(made: Setting, theta: Tensor, meter: Meter) -> Found:
        best = Best(made.objective, meter)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                status = run(made, theta, best)
            except EnoughError:
                status = "ended"
            except (ArithmeticError, RuntimeError, ValueError) as error:
                status = f"{type(error).__name__}: {error}"[:100]
        return Found(best.theta, best.loss, best.grad_norm, status, [])

    return found


def scipy_least_squares(made: Setting, theta: Tensor, best: Best) -> str:
    """scipy's least_squares (trust-region reflective, SVD of the Jacobian)."""
    objective, jacobian = made.objective, made.jacobian
    if jacobian is None:
        raise ValueError("there are no residuals")

    def residuals(at: np.ndarray) -> np.ndarray:
        here = torch.tensor(at)
        best(here)
        return objective.residuals(here).numpy()

    def counted(at: np.ndarray) -> np.ndarray:
        objective.counts.n_jacobian += 1
        return jacobian(at)

    if not np.allclose(jacobian(theta.numpy()).T @ residuals(theta.numpy()), objective.loss_and_gradient(theta)[1].numpy()):
        raise AssertionError("the Jacobian is that of other residuals.")
    tolerances = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
    return str(least_squares(residuals, theta.numpy(), jac=counted, max_nfev=10**6, **tolerances).message)


def torch_lbfgs(made: Setting, theta: Tensor, best: Best) -> str:
    """torch's L-BFGS with its strong-Wolfe search."""
    leaf = theta.clone()
    optimizer = torch.optim.LBFGS(
        [leaf], max_iter=10**6, max_eval=10**7, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, leaf.grad = best(leaf.detach().clone())
        return loss

    optimizer.step(closure)
    return "ended by itself"


def adam(made: Setting, theta: Tensor, best: Best) -> str:
    """torch's Adam with a learning rate that falls from 1e-2 to 1e-5 over 20,000 steps."""
    leaf = theta.clone()
    optimizer = torch.optim.Adam([leaf], lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-3 ** (1 / 20_000))
    for _ in range(20_000):
        _, leaf.grad = best(leaf.detach().clone())
        optimizer.step()
        schedule.step()
    return "20,000 steps"


def torchmin_peer(method: str, second: bool, **options: Any) -> Peer:
    """One of pytorch-minimize's methods, with its tolerances switched off.

    It differentiates a torch function by itself. Each call of that counts as a gradient, and each iteration of a method
    with second derivatives as a Hessian.
    """

    def run(made: Setting, theta: Tensor, best: Best) -> str:
        counts = made.objective.counts

        def value(at: Tensor) -> Tensor:
            counts.n_grad += 1
            return made.function(at)

        def watch(at: Tensor, *_: Any) -> None:
            counts.n_hessian += second
            counts.n_grad -= 1  # that of the watch
            best(at.detach())

        found = torchmin.minimize(value, theta, method=method, max_iter=10**5, options=dict(options), callback=watch)
        return str(found.message)

    return peer(run)


# scipy's and NLopt's general minimisers run through our adapter, which ends them as soon as the gradient is small enough.
ADAPTED = {"scipy trust-exact": "scipy:trust-exact", "scipy BFGS": "scipy:BFGS", "scipy L-BFGS-B": "scipy:L-BFGS-B"}
if nlopt is not None:
    ADAPTED["NLopt LD_SLSQP"] = "nlopt:LD_SLSQP"
PEERS: dict[str, Peer] = {
    "scipy least_squares": peer(scipy_least_squares),
    "torch LBFGS": peer(torch_lbfgs),
    "Adam": peer(adam),
}
if torchmin is not None:
    PEERS |= {
        "torchmin newton-exact": torchmin_peer("newton-exact", True, xtol=0.0),
        "torchmin trust-exact": torchmin_peer("trust-exact", True, gtol=0.0),
        "torchmin bfgs": torchmin_peer("bfgs", False, gtol=0.0, xtol=0.0, gtd_tol=0.0),
    }
