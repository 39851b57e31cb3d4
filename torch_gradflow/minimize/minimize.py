"""The driver of a minimisation: method, stopping, progress, interruption, certificate → MinimizeResult."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torch_gradflow.checks import check_count, check_number
from torch_gradflow.minimize.auto import Auto
from torch_gradflow.minimize.certificate import CriticalPoint, certify
from torch_gradflow.minimize.escape import leave_saddle
from torch_gradflow.minimize.memory import free_bytes, matrix_bytes
from torch_gradflow.minimize.method import Iterate, Minimiser
from torch_gradflow.minimize.methods import find_method
from torch_gradflow.minimize.result import MinimizeChoice, MinimizeReport, MinimizeResult, MinimizeStatus
from torch_gradflow.minimize.rounding import Floor
from torch_gradflow.objectives.base import Objective, check_start

# Narrow curved valleys took up to 2000 steps on small teacher-student networks; elsewhere 10 to 100 suffice.
DEFAULT_MAX_ITER = 2000
# Methods without second derivatives take more and cheaper steps.
DEFAULT_MAX_ITER_OF_GRADIENTS = 20_000
# Iterations by which a loss of zero is looked for where the certificate is undecided, no more than there were before; and how
# often that is.
SETTLING, SETTLED_EVERY = 300, 10


def minimize(
    objective: Objective,
    theta0: Tensor,
    *,
    method: str = "auto",
    gtol: float = 1e-13,
    max_iter: int | None = None,
    certificate: bool = True,
    escape: bool = False,
    progress: bool | Callable[[MinimizeReport], Any] | None = None,
) -> MinimizeResult:
    """Find a critical point of L near ``theta0``, in the manner of ``scipy.optimize.minimize``.

    Args:
        objective: L, twice differentiable.
        theta0: The start, shape ``(P,)``.
        method: "auto", or the name of a minimiser, see ``torch_gradflow.minimize.methods``.
        gtol: Done when ‖∇L‖ in the infinity norm is at most this.
        max_iter: Most trial steps; None for 2000, or 20 000 for methods that evaluate nothing but gradients.
        certificate: Whether to classify the point that was found, see ``certify`` for what that costs.
        escape: Whether to leave a saddle that was found, along a direction in which the loss falls, and go on.
        progress: True for a progress bar, or a function that is given a ``MinimizeReport`` per iteration.

    Returns:
        The best point found. Ctrl-C ends the iteration with status "interrupted".

    Raises:
        ValueError: For arguments that make no sense, or a method that needs residuals where the objective has none.
        ImportError: For a method of a package that is not installed.
        MemoryError: If the method's dense matrices would not fit into memory, before anything is allocated.
        FloatingPointError: If loss or gradient are not finite at ``theta0``.
        DerivativeError: If the Hessian there cannot be had, or is not finite.
    """
    run = MinimizeRun(
        objective,
        theta0,
        method=method,
        gtol=gtol,
        max_iter=max_iter,
        certificate=certificate,
        escape=escape,
        progress=progress,
    )
    run.run()
    return run.result()


class MinimizeRun:
    """One minimisation: ``run`` it, then ask for its ``result``, which is usable also after an exception.

    Args: As for ``minimize``; in addition
        start: Loss and gradient at ``theta0`` where they are known.
    """

    def __init__(
        self,
        objective: Objective,
        theta0: Tensor,
        *,
        method: str = "auto",
        gtol: float = 1e-13,
        max_iter: int | None = None,
        certificate: bool = True,
        escape: bool = False,
        progress: bool | Callable[[MinimizeReport], Any] | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        check_settings(method, gtol, max_iter, certificate, escape, progress)
        check_start(objective, theta0)
        self._objective, self._method = objective, find_method(method)
        check_memory(self._method, objective.n_parameters, objective.dtype, objective.device)
        check_residuals(self._method, objective)
        self._gtol, self._max_iter = gtol, default_max_iter(self._method) if max_iter is None else max_iter
        self._wants_certificate, self._escape, self._progress = certificate, escape, progress
        self._counted_before = replace(objective.counts)
        loss, gradient = objective.loss_and_gradient(theta0) if start is None else start
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
            raise FloatingPointError(f"loss {float(loss)} or its gradient is not finite at theta0; start elsewhere.")
        self.last = Iterate(theta0.detach().clone(), loss, gradient, float("nan"), 0.0, False)
        self._first_norm = float(theta0.norm())
        self.n_iter = 0
        self._choices: list[MinimizeChoice] = []
        self.status: MinimizeStatus = "interrupted"
        self.message = "Interrupted before the first step."
        self.certificate: CriticalPoint | None = None
        self._norms = [self._grad_norm()]

    def run(self) -> None:
        """Iterate; KeyboardInterrupt ends it, any other exception is raised after the state was made consistent."""
        bar = tqdm(desc="polish", unit=" steps") if self._progress is True else None
        try:
            steps = self._steps(bar)
            self._iterate(steps)
            if self._wants_certificate:
                self._certify()
                self._settle(steps)
            while self._escape and self._left_saddle():
                steps = self._steps(bar)
                self._iterate(steps)
                self._certify()
                self._settle(steps)
        except KeyboardInterrupt:
            self.status = "interrupted"
            self.message = f"Interrupted by the user after {self.n_iter} iterations; this is the best point so far."
        except Exception as error:
            self.status, self.message = "failed", f"Failed with {type(error).__name__}: {error}"
            raise
        finally:
            if bar is not None:
                bar.set_postfix_str(f"{self._describe()}. {self.message}")
                bar.close()

    def result(self) -> MinimizeResult:
        """The best point so far."""
        counts, before = self._objective.counts, self._counted_before
        return MinimizeResult(
            theta=self.last.theta,
            loss=float(self.last.loss),
            grad_norm=self._grad_norm(),
            n_iter=self.n_iter,
            n_grad=counts.n_grad - before.n_grad,
            n_hvp=counts.n_hvp - before.n_hvp,
            n_hessian=counts.n_hessian - before.n_hessian,
            n_jacobian=counts.n_jacobian - before.n_jacobian,
            status=self.status,
            message=self.message,
            method=self._method.name,
            certificate=self.certificate,
            choices=tuple(self._choices),
        )

    def _iterate(self, steps: Iterator[Iterate]) -> None:
        if self._grad_norm() <= self._gtol:
            self._finish("converged", "")
            return
        for iterate in steps:
            if self._grad_norm() <= self._gtol:
                self._finish("converged", "")
                return
            if iterate.stuck:
                self._finish("rounding", iterate.note or "rounding errors hide any further progress")
                return
            if self.n_iter >= self._max_iter:
                self._finish("max_iter", f"max_iter={self._max_iter} was reached while {self._speed()}")
                return

    def _steps(self, bar: Any) -> Iterator[Iterate]:
        """The method's iterates from the last point on, each noted and shown."""
        for iterate in self._method.iterate(self._objective, self.last.theta, self.last.loss, self.last.gradient):
            self.last = iterate
            if iterate.note and not iterate.stuck:
                self._choices.append(MinimizeChoice(self.n_iter, iterate.method, iterate.note))
            self.n_iter += 1
            self._norms.append(self._grad_norm())
            self._show(bar)
            yield iterate

    def _settle(self, steps: Iterator[Iterate]) -> None:
        """Go on where "auto" converged and the certificate is undecided: the loss, a sum of squares, may become zero.

        On T33 half of the ends with zero loss need up to 100 further iterations. Where it does not become zero, the point
        stays what it was.
        """
        point, converged = self.certificate, self.last
        undecided = point is not None and point.end == "undecided" and self.status == "converged"
        if not (undecided and self._objective.has_residuals and isinstance(self._method, Auto)):
            return
        before, settled = self.n_iter, False
        try:
            for iterate in islice(steps, min(SETTLING, self.n_iter, self._max_iter - self.n_iter)):
                if (self.n_iter - before) % SETTLED_EVERY == 0 or iterate.stuck:
                    floor = Floor.at(self._objective, iterate.theta, iterate.loss, iterate.gradient)
                    settled = floor.is_zero_loss(self._objective, iterate.loss)
                if settled or iterate.stuck:
                    break
        finally:
            if not settled:
                self.last = converged
        if settled:
            self._finish("converged", "")
            self._certify()

    def _certify(self) -> None:
        try:
            self.certificate = certify(self._objective, self.last.theta, gtol=self._gtol)
        except RuntimeError as error:  # the point stands, whatever its Hessian is
            self.message = f"{self.message} No certificate: {str(error).splitlines()[0]}"

    def _left_saddle(self) -> bool:
        """Leave the point if it is a saddle, and iterations are left."""
        point = self.certificate
        if point is None or point.kind != "saddle" or self.n_iter >= self._max_iter:
            return False
        theta = leave_saddle(self._objective, self.last.theta, point)
        if torch.equal(theta, self.last.theta):
            return False
        self.last = Iterate(theta, *self._objective.loss_and_gradient(theta), float("nan"), 0.0, False)
        self._choices.append(MinimizeChoice(self.n_iter, self._method.name, f"a saddle was left: {point.message}"))
        return True

    def _finish(self, status: MinimizeStatus, why: str) -> None:
        norm = f"the gradient norm is {self._grad_norm():.2e}"
        self.status = status
        if status == "converged":
            self.message = f"Converged after {self.n_iter} iterations: {norm}, at most gtol = {self._gtol:.1e}."
        else:
            self.message = f"Stopped after {self.n_iter} iterations because {why}: {norm}, gtol = {self._gtol:.1e}."

    def _speed(self) -> str:
        window = self._norms[-min(21, len(self._norms)) :]
        growth = float(self.last.theta.norm()) / max(self._first_norm, 1e-300)
        grows = f"; the norm of the parameters grew {growth:.1f} times: a minimum may lie at infinity, and weight_decay "
        grows = f"{grows}or max_norm would bound it" if growth > 2 else ""
        if window[-1] < 0.9 * window[0]:
            return (
                f"it was still converging (from {window[0]:.2e} to {window[-1]:.2e} over the last {len(window) - 1} "
                f"iterations{grows})"
            )
        return f"the gradient norm hardly fell (from {window[0]:.2e} over the last {len(window) - 1} iterations{grows})"

    def _show(self, bar: Any) -> None:
        report = MinimizeReport(
            self.n_iter, float(self.last.loss), self._grad_norm(), self.last.smallest_eigenvalue, self.last.radius
        )
        if bar is not None:
            bar.set_postfix_str(self._describe(), refresh=False)
            bar.update(1)
        elif callable(self._progress):
            self._progress(report)

    def _describe(self) -> str:
        lowest = self.last.smallest_eigenvalue
        return f"loss = {float(self.last.loss):.6e}, |grad| = {self._grad_norm():.2e}, lowest eigenvalue = {lowest:.1e}"

    def _grad_norm(self) -> float:
        return float(self.last.gradient.abs().max())


def check_settings(method: str, gtol: float, max_iter: int | None, certificate: bool, escape: bool, progress: object) -> None:
    """Check what ``minimize`` and ``NewtonPolish`` are given.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    find_method(method)
    check_number("gtol", gtol, least=0.0)
    if max_iter is not None:
        check_count("max_iter", max_iter)
    if not isinstance(certificate, bool):
        raise TypeError(f"certificate must be True or False, not {certificate!r}.")
    if not isinstance(escape, bool):
        raise TypeError(f"escape must be True or False, not {escape!r}.")
    if escape and not certificate:
        raise ValueError("escape=True needs certificate=True: it is the certificate that tells a saddle.")
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be True, False or a function of a MinimizeReport, not {progress!r}.")


def default_max_iter(method: Minimiser) -> int:
    """Where the user leaves it open."""
    return DEFAULT_MAX_ITER_OF_GRADIENTS if method.needs == {"gradient"} else DEFAULT_MAX_ITER


def check_residuals(method: Minimiser, objective: Objective) -> None:
    """Refuse a method that needs residuals where there are none.

    Raises:
        ValueError: With what would serve.
    """
    if "residuals" in method.needs and not objective.has_residuals:
        raise ValueError(
            f"method={method.name!r} needs a sum of squares, and this objective is none that is known as such: use a mean "
            "squared error of a recognised perceptron or a ModuleObjective, or method='auto'."
        )


def check_memory(method: Minimiser, n_parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse dense matrices that would not fit into free memory.

    Raises:
        MemoryError: With the size they would take.
    """
    matrix, free = matrix_bytes(n_parameters, dtype), free_bytes(device)
    if method.matrices * matrix > free:
        raise MemoryError(
            f"the dense Hessian of {n_parameters:,} parameters takes {matrix / 2**30:,.1f} GiB, and about {method.matrices} "
            f"such matrices are needed, but {free / 2**30:,.1f} GiB are free. Polish with method='trust-region-lanczos', "
            "which needs none, or freeze layers (requires_grad=False, or lr=0 in their group)."
        )
