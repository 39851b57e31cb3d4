"""The recipes for other training loops: all end where scipy's integrator ends, and none is long."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

LOOPS = Path(__file__).parents[1] / "examples" / "loops"
# Each recipe, and what it needs.
RECIPES = {
    "plain": "torch",
    "plain_closure": "torch",
    "with_lightning": "lightning",
    "with_fabric": "lightning",
    "with_accelerate": "accelerate",
    "with_ignite": "ignite",
    "with_skorch": "skorch",
    "with_transformers": "transformers",
}


@pytest.fixture(scope="module")
def common() -> dict[str, Any]:
    """What the recipes have in common."""
    return runpy.run_path(str(LOOPS / "regression.py"))


@pytest.fixture(scope="module")
def loss_of_scipy(common: dict[str, Any]) -> float:
    """The loss at the end of the flow: gradients by autograd, integrated by scipy's DOP853."""
    integrate = pytest.importorskip("scipy.integrate")
    pytest.importorskip("sklearn")
    model, (x, y) = common["network"](), common["data"]()
    parameters = list(model.parameters())

    def descent(t: float, theta: np.ndarray) -> np.ndarray:
        nn.utils.vector_to_parameters(torch.from_numpy(theta), parameters)
        gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), y), parameters)
        return -torch.cat([g.reshape(-1) for g in gradients]).numpy()

    start = nn.utils.parameters_to_vector(parameters).detach().numpy()
    end = common["LR"] * common["N_STEPS"]
    found = integrate.solve_ivp(descent, (0.0, end), start, method="DOP853", rtol=1e-9, atol=1e-11)
    nn.utils.vector_to_parameters(torch.from_numpy(found.y[:, -1].copy()), parameters)
    return float(common["final_loss"](model))


@pytest.fixture
def clean_accelerate() -> Iterator[None]:
    """None of Accelerate's global state is left afterwards."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("clean_accelerate")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, loss_of_scipy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fallback to one gradient per call would be a warning, which is an error here."""
    pytest.importorskip(RECIPES[name], reason=f"{RECIPES[name]} is not installed")
    monkeypatch.syspath_prepend(LOOPS)
    train = runpy.run_path(str(LOOPS / f"{name}.py"))["train"]
    assert train() == pytest.approx(loss_of_scipy, rel=3e-6)


def test_every_recipe_is_tested_and_short() -> None:
    paths = [path for path in LOOPS.glob("*.py") if path.stem != "regression"]
    assert {path.stem for path in paths} == set(RECIPES)
    assert all(len(path.read_text().splitlines()) <= 60 for path in paths)
