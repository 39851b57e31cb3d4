"""NewtonPolish: the optimizer that takes parameters to a fixed point of the gradient flow, to the last digit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.minimize.methods import find_method
from torch_gradflow.minimize.minimize import MinimizeRun, check_memory, check_settings
from torch_gradflow.minimize.result import MinimizeReport, MinimizeResult
from torch_gradflow.objectives.base import ClosureError, DerivativeError, Objective
from torch_gradflow.objectives.distributed import LossReduction, find_processes
from torch_gradflow.objectives.loop import NoRecord
from torch_gradflow.objectives.opened import Engine
from torch_gradflow.objectives.record import Recording
from torch_gradflow.objectives.regularized import Regularized
from torch_gradflow.optim.closure_optimizer import ActiveParameters, ClosureOptimizer, ObjectiveSettings, Params
from torch_gradflow.uncompiled import uncompiled


class NewtonPolish(ClosureOptimizer):
    """Minimises to a critical point with exact second derivatives; one ``step`` goes to the end.

    Meant for the end of a flow or of a training run: from a point near a minimum it brings the gradient to round-off in a
    few steps, never going uphill, and says with a certificate what kind of point was found. From far away it works too,
    but a minimum it finds is then not the one to which the flow leads.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer; dense, real, on one device.
        lr: Only whether it is zero matters: ``lr=0`` freezes a group.
        method: "auto", or the name of a minimiser, see ``torch_gradflow.minimize.methods``: for instance "trust-region"
            (Newton on dense Hessians), "trust-region-lanczos" (without matrices), "levenberg-marquardt", "bfgs", "lbfgs".
        gtol: Done when ‖∇L‖ in the infinity norm is at most this. float64 resolves 1e-13 on well-scaled problems; float32
            about 1e-5, and the status is then "rounding".
        max_iter: Most trial steps; None for 2000, or 20 000 for methods that evaluate nothing but gradients.
        weight_decay: λ: adds λ/2 ‖θ‖² to L.
        max_norm: c: adds the barrier (w − c)³/3 for w = ‖θ‖²/(2P) > c.
        maximize: Maximise L instead. The penalties are minimised all the same.
        dtype: ``torch.float64`` computes in float64 on a float32 model; parameters are rounded at the end.
        engine: "auto", "perceptron", "replay" or "closure", see ``GradientFlow``.
        check: Check the closure's contract on the first step, with two more calls of it.
        record: Whether ``zero_grad()`` records the forward pass that follows, for ``step()`` without a closure.
        certificate: Whether to classify the point, see ``certify`` for what that costs.
        escape: Whether to leave a saddle that was found, along a direction in which the loss falls, and go on.
        progress: True for a progress bar, or a function that is given a ``MinimizeReport`` per iteration.
        process_group: The ``torch.distributed`` process group among whose processes the data are divided, usually
            ``torch.distributed.group.WORLD``; None: all data are here. The loss is that of all data; every process has the
            same parameters, and runs the same loop with its own data. The model may be bare, or in DistributedDataParallel
            (which averages ``.grad`` with equal weights: in a loop without a closure shards have to be of equal size then).
            ``.grad`` is the gradient of the whole loss after a step. Process 0 alone reports progress.
        shard_size: How many samples this process has, where its loss is their mean: losses are weighted accordingly. None:
            equal weights, for shards of equal size.
        reduction: "mean" if the loss of a process is a mean over its samples; "sum" if it is a sum, so that losses are added.

    Attributes:
        result: The ``MinimizeResult`` of the last step, or None; ``result.certificate`` is a ``CriticalPoint``.

    Raises:
        ValueError, TypeError: For arguments that make no sense, naming them.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        *,
        method: str = "auto",
        gtol: float = 1e-13,
        max_iter: int | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        maximize: bool = False,
        dtype: torch.dtype | None = None,
        engine: Engine = "auto",
        check: bool = True,
        record: bool = True,
        certificate: bool = True,
        escape: bool = False,
        progress: bool | Callable[[MinimizeReport], Any] | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        shard_size: int | None = None,
        reduction: LossReduction = "mean",
    ) -> None:
        check_settings(method, gtol, max_iter, certificate, escape, progress)
        self._run: dict[str, Any] = {
            "method": method,
            "gtol": gtol,
            "max_iter": max_iter,
            "certificate": certificate,
            "escape": escape,
            "progress": progress,
        }
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        processes = find_processes(process_group, shard_size, reduction)
        super().__init__(params, defaults, ObjectiveSettings(max_norm, dtype, engine, check, record, processes))

    def _forget(self) -> None:
        super()._forget()
        self.result: MinimizeResult | None = None
        self._waited = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": self._run}

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Minimise to the end.

        Args:
            closure: Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss. Without one, the
                forward pass since ``zero_grad()`` is taken, which must have been recorded; in a loop that ends with
                ``zero_grad()`` the first step, before anything could be recorded, moves nothing.

        Returns:
            The loss at the end, as a 0-dimensional tensor (without the penalties' part, if any, it would not be what was
            minimised: with weight decay or barrier it is the regularised loss). With all ``lr`` zero the closure is
            called once, its loss returned, and nothing moves.

        Raises:
            ClosureError: If there is no closure, and no record of the loop that serves, with the reason; or if the
                closure breaks its contract.
            DerivativeError: If its second derivatives cannot be had or confirmed.
            ImportError: For a method of a package that is not installed.
            MemoryError: If the method's dense matrices would not fit into memory; nothing was changed.
            FloatingPointError: If loss or gradient are not finite at the start.
            KeyboardInterrupt: After Ctrl-C; the parameters are the best point so far, and ``result`` is set.
        """
        with self._step_begun() as recording:
            active = self._active()
            if active is None:
                return self._without_motion(closure)
            self._check_closure(closure)
            layout = active.layout
            method = find_method(self._run["method"])
            self._processes.check(lambda: check_memory(method, layout.n_parameters, layout.dtype, layout.device))
            try:
                return self._polish(closure, recording, active)
            except NoRecord as why:
                if not self._waits_for_record(recording):
                    raise ClosureError(
                        f"{type(self).__name__}.step() without a closure has to evaluate the loss at other parameters, but "
                        f"{why}. Mend that, or write the pass as a closure and call step(closure)."
                    ) from None
        return None

    def _waits_for_record(self, recording: Recording | None) -> bool:
        """Whether the loop may be one that ends with ``zero_grad()``, in its first iteration."""
        first, self._waited = not self._waited, True
        return (
            first and recording is None and not self._loop.zeroed and self._settings.record and self._settings.engine == "auto"
        )

    def _polish(self, closure: Callable[[], Any] | None, recording: Recording | None, active: ActiveParameters) -> Tensor:
        with self._open(closure, recording, active, theta=self._known_theta(active)) as (opened, reached):
            if self._memory.not_a_gradient:
                raise DerivativeError(
                    f"the gradient in .grad is not that of the loss: {self._memory.not_a_gradient}. Either gradients are "
                    "changed after the backward pass (clipping, hooks), or there is a detached target or a straight-through "
                    "estimator: no Hessian belongs to both."
                )
            penalties = self._penalties(active)
            sign = 1.0 if penalties is None else penalties.sign

            def polish(objective: Objective) -> Tensor:
                start = (opened.loss, opened.gradient)
                if penalties is not None:
                    objective, start = Regularized(objective, penalties), penalties.add(opened.theta, *start)
                run = MinimizeRun(objective, opened.theta, start=start, **self._run)
                try:
                    run.run()
                finally:
                    reached.theta = run.last.theta
                    found = run.result()
                    reached.result = replace(found, loss=sign * found.loss)
                return sign * run.last.loss

            try:
                loss = self._processes.lead(opened.objective, reached, polish)
            finally:
                self.result = reached.result or self.result
        self._keep_theta(active, reached.theta)
        if reached.result.status == "interrupted":
            raise KeyboardInterrupt(reached.result.message)
        return loss

    def _initialise_state(self) -> None:
        """A polish carries nothing from step to step but θ in the type in which it computes."""
        dtype = self._working_dtype()
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and not self.state[p]:
                    self.state[p] = {"theta": p.detach().to(dtype, copy=True)}
