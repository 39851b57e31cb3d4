"""The loss around trajectories and between minima: on planes and lines through parameter space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_gradflow.checks import check_count
from torch_gradflow.flow.solution import FlowSolution
from torch_gradflow.minimize.result import MinimizeResult
from torch_gradflow.objectives.base import Objective
from torch_gradflow.plotting.axes import axes_or_new, by_name, finish, next_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]
Path = FlowSolution | Tensor
# How far the picture goes beyond the trajectories, and the line beyond its ends, in parts of their extent.
MARGIN, BEYOND = 0.15, 0.25
# The shorter side of the picture is at least so long, relative to the longer one.
LEAST_ASPECT = 0.5
# Heights of the contours above the lowest loss, in parts of the highest one's.
HEIGHTS = np.logspace(-3.5, 0, 15)


@dataclass(frozen=True)
class Plane:
    """A plane in parameter space.

    Attributes:
        origin: A point of it, shape ``(P,)``.
        directions: Two orthonormal vectors along it, shape ``(2, P)``.
    """

    origin: Tensor
    directions: Tensor

    def coordinates(self, theta: Tensor) -> Array:
        """Those of the nearest points of the plane, shape ``(n, 2)``, for θ of shape ``(n, P)``."""
        return ((theta - self.origin) @ self.directions.T).numpy()

    def point(self, u: float, v: float) -> Tensor:
        """θ, shape ``(P,)``."""
        return self.origin + u * self.directions[0] + v * self.directions[1]


def plot_trajectory(
    paths: Path | Mapping[str, Path],
    objective: Objective | None = None,
    *,
    directions: Sequence[Tensor] | None = None,
    n_grid: int = 41,
    ax: Axes | None = None,
) -> Axes:
    """Trajectories projected onto a plane, over contours of the loss in that plane.

    The plane goes through the end of the first trajectory. Its directions are the first two principal components of all
    samples' differences from there (Li, Xu, Taylor, Studer and Goldstein 2018, section 7), or they are given. Both axes have
    the same scale. Off the plane the loss is another one than the contours say: the axes' labels tell how much of the
    trajectories' extent, Σ‖θ − θ_end‖², each direction holds.

    Args:
        paths: A solution, or points θ of shape ``(n, P)``, n ≥ 2; or several of them by name.
        objective: L, for the contours; None draws none.
        directions: Two vectors of shape ``(P,)``, not parallel. The first axis is along the first; the second axis is along
            what is orthogonal to it in the second. None takes the principal components.
        n_grid: Contours are drawn from ``n_grid²`` evaluations of the loss with its gradient.
        ax: Where to draw; None for a new figure.

    Returns:
        The Axes, in units of ‖θ‖. A circle is where a trajectory starts, a disc where it ends.

    Raises:
        TypeError, ValueError: For arguments that make no sense; for trajectories that do not move.
        ImportError: If matplotlib is not installed.
    """
    chosen: dict[str, Path] = by_name("paths", paths, (FlowSolution, Tensor))
    named = {name: _points(name, path) for name, path in chosen.items()}
    lengths = {points.shape[1] for points in named.values()}
    if len(lengths) > 1:
        raise ValueError(f"paths must have the same number of parameters, not {sorted(lengths)}.")
    (n_parameters,) = lengths
    _check_objective(objective, n_parameters, "paths")
    check_count("n_grid", n_grid)
    origin = next(iter(named.values()))[-1]
    differences = torch.cat([points - origin for points in named.values()])
    given = directions is not None
    basis = _orthonormal(directions, n_parameters) if directions is not None else _principal_components(differences)
    plane = Plane(origin, basis)
    shares = (differences @ basis.T).square().sum(0) / differences.square().sum()
    ax = axes_or_new(ax)
    along = {name: plane.coordinates(points) for name, points in named.items()}
    low, high = _limits(np.concatenate(list(along.values())))
    if objective is not None:
        _draw_contours(ax, objective, plane, low, high, n_grid)
    for name, points in along.items():
        _draw_path(ax, points, name)
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    ax.set_aspect("equal")
    names = ("first direction", "second direction") if given else ("first principal component", "second principal component")
    x, y = (f"{name} ({100 * float(share):.3g} %)" for name, share in zip(names, shares, strict=True))
    return finish(ax, x, y)


def plot_line(
    objective: Objective,
    start: Tensor | MinimizeResult,
    end: Tensor | MinimizeResult,
    *,
    n_points: int = 201,
    ax: Axes | None = None,
) -> Axes:
    """The loss along the straight line through two points, L((1 − s) θ₀ + s θ₁) (Goodfellow, Vinyals and Saxe 2015).

    Args:
        objective: L.
        start: θ₀, at s = 0: shape ``(P,)``, or what ``minimize`` returned.
        end: θ₁, at s = 1.
        n_points: Evaluations of the loss with its gradient, for s from −0.25 to 1.25, besides those at both ends.
        ax: Where to draw; None for a new figure.

    Returns:
        The Axes. Both ends are marked, and the highest loss between them with its height above the higher end, if it is above.

    Raises:
        TypeError, ValueError: For arguments that make no sense, or ends that are the same point.
        ImportError: If matplotlib is not installed.
    """
    check_count("n_points", n_points)
    first, last = _end("start", start), _end("end", end)
    for name, theta in (("start", first), ("end", last)):
        _check_objective(objective, len(theta), name)
    if torch.equal(first, last):
        raise ValueError("end must be another point than start.")
    s = np.unique(np.concatenate([np.linspace(-BEYOND, 1 + BEYOND, n_points), [0.0, 1.0]]))
    losses = np.array([_loss(objective, first + float(part) * (last - first)) for part in s])
    ax = axes_or_new(ax)
    style = next_style(ax)
    ax.plot(s, losses, **style)
    ends = losses[np.searchsorted(s, [0.0, 1.0])]
    ax.plot([0.0, 1.0], ends, linestyle="", marker="o", color=style["color"])
    between = np.where((s >= 0) & (s <= 1), losses, -np.inf)
    top, rise = int(np.nanargmax(between)), float(np.nanmax(between) - ends.max())
    if rise > 0:
        ax.plot(s[top], losses[top], marker="^", color="black")
        ax.annotate(
            f"+{rise:.3g}", (float(s[top]), float(losses[top])), xytext=(0, 6), textcoords="offset points", ha="center"
        )
        ax.margins(y=0.12)
    return finish(ax, r"$s$ along $(1-s)\,\theta_0 + s\,\theta_1$", "loss $L$")


def _points(name: str, path: Path) -> Tensor:
    theta = (path.theta if isinstance(path, FlowSolution) else path).detach().cpu().double()
    if theta.dim() != 2 or len(theta) < 2 or not bool(torch.isfinite(theta).all()):
        which = f"paths[{name!r}]" if name else "paths"
        raise ValueError(
            f"{which} must be finite points in the shape (n, P), at least two, not of shape {tuple(theta.shape)}."
        )
    return theta


def _end(name: str, point: Tensor | MinimizeResult) -> Tensor:
    theta = point.theta if isinstance(point, MinimizeResult) else point
    if not isinstance(theta, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (P,) or a MinimizeResult, not {point!r}.")
    if theta.dim() != 1:
        raise ValueError(f"{name} must have the shape (P,), not {tuple(theta.shape)}.")
    return theta.detach().cpu().double()


def _check_objective(objective: Objective | None, n_parameters: int, argument: str) -> None:
    if objective is None:
        return
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, for instance a ModuleObjective, not {objective!r}.")
    if objective.n_parameters != n_parameters:
        raise ValueError(
            f"objective has {objective.n_parameters} parameters, {argument} {n_parameters}: they must be the same."
        )


def _principal_components(differences: Tensor) -> Tensor:
    """The first two, shape ``(2, P)``; of points on a line the second is any direction across it."""
    if not bool(differences.any()):
        raise ValueError("paths do not move: all of their points are the same.")
    if differences.shape[1] < 2:
        raise ValueError("paths must have at least two parameters.")
    components: Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[:2]
    return components


def _orthonormal(directions: Sequence[Tensor], n_parameters: int) -> Tensor:
    """Gram and Schmidt's orthonormal vectors, shape ``(2, P)``."""
    vectors = [d.detach().cpu().double() if isinstance(d, Tensor) else None for d in directions]
    if len(vectors) != 2 or any(v is None or v.shape != (n_parameters,) for v in vectors):
        raise ValueError(f"directions must be two vectors of shape ({n_parameters},).")
    first, second = (v for v in vectors if v is not None)
    along = first / first.norm()
    across = second - (second @ along) * along
    if not bool(torch.isfinite(along).all()) or not float(across.norm()) > 1e-10 * float(second.norm()):
        raise ValueError("directions must be finite, not zero, and not parallel to each other.")
    return torch.stack([along, across / across.norm()])


def _limits(points: Array) -> tuple[Array, Array]:
    """Corners of the picture: the points with a margin, the shorter side not too short."""
    low, high = points.min(0), points.max(0)
    extent = np.maximum(high - low, LEAST_ASPECT * (high - low).max())
    middle, half = (low + high) / 2, (0.5 + MARGIN) * extent
    return middle - half, middle + half


def _draw_contours(ax: Axes, objective: Objective, plane: Plane, low: Array, high: Array, n_grid: int) -> None:
    u, v = (np.linspace(low[i], high[i], n_grid) for i in range(2))
    losses = np.ma.masked_invalid([[_loss(objective, plane.point(float(x), float(y))) for x in u] for y in v])
    lowest, highest = float(losses.min()), float(losses.max())
    if not highest > lowest:
        return
    levels = lowest + (highest - lowest) * HEIGHTS
    lines = ax.contour(u, v, losses, levels=levels, colors="0.55", linewidths=0.7, zorder=1)
    ax.clabel(lines, levels=levels[2::3], fmt="%.2g", fontsize=7)


def _draw_path(ax: Axes, points: Array, name: str) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=4, foreground="white")]
    style = next_style(ax)
    ax.plot(points[:, 0], points[:, 1], **style, label=name or None, linewidth=2, path_effects=halo)
    dot = {"color": style["color"], "marker": "o", "markersize": 7, "zorder": 3}
    ax.plot(points[0, 0], points[0, 1], **dot, markerfacecolor="white")
    ax.plot(points[-1, 0], points[-1, 1], **dot)


def _loss(objective: Objective, theta: Tensor) -> float:
    return float(objective.loss_and_gradient(theta.to(objective.device, objective.dtype))[0])
