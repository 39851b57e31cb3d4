"""To which index vector does a neuron go? Multi-index models with the correlation loss (arXiv 2411.08798).

The teacher is Σ_j h_p(v_j·x) with the Hermite polynomial h_p of degree p, and unit vectors v_j that overlap by β. In the
correlation loss neurons do not see one another; input weights are kept at norm 1.

First: where the v_j are much alike, neurons go to their mean, which attracts them for β > β_c = (p − 2)/(k + p − 2). Drawn is
the lowest eigenvalue of the Hessian there; printed is where it changes its sign. Second: for orthogonal v_j, every neuron
ends at the one that it was nearest to.

    python examples/multi_index.py [--indices 5] [--inputs 20] [--neurons 50]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch_gradflow import PopulationObjective, UnitRows, critical_overlap, hermite_coefficients, integrate


class Hermite(nn.Module):
    """h_p(z), the Hermite polynomial with E[h_p(z)²] = 1."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.powers = hermite_coefficients(degree)

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        total = self.powers[-1] * z
        for c in self.powers[-2:0:-1]:
            total = (total + c) * z
        return total + self.powers[0]


def network(w: Tensor, degree: int) -> nn.Sequential:
    """Σ_i h_p(w_i·x); only w is trained."""
    n, d = w.shape
    model = nn.Sequential(nn.Linear(d, n, bias=False), Hermite(degree), nn.Linear(n, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(w)
        model[2].weight.fill_(1.0)
    model[2].weight.requires_grad_(False)
    return model


def on_spheres(w: Tensor, v: Tensor, degree: int) -> UnitRows:
    """The correlation loss of neurons w with index vectors v, at norm 1."""
    return UnitRows(PopulationObjective(network(w, degree), network(v, degree), loss="correlation"), *w.shape)


def equiangular(k: int, d: int, overlap: float) -> Tensor:
    """k unit vectors of d numbers with v_i·v_j = overlap."""
    gram = torch.full((k, k), overlap, dtype=torch.float64).fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(gram)
    roots = vectors @ torch.diag(values.clamp(min=0.0).sqrt()) @ vectors.T
    return torch.cat([roots, torch.zeros(k, d - k, dtype=torch.float64)], 1)


def lowest_at_mean(k: int, d: int, degree: int, overlap: float) -> float:
    """The lowest eigenvalue of one neuron's Hessian at the mean of the index vectors, along the sphere."""
    v = equiangular(k, d, overlap)
    mean = v.mean(0, keepdim=True)
    mean = mean / mean.norm()
    hessian = on_spheres(mean, v, degree).hessian(mean[0])
    # Away from the sphere it is 0: that eigenvalue is moved out of the way.
    return float(torch.linalg.eigvalsh(hessian + 1e3 * mean.T @ mean)[0])


def crossing(k: int, d: int, degree: int) -> float:
    """The overlap at which that eigenvalue changes its sign, by bisection."""
    low, high = 0.0, 0.99
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if lowest_at_mean(k, d, degree, middle) < 0 else (low, middle)
    return 0.5 * (low + high)


def ends(k: int, d: int, degree: int, n: int, time: float) -> tuple[Tensor, Tensor, Tensor]:
    """Overlaps with k orthogonal index vectors along the flow, shape ``(times, n, k)``; the times; the nearest at the start.

    Neurons of odd degree start with positive overlaps only: at a negative one they would first have to pass through zero.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.eye(k, d, dtype=torch.float64)
    w = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if degree % 2:
        w[:, :k] = w[:, :k].abs()
    w = w / w.norm(dim=1, keepdim=True)
    objective = on_spheres(w, v, degree)
    times = torch.cat([torch.zeros(1), torch.logspace(-2, math.log10(time), 80)]).double()
    flow = integrate(objective, w.reshape(-1), (0.0, float(times[-1])), t_eval=times, method="dopri5", rtol=1e-6)
    overlaps = flow.theta.view(len(times), n, d)[:, :, :k]
    return overlaps, times, overlaps[0].abs().argmax(1)


def main() -> None:
    """Both parts, and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indices", type=int, default=5, help="k")
    parser.add_argument("--inputs", type=int, default=20, help="d")
    parser.add_argument("--neurons", type=int, default=50)
    parser.add_argument("--time", type=float, default=100.0, help="flow time")
    parser.add_argument("--figure", type=Path, default=Path("multi_index.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    k, d, n = options.indices, options.inputs, options.neurons
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    print(f"{'p':>2s}{'k':>4s}{'beta_c':>12s}{'found':>12s}{'nearest index vector':>24s}")
    for degree, color in ((3, "tab:blue"), (4, "tab:orange")):
        theory, found = critical_overlap(k, degree), crossing(k, d, degree)
        overlaps, times, nearest = ends(k, d, degree, n, options.time)
        arrived = overlaps[-1].abs().gather(1, nearest[:, None])[:, 0] > 0.999
        print(f"{degree:2d}{k:4d}{theory:12.7f}{found:12.7f}{int(arrived.sum()):15d} of {n:3d}")
        betas = torch.linspace(0.0, 0.6, 31).tolist()
        left.plot(betas, [lowest_at_mean(k, d, degree, beta) for beta in betas], color=color, label=f"p = {degree}")
        left.axvline(theory, color=color, linestyle=":")
        right.semilogx(times[1:], overlaps[1:].abs().amax(2), color=color, linewidth=0.6, alpha=0.6)
    left.axhline(0.0, color="black", linewidth=0.8)
    left.set(xlabel="overlap of the index vectors", ylabel="lowest eigenvalue at the mean", title="dotted: β_c")
    left.legend()
    right.set(xlabel="flow time", ylabel="largest overlap of each neuron", title="orthogonal index vectors")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(options.figure, dpi=110)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
