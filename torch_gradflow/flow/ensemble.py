"""Many flows of one problem: in this process, in a pool of processes, or over any executor, with results as they come."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.flow import ensemble_worker
from torch_gradflow.flow.ensemble_batched import BATCHED, follow_together
from torch_gradflow.flow.ensemble_files import fingerprint, load, make_directory, path_of, save
from torch_gradflow.flow.ensemble_worker import (
    Outcome,
    Problem,
    Settings,
    describe,
    dumps,
    failed_at_once,
    follow,
    no_solution,
    run_elsewhere,
)
from torch_gradflow.flow.integrate import check_arguments, tolerances
from torch_gradflow.flow.methods import find_method
from torch_gradflow.flow.solution import FlowSolution
from torch_gradflow.flow.stopping import StoppingRule
from torch_gradflow.objectives.base import Objective, check_start
from torch_gradflow.objectives.opened import GradientFlowWarning

# Seconds that a pool of processes takes to start (each imports torch and loads the compiled kernels). For as long, runs are
# done one after the other; then a pool takes over if it saves more than that by the mean time of the runs so far.
SERIAL_SECONDS = 5.0
# Seconds in which runs that are asked to stop may reach their next accepted point.
GRACE = 5.0
GUARD = (
    "A script that starts worker processes is imported by them: put what it does under if __name__ == '__main__':, or pass "
    "executor='serial'."
)


@dataclass(frozen=True)
class EnsembleReport:
    """Where a running ensemble stands.

    Attributes:
        n_runs: Runs asked for.
        n_done: Runs that came to an end, failed ones and those that were loaded included.
        n_failed: Runs that failed.
        n_loaded: Runs that were finished before and came from the directory.
        best_loss: The lowest final loss so far, NaN where there is none.
        elapsed: Wall time since the start, in seconds.
    """

    n_runs: int
    n_done: int
    n_failed: int
    n_loaded: int
    best_loss: float
    elapsed: float


@dataclass(frozen=True, eq=False)
class Ensemble(Sequence[FlowSolution]):
    """The solutions of many runs: a sequence in the order of their starts.

    Attributes:
        solutions: One per run. Besides the statuses of ``integrate`` (after which a run counts as finished), a run may have
            "failed" (an exception, or its worker died: see its message; it holds the points accepted before, at least the
            start, whose loss is NaN where it was not evaluated) or be "interrupted" (Ctrl-C; the same).
        status: "finished", or "interrupted" by Ctrl-C.
        message: The same as a sentence, with the number of runs of each status, and how they were done.
        n_loaded: How many came from the directory.
    """

    solutions: tuple[FlowSolution, ...]
    status: Literal["finished", "interrupted"]
    message: str
    n_loaded: int

    def __len__(self) -> int:
        return len(self.solutions)

    def __getitem__(self, index: Any) -> Any:
        return self.solutions[index]

    def __iter__(self) -> Iterator[FlowSolution]:
        return iter(self.solutions)

    @property
    def failed(self) -> tuple[int, ...]:
        """Indices of the runs that failed."""
        return tuple(i for i, solution in enumerate(self.solutions) if solution.status == "failed")

    @property
    def best(self) -> int | None:
        """Index of the lowest final loss among the runs that did not fail; None if there is none."""
        losses = {i: _final_loss(solution) for i, solution in enumerate(self.solutions)}
        finite = {i: loss for i, loss in losses.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None


def integrate_many(
    objective: Problem | Sequence[Problem],
    starts: Tensor | Sequence[Tensor],
    t_span: tuple[float, float],
    *,
    method: str = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    t_eval: Sequence[float] | None = None,
    stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None = None,
    max_evals: int | None = None,
    step_size: float | None = None,
    executor: Executor | Literal["serial", "batched", "processes"] | None = None,
    directory: str | os.PathLike[str] | None = None,
    on_result: Callable[[int, FlowSolution], Any] | None = None,
    progress: bool | Callable[[EnsembleReport], Any] | None = None,
    threads: int = 1,
) -> Ensemble:
    """Follow dθ/dt = −∇L(θ) from many points, or for many objectives, each with its own steps as in ``integrate``.

    What goes wrong in one run, be it an exception or the death of the process that works on it, makes a solution of status
    "failed"; the others go on. Ctrl-C ends the runs that are under way at their next accepted point, and returns what there
    is. Each run works on its own copy of its objective, so that results do not depend on who did what, to the last bit on
    one machine; "auto" alone chooses by measured times, so that its results differ within the tolerance from call to call,
    and runs that are done together round differently.

    Args:
        objective: L, for all starts; or one per start. They are pickled (by cloudpickle where it is installed, which knows
            lambdas and what notebooks define). What should not be pickled, large data say, can be made where it is needed:
            a function without arguments that returns an Objective takes the place of one; each worker calls it once where
            it serves all starts.
        starts: θ(t₀), shape ``(n, P)``, or a sequence of vectors; in the objective's dtype and on its device.
        t_span: (t₀, t₁), as for ``integrate``.
        method: As for ``integrate``.
        rtol: As for ``integrate``.
        atol: As for ``integrate``.
        t_eval: As for ``integrate``.
        stop: As for ``integrate``, for each run. Runs beside others take longer: mind that with ``WallTime``.
        max_evals: As for ``integrate``, for each run.
        step_size: As for ``integrate``.
        executor: None: runs are done one after the other in this process for 5 seconds, which is about what worker
            processes take to start; what then is left goes to a pool with a process per CPU as soon as that would save
            more than 5 seconds by the mean time of the runs so far. No pool if there is only one CPU or one run, if θ is
            not on the CPU (accelerators are not shared), or if the objective cannot be pickled (with a warning).
            "serial": one after the other. "processes": the pool at once, which also outlives a run that kills its process.
            "batched": up to 64 runs at a time in lockstep in this process, with ``method="bdf"`` and one objective for all.
            Each run has its own steps, as many as alone, and the results agree up to rounding; but they share the calls
            around their evaluations, which for small networks take longer than these: with 64 starts of networks with
            17 to 33 parameters on 100 to 1000 samples a run took a sixth to a third of its time alone. Perceptrons in closed
            form and functions that torch.func.vmap can map are evaluated at many points at once. A single run takes longer
            than alone. It is not chosen by itself, as on many CPUs processes are faster for large ensembles.
            Or any ``concurrent.futures.Executor``: threads, dask's ``client.get_executor()``, loky's, MPI's; it is not
            shut down.
        directory: Where each run that came to an end leaves a file as soon as it does. Runs whose files are there are
            loaded instead of done; failed ones are tried again. Written by this process only.
        on_result: Called in this process as ``on_result(index, solution)`` as soon as a run came to an end (in any order;
            those that were loaded first).
        progress: True for a progress bar over the runs, or a function that is given an ``EnsembleReport`` after each.
        threads: torch's threads for each run. More than one may pay for single runs of large networks, and changes the
            results by rounding. Threads of an executor keep this setting.

    Returns:
        The solutions in the order of the starts.

    Raises:
        TypeError, ValueError: For arguments that make no sense, and for files of other arguments in the directory (another
            method, tolerance, start, ... or, where objectives rather than functions are given, another loss at the start),
            before anything is integrated.
        RuntimeError: If worker processes that were asked for cannot start.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(f"integrate_many was called while a worker process imports the main module. {GUARD}")
    check_arguments(t_span, t_eval, stop, max_evals, None)
    find_method(method)
    tolerances(rtol, atol, 0.0)
    if step_size is not None:
        check_number("step_size", step_size, above=0.0)
    check_count("threads", threads)
    points = _check_starts(starts)
    problems = _check_problems(objective, points)
    _check_how(executor, on_result, progress)
    if executor == "batched":
        _check_batched(method, problems)
    times = None if t_eval is None else tuple(float(t) for t in t_eval)
    settings = Settings((t_span[0], t_span[1]), method, rtol, atol, times, stop, max_evals, step_size)
    runs = _Runs(problems, points, settings, threads)
    into = None if directory is None else make_directory(directory)
    loaded = {} if into is None else _loaded(into, runs)
    return _do(runs, executor, _Record(runs, into, on_result, progress), loaded)


# --- What is to be done ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """All runs: one problem for all, or one for each start."""

    problems: Problem | list[Problem]
    starts: list[Tensor]
    settings: Settings
    threads: int

    def problem(self, index: int) -> Problem:
        return self.problems[index] if isinstance(self.problems, list) else self.problems

    def shared(self) -> bytes:
        """What goes to each worker."""
        return dumps((None if isinstance(self.problems, list) else self.problems, self.settings, self.threads))

    def own(self, index: int) -> bytes:
        """What goes with each run."""
        return dumps((self.starts[index], self.problems[index] if isinstance(self.problems, list) else None))


def _check_starts(starts: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(starts, Tensor) and starts.dim() != 2:
        raise ValueError(f"starts must have the shape (n, P), one row per run, not {tuple(starts.shape)}.")
    if not isinstance(starts, Tensor | Sequence):
        raise TypeError(f"starts must be a tensor of shape (n, P) or a sequence of vectors, not {starts!r}.")
    if not len(starts):
        raise ValueError("starts is empty; give at least one start.")
    for i, start in enumerate(starts):
        if not isinstance(start, Tensor):
            raise TypeError(f"starts[{i}] must be a tensor, not {start!r}.")
        if start.dim() != 1 or not bool(torch.isfinite(start).all()):
            raise ValueError(f"starts[{i}] must be a vector of finite numbers, not of shape {tuple(start.shape)}: {start}.")
    return [start.detach().clone() for start in starts]  # a row's clone is pickled without the other rows


def _check_problems(given: Problem | Sequence[Problem], starts: list[Tensor]) -> Problem | list[Problem]:
    several = isinstance(given, Sequence)
    problems: list[Problem] = list(given) if isinstance(given, Sequence) else [given]
    for i, problem in enumerate(problems):
        if not isinstance(problem, Objective) and not callable(problem):
            raise TypeError(
                f"{f'objective[{i}]' if several else 'objective'} must be an Objective, for instance a ModuleObjective, or a "
                f"function without arguments that returns one, not {problem!r}."
            )
    if several and len(problems) != len(starts):
        raise ValueError(f"objective must be one for all starts, or one for each of the {len(starts)}, not {len(problems)}.")
    for i, start in enumerate(starts):
        problem = problems[i if several else 0]
        if isinstance(problem, Objective):
            try:
                check_start(problem, start)
            except (TypeError, ValueError) as error:
                raise type(error)(f"starts[{i}] does not fit its objective: {error}") from None
    return problems if several else problems[0]


def _check_how(executor: object, on_result: object, progress: object) -> None:
    if not (executor is None or isinstance(executor, Executor) or executor in ("serial", "batched", "processes")):
        raise TypeError(
            f"executor must be None, 'serial', 'batched', 'processes' or a concurrent.futures.Executor, not {executor!r}; "
            "for dask pass client.get_executor()."
        )
    if on_result is not None and not callable(on_result):
        raise TypeError(f"on_result must be a function of an index and a FlowSolution, not {on_result!r}.")
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be True, False or a function of an EnsembleReport, not {progress!r}.")


def _check_batched(method: str, problems: Problem | list[Problem]) -> None:
    if method not in BATCHED:
        known = " or ".join(f"method={name!r}" for name in BATCHED)
        raise ValueError(
            f"executor='batched' takes the steps of all runs together, which method={method!r} cannot: pass {known}, or "
            "executor='serial'."
        )
    if isinstance(problems, list):
        raise ValueError(
            f"executor='batched' needs one objective for all starts, and objective is a sequence of {len(problems)}: pass "
            "one, or executor='serial'."
        )


def _loaded(directory: Path, runs: _Runs) -> dict[int, Outcome]:
    """What the directory holds, refused where it is not of these runs."""
    found = {}
    for i, start in enumerate(runs.starts):
        outcome = load(directory, i, fingerprint(runs.settings, start), start.device)
        if outcome is None:
            continue
        problem = runs.problem(i)
        if isinstance(problem, Objective):
            loss = float(problem.loss_and_gradient(start)[0])
            if not math.isclose(loss, outcome.initial_loss, rel_tol=problem.resolution**0.5, abs_tol=problem.resolution):
                raise ValueError(
                    f"{path_of(directory, i)} is the result of another objective: the loss at the start was "
                    f"{outcome.initial_loss:.8g} there and is {loss:.8g} now. Use another directory, or delete that file."
                )
        found[i] = outcome
    return found


# --- What came of it ------------------------------------------------------------------------------------------------------


class _Record:
    """Outcomes, with everyone told: directory, callback, display."""

    def __init__(
        self,
        runs: _Runs,
        directory: Path | None,
        on_result: Callable[[int, FlowSolution], Any] | None,
        progress: bool | Callable[[EnsembleReport], Any] | None,
    ) -> None:
        self.runs = runs
        self.solutions: dict[int, FlowSolution] = {}
        self.ways: list[str] = []
        self.interrupted = False
        self._directory, self._on_result = directory, on_result
        self._show = progress if callable(progress) else None
        self._bar = tqdm(total=len(runs.starts), desc="ensemble", unit="run") if progress is True else None
        self._n_loaded, self._n_failed, self._best = 0, 0, math.nan
        self._began = time.perf_counter()

    @property
    def left(self) -> list[int]:
        """Runs that have no outcome yet."""
        return [i for i in range(len(self.runs.starts)) if i not in self.solutions]

    def add(self, index: int, outcome: Outcome, *, loaded: bool = False) -> None:
        """An outcome; that of an interrupted run is kept, but not as finished."""
        solution = outcome.solution
        self.solutions[index] = solution
        if solution.status == "interrupted":
            self.interrupted = True
            return
        if self._directory is not None and not loaded:
            save(self._directory, index, outcome, fingerprint(self.runs.settings, self.runs.starts[index]))
        self._n_loaded += loaded
        self._n_failed += solution.status == "failed"
        self._best = min((x for x in (self._best, _final_loss(solution)) if not math.isnan(x)), default=math.nan)
        if self._on_result is not None:
            self._on_result(index, solution)
        self._tell()

    def fail(self, index: int, why: str) -> None:
        """A run that left nothing but a reason."""
        solution = no_solution(self.runs.starts[index], self.runs.settings, "failed", why)
        self.add(index, Outcome(solution, math.nan))

    def _tell(self) -> None:
        report = EnsembleReport(
            n_runs=len(self.runs.starts),
            n_done=len(self.solutions),
            n_failed=self._n_failed,
            n_loaded=self._n_loaded,
            best_loss=self._best,
            elapsed=time.perf_counter() - self._began,
        )
        if self._show is not None:
            self._show(report)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{report.n_failed} failed, best loss = {report.best_loss:.4e}", refresh=False)
            self._bar.update(report.n_done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def ensemble(self) -> Ensemble:
        """All solutions; of runs that did not begin, their starts."""
        runs = self.runs
        for i in self.left:
            self.solutions[i] = no_solution(runs.starts[i], runs.settings, "interrupted", "Interrupted before it began.")
        solutions = tuple(self.solutions[i] for i in range(len(runs.starts)))
        statuses = [solution.status for solution in solutions]
        counted = ", ".join(f"{statuses.count(status)} {status!r}" for status in dict.fromkeys(statuses))
        ways = "; ".join(dict.fromkeys(self.ways)) if self.ways else "all were loaded"
        end = "Interrupted by the user" if self.interrupted else "Finished"
        return Ensemble(
            solutions,
            "interrupted" if self.interrupted else "finished",
            f"{end}: {len(solutions)} runs, {counted} ({ways}).",
            self._n_loaded,
        )


def _final_loss(solution: FlowSolution) -> float:
    return math.nan if solution.status == "failed" else float(solution.loss[-1])


# --- How it is done -------------------------------------------------------------------------------------------------------


def _do(runs: _Runs, executor: Executor | str | None, record: _Record, loaded: dict[int, Outcome]) -> Ensemble:
    n_threads = torch.get_num_threads()
    try:
        for index, outcome in loaded.items():
            record.add(index, outcome, loaded=True)
        if isinstance(executor, Executor):
            _over(executor, record)
        elif executor == "processes":
            _in_processes(record)
        elif executor == "batched":
            _together(record)
        elif executor == "serial" or not _may_use_processes(record):
            _serially(record)
        else:
            _serially(record, SERIAL_SECONDS)
            _in_processes(record, or_serially=True)
    except KeyboardInterrupt:
        record.interrupted = True
    finally:
        ensemble_worker.forget()
        torch.set_num_threads(n_threads)
        record.close()
    return record.ensemble()


def _n_processes() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _may_use_processes(record: _Record) -> bool:
    """Whether a pool of processes would help."""
    runs = record.runs
    inside = multiprocessing.parent_process() is not None  # this already is a worker beside others
    if len(record.left) < 2 or _n_processes() < 2 or inside or any(start.device.type != "cpu" for start in runs.starts):
        return False
    try:
        _ = runs.shared(), [runs.own(i) for i in record.left[:1]]
    except Exception as error:
        warnings.warn(
            f"The objective cannot be pickled ({describe(error)}), so that all runs are done one after the other in this "
            "process. Install cloudpickle, pass a function that returns the objective, or executor='serial'.",
            GradientFlowWarning,
            stacklevel=4,
        )
        return False
    return True


def _serially(record: _Record, seconds: float = math.inf) -> None:
    """One run after the other; the one that is under way when a pool would save more than ``seconds`` is given up."""
    runs, key, began = record.runs, uuid.uuid4().hex, time.perf_counter()
    left = record.left
    if left:
        record.ways.append("one after the other in this process")
    for done, index in enumerate(left):
        n_left = len(left) - done

        def over(done: int = done, n_left: int = n_left) -> bool:
            elapsed = time.perf_counter() - began
            expected = n_left * elapsed / max(done, 1)
            return n_left > 1 and elapsed > seconds and expected * (1 - 1 / _n_processes()) > seconds

        outcome = follow(*_copied(runs, index), runs.settings, runs.threads, over, _key(runs, key))
        if outcome.solution.status == "interrupted" and over():
            return
        record.add(index, outcome)
        if record.interrupted:
            return


def _together(record: _Record) -> None:
    """All runs in lockstep, so that they share the calls that each of their steps takes."""
    runs, left = record.runs, record.left
    if not left:
        return
    record.ways.append("together in this process")
    torch.set_num_threads(runs.threads)
    try:
        objective = ensemble_worker.built(_copied(runs, left[0])[0], "")
    except Exception as error:  # of a factory
        for index in left:
            record.add(index, failed_at_once(runs.starts[index], runs.settings, error))
        return
    if not follow_together(objective, [(i, runs.starts[i]) for i in left], runs.settings, record.add):
        record.interrupted = True


def _key(runs: _Runs, key: str) -> str:
    """Under which what a factory makes is kept: not if it is for one run only."""
    return "" if isinstance(runs.problems, list) else key


def _copied(runs: _Runs, index: int) -> tuple[Problem, Tensor]:
    """A run's own objective, as one that was sent elsewhere would be; the given one if it cannot be pickled."""
    problem = runs.problem(index)
    if isinstance(problem, Objective):
        try:
            problem = pickle.loads(dumps(problem))
        except Exception:  # whatever classes raise that do not want to be copied
            return problem, runs.starts[index]
    return problem, runs.starts[index]


def _add_bytes(record: _Record, index: int, data: bytes) -> None:
    result = pickle.loads(data)
    if isinstance(result, Outcome):
        record.add(index, result)
    else:
        record.fail(index, f"Failed: its worker could not read it ({result}). What it uses must be importable there.")


def _add_future(record: _Record, index: int, future: Future[bytes]) -> None:
    """The outcome of a future that is done, of whatever kind, but for one whose executor broke (raised)."""
    error = future.exception() if not future.cancelled() else None
    if isinstance(error, BrokenExecutor):
        raise error
    if future.cancelled() or error is not None:
        why = "it was cancelled." if error is None else describe(error)
        record.fail(index, f"Failed: the executor gave no result, {why}")
        return
    _add_bytes(record, index, future.result())


def _over(executor: Executor, record: _Record) -> None:
    """All runs over somebody's executor."""
    runs, key = record.runs, uuid.uuid4().hex
    record.ways.append(f"over {type(executor).__name__}")
    try:
        shared = runs.shared()
    except Exception as error:
        raise TypeError(
            f"objective cannot be pickled ({describe(error)}); install cloudpickle, pass a function that returns it, or "
            "executor='serial'."
        ) from error
    flying: dict[Future[bytes], int] = {}
    with _stopping(flying, record, lambda: ensemble_worker.stopped.add(key)):
        for index in record.left:
            flying[executor.submit(run_elsewhere, shared, runs.own(index), key)] = index
        for future in as_completed(list(flying)):
            index = flying.pop(future)
            try:
                _add_future(record, index, future)
            except BrokenExecutor as error:
                record.fail(
                    index,
                    f"Failed: the executor broke, perhaps in another run ({describe(error)}). To go on, call again with a "
                    "new executor and the same directory.",
                )


@contextmanager
def _stopping(flying: dict[Future[bytes], int], record: _Record, ask: Callable[[], Any]) -> Iterator[None]:
    """On Ctrl-C or any other exception cancel what has not begun and ask the rest to stop; on Ctrl-C keep what comes back."""
    try:
        yield
    except BaseException as error:
        ask()
        begun = [future for future in flying if not future.cancel()]
        if isinstance(error, KeyboardInterrupt):
            record.interrupted = True
            for future in wait(begun, timeout=GRACE).done:
                if _has_result(future):
                    _add_bytes(record, flying[future], future.result())
        raise


def _in_processes(record: _Record, or_serially: bool = False) -> None:
    """All runs in a pool of processes of our own, which is replaced when a process dies.

    Which run killed it is not known: all that were under way are suspects, and each of them is then done alone.

    Args:
        record: What there is to do.
        or_serially: If no worker process can start, warn and do the runs in this process.
    """
    left = [] if record.interrupted else record.left
    if not left:
        return
    try:
        shared = record.runs.shared()
    except Exception as error:
        raise TypeError(
            f"objective cannot be pickled ({describe(error)}); install cloudpickle, pass a function that returns it, or "
            "executor='serial'."
        ) from error
    queue = _Queue(deque(left))
    n_workers = min(_n_processes(), len(left))
    has_started = False
    while queue:
        with _Pool(n_workers, shared) as pool:
            try:
                pool.drive(record, queue, has_started)
            except BrokenExecutor:
                has_started = has_started or pool.has_started
                if has_started:
                    continue
            else:
                continue
        why = f"no worker process could start, or each ended at once. {GUARD}"
        if not or_serially:
            raise RuntimeError(f"executor='processes': {why}")
        warnings.warn(f"Runs are done one after the other: {why}", GradientFlowWarning, stacklevel=4)
        _serially(record)
        return
    record.ways.append(f"in {n_workers} processes")


class _Queue:
    """Runs that wait for a worker; suspects, of which one killed its worker, come first, and each has the pool for itself."""

    def __init__(self, waiting: deque[int]) -> None:
        self._waiting = waiting
        self._suspects: deque[int] = deque()
        self._suspected: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._suspects)

    def suspect(self, indices: Iterable[int]) -> None:
        """These were under way when a worker died."""
        self._suspects.extend(indices)
        self._suspected.update(self._suspects)

    def next(self, under_way: Iterable[int], n_workers: int) -> deque[int] | None:
        """The queue whose first one may begin now, or None."""
        busy = list(under_way)
        if self._suspects:
            return None if busy else self._suspects
        alone = any(index in self._suspected for index in busy)
        return self._waiting if self._waiting and len(busy) < n_workers and not alone else None


class _Pool:
    """A pool of worker processes that can be asked to stop.

    Args:
        n_workers: Processes, started as they are needed.
        shared: What each is given once.
    """

    def __init__(self, n_workers: int, shared: bytes) -> None:
        # Spawned, as torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._event = context.Event()
        self._n_workers = n_workers
        self._pool = ProcessPoolExecutor(
            n_workers, mp_context=context, initializer=ensemble_worker.begin_worker, initargs=(shared, self._event)
        )
        self._hello = self._submit(os.getpid)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        processes = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:  # those that did not come to their next point in time
            for process in processes:
                process.terminate()

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Submit, which may start a process; it inherits that Ctrl-C is held, and so sees none while it imports either."""
        if not hasattr(signal, "pthread_sigmask"):
            return self._pool.submit(function, *arguments)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def has_started(self) -> bool:
        """Whether a worker ever answered."""
        return _has_result(self._hello)

    def drive(self, record: _Record, queue: _Queue, can_start: bool) -> None:
        """Do all runs, no more at once than there are workers.

        Args:
            record: Where outcomes go.
            queue: What is to be done.
            can_start: Whether workers are known to start here.

        Raises:
            BrokenExecutor: If a worker died. What was under way then is among the suspects, or has failed if it was alone.
        """
        flying: dict[Future[bytes], int] = {}
        with _stopping(flying, record, self._event.set):
            try:
                while queue or flying:
                    while (line := queue.next(flying.values(), self._n_workers)) is not None:
                        future = self._submit(run_elsewhere, None, record.runs.own(line[0]), "ensemble")
                        flying[future] = line.popleft()  # afterwards: a pool that broke takes nothing more
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        _add_future(record, flying[future], future)
                        del flying[future]
            except BrokenExecutor:
                lost = [index for future, index in flying.items() if not _add_if_there(record, index, future)]
                flying.clear()
                if len(lost) == 1 and (can_start or self.has_started):
                    record.fail(lost[0], "Failed: its worker process died. It may have run out of memory, or crashed.")
                else:
                    queue.suspect(lost)
                raise


def _has_result(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _add_if_there(record: _Record, index: int, future: Future[bytes]) -> bool:
    """The outcome that a worker sent before the pool broke."""
    if _has_result(future):
        _add_bytes(record, index, future.result())
    return _has_result(future)
