"""Perceptrons for a table, the objective that they are trained on, and their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from torch_gradflow.command_line.errors import UsageError
from torch_gradflow.command_line.tables import DATA_SETS, read_table
from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.regularized import Penalties, Regularized

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "relu": nn.ReLU,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "cross-entropy": F.cross_entropy,
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Of the files of models.
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What makes a problem out of a table; plain values, as they stand in a model's file.

    Attributes:
        data: See ``read_table``, like the next three.
        target: The column to predict.
        drop: Columns to leave out.
        task: One of ``TASKS``.
        scale: "standard" for mean 0 and variance 1, or "none".
        layers: Neurons of the hidden layers.
        activation: One of ``ACTIVATIONS``.
        loss: One of ``LOSSES``; None takes the task's usual one.
        weight_decay: λ of λ/2 ‖θ‖².
        dtype: One of ``DTYPES``.
    """

    data: str
    target: str | None
    drop: list[str]
    task: str | None
    scale: str
    layers: list[int]
    activation: str
    loss: str | None
    weight_decay: float
    dtype: str


class Problem:
    """A table with a perceptron to be trained on it.

    Args:
        settings: As they were given.

    Attributes:
        settings: With the defaults filled in.
        table: The data as they are.
        x: Features as the network sees them, shape ``(n, d)``.
        y: Targets as the loss sees them.
        scaling: Means and scales: x = (table.x − x_mean)/x_scale, and the same of y where it is a number.
        loss_fn: The loss.
        sizes: Of the network's layers.

    Raises:
        UsageError: Naming argument, value and remedy.
    """

    def __init__(self, settings: Settings) -> None:
        self.table = table = read_table(settings.data, settings.target, settings.drop, settings.task)
        loss = settings.loss or ("cross-entropy" if table.classes else "mse")
        if (loss == "cross-entropy" and not table.classes) or (loss == "huber" and table.classes):
            other = "mse or huber" if loss == "cross-entropy" else "cross-entropy or mse"
            raise UsageError(f"argument --loss: {loss!r} does not go with {table.task}; take {other}.")
        self.settings = replace(settings, loss=loss)
        if settings.data not in DATA_SETS:
            self.settings = replace(self.settings, data=table.source, target=table.target, task=table.task)
        dtype, standard = DTYPES[settings.dtype], settings.scale == "standard"
        x, x_mean, x_scale = scaled(table.x, standard)
        self.x = x.to(dtype)
        self.scaling = {"x_mean": x_mean, "x_scale": x_scale}
        if table.classes:
            self.y = table.y if loss == "cross-entropy" else F.one_hot(table.y, len(table.classes)).to(dtype)
        else:
            y, y_mean, y_scale = scaled(table.y, standard)
            self.y = y.to(dtype)
            self.scaling |= {"y_mean": y_mean, "y_scale": y_scale}
        self.loss_fn = LOSSES[loss]
        n_outputs = len(table.classes) or table.y.shape[1]
        self.sizes = (table.x.shape[1], *settings.layers, n_outputs)

    def network(self) -> nn.Sequential:
        """A new network, with torch's random parameters."""
        activation = ACTIVATIONS[self.settings.activation]
        layers = [part for d_in, d_out in pairwise(self.sizes) for part in (nn.Linear(d_in, d_out), activation())]
        return nn.Sequential(*layers[:-1]).to(DTYPES[self.settings.dtype])

    def objective(self, network: nn.Module) -> Objective:
        """The loss with weight decay, as a function of the network's parameters."""
        base = ModuleObjective(network, self.loss_fn, (self.x, self.y))
        decay = torch.full_like(base.initial_theta(), self.settings.weight_decay)
        return Regularized(base, Penalties(weight_decay=decay)) if self.settings.weight_decay else base

    def __str__(self) -> str:
        table, settings = self.table, self.settings
        n, d = table.x.shape
        if table.classes:
            shown = ", ".join(table.classes[:5]) + (", …" if len(table.classes) > 5 else "")
            task = f"classification of {table.target!r} into {len(table.classes)} classes ({shown})"
        else:
            task = f"regression of {table.target!r}"
        scaled = "features" if table.classes else "features and target"
        how = "have mean 0 and variance 1" if settings.scale == "standard" else "are as they are"
        n_parameters = sum((a + 1) * b for a, b in pairwise(self.sizes))
        penalty = f" + {settings.weight_decay / 2:g} ‖θ‖²" if settings.weight_decay else ""
        return (
            f"{table.source}: {n} samples, {d} features; {task} ({table.reason}); {scaled} {how} (--scale {settings.scale}).\n"
            f"Network {'-'.join(map(str, self.sizes))}, {settings.activation}, {n_parameters} parameters, {settings.dtype}; "
            f"loss: {settings.loss}{penalty}."
        )


def scaled(values: Tensor, standard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values − mean)/scale with mean and scale, column by column; as they are, with 0 and 1, if not ``standard``.

    What varies gets mean 0 and variance 1; what is constant, mean 0.
    """
    mean, scale = torch.zeros_like(values[0]), torch.ones_like(values[0])
    if standard:
        mean, deviation = values.mean(0), values.std(0, correction=0)
        scale = torch.where(deviation > 1e-12 * values.abs().amax(0), deviation, 1.0)
    return (values - mean) / scale, mean, scale


def save_model(path: Path, problem: Problem, network: nn.Module, loss: float, **origin: str | int | float) -> None:
    """Write a network with all that it takes to go on: ``torch.load(path)["state_dict"]`` are its parameters.

    Args:
        path: Where.
        problem: What it was trained on.
        network: One of ``problem.network()``.
        loss: L at its parameters, with weight decay; by which ``load_model`` knows the data again.
        origin: What else is to be told, such as optimizer and seed.
    """
    content = {
        "format": FORMAT,
        "settings": asdict(problem.settings),
        "sizes": list(problem.sizes),
        "scaling": problem.scaling,
        "classes": list(problem.table.classes),
        # Clones: parameters may be parts of a larger tensor, which would be written with them.
        "state_dict": {name: value.clone() for name, value in network.state_dict().items()},
        "loss": loss,
        "origin": origin,
    }
    torch.save(content, path)


def load_model(path: Path, data: str | None = None) -> tuple[Problem, nn.Sequential]:
    """The problem and the network of a file that ``save_model`` wrote.

    Args:
        path: The file.
        data: Where the data are now, if not where they were.

    Raises:
        UsageError: If it is no such file, or the data are not there, or not the same any more.
    """
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        version, settings = content["format"], Settings(**content["settings"])
    except Exception as error:
        raise UsageError(
            f"argument MODEL: {str(path)!r} is no model that 'compare', 'flow' or 'polish' saved ({type(error).__name__})."
        ) from None
    if version != FORMAT:
        raise UsageError(f"argument MODEL: {str(path)!r} was written by another version (format {version}); train it anew.")
    problem = Problem(settings if data is None else replace(settings, data=data))
    network = problem.network()
    if list(problem.sizes) == content["sizes"]:
        network.load_state_dict(content["state_dict"])
        objective = problem.objective(network)
        loss = float(objective.loss_and_gradient(parameters_to_vector(network.parameters()).detach())[0])
        if abs(loss - content["loss"]) <= 1e4 * objective.resolution * abs(content["loss"]):
            return problem, network
    raise UsageError(
        f"argument --data: {problem.table.source!r} does not hold the data of {str(path)!r} any more: the loss is not "
        "the one that was saved. Name the file with the data that it was trained on."
    )
