"""The minimiser that chooses among the others, by size, by what the objective offers, and by what it meets."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from torch_gradflow.flow.integrate import integrate
from torch_gradflow.flow.stopping import GradientNorm
from torch_gradflow.minimize.acceptance import Point, improves
from torch_gradflow.minimize.krylov import TrustRegionLanczos
from torch_gradflow.minimize.least_squares import LevenbergMarquardt
from torch_gradflow.minimize.memory import fits
from torch_gradflow.minimize.method import Iterate, Minimiser, Need
from torch_gradflow.minimize.trust_region import DENSE_MATRICES, TrustRegionNewton
from torch_gradflow.objectives.base import Objective

# Parameters up to which dense Hessians serve.
MAX_DENSE = 1500
# Trial steps without progress after which a method crawls.
PATIENCE, PATIENCE_OF_RESIDUALS = 60, 100
# The flow along a valley: how far, how accurately (a looser tolerance takes more steps there, not fewer), at what cost, and to
# which gradient norm in units of rounding. Below that, Newton's method needs a few steps.
FLOW_TIME, FLOW_RTOL, FLOW_EVALUATIONS, FLOW_GRADIENT = 1e12, 1e-5, 2000, 4096


@dataclass(frozen=True)
class Stage:
    """A method, and how long it may crawl.

    Attributes:
        method: The minimiser.
        why: Why it serves.
        window: Trial steps over which progress is judged.
        fall: The method crawls when, over these, neither the gradient norm fell to a tenth nor the loss by this share.
    """

    method: Minimiser
    why: str
    window: int = 0
    fall: float = 0.0

    def crawls(self, history: list[Point]) -> bool:
        """Whether the points of this stage show too little progress; never, if ``window`` is 0."""
        if self.window == 0 or len(history) <= self.window:
            return False
        before, now = history[-1 - self.window], history[-1]
        falls = float(before.loss - now.loss) > self.fall * abs(float(before.loss))
        return not falls and float(now.gradient.norm()) > 0.1 * float(before.gradient.norm())


@dataclass(frozen=True)
class Auto(Minimiser):
    """Trust-region Newton; Levenberg–Marquardt and the flow where that crawls; Krylov spaces where matrices are too large.

    Regular minima take a few tens of Newton's steps. Narrow curved valleys take hundreds to thousands, because a ball that
    fits into them is small. Levenberg–Marquardt with its corrections follows them, and zero loss with a singular Hessian is
    no obstacle to it. Where there are no residuals, or it crawls too, the gradient flow does: an implicit method takes longer
    and longer steps along the valley (to t = 1e12), and hands over at its end.
    """

    name: str = "auto"
    needs: frozenset[Need] = frozenset({"hessian", "hvp"})

    def iterate(self, objective: Objective, theta: Tensor, loss: Tensor, gradient: Tensor) -> Iterator[Iterate]:
        """See ``Minimiser``; each iterate names the method that took the step."""
        start = Point(theta, loss, gradient)
        if not serves_dense(objective):
            why = f"dense Hessians of {objective.n_parameters:,} parameters are too large or too slow"
            yield from staged(Stage(TrustRegionLanczos(), why), objective, start, final=True)
            return
        newton = Stage(TrustRegionNewton(), "dense Hessians are cheap here", PATIENCE, fall=0.9)
        residual = Stage(
            LevenbergMarquardt(), "Newton's steps became short, and the loss is a sum of squares", PATIENCE_OF_RESIDUALS, 0.1
        )
        stages = [newton, residual] if objective.has_residuals else [newton]
        for stage in stages:
            start, crawled = yield from staged(stage, objective, start)
            if not crawled:
                break
        else:
            start = yield from flowing(objective, start)
            last = replace(stages[-1], why="the flow has come to the end of the valley, or of what it may cost", window=0)
            start, _ = yield from staged(last, objective, start)
        polish = replace(
            newton, why="rounding errors stopped the method before, and Newton's steps are more accurate", window=0
        )
        yield from staged(polish, objective, start, final=True)


def staged(
    stage: Stage, objective: Objective, start: Point, *, final: bool = False
) -> Generator[Iterate, None, tuple[Point, bool]]:
    """The iterates of a stage, up to where it crawls or is stuck; without end if it is the final one.

    Returns:
        Its last point, and whether it crawled.
    """
    history, note = [start], stage.why
    for iterate in stage.method.iterate(objective, start.theta, start.loss, start.gradient):
        history.append(Point(iterate.theta, iterate.loss, iterate.gradient))
        name = iterate.method or stage.method.name
        yield replace(iterate, method=name, note=iterate.note or note, stuck=iterate.stuck and final)
        note = ""
        if stage.crawls(history) or (iterate.stuck and not final):
            break
    return history[-1], not iterate.stuck


def flowing(objective: Objective, start: Point) -> Generator[Iterate, None, Point]:
    """The end of the gradient flow from here, if it is better, as one iterate; and that point.

    Raises:
        KeyboardInterrupt: After Ctrl-C within the flow, once the point to which it came was taken.
    """
    solution = integrate(
        objective,
        start.theta,
        (0.0, FLOW_TIME),
        method="bdf",
        rtol=FLOW_RTOL,
        max_evals=FLOW_EVALUATIONS,
        stop=GradientNorm(FLOW_GRADIENT * objective.resolution),
    )
    theta = solution.theta[-1]
    end = Point(theta, *objective.loss_and_gradient(theta))
    best = end if improves(start, end, objective.resolution) else start
    length = float((best.theta - start.theta).norm())
    why = "the steps remained short, and the flow is followed along the valley"
    yield Iterate(best.theta, best.loss, best.gradient, math.nan, length, False, why, "bdf")
    if solution.status == "interrupted":
        raise KeyboardInterrupt(solution.message)
    return best


def serves_dense(objective: Objective) -> bool:
    """Whether dense Hessians are a good choice: they are not too many numbers, and they fit into memory."""
    return objective.n_parameters <= MAX_DENSE and fits(DENSE_MATRICES, objective)
