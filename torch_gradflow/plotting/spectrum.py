"""The eigenvalues of a Hessian on a logarithmic axis, with their signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.minimize.certificate import CriticalPoint
from torch_gradflow.minimize.result import MinimizeResult
from torch_gradflow.plotting.axes import axes_or_new, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour and shape, so that either alone shows the sign.
MARKERS: dict[str, dict[str, Any]] = {
    "negative": {"color": "#D55E00", "marker": "v", "markerfacecolor": "white"},
    "zero up to rounding": {"color": "#000000", "marker": "x"},
    "positive": {"color": "#0072B2", "marker": "o"},
}


def plot_spectrum(point: CriticalPoint | MinimizeResult | Tensor, *, ax: Axes | None = None) -> Axes:
    """The absolute values of a Hessian's eigenvalues on a logarithmic axis, in ascending order, with a marker for each sign.

    Args:
        point: What ``certify`` or ``minimize`` returned, or ``NewtonPolish.result``; or eigenvalues, shape ``(n,)``, such as
            those of ``hessian_spectrum``, of which those up to n ε max|λ| in absolute value count as zero.
        ax: Where to draw; None for a new figure.

    Returns:
        The Axes. Eigenvalues below ε max|λ| are drawn there: less is not resolved.

    Raises:
        TypeError, ValueError: For anything else, a result without certificate, or eigenvalues that are none.
        ImportError: If matplotlib is not installed.
    """
    values, n_negative, n_zero, complete = _signs(point)
    largest = max(float(values.abs().max()), torch.finfo(values.dtype).tiny)
    heights = values.abs().clamp(min=torch.finfo(values.dtype).eps * largest).double().numpy()
    ax = axes_or_new(ax)
    ax.set_yscale("log")
    ranks = np.arange(1, len(values) + 1)
    parts = np.split(np.arange(len(values)), [n_negative, n_negative + n_zero])
    for (name, marker), part in zip(MARKERS.items(), parts, strict=True):
        if len(part):
            ax.plot(ranks[part], heights[part], linestyle="", markersize=5, label=f"{name} ({len(part)})", **marker)
    return finish(ax, "number, ascending" if complete else "number among those known, ascending", r"eigenvalue $|\lambda|$")


def _signs(point: CriticalPoint | MinimizeResult | Tensor) -> tuple[Tensor, int, int, bool]:
    """Eigenvalues, ascending; how many are negative, how many zero; whether they are all."""
    if isinstance(point, MinimizeResult):
        if point.certificate is None:
            raise ValueError("point has no certificate: minimise with certificate=True, or give certify(objective, theta).")
        point = point.certificate
    if isinstance(point, CriticalPoint):
        values, n_negative, n_zero, complete = point.eigenvalues, point.n_negative, point.n_zero, point.complete
        return values.detach().cpu(), n_negative, n_zero, complete
    if not isinstance(point, Tensor):
        raise TypeError(f"point must be a CriticalPoint, a MinimizeResult or a tensor of eigenvalues, not {point!r}.")
    if point.dim() != 1 or not len(point) or not point.is_floating_point() or not bool(torch.isfinite(point).all()):
        raise ValueError(f"point must hold finite eigenvalues in the shape (n,), not {point!r}.")
    values = point.detach().cpu().sort().values
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())
    n_negative = int((values < -rounding).sum())
    return values, n_negative, int((values.abs() <= rounding).sum()), True
