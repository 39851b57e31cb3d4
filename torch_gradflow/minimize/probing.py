"""What the loss does along the null directions of a Hessian, each time at the valley floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.objectives.base import Objective

# Null directions that are probed one by one; beyond, as many random combinations of them.
MAX_PROBES = 64
# Lengths of the probes, relative to the longest, and how many of them are tried in any case.
SHRINKS, ALWAYS = (1.0, 2**-2, 2**-4, 2**-6, 2**-8), 3
# That the loss stays the same is convincing only where a fourth derivative of this part of the curvature would be seen.
SEEN = 1e-3
# Steps back to the valley floor.
CHORD_STEPS = 20
Answer = Literal["falls", "rises", "stays", "unclear"]


@dataclass(frozen=True)
class Steep:
    """The directions that are not null.

    Attributes:
        vectors: Linearly independent, shape ``(P, m)``: eigenvectors, if need be scaled.
        curvature: The eigenvalues that belong to them, shape ``(m,)``.
    """

    vectors: Tensor
    curvature: Tensor

    def chord_step(self, gradient: Tensor) -> Tensor:
        """The Newton step in these directions."""
        return -self.vectors @ ((self.vectors.T @ gradient) / self.curvature)


@dataclass(frozen=True)
class Probe:
    """The answer.

    Attributes:
        answer: "falls" (along one direction at least), "rises" (along all of them), "stays" (the loss falls along none and
            keeps its value along some), or "unclear".
        descent: A unit vector along which it falls, shape ``(P,)``, or None.
    """

    answer: Answer
    descent: Tensor | None = None


def probe(
    objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor, flat: Tensor, steep: Steep, bend: float
) -> Probe:
    """Move along each null direction, and back to the valley floor in the others; compare the loss with that at θ.

    Args:
        objective: L.
        theta: The point, shape ``(P,)``.
        loss: L there.
        gradient: ∇L there.
        flat: An orthonormal basis of the null directions, shape ``(P, n)``.
        steep: The others.
        bend: The largest eigenvalue in size.
    """
    n = flat.shape[1]
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, min(n, MAX_PROBES) if n > MAX_PROBES else 4, generator=generator, dtype=torch.float64)
    random = flat @ (mix / mix.norm(dim=0)).to(theta)
    directions = random if n > MAX_PROBES else torch.cat([flat, random], dim=1)
    length = 0.01 * (1 + float(theta.norm()))
    noise_of_loss = 1e3 * objective.resolution * abs(float(loss))
    answers = set()
    for direction in [*directions.T, *(-directions.T)]:
        answer: Answer = "unclear"
        for k, shrink in enumerate(SHRINKS):  # what happens nearest to the point counts
            if k >= ALWAYS and answer != "unclear":
                break
            reach = shrink * length
            point = theta + reach * direction
            start = objective.loss_and_gradient(point)
            if not bool(torch.isfinite(start[0])):
                answer = "unclear"
                break
            floor = _valley_floor(objective, point, *start, reach, steep)
            if floor is None:
                continue
            noise = noise_of_loss + 4 * float(gradient.norm()) * reach
            change, seen = float(floor - loss), SEEN * bend * reach**4 / 24
            if change < -noise:
                answer = "falls"
            elif change > max(noise, seen):
                answer = "rises"
            elif noise <= seen and answer == "unclear":
                answer = "stays"
        if answer == "falls":
            return Probe("falls", direction)
        answers.add(answer)
    return Probe("unclear" if "unclear" in answers else "stays" if "stays" in answers else "rises")


def _valley_floor(
    objective: Objective, point: Tensor, loss: Tensor, slope: Tensor, reach: float, steep: Steep
) -> Tensor | None:
    """The loss near a point after chord Newton steps in the steep directions; None where these do not settle."""
    if len(steep.curvature) == 0:
        return loss
    for _ in range(CHORD_STEPS):
        if not bool(torch.isfinite(slope).all()):
            return None
        move = steep.chord_step(slope)
        point = point + move
        loss, slope = objective.loss_and_gradient(point)
        if float(move.norm()) <= 1e-3 * reach * objective.resolution**0.5:
            return loss if bool(torch.isfinite(loss)) else None
    return None
