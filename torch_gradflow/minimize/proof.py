"""A proof that there is exactly one critical point near θ, and that it is a minimum: in ball arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_gradflow.minimize.network import KnownNetwork

if TYPE_CHECKING:  # python-flint is optional
    from flint import arb, arb_mat

    from torch_gradflow.minimize.balls import BallLoss

# What a proof may cost: the sums over samples hold about N P² products of balls, 10⁷ of which take some seconds.
MAX_PARAMETERS, MAX_SAMPLES = 50, 10_000
BITS = 128
# Newton steps from θ, where θ itself is too far from the critical point.
REFINEMENTS = 3
# Boxes that are tried, at most, and how near to 1, where the proof fails, the quantity q may come that grows with them.
BOXES, TARGET, FIRST_BOX = 5, 0.5, 1e-5


@dataclass(frozen=True)
class Proof:
    """What is proven, of L as a function of real numbers for the data, and around the θ, that floating-point numbers are.

    Attributes:
        proven: Whether there is exactly one critical point in the box, and it is a minimum.
        existence: The critical point lies within this distance of θ, in the Euclidean norm.
        uniqueness: The half width of the box around θ in which there is no other.
        lowest_eigenvalue: A lower bound of the Hessian's eigenvalues at every point of the box.
        bits: Of the midpoints of the balls.
        message: The theorem, or the reason why nothing is proven (then the numbers are NaN).
    """

    proven: bool
    existence: float
    uniqueness: float
    lowest_eigenvalue: float
    bits: int
    message: str


class NotProvenError(Exception):
    """Why nothing is proven."""


def require_flint() -> None:
    """Check that ball arithmetic is at hand.

    Raises:
        ImportError: With the remedy.
    """
    try:
        import flint  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "rigorous=True computes in ball arithmetic and needs python-flint: pip install 'torch-gradflow[proof]'."
        ) from error


def prove_minimum(known: KnownNetwork | None, theta: Tensor) -> Proof:
    """Prove that exactly one critical point lies in a box around θ, and that it is a minimum.

    Let H(θ) ≈ V Λ Vᵀ and W = V Λ^(−½). In the coordinates u = W⁻¹(θ' − θ) the simplified Newton map is
    T(u) = u − Wᵀ∇L(θ + Wu), with the derivative I − WᵀHW. If ‖I − WᵀHW‖ ≤ q < 1 for all Hessians H of a box, then these are
    positive definite, with eigenvalues of at least (1 − q)/‖W‖²; L is strictly convex there and has one critical point at
    most; and T is a contraction that maps {‖u‖ ≤ ‖Wᵀ∇L(θ)‖/(1 − q)} into itself, so that there is one if that set lies in the
    box (the Newton–Kantorovich theorem in the form of Rump 2010, Acta Numerica 19, 287–449, section 13).

    Args:
        known: The network, with its loss and its data.
        theta: θ, taken as the exact number that it is; shape ``(P,)``.

    Returns:
        The proof, or the reason why there is none.
    """
    try:
        return _prove(known, theta)
    except NotProvenError as why:
        return Proof(False, math.nan, math.nan, math.nan, BITS, f"Not proven: {why}.")


def _prove(known: KnownNetwork | None, theta: Tensor) -> Proof:
    from flint import arb, ctx

    from torch_gradflow.minimize.balls import BallLoss, NotAnalyticError

    if known is None or known.loss is None or known.samples is None:
        raise NotProvenError("the network, its loss and its data are not known; pass them as network")
    n, n_samples = len(theta), len(known.samples.weights)
    if n > MAX_PARAMETERS or n_samples > MAX_SAMPLES:
        limits = f"a proof is tried for at most {MAX_PARAMETERS} parameters and {MAX_SAMPLES} samples"
        raise NotProvenError(f"{limits}, and there are {n} and {n_samples}")
    with ctx.workprec(BITS):
        try:
            loss = BallLoss(known, known.loss, known.samples)
            centre = [arb(t) for t in theta.double().tolist()]
            frame = _Frame.at(loss, centre)
            contraction, centre = _contraction(loss, frame, centre)
            half_width, q = _widest_box(loss, frame, centre, contraction)
        except NotAnalyticError as why:
            raise NotProvenError(str(why)) from None
        offset = _norm([c - t for c, t in zip(centre, theta.double().tolist(), strict=True)])
        existence, uniqueness = above(contraction.distance + offset), below(arb(half_width) - offset)
        if not existence <= uniqueness:
            raise NotProvenError(f"the critical point found is {existence:.1e} away from θ, beyond the box of its proof")
        lowest = below((1 - arb(q)) / frame.square)
    return Proof(
        True,
        existence,
        uniqueness,
        lowest,
        BITS,
        f"Proven in ball arithmetic ({BITS} bits): one critical point lies within {existence:.1e} of θ, no other one in the "
        f"box of half width {uniqueness:.1e} around it, and it is a minimum, because there the Hessian's eigenvalues are at "
        f"least {lowest:.3e}.",
    )


@dataclass(frozen=True)
class _Frame:
    """W.

    Attributes:
        w: W, a matrix of balls.
        square: A bound of ‖W‖₂².
        rows: Bounds of the Euclidean norms of the rows of W.
    """

    w: arb_mat
    square: arb
    rows: list[arb]

    @classmethod
    def at(cls, loss: BallLoss, centre: list[arb]) -> _Frame:
        """From the Hessian at a point.

        Raises:
            NotProvenError: If it is not positive definite, or cannot be told to be.
        """
        from flint import arb, arb_mat

        hessian = loss.hessian(centre)
        n = len(centre)
        middle = torch.tensor([[float(hessian[i, j].mid()) for j in range(n)] for i in range(n)], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(0.5 * (middle + middle.T))
        v = arb_mat(vectors.tolist())
        lowest = float(values[0])
        if lowest <= 4 * n * torch.finfo(torch.float64).eps * float(values.abs().max()):
            down = arb_mat([[x] for x in vectors[:, 0].tolist()])
            curvature = (down.transpose() * hessian * down)[0, 0] / (down.transpose() * down)[0, 0]
            if curvature < 0:
                raise NotProvenError(
                    f"there is no minimum at θ: along a unit vector the second derivative is {float(curvature.mid()):.3e} "
                    f"± {above(curvature.rad()):.1e}, certainly negative"
                )
            raise NotProvenError(
                f"the Hessian's lowest eigenvalue, {lowest:.1e}, cannot be told from zero: in a valley of minima no "
                "critical point is the only one"
            )
        roots = [1 / arb(x).sqrt() for x in values.tolist()]
        w = arb_mat([[v[i, j] * roots[j] for j in range(n)] for i in range(n)])
        square = roots[0] ** 2 * _row_sum(v.transpose() * v)
        return cls(w, square, [_norm([w[i, j] for j in range(n)]) for i in range(n)])

    def off(self, hessian: arb_mat) -> arb:
        """A bound of ‖I − WᵀHW‖₂ for all H of an enclosure."""
        from flint import arb_mat

        n = len(self.rows)
        one = arb_mat(n, n, [int(i == j) for i in range(n) for j in range(n)])
        rest = one - self.w.transpose() * hessian * self.w
        frobenius = _norm([rest[i, j] for i in range(n) for j in range(n)])
        return min(_row_sum(rest), frobenius, key=lambda bound: bound.upper())


@dataclass(frozen=True)
class _Contraction:
    """That the simplified Newton map has a fixed point.

    Attributes:
        box: The half width of a box that holds it.
        distance: A bound of its distance from the centre, in the Euclidean norm.
    """

    box: float
    distance: arb


def _contraction(loss: BallLoss, frame: _Frame, centre: list[arb]) -> tuple[_Contraction, list[arb]]:
    """The fixed point, from the centre or from where Newton steps lead from it."""
    from flint import arb, arb_mat

    longest = 0.0
    for _ in range(REFINEMENTS + 1):
        gradient = arb_mat([[g] for g in loss.gradient(centre)])
        slope = frame.w.transpose() * gradient
        size = _norm(slope.entries())
        widest = max(above(row) for row in frame.rows)
        box = above(2 * size * arb(widest))  # for q ≤ 1/2
        q = frame.off(loss.hessian(_box(centre, box)))
        step = frame.w * slope
        if q < TARGET:
            return _Contraction(box, _norm(step.entries()) + frame.square.sqrt() * q * size / (1 - q)), centre
        longest = max(longest, above(_norm(step.entries())))
        centre = [(c - s).mid() for c, s in zip(centre, step.entries(), strict=True)]
    raise NotProvenError(
        f"near θ, with Newton steps of up to {longest:.1e}, Newton's map could not be shown to contract; is the gradient zero?"
    )


def _widest_box(loss: BallLoss, frame: _Frame, centre: list[arb], found: _Contraction) -> tuple[float, float]:
    """The half width of a box in which all Hessians are positive definite, and q there."""
    from torch_gradflow.minimize.balls import NotAnalyticError

    best = (found.box, TARGET)
    half_width = max(FIRST_BOX, found.box)
    for _ in range(BOXES):
        try:
            off = frame.off(loss.hessian(_box(centre, half_width)))
        except NotAnalyticError:  # this box reaches too far
            q = math.inf
        else:
            q = above(off) if off.is_finite() else math.inf
        if q < 1 and half_width > best[0]:
            best = (half_width, q)
        if 0.5 * TARGET <= q < 1:
            break
        # q grows with the box about in proportion.
        half_width = max(half_width * min(max(TARGET / max(q, 1e-300), 1e-3), 1e3), found.box)
    return best


def _box(centre: list[arb], half_width: float) -> list[arb]:
    from flint import arb

    return [arb(c, half_width) for c in centre]


def _norm(balls: list[arb]) -> arb:
    """The Euclidean norm."""
    return sum((ball * ball for ball in balls), start=0 * balls[0]).sqrt()


def _row_sum(matrix: arb_mat) -> arb:
    """max_i Σ_j |a_ij|, a bound of the Euclidean norm of a symmetric matrix."""
    sums = [sum((abs(ball) for ball in row), start=0 * abs(row[0])) for row in matrix.tolist()]
    return max(sums, key=lambda ball: ball.upper())


def above(ball: arb) -> float:
    """A float that is no less than any number of the ball."""
    return math.nextafter(float(ball.upper()), math.inf)


def below(ball: arb) -> float:
    """A float that is no larger than any number of the ball."""
    return math.nextafter(float(ball.lower()), -math.inf)
