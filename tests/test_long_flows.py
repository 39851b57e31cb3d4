"""Long flows: checkpoints that survive any interruption, θ at any time, the energy check, error estimates, t = 1e10."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
import time
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import NumpyPerceptron, flat, teacher_student
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torch_gradflow import integrate
from torch_gradflow.flow import bdf_cg
from torch_gradflow.flow import integrate as driver
from torch_gradflow.flow.energy import dissipation_error
from torch_gradflow.flow.rounding import gradient_noise
from torch_gradflow.flow.solution import FlowReport, FlowSolution
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.module import ModuleObjective

# Methods that go on from a checkpoint to the last bit.
EXACT = ("bdf", "bdf-cg", "exprb53", "rkc2")
TIMES = [0.0, 0.01, 0.5, 1.7, 3.3, 7.9, 10.0]


def t33(dtype: torch.dtype | None = None) -> tuple[ModuleObjective, Tensor]:
    model, x, y = teacher_student(1, n_samples=300)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y), dtype=dtype)
    return objective, objective.initial_theta()


@cache
def reference(times: tuple[float, ...]) -> Tensor:
    """By scipy's Radau on derivatives written out in numpy."""
    model, x, y = teacher_student(1, n_samples=300)
    problem = NumpyPerceptron(x, y, 8)
    field = lambda t, theta: -problem.loss_and_gradient(theta)[1]  # noqa: E731
    solution = solve_ivp(field, (0, times[-1]), flat(model).numpy(), method="Radau", rtol=1e-10, atol=1e-12, t_eval=times)
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))


def errors(found: Tensor, true: Tensor) -> Tensor:
    return (found - true).norm(dim=-1) / true.norm(dim=-1)


def same(a: FlowSolution, b: FlowSolution) -> bool:
    samples = all(torch.equal(x, y) for x, y in ((a.t, b.t), (a.theta, b.theta), (a.loss, b.loss), (a.grad_norm, b.grad_norm)))
    ends = (a.status, a.message, a.n_accepted, a.step_size) == (b.status, b.message, b.n_accepted, b.step_size)
    return samples and ends and a.dissipation_error == b.dissipation_error


class Stop(Exception):
    """What an evaluation raises."""


class Interrupting(Objective):
    """``base``, of which one evaluation raises."""

    def __init__(self, base: Objective, at: int, error: type[BaseException]) -> None:
        self.n_parameters, self.dtype, self.device = base.n_parameters, base.dtype, base.device
        self.resolution, self.counts = base.resolution, base.counts
        self._base, self._at, self._error, self._n = base, at, error, 0

    def _count(self) -> None:
        self._n += 1
        if self._n == self._at:
            raise self._error("interrupted")

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self._count()
        return self._base.loss_and_gradient(theta)

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        self._count()
        return self._base.hvp(theta, vectors)

    def hessian(self, theta: Tensor) -> Tensor:
        self._count()
        return self._base.hessian(theta)

    def loss_gradient_hessian(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._count()
        return self._base.loss_gradient_hessian(theta)


# Checkpoints


@pytest.mark.parametrize(("error", "t_eval"), [(KeyboardInterrupt, TIMES), (Stop, None)])
@pytest.mark.parametrize("method", EXACT)
def test_interrupted_anywhere_a_flow_goes_on_bit_for_bit(
    method: str, error: type[BaseException], t_eval: list[float] | None, tmp_path: Path
) -> None:
    """Interrupted within an evaluation, of a step or of a sample, again and again, it comes to the same solution."""
    objective, theta0 = t33()
    whole = integrate(objective, theta0, (0.0, 10.0), method=method, t_eval=t_eval)
    file = tmp_path / "flow.pt"
    n_pieces = 0
    for at in (2, 9, 23, 24, 25, 26, 27, 60, 61, 62, 63, 110, 10**9):
        arguments: Any = {"method": method, "t_eval": t_eval, "checkpoint": file}
        try:
            solution = integrate(Interrupting(t33()[0], at, error), theta0, (0.0, 10.0), **arguments)
        except Stop:
            continue
        finally:
            n_pieces += 1
        if solution.status == "t_end":
            break
        assert solution.status == "interrupted"
        assert solution.t[-1] <= 10.0
    assert n_pieces > 5
    assert same(solution, whole)
    again = integrate(t33()[0], theta0, (0.0, 10.0), **arguments)
    assert torch.equal(again.theta, whole.theta)
    assert again.status == "t_end"


def test_ritz_vectors_are_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bdf_cg, "DENSE_LIMIT", 10)
    objective, theta0 = t33()
    whole = integrate(objective, theta0, (0.0, 10.0), method="bdf-cg")
    file = tmp_path / "flow.pt"
    for at in (100, 200):
        cut = Interrupting(t33()[0], at, KeyboardInterrupt)
        assert integrate(cut, theta0, (0.0, 10.0), method="bdf-cg", checkpoint=file).status == "interrupted"
    assert same(integrate(t33()[0], theta0, (0.0, 10.0), method="bdf-cg", checkpoint=file), whole)


def test_interrupted_by_a_callback(tmp_path: Path) -> None:
    """An interruption after a step was taken keeps that step."""
    objective, theta0 = t33()

    def interrupt(report: FlowReport) -> None:
        if report.t > 1.0:
            raise KeyboardInterrupt

    file = tmp_path / "flow.pt"
    cut = integrate(objective, theta0, (0.0, 10.0), method="bdf", progress=interrupt, checkpoint=file)
    assert cut.status == "interrupted"
    assert float(cut.t[-1]) > 1.0
    whole = integrate(t33()[0], theta0, (0.0, 10.0), method="bdf")
    assert same(integrate(t33()[0], theta0, (0.0, 10.0), method="bdf", checkpoint=file), whole)


@pytest.mark.parametrize("method", ["dopri5", "auto", "bdf-secant"])
def test_other_methods_go_on_within_the_tolerance(method: str, tmp_path: Path) -> None:
    _, theta0 = t33()
    file = tmp_path / "flow.pt"
    cut = Interrupting(t33()[0], 60, KeyboardInterrupt)
    assert integrate(cut, theta0, (0.0, 10.0), method=method, checkpoint=file).status == "interrupted"
    solution = integrate(t33()[0], theta0, (0.0, 10.0), method=method, checkpoint=file)
    assert solution.status == "t_end"
    assert errors(solution.theta[-1], reference((10.0,))[0]) < 1e-5


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from torch_gradflow import integrate
from torch_gradflow.flow import integrate as driver
from test_long_flows import t33
driver.CHECKPOINT_SECONDS = 0.02
objective, theta0 = t33()
# Slowly, so that there is time to be killed at any moment.
integrate(objective, theta0, (0.0, 10.0), method={method!r}, checkpoint={file!r}, progress=lambda report: time.sleep(0.01))
"""


@pytest.mark.parametrize("method", ["bdf", "rkc2"])
def test_killed_a_flow_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    """SIGKILL leaves no time to write anything: the last file that was written is whole, and serves."""
    objective, theta0 = t33()
    whole = integrate(objective, theta0, (0.0, 10.0), method=method)
    file = tmp_path / "flow.pt"
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), method=method, file=str(file))
    process = subprocess.Popen([sys.executable, "-c", script])
    began = time.monotonic()
    while not file.exists() and process.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.exists()
    saved = torch.load(file, weights_only=True)
    assert 0 < saved["n_accepted"] < whole.n_accepted
    solution = integrate(t33()[0], theta0, (0.0, 10.0), method=method, checkpoint=file)
    assert same(solution, whole)


def test_checkpoints_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "CHECKPOINT_SECONDS", 0.0)
    written: list[float] = []
    save = driver.save
    monkeypatch.setattr(driver, "save", lambda path, state: (written.append(state["last"][0]), save(path, state)))
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 1.0), method="bdf", checkpoint=tmp_path / "flow.pt")
    assert len(written) == solution.n_accepted
    assert written == sorted(written)
    assert [path.name for path in tmp_path.iterdir()] == ["flow.pt"]


def test_counts_and_bounds_go_on(tmp_path: Path) -> None:
    """What was evaluated before counts, for n_grad and for max_evals."""
    _, theta0 = t33()
    whole = integrate(t33()[0], theta0, (0.0, 100.0), method="bdf", max_evals=80)
    file = tmp_path / "flow.pt"
    integrate(Interrupting(t33()[0], 30, KeyboardInterrupt), theta0, (0.0, 100.0), method="bdf", checkpoint=file)
    solution = integrate(t33()[0], theta0, (0.0, 100.0), method="bdf", max_evals=80, checkpoint=file)
    assert whole.status == solution.status == "max_evals"
    assert abs(solution.n_hessian + solution.n_grad - whole.n_hessian - whole.n_grad) <= 2
    further = integrate(t33()[0], theta0, (0.0, 100.0), method="bdf", max_evals=10_000, checkpoint=file)
    assert further.status == "t_end"
    assert errors(further.theta[-1], reference((100.0,))[0]) < 1e-5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "bdf-cg"}, "its method is 'bdf', not 'bdf-cg'"),
        ({"rtol": 1e-7}, "its tolerances is"),
        ({"t_span": (0.0, 2.0)}, "its t_span is"),
        ({"t_eval": [0.5]}, "its t_eval is"),
        ({"theta0": torch.ones(33, dtype=torch.float64)}, "its theta0 is another one"),
        ({"theta0": t33()[1].float(), "objective": t33(torch.float32)[0]}, "its "),
        ({"objective": FunctionObjective(lambda: (torch.sum,), 33, torch.float64, torch.device("cpu"))}, "another objective"),
        ({"dense_output": True}, "dense_output=True cannot be had"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    objective, theta0 = t33()
    arguments: dict[str, Any] = {"objective": objective, "theta0": theta0, "t_span": (0.0, 1.0), "method": "bdf"}
    file = tmp_path / "flow.pt"
    integrate(**arguments, checkpoint=file)
    kept = file.read_bytes()
    with pytest.raises(ValueError, match=said):
        integrate(**{**arguments, **changed}, checkpoint=file)
    assert file.read_bytes() == kept


@pytest.mark.parametrize("content", [b"", b"nonsense", None, {}, {"version": 1}, [1, 2], {"version": 99, "settings": {}}])
def test_a_file_that_is_no_checkpoint_is_refused(content: Any, tmp_path: Path) -> None:
    objective, theta0 = t33()
    file = tmp_path / "flow.pt"
    if content is None:
        integrate(objective, theta0, (0.0, 1.0), method="bdf", checkpoint=file)
        file.write_bytes(file.read_bytes()[:-200])  # the disk was full
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"flow\.pt.*delete it to start anew"):
        integrate(objective, theta0, (0.0, 1.0), method="bdf", checkpoint=file)


def test_a_directory_that_is_missing_is_noticed_before_anything_is_computed(tmp_path: Path) -> None:
    objective, theta0 = t33()
    with pytest.raises(ValueError, match="no such directory"):
        integrate(objective, theta0, (0.0, 1.0), checkpoint=tmp_path / "missing" / "flow.pt")


# θ at any time


@pytest.mark.parametrize("method", ["auto", "bdf", "bdf-cg", "bdf-secant", "dopri5", "exprb53", "rkc2", "LSODA"])
def test_the_path_is_as_accurate_as_the_steps(method: str) -> None:
    """At accepted points it is they; between them, within the tolerance of the steps."""
    objective, theta0 = t33()
    rtol = 1e-4 if method == "rkc2" else 1e-6
    solution = integrate(objective, theta0, (0.0, 10.0), method=method, rtol=rtol, dense_output=True)
    assert solution.path is not None
    for t, theta in zip(solution.t, solution.theta, strict=True):
        assert torch.allclose(solution.path(float(t)), theta, rtol=1e-12, atol=1e-12)
    times = (1e-6, 1e-3, 0.1, 0.77, 3.1, 9.99)
    found = torch.stack([solution.path(t) for t in times])
    assert float(errors(found, reference(times)).max()) < 30 * rtol
    for t in (-1e-9, 10.1, math.nan):
        with pytest.raises(ValueError, match="within the solution"):
            solution.path(t)


def test_the_path_of_a_flow_that_did_not_move() -> None:
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (2.0, 2.0), dense_output=True)
    assert solution.path is not None
    assert torch.equal(solution.path(2.0), theta0)


def test_samples_are_the_path() -> None:
    objective, theta0 = t33()
    sampled = integrate(objective, theta0, (0.0, 10.0), method="bdf", t_eval=TIMES)
    path = integrate(objective, theta0, (0.0, 10.0), method="bdf", dense_output=True).path
    assert path is not None
    for t, theta in zip(TIMES, sampled.theta, strict=True):
        assert torch.allclose(path(t), theta, rtol=1e-13, atol=1e-13)


# Checks of a solution


@pytest.mark.parametrize(
    ("method", "rtol"), [("bdf", 1e-4), ("bdf", 1e-6), ("bdf-cg", 1e-6), ("auto", 1e-6), ("exprb53", 1e-4)]
)
def test_the_error_estimate_is_close_to_the_error(method: str, rtol: float) -> None:
    objective, theta0 = t33()
    times = (1.0, 3.0, 10.0)
    solution = integrate(objective, theta0, (0.0, 10.0), method=method, rtol=rtol, t_eval=times, estimate_error=True)
    assert solution.global_error is not None
    true = errors(solution.theta, reference(times))
    assert bool((solution.global_error < 3 * true + 1e-9).all())
    assert bool((solution.global_error > true / 3 - 1e-9).all())


def test_the_error_estimate_needs_room_below() -> None:
    """At the floor of rtol a second run would be the same one, and its distance nothing."""
    objective, theta0 = t33(torch.float32)
    with pytest.raises(ValueError, match=r"estimate_error=True .* loosen rtol"):
        integrate(objective, theta0, (0.0, 1.0), method="bdf", rtol=1e-5, estimate_error=True)
    solution = integrate(objective, theta0, (0.0, 1.0), method="bdf", rtol=1e-3, estimate_error=True)
    assert solution.global_error is not None
    assert 0 < float(solution.global_error[-1]) < 1e-2


@pytest.mark.parametrize("method", ["bdf", "bdf-cg", "auto", "dopri5", "exprb53"])
def test_energy_balances(method: str) -> None:
    objective, theta0 = t33()
    solution = integrate(objective, theta0, (0.0, 100.0), method=method, rtol=1e-6)
    assert solution.dissipation_error < (1e-5 if method in ("bdf", "bdf-cg", "exprb53") else 1e-3)


class Wrong(Interrupting):
    """A gradient that is a fifth too large in one component."""

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = super().loss_and_gradient(theta)
        gradient[-1] *= 1.2
        return loss, gradient


def test_energy_does_not_balance_with_a_wrong_gradient() -> None:
    objective, theta0 = t33()
    right = integrate(objective, theta0, (0.0, 10.0), method="dopri5", rtol=1e-7)
    wrong = integrate(Wrong(objective, 10**9, ValueError), theta0, (0.0, 10.0), method="dopri5", rtol=1e-7)
    assert wrong.dissipation_error > 3e-3 > 5 * right.dissipation_error


def test_energy_of_few_or_broken_points() -> None:
    assert dissipation_error([(0.0, 1.0, 2.0)]) == 0.0
    assert dissipation_error([(0.0, 1.0, 0.0), (1.0, 1.0, 0.0)]) == 0.0
    assert dissipation_error([(0.0, 1.0, 0.0), (1.0, 1.0, 3.0)]) == math.inf
    assert math.isnan(dissipation_error([(0.0, 1.0, 0.0), (1.0, math.nan, 3.0)]))
    # L = 1 − t with ‖∇L‖² = 1, with a point twice.
    assert dissipation_error([(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 0.0, 1.0), (2.0, -1.0, 1.0)]) < 1e-2


# Rounding


def line(offset: float, slow: float = 1.0) -> tuple[FunctionObjective, Tensor, Tensor, Tensor]:
    """Squared errors of θ₀ x + θ₁ s x³ to targets, to both of which a number was added that rounding remembers."""
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)
    raised = x.cos() + offset
    inputs = torch.stack([x, slow * x**3])
    objective = FunctionObjective(
        lambda: (lambda theta: 0.5 * (theta @ inputs + offset - raised).square().mean(),),
        2,
        torch.float64,
        torch.device("cpu"),
    )
    return objective, torch.tensor([1.0, -0.5], dtype=torch.float64), inputs, raised


def test_gradient_noise_is_that_of_exact_arithmetic() -> None:
    """Root mean square of the rounding error in a direction, against rational arithmetic."""
    objective, theta, inputs, raised = line(1e6)
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    rows = [[Fraction(v) for v in row] for row in inputs.tolist()]
    targets = [Fraction(v) for v in raised.tolist()]

    def error(point: Tensor) -> float:
        a, b = (Fraction(v) for v in point.tolist())
        residuals = [a * u + b * v + 10**6 - y for u, v, y in zip(*rows, targets, strict=True)]
        exact = [sum(r * v for r, v in zip(residuals, row, strict=True)) / len(targets) for row in rows]
        found = objective.loss_and_gradient(point)[1]
        off = torch.tensor([float(Fraction(f) - e) for f, e in zip(found.tolist(), exact, strict=True)])
        return float(off.double() @ direction)

    generator = torch.Generator().manual_seed(1)
    points = [theta * (1 + 1e-8 * torch.randn(2, generator=generator, dtype=torch.float64)) for _ in range(30)]
    true = float(torch.tensor([error(point) for point in points]).std())
    found = gradient_noise(objective, theta, direction)
    assert true / 4 < found < 4 * true


def test_rounding_of_a_long_flow_is_named() -> None:
    """Along a direction in which the flow is still on its way; where it came to rest errors do not add up."""
    objective, theta, *_ = line(1e6, 1e-5)
    said = integrate(objective, theta, (0.0, 1e10), method="bdf", rtol=1e-8).message
    assert "Rounding errors of the gradient" in said
    assert "more than rtol = 1.0e-08 asks for" in said
    for objective, theta, *_ in (line(0.0, 1e-5), line(1e6)):
        assert "Rounding" not in integrate(objective, theta, (0.0, 1e10), method="bdf", rtol=1e-8).message


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bdf", "bdf-cg", "auto"])
def test_to_the_end_of_time(method: str) -> None:
    """T33 up to t = 1e10: it gets there, in few evaluations, downhill all the way, and two tolerances agree."""
    objective, theta0 = t33()
    times = [1e3, 1e5, 1e7, 1e10]
    one, other = (
        integrate(objective, theta0, (0.0, 1e10), method=method, rtol=rtol, t_eval=times, max_evals=50_000)
        for rtol in (1e-6, 1e-8)
    )
    for solution in (one, other):
        assert solution.status == "t_end"
        assert "Reached the end time, t = 1e+10" in solution.message
        assert bool((solution.loss.diff() <= 0).all())
    assert float(errors(one.theta[:3], other.theta[:3]).max()) < 1e-5
    assert float(errors(one.theta, other.theta).max()) < 1e-3
    assert one.n_hessian < 600
