"""The driver of a long integration: method, stopping rules, sampling, progress, interruption → FlowSolution."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.flow.checkpoint import load, pack_knot, pack_memory, save, unpack_knot, unpack_memory
from torch_gradflow.flow.continuation import point_between, replace_gradient
from torch_gradflow.flow.dense import FlowPath, HermiteWindow, path_through
from torch_gradflow.flow.energy import dissipation_error
from torch_gradflow.flow.method import Arrival, FlowMethod, Interpolant, Memory, RunEnd, Span, n_evaluations
from torch_gradflow.flow.methods import find_method
from torch_gradflow.flow.progress import Progress, as_progress, check_progress
from torch_gradflow.flow.rounding import rounding_note
from torch_gradflow.flow.solution import Choice, FlowReport, FlowSolution, Knot, Sample, Status
from torch_gradflow.flow.stopping import StoppingRule, begin_all
from torch_gradflow.objectives.base import EvaluationCounts, Objective, check_start

# Accepted points kept per decade of flow time where t_eval does not say otherwise.
SAMPLES_PER_DECADE = 20
# How often a checkpoint is written.
CHECKPOINT_SECONDS = 30.0


def tolerances(rtol: float | None, atol: float | None, resolution: float) -> tuple[float, float, str]:
    """Relative and absolute tolerance, and a warning or "".

    ``rtol=None`` is 1e-6 in float64 and 1e-4 in float32, ``atol=None`` is rtol/100. A local error far below the rounding
    of a gradient cannot be seen, so rtol has a floor of 1e-13 in float64, 1e-5 in float32, and 1e-2 below.

    Args:
        rtol: As the user gave it.
        atol: As the user gave it.
        resolution: Rounding unit of the gradients.

    Raises:
        ValueError: If one is negative, rtol is zero, or not a number.
    """
    floor = 1e-13 if resolution < 1e-12 else 1e-5 if resolution < 1e-6 else 1e-2
    default = 1e-6 if resolution < 1e-12 else max(1e-4, floor)
    rtol_given = default if rtol is None else check_number("rtol", rtol, above=0.0, below=1.0)
    used = max(rtol_given, floor)
    atol_used = used / 100 if atol is None else check_number("atol", atol, least=0.0)
    warning = (
        f"rtol={rtol_given:g} is below what gradients with a rounding unit of {resolution:.0e} resolve; {floor:g} is used. "
        "Use a float64 model or dtype=torch.float64 for tighter tolerances."
        if used != rtol_given
        else ""
    )
    return used, atol_used, warning


def integrate(
    objective: Objective,
    theta0: Tensor,
    t_span: tuple[float, float],
    *,
    method: str = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    t_eval: Sequence[float] | None = None,
    stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None = None,
    max_evals: int | None = None,
    step_size: float | None = None,
    progress: bool | Callable[[FlowReport], Any] | Progress | None = None,
    dense_output: bool = False,
    estimate_error: bool = False,
    checkpoint: str | Path | None = None,
) -> FlowSolution:
    """Follow dθ/dt = −∇L(θ) from θ(t₀) = ``theta0`` to t₁, in the manner of ``scipy.integrate.solve_ivp``.

    Args:
        objective: L(θ).
        theta0: θ(t₀), shape ``(P,)``, in the objective's dtype and on its device.
        t_span: (t₀, t₁); t₁ may be ``inf`` if a stopping rule ends the flow.
        method: "auto" or the name of an integrator.
        rtol: Relative tolerance of the local error; None for 1e-6 (float64) or 1e-4 (float32).
        atol: Absolute tolerance; None for rtol/100.
        t_eval: Times at which to sample, ascending, within the span; values between steps are interpolated to the
            method's accuracy, with one gradient each for loss and gradient norm. None keeps about 20 accepted points per
            decade of flow time, the first and the last.
        stop: Rules that end the flow earlier, asked at each accepted point.
        max_evals: Bound on gradient evaluations (status "max_evals"); None for none.
        step_size: The first step size; None chooses it.
        progress: True for a progress bar, or a function that is given a ``FlowReport`` at each accepted point.
        dense_output: Keep all accepted points, so that ``solution.path(t)`` is θ at any time.
        estimate_error: Integrate once more with a tenth of the tolerances, for ``solution.global_error``.
        checkpoint: A file from which an interrupted or killed integration goes on when called again with the same arguments.
            It is written every half minute, and at the end. Methods of our own go on bit for bit (except that "auto"
            chooses by what it measures), torchdiffeq's up to rounding.

    Returns:
        The solution up to where it came. Ctrl-C ends the integration with status "interrupted".

    Raises:
        ValueError, TypeError: For arguments that make no sense.
        FloatingPointError: If loss or gradient are not finite at ``theta0``.
    """
    run = FlowRun(
        objective,
        theta0,
        t_span,
        method=method,
        rtol=rtol,
        atol=atol,
        t_eval=t_eval,
        stop=stop,
        max_evals=max_evals,
        step_size=step_size,
        progress=progress,
        dense_output=dense_output,
        checkpoint=checkpoint,
    )
    if estimate_error:
        _check_room(run.tolerances[0], objective.resolution)
    run.run()
    solution = run.solution()
    return _with_error(objective, theta0, t_span, method, run, solution) if estimate_error else solution


def _check_room(rtol: float, resolution: float) -> None:
    """Raise ValueError if there are no tighter tolerances with which to compare."""
    least = tolerances(rtol / 10, None, resolution)[0]
    if least > 0.5 * rtol:
        raise ValueError(
            f"estimate_error=True compares with a run at a tenth of rtol={rtol:g}, but gradients with a rounding unit of "
            f"{resolution:.0e} resolve no less than {least:g}: loosen rtol, or use torch.float64."
        )


def _with_error(
    objective: Objective, theta0: Tensor, t_span: tuple[float, float], method: str, run: FlowRun, solution: FlowSolution
) -> FlowSolution:
    """The solution with its distance from one with a tenth of the tolerances."""
    rtol, atol = run.tolerances
    end = float(solution.t[-1])
    if end == t_span[0]:
        return replace(solution, global_error=torch.zeros(1, dtype=torch.float64))
    times = [float(t) for t in solution.t]
    better = integrate(
        objective, theta0, (t_span[0], end), method=method, rtol=max(rtol / 10, 1e-13), atol=atol / 10, t_eval=times
    )
    if len(better.t) < len(solution.t):
        raise FloatingPointError(f"A run with a tenth of the tolerances did not come as far, for the error. {better.message}")
    error = (solution.theta - better.theta).norm(dim=1) / better.theta.norm(dim=1)
    return replace(solution, global_error=error.to("cpu", torch.float64))


# What an accepted point changes in a ``FlowRun``, besides the lists that grow.
_CHANGING = (
    "last",
    "_before_last",
    "_last_step",
    "_last_order",
    "_approximate",
    "_end",
    "_step_size",
    "_memory",
    "_n_accepted",
    "_recent",
    "_between_steps",
    "_next_eval",
    "_next_sample",
)
_changing = attrgetter(*_CHANGING)


class FlowRun:
    """One integration: ``run`` it, then ask for its ``solution``, which is usable also after an exception.

    Args: As for ``integrate``; in addition
        start: Loss and gradient at ``theta0`` where they are known.
        scale: Positive factors s of shape ``(P,)``: the objective's coordinates are φ = θ/s. Samples and gradient norms
            are reported for θ.
    """

    def __init__(
        self,
        objective: Objective,
        theta0: Tensor,
        t_span: tuple[float, float],
        *,
        method: str = "auto",
        rtol: float | None = None,
        atol: float | None = None,
        t_eval: Sequence[float] | None = None,
        stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None = None,
        max_evals: int | None = None,
        step_size: float | None = None,
        progress: bool | Callable[[FlowReport], Any] | Progress | None = None,
        start: tuple[Tensor, Tensor] | None = None,
        scale: Tensor | None = None,
        dense_output: bool = False,
        checkpoint: str | Path | None = None,
    ) -> None:
        self._began = time.perf_counter()
        check_start(objective, theta0)
        check_arguments(t_span, t_eval, stop, max_evals, progress)
        if step_size is not None:
            check_number("step_size", step_size, above=0.0)
        self._t0, self._t_end = _check_span(t_span)
        self.method: FlowMethod = find_method(method)
        self._rtol, self._atol, self.warning = tolerances(rtol, atol, objective.resolution)
        self._t_eval = _check_t_eval(t_eval, self._t0, self._t_end)
        self._stop_check = begin_all(stop)
        self._max_evals: float = math.inf if max_evals is None else max_evals
        self._step_size = step_size
        self._progress = as_progress(progress, self._t_end)
        # Reports cost as much as a small network's gradient: none is made where nobody reads them.
        self._watched = bool(stop) or (progress is not None and progress is not False)
        self._objective = objective
        self._scale = scale
        counts = objective.counts
        self._counted_before = replace(counts)
        loss, gradient = objective.loss_and_gradient(theta0) if start is None else start
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
            raise FloatingPointError(f"loss {float(loss)} or its gradient is not finite at theta0; start elsewhere.")
        first = Knot(self._t0, theta0.detach().clone(), loss, gradient)
        self.last = first
        self._before_last = first
        self._last_step, self._last_order = math.nan, 0
        self._approximate = False
        # The last accepted points that interpolate by their slopes, each with whether its slope is approximate, and the order
        # of the step that led to it.
        self._recent: list[tuple[Knot, bool, int]] = [(first, False, 0)]
        self._between_steps = self.method
        self._energy: list[tuple[float, float, float]] = []
        self._note_energy(first)
        self._samples: list[Sample] = []
        self._next_eval = 0
        self._next_sample = -math.inf
        self._stopped_by = ""
        self._n_accepted = 0
        self._end: RunEnd | None = None
        self._memory: Memory | None = None
        self._n_earlier = 0
        self._knots = [first] if dense_output else None
        self._interpolants: list[Interpolant | None] = []
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        if self._checkpoint is not None and not self._checkpoint.parent.is_dir():
            raise ValueError(f"checkpoint={str(checkpoint)!r} cannot be written: there is no such directory.")
        self._saved_at = self._began
        self._settings = {
            "method": method,
            "t_span": [self._t0, self._t_end],
            "tolerances": [self._rtol, self._atol],
            "t_eval": self._t_eval,
            "theta0": first.theta.cpu(),
        }
        self.status: Status = "interrupted"
        self.message = "Interrupted before the first step."
        if self._t_eval is None:
            self._keep(first, False)
        if self._checkpoint is not None and self._checkpoint.exists():
            self._restore(load(self._checkpoint, self._settings))

    @property
    def tolerances(self) -> tuple[float, float]:
        """Relative and absolute tolerance, as used."""
        return self._rtol, self._atol

    def run(self) -> None:
        """Integrate; KeyboardInterrupt ends it, any other exception is raised after the state was made consistent."""
        try:
            if self.begin():
                self.end(self._integrate())
        except KeyboardInterrupt:
            self.interrupt()
        except Exception as error:
            self.fail(error)
            raise
        finally:
            self._progress.close(self.message)

    # What ``run`` consists of; whoever takes the steps of many runs together calls these.

    def begin(self) -> bool:
        """Whether there is anything to do: the stopping rules are asked at the start."""
        reason = self._stop_check(self._report(self.last, self._step_size or 0.0))
        if reason is not None:
            self.status, self.message = "stopped", reason
        return reason is None

    def end(self, end: RunEnd) -> None:
        """The run came to an end."""
        with _Wholly(self):
            if end.knot.t > self.last.t:
                self._before_last = self.last
                self._last_step, self._last_order = end.knot.t - self.last.t, end.order
            self.last = replace_gradient(end.knot, self._objective) if end.approximate else end.knot
            self._approximate = False
            self._end, self._step_size, self._memory = end, end.step_size, end.memory
            self._n_accepted = self._n_earlier + end.n_accepted
            self._note_energy(self.last)
            self._note_path(self.last, end.interpolant)
            self._sample_end()
        self.status, self.message = self._describe(end)
        self._save()
        elapsed, move = self.last.t - self._t0, self.last.theta - self._before_last.theta
        note = rounding_note(self._objective, self.last.theta, move, elapsed, self._rtol)
        self.message = f"{self.message} {note}".rstrip()

    def interrupt(self) -> None:
        """The user wants it to end at the last accepted point."""
        self._save()
        self.status = "interrupted"
        self.message = f"Interrupted by the user at t = {self.last.t:.6g}; this is the last accepted point."
        self._sample_end()

    def fail(self, error: Exception) -> None:
        """The objective raised an exception."""
        self._save()
        self.status = "failed"
        self.message = (
            f"Failed at t = {self.last.t:.6g} with {type(error).__name__}: {error}. This is the last accepted point."
        )

    def solution(self) -> FlowSolution:
        """What has been sampled so far, with the last accepted point."""
        samples = self._samples
        if not samples or (self._t_eval is None and samples[-1].knot.t != self.last.t):
            samples = [*samples, self._sampled(self.last, self._last_step, self._last_order)]
        knots = [sample.knot for sample in samples]
        n_grad, n_hvp, n_hessian = self._evaluations()
        return FlowSolution(
            t=torch.tensor([knot.t for knot in knots], dtype=torch.float64),
            theta=torch.stack([self._to_theta(knot.theta) for knot in knots]),
            loss=torch.stack([knot.loss for knot in knots]).to("cpu", torch.float64),
            grad_norm=self._grad_norms(torch.stack([knot.gradient for knot in knots])).to("cpu", torch.float64),
            n_grad=n_grad,
            n_hessian=n_hessian,
            n_hvp=n_hvp,
            n_accepted=self._n_accepted,
            n_rejected=0 if self._end is None else self._end.n_rejected,
            status=self.status,
            message=self.message,
            method=self.method.name,
            step_size=self._step_size or 0.0,
            dissipation_error=dissipation_error(self._energy),
            choices=self.choices,
            path=self._path(),
            step_sizes=torch.tensor([sample.step for sample in samples], dtype=torch.float64),
            orders=torch.tensor([sample.order for sample in samples]),
            seconds=torch.tensor([sample.seconds for sample in samples], dtype=torch.float64),
            evaluations=torch.tensor([sample.evaluations for sample in samples]),
        )

    def _evaluations(self) -> tuple[int, int, int]:
        """Gradients, Hessian–vector products and Hessians so far."""
        counts, before = self._objective.counts, self._counted_before
        return counts.n_grad - before.n_grad, counts.n_hvp - before.n_hvp, counts.n_hessian - before.n_hessian

    def _sampled(self, knot: Knot, step: float, order: int) -> Sample:
        return Sample(knot, step, order, time.perf_counter() - self._began, self._evaluations())

    def _path(self) -> FlowPath | None:
        if self._knots is None:
            return None
        return path_through(self._knots, self._interpolants, max(2, self.method.n_knots), self._scale)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What "auto" chose so far."""
        return () if self._end is None else self._end.choices

    def _integrate(self) -> RunEnd:
        if self._t_end <= self.last.t:
            return RunEnd("t_end", self.last, self._step_size or 0.0, 0, 0)
        n_knots = self.method.n_knots
        span = Span(
            self._t_end,
            self._rtol,
            self._atol,
            self._step_size,
            self._max_evals,
            # Enough accepted points to interpolate through.
            math.inf if self._t_eval is None or not n_knots else (self._t_end - self._t0) / n_knots,
        )
        return self.method.run(self._objective, self.last, span, self.visit, self._memory)

    def looks_at(self, t: float) -> bool:
        """Whether an accepted step up to t is to be visited; else it may be passed."""
        due = self._t_eval is not None and self._next_eval < len(self._t_eval) and self._t_eval[self._next_eval] <= t
        return due or self._watched or self._knots is not None or self._checkpoint is not None

    def samples(self, t: float) -> bool:
        """Whether an accepted point at t is to be kept, for which loss and gradient are evaluated."""
        return self._t_eval is None and t >= self._next_sample

    def passes(
        self, knot: Knot, step_size: float, order: int, energy: tuple[float, float, float], exact: Knot | None = None
    ) -> None:
        """An accepted step that is not looked at; what ``visit`` does for it, for a fraction of the price.

        Args:
            knot: Its point, with the loss and gradient of a linearisation.
            step_size: The step size to come.
            order: Of the step.
            energy: t, L and ‖∇L‖² there, as numbers.
            exact: The point with loss and gradient evaluated there, where it is to be kept.
        """
        self._energy.append(energy)
        self._advance(knot, step_size, order, True)
        if exact is not None:
            self._keep(exact, False)

    def visit(self, arrival: Arrival) -> bool:
        """An accepted step; whether the run is to end there."""
        with _Wholly(self):
            knot = arrival.knot
            self._note_energy(knot)
            self._advance(knot, arrival.step_size, arrival.order, arrival.approximate)
            self._note_path(knot, arrival.interpolant)
            self._sample(arrival, self._before_last)
            if self._checkpoint is not None:
                self._memory = arrival.remember()
        if self._checkpoint is not None and time.perf_counter() - self._saved_at > CHECKPOINT_SECONDS:
            self._save()
        if not self._watched:
            return False
        report = self._report(arrival.knot, arrival.step_size)
        self._progress.update(report)
        reason = self._stop_check(report)
        if reason is not None and arrival.approximate:
            self._make_exact()
            reason = self._stop_check(self._report(self.last, arrival.step_size))
        self._stopped_by = reason or ""
        return reason is not None

    def _advance(self, knot: Knot, step_size: float, order: int, approximate: bool) -> None:
        self._before_last, self.last, self._approximate = self.last, knot, approximate
        self._last_step, self._last_order = knot.t - self._before_last.t, order
        self._n_accepted += 1
        self._step_size = step_size

    def _make_exact(self) -> None:
        if self._approximate:
            self.last, self._approximate = replace_gradient(self.last, self._objective), False

    def _note_energy(self, knot: Knot) -> None:
        self._energy.append((knot.t, float(knot.loss), float(knot.gradient.dot(knot.gradient))))

    def changing(self) -> tuple[tuple[list[Any] | None, ...], tuple[int, ...], tuple[Any, ...]]:
        """The lists that grow, their lengths, and the rest of what an accepted point changes."""
        lists = self._energy, self._samples, self._knots, self._interpolants
        return lists, tuple([0 if entries is None else len(entries) for entries in lists]), _changing(self)

    def _note_path(self, knot: Knot, interpolant: Interpolant | None) -> None:
        if self._knots is not None and knot.t > self._knots[-1].t:
            self._knots.append(knot)
            self._interpolants.append(interpolant)

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        counts, before = self._objective.counts, self._counted_before
        state = {
            "settings": self._settings,
            "loss at theta0": self._energy[0][1],
            "last": pack_knot(self.last),
            "approximate": self._approximate,
            "step_size": self._step_size,
            "memory": pack_memory(self._memory),
            "last_step": [self._last_step, self._last_order],
            "samples": [pack_knot(sample.knot) for sample in self._samples],
            "run": [[sample.step, sample.order, sample.seconds, list(sample.evaluations)] for sample in self._samples],
            "recent": [[pack_knot(knot), approximate, order] for knot, approximate, order in self._recent],
            "next": [self._next_eval, self._next_sample],
            "energy": self._energy,
            "n_accepted": self._n_accepted,
            "counts": [now - then for now, then in zip(astuple(counts), astuple(before), strict=True)],
            "elapsed": time.perf_counter() - self._began,
        }
        save(self._checkpoint, state)
        self._saved_at = time.perf_counter()

    def _restore(self, state: dict[str, Any]) -> None:
        if self._knots is not None:
            raise ValueError("dense_output=True cannot be had of a run that goes on from a checkpoint; use t_eval.")
        before, now = state["loss at theta0"], self._energy[0][1]
        if not abs(now - before) <= math.sqrt(self._objective.resolution) * abs(before):
            raise ValueError(
                f"checkpoint={str(self._checkpoint)!r} belongs to another objective: its loss at theta0 is {before:.9g}, not "
                f"{now:.9g}. Delete it, or name another file."
            )
        device = self._objective.device
        self.last, self._approximate = unpack_knot(state["last"], device), state["approximate"]
        self._before_last = self.last
        self._step_size, self._memory = state["step_size"], unpack_memory(state["memory"], device)
        self._last_step, self._last_order = state["last_step"]
        self._samples = [
            Sample(unpack_knot(packed, device), step, order, seconds, tuple(evaluations))
            for packed, (step, order, seconds, evaluations) in zip(state["samples"], state["run"], strict=True)
        ]
        self._recent = [(unpack_knot(knot, device), approximate, order) for knot, approximate, order in state["recent"]]
        self._next_eval, self._next_sample = state["next"]
        self._energy = [(t, loss, rate) for t, loss, rate in state["energy"]]
        self._n_accepted = self._n_earlier = state["n_accepted"]
        past, counts = EvaluationCounts(*state["counts"]), self._objective.counts
        self._max_evals -= n_evaluations(past) - 1  # that at theta0 was not bounded
        self._counted_before = EvaluationCounts(*(a - b for a, b in zip(astuple(counts), astuple(past), strict=True)))
        self._began -= state["elapsed"]

    def _sample(self, arrival: Arrival, previous: Knot) -> None:
        knot = arrival.knot
        if self._t_eval is None:
            if self.samples(knot.t):
                self._keep(knot, arrival.approximate)
        elif arrival.interpolant is not None:
            self._interpolate_up_to(previous.t)
            self._evaluate_up_to(knot.t, arrival.interpolant)
            self._recent = [(knot, arrival.approximate, arrival.order)]
        else:
            self._between_steps = find_method(arrival.method)
            n_knots = self._between_steps.n_knots
            self._recent = [*self._recent, (knot, arrival.approximate, arrival.order)][-n_knots:]
            if len(self._recent) == n_knots:
                self._interpolate_up_to(knot.t)

    def _sample_end(self) -> None:
        """Samples up to the last accepted point, which closes the solution."""
        if self._t_eval is None:
            if self._samples[-1].knot.t != self.last.t:
                self._keep(self.last, self._approximate)
            return
        before = self._recent[-1][0]
        if self._end is not None and self._end.interpolant is not None:
            self._interpolate_up_to(before.t)
            self._evaluate_up_to(self.last.t, self._end.interpolant)
        elif before.t != self.last.t:
            last = (self.last, self._approximate, self._last_order)
            self._recent = [*self._recent, last][-max(2, self._between_steps.n_knots) :]
        self._interpolate_up_to(self.last.t)

    def _evaluate_up_to(self, t: float, interpolant: Interpolant) -> None:
        assert self._t_eval is not None
        while self._next_eval < len(self._t_eval) and self._t_eval[self._next_eval] <= t:
            at = self._t_eval[self._next_eval]
            theta = self.last.theta if at == self.last.t else interpolant(at)
            knot = Knot(at, theta, *self._objective.loss_and_gradient(theta))
            self._samples.append(self._sampled(knot, self._last_step, self._last_order))
            self._next_eval += 1

    def _interpolate_up_to(self, t: float) -> None:
        assert self._t_eval is not None
        while self._next_eval < len(self._t_eval) and self._t_eval[self._next_eval] <= t:
            at = self._t_eval[self._next_eval]
            exact = [(knot, approximate) for knot, approximate, _ in self._recent if knot.t == at]
            if exact:
                knot, approximate = exact[0]
                knot = replace_gradient(knot, self._objective) if approximate else knot
            else:
                knot = self._between(at)
            self._samples.append(self._sampled(knot, *self._step_around(at)))
            self._next_eval += 1

    def _step_around(self, t: float) -> tuple[float, int]:
        """Length and order of the step among the last ones that ends at t or contains it; nan and 0 at the start."""
        ends = [(knot.t, order) for knot, _, order in self._recent]
        return next(((b - a, order) for (a, _), (b, order) in pairwise(ends) if a < t <= b), (math.nan, 0))

    def _between(self, t: float) -> Knot:
        window = HermiteWindow.through([knot for knot, *_ in self._recent])
        return point_between(self._between_steps, self._objective, window, t, self._rtol, self._atol)

    def _keep(self, knot: Knot, approximate: bool) -> None:
        kept = replace_gradient(knot, self._objective) if approximate else knot
        self._samples.append(self._sampled(kept, self._last_step, self._last_order))
        elapsed = knot.t - self._t0
        self._next_sample = self._t0 + elapsed * 10 ** (1 / SAMPLES_PER_DECADE) if elapsed > 0 else self._t0

    def _report(self, knot: Knot, step_size: float) -> FlowReport:
        return FlowReport(
            t=knot.t,
            loss=float(knot.loss),
            grad_norm=self._grad_norm(knot.gradient),
            n_grad=self._objective.counts.n_grad - self._counted_before.n_grad,
            elapsed=time.perf_counter() - self._began,
            step_size=step_size,
        )

    @property
    def grad_norm(self) -> float:
        """‖∇L‖ at the last accepted point, in the infinity norm."""
        return self._grad_norm(self.last.gradient)

    def _grad_norm(self, gradient: Tensor) -> float:
        return float(self._grad_norms(gradient))

    def _grad_norms(self, gradients: Tensor) -> Tensor:
        """Those of one gradient, or of rows of them."""
        norms: Tensor = torch.linalg.vector_norm(
            gradients if self._scale is None else gradients / self._scale, math.inf, dim=-1
        )
        return norms

    def _to_theta(self, point: Tensor) -> Tensor:
        return point if self._scale is None else point * self._scale

    def _describe(self, end: RunEnd) -> tuple[Status, str]:
        t = f"t = {end.knot.t:.6g}"
        if end.status == "t_end":
            return "t_end", f"Reached the end time, {t}."
        if end.status == "visit":
            return "stopped", self._stopped_by
        return end.status, failure_message(end) + (f" {end.note}" if end.note else "")


class _Wholly:
    """What an exception interrupts within is undone: a checkpoint holds the state of one point, not half of the next.

    (A generator with ``contextmanager`` would take longer than a step of the smallest networks.)
    """

    def __init__(self, run: FlowRun) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._lists, self._lengths, self._kept = self._run.changing()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            return
        for entries, length in zip(self._lists, self._lengths, strict=True):
            if entries is not None:
                del entries[length:]
        for name, value in zip(_CHANGING, self._kept, strict=True):
            setattr(self._run, name, value)


def failure_message(end: RunEnd) -> str:
    """A sentence for a run that did not reach its end."""
    t = f"t = {end.knot.t:.6g}"
    return {
        "max_evals": f"max_evals was reached at {t}: the flow is stiff here, or max_evals too small for the flow time.",
        "underflow": f"At {t} no step is small enough for the tolerance: loosen rtol, or use a smoother loss (tanh or "
        "softplus for ReLU), weight decay or max_norm.",
        "not finite": f"Beyond {t} loss or gradient are not finite, however small the step: the flow diverges. Use "
        "weight_decay or max_norm, or a loss that is bounded below.",
    }[end.status]


def check_arguments(
    t_span: tuple[float, float],
    t_eval: Sequence[float] | None,
    stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None,
    max_evals: int | None,
    progress: bool | Callable[[FlowReport], Any] | Progress | None,
) -> None:
    """Check what ``integrate`` is given, before anything is evaluated.

    Raises:
        TypeError, ValueError: Naming the argument.
    """
    t0, t_end = _check_span(t_span)
    _check_t_eval(t_eval, t0, t_end)
    begin_all(stop)
    if max_evals is not None:
        check_count("max_evals", max_evals)
    if math.isinf(t_end) and not stop and max_evals is None:
        raise ValueError(f"t_span={t_span!r} needs a stopping rule (stop=...) or max_evals, or the flow would never end.")
    check_progress(progress)


def _check_span(t_span: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(t_span, tuple | list):
        raise TypeError(f"t_span must be (start, end), not {t_span!r}.")
    if len(t_span) != 2:
        raise ValueError(f"t_span must be (start, end), not {t_span!r}.")
    t0, t_end = check_number("t_span", t_span[0]), check_number("t_span", t_span[1], infinite=True)
    if t_end < t0:
        raise ValueError(f"t_span must be (start, end) with start <= end, not {t_span!r}.")
    return t0, t_end


def _check_t_eval(t_eval: Sequence[float] | None, t0: float, t_end: float) -> list[float] | None:
    if t_eval is None:
        return None
    if not hasattr(t_eval, "__iter__"):
        raise TypeError(f"t_eval must be a sequence of times, not {t_eval!r}.")
    times = [check_number("t_eval", t) for t in t_eval]
    if not times or any(b <= a for a, b in pairwise(times)):
        raise ValueError("t_eval must hold at least one time, in ascending order without repetition.")
    if times[0] < t0 or times[-1] > t_end:
        raise ValueError(f"t_eval must lie between {t0:g} and {t_end:g}, not between {times[0]:g} and {times[-1]:g}.")
    return times
