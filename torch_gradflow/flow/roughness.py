"""Whether a gradient is smooth enough for methods of high order."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from torch_gradflow.objectives.base import Objective

# How far along the gradient, relative to ‖θ‖, ``is_rough`` looks, and how far from 4 the ratios may be that are 4 for a smooth
# gradient: on networks with tanh, softplus, SiLU, GELU and ELU they were 3.92 to 4.01 (ELU: 4.44 on 20 points), with ReLU,
# LeakyReLU and Hardtanh, on 100 points and more, everything but that.
NEARBY, SMOOTH = (2e-2, 1e-2, 5e-3), 0.15


def is_rough(objective: Objective, theta: Tensor, gradient: Tensor) -> bool:
    """Whether the gradient is not smooth near a point, as that of a ReLU network jumps: by six more gradients.

    Second differences of a smooth gradient over δ are four times those over δ/2. Across jumps they are nothing of the kind.

    Args:
        objective: L.
        theta: θ, shape ``(P,)``.
        gradient: ∇L(θ), shape ``(P,)``.
    """
    slope = float(gradient.norm())
    if not slope:
        return False
    sizes, noise = [], 0.0
    for part in NEARBY:
        displacement = gradient * (part * float(theta.norm()) / slope)
        ahead, behind = (objective.loss_and_gradient(theta + sign * displacement)[1] for sign in (-1, 1))
        sizes.append(float((ahead - 2 * gradient + behind).norm()))
        noise = max(noise, 1e3 * objective.resolution * float(ahead.norm()))
    if not all(noise < size < math.inf for size in sizes):
        return False
    return any(abs(wide / narrow - 4) > SMOOTH for wide, narrow in pairwise(sizes))
