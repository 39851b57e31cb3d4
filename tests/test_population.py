"""The population loss and its derivatives: against quadrature of the loss, autograd, Monte Carlo and published values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_gradflow import (
    GradientFlow,
    NewtonPolish,
    Objective,
    PopulationObjective,
    TeacherStudent,
    certify,
    gauss_hermite_data,
    hermite_coefficients,
    integrate,
    minimize,
    register_activation,
)
from torch_gradflow.population.normal import bivariate_normal_cdf

Elementwise = Callable[[Tensor], Tensor]


class Elementary(nn.Module):
    """A module that applies a function."""

    def __init__(self, function: Elementwise) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def sigmoid_softplus(z: Tensor) -> Tensor:
    return torch.sigmoid(4 * z) + nn.functional.softplus(z)


def half_cubic(z: Tensor) -> Tensor:
    return 0.3 * z**3 - z + 0.5


def paper_erf(z: Tensor) -> Tensor:
    return torch.erf(z / 2**0.5)


SMOOTH: dict[str, Elementwise] = {
    "erf of z/√2": paper_erf,
    "erf": torch.erf,
    "normal cdf": torch.special.ndtr,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "log sigmoid": nn.functional.logsigmoid,
    "gelu": nn.functional.gelu,
    "gelu tanh": nn.GELU("tanh"),
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "sigmoid softplus": sigmoid_softplus,
    "square": torch.square,
    "cubic": half_cubic,
}


def network(d: int, n: int, activation: Elementwise, *, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, n, bias=bias), Elementary(activation), nn.Linear(n, 1, bias=bias)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model


def grid(half_width: float = 10.0, step: float = 0.2) -> tuple[Tensor, Tensor]:
    """The trapezoidal rule for two standard normal inputs."""
    axis = torch.arange(-half_width, half_width + step / 2, step, dtype=torch.float64)
    weight = torch.exp(-0.5 * axis**2) * (step / math.sqrt(2 * math.pi))
    return torch.cartesian_prod(axis, axis), torch.outer(weight, weight).reshape(-1)


def by_quadrature(
    student: nn.Module, teacher: nn.Module, x: Tensor, w: Tensor, theta: Tensor, loss: str = "mse"
) -> tuple[Tensor, Tensor, Tensor]:
    """L, gradient and Hessian from the networks themselves, through torch.func."""
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    shapes = [p.shape for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        target = teacher(x)[:, 0]

    def value(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(student, values, (x,))[:, 0]
        return w @ ((output - target) ** 2 if loss == "mse" else 1 - output * target)

    leaf = theta.clone().requires_grad_(True)
    found = value(leaf)
    (gradient,) = torch.autograd.grad(found, leaf)
    return found.detach(), gradient, torch.autograd.functional.hessian(value, theta, vectorize=True)


def check_derivatives(objective: Objective, theta: Tensor, wanted: tuple[Tensor, Tensor, Tensor], accuracy: float) -> None:
    found = objective.loss_gradient_hessian(theta)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < accuracy * float(other.abs().max().clamp(min=1.0))
    loss, gradient = objective.loss_and_gradient(theta)
    assert torch.allclose(loss, found[0], rtol=1e-13, atol=1e-15)
    assert torch.allclose(gradient, found[1], rtol=1e-12, atol=1e-14)
    vectors = torch.randn(len(theta), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = found[2] @ vectors
    assert float((objective.hvp(theta, vectors) - products).abs().max()) < 1e-12 * float(products.abs().max().clamp(min=1.0))
    assert torch.allclose(objective.hvp(theta, vectors[:, 0]), products[:, 0], rtol=1e-11, atol=1e-12)
    assert torch.equal(found[2], found[2].T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_of_smooth_activations(name: str, bias: bool) -> None:
    """To 1e-12: loss, gradient, Hessian and products are those of the networks on a grid that resolves them."""
    student, teacher = network(2, 3, SMOOTH[name], bias=bias), network(2, 2, SMOOTH[name], bias=bias, seed=1)
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()
    points = grid(step=0.1 if name == "sigmoid softplus" else 0.2)
    check_derivatives(objective, theta, by_quadrature(student, teacher, *points, theta), 1e-12)


@pytest.mark.parametrize(
    ("student", "teacher"), [("erf", "softplus"), ("gelu", "cubic"), ("normal cdf", "erf of z/√2"), ("square", "tanh")]
)
def test_student_and_teacher_may_differ(student: str, teacher: str) -> None:
    one, other = network(2, 3, SMOOTH[student]), network(2, 2, SMOOTH[teacher], bias=False, seed=1)
    objective = PopulationObjective(one, other)
    theta = objective.initial_theta()
    check_derivatives(objective, theta, by_quadrature(one, other, *grid(), theta), 1e-12)
    back = PopulationObjective(other, one)
    check_derivatives(back, back.initial_theta(), by_quadrature(other, one, *grid(), back.initial_theta()), 1e-12)


@pytest.mark.parametrize("name", ["erf", "softplus", "cubic"])
@pytest.mark.parametrize("bias", [False, True])
def test_correlation_loss_of_correlated_inputs(name: str, bias: bool) -> None:
    """And "mse" with noise: inputs with a mean and a covariance."""
    mean = torch.tensor([0.4, -0.3], dtype=torch.float64)
    covariance = torch.tensor([[1.2, 0.5], [0.5, 0.6]], dtype=torch.float64)
    y, w = grid()
    x = mean + y @ torch.linalg.cholesky(covariance).T
    student, teacher = network(2, 3, SMOOTH[name], bias=bias), network(2, 2, SMOOTH[name], bias=True, seed=1)
    for loss, noise in (("correlation", 0.0), ("mse", 0.5)):
        objective = PopulationObjective(student, teacher, loss=loss, mean=mean, covariance=covariance, noise=noise)
        theta = objective.initial_theta()
        value, gradient, hessian = by_quadrature(student, teacher, x, w, theta, loss)
        check_derivatives(objective, theta, (value + noise**2, gradient, hessian), 2e-12)


def test_frozen_parameters_and_another_order() -> None:
    """θ are the parameters that require gradients, in the module's own order."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(3, 1).double()
            self.first = nn.Linear(2, 3).double()
            self.first.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    student, teacher = Fixed(), network(2, 2, torch.tanh, seed=1)
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()
    assert len(theta) == 4 + 6
    check_derivatives(objective, theta, by_quadrature(student, teacher, *grid(), theta), 1e-12)
    objective.write(theta + 1)
    assert torch.equal(student.second.weight.detach().flatten(), theta[:3] + 1)


def test_a_registered_activation() -> None:
    """Its third and fourth derivatives come from autograd."""

    def bump(z: Tensor) -> Tensor:
        return torch.exp(-z * z / 3)

    register_activation(
        "population bump",
        bump,
        lambda z: -2 / 3 * z * torch.exp(-z * z / 3),
        lambda z: (4 / 9 * z * z - 2 / 3) * torch.exp(-z * z / 3),
    )
    student, teacher = network(2, 3, bump), network(2, 2, bump, seed=1)
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()
    check_derivatives(objective, theta, by_quadrature(student, teacher, *grid(), theta), 1e-12)


def relu_loss(theta: Tensor, teacher: nn.Sequential, d: int, r: int) -> Tensor:
    """The same loss written out for ReLU with biases, by moments of the truncated normal distribution."""
    w, b, a, c = theta.split([r * d, r, r, 1])
    others = [p.detach() for p in teacher.parameters()]
    u = torch.cat([w.view(r, d), others[0]])
    b = torch.cat([b, others[1]])
    a = torch.cat([a, -others[2][0]])
    n, total, density = len(a), (c[0] - others[3][0]) ** 2, torch.distributions.Normal(0.0, 1.0)
    s = u.norm(dim=1)
    h = b / s
    phi, cdf = density.log_prob(h).exp(), torch.special.ndtr(h)
    total = total + 2 * (c[0] - others[3][0]) * (a @ (s * (h * cdf + phi)))
    total = total + (a**2) @ (s * s * ((1 + h * h) * cdf + h * phi))
    for i in range(n):
        for j in range(i):
            rho = (u[i] @ u[j]) / (s[i] * s[j])
            root = (1 - rho * rho).sqrt()
            first, second = (torch.special.ndtr((y - rho * x) / root) for x, y in ((h[i], h[j]), (h[j], h[i])))
            both = torch.exp(-0.5 * (h[i] ** 2 - 2 * rho * h[i] * h[j] + h[j] ** 2) / root**2) / (2 * math.pi)
            quadrant = bivariate_normal_cdf(h[i], h[j], rho)
            moment = (h[i] * h[j] + rho) * quadrant + h[j] * phi[i] * first + h[i] * phi[j] * second + root * both
            total = total + 2 * a[i] * a[j] * s[i] * s[j] * moment
    return total


def test_derivatives_of_relu() -> None:
    """Against autograd through the closed form of Rosenbaum (1961)."""
    student, teacher = network(2, 2, torch.relu), network(2, 1, torch.relu, seed=1)
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()

    def value(theta: Tensor) -> Tensor:
        return relu_loss(theta, teacher, 2, 2)

    leaf = theta.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    check_derivatives(objective, theta, (value(theta), gradient, torch.autograd.functional.hessian(value, theta)), 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("apart", [0.0, 1e-11, 1e-6])
def test_two_relu_neurons_that_are_one(bias: bool, apart: float) -> None:
    """The second derivatives between them are continuous: a_i a_j E[x x′; z > 0] with x′ = (x, 1); here to 1e-8."""
    student, teacher = network(2, 2, torch.relu, bias=bias), network(2, 1, torch.relu, seed=1)
    with torch.no_grad():
        student[0].weight[1] = student[0].weight[0] + apart
        if bias:
            student[0].bias[1] = student[0].bias[0]
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()
    hessian = objective.hessian(theta)
    a = student[2].weight[0].detach()
    w = student[0].weight[0].detach()
    size = w.norm()
    h = (student[0].bias[0].detach() if bias else torch.zeros((), dtype=torch.float64)) / size
    phi, cdf = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi), torch.special.ndtr(h)
    # E[x xᵀ; z > 0] = Φ(h) I − h φ(h) ŵ ŵᵀ for z = w·x + b and h = b/|w|.
    wanted = 2 * a[0] * a[1] * (cdf * torch.eye(2, dtype=torch.float64) - h * phi * torch.outer(w, w) / size**2)
    assert torch.allclose(hessian[:2, 2:4], wanted, rtol=0, atol=3e-8 + 3 * apart)
    vector = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    assert torch.allclose(objective.hvp(theta, vector), hessian @ vector, rtol=0, atol=1e-7)


def bias_free_loss(theta: Tensor, teacher: nn.Sequential, d: int, kind: str) -> Tensor:
    """Of erf(z/√2) and ReLU without biases, as autograd can take it."""
    r = len(theta) // (d + 1)
    v, b = (p.detach() for p in teacher.parameters())
    u, a = torch.cat([theta[: r * d].view(r, d), v]), torch.cat([theta[r * d :], -b[0]])
    gram, squares = u @ u.T, (u * u).sum(1)
    if kind == "erf":
        pairs = 2 / math.pi * torch.asin(gram / torch.sqrt(torch.outer(1 + squares, 1 + squares)))
    else:
        sizes = torch.outer(squares, squares).sqrt()
        same = torch.eye(len(a), dtype=torch.bool)  # where the formula has no derivative
        cosine = torch.where(same, 0.0, gram / sizes)
        angle = torch.acos(cosine)
        pairs = sizes * (torch.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
        pairs = torch.where(same, 0.5 * torch.diag(squares), pairs)
    return a @ pairs @ a


@pytest.mark.parametrize(("kind", "activation"), [("erf", paper_erf), ("relu", torch.relu)])
def test_derivatives_without_biases_in_many_dimensions(kind: str, activation: Elementwise) -> None:
    d, r, k = 12, 5, 7
    student, teacher = network(d, r, activation, bias=False), network(d, k, activation, bias=False, seed=1)
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()

    def value(theta: Tensor) -> Tensor:
        return bias_free_loss(theta, teacher, d, kind)

    leaf = theta.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    hessian = torch.autograd.functional.hessian(value, theta, vectorize=True)
    check_derivatives(objective, theta, (value(theta), gradient, hessian), 1e-12)


def monte_carlo(student: nn.Module, teacher: nn.Module, d: int, n: int, loss: str) -> tuple[float, float]:
    """The mean loss of n samples, a million at a time, and its standard error."""
    generator, total, squares = torch.Generator().manual_seed(0), 0.0, 0.0
    chunk = min(n, 1_000_000)
    with torch.no_grad():
        for _ in range(n // chunk):
            x = torch.randn(chunk, d, generator=generator, dtype=torch.float64)
            output, target = student(x), teacher(x)
            each = (output - target) ** 2 if loss == "mse" else 1 - output * target
            total, squares = total + float(each.sum()), squares + float((each * each).sum())
    return total / n, math.sqrt((squares / n - (total / n) ** 2) / n)


@pytest.mark.parametrize("loss", ["mse", "correlation"])
@pytest.mark.parametrize(
    ("student", "teacher", "n"),
    [
        ("relu", "relu", 1_000_000),
        ("tanh", "relu", 1_000_000),
        ("erf", "erf", 1_000_000),
        pytest.param("relu", "relu", 10_000_000, marks=pytest.mark.slow),
        pytest.param("softplus", "erf", 10_000_000, marks=pytest.mark.slow),
    ],
)
def test_losses_are_means_over_samples(student: str, teacher: str, n: int, loss: str) -> None:
    functions = SMOOTH | {"relu": torch.relu}
    one, other = network(5, 4, functions[student]), network(5, 3, functions[teacher], seed=1)
    objective = PopulationObjective(one, other, loss=loss)
    mean, error = monte_carlo(one, other, 5, n, loss)
    assert abs(float(objective.loss_and_gradient(objective.initial_theta())[0]) - mean) < 4 * error


def test_gauss_hermite_data_train_any_network() -> None:
    """A deep network on the rule's nodes has the loss of infinite data; here compared on a shallow one."""
    x, w = gauss_hermite_data(2, 60)
    student, teacher = network(2, 3, torch.tanh), network(2, 2, torch.tanh, seed=1)
    objective = PopulationObjective(student, teacher)
    with torch.no_grad():
        loss = (w[:, None] * (student(x) - teacher(x)) ** 2).sum()
    assert float(loss) == pytest.approx(float(objective.loss_and_gradient(objective.initial_theta())[0]), abs=1e-9)


def test_gauss_hermite_data_are_a_weighted_loss() -> None:
    """The usual loop with them runs on the closed form of perceptrons, at any depth."""
    x, w = gauss_hermite_data(2, 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    y = torch.sin(x[:, :1]) * x[:, 1:]
    optimizer = GradientFlow(model.parameters(), lr=0.1, method="dopri5")
    optimizer.zero_grad()
    (w[:, None] * (model(x) - y) ** 2).sum().backward()
    optimizer.step()
    assert optimizer.stats.engine == "perceptron"


def test_every_method_takes_it() -> None:
    """A student as wide as the teacher: two integrators agree, and minimisers and certificate come to zero loss."""
    student, teacher = network(3, 2, paper_erf, bias=False), network(3, 2, paper_erf, bias=False, seed=3)
    objective = PopulationObjective(student, teacher)
    theta0 = objective.initial_theta()
    ends = [integrate(objective, theta0, (0.0, 10.0), method=m, rtol=1e-7) for m in ("dopri5", "bdf")]
    assert float((ends[1].theta[-1] - ends[0].theta[-1]).norm()) < 1e-5
    for method, gtol in (("bfgs", 1e-8), ("trust-region-lanczos", 1e-12), ("trust-region", 1e-12)):
        result = minimize(objective, ends[0].theta[-1], method=method, gtol=gtol, certificate=False)
        assert result.grad_norm < gtol and abs(result.loss) < 1e-14, result.message
    assert certify(objective, result.theta).kind == "minimum"
    assert objective.kind() != PopulationObjective(student, teacher, loss="correlation").kind()


@pytest.mark.parametrize("form", ["loop", "closure"])
def test_loops_run_on_the_closed_form(form: str) -> None:
    """GradientFlow recognises the loss, and goes where ``integrate`` does."""
    student, teacher = network(3, 2, torch.tanh), network(3, 2, torch.tanh, seed=3)
    problem = TeacherStudent(student, teacher)
    end = integrate(problem.objective, problem.objective.initial_theta(), (0.0, 2.0), method="bdf", rtol=1e-7)
    optimizer = GradientFlow(student.parameters(), lr=1.0, method="bdf", rtol=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    for _ in range(2):
        if form == "loop":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    assert optimizer.stats.engine == "population" and optimizer.stats.n_hessian > 0
    assert float((problem.objective.initial_theta() - end.theta[-1]).norm()) < 1e-5
    polish = NewtonPolish(student.parameters(), gtol=1e-12, method="trust-region")
    optimizer = polish
    polish.step(closure)
    assert polish.result.grad_norm < 1e-12


def test_the_loss_is_twice_differentiable() -> None:
    student, teacher = network(2, 2, torch.relu), network(2, 2, torch.relu, seed=3)
    problem = TeacherStudent(student, teacher, loss="correlation")
    parameters = problem.objective.parameters
    theta, vector = problem.objective.initial_theta(), torch.linspace(-1, 1, 9, dtype=torch.float64)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.loss(), parameters, create_graph=True)])
    assert torch.equal(gradient.detach(), problem.objective.loss_and_gradient(theta)[1])
    products = torch.autograd.grad(gradient @ vector, parameters)
    assert torch.equal(torch.cat([p.reshape(-1) for p in products]), problem.objective.hvp(theta, vector))
    # A multiple of it is another objective, which is replayed.
    optimizer = GradientFlow(student.parameters(), lr=0.1, method="dopri5")
    (3 * problem.loss()).backward()
    optimizer.zero_grad()
    (3 * problem.loss()).backward()
    optimizer.step()
    assert optimizer.stats.engine == "replay"


def test_float32_students_are_computed_in_float64() -> None:
    student, teacher = network(3, 2, torch.relu).float(), network(3, 2, torch.relu, seed=1)
    objective = PopulationObjective(student, teacher)
    theta = objective.initial_theta()
    assert theta.dtype == objective.dtype == torch.float32
    wide = PopulationObjective(student.double(), teacher).loss_and_gradient(theta.double())
    for found, exact in zip(objective.loss_and_gradient(theta), wide, strict=True):
        assert found.dtype == torch.float32 and torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-7)


def test_one_neuron_between_two_biased_teachers() -> None:
    """Figure 6 of arXiv 2506.14951: E[y²], the one-neuron optimum, and the losses of two channels to infinity."""
    teacher = nn.Sequential(nn.Linear(1, 2), Elementary(paper_erf), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        for parameter, values in zip(teacher.parameters(), ([[5.0], [5.0]], [2.5, -2.5], [[1.0, 1.0]]), strict=True):
            parameter.copy_(torch.tensor(values))
    student = network(1, 1, paper_erf, bias=False)
    objective = PopulationObjective(student, teacher)
    nothing = objective.loss_and_gradient(torch.zeros(2, dtype=torch.float64))[0]
    assert float(nothing) == pytest.approx(2.181760692891919, abs=1e-14)
    result = minimize(objective, torch.tensor([1.0, 2.0], dtype=torch.float64), method="trust-region")
    assert result.theta.tolist() == pytest.approx([1.399554, 2.152784], abs=1e-6)
    assert result.loss == pytest.approx(0.0471160, abs=5e-8)
    pair = PopulationObjective(network(1, 2, paper_erf, bias=False), teacher)
    # Published: .0423722 and .000773335; the further digits are mpmath's integrals at these parameters.
    channels = (0.866296, 1.66756, 1.49668, 0.04237215196, 0.0071), (3.150436, 2.01782, -6.51112, 0.00077333257, 0.00102)
    for w, c, a, loss, tilt in channels:
        eps = 3e-3  # c σ(w x) + a x σ′(w x) as two neurons, up to tilt ε²
        theta = torch.tensor([w + eps, w - eps, c / 2 + a / (2 * eps), c / 2 - a / (2 * eps)], dtype=torch.float64)
        found = float(pair.loss_and_gradient(theta)[0]) - tilt * eps**2
        assert found == pytest.approx(loss, abs=2e-9)


def unrecognised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def test_what_is_refused() -> None:
    good, teacher = network(2, 3, torch.tanh), network(2, 2, torch.tanh)
    three, kinked = network(3, 2, torch.tanh), nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(), nn.Linear(2, 1)).double()
    nothing = network(2, 3, torch.tanh).requires_grad_(False)
    eye = torch.eye(2, dtype=torch.float64)
    for bad, match in (
        (lambda: PopulationObjective(unrecognised(), teacher), "student must be a perceptron with one hidden layer"),
        (lambda: PopulationObjective(good, nn.Sequential(nn.Linear(2, 1)).double()), "teacher must be a perceptron"),
        (lambda: PopulationObjective(good, nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()), "one output"),
        (lambda: PopulationObjective(nothing, teacher), "student has no parameter that requires gradients"),
        (lambda: PopulationObjective(good, three), "same inputs, not 2 and 3"),
        (lambda: PopulationObjective(good, kinked), "'leaky_relu' has a kink"),
        (lambda: PopulationObjective(good, teacher, loss="mae"), "loss must be 'mse' or 'correlation', not 'mae'"),  # type: ignore[arg-type]
        (lambda: PopulationObjective(good, teacher, noise=-1.0), "noise must be"),
        (lambda: PopulationObjective(good, teacher, mean=torch.zeros(3)), r"mean must be a tensor of shape \(2,\)"),
        (lambda: PopulationObjective(good, teacher, covariance=-eye), "positive definite"),
        (lambda: PopulationObjective(good, teacher, covariance=eye + eye.flip(0).tril()), "symmetric"),
        (lambda: PopulationObjective(good, teacher).loss_and_gradient(torch.zeros(3).double()), "theta must have the shape"),
        (lambda: PopulationObjective(good, teacher).hvp(torch.zeros(13).double(), torch.zeros(3)), "vectors must have"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    with pytest.raises(TypeError, match=r"student must be an nn\.Module"):
        PopulationObjective("tanh", teacher)  # type: ignore[arg-type]


def test_hermite_students() -> None:
    """E[h_p(u·x) h_p(v·x)] = (u·v)^p for unit vectors."""
    for p in (1, 2, 3, 4):
        powers = hermite_coefficients(p)

        def h(z: Tensor, powers: tuple[float, ...] = powers) -> Tensor:
            total = powers[-1] * z ** (len(powers) - 1)
            for m, c in enumerate(powers[:-1]):
                total = total + c * z**m if m else total + c
            return total

        student, teacher = network(3, 1, h, bias=False), network(3, 1, h, bias=False, seed=1)
        with torch.no_grad():
            for model in (student, teacher):
                model[0].weight /= model[0].weight.norm()
                model[2].weight.fill_(1.0)
        objective = PopulationObjective(student, teacher, loss="correlation")
        overlap = float((student[0].weight * teacher[0].weight).sum().detach())
        loss = float(objective.loss_and_gradient(objective.initial_theta())[0])
        assert loss == pytest.approx(1 - overlap**p, abs=1e-14)
