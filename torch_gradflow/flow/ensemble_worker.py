"""One run of an ensemble, wherever it takes place: in this process, in a thread, in another process, on another machine."""

from __future__ import annotations

import importlib
import math
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_gradflow.flow.integrate import FlowRun
from torch_gradflow.flow.solution import FlowReport, FlowSolution, Status
from torch_gradflow.flow.stopping import StoppingRule
from torch_gradflow.objectives.base import Objective

# L, or what makes it where it is needed.
Problem: TypeAlias = Objective | Callable[[], Objective]


@dataclass(frozen=True)
class Settings:
    """What all runs of an ensemble have in common: the arguments of ``integrate``."""

    t_span: tuple[float, float]
    method: str
    rtol: float | None
    atol: float | None
    t_eval: tuple[float, ...] | None
    stop: StoppingRule | Sequence[StoppingRule] | None
    max_evals: int | None
    step_size: float | None

    def run(self, objective: Objective, start: Tensor, progress: Callable[[FlowReport], Any] | None = None) -> FlowRun:
        """A run, checked and ready to start."""
        return FlowRun(
            objective,
            start,
            self.t_span,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            t_eval=self.t_eval,
            stop=self.stop if self.stop is None or isinstance(self.stop, StoppingRule) else tuple(self.stop),
            max_evals=self.max_evals,
            step_size=self.step_size,
            progress=progress,
        )


@dataclass(frozen=True)
class Outcome:
    """What comes back from a run.

    Attributes:
        solution: Of any status.
        initial_loss: L at the start, NaN if it could not be evaluated.
    """

    solution: FlowSolution
    initial_loss: float


class StopAsked(KeyboardInterrupt):
    """Ends a run at its next accepted point, as Ctrl-C does."""


def follow(
    problem: Problem, start: Tensor, settings: Settings, threads: int, stop_asked: Callable[[], bool], key: str = ""
) -> Outcome:
    """Do one run. What goes wrong becomes a solution of status "failed"; asked to stop, it is "interrupted".

    Args:
        problem: L, or what makes it.
        start: θ(t₀), shape ``(P,)``.
        settings: The rest.
        threads: torch's threads, set for this thread from now on.
        stop_asked: Asked at each accepted point.
        key: What a factory made is kept in this thread for further runs of the same key; "" keeps nothing.
    """
    run: FlowRun | None = None
    initial_loss = math.nan

    def watch(report: FlowReport) -> None:
        if stop_asked():
            raise StopAsked

    try:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        run = settings.run(built(problem, key), start, watch)
        initial_loss = float(run.last.loss)
        run.run()
    except Exception as error:
        if run is not None and run.status == "failed":
            return Outcome(run.solution(), initial_loss)
        return failed_at_once(start, settings, error)
    return Outcome(run.solution(), initial_loss)


def failed_at_once(start: Tensor, settings: Settings, error: Exception) -> Outcome:
    """That of a run that could not begin."""
    why = f"Failed before the first step with {describe(error)}"
    return Outcome(no_solution(start, settings, "failed", why), math.nan)


def no_solution(start: Tensor, settings: Settings, status: Status, message: str) -> FlowSolution:
    """The solution of a run of which nothing is known but its start."""
    unknown = torch.full((1,), math.nan, dtype=torch.float64)
    return FlowSolution(
        t=torch.tensor([float(settings.t_span[0])], dtype=torch.float64),
        theta=start[None].clone(),
        loss=unknown,
        grad_norm=unknown.clone(),
        n_grad=0,
        n_hessian=0,
        n_hvp=0,
        n_accepted=0,
        n_rejected=0,
        status=status,
        message=message,
        method=settings.method,
        step_size=settings.step_size or 0.0,
    )


def describe(error: BaseException) -> str:
    """An exception as a sentence's end."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}."


_here = threading.local()


def built(problem: Problem, key: str) -> Objective:
    """The objective; what a function made is kept in this thread under the key, unless that is ""."""
    if isinstance(problem, Objective):
        return problem
    if key and getattr(_here, "key", "") == key:
        kept: Objective = _here.objective
        return kept
    objective = problem()
    if not isinstance(objective, Objective):
        raise TypeError(f"the factory must return an Objective, not {objective!r}.")
    if key:
        _here.key, _here.objective = key, objective
    return objective


def forget() -> None:
    """Drop what a factory made in this thread."""
    _here.__dict__.clear()


# --- Elsewhere: everything travels as bytes, so that no executor has its own opinion of how tensors are sent. -----------


def dumps(item: Any) -> bytes:
    """Pickled; by cloudpickle where that is installed, which also knows lambdas and what a notebook defines."""
    try:
        pickler: Any = importlib.import_module("cloudpickle")
    except ImportError:
        pickler = pickle
    data: bytes = pickler.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
    return data


# Ensembles (by their keys) whose runs in threads of this process are asked to stop.
stopped: set[str] = set()
# In a worker of our own pool: what all runs share, and whether they are asked to stop.
_shared: bytes | None = None
_event: Any = None


def begin_worker(shared: bytes, event: Any) -> None:
    """Prepare a process of our own pool: Ctrl-C is the calling process's business, which then sets the event."""
    global _shared, _event
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared, _event = shared, event


def run_elsewhere(shared: bytes | None, own: bytes, key: str) -> bytes:
    """One run for an executor.

    Args:
        shared: Pickled problem (None where each run has its own), settings and threads; None where the worker has it.
        own: Pickled start, and problem (None where all share one).
        key: The ensemble's.

    Returns:
        The pickled outcome, or a pickled sentence's end where the run could not even be read: no exception travels, as
        not every exception survives that.
    """
    from_shared = _shared if shared is None else shared

    def stop_asked() -> bool:
        return key in stopped or (_event is not None and bool(_event.is_set()))

    result: Outcome | str
    try:
        problem, settings, threads = pickle.loads(from_shared or b"")
        start, own_problem = pickle.loads(own)
        # What a factory made for one run only is not kept.
        problem, kept = (problem, key) if own_problem is None else (own_problem, "")
        result = follow(problem, start, settings, threads, stop_asked, kept)
    except BaseException as error:  # SystemExit, say, which otherwise would end the calling process
        result = describe(error)
    return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
