"""The gradient and the Hessian of a population loss: in closed form, by autograd through the same formula, and from data.

erf(z/√2) students and teachers without biases, d = 100, n = k = 50: 5,050 parameters. "autograd" is the same loss written as
one arcsine of a Gram matrix; its Hessian takes forward-over-reverse products with many unit vectors at a time, as
``torch.func.hessian`` does, or one double backward pass per row (both measured on some rows). "data" is one gradient of the
mean squared error on 100,000 samples, by torch. Medians of interleaved rounds, on one core.

    python benchmarks/population.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _environment import environment, settle
from torch import Tensor, nn

from torch_gradflow import PopulationObjective

RESULTS = Path(__file__).parent / "results" / "population.json"
N_INPUTS, N_STUDENT, N_TEACHER, N_SAMPLES = 100, 50, 50, 100_000
# Rows of the Hessian that one measurement takes.
ROWS = 100


class Erf(nn.Module):
    """erf(z/√2)."""

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        return torch.erf(z / math.sqrt(2))


def network(n: int) -> nn.Sequential:
    """One hidden layer without biases."""
    return nn.Sequential(nn.Linear(N_INPUTS, n, bias=False), Erf(), nn.Linear(n, 1, bias=False)).double()


def written_out(teacher: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The loss as autograd can take it."""
    v, b = (p.detach() for p in teacher.parameters())
    n = N_STUDENT * N_INPUTS

    def loss(theta: Tensor) -> Tensor:
        u = torch.cat([theta[:n].view(N_STUDENT, N_INPUTS), v])
        a = torch.cat([theta[n:], -b[0]])
        gram = u @ u.T
        size = (1 + gram.diagonal()).rsqrt()
        return a @ (torch.asin(gram * size * size[:, None]) @ a) * (2 / math.pi)

    return loss


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure, compare, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    settle(options.threads)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    student, teacher = network(N_STUDENT), network(N_TEACHER)
    objective, loss = PopulationObjective(student, teacher), written_out(teacher)
    theta = objective.initial_theta()
    x = torch.randn(N_SAMPLES, N_INPUTS, dtype=torch.float64)
    with torch.no_grad():
        y = teacher(x)

    def autograd_gradient() -> Tensor:
        leaf = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        return gradient

    def rows_by_vmap() -> Tensor:
        """Products with some unit vectors at once, forward over reverse, which is what ``torch.func.hessian`` does."""
        gradient = torch.func.grad(loss)
        units = torch.eye(ROWS, len(theta), dtype=torch.float64)
        rows: Tensor = torch.func.vmap(lambda v: torch.func.jvp(gradient, (theta,), (v,))[1])(units)
        return rows

    def rows_by_double_backward() -> Tensor:
        leaf = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.stack([torch.autograd.grad(gradient[i], leaf, retain_graph=True)[0] for i in range(ROWS)])

    def data_gradient() -> None:
        student.zero_grad()
        nn.functional.mse_loss(student(x), y).backward()

    candidates: dict[str, Callable[[], object]] = {
        "gradient, closed form": lambda: objective.loss_and_gradient(theta),
        "gradient, autograd": autograd_gradient,
        "gradient, data": data_gradient,
        "Hessian, closed form": lambda: objective.hessian(theta),
        "Hessian, autograd, vmap": rows_by_vmap,
        "Hessian, autograd, row by row": rows_by_double_backward,
    }
    hessian = objective.hessian(theta)
    off = {
        "gradient": float((objective.loss_and_gradient(theta)[1] - autograd_gradient()).abs().max()),
        "Hessian": max(float((hessian[:ROWS] - rows()).abs().max()) for rows in (rows_by_vmap, rows_by_double_backward)),
    }
    del hessian
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, call in candidates.items():
            scale = len(theta) / ROWS if "Hessian, autograd" in name else 1.0
            found[name].append(scale * seconds(call))
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, value in medians.items():
        kind = name.split(",")[0]
        print(f"{name:32s}{1e3 * value:12.2f} ms{value / medians[f'{kind}, closed form']:10.1f} ×")
    print(f"Largest differences from autograd: gradient {off['gradient']:.1e}, Hessian {off['Hessian']:.1e}")
    about = environment(("torch",), options.threads, rounds=options.rounds)
    results = {"environment": about, "seconds": medians, "differences": off}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Saved in {RESULTS}")


if __name__ == "__main__":
    main()
