"""Take a saved model to a critical point by Newton's method, and certify what kind of point that is."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from torch import Tensor

from torch_gradflow.command_line.arguments import add_output_argument, count, number, output_directory
from torch_gradflow.command_line.errors import UsageError
from torch_gradflow.command_line.networks import load_model, save_model
from torch_gradflow.minimize.certificate import CriticalPoint
from torch_gradflow.minimize.methods import METHODS
from torch_gradflow.minimize.result import MinimizeResult
from torch_gradflow.optim.newton_polish import NewtonPolish
from torch_gradflow.plotting import plot_spectrum

# "rounding": nothing further can be gained.
DONE = ("converged", "rounding")

USAGE = "MODEL [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``polish``."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a file that compare, flow or polish wrote")
    parser.add_argument("--data", metavar="FILE", help="where the CSV file is now (default: where it was)")
    parser.add_argument(
        "--method", choices=METHODS, default="auto", metavar="NAME", help=f"{', '.join(METHODS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--gtol",
        type=partial(number, least=0.0),
        default=1e-13,
        help="done when ‖∇L‖ in the infinity norm is at most this (default: %(default)g)",
    )
    parser.add_argument(
        "--max-iter", type=count, metavar="N", help="(default: 2000, or 20000 for methods that evaluate nothing but gradients)"
    )
    parser.add_argument("--escape", action="store_true", help="leave a saddle along negative curvature, and go on")
    add_output_argument(parser, "the model's directory, NAME-polish")


def run(args: argparse.Namespace) -> int:
    """Polish, print and write certificate.txt, write model.pt and spectrum.png."""
    problem, network = load_model(args.model, args.data)
    output = output_directory(args.output, str(args.model.with_name(f"{args.model.stem}-polish")))
    print(problem)
    optimizer = NewtonPolish(
        network.parameters(),
        method=args.method,
        gtol=args.gtol,
        max_iter=args.max_iter,
        weight_decay=problem.settings.weight_decay,
        escape=args.escape,
        progress=sys.stderr.isatty(),
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_fn(network(problem.x), problem.y)
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except (MemoryError, NotImplementedError) as error:
        raise UsageError(f"argument --method: {error}") from None
    result = optimizer.result
    assert result is not None  # step sets it
    text = report(result)
    print(text)
    (output / "certificate.txt").write_text(f"{problem}\n{text}\n", encoding="utf-8")
    save_model(output / "model.pt", problem, network, result.loss, method=result.method)
    if result.certificate is not None:
        draw(output / "spectrum.png", result.certificate)
    print(f"Certificate, model and figure: {output}")
    return 0 if result.status in DONE else 1


def report(result: MinimizeResult) -> str:
    """What was reached, and what kind of point it is."""
    lines = [result.message, f"loss {result.loss:.15g}, |gradient| {result.grad_norm:.1e}."]
    point = result.certificate
    if point is not None:
        low, high = (float(point.eigenvalues[i]) for i in (0, -1))
        lines += [
            f"{point.kind} ({point.end}): {point.message}",
            f"eigenvalues of the Hessian: {low:.6g} to {high:.6g}; {point.n_negative} negative, {point.n_zero} zero.",
        ]
    return "\n".join(lines)


def draw(path: Path, point: CriticalPoint) -> None:
    """The spectrum."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot_spectrum(point, ax=figure.subplots())
    figure.savefig(path, dpi=100)
