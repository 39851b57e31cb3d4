"""BFGS and L-BFGS: curvature from differences of gradients alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_gradflow.minimize.acceptance import Point
from torch_gradflow.minimize.descent import Direction, Directions, LineSearchMethod
from torch_gradflow.minimize.line_search import LineSearch
from torch_gradflow.minimize.method import Need
from torch_gradflow.objectives.base import Objective

# The first step, along −∇L, relative to ‖θ‖ (Hager and Zhang 2005, I0).
FIRST_STEP = 0.01


@dataclass(frozen=True)
class Bfgs(LineSearchMethod):
    """Broyden, Fletcher, Goldfarb and Shanno's update of a dense inverse Hessian (Nocedal and Wright 2006, section 6.1)."""

    name: str = "bfgs"
    needs: frozenset[Need] = frozenset({"gradient"})
    matrices: int = 3
    line_search: LineSearch = field(default_factory=LineSearch)

    def directions(self, objective: Objective) -> Directions:
        """One gradient per trial."""
        return _SecantDirections(DenseInverse)


@dataclass(frozen=True)
class Lbfgs(LineSearchMethod):
    """BFGS from the last few steps, without a matrix (Nocedal 1980; Liu and Nocedal 1989).

    Attributes:
        memory: Steps that are kept. Liu and Nocedal found little gain beyond 3 to 20; with 10, work per step is 40 P.
    """

    name: str = "lbfgs"
    needs: frozenset[Need] = frozenset({"gradient"})
    memory: int = 10
    line_search: LineSearch = field(default_factory=LineSearch)

    def directions(self, objective: Objective) -> Directions:
        """One gradient per trial."""
        return _SecantDirections(lambda: LimitedMemory(self.memory))


class SecantMatrix(ABC):
    """An approximation of H⁻¹, positive definite, from steps and differences of gradients."""

    @abstractmethod
    def learn(self, s: Tensor, y: Tensor) -> None:
        """Take in a step s, shape ``(P,)``, along which the gradient changed by y, with sᵀy > 0."""

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """Times a vector of shape ``(P,)``."""


class DenseInverse(SecantMatrix):
    """B ← (1 − ρ s yᵀ) B (1 − ρ y sᵀ) + ρ s sᵀ, ρ = 1/(yᵀs), from B = (sᵀy/yᵀy) 1 (Nocedal and Wright 2006, 6.17, 6.20)."""

    def __init__(self) -> None:
        self._inverse: Tensor | None = None

    def learn(self, s: Tensor, y: Tensor) -> None:
        """See ``SecantMatrix``."""
        product = float(s @ y)
        if self._inverse is None:
            self._inverse = torch.eye(len(s), dtype=s.dtype, device=s.device) * (product / float(y @ y))
        image = self._inverse @ y
        u = s / product
        self._inverse += torch.outer(s, (1 + float(y @ image) / product) * u - image / product)
        self._inverse -= torch.outer(image, u)

    def apply(self, gradient: Tensor) -> Tensor:
        """See ``SecantMatrix``."""
        return gradient if self._inverse is None else self._inverse @ gradient


class LimitedMemory(SecantMatrix):
    """The same from the last steps only, applied by two loops over them (Nocedal and Wright 2006, algorithm 7.4)."""

    def __init__(self, memory: int) -> None:
        self._pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)

    def learn(self, s: Tensor, y: Tensor) -> None:
        """See ``SecantMatrix``."""
        self._pairs.append((s, y, float(s @ y)))

    def apply(self, gradient: Tensor) -> Tensor:
        """See ``SecantMatrix``."""
        found, weights = gradient, []
        for s, y, product in reversed(self._pairs):
            weights.append(float(s @ found) / product)
            found = found - weights[-1] * y
        if self._pairs:
            _, y, product = self._pairs[-1]
            found = found * (product / float(y @ y))
        for (s, y, product), weight in zip(self._pairs, reversed(weights), strict=True):
            found = found + (weight - float(y @ found) / product) * s
        return found


class _SecantDirections(Directions):
    """−B∇L, where B learns from the step between the points for which it is asked."""

    def __init__(self, start: Callable[[], SecantMatrix]) -> None:
        self._start, self._matrix = start, start()
        self._last: Point | None = None
        self._known = False

    def next(self, point: Point) -> Direction:
        """See ``Directions``; a short step along −∇L where nothing is known yet."""
        last, self._last = self._last, point
        if last is not None:
            s, y = point.theta - last.theta, point.gradient - last.gradient
            # Wolfe's second condition makes sᵀy positive; what is left of it below rounding says nothing.
            if float(s @ y) > torch.finfo(s.dtype).eps * float(s.norm()) * float(y.norm()):
                self._matrix.learn(s, y)
                self._known = True
        step = -self._matrix.apply(point.gradient)
        if self._known and float(step @ point.gradient) < 0:
            return Direction(step)
        self.reset()
        self._last = point
        size = float(point.theta.abs().max()) or 1.0
        return Direction(-point.gradient, FIRST_STEP * size / float(point.gradient.abs().max()))

    def reset(self) -> bool:
        """See ``Directions``."""
        known, self._known = self._known, False
        self._matrix, self._last = self._start(), None
        return known
