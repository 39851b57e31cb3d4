"""Follow the gradient flow of a network to a flow time: the solution, its figure and the model at its end."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torch_gradflow.command_line.arguments import (
    add_output_argument,
    add_problem_arguments,
    number,
    output_directory,
    positive,
    problem_of,
    whole,
)
from torch_gradflow.command_line.errors import UsageError
from torch_gradflow.command_line.networks import save_model
from torch_gradflow.flow.integrate import integrate
from torch_gradflow.flow.methods import METHODS
from torch_gradflow.flow.solution import FlowSolution
from torch_gradflow.flow.stopping import GradientNorm, StoppingRule, WallTime
from torch_gradflow.plotting import plot_loss, plot_step_size

CHECKPOINT = "checkpoint.pt"
EXIT_CODES = {"t_end": 0, "stopped": 0, "interrupted": 130}

USAGE = "DATA [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``flow``."""
    add_problem_arguments(parser)
    flow = parser.add_argument_group("flow")
    flow.add_argument("--seed", type=partial(whole, least=0), default=0, help="of the start (default: 0)")
    flow.add_argument(
        "--t-end",
        type=partial(number, above=0.0, infinite=True),
        default=1000.0,
        metavar="T",
        help="the flow time; may be inf (default: %(default)g)",
    )
    flow.add_argument(
        "--method", choices=METHODS, default="auto", metavar="NAME", help=f"{', '.join(METHODS)} (default: %(default)s)"
    )
    flow.add_argument(
        "--rtol",
        type=partial(number, above=0.0, below=1.0),
        help="relative tolerance of the local error (default: 1e-6 in float64, 1e-4 in float32)",
    )
    flow.add_argument("--seconds", type=positive, help="wall time after which the flow ends (default: no limit)")
    flow.add_argument(
        "--gradient-norm",
        type=positive,
        metavar="G",
        help="the flow ends where ‖∇L‖ in the infinity norm is at most this (default: only at T)",
    )
    add_output_argument(parser, f"NAME-flow, where a run that was interrupted or killed goes on from {CHECKPOINT}")


def run(args: argparse.Namespace) -> int:
    """Integrate, write solution.pt, model.pt and flow.png."""
    rules: list[StoppingRule] = []
    rules += [] if args.seconds is None else [WallTime(args.seconds)]
    rules += [] if args.gradient_norm is None else [GradientNorm(args.gradient_norm)]
    if math.isinf(args.t_end) and not rules:
        raise UsageError("argument --t-end: inf needs an end of another kind; give --seconds or --gradient-norm as well.")
    problem = problem_of(args)
    output = output_directory(args.output, f"{Path(args.data).stem}-flow")
    print(problem)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        network = problem.network()
    objective = problem.objective(network)
    theta0 = parameters_to_vector(network.parameters()).detach()
    checkpoint = output / CHECKPOINT
    if checkpoint.exists():
        print(f"{checkpoint} was found: the run goes on from there.")
    try:
        solution = integrate(
            objective,
            theta0,
            (0.0, args.t_end),
            method=args.method,
            rtol=args.rtol,
            stop=rules or None,
            progress=sys.stderr.isatty(),
            checkpoint=checkpoint,
        )
    except ValueError as error:  # all other arguments were checked before
        raise UsageError(f"argument --output: {error} Or name another directory.") from None
    vector_to_parameters(solution.theta[-1], network.parameters())
    save_solution(output / "solution.pt", solution)
    save_model(output / "model.pt", problem, network, float(solution.loss[-1]), seed=args.seed, t=float(solution.t[-1]))
    draw(output / "flow.png", solution)
    print(f"{solution.message}\nloss {solution.loss[-1]:.9g}, |gradient| {solution.grad_norm[-1]:.1e}, {costs(solution)}.")
    print(f"Solution, model and figure: {output}")
    if solution.status == "interrupted":
        print("The same command goes on from here.")
    return EXIT_CODES.get(solution.status, 1)


def costs(solution: FlowSolution) -> str:
    """Evaluations and steps as words."""
    products = f", {solution.n_hvp:,} products with the Hessian" if solution.n_hvp else ""
    hessians = f", {solution.n_hessian:,} Hessians" if solution.n_hessian else ""
    return f"{solution.n_accepted:,} steps, {solution.n_grad:,} gradients{products}{hessians}"


def save_solution(path: Path, solution: FlowSolution) -> None:
    """Write what is plain of a solution as a dictionary, for ``torch.load``."""
    values = {field.name: getattr(solution, field.name) for field in fields(FlowSolution)}
    content = {name: value for name, value in values.items() if isinstance(value, Tensor | float | int | str)}
    choices = [(choice.t, choice.method, choice.reason) for choice in solution.choices]
    torch.save(content | {"choices": choices}, path)


def draw(path: Path, solution: FlowSolution) -> None:
    """Loss, gradient norm and step size against flow time; nothing where the flow did not leave its start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if len(solution.t) > 1:
        plot_loss(solution, ax=left)
        plot_loss(solution, quantity="gradient norm", ax=middle)
        plot_step_size(solution, ax=right)
    figure.savefig(path, dpi=100)
