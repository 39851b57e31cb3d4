"""How far a trajectory is from another one as a curve, and how far it came: the measures d_m and t_m of arXiv 2301.10638."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Distances that are computed at once, at first and at most; more than needed costs little, as most samples move on by few.
FIRST_BLOCK, LONGEST_BLOCK = 8, 1024


class Trajectory(Protocol):
    """Samples of a curve: a ``FlowSolution``, or anything with these two, for instance the iterates of Adam."""

    @property
    def t(self) -> Tensor:
        """Times (or whatever counts them), ascending, shape ``(n,)``."""

    @property
    def theta(self) -> Tensor:
        """θ at those times, shape ``(n, P)``."""


@dataclass(frozen=True)
class TrajectoryDistance:
    """How two trajectories compare.

    Attributes:
        distance: d_m, the mean of ``distances``.
        progress: t_m, the largest of ``matched_times``: how far along the reference the trajectory came.
        times: Times of the trajectory's samples that were matched, shape ``(m,)``, float64 on the CPU.
        matched_times: Times of the reference's samples that they were matched with, ascending, shape ``(m,)``.
        matches: Their indices in the reference, shape ``(m,)``.
        distances: ‖Δθ‖²/(2P) of each match, shape ``(m,)``, float64 on the CPU.
        spacing: The mean of ‖Δθ/2‖²/(2P) for Δθ from a matched sample to the farther one of its neighbours in the reference:
            what d_m may be for the reference's own curve, only because its samples are apart. A d_m that is not well above
            it says nothing about accuracy; sample the reference more densely.
        complete: Whether all samples were matched; False where the trajectory goes on beyond the reference's last sample,
            which then has the last match.
    """

    distance: float
    progress: float
    times: Tensor
    matched_times: Tensor
    matches: Tensor
    distances: Tensor
    spacing: float
    complete: bool


def trajectory_distance(solution: Trajectory, reference: Trajectory) -> TrajectoryDistance:
    """How far a trajectory is from a reference, whatever the speed at which it runs along it.

    Each sample of the trajectory is matched with a sample of the reference: from the match of the sample before it (at first
    from the reference's first sample) forward as long as ‖Δθ‖²/(2P) does not grow. Where that ends at the reference's last
    sample, what follows in the trajectory is left out. So the measure is not symmetric, and it needs a reference that is
    sampled more densely than its distance to the trajectory (the paper kept up to 1e6 samples of it, and 1e3 of the
    trajectory): pass ``t_eval`` to ``integrate``. The number of distances is proportional to that of all samples.

    Args:
        solution: The trajectory.
        reference: An accurate trajectory from the same start, with the same parameters; it should go on for longer.

    Returns:
        d_m, t_m, and the matches. Distances are computed in float64, on the reference's device.

    Raises:
        TypeError: If an argument has no tensors ``t`` and ``theta``.
        ValueError: If their shapes do not fit, times do not ascend, or a number is not finite.
    """
    _check("solution", solution)
    _check("reference", reference)
    curve = reference.theta.detach().to(torch.float64)
    points = solution.theta.detach().to(curve)
    if points.shape[1] != curve.shape[1]:
        raise ValueError(
            f"solution and reference must have the same parameters, not {points.shape[1]} and {curve.shape[1]} of them."
        )
    scale = 1 / (2 * curve.shape[1])
    matches, distances = _match(points, curve)
    index = torch.tensor(matches)
    halves = ((curve[1:] - curve[:-1]) / 2).square().sum(1).cpu() * scale
    before, after = torch.cat([halves.new_zeros(1), halves]), torch.cat([halves, halves.new_zeros(1)])
    times = reference.t.detach().to("cpu", torch.float64)[index]
    each = torch.tensor(distances, dtype=torch.float64) * scale
    return TrajectoryDistance(
        distance=float(each.mean()),
        progress=float(times.max()),
        times=solution.t.detach().to("cpu", torch.float64)[: len(matches)],
        matched_times=times,
        matches=index,
        distances=each,
        spacing=float(torch.maximum(before, after)[index].mean()),
        complete=len(matches) == len(points),
    )


def _match(points: Tensor, curve: Tensor) -> tuple[list[int], list[float]]:
    """For each point the index in the curve and ‖Δθ‖², until the end of the curve is reached."""
    matches: list[int] = []
    distances: list[float] = []
    at = 0
    for point in points:
        at, distance = _descend(point, curve, at)
        matches.append(at)
        distances.append(distance)
        if at == len(curve) - 1:
            break
    return matches, distances


def _descend(point: Tensor, curve: Tensor, start: int) -> tuple[int, float]:
    """The index from which on ‖curve − point‖² grows, at ``start`` or later, and its value there; block by block.

    Growth within rounding errors is none: samples that differ by these alone would end the descent.
    """
    size = FIRST_BLOCK
    rounding = 8 * torch.finfo(curve.dtype).eps * float(point.norm())
    while True:
        squares = (curve[start : start + size] - point).square().sum(1)
        grows = (squares[1:] - squares[:-1] > rounding * squares[:-1].sqrt()).nonzero()
        step = int(grows[0]) if len(grows) else len(squares) - 1
        if len(grows) or start + step == len(curve) - 1:
            return start + step, float(squares[step])
        start, size = start + step, min(2 * size, LONGEST_BLOCK)


def _check(name: str, trajectory: Trajectory) -> None:
    t, theta = getattr(trajectory, "t", None), getattr(trajectory, "theta", None)
    if not isinstance(t, Tensor) or not isinstance(theta, Tensor):
        raise TypeError(f"{name} must be a FlowSolution, or have tensors t and theta as it has, not {trajectory!r}.")
    if t.dim() != 1 or theta.dim() != 2 or len(t) != len(theta) or not theta.numel():
        raise ValueError(
            f"{name} must have t of shape (n,) and theta of shape (n, P), both not empty, not {tuple(t.shape)} and "
            f"{tuple(theta.shape)}."
        )
    if not bool(torch.isfinite(theta).all()) or not bool(torch.isfinite(t).all()):
        raise ValueError(f"{name} holds numbers that are not finite; leave out its samples after the flow diverged.")
    if bool((t[1:] < t[:-1]).any()):
        raise ValueError(f"{name}.t must ascend.")
