"""What kind of point this is, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.objectives.base import Objective

Kind = Literal["minimum", "degenerate minimum", "saddle", "degenerate (undecided)", "not critical"]
# Null directions that are probed one by one; beyond, as many random combinations of them.
MAX_PROBES = 64


@dataclass(frozen=True)
class CriticalPoint:
    """The verdict on a point.

    Attributes:
        kind: "minimum" (all eigenvalues of the Hessian are positive), "degenerate minimum" (none is negative, some are
            zero, and along no null direction that was probed does the loss fall), "saddle" (a negative eigenvalue, or
            the loss falls along a null direction), "degenerate (undecided)", or "not critical" (the gradient is larger
            than ``gradient_tolerance``).
        eigenvalues: Of the Hessian, ascending, shape ``(P,)``.
        newton_decrement: √(gᵀ H⁺ g) over the eigenvalues that are not zero: twice the square of it is about how far
            the loss lies above that of the critical point of the local quadratic model.
        uncertainties: How well each eigenvalue is known: P ε ‖H‖ for rounding, plus twice its change over the Newton
            step to the critical point of the quadratic model. An eigenvalue within its uncertainty counts as zero.
        tolerance: The largest uncertainty of those that count as zero; that of rounding where none does.
        gradient_tolerance: The larger of gtol and the change of the gradient when θ is rounded, 4 ε ‖H‖ ‖θ‖.
        message: The verdict as a sentence, with figures.
    """

    kind: Kind
    eigenvalues: Tensor
    newton_decrement: float
    uncertainties: Tensor
    tolerance: float
    gradient_tolerance: float
    message: str

    @property
    def n_negative(self) -> int:
        """Eigenvalues that are certainly negative."""
        return int((self.eigenvalues < -self.uncertainties).sum())

    @property
    def n_zero(self) -> int:
        """Eigenvalues that cannot be told from zero."""
        return int((self.eigenvalues.abs() <= self.uncertainties).sum())


def certify(objective: Objective, theta: Tensor, *, gtol: float = 1e-13) -> CriticalPoint:
    """Classify θ by gradient, Hessian spectrum, and, where that is singular, by probing the null directions.

    Null eigenvectors v are probed by moving to θ ± s v, s = 0.01 (1 + ‖θ‖), and from there back to the valley floor by
    chord Newton steps in the other directions; the loss there is compared with that at θ. So a valley of minima (where
    it stays the same) and a quartic minimum (where it rises) are told from a degenerate saddle (where it falls); what
    differs only at fourth order below rounding, or in combinations of directions that were not probed, is not seen.

    Args:
        objective: L.
        theta: The point, shape ``(P,)``.
        gtol: Gradients up to this, in the infinity norm, count as zero.

    Returns:
        The verdict; it costs two Hessians, and some gradients per null direction.
    """
    loss, gradient = objective.loss_and_gradient(theta)
    hessian = objective.hessian(theta)
    eps = objective.resolution
    values, vectors = torch.linalg.eigh(hessian)
    size = float(values.abs().max())
    rounding = objective.n_parameters * eps * size
    gradient_tolerance = max(gtol, 4 * eps * size * float(theta.norm()))
    components = vectors.T @ gradient
    resolved = values.abs() > rounding
    step = torch.where(resolved, -components / torch.where(resolved, values, 1.0), 0.0)
    decrement = float((components[resolved] ** 2 / values[resolved]).abs().sum().sqrt())
    limit = 0.1 * (1 + float(theta.norm()))
    step = step * min(1.0, limit / max(float(step.norm()), 1e-300))
    moved = torch.linalg.eigvalsh(objective.hessian(theta + vectors @ step))
    uncertainties = rounding + 2 * (moved - values).abs()
    null = values.abs() <= uncertainties
    n_null, n_negative = int(null.sum()), int((values < -uncertainties).sum())
    tolerance = float(uncertainties[null].max()) if n_null else rounding
    grad_norm = float(gradient.abs().max())

    def verdict(kind: Kind, why: str) -> CriticalPoint:
        message = f"{kind[0].upper()}{kind[1:]}: {why}"
        return CriticalPoint(kind, values, decrement, uncertainties, tolerance, gradient_tolerance, message)

    if not grad_norm <= gradient_tolerance:
        return verdict("not critical", f"the gradient norm {grad_norm:.2e} is above {gradient_tolerance:.2e}.")
    lowest = f"the lowest {float(values[0]):.3e} (known to {float(uncertainties[0]):.1e})"
    if n_negative:
        return verdict("saddle", f"{n_negative} negative eigenvalues, {lowest}.")
    if not n_null:
        return verdict("minimum", f"all eigenvalues are positive, {lowest}.")
    zeros = f"{n_null} of {len(values)} eigenvalues are zero to within {tolerance:.1e}"
    if not bool((~null).any()):
        vectors, null = torch.eye(len(values), dtype=theta.dtype, device=theta.device), torch.ones_like(null)
    answer = _probe(objective, theta, loss, gradient, values, vectors, null)
    if answer == "falls":
        return verdict("saddle", f"{zeros}, and the loss falls along a null direction.")
    if answer == "rises or stays":
        return verdict("degenerate minimum", f"{zeros}; the loss does not fall along any of the probed null directions.")
    return verdict("degenerate (undecided)", f"{zeros}, and probing them gave no clear answer.")


def _probe(
    objective: Objective,
    theta: Tensor,
    loss: Tensor,
    gradient: Tensor,
    values: Tensor,
    vectors: Tensor,
    null: Tensor,
) -> Literal["falls", "rises or stays", "unclear"]:
    """What the loss does along the null directions, each time at the valley floor."""
    eps = objective.resolution
    flat, steep, curvature = vectors[:, null], vectors[:, ~null], values[~null]
    n = flat.shape[1]
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, min(n, MAX_PROBES) if n > MAX_PROBES else 4, generator=generator, dtype=torch.float64)
    random = flat @ (mix / mix.norm(dim=0)).to(theta)
    directions = random if n > MAX_PROBES else torch.cat([flat, random], dim=1)
    length = 0.01 * (1 + float(theta.norm()))
    bend = float(values.abs().max())
    unclear = False
    for direction in [*directions.T, *(-directions.T)]:
        verdicts = []
        for shrink in (1.0, 0.25, 0.0625):  # what happens nearest to the point counts
            there, settled = _valley_floor(objective, theta, shrink * length * direction, steep, curvature)
            noise = 1e3 * eps * abs(float(loss)) + 4 * float(gradient.norm()) * shrink * length
            change = float(there - loss)
            if settled and abs(change) > noise:
                verdicts.append(change)
            elif shrink == 1.0:
                # Nothing seen: convincing only if a fourth derivative of a thousandth of the curvature would have been.
                unclear = unclear or not settled or noise > 1e-3 * bend * length**4 / 24
        if verdicts and verdicts[-1] < 0:
            return "falls"
    return "unclear" if unclear else "rises or stays"


def _valley_floor(objective: Objective, theta: Tensor, shift: Tensor, steep: Tensor, curvature: Tensor) -> tuple[Tensor, bool]:
    """The loss near θ + shift after chord Newton steps in the steep directions, and whether these settled."""
    point = theta + shift
    loss, slope = objective.loss_and_gradient(point)
    if steep.shape[1] == 0:
        return loss, bool(torch.isfinite(loss))
    for _ in range(20):
        if not bool(torch.isfinite(slope).all()):
            return loss, False
        move = steep @ ((steep.T @ slope) / curvature)
        point = point - move
        loss, slope = objective.loss_and_gradient(point)
        if float(move.norm()) <= 1e-3 * float(shift.norm()) * objective.resolution**0.5:
            return loss, bool(torch.isfinite(loss))
    return loss, False
