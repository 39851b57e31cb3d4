"""Adam and the gradient flow in the same training loop, one line apart, on the data that scikit-learn ships.

Two problems: regression on the diabetes data and classification of handwritten digits, each with a small tanh network in
float64 and weight decay in the loss. GradientFlow follows the flow, NewtonPolish takes its end to a fixed point; then
Adam (with torch's defaults) runs in the same loop for the same wall time. Printed: a table. Saved: a figure with the loss
against wall time and against gradient evaluations, and how far each trajectory lies from the true flow.

    python examples/adam_vs_gradient_flow.py [--figure adam_vs_gradient_flow.png]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from torch_gradflow import GradientFlow, NewtonPolish, integrate, minimize
from torch_gradflow.flow.solution import FlowSolution
from torch_gradflow.minimize.certificate import certify
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.regularized import Penalties, Regularized

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Data, network, loss, and how long to follow the flow."""

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    n_hidden: int
    n_out: int
    loss_fn: Loss
    test_error: Loss
    test_error_name: str
    weight_decay: float
    step: float
    n_steps: int

    def model(self) -> nn.Sequential:
        """The network at its initial parameters."""
        torch.manual_seed(0)
        layers = (nn.Linear(self.x.shape[1], self.n_hidden), nn.Tanh(), nn.Linear(self.n_hidden, self.n_out))
        return nn.Sequential(*layers).double()


@dataclass
class History:
    """What a training run left behind: where it was after how many steps, seconds and gradients.

    ``minimum`` is the loss of the minimum to which Newton's method leads from its end.
    """

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    n_grad: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    theta: list[Tensor] = field(default_factory=list)
    minimum: float = math.nan


def diabetes() -> Problem:
    """Regression: 442 patients, 10 measurements."""
    data = load_diabetes()
    x, y = torch.tensor(data.data), torch.tensor(data.target)[:, None]
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:342], order[342:]
    mse = nn.functional.mse_loss
    return Problem("diabetes", x[train], y[train], x[test], y[test], 8, 1, mse, mse, "mean square", 1e-2, 2.5, 400)


def digits() -> Problem:
    """Classification: 1797 images of 8 x 8 pixels, ten digits."""
    data = load_digits()
    x, y = torch.tensor(data.data) / 16.0, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]

    def wrong(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(1) != target).double().mean()

    cross_entropy = nn.functional.cross_entropy
    return Problem(
        "digits", x[train], y[train], x[test], y[test], 8, 10, cross_entropy, wrong, "fraction wrong", 1e-2, 2.5, 200
    )


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def penalty(model: nn.Module, weight_decay: float) -> Tensor:
    """Weight decay as a term of the loss, so that every optimizer has the same objective."""
    return 0.5 * weight_decay * sum(((p**2).sum() for p in model.parameters()), start=torch.zeros(()))


def train(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int, seconds: float) -> History:
    """The training loop, the same for every optimizer; it ends after ``n_steps`` or when the time is up."""
    history, watch, pause = History(), time.perf_counter(), 0.0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_fn(model(problem.x), problem.y) + penalty(model, problem.weight_decay)
        loss.backward()
        return loss

    for step in range(n_steps):
        elapsed = time.perf_counter() - watch - pause
        if elapsed > seconds:
            break
        if is_recorded(step):  # the loss that step returns is that at its start
            stats = getattr(optimizer, "stats", None)
            history.step.append(step)
            history.theta.append(flat(model))
            history.n_grad.append(step if stats is None else stats.n_grad)
            history.seconds.append(elapsed)
            pause = time.perf_counter() - watch - elapsed
        loss = optimizer.step(closure)
        if is_recorded(step):
            history.loss.append(loss.item())
    return history


def is_recorded(step: int) -> bool:
    """Every step at first, then about 50 per factor of e."""
    return step < 50 or step % max(1, step // 50) == 0


def objective_of(problem: Problem) -> Regularized:
    """The same objective as a function of the flat parameter vector, for certificates and the reference flow."""
    base = ModuleObjective(problem.model(), problem.loss_fn, (problem.x, problem.y))
    decay = torch.full((base.n_parameters,), problem.weight_decay, dtype=base.dtype)
    return Regularized(base, Penalties(weight_decay=decay))


def true_flow(problem: Problem) -> FlowSolution:
    """The flow with another method of higher order and a tolerance 10,000 times tighter."""
    times = [problem.step * k for k in range(problem.n_steps) if is_recorded(k)]
    early = [0.02 * problem.step * k for k in range(1, 50)]
    t_eval = sorted({*times, *early})
    theta0 = flat(problem.model())
    return integrate(objective_of(problem), theta0, (0.0, max(t_eval)), method="dopri8", rtol=1e-10, t_eval=t_eval)


def nearest(theta: Tensor, curve: Tensor) -> Tensor:
    """The point nearest to θ on a curve given by samples, straight in between."""
    start, along = curve[:-1], curve[1:] - curve[:-1]
    fraction = (((theta - start) * along).sum(1) / (along**2).sum(1).clamp(min=1e-300)).clamp(0.0, 1.0)
    points = start + fraction[:, None] * along
    return points[int((points - theta).norm(dim=1).argmin())]


def distances(problem: Problem, history: History, flow: FlowSolution, same_times: bool) -> list[float]:
    """How far a trajectory lies from the true flow, relative to the norm of the parameters there.

    Points of a flow are compared at equal times, those of another optimizer with the nearest point of the true flow.
    """
    index = {t: i for i, t in enumerate(flow.t.tolist())}
    found = []
    for step, theta in zip(history.step, history.theta, strict=True):
        true = flow.theta[index[step * problem.step]] if same_times else nearest(theta, flow.theta)
        found.append(float((theta - true).norm() / true.norm()))
    return found


def compare(problem: Problem) -> tuple[list[list[str]], dict[str, History], FlowSolution]:
    """Run everything on one problem: rows of the table, histories, and the true flow."""
    rows: list[list[str]] = []
    objective = objective_of(problem)

    def add_row(name: str, model: nn.Module, n_grad: str, seconds: float) -> None:
        theta = flat(model)
        loss, gradient = objective.loss_and_gradient(theta)
        error = problem.test_error(model(problem.x_test), problem.y_test).item()
        cells = [f"{float(loss):.9f}", f"{float(gradient.abs().max()):.1e}", f"{error:.4f}", n_grad, f"{seconds:.1f}"]
        rows.append([name, *cells, certify(objective, theta).kind])

    model = problem.model()  # the first steps compile kernels, which is no part of their cost
    train(problem, model, GradientFlow(model.parameters(), lr=problem.step), 10, math.inf)
    train(problem, model, NewtonPolish(model.parameters()), 1, math.inf)

    model = problem.model()
    began = time.perf_counter()
    optimizer = GradientFlow(model.parameters(), lr=problem.step)
    flow = train(problem, model, optimizer, problem.n_steps, math.inf)
    seconds, n_grad = time.perf_counter() - began, optimizer.stats.n_grad
    add_row("GradientFlow", model, f"{n_grad:,}", seconds)

    began = time.perf_counter()
    polish = NewtonPolish(model.parameters())
    train(problem, model, polish, 1, math.inf)
    seconds += time.perf_counter() - began
    assert polish.result is not None
    n_grad += polish.result.n_grad
    add_row(" + NewtonPolish", model, f"{n_grad:,} + {polish.result.n_hessian} Hessians", seconds)
    flow.seconds.append(seconds)
    flow.n_grad.append(n_grad)
    flow.loss.append(polish.result.loss)
    flow.minimum = polish.result.loss

    model = problem.model()
    optimizer = torch.optim.Adam(model.parameters())
    adam = train(problem, model, optimizer, 10**9, seconds)
    add_row("Adam", model, f"{adam.n_grad[-1]:,}", adam.seconds[-1])
    adam.minimum = minimize(objective, flat(model), certificate=False).loss
    return rows, {"GradientFlow": flow, "Adam": adam}, true_flow(problem)


def draw(axes: list[Axes], problem: Problem, histories: dict[str, History], flow: FlowSolution) -> None:
    """One row of the figure."""
    for name, color in (("Adam", "tab:orange"), ("GradientFlow", "tab:blue")):
        history = histories[name]
        excess = [loss - history.minimum for loss in history.loss]
        label = f"{name}, then NewtonPolish" if name == "GradientFlow" else name
        for axis, cost in ((axes[0], history.seconds), (axes[1], history.n_grad)):
            axis.loglog(cost[1:], [max(e, 1e-17) for e in excess[1:]], color=color, label=label)
            if name == "GradientFlow":
                axis.plot(cost[-1], max(excess[-1], 1e-17), "o", color=color)
        distance = distances(problem, history, flow, name == "GradientFlow")
        axes[2].loglog(history.n_grad[1 : len(distance)], distance[1:], color=color, label=name)
    for axis, label in zip(axes, ("wall time (s)", "gradient evaluations", "gradient evaluations"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{problem.name}: loss − that of its own minimum")
    axes[2].set_ylabel("distance to the true flow / norm")
    axes[0].legend()


def main() -> None:
    """Run both problems, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("adam_vs_gradient_flow.png"))
    figure_path = parser.parse_args().figure
    torch.set_num_threads(1)  # networks this small gain nothing from threads, and lose much on a busy machine
    problems = [diabetes(), digits()]
    figure, axes = plt.subplots(len(problems), 3, figsize=(14, 4 * len(problems)), layout="constrained")
    head = ["", "training loss", "|gradient|", "test error", "gradients", "seconds", "critical point"]
    for problem, row in zip(problems, axes, strict=True):
        n = flat(problem.model()).numel()
        print(f"\n{problem.name}: {len(problem.x)} training samples, {n} parameters; test error: {problem.test_error_name}")
        rows, histories, flow = compare(problem)
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        for line in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        draw(list(row), problem, histories, flow)
    figure.savefig(figure_path, dpi=120)
    print(f"\nFigure: {figure_path}")


if __name__ == "__main__":
    main()
