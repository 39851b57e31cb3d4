"""Whether a point is better than another, where rounding hides the difference of the losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The rounding of a loss, in units of its last place: it is a sum over many samples.
LOSS_NOISE = 256


@dataclass(frozen=True)
class Point:
    """θ with its loss and gradient.

    Attributes:
        theta: Shape ``(P,)``.
        loss: L, a 0-dimensional tensor.
        gradient: ∇L, shape ``(P,)``.
    """

    theta: Tensor
    loss: Tensor
    gradient: Tensor

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return bool(torch.isfinite(self.loss)) and bool(torch.isfinite(self.gradient).all())


@dataclass(frozen=True)
class Judgement:
    """What a trial step is worth.

    Attributes:
        accepted: Whether to take it.
        ratio: Actual over predicted reduction of the loss; 1 or 0 where the gradient norm decided, −1 where the trial point
            has no finite loss or gradient.
        rounding: Whether the predicted reduction is below the rounding of the loss.
    """

    accepted: bool
    ratio: float
    rounding: bool


def loss_noise(loss: Tensor, resolution: float) -> float:
    """Differences of losses up to this say nothing."""
    return LOSS_NOISE * resolution * abs(float(loss))


def judge(point: Point, trial: Point, predicted: float, resolution: float, *, newton: bool, accept: float = 1e-4) -> Judgement:
    """Accept a trial step by its loss, or by its gradient norm where rounding hides the change of the loss.

    A step is accepted when the loss falls by enough of what the model predicts (Conn, Gould and Toint, Trust Region
    Methods, 2000, algorithm 6.1.1). Where the predicted fall is below the rounding of the loss, that test is noise: then a
    step is accepted when it reduces the gradient norm and does not raise the loss beyond rounding. This takes the gradient
    to round-off, where tests on the loss alone stop at its square root.

    Args:
        point: Where the step begins.
        trial: Where it ends.
        predicted: The reduction of the loss by the model, ≥ 0.
        resolution: Rounding unit of loss and gradient.
        newton: Whether it is the full Newton step of a convex model.
        accept: Least ratio of actual to predicted reduction.
    """
    noise = loss_noise(point.loss, resolution)
    rounding = predicted <= noise
    if not trial.finite:
        return Judgement(False, -1.0, rounding)
    rise = float(trial.loss - point.loss)
    before, after = float(point.gradient.norm()), float(trial.gradient.norm())
    if rounding:
        accepted = after < before and rise <= noise
        return Judgement(accepted, float(accepted), rounding)
    ratio = -rise / predicted
    # A loss that is the difference of larger numbers is rounded more coarsely than its size tells.
    if ratio <= accept and newton and abs(rise) <= 1e3 * resolution and after < 0.5 * before:
        return Judgement(True, 1.0, rounding)
    return Judgement(ratio > accept, ratio, rounding)


def improves(best: Point, point: Point, resolution: float) -> bool:
    """Whether ``point`` is finite and has a lower loss, or one that cannot be told from it and a smaller gradient."""
    if not point.finite:
        return False
    rise, noise = float(point.loss - best.loss), loss_noise(best.loss, resolution)
    return rise < -noise or (rise <= noise and float(point.gradient.norm()) < float(best.gradient.norm()))
