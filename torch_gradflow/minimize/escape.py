"""Leaving a saddle along negative curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gradflow.minimize.certificate import CriticalPoint
from torch_gradflow.objectives.base import Objective

# The first trial length, relative to 1 + ‖θ‖, and how often it is doubled or halved.
FIRST, TRIALS = 1e-3, 40


def leave_saddle(objective: Objective, theta: Tensor, point: CriticalPoint) -> Tensor:
    """A point with a lower loss, along the direction in which the certificate saw the loss fall.

    Of the two signs the one with the lower loss is taken, and the step is doubled as long as the loss keeps falling.

    Args:
        objective: L(θ).
        theta: The saddle, shape ``(P,)``.
        point: What ``certify`` says of it.

    Returns:
        The new θ; θ itself where rounding lets no lower loss be found.

    Raises:
        ValueError: If the point is not a saddle.
    """
    direction = point.descent
    if direction is None:
        raise ValueError(f"point must be a saddle, with a direction in which the loss falls, not a {point.kind!r}.")
    start = float(objective.loss_and_gradient(theta)[0])
    noise = 4 * objective.resolution * abs(start)

    def loss_at(length: float) -> float:
        loss = objective.loss_and_gradient(theta + length * direction)[0]
        return float(loss) if bool(torch.isfinite(loss)) else float("inf")

    length = FIRST * (1 + float(theta.norm()))
    for _ in range(TRIALS):
        best = min((loss_at(sign * length), sign * length) for sign in (1.0, -1.0))
        if best[0] < start - noise:
            break
        length *= 0.5 if best[0] > start + noise else 2.0  # a barrier is near; rounding hides the fall
    else:
        return theta
    for _ in range(TRIALS):
        further = loss_at(2 * best[1])
        if not further < best[0]:
            break
        best = (further, 2 * best[1])
    return theta + best[1] * direction
