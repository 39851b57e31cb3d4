"""The letters of a splitting, each as a function that moves one tensor of parameters in place. See ``splitting``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Coefficients:
    """The numbers of a parameter group, at the present temperature.

    Attributes:
        lr: h, the step size.
        temperature: τ.
        friction: γ.
        noise: σ.
        coupling: ε.
        weight_decay: λ of the Gaussian prior λ/2 ‖θ‖².
        sign: −1 if the objective is maximised, else 1.
        bounds: Between which the parameters are kept, or None.
        generator: Of the noise.
    """

    lr: float
    temperature: float
    friction: float
    noise: float
    coupling: float
    weight_decay: float
    sign: float
    bounds: Bounds | None
    generator: torch.Generator | None

    @classmethod
    def of(cls, group: Mapping[str, Any], annealing: float, generator: torch.Generator | None) -> Coefficients:
        """Those of ``group``, its temperature times ``annealing``."""
        return cls(
            float(group["lr"]),
            annealing * float(group["temperature"]),
            float(group["friction"]),
            float(group["noise"]),
            float(group["coupling"]),
            float(group["weight_decay"]),
            -1.0 if group["maximize"] else 1.0,
            group["bounds"],
            generator,
        )


class Moving(NamedTuple):
    """One tensor of parameters with what belongs to it.

    Attributes:
        position: θ.
        gradient: The loss's gradient there.
        state: The optimizer's: "momentum", "xi" (0-dimensional) and "variance", as far as the letters need them.
        by: The group's numbers.
    """

    position: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]
    by: Coefficients


def drift(at: Moving, t: float) -> None:
    """A: the parameters move with their momenta, and are reflected at bounds."""
    momentum = at.state["momentum"]
    at.position.add_(momentum, alpha=t)
    if at.by.bounds is not None:
        momentum.mul_(reflect(at.position, at.by.bounds))


def kick(at: Moving, t: float) -> None:
    """B: the momenta follow the force."""
    add_force(at.state["momentum"], at, t)


def ornstein_uhlenbeck(at: Moving, t: float) -> None:
    """O: friction and noise of fixed strength, exactly; an infinite friction draws the momenta anew."""
    decay = math.exp(-at.by.friction * t) if t > 0.0 else 1.0
    momentum = at.state["momentum"].mul_(decay)
    add_noise(momentum, math.sqrt(at.by.temperature * (1.0 - decay * decay)), at.by.generator)


def adaptive_friction(at: Moving, t: float) -> None:
    """C: friction of the present strength ξ."""
    at.state["momentum"].mul_(torch.exp(-t * at.state["xi"]))


def noise(at: Moving, t: float) -> None:
    """D: noise of the strength σ."""
    add_noise(at.state["momentum"], at.by.noise * math.sqrt(t), at.by.generator)


def regulate(at: Moving, t: float) -> None:
    """E: ξ grows while the momenta are hotter than the temperature, and falls while they are colder."""
    momentum = at.state["momentum"].reshape(-1)
    excess = torch.dot(momentum, momentum) - momentum.numel() * at.by.temperature
    at.state["xi"].add_(excess, alpha=t * at.by.coupling)


def covariance_friction(at: Moving, t: float) -> None:
    """V: friction that takes out the heat of the gradient's noise, element by element."""
    at.state["momentum"].mul_((at.state["variance"] * (-0.5 * t * at.by.lr / at.by.temperature)).exp_())


def descend(at: Moving, t: float) -> None:
    """G: the parameters follow the force themselves."""
    add_force(at.position, at, t)
    if at.by.bounds is not None:
        reflect(at.position, at.by.bounds)


def diffuse(at: Moving, t: float) -> None:
    """W: Brownian motion of the parameters."""
    add_noise(at.position, math.sqrt(2.0 * at.by.temperature * t), at.by.generator)
    if at.by.bounds is not None:
        reflect(at.position, at.by.bounds)


MOTIONS: dict[str, Callable[[Moving, float], None]] = {
    "A": drift,
    "B": kick,
    "O": ornstein_uhlenbeck,
    "C": adaptive_friction,
    "D": noise,
    "E": regulate,
    "V": covariance_friction,
    "G": descend,
    "W": diffuse,
}


def add_force(target: Tensor, at: Moving, t: float) -> None:
    """Add −t(∇L + λθ) to ``target``."""
    if at.by.weight_decay != 0.0:  # first, as ``target`` may be θ itself
        target.add_(at.position, alpha=-t * at.by.weight_decay)
    target.add_(at.gradient, alpha=-t * at.by.sign)


def add_noise(target: Tensor, scale: float, generator: torch.Generator | None) -> None:
    """Add independent normal numbers of standard deviation ``scale``; none are drawn where it is zero."""
    if scale != 0.0:
        drawn = torch.randn(target.shape, dtype=target.dtype, device=target.device, generator=generator)
        target.add_(drawn, alpha=scale)


def reflect(position: Tensor, bounds: Bounds) -> Tensor:
    """Fold ``position`` into [low, high] in place, as if it had been reflected at both ends as often as needed.

    Returns:
        −1 where the direction of motion was turned round, else 1; the shape of ``position``.
    """
    low, high = bounds
    width = high - low
    if math.isinf(width):
        turned = (position < low) | (position > high)
        mirror = torch.full_like(position, low if math.isfinite(low) else high)
        folded = 2.0 * mirror - position
    else:
        along = torch.remainder(position - low, 2.0 * width)
        turned = along > width
        inside = (position >= low) & (position <= high)  # those stay what they are to the last digit
        position.copy_(torch.where(inside, position, low + along))
        folded = low + (2.0 * width - along)
    position.copy_(torch.where(turned, folded, position)).clamp_(low, high)
    return 1.0 - 2.0 * turned.to(position.dtype)
