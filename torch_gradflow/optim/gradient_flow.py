"""GradientFlow: the optimizer that follows dθ/dt = −∇L(θ) itself."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.flow import stepwise
from torch_gradflow.flow.continuation import Continuation, Piece, advance
from torch_gradflow.flow.integrate import FlowRun, check_arguments, failure_message, tolerances
from torch_gradflow.flow.method import FlowMethod
from torch_gradflow.flow.methods import find_method
from torch_gradflow.flow.progress import Progress
from torch_gradflow.flow.solution import Choice, FlowReport, FlowSolution, Knot, add_choices
from torch_gradflow.flow.stepwise import StepwiseState
from torch_gradflow.flow.stopping import StoppingRule
from torch_gradflow.objectives.base import ClosureError, Objective
from torch_gradflow.objectives.contract import agree
from torch_gradflow.objectives.distributed import LossReduction, find_processes
from torch_gradflow.objectives.loop import NoRecord
from torch_gradflow.objectives.opened import Engine, GradientFlowWarning, Opened
from torch_gradflow.objectives.parameters import working_dtype
from torch_gradflow.objectives.processes import Pass
from torch_gradflow.objectives.record import Recording
from torch_gradflow.objectives.regularized import Penalties, Regularized, Rescaled
from torch_gradflow.optim import carried
from torch_gradflow.optim.closure_optimizer import ActiveParameters, ClosureOptimizer, ObjectiveSettings, Params
from torch_gradflow.uncompiled import uncompiled


@dataclass
class FlowStats:
    """What the last step (or ``integrate``) did, and what it cost so far.

    Attributes:
        engine: "perceptron" (what was recorded of the closure or of the loop is the loss of a multi-layer perceptron, whose
            derivatives are computed in closed form), "population" (the same for the loss of a ``TeacherStudent``), "replay"
            (the recorded calls serve all evaluations), "closure" (it is called again) or "fallback" (a loop without a record
            that serves: one gradient per call, the one in ``.grad``).
        engine_reason: Why the replay does not serve, or "".
        kernel: With the engine "perceptron", "numba" (compiled) or "torch"; else "".
        method: The integrator that served last.
        choices: What "auto" chose, when and why; a method that goes on serving is named once.
        loss: L at the end of the last step where that is known, else at its start.
        grad_norm: ‖∇L‖ in the infinity norm at the same point (of the regularised loss, if it is regularised).
        step_size: The integrator's next step size, in flow time.
        order: That of its last step; 0 where it does not tell.
        status: "t_end" after a complete step; else why it ended before, see ``FlowSolution.status``; in the fallback what
            became of the last proposal: "begun", "refined", "accepted", "rejected", "confirmed" or "changed", see
            ``flow.bdf_secant.advance``.
        message: The same as a sentence.
        n_closure: Calls of the closure.
        n_grad: Gradients, those of the closure and of replays.
        n_hvp: Hessian–vector products.
        n_hessian: Hessians.
        n_accepted: Accepted integrator steps.
        n_rejected: Rejected integrator steps.
        n_recorded: Torch calls in the last record of a loop.
        record_seconds: What recording loops cost so far, in seconds.
    """

    engine: str = ""
    engine_reason: str = ""
    kernel: str = ""
    method: str = ""
    choices: tuple[Choice, ...] = ()
    loss: float = math.nan
    grad_norm: float = math.nan
    step_size: float = 0.0
    order: int = 0
    status: str = ""
    message: str = ""
    n_closure: int = 0
    n_grad: int = 0
    n_hvp: int = 0
    n_hessian: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    n_recorded: int = 0
    record_seconds: float = 0.0


class GradientFlow(ClosureOptimizer):
    """Follows the gradient flow dθ/dt = −∇L(θ) by adaptive integration; one step advances it by the flow time ``lr``.

    SGD with learning rate lr is one Euler step of the same length, GradientFlow(lr) the exact limit. It is used like any
    torch optimizer, in the plain loop (``zero_grad()``, loss, ``backward()``, ``step()``) or with ``step(closure)``; the loss
    of one pass stands for one fixed objective within a step. That pass runs once per step; everything else is computed from
    a record of it, as long as that record reproduces the gradient that the pass itself left in ``.grad`` (see
    ``torch_gradflow.objectives.loop`` and ``.closure``). Where it does not, a closure is called again; a plain loop falls
    back, with a warning, to one gradient per call (``fallback``): ``lr`` then caps the flow time of a call,
    ``flow_time`` is how far the flow came, and the parameters are the point at which it wants the next gradient, within the
    tolerance or nearly so; ``synchronize`` puts the last accepted point into them.

    Several parameter groups with different ``lr`` flow at different speeds: relative to the first non-zero one, their
    ``lr`` are inverse time constants. ``lr=0`` freezes a group.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer; dense, real, on one device.
        lr: Flow time per step. Natural values are 0.1 to 100, far above Adam's; small ones work and cost about
            one to three gradients per step besides the closure's own.
        method: "auto", which begins with dopri5, measures what derivatives cost, and then chooses and switches between it and
            the methods of our own (``stats.choices`` says what, when and why); or one of these: "bdf" (backward
            differentiation with Hessians), "bdf-cg" (with Hessian–vector products), "bdf-secant" (with gradients alone),
            "exprb53" and "exprb53-lanczos" (exponential Rosenbrock: near saddles), "rkc2" (Runge–Kutta–Chebyshev: large or
            non-smooth problems); torchdiffeq's "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"; scipy's "LSODA",
            "BDF", "Radau".
        rtol: Relative tolerance of the local error of a step. None: 1e-6 in float64, 1e-4 in float32. That of the whole
            flow is another matter, see the README.
        atol: Absolute tolerance. None: rtol/100.
        weight_decay: λ: adds λ/2 ‖θ‖² to L. (Coupled, as in SGD; AdamW's decoupled decay is another flow.)
        max_norm: c: adds the barrier (w − c)³/3 for w = ‖θ‖²/(2P) > c, which keeps a flow towards infinity bounded.
        maximize: Ascend instead of descend. The penalties are minimised all the same.
        dtype: ``torch.float64`` computes in float64 on a float32 model: a master copy of the parameters, the data and all
            evaluations; parameters are rounded once per step.
        engine: "auto"; "perceptron" (an error, with the reason, where the network is not recognised as a multi-layer
            perceptron); "replay" (the recorded calls as they are, an error where they cannot be used); "closure" (call it
            again, always).
        check: Check the closure's contract on the first step, with two more calls of it; of a loop only that its gradients
            are those of the loss, with one more gradient.
        record: Whether ``zero_grad()`` records the forward pass that follows, for ``step()`` without a closure.
        fallback: The method with one gradient per call: "bdf-secant", for stiff flows, or "adams-bashforth", which is explicit
            and keeps four vectors only. "auto" is the former up to a million parameters.
        max_evals: Gradients that one ``step`` may spend before it stops early with status "max_evals".
        process_group: The ``torch.distributed`` process group among whose processes the data are divided, usually
            ``torch.distributed.group.WORLD``; None: all data are here. The loss is that of all data; every process has the
            same parameters, and runs the same loop with its own data. The model may be bare, or in DistributedDataParallel
            (which averages ``.grad`` with equal weights: in a loop without a closure shards have to be of equal size then).
            ``.grad`` is the gradient of the whole loss after a step. Process 0 alone reports progress.
        shard_size: How many samples this process has, where its loss is their mean: losses are weighted accordingly. None:
            equal weights, for shards of equal size.
        reduction: "mean" if the loss of a process is a mean over its samples; "sum" if it is a sum, so that losses are added.

    Attributes:
        stats: A ``FlowStats``.
        solution: The ``FlowSolution`` of the last ``integrate``, or None.

    Raises:
        ValueError, TypeError: For arguments that make no sense, naming them.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        *,
        method: str = "auto",
        rtol: float | None = None,
        atol: float | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        maximize: bool = False,
        dtype: torch.dtype | None = None,
        engine: Engine = "auto",
        check: bool = True,
        record: bool = True,
        fallback: Literal["auto", "bdf-secant", "adams-bashforth"] = "auto",
        max_evals: int = 10_000,
        process_group: torch.distributed.ProcessGroup | None = None,
        shard_size: int | None = None,
        reduction: LossReduction = "mean",
    ) -> None:
        self._method: FlowMethod = find_method(method)
        if fallback not in ("auto", *stepwise.NAMES):
            raise ValueError(f"fallback must be one of 'auto', {', '.join(map(repr, stepwise.NAMES))}, not {fallback!r}.")
        self._fallback = fallback
        check_count("max_evals", max_evals)
        self._rtol, self._atol, self._max_evals = rtol, atol, max_evals
        # The flow's own numbers stand in the groups, where state_dict and checkpoints keep them.
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, **carried.DEFAULTS}
        processes = find_processes(process_group, shard_size, reduction)
        super().__init__(params, defaults, ObjectiveSettings(max_norm, dtype, engine, check, record, processes))
        narrow = working_dtype([p for g in self.param_groups for p in g["params"]], dtype)
        *_, warning = tolerances(rtol, atol, torch.finfo(narrow).eps)
        if warning:
            warnings.warn(warning, GradientFlowWarning, stacklevel=2)

    def _forget(self) -> None:
        super()._forget()
        self.stats = FlowStats()
        self.solution: FlowSolution | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_method", "_rtol", "_atol", "_fallback", "_max_evals")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which join the flow at its present time."""
        super().add_param_group(param_group)
        for name in carried.DEFAULTS:
            self.param_groups[-1][name] = copy.deepcopy(self.param_groups[0][name])

    @property
    def flow_time(self) -> float:
        """The flow time t that was reached, in units of the reference (first non-zero) ``lr``."""
        return float(self.param_groups[0]["flow_time"])

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance the flow by ``lr``.

        Args:
            closure: Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss. None in a plain loop,
                whose forward pass since ``zero_grad()`` was recorded.

        Returns:
            What the closure returned, or the recorded loss, that at the start of the step (None where it is not known).
            ``.grad`` is the gradient there. With all ``lr`` zero nothing moves.

        Raises:
            ClosureError: If the closure breaks its contract (no zero_grad, no backward, dropout, a scaled loss); with
                ``engine="replay"``, if the record does not serve.
            FloatingPointError: If loss or gradient are not finite at the start.
        """
        with self._step_begun() as recording:
            active = self._active()
            if active is None:
                return self._without_motion(closure)
            self._check_closure(closure)
            problem = self._problem(active)
            theta = self._known_theta(active)
            try:
                return self._follow(closure, recording, active, problem, theta)
            except NoRecord as why:
                if self._processes.all(all(p.grad is None for p in active.tensors)):
                    self._memory.warn_once("step() had nothing to do: no parameter has a gradient. Call backward() before it.")
                    return None
                silent = not self._announce(why)
                return self._fall_back(str(why), recording, active, problem, theta, silent=silent)
            except FloatingPointError:
                # A proposal may lie where the loss is not finite: that is the fallback's to judge.
                if closure is not None or theta is None or not self.param_groups[0]["stepwise"]:
                    raise
                return self._fall_back(self.stats.engine_reason, recording, active, problem, theta)

    def _follow(
        self,
        closure: Callable[[], Any] | None,
        recording: Recording | None,
        active: ActiveParameters,
        problem: FlowProblem,
        theta: Tensor | None,
    ) -> Any:
        """A step along the flow of the closure's or the loop's objective."""
        known = None if theta is None else carried.read(self, active, self._method)
        behind = None if theta is None else self._behind(active)

        def is_expected(loss: Tensor, gradient: Tensor, theta: Tensor) -> bool:
            if known is None:
                return False
            found = problem.dress(loss, gradient, theta)
            return agree(found, (known.state.here.loss, known.state.here.gradient), active.layout, tight=True)

        with self._open(closure, recording, active, theta=theta, expected=is_expected) as (opened, reached):
            reached.t = self.flow_time

            def on_accept(knot: Knot) -> None:
                reached.theta, reached.t = knot.theta * problem.scale, knot.t

            def follow(loss: Objective) -> tuple[Piece, int]:
                objective, start = problem.field(loss, opened, reached.t)
                duration = problem.reference
                rtol, atol, _ = tolerances(self._rtol, self._atol, objective.resolution)
                if known is not None and opened.unchanged:
                    state, seen = replace(known.state, here=start), known.seen + 1
                else:
                    if behind is not None:
                        start, owed = self._go_on_from(behind, start, objective, active)
                        duration += owed
                        on_accept(start)
                    state, seen = Continuation(start, None if behind is not None else carried.step_size(self), None), 0
                piece = advance(
                    self._method,
                    objective,
                    state,
                    duration,
                    rtol=rtol,
                    atol=atol,
                    ahead=seen > 0,
                    max_evals=self._max_evals,
                    on_accept=on_accept,
                )
                on_accept(piece.state.here)
                # What interpolates within a step cannot be passed on to other processes, and has served its purpose.
                return replace(piece, end=piece.end and replace(piece.end, interpolant=None)), seen

            try:
                piece, seen = self._processes.lead(opened.objective, reached, follow)
            except BaseException:
                if not torch.equal(reached.theta, opened.theta):
                    carried.forget(self, reached.t)
                raise
        self._initialise_state()
        carried.write(self, active, self._method, piece.state, seen)
        self._keep_theta(active, reached.theta)
        self._note_step(opened, piece, problem)
        return opened.loss if opened.returned is None else opened.returned

    def _go_on_from(
        self, behind: StepwiseState, here: Knot, objective: Objective, active: ActiveParameters
    ) -> tuple[Knot, float]:
        """Where the flow goes on after the fallback, and how much flow time its calls were short of, if they were silent.

        That is the last accepted point if the objective is still the same, else the point that stands in the parameters.
        """
        loss, gradient = objective.loss_and_gradient(behind.accepted)
        if agree((loss, gradient), (loss, behind.known), active.layout) or behind.is_known(gradient):
            return Knot(behind.t, behind.accepted, loss, gradient), float(self.param_groups[0]["owed"])
        return replace(here, t=behind.t + behind.proposed), 0.0

    def _announce(self, why: NoRecord) -> bool:
        """Say why there is no more than one gradient per call: an error where the record must serve, else a warning.

        Returns:
            Whether it is said at all: not where the next iterations may show that nothing is amiss.
        """
        reason = str(why)
        if self._settings.engine in ("perceptron", "replay"):
            raise ClosureError(
                f"engine={self._settings.engine!r} was asked for, but the record of the loop cannot be used: {reason}."
            ) from None
        chosen = not self._settings.record or self._settings.engine == "closure"
        # In a loop that ends with zero_grad(), the first iteration has no record; a second one shows that it is another.
        first = not self._loop.zeroed and not self.stats.status
        if first or why.passing:
            return False
        if not chosen:
            self._memory.warn_once(
                f"step() without a closure goes on with one gradient per call, because {reason}. lr only caps the flow time "
                "of such a step: see flow_time."
            )
        return True

    def _fall_back(
        self,
        reason: str,
        recording: Recording | None,
        active: ActiveParameters,
        problem: FlowProblem,
        theta: Tensor | None,
        *,
        silent: bool = False,
    ) -> Tensor | None:
        """A step with the one gradient that the loop left in ``.grad``; a silent one will be made up for in full."""
        loss = None if recording is None or recording.loss is None else recording.loss.detach()
        left = active.layout.gradient(active.tensors)
        own = Pass(left.new_tensor(math.nan) if loss is None else loss.mean().to(left), left, ())
        behind = None if theta is None else self._behind(active)
        theta = active.layout.flatten(active.tensors) if theta is None else theta
        found = self._processes.meet(lambda: own, theta, self._common_settings(None))
        _, gradient = problem.dress(found.loss, found.gradient, theta)
        rtol, atol = self._stepwise_tolerances(active)
        cap = problem.reference
        t = self.flow_time
        verdict: str
        if behind is None:
            name = stepwise.choose(len(theta)) if self._fallback == "auto" else self._fallback
            state = stepwise.begin(name, t, theta / problem.scale, gradient, cap=cap, rtol=rtol, atol=atol)
            verdict = "begun"
        else:
            state, verdict = stepwise.advance(behind, gradient, cap=cap, rtol=rtol, atol=atol)
        if self._processes.size > 1:  # to the last bit the same in all of them
            for p, part in zip(active.tensors, active.layout.split_as_parameters(found.gradient), strict=True):
                p.grad = part.clone()
            name, packed, verdict = self._processes.share(
                (stepwise.name_of(state), stepwise.pack(state), verdict), active.layout.device
            )
            state = stepwise.unpack(name, packed, rtol=rtol, atol=atol)
        self._initialise_state()
        proposal = state.proposal() * problem.scale
        active.layout.write(proposal, active.tensors)
        owed = (float(self.param_groups[0]["owed"]) if behind is not None else 0.0) + cap - (state.t - t) if silent else 0.0
        carried.write_stepwise(self, active, state, owed)
        self._keep_theta(active, proposal)
        self._memory.program = None
        message = f"One gradient per call, because {reason}: the last proposal was {verdict}, t = {state.t:.6g}."
        self._note("fallback", reason, stepwise.name_of(state), verdict, message, state.step_size)
        self.stats.order = stepwise.order_of(state)
        self.stats.loss = float(found.loss)
        self.stats.grad_norm = float((gradient / problem.scale).abs().max())
        self.stats.n_accepted += verdict == "accepted"
        self.stats.n_rejected += verdict == "rejected"
        return loss

    def _behind(self, active: ActiveParameters) -> StepwiseState | None:
        """Where the flow with one gradient per call stands, or None."""
        rtol, atol = self._stepwise_tolerances(active)
        return carried.read_stepwise(self, active, self._method, rtol=rtol, atol=atol)

    def _stepwise_tolerances(self, active: ActiveParameters) -> tuple[float, float]:
        rtol, atol, _ = tolerances(self._rtol, self._atol, active.layout.resolution())
        return rtol, atol

    @torch.no_grad()
    def synchronize(self) -> None:
        """Put the last accepted point, that of ``flow_time``, into the parameters.

        Only in the fallback to one gradient per call does another point stand there between steps: the one at which the next
        gradient is wanted. The flow goes on from the accepted point, whose gradient is then evaluated once more. Parameters
        that were changed since the last step are left alone.
        """
        active = self._active()
        if active is None or self._known_theta(active) is None:
            return
        state = self._behind(active)
        if state is None or not state.proposed:
            return
        theta = state.accepted * self._problem(active).scale
        active.layout.write(theta, active.tensors)
        owed = float(self.param_groups[0]["owed"])
        carried.write_stepwise(self, active, state.asking(), owed)
        self._keep_theta(active, theta)

    def integrate(
        self,
        closure: Callable[[], Any] | None,
        t_end: float,
        *,
        t_eval: Sequence[float] | None = None,
        stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None = None,
        max_evals: int | None = None,
        progress: bool | Callable[[FlowReport], Any] | Progress | None = None,
    ) -> FlowSolution:
        """Follow the flow for the flow time ``t_end`` in one go; the parameters end at its last point.

        Args:
            closure: As for ``step``; one fixed objective. None follows that of the pass since ``zero_grad()``.
            t_end: Flow time from here, in units of the reference lr (with equal lrs: of dθ/dt = −∇L). May be ``inf``
                with a stopping rule.
            t_eval: Times in [0, t_end] at which to sample the solution, see ``torch_gradflow.integrate``.
            stop: Stopping rules, see ``torch_gradflow.flow.stopping``.
            max_evals: Bound on gradients; None for none.
            progress: True for a progress bar.

        Returns:
            The solution, with times from 0. Losses and gradient norms are those of the regularised loss, where it is
            regularised. Ctrl-C ends it early, with status "interrupted"; an exception in the closure is raised, after
            the parameters were set to the last accepted point and the solution so far was kept in ``self.solution``.

        Raises:
            ValueError: Where all lrs are zero; and as ``step``.
        """
        active = self._active()
        if active is None:
            raise ValueError("integrate has nothing to move: all lr are 0, or no parameter requires gradients.")
        self._check_closure(closure)
        t_end = check_number("t_end", t_end, above=0.0, infinite=True)
        if math.isinf(t_end) and not stop and max_evals is None:
            raise ValueError("t_end=inf needs a stopping rule (stop=...) or max_evals, or the flow would never end.")
        check_arguments((0.0, t_end), t_eval, stop, max_evals, progress)
        if closure is not None:
            self.synchronize()
        with self._step_begun() as recording:
            try:
                return self._integrate(closure, recording, active, t_end, t_eval, stop, max_evals, progress)
            except NoRecord as why:
                raise ClosureError(
                    f"integrate() without a closure has to evaluate the loss at other parameters, but {why}. Mend that, or "
                    "write the pass as a closure."
                ) from None

    def _integrate(
        self,
        closure: Callable[[], Any] | None,
        recording: Recording | None,
        active: ActiveParameters,
        t_end: float,
        t_eval: Sequence[float] | None,
        stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None,
        max_evals: int | None,
        progress: bool | Callable[[FlowReport], Any] | Progress | None,
    ) -> FlowSolution:
        problem = self._problem(active)
        theta = self._known_theta(active)
        behind = None if theta is None else self._behind(active)
        t = self.flow_time + (0.0 if behind is None else behind.proposed)
        with self._open(closure, recording, active, theta=theta) as (opened, reached):
            reached.t = t

            def follow(loss: Objective) -> tuple[float, float]:
                objective, start = problem.field(loss, opened, t)
                run = FlowRun(
                    objective,
                    start.theta,
                    (0.0, t_end),
                    method=self._method.name,
                    rtol=self._rtol,
                    atol=self._atol,
                    t_eval=t_eval,
                    stop=stop,
                    max_evals=max_evals,
                    step_size=carried.step_size(self),
                    progress=progress,
                    start=(start.loss, start.gradient),
                    scale=problem.scale,
                )
                try:
                    run.run()
                finally:
                    found = run.solution()
                    reached.result = replace(found, loss=problem.sign * found.loss)
                    reached.theta, reached.t = run.last.theta * problem.scale, t + run.last.t
                return problem.sign * float(run.last.loss), run.grad_norm

            try:
                last = self._processes.lead(opened.objective, reached, follow)
            finally:
                if reached.result is not None:
                    self.solution = reached.result
                    carried.forget(self, reached.t, reached.result.step_size)
        self._initialise_state()
        self._keep_theta(active, reached.theta)
        solution: FlowSolution = reached.result
        self._note_choices(solution.choices)
        self._note(opened.engine, opened.reason, self._served(), solution.status, solution.message, solution.step_size)
        self.stats.loss, self.stats.grad_norm = last
        self.stats.order = 0 if solution.orders is None else int(solution.orders[-1])
        self.stats.n_accepted += solution.n_accepted
        self.stats.n_rejected += solution.n_rejected
        return solution

    def _initialise_state(self) -> None:
        carried.initialise(self, self._method, self._working_dtype())

    def _problem(self, active: ActiveParameters) -> FlowProblem:
        reference = carried.reference_lr(self)
        return FlowProblem(reference, (active.expand("lr") / reference).sqrt(), self._penalties(active))

    def _note_step(self, opened: Opened, piece: Piece, problem: FlowProblem) -> None:
        here = piece.state.here
        message = f"Reached the end of the step, t = {here.t:.6g}."
        if piece.end is not None and piece.end.status != "t_end":
            message = failure_message(piece.end)
            warnings.warn(f"The step ended before its time ({piece.end.status}). {message}", GradientFlowWarning, stacklevel=4)
        step_size = piece.state.step_size or 0.0
        self._note_choices(piece.choices)
        self._note(opened.engine, opened.reason, self._served(), piece.status, message, step_size)
        self.stats.order = piece.order or self.stats.order  # a piece within the last step takes none
        self.stats.loss = problem.sign * float(here.loss)
        self.stats.grad_norm = float((here.gradient / problem.scale).abs().max())
        self.stats.n_accepted += piece.n_accepted
        self.stats.n_rejected += piece.n_rejected

    def _note_choices(self, choices: tuple[Choice, ...]) -> None:
        self.stats = replace(self.stats, choices=add_choices(self.stats.choices, choices))

    def _served(self) -> str:
        """The integrator that served last: where it chooses itself, what it chose."""
        return self.stats.choices[-1].method if self.stats.choices else self._method.name

    def _note(self, engine: str, reason: str, method: str, status: str, message: str, step_size: float) -> None:
        counts = self._counts
        self.stats = replace(
            self.stats,
            engine=engine,
            engine_reason=reason,
            kernel=self._memory.perceptron.kernel if engine == "perceptron" and self._memory.perceptron is not None else "",
            method=method,
            step_size=step_size,
            status=status,
            message=message,
            n_closure=counts.n_closure,
            n_grad=counts.n_grad,
            n_hvp=counts.n_hvp,
            n_hessian=counts.n_hessian,
            n_recorded=self._loop.n_recorded,
            record_seconds=self._loop.seconds,
        )


@dataclass(frozen=True)
class FlowProblem:
    """What turns the closure's L(θ) into the gradient flow of one objective F(φ), φ = θ/√d.

    Attributes:
        reference: The reference lr, the unit of flow time.
        scale: √d for the inverse time constants d = lr / reference, shape ``(P,)``.
        penalties: What is added to L, or None.
    """

    reference: float
    scale: Tensor
    penalties: Penalties | None

    @property
    def sign(self) -> float:
        """−1 where L is maximised: F is minimised, −F is what users see."""
        return 1.0 if self.penalties is None else self.penalties.sign

    def dress(self, loss: Tensor, gradient: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """F and ∇F with respect to φ, from L and ∇L at θ."""
        if self.penalties is not None:
            loss, gradient = self.penalties.add(theta, loss, gradient)
        return loss, gradient * self.scale

    def field(self, objective: Objective, opened: Opened, t: float) -> tuple[Objective, Knot]:
        """F of the ``objective`` L, and the point at the start."""
        if self.penalties is not None:
            objective = Regularized(objective, self.penalties)
        if bool((self.scale != 1).any()):
            objective = Rescaled(objective, self.scale**2)
        start = self.dress(opened.loss, opened.gradient, opened.theta)
        return objective, Knot(t, opened.theta / self.scale, *start)
