"""Exponential Rosenbrock method of order 5: the linearised flow is solved exactly, the rest by quadrature.

At each accepted point θ the flow is split into dΔ/dt = f − HΔ + D(Δ), with the increment Δ, f = −∇L(θ), the Hessian H and
what linearisation leaves out, D(Δ) = −∇L(θ + Δ) − f + HΔ = O(|Δ|²). By variation of constants, with Z = −hH and the
φ-functions (``torch_gradflow.flow.phi``), Δ(h) = h φ_1(Z) f + ∫₀ʰ e^{−(h−s)H} D(Δ(s)) ds. If D along the step is d₂ s² + d₃ s³
(s in units of h; it begins with s²), the integral is h (2 φ_3(Z) d₂ + 6 φ_4(Z) d₃). Two gradients give d₂ and d₃:

    Δ₂ = h/2 φ_1(Z/2) f,                                                             D₂ = D(Δ₂),
    Δ₃ = 9h/10 φ_1(9Z/10) f + h (27/25 φ_3(Z/2) + 729/125 φ_3(9Z/10)) D₂,            D₃ = D(Δ₃),
    Δ  = h φ_1(Z) f + h (18 φ_3(Z) − 60 φ_4(Z)) D₂ + h (−250/81 φ_3(Z) + 500/27 φ_4(Z)) D₃

is the method exprb53s3 (V. T. Luan and A. Ostermann, Exponential Rosenbrock methods of order five – construction, analysis
and numerical comparisons, J. Comput. Appl. Math. 255, 2014; for the class M. Hochbruck, A. Ostermann and J. Schweitzer,
Exponential Rosenbrock-type methods, SIAM J. Numer. Anal. 47, 2009). Its order conditions, checked in the tests, with the
weights b_i(Z) and nodes c = (½, 9/10):

    Σ b_i c_i² = 2 φ_3 and Σ b_i c_i³ = 6 φ_4, for all Z: the quadrature above;
    Σ b_i c_i⁴ = 24 φ_5 and Σ b_i c_i ψ_i = 0 at Z = 0, with the stages' errors ψ_i = Σ_j a_ij c_j²/2 − c_i³ φ_3(c_i Z).

So it is of order 5, of order 4 uniformly in the stiffness, and exact where L is quadratic. Without the cubic term 6 h φ_4 d₃,
with d₃ from the same two values, it is of order 3: that term, E = h (−60 φ_4 D₂ + 500/27 φ_4 D₃), is its error estimate.

E is far larger than the error of the solution, h⁴ against h⁶ for small h: with E itself held at the tolerance, the error at
the end was 10⁻³ of it on T33 to t = 100 and 10⁻³ to 10⁻⁴ on deep linear networks, falling as rtol^(5/4) there. The step is
accepted if the estimate κ |E|^(5/4) is at most the tolerance, |E| relative to θ: a quantity of order h⁵, as the estimates of
methods of order 5 that carry on the better solution, so that the error at the end falls as rtol. For rtol = 10⁻⁴, …, 10⁻⁹ it
is 0.01 to 0.8 rtol on T33 to t = 100 and 0.04 to 0.5 rtol on deep linear networks that leave three saddles.

A further estimate, of order h⁵, from the quartic term 24 h φ_5 d₄, to which the gradient at the end of the step contributes,
was tried and left out: at equal error it saved 5 to 15 % on T33 and cost 10 to 20 % more on deep linear networks, where each
rejected step then costs a Hessian. pexprb54s4 (Luan and Ostermann, Parallel exponential Rosenbrock methods, Comput. Math.
Appl. 71, 2016), with three gradients per step, cost 1.2 to 1.6 times as much at equal error on both.

Modes of negative curvature grow by e^{h|λ|} in a step, and what two gradients cannot see grows with them: rounding errors of
θ. They may grow up to the tolerance: h |λ| ≤ log(rtol/ε). A start exactly on a saddle would otherwise allow any step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from torch_gradflow.flow.control import norm, weights
from torch_gradflow.flow.method import Derivative, Span
from torch_gradflow.flow.onestep import OneStepMethod, Stepper, Trial
from torch_gradflow.flow.phi import phi
from torch_gradflow.flow.solution import Knot
from torch_gradflow.objectives.base import Objective

# κ of the error estimate: at rtol = 10⁻⁶ it accepts |E| up to 100 times the tolerance. |E|/100 was above the local error in
# more than nine of ten steps, by a factor of 4 in the median (deep linear networks, against steps a quarter as long).
CALIBRATION = 0.1
# The error of a Krylov approximation, in units of the tolerance: it converges faster than geometrically, so that a hundredth
# costs a few Hessian–vector products more than a tenth, and φ-functions of different vectors add up.
KRYLOV_SHARE = 0.01
# Hessian–vector products per Krylov space, and so vectors of length P that it keeps (two spaces at a time). For stiff problems
# products grow as √h only, so longer spaces pay; memory bounds them.
KRYLOV_CAP = 120

# A sum of terms w φ_k(cZ), each as (w, k, c).
Function = tuple[tuple[float, int, float], ...]

C2, C3 = 0.5, 0.9
# Of f: both stages, and the linearised step.
OF_F: tuple[Function, ...] = (((C2, 1, C2),), ((C3, 1, C3),), ((1.0, 1, 1.0),))
# Of D₂: a₃₂; its share of the quadratic and of the cubic term of D.
OF_D2: tuple[Function, ...] = (((27 / 25, 3, C2), (729 / 125, 3, C3)), ((18.0, 3, 1.0),), ((-60.0, 4, 1.0),))
# Of D₃: the same terms.
OF_D3: tuple[Function, ...] = (((-250 / 81, 3, 1.0),), ((500 / 27, 4, 1.0),))
NODES, HIGHEST = (C2, C3, 1.0), 4


class TooLong(Exception):
    """A step is too long to be tried.

    Attributes:
        step_size: The longest one that may be.
    """

    def __init__(self, step_size: float) -> None:
        super().__init__(step_size)
        self.step_size = step_size


class Linearisation(ABC):
    """Functions of the Hessian H at one point, in coordinates that suit them."""

    @abstractmethod
    def project(self, vector: Tensor) -> Tensor:
        """The coordinates of a vector of shape ``(P,)``."""

    @abstractmethod
    def lift(self, coordinates: Tensor) -> Tensor:
        """The vector with these coordinates."""

    @abstractmethod
    def apply(self, functions: tuple[Function, ...], coordinates: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
        """F(−hH) v for all functions F, and H F(−hH) v: the rows of two tensors of shape ``(len(functions), P)``.

        Raises:
            TooLong: If an unstable mode would grow too much, or the approximation is not accurate enough.
        """


# The linearisation at an accepted point, from H there if it is known.
Linearise = Callable[[Knot, Tensor | None], Linearisation]


class Exprb53(OneStepMethod):
    """exprb53s3 on an eigendecomposition of the Hessian: one Hessian and two further gradients per step.

    Values between accepted points come from three of them and their slopes (``n_knots``): degree 5.
    """

    name = "exprb53"
    order = 5
    estimate = 4
    needs: Derivative = "hessian"
    n_knots = 3

    def begin(self, objective: Objective, span: Span, numbers: tuple[float, ...]) -> Stepper:
        """See ``OneStepMethod``."""
        growth = allowed_growth(span.rtol, objective.resolution)

        def linearise(here: Knot, hessian: Tensor | None) -> Linearisation:
            if hessian is None:
                hessian = objective.hessian(here.theta)
                if not bool(torch.isfinite(hessian).all()):
                    raise FloatingPointError(
                        f"The Hessian is not finite at t = {here.t:.6g}, where loss and gradient are: use a method that needs "
                        "gradients only, or a loss that is twice differentiable."
                    )
            return Eigenbasis(hessian, growth)

        return ExponentialStepper(objective, span, linearise, with_hessian=True)


class Exprb53Lanczos(OneStepMethod):
    """exprb53s3 on Krylov spaces: three of them and two further gradients per step, no dense matrix."""

    name = "exprb53-lanczos"
    order = 5
    estimate = 4
    needs: Derivative = "hvp"
    n_knots = 3

    def begin(self, objective: Objective, span: Span, numbers: tuple[float, ...]) -> Stepper:
        """See ``OneStepMethod``."""
        growth = allowed_growth(span.rtol, objective.resolution)

        def linearise(here: Knot, hessian: Tensor | None) -> Linearisation:
            tolerated = weights(span.rtol, span.atol, here.theta)
            return Krylov(lambda vector: objective.hvp(here.theta, vector), tolerated, growth)

        return ExponentialStepper(objective, span, linearise, with_hessian=False)


def allowed_growth(rtol: float, resolution: float) -> float:
    """By what exponent a mode may grow in a step, log(rtol/ε), at least 1: rounding errors then stay below the tolerance."""
    return max(1.0, math.log(rtol / resolution))


class ExponentialStepper(Stepper):
    """The steps of one run, by any linearisation.

    Args:
        objective: L.
        span: For its tolerances, and for where the run ends.
        linearise: Makes the linearisation at a point.
        with_hessian: Whether that takes a Hessian, which then is evaluated along with the gradient at the end of a step.
    """

    def __init__(self, objective: Objective, span: Span, linearise: Linearise, *, with_hessian: bool) -> None:
        self._objective, self._span = objective, span
        self._linearise, self._with_hessian = linearise, with_hessian
        self._here: Knot | None = None
        self._force = torch.empty(0)
        self._linear: Linearisation
        # The end of the last successful step, and H there.
        self._next: tuple[Tensor, Tensor] | None = None

    def numbers(self) -> tuple[float, ...]:
        """Nothing: all is evaluated at the point itself."""
        return ()

    def attempt(self, here: Knot, step_size: float) -> Trial | float:
        """See ``Stepper``; the linearisation of a point is kept for all steps from there."""
        if self._here is None or self._here.theta is not here.theta:
            known = self._next[1] if self._next is not None and self._next[0] is here.theta else None
            self._next = None
            self._linear = self._linearise(here, known)
            self._force = self._linear.project(-here.gradient)
            self._here = here
        try:
            increment, error = self._step(here, step_size)
        except TooLong as reason:
            return reason.step_size
        except FloatingPointError:
            return Trial(here.theta, math.inf)
        theta = here.theta + increment
        size = calibrated(norm(error, weights(self._span.rtol, self._span.atol, here.theta, theta)), self._span.rtol)
        if size > 1 or not self._with_hessian or step_size >= self._span.t_end - here.t:
            return Trial(theta, size)
        # The next step needs H here, with which L and ∇L come along.
        loss, gradient, hessian = self._objective.loss_gradient_hessian(theta)
        if not bool(torch.isfinite(hessian).all()):
            return Trial(theta, math.inf)
        self._next = (theta, hessian)
        return Trial(theta, size, (loss, gradient))

    def _step(self, here: Knot, h: float) -> tuple[Tensor, Tensor]:
        """Δ and its error estimate E."""
        linear = self._linear
        (delta2, delta3, linearised), (h_delta2, h_delta3, _) = linear.apply(OF_F, self._force, h)
        d2 = self._remainder(here, h * delta2, h * h_delta2)
        (a32, quadratic2, cubic2), (h_a32, _, _) = linear.apply(OF_D2, d2, h)
        d3 = self._remainder(here, h * (delta3 + a32), h * (h_delta3 + h_a32))
        (quadratic3, cubic3), _ = linear.apply(OF_D3, d3, h)
        cubic = cubic2 + cubic3
        return linear.lift(h * (linearised + quadratic2 + quadratic3 + cubic)), linear.lift(h * cubic)

    def _remainder(self, here: Knot, delta: Tensor, h_delta: Tensor) -> Tensor:
        """D(Δ) = ∇L(θ) − ∇L(θ + Δ) + HΔ in coordinates.

        Raises:
            FloatingPointError: If it is not finite.
        """
        gradient = self._objective.loss_and_gradient(here.theta + self._linear.lift(delta))[1]
        remainder = self._linear.project(here.gradient - gradient) + h_delta
        if not bool(torch.isfinite(remainder).all()):
            raise FloatingPointError
        return remainder


def calibrated(size: float, rtol: float) -> float:
    """κ |E|^(5/4) in units of the tolerance, for the size of E in these units."""
    return CALIBRATION * math.pow(size * rtol, 1.25) / rtol


class Eigenbasis(Linearisation):
    """By the eigendecomposition H = QΛQᵀ; coordinates are Qᵀv, there functions of H are products.

    Args:
        hessian: H, finite.
        growth: By what exponent an unstable mode may grow in a step.
    """

    def __init__(self, hessian: Tensor, growth: float) -> None:
        self._values: Tensor
        self._vectors: Tensor
        self._values, self._vectors = torch.linalg.eigh(hessian)
        unstable = -float(self._values[0])
        self._longest = growth / unstable if unstable > 0 else math.inf
        self._step_size = math.nan
        self._table = hessian

    def project(self, vector: Tensor) -> Tensor:
        """Qᵀv."""
        return self._vectors.T @ vector

    def lift(self, coordinates: Tensor) -> Tensor:
        """Qv."""
        return self._vectors @ coordinates

    def apply(self, functions: tuple[Function, ...], coordinates: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
        """See ``Linearisation``; the φ-functions of a step size are computed once."""
        if step_size > self._longest * (1 + 1e-9):  # a step may be stretched by a hair to end somewhere
            raise TooLong(self._longest)
        if step_size != self._step_size:
            self._table = phi(_arguments(step_size, self._values), HIGHEST).reshape(-1, len(self._values))
            self._step_size = step_size
        values = (_weights(functions, self._values.dtype, self._values.device) @ self._table) * coordinates
        return values, values * self._values


def _arguments(step_size: float, eigenvalues: Tensor) -> Tensor:
    """−c h λ for all nodes c (rows)."""
    return torch.outer(_nodes(eigenvalues.dtype, eigenvalues.device), -step_size * eigenvalues)


@lru_cache
def _nodes(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(NODES, dtype=dtype, device=device)


@lru_cache
def _weights(functions: tuple[Function, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The functions as rows of weights of φ_0(c₂Z), φ_0(c₃Z), φ_0(Z), φ_1(c₂Z) and so on."""
    rows = torch.zeros(len(functions), (HIGHEST + 1) * len(NODES), dtype=torch.float64)
    for row, function in zip(rows, functions, strict=True):
        for weight, k, c in function:
            row[k * len(NODES) + NODES.index(c)] += weight
    return rows.to(device, dtype)


class Krylov(Linearisation):
    """By Lanczos' method, for any vector in a Krylov space of its own; coordinates are the vectors themselves.

    The space of the first vector, which is f at each attempt from a point, is kept: it does not depend on the step size.

    Args:
        product: v ↦ Hv.
        tolerated: The size of a component's error that is tolerated, shape ``(P,)``.
        growth: By what exponent an unstable mode may grow in a step.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], tolerated: Tensor, growth: float) -> None:
        self._product, self._tolerated, self._growth = product, tolerated, growth
        self._first: tuple[Tensor, KrylovSpace] | None = None

    def project(self, vector: Tensor) -> Tensor:
        """The vector itself."""
        return vector

    def lift(self, coordinates: Tensor) -> Tensor:
        """The vector itself."""
        return coordinates

    def apply(self, functions: tuple[Function, ...], coordinates: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
        """See ``Linearisation``; the space grows until all errors are small enough."""
        if self._first is None:
            self._first = (coordinates, KrylovSpace(self._product, coordinates, self._tolerated))
        kept, space = self._first
        if coordinates is not kept:
            space = KrylovSpace(self._product, coordinates, self._tolerated)
        while True:
            ritz = space.ritz()
            unstable = -float(ritz.values[0])
            if unstable > 0 and step_size * unstable > self._growth * (1 + 1e-9):
                raise TooLong(self._growth / unstable)
            if space.error(functions, step_size, ritz) <= KRYLOV_SHARE:
                return space.apply(functions, step_size, ritz)
            if space.size >= KRYLOV_CAP:
                raise TooLong(space.longest(functions, step_size, ritz))
            space.grow(min(KRYLOV_CAP, space.size + max(1, space.size // 4)))


class Ritz:
    """The eigendecomposition T = SΘSᵀ of a tridiagonal matrix: what functions of it are made from.

    Attributes:
        values: Θ, ascending, shape ``(m,)``; like all of T in float64 on the CPU.
        vectors: S, shape ``(m, m)``.
    """

    def __init__(self, diagonal: Sequence[float], off_diagonal: Sequence[float]) -> None:
        beside = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(beside, 1) + torch.diag(beside, -1)
        self.values, self.vectors = torch.linalg.eigh(matrix)


class KrylovSpace:
    """An orthonormal basis V of span{v, Hv, …, H^{m−1}v} with HV = VT + β v_{m+1} eᵀ_m, T tridiagonal (Lanczos).

    Every new vector is made orthogonal to all others, twice (Parlett, The Symmetric Eigenvalue Problem, section 6.9): Krylov
    spaces are short here, and T keeps its meaning.

    The error of ‖v‖ V F(−hT) e₁ as F(−hH) v for F = φ_k, by the residual of the differential equation that s^k φ_k(sZ)v solves
    (Saad 1992; Hochbruck and Lubich 1997): it is at most h β ‖v‖ ∫₀¹ e^{(1−s)μ} |eᵀ_m s^k φ_k(−shT) e₁| ds for any μ above all
    eigenvalues of −hH. The off-diagonal elements of T are positive, so eᵀ_m e^{−sT} e₁ and with it the integrand have one
    sign, and the integral is |eᵀ_m G e₁| with the divided difference G = (φ_k(μ) − φ_k(−hT))/(μ + hT). μ is taken as 1 above
    the largest eigenvalue of −hT and zero. The error is taken to have the direction of v_{m+1}.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], vector: Tensor, tolerated: Tensor) -> None:
        self._product, self._tolerated = product, tolerated
        self._norm = float(vector.norm())
        self._basis = vector.new_zeros(8, vector.shape[0])
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        # The space contains all powers: nothing is left to approximate.
        self._complete = self._norm == 0
        if not self._complete:
            self._basis[0] = vector / self._norm
        self.grow(2)

    @property
    def size(self) -> int:
        """m."""
        return len(self._diagonal)

    def grow(self, size: int) -> None:
        """Extend the basis to this size, or to what there is."""
        while self.size < size and not (self._complete and self.size):
            m = self.size
            if m + 1 == len(self._basis):
                self._basis = torch.cat([self._basis, torch.zeros_like(self._basis)])
            image = self._product(self._basis[m]) if self._norm else torch.zeros_like(self._basis[m])
            basis = self._basis[: m + 1]
            components = basis @ image
            rest = image - components @ basis
            again = basis @ rest
            rest -= again @ basis
            along, beside, whole = torch.stack([components[m] + again[m], rest.norm(), image.norm()]).tolist()
            if not math.isfinite(whole):
                raise FloatingPointError
            self._complete = beside <= 10 * torch.finfo(rest.dtype).eps * max(whole, abs(along)) or m + 1 == len(rest)
            self._diagonal.append(along)
            self._beside.append(0.0 if self._complete else beside)
            if not self._complete:
                self._basis[m + 1] = rest / beside

    def ritz(self) -> Ritz:
        """The eigendecomposition of T."""
        return Ritz(self._diagonal, self._beside[:-1])

    def error(self, functions: tuple[Function, ...], step_size: float, ritz: Ritz) -> float:
        """The largest error bound of h F(−hH)v among the functions, in units of the tolerance."""
        if self._complete:
            return 0.0
        z = _arguments(step_size, ritz.values)
        mu = 1 + z.amax(1, keepdim=True).clamp(min=0)
        values = phi(torch.cat([z, mu], 1), HIGHEST)
        difference = (values[:, :, -1:] - values[:, :, :-1]) / (mu - z)
        each = (difference @ (ritz.vectors[-1] * ritz.vectors[0])).abs() * _nodes(z.dtype, z.device)
        worst = float((_weights(functions, z.dtype, z.device).abs() @ each.reshape(-1)).max())
        size = step_size**2 * self._beside[-1] * self._norm * worst * norm(self._basis[self.size], self._tolerated)
        return size if math.isfinite(size) else math.inf

    def longest(self, functions: tuple[Function, ...], step_size: float, ritz: Ritz) -> float:
        """A step, shorter than the given one by a power of 0.8, for which the space is large enough."""
        shorter = 0.8 * step_size
        while self.error(functions, shorter, ritz) > KRYLOV_SHARE and shorter > 1e-6 * step_size:
            shorter *= 0.8
        return shorter

    def apply(self, functions: tuple[Function, ...], step_size: float, ritz: Ritz) -> tuple[Tensor, Tensor]:
        """F(−hH)v and H F(−hH)v."""
        m, z = self.size, _arguments(step_size, ritz.values)
        table = _weights(functions, z.dtype, z.device) @ phi(z, HIGHEST).reshape(-1, m)
        spectral = table * (self._norm * ritz.vectors[0])
        values = spectral @ ritz.vectors.T
        products = torch.cat([(spectral * ritz.values) @ ritz.vectors.T, self._beside[-1] * values[:, -1:]], 1)
        both = self._basis[: m + 1]
        return values.to(both) @ both[:m], products.to(both) @ both
