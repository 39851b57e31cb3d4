"""Exact trust-region Newton: the subproblem is solved on the eigendecomposition of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.objectives.base import DerivativeError, Objective


@dataclass(frozen=True)
class Iterate:
    """A point of the iteration.

    Attributes:
        theta: Shape ``(P,)``.
        loss: L, a 0-dimensional tensor.
        gradient: ∇L, shape ``(P,)``.
        smallest_eigenvalue: Of the Hessian at the point from which the step was made.
        radius: Of the trust region for the next step.
        stuck: Whether rounding errors hide any further progress.
    """

    theta: Tensor
    loss: Tensor
    gradient: Tensor
    smallest_eigenvalue: float
    radius: float
    stuck: bool


@dataclass(frozen=True)
class TrustRegionNewton:
    """Newton's method in a ball, for any Hessian: definite, indefinite or singular (Moré and Sorensen 1983).

    A step is accepted when the loss falls by enough of what the quadratic model predicts (Conn, Gould and Toint, Trust
    Region Methods, 2000, algorithm 6.1.1). Where the predicted fall is below the rounding of the loss, that test is
    noise: then a step is accepted when it reduces the gradient norm and does not raise the loss beyond rounding. This
    takes the gradient to round-off, where tests on the loss alone stop at its square root.

    Attributes:
        accept: Least ratio of actual to predicted reduction.
        shrink_below: Ratio under which the radius shrinks to a quarter of the step.
        grow_above: Ratio over which the radius grows by 2.5 where it limited the step.
        max_rejections: Rejected steps in a row in the rounding regime after which it is stuck.
    """

    accept: float = 1e-4
    shrink_below: float = 0.25
    grow_above: float = 0.75
    max_rejections: int = 4
    name: str = "trust-region"

    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """Yield one iterate per trial step, without end; the first costs one Hessian, each accepted step another."""
        eps = objective.resolution
        radius = 0.1 * (1.0 + float(theta.norm()))
        largest = 1e3 * radius
        rejections = 0
        hessian = objective.hessian(theta)
        if not bool(torch.isfinite(hessian).all()):
            raise DerivativeError("the Hessian is not finite at the start: the loss is not twice differentiable there.")
        values, vectors = torch.linalg.eigh(hessian)
        while True:
            components = vectors.T @ gradient
            step, predicted = solve_subproblem(values, components, radius)
            length = float(step.norm())
            trial = theta + vectors @ step
            new_loss, new_gradient = objective.loss_and_gradient(trial)
            finite = bool(torch.isfinite(new_loss)) and bool(torch.isfinite(new_gradient).all())
            noise = 256 * eps * abs(float(loss))
            rounding = predicted <= noise
            if not finite:
                ratio, accepted = -1.0, False
            elif rounding:
                accepted = float(new_gradient.norm()) < float(gradient.norm()) and float(new_loss - loss) <= noise
                ratio = 1.0 if accepted else 0.0
            else:
                ratio = float(loss - new_loss) / predicted
                accepted = ratio > self.accept
                # A loss that is the difference of larger numbers is rounded more coarsely than its size tells.
                newton = float(values[0]) > 0 and length < 0.99 * radius
                if not accepted and newton and abs(float(new_loss - loss)) <= 1e3 * eps:
                    accepted = float(new_gradient.norm()) < 0.5 * float(gradient.norm())
                    ratio = 1.0 if accepted else ratio
            if ratio < self.shrink_below:
                radius = 0.25 * length
            elif ratio > self.grow_above and length > 0.9 * radius:
                radius = min(2.5 * radius, largest)
            rejections = 0 if accepted else rejections + 1
            if accepted:
                theta, loss, gradient = trial, new_loss, new_gradient
                if bool((gradient != 0).any()):
                    hessian = objective.hessian(theta)
                    if bool(torch.isfinite(hessian).all()):
                        values, vectors = torch.linalg.eigh(hessian)
            stuck = (rounding and rejections >= self.max_rejections) or not radius > eps * float(theta.norm()) * 1e-2
            yield Iterate(theta, loss, gradient, float(values[0]), radius, stuck)


def solve_subproblem(values: Tensor, components: Tensor, radius: float) -> tuple[Tensor, float]:
    """Minimise g·p + ½ p·Λp over ‖p‖ ≤ Δ, in the basis of eigenvectors.

    The solution is p_i = −g_i/(λ_i + μ) with the least μ ≥ max(0, −λ_1) for which ‖p‖ ≤ Δ; where g has no component
    along the lowest eigenvectors (the hard case), a multiple of the lowest one is added (Moré and Sorensen, 1983,
    Computing a Trust Region Step, SIAM J. Sci. Stat. Comput. 4, 553–572).

    Args:
        values: λ, the eigenvalues, ascending, shape ``(P,)``.
        components: g in the eigenbasis, shape ``(P,)``.
        radius: Δ > 0.

    Returns:
        p in the eigenbasis, and the predicted reduction −(g·p + ½ p·Λp) ≥ 0.
    """
    lowest = float(values[0])
    eps = torch.finfo(values.dtype).eps
    if lowest > 0:
        step = -components / values
        if float(step.norm()) <= radius:
            return step, _reduction(values, components, step)
    norm = float(components.norm())
    bottom = values - lowest <= eps * max(abs(lowest), abs(float(values[-1])))
    least = max(0.0, -lowest)
    if lowest <= 0 and float(components[bottom].norm()) <= 16 * eps * norm:
        shifted = torch.where(bottom, 1.0, values + least)
        step = torch.where(bottom, 0.0, -components / shifted)
        length = float(step.norm())
        if length < radius:
            step[int(bottom.nonzero()[0])] = math.sqrt(radius**2 - length**2) if lowest < 0 else 0.0
            return step, _reduction(values, components, step)
    # ‖p(μ)‖ falls with μ; Newton's method on 1/‖p‖ − 1/Δ, kept inside a bracket. (μ + λ_1 is the unknown, so that
    # nothing cancels where it is small.)
    lower, upper = max(0.0, lowest), norm / radius + max(0.0, lowest)
    shift = min(max(norm / radius, lower), upper)
    gaps = values - lowest
    for _ in range(100):
        denominator = gaps + shift
        step = -components / denominator
        length = float(step.norm())
        if not abs(length - radius) > 1e-3 * radius:
            break
        if length > radius:
            lower = shift
        else:
            upper = shift
        slope = float((components**2 / denominator**3).sum())
        proposal = shift + length**2 / slope * (length - radius) / radius if slope > 0 else math.inf
        middle = math.sqrt(lower * upper) if lower > 0 else max(0.5 * upper, 0.0)
        shift = proposal if lower < proposal < upper else (0.5 * (lower + upper) if lower > 0.1 * upper else middle)
        if shift <= 0.0 or not math.isfinite(shift):
            shift = 1e-3 * upper
    if float(step.norm()) > radius:  # type: ignore[possibly-undefined]  # the loop runs at least once
        step = step * (radius / float(step.norm()))
    return step, _reduction(values, components, step)


def _reduction(values: Tensor, components: Tensor, step: Tensor) -> float:
    return -float(components @ step + 0.5 * (values * step) @ step)
