"""``compare``: each run is what a loop by hand gives; counts, table and figure say what happened."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_gradflow import GradientFlow, NewtonPolish
from torch_gradflow.optimizer_comparison import OPTIMIZERS, STYLES, Comparison, compare

mse = nn.functional.mse_loss
N_PARAMETERS, DECAY = 13, 0.01


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """A noisy plane with a bump."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True).sin() + 0.3 * noise


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return mse(model(data[0]), data[1]) + DECAY / 2 * sum(p.square().sum() for p in model.parameters())


def by_hand(name: str, data: tuple[Tensor, Tensor]) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """20 steps from seed 3: the network, the optimizer, the loss before each step."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = network()
    optimizer = CHOSEN[name](model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return model, optimizer, [optimizer.step(closure).item() for _ in range(20)]


def make_flow(parameters: Any) -> GradientFlow:
    """Steps that do not depend on the clock, as those of "auto" do."""
    return GradientFlow(parameters, method="bdf")


CHOSEN = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "LBFGS": torch.optim.LBFGS,
    "flow": make_flow,
    "flow, polished": (make_flow, NewtonPolish),
}


@pytest.fixture(scope="module")
def found(data: tuple[Tensor, Tensor]) -> Comparison:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    comparison = compare(network, mse, data, CHOSEN, weight_decay=DECAY, n_steps=20, seeds=(3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    return comparison


def run_of(comparison: Comparison, name: str, seed: int = 3) -> Any:
    (run,) = (run for run in comparison.runs if (run.name, run.seed) == (name, seed))
    return run


def test_all_begin_at_the_same_parameters(found: Comparison) -> None:
    for seed in (3, 4):
        starts = {run.history[0][2] for run in found.runs if run.seed == seed}
        assert len(starts) == 1
    assert len(found.runs) == 10 and len({run.history[0][2] for run in found.runs}) == 2


@pytest.mark.parametrize("name", ["Adam", "SGD", "LBFGS", "flow"])
def test_a_run_is_the_loop_by_hand(found: Comparison, data: tuple[Tensor, Tensor], name: str) -> None:
    model, _, losses = by_hand(name, data)
    run = run_of(found, name)
    assert [loss for _, _, loss in run.history[:-1]] == pytest.approx(losses, rel=1e-9)
    loss = loss_of(model, data)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert run.loss == pytest.approx(loss.item(), rel=1e-9) and run.history[-1][2] == run.loss
    assert run.grad_norm == pytest.approx(max(float(g.abs().max()) for g in gradients), rel=1e-6)
    assert torch.allclose(run.theta, nn.utils.parameters_to_vector(model.parameters()), rtol=1e-9)


def test_gradient_equivalents(found: Comparison, data: tuple[Tensor, Tensor]) -> None:
    """Closures of torch's optimizers; gradients, products and Hessians of ours."""
    assert run_of(found, "Adam").gradients == run_of(found, "SGD").gradients == 20
    model, optimizer, _ = by_hand("LBFGS", data)
    assert run_of(found, "LBFGS").gradients == optimizer.state[next(model.parameters())]["func_evals"] > 20
    stats = by_hand("flow", data)[1].stats
    wanted = stats.n_grad + 2 * stats.n_hvp + 2 * N_PARAMETERS * stats.n_hessian
    assert run_of(found, "flow").gradients == wanted > 20
    polished = run_of(found, "flow, polished")
    costs = [cost for cost, _, _ in polished.history]
    assert costs == sorted(costs) and costs[20] > wanted


def test_verdicts(found: Comparison) -> None:
    for seed in (3, 4):
        assert run_of(found, "Adam", seed).verdict == "not critical"
        polished = run_of(found, "flow, polished", seed)
        assert polished.grad_norm < 1e-13 and polished.verdict in ("minimum", "saddle")


def test_table(found: Comparison) -> None:
    """A line per optimizer; medians over the seeds."""
    head, *lines = str(found).splitlines()
    assert head.split() == ["loss", "|gradient|", "gradients", "seconds", "critical", "point"]
    assert [line.split("  ")[0] for line in lines] == list(CHOSEN)
    rows = {row["name"]: row for row in found.rows()}
    losses = [run_of(found, "Adam", seed).loss for seed in (3, 4)]
    assert rows["Adam"]["loss"] == pytest.approx(sum(losses) / 2) and rows["Adam"]["verdict"] == "2 not critical"
    (row,) = Comparison(found.runs[:1]).rows()
    assert row["verdict"] == "not critical"


def test_figure(found: Comparison, tmp_path: Path) -> None:
    """Two logarithmic axes, a line per run, each optimizer named once and told apart without colour."""
    pytest.importorskip("matplotlib")
    figure = found.plot()
    left, right = figure.axes
    assert left.get_xscale() == left.get_yscale() == right.get_xscale() == "log"
    assert len(left.lines) == len(right.lines) == 10
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CHOSEN)
    assert len({line.get_color() for line in left.lines}) == len({dashes for _, dashes in STYLES}) == 5
    adam = run_of(found, "Adam")
    best = min(run.loss for run in found.runs if run.seed == adam.seed)
    assert left.lines[0].get_ydata() == pytest.approx([loss - best for _, _, loss in adam.history[1:]])
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_ready_by_name(data: tuple[Tensor, Tensor]) -> None:
    found = compare(network, mse, data, OPTIMIZERS, weight_decay=DECAY, n_steps=2, certificate=False)
    assert [run.name for run in found.runs] == list(OPTIMIZERS)
    assert compare(network, mse, data, "SGD", n_steps=1, certificate=False).runs[0].verdict == ""


def test_time_is_limited(data: tuple[Tensor, Tensor]) -> None:
    found = compare(network, mse, data, ["Adam"], n_steps=10**9, seconds=0.05, certificate=False)
    assert 1 < found.runs[0].gradients < 10**6


@pytest.mark.parametrize(
    ("arguments", "error", "what"),
    [
        ({"make_model": network()}, TypeError, "make_model must be a function"),
        ({"optimizers": ["Adam", "Adamant"]}, ValueError, "Adamant"),
        ({"optimizers": []}, ValueError, "optimizers must hold"),
        ({"optimizers": {"none": ()}}, ValueError, "at least one stage"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"n_steps": 0}, ValueError, "n_steps"),
        ({"seconds": 0.0}, ValueError, "seconds"),
        ({"seconds": math.nan}, ValueError, "seconds"),
        ({"seeds": ()}, ValueError, "seeds"),
    ],
)
def test_bad_arguments_are_named(data: tuple[Tensor, Tensor], arguments: dict[str, Any], error: type, what: str) -> None:
    with pytest.raises(error, match=what):
        compare(**{"make_model": network, "loss_fn": mse, "data": data, **arguments})


def test_without_matplotlib_the_error_names_the_extra(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"torch-gradflow\[examples\]"):
        found.plot()
