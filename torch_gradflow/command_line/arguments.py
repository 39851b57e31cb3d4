"""Arguments that several commands share, and their checks."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch_gradflow.checks import check_number
from torch_gradflow.command_line.errors import UsageError
from torch_gradflow.command_line.networks import ACTIVATIONS, DTYPES, LOSSES, Problem, Settings
from torch_gradflow.command_line.tables import DATA_SETS, TASKS


def number(text: str, **limits: Any) -> float:
    """A type for argparse: a number within the limits of ``check_number``."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    try:
        return check_number("the value", value, **limits)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(text: str, least: int) -> int:
    """A type for argparse: a whole number, at least ``least``."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"the value must be at least {least}, not {value}")
    return value


positive = partial(number, above=0.0)
count = partial(whole, least=1)


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, network and loss."""
    data = parser.add_argument_group("data")
    known = ", ".join(f"{name} ({task})" for name, task in DATA_SETS.items())
    data.add_argument("data", metavar="DATA", help=f"a CSV file, or a data set that scikit-learn ships: {known}")
    data.add_argument(
        "--target", help="the column to predict, by name, or by number from 1 without a header (default: the last one)"
    )
    data.add_argument(
        "--drop", nargs="+", default=[], metavar="COLUMN", help="columns to leave out, such as identifiers (default: none)"
    )
    data.add_argument(
        "--task",
        choices=TASKS,
        help="what the target is (default: classification for text, regression for numbers; whole numbers of ten values or "
        "fewer may be either, and you are asked to say)",
    )
    data.add_argument(
        "--scale",
        choices=("standard", "none"),
        default="standard",
        help="standard: every feature, and a target of numbers, is shifted and scaled to mean 0 and variance 1; none: all "
        "stay as they are (default: %(default)s)",
    )
    network = parser.add_argument_group("network and loss")
    network.add_argument(
        "--layers",
        nargs="+",
        type=count,
        default=[8],
        metavar="N",
        help="neurons of each hidden layer (default: 8, one layer)",
    )
    network.add_argument(
        "--activation", choices=ACTIVATIONS, default="tanh", help="of the hidden layers (default: %(default)s)"
    )
    network.add_argument("--loss", choices=LOSSES, help="(default: mse for regression, cross-entropy for classification)")
    network.add_argument(
        "--weight-decay",
        type=partial(number, least=0.0),
        default=0.01,
        metavar="λ",
        help="adds λ/2 ‖θ‖² to the loss; with 0 the loss of separable classes has no minimum (default: %(default)s)",
    )
    network.add_argument(
        "--dtype", choices=DTYPES, default="float64", help="in which everything is computed (default: %(default)s)"
    )


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem that the arguments of ``add_problem_arguments`` describe."""
    return Problem(Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)}))


def add_output_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Where results are written."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"where results are written, over those of earlier runs (default: {default})",
    )


def output_directory(given: Path | None, default: str) -> Path:
    """The directory of the results, made if it is not there.

    Raises:
        UsageError: If it cannot be made.
        ImportError: If matplotlib, for the figures that belong to the results, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("figures need matplotlib: pip install 'torch-gradflow[plotting]'.")
    directory = given or Path(default)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument --output: {str(directory)!r} cannot be made ({error.strerror}): name another directory."
        ) from None
    return directory
