"""The minimiser that chooses among the others, by size, by what the objective offers, and by what it meets."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
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

# Parameters up to which dense Hessians serve. A Hessian costs two to six gradients for 33 to 97 parameters, but 220 for 1153
# (mean square, one output), and 1500 for 610 (cross-entropy, ten outputs), where a Krylov space takes 20 products a step.
MAX_DENSE = 200
# Parameters up to which Levenberg–Marquardt does, whose Jacobians are cheaper.
MAX_JACOBIAN = 3000
# Trial steps over which Newton's progress is judged: the shorter one where the loss tends to zero, however slowly. (Where it
# does not, other methods cost as much as several hundred of Newton's steps.)
PATIENCE, LONG_PATIENCE = 60, 300
# Gradient norms at the beginning and at the end of the longer one that are compared.
SOME_NORMS = 30
# The same for Newton's method on Krylov spaces where Levenberg–Marquardt, whose steps are dearer, may follow. (With 1153
# parameters and zero loss, 1219 products and then 75 Jacobians take the gradient to 1e-13; 15 470 products alone, to 8e-4.)
PATIENCE_OF_KRYLOV = 20
# The same for Levenberg–Marquardt, and the share of the loss that must be gone by then.
PATIENCE_OF_RESIDUALS, FALL_OF_RESIDUALS = 100, 0.1
# The flow along a valley: how far, how accurately (a looser tolerance takes more steps there, not fewer), at what cost, and to
# which gradient norm in units of rounding. Below that, Newton's method needs a few steps.
FLOW_TIME, FLOW_RTOL, FLOW_EVALUATIONS, FLOW_GRADIENT = 1e12, 1e-5, 2000, 4096


TINY = 1e-300
# Loss and gradient norm of the last points, the present one last.
History = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Stage:
    """A method, why it serves, and whether it makes too little progress."""

    method: Minimiser
    why: str
    crawls: Callable[[History], bool]


def shares(history: History, window: int) -> tuple[float, float]:
    """What is left of loss and gradient norm after so many steps; 0 where there were not as many."""
    if len(history) <= window:
        return 0.0, 0.0
    (loss, norm), (last_loss, last_norm) = history[-1 - window], history[-1]
    return 1.0 - (loss - last_loss) / max(abs(loss), TINY), last_norm / max(norm, TINY)


def newton_crawls(history: History) -> bool:
    """Whether neither loss nor gradient norm fell to a tenth; over fewer steps, if the loss fell by a third at least."""
    loss, norm = shares(history, PATIENCE)
    if 0.1 < loss < 2 / 3 and norm > 0.1:
        return True
    if len(history) <= LONG_PATIENCE:
        return False
    # In a valley the gradient norm goes up and down by a factor of ten and more from step to step.
    norms = [norm for _, norm in history]
    falls = min(norms[-SOME_NORMS:]) <= 0.1 * statistics.median(norms[:SOME_NORMS])
    return shares(history, LONG_PATIENCE)[0] > 0.1 and not falls


def krylov_crawls(history: History) -> bool:
    """Whether neither loss nor gradient norm fell to a tenth."""
    loss, norm = shares(history, PATIENCE_OF_KRYLOV)
    return loss > 0.1 and norm > 0.1


def residual_crawls(history: History) -> bool:
    """Whether the loss hardly fell, nor the gradient norm to a tenth."""
    loss, norm = shares(history, PATIENCE_OF_RESIDUALS)
    return loss > 1 - FALL_OF_RESIDUALS and norm > 0.1


def never(history: History) -> bool:
    """No other method is left."""
    return False


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
        dense = objective.n_parameters <= MAX_DENSE and fits(DENSE_MATRICES, objective)
        if dense:
            newton = Stage(TrustRegionNewton(), "dense Hessians are cheap here", newton_crawls)
        else:
            why = f"dense Hessians of {objective.n_parameters:,} parameters are too slow or too large"
            newton = Stage(TrustRegionLanczos(), why, krylov_crawls)
        stages = [newton]
        if objective.has_residuals and objective.n_parameters <= MAX_JACOBIAN and fits(DENSE_MATRICES, objective):
            why = "Newton's steps became short, and the loss is a sum of squares"
            stages.append(Stage(LevenbergMarquardt(), why, residual_crawls))
        if not dense and len(stages) == 1:
            yield from staged(replace(newton, crawls=never), objective, start, final=True)
            return
        for stage in stages:
            start, crawled = yield from staged(stage, objective, start)
            if not crawled:
                break
        else:
            if dense:
                start = yield from flowing(objective, start)
            last = replace(stages[-1], why="no other method is left that could be faster", crawls=never)
            start, _ = yield from staged(last, objective, start)
        polish = replace(
            newton, why="rounding errors stopped the method before, and Newton's steps are more accurate", crawls=never
        )
        yield from staged(polish, objective, start, final=True)


def staged(
    stage: Stage, objective: Objective, start: Point, *, final: bool = False
) -> Generator[Iterate, None, tuple[Point, bool]]:
    """The iterates of a stage, up to where it crawls or is stuck; without end if it is the final one.

    Returns:
        Its last point, and whether it crawled.
    """
    end, note = start, stage.why
    history = deque([(float(start.loss), float(start.gradient.norm()))], maxlen=LONG_PATIENCE + 1)
    for iterate in stage.method.iterate(objective, start.theta, start.loss, start.gradient):
        end = Point(iterate.theta, iterate.loss, iterate.gradient)
        history.append((float(end.loss), float(end.gradient.norm())))
        name = iterate.method or stage.method.name
        yield replace(iterate, method=name, note=iterate.note or note, stuck=iterate.stuck and final)
        note = ""
        if stage.crawls(history) or (iterate.stuck and not final):
            break
    return end, not iterate.stuck


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
