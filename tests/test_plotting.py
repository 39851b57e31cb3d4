"""Figures: the rendered picture shows what was computed, also in grey; and what a flow records for them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from problems import make_closure, teacher_student
from torch import Tensor, nn

from torch_gradflow import FlowSolution, GradientFlow, ModuleObjective, certify, integrate, integrate_many, minimize
from torch_gradflow.flow.multistep import OrderControl
from torch_gradflow.flow.solution import Choice
from torch_gradflow.objectives.base import EvaluationCounts, Objective
from torch_gradflow.plotting import plot_line, plot_loss, plot_order, plot_spectrum, plot_step_size, plot_trajectory
from torch_gradflow.styles import STYLES

DARKER = 0.25  # than the white of the paper, in relative luminance


class Known(Objective):
    """A function of which the derivatives are written out."""

    def __init__(self, n_parameters: int) -> None:
        self.n_parameters, self.dtype, self.device = n_parameters, torch.float64, torch.device("cpu")
        self.resolution, self.counts = torch.finfo(torch.float64).eps, EvaluationCounts()

    def hvp(self, theta: Tensor, vectors: Tensor) -> Tensor:
        return self.hessian(theta) @ vectors


class Quadratic(Known):
    """½ Σ λ_i θ_i²."""

    def __init__(self, *eigenvalues: float) -> None:
        super().__init__(len(eigenvalues))
        self.eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.n_grad += 1
        return 0.5 * self.eigenvalues @ theta**2, self.eigenvalues * theta

    def hessian(self, theta: Tensor) -> Tensor:
        self.counts.n_hessian += 1
        return torch.diag(self.eigenvalues)


class DoubleWell(Known):
    """(θ_0² − 1)² + θ_1² + 0.3 θ_0: two minima and a hill between them."""

    def __init__(self) -> None:
        super().__init__(2)

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        a, b = theta
        self.counts.n_grad += 1
        return (a * a - 1) ** 2 + b * b + 0.3 * a, torch.stack([4 * a * (a * a - 1) + 0.3, 2 * b])

    def hessian(self, theta: Tensor) -> Tensor:
        return torch.diag(torch.stack([12 * theta[0] ** 2 - 4, torch.tensor(2.0, dtype=torch.float64)]))


def axes() -> Axes:
    return Figure(figsize=(6, 4), dpi=100, layout="constrained").subplots()


def picture(ax: Axes) -> np.ndarray:
    """What is seen, shape (height, width, 3), from 0 to 1; nothing but the background is cut off at the figure's edge."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    rgb = np.asarray(canvas.buffer_rgba())[:, :, :3] / 255
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    assert (border == 1).all()
    return rgb


def around(ax: Axes, rgb: np.ndarray, x: float, y: float) -> np.ndarray:
    """The pixels within two of a point of the data, shape (25, 3)."""
    column, row = ax.transData.transform((x, y))
    i, j = round(rgb.shape[0] - 1 - row), round(column)
    return rgb[i - 2 : i + 3, j - 2 : j + 3].reshape(-1, 3)


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance (ITU-R BT.709): what print in grey keeps."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def sees(ax: Axes, x: Any, y: Any, color: str) -> None:
    """At all of these points within the Axes the picture has that colour, and is darker than paper."""
    rgb = picture(ax)
    inside = [(a, b) for a, b in zip(x, y, strict=True) if ax.bbox.padded(-5).contains(*ax.transData.transform((a, b)))]
    assert len(inside) > 0.5 * len(x)
    found = [around(ax, rgb, a, b) for a, b in inside]
    near = [np.abs(pixels - colors.to_rgb(color)).max(1).min() < 0.15 for pixels in found]
    dark = [luminance(pixels).min() < 1 - DARKER for pixels in found]
    assert all(near) and all(dark)


def texts_are_apart(ax: Axes) -> None:
    """No tick label covers another one, and all texts lie within the figure."""
    picture(ax)
    for axis in (ax.xaxis, ax.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
        shown = [box for box in boxes if ax.bbox.padded(3).overlaps(box.padded(8))]
        assert not any(a.overlaps(b) for i, a in enumerate(shown) for b in shown[:i])
    outer = ax.figure.bbox
    for text in (ax.xaxis.label, ax.yaxis.label):
        box = text.get_window_extent()
        assert outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1


@pytest.fixture(scope="module")
def objective() -> ModuleObjective:
    model, x, y = teacher_student(1, n_samples=50)
    return ModuleObjective(model, nn.functional.mse_loss, (x, y))


@pytest.fixture(scope="module")
def solutions(objective: ModuleObjective) -> dict[str, FlowSolution]:
    theta0 = objective.initial_theta()
    return {name: integrate(objective, theta0, (0.0, 100.0), method=name) for name in ("bdf", "bdf-secant", "bdf-cg")}


# What a solution records.


@pytest.mark.parametrize("method", ["bdf", "bdf-secant", "dopri5", "rkc2"])
@pytest.mark.parametrize("t_eval", [None, (0.0, 0.3, 0.30001, 1.0, 2.5, 7.0, 10.0)])
def test_step_sizes_are_those_of_the_accepted_steps(method: str, t_eval: tuple[float, ...] | None) -> None:
    times = [0.0]
    solution = integrate(
        Quadratic(1.0, 0.5, 0.1),
        torch.ones(3, dtype=torch.float64),
        (0.0, 10.0),
        method=method,
        t_eval=t_eval,
        progress=lambda report: times.append(report.t),
    )
    times = [*times, 10.0] if times[-1] < 10.0 else times
    assert solution.step_sizes is not None and len(times) == solution.n_accepted + 1
    assert solution.step_sizes.shape == solution.t.shape and solution.step_sizes[0].isnan()
    for t, step in zip(solution.t.tolist()[1:], solution.step_sizes.tolist()[1:], strict=True):
        i = next(i for i, end in enumerate(times) if t <= end)
        assert step == times[i] - times[i - 1]


@pytest.mark.parametrize("method", ["bdf", "bdf-cg", "bdf-secant"])
@pytest.mark.parametrize("t_eval", [None, (0.0, 0.3, 0.30001, 1.0, 2.5, 7.0, 100.0)])
def test_orders_are_those_with_which_the_steps_were_accepted(
    objective: ModuleObjective, method: str, t_eval: tuple[float, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the choice of the next order is told them."""
    times, orders, choose = [0.0], [0], OrderControl.accepted

    def listening(self: OrderControl, *args: Any) -> Any:
        orders.append(self.order)
        return choose(self, *args)

    monkeypatch.setattr(OrderControl, "accepted", listening)
    solution = integrate(
        objective,
        objective.initial_theta(),
        (0.0, 100.0),
        method=method,
        t_eval=t_eval,
        progress=lambda report: times.append(report.t),
    )
    times = [*times, 100.0] if times[-1] < 100.0 else times
    assert len(times) == len(orders) and set(orders[1:]) >= {1, 2, 3, 4}
    assert solution.orders.tolist() == [orders[next(i for i, end in enumerate(times) if t <= end)] for t in solution.t]


@pytest.mark.parametrize(("method", "order"), [("dopri5", 5), ("bosh3", 3), ("rkc2", 2), ("Radau", 5), ("BDF", 0)])
def test_orders_that_never_change_or_are_not_told(method: str, order: int) -> None:
    theta0 = torch.ones(2, dtype=torch.float64)
    for t_eval in (None, (0.0, 0.5, 1.0)):
        solution = integrate(Quadratic(1.0, 0.1), theta0, (0.0, 1.0), method=method, t_eval=t_eval)
        assert solution.orders.tolist() == [0] + [order] * (len(solution.t) - 1)


def test_orders_are_those_of_the_methods_that_auto_chose(objective: ModuleObjective) -> None:
    solution = integrate(objective, objective.initial_theta(), (0.0, 100.0), method="auto")
    first = [order for t, order in zip(solution.t, solution.orders.tolist(), strict=True) if 0 < t <= solution.choices[1].t]
    assert solution.choices[0].method == "dopri5" and set(first) == {5} and solution.orders[1:].min() > 0


def test_evaluations_and_seconds_rise_to_what_the_run_took(solutions: dict[str, FlowSolution]) -> None:
    for solution in solutions.values():
        assert solution.evaluations is not None and solution.seconds is not None
        assert solution.evaluations.shape == (len(solution.t), 3) and solution.evaluations.dtype == torch.int64
        assert solution.evaluations[0].tolist() == [1, 0, 0]
        assert (solution.evaluations.diff(dim=0) >= 0).all() and (solution.seconds.diff() > 0).all()
        assert solution.evaluations[-1].tolist() == [solution.n_grad, solution.n_hvp, solution.n_hessian]


def test_an_interrupted_run_records_as_one_that_was_not(objective: ModuleObjective, tmp_path: Path) -> None:
    theta0, file, n = objective.initial_theta(), tmp_path / "flow.pt", 0
    whole = integrate(objective, theta0, (0.0, 100.0), method="bdf")

    def interrupt(report: Any) -> None:
        nonlocal n
        n += 1
        if n == 20:
            raise KeyboardInterrupt

    cut = integrate(objective, theta0, (0.0, 100.0), method="bdf", checkpoint=file, progress=interrupt)
    assert cut.status == "interrupted" and len(cut.step_sizes) == len(cut.t)
    rest = integrate(objective, theta0, (0.0, 100.0), method="bdf", checkpoint=file)
    assert torch.equal(rest.step_sizes[1:], whole.step_sizes[1:]) and torch.equal(rest.orders, whole.orders)
    assert torch.equal(rest.t, whole.t)
    assert torch.equal(rest.evaluations, whole.evaluations) and (rest.seconds.diff() > 0).all()


def test_an_ensemble_keeps_them(tmp_path: Path) -> None:
    starts = torch.ones(1, 2, dtype=torch.float64)
    for _ in range(2):  # the second time from its file
        (solution,) = integrate_many(Quadratic(1.0, 0.1), starts, (0.0, 1.0), method="bdf", directory=tmp_path).solutions
        assert len(solution.step_sizes) == len(solution.seconds) == len(solution.orders) == len(solution.t) > 2
        assert len(solution.evaluations) == len(solution.t)


# Figures of runs.


def test_loss_against_flow_time(solutions: dict[str, FlowSolution]) -> None:
    solution = solutions["bdf"]
    ax = plot_loss(solution, ax=axes())
    assert ax.get_xscale() == ax.get_yscale() == "log" and ax.get_legend() is None
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("flow time $t$", "loss $L$")
    (line,) = ax.lines
    assert np.array_equal(line.get_xdata(), solution.t[1:]) and np.array_equal(line.get_ydata(), solution.loss[1:])
    sees(ax, solution.t[1:].tolist(), solution.loss[1:].tolist(), STYLES[0][0])
    texts_are_apart(ax)


def test_loss_above_a_minimum(solutions: dict[str, FlowSolution]) -> None:
    solution = solutions["bdf"]
    above = float(solution.loss[-1])
    ax = plot_loss(solution, above=above, ax=axes())
    assert len(ax.lines[0].get_xdata()) == len(solution.t) - 2 and ax.get_ylabel() == f"loss $L$ − {above:.6g}"
    sees(ax, solution.t[1:-1].tolist(), (solution.loss[1:-1] - above).tolist(), STYLES[0][0])


def test_gradient_norm_against_gradient_equivalents(solutions: dict[str, FlowSolution]) -> None:
    """Gradients + 2 (products) + 2 P (Hessians), P = 33."""
    ax = plot_loss(solutions, against="evaluations", quantity="gradient norm", ax=axes())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("gradient-equivalents", r"gradient norm $\|\nabla L\|_\infty$")
    for line, solution in zip(ax.lines, solutions.values(), strict=True):
        assert line.get_xdata()[-1] == solution.n_grad + 2 * solution.n_hvp + 66 * solution.n_hessian
        assert np.array_equal(line.get_ydata(), solution.grad_norm)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(solutions)
    texts_are_apart(ax)


def test_loss_against_wall_time(solutions: dict[str, FlowSolution]) -> None:
    ax = plot_loss(solutions["bdf"], against="wall time", ax=axes())
    assert np.array_equal(ax.lines[0].get_xdata(), solutions["bdf"].seconds) and ax.get_xlabel() == "wall time (s)"
    texts_are_apart(ax)


def test_lines_are_told_apart_without_colour(solutions: dict[str, FlowSolution]) -> None:
    """Each of five lines, drawn alone, leaves another pattern of dark and white along its way, and is dark enough."""
    assert len({str(dashes) for _, dashes in STYLES}) == len({color for color, _ in STYLES}) == 5
    flat = replace(solutions["bdf"], loss=torch.full_like(solutions["bdf"].loss, 0.5))
    patterns = []
    for i in range(5):
        ax = plot_loss({str(k): flat for k in range(i + 1)}, ax=axes())
        for line in ax.lines[:i]:
            line.set_visible(False)
        ax.get_legend().set_visible(False)
        ax.grid(visible=False)
        rgb = picture(ax)
        _, row = ax.transData.transform((1.0, 0.5))
        i_row = round(rgb.shape[0] - 1 - row)
        inside = slice(round(ax.bbox.x0) + 30, round(ax.bbox.x1) - 30)
        patterns.append(luminance(rgb[i_row - 2 : i_row + 3, inside]).min(0) < 1 - DARKER)
        assert patterns[-1].mean() > 0.3
    for i, one in enumerate(patterns):
        assert all((one != other).mean() > 0.15 for other in patterns[:i])


def test_step_size(solutions: dict[str, FlowSolution]) -> None:
    """With the methods that were chosen, where they begin."""
    solution = replace(solutions["bdf"], choices=(Choice(0.0, "dopri5", ""), Choice(1.0, "bdf", "")))
    ax = plot_step_size(solution, ax=axes())
    sees(ax, solution.t[1:].tolist(), solution.step_sizes[1:].tolist(), STYLES[0][0])
    assert [text.get_text() for text in ax.texts] == ["dopri5", "bdf"]
    assert ax.lines[2].get_xdata()[0] == 1.0 and "step size" in ax.get_ylabel()
    texts_are_apart(ax)
    assert not plot_step_size({"a": solution, "b": solutions["bdf-cg"]}, ax=axes()).texts


def test_order(solutions: dict[str, FlowSolution]) -> None:
    """A line that jumps at the ends of steps, between whole numbers."""
    solution = solutions["bdf"]
    ax = plot_order(solution, ax=axes())
    (line,) = ax.lines
    assert line.get_drawstyle() == "steps-pre" and np.array_equal(line.get_ydata(), solution.orders[1:])
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear" and ax.get_ylabel() == "order"
    low, high = ax.get_ylim()
    assert low < 1 and 6 < high < 7
    middles = (solution.t[1:-1] * solution.t[2:]).sqrt().tolist()
    sees(ax, middles, solution.orders[2:].tolist(), STYLES[0][0])
    texts_are_apart(ax)
    assert len(plot_order(solutions, ax=axes()).lines) == 3


def test_an_optimizer_s_solution_can_be_drawn() -> None:
    model, x, y = teacher_student(1, n_samples=50)
    optimizer = GradientFlow(model.parameters(), method="bdf")
    optimizer.integrate(make_closure(optimizer, model, x, y), 10.0)
    ax = plot_loss(optimizer.solution, against="wall time", ax=axes())
    plot_loss(optimizer.solution, against="evaluations", ax=ax)
    assert ax.lines[0].get_linestyle() == "-"


# The spectrum.


def test_spectrum_of_a_certificate() -> None:
    """Two eigenvalues below zero, one that is zero, two above: each with its size, colour and marker."""
    eigenvalues = (-3.0, -0.01, 0.0, 0.1, 50.0)
    point = certify(Quadratic(*eigenvalues), torch.zeros(5, dtype=torch.float64))
    ax = plot_spectrum(point, ax=axes())
    assert ax.get_yscale() == "log" and ax.get_ylabel() == r"eigenvalue $|\lambda|$"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["negative (2)", "zero up to rounding (1)", "positive (2)"]
    negative, zero, positive = ax.lines
    assert negative.get_xdata().tolist() == [1, 2] and negative.get_ydata() == pytest.approx([3.0, 0.01])
    assert zero.get_xdata().tolist() == [3] and zero.get_ydata() == pytest.approx([50 * 2.220446e-16], rel=1e-6)
    assert positive.get_xdata().tolist() == [4, 5] and positive.get_ydata() == pytest.approx([0.1, 50.0])
    assert len({line.get_marker() for line in ax.lines}) == len({line.get_color() for line in ax.lines}) == 3
    sees(ax, [4, 5], [0.1, 50.0], positive.get_color())
    texts_are_apart(ax)
    rgb = picture(ax)
    # Open and full markers differ in grey: the middle of one is paper, that of the other is not.
    middles = [around(ax, rgb, x, y)[12] for x, y in ((1, 3.0), (5, 50.0))]
    assert luminance(middles[0]) > 0.9 and luminance(middles[1]) < 0.5


def test_spectrum_of_a_result_and_of_numbers() -> None:
    objective = Quadratic(2.0, 0.5, 1e-3)
    result = minimize(objective, torch.ones(3, dtype=torch.float64))
    for given in (result, result.certificate.eigenvalues, torch.tensor([0.5, 2.0, 1e-3], dtype=torch.float64)):
        (line,) = plot_spectrum(given, ax=axes()).lines
        assert line.get_ydata() == pytest.approx([1e-3, 0.5, 2.0]) and line.get_label() == "positive (3)"
    signs = plot_spectrum(torch.tensor([1e-9, 1.0, -1.0, -1e-8]), ax=axes()).lines  # float32
    assert [line.get_label() for line in signs] == ["negative (1)", "zero up to rounding (2)", "positive (1)"]
    assert len(plot_spectrum(torch.zeros(3), ax=axes()).lines) == 1
    partial = replace(result.certificate, complete=False)
    assert "known" in plot_spectrum(partial, ax=axes()).get_xlabel()
    with pytest.raises(ValueError, match="certificate=True"):
        plot_spectrum(replace(result, certificate=None), ax=axes())


# The landscape.


def flow_of(eigenvalues: list[float], theta0: list[float], times: Tensor) -> Tensor:
    """θ_i(t) = θ_i(0) exp(−λ_i t)."""
    return torch.tensor(theta0, dtype=torch.float64) * torch.exp(-times[:, None] * torch.tensor(eigenvalues))


def test_trajectory_in_given_directions() -> None:
    """A quadratic's flow in the plane of two of its axes: closed form; every contour's points have the contour's loss."""
    objective = Quadratic(1.0, 5.0, 2.0)
    path = flow_of([1.0, 5.0, 2.0], [2.0, 1.0, 0.0], torch.linspace(0, 8, 60))
    e = torch.eye(3, dtype=torch.float64)
    ax = plot_trajectory(path, objective, directions=(e[0], e[0] + 0.5 * e[1]), n_grid=81, ax=axes())
    assert ax.lines[0].get_xdata() == pytest.approx((path[:, 0] - path[-1, 0]).tolist(), abs=1e-12)
    assert ax.lines[0].get_ydata() == pytest.approx((path[:, 1] - path[-1, 1]).tolist(), abs=1e-12)
    assert ax.get_aspect() == 1.0
    (contours,) = (c for c in ax.collections if isinstance(c, QuadContourSet))
    n_points = 0
    for level, paths in zip(contours.levels, contours.get_paths(), strict=True):
        for u, v in paths.vertices:
            theta = path[-1] + u * e[0] + v * e[1]
            assert float(objective.loss_and_gradient(theta)[0]) == pytest.approx(level, rel=0.02, abs=0.005)
            n_points += 1
    assert n_points > 200
    points = np.array(ax.lines[0].get_xydata())
    sees(ax, points[1:40, 0], points[1:40, 1], STYLES[0][0])  # the first is within the open circle
    texts_are_apart(ax)
    assert ax.get_xlabel() == f"first direction ({100 * share(path, e[0]):.3g} %)"


def share(path: Tensor, direction: Tensor) -> float:
    """The part of Σ‖θ − θ_end‖² along a direction."""
    differences = path - path[-1]
    return float((differences @ direction).square().sum() / differences.square().sum())


def test_trajectory_in_its_principal_components(objective: ModuleObjective, solutions: dict[str, FlowSolution]) -> None:
    """Against the eigenvectors of Σ (θ − θ_end)(θ − θ_end)ᵀ."""
    solution = solutions["bdf"]
    ax = plot_trajectory(solution, objective, n_grid=9, ax=axes())
    differences = (solution.theta - solution.theta[-1]).numpy()
    values, vectors = np.linalg.eigh(differences.T @ differences)
    found = np.array(ax.lines[0].get_xydata())
    for i in (0, 1):
        wanted = differences @ vectors[:, -1 - i]
        assert np.abs(found[:, i]) == pytest.approx(np.abs(wanted), abs=1e-8)
    assert ax.get_xlabel() == f"first principal component ({100 * values[-1] / values.sum():.3g} %)"
    low, high = ax.get_xlim()
    assert low < found[:, 0].min() and found[:, 0].max() < high
    start, end = ax.lines[1], ax.lines[2]
    assert start.get_markerfacecolor() == "white" and start.get_xydata()[0] == pytest.approx(found[0])
    assert end.get_markerfacecolor() == STYLES[0][0] and end.get_xydata()[0] == pytest.approx([0.0, 0.0])


def test_several_trajectories_share_the_plane_of_the_first_one_s_end() -> None:
    """Named in the legend; a straight one has a second component, too; without an objective there are no contours."""
    times = torch.linspace(0, 5, 30)
    straight, bent = flow_of([1.0, 1.0], [1.0, 2.0], times), flow_of([1.0, 4.0], [1.0, 2.0], times)
    ax = plot_trajectory({"straight": straight, "bent": bent}, ax=axes())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["straight", "bent"]
    assert not [c for c in ax.collections if isinstance(c, QuadContourSet)]
    one, _, _, other = ax.lines[:4]
    assert one.get_linestyle() != other.get_linestyle() and one.get_xydata()[0] == pytest.approx(other.get_xydata()[0])
    texts_are_apart(ax)
    alone = plot_trajectory(straight, Quadratic(1.0, 1.0), n_grid=5, ax=axes())
    assert np.abs(alone.lines[0].get_ydata()).max() < 1e-12


def test_a_flat_or_infinite_loss_leaves_the_trajectory() -> None:
    path = flow_of([1.0, 2.0], [1.0, 1.0], torch.linspace(0, 5, 30))
    assert len(plot_trajectory(path, Quadratic(0.0, 0.0), n_grid=3, ax=axes()).lines) == 3
    hole = Quadratic(1.0, 1.0)
    wall = path[-1] + 0.5
    original = hole.loss_and_gradient

    class Walled(Quadratic):
        def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = original(theta)
            return torch.where((theta > wall).any(), torch.inf, loss), gradient

    ax = plot_trajectory(path, Walled(1.0, 1.0), n_grid=15, ax=axes())
    (contours,) = (c for c in ax.collections if isinstance(c, QuadContourSet))
    assert np.isfinite(contours.levels).all()
    picture(ax)


def test_line_between_minima() -> None:
    """The hill of a double well, in closed form."""
    objective = DoubleWell()
    ends = [minimize(objective, torch.tensor([a, 0.1], dtype=torch.float64)) for a in (-1.0, 1.0)]
    ax = plot_line(objective, ends[0], ends[1].theta, ax=axes())
    s = np.array(ax.lines[0].get_xdata())
    a = (1 - s) * float(ends[0].theta[0]) + s * float(ends[1].theta[0])
    losses = (a * a - 1) ** 2 + 0.3 * a
    assert s[0] == -0.25 and s[-1] == 1.25 and 0.0 in s and 1.0 in s
    assert ax.lines[0].get_ydata() == pytest.approx(losses, abs=1e-12)
    rise = losses[(s > 0) & (s < 1)].max() - losses[s == 1.0][0]
    assert [text.get_text() for text in ax.texts] == [f"+{rise:.3g}"]
    beside = np.abs(s - ax.lines[2].get_xdata()[0]) > 0.03  # the mark at the top
    sees(ax, s[beside], losses[beside], STYLES[0][0])
    texts_are_apart(ax)
    assert ax.get_ylabel() == "loss $L$" and ax.lines[1].get_xdata().tolist() == [0.0, 1.0]
    downhill = plot_line(objective, torch.tensor([0.5, 0.0], dtype=torch.float64), ends[1], ax=axes())
    assert not downhill.texts


# Arguments, and matplotlib.


@pytest.mark.parametrize(
    ("call", "error", "what"),
    [
        (lambda s: plot_loss(3.0), TypeError, "solutions must be a FlowSolution.*not float"),
        (lambda s: plot_loss({}), ValueError, "solutions must hold"),
        (lambda s: plot_loss(s, against="epochs"), ValueError, "against.*'epochs'"),
        (lambda s: plot_loss(s, quantity="error"), ValueError, "quantity.*'error'"),
        (lambda s: plot_loss(s, above=1e9), ValueError, r"nothing to draw.*above=1e\+09"),
        (lambda s: plot_loss({"one": replace(s, seconds=None)}, against="wall time"), ValueError, r"\['one'\].*wall times"),
        (lambda s: plot_loss(replace(s, evaluations=None), against="evaluations"), ValueError, "holds no evaluations"),
        (lambda s: plot_step_size(replace(s, step_sizes=None)), ValueError, "holds no step sizes"),
        (lambda s: plot_order(replace(s, orders=None)), ValueError, "holds no orders"),
        (lambda s: plot_order(replace(s, orders=0 * s.orders)), ValueError, "no step of known order"),
        (lambda s: plot_spectrum([1.0]), TypeError, "point must be"),
        (lambda s: plot_spectrum(torch.tensor([])), ValueError, "point must hold"),
        (lambda s: plot_spectrum(torch.tensor([torch.nan])), ValueError, "point must hold"),
        (lambda s: plot_trajectory(torch.zeros(3, 2)), ValueError, "do not move"),
        (lambda s: plot_trajectory(torch.zeros(3)), ValueError, "paths must be finite points"),
        (lambda s: plot_trajectory({"a": torch.eye(3), "b": torch.eye(2)}), ValueError, "same number of parameters"),
        (lambda s: plot_trajectory(torch.eye(2)[:, :1]), ValueError, "at least two parameters"),
        (lambda s: plot_trajectory(s, "L"), TypeError, "objective must be an Objective"),
        (lambda s: plot_trajectory(s, Quadratic(1.0)), ValueError, "objective has 1 parameters"),
        (lambda s: plot_trajectory(s, n_grid=0), ValueError, "n_grid"),
        (lambda s: plot_trajectory(torch.eye(2), directions=[torch.ones(2)] * 2), ValueError, "not parallel"),
        (lambda s: plot_trajectory(torch.eye(2), directions=[torch.ones(3)] * 2), ValueError, r"shape \(2,\)"),
        (lambda s: plot_line(DoubleWell(), torch.ones(2), torch.ones(2)), ValueError, "another point"),
        (lambda s: plot_line(DoubleWell(), torch.ones(2), torch.ones(3)), ValueError, "end 3"),
        (lambda s: plot_line(DoubleWell(), [1.0, 1.0], torch.ones(2)), TypeError, "start must be a tensor"),
        (lambda s: plot_line(DoubleWell(), torch.ones(2), torch.ones(2, 2)), ValueError, "end must have the shape"),
    ],
)
def test_bad_arguments_are_named(solutions: dict[str, FlowSolution], call: Any, error: type, what: str) -> None:
    """Before a figure is made: no figure of pyplot's is left behind."""
    import matplotlib.pyplot as plt

    with pytest.raises(error, match=what):
        call(solutions["bdf"])
    assert not plt.get_fignums()


def test_without_axes_a_figure_of_pyplot_s_is_made(solutions: dict[str, FlowSolution]) -> None:
    import matplotlib.pyplot as plt

    with plt.rc_context({"backend": "agg"}):
        ax = plot_loss(solutions["bdf"])
        assert plt.gca() is ax
        plt.close(ax.figure)


def test_without_matplotlib_the_error_names_the_extra(
    solutions: dict[str, FlowSolution], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"torch-gradflow\[plotting\]"):
        plot_loss(solutions["bdf"])


def test_matplotlib_is_imported_by_the_first_figure_only() -> None:
    program = "import sys, torch_gradflow\nfrom torch_gradflow import plotting\nprint('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
