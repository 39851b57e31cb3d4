"""Other people's integrators on our objective: each follows the flow through the given times with one tolerance.

All but diffrax evaluate the same callbacks as ours, those of the objective, wrapped to numpy where they need it. diffrax can
only trace jax; it gets its own compiled gradient of the same network, whose cost is measured beside ours. Whatever is not
installed is named in ``MISSING`` and left out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint

from torch_gradflow import Objective

try:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
except ImportError:
    diffrax = jax = jnp = None
try:
    from sksundae import cvode
except ImportError:
    cvode = None

PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "torchdiffeq",
    "numba",
    "scikit-sundae",
    "jax",
    "diffrax",
    "equinox",
    "lineax",
    "optimistix",
)
# The longest Krylov space of CVODE's GMRES, as the facts measured it.
KRYLOV = 30
# From how many parameters on CVODE factorises with LAPACK instead of its own loops.
LAPACK = 100
# Steps after which diffrax gives up; it cannot be interrupted.
MAX_STEPS = {"Kvaerno5": 3000, "Tsit5": 20_000}
ACTIVATIONS = {"softplus": "softplus", "tanh": "tanh", "relu": "relu", "identity": None}


class BudgetSpentError(Exception):
    """The run took more than it may."""


@dataclass(frozen=True)
class Task:
    """One flow to follow.

    Attributes:
        objective: L, as an objective of ours.
        theta0: Where it starts.
        times: Where it is compared, ascending; the last one ends it.
        sizes: Widths of the network's layers (for diffrax).
        activation: Between its layers.
        data: x and y, in rows.
        seconds: What a run may take.
        evaluations: What a run may evaluate: gradients, products and Hessians together.
    """

    objective: Objective
    theta0: Tensor
    times: tuple[float, ...]
    sizes: tuple[int, ...]
    activation: str
    data: tuple[Tensor, Tensor]
    seconds: float
    evaluations: int


@dataclass
class Path:
    """What a run gave.

    Attributes:
        theta: θ at the times, shape ``(n, P)``; fewer rows if it ended early.
        status: "" if it came to the end, or why it did not.
        n_factor: LU factorisations where the solver counts them.
        gradients: Gradients where they are not counted by the objective (jax's own).
        seconds: The time that counts, if it is not that of the whole call.
    """

    theta: np.ndarray
    status: str = ""
    n_factor: int = 0
    gradients: int | None = None
    seconds: float | None = None


class Callbacks:
    """The objective's derivatives with numpy in and out, within the budget."""

    def __init__(self, task: Task) -> None:
        self._objective, self._limit = task.objective, task.evaluations
        self._deadline = time.perf_counter() + task.seconds
        self._left = task.evaluations

    def spend(self) -> None:
        """One evaluation.

        Raises:
            BudgetSpentError: If it is one too many.
        """
        self._left -= 1
        if self._left < 0:
            raise BudgetSpentError(f"{self._limit} evaluations")
        if time.perf_counter() > self._deadline:
            raise BudgetSpentError("time")

    def field(self, t: float, theta: np.ndarray) -> np.ndarray:
        """−∇L(θ)."""
        self.spend()
        return -self._objective.loss_and_gradient(torch.tensor(theta))[1].numpy()

    def jacobian(self, t: float, theta: np.ndarray) -> np.ndarray:
        """−H(θ)."""
        self.spend()
        return -self._objective.hessian(torch.tensor(theta)).numpy()

    def product(self, theta: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """−H(θ) v."""
        self.spend()
        return -self._objective.hvp(torch.tensor(theta), torch.tensor(vector)).numpy()


Peer = Callable[[Task, float], Path]


def scipy_peer(method: str) -> Peer:
    """One of ``solve_ivp``'s implicit methods, with our Hessian as its Jacobian."""

    def run(task: Task, tolerance: float) -> Path:
        callbacks = Callbacks(task)
        found = solve_ivp(
            callbacks.field,
            (0.0, task.times[-1]),
            task.theta0.numpy(),
            method=method,
            t_eval=task.times,
            rtol=tolerance,
            atol=tolerance,
            jac=callbacks.jacobian,
        )
        return Path(found.y.T, "" if found.success else found.message, int(found.nlu))

    return run


def torchdiffeq_peer(method: str) -> Peer:
    """One of torchdiffeq's explicit methods, bare."""

    def run(task: Task, tolerance: float) -> Path:
        callbacks, objective = Callbacks(task), task.objective

        def field(t: Tensor, theta: Tensor) -> Tensor:
            callbacks.spend()
            return -objective.loss_and_gradient(theta)[1]

        times = torch.tensor([0.0, *task.times], dtype=torch.float64)
        return Path(odeint(field, task.theta0, times, method=method, rtol=tolerance, atol=tolerance)[1:].numpy())

    return run


def cvode_peer(solver: str) -> Peer:
    """SUNDIALS' CVODE, BDF, with dense exact Jacobians or with GMRES on exact products."""

    def run(task: Task, tolerance: float) -> Path:
        callbacks = Callbacks(task)

        def field(t: float, y: np.ndarray, yp: np.ndarray) -> None:
            yp[:] = callbacks.field(t, y)

        def jacobian(t: float, y: np.ndarray, yp: np.ndarray, out: np.ndarray) -> None:
            out[:] = callbacks.jacobian(t, y)

        def product(t: float, y: np.ndarray, yp: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
            out[:] = callbacks.product(y, v)

        options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "max_num_steps": 10**6}
        if solver == "gmres":
            options |= {"linsolver": "gmres", "krylov_dim": KRYLOV, "jactimes": cvode.CVODEJacTimes(None, product)}
        else:
            dense = "lapackdense" if task.objective.n_parameters >= LAPACK else "dense"
            options |= {"linsolver": dense, "jacfn": jacobian}
        found = cvode.CVODE(field, method="BDF", **options).solve(np.array([0.0, *task.times]), task.theta0.numpy())
        return Path(np.asarray(found.y)[1:], "" if found.success else str(found.message))

    return run


class JaxFlow:
    """The gradient of one network and its data in jax, and diffrax on it; compiled once for all tolerances."""

    def __init__(self, task: Task) -> None:
        x, y = (jnp.asarray(part.numpy()) for part in task.data)
        act = getattr(jax.nn, name) if (name := ACTIVATIONS[task.activation]) else lambda z: z
        shapes = list(zip(task.sizes, task.sizes[1:], strict=False))

        def loss(theta: Any) -> Any:
            values, start = x, 0
            for layer, (fan_in, fan_out) in enumerate(shapes):
                w = theta[start : start + fan_in * fan_out].reshape(fan_out, fan_in)
                b = theta[start + fan_in * fan_out : start + fan_in * fan_out + fan_out]
                start += (fan_in + 1) * fan_out
                values = values @ w.T + b
                values = act(values) if layer < len(shapes) - 1 else values
            return ((values - y) ** 2).mean()

        self.task, self.theta0 = task, jnp.asarray(task.theta0.numpy())
        self.gradient = jax.jit(jax.grad(loss))
        self.term = diffrax.ODETerm(lambda t, theta, _: -jax.grad(loss)(theta))
        self._compiled: dict[str, Callable[..., Any]] = {}

    def agrees(self) -> bool:
        """Whether it is the same function."""
        ours = self.task.objective.loss_and_gradient(self.task.theta0)[1].numpy()
        return bool(np.allclose(np.asarray(self.gradient(self.theta0)), ours, rtol=1e-9, atol=1e-12))

    def gradient_seconds(self) -> float:
        """Median seconds of a gradient."""
        taken = []
        for _ in range(50):
            began = time.perf_counter()
            self.gradient(self.theta0).block_until_ready()
            taken.append(time.perf_counter() - began)
        return float(np.median(taken))

    def solve(self, name: str, tolerance: float) -> tuple[Any, float]:
        """The solution, and the seconds without compilation."""
        if name not in self._compiled:
            solver = getattr(diffrax, name)()

            def call(tolerance: Any, times: Any) -> Any:
                return diffrax.diffeqsolve(
                    self.term,
                    solver,
                    0.0,
                    times[-1],
                    None,
                    self.theta0,
                    saveat=diffrax.SaveAt(ts=times),
                    stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                    max_steps=MAX_STEPS[name],
                    throw=False,
                )

            self._compiled[name] = jax.jit(call)
            self._timed(name, 1e-3, [1e-6 * t for t in self.task.times])
        return self._timed(name, tolerance, self.task.times)

    def _timed(self, name: str, tolerance: float, times: Sequence[float]) -> tuple[Any, float]:
        began = time.perf_counter()
        found = self._compiled[name](jnp.asarray(tolerance), jnp.asarray(times))
        found.ys.block_until_ready()
        return found, time.perf_counter() - began


_jax_flows: dict[int, JaxFlow] = {}


def jax_flow(task: Task) -> JaxFlow:
    """The one of this task's objective; only the latest is kept."""
    key = id(task.objective)
    if key not in _jax_flows:
        _jax_flows.clear()
        _jax_flows[key] = JaxFlow(task)
        if not _jax_flows[key].agrees():
            raise AssertionError("jax computes another gradient.")
    return _jax_flows[key]


def diffrax_peer(name: str, per_step: int | None) -> Peer:
    """One of diffrax's methods; with ``per_step`` gradients a step, or None where it solves with Jacobians of its own."""

    def run(task: Task, tolerance: float) -> Path:
        found, seconds = jax_flow(task).solve(name, tolerance)
        theta = np.asarray(found.ys)
        finite = np.isfinite(theta).all(1)
        n = len(theta) if finite.all() else int(finite.argmin())
        steps = int(found.stats["num_steps"])
        status = "" if n == len(theta) else f"stopped after {steps} steps"
        return Path(theta[:n], status, gradients=None if per_step is None else per_step * steps, seconds=seconds)

    return run


def optimizer_peer(make: Callable[[list[Tensor]], torch.optim.Optimizer], n_samples: int) -> Callable[[Task, float], Path]:
    """An optimizer of torch's with the step sizes summed up as time; its ``tolerance`` is the learning rate.

    Args:
        make: Makes it, with learning rate 1.
        n_samples: Iterates to return, evenly spaced in the logarithm of their number; 0 for those at the times.
    """

    def run(task: Task, tolerance: float) -> Path:
        callbacks, theta = Callbacks(task), task.theta0.clone()
        optimizer = make([theta])
        optimizer.param_groups[0]["lr"] = tolerance
        last = round(task.times[-1] / tolerance)
        if n_samples:
            last = min(last, task.evaluations)
            wanted = {int(i) for i in np.geomspace(1, last, n_samples)}
        else:
            wanted = {round(t / tolerance) for t in task.times}
        kept = []
        for i in range(1, last + 1):
            callbacks.spend()
            theta.grad = task.objective.loss_and_gradient(theta)[1]
            optimizer.step()
            if i in wanted:
                kept.append(theta.numpy().copy())
        return Path(np.array(kept))

    return run


PEERS: dict[str, Peer] = {name: scipy_peer(name) for name in ("LSODA", "BDF", "Radau")}
PEERS |= {f"torchdiffeq {name}": torchdiffeq_peer(name) for name in ("dopri5", "bosh3")}
OPTIMIZERS: dict[str, Peer] = {
    "SGD": optimizer_peer(lambda leaves: torch.optim.SGD(leaves), 0),
    "Adam": optimizer_peer(lambda leaves: torch.optim.Adam(leaves), 200),
}
MISSING: dict[str, str] = {}
if cvode is not None:
    PEERS |= {f"CVODE {solver}": cvode_peer(solver) for solver in ("dense", "gmres")}
else:
    MISSING["CVODE"] = "scikit-sundae is not installed (pip install scikit-sundae)"
if diffrax is not None:
    PEERS |= {"diffrax Kvaerno5": diffrax_peer("Kvaerno5", None), "diffrax Tsit5": diffrax_peer("Tsit5", 6)}
else:
    MISSING["diffrax"] = "diffrax or jax is not installed (pip install diffrax)"


def attempt(run: Peer, task: Task, tolerance: float) -> Path:
    """``run``, with what it raises as its status."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return run(task, tolerance)
        except BudgetSpentError as error:
            return Path(np.empty((0, task.objective.n_parameters)), f"over budget ({error})")
        except (AssertionError, ArithmeticError, RuntimeError, ValueError) as error:
            return Path(np.empty((0, task.objective.n_parameters)), f"{type(error).__name__}: {error}")
