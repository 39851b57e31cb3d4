"""What the rounding of θ does to the loss and its derivatives: below it, "zero" means nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.objectives.base import Objective

# Gradients at points that differ from θ by rounding.
ROUNDINGS = 8
# How often the root mean square change of a component of the gradient counts as zero, and a loss as that of perfect data.
GRADIENT_FACTOR, LOSS_FACTOR = 4.0, 100.0


def rounded(objective: Objective, theta: Tensor, times: int) -> Iterator[Tensor]:
    """Points at which each component of θ is one unit in the last place away, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        signs = torch.randint(0, 2, (len(theta),), generator=generator).to(theta) * 2 - 1
        yield theta + objective.resolution * signs * theta


@dataclass(frozen=True)
class Floor:
    """The root mean square changes of loss and gradient when θ is rounded at random.

    They hold what the evaluation itself rounds, as far as that changes from point to point, and how near to a zero a rounded
    θ can come at all. At the least they are the rounding of the result, ε |∇L|.

    Attributes:
        loss: Of L.
        gradient: Of each component of ∇L, shape ``(P,)``.
    """

    loss: float
    gradient: Tensor

    @classmethod
    def at(cls, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Floor:
        """From 8 gradients near θ, where loss and gradient are given."""
        of_loss, of_gradient = torch.zeros_like(loss), torch.zeros_like(gradient)
        for point in rounded(objective, theta, ROUNDINGS):
            there, slope = objective.loss_and_gradient(point)
            of_loss += (there - loss) ** 2
            of_gradient += (slope - gradient) ** 2
        eps = objective.resolution
        return cls(
            float(torch.maximum((of_loss / ROUNDINGS).sqrt(), eps * loss.abs()).nan_to_num(0.0)),
            torch.maximum((of_gradient / ROUNDINGS).sqrt(), eps * gradient.abs()).nan_to_num(0.0),
        )

    def tolerance(self, gradient: Tensor, gtol: float) -> float:
        """Up to which infinity norm a gradient of this direction is zero.

        The first component that exceeds both gtol and its own floor decides; so a slope in a soft direction is seen beside
        the rounding of a stiff one.
        """
        each = (GRADIENT_FACTOR * self.gradient).clamp(min=gtol)
        moving = gradient != 0
        if not bool(moving.any()) or not bool(torch.isfinite(gradient).all()):
            return float(each.max())
        return float(gradient.abs().max()) * float((each[moving] / gradient[moving].abs()).min())

    def is_zero_loss(self, objective: Objective, loss: Tensor) -> bool:
        """Whether L, as a sum of squares never negative, is zero up to rounding."""
        return objective.has_residuals and float(loss) <= LOSS_FACTOR * self.loss
