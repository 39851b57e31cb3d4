"""The energy balance of a gradient flow: dL/dt = −‖∇L‖², so what the loss lost is what the trajectory dissipated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Points of the polynomial that is integrated over each step.
STENCIL = 6
# The quadrature over a step: exact for polynomials of degree 5.
ABSCISSAS, WEIGHTS = np.polynomial.legendre.leggauss(3)
# Where steps differ by so much a polynomial through them would oscillate: a straight line serves.
UNEVEN = 20.0


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # where a flow diverges
def dissipation_error(points: Sequence[tuple[float, float, float]]) -> float:
    """|L(θ₀) − L(θ_t) − ∫‖∇L‖² dt| / |L(θ₀) − L(θ_t)|, the integral along the accepted points.

    Over each step ‖∇L‖² dt/dτ is the polynomial through the (up to) six accepted points around it in the logarithmic time
    τ = log(1 + (t − t₀)/u) with the first step u, in which steps are about equally long. A check on the trajectory that
    no integrator makes itself: it sees steps that left the curve, a gradient that is not that of the loss, and loss values
    that another objective gave. Its own accuracy is that of the polynomial, worst where the first steps grow fast.

    Args:
        points: t, L and ‖∇L‖² at the accepted points, t ascending.

    Returns:
        The relative error; 0.0 for a single point, and where nothing was lost and nothing dissipated; nan where numbers
        are not finite.
    """
    table = np.array(points, dtype=np.float64)
    if not np.isfinite(table).all():
        return float("nan")
    table = table[np.concatenate([[True], np.diff(table[:, 0]) > 0])]
    n = len(table)
    if n < 2:
        return 0.0
    t, loss, rate = table.T
    unit = t[1] - t[0]
    elapsed = t - t[0] + unit
    t, rate = np.log(elapsed / unit), rate * elapsed
    width = min(STENCIL, n)
    first = np.clip(np.arange(n - 1) - (width // 2 - 1), 0, n - width)
    around = first[:, None] + np.arange(width)
    start, length = t[:-1, None], np.diff(t)[:, None]
    nodes = (t[around] - start) / length  # in units of the step, from its start
    spacings = np.diff(t[around], axis=1)
    uneven = spacings.max(1) > UNEVEN * spacings.min(1)
    x = 0.5 * (ABSCISSAS + 1)[:, None]
    own = np.eye(width, dtype=bool)
    factors = np.where(own, 1.0, (x[..., None, None] - nodes[:, None, :]) / (nodes[:, :, None] - nodes[:, None, :]))
    value = (factors.prod(-1) * rate[around]).sum(-1)  # at the abscissas, shape (3, n − 1)
    line = (1 - x) * rate[:-1] + x * rate[1:]
    dissipated = float((0.5 * WEIGHTS @ np.where(uneven, line, value)) @ length[:, 0])
    lost = float(loss[0] - loss[-1])
    off = abs(lost - dissipated)
    return off / abs(lost) if lost else off and float("inf")
