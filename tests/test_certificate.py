"""What certificates say of critical points whose Hessians are known: singular, indefinite, badly scaled, large."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from problems import teacher_student
from torch import Tensor

from torch_gradflow.minimize.certificate import MAX_DENSE, certify
from torch_gradflow.minimize.kantorovich import radii
from torch_gradflow.minimize.rounding import Floor
from torch_gradflow.minimize.spectrum import balance, extremes
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.objectives.function import FunctionObjective
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.perceptron.activations import IDENTITY, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples


def objective_of(term: Callable[[Tensor], Tensor], n: int) -> FunctionObjective:
    """A function of θ as an Objective."""
    return FunctionObjective(lambda: (term,), n, torch.float64, torch.device("cpu"))


def vector(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def quadratic(hessian: Tensor) -> FunctionObjective:
    """1 + θᵀHθ/2."""
    return objective_of(lambda t: 1 + 0.5 * t @ (hessian @ t), len(hessian))


def rotated(spectrum: Tensor) -> Tensor:
    """A dense symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)).Q
    return (q * spectrum) @ q.T


@pytest.mark.parametrize(
    ("spectrum", "kind", "n_negative", "n_zero"),
    [
        ((1e-6, 0.1, 1.0, 3.0, 20.0), "minimum", 0, 0),
        ((-1e-6, 0.1, 1.0, 3.0, 20.0), "saddle", 1, 0),
        ((-5.0, -1.0, 1.0, 3.0, 20.0), "saddle", 2, 0),
        ((-2.0, 0.0, 0.0, 3.0, 20.0), "saddle", 1, 2),
        ((0.0, 0.1, 1.0, 3.0, 20.0), "degenerate minimum", 0, 1),
        ((0.0, 0.0, 0.0, 3.0, 20.0), "degenerate minimum", 0, 3),
        ((0.0, 0.0, 0.0, 0.0, 0.0), "degenerate (undecided)", 0, 5),
        ((-5.0, -4.0, -3.0, -2.0, -1.0), "saddle", 5, 0),
    ],
)
def test_known_spectra(spectrum: tuple[float, ...], kind: str, n_negative: int, n_zero: int) -> None:
    """Definite, indefinite, singular, rank-deficient and zero Hessians, with their eigenvalues within what is promised."""
    certificate = certify(quadratic(rotated(vector(*spectrum))), torch.zeros(5, dtype=torch.float64))
    assert certificate.kind == kind
    assert (certificate.n_negative, certificate.n_zero, certificate.complete) == (n_negative, n_zero, True)
    assert bool(((certificate.eigenvalues - vector(*spectrum)).abs() <= certificate.uncertainties + 1e-300).all())
    assert (certificate.end == "valley of minima") == (kind == "degenerate minimum")
    assert (certificate.descent is not None) == (kind == "saddle")


def graded(signs: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """S A S for scales s from 1e-4 to 1e4, so that diagonals span 1e±8, and a well-conditioned A with those signs."""
    scale = torch.logspace(-4, 4, len(signs), dtype=torch.float64)
    inner = rotated(vector(*signs) * torch.linspace(1.0, 2.0, len(signs), dtype=torch.float64))
    # Exact in float64, so that the spectrum is that of the given numbers.
    scale = torch.exp2(scale.log2().round())
    return scale[:, None] * inner * scale, scale


@pytest.mark.parametrize("signs", [(1, 1, 1, 1, 1), (1, 1, 1, 1, -1), (-1, 1, -1, 1, 1)])
def test_badly_scaled_hessians(signs: tuple[int, ...]) -> None:
    """Diagonals from 1e-8 to 1e8: definiteness is told from the balanced matrix (Sylvester's law of inertia)."""
    hessian, _ = graded(signs)
    certificate = certify(quadratic(hessian), torch.zeros(5, dtype=torch.float64))
    n_negative = sum(sign < 0 for sign in signs)
    assert certificate.kind == ("saddle" if n_negative else "minimum")
    assert (certificate.n_negative, certificate.n_zero) == (n_negative, 0)
    with mpmath.workdps(60):
        exact = sorted(float(v) for v in mpmath.eigsy(mpmath.matrix(hessian.tolist()), eigvals_only=True))
    errors = (certificate.eigenvalues - vector(*exact)).abs()
    assert bool((errors <= certificate.uncertainties).all())
    if not n_negative:  # to many digits, where a dense eigensolver has none
        assert float((errors / vector(*exact)).max()) < 1e-6
        assert bool((certificate.eigenvalues > certificate.uncertainties).all())
    else:
        direction = certificate.descent
        assert direction is not None
        assert float(direction @ (hessian @ direction)) < 0


def test_badly_scaled_and_singular() -> None:
    """A null direction stays one under scaling; (θ₀θ₁ − 1)² has one along its valley."""

    def term(t: Tensor) -> Tensor:
        return 1e8 * (t[0] * t[1] - 1) ** 2 + 1e-8 * (t[2] - 1) ** 2

    certificate = certify(objective_of(term, 3), vector(0.5, 2.0, 1.0))
    assert certificate.kind == "degenerate minimum"
    # Balancing cannot tell the soft direction from the null one beside it: both count as zero.
    assert (certificate.n_negative, certificate.n_zero) == (0, 2)
    assert certificate.end == "valley of minima"


def test_rows_of_noise_are_not_scaled_up() -> None:
    """A row that changes by its own size when θ is rounded holds nothing that could be balanced."""
    hessian = torch.diag(vector(1.0, 1e-17, 1e-9))
    noise = torch.diag(vector(0.0, 1e-17, 0.0))
    scale, error = balance(hessian, lambda: [noise])
    assert float(scale[1]) == float(scale[0])
    assert float(scale[2] ** 2) == pytest.approx(1e9, rel=1.0)
    assert error == pytest.approx(1e-16)
    one, error = balance(torch.eye(3), lambda: [torch.eye(3)])
    assert torch.equal(one, torch.ones(3)) and error == 0


def test_a_slope_in_a_soft_direction_is_no_rounding() -> None:
    """Rounding of the stiff component is larger than the whole gradient of the soft one, which still is not zero."""

    def term(t: Tensor) -> Tensor:
        return 0.5e8 * (t[0] - 1 / 3) ** 2 + 0.5e-8 * (t[1] - 1) ** 2

    here = certify(objective_of(term, 2), vector(1 / 3, 1.0))
    assert here.kind == "minimum"
    there = certify(objective_of(term, 2), vector(1 / 3, 1.5))
    assert there.kind == "not critical"
    assert here.gradient_floor > float(objective_of(term, 2).loss_and_gradient(vector(1 / 3, 1.5))[1][1])


def test_gradient_floor_covers_the_true_rounding() -> None:
    """The gradient of a small network in float64 against mpmath: its error is below the tolerance from the floor."""
    model, x, y = teacher_student(1, n_student=3, n_samples=40)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    network = Perceptron.of((2, 3, 1), Activation("softplus", (1.0, 20.0)), IDENTITY)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    objective = PerceptronObjective(network, Loss("squared error"), Samples(x.T, y.T, weights))
    loss, gradient = objective.loss_and_gradient(theta)
    with mpmath.workdps(40):
        t = [mpmath.mpf(v) for v in theta.tolist()]
        exact = [mpmath.mpf(0)] * 13
        for (u, v), (target,), weight in zip(x.tolist(), y.tolist(), weights.tolist(), strict=True):
            z = [t[2 * i] * u + t[2 * i + 1] * v + t[6 + i] for i in range(3)]
            slope = (
                2 * mpmath.mpf(weight) * (sum(t[9 + i] * mpmath.log1p(mpmath.exp(z[i])) for i in range(3)) + t[12] - target)
            )
            for i in range(3):
                inner = slope * t[9 + i] / (1 + mpmath.exp(-z[i]))
                for place, share in ((2 * i, inner * u), (2 * i + 1, inner * v), (6 + i, inner)):
                    exact[place] += share
                exact[9 + i] += slope * mpmath.log1p(mpmath.exp(z[i]))
            exact[12] += slope
        errors = vector(*(abs(float(a - b)) for a, b in zip(map(mpmath.mpf, gradient.tolist()), exact, strict=True)))
    floor = Floor.at(objective, theta, loss, gradient).gradient
    assert bool((errors <= 4 * floor).all())
    assert float(floor.max()) < 1e-13


def test_newton_decrement_and_kantorovich_on_a_cubic() -> None:
    """L = θ²/2 + θ³/6 has H = 1 + θ, K = 1, and the critical points 0 and −2."""
    start = 0.1
    certificate = certify(objective_of(lambda t: (t**2 / 2 + t**3 / 6).sum(), 1), vector(start))
    near = certificate.kantorovich
    assert near is not None
    gradient, curvature = start + start**2 / 2, 1 + start
    assert certificate.newton_decrement == pytest.approx(gradient / math.sqrt(curvature), rel=1e-12)
    assert near.beta == pytest.approx(1 / curvature)
    assert near.eta == pytest.approx(gradient / curvature)
    assert near.lipschitz == pytest.approx(1.0, rel=1e-6)
    # K is the same everywhere, so that the radii are those of the two critical points themselves.
    assert near.existence == pytest.approx(start, rel=1e-6)
    assert near.uniqueness == pytest.approx(start + 2, rel=1e-6)
    assert certificate.kind == "not critical"
    assert all(math.isnan(radius) for radius in radii(1.0, 1.0, 0.51))
    assert radii(2.0, 0.5, 0.0) == (0.5, math.inf)


def test_decrement_is_the_gap_of_a_quadratic() -> None:
    """L − min L = λ²/2."""
    objective = quadratic(rotated(vector(0.5, 2.0, 7.0)))
    theta = vector(0.3, -0.2, 0.1)
    certificate = certify(objective, theta)
    assert 0.5 * certificate.newton_decrement**2 == pytest.approx(float(objective.loss_and_gradient(theta)[0]) - 1, rel=1e-12)


LARGE = MAX_DENSE + 500


class Diagonal(Objective):
    """Σ d θ²/2 + s θ_P, without a dense Hessian."""

    def __init__(self, diagonal: Tensor, slope: float) -> None:
        self.n_parameters, self.dtype, self.device = len(diagonal), torch.float64, torch.device("cpu")
        self.resolution, self.counts = torch.finfo(torch.float64).eps, EvaluationCounts()
        self._diagonal, self._slope, self.is_sum_of_squares = diagonal, slope, False

    @property
    def has_residuals(self) -> bool:
        return self.is_sum_of_squares

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self._diagonal * theta
        gradient[-1] += self._slope
        return 0.5 * theta @ (self._diagonal * theta) + self._slope * theta[-1], gradient

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        return self._diagonal[:, None] * vectors

    def hessian(self, theta: Tensor) -> Tensor:
        raise MemoryError("dense")


@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        ((1.0,), "minimum"),
        ((-0.3, 0.0, 0.7), "saddle"),
        ((0.0,) * 5, "degenerate (undecided)"),
        ((1e-6,), "degenerate (undecided)"),
    ],
)
def test_many_parameters(ends: tuple[float, ...], kind: str) -> None:
    """Without a dense matrix: a negative eigenvalue is certain, the lack of one likely or undecided; the message says so."""
    diagonal = torch.cat([vector(*ends), torch.linspace(1.0, 5.0, LARGE - len(ends), dtype=torch.float64)])
    origin = torch.zeros(LARGE, dtype=torch.float64)
    certificate = certify(Diagonal(diagonal, 0.0), origin)
    assert certificate.kind == kind
    assert not certificate.complete
    distances = (certificate.eigenvalues[:, None] - diagonal).abs().amin(1)
    assert bool((distances <= certificate.uncertainties).all())
    wanted = {"minimum": "likely, not proven", "saddle": "certain up to rounding", "degenerate (undecided)": "not decided"}
    assert wanted[kind] in certificate.message
    if kind == "saddle":
        assert certificate.descent is not None
        assert float((diagonal * certificate.descent) @ certificate.descent) < 0
    assert certify(Diagonal(diagonal, 1e-3), origin).kind == "not critical"


def test_many_parameters_and_no_loss() -> None:
    """A sum of squares that is zero cannot fall, whatever is known of its many eigenvalues."""
    diagonal = torch.cat([vector(0.0, 0.0), torch.linspace(1.0, 5.0, LARGE - 2, dtype=torch.float64)])
    objective = Diagonal(diagonal, 0.0)
    objective.is_sum_of_squares = True
    certificate = certify(objective, torch.zeros(LARGE, dtype=torch.float64))
    assert (certificate.kind, certificate.end) == ("degenerate minimum", "zero loss")
    assert "whether other minima adjoin is not known" in certificate.message


@pytest.mark.parametrize("spectrum", ["spread", "clustered", "two values", "identity", "zero"])
def test_lanczos_against_numpy(spectrum: str) -> None:
    """Extreme eigenvalues within their residuals, the bound below all of them, multiple eigenvalues included."""
    n = 200
    values = {
        "spread": torch.linspace(-1, 9, n, dtype=torch.float64),
        "clustered": torch.cat([torch.full((n - 3,), 1e-8, dtype=torch.float64), vector(1.0, 2.0, 50.0)]),
        "two values": torch.cat(
            [torch.full((n // 2,), 1.0, dtype=torch.float64), torch.full((n // 2,), 3.0, dtype=torch.float64)]
        ),
        "identity": torch.ones(n, dtype=torch.float64),
        "zero": torch.zeros(n, dtype=torch.float64),
    }[spectrum]
    matrix = rotated(values)
    exact = np.linalg.eigvalsh(matrix.numpy())
    for n_steps in (40, n):
        found = extremes(lambda vectors: matrix @ vectors, torch.zeros(n, dtype=torch.float64), n_steps=n_steps)
        distances = np.abs(found.values.numpy()[:, None] - exact).min(1)
        assert (distances <= found.residuals.numpy() + 1e-13).all()
        assert found.lowest <= exact[0] + 1e-13
        assert float(found.values[-1]) <= exact[-1] + 1e-13
    if found.n_steps == n:
        assert float(found.values[-1]) == pytest.approx(exact[-1], rel=1e-12, abs=1e-13)
    else:
        assert found.lowest > 0 or float(found.values[0]) < -float(found.residuals[0])


def relu_problem(bias: float) -> tuple[PerceptronObjective, Samples, Tensor]:
    """Three ReLU neurons on four points; with a bias far below zero all are dead, and the output is the mean target."""
    x = vector(-1.0, -0.5, 0.5, 1.0)[None]
    targets = vector(1.0, -1.0, 2.0, 0.0)[None]
    network = Perceptron.of((1, 3, 1), Activation("relu"), IDENTITY)
    samples = Samples(x, targets, torch.full((4,), 0.25, dtype=torch.float64))
    theta = vector(0.3, -0.2, 0.1, bias, bias, bias, 1.0, 1.0, -2.0, float(targets.mean()))
    return PerceptronObjective(network, Loss("squared error"), samples), samples, theta


def test_a_plateau_of_dead_neurons() -> None:
    """The gradient is exactly zero and only the output bias bends the loss: a valley, explained, and no "minimum"."""
    objective, samples, theta = relu_problem(-2.0)
    assert not bool((objective.loss_and_gradient(theta)[1] != 0).any())
    known = RecognisedPerceptron(objective.network, Loss("squared error"), samples, torch.arange(10), None, None, None)
    for network in (objective.network, known):  # without the data dead neurons cannot be told, but probed all the same
        certificate = certify(objective, theta, network=network)
        assert certificate.kind == "degenerate minimum"
        assert certificate.end == "valley of minima"
        assert (certificate.n_negative, certificate.n_zero) == (0, 9)
        explanation = certificate.explanation
        assert explanation is not None
        assert explanation.n_explained == (9 if network is known else 3)  # every neuron can be rescaled


BAD: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"theta": [0.0, 0.0]}, TypeError, "theta0 must be a tensor"),
    ({"theta": torch.zeros(3, dtype=torch.float64)}, ValueError, r"shape \(2,\)"),
    ({"gtol": -1.0}, ValueError, "gtol must"),
    ({"earlier": torch.zeros(3, dtype=torch.float64)}, ValueError, "earlier must"),
    ({"network": Perceptron.of((2, 1), IDENTITY, IDENTITY)}, ValueError, "network must have the 2 parameters.*3"),
]


@pytest.mark.parametrize(("given", "error", "match"), BAD)
def test_bad_input(given: dict[str, object], error: type[Exception], match: str) -> None:
    """Named, before anything is evaluated."""
    objective = quadratic(torch.eye(2, dtype=torch.float64))
    arguments = {"theta": torch.zeros(2, dtype=torch.float64), **given}
    with pytest.raises(error, match=match):
        certify(objective, **arguments)  # type: ignore[arg-type]
    assert objective.counts.n_grad == 0
