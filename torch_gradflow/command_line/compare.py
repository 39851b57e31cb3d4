"""Train the same network with several optimizers: a table, a figure and the trained models."""

from __future__ import annotations

import argparse
import csv
import math
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

from torch.nn.utils import vector_to_parameters

from torch_gradflow.command_line.arguments import (
    add_output_argument,
    add_problem_arguments,
    count,
    output_directory,
    positive,
    problem_of,
    whole,
)
from torch_gradflow.command_line.errors import UsageError
from torch_gradflow.command_line.networks import save_model
from torch_gradflow.optimizer_comparison import OPTIMIZERS, ComparedRun, Comparison, MakeOptimizer, compare

DEFAULT = ("Adam", "LBFGS", "GradientFlow+NewtonPolish")
STAGES = {name: stages[0] for name, stages in OPTIMIZERS.items() if len(stages) == 1}
COLUMNS = [field.name for field in fields(ComparedRun) if field.name not in ("theta", "history")]

USAGE = "DATA [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``compare``."""
    add_problem_arguments(parser)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--optimizers",
        nargs="+",
        default=DEFAULT,
        metavar="NAME[:lr=VALUE]",
        help=f"{', '.join(STAGES)}; with their own defaults but for lr; what comes after a + begins where the other ended "
        f"(default: {' '.join(DEFAULT)})",
    )
    training.add_argument(
        "--seeds", nargs="+", type=partial(whole, least=0), default=[0], metavar="N", help="of the starts (default: 0)"
    )
    training.add_argument(
        "--steps", type=count, default=100, help="of each optimizer (default: %(default)s); NewtonPolish takes one"
    )
    training.add_argument(
        "--seconds", type=positive, default=math.inf, help="after which an optimizer takes no further step (default: no limit)"
    )
    add_output_argument(parser, "NAME-compare")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write table.txt, runs.csv, loss.png and models/."""
    optimizers = {spec: stages(spec) for spec in args.optimizers}
    problem = problem_of(args)
    output = output_directory(args.output, f"{Path(args.data).stem}-compare")
    print(problem)
    found = compare(
        problem.network,
        problem.loss_fn,
        (problem.x, problem.y),
        optimizers,
        weight_decay=args.weight_decay,
        n_steps=args.steps,
        seconds=args.seconds,
        seeds=args.seeds,
    )
    print(f"\n{found}\n")
    (output / "table.txt").write_text(f"{problem}\n\n{found}\n", encoding="utf-8")
    write_runs(output / "runs.csv", found)
    found.plot().savefig(output / "loss.png", dpi=100)
    (output / "models").mkdir(exist_ok=True)
    for one in found.runs:
        network = problem.network()
        vector_to_parameters(one.theta, network.parameters())
        file = output / "models" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', one.name)}-seed{one.seed}.pt"
        save_model(file, problem, network, one.loss, optimizer=one.name, seed=one.seed)
    print(f"Table, runs, figure and models: {output}")
    return 0


def stages(spec: str) -> tuple[MakeOptimizer, ...]:
    """The optimizers of NAME[:lr=VALUE][+NAME...], in the order in which they serve.

    Raises:
        UsageError: For anything else.
    """
    return tuple(_stage(part) for part in spec.split("+"))


def _stage(spec: str) -> MakeOptimizer:
    name, _, setting = spec.partition(":")
    if name not in STAGES:
        raise UsageError(f"argument --optimizers: {name!r} is not one of {', '.join(STAGES)}.")
    if not setting:
        return STAGES[name]
    key, _, value = setting.partition("=")
    if key != "lr":
        raise UsageError(f"argument --optimizers: {setting!r} is no setting of {name}; only lr=VALUE may be given.")
    try:
        return partial(STAGES[name], lr=positive(value))  # type: ignore[call-arg]  # each of them takes lr
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"argument --optimizers: lr in {spec!r}: {error}") from None


def write_runs(path: Path, found: Comparison) -> None:
    """One row per run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(one, column) for column in COLUMNS] for one in found.runs)
