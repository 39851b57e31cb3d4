"""Ensembles: the same solutions whoever computes them; failures stay with their runs; what was done once is not done again."""

from __future__ import annotations

import _thread
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from problems import teacher_student
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradflow import (
    Ensemble,
    EnsembleReport,
    FlowSolution,
    GradientFlowWarning,
    GradientNorm,
    LossValue,
    ModuleObjective,
    Objective,
    integrate,
    integrate_many,
)
from torch_gradflow.flow import ensemble
from torch_gradflow.objectives.base import EvaluationCounts

# Fast runs, where accuracy is not the question.
LOOSE: dict[str, Any] = {"method": "dopri5", "rtol": 1e-3}
FIELDS = ("t", "theta", "loss", "grad_norm")


class Valley(Objective):
    """L = ½ Σ λ_i θ_i² + ¼ Σ θ_i⁴; at a start below −5 it misbehaves.

    Args:
        trouble: What it then does: "raise", "raise later" (after 20 gradients), "exit" (ends its process), or nothing.
        pause: Seconds that each gradient takes more.
        curvature: The largest λ.
    """

    def __init__(self, trouble: str = "", pause: float = 0.0, curvature: float = 5.0) -> None:
        self.n_parameters, self.dtype, self.device = 3, torch.float64, torch.device("cpu")
        self.resolution, self.counts = torch.finfo(torch.float64).eps, EvaluationCounts()
        self._values = torch.tensor([0.5, 1.0, curvature], dtype=torch.float64)
        self._trouble, self._pause = trouble, pause
        self._marked = False

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        self._marked = self._marked or bool(theta[0] < -5)
        if self._marked and self._trouble == "exit":
            os._exit(1)
        if self._marked and (self._trouble == "raise" or (self._trouble == "raise later" and self.counts.n_grad > 20)):
            raise ArithmeticError("no value here")
        time.sleep(self._pause)
        return (0.5 * self._values * theta**2 + 0.25 * theta**4).sum(), self._values * theta + theta**3

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        self.counts.n_hvp += vectors.shape[1] if vectors.dim() == 2 else 1
        return self.hessian(theta) @ vectors

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        return torch.diag(self._values + 3 * theta**2)


class Unpicklable(Valley):
    def __reduce__(self) -> tuple[object, ...]:
        raise pickle.PicklingError("never")


def make_valley(curvature: float = 5.0) -> Valley:
    return Valley(curvature=curvature)


def make_nothing() -> str:
    return "nothing"


def starts(n: int = 6) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def troubled(n: int = 6, index: int = 2) -> Tensor:
    """The same starts, one of them in trouble."""
    points = starts(n)
    points[index, 0] = -6.0
    return points


def same(one: FlowSolution, other: FlowSolution) -> bool:
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)
    return equal and (one.status, one.n_grad, one.n_hessian) == (other.status, other.n_grad, other.n_hessian)


def all_same(one: Ensemble | list[FlowSolution], other: Ensemble | list[FlowSolution]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


# --- Whoever computes -------------------------------------------------------------------------------------------------


def test_in_this_process_the_runs_are_those_of_integrate() -> None:
    """Fast runs stay here by themselves; each is what integrate gives, and the objective that was passed is left alone."""
    objective = Valley()
    found = integrate_many(objective, starts(), (0.0, 1.0), method="dopri5", rtol=1e-3, t_eval=[0.5, 1.0])
    alone = [integrate(Valley(), start, (0.0, 1.0), method="dopri5", rtol=1e-3, t_eval=[0.5, 1.0]) for start in starts()]
    assert all_same(found, alone)
    assert found.status == "finished" and "6 't_end'" in found.message and "in this process" in found.message
    assert objective.counts.n_grad == 0
    assert found.best == min(range(6), key=lambda i: float(found[i].loss[-1]))
    assert isinstance(found, Ensemble) and found.failed == () and [s.status for s in found] == ["t_end"] * 6


def test_threads_dask_like_executors_and_this_process_agree_on_networks() -> None:
    """Module objectives, whose compiled kernels have workspaces of their own, run side by side to the same last bit."""
    model, x, y = teacher_student(1, n_samples=100)
    objective = ModuleObjective(model, nn.functional.mse_loss, (x, y))
    first = objective.initial_theta()
    points = [first + 0.1 * i for i in range(6)]
    here = integrate_many(objective, points, (0.0, 5.0), method="bdf", executor="serial")
    with ThreadPoolExecutor(4) as threads:
        there = integrate_many(objective, points, (0.0, 5.0), method="bdf", executor=threads)
    assert all_same(here, there)
    assert "over ThreadPoolExecutor" in there.message


def test_one_objective_per_start_and_factories() -> None:
    """Objects or functions that make them, for all starts or one each; a function for all is called once per worker."""
    curvatures = [1.0, 5.0, 25.0]
    objects = integrate_many([Valley(curvature=c) for c in curvatures], starts(3), (0.0, 1.0), **LOOSE)
    made = integrate_many([partial(make_valley, c) for c in curvatures], list(starts(3)), (0.0, 1.0), **LOOSE)
    assert all_same(objects, made)
    assert objects[2].n_accepted > objects[0].n_accepted
    calls = []

    def factory() -> Valley:
        calls.append(1)
        return Valley()

    shared = integrate_many(factory, starts(), (0.0, 1.0), **LOOSE, executor="serial")
    assert len(calls) == 1
    assert all_same(shared, integrate_many(Valley(), starts(), (0.0, 1.0), **LOOSE, executor="serial"))


def test_long_runs_move_to_processes_and_a_dead_worker_takes_only_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time in this process, the pool takes the rest, with what was given up; it is replaced when a process dies."""
    monkeypatch.setattr(ensemble, "SERIAL_SECONDS", 0.2)
    monkeypatch.setattr(ensemble, "_n_processes", lambda: 2)
    order: list[int] = []
    slow = Valley("exit", pause=0.01)
    found = integrate_many(slow, troubled(6, 5), (0.0, 1.0), on_result=lambda i, _: order.append(i), **LOOSE)
    assert found.failed == (5,) and found[5].message.startswith("Failed: its worker process died.")
    assert found[5].theta[0].tolist() == troubled(6, 5)[5].tolist() and math.isnan(float(found[5].loss[0]))
    assert found.status == "finished" and "5 't_end', 1 'failed'" in found.message
    assert "one after the other in this process; in 2 processes" in found.message
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    here = integrate_many(Valley(), starts()[:5], (0.0, 1.0), executor="serial", **LOOSE)
    assert all_same(here, list(found[:5]))


class FragilePool:
    """Stands for a pool of processes: threads; all that is under way is lost when a run with θ_1 < −5 begins."""

    made: ClassVar[list[FragilePool]] = []

    def __init__(self, n_workers: int, mp_context: object, initializer: object, initargs: tuple[bytes, object]) -> None:
        self._shared, self.most, self._broken = initargs[0], 0, False
        self._flying: set[Future[object]] = set()
        FragilePool.made.append(self)

    def submit(self, function: Callable[..., object], *arguments: object) -> Future[object]:
        future: Future[object] = Future()
        if function is os.getpid:
            future.set_result(0)
            return future
        if self._broken:
            raise BrokenExecutor("gone")
        self._flying.add(future)
        self.most = max(self.most, len(self._flying))
        threading.Thread(target=self._work, args=(future, function, arguments)).start()
        return future

    def _work(self, future: Future[object], function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        time.sleep(0.01)
        if pickle.loads(arguments[1])[0][0] < -5:  # type: ignore[arg-type]
            self._broken = True
            for lost in list(self._flying):
                self._flying.discard(lost)
                lost.set_exception(BrokenExecutor("gone"))
            return
        result = function(self._shared, *arguments[1:])
        if future in self._flying:
            self._flying.discard(future)
            future.set_result(result)

    def shutdown(self, **options: bool) -> None:
        pass


def test_suspects_are_done_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight runs kill their workers: only they fail, whatever was under way beside them."""
    monkeypatch.setattr(ensemble, "_n_processes", lambda: 3)
    monkeypatch.setattr(ensemble, "ProcessPoolExecutor", FragilePool)
    monkeypatch.setattr(FragilePool, "made", [])
    points = torch.cat([starts(), starts()[:2]])
    points[[1, 6], 0] = -6.0
    found = integrate_many(Valley(), points, (0.0, 1.0), executor="processes", **LOOSE)
    assert found.failed == (1, 6) and found.status == "finished"
    here = integrate_many(Valley(), points, (0.0, 1.0), executor="serial", **LOOSE)
    assert all(same(a, b) for i, (a, b) in enumerate(zip(here, found, strict=True)) if i not in (1, 6))
    assert 3 <= len(FragilePool.made) <= 5 and FragilePool.made[0].most == 3


def test_the_choice_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes for one run, on one CPU, or for what cannot be pickled (which is said); the last run is never given up."""
    monkeypatch.setattr(ensemble, "SERIAL_SECONDS", 0.0)
    monkeypatch.setattr(ensemble, "_in_processes", lambda record, or_serially: pytest.fail("processes"))
    assert integrate_many(Valley(pause=0.001), starts(1), (0.0, 1.0), **LOOSE).status == "finished"
    with pytest.warns(GradientFlowWarning, match=r"cannot be pickled \(PicklingError: never\)"):
        assert integrate_many(Unpicklable(), starts(), (0.0, 1.0), **LOOSE).status == "finished"
    with ThreadPoolExecutor(1) as threads, pytest.raises(TypeError, match="cannot be pickled"):
        integrate_many(Unpicklable(), starts(), (0.0, 1.0), executor=threads)
    monkeypatch.setattr(ensemble, "_n_processes", lambda: 1)
    assert integrate_many(Valley(), starts(), (0.0, 1.0), **LOOSE).status == "finished"


@pytest.mark.slow
def test_users_process_pool() -> None:
    """Somebody else's pool works as it is; when it breaks, what it did not finish has failed, and the message says so."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = integrate_many(Valley(), starts(), (0.0, 1.0), **LOOSE, executor=pool)
    assert all_same(found, integrate_many(Valley(), starts(), (0.0, 1.0), **LOOSE))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        broken = integrate_many(Valley("exit"), troubled(), (0.0, 1.0), **LOOSE, executor=pool)
    assert 2 in broken.failed and "call again with a new executor" in broken[2].message


def check_executor(executor: Executor) -> None:
    """It gives what this process gives, with a failure that stays alone."""
    found = integrate_many(Valley("raise"), troubled(), (0.0, 1.0), **LOOSE, executor=executor)
    here = integrate_many(Valley("raise"), troubled(), (0.0, 1.0), **LOOSE, executor="serial")
    assert found.failed == (2,) and "ArithmeticError: no value here" in found[2].message
    assert all(same(a, b) for i, (a, b) in enumerate(zip(here, found, strict=True)) if i != 2)


@pytest.mark.filterwarnings("ignore")  # those of dask and tornado
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dask(processes: bool) -> None:
    """A local cluster of dask.distributed, its workers in this process or in others."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": processes, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        check_executor(client.get_executor())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_loky() -> None:
    loky = pytest.importorskip("loky")
    with loky.ProcessPoolExecutor(1) as executor:
        check_executor(executor)


# --- What goes wrong, and what is kept --------------------------------------------------------------------------------


def test_exceptions_stay_with_their_runs() -> None:
    """At the first point or later, with the points accepted before; a factory's, too; the best is sought among the others."""
    found = integrate_many(Valley("raise later"), troubled(), (0.0, 5.0), **LOOSE)
    assert found.failed == (2,) and found[2].message.startswith("Failed at t = ") and len(found[2].t) > 1
    assert "no value here" in found[2].message and found.best not in (None, 2)
    at_once = integrate_many(Valley("raise"), troubled(), (0.0, 5.0), **LOOSE)
    assert at_once[2].message == "Failed before the first step with ArithmeticError: no value here"
    nothing = integrate_many([make_valley, make_nothing], starts(2), (0.0, 1.0), **LOOSE)
    assert nothing.failed == (1,) and "must return an Objective, not 'nothing'" in nothing[1].message
    far = starts()
    far[1] = 1e200
    assert "not finite at theta0" in integrate_many(Valley(), far, (0.0, 1.0), **LOOSE)[1].message
    assert integrate_many(make_nothing, starts(2), (0.0, 1.0)).best is None


def test_reports_and_results_come_as_they_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[EnsembleReport] = []
    results: dict[int, FlowSolution] = {}
    found = integrate_many(
        Valley("raise"),
        troubled(),
        (0.0, 1.0),
        method="dopri5",
        progress=reports.append,
        on_result=results.__setitem__,
    )
    assert [r.n_done for r in reports] == [1, 2, 3, 4, 5, 6] and [r.n_failed for r in reports] == [0, 0, 1, 1, 1, 1]
    assert all(results[i] is solution for i, solution in enumerate(found))
    assert found.best is not None and reports[-1].best_loss == float(found[found.best].loss[-1])
    integrate_many(Valley("raise"), troubled(), (0.0, 1.0), method="dopri5", progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "1 failed, best loss = " in shown


def test_resume(tmp_path: Path) -> None:
    """Finished runs are loaded, failed ones and new ones done; the result is that of one go."""
    options = {"method": "bdf", "stop": [GradientNorm(1e-9), LossValue(1e-30)], "directory": tmp_path / "runs"}
    first = integrate_many(Valley("raise"), troubled()[:4], (0, 3), **options)
    assert first.failed == (2,) and first.n_loaded == 0
    done: list[int] = []
    again = integrate_many(Valley(), troubled(6), (0.0, 3.0), on_result=lambda i, _: done.append(i), **options)
    assert again.n_loaded == 3 and again.failed == () and done == [0, 1, 3, 2, 4, 5]
    whole = integrate_many(Valley(), troubled(6), (0.0, 3.0), method="bdf", stop=options["stop"])
    assert all_same(again, whole)
    assert [s.message for s in again] == [s.message for s in whole]
    third = integrate_many(Valley(), troubled(6), (0.0, 3.0), **options)
    assert third.n_loaded == 6 and all_same(third, whole) and "all were loaded" in third.message
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [f"run-{i:05d}.pt" for i in range(6)]
    automatic = [integrate_many(Valley(), starts(2), (0.0, 3.0), directory=tmp_path / "auto") for _ in range(2)]
    assert automatic[1].n_loaded == 2 and automatic[0][0].choices and automatic[0][0].choices == automatic[1][0].choices


def test_files_of_other_arguments_are_refused(tmp_path: Path) -> None:
    points = starts(2)
    integrate_many(Valley(), points, (0.0, 1.0), method="dopri5", stop=GradientNorm(1e-3), directory=tmp_path)
    same_again = {"method": "dopri5", "stop": GradientNorm(1e-3), "directory": tmp_path}
    for change, message in (
        ({"rtol": 1e-8}, r"rtol = None there and 1e-08 now"),
        ({"method": "bdf"}, r"method = 'dopri5' there and 'bdf' now"),
        ({"stop": GradientNorm(1e-2)}, r"GradientNorm\(below=0.001\) there and GradientNorm\(below=0.01\) now"),
        ({"t_eval": [0.5]}, r"t_eval = None there and \(0.5\) now"),
    ):
        with pytest.raises(ValueError, match=rf"run-00000.pt is the result of other arguments: .*{message}.* Use another"):
            integrate_many(Valley(), points, (0.0, 1.0), **(same_again | change))
    with pytest.raises(ValueError, match="result of other arguments: start = "):
        integrate_many(Valley(), points + 1e-12, (0.0, 1.0), **same_again)
    with pytest.raises(ValueError, match="result of another objective: the loss at the start was"):
        integrate_many(Valley(curvature=6.0), points, (0.0, 1.0), **same_again)
    (tmp_path / "run-00001.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"run-00001.pt is not a run of an ensemble"):
        integrate_many(Valley(), points, (0.0, 1.0), **same_again)


@pytest.mark.parametrize("n_threads", [0, 2])
def test_ctrl_c_keeps_what_is_finished(n_threads: int, tmp_path: Path) -> None:
    """In this process and in threads: finished runs stay, on disk too, the one under way has its points."""
    points = torch.cat([starts(), -starts()])
    options = {**LOOSE, "directory": tmp_path}
    done: list[int] = []
    executor: Executor | str = ThreadPoolExecutor(n_threads) if n_threads else "serial"

    def note(index: int, solution: FlowSolution) -> None:
        done.append(index)
        if len(done) == 3:
            _thread.interrupt_main()

    found = integrate_many(Valley(pause=0.001), points, (0.0, 1.0), executor=executor, on_result=note, **options)
    if isinstance(executor, Executor):
        executor.shutdown()
    assert found.status == "interrupted" and found.message.startswith("Interrupted by the user")
    statuses = [s.status for s in found]
    assert 3 <= statuses.count("t_end") < 9 and statuses.count("interrupted") == 12 - statuses.count("t_end")
    assert [i for i, status in enumerate(statuses) if status == "t_end"] == sorted(done)
    assert found[11].message == "Interrupted before it began." and torch.equal(found[11].theta[0], points[11])
    again = integrate_many(Valley(), points, (0.0, 1.0), **options)
    assert again.n_loaded == len(done)
    assert all_same(again, integrate_many(Valley(), points, (0.0, 1.0), **LOOSE))


SCRIPT = """
import sys, signal
sys.path.insert(0, {tests!r})
from test_ensemble import Valley, starts
from torch_gradflow import integrate_many

def note(index, solution):
    print("done", index, flush=True)

{guard}
    found = integrate_many(Valley(pause={pause}), starts(), (0.0, 1e9), method="dopri5", max_evals=60, on_result=note,
                           executor="processes")
    print(found.message, flush=True)
"""


def run_script(path: Path, guard: str, pause: float) -> subprocess.Popen[str]:
    text = SCRIPT.format(tests=str(Path(__file__).parent), guard=guard, pause=pause)
    path.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def is_alive_in(process: psutil.Process, group: int) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group
    except (psutil.Error, ProcessLookupError):
        return False


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_worker_processes(tmp_path: Path) -> None:
    """SIGINT to the whole process group, as terminals send it: no traceback, no process left, results kept."""
    process = run_script(tmp_path / "script.py", "if __name__ == '__main__':", 0.03)
    assert process.stdout is not None and process.stdout.readline().startswith("done")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Interrupted by the user: 6 runs, " in out and "'max_evals'" in out, (out, err)
    assert "Traceback" not in err
    deadline = time.perf_counter() + 10  # multiprocessing's own tracker ends a little later
    while left := [p for p in psutil.process_iter() if is_alive_in(p, process.pid)]:
        assert time.perf_counter() < deadline, left
        time.sleep(0.1)


@pytest.mark.slow
def test_a_script_without_guard_is_told(tmp_path: Path) -> None:
    process = run_script(tmp_path / "script.py", "if True:", 0.0)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "RuntimeError: executor='processes': no worker process could start" in err and "__name__ == '__main__'" in err


def test_what_on_result_raises_is_raised() -> None:
    def refuse(index: int, solution: FlowSolution) -> None:
        raise LookupError("not wanted")

    with pytest.raises(LookupError, match="not wanted"):
        integrate_many(Valley(), starts(), (0.0, 1.0), method="dopri5", on_result=refuse)
    with ThreadPoolExecutor(2) as threads, pytest.raises(LookupError, match="not wanted"):
        integrate_many(Valley(), starts(), (0.0, 1.0), method="dopri5", on_result=refuse, executor=threads)


def test_bad_input_is_named_before_anything_starts() -> None:
    objective = Valley()
    points = starts(2)
    for arguments, options, kind, message in (
        ((objective, points[0], (0, 1)), {}, ValueError, r"starts must have the shape \(n, P\)"),
        ((objective, [], (0, 1)), {}, ValueError, "starts is empty"),
        ((objective, 3, (0, 1)), {}, TypeError, "starts must be a tensor of shape"),
        ((objective, [points[0], 1], (0, 1)), {}, TypeError, r"starts\[1\] must be a tensor"),
        ((objective, points * math.nan, (0, 1)), {}, ValueError, r"starts\[0\] must be a vector of finite numbers"),
        ((objective, [points[0], points[1, :2]], (0, 1)), {}, ValueError, r"starts\[1\] does not fit its objective: .*\(3,\)"),
        ((objective, points.float(), (0, 1)), {}, TypeError, r"starts\[0\] does not fit its objective"),
        (([objective], points, (0, 1)), {}, ValueError, "one for each of the 2, not 1"),
        (("L", points, (0, 1)), {}, TypeError, r"objective\[0\] must be an Objective|objective must be one"),
        ((3, points, (0, 1)), {}, TypeError, "objective must be an Objective"),
        ((objective, points, (1, 0)), {}, ValueError, "t_span must be"),
        ((objective, points, (0, math.inf)), {}, ValueError, "needs a stopping rule"),
        ((objective, points, (0, 1)), {"method": "euler?"}, ValueError, "method must be one of"),
        ((objective, points, (0, 1)), {"rtol": 0.0}, ValueError, "rtol must be"),
        ((objective, points, (0, 1)), {"step_size": -1.0}, ValueError, "step_size must be"),
        ((objective, points, (0, 1)), {"threads": 0}, ValueError, "threads must be"),
        ((objective, points, (0, 1)), {"executor": "dask"}, TypeError, r"executor must be .*get_executor\(\)"),
        ((objective, points, (0, 1)), {"on_result": 1}, TypeError, "on_result must be"),
        ((objective, points, (0, 1)), {"progress": 1}, TypeError, "progress must be"),
        ((objective, points, (0, 1)), {"directory": 1}, TypeError, "directory must be a path"),
        ((objective, points, (0, 1)), {"directory": __file__}, ValueError, "directory=.* cannot be made"),
    ):
        with pytest.raises(kind, match=message):
            integrate_many(*arguments, **options)  # type: ignore[arg-type]
    assert objective.counts.n_grad == 0


# --- What travels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "chunks", "loader", "torch.func"])
def test_module_objectives_can_be_pickled(kind: str) -> None:
    """The copy computes the same, and has a model of its own."""
    model, x, y = teacher_student(1, n_samples=60)
    data = DataLoader(TensorDataset(x, y), 20) if kind == "loader" else (x, y)
    objective = ModuleObjective(
        model,
        nn.functional.mse_loss,
        data,
        chunk_size=20 if kind == "chunks" else None,
        engine="torch.func" if kind == "torch.func" else "auto",
    )
    theta = objective.initial_theta()
    copy = pickle.loads(pickle.dumps(objective))
    assert copy.engine == objective.engine
    for found, true in zip(copy.loss_and_gradient(theta), objective.loss_and_gradient(theta), strict=True):
        assert torch.equal(found, true)
    before = objective.counts.n_grad
    copy.loss_and_gradient(theta)
    copy.write(theta + 1)
    assert objective.counts.n_grad == before and torch.equal(objective.initial_theta(), theta)


def test_a_start_travels_without_its_neighbours() -> None:
    runs = ensemble._Runs(Valley(), ensemble._check_starts(torch.zeros(1000, 3, dtype=torch.float64)), None, 1)  # type: ignore[arg-type]
    assert len(runs.own(0)) < 2000
