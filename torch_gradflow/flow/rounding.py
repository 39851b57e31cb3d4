"""What rounding does to a long flow: a gradient that is wrong by ν moves θ by ν t, however accurate the steps are.

Unless there is curvature λ in that direction: then the flow comes to rest again after 1/λ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gradflow.objectives.base import Objective

# Pairs of points from which the rounding errors are estimated, and how far they are from θ, as a power of ε: so far that
# everything is rounded anew, so near that third derivatives do not show.
N_PAIRS, DISTANCE = 4, 0.55
# Shorter flows than this times rtol, in units of 1/ε, are not worth them: gradients would have to be rounded 100 times worse
# than numbers of size 1 are.
WORTH = 1e-2


def gradient_noise(objective: Objective, theta: Tensor, direction: Tensor) -> float:
    """The rounding error of ∇L · v.

    The spread of (∇L(θ + δ) + ∇L(θ − δ)) · v over some random δ (always the same ones) with components of the size of
    ε^0.55 ‖θ‖/√P: without rounding these sums would be equal, up to third derivatives times δ².

    Args:
        objective: L.
        theta: θ, shape ``(P,)``.
        direction: v, of length 1, shape ``(P,)``.

    Returns:
        The root mean square of the error.
    """
    generator = torch.Generator().manual_seed(0)
    length = objective.resolution**DISTANCE * float(theta.square().mean().sqrt())
    sums = []
    for _ in range(N_PAIRS):
        move = length * torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta)
        there, opposite = (objective.loss_and_gradient(point)[1] for point in (theta + move, theta - move))
        sums.append(there @ direction + opposite @ direction)
    noise: float = torch.stack(sums).std().item() / 2**0.5
    return noise


def rounding_note(objective: Objective, theta: Tensor, move: Tensor, elapsed: float, rtol: float) -> str:
    """A sentence where rounding of the gradient may have moved θ by more than rtol ‖θ‖, else "".

    Only the direction in which the flow moved last is looked at: late in a flow that is a slow one.

    Args:
        objective: L.
        theta: θ at the end, shape ``(P,)``.
        move: By how much the last step moved it.
        elapsed: The flow time since the start.
        rtol: What the flow was asked for.
    """
    size = float(move.norm())
    if not elapsed * objective.resolution > WORTH * rtol or size == 0:
        return ""
    direction = move / size
    noise = gradient_noise(objective, theta, direction)
    drift = noise * min(elapsed, 1 / max(_curvature(objective, theta, direction), 1e-300))
    if not drift > rtol * float(theta.norm()):
        return ""
    return (
        f"Rounding errors of the gradient, about {noise:.1e} in the direction of the flow, may have moved θ by {drift:.1e} in "
        f"the flow time {elapsed:.3g}: more than rtol = {rtol:.1e} asks for."
    )


def _curvature(objective: Objective, theta: Tensor, direction: Tensor) -> float:
    """v · H v, from a difference of gradients."""
    length = objective.resolution ** (1 / 3) * float(theta.norm())
    if length == 0:
        return 0.0
    there, opposite = (objective.loss_and_gradient(theta + side * length * direction)[1] for side in (1, -1))
    slope: float = ((there - opposite) @ direction).item() / (2 * length)
    return slope
