"""What kind of point this is, and how sure that is."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torch_gradflow.checks import check_number
from torch_gradflow.minimize.channels import Channel, find_channel
from torch_gradflow.minimize.kantorovich import Kantorovich, estimate
from torch_gradflow.minimize.network import KnownNetwork, known_network
from torch_gradflow.minimize.probing import Probe, Steep, probe
from torch_gradflow.minimize.proof import Proof, prove_minimum, require_flint
from torch_gradflow.minimize.rounding import Floor
from torch_gradflow.minimize.spectrum import LANCZOS_STEPS, RISK, Spectrum, extremes, full_spectrum
from torch_gradflow.minimize.symmetries import Explanation, explain
from torch_gradflow.objectives.base import Objective, check_start
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.architecture import Perceptron

Kind = Literal["minimum", "degenerate minimum", "saddle", "degenerate (undecided)", "not critical"]
End = Literal[
    "isolated minimum",
    "zero loss",
    "valley of minima",
    "flat minimum",
    "saddle",
    "channel to infinity",
    "undecided",
    "not critical",
]
# Parameters up to which all eigenvalues are computed. The work grows with the cube: a certificate's five decompositions
# take about 20 s on one core for 2000, a minute for 3000.
MAX_DENSE = 2000
# Lanczos steps where the point is not critical anyway, so that its curvature is only told for information.
FEW_STEPS = 50


@dataclass(frozen=True)
class CriticalPoint:
    """The verdict on a point.

    Attributes:
        kind: "minimum" (all eigenvalues of the Hessian are positive), "degenerate minimum" (none is negative, some are
            zero, and along no null direction that was probed does the loss fall), "saddle" (a negative eigenvalue, or
            the loss falls along a null direction), "degenerate (undecided)", or "not critical" (the gradient is larger
            than ``gradient_tolerance``).
        end: The same with what is known of the surroundings: a "degenerate minimum" has "zero loss" (a sum of squares that is
            zero up to rounding, so that it cannot fall), or is a "valley of minima" (along some null directions the loss
            stays the same) or a "flat minimum" (it rises along all of them); a "channel to infinity" is what ``channel``
            describes, whatever the kind.
        eigenvalues: Of the Hessian, ascending: all of them, shape ``(P,)``, or, where P > 2000, some of the lowest and the
            highest.
        uncertainties: How well each eigenvalue is known: P ε ‖H‖ for rounding (less where the small eigenvalues of a badly
            scaled Hessian could be had from its inverse), plus twice its change over the Newton step to the critical point
            of the quadratic model; of the extreme ones the norm of the residual Hv − λv.
        complete: Whether ``eigenvalues`` are all of them.
        n_negative: Eigenvalues that are certainly negative; where not all are known, those among the known ones.
        n_zero: Eigenvalues that cannot be told from zero. Where the Hessian is badly scaled, both are counted with its rows
            brought to the same size, which changes neither number, if that leaves none that is zero.
        newton_decrement: √(gᵀ H⁺ g) over the known eigenvalues that are not zero: half the square of it is about how far
            the loss lies above that of the critical point of the local quadratic model.
        tolerance: The largest uncertainty of the eigenvalues that count as zero; that of rounding where none does.
        gradient_norm: ‖∇L‖ at θ, in the infinity norm; of a critical point with the gradient correct to the last digit where
            the objective offers it (``Objective.compensated``), so that 1e-16 is no rounding error of its own.
        gradient_floor: The change of ∇L when θ is rounded, root mean square of 8 random roundings, in the infinity norm:
            below it, "zero" means nothing.
        gradient_tolerance: Up to which infinity norm a gradient of this direction counts as zero: until one of its
            components exceeds both gtol and 4 times its own floor.
        kantorovich: The Newton–Kantorovich quantity and radii, an estimate; None for singular Hessians and P > 2000.
        explanation: How many of the zero eigenvalues the symmetries of the architecture explain; None where there are
            none, or where the architecture is not known.
        channel: The pair of neurons that is in a channel to infinity, or None.
        descent: Of a saddle a unit vector along which the loss falls, with one sign or with both; shape ``(P,)``.
        proof: What ball arithmetic proved; None where that was not asked for.
        message: The verdict as a sentence, with figures.
    """

    kind: Kind
    end: End
    eigenvalues: Tensor
    uncertainties: Tensor
    complete: bool
    n_negative: int
    n_zero: int
    newton_decrement: float
    tolerance: float
    gradient_norm: float
    gradient_floor: float
    gradient_tolerance: float
    message: str
    kantorovich: Kantorovich | None = None
    explanation: Explanation | None = None
    channel: Channel | None = None
    descent: Tensor | None = None
    proof: Proof | None = None


def certify(
    objective: Objective,
    theta: Tensor,
    *,
    gtol: float = 1e-13,
    rigorous: bool = False,
    network: Perceptron | RecognisedPerceptron | None = None,
    earlier: Tensor | None = None,
) -> CriticalPoint:
    """Classify θ by gradient, Hessian spectrum, and, where that is singular, by probing the null directions.

    Null eigenvectors v are probed by moving to θ ± s v, s = 0.01 (1 + ‖θ‖), and from there back to the valley floor by
    chord Newton steps in the other directions; the loss there is compared with that at θ. So a valley of minima (where
    it stays the same) and a quartic minimum (where it rises) are told from a degenerate saddle (where it falls); what
    differs only at fourth order below rounding, or in combinations of directions that were not probed, is not seen. Where
    the symmetries of a known network explain all zero eigenvalues, nothing need be probed: the loss is constant on a
    manifold of that dimension, and rises across it.

    With more than 2000 parameters the extreme eigenvalues come from Lanczos' method. A negative one is then certain, up to
    rounding; that there is none can only be likely, and "minimum" is said where its probability is at least 0.999.

    Args:
        objective: L(θ).
        theta: The point, shape ``(P,)``.
        gtol: Gradients up to this, in the infinity norm, count as zero.
        rigorous: Whether to prove in ball arithmetic that there is exactly one critical point near θ, and that it is a
            minimum: for perceptrons with P ≤ 50 and up to 10⁴ samples whose activations are analytic; needs python-flint.
        network: The perceptron whose loss L is, with θ for its parameters (or, with loss and data, how these come from θ):
            to count symmetries and to find channels. None takes that of the objective where it has one. ``rigorous`` needs
            loss and data too.
        earlier: A point from which the flow or a minimiser came to θ, shape ``(P,)``: the motion since then must be that of
            a channel for one to be found.

    Returns:
        The verdict. It costs 9 or 10 gradients, two Hessians (four more where it seems singular and rows differ in size by
        more than 1e6), three more of them at a regular point, and some gradients per null direction; or 300 Hessian–vector
        products.

    Raises:
        TypeError, ValueError: For arguments that make no sense.
        ImportError: If ``rigorous`` needs python-flint, which is not installed.
    """
    check_start(objective, theta)
    check_number("gtol", gtol, least=0.0)
    if rigorous:
        require_flint()
    if earlier is not None and earlier.shape != theta.shape:
        raise ValueError(f"earlier must have the shape {tuple(theta.shape)} of theta, not {tuple(earlier.shape)}.")
    known, theta = known_network(objective, network), theta.detach()
    loss, gradient = objective.loss_and_gradient(theta)
    at = _At(objective, theta, loss, gradient, Floor.at(objective, theta, loss, gradient), gtol)
    point = _from_all(at, known) if objective.n_parameters <= MAX_DENSE else _from_extremes(at)
    channel = None if known is None else find_channel(objective, known, theta, loss, earlier=earlier)
    if channel is not None and point.kind != "saddle":
        message = f"{point.message} This is a channel to infinity: {channel}."
        point = replace(point, end="channel to infinity", channel=channel, message=message)
    if rigorous:
        proof = prove_minimum(known, theta)
        point = replace(point, proof=proof, message=f"{point.message} {proof.message}")
    return point


@dataclass(frozen=True)
class _At:
    """What is known at θ before its Hessian."""

    objective: Objective
    theta: Tensor
    loss: Tensor
    gradient: Tensor
    floor: Floor
    gtol: float

    @property
    def tolerance(self) -> float:
        return self.floor.tolerance(self.gradient, self.gtol)

    @property
    def is_critical(self) -> bool:
        return float(self.gradient.abs().max()) <= self.tolerance

    @property
    def is_zero_loss(self) -> bool:
        return self.floor.is_zero_loss(self.objective, self.loss)

    def verdict(self, kind: Kind, end: End, why: str, **known: object) -> CriticalPoint:
        return CriticalPoint(
            kind=kind,
            end=end,
            gradient_norm=_true_norm(self.objective, self.theta, self.gradient, self.is_critical),
            gradient_floor=float(self.floor.gradient.max()),
            gradient_tolerance=self.tolerance,
            message=f"{kind[0].upper()}{kind[1:]}: {why}",
            **known,  # type: ignore[arg-type]
        )

    def not_critical(self) -> str:
        norm, floor = float(self.gradient.abs().max()), float(self.floor.gradient.max())
        return f"the gradient norm {norm:.2e} is above {self.tolerance:.2e} (rounding θ changes the gradient by {floor:.1e})."

    def zero_loss(self) -> str:
        return (
            f"the loss is a sum of squares and {float(self.loss):.1e}, zero up to rounding (which changes it by "
            f"{self.floor.loss:.1e}), so that it cannot fall"
        )

    def least(self) -> str:
        """How far the loss can fall at most, where that is known."""
        return (
            f"; the loss is a sum of squares, and can fall by {float(self.loss):.1e} at most"
            if self.objective.has_residuals
            else ""
        )


def _true_norm(objective: Objective, theta: Tensor, gradient: Tensor, is_critical: bool) -> float:
    """‖∇L‖ in the infinity norm; of a critical point without the rounding of its evaluation, where that is offered."""
    if is_critical:
        with suppress(NotImplementedError):  # the reason is nothing that a user could mend here
            _, gradient = objective.compensated().loss_and_gradient(theta)
    return float(gradient.abs().max())


def _from_all(at: _At, network: KnownNetwork | None) -> CriticalPoint:
    """The verdict from all eigenvalues."""
    objective, theta = at.objective, at.theta
    hessian = objective.hessian(theta)
    spectrum = full_spectrum(objective, theta, at.gradient, hessian)
    n_zero, n_negative = spectrum.n_zero, spectrum.n_negative
    near = None
    if n_zero == 0:
        near = estimate(objective, theta, hessian, spectrum.scale, spectrum.values, spectrum.step)
    known = {
        "eigenvalues": spectrum.eigenvalues,
        "uncertainties": spectrum.uncertainties,
        "complete": True,
        "n_negative": n_negative,
        "n_zero": n_zero,
        "newton_decrement": spectrum.decrement,
        "tolerance": spectrum.tolerance,
        "kantorovich": near,
    }
    lowest = f"the lowest {float(spectrum.eigenvalues[0]):.3e} (known to {float(spectrum.uncertainties[0]):.1e})"
    distances = "" if near is None else f" {near}."
    if not at.is_critical:
        return at.verdict("not critical", "not critical", f"{at.not_critical()}{distances}", **known)
    if n_zero == n_negative == 0:
        return at.verdict("minimum", "isolated minimum", f"all eigenvalues are positive, {lowest}.{distances}", **known)
    zeros = f"{n_zero} of {len(theta)} eigenvalues are zero to within {spectrum.tolerance:.1e}"
    explanation = None
    if network is not None and n_zero > 0:
        explanation = explain(network, theta, torch.linalg.qr(spectrum.directions[:, spectrum.null]).Q)
        zeros = f"{zeros}, {explanation}"
    known["explanation"] = explanation
    explained = explanation is not None and explanation.joint and explanation.n_explained == n_zero
    if explained and n_negative == 0:
        why = f"{zeros}: the loss keeps its value along all of them, and rises in all other directions."
        return at.verdict("degenerate minimum", "valley of minima", why, **known)
    if at.is_zero_loss:
        return at.verdict("degenerate minimum", "zero loss", f"{at.zero_loss()}; {zeros}.", **known)
    if n_negative > 0:
        down = spectrum.directions[:, 0]
        why = f"{n_negative} negative {'eigenvalue' if n_negative == 1 else 'eigenvalues'}, {lowest}.{distances}"
        return at.verdict("saddle", "saddle", why, descent=down / down.norm(), **known)
    found = _probed(at, spectrum)
    if found.answer == "falls":
        why = f"{zeros}; the loss falls along a null direction."
        return at.verdict("saddle", "saddle", why, descent=found.descent, **known)
    if found.answer == "unclear":
        why = f"{zeros}; probing them gave no clear answer{at.least()}."
        return at.verdict("degenerate (undecided)", "undecided", why, **known)
    end: End = "valley of minima" if found.answer == "stays" else "flat minimum"
    what = "keeps its value along some null directions and falls along none" if found.answer == "stays" else "rises along all"
    return at.verdict("degenerate minimum", end, f"{zeros}; the loss {what} of those probed: a {end}.", **known)


def _probed(at: _At, spectrum: Spectrum) -> Probe:
    """What the loss does along the null directions."""
    null, size = spectrum.null, float(spectrum.values.abs().max())
    steep = Steep(spectrum.directions[:, ~null], spectrum.values[~null])
    if bool(null.all()):
        flat = torch.eye(len(null), dtype=at.theta.dtype, device=at.theta.device)
    else:
        flat = torch.linalg.qr(spectrum.directions[:, null]).Q
    return probe(at.objective, at.theta, at.loss, at.gradient, flat, steep, size)


def _from_extremes(at: _At) -> CriticalPoint:
    """The verdict from the extreme eigenvalues, by products of the Hessian with vectors."""
    n_steps = LANCZOS_STEPS if at.is_critical else FEW_STEPS
    found = extremes(lambda vectors: at.objective.hvp(at.theta, vectors), at.theta, n_steps=n_steps)
    values, residuals = found.values, found.residuals
    apart = values.abs() > residuals
    components = found.vectors.T @ at.gradient
    n_negative = int((values < -residuals).sum())
    known = {
        "eigenvalues": values,
        "uncertainties": residuals,
        "complete": False,
        "n_negative": n_negative,
        "n_zero": int((~apart).sum()),
        "newton_decrement": float((components[apart] ** 2 / values[apart]).abs().sum().sqrt()),
        "tolerance": float(residuals.max()),
    }
    if not at.is_critical:
        return at.verdict("not critical", "not critical", at.not_critical(), **known)
    lowest = f"the lowest eigenvalue found is {float(values[0]):.3e} (residual {float(residuals[0]):.1e})"
    bound = f"after {found.n_steps} steps of Lanczos' method from a random start none lies below {found.lowest:.3e} with a "
    bound = f"{lowest}; {bound}probability of at least {1 - RISK:g}"
    if found.lowest > 0:
        return at.verdict("minimum", "isolated minimum", f"{bound}. That is likely, not proven.", **known)
    if at.is_zero_loss:
        why = f"{at.zero_loss()}; {lowest}, and whether other minima adjoin is not known."
        return at.verdict("degenerate minimum", "zero loss", why, **known)
    if n_negative:
        why = f"{lowest}, which is certain up to rounding; how many are negative is not known."
        return at.verdict("saddle", "saddle", why, descent=found.vectors[:, 0], **known)
    why = f"{bound}: whether one is negative or zero is not decided{at.least()}."
    return at.verdict("degenerate (undecided)", "undecided", why, **known)
