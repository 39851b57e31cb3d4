"""GradientFlow: the optimizer that follows dθ/dt = −∇L(θ) itself."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.flow.continuation import Continuation, Piece, advance
from torch_gradflow.flow.explicit import ExplicitMethod, find_method
from torch_gradflow.flow.integrate import FlowRun, check_arguments, failure_message, tolerances
from torch_gradflow.flow.progress import Progress
from torch_gradflow.flow.solution import FlowReport, FlowSolution, Knot
from torch_gradflow.flow.stopping import StoppingRule
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.contract import agree
from torch_gradflow.objectives.opened import Engine, GradientFlowWarning, Opened
from torch_gradflow.objectives.parameters import working_dtype
from torch_gradflow.objectives.regularized import Penalties, Regularized, Rescaled
from torch_gradflow.optim import carried
from torch_gradflow.optim.closure_optimizer import ActiveParameters, ClosureOptimizer, ObjectiveSettings, Params


@dataclass
class FlowStats:
    """What the last step (or ``integrate``) did, and what it cost so far.

    Attributes:
        engine: "replay" (the closure's recorded calls serve all evaluations) or "closure" (it is called again).
        engine_reason: Why the replay does not serve, or "".
        method: The integrator.
        loss: L at the end of the last step where that is known, else at its start.
        grad_norm: ‖∇L‖ in the infinity norm at the same point (of the regularised loss, if it is regularised).
        step_size: The integrator's next step size, in flow time.
        status: "t_end" after a complete step; else why it ended before, see ``FlowSolution.status``.
        message: The same as a sentence.
        n_closure: Calls of the closure.
        n_grad: Gradients, those of the closure and of replays.
        n_hvp: Hessian–vector products.
        n_hessian: Hessians.
        n_accepted: Accepted integrator steps.
        n_rejected: Rejected integrator steps.
    """

    engine: str = ""
    engine_reason: str = ""
    method: str = ""
    loss: float = math.nan
    grad_norm: float = math.nan
    step_size: float = 0.0
    status: str = ""
    message: str = ""
    n_closure: int = 0
    n_grad: int = 0
    n_hvp: int = 0
    n_hessian: int = 0
    n_accepted: int = 0
    n_rejected: int = 0


class GradientFlow(ClosureOptimizer):
    """Follows the gradient flow dθ/dt = −∇L(θ) by adaptive integration; one step advances it by the flow time ``lr``.

    SGD with learning rate lr is one Euler step of the same length, GradientFlow(lr) the exact limit. It is used like
    ``torch.optim.LBFGS``: ``optimizer.step(closure)`` with the usual closure, which stands for one fixed objective within
    a step. The closure runs once per step; everything else is computed from a record of its forward pass, as long as that
    record reproduces the closure's own loss and gradient (see ``torch_gradflow.objectives.closure``), else by calling the
    closure again.

    Several parameter groups with different ``lr`` flow at different speeds: relative to the first non-zero one, their
    ``lr`` are inverse time constants. ``lr=0`` freezes a group.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer; dense, real, on one device.
        lr: Flow time per step. Natural values are 0.1 to 100, far above Adam's; small ones work and cost about
            one to three gradients per step besides the closure's own.
        method: "auto" or one of torchdiffeq's adaptive methods: "dopri5" (which "auto" chooses), "dopri8", "bosh3",
            "fehlberg2", "adaptive_heun".
        rtol: Relative tolerance of the local error of a step. None: 1e-6 in float64, 1e-4 in float32. That of the whole
            flow is another matter: it was up to 1 times rtol on teacher–student problems, up to 17 times on a harder one
            (fehlberg2: up to 100 times).
        atol: Absolute tolerance. None: rtol/100.
        weight_decay: λ: adds λ/2 ‖θ‖² to L. (Coupled, as in SGD; AdamW's decoupled decay is another flow.)
        max_norm: c: adds the barrier (w − c)³/3 for w = ‖θ‖²/(2P) > c, which keeps a flow towards infinity bounded.
        maximize: Ascend instead of descend. The penalties are minimised all the same.
        dtype: ``torch.float64`` computes in float64 on a float32 model: a master copy of the parameters, the data and all
            evaluations; parameters are rounded once per step.
        engine: "auto", "replay" (an error where the record cannot be used), or "closure" (never replay).
        check: Check the closure's contract on the first step, with two more calls of it.
        max_evals: Gradients that one ``step`` may spend before it stops early with status "max_evals".

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
        max_evals: int = 10_000,
    ) -> None:
        self._method: ExplicitMethod = find_method(method)
        check_count("max_evals", max_evals)
        self._rtol, self._atol, self._max_evals = rtol, atol, max_evals
        # The flow's own numbers stand in the groups, where state_dict and checkpoints keep them.
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, **carried.DEFAULTS}
        super().__init__(params, defaults, ObjectiveSettings(max_norm, dtype, engine, check))
        narrow = working_dtype([p for g in self.param_groups for p in g["params"]], dtype)
        *_, warning = tolerances(rtol, atol, torch.finfo(narrow).eps)
        if warning:
            warnings.warn(warning, GradientFlowWarning, stacklevel=2)

    def _forget(self) -> None:
        super()._forget()
        self.stats = FlowStats()
        self.solution: FlowSolution | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_method", "_rtol", "_atol", "_max_evals")
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance the flow by ``lr``.

        Args:
            closure: Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned: the loss at the start of the step. ``.grad`` is the gradient there. With all
            ``lr`` zero the closure is called once and nothing moves; then None is a legal closure too.

        Raises:
            RuntimeError: Without a closure.
            ClosureError: If the closure breaks its contract (no zero_grad, no backward, dropout, a scaled loss).
            FloatingPointError: If loss or gradient are not finite at the start.
        """
        active = self._active()
        if active is None:
            return self._without_motion(closure)
        closure = self._require_closure(closure)
        problem = self._problem(active)
        theta = self._known_theta(active)
        known = None if theta is None else carried.read(self, active, self._method.n_knots)

        def is_expected(loss: Tensor, gradient: Tensor, theta: Tensor) -> bool:
            if known is None:
                return False
            found = problem.dress(loss, gradient, theta)
            return agree(found, (known.state.here.loss, known.state.here.gradient), active.layout, tight=True)

        t = self.flow_time
        with self._open(closure, active, theta=theta, expected=is_expected) as (opened, accepted):
            objective, start = problem.field(opened, t)
            rtol, atol, _ = tolerances(self._rtol, self._atol, objective.resolution)
            if known is not None and opened.unchanged:
                state, seen = replace(known.state, here=start), known.seen + 1
            else:
                state, seen = Continuation(start, carried.step_size(self), None), 0

            def on_accept(knot: Knot) -> None:
                nonlocal t
                accepted.theta, t = knot.theta * problem.scale, knot.t

            try:
                piece = advance(
                    self._method,
                    objective,
                    state,
                    problem.reference,
                    rtol=rtol,
                    atol=atol,
                    ahead=seen > 0,
                    max_evals=self._max_evals,
                    on_accept=on_accept,
                )
            except BaseException:
                carried.forget(self, t)
                raise
            on_accept(piece.state.here)
        self._initialise_state()
        carried.write(self, active, piece.state, seen)
        self._keep_theta(active, accepted.theta)
        self._note_step(opened, piece, problem)
        return opened.loss if opened.returned is None else opened.returned

    def integrate(
        self,
        closure: Callable[[], Any],
        t_end: float,
        *,
        t_eval: Sequence[float] | None = None,
        stop: StoppingRule | list[StoppingRule] | tuple[StoppingRule, ...] | None = None,
        max_evals: int | None = None,
        progress: bool | Callable[[FlowReport], Any] | Progress | None = None,
    ) -> FlowSolution:
        """Follow the flow for the flow time ``t_end`` in one go; the parameters end at its last point.

        Args:
            closure: As for ``step``; one fixed objective.
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
            As ``step``; and ValueError where all lrs are zero.
        """
        active = self._active()
        if active is None:
            raise ValueError("integrate has nothing to move: all lr are 0, or no parameter requires gradients.")
        closure = self._require_closure(closure)
        t_end = check_number("t_end", t_end, above=0.0, infinite=True)
        if math.isinf(t_end) and not stop and max_evals is None:
            raise ValueError("t_end=inf needs a stopping rule (stop=...) or max_evals, or the flow would never end.")
        check_arguments((0.0, t_end), t_eval, stop, max_evals, progress)
        problem = self._problem(active)
        t = self.flow_time
        with self._open(closure, active, theta=self._known_theta(active)) as (opened, accepted):
            objective, start = problem.field(opened, t)
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
                self.solution = replace(found, loss=problem.sign * found.loss)
                accepted.theta = run.last.theta * problem.scale
                carried.forget(self, t + run.last.t, self.solution.step_size)
        self._initialise_state()
        self._keep_theta(active, accepted.theta)
        self._note(opened, self.solution.status, self.solution.message, self.solution.step_size)
        self.stats.loss, self.stats.grad_norm = problem.sign * float(run.last.loss), run.grad_norm
        self.stats.n_accepted += self.solution.n_accepted
        self.stats.n_rejected += self.solution.n_rejected
        return self.solution

    def _initialise_state(self) -> None:
        carried.initialise(self, self._method.n_knots, self._working_dtype())

    def _problem(self, active: ActiveParameters) -> FlowProblem:
        reference = carried.reference_lr(self)
        return FlowProblem(reference, (active.expand("lr") / reference).sqrt(), self._penalties(active))

    def _note_step(self, opened: Opened, piece: Piece, problem: FlowProblem) -> None:
        here = piece.state.here
        message = f"Reached the end of the step, t = {here.t:.6g}."
        if piece.end is not None and piece.end.status != "t_end":
            message = failure_message(piece.end)
            warnings.warn(f"The step ended before its time ({piece.end.status}). {message}", GradientFlowWarning, stacklevel=4)
        self._note(opened, piece.status, message, piece.state.step_size or 0.0)
        self.stats.loss = problem.sign * float(here.loss)
        self.stats.grad_norm = float((here.gradient / problem.scale).abs().max())
        self.stats.n_accepted += piece.n_accepted
        self.stats.n_rejected += piece.n_rejected

    def _note(self, opened: Opened, status: str, message: str, step_size: float) -> None:
        counts = self._counts
        self.stats = replace(
            self.stats,
            engine=opened.engine,
            engine_reason=opened.reason,
            method=self._method.name,
            step_size=step_size,
            status=status,
            message=message,
            n_closure=counts.n_closure,
            n_grad=counts.n_grad,
            n_hvp=counts.n_hvp,
            n_hessian=counts.n_hessian,
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

    def field(self, opened: Opened, t: float) -> tuple[Objective, Knot]:
        """F, and the point at the start."""
        objective = opened.objective
        if self.penalties is not None:
            objective = Regularized(objective, self.penalties)
        if bool((self.scale != 1).any()):
            objective = Rescaled(objective, self.scale**2)
        start = self.dress(opened.loss, opened.gradient, opened.theta)
        return objective, Knot(t, opened.theta / self.scale, *start)
