"""Descent along a line, step after step: what Newton's and the quasi-Newton methods share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from torch_gradflow.minimize.acceptance import Point, improves, loss_noise
from torch_gradflow.minimize.line_search import LinePoint, LineSearch
from torch_gradflow.minimize.method import Iterate, Minimiser
from torch_gradflow.objectives.base import Objective

# Steps in a row without a better point after which rounding is what moves it.
PATIENCE = 10


@dataclass(frozen=True)
class Direction:
    """Where to search.

    Attributes:
        step: p, shape ``(P,)``.
        alpha: The first trial is θ + α p.
        smallest_eigenvalue: Of the Hessian; nan where it is not known.
    """

    step: Tensor
    alpha: float = 1.0
    smallest_eigenvalue: float = math.nan


class Directions:
    """The directions of one minimisation: asked for one, told where the search along it ended."""

    @abstractmethod
    def next(self, point: Point) -> Direction:
        """A direction of descent at an accepted point."""

    def reset(self) -> bool:
        """Forget what was learned, where a search failed; False if there is nothing to forget."""
        return False


class LineSearchMethod(Minimiser):
    """Directions of descent with the line search of Hager and Zhang; one iterate per search.

    Attributes:
        line_search: Its parameters.
    """

    line_search: LineSearch

    @abstractmethod
    def directions(self, objective: Objective) -> Directions:
        """For one minimisation."""

    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """See ``Minimiser``. Where rounding hides the loss, the iterates need not improve; the best is yielded."""
        eps = objective.resolution
        point = best = Point(theta, loss, gradient)
        directions = self.directions(objective)
        idle = 0
        while True:
            direction = directions.next(point)
            found, length = self._search(objective, point, direction)
            failed = found is None and not directions.reset()
            if found is not None:
                point = found
            better = improves(best, point, eps)
            best = point if better else best
            idle = 0 if better else idle + 1
            stuck = failed or idle >= PATIENCE
            yield Iterate(best.theta, best.loss, best.gradient, direction.smallest_eigenvalue, length, stuck)

    def _search(self, objective: Objective, point: Point, direction: Direction) -> tuple[Point | None, float]:
        """Where the search ends, and the length of the step; None where it fails."""
        seen: dict[float, Point] = {}

        def phi(alpha: float) -> tuple[float, float]:
            there = point.theta + alpha * direction.step
            seen[alpha] = trial = Point(there, *objective.loss_and_gradient(there))
            return float(trial.loss), float(trial.gradient @ direction.step) if trial.finite else math.nan

        start = LinePoint(0.0, float(point.loss), float(point.gradient @ direction.step))
        if not start.slope < 0:
            return None, 0.0
        noise = loss_noise(point.loss, objective.resolution)
        end = self.line_search.search(phi, start, direction.alpha, noise)
        if end is None:
            return None, 0.0
        return seen[end.alpha], end.alpha * float(direction.step.norm())
